"""The rotary embedding in a GGUF file, in and out.

Scalings "linear" and "yarn" are keys. That of Llama 3 is a tensor, what each frequency
is divided by: parameters that give it are looked for, and a tensor that none gives is
refused. llama.cpp multiplies what YaRN's authors suggest for cosines and sines by a key
of its own.
"""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from vaani_jax.errors import VaaniError
from vaani_jax.interop.formats.gguf_keys import LARGEST, Keys
from vaani_jax.model.config import Architecture
from vaani_jax.model.rotary import SCALINGS, Rotary, yarn_attention_factor
from vaani_jax.words import shown

FACTORS = "rope_freqs.weight"  # of llama3

# Ours of YaRN, and llama.cpp's key with what it stands for where it is missing.
BETAS = {
    "rope_beta_fast": ("rope.scaling.yarn_beta_fast", 32.0),
    "rope_beta_slow": ("rope.scaling.yarn_beta_slow", 1.0),
}

# Keys that change the embedding in a way that isn't known here, where they aren't this.
NEUTRAL = {
    "rope.scaling.yarn_ext_factor": (-1.0, 1.0),
    "rope.scaling.yarn_attn_factor": (1.0,),
    "rope.scaling.yarn_log_multiplier": (0.0,),
    "rope.scaling.alpha": (0.0, 1.0),
}

# Relative; factors are computed in float32 where files are made.
TOLERANCE = 1e-5

LARGEST_BASE = 1e12
LARGEST_FACTOR = 1e6

# Of Llama 3.1 and 3.2: the context before, and the two bounds.
USUAL = (8192, 1.0, 4.0)


def from_keys(keys: Keys, size: int, factors: np.ndarray | None) -> dict[str, Any]:
    """Keys of `Architecture` that a file decides, those with today's defaults left out.

    Args:
      keys: of its architecture.
      size: H.
      factors: of `FACTORS`, float32 [H / 2]; None where there is none.

    Raises VaaniError, naming the key, for what they can't express.
    """
    theta = keys.number("rope.freq_base", 10_000.0, 1.0, LARGEST_BASE)
    values: dict[str, Any] = {"rope_theta": theta}
    for key, known in NEUTRAL.items():
        if keys.number(key, known[0]) not in known:
            raise VaaniError(f"{keys.name(key)} is set: it is not known here")
    rotated = keys.whole("rope.dimension_count", size)
    if rotated != size:
        raise VaaniError(
            f"{keys.name('rope.dimension_count')} is {rotated}: it rotates a part of"
            f" each head of {size} only, and all of it is rotated here"
        )
    factor = keys.number("rope.scaling.factor", 0.0, 0.0, LARGEST_FACTOR)
    factor = factor or keys.number("rope.scale_linear", 0.0, 0.0, LARGEST_FACTOR)
    attention = keys.number("rope.scaling.attn_factor", 1.0, 1e-6, LARGEST_FACTOR)
    # As llama.cpp has it: a factor alone is a linear one.
    kind = keys.text("rope.scaling.type", "linear")
    if kind not in ("none", "linear", "yarn"):
        raise VaaniError(
            f"{keys.name('rope.scaling.type')} is {shown(kind)[:60]}: none, linear and"
            " yarn can be imported"
        )
    scaled = kind != "none" and factor not in (0.0, 1.0)
    if attention != 1.0 and not (scaled and kind == "yarn"):
        raise VaaniError(
            f"{keys.name('rope.scaling.attn_factor')} is {attention}: only yarn has one"
            " here"
        )
    if factors is not None and not (factors == 1).all():
        if scaled:
            raise VaaniError(f"{FACTORS} and {kind} scaling can't go together here")
        return values | _llama3(keys, theta, size, factors)
    if not scaled:
        return values
    values |= {"rope_scaling": kind, "rope_factor": factor}
    if kind == "yarn":
        values["rope_original_len"] = keys.whole(
            "rope.scaling.original_context_length", keys.whole("context_length")
        )
        if attention != 1.0:
            suggested = yarn_attention_factor(factor)
            values["rope_attention_factor"] = attention * suggested
        for ours, (key, default) in BETAS.items():
            if (found := keys.number(key, default)) != default:
                values[ours] = found
    return values


def _llama3(keys: Keys, theta: float, size: int, factors: np.ndarray) -> dict[str, Any]:
    """Parameters with which frequencies are divided by these factors."""
    if not (np.isfinite(factors) & (factors > 0)).all():
        raise VaaniError(f"{FACTORS} holds values that are no factors")
    expected = factors.astype(np.float64)
    frequency = theta ** (-np.arange(0, size, 2, dtype=np.float64) / size)
    factor = float(f"{expected.max():.6g}")  # a rounding of float32 beside it
    known = keys.whole("rope.scaling.original_context_length", USUAL[0])
    for length, low, high in _guesses(expected, frequency, factor, known):
        rotary = Rotary(size, theta, "llama3", factor, length, 0.0, low, high, 0.0, 0.0)
        given = frequency / SCALINGS["llama3"].frequencies(frequency, rotary)
        if (np.abs(given - expected) <= TOLERANCE * expected).all():
            values: dict[str, Any] = {
                "rope_scaling": "llama3",
                "rope_factor": factor,
                "rope_original_len": length,
            }
            if low != USUAL[1]:
                values["rope_low_freq_factor"] = low
            if high != USUAL[2]:
                values["rope_high_freq_factor"] = high
            return values
    raise VaaniError(
        f"{FACTORS} holds factors that the scaling of Llama 3 gives with no parameters:"
        " such a rotary embedding can't be imported"
    )


def _guesses(
    factors: np.ndarray, frequency: np.ndarray, factor: float, known: int
) -> Iterator[tuple[int, float, float]]:
    """Contexts and bounds that may be those of the factors."""
    yield known, *USUAL[1:]
    # Between the bounds, what is kept of a frequency is a line through its turns
    # within the context: a frequency / (2 pi) - b. Context and bounds may be multiplied
    # by one number, and still give it; the lower bound is 1, then.
    between = (factors > 1 + TOLERANCE) & (factors < factor * (1 - TOLERANCE))
    if factor > 1 and between.sum() >= 2:
        kept = (1 / factors[between] - 1 / factor) / (1 - 1 / factor)
        line = frequency[between] / (2 * math.pi)
        spread = line - line.mean()
        a = float((spread * kept).sum() / max((spread * spread).sum(), 1e-300))
        b = a * float(line.mean()) - float(kept.mean())
        if a > 0 and 1e-6 < b < 1e6:
            for digits in (2, 4, 8):
                high = round(1 + 1 / b, digits)
                length = round(min(a * (high - 1), LARGEST))
                if length >= 1 and high > 1:
                    yield length, 1.0, high


def to_keys(architecture: Architecture) -> dict[str, float | int | str]:
    """The keys, less the name of the architecture, that say it in a file."""
    kind = architecture.rope_scaling
    found: dict[str, float | int | str] = {
        "rope.freq_base": float(architecture.rope_theta),
        "rope.dimension_count": architecture.head_size,
    }
    if kind in ("none", "llama3"):
        return found
    factor = architecture.rope_factor
    found |= {"rope.scaling.type": kind, "rope.scaling.factor": float(factor)}
    if kind == "yarn":
        found["rope.scaling.original_context_length"] = architecture.rope_original_len
        if architecture.rope_attention_factor:
            share = architecture.rope_attention_factor / yarn_attention_factor(factor)
            found["rope.scaling.attn_factor"] = share
        for ours, (key, default) in BETAS.items():
            if (value := getattr(architecture, ours)) != default:
                found[key] = float(value)
    return found


def to_factors(architecture: Architecture) -> np.ndarray | None:
    """What frequencies are divided by, float32 [H / 2], where a file says it so."""
    if architecture.rope_scaling != "llama3":
        return None
    size = architecture.head_size
    frequency = architecture.rope_theta ** (
        -np.arange(0, size, 2, dtype=np.float64) / size
    )
    scaled = SCALINGS["llama3"].frequencies(frequency, architecture.rotary)
    return (frequency / scaled).astype(np.float32)

"""Rotary position embedding, and how its frequencies change for longer contexts.

Pair ``i`` of the ``H / 2`` of a head turns by ``p f_i`` at position ``p``, with
``f_i = theta^(-2 i / H)`` (arXiv:2104.09864). A model that was trained on ``L``
positions is taken to ``factor L`` of them by other frequencies. With the wavelength
``w_i = 2 pi / f_i``:

* linear (arXiv:2306.15595): ``f_i / factor``;
* llama3 (Llama 3.1): ``f_i / factor`` where ``w_i > L / low``, ``f_i`` where
  ``w_i < L / high``, and between them ``(1 - s) f_i / factor + s f_i`` with
  ``s = (L / w_i - low) / (high - low)``;
* yarn (arXiv:2309.00071): ``r f_i / factor + (1 - r) f_i``, where r rises from 0 to 1
  between the pairs that turn ``beta_fast`` and ``beta_slow`` times within ``L``,
  rounded outward to whole pairs; queries and keys are multiplied by
  ``0.1 ln(factor) + 1``.

These are the formulas of ``modeling_rope_utils.py`` of transformers 5. Here they are
computed in float64 and rounded to float32 once; positions times frequencies are
float32, as they are there.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vaani_jax.quant.barriers import rounded, to_dtype

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Rotary:
    """What decides the angles; keys of `Architecture`, which says what they mean.

    Attributes:
      size: H.
      theta: base of the frequencies.
      scaling: a key of `SCALINGS`.
      factor: by how much the context grows.
      original_len: L.
      attention_factor: what cosines and sines are multiplied by; 0 for what the paper
        suggests.
      low_freq_factor, high_freq_factor: of llama3.
      beta_fast, beta_slow: of yarn.
    """

    size: int
    theta: float
    scaling: str
    factor: float
    original_len: int
    attention_factor: float
    low_freq_factor: float
    high_freq_factor: float
    beta_fast: float
    beta_slow: float


# What a scaling may read; the keys of `Architecture` begin with ``rope_``.
SCALING_FIELDS = tuple(field.name for field in dataclasses.fields(Rotary)[3:])


def _linear(frequency: np.ndarray, rotary: Rotary) -> np.ndarray:
    return frequency / rotary.factor


def _llama3(frequency: np.ndarray, rotary: Rotary) -> np.ndarray:
    low, high = rotary.low_freq_factor, rotary.high_freq_factor
    turns = rotary.original_len * frequency / (2 * math.pi)
    kept = np.clip((turns - low) / (high - low), 0, 1)
    return (1 - kept) * frequency / rotary.factor + kept * frequency


def _yarn(frequency: np.ndarray, rotary: Rotary) -> np.ndarray:
    def pair(turns: float) -> float:
        """The pair, fractional, that turns so often within L."""
        wavelength = rotary.original_len / turns
        return (
            rotary.size
            * math.log(wavelength / (2 * math.pi))
            / (2 * math.log(rotary.theta))
        )

    first = max(math.floor(pair(rotary.beta_fast)), 0)
    last: float = min(math.ceil(pair(rotary.beta_slow)), rotary.size - 1)
    if first == last:
        last += 0.001  # as there: a step instead of a ramp
    ramp = np.clip((np.arange(len(frequency)) - first) / (last - first), 0, 1)
    return frequency / rotary.factor * ramp + frequency * (1 - ramp)


def yarn_attention_factor(factor: float) -> float:
    """What YaRN's authors suggest, ``0.1 ln(factor) + 1``."""
    return 0.1 * math.log(factor) + 1


@dataclasses.dataclass(frozen=True)
class Scaling:
    """A kind of rotary scaling.

    Attributes:
      frequencies: of the unscaled ones [H / 2], float64: those that take their place.
      fields: of `SCALING_FIELDS`, those that it reads.
      attention_factor: what cosines and sines are multiplied by, of the factor.
    """

    frequencies: Callable[[np.ndarray, Rotary], np.ndarray]
    fields: tuple[str, ...]
    attention_factor: Callable[[float], float] = lambda factor: 1.0


# A further kind is a function and a row.
SCALINGS: dict[str, Scaling] = {
    "none": Scaling(lambda frequency, rotary: frequency, ()),
    "linear": Scaling(_linear, ("factor",)),
    "llama3": Scaling(
        _llama3, ("factor", "original_len", "low_freq_factor", "high_freq_factor")
    ),
    "yarn": Scaling(
        _yarn,
        ("factor", "original_len", "attention_factor", "beta_fast", "beta_slow"),
        yarn_attention_factor,
    ),
}


@functools.lru_cache(maxsize=4)
def rotary_angles(length: int, rotary: Rotary) -> tuple[np.ndarray, np.ndarray]:
    """Cosines and sines of rotary embedding for positions 0 to ``length - 1``.

    One table for training and decoding: what is cached equals what was trained.

    Returns:
      Two arrays [length, H / 2], float32, times the attention factor; not to be
      written to.
    """
    half, scaling = rotary.size // 2, SCALINGS[rotary.scaling]
    plain = rotary.theta ** (-np.arange(half) / half)
    frequency = scaling.frequencies(plain, rotary).astype(np.float32)
    angle = np.arange(length, dtype=np.float32)[:, None] * frequency[None, :]
    wide = angle.astype(np.float64)
    by = rotary.attention_factor or scaling.attention_factor(rotary.factor)
    cos, sin = ((by * f(wide)).astype(np.float32) for f in (np.cos, np.sin))
    cos.setflags(write=False)
    sin.setflags(write=False)
    return cos, sin


def rotary_embedding(x: Array, cos: Any, sin: Any) -> Array:
    """Rotary position embedding (arXiv:2104.09864), rotate-half layout.

    Args:
      x: queries or keys [B, T, heads, H], H even.
      cos, sin: rows of `rotary_angles` for the positions of ``x``, [T, H / 2], or
        [B, T, H / 2] where rows differ.

    Returns:
      Same shape and dtype as ``x``; computed in float32.
    """
    where = (None, slice(None)) if cos.ndim == 2 else (slice(None), slice(None))
    cos, sin = cos[*where, None, :], sin[*where, None, :]
    low, high = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate(
        [
            rounded(low * cos) - rounded(high * sin),
            rounded(high * cos) + rounded(low * sin),
        ],
        axis=-1,
    )
    return to_dtype(rotated, x.dtype)

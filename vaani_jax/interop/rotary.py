"""The rotary embedding in a ``config.json``, in and out.

transformers 5 keeps all of it in ``rope_parameters``; version 4 has ``rope_theta`` and
``rope_scaling`` beside each other. Version 5 reads those too, and prefers them. Keys
that a scaling does not read are passed over, as they are there.
"""

import math
from typing import Any

from vaani_jax.errors import VaaniError
from vaani_jax.interop.values import brief, integer, number
from vaani_jax.model.config import Architecture
from vaani_jax.model.rotary import SCALINGS

# Ours, less ``rope_``, and theirs.
FIELDS = {
    "factor": "factor",
    "original_len": "original_max_position_embeddings",
    "attention_factor": "attention_factor",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "beta_fast": "beta_fast",
    "beta_slow": "beta_slow",
}


# Their ``rope_type`` by our `SCALINGS`.
TYPES = {"none": "default", "linear": "linear", "llama3": "llama3", "yarn": "yarn"}


# What else may be there, whatever the type.
OTHERS = {"rope_theta", "rope_type", "type", "partial_rotary_factor"}


LARGEST = 1e6  # of any number of a scaling


def to_config(architecture: Architecture) -> dict[str, Any]:
    """Keys of a ``config.json`` besides ``rope_theta``."""
    kind = architecture.rope_scaling
    scaling: dict[str, Any] = {"rope_type": TYPES[kind]}
    for name in SCALINGS[kind].fields:
        value = getattr(architecture, f"rope_{name}")
        if value:  # 0 stands for what they compute, too
            scaling[FIELDS[name]] = value
    content = {"rope_parameters": {"rope_theta": architecture.rope_theta, **scaling}}
    return content if kind == "none" else {**content, "rope_scaling": scaling}


def from_config(content: dict[str, Any], default_theta: float) -> dict[str, Any]:
    """Keys of `Architecture` that a ``config.json`` decides.

    Args:
      content: of the file.
      default_theta: the base where it names none.

    Raises VaaniError, naming the key, for what they can't express.
    """
    _check_share(content)
    key, rope = "rope_parameters", {}
    theta = content.get("rope_theta")
    for place in ("rope_parameters", "rope_scaling"):
        found = content.get(place)
        if found is not None and not isinstance(found, dict):
            raise VaaniError(f"config.json: {place} must hold keys")
        if found:
            key, rope = place, found
            theta = found.get("rope_theta", theta)
            _check_share(found)
    theta = default_theta if theta is None else theta
    kind = _kind(key, rope)
    values: dict[str, Any] = {
        "rope_theta": number("rope_theta", theta, 1.0, 1e12),
        "rope_scaling": kind,
    }
    if kind == "yarn":
        rope = _of_yarn(content, rope)
    for name in SCALINGS[kind].fields:
        value = rope.get(FIELDS[name])
        if name == "original_len":
            values["rope_original_len"] = _original_len(content, key, value)
        elif value is None and kind == "yarn" and name != "factor":
            continue  # a default of theirs is one of ours
        else:
            low = 1.0 if name == "factor" else 1e-6
            label = f"{key}.{FIELDS[name]}"
            values[f"rope_{name}"] = number(label, value, low, LARGEST)
    return values


def _kind(key: str, rope: dict[str, Any]) -> str:
    theirs = rope.get("rope_type", rope.get("type", "default"))
    kinds = {theirs: ours for ours, theirs in TYPES.items()}
    if not isinstance(theirs, str) or theirs not in kinds:
        scalings = ", ".join(kinds)
        raise VaaniError(
            f"config.json has rotary scaling of type {brief(theirs)}: {scalings} can be"
            " imported"
        )
    known = set(OTHERS)
    if theirs == "default":
        neutral = {k for k in (*FIELDS.values(), "attn_factor") if rope.get(k) == 1}
        known |= neutral | {k for k, value in rope.items() if value is None}
    else:
        known |= {*FIELDS.values()}
    if theirs == "yarn":
        known |= {"mscale", "mscale_all_dim"}
        known |= {k for k in ("attn_factor", "truncate") if rope.get(k) in (True, 1)}
    if other := sorted(map(str, rope.keys() - known)):
        raise VaaniError(
            f"config.json has {', '.join(f'{key}.{k}' for k in other)[:100]}: this"
            f" changes the rotary embedding of type {theirs} in a way that is not known"
            " here, or gives layers their own"
        )
    return kinds[theirs]


def _of_yarn(content: dict[str, Any], rope: dict[str, Any]) -> dict[str, Any]:
    """``rope`` with what DeepSeek's spelling of it stands for."""
    rope = dict(rope)
    # What is false there stands for a default.
    for name in ("beta_fast", "beta_slow", "mscale", "mscale_all_dim"):
        if not rope.get(name):
            rope[name] = None
    if rope.get("factor") is None:
        before = rope.get(FIELDS["original_len"])
        longest = content.get("max_position_embeddings")
        rope["factor"] = integer("max_position_embeddings", longest) / integer(
            FIELDS["original_len"], before
        )
    scales = rope.pop("mscale"), rope.pop("mscale_all_dim")
    if rope.get("attention_factor") is None and None not in scales:
        factor = number("factor", rope["factor"], 1.0, LARGEST)
        over, under = (
            number("mscale", scale, 1e-6, LARGEST) * math.log(factor) * 0.1 + 1
            for scale in scales
        )
        rope["attention_factor"] = over / under
    return rope


def _original_len(content: dict[str, Any], key: str, value: Any) -> int:
    for name, found in (
        (FIELDS["original_len"], content.get(FIELDS["original_len"])),
        (f"{key}.{FIELDS['original_len']}", value),
    ):
        if found is not None:
            return integer(name, found)
    longest = content.get("max_position_embeddings")
    return integer("max_position_embeddings", longest)


def _check_share(found: dict[str, Any]) -> None:
    for key in ("partial_rotary_factor", "rotary_pct", "rope_pct"):
        if found.get(key) not in (None, 1):
            raise VaaniError(
                f"config.json has {key} {brief(found[key])}: it rotates a part of each"
                " head only, and all of it is rotated here"
            )

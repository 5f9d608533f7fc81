"""Values of a ``config.json``, checked: nothing there has the type that it should."""

from typing import Any

from vaani_jax.errors import VaaniError

LARGEST = 2**31 - 1  # of any integer setting: what int32 indices can count


def integer(key: str, value: Any) -> int:
    """A whole number from 1 to `LARGEST`; else VaaniError, which names the key."""
    fits = isinstance(value, int) and not isinstance(value, bool)
    if not fits or not 1 <= value <= LARGEST:
        raise VaaniError(
            f"config.json has {key} {brief(value)}: it must be a whole number from 1"
            f" to {LARGEST}"
        )
    return value


def number(key: str, value: Any, low: float, high: float) -> float:
    """A number from ``low`` to ``high``; else VaaniError, which names the key."""
    fits = isinstance(value, int | float) and not isinstance(value, bool)
    if not fits or not low <= value <= high:  # which NaN is not, either
        raise VaaniError(
            f"config.json has {key} {brief(value)}: it must be from {low} to {high}"
        )
    return float(value)


def brief(value: Any) -> str:
    """A value in a message: one line, not too long."""
    text = ascii(value)
    return text if len(text) <= 60 else f"{text[:57]}..."

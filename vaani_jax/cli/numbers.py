"""Numbers on a command line, within their limits."""

import argparse
from collections.abc import Callable
from typing import TypeVar

from vaani_jax.settings import LARGEST_INT, Limits

Number = TypeVar("Number", int, float)


def number(
    kind: Callable[[str], Number],
    *,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float = LARGEST_INT,
) -> Callable[[str], Number]:
    """What argparse takes for the ``type`` of an argument: see `settings.Limits`."""
    limits = Limits(at_least=at_least, above=above, at_most=at_most)

    def parse(text: str) -> Number:
        value = kind(text)
        if not limits.allow(value):
            raise argparse.ArgumentTypeError(f"{text} must be {limits}")
        return value

    # What argparse says of text that is no number.
    parse.__name__ = getattr(kind, "__name__", "number")
    return parse

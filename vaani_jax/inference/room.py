"""What a cache takes, before it is taken."""

import functools
import math

import jax

from vaani_jax.devices.memory import available_memory
from vaani_jax.errors import VaaniError
from vaani_jax.model.cache import DTYPES, KVCache
from vaani_jax.model.config import Architecture
from vaani_jax.words import plural, size

LARGE = 2**28  # bytes of a cache that are worth a line


@functools.cache
def cache_bytes(
    architecture: Architecture, rows: int, capacity: int, dtype: str
) -> int:
    """Bytes of a `KVCache`. Raises VaaniError for a dtype that it can't have."""
    shapes = jax.eval_shape(lambda: KVCache.create(architecture, rows, capacity, dtype))
    leaves = jax.tree.leaves(shapes)
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in leaves)


def in_words(architecture: Architecture, rows: int, capacity: int, dtype: str) -> str:
    """A line on a large cache, and on what other dtypes make of it; else nothing."""
    taken = {
        name: cache_bytes(architecture, rows, capacity, name)
        for name in dict.fromkeys((dtype, *DTYPES))
    }
    if taken[dtype] <= LARGE:
        return ""
    others = [
        f"{name} {size(taken[name])}" for name in DTYPES if taken[name] < taken[dtype]
    ]
    texts = "" if rows == 1 else f" for each of {plural(rows, 'text')}"
    line = (
        f"the cache of keys and values takes {size(taken[dtype])} in {dtype}:"
        f" {capacity:,} tokens{texts}"
    )
    return line + (f"; --kv-dtype makes it {', '.join(others)}" if others else "")


def check_room(
    architecture: Architecture, rows: int, capacity: int, dtype: str, beside: int = 0
) -> None:
    """Refuses a cache that the free memory can't hold, where that is known.

    Args:
      architecture, rows, capacity, dtype: of the cache.
      beside: bytes that are needed to use it.

    Raises VaaniError that says which dtypes would fit.
    """
    taken, free = cache_bytes(architecture, rows, capacity, dtype), available_memory()
    if free is None or taken + beside <= free:
        return
    fitting = [
        name
        for name in DTYPES
        if cache_bytes(architecture, rows, capacity, name) + beside <= free
    ]
    asked = plural(rows, "text") if rows > 1 else "the text"
    advice = f"--kv-dtype {fitting[0]} fits" if fitting else "none of --kv-dtype fits"
    raise VaaniError(
        f"a cache of {capacity:,} tokens for {asked} takes {size(taken)} in {dtype},"
        f" reading it {size(beside)} more, and {size(free)} of memory are free:"
        f" {advice}; or ask for fewer tokens"
    )

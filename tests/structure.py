"""Structures of pytrees, for assertions."""

from typing import Any

import jax


def same_structure(a: Any, b: Any) -> bool:
    """Whether two pytrees have the same structure."""
    one: Any = jax.tree.structure(a)
    return bool(one == jax.tree.structure(b))

"""Names of the leaves of a tree: the keys on the way, joined by slashes."""

from collections.abc import Callable
from typing import Any

import jax


def keys(path: Any) -> tuple[str, ...]:
    """Keys and attributes of a path of `jax.tree_util`; indices are left out."""
    found = (getattr(entry, "key", getattr(entry, "name", None)) for entry in path)
    return tuple(str(key) for key in found if key is not None)


def name(path: Any) -> str:
    """``layers_0/attn/q_proj/kernel``, for example."""
    return "/".join(keys(path))


def named(tree: Any, is_leaf: Callable[[Any], bool] | None = None) -> dict[str, Any]:
    """Leaves by name, in the order of the tree."""
    found = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)[0]
    return {name(path): leaf for path, leaf in found}

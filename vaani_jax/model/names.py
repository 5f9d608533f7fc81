"""The names of leaves: which parameters are ternary kernels, and what is theirs."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from vaani_jax import leaves
from vaani_jax.quant.held import hold
from vaani_jax.quant.spec import Split, TernarySpec
from vaani_jax.quant.weights import ternarize

Array = jax.Array
Tree = Any


@dataclasses.dataclass(frozen=True)
class TernaryKernel:
    """A ternary kernel of a model: [in, out], or [layers, in, out] when stacked.

    Its scale is None where it is computed, not stored.
    """

    name: str
    kernel: Array
    threshold: Array
    scale: Array | None = None

    @property
    def split(self) -> Split:
        """Which side the mesh axis ``tensor`` cuts, see `ternary_dot`."""
        return "in" if self.name.endswith(("o_proj", "down_proj")) else "out"


# Quantizers of the embedding's transpose, [D, V], and what that kernel is called.
OF_EMBEDDING = {"head_quantizer": "head", "embedding_quantizer": "embedding"}


def ternary_kernels(variables: Tree) -> list[TernaryKernel]:
    """Every ternary kernel with its threshold, in the order of the tree.

    Names are module paths, such as ``layers_0/attn/q_proj``; a ternary embedding is
    ``embedding``, a ternary head that is tied to one of another kind ``head``.
    """
    found = []

    def visit(path: tuple[str, ...], node: Tree, masters: Tree) -> None:
        if "weight_quantizer" in node:
            kept = node["weight_quantizer"]
            found.append(
                TernaryKernel(
                    "/".join(path),
                    masters["kernel"],
                    kept["threshold"],
                    kept.get("scale"),
                )
            )
            return
        for key, child in node.items():
            if key in OF_EMBEDDING:
                kernel = masters["embedding"].T
                found.append(
                    TernaryKernel(
                        OF_EMBEDDING[key],
                        kernel,
                        child["threshold"],
                        child.get("scale"),
                    )
                )
            elif key in masters:
                visit((*path, key), child, masters[key])

    visit((), variables["quant"], variables["params"])
    return found


def with_settings(quant: Tree, thresholds: dict[str, Array], momentum: Array) -> Tree:
    """``quant`` with other thresholds, by kernel name, and activation momentum."""

    def visit(path: Any, leaf: Array) -> Array:
        *names, owner, key = leaves.keys(path)
        if owner == "weight_quantizer" and key == "threshold":
            return thresholds["/".join(names)]
        if owner in OF_EMBEDDING and key == "threshold":
            return thresholds[OF_EMBEDDING[owner]]
        return (
            momentum.astype(leaf.dtype) * jnp.ones_like(leaf)
            if key == "momentum"
            else leaf
        )

    return jax.tree_util.tree_map_with_path(visit, quant)


def held(spec: TernarySpec, variables: Tree, *, whole: bool) -> Tree:
    """Every ternary kernel quantized: the collection ``held`` of a model.

    Products of a model that is given it quantize no kernel.

    Args:
      spec: how to quantize.
      variables: ``params`` and ``quant``.
      whole: see `hold`.
    """
    found: dict[str, Any] = {}
    for entry in ternary_kernels(variables):
        function = functools.partial(hold, spec=spec, split=entry.split, whole=whole)
        if entry.kernel.ndim == 3:
            # All at once: XLA's CPU code does not order what several loops send.
            function = jax.vmap(function)
        kept = function(entry.kernel, entry.threshold, entry.scale)
        if entry.name in OF_EMBEDDING.values():
            found[entry.name] = kept
            continue
        node = found
        for part in entry.name.split("/"):
            node = node.setdefault(part, {})
        node["kernel"] = kept
    return found


def ternary_codes(spec: TernarySpec, variables: Tree) -> dict[str, tuple[Array, Array]]:
    """Codes (int8, as the kernel) and scales (float32) of every ternary kernel.

    Stacked kernels keep their leading axis, in the scales too.
    """
    codes = {}
    for entry in ternary_kernels(variables):
        function = lambda w, tau, kept: ternarize(  # noqa: E731
            w, tau, spec, kept
        )
        if entry.kernel.ndim == 3:
            function = jax.vmap(function)
        t, scale = function(entry.kernel, entry.threshold, entry.scale)
        codes[entry.name] = (t.astype(jnp.int8), scale)
    return codes

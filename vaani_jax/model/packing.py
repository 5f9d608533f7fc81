"""A model's parameters, packed: two bits a ternary weight, eight an embedding's.

A packed model is the params tree of a model whose ternary kernels are `PackedTernary`
and whose embedding may be `PackedRows`; the collection ``quant`` keeps only the
activation ranges, where they are tracked: thresholds have done their work.
"""

from typing import Any, Literal

import jax

from vaani_jax.errors import VaaniError
from vaani_jax.quant.packed import PackedTernary, pack, pack_rows
from vaani_jax.quant.spec import TernarySpec
from vaani_jax.quant.weights import ternarize

Array = jax.Array
Tree = Any


Embedding = Literal["float32", "int8"]


def pack_variables(
    variables: Tree, spec: TernarySpec, *, embedding: Embedding = "float32"
) -> Tree:
    """Packs a model.

    Args:
      variables: its ``params`` and ``quant``, layers unrolled (see `unrolled`).
      spec: how its kernels quantize.
      embedding: how to store the embedding and a head that isn't ternary: as they
        are, or in 8 bits with a scale per row.

    Returns:
      Variables as described at the top of this module. A tied ternary head
      becomes ``head``, beside the embedding.
    """

    def ternary(kernel: Array, quantizer: Tree) -> PackedTernary:
        tau, stored = quantizer["threshold"], quantizer.get("scale")
        return pack(*ternarize(kernel, tau, spec, stored))

    def visit(masters: Tree, settings: Tree) -> tuple[Tree, Tree]:
        settings = dict(settings)
        quantizer = settings.pop("weight_quantizer", None)
        if quantizer is not None:
            packed = {"kernel": ternary(masters["kernel"], quantizer)}
            return packed, settings
        head = settings.pop("head_quantizer", None)
        kept, left = {}, {}
        for key, node in masters.items():
            if isinstance(node, dict):
                kept[key], rest = visit(node, settings.get(key, {}))
                if rest:
                    left[key] = rest
            else:
                kept[key] = node
        if head is not None:
            kept["head"] = ternary(masters["embedding"].T, head)
        return kept, left

    if "layers" in variables["params"]:
        raise VaaniError("unroll the layers of a model before packing it")
    packed, settings = visit(variables["params"], variables["quant"])

    if embedding == "int8":
        packed["embedding"] = pack_rows(packed["embedding"])
        head = packed.get("lm_head", {}).get("kernel")
        if head is not None and not isinstance(head, PackedTernary):
            packed["lm_head"] = {"kernel": pack_rows(head.T)}  # a row per output
    return {"params": packed, "quant": settings}


def packed_bytes(tree: Tree) -> int:
    """Bytes of all arrays of a tree."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))

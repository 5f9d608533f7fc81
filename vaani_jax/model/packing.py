"""A model's parameters, packed: two bits a ternary weight, eight an embedding's.

A packed model is the params tree of a model whose ternary kernels are `PackedTernary`
and whose embedding may be `PackedRows`; the collection ``quant`` keeps only the
activation ranges, where they are tracked: thresholds have done their work.
"""

import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from vaani_jax.errors import VaaniError
from vaani_jax.model.names import OF_EMBEDDING
from vaani_jax.model.transformer import Vaani
from vaani_jax.quant.masters import masters_of
from vaani_jax.quant.packed import (
    Layout,
    PackedRows,
    PackedTernary,
    pack,
    pack_rows,
    scale_of,
    unpack,
)
from vaani_jax.quant.spec import TernarySpec
from vaani_jax.quant.weights import ternarize

Array = jax.Array
Tree = Any


Embedding = Literal["float32", "int8"]


@functools.partial(jax.jit, static_argnames=("spec", "layout"))
def pack_kernel(
    kernel: Array,
    threshold: Array,
    scale: Array | None,
    spec: TernarySpec,
    layout: Layout = "tiles",
) -> PackedTernary:
    """Packs one kernel [K, N]; compiled once a shape, whatever model it is of.

    Args:
      kernel: float32 masters.
      threshold: of its quantizer.
      scale: where it is stored; None where it is computed.
      spec: how it quantizes; static.
      layout: the order of the codes; static.
    """
    codes, found = ternarize(kernel, threshold, spec, scale)
    if spec.granularity == "group":
        found = found.astype(spec.scale_dtype)
    return pack(codes, found, layout)


_pack_rows = jax.jit(pack_rows)


def pack_variables(
    variables: Tree,
    spec: TernarySpec,
    *,
    embedding: Embedding = "float32",
    layout: Layout = "tiles",
) -> Tree:
    """Packs a model, a kernel at a time.

    Args:
      variables: its ``params`` and ``quant``, layers unrolled (see `unrolled`). Kernels
        that are packed already stay as they are.
      spec: how its kernels quantize.
      embedding: how to store the embedding and a head that isn't ternary: as they
        are, or in 8 bits with a scale per row.
      layout: the order of the codes of kernels that are packed here.

    Returns:
      Variables as described at the top of this module. A ternary head that is tied to
      an embedding of another kind becomes ``head``, beside it.
    """

    def ternary(kernel: Array | PackedTernary, quantizer: Tree) -> PackedTernary:
        if isinstance(kernel, PackedTernary):
            return kernel
        tau, stored = quantizer["threshold"], quantizer.get("scale")
        return pack_kernel(kernel, tau, stored, spec, layout)

    def visit(masters: Tree, settings: Tree) -> tuple[Tree, Tree]:
        settings = dict(settings)
        quantizer = settings.pop("weight_quantizer", None)
        if quantizer is not None:
            packed = {**masters, "kernel": ternary(masters["kernel"], quantizer)}
            return packed, settings
        quantizers = {
            name: settings.pop(key)
            for key, name in OF_EMBEDDING.items()
            if key in settings
        }
        kept, left = {}, {}
        for key, node in masters.items():
            if isinstance(node, dict):
                kept[key], rest = visit(node, settings.get(key, {}))
                if rest:
                    left[key] = rest
            else:
                kept[key] = node
        for name, found in quantizers.items():
            embedding = masters["embedding"]
            if not isinstance(embedding, PackedTernary):
                embedding = embedding.T
            kept[name] = ternary(embedding, found)
        return kept, left

    if "layers" in variables["params"]:
        raise VaaniError("unroll the layers of a model before packing it")
    packed, settings = visit(variables["params"], variables["quant"])

    if embedding == "int8":
        packed = round_embedding(packed)
    return {"params": packed, "quant": settings}


def round_embedding(params: Tree) -> Tree:
    """Packed params with an embedding and a head in 8 bits, if they aren't ternary."""
    if not isinstance(params["embedding"], PackedTernary):
        params = {**params, "embedding": _pack_rows(params["embedding"])}
    head = params.get("lm_head", {}).get("kernel")
    if head is not None and not isinstance(head, PackedTernary):
        params["lm_head"] = {"kernel": _pack_rows(head.T)}  # a row per output
    return params


def unpacked_variables(module: Vaani, variables: Tree) -> tuple[Vaani, Tree]:
    """Masters of a packed model: they quantize to its codes and scales.

    Args:
      module: of the packed model.
      variables: as `pack_variables` returns them.

    Returns:
      The model, whose scales are "stored", and its variables.
    """
    params: Tree = {}
    quant: Tree = {}

    def visit(node: Tree, kept: Tree, at: Tree, settings: Tree) -> None:
        settings.update(kept)
        for name, child in node.items():
            if isinstance(child, dict):
                visit(
                    child,
                    kept.get(name, {}),
                    at.setdefault(name, {}),
                    settings.setdefault(name, {}),
                )
                if not settings[name]:
                    del settings[name]
                continue
            if isinstance(child, PackedRows):
                child = child.codes.astype(jnp.float32) * child.scale[:, None]
                child = child.T if name == "kernel" else child
            if not isinstance(child, PackedTernary):
                at[name] = child
                continue
            codes, scale = np.asarray(unpack(child)), np.asarray(scale_of(child))
            masters = jnp.asarray(masters_of(codes, scale))
            quantizer = {
                "threshold": jnp.float32(0.5),
                "scale": jnp.asarray(scale),
            }
            if name == "embedding":
                masters = masters.T
            at[name] = masters
            owner = {"kernel": "weight_quantizer", **_OWNERS}[name]
            settings[owner] = quantizer

    visit(variables["params"], variables["quant"], params, quant)
    if "head" in params:
        raise VaaniError(
            "a packed model whose ternary head is a copy of its embedding has no"
            " masters: take the run that it was packed from"
        )
    return module.changed(weight_scale="stored"), {"params": params, "quant": quant}


# What quantizes the embedding, and its ternary copy.
_OWNERS = {name: owner for owner, name in OF_EMBEDDING.items()}


def packed_bytes(tree: Tree) -> int:
    """Bytes of all arrays of a tree."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))

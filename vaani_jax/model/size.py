"""Counts of a model: parameters, bytes, floating-point operations."""

import dataclasses

import jax
import numpy as np

from vaani_jax import leaves
from vaani_jax.model.names import ternary_kernels
from vaani_jax.model.transformer import Vaani, init_variables


@dataclasses.dataclass(frozen=True)
class ModelSize:
    """Counts of a model; bytes at 16 bits a parameter and with ternary ones at 2."""

    parameters: int
    ternary: int
    bytes_fp16: int
    bytes_2bit: int


def model_size(model: Vaani) -> ModelSize:
    """Counts parameters without computing any."""
    quantized = model.changed(quantize=True)
    variables = jax.eval_shape(lambda: init_variables(quantized, jax.random.key(0)))
    total = sum(int(np.prod(p.shape)) for p in jax.tree.leaves(variables["params"]))
    kernels = jax.eval_shape(
        lambda v: {e.name: e.kernel for e in ternary_kernels(v)}, variables
    )
    ternary = sum(int(np.prod(k.shape)) for k in kernels.values())
    spec = model.spec
    scales = sum(
        int(np.prod(k.shape[:-2])) * int(np.prod(spec.scale_shape(*k.shape[-2:])))
        for k in kernels.values()
    )
    width = 2 if (spec.granularity, spec.scale_dtype) == ("group", "float16") else 4
    return ModelSize(
        parameters=total,
        ternary=ternary,
        bytes_fp16=2 * total,
        bytes_2bit=2 * (total - ternary) + (ternary + 3) // 4 + width * scales,
    )


def flops_per_token(model: Vaani, seq_len: int) -> int:
    """Floating-point operations of a training step per token, as everyone counts them.

    PaLM (arXiv:2204.02311), appendix B: 6 for each parameter that is multiplied (2
    forward, 4 backward), and 12 N H T per layer for the two products of attention, not
    halved for causality. The head counts once, tied or not; a look-up in the embedding,
    norms, quantizers and what rematerialization computes again count nothing. So the
    utilization of a chip (MFU) is tokens per second x this / the chip's peak.

    Args:
      model: with its vocabulary; the twin counts the same.
      seq_len: T, tokens of a training sequence.
    """
    variables = jax.eval_shape(lambda: init_variables(model, jax.random.key(0)))
    multiplied, a = 0, model.architecture
    for path, leaf in leaves.named(variables["params"]).items():
        name = path.rpartition("/")[2]
        if name == "kernel" or (name == "embedding" and a.tie_embeddings):
            multiplied += int(np.prod(leaf.shape))
    return 6 * multiplied + 12 * a.n_layers * a.n_heads * a.head_size * seq_len

"""How a product quantizes, and in which dtype its integers ride."""

import dataclasses
import functools
import platform
from typing import Any, Literal

import jax
import jax.numpy as jnp

WeightScale = Literal["absmean", "least_squares", "stored"]


Granularity = Literal["tensor", "channel"]


OperandDtype = Literal["auto", "bfloat16", "float32", "int8"]


Wire = Literal["2bit", "int8", "float"]


Split = Literal["out", "in"]


@dataclasses.dataclass(frozen=True)
class TernarySpec:
    """How a product quantizes; static, hashable.

    Attributes:
      scale: "absmean" (b1.58), "least_squares" (arXiv:1605.04711), or "stored": a
        number kept beside the kernel, for weights that came as codes and a scale.
      granularity: one scale per "tensor" or per output "channel".
      operands: dtype in which the integers of the forward product ride, and in which
        the backward pass keeps them: "float32", "bfloat16", "int8" (summed in int32).
        The result is the same to the bit; "auto" takes the fastest one that has been
        measured (see `operand_dtype`). With a ``mix`` they ride in float32.
      wire: what devices send each other of a kernel that is cut over them: codes of
        2 or of 8 bits, or the operands. The result is the same to the bit.
    """

    scale: WeightScale = "absmean"
    granularity: Granularity = "tensor"
    operands: OperandDtype = "auto"
    wire: Wire = "2bit"


@functools.cache
def _cpu_multiplies_bfloat16() -> bool:
    """Whether this processor has bfloat16 dot-product instructions."""
    if platform.system() != "Linux":
        return False
    try:
        with open("/proc/cpuinfo", encoding="ascii", errors="replace") as file:
            words = set(file.read().split())
    except OSError:
        return False
    return bool(words & {"avx512_bf16", "amx_bf16"})


def operand_dtype(choice: OperandDtype) -> Any:
    """The dtype of the forward product's operands on the default backend.

    Accelerators multiply bfloat16 at full speed and so do CPUs with AVX-512 BF16 or
    AMX; elsewhere float32 is faster. "auto" never takes int8: the matrix units of GPUs
    and most TPUs are twice as fast in it on paper, but no one has measured a training
    step with it yet (``benchmarks/gpu.py --stages=training`` does). It does halve what
    the backward pass keeps of the operands. XLA's CPU code multiplies int8 slowly.
    """
    if choice == "auto":
        fast = jax.default_backend() != "cpu" or _cpu_multiplies_bfloat16()
        return jnp.bfloat16 if fast else jnp.float32
    return jnp.dtype(choice)

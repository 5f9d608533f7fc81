"""How a product quantizes, and in which dtype its integers ride."""

import dataclasses
import functools
import platform
from typing import Any, Literal

import jax
import jax.numpy as jnp

WeightScale = Literal["absmean", "least_squares", "stored"]


Granularity = Literal["tensor", "channel", "group"]


ScaleDtype = Literal["float32", "float16"]


Activations = Literal["token", "group", "none"]


OperandDtype = Literal["auto", "bfloat16", "float32", "int8"]


Wire = Literal["2bit", "int8", "float"]


Split = Literal["out", "in"]


@dataclasses.dataclass(frozen=True)
class TernarySpec:
    """How a product quantizes; static, hashable.

    Attributes:
      scale: "absmean" (b1.58), "least_squares" (arXiv:1605.04711), or "stored": a
        number kept beside the kernel, for weights that came as codes and a scale.
      granularity: one scale per "tensor", per output "channel", or per "group" of
        inputs of an output.
      group: inputs of a group, where scales go by groups; K is a multiple of it.
      scale_dtype: "float16" rounds scales to numbers that float16 holds, so that files
        which keep two bytes a scale hold the model exactly.
      activations: 8 bits with a scale per "token" (or a given range), 8 bits with a
        scale per "group" of inputs, or "none": they are not rounded.
      activation_group: inputs of such a group; K is a multiple of it.
      operands: dtype in which the integers of the forward product ride, and in which
        the backward pass keeps them: "float32", "bfloat16", "int8" (summed in int32).
        The result is the same to the bit; "auto" takes the fastest one that has been
        measured (see `operand_dtype`). With a ``mix`` they ride in float32.
      wire: what devices send each other of a kernel that is cut over them: codes of
        2 or of 8 bits, or the operands. The result is the same to the bit.
    """

    scale: WeightScale = "absmean"
    granularity: Granularity = "tensor"
    group: int = 128
    scale_dtype: ScaleDtype = "float32"
    activations: Activations = "token"
    activation_group: int = 32
    operands: OperandDtype = "auto"
    wire: Wire = "2bit"

    def scale_shape(self, k: int, n: int) -> tuple[int, ...]:
        """Of the scale of a kernel [k, n]: [], [n] or [k / group, n]."""
        shapes = {"tensor": (), "channel": (n,), "group": (k // self.group, n)}
        return shapes[self.granularity]

    @property
    def pieces(self) -> int:
        """Inputs that share a scale of activations; 0 where a token has one."""
        return self.activation_group if self.activations == "group" else 0


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

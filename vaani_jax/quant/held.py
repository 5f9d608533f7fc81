"""Ternary kernels that are quantized once, for the products of several micro-batches.

Parameters do not change while a step sums gradients over its micro-batches, so neither
do codes and scales: they are computed before the first, and every product takes them as
they are, forward and, where blocks are computed again, once more. Gradients still go
to the master kernels, straight through.
"""

import flax.struct
import jax
import jax.numpy as jnp

from vaani_jax.devices.mesh import shards
from vaani_jax.quant.spec import Split, TernarySpec
from vaani_jax.quant.weights import ternarize
from vaani_jax.quant.wire import gather, opened, send

Array = jax.Array


@flax.struct.dataclass
class Held:
    """Codes and scale of a kernel [K, N].

    Attributes:
      codes: int8 [K, N] in {-1, 0, 1}; in two bits, as `send` has them, where the
        kernel is cut over ``fsdp``.
      scale: float32, [] or [N].
      whole: whether the codes have been gathered along ``fsdp``; static.
    """

    codes: Array
    scale: Array
    whole: bool = flax.struct.field(pytree_node=False, default=False)

    def values(self, split: Split) -> Array:
        """The codes as float32 [K, N]; cut as they are held."""
        return opened(self.codes, jnp.float32, split)


def hold(
    w: Array,
    threshold: Array,
    stored: Array | None,
    *,
    spec: TernarySpec,
    split: Split,
    whole: bool,
) -> Held:
    """Quantizes a kernel for several products.

    Args:
      w: master kernel [K, N].
      threshold, stored, spec: as in `ternarize`.
      split: as in `ternary_dot`.
      whole: whether to gather codes that are cut over ``fsdp``, for a quarter of a byte
        a weight on each device (``spec.wire`` "2bit"); else every product does it. What
        goes as floats is never held whole.
    """
    codes, scale = ternarize(w, threshold, spec, stored)
    sent = send(codes, jnp.int8, spec.wire, split)
    whole = whole and spec.wire != "float" and shards("fsdp") > 1
    return Held(gather(sent, split) if whole else sent, scale, whole)

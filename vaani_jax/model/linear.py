"""BitLinear, and the projection of one input by several of them."""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from vaani_jax.kernels import rows_matmul, ternary_matmul
from vaani_jax.kernels.floats import float_matmul
from vaani_jax.model.config import Execution, Quantization, ternary_spec
from vaani_jax.model.norm import Norm, RMSNorm
from vaani_jax.quant.activations import ActivationQuantizer
from vaani_jax.quant.barriers import rounded, to_dtype
from vaani_jax.quant.held import Held
from vaani_jax.quant.packed import PackedRows, PackedTernary, dequantized
from vaani_jax.quant.product import ternary_dot
from vaani_jax.quant.spec import Split, TernarySpec
from vaani_jax.quant.weights import TernaryQuantizer
from vaani_jax.quant.wire import whole_kernel

Array = jax.Array


PRODUCT = "product"  # what rematerialization calls the outputs of linear layers


class BitLinear(nn.Module):
    """A linear layer with ternary weights and 8-bit inputs.

    Parameters: ``kernel`` [in, features], float32 master weights, or `PackedTernary`;
    ``bias`` [features], float32, where there is one.
    Variables in collection ``quant``: those of its two quantizers.

    Attributes:
      features: width of the output.
      quantization: how weights and inputs are rounded.
      execution: how the product is computed.
      init_std: standard deviation of the initial kernel.
      split: which side of the kernel the mesh axis ``tensor`` cuts, see `ternary_dot`.
      use_bias: whether a bias, in full precision, is added to the product.
    """

    features: int
    quantization: Quantization = Quantization()
    execution: Execution = Execution()
    init_std: float = 0.02
    split: Split = "out"
    use_bias: bool = False

    def setup(self) -> None:
        q = self.quantization
        self.bias = (
            self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32)
            if self.use_bias
            else None
        )
        if q.quantize:
            self.weight_quantizer = TernaryQuantizer(q.threshold, self.spec)
            self.activation_quantizer = ActivationQuantizer(
                q.activation_tracking, q.activation_momentum, q.activation_group
            )

    @property
    def spec(self) -> TernarySpec:
        """How the product quantizes."""
        return ternary_spec(self.quantization, self.execution)

    @nn.compact
    def kernel(self, in_features: int) -> Array | PackedTernary | PackedRows:
        """The master kernel [in_features, features], float32; or a packed one."""
        stored: Any = self.get_variable("params", "kernel")
        if isinstance(stored, PackedTernary | PackedRows):
            return stored
        return self.param(
            "kernel",
            nn.initializers.normal(self.init_std),
            (in_features, self.features),
            jnp.float32,
        )

    def quantized(self, kernel: Array, mix: Array | None) -> Array:
        """The kernel in float32 as its codes and scale have it; see `ternary_dot`."""
        found: Array = self.weight_quantizer(kernel)
        if mix is not None:
            found = kernel + mix.astype(jnp.float32) * (found - kernel)
        return whole_kernel(found, jnp.float32, self.split)

    def held(self) -> Held | None:
        """Codes and scale of the kernel, where they are given: see `names.held`."""
        found: Any = self.get_variable("held", "kernel")
        return found

    def __call__(
        self, x: Array, *, train: bool = False, mix: Array | None = None
    ) -> Array:
        """Maps [..., in] to [..., features], in the dtype of ``x``."""
        return project(x, (self,), train=train, mix=mix)[0]


def unrounded_product(x: Array, kernel: Array) -> Array:
    """``x @ kernel`` in the dtype of x: [..., in] times [in, out], float32."""
    return to_dtype(float_matmul(x, kernel.astype(x.dtype), True), x.dtype)


def project(
    x: Array,
    layers: Sequence[BitLinear],
    *,
    norm: Norm | None = None,
    train: bool = False,
    mix: Array | None = None,
) -> tuple[Array, ...]:
    """Applies several BitLinear layers to one input, which is quantized once.

    A tracked activation range is that of the first layer: the input is the same.

    Args:
      x: [..., in].
      layers: bound modules with equal quantizer settings.
      norm: applied to the input first; packed kernels do both in one call where it is
        an `RMSNorm`.
      train: whether tracked ranges are updated.
      mix: see `ternary_dot`.

    Returns:
      [..., features] of each layer, in ``x.dtype``.
    """
    products = _products(x, layers, norm, train, mix)
    return tuple(
        y if layer.bias is None else _with_bias(y, layer.bias)
        for y, layer in zip(products, layers, strict=True)
    )


def _with_bias(y: Array, bias: Array) -> Array:
    """``y + bias`` [..., features], where ``y`` ends with a product."""
    wide = rounded(y.astype(jnp.float32))
    return to_dtype(wide + bias.reshape((1,) * (y.ndim - 1) + (-1,)), y.dtype)


def _products(
    x: Array,
    layers: Sequence[BitLinear],
    norm: Norm | None,
    train: bool,
    mix: Array | None,
) -> tuple[Array, ...]:
    kernels: list[Any] = [layer.kernel(x.shape[-1]) for layer in layers]
    first = layers[0]
    how = first.quantization
    if isinstance(kernels[0], PackedTernary) and how.activation_tracking == "none":
        x = x if norm is None else norm(x)
        return tuple(unrounded_product(x, dequantized(kernel)) for kernel in kernels)
    if isinstance(kernels[0], PackedTernary):
        weights = None
        if type(norm) is RMSNorm:  # a subclass may compute something else
            weights = norm.weight(x.shape[-1]), norm.epsilon
        elif norm is not None:
            x = norm(x)
        tracked = first.activation_quantizer.observe(x, train=False)
        return ternary_matmul(
            x,
            kernels,
            activation_range=tracked,
            activation_group=how.activation_pieces,
            norm=weights,
        )
    if norm is not None:
        x = norm(x)
    if isinstance(kernels[0], PackedRows):
        return tuple(rows_matmul(x, kernel) for kernel in kernels)
    if how.quantize and how.activation_tracking == "none":
        outputs = tuple(
            unrounded_product(x, layer.quantized(kernel, mix))
            for layer, kernel in zip(layers, kernels, strict=True)
        )
        return checkpoint_name(outputs, PRODUCT)
    if not how.quantize:
        wholes = [whole_kernel(kernel, x.dtype, first.split) for kernel in kernels]
        outputs = tuple(jnp.dot(x, kernel) for kernel in wholes)
        return checkpoint_name(outputs, PRODUCT)
    outputs = ternary_dot(
        x,
        kernels,
        [layer.weight_quantizer.tau() for layer in layers],
        spec=first.spec,
        scales=[
            layer.weight_quantizer.stored(*kernel.shape)
            for layer, kernel in zip(layers, kernels, strict=True)
        ],
        held=[layer.held() for layer in layers],
        activation_range=first.activation_quantizer.observe(x, train=train),
        mix=mix,
        split=first.split,
    )
    # Named here, in the compute dtype: the sums within are float32 or int32.
    return checkpoint_name(outputs, PRODUCT)

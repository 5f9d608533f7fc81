"""Causal attention for training, and attention to a cache for decoding.

On a CPU with native kernels, one of them computes both (`kernels/floats.py` says why).
Accelerators get `jax.nn.dot_product_attention`. Elsewhere XLA spends more time around
its products than in them: `causal_attention` there keeps heads in front, so that every
product is a plain batch of matrices, and writes the backward pass out, which saves the
probabilities once. All compute ``softmax(q k^T / sqrt(H)) v`` with the softmax in
float32; results differ by the order of float sums.

A cache may hold codes, ``k = c a`` with one scale ``a`` per token and head. As
``q . k = a (q . c)`` and ``sum_s p_s v_s = sum_s (p_s b_s) d_s``, the scales multiply
scores and probabilities, which are H times fewer than the numbers of the cache. Keys of
4 bits are coded around centers, which many tokens share: `codes.py`.
"""

from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vaani_jax.devices.mesh import BATCH, constrain
from vaani_jax.kernels import cpu, floats
from vaani_jax.kernels.choice import backend
from vaani_jax.model.codes import BLOCK, unpack_halves, write
from vaani_jax.model.config import Architecture, Execution, Quantization
from vaani_jax.model.linear import BitLinear, project
from vaani_jax.model.norm import NORMS, Norm, RMSNorm
from vaani_jax.model.rotary import rotary_embedding
from vaani_jax.quant.barriers import to_dtype

Array = jax.Array


class MultiHeadAttention(nn.Module):
    """Causal self-attention with grouped key-value heads and rotary positions.

    Parameters: ``q_proj``, ``k_proj``, ``v_proj``, ``o_proj``; ``sub_norm``; ``q_norm``
    and ``k_norm``, of one head, which all heads share.
    """

    architecture: Architecture
    quantization: Quantization
    execution: Execution

    def setup(self) -> None:
        a, how = self.architecture, (self.quantization, self.execution)
        std, biased = a.init_std, a.attention_bias
        queries, keys = a.n_heads * a.head_size, a.kv_heads * a.head_size
        self.q_proj = BitLinear(queries, *how, std, use_bias=biased)
        self.k_proj = BitLinear(keys, *how, std, use_bias=biased)
        self.v_proj = BitLinear(keys, *how, std, use_bias=biased)
        self.q_norm = RMSNorm(a.norm_eps) if a.qk_norm else None
        self.k_norm = RMSNorm(a.norm_eps) if a.qk_norm else None
        self.sub_norm = NORMS[a.norm](a.norm_eps) if a.sub_norms else None
        self.o_proj = BitLinear(a.dim, *how, a.branch_init_std, "in")

    def __call__(
        self,
        x: Array,
        positions: Array,
        rotary: tuple[Any, Any],
        cache: tuple[Array, ...] | None = None,
        *,
        norm: Norm | None = None,
        train: bool = False,
        mix: Array | None = None,
        start: Array | None = None,
    ) -> tuple[Array, tuple[Array, ...] | None]:
        """Attends from ``x`` [B, T, D] to itself, or to a cache that it joins.

        Args:
          x: residual stream [B, T, D].
          positions: [T], consecutive; with a cache, the slots to fill.
          rotary: cosines and sines of these positions, [T, H / 2] or [B, T, H / 2].
          cache: keys and values [B, S, K, H], filled below ``positions[0]``; what
            belongs to codes follows, see `KVCache.layers`.
          norm: applied to ``x`` first.
          train: whether tracked ranges are updated.
          mix: see `ternary_dot`.
          start: first slot of the cache that counts in each row, [B]; 0 where None.

        Returns:
          [B, T, D], and the cache with the new keys and values written in.
        """
        a = self.architecture
        q, k, v = project(
            x, (self.q_proj, self.k_proj, self.v_proj), norm=norm, train=train, mix=mix
        )
        q_BTNH = q.reshape(*q.shape[:-1], a.n_heads, a.head_size)
        k_BTKH = k.reshape(*k.shape[:-1], a.kv_heads, a.head_size)
        v_BTKH = v.reshape(*v.shape[:-1], a.kv_heads, a.head_size)
        q_BTNH, k_BTKH, v_BTKH = (
            constrain(heads, BATCH, None, "tensor", None)
            for heads in (q_BTNH, k_BTKH, v_BTKH)
        )
        if self.q_norm is not None and self.k_norm is not None:
            q_BTNH, k_BTKH = self.q_norm(q_BTNH), self.k_norm(k_BTKH)
        if cache is not None and decodes_at_once(q_BTNH, cache):
            y_BTNH, cache = _decoded(
                q_BTNH, k_BTKH, v_BTKH, rotary, cache, positions, start
            )
            return self._projected(y_BTNH, x, train, mix), cache
        q_BTNH = rotary_embedding(q_BTNH, *rotary)
        k_BTKH = rotary_embedding(k_BTKH, *rotary)
        if cache is None:
            y_BTNH = causal_attention(q_BTNH, k_BTKH, v_BTKH, self.execution.attention)
        else:
            cache = write(cache, k_BTKH, v_BTKH, positions[0], start, a.rotary)
            y_BTNH = cached_attention(
                q_BTNH, cache[0], cache[1], positions, start, cache[2:]
            )
        return self._projected(y_BTNH, x, train, mix), cache

    def _projected(
        self, y_BTNH: Array, x: Array, train: bool, mix: Array | None
    ) -> Array:
        y = constrain(y_BTNH.reshape(*x.shape[:-1], -1), BATCH, None, "tensor")
        return project(y, (self.o_proj,), norm=self.sub_norm, train=train, mix=mix)[0]


def decodes_at_once(q_BTNH: Array, cache: tuple[Array, ...]) -> bool:
    """Whether one kernel rotates, writes to the cache and attends."""
    mesh = jax.sharding.get_abstract_mesh()
    whole = mesh.empty or mesh.size == 1
    return q_BTNH.shape[1] == 1 and len(cache) == 2 and whole and backend() == "gpu"


def _decoded(
    q_BTNH: Array,
    k_BTKH: Array,
    v_BTKH: Array,
    rotary: tuple[Any, Any],
    cache: tuple[Array, ...],
    positions: Array,
    start: Array | None,
) -> tuple[Array, tuple[Array, ...]]:
    from vaani_jax.kernels.gpu_attention import decode_attention

    batch, _, _, size = q_BTNH.shape
    cos, sin = (jnp.broadcast_to(x, (batch, 1, size // 2))[:, 0] for x in rotary)
    y, (keys, values) = decode_attention(
        q_BTNH[:, 0],
        k_BTKH[:, 0],
        v_BTKH[:, 0],
        (cos, sin),
        (cache[0], cache[1]),
        positions[0],
        jnp.zeros(batch, jnp.int32) if start is None else start,
    )
    return y[:, None], (keys, values)


Implementation = Literal["auto", "library", "explicit"]


def causal_attention(
    q_BTNH: Array,
    k_BTKH: Array,
    v_BTKH: Array,
    implementation: Implementation = "auto",
) -> Array:
    """Attention of each position to itself and those before it.

    Args:
      q_BTNH: queries; N is a multiple of K.
      k_BTKH, v_BTKH: keys and values.
      implementation: "library" or "explicit"; "auto" takes the native kernel where
        there is one, else the former on accelerators and the latter on CPUs.

    Returns:
      [B, T, N, H], in the dtype of the queries.
    """
    if implementation == "auto" and floats.native():
        return _native(q_BTNH, k_BTKH, v_BTKH)
    if implementation == "auto":
        implementation = "explicit" if jax.default_backend() == "cpu" else "library"
    if implementation == "library":
        return jax.nn.dot_product_attention(
            q_BTNH,
            k_BTKH,
            v_BTKH,
            is_causal=True,
            implementation="cudnn" if _fits_cudnn(q_BTNH) else None,
        )
    batch, length, heads, size = q_BTNH.shape
    q = _grouped(q_BTNH * size**-0.5, k_BTKH.shape[2])
    k = k_BTKH.transpose(0, 2, 1, 3)
    v = v_BTKH.transpose(0, 2, 1, 3)
    y = _explicit(q, k, v)
    return y.reshape(batch, heads, length, size).transpose(0, 2, 1, 3)


def _fits_cudnn(q_BTNH: Array) -> bool:
    """Whether cuDNN's fused attention takes it: it never stores [T, T] of anything."""
    device = jax.devices()[0]
    nvidia = device.platform == "gpu" and "cuda" in device.client.platform_version
    size = q_BTNH.shape[-1]
    return nvidia and q_BTNH.dtype == jnp.bfloat16 and size % 8 == 0 and size <= 128


@jax.custom_vjp
def _native(q_BTNH: Array, k_BTKH: Array, v_BTKH: Array) -> Array:
    (y,) = _attend_natively(q_BTNH, k_BTKH, v_BTKH)
    return to_dtype(y, q_BTNH.dtype)


def _attend_natively(
    q: Array, k: Array, v: Array, *, weights: bool = False
) -> tuple[Array, ...]:
    start = jnp.zeros(q.shape[0], jnp.int32)
    wide = q.astype(jnp.float32)
    return cpu.attention(wide, k, v, jnp.int32(0), start, weights=weights)


def _native_fwd(q: Array, k: Array, v: Array) -> tuple[Array, Any]:
    y, weights = _attend_natively(q, k, v, weights=True)
    y = to_dtype(y, q.dtype)
    return y, (q, k, v, y, weights.astype(v.dtype))


def _native_bwd(residuals: Any, g: Array) -> tuple[Array, Array, Array]:
    # Not the order of a law, and yet here: XLA turns five arrays around for it.
    wide = (x.astype(jnp.float32) for x in (*residuals[:4], g, residuals[4]))
    dq, dk, dv = (x.astype(g.dtype) for x in cpu.attention_gradient(*wide))
    return dq, dk, dv


_native.defvjp(_native_fwd, _native_bwd)


def _grouped(x_BTNH: Array, kv_heads: int) -> Array:
    """[B, K, R, H]: queries of one group share keys, and become further rows."""
    batch, length, heads, size = x_BTNH.shape
    x = x_BTNH.transpose(0, 2, 1, 3)
    return x.reshape(batch, kv_heads, heads // kv_heads * length, size)


def _scores(a: Array, b: Array) -> Array:
    """[B, K, R, H] x [B, K, S, H] -> [B, K, R, S] in float32."""
    return jnp.einsum("BKRH,BKSH->BKRS", a, b, preferred_element_type=jnp.float32)


@jax.custom_vjp
def _explicit(q: Array, k: Array, v: Array) -> Array:
    return _explicit_fwd(q, k, v)[0]


def _explicit_fwd(q: Array, k: Array, v: Array) -> tuple[Array, Any]:
    length = k.shape[2]
    causal = np.tile(np.tri(length, dtype=bool), (q.shape[2] // length, 1))
    scores = jnp.where(causal[None, None], _scores(q, k), -jnp.inf)
    weights = jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True))
    weights = weights * (1.0 / jnp.sum(weights, axis=-1, keepdims=True))
    weights = weights.astype(v.dtype)
    y = jnp.einsum("BKRS,BKSH->BKRH", weights, v)
    return y, (q, k, v, y, weights)


def _explicit_bwd(residuals: Any, g: Array) -> tuple[Array, Array, Array]:
    q, k, v, y, weights = residuals
    dv = jnp.einsum("BKRS,BKRH->BKSH", weights, g)
    # d softmax: p * (dp - sum(p dp)), and sum(p dp) over keys is sum(y g) over H.
    rows = jnp.sum((y * g).astype(jnp.float32), axis=-1, keepdims=True)
    ds = (weights * (_scores(g, v) - rows)).astype(q.dtype)
    dq = jnp.einsum("BKRS,BKSH->BKRH", ds, k)
    dk = jnp.einsum("BKRS,BKRH->BKSH", ds, q)
    return dq, dk, dv


_explicit.defvjp(_explicit_fwd, _explicit_bwd)


def cached_attention(
    q_BTNH: Array,
    k_BSKH: Array,
    v_BSKH: Array,
    positions: Array,
    start: Array | None = None,
    scales: tuple[Array, ...] = (),
) -> Array:
    """Attention of slots [T] of a cache to the slots up to themselves.

    Args:
      q_BTNH: queries; N is a multiple of K.
      k_BSKH, v_BSKH: the cache, of any float dtype, or codes of 8 or of 4 bits; see
        `KVCache`.
      positions: slots of the queries, [T] integers.
      start: first slot that counts in each row, [B] integers; 0 where None. A query
        before it, which is padding, sees itself alone: nothing of use, but finite.
      scales: of codes of keys and of values, two arrays [B, S, K] float32, and, of 4
        bits, the centers of keys, [B, blocks, K, H]. Scales don't depend on H: those of
        keys multiply scores, those of values probabilities.

    Returns:
      [B, T, N, H], in the dtype of the queries; softmax in float32. Native kernels,
      where they are in use, read only the slots that count.
    """
    batch, length, heads, size = q_BTNH.shape
    if floats.native():
        if start is None:
            start = jnp.zeros(batch, jnp.int32)
        wide = q_BTNH.astype(jnp.float32)
        (y,) = cpu.attention(wide, k_BSKH, v_BSKH, positions[0], start, scales)
        return to_dtype(y, q_BTNH.dtype)
    slots, kv_heads = k_BSKH.shape[1:3]
    dtype = q_BTNH.dtype
    if k_BSKH.dtype == jnp.uint8:
        k_BSKH, v_BSKH = (unpack_halves(x, size) for x in (k_BSKH, v_BSKH))
    last_BT = positions[None, :].astype(jnp.int32)
    first_BT = jnp.zeros_like(last_BT)
    if start is not None:
        first_BT = jnp.minimum(start[:, None], last_BT)
    slot = jnp.arange(slots, dtype=jnp.int32)[None, None, :]
    mask_BTS = (slot >= first_BT[:, :, None]) & (slot <= last_BT[:, :, None])
    # As in `causal_attention`, queries of one group are further rows of one product;
    # the sums of weights divide the few results, not the many weights.
    groups = heads // kv_heads
    rows = (batch, kv_heads, groups * length)
    split = (batch, kv_heads, groups, length)
    q = (q_BTNH * size**-0.5).transpose(0, 2, 1, 3).reshape(*rows, size)
    scores = jnp.einsum(
        "BKRH,BSKH->BKRS", q, k_BSKH.astype(dtype), preferred_element_type=jnp.float32
    )
    if scales:
        scores = scores * scales[0].transpose(0, 2, 1)[:, :, None, :]
    if scales[2:]:
        around = jnp.einsum(
            "BKRH,BNKH->BKRN",
            q,
            scales[2].astype(dtype),
            preferred_element_type=jnp.float32,
        )
        first = jnp.zeros(batch, jnp.int32) if start is None else start
        block_BS = jnp.maximum(slot[0] - first[:, None], 0) // BLOCK
        scores += jnp.take_along_axis(around, block_BS[:, None, None], axis=-1)
    scores = scores.reshape(*split, slots)
    lowest = jnp.finfo(jnp.float32).min
    scores = jnp.where(mask_BTS[:, None, None], scores, lowest).reshape(*rows, slots)
    weights = jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True))
    total = jnp.sum(weights, axis=-1, keepdims=True)
    if scales:
        weights = weights * scales[1].transpose(0, 2, 1)[:, :, None, :]
    y = jnp.einsum(
        "BKRS,BSKH->BKRH",
        weights.astype(dtype),
        v_BSKH.astype(dtype),
        preferred_element_type=jnp.float32,
    )
    y = (y * (1.0 / total)).astype(dtype).reshape(batch, heads, length, size)
    return y.transpose(0, 2, 1, 3)

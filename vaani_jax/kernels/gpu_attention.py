"""One token's attention to a cache on GPUs: rotation, what joins the cache, softmax.

As XLA operations these are a dozen short kernels, and starting them costs more than
they take. Here a program has one row of a batch, one key-value head and a part of the
slots. It rotates the queries of the head's group and the new key, and goes over the
slots with a running softmax (arXiv:2205.14135). Where there are several parts, each
leaves its sums, largest score and total, which are put together after it.

What is rounded to the compute dtype is so as in `model/attention.py`.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from vaani_jax.kernels.gpu import interpreted, rounded_product
from vaani_jax.kernels.tiles import AttentionTiles, attention_tiles

Array = jax.Array
Halves = tuple[Array, Array]  # of vectors: what the rotation turns into each other

LOWEST = -0.7 * 3.4e38  # a score of nothing: differences of two such are finite


def decode_attention(
    q_BNH: Array,
    k_BKH: Array,
    v_BKH: Array,
    rotary: tuple[Array, Array],
    cache: tuple[Array, Array],
    position: Array,
    start: Array,
) -> tuple[Array, tuple[Array, Array]]:
    """Attention of one new token in each row, which joins the cache.

    Args:
      q_BNH, k_BKH, v_BKH: of the token, not rotated; N is a multiple of K.
      rotary: cosines and sines of its position, [B, H / 2] float32.
      cache: keys and values [B, S, K, H], filled below ``position``.
      position: the slot to fill, int32 scalar.
      start: first slot that counts in each row, [B] int32.

    Returns:
      [B, N, H] in the dtype of the queries, and the cache with the token in it.
    """
    batch, heads, size = q_BNH.shape
    slots, kv_heads = cache[0].shape[1:3]
    tiles = attention_tiles(batch * kv_heads, slots)
    dtype = q_BNH.dtype
    outputs = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in cache]
    if tiles.parts == 1:
        outputs.append(jax.ShapeDtypeStruct((batch, 1, heads, size), dtype))
    else:
        shape = (batch, tiles.parts, heads)
        outputs.append(jax.ShapeDtypeStruct((*shape, size), jnp.float32))
        outputs += [jax.ShapeDtypeStruct(shape, jnp.float32)] * 2
    keys, values, y, *rest = pl.pallas_call(
        functools.partial(_kernel, tiles=tiles),
        grid=(batch, kv_heads, tiles.parts),
        out_shape=outputs,
        input_output_aliases={7: 0, 8: 1},
        compiler_params=plt.CompilerParams(num_warps=tiles.warps, num_stages=2),
        interpret=interpreted(),
        name="decode_attention",
    )(q_BNH, k_BKH, v_BKH, *rotary, position.reshape(1), start, *cache)
    if not rest:
        return y[:, 0], (keys, values)
    largest, total = rest
    weight = jnp.exp(largest - jnp.max(largest, axis=1, keepdims=True))
    y = jnp.sum(y * weight[..., None], axis=1)
    total = jnp.sum(total * weight, axis=1)
    return (y * (1.0 / total[..., None])).astype(dtype), (keys, values)


def _kernel(
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    cos_ref: Any,
    sin_ref: Any,
    position_ref: Any,
    start_ref: Any,
    old_keys_ref: Any,
    old_values_ref: Any,
    keys_ref: Any,
    values_ref: Any,
    out_ref: Any,
    *rest: Any,
    tiles: AttentionTiles,
) -> None:
    row, head, part = (pl.program_id(axis) for axis in range(3))
    slots, kv_heads = keys_ref.shape[1:3]
    heads, size = q_ref.shape[1:]
    group, half, dtype = heads // kv_heads, size // 2, q_ref.dtype
    length = -(-slots // tiles.parts)
    # As `dynamic_update_slice` has it, where the cache is full.
    position = jnp.minimum(position_ref[0], slots - 1)

    # Vectors are in halves, as the rotation has them.
    column = jnp.arange(pl.next_power_of_2(half), dtype=jnp.int32)
    inside = column < half
    member = jnp.arange(pl.next_power_of_2(max(16, group)), dtype=jnp.int32)
    query = (head * group + member)[:, None]
    queries = (member < group)[:, None] & inside[None, :]
    cos = plt.load(cos_ref.at[row, column], mask=inside, other=0.0)
    sin = plt.load(sin_ref.at[row, column], mask=inside, other=0.0)

    def rotated(x: Halves, cos: Array, sin: Array) -> Halves:
        low, high = (half.astype(jnp.float32) for half in x)
        first = rounded_product(low, cos) - rounded_product(high, sin)
        second = rounded_product(high, cos) + rounded_product(low, sin)
        return first.astype(dtype), second.astype(dtype)

    def halves(ref: Any, *index: Any, mask: Array) -> Halves:
        across = column if len(mask.shape) == 1 else column[None, :]
        low = plt.load(ref.at[*index, across], mask=mask, other=0)
        return low, plt.load(ref.at[*index, half + across], mask=mask, other=0)

    q = halves(q_ref, row, query, mask=queries)
    q_low, q_high = rotated(q, cos[None, :], sin[None, :])
    scale = jnp.asarray(size**-0.5, dtype)
    q = (q_low * scale, q_high * scale)
    k = rotated(halves(k_ref, row, head, mask=inside), cos, sin)
    v = halves(v_ref, row, head, mask=inside)
    # One part has the slot of the token.
    mine = position // length == part
    for at, new_k, new_v in zip((0, half), k, v, strict=True):
        for ref, new in ((keys_ref, new_k), (values_ref, new_v)):
            plt.store(
                ref.at[row, position, head, at + column],
                new.astype(ref.dtype),
                mask=inside & mine,
            )
    # Of the token itself, as it is in the cache.
    stored = [
        x.astype(keys_ref.dtype).astype(dtype).astype(jnp.float32) for x in (*k, *v)
    ]
    score = sum(
        jnp.sum(x.astype(jnp.float32) * y[None, :], axis=1)
        for x, y in zip(q, stored[:2], strict=True)
    )
    counted = jnp.broadcast_to(mine, member.shape)
    largest = jnp.where(counted, score, LOWEST)
    total = counted.astype(jnp.float32)
    sums = [total[:, None] * x[None, :] for x in stored[2:]]

    first = jnp.maximum(start_ref[row], part * length)
    last = jnp.minimum(position, (part + 1) * length)

    def step(index: Array, carry: Any) -> Any:
        largest, total, *sums = carry
        slot = index * tiles.slots + jnp.arange(tiles.slots, dtype=jnp.int32)
        counts = (slot >= first) & (slot < last)
        mask = counts[:, None] & inside[None, :]

        def read(ref: Any, at: int) -> Array:
            place = ref.at[row, slot[:, None], head, at + column[None, :]]
            return plt.load(place, mask=mask, other=0).astype(dtype)

        scores = sum(
            _dot(x, read(old_keys_ref, at).T)
            for x, at in zip(q, (0, half), strict=True)
        )
        scores = jnp.where(counts[None, :], scores, LOWEST)
        new = jnp.maximum(largest, jnp.max(scores, axis=1))
        kept = jnp.exp(largest - new)
        weights = jnp.where(counts[None, :], jnp.exp(scores - new[:, None]), 0.0)
        sums = [
            x * kept[:, None] + _dot(weights.astype(dtype), read(old_values_ref, at))
            for x, at in zip(sums, (0, half), strict=True)
        ]
        return new, total * kept + jnp.sum(weights, axis=1), *sums

    blocks = (first // tiles.slots, (last + tiles.slots - 1) // tiles.slots)
    largest, total, *found = jax.lax.fori_loop(*blocks, step, (largest, total, *sums))
    if tiles.parts == 1:
        found = [x * (1.0 / total[:, None]) for x in found]
    else:
        for ref, x in zip(rest, (largest, total), strict=True):
            plt.store(ref.at[row, part, query[:, 0]], x, mask=member < group)
    for x, at in zip(found, (0, half), strict=True):
        plt.store(
            out_ref.at[row, part, query, at + column[None, :]],
            x.astype(out_ref.dtype),
            mask=queries,
        )


def _dot(a: Array, b: Array) -> Array:
    return jnp.dot(a, b, precision="highest", preferred_element_type=jnp.float32)

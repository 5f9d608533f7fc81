"""What joins a cache: keys and values as numbers, or as codes of 8 or of 4 bits.

A code has a scale for its token and head: ``values = codes * scale``. Four bits are too
few for keys as they are: the same few dimensions are large in all of them, decide on
the scale, and leave the others a level or two. What keys of a text have in common is
taken off first, so that the codes only hold where they differ:

    key = center + codes * scale

Centers have to be known when a key is written, and may not depend on what comes after
it, on the other rows of a batch, or on how a prompt is cut into pieces. So a row is cut
into blocks of `BLOCK` tokens, counted from its own start, and the center of a block is
the mean of the keys that the cache holds of the block before it (the first one has
none). By then these have turned on with the rotary embedding; the mean is turned on
by as much. Dimensions that turn fast have no mean, and slow ones keep theirs.

A query multiplies a center once for all tokens of its block: ``q . key`` is
``scale * (q . codes) + q . center``. Values are not centered: their mean would be
most of a result, and is a small part of each of them.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from vaani_jax.model.rotary import Rotary, rotary_angles, rotary_embedding
from vaani_jax.quant.barriers import rounded
from vaani_jax.quant.rounding import LARGEST, to_codes

Array = jax.Array

BLOCK = 64  # tokens that share a center; as kCentered in kernels/cpu/kernels.cc
LARGEST_HALF = 7.0  # of 4 bits
PAIRS = 16  # bytes of 32 codes: the first half of these is in their lower bits

TINY = 1e-30  # keeps a vector of zeros from being divided by its largest magnitude


def quantize_heads(x_BTKH: Array, largest: float = LARGEST) -> tuple[Array, Array]:
    """Codes of keys or values, one scale per token and head.

    Symmetric: the largest magnitude of a head vector maps to ``largest``; round half to
    even.

    Args:
      x_BTKH: any float dtype.
      largest: code, 127 or 7.

    Returns:
      Codes [B, T, K, H] int8 and scales [B, T, K] float32; ``codes * scale`` is off by
      half a scale at most. A vector of zeros has the scale 0.
    """
    x = x_BTKH.astype(jnp.float32)
    bound = jnp.max(jnp.abs(x), axis=-1)
    inverse = largest / jnp.maximum(bound, TINY)
    codes = to_codes(x * inverse[..., None]).astype(jnp.int8)
    return codes, bound * (1.0 / largest)


def pack_halves(codes: Array) -> Array:
    """Codes [..., H] from -8 to 7 as uint8 [..., 16 ceil(H / 32)], two a byte."""
    size = codes.shape[-1]
    padding = [(0, 0)] * (codes.ndim - 1) + [(0, -size % (2 * PAIRS))]
    pairs = jnp.pad(codes, padding).reshape(*codes.shape[:-1], -1, 2, PAIRS)
    pairs = jax.lax.bitcast_convert_type(pairs, jnp.uint8)
    packed = (pairs[..., 0, :] & 15) | (pairs[..., 1, :] << 4)
    return packed.reshape(*codes.shape[:-1], -1)


def unpack_halves(packed: Array, size: int) -> Array:
    """The inverse of `pack_halves`: int8 [..., ``size``]."""
    pairs = packed.reshape(*packed.shape[:-1], -1, PAIRS)
    both = jnp.stack([pairs << 4, pairs & 240], axis=-2)
    codes = jax.lax.bitcast_convert_type(both, jnp.int8) >> 4
    return codes.reshape(*packed.shape[:-1], -1)[..., :size]


def halves_of(size: int) -> int:
    """Bytes of so many codes of a head."""
    return -(-size // (2 * PAIRS)) * PAIRS


def blocks_of(slots: int) -> int:
    """Blocks that have a center, of a cache of so many slots."""
    return -(-slots // BLOCK)


def write(
    cache: tuple[Array, ...],
    k_BTKH: Array,
    v_BTKH: Array,
    slot: Array,
    start: Array | None,
    rotary: Rotary,
) -> tuple[Array, ...]:
    """A layer of a cache with new keys and values from ``slot`` on.

    Args:
      cache: keys and values [B, S, K, H]; of codes, their scales [B, S, K] follow, and
        of 4 bits then the centers of keys [B, blocks, K, H]; see `KVCache`.
      k_BTKH, v_BTKH: what joins it, of any float dtype; keys are rotated.
      slot: int32 scalar.
      start: first slot of each row, [B] int32; 0 where None.
      rotary: what decides the angles of the rotary embedding.
    """
    new: tuple[Array, ...] = (k_BTKH, v_BTKH)
    if len(cache) == 2:
        return _written(cache, new, slot)
    if len(cache) == 4:
        codes, scales = zip(*map(quantize_heads, new), strict=True)
        return _written(cache, (*codes, *scales), slot)
    if start is None:
        start = jnp.zeros(k_BTKH.shape[0], jnp.int32)
    wide = k_BTKH.astype(jnp.float32)
    centered = _one_key if wide.shape[1] == 1 else _several_keys
    keys, key_scales, centers = centered(cache, wide, slot, start, rotary)
    values, value_scales = quantize_heads(v_BTKH, LARGEST_HALF)
    new = (pack_halves(keys), pack_halves(values), key_scales, value_scales)
    return (*_written(cache[:4], new, slot), centers)


def _written(
    cache: tuple[Array, ...], new: tuple[Array, ...], slot: Array
) -> tuple[Array, ...]:
    return tuple(_with(old, x, slot) for old, x in zip(cache, new, strict=True))


def _with(cache: Array, new: Array, slot: Array) -> Array:
    """``cache`` [B, S, ...] with ``new`` [B, T, ...] from ``slot`` on."""
    new = new.astype(cache.dtype)
    if cache.dtype == jnp.bfloat16:
        # As integers: XLA on a CPU would convert all of the cache to float32 and back.
        bits = jnp.uint16
        cache = jax.lax.bitcast_convert_type(cache, bits)
        new = jax.lax.bitcast_convert_type(new, bits)
        cache = jax.lax.dynamic_update_slice_in_dim(cache, new, slot, axis=1)
        return jax.lax.bitcast_convert_type(cache, jnp.bfloat16)
    return jax.lax.dynamic_update_slice_in_dim(cache, new, slot, axis=1)


# -- Centers -------------------------------------------------------------------------


def _one_key(
    cache: tuple[Array, ...], k_B1KH: Array, slot: Array, start: Array, rotary: Rotary
) -> tuple[Array, Array, Array]:
    """Codes [B, 1, K, H], their scales, and the centers."""
    keys, _, scales, _, centers = cache
    since = slot - start
    block = jnp.maximum(since, 0) // BLOCK
    if centers.shape[1] > 1:
        due = (since > 0) & (since % BLOCK == 0)

        def renewed(centers: Array) -> Array:
            # The same slots in all rows that are due; others keep what they have.
            held, scale = (
                jax.lax.dynamic_slice_in_dim(x, slot - BLOCK, BLOCK, axis=1)
                for x in (keys, scales)
            )
            before = _at(centers, block - 1)
            codes = unpack_halves(held, k_B1KH.shape[-1])
            center = _next_center(_decoded(codes, scale, before), rotary)
            center = jnp.where(due[:, None, None], center, _at(centers, block))
            return centers.at[jnp.arange(len(block)), block].set(center)

        centers = jax.lax.cond(jnp.any(due), renewed, lambda x: x, centers)
    center = _at(centers, block)
    codes, scale = quantize_heads(k_B1KH - center[:, None], LARGEST_HALF)
    return codes, scale, centers


def _several_keys(
    cache: tuple[Array, ...], k_BTKH: Array, slot: Array, start: Array, rotary: Rotary
) -> tuple[Array, Array, Array]:
    """Codes [B, T, K, H], their scales, and the centers: block after block."""
    keys, _, scales, _, centers = cache
    batch, length, _, size = k_BTKH.shape
    # Blocks of a row from the one on that has the token before these: that one may be
    # full, and tells the center of the next.
    since = slot - start
    ahead = (since - 1) % BLOCK + 1  # tokens before these, in that block
    first = (since - ahead) // BLOCK  # its number; below 0, there are none
    count = (length + 2 * BLOCK - 1) // BLOCK
    token = jnp.arange(count * BLOCK)[None] - ahead[:, None]  # [B, tokens of blocks]

    def by_block(x: Array) -> Array:
        return jnp.moveaxis(x.reshape(batch, count, BLOCK, *x.shape[2:]), 1, 0)

    places = jnp.clip(token, 0, length - 1)[:, :, None, None]
    aligned = by_block(jnp.take_along_axis(k_BTKH, places, axis=1))
    new = by_block(token >= 0)
    here = slot - ahead[:, None] + jnp.arange(BLOCK)[None]
    here = jnp.clip(here, 0, keys.shape[1] - 1)
    held = jnp.take_along_axis(keys, here[:, :, None, None], axis=1)
    held_scales = jnp.take_along_axis(scales, here[:, :, None], axis=1)
    center = _at(centers, jnp.maximum(first, 0))
    known = _decoded(unpack_halves(held, size), held_scales, center)

    def step(center: Array, inputs: tuple[Array, ...]) -> Any:
        keys, new, number = inputs
        codes, scale = quantize_heads(keys - center[:, None], LARGEST_HALF)
        whole = jnp.where(new[:, :, None, None], _decoded(codes, scale, center), known)
        following = (number + 1 > 0)[:, None, None]
        after = jnp.where(following, _next_center(whole, rotary), 0.0)
        return after, (codes, scale, center)

    numbers = first[None] + jnp.arange(count)[:, None]
    _, (codes, key_scales, found) = jax.lax.scan(step, center, (aligned, new, numbers))

    def of_tokens(x: Array) -> Array:
        x = jnp.moveaxis(x, 0, 1).reshape(batch, count * BLOCK, *x.shape[3:])
        cut = jax.vmap(lambda row, i: jax.lax.dynamic_slice_in_dim(row, i, length))
        return cut(x, ahead)

    # Blocks that have one of the tokens; other numbers are none of the cache.
    touched = (by_block((token >= 0) & (token < length)).any(axis=-1)) & (numbers >= 0)
    numbers = jnp.where(touched, numbers, centers.shape[1]).T
    rows = jnp.arange(batch)[:, None]
    centers = centers.at[rows, numbers].set(jnp.moveaxis(found, 0, 1), mode="drop")
    return of_tokens(codes), of_tokens(key_scales), centers


def _at(centers: Array, block: Array) -> Array:
    """[B, K, H] of [B, blocks, K, H]: that of each row's block, [B]."""
    return jnp.take_along_axis(centers, block[:, None, None, None], axis=1)[:, 0]


def _decoded(codes: Array, scales: Array, center: Array) -> Array:
    """The keys [B, T, K, H] that codes of one block stand for."""
    return rounded(codes.astype(jnp.float32) * scales[..., None]) + center[:, None]


def _next_center(keys: Array, rotary: Rotary) -> Array:
    """[B, K, H] for the block after one whose keys are [B, BLOCK, K, H]."""
    while keys.shape[1] > 1:  # in a tree: an order that no compiler chooses
        half = keys.shape[1] // 2
        keys = keys[:, :half] + keys[:, half:]
    turning = dataclasses.replace(rotary, attention_factor=1.0)  # keys have theirs
    cos, sin = (x[BLOCK:] for x in rotary_angles(BLOCK + 1, turning))
    return rotary_embedding(keys * (1.0 / BLOCK), cos, sin)[:, 0]

"""Codes of keys and values, and the centers that keys in 4 bits are coded around."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vaani_jax.model.cache import KVCache
from vaani_jax.model.codes import (
    BLOCK,
    blocks_of,
    pack_halves,
    quantize_heads,
    unpack_halves,
    write,
)
from vaani_jax.model.config import Architecture
from vaani_jax.model.rotary import rotary_angles, rotary_embedding

B, S, K, H, THETA = 3, 300, 2, 16, 500_000.0
ROTARY = Architecture(head_dim=H, rope_theta=THETA).rotary
START = np.asarray([0, 7, 130], np.int32)


def keys_and_values(seed=0, center=3.0):
    """Keys that have much in common before they are rotated, as of a bias."""
    rng = np.random.default_rng(seed)
    k, v = rng.normal(size=(2, B, S, K, H))
    k += center * rng.normal(size=(B, 1, K, H))
    since = np.maximum(np.arange(S)[None] - START[:, None], 0)
    cos, sin = (table[since] for table in rotary_angles(S, ROTARY))
    k = rotary_embedding(jnp.asarray(k, jnp.float32), cos, sin)
    return np.asarray(k), v.astype(np.float32)


def empty(rows=B, slots=S):
    a = Architecture(dim=4 * H, n_heads=4, n_kv_heads=K, n_layers=1, vocab_size=2)
    (layer,) = KVCache.create(a, rows, slots, "int4").layers
    return layer


@jax.jit
def joined(layer, k, v, slot, start):
    return write(layer, k, v, slot, start, ROTARY)


def in_pieces(k, v, cuts, start=START, layer=None):
    layer = empty(len(k)) if layer is None else layer
    for first, last in itertools.pairwise(cuts):
        new = k[:, first:last], v[:, first:last]
        layer = joined(layer, *new, jnp.int32(first), jnp.asarray(start))
    return [np.asarray(part) for part in layer]


def decoded_keys(layer, start):
    """What the codes stand for, [B, S, K, H] in float64."""
    codes = np.asarray(unpack_halves(jnp.asarray(layer[0]), H), np.float64)
    since = np.maximum(np.arange(S)[None] - np.asarray(start)[:, None], 0)
    centers = layer[4][np.arange(len(codes))[:, None], since // BLOCK]
    return codes * layer[2][..., None] + centers


def assert_same(one, other, start=START):
    """All that rows have from their start on, to the bit."""
    for row, first in enumerate(start):
        for part in range(4):
            np.testing.assert_array_equal(
                one[part][row, first:], other[part][row, first:]
            )
        used = blocks_of(S - first)
        np.testing.assert_array_equal(one[4][row, :used], other[4][row, :used])


@pytest.mark.parametrize("h", [6, 32, 40, 128])
def test_two_codes_share_a_byte(h):
    codes = np.random.default_rng(h).integers(-8, 8, (2, 5, 3, h)).astype(np.int8)
    packed = np.asarray(jax.jit(pack_halves)(codes))
    assert packed.dtype == np.uint8
    assert packed.shape == (2, 5, 3, 16 * -(-h // 32))
    found = jax.jit(unpack_halves, static_argnums=1)(packed, h)
    np.testing.assert_array_equal(found, codes)
    for i in range(h):  # the layout that native kernels read
        byte = packed[..., i // 32 * 16 + i % 16].astype(int)
        low = (byte >> 4 if i % 32 >= 16 else byte) & 15
        np.testing.assert_array_equal(low, codes[..., i] & 15)


def test_four_bits_are_symmetric():
    x = jnp.asarray([[[[14.0, -14.0, 1.0, 3.0, -5.1, 0.0]]]])
    codes, scale = quantize_heads(x, 7.0)
    np.testing.assert_array_equal(codes[0, 0, 0], [7, -7, 0, 2, -3, 0])
    assert float(scale[0, 0, 0]) == pytest.approx(2)


@pytest.mark.parametrize(
    "cuts",
    [
        (0, 1, 2, 63, 64, 65, 129, S),
        (0, 128, 256, S),
        (0, 71, 72, 73, 135, 194, 195, 258, S),
        (0, *range(60, 75), *range(128, 140), 290, S),
        tuple(range(S + 1)),
    ],
    ids=["edges", "blocks", "rows", "mixed", "one by one"],
)
def test_pieces_of_a_text_leave_what_it_leaves_at_once(cuts):
    k, v = keys_and_values()
    assert_same(in_pieces(k, v, cuts), in_pieces(k, v, (0, S)))


def test_a_row_has_the_codes_that_it_has_alone():
    k, v = keys_and_values()
    found = in_pieces(k, v, (0, 100, S))
    for row, first in enumerate(START):
        one, other = k[row : row + 1, first:], v[row : row + 1, first:]
        alone = in_pieces(one, other, (0, S - first), START[:1])
        for part in range(4):
            np.testing.assert_array_equal(
                found[part][row, first:], alone[part][0, : S - first]
            )
        used = blocks_of(S - first)
        np.testing.assert_array_equal(found[4][row, :used], alone[4][0, :used])


def test_padding_after_a_text_is_forgotten():
    """What a padded prompt leaves behind its end is overwritten, and tells nothing."""
    k, v = keys_and_values()
    wild_k, wild_v = k.copy(), v.copy()
    wild_k[:, 190:256], wild_v[:, 190:256] = 1e6, -1e6
    layer = in_pieces(wild_k, wild_v, (0, 100, 256))
    layer = [jnp.asarray(part) for part in layer]
    cuts = (190, *range(191, 200), 250, *range(251, S + 1))
    assert_same(in_pieces(k, v, cuts, layer=layer), in_pieces(k, v, (0, S)))


def test_a_center_is_the_mean_of_the_block_before_turned_on():
    k, v = keys_and_values()
    layer = in_pieces(k, v, (0, S))
    keys = decoded_keys(layer, START)
    frequency = THETA ** (-np.arange(H // 2) / (H // 2))
    cos, sin = np.cos(BLOCK * frequency), np.sin(BLOCK * frequency)
    for row, first in enumerate(START):
        np.testing.assert_array_equal(layer[4][row, 0], 0)
        for block in range(1, blocks_of(S - first)):
            end = first + block * BLOCK
            low, high = np.split(keys[row, end - BLOCK : end].mean(axis=0), 2, axis=-1)
            turned = [low * cos - high * sin, high * cos + low * sin]
            np.testing.assert_allclose(
                layer[4][row, block], np.concatenate(turned, -1), rtol=1e-4, atol=1e-5
            )


def test_centers_take_off_what_keys_have_in_common():
    """Of keys with a large common part; where there is none, they do no harm."""

    def error(center):
        k, v = keys_and_values(center=center)
        layer = in_pieces(k, v, (0, S))
        plain, scale = quantize_heads(jnp.asarray(k), 7.0)
        plain = np.asarray(plain) * np.asarray(scale)[..., None]
        counted = [(row, slice(first + BLOCK, S)) for row, first in enumerate(START)]
        mean = functools.partial(np.mean, dtype=np.float64)
        found, bare = (
            mean([mean((x[at] - k[at]) ** 2) for at in counted])
            for x in (decoded_keys(layer, START), plain)
        )
        return found / bare

    assert error(10.0) < 0.5
    assert error(0.0) < 1.1


def test_a_cache_shorter_than_a_block_has_one_center():
    k, v = (x[:, :40] for x in keys_and_values())
    whole = joined(empty(slots=40), k, v, jnp.int32(0), jnp.asarray(START))
    layer = empty(slots=40)
    for i in range(40):
        new = k[:, i : i + 1], v[:, i : i + 1]
        layer = joined(layer, *new, jnp.int32(i), jnp.asarray(START))
    for one, other in zip(whole[:4], layer[:4], strict=True):
        np.testing.assert_array_equal(one[:2, 7:], other[:2, 7:])
    np.testing.assert_array_equal(whole[4], 0)

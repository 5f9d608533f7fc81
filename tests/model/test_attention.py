"""Attention to a cache, against one query at a time in float64."""

import contextlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vaani_jax.kernels.floats import compiled_floats
from vaani_jax.model.attention import cached_attention
from vaani_jax.model.codes import BLOCK, blocks_of, pack_halves, quantize_heads

B, S, K, H = 3, 9, 2, 6


def gaussian(*shape, seed):
    x = np.random.default_rng(seed).normal(size=shape)
    return jnp.asarray(x, jnp.float32)


def by_hand(q, k, v, positions, start):
    """float64; zeros for queries before the start of their row."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out = np.zeros(q.shape)
    for b, i, head in np.ndindex(*q.shape[:3]):
        seen = slice(int(start[b]), int(positions[i]) + 1)
        if seen.start >= seen.stop:
            continue
        group = head // (q.shape[2] // k.shape[2])
        scores = k[b, seen, group] @ q[b, i, head] / np.sqrt(q.shape[-1])
        weights = np.exp(scores - scores.max())
        out[b, i, head] = weights / weights.sum() @ v[b, seen, group]
    return out


@pytest.mark.parametrize("heads", [2, 6])
@pytest.mark.parametrize("dtype", ["float32", "int8", "int4"])
@pytest.mark.parametrize("how", [contextlib.nullcontext, compiled_floats])
def test_each_row_sees_the_slots_from_its_start_to_the_query(heads, dtype, how):
    positions, start = jnp.arange(2, 6), jnp.asarray([0, 3, 4], jnp.int32)
    q = gaussian(B, 4, heads, H, seed=0)
    # Heads and tokens of different sizes: a scale in the wrong place would show.
    size = jnp.exp(gaussian(B, S, K, 1, seed=1))
    k, v = (
        size * gaussian(B, S, K, H, seed=2),
        size[::-1] * gaussian(B, S, K, H, seed=3),
    )
    arguments: tuple[Any, ...] = (k, v)
    scales: tuple[Any, ...] = ()
    if dtype != "float32":
        largest = 127.0 if dtype == "int8" else 7.0
        (ck, sk), (cv, sv) = (quantize_heads(x, largest) for x in (k, v))
        arguments, scales = (ck, cv), (sk, sv)
        k, v = ck * sk[..., None], cv * sv[..., None]  # what the codes stand for
        if dtype == "int4":
            center = gaussian(B, 1, K, H, seed=5)
            arguments, scales = (pack_halves(ck), pack_halves(cv)), (sk, sv, center)
            k += center
    attention = jax.jit(cached_attention)

    def attend(*arguments):
        with how():
            return attention(*arguments)

    found = attend(q, *arguments, positions, start, scales)
    expected = by_hand(q, k, v, positions, start)
    real = np.asarray(positions)[None] >= np.asarray(start)[:, None]  # [B, T]
    assert not real.all()
    assert real[:, -1].all()
    np.testing.assert_allclose(found[real], expected[real], rtol=1e-4, atol=1e-5)
    assert jnp.isfinite(found).all()
    plain = attend(q, *arguments, positions, None, scales)
    zeros = jnp.zeros(B, jnp.int32)
    np.testing.assert_array_equal(
        plain, attend(q, *arguments, positions, zeros, scales)
    )


def test_what_a_row_does_not_see_does_not_count():
    positions, start = jnp.arange(5, 6), jnp.asarray([0, 2, 5], jnp.int32)
    q, (k, v) = gaussian(B, 1, 4, H, seed=0), gaussian(2, B, S, K, H, seed=1)
    slot = jnp.arange(S)[None, :, None, None]
    unseen = (slot < start[:, None, None, None]) | (slot > 5)
    attend = jax.jit(cached_attention)
    found = attend(q, k, v, positions, start)
    wild = (jnp.where(unseen, 1e30, x) for x in (k, v))
    np.testing.assert_array_equal(attend(q, *wild, positions, start), found)


@pytest.mark.parametrize("how", [contextlib.nullcontext, compiled_floats])
def test_slots_have_the_center_of_their_block(how):
    slots, start = 3 * BLOCK, jnp.asarray([0, 5, BLOCK + 9], jnp.int32)
    positions = jnp.arange(slots - 2, slots)
    q, (k, v) = gaussian(B, 2, 4, H, seed=0), gaussian(2, B, slots, K, H, seed=1)
    (ck, sk), (cv, sv) = (quantize_heads(x, 7.0) for x in (k, v))
    centers = gaussian(B, blocks_of(slots), K, H, seed=2)
    block = np.maximum(np.arange(slots)[None] - start[:, None], 0) // BLOCK
    keys = ck * sk[..., None] + centers[jnp.arange(B)[:, None], block]
    with how():
        found = jax.jit(cached_attention)(
            q, pack_halves(ck), pack_halves(cv), positions, start, (sk, sv, centers)
        )
    expected = by_hand(q, keys, cv * sv[..., None], positions, start)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_codes_of_heads_are_symmetric_and_round_half_to_even():
    x = gaussian(B, S, K, H, seed=4).at[0, 0, 0].set(0.0)
    x = x.at[1, 1, 1].set(jnp.asarray([127.0, 0.5, 1.5, 2.5, -0.5, -127.0]))
    codes, scale = jax.jit(quantize_heads)(x)
    assert codes.dtype == jnp.int8
    assert scale.shape == (B, S, K)
    assert scale.dtype == jnp.float32
    np.testing.assert_array_equal(codes[0, 0, 0], 0)
    assert float(scale[0, 0, 0]) == 0
    np.testing.assert_array_equal(codes[1, 1, 1], [127, 0, 2, 2, 0, -127])
    wide = np.asarray(x, np.float64)
    largest = np.abs(wide).max(axis=-1)
    np.testing.assert_allclose(scale, largest / 127, rtol=1e-6)
    error = np.abs(np.asarray(codes) * np.asarray(scale)[..., None] - wide)
    assert (error <= 0.501 * largest[..., None] / 127).all()
    used = np.abs(np.asarray(codes)).max(axis=-1)
    assert (used[largest > 0] == 127).all()


def test_the_smallest_and_the_largest_numbers_have_codes():
    x = jnp.asarray([[[[1e-38, -1e-38]], [[3e38, -3e38]]]], jnp.float32)
    codes, scale = quantize_heads(x)
    np.testing.assert_array_equal(codes[0, 1, 0], [127, -127])
    assert jnp.isfinite(codes * scale[..., None]).all()

"""Scales by groups of inputs: one order of float32 sums, written out in numpy."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vaani_jax.errors import VaaniError
from vaani_jax.quant.packed import (
    dequantized,
    pack,
    relayout,
    scale_of,
    take_columns,
    tiles_of_rows,
    tiles_of_scales,
    unpack,
)
from vaani_jax.quant.product import ternary_dot
from vaani_jax.quant.spec import TernarySpec
from vaani_jax.quant.weights import TernaryQuantizer, ternarize

F32 = np.float32
# Inputs of a weight scale and of an activation scale; 0 for a channel, and a token.
GROUPS = [(32, 0), (128, 0), (128, 32), (64, 128), (128, 128), (32, 384), (0, 32)]


def spec_of(group, pieces, **keys):
    return TernarySpec(
        granularity="group" if group else "channel",
        group=group or 128,
        activations="group" if pieces else "token",
        activation_group=pieces or 32,
        **keys,
    )


def operands(rows, k, n, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(rows, k)) * np.exp(rng.normal(size=(rows, k)))
    w = rng.normal(size=(k, n)) * np.exp(rng.normal(size=(1, n))) * 0.05
    return x.astype(F32), w.astype(F32)


def activations(x, size):
    """Codes [M, K] and scales [M, K / size], from the definition."""
    parts = x.reshape(len(x), -1, size)
    bound = np.maximum(np.abs(parts).max(-1), F32(1e-5))
    codes = np.round(parts * (F32(127) / bound)[..., None])
    return np.clip(codes, -128, 127).reshape(x.shape), bound * F32(1 / 127)


def product(q, t, s, d):
    """The law: q [M, K], t [K, N], s [K / G, N], d [M, K / A], all float32."""
    k = q.shape[1]
    group, size = k // len(s), k // d.shape[1]
    fine, coarse = min(group, size), max(group, size)
    total = np.zeros((len(q), t.shape[1]), F32)
    for outer in range(k // coarse):
        inner = np.zeros_like(total)
        for i in range(outer * coarse // fine, (outer + 1) * coarse // fine):
            part = slice(i * fine, (i + 1) * fine)
            sums = (q[:, part].astype(np.int64) @ t[part].astype(np.int64)).astype(F32)
            inner = inner + sums * (s[i][None] if size >= group else d[:, i, None])
        last = d[:, outer, None] if size >= group else s[outer][None]
        total = total + inner * last
    return total


@pytest.mark.parametrize("operand", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize(("group", "pieces"), GROUPS)
def test_a_product_is_the_law_to_the_bit(group, pieces, operand):
    k, n = 768, 33
    x, w = operands(5, k, n)
    spec = spec_of(group, pieces, operands=operand)
    dot = jax.jit(lambda x, w: ternary_dot(x, (w,), (jnp.float32(0.5),), spec=spec)[0])
    t, s = ternarize(w, 0.5, spec)
    q, d = activations(x, pieces or k)
    expected = product(q, np.asarray(t), np.asarray(s).reshape(-1, n), d)
    np.testing.assert_array_equal(dot(x, w), expected)
    # And it is the product of what they stand for.
    near = (q.reshape(5, d.shape[1], -1) * d[..., None]).reshape(5, k).astype(float)
    far = near @ (np.asarray(t) * np.repeat(s.reshape(-1, n), group or k, axis=0))
    np.testing.assert_allclose(expected, far, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scale", ["absmean", "least_squares"])
def test_groups_have_the_scale_and_threshold_of_their_own_weights(scale):
    _, w = operands(1, 256, 6)
    spec = spec_of(64, 0, scale=scale)
    t, s = map(np.asarray, ternarize(w, 0.7, spec))
    assert s.shape == (4, 6)
    for g in range(4):
        for j in range(6):
            part = w[64 * g : 64 * g + 64, j].astype(np.float64)
            codes = np.sign(part) * (np.abs(part) > 0.7 * np.abs(part).mean())
            np.testing.assert_array_equal(t[64 * g : 64 * g + 64, j], codes)
            kept = np.abs(part)[codes != 0]
            expected = np.abs(part).mean() if scale == "absmean" else kept.mean()
            assert s[g, j] == pytest.approx(expected, rel=1e-6)


def test_scales_in_float16_are_numbers_of_float16():
    _, w = operands(1, 256, 6)
    w[:128, 0] *= 1e-7  # below what float16 holds with all its bits
    exact = ternarize(w, 0.5, spec_of(128, 0))
    kept = ternarize(w, 0.5, spec_of(128, 0, scale_dtype="float16"))
    np.testing.assert_array_equal(exact[0], kept[0])
    scale = np.asarray(kept[1])
    np.testing.assert_array_equal(scale.astype(np.float16).astype(F32), scale)
    expected = np.asarray(exact[1]).astype(np.float16).astype(F32)
    expected[0, 0] = 2.0**-14
    np.testing.assert_array_equal(scale, expected)


@pytest.mark.parametrize(("group", "pieces"), [(64, 0), (64, 32), (32, 64)])
def test_gradients_are_straight_through(group, pieces):
    k, n = 128, 9
    x, w = operands(4, k, n)
    spec = spec_of(group, pieces)
    g = np.random.default_rng(1).normal(size=(4, n)).astype(F32)

    def loss(x, w):
        return jnp.sum(ternary_dot(x, (w,), (jnp.float32(0.5),), spec=spec)[0] * g)

    dx, dw = jax.grad(loss, argnums=(0, 1))(x, w)
    t, s = map(np.asarray, ternarize(w, 0.5, spec))
    q, d = activations(x, pieces or k)
    wide = (q.reshape(4, d.shape[1], -1) * d[..., None]).reshape(4, k)
    kernel = t * np.repeat(s, group, axis=0)
    np.testing.assert_allclose(dx, g.astype(float) @ kernel.T, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(dw, wide.T.astype(float) @ g, rtol=1e-4, atol=1e-4)


def test_a_mix_moves_from_full_precision_to_the_product():
    x, w = operands(4, 128, 9)
    spec = spec_of(64, 32)

    def dot(mix):
        mix = None if mix is None else jnp.float32(mix)
        return ternary_dot(x, (w,), (jnp.float32(0.5),), spec=spec, mix=mix)[0]

    np.testing.assert_allclose(dot(0.0), x @ w, rtol=1e-3, atol=1e-3)
    np.testing.assert_array_equal(dot(1.0), dot(None))


@pytest.mark.parametrize("layout", ["tiles", "rows", "planes"])
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("n", [16, 33])
def test_packed_kernels_keep_codes_and_scales(layout, dtype, n):
    k = 192
    rng = np.random.default_rng(0)
    t = rng.integers(-1, 2, (k, n)).astype(F32)
    s = rng.uniform(0.01, 1, (3, n)).astype(dtype)
    packed = pack(jnp.asarray(t), jnp.asarray(s), layout)
    assert packed.groups == 3
    assert packed.scale.dtype == dtype
    for one in (packed, relayout(packed, "tiles"), relayout(packed, "planes")):
        assert one.scale.dtype == dtype
        np.testing.assert_array_equal(unpack(one), t)
        np.testing.assert_array_equal(scale_of(one), s.astype(F32))
    expected = t * np.repeat(s.astype(F32), 64, axis=0)
    np.testing.assert_array_equal(dequantized(packed), expected)
    ids = rng.integers(0, n, (2, 5))
    np.testing.assert_array_equal(
        take_columns(packed, jnp.asarray(ids)), expected.T[ids]
    )


@pytest.mark.parametrize("layout", ["tiles", "rows", "planes"])
@pytest.mark.parametrize("shape", [(), (21,)])
def test_columns_of_kernels_with_one_scale_or_one_per_channel(layout, shape):
    rng = np.random.default_rng(0)
    t = rng.integers(-1, 2, (100, 21)).astype(F32)
    s = rng.uniform(0.01, 1, shape).astype(F32)
    packed = pack(jnp.asarray(t), jnp.asarray(s), layout)
    got = take_columns(packed, jnp.arange(21))
    np.testing.assert_array_equal(got, (t * s).T)


def test_scales_of_a_block_of_outputs_lie_together():
    s = np.arange(3 * 40, dtype=F32).reshape(3, 40)
    tiled = np.asarray(pack(jnp.zeros((96, 40)), jnp.asarray(s)).scale)
    assert tiled.shape == (3, 3, 16)
    for g in range(3):
        for j in range(40):
            assert tiled[j // 16, g, j % 16] == s[g, j]


def test_a_quantizer_holds_stored_scales_in_their_shape():
    spec = spec_of(32, 0, scale="stored")
    quantizer = TernaryQuantizer(0.5, spec)
    w = operands(1, 96, 5)[1]
    variables = quantizer.init(jax.random.key(0), w)
    assert variables["quant"]["scale"].shape == (3, 5)
    codes = np.asarray(ternarize(w, 0.5, dataclasses.replace(spec, scale="absmean"))[0])
    scale = np.random.default_rng(0).uniform(1, 2, (3, 5)).astype(F32)
    variables = {"quant": {**variables["quant"], "scale": jnp.asarray(scale)}}
    expected = codes * np.repeat(scale, 32, axis=0)
    np.testing.assert_array_equal(quantizer.apply(variables, w), expected)


@pytest.mark.parametrize(
    ("k", "group", "pieces", "words"),
    [
        (100, 64, 0, "weight_group"),
        (96, 0, 64, "multiple"),
        (192, 96, 64, "fit each other"),
    ],
)
def test_groups_that_do_not_fit_are_refused(k, group, pieces, words):
    x, w = operands(2, k, 4)
    with pytest.raises(VaaniError, match=words):
        ternary_dot(x, (w,), (jnp.float32(0.5),), spec=spec_of(group, pieces))


def test_packing_refuses_scales_of_another_shape():
    with pytest.raises(VaaniError, match="can't pack"):
        pack(jnp.zeros((96, 5)), jnp.ones((3, 4)))
    with pytest.raises(VaaniError, match="can't pack"):
        pack(jnp.zeros((96, 5)), jnp.ones((5, 5)))


@pytest.mark.parametrize(("k", "n"), [(64, 16), (96, 40), (100, 33)])
def test_parts_of_outputs_make_the_whole_kernel(k, n):
    rng = np.random.default_rng(0)
    t = rng.integers(-1, 2, (k, n)).astype(np.int8)
    s = rng.uniform(0.01, 1, (4, n)).astype(np.float16)
    whole = pack(jnp.asarray(t), jnp.asarray(s))
    bounds = [0, 16, 32, n] if n > 32 else [0, n]
    parts = [slice(*pair) for pair in itertools.pairwise(bounds)]
    codes = np.concatenate([tiles_of_rows(t.T[part]) for part in parts])
    scales = np.concatenate([tiles_of_scales(s.T[part]) for part in parts])
    np.testing.assert_array_equal(codes, whole.codes)
    np.testing.assert_array_equal(scales, whole.scale)
    assert scales.dtype == np.float16

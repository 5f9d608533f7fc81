"""Native products with scales by groups of inputs, against their law in numpy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vaani_jax.kernels import cpu
from vaani_jax.quant.packed import pack

ISAS = ["amx", "avx512", "avxvnni", "avx2", "neon", "portable"]
# Of each kernel: outputs, and the inputs of a group with the dtype of its scales.
KERNELS = (
    (33, "tensor", "float32"),
    (17, "channel", "float32"),
    (50, 64, "float16"),
    (16, 128, "float32"),
    (5, 256, "float16"),
    (48, 32, "float32"),
    (31, 128, "float16"),
)
f = np.float32


@pytest.fixture(params=ISAS)
def isa(request):
    assert not cpu.missing()
    best = cpu.isa()
    if request.param not in cpu.isas() or not cpu.choose_isa(request.param):
        pytest.skip(f"this processor has no {request.param}")
    yield request.param
    assert cpu.choose_isa(best)


def in_tiles(scale):
    """Scales [groups, N] as [ceil(N / 16), groups, 16], with NaN for what pads them."""
    groups, n = scale.shape
    padded = np.pad(scale, ((0, 0), (0, -n % 16)), constant_values=np.nan)
    return np.ascontiguousarray(padded.reshape(groups, -1, 16).transpose(1, 0, 2))


def kernel(k, n, group, dtype, seed=0):
    """A packed kernel, its weights [K, N], and its scales [groups, N] in float32."""
    rng = np.random.default_rng([seed, k, n])
    weights = rng.integers(-1, 2, size=(k, n))
    groups = k // group if isinstance(group, int) else 1
    scale = 10 ** rng.uniform(-3, 1, size=(groups, 1 if group == "tensor" else n))
    scale = scale.astype(dtype)
    packed = pack(jnp.asarray(weights), jnp.float32(1))
    if isinstance(group, int):
        packed = dataclasses.replace(packed, scale=jnp.asarray(in_tiles(scale)))
    else:
        packed = dataclasses.replace(
            packed, scale=jnp.asarray(scale[0, 0 if scale.size == 1 else ...])
        )
    return packed, weights, scale.astype(f)


def activations(rows, k, seed=0):
    rng = np.random.default_rng([seed, rows, k])
    x = rng.normal(size=(rows, k)) * 10.0 ** rng.uniform(-3, 3, size=(rows, 1))
    x *= 10.0 ** rng.uniform(-2, 0, size=(rows, k // 32)).repeat(32, axis=1)
    return x.astype(f)


def quantized(x, group, limit=None):
    """Codes [M, K], integers, and what one counts, [M, K / group] float32."""
    pieces = x.reshape(len(x), -1, group)
    bound = np.abs(pieces).max(-1, keepdims=True) if limit is None else f(limit)
    bound = np.maximum(bound, f(1e-5)) + np.zeros_like(pieces[..., :1])
    codes = np.clip(np.rint(pieces * (f(127) / bound)), -128, 127)
    assert codes.dtype == f
    return codes.reshape(x.shape).astype(int), bound[..., 0] * (f(1) / f(127))


def law(x, weights, scale, group, activation_group=0, limit=None):
    """y [M, N] float32, every product and every sum rounded, in this order."""
    k = x.shape[1]
    taken = activation_group or k
    q, d = quantized(x, taken, limit)
    if not isinstance(group, int):
        if not activation_group:  # as training has it
            bound = np.maximum(np.abs(x).max(-1, keepdims=True), f(1e-5))
            part = f(1) / f(127)
            factor = bound * (scale * part) if group == "tensor" else d * scale
            return (q @ weights).astype(f) * factor
        group = k
        weights_first = False
    else:
        weights_first = taken >= group

    def sums(first, size):
        return (q[:, first : first + size] @ weights[first : first + size]).astype(f)

    y = np.zeros((len(x), weights.shape[1]), f)
    if weights_first:
        for first in range(0, k, taken):
            u = np.zeros_like(y)
            for at in range(first, first + taken, group):
                u = u + sums(at, group) * scale[at // group]
            y = y + u * d[:, first // taken, None]
    else:
        for first in range(0, k, group):
            u = np.zeros_like(y)
            for at in range(first, first + group, taken):
                u = u + sums(at, taken) * d[:, at // taken, None]
            y = y + u * scale[first // group]
    assert y.dtype == f
    return y


def served(x, packed, limit=None, norm=None, **options):
    return [
        np.asarray(y) for y in cpu.ternary_matmul(x, packed, limit, norm, **options)
    ]


def assert_equal_bits(got, expected):
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("activation_group", [0, 32, 64, 128, 256, 512])
def test_kernels_of_all_kinds_in_one_call(isa, activation_group):
    k = 512
    made = [kernel(k, *kind) for kind in KERNELS]
    packed = tuple(one[0] for one in made)
    x = activations(40, k)
    expected = [
        law(x, w, s, kind[1], activation_group)
        for (_, w, s), kind in zip(made, KERNELS, strict=True)
    ]
    for rows in (*range(1, 21), 40):
        got = served(x[:rows], packed, activation_group=activation_group)
        assert_equal_bits(got, [y[:rows] for y in expected])


@pytest.mark.parametrize(
    ("k", "group", "activation_group"),
    [
        (32, 32, 0),
        (96, 96, 32),
        (480, 160, 0),
        (480, 160, 480),
        (768, 96, 192),
        (672, 224, 224),
        (448, "tensor", 224),
        (480, "channel", 96),
        (128, 128, 128),
    ],
)
def test_groups_that_are_no_powers_of_two(isa, k, group, activation_group):
    packed, weights, scale = kernel(k, 37, group, "float32")
    for rows in (1, 3, 14):
        x = activations(rows, k)
        got = served(x, (packed,), activation_group=activation_group)
        assert_equal_bits(got, [law(x, weights, scale, group, activation_group)])


def test_every_scale_of_float16_is_exact(isa):
    scale = np.arange(1 << 16, dtype=np.uint16).view(np.float16)[None]
    weights = np.ones((32, 1 << 16), int)
    packed = pack(jnp.asarray(weights), jnp.float32(1))
    packed = dataclasses.replace(packed, scale=jnp.asarray(in_tiles(scale)))
    for rows in (1, 6):
        x = activations(rows, 32)
        with np.errstate(invalid="ignore"):
            expected = law(x, weights, scale.astype(f), 32)
        assert_equal_bits(served(x, (packed,)), [expected])


@pytest.mark.parametrize("activation_group", [0, 32])
@pytest.mark.parametrize("halves", [False, True])
def test_a_norm_in_the_call(isa, activation_group, halves):
    k = 256
    made = [kernel(k, *kind) for kind in KERNELS]
    scale = np.random.default_rng(1).uniform(0.5, 2, k).astype(f)
    for rows in (1, 3, 14):
        x = activations(rows, k)
        normal = cpu.rms_norm(jnp.asarray(x), jnp.asarray(scale), 1e-5)[0]
        if halves:
            normal = normal.astype(jnp.bfloat16)
        got = served(
            x,
            tuple(one[0] for one in made),
            norm=(jnp.asarray(scale), 1e-5),
            halves=halves,
            activation_group=activation_group,
        )
        rows_in = np.asarray(normal, f)
        expected = [
            law(rows_in, w, s, kind[1], activation_group)
            for (_, w, s), kind in zip(made, KERNELS, strict=True)
        ]
        assert_equal_bits(got, expected)


def test_a_tracked_range_with_groups_of_weights(isa):
    packed, weights, scale = kernel(128, 37, 32, "float16")
    x = activations(6, 128)
    x[0, 3], x[1, 5] = 1e9, -np.inf  # both saturate
    got = served(x, (packed,), jnp.float32(1.7))
    assert_equal_bits(got, [law(x, weights, scale, 32, limit=1.7)])


@pytest.mark.parametrize("activation_group", [0, 32, 256])
def test_rows_that_are_not_finite_give_nan_and_touch_no_other(isa, activation_group):
    packed = tuple(kernel(256, *kind)[0] for kind in KERNELS)
    for rows in (4, 14):
        x = activations(rows, 256)
        clean = served(x, packed, activation_group=activation_group)
        broken = x.copy()
        broken[1, 200], broken[3, 0] = np.nan, np.inf
        got = served(broken, packed, activation_group=activation_group)
        others = np.delete(np.arange(rows), [1, 3])
        for y, before in zip(got, clean, strict=True):
            assert np.isnan(y[[1, 3]]).all()
            np.testing.assert_array_equal(y[others], before[others])
            assert np.isfinite(before).all()


def test_large_products_on_threads(isa):
    k, kinds = (
        1024,
        ((1100, 128, "float16"), (700, 64, "float32"), (40, "tensor", "float32")),
    )
    made = [kernel(k, *kind) for kind in kinds]
    packed = tuple(one[0] for one in made)
    for rows, activation_group in ((1, 0), (3, 32), (40, 128)):
        x = activations(rows, k)
        expected = [
            law(x, w, s, kind[1], activation_group)
            for (_, w, s), kind in zip(made, kinds, strict=True)
        ]
        for _ in range(10):
            got = served(x, packed, activation_group=activation_group)
            assert_equal_bits(got, expected)


@pytest.mark.parametrize(
    ("shape", "dtype", "options"),
    [
        ((3, 2, 15), "float32", {}),  # no blocks of 16
        ((2, 2, 16), "float32", {}),  # too few outputs
        ((3, 3, 16), "float32", {}),  # groups that don't divide K
        ((3, 16, 16), "float32", {}),  # groups of 16
        ((3, 0, 16), "float16", {}),
        ((3, 2, 16), "bfloat16", {}),
        ((3, 32), "float32", {}),
        ((32,), "float32", {}),
        ((33,), "float16", {}),
        ((3, 4, 16), "float16", {"activation_group": 48}),
        ((3, 4, 16), "float16", {"activation_group": -32}),
        ((3, 4, 16), "float16", {"activation_group": 512}),  # more than K
        ((3, 4, 16), "float16", {"activation_group": 192}),  # doesn't divide K
        ((3, 4, 16), "float16", {"activation_group": 32, "limit": jnp.float32(1)}),
        ((3, 4, 16), "float16", {"limit": jnp.ones(2)}),
    ],
)
def test_what_does_not_fit_is_refused(shape, dtype, options):
    packed, _, _ = kernel(256, 33, "tensor", "float32")
    packed = dataclasses.replace(packed, scale=jnp.ones(shape, dtype))
    with pytest.raises(jax.errors.JaxRuntimeError, match="INVALID_ARGUMENT"):
        served(activations(2, 256), (packed,), **options)


def test_groups_that_do_not_divide_each_other_are_refused():
    packed = tuple(kernel(480, 33, group, "float32")[0] for group in (160, 96))
    with pytest.raises(jax.errors.JaxRuntimeError, match="INVALID_ARGUMENT"):
        served(activations(2, 480), packed, activation_group=96)
    served(activations(2, 480), packed, activation_group=480)


def test_no_inputs_and_no_outputs():
    packed, _, _ = kernel(64, 16, 32, "float32")
    none = packed.replace(codes=packed.codes[:0], scale=packed.scale[:0], shape=(64, 0))
    (y,) = served(activations(3, 64), (none,))
    assert y.shape == (3, 0)
    y, some = served(activations(3, 64), (none, packed), activation_group=32)
    assert y.shape == (3, 0)
    assert some.shape == (3, 16)

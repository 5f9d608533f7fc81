"""The quantizers against float64 numpy, and the ternary product to the bit."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vaani_jax.quant.activations import ActivationQuantizer, quantize_activations
from vaani_jax.quant.product import ternary_dot
from vaani_jax.quant.spec import (
    Granularity,
    OperandDtype,
    TernarySpec,
    WeightScale,
)
from vaani_jax.quant.straight_through import straight_through
from vaani_jax.quant.sums import exact_sum
from vaani_jax.quant.weights import TernaryQuantizer, ternarize

SCALES: tuple[WeightScale, ...] = ("absmean", "least_squares")
GRANULARITIES: tuple[Granularity, ...] = ("tensor", "channel")
SPECS = {f"{s}-{g}": TernarySpec(s, g) for s in SCALES for g in GRANULARITIES}
OPERANDS: tuple[OperandDtype, ...] = ("float32", "bfloat16", "int8")
every_spec = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
every_range = pytest.mark.parametrize("bound", [None, 1.25], ids=["token", "range"])


def gaussian(*shape, seed=0, scale=1.0):
    values = np.random.default_rng(seed).normal(0.0, scale, shape)
    return values.astype(np.float32)


def scalar(value):
    return None if value is None else jnp.asarray(value, jnp.float32)


def assert_same_bits(x, y):
    x, y = np.asarray(x), np.asarray(y)
    assert (x.dtype, x.shape) == (y.dtype, y.shape)
    unsigned = f"u{x.dtype.itemsize}"
    np.testing.assert_array_equal(x.view(unsigned), y.view(unsigned))


def ternary_reference(w, tau, spec, dtype=np.float64):
    """Codes and scale, from the formulas of the papers."""
    w = np.asarray(w, dtype)
    axis = None if spec.granularity == "tensor" else 0
    size = dtype(w.size if axis is None else w.shape[0])
    gamma = np.maximum(np.abs(w).sum(axis=axis) / size, dtype(1e-5))
    codes = np.sign(w) * (np.abs(w) > dtype(tau) * gamma)
    if spec.scale == "absmean":
        return codes, gamma
    kept = np.maximum((codes * codes).sum(axis=axis), dtype(1))
    return codes, np.maximum((w * codes).sum(axis=axis) / kept, dtype(1e-5))


def activation_reference(x, bound=None, dtype=np.float64):
    x = np.asarray(x).astype(dtype)
    largest = np.abs(x).max(axis=-1, keepdims=True) if bound is None else dtype(bound)
    largest = np.maximum(largest, dtype(1e-5))
    codes = np.clip(np.round(x * (dtype(127) / largest)), -128, 127)
    return codes, largest * dtype(1 / 127)


@functools.partial(jax.jit, static_argnums=0)
def products_and_gradients(spec, x, kernels, taus, bound, mix, cotangents):
    function = lambda x, kernels: ternary_dot(  # noqa: E731
        x, kernels, taus, spec=spec, activation_range=bound, mix=mix
    )
    y, vjp = jax.vjp(function, x, kernels)
    return y, *vjp(cotangents)


# Weights.


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_threshold_one_half_is_round_and_clip(granularity):
    w = gaussian(96, 48, scale=0.02)
    codes, gamma = ternarize(jnp.asarray(w), 0.5, TernarySpec(granularity=granularity))
    exact = np.abs(w.astype(np.float64))
    ratio = w / exact.mean(axis=None if granularity == "tensor" else 0)
    clear = np.abs(np.abs(ratio) - 0.5) > 1e-5  # the two rules differ on ties
    assert clear.mean() > 0.999
    np.testing.assert_array_equal(codes[clear], ratio.round().clip(-1, 1)[clear])
    assert codes.dtype == gamma.dtype == jnp.float32


@every_spec
@pytest.mark.parametrize("tau", [0.0, 0.3, 0.7, 1.3])
def test_any_threshold_follows_the_formula(spec, tau):
    w = gaussian(64, 24, seed=1, scale=0.3)
    codes, scale = ternarize(jnp.asarray(w), tau, spec)
    compiled = jax.jit(ternarize, static_argnums=2)(jnp.asarray(w), tau, spec)
    assert_same_bits(codes, compiled[0])
    assert_same_bits(scale, compiled[1])
    expected, expected_scale = ternary_reference(w, tau, spec)
    np.testing.assert_array_equal(codes, expected)
    assert scale.shape == (() if spec.granularity == "tensor" else (24,))
    np.testing.assert_allclose(scale, expected_scale, rtol=1e-6)


@pytest.mark.parametrize("tau", [0.4, 1.0])
def test_least_squares_scale_is_the_optimum(tau):
    w = gaussian(40, 6, seed=2)
    for granularity in ("tensor", "channel"):
        spec = TernarySpec("least_squares", granularity)
        codes, scale = map(np.asarray, ternarize(jnp.asarray(w), tau, spec))
        pairs = [(codes.reshape(-1, 1), w.reshape(-1), scale)]
        if granularity == "channel":
            pairs = [(codes[:, [i]], w[:, i], scale[i]) for i in range(w.shape[1])]
        for t, target, found in pairs:
            best = np.linalg.lstsq(t.astype(np.float64), target.astype(np.float64))[0]
            np.testing.assert_allclose(found, best[0], rtol=1e-6)
            grid = np.linspace(0.5 * found, 1.5 * found, 201)
            errors = [np.sum((target - a * t[:, 0]) ** 2) for a in grid]
            assert np.argmin(errors) == 100


# -- Sums ---------------------------------------------------------------------------


@pytest.mark.parametrize("axis", [None, 0])
@pytest.mark.parametrize("scale", [1e-30, 1e-6, 0.02, 1e20])
@pytest.mark.parametrize("shape", [(1, 1), (5, 3), (64, 64), (257, 129), (64, 7_000)])
def test_sums_are_those_of_float64_in_any_order(shape, scale, axis):
    rng = np.random.default_rng(0)
    terms = np.abs(gaussian(*shape, scale=scale))
    found = exact_sum(jnp.asarray(terms), axis)
    wanted = terms.sum(axis=axis, keepdims=True, dtype=np.float64)
    np.testing.assert_allclose(found, wanted, rtol=5e-7)
    assert_same_bits(found, jax.jit(exact_sum, static_argnums=1)(terms, axis))
    for _ in range(3):
        terms = rng.permutation(terms)
        if axis is None:
            terms = rng.permutation(terms, axis=1)
        assert_same_bits(found, exact_sum(jnp.asarray(terms), axis))


def test_sums_of_a_million_rows_do_not_overflow():
    ones = jnp.ones((2**20 - 1, 2), jnp.float32)
    np.testing.assert_array_equal(exact_sum(ones), [[2.0**21 - 2]])
    np.testing.assert_array_equal(exact_sum(ones, 0), [[2.0**20 - 1] * 2])


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_sum_with_a_term_that_is_not_finite_is_not_a_number(bad):
    terms = np.ones((4, 4), np.float32)
    terms[1, 2] = bad
    assert np.isnan(exact_sum(jnp.asarray(terms))).all()
    nan = np.isnan(exact_sum(jnp.asarray(terms), 0))
    np.testing.assert_array_equal(nan, [[False, False, True, False]])


@pytest.mark.parametrize(("tau", "zeros"), [(0.5, 0.310), (0.7, 0.424), (1.0, 0.575)])
def test_zeros_of_gaussian_weights(tau, zeros):
    assert math.erf(tau / math.sqrt(math.pi)) == pytest.approx(zeros, abs=6e-4)
    codes, _ = ternarize(jnp.asarray(gaussian(512, 512, seed=3, scale=0.02)), tau)
    assert float(jnp.mean(codes == 0)) == pytest.approx(zeros, abs=0.01)


@every_spec
def test_zero_kernels_and_zero_inputs_stay_finite(spec):
    w = gaussian(16, 4)
    w[:, 1] = 0.0  # a dead channel
    x, rest = gaussian(3, 16), ((scalar(0.5),), None, None, (gaussian(3, 4),))
    for left, right in [(0 * x, w), (x, 0 * w), (0 * x, 0 * w)]:
        y, dx, dw = products_and_gradients(spec, left, (right,), *rest)
        assert all(np.isfinite(a).all() for a in (y, dx, dw))
        assert not np.asarray(y)[..., 1].any()
    codes, scale = ternarize(jnp.asarray(w), 0.5, spec)
    assert not np.asarray(codes)[:, 1].any()
    assert (np.asarray(scale) > 0).all()


# Activations.


@every_range
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_activation_codes(bound, dtype):
    x = jnp.asarray(gaussian(4, 5, 64, seed=4), dtype)
    codes, scale = map(np.asarray, quantize_activations(x, scalar(bound)))
    compiled = jax.jit(quantize_activations)(x, scalar(bound))
    assert_same_bits(codes, compiled[0])
    assert_same_bits(scale, compiled[1])
    expected, expected_scale = activation_reference(x, bound)
    np.testing.assert_array_equal(codes, expected)
    np.testing.assert_allclose(scale, expected_scale, rtol=1e-6)
    assert codes.dtype == scale.dtype == np.float32
    assert scale.shape == ((4, 5, 1) if bound is None else ())
    if bound is None:  # the largest of each token maps to 127, errors are half a step
        np.testing.assert_array_equal(np.abs(codes).max(axis=-1), np.full((4, 5), 127))
        error = np.abs(np.asarray(x).astype(np.float32) - codes * scale)
        assert (error <= 0.5001 * scale).all()
    else:  # what lies beyond the range is clipped, at both ends
        assert codes.min() == -128
        assert codes.max() == 127


def test_rounding_is_half_to_even():
    x = jnp.asarray([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 125.5, 126.5]])
    expected = [[127, 0, 2, 2, 0, -2, -2, 126, 126]]
    np.testing.assert_array_equal(quantize_activations(x)[0], expected)
    np.testing.assert_array_equal(quantize_activations(x, scalar(127))[0], expected)


# The product.


def integer_product(x, w, tau, spec, bound):
    """Sums in int64 between float32 scales: what the product must be to the bit."""
    q, _ = activation_reference(x, bound, np.float32)
    codes, scale = ternary_reference(w, tau, spec, np.float32)
    sums = q.astype(np.int64) @ codes.astype(np.int64)
    part = np.float32(1 / 127)
    given = np.abs(x).max(-1, keepdims=True) if bound is None else bound
    limit = np.maximum(given, 1e-5).astype(np.float32)
    both = limit * (scale * part) if np.ndim(scale) == 0 else (limit * part) * scale
    y = sums.astype(np.float32) * both
    assert y.dtype == np.float32
    return y


def product(x, w, tau, bound, spec):
    return ternary_dot(x, [w], [tau], spec=spec, activation_range=bound)[0]


@every_spec
@every_range
@pytest.mark.parametrize("operands", OPERANDS)
def test_product_is_the_integer_product_to_the_bit(spec, bound, operands):
    # A kernel of multiples of 1/256: float32 holds their sum, in whatever order they
    # are added, so that the scale, too, is known to the bit.
    w = np.random.default_rng(5).integers(-256, 257, (512, 8)) / 256
    x, w = gaussian(2, 3, 512, seed=6), w.astype(np.float32)
    spec = TernarySpec(spec.scale, spec.granularity, operands)
    rest = (jnp.asarray(w), scalar(0.7), scalar(bound), spec)
    for dtype in (jnp.float32, jnp.bfloat16):
        rounded = jnp.asarray(x, dtype)
        expected = integer_product(rounded, w, 0.7, spec, bound).astype(dtype)
        assert_same_bits(product(rounded, *rest), expected)


@pytest.mark.parametrize("operands", OPERANDS)
@pytest.mark.parametrize("k", [4096, 131_072])
def test_product_is_exact_at_the_extremes(operands, k):
    """Every code is 127 times +-1: one sum is 127 K, the largest there is."""
    rng = np.random.default_rng(7)
    x, w = rng.choice([-1.0, 1.0], (2, k)), rng.choice([-1.0, 1.0], (k, 2))
    w[:, 0] = x[0]
    spec = TernarySpec(operands=operands)
    x, w = x.astype(np.float32), w.astype(np.float32)
    (y,) = ternary_dot(jnp.asarray(x), [jnp.asarray(w)], [scalar(0.5)], spec=spec)
    assert_same_bits(y, integer_product(x, w, 0.5, spec, None))
    assert np.asarray(y)[0, 0] == np.float32(127 * k) * np.float32(1 / 127)


def test_int8_sums_round_once_where_float32_sums_would_on_the_way():
    rng = np.random.default_rng(9)
    k = 300_000
    x, w = rng.choice([-1.0, 1.0], (3, k)), rng.choice([-1.0, 1.0], (k, 2))
    w[:, 0] = x[0] * rng.choice([-1.0, 1.0], k, p=[0.001, 0.999])
    x, w = x.astype(np.float32), w.astype(np.float32)
    spec = TernarySpec(operands="int8")
    y = product(jnp.asarray(x), jnp.asarray(w), scalar(0.5), None, spec)
    assert_same_bits(y, integer_product(x, w, 0.5, spec, None))
    assert np.abs(x.astype(np.int64) @ w.astype(np.int64)).max() * 127 > 2**24


def scanned(f):
    return lambda x, w: jax.lax.scan(lambda _, x: (None, f(x, w)), None, x)[1]


WAYS = {
    "plain": lambda f: f,
    "remat": jax.checkpoint,
    "vmap": lambda f: jax.vmap(f, in_axes=(0, None)),
    "scan": scanned,
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("granularity", "bound", "dtype"),
    [
        ("tensor", None, jnp.float32),
        ("tensor", None, jnp.bfloat16),
        ("channel", 1.25, jnp.float32),
        ("channel", None, jnp.bfloat16),
        ("tensor", 1.25, jnp.bfloat16),
    ],
)
def test_operands_of_any_dtype_give_the_same_bits_and_gradients(
    way, dtype, granularity, bound
):
    for batch, length, k, widths in [(3, 4, 64, (24, 8)), (2, 1, 300, (33,))]:
        x = jnp.asarray(gaussian(batch, length, k, seed=k), dtype)
        kernels = tuple(jnp.asarray(gaussian(k, n, seed=n)) for n in widths)
        taus = [scalar(0.5)] * len(widths)
        found = {}
        for operands in OPERANDS:
            spec = TernarySpec(granularity=granularity, operands=operands)
            run = WAYS[way](
                lambda x, w, spec=spec, taus=taus: ternary_dot(
                    x, w, taus, spec=spec, activation_range=scalar(bound)
                )
            )

            @jax.jit
            def both(x, w, run=run):
                y, vjp = jax.vjp(run, x, w)
                return y, vjp(jax.tree.map(jnp.sin, y))

            found[operands] = jax.tree.leaves(both(x, kernels))
            sums = "int32" if operands == "int8" else "float32"
            jaxpr = str(jax.make_jaxpr(run)(x, kernels))
            assert f"preferred_element_type={sums}" in jaxpr
        for operands in ("bfloat16", "int8"):
            for a, b in zip(found["float32"], found[operands], strict=True):
                assert_same_bits(a, b)


def test_int8_operands_are_what_the_backward_pass_keeps():
    x, w = jnp.asarray(gaussian(5, 64)), jnp.asarray(gaussian(64, 12))

    def kept(operands, mix=None):
        spec = TernarySpec(operands=operands)
        _, vjp = jax.vjp(
            lambda x, w: ternary_dot(x, [w], [scalar(0.5)], spec=spec, mix=mix), x, w
        )
        return {(leaf.dtype.name, leaf.shape) for leaf in jax.tree.leaves(vjp)}

    assert {("int8", (5, 64)), ("int8", (64, 12))} <= kept("int8")
    assert {("bfloat16", (5, 64)), ("bfloat16", (64, 12))} <= kept("bfloat16")
    assert "int8" not in {name for name, _ in kept("int8", scalar(0.5))}  # a mix


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("operands", OPERANDS)
def test_what_is_not_finite_stays_so(operands, bad):
    """An integer can't be NaN: the scales carry it."""
    spec = TernarySpec(operands=operands)
    x, w = gaussian(3, 16), gaussian(16, 4)
    dirty = x.copy()
    dirty[1, 2] = bad
    y = np.asarray(product(jnp.asarray(dirty), jnp.asarray(w), scalar(0.5), None, spec))
    assert not np.isfinite(y[1]).any()
    assert np.isfinite(y[[0, 2]]).all()
    dirty = w.copy()
    dirty[5, 1] = bad
    y = product(jnp.asarray(x), jnp.asarray(dirty), scalar(0.5), None, spec)
    assert not np.isfinite(np.asarray(y)).any()


@every_spec
def test_joined_kernels_equal_each_alone_to_the_bit(spec):
    x = jnp.asarray(gaussian(2, 5, 32))
    kernels = [jnp.asarray(gaussian(32, n, seed=n, scale=n)) for n in (3, 8, 5)]
    taus = [scalar(t) for t in (0.3, 0.5, 0.9)]
    run = jax.jit(lambda kernels, taus: ternary_dot(x, kernels, taus, spec=spec))
    for y, w, tau in zip(run(kernels, taus), kernels, taus, strict=True):
        assert_same_bits(y, run([w], [tau])[0])


@every_spec
@every_range
@pytest.mark.parametrize("mix", [None, 0.0, 0.3])
def test_values_and_straight_through_gradients(spec, bound, mix):
    """The product of x + lambda (q(x) - x) and its gradients, quantizers passed by."""
    x = gaussian(2, 3, 32, seed=8)
    kernels = tuple(gaussian(32, n, seed=n, scale=0.1 * n) for n in (6, 10))
    cotangents = tuple(gaussian(2, 3, n, seed=20 + n) for n in (6, 10))
    taus = (scalar(0.5), scalar(0.8))
    y, dx, dw = products_and_gradients(
        spec, x, kernels, taus, scalar(bound), scalar(mix), cotangents
    )
    part = 1.0 if mix is None else mix
    wide = x.astype(np.float64)
    q, s = activation_reference(x, bound)
    left = (wide + part * (s * q - wide)).reshape(6, 32)
    expected_dx = np.zeros((6, 32))
    for i, (w, tau) in enumerate(zip(kernels, taus, strict=True)):
        codes, scale = ternary_reference(w, tau, spec)
        right = w + part * (scale * codes - w)
        g = cotangents[i].astype(np.float64).reshape(6, -1)
        expected_dx += g @ right.T
        np.testing.assert_allclose(
            y[i].reshape(6, -1), left @ right, rtol=1e-5, atol=2e-5
        )
        np.testing.assert_allclose(dw[i], left.T @ g, rtol=1e-5, atol=2e-5)
    np.testing.assert_allclose(dx.reshape(6, 32), expected_dx, rtol=1e-5, atol=2e-5)


@every_spec
@every_range
def test_mix_of_one_equals_no_mix_to_the_bit(spec, bound):
    x, kernels = gaussian(5, 64), (gaussian(64, 12, scale=0.02),)
    rest = ((scalar(0.5),), scalar(bound))
    run = lambda mix: products_and_gradients(  # noqa: E731
        spec, x, kernels, *rest, scalar(mix), (gaussian(5, 12, seed=1),)
    )
    (one,), (none,), (less,) = (run(mix)[0] for mix in (1.0, None, 0.9))
    assert_same_bits(one, none)
    assert jnp.any(less != none)


def test_thresholds_range_and_mix_get_no_gradient():
    x, w = jnp.asarray(gaussian(5, 16)), jnp.asarray(gaussian(16, 4))

    def loss(tau, bound, mix):
        y = ternary_dot(x, [w], [tau], activation_range=bound, mix=mix)[0]
        return jnp.sum(jnp.square(y))

    gradients = jax.grad(loss, (0, 1, 2))(scalar(0.5), scalar(1.0), scalar(0.5))
    assert [float(g) for g in gradients] == [0.0, 0.0, 0.0]


def test_another_threshold_or_mix_does_not_recompile():
    traces = []

    @jax.jit
    def zeros_of_kernel_and_product(x, w, tau, mix):
        traces.append(1)
        codes, _ = ternarize(w, tau)
        return jnp.mean(codes == 0), ternary_dot(x, [w], [tau], mix=mix)

    x, w = gaussian(3, 64), gaussian(64, 32)
    zeros = [
        float(zeros_of_kernel_and_product(x, w, scalar(tau), scalar(mix))[0])
        for tau, mix in [(0.2, 1.0), (0.7, 0.5), (1.2, 0.0)]
    ]
    assert zeros[0] + 0.2 < zeros[1] < zeros[2] - 0.2
    assert len(traces) == 1


def test_dtypes_are_those_of_the_arguments():
    x, g = (jnp.asarray(gaussian(3, n), jnp.bfloat16) for n in (32, 8))
    w, rest = gaussian(32, 8), ((scalar(0.5),), None, None, (g,))
    y, dx, dw = products_and_gradients(TernarySpec(), x, (w,), *rest)
    assert y[0].dtype == dx.dtype == jnp.bfloat16
    assert dw[0].dtype == jnp.float32
    codes, scale = ternary_reference(w, 0.5, TernarySpec())
    expected = np.asarray(g).astype(np.float64) @ (scale * codes).T
    np.testing.assert_allclose(dx.astype(jnp.float32), expected, rtol=0.02, atol=0.02)


# Modules.


def test_straight_through_is_value_forward_and_identity_backward():
    x = jnp.asarray([0.2, -1.7, 3.0])
    value, vjp = jax.vjp(lambda x: straight_through(jnp.round(x), x), x)
    np.testing.assert_array_equal(value, [0.0, -2.0, 3.0])
    np.testing.assert_array_equal(vjp(jnp.asarray([1.0, 2.0, 3.0]))[0], [1, 2, 3])


@pytest.mark.parametrize("scale", SCALES)
def test_ternary_quantizer(scale):
    spec = TernarySpec(scale)
    w, module = jnp.asarray(gaussian(16, 6)), TernaryQuantizer(0.7, spec)
    variables = module.init(jax.random.key(0), w)
    assert float(variables["quant"]["threshold"]) == pytest.approx(0.7)
    for tau in (0.7, 1.1):
        variables = {"quant": {"threshold": scalar(tau)}}
        value: Any
        value, vjp = jax.vjp(lambda w, v=variables: module.apply(v, w), w)
        codes, scale = ternary_reference(w, tau, spec)
        np.testing.assert_allclose(value, scale * codes, rtol=1e-6)
        np.testing.assert_array_equal(vjp(w)[0], w)


def test_activation_quantizer_per_token_keeps_nothing():
    x, module = jnp.asarray(gaussian(4, 16)), ActivationQuantizer()
    assert module.init(jax.random.key(0), x) == {}
    value: Any
    value, vjp = jax.vjp(lambda x: module.apply({}, x, train=True), x)
    q, s = activation_reference(x)
    np.testing.assert_allclose(value, s * q, rtol=1e-6)
    np.testing.assert_array_equal(vjp(x)[0], x)


def test_tracked_range_follows_the_batches_and_rests_in_evaluation():
    module = ActivationQuantizer("ema", 0.75)
    batches = [jnp.asarray(gaussian(4, 16, seed=i, scale=i + 1.0)) for i in range(4)]
    variables = module.init(jax.random.key(0), batches[0])
    assert float(variables["quant"]["range"]) == 0.0  # nothing seen yet
    expected = None
    for x in batches[:3]:
        largest = float(jnp.max(jnp.abs(x)))
        expected = largest if expected is None else 0.75 * expected + 0.25 * largest
        y, variables = module.apply(variables, x, train=True, mutable=["quant"])
        assert float(variables["quant"]["range"]) == pytest.approx(expected, rel=1e-6)
        q, s = activation_reference(x, float(variables["quant"]["range"]))
        np.testing.assert_allclose(y, s * q, rtol=1e-5)

    x = batches[3]
    assert expected is not None
    assert float(jnp.max(jnp.abs(x))) > expected  # so that evaluation clips
    y, after = module.apply(variables, x, train=False, mutable=["quant"])
    assert jax.tree.map(float, after) == jax.tree.map(float, variables)
    q, s = activation_reference(x, expected)
    np.testing.assert_allclose(y, s * q, rtol=1e-5)
    _, vjp = jax.vjp(lambda x: module.apply(variables, x), x)
    np.testing.assert_array_equal(vjp(x)[0], x)  # clipped elements pass theirs too

"""Every backend and every instruction set against training's own product."""

import functools
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vaani_jax import kernels
from vaani_jax.errors import VaaniError
from vaani_jax.kernels import cpu, floats
from vaani_jax.model.attention import causal_attention
from vaani_jax.model.codes import BLOCK, blocks_of, pack_halves, quantize_heads
from vaani_jax.quant.packed import pack, pack_rows
from vaani_jax.quant.product import ternary_dot
from vaani_jax.quant.spec import TernarySpec
from vaani_jax.quant.weights import ternarize

# Rows; inputs; outputs of each kernel: multiples of nothing among them.
CASES = [
    (1, 16, (16,)),
    (1, 1, (1,)),
    (1, 17, (33, 5)),
    (2, 64, (16,)),
    (3, 100, (50, 20, 7)),
    (4, 77, (19,)),
    (5, 255, (40,)),
    (13, 130, (48,)),
    (33, 320, (128, 65)),
    (70, 511, (31,)),
]
ISAS = ["amx", "avx512", "avxvnni", "avx2", "neon", "portable"]


@pytest.fixture
def isa(request):
    """One instruction set of the native kernels, and the best one again after."""
    assert not cpu.missing()  # the package's own build has a compiler in CI
    best = cpu.isa()
    if request.param not in cpu.isas() or not cpu.choose_isa(request.param):
        pytest.skip(f"this processor has no {request.param}")
    yield request.param
    assert cpu.choose_isa(best)


def problem(rows, k, widths, spec, seed=0):
    rng = np.random.default_rng([seed, rows, k, len(widths)])
    x = rng.normal(size=(rows, k)) * 10.0 ** rng.uniform(-3, 3, size=(rows, 1))
    ws = [rng.normal(size=(k, n)).astype(np.float32) for n in widths]
    turn = jax.jit(ternarize, static_argnums=2)
    packed = [pack(*turn(w, jnp.float32(0.5), spec)) for w in ws]
    return jnp.asarray(x, jnp.float32), ws, packed


def trained(x, ws, spec, activation_range=None):
    """What the training forward gives, compiled on its own."""

    @jax.jit
    def forward(x, ws, limit):
        taus = [jnp.float32(0.5)] * len(ws)
        return ternary_dot(x, ws, taus, spec=spec, activation_range=limit)

    return forward(x, ws, activation_range)


def served(x, packed, using, activation_range=None, **options):
    @jax.jit
    def forward(x, packed, limit):
        return kernels.ternary_matmul(
            x, packed, activation_range=limit, using=using, **options
        )

    return forward(x, packed, activation_range)


def assert_equal_bits(got, expected):
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
@pytest.mark.parametrize(("rows", "k", "widths"), CASES)
def test_native_paths_equal_training_to_the_bit(rows, k, widths, granularity):
    spec = TernarySpec(granularity=granularity)
    x, ws, packed = problem(rows, k, widths, spec)
    expected = trained(x, ws, spec)
    best, tried = cpu.isa(), []
    for name in cpu.isas():
        if cpu.choose_isa(name):
            assert_equal_bits(served(x, packed, "cpu"), expected)
            tried.append(name)
    assert cpu.choose_isa(best)
    assert {best, "portable"} <= set(tried)
    assert_equal_bits(served(x, packed, "reference"), expected)


@pytest.mark.parametrize("using", ["gpu", "tpu"])
@pytest.mark.parametrize(("rows", "k", "widths"), [CASES[2], CASES[6], CASES[8]])
def test_pallas_equals_training_to_the_bit(rows, k, widths, using):
    spec = TernarySpec()
    x, ws, packed = problem(rows, k, widths, spec)
    assert_equal_bits(served(x, packed, using), trained(x, ws, spec))


@pytest.mark.parametrize("using", ["cpu", "reference", "gpu", "tpu"])
def test_a_tracked_range_saturates_alike(using):
    spec = TernarySpec(scale="least_squares")
    x, ws, packed = problem(3, 40, (24, 8), spec)
    x = x.at[0, 3].set(1e9)  # far beyond the range
    limit = jnp.float32(1.7)
    expected = trained(x, ws, spec, limit)
    assert_equal_bits(served(x, packed, using, activation_range=limit), expected)


@pytest.mark.parametrize("isa", ISAS, indirect=True)
def test_rows_that_are_not_finite_give_nan_and_touch_no_other(isa):
    x, _, packed = problem(6, 40, (24,), TernarySpec())
    clean = np.asarray(served(x, packed, "cpu")[0])
    broken = x.at[1, 5].set(jnp.nan).at[4, 0].set(jnp.inf)
    got = np.asarray(served(broken, packed, "cpu")[0])
    assert np.isnan(got[[1, 4]]).all()
    np.testing.assert_array_equal(got[[0, 2, 3, 5]], clean[[0, 2, 3, 5]])


@pytest.mark.parametrize("isa", ISAS, indirect=True)
@pytest.mark.parametrize(("rows", "k"), [(1, 48), (7, 130), (33, 17)])
def test_a_norm_in_the_call(isa, rows, k):
    x, _, packed = problem(rows, k, (24,), TernarySpec())
    scale = jnp.asarray(np.random.default_rng(1).uniform(0.5, 2, k), jnp.float32)
    wide = np.asarray(x, np.float64)
    normal = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 1e-5)
    expected = trained_product(normal * np.asarray(scale), packed[0])
    got = np.asarray(served(x, packed, "cpu", norm=(scale, 1e-5))[0], np.float64)
    # An 8-bit rounding may fall the other way; an output then moves by one step.
    step = np.abs(normal * np.asarray(scale)).max(-1, keepdims=True) / 127
    moved = np.abs(got - expected) / (step * float(packed[0].scale))
    assert (moved <= 2.1).all()
    assert (moved > 0.1).mean() < 0.05


def trained_product(x, kernel):
    """float64 numpy: quantize, multiply, rescale."""
    from vaani_jax.quant.packed import unpack

    bound = np.abs(x).max(-1, keepdims=True)
    q = np.round(x * 127 / bound)
    return (
        q @ np.asarray(unpack(kernel), np.float64) * bound / 127 * float(kernel.scale)
    )


@pytest.mark.parametrize("isa", ISAS, indirect=True)
@pytest.mark.parametrize(("rows", "d", "v"), [(1, 64, 10), (3, 130, 33), (9, 17, 300)])
def test_a_head_in_8_bits(isa, rows, d, v):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(rows, d)).astype(np.float32)
    table = pack_rows(jnp.asarray(rng.normal(size=(v, d)), jnp.float32))
    got = jax.jit(lambda x, t: kernels.rows_matmul(x, t, using="cpu"))(x, table)
    codes = np.asarray(table.codes, np.float64)
    exact = x.astype(np.float64) @ (codes * np.asarray(table.scale)[:, None]).T
    # Activations have 16 bits: half a step of each, times the row's magnitude.
    row = np.abs(x).max(-1, keepdims=True) / 32767 * 0.51
    bound = row * np.abs(codes * np.asarray(table.scale)[:, None]).sum(-1)[None] + 1e-6
    assert (np.abs(np.asarray(got) - exact) <= bound).all()
    reference = kernels.rows_matmul(jnp.asarray(x), table, using="reference")
    np.testing.assert_allclose(reference, exact, rtol=1e-5, atol=1e-5)


def fma(x, y, total):
    """``x y + total`` of float32, rounded once.

    In float64 the product is exact. Its sum is rounded to odd, which keeps the second
    rounding, to float32, from seeing a tie where there is none.
    """
    x, y, total = (np.asarray(part, np.float64) for part in (x, y, total))
    product = x * y
    found = np.asarray(product + total)
    other = found - product
    error = (product - (found - other)) + (total - other)
    even = (found.view(np.int64) & 1) == 0
    away = np.nextafter(found, np.where(error > 0, np.inf, -np.inf))
    return np.where(even & (error != 0), away, found).astype(np.float32)


def in_lanes(x, y):
    """float32 sums of products over the last axis, in the order of kernels.cc."""
    x, y = np.broadcast_arrays(x, y)
    pad = [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % 16)]
    x, y = (np.pad(z, pad).reshape(*z.shape[:-1], -1, 16) for z in (x, y))
    lanes = np.zeros((*x.shape[:-2], 16), np.float32)
    for i in range(x.shape[-2]):
        lanes = fma(x[..., i, :], y[..., i, :], lanes)
    for half in (8, 4, 2, 1):
        lanes = lanes[..., :half] + lanes[..., half : 2 * half]
    assert lanes.dtype == np.float32
    return lanes[..., 0]


def exponential(x):
    """float32 exp of x <= 0: the polynomial of floats.inc, each operation rounded."""
    f = np.float32
    x = np.maximum(x, f(-87))
    n = np.rint(x * f(1.44269504))
    r = fma(n, f(2.12194440e-4), fma(n, f(-0.693359375), x))
    p = f(1.9875691500e-4)
    for c in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1):
        p = fma(p, r, f(c))
    p = fma(p, r, f(5.0000001201e-1))
    return (fma(p, r * r, r) + f(1)) * np.exp2(n, dtype=np.float32)


@pytest.mark.parametrize("isa", ISAS, indirect=True)
@pytest.mark.parametrize(("rows", "d"), [(1, 48), (7, 130), (40, 5)])
def test_a_norm_has_the_written_order(isa, rows, d):
    rng = np.random.default_rng(0)
    x, scale = rng.normal(size=(rows, d)), rng.uniform(0.5, 2, d)
    x, scale = x.astype(np.float32), scale.astype(np.float32)
    f = np.float32
    inverse = f(1) / np.sqrt(in_lanes(x, x) * (f(1) / f(d)) + f(1e-5))
    y, factors = jax.jit(cpu.rms_norm, static_argnums=2)(x, scale, 1e-5)
    np.testing.assert_array_equal(factors, inverse)
    np.testing.assert_array_equal(y, x * inverse[:, None] * scale)


@pytest.mark.parametrize("isa", ISAS, indirect=True)
@pytest.mark.parametrize(("rows", "d", "v"), [(1, 64, 10), (6, 130, 83), (70, 7, 16)])
def test_a_float_head_has_the_written_order(isa, rows, d, v):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(rows, d)).astype(np.float32)
    w = rng.normal(size=(v, d)).astype(np.float32)
    expected = in_lanes(x[:, None], w[None])
    np.testing.assert_array_equal(jax.jit(cpu.float_matmul)(x, w), expected)
    by_columns = jax.jit(functools.partial(cpu.float_matmul, columns=True))
    np.testing.assert_array_equal(by_columns(x, w.T.copy()), expected)


@pytest.mark.parametrize("isa", ISAS, indirect=True)
def test_a_log_of_a_sum_has_the_written_order(isa):
    x = (10 * np.random.default_rng(0).normal(size=(5, 83))).astype(np.float32)
    x[1, 3] = -np.inf
    top = x.max(-1, keepdims=True)
    wide = np.log(in_lanes(exponential(x - top), np.float32(1)).astype(np.float64))
    y = np.asarray(jax.jit(cpu.log_sum_exp)(x))
    np.testing.assert_array_equal(y, top[:, 0] + wide.astype(np.float32))
    exact = np.log(np.exp(x.astype(np.float64) - top).sum(-1)) + top[:, 0]
    np.testing.assert_allclose(y, exact, rtol=1e-6, atol=1e-6)
    x[2, 5], x[3, 6], x[4] = np.nan, np.inf, -np.inf
    y = np.asarray(cpu.log_sum_exp(jnp.asarray(x)))
    np.testing.assert_array_equal(np.isnan(y), [False, False, True, True, False])
    assert y[4] == -np.inf


@pytest.mark.parametrize("isa", ISAS, indirect=True)
@pytest.mark.parametrize("f", [5, 64])
def test_swiglu_is_one_polynomial(isa, f):
    rng = np.random.default_rng(0)
    gate, up = (5 * rng.normal(size=(2, 7, f))).astype(np.float32)
    gate[0, :4] = 0.0, -0.0, 90.0, -90.0
    one = np.float32(1)
    e = np.where(np.abs(gate) > 87, np.float32(0), exponential(-np.abs(gate)))
    sigmoid = np.where(gate < 0, e, one) / (one + e)
    y, kept = jax.jit(cpu.swiglu)(gate, up)
    np.testing.assert_array_equal(kept, sigmoid)
    np.testing.assert_array_equal(y, gate * sigmoid * up)
    wide = gate.astype(np.float64)
    exact = wide / (1 + np.exp(-wide)) * up
    np.testing.assert_allclose(y, exact, rtol=5e-7, atol=1e-30)
    gate[1, 2], gate[2, 3], gate[3, 0], gate[4, 1] = np.nan, np.inf, -np.inf, -3e38
    y, _ = cpu.swiglu(jnp.asarray(gate), jnp.asarray(up))
    assert np.isnan(y[1, 2])
    assert np.isinf(y[2, 3])
    assert np.isnan(y[3, 0])  # minus infinity times 0, as in XLA
    assert y[4, 1] == 0


OUT_OF_MEMORY = r"""
import re, resource
import jax, jax.numpy as jnp
from vaani_jax.kernels import cpu

slots, unlimited = 1 << 21, resource.RLIM_INFINITY
q = jnp.ones((1, 64, 2, 128))
codes, scales = jnp.zeros((1, slots, 1, 128), jnp.int8), jnp.zeros((1, slots, 1))
attend = jax.jit(lambda q: cpu.attention(
    q, codes, codes, jnp.int32(slots - 64), jnp.zeros(1, jnp.int32), (scales, scales)
))
product = jax.jit(lambda x: cpu.float_matmul(x, x))
x = jax.block_until_ready(jnp.ones((512, 512)))
attend.lower(q).compile(), product.lower(x).compile()
status = open("/proc/self/status").read()
taken = 1024 * int(re.search(r"VmSize:\s+(\d+)", status).group(1))
resource.setrlimit(resource.RLIMIT_AS, (taken + (400 << 20), unlimited))
try:
    jax.block_until_ready(attend(q))
except RuntimeError as error:
    print(error)
resource.setrlimit(resource.RLIMIT_AS, (unlimited, unlimited))
for _ in range(50):
    y = jax.block_until_ready(product(x))
print(float(y[0, 0]))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits of Linux")
def test_without_memory_a_kernel_fails_and_the_next_call_is_well():
    done = subprocess.run(
        [sys.executable, "-c", OUT_OF_MEMORY],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    said, value = done.stdout.splitlines()
    assert "RESOURCE_EXHAUSTED" in said or "bad_alloc" in said
    assert value == "512.0"


def test_an_empty_cache_is_refused():
    empty = jnp.zeros((1, 0, 2, 8))
    with pytest.raises(Exception, match="do not fit"):
        cpu.attention(
            jnp.ones((1, 1, 2, 8)), empty, empty, jnp.int32(0), jnp.zeros(1, jnp.int32)
        )


def test_a_library_of_another_version_says_to_build(monkeypatch):
    monkeypatch.setattr(cpu, "VERSION", -1)
    cpu._library.cache_clear()
    try:
        assert re.search("older version: .*pip install", cpu.missing())
    finally:
        monkeypatch.undo()
        cpu._library.cache_clear()
        assert not cpu.missing()


def cache_of(dtype, b, s, k, h):
    """Keys, values and what belongs to codes, and both in float32 as they count."""
    rng = np.random.default_rng(0)
    whole = [jnp.asarray(rng.normal(size=(b, s, k, h)), jnp.float32) for _ in "kv"]
    if dtype not in ("int8", "int4"):
        stored = [x.astype(dtype) for x in whole]
        return *stored, (), [np.asarray(x, np.float32) for x in stored]
    largest = 127 if dtype == "int8" else 7
    turn = functools.partial(quantize_heads, largest=largest)
    codes, scales = zip(*map(turn, whole), strict=True)
    wide = [np.asarray(x, np.float32) for x in codes]
    if dtype == "int8":
        return *codes, scales, wide
    centers = jnp.asarray(rng.normal(size=(b, blocks_of(s), k, h)), jnp.float32)
    return *map(pack_halves, codes), (*scales, centers), wide


DTYPES = ["float32", "bfloat16", "int8", "int4"]


def attention_by_hand(q, wide, scales, start, slot, row, query, head):
    """Weights of the slots that one query sees, their scores, and its result."""
    (b, s, k, h), n = wide[0].shape, q.shape[2]
    f = np.float32
    ks, vs = (np.asarray(x) for x in scales[:2] or np.ones((2, b, s, k), f))
    first = min(int(start[row]), slot + query)
    seen, shared = slice(first, slot + query + 1), head // (n // k)
    key, value = (x[row, seen, shared] for x in wide)
    root, one = f(1) / np.sqrt(f(h)), q[row, query, head]
    score = in_lanes(one, key) * root * ks[row, seen, shared]
    if scales[2:]:
        centers = np.asarray(scales[2])[row, :, shared]
        block = np.maximum(np.arange(first, seen.stop) - int(start[row]), 0) // BLOCK
        score = score + (in_lanes(one, centers) * root)[block]
    p = exponential(score - score.max())
    p = p * (f(1) / in_lanes(p, f(1))) * vs[row, seen, shared]
    y = np.zeros(h, f)
    for weight, v in zip(p, value, strict=True):
        y = fma(weight, v, y)
    return seen, p, score, y


@pytest.mark.parametrize("isa", ISAS, indirect=True)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("h", [20, 64])
def test_attention_has_the_written_order(isa, dtype, h):
    b, t, s, n, k = 3, 4, 150, 6, 2
    keys, values, scales, wide = cache_of(dtype, b, s, k, h)
    q = np.random.default_rng(1).normal(size=(b, t, n, h)).astype(np.float32)
    start, slot = jnp.asarray([0, 3, 111], jnp.int32), 109
    attend = jax.jit(functools.partial(cpu.attention, weights=True))
    y, weights = attend(q, keys, values, jnp.int32(slot), start, scales)
    for row, query, head in np.ndindex(b, t, n):
        seen, p, score, expected = attention_by_hand(
            q, wide, scales, start, slot, row, query, head
        )
        np.testing.assert_array_equal(y[row, query, head], expected)
        np.testing.assert_array_equal(weights[row, head, query, seen], p)
        assert not np.delete(weights[row, head, query], seen).any()
        if dtype == "float32":
            value = wide[1][row, seen, head // (n // k)]
            exact = np.exp(score.astype(np.float64) - score.max())
            np.testing.assert_allclose(
                y[row, query, head], exact @ value / exact.sum(), rtol=2e-5, atol=2e-6
            )
    # A query alone, and queries without a cache around them, give the same.
    (alone,) = jax.jit(cpu.attention)(
        q[:, 2:3], keys, values, jnp.int32(slot + 2), start, scales
    )
    np.testing.assert_array_equal(alone[:, 0], y[:, 2])


@pytest.mark.parametrize("isa", ISAS, indirect=True)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("b", "n", "k", "h"),
    [(1, 4, 4, 16), (1, 14, 2, 40), (1, 3, 1, 96), (2, 6, 3, 128), (9, 5, 1, 32)],
    ids=["mha", "gqa", "mqa", "wide", "rows"],
)
def test_one_query_of_a_long_cache_is_read_in_any_cut(isa, dtype, b, n, k, h):
    """By heads, by slots and by numbers of a head, on threads: the same order."""
    s = 1300
    keys, values, scales, wide = cache_of(dtype, b, s, k, h)
    q = np.random.default_rng(1).normal(size=(b, 1, n, h)).astype(np.float32)
    start = jnp.asarray([37, 0, *range(0, 1400, 200)][:b], jnp.int32)
    attend = jax.jit(cpu.attention)
    for slot in (1299, 700, 5):
        at = jnp.int32(slot)
        (y,) = attend(q, keys, values, at, start, scales)
        for row, head in {(0, 0), (b - 1, n - 1), (b // 2, n // 2)}:
            *_, expected = attention_by_hand(q, wide, scales, start, slot, row, 0, head)
            np.testing.assert_array_equal(y[row, 0, head], expected)
        # The way of queries that come together.
        weighed = functools.partial(cpu.attention, weights=True)
        whole, _ = jax.jit(weighed)(q, keys, values, at, start, scales)
        np.testing.assert_array_equal(y, whole)


@pytest.mark.parametrize("isa", ISAS, indirect=True)
@pytest.mark.parametrize("dtype", DTYPES)
def test_many_queries_of_a_long_cache_see_what_each_sees_alone(isa, dtype):
    b, t, s, n, k, h = 2, 301, 700, 2, 1, 32
    keys, values, scales, wide = cache_of(dtype, b, s, k, h)
    q = np.random.default_rng(1).normal(size=(b, t, n, h)).astype(np.float32)
    start, slot = jnp.asarray([270, 3], jnp.int32), 260
    attend = jax.jit(cpu.attention)
    (y,) = attend(q, keys, values, jnp.int32(slot), start, scales)
    for query in (0, 9, 10, 11, 127, 128, 129, 250, 300):
        at, one = jnp.int32(slot + query), q[:, query : query + 1]
        (alone,) = attend(one, keys, values, at, start, scales)
        np.testing.assert_array_equal(y[:, query], alone[:, 0])
    *_, expected = attention_by_hand(q, wide, scales, start, slot, 1, 299, 1)
    np.testing.assert_array_equal(y[1, 299, 1], expected)


@pytest.mark.parametrize("isa", ISAS, indirect=True)
@pytest.mark.parametrize(
    ("groups", "t", "h"), [(1, 9, 8), (2, 9, 8), (1, 70, 40), (3, 150, 16)]
)
def test_gradients_of_native_float_parts(isa, groups, t, h):
    """Against those of the formulas that XLA computes."""
    rng = np.random.default_rng(0)
    b, k, d, v = 2, 2, 24, 11
    q = jnp.asarray(rng.normal(size=(b, t, k * groups, h)), jnp.float32)
    keys, values = jnp.asarray(rng.normal(size=(2, b, t, k, h)), jnp.float32)
    x, w = (jnp.asarray(rng.normal(size=(n, d)), jnp.float32) for n in (t, v))
    scale = jnp.asarray(rng.uniform(0.5, 2, d), jnp.float32)
    ids = jnp.asarray(rng.integers(0, v, t))

    def everything(q, keys, values, x, w, scale):
        y = causal_attention(q, keys, values)
        logits = floats.float_matmul(floats.rms_norm(x, scale, 1e-5), w)
        other = floats.float_matmul(x, w.T, True)
        return (y * jnp.cos(y)).sum() + floats.log_likelihood(logits + other, ids).sum()

    given = (q, keys, values, x, w, scale)
    both = jax.value_and_grad(everything, argnums=range(6))
    assert floats.native()
    native = jax.jit(both)(*given)
    with floats.compiled_floats():
        assert not floats.native()
        compiled = jax.jit(lambda *given: both(*given))(*given)
    for one, other in zip(
        jax.tree.leaves(native), jax.tree.leaves(compiled), strict=True
    ):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


def test_bfloat16_in_bfloat16_out():
    x, _, packed = problem(3, 64, (16,), TernarySpec())
    for using in ("cpu", "reference"):
        y = kernels.ternary_matmul(x.astype(jnp.bfloat16), packed[0], using=using)
        assert y.dtype == jnp.bfloat16
        assert y.shape == (3, 16)


def test_leading_axes_and_no_rows():
    x, _, packed = problem(6, 40, (24,), TernarySpec())
    flat = served(x, packed, "cpu")[0]
    deep = kernels.ternary_matmul(x.reshape(2, 3, 40), packed[0], using="cpu")
    np.testing.assert_array_equal(deep.reshape(6, 24), flat)
    assert kernels.ternary_matmul(x[:0], packed[0], using="cpu").shape == (0, 24)


def test_a_kernel_of_another_width_is_refused():
    x, _, packed = problem(2, 40, (24,), TernarySpec())
    with pytest.raises(VaaniError, match="40 inputs"):
        kernels.ternary_matmul(x[:, :32], packed[0])


def test_large_products_on_threads():
    spec = TernarySpec()
    for rows in (1, 40):
        x, ws, packed = problem(rows, 1024, (1100, 700), spec)
        expected = trained(x, ws, spec)
        for _ in range(20):
            assert_equal_bits(served(x, packed, "cpu"), expected)


# -- The choice of a backend --------------------------------------------------------


@pytest.fixture
def fresh(monkeypatch):
    monkeypatch.delenv("VAANI_KERNELS", raising=False)
    kernels.backend.cache_clear()
    yield monkeypatch
    kernels.backend.cache_clear()


def test_the_native_kernels_are_chosen_on_a_cpu(fresh, caplog):
    with caplog.at_level("INFO", "vaani_jax"):
        assert kernels.backend() == "cpu"
        assert kernels.backend() == "cpu"
    assert caplog.text.count("kernels: cpu") == 1


def test_a_backend_can_be_forced(fresh):
    fresh.setenv("VAANI_KERNELS", "reference")
    assert kernels.backend() == "reference"


@pytest.mark.parametrize("name", ["tpu", "gpu", "quantum"])
def test_a_forced_backend_that_is_missing_is_an_error(fresh, name):
    fresh.setenv("VAANI_KERNELS", name)
    with pytest.raises(VaaniError, match="VAANI_KERNELS"):
        kernels.backend()


def test_without_a_build_one_notice_and_the_reference(fresh, caplog, tmp_path):
    fresh.setattr(cpu, "_library", lambda: None)
    assert kernels.backend() == "reference"
    assert "install a C++ compiler" in caplog.text
    kernels.backend.cache_clear()
    fresh.setenv("VAANI_KERNELS", "cpu")
    with pytest.raises(VaaniError, match="not built"):
        kernels.backend()

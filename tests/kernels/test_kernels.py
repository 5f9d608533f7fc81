"""Every backend and every instruction set against training's own product."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vaani_jax import kernels
from vaani_jax.errors import VaaniError
from vaani_jax.kernels import cpu
from vaani_jax.model.attention import cached_attention, quantize_heads
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
ISAS = ["amx", "avx512", "avx2", "neon", "portable"]


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


@pytest.mark.parametrize("isa", ISAS, indirect=True)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_attention_to_a_cache(isa, dtype):
    b, s, n, k, h = 3, 21, 6, 2, 20
    rng = np.random.default_rng(0)
    q = jnp.asarray(rng.normal(size=(b, 1, n, h)), jnp.float32)
    keys, values = (
        jnp.asarray(rng.normal(size=(b, s, k, h)), jnp.float32) for _ in range(2)
    )
    scales = None
    if dtype == "int8":
        (keys, ks), (values, vs) = quantize_heads(keys), quantize_heads(values)
        scales = (ks, vs)
    else:
        keys, values = keys.astype(dtype), values.astype(dtype)
    start, slot = jnp.asarray([0, 3, 11], jnp.int32), 12
    got = jax.jit(cpu.attention)(q[:, 0], keys, values, jnp.int32(slot), start, scales)
    wide = [np.asarray(x, np.float64) for x in (keys, values)]
    if scales is not None:
        wide = [
            x * np.asarray(a, np.float64)[..., None]
            for x, a in zip(wide, scales, strict=True)
        ]
    for row in range(b):
        for head in range(n):
            seen = slice(int(start[row]), slot + 1)
            key, value = (x[row, seen, head // (n // k)] for x in wide)
            score = key @ np.asarray(q[row, 0, head], np.float64) / np.sqrt(h)
            weight = np.exp(score - score.max())
            expected = weight @ value / weight.sum()
            np.testing.assert_allclose(got[row, head], expected, rtol=2e-5, atol=2e-6)


def test_attention_takes_the_native_path_where_it_can(monkeypatch):
    q = jnp.ones((1, 1, 2, 8))
    cache = jnp.ones((1, 4, 2, 8))
    called = []
    native = cpu.attention

    def spy(*arguments):
        called.append(1)
        return native(*arguments)

    monkeypatch.setattr(cpu, "attention", spy)
    native_y = cached_attention(q, cache, cache, jnp.asarray([2]))
    assert called
    monkeypatch.setattr(kernels, "backend", lambda: "reference")
    np.testing.assert_allclose(
        cached_attention(q, cache, cache, jnp.asarray([2])), native_y, rtol=1e-6
    )
    assert len(called) == 1


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

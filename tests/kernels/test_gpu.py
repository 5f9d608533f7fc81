"""The kernels for GPUs, in Pallas's interpreter; and that they lower for one."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.mesh import AbstractDevice  # no public name yet
from jax.sharding import AbstractMesh

from vaani_jax import kernels
from vaani_jax.inference.generate import generate
from vaani_jax.inference.model import Model, pack_model
from vaani_jax.inference.sampling import SamplerConfig
from vaani_jax.kernels import choice, gpu, gpu_attention, tiles
from vaani_jax.kernels.floats import rms_norm
from vaani_jax.model import attention, codes, transformer
from vaani_jax.model.config import Architecture
from vaani_jax.model.rotary import rotary_angles, rotary_embedding
from vaani_jax.model.transformer import Vaani, init_variables
from vaani_jax.quant.packed import PackedTernary, pack
from vaani_jax.text.tokenizers import CharTokenizer

MATRIX_TILES = [
    tiles.MatrixTiles(32, 16, 32, 1, 4, 1),
    tiles.MatrixTiles(64, 32, 32, 3, 4, 2),
    tiles.MatrixTiles(128, 128, 64, 2, 8, 3),
]
VECTOR_TILES = [tiles.VectorTiles(4, 32, 1), tiles.VectorTiles(32, 256, 4)]


def problem(rows, k, widths, dtype=jnp.float32):
    rng = np.random.default_rng([rows, k, *widths])
    x = jnp.asarray(rng.normal(size=(rows, k)), dtype)
    packed = [
        pack(jnp.asarray(rng.integers(-1, 2, (k, n))), jnp.float32(0.3), "rows")
        for n in widths
    ]
    per_channel = jnp.asarray(rng.uniform(0.5, 2, widths[0]), jnp.float32)
    packed.append(dataclasses.replace(packed[0], scale=per_channel))
    return x, packed


def product(x, packed, using, **options):
    return jax.jit(
        lambda x, packed: kernels.ternary_matmul(x, packed, using=using, **options)
    )(x, packed)


def assert_equal_bits(got, expected):
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("tile", VECTOR_TILES)
@pytest.mark.parametrize(("rows", "k"), [(1, 100), (3, 300), (8, 17)])
def test_few_rows_in_any_tiles(rows, k, tile, dtype, monkeypatch):
    monkeypatch.setattr(gpu, "vector_tiles", lambda *shape: tile)
    x, packed = problem(rows, k, (72, 5), dtype)
    assert_equal_bits(product(x, packed, "gpu"), product(x, packed, "reference"))


@pytest.mark.parametrize("tile", MATRIX_TILES)
@pytest.mark.parametrize(("rows", "k"), [(9, 100), (33, 700), (130, 17)])
def test_many_rows_in_any_tiles(rows, k, tile, monkeypatch):
    monkeypatch.setattr(gpu, "matrix_tiles", lambda *shape: tile)
    for dtype in (jnp.float32, jnp.bfloat16):
        x, packed = problem(rows, k, (150,), dtype)
        assert_equal_bits(product(x, packed, "gpu"), product(x, packed, "reference"))


@pytest.mark.parametrize("rows", [2, 20])
def test_a_norm_joins_and_knows_no_other_row(rows):
    x, packed = problem(rows, 300, (64,))
    scale = jnp.asarray(np.random.default_rng(0).uniform(0.5, 2, 300), jnp.float32)
    got = product(x, packed, "gpu", norm=(scale, 1e-5))
    apart = product(rms_norm(x, scale, 1e-5), packed, "reference")
    # An 8-bit rounding may fall the other way; an output then moves by one step.
    step = np.abs(np.asarray(rms_norm(x, scale, 1e-5))).max(-1, keepdims=True) / 127
    moved = np.abs(np.asarray(got[0] - apart[0])) / (step * 0.3)
    assert (moved <= 1.1).all()
    assert (moved > 0.1).mean() < 0.05
    for i in range(rows):
        alone = product(x[i : i + 1], packed, "gpu", norm=(scale, 1e-5))
        assert_equal_bits([y[i : i + 1] for y in got], alone)


@pytest.mark.parametrize("using", ["gpu", "tpu"])
@pytest.mark.parametrize("limit", [None, jnp.float32(2)])
@pytest.mark.parametrize("rows", [4, 12])
def test_rows_that_are_not_finite_give_nan_and_touch_no_other(rows, limit, using):
    x, packed = problem(rows, 100, (40,))
    broken = x.at[1, 5].set(jnp.nan)
    if limit is None:  # an infinity saturates where the range is known
        broken = broken.at[3, 0].set(jnp.inf)
    clean = product(x, packed, using, activation_range=limit)[0]
    got = np.asarray(product(broken, packed, using, activation_range=limit)[0])
    lost = [1] if limit is not None else [1, 3]
    assert np.isnan(got[lost]).all()
    rest = [i for i in range(rows) if i not in lost]
    np.testing.assert_array_equal(got[rest], np.asarray(clean)[rest])


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize(
    ("dtype", "batch", "heads", "kv_heads", "size", "slots", "position"),
    [
        (jnp.float32, 2, 4, 2, 16, 40, 23),
        (jnp.float32, 2, 2, 1, 8, 32, 0),
        (jnp.float32, 1, 4, 4, 64, 70, 69),
        (jnp.bfloat16, 3, 8, 2, 48, 64, 37),
    ],
)
def test_a_token_attends_as_step_by_step(
    dtype, batch, heads, kv_heads, size, slots, position, parts, monkeypatch
):
    tile = tiles.AttentionTiles(slots=16, parts=parts)
    monkeypatch.setattr(gpu_attention, "attention_tiles", lambda *shape: tile)
    monkeypatch.setattr(attention.floats, "native", lambda: False)
    rng = np.random.default_rng(position)

    def draw(*shape):
        return jnp.asarray(rng.normal(size=shape), dtype)

    q, k, v = (draw(batch, 1, n, size) for n in (heads, kv_heads, kv_heads))
    cache = tuple(draw(batch, slots, kv_heads, size) for _ in range(2))
    start = jnp.asarray(rng.integers(0, position + 1, batch), jnp.int32)
    rotary_of = Architecture(head_dim=size, rope_theta=1e4).rotary
    cos, sin = rotary_angles(slots, rotary_of)
    since = position - start
    rotary = jnp.asarray(cos)[since][:, None], jnp.asarray(sin)[since][:, None]
    at = jnp.asarray([position], jnp.int32)
    y, new = attention._decoded(q, k, v, rotary, cache, at, start)
    turned = rotary_embedding(k, *rotary)
    expected = codes.write(cache, turned, v, at[0], None, rotary_of)
    assert_equal_bits(new, expected)
    turned = rotary_embedding(q, *rotary)
    reference = attention.cached_attention(turned, *expected, at, start)
    error = np.abs(np.asarray(y - reference, np.float32)).max()
    assert error < (1e-6 if dtype == jnp.float32 else 0.02)


def test_a_cache_that_is_full_is_written_within():
    q = jnp.ones((1, 1, 2, 8))
    cache = (jnp.zeros((1, 4, 2, 8)), jnp.zeros((1, 4, 2, 8)))
    rotary = (jnp.ones((1, 4)), jnp.zeros((1, 4)))
    _, (keys, _) = attention._decoded(q, q, q, rotary, cache, jnp.asarray([9]), None)
    np.testing.assert_array_equal(keys[0, :, 0, 0], [0, 0, 0, 1])


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {
            "qk_norm": True,
            "attention_bias": True,
            "head_dim": 12,
            "rope_scaling": "yarn",
            "rope_factor": 4.0,
            "rope_original_len": 8,
        },
    ],
    ids=["plain", "others"],
)
def test_a_packed_model_writes_the_same(changes, monkeypatch):
    tokenizer = CharTokenizer.from_text("to be, or not to be: that is the question")
    shape = {"dim": 32, "n_layers": 1, "n_heads": 4, "n_kv_heads": 2}
    module = Vaani().changed(vocab_size=tokenizer.vocab_size, **shape, **changes)
    variables = init_variables(module, jax.random.key(1))
    for name in ("q_proj", "k_proj", "v_proj") if changes else ():
        layer = variables["params"]["layers_0"]["attn"][name]
        layer["bias"] += jax.random.normal(jax.random.key(2), layer["bias"].shape)
    packed = pack_model(Model(module, variables, tokenizer))
    prompts = [tokenizer.encode("to be"), tokenizer.encode("that is the")]
    options = {
        "max_new_tokens": 8,
        "segment": 8,
        "sampler": SamplerConfig(temperature=0),
    }

    def write(name):
        for where in (kernels, choice, attention, attention.floats, transformer):
            if hasattr(where, "backend"):
                monkeypatch.setattr(where, "backend", lambda: name)
        jax.clear_caches()
        return generate(packed, prompts, **options)

    try:
        np.testing.assert_array_equal(write("gpu"), write("reference"))
    finally:
        jax.clear_caches()


def shape(*dimensions, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(dimensions, dtype)


def test_the_kernels_lower_for_a_gpu(monkeypatch):
    for module in (gpu, gpu_attention):
        monkeypatch.setattr(module, "interpreted", lambda: False)
    h100 = AbstractDevice(
        device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu"
    )
    packed = [
        PackedTernary(shape(128, 32, dtype=jnp.uint8), scale, (100, n), "rows")
        for n, scale in ((72, shape()), (40, shape(40)))
    ]

    def products(x, packed, limit, scale):
        plain = gpu.ternary_matmul(x, packed, None)
        return plain, gpu.ternary_matmul(x, packed, limit, (scale, 1e-5))

    def lowered(function, *arguments):
        traced = jax.jit(function).trace(*arguments)
        return traced.lower(lowering_platforms=("cuda",)).as_text()

    with jax.sharding.use_abstract_mesh(
        AbstractMesh((1,), ("x",), abstract_device=h100)
    ):
        for rows, calls in ((1, 4), (40, 6)):
            text = lowered(products, shape(rows, 100), packed, shape(), shape(100))
            assert text.count("xla.gpu.triton") == calls
        kv = shape(2, 700, 2, 16, dtype=jnp.bfloat16)
        text = lowered(
            gpu_attention.decode_attention,
            shape(2, 4, 16, dtype=jnp.bfloat16),
            shape(2, 2, 16, dtype=jnp.bfloat16),
            shape(2, 2, 16, dtype=jnp.bfloat16),
            (shape(2, 8), shape(2, 8)),
            (kv, kv),
            shape(dtype=jnp.int32),
            shape(2, dtype=jnp.int32),
        )
        assert text.count("xla.gpu.triton") == 1

"""The blocks against float64 numpy."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vaani_jax.errors import VaaniError
from vaani_jax.model.attention import MultiHeadAttention
from vaani_jax.model.block import TransformerBlock, dropout
from vaani_jax.model.config import Architecture
from vaani_jax.model.feed_forward import FeedForward
from vaani_jax.model.linear import BitLinear, project
from vaani_jax.model.norm import LayerNorm, RMSNorm
from vaani_jax.model.rotary import rotary_angles, rotary_embedding
from vaani_jax.model.transformer import Vaani

KEY = jax.random.key(0)
SHAPE = {"dim": 16, "n_layers": 2, "n_heads": 4, "ffn_dim": 24, "max_seq_len": 8}
CONFIG = Vaani().changed(vocab_size=8, init_std=0.3, **SHAPE)
TWIN = CONFIG.changed(quantize=False)
quantized_or_not = pytest.mark.parametrize("model", [CONFIG, TWIN], ids=["bit", "fp"])


def how(model):
    return model.quantization, model.execution


def bit_linear(features, model, init_std, use_bias=False):
    return BitLinear(
        features,
        model.quantization,
        model.execution,
        init_std=init_std,
        use_bias=use_bias,
    )


def parts(model):
    return model.architecture, *how(model)


def gaussian(*shape, seed=0):
    values = np.random.default_rng(seed).normal(size=shape)
    return jnp.asarray(values, jnp.float32)


def shapes(tree):
    paths = jax.tree_util.tree_leaves_with_path(tree)
    return {
        jax.tree_util.keystr(p, simple=True, separator="/"): x.shape for p, x in paths
    }


def apply(module, variables, *args):
    return jax.jit(lambda variables: module.apply(variables, *args))(variables)


def rotary_of(model, positions):
    table = rotary_angles(64, model.architecture.rotary)
    return tuple(jnp.asarray(t)[positions] for t in table)


def initialized(module, *args):
    """Variables as `init` shapes them: Gaussian kernels, and norms that matter."""
    rng = np.random.default_rng(7)

    def fill(path, leaf):
        name = path[-1].key
        if name in ("kernel", "scale", "bias"):
            values = rng.normal(name == "scale", 0.3, leaf.shape)
            return jnp.asarray(values, leaf.dtype)
        return jnp.asarray({"threshold": 0.5, "range": 0.0, "momentum": 0.5}[name])

    abstract = jax.eval_shape(lambda: module.init(KEY, *args))
    return jax.tree_util.tree_map_with_path(fill, abstract)


# A float64 numpy reference of everything; `quantize` fakes the quantizers.


def linear(model, params, x):
    w = np.asarray(params["kernel"], np.float64)
    if model.quantization.quantize:
        gamma = np.abs(w).mean()
        w = gamma * np.clip(np.round(w / gamma), -1, 1)
        step = np.maximum(np.abs(x).max(axis=-1, keepdims=True), 1e-5) / 127
        x = step * np.clip(np.round(x / step), -128, 127)
    return x @ w + np.asarray(params.get("bias", 0.0), np.float64)


def layer_norm(params, x, epsilon):
    centered = x - x.mean(axis=-1, keepdims=True)
    scale = np.asarray(params["scale"], np.float64)
    return (
        centered / np.sqrt((centered**2).mean(axis=-1, keepdims=True) + epsilon) * scale
    )


def rms_norm(params, x, epsilon=1e-5):
    scale = np.asarray(params["scale"], np.float64)
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + epsilon) * scale


def rotate(x, positions, theta):
    """Pairs (i, i + H/2) as complex numbers, turned by position * theta^(-2i/H)."""
    half = x.shape[-1] // 2
    angles = np.outer(positions, theta ** (-np.arange(half) / half))
    turned = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angles)[:, None]
    return np.concatenate([turned.real, turned.imag], axis=-1)


def attention(model, params, x):
    """One query at a time, one head at a time."""
    batch, length, _ = x.shape
    n, k = model.architecture.n_heads, model.architecture.kv_heads
    h = model.architecture.head_dim or model.architecture.dim // n
    positions = np.arange(length)
    query = linear(model, params["q_proj"], x).reshape(batch, length, n, h)
    key = linear(model, params["k_proj"], x).reshape(batch, length, k, h)
    value = linear(model, params["v_proj"], x).reshape(batch, length, k, h)
    if "q_norm" in params:
        query = rms_norm(params["q_norm"], query, model.architecture.norm_eps)
        key = rms_norm(params["k_norm"], key, model.architecture.norm_eps)
    query = rotate(query, positions, model.architecture.rope_theta)
    key = rotate(key, positions, model.architecture.rope_theta)
    out = np.zeros((batch, length, n, h))
    for b, t, head in np.ndindex(batch, length, n):
        group = head // (n // k)
        scores = key[b, : t + 1, group] @ query[b, t, head] / np.sqrt(h)
        weights = np.exp(scores - scores.max())
        out[b, t, head] = weights / weights.sum() @ value[b, : t + 1, group]
    out = out.reshape(batch, length, n * h)
    if "sub_norm" in params:
        out = rms_norm(params["sub_norm"], out)
    return linear(model, params["o_proj"], out)


def feed_forward(model, params, x):
    gate = linear(model, params["gate_proj"], x)
    act = gate / (1 + np.exp(-gate))
    if model.architecture.activation == "relu2":
        act = np.maximum(gate, 0) ** 2
    hidden = act * linear(model, params["up_proj"], x)
    if "sub_norm" in params:
        hidden = rms_norm(params["sub_norm"], hidden)
    return linear(model, params["down_proj"], hidden)


# Norm, rotary embedding, dropout.


@pytest.mark.parametrize("epsilon", [1e-5, 0.1])
@pytest.mark.parametrize("kind", [RMSNorm, LayerNorm])
def test_norms(kind, epsilon):
    x, module = 3 * gaussian(2, 5, 16) + 1, kind(epsilon)
    variables = initialized(module, x)
    assert shapes(variables) == {"params/scale": (16,)}
    reference = {RMSNorm: rms_norm, LayerNorm: layer_norm}[kind]
    expected = reference(variables["params"], np.asarray(x, np.float64), epsilon)
    y = apply(module, variables, x)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-7)
    low = module.apply(variables, x.astype(jnp.bfloat16))
    assert low.dtype == jnp.bfloat16
    np.testing.assert_allclose(low.astype(jnp.float32), expected, rtol=0.02, atol=0.02)


def plain_rotary(size, theta):
    return Architecture(head_dim=size, rope_theta=theta).rotary


@pytest.mark.parametrize("theta", [500_000.0, 10_000.0])
@pytest.mark.parametrize("first", [0, 5, 1000])
def test_rotary_embedding_turns_complex_pairs(theta, first):
    x = gaussian(2, 7, 3, 8)
    table = rotary_angles(first + 9, plain_rotary(8, theta))
    rows = [part[first : first + 7] for part in table]
    found = rotary_embedding(x, *rows)
    expected = rotate(np.asarray(x, np.float64), first + np.arange(7), theta)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=5e-4)
    assert found.dtype == jnp.float32
    assert rotary_embedding(x.astype(jnp.bfloat16), *rows).dtype == jnp.bfloat16


def test_rotary_embedding_pairs_the_halves():
    x = jnp.asarray([1.0, 0.0, 0.0, 0.0]).reshape(1, 1, 1, 4)
    cos, sin = rotary_angles(2, plain_rotary(4, 500_000.0))
    found = rotary_embedding(x, cos[1:], sin[1:])
    expected = [np.cos(1), 0, np.sin(1), 0]  # feature 0 turns with feature 2
    np.testing.assert_allclose(found.reshape(4), expected, atol=1e-6)
    np.testing.assert_array_equal(rotary_embedding(x, cos[:1], sin[:1]), x)


def test_products_of_rotated_vectors_see_only_distances():
    query, key = gaussian(1, 1, 1, 16), gaussian(1, 1, 1, 16, seed=1)
    cos, sin = rotary_angles(600, plain_rotary(16, 100.0))

    def score(i, j):
        turned = rotary_embedding(query, cos[i : i + 1], sin[i : i + 1])
        other = rotary_embedding(key, cos[j : j + 1], sin[j : j + 1])
        return float(jnp.vdot(turned, other))

    for i, j in [(3, 0), (9, 9), (2, 14)]:
        for offset in (1, 77, 500):
            assert score(i + offset, j + offset) == pytest.approx(score(i, j), abs=1e-3)
    assert abs(score(3, 0) - score(4, 0)) > 0.1


def test_dropout_scales_what_it_keeps():
    x = gaussian(200, 200) + 3.0
    y = np.asarray(dropout(x, 0.25, KEY))
    kept = y != 0
    assert kept.mean() == pytest.approx(0.75, abs=0.01)
    np.testing.assert_allclose(y[kept], np.asarray(x)[kept] / 0.75, rtol=1e-6)
    assert y.mean() == pytest.approx(float(x.mean()), rel=0.01)
    other = np.asarray(dropout(x, 0.25, jax.random.key(1))) != 0
    assert (kept != other).mean() == pytest.approx(2 * 0.25 * 0.75, abs=0.02)
    gradient = jax.grad(lambda x: dropout(x, 0.25, KEY).sum())(x)
    np.testing.assert_allclose(gradient, kept / 0.75, rtol=1e-6)


def test_dropout_is_the_identity_without_a_key_or_a_rate():
    x = gaussian(4, 4)
    np.testing.assert_array_equal(dropout(x, 0.5, None), x)
    np.testing.assert_array_equal(dropout(x, 0.0, KEY), x)


# Linear layers.


@quantized_or_not
def test_bit_linear(model):
    x, layer = gaussian(2, 3, 16), bit_linear(10, model, 0.2)
    variables = initialized(layer, x)
    assert shapes(variables["params"]) == {"kernel": (16, 10)}
    assert variables["params"]["kernel"].dtype == jnp.float32
    quant = {"weight_quantizer/threshold": ()} if model.quantization.quantize else {}
    assert shapes(variables.get("quant", {})) == quant
    y = apply(layer, variables, x)
    expected = linear(model, variables["params"], np.asarray(x, np.float64))
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)
    assert apply(layer, variables, x.astype(jnp.bfloat16)).dtype == jnp.bfloat16

    def loss(params):
        y: Any = layer.apply({**variables, "params": params}, x)
        return y.sum()

    assert jnp.all(jax.jit(jax.grad(loss))(variables["params"])["kernel"] != 0)


@quantized_or_not
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_bias_is_added_to_the_product(model, dtype):
    x, weights = gaussian(3, 16).astype(dtype), gaussian(3, 10, seed=1)
    plain, biased = bit_linear(10, model, 0.02), bit_linear(10, model, 0.02, True)
    shape = initialized(biased, x)
    assert jax.eval_shape(biased.init, KEY, x)["params"]["bias"].shape == (10,)
    assert not biased.init(KEY, x)["params"]["bias"].any()
    kernel, bias = shape["params"]["kernel"], shape["params"]["bias"]

    def loss(bias):
        params = {"kernel": kernel, "bias": bias}
        y: Any = biased.apply({**shape, "params": params}, x)
        return jnp.vdot(y.astype(jnp.float32), weights), y

    gradient, y = jax.jit(jax.grad(loss, has_aux=True))(bias)
    product: Any = plain.apply({**shape, "params": {"kernel": kernel}}, x)
    expected = (product.astype(jnp.float32) + bias[None]).astype(dtype)
    y, expected = (np.asarray(part, np.float32) for part in (y, expected))
    if model.quantization.quantize:
        np.testing.assert_array_equal(y, expected)
    else:  # compiled code sums a product of floats in another order
        tolerance = 1e-5 if dtype == jnp.float32 else 0.02
        np.testing.assert_allclose(y, expected, rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(
        gradient, weights.astype(dtype).astype(jnp.float32).sum(axis=0), rtol=1e-5
    )


def test_bit_linear_tracks_its_input_range_in_training_only():
    model = CONFIG.changed(activation_tracking="ema", activation_momentum=0.5)
    layer, x = BitLinear(10, *how(model)), gaussian(3, 16)
    variables = initialized(layer, x)
    _, updated = layer.apply(variables, x, train=True, mutable=["quant"])
    _, updated = layer.apply(
        {**variables, **updated}, 3 * x, train=True, mutable=["quant"]
    )
    found = updated["quant"]["activation_quantizer"]["range"]
    np.testing.assert_allclose(found, 2 * jnp.abs(x).max(), rtol=1e-6)
    variables = {**variables, **updated}
    y, after = layer.apply(variables, 10 * x, mutable=["quant"])
    assert after["quant"]["activation_quantizer"]["range"] == found
    clipped = layer.apply(variables, 20 * x)  # nearly all is beyond the range by now
    assert float(jnp.abs(clipped - y).max()) < float(jnp.abs(y).max())


@quantized_or_not
def test_projections_of_one_input_equal_each_alone(model):
    class Three(nn.Module):
        """Three layers under one roof, applied jointly or one by one."""

        def setup(self):
            self.layers = [bit_linear(n, model, 0.1 * n) for n in (4, 6, 2)]

        def __call__(self, x, joined):
            if joined:
                return project(x, self.layers)
            return tuple(layer(x) for layer in self.layers)

    x, module = gaussian(2, 3, 16), Three()
    variables = initialized(module, x, True)
    joined = apply(module, variables, x, True)
    alone = apply(module, variables, x, False)
    assert [y.shape for y in joined] == [(2, 3, 4), (2, 3, 6), (2, 3, 2)]
    for a, b in zip(joined, alone, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


# Attention, feed-forward, block.


@quantized_or_not
@pytest.mark.parametrize("implementation", ["explicit", "library"])
@pytest.mark.parametrize("n_kv_heads", [0, 2, 1])
def test_attention_with_grouped_heads(model, implementation, n_kv_heads):
    model = model.changed(
        n_kv_heads=n_kv_heads, rope_theta=50.0, attention=implementation
    )
    module, x, positions = (
        MultiHeadAttention(*parts(model)),
        gaussian(2, 6, 16),
        jnp.arange(6),
    )
    variables = initialized(module, x, positions, rotary_of(model, positions))
    width = 4 * model.architecture.kv_heads
    assert shapes(variables["params"]) == {
        "q_proj/kernel": (16, 16),
        "k_proj/kernel": (16, width),
        "v_proj/kernel": (16, width),
        "sub_norm/scale": (16,),
        "o_proj/kernel": (16, 16),
    }
    expected = attention(model, variables["params"], np.asarray(x, np.float64))
    for offset in (0, 40):  # only distances count
        rotary = rotary_of(model, positions + offset)
        y, cache = apply(module, variables, x, positions + offset, rotary)
        np.testing.assert_allclose(y, expected, rtol=1e-3, atol=1e-4)
        assert cache is None


# What blocks of other families have, heads of a dimension of their own among it.
OTHERS: list[dict[str, Any]] = [
    {"family": "llama", "head_dim": 6},
    {"family": "qwen2"},
    {"family": "qwen3", "head_dim": 8, "norm_eps": 0.1},
    {"qk_norm": True, "attention_bias": True, "head_dim": 2},  # and sub-norms
]


@quantized_or_not
@pytest.mark.parametrize("changes", OTHERS)
def test_attention_of_other_families(model, changes):
    model = model.changed(n_kv_heads=2, rope_theta=50.0, **changes)
    a, positions = model.architecture, jnp.arange(6)
    module, x = MultiHeadAttention(*parts(model)), gaussian(2, 6, 16)
    variables = initialized(module, x, positions, rotary_of(model, positions))
    size = changes.get("head_dim", 4)
    expected: dict[str, tuple[int, ...]] = {
        "q_proj/kernel": (16, 4 * size),
        "k_proj/kernel": (16, 2 * size),
        "v_proj/kernel": (16, 2 * size),
        "o_proj/kernel": (4 * size, 16),
    }
    if a.attention_bias:
        expected["q_proj/bias"] = (4 * size,)
        expected |= {"k_proj/bias": (2 * size,), "v_proj/bias": (2 * size,)}
    if a.qk_norm:
        expected |= {"q_norm/scale": (size,), "k_norm/scale": (size,)}
    if a.sub_norms:
        expected |= {"sub_norm/scale": (4 * size,)}
    assert shapes(variables["params"]) == expected
    assert a.sub_norms == ("family" not in changes)
    y, _ = apply(module, variables, x, positions, rotary_of(model, positions))
    reference = attention(model, variables["params"], np.asarray(x, np.float64))
    np.testing.assert_allclose(y, reference, rtol=1e-3, atol=1e-4)


@quantized_or_not
def test_attention_writes_what_it_sees_into_the_cache(model):
    model = model.changed(n_kv_heads=2)
    module, x = MultiHeadAttention(*parts(model)), gaussian(2, 6, 16)
    variables = initialized(module, x, jnp.arange(6), rotary_of(model, jnp.arange(6)))
    expected = attention(model, variables["params"], np.asarray(x, np.float64))
    garbage = 1e4 * gaussian(2, 8, 2, 4)  # what the cache holds beyond must not count
    cache, start, step = (garbage, -garbage), 0, jax.jit(module.apply)
    for length in (3, 1, 1, 1):
        piece = x[:, start : start + length]
        positions = start + jnp.arange(length)
        rotary = rotary_of(model, positions)
        y, cache = step(variables, piece, positions, rotary, cache)
        np.testing.assert_allclose(
            y, expected[:, start : start + length], rtol=1e-4, atol=1e-4
        )
        start += length
    np.testing.assert_array_equal(cache[0][:, 6:], garbage[:, 6:])
    value = linear(model, variables["params"]["v_proj"], np.asarray(x, np.float64))
    np.testing.assert_allclose(
        cache[1][:, :6].reshape(2, 6, 8), value, rtol=1e-4, atol=1e-4
    )


@quantized_or_not
@pytest.mark.parametrize("activation", ["swiglu", "relu2"])
def test_feed_forward(model, activation):
    model = model.changed(activation=activation)
    module, x = FeedForward(*parts(model)), gaussian(2, 6, 16)
    variables = initialized(module, x)
    assert shapes(variables["params"]) == {
        "gate_proj/kernel": (16, 24),
        "up_proj/kernel": (16, 24),
        "sub_norm/scale": (24,),
        "down_proj/kernel": (24, 16),
    }
    expected = feed_forward(model, variables["params"], np.asarray(x, np.float64))
    np.testing.assert_allclose(
        apply(module, variables, x), expected, rtol=1e-4, atol=1e-4
    )


def block(model, params, x):
    epsilon = model.architecture.norm_eps
    y = rms_norm(params["attn_norm"], x, epsilon)
    x = x + attention(model, params["attn"], y)
    return x + feed_forward(
        model, params["ffn"], rms_norm(params["ffn_norm"], x, epsilon)
    )


def block_and_its_arguments(model):
    module, x = TransformerBlock(*parts(model)), 2 * gaussian(2, 5, 16)
    positions = jnp.arange(5)
    rest = (None, None, positions, rotary_of(model, positions), None, False)
    return module, initialized(module, x, *rest), x, rest


@quantized_or_not
def test_block_adds_normalized_branches_to_the_stream(model):
    module, variables, x, rest = block_and_its_arguments(model)
    y, _ = apply(module, variables, x, *rest)
    expected = block(model, variables["params"], np.asarray(x, np.float64))
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("attention", "activation", "n_kv_heads", "others"),
    [
        ("explicit", "swiglu", 2, {}),
        ("explicit", "relu2", 4, {}),
        ("library", "swiglu", 1, {}),
        *[("auto", "swiglu", 2, others) for others in OTHERS],
    ],
)
def test_gradients_equal_finite_differences(attention, activation, n_kv_heads, others):
    """Of the float64 reference, along a random direction of every array."""
    changes = {"activation": activation, "n_kv_heads": n_kv_heads, **others}
    model = TWIN.changed(attention=attention, **changes)
    module, variables, x, rest = block_and_its_arguments(model)
    arrays, weights = (variables["params"], x), np.asarray(gaussian(2, 5, 16, seed=2))

    def loss(params, x):
        return jnp.vdot(module.apply({"params": params}, x, *rest)[0], weights)

    gradients, treedef = jax.tree.flatten(jax.jit(jax.grad(loss, (0, 1)))(*arrays))
    leaves = [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(arrays)]
    rng = np.random.default_rng(3)
    for i, gradient in enumerate(gradients):
        direction = rng.normal(size=leaves[i].shape)
        sides = []
        for step in (1e-5, -1e-5):
            moved = [*leaves[:i], leaves[i] + step * direction, *leaves[i + 1 :]]
            y = block(model, *jax.tree.unflatten(treedef, moved))
            sides.append(np.sum(y * weights))
        slope = (sides[0] - sides[1]) / 2e-5
        scale = float(np.linalg.norm(gradient) * np.linalg.norm(direction))
        assert np.sum(gradient * direction) == pytest.approx(slope, abs=1e-5 * scale)


# Settings.


LLAMA3: dict[str, Any] = {"rope_scaling": "llama3", "rope_original_len": 16}
YARN: dict[str, Any] = {"rope_scaling": "yarn", "rope_original_len": 16}


@pytest.mark.parametrize(
    ("key", "changes"),
    [
        ("dim", {"dim": 0}),
        ("dim", {"dim": 20, "n_heads": 4}),  # an odd head dimension
        ("dim", {"dim": 17, "n_heads": 1}),
        ("n_layers", {"n_layers": 0}),
        ("n_heads", {"n_heads": 0}),
        ("max_seq_len", {"max_seq_len": 0}),
        ("vocab_size", {"vocab_size": -1}),
        ("n_kv_heads", {"n_kv_heads": 3}),
        ("n_kv_heads", {"n_kv_heads": 8}),
        ("n_kv_heads", {"n_kv_heads": -1}),
        ("ffn_dim", {"ffn_dim": -4}),
        ("head_dim", {"head_dim": 5}),
        ("head_dim", {"head_dim": -2}),
        ("family", {"family": "gpt2"}),
        ("qk_norm", {"family": "llama", "qk_norm": True}),
        ("sub_norms", {"family": "bitnet", "sub_norms": False}),
        ("attention_bias", {"family": "qwen3", "attention_bias": True}),
        ("rope_scaling", {"rope_scaling": "longrope"}),
        ("rope_factor", {"rope_factor": 4.0}),
        ("rope_factor", {"rope_scaling": "linear", "rope_factor": 0.5}),
        ("rope_original_len", {"rope_scaling": "yarn", "rope_factor": 4.0}),
        ("rope_original_len", {"rope_scaling": "llama3", "rope_factor": 4.0}),
        ("rope_beta_fast", {**LLAMA3, "rope_beta_fast": 64.0}),
        ("rope_attention_factor", {**LLAMA3, "rope_attention_factor": 1.0}),
        ("rope_high_freq_factor", {**LLAMA3, "rope_high_freq_factor": 1.0}),
        ("rope_low_freq_factor", {**YARN, "rope_low_freq_factor": 2.0}),
        ("rope_beta_fast", {**YARN, "rope_beta_fast": 0.5}),
        ("rope_theta", {**YARN, "rope_theta": 1.0}),
        ("dropout", {"dropout": 1.0}),
        ("dropout", {"dropout": -0.1}),
        ("activation_momentum", {"activation_momentum": 1.0}),
        ("threshold", {"threshold": -0.5}),
    ],
)
def test_impossible_settings_are_refused_by_name(key, changes):
    with pytest.raises(VaaniError, match=rf"(model|quantization)\.{key}\b"):
        CONFIG.changed(**changes)


@pytest.mark.parametrize(
    ("dim", "hidden"), [(16, 64), (128, 320), (384, 1024), (1536, 4096)]
)
def test_zeros_stand_for_the_usual_sizes(dim, hidden):
    model = Vaani().changed(dim=dim, n_heads=4)
    assert (
        model.architecture.hidden_dim == hidden
    )  # 8/3 D to the nearest multiple of 64
    assert model.architecture.kv_heads == 4
    assert model.architecture.head_size == dim // 4
    given = Vaani().changed(dim=dim, n_heads=4, n_kv_heads=2, ffn_dim=40)
    assert (given.architecture.kv_heads, given.architecture.hidden_dim) == (2, 40)
    assert given.changed(dim=30, head_dim=10).architecture.head_size == 10

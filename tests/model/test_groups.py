"""Models whose scales go by groups: masters, packed weights and a file agree."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vaani_jax.errors import VaaniError
from vaani_jax.inference.model import Model, load, save_packed
from vaani_jax.model.cache import KVCache
from vaani_jax.model.names import held, ternary_codes, ternary_kernels
from vaani_jax.model.packing import pack_variables, round_embedding
from vaani_jax.model.size import model_size
from vaani_jax.model.transformer import Vaani, init_variables
from vaani_jax.quant.packed import PackedTernary, scale_of, unpack
from vaani_jax.text.tokenizers import ByteTokenizer

SIZES = {"vocab_size": 256, "dim": 128, "n_layers": 2, "n_heads": 4, "ffn_dim": 192}
GROUPED = {"weight_granularity": "group", "weight_group": 64}
KEYS = [
    GROUPED,
    {**GROUPED, "activation_tracking": "group", "scale_dtype": "float16"},
    {**GROUPED, "activation_tracking": "group", "activation_group": 64},
    {**GROUPED, "activation_tracking": "ema"},
    {"activation_tracking": "group", "weight_granularity": "channel"},
    {"activation_tracking": "group"},
    # A group that is all of K is a group all the same.
    {"activation_tracking": "group", "activation_group": 64, "dim": 64, "ffn_dim": 64},
    {**GROUPED, "activation_tracking": "group", "dim": 64, "ffn_dim": 64},
    {**GROUPED, "activation_tracking": "none", "ternary_embedding": True},
    {**GROUPED, "ternary_embedding": True, "weight_group": 32},
    {**GROUPED, "ternary_embedding": True, "tie_embeddings": False},
    {**GROUPED, "ternary_head": True, "tie_embeddings": False},
    {**GROUPED, "ternary_head": True},
    {"ternary_embedding": True},
    {**GROUPED, "dtype": "bfloat16", "activation_tracking": "group"},
    {**GROUPED, "weight_scale": "stored", "ternary_embedding": True},
]


def model_of(keys, **more):
    return Vaani().changed(max_seq_len=32, **{**SIZES, **keys, **more})


def variables_of(model):
    """Initial ones, with stored scales that are not all one."""
    found = init_variables(model, jax.random.key(0))
    rng = np.random.default_rng(0)

    def visit(path, leaf):
        if path[-1].key == "scale":
            return jnp.asarray(rng.uniform(0.01, 0.05, leaf.shape).astype(np.float32))
        return leaf + 0.7 if path[-1].key == "range" else leaf

    found["quant"] = jax.tree_util.tree_map_with_path(visit, found["quant"])
    return found


TOKENS = np.random.default_rng(3).integers(0, 256, (2, 9))


@pytest.mark.parametrize("keys", KEYS, ids=str)
def test_packed_weights_give_the_logits_of_the_masters_to_the_bit(keys, tmp_path):
    model = model_of(keys)
    variables = variables_of(model)
    expected = jax.jit(model.apply)(variables, TOKENS)
    packed = pack_variables(variables, model.spec)
    np.testing.assert_array_equal(jax.jit(model.apply)(packed, TOKENS), expected)
    # So does what a file brings back, token by token.
    save_packed(Model(model, packed, ByteTokenizer()), tmp_path / "packed")
    loaded = load(tmp_path / "packed")
    assert loaded.module == model
    step = jax.jit(loaded.module.apply)
    cache = KVCache.create(model.architecture, 2, 16, model.quantization.dtype)
    for i in range(TOKENS.shape[1]):
        logits, cache = step(loaded.variables, TOKENS[:, i : i + 1], cache)
        np.testing.assert_array_equal(logits[:, 0], expected[:, i])


@pytest.mark.parametrize("keys", KEYS, ids=str)
def test_packed_kernels_hold_what_training_quantizes(keys):
    model = model_of(keys)
    variables = variables_of(model)
    packed = pack_variables(variables, model.spec)["params"]
    expected = ternary_codes(model.spec, variables)
    for name, (codes, scale) in expected.items():
        node = packed
        for part in name.split("/"):
            node = node[part]
        kernel = node if isinstance(node, PackedTernary) else node["kernel"]
        np.testing.assert_array_equal(unpack(kernel), codes)
        np.testing.assert_array_equal(scale_of(kernel), scale)
    untied = keys.get("tie_embeddings", True) is False
    names = {"embedding"} if keys.get("ternary_embedding") else set()
    if keys.get("ternary_head"):
        names |= {"lm_head"} if untied else {"head"}
    assert {n for n in expected if "layers" not in n} == names


@pytest.mark.parametrize(
    "keys",
    [
        {**GROUPED, "ternary_embedding": True},
        {**GROUPED, "ternary_embedding": True, "activation_tracking": "group"},
        {**GROUPED, "scan_layers": True},
    ],
    ids=str,
)
def test_kernels_held_for_a_step_change_nothing(keys):
    model = model_of(keys)
    variables = variables_of(model)
    ready = held(model.spec, variables, whole=False)
    plain = jax.jit(model.apply)(variables, TOKENS)
    given = jax.jit(model.apply)({**variables, "held": ready}, TOKENS)
    np.testing.assert_array_equal(given, plain)

    def loss(params, **more):
        given = {"params": params, "quant": variables["quant"], **more}
        return jnp.mean(model.apply(given, TOKENS) ** 2)

    a = jax.jit(jax.grad(loss))(variables["params"])
    b = jax.jit(lambda p: jax.grad(loss)(p, held=ready))(variables["params"])
    for one, other in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-9)


def test_a_ternary_embedding_learns_through_both_its_uses():
    model = model_of({**GROUPED, "ternary_embedding": True})
    variables = variables_of(model)
    (entry,) = [e for e in ternary_kernels(variables) if e.name == "embedding"]
    assert entry.kernel.shape == (128, 256)

    def loss(embedding):
        params = {**variables["params"], "embedding": embedding}
        given = {"params": params, "quant": variables["quant"]}
        return jnp.sum(model.apply(given, TOKENS)[..., 7])

    g = np.abs(jax.grad(loss)(variables["params"]["embedding"])).max(axis=1)
    seen = set(TOKENS.ravel().tolist())
    assert all(g[i] > 0 for i in {*seen, 7})  # looked up, or a logit that counts
    assert all(g[i] == 0 for i in range(256) if i not in {*seen, 7})


def test_an_8_bit_rounding_leaves_a_ternary_embedding_as_it_is():
    model = model_of({**GROUPED, "ternary_embedding": True})
    packed = pack_variables(variables_of(model), model.spec)["params"]
    assert round_embedding(packed)["embedding"] is packed["embedding"]


@pytest.mark.parametrize(("dtype", "width"), [("float32", 4), ("float16", 2)])
def test_the_size_of_a_model_counts_the_scales_of_groups(dtype, width):
    model = model_of({**GROUPED, "ternary_embedding": True, "scale_dtype": dtype})
    size = model_size(model)
    packed = pack_variables(variables_of(model), model.spec)["params"]
    kernels = [
        leaf
        for leaf in jax.tree.leaves(
            packed, is_leaf=lambda x: isinstance(x, PackedTernary)
        )
        if isinstance(leaf, PackedTernary)
    ]
    codes = sum(k.codes.nbytes for k in kernels)
    scales = sum(k.scale.nbytes for k in kernels)
    assert scales == size.ternary // 64 * width
    others = size.parameters - size.ternary
    assert size.bytes_2bit == codes + scales + 2 * others


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({**GROUPED, "weight_group": 96}, "model.dim"),
        ({"activation_tracking": "group", "activation_group": 96}, "model.dim"),
        ({**GROUPED, "ffn_dim": 200}, "model.ffn_dim"),
        ({**GROUPED, "weight_group": 40}, "multiple of 32"),
        ({"activation_group": 40}, "multiple of 32"),
        ({**GROUPED, "weight_group": 512}, "weight_group"),
    ],
)
def test_groups_that_no_layer_can_have_are_refused_by_key(keys, words):
    with pytest.raises(VaaniError, match=words):
        init_variables(model_of({}, **keys), jax.random.key(0))


def test_a_twin_has_no_groups():
    model = model_of({**GROUPED, "weight_group": 96, "quantize": False})
    assert init_variables(model, jax.random.key(0))["quant"] == {}

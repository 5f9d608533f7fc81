"""The language model: causality, the cache, layouts of layers and heads, counts."""

import dataclasses
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vaani_jax.errors import VaaniError
from vaani_jax.kernels.floats import compiled_floats
from vaani_jax.model.block import TransformerBlock
from vaani_jax.model.cache import KVCache
from vaani_jax.model.names import ternary_codes, ternary_kernels
from vaani_jax.model.norm import RMSNorm
from vaani_jax.model.rotary import rotary_angles
from vaani_jax.model.size import flops_per_token, model_size
from vaani_jax.model.transformer import Vaani, init_variables, stack_layers

T = 7
SHAPE = {"dim": 16, "n_heads": 4, "n_kv_heads": 2, "ffn_dim": 24, "n_layers": 2}
CONFIG = Vaani().changed(vocab_size=13, max_seq_len=T, init_std=0.3, **SHAPE)
PARTS = CONFIG.architecture, CONFIG.quantization, CONFIG.execution
TOKENS = jnp.asarray([[1, 5, 3, 0, 12, 7, 2], [4, 4, 9, 8, 6, 6, 10]], jnp.int32)


def change(model=CONFIG, **changes):
    return model.changed(**changes)


TWIN = change(quantize=False)
quantized_or_not = pytest.mark.parametrize("model", [CONFIG, TWIN], ids=["bit", "fp"])


# What blocks of other families have, all at once.
ALL_OTHERS: dict[str, Any] = {
    "qk_norm": True,
    "attention_bias": True,
    "head_dim": 6,
    "rope_scaling": "yarn",
    "rope_factor": 4.0,
    "rope_original_len": 3,
    "rope_theta": 20.0,
}


@functools.cache
def variables_of(model):
    """Variables as `init_variables` shapes them; quick, and norms that matter."""
    rng = np.random.default_rng(0)

    def fill(path, leaf):
        name = path[-1].key
        values = {"threshold": 0.5, "range": 3.0, "momentum": 0.9}.get(name)
        if values is None:
            values = rng.normal(name == "scale", 0.3, leaf.shape)  # kernels, biases
        return jnp.full(leaf.shape, jnp.asarray(values), leaf.dtype)

    shapes = jax.eval_shape(lambda: init_variables(model, jax.random.key(0)))
    return jax.tree_util.tree_map_with_path(fill, shapes)


@functools.cache
def forward(model):
    return jax.jit(model.apply)


def flat(tree):
    paths = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(p, simple=True, separator="/"): x for p, x in paths}


def assert_trees_close(a, b, rtol=1e-5, atol=1e-6):
    a, b = flat(a), flat(b)
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_allclose(a[name], b[name], rtol=rtol, atol=atol, err_msg=name)


# Causality.


@quantized_or_not
def test_no_logit_has_a_gradient_from_a_later_token(model):
    """d logits[t] / d input[s] is exactly 0 for s > t, and not 0 for s <= t."""
    model = change(model, tie_embeddings=False)  # the head must not see the rows
    variables = variables_of(model)
    direction = jax.random.normal(jax.random.key(1), (13,))
    tokens = TOKENS[:1]
    assert len(set(tokens[0].tolist())) == T  # a row of the embedding is a position

    def heights(embedding):
        params = {**variables["params"], "embedding": embedding}
        logits = model.apply({**variables, "params": params}, tokens)
        return logits[0] @ direction

    jacobian = jax.jit(jax.jacrev(heights))(variables["params"]["embedding"])
    reach = np.abs(np.asarray(jacobian)[:, tokens[0]]).max(axis=-1)  # [t, s]
    assert reach.shape == (T, T)
    assert (reach[np.triu_indices(T, 1)] == 0).all()
    assert (reach[np.tril_indices(T)] > 1e-6).all()


@quantized_or_not
def test_another_future_token_leaves_earlier_logits_bitwise(model):
    variables = variables_of(model)
    logits = np.asarray(forward(model)(variables, TOKENS))
    for s in range(T):
        changed = TOKENS.at[:, s].add(1) % 13
        other = np.asarray(forward(model)(variables, changed))
        np.testing.assert_array_equal(other[:, :s], logits[:, :s])
        assert (np.abs(other[:, s:] - logits[:, s:]).max(axis=-1) > 1e-6).all()


# The cache.


def decode_after(model, tokens, prompt):
    """Logits of every position: a prompt at once, the rest token by token."""
    cache, logits = KVCache.create(model.architecture, 2, capacity=T), []
    bounds = [0, *range(prompt, tokens.shape[1] + 1)]
    for start, end in itertools.pairwise(bounds):
        piece = tokens[:, start:end]
        out, cache = forward(model)(variables_of(model), piece, cache)
        logits.append(np.asarray(out))
    assert int(cache.length) == tokens.shape[1]
    return np.concatenate(logits, axis=1)


@quantized_or_not
@pytest.mark.parametrize("others", [{}, ALL_OTHERS], ids=["plain", "others"])
def test_cached_decoding_equals_the_full_forward_from_every_prompt_length(
    model, others
):
    model = change(model, n_layers=1, **others)
    full = forward(model)(variables_of(model), TOKENS)
    model = change(model, max_seq_len=2)  # the cache decides what fits
    for prompt in range(1, 5):  # of four tokens, in a cache for seven
        cached = decode_after(model, TOKENS[:, :4], prompt)
        np.testing.assert_allclose(cached, full[:, :4], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("tolerance", "changes"),
    [
        (1e-5, {"scan_layers": True, "weight_granularity": "channel"}),
        (1e-5, {"n_kv_heads": 1, "tie_embeddings": False, "activation": "relu2"}),
        (1e-5, {"activation_tracking": "ema", "n_layers": 1}),
        (0.05, {"dtype": "bfloat16", "n_layers": 1, "quantize": False}),
        (0.05, {"dtype": "bfloat16", "n_layers": 1}),
    ],
    ids=["scan-channel", "untied-relu2", "ema", "bfloat16-fp", "bfloat16-bit"],
)
def test_cached_decoding_of_every_kind_of_model(tolerance, changes):
    model = change(**changes)
    full = np.asarray(forward(model)(variables_of(model), TOKENS))
    cached = decode_after(model, TOKENS, 3)
    assert cached.dtype == np.float32
    # Rounding otherwise in bfloat16, a ternary model may tip an 8-bit rounding.
    tipped = (
        0.1
        if model.quantization.dtype == "bfloat16" and model.quantization.quantize
        else 0.0
    )
    assert np.mean(np.abs(cached - full) > tolerance * full.std()) <= tipped


def test_a_bfloat16_model_computes_what_a_float32_one_does():
    model, low = change(n_layers=1), change(n_layers=1, dtype="bfloat16")
    exact, found = (forward(c)(variables_of(c), TOKENS) for c in (model, low))
    assert np.corrcoef(np.ravel(found), np.ravel(exact))[0, 1] > 0.99
    assert found.dtype == jnp.float32


LENGTHS = (2, 5, 4)  # of the prompts of a batch, each followed by two tokens more


@pytest.mark.parametrize(
    ("tolerance", "changes"),
    [
        (1e-5, {"quantize": False}),
        (1e-5, {"attention": "library", "n_kv_heads": 1}),
        (1e-5, {"attention": "explicit", "n_kv_heads": 0}),
        (1e-5, {"scan_layers": True, "activation": "relu2"}),
        (0.05, {"dtype": "bfloat16", "n_layers": 1, "quantize": False}),
    ],
    ids=["fp", "library-mqa", "explicit-mha", "scan", "bfloat16-fp"],
)
def test_rows_of_a_ragged_batch_answer_as_each_alone(tolerance, changes):
    """Alone is the full forward, without padding and without a cache."""
    model = change(**changes)
    variables, step = variables_of(model), forward(model)
    rows = [TOKENS[i % 2, : n + 2] for i, n in enumerate(LENGTHS)]
    end = max(LENGTHS)
    start = np.asarray([end - n for n in LENGTHS], np.int32)
    for pad in (0, 9):  # the padding is of no account, left or right
        tokens = np.full((3, end + 2), pad, np.int32)
        for b, first in enumerate(start):
            tokens[b, first:end] = rows[b][: LENGTHS[b]]
        cache = KVCache.create(
            model.architecture, 3, capacity=T + 1, start=jnp.asarray(start)
        )
        logits, cache = step(variables, jnp.asarray(tokens), cache)
        assert jnp.isfinite(logits).all()
        pieces = [np.asarray(logits)[:, :end]]
        cache = dataclasses.replace(cache, length=jnp.asarray(end, jnp.int32))
        for i in range(2):
            new = jnp.stack([row[n + i] for row, n in zip(rows, LENGTHS, strict=True)])
            logits, cache = step(variables, new[:, None], cache)
            pieces.append(np.asarray(logits))
        found = np.concatenate(pieces, axis=1)
        np.testing.assert_array_equal(cache.start, start)
        assert int(cache.length) == end + 2
        for b, (row, first) in enumerate(zip(rows, start, strict=True)):
            alone = np.asarray(step(variables, row[None]))[0]
            error = np.abs(found[b, first:] - alone).max()
            assert error < tolerance * 10 * alone.std(), b


def test_starts_are_data():
    variables, traces = variables_of(TWIN), []

    @jax.jit
    def run(start):
        traces.append(1)
        cache = KVCache.create(TWIN.architecture, 2, start=start)
        return TWIN.apply(variables, TOKENS, cache)[0]

    for start in ([0, 0], [1, 3], [6, 0]):
        assert jnp.isfinite(run(jnp.asarray(start, jnp.int32))).all()
    assert len(traces) == 1


@pytest.mark.parametrize(
    "changes",
    [{}, {"tie_embeddings": False, "ternary_head": True}, {"quantize": False}],
    ids=["tied", "ternary", "fp"],
)
def test_logits_of_one_position_are_those_of_all(changes):
    model = change(vocab_size=61, n_layers=1, **changes)
    variables = variables_of(model)

    @jax.jit
    def run(last):
        cache = KVCache.create(model.architecture, 2)
        return model.apply(variables, TOKENS, cache, last=last)

    full, filled = forward(model)(
        variables, TOKENS, KVCache.create(model.architecture, 2)
    )
    for t in range(T):
        found, cache = run(jnp.int32(t))
        assert found.shape == (2, 1, 61)
        np.testing.assert_allclose(found[:, 0], full[:, t], rtol=1e-5, atol=1e-5)
        assert_trees_close(cache, filled)
    text = jax.jit(run).lower(jnp.int32(0)).as_text()
    assert "2x1x61x" in text
    assert f"2x{T}x61x" not in text  # the head's product is done for one


@pytest.mark.parametrize("scan_layers", [False, True], ids=["loop", "scan"])
def test_a_cache_of_fewer_bits_answers_nearly_as_one_of_float32(scan_layers):
    """Of the full-precision twin: no rounding elsewhere blurs the figures."""
    model = change(TWIN, dim=64, n_heads=4, n_kv_heads=2, scan_layers=scan_layers)
    variables = variables_of(model)
    # Scores of a few units, not of dozens: attention then looks at several tokens.
    variables = jax.tree.map(
        lambda x: x * (0.4 if x.ndim > 1 + scan_layers else 1.0), variables
    )

    def answers(dtype, damage=lambda cache: cache):
        cache, logits = (
            KVCache.create(model.architecture, 2, capacity=T, dtype=dtype),
            [],
        )
        for start, end in ((0, 4), (4, 5), (5, 6), (6, 7)):
            out, cache = forward(model)(variables, TOKENS[:, start:end], cache)
            cache = damage(cache)
            logits.append(out)
        held = jnp.dtype("uint8" if dtype == "int4" else dtype)
        assert {x.dtype for x in cache.keys + cache.values} == {held}
        assert len(cache.key_scales) == (2 if dtype in ("int8", "int4") else 0)
        assert len(cache.key_centers) == (2 if dtype == "int4" else 0)
        return np.concatenate(logits, axis=1)

    def error(found):
        return np.sqrt(np.mean((found - exact) ** 2)) / exact.std()

    exact = answers("float32")
    full = forward(model)(variables, TOKENS)
    np.testing.assert_allclose(exact, full, rtol=1e-4, atol=1e-4)
    assert 1e-5 < error(answers("bfloat16")) < 0.01
    assert 1e-5 < error(answers("int8")) < 0.01
    assert 1e-3 < error(answers("int4")) < 0.15

    def of_a_neighbor(axis, name):
        """Scales of the token or head beside: a slip of an index."""

        def damage(cache):
            rolled = tuple(jnp.roll(x, 1, axis) for x in getattr(cache, name))
            return dataclasses.replace(cache, **{name: rolled})

        return damage

    for name in ("key_scales", "value_scales"):
        for axis in (1, 2):
            assert error(answers("int8", of_a_neighbor(axis, name))) > 0.05


def test_caches_of_codes_take_a_quarter_and_an_eighth():
    model = change(dim=256, n_heads=4, n_kv_heads=2)  # H = 64
    full, half, quarter, eighth = (
        KVCache.create(model.architecture, 3, 128, dtype)
        for dtype in ("float32", "bfloat16", "int8", "int4")
    )
    assert full.nbytes == 2 * 2 * (3 * 128 * 2 * 64) * 4 + 4 + 3 * 4
    assert half.nbytes == pytest.approx(full.nbytes / 2, rel=0.001)
    # And 4 bytes of scale for 64 codes.
    assert quarter.nbytes == pytest.approx(full.nbytes / 4 * (1 + 4 / 64), rel=0.001)
    # And, of keys, 64 numbers of a center for 64 x 64 codes.
    assert eighth.nbytes == pytest.approx(
        full.nbytes / 8 * (1 + 4 / 32 + 4 / 32 / 2), rel=0.001
    )
    assert (
        KVCache.create(model.architecture, 1, dtype=jnp.int8).keys[0].dtype == jnp.int8
    )
    assert KVCache.create(model.architecture, 1, dtype=np.dtype("int8")).key_scales
    assert KVCache.create(model.architecture, 1, dtype=jnp.int4).key_centers
    for name in ("float16", "fp8"):
        match = f"float32, bfloat16, int8 or int4, not {name}"
        with pytest.raises(VaaniError, match=match):
            KVCache.create(model.architecture, 1, dtype=name)


def test_past_its_end_a_cache_raises_or_answers_nan():
    model = change(TWIN, max_seq_len=20)
    variables, step = variables_of(model), forward(model)
    cache = KVCache.create(model.architecture, 2, capacity=5)
    cache = dataclasses.replace(cache, length=jnp.asarray(4, jnp.int32))
    with pytest.raises(VaaniError, match="6 tokens do not fit the context of 5"):
        model.apply(variables, TOKENS[:, :2], cache)
    logits, cache = step(variables, TOKENS[:, :1], cache)
    assert jnp.isfinite(logits).all()  # the fifth token fits
    for _ in range(2):
        logits, cache = step(variables, TOKENS[:, :1], cache)
        assert jnp.isnan(logits).all()


def test_what_can_never_fit_is_refused():
    for step in (TWIN.apply, forward(TWIN)):
        with pytest.raises(VaaniError, match="8 tokens do not fit the context of 7"):
            step(variables_of(TWIN), jnp.zeros((1, T + 1), jnp.int32))
    with pytest.raises(VaaniError, match=r"model\.vocab_size"):
        init_variables(change(vocab_size=0), jax.random.key(0))


# What the model is made of.


def test_model_is_embedding_blocks_norm_and_head():
    @jax.jit
    def by_hand(params, quant):
        x = params["embedding"][TOKENS]
        rotary = tuple(map(jnp.asarray, rotary_angles(T, CONFIG.architecture.rotary)))
        for name in ("layers_0", "layers_1"):
            layer = {"params": params[name], "quant": quant[name]}
            rest = (None, None, jnp.arange(T), rotary, None, False)
            x, _ = TransformerBlock(*PARTS).apply(layer, x, *rest)
        x = RMSNorm().apply({"params": params["final_norm"]}, x)
        return x @ params["embedding"].T

    logits = forward(CONFIG)(variables_of(CONFIG), TOKENS)
    expected = by_hand(**variables_of(CONFIG))
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("ternary_head", [False, True])
def test_tied_head_equals_an_untied_one_with_the_same_weights(ternary_head):
    tied = change(n_layers=1, ternary_head=ternary_head)
    untied = change(tied, tie_embeddings=False)
    variables, other = variables_of(tied), variables_of(untied)
    assert set(other["params"]) - set(variables["params"]) == {"lm_head"}
    head = {"kernel": variables["params"]["embedding"].T}
    params = {**variables["params"], "lm_head": head}
    a = forward(tied)(variables, TOKENS)
    b = forward(untied)({**other, "params": params}, TOKENS)
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    for found, name in [(variables, "head"), (other, "lm_head")]:
        kernels = ternary_kernels(found)
        assert (name in [k.name for k in kernels]) == ternary_head
    plain = forward(change(tied, ternary_head=False))(variables, TOKENS)
    moved = float(jnp.abs(plain - a).max())
    assert moved > 0.1 if ternary_head else moved == 0


def test_the_twin_has_the_same_parameters_and_no_quantizers():
    model = change(n_layers=1, tie_embeddings=False, ternary_head=True)
    params, quant = init_variables(model, jax.random.key(3)).values()
    twin, nothing = init_variables(
        change(model, quantize=False), jax.random.key(3)
    ).values()
    assert_trees_close(params, twin, rtol=0, atol=0)
    assert flat(quant)
    assert not flat(nothing)


def test_mix_moves_the_whole_model_from_the_twin_to_ternary():
    variables, traces = variables_of(CONFIG), []

    @jax.jit
    def mixed(mix):
        traces.append(1)
        return CONFIG.apply(variables, TOKENS, mix=mix)

    logits = [np.asarray(mixed(jnp.float32(part))) for part in (0.0, 0.5, 1.0)]
    assert len(traces) == 1
    ternary = np.asarray(mixed(None))
    np.testing.assert_allclose(logits[2], ternary, rtol=1e-5, atol=1e-5)
    twin = forward(TWIN)({"params": variables["params"]}, TOKENS)
    np.testing.assert_allclose(logits[0], twin, rtol=1e-4, atol=1e-4)
    assert np.abs(logits[0] - ternary).max() > 0.1
    assert np.abs(logits[1] - ternary).max() > 0.01


@functools.cache
def initial_variables_and_one_step(model):
    """Initial variables; then loss, gradients and tracked ranges of a training step."""
    params, quant = init_variables(model, jax.random.key(0)).values()

    def loss(params, quant):
        logits, updated = model.apply(
            {"params": params, "quant": quant},
            TOKENS,
            train=True,
            rngs={"dropout": jax.random.key(5)},
            mutable=["quant"],
        )
        return jnp.mean(jnp.square(logits - 1.0)), updated["quant"]

    traced = jax.jit(jax.value_and_grad(loss, has_aux=True)).trace(params, quant)
    jaxpr = str(traced.jaxpr)
    assert ("remat" in jaxpr or "checkpoint" in jaxpr) == model.execution.remat
    assert (
        f"length={model.architecture.n_layers}" in jaxpr
    ) == model.execution.scan_layers
    return (params, quant), traced.lower().compile()(params, quant)


@pytest.mark.parametrize("layout", [("remat",), ("scan_layers", "remat")])
def test_scanned_and_recomputed_layers_change_nothing(layout):
    base = change(dropout=0.3, activation_tracking="ema")
    model = change(base, **dict.fromkeys(layout, True))
    trees, results = initial_variables_and_one_step(base)
    if model.execution.scan_layers:
        stack = functools.partial(stack_layers, n_layers=2)
        (value, after), gradient = results
        trees = tuple(stack(tree) for tree in trees)
        results = (value, stack(after)), stack(gradient)
    others, other_results = initial_variables_and_one_step(model)
    ranges = [x for n, x in flat(other_results).items() if n.endswith("range")]
    assert ranges
    assert all((x > 0).all() for x in ranges)  # each layer has seen its batch
    assert_trees_close(trees, others, rtol=0, atol=0)
    assert_trees_close(results, other_results, rtol=1e-4, atol=1e-5)


def products_of_a_gradient(model):
    """Products in the jaxpr of a gradient: of linear layers and head, of attention."""
    shapes = jax.eval_shape(lambda: init_variables(model, jax.random.key(0)))

    def loss(params, quant):
        variables = {"params": params, "quant": quant}
        return jnp.sum(jnp.sin(model.apply(variables, TOKENS, train=True)))

    plain, batched = 0, 0

    def visit(jaxpr):
        nonlocal plain, batched
        for equation in jaxpr.eqns:
            if equation.primitive.name == "dot_general":
                batch = equation.params["dimension_numbers"][1][0]
                plain, batched = plain + (not batch), batched + bool(batch)
            for value in equation.params.values():
                for inner in value if isinstance(value, list | tuple) else [value]:
                    inner = getattr(inner, "jaxpr", inner)
                    if hasattr(inner, "eqns"):
                        visit(inner)

    visit(jax.make_jaxpr(jax.grad(loss))(*shapes.values()).jaxpr)
    return plain, batched


@quantized_or_not
@pytest.mark.parametrize("scan_layers", [False, True], ids=["loop", "scan"])
@pytest.mark.parametrize("operands", ["bfloat16", "int8"])
def test_saved_products_are_not_done_twice(model, scan_layers, operands):
    model = change(model, scan_layers=scan_layers, operands=operands)
    # In the text of the program.
    blocks = 1 if scan_layers else model.architecture.n_layers
    # Seven products forward and twice as many backward; two and four of attention.
    head = (3, 0)
    expected = {
        "": (21, 6),
        "nothing": (21 + 6, 6 + 2),  # what comes last is not needed
        "products": (21, 6 + 2),
    }
    for save, (plain, batched) in expected.items():
        how = {"remat": True, "remat_save": save} if save else {}
        found = products_of_a_gradient(change(model, attention="explicit", **how))
        assert found == (blocks * plain + head[0], blocks * batched)


@quantized_or_not
def test_recomputing_takes_less_memory_and_saving_products_part_of_it(model):
    """In bytes of temporaries, as the compiler counts them."""
    shape = {"dim": 64, "n_kv_heads": 0, "ffn_dim": 192, "max_seq_len": 64}
    model = change(model, scan_layers=True, n_layers=4, **shape)
    tokens = jnp.zeros((4, 64), jnp.int32)

    def temporaries(**how):
        other = change(model, **how)
        shapes = jax.eval_shape(lambda: init_variables(other, jax.random.key(0)))

        def loss(params, quant):
            variables = {"params": params, "quant": quant}
            return jnp.sum(other.apply(variables, tokens, train=True))

        compiled = jax.jit(jax.grad(loss)).lower(*shapes.values()).compile()
        analysis: Any = compiled.memory_analysis()
        return analysis.temp_size_in_bytes

    everything = temporaries()
    nothing = temporaries(remat=True)
    products = temporaries(remat=True, remat_save="products")
    assert nothing < products < everything
    # q, k, v, o, gate and up. (In bfloat16 a CPU's compiler makes float32 of them.)
    kept = 4 * tokens.size * (4 * 64 + 2 * 192) * 4
    # Without them, those of the layer that is being recomputed may be there as well.
    assert 0.7 * kept <= products - nothing <= 1.2 * kept


@pytest.mark.parametrize("scan_layers", [False, True], ids=["loop", "scan"])
def test_operands_and_what_is_saved_change_nothing(scan_layers):
    """Forward to the bit; backward, compilers order float sums as they like."""
    base = change(scan_layers=scan_layers, activation_tracking="ema", remat=True)
    _, results = initial_variables_and_one_step(change(base, operands="float32"))
    for changes in (
        {"operands": "int8"},
        {"operands": "int8", "remat_save": "products"},
        {"operands": "bfloat16", "remat_save": "products"},
    ):
        _, others = initial_variables_and_one_step(change(base, **changes))
        assert_trees_close(results[0], others[0], rtol=0, atol=0)
        assert_trees_close(results[1], others[1], rtol=1e-5, atol=1e-6)


def test_every_parameter_learns():
    model = change(n_layers=1, tie_embeddings=False, ternary_head=True)
    variables = variables_of(model)

    def loss(params):
        logits = model.apply({**variables, "params": params}, TOKENS)
        return jnp.sum(jnp.sin(logits))

    for name, gradient in flat(jax.jit(jax.grad(loss))(variables["params"])).items():
        assert jnp.isfinite(gradient).all(), name
        assert jnp.mean(gradient != 0) > (0.5 if name == "embedding" else 0.99), name


def test_dropout_acts_in_training_only():
    model = change(dropout=0.4, n_layers=1)
    variables = variables_of(model)
    train = jax.jit(
        lambda key: model.apply(variables, TOKENS, train=True, rngs={"dropout": key})
    )
    none = change(model, dropout=0.0)  # needs no random stream
    plain = jax.jit(lambda: none.apply(variables, TOKENS, train=True))()
    logits = forward(model)(variables, TOKENS)
    first, second = train(jax.random.key(0)), train(jax.random.key(1))
    np.testing.assert_array_equal(first, train(jax.random.key(0)))
    assert float(jnp.abs(first - second).max()) > 0.1
    np.testing.assert_allclose(logits, plain, rtol=1e-5, atol=1e-5)
    assert float(jnp.abs(first - logits).max()) > 0.1


# Thresholds, codes, counts.


def test_thresholds_are_data():
    """In the collection `quant`; other values change zeros without a recompilation."""
    params, quant = init_variables(change(threshold=0.25), jax.random.key(0)).values()
    thresholds, traces = flat(quant), []
    assert len(thresholds) == 2 * 7
    assert all(name.endswith("weight_quantizer/threshold") for name in thresholds)
    assert {float(tau) for tau in thresholds.values()} == {0.25}

    @jax.jit
    def run(quant):
        traces.append(1)
        variables = {"params": params, "quant": quant}
        codes = ternary_codes(CONFIG.spec, variables)
        zeros = {name: jnp.mean(t == 0) for name, (t, _) in codes.items()}
        return zeros, CONFIG.apply(variables, TOKENS)

    zeros, logits = run(quant)
    chosen = "layers_1/ffn/up_proj"
    quant["layers_1"]["ffn"]["up_proj"]["weight_quantizer"]["threshold"] *= 4
    more_zeros, other = run(quant)
    assert len(traces) == 1
    assert zeros[chosen] + 0.2 < more_zeros[chosen]
    assert all(zeros[n] == more_zeros[n] for n in zeros if n != chosen)
    assert float(jnp.abs(logits - other).max()) > 0.01


@pytest.mark.parametrize("scan_layers", [False, True])
@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_ternary_codes_are_those_of_the_kernels(scan_layers, granularity):
    model = change(scan_layers=scan_layers, weight_granularity=granularity)
    model = change(model, ternary_head=True)
    variables = variables_of(model)
    found, params = ternary_codes(model.spec, variables), variables["params"]
    kernels = {"head": np.asarray(params["embedding"]).T}
    for name, w in flat(params).items():
        if name.endswith("/kernel"):
            kernels[name.removesuffix("/kernel")] = np.asarray(w)
    assert found.keys() == kernels.keys()
    for name, w in kernels.items():
        codes, scale = found[name]
        assert codes.dtype == jnp.int8
        axes = (-2, -1) if granularity == "tensor" else (-2,)
        gamma = np.abs(w.astype(np.float64)).mean(axis=axes, keepdims=True)
        np.testing.assert_array_equal(codes, np.clip(np.round(w / gamma), -1, 1))
        np.testing.assert_allclose(scale, gamma.squeeze(axes), rtol=1e-6)


@pytest.mark.parametrize(
    ("granularity", "tie", "quantize"),
    [
        ("tensor", True, True),
        ("channel", False, True),
        ("tensor", False, False),
    ],
)
def test_model_size_counts_the_real_tree(granularity, tie, quantize):
    model = change(tie_embeddings=tie, quantize=quantize)
    model = change(model, weight_granularity=granularity)
    leaves, size = flat(variables_of(model)["params"]), model_size(model)
    assert size.parameters == sum(x.size for x in leaves.values())
    ternary = [x for n, x in leaves.items() if "kernel" in n and "lm_head" not in n]
    assert len(ternary) == 14
    attention = 16 * 16 + 2 * 16 * 8 + 16 * 16
    assert size.ternary == sum(x.size for x in ternary) == 2 * (attention + 3 * 16 * 24)
    assert size.bytes_fp16 == 2 * size.parameters
    scales = 14 if granularity == "tensor" else sum(x.shape[1] for x in ternary)
    rest = size.parameters - size.ternary
    assert size.bytes_2bit == size.ternary // 4 + 2 * rest + 4 * scales
    assert model_size(change(model, scan_layers=True)) == size


def test_initial_weights_have_the_documented_spread():
    wide = {"vocab_size": 64, "dim": 64, "ffn_dim": 64, "n_heads": 2}
    model = Vaani().changed(**wide, n_layers=3, init_std=0.05)
    params, _ = init_variables(model, jax.random.key(0)).values()
    for name, w in flat(params).items():
        if name.endswith("scale"):
            assert (w == 1).all()
            continue
        output = "o_proj" in name or "down_proj" in name
        std = 0.05 / np.sqrt(2 * 3) if output else 0.05
        assert float(w.std()) == pytest.approx(std, rel=0.06), name
        assert abs(float(w.mean())) < 0.1 * std, name


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize(("kv_heads", "head_dim"), [(0, 0), (2, 0), (2, 16)])
def test_flops_counted_by_hand(tie, kv_heads, head_dim):
    model = Vaani().changed(
        vocab_size=1000,
        dim=64,
        n_layers=3,
        n_heads=8,
        n_kv_heads=kv_heads,
        head_dim=head_dim,
        ffn_dim=96,
        tie_embeddings=tie,
        attention_bias=True,  # is added, not multiplied
    )
    size = head_dim or 8
    keys = (kv_heads or 8) * size
    layer = 64 * 8 * size * 2 + 64 * keys * 2 + 3 * 64 * 96
    for seq_len in (1, 128):
        # Scores and their sums: each query with seq_len keys, heads x size numbers.
        attention = 2 * 2 * seq_len * 8 * size
        forward = 3 * (2 * layer + attention) + 2 * 64 * 1000
        for changes in ({}, {"quantize": False}, {"scan_layers": True, "remat": True}):
            assert flops_per_token(change(model, **changes), seq_len) == 3 * forward


@quantized_or_not
@pytest.mark.parametrize("tie", [True, False])
def test_flops_are_those_that_the_compiler_counts(model, tie):
    length = 64
    shape = {"dim": 128, "ffn_dim": 320, "vocab_size": 256, "max_seq_len": length}
    model = change(model, tie_embeddings=tie, operands="float32", **shape)
    shapes = jax.eval_shape(lambda: init_variables(model, jax.random.key(0)))
    tokens = jax.ShapeDtypeStruct((4, length), jnp.int32)

    def loss(params, quant, tokens):
        variables = {"params": params, "quant": quant}
        return jnp.mean(jnp.square(model.apply(variables, tokens, train=True)))

    step = jax.jit(jax.value_and_grad(loss))
    with compiled_floats():  # native calls are no operations of the compiler
        costs: Any = step.lower(*shapes.values(), tokens).compile().cost_analysis()
    counted = costs["flops"]
    ratio = counted / (4 * length * flops_per_token(model, length))
    assert 1.0 <= ratio < 1.05  # element-wise work is on top

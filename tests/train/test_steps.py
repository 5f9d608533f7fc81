"""The jitted steps: what they compute, apply and report."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from structure import same_structure

from vaani_jax import leaves
from vaani_jax.evaluate.loss import make_eval_step
from vaani_jax.model.transformer import Vaani
from vaani_jax.train.optimizers import OptimConfig, make_optimizer
from vaani_jax.train.schedules import Schedule
from vaani_jax.train.state import init_state, layer_norms
from vaani_jax.train.steps import make_adjust_step, make_report_step, make_train_step
from vaani_jax.train.tuner import HyperparameterTuner
from vaani_jax.train.tuner.verdict import NON_FINITE

MODEL = Vaani().changed(
    vocab_size=11, dim=16, n_layers=1, n_heads=2, ffn_dim=32, max_seq_len=8
)
# A large eps keeps Adam from turning rounding errors into signs.
OPTIM = OptimConfig(warmup_steps=4, schedule="two_stage", eps=1e-3, clip_norm=0.5)
PEAK, STEPS = 1e-2, 40
# Most of the time here is spent in LLVM: what it optimizes is not what is tested.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def _model(**changes):
    return MODEL.changed(**changes)


@functools.cache
def _init(config):
    return jit(lambda seed: init_state(config, make_optimizer(OPTIM), seed))


def _state(config=MODEL, seed=0):
    return _init(config)(seed)


@functools.cache
def _train_step(config=MODEL, **options):
    schedule = Schedule(OPTIM, PEAK, STEPS)
    return jit(make_train_step(config, make_optimizer(OPTIM), schedule, **options))


@functools.cache
def _forward(config=MODEL):
    apply = lambda p, q, x, mix: config.apply(  # noqa: E731
        {"params": p, "quant": q}, x, mix=mix
    )
    return jit(apply)


def _tokens(batch=8, seed=0):
    return np.random.default_rng(seed).integers(11, size=(batch, 9)).astype(np.int32)


def _losses64(logits, targets):
    """Negative log-likelihoods [B, T] in float64."""
    logits = np.float64(logits)
    top = logits.max(axis=-1, keepdims=True)
    log_z = top[..., 0] + np.log(np.exp(logits - top).sum(axis=-1))
    return log_z - np.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]


def _loss64(state, tokens, config=MODEL, mix=None):
    logits = _forward(config)(state.params, state.quant, tokens[:, :-1], mix)
    return _losses64(logits, tokens[:, 1:]).mean()


def _at(state, step):
    return dataclasses.replace(state, step=jnp.int32(step))


def _assert_same(one, other):
    leaves = list(zip(*map(jax.tree.leaves, (one, other)), strict=True))
    assert leaves
    for a, b in leaves:
        np.testing.assert_array_equal(a, b)


def _differs(one, other):
    pairs = zip(*map(jax.tree.leaves, (one, other)), strict=True)
    return any(not np.array_equal(a, b) for a, b in pairs)


def test_loss_and_gradient_norm():
    state, tokens = _state(), _tokens()

    def loss(params):
        variables = {"params": params, "quant": state.quant}
        logits: Any = MODEL.apply(variables, tokens[:, :-1])
        chosen = jnp.sum(logits * jax.nn.one_hot(tokens[:, 1:], 11), axis=-1)
        return jnp.mean(jax.nn.logsumexp(logits, axis=-1) - chosen)

    grads = jax.tree.leaves(jit(jax.grad(loss))(state.params))
    norm = np.sqrt(sum((np.float64(g) ** 2).sum() for g in grads))
    assert norm > OPTIM.clip_norm  # so that "unclipped" means something
    after, metrics = _train_step()(state, tokens)
    assert float(metrics["train/loss"]) == pytest.approx(
        _loss64(state, tokens), rel=1e-6
    )
    assert float(metrics["train/gradient_norm"]) == pytest.approx(norm, rel=1e-5)
    assert int(after.step) == 1
    assert {m.dtype for m in metrics.values()} == {jnp.dtype("float32")}


@pytest.mark.parametrize("step", [0, 1, 3, 4, 19, 20, 39])
def test_learning_rate_and_weight_decay_are_those_applied(step):
    done = max(0, (step - 4) / 36)
    rate = PEAK * min(1, (step + 1) / 4) * (1 - done) * (2 / 3 if step >= 20 else 1)
    decay = 0.1 if step < 20 else 0.0
    after, metrics = _train_step()(_at(_state(), step), _tokens())
    assert float(metrics["train/learning_rate"]) == pytest.approx(rate, rel=1e-5)
    assert float(metrics["train/weight_decay"]) == pytest.approx(decay)
    for name in ("learning_rate", "weight_decay"):
        assert after.opt_state.hyperparams[name] == metrics[f"train/{name}"]
    # The first Adam step is at most the rate, and decay is in proportion to it.
    moved = jax.tree.map(jnp.subtract, after.params, _state().params)
    scale = float(jnp.abs(moved["final_norm"]["scale"]).max())
    assert 0 < scale < rate


def test_at_the_end_of_the_schedule_nothing_moves():
    after, metrics = _train_step()(_at(_state(), STEPS), _tokens())
    assert float(metrics["train/learning_rate"]) == 0
    _assert_same(after.params, _state().params)


def test_a_fixed_batch_is_learned():
    state, tokens, losses = _state(), _tokens(), []
    for _ in range(STEPS):
        state, metrics = _train_step()(state, tokens)
        losses.append(float(metrics["train/loss"]))
    assert losses[0] == pytest.approx(np.log(11), abs=0.2)
    assert losses[-1] < 0.8 * losses[0]
    assert int(state.step) == STEPS


@pytest.mark.parametrize("parts", [2, 8])
def test_accumulation_equals_the_large_batch(parts):
    whole = pieces = _state()
    step = _train_step(accumulation_steps=parts)
    for i in range(3):
        whole, expected = _train_step()(whole, _tokens(seed=i))
        pieces, metrics = step(pieces, _tokens(seed=i))
        for key, value in metrics.items():
            assert float(value) == pytest.approx(float(expected[key]), rel=1e-4)
    assert _differs(whole.params, _state().params)
    for a, b in zip(*map(jax.tree.leaves, (pieces, whole)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)


def test_dropout_depends_on_the_step_and_nothing_else():
    config = _model(dropout=0.3)
    step, state, tokens = _train_step(config), _state(config), _tokens()
    one, metrics = step(state, tokens)
    other, again = step(state, tokens)
    _assert_same(one, other)
    _assert_same(metrics, again)
    losses = [step(_at(state, i), tokens)[1]["train/loss"] for i in range(4)]
    assert len({float(loss) for loss in losses}) == 4
    assert not np.allclose(losses[0], _loss64(state, tokens), atol=1e-4)
    plain = [_train_step()(_at(_state(), i), tokens)[1]["train/loss"] for i in range(4)]
    assert len({float(loss) for loss in plain}) == 1


def test_micro_batches_draw_dropout_of_their_own():
    config = _model(dropout=0.3)
    step, state, tokens = _train_step(config, accumulation_steps=2), _state(), _tokens()
    swapped = np.concatenate([tokens[4:], tokens[:4]])
    losses = [float(step(state, t)[1]["train/loss"]) for t in (tokens, swapped)]
    assert abs(losses[0] - losses[1]) > 1e-4  # with one mask for both, they are equal


def _kernels_read(jaxpr, turns=1):
    """How often the magnitude of a kernel is taken, as ternarization begins."""
    count = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "abs":
            shape = equation.outvars[0].aval.shape
            if shape[-2:] == (1000, 1000):
                count += turns * int(np.prod(shape)) // 1000**2
        inner = turns * equation.params.get("length", 1)
        for part in jax.tree.leaves(
            equation.params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")
        ):
            part = getattr(part, "jaxpr", part)
            if hasattr(part, "eqns"):
                count += _kernels_read(part, inner)
    return count


@pytest.mark.parametrize("head", [False, True])
@pytest.mark.parametrize("remat", [False, True])
@pytest.mark.parametrize("scan", [False, True])
def test_kernels_are_ternarized_once_a_step(scan, remat, head):
    """Of 2 layers of 7, and the head: not again for remat, nor for a micro-batch."""
    model = _model(
        vocab_size=1000,
        dim=1000,
        n_layers=2,
        n_heads=2,
        ffn_dim=1000,
        scan_layers=scan,
        remat=remat,
        ternary_head=head,
    )
    optimizer = make_optimizer(OPTIM)
    state = jax.eval_shape(lambda: init_state(model, optimizer, 0))
    found = {}
    for parts in (1, 2, 4):
        schedule = Schedule(OPTIM, PEAK, STEPS)
        step = make_train_step(model, optimizer, schedule, accumulation_steps=parts)
        found[parts] = _kernels_read(jax.make_jaxpr(step)(state, _tokens()).jaxpr)
    assert found == dict.fromkeys((1, 2, 4), 14 + head)


def test_seeds_differ_and_repeat():
    _assert_same(_state(seed=7), _state(seed=7))
    assert _differs(_state().params, _state(seed=7).params)
    assert _differs(_state().key, _state(seed=7).key)


def test_quantization_is_phased_in():
    step, state, tokens = _train_step(mix_steps=4), _state(), _tokens()
    found = [float(step(_at(state, i), tokens)[1]["train/loss"]) for i in range(7)]
    twin = _loss64(state, tokens, _model(quantize=False))
    full = _loss64(state, tokens)
    assert abs(twin - full) > 1e-4
    assert found[0] == pytest.approx(twin, rel=1e-5)
    assert found[4:] == pytest.approx([full] * 3, rel=1e-6)
    for i in (1, 2, 3):
        mixed = _loss64(state, tokens, mix=jnp.float32(i / 4))
        assert found[i] == pytest.approx(mixed, rel=1e-6)
    assert len(set(found)) == 5


def test_a_twin_has_nothing_to_phase_in_or_report():
    config = _model(quantize=False)
    state = _state(config)
    _, metrics = _train_step(config, mix_steps=4)(state, _tokens())
    expected = _loss64(state, _tokens(), config)
    assert float(metrics["train/loss"]) == pytest.approx(expected, rel=1e-6)
    after, stats = jit(make_report_step(config))(state)
    assert stats == {"quant/sparsity": {}, "quant/scale": {}, "quant/flipped": {}}
    _assert_same(after, state)


def test_micro_batches_move_tracked_ranges_one_after_the_other():
    config = _model(activation_tracking="ema", activation_momentum=0.5)
    state, tokens = _state(config), _tokens()

    @jit
    def observe(quant, x):
        variables = {"params": state.params, "quant": quant}
        return config.apply(variables, x, train=True, mutable=["quant"])[1]

    quant = state.quant
    for half in (tokens[:4], tokens[4:]):
        quant = observe(quant, half[:, :-1])["quant"]
    after, _ = _train_step(config, accumulation_steps=2)(state, tokens)
    assert _differs(after.quant, state.quant)
    for a, b in zip(*map(jax.tree.leaves, (after.quant, quant)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


def _codes64(kernel, config):
    """Codes and scale of one kernel [in, out], from the definition."""
    w = np.float64(kernel)
    axis = 0 if config.quantization.weight_granularity == "channel" else None
    gamma = np.abs(w).mean(axis=axis)
    return np.sign(w) * (
        np.abs(w) > config.quantization.threshold * gamma
    ), gamma.mean()


def _kernels(params, name):
    node = params
    for key in name.split("/"):
        node = node[key]
    return np.asarray(node["kernel"])


@pytest.mark.parametrize(("scan", "granularity"), [(0, "tensor"), (1, "channel")])
def test_report_equals_numpy(scan, granularity):
    config = _model(
        n_layers=2,
        scan_layers=bool(scan),
        weight_granularity=granularity,
        threshold=0.7,
    )
    state, report = _state(config), jit(make_report_step(config))
    rng = np.random.default_rng(0)
    noisy = jax.tree.map(
        lambda w: w + np.float32(0.01 * rng.standard_normal(w.shape)), state.params
    )
    moved = dataclasses.replace(state, params=noisy)
    after, stats = report(moved)
    assert len(stats["quant/sparsity"]) == (7 if scan else 14)
    for name in stats["quant/sparsity"]:
        old, new = (_kernels(p, name) for p in (state.params, noisy))
        old, new = (x if scan else x[None] for x in (old, new))
        rows = [
            (_codes64(a, config), _codes64(b, config))
            for a, b in zip(old, new, strict=True)
        ]
        expected = {
            "quant/sparsity": [(t == 0).mean() for _, (t, _) in rows],
            "quant/scale": [gamma for _, (_, gamma) in rows],
            "quant/flipped": [(s != t).mean() for (s, _), (t, _) in rows],
        }
        assert 0.01 < expected["quant/flipped"][0] < 0.99
        for key, values in expected.items():
            found = stats[key][name]
            assert found.shape == ((2,) if scan else ())
            np.testing.assert_allclose(found.reshape(-1), values, rtol=1e-5)
        codes = np.stack([t for _, (t, _) in rows])
        np.testing.assert_array_equal(after.codes[name].reshape(codes.shape), codes)
    again, stats = report(after)
    assert {float(jnp.max(v)) for v in stats["quant/flipped"].values()} == {0.0}
    _assert_same(again, after)
    _assert_same(after.params, moved.params)


def test_eval_step_sums_weighted_rows():
    state, tokens = _state(), _tokens(4)
    step = jit(make_eval_step(MODEL))
    logits = _forward()(state.params, state.quant, tokens[:, :-1], None)
    rows = _losses64(logits, tokens[:, 1:]).sum(axis=-1)
    for weights in np.asarray([[1, 1, 1, 1], [1, 0, 1, 0], [0.5, 2, 0, 0]], np.float32):
        total = step(state.variables, tokens, weights)
        assert float(total) == pytest.approx((rows * weights).sum(), rel=1e-6)


# -- With the tuner ---------------------------------------------------------------

TUNER = HyperparameterTuner(
    learning_rate=PEAK, warmup_steps=4, clip_norm=OPTIM.clip_norm, band=(0.5, 0.6)
)


def _tuned_state(config=MODEL, seed=0):
    return jit(lambda: init_state(config, make_optimizer(OPTIM), seed, TUNER))()


def test_layer_norms_make_up_the_global_norm():
    rng = np.random.default_rng(0)
    grads = jax.tree.map(lambda p: rng.normal(size=p.shape), _state().params)
    norms = layer_norms(grads)
    assert set(norms) == {"embedding", "layers_0", "final_norm"}
    for name, part in grads.items():
        squares = sum((np.float64(g) ** 2).sum() for g in jax.tree.leaves(part))
        assert float(norms[name]) == pytest.approx(np.sqrt(squares), rel=1e-5)
    stacked = layer_norms({"layers": {"kernel": jnp.asarray(rng.normal(size=(3, 4)))}})
    assert stacked["layers"].shape == (3,)


def test_while_all_is_calm_the_tuner_changes_nothing():
    plain, tuned = _state(), _tuned_state()
    for i in range(8):
        plain, expected = _train_step()(plain, _tokens(seed=i))
        tuned, metrics = _train_step(tuner=TUNER)(tuned, _tokens(seed=i))
        for key, value in expected.items():
            assert float(metrics[key]) == pytest.approx(float(value), rel=1e-5), key
        assert metrics["verdict"].scale == 1
        assert metrics["tuner/clip_norm"] == OPTIM.clip_norm
    for a, b in zip(*map(jax.tree.leaves, (plain.params, tuned.params)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("tracking", ["token", "ema"])
def test_a_skipped_step_leaves_everything_but_its_count(tracking):
    config = _model(activation_tracking=tracking)
    step = _train_step(config, tuner=TUNER)
    state, _ = step(_tuned_state(config), _tokens())
    # An id past the vocabulary embeds as NaN.
    after, metrics = step(state, np.full_like(_tokens(), 10_000))
    assert metrics["verdict"].kind == NON_FINITE
    assert not np.isfinite(metrics["train/loss"])
    assert after.step == state.step + 1
    _assert_same(after.params, state.params)
    _assert_same(after.quant, state.quant)
    _assert_same(after.opt_state.inner_state, state.opt_state.inner_state)
    after, metrics = step(after, _tokens())
    assert metrics["verdict"].scale == 1
    assert np.isfinite(metrics["train/loss"])


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"scan_layers": True, "n_layers": 2},
        {"activation_tracking": "ema"},
        {"ternary_head": True},
        {"quantize": False},
    ],
)
def test_adjusting_writes_thresholds_and_momentum_where_they_belong(changes):
    config = _model(**changes)
    tuner = HyperparameterTuner(learning_rate=PEAK, momentum=0.99, band=(0.5, 0.6))
    state = jit(lambda: init_state(config, make_optimizer(OPTIM), 0, tuner))()
    after, adjustment = jit(make_adjust_step(config, tuner))(state)
    assert same_structure(after, state)
    before = {jax.tree_util.keystr(k): v for k, v in _leaves(state.quant)}
    seen = set()
    for path, value in _leaves(after.quant):
        key = path[-1].key
        seen.add(key)
        if key == "threshold":  # about 0.31 zeros: too few
            np.testing.assert_allclose(value, 0.5 * 1.15, rtol=1e-6)
        elif key == "momentum":
            np.testing.assert_allclose(value, after.tuner.rules["momentum"].value)
            assert (value != 0.99).all()
        else:
            np.testing.assert_array_equal(value, before[jax.tree_util.keystr(path)])
    assert ("threshold" in seen) == config.quantization.quantize
    assert ("momentum" in seen) == (config.quantization.activation_tracking == "ema")
    assert len(adjustment["sparsity"]) == sum(
        path[-1].key == "threshold" for path, _ in _leaves(state.quant)
    )


def _leaves(tree):
    return jax.tree_util.tree_leaves_with_path(tree)


@pytest.mark.parametrize("family", ["bitnet", "llama", "qwen2", "qwen3"])
def test_every_family_learns(family):
    """From scratch; and its norms and biases take part."""
    model = _model(family=family, head_dim=12)
    state, step = _state(model), _train_step(model)
    tokens, first = _tokens(), state.params
    losses = []
    for _ in range(30):
        state, metrics = step(state, tokens)
        losses.append(float(metrics["train/loss"]))
    assert losses[-1] < 0.9 * losses[0]
    before, after = leaves.named(first), leaves.named(state.params)
    expected = {"bitnet": "sub_norm", "qwen2": "bias", "qwen3": "k_norm"}
    parts = [name for name in before if expected.get(family, "none") in name]
    assert len(parts) == {"bitnet": 2, "llama": 0, "qwen2": 3, "qwen3": 1}[family]
    for name in before:
        assert not np.array_equal(before[name], after[name]), name

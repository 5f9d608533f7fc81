"""Schedules against plain Python, optimizers against float64 numpy."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vaani_jax import leaves
from vaani_jax.errors import VaaniError
from vaani_jax.model.transformer import Vaani, init_variables
from vaani_jax.train import optimizers
from vaani_jax.train.optimizers import OptimConfig, make_optimizer
from vaani_jax.train.schedules import Schedule

PEAK, STEPS = 3e-3, 50
SHAPES = {
    "embedding": (11, 6),
    "final_norm": {"scale": (6,)},
    "layers_0": {
        "norm": {"scale": (6,)},
        "q_proj": {"kernel": (6, 6)},
        "up_proj": {"kernel": (6, 24)},
        "down_proj": {"kernel": (24, 6)},
    },
    "lm_head": {"kernel": (6, 11)},
}
SHAPES["layers_1"] = SHAPES["layers_0"]


def _is_shape(node):
    return isinstance(node, tuple)


def _tree(seed, scale=1.0):
    rng = np.random.default_rng(seed)
    draw = lambda shape: (scale * rng.standard_normal(shape)).astype(np.float32)  # noqa: E731
    return jax.tree.map(draw, SHAPES, is_leaf=_is_shape)


def _stacked(tree):
    tree = dict(tree)
    layers = tree.pop("layers_0"), tree.pop("layers_1")
    return tree | {"layers": jax.tree.map(lambda *x: np.stack(x), *layers)}


@functools.cache
def _jitted(config):
    optimizer = make_optimizer(config)

    @jax.jit
    def step(params, state, grads, numbers):
        state = state._replace(hyperparams=state.hyperparams | numbers)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return jax.jit(optimizer.init), step


def _run(config, params, grads, **numbers):
    """Parameters after one update per gradient; the learning rate grows by PEAK."""
    init, step = _jitted(config)
    state = init(params)
    for i, g in enumerate(grads, start=1):
        written = {"learning_rate": PEAK * i} | numbers
        params, state = step(
            params, state, g, {k: jnp.float32(v) for k, v in written.items()}
        )
    return jax.device_get(params)


def _leaves(tree):
    return {
        "/".join(k.key for k in path): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def _adamw64(params, grads, config, *, ratio=1.0):
    """AdamW with clipping in float64, as its papers write it."""
    params = {k: v.astype(np.float64) for k, v in _leaves(params).items()}
    m = dict.fromkeys(params, 0.0)
    v = dict.fromkeys(params, 0.0)
    for i, tree in enumerate(grads, start=1):
        g = {k: x.astype(np.float64) for k, x in _leaves(tree).items()}
        norm = math.sqrt(sum((x**2).sum() for x in g.values()))
        for k in params:
            clipped = g[k] * min(1.0, config.clip_norm / norm)
            m[k] = config.beta1 * m[k] + (1 - config.beta1) * clipped
            v[k] = config.beta2 * v[k] + (1 - config.beta2) * clipped**2
            m_hat, v_hat = m[k] / (1 - config.beta1**i), v[k] / (1 - config.beta2**i)
            step = m_hat / (np.sqrt(v_hat) + config.eps)
            if not k.endswith("scale"):
                step = step + config.weight_decay * params[k]
            params[k] = params[k] - ratio * PEAK * i * step
    return params


def _shape(config, step):
    warmup = min(config.warmup_steps, STEPS)
    ramp = min(1.0, (step + 1) / warmup) if warmup else 1.0
    done = min(1.0, max(0.0, (step - warmup) / max(1, STEPS - warmup)))
    end = config.final_ratio
    return (
        ramp
        * {
            "constant": 1.0,
            "linear": 1 - done + end * done,
            "cosine": end + (1 - end) * 0.5 * (1 + math.cos(math.pi * done)),
            "two_stage": (1 - done + end * done)
            * (config.second_stage_ratio if step >= STEPS / 2 else 1.0),
        }[config.schedule]
    )


@pytest.mark.parametrize("name", ["linear", "cosine", "constant", "two_stage"])
@pytest.mark.parametrize("warmup", [0, 1, 7, 30, 50, 80])
@pytest.mark.parametrize("final", [0.0, 0.1])
def test_schedule_at_every_step(name, warmup, final):
    config = OptimConfig(
        schedule=name, warmup_steps=warmup, final_ratio=final, second_stage_ratio=0.6
    )
    schedule = Schedule(config, PEAK, STEPS)
    steps = np.arange(STEPS + 5)
    rates = jax.jit(jax.vmap(schedule.learning_rate))(steps)
    expected = [PEAK * _shape(config, int(step)) for step in steps]
    assert rates.dtype == jnp.float32
    np.testing.assert_allclose(rates, expected, rtol=2e-6, atol=1e-9)
    decays = jax.jit(jax.vmap(schedule.weight_decay))(steps)
    dropped = (steps >= STEPS / 2) & (name == "two_stage")
    np.testing.assert_array_equal(decays, np.where(dropped, 0, np.float32(0.1)))


def test_schedule_passes_its_landmarks():
    config = OptimConfig(schedule="cosine", warmup_steps=10, final_ratio=0.1)
    schedule = Schedule(config, 1.0, 110)
    for step, rate in [(0, 0.1), (4, 0.5), (9, 1), (10, 1), (60, 0.55), (110, 0.1)]:
        assert float(schedule.learning_rate(jnp.int32(step))) == pytest.approx(
            rate, rel=1e-6
        )


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("clip_norm", [0.5, 1e6])
def test_adamw_equals_numpy(stacked, clip_norm):
    config = OptimConfig(weight_decay=0.3, beta1=0.8, beta2=0.9)
    params, grads = _tree(0), [_tree(i, scale=i / 3) for i in range(1, 6)]
    expected = _adamw64(params, grads, dataclasses.replace(config, clip_norm=clip_norm))
    written = {"clip_norm": clip_norm}
    if stacked:
        result = _run(config, _stacked(params), list(map(_stacked, grads)), **written)
        layers = result.pop("layers")
        for i in range(2):
            result[f"layers_{i}"] = jax.tree.map(lambda x, i=i: x[i], layers)
    else:
        result = _run(config, params, grads, **written)
    result = _leaves(result)
    assert result.keys() == expected.keys()
    for name, value in result.items():
        np.testing.assert_allclose(value, expected[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["adamw", "muon"])
@pytest.mark.parametrize("stacked", [False, True])
def test_only_matrices_decay(name, stacked):
    params = _stacked(_tree(0)) if stacked else _tree(0)
    zeros = jax.tree.map(np.zeros_like, params)
    result = _leaves(_run(OptimConfig(name=name), params, [zeros], learning_rate=2.0))
    for key, before in _leaves(params).items():
        matrix = key == "embedding" or key.endswith("kernel")
        ratio = 1.0 if name == "adamw" or key.startswith("layers") else 0.15
        expected = before.astype(np.float64) * (1 - 2.0 * 0.1 * ratio * matrix)
        np.testing.assert_allclose(result[key], expected, rtol=1e-6)
        assert matrix or np.array_equal(result[key], before)


@pytest.mark.parametrize("key", ["q_proj", "up_proj", "down_proj"])
def test_muon_update_is_nearly_orthogonal(key):
    params, grads = _tree(0), _tree(1)
    after = _run(OptimConfig(name="muon"), params, [grads], weight_decay=0.0)
    before, after = (np.float64(t["layers_0"][key]["kernel"]) for t in (params, after))
    update, gradient = (before - after) / PEAK, grads["layers_0"][key]["kernel"]
    rows, columns = gradient.shape
    singular = np.linalg.svd(update, compute_uv=False) / max(1, columns / rows) ** 0.5
    assert singular.min() > 0.65
    assert singular.max() < 1.25
    # It keeps the singular vectors: against U V^T of the gradient, the product of
    # the update is symmetric and positive.
    u, _, vt = np.linalg.svd(np.float64(gradient), full_matrices=False)
    rotated = u.T @ update @ vt.T
    np.testing.assert_allclose(rotated, np.diag(np.diag(rotated)), atol=1e-3)
    assert np.diag(rotated).min() > 0


def test_muon_leaves_the_rest_to_adamw_at_the_reduced_rate():
    params, grads = _tree(0), [_tree(i) for i in range(1, 4)]
    config = OptimConfig(name="muon")
    expected = _adamw64(params, grads, config, ratio=0.15)
    result = _leaves(_run(config, params, grads))
    adamw = [k for k in result if not (k[:6] == "layers" and k[-6:] == "kernel")]
    assert len(adamw) == 5
    for name in adamw:
        np.testing.assert_allclose(result[name], expected[name], rtol=1e-5, atol=1e-6)
    for name in result.keys() - set(adamw):
        assert np.abs(result[name] - expected[name]).max() > 1e-3


def test_muon_of_stacked_layers_is_that_of_each():
    config = OptimConfig(name="muon")
    params, grads = _tree(0), [_tree(i) for i in range(1, 4)]
    one = _stacked(_run(config, params, grads))
    other = _run(config, _stacked(params), list(map(_stacked, grads)))
    for name, value in _leaves(one).items():
        np.testing.assert_allclose(value, _leaves(other)[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_the_numbers_in_the_state_are_those_applied(name):
    params, grads = _tree(0), [_tree(1)]
    config = OptimConfig(name=name)
    frozen = _run(config, params, grads, learning_rate=0.0)
    for before, after in zip(*map(jax.tree.leaves, (params, frozen)), strict=True):
        np.testing.assert_array_equal(before, after)
    base = _run(config, params, grads)
    plain = _run(config, params, grads, weight_decay=0.0)
    kernel, was, now = (
        np.float64(t["layers_0"]["q_proj"]["kernel"]) for t in (params, base, plain)
    )
    np.testing.assert_allclose(now - was, 0.1 * PEAK * kernel, atol=1e-6)
    np.testing.assert_array_equal(
        plain["final_norm"]["scale"], base["final_norm"]["scale"]
    )


def test_the_state_begins_with_the_numbers_of_the_config():
    config = OptimConfig(weight_decay=0.25, clip_norm=2.0)
    state = make_optimizer(config).init({"kernel": jnp.zeros((2, 2))})
    numbers = {"learning_rate": 0.0, "weight_decay": 0.25, "clip_norm": 2.0}
    assert {k: float(v) for k, v in state.hyperparams.items()} == numbers
    assert {v.dtype for v in state.hyperparams.values()} == {jnp.dtype("float32")}


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_the_first_moment_may_be_kept_in_bfloat16(name):
    params, grads = _tree(0), [_tree(i) for i in range(1, 6)]
    results = {}
    dtypes: dict[str, dict[str, set[str]]] = {}
    for dtype in ("float32", "bfloat16"):
        config = OptimConfig(name=name, moment_dtype=dtype, weight_decay=0.0)
        init, step = _jitted(config)
        state = start = init(params)
        after = params
        numbers = {"learning_rate": jnp.float32(PEAK)}
        for g in grads:
            after, state = step(after, state, g, numbers)
        for a, b in zip(jax.tree.leaves(start), jax.tree.leaves(state), strict=True):
            assert (a.dtype, a.shape) == (b.dtype, b.shape)
        results[dtype] = _leaves(after)
        dtypes[dtype] = {}
        for path, leaf in jax.tree_util.tree_leaves_with_path(state):
            if leaf.ndim and "ns_coeffs" not in (names := jax.tree_util.keystr(path)):
                dtypes[dtype].setdefault("mu" if ".mu" in names else "nu", set()).add(
                    leaf.dtype.name
                )
    assert dtypes["float32"] == {"mu": {"float32"}, "nu": {"float32"}}
    assert dtypes["bfloat16"] == {"mu": {"bfloat16"}, "nu": {"float32"}}
    for key, before in _leaves(params).items():
        moved, other = (results[d][key] - before for d in ("float32", "bfloat16"))
        assert 0 < np.abs(moved - other).max() < 0.05 * np.abs(moved).max()
        assert results["bfloat16"][key].dtype == np.float32


def test_masks_know_stacked_and_unrolled_names():
    for params in (_tree(0), _stacked(_tree(0))):
        for name, decays in _leaves(optimizers.decay_mask(params)).items():
            assert bool(decays) == (not name.endswith("scale"))
        for name, label in _leaves(optimizers.muon_labels(params)).items():
            inside = name.startswith("layers") and name.endswith("kernel")
            assert str(label) == ("muon" if inside else "adamw")


@pytest.mark.parametrize("scan_layers", [False, True])
def test_vectors_neither_decay_nor_go_to_muon(scan_layers):
    model = Vaani().changed(
        vocab_size=8, qk_norm=True, attention_bias=True, scan_layers=scan_layers
    )
    params = jax.eval_shape(lambda: init_variables(model, jax.random.key(0))["params"])
    decays = leaves.named(optimizers.decay_mask(params))
    labels = leaves.named(optimizers.muon_labels(params))
    vectors = {"scale", "bias"}
    assert vectors <= {name.rpartition("/")[2] for name in decays}
    for name in decays:
        vector = name.rpartition("/")[2] in vectors
        assert decays[name] == (not vector)
        muon = not vector and name.startswith("layers")
        assert labels[name] == ("muon" if muon else "adamw")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("warmup_steps", -1),
        ("accumulation_steps", 0),
        ("clip_norm", 0.0),
        ("weight_decay", -0.1),
        ("beta1", 1.0),
        ("beta2", -0.1),
        ("momentum", 1.5),
    ],
)
def test_bad_config(name, value):
    with pytest.raises(VaaniError, match=f"optim.{name}"):
        OptimConfig(**{name: value})


@pytest.mark.parametrize("peak", [0.0, -1e-3])
def test_bad_learning_rate(peak):
    with pytest.raises(VaaniError, match="learning_rate"):
        Schedule(OptimConfig(), peak, 10)

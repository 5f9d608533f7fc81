"""The tuner's functions: what they see, what they set, and within which bounds."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from structure import same_structure

from vaani_jax.errors import VaaniError
from vaani_jax.train.tuner import HyperparameterTuner, sparsity, warmup
from vaani_jax.train.tuner import clipping as clip
from vaani_jax.train.tuner import divergence as div
from vaani_jax.train.tuner import learning_rate as lr
from vaani_jax.train.tuner.config import TunerConfig
from vaani_jax.train.tuner.divergence import HEALTHY, LOST, STUCK
from vaani_jax.train.tuner.explosion import PATIENCE, UPDATE_RATIO
from vaani_jax.train.tuner.flat import flattened, nested
from vaani_jax.train.tuner.learning_rate import CALM, FLIPS, GRADIENTS, LOSS, SKIPS
from vaani_jax.train.tuner.memory import NORMS, layer_labels
from vaani_jax.train.tuner.momentum import HIGHEST, LOWEST
from vaani_jax.train.tuner.range_test import GAIN
from vaani_jax.train.tuner.verdict import (
    ACCEPTED,
    GRADIENT,
    NON_FINITE,
    SHRUNK,
    UPDATE,
)

CODES = {
    "a": jnp.asarray(np.random.default_rng(0).integers(-1, 2, (8, 6)), jnp.int8),
    "b": jnp.asarray(np.random.default_rng(1).integers(-1, 2, (2, 8, 6)), jnp.int8),
}
LAYERS = {"embedding": jnp.zeros(()), "layers": jnp.zeros(2)}
STEP = {
    "loss": 2.0,
    "gradient_norm": 1.0,
    "layer_norms": {"embedding": 0.5, "layers": [0.6, 0.4]},
    "update_norm": 0.1,
}
TAUS = {"a": jnp.float32(0.5), "b": jnp.asarray([0.5, 0.5], jnp.float32)}


def make(config=TunerConfig(), **options):
    options = {"learning_rate": 1e-2, "warmup_steps": 4, **options}
    tuner = HyperparameterTuner(config, **options)
    return tuner, tuner.init(CODES, LAYERS)


@functools.cache
def _observe(tuner):
    return jax.jit(lambda state, step: tuner.observe(state, **step))


def see(tuner, state, **changes):
    step = {**STEP, **changes}
    step = jax.tree.map(
        lambda x: jnp.asarray(x, jnp.float32), step, is_leaf=lambda x: type(x) is list
    )
    return _observe(tuner)(state, step)


@functools.cache
def _adjust(tuner):
    return jax.jit(
        lambda state, taus, codes: tuner.adjust(state, thresholds=taus, codes=codes)
    )


def adjust(tuner, state, taus=TAUS, codes=CODES):
    return _adjust(tuner)(state, taus, codes)


def trained(tuner, state, steps=100, seed=0, level=2.0, every=10):
    """A calm stretch: noisy losses and norms, adjusted as the loop does."""
    rng = np.random.default_rng(seed)
    for i in range(steps):
        state, _ = see(
            tuner,
            state,
            loss=level + 0.01 * rng.normal(),
            gradient_norm=1 + 0.05 * rng.normal(),
            update_norm=0.1 + 0.005 * rng.normal(),
        )
        if (i + 1) % every == 0:
            state, _, _ = adjust(tuner, state)
    return state


def test_tables_name_every_case():
    assert len(lr.CAUSES) == FLIPS + 1
    assert len(div.CAUSES) == STUCK + 1


# -- The range test ---------------------------------------------------------------


def sigmoid_curve(rates, middle, drop=1.0, noise=0.0, seed=0):
    rng = np.random.default_rng(seed)
    x = np.log(np.asarray(rates) / middle)
    fall = drop / (1 + np.exp(-2 * x))
    blow_up = np.where(np.asarray(rates) > 20 * middle, 5.0, 0.0)
    return list(4 - fall + blow_up + noise * rng.normal(size=len(rates)))


@pytest.mark.parametrize("steps", [600, 2000])
@pytest.mark.parametrize("middle", [1e-3, 6e-3, 3e-2])
def test_the_pick_is_a_multiple_of_the_middle_of_the_fall(steps, middle):
    tuner, _ = make()
    rates = tuner.range_test.rates(steps)
    picked = tuner.range_test.pick(
        rates, sigmoid_curve(rates, middle, noise=0.01), steps
    )
    assert picked == pytest.approx(GAIN * middle, rel=0.2)


def test_long_runs_extrapolate_a_capped_range_test():
    tuner, _ = make()
    rates = tuner.range_test.rates(2000)
    assert rates == tuner.range_test.rates(16_000)
    losses = sigmoid_curve(rates, 1e-2)
    short, long = (tuner.range_test.pick(rates, losses, n) for n in (2000, 16_000))
    assert long == pytest.approx(short / 2, rel=1e-6)  # 8 ** (1 / 3)


def test_losses_that_blow_up_early_end_the_test_there():
    tuner, _ = make()
    rates = tuner.range_test.rates(2000)
    losses = sigmoid_curve(rates, 1e-3)
    whole = tuner.range_test.pick(rates, losses, 2000)
    cut = [*losses[:80], math.nan]
    assert tuner.range_test.pick(rates, cut, 2000) == pytest.approx(whole)


@pytest.mark.parametrize("drop", [0.0, -1.0])
def test_no_drop_no_pick(drop):
    tuner, _ = make()
    rates = tuner.range_test.rates(2000)
    losses = sigmoid_curve(rates, 1e-2, drop=drop, noise=0.1)
    assert tuner.range_test.pick(rates, losses, 2000) is None


@pytest.mark.parametrize("steps", [1, 399, 400, 600, 2000, 50_000])
def test_the_range_test_costs_a_twentieth_at_most(steps):
    tuner, _ = make()
    rates = tuner.range_test.rates(steps)
    assert len(rates) <= steps / 20
    assert bool(rates) == (steps >= 400)
    if rates:
        assert rates[0] == pytest.approx(1e-5)
        assert rates[-1] == pytest.approx(1.0)
        ratios = np.diff(np.log(rates))
        np.testing.assert_allclose(ratios, ratios[0])


@pytest.mark.parametrize(
    ("given", "picked", "taken"),
    [
        (0.01, 0.012, 0.01),
        (0.01, 0.02, 0.01),
        (0.01, 0.021, 0.021),
        (0.03, 0.012, 0.012),
        (0.01, None, 0.01),
    ],
)
def test_a_given_learning_rate_is_kept_where_the_test_trusts_it(given, picked, taken):
    tuner, _ = make()
    peak, cause = tuner.range_test.reconcile(given, picked)
    assert peak == taken
    assert cause


# -- Every step -------------------------------------------------------------------


def test_the_applied_rate_is_peak_factor_ramp_decay():
    tuner, state = make()
    state = state.with_rule("learning_rate", factor=jnp.float32(0.5))
    state = state.with_rule("warmup", ramp=jnp.float32(0.25))
    assert tuner.applied(state, jnp.float32(0.8)) == pytest.approx(1e-3)
    held = state.with_rule("range_test", held=jnp.float32(0.7))
    assert tuner.applied(held, jnp.float32(0.8)) == pytest.approx(0.7)


def test_a_calm_warm_up_is_the_schedule_s():
    tuner, state = make(warmup_steps=8)
    ramps = []
    for _ in range(10):
        ramps.append(float(state.rules["warmup"].ramp))
        state, verdict = see(tuner, state)
        assert verdict.kind == ACCEPTED
    np.testing.assert_allclose(ramps, np.minimum(np.arange(1, 11) / 8, 1), rtol=1e-6)
    assert state.rules["warmup"].steps == 8


def test_warm_up_is_faster_while_calm_and_slower_while_not():
    tuner, state = make(warmup_steps=100)
    for _ in range(50):
        state, _ = see(tuner, state)
    fast = 50 - warmup.CALM
    expected = (1 + warmup.CALM + warmup.FAST * fast) / 100
    assert float(state.rules["warmup"].ramp) == pytest.approx(expected, rel=1e-5)
    before = float(state.rules["warmup"].ramp)
    state, _ = see(tuner, state, layer_norms={"embedding": 0.5, "layers": [0.6, 4.0]})
    assert state.memory.calm == 0
    assert float(state.rules["warmup"].ramp) - before == pytest.approx(
        warmup.SLOW / 100, rel=1e-3
    )


@pytest.mark.parametrize("name", ["loss", "gradient_norm", "update_norm"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_step_that_is_not_finite_is_skipped(name, value):
    tuner, state = make()
    state = trained(tuner, state)
    after, verdict = see(tuner, state, **{name: value})
    assert verdict.kind == NON_FINITE
    assert verdict.scale == 0
    assert not verdict.accepted
    for key in ("losses", "gradient_norms", "update_norms", "count"):
        np.testing.assert_array_equal(
            getattr(after.memory, key), getattr(state.memory, key)
        )
    assert jax.tree.all(
        jax.tree.map(np.array_equal, after.memory.layer_norms, state.memory.layer_norms)
    )
    assert after.memory.skipped == state.memory.skipped + 1
    assert after.memory.running == 1
    again, _ = see(tuner, after)
    assert again.memory.running == 0


def test_exploding_gradients_are_skipped_and_the_layer_named():
    tuner, state = make()
    state = trained(tuner, state)
    norms = {"embedding": 0.5, "layers": [0.6, 20.0]}
    _, verdict = see(tuner, state, gradient_norm=20.0, layer_norms=norms)
    assert verdict.kind == GRADIENT
    assert layer_labels(state.memory.layer_norms) == [
        "embedding",
        "layers[0]",
        "layers[1]",
    ]
    assert layer_labels(state.memory.layer_norms)[int(verdict.layer)] == "layers[1]"
    assert verdict.value == 20
    assert verdict.usual == pytest.approx(1, rel=0.1)
    _, verdict = see(tuner, state, gradient_norm=9.0)
    assert verdict.kind == ACCEPTED


def test_nothing_explodes_before_there_is_a_norm_to_compare_with():
    tuner, state = make()
    for norm in (1.0, 1e3, 1e-3, 1e6):
        state, verdict = see(tuner, state, gradient_norm=norm, update_norm=norm)
        assert verdict.kind == ACCEPTED


def test_a_range_test_may_explode():
    tuner, state = make()
    state = trained(tuner, state)
    state = state.with_rule("range_test", held=jnp.float32(1e-3))
    _, verdict = see(tuner, state, gradient_norm=1e3, update_norm=1e3)
    assert verdict.kind == ACCEPTED
    assert verdict.scale == 1
    _, verdict = see(tuner, state, gradient_norm=math.inf)
    assert verdict.kind == NON_FINITE


def test_updates_are_shrunk_then_skipped_then_let_through_shrunk():
    tuner, state = make()
    state = trained(tuner, state)
    usual = float(state.memory.update_median)
    _, verdict = see(tuner, state, update_norm=10 * usual)
    assert verdict.kind == SHRUNK
    assert float(verdict.scale) == pytest.approx(UPDATE_RATIO / 10)
    for _ in range(PATIENCE):
        state, verdict = see(tuner, state, update_norm=100 * usual)
        assert verdict.kind == UPDATE
        assert verdict.scale == 0
    state, verdict = see(tuner, state, update_norm=100 * usual)
    assert verdict.kind == SHRUNK
    assert float(verdict.scale) == pytest.approx(UPDATE_RATIO / 100)
    stored = np.asarray(state.memory.update_norms)
    assert stored[np.isfinite(stored)].max() == pytest.approx(UPDATE_RATIO * usual)


# -- Every interval ---------------------------------------------------------------


def test_medians_and_percentiles_are_numpy_s():
    tuner, state = make(clip_norm=10.0)
    rng = np.random.default_rng(3)
    norms = rng.lognormal(size=300)
    for norm in norms:
        state, _ = see(tuner, state, gradient_norm=norm)
    after, _, _ = adjust(tuner, state)
    window = norms[-NORMS:]
    lower = np.percentile(window, 50, method="lower")
    assert float(after.memory.gradient_median) == pytest.approx(lower, rel=1e-6)
    c = tuner.config
    percentile = np.percentile(window, c.clip_percentile, method="lower")
    assert float(after.rules["clipping"].norm) == pytest.approx(
        clip.MARGIN * percentile, rel=1e-5
    )


@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_the_clipping_threshold_stays_in_its_range(scale):
    tuner, state = make(clip_norm=0.5)
    for _ in range(40):
        state, _ = see(tuner, state, gradient_norm=scale)
    after, _, _ = adjust(tuner, state)
    bound = 0.5 if scale > 1 else 0.5 / 10
    assert float(after.rules["clipping"].norm) == pytest.approx(bound)


def test_small_moves_of_the_clipping_threshold_are_left():
    tuner, state = make(clip_norm=10.0)
    state = trained(tuner, state)
    clip = float(state.rules["clipping"].norm)
    for _ in range(130):
        state, _ = see(tuner, state, gradient_norm=1.03)
    after, _, _ = adjust(tuner, state)
    assert after.rules["clipping"].norm == clip


def test_calm_training_follows_the_schedule():
    tuner, state = make()
    state = trained(tuner, state, steps=400)
    assert state.rules["learning_rate"].factor == 1
    assert state.rules["learning_rate"].ceiling == 1
    assert state.memory.skipped == 0
    assert state.memory.shrunk == 0


def disturbed(state, tuner, kind):
    """A stretch of ten steps with one sign of instability."""
    codes = CODES
    for i in range(10):
        change = {}
        if kind == SKIPS and i > 7:
            change["loss"] = math.nan
        state, _ = see(tuner, state, **change)
    if kind == LOSS:
        for _ in range(20):
            state, _ = see(tuner, state, loss=2.2)
    if kind == GRADIENTS:
        for _ in range(10):
            state, _ = see(tuner, state, gradient_norm=6.0)
    if kind == FLIPS:
        codes = jax.tree.map(lambda t: (-t).astype(jnp.int8), CODES)
        memory = dataclasses.replace(state.memory, flip_rate=jnp.float32(1e-3))
        state = dataclasses.replace(state, memory=memory)
    return adjust(tuner, state, codes=codes)


@pytest.mark.parametrize("kind", [SKIPS, LOSS, GRADIENTS, FLIPS])
def test_signs_of_instability_cut_the_learning_rate_and_are_named(kind):
    tuner, state = make()
    state = trained(tuner, state)
    after, _, adjustment = disturbed(state, tuner, kind)
    assert adjustment["learning_rate"].cause == kind
    assert float(after.rules["learning_rate"].factor) == pytest.approx(lr.CUT)
    assert adjustment["learning_rate"].old == 1


def test_one_bad_batch_cuts_nothing():
    tuner, state = make()
    state = trained(tuner, state)
    state, _ = see(tuner, state, loss=math.nan)
    for _ in range(9):
        state, _ = see(tuner, state)
    after, _, adjustment = adjust(tuner, state)
    assert after.rules["learning_rate"].factor == 1
    assert adjustment["learning_rate"].cause == CALM


def test_cuts_keep_their_distance_stop_at_the_bound_and_recover():
    tuner, state = make()
    state = trained(tuner, state)
    factors = []
    for _ in range(60):
        for i in range(10):
            loss = math.nan if i < 2 else 2.0
            state, _ = see(tuner, state, loss=loss)
        state, _, _ = adjust(tuner, state)
        factors.append(float(state.rules["learning_rate"].factor))
    c = tuner.config
    cuts = np.flatnonzero(np.diff([1.0, *factors]) < 0)
    assert np.diff(cuts).min() >= c.cooldown // c.interval
    assert min(factors) == pytest.approx(lr.FACTOR_MIN)
    state = trained(tuner, state, steps=400)
    assert state.rules["learning_rate"].factor == 1


def test_a_run_that_loses_its_progress_has_diverged():
    tuner, state = make()
    for level in np.linspace(4, 2, 30):
        state = trained(tuner, state, steps=10, level=level)
    _, _, adjustment = adjust(tuner, state)
    assert adjustment["divergence"].kind == HEALTHY
    for _ in range(10):
        state, _ = see(tuner, state, loss=2.3)
    _, _, adjustment = adjust(tuner, state)
    assert (
        adjustment["divergence"].kind == HEALTHY
    )  # a bump: 30 % of 2 nats are not lost
    for _ in range(10):
        state, _ = see(tuner, state, loss=2.8)
    _, _, adjustment = adjust(tuner, state)
    assert adjustment["divergence"].kind == LOST
    assert adjustment["divergence"].loss == pytest.approx(2.8, abs=0.01)
    assert adjustment["divergence"].lowest == pytest.approx(2.0, abs=0.1)


def test_a_loss_far_above_the_first_has_diverged_from_the_start():
    tuner, state = make()
    state, _ = see(tuner, state, loss=4.0)
    for _ in range(20):
        state, _ = see(tuner, state, loss=41.0)
    _, _, adjustment = adjust(tuner, state)
    assert adjustment["divergence"].kind == LOST


def test_while_quantization_is_phased_in_the_loss_may_rise():
    tuner, state = make()
    settling = jax.jit(
        lambda state: tuner.adjust(
            state, thresholds=TAUS, codes=CODES, settling=jnp.asarray(True)
        )
    )
    for level in np.linspace(1.5, 3, 10):
        for _ in range(20):
            state, _ = see(tuner, state, loss=level)
        state, _, adjustment = settling(state)
        assert adjustment["divergence"].kind == HEALTHY
    assert float(state.rules["divergence"].lowest) == pytest.approx(3.0)


def test_nothing_to_apply_for_long_has_diverged():
    tuner, state = make()
    state = trained(tuner, state)
    for i in range(PATIENCE):
        _, _, adjustment = adjust(tuner, state)
        assert adjustment["divergence"].kind == HEALTHY, i
        state, _ = see(tuner, state, loss=math.nan)
    _, _, adjustment = adjust(tuner, state)
    assert adjustment["divergence"].kind == STUCK


def rescues(state):
    own = state.rules["divergence"]
    return int(own.rescues), int(own.rescues_running)


def test_a_rescue_lowers_the_ceiling_and_forgets():
    tuner, state = make()
    state = trained(tuner, state)
    state, _ = see(tuner, state, loss=math.nan)
    after = jax.jit(tuner.rescued)(state)
    assert float(after.rules["learning_rate"].ceiling) == pytest.approx(lr.RESCUE_CUT)
    assert float(after.rules["learning_rate"].factor) == pytest.approx(lr.RESCUE_CUT)
    assert after.memory.count == 0
    assert not np.isfinite(after.memory.losses).any()
    assert after.memory.skipped == 1
    assert (
        int(after.rules["divergence"].rescues),
        int(after.rules["divergence"].rescues_running),
    ) == (1, 1)
    assert after.rules["divergence"].record == state.rules["divergence"].record
    assert same_structure(after, state)
    # It may not recover past the ceiling; a new lowest loss ends the count.
    after = trained(tuner, after, steps=200, level=1.5)
    assert float(after.rules["learning_rate"].factor) == pytest.approx(lr.RESCUE_CUT)
    assert (
        int(after.rules["divergence"].rescues),
        int(after.rules["divergence"].rescues_running),
    ) == (1, 0)


# -- Sparsity ---------------------------------------------------------------------


def ternary(w, tau):
    """Codes in float64, by the definition."""
    gamma = np.abs(w).mean(axis=(-2, -1), keepdims=True)
    tau = np.reshape(tau, (*np.shape(tau), 1, 1))
    return np.sign(w) * (np.abs(w) > tau * gamma)


@pytest.mark.parametrize("band", [(0.3, 0.4), (0.5, 0.6)])
@pytest.mark.parametrize("start", [0.1, 0.5, 2.0])
def test_every_layer_comes_into_the_band_and_stays(start, band):
    rng = np.random.default_rng(4)
    # A Gaussian, a flat and a heavy-tailed kernel, one of them stacked.
    kernels = {
        "a": rng.normal(size=(64, 48)),
        "b": np.stack([rng.uniform(-1, 1, (64, 48)), rng.laplace(size=(64, 48))]),
    }
    tuner = HyperparameterTuner(learning_rate=1e-2, band=band)
    taus = {"a": jnp.float32(start), "b": jnp.full(2, start, jnp.float32)}

    def codes():
        return {
            k: jnp.asarray(ternary(w, np.float64(taus[k])), jnp.int8)
            for k, w in kernels.items()
        }

    state = tuner.init(codes(), LAYERS)
    inside, moved = [], []
    for _ in range(40):
        before = taus
        state, taus, _ = adjust(tuner, state, taus, codes())
        ratios = [np.ravel(taus[k] / before[k]) for k in taus]
        moved.append(np.abs(np.log(np.concatenate(ratios))).max())
        shares = [np.mean(t == 0, axis=(-2, -1)) for t in codes().values()]
        zeros = np.concatenate([np.ravel(share) for share in shares])
        inside.append(((zeros >= band[0]) & (zeros <= band[1])).all())
    assert all(inside[20:])  # 200 steps
    assert max(moved) <= math.log(sparsity.RATE) + 1e-5
    assert moved[-1] == 0  # and rests


def test_layers_are_corrected_each_in_its_own_direction():
    tuner = HyperparameterTuner(learning_rate=1e-2, band=(0.3, 0.4))
    sparse = jnp.zeros((8, 8), jnp.int8)
    dense = jnp.ones((8, 8), jnp.int8)
    codes = {"a": sparse, "b": jnp.stack([dense, sparse])}
    state = tuner.init(codes, LAYERS)
    _, taus, adjustment = adjust(tuner, state, TAUS, codes)
    assert taus["a"] < 0.5
    assert taus["b"][0] > 0.5
    assert taus["b"][1] < 0.5
    np.testing.assert_array_equal(adjustment["sparsity"]["b"].cause, [0, 1])


def test_thresholds_stay_in_their_bounds():
    tuner = HyperparameterTuner(learning_rate=1e-2, band=(0.3, 0.4))
    codes = {"a": jnp.zeros((8, 8), jnp.int8), "b": jnp.ones((2, 8, 8), jnp.int8)}
    state, taus = tuner.init(codes, LAYERS), TAUS
    for _ in range(60):
        state, taus, _ = adjust(tuner, state, taus, codes)
    assert taus["a"] == pytest.approx(sparsity.LOWEST)
    np.testing.assert_allclose(taus["b"], sparsity.HIGHEST)


def test_without_a_band_thresholds_are_left_alone():
    tuner, state = make()
    _, taus, adjustment = adjust(tuner, state)
    assert adjustment["sparsity"] == {}
    assert jax.tree.all(jax.tree.map(np.array_equal, taus, TAUS))


# -- Validation loss, activation ranges, the whole --------------------------------


def test_rising_validation_loss_cuts_for_good():
    tuner, state = make()
    see_evaluation = jax.jit(tuner.see_evaluation)
    cuts = []
    for loss in (2.0, 1.8, 1.9, 1.83, 1.9, 1.9, 1.7):
        state, change = see_evaluation(state, jnp.float32(loss))
        cuts.append(int(change.cause))
    assert cuts == [0, 0, 0, 0, 0, 1, 0]
    assert float(state.rules["learning_rate"].ceiling) == pytest.approx(lr.CUT)
    state = trained(tuner, state, steps=200)
    assert float(state.rules["learning_rate"].factor) == pytest.approx(lr.CUT)


def test_a_cut_that_does_not_end_the_rise_is_taken_back():
    """As where the held-out text is of another kind: the learning rate is no cause."""
    tuner, state = make()
    see_evaluation = jax.jit(tuner.see_evaluation)
    causes, ceilings = [], []
    rising = (2.0, 2.1, 2.2, 2.3, 2.4, 2.5, 2.6, 2.7)
    for loss in (*rising, 1.9, 2.1, 2.2, 1.93, 1.91, 2.1, 2.2, 2.3):
        state, change = see_evaluation(state, jnp.float32(loss))
        causes.append(int(change.cause))
        ceilings.append(float(state.rules["learning_rate"].ceiling))
    cut, back = lr.CUT_BACK, lr.TAKEN_BACK
    assert causes[:8] == [0, 0, cut, 0, back, 0, 0, 0]
    assert ceilings[2] == pytest.approx(lr.CUT)
    assert ceilings[7] == pytest.approx(1.0)
    # A new lowest loss: the rule is there again; what is near it is no rise.
    assert causes[8:] == [0, 0, cut, 0, 0, 0, back, 0]
    assert ceilings[-1] == pytest.approx(1.0)


def test_the_activation_momentum_grows_while_calm_within_bounds():
    tuner, state = make(momentum=0.99)
    seen = []
    for _ in range(40):
        state = trained(tuner, state, steps=10)
        seen.append(float(state.rules["momentum"].value))
    assert (np.diff(seen) >= 0).all()
    assert np.float32(LOWEST) <= seen[0] < seen[-1] <= HIGHEST
    assert seen[-1] == pytest.approx(1 - 10 / 410, abs=0.1 * (1 - seen[-1]))
    state, _ = see(tuner, state, loss=math.nan)
    state, _, _ = adjust(tuner, state)
    assert float(state.rules["momentum"].value) == pytest.approx(LOWEST)


def test_without_tracked_ranges_the_momentum_is_left_alone():
    tuner, state = make()
    assert (
        trained(tuner, state).rules["momentum"].value == state.rules["momentum"].value
    )


def test_pure_and_of_one_structure():
    """Equal with and without jit, and fit to be a carry of `lax.scan`."""
    tuner, state = make(momentum=0.99, band=(0.3, 0.4))
    step = jax.tree.map(
        lambda x: jnp.asarray(x, jnp.float32), STEP, is_leaf=lambda x: type(x) is list
    )
    plain, _ = tuner.observe(state, **step)
    compiled, _ = see(tuner, state)
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(compiled), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)

    def body(state, _):
        state, verdict = tuner.observe(state, **step)
        state, _, _ = tuner.adjust(state, thresholds=TAUS, codes=CODES)
        state, _ = tuner.see_evaluation(state, step["loss"])
        return tuner.rescued(state), verdict.kind

    state, kinds = jax.lax.scan(body, state, length=3)
    assert kinds.tolist() == [ACCEPTED] * 3
    assert state.rules["divergence"].rescues == 3


def test_aggressive_is_twice_as_often_and_twice_as_far():
    calm, _ = make()
    keen, _ = make(aggressive=True)
    assert keen.config.interval * 2 == calm.config.interval
    assert keen.config.cooldown * 2 == calm.config.cooldown
    states = [trained(tuner, state) for tuner, state in (make(), make(aggressive=True))]
    factors = [
        float(disturbed(state, tuner, GRADIENTS)[0].rules["learning_rate"].factor)
        for state, tuner in zip(states, (calm, keen), strict=True)
    ]
    assert factors == [pytest.approx(lr.CUT), pytest.approx(lr.CUT**2)]
    rescued = keen.rescued(states[1]).rules["learning_rate"].factor
    assert float(rescued) == pytest.approx(lr.RESCUE_CUT**2)


@pytest.mark.parametrize(
    "change",
    [
        {"interval": 0},
        {"cooldown": -1},
        {"probe_share": 0.6},
        {"skip_ratio": 0.5},
        {"clip_percentile": 0.0},
        {"rescues_max": -1},
    ],
)
def test_impossible_bounds_are_refused(change):
    with pytest.raises(VaaniError, match=rf"tuner\.{next(iter(change))} is"):
        TunerConfig(**change)


# -- Old and new rules -------------------------------------------------------------


def test_the_flat_form_of_version_0_1_comes_back():
    tuner, state = make(momentum=0.9, band=(0.3, 0.4))
    state = trained(tuner, state)
    flat = flattened(state)
    assert len(jax.tree.leaves(flat)) == len(jax.tree.leaves(state))
    assert flat.warmup == state.rules["warmup"].steps
    back = nested(flat, tuner)
    assert same_structure(back, state)
    jax.tree.map(np.testing.assert_array_equal, back, state)

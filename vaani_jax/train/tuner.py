r"""HyperparameterTuner: sets, while training, what people otherwise set by hand.

Pure functions of a state that lives inside `TrainState`, at three paces:

* once, before the first step: a range test (L. N. Smith, arXiv:1506.01186). The
  learning rate rises exponentially over a few steps on a throw-away copy of the state,
  and `pick_learning_rate` reads the peak of the schedule off the losses.
* `observe`, every step: judges the step before it is applied. A non-finite or exploding
  one is skipped, an oversized update shrunk; warm-up advances, faster while
  training is calm and slower while it is not.
* `adjust`, every ``interval`` steps: the factor on the learning rate, the clipping
  threshold (a percentile of past gradient norms, as arXiv:2007.14469 has it), the
  ternary thresholds, the momentum of tracked activation ranges, and whether the run has
  diverged.

The learning rate applied is ``peak * factor * ramp * decay(step)``, where ``decay`` is
the schedule's. Past values are kept in rings and summed up by medians, so that a spike
moves nothing by itself.

The thresholds follow from the Gaussian of the kernels: the share of zeros of
``N(0, sigma^2)`` at ``tau`` is ``erf(c tau)``, so that a kernel with share ``s`` comes
to the share ``a`` at ``tau * P((1 + a) / 2) / P((1 + s) / 2)``, P the normal quantile.

Nothing here knows the model: kernels and layers are names.
"""

import dataclasses
import math
import statistics
from collections.abc import Sequence

import flax.struct
import jax
import jax.numpy as jnp
from jax.scipy.special import ndtri

from vaani_jax.errors import VaaniError
from vaani_jax.settings import key

Array = jax.Array


ByName = dict[str, Array]


# Verdicts of `observe`.
ACCEPTED, NON_FINITE, GRADIENT, UPDATE, SHRUNK = range(5)


VERDICTS = (
    "accepted",
    "loss or gradients are not finite",
    "gradients explode",
    "update explodes",
    "update oversized",
)


# Causes of a change of the learning rate's factor.
CALM, SKIPS, LOSS, GRADIENTS, FLIPS = range(5)


CAUSES = (
    "training is calm",
    "steps were skipped",
    "the loss rises",
    "gradient norms rise",
    "codes flip more",
)


# Causes of going back.
HEALTHY, LOST, STUCK = range(3)


DIVERGENCES = ("healthy", "the loss left what was reached", "no step can be applied")


LOSSES, RECENT = 64, 16  # steps that the loss's trend looks back on; the newest of them


NORMS = 128  # steps of gradient and update norms kept


DEVIATION = 1.4826  # standard deviation of a normal over its median deviation


@dataclasses.dataclass(frozen=True)
class TunerConfig:
    """Every bound and rate of the tuner."""

    interval: int = key(10, "steps between adjustments")
    probe_share: float = key(0.05, "of the run, the most that the range test costs")
    probe_steps: int = key(
        100,
        "of the range test, at most; below ``probe_steps_min`` of them (in a short "
        "run) there is none",
    )
    probe_steps_min: int = key(20, "fewer than these: no range test")
    probe_low: float = key(1e-5, "learning rate that it begins with")
    probe_high: float = key(1.0, "and ends with")
    probe_drop: float = key(
        0.5,
        "share of the range test's whole drop of the loss; the learning rate where it "
        "is reached is the one that is read",
    )
    probe_gain: float = key(
        4.5, "the peak over that learning rate, for a test of ``probe_share``"
    )
    probe_exponent: float = key(
        1 / 3,
        "how the peak falls with the length of a run whose test is shorter than that "
        "share: about 1/3 in arXiv:2409.19913",
    )
    trust: float = key(
        2.0,
        "factor around the picked peak within which a learning rate that the user "
        "gave is kept",
    )
    cut: float = key(
        0.7,
        "factor on the learning rate at a sign of instability, once per ``cooldown``",
    )
    cooldown: int = key(50, "steps")
    recovery: float = key(
        1.1, "factor on the learning rate per calm interval, back up to 1"
    )
    factor_min: float = key(0.1, "lowest factor on the schedule, without rescues")
    overfit_rise: float = key(
        0.02,
        "share by which validation loss must exceed its lowest, at two evaluations "
        "running, for the learning rate to be cut for good",
    )
    skip_ratio: float = key(
        10.0, "gradient norm over its running median at which a step is skipped"
    )
    update_skip_ratio: float = key(20.0, "update norm over its running median likewise")
    update_ratio: float = key(
        5.0, "update norm over its running median to which updates are shrunk"
    )
    patience: int = key(
        30,
        "skipped steps running that are borne; more are a divergence where the "
        "gradients explode, and are let through, shrunk, where only the update does",
    )
    spike_ratio: float = key(
        4.0, "norms over their running medians that count as not calm"
    )
    rise_sigma: float = key(
        4.0, "standard errors by which the loss must rise to be a sign"
    )
    flip_ratio: float = key(
        4.0, "codes that flip in a step, over their running mean, likewise"
    )
    diverged_share: float = key(
        0.3, "share of the loss's whole drop that must be lost again for a divergence"
    )
    diverged_floor: float = key(
        0.2, "least rise of the loss for a divergence, as a share of it"
    )
    diverged_ratio: float = key(
        10.0, "loss over that of the first step that is one in any case"
    )
    rescue_cut: float = key(
        0.5, "factor on the learning rate after going back, for good"
    )
    rescues_max: int = key(3, "times to go back without a new lowest loss in between")
    clip_percentile: float = key(90.0, "of past gradient norms, in [0, 100]")
    clip_margin: float = key(1.5, "clipping threshold over that percentile")
    clip_range: float = key(
        10.0,
        "how far below the configured clipping threshold it may come, a factor; it is "
        "never above",
    )
    warmup_fast: float = key(
        1.5, "speed of the warm-up after ``warmup_calm`` calm steps"
    )
    warmup_slow: float = key(0.25, "its speed at a step that is not calm")
    warmup_calm: int = key(20, "steps")
    threshold_rate: float = key(
        1.15, "largest factor on a ternary threshold per interval"
    )
    threshold_min: float = key(0.02, "lowest ternary threshold, in units of mean|W|")
    threshold_max: float = key(5.0, "highest ternary threshold, in units of mean|W|")
    band_margin: float = key(
        0.25, "share of the sparsity band at either edge that is left in time"
    )
    momentum_min: float = key(0.9, "lowest momentum of the activation range")
    momentum_max: float = key(0.999, "highest momentum of the activation range")
    momentum_steps: float = key(
        10.0, "after n calm steps the momentum is ``1 - m / (n + m)``"
    )
    dead_band: float = key(
        0.1, "least relative change of clipping threshold and ``1 - momentum``"
    )

    def __post_init__(self) -> None:
        def must(holds: bool, rule: str) -> None:
            if not holds:
                raise VaaniError(f"tuner: it must be that {rule}")

        must(self.interval >= 1, "interval >= 1")
        must(self.rescues_max >= 0, "rescues_max >= 0")
        must(self.patience >= 1, "patience >= 1")
        must(0 <= self.probe_share <= 0.5, "probe_share is in [0, 0.5]")
        must(self.probe_steps_min >= 8, "probe_steps_min >= 8")
        must(0 < self.probe_low < self.probe_high, "0 < probe_low < probe_high")
        must(0 < self.probe_drop < 1, "probe_drop is in (0, 1)")
        must(self.probe_gain > 0, "probe_gain > 0")
        for name in ("cut", "rescue_cut", "factor_min", "warmup_slow"):
            value = getattr(self, name)
            must(0 < value <= 1, f"{name} is in (0, 1]")
        for name in (
            "trust",
            "recovery",
            "skip_ratio",
            "update_skip_ratio",
            "update_ratio",
            "spike_ratio",
            "flip_ratio",
            "warmup_fast",
            "threshold_rate",
            "clip_range",
        ):
            must(getattr(self, name) >= 1, f"{name} >= 1")
        must(0 < self.clip_percentile <= 100, "clip_percentile is in (0, 100]")
        must(self.clip_margin > 0, "clip_margin > 0")
        must(0 <= self.band_margin < 0.5, "band_margin is in [0, 0.5)")
        must(
            0 < self.threshold_min < self.threshold_max,
            "0 < threshold_min < threshold_max",
        )
        must(
            0 <= self.momentum_min <= self.momentum_max < 1,
            "0 <= momentum_min <= momentum_max < 1",
        )

    def aggressive(self) -> "TunerConfig":
        """Adjusts twice as often, and twice as far in the logarithm."""
        return dataclasses.replace(
            self,
            interval=max(1, self.interval // 2),
            cooldown=self.cooldown // 2,
            cut=self.cut**2,
            recovery=self.recovery**2,
            rescue_cut=self.rescue_cut**2,
            threshold_rate=self.threshold_rate**2,
            warmup_fast=self.warmup_fast**2,
            warmup_slow=self.warmup_slow**2,
        )


@flax.struct.dataclass
class TunerState:
    """What the tuner knows and has set; float32 and int32 scalars where not said.

    Attributes:
      peak: of the learning rate.
      held: learning rate applied as it is, while the range test runs; else 0.
      factor, ceiling: on the schedule, and the largest that it may recover to.
      ramp: share of the warm-up done.
      warmup: steps that it has taken.
      clip_norm: clipping threshold applied.
      momentum: of tracked activation ranges.
      losses [64], gradient_norms [128], update_norms [128]: rings, inf where unset.
      layer_norms: running mean of each layer's gradient norm; 0 where unset.
      count: steps accepted since the rings began.
      gradient_median, update_median: of the rings at the last adjustment; inf before.
      loss_median, loss_deviation: likewise.
      codes: int8 codes of every ternary kernel at the last adjustment.
      flip_rate: running mean of the share of codes that flip in a step; 0 where unset.
      calm: steps since the last one that was not calm.
      since_cut: steps since the factor was cut.
      first: loss of the first step; inf before it.
      lowest, record: lowest smoothed loss since the last rescue, and of all; inf where
        unset.
      skipped, shrunk: steps, in all.
      skipped_before: ``skipped`` at the last adjustment.
      running: steps skipped just now, one after the other.
      best_evaluation, risen: lowest validation loss; evaluations running above it.
      rescues, rescues_running: in all; since the last record.
    """

    peak: Array
    held: Array
    factor: Array
    ceiling: Array
    ramp: Array
    warmup: Array
    clip_norm: Array
    momentum: Array
    losses: Array
    gradient_norms: Array
    update_norms: Array
    layer_norms: ByName
    count: Array
    gradient_median: Array
    update_median: Array
    loss_median: Array
    loss_deviation: Array
    codes: ByName
    flip_rate: Array
    calm: Array
    since_cut: Array
    first: Array
    lowest: Array
    record: Array
    skipped: Array
    shrunk: Array
    skipped_before: Array
    running: Array
    best_evaluation: Array
    risen: Array
    rescues: Array
    rescues_running: Array


@flax.struct.dataclass
class Verdict:
    """What `observe` made of a step.

    Attributes:
      kind: ACCEPTED, NON_FINITE, GRADIENT, UPDATE or SHRUNK, int32.
      scale: to multiply the update with: 0 for a skipped step.
      value, usual: the norm that decided, and its running median.
      layer: the layer whose gradient norm stands out most: an index into the names of
        `layer_labels`.
    """

    kind: Array
    scale: Array
    value: Array
    usual: Array
    layer: Array

    @property
    def accepted(self) -> Array:
        return self.scale > 0


@flax.struct.dataclass
class Change:
    """A setting before and after; ``cause`` is an index into the cause's table."""

    old: Array
    new: Array
    cause: Array


@flax.struct.dataclass
class Adjustment:
    """What `adjust` changed.

    Attributes:
      learning_rate: factor on the schedule; cause of CAUSES.
      clip_norm, momentum: as applied.
      thresholds: by kernel; the cause holds the share of zeros that was seen.
      warm: whether the warm-up is over.
      warm_at: the steps that it took, or has taken so far.
      diverged: HEALTHY, LOST or STUCK.
      loss, lowest: smoothed loss now, and at its lowest.
    """

    learning_rate: Change
    clip_norm: Change
    momentum: Change
    thresholds: dict[str, Change]
    warm: Array
    warm_at: Array
    diverged: Array
    loss: Array
    lowest: Array


def _f32(value: float) -> Array:
    return jnp.asarray(value, jnp.float32)


def _i32(value: int) -> Array:
    return jnp.asarray(value, jnp.int32)


def _finite_median(ring: Array) -> Array:
    """Median of the finite entries; inf where there is none."""
    return _finite_percentile(ring, 50.0)


def _finite_percentile(ring: Array, percent: float) -> Array:
    """Lower percentile of the finite entries; inf where there is none."""
    ordered = jnp.sort(ring)  # inf, that is unset, comes last
    known = jnp.sum(jnp.isfinite(ring))
    index = jnp.floor((known - 1) * (percent / 100)).astype(jnp.int32)
    return jnp.where(known > 0, ordered[jnp.maximum(index, 0)], jnp.inf)


def layer_labels(layer_norms: ByName) -> list[str]:
    """Names of layers, in the order of `Verdict.layer`; stacked ones get an index."""
    labels = []
    for name in sorted(layer_norms):
        value = layer_norms[name]
        if value.ndim:
            labels += [f"{name}[{i}]" for i in range(value.shape[0])]
        else:
            labels.append(name)
    return labels


def _in_order(layer_norms: ByName) -> Array:
    return jnp.concatenate([jnp.ravel(layer_norms[k]) for k in sorted(layer_norms)])


def zeros_share(codes: Array) -> Array:
    """Share of zeros of codes [..., K, N]: [...]."""
    return jnp.mean(codes == 0, axis=(-2, -1), dtype=jnp.float32)


class HyperparameterTuner:
    """The tuner's functions: pure and jittable, everything they need is in the state.

    Attributes:
      config: the bounds and rates in force.
      learning_rate: peak of the schedule to begin with.
      warmup_steps: of the schedule, at normal speed.
      clip_norm: the configured clipping threshold.
      momentum: the configured momentum of activation ranges; None where none is
        tracked.
      band: lowest and highest share of zeros of every ternary kernel; None leaves the
        thresholds alone.
    """

    def __init__(
        self,
        config: TunerConfig = TunerConfig(),
        *,
        learning_rate: float,
        warmup_steps: int = 0,
        clip_norm: float = 1.0,
        momentum: float | None = None,
        band: tuple[float, float] | None = None,
        aggressive: bool = False,
    ) -> None:
        self.config = config.aggressive() if aggressive else config
        self.learning_rate = learning_rate
        self.warmup_steps = warmup_steps
        self.clip_norm = clip_norm
        self.momentum = momentum
        self.band = band

    def init(self, codes: ByName, layer_norms: ByName) -> TunerState:
        """The state before the first step.

        Args:
          codes: int8 codes of every ternary kernel, [K, N] or [layers, K, N].
          layer_norms: a gradient norm per layer, [] or [layers]; only the shapes count.
        """
        inf = math.inf
        return TunerState(
            peak=_f32(self.learning_rate),
            held=_f32(0),
            factor=_f32(1),
            ceiling=_f32(1),
            ramp=_f32(1 / max(1, self.warmup_steps)),
            warmup=_i32(1),
            clip_norm=_f32(self.clip_norm),
            momentum=_f32(self.momentum or 0.0),
            losses=jnp.full(LOSSES, inf, jnp.float32),
            gradient_norms=jnp.full(NORMS, inf, jnp.float32),
            update_norms=jnp.full(NORMS, inf, jnp.float32),
            layer_norms={
                name: jnp.zeros(value.shape, jnp.float32)
                for name, value in layer_norms.items()
            },
            count=_i32(0),
            gradient_median=_f32(inf),
            update_median=_f32(inf),
            loss_median=_f32(inf),
            loss_deviation=_f32(inf),
            # Copies: a donated state must not hold one buffer twice.
            codes=jax.tree.map(jnp.array, codes),
            flip_rate=_f32(0),
            calm=_i32(0),
            since_cut=_i32(self.config.cooldown),
            first=_f32(inf),
            lowest=_f32(inf),
            record=_f32(inf),
            skipped=_i32(0),
            shrunk=_i32(0),
            skipped_before=_i32(0),
            running=_i32(0),
            best_evaluation=_f32(inf),
            risen=_i32(0),
            rescues=_i32(0),
            rescues_running=_i32(0),
        )

    def applied(self, state: TunerState, decay: Array) -> Array:
        """The learning rate of the next step, given the schedule's decay in [0, 1]."""
        rate = state.peak * state.factor * state.ramp * decay
        return jnp.where(state.held > 0, state.held, rate)

    def _explodes(self, state: TunerState, gradient_norm: Array) -> Array:
        # The first steps of healthy runs have spikes of their own, and a range test is
        # there to explode.
        return (
            (state.count >= LOSSES)
            & (state.held == 0)
            & (gradient_norm > self.config.skip_ratio * state.gradient_median)
        )

    def sound(self, state: TunerState, loss: Array, gradient_norm: Array) -> Array:
        """Whether an optimizer may take in a gradient: false for what `observe` will
        call NON_FINITE or GRADIENT, known before there is an update."""
        finite = jnp.isfinite(loss) & jnp.isfinite(gradient_norm)
        return finite & ~self._explodes(state, gradient_norm)

    def observe(
        self,
        state: TunerState,
        *,
        loss: Array,
        gradient_norm: Array,
        layer_norms: ByName,
        update_norm: Array,
    ) -> tuple[TunerState, Verdict]:
        """Judges a step that has been computed but not applied; float32 scalars.

        Args:
          state: as the last step left it.
          loss: of the step's batch.
          gradient_norm: global, before clipping.
          layer_norms: of the same gradient, per layer.
          update_norm: global norm of what would be added to the parameters.
        """
        c = self.config
        norms, usual = _in_order(layer_norms), _in_order(state.layer_norms)
        finite = (
            jnp.isfinite(loss) & jnp.isfinite(gradient_norm) & jnp.isfinite(update_norm)
        )
        explodes = self._explodes(state, gradient_norm)
        # Updates grow by themselves during warm-up, and in a range test.
        warm = (state.ramp >= 1) & (state.held == 0)
        ratio = jnp.where(warm, update_norm / state.update_median, 0.0)
        leaps = (ratio > c.update_skip_ratio) & (state.running < c.patience)
        kind = jnp.where(
            ~finite,
            NON_FINITE,
            jnp.where(
                explodes,
                GRADIENT,
                jnp.where(
                    leaps, UPDATE, jnp.where(ratio > c.update_ratio, SHRUNK, ACCEPTED)
                ),
            ),
        ).astype(jnp.int32)
        accepted = (kind == ACCEPTED) | (kind == SHRUNK)
        limit = c.update_ratio * state.update_median
        scale = jnp.where(kind == SHRUNK, limit / update_norm, 1.0)
        scale = jnp.where(accepted, scale, 0.0)

        above = jnp.where(usual > 0, norms / usual, 1.0)
        above = jnp.where(jnp.isfinite(norms), above, jnp.inf)
        spikes = (gradient_norm > c.spike_ratio * state.gradient_median) | jnp.any(
            above > c.spike_ratio
        )
        high = loss > state.loss_median + c.rise_sigma * state.loss_deviation
        is_calm = (kind == ACCEPTED) & ~spikes & ~high
        calm = jnp.where(is_calm, state.calm + 1, 0)
        speed = jnp.where(is_calm, 1.0, c.warmup_slow)
        speed = jnp.where(calm > c.warmup_calm, c.warmup_fast, speed)

        def put(ring: Array, value: Array) -> Array:
            at = state.count % ring.shape[0]
            return ring.at[at].set(jnp.where(accepted, value, ring[at]))

        def mean(old: Array, value: Array) -> Array:
            new = jnp.where(old > 0, 0.95 * old + 0.05 * value, value)
            return jnp.where(accepted, new, old)

        skip = (~accepted).astype(jnp.int32)
        verdict = Verdict(
            kind=kind,
            scale=scale,
            value=jnp.where(kind >= UPDATE, update_norm, gradient_norm),
            usual=jnp.where(kind >= UPDATE, state.update_median, state.gradient_median),
            layer=jnp.argmax(above).astype(jnp.int32),
        )
        state = dataclasses.replace(
            state,
            ramp=jnp.minimum(state.ramp + speed / max(1, self.warmup_steps), 1.0),
            warmup=state.warmup + (state.ramp < 1),
            losses=put(state.losses, loss),
            gradient_norms=put(state.gradient_norms, gradient_norm),
            update_norms=put(state.update_norms, update_norm * scale),
            layer_norms={
                name: mean(state.layer_norms[name], layer_norms[name])
                for name in state.layer_norms
            },
            count=state.count + 1 - skip,
            first=jnp.where(accepted & jnp.isinf(state.first), loss, state.first),
            calm=calm,
            since_cut=state.since_cut + 1,
            skipped=state.skipped + skip,
            shrunk=state.shrunk + (kind == SHRUNK),
            running=jnp.where(accepted, 0, state.running + 1),
        )
        return state, verdict

    def adjust(
        self,
        state: TunerState,
        *,
        thresholds: ByName,
        codes: ByName,
        settling: Array | bool = False,
    ) -> tuple[TunerState, ByName, Adjustment]:
        """Sets everything that is not set every step.

        Args:
          state: of the tuner.
          thresholds: of every ternary kernel, [] or [layers].
          codes: of every ternary kernel, int8, as they are now.
          settling: whether the task itself still grows harder, as while quantisation is
            phased in: the loss may rise then. A bool, may be traced.

        Returns:
          The state, the thresholds to use from now on, and what changed.
        """
        c = self.config
        newest = (state.count - 1 - jnp.arange(LOSSES)) % LOSSES
        ordered = state.losses[newest]  # newest first
        recent = _finite_median(ordered[:RECENT])
        older = _finite_median(ordered[RECENT:])
        known = jnp.isfinite(state.losses)
        middle = _finite_median(state.losses)
        deviation = DEVIATION * _finite_median(
            jnp.where(known, jnp.abs(state.losses - middle), jnp.inf)
        )
        # Standard error of the difference of two medians, normal approximation.
        error = 1.2533 * deviation * math.sqrt(1 / RECENT + 1 / (LOSSES - RECENT))
        full = state.count >= LOSSES
        gradient_median = _finite_median(state.gradient_norms)
        last_norms = state.gradient_norms[
            (state.count - 1 - jnp.arange(RECENT)) % NORMS
        ]
        flipped, flip_rate = self._flips(state, codes)

        # -- learning rate
        skipped = state.skipped - state.skipped_before
        signs = [
            (SKIPS, skipped > 1),  # one bad batch says nothing of the learning rate
            (LOSS, full & (recent - older > c.rise_sigma * error)),
            (GRADIENTS, _finite_median(last_norms) > c.spike_ratio * gradient_median),
            (FLIPS, (state.flip_rate > 0) & (flipped > c.flip_ratio * state.flip_rate)),
        ]
        cause = _i32(CALM)
        for index, sign in reversed(signs):
            cause = jnp.where(sign, index, cause)
        cut = (cause != CALM) & (state.since_cut >= c.cooldown)
        recovered = jnp.minimum(state.factor * c.recovery, state.ceiling)
        factor = jnp.where(
            cut,
            jnp.maximum(state.factor * c.cut, jnp.minimum(c.factor_min, state.factor)),
            jnp.where(
                (cause == CALM) & (state.calm >= c.interval), recovered, state.factor
            ),
        )

        # -- clipping
        wanted = c.clip_margin * _finite_percentile(
            state.gradient_norms, c.clip_percentile
        )
        wanted = jnp.clip(wanted, self.clip_norm / c.clip_range, self.clip_norm)
        moves = jnp.abs(wanted - state.clip_norm) > c.dead_band * state.clip_norm
        enough = state.count >= min(RECENT, NORMS)
        clip_norm = jnp.where(moves & enough, wanted, state.clip_norm)

        # -- momentum of activation ranges
        m = c.momentum_steps
        wanted = jnp.clip(
            1 - m / (state.calm.astype(jnp.float32) + m), c.momentum_min, c.momentum_max
        )
        moves = jnp.abs(wanted - state.momentum) > c.dead_band * (1 - state.momentum)
        tracked = self.momentum is not None
        momentum = jnp.where(moves & tracked, wanted, state.momentum)

        # -- divergence
        has_recent = state.count >= RECENT
        lowest = jnp.where(settling, recent, jnp.minimum(state.lowest, recent))
        lowest = jnp.where(has_recent, lowest, state.lowest)
        rise = jnp.maximum(
            c.diverged_share * jnp.maximum(state.first - lowest, 0.0),
            c.diverged_floor * lowest,
        )
        lost = (recent - lowest > rise) | (recent > c.diverged_ratio * state.first)
        lost = has_recent & lost
        diverged = jnp.where(
            state.running >= c.patience, STUCK, jnp.where(lost, LOST, HEALTHY)
        )
        record = jnp.where(settling, lowest, jnp.minimum(state.record, lowest))

        thresholds, changes = self._thresholds(thresholds, codes)
        adjustment = Adjustment(
            learning_rate=Change(state.factor, factor, cause),
            clip_norm=Change(state.clip_norm, clip_norm, _i32(0)),
            momentum=Change(state.momentum, momentum, _i32(0)),
            thresholds=changes,
            warm=state.ramp >= 1,
            warm_at=state.warmup,
            diverged=diverged.astype(jnp.int32),
            loss=recent,
            lowest=lowest,
        )
        state = dataclasses.replace(
            state,
            factor=factor,
            since_cut=jnp.where(cut, 0, state.since_cut),
            clip_norm=clip_norm,
            momentum=momentum,
            gradient_median=gradient_median,
            update_median=_finite_median(state.update_norms),
            loss_median=jnp.where(full, middle, jnp.inf),
            loss_deviation=jnp.where(full, deviation, jnp.inf),
            codes=codes,
            flip_rate=flip_rate,
            lowest=lowest,
            record=record,
            skipped_before=state.skipped,
            rescues_running=jnp.where(record < state.record, 0, state.rescues_running),
        )
        return state, thresholds, adjustment

    def _flips(self, state: TunerState, codes: ByName) -> tuple[Array, Array]:
        """Share of codes flipped in a step, lately, and its new running mean."""
        if not codes:
            return _f32(0), _f32(0)
        changed = [
            jnp.mean(codes[k] != state.codes[k], dtype=jnp.float32) for k in codes
        ]
        flipped = jnp.mean(jnp.stack(changed)) / self.config.interval
        mean = jnp.where(
            state.flip_rate > 0, 0.9 * state.flip_rate + 0.1 * flipped, flipped
        )
        return flipped, mean

    def _thresholds(
        self, thresholds: ByName, codes: ByName
    ) -> tuple[ByName, dict[str, Change]]:
        """Moves every kernel's sparsity into the band, each in its own direction."""
        if self.band is None:
            return thresholds, {}
        c = self.config
        low, high = self.band
        aim, edge = (low + high) / 2, (high - low) * c.band_margin
        new, changes = {}, {}
        for name, tau in thresholds.items():
            zeros = zeros_share(codes[name])
            seen = jnp.clip(zeros, 0.01, 0.99)
            step = ndtri((1 + aim) / 2) / ndtri((1 + seen) / 2)
            step = jnp.clip(step, 1 / c.threshold_rate, c.threshold_rate)
            moved = jnp.clip(tau * step, c.threshold_min, c.threshold_max)
            outside = (zeros < low + edge) | (zeros > high - edge)
            new[name] = jnp.where(outside, moved, tau).astype(tau.dtype)
            changes[name] = Change(tau, new[name], zeros)
        return new, changes

    def see_evaluation(
        self, state: TunerState, loss: Array
    ) -> tuple[TunerState, Change]:
        """Takes in a validation loss; cuts the learning rate for good if it rises."""
        c = self.config
        best = state.best_evaluation
        risen = jnp.where(loss > best * (1 + c.overfit_rise), state.risen + 1, 0)
        cut = risen >= 2
        ceiling = jnp.where(
            cut, jnp.maximum(state.ceiling * c.cut, c.factor_min), state.ceiling
        )
        factor = jnp.minimum(state.factor, ceiling)
        change = Change(state.factor, factor, cut.astype(jnp.int32))
        state = dataclasses.replace(
            state,
            best_evaluation=jnp.minimum(best, loss),
            risen=jnp.where(cut, 0, risen),
            ceiling=ceiling,
            factor=factor,
        )
        return state, change

    def rescued(self, state: TunerState) -> TunerState:
        """The tuner's state after the run went back: a lower ceiling, no memories."""
        ceiling = state.ceiling * self.config.rescue_cut
        fresh = self.init(state.codes, state.layer_norms)
        return dataclasses.replace(
            fresh,
            peak=state.peak,
            factor=ceiling,
            ceiling=ceiling,
            ramp=state.ramp,
            warmup=state.warmup,
            clip_norm=state.clip_norm,
            momentum=state.momentum,
            first=state.first,
            record=state.record,
            skipped=state.skipped,
            shrunk=state.shrunk,
            skipped_before=state.skipped,
            best_evaluation=state.best_evaluation,
            rescues=state.rescues + 1,
            rescues_running=state.rescues_running + 1,
        )

    def probe_rates(self, num_steps: int) -> list[float]:
        """Learning rates of the range test of a run; empty where it is too short."""
        c = self.config
        n = min(c.probe_steps, int(num_steps * c.probe_share))
        if n < c.probe_steps_min:
            return []
        growth = math.log(c.probe_high / c.probe_low) / (n - 1)
        return [c.probe_low * math.exp(growth * i) for i in range(n)]


def pick_learning_rate(
    rates: Sequence[float],
    losses: Sequence[float],
    num_steps: int,
    config: TunerConfig,
) -> float | None:
    """Reads the peak of the schedule off a range test.

    The point half way down the flank of the curve is the best determined one: the
    minimum and the edge of divergence beyond it move with every batch. A longer test
    reaches it at a lower learning rate, as longer runs want lower ones. Measured on one
    small character model, tests of 30 and 100 steps find it at about a quarter of the
    best peak of a run twenty times as long, with Muon, and with AdamW at 100.

    Args:
      rates: learning rates, rising.
      losses: each before its learning rate is applied; may end in non-finite ones.
      num_steps: of the run.
      config: see its ``probe_*``.

    Returns:
      None where the losses show no drop beyond their noise.
    """
    finite = [loss if math.isfinite(loss) else math.inf for loss in losses]
    reach = 1 if len(rates) < 50 else 2  # a median of three, or five
    smooth = [
        statistics.median(finite[max(0, i - reach) : i + reach + 1])
        for i in range(len(finite))
    ]
    quiet = finite[: max(3, len(rates) // 3)]  # too low a rate to move anything
    start = statistics.median(quiet)
    noise = max(abs(value - start) for value in quiet)
    drop = start - min(smooth)
    if not math.isfinite(start) or drop <= 2 * noise:
        return None
    target = start - config.probe_drop * drop
    after = next(i for i, loss in enumerate(smooth) if loss <= target)
    before = max(0, after - 1)
    share = 1.0
    if smooth[before] > smooth[after]:
        share = (smooth[before] - target) / (smooth[before] - smooth[after])
    read = rates[before] * (rates[after] / rates[before]) ** share
    shorter = min(1.0, len(rates) / (config.probe_share * num_steps))
    return config.probe_gain * read * shorter**config.probe_exponent


def reconcile(
    given: float, picked: float | None, config: TunerConfig
) -> tuple[float, str]:
    """The peak to use, from the user's learning rate and the range test's; and why."""
    if picked is None:
        return given, "the range test shows no slope to read"
    if picked / config.trust <= given <= picked * config.trust:
        return given, f"the range test agrees (it would take {picked:.2g})"
    return picked, f"the range test finds {given:.2g} far from the best"

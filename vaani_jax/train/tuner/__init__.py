r"""HyperparameterTuner: sets, while training, what people otherwise set by hand.

Pure functions of a state that lives inside `TrainState`, at three paces:

* once, before the first step: a range test, from which the peak is read (`range_test`).
* `observe`, every step: judges the step before it is applied. A non-finite or exploding
  one is skipped, an oversized update shrunk; warm-up advances.
* `adjust`, every ``interval`` steps: the factor on the learning rate, the clipping
  threshold, the ternary thresholds, the momentum of tracked activation ranges, and
  whether the run has diverged.

Each of these is a rule, with a file of its own. Here is what they amount to together:
the learning rate applied is ``peak * factor * ramp * decay(step)``, where ``decay`` is
the schedule's. Nothing here knows the model: kernels and layers are names.
"""

import dataclasses
import operator
from collections.abc import Sequence
from functools import reduce
from typing import Any, TypeVar

import flax.struct
import jax
import jax.numpy as jnp

from vaani_jax.train.journal import Event, Journal
from vaani_jax.train.tuner.clipping import Clipping
from vaani_jax.train.tuner.config import TunerConfig
from vaani_jax.train.tuner.divergence import Divergence
from vaani_jax.train.tuner.explosion import Explosion
from vaani_jax.train.tuner.learning_rate import LearningRate
from vaani_jax.train.tuner.memory import (
    Memory,
    above_usual,
    layer_labels,
    make_memory,
    refreshed,
    remembered,
    stands_out,
    summarized,
)
from vaani_jax.train.tuner.momentum import Momentum
from vaani_jax.train.tuner.non_finite import NonFinite
from vaani_jax.train.tuner.range_test import RangeTest
from vaani_jax.train.tuner.rule import (
    ByName,
    Change,
    Rule,
    Setup,
    Step,
    last_of,
)
from vaani_jax.train.tuner.sparsity import Sparsity
from vaani_jax.train.tuner.verdict import (
    ACCEPTED,
    NON_FINITE,
    SHRUNK,
    UPDATE,
    Verdict,
)
from vaani_jax.train.tuner.warmup import Warmup

Array = jax.Array
R = TypeVar("R", bound=Rule)

# In the order in which they adjust, and tell. A further rule is a further row.
RULES: dict[str, type[Rule]] = {
    "range_test": RangeTest,
    "learning_rate": LearningRate,
    "non_finite": NonFinite,
    "explosion": Explosion,
    "clipping": Clipping,
    "momentum": Momentum,
    "warmup": Warmup,
    "sparsity": Sparsity,
    "divergence": Divergence,
}


@flax.struct.dataclass
class TunerState:
    """What the tuner knows and has set.

    Attributes:
      memory: what has been seen.
      rules: the state of each rule that has one, by its name.
    """

    memory: Memory
    rules: dict[str, Any]

    def with_rule(self, name: str, **changes: Any) -> "TunerState":
        """With another state of one rule."""
        changed = dataclasses.replace(self.rules[name], **changes)
        return dataclasses.replace(self, rules={**self.rules, name: changed})


class HyperparameterTuner:
    """The tuner's functions: pure and jittable, everything they need is in the state.

    Attributes:
      config: in force.
      rules: by name, one of each of `RULES`.
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
        """Arguments as in `Setup`."""
        if aggressive:
            config = dataclasses.replace(
                config,
                interval=max(1, config.interval // 2),
                cooldown=config.cooldown // 2,
            )
        self.config = config
        setup = Setup(
            config, learning_rate, warmup_steps, clip_norm, momentum, band, aggressive
        )
        self.rules = {name: rule(setup) for name, rule in RULES.items()}
        # Those with functions of their own.
        self.range_test = self._rule(RangeTest)
        self.learning_rate = self._rule(LearningRate)
        self.divergence = self._rule(Divergence)
        self._non_finite = self._rule(NonFinite)
        self._explosion = self._rule(Explosion)

    def _rule(self, kind: type[R]) -> R:
        return next(rule for rule in self.rules.values() if isinstance(rule, kind))

    def init(self, codes: ByName, layer_norms: ByName) -> TunerState:
        """The state before the first step.

        Args:
          codes: int8 codes of every ternary kernel, [K, N] or [layers, K, N].
          layer_norms: a gradient norm per layer, [] or [layers]; only the shapes count.
        """
        states = {name: rule.init() for name, rule in self.rules.items()}
        return TunerState(
            memory=make_memory(codes, layer_norms),
            rules={name: state for name, state in states.items() if state is not None},
        )

    def applied(self, state: TunerState, decay: Array) -> Array:
        """The learning rate of the next step, given the schedule's decay in [0, 1]."""
        factors = [
            rule.factor(state.rules.get(name)) for name, rule in self.rules.items()
        ]
        known = [factor for factor in factors if factor is not None]
        held = state.rules["range_test"].held
        return jnp.where(held > 0, held, reduce(operator.mul, known) * decay)

    def sound(self, state: TunerState, loss: Array, gradient_norm: Array) -> Array:
        """Whether an optimizer may take in a gradient: false for what `observe` will
        call NON_FINITE or GRADIENT, known before there is an update."""
        finite = self._non_finite.finite(loss, gradient_norm)
        held = state.rules["range_test"].held
        return finite & ~self._explosion.gradients(state.memory, held, gradient_norm)

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
        memory = state.memory
        finite = self._non_finite.finite(loss, gradient_norm, update_norm)
        kind, shrink = self._explosion.judge(
            memory,
            held=state.rules["range_test"].held,
            ramp=state.rules["warmup"].ramp,
            gradient_norm=gradient_norm,
            update_norm=update_norm,
        )
        kind = jnp.where(~finite, NON_FINITE, kind).astype(jnp.int32)
        accepted = (kind == ACCEPTED) | (kind == SHRUNK)
        scale = jnp.where(kind == SHRUNK, shrink, 1.0)
        scale = jnp.where(accepted, scale, 0.0)
        above = above_usual(memory, layer_norms)
        by_update = kind >= UPDATE
        verdict = Verdict(
            kind=kind,
            scale=scale,
            value=jnp.where(by_update, update_norm, gradient_norm),
            usual=jnp.where(by_update, memory.update_median, memory.gradient_median),
            layer=jnp.argmax(above).astype(jnp.int32),
        )
        calm = (kind == ACCEPTED) & ~stands_out(memory, loss, gradient_norm, above)
        calm_steps = jnp.where(calm, memory.calm + 1, 0)
        step = Step(loss, gradient_norm, update_norm, accepted, calm, calm_steps)
        rules = {
            name: self.rules[name].observe(own, step)
            for name, own in state.rules.items()
        }
        memory = remembered(
            memory,
            loss=loss,
            gradient_norm=gradient_norm,
            layer_norms=layer_norms,
            update_norm=update_norm * scale,
            accepted=accepted,
            shrunk=kind == SHRUNK,
            calm=calm_steps,
        )
        return TunerState(memory, rules), verdict

    def adjust(
        self,
        state: TunerState,
        *,
        thresholds: ByName,
        codes: ByName,
        settling: Array | bool = False,
    ) -> tuple[TunerState, ByName, dict[str, Any]]:
        """Sets everything that is not set every step.

        Args:
          state: of the tuner.
          thresholds: of every ternary kernel, [] or [layers].
          codes: of every ternary kernel, int8, as they are now.
          settling: whether the task itself still grows harder, as while quantization is
            phased in: the loss may rise then. A bool, may be traced.

        Returns:
          The state, the thresholds to use from now on, and what changed, by rule.
        """
        memory = state.memory
        seen = summarized(
            memory,
            thresholds=thresholds,
            codes=codes,
            settling=jnp.asarray(settling),
            interval=self.config.interval,
        )
        rules, changes = dict(state.rules), {}
        for name, rule in self.rules.items():
            own, change = rule.adjust(rules.get(name), memory, seen)
            if own is not None:
                rules[name] = own
            if change is not None:
                changes[name] = change
        moved = changes.get("sparsity", {})
        thresholds = {
            name: moved[name].new if name in moved else tau
            for name, tau in thresholds.items()
        }
        return TunerState(refreshed(memory, seen), rules), thresholds, changes

    def see_evaluation(
        self, state: TunerState, loss: Array
    ) -> tuple[TunerState, Change]:
        """Takes in a validation loss; cuts the learning rate if it rises."""
        own = state.rules["learning_rate"]
        own, change = self.learning_rate.see_evaluation(own, loss)
        rules = {**state.rules, "learning_rate": own}
        return dataclasses.replace(state, rules=rules), change

    def rescued(self, state: TunerState) -> TunerState:
        """The tuner's state after the run went back: a lower ceiling, no memories."""
        old = state.memory
        memory = dataclasses.replace(
            make_memory(old.codes, old.layer_norms),
            skipped=old.skipped,
            shrunk=old.shrunk,
        )
        rules = {
            name: self.rules[name].rescued(own, old)
            for name, own in state.rules.items()
        }
        return TunerState(memory, rules)

    # -- In words ----------------------------------------------------------------------

    def tell_verdict(
        self, step: int, verdict: Verdict, layers: Sequence[str], journal: Journal
    ) -> None:
        """Writes, and says, why a step was skipped or shrunk; of a fetched verdict."""
        kind, layer = int(verdict.kind), layers[int(verdict.layer)]
        if kind == ACCEPTED:
            return
        rule = self._non_finite if kind == NON_FINITE else self._explosion
        cause = rule.cause(verdict, layer)
        done = "shrunk" if kind == SHRUNK else "skipped"
        before = last_of(journal.events, "step")
        journal.record(step, "step", cause, 1.0, verdict.scale, done=done)
        # People hear of the first of many.
        if before is None or before["step"] != step - 1:
            journal.say(f"step {step:>6,}  {done}: {cause}")

    def tell(self, step: int, changes: dict[str, Any], journal: Journal) -> None:
        """Writes, and says, what an adjustment changed; of fetched changes."""
        for name, rule in self.rules.items():
            if name in changes:
                rule.tell(step, changes[name], journal)

    def summary(self, events: Sequence[Event]) -> str:
        """What was decided in a whole run, in a paragraph."""
        clauses = [c for rule in self.rules.values() for c in rule.summary(events)]
        return "The tuner: " + "; ".join(clauses) + "."


__all__ = [
    "RULES",
    "HyperparameterTuner",
    "Rule",
    "TunerConfig",
    "TunerState",
    "layer_labels",
]

"""The tuner's state as versions before 0.2 saved it: flat, under names of its own."""

from typing import Any

import flax.struct

from vaani_jax.train.tuner import HyperparameterTuner, TunerState
from vaani_jax.train.tuner.divergence import DivergenceState
from vaani_jax.train.tuner.learning_rate import LearningRateState
from vaani_jax.train.tuner.memory import Memory

# Where each leaf is now; those of the memory, and what is not listed, kept their names.
_PLACES = {
    "peak": ("range_test", "peak"),
    "held": ("range_test", "held"),
    "ramp": ("warmup", "ramp"),
    "warmup": ("warmup", "steps"),
    "clip_norm": ("clipping", "norm"),
    "momentum": ("momentum", "value"),
    **{
        name: ("learning_rate", name) for name in LearningRateState.__dataclass_fields__
    },
    **{name: ("divergence", name) for name in DivergenceState.__dataclass_fields__},
}


_NAMES = (*Memory.__dataclass_fields__, *_PLACES)
# Paths of leaves, under which checkpoints keep checksums, are those of a dataclass.
FlatTunerState: Any = flax.struct.dataclass(
    type("FlatTunerState", (), {"__annotations__": dict.fromkeys(_NAMES, Any)})
)


def flattened(state: TunerState) -> Any:
    """The leaves of a state under their old names, a `FlatTunerState`."""
    leaves = {name: getattr(state.memory, name) for name in Memory.__dataclass_fields__}
    for name, (rule, field) in _PLACES.items():
        leaves[name] = getattr(state.rules[rule], field)
    return FlatTunerState(**leaves)


def nested(flat: Any, tuner: HyperparameterTuner) -> TunerState:
    """The state of a `FlatTunerState`; rules that are younger begin anew."""
    fields = Memory.__dataclass_fields__
    memory = Memory(**{name: getattr(flat, name) for name in fields})
    states = {name: rule.init() for name, rule in tuner.rules.items()}
    state = TunerState(memory, {k: v for k, v in states.items() if v is not None})
    for name, (rule, field) in _PLACES.items():
        state = state.with_rule(rule, **{field: getattr(flat, name)})
    return state

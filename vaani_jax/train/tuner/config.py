"""The keys of the tuner."""

import dataclasses

from vaani_jax.settings import check, key


@dataclasses.dataclass(frozen=True)
class TunerConfig:
    """What a person may change of the tuner; its other numbers are with their rules."""

    interval: int = key(10, "steps between adjustments", at_least=1)
    cooldown: int = key(
        50, "steps between cuts of the learning rate, at least", at_least=0
    )
    probe_share: float = key(
        0.05, "of the run, the most that the range test costs", at_least=0, at_most=0.5
    )
    probe_steps: int = key(
        100,
        "of the range test, at most; where the share comes to fewer than 20 (in a "
        "short run), there is none",
        at_least=0,
    )
    skip_ratio: float = key(
        10.0,
        "gradient norm over its running median at which a step is skipped",
        at_least=1,
    )
    clip_percentile: float = key(
        90.0,
        "of past gradient norms, which the clipping threshold follows",
        above=0,
        at_most=100,
    )
    rescues_max: int = key(
        3, "times to go back without a new lowest loss in between", at_least=0
    )

    def __post_init__(self) -> None:
        check(self, "tuner.")

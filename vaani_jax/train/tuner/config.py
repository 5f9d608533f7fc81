"""The keys of the tuner."""

import dataclasses

from vaani_jax.errors import VaaniError
from vaani_jax.settings import key


@dataclasses.dataclass(frozen=True)
class TunerConfig:
    """What a person may change of the tuner; its other numbers are with their rules."""

    interval: int = key(10, "steps between adjustments")
    cooldown: int = key(50, "steps between cuts of the learning rate, at least")
    probe_share: float = key(0.05, "of the run, the most that the range test costs")
    probe_steps: int = key(
        100,
        "of the range test, at most; where the share comes to fewer than 20 (in a "
        "short run), there is none",
    )
    skip_ratio: float = key(
        10.0, "gradient norm over its running median at which a step is skipped"
    )
    clip_percentile: float = key(
        90.0,
        "of past gradient norms, which the clipping threshold follows; in [0, 100]",
    )
    rescues_max: int = key(3, "times to go back without a new lowest loss in between")

    def __post_init__(self) -> None:
        def must(holds: bool, rule: str) -> None:
            if not holds:
                raise VaaniError(f"tuner: it must be that {rule}")

        must(self.interval >= 1, "interval >= 1")
        must(self.cooldown >= 0, "cooldown >= 0")
        must(0 <= self.probe_share <= 0.5, "probe_share is in [0, 0.5]")
        must(self.skip_ratio >= 1, "skip_ratio >= 1")
        must(0 < self.clip_percentile <= 100, "clip_percentile is in (0, 100]")
        must(self.rescues_max >= 0, "rescues_max >= 0")

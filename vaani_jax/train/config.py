"""One frozen, validated `Config` of a run, from nested plain values."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

from vaani_jax.data.config import DataConfig
from vaani_jax.devices.mesh import MeshConfig
from vaani_jax.errors import VaaniError
from vaani_jax.inference.sampling import NUMBERS, SamplerConfig
from vaani_jax.model.config import RENAMED, Architecture, Execution, Quantization
from vaani_jax.model.transformer import Vaani
from vaani_jax.runs.metadata import Metadata
from vaani_jax.settings import (
    LARGEST_SEED,
    as_in,
    build,
    check,
    key,
    named,
    renamed,
    without,
)
from vaani_jax.train.optimizers import OptimConfig
from vaani_jax.train.schedules import SCHEDULES
from vaani_jax.train.tuner import (
    clipping,
    divergence,
    explosion,
    learning_rate,
    memory,
    momentum,
    range_test,
    sparsity,
    warmup,
)
from vaani_jax.train.tuner.config import TunerConfig


@dataclasses.dataclass(frozen=True)
class SampleConfig:
    """The samples that a training run shows."""

    prompts: tuple[str, ...] = key(
        (),
        "one sample each; a prompt outside the vocabulary is skipped with a line. "
        "Without any, a line break, or how the text begins where the tokenizer has no "
        "ids for that",
    )
    max_new_tokens: int = key(200, "length of a sample", at_least=1)
    temperature: float = as_in(SamplerConfig, "temperature")
    top_k: int = as_in(SamplerConfig, "top_k")
    top_p: float = as_in(SamplerConfig, "top_p")
    min_p: float = as_in(SamplerConfig, "min_p")

    @property
    def sampler(self) -> SamplerConfig:
        return SamplerConfig(**{name: getattr(self, name) for name in NUMBERS})

    def __post_init__(self) -> None:
        check(self, "sample.")
        _ = self.sampler


@dataclasses.dataclass(frozen=True)
class Config:
    """A run."""

    seed: int = key(
        0,
        "of initial weights, dropout and the order of the data",
        at_least=0,
        at_most=LARGEST_SEED,
    )
    batch_size: int = key(
        12, "sequences per step, all micro-batches together", at_least=1
    )
    num_steps: int = key(
        0, "length of the run; 0 takes ``num_epochs`` instead", at_least=0
    )
    num_epochs: int = key(
        1, "passes over the training part, where ``num_steps`` is 0", at_least=0
    )
    learning_rate: float | Literal["auto"] = key(
        "auto",
        'peak of the schedule; for muon that of the matrices. "auto" lets the tuner '
        "find it",
        above=0,
    )
    use_tuner: bool = key(
        True,
        "whether `HyperparameterTuner` adjusts the run; without it the schedule is "
        "followed as it is",
    )
    aggressive_tuning: bool = key(False, "adjust twice as often and twice as far")
    target_sparsity_min: float | None = key(
        None, "lowest share of zeros of every ternary kernel; None: unconstrained"
    )
    target_sparsity_max: float | None = key(
        None, "highest share of zeros of every ternary kernel; None: unconstrained"
    )
    quantize_steps: int = key(
        0, "steps over which quantization is phased in (0: from the start)", at_least=0
    )
    eval_interval: int = key(
        250, "steps between evaluations on the held-out part", at_least=1
    )
    eval_windows: int = key(
        2048,
        "most windows of the held-out part, spread evenly, that an evaluation within "
        "the run takes; the one at its end takes all, as do all with 0",
        at_least=0,
    )
    save_interval: int = key(
        250,
        "steps between checkpoints; the best evaluation is kept besides",
        at_least=1,
    )
    log_interval: int = key(10, "steps between reports of metrics", at_least=1)
    sample_interval: int = key(
        500, "steps between samples; 0 leaves them to the end", at_least=0
    )
    keep_checkpoints: int = key(
        2, "how many of the last checkpoints to keep, besides the best", at_least=1
    )
    init_from: str = key(
        "", "workdir of a run whose weights to start from; empty for none", path=True
    )
    mesh: MeshConfig = key(MeshConfig(), "how the devices are arranged")
    model: Architecture = key(Architecture(), "what the model is")
    quantization: Quantization = key(Quantization(), "how it rounds")
    execution: Execution = key(Execution(), "how it is computed here")
    optim: OptimConfig = key(OptimConfig(), "optimizer and schedule")
    tuner: TunerConfig = key(TunerConfig(), "the tuner's bounds and rates")
    data: DataConfig = key(DataConfig(), "the text")
    sample: SampleConfig = key(SampleConfig(), "the samples that the run shows")

    def __post_init__(self) -> None:
        check(self)
        named(SCHEDULES, self.optim.schedule, "optim.schedule")
        if not self.num_steps and self.num_epochs < 1:
            raise VaaniError("set num_steps or num_epochs to at least 1")
        if self.batch_size % self.optim.accumulation_steps:
            raise VaaniError(
                f"batch_size = {self.batch_size} is no multiple of"
                f" optim.accumulation_steps = {self.optim.accumulation_steps}"
            )

        if self.learning_rate == "auto" and not self.use_tuner:
            raise VaaniError(
                "learning_rate = 'auto' is found by the tuner: give a number, or set"
                " use_tuner"
            )
        low, high = self.target_sparsity_min, self.target_sparsity_max
        if (low is None) != (high is None):
            raise VaaniError(
                "target_sparsity_min and target_sparsity_max come together: set both"
            )
        if low is not None and high is not None:
            if not 0 < low < high < 1:
                raise VaaniError(
                    "it must be that 0 < target_sparsity_min < target_sparsity_max < 1;"
                    f" they are {low} and {high}"
                )
            if not self.use_tuner:
                raise VaaniError("target_sparsity_min and _max need use_tuner")

    @property
    def vaani(self) -> Vaani:
        """The model that is trained."""
        return Vaani(self.model, self.quantization, self.execution)

    @property
    def sparsity_band(self) -> tuple[float, float] | None:
        """Lowest and highest share of zeros aimed at, if any."""
        if self.target_sparsity_min is None or self.target_sparsity_max is None:
            return None
        return self.target_sparsity_min, self.target_sparsity_max

    def to_dict(self) -> dict[str, Any]:
        """Nested plain values, for JSON."""
        return dataclasses.asdict(self)


def config_of(metadata: Metadata) -> Config:
    """The config of a run, from what was saved beside its arrays."""
    # Versions before the key took all windows at every evaluation.
    run = {"eval_windows": 0, **metadata.run} if metadata.run else {}
    return from_dict(
        {
            **run,
            "model": dataclasses.asdict(metadata.architecture),
            "quantization": dataclasses.asdict(metadata.quantization),
        }
    )


# Keys of earlier versions that are constants of the tuner's rules now: what they are,
# and where.
RETIRED: dict[str, tuple[float, str]] = {
    f"tuner.{name}": (getattr(module, constant), f"{module.__name__}.{constant}")
    for name, (module, constant) in {
        "probe_steps_min": (range_test, "STEPS_MIN"),
        "probe_low": (range_test, "LOW"),
        "probe_high": (range_test, "HIGH"),
        "probe_drop": (range_test, "DROP"),
        "probe_gain": (range_test, "GAIN"),
        "probe_exponent": (range_test, "EXPONENT"),
        "trust": (range_test, "TRUST"),
        "cut": (learning_rate, "CUT"),
        "recovery": (learning_rate, "RECOVERY"),
        "factor_min": (learning_rate, "FACTOR_MIN"),
        "overfit_rise": (learning_rate, "OVERFIT_RISE"),
        "flip_ratio": (learning_rate, "FLIP_RATIO"),
        "rescue_cut": (learning_rate, "RESCUE_CUT"),
        "update_skip_ratio": (explosion, "UPDATE_SKIP_RATIO"),
        "update_ratio": (explosion, "UPDATE_RATIO"),
        "patience": (explosion, "PATIENCE"),
        "spike_ratio": (memory, "SPIKE_RATIO"),
        "rise_sigma": (memory, "RISE_SIGMA"),
        "diverged_share": (divergence, "SHARE"),
        "diverged_floor": (divergence, "FLOOR"),
        "diverged_ratio": (divergence, "RATIO"),
        "clip_margin": (clipping, "MARGIN"),
        "clip_range": (clipping, "RANGE"),
        "warmup_fast": (warmup, "FAST"),
        "warmup_slow": (warmup, "SLOW"),
        "warmup_calm": (warmup, "CALM"),
        "threshold_rate": (sparsity, "RATE"),
        "threshold_min": (sparsity, "LOWEST"),
        "threshold_max": (sparsity, "HIGHEST"),
        "band_margin": (sparsity, "MARGIN"),
        "momentum_min": (momentum, "LOWEST"),
        "momentum_max": (momentum, "HIGHEST"),
        "momentum_steps": (momentum, "STEPS"),
        "dead_band": (clipping, "DEAD_BAND"),
    }.items()
}


def from_dict(
    values: dict[str, Any], say: Callable[[str], None] = lambda line: None
) -> Config:
    """Builds a `Config` from nested values, as `Config.to_dict` gives them.

    Args:
      values: what they lack has its default; None stands for that in keys of `RENAMED`
        and `RETIRED`.
      say: receives a line for a key that is given by an old name, or is none any more.

    Raises VaaniError, naming the key, for unknown keys and for values of another type.
    """
    values = without(renamed(values, RENAMED, say), RETIRED, say)
    return build(Config, values)

"""One frozen, validated `Config` of a run, from nested plain values."""

import dataclasses
from typing import Any, Literal

from vaani_jax.data.config import DataConfig
from vaani_jax.devices.mesh import MeshConfig
from vaani_jax.errors import VaaniError
from vaani_jax.inference.sampling import SamplerConfig
from vaani_jax.model.config import ModelConfig
from vaani_jax.runs.metadata import Metadata
from vaani_jax.settings import build, named
from vaani_jax.train.optimizers import OptimConfig
from vaani_jax.train.schedules import SCHEDULES
from vaani_jax.train.tuner import TunerConfig


@dataclasses.dataclass(frozen=True)
class SampleConfig:
    """The samples that a training run shows.

    Attributes:
      prompts: one sample each; a prompt outside the vocabulary is skipped with a line.
      max_new_tokens: length of a sample.
      temperature, top_k, top_p, min_p: see `SamplerConfig`.
    """

    prompts: tuple[str, ...] = ("\n",)
    max_new_tokens: int = 200
    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    @property
    def sampler(self) -> SamplerConfig:
        return SamplerConfig(self.temperature, self.top_k, self.top_p, self.min_p)

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise VaaniError("sample.max_new_tokens must be at least 1")
        _ = self.sampler


@dataclasses.dataclass(frozen=True)
class Config:
    """A run.

    Attributes:
      seed: of initial weights, dropout and the order of the data.
      batch_size: sequences per step, all micro-batches together.
      num_steps: length of the run; 0 takes ``num_epochs`` instead.
      num_epochs: passes over the training part, where ``num_steps`` is 0.
      learning_rate: peak of the schedule; for muon that of the matrices. "auto" lets
        the tuner find it.
      use_tuner: whether `HyperparameterTuner` adjusts the run; without it the schedule
        is followed as it is.
      aggressive_tuning: adjust twice as often and twice as far.
      target_sparsity_min, target_sparsity_max: share of zeros to keep every ternary
        kernel at; None leaves the natural share alone.
      quantize_steps: steps over which quantisation is phased in (0: from the start).
      eval_interval: steps between evaluations on all of the held-out part.
      save_interval: steps between checkpoints; the best evaluation is kept besides.
      log_interval: steps between reports of metrics.
      sample_interval: steps between samples; 0 leaves them to the end.
      keep_checkpoints: how many of the last checkpoints to keep, besides the best.
      init_from: workdir of a run whose weights to start from; empty for none.
      mesh, model, optim, tuner, data, sample: the sections.
    """

    seed: int = 0
    batch_size: int = 12
    num_steps: int = 0
    num_epochs: int = 1
    learning_rate: float | Literal["auto"] = "auto"
    use_tuner: bool = True
    aggressive_tuning: bool = False
    target_sparsity_min: float | None = None
    target_sparsity_max: float | None = None
    quantize_steps: int = 0
    eval_interval: int = 250
    save_interval: int = 250
    log_interval: int = 10
    sample_interval: int = 500
    keep_checkpoints: int = 2
    init_from: str = ""
    mesh: MeshConfig = MeshConfig()
    model: ModelConfig = ModelConfig()
    optim: OptimConfig = OptimConfig()
    tuner: TunerConfig = TunerConfig()
    data: DataConfig = DataConfig()
    sample: SampleConfig = SampleConfig()

    def __post_init__(self) -> None:
        for name in (
            "batch_size",
            "eval_interval",
            "save_interval",
            "log_interval",
            "keep_checkpoints",
        ):
            if getattr(self, name) < 1:
                raise VaaniError(f"{name} is {getattr(self, name)}: it must be >= 1")
        for name in ("seed", "num_steps", "quantize_steps", "sample_interval"):
            if getattr(self, name) < 0:
                raise VaaniError(f"{name} is {getattr(self, name)}: it must be >= 0")
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
        if self.learning_rate != "auto" and self.learning_rate <= 0:
            raise VaaniError(
                f"learning_rate is {self.learning_rate}: it must be above 0"
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
    model = dataclasses.asdict(metadata.model)
    return from_dict({**metadata.run, "model": model})


def from_dict(values: dict[str, Any]) -> Config:
    """Builds a `Config` from nested values, as `Config.to_dict` gives them.

    Raises VaaniError, naming the key, for unknown keys and for values of another type.
    """
    return build(Config, values)

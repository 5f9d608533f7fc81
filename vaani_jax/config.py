"""One frozen, validated `Config` from whatever a config file and flags say.

`configs/base.py` lists every key with a comment; other files are short differences from
it. This is the only module that knows ml_collections.
"""

import dataclasses
import difflib
import pathlib
import types
import typing
from collections.abc import Sequence
from typing import Any, Literal

from absl import flags
from ml_collections import ConfigDict, config_flags

from vaani_jax.data import DataConfig
from vaani_jax.errors import VaaniError
from vaani_jax.generate import SampleConfig
from vaani_jax.model import ModelConfig
from vaani_jax.optim import OptimConfig
from vaani_jax.sharding import MeshConfig
from vaani_jax.tuner import TunerConfig


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


def from_config_dict(values: ConfigDict) -> Config:
    """Validates what a config file returned."""
    if not isinstance(values, ConfigDict):
        raise VaaniError("get_config() must return an ml_collections.ConfigDict")
    return from_dict(values.to_dict())


def from_dict(values: dict[str, Any]) -> Config:
    """Builds a `Config` from nested values, as `Config.to_dict` gives them.

    Raises VaaniError, naming the key, for unknown keys and for values of another type.
    """
    return _build(Config, values, "")


def _build(cls: Any, values: Any, prefix: str) -> Any:
    if not isinstance(values, dict):
        raise VaaniError(f"config section {prefix.rstrip('.')!r} must hold keys")
    fields = typing.get_type_hints(cls)
    arguments = {}
    for key, value in values.items():
        if key not in fields:
            near = difflib.get_close_matches(key, fields, n=1)
            hint = f"; did you mean {prefix}{near[0]}?" if near else ""
            raise VaaniError(f"unknown config key {prefix}{key}{hint}")
        if dataclasses.is_dataclass(fields[key]):
            arguments[key] = _build(fields[key], value, f"{prefix}{key}.")
        else:
            arguments[key] = _checked(fields[key], value, prefix + key)
    return cls(**arguments)


def _checked(kind: Any, value: Any, key: str) -> Any:
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        # A number, or one of a few words, or None.
        choices = typing.get_args(kind)
        if value is None and types.NoneType in choices:
            return None
        words = [w for k in choices for w in typing.get_args(k)]
        if isinstance(value, str) and value in words:
            return value
        number = next(k for k in choices if k in (int, float))
        try:
            return _checked(number, value, key)
        except VaaniError:
            others = "".join(f" or {w!r}" for w in words)
            others += " or None" if types.NoneType in choices else ""
            raise VaaniError(
                f"config key {key} is {value!r}: it must be a number{others}"
            ) from None
    if typing.get_origin(kind) is Literal:
        choices = typing.get_args(kind)
        if value not in choices:
            known = ", ".join(map(str, choices))
            raise VaaniError(
                f"config key {key} is {value!r}: it must be one of {known}"
            )
        return value
    if typing.get_origin(kind) is tuple:
        if not isinstance(value, list | tuple) or not all(
            isinstance(v, str) for v in value
        ):
            raise VaaniError(f"config key {key} must be a tuple of strings")
        return tuple(value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise VaaniError(
            f"config key {key} is {value!r}: it must be of type {kind.__name__}"
        )
    return value


def differences(old: Any, new: Any, prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """The keys, dotted, whose values differ between two `Config.to_dict` results."""
    found: dict[str, tuple[Any, Any]] = {}
    for key in sorted({*old, *new}):
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            found |= differences(a, b, f"{prefix}{key}.")
        elif a != b and not (
            isinstance(a, list | tuple)
            and isinstance(b, list | tuple)
            and tuple(a) == tuple(b)
        ):
            found[prefix + key] = (a, b)
    return found


@dataclasses.dataclass(frozen=True)
class Invocation:
    """What a command line says.

    Attributes:
      config: the run.
      path: of the config file.
      workdir: where the run is kept; "" where not given.
      coordinator, num_processes, process_id, distributed: see `distributed.join`.
    """

    config: Config
    path: str
    workdir: str
    coordinator: str
    num_processes: int | None
    process_id: int | None
    distributed: bool


def config_from_flags(arguments: Sequence[str]) -> Invocation:
    """Reads ``--config=FILE --config.KEY=VALUE ... --workdir=DIR`` and the like.

    Raises:
      VaaniError: anything wrong with a flag or with the file.
    """
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", None, "config file", flag_values=values)
    define: dict[str, Any] = {"flag_values": values}
    flags.DEFINE_string("workdir", "", "where the run is kept", **define)
    flags.DEFINE_string("coordinator", "", "host:port of process 0", **define)
    flags.DEFINE_integer("num_processes", None, "of this job", lower_bound=1, **define)
    flags.DEFINE_integer("process_id", None, "from 0", lower_bound=0, **define)
    flags.DEFINE_boolean("distributed", False, "join other processes", **define)
    path = _config_path(arguments)
    if not pathlib.Path(path).is_file():
        raise VaaniError(f"no config file at {path}")
    try:
        extra = values(["train.py", *arguments])[1:]
    except flags.Error as error:
        raise VaaniError(_one_line(error)) from None
    except (AttributeError, KeyError, TypeError, ValueError, SyntaxError) as error:
        raise VaaniError(_explain(path, arguments, error)) from None
    if extra:
        raise VaaniError(f"unexpected argument {extra[0]!r}: flags begin with --")
    return Invocation(
        config=from_config_dict(values.config),
        path=path,
        workdir=values.workdir,
        coordinator=values.coordinator,
        num_processes=values.num_processes,
        process_id=values.process_id,
        distributed=values.distributed,
    )


def _config_path(arguments: Sequence[str]) -> str:
    for i, argument in enumerate(arguments):
        name, equals, value = argument.lstrip("-").partition("=")
        if argument.startswith("-") and name == "config":
            if not equals:
                value = arguments[i + 1] if i + 1 < len(arguments) else ""
            return value
    raise VaaniError("which config? Say --config=configs/small.py, for example")


def _explain(path: str, arguments: Sequence[str], error: Exception) -> str:
    """One line for an error that came out of a config file or an override."""
    known = Config().to_dict()
    for argument in arguments:
        name = argument.lstrip("-").partition("=")[0]
        if name.startswith("config."):
            keys, node = name.split(".")[1:], known
            for i, key in enumerate(keys):
                if not isinstance(node, dict) or key not in node:
                    options = node if isinstance(node, dict) else {}
                    near = difflib.get_close_matches(key, options, n=1)
                    hint = ".".join([*keys[:i], *near])
                    return f"unknown config key {'.'.join(keys)}" + (
                        f"; did you mean {hint}?" if near else ""
                    )
                node = node[key]
    return f"config file {path}: {_one_line(error)}"


def _one_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__

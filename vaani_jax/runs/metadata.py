"""What is saved beside the arrays of a model: what it is, and where it came from.

The same record travels with a checkpoint and with a packed folder. It carries the
model's own config, so that loading a model to serve it needs no config of training;
that of the run lies in it as plain values, for those who go on training.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from vaani_jax import __version__
from vaani_jax.model.config import RENAMED, Architecture, Execution, Quantization
from vaani_jax.model.transformer import Vaani
from vaani_jax.settings import build

Json = dict[str, Any]


LARGEST = 2**31 - 1  # what int32 indices can count
DEEPEST = 1000  # layers
LARGEST_TABLE = 2**27  # context times head dimension: a million positions of 128


@dataclasses.dataclass(frozen=True)
class Metadata:
    """Of a checkpoint or a packed folder.

    Attributes:
      version: of Vaani, that wrote it.
      architecture, quantization: what the arrays are, and how they are rounded.
      stacked: whether arrays of the layers are stacked, as ``scan_layers`` has them.
      tokenizer: its description, see `text.tokenizers.from_json`.
      corpus: source, sha256 and characters of the text; None for an imported model.
      run: config of the run, nested plain values, without ``model`` and
        ``quantization``; empty for an imported model.
      imported: where an imported model came from; None for a trained one.
      elapsed_seconds: of training.
      best: step and scores of the best evaluation so far.
      window: metrics of the steps since the last report.
      step: of the checkpoint.
      loss: of an evaluation at this step.
    """

    version: str
    architecture: Architecture
    quantization: Quantization
    stacked: bool
    tokenizer: Json
    corpus: Json | None
    run: Json
    imported: Json | None = None
    elapsed_seconds: float = 0.0
    best: Json | None = None
    window: tuple[dict[str, float], ...] = ()
    step: int = 0
    loss: float | None = None

    @classmethod
    def of(
        cls, module: Vaani, tokenizer: Json, imported: Json | None = None
    ) -> "Metadata":
        """Of a model that no run of ours has trained."""
        return cls(
            version=__version__,
            architecture=module.architecture,
            quantization=module.quantization,
            stacked=module.execution.scan_layers,
            tokenizer=tokenizer,
            corpus=None,
            run={},
            imported=imported,
        )

    @property
    def module(self) -> Vaani:
        """The model as its arrays lie; how it is executed is left to this machine."""
        execution = Execution(scan_layers=self.stacked)
        return Vaani(self.architecture, self.quantization, execution)

    def to_json(self) -> Json:
        """Plain values; null stands for numbers of the window that aren't finite."""
        return {
            **{f.name: getattr(self, f.name) for f in dataclasses.fields(self)},
            "architecture": dataclasses.asdict(self.architecture),
            "quantization": dataclasses.asdict(self.quantization),
            "window": [
                {k: v if math.isfinite(v) else None for k, v in row.items()}
                for row in self.window
            ],
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Metadata":
        """Reads what `to_json` wrote, and what versions before 0.2 did.

        Those kept the config of the run, under ``config``, with all keys of the model
        in one section. Keys that belong to neither, such as fingerprints, are passed
        over.

        Raises:
          VaaniError: a key of the model's config that is unknown or of another type.
          KeyError, TypeError, ValueError: damage.
        """
        found = dict(values)
        if "config" in found:
            found["run"] = dict(found["config"])
            found["model"] = found["run"].pop("model")
        if "model" in found:
            found |= _parted(found["model"], found["run"])
        names = {f.name for f in dataclasses.fields(cls)}
        known = {name: value for name, value in found.items() if name in names}
        known["architecture"] = build(Architecture, known["architecture"], "model.")
        known["quantization"] = build(
            Quantization, known["quantization"], "quantization."
        )
        known["window"] = tuple(
            {k: math.nan if v is None else v for k, v in row.items()}
            for row in known.get("window", ())
        )
        _check_size(known["architecture"], known.get("stacked") is True, found)
        result = cls(**known)
        for name, kind in _KINDS.items():
            if not isinstance(getattr(result, name), kind):
                raise TypeError(f"{name} is {getattr(result, name)!r}")
        return result


def _check_size(architecture: Architecture, stacked: bool, found: Json) -> None:
    """Refuses sizes that no array bears out, but that a model would take room for.

    The shapes of arrays are compared when they are read. By then all layers have been
    traced, with their table of rotary angles.
    """
    for field in dataclasses.fields(architecture):
        value = getattr(architecture, field.name)
        if isinstance(value, int) and value > LARGEST:
            raise ValueError(f"model.{field.name} is {value:,}")
    listed = found.get("fingerprints", {}).get("model") or found.get("packed")
    # Stacked, the arrays of all layers are one: their number says nothing.
    deepest = DEEPEST if stacked or listed is None else len(listed)
    if architecture.n_layers > deepest:
        raise ValueError(
            f"model.n_layers is {architecture.n_layers:,}, and the arrays allow for"
            f" {deepest:,} at most"
        )
    if architecture.max_seq_len * architecture.head_size > LARGEST_TABLE:
        raise ValueError(
            f"model.max_seq_len is {architecture.max_seq_len:,}, and heads have"
            f" {architecture.head_size:,} dimensions: more than {LARGEST_TABLE:,}"
            " rotary angles"
        )


def _parted(model: Json, run: Json) -> Json:
    """The section ``model`` of version 0.1 in today's three."""
    parts: dict[str, Json] = {"model": {}, "quantization": {}, "execution": {}}
    for name, value in model.items():
        section, _, key = RENAMED.get(f"model.{name}", f"model.{name}").partition(".")
        parts[section][key] = value
    return {
        "architecture": parts["model"],
        "quantization": parts["quantization"],
        "stacked": parts["execution"].get("scan_layers", False),
        # An imported model has no run.
        "run": {**run, "execution": parts["execution"]} if run else {},
    }


_KINDS: dict[str, Any] = {
    "version": str,
    "stacked": bool,
    "tokenizer": dict,
    "corpus": dict | None,
    "run": dict,
    "imported": dict | None,
    "elapsed_seconds": int | float,
    "best": dict | None,
    "step": int,
    "loss": int | float | None,
}

"""What is saved beside the arrays of a model: what it is, and where it came from.

The same record travels with a checkpoint and with a packed folder. It carries the
model's own config, so that loading a model to serve it needs no config of training;
that of the run lies in it as plain values, for those who go on training.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from vaani_jax.model.config import ModelConfig
from vaani_jax.settings import build

Json = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Metadata:
    """Of a checkpoint or a packed folder.

    Attributes:
      version: of Vaani, that wrote it.
      model: what the arrays are.
      tokenizer: its description, see `text.tokenizers.from_json`.
      corpus: source, sha256 and characters of the text; None for an imported model.
      run: config of the run, nested plain values, without ``model``; only its defaults
        differ from nothing for an imported model.
      imported: where an imported model came from; None for a trained one.
      elapsed_seconds: of training.
      best: step and scores of the best evaluation so far.
      window: metrics of the steps since the last report.
      step: of the checkpoint.
      loss: of an evaluation at this step.
    """

    version: str
    model: ModelConfig
    tokenizer: Json
    corpus: Json | None
    run: Json
    imported: Json | None = None
    elapsed_seconds: float = 0.0
    best: Json | None = None
    window: tuple[dict[str, float], ...] = ()
    step: int = 0
    loss: float | None = None

    def to_json(self) -> Json:
        """Plain values."""
        return {
            **{f.name: getattr(self, f.name) for f in dataclasses.fields(self)},
            "model": dataclasses.asdict(self.model),
            "window": list(self.window),
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Metadata":
        """Reads what `to_json` wrote, and what versions before 0.2 did.

        Those kept the model's config within the run's, under ``config``. Keys that
        belong to neither, such as fingerprints, are passed over.

        Raises:
          VaaniError: a key of the model's config that is unknown or of another type.
          KeyError, TypeError: damage.
        """
        found = dict(values)
        if "config" in found:
            found["run"] = dict(found["config"])
            found["model"] = found["run"].pop("model")
        names = {f.name for f in dataclasses.fields(cls)}
        known = {name: value for name, value in found.items() if name in names}
        known["model"] = build(ModelConfig, known["model"], "model.")
        known["window"] = tuple(known.get("window", ()))
        result = cls(**known)
        for name, kind in _KINDS.items():
            if not isinstance(getattr(result, name), kind):
                raise TypeError(f"{name} is {getattr(result, name)!r}")
        return result


_KINDS: dict[str, Any] = {
    "version": str,
    "tokenizer": dict,
    "corpus": dict | None,
    "run": dict,
    "imported": dict | None,
    "elapsed_seconds": int | float,
    "best": dict | None,
    "step": int,
    "loss": int | float | None,
}

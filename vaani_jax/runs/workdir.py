"""What lies where in the workdir of a run: the one place that knows its file names."""

import dataclasses
import pathlib


@dataclasses.dataclass(frozen=True)
class Workdir:
    """The folder that receives everything of a run. Nothing here touches the disk.

    Attributes:
      folder: the workdir itself.
    """

    folder: pathlib.Path

    @property
    def checkpoints(self) -> pathlib.Path:
        """The folder of its checkpoints, one folder each."""
        return self.folder / "checkpoints"

    @property
    def metrics(self) -> pathlib.Path:
        """Rows of metrics, a JSON object a line."""
        return self.folder / "metrics.jsonl"

    @property
    def history(self) -> pathlib.Path:
        """The same metrics by column, JSON."""
        return self.folder / "training_history.json"

    @property
    def tensorboard(self) -> pathlib.Path:
        """The folder of TensorBoard's event files."""
        return self.folder / "tensorboard"

    @property
    def events(self) -> pathlib.Path:
        """The tuner's decisions, a JSON object a line; only where a run is tuned."""
        return self.folder / "tuner.jsonl"

    @property
    def curves(self) -> pathlib.Path:
        """The training curves, a picture."""
        return self.folder / "training_curves.png"

    @property
    def summary(self) -> pathlib.Path:
        """Config and results, JSON; written when a session ends."""
        return self.folder / "run.json"

    @property
    def lock(self) -> pathlib.Path:
        """Who trains here, JSON; only while somebody does."""
        return self.folder / "training.lock"

    def sample(self, step: int) -> pathlib.Path:
        """The texts that the model wrote after ``step`` steps."""
        return self.folder / "samples" / f"step_{step:06d}.txt"

"""The tuner's journal: every decision, on disk and in words.

``tuner.jsonl`` holds one object a line: ``step`` (steps done when it was taken),
``setting``, ``cause``, ``old`` and ``new``; the kernel's name where the setting is one
kernel's.
"""

import json
import math
import pathlib
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np

from vaani_jax.files import write_atomically
from vaani_jax.runs.metrics import read_rows
from vaani_jax.runs.workdir import Workdir
from vaani_jax.train.tuner import (
    ACCEPTED,
    CALM,
    CAUSES,
    GRADIENT,
    NON_FINITE,
    SHRUNK,
    VERDICTS,
    Adjustment,
    Change,
    Verdict,
)
from vaani_jax.words import plural, times

Event = dict[str, Any]


def read_events(path: pathlib.Path) -> list[Event]:
    """Events of a tuner.jsonl; a last line cut short by a kill is left out."""
    return list(read_rows(path))


class Journal:
    """Writes down what the tuner decides, and tells what matters.

    Attributes:
      events: all of the run, those of earlier sessions included.
    """

    def __init__(
        self, workdir: pathlib.Path, start_step: int, say: Callable[[str], None]
    ) -> None:
        self.say = say
        path = Workdir(workdir).events
        # A resumed run repeats the steps after its checkpoint: their events go. One
        # that begins again repeats the range test too, whose event is of step 0.
        self.events = [e for e in read_events(path) if e["step"] <= start_step > 0]
        lines = "".join(json.dumps(event) + "\n" for event in self.events)
        write_atomically(path, lines.encode())
        self._file = path.open("a", encoding="utf-8")
        self._last_skip = -1  # people hear of the first of many

    def record(
        self, step: int, setting: str, cause: str, old: Any, new: Any, **more: Any
    ) -> None:
        """Writes one decision."""
        event = {"step": step, "setting": setting, "cause": cause, **more}
        event |= {"old": _plain(old), "new": _plain(new)}
        self.events.append(event)
        self._file.write(json.dumps(event) + "\n")
        self._file.flush()

    def verdict(self, step: int, verdict: Verdict, layers: list[str]) -> None:
        """Takes in a fetched verdict on the step that made ``step`` steps."""
        kind = int(verdict.kind)
        if kind == ACCEPTED:
            return
        cause = VERDICTS[kind]
        if kind != NON_FINITE:
            cause += f": norm {verdict.value:.3g}, usually {verdict.usual:.3g}"
        if kind in (NON_FINITE, GRADIENT):
            cause += f"; foremost in {layers[int(verdict.layer)]}"
        done = "shrunk" if kind == SHRUNK else "skipped"
        self.record(step, "step", cause, 1.0, verdict.scale, done=done)
        if step != self._last_skip + 1:
            self.say(f"step {step:>6,}  {done}: {cause}")
        self._last_skip = step

    def adjustment(self, step: int, adjustment: Adjustment, due_warmup: int) -> None:
        """Takes in a fetched adjustment; ``due_warmup``: steps as configured."""
        a = adjustment
        cause = int(a.learning_rate.cause)
        if _moved(a.learning_rate):
            old, new = float(a.learning_rate.old), float(a.learning_rate.new)
            self.record(step, "learning_rate_factor", CAUSES[cause], old, new)
            if cause != CALM:
                self.say(
                    f"step {step:>6,}  learning rate x {new / old:.2f}: {CAUSES[cause]}"
                )
        if _moved(a.clip_norm):
            cause_ = "percentile of past gradient norms"
            self.record(step, "clip_norm", cause_, a.clip_norm.old, a.clip_norm.new)
        if _moved(a.momentum):
            calm = "calm" if a.momentum.new > a.momentum.old else "not calm"
            self.record(
                step,
                "activation_momentum",
                f"training is {calm}",
                a.momentum.old,
                a.momentum.new,
            )
        if bool(a.warm) and due_warmup and not self._is_warm():
            self.record(
                step, "warmup_steps", "the warm-up is over", due_warmup, int(a.warm_at)
            )
        for name, change in a.thresholds.items():
            before, after = np.ravel(change.old), np.ravel(change.new)
            zeros = np.ravel(change.cause)
            for i in np.flatnonzero(before != after):
                kernel = name if change.old.ndim == 0 else f"{name}[{i}]"
                cause_ = f"share of zeros {zeros[i]:.3f}"
                self.record(
                    step, "threshold", cause_, before[i], after[i], kernel=kernel
                )

    def _is_warm(self) -> bool:
        return any(event["setting"] == "warmup_steps" for event in self.events)

    def evaluation(self, step: int, change: Change) -> None:
        """Takes in what a validation loss changed."""
        if bool(change.cause):
            cause = "validation loss rises"
            old, new = float(change.old), float(change.new)
            self.record(step, "learning_rate_factor", cause, old, new)
            self.say(f"step {step:>6,}  learning rate x {new / old:.2f}: {cause}")

    def range_test(self, cause: str, given: Any, peak: float) -> None:
        """Writes which peak was taken before the first step."""
        self.record(0, "learning_rate", cause, given, peak)
        same = given == peak
        self.say(
            f"tuner   learning rate {peak:.3g}"
            + (" as given" if same else "")
            + f": {cause}"
        )

    def rescue(self, step: int, back_to: int, cause: str, factor: float) -> None:
        """Writes that the run went back to the state after ``back_to`` steps."""
        self.record(step, "state", cause, step, back_to, learning_rate_factor=factor)
        self.say(
            f"step {step:>6,}  rescued: {cause}; back to the state of step"
            f" {back_to:,}, learning rate x {factor:.3g} of the schedule from here on"
        )

    def summary(self) -> str:
        """What was decided, in a paragraph."""
        by_setting = Counter(event["setting"] for event in self.events)
        last = {event["setting"]: event for event in self.events}
        parts = []
        if event := last.get("learning_rate"):
            parts.append(f"peak learning rate {event['new']:.3g} ({event['cause']})")
        cuts = [
            e
            for e in self.events
            if e["setting"] == "learning_rate_factor" and e["new"] < e["old"]
        ]
        if cuts:
            causes = Counter(e["cause"] for e in cuts)
            listed = ", ".join(f"{n} x {cause}" for cause, n in causes.items())
            parts.append(
                f"it was cut {times(len(cuts))} ({listed}) and stood at"
                f" {last['learning_rate_factor']['new']:.2f} of the schedule at last"
            )
        else:
            parts.append("it followed the schedule")
        for done in ("skipped", "shrunk"):
            if n := sum(event.get("done") == done for event in self.events):
                parts.append(f"{plural(n, 'step')} {done}")
        if n := by_setting["state"]:
            parts.append(f"rolled back {times(n)}")
        if event := last.get("warmup_steps"):
            warmup = plural(event["new"], "step")
            parts.append(f"warm-up of {warmup} (planned {event['old']})")
        if event := last.get("clip_norm"):
            parts.append(f"gradients clipped at {event['new']:.3g} at last")
        if n := by_setting["threshold"]:
            kernels = {e["kernel"] for e in self.events if e["setting"] == "threshold"}
            moves = plural(n, "threshold move")
            parts.append(f"{moves} in {plural(len(kernels), 'kernel')}")
        if event := last.get("activation_momentum"):
            parts.append(f"activation momentum {event['new']:.3f} at last")
        return "The tuner: " + "; ".join(parts) + "."

    def close(self) -> None:
        self._file.close()


def _moved(change: Change) -> bool:
    return bool(change.old != change.new)


def _plain(value: Any) -> Any:
    """A JSON value; None for what JSON has no number for."""
    if isinstance(value, str | int):
        return value
    number = float(value)
    return number if math.isfinite(number) else None

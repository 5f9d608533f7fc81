"""Checkpoints: orbax, asynchronous, verified when they are read back.

A checkpoint ``step_<n>`` holds three items: ``model`` (what inference needs),
``training`` (the rest of the state) and ``meta`` (JSON). Orbax makes each appear whole
or not at all. Against damage after that, ``meta`` keeps a fingerprint of every array,
computed on the device when saving, and compared on restoring.

This module knows pytrees and JSON only.
"""

import dataclasses
import functools
import pathlib
import shutil
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from vaani_jax.devices.processes import is_first, wait_for_all
from vaani_jax.errors import VaaniError
from vaani_jax.words import first_line

Tree = Any


Meta = dict[str, Any]


FORMAT = "vaani-checkpoint-3"
FLAT_TUNER = ("vaani-checkpoint-1", "vaani-checkpoint-2")  # see `train.tuner.flat`
FORMATS = (FORMAT, *FLAT_TUNER)  # what is read


@jax.jit
def _fingerprint(leaf: jax.Array) -> jax.Array:
    """A uint32 that any changed, lost or swapped element changes."""
    if leaf.dtype == jnp.bool_:
        leaf = leaf.astype(jnp.uint8)
    width = jnp.dtype(leaf.dtype).itemsize
    unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}[width]
    bits = jax.lax.bitcast_convert_type(leaf, unsigned)
    # The place in the flat array, without making it flat: an array that is cut over
    # devices stays where it is.
    index = jnp.zeros(bits.shape, jnp.uint32)
    for axis, length in enumerate(bits.shape):
        place = jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
        index = index * jnp.uint32(length & 0xFFFFFFFF) + place
    # Odd weights, so that no single change cancels; sums wrap modulo 2^32.
    weight = index * jnp.uint32(2654435761) | jnp.uint32(1)
    return jnp.sum(bits.astype(jnp.uint32) * weight, dtype=jnp.uint32)


def fingerprints(tree: Tree) -> dict[str, int]:
    """Checksums of a pytree's arrays, by key path.

    One array at a time: all at once, their temporaries would take as much memory as
    the tree.
    """
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {
        jax.tree_util.keystr(path): int(jax.device_get(_fingerprint(leaf)))
        for path, leaf in leaves
    }


@functools.cache
def _silence_stragglers() -> None:
    """Keeps reads and writes that orbax abandons when one fails from printing traces.

    They end whenever they end, so this holds for the rest of the process.
    """
    hooks = sys.unraisablehook, sys.excepthook

    def is_straggler(error: BaseException | None) -> bool:
        return str(error) == "Event loop is closed"

    def unraisable(event: Any) -> None:
        if not is_straggler(event.exc_value):
            hooks[0](event)

    def uncaught(kind: Any, error: BaseException, trace: Any) -> None:
        if not is_straggler(error):
            hooks[1](kind, error, trace)

    sys.unraisablehook, sys.excepthook = unraisable, uncaught


@dataclasses.dataclass(frozen=True)
class Restored:
    """What a checkpoint held.

    Attributes:
      step: its step.
      items: the requested pytrees, by name.
      meta: what was saved beside them.
    """

    step: int
    items: dict[str, Tree]
    meta: Meta


class GoneError(Exception):
    """A checkpoint has been removed while it was read: a newer one is there."""


class Checkpoints:
    """The checkpoints of one run: the last few and the best.

    Attributes:
      directory: where they are.
    """

    def __init__(
        self, directory: pathlib.Path, *, keep: int = 2, read_only: bool = False
    ) -> None:
        _silence_stragglers()
        self.directory = directory.absolute()
        if read_only and not self.directory.is_dir():
            raise VaaniError(f"{directory.parent} holds no run: {directory} is missing")
        policy = checkpoint_managers.AnyPreservationPolicy(
            [
                checkpoint_managers.LatestN(keep),
                checkpoint_managers.BestN(
                    get_metric_fn=lambda metrics: metrics["loss"],
                    reverse=True,  # the lowest loss comes last, and the last n stay
                    n=1,
                    keep_checkpoints_without_metrics=False,
                ),
            ]
        )
        if not read_only:
            if is_first():
                self._remove_unfinished()
            wait_for_all("unfinished checkpoints removed")
        try:
            self._manager = ocp.CheckpointManager(
                self.directory,
                options=ocp.CheckpointManagerOptions(
                    step_prefix="step",
                    preservation_policy=None if read_only else policy,
                    create=not read_only,
                    read_only=read_only,
                ),
                item_handlers={
                    "model": ocp.StandardCheckpointHandler(),
                    "training": ocp.StandardCheckpointHandler(),
                    "meta": ocp.JsonCheckpointHandler(),
                },
            )
        except OSError as error:
            raise VaaniError(
                f"can't use {directory} for checkpoints: {error.strerror or error}"
            ) from None

    def _remove_unfinished(self) -> None:
        """Deletes what a killed run had begun to write."""
        for folder in self.directory.glob("*.orbax-checkpoint-tmp*"):
            shutil.rmtree(folder, ignore_errors=True)

    def steps(self) -> list[int]:
        """Steps of the checkpoints on disk, ascending."""
        return sorted(self._manager.all_steps())

    def save(
        self,
        step: int,
        items: dict[str, Tree],
        meta: Meta,
        *,
        loss: float | None = None,
    ) -> None:
        """Starts writing a checkpoint; returns once the arrays may be donated.

        Args:
          step: names it; a step that is there already is left alone.
          items: ``model`` and ``training``.
          meta: JSON values.
          loss: of an evaluation at this step; the lowest marks the best checkpoint.

        Raises OSError or ValueError when this save, or one before it, can't be written.
        """
        if step in self._manager.all_steps():
            return
        marks = {name: fingerprints(tree) for name, tree in items.items()}
        meta = {**meta, "format": FORMAT, "step": step, "loss": loss}
        saved = {name: ocp.args.StandardSave(tree) for name, tree in items.items()}
        self._manager.save(
            step,
            args=ocp.args.Composite(
                **saved, meta=ocp.args.JsonSave({**meta, "fingerprints": marks})
            ),
            metrics=None if loss is None else {"loss": loss},
            force=True,
        )

    def wait(self) -> None:
        """Returns when everything is on disk; raises what went wrong on the way."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        self._manager.close()

    def meta(self, step: int) -> Meta:
        """The metadata of a step; raises anything where it is damaged."""
        restored = self._manager.restore(
            step, args=ocp.args.Composite(meta=ocp.args.JsonRestore())
        )
        meta = restored["meta"]
        if not isinstance(meta, dict) or meta.get("format") not in FORMATS:
            raise ValueError(f"its format is not {FORMAT}")
        return meta

    def best_step(self) -> int | None:
        """The step with the lowest loss of an evaluation; None where there is none."""
        losses = {}
        for step in self.steps():
            try:
                loss = self.meta(step)["loss"]
            except Exception as error:  # damaged: not the best, whatever it was
                if not self._folder(step).exists():
                    raise GoneError(step) from error
                continue
            if loss is not None:
                losses[step] = loss
        return min(losses, key=lambda s: (losses[s], s)) if losses else None

    def restore(
        self,
        make_target: Callable[[Meta], dict[str, Tree]],
        *,
        step: int | None = None,
        notify: Callable[[str], None] = print,
        set_aside: bool = False,
    ) -> Restored | None:
        """Reads a checkpoint, or the newest one that is whole.

        Args:
          make_target: gets the metadata, and returns the items to read as abstract
            pytrees (`jax.eval_shape`); may raise VaaniError to refuse the checkpoint.
          step: which; None for the newest, or the one before it if that is damaged.
          notify: receives one line for each damaged checkpoint passed over.
          set_aside: whether to rename damaged checkpoints, so that the steps can be
            saved again.

        Returns:
          None where there are no checkpoints at all.

        Raises:
          VaaniError: nothing whole to read.
          GoneError: the run has replaced the checkpoint while it was read.
        """
        steps = self.steps()
        if step is not None:
            if step not in steps:
                known = ", ".join(map(str, steps)) or "none"
                raise VaaniError(
                    f"{self.directory} has no checkpoint of step {step}; it has {known}"
                )
            steps = [step]
        for candidate in reversed(steps):
            try:
                return self._read(candidate, make_target)
            except VaaniError:
                raise
            except Exception as error:  # damage shows itself in any type
                if not self._folder(candidate).exists():
                    raise GoneError(candidate) from error
                reason = first_line(error, 200)
                notify(f"checkpoint {candidate} is damaged ({reason})")
                if set_aside:
                    self._set_aside(candidate)
        if steps:
            raise VaaniError(
                f"no checkpoint in {self.directory} can be read: restore it from a"
                " copy, or start again with another --workdir"
            )
        return None

    def _read(self, step: int, make_target: Callable[[Meta], Any]) -> Restored:
        meta = self.meta(step)
        target = make_target(meta)
        restored = self._manager.restore(
            step,
            args=ocp.args.Composite(
                **{name: ocp.args.StandardRestore(t) for name, t in target.items()}
            ),
        )
        items = {name: restored[name] for name in target}
        for name, tree in items.items():
            expected = meta["fingerprints"][name]
            actual = fingerprints(tree)
            wrong = [k for k in actual if expected.get(k) != actual[k]]
            if wrong:
                raise ValueError(f"{name}{wrong[0]} is not what was saved")
        return Restored(step, items, meta)

    def _folder(self, step: int) -> pathlib.Path:
        return self.directory / f"step_{step}"

    def reload(self) -> None:
        """Looks again at what is on disk."""
        self._manager.reload()

    def _set_aside(self, step: int) -> None:
        if is_first():
            folder = self._folder(step)
            number = 0
            while (target := self.directory / f"damaged-{step}-{number}").exists():
                number += 1
            folder.rename(target)
        wait_for_all(f"checkpoint {step} set aside")
        self._manager.reload()

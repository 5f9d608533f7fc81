"""Checkpoints: orbax, asynchronous, verified when they are read back.

A checkpoint ``step_<n>`` holds three items: ``model`` (what inference needs),
``training`` (the rest of the state) and ``meta`` (JSON). Orbax makes each appear whole
or not at all. Against damage after that, ``meta`` keeps a fingerprint of every array,
computed on the device when saving, and compared on restoring.

This module knows pytrees and JSON only.
"""

import contextlib
import dataclasses
import functools
import inspect
import logging
import math
import pathlib
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from vaani_jax import leaves
from vaani_jax.devices.processes import is_first, is_peer_error, wait_for_all
from vaani_jax.errors import VaaniError
from vaani_jax.words import first_line

Tree = Any


Meta = dict[str, Any]


# What is made of an array, by its keys, as soon as it is read.
Take = Callable[[tuple[str, ...], jax.Array], Any]


PART_BYTES = 2**25  # of arrays that are read together where each is taken at once


REMOVAL = 2.0  # seconds that a checkpoint takes to go


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
    found = jax.tree_util.tree_flatten_with_path(tree)[0]
    return dict(_mark(path, leaf) for path, leaf in found)


def _mark(path: Any, leaf: jax.Array) -> tuple[str, int]:
    return jax.tree_util.keystr(path), int(jax.device_get(_fingerprint(leaf)))


def _check(name: str, marks: dict[str, int], meta: Meta) -> None:
    """Raises ValueError where arrays of an item are not those that were saved."""
    expected = meta["fingerprints"][name]
    wrong = [key for key in marks if expected.get(key) != marks[key]]
    if wrong:
        raise ValueError(f"{name}{wrong[0]} is not what was saved")


def _is_straggler(error: BaseException | None, where: Any = None) -> bool:
    """Whether an error that nobody waits for is of what orbax has abandoned."""
    if inspect.iscoroutine(where):
        return "orbax" in where.cr_code.co_filename
    return isinstance(error, RuntimeError) and str(error) == "Event loop is closed"


def _is_heard(record: logging.LogRecord) -> bool:
    """Whether a line of asyncio's log is not of reads that orbax has abandoned."""
    message = record.getMessage()
    return "never retrieved" not in message or "orbax" not in message


@functools.cache
def _silence_stragglers() -> None:
    """Keeps what orbax abandons when a write or a read fails from printing tracebacks.

    Such calls end whenever they end, so what keeps them quiet stays. Tensorstore hands
    their errors to one hook or the other.
    """
    logging.getLogger("asyncio").addFilter(_is_heard)
    unraisable, uncaught = sys.unraisablehook, sys.excepthook

    def hook(event: Any) -> None:
        if not _is_straggler(event.exc_value, event.object):
            unraisable(event)

    def other(kind: Any, error: Any, trace: Any) -> None:
        if not _is_straggler(error):
            uncaught(kind, error, trace)

    sys.unraisablehook, sys.excepthook = hook, other


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


def _parts(sizes: Sequence[int]) -> Iterator[list[int]]:
    """Indices of arrays of these bytes, small ones first, in parts to be read."""
    part: list[int] = []
    held = 0
    for i in sorted(range(len(sizes)), key=lambda i: sizes[i]):
        if part and held + sizes[i] > PART_BYTES:
            yield part
            part, held = [], 0
        part.append(i)
        held += sizes[i]
    if part:
        yield part


class GoneError(Exception):
    """A checkpoint has been removed while a reader was at it: a newer one is there."""


class Checkpoints:
    """The checkpoints of one run: the last few and the best.

    Attributes:
      directory: where they are.
    """

    def __init__(
        self, directory: pathlib.Path, *, keep: int = 2, read_only: bool = False
    ) -> None:
        _silence_stragglers()
        self._read_only = read_only
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
                    # At once: where none can be made, what would write to it waits
                    # for it for minutes, and the end of the process for that.
                    async_options=ocp.options.AsyncOptions(
                        create_directories_asynchronously=False
                    ),
                ),
                item_handlers={
                    "model": ocp.StandardCheckpointHandler(),
                    "training": ocp.StandardCheckpointHandler(),
                    "meta": ocp.JsonCheckpointHandler(),
                },
            )
        except OSError as error:
            if read_only and isinstance(error, FileNotFoundError):
                raise GoneError(str(error)) from None
            raise VaaniError(
                f"can't use {directory} for checkpoints: {error.strerror or error}"
            ) from None
        except Exception as error:  # of a damaged file that orbax reads first
            if is_peer_error(error):
                raise
            raise VaaniError(
                f"the _CHECKPOINT_METADATA of a checkpoint in {directory} is damaged"
                f" ({first_line(error, 200)}): delete files of that name, checkpoints"
                " are read without them"
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
        """Ends what is going on; raises its errors unless another is on its way."""
        failing = sys.exc_info()[0] is not None
        try:
            self._manager.close()
        except Exception:
            if not failing:
                raise

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
                if self._is_gone(step):
                    raise GoneError(step) from error
                continue
            if isinstance(loss, int | float) and math.isfinite(loss):
                losses[step] = loss
        return min(losses, key=lambda s: (losses[s], s)) if losses else None

    def restore(
        self,
        make_target: Callable[[Meta], dict[str, Tree]],
        *,
        step: int | None = None,
        notify: Callable[[str], None] = print,
        set_aside: bool = False,
        make_take: Callable[[Meta], Take] | None = None,
    ) -> Restored | None:
        """Reads a checkpoint, or the newest one that is whole.

        Args:
          make_target: gets the metadata, and returns the items to read as abstract
            pytrees (`jax.eval_shape`); may raise VaaniError to refuse the checkpoint.
          step: which; None for the newest, or the one before it if that is damaged.
          notify: receives one line for each damaged checkpoint passed over.
          set_aside: whether to rename damaged checkpoints, so that the steps can be
            saved again.
          make_take: gets the metadata, and returns a function that every array passes
            as soon as it is read and verified; what that makes of it is in its place
            in the result. Small arrays come first, and no more than `PART_BYTES`, or
            one larger array, are in memory as they were saved.

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
                return self._read(candidate, make_target, make_take)
            except VaaniError:
                raise
            except Exception as error:  # damage shows itself in any type
                if self._is_gone(candidate):
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

    def _read(
        self,
        step: int,
        make_target: Callable[[Meta], Any],
        make_take: Callable[[Meta], Take] | None,
    ) -> Restored:
        meta = self.meta(step)
        target = make_target(meta)
        if make_take is not None:
            take = make_take(meta)
            items = {
                name: self._read_parts(step, name, tree, meta, take)
                for name, tree in target.items()
            }
            return Restored(step, items, meta)
        restored = self._manager.restore(
            step,
            args=ocp.args.Composite(
                **{name: ocp.args.StandardRestore(t) for name, t in target.items()}
            ),
        )
        items = {name: restored[name] for name in target}
        for name, tree in items.items():
            _check(name, fingerprints(tree), meta)
        return Restored(step, items, meta)

    def _read_parts(
        self, step: int, name: str, target: Tree, meta: Meta, take: Take
    ) -> Tree:
        """An item of a checkpoint, a few arrays at a time, each passed to ``take``."""
        folder = self._folder(step) / name
        structure: Any
        found, structure = jax.tree_util.tree_flatten_with_path(target)
        paths, shapes = zip(*found, strict=True)
        arguments = [
            ocp.ArrayRestoreArgs(
                sharding=s.sharding, global_shape=s.shape, dtype=s.dtype
            )
            for s in shapes
        ]

        def chosen(values: Sequence[Any], part: list[int]) -> Tree:
            left_out = [ocp.PLACEHOLDER] * len(values)
            for i in part:
                left_out[i] = values[i]
            return structure.unflatten(left_out)

        taken: list[Any] = [None] * len(shapes)
        with contextlib.closing(
            ocp.Checkpointer(ocp.PyTreeCheckpointHandler())
        ) as reader:
            for part in _parts([math.prod(s.shape) * s.dtype.itemsize for s in shapes]):
                read = structure.flatten_up_to(
                    reader.restore(
                        folder,
                        ocp.args.PyTreeRestore(
                            chosen(shapes, part), chosen(arguments, part)
                        ),
                    )
                )
                _check(name, dict(_mark(paths[i], read[i]) for i in part), meta)
                for i in part:
                    taken[i] = take(leaves.keys(paths[i]), read[i])
                    read[i] = None
        return structure.unflatten(taken)

    def _folder(self, step: int) -> pathlib.Path:
        return self.directory / f"step_{step}"

    def _is_gone(self, step: int) -> bool:
        """Whether a checkpoint that can't be read has been removed, or soon will be.

        A reader may meet it half removed; damage stays.
        """
        if not self._read_only:  # its own: another process may set it aside already
            return False
        folder, end = self._folder(step), time.monotonic() + REMOVAL
        while folder.exists():
            if time.monotonic() > end:
                return False
            time.sleep(0.05)
        return True

    def _set_aside(self, step: int) -> None:
        if is_first():
            folder = self._folder(step)
            number = 0
            while (target := self.directory / f"damaged-{step}-{number}").exists():
                number += 1
            folder.rename(target)
        wait_for_all(f"checkpoint {step} set aside")
        self._manager.reload()

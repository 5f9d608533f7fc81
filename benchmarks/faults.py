"""Counted faults: kills, write errors, damaged files, bad batches, lost peers.

    python benchmarks/faults.py --resume=faults.jsonl              # some hours

Each try does harm, then asks whether anything was lost. Of a run, everything: at its
end its parameters, its optimizer's state and its metrics must be, to the bit, those of
a run that nothing happened to. Parts:

* kills: ``kill -9`` of a training run, one half at random moments, the other within a
  call that writes; the same command then goes on from the newest checkpoint;
* writes: one call that writes, each from it on, or every k-th fails with ENOSPC, EIO,
  EROFS or EDQUOT. The command must end with one line and status 1, leaving nothing
  half-written, or finish; the same command without faults then gives the same bits;
* mutations: bits flipped, files cut, fields of JSON of other types and sizes: each
  gives a model or one line, in bearable memory;
* accidents: a batch whose loss is NaN, and one step with a thousand times the learning
  rate: a tuned run survives, an untuned one ends in one line and goes on as if nothing
  had happened;
* peers: of two processes one is killed; the other must end, and one alone go on.

A try counts as survived, lost (bits, files or steps are missing), crashed (a traceback,
a signal, more lines than one, a giant allocation) or hung. What is counted is kept in
--resume, and the table is stored under benchmarks/results. Linux only; without a C
compiler all kills happen at random moments, and "writes" is left out.
"""

import argparse
import collections
import datetime
import errno
import functools
import hashlib
import importlib
import json
import logging
import math
import os
import pathlib
import platform
import random
import re
import resource
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import mutations  # noqa: E402
import sessions  # noqa: E402

ENDS = ["survived", "lost", "crashed", "hung"]
TEXT = "to be or not to be, that is the question; whether it is nobler to ask. " * 80
KILLS_A_RUN = 10
MUTATIONS_A_TRY = 250
ERRORS = [errno.ENOSPC, errno.EIO, errno.EROFS, errno.EDQUOT]
FULL = (errno.ENOSPC, errno.EDQUOT)  # with these, what was written can be removed
GIANT = 2**30  # bytes more at once than a model of some kilobytes can need
# Runs that are killed: all that is common, and two that differ in most of the rest.
COMMON: dict[str, Any] = {
    "batch_size": 2,
    "num_steps": 24,
    "save_interval": 2,
    "eval_interval": 12,
    "log_interval": 2,
    "model.dim": 16,
    "model.n_heads": 1,
    "model.n_layers": 1,
    "model.max_seq_len": 16,
    "sample.prompts": "()",
}
RUNS: dict[str, dict[str, Any]] = {
    "tuned": {},
    "untuned": {
        "use_tuner": False,
        "learning_rate": 1e-3,
        "optim.name": "muon",
        "optim.accumulation_steps": 2,
        "execution.scan_layers": True,
    },
}
# Of a run whose writes fail: it samples, too.
SHORT = {
    "num_steps": 12,
    "save_interval": 4,
    "eval_interval": 6,
    "sample_interval": 6,
    "sample.prompts": "('to',)",
    "sample.max_new_tokens": 4,
}
# Of a run to which something happens in its middle: the tuner has to know it by then.
LONG = {"num_steps": 60, "save_interval": 10, "eval_interval": 10}
Rows = dict[str, dict[str, int]]


class Tally:
    """How tries of several rows ended."""

    def __init__(self, logs: pathlib.Path | None = None) -> None:
        self.rows: Rows = {}
        self.notes: list[str] = []
        self._logs = logs

    def add(
        self,
        row: str,
        end: str = "survived",
        note: str = "",
        log: pathlib.Path | None = None,
    ) -> None:
        """Counts one try; of one that went wrong, keeps the log."""
        counts = self.rows.setdefault(row, dict.fromkeys(ENDS, 0))
        counts[end] += 1
        if log is not None and self._logs is not None and end != "survived":
            self._logs.mkdir(parents=True, exist_ok=True)
            name = f"{len(list(self._logs.iterdir()))}-{os.getpid()}.txt"
            text = f"{row}: {end}: {note}\n\n{log.read_text(errors='replace')}"
            (self._logs / name).write_text(text)
        if note:
            self.notes.append(f"{row}: {end}: {note}")


class Journal:
    """Tries that are done, in a file that a second call goes on with."""

    def __init__(self, path: pathlib.Path, seed: int) -> None:
        self._path, self._seed = path, seed

    def entries(self) -> list[dict[str, Any]]:
        if not self._path.exists():
            return []
        lines = self._path.read_text().splitlines()
        return [e for e in map(json.loads, lines) if e["seed"] == self._seed]

    def done(self) -> set[tuple[str, int]]:
        return {(e["part"], e["index"]) for e in self.entries()}

    def put(self, part: str, index: int, tally: Tally) -> None:
        """Adds a try, in one write: several processes do."""
        entry = {"part": part, "index": index, "seed": self._seed}
        line = json.dumps({**entry, "rows": tally.rows, "notes": tally.notes}) + "\n"
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT
        file = os.open(self._path, flags, 0o644)
        os.write(file, line.encode())
        os.close(file)

    def rows(self) -> Rows:
        """Counts over all tries."""
        found: Rows = {}
        for entry in self.entries():
            for row, counts in entry["rows"].items():
                kept = found.setdefault(row, dict.fromkeys(ENDS, 0))
                for end, count in counts.items():
                    kept[end] += count
        return found


# -- Commands -----------------------------------------------------------------------


def preload() -> None:
    """Imports what commands import within functions; no backend starts."""
    from vaani_jax.cli import COMMANDS

    ours = [*COMMANDS.values(), "vaani_jax.cli.flags", "vaani_jax.interop.convert"]
    ours += ["vaani_jax.train.loop", "vaani_jax.inference.generate"]
    theirs = ["matplotlib.figure", "safetensors.numpy", "tokenizers", "gguf"]
    for name in [*ours, *theirs, "matplotlib.backends.backend_agg"]:
        importlib.import_module(name)


def vaani(*arguments: Any, cache: pathlib.Path | None = None) -> int:
    """What ``vaani ARGUMENTS`` does; the exit status."""
    import jax

    from vaani_jax.cli import main

    if cache is not None:
        jax.config.update("jax_compilation_cache_dir", str(cache))
    return main([str(argument) for argument in arguments])


def training(text: pathlib.Path, workdir: pathlib.Path, **keys: Any) -> list[str]:
    """The command that trains; ``keys`` with "__" for a dot."""
    flags = [f"--config={ROOT / 'configs' / 'debug.py'}", f"--workdir={workdir}"]
    values = {**COMMON, "data.path": text, **keys}
    return ["train", *flags, *(f"--config.{k}={v}" for k, v in values.items())]


def digest_of_run(workdir: pathlib.Path) -> str:
    """Of all that a run has come to: parameters, fingerprints of the rest, metrics."""
    import jax
    import numpy as np

    from vaani_jax.inference.model import load

    model = load(workdir, checkpoint="last", notify=lambda line: None)
    mark = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_flatten_with_path(model.variables)[0]:
        mark.update(jax.tree_util.keystr(path).encode() + np.asarray(leaf).tobytes())
    meta = workdir / "checkpoints" / f"step_{model.step}" / "meta" / "metadata"
    mark.update(json.dumps(json.loads(meta.read_text())["fingerprints"]).encode())
    for line in (workdir / "metrics.jsonl").read_text().splitlines():
        row = {k: v for k, v in json.loads(line).items() if not k.startswith("perf/")}
        mark.update(json.dumps(row).encode())
    return f"step {model.step}: {mark.hexdigest()}"


def digest_of_files(path: pathlib.Path) -> str:
    """Of what a folder or a file holds; the order in which orbax names is not told."""
    files = [path] if path.is_file() else sorted(path.rglob("*"))
    mark = hashlib.sha256()
    for file in files:
        if file.is_file():
            mark.update(f"{file.relative_to(path)}\n".encode() + file.read_bytes())
    return mark.hexdigest()


def train_then_digest(arguments: list[str], workdir: pathlib.Path) -> int:
    """Trains, and writes what came of it beside the workdir."""
    status = vaani(*arguments)
    if status == 0:
        workdir.with_suffix(".digest").write_text(digest_of_run(workdir))
    return status


def newest(workdir: pathlib.Path) -> int:
    """The step of the newest checkpoint that is in place; 0 for none."""
    folders = (workdir / "checkpoints").glob("step_*")
    names = [folder.name.removeprefix("step_") for folder in folders]
    return max((int(name) for name in names if name.isdecimal()), default=0)


def resumed(output: str) -> int | None:
    """The step that a session says it went on from."""
    found = re.search(r"^resumed at step ([\d,]+)", output, re.M)
    return int(found[1].replace(",", "")) if found else None


class Room:
    """A folder for the tries of one process, and what they are compared with."""

    def __init__(self, folder: pathlib.Path, seed: int) -> None:
        self.folder, self.seed = folder, seed
        self.log = folder / "log.txt"
        self.text = folder / "text.txt"
        folder.mkdir(exist_ok=True)
        self.text.write_text(TEXT)

    def rng(self, part: str, index: int) -> random.Random:
        return random.Random(f"{self.seed} {part} {index}")

    def fresh(self, name: str) -> pathlib.Path:
        """An empty folder of that name."""
        folder = self.folder / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        return folder

    def run(self, action: Callable[[], int], **options: Any) -> sessions.Session:
        return sessions.run(action, self.log, **options)

    def must(self, action: Callable[[], int], **options: Any) -> sessions.Session:
        """Runs what nothing happens to, with time for a first compilation."""
        session = self.run(action, patience=900, **options)
        if session.status != 0:
            raise SystemExit(f"failed without a fault:\n{session.output[-3000:]}")
        return session


# -- Kills --------------------------------------------------------------------------


class Kills:
    """Runs that are killed and go on, until they are done."""

    name = "kills"

    def __init__(self, room: Room, runs: list[str], shimmed: bool) -> None:
        self._room, self._shimmed = room, shimmed
        self._whole: dict[str, tuple[str, sessions.Session]] = {}
        for name in runs:
            folder = room.fresh("whole")
            workdir = folder / "run"
            arguments = training(room.text, workdir, **RUNS[name])
            action = functools.partial(train_then_digest, arguments, workdir)
            room.must(action)  # compiles
            shutil.rmtree(workdir)
            disk = sessions.Disk(folder) if shimmed else None
            session = room.must(action, disk=disk)
            told = workdir.with_suffix(".digest").read_text()
            self._whole[name] = told, session

    def try_once(self, index: int, count: int, tally: Tally) -> None:
        """Kills a run ``count`` times; a run that is done sooner begins anew."""
        room, rng = self._room, self._room.rng(self.name, index)
        name = rng.choice(list(self._whole))
        folder = room.fresh("killed")
        workdir = folder / "run"
        arguments = training(room.text, workdir, **RUNS[name])
        action = functools.partial(train_then_digest, arguments, workdir)
        killed = 0
        row = ""  # of the last kill
        while True:
            before = newest(workdir)
            within = self._shimmed and killed % 2 == 1
            options = {} if killed == count else self._kill(name, folder, rng, within)
            session = room.run(action, **options)
            end = self._judged(name, session, before, workdir)
            if end is not None and row:
                tally.rows[row]["survived"] -= 1  # it was that kill's doing
                tally.add(row, *end, log=room.log)
            elif end is not None:
                raise SystemExit(f"failed without a fault: {end}")
            if session.status == 0 or end is not None:
                shutil.rmtree(folder)
                folder.mkdir()
                row = ""
                if killed == count:
                    return
            else:
                row = "kill -9 within a write" if within else "kill -9 at any moment"
                tally.add(row)
                killed += 1

    def _kill(
        self, name: str, folder: pathlib.Path, rng: random.Random, within: bool
    ) -> dict[str, Any]:
        session = self._whole[name][1]
        if within:
            first = rng.randint(1, max(1, session.calls // 3))
            return {"disk": sessions.Disk(folder, first)}
        return {"kill_after": rng.uniform(0.01, 0.8 * session.seconds)}

    def _judged(
        self,
        name: str,
        session: sessions.Session,
        before: int,
        workdir: pathlib.Path,
    ) -> tuple[str, str] | None:
        """What is wrong with a session after a kill; None for nothing."""
        step = resumed(session.output)
        if step is not None and step != before:
            return "lost", f"step {before} was saved, resumed at {step}"
        if session.status == -signal.SIGKILL:
            return None
        if session.fault:
            return session.fault, session.ending
        if session.status != 0:
            return "lost", session.ending
        told = workdir.with_suffix(".digest").read_text()
        if told != self._whole[name][0]:
            return "lost", f"{told} is not {self._whole[name][0]}"
        return None


# -- Write errors -------------------------------------------------------------------


class Writes:
    """Commands whose writes fail."""

    name = "writes"

    def __init__(self, room: Room, commands: list[str]) -> None:
        self._room = room
        self._trained = room.folder / "trained"
        self._half = room.folder / "half"
        shutil.rmtree(self._trained, ignore_errors=True)
        shutil.rmtree(self._half, ignore_errors=True)
        room.must(lambda: vaani(*training(room.text, self._trained, **SHORT)))
        half = {**SHORT, "num_steps": 6}
        room.must(lambda: vaani(*training(room.text, self._half, **half)))
        exported = room.folder / "exported"
        shutil.rmtree(exported, ignore_errors=True)
        flags = "--workdir", self._trained, "--output", exported, "--format=hf"
        room.must(lambda: vaani("export", *flags))
        from_run, from_folder = f"--workdir={self._trained}", f"--from={exported}"
        generate = "generate", from_run, "--max-new-tokens=8", "--prompt=to"
        # What follows the dash only tells rows' commands apart.
        self._commands: dict[str, tuple[Any, ...]] = {
            "train - new": (),
            "pack": ("pack", from_run),
            "export - hf": ("export", from_run, "--format=hf"),
            "train - resumed": (),
            "evaluate": ("evaluate", from_run, "--json"),
            "export - hf-packed": ("export", from_run, "--format=hf-packed"),
            "import": ("import", from_folder),
            "export - gguf": ("export", from_run, "--format=gguf", "--type=f16"),
            "generate": generate,
            "train - again": (),
            "generate - first": generate,  # nothing of it is compiled yet
        }
        self._names = commands or list(self._commands)
        self._whole = {}
        for name in dict.fromkeys(self._names):
            room.must(self._action(name, self._prepared(name)))  # compiles
            folder = self._prepared(name)
            session = room.must(
                self._action(name, folder),
                disk=sessions.Disk(folder),
                stdout=folder / "out.txt",
            )
            self._whole[name] = session, self._digest(name, folder)

    def _prepared(self, name: str) -> pathlib.Path:
        folder = self._room.fresh("failing")
        if name == "train - resumed":
            shutil.copytree(self._half, folder / "run")
        return folder

    def _action(self, name: str, folder: pathlib.Path) -> Callable[[], int]:
        if name.startswith("train"):
            arguments = training(self._room.text, folder / "run", **SHORT)
            return functools.partial(train_then_digest, arguments, folder / "run")
        target: list[Any] = []
        if name == "import":
            target = ["--workdir", folder / "new"]
        elif self._writes(name):
            target = ["--output", folder / "new"]
        cache = folder / "cache" if name == "generate - first" else None
        return functools.partial(vaani, *self._commands[name], *target, cache=cache)

    @staticmethod
    def _writes(name: str) -> bool:
        return not name.startswith(("train", "evaluate", "generate"))

    def _made_whole(self, name: str, folder: pathlib.Path) -> bool:
        there = self._writes(name) and (folder / "new").exists()
        return there and self._digest(name, folder) == self._whole[name][1]

    def _digest(self, name: str, folder: pathlib.Path) -> str:
        """Of what a command gives."""
        if name.startswith("train"):
            return (folder / "run.digest").read_text()
        if name == "import":
            path = folder / "new" / "checkpoints" / "step_0" / "meta" / "metadata"
            return json.dumps(json.loads(path.read_text())["fingerprints"])
        if self._writes(name):
            return digest_of_files(folder / "new")
        return (folder / "out.txt").read_text()

    def try_once(self, index: int, count: int, tally: Tally) -> None:
        """Lets one command fail, and runs it again."""
        del count
        room, rng = self._room, self._room.rng(self.name, index)
        name = self._names[index % len(self._names)]
        calls = self._whole[name][0].calls
        while True:
            folder = self._prepared(name)
            first = rng.randint(1, max(1, calls))
            error = rng.choice(ERRORS)
            period = rng.choice([0, 1, first])
            disk = sessions.Disk(folder, first, period, error)
            options = {"disk": disk, "stdout": folder / "out.txt"}
            session = room.run(self._action(name, folder), **options)
            if session.hits or not session.calls:
                break  # else the call that was chosen did not come
        how = {0: "once", 1: "from there on"}.get(period, "and every so many")
        told = f"{name}, {errno.errorcode[error]} at {first} of {calls}, {how}: "
        end = self._judged(name, folder, session, removable=error in FULL or not period)
        row = f"write errors, {name.partition(' ')[0]}"
        if end is None:
            tally.add(row)
        else:
            tally.add(row, end[0], told + end[1], log=room.log)

    def _judged(
        self,
        name: str,
        folder: pathlib.Path,
        session: sessions.Session,
        *,
        removable: bool,
    ) -> tuple[str, str] | None:
        if session.fault:
            return session.fault, session.ending
        whole = self._whole[name][1]
        if session.status == 0 and not name.startswith("train"):
            if not self._writes(name) or self._digest(name, folder) == whole:
                return None
            return "lost", "finished with other bits"
        if self._made_whole(name, folder):
            return None  # what failed came after it
        left = [path.name for path in folder.iterdir() if "new" in path.name]
        if self._writes(name) and left and removable:
            return "lost", f"half-written: {left[0]} is left after {session.ending}"
        again = self._room.run(self._action(name, folder), stdout=folder / "out.txt")
        if again.fault:
            return again.fault, f"the second time: {again.ending}"
        if again.status != 0:
            return "lost", f"the second time: {again.ending}"
        found = self._digest(name, folder)
        if found != whole:
            return "lost", f"the second time: {found[:200]} is not {whole[:200]}"
        if name.startswith("train"):
            made = ("run.json", "training_curves.png", "training_history.json")
            missing = [n for n in made if not (folder / "run" / n).exists()]
            if missing:
                return "lost", f"the second time: without {missing[0]}"
        return None


# -- Damaged files ------------------------------------------------------------------


class Mutations:
    """Files of models, damaged and read, many in one process."""

    name = "mutations"

    def __init__(self, room: Room, toy: bool) -> None:
        self._room = room
        self._made = room.folder / "made"
        shutil.rmtree(self._made, ignore_errors=True)
        self._made.mkdir()
        made, tokenizer = self._made, self._made / "tokenizer.json"
        keys: dict[str, Any] = SHORT
        types = ["f16"]
        if not toy:  # which reads characters, as runs that are compiled already
            tokenizer.write_text(self._tokenizer())
            names = made / "tokenizer_config.json"  # GGUF wants an end of a text
            names.write_text(json.dumps({"eos_token": "</s>"}))
            # A block of GGUF's smallest ternary type has 64 weights.
            keys = {**SHORT, "data.tokenizer_file": tokenizer, "model.dim": 64}
            types += ["q2_0", "q8_0"]
        command = training(room.text, made / "run", **keys)
        room.must(lambda: vaani(*command))
        run = f"--workdir={made / 'run'}"
        room.must(lambda: vaani("pack", run, "--output", made / "packed"))
        for form in ("hf", "hf-packed"):
            flags = f"--format={form}", "--output", made / form
            room.must(functools.partial(vaani, "export", run, *flags))
        for kind in types:
            file = made / f"{kind}.gguf"
            told = "--format=gguf", f"--type={kind}", "--output", file
            room.must(functools.partial(vaani, "export", run, *told))
        self._command = command

    @staticmethod
    def _tokenizer() -> str:
        """A byte-level BPE with special tokens."""
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=300,
            special_tokens=["<s>", "</s>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator([TEXT], trainer)
        return str(tokenizer.to_str())

    def try_once(self, index: int, count: int, tally: Tally) -> None:
        """Damages ``count`` files; where one ends the process, another goes on."""
        at = 0
        folder = self._room.folder / "damaged"
        while at < count:
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(self._made, folder)
            reader, writer = os.pipe()
            sys.stdout.flush()
            process = os.fork()
            if process == 0:
                os.close(reader)
                self._work(folder, index, at, count, writer)
            os.close(writer)
            at = self._listen(reader, process, at, tally)
            os.close(reader)

    def _listen(self, reader: int, process: int, at: int, tally: Tally) -> int:
        """Counts what a process tells; returns how far it came."""
        pending, told, row, patience = b"", "", "", 300.0
        while True:
            ready = select.select([reader], [], [], patience)[0]
            data = os.read(reader, 65536) if ready else b""
            if not data:
                break
            pending += data
            *lines, pending = pending.split(b"\n")
            for line in lines:
                entry = json.loads(line)
                told = entry["file"]
                if entry["end"]:
                    tally.add(entry["row"], entry["end"], entry["note"])
                    at += 1
                patience = 120.0 if not entry["end"] else 300.0
                row = entry["row"]
        if ready:
            status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
            if status == 0:
                return at
            if not told:
                raise SystemExit(f"what reads damaged files ended with {status}")
            tally.add(row, "crashed", f"{told}: the process ended with {status}")
        else:
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
            tally.add(row, "hung", told)
        return at + 1

    def _work(
        self, folder: pathlib.Path, index: int, at: int, count: int, writer: int
    ) -> None:
        """The process that reads damaged files; it doesn't return."""
        log = self._room.folder / "damaged.log"
        stream = os.open(log, os.O_CREAT | os.O_TRUNC | os.O_WRONLY, 0o644)
        os.dup2(stream, 1)
        os.dup2(stream, 2)

        def tell(**entry: str) -> None:
            os.write(writer, (json.dumps(entry) + "\n").encode())

        try:
            logging.getLogger("absl").setLevel(logging.CRITICAL)  # as commands do
            readers = Readers(folder, self._command)
            size = int(pathlib.Path("/proc/self/statm").read_text().split()[0])
            limit = size * resource.getpagesize() + 8 * GIANT
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
            for i in range(at, count):
                rng = self._room.rng(self.name, index * MUTATIONS_A_TRY + i)
                row, file, read = readers.choose(rng)
                content = file.read_bytes()
                name = f"{index}/{i} {file.relative_to(folder)}"
                damaged = mutations.mutated(file.name, content, rng)
                tell(row=row, file=name, end="", note="")
                file.write_bytes(damaged)
                said = os.fstat(stream).st_size
                end, note = judged(read)
                if b"Traceback (most" in (more := log.read_bytes()[said:]):
                    end, note = "crashed", f"said {more[:500]!r}"
                file.write_bytes(content)
                note = f"{name}: {note}" if end != "survived" else ""
                tell(row=row, file=name, end=end, note=note)
        except BaseException:
            import traceback

            traceback.print_exc()
            os._exit(70)
        os._exit(0)


def judged(read: Callable[[], Any]) -> tuple[str, str]:
    """How the reading of a damaged file ends, and what is wrong with it."""
    from vaani_jax.errors import VaaniError

    before = peak(reset=True)
    try:
        read()
    except (VaaniError, OSError) as error:  # the command line makes one line of them
        if len(str(error).splitlines()) > 1 or len(str(error)) > 2000:
            return "crashed", f"not one line: {error}"[:500]
    except BaseException as error:
        import traceback

        frames = traceback.extract_tb(error.__traceback__)
        ours = [f for f in frames if "vaani_jax" in f.filename] or list(frames)
        place = f"{pathlib.Path(ours[-1].filename).name}:{ours[-1].lineno}"
        return "crashed", f"{type(error).__name__} at {place}: {error}"[:500]
    if peak() - before > GIANT:
        return "crashed", "a giant allocation"
    return "survived", ""


def peak(*, reset: bool = False) -> int:
    """Bytes of the largest resident memory so far, or since it was last reset."""
    if reset:
        pathlib.Path("/proc/self/clear_refs").write_text("5")
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    line = next(line for line in lines if line.startswith("VmHWM"))
    return 1024 * int(line.split()[1])


class Readers:
    """What reads the files of a folder that `Mutations` made."""

    def __init__(self, folder: pathlib.Path, command: list[str]) -> None:
        import dataclasses

        import jax

        from vaani_jax.cli.flags import config_from_flags
        from vaani_jax.devices.mesh import make_mesh
        from vaani_jax.inference.model import load
        from vaani_jax.train.program import make_program

        self._folder = folder
        self._known = load(folder / "run").module
        config = config_from_flags(command[1:]).config
        config = dataclasses.replace(config, model=self._known.architecture)
        mesh = make_mesh(config.mesh)
        self._mesh = jax.set_mesh(mesh)
        self._mesh.__enter__()
        self._program = make_program(config, mesh, config.num_steps)
        self._config = config

    def choose(self, rng: random.Random) -> tuple[str, pathlib.Path, Callable[[], Any]]:
        """A row, a file of its kind, and what reads it."""
        folder = self._folder
        form = folder / rng.choice(["hf", "hf-packed"])
        use = rng.randrange(4) == 0
        kind = rng.randrange(13) // 2
        if kind == 6:
            file = folder / "run" / rng.choice(["metrics.jsonl", "tuner.jsonl"])
            return "damaged records", file, functools.partial(self._record, file)
        if kind == 0:
            files = [p for p in (folder / "run").rglob("*") if p.is_file()]
            inside = sorted(p for p in files if "checkpoints" in p.parts)
            # Half of the time what is read as JSON; else all are alike.
            plain = [p for p in inside if p.name in ("metadata", "_METADATA")]
            file = rng.choice(plain if rng.randrange(2) else inside)
            if "training" in file.parts:
                return "damaged checkpoints", file, self._resume
            which = rng.choice(["best", "last"])
            load = functools.partial(self._load, folder / "run", which, use)
            return "damaged checkpoints", file, load
        if kind == 1:
            file = rng.choice(sorted((folder / "packed").iterdir()))
            load = functools.partial(self._load, folder / "packed", "best", use)
            return "damaged packed folders", file, load
        if kind == 2:
            read = functools.partial(self._import, form, use)
            return "damaged safetensors", form / "model.safetensors", read
        if kind == 3:
            names = ["tokenizer.json"] * 3 + ["tokenizer_config.json"]
            file = form / rng.choice(names)
            return "damaged tokenizers", file, functools.partial(self._spell, file)
        if kind == 4:
            file = rng.choice(sorted(folder.glob("*.gguf")))
            return (
                "damaged GGUF files",
                file,
                functools.partial(self._import, file, use),
            )
        read = functools.partial(self._import, form, use)
        return "damaged configs", form / "config.json", read

    def _load(self, folder: pathlib.Path, which: str, use: bool) -> None:
        from vaani_jax.inference.model import load

        self._use(load(folder, checkpoint=which, notify=lambda line: None), use)

    def _resume(self) -> None:
        """Reads all that a training run reads."""
        from vaani_jax.runs.checkpoints import Checkpoints
        from vaani_jax.train.start import restore

        checkpoints = Checkpoints(self._folder / "run" / "checkpoints", read_only=True)
        try:
            restore(self._program, checkpoints, lambda line: None)
        finally:
            checkpoints.close()

    def _import(self, form: pathlib.Path, use: bool) -> None:
        from vaani_jax.inference.model import Model
        from vaani_jax.interop.formats import opened

        found = opened(form)
        self._use(Model(found.module, found.variables(), found.tokenizer), use)

    def _spell(self, file: pathlib.Path) -> None:
        """Reads a tokenizer as an import does, and as training does."""
        import dataclasses

        from vaani_jax.data.corpus import make_tokenizer
        from vaani_jax.interop.tokenizers import from_folder

        size = self._known.architecture.vocab_size
        found = [from_folder(file.parent, size)]
        if file.name == "tokenizer.json":
            config = dataclasses.replace(self._config.data, tokenizer_file=str(file))
            found.append(make_tokenizer(config, None))
        for tokenizer in found:
            self._write(tokenizer)

    def _record(self, file: pathlib.Path) -> None:
        """Goes on with the records of a run, in a folder of its own."""
        from vaani_jax.runs.metrics import MetricWriter
        from vaani_jax.train.journal import Journal

        folder = self._folder / "records"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        shutil.copy(file, folder)
        writer = MetricWriter(folder, 2)
        writer.write_history()
        Journal(folder, 2, print).close()

    @staticmethod
    def _write(tokenizer: Any) -> None:
        tokenizer.decode(tokenizer.encode_prompt("to be"))
        tokenizer.decode(range(min(tokenizer.vocab_size, 1000)))

    def _use(self, model: Any, use: bool) -> None:
        """Writes a token; one that is another model than it was, now and then."""
        from vaani_jax.inference.generate import generate

        self._write(model.tokenizer)
        if use:
            prompt = model.tokenizer.encode_prompt("to be")
            generate(model, prompt[:8], max_new_tokens=1)


# -- Accidents in training ----------------------------------------------------------


class Accidents:
    """Batches that are NaN, and steps that explode."""

    name = "accidents"

    def __init__(self, room: Room, runs: list[str]) -> None:
        self._room, self._runs = room, runs
        self._whole = {}
        for name in runs:
            workdir = room.fresh("calm") / "run"
            arguments = training(room.text, workdir, **RUNS[name], **LONG)
            room.must(functools.partial(train_then_digest, arguments, workdir))
            self._whole[name] = workdir.with_suffix(".digest").read_text()

    def try_once(self, index: int, count: int, tally: Tally) -> None:
        """One accident, and what comes after it."""
        del count
        room, rng = self._room, self._room.rng(self.name, index)
        kind = ["NaN batches", "exploding steps"][index % 2]
        name = self._runs[index // 2 % len(self._runs)]
        middle = rng.randrange(20, 50)
        workdir = room.fresh("accident") / "run"
        arguments = training(room.text, workdir, **RUNS[name], **LONG)

        def struck() -> int:
            with accident(kind, middle):
                return vaani(*arguments)

        session = room.run(struck)
        end: tuple[str, str] | None = None
        if session.fault:
            end = session.fault, session.ending
        elif session.status == 0:
            final = json.loads((workdir / "run.json").read_text())["final"]
            # Worse than guessing: nothing came of it.
            if name == "tuned" and not final["loss"] < math.log(len(set(TEXT))):
                end = "lost", f"final loss {final['loss']}"
        elif name == "tuned":
            end = "lost", session.ending
        else:
            action = functools.partial(train_then_digest, arguments, workdir)
            again = room.run(action)
            told = workdir.with_suffix(".digest")
            # An explosion may be saved before it is seen; NaN never is.
            if again.fault or again.status != 0:
                end = again.fault or "lost", again.ending
            elif kind == "NaN batches" and told.read_text() != self._whole[name]:
                end = "lost", "goes on with other bits"
        row = f"{kind}, {name}"
        if end is None:
            tally.add(row)
        else:
            tally.add(row, end[0], f"step {middle}: {end[1]}", log=room.log)


def accident(kind: str, middle: int) -> Any:
    """Makes something go wrong at a step of a run."""
    import jax.numpy as jnp

    from vaani_jax.data.batches import Batches
    from vaani_jax.train import program
    from vaani_jax.train.schedules import Schedule

    class Multiplied(Schedule):
        def decay(self, step: Any) -> Any:
            return super().decay(step) * jnp.where(step == middle, 1000.0, 1.0)

    batch_at = Batches.batch_at

    def poisoned(self: Batches, step: int, *more: Any) -> Any:
        tokens = batch_at(self, step, *more)
        # An id past the vocabulary embeds as NaN.
        return tokens * 0 + 1_000_000 if step == middle else tokens

    if kind == "NaN batches":
        return mock.patch.object(Batches, "batch_at", poisoned)
    return mock.patch.object(program, "Schedule", Multiplied)


# -- A lost peer --------------------------------------------------------------------


class Peers:
    """Two processes, of which one is killed."""

    name = "peers"

    def __init__(self, room: Room) -> None:
        self._room = room

    def try_once(self, index: int, count: int, tally: Tally) -> None:
        """Loses one of two processes; the run then goes on in one."""
        del count
        rng = self._room.rng(self.name, index)
        folder = self._room.fresh("peers")
        workdir, lost = folder / "run", rng.randrange(2)
        processes = self._start(workdir, 2, 100_000)
        end: tuple[str, str] | None = None
        try:
            deadline = time.monotonic() + 300
            while newest(workdir) < 4 and time.monotonic() < deadline:
                time.sleep(0.1)
            time.sleep(rng.uniform(0, 3))
            processes[lost].send_signal(signal.SIGKILL)
            try:
                status = processes[1 - lost].wait(90)
            except subprocess.TimeoutExpired:
                end = "hung", "the other goes on for 90 s"
            else:
                time.sleep(2)  # its last words come after it
                output = (folder / f"{1 - lost}.log").read_text(errors="replace")
                if status == 0 or "error: " not in output:
                    end = "crashed", output[-300:]
        finally:
            for process in processes:
                process.kill()
                process.wait()
        saved = newest(workdir)
        if end is None:
            (alone,) = self._start(workdir, 1, saved + 4)
            status = alone.wait(300)
            output = (folder / "0.log").read_text(errors="replace")
            if status != 0 or resumed(output) != saved:
                end = "lost", f"step {saved} was saved: {output[-300:]}"
        tally.add("a lost peer", *(end or ()))

    def _start(
        self, workdir: pathlib.Path, count: int, steps: int
    ) -> list[subprocess.Popen[bytes]]:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        keys: dict[str, Any] = {"num_steps": steps, "eval_interval": 100_000}
        keys |= {"use_tuner": False, "learning_rate": 1e-3}
        keys["optim.schedule"] = "constant"
        command = training(self._room.text, workdir, **keys)
        found = []
        for i in range(count):
            peers = [f"--coordinator=127.0.0.1:{port}", f"--num_processes={count}"]
            peers = [*peers, f"--process_id={i}"] if count > 1 else []
            devices = f"--xla_force_host_platform_device_count={2 // count}"
            environment = {**os.environ, "XLA_FLAGS": devices, "JAX_PLATFORMS": "cpu"}
            environment.pop("LD_PRELOAD", None)
            with (workdir.parent / f"{i}.log").open("wb") as log:
                found.append(
                    subprocess.Popen(
                        [sys.executable, "-m", "vaani_jax", *command, *peers],
                        cwd=ROOT,
                        env=environment,
                        stdout=log,
                        stderr=subprocess.STDOUT,
                    )
                )
        return found


# -- All tries ----------------------------------------------------------------------


def split(total: int, each: int) -> list[int]:
    """A number in parts of at most so many."""
    return [min(each, total - at) for at in range(0, total, each)]


def plan(options: argparse.Namespace) -> Iterator[tuple[str, int, int]]:
    """Every try: its part, its number, and how many faults it counts."""
    parts = {
        "kills": split(options.kills, KILLS_A_RUN),
        "writes": split(options.write_errors, 1),
        "mutations": split(options.mutations, MUTATIONS_A_TRY),
        "accidents": split(options.accidents, 1),
        "peers": split(options.peers, 1),
    }
    for part in filter(None, options.parts.split(",")):
        for index, count in enumerate(parts[part]):
            yield part, index, count


def make(part: str, room: Room, options: argparse.Namespace, shimmed: bool) -> Any:
    """What does the tries of a part."""
    runs = list(RUNS)[:1] if options.toy else list(RUNS)
    if part == "kills":
        return Kills(room, runs, shimmed)
    if part == "writes":
        few = ["train - new", "pack", "evaluate"] if options.toy else []
        return Writes(room, few)
    if part == "mutations":
        return Mutations(room, options.toy)
    if part == "accidents":
        return Accidents(room, runs)
    return Peers(room)


def work(
    folder: pathlib.Path,
    tries: list[tuple[str, int, int]],
    options: argparse.Namespace,
    shimmed: bool,
    journal: Journal,
) -> None:
    """Does tries, one after another."""
    room, maker = Room(folder, options.seed), None
    for part, index, count in tries:
        if maker is None or maker.name != part:
            maker = make(part, room, options, shimmed)
        logs = pathlib.Path(options.logs) if options.logs else None
        tally, began = Tally(logs), time.monotonic()
        maker.try_once(index, count, tally)
        journal.put(part, index, tally)
        for note in tally.notes:
            print(note, file=sys.stderr)
        spent = time.monotonic() - began
        print(f"{part} {index}: {spent:.1f} s", file=sys.stderr, flush=True)


def run_all(
    room: pathlib.Path, options: argparse.Namespace, shimmed: bool, journal: Journal
) -> None:
    """All tries that are not done yet, in forks side by side."""
    done = journal.done()
    tries = [t for t in plan(options) if t[:2] not in done]
    if not shimmed:
        print("no C compiler: write errors are left out", file=sys.stderr)
        tries = [t for t in tries if t[0] != "writes"]
    preload()
    workers = []
    for job in range(options.processes):
        sys.stderr.flush()
        process = os.fork()
        if process == 0:
            try:
                mine = tries[job :: options.processes]
                work(room / f"room-{job}", mine, options, shimmed, journal)
            except BaseException:
                import traceback

                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        workers.append(process)
    failed = [os.waitpid(process, 0)[1] for process in workers]
    if any(failed):
        raise SystemExit("a process of the benchmark failed, see above")


def machine() -> str:
    """This machine, in words."""
    lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    names = [li.split(":")[1].strip() for li in lines if li.startswith("model name")]
    return f"{os.cpu_count()} cores of {names[0] if names else platform.machine()}"


def store(rows: list[list[Any]], options: argparse.Namespace) -> None:
    """Writes the table as the pages of the documentation take it."""
    content = {
        "about": "counted tries and how they ended, of models of some thousand"
        " parameters; lost: bits, files or steps were missing; crashed: anything but"
        " one line; tries that showed a defect were repeated once it was mended",
        "command": f"python benchmarks/faults.py --seed={options.seed}",
        "machine": options.machine or machine(),
        "date": datetime.date.today().isoformat(),
    }
    lines = [f" {json.dumps(k)}: {json.dumps(v)}," for k, v in content.items()]
    columns = json.dumps(["", "tried", *ENDS])
    body = ",\n".join(f"    {json.dumps(row)}" for row in rows)
    table = (
        f'  "faults": {{\n   "columns": {columns},\n   "rows": [\n{body}\n   ]\n  }}'
    )
    text = "\n".join(["{", *lines, ' "tables": {', table, " }", "}"])
    pathlib.Path(options.store).write_text(text + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=1000)
    parser.add_argument("--write-errors", type=int, default=500)
    parser.add_argument("--mutations", type=int, default=10_000)
    parser.add_argument("--accidents", type=int, default=20)
    parser.add_argument("--peers", type=int, default=10)
    parts = "kills,writes,mutations,accidents,peers"
    parser.add_argument("--parts", default=parts, help="empty: only the table")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=1, help="side by side")
    parser.add_argument("--resume", default="", help="file to keep tries in")
    parser.add_argument("--logs", default="", help="folder: logs of what went wrong")
    parser.add_argument(
        "--store",
        default=str(ROOT / "benchmarks" / "results" / "faults.json"),
        help="JSON file for the table",
    )
    parser.add_argument("--machine", default="", help="in words, for that file")
    parser.add_argument("--toy", action="store_true", help="seconds: does it run?")
    options = parser.parse_args()
    if options.toy:
        options.kills, options.write_errors, options.mutations = 20, 3, 40
        options.accidents, options.peers, options.store = 0, 0, "faults.json"
        COMMON.update(num_steps=SHORT["num_steps"], eval_interval=6)
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    inherited = os.environ.get(sessions.LOADED)
    made = pathlib.Path(inherited).parent if inherited else None
    room = made or pathlib.Path(tempfile.mkdtemp(prefix="vaani-faults-"))
    try:
        shimmed = sessions.begin_again_with_disk(room)
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(room / "compiled"))
        os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
        os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
        kept = pathlib.Path(options.resume) if options.resume else room / "tries.jsonl"
        journal = Journal(kept, options.seed)
        run_all(room, options, shimmed, journal)
        show(journal, options)
    finally:
        shutil.rmtree(room, ignore_errors=True)


def show(journal: Journal, options: argparse.Namespace) -> None:
    """Prints the table, with what went wrong under it, and stores it."""
    table: list[list[Any]] = [
        [row, sum(counts.values()), *counts.values()]
        for row, counts in journal.rows().items()
    ]
    print(f"{'':32}" + "".join(f"{title:>10}" for title in ["tried", *ENDS]))
    for name, *numbers in table:
        print(f"{name:32}" + "".join(f"{number:10,}" for number in numbers))
    notes = collections.Counter(n for e in journal.entries() for n in e["notes"])
    for note, count in notes.items():
        print(f"{count} x {note}")
    store(table, options)


if __name__ == "__main__":
    main()

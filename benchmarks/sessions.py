"""Commands run in forks of one process, on a disk that fails; of benchmarks/faults.py.

JAX is imported once, before any of its backends starts, so that a fork begins where an
interpreter would after seconds of imports. What kills or fails is `faults_disk.c`.
"""

import atexit
import ctypes
import dataclasses
import mmap
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable

ROOT = pathlib.Path(__file__).resolve().parent.parent
SOURCE = ROOT / "benchmarks" / "faults_disk.c"
LOADED = "VAANI_FAULTS_DISK"  # says to a second self where the library is
PATIENCE = 240.0  # seconds until a session that takes some five counts as hung


@dataclasses.dataclass(frozen=True)
class Disk:
    """What becomes of the calls that write below a folder.

    Attributes:
      below: the folder.
      first: the call that fails, from 1; 0 only counts them.
      period: fails again after so many calls; 0 for never.
      error: errno; 0 kills the process instead.
    """

    below: pathlib.Path
    first: int = 0
    period: int = 0
    error: int = 0


@dataclasses.dataclass(frozen=True)
class Session:
    """A command that ran, or was ended.

    Attributes:
      status: exit status, minus a signal, or None where it hung.
      output: what it wrote to both streams.
      seconds: that it took.
      calls: that wrote below the folder of its disk.
      hits: of them, those that failed or killed.
    """

    status: int | None
    output: str
    seconds: float
    calls: int = 0
    hits: int = 0

    @property
    def fault(self) -> str:
        """What is wrong with how it ended: "hung", "crashed", or nothing."""
        if self.status is None:
            return "hung"
        errors = re.findall(r"^error: ", self.output, re.M)
        lines = self.output.rstrip().splitlines()
        orderly = self.status == 0 or (
            self.status == 1 and len(errors) == 1 and lines[-1].startswith("error: ")
        )
        traced = re.search(r"Traceback \(most|Exception ignored in", self.output)
        return "" if orderly and not traced else "crashed"

    @property
    def ending(self) -> str:
        """Status and last words, for people."""
        lines = self.output.strip().splitlines() or [""]
        told = [line for line in lines if re.match(r"\w*(Error|error|Warning)", line)]
        return f"status {self.status}: {(told or lines)[-1][:300]}"


def begin_again_with_disk(room: pathlib.Path) -> bool:
    """Has this very process start again with the library; whether it is there.

    It must be loaded before libc, so what runs now can't do with it. False where there
    is no compiler.
    """
    if os.environ.get(LOADED):
        return True
    compiler, library = shutil.which("cc"), room / "faults_disk.so"
    if compiler is None:
        return False
    flags = ["-shared", "-fPIC", "-O2", "-o", str(library), str(SOURCE)]
    subprocess.run([compiler, *flags, "-ldl", "-pthread"], check=True)
    environment = {**os.environ, "LD_PRELOAD": str(library), LOADED: str(library)}
    environment.pop("PYTHONUNBUFFERED", None)  # what is buffered fails at the very end
    sys.stdout.flush()
    os.execve(sys.executable, [sys.executable, *sys.argv], environment)


def run(
    action: Callable[[], int],
    log: pathlib.Path,
    *,
    disk: Disk | None = None,
    stdout: pathlib.Path | None = None,
    kill_after: float = 0.0,
    patience: float = PATIENCE,
) -> Session:
    """Runs an action in a fork, to its end or until it is ended.

    Args:
      action: returns an exit status.
      log: receives what it writes to the standard streams.
      disk: what becomes of its writes; None for a good one.
      stdout: receives standard output alone, through that disk.
      kill_after: seconds until it is killed; 0 for never.
      patience: seconds until it counts as hung.
    """
    shared = mmap.mmap(-1, 16)
    log.write_bytes(b"")  # it may be killed before it writes anything
    sys.stdout.flush()
    sys.stderr.flush()
    began = time.monotonic()
    process = os.fork()
    if process == 0:
        _be(action, log, disk, stdout, shared)
    status: int | None = None
    while True:
        done, raw = os.waitpid(process, os.WNOHANG)
        if done:
            status = os.waitstatus_to_exitcode(raw)
            break
        spent = time.monotonic() - began
        if (kill_after and spent >= kill_after) or spent >= patience:
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
            status = None if spent >= patience else -signal.SIGKILL
            break
        time.sleep(0.003)
    seconds = time.monotonic() - began
    calls, hits = (int.from_bytes(shared[i : i + 8], "little") for i in (0, 8))
    output = log.read_text(errors="replace")
    if stdout is not None and stdout.exists():
        output = stdout.read_text(errors="replace") + "\n" + output
    return Session(status, output, seconds, calls, hits)


def _be(
    action: Callable[[], int],
    log: pathlib.Path,
    disk: Disk | None,
    stdout: pathlib.Path | None,
    shared: mmap.mmap,
) -> None:
    """The forked process; it ends as an interpreter does, and doesn't return."""
    status = 70
    try:
        flags = os.O_CREAT | os.O_TRUNC | os.O_WRONLY
        told = os.open(log, flags, 0o644)
        os.dup2(told, 2)
        os.dup2(told if stdout is None else os.open(stdout, flags, 0o644), 1)
        if disk is not None:
            _arm(disk, shared)
        status = action()
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
    try:
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
    except BaseException:
        traceback.print_exc()
    try:
        sys.stdout.flush()
    except OSError as error:
        status = 120
        os.write(2, f"Exception ignored in: stdout\n{error!r}\n".encode())
    os._exit(status)


def _arm(disk: Disk, shared: mmap.mmap) -> None:
    library = ctypes.CDLL(os.environ[LOADED])
    number = ctypes.c_long
    library.faults_arm.argtypes = [
        *(ctypes.c_void_p, ctypes.c_char_p, number, number, ctypes.c_int)
    ]
    address = ctypes.addressof(ctypes.c_char.from_buffer(shared))
    below = f"{disk.below}/".encode()
    library.faults_arm(address, below, disk.first, disk.period, disk.error)

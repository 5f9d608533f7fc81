"""Several processes, one job: how they join, agree, and end when one of them is lost.

JAX's own distributed runtime does it: `jax.distributed` finds the others and notices
when one is gone, XLA moves the data. All processes run the same program in the same
order, on the same files; only the first one shows and keeps what a run tells.
"""

import atexit
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from vaani_jax.errors import VaaniError
from vaani_jax.words import first_line

HEARTBEAT_SECONDS = 30  # without a sign of life, after which a process counts as lost


def launched_by(environment: Mapping[str, str]) -> str | None:
    """What started this process as one of several, by the variables it set; or None.

    Slurm's ``srun``, Open MPI's ``mpirun``, and TPU slices of several hosts as Cloud
    TPU and GKE describe them. A batch script alone, with no ``srun``, is one process.
    """

    def number(name: str) -> int:
        value = environment.get(name, "")
        return int(value) if value.isdecimal() else 1

    if "SLURM_STEP_ID" in environment and number("SLURM_STEP_NUM_TASKS") > 1:
        return "Slurm"
    if number("OMPI_COMM_WORLD_SIZE") > 1:
        return "Open MPI"
    hosts = environment.get("TPU_WORKER_HOSTNAMES", "")
    if "," in hosts or environment.get("MEGASCALE_COORDINATOR_ADDRESS"):
        return "a TPU slice"
    return None


def join(
    coordinator: str = "",
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    expected: bool = False,
) -> None:
    """Joins the other processes of this job, if there are any.

    Call it before anything touches a device.

    Args:
      coordinator: ``host:port`` of the first process; with the next two, for machines
        that no scheduler manages. What is not given comes from the environment.
      num_processes: how many there are.
      process_id: which this is, from 0.
      expected: whether to join in any case, for environments that only JAX knows.

    Raises:
      VaaniError: the environment says too little, or the others don't answer.
    """
    given = coordinator or num_processes is not None or process_id is not None
    launcher = launched_by(os.environ)
    if not (given or expected or launcher):
        return
    whole = coordinator and num_processes is not None and process_id is not None
    if given and not whole and launcher is None:
        raise VaaniError(
            "--coordinator=HOST:PORT, --num_processes=N and --process_id=I come"
            " together, unless a scheduler sets them"
        )
    if process_id is not None and process_id not in range(num_processes or sys.maxsize):
        raise VaaniError(
            f"--process_id={process_id} must be at least 0 and below"
            f" --num_processes={num_processes}"
        )
    if coordinator and not re.search(r":\d+$", coordinator):
        raise VaaniError(f"--coordinator={coordinator} must be HOST:PORT")
    if num_processes is None and launcher == "Open MPI":
        # JAX reads these from Open MPI 4 only.
        num_processes = int(os.environ["OMPI_COMM_WORLD_SIZE"])
        process_id = int(os.environ.get("OMPI_COMM_WORLD_RANK", "0"))
    try:
        jax.distributed.initialize(
            coordinator or None,
            num_processes,
            process_id,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
        )
    except (ValueError, TypeError, RuntimeError) as error:
        reason = first_line(error).rstrip(".")
        raise VaaniError(
            f"can't join the other processes of this job: {reason}. Start"
            " every process, or say --coordinator=HOST:PORT --num_processes=N"
            " --process_id=I to each"
        ) from None

    sys.excepthook = _end_at_once
    _leave_last_words()


# Reads until its starter is gone; nothing read means that it could not say goodbye.
_READER = "import sys; sys.stdin.read() or sys.stderr.write(sys.argv[1])"


_reader: subprocess.Popen[bytes] | None = None


_LOST = (
    "another process of the job is lost. What was saved is whole: start the job again,"
    " with any number of processes, to go on from the last checkpoint"
)


def _whoami() -> str:
    return f"process {jax.process_index()} of {jax.process_count()}"


def _leave_last_words() -> None:
    """Has a line printed if this process ends in a way that lets it say nothing.

    JAX's runtime aborts a process whose peers are lost, from a thread of its own, with
    a stack trace. The line after it says what to do.
    """
    global _reader
    line = f"error: {_whoami()} was ended: it was killed, or {_LOST}\n"
    _reader = subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", _READER, line],
        stdin=subprocess.PIPE,
        start_new_session=True,  # no Ctrl-C for it
    )
    atexit.register(_goodbye)


def _goodbye() -> None:
    if _reader is not None and _reader.returncode is None:
        _reader.communicate(b"goodbye")


def _end_at_once(*details: Any) -> None:
    """Shows an error that nobody caught, and leaves."""
    sys.__excepthook__(*details)
    leave(1)


def is_first() -> bool:
    """Whether this process is the one that writes and shows what a run tells."""
    return jax.process_index() == 0


def wait_for_all(where: str) -> None:
    """Returns when every process has come here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(where)


class Agreement:
    """A question that each process answers for itself, answered alike in all.

    One process gets a signal; all must leave the loop at the same step, or the others
    wait for it forever. With a single process, the question is asked each time; with
    several, `settle` asks it, and every call until the next gives what came of it.
    """

    def __init__(self, ask: Callable[[], bool]) -> None:
        self._ask = ask
        self._answer = False

    def __call__(self) -> bool:
        return self._ask() if jax.process_count() == 1 else self._answer

    def settle(self) -> None:
        """Asks in all processes at once; yes where one says so."""
        if jax.process_count() > 1:
            with jax.transfer_guard("allow"):
                answers = multihost_utils.process_allgather(np.asarray(self._ask()))
            self._answer = bool(np.any(answers))


def is_peer_error(error: BaseException) -> bool:
    """Whether an error may come of the loss of another process.

    It shows as a collective that fails or, where orbax waits for all, as a time-out;
    orbax may raise another error from it.
    """
    if jax.process_count() == 1:
        return False
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, jax.errors.JaxRuntimeError | TimeoutError):
            return True
        if "Gloo" in str(cause):  # JAX's collectives between the processes of CPUs
            return True
        cause = cause.__cause__ or cause.__context__
    return False


@contextmanager
def peers() -> Iterator[None]:
    """Makes one line of the errors that a lost process causes in the others.

    Raises:
      VaaniError: for what `is_peer_error` tells.
    """
    try:
        yield
    except Exception as error:
        if not is_peer_error(error):
            raise
        reason = first_line(error).rstrip(".")
        raise VaaniError(
            f"{_whoami()} can't go on: {reason}. If that names no cause, {_LOST}"
        ) from None


def leave(status: int) -> None:
    """Ends a process of several at once after a failure; returns where it is alone.

    An orderly end would wait for the others, who wait for us. This way they notice.
    """
    if status and jax.distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        _goodbye()
        os._exit(status)

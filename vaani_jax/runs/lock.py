"""One process trains in a workdir; a file there says which.

The file is locked as long as its owner lives, which the kernel sees to, on this machine
and on most network file systems. Where that lock does not reach, the owner's sign of
life does: it touches the file every `HEARTBEAT` seconds.
"""

import contextlib
import datetime
import errno
import fcntl
import json
import os
import pathlib
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

from vaani_jax.errors import VaaniError
from vaani_jax.files import to_json
from vaani_jax.runs.workdir import Workdir

HEARTBEAT = 20.0  # seconds
# What flock says where a file system has no locks.
NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL)
STALE = 6 * HEARTBEAT  # without a sign of life, of an owner on another machine


class Lock:
    """Of a workdir; see `locked`."""

    def __init__(self, path: pathlib.Path, descriptor: int) -> None:
        self._path = path
        self._descriptor = descriptor

    def touch(self) -> None:
        """A sign of life, for other machines."""
        with contextlib.suppress(OSError):
            os.utime(self._descriptor)

    def release(self) -> None:
        """Ends ownership; the file goes."""
        with contextlib.suppress(OSError):
            self._path.unlink(missing_ok=True)
        os.close(self._descriptor)


@contextlib.contextmanager
def locked(workdir: pathlib.Path, say: Callable[[str], None]) -> Iterator[Lock]:
    """Owns a workdir, which is made where it is missing, for training.

    Args:
      workdir: of a run.
      say: receives a line where a dead process had it.

    Raises:
      VaaniError: a living process has it.
      OSError: the folder can't be written to.
    """
    lock = _acquire(workdir, say)
    try:
        yield lock
    finally:
        lock.release()


def _acquire(workdir: pathlib.Path, say: Callable[[str], None]) -> Lock:
    path = Workdir(workdir).lock
    workdir.mkdir(parents=True, exist_ok=True)
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            owner = _owner(descriptor)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                held = True
            except BlockingIOError:
                raise _taken(workdir, owner) from None
            except OSError as error:
                if error.errno not in NO_LOCKS:
                    raise
                held = False
            if not _is_at(descriptor, path):  # its owner has just left, and removed it
                os.close(descriptor)
                continue
            if owner:
                _check_gone(workdir, descriptor, owner, held)
                say(f"taking over {workdir} from {_named(owner)}, which is gone")
            mine = {
                "host": socket.gethostname(),
                "process": os.getpid(),
                "since": datetime.datetime.now().astimezone().isoformat("T", "seconds"),
            }
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, (to_json(mine) + "\n").encode(), 0)
        except BaseException:
            with contextlib.suppress(OSError):
                os.close(descriptor)
            raise
        return Lock(path, descriptor)


def _owner(descriptor: int) -> dict[str, Any]:
    """What the file says; nothing where it says nothing that we wrote."""
    try:
        owner = json.loads(os.pread(descriptor, 4096, 0))
    except ValueError:
        return {}
    return owner if isinstance(owner, dict) else {}


def _is_at(descriptor: int, path: pathlib.Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _named(owner: dict[str, Any]) -> str:
    where = f"process {owner.get('process', '?')} on {owner.get('host', '?')}"
    return f"{where} (since {owner.get('since', '?')})"


def _taken(workdir: pathlib.Path, owner: dict[str, Any]) -> VaaniError:
    who = _named(owner) if owner else "another process"
    return VaaniError(
        f"{workdir} is being trained by {who}: wait for it, stop it, or choose another"
        " --workdir"
    )


def _check_gone(
    workdir: pathlib.Path, descriptor: int, owner: dict[str, Any], held: bool
) -> None:
    """Raises where the owner may be alive; ``held`` says that the lock is ours now."""
    if owner.get("host") == socket.gethostname():
        if not held and _is_alive(owner.get("process")):
            raise _taken(workdir, owner)
        return  # it would hold the lock
    silent = time.time() - os.fstat(descriptor).st_mtime
    if silent < STALE:
        raise VaaniError(
            f"{workdir} was being trained by {_named(owner)} {silent:.0f} s ago: stop"
            f" it, or try again in {STALE - silent:.0f} s"
        )


def _is_alive(process: Any) -> bool:
    """Whether a process of this machine runs."""
    if type(process) is not int or process < 1:
        return False
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # somebody else's
        return True
    return True

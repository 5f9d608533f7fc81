"""One process trains in a workdir; readers neither need nor disturb its lock."""

import errno
import json
import os
import socket
import subprocess
import sys
import time

import pytest

from vaani_jax.errors import VaaniError
from vaani_jax.runs import lock as lock_module
from vaani_jax.runs.lock import STALE, locked
from vaani_jax.runs.workdir import Workdir


def owner(**changes):
    return {
        "host": socket.gethostname(),
        "process": 4_000_000,  # above the largest number that Linux gives
        "since": "2026-01-01T00:00:00+00:00",
        **changes,
    }


def leave(workdir, content, age=0.0):
    """A lock as a process leaves it that ends without a word."""
    workdir.mkdir()
    path = Workdir(workdir).lock
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    then = time.time() - age
    os.utime(path, (then, then))
    return path


def test_a_second_owner_is_refused_and_told_of_the_first(tmp_path):
    workdir = tmp_path / "new" / "run"
    with locked(workdir, print):
        with (
            pytest.raises(VaaniError, match=f"process {os.getpid()} on") as caught,
            locked(workdir, print),
        ):
            pass
        assert "\n" not in str(caught.value)
    # It leaves nothing, and makes room.
    assert list(workdir.iterdir()) == []
    with locked(workdir, print):
        pass


def test_what_a_killed_process_held_is_taken_over_with_a_line(tmp_path):
    code = (
        "import pathlib, sys, time\n"
        "from vaani_jax.runs.lock import locked\n"
        "with locked(pathlib.Path(sys.argv[1]), print):\n"
        "    print('mine', flush=True)\n"
        "    time.sleep(60)\n"
    )
    workdir = tmp_path / "run"
    command = [sys.executable, "-c", code, str(workdir)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "mine\n"
        with (
            pytest.raises(VaaniError, match=f"process {holder.pid} on"),
            locked(workdir, print),
        ):
            pass
        holder.kill()
    said: list[str] = []
    with locked(workdir, said.append):
        found = json.loads(Workdir(workdir).lock.read_text())
        assert found["process"] == os.getpid()
    (line,) = said
    assert f"process {holder.pid} on" in line


def test_an_owner_on_another_machine_is_alive_while_it_gives_signs(tmp_path):
    there = owner(host="elsewhere")
    leave(tmp_path / "alive", there, age=STALE / 2)
    with (
        pytest.raises(VaaniError, match=r"elsewhere.* ago"),
        locked(tmp_path / "alive", print),
    ):
        pass
    leave(tmp_path / "dead", there, age=STALE + 1)
    said: list[str] = []
    with locked(tmp_path / "dead", said.append) as lock:
        assert "elsewhere" in said[0]
        path = Workdir(tmp_path / "dead").lock
        os.utime(path, (0, 0))
        lock.touch()
        assert time.time() - path.stat().st_mtime < 5


def test_where_a_file_system_has_no_locks_a_living_process_still_counts(
    tmp_path, monkeypatch
):
    def without(descriptor, operation):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(lock_module.fcntl, "flock", without)
    with (
        locked(tmp_path / "run", print),
        pytest.raises(VaaniError, match=f"process {os.getpid()} on"),
        locked(tmp_path / "run", print),
    ):
        pass
    leave(tmp_path / "dead", owner())
    said: list[str] = []
    with locked(tmp_path / "dead", said.append):
        assert "taking over" in said[0]


@pytest.mark.parametrize("content", ["", "{", "[1]", "\x00" * 9])
def test_a_damaged_lock_of_nobody_is_taken_over(tmp_path, content):
    leave(tmp_path / "run", content)
    with locked(tmp_path / "run", print):
        assert json.loads(Workdir(tmp_path / "run").lock.read_text())["process"]

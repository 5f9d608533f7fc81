"""A run stops when it is told to, says what it waits for, and loses no more than it
must."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from vaani_jax.train import watch as watch_module
from vaani_jax.train.extras import Extras
from vaani_jax.train.watch import Watch


def until(condition, seconds=10.0):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    return condition()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_is_an_answer_to_a_question(number):
    ours = signal.getsignal(number)
    before = signal.SIG_DFL if ours == signal.SIG_IGN else ours  # under nohup
    signal.signal(number, before)
    try:
        with Watch(print).watching() as watch:
            assert not watch()
            os.kill(os.getpid(), number)
            assert until(watch)
        assert signal.getsignal(number) == before
    finally:
        signal.signal(number, ours)


def test_what_nohup_has_ignored_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Watch(print).watching() as watch:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not until(watch, 0.3)
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_second_interrupt_is_one():
    def interrupt_twice():
        with Watch(print).watching() as watch:
            os.kill(os.getpid(), signal.SIGINT)
            assert until(watch)
            os.kill(os.getpid(), signal.SIGINT)
            until(lambda: False, 5.0)

    with pytest.raises(KeyboardInterrupt):
        interrupt_twice()


def test_it_says_what_a_run_waits_for(monkeypatch):
    monkeypatch.setattr(watch_module, "PATIENCE", 0.1)
    monkeypatch.setattr(watch_module, "LOOK", 0.05)
    said: list[str] = []
    alive: list[int] = []
    with Watch(said.append, lambda: alive.append(1)).watching() as watch:
        with watch.during("a checkpoint"):
            assert until(lambda: len(said) >= 2)
        assert len(alive) >= 2  # signs of life, while the run waits
    assert all("waiting for a checkpoint" in line for line in said)
    assert "no step for" in said[0]


def test_a_terminal_that_takes_nothing_does_not_hold_the_watch(monkeypatch):
    monkeypatch.setattr(watch_module, "PATIENCE", 0.1)
    monkeypatch.setattr(watch_module, "LOOK", 0.05)
    free = threading.Event()
    blocked: list[str] = []
    alive: list[int] = []

    def say(line):
        blocked.append(line)
        free.wait(30.0)
        raise SystemExit(1)  # as rich does, where the reader of a pipe has left

    with Watch(say, lambda: alive.append(1)).watching():
        assert until(lambda: blocked)
        seen = len(alive)
        assert until(lambda: len(alive) > seen + 2)
        free.set()
        assert until(lambda: len(blocked) >= 2)  # it goes on after that, too


def test_what_blocks_outside_python_is_left_after_a_while():
    """A mutex that is locked twice: no handler of Python's ever runs."""
    code = (
        "import ctypes\n"
        "from vaani_jax.train import watch\n"
        "watch.GRACE, watch.LOOK = 0.5, 0.1\n"
        "with watch.Watch(print).watching() as watch:\n"
        "    library = ctypes.CDLL(None)\n"
        "    mutex = ctypes.create_string_buffer(128)\n"
        "    with watch.during('a file system'):\n"
        "        library.pthread_mutex_lock(mutex)\n"
        "        print('now', flush=True)\n"
        "        library.pthread_mutex_lock(mutex)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == "now\n"
        process.send_signal(signal.SIGTERM)
        _, told = process.communicate(timeout=30)
    assert process.returncode == 128 + signal.SIGTERM
    (line,) = told.splitlines()
    assert "still waiting for a file system" in line


def test_what_a_run_can_do_without_is_said_once_of_each_kind():
    said: list[str] = []
    extras = Extras(said.append)
    for _ in range(3):
        with extras.trying("picture"):
            raise ValueError("no room\nfor it")
    with extras.trying("sample", way_on="it is kept"):
        raise OSError("gone")
    with extras.trying("row"):
        pass
    assert said == [
        "no picture: no room. Training goes on",
        "no sample: gone; it is kept. Training goes on",
    ]
    with pytest.raises(KeyboardInterrupt), extras.trying("picture"):
        raise KeyboardInterrupt

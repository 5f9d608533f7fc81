"""Two real processes on this machine: the same run, a lost peer, another number."""

import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from vaani_jax.devices.processes import Agreement, join, launched_by
from vaani_jax.errors import VaaniError
from vaani_jax.runs.metrics import read_rows

ROOT = pathlib.Path(__file__).parents[2]
TEXT = "to be or not to be, that is the question; whether it is nobler to ask. " * 400


def start(text, workdir, count, **keys) -> list[subprocess.Popen]:
    """The processes of a job; each shows itself in a file of the folder of ``text``."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    settings = {
        "data.path": text,
        "batch_size": 8,
        "num_steps": 20,
        "log_interval": 1,
        "learning_rate": 1e-3,
        "use_tuner": False,
        **keys,
    }
    command = [sys.executable, "train.py", "--config=configs/debug.py"]
    command += [f"--workdir={workdir}"]
    command += [f"--config.{key}={value}" for key, value in settings.items()]
    processes = []
    for i in range(count):
        peers = []
        if count > 1:
            peers = [f"--coordinator=127.0.0.1:{port}", f"--num_processes={count}"]
            peers += [f"--process_id={i}"]
        log = text.parent / f"{workdir.name}-{count}-{i}.log"
        environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
        environment["XLA_FLAGS"] = (
            f"--xla_force_host_platform_device_count={2 // count}"
        )
        with log.open("w") as file:
            processes.append(
                subprocess.Popen(
                    [*command, *peers],
                    cwd=ROOT,
                    env=environment,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                )
            )
    return processes


def finish(processes, seconds=240) -> list[int]:
    try:
        return [process.wait(seconds) for process in processes]
    finally:
        for process in processes:
            process.kill()


def losses(workdir) -> dict[int, float]:
    rows = read_rows(workdir / "metrics.jsonl")
    return {int(row["step"]): row["train/loss"] for row in rows if "train/loss" in row}


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def said(text, name: str) -> str:
    return (text.parent / f"{name}.log").read_text(errors="replace")


def test_two_processes_do_what_one_does(text, tmp_path):
    alone, pair = tmp_path / "alone", tmp_path / "pair"
    assert finish(start(text, alone, 1, **{"mesh.fsdp": 2})) == [0]
    assert finish(start(text, pair, 2, **{"mesh.fsdp": 2})) == [0, 0], said(
        text, "pair-2-1"
    )
    one, two = losses(alone), losses(pair)
    assert sorted(one) == sorted(two) == list(range(1, 21))
    np.testing.assert_allclose(
        [two[step] for step in one], [one[step] for step in one], rtol=1e-6
    )
    assert "validation loss" in said(text, "pair-2-0")
    assert "validation loss" not in said(text, "pair-2-1")  # shown once
    assert (pair / "training_curves.png").exists()


def test_a_lost_process_ends_the_other_and_one_goes_on(text, tmp_path):
    workdir = tmp_path / "run"
    keys: dict = {"num_steps": 100_000, "optim.schedule": "constant"}
    # In full precision, where hundreds of steps stay alike in sums of another order.
    keys |= {
        "quantization.quantize": False,
        "save_interval": 20,
        "eval_interval": 100_000,
    }
    processes = start(text, workdir, 2, **keys)
    try:
        deadline = time.monotonic() + 200
        while not (workdir / "checkpoints" / "step_20").exists():
            assert time.monotonic() < deadline, said(text, "run-2-0")
            time.sleep(0.2)
        time.sleep(1)
        processes[1].send_signal(signal.SIGKILL)
        began = time.monotonic()
        assert processes[0].wait(90) != 0
        assert time.monotonic() - began <= 60
    finally:
        for process in processes:
            process.kill()
    deadline = time.monotonic() + 10  # its last words come after it
    while "another process of the job is lost" not in said(text, "run-2-0"):
        assert time.monotonic() < deadline, said(text, "run-2-0")[-2000:]
        time.sleep(0.2)
    folder = workdir / "checkpoints"
    names = [path.name.removeprefix("step_") for path in folder.glob("step_*")]
    saved = max(int(name) for name in names if name.isdecimal())
    more = {**keys, "num_steps": saved + 10}
    assert finish(start(text, workdir, 1, **more)) == [0], said(text, "run-1-0")
    assert f"resumed at step {saved:,}" in said(text, "run-1-0")
    assert finish(start(text, tmp_path / "alone", 1, **more)) == [0]
    resumed, alone = losses(workdir), losses(tmp_path / "alone")
    steps = range(1, saved + 11)
    assert sorted(resumed) == list(steps)
    np.testing.assert_allclose(
        [resumed[s] for s in steps], [alone[s] for s in steps], rtol=1e-2
    )


@pytest.mark.parametrize(
    ("environment", "launcher"),
    [
        ({}, None),
        ({"SLURM_NTASKS": "4"}, None),  # a batch script without srun
        ({"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "1"}, None),
        ({"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "4"}, "Slurm"),
        ({"OMPI_COMM_WORLD_SIZE": "1"}, None),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "Open MPI"),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, None),
        ({"TPU_WORKER_HOSTNAMES": "host-0,host-1"}, "a TPU slice"),
        ({"MEGASCALE_COORDINATOR_ADDRESS": "host-0"}, "a TPU slice"),
    ],
)
def test_who_started_several_processes(environment, launcher):
    assert launched_by(environment) == launcher


def test_alone_there_is_nobody_to_join():
    join()
    assert not jax.distributed.is_initialized()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_processes": 2}, "come together"),
        ({"coordinator": "host:1", "process_id": 0}, "come together"),
        (
            {"coordinator": "host", "num_processes": 2, "process_id": 0},
            "must be HOST:PORT",
        ),
        (
            {"coordinator": "host:1", "num_processes": 2, "process_id": 2},
            "below --num_processes=2",
        ),
    ],
)
def test_what_says_too_little_is_an_error(arguments, message):
    with pytest.raises(VaaniError, match=message) as caught:
        join(**arguments)
    assert "\n" not in str(caught.value)


def test_a_single_process_answers_at_once():
    answers = iter([False, True])
    ask = Agreement(lambda: next(answers))
    ask.settle()
    assert [ask(), ask()] == [False, True]

"""The plan of a small model, against sums made by hand."""

import dataclasses
import functools
import json
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest

from vaani_jax.devices.chips import CHIPS
from vaani_jax.model.config import ModelConfig
from vaani_jax.model.size import flops_per_token
from vaani_jax.plan import make_plan
from vaani_jax.train.config import Config
from vaani_jax.train.optimizers import OptimConfig, make_optimizer
from vaani_jax.train.schedules import Schedule
from vaani_jax.train.state import init_state
from vaani_jax.train.steps import make_train_step

ROOT = pathlib.Path(__file__).parents[2]
MODEL = ModelConfig(
    vocab_size=128, dim=64, n_layers=3, n_heads=4, ffn_dim=192, max_seq_len=32
)
CONFIG = Config(
    batch_size=8, num_steps=10, learning_rate=1e-3, use_tuner=False, model=MODEL
)
KERNELS = 3 * (4 * 64 * 64 + 3 * 64 * 192)  # weights of the ternary ones
PARAMETERS = KERNELS + 128 * 64 + 3 * (3 * 64 + 192) + 64


@functools.cache
def plan(**changes):
    return make_plan(dataclasses.replace(CONFIG, **changes))


def test_memory_is_that_of_the_arrays_and_of_the_compiler():
    memory = plan().memory
    assert plan().parameters == PARAMETERS
    assert memory.params == 4 * PARAMETERS
    counters = memory.optimizer - 2 * 4 * PARAMETERS  # Adam's moments apart
    assert 0 <= counters < 100
    assert KERNELS <= memory.other < KERNELS + 300  # int8 codes, thresholds, a key
    assert memory.tokens == 8 * 33 * 4
    optimizer = make_optimizer(OptimConfig())
    step = make_train_step(MODEL, optimizer, Schedule(OptimConfig(), 1e-3, 10))
    state = jax.eval_shape(lambda: init_state(MODEL, optimizer, 0))
    tokens = jax.ShapeDtypeStruct((8, 33), np.int32)
    compiled = jax.jit(step, donate_argnums=0).lower(state, tokens).compile()
    analysis = compiled.memory_analysis()
    assert memory.temporaries == pytest.approx(analysis.temp_size_in_bytes, rel=0.01)


def test_the_range_test_holds_a_second_state():
    tuned = plan(use_tuner=True, num_steps=1000).memory
    state = tuned.params + tuned.optimizer + tuned.other
    assert tuned.second_state == state
    assert tuned.peak == tuned.step + state
    assert plan(use_tuner=True, num_steps=100).memory.second_state == 0  # too short


def test_time_is_the_arithmetic_that_the_module_names():
    chip, flops = CHIPS["H100"], flops_per_token(MODEL, 32) * 8 * 32
    spent = plan().time(chip, 0.5)
    assert spent.compute == pytest.approx(flops / (0.5 * 989.5e12))
    assert spent.communication == 0
    assert spent.update == pytest.approx(2 * 12 * PARAMETERS / 3.35e12, rel=1e-3)
    assert spent.step == spent.compute + spent.update
    remat = dataclasses.replace(MODEL, remat=True, scan_layers=True)
    assert plan(model=remat).executed == pytest.approx(flops * 4 / 3)


FLAGS = {
    "batch_size": 8,
    "num_steps": 10,
    "use_tuner": False,
    "learning_rate": 1e-3,
    "model.vocab_size": 128,
    "model.dim": 64,
    "model.n_layers": 3,
    "model.n_heads": 4,
    "model.ffn_dim": 192,
    "model.max_seq_len": 32,
    "model.scan_layers": True,
}


def run(*arguments, **changes):
    flags = [f"--config.{key}={value}" for key, value in {**FLAGS, **changes}.items()]
    command = [sys.executable, "-m", "vaani_jax", "plan", "--config=configs/base.py"]
    return subprocess.run(
        [*command, *flags, *arguments], cwd=ROOT, capture_output=True, text=True
    )


def test_the_command_plans_for_devices_that_are_not_there():
    done = run(
        "--devices=6", "--json", "--chip=H100", **{"mesh.data": 1, "mesh.fsdp": 4}
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["devices"] == 4
    assert told["mesh"] == {"data": 1, "fsdp": 4, "tensor": 1}
    assert list(told["chips"]) == ["H100"]
    assert told["parameters"] == PARAMETERS
    norms = PARAMETERS - KERNELS - 128 * 64  # whole on every device
    cut = (KERNELS + 128 * 64) / 4
    assert told["memory"]["params"] == 4 * (cut + norms)
    codes = [e for e in told["exchanges"] if e["dtype"] == "u8"]
    assert {e["kind"] for e in codes} == {"all-gather"}
    assert {e["group"] for e in codes} == {4}
    # Two bits a weight, forward and backward, in each of the three layers.
    assert sum(e["nbytes"] * e["times"] for e in codes) == 2 * KERNELS / 4


def test_people_get_tables():
    done = run("--devices=2")
    assert done.returncode == 0, done.stderr
    assert "compiling the training step for 2 devices" in done.stderr
    assert f"{PARAMETERS:,} parameters" in done.stdout
    assert all(name in done.stdout for name in CHIPS)


@pytest.mark.parametrize(
    ("arguments", "changes", "message"),
    [
        (["--chip=H1000"], {}, "no data of a chip named 'H1000': there are A100-80G"),
        (["--devices=3"], {"mesh.fsdp": 2}, "2 does not divide 3"),
        (["--devices=16"], {}, "can't be cut into mesh data x fsdp = 16"),
        ([], {"model.dimm": 3}, "did you mean model.dim?"),
    ],
)
def test_errors_are_one_line(arguments, changes, message):
    done = run(*arguments, **changes)
    assert done.returncode == 1
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_flags_that_are_of_no_config_are_refused():
    done = run("--device=2", "--bogus=3")
    assert done.returncode == 2
    assert "unrecognized arguments: --bogus=3" in done.stderr

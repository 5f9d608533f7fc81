"""The plan of a small model, against sums made by hand."""

import dataclasses
import functools
import json
import pathlib
import subprocess
import sys

import pytest

from vaani_jax import cli
from vaani_jax.devices.chips import CHIPS
from vaani_jax.evaluate.loss import LOGITS_BYTES
from vaani_jax.model.config import Execution
from vaani_jax.model.size import flops_per_token
from vaani_jax.model.transformer import Vaani
from vaani_jax.plan import make_plan
from vaani_jax.train.config import Config

ROOT = pathlib.Path(__file__).parents[2]
MODEL = Vaani().changed(
    vocab_size=128, dim=64, n_layers=3, n_heads=4, ffn_dim=192, max_seq_len=32
)
CONFIG = Config(
    batch_size=8,
    num_steps=10,
    learning_rate=1e-3,
    use_tuner=False,
    model=MODEL.architecture,
)
KERNELS = 3 * (4 * 64 * 64 + 3 * 64 * 192)  # weights of the ternary ones
PARAMETERS = KERNELS + 128 * 64 + 3 * (3 * 64 + 192) + 64


@functools.cache
def plan(**changes):
    return make_plan(dataclasses.replace(CONFIG, **changes))


def test_memory_is_that_of_the_arrays_and_of_what_the_backward_pass_keeps():
    memory = plan().memory
    assert plan().parameters == PARAMETERS
    assert memory.params == 4 * PARAMETERS
    counters = memory.optimizer - 2 * 4 * PARAMETERS  # Adam's moments apart
    assert 0 <= counters < 100
    assert KERNELS <= memory.other < KERNELS + 300  # int8 codes, thresholds, a key
    assert memory.tokens == 8 * 33 * 4
    assert activations(8) < memory.temporaries < 3 * activations(8)


def activations(batch):
    """Bytes that the backward pass can't do without, by hand.

    Of each token and layer: inputs of the seven products with their 8-bit codes left
    out, and the probabilities of attention; the logits.
    """
    tokens, dim, ffn, heads, context = batch * 32, 64, 192, 4, 32
    layer = 3 * dim + 3 * dim + dim + 3 * ffn + heads * context
    return 4 * tokens * (3 * layer + 128)


def test_the_compilers_temporaries_grow_with_the_batch_and_go_with_remat():
    """Neither is a figure of the compiler: what is kept is counted in tokens."""
    more = plan(batch_size=16).memory
    assert more.params == plan().memory.params
    assert more.tokens == 2 * plan().memory.tokens
    grown = more.temporaries - plan().memory.temporaries
    assert activations(8) < grown < 3 * activations(8)
    remat = Execution(remat=True, scan_layers=True)
    assert plan(execution=remat, batch_size=16).memory.temporaries < more.temporaries


def test_the_range_test_holds_a_second_state():
    tuned = plan(use_tuner=True, num_steps=1000).memory
    state = tuned.params + tuned.optimizer + tuned.other
    assert tuned.second_state == state
    assert tuned.peak >= tuned.step + state
    assert plan(use_tuner=True, num_steps=100).memory.second_state == 0  # too short


def test_an_evaluation_takes_its_batch_and_its_logits():
    """8192 tokens are 256 windows; of a large vocabulary, a piece of the logits."""
    memory = plan().memory
    logits = 4 * 8192 * 128
    assert logits < memory.evaluation < 12 * logits
    large = dataclasses.replace(MODEL.architecture, vocab_size=50_000)
    grown = plan(model=large).memory.evaluation - memory.evaluation
    assert LOGITS_BYTES / 2 < grown < 3 * LOGITS_BYTES < 4 * 8192 * 50_000
    assert plan(model=large).memory.peak >= plan(model=large).memory.evaluation


def test_a_sample_takes_its_cache_and_stacked_layers_once_more():
    memory = plan().memory
    cache = 2 * 3 * 32 * 64 * 4
    assert cache < memory.sampling < memory.temporaries
    stacked = plan(execution=Execution(scan_layers=True)).memory
    assert stacked.sampling > memory.sampling + 4 * KERNELS
    short = dataclasses.replace(MODEL.architecture, max_seq_len=1)
    assert plan(model=short).memory.sampling == 0
    state = memory.params + memory.optimizer + memory.other
    assert memory.state == state
    assert memory.peak == max(
        memory.step, state + memory.evaluation, state + memory.sampling
    )


def test_a_cache_of_the_context_is_counted_by_dtype():
    numbers = 2 * 3 * 32 * 64
    each = 4 * 2 * 3 * 32 * 4  # scales of heads
    rest = 8  # length and start
    assert plan().caches == {
        "float32": 4 * numbers + rest,
        "bfloat16": 2 * numbers + rest,
        "int8": numbers + each + rest,
        "int4": numbers + each + 4 * 3 * 64 + rest,  # 16 codes take the room of 32
    }


def test_time_is_the_arithmetic_that_the_module_names():
    chip, flops = CHIPS["H100"], flops_per_token(MODEL, 32) * 8 * 32
    spent = plan().time(chip, 0.5)
    assert spent.compute == pytest.approx(flops / (0.5 * 989.5e12))
    assert spent.communication == 0
    assert spent.update == pytest.approx(2 * 12 * PARAMETERS / 3.35e12, rel=1e-3)
    assert spent.step == spent.compute + spent.update
    remat = Execution(remat=True, scan_layers=True)
    assert plan(execution=remat).executed == pytest.approx(flops * 4 / 3)


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
    "execution.scan_layers": True,
}


def as_flags(changes):
    return [f"--config.{key}={value}" for key, value in {**FLAGS, **changes}.items()]


def run(*arguments, **changes):
    command = [sys.executable, "-m", "vaani_jax", "plan", "--config=configs/base.py"]
    return subprocess.run(
        [*command, *as_flags(changes), *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
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


ERRORS = [
    (["--chip=H1000"], {}, "no data of a chip named 'H1000': there are A100-80G"),
    ([], {"mesh.fsdp": 2}, "2 does not divide 3"),
    ([], {}, "can't be cut into mesh data x fsdp = 3"),
    ([], {"model.dimm": 3}, "did you mean model.dim?"),
]
# Devices are counted once in a process: one of its own makes all the mistakes.
MISTAKES = """
import json, sys
from vaani_jax.cli import main
for arguments in json.loads(sys.argv[1]):
    print("status", main(arguments), file=sys.stderr)
"""


def test_errors_are_one_line():
    base = ["plan", "--config=configs/base.py", "--devices=3"]
    commands = [
        [*base, *as_flags(changes), *arguments] for arguments, changes, _ in ERRORS
    ]
    done = subprocess.run(
        [sys.executable, "-c", MISTAKES, json.dumps(commands)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.stdout == ""
    lines = done.stderr.splitlines()
    assert lines[1::2] == ["status 1"] * len(ERRORS), done.stderr
    for line, (_, _, message) in zip(lines[::2], ERRORS, strict=True):
        assert line.startswith("error: ")
        assert message in line


def test_flags_that_are_of_no_config_are_refused(capsys):
    assert cli.main(["plan", "--device=2", "--bogus=3"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: plan has no argument --bogus=3: ")
    assert error.count("\n") == 1

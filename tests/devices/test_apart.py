"""Gradients cross devices once a step, and are those of one device.

The runs on eight (virtual) devices are made by this file as a script, since devices
are counted once in a process.
"""

import dataclasses
import json
import os
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vaani_jax.devices.apart import draw, each_apart, largest
from vaani_jax.devices.mesh import MeshConfig, make_mesh, place
from vaani_jax.errors import VaaniError
from vaani_jax.kernels.floats import compiled_floats
from vaani_jax.model.transformer import Vaani
from vaani_jax.plan.hlo import collectives
from vaani_jax.train.config import Config, from_dict
from vaani_jax.train.optimizers import OptimConfig
from vaani_jax.train.program import make_program

DEVICES, STEPS, ROWS = 8, 3, 64
# Each axis alone, each pair of them, all three.
MESHES = [(8, 1, 1), (1, 8, 1), (1, 1, 8), (2, 4, 1), (4, 1, 2), (1, 2, 4), (2, 2, 2)]
MODEL = Vaani().changed(
    vocab_size=128,
    dim=64,
    n_layers=2,
    n_heads=8,
    n_kv_heads=4,
    ffn_dim=192,
    max_seq_len=32,
    scan_layers=True,
)
KERNELS = 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 192)  # weights of the ternary ones
PARAMETERS = KERNELS + 128 * 64 + 2 * (3 * 64 + 192) + 64
# All that depends on which rows there are, every wire and head; floats alone.
MODELS = {
    "ternary": MODEL,
    "drawn": MODEL.changed(dropout=0.2, activation_tracking="ema", remat=True),
    "untied": MODEL.changed(tie_embeddings=False, scan_layers=False, wire="int8"),
    "head": MODEL.changed(ternary_head=True, wire="float"),
    "twin": MODEL.changed(quantize=False, qk_norm=True, attention_bias=True),
}


# -- Runs, in a process with eight devices ------------------------------------------


def run(name: str, mesh: Any, parts: int, exchange: Any, mix_steps: int) -> dict:
    """Losses, first gradient, last ranges; what the step sends, by kind and dtype."""
    model, (data, fsdp, tensor) = MODELS[name], mesh
    config = Config(
        batch_size=ROWS,
        num_steps=20,
        learning_rate=1e-3,
        use_tuner=False,
        quantize_steps=mix_steps,
        model=model.architecture,
        quantization=model.quantization,
        execution=model.execution,
        optim=OptimConfig(accumulation_steps=parts),
        mesh=MeshConfig(data, fsdp, tensor, exchange=exchange),
    )
    devices = make_mesh(config.mesh)
    program = make_program(config, devices, 20)
    rng, losses = np.random.default_rng(0), []
    with jax.set_mesh(devices), compiled_floats():
        state = program.first_state()
        tokens = jax.ShapeDtypeStruct((ROWS, 33), np.int32, sharding=program.batch)
        step = program.train_step.lower(program.shapes, tokens).compile()
        for _ in range(STEPS):
            batch = rng.integers(0, 128, (ROWS, 33)).astype(np.int32)
            state, metrics = step(state, place(batch, program.batch))
            losses.append(float(metrics["train/loss"]))
            if len(losses) == 1:
                # Adam's first moment is now (1 - beta1) x gradient.
                leaves = jax.tree_util.tree_leaves_with_path(state.opt_state)
                moments = [x for p, x in leaves if ".mu" in jax.tree_util.keystr(p)]
                gradient = np.concatenate([np.ravel(x) for x in moments])
    sent: dict[str, float] = {}
    for found in collectives(step.as_text()):
        kind = f"{found.kind} {found.dtype}"
        sent[kind] = sent.get(kind, 0.0) + found.received
    quant = np.concatenate([np.zeros(1), *map(np.ravel, jax.tree.leaves(state.quant))])
    return {"losses": losses, "gradient": gradient, "quant": quant, "sent": sent}


def cases() -> list[tuple]:
    """What is compared with one device, and the same micro-batches there."""
    found: list[tuple] = [("ternary", m, 4, "step", 0) for m in MESHES]
    cut = [(1, 8, 1), (2, 2, 2)]
    found += [("ternary", mesh, 4, "micro_batch", 0) for mesh in cut]
    found += [("ternary", (2, 4, 1), parts, "step", 0) for parts in (1, 2)]
    found += [("drawn", (2, 4, 1), 4, how, 0) for how in ("step", "micro_batch")]
    found += [("ternary", (2, 4, 1), 2, how, 4) for how in ("step", "micro_batch")]
    found += [(name, (2, 4, 1), 2, "step", 0) for name in ("untied", "head")]
    found += [("twin", (2, 2, 2), 2, how, 0) for how in ("step", "micro_batch")]
    return found


def report() -> None:
    rows, ones = [], {}
    for case in cases():
        name, _, parts, exchange, mix_steps = case
        key = name, parts, mix_steps
        if key not in ones:
            ones[key] = run(name, (1, 1, 1), parts, exchange, mix_steps)
        one, got = ones[key], run(*case)
        ratio = np.asarray(got["losses"]) / np.asarray(one["losses"])
        difference = np.linalg.norm(got["gradient"] - one["gradient"])
        row = {
            "loss": float(np.max(np.abs(ratio - 1))),
            "gradient": float(difference / np.linalg.norm(one["gradient"])),
            "quant": float(np.max(np.abs(got["quant"] - one["quant"]))),
            "sent": got["sent"],
        }
        rows.append((json.dumps(case), row))
    print(json.dumps(dict(rows)))


@pytest.fixture(scope="module")
def runs():
    # Most of the time is spent in LLVM: what it optimizes is not what is tested.
    flags = (
        f"--xla_force_host_platform_device_count={DEVICES}"
        " --xla_backend_optimization_level=0"
    )
    done = subprocess.run(
        [sys.executable, __file__],
        env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "full rematerialization" not in done.stderr  # the partitioner's last resort
    return json.loads(done.stdout.splitlines()[-1])


def test_every_mesh_computes_what_one_device_does(runs):
    """With dropout, ranges and a mix, with 1, 2 and 4 micro-batches."""
    assert len(runs) == len(cases())
    for case, row in runs.items():
        _, (_, _, tensor), *_ = json.loads(case)
        # With ``tensor``, the sub-norms are sums over devices: a rounding may tip.
        bound = 1 if tensor == 1 else 100
        assert row["loss"] <= 1e-5 * bound, (case, row)
        assert row["gradient"] <= 2e-5 * bound, (case, row)
        assert row["quant"] <= 1e-5 * bound, (case, row)


def sent(runs, mesh, parts, exchange, kind):
    case = json.dumps(("ternary", mesh, parts, exchange, 0))
    return runs[case]["sent"].get(kind, 0.0)


@pytest.mark.parametrize("mesh", [(1, 8, 1), (2, 4, 1)])
def test_gradients_cross_once_a_step(runs, mesh):
    """All of them: a sum whose result is everywhere is received twice."""
    whole = 2 * (DEVICES - 1) / DEVICES * 4 * PARAMETERS
    found = sent(runs, mesh, 4, "step", "all-reduce f32")
    assert whole <= found < 1.01 * whole
    if mesh[0] == 1:
        often = sent(runs, mesh, 4, "micro_batch", "all-reduce f32")
        assert 4 * whole <= often < 4 * 1.01 * whole


def test_without_fsdp_they_always_do(runs):
    whole = 2 * (DEVICES - 1) / DEVICES * 4 * PARAMETERS
    found = sent(runs, (8, 1, 1), 4, "step", "all-reduce f32")
    assert whole <= found < 1.01 * whole


def test_micro_batches_add_nothing_to_what_is_sent(runs):
    for kind in ("all-reduce f32", "all-gather u8", "all-reduce s32"):
        one, two, four = (sent(runs, (2, 4, 1), n, "step", kind) for n in (1, 2, 4))
        assert two == pytest.approx(four, rel=1e-3)
        assert 0 < four < 1.01 * one, kind


def test_codes_cross_once_a_step(runs):
    """Two bits a weight; else in every micro-batch, forward and backward."""
    others = (DEVICES - 1) / DEVICES * KERNELS / 4
    assert sent(runs, (1, 8, 1), 4, "step", "all-gather u8") == others
    assert sent(runs, (1, 8, 1), 4, "micro_batch", "all-gather u8") == 8 * others


def test_scales_are_computed_once_a_step(runs):
    """What devices tell each other of them does not grow with micro-batches."""
    for exchange in ("step", "micro_batch"):
        found = sent(runs, (1, 8, 1), 4, exchange, "all-reduce s32")
        assert 0 < found < 7 * 2 * 50


# -- The parts ----------------------------------------------------------------------


def test_a_device_draws_its_part_of_what_is_drawn_for_all():
    mesh = make_mesh(MeshConfig(1, 1, 1))
    key = jax.random.key(3)
    whole = jax.random.uniform(key, (6, 5))
    with jax.set_mesh(mesh):
        part = each_apart(
            lambda x: draw(jax.random.uniform, key, x.shape), ("data",), 0, 0
        )
        found = jax.jit(part)(np.zeros((1, 6, 5), np.float32))
    np.testing.assert_array_equal(found.reshape(6, 5), whole)
    assert (draw(jax.random.uniform, key, (6, 5)) == whole).all()


def test_the_largest_is_that_of_all_rows():
    mesh = make_mesh(MeshConfig(1, 1, 1))
    x = jnp.asarray([[[1.0, -3.0]]])
    with jax.set_mesh(mesh):
        found = jax.jit(each_apart(largest, ("data",), 0, None))(x)
    assert found == largest(x) == 3


def test_an_exchange_that_is_none_is_an_error():
    values = dataclasses.asdict(Config(learning_rate=1e-3))
    values["mesh"]["exchange"] = "never"
    with pytest.raises(VaaniError, match=r"mesh\.exchange"):
        from_dict(values)


if __name__ == "__main__":
    report()

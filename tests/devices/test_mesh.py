"""Rules and meshes; every mesh of eight devices computes what one device does.

The runs on eight (virtual) devices are made by this file as a script, since devices
are counted once in a process.
"""

import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from vaani_jax.devices.mesh import (
    MeshConfig,
    check_batch,
    constrain,
    make_mesh,
    param_shardings,
    param_specs,
    place,
)
from vaani_jax.errors import VaaniError
from vaani_jax.kernels.floats import compiled_floats
from vaani_jax.model.transformer import Vaani, init_variables
from vaani_jax.runs.checkpoints import Checkpoints, fingerprints
from vaani_jax.train.config import Config
from vaani_jax.train.optimizers import OptimConfig, make_optimizer
from vaani_jax.train.program import make_program
from vaani_jax.train.state import init_state, state_shardings
from vaani_jax.train.tuner import HyperparameterTuner

DEVICES = 8
TUNER = HyperparameterTuner(learning_rate=1e-3)
STEPS = 20
PEAK = 1e-3  # of the learning rate; the warm-up of a config takes all the steps
# Each axis alone, each pair of them, all three.
MESHES = [(8, 1, 1), (1, 8, 1), (1, 1, 8), (2, 4, 1), (4, 1, 2), (1, 2, 4), (2, 2, 2)]
TWIN_MESHES = [(8, 1, 1), (1, 8, 1), (1, 1, 8), (2, 2, 2)]
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

# Only compiled: as in models of any use, most of its weights are in ternary kernels.
WIDER = MODEL.changed(dim=256, ffn_dim=768)


# -- Runs, in a process with eight devices ------------------------------------------


def batches() -> list[np.ndarray]:
    """Tokens that have something to learn: each is one of four that its past allows."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 128, (STEPS, 64, 33)).astype(np.int32)
    for t in range(1, 33):
        tokens[..., t] = (5 * tokens[..., t - 1] + tokens[..., t] % 4) % 128
    return list(tokens)


def make_config(model: Vaani, mesh: MeshConfig) -> Config:
    return Config(
        batch_size=64,
        num_steps=STEPS,
        learning_rate=PEAK,
        use_tuner=False,
        model=model.architecture,
        quantization=model.quantization,
        execution=model.execution,
        mesh=mesh,
    )


def run(
    model: Vaani,
    config: MeshConfig,
    folder: pathlib.Path | None = None,
    steps: int = STEPS,
) -> dict:
    """Losses, gradient of the first step and fingerprints of the last state.

    By the program that the trainer runs; its schedule is that of all ``STEPS``.
    """
    mesh = make_mesh(config)
    program = make_program(make_config(model, config), mesh, STEPS)
    losses = []
    # On one device as on several, where no float parts are native.
    with jax.set_mesh(mesh), compiled_floats():
        state = program.first_state()
        for tokens in batches()[:steps]:
            state, metrics = program.train_step(state, place(tokens, program.batch))
            losses.append(float(metrics["train/loss"]))
            if len(losses) == 1:
                # Adam's first moment is now (1 - beta1) x gradient.
                leaves = jax.tree_util.tree_leaves_with_path(state.opt_state)
                moments = [x for p, x in leaves if ".mu" in jax.tree_util.keystr(p)]
                gradient = np.concatenate([np.ravel(x) for x in moments])
        marks = fingerprints(state.params)
        if folder is not None:
            checkpoints = Checkpoints(folder)
            items = {"model": {"params": state.params}, "training": {"key": state.key}}
            checkpoints.save(STEPS, items, {})
            checkpoints.close()
    return {"losses": losses, "gradient": gradient, "marks": marks}


def gathered(model: Vaani) -> list[tuple[str, int]]:
    """Element type and number of elements of each float or code that a step gathers."""
    config = MeshConfig(1, DEVICES, 1)
    # Layers one by one, so that the program's text holds each gather once.
    model = model.changed(scan_layers=False, dtype="bfloat16")
    mesh = make_mesh(config)
    program = make_program(make_config(model, config), mesh, STEPS)
    tokens = jax.ShapeDtypeStruct((64, 33), jnp.int32, sharding=program.batch)
    with jax.set_mesh(mesh):
        text = program.train_step.lower(program.shapes, tokens).compile().as_text()
    found = re.findall(r"= (\w+)\[([\d,]+)\]\S* all-gather\(", text)
    return [
        (kind, int(np.prod([int(n) for n in shape.split(",")])))
        for kind, shape in found
        if kind not in ("s32", "pred")  # token ids, and masks of them
    ]


def moved(source: pathlib.Path, config: MeshConfig) -> dict:
    """Fingerprints of the parameters of a checkpoint, read onto a mesh."""
    mesh = make_mesh(config)
    params = jax.eval_shape(lambda: init_variables(MODEL, jax.random.key(0))["params"])
    shardings = param_shardings(params, mesh, config)
    target = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        params,
        shardings,
    )
    checkpoints = Checkpoints(source, read_only=True)
    restored = checkpoints.restore(lambda meta: {"model": {"params": target}})
    checkpoints.close()
    assert restored is not None
    read = restored.items["model"]["params"]
    cut = jax.tree.map(
        lambda x, s: x.sharding.is_equivalent_to(s, x.ndim), read, shardings
    )
    assert all(jax.tree.leaves(cut))
    return fingerprints(read)


def compare(quantize: bool, meshes: list, root: pathlib.Path) -> dict:
    """Largest differences to one device, by mesh; checkpoints go to ``root``."""
    model = MODEL.changed(quantize=quantize)
    # The twin has no rounding that a few steps more could tip.
    steps = STEPS if quantize else 5
    one = run(model, MeshConfig(1, 1, 1), steps=steps)
    norm = np.linalg.norm(one["gradient"])
    result: dict = {"curves": {}, "gradients": {}, "marks": {}}
    for mesh in meshes:
        folder = root / "x".join(map(str, mesh)) if quantize else None
        got = run(model, MeshConfig(*mesh), folder, steps)
        ratio = np.asarray(got["losses"]) / np.asarray(one["losses"])
        name = json.dumps(mesh)
        result["curves"][name] = float(np.max(np.abs(ratio - 1)))
        difference = np.linalg.norm(got["gradient"] - one["gradient"])
        result["gradients"][name] = float(difference / norm)
        result["marks"][name] = got["marks"]
    result["fell"] = one["losses"][-1] / one["losses"][0]
    return result


def report() -> None:
    with tempfile.TemporaryDirectory() as name:
        root = pathlib.Path(name)
        ternary = compare(True, MESHES, root)
        # A ring: every mesh writes once and reads once. What is written are whole
        # arrays, with nothing of the mesh: who reads one reads them all.
        marks, moves = ternary["marks"], {}
        for mesh, following in zip(MESHES, [*MESHES[1:], MESHES[0]], strict=True):
            folder = root / "x".join(map(str, mesh))
            read = moved(folder, MeshConfig(*following))
            moves[f"{mesh} -> {following}"] = read == marks[json.dumps(mesh)]
        twin = compare(False, TWIN_MESHES, root)
    wires = {
        wire: gathered(WIDER.changed(wire=wire)) for wire in ("2bit", "int8", "float")
    }
    wires["twin"] = gathered(WIDER.changed(quantize=False))
    for result in (ternary, twin):
        del result["marks"]
    print(
        json.dumps(
            {"ternary": ternary, "twin": twin, "moves": moves, "gathered": wires}
        )
    )


@pytest.fixture(scope="module")
def runs():
    flags = f"--xla_force_host_platform_device_count={DEVICES}"
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


def test_every_mesh_has_the_loss_curve_of_one_device(runs):
    assert len(runs["ternary"]["curves"]) == len(MESHES)
    assert runs["ternary"]["fell"] < 0.98
    assert max(runs["ternary"]["curves"].values()) <= 1e-3, runs["ternary"]["curves"]


def test_every_mesh_has_the_gradients_of_one_device(runs):
    gradients = runs["ternary"]["gradients"]
    assert len(gradients) == len(MESHES)
    for mesh, difference in gradients.items():
        # With ``tensor``, the sub-norms are sums over devices: a rounding may tip here
        # and there, for some 1e-4 of the gradient. An error would be larger.
        assert difference <= (2e-3 if json.loads(mesh)[2] > 1 else 1e-5), gradients


def test_without_roundings_to_tip_nothing_is_left_but_the_order_of_sums(runs):
    """The twin, on each axis alone and on all three at once."""
    twin = runs["twin"]
    assert len(twin["curves"]) == len(TWIN_MESHES)
    assert max(twin["curves"].values()) <= 1e-5, twin["curves"]
    assert max(twin["gradients"].values()) <= 1e-5, twin["gradients"]


def test_a_checkpoint_moves_between_any_two_meshes(runs):
    assert len(runs["moves"]) == len(MESHES)
    assert all(runs["moves"].values()), runs["moves"]


def weight_bytes(gathers) -> float:
    """Bytes, with floats at 16 bits: a CPU's collectives widen them to 32."""
    return sum(n * (1 if kind in ("u8", "s8") else 2) for kind, n in gathers)


def test_kernels_cross_the_wire_as_codes(runs):
    shape = WIDER.architecture
    head = shape.vocab_size * shape.dim  # not ternary, here as in b1.58
    sent = runs["gathered"]
    for wire, kind in (("2bit", "u8"), ("int8", "s8")):
        others = [n for k, n in sent[wire] if k != kind]
        assert len(sent[wire]) - len(others) >= 7 * shape.n_layers
        assert sum(others) <= head, sent[wire]
    # The twin keeps whole kernels for the backward pass, codes are gathered for it
    # again: 2 x 2 bits against 16, and the head in both.
    baseline = weight_bytes(sent["twin"])
    assert weight_bytes(sent["2bit"]) <= 0.3 * baseline, sent
    assert weight_bytes(sent["int8"]) > 0.3 * baseline
    assert weight_bytes(sent["float"]) > 0.3 * baseline


# -- Rules --------------------------------------------------------------------------


def abstract(**changes):
    model = MODEL.changed(**changes)
    return jax.eval_shape(lambda: init_variables(model, jax.random.key(0))["params"])


def fake_mesh(data=1, fsdp=1, tensor=1):
    return jax.sharding.AbstractMesh((data, fsdp, tensor), ("data", "fsdp", "tensor"))


@pytest.mark.parametrize("scan", [True, False])
@pytest.mark.parametrize("tied", [True, False])
def test_the_rules_cover_every_parameter(scan, tied):
    params = abstract(scan_layers=scan, tie_embeddings=tied)
    specs = param_specs(params, MeshConfig())
    assert len(specs) == len(jax.tree.leaves(params))
    layer, first = ("layers", (None,)) if scan else ("layers_1", ())
    assert specs[f"{layer}/attn/q_proj/kernel"] == P(*first, "fsdp", "tensor")
    assert specs[f"{layer}/ffn/down_proj/kernel"] == P(*first, "tensor", "fsdp")
    assert specs["embedding"] == P(None, "fsdp")


@pytest.mark.parametrize("scan", [True, False])
def test_biases_are_cut_as_the_products_they_join(scan):
    params = abstract(scan_layers=scan, qk_norm=True, attention_bias=True)
    specs = param_specs(params, MeshConfig())
    layer, first = ("layers", (None,)) if scan else ("layers_1", ())
    for name in ("q_proj", "k_proj", "v_proj"):
        assert specs[f"{layer}/attn/{name}/bias"] == P(*first, "tensor")
    assert specs[f"{layer}/attn/k_norm/scale"] == P(*first, None)


def test_the_first_rule_that_matches_wins():
    mine = MeshConfig(rules=("q_proj: -, fsdp+tensor", "q_proj: fsdp, -"))
    specs = param_specs(abstract(), mine)
    assert specs["layers/attn/q_proj/kernel"] == P(None, None, ("fsdp", "tensor"))
    assert specs["layers/attn/k_proj/kernel"] == P(None, "fsdp", "tensor")


def test_an_uncovered_parameter_is_an_error():
    params = {**abstract(), "bias": jax.ShapeDtypeStruct((4,), np.float32)}
    with pytest.raises(VaaniError, match="no mesh rule covers the parameter bias"):
        param_specs(params, MeshConfig())


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("q_proj fsdp", "has no colon"),
        ("q_proj: fsdp, expert", "'expert' is no axis"),
        ("(q_proj: fsdp", "unterminated subpattern"),
    ],
)
def test_a_rule_that_cannot_be_read_is_an_error(rule, message):
    with pytest.raises(VaaniError, match=message):
        MeshConfig(rules=(rule,))


def test_a_rule_with_too_many_axes_is_an_error():
    with pytest.raises(VaaniError, match="cuts 2 dimensions, it has 1"):
        param_specs(abstract(), MeshConfig(rules=("final_norm: fsdp, tensor",)))


def test_what_cannot_be_cut_evenly_is_an_error():
    with pytest.raises(VaaniError, match=r"k_proj/kernel .* 5 equal parts .* tensor"):
        param_shardings(abstract(), fake_mesh(tensor=5), MeshConfig())


def test_moments_and_codes_lie_as_their_parameters():
    optimizer = make_optimizer(OptimConfig(name="muon"))
    shapes = jax.eval_shape(lambda: init_state(MODEL, optimizer, 0, TUNER))
    mesh = fake_mesh(fsdp=2, tensor=2)
    shardings = state_shardings(shapes, optimizer, mesh, MeshConfig())
    kernel = P(None, "fsdp", "tensor")
    assert shardings.params["layers"]["attn"]["q_proj"]["kernel"].spec == kernel
    assert shardings.codes["layers/attn/q_proj"].spec == kernel
    assert shardings.tuner.memory.codes["layers/attn/q_proj"].spec == kernel
    whole = [
        leaf.shape
        for leaf, sharding in zip(
            jax.tree.leaves(shapes), jax.tree.leaves(shardings), strict=True
        )
        if sharding.is_fully_replicated
    ]
    shape = MODEL.architecture
    assert max(map(np.prod, whole)) <= shape.n_layers * shape.hidden_dim  # norms
    moments = [s for s in jax.tree.leaves(shardings.opt_state) if s.spec == kernel]
    assert len(moments) == 5  # of the five column kernels


def test_what_lies_as_a_parameter_is_known_by_optax_not_by_its_shape():
    """An optimizer from outside: moments in a list, a number that has a parameter's
    path and shape, and moments of another shape."""

    def init(params):
        rows = jax.tree.map(lambda p: p.sum(axis=-1), params)
        stranger = {"embedding": np.zeros((128, 64), np.float32)}
        return [jax.tree.map(jnp.zeros_like, params)], rows, stranger

    odd = optax.GradientTransformation(init, lambda u, s, p=None: (u, s))
    shapes = jax.eval_shape(lambda: init_state(MODEL, odd, 0, None))
    mesh = fake_mesh(fsdp=2, tensor=2)
    found = state_shardings(shapes, odd, mesh, MeshConfig())
    (moments,), rows, stranger = found.opt_state
    assert moments == found.params
    assert not moments["embedding"].is_fully_replicated
    for sharding in jax.tree.leaves((rows["layers"], stranger)):
        assert sharding.is_fully_replicated


# -- Meshes -------------------------------------------------------------------------


def test_the_rest_of_the_devices():
    devices = [*jax.devices()] * 1
    assert dict(make_mesh(MeshConfig(), devices).shape) == {
        "data": 1,
        "fsdp": 1,
        "tensor": 1,
    }
    with pytest.raises(VaaniError, match="needs 2 devices, there are 1"):
        make_mesh(MeshConfig(data=1, fsdp=2))
    with pytest.raises(VaaniError, match="2 does not divide 1"):
        make_mesh(MeshConfig(data=-1, fsdp=2))


@pytest.mark.parametrize("sizes", [(0, 1, 1), (-1, -1, 1), (1, -2, 1)])
def test_impossible_sizes_are_errors(sizes):
    with pytest.raises(VaaniError, match="at least 1, or -1"):
        MeshConfig(*sizes)


def test_a_batch_that_cannot_be_cut_is_an_error():
    mesh = fake_mesh(data=2, fsdp=4, tensor=3)
    check_batch(mesh, 16)
    check_batch(mesh, 32, 4)
    with pytest.raises(VaaniError, match=r"batch_size = 12 .* 8 equal parts"):
        check_batch(mesh, 12)
    with pytest.raises(VaaniError, match="accumulation_steps = 4"):
        check_batch(mesh, 16, 4)


def test_outside_of_a_mesh_nothing_is_constrained():
    jaxpr = jax.make_jaxpr(lambda x: constrain(x, "data", None))(np.ones((2, 3)))
    assert "sharding_constraint" not in str(jaxpr)


if __name__ == "__main__":
    report()

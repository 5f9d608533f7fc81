"""A packed folder is the model: written whole, mapped back, equal in what it says."""

import functools
import json
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from rich.console import Console
from structure import same_structure

from vaani_jax import cli, kernels
from vaani_jax.errors import VaaniError
from vaani_jax.inference import model as model_module
from vaani_jax.inference.generate import generate, prefill
from vaani_jax.inference.model import (
    PACKED_ARRAYS,
    PACKED_CONFIG,
    Model,
    load,
    load_packed,
    pack_model,
    save_packed,
)
from vaani_jax.inference.sampling import SamplerConfig
from vaani_jax.inference.tensors import ALIGNMENT, read_tensors, write_tensors
from vaani_jax.quant.norm import rms_norm
from vaani_jax.quant.packed import PackedTernary, pack
from vaani_jax.quant.spec import TernarySpec
from vaani_jax.quant.weights import ternarize
from vaani_jax.train.config import from_dict
from vaani_jax.train.loop import train

TEXT = "".join(
    f"{a} {b} the {c}.\n"
    for a in ("one", "two", "every", "no")
    for b in ("small", "ternary", "old")
    for c in ("model", "cat", "sum", "letter", "word")
)


@functools.cache
def same_bits() -> bool:
    """Whether native norms round here as those that XLA compiles.

    A kernel that takes its norm along sums squares and takes roots by itself. Where the
    bits of both are equal, packed text must be equal, too; that is looked at, not
    concluded from the maker of the processor.
    """
    if kernels.backend() != "cpu":
        return True  # the norm is XLA's
    rng = np.random.default_rng(0)
    w = jnp.asarray(rng.normal(size=(48, 48)), jnp.float32)
    packed = (pack(*ternarize(w, jnp.float32(0.5), TernarySpec())),)
    scale = jnp.ones(48)

    @jax.jit
    def alone(x):
        return kernels.ternary_matmul(rms_norm(x, scale, 1e-5), packed)[0]

    @jax.jit
    def along(x):
        return kernels.ternary_matmul(x, packed, norm=(scale, 1e-5))[0]

    inputs = jnp.asarray(rng.normal(size=(256, 1, 48)), jnp.float32)
    return all(bool((alone(x) == along(x)).all()) for x in inputs)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A small model that has learnt its text."""
    folder = tmp_path_factory.mktemp("load")
    (folder / "text.txt").write_text(TEXT * 20, encoding="utf-8")
    config = from_dict(
        {
            "num_steps": 120,
            "batch_size": 16,
            "learning_rate": 1e-2,
            "use_tuner": False,
            "eval_interval": 60,
            "data": {"path": str(folder / "text.txt")},
            "model": {"dim": 48, "n_layers": 2, "n_heads": 4, "max_seq_len": 48},
            "optim": {"warmup_steps": 5},
            "sample": {"max_new_tokens": 4},
        }
    )
    with open(os.devnull, "w") as sink:
        train(config, folder / "run", console=Console(file=sink))
    return folder / "run"


@pytest.fixture(scope="module")
def folder(run, tmp_path_factory):
    target = tmp_path_factory.mktemp("packed") / "model"
    save_packed(pack_model(load(run)), target)
    return target


@pytest.fixture
def copy(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "copy")


def test_what_is_loaded_is_what_was_packed(run, folder):
    packed, loaded = pack_model(load(run)), load_packed(folder)
    assert same_structure(packed.variables, loaded.variables)
    for a, b in zip(
        jax.tree.leaves(packed.variables),
        jax.tree.leaves(loaded.variables),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)
    assert loaded.step == packed.step
    assert loaded.packed
    assert loaded.tokenizer.to_json() == packed.tokenizer.to_json()


def test_packed_kernels_are_the_mapped_file(folder):
    arrays = read_tensors(folder / PACKED_ARRAYS)
    codes = [a for name, a in arrays.items() if name.endswith("kernel.codes")]
    assert codes
    for array in codes:
        assert array.ctypes.data % ALIGNMENT == 0
        assert not array.flags.writeable
        assert jax.device_put(array).unsafe_buffer_pointer() == array.ctypes.data


def test_logits_differ_by_roundings_that_fall_the_other_way_only(run, folder):
    """Float parts are compiled in other pieces, so last bits differ, and now and then
    one of the 8-bit roundings. Without such a fall, nothing else shows."""
    trained, packed = load(run), load_packed(folder)
    tokens = jnp.asarray(trained.tokenizer.encode(TEXT[: 48 * 24])).reshape(24, 48)
    logits = [
        np.asarray(jax.jit(m.module.apply)(m.variables, tokens))
        for m in (trained, packed)
    ]
    worst = np.abs(logits[0] - logits[1]).max(axis=-1)
    scale = np.abs(logits[0]).max()
    assert np.median(worst) < 1e-5 * scale
    assert (worst > 1e-4 * scale).mean() < 0.2  # a fall moves what follows it, too
    assert worst.max() < 0.05 * scale


def test_decoding_gives_the_logits_of_masters_to_the_bit(run, folder):
    trained, packed = load(run), load_packed(folder)
    ids = trained.tokenizer.encode(TEXT[:40])

    @functools.partial(jax.jit, static_argnums=0)
    def forward(module, variables, token, cache):
        return module.apply(variables, token, cache)

    rows = []
    for m in (trained, packed):
        tokens = jnp.zeros((1, 16), jnp.int32).at[0, :9].set(ids[:9])
        logits, cache = prefill(m.module, m.variables, tokens, jnp.int32(9))
        seen = [logits[0]]
        for token in ids[9:]:
            one = jnp.asarray([[token]])
            logits, cache = forward(m.module, m.variables, one, cache)
            seen.append(logits[0, 0])
        rows.append(np.asarray(jnp.stack(seen)))
    if same_bits():
        np.testing.assert_array_equal(rows[0], rows[1])
    else:
        np.testing.assert_allclose(rows[0], rows[1], rtol=0, atol=1e-4)


def test_greedy_text_is_that_of_training(run, folder):
    """256 tokens for each of 20 prompts."""
    trained, packed = load(run), load_packed(folder)
    words = TEXT.split()
    prompts = [
        trained.tokenizer.encode(" ".join(words[i : i + 1 + i % 4])) for i in range(20)
    ]
    greedy = SamplerConfig(temperature=0.0)
    texts = [
        generate(m, prompts, max_new_tokens=256, sampler=greedy)
        for m in (trained, packed)
    ]
    assert texts[0].shape == (20, 256)
    for prompt, one, other in zip(prompts, *texts, strict=True):
        if same_bits():
            np.testing.assert_array_equal(one, other)
        elif (one != other).any():
            # Where two tokens are as likely, the last bit decides, and all that
            # follows: both choices must be within roundings of each other.
            at = int(np.argmax(one != other))
            room = trained.architecture.max_seq_len
            seen = np.concatenate([prompt, one[:at]])[-room:].astype(np.int32)
            last = trained(jnp.asarray(seen)[None])[0, -1]
            assert abs(last[one[at]] - last[other[at]]) < 0.05 * np.abs(last).max()


def test_the_safetensors_package_reads_the_file(folder):
    theirs = safetensors.numpy.load_file(folder / PACKED_ARRAYS)
    ours = read_tensors(folder / PACKED_ARRAYS)
    assert theirs.keys() == ours.keys()
    for name, array in ours.items():
        np.testing.assert_array_equal(theirs[name], array)


def test_tensors_of_every_kind_come_back(tmp_path):
    arrays: dict[str, np.ndarray] = {
        "a": np.arange(5, dtype=np.float32),
        "b": np.zeros((3, 0), np.int8),
        "c": np.asarray(3.5, np.float32),
        "d": np.arange(128, dtype=np.uint8).reshape(2, 64),
    }
    write_tensors(tmp_path / "x.safetensors", arrays)
    back = read_tensors(tmp_path / "x.safetensors")
    assert back.keys() == arrays.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(back[name], array)
        assert back[name].dtype == array.dtype
        assert back[name].shape == array.shape


# -- The commands -------------------------------------------------------------------


def test_pack_then_generate_and_evaluate(run, tmp_path, capsys):
    target = tmp_path / "small"
    command = ["pack", "--workdir", str(run), "--output", str(target)]
    assert cli.main([*command, "--embedding", "int8"]) == 0
    told = capsys.readouterr().out
    assert "bits each" in told
    assert "validation loss" in told
    assert sorted(os.listdir(target)) == [PACKED_ARRAYS, PACKED_CONFIG]
    texts = []
    for workdir in (run, target):
        assert (
            cli.main(
                ["generate", "--workdir", str(workdir), "--prompt", "two", "--greedy"]
            )
            == 0
        )
        texts.append(capsys.readouterr().out)
    # What begins the next line is as likely to be one word as another.
    assert texts[0].split("\n")[0] == texts[1].split("\n")[0]
    losses = []
    for workdir in (run, target):
        assert cli.main(["evaluate", "--workdir", str(workdir), "--json"]) == 0
        losses.append(json.loads(capsys.readouterr().out)["loss"])
    assert losses[1] == pytest.approx(losses[0], abs=0.02)


def one_error(capsys, arguments, match):
    assert cli.main(arguments) == 1
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert match in lines[0]


def test_pack_writes_over_nothing(run, folder, capsys):
    before = (folder / PACKED_ARRAYS).read_bytes()
    command = ["pack", "--workdir", str(run), "--output", str(folder)]
    one_error(capsys, command, "there already")
    assert (folder / PACKED_ARRAYS).read_bytes() == before


def test_a_packed_model_is_not_packed_again(folder, tmp_path, capsys):
    command = ["pack", "--workdir", str(folder), "--output", str(tmp_path / "x")]
    one_error(capsys, command, "packed already")


def test_a_packed_model_is_not_exported(folder, tmp_path, capsys):
    command = ["export", "--workdir", str(folder), "--format", "hf"]
    one_error(capsys, [*command, "--output", str(tmp_path / "x")], "packed from")
    assert not (tmp_path / "x").exists()


def test_a_full_disk_leaves_nothing(run, tmp_path, monkeypatch):
    def full(path, arrays):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    model = pack_model(load(run))
    monkeypatch.setattr(model_module, "write_tensors", full)
    with pytest.raises(OSError, match="No space"):
        save_packed(model, tmp_path / "out" / "model")
    assert os.listdir(tmp_path / "out") == []


def test_a_twin_is_refused(run):
    model = load(run)
    twin = Model(model.module.changed(quantize=False), model.variables, model.tokenizer)
    with pytest.raises(VaaniError, match="twin"):
        pack_model(twin)


def test_packed_weights_are_no_start_for_training(run, folder, tmp_path):
    summary = json.loads((run / "run.json").read_text())
    config = from_dict(summary["config"] | {"init_from": str(folder)})
    with (
        open(os.devnull, "w") as sink,
        pytest.raises(VaaniError, match="no weights to train"),
    ):
        train(config, tmp_path / "new", console=Console(file=sink))


# -- Damage -------------------------------------------------------------------------


def damaged(copy, match):
    with pytest.raises(VaaniError, match=match) as caught:
        load_packed(copy)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("size", [0, 4, 40, 2000, -1])
def test_a_file_cut_short(copy, size):
    path = copy / PACKED_ARRAYS
    data = path.read_bytes()
    path.write_bytes(data[:size])
    damaged(copy, "safetensors")


def test_files_that_are_missing(copy):
    (copy / PACKED_ARRAYS).unlink()
    damaged(copy, "can't read")
    (copy / PACKED_CONFIG).unlink()
    damaged(copy, "can't read")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"format": "other"}, "format"),
        ({"architecture": {"nonsense": 1}}, "unknown config key"),
        ({"quantization": 7}, "must hold keys"),
        ({"tokenizer": {"type": "bird"}}, "tokenizer"),
        ({"packed": 7}, "damaged"),
        ({"step": "x"}, "damaged"),
    ],
)
def test_a_description_that_is_wrong(copy, change, match):
    path = copy / PACKED_CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    damaged(copy, match)


@pytest.mark.parametrize(
    ("key", "value", "match"),
    [
        ("n_layers", 10**9, "1,000,000,000, and the arrays"),
        ("max_seq_len", 10**9, "rotary angles"),
        ("dim", 10**9, "rotary angles"),
        ("vocab_size", 2**40, "vocab_size is 1,099,511,627,776"),
    ],
)
def test_sizes_that_no_array_bears_out_cost_nothing(copy, key, value, match):
    path = copy / PACKED_CONFIG
    description = json.loads(path.read_text())
    description["architecture"][key] = value
    path.write_text(json.dumps(description))
    damaged(copy, match)


def test_a_description_that_is_nested_without_end(copy):
    (copy / PACKED_CONFIG).write_text("[" * 100_000)
    damaged(copy, "can't read")


def test_arrays_that_do_not_fit(copy):
    path = copy / PACKED_ARRAYS
    arrays = {name: np.array(a) for name, a in read_tensors(path).items()}
    name = next(n for n in arrays if n.endswith("q_proj/kernel.codes"))
    write_tensors(path, {k: v for k, v in arrays.items() if k != name})
    damaged(copy, "lacks")
    write_tensors(path, arrays | {name: arrays[name][:1]})
    damaged(copy, "not uint8")
    write_tensors(path, arrays | {"params/more": arrays[name]})
    damaged(copy, "not expected")


def test_headers_that_lie(tmp_path):
    path = tmp_path / "x.safetensors"
    good = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    for entry in (
        good | {"shape": [-2]},
        good | {"shape": [1 << 60]},
        good | {"shape": [float("inf")]},
        good | {"shape": [float("nan")]},
        good | {"data_offsets": [0, 1 << 40]},
        good | {"data_offsets": [8, 0]},
        good | {"dtype": "F99"},
        {"dtype": "F32"},
        7,
    ):
        text = json.dumps({"a": entry}).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + b"\0" * 8)
        with pytest.raises(VaaniError, match="safetensors"):
            read_tensors(path)
    path.write_bytes((1 << 62).to_bytes(8, "little") + b"\0" * 8)
    with pytest.raises(VaaniError, match="cut short"):
        read_tensors(path)


def test_no_packed_leaf_in_a_run(run):
    leaves = jax.tree.leaves(
        load(run).params, is_leaf=lambda x: isinstance(x, PackedTernary)
    )
    assert not any(isinstance(x, PackedTernary) for x in leaves)

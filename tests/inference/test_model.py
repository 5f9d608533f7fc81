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

from vaani_jax import cli, leaves
from vaani_jax.errors import VaaniError
from vaani_jax.inference import model as model_module
from vaani_jax.inference.generate import generate
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
from vaani_jax.model.cache import KVCache
from vaani_jax.model.names import ternary_codes
from vaani_jax.model.packing import pack_variables
from vaani_jax.model.transformer import Vaani, init_variables
from vaani_jax.quant.packed import PackedTernary, unpack
from vaani_jax.runs import checkpoints as checkpoints_module
from vaani_jax.runs.checkpoints import Checkpoints
from vaani_jax.runs.metadata import Metadata
from vaani_jax.text.tokenizers import ByteTokenizer
from vaani_jax.train.config import from_dict
from vaani_jax.train.loop import train
from vaani_jax.train.losses import cross_entropy

TEXT = "".join(
    f"{a} {b} the {c}.\n"
    for a in ("one", "two", "every", "no")
    for b in ("small", "ternary", "old")
    for c in ("model", "cat", "sum", "letter", "word")
)


SMALL = Vaani().changed(
    vocab_size=256, dim=32, n_layers=3, n_heads=2, ffn_dim=64, max_seq_len=32
)


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


def prompts_of(model, count):
    words = TEXT.split()
    return [
        model.tokenizer.encode(" ".join(words[i : i + 1 + i % 4])) for i in range(count)
    ]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_way_gives_the_logits_of_training(run, dtype):
    """Masters and packed weights, one by one and in batches, at once and in pieces."""
    trained = load(run)
    ids = trained.tokenizer.encode(TEXT)
    rows = jnp.asarray([ids[i : i + 40] for i in range(0, 100, 5)])
    module = trained.module.changed(dtype=dtype)
    check_every_way(module, trained.variables, rows)


@pytest.mark.parametrize(
    ("family", "dtype"), [("", "float32"), ("", "bfloat16"), ("qwen2", "float32")]
)
def test_so_do_those_of_other_families(family, dtype):
    """And where a block has all that theirs have."""
    plain = {"sub_norms": True, "qk_norm": True, "attention_bias": True}
    module = SMALL.changed(
        dtype=dtype,
        n_layers=1,
        max_seq_len=48,
        n_heads=4,
        n_kv_heads=2,
        init_std=0.2,
        head_dim=12,
        rope_scaling="yarn",
        rope_factor=4.0,
        rope_original_len=12,
        **({"family": family} if family else plain),
    )
    rng = np.random.default_rng(0)

    def moved(path, leaf):
        """Norms and biases off their start."""
        kinds = {"scale": 1.0, "bias": 0.0}
        if (mean := kinds.get(path[-1].key)) is None:
            return leaf
        return jnp.asarray(rng.normal(mean, 0.3, leaf.shape), leaf.dtype)

    variables = init_variables(module, jax.random.key(0))
    variables = jax.tree_util.tree_map_with_path(moved, variables)
    rows = jnp.asarray(rng.integers(256, size=(20, 40)))
    check_every_way(module, variables, rows, batches=(1, 20))


def check_every_way(module, variables, rows, batches=(1, 4, 20)):
    packed = pack_variables(variables, module.spec)
    params, dtype = variables["params"], module.quantization.dtype

    @jax.jit
    def train_graph(params, tokens):
        def loss(params):
            arrays = {**variables, "params": params}
            logits, _ = module.apply(arrays, tokens, train=True, mutable=["quant"])
            return cross_entropy(logits[:, :-1], tokens[:, 1:]), logits

        return jax.grad(loss, has_aux=True)(params)[1]

    expected = np.asarray(train_graph(params, rows))
    step = jax.jit(module.apply)
    for arrays in (variables, packed):
        np.testing.assert_array_equal(step(arrays, rows), expected)
        for batch in batches:
            cache = KVCache.create(module.architecture, batch, dtype=dtype)
            seen = []
            for begin, end in ((0, 9), (9, 14), *((i, i + 1) for i in range(14, 40))):
                logits, cache = step(arrays, rows[:batch, begin:end], cache)
                seen.append(np.asarray(logits))
            np.testing.assert_array_equal(np.concatenate(seen, 1), expected[:batch])


def test_greedy_text_is_that_of_training(run, folder):
    """256 tokens for each of 20 prompts, singly and in batches."""
    trained, packed = load(run), load_packed(folder)
    prompts = prompts_of(trained, 20)
    greedy = functools.partial(
        generate, max_new_tokens=256, sampler=SamplerConfig(temperature=0.0)
    )
    expected = greedy(trained, prompts)
    assert expected.shape == (20, 256)
    for model in (trained, packed):
        for size in (1, 4, 20):
            parts = [prompts[i : i + size] for i in range(0, 20, size)]
            texts = np.concatenate([greedy(model, part) for part in parts])
            np.testing.assert_array_equal(texts, expected)


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


# -- Packing while reading ----------------------------------------------------------


def saved(module, workdir):
    """A checkpoint of a model as it is initialized, with thresholds of its own."""
    variables = init_variables(module, jax.random.key(0))

    def changed(path, leaf):
        own = 0.3 + 0.1 * jnp.arange(leaf.size, dtype=leaf.dtype).reshape(leaf.shape)
        return own if leaves.name(path).endswith("quantizer/threshold") else leaf

    quant = jax.tree_util.tree_map_with_path(changed, variables["quant"])
    checkpoints = Checkpoints(workdir / "checkpoints")
    metadata = Metadata.of(module, ByteTokenizer().to_json())
    items = {"model": {"params": variables["params"], "quant": quant}}
    checkpoints.save(0, items, metadata.to_json())
    checkpoints.wait()
    checkpoints.close()
    return workdir


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"scan_layers": True},
        {"scan_layers": True, "weight_scale": "stored", "tie_embeddings": False},
        {"ternary_head": True, "activation_tracking": "ema"},
        {"ternary_head": True, "tie_embeddings": False},
        {"weight_granularity": "channel"},
        {"weight_granularity": "group", "weight_group": 32, "ternary_embedding": True},
        {
            "weight_granularity": "group",
            "weight_group": 32,
            "scale_dtype": "float16",
            "scan_layers": True,
        },
        {"scan_layers": True, "qk_norm": True, "attention_bias": True},
    ],
    ids=lambda keys: "-".join(keys) or "plain",
)
def test_what_is_packed_while_it_is_read_is_what_is_packed_afterwards(keys, tmp_path):
    workdir = saved(SMALL.changed(**keys), tmp_path)
    before, after = pack_model(load(workdir)), load(workdir, packed=True)
    assert after.packed
    assert after.module == before.module
    assert same_structure(after.variables, before.variables)
    for a, b in zip(
        jax.tree.leaves(after.variables), jax.tree.leaves(before.variables), strict=True
    ):
        np.testing.assert_array_equal(a, b)


def test_a_twin_is_read_as_it_is(tmp_path):
    workdir = saved(SMALL.changed(quantize=False), tmp_path)
    model = load(workdir, packed=True)
    assert not model.packed
    for a, b in zip(
        jax.tree.leaves(model.params),
        jax.tree.leaves(load(workdir).params),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("command", ["pack", "generate", "evaluate"])
def test_masters_are_in_memory_a_few_at_a_time(command, tmp_path, monkeypatch, capsys):
    """The commands that need packed weights never hold a model of masters."""
    module = SMALL.changed(n_layers=6)
    workdir = saved(module, tmp_path / "run")
    one = 4 * 32 * 64  # bytes of the largest kernel
    monkeypatch.setattr(checkpoints_module, "PART_BYTES", 2 * one)
    pack_kernel, live = model_module.pack_kernel, []

    def masters():
        """Bytes of arrays that have the shape of a kernel."""
        shapes = {(32, 32), (32, 64), (64, 32)}
        return sum(a.nbytes for a in jax.live_arrays() if a.shape in shapes)

    def watched(kernel, *others):
        live.append(masters())
        return pack_kernel(kernel, *others)

    monkeypatch.setattr(model_module, "pack_kernel", watched)
    options = {
        "pack": ["--output", str(tmp_path / "packed")],
        "generate": ["--prompt", "a", "--max-new-tokens", "1"],
        "evaluate": ["--data", str(tmp_path / "text.txt")],
    }
    (tmp_path / "text.txt").write_text("a text " * 20, encoding="utf-8")
    before = masters()
    assert cli.main([command, "--workdir", str(workdir), *options[command]]) == 0
    assert len(live) == 7 * 6
    assert 0 < max(live) - before <= 2 * one


def test_damage_is_found_while_reading(tmp_path, monkeypatch):
    workdir = saved(SMALL, tmp_path)
    mark = checkpoints_module._mark

    def other(path, leaf):
        name, value = mark(path, leaf)
        return name, value ^ ("up_proj']['kernel" in name)

    monkeypatch.setattr(checkpoints_module, "_mark", other)
    told: list[str] = []
    with pytest.raises(VaaniError, match="can be read"):
        load(workdir, packed=True, checkpoint="last", notify=told.append)
    assert "up_proj']['kernel'] is not what was saved" in told[0]


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


def test_a_packed_model_is_exported_as_codes_only(folder, tmp_path, capsys):
    command = ["export", "--workdir", str(folder), "--format", "hf"]
    one_error(capsys, [*command, "--output", str(tmp_path / "x")], "hf-packed")
    assert not (tmp_path / "x").exists()


def test_a_full_disk_leaves_nothing(run, tmp_path, monkeypatch):
    def full(path, arrays):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    model = pack_model(load(run))
    monkeypatch.setattr(model_module, "write_tensors", full)
    with pytest.raises(OSError, match="No space"):
        save_packed(model, tmp_path / "out" / "model")
    assert not (tmp_path / "out").exists()


def test_a_twin_is_refused(run):
    model = load(run)
    twin = Model(model.module.changed(quantize=False), model.variables, model.tokenizer)
    with pytest.raises(VaaniError, match="twin"):
        pack_model(twin)


def test_a_checkpoint_that_is_replaced_while_it_is_read_is_looked_for_again(
    run, tmp_path, monkeypatch
):
    workdir = shutil.copytree(run, tmp_path / "run")
    restore, gone = Checkpoints.restore, list[int]()

    def rotated(self, *arguments, step=None, **options):
        """The run removes what is being read, and has a newer one."""
        if not gone:
            newest = max(self.steps())
            folder = workdir / "checkpoints" / f"step_{newest}"
            gone.append(newest)
            folder.rename(folder.with_name(f"step_{newest + 1}"))
        return restore(self, *arguments, step=step, **options)

    monkeypatch.setattr(Checkpoints, "restore", rotated)
    model = load(workdir, checkpoint="last")
    assert len(gone) == 1
    assert same_structure(model.params, load(run, checkpoint="last").params)

    def always(self, *arguments, **options):
        raise checkpoints_module.GoneError(7)

    monkeypatch.setattr(Checkpoints, "restore", always)
    with pytest.raises(VaaniError, match="faster than they can be read"):
        load(workdir)


def test_packed_weights_are_a_start_for_training(run, folder, tmp_path):
    """Masters that quantize to their codes, and to their scales up to a rounding."""
    summary = json.loads((run / "run.json").read_text())
    changes = {"init_from": str(folder), "num_steps": 1, "learning_rate": 1e-12}
    config = from_dict(summary["config"] | changes)
    with open(os.devnull, "w") as sink:
        train(config, tmp_path / "new", console=Console(file=sink))
    begun = load(tmp_path / "new", checkpoint="last")
    packed = load(folder)
    for name, (codes, scale) in ternary_codes(
        begun.module.spec, begun.variables
    ).items():
        node = packed.params
        for part in name.split("/"):
            node = node[part]
        np.testing.assert_array_equal(unpack(node["kernel"]), codes)
        np.testing.assert_allclose(node["kernel"].scale, scale, rtol=1e-6)


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
        ("vocab_size", 2**40, "vocab_size is 1099511627776"),
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

"""Exports and imports, against transformers, torch and gguf's own reader."""

import json
import os
import pathlib
import subprocess
import sys

os.environ["TORCHDYNAMO_DISABLE"] = "1"  # eager: compiling would take minutes

import numpy as np
import pytest
import torch
import transformers
from interop.reference import (
    CHARACTERS,
    SMALL,
    TEXT,
    agreement,
    assert_same_arrays,
    edit_config,
    make_run,
    notify,
    save_theirs,
    their_falcon,
    their_llama,
    transformers_model,
)

from vaani_jax.errors import VaaniError
from vaani_jax.inference.model import load
from vaani_jax.interop.convert import as_flags, export_model, import_model
from vaani_jax.interop.formats import hf
from vaani_jax.model.names import ternary_codes
from vaani_jax.quant.packed import pack_quarters, unpack_quarters

VARIANTS = {
    "swiglu-mha-tied": SMALL,
    "relu2-gqa-tied": SMALL.changed(activation="relu2", n_kv_heads=2),
    "swiglu-gqa-untied": SMALL.changed(
        n_kv_heads=1, tie_embeddings=False, rope_theta=10_000.0
    ),
    "relu2-mha-untied": SMALL.changed(
        activation="relu2", tie_embeddings=False, norm_eps=1e-6
    ),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    made = {}

    def run(name, config=None):
        if name not in made:
            made[name] = make_run(folder / name, config or VARIANTS[name])
        return made[name]

    return run


@pytest.mark.parametrize("target", ["hf", "hf-packed"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_transformers_computes_what_we_compute(variant, target, runs, tmp_path):
    export_model(runs(variant), tmp_path / "out", target=target, notify=notify)
    found = agreement(runs(variant), tmp_path / "out")
    assert found["spread"] > 0.5
    assert found["loss"] <= 1e-3
    assert found["median"] <= 1e-3
    assert found["same"] >= 9
    assert found["flipped"] <= 0.1  # measured: 0.01 to 0.04


def test_the_comparison_sees_a_wrong_scale(runs, tmp_path):
    # The 0.69 trap: masters that are quantized already.
    export_model(runs("swiglu-mha-tied"), tmp_path / "out", target="hf", notify=notify)
    from safetensors.numpy import load_file, save_file

    path = tmp_path / "out" / hf.SINGLE
    weights = load_file(path)
    key = "model.layers.0.self_attn.q_proj.weight"
    w = weights[key]
    gamma = np.abs(w).mean()
    weights[key] = (gamma * np.clip(np.round(w / gamma), -1, 1)).astype(np.float32)
    save_file(weights, path, metadata={"format": "pt"})
    found = agreement(runs("swiglu-mha-tied"), tmp_path / "out")
    assert found["median"] > 1e-3
    assert found["flipped"] > 0.9


# -- Round trips ------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_masters_come_back_as_they_were(variant, runs, tmp_path):
    export_model(runs(variant), tmp_path / "out", target="hf", notify=notify)
    import_model(tmp_path / "out", tmp_path / "back", notify=notify)
    before = load(runs(variant), notify=notify)
    after = load(tmp_path / "back", notify=notify)
    assert_same_arrays(before.params, after.params)
    assert_same_arrays(before.quant, after.quant)
    assert after.tokenizer.to_json() == before.tokenizer.to_json()
    old = before.architecture
    same = after.module.changed(n_kv_heads=old.n_kv_heads, ffn_dim=old.ffn_dim)
    assert same == before.module


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"weight_scale": "least_squares"},
        {"threshold": 0.9, "activation": "relu2", "n_kv_heads": 2},
        {"scan_layers": True},
    ],
)
def test_codes_and_scales_come_back_exactly(change, tmp_path):
    config = SMALL.changed(**change)
    run = make_run(tmp_path / "run", config)
    export_model(run, tmp_path / "out", target="hf-packed", notify=notify)
    import_model(tmp_path / "out", tmp_path / "back", masters=True, notify=notify)
    before = load(run, notify=notify)
    after = load(tmp_path / "back", notify=notify)
    ours = ternary_codes(before.module.spec, before.variables)
    theirs = ternary_codes(after.module.spec, after.variables)
    assert ours.keys() == theirs.keys()
    for name, (codes, scale) in ours.items():
        np.testing.assert_array_equal(codes, theirs[name][0])
        # The one rounding is that of the mean, which compiled code sums otherwise.
        np.testing.assert_allclose(scale, theirs[name][1], rtol=3e-7)
    # Again, from masters and from a packed folder: now every bit stays.
    import_model(tmp_path / "out", tmp_path / "small", notify=notify)
    assert load(tmp_path / "small", notify=notify).packed
    for place in ("back", "small"):
        export_model(tmp_path / place, tmp_path / f"{place}-again", target="hf-packed")
        for file in ("config.json", hf.SINGLE, "tokenizer.json"):
            a, b = (tmp_path / d / file for d in ("out", f"{place}-again"))
            assert a.read_bytes() == b.read_bytes()
    # As masters, the weights of an import have the codes and the scale at tau 0.5.
    plain = after.module.changed(weight_scale="absmean")
    for name, (codes, scale) in ternary_codes(plain.spec, after.variables).items():
        np.testing.assert_array_equal(codes, theirs[name][0])
        np.testing.assert_allclose(scale, theirs[name][1], rtol=1e-5)


def test_packing_is_that_of_transformers():
    from transformers.integrations.bitnet import pack_weights

    codes = np.random.default_rng(0).integers(-1, 2, (64, 24)).astype(np.int8)
    packed = pack_weights(torch.tensor(codes.astype(np.int32))).numpy()
    np.testing.assert_array_equal(pack_quarters(codes), packed)
    np.testing.assert_array_equal(unpack_quarters(packed), codes)


def test_a_large_model_is_sharded(runs, tmp_path):
    run = runs("swiglu-gqa-untied")
    export_model(run, tmp_path / "out", target="hf", shard_bytes=30_000, notify=notify)
    index = json.loads((tmp_path / "out" / hf.INDEX).read_text())
    files = {p.name for p in (tmp_path / "out").glob("*.safetensors")}
    assert files == set(index["weight_map"].values())
    assert len(files) > 3
    assert not (tmp_path / "out" / hf.SINGLE).exists()
    import_model(tmp_path / "out", tmp_path / "back", notify=notify)
    before, after = load(run), load(tmp_path / "back")
    assert_same_arrays(before.params, after.params)
    expected = transformers_model(tmp_path / "out").state_dict()
    kernel = np.asarray(before.params["layers_1"]["ffn"]["down_proj"]["kernel"])
    name = "model.layers.1.mlp.down_proj.weight"
    np.testing.assert_array_equal(expected[name].numpy().T, kernel)


def test_a_full_precision_model_goes_out_and_in(tmp_path):
    config = SMALL.changed(quantize=False, n_kv_heads=2)
    run = make_run(tmp_path / "run", config)
    export_model(run, tmp_path / "out", target="hf", notify=notify)
    found = agreement(run, tmp_path / "out")
    assert found["loss"] <= 1e-5
    assert found["flipped"] == 0
    assert found["same"] == 10


# -- Models of others -------------------------------------------------------------


def their_bitnet(folder, **changes):
    torch.manual_seed(0)
    settings = {
        "vocab_size": CHARACTERS.vocab_size,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "initializer_range": 0.3,
        "bos_token_id": None,
        "eos_token_id": None,
        **changes,
    }
    model = transformers.BitNetForCausalLM(transformers.BitNetConfig(**settings))
    save_theirs(folder, model)
    online = {"linear_class": "autobitlinear", "quantization_mode": "online"}
    edit_config(folder, quantization_config={"quant_method": "bitnet", **online})


@pytest.mark.parametrize(
    "changes",
    [
        {"tie_word_embeddings": True},
        {"hidden_act": "silu", "num_key_value_heads": 4},
    ],
)
def test_a_model_of_theirs_computes_the_same_here(changes, tmp_path):
    their_bitnet(tmp_path / "theirs", **changes)
    import_model(tmp_path / "theirs", tmp_path / "run", notify=notify)
    found = agreement(tmp_path / "run", tmp_path / "theirs")
    assert found["spread"] > 0.5
    assert found["loss"] <= 1e-3
    assert found["median"] <= 1e-3
    assert found["same"] >= 9
    assert found["flipped"] <= 0.1


def test_falcon_e_divides_by_its_scale(tmp_path):
    their_falcon(tmp_path / "theirs")
    import_model(tmp_path / "theirs", tmp_path / "run", notify=notify)
    found = agreement(tmp_path / "run", tmp_path / "theirs")
    assert found["loss"] <= 1e-3
    assert found["median"] <= 1e-3
    assert found["same"] >= 9
    assert found["flipped"] <= 0.1
    # And out again, in the convention that multiplies.
    export_model(tmp_path / "run", tmp_path / "out", target="hf-packed")
    found = agreement(tmp_path / "run", tmp_path / "out")
    assert found["median"] <= 1e-3


def test_a_llama_computes_the_same_and_starts_a_ternary_run(tmp_path):
    their_llama(tmp_path / "theirs", rope_theta=10_000.0)
    module = import_model(tmp_path / "theirs", tmp_path / "run", notify=notify)
    assert not module.quantization.quantize
    assert not module.architecture.sub_norms
    found = agreement(tmp_path / "run", tmp_path / "theirs")
    assert found["loss"] <= 1e-5
    assert found["same"] == 10
    log = train_from(tmp_path, "--config.quantize_steps=4")
    assert "sub-norms are added" in log
    trained = load(tmp_path / "trained", checkpoint="last", notify=notify)
    assert trained.quantization.quantize
    assert trained.architecture.sub_norms


def train_from(folder, *flags):
    """Trains a few steps from the run in ``folder``; returns what it printed."""
    (folder / "text.txt").write_text(TEXT * 2, encoding="utf-8")
    root = pathlib.Path(__file__).parents[2]
    theirs = load(folder / "run", notify=notify).module
    told = [f for f in as_flags(theirs).split() if "max_seq_len" not in f]
    done = subprocess.run(
        [
            sys.executable,
            "train.py",
            "--config=configs/debug.py",
            f"--workdir={folder / 'trained'}",
            f"--config.init_from={folder / 'run'}",
            f"--config.data.path={folder / 'text.txt'}",
            "--config.use_tuner=False",
            "--config.learning_rate=1e-4",
            "--config.num_steps=4",
            *told,
            *flags,
        ],
        cwd=root,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("target", ["hf", "hf-packed", "falcon"])
def test_a_ternary_import_starts_a_run_where_it_was(target, runs, tmp_path):
    if target == "falcon":
        their_falcon(tmp_path / "out")
    else:
        export_model(runs("relu2-gqa-tied"), tmp_path / "out", target=target)
    import_model(tmp_path / "out", tmp_path / "run", notify=notify)
    train_from(tmp_path)
    before = load(tmp_path / "run", notify=notify)
    after = load(tmp_path / "trained", checkpoint="last", notify=notify)
    a = ternary_codes(before.module.spec, before.variables)
    b = ternary_codes(after.module.spec, after.variables)
    for name in a:
        assert np.mean(np.asarray(a[name][0]) == np.asarray(b[name][0])) > 0.99
        np.testing.assert_allclose(a[name][1], b[name][1], rtol=0.02)


# -- Refusals ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "target", "words"),
    [
        ({"weight_granularity": "channel"}, "hf-packed", "per channel"),
        ({"activation_tracking": "ema"}, "hf", "tracked"),
        ({"norm": "layer_norm"}, "hf", "norm layer_norm"),
        ({"ternary_head": True}, "hf", "head is ternary"),
        ({"threshold": 0.7}, "hf", "hf-packed"),
        ({"weight_scale": "least_squares"}, "hf", "hf-packed"),
        ({"quantize": False}, "hf-packed", "--format hf"),
        ({"dim": 12, "n_heads": 2, "n_kv_heads": 1}, "hf-packed", "multiples of 4"),
        ({"activation": "relu2"}, "gguf", "squared-ReLU"),
        ({"tie_embeddings": False}, "gguf", "head of its own"),
        ({}, "gguf", "q8_0 or f16"),
    ],
)
def test_what_a_format_cannot_hold_is_refused(change, target, words, tmp_path):
    run = make_run(tmp_path / "run", SMALL.changed(**change))
    with pytest.raises(VaaniError, match=words) as caught:
        export_model(run, tmp_path / "out", target=target, notify=notify)
    assert "\n" not in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def test_a_target_that_is_taken_is_refused(runs, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    with pytest.raises(VaaniError, match="already"):
        export_model(runs("swiglu-mha-tied"), tmp_path / "out", target="hf")
    assert [p.name for p in tmp_path.rglob("*")] == ["out", "mine"]


def test_an_export_that_comes_back_wrong_is_not_kept(runs, tmp_path, monkeypatch):
    monkeypatch.setattr(hf, "pack_quarters", lambda codes: _pack_shuffled(codes))
    with pytest.raises(VaaniError, match="does not come back"):
        export_model(runs("swiglu-mha-tied"), tmp_path / "out", target="hf-packed")
    assert not list(tmp_path.iterdir())


def _pack_shuffled(codes):
    parts = (codes + 1).astype(np.uint8).reshape(-1, 4, codes.shape[1])
    return parts[:, 0] | parts[:, 1] << 2 | parts[:, 2] << 4 | parts[:, 3] << 6

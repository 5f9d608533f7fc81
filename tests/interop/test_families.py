"""Families of blocks and scaled rotary embeddings, against transformers."""

import json
import os
from typing import Any

os.environ["TORCHDYNAMO_DISABLE"] = "1"  # eager: compiling would take minutes

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from interop.reference import (
    CHARACTERS,
    SMALL,
    agreement,
    assert_same_arrays,
    edit_config,
    make_run,
    notify,
    save_theirs,
)
from safetensors.numpy import load_file, save_file

from vaani_jax.errors import VaaniError
from vaani_jax.inference.model import load
from vaani_jax.interop import names, rotary
from vaani_jax.interop.convert import as_flags, export_model, import_model
from vaani_jax.interop.formats import FORMATS, Options, hf
from vaani_jax.model.config import Architecture
from vaani_jax.model.names import ternary_codes
from vaani_jax.model.rotary import rotary_angles
from vaani_jax.train.config import from_dict

Theirs = dict[str, Any]

LINEAR: Theirs = {"rope_type": "linear", "factor": 3.0}
LLAMA3: Theirs = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN: Theirs = {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 16,
}
CLASSES = {
    "bitnet": (transformers.BitNetConfig, transformers.BitNetForCausalLM),
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
    "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
    "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
}


def their_model(family, folder=None, rope=None, theta=100.0, **changes):
    """A model of theirs with random weights, norms and biases; saved, if asked to."""
    torch.manual_seed(0)
    config, model = CLASSES[family]
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
        "rope_parameters": {"rope_type": "default", "rope_theta": theta} | (rope or {}),
        **changes,
    }
    made = model(config(**settings)).eval()
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 0.3)
            elif "norm" in name:
                parameter.copy_(torch.exp(0.3 * torch.randn(parameter.shape)))
    if folder is not None:
        save_theirs(folder, made)
    return made


# Each family; each scaling; heads of their own dimension; tied and not; grouped or not.
PLAIN: dict[str, tuple[str, Theirs]] = {
    "llama": ("llama", {"num_key_value_heads": 4}),
    "llama-linear-wide": ("llama", {"rope": LINEAR, "head_dim": 24}),
    "llama-llama3-tied": ("llama", {"rope": LLAMA3, "tie_word_embeddings": True}),
    "llama-yarn": ("llama", {"rope": YARN, "num_key_value_heads": 1}),
    "qwen2-tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2-yarn-narrow": ("qwen2", {"rope": YARN, "head_dim": 8}),
    "qwen2-llama3": ("qwen2", {"rope": LLAMA3, "rms_norm_eps": 0.1}),
    "qwen3-wide": ("qwen3", {"head_dim": 32, "num_key_value_heads": 4}),
    "qwen3-yarn-tied": (
        "qwen3",
        {"rope": YARN, "head_dim": 24, "tie_word_embeddings": True},
    ),
    "qwen3-linear": ("qwen3", {"rope": LINEAR, "head_dim": 16, "hidden_act": "relu2"}),
    "qwen3-eps": ("qwen3", {"rope": LLAMA3, "head_dim": 16, "rms_norm_eps": 0.1}),
    "bitnet-yarn": ("bitnet", {"rope": YARN, "hidden_act": "silu"}),
    "bitnet-llama3": ("bitnet", {"rope": LLAMA3, "tie_word_embeddings": True}),
}


def logits_of(theirs, tokens):
    with torch.no_grad():
        return theirs(torch.tensor(tokens, dtype=torch.long)).logits.float().numpy()


TOKENS = np.random.default_rng(0).integers(CHARACTERS.vocab_size, size=(3, 64))


@pytest.mark.parametrize("case", PLAIN)
def test_full_precision_gives_their_logits(case, tmp_path):
    family, changes = PLAIN[case]
    theirs = their_model(family, tmp_path / "theirs", **changes)
    module = import_model(tmp_path / "theirs", tmp_path / "run", notify=notify)
    model, expected = load(tmp_path / "run"), logits_of(theirs, TOKENS)
    found = np.asarray(jax.jit(module.apply)(model.variables, jnp.asarray(TOKENS)))
    assert expected.std() > 0.5
    assert np.abs(found - expected).max() <= 1e-4
    # And each thing that the case is about is felt.
    a = module.architecture
    other: dict[str, Any] = {}
    if a.rope_scaling != "none":
        plain = dataclasses.replace(Architecture(), rope_theta=a.rope_theta)
        other = {
            f.name: getattr(plain, f.name)
            for f in dataclasses.fields(plain)
            if f.name.startswith("rope_")
        }
    elif a.norm_eps > 0.01:
        other = {"norm_eps": 1e-6}
    if other:
        changed = jax.jit(module.changed(**other).apply)
        off = np.abs(changed(model.variables, jnp.asarray(TOKENS)) - expected)
        assert np.median(off) > 0.01
    # Out again, and in: every number and every setting.
    export_model(tmp_path / "run", tmp_path / "out", target="hf", notify=notify)
    again = import_model(tmp_path / "out", tmp_path / "back", notify=notify)
    assert again == module
    assert_same_arrays(load(tmp_path / "back").variables, model.variables)
    ours = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert type(ours) is type(theirs)
    np.testing.assert_array_equal(logits_of(ours, TOKENS), expected)


TERNARY: dict[str, dict[str, Any]] = {
    "llama-linear": {"family": "llama", "rope_scaling": "linear", "rope_factor": 3.0},
    "qwen2-llama3": {
        "family": "qwen2",
        "rope_scaling": "llama3",
        "rope_factor": 8.0,
        "rope_original_len": 32,
        "n_kv_heads": 1,
    },
    "qwen3-yarn-wide": {
        "family": "qwen3",
        "rope_scaling": "yarn",
        "rope_factor": 4.0,
        "rope_original_len": 16,
        "head_dim": 24,
        "n_kv_heads": 2,
        "tie_embeddings": False,
    },
    "bitnet-yarn": {
        "family": "bitnet",
        "rope_scaling": "yarn",
        "rope_factor": 2.0,
        "rope_original_len": 32,
        "rope_attention_factor": 1.3,
    },
}


@pytest.mark.parametrize(
    ("case", "target"),
    [
        ("llama-linear", "hf"),
        ("qwen2-llama3", "hf"),
        ("qwen2-llama3", "hf-packed"),
        ("qwen3-yarn-wide", "hf-packed"),
        ("bitnet-yarn", "hf"),
    ],
)
def test_transformers_computes_ternary_ones_as_we_do(case, target, tmp_path):
    module = SMALL.changed(rope_theta=100.0, norm_eps=1e-3, **TERNARY[case])
    run = make_run(tmp_path / "run", module)
    export_model(run, tmp_path / "out", target=target, notify=notify)
    found = agreement(run, tmp_path / "out")
    assert found["spread"] > 0.5
    assert found["loss"] <= 1e-3
    assert found["median"] <= 1e-3
    assert found["same"] >= 9
    assert found["flipped"] <= 0.1
    # Back in, out, and in again: nothing moves.
    first = import_model(tmp_path / "out", tmp_path / "first", notify=notify)
    export_model(tmp_path / "first", tmp_path / "again", target=target, notify=notify)
    second = import_model(tmp_path / "again", tmp_path / "second", notify=notify)
    assert first == second
    before, after = load(tmp_path / "first"), load(tmp_path / "second")
    a, b = (ternary_codes(m.module.spec, m.variables) for m in (before, after))
    for name, (codes, scale) in a.items():
        np.testing.assert_array_equal(codes, b[name][0])
        np.testing.assert_array_equal(scale, b[name][1])
    for model in (before, after):  # masters of codes are any with these codes
        for layer in (model.params[f"layers_{i}"] for i in range(2)):
            for part in ("attn", "ffn"):
                for leaf in layer[part].values():
                    leaf.pop("kernel", None)
    assert_same_arrays(before.params, after.params)
    config = [json.loads((tmp_path / d / "config.json").read_text()) for d in DIRS]
    assert config[0] == config[1]
    # Packed as it is read, it computes the same to the bit.
    import_model(tmp_path / "out", tmp_path / "packed", packed=True, notify=notify)
    packed, whole = load(tmp_path / "packed"), load(tmp_path / "first")
    np.testing.assert_array_equal(packed(TOKENS), whole(TOKENS))


DIRS = ("out", "again")


def test_a_bias_that_a_scale_multiplies_is_found_again():
    rng = np.random.default_rng(0)
    bias = rng.normal(size=10_000).astype(np.float32)
    for scale in np.exp(rng.normal(size=50)).astype(np.float32):
        stored = hf._divided(bias, scale)
        assert stored.dtype == np.float32
        read = stored * scale
        np.testing.assert_allclose(read, bias, rtol=1.2e-7)
        np.testing.assert_array_equal(hf._divided(read, scale) * scale, read)


# -- Rotary scaling ---------------------------------------------------------------


CONFIGS: list[tuple[int, float, Theirs]] = [
    (32, 1e4, LINEAR),
    (64, 5e5, {**LLAMA3, "original_max_position_embeddings": 8192}),
    (32, 1e4, {**LLAMA3, "low_freq_factor": 2.0, "high_freq_factor": 8.0}),
    (128, 1e6, {**YARN, "original_max_position_embeddings": 32768}),
    (32, 1e4, {**YARN, "beta_fast": 16, "beta_slow": 2}),
    (32, 1e4, {**YARN, "attention_factor": 0.7}),
    (32, 1e4, {**YARN, "mscale": 1.2, "mscale_all_dim": 0.8}),
    (32, 1e4, {**YARN, "factor": 1.0}),
    (8, 2.0, {**YARN, "original_max_position_embeddings": 7}),
    (4, 10.0, {**YARN, "original_max_position_embeddings": 4}),
]


@pytest.mark.parametrize(("size", "theta", "rope"), CONFIGS)
def test_angles_are_those_of_transformers(size, theta, rope):
    config = transformers.Qwen3Config(
        head_dim=size,
        num_attention_heads=2,
        num_key_value_heads=2,
        hidden_size=64,
        max_position_embeddings=100_000,
        rope_parameters={**rope, "rope_theta": theta},
    )
    theirs = transformers.models.qwen3.modeling_qwen3.Qwen3RotaryEmbedding(config)
    rng = np.random.default_rng(0)
    positions = np.unique([0, 1, 2, 15, *rng.integers(100_001, size=300), 100_000])
    expected = theirs(torch.zeros(1), torch.tensor(positions[None]))
    ours = names.model_from_hf(
        json.loads(config.to_json_string(use_diff=False))
        | {"vocab_size": 8, "hidden_act": "silu", "layer_types": None}
    )[0].architecture
    assert ours.rope_scaling == rope["rope_type"]
    frequency = theirs.inv_freq.numpy()
    # Both round a frequency to float32, which tells more the further one goes.
    slack = 4e-7 * positions[:, None] * frequency[None] + 1e-6
    slack *= max(1.0, theirs.attention_scaling)
    plain = Architecture(head_dim=size, rope_theta=theta).rotary
    moved = 0.0
    for found, wanted, other in zip(
        rotary_angles(100_001, ours.rotary),
        expected,
        rotary_angles(100_001, plain),
        strict=True,
    ):
        assert found.dtype == np.float32
        wanted = wanted[0, :, : size // 2].numpy()
        assert (np.abs(found[positions] - wanted) <= slack).all()
        moved = max(moved, np.abs(found - other).max())
    assert (moved > 0.1) == (rope.get("factor") != 1.0)


def test_scalings_in_both_spellings():
    for rope in (LINEAR, LLAMA3, YARN, {**YARN, "attention_factor": 1.5}):
        base = {"max_position_embeddings": 64}
        five = {**base, "rope_parameters": {**rope, "rope_theta": 77.0}}
        four = {**base, "rope_scaling": rope, "rope_theta": 77.0}
        old = dict(rope)
        old["type"] = old.pop("rope_type")
        oldest = {**base, "rope_scaling": old, "rope_theta": 77.0}
        # Version 5 asks rope_scaling first.
        both = {**four, "rope_parameters": {"rope_type": "default", "rope_theta": 77}}
        expected = rotary.from_config(five, 1e4)
        assert expected["rope_theta"] == 77.0
        assert expected["rope_factor"] == rope["factor"]
        for content in (four, oldest, both):
            assert rotary.from_config(content, 1e4) == expected
        made = Architecture(**expected)
        written = {**base, "rope_theta": 77.0, **rotary.to_config(made)}
        for _ in range(2):
            assert Architecture(**rotary.from_config(written, 1e4)) == made
            written.pop("rope_parameters", None)
    # A context of its own, before it was scaled.
    found = rotary.from_config({"max_position_embeddings": 64, **_scaling(4.0)}, 1e4)
    assert found["rope_original_len"] == 64
    outside = {"original_max_position_embeddings": 8, **_scaling(4.0)}
    assert rotary.from_config(outside, 1e4)["rope_original_len"] == 8
    # DeepSeek: the factor is the ratio of the two.
    ratio = _scaling(None, original_max_position_embeddings=16)
    found = rotary.from_config({"max_position_embeddings": 64, **ratio}, 1e4)
    assert found["rope_factor"] == 4.0


def _scaling(factor, **others):
    return {"rope_scaling": {"type": "yarn", "factor": factor, **others}}


# -- Settings and names -----------------------------------------------------------


FAMILY_BLOCKS: list[dict[str, Any]] = [
    {"family": "bitnet"},
    {"family": "llama", "tie_embeddings": False},
    {"family": "qwen2", "n_kv_heads": 2},
    {"family": "qwen3", "head_dim": 20},
]


@pytest.mark.parametrize("changes", FAMILY_BLOCKS)
def test_every_setting_survives_the_trip(changes):
    scaling = {"rope_scaling": "yarn", "rope_factor": 4.0, "rope_original_len": 99}
    module = SMALL.changed(**changes, **scaling, rope_beta_fast=20.0)
    a = module.architecture
    row = names.family_of(a)
    assert row.model_type == changes["family"]
    content = json.loads(json.dumps(names.hf_config(a, "masters")))
    assert content["architectures"] == [CLASSES[row.model_type][1].__name__]
    found, _, _ = names.model_from_hf(content)
    expected = dataclasses.replace(a, family="", n_kv_heads=a.kv_heads)
    assert found.architecture == expected
    # What is found out so needs no word for the family.
    assert names.family_of(found.architecture) == row
    # And theirs reads it as meant.
    theirs = CLASSES[row.model_type][0](**content)
    assert theirs.head_dim == a.head_size
    assert theirs.rope_parameters["beta_fast"] == 20.0
    assert theirs.rope_parameters["original_max_position_embeddings"] == 99
    # As flags of a run, too.
    config: dict[str, Any] = {"model": {}}
    for flag in as_flags(found).split():
        key, _, value = flag.removeprefix("--config.model.").partition("=")
        kind = type(getattr(Architecture(), key))
        config["model"][key] = value == "True" if kind is bool else kind(value)
    told = from_dict(config).model
    keys: dict[str, Any] = {"vocab_size": a.vocab_size, "init_std": a.init_std}
    assert dataclasses.replace(told, **keys) == found.architecture


def test_a_twin_of_another_family_gets_no_sub_norms():
    for family, told in (("llama", False), ("qwen2", True), ("qwen3", True)):
        flags = as_flags(SMALL.changed(family=family, quantize=False))
        assert ("sub_norms=False" in flags) == told


@pytest.mark.parametrize("family", CLASSES)
def test_what_a_config_leaves_out_is_as_there(family):
    """Defaults of their configuration classes, of this very version."""
    needed = {
        "vocab_size": 8,
        "hidden_size": 256,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 8,
        "max_position_embeddings": 16,
    }
    theirs = CLASSES[family][0](**needed, num_key_value_heads=2)
    found, _, _ = names.model_from_hf({"model_type": family, **needed})
    a = found.architecture
    assert a.norm_eps == theirs.rms_norm_eps
    assert a.rope_theta == theirs.rope_parameters["rope_theta"]
    assert names.ACTIVATIONS[a.activation] == theirs.hidden_act
    assert a.tie_embeddings == theirs.tie_word_embeddings
    assert a.head_size == getattr(theirs, "head_dim", 128)
    narrow = {"hidden_size": 64, "num_attention_heads": 4}
    sizes = [
        names.model_from_hf({"model_type": family, **needed, **narrow})[0],
        CLASSES[family][0](**{**needed, **narrow}),
    ]
    assert sizes[0].architecture.head_size == getattr(sizes[1], "head_dim", 16)


@pytest.mark.parametrize(
    ("family", "changes", "words"),
    [
        ("llama", {"attention_bias": True}, "attention_bias"),
        ("llama", {"mlp_bias": True}, "mlp_bias"),
        ("bitnet", {"attention_bias": True}, "attention_bias"),
        ("qwen3", {"attention_bias": True}, "attention_bias"),
        ("qwen2", {"mlp_bias": True}, "mlp_bias"),
        ("qwen2", {"use_sliding_window": True, "max_window_layers": 1}, "sliding"),
        ("qwen3", {"use_sliding_window": True, "max_window_layers": 0}, "sliding"),
        ("qwen3", {"use_sliding_window": True, "max_window_layers": "a"}, "sliding"),
        ("qwen2", {"layer_types": ["full_attention", "sliding_attention"]}, "types"),
        ("qwen3", {"layer_types": "full_attention"}, "layer_types"),
        ("bitnet", {"head_dim": 32}, "head_dim"),
        ("qwen3", {"head_dim": 7}, "head_dim"),
        ("qwen3", {"head_dim": "8"}, "head_dim"),
        ("llama", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "'dynamic'"),
        ("llama", {"rope_scaling": {"type": "longrope"}}, "'longrope'"),
        ("llama", {"rope_scaling": {"type": ["yarn"]}}, "yarn"),
        ("llama", {"rope_scaling": {"type": "linear"}}, r"rope_scaling\.factor"),
        ("llama", {"rope_scaling": {**LINEAR, "factor": 0.5}}, r"rope_scaling\.factor"),
        ("llama", {"rope_scaling": {**LINEAR, "factor": True}}, r"scaling\.factor"),
        ("llama", {"rope_scaling": {**LLAMA3, "low_freq_factor": None}}, "low_freq"),
        ("llama", {"rope_scaling": {**LLAMA3, "high_freq_factor": 1.0}}, "high_freq"),
        ("qwen3", {"rope_scaling": {**YARN, "truncate": False}}, "truncate"),
        ("qwen3", {"rope_scaling": {**YARN, "short_factor": [1]}}, "short_factor"),
        ("qwen3", {"rope_scaling": {**YARN, "attention_factor": -1}}, "attention_f"),
        ("qwen3", {"rope_scaling": {**YARN, "mscale": "a", "mscale_all_dim": 1}}, "ms"),
        ("qwen3", {"rope_scaling": _scaling(None)["rope_scaling"]}, "original_max"),
        ("qwen3", {"rope_scaling": {**YARN, "beta_fast": 0.5}}, "beta_fast"),
        ("qwen2", {"rope_parameters": {**YARN, "rope_theta": 1.0}}, "rope_theta"),
        (
            "qwen3",
            {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}},
            "full_attention",
        ),
        ("gemma3", {}, "bitnet, llama, qwen2, qwen3 can be imported"),
    ],
)
def test_what_no_row_expresses_is_refused_by_name(family, changes, words):
    row = "llama" if family == "gemma3" else family
    module = SMALL.changed(family=row)
    content = names.hf_config(module.architecture, "full")
    content |= {"model_type": family, **changes}
    with pytest.raises(VaaniError, match=words) as caught:
        names.model_from_hf(content)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


def test_windows_that_see_everything_are_no_refusal():
    content = names.hf_config(SMALL.changed(family="qwen2").architecture, "full")
    for changes in (
        {"sliding_window": 4096},
        {"use_sliding_window": True, "max_window_layers": 2},
        {"use_sliding_window": True, "layer_types": ["full_attention"] * 2},
    ):
        found, _, _ = names.model_from_hf({**content, **changes})
        assert names.family_of(found.architecture).model_type == "qwen2"


@pytest.mark.parametrize(
    ("changes", "target", "words"),
    [
        ({"qk_norm": True}, "hf", r"model\.sub_norms and model\.qk_norm"),
        (
            {"sub_norms": False, "qk_norm": True, "attention_bias": True},
            "hf",
            r"model\.qk_norm and model\.attention_bias",
        ),
        ({"head_dim": 24}, "hf", r"model\.head_dim = 24"),
        ({"head_dim": 24}, "hf-packed", r"model\.head_dim = 24"),
        ({"family": "llama", "dim": 66, "head_dim": 16}, "hf", "multiple of n_heads"),
    ],
)
def test_blocks_that_a_format_lacks_are_refused(changes, target, words):
    with pytest.raises(VaaniError, match=words) as caught:
        FORMATS[target].check(SMALL.changed(**changes), {}, Options())
    assert "\n" not in str(caught.value)


def rename(folder, change):
    weights = load_file(folder / hf.SINGLE)
    save_file({change(n): w for n, w in weights.items()}, folder / hf.SINGLE)


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "module._orig_mod."])
def test_names_of_wrapped_modules_are_stripped(prefix, tmp_path):
    theirs = their_model("qwen3", tmp_path / "theirs", head_dim=16)
    rename(tmp_path / "theirs", lambda name: prefix + name)
    import_model(tmp_path / "theirs", tmp_path / "run", notify=notify)
    found, expected = load(tmp_path / "run")(TOKENS), logits_of(theirs, TOKENS)
    assert np.abs(np.asarray(found) - expected).max() <= 1e-4


def test_a_tensor_that_is_there_twice_is_refused(tmp_path):
    their_model("llama", tmp_path / "theirs")
    path = tmp_path / "theirs" / hf.SINGLE
    weights = load_file(path)
    weights["module.model.norm.weight"] = weights["model.norm.weight"]
    save_file(weights, path)
    with pytest.raises(VaaniError, match=r"'model\.norm\.weight' twice"):
        import_model(tmp_path / "theirs", tmp_path / "run", notify=notify)


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama"])
def test_tensors_that_a_family_needs_are_asked_for(family, tmp_path):
    """And those of another family are said to be too many."""
    their_model(family, tmp_path / "theirs", head_dim=16)
    other = {"qwen2": "llama", "qwen3": "llama", "llama": "qwen2"}[family]
    edit_config(tmp_path / "theirs", model_type=other)
    words = {"qwen2": "bias", "qwen3": "k_norm", "llama": "bias"}[family]
    with pytest.raises(VaaniError, match=words):
        import_model(tmp_path / "theirs", tmp_path / "run", notify=notify)

"""Models in GGUF files: out, in, and against transformers."""

import dataclasses
import importlib.util
import json
import os
import pathlib
import random
from typing import Any

os.environ["TORCHDYNAMO_DISABLE"] = "1"  # eager: compiling would take minutes

import gguf
import jax
import numpy as np
import pytest
import torch
import transformers
from interop import gguf_reference
from interop.gguf_reference import PQ2_0, PTQ1_0, Q2_0, pairs, q2_blocks, trits
from interop.reference import (
    CHARACTERS,
    SMALL,
    make_run,
    notify,
    random_variables,
)
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from vaani_jax.cli import main
from vaani_jax.errors import VaaniError
from vaani_jax.inference.model import load
from vaani_jax.interop import tokenizers as tokenizer_files
from vaani_jax.interop.convert import export_model, import_model
from vaani_jax.interop.formats import gguf as gguf_files
from vaani_jax.interop.formats import gguf_model, opened
from vaani_jax.interop.formats.gguf_file import GGUFFile
from vaani_jax.interop.formats.gguf_model import GGUFModel
from vaani_jax.interop.formats.gguf_rotary import to_factors
from vaani_jax.interop.formats.gguf_types import TYPES
from vaani_jax.interop.formats.source import quantization_of
from vaani_jax.interop.names import tensors
from vaani_jax.model.config import Architecture, Quantization
from vaani_jax.model.names import ternary_codes

WHOLE = slice(None)

# -- Out --------------------------------------------------------------------------

BLOCKY = SMALL.changed(dim=256, n_layers=1, ffn_dim=512, n_kv_heads=2, init_std=0.1)


@pytest.mark.parametrize("embedding", ["float16", "float32"])
@pytest.mark.parametrize("kind", ["tq2_0", "tq1_0", "q8_0", "f16"])
def test_ggufs_own_reader_finds_the_codes(kind, embedding, tmp_path):
    run = make_run(tmp_path / "run", BLOCKY)
    path = tmp_path / "out.gguf"
    result = export_model(
        run, path, target="gguf", gguf_type=kind, embedding=embedding, notify=notify
    )
    if embedding == "float16":
        assert 0 < result.median < result.largest
    else:
        assert result.median <= 1e-6 * result.spread
    model = load(run, notify=notify)
    codes = ternary_codes(model.module.spec, model.variables)
    reader = gguf.GGUFReader(path)
    found = {t.name: t for t in reader.tensors}
    expected = {"token_embd.weight", "output_norm.weight"}
    rows = np.asarray(model.params["embedding"])
    np.testing.assert_array_equal(
        found["token_embd.weight"].data, rows.astype(embedding)
    )
    for ours, theirs in {
        "attn/q_proj": "attn_q",
        "attn/k_proj": "attn_k",
        "attn/v_proj": "attn_v",
        "attn/o_proj": "attn_output",
        "ffn/gate_proj": "ffn_gate",
        "ffn/up_proj": "ffn_up",
        "ffn/down_proj": "ffn_down",
    }.items():
        tensor = found[f"blk.0.{theirs}.weight"]
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        np.testing.assert_array_equal(values.T, codes[f"layers_0/{ours}"][0])
        assert tensor.tensor_type.name == kind.upper()
        # GGUF counts from the fastest axis: inputs first.
        assert tuple(tensor.shape) == codes[f"layers_0/{ours}"][0].shape
        scale = found[f"blk.0.{theirs}.scale"].data
        assert scale.dtype == np.float32
        np.testing.assert_allclose(scale, codes[f"layers_0/{ours}"][1], rtol=3e-7)
        expected |= {f"blk.0.{theirs}.weight", f"blk.0.{theirs}.scale"}
    norms = "attn_norm attn_sub_norm ffn_norm ffn_sub_norm"
    expected |= {f"blk.0.{n}.weight" for n in norms.split()}
    assert set(found) == expected

    def field(key):
        found: Any = reader.get_field(key)
        return found.contents()

    assert field("general.architecture") == "bitnet"
    assert field("bitnet.attention.head_count") == 4
    assert field("bitnet.attention.head_count_kv") == 2
    assert field("bitnet.feed_forward_length") == 512
    assert field("bitnet.rope.dimension_count") == 64
    assert field("bitnet.rope.freq_base") == 500_000.0
    tokens = field("tokenizer.ggml.tokens")
    pieces = [tokenizer_files.unescaped(t).decode() for t in tokens]
    assert "".join(pieces) == CHARACTERS.characters


def test_a_full_precision_model_in_gguf(tmp_path):
    config = BLOCKY.changed(quantize=False)
    run = make_run(tmp_path / "run", config)
    path = tmp_path / "out.gguf"
    export_model(run, path, target="gguf", gguf_type="f16", notify=notify)
    found = {t.name: t for t in gguf.GGUFReader(path).tensors}
    assert not any(name.endswith(".scale") for name in found)
    kernel = load(run).params["layers_0"]["attn"]["q_proj"]["kernel"]
    np.testing.assert_allclose(
        found["blk.0.attn_q.weight"].data.T, kernel, rtol=1e-3, atol=1e-6
    )
    with pytest.raises(VaaniError, match="q8_0"):
        export_model(run, tmp_path / "b", target="gguf", notify=notify)


FAMILIES = {
    "bitnet": SMALL.changed(ffn_dim=128, n_kv_heads=2),
    "llama": SMALL.changed(
        ffn_dim=128, n_kv_heads=2, sub_norms=False, tie_embeddings=False
    ),
    "qwen2": SMALL.changed(ffn_dim=128, sub_norms=False, attention_bias=True),
    "qwen3": SMALL.changed(
        ffn_dim=128,
        n_kv_heads=2,
        head_dim=32,
        sub_norms=False,
        qk_norm=True,
        tie_embeddings=False,
        rope_scaling="yarn",
        rope_factor=4.0,
        rope_original_len=16,
    ),
}


def exported(folder, module, **options):
    """A run of a model, and what it leaves as."""
    run = make_run(folder / "run", module)
    path = folder / "out.gguf"
    export_model(run, path, target="gguf", notify=notify, **options)
    return load(run, notify=notify), path


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["q2_0", "q8_0", "f16"])
def test_codes_scales_and_settings_come_back_exactly(family, kind, tmp_path):
    module = FAMILIES[family]
    before, path = exported(tmp_path, module, gguf_type=kind, embedding="float32")
    said: list[str] = []
    import_model(path, tmp_path / "back", masters=True, notify=said.append)
    assert f"its matrices are {kind.upper()}" in said[0]
    assert "one scale per matrix" in said[0]
    after = load(tmp_path / "back", notify=notify)
    ours = ternary_codes(before.module.spec, before.variables)
    theirs = ternary_codes(after.module.spec, after.variables)
    assert ours.keys() == theirs.keys()
    for name, (codes, scale) in ours.items():
        np.testing.assert_array_equal(codes, theirs[name][0])
        np.testing.assert_array_equal(scale, theirs[name][1])
    expected = dataclasses.replace(
        module.architecture, init_std=0.02, n_kv_heads=module.architecture.kv_heads
    )
    assert after.architecture == expected
    assert after.tokenizer.to_json() == CHARACTERS.to_json()
    ids = np.arange(24)[None]
    np.testing.assert_allclose(after(ids), before(ids), atol=2e-5)
    # Packed, which an import is unless told otherwise, it is the same model.
    import_model(path, tmp_path / "packed", notify=notify)
    packed = load(tmp_path / "packed", notify=notify)
    np.testing.assert_allclose(packed(ids), after(ids), atol=2e-5)


def test_q2_0_holds_scales_in_its_blocks_where_they_are_float16(tmp_path):
    module = FAMILIES["bitnet"]
    variables = random_variables(module)
    names = ["q_proj", "k_proj"]
    attention = variables["params"]["layers_0"]["attn"]
    for name, wanted in zip(names, (0.125, 0.1), strict=True):
        codes = np.random.default_rng(0).integers(
            -1, 2, attention[name]["kernel"].shape
        )
        share = np.count_nonzero(codes) / codes.size
        attention[name]["kernel"] = (codes * (wanted / share)).astype(np.float32)
    run = make_run(tmp_path / "run", module, variables=variables)
    path = tmp_path / "out.gguf"
    export_model(run, path, target="gguf", notify=notify)
    model = load(run, notify=notify)
    expected = ternary_codes(model.module.spec, model.variables)
    file = GGUFFile(path)
    for name in (*names, "v_proj"):
        codes, scale = map(np.asarray, expected[f"layers_0/attn/{name}"])
        label = f"blk.0.attn_{name[0]}"
        entry = file.tensors[f"{label}.weight"]
        assert entry.type.id == 42
        values = gguf_reference.decode_q2(file.rows(entry, WHOLE).tobytes(), 64)
        found = np.reshape(values, entry.shape).T
        exact = np.float32(np.float16(scale)) == scale
        np.testing.assert_array_equal(found, codes * (scale if exact else 1))
        assert (f"{label}.scale" in file.tensors) != exact
        if not exact:
            beside = file.rows(file.tensors[f"{label}.scale"], WHOLE)
            assert beside.view(np.float32)[0, 0] == scale


GROUPED: dict[str, dict[str, Any]] = {
    "q2_0": {"weight_group": 64},
    "f16": {"weight_group": 32, "ternary_embedding": True},
    "q8_0": {"weight_granularity": "channel", "activation_tracking": "token"},
}


@pytest.mark.parametrize(
    ("kind", "family"), [("q2_0", "llama"), ("f16", "qwen3"), ("q8_0", "llama")]
)
def test_models_with_more_scales_come_back_exactly(kind, family, tmp_path):
    changes: dict[str, Any] = {
        "weight_granularity": "group",
        "scale_dtype": "float16",
        "activation_tracking": "group",
        "ternary_head": True,
        **GROUPED[kind],
    }
    module = FAMILIES[family].changed(n_layers=1, **changes)
    before, path = exported(tmp_path, module, gguf_type=kind, embedding="float32")
    import_model(path, tmp_path / "back", masters=True, notify=notify)
    after = load(tmp_path / "back", notify=notify)
    q = dataclasses.replace(module.quantization, weight_scale="stored")
    if kind == "q8_0":
        q = dataclasses.replace(q, scale_dtype="float32")  # those of groups only
    assert after.quantization == q
    ours = ternary_codes(before.module.spec, before.variables)
    theirs = ternary_codes(after.module.spec, after.variables)
    assert ours.keys() == theirs.keys()
    assert ("embedding" in ours) == (kind == "f16")
    for name, (codes, scale) in ours.items():
        np.testing.assert_array_equal(codes, theirs[name][0])
        used = np.asarray(codes).any(axis=0)  # of those of zeros no file says it
        if np.ndim(scale) == 1:
            np.testing.assert_array_equal(scale[used], theirs[name][1][used])
        else:
            np.testing.assert_array_equal(scale, theirs[name][1])
    ids = np.arange(24)[None]
    np.testing.assert_allclose(after(ids), before(ids), atol=2e-5)
    import_model(path, tmp_path / "packed", notify=notify)
    packed = load(tmp_path / "packed", notify=notify)
    np.testing.assert_allclose(packed(ids), after(ids), atol=2e-5)


class Taken:
    """What `gguf.write` takes tensors from: random codes with scales of a shape."""

    def __init__(self, module, group, seed=0, scales=None):
        self.module, self.codes, self.scales = module, {}, {}
        rng = np.random.default_rng(seed)
        variables = random_variables(module)
        self.params = variables["params"]
        for tensor in tensors(module.architecture):
            if tensor.kind == "linear":
                rows, columns = tensor.shape
                self.codes[tensor.path] = rng.integers(-1, 2, tensor.shape).astype(
                    np.int8
                )
                shape = {0: (), 1: (columns,)}.get(
                    group, (rows // max(group, 1), columns)
                )
                scale = rng.uniform(0.01, 1, shape).astype(scales or np.float16)
                self.scales[tensor.path] = scale.astype(np.float32)

    def __call__(self, tensor):
        if tensor.path in self.codes:
            return self.codes[tensor.path], self.scales[tensor.path]
        node = self.params
        for key in tensor.path:
            node = node[key]
        return np.asarray(node), None

    def write(self, path, kind):
        gguf_files.write(path, self.module, kind, CHARACTERS, self, name="x")


WIDE = {
    name: FAMILIES[name].changed(dim=256, ffn_dim=512, n_layers=1, head_dim=0)
    for name in ("llama", "qwen3")
}


@pytest.mark.parametrize("family", WIDE)
@pytest.mark.parametrize(
    ("group", "kinds"),
    [
        (1, ["q2_0", "tq2_0", "tq1_0", "q8_0", "f16"]),  # per output
        (256, ["q2_0", "tq2_0", "tq1_0", "q8_0", "f16"]),
        (128, ["q2_0", "q8_0", "f16"]),
        (64, ["q2_0", "q8_0", "f16"]),
        (32, ["q8_0", "f16"]),
    ],
)
def test_any_granularity_goes_through_a_file_exactly(group, kinds, family, tmp_path):
    taken = Taken(WIDE[family], group)
    for kind in gguf_files.KINDS:
        path = tmp_path / f"{kind}.gguf"
        if kind not in kinds:
            with pytest.raises(VaaniError, match=f"use --type {' or '.join(kinds)}"):
                taken.write(path, kind)
            continue
        taken.write(path, kind)
        found = reading(path)
        assert found.grouping == ("channel" if group == 1 else group)
        assert found.half
        for tensor in tensors(WIDE[family].architecture):
            if tensor.kind == "linear":
                codes, scale = found.codes(tensor)
                np.testing.assert_array_equal(codes, taken.codes[tensor.path])
                np.testing.assert_array_equal(scale, taken.scales[tensor.path])
                values = found.floats(tensor)
                wide = taken.scales[tensor.path]
                if wide.ndim == 2:
                    wide = np.repeat(wide, group, axis=0)
                np.testing.assert_array_equal(values, codes * wide)


class Plain(GGUFModel):
    """A file whose quantization is left unsaid, as not every one can be built."""

    def _quantization(self, architecture):
        return SMALL.quantization


def reading(path):
    return Plain(path)


def test_scales_that_a_file_cannot_hold_are_refused(tmp_path):
    taken = Taken(WIDE["llama"], 128, scales=np.float32)
    with pytest.raises(VaaniError, match="scale_dtype=float16"):
        taken.write(tmp_path / "a.gguf", "q2_0")
    # Beside a head there is no room for one.
    head = next(t for t in tensors(taken.module.architecture) if t.kind == "head")
    with pytest.raises(VaaniError, match=r"output.weight has scales that are no float"):
        gguf_files._coded(
            np.ones((3, 64), np.int8), np.array(0.1, np.float32), TYPES["Q2_0"], head
        )
    huge = Taken(WIDE["llama"], 1)
    for scale in huge.scales.values():
        scale[0] = 1e6  # beyond float16
    with pytest.raises(VaaniError, match="scale_dtype=float16"):
        huge.write(tmp_path / "a.gguf", "q2_0")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"activation": "relu2"}, "llama is hard-wired to SwiGLU"),
        ({"ffn_dim": 96}, "--type q8_0 or f16"),
        ({"ffn_dim": 80}, "--type f16"),
        ({"quantize": False}, "--type f16 or q8_0"),
        ({"sub_norms": True, "tie_embeddings": True, "head_dim": 32}, "heads of dim"),
        ({"sub_norms": True}, "head of its own"),
        (
            {"qk_norm": True, "rope_scaling": "llama3", "rope_original_len": 16},
            "llama.cpp's qwen3 does not know the rotary scaling llama3",
        ),
        ({"sub_norms": True, "qk_norm": True}, "no other tool"),
    ],
)
def test_what_llama_cpp_lacks_is_refused(change, words, tmp_path):
    with pytest.raises(VaaniError, match=words):
        gguf_files.check(FAMILIES["llama"].changed(**change), "q2_0")


# -- In, against transformers -----------------------------------------------------

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
CLASSES = {
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
    "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
    "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
}


def their_model(family, **changes):
    torch.manual_seed(0)
    config, model = CLASSES[family]
    settings: dict[str, Any] = {
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
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100.0},
        **changes,
    }
    made = model(config(**settings)).eval()
    for name, value in made.named_parameters():
        if "norm" in name or name.endswith("bias"):
            torch.nn.init.uniform_(value.data, 0.5, 1.5)
    return made


def as_their_converter(model, family):
    """Keys and tensors of a file, as `convert_hf_to_gguf.py` has them."""
    config = model.config
    heads, kv = config.num_attention_heads, config.num_key_value_heads
    found = {}
    for name, value in model.state_dict().items():
        base, part = name.rsplit(".", 1)
        if base == "lm_head" and config.tie_word_embeddings:
            continue
        before = ""
        if base.startswith("model.layers."):
            number, base = base.removeprefix("model.layers.").split(".", 1)
            before = f"blk.{number}."
        array = value.numpy()
        if family == "llama" and base.endswith(("q_proj", "k_proj")):
            array = pairs(array, heads if base.endswith("q_proj") else kv)
        found[f"{before}{NAMES[base]}.{part}"] = array
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    keys = {
        "vocab_size": config.vocab_size,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "attention.head_count": heads,
        "attention.head_count_kv": kv,
        "attention.key_length": size,
        "attention.value_length": size,
        "feed_forward_length": config.intermediate_size,
        "context_length": config.max_position_embeddings,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.freq_base": config.rope_parameters["rope_theta"],
        "rope.dimension_count": size,
    }
    rope = config.rope_parameters
    if rope["rope_type"] in ("linear", "yarn"):
        keys |= {
            "rope.scaling.type": rope["rope_type"],
            "rope.scaling.factor": rope["factor"],
        }
    if rope["rope_type"] == "yarn":
        original = rope["original_max_position_embeddings"]
        keys["rope.scaling.original_context_length"] = original
        if given := rope.get("attention_factor"):
            share = given / (0.1 * np.log(rope["factor"]) + 1)
            keys["rope.scaling.attn_factor"] = float(share)
    if rope["rope_type"] == "llama3":
        found["rope_freqs.weight"] = factors_of(config, size)
    return keys, found


def factors_of(config, size):
    """What transformers divides frequencies by."""
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    theta = config.rope_parameters["rope_theta"]
    plain = 1.0 / theta ** (torch.arange(0, size, 2, dtype=torch.float64) / size)
    return (plain / scaled.double()).float().numpy()


LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 100.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {}),
        ("llama", {"tie_word_embeddings": True, "num_key_value_heads": 4}),
        ("llama", {"rope_parameters": LLAMA3, "hidden_size": 128}),
        (
            "llama",
            {
                "rope_parameters": {
                    "rope_type": "linear",
                    "rope_theta": 50.0,
                    "factor": 3.0,
                }
            },
        ),
        ("qwen2", {"tie_word_embeddings": True}),
        ("qwen3", {"head_dim": 32}),
        (
            "qwen3",
            {
                "head_dim": 16,
                "rope_parameters": {
                    "rope_type": "yarn",
                    "rope_theta": 100.0,
                    "factor": 4.0,
                    "original_max_position_embeddings": 16,
                },
            },
        ),
        (
            "qwen3",
            {
                "head_dim": 16,
                "rope_parameters": {
                    "rope_type": "yarn",
                    "rope_theta": 100.0,
                    "factor": 4.0,
                    "original_max_position_embeddings": 16,
                    "attention_factor": 1.3,
                },
            },
        ),
    ],
)
def test_a_model_of_theirs_computes_the_same_out_of_a_file(family, changes, tmp_path):
    theirs = their_model(family, **changes)
    keys, found = as_their_converter(theirs, family)
    path = tmp_path / "a.gguf"
    gguf_reference.write(path, family, keys, found, CHARACTERS)
    said: list[str] = []
    module = import_model(path, tmp_path / "run", notify=said.append)
    assert not module.quantization.quantize
    assert "full precision, as its matrices are F32" in said[0]
    ids = np.random.default_rng(0).integers(CHARACTERS.vocab_size, size=(2, 48))
    with torch.no_grad():
        expected = theirs(torch.tensor(ids)).logits.numpy()
    result = load(tmp_path / "run", notify=notify)(ids)
    assert expected.std() > 0.5
    np.testing.assert_allclose(result, expected, atol=1e-3)
    # And out of an export of it in float16, in the order that file has.
    again = tmp_path / "again.gguf"
    export_model(tmp_path / "run", again, target="gguf", gguf_type="f16", notify=notify)
    ours, theirs_ = GGUFFile(again), GGUFFile(path)
    assert ours.tensors.keys() == theirs_.tensors.keys()
    for name, entry in theirs_.tensors.items():
        there = entry.type.floats(entry.type.split(theirs_.rows(entry, WHOLE)))
        kind = ours.tensors[name].type
        here = kind.floats(kind.split(ours.rows(ours.tensors[name], WHOLE)))
        np.testing.assert_allclose(here, there, rtol=1e-3, atol=1e-6, err_msg=name)


@pytest.mark.parametrize(
    "parts",
    [
        (8.0, 1.0, 4.0, 8192),
        (32.0, 1.0, 4.0, 8192),
        (4.0, 2.0, 5.0, 1000),
        (8.0, 0.5, 8.0, 4096),
    ],
)
def test_factors_of_llama_3_are_recognized_and_others_are_not(parts, tmp_path):
    factor, low, high, length = parts
    rope = {
        "rope_type": "llama3",
        "rope_theta": 500_000.0,
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": length,
    }
    changes: Any = {"rope_parameters": rope, "hidden_size": 256}
    theirs = their_model("llama", max_position_embeddings=100_000, **changes)
    keys, found = as_their_converter(theirs, "llama")
    path = tmp_path / "a.gguf"
    gguf_reference.write(path, "llama", keys, found, CHARACTERS)
    a = GGUFModel(path).module.architecture
    assert (a.rope_scaling, a.rope_factor) == ("llama3", factor)
    # Context and bounds may all be multiplied by one number.
    share = a.rope_original_len / length
    assert a.rope_low_freq_factor == pytest.approx(low * share, rel=1e-3)
    assert a.rope_high_freq_factor == pytest.approx(high * share, rel=1e-3)
    given = to_factors(a)
    assert given is not None
    np.testing.assert_allclose(given, found["rope_freqs.weight"], rtol=1e-5)
    found["rope_freqs.weight"][20] *= 1.01
    gguf_reference.write(path, "llama", keys, found, CHARACTERS)
    with pytest.raises(VaaniError, match="Llama 3 gives with no parameters"):
        GGUFModel(path)
    found["rope_freqs.weight"][:] = 1
    gguf_reference.write(path, "llama", keys, found, CHARACTERS)
    assert GGUFModel(path).module.architecture.rope_scaling == "none"


# -- Ternary models ---------------------------------------------------------------


def ternary_file(path, kind, group, family="qwen3", change=None, scales=None):
    """A file with random codes in every matrix, and the codes and scales of each."""
    theirs = their_model(family, hidden_size=256, intermediate_size=512)
    keys, found = as_their_converter(theirs, family)
    rng = np.random.default_rng(0)
    expected = {}
    for name, value in found.items():
        if value.ndim < 2:
            continue
        rows, columns = value.shape
        codes = rng.integers(-1, 2, value.shape).astype(np.int8)
        shape = (rows, columns // group if group else 1)
        size = (rows, 1) if group is None else shape
        scale = rng.uniform(0.01, 1, size).astype(np.float16)
        if group == 0:
            scale[:] = scale[0]
        expected[name] = codes, scale
        block = {"Q2_0": 64, "PQ2_0": 128, "PTQ1_0": 128}.get(kind, 1)
        wide = np.repeat(scale, columns // block // scale.shape[1], axis=1)
        if kind == "PTQ1_0":
            found[name] = trits(codes, wide), PTQ1_0
        elif kind in ("Q2_0", "PQ2_0"):
            data = q2_blocks(codes, wide, block)
            found[name] = data, Q2_0 if kind == "Q2_0" else PQ2_0
        elif kind == "BF16":
            values = codes * wide.astype(np.float32)
            data = gguf.quants.quantize(values, gguf.GGMLQuantizationType.BF16)
            found[name] = data.view(np.uint8), (30, 1, 2)
            rounded = gguf.quants.dequantize(data, gguf.GGMLQuantizationType.BF16)
            expected[name] = codes, np.abs(rounded).reshape(*scale.shape, -1).max(-1)
        else:
            found[name] = codes * wide
    if change:
        change(keys, found)
    gguf_reference.write(path, family, keys, found, CHARACTERS)
    return expected


@pytest.mark.parametrize(
    ("kind", "group"),
    [
        ("Q2_0", 64),
        ("Q2_0", 128),
        ("PQ2_0", 128),
        ("PTQ1_0", 128),
        ("F16", 128),
        ("BF16", 128),
        ("F16", 32),
        ("F16", None),
    ],
)
@pytest.mark.parametrize("family", ["qwen3", "llama"])
def test_ternary_models_by_groups_are_read_as_codes(kind, group, family, tmp_path):
    expected = ternary_file(tmp_path / "a.gguf", kind, group, family)
    found = reading(tmp_path / "a.gguf")
    assert found.storage == "multiply"
    assert found.grouping == (group or "channel")
    checked = 0
    for tensor in tensors(found.module.architecture):
        if tensor.gguf_name not in expected:
            assert not found.is_ternary(tensor)
            continue
        codes, scale = expected[tensor.gguf_name]
        if family == "llama" and {*tensor.path} & {"q_proj", "k_proj"}:
            heads = 4 if "q_proj" in tensor.path else 2
            codes, scale = (halves(x, heads) for x in (codes, scale))
        parts = list(found.ternary(tensor))
        np.testing.assert_array_equal(np.concatenate([p[0] for p in parts]), codes)
        np.testing.assert_array_equal(np.concatenate([p[1] for p in parts]), scale)
        checked += 1
    assert checked == 2 + 2 * 7  # the embedding and the head, too


def halves(array, heads):
    """The inverse of `pairs`."""
    parts = array.reshape(heads, len(array) // heads // 2, 2, *array.shape[1:])
    return parts.swapaxes(1, 2).reshape(array.shape)


def test_ranges_of_rows_are_small(tmp_path, monkeypatch):
    monkeypatch.setattr(gguf_model, "RANGE", 1000)
    expected = ternary_file(tmp_path / "a.gguf", "Q2_0", 128, "llama")
    found = reading(tmp_path / "a.gguf")
    tensor = next(t for t in tensors(found.module.architecture) if "q_proj" in t.path)
    parts = list(found.ternary(tensor))
    assert {len(codes) for codes, _ in parts[:-1]} == {16}  # outputs of a tile
    codes, _ = expected[tensor.gguf_name]
    np.testing.assert_array_equal(
        np.concatenate([p[0] for p in parts]), halves(codes, 4)
    )


def test_what_files_leave_open_is_as_such_models_are_run():
    a = Architecture(dim=128, n_heads=4, ffn_dim=192)
    tensor = quantization_of(a, "tensor", half=True, kinds={"linear"})
    assert tensor == Quantization(weight_scale="stored")
    channel = quantization_of(a, "channel", half=False, kinds={"linear"})
    assert channel == Quantization(
        weight_scale="stored",
        weight_granularity="channel",
        activation_tracking="group",
    )
    kinds = {"linear", "head", "embedding"}
    grouped = quantization_of(
        a, 64, half=True, kinds=kinds, tracking="group", activation_group=64
    )
    assert grouped == Quantization(
        weight_scale="stored",
        weight_granularity="group",
        weight_group=64,
        scale_dtype="float16",
        activation_tracking="group",
        activation_group=64,
        ternary_head=True,
        ternary_embedding=True,
    )
    odd = dataclasses.replace(a, ffn_dim=200)  # no multiple of llama.cpp's groups
    assert quantization_of(odd, 64, half=True, kinds=kinds).activation_pieces == 0


def test_unpacked_weights_make_the_model_that_packed_ones_make(tmp_path):
    for kind in ("F16", "Q2_0"):
        ternary_file(tmp_path / f"{kind}.gguf", kind, 0, "llama", change=plain_ends)
        import_model(tmp_path / f"{kind}.gguf", tmp_path / kind, notify=notify)
    unpacked, packed = (load(tmp_path / k, notify=notify) for k in ("F16", "Q2_0"))
    assert unpacked.module == packed.module
    assert unpacked.quantization.quantize
    for a, b in zip(
        jax.tree.leaves(unpacked.variables),
        jax.tree.leaves(packed.variables),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)
    with pytest.raises(VaaniError, match="leave the flag out"):
        import_model(
            tmp_path / "Q2_0.gguf", tmp_path / "x", weights="full", notify=notify
        )
    import_model(tmp_path / "F16.gguf", tmp_path / "x", weights="full", notify=notify)
    assert not load(tmp_path / "x", notify=notify).quantization.quantize


def plain_ends(keys, found):
    """An embedding and a head that are not ternary."""
    rng = np.random.default_rng(5)
    for name in ("token_embd.weight", "output.weight"):
        shape = (CHARACTERS.vocab_size, keys["embedding_length"])
        found[name] = rng.standard_normal(shape).astype(np.float16)


# -- Refusals ---------------------------------------------------------------------


def set_key(**changes):
    def change(keys, found):
        keys |= {k.replace("__", "."): v for k, v in changes.items()}

    return change


def drop_key(name):
    return lambda keys, found: keys.pop(name)


def set_tensor(name, value):
    return lambda keys, found: found.update({name: value})


ONES = np.ones(1, np.float32)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (set_key(embedding_length=0), "embedding_length"),
        (set_key(embedding_length=128), "ask for"),
        (set_key(embedding_length=-64.0), "whole number"),
        (set_key(block_count=2**31 - 1), "more than there are tensors"),
        (set_key(block_count=3), "no tensor blk.2"),
        (set_key(block_count=1), "layers of llama do not have"),
        (set_key(attention__head_count=3), "ask for|n_kv_heads|head"),
        (set_key(attention__head_count=[4, 4]), "ask for|no tensor|."),
        (set_key(attention__head_count_kv=[2, 1]), "layers their own"),
        (set_key(attention__value_length=8), "heads of both"),
        (set_key(attention__key_length=17, attention__value_length=17), "even"),
        (set_key(rope__dimension_count=8), "part of each head"),
        (set_key(rope__freq_base=-1.0), "freq_base"),
        (set_key(rope__freq_base=float("nan")), "freq_base"),
        (set_key(rope__scaling__type="longrope"), "longrope"),
        (set_key(rope__scaling__type=3), "no text"),
        (set_key(rope__scaling__type="yarn", rope__scaling__factor=-2.0), "factor"),
        (set_key(rope__scaling__attn_factor=1.5), "only yarn"),
        (set_key(rope__scaling__yarn_ext_factor=0.5), "yarn_ext_factor"),
        (set_key(attention__layer_norm_rms_epsilon=0.0), "epsilon"),
        (drop_key("attention.layer_norm_rms_epsilon"), "epsilon"),
        (drop_key("feed_forward_length"), "feed_forward_length"),
        (set_key(expert_count=8), "expert_count"),
        (set_key(attention__sliding_window=512), "sliding_window"),
        (set_key(logit_scale=[1.0, 1.0]), "logit_scale"),
        (set_key(vocab_size=7), "vocab_size"),
        (
            lambda keys, found: keys.update({".prism.hadamard.block_size": 1024}),
            "Hadamard",
        ),
        (lambda keys, found: found.pop("token_embd.weight"), "token_embd"),
        (lambda keys, found: found.pop("output_norm.weight"), "no tensor output_norm"),
        (set_tensor("blk.0.attn_output.bias", ONES), "do not have: 'blk.0.attn_output"),
        (set_tensor("blk.0.attn_q.scale", ONES * 0), "above 0"),
        (set_tensor("blk.0.attn_q.scale", ONES * np.inf), "above 0"),
        (set_tensor("blk.0.attn_q.scale", np.ones(2, np.float32)), r"F32 \[1\]"),
        (set_tensor("output.scale", ONES), "do not have: 'output.scale'"),
        (set_tensor("rope_freqs.weight", np.ones(3, np.float32)), "rope_freqs"),
        (set_tensor("rope_freqs.weight", -np.ones(8, np.float32)), "no factors"),
        (set_tensor("output_norm.weight", np.full(64, np.nan, np.float32)), "finite"),
        (
            set_tensor(
                "output_norm.weight", (np.zeros((1, 68), np.uint8), (8, 32, 34))
            ),
            r"shape",
        ),
    ],
)
def test_what_says_something_else_is_refused(change, words, tmp_path):
    keys, found = as_their_converter(their_model("llama"), "llama")
    change(keys, found)
    path = tmp_path / "a.gguf"
    try:
        gguf_reference.write(path, "llama", keys, found, CHARACTERS)
    except KeyError:  # no embedding to count the rows of
        gguf_reference.write(path, "llama", keys, found)
    if words.endswith("|."):  # one for all layers is as good as one
        assert GGUFModel(path).module.architecture.n_heads == 4
        return
    with pytest.raises(VaaniError, match=words) as caught:
        import_model(path, tmp_path / "run", notify=notify)
    assert len(str(caught.value).splitlines()) == 1
    assert [p.name for p in tmp_path.iterdir()] == ["a.gguf"]


@pytest.mark.parametrize("name", ["gemma3", "bitnet-b1.58", "qwen3moe"])
def test_other_architectures_are_refused_by_name(name, tmp_path):
    keys, found = as_their_converter(their_model("llama"), "llama")
    gguf_reference.write(tmp_path / "a.gguf", name, keys, found, CHARACTERS)
    with pytest.raises(VaaniError, match=name):
        GGUFModel(tmp_path / "a.gguf")


def test_matrices_of_which_some_are_ternary_are_refused(tmp_path):
    def change(keys, found):
        rng = np.random.default_rng(0)
        found["blk.1.ffn_up.weight"] = rng.standard_normal((512, 256), np.float32)

    ternary_file(tmp_path / "a.gguf", "Q2_0", 128, "llama", change=change)
    with pytest.raises(VaaniError, match=r"blk.1.ffn_up.weight is no ternary matrix"):
        GGUFModel(tmp_path / "a.gguf")

    def three(keys, found):
        plain_ends(keys, found)
        data, _ = found["blk.1.ffn_up.weight"]
        data[7, 9] = 0b00001101

    ternary_file(tmp_path / "a.gguf", "Q2_0", 0, "llama", change=three)
    with pytest.raises(
        VaaniError, match=r"blk.1.ffn_up.weight is Q2_0 with the code 3"
    ):
        import_model(tmp_path / "a.gguf", tmp_path / "run", notify=notify)
    assert not (tmp_path / "run").exists()


# -- Damage -----------------------------------------------------------------------


def mutations():
    """How the benchmark of faults damages files."""
    path = pathlib.Path(__file__).parents[2] / "benchmarks" / "mutations.py"
    spec = importlib.util.spec_from_file_location("mutations", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def outcome(path):
    """The variables of a file, or what is wrong with it."""
    try:
        return opened(path).variables()
    except VaaniError as error:
        return error


def test_hundreds_of_damaged_files_give_a_model_or_one_line(tmp_path):
    """benchmarks/faults.py does it thousands of times, with other tokenizers."""
    ternary_file(tmp_path / "a.gguf", "Q2_0", 0, "llama", change=plain_ends)
    keys, found = as_their_converter(their_model("qwen2"), "qwen2")
    gguf_reference.write(tmp_path / "b.gguf", "qwen2", keys, found, CHARACTERS)
    whole = [(tmp_path / name).read_bytes() for name in ("a.gguf", "b.gguf")]
    damage = mutations()
    path = tmp_path / "damaged.gguf"
    refused = read = 0
    for seed in range(400):
        rng = random.Random(seed)
        path.write_bytes(damage.mutated(path.name, rng.choice(whole), rng))
        result = outcome(path)
        if isinstance(result, VaaniError):
            assert len(str(result).splitlines()) == 1
            assert len(str(result)) < 600
            refused += 1
        else:
            assert all(np.isfinite(x).all() for x in jax.tree.leaves(result))
            read += 1
    assert refused > 200
    assert read > 40


# -- The command line -------------------------------------------------------------


def test_the_commands_take_a_file(tmp_path, capsys, monkeypatch):
    run = make_run(tmp_path / "run", FAMILIES["bitnet"])
    path, back = str(tmp_path / "a.gguf"), str(tmp_path / "back")
    out = ["export", "--workdir", str(run), "--format", "gguf", "--output", path]
    assert main([*out, "--embedding=float32"]) == 0
    assert GGUFFile(tmp_path / "a.gguf").tensors["blk.0.attn_q.weight"].type.id == 42
    assert main(["import", "--from", path, "--workdir", back]) == 0
    assert "ternary, as its matrices are Q2_0" in capsys.readouterr().err
    ask = ["generate", "--prompt", "First", "--greedy", "--json", "--max-new-tokens=9"]
    answers = []
    for workdir in (str(run), back):
        assert main([*ask, "--workdir", workdir]) == 0
        answers.append(json.loads(capsys.readouterr().out)["samples"])
    assert answers[0] == answers[1]
    monkeypatch.chdir(tmp_path)
    assert main(["import", "--from", "prism-ml/Bonsai-8B", "--workdir", "x"]) == 1
    told = capsys.readouterr().err
    assert "hf download prism-ml/Bonsai-8B --local-dir Bonsai-8B" in told
    assert main(["import", "--from", "none.gguf", "--workdir", "x"]) == 1
    assert "No such file" in capsys.readouterr().err
    assert main(["import", "--from", "run/nothing/there", "--workdir", "x"]) == 1
    assert "no folder" in capsys.readouterr().err
    (tmp_path / "model.bin").write_bytes(b"PK\x03\x04" + bytes(100))
    with pytest.raises(VaaniError, match="no GGUF file"):
        opened(tmp_path / "model.bin")

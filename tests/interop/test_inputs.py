"""Tokenizers of other tools, and input that is damaged or means harm."""

import dataclasses
import json
import random
import shutil
from typing import Any

import jax
import numpy as np
import pytest
import safetensors.numpy
import transformers
from interop.reference import (
    CHARACTERS,
    SMALL,
    TEXT,
    edit_config,
    make_run,
    notify,
    their_falcon,
    their_llama,
)

from vaani_jax.cli import main
from vaani_jax.data.config import DataConfig
from vaani_jax.data.corpus import make_tokenizer
from vaani_jax.data.sources import Corpus
from vaani_jax.errors import VaaniError
from vaani_jax.inference.model import PACKED_ARRAYS, PACKED_CONFIG, load
from vaani_jax.interop import names
from vaani_jax.interop import tokenizers as tokenizer_files
from vaani_jax.interop.convert import export_model, import_model
from vaani_jax.interop.formats import hf
from vaani_jax.interop.formats import source as source_module
from vaani_jax.model.config import Quantization
from vaani_jax.model.names import ternary_codes
from vaani_jax.model.transformer import init_variables
from vaani_jax.runs.checkpoints import Checkpoints
from vaani_jax.text.special import Special
from vaani_jax.text.tokenizers import (
    ByteTokenizer,
    CharTokenizer,
    HFTokenizer,
    from_json,
)

ODD = "\n\n  a  b\t\r\n\x00é ▁▁€😀\u200d\u0301  <unk> </s> [UNK] 's Ġ\u00a0\x85 end "
BPE_TEXT = ["the cat sat on the mat", "the bat, that the cat saw!", "café über naïve"]


def bpe(eos=True):
    """A small byte-level BPE, as GPT-2's, trained on the spot."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.train_from_iterator(
        BPE_TEXT,
        trainers.BpeTrainer(
            vocab_size=300,
            special_tokens=["<|end|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    special = Special({"eos_token": "<|end|>"} if eos else {})
    return HFTokenizer(made.to_str(), special=special)


# -- Tokenizers -------------------------------------------------------------------


@pytest.mark.parametrize(
    "tokenizer", [CharTokenizer(ODD), ByteTokenizer()], ids=["char", "byte"]
)
@pytest.mark.parametrize("sub_norms", [True, False])
def test_auto_tokenizer_gives_the_same_ids(tokenizer, sub_norms, tmp_path):
    config = SMALL.changed(vocab_size=tokenizer.vocab_size, sub_norms=sub_norms)
    run = make_run(tmp_path / "run", config, tokenizer=tokenizer)
    export_model(run, tmp_path / "out", target="hf", notify=notify)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    for text in (ODD, ODD[::-1], "\n", "  ", " a", "é€😀"):
        ids = tokenizer.encode(text).tolist()
        assert theirs(text)["input_ids"] == ids
        assert theirs.decode(ids) == text
    assert len(theirs) == tokenizer.vocab_size
    if isinstance(tokenizer, CharTokenizer):
        with pytest.raises(Exception, match="UNK"):
            theirs("Z")
    else:
        # Not UTF-8: the same replacement characters.
        ids = [0xE2, 0x82, 0x41, 0xFF, 0xC3]
        assert theirs.decode(ids) == tokenizer.decode(ids)
    back = tokenizer_files.from_folder(tmp_path / "out", tokenizer.vocab_size)
    assert back.to_json() == tokenizer.to_json()


def test_a_tokenizer_of_theirs_is_one_of_ours(tmp_path):
    tokenizer = bpe()
    again = from_json(json.loads(json.dumps(tokenizer.to_json())))
    for text in (*BPE_TEXT, ODD, ""):
        ids = tokenizer.encode(text)
        assert ids.dtype == np.int32
        np.testing.assert_array_equal(again.encode(text), ids)
        assert tokenizer.decode(ids) == text
    assert len(tokenizer.encode(BPE_TEXT[0])) < len(BPE_TEXT[0])
    with pytest.raises(VaaniError):
        tokenizer.encode("\ud800")
    with pytest.raises(VaaniError):
        tokenizer.decode([tokenizer.vocab_size])
    file = tmp_path / "tokenizer.json"
    file.write_text(tokenizer.serialized, encoding="utf-8")
    config = DataConfig(tokenizer_file=str(file))
    made = make_tokenizer(config, Corpus.of("the", "a test"))
    np.testing.assert_array_equal(made.encode(ODD), tokenizer.encode(ODD))


def test_a_prompt_gets_the_opening_token_a_text_does_not():
    from tokenizers import Tokenizer, processors

    made = Tokenizer.from_str(bpe().serialized)
    made.post_processor = processors.TemplateProcessing(
        single="<|end|> $A", special_tokens=[("<|end|>", 0)]
    )
    tokenizer = HFTokenizer(made.to_str())
    plain = tokenizer.encode("the cat").tolist()
    assert tokenizer.encode_prompt("the cat").tolist() == [0, *plain]


@pytest.mark.parametrize("text", ["", "{}", "[]", "null", '{"model": 3}', "\x00"])
def test_a_damaged_tokenizer_is_an_error(text):
    with pytest.raises(VaaniError) as caught:
        HFTokenizer(text)
    assert "\n" not in str(caught.value)


def test_a_bpe_goes_into_gguf():
    tokenizer = bpe()
    found = tokenizer_files.to_gguf(tokenizer, tokenizer.vocab_size + 2)
    assert (found.model, found.pre) == ("gpt2", "gpt-2")
    assert found.special == {"eos_token_id": 0}
    assert found.types[0] == 3
    assert found.types[-2:] == [5, 5]
    assert len(set(found.tokens)) == tokenizer.vocab_size + 2
    vocabulary = json.loads(tokenizer.serialized)["model"]["vocab"]
    assert all(found.tokens[i] == t for t, i in vocabulary.items())
    assert found.merges
    assert all(m.count(" ") == 1 for m in found.merges)
    with pytest.raises(VaaniError, match="eos_token"):
        tokenizer_files.to_gguf(bpe(eos=False), 300)
    content = json.loads(tokenizer.serialized)
    content["pre_tokenizer"]["add_prefix_space"] = True
    other = HFTokenizer(json.dumps(content), special=tokenizer.special)
    with pytest.raises(VaaniError, match="no name"):
        tokenizer_files.to_gguf(other, 300)


def chat(folder):
    """A folder as people publish it: a run's, with files beside its tokenizer."""
    config = SMALL.changed(vocab_size=320, dim=256, ffn_dim=256)
    run = make_run(folder / "run", config, tokenizer=bpe(eos=False))
    export_model(run, folder / "model", target="hf", notify=notify)
    files = {
        "special_tokens_map": {"eos_token": {"content": "<|end|>"}},
        "generation_config": {"eos_token_id": [0, 5], "temperature": 0.6},
    }
    for name, content in files.items():
        (folder / "model" / f"{name}.json").write_text(json.dumps(content))
    (folder / "model" / "chat_template.jinja").write_text("{{ messages }}")
    return folder / "model"


def test_what_belongs_to_a_tokenizer_comes_back_out_of_an_export(tmp_path):
    import_model(chat(tmp_path), tmp_path / "first", notify=notify)
    export_model(tmp_path / "first", tmp_path / "out", target="hf", notify=notify)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert theirs.eos_token == "<|end|>"
    assert theirs.chat_template == "{{ messages }}"
    said = transformers.GenerationConfig.from_pretrained(tmp_path / "out")
    assert said.eos_token_id == [0, 5]
    assert said.temperature == 0.6
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["eos_token_id"] == [0, 5]
    import_model(tmp_path / "out", tmp_path / "second", notify=notify)
    tokenizers = [load(tmp_path / name).tokenizer for name in ("first", "second")]
    assert tokenizers[0].eos_ids == (0, 5)
    assert tokenizers[0].to_json() == tokenizers[1].to_json()


def write_templates(folder):
    for place in ("chat_templates", "additional_chat_templates"):
        (folder / place).mkdir()
        (folder / place / f"{place}.jinja").write_text(place)


def test_further_tokens_and_templates_with_names_come_back_out_too(tmp_path):
    folder = chat(tmp_path)
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    more = {"content": "<|tool|>", "special": True}
    settings |= {
        "added_tokens_decoder": {"290": more},
        "additional_special_tokens": ["<|tool|>"],
        "sep_token": "<|end|>",
    }
    path.write_text(json.dumps(settings))
    write_templates(folder)
    import_model(folder, tmp_path / "first", notify=notify)
    tokenizer = load(tmp_path / "first").tokenizer
    assert isinstance(tokenizer, HFTokenizer)
    assert tokenizer.encode("the<|tool|>").tolist()[-1] == 290
    export_model(tmp_path / "first", tmp_path / "out", target="hf", notify=notify)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    templates = {"default": "{{ messages }}"}
    templates |= {n: n for n in ("chat_templates", "additional_chat_templates")}
    assert theirs.chat_template == templates == tokenizer.special.templates
    assert theirs.extra_special_tokens == ["<|tool|>"]
    assert theirs.sep_token == "<|end|>"
    assert theirs("the<|tool|>")["input_ids"][-1] == 290
    assert theirs.decode([290], skip_special_tokens=True) == ""
    import_model(tmp_path / "out", tmp_path / "second", notify=notify)
    assert load(tmp_path / "second").tokenizer.to_json() == tokenizer.to_json()


def test_gguf_carries_what_it_has_room_for_and_says_what_it_has_not(tmp_path):
    import gguf

    import_model(chat(tmp_path), tmp_path / "imported", notify=notify)
    said: list[str] = []
    path = tmp_path / "model.gguf"
    export_model(
        tmp_path / "imported",
        path,
        target="gguf",
        gguf_type="tq2_0",
        notify=said.append,
    )
    reader = gguf.GGUFReader(path)

    def field(key):
        found = reader.get_field(f"tokenizer.{key}")
        assert found is not None
        return found.contents()

    assert field("ggml.eos_token_id") == 0
    assert field("ggml.eot_token_id") == 5
    assert field("chat_template") == "{{ messages }}"
    (note,) = said
    assert "temperature" in note
    assert "template" not in note


def test_gguf_carries_templates_with_names(tmp_path):
    import gguf

    folder = chat(tmp_path)
    write_templates(folder)
    (folder / "chat_templates" / "odd name.jinja").write_text("odd")
    import_model(folder, tmp_path / "imported", notify=notify)
    said: list[str] = []
    path = tmp_path / "model.gguf"
    export_model(
        tmp_path / "imported",
        path,
        target="gguf",
        gguf_type="f16",
        notify=said.append,
    )
    fields = gguf.GGUFReader(path).fields
    named = {key: one.contents() for key, one in fields.items() if "chat_temp" in key}
    names = ["chat_templates", "additional_chat_templates"]
    assert named == {
        "tokenizer.chat_template": "{{ messages }}",
        "tokenizer.chat_templates": names,
        **{f"tokenizer.chat_template.{name}": name for name in names},
    }
    assert "the chat templates 'odd name'" in said[0]


@pytest.mark.parametrize(
    "tokenizer", [CHARACTERS, ByteTokenizer()], ids=["char", "byte"]
)
def test_batches_of_characters_can_be_padded(tokenizer, tmp_path):
    config = SMALL.changed(vocab_size=tokenizer.vocab_size)
    run = make_run(tmp_path / "run", config, tokenizer=tokenizer)
    said: list[str] = []
    export_model(run, tmp_path / "out", target="hf", notify=said.append)
    assert "pads batches" in said[0]
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    padding = tokenizer_files.padding_of(tokenizer)
    texts = ["First", f"a{padding} b", "The café —"]
    batch = theirs(texts, padding=True)
    assert len({len(ids) for ids in batch["input_ids"]}) == 1
    for text, ids, mask in zip(
        texts, batch["input_ids"], batch["attention_mask"], strict=True
    ):
        kept = [i for i, seen in zip(ids, mask, strict=True) if seen]
        assert kept == tokenizer.encode(text).tolist()
        assert theirs.decode(kept) == text


def test_a_llama_of_1bitllm_is_a_bitnet(tmp_path):
    """weight_bits for a quantization_config, and other names for the sub-norms."""
    module = SMALL.changed(max_seq_len=32)
    run = make_run(tmp_path / "run", module)
    export_model(run, tmp_path / "model", target="hf", notify=notify)
    folder = tmp_path / "model"
    plain = load(run)
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    config |= {"model_type": "llama", "weight_bits": 1, "input_bits": 8}
    (folder / "config.json").write_text(json.dumps(config))

    def rename(weights):
        for name in [n for n in weights if "sub_norm" in n]:
            other = name.replace("attn_sub_norm", "inner_attn_ln")
            other = other.replace("ffn_sub_norm", "ffn_layernorm")
            weights[other] = weights.pop(name)

    edit_tensors(folder, rename)
    said: list[str] = []
    import_model(folder, tmp_path / "back", notify=said.append)
    assert any("ternary masters, as weight_bits is 1" in line for line in said)
    back, tokens = load(tmp_path / "back"), np.arange(12)[None]
    np.testing.assert_array_equal(back(tokens), plain(tokens))
    edit_config(folder, weight_bits=16)
    with pytest.raises(VaaniError, match=r"--weights ternary: .* weight_bits is 16"):
        import_model(folder, tmp_path / "a", weights="ternary", notify=notify)
    import_model(folder, tmp_path / "b", weights="full", notify=notify)
    assert not load(tmp_path / "b").quantization.quantize
    edit_config(folder, weight_bits=1)
    for wrong in ({"input_bits": 4}, {"input_bits": 8, "weight_bits": 4}):
        edit_config(folder, **wrong)
        with pytest.raises(VaaniError, match=list(wrong)[-1]):
            import_model(folder, tmp_path / "other", notify=notify)


def test_an_import_says_what_it_takes_the_weights_for(tmp_path):
    their_llama(tmp_path / "theirs")
    said: list[str] = []
    import_model(tmp_path / "theirs", tmp_path / "full", notify=said.append)
    assert any("full precision, as config.json names neither" in s for s in said)
    assert not load(tmp_path / "full").quantization.quantize
    ternary: Any = {"weights": "ternary", "notify": notify}
    import_model(tmp_path / "theirs", tmp_path / "ternary", **ternary)
    assert load(tmp_path / "ternary").quantization.quantize
    # Masters have many magnitudes: what has one is no master.
    edit_tensors(
        tmp_path / "theirs",
        lambda w: w.update({Q: np.sign(w[Q]).astype(np.float32)}),
    )
    with pytest.raises(VaaniError, match="three values"):
        import_model(tmp_path / "theirs", tmp_path / "other", **ternary)
    their_falcon(tmp_path / "packed")
    with pytest.raises(VaaniError, match="--weights full"):
        import_model(
            tmp_path / "packed", tmp_path / "other", weights="full", notify=notify
        )


# -- The command line -------------------------------------------------------------


def test_the_commands_work_on_an_import(tmp_path, capsys):
    run = make_run(tmp_path / "run", SMALL)
    out, back = str(tmp_path / "out"), str(tmp_path / "back")
    export = ["export", "--workdir", str(run), "--output", out, "--format", "hf-packed"]
    assert main(export) == 0
    told = capsys.readouterr()
    assert told.out.strip() == out
    assert "read back and compared over 64 tokens" in told.err
    assert main(export) == 1
    assert "already" in capsys.readouterr().err
    assert main(["import", "--from", out, "--workdir", back]) == 0
    told = capsys.readouterr()
    assert f"--config.init_from={back}" in told.err
    ask = ["generate", "--prompt", "First", "--greedy", "--json", "--max-new-tokens=9"]
    answers = []
    for workdir in (str(run), back):
        assert main([*ask, "--workdir", workdir]) == 0
        answers.append(json.loads(capsys.readouterr().out)["samples"])
    assert answers[0] == answers[1]
    assert main(["evaluate", "--workdir", back]) == 1
    assert "--data FILE" in capsys.readouterr().err
    text = tmp_path / "text.txt"
    text.write_text(TEXT, encoding="utf-8")
    losses = []
    for workdir in (str(run), back):
        assert main(["evaluate", "--workdir", workdir, "--json", f"--data={text}"]) == 0
        losses.append(json.loads(capsys.readouterr().out)["loss"])
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)
    text.write_text("short", encoding="utf-8")
    assert main(["evaluate", "--workdir", back, f"--data={text}"]) == 1
    assert "longer text" in capsys.readouterr().err


def test_codes_are_packed_without_masters(tmp_path, monkeypatch, capsys):
    """And full precision is refused, with nothing left behind."""
    run = make_run(tmp_path / "run", SMALL)
    export_model(run, tmp_path / "source", target="hf-packed", notify=notify)
    monkeypatch.setattr(source_module, "masters_of", None)
    command = ["import", "--packed", "--from"]
    target = ["--workdir", str(tmp_path / "packed")]
    assert main([*command, str(tmp_path / "source"), *target]) == 0
    their_llama(tmp_path / "theirs")
    capsys.readouterr()
    target = ["--workdir", str(tmp_path / "none")]
    assert main([*command, str(tmp_path / "theirs"), *target]) == 1
    assert "full precision" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("kind", ["hf", "hf-packed", "falcon"])
def test_an_import_can_be_packed(kind, tmp_path, capsys):
    source, back, small = (str(tmp_path / n) for n in ("source", "back", "small"))
    if kind == "falcon":
        their_falcon(tmp_path / "source")
    else:
        run = make_run(tmp_path / "run", SMALL)
        export_model(run, source, target=kind, notify=notify)
    assert main(["import", "--from", source, "--workdir", back, "--masters"]) == 0
    assert main(["pack", "--workdir", back, "--output", small]) == 0
    assert "next:" in capsys.readouterr().out
    # The scales are those that were imported, to the bit.
    codes = load(back, notify=notify)
    packed = load(small, notify=notify)
    assert packed.packed
    for name, (_, scale) in ternary_codes(codes.module.spec, codes.variables).items():
        node = packed.params
        for key in name.split("/"):
            node = node[key]
        np.testing.assert_array_equal(node["kernel"].scale, scale)
    # Straight to packed, which codes are without being asked, it is the same folder.
    straight = str(tmp_path / "straight")
    flags = ["--packed"] if kind == "hf" else []
    assert main(["import", "--from", source, "--workdir", straight, *flags]) == 0
    assert "init_from" in capsys.readouterr().err
    for name in (PACKED_ARRAYS, PACKED_CONFIG):
        ours = (tmp_path / "straight" / name).read_bytes()
        assert ours == (tmp_path / "small" / name).read_bytes()
    ask = ["generate", "--prompt", "First", "--greedy", "--json", "--max-new-tokens=40"]
    answers = []
    for workdir in (back, small):
        assert main([*ask, "--workdir", workdir]) == 0
        answers.append(json.loads(capsys.readouterr().out)["samples"])
    assert answers[0] == answers[1]
    text = tmp_path / "text.txt"
    text.write_text(TEXT, encoding="utf-8")
    losses = []
    for workdir in (back, small):
        assert main(["evaluate", "--workdir", workdir, "--json", f"--data={text}"]) == 0
        losses.append(json.loads(capsys.readouterr().out)["loss"])
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)


def test_an_import_is_not_trained_in_place(tmp_path):
    from vaani_jax.train.config import Config
    from vaani_jax.train.loop import train

    run = make_run(tmp_path / "run", SMALL)
    export_model(run, tmp_path / "out", target="hf", notify=notify)
    import_model(tmp_path / "out", tmp_path / "back", notify=notify)
    text = tmp_path / "text.txt"
    text.write_text(TEXT, encoding="utf-8")
    config = Config(model=SMALL.architecture, data=DataConfig(path=str(text)))
    with pytest.raises(VaaniError, match="init_from"):
        train(config, tmp_path / "back")
    stored = Quantization(weight_scale="stored")
    with pytest.raises(VaaniError, match="stored"):
        train(dataclasses.replace(config, quantization=stored), tmp_path / "new")


def test_a_long_context_is_shortened_and_said(tmp_path):
    their_llama(tmp_path / "theirs", max_position_embeddings=20_000)
    lines: list[str] = []
    module = import_model(tmp_path / "theirs", tmp_path / "a", notify=lines.append)
    assert module.architecture.max_seq_len == 4096
    assert any("4096 of the 20000" in line for line in lines)
    module = import_model(tmp_path / "theirs", tmp_path / "b", max_seq_len=32)
    assert module.architecture.max_seq_len == 32
    with pytest.raises(VaaniError, match="20000 positions"):
        import_model(tmp_path / "theirs", tmp_path / "c", max_seq_len=30_000)


# -- Damage -----------------------------------------------------------------------

TINY = SMALL.changed(dim=16, n_heads=2, n_layers=1, ffn_dim=16)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Folders to damage: one packed, one with masters in two files."""
    folder = tmp_path_factory.mktemp("folders")
    run = make_run(folder / "run", TINY)
    export_model(run, folder / "packed", target="hf-packed", notify=notify)
    export_model(run, folder / "sharded", target="hf", shard_bytes=5000, notify=notify)
    return folder


@pytest.fixture
def damaged(folders, tmp_path):
    def copy(name):
        shutil.copytree(folders / name, tmp_path / "in")
        return tmp_path / "in"

    return copy


def assert_refused(folder, match):
    before = sorted(folder.parent.iterdir())
    with pytest.raises(VaaniError, match=match) as caught:
        import_model(folder, folder.parent / "run", notify=notify)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400
    assert sorted(folder.parent.iterdir()) == before


def test_truncated_weights(damaged):
    folder = damaged("packed")
    path = folder / hf.SINGLE
    path.write_bytes(path.read_bytes()[:-50])
    assert_refused(folder, "damaged")


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("model_type", "gpt2", "bitnet, llama, qwen2, qwen3 can be imported"),
        ("model_type", None, "model_type"),
        ("hidden_size", 10**12, "whole number"),
        ("hidden_size", 2**30, "head_dim"),
        ("hidden_size", "16", "whole number"),
        ("hidden_size", 24, "config asks for|must be hidden_size"),
        ("num_hidden_layers", 2**31 - 1, "more than there are tensors"),
        ("num_hidden_layers", 2, "no tensor"),
        ("num_attention_heads", 0, "whole number"),
        ("num_attention_heads", True, "whole number"),
        ("num_key_value_heads", 1, "config asks for"),
        ("vocab_size", 7, "config asks for|ids"),
        ("rms_norm_eps", float("nan"), "rms_norm_eps"),
        ("rms_norm_eps", 10**400, "rms_norm_eps"),
        ("initializer_range", float("inf"), "initializer_range"),
        ("hidden_act", "gelu", "silu or relu2"),
        ("hidden_act", ["silu"], "silu or relu2"),
        ("tie_word_embeddings", False, "no tensor lm_head"),
        ("tie_word_embeddings", 1, "true or false"),
        ("attention_bias", True, "biases"),
        ("head_dim", 3, "head_dim"),
        ("rope_parameters", {"rope_type": "llama3", "factor": 8}, "low_freq_factor"),
        ("rope_parameters", {"rope_type": "dynamic", "factor": 8}, "rotary scaling"),
        ("rope_parameters", {"rope_theta": -1.0}, "rope_theta"),
        ("rope_scaling", "yarn", "rope_scaling"),
        ("rope_scaling", {"factor": 4.0}, r"rope_scaling\.factor"),
        ("rope_parameters", {"full_attention": {"rope_theta": 1e4}}, "full_attention"),
        ("rope_parameters", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ("rotary_pct", 0.25, "rotary_pct"),
        ("quantization_config", {"quant_method": "gptq"}, "quant_method"),
        ("quantization_config", "bitnet", "quantization_config"),
        (
            "quantization_config",
            {"quant_method": "bitnet", "use_rms_norm": True},
            "use_rms_norm",
        ),
        (
            "quantization_config",
            {"quant_method": "bitnet", "modules_to_not_convert": ["mlp.down_proj"]},
            "full precision",
        ),
    ],
)
def test_configs_that_say_something_else(key, value, words, damaged):
    folder = damaged("packed")
    if key == "rope_parameters" or key == "rope_scaling":
        edit_config(folder, rope_theta=10_000.0)
    edit_config(folder, **{key: value})
    assert_refused(folder, words)


def edit_tensors(folder, change):
    from safetensors.numpy import load_file, save_file

    weights = load_file(folder / hf.SINGLE)
    change(weights)
    save_file(weights, folder / hf.SINGLE)


Q = "model.layers.0.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda w: w.pop(Q), "no tensor"),
        (lambda w: w.pop(f"{Q}_scale"), "no tensor"),
        (lambda w: w.update({Q: w[Q][:2]}), "config asks for"),
        (lambda w: w.update({Q: w[Q].astype(np.float32)}), "U8"),
        (lambda w: w.update({Q: w[Q] | 3}), "none of -1, 0 and 1"),
        (lambda w: w.update({f"{Q}_scale": w[f"{Q}_scale"] * 0}), "above 0"),
        (lambda w: w.update({f"{Q}_scale": w[f"{Q}_scale"] * np.nan}), "finite"),
        (lambda w: w.update({"model.norm.weight": np.zeros(16, int)}), "I64"),
        (lambda w: w["model.norm.weight"].fill(np.inf), "not finite"),
        (lambda w: w.update({"extra": w[Q]}), "'extra'"),
    ],
)
def test_tensors_that_do_not_fit(change, words, damaged):
    folder = damaged("packed")
    edit_tensors(folder, change)
    assert_refused(folder, words)


@pytest.mark.parametrize(
    "place",
    ["../x.safetensors", "/etc/passwd", "a/b.safetensors", "..", "", 3, "C:\\x"],
)
def test_an_index_that_leads_elsewhere(place, damaged):
    folder = damaged("sharded")
    (folder.parent / "x.safetensors").write_bytes(b"secret")
    index = json.loads((folder / hf.INDEX).read_text())
    index["weight_map"]["model.norm.weight"] = place
    (folder / hf.INDEX).write_text(json.dumps(index))
    assert_refused(folder, "in the same folder")


def test_an_index_that_names_what_is_not_there(damaged):
    folder = damaged("sharded")
    index = json.loads((folder / hf.INDEX).read_text())
    file = index["weight_map"]["model.norm.weight"]
    index["weight_map"]["model.norm.weight"] = "model-9.safetensors"
    (folder / hf.INDEX).write_text(json.dumps(index))
    assert_refused(folder, "missing")
    index["weight_map"]["model.norm.weight"] = file
    index["weight_map"]["other"] = file
    (folder / hf.INDEX).write_text(json.dumps(index))
    assert_refused(folder, "does not hold")


def test_folders_without_what_it_takes(damaged, tmp_path):
    assert_refused(tmp_path / "nothing", "no folder")
    folder = damaged("packed")
    (folder / hf.SINGLE).rename(folder / "pytorch_model.bin")
    assert_refused(folder, "save_pretrained")
    (folder / "pytorch_model.bin").rename(folder / hf.SINGLE)
    (folder / "tokenizer.json").unlink()
    assert_refused(folder, "no tokenizer.json")
    (folder / "config.json").write_text("[" * 100_000)
    assert_refused(folder, "not JSON")
    (folder / "config.json").write_text("[]")
    assert_refused(folder, "JSON object")
    (folder / "config.json").unlink()
    assert_refused(folder, "no config.json")


def mutate(rng, content):
    """A file with a few bytes changed, cut, doubled or moved, or a number blown up."""
    content = bytearray(content)
    for _ in range(rng.choice([1, 1, 1, 3, 10])):
        at = rng.randrange(len(content)) if content else 0
        if rng.random() < 0.5:  # headers are where it hurts
            at = min(at, rng.randrange(400))
        kind = rng.randrange(6)
        if kind == 0 and content:
            content[at : at + 1] = bytes([rng.randrange(256)])
        elif kind == 1:
            del content[at:]
        elif kind == 2:
            del content[at : at + rng.randrange(1, 40)]
        elif kind == 3:
            content[at:at] = content[at : at + rng.randrange(1, 40)]
        elif kind == 4:
            content[at:at] = rng.choice(
                [b"9" * 12, b"-", b"null", b"NaN", b"[", b"{", b'"', b"1e999", b"\xff"]
            )
        elif content:
            content[at] ^= 1 << rng.randrange(8)
    return bytes(content)


def outcome(folder, workdir):
    """What an import comes to: a model, or its error."""
    try:
        return import_model(folder, workdir, masters=True, notify=notify)
    except VaaniError as error:
        return error


def test_a_thousand_mutated_files_give_a_model_or_one_line(folders, tmp_path):
    rng = random.Random(0)
    target, workdir = tmp_path / "in", tmp_path / "run"
    imported = refused = 0
    for name in ("packed", "sharded"):
        files = sorted(p for p in (folders / name).iterdir())
        for _ in range(500):
            shutil.copytree(folders / name, target)
            file = target / rng.choice(files).name
            file.write_bytes(mutate(rng, file.read_bytes()))
            found = outcome(target, workdir)
            shutil.rmtree(target)
            if isinstance(found, VaaniError):
                assert "\n" not in str(found)
                assert len(str(found)) < 500
                assert not list(tmp_path.iterdir())  # nothing was written
                refused += 1
                continue
            # What was imported loads, with the shapes that its config says.
            model = load(workdir, notify=notify)
            shutil.rmtree(workdir)
            assert model.module == found
            expected = jax.eval_shape(
                lambda c=found: init_variables(c, jax.random.key(0))
            )
            variables = model.variables
            shapes = jax.tree.map(lambda x: x.shape, variables)
            assert shapes == jax.tree.map(lambda x: x.shape, expected)
            assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(variables))
            imported += 1
    assert refused > 300
    assert imported > 50


def test_a_full_disk_leaves_no_import(folders, tmp_path, monkeypatch):
    def fail(self) -> None:
        raise ValueError("RESOURCE_EXHAUSTED: no space\nand more lines")

    monkeypatch.setattr(Checkpoints, "wait", fail)
    with pytest.raises(VaaniError, match="no space; nothing was kept") as caught:
        import_model(folders / "sharded", tmp_path / "run", notify=notify)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_no_export(folders, tmp_path, monkeypatch):
    def fail(*arguments, **options) -> None:
        raise safetensors.SafetensorError("No space left on device")

    run = tmp_path / "run"
    import_model(folders / "sharded", run, notify=notify)
    monkeypatch.setattr(safetensors.numpy, "save_file", fail)
    with pytest.raises(VaaniError, match="No space left"):
        export_model(run, tmp_path / "out", target="hf", notify=notify)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_every_parameter_has_its_name():
    for config in (
        SMALL,
        SMALL.changed(tie_embeddings=False),
        SMALL.changed(family="qwen2", n_kv_heads=1),
        SMALL.changed(family="qwen3", head_dim=24, n_kv_heads=2),
        SMALL.changed(qk_norm=True, attention_bias=True, head_dim=8),
    ):
        variables = jax.eval_shape(
            lambda c=config: init_variables(c, jax.random.key(0))
        )
        leaves = jax.tree_util.tree_flatten_with_path(variables["params"])[0]
        shapes = {tuple(k.key for k in path): leaf.shape for path, leaf in leaves}
        assert {t.path: t.shape for t in names.tensors(config.architecture)} == shapes


def test_settings_survive_the_trip():
    config = SMALL.changed(n_kv_heads=2, rope_theta=1e4, norm_eps=1e-6)
    for storage in ("masters", "multiply", "divide", "full"):
        found, kept, _ = names.model_from_hf(
            names.hf_config(config.architecture, storage)
        )
        assert kept == storage
        stored = storage in ("multiply", "divide")
        assert found == config.changed(
            quantize=storage != "full",
            weight_scale="stored" if stored else "absmean",
        )


def test_the_context_of_an_import_decides_nothing_else(tmp_path):
    run = make_run(tmp_path / "run", TINY, tokenizer=CHARACTERS)
    export_model(run, tmp_path / "out", target="hf", notify=notify)
    import_model(tmp_path / "out", tmp_path / "back", max_seq_len=8, notify=notify)
    assert load(tmp_path / "back", notify=notify).architecture.max_seq_len == 8

"""Special tokens: wherever files keep them, they mean the same."""

import json

import numpy as np
import pytest

from vaani_jax.data.config import DataConfig
from vaani_jax.data.corpus import make_tokenizer
from vaani_jax.errors import VaaniError
from vaani_jax.text.special import Special, read_special
from vaani_jax.text.tokenizers import (
    ByteTokenizer,
    CharTokenizer,
    HFTokenizer,
    continuation,
    from_json,
)

library = pytest.importorskip("tokenizers")
WORDS = ["the", "cat", "sat"]


def words(template="$A"):
    """A word-level tokenizer: <s>, </s>, <pad>, then the words, in this order."""
    from tokenizers import decoders, models, pre_tokenizers, processors

    vocabulary = ["<s>", "</s>", "<pad>", *(f"▁{word}" for word in WORDS)]
    made = library.Tokenizer(
        models.WordLevel({name: i for i, name in enumerate(vocabulary)}, "<pad>")
    )
    made.add_special_tokens(vocabulary[:3])
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    made.decoder = decoders.Metaspace(prepend_scheme="always")
    made.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    return made.to_str()


def folder_of(folder, **files):
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        path = folder / f"{name}.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


def test_each_file_has_its_part(tmp_path):
    folder = folder_of(
        tmp_path / "model",
        tokenizer=words(),
        tokenizer_config={"eos_token": {"content": "</s>"}, "chat_template": "{{m}}"},
        special_tokens_map={"eos_token": "<pad>", "bos_token": "<s>"},
        generation_config={"eos_token_id": [2, 1, 77], "temperature": 0.6},
        config={"model_type": "llama", "eos_token_id": 5, "pad_token_id": 2},
    )
    found = read_special(folder)
    assert found.names == {"eos_token": "</s>", "bos_token": "<s>"}
    assert found.ids == {"eos_token": (2, 1, 77), "pad_token": (2,)}
    assert found.chat_template == "{{m}}"
    assert found.generation["temperature"] == 0.6
    (folder / "chat_template.jinja").write_text("{{newer}}")
    assert read_special(folder).chat_template == "{{newer}}"
    # The same reader serves a config of training. An id that there isn't ends nothing.
    config = DataConfig(tokenizer_file=str(folder / "tokenizer.json"))
    tokenizer = make_tokenizer(config, None)
    assert isinstance(tokenizer, HFTokenizer)
    assert tokenizer.eos_ids == (1, 2)
    assert tokenizer.id_of("bos_token") == 0
    assert tokenizer.special.names["pad_token"] == "<pad>"  # known by its id alone
    again = from_json(json.loads(json.dumps(tokenizer.to_json())))
    assert again.to_json() == tokenizer.to_json()
    assert again.eos_ids == (1, 2)


@pytest.mark.parametrize(
    ("files", "eos"),
    [
        ({}, ()),
        ({"special_tokens_map": {"eos_token": "</s>"}}, (1,)),
        ({"config": {"model_type": "x", "eos_token_id": [0, 1]}}, (0, 1)),
        ({"config": {"eos_token_id": 1}}, ()),  # of something that is no model
        ({"config": "// no JSON"}, ()),
        ({"generation_config": {"eos_token_id": -1}}, ()),
        ({"tokenizer_config": {"eos_token": None, "add_eos_token": True}}, ()),
        ({"tokenizer_config": {"eos_token": "<none>"}}, ()),
    ],
)
def test_where_a_text_ends(tmp_path, files, eos):
    folder = folder_of(tmp_path / "model", **files)
    assert HFTokenizer(words(), special=read_special(folder)).eos_ids == eos


@pytest.mark.parametrize("name", ["tokenizer_config", "generation_config"])
@pytest.mark.parametrize("content", ["{", "[1]"])
def test_a_damaged_file_is_an_error_of_one_line(tmp_path, name, content):
    folder = folder_of(tmp_path / "model", **{name: content})
    with pytest.raises(VaaniError, match=name) as caught:
        read_special(folder)
    assert "\n" not in str(caught.value)


def test_the_names_alone_as_older_runs_kept_them():
    old = {
        "type": "huggingface",
        "tokenizer": words(),
        "special": {"eos_token": "</s>"},
    }
    assert from_json(old).eos_ids == (1,)
    assert Special.from_json({"eos_token": "</s>"}) == Special({"eos_token": "</s>"})
    assert Special.from_json(None) == Special()


@pytest.mark.parametrize(
    ("template", "opening"), [("$A", []), ("<s> $A </s>", [0]), ("$A </s>", [])]
)
def test_a_prompt_is_opened_and_not_closed(template, opening):
    tokenizer = HFTokenizer(words(template))
    assert tokenizer.encode("the cat").tolist() == [3, 4]
    assert tokenizer.encode_prompt("the cat").tolist() == [*opening, 3, 4]
    # A token that the text itself ends with is of the text.
    assert tokenizer.encode_prompt("the</s>").tolist() == [*opening, 3, 1]
    assert tokenizer.encode_prompt("").tolist() == opening


def test_a_continuation_keeps_the_space_of_its_first_token():
    tokenizer = HFTokenizer(words())
    prompt, new = tokenizer.encode("the"), [4, 5]
    assert tokenizer.decode(new) == "cat sat"  # a text that begins here
    assert continuation(tokenizer, prompt, new) == " cat sat"
    assert continuation(tokenizer, [], new) == "cat sat"
    assert continuation(tokenizer, prompt, []) == ""
    whole = tokenizer.decode([*prompt, *new])
    assert "the" + continuation(tokenizer, prompt, new) == whole


def test_a_character_that_lies_on_both_sides_is_whole():
    tokenizer, text = ByteTokenizer(), "भाषा"
    ids = tokenizer.encode(text)
    for cut in range(1, len(ids)):
        before = ids[:cut].astype(np.uint8).tobytes().decode("utf-8", errors="ignore")
        assert before + continuation(tokenizer, ids[:cut], ids[cut:]) == text


def test_ids_without_a_token():
    padded = HFTokenizer(words(), vocab_size=9)
    assert padded.has_token().tolist() == 6 * [True] + 3 * [False]
    for tokenizer in (ByteTokenizer(), CharTokenizer("ab")):
        assert tokenizer.has_token().all()
        assert tokenizer.eos_ids == ()

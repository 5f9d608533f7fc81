"""Special tokens: wherever files keep them, they mean the same."""

import json

import numpy as np
import pytest

from vaani_jax.data.config import DataConfig
from vaani_jax.data.corpus import make_tokenizer
from vaani_jax.errors import VaaniError
from vaani_jax.text.special import Added, Special, read_added, read_special
from vaani_jax.text.tokenizers import (
    ByteTokenizer,
    CharTokenizer,
    HFTokenizer,
    Spelling,
    continuation,
    from_json,
    read_huggingface,
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
    with pytest.raises(TypeError):
        Special.from_json({"chat_template": 3})


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


# -- Tokens and templates that lie beside tokenizer.json ----------------------------


TOOL = {"content": "<tool>", "special": False, "normalized": False, "lstrip": True}
EXTRA = {"content": "<|end|>", "special": True}


def read(folder):
    text = (folder / "tokenizer.json").read_text()
    return read_huggingface(text, folder)


def test_tokens_that_tokenizer_json_lacks_come_along(tmp_path):
    """With the ids and the flags that transformers gives them."""
    transformers = pytest.importorskip("transformers")
    listed = {"0": {"content": "<s>", "special": True}, "6": EXTRA, "7": TOOL}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "added_tokens_decoder": listed,
        "eos_token": "<|end|>",
    }
    folder = folder_of(tmp_path / "model", tokenizer=words(), tokenizer_config=config)
    tokenizer = read(folder)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    assert tokenizer.vocab_size == len(theirs) == 8
    assert tokenizer.eos_ids == (6,)
    for text in ("the cat<|end|>", "the <tool>cat", "sat  <tool> the", "<s>the"):
        ids = tokenizer.encode(text).tolist()
        assert ids == theirs(text, add_special_tokens=False)["input_ids"]
        assert {6, 7} & set(ids) or "<s>" in text
    assert [tokenizer.is_special(i) for i in (0, 3, 6, 7, 99)] == [
        *(True, False, True, False, False)
    ]
    again = from_json(json.loads(json.dumps(tokenizer.to_json())))
    assert again.encode("the <tool>cat").tolist() == [3, 7, 4]
    # A model that has no row for one has no use for it.
    text = (folder / "tokenizer.json").read_text()
    narrow = read_huggingface(text, folder, vocab_size=7)
    assert narrow.id_of_token("<tool>") is None
    assert narrow.eos_ids == (6,)


def test_added_tokens_json_is_read_where_there_is_no_list(tmp_path):
    files = {
        "added_tokens": {"<|end|>": 6, "<tool>": 7},
        "special_tokens_map": {"additional_special_tokens": ["<|end|>"]},
    }
    folder = folder_of(tmp_path / "model", tokenizer=words(), **files)
    tokenizer = read(folder)
    assert tokenizer.encode("the<|end|>").tolist() == [3, 6]
    assert tokenizer.is_special(6)
    assert not tokenizer.is_special(7)
    folder_of(folder, tokenizer_config={"added_tokens_decoder": {}})
    assert read_added(folder) == {}


def test_a_tokenizer_that_has_them_all_is_left_as_it_is(tmp_path):
    listed = {"1": {"content": "</s>", "special": True, "rstrip": True}}
    folder = folder_of(
        tmp_path / "model",
        tokenizer=words(),
        tokenizer_config={"added_tokens_decoder": listed},
    )
    assert read_added(folder) == {
        1: Added("</s>", special=True, rstrip=True, normalized=False)
    }
    assert read(folder).serialized == words()


@pytest.mark.parametrize(
    ("listed", "message"),
    [
        ({"9": EXTRA}, "the id 9, and with its tokenizer.json it has 6"),
        ({"9" * 30: EXTRA}, "which is no id"),
        ({"-1": EXTRA}, "which is no id"),
        ({"x": EXTRA}, "which is no id"),
        ({"6": {"content": ""}}, "which is no token"),
        ({"6": {"content": 3}}, "which is no token"),
        ({"6": None}, "which is no token"),
        ([EXTRA], "must hold tokens by id"),
    ],
)
def test_added_tokens_that_make_no_sense(tmp_path, listed, message):
    folder = folder_of(
        tmp_path / "model",
        tokenizer=words(),
        tokenizer_config={"added_tokens_decoder": listed},
    )
    with pytest.raises(VaaniError) as caught:
        read(folder)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_further_special_tokens_and_those_with_parts_of_their_own(tmp_path):
    folder = folder_of(
        tmp_path / "model",
        tokenizer_config={
            "additional_special_tokens": ["<a>", {"content": "<b>"}, None],
            "sep_token": "<sep>",
        },
        special_tokens_map={"extra_special_tokens": ["<c>", "<a>"]},
    )
    found = read_special(folder)
    assert found.further == ("<c>", "<a>", "<b>")
    assert found.names == {"sep_token": "<sep>"}
    written = found.by_part
    assert written["additional_special_tokens"] == ["<c>", "<a>", "<b>"]
    assert Special.from_json(json.loads(json.dumps(found.to_json()))) == found
    own = {"image_token": "<i>", "chat_template": "<t>", "x_token": 3}
    folder_of(folder, tokenizer_config={"extra_special_tokens": own})
    assert read_special(folder).names == {"image_token": "<i>"}


def test_chat_templates_wherever_they_are(tmp_path):
    def templates(configured):
        folder_of(tmp_path, tokenizer_config={"chat_template": configured})
        return read_special(tmp_path)

    assert templates(None).chat_template is None
    assert templates("").chat_template is None
    assert templates("{{m}}").chat_template == "{{m}}"
    assert templates("{{m}}").templates == {"default": "{{m}}"}
    several = [{"name": "default", "template": "a"}, {"name": "rag", "template": "b"}]
    assert templates(several).chat_template == several
    assert templates({"default": "a", "rag": "b"}).chat_template == several
    assert templates(several[1:]).templates == {"rag": "b"}
    for place in ("chat_templates", "additional_chat_templates"):
        (tmp_path / place).mkdir()
        (tmp_path / place / f"{place[:4]}.jinja").write_text(place)
    (tmp_path / "chat_templates" / "README.md").write_text("no template")
    files = {"chat": "chat_templates", "addi": "additional_chat_templates"}
    assert templates("a").templates == {"default": "a", **files}
    (tmp_path / "chat_template.jinja").write_text("newer")
    assert templates(several).templates == {"default": "newer", "rag": "b", **files}
    again = Special.from_json(json.loads(json.dumps(templates(several).to_json())))
    assert again.templates == templates(several).templates
    for wrong in (
        3,
        [3],
        [{"name": "a"}],
        [{"name": ["a"], "template": "b"}],
        {"a": 1},
    ):
        with pytest.raises(
            VaaniError, match="chat_template must be a text, or several"
        ):
            templates(wrong)


# -- Text that comes a few ids at a time --------------------------------------------


@pytest.mark.parametrize("text", ["भाषा é 😀", "plain", "\ufffd"])
@pytest.mark.parametrize("step", [1, 2, 5])
def test_spelling_gives_whole_characters(text, step):
    tokenizer = ByteTokenizer()
    ids, spelling, parts = tokenizer.encode(text), Spelling(tokenizer, [65]), []
    for i in range(0, len(ids), step):
        parts.append(spelling.add(ids[i : i + step]))
        assert text.startswith("".join(parts))
    parts.append(spelling.end())
    assert "".join(parts) == spelling.text == text


def test_spelling_ends_with_what_is_no_character():
    spelling = Spelling(ByteTokenizer())
    assert spelling.add(list("aé".encode()[:-1])) == "a"
    assert spelling.end() == "\ufffd"


def test_spelling_goes_on_as_the_whole_text_does():
    """Behind a prompt of any length, of which only the end is looked at."""
    tokenizer = HFTokenizer(words())
    rng = np.random.default_rng(0)
    for length in (0, 1, 63, 64, 65, 200):
        before, new = rng.integers(3, 6, length), rng.integers(3, 6, 20)
        spelling = Spelling(tokenizer, before)
        found = "".join(spelling.add([i]) for i in new) + spelling.end()
        assert found == continuation(tokenizer, before, new)

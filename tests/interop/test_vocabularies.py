"""Tokenizers out of GGUF files: the ids of what went in, or of llama.cpp's rules."""

import json
from typing import Any

import numpy as np
import pytest
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    pre_tokenizers,
    processors,
    trainers,
)

from vaani_jax.errors import VaaniError
from vaani_jax.interop.tokenizers import PRE_TOKENIZERS, to_gguf
from vaani_jax.interop.vocabularies import SPACE, WORDS, from_gguf
from vaani_jax.text.special import Special
from vaani_jax.text.tokenizers import ByteTokenizer, CharTokenizer, HFTokenizer

WORDS_OF = "the cat sat on the mat, that hat; it's 12 345 6789 naïve café über €5 "
TRAINING = [
    WORDS_OF * 3,
    "We'll go:\n\n  def f(x):\n\treturn x  # 日本語 テスト\n" * 3,
    "Привет, мир! 👩‍💻 \u0301 e\u0301 ½ ²\r\n" * 3,
]
TEXTS = [
    "",
    " ",
    "\n",
    "\n\n  \n",
    "a",
    " a",
    "the cat sat",
    "  the   cat\t\tsat  ",
    "it's we'll THEY'RE I'm",
    "12345 6 789,012.34",
    "日本語のテスト",
    "👩‍💻👍🏽 e\u0301\u0301",
    "\x00\x01\x7f\u200b\ufeff\u2028",
    "Привет, мир! ½²",
    "a<|end|>b <|end|>\n<|start|>user\nhi<|end|>",
    "<think>\nso</think> it<tool_call>is",
    "x" * 40 + " " * 40 + "\r\n\r\n",
    "▁under▁score ▁▁",
    "<s> </s> <unk> <0x41>",
    *TRAINING,
]
LLAMA, QWEN = PRE_TOKENIZERS


def byte_level(expression="", *, whole=False, opening=""):
    """A byte-level BPE, trained on the spot, with special and plain added tokens."""
    made = Tokenizer(models.BPE(ignore_merges=whole))
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not expression)
    made.pre_tokenizer = level
    if expression:
        cut = pre_tokenizers.Split(Regex(expression), "isolated")
        made.pre_tokenizer = pre_tokenizers.Sequence([cut, level])
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(TRAINING, trainer)
    made.add_special_tokens(["<|end|>", "<|start|>", "<|pad|>"])
    made.add_tokens(
        [
            AddedToken(t, normalized=False)
            for t in ("<think>", "</think>", "<tool_call>")
        ]
    )
    if opening:
        made.post_processor = processors.TemplateProcessing(
            single=f"{opening} $A",
            special_tokens=[(opening, made.token_to_id(opening))],
        )
    names = {"eos_token": "<|end|>", "pad_token": "<|pad|>"}
    if opening:
        names["bos_token"] = opening
    template: Any = "{% for m in messages %}{{ m.content }}{% endfor %}"
    return HFTokenizer(made.to_str(), special=Special(names, {}, template))


def metadata_of(tokenizer, rows):
    """What a file of ours holds for a tokenizer."""
    found = to_gguf(tokenizer, rows)
    ids = {"pad_token_id": "padding_token_id", "unk_token_id": "unknown_token_id"}
    metadata: dict[str, Any] = {
        "model": found.model,
        "pre": found.pre,
        "tokens": found.tokens,
        "token_type": np.array(found.types, np.int32),
        "add_bos_token": found.add_bos,
        **{ids.get(key, key): value for key, value in found.special.items()},
    }
    if found.merges is not None:
        metadata["merges"] = found.merges
    metadata = {f"tokenizer.ggml.{key}": value for key, value in metadata.items()}
    if found.chat_template:
        metadata["tokenizer.chat_template"] = found.chat_template
    return metadata


@pytest.mark.parametrize(
    ("expression", "whole"), [("", False), (QWEN, False), (LLAMA, True)]
)
@pytest.mark.parametrize("opening", ["", "<|start|>"])
@pytest.mark.parametrize("padding", [0, 7])
def test_a_byte_level_bpe_comes_back_with_the_same_ids(
    expression, whole, opening, padding
):
    before = byte_level(expression, whole=whole, opening=opening)
    rows = before.vocab_size + padding
    after = from_gguf(metadata_of(before, rows), rows)
    assert isinstance(after, HFTokenizer)
    assert after.vocab_size == rows
    rng = np.random.default_rng(0)
    letters = sorted(set("".join(TRAINING)))
    texts = [*TEXTS, *("".join(rng.choice(letters, 60)) for _ in range(60))]
    for text in texts:
        ids = before.encode(text)
        np.testing.assert_array_equal(after.encode(text), ids)
        np.testing.assert_array_equal(
            after.encode_prompt(text), before.encode_prompt(text)
        )
        assert after.decode(ids) == before.decode(ids)
    assert after.eos_ids == before.eos_ids
    assert after.special.names == before.special.names
    assert after.special.chat_template == before.special.chat_template
    np.testing.assert_array_equal(
        after.has_token(), np.arange(rows) < before.vocab_size
    )
    # And goes out again as it came.
    assert metadata_of(after, rows).keys() == metadata_of(before, rows).keys()
    for key, value in metadata_of(after, rows).items():
        np.testing.assert_array_equal(value, metadata_of(before, rows)[key])


def test_the_test_would_see_another_expression_or_merge():
    before = byte_level(LLAMA)
    metadata = metadata_of(before, before.vocab_size)
    qwen = {**metadata, "tokenizer.ggml.pre": "qwen2"}
    other = from_gguf(qwen, 500)
    assert any(len(other.encode(t)) != len(before.encode(t)) for t in TEXTS)
    qwen["tokenizer.ggml.merges"] = metadata["tokenizer.ggml.merges"][::-1]
    third = from_gguf(qwen, 500)
    assert any(third.encode(t).tolist() != other.encode(t).tolist() for t in TEXTS)


def test_names_that_llama_cpp_gives_more_than_an_expression():
    before = byte_level(LLAMA, opening="<|start|>")
    new = before.vocab_size
    metadata = metadata_of(before, new + 1)
    del metadata["tokenizer.ggml.add_bos_token"]
    start = before.id_of("bos_token")
    opened = from_gguf(metadata, new + 1)
    assert opened.encode_prompt("a")[0] == start
    # A word that is a token is one, whatever the merges say.
    metadata["tokenizer.ggml.tokens"][new] = "Ġzyzzyva"
    metadata["tokenizer.ggml.token_type"][new] = 1
    assert from_gguf(metadata, 500).encode(" zyzzyva").tolist() == [new]
    metadata["tokenizer.ggml.pre"] = "qwen2"
    plain = from_gguf(metadata, 500)
    assert len(plain.encode(" zyzzyva")) > 1
    assert plain.encode_prompt("a")[0] != start
    assert {WORDS[name].expression for name in ("gpt-2", "llama-bpe", "qwen2")} == {
        "",
        LLAMA,
        QWEN,
    }


def test_all_ids_that_end_a_text_and_all_templates_come_along():
    before = byte_level()
    metadata = metadata_of(before, before.vocab_size)
    ends = {"eos": 5, "eot": 9, "eom": 2**32 - 1}
    metadata |= {f"tokenizer.ggml.{k}_token_id": v for k, v in ends.items()}
    metadata["tokenizer.chat_template.tools"] = "{{ tools }}"
    after = from_gguf(metadata, before.vocab_size)
    assert isinstance(after, HFTokenizer)
    assert set(after.eos_ids) == {5, 9}
    assert after.special.chat_template == [
        {"name": "default", "template": before.special.chat_template},
        {"name": "tools", "template": "{{ tools }}"},
    ]


# -- sentencepiece ----------------------------------------------------------------


def pieces_and_scores():
    """A vocabulary as Llama 2's: special tokens, bytes, characters, and merges."""
    special = ["<unk>", "<s>", "</s>"]
    bytes_ = [f"<0x{i:02X}>" for i in range(256)]
    merged = [
        *("▁t", "he", "▁the", "at", "▁c", "▁cat", "in", "er", "▁th", "▁▁", "▁▁▁▁"),
        *("th", "the", "▁s", "▁sat", "aa", "aaa", "aaaa", "en", "hen", "▁when", "wh"),
        *("whe", "▁w", "日本", "日本語"),
    ]
    letters = sorted(set("▁theacinrswhnoudlfgmby,.'0123456789日本語é€"))
    tokens = special + bytes_ + merged + letters
    scores = [0.0] * 259 + [-float(i) for i in range(len(merged) + len(letters))]
    kinds = [2, 3, 3] + [6] * 256 + [1] * (len(merged) + len(letters))
    return tokens, scores, kinds


def by_scores(text, tokens, scores):
    """llama.cpp's rule: the two neighbors whose token scores highest merge first."""
    ids = {token: i for i, token in enumerate(tokens)}
    parts = list(text)
    while True:
        found = [
            (scores[ids[parts[i] + parts[i + 1]]], -i)
            for i in range(len(parts) - 1)
            if parts[i] + parts[i + 1] in ids
        ]
        if not found:
            break
        at = -max(found)[1]
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    result = []
    for part in parts:
        if part in ids:
            result.append(ids[part])
        else:
            result += [ids[f"<0x{b:02X}>"] for b in part.encode()]
    return result


def sentencepiece(**changes):
    tokens, scores, kinds = pieces_and_scores()
    metadata: dict[str, Any] = {
        "model": "llama",
        "pre": "default",
        "tokens": tokens,
        "scores": np.array(scores, np.float32),
        "token_type": np.array(kinds, np.int32),
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
        "add_bos_token": True,
        **changes,
    }
    return {f"tokenizer.ggml.{k}": v for k, v in metadata.items() if v is not None}


@pytest.mark.parametrize("prefix", [None, True, False])
def test_scores_become_merges_that_give_the_same_ids(prefix):
    tokens, scores, _ = pieces_and_scores()
    found = from_gguf(sentencepiece(add_space_prefix=prefix), len(tokens))
    rng = np.random.default_rng(0)
    letters = list("  theacinrswhno,日本語é€aaaa\n\u0301😀")
    texts = [
        "the cat sat when",
        "    the",
        "a",
        "日本語",
        "aaaaaaa",
        "\n\té😀",
        "whenthe",
    ]
    texts += ["".join(rng.choice(letters, 25)) for _ in range(200)]
    for text in texts:
        spelled = text if prefix is False else " " + text
        expected = by_scores(spelled.replace(" ", SPACE), tokens, scores)
        ids = found.encode(text).tolist()
        assert ids == expected, text
        assert found.decode(ids) == text
        assert found.encode_prompt(text).tolist() == [1, *ids]
    assert found.eos_ids == (2,)
    # A special token is one, and what follows begins a text of its own.
    ids = found.encode("the</s>the").tolist()
    the = found.encode("the").tolist()
    assert ids == [*the, 2, *the]


def test_user_defined_tokens_of_sentencepiece_are_not_cut():
    tokens, scores, kinds = pieces_and_scores()
    tokens += ["<|user|>", "  "]
    scores += [0.0, 0.0]
    kinds += [4, 4]
    changes: Any = {"tokens": tokens, "scores": np.array(scores, np.float32)}
    changes["token_type"] = np.array(kinds, np.int32)
    found = from_gguf(sentencepiece(**changes, add_space_prefix=False), len(tokens))
    where = len(tokens) - 2
    assert found.encode("a<|user|>a")[1] == where
    assert found.decode([where]) == "<|user|>"


# -- Ours, and refusals -----------------------------------------------------------


@pytest.mark.parametrize(
    "tokenizer",
    [CharTokenizer("abc \\x \n\x00é€😀~"), CharTokenizer("a"), ByteTokenizer()],
    ids=["char", "one", "byte"],
)
@pytest.mark.parametrize("padding", [0, 5])
def test_characters_and_bytes_come_back_as_such(tokenizer, padding):
    rows = tokenizer.vocab_size + padding
    found = from_gguf(metadata_of(tokenizer, rows), rows)
    assert found.to_json() == tokenizer.to_json()


def gpt2(**changes):
    tokenizer = byte_level()
    metadata = metadata_of(tokenizer, tokenizer.vocab_size)
    new = {f"tokenizer.ggml.{k}": v for k, v in changes.items()}
    return {k: v for k, v in {**metadata, **new}.items() if v is not None}


def rwkv(**changes):
    metadata = metadata_of(CharTokenizer("abc"), 3)
    return metadata | {f"tokenizer.ggml.{k}": v for k, v in changes.items()}


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        ({}, "holds no tokenizer"),
        (gpt2(model="bert"), "'bert': gpt2 and llama can be imported"),
        (gpt2(model="t5"), "'t5'"),
        (gpt2(model=3), "must be a str"),
        (gpt2(pre="deepseek-v3"), "pre is 'deepseek-v3'"),
        (gpt2(pre=None), "pre is None"),
        (gpt2(tokens=[]), "texts of the tokens"),
        (gpt2(tokens=None), "texts of the tokens"),
        (gpt2(tokens=np.zeros(3)), "must be a list"),
        (gpt2(tokens=["a"] * byte_level().vocab_size), "twice"),
        (gpt2(tokens=["a"] * 1000), "1000 tokens"),
        (gpt2(token_type=np.ones(3)), "every token"),
        (gpt2(token_type=["a"]), "every token"),
        (gpt2(merges=None), "merges is missing"),
        (gpt2(merges=["ab"]), "merges holds 'ab'"),
        (gpt2(merges=[" "]), "merges holds"),
        (gpt2(merges=["zq qz"]), "tokenizer"),
        (gpt2(eos_token_id="a"), "must be a int"),
        (gpt2(add_bos_token=1), "must be a bool"),
        (sentencepiece(scores=None), "scores"),
        (sentencepiece(scores=np.full(259, np.nan)), "every token"),
        (sentencepiece(remove_extra_whitespaces=True), "rewrites texts"),
        (sentencepiece(precompiled_charsmap=np.ones(9, np.uint8)), "rewrites texts"),
        (rwkv(tokens=["a", "c", "b"]), "none of characters or bytes"),
        (rwkv(tokens=["ab", "c", "d"]), "none of characters or bytes"),
        (rwkv(tokens=["\\xzz", "c", "d"]), "none of characters or bytes"),
        (gpt2() | {"tokenizer.chat_template": 3}, "must be a text"),
    ],
)
def test_what_is_no_tokenizer_here_is_refused_by_name(metadata, words):
    with pytest.raises(VaaniError, match=words) as caught:
        from_gguf(metadata, 500)
    assert len(str(caught.value).splitlines()) == 1
    assert len(str(caught.value)) < 400


def test_scores_that_are_not_finite_are_refused():
    tokens, _, _ = pieces_and_scores()
    scores = np.full(len(tokens), np.inf, np.float32)
    with pytest.raises(VaaniError, match="not finite"):
        from_gguf(sentencepiece(scores=scores), len(tokens))


def test_what_comes_out_is_plain_json():
    """Nothing of a file is run: a chat template is kept as the text it is."""
    harm = "{{ ''.__class__.__mro__ }}"
    metadata = gpt2() | {"tokenizer.chat_template": harm}
    found = from_gguf(metadata, 500)
    assert isinstance(found, HFTokenizer)
    assert found.special.chat_template == harm
    assert json.loads(found.serialized)["model"]["type"] == "BPE"

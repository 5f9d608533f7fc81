"""Text goes in and comes out; what can't is refused by name."""

import json

import numpy as np
import pytest

from vaani_jax.errors import VaaniError
from vaani_jax.text.tokenizers import ByteTokenizer, CharTokenizer, Tokenizer, from_json

TEXTS = {
    "ascii": "To be, or not to be:\n\tthat is the question.\r\n",
    "accents": "Fußgänger à l'œuvre: naïve façade",
    "combining": "e\u0301 is not \u00e9; a\u0323\u0302",
    "emoji": "a👩‍👩‍👧b🇮🇳c🏳️‍🌈\U0010ffff",
    "hindi": "वाणी का अर्थ है भाषा",
    "controls": "\x00\x01\x7f\x85\u2028\ufeff\ufffd",
}
texts = pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)


@texts
@pytest.mark.parametrize("kind", ["char", "byte"])
def test_round_trip(kind, text):
    tokenizer = CharTokenizer.from_text(text) if kind == "char" else ByteTokenizer()
    ids = tokenizer.encode(text)
    assert isinstance(tokenizer, Tokenizer)
    assert ids.dtype == np.int32
    assert ids.ndim == 1
    assert ids.min() >= 0
    assert ids.max() < tokenizer.vocab_size
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode(ids.tolist()) == text


@texts
def test_characters_are_numbered_by_code_point(text):
    alphabet = sorted(set(text), key=ord)
    tokenizer = CharTokenizer.from_text(text)
    assert tokenizer.vocab_size == len(alphabet)
    assert tokenizer.characters == "".join(alphabet)
    assert tokenizer.encode(text).tolist() == [alphabet.index(c) for c in text]


@texts
def test_bytes_are_those_of_utf8(text):
    assert ByteTokenizer().encode(text).tolist() == list(text.encode("utf-8"))


@pytest.mark.parametrize("tokenizer", [CharTokenizer("ab"), ByteTokenizer()])
def test_empty_text(tokenizer):
    ids = tokenizer.encode("")
    assert ids.shape == (0,)
    assert ids.dtype == np.int32
    assert tokenizer.decode([]) == ""


def test_order_of_the_text_does_not_matter():
    one, other = CharTokenizer.from_text("zebra"), CharTokenizer.from_text("barze" * 3)
    assert one.encode("zebra").tolist() == other.encode("zebra").tolist()


@pytest.mark.parametrize(
    ("text", "character", "number", "position"),
    [
        ("abcab!", "!", "U+0021", 5),  # below the vocabulary
        ("abé", "é", "U+00E9", 2),  # above it
        ("axb~", "x", "U+0078", 1),  # within it; the first one is named
        ("ab👩c", "👩", "U+1F469", 2),  # positions count characters, not UTF-16
        ("\tab", "\\t", "U+0009", 0),  # named in a way that can be seen
    ],
)
def test_unknown_character_is_named(text, character, number, position):
    tokenizer = CharTokenizer("abcz")
    with pytest.raises(VaaniError) as caught:
        tokenizer.encode(text)
    message = str(caught.value)
    assert f"'{character}'" in message
    assert number in message
    assert f"position {position})" in message
    assert "4 characters" in message
    assert "\n" not in message


@pytest.mark.parametrize("tokenizer", [CharTokenizer("abcz"), ByteTokenizer()])
@pytest.mark.parametrize("wrong", [-1, "vocab_size", 2**31])
def test_decode_refuses_ids_out_of_range(tokenizer, wrong):
    wrong = tokenizer.vocab_size if wrong == "vocab_size" else wrong
    assert len(tokenizer.decode([0, tokenizer.vocab_size - 1])) == 2
    with pytest.raises(VaaniError, match=rf"\[0, {tokenizer.vocab_size}\)"):
        tokenizer.decode([0, wrong, 1])


def test_decode_replaces_broken_utf8():
    ids = list("aé".encode())[:-1] + list(b"b\xff")
    assert ByteTokenizer().decode(ids) == "a\ufffdb\ufffd"


@texts
@pytest.mark.parametrize("kind", ["char", "byte"])
def test_json_is_the_identity(kind, text):
    tokenizer = CharTokenizer.from_text(text) if kind == "char" else ByteTokenizer()
    written = json.dumps(tokenizer.to_json())
    again = from_json(json.loads(written))
    assert type(again) is type(tokenizer)
    assert again.vocab_size == tokenizer.vocab_size
    assert again.encode(text).tolist() == tokenizer.encode(text).tolist()
    assert json.dumps(again.to_json()) == written


@pytest.mark.parametrize(
    "description",
    [
        None,
        "char",
        [],
        {},
        {"type": "bpe", "merges": []},
        {"type": "char"},
        {"type": "char", "characters": ["a", "b"]},
        {"type": "char", "characters": ""},
        {"characters": "ab"},
        {"type": ["char"]},
    ],
    ids=repr,
)
def test_foreign_descriptions_are_refused(description):
    with pytest.raises(VaaniError, match=r"tokenizer"):
        from_json(description)


@pytest.mark.parametrize("text", ["\ud800", "ab\udcff", "\ude00\ud83d"], ids=ascii)
def test_lone_surrogates_are_refused(text):
    with pytest.raises(VaaniError, match="not valid Unicode"):
        CharTokenizer.from_text(text)
    with pytest.raises(VaaniError, match="not valid Unicode"):
        CharTokenizer("ab").encode(text)

"""Vocabularies of GGUF files as tokenizers: what `to_gguf` does, the other way around.

A file holds the tokens, what kind each is, and the model that splits texts into them:

  gpt2    byte-level BPE with merges, as a ``tokenizer.json``. The expression that cuts
          texts into words has a name, one of `WORDS`; llama.cpp gives some names more
          than an expression (`Words`).
  llama   sentencepiece's BPE: of two neighbors that make a token, those merge first
          whose token has the highest score. As merges: every way to cut a token in two
          tokens, by its score. What is no token falls apart into bytes.
  rwkv    only what exports of character and byte tokenizers hold.

Other models are refused by name. Nothing here runs a chat template.
"""

import dataclasses
import json
from typing import Any

import numpy as np

from vaani_jax.errors import VaaniError
from vaani_jax.interop.tokenizers import PRE_TOKENIZERS, to_gguf, unescaped
from vaani_jax.text.special import Special
from vaani_jax.text.tokenizers import (
    ByteTokenizer,
    CharTokenizer,
    HFTokenizer,
    Tokenizer,
)
from vaani_jax.words import shown

# Kinds of tokens.
NORMAL, UNKNOWN, CONTROL, USER, UNUSED, BYTE = range(1, 7)

SPACE = "\u2581"  # what sentencepiece writes for one


@dataclasses.dataclass(frozen=True)
class Words:
    """How a byte-level BPE cuts texts into words, by the name that GGUF has for it.

    Attributes:
      expression: that a word matches; empty for GPT-2's, which the library knows.
      whole: whether a word that is a token is not cut further, whatever the merges.
      opens: whether a text begins with the token for that where no key says.
    """

    expression: str = ""
    whole: bool = False
    opens: bool = False


_EXPRESSIONS = {name: expression for expression, name in PRE_TOKENIZERS.items()}
_LLAMA = Words(_EXPRESSIONS["llama-bpe"], whole=True, opens=True)
_QWEN = Words(_EXPRESSIONS["qwen2"])

# Names that llama.cpp (`llama-vocab.cpp`) reads alike are of one row.
WORDS: dict[str, Words] = {
    "gpt-2": Words(),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral"), _LLAMA),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "megrez"), _QWEN),
}


def from_gguf(metadata: dict[str, Any], vocab_size: int) -> Tokenizer:
    """The tokenizer of a GGUF file.

    Args:
      metadata: of the file.
      vocab_size: rows of the model's embedding; ids beyond the tokens stand for none.

    Raises VaaniError where it has none, or one that can't be had here.
    """
    model = _said(metadata, "model", str)
    if model is None:
        raise VaaniError("the file holds no tokenizer: tokenizer.ggml.model is missing")
    tokens = _said(metadata, "tokens", list)
    if not tokens or not all(isinstance(token, str) for token in tokens):
        raise VaaniError("tokenizer.ggml.tokens must hold the texts of the tokens")
    if len(tokens) > vocab_size:
        raise VaaniError(
            f"tokenizer.ggml.tokens has {len(tokens)} tokens, and the model's embedding"
            f" {vocab_size} rows"
        )
    kinds = _numbers(metadata, "token_type", len(tokens), NORMAL)
    if model == "rwkv":
        return _ours(tokens, kinds, vocab_size)
    readers = {"gpt2": _byte_level, "llama": _sentencepiece}
    if model not in readers:
        raise VaaniError(
            f"tokenizer.ggml.model is {shown(model)}: gpt2 and llama can be imported"
        )
    content = readers[model](metadata, tokens, kinds)
    content["added_tokens"] = [
        {
            "id": i,
            "content": tokens[i],
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": bool(kinds[i] != USER),
        }
        for i in np.flatnonzero(np.isin(kinds, (CONTROL, USER, UNKNOWN))).tolist()
        if tokens[i]
    ]
    serialized = json.dumps(content, ensure_ascii=False)
    return HFTokenizer(serialized, vocab_size, _special(metadata, tokens))


def _said(metadata: dict[str, Any], key: str, kind: type) -> Any:
    """The value of a key, or None; raises VaaniError for one of another type."""
    value = metadata.get(f"tokenizer.ggml.{key}")
    if value is not None and type(value) is not kind:
        raise VaaniError(
            f"tokenizer.ggml.{key} is {shown(value)[:60]}: it must be a {kind.__name__}"
        )
    return value


def _numbers(
    metadata: dict[str, Any], key: str, count: int, default: int | None
) -> np.ndarray:
    """An array of numbers, one for each token."""
    value = metadata.get(f"tokenizer.ggml.{key}")
    if value is None and default is not None:
        return np.full(count, default)
    if not isinstance(value, np.ndarray) or len(value) != count:
        raise VaaniError(f"tokenizer.ggml.{key} must have a number for every token")
    return value


# -- Special tokens ---------------------------------------------------------------

# Parts of a tokenizer, and the keys, less ``_token_id``, of the ids that play them.
PARTS = {
    "bos_token": ("bos",),
    "eos_token": ("eos", "eot", "eom"),
    "unk_token": ("unknown",),
    "pad_token": ("padding",),
}


def _ids(metadata: dict[str, Any], part: str, count: int) -> list[int]:
    found = []
    for key in PARTS[part]:
        value = _said(metadata, f"{key}_token_id", int)
        # Some files have the largest number, or one beyond the tokens, for none.
        if value is not None and 0 <= value < count:
            found.append(value)
    return list(dict.fromkeys(found))


def _special(metadata: dict[str, Any], tokens: list[str]) -> Special:
    ids = {part: tuple(_ids(metadata, part, len(tokens))) for part in PARTS}
    names = {part: tokens[found[0]] for part, found in ids.items() if found}
    template = metadata.get("tokenizer.chat_template")
    if template is not None and not isinstance(template, str):
        raise VaaniError("tokenizer.chat_template must be a text")
    prefix = "tokenizer.chat_template."
    others = {
        key.removeprefix(prefix): value
        for key, value in metadata.items()
        if key.startswith(prefix) and isinstance(value, str)
    }
    found: Any = template
    if others:
        named = {"default": template, **others} if template else others
        found = [{"name": name, "template": text} for name, text in named.items()]
    return Special(names, {part: one for part, one in ids.items() if one}, found)


def _opening(
    metadata: dict[str, Any], tokens: list[str], default: bool
) -> dict[str, Any] | None:
    """What puts the opening token before a text; None where there is no such token."""
    opens = _said(metadata, "add_bos_token", bool)
    found = _ids(metadata, "bos_token", len(tokens))
    if not (default if opens is None else opens) or not found:
        return None
    name = tokens[found[0]]
    one = [{"SpecialToken": {"id": name, "type_id": 0}}]
    first = [{"Sequence": {"id": "A", "type_id": 0}}]
    second = [{"Sequence": {"id": "B", "type_id": 1}}]
    return {
        "type": "TemplateProcessing",
        "single": one + first,
        "pair": one + first + second,
        "special_tokens": {name: {"id": name, "ids": [found[0]], "tokens": [name]}},
    }


def _content(vocabulary: dict[str, int], merges: list[list[str]]) -> dict[str, Any]:
    """A ``tokenizer.json`` of a BPE, without what comes before and after it."""
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": None,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": vocabulary,
            "merges": merges,
        },
    }


def _vocabulary(tokens: list[str], kinds: np.ndarray) -> dict[str, int]:
    """Ids by token, those that pad the vocabulary left out.

    Special ones are in it, too: the library then takes their ids from there, which it
    counts up elsewhere.
    """
    used = np.flatnonzero(kinds != UNUSED).tolist()
    found = {tokens[i]: i for i in used if tokens[i]}
    if len(found) != sum(1 for i in used if tokens[i]):
        raise VaaniError("tokenizer.ggml.tokens holds a token twice")
    return found


# -- gpt2 -------------------------------------------------------------------------


def _byte_level(
    metadata: dict[str, Any], tokens: list[str], kinds: np.ndarray
) -> dict[str, Any]:
    pre = _said(metadata, "pre", str)
    if pre not in WORDS:
        raise VaaniError(
            f"tokenizer.ggml.pre is {shown(pre)}: of byte-level BPE,"
            f" {', '.join(WORDS)} can be imported"
        )
    words = WORDS[pre]
    merges = _said(metadata, "merges", list)
    if merges is None:
        raise VaaniError("tokenizer.ggml.merges is missing")
    pairs = []
    for merge in merges:
        # A token is never empty: the space that parts two is not the first character.
        at = merge.find(" ", 1) if isinstance(merge, str) else -1
        if at < 0:
            raise VaaniError(f"tokenizer.ggml.merges holds {shown(merge)[:60]}")
        pairs.append([merge[:at], merge[at + 1 :]])
    content = _content(_vocabulary(tokens, kinds), pairs)
    content["model"]["ignore_merges"] = words.whole
    level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": not words.expression,
    }
    content["pre_tokenizer"] = level
    if words.expression:
        cut = {
            "type": "Split",
            "pattern": {"Regex": words.expression},
            "behavior": "Isolated",
            "invert": False,
        }
        content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [cut, level]}
    content["decoder"] = {**level, "use_regex": True}
    content["post_processor"] = _opening(metadata, tokens, words.opens)
    return content


# -- llama ------------------------------------------------------------------------


def _sentencepiece(
    metadata: dict[str, Any], tokens: list[str], kinds: np.ndarray
) -> dict[str, Any]:
    for key in ("remove_extra_whitespaces", "precompiled_charsmap"):
        value = metadata.get(f"tokenizer.ggml.{key}")
        if value is not None and value is not False:
            raise VaaniError(
                f"tokenizer.ggml.{key} is set: a tokenizer that rewrites texts can't be"
                " imported"
            )
    scores = _numbers(metadata, "scores", len(tokens), None).astype(np.float64)
    if not np.isfinite(scores).all():
        raise VaaniError("tokenizer.ggml.scores holds numbers that are not finite")
    vocabulary = _vocabulary(tokens, kinds)
    unknown = _ids(metadata, "unk_token", len(tokens))
    content = _content(vocabulary, _merges(tokens, kinds, scores))
    content["model"] |= {
        "unk_token": tokens[unknown[0]] if unknown else None,
        "fuse_unk": True,
        "byte_fallback": True,
    }
    spelled = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    spoken = {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}
    steps = [spoken, {"type": "ByteFallback"}, {"type": "Fuse"}]
    before = [spelled]
    if _said(metadata, "add_space_prefix", bool) is not False:
        before = [{"type": "Prepend", "prepend": SPACE}, spelled]
        steps.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    content["normalizer"] = {"type": "Sequence", "normalizers": before}
    content["decoder"] = {"type": "Sequence", "decoders": steps}
    content["post_processor"] = _opening(metadata, tokens, True)
    return content


LONGEST_PIECE = 512  # characters; cutting a token takes their square


def _merges(
    tokens: list[str], kinds: np.ndarray, scores: np.ndarray
) -> list[list[str]]:
    """Merges that do what scores do: the token with the highest one is made first.

    Of several ways to make one token, the one whose parts have the highest scores
    comes first, as that is how they were made; equal scores leave it to the ids.
    """
    normal = np.flatnonzero(kinds == NORMAL).tolist()
    known = {tokens[i]: i for i in normal}
    found: list[tuple[float, int, float, str, str]] = []
    for i in normal:
        token = tokens[i]
        if len(token) > LONGEST_PIECE:
            raise VaaniError(
                f"tokenizer.ggml.tokens holds one of {len(token)} characters"
            )
        for at in range(1, len(token)):
            left, right = token[:at], token[at:]
            if left in known and right in known:
                parts = min(scores[known[left]], scores[known[right]])
                found.append((-scores[i], i, -parts, left, right))
    found.sort(key=lambda one: one[:3])
    return [[left, right] for *_, left, right in found]


# -- rwkv -------------------------------------------------------------------------


def _ours(tokens: list[str], kinds: np.ndarray, vocab_size: int) -> Tokenizer:
    """The character or byte tokenizer whose export holds these tokens."""
    made: list[CharTokenizer | ByteTokenizer] = [ByteTokenizer()]
    try:
        pieces = [
            unescaped(token).decode("utf-8")
            for token, kind in zip(tokens, kinds.tolist(), strict=True)
            if kind != UNUSED
        ]
        if pieces and all(len(piece) == 1 for piece in pieces):
            made.append(CharTokenizer("".join(pieces)))
    except (ValueError, UnicodeError):  # bytes, or what `to_gguf` does not write
        pass
    for tokenizer in made:
        if tokenizer.vocab_size <= vocab_size:
            expected = to_gguf(tokenizer, len(tokens))
            if (expected.tokens, expected.types) == (tokens, kinds.tolist()):
                return tokenizer
    raise VaaniError(
        "tokenizer.ggml.model is rwkv, with a vocabulary that is none of characters or"
        " bytes alone: those of this project's exports can be imported"
    )

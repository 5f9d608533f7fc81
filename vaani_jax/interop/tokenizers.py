"""Tokenizers as files of other tools: ``tokenizer.json`` and ``tokenizer.ggml.*``.

Characters become a word-level vocabulary of one-character words: a character that is
not in it is an error there as it is here. Bytes become a byte-level BPE without merges.
In GGUF both become a vocabulary of kind "rwkv", the only one of llama.cpp's that
matches bytes as they are, adds nothing, and has no end-of-text token unless told to;
others take id 2 or 11 for one.
"""

import dataclasses
import json
import pathlib
import re
from typing import Any

from vaani_jax.errors import VaaniError
from vaani_jax.paths import read_small
from vaani_jax.text.special import DEFAULT
from vaani_jax.text.tokenizers import (
    ByteTokenizer,
    CharTokenizer,
    HFTokenizer,
    Tokenizer,
    read_huggingface,
)
from vaani_jax.words import shown

# Regular expressions that llama.cpp knows by a name, as the files of the original
# models spell them (convert_hf_to_gguf.py, llama-vocab.cpp).
PRE_TOKENIZERS = {
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+": "llama-bpe",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+": "qwen2",
}


def _byte_characters() -> list[str]:
    """The visible characters that stand for bytes in byte-level BPE (GPT-2)."""
    visible = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(b if b in visible else next(others)) for b in range(256)]


# Characters that a text has least use for: one stands for padding where a vocabulary
# has no token of its own for that. Masked, it is as good as any; but readers that leave
# padding out, of a loss or of a text, leave out the character (`note`).
PADDING = "\0|~^`$#@"


def padding_of(tokenizer: CharTokenizer | ByteTokenizer) -> str:
    """The character that pads batches of an export: one of the vocabulary."""
    if isinstance(tokenizer, ByteTokenizer):
        return "|"
    known = tokenizer.characters
    return next((c for c in PADDING if c in known), known[-1])


def note_of_hf(tokenizer: Tokenizer) -> str:
    """What a person should know of the files of `to_hf`; empty for nothing."""
    if not isinstance(tokenizer, CharTokenizer | ByteTokenizer):
        return ""
    return (
        f"the character {padding_of(tokenizer)!r} pads batches, as the vocabulary has"
        " no token for that: transformers leaves it out of what it decodes with"
        " skip_special_tokens"
    )


def to_hf(tokenizer: Tokenizer) -> tuple[str, dict[str, Any]]:
    """The contents of ``tokenizer.json`` and of ``tokenizer_config.json``."""
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
    }
    if isinstance(tokenizer, HFTokenizer):
        special = tokenizer.special
        template = special.chat_template
        if template is not None:
            settings["chat_template"] = template
        return tokenizer.serialized, {**settings, **special.by_part}
    if not isinstance(tokenizer, CharTokenizer | ByteTokenizer):
        raise VaaniError(f"a {type(tokenizer).__name__} can't be exported")
    padding = padding_of(tokenizer)
    added = {
        "id": int(tokenizer.encode(padding)[0]),
        "content": padding,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": False,  # it is a character of texts as well
    }
    settings["pad_token"] = padding
    content: dict[str, Any] = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [added],
        "normalizer": None,
        "post_processor": None,
    }
    if isinstance(tokenizer, CharTokenizer):
        content |= {
            "pre_tokenizer": {
                "type": "Split",
                "pattern": {"Regex": r"[\s\S]"},
                "behavior": "Isolated",
                "invert": False,
            },
            "decoder": {"type": "Fuse"},
            "model": {
                "type": "WordLevel",
                "vocab": {c: i for i, c in enumerate(tokenizer.characters)},
                "unk_token": "<unk>",  # which there is none: unknown ones are errors
            },
        }
    else:
        level = {
            "type": "ByteLevel",
            "add_prefix_space": False,
            "trim_offsets": True,
            "use_regex": False,
        }
        content |= {
            "pre_tokenizer": level,
            "decoder": level,
            "model": {
                "type": "BPE",
                "dropout": None,
                "unk_token": None,
                "continuing_subword_prefix": None,
                "end_of_word_suffix": None,
                "fuse_unk": False,
                "byte_fallback": False,
                "ignore_merges": False,
                "vocab": {c: i for i, c in enumerate(_byte_characters())},
                "merges": [],
            },
        }
    return json.dumps(content, ensure_ascii=False), settings


def from_folder(folder: pathlib.Path, vocab_size: int) -> Tokenizer:
    """The tokenizer of a Hugging Face folder.

    Character and byte tokenizers that were written by `to_hf` come back as such.

    Raises VaaniError where there is none, or it does not work.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise VaaniError(
            f"{folder} has no tokenizer.json: save one there with"
            " AutoTokenizer.from_pretrained(NAME).save_pretrained(FOLDER)"
        )
    serialized = read_small(path)
    tokenizer = read_huggingface(serialized, folder, vocab_size)
    return _ours(serialized) or tokenizer


def _ours(serialized: str) -> Tokenizer | None:
    """The tokenizer of ours that serializes to this text, if any does."""
    content = json.loads(serialized)
    candidates: list[CharTokenizer | ByteTokenizer] = [ByteTokenizer()]
    vocabulary = content.get("model", {}).get("vocab")
    if isinstance(vocabulary, dict) and vocabulary:
        characters = "".join(vocabulary)
        if len(characters) == len(vocabulary):
            candidates.append(CharTokenizer(characters))
    for candidate in candidates:
        expected = json.loads(to_hf(candidate)[0])
        # Versions before 0.2 named no padding.
        if content in (expected, {**expected, "added_tokens": []}):
            return candidate
    return None


@dataclasses.dataclass(frozen=True)
class GGUFVocabulary:
    """What ``tokenizer.ggml.*`` holds.

    Attributes:
      model: "rwkv" or "gpt2".
      pre: name of the pre-tokenizer.
      tokens: the text of every id, as the model spells it.
      types: 1 normal, 3 control, 4 user-defined, 5 unused.
      merges: of BPE; None elsewhere.
      special: ids by key, such as "bos_token_id".
      add_bos: whether a text begins with the token of that name.
      chat_template: Jinja source; empty for none.
      named_templates: further ones by their names.
    """

    model: str
    pre: str
    tokens: list[str]
    types: list[int]
    merges: list[str] | None = None
    special: dict[str, int] = dataclasses.field(default_factory=dict)
    add_bos: bool = False
    chat_template: str = ""
    named_templates: dict[str, str] = dataclasses.field(default_factory=dict)


def to_gguf(tokenizer: Tokenizer, vocab_size: int) -> GGUFVocabulary:
    """The vocabulary of a model with ``vocab_size`` rows, for llama.cpp.

    Raises VaaniError for a tokenizer that llama.cpp would read otherwise.
    """
    if isinstance(tokenizer, HFTokenizer):
        return _bpe_to_gguf(tokenizer, vocab_size)
    if isinstance(tokenizer, CharTokenizer):
        pieces = [c.encode("utf-8") for c in tokenizer.characters]
    elif isinstance(tokenizer, ByteTokenizer):
        pieces = [bytes([b]) for b in range(256)]
    else:
        raise VaaniError(f"a {type(tokenizer).__name__} can't be exported")
    tokens = [_escaped(piece) for piece in pieces]
    unused = vocab_size - len(tokens)
    # No text can hold these: 0xff is no byte of UTF-8.
    tokens += [_escaped(b"\xff\xff%d" % i) for i in range(unused)]
    return GGUFVocabulary("rwkv", "default", tokens, [1] * len(pieces) + [5] * unused)


def _escaped(piece: bytes) -> str:
    """A token as llama.cpp's rwkv vocabulary spells it."""
    return "".join(
        chr(b) if 33 <= b < 127 and b != 0x5C else f"\\x{b:02x}" for b in piece
    )


def unescaped(token: str) -> bytes:
    """The bytes of a token that `_escaped` spelled."""
    parts = token.split("\\x")
    return parts[0].encode() + b"".join(
        bytes([int(part[:2], 16)]) + part[2:].encode() for part in parts[1:]
    )


def _bpe_to_gguf(tokenizer: HFTokenizer, vocab_size: int) -> GGUFVocabulary:
    content = json.loads(tokenizer.serialized)
    model = content.get("model", {})
    pre = _pre_tokenizer(content.get("pre_tokenizer"))
    if model.get("type") != "BPE" or pre is None or content.get("normalizer"):
        raise VaaniError(
            "llama.cpp has no name for this tokenizer: only byte-level BPE as in GPT-2,"
            " Llama 3 or Qwen 2 can go into a GGUF file; use --format hf or hf-packed"
        )
    added = {t["id"]: t for t in content.get("added_tokens", [])}
    names = {i: token for token, i in model["vocab"].items()}
    names |= {i: t["content"] for i, t in added.items()}
    special = {
        f"{part}_id": found
        for part in ("bos_token", "unk_token", "pad_token")
        if (found := tokenizer.id_of(part)) is not None
    }
    if not tokenizer.eos_ids:
        raise VaaniError(
            "this tokenizer names no eos_token: llama.cpp would take id 11 for it; name"
            " one in its tokenizer_config.json, or use --format hf or hf-packed"
        )
    special["eos_token_id"], *others = tokenizer.eos_ids
    if others:  # llama.cpp ends a text at either
        special["eot_token_id"] = others[0]
    kinds = {i: 3 if t.get("special") else 4 for i, t in added.items()}
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    plain = tokenizer.encode("a").tolist()
    opened = tokenizer.encode_prompt("a").tolist()
    bos = [special["bos_token_id"]] if "bos_token_id" in special else []
    if opened != plain and opened != bos + plain:
        raise VaaniError(
            "this tokenizer adds tokens that llama.cpp would not: use --format hf or"
            " hf-packed"
        )
    return GGUFVocabulary(
        "gpt2",
        pre,
        [names.get(i, f"[PAD{i}]") for i in range(vocab_size)],
        [kinds.get(i, 1 if i in names else 5) for i in range(vocab_size)],
        merges,
        special,
        opened != plain,
        tokenizer.special.templates.get(DEFAULT, ""),
        _named_templates(tokenizer),
    )


def _named_templates(tokenizer: HFTokenizer) -> dict[str, str]:
    """Those besides the default whose names can be part of a key."""
    templates = tokenizer.special.templates
    return {
        name: text
        for name, text in templates.items()
        if name != DEFAULT and re.fullmatch("[A-Za-z0-9_]+", name)
    }


def left_out_of_gguf(tokenizer: Tokenizer) -> list[str]:
    """What a tokenizer brings that a GGUF file has no room for, as nouns."""
    if not isinstance(tokenizer, HFTokenizer):
        return []
    special, found = tokenizer.special, []
    if len(tokenizer.eos_ids) > 2:
        found.append(f"the end-of-text ids {list(tokenizer.eos_ids[2:])}")
    if odd := special.templates.keys() - {DEFAULT} - _named_templates(tokenizer).keys():
        found.append(f"the chat templates {', '.join(map(shown, sorted(odd)))}")
    kept = {"eos_token_id", "bos_token_id", "pad_token_id"}
    if rest := sorted(special.generation.keys() - kept - {"transformers_version"}):
        found.append(f"{', '.join(rest)} of its generation_config.json")
    return found


def _pre_tokenizer(found: Any) -> str | None:
    """llama.cpp's name for a pre-tokenizer, if it has one."""
    if not isinstance(found, dict):
        return None
    if found.get("type") == "ByteLevel":
        plain = found.get("use_regex", True) and not found.get("add_prefix_space")
        return "gpt-2" if plain else None
    if found.get("type") != "Sequence":
        return None
    parts = found.get("pretokenizers", [])
    if [part.get("type") for part in parts] != ["Split", "ByteLevel"]:
        return None
    split, level = parts
    if level.get("use_regex") or level.get("add_prefix_space"):
        return None
    if split.get("behavior") != "Isolated" or split.get("invert"):
        return None
    return PRE_TOKENIZERS.get(split.get("pattern", {}).get("Regex", ""))

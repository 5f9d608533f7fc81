"""Text to token ids and back. A tokenizer is saved beside the weights, as JSON."""

import dataclasses
import json
import pathlib
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import numpy as np

from vaani_jax.errors import VaaniError
from vaani_jax.settings import named
from vaani_jax.text.special import Added, Special, read_added, read_special
from vaani_jax.words import first_line, shown

UNFINISHED = "\ufffd"  # what bytes that are no whole character decode to
LOOK_BACK = 64  # ids before a text that are looked at to spell it


@runtime_checkable
class Tokenizer(Protocol):
    """What the project asks of a tokenizer."""

    @property
    def vocab_size(self) -> int:
        """How many ids there are, from 0 to ``vocab_size - 1``."""

    def encode(self, text: str) -> np.ndarray:
        """Ids [length], int32. Raises VaaniError for text it can't represent."""

    def decode(self, ids: Any) -> str:
        """The text of ids, a sequence of integers."""

    def encode_prompt(self, text: str) -> np.ndarray:
        """Ids of a text that begins a sequence, with the tokens that open one."""

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """Ids that end a text, as a model writes it."""

    def has_token(self) -> np.ndarray:
        """Which ids stand for something, bool [vocab_size]; others pad a vocabulary."""

    def to_json(self) -> dict[str, Any]:
        """A description from which `from_json` rebuilds the tokenizer."""


class CharTokenizer:
    """One id per character (code point), in the order of the code points.

    Attributes:
      characters: the vocabulary, sorted, each once.
    """

    eos_ids: tuple[int, ...] = ()

    def __init__(self, characters: str) -> None:
        if not characters:
            raise VaaniError("a character tokenizer needs at least one character")
        points = np.unique(_code_points(characters))
        self.characters = "".join(map(chr, points))
        self._points = points

    @classmethod
    def from_text(cls, text: str) -> "CharTokenizer":
        """The tokenizer of the characters that occur in ``text``."""
        return cls(text)

    @property
    def vocab_size(self) -> int:
        return len(self._points)

    def encode(self, text: str) -> np.ndarray:
        points = _code_points(text)
        ids = np.searchsorted(self._points, points)
        ids = np.minimum(ids, self.vocab_size - 1)
        unknown = self._points[ids] != points
        if unknown.any():
            where = int(np.argmax(unknown))
            character = text[where]
            raise VaaniError(
                f"character {character!r} (U+{ord(character):04X}, at position {where})"
                f" is not in the vocabulary of {self.vocab_size} characters; use text"
                " of the kind that the model was trained on, or train with"
                " --config.data.tokenizer=byte"
            )
        return ids.astype(np.int32)

    def decode(self, ids: Any) -> str:
        ids = _checked(ids, self.vocab_size)
        return self._points[ids].astype("<u4").tobytes().decode("utf-32-le")

    def encode_prompt(self, text: str) -> np.ndarray:
        return self.encode(text)

    def has_token(self) -> np.ndarray:
        return np.ones(self.vocab_size, bool)

    def to_json(self) -> dict[str, Any]:
        return {"type": "char", "characters": self.characters}


class ByteTokenizer:
    """One id per byte of UTF-8: any text, 256 ids."""

    vocab_size = 256
    eos_ids: tuple[int, ...] = ()

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(_encoded(text, "utf-8"), np.uint8).astype(np.int32)

    def decode(self, ids: Any) -> str:
        """The text; bytes that are not UTF-8 become U+FFFD."""
        ids = _checked(ids, 256)
        return ids.astype(np.uint8).tobytes().decode("utf-8", errors="replace")

    def encode_prompt(self, text: str) -> np.ndarray:
        return self.encode(text)

    def has_token(self) -> np.ndarray:
        return np.ones(256, bool)

    def to_json(self) -> dict[str, Any]:
        return {"type": "byte"}


class HFTokenizer:
    """A tokenizer of Hugging Face's `tokenizers` library, kept as its own JSON.

    Attributes:
      serialized: the content of its ``tokenizer.json``.
      vocab_size: as many ids as the model has; those without a token, which pad the
        vocabulary of some models, decode to nothing.
      special: its special tokens; those that files name by id only have their names.
      eos_ids: the ids that end a text.
    """

    def __init__(
        self, serialized: str, vocab_size: int = 0, special: Special | None = None
    ) -> None:
        self.serialized = serialized
        self._tokenizer = self._guard(lambda: _tokenizers().from_str(serialized))
        # The library takes what is not quite JSON.
        if not isinstance(self._guard(lambda: json.loads(serialized)), dict):
            raise VaaniError("tokenizer.json must hold an object")
        # Both would change what a text is.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        names = self._tokenizer.get_vocab(with_added_tokens=True)
        ids = set(names.values())
        if not ids:
            raise VaaniError("tokenizer.json holds no tokens")
        self.vocab_size = vocab_size or max(ids) + 1
        if max(ids) >= self.vocab_size:
            raise VaaniError(
                f"tokenizer.json has {max(ids) + 1} ids, more than the"
                f" {self.vocab_size} of the model"
            )
        self._ids_with_token = np.zeros(self.vocab_size, bool)
        self._ids_with_token[list(ids)] = True
        self.special = self._resolved(special or Special(), names)
        self.eos_ids = self.special.ids.get("eos_token", ())

    def _resolved(self, special: Special, known: dict[str, int]) -> Special:
        """Special tokens by their names; those that end a text by their ids, too."""
        ids = set(known.values())
        found = {
            part: self._tokenizer.id_to_token(one[0])
            for part, one in special.ids.items()
            if one[0] in ids
        }
        found |= special.names
        ends = [known.get(found.get("eos_token", ""), -1)]
        ends += special.ids.get("eos_token", ())
        ends = list(dict.fromkeys(i for i in ends if i in ids))
        by_id = {"eos_token": tuple(ends)} if ends else {}
        return dataclasses.replace(special, names=found, ids=by_id)

    def id_of(self, part: str) -> int | None:
        """The id of a special token, such as "eos_token"; None where there is none."""
        name = self.special.names.get(part)
        return None if name is None else self.id_of_token(name)

    def id_of_token(self, name: str) -> int | None:
        """The id of the token of that text; None where there is none."""
        found: int | None = self._tokenizer.token_to_id(name)
        return found

    def has_token(self) -> np.ndarray:
        return self._ids_with_token.copy()

    def is_special(self, token: int) -> bool:
        """Whether an id stands for something else than the text of its token."""
        found = self._tokenizer.get_added_tokens_decoder().get(int(token))
        return found is not None and found.special

    @staticmethod
    def _guard(function: Any) -> Any:
        """Runs a call into the library, whose failures have any type."""
        try:
            return function()
        except (VaaniError, KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # its panics are no Exceptions
            reason = first_line(error, 200)
            raise VaaniError(f"the tokenizer fails: {reason}") from None

    def _encoding(self, text: str, special: bool) -> Any:
        return self._guard(
            lambda: self._tokenizer.encode(text, add_special_tokens=special)
        )

    def _checked(self, ids: Any) -> np.ndarray:
        return _checked(ids, self.vocab_size).astype(np.int32)

    def encode(self, text: str) -> np.ndarray:
        return self._checked(self._encoding(text, special=False).ids)

    def encode_prompt(self, text: str) -> np.ndarray:
        """Ids, opened as the tokenizer's template says, and not closed.

        A template that closes a text, with BERT's [SEP] or an EOS, is made for texts
        that are whole.
        """
        encoding = self._encoding(text, special=True)
        ids, of_text = list(encoding.ids), encoding.sequence_ids
        # What the template has added is of no sequence.
        last = max((i for i, n in enumerate(of_text) if n is not None), default=None)
        return self._checked(ids[: self._opening() if last is None else last + 1])

    def _opening(self) -> int:
        """How many tokens the template puts before a text."""
        for text in ("a", "0", "."):
            of_text = self._encoding(text, special=True).sequence_ids
            if any(n is not None for n in of_text):
                return next(i for i, n in enumerate(of_text) if n is not None)
        return 0

    def encode_spans(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """Ids of a text, and where in it each ends, in characters; int64 [length]."""
        encoding = self._encoding(text, special=False)
        ends = np.asarray([end for _, end in encoding.offsets], np.int64)
        return self._checked(encoding.ids), ends

    def decode(self, ids: Any) -> str:
        """The text, special tokens included."""
        ids = _checked(ids, self.vocab_size).tolist()
        return self._guard(
            lambda: self._tokenizer.decode(ids, skip_special_tokens=False)
        )

    def to_json(self) -> dict[str, Any]:
        return {
            "type": "huggingface",
            "tokenizer": self.serialized,
            "vocab_size": self.vocab_size,
            "special": self.special.to_json(),
        }


def read_huggingface(
    serialized: str, folder: pathlib.Path, vocab_size: int = 0
) -> HFTokenizer:
    """A tokenizer with all that the files beside its ``tokenizer.json`` say of it.

    Args:
      serialized: the content of ``tokenizer.json``.
      folder: where the other files are.
      vocab_size: of the model, which tokens beyond are none of; 0 where there is none.

    Raises VaaniError for damaged files, and for those that contradict each other.
    """
    listed = read_added(folder)
    if vocab_size:
        listed = {token: one for token, one in listed.items() if token < vocab_size}
    serialized, added = _with_added(serialized, listed)
    tokenizer = HFTokenizer(serialized, vocab_size, read_special(folder))
    for token, name in added.items():
        found = tokenizer.id_of_token(name)
        if found != token:
            raise VaaniError(
                f"{folder} gives the token {shown(name)} the id {token}, and with its"
                f" tokenizer.json it has {found}: save it again with"
                " AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
            )
    return tokenizer


def _with_added(
    serialized: str, listed: dict[int, Added]
) -> tuple[str, dict[int, str]]:
    """``tokenizer.json`` with those of some tokens that it lacks, and these by id."""
    try:
        content = json.loads(serialized)
        known = {token["content"] for token in content.setdefault("added_tokens", [])}
    except (ValueError, RecursionError, LookupError, TypeError, AttributeError):
        return serialized, {}  # damaged, as whoever reads it will say
    lacking = {i: one for i, one in sorted(listed.items()) if one.content not in known}
    if not lacking:
        return serialized, {}
    content["added_tokens"] += [
        {"id": i, **dataclasses.asdict(one)} for i, one in lacking.items()
    ]
    names = {i: one.content for i, one in lacking.items()}
    return json.dumps(content, ensure_ascii=False), names


def _tokenizers() -> Any:
    try:
        from tokenizers import Tokenizer as Library
    except ImportError:
        raise VaaniError(
            "this tokenizer needs a package that is not installed:"
            " pip install 'vaani-jax[interop]'"
        ) from None
    return Library


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of tokenizer.

    Attributes:
      read: rebuilds one from what its `to_json` returned; KeyError or TypeError where
        that is no such description.
      make: makes one for a text; None where it has to come from a file.
      needs_text: whether `make` looks at the text; else any, such as "", will do.
    """

    read: Callable[[dict[str, Any]], Tokenizer]
    make: Callable[[str], Tokenizer] | None = None
    needs_text: bool = False


def _read_huggingface(description: dict[str, Any]) -> Tokenizer:
    return HFTokenizer(
        _text(description["tokenizer"]),
        description.get("vocab_size", 0),
        Special.from_json(description.get("special")),
    )


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError("not a text")
    return value


# By the "type" of their descriptions. A further tokenizer is a class and a row.
TOKENIZERS: dict[str, Kind] = {
    "char": Kind(
        lambda description: CharTokenizer(_text(description["characters"])),
        CharTokenizer.from_text,
        needs_text=True,
    ),
    "byte": Kind(lambda description: ByteTokenizer(), lambda text: ByteTokenizer()),
    "huggingface": Kind(_read_huggingface),
}


def from_json(description: Any) -> Tokenizer:
    """Rebuilds a tokenizer from what its `to_json` returned."""
    kind = description.get("type") if isinstance(description, dict) else None
    if isinstance(kind, str) and kind in TOKENIZERS:
        try:
            return TOKENIZERS[kind].read(description)
        except (KeyError, TypeError, ValueError):  # not what `to_json` writes
            pass
    raise VaaniError(f"unknown tokenizer description (type {kind!r})")


def same_tokenizer(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two descriptions, as `to_json` gives them, spell alike.

    Two texts of one ``tokenizer.json`` may differ in their white space.
    """
    if one.get("type") != "huggingface" or other.get("type") != "huggingface":
        return one == other
    first, second = one["tokenizer"], other["tokenizer"]
    return bool(first == second or json.loads(first) == json.loads(second))


def maker(name: str) -> Kind:
    """The kind of that name, if one can be made for a text.

    Raises VaaniError, with those that can, for any other name.
    """
    makers = {n: kind for n, kind in TOKENIZERS.items() if kind.make is not None}
    return named(makers, name, "data.tokenizer")


def _code_points(text: str) -> np.ndarray:
    return np.frombuffer(_encoded(text, "utf-32-le"), "<u4").astype(np.int64)


def _encoded(text: str, encoding: str) -> bytes:
    try:
        return text.encode(encoding)
    except UnicodeEncodeError as error:
        raise VaaniError(f"the text is not valid Unicode: {error}") from None


def _checked(ids: Any, vocab_size: int) -> np.ndarray:
    ids = np.asarray(ids, np.int64).reshape(-1)
    if ids.size and not (ids.min() >= 0 and ids.max() < vocab_size):
        raise VaaniError(f"token ids must lie in [0, {vocab_size})")
    return ids


def continuation(tokenizer: Tokenizer, prompt: Any, new: Any) -> str:
    """What new ids add to the text of those before them.

    Decoded with the prompt: the first token of a text may lose its space, and bytes of
    a character may lie on both sides.

    Args:
      tokenizer: spells both.
      prompt: ids before.
      new: ids after; those of a character that isn't whole come out as U+FFFD.
    """
    new = np.asarray(new, np.int64).reshape(-1)
    if not new.size:
        return ""
    prompt = np.asarray(prompt, np.int64).reshape(-1)
    before = tokenizer.decode(prompt).rstrip(UNFINISHED)
    text = tokenizer.decode(np.concatenate([prompt, new]))
    if text.startswith(before):
        return text[len(before) :]
    # The new ids have changed how the end of the prompt is spelled.
    return tokenizer.decode(new)


class Spelling:
    """The text of ids that come a few at a time, in whole characters.

    Attributes:
      text: all of what has been spelled.
    """

    def __init__(self, tokenizer: Tokenizer, before: Any = ()) -> None:
        """Begins behind a text.

        Args:
          tokenizer: spells both.
          before: its ids; see `continuation`.
        """
        self._tokenizer = tokenizer
        # No token is spelled by what is farther from it.
        self._before = np.asarray(before, np.int64).reshape(-1)[-LOOK_BACK:]
        self._ids: list[int] = []
        self.text = ""

    def add(self, ids: Any) -> str:
        """What these ids add; a character that is not whole comes with later ones."""
        self._ids.extend(np.asarray(ids, np.int64).reshape(-1).tolist())
        return self._new(self._whole().rstrip(UNFINISHED))

    def end(self) -> str:
        """What is left: U+FFFD for bytes that have become no character."""
        return self._new(self._whole())

    def _whole(self) -> str:
        return continuation(self._tokenizer, self._before, self._ids)

    def _new(self, text: str) -> str:
        new, self.text = text[len(self.text) :], text
        return new

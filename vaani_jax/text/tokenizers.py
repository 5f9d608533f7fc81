"""Text to token ids and back. A tokenizer is saved beside the weights, as JSON."""

import dataclasses
import json
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import numpy as np

from vaani_jax.errors import VaaniError
from vaani_jax.settings import named
from vaani_jax.words import first_line


@runtime_checkable
class Tokenizer(Protocol):
    """What the project asks of a tokenizer."""

    @property
    def vocab_size(self) -> int:
        """Number of ids: they run from 0 to ``vocab_size - 1``."""

    def encode(self, text: str) -> np.ndarray:
        """Ids [length], int32. Raises VaaniError for text it can't represent."""

    def decode(self, ids: Any) -> str:
        """The text of ids, a sequence of integers."""

    def encode_prompt(self, text: str) -> np.ndarray:
        """Ids of a text that begins a sequence, with the tokens that open one."""

    def to_json(self) -> dict[str, Any]:
        """A description from which `from_json` rebuilds the tokenizer."""


class CharTokenizer:
    """One id per character (code point), in the order of the code points.

    Attributes:
      characters: the vocabulary, sorted, each once.
    """

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

    def to_json(self) -> dict[str, Any]:
        return {"type": "char", "characters": self.characters}


class ByteTokenizer:
    """One id per byte of UTF-8: any text, 256 ids."""

    vocab_size = 256

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(_encoded(text, "utf-8"), np.uint8).astype(np.int32)

    def decode(self, ids: Any) -> str:
        """The text; bytes that are not UTF-8 become U+FFFD."""
        ids = _checked(ids, 256)
        return ids.astype(np.uint8).tobytes().decode("utf-8", errors="replace")

    def encode_prompt(self, text: str) -> np.ndarray:
        return self.encode(text)

    def to_json(self) -> dict[str, Any]:
        return {"type": "byte"}


class HFTokenizer:
    """A tokenizer of Hugging Face's `tokenizers` library, kept as its own JSON.

    Attributes:
      serialized: the content of its ``tokenizer.json``.
      vocab_size: as many ids as the model has; those without a token, which pad the
        vocabulary of some models, decode to nothing.
      special: names of its special tokens ("bos_token", "eos_token", ...).
    """

    def __init__(
        self,
        serialized: str,
        vocab_size: int = 0,
        special: dict[str, str] | None = None,
    ) -> None:
        self.serialized = serialized
        self.special = dict(special or {})
        self._tokenizer = self._guard(lambda: _tokenizers().from_str(serialized))
        if not isinstance(json.loads(serialized), dict):
            raise VaaniError("tokenizer.json must hold an object")
        # Both would change what a text is.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        ids = self._tokenizer.get_vocab(with_added_tokens=True).values()
        if not ids:
            raise VaaniError("tokenizer.json holds no tokens")
        self.vocab_size = vocab_size or max(ids) + 1
        if max(ids) >= self.vocab_size:
            raise VaaniError(
                f"tokenizer.json has {max(ids) + 1} ids, more than the"
                f" {self.vocab_size} of the model"
            )

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

    def _ids(self, text: str, special: bool) -> np.ndarray:
        encoding = self._guard(
            lambda: self._tokenizer.encode(text, add_special_tokens=special)
        )
        ids = np.asarray(encoding.ids, np.int64)
        return _checked(ids, self.vocab_size).astype(np.int32)

    def encode(self, text: str) -> np.ndarray:
        return self._ids(text, special=False)

    def encode_prompt(self, text: str) -> np.ndarray:
        return self._ids(text, special=True)

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
            "special": self.special,
        }


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
        description.get("special"),
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
        except (KeyError, TypeError):  # not what `to_json` writes
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

"""A corpus as token ids, cut once: the first part trains, the rest validates."""

import dataclasses

import numpy as np

from vaani_jax.data.config import DataConfig
from vaani_jax.data.sources import Corpus
from vaani_jax.errors import VaaniError
from vaani_jax.paths import local, read_text
from vaani_jax.text.tokenizers import (
    HFTokenizer,
    Tokenizer,
    maker,
    read_huggingface,
)


def make_tokenizer(config: DataConfig, corpus: Corpus | None) -> Tokenizer:
    """The tokenizer that a config names, made for a corpus.

    None will do for one that does not look at the text (`Kind.needs_text`).
    """
    if config.tokenizer_file:
        path = local(config.tokenizer_file, "data.tokenizer_file")
        if path.is_dir():
            raise VaaniError(
                f"data.tokenizer_file is {path}, a folder: name the tokenizer.json"
                " in it"
            )
        return read_huggingface(read_text(path), path.parent)
    make = maker(config.tokenizer).make
    assert make is not None
    return make("" if corpus is None else corpus.text)


@dataclasses.dataclass(frozen=True)
class Encoded:
    """A text as token ids.

    Attributes:
      ids: int32 [length].
      lost: share of the text's characters that don't come back from the ids.
      ends: where in the UTF-8 of the text each token ends, int64 [length]; None where
        the ids spell the text, so that it can be had from them.
    """

    ids: np.ndarray
    lost: float = 0.0
    ends: np.ndarray | None = None


def encoded(tokenizer: Tokenizer, text: str) -> Encoded:
    """Encodes a text, and finds out what of it is lost.

    Ids of a tokenizer that drops line breaks, or has [UNK] for most words, say little
    of how long the text is that they stand for.
    """
    ids = tokenizer.encode(text)
    back = tokenizer.decode(ids)
    if back == text:
        return Encoded(ids)
    before, after = _histograms(text, back)
    lost = int(np.maximum(before - after, 0).sum()) / len(text)
    if isinstance(tokenizer, HFTokenizer):
        _, ends = tokenizer.encode_spans(text)
    else:  # nothing says where a token ends: evenly
        ends = (np.arange(len(ids), dtype=np.int64) + 1) * len(text) // len(ids)
    sizes = np.concatenate([[0], np.cumsum(_utf8_lengths(text))])
    return Encoded(ids, lost, np.maximum.accumulate(sizes[ends]))


@dataclasses.dataclass(frozen=True)
class Split:
    """Token ids of a corpus, cut in two.

    Attributes:
      train, validation: int32 [length].
      lost: share of the corpus's characters that don't come back from the ids.
      validation_ends: see `Encoded.ends`; of the validation part.
    """

    train: np.ndarray
    validation: np.ndarray
    lost: float = 0.0
    validation_ends: np.ndarray | None = None


def split_tokens(
    config: DataConfig, corpus: Corpus, tokenizer: Tokenizer, seq_len: int
) -> Split:
    """Encodes a corpus and cuts it.

    Raises VaaniError if either part is shorter than one window of ``seq_len + 1``.
    """
    found = encoded(tokenizer, corpus.text)
    ids, ends = found.ids, found.ends
    cut = int(len(ids) * (1 - config.validation_fraction))
    split = Split(
        ids[:cut], ids[cut:], found.lost, None if ends is None else ends[cut:]
    )
    for name, part in (("training", split.train), ("validation", split.validation)):
        if len(part) < seq_len + 1:
            raise VaaniError(
                f"the {name} part of {corpus.source} has {len(part):,} tokens, fewer"
                f" than one window of max_seq_len + 1 = {seq_len + 1}: take a longer"
                " text, a shorter model.max_seq_len or another"
                " data.validation_fraction"
            )
    return split


LOST = 1e-3  # share of the characters that is worth a line
STRANGE = 0.25  # bits per character between two kinds of text


def lost_note(lost: float) -> str:
    """What to say of a tokenizer that loses this share of a text; may be nothing."""
    if lost < LOST:
        return ""
    return (
        f"this tokenizer loses {lost:.1%} of the text's characters, which do not come"
        " back from its ids: a model can't write them; bits per byte count the bytes of"
        " the text itself"
    )


def held_out_note(config: DataConfig, corpus: Corpus) -> str:
    """What to say of a held-out part that is no sample of the text; may be nothing."""
    cut = int(len(corpus.text) * (1 - config.validation_fraction))
    apart = _apart(corpus.text[:cut], corpus.text[cut:])
    if apart < STRANGE:
        return ""
    where = ""
    if corpus.files:
        name, length = corpus.files[-1]
        alone = len(corpus.text) - cut <= length
        where = f"comes from {name} alone, and " if alone else ""
    return (
        f"the held-out part {where}is another kind of text than the rest (its"
        f" characters differ by {apart:.2f} bits): its loss measures that, too, and may"
        " rise where nothing is wrong"
    )


def _apart(one: str, other: str) -> float:
    """Kullback-Leibler divergence of the characters of ``other`` from those of ``one``.

    In bits per character, less what chance makes of it in a short text.
    """
    if not one or not other:
        return 0.0
    q, p = _histograms(one, other)
    seen = (p + q) > 0
    p, q = p[seen] / p.sum(), (q[seen] + 1) / (q[seen] + 1).sum()
    used = p > 0
    divergence = float(np.sum(p[used] * np.log2(p[used] / q[used])))
    return divergence - (int(used.sum()) - 1) / (2 * len(other) * np.log(2))


def _code_points(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")


def _histograms(one: str, other: str) -> tuple[np.ndarray, np.ndarray]:
    """How often each code point occurs in two texts."""
    points = _code_points(one), _code_points(other)
    size = 1 + int(max(p.max(initial=0) for p in points))
    first, second = (np.bincount(p, minlength=size) for p in points)
    return first, second


def _utf8_lengths(text: str) -> np.ndarray:
    """Bytes of each character."""
    points = _code_points(text)
    return 1 + np.searchsorted(np.asarray([0x80, 0x800, 0x10000]), points, "right")

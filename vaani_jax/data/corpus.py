"""A corpus as token ids, cut once: the first part trains, the rest validates."""

import dataclasses

import numpy as np

from vaani_jax.data.config import DataConfig
from vaani_jax.data.sources import Corpus
from vaani_jax.errors import VaaniError
from vaani_jax.paths import local, read_text
from vaani_jax.text.special import read_special
from vaani_jax.text.tokenizers import HFTokenizer, Tokenizer, maker


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
        return HFTokenizer(read_text(path), special=read_special(path.parent))
    make = maker(config.tokenizer).make
    assert make is not None
    return make("" if corpus is None else corpus.text)


@dataclasses.dataclass(frozen=True)
class Split:
    """Token ids of a corpus: ``train`` and ``validation``, int32 [length]."""

    train: np.ndarray
    validation: np.ndarray


def split_tokens(
    config: DataConfig, corpus: Corpus, tokenizer: Tokenizer, seq_len: int
) -> Split:
    """Encodes a corpus and cuts it.

    Raises VaaniError if either part is shorter than one window of ``seq_len + 1``.
    """
    ids = tokenizer.encode(corpus.text)
    cut = int(len(ids) * (1 - config.validation_fraction))
    split = Split(ids[:cut], ids[cut:])
    for name, part in (("training", split.train), ("validation", split.validation)):
        if len(part) < seq_len + 1:
            raise VaaniError(
                f"the {name} part of {corpus.source} has {len(part):,} tokens, fewer"
                f" than one window of max_seq_len + 1 = {seq_len + 1}: take a longer"
                " text, a shorter model.max_seq_len or another"
                " data.validation_fraction"
            )
    return split

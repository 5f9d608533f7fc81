"""Corpora, their download, and batches as a pure function of (seed, step).

A corpus is one string, cut once: the first part trains, the rest validates. Training
windows are ``seq_len + 1`` tokens, so that inputs and targets overlap by all but one.
Each epoch cuts the training part afresh, at an offset of its own, and takes its windows
in an order of its own; nothing has to be saved to resume in the middle of one.
"""

import dataclasses
import glob
import hashlib
import os
import pathlib
import platform
import sysconfig
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Any, Literal

import grain
import numpy as np

from vaani_jax.errors import VaaniError
from vaani_jax.files import write_atomically
from vaani_jax.tokenizer import (
    ByteTokenizer,
    CharTokenizer,
    HFTokenizer,
    Tokenizer,
)

TINY_SHAKESPEARE_URL = (
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/"
    "input.txt"
)
TINY_SHAKESPEARE_BYTES = 1_115_394
TINY_SHAKESPEARE_SHA256 = (
    "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
)
# The fallback corpus stops at the file that passes this size: a few MB are plenty.
STDLIB_BYTES = 2_000_000

Notify = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where text comes from and how it is cut.

    Attributes:
      path: a text file, a folder (every file below it, sorted) or a glob; empty for
        Tiny Shakespeare.
      data_dir: cache for downloads; empty for $VAANI_DATA_DIR, else
        ``~/.cache/vaani``.
      fallback: whether a failed download falls back to the sources of Python's
        standard library; False makes it an error.
      download_timeout: seconds to wait for the network, each time.
      download_attempts: how often to try.
      tokenizer: "char" or "byte".
      tokenizer_file: a ``tokenizer.json`` of Hugging Face to use in its place.
      validation_fraction: share of the corpus, at its end, that is held out.
    """

    path: str = ""
    data_dir: str = ""
    fallback: bool = True
    download_timeout: float = 10.0
    download_attempts: int = 3
    tokenizer: Literal["char", "byte"] = "char"
    tokenizer_file: str = ""
    validation_fraction: float = 0.1

    def __post_init__(self) -> None:
        if not 0 < self.validation_fraction < 1:
            raise VaaniError(
                f"data.validation_fraction is {self.validation_fraction}: it must be"
                " between 0 and 1"
            )
        if self.download_attempts < 1 or self.download_timeout <= 0:
            raise VaaniError(
                "data.download_attempts must be at least 1 and data.download_timeout"
                " above 0 seconds"
            )


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Text with its origin.

    Attributes:
      text: everything, training part first.
      source: what it is, for people: a path, or a name.
      sha256: of the UTF-8 text, to recognise the same corpus in a resumed run.
    """

    text: str
    source: str
    sha256: str

    @classmethod
    def of(cls, text: str, source: str) -> "Corpus":
        digest = hashlib.sha256(text.encode("utf-8")).hexdigest()
        return cls(text, source, digest)


def load_corpus(config: DataConfig, notify: Notify = print) -> Corpus:
    """The corpus that a config names.

    Args:
      config: see `DataConfig`.
      notify: receives one line for whatever a person should know: the progress of a
        download, a fallback.

    Raises:
      VaaniError: nothing there, nothing in it, not text, or no network and no
        fallback allowed.
    """
    if config.path:
        return _read_path(config.path)
    cached = data_dir(config) / "tinyshakespeare.txt"
    name = "Tiny Shakespeare"
    if cached.exists():
        content = _read_bytes(cached)
        if _is_tiny_shakespeare(content):
            return Corpus.of(content.decode("ascii"), name)
        notify(f"{cached} is damaged (wrong sha256): downloading it again")
    try:
        content = download(
            TINY_SHAKESPEARE_URL,
            expected_bytes=TINY_SHAKESPEARE_BYTES,
            timeout=config.download_timeout,
            attempts=config.download_attempts,
            notify=notify,
        )
        if not _is_tiny_shakespeare(content):
            raise OSError("what was downloaded is not Tiny Shakespeare (wrong sha256)")
    except OSError as error:
        hint = (
            f"could not download Tiny Shakespeare: {error}. Put the file at {cached},"
            " or choose a text of yours with --config.data.path=FILE"
        )
        if not config.fallback:
            raise VaaniError(hint) from None
        corpus = _standard_library()
        notify(
            f"NOTICE: {hint}. Training on {corpus.source} instead"
            f" ({len(corpus.text):,} characters)."
        )
        return corpus
    try:
        write_atomically(cached, content)
    except OSError as error:
        notify(f"could not keep the download at {cached}: {error}")
    return Corpus.of(content.decode("ascii"), name)


def data_dir(config: DataConfig) -> pathlib.Path:
    """The folder that downloads are kept in."""
    chosen = config.data_dir or os.environ.get("VAANI_DATA_DIR", "")
    if chosen:
        return pathlib.Path(chosen).expanduser()
    cache = os.environ.get("XDG_CACHE_HOME", "") or "~/.cache"
    return pathlib.Path(cache).expanduser() / "vaani"


def download(
    url: str,
    *,
    expected_bytes: int,
    timeout: float,
    attempts: int,
    notify: Notify = print,
) -> bytes:
    """Fetches a URL, with a time-out, retries and progress.

    Raises OSError when the last attempt fails too.
    """
    notify(f"downloading {url} ({expected_bytes / 1e6:.1f} MB)")
    for attempt in range(1, attempts + 1):
        try:
            with urllib.request.urlopen(url, timeout=timeout) as response:
                parts, received, tenths = [], 0, 0
                while part := response.read(1 << 16):
                    parts.append(part)
                    received += len(part)
                    if received > 2 * expected_bytes:
                        raise OSError("the server sends more than the file holds")
                    if 10 * received // expected_bytes > tenths:
                        tenths = 10 * received // expected_bytes
                        notify(f"  {received / 1e6:.1f} MB ({10 * tenths} %)")
                if received < expected_bytes:
                    raise OSError(
                        f"the connection ended after {received:,} of"
                        f" {expected_bytes:,} bytes"
                    )
                return b"".join(parts)
        except (OSError, ValueError) as error:
            # URLError is an OSError; http.client raises ValueErrors for bad replies.
            reason = getattr(error, "reason", None) or error
            if attempt == attempts:
                raise OSError(f"{reason} ({attempts} attempts)") from None
            pause = 0.5 * 2 ** (attempt - 1)
            notify(f"  attempt {attempt} failed: {reason}; again in {pause:g} s")
            time.sleep(pause)
    raise AssertionError("unreachable")


def _is_tiny_shakespeare(content: bytes) -> bool:
    return hashlib.sha256(content).hexdigest() == TINY_SHAKESPEARE_SHA256


def _read_bytes(path: pathlib.Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise VaaniError(f"can't read {path}: {error.strerror or error}") from None


def _read_path(pattern: str) -> Corpus:
    path = pathlib.Path(pattern).expanduser()
    if path.is_file():
        files = [path]
    elif path.is_dir():
        files = sorted(
            f
            for f in path.rglob("*")
            if f.is_file()
            and not any(part.startswith(".") for part in f.relative_to(path).parts)
        )
    else:
        files = [pathlib.Path(f) for f in sorted(glob.glob(str(path), recursive=True))]
        files = [f for f in files if f.is_file()]
    if not files:
        raise VaaniError(f"no file at --config.data.path={pattern}")
    texts = []
    for file in files:
        try:
            texts.append(_read_bytes(file).decode("utf-8"))
        except UnicodeDecodeError as error:
            raise VaaniError(
                f"{file} is not UTF-8 text (byte {error.start:,}); convert it, or name"
                " only text files with a glob"
            ) from None
    text = "\n".join(texts)
    if not text:
        raise VaaniError(f"the text at --config.data.path={pattern} is empty")
    return Corpus.of(
        text, pattern if len(files) == 1 else f"{pattern} ({len(files)} files)"
    )


def _standard_library() -> Corpus:
    folder = pathlib.Path(sysconfig.get_path("stdlib"))
    parts: list[str] = []
    size = 0
    for file in sorted(folder.glob("*.py")):
        content = _read_bytes(file)
        if content.isascii():
            parts.append(content.decode("ascii"))
            size += len(content)
        if size >= STDLIB_BYTES:
            break
    if not parts:
        raise VaaniError(
            f"no Python sources in {folder} to fall back to: choose a text with"
            " --config.data.path=FILE"
        )
    version = platform.python_version()
    return Corpus.of(
        "\n".join(parts), f"the sources of Python {version}'s standard library"
    )


def make_tokenizer(config: DataConfig, corpus: Corpus | None) -> Tokenizer:
    """The tokenizer that a config names, made for a corpus.

    None will do for one where characters are not the tokens.
    """
    if config.tokenizer_file:
        path = pathlib.Path(config.tokenizer_file).expanduser()
        try:
            return HFTokenizer(_read_bytes(path).decode("utf-8"))
        except UnicodeDecodeError:
            raise VaaniError(f"{path} is not UTF-8 text") from None
    if config.tokenizer == "byte":
        return ByteTokenizer()
    assert corpus is not None
    return CharTokenizer.from_text(corpus.text)


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


class Batches:
    """Training batches: random access, a pure function of seed and step.

    Attributes:
      windows_per_epoch: windows in one pass; the last offset of an epoch may leave a
        remainder shorter than a window, which other epochs cover.
      steps_per_epoch: whole batches in one pass.
    """

    def __init__(
        self, tokens: np.ndarray, *, seq_len: int, batch_size: int, seed: int
    ) -> None:
        self._tokens = tokens
        self._seq_len = seq_len
        self._seed = seed
        # One window short, so that any offset below seq_len fits.
        self.windows_per_epoch = max(1, (len(tokens) - 1) // seq_len - 1)
        self.steps_per_epoch = max(1, self.windows_per_epoch // batch_size)
        self._batch_size = batch_size
        self._windows = (
            grain.MapDataset.range(self.windows_per_epoch)
            .seed(seed)
            .shuffle()
            .repeat(None)
            .map_with_index(self._window)
        )

    def _offset(self, epoch: int) -> int:
        """Where this epoch's first window starts."""
        spare = len(self._tokens) - self.windows_per_epoch * self._seq_len
        rng = np.random.Generator(np.random.Philox(key=[self._seed, epoch]))
        return int(rng.integers(min(self._seq_len, spare)))

    def _window(self, index: int, window: int) -> np.ndarray:
        start = self._offset(index // self.windows_per_epoch) + window * self._seq_len
        return self._tokens[start : start + self._seq_len + 1]

    def batch_at(self, step: int, rows: slice = slice(None)) -> np.ndarray:
        """Token ids [batch_size, seq_len + 1], int32, of a step counted from 0.

        With ``rows``, only these are read.
        """
        first = step * self._batch_size
        wanted = range(self._batch_size)[rows]
        return np.stack([self._windows[first + row] for row in wanted])


def validation_windows(tokens: np.ndarray, seq_len: int) -> np.ndarray:
    """ALL non-overlapping windows [n, seq_len + 1] of the held-out part.

    Window i holds tokens ``i * seq_len`` to ``(i + 1) * seq_len`` inclusive: every
    token but the first is predicted at most once; fewer than ``seq_len`` at the end
    are left out.
    """
    count = (len(tokens) - 1) // seq_len
    starts = np.arange(count)[:, None] * seq_len
    return tokens[starts + np.arange(seq_len + 1)[None, :]]


def as_json(corpus: Corpus) -> dict[str, Any]:
    """What a run's metadata says of its corpus."""
    return {
        "source": corpus.source,
        "sha256": corpus.sha256,
        "characters": len(corpus.text),
    }

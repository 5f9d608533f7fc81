"""Where text comes from: files, a download, or Python's own sources."""

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
from typing import Any

from vaani_jax.data.config import DataConfig
from vaani_jax.errors import VaaniError
from vaani_jax.files import write_atomically
from vaani_jax.paths import cache_folder, local, read_bytes, read_text
from vaani_jax.settings import named

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


OPENING = 16  # characters of a text that begins with a long word, or has no spaces


Notify = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Text with its origin.

    Attributes:
      text: everything, training part first.
      source: what it is, for people: a path, or a name.
      sha256: of the UTF-8 text, to recognize the same corpus in a resumed run.
      files: name and characters of each file, in order, where there are several.
    """

    text: str
    source: str
    sha256: str
    files: tuple[tuple[str, int], ...] = ()

    @classmethod
    def of(
        cls, text: str, source: str, files: tuple[tuple[str, int], ...] = ()
    ) -> "Corpus":
        digest = hashlib.sha256(text.encode("utf-8")).hexdigest()
        return cls(text, source, digest, files)

    @property
    def opening(self) -> str:
        """How the text begins: its first word, or as much of it as makes a prompt."""
        words = self.text[:1000].split(maxsplit=1)
        return (words or [self.text])[0][:OPENING]


def load_corpus(config: DataConfig, notify: Notify = print) -> Corpus:
    """The corpus that a config names.

    Args:
      config: see `DataConfig`.
      notify: receives one line for whatever a person should know: the progress of a
        download, a fallback.

    Raises:
      VaaniError: no such source; nothing there, nothing in it, not text, or no
        network and no fallback allowed.
    """
    name = config.source or ("path" if config.path else "tiny_shakespeare")
    return named(SOURCES, name, "data.source")(config, notify)


def _tiny_shakespeare(config: DataConfig, notify: Notify) -> Corpus:
    folder = data_dir(config)
    cached = None if folder is None else folder / "tinyshakespeare.txt"
    name = "Tiny Shakespeare"
    if cached is not None and cached.exists():
        content = read_bytes(cached)
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
        where = "" if cached is None else f"Put the file at {cached}, or choose"
        hint = (
            f"could not download Tiny Shakespeare: {error}. {where or 'Choose'} a text"
            " of yours with --config.data.path=FILE"
        )
        if not config.fallback:
            raise VaaniError(hint) from None
        corpus = _standard_library(config, notify)
        notify(
            f"NOTICE: {hint}. Training on {corpus.source} instead"
            f" ({len(corpus.text):,} characters)."
        )
        return corpus
    if cached is None:
        notify("the download is not kept, without a home: set --config.data.data_dir")
        return Corpus.of(content.decode("ascii"), name)
    try:
        write_atomically(cached, content)
    except OSError as error:
        notify(f"could not keep the download at {cached}: {error}")
    return Corpus.of(content.decode("ascii"), name)


def as_json(corpus: Corpus) -> dict[str, Any]:
    """What a run's metadata says of its corpus."""
    return {
        "source": corpus.source,
        "sha256": corpus.sha256,
        "characters": len(corpus.text),
        "opening": corpus.opening,
    }


def data_dir(config: DataConfig) -> pathlib.Path | None:
    """The folder that downloads are kept in; None where there is no home for it."""
    if config.data_dir:
        return local(config.data_dir, "data.data_dir")
    if chosen := os.environ.get("VAANI_DATA_DIR", ""):
        return local(chosen, "VAANI_DATA_DIR")
    return cache_folder()


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


def _files(config: DataConfig, notify: Notify) -> Corpus:
    del notify
    pattern = config.path
    if not pattern:
        raise VaaniError("data.source is 'path': say which with --config.data.path")
    path = local(pattern, "data.path")
    if path.exists() and not path.is_dir():  # a pipe will do as well
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
    advice = "convert it, or name only text files with a glob"
    texts = [read_text(file, advice) for file in files]
    # A vocabulary gets no character that no text has.
    between = "\n" if any("\n" in text for text in texts) else ""
    text = between.join(texts)
    if not text:
        raise VaaniError(f"the text at --config.data.path={pattern} is empty")
    if len(files) == 1:
        return Corpus.of(text, pattern)
    lengths = [len(text) + len(between) for text in texts]
    parts = tuple(zip(map(str, files), lengths, strict=True))
    return Corpus.of(text, f"{pattern} ({len(files)} files)", parts)


def _standard_library(config: DataConfig, notify: Notify) -> Corpus:
    del config, notify  # there is nothing to choose, and nothing to say
    folder = pathlib.Path(sysconfig.get_path("stdlib"))
    parts: list[str] = []
    size = 0
    for file in sorted(folder.glob("*.py")):
        content = read_bytes(file)
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


# A source gives the corpus of a config, and says by `Notify` what a person should know;
# it raises VaaniError where there is nothing. A further source is a function and a row.
SOURCES: dict[str, Callable[[DataConfig, Notify], Corpus]] = {
    "path": _files,
    "tiny_shakespeare": _tiny_shakespeare,
    "python": _standard_library,
}

"""Corpora from disk and from a server that misbehaves; batches as a pure function."""

import argparse
import hashlib
import http.server
import pathlib
import sys
import threading
import time

import numpy as np
import pytest

from vaani_jax.data import sources
from vaani_jax.data.batches import Batches, validation_windows
from vaani_jax.data.config import DataConfig
from vaani_jax.data.corpus import (
    encoded,
    held_out_note,
    lost_note,
    split_tokens,
)
from vaani_jax.data.sources import Corpus, load_corpus
from vaani_jax.errors import VaaniError
from vaani_jax.evaluate.loss import ValidationSet
from vaani_jax.text.tokenizers import ByteTokenizer, CharTokenizer, HFTokenizer

PLAY = b"".join(b"Line %05d: speak, speak!\n" % i for i in range(4000))


class Server(http.server.ThreadingHTTPServer):
    """Answers request i as ``script[i]`` says; the last entry for ever."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.script, self.requests, self.released = ["whole"], 0, threading.Event()
        self.url = f"http://127.0.0.1:{self.server_port}/input.txt"


class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *arguments):
        pass

    def do_GET(self):
        server = self.server
        assert isinstance(server, Server)
        behavior = server.script[min(server.requests, len(server.script) - 1)]
        server.requests += 1
        if behavior == "hang":
            server.released.wait(20)
            return
        if behavior == "error":
            self.send_error(503)
            return
        bodies = {"swapped": PLAY[:-2] + b"?\n", "oversize": PLAY * 3}
        body = bodies.get(behavior, PLAY)
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: len(body) // 2] if behavior == "truncated" else body)


@pytest.fixture
def server(monkeypatch):
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        monkeypatch.setattr(sources, "TINY_SHAKESPEARE_URL", server.url)
        monkeypatch.setattr(sources, "TINY_SHAKESPEARE_BYTES", len(PLAY))
        digest = hashlib.sha256(PLAY).hexdigest()
        monkeypatch.setattr(sources, "TINY_SHAKESPEARE_SHA256", digest)
        yield server
        server.released.set()
        server.shutdown()
        thread.join()


@pytest.fixture
def pauses(monkeypatch):
    """Retries at once, and tells how long they would have waited."""
    waited: list[float] = []
    monkeypatch.setattr(time, "sleep", waited.append)
    return waited


def refusal(config) -> str:
    """The one line that a config earns."""
    with pytest.raises(VaaniError) as caught:
        load_corpus(config, lambda line: None)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_file(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("zwei\r\nZeilen: वाणी".encode())
    corpus = load_corpus(DataConfig(path=str(path)))
    assert corpus.text == "zwei\r\nZeilen: वाणी"
    assert corpus.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert corpus.source == str(path)


def test_folder_and_glob(tmp_path):
    for name in ("b.txt", "a.md", "sub/c.txt", ".hidden.txt", ".git/config"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"[{name}]\n")
    folder = load_corpus(DataConfig(path=str(tmp_path)))
    assert folder.text == "[a.md]\n\n[b.txt]\n\n[sub/c.txt]\n"
    assert "3 files" in folder.source
    two = "[b.txt]\n\n[sub/c.txt]\n"
    for pattern, text in (("*.txt", "[b.txt]\n"), ("**/*.txt", two)):
        assert load_corpus(DataConfig(path=f"{tmp_path}/{pattern}")).text == text


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("missing", "no file"),
        ("*.nope", "no file"),
        ("nothing", "no file"),
        ("empty", "empty"),
        ("binary", "not UTF-8 text (byte 3)"),
    ],
)
def test_unusable_path_is_one_line(tmp_path, name, words):
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "binary").write_bytes(b"abc\xff\xfe")
    (tmp_path / "nothing").mkdir()
    message = refusal(DataConfig(path=str(tmp_path / name)))
    assert words in message
    assert str(tmp_path / name) in message


@pytest.mark.parametrize("chosen", ["data_dir", "VAANI_DATA_DIR"])
def test_cache_is_found_and_kept(server, tmp_path, monkeypatch, chosen):
    config = DataConfig()
    if chosen == "data_dir":
        config = DataConfig(data_dir=str(tmp_path))  # goes before the environment
    else:
        monkeypatch.setenv(chosen, str(tmp_path))
    said: list[str] = []
    first = load_corpus(config, said.append)
    assert (first.text, first.source) == (PLAY.decode(), "Tiny Shakespeare")
    assert first.sha256 == hashlib.sha256(PLAY).hexdigest()
    assert server.url in said[0]
    assert list(tmp_path.iterdir()) == [tmp_path / "tinyshakespeare.txt"]
    assert (tmp_path / "tinyshakespeare.txt").read_bytes() == PLAY
    again = load_corpus(config, pytest.fail)  # nothing to tell
    assert again == first
    assert server.requests == 1


def test_damaged_cache_is_downloaded_again(server, tmp_path):
    cached = tmp_path / "tinyshakespeare.txt"
    cached.write_bytes(PLAY[:-1])
    said: list[str] = []
    corpus = load_corpus(DataConfig(data_dir=str(tmp_path)), said.append)
    assert "damaged" in said[0]
    assert corpus.text == PLAY.decode()
    assert cached.read_bytes() == PLAY
    assert server.requests == 1


@pytest.mark.parametrize(
    ("script", "words", "requests"),
    [
        (["swapped"], "wrong sha256", 1),
        (["truncated"], f"after {len(PLAY) // 2:,} of {len(PLAY):,} bytes", 3),
        (["oversize"], "more than the file holds", 3),
        (["error", "truncated", "swapped"], "wrong sha256", 3),
    ],
)
def test_bad_download(server, pauses, tmp_path, script, words, requests):
    server.script = script
    config = DataConfig(data_dir=str(tmp_path), fallback=False)
    message = refusal(config)
    assert words in message
    assert str(tmp_path / "tinyshakespeare.txt") in message  # where to put the file
    assert server.requests == requests
    assert list(tmp_path.iterdir()) == []
    assert pauses == [0.5, 1.0][: requests - 1]


@pytest.mark.parametrize("attempts", [1, 2, 4])
def test_attempts(server, pauses, attempts):
    server.script = ["error"] * (attempts - 1) + ["whole"]
    said: list[str] = []
    corpus = load_corpus(DataConfig(download_attempts=attempts), said.append)
    assert corpus.text == PLAY.decode()
    assert server.requests == attempts
    assert len([line for line in said if "failed" in line]) == attempts - 1


def test_a_server_that_hangs_is_left(server, pauses):
    server.script = ["hang"]
    config = DataConfig(download_timeout=0.1, download_attempts=2, fallback=False)
    began = time.monotonic()
    assert "timed out" in refusal(config)
    assert time.monotonic() - began < 5
    assert server.requests == 2


def test_an_unwritable_cache_is_only_told(server, tmp_path):
    blocker = tmp_path / "blocker"
    blocker.write_bytes(b"")
    said: list[str] = []
    corpus = load_corpus(DataConfig(data_dir=str(blocker)), said.append)
    assert corpus.text == PLAY.decode()
    assert "could not keep the download" in said[-1]


def test_no_network_falls_back_to_the_standard_library(server, pauses):
    server.script = ["truncated"]
    said: list[str] = []
    first = load_corpus(DataConfig(download_attempts=1), said.append)
    second = load_corpus(DataConfig(download_attempts=1), lambda line: None)
    assert first == second
    assert first.text.isascii()
    assert sources.STDLIB_BYTES <= len(first.text) < 2 * sources.STDLIB_BYTES
    assert pathlib.Path(argparse.__file__).read_text() in first.text
    notices = [line for line in said if line.startswith("NOTICE")]
    assert len(notices) == 1
    assert "\n" not in notices[0]
    for word in ("the connection ended", first.source, f"{len(first.text):,}"):
        assert word in notices[0]
    assert sys.version.split()[0] in first.source


@pytest.mark.parametrize(
    ("length", "fraction", "train"),
    [(100, 0.1, 90), (109, 0.1, 98), (100, 0.25, 75), (33, 0.5, 16)],
)
def test_split_cuts_once(length, fraction, train):
    text = "".join(map(chr, range(length)))
    config = DataConfig(validation_fraction=fraction)
    split = split_tokens(config, Corpus.of(text, ""), CharTokenizer(text), 4)
    assert split.train.tolist() == list(range(train))
    assert split.validation.tolist() == list(range(train, length))


@pytest.mark.parametrize(
    ("seq_len", "part"), [(9, None), (10, "validation"), (90, "training")]
)
def test_too_short_a_part_is_an_error(seq_len, part):
    corpus = Corpus.of("ab" * 50, "two letters")
    arguments = (DataConfig(), corpus, ByteTokenizer(), seq_len)
    if part is None:
        assert len(split_tokens(*arguments).validation) == 10
        return
    with pytest.raises(VaaniError) as caught:
        split_tokens(*arguments)
    for word in (f"the {part} part", "max_seq_len", f"{seq_len + 1}", "two letters"):
        assert word in str(caught.value)


def _batches(length, seed=0):
    tokens = np.arange(length, dtype=np.int32)
    return Batches(tokens, seq_len=4, batch_size=3, seed=seed)


def _epochs(batches, count):
    """Starts of the windows, one row per epoch; batches run on across epochs."""
    steps = -(-batches.windows_per_epoch * count // 3)
    rows = np.concatenate([batches.batch_at(i) for i in range(steps)])
    return rows[: batches.windows_per_epoch * count, 0].reshape(count, -1)


def test_batch_is_a_pure_function_of_seed_and_step():
    batches = _batches(200)
    forwards = [batches.batch_at(step).tolist() for step in range(40)]
    for step in [39, 3, 17, 0, 39]:
        assert batches.batch_at(step).tolist() == forwards[step]
        assert _batches(200).batch_at(step).tolist() == forwards[step]


@pytest.mark.parametrize("length", [5, 6, 8, 9, 11, 12, 13, 16, 17, 203, 204, 205])
def test_windows_are_slices_and_each_epoch_a_permutation(length):
    batches = _batches(length, seed=length)
    for step in range(25):
        batch = batches.batch_at(step)
        assert (batch.shape, batch.dtype) == ((3, 5), np.int32)  # never cut short
        np.testing.assert_array_equal(batch, batch[:, :1] + np.arange(5)[None, :])
        assert batch.min() >= 0
        assert batch.max() < length
    assert batches.steps_per_epoch == max(1, batches.windows_per_epoch // 3)
    for starts in _epochs(batches, 7):
        np.testing.assert_array_equal(np.diff(np.sort(starts)), 4)


def test_epochs_and_seeds_differ_in_order_and_offset():
    both = [_epochs(_batches(200, seed=seed), 12) for seed in (0, 1)]
    offsets = [epochs.min(axis=1) for epochs in both]
    assert len(set(offsets[0].tolist())) > 2
    assert offsets[0].tolist() != offsets[1].tolist()
    orders = {tuple((row - row.min()).tolist()) for row in np.concatenate(both)}
    assert len(orders) == 24


@pytest.mark.parametrize("seq_len", [1, 4, 7])
@pytest.mark.parametrize("extra", range(8))
def test_validation_predicts_every_token_once(seq_len, extra):
    length = 3 * seq_len + 1 + extra
    windows = validation_windows(np.arange(length, dtype=np.int32), seq_len)
    count = (length - 1) // seq_len
    assert windows.shape == (count, seq_len + 1)
    assert windows[:, 1:].ravel().tolist() == list(range(1, count * seq_len + 1))
    assert windows[:, :-1].ravel().tolist() == list(range(count * seq_len))


# -- Text that a tokenizer loses ---------------------------------------------------


def unknown_words():
    """As Hugging Face's quick tour: most words are lost, and what is between them."""
    library = pytest.importorskip("tokenizers")
    made = library.Tokenizer(
        library.models.WordLevel({"[UNK]": 0, "to": 1, "be": 2}, "[UNK]")
    )
    made.pre_tokenizer = library.pre_tokenizers.Whitespace()
    return HFTokenizer(made.to_str())


def test_bytes_are_those_of_the_source_where_text_is_lost():
    text = "to be वाणी का अर्थ to be है भाषा " * 40  # marks of vowels are parted
    tokenizer = unknown_words()
    found = encoded(tokenizer, text)
    assert found.ids.tolist() == [1, 2, 0, 0, 0, 1, 2, 0, 0] * 40
    # Each token ends where its word does.
    assert found.ends is not None
    words = text.encode().split()
    for i, word in enumerate(words):
        assert text.encode()[: found.ends[i]].endswith(word)
    lost = sum(not c.isascii() for c in text) / len(text)
    assert found.lost == pytest.approx(lost, abs=0.05)
    assert f"{found.lost:.1%}" in lost_note(found.lost)
    split = split_tokens(DataConfig(), Corpus.of(text, ""), tokenizer, 8)
    ends = split.validation_ends
    assert ends is not None
    windows = ValidationSet(
        split.validation, tokenizer, seq_len=8, batch_size=2, ends=ends
    )
    tail = text.encode()[ends[0] : ends[windows.tokens]]
    assert windows.bytes == len(tail)
    assert len(tail.split()) == windows.tokens


def test_nothing_is_said_of_a_tokenizer_that_loses_nothing():
    for text in ("to be वाणी\n", "a" * 50):
        for tokenizer in (ByteTokenizer(), CharTokenizer(text)):
            found = encoded(tokenizer, text)
            assert (found.lost, found.ends) == (0.0, None)
    assert lost_note(0.0) == ""


def test_a_held_out_part_of_another_kind_is_said():
    english, hindi = "to be or not to be " * 300, "वाणी का अर्थ है भाषा "
    files = (("a.txt", len(english)), ("strange.txt", 40 * len(hindi)))
    strange = Corpus.of(english + hindi * 40, "folder", files)
    note = held_out_note(DataConfig(), strange)
    assert "strange.txt alone" in note
    mixed = Corpus.of((english + hindi) * 20, "folder")
    assert held_out_note(DataConfig(), mixed) == ""
    short = Corpus.of("the quick brown fox jumps over the lazy dog. " * 5, "x")
    assert held_out_note(DataConfig(), short) == ""

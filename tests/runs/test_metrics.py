"""Rows that survive a kill, event files that others can read, lines for people."""

import contextlib
import io
import json
import math
import resource
import struct

import numpy as np
import pytest
from rich.console import Console
from tensorboardX.proto.event_pb2 import Event

from vaani_jax.runs.metrics import MetricWriter, flatten, history, read_rows
from vaani_jax.runs.tensorboard import EventWriter
from vaani_jax.train import display as display_module
from vaani_jax.train.display import Display
from vaani_jax.words import duration, size


def _crc32c(data: bytes) -> int:
    """CRC-32C (Castagnoli), masked as TFRecord has it."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    crc ^= 0xFFFFFFFF
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def _events(folder) -> list[Event]:
    """Every event below a folder, its framing checked."""
    events = []
    for file in sorted(folder.rglob("events.out.tfevents.*")):
        data = file.read_bytes()
        while data:
            length, crc = struct.unpack("<QI", data[:12])
            assert crc == _crc32c(data[:8])
            body = data[12 : 12 + length]
            (crc,) = struct.unpack_from("<I", data, 12 + length)
            assert crc == _crc32c(body)
            events.append(Event.FromString(body))
            data = data[16 + length :]
    return events


def _scalars(folder):
    return [
        (event.step, value.tag, value.simple_value)
        for event in _events(folder)
        for value in event.summary.value
        if value.HasField("simple_value")
    ]


def test_crc_of_the_standard():
    masked = _crc32c(b"123456789")  # the check value of CRC-32C is 0xE3069283
    assert masked == ((0xE3069283 >> 15 | 0xE3069283 << 17) + 0xA282EAD8) & 0xFFFFFFFF


def test_flatten():
    nested = {
        "train/loss": np.float32(0.5),
        "perf/steps": 3,
        "quant/sparsity": {
            "layers/attn/q_proj": np.array([0.25, 0.75], np.float32),
            "head": np.array(0.5),
        },
        "deep": {"er": {"still": 1.0}},
        "none": {},
    }
    row = flatten(nested)
    assert row == {
        "train/loss": 0.5,
        "perf/steps": 3.0,
        "quant/sparsity/layers/attn/q_proj[0]": 0.25,
        "quant/sparsity/layers/attn/q_proj[1]": 0.75,
        "quant/sparsity/head": 0.5,
        "deep/er/still": 1.0,
    }
    assert {type(value) for value in row.values()} == {float}


def test_history_keeps_the_steps_of_each_column():
    rows = [
        {"step": 1, "a": 1.0},
        {"step": 2, "b": 5.0},
        {"step": 3, "a": 2.0, "b": 6.0},
    ]
    assert history(rows) == {
        "a": {"step": [1, 3], "value": [1.0, 2.0]},
        "b": {"step": [2, 3], "value": [5.0, 6.0]},
    }
    assert history([]) == {}


def _write(workdir, start, steps):
    writer = MetricWriter(workdir, start)
    for step in steps:
        values = {"train/loss": 1 / step, "quant/scale": {"a": [step, -step]}}
        row = writer.add(step, values)
        writer.write()
        assert row["quant/scale/a[1]"] == -step
    return writer


def test_a_run_is_written_in_every_form(tmp_path):
    writer = _write(tmp_path / "new" / "run", 0, [5, 10])
    folder = tmp_path / "new" / "run"
    # On disk at once, not when the run ends.
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    writer.write_history()
    assert [json.loads(line) for line in lines] == [
        {"step": 5, "train/loss": 0.2, "quant/scale/a[0]": 5, "quant/scale/a[1]": -5},
        {
            "step": 10,
            "train/loss": 0.1,
            "quant/scale/a[0]": 10,
            "quant/scale/a[1]": -10,
        },
    ]
    assert writer.rows == read_rows(folder / "metrics.jsonl")
    columns = json.loads((folder / "training_history.json").read_text())
    assert columns["train/loss"] == {"step": [5, 10], "value": [0.2, 0.1]}


def test_tensorboard_gets_numbers_and_texts(tmp_path):
    events = EventWriter(tmp_path / "tensorboard", 0)
    assert not (tmp_path / "tensorboard").exists()  # nothing written, no file
    events.scalars(5, {"train/loss": 0.2, "quant/sparsity": 0.4})
    events.scalars(10, {"train/loss": 0.1})
    events.text(10, "samples", "वाणी")
    # On disk at once, not when the run ends.
    scalars = _scalars(tmp_path)
    texts = [
        (event.step, value.tag, value.tensor.string_val[0].decode())
        for event in _events(tmp_path)
        for value in event.summary.value
        if value.tensor.string_val
    ]
    events.close()
    losses = [(step, value) for step, tag, value in scalars if tag == "train/loss"]
    assert losses == [(5, pytest.approx(0.2)), (10, pytest.approx(0.1))]
    assert len(scalars) == 3
    assert len(texts) == 1
    assert texts[0][0] == 10
    assert texts[0][1].startswith("samples")
    assert texts[0][2] == "वाणी"


def test_tensorboard_is_told_to_forget_what_a_resumed_run_repeats(tmp_path):
    for start in (0, 20):
        events = EventWriter(tmp_path, start)
        events.scalars(start + 5, {"train/loss": 0.2})
        events.close()
    session = [e for e in _events(tmp_path) if e.HasField("session_log")]
    assert session[-1].session_log.status == 1  # START
    assert session[-1].step == 21


@contextlib.contextmanager
def _no_room():
    """No file may become longer than it is, or than a byte."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_disk_without_room_raises_and_blocks_nothing(tmp_path):
    events = EventWriter(tmp_path, 0)
    events.scalars(1, {"train/loss": 3.0})
    with _no_room():
        for step in range(2, 100):
            with pytest.raises(OSError, match=r"too large|No space"):
                events.scalars(step, {"train/loss": 2.0})
    events.scalars(100, {"train/loss": 1.0})
    events.close()
    assert _scalars(tmp_path)[0] == (1, "train/loss", 3.0)
    assert _scalars(tmp_path)[-1] == (100, "train/loss", 1.0)


def test_rows_that_find_no_room_are_written_when_there_is(tmp_path):
    writer = _write(tmp_path, 0, [1, 2])
    with _no_room():
        writer.add(3, {"train/loss": 0.5})
        with pytest.raises(OSError, match="too large") as caught:
            writer.write()
        assert caught.value.filename == str(tmp_path / "metrics.jsonl")
        with pytest.raises(OSError, match="too large"):
            writer.write_history()
    assert [row["step"] for row in read_rows(tmp_path / "metrics.jsonl")] == [1, 2]
    writer.write_history()
    assert [row["step"] for row in read_rows(tmp_path / "metrics.jsonl")] == [1, 2, 3]


@pytest.mark.parametrize("lost", [1, 5, 30])
def test_a_last_line_cut_by_a_kill_is_left_out(tmp_path, lost):
    _write(tmp_path, 0, [1, 2, 3])
    path = tmp_path / "metrics.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[: -1 - lost])
    assert [row["step"] for row in read_rows(path)] == [1, 2]
    # What is written next starts on a line of its own.
    _write(tmp_path, 2, [3, 4])
    assert [row["step"] for row in read_rows(path)] == [1, 2, 3, 4]
    assert path.read_bytes().startswith(whole)


def test_rows_after_the_resume_step_are_dropped(tmp_path):
    _write(tmp_path, 0, [10, 20, 30, 40])
    writer = _write(tmp_path, 20, [25])
    writer.write_history()
    steps = [10, 20, 25]
    assert [row["step"] for row in writer.rows] == steps
    assert [row["step"] for row in read_rows(tmp_path / "metrics.jsonl")] == steps
    columns = json.loads((tmp_path / "training_history.json").read_text())
    assert columns["train/loss"]["step"] == steps


def test_nothing_written_yet(tmp_path):
    assert read_rows(tmp_path / "metrics.jsonl") == []
    (tmp_path / "metrics.jsonl").write_text('\n[1, 2]\n{"loss": 3}\n{"step": 4}\n')
    assert read_rows(tmp_path / "metrics.jsonl") == [{"step": 4}]


@pytest.mark.parametrize(
    "line",
    [
        b'{"step": "x", "train/loss": 1.0}',
        b'{"step": null}',
        b'{"step": true}',
        b"[" * 100_000,
        b"7",
        b'{"step": 1, "train/l\xff',
    ],
)
def test_damaged_rows_are_passed_over(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(line + b'\n{"step": 2, "train/loss": 1.5, "x": "y"}\n')
    assert read_rows(path) == [{"step": 2, "train/loss": 1.5}]
    writer = MetricWriter(tmp_path, 2)
    writer.write_history()


def test_a_loss_that_is_no_number_can_be_read_back(tmp_path):
    writer = MetricWriter(tmp_path, 0)
    writer.add(1, {"train/loss": np.float32("nan"), "b": np.float32("inf")})
    writer.write()
    writer.write_history()
    for name in ("metrics.jsonl", "training_history.json"):
        text = (tmp_path / name).read_text()
        assert "NaN" not in text  # which is no JSON
        assert "Infinity" not in text
    (row,) = read_rows(tmp_path / "metrics.jsonl")
    assert math.isnan(row["train/loss"])
    assert math.isnan(row["b"])


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0.0 s"),
        (4.24, "4.2 s"),
        (59.9, "59.9 s"),
        (60, "1 min 00 s"),
        (185.4, "3 min 05 s"),
        (3599, "59 min 59 s"),
        (3599.6, "1 h 00 min"),
        (3725, "1 h 02 min"),
        (90_000, "25 h 00 min"),
    ],
)
def test_duration(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1 kB"),
        (211_056, "211 kB"),
        (1_529_856, "1.53 MB"),
        (21_300_000, "21.3 MB"),
        (2_500_000_000, "2.5 GB"),
    ],
)
def test_size(number, text):
    assert size(number) == text


VALUES = {
    "train/loss": 1.23456,
    "eval/loss": 2.0,
    "train/learning_rate": 0.00123,
    "train/gradient_norm": 0.456,
    "quant/mean_sparsity": 0.3333,
    "perf/tokens_per_second": 12345.6,
}


def test_display_prints_plain_lines_without_a_terminal(monkeypatch):
    monkeypatch.setattr(display_module, "LINE_SECONDS", 0.0)
    file = io.StringIO()
    with Display(
        Console(file=file, force_terminal=False, width=40), 2000, 0
    ) as display:
        display.update(1000, VALUES, 185.0)
        display.update(1010, {"train/loss": 1.0}, 0.0)  # the rest is remembered
        display.say("[not markup] " + "long " * 20)
    first, second, said = file.getvalue().splitlines()
    assert " ".join(first.split()) == (
        "step 1,000/2,000 loss 1.2346 val 2.0000 lr 1.23e-03 grad 0.46 zeros 33.3%"
        " 12,346 tokens/s ETA 3 min 05 s"
    )
    assert "loss 1.0000  val 2.0000" in second
    assert "ETA" not in second
    assert said == "[not markup] " + "long " * 20  # not wrapped, not interpreted
    assert "\x1b" not in file.getvalue()


def test_display_is_silent_between_lines(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(display_module.time, "monotonic", lambda: now[0])
    file = io.StringIO()
    with Display(Console(file=file, force_terminal=False), 100, 0) as display:
        for step in range(1, 21):
            now[0] += 1.0
            display.update(step, {"train/loss": 1.0}, 0.0)
    lines = file.getvalue().splitlines()
    assert [line.split("/")[0].split()[-1] for line in lines] == ["5", "10", "15", "20"]


def test_display_on_a_terminal(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, width=120, color_system=None)
    with Display(console, 2000, 500) as display:
        display.update(1000, VALUES, 185.0)
        display.say("[a line] above the bar")
    shown = file.getvalue()
    assert "\x1b" in shown
    for words in ("1000/2000", "50%", "loss 1.2346", "ETA 3 min", "[a line] above"):
        assert words in shown


def test_display_prints_plain_lines_on_a_dumb_terminal(monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.setattr(display_module, "LINE_SECONDS", 0.0)
    file = io.StringIO()
    with Display(Console(file=file, force_terminal=True), 2000, 0) as display:
        display.update(1000, VALUES, 185.0)
    assert "loss 1.2346" in file.getvalue()


def test_display_on_a_terminal_lets_errors_through(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    console = Console(file=io.StringIO(), force_terminal=True)

    def fail():
        with Display(console, 10, 0) as display:
            display.update(1, {}, 0.0)
            raise KeyError("mine")

    for _ in range(2):  # the second time the console is free again
        with pytest.raises(KeyError, match="mine"):
            fail()

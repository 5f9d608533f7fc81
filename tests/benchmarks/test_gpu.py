"""benchmarks/gpu.py keeps what it finds, whatever becomes of a part."""

import importlib
import json
import pathlib
import signal
import sys
import time

import pytest

BENCHMARKS = pathlib.Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """The script, with stages of one line in place of its own, and its folder."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    script = importlib.import_module("gpu")
    body = """
import json, os, pathlib, signal, sys, time
stage, part, folder = sys.argv[1:4]
if "--compile" in sys.argv:
    raise SystemExit(0)
def row(name):
    with open(pathlib.Path(folder) / "rows.jsonl", "a") as file:
        line = {"stage": stage, "part": part, "name": name, "value": 1}
        file.write(json.dumps(line) + "\\n")
print(part, flush=True)
row(f"{part} begun")
if part == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
if part == "greedy":
    raise RuntimeError("RESOURCE_EXHAUSTED: 90 GB asked for")
if part == "wrong":
    raise ValueError("no such thing")
if part == "slow":
    time.sleep(600)
row(part)
"""
    stages = tmp_path / "stages.py"
    stages.write_text(body)
    kinds = script.gpu_stages
    parts = ("well", "killed", "greedy", "wrong", "slow", "last")
    stage = kinds.Stage(lambda part: None, parts, parts[:1], 3.0, ("value", "note"))
    monkeypatch.setattr(kinds, "__file__", str(stages))
    monkeypatch.setattr(kinds, "STAGES", {"machine": stage})
    monkeypatch.setattr(kinds, "TABLES", {"machine": stage.columns})
    monkeypatch.setattr(script, "LEAST", 0.5)
    folder = tmp_path / "out"

    def run(*flags):
        arguments = ["gpu.py", f"--out={folder}", *flags]
        monkeypatch.setattr(sys, "argv", arguments)
        status = script.main()
        lines = (folder / "rows.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        return status, rows, json.loads((folder / "gpu.json").read_text())

    return run


def test_a_part_that_fails_leaves_the_others_whole(gpu):
    status, rows, tables = gpu()
    assert status == 0
    notes = {row["part"]: row["note"] for row in rows if "note" in row}
    assert notes == {
        "killed": f"killed by signal {int(signal.SIGKILL)}",
        "greedy": "out of memory",
        "wrong": "ValueError: no such thing",
        "slow": "took more than 3 s",
    }
    found = {line[0] for line in tables["tables"]["machine"]["rows"]}
    assert {"well", "last", "killed begun", "killed", "slow"} <= found


def test_what_is_done_is_not_done_again(gpu, capfd):
    gpu("--only=well;killed")
    capfd.readouterr()
    _, rows, _ = gpu("--resume", "--only=well;killed")
    assert [line for line in capfd.readouterr().out.split() if line == "well"] == []
    assert sum(row.get("name") == "killed begun" for row in rows) == 2
    assert sum(row.get("name") == "well" for row in rows) == 1


def test_the_whole_has_a_limit(gpu):
    start = time.monotonic()
    _, rows, _ = gpu("--only=slow;last", "--minutes=0.02")
    assert time.monotonic() - start < 3
    assert not any(row.get("name") == "last" for row in rows)


def test_a_row_that_was_cut_off_is_passed_over(gpu):
    gpu("--only=well")
    folder = pathlib.Path(sys.argv[1].removeprefix("--out="))
    with open(folder / "rows.jsonl", "a") as file:
        file.write('{"stage": "mach')
    kept = sys.modules["gpu"].Rows(folder)
    before = kept.all()
    row = {"stage": "machine", "part": "last", "name": "last", "value": 2}
    kept.add(row)
    assert kept.all() == [*before, row]
    kept.assemble("again", False)
    tables = json.loads((folder / "gpu.json").read_text())["tables"]
    assert {line[0] for line in tables["machine"]["rows"]} >= {"well", "last"}

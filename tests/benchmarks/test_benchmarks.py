"""Every benchmark runs to its table, at toy size; its figures say nothing here."""

import importlib.util
import os
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
# Of each script, what its table shows: patterns that standard output must hold.
TABLES = {
    "decode": [r"toy, 1 thread", r"vaani +\d"],
    "faults": [
        r"kill -9 at any moment +10 +10 +0 +0 +0",
        r"kill -9 within a write +10 +10 +0 +0 +0",
        r"damaged checkpoints +\d+ +\d+ +0 +0 +0",
        r"write errors, train +1 +1 +0 +0 +0",
    ],
    "gpu": [
        r"chip: value cpu",
        r"100 x 72, 33 rows: outputs 7128, different 0",
        r"generation, packed: .*same_text True",
        r"toy, packed, 1: tokens_s",
        r"toy, bfloat16, 1: tokens_s",
        r"toy, ternary, int8: batch 2, tokens_s",
        r"64 tokens, ours: batch 4, ms",
        r"toy, ternary, bfloat16: all: count",
        r"32 rows, ours: us",
        r"steps: steps 4, of 4, to_go_on",
    ],
    "gguf_parity": [r"4 windows of 64 tokens", r"\| Vaani \| \| \d"],
    "interop": [r"\| export tq2_0 \| \d", r"\| import packed \| \d"],
    "kv_cache": [
        r"float32 .* 100% .* 16 of 16 tokens",
        r"int4, not centered +\S +\d",
        r"int4 +\S +1 \S +\d",
    ],
    "law": [r"packed, 4 together +\S +6 of 6 \S +200 of 200 \S +120 of 120"],
    "plan": [r"debug, 2 device\(s\) +\d", r"micro_batch( +[\d.]+){4}"],
    "train_step": [r"Vaani, ternary +\d", r"with the tuner +\d", r"twin +\d"],
    "tuner": [
        r"auto +- +\d+\.\d{4}",
        r"schedule_free_adamw +\d+\.\d{4}",
        r"0\.3 - 0\.4 +\d",
        r"NaN batch +with +\d+\.\d{4}",
        r"x 100, 20 steps +with +\d+\.\d{4}",
    ],
}
# Imported by train_step; by faults; by gpu.
NOT_SCRIPTS = {"bitnet_torch", "mutations", "sessions", "gpu_stages", "gpu_medium"}


def test_every_script_is_run():
    scripts = {path.stem for path in (ROOT / "benchmarks").glob("*.py")}
    assert scripts == {*TABLES, *NOT_SCRIPTS}


@pytest.mark.parametrize("name", TABLES)
def test_a_benchmark_prints_its_table(name, tmp_path):
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / f"{name}.py"), "--toy"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for pattern in TABLES[name]:
        assert re.search(pattern, done.stdout), (pattern, done.stdout)
    llama = importlib.util.find_spec("llama_cpp") is not None
    if name in ("decode", "gguf_parity") and not llama:
        assert "is not installed: its rows are left out" in done.stdout + done.stderr

"""The command lines: results on standard output, one line and a status for errors."""

import json
import os
import pathlib
import subprocess
import sys

import pytest
from rich.console import Console

from vaani_jax import cli
from vaani_jax.config import from_dict
from vaani_jax.trainer import train

ROOT = pathlib.Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    text = folder / "text.txt"
    text.write_text("abcd efgh\n" * 300, encoding="utf-8")
    config = from_dict(
        {
            "num_steps": 30,
            "batch_size": 8,
            "learning_rate": 1e-2,
            "eval_interval": 10,
            "data": {"path": str(text)},
            "model": {"dim": 16, "n_layers": 1, "n_heads": 2, "max_seq_len": 20},
            "optim": {"warmup_steps": 2},
            "sample": {"max_new_tokens": 10},
        }
    )
    with open(os.devnull, "w") as sink:
        train(config, folder / "run", console=Console(file=sink))
    return folder / "run"


def test_evaluate_json(workdir, capsys):
    assert cli.main(["evaluate", "--workdir", str(workdir), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert set(result) == {"loss", "perplexity", "bits_per_byte", "tokens"}
    assert result["tokens"] == 20 * ((300 - 1) // 20)
    summary = json.loads((workdir / "run.json").read_text())
    assert result["loss"] == pytest.approx(summary["best"]["loss"], rel=1e-6)


def test_generate_streams_and_repeats(workdir, capsys):
    arguments = ["generate", "--workdir", str(workdir), "--prompt", "abc"]
    assert cli.main([*arguments, "--max-new-tokens", "50"]) == 0
    first = capsys.readouterr().out
    assert first.startswith("abc")
    assert len(first) == 3 + 50 + 1
    cli.main([*arguments, "--max-new-tokens", "50"])
    assert capsys.readouterr().out == first
    cli.main([*arguments, "--max-new-tokens", "50", "--seed", "1"])
    assert capsys.readouterr().out != first


def test_generate_json_with_several_samples(workdir, capsys):
    cli.main(
        [
            *("generate", "--workdir", str(workdir), "--prompt", "a", "--json"),
            *("--num-samples", "3", "--max-new-tokens", "7", "--temperature", "1.5"),
        ]
    )
    result = json.loads(capsys.readouterr().out)
    assert result["prompt"] == "a"
    assert [len(s) for s in result["samples"]] == [7, 7, 7]
    assert len(set(result["samples"])) > 1


def test_plot(workdir, tmp_path, capsys):
    output = tmp_path / "curves.png"
    cli.main(["plot", "--workdir", str(workdir), "--output", str(output)])
    assert capsys.readouterr().out.strip() == str(output)
    assert output.read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "--prompt", "aé"], "character 'é' (U+00E9, at position 1)"),
        (["generate", "--prompt", ""], "the prompt is empty"),
        (["generate", "--top-p", "0"], "top-p must be in (0, 1]"),
        (["generate", "--checkpoint", "7"], "no checkpoint of step 7; it has"),
        (["generate", "--checkpoint", "x"], "choose best, last or a step number"),
        (["evaluate", "--workdir", "/nonexistent"], "holds no run"),
        (["plot", "--workdir", "/nonexistent"], "no metrics.jsonl"),
    ],
)
def test_errors_are_one_line(workdir, capsys, arguments, message):
    if "--workdir" not in arguments:
        arguments = [*arguments, "--workdir", str(workdir)]
    assert cli.main(arguments) == 1
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert message in lines[0]
    assert captured.out == ""


def run_script(*command, **environment):
    return subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config=configs/none.py"], "no config file at configs/none.py"),
        (["--workdir=x"], "which config?"),
        (
            ["--config=configs/debug.py", "--config.model.dimm=3"],
            "unknown config key model.dimm; did you mean model.dim?",
        ),
        (["--config=configs/debug.py", "--config.model.dim=x"], "model.dim"),
        (["--config=configs/debug.py", "--nope=1"], "nope"),
        (
            ["--config=configs/debug.py", "--config.data.path=/nonexistent"],
            "no file at --config.data.path=/nonexistent",
        ),
    ],
)
def test_train_errors_leave_nothing_behind(tmp_path, arguments, message):
    result = run_script("train.py", *arguments, f"--workdir={tmp_path / 'run'}")
    assert result.returncode == 1
    assert result.stdout == ""
    assert len(result.stderr.splitlines()) == 1
    assert result.stderr.startswith("error: ")
    assert message in result.stderr
    assert not (tmp_path / "run").exists()


def test_no_network_falls_back_with_a_notice(tmp_path):
    """Trains anywhere; a proxy that refuses connections stands for no network."""
    proxy = "http://127.0.0.1:9"
    flags = ["--config=configs/debug.py", "--config.num_steps=2"]
    flags += [f"--workdir={tmp_path / 'run'}", f"--config.data.data_dir={tmp_path}"]
    flags += ["--config.data.download_attempts=1"]
    result = run_script("train.py", *flags, https_proxy=proxy, HTTPS_PROXY=proxy)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("NOTICE: could not download Tiny Shakespeare") == 1
    corpus = json.loads((tmp_path / "run" / "run.json").read_text())["corpus"]
    assert "standard library" in corpus["source"]
    strict = [*flags, "--config.data.fallback=False", f"--workdir={tmp_path / 'b'}"]
    result = run_script("train.py", *strict, https_proxy=proxy, HTTPS_PROXY=proxy)
    assert result.returncode == 1
    assert "could not download Tiny Shakespeare" in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_example_runs(workdir):
    result = run_script(
        "examples/inference.py", str(workdir), "abc", PYTHONPATH=str(ROOT)
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("abc")
    assert len(result.stdout.rstrip("\n")) >= 18


def test_unwritable_workdir_is_one_line(tmp_path):
    (tmp_path / "file").write_text("in the way")
    flags = ["--config=configs/debug.py", f"--workdir={tmp_path / 'file' / 'run'}"]
    text = tmp_path / "t.txt"
    text.write_text("some text to train on\n" * 100)
    result = run_script("train.py", *flags, f"--config.data.path={text}")
    assert result.returncode == 1
    assert len(result.stderr.splitlines()) == 1, result.stderr
    assert result.stderr.startswith("error: ")

"""The command lines: results on standard output, one line and a status for errors."""

import json
import os
import pathlib
import re
import subprocess
import sys
from typing import Any

import jax.numpy as jnp
import pytest
from rich.console import Console

from vaani_jax import cli
from vaani_jax.cli import generate as generate_command
from vaani_jax.inference import generate as generate_module
from vaani_jax.inference import room
from vaani_jax.model.cache import KVCache
from vaani_jax.text.tokenizers import ByteTokenizer
from vaani_jax.train.config import from_dict
from vaani_jax.train.loop import train

ROOT = pathlib.Path(__file__).resolve().parents[2]


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


def test_generate_continues_several_prompts(workdir, tmp_path, capsys):
    """As each alone: from flags or from a file, as text or as JSON."""
    command = ["generate", "--workdir", str(workdir), "--max-new-tokens", "25"]
    prompts, texts = ["abcd", "h", "efgh abcd efgh"], []
    for prompt in prompts:
        assert cli.main([*command, "--prompt", prompt]) == 0
        texts.append(capsys.readouterr().out.removesuffix("\n"))
    several = [word for prompt in prompts for word in ("--prompt", prompt)]
    assert cli.main([*command, *several]) == 0
    out = capsys.readouterr().out
    assert out == "".join(f"--- prompt {i + 1}\n{t}\n" for i, t in enumerate(texts))

    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(prompts) + "\n", encoding="utf-8")
    several = ["--prompts-file", str(file), "--num-samples", "2"]
    assert cli.main([*command, *several, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert set(result) == {"results", "checkpoint", "seed"}
    assert [r["prompt"] for r in result["results"]] == prompts
    samples = [r["samples"] for r in result["results"]]
    assert [[len(s) for s in pair] for pair in samples] == [[25, 25]] * 3
    assert [p + pair[0] for p, pair in zip(prompts, samples, strict=True)] == texts
    assert cli.main([*command, *several]) == 0
    assert "\n--- prompt 2, sample 1\nh" in capsys.readouterr().out

    file.write_text("abcd", encoding="utf-8")  # one line is a list of one
    assert cli.main([*command, "--prompts-file", str(file), "--json"]) == 0
    (only,) = json.loads(capsys.readouterr().out)["results"]
    assert only == {"prompt": "abcd", "samples": [samples[0][0]]}


def test_many_prompts_are_continued_a_few_at_a_time(
    workdir, tmp_path, capsys, monkeypatch
):
    """The same text, batch by batch, as from one batch; and it is said how far."""
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(["abcd", "h", "efgh a", "fg", "cd"]), encoding="utf-8")
    command = ["generate", "--workdir", str(workdir), "--prompts-file", str(file)]
    command += ["--max-new-tokens", "9"]
    assert cli.main(command) == 0
    whole = capsys.readouterr()
    assert whole.err == ""
    sizes, segments = [], generate_module.segments

    def watched(model, prompts, **options):
        sizes.append(len(prompts))
        return segments(model, prompts, **options)

    monkeypatch.setattr(generate_module, "segments", watched)
    assert cli.main([*command, "--batch-size", "2"]) == 0
    parts = capsys.readouterr()
    assert parts.out == whole.out
    assert sizes == [2, 2, 1]
    assert parts.err.splitlines() == [f"{n} of 5 prompts" for n in (2, 4, 5)]
    assert cli.main([*command, "--json", "--batch-size", "4"]) == 0
    results = json.loads(capsys.readouterr().out)["results"]
    assert sizes[3:] == [4, 1]
    assert [len(r["samples"][0]) for r in results] == [9] * 5


def test_long_prompts_are_said_a_few_times_and_then_counted(capsys):
    prompts = ["abc"] * 2 + ["abcdef"] * 9
    ids = generate_command._encode_prompts(ByteTokenizer(), prompts, 4)
    assert [len(one) for one in ids] == [3] * 2 + [6] * 9
    lines = capsys.readouterr().err.splitlines()
    assert [line[:9] for line in lines[:3]] == ["prompt 3 ", "prompt 4 ", "prompt 5 "]
    assert lines[3:] == ["so it is with 6 more prompts"]


def test_generate_with_another_cache_and_other_segments(workdir, capsys):
    command = ["generate", "--workdir", str(workdir), "--prompt", "abcd", "--greedy"]
    assert cli.main([*command, "--max-new-tokens", "30"]) == 0
    expected = capsys.readouterr().out
    for more in (["--kv-dtype", "float32"], ["--segment", "7"]):
        assert cli.main([*command, "--max-new-tokens", "30", *more]) == 0
        assert capsys.readouterr().out == expected


@pytest.mark.parametrize("dtype", ["bfloat16", "int8", "int4"])
def test_the_cache_has_the_dtype_that_was_asked_for(
    workdir, capsys, monkeypatch, dtype
):
    """Found in the caches that the command makes, in the place of float32."""
    made = []
    create: Any = KVCache.create
    create = create.__func__

    def spy(cls, *args, **kwargs):
        made.append(create(cls, *args, **kwargs))
        return made[-1]

    monkeypatch.setattr(KVCache, "create", classmethod(spy))
    # A length that no other test compiles: the cache is made while it is traced.
    segment = {"bfloat16": "11", "int8": "13", "int4": "14"}[dtype]
    command = ["generate", "--workdir", str(workdir), "--prompt", "abcd", "--greedy"]
    command += ["--max-new-tokens", "9", "--segment", segment, "--kv-dtype", dtype]
    assert cli.main(command) == 0
    assert capsys.readouterr().out.startswith("abcd")
    assert made
    held = jnp.dtype("uint8" if dtype == "int4" else dtype)
    assert {x.dtype for cache in made for x in (*cache.keys, *cache.values)} == {held}


def test_memory_is_said_before_it_is_taken(workdir, capsys, monkeypatch):
    command = ["generate", "--workdir", str(workdir), "--prompt", "abcd"]
    command += ["--max-new-tokens", "9"]
    monkeypatch.setattr(room, "LARGE", 0)
    assert cli.main(command) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith("abcd")
    (line,) = captured.err.splitlines()
    assert re.fullmatch(
        r"the cache of keys and values takes 2\.57 kB in float32: 20 tokens;"
        r" --kv-dtype makes it bfloat16 1\.29 kB, int8 968 B, int4 1\.67 kB",
        line,
    )
    monkeypatch.setattr(room, "available_memory", lambda: 3000)
    assert cli.main(command) == 1
    captured = capsys.readouterr()
    assert captured.out == ""  # not even the prompt
    assert re.search("3 kB of memory are free: none of --kv-dtype fits", captured.err)


def test_the_reading_of_a_long_prompt_is_shown(workdir, capsys, monkeypatch):
    monkeypatch.setattr(generate_module, "PIECE", 16)
    monkeypatch.setattr(generate_command.Progress, "SECONDS", 0.0)
    command = ["generate", "--workdir", str(workdir), "--prompt", "abcd efgh abcd efgh"]
    assert cli.main([*command, "--max-new-tokens", "1"]) == 0
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert re.fullmatch(
        r"16 of 19 tokens of the prompt are read, [\d,]+ a second", lines[0]
    )


def test_prompt_files_that_cannot_be_read(workdir, tmp_path, capsys):
    file = tmp_path / "prompts.txt"
    for content, message in (
        (b"abc\n\nab\n", "prompt 2 is empty"),
        (b"", "the prompt is empty"),
        (b"abc\nxyz\n", "prompt 2: character 'x'"),
        (b"abc\n\xff\n", "is not UTF-8 text (byte 4)"),
        (None, "prompts.txt"),
    ):
        file.unlink(missing_ok=True)
        if content is not None:
            file.write_bytes(content)
        command = ["generate", "--workdir", str(workdir), "--prompts-file", str(file)]
        assert cli.main(command) == 1
        captured = capsys.readouterr()
        assert captured.out == ""
        assert message in captured.err.splitlines()[-1]


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
        (["generate", "--prompt", "a", "--prompt", "?"], "prompt 2: character '?'"),
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


@pytest.mark.skipif(not pathlib.Path("/dev/full").exists(), reason="no /dev/full")
def test_output_that_cannot_be_written_is_one_line(capsys, monkeypatch):
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert cli.main(["config"]) == 1
        # Closing writes what is left, as the end of the interpreter does: to nowhere.
    assert capsys.readouterr().err.startswith("error: No space left on device")


def one_error(capsys, monkeypatch, arguments, message):
    """Training from these flags ends in one line with the message."""
    monkeypatch.chdir(ROOT)
    capsys.readouterr()
    assert cli.main(["train", *arguments]) == 1
    captured = capsys.readouterr()
    # What went before, such as the progress of a download, is no part of the error.
    assert "error" not in captured.out
    assert len(captured.err.splitlines()) == 1, captured.err
    assert captured.err.startswith("error: ")
    assert message in captured.err


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
def test_train_errors_leave_nothing_behind(
    tmp_path, capsys, monkeypatch, arguments, message
):
    one_error(
        capsys, monkeypatch, [*arguments, f"--workdir={tmp_path / 'run'}"], message
    )
    assert not (tmp_path / "run").exists()


def test_the_script_ends_with_the_status_of_its_error():
    result = run_script("train.py", "--config=configs/none.py")
    assert result.returncode == 1
    assert result.stdout == ""
    assert result.stderr.startswith("error: no config file at configs/none.py")
    assert result.stderr.count("\n") == 1


def test_no_network_falls_back_with_a_notice(tmp_path, capsys, monkeypatch):
    """Trains anywhere; a proxy that refuses connections stands for no network."""
    proxy = "http://127.0.0.1:9"
    flags = ["--config=configs/debug.py", "--config.num_steps=2"]
    flags += ["--config.model.n_layers=1", "--config.sample.max_new_tokens=1"]
    flags += ["--config.use_tuner=False", "--config.learning_rate=0.01"]
    flags += [f"--workdir={tmp_path / 'run'}", f"--config.data.data_dir={tmp_path}"]
    flags += ["--config.data.download_attempts=1"]
    result = run_script("train.py", *flags, https_proxy=proxy, HTTPS_PROXY=proxy)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("NOTICE: could not download Tiny Shakespeare") == 1
    corpus = json.loads((tmp_path / "run" / "run.json").read_text())["corpus"]
    assert "standard library" in corpus["source"]
    strict = [*flags, "--config.data.fallback=False", f"--workdir={tmp_path / 'b'}"]
    for name in ("https_proxy", "HTTPS_PROXY"):
        monkeypatch.setenv(name, proxy)
    one_error(capsys, monkeypatch, strict, "could not download Tiny Shakespeare")


def test_example_runs(workdir):
    result = run_script(
        "examples/inference.py", str(workdir), "abc", PYTHONPATH=str(ROOT)
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("abc")
    assert len(result.stdout.rstrip("\n")) >= 18


def test_unwritable_workdir_is_one_line(tmp_path, capsys, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    flags = ["--config=configs/debug.py", f"--workdir={tmp_path / 'file' / 'run'}"]
    text = tmp_path / "t.txt"
    text.write_text("some text to train on\n" * 100)
    one_error(capsys, monkeypatch, [*flags, f"--config.data.path={text}"], "")

"""Whole runs as people start them: resume, kill, signals, damage, refusals."""

import errno
import io
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time
from typing import Any

import jax
import numpy as np
import pytest
from rich.console import Console

from vaani_jax.data.batches import Batches
from vaani_jax.errors import VaaniError
from vaani_jax.inference.model import load
from vaani_jax.runs.checkpoints import Checkpoints
from vaani_jax.train import report as report_module
from vaani_jax.train.config import from_dict
from vaani_jax.train.loop import Callback, train
from vaani_jax.train.schedules import Schedule
from vaani_jax.train.tuner import explosion, range_test

ROOT = pathlib.Path(__file__).resolve().parents[2]

TINY = {
    "num_steps": 24,
    "batch_size": 4,
    "log_interval": 3,
    "eval_interval": 8,
    "save_interval": 4,
    "sample_interval": 12,
    "keep_checkpoints": 3,
    "model": {
        "dim": 16,
        "n_layers": 2,
        "n_heads": 2,
        "max_seq_len": 16,
        "dropout": 0.1,
        "activation_tracking": "ema",
    },
    "optim": {"warmup_steps": 4, "accumulation_steps": 2},
    "sample": {"max_new_tokens": 20, "prompts": ("the ", "\n")},
}


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> pathlib.Path:
    sentence = "the quick brown fox jumps over the lazy dog and runs away\n"
    words = sentence.split(" ")
    rng = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("text") / "corpus.txt"
    path.write_text(" ".join(rng.choice(words, 2000)), encoding="utf-8")
    return path


def make_config(text, **changes):
    values: dict = {**TINY, "data": {"path": str(text)}}
    for key, value in changes.items():
        section = isinstance(value, dict)
        values[key] = {**values.get(key, {}), **value} if section else value
    return from_dict(values)


def run(config, workdir, *callbacks):
    with open(os.devnull, "w") as sink:
        return train(config, workdir, console=Console(file=sink), callbacks=callbacks)


class KilledError(Exception):
    pass


class Kill(Callback):
    """Raises out of the loop, once a step is done and the next one runs."""

    def __init__(self, step):
        self.step = step

    def on_step(self, step, metrics):
        if step == self.step:
            raise KilledError


def final_state(workdir, step=24):
    checkpoints = Checkpoints(pathlib.Path(workdir) / "checkpoints", read_only=True)
    folder = checkpoints.directory / f"step_{step}"
    meta = checkpoints.meta(step)
    checkpoints.close()
    assert folder.is_dir()
    return meta["fingerprints"]


@pytest.fixture(scope="module")
def uninterrupted(text, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("uninterrupted") / "run"
    result = run(make_config(text), workdir)
    return workdir, result


def test_a_second_start_of_a_finished_run_writes_what_it_lacks(
    text, uninterrupted, tmp_path
):
    workdir = shutil.copytree(uninterrupted[0], tmp_path / "run")
    lost = ("run.json", "training_curves.png", "training_history.json")
    before = json.loads((workdir / "run.json").read_text())
    for name in lost:
        (workdir / name).unlink()
    assert run(make_config(text), workdir) is None
    after = json.loads((workdir / "run.json").read_text())
    assert after["final"]["loss"] == pytest.approx(before["final"]["loss"])
    assert after["final"]["tokens"] == before["final"]["tokens"]
    assert after["best"] == before["best"]
    for name in lost:
        assert (workdir / name).stat().st_size > 100, name
    # Nothing lacks: nothing is written.
    kept = (workdir / "run.json").stat().st_mtime_ns
    run(make_config(text), workdir)
    assert (workdir / "run.json").stat().st_mtime_ns == kept


def test_a_finished_run_is_not_lost_to_its_decoration(text, tmp_path, monkeypatch):
    """Samples, pictures, events and history that fail are said, and left out."""

    def fail(*arguments, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(report_module, "plot_curves", fail)
    monkeypatch.setattr(report_module, "generate", fail)
    monkeypatch.setattr(report_module.EventWriter, "scalars", fail)
    monkeypatch.setattr(report_module.MetricWriter, "write_history", fail)
    monkeypatch.setattr(report_module.MetricWriter, "write", fail)
    output = io.StringIO()
    config = make_config(text, num_steps=4, sample={"prompts": ("the ",)})
    result = train(config, tmp_path / "run", console=Console(file=output, width=200))
    assert result is not None
    summary = json.loads((tmp_path / "run" / "run.json").read_text())
    assert summary["final"]["loss"] == pytest.approx(result.loss)
    told = output.getvalue()
    for what in ("sample for", "picture", "events for", "training_history", "row in"):
        assert told.count(f"no {what}") == 1, (what, told)


def test_a_run_leaves_everything_behind(uninterrupted):
    workdir, result = uninterrupted
    for name in ("metrics.jsonl", "training_history.json", "training_curves.png"):
        assert (workdir / name).stat().st_size > 100, name
    assert list((workdir / "tensorboard").glob("events.*"))
    assert (workdir / "training_curves.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    samples = sorted(p.name for p in (workdir / "samples").iterdir())
    assert samples == ["step_000012.txt", "step_000024.txt"]
    assert "the " in (workdir / "samples" / samples[-1]).read_text()
    history = json.loads((workdir / "training_history.json").read_text())
    assert history["train/loss"]["step"] == [3, 6, 9, 12, 15, 18, 21, 24]
    assert history["eval/loss"]["step"] == [8, 16, 24]
    assert history["eval/loss"]["value"][-1] == pytest.approx(result.loss)
    layer = history["quant/sparsity/layers_0/attn/q_proj"]["value"]
    assert all(0 < v < 1 for v in layer)
    flipped = history["quant/flipped/layers_1/ffn/down_proj"]["value"]
    assert max(flipped) > 0
    assert history["train/weight_decay"]["value"][0] == pytest.approx(0.1)
    summary = json.loads((workdir / "run.json").read_text())
    assert summary["final"]["loss"] == pytest.approx(result.loss)


def test_training_learns(uninterrupted):
    workdir, _ = uninterrupted
    losses = json.loads((workdir / "training_history.json").read_text())["train/loss"]
    assert losses["value"][-1] < losses["value"][0] - 0.1


def test_two_equal_runs_are_equal(text, uninterrupted, tmp_path):
    run(make_config(text), tmp_path / "again")
    assert final_state(tmp_path / "again") == final_state(uninterrupted[0])


def test_resumed_equals_uninterrupted(text, uninterrupted, tmp_path):
    """2N steps = N steps + restore + N steps, with the schedule of the whole run."""
    workdir = tmp_path / "run"
    with pytest.raises(KilledError):
        run(make_config(text), workdir, Kill(10))  # no checkpoint is due there
    run(make_config(text), workdir)
    assert final_state(workdir) == final_state(uninterrupted[0])
    ours = (workdir / "training_history.json").read_text()
    theirs = (uninterrupted[0] / "training_history.json").read_text()
    for key, column in json.loads(theirs).items():
        if not key.startswith("perf/"):
            assert json.loads(ours)[key] == column, key


class Watch(Callback):
    """Notes down what it is called with, in order."""

    def __init__(self):
        self.steps, self.boundaries, self.order = {}, {}, []

    def on_step(self, step, metrics):
        assert metrics["train/loss"].is_ready()
        self.steps[step] = float(metrics["train/loss"])
        self.order.append(("step", step))

    def on_boundary(self, step, evaluation):
        self.boundaries[step] = evaluation
        self.order.append(("boundary", step))


def test_callbacks_see_steps_and_boundaries(text, uninterrupted, tmp_path):
    watch = Watch()
    result = run(make_config(text, num_steps=24), tmp_path / "run", watch)
    assert list(watch.steps) == list(range(1, 25))
    assert list(watch.boundaries) == [4, 8, 12, 16, 20, 24]
    assert [s for s, e in watch.boundaries.items() if e is not None] == [8, 16, 24]
    assert watch.boundaries[24] == result
    for step in watch.boundaries:  # a step comes before its boundary
        assert watch.order.index(("boundary", step)) == 1 + watch.order.index(
            ("step", step)
        )
    history = json.loads((tmp_path / "run" / "training_history.json").read_text())
    assert history["train/loss"]["value"][0] == np.mean(
        [watch.steps[i] for i in (1, 2, 3)]
    )
    # Watching changes nothing.
    assert final_state(tmp_path / "run") == final_state(uninterrupted[0])


def test_callbacks_see_the_last_step_of_a_stopped_run(text, tmp_path):
    watch, calls = Watch(), []

    def stop():
        calls.append(1)
        return len(calls) > 5

    with open(os.devnull, "w") as sink:
        train(
            make_config(text),
            tmp_path / "run",
            console=Console(file=sink),
            stop=stop,
            callbacks=[watch],
        )
    assert load(tmp_path / "run", checkpoint="last").step == max(watch.steps)
    assert list(watch.steps) == list(range(1, len(watch.steps) + 1))


def start(arguments, **options):
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), *arguments],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        **options,
    )


def arguments(text, workdir, steps=24) -> list[str]:
    flags = [
        "--config=configs/debug.py",
        f"--workdir={workdir}",
        f"--config.data.path={text}",
    ]
    values = {
        "num_steps": steps,
        "save_interval": 20,
        "eval_interval": 100,
        "sample_interval": 0,
        "log_interval": 10,
        "model.dim": 16,
        "model.max_seq_len": 16,
        "sample.max_new_tokens": 5,
    }
    return flags + [f"--config.{k}={v}" for k, v in values.items()]


def wait_for_checkpoint(workdir, process, seconds=120) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()[0]
        if list(pathlib.Path(workdir, "checkpoints").glob("step_*[0-9]")):
            return
        time.sleep(0.02)
    raise AssertionError("no checkpoint appeared")


def test_kill_at_any_moment_then_resume_is_bitwise_equal(text, tmp_path):
    steps = 600
    whole = start(arguments(text, tmp_path / "whole", steps))
    output = whole.communicate()[0]
    assert whole.returncode == 0, output
    workdir = tmp_path / "killed"
    rng = np.random.default_rng(0)
    kills = 0
    while kills < 3:
        process = start(arguments(text, workdir, steps))
        wait_for_checkpoint(workdir, process)
        time.sleep(float(rng.uniform(0.0, 0.6)) + 2.0 * (kills > 0))
        if process.poll() is not None:
            break  # a fast machine finished first: what follows still holds
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        kills += 1
    assert kills >= 1
    process = start(arguments(text, workdir, steps))
    output = process.communicate()[0]
    assert process.returncode == 0, output
    assert final_state(workdir, steps) == final_state(tmp_path / "whole", steps)
    assert not list((workdir / "checkpoints").glob("*tmp*"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_save_and_leave_with_exit_0(text, tmp_path, number):
    workdir = tmp_path / "run"
    steps = 1_000_000
    process = start(arguments(text, workdir, steps))
    wait_for_checkpoint(workdir, process)
    process.send_signal(number)
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 0, output
    assert "everything is saved" in output
    assert f"--workdir={workdir}" in output.splitlines()[-1]
    stopped = int(output.split("stopped at step ")[1].split(" ")[0].replace(",", ""))
    model = load(workdir, checkpoint="last")
    assert model.step == stopped
    assert (workdir / "training_curves.png").exists()


def test_moments_in_bfloat16_train_alike_and_stay_so(text, uninterrupted, tmp_path):
    config = make_config(text, optim={"moment_dtype": "bfloat16"})
    result = run(config, tmp_path / "run")
    assert result.loss == pytest.approx(uninterrupted[1].loss, rel=0.01)
    whole = final_state(tmp_path / "run")
    assert whole != final_state(uninterrupted[0])
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_24")
    run(config, tmp_path / "run")
    assert final_state(tmp_path / "run") == whole
    with pytest.raises(VaaniError, match=r"optim\.moment_dtype"):
        run(make_config(text), tmp_path / "run")


def test_damaged_newest_checkpoint_is_passed_over(text, uninterrupted, tmp_path):
    workdir = tmp_path / "run"
    run(make_config(text, num_steps=24), workdir)
    for file in (workdir / "checkpoints" / "step_24").rglob("*"):
        if file.is_file() and file.parent.name == "d":
            file.write_bytes(file.read_bytes()[:-20])
    with open(tmp_path / "out.txt", "w") as sink:
        train(make_config(text), workdir, console=Console(file=sink, width=200))
    said = (tmp_path / "out.txt").read_text()
    assert "checkpoint 24 is damaged" in said
    assert "resumed at step 20" in said
    assert final_state(workdir) == final_state(uninterrupted[0])


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"model": {"dim": 32}}, "model.dim is 16 there, 32 here"),
        ({"seed": 5}, "seed is 0 there, 5 here"),
        ({"optim": {"name": "muon"}}, "optim.name is 'adamw' there, 'muon' here"),
        ({"learning_rate": 1.0}, "learning_rate is 'auto' there, 1.0 here"),
    ],
)
def test_config_that_does_not_fit_is_refused(text, uninterrupted, change, key):
    with pytest.raises(VaaniError) as caught:
        run(make_config(text, **change), uninterrupted[0])
    assert key in str(caught.value)
    assert "\n" not in str(caught.value)


def test_another_corpus_is_refused(text, uninterrupted, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text(text.read_text()[::-1], encoding="utf-8")
    with pytest.raises(VaaniError, match="another text"):
        run(make_config(other), uninterrupted[0])


def test_a_finished_run_says_so_and_can_be_extended(text, uninterrupted, tmp_path):
    workdir = tmp_path / "run"
    run(make_config(text), workdir)
    before = final_state(workdir)
    assert run(make_config(text), workdir) is None
    assert final_state(workdir) == before
    file = io.StringIO()
    longer = make_config(
        text, num_steps=28, eval_interval=7, save_interval=5, log_interval=2
    )
    result = train(longer, workdir, console=Console(file=file, width=200))
    assert result is not None
    assert final_state(workdir, 28) != before
    said = file.getvalue()
    schedule = "the schedule from here on is that of the new length"
    assert f"num_steps was 24, is 28 now: {schedule}" in said
    assert "eval_interval was 8, is 7 now: the tuner sees" in said
    assert "save_interval was 4, is 5 now: a rescue may" in said
    assert "log_interval" not in said  # changes nothing that is computed


def test_evaluations_take_a_sample_and_the_last_one_all(text, tmp_path):
    watch = Watch()
    config = make_config(text, num_steps=4, eval_interval=2, eval_windows=5)
    told = io.StringIO()
    result: Any = train(
        config, tmp_path / "run", console=Console(file=told), callbacks=[watch]
    )
    assert "80 of them before the run's end" in told.getvalue().replace("\n", "")
    sampled, final = watch.boundaries[2], watch.boundaries[4]
    assert sampled.tokens == 5 * 16 < final.tokens == result.tokens
    assert final.comparable != final.loss
    # The best one is chosen by the windows that both have seen.
    meta: Any = load(tmp_path / "run").metadata
    better = min(sampled.comparable, final.comparable)
    assert meta.loss == better
    assert meta.best.get("sampled_loss", meta.best["loss"]) == better


def test_epochs_set_the_length(text, tmp_path):
    config = make_config(text, num_steps=0, num_epochs=1, batch_size=128)
    run(config, tmp_path / "run")
    model = load(tmp_path / "run", checkpoint="last")
    tokens = int(0.9 * len(text.read_text()))
    assert model.step == ((tokens - 1) // 16 - 1) // 128


def test_init_from_takes_weights_and_tokenizer(text, uninterrupted, tmp_path):
    source = uninterrupted[0]
    config = make_config(text, init_from=str(source), num_steps=1, learning_rate=1e-30)
    run(config, tmp_path / "new")
    old = load(source)
    new = load(tmp_path / "new", checkpoint="last")
    jax.tree.map(np.testing.assert_array_equal, old.params, new.params)
    scanned = make_config(
        text,
        init_from=str(source),
        num_steps=1,
        learning_rate=1e-30,
        model={"scan_layers": True},
    )
    run(scanned, tmp_path / "scanned")
    new = load(tmp_path / "scanned", checkpoint="last")
    jax.tree.map(np.testing.assert_array_equal, old.params, new.params)
    with pytest.raises(VaaniError, match=r"model.n_layers is 2 there, 3 here"):
        run(
            make_config(text, init_from=str(source), model={"n_layers": 3}),
            tmp_path / "misfit",
        )


def test_divergence_ends_with_a_message_and_a_good_checkpoint(text, tmp_path):
    config = make_config(
        text, use_tuner=False, learning_rate=1e30, optim={"warmup_steps": 20}
    )
    with pytest.raises(VaaniError, match=r"training diverged .*config.learning_rate"):
        run(config, tmp_path / "run")


# -- The tuner --------------------------------------------------------------------

# As much of the tuner as fits into few steps.
KEEN = {"interval": 4, "probe_share": 0.25}


@pytest.fixture(scope="module", autouse=True)
def _short():
    """Constants of the tuner for runs of a few dozen steps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(range_test, "STEPS_MIN", 8)
        patch.setattr(explosion, "PATIENCE", 5)
        yield


def tuned_config(text, **changes):
    changes.setdefault("num_steps", 48)
    return make_config(text, **{"tuner": KEEN, **changes})


def events(workdir, setting=None):
    lines = (pathlib.Path(workdir) / "tuner.jsonl").read_text().splitlines()
    found = [json.loads(line) for line in lines]
    return [e for e in found if setting in (None, e["setting"])]


def poison(monkeypatch, *steps):
    """Batches whose ids are past the vocabulary: they embed as NaN."""
    original = Batches.batch_at

    def batch_at(self, step):
        tokens = original(self, step)
        return np.full_like(tokens, 10_000) if step in steps else tokens

    monkeypatch.setattr(Batches, "batch_at", batch_at)


@pytest.fixture(scope="module")
def tuned(text, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("tuned") / "run"
    return workdir, run(tuned_config(text), workdir)


def test_auto_finds_a_learning_rate_before_the_first_step(tuned):
    workdir, _ = tuned
    (event,) = events(workdir, "learning_rate")
    assert event["step"] == 0
    assert event["old"] == "auto"
    assert "range test of 12 steps" in event["cause"]
    rates = json.loads((workdir / "training_history.json").read_text())
    top = max(rates["train/learning_rate"]["value"])
    assert 0.8 * event["new"] < top <= event["new"] * (1 + 1e-6)


def test_the_range_test_leaves_no_trace_in_the_state(text, tuned, tmp_path):
    """A run that is given the peak that the test picks is the run that picked it."""
    (event,) = events(tuned[0], "learning_rate")
    given = tuned_config(text, learning_rate=event["new"])
    run(given, tmp_path / "given")
    assert final_state(tmp_path / "given", 48) == final_state(tuned[0], 48)
    given = tuned_config(text, learning_rate=event["new"] * 100)
    run(given, tmp_path / "far")
    assert final_state(tmp_path / "far", 48) == final_state(tuned[0], 48)
    assert "far from" in events(tmp_path / "far", "learning_rate")[0]["cause"]


def test_a_short_run_takes_the_usual_learning_rate_and_says_so(uninterrupted):
    (event,) = events(uninterrupted[0], "learning_rate")
    assert event["new"] == pytest.approx(3e-3)
    assert "too short" in event["cause"]


def test_without_the_tuner_it_is_the_plain_schedule(text, tmp_path):
    config = tuned_config(text, use_tuner=False, learning_rate=1e-2)
    run(config, tmp_path / "run")
    assert not (tmp_path / "run" / "tuner.jsonl").exists()
    history = json.loads((tmp_path / "run" / "training_history.json").read_text())
    rates = history["train/learning_rate"]
    schedule = Schedule(config.optim, 1e-2, 48)
    expected = [schedule.learning_rate(step - 1) for step in rates["step"]]
    np.testing.assert_allclose(rates["value"], expected, rtol=1e-6)
    assert not [key for key in history if key.startswith("tuner/")]


def test_a_bad_batch_is_skipped_and_told_of(text, tuned, tmp_path, monkeypatch):
    poison(monkeypatch, 30)
    result = run(tuned_config(text), tmp_path / "run")
    (event,) = events(tmp_path / "run", "step")
    assert event["step"] == 31
    assert event["done"] == "skipped"
    assert "not finite" in event["cause"]
    assert result.loss == pytest.approx(tuned[1].loss, rel=0.02)
    for row in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines():
        loss = json.loads(row).get("train/loss", 0.0)
        assert np.isfinite(loss)


def test_a_run_that_is_stuck_goes_back_and_goes_on(text, tmp_path, monkeypatch):
    poison(monkeypatch, *range(20, 28))
    file = io.StringIO()
    console = Console(file=file, width=200)
    result = train(tuned_config(text), tmp_path / "run", console=console)
    (event,) = events(tmp_path / "run", "state")
    assert event["old"] == 28
    assert event["new"] == 24  # the best: its weights are those of step 20
    assert event["learning_rate_factor"] == 0.5
    assert result is not None
    assert result.loss < 3.2  # from 3.33
    assert "rescued: no step can be applied" in file.getvalue()
    assert "rolled back once" in " ".join(file.getvalue().split())


def test_a_rescue_is_repeated_bit_for_bit(text, tmp_path, monkeypatch):
    """Killed before it and resumed, a run is rescued as it would have been."""
    poison(monkeypatch, *range(20, 28))
    run(tuned_config(text), tmp_path / "whole")
    with pytest.raises(KilledError):
        run(tuned_config(text), tmp_path / "killed", Kill(25))
    run(tuned_config(text), tmp_path / "killed")
    assert final_state(tmp_path / "killed", 48) == final_state(tmp_path / "whole", 48)
    assert events(tmp_path / "killed") == events(tmp_path / "whole")


def test_a_run_beyond_rescue_ends_with_its_checkpoint_intact(
    text, tmp_path, monkeypatch
):
    poison(monkeypatch, *range(20, 48))
    with pytest.raises(
        VaaniError, match=r"diverged at step \d+: no step can"
    ) as caught:
        run(tuned_config(text, tuner={**KEEN, "rescues_max": 1}), tmp_path / "run")
    assert "after going back once" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert load(tmp_path / "run").step == 24
    assert events(tmp_path / "run", "state")


def test_weights_far_worse_than_guessing_are_gone_back_from(text, tmp_path):
    """Too few steps for a range test, and a wild learning rate."""
    config = make_config(text, learning_rate=1e8)
    with pytest.raises(VaaniError, match="training diverged at step 24"):
        run(config, tmp_path / "run")
    gone = events(tmp_path / "run", "state")
    assert [e["step"] for e in gone] == [8, 16]
    assert all(e["cause"].startswith("the validation loss is") for e in gone)


def test_a_run_in_which_nothing_could_be_applied_is_no_success(text, tmp_path):
    config = make_config(text, learning_rate=1e30)  # the update's norm overflows
    with pytest.raises(VaaniError, match="at step 24: no step can be applied"):
        run(config, tmp_path / "run")


def test_sparsity_comes_into_the_band(text, tmp_path):
    band = {"target_sparsity_min": 0.5, "target_sparsity_max": 0.6}
    run(tuned_config(text, **band), tmp_path / "run")
    history = json.loads((tmp_path / "run" / "training_history.json").read_text())
    zeros = [c["value"] for k, c in history.items() if k.startswith("quant/sparsity/")]
    assert len(zeros) == 14
    assert min(column[0] for column in zeros) < 0.45
    assert all(0.5 <= column[-1] <= 0.6 for column in zeros)
    moved = events(tmp_path / "run", "threshold")
    assert {e["kernel"] for e in moved} >= {"layers_0/attn/q_proj"}
    assert all("share of zeros" in e["cause"] for e in moved)


def test_a_signal_in_the_range_test_decides_nothing(text, tuned, tmp_path):
    config, workdir = tuned_config(text), tmp_path / "run"
    calls = []

    def stop():
        calls.append(1)
        return len(calls) > 5

    with open(os.devnull, "w") as sink:
        assert train(config, workdir, console=Console(file=sink), stop=stop) is None
    assert events(workdir, "learning_rate") == []
    run(config, workdir)
    assert final_state(workdir, 48) == final_state(tuned[0], 48)


EACH_STEP = {"num_steps": 16, "log_interval": 1}


def losses(workdir) -> list[float]:
    history = json.loads((workdir / "training_history.json").read_text())
    return history["train/loss"]["value"]


@pytest.fixture(scope="module")
def twin(text, tmp_path_factory):
    """A run in full precision that tells every loss."""
    workdir = tmp_path_factory.mktemp("twin") / "run"
    run(make_config(text, model={"quantize": False}, **EACH_STEP), workdir)
    return workdir


def test_twin_trains_with_the_same_parameters(twin, uninterrupted):
    """Equal names, shapes and dtypes; its own loss, which falls."""
    trees = [load(workdir).params for workdir in (twin, uninterrupted[0])]
    one, other = (
        jax.tree.map(lambda x: (x.shape, x.dtype.name), tree) for tree in trees
    )
    assert one == other
    assert load(twin).quant == {}
    seen = losses(twin)
    assert np.mean(seen[-3:]) < seen[0] - 0.1


def test_gradual_quantization_trains(text, twin, tmp_path):
    """It begins as the twin, to the last rounding, then leaves it."""
    config = make_config(text, quantize_steps=12, **EACH_STEP)
    run(config, tmp_path / "run")
    gradual, full = losses(tmp_path / "run"), losses(twin)
    assert len(gradual) == len(full) == 16
    assert gradual[0] == pytest.approx(full[0], rel=1e-5)
    apart = np.abs(np.asarray(gradual) / full - 1)
    assert apart[-4:].max() > 1e-4  # all ternary by now
    assert np.mean(gradual[-3:]) < gradual[0] - 0.1


def test_full_disk_is_one_line(text, tmp_path, monkeypatch):
    import errno

    def fail(self, *args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Checkpoints, "save", fail)
    with pytest.raises(VaaniError, match="No space left on device") as caught:
        run(make_config(text), tmp_path / "run")
    assert "\n" not in str(caught.value)

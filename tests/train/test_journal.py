"""The tuner's journal: one line a decision, resumable, summed up in words."""

import json

import jax.numpy as jnp
import pytest

from vaani_jax.train.journal import Journal, read_events
from vaani_jax.train.tuner import HyperparameterTuner
from vaani_jax.train.tuner.divergence import HEALTHY, Diagnosis
from vaani_jax.train.tuner.learning_rate import CALM, LOSS
from vaani_jax.train.tuner.rule import Change
from vaani_jax.train.tuner.verdict import (
    ACCEPTED,
    GRADIENT,
    NON_FINITE,
    SHRUNK,
    Verdict,
)

TUNER = HyperparameterTuner(learning_rate=1e-2, warmup_steps=20)
LAYERS = ["embedding", "layers_0"]


@pytest.fixture
def said():
    return []


@pytest.fixture
def journal(tmp_path, said):
    journal = Journal(tmp_path, 0, said.append)
    yield journal
    journal.close()


def verdict(kind, scale=0.0, value=20.0, usual=1.0, layer=1):
    return Verdict(
        kind=jnp.int32(kind),
        scale=jnp.float32(scale),
        value=jnp.float32(value),
        usual=jnp.float32(usual),
        layer=jnp.int32(layer),
    )


def same(value, cause=0):
    return Change(jnp.float32(value), jnp.float32(value), jnp.int32(cause))


def adjustment(**changes):
    values = {
        "learning_rate": same(1.0, CALM),
        "clipping": same(1.0),
        "momentum": same(0.99),
        "sparsity": {},
        "warmup": (jnp.bool_(False), jnp.int32(7)),
        "divergence": Diagnosis(jnp.int32(HEALTHY), jnp.float32(2.0), jnp.float32(2.0)),
    }
    return {**values, **changes}


def change(old, new, cause=0):
    return Change(jnp.float32(old), jnp.float32(new), jnp.asarray(cause))


def test_accepted_steps_and_settings_that_stay_leave_no_line(journal, tmp_path, said):
    TUNER.tell_verdict(1, verdict(ACCEPTED, 1.0), LAYERS, journal)
    TUNER.tell(10, adjustment(), journal)
    assert read_events(tmp_path / "tuner.jsonl") == []
    assert said == []


def test_every_decision_is_a_line_with_step_cause_old_and_new(journal, tmp_path):
    TUNER.tell_verdict(3, verdict(GRADIENT), LAYERS, journal)
    TUNER.tell(
        10,
        adjustment(
            learning_rate=change(1.0, 0.7, LOSS),
            clipping=change(1.0, 2.5),
            momentum=change(0.99, 0.9),
            warmup=(jnp.bool_(True), jnp.int32(7)),
        ),
        journal,
    )
    TUNER.range_test.tell_peak("from a range test", "auto", 0.01, journal)
    lines = (tmp_path / "tuner.jsonl").read_text().splitlines()
    events = [json.loads(line) for line in lines]
    assert events == read_events(tmp_path / "tuner.jsonl") == journal.events
    assert all({"step", "setting", "cause", "old", "new"} <= set(e) for e in events)
    found = {e["setting"]: (e["step"], e["old"], e["new"]) for e in events}
    assert found["step"] == (3, 1.0, 0.0)
    assert found["learning_rate_factor"] == (10, 1.0, pytest.approx(0.7))
    assert found["clip_norm"] == (10, 1.0, 2.5)
    assert found["activation_momentum"][0] == 10
    assert found["warmup_steps"] == (10, 20, 7)
    assert found["learning_rate"] == (0, "auto", 0.01)
    assert "norm 20, usually 1; foremost in layers_0" in events[0]["cause"]


def test_thresholds_are_told_kernel_by_kernel(journal):
    old = jnp.asarray([0.5, 0.5, 0.5], jnp.float32)
    new = jnp.asarray([0.5, 0.6, 0.4], jnp.float32)
    moves = {
        "layers/attn/q_proj": Change(old, new, jnp.asarray([0.35, 0.2, 0.5])),
        "head": change(0.5, 0.55, 0.25),
    }
    TUNER.tell(10, adjustment(sparsity=moves), journal)
    assert [(e["kernel"], e["cause"]) for e in journal.events] == [
        ("layers/attn/q_proj[1]", "share of zeros 0.200"),
        ("layers/attn/q_proj[2]", "share of zeros 0.500"),
        ("head", "share of zeros 0.250"),
    ]


def test_people_hear_of_the_first_of_many_skips(journal, said):
    for step in range(1, 6):
        TUNER.tell_verdict(step, verdict(NON_FINITE), LAYERS, journal)
    TUNER.tell_verdict(7, verdict(SHRUNK, 0.25), LAYERS, journal)
    assert len(journal.events) == 6
    assert len(said) == 2
    assert "skipped: loss or gradients are not finite" in said[0]
    assert "shrunk: update oversized" in said[1]


def test_cuts_are_said_and_recoveries_are_not(journal, said):
    TUNER.tell(10, adjustment(learning_rate=change(1.0, 0.7, LOSS)), journal)
    TUNER.tell(20, adjustment(learning_rate=change(0.7, 0.77, CALM)), journal)
    assert len(journal.events) == 2
    (line,) = said
    assert "learning rate x 0.70: the loss rises" in line


def test_the_warm_up_ends_once(journal):
    for step in (10, 20, 30):
        TUNER.tell(step, adjustment(warmup=(jnp.bool_(True), jnp.int32(7))), journal)
    assert [e["step"] for e in journal.events] == [10]


def test_a_resumed_run_drops_the_lines_it_will_write_again(tmp_path, said):
    first = Journal(tmp_path, 0, said.append)
    for step in (5, 10, 15):
        first.record(step, "clip_norm", "why", 1.0, 2.0)
    first.close()
    with (tmp_path / "tuner.jsonl").open("a") as file:
        file.write('{"step": 16, "sett')  # cut short by a kill
    second = Journal(tmp_path, 10, said.append)
    second.record(12, "clip_norm", "why", 2.0, 3.0)
    second.close()
    assert [e["step"] for e in read_events(tmp_path / "tuner.jsonl")] == [5, 10, 12]


def test_a_run_that_begins_again_has_one_range_test(tmp_path, said):
    for _ in range(2):  # killed before its first checkpoint
        journal = Journal(tmp_path, 0, said.append)
        TUNER.range_test.tell_peak("from a range test", "auto", 0.01, journal)
        journal.close()
    assert len(read_events(tmp_path / "tuner.jsonl")) == 1


def test_numbers_that_json_has_none_for(journal, tmp_path):
    journal.record(1, "clip_norm", "why", float("inf"), jnp.float32(2))
    (event,) = read_events(tmp_path / "tuner.jsonl")
    assert event["old"] is None
    assert event["new"] == 2.0


def test_the_summary_says_it_all(journal):
    assert "followed the schedule" in TUNER.summary(journal.events)
    TUNER.range_test.tell_peak("from a range test", "auto", 0.0123, journal)
    TUNER.tell_verdict(3, verdict(NON_FINITE), LAYERS, journal)
    TUNER.tell(10, adjustment(learning_rate=change(1.0, 0.7, LOSS)), journal)
    TUNER.learning_rate.tell_evaluation(20, change(0.7, 0.49, 1), journal)
    cause = "the loss left what was reached"
    TUNER.divergence.tell_rescue(30, 20, cause, 0.5, journal)
    text = TUNER.summary(journal.events)
    assert "\n" not in text
    for words in (
        "peak learning rate 0.0123 (from a range test)",
        "cut twice (1 x the loss rises, 1 x validation loss rises)",
        "stood at 0.49",
        "1 step skipped",
        "rolled back once",
    ):
        assert words in text

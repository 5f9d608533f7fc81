"""Checkpoints: what is read back is what was saved, or it is said that it is not."""

import contextlib
import errno
import json
import os
import pathlib
import threading
import time
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vaani_jax.errors import VaaniError
from vaani_jax.runs.checkpoints import Checkpoints, fingerprints


def make_items(seed: int) -> dict:
    rng = np.random.default_rng(seed)
    return {
        "model": {
            "params": {"w": jnp.asarray(rng.normal(size=(64, 48)), jnp.float32)},
            "quant": {},
        },
        "training": {
            "step": jnp.asarray(seed, jnp.int32),
            "codes": {"w": jnp.asarray(rng.integers(-1, 2, (64, 48)), jnp.int8)},
            "half": jnp.asarray(rng.normal(size=7), jnp.bfloat16),
            "key": jnp.asarray([1, 2**32 - 1], jnp.uint32),
        },
    }


def target(meta: dict) -> dict:
    return jax.eval_shape(lambda: make_items(0))


def assert_same(a, b) -> None:
    jax.tree.map(
        lambda x, y: np.testing.assert_array_equal(np.asarray(x), np.asarray(y)), a, b
    )
    assert str(jax.tree.structure(a)) == str(jax.tree.structure(b))


@pytest.fixture
def saved(tmp_path) -> Iterator[Checkpoints]:
    checkpoints = Checkpoints(tmp_path / "run" / "checkpoints", keep=2)
    for step, loss in ((10, 3.0), (20, 1.0), (30, 2.0), (40, None)):
        checkpoints.save(step, make_items(step), {"note": [step, "é"]}, loss=loss)
    checkpoints.wait()
    yield checkpoints
    checkpoints.close()


def array_files(checkpoints: Checkpoints, step: int) -> list[pathlib.Path]:
    folder = checkpoints.directory / f"step_{step}"
    return sorted(
        (f for f in folder.rglob("*") if f.is_file() and f.parent.name == "d"),
        key=lambda f: -f.stat().st_size,
    )


def test_restores_the_newest_bit_for_bit(saved):
    restored = saved.restore(target)
    assert restored.step == 40
    assert restored.meta["note"] == [40, "é"]
    assert_same(restored.items, make_items(40))


def test_keeps_the_last_ones_and_the_best(saved):
    assert saved.steps() == [20, 30, 40]
    assert saved.best_step() == 20


def test_saving_does_not_alias_donated_buffers(tmp_path):
    """The next step may overwrite the state while it is still being written."""
    checkpoints = Checkpoints(tmp_path / "c")
    state = {"model": {"x": jnp.zeros(1 << 20)}, "training": {"y": jnp.zeros(4)}}
    advance = jax.jit(
        lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0
    )
    for step in range(4):
        checkpoints.save(step, state, {}, loss=None)
        state = advance(state)
    checkpoints.wait()
    shapes = jax.eval_shape(lambda: state)
    restored = checkpoints.restore(lambda meta: shapes, step=3)
    assert restored is not None
    assert float(restored.items["model"]["x"].min()) == 3.0
    assert float(restored.items["model"]["x"].max()) == 3.0
    checkpoints.close()


@pytest.mark.parametrize("damage", ["truncate", "flip", "delete", "empty_meta"])
def test_damaged_newest_is_reported_and_the_one_before_is_used(saved, damage):
    if damage == "empty_meta":
        files = [saved.directory / "step_40" / "meta" / "metadata"]
    else:
        files = array_files(saved, 40)
    assert files
    for file in files:
        content = file.read_bytes()
        if damage == "truncate":
            file.write_bytes(content[: len(content) // 2])
        elif damage == "flip":
            middle = len(content) // 2
            flipped = bytes([content[middle] ^ 0x10])
            file.write_bytes(content[:middle] + flipped + content[middle + 1 :])
        elif damage == "delete":
            file.unlink()
        else:
            file.write_bytes(b"")
    said: list[str] = []
    restored = saved.restore(target, notify=said.append, set_aside=True)
    assert restored.step == 30
    assert_same(restored.items, make_items(30))
    assert len(said) == 1
    assert "checkpoint 40 is damaged" in said[0]
    assert "\n" not in said[0]
    # Its step can be saved again.
    saved.save(40, make_items(41), {}, loss=None)
    saved.wait()
    assert_same(saved.restore(target).items, make_items(41))


@pytest.mark.parametrize("key", ["performance_metrics", "item_handlers"])
def test_what_orbax_notes_beside_a_checkpoint_is_damaged(saved, key):
    path = saved.directory / "step_40" / "_CHECKPOINT_METADATA"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: 7}))
    with pytest.raises(VaaniError, match="delete files of that name") as caught:
        Checkpoints(saved.directory, read_only=True)
    assert "\n" not in str(caught.value)
    path.unlink()
    again = Checkpoints(saved.directory, read_only=True)
    restored = again.restore(target)
    assert restored is not None
    assert restored.step == 40
    again.close()


@pytest.mark.parametrize("loss", ["x", float("nan"), [1]])
def test_a_loss_that_is_no_number_is_not_the_best(saved, loss):
    path = saved.directory / "step_30" / "meta" / "metadata"
    path.write_text(json.dumps({**json.loads(path.read_text()), "loss": loss}))
    assert saved.best_step() == 20


def test_a_save_that_fails_does_not_hide_what_ended_a_run(saved, monkeypatch):
    def fail() -> None:
        raise ValueError("the save failed")

    monkeypatch.setattr(saved._manager, "close", fail)
    with pytest.raises(ValueError, match="the save failed"):
        saved.close()
    with pytest.raises(RuntimeError, match="the run"), contextlib.closing(saved):
        raise RuntimeError("the run")
    monkeypatch.undo()


def test_a_disk_that_takes_no_folder_leaves_nobody_waiting(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    make = os.mkdir

    def fail(path, *more, **options) -> None:
        if "meta.orbax-checkpoint-tmp" in str(path):
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        make(path, *more, **options)

    with monkeypatch.context() as patched:
        patched.setattr(os, "mkdir", fail)
        with pytest.raises(OSError, match="No space left"):
            checkpoints.save(1, make_items(1), {})
    checkpoints.close()
    deadline = time.monotonic() + 20
    while any("Signaling" in type(t).__name__ for t in threading.enumerate()):
        assert time.monotonic() < deadline, threading.enumerate()
        time.sleep(0.05)


def test_a_wrong_value_anywhere_changes_the_fingerprint():
    tree = make_items(1)
    before = fingerprints(tree)
    w = tree["model"]["params"]["w"]
    for i, j in ((0, 0), (63, 47), (31, 5)):
        changed = fingerprints({"w": w.at[i, j].add(1e-6)})
        assert changed["['w']"] != before["['model']['params']['w']"]
    swapped = fingerprints({"w": w.at[0].set(w[1]).at[1].set(w[0])})
    assert swapped["['w']"] != before["['model']['params']['w']"]


def test_everything_damaged_is_an_error(saved):
    for step in saved.steps():
        for file in array_files(saved, step):
            file.write_bytes(b"x")
    with pytest.raises(VaaniError, match=r"no checkpoint in .* can be read"):
        saved.restore(target, notify=lambda line: None)


def test_unknown_step_names_the_known_ones(saved):
    with pytest.raises(VaaniError, match="no checkpoint of step 7; it has 20, 30, 40"):
        saved.restore(target, step=7)


def test_refusal_is_passed_on_not_swallowed(saved):
    def refuse(meta):
        raise VaaniError("does not fit")

    with pytest.raises(VaaniError, match="does not fit"):
        saved.restore(refuse)


def test_foreign_folder_is_no_run(tmp_path):
    with pytest.raises(VaaniError, match="holds no run"):
        Checkpoints(tmp_path / "checkpoints", read_only=True)


def test_nothing_saved_yet(tmp_path):
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    assert checkpoints.restore(target) is None
    assert checkpoints.best_step() is None
    checkpoints.close()


def test_unfinished_checkpoint_of_a_killed_run_is_removed(saved):
    saved.close()
    left = saved.directory / "step_50.orbax-checkpoint-tmp"
    (left / "model").mkdir(parents=True)
    (left / "model" / "part").write_bytes(b"half")
    again = Checkpoints(saved.directory)
    assert not left.exists()
    assert again.steps() == [20, 30, 40]
    again.close()

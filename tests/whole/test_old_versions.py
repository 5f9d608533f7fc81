"""What version 0.1 wrote still loads, resumes and generates; `version_0_1/README.md`
says how it was made."""

import hashlib
import json
import pathlib
import shutil
import tarfile

import jax
import numpy as np
import pytest

from vaani_jax import cli
from vaani_jax.inference.model import load

HERE = pathlib.Path(__file__).parent / "version_0_1"
EXPECTED = json.loads((HERE / "expected.json").read_text(encoding="utf-8"))

pytestmark = pytest.mark.filterwarnings(
    "ignore:the load_module:DeprecationWarning",
    "ignore:the imp module:DeprecationWarning",
)


@pytest.fixture
def room(tmp_path, monkeypatch):
    """A folder with the text, the run and the packed folder; the working directory."""
    with tarfile.open(HERE / "run.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    shutil.copytree(HERE / "packed", tmp_path / "packed")
    text = "".join(f"{n} times {n} is {n * n}.\n" for n in range(1000))
    (tmp_path / "corpus.txt").write_text(text)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def fingerprint(leaf) -> str:
    array = np.asarray(leaf)
    shape = ",".join(map(str, array.shape))
    digest = hashlib.sha256(array.tobytes()).hexdigest()[:16]
    return f"{array.dtype}[{shape}]:{digest}"


def test_a_run_loads_to_the_bit(room):
    model = load("run")
    assert model.step == EXPECTED["step"]
    found = {
        "model/" + "/".join(entry.key for entry in path): fingerprint(leaf)
        for path, leaf in jax.tree_util.tree_flatten_with_path(model.variables)[0]
    }
    old = {k: v for k, v in EXPECTED["arrays"].items() if k.startswith("model/")}
    assert found == old


@pytest.mark.parametrize("workdir", ["run", "packed"])
def test_greedy_text_is_the_old_one(room, capsys, workdir):
    greedy = EXPECTED["generate"]["greedy"]
    assert cli.main(["generate", "--workdir", workdir, *greedy["flags"]]) == 0
    assert capsys.readouterr().out.rstrip("\n") == greedy[workdir].rstrip("\n")


@pytest.mark.parametrize("workdir", ["run", "packed"])
def test_its_text_is_found_and_its_loss_is_the_old_one(room, capsys, workdir):
    assert cli.main(["evaluate", "--json", "--workdir", workdir]) == 0
    result = json.loads(capsys.readouterr().out)
    old = EXPECTED["evaluate"][workdir]
    assert result["tokens"] == old["tokens"]
    # The machine that wrote it had another processor, perhaps.
    assert result["loss"] == pytest.approx(old["loss"], rel=1e-3)


def test_a_run_resumes(room, capsys):
    flags = (HERE / "README.md").read_text(encoding="utf-8")
    command = flags.split("python train.py ")[1].split("\n\n")[0]
    assert cli.main(["train", *command.replace("\\", " ").split()]) == 0
    shown = capsys.readouterr()
    assert "resumed at step 80" in shown.out
    key = "activation_tracking"  # which the command gives by its old name
    assert f"model.{key} is called quantization.{key} now" in shown.err
    lines = (room / "run" / "metrics.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if row["step"] > EXPECTED["step"]]
    old = EXPECTED["resumed_rows"]
    assert [row["step"] for row in rows] == [row["step"] for row in old]
    for row, before in zip(rows, old, strict=True):
        assert before.keys() <= row.keys()
        for key in ("train/loss", "train/learning_rate", "eval/loss"):
            if key in before:
                assert row[key] == pytest.approx(before[key], rel=1e-2)

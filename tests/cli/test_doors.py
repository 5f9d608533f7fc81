"""What people hand in: paths, texts and tokenizers of every kind, taken or refused."""

import argparse
import json
import math
import os
import pathlib
import pwd
import shutil
import threading
from types import SimpleNamespace

import pytest
from rich.console import Console
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from vaani_jax import cli
from vaani_jax.cli.flags import load_config
from vaani_jax.cli.generate import _read_prompts
from vaani_jax.data import sources
from vaani_jax.data.config import DataConfig
from vaani_jax.data.corpus import make_tokenizer
from vaani_jax.data.sources import data_dir, load_corpus
from vaani_jax.errors import VaaniError
from vaani_jax.inference.model import load
from vaani_jax.interop.convert import import_model
from vaani_jax.paths import cache_folder, local, new_file, read_text
from vaani_jax.text.prompts import default_prompt
from vaani_jax.text.tokenizers import ByteTokenizer, CharTokenizer
from vaani_jax.train.config import from_dict
from vaani_jax.train.loop import train

MARK = b"\xef\xbb\xbf"
PLAY = "Speak, speak, say the citizens. Hear me speak, say I.\n" * 40
TINY = {
    "num_steps": 2,
    "batch_size": 2,
    "learning_rate": 1e-2,
    "use_tuner": False,
    "eval_interval": 2,
    "model": {"dim": 8, "n_layers": 1, "n_heads": 2, "max_seq_len": 16},
    "sample": {"max_new_tokens": 2},
}


def run(workdir, **changes) -> str:
    """Trains a little; what it said."""
    with open(os.devnull, "w") as sink:
        console = Console(file=sink, record=True, width=200)
        train(from_dict({**TINY, **changes}), workdir, console=console)
    return console.export_text()


def fails(capsys, *arguments) -> str:
    """The one line in which a command fails."""
    capsys.readouterr()
    assert cli.main(list(arguments)) == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("error: ")
    assert said.err.count("\n") == 1, said.err
    return said.err


def spelled(folder: pathlib.Path, text: str = PLAY) -> pathlib.Path:
    """A tokenizer.json of words, without an id for a line break."""
    tokenizer = Tokenizer(models.BPE(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = ["[UNK]"]
    trainer = trainers.BpeTrainer(
        vocab_size=60, special_tokens=special, show_progress=False
    )
    tokenizer.train_from_iterator([text], trainer)
    path = folder / "tokenizer.json"
    tokenizer.save(str(path))
    return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A text of one line, in a run of two steps."""
    folder = tmp_path_factory.mktemp("doors")
    text = folder / "dna.txt"
    text.write_text("ACGTTGCA" * 200, encoding="utf-8")
    said = run(folder / "run", data={"path": str(text)})
    return SimpleNamespace(text=text, workdir=folder / "run", said=said)


# -- Paths -----------------------------------------------------------------------------

URLS = ("gs://bucket/run", "s3://bucket/run", "file:///tmp/run", "gs:/bucket/run")
DOORS = {
    "train --config=base --workdir={}": "--workdir",
    "train --config={}": "--config",
    "train --config=base --config.data.path={}": "data.path",
    "train --config=base --config.data.data_dir={}": "data.data_dir",
    "train --config=base --config.data.tokenizer_file={}": "data.tokenizer_file",
    "train --config=base --config.init_from={}": "init_from",
    "generate --workdir={}": "the workdir",
    "generate --workdir=x --prompts-file={}": "--prompts-file",
    "evaluate --workdir={}": "the workdir",
    "evaluate --workdir={run} --data={}": "--data",
    "pack --workdir={}  --output=x": "the workdir",
    "pack --workdir={run} --output={}": "the output",
    "export --workdir={} --output=x --format=hf": "the workdir",
    "export --workdir={run} --output={} --format=gguf": "the output",
    "import --from={} --workdir=x": "the model to import",
    "import --from=x --workdir={}": "the workdir",
    "plot --workdir={}": "--workdir",
    "plot --workdir={run} --output={}": "--output",
    "plan --config={}": "--config",
}


@pytest.mark.parametrize("door", DOORS)
def test_no_door_takes_a_url(door, trained, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for url in (*URLS, "~nobody-has-this-name/x"):
        arguments = [a.format(url, run=trained.workdir) for a in door.split()]
        if url.startswith("~") and door.startswith("train --config=base"):
            continue  # these are looked at when they are used
        said = fails(capsys, *arguments)
        assert f"{DOORS[door]} is " in said
        assert "URL" in said or "set HOME" in said
    assert list(tmp_path.iterdir()) == []


def test_the_tilde_is_a_home_everywhere(trained, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    shutil.copytree(trained.workdir, tmp_path / "run")
    spelled(tmp_path)
    shutil.copy(trained.text, tmp_path / "text.txt")
    (tmp_path / "prompts.txt").write_text("ACG\n")
    (tmp_path / "mine.py").write_text(
        "from vaani_jax import default_config as get_config\n"
    )
    assert load_corpus(DataConfig(path="~/text.txt")).text
    assert load_corpus(DataConfig(path="~/te*.txt")).text
    assert make_tokenizer(DataConfig(tokenizer_file="~/tokenizer.json"), None)
    assert data_dir(DataConfig(data_dir="~/data")) == tmp_path / "data"
    for command in (
        "generate --workdir=~/run --prompts-file=~/prompts.txt --max-new-tokens=1",
        "evaluate --workdir=~/run --data=~/text.txt",
        "pack --workdir=~/run --output=~/packed",
        "plot --workdir=~/run --output=~/curves.png",
        "config --config=~/mine.py",
    ):
        assert cli.main(command.split()) == 0, capsys.readouterr()
    assert {"packed", "curves.png"} <= {p.name for p in tmp_path.iterdir()}
    assert not (tmp_path / "~").exists()


def test_without_a_home(tmp_path, monkeypatch):
    """A download is used and not kept, and compiled code is not kept either."""

    def unknown(uid):
        raise KeyError(uid)

    for name in ("HOME", "XDG_CACHE_HOME", "VAANI_DATA_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sources, "download", lambda url, **options: b"a play")
    monkeypatch.setattr(sources, "_is_tiny_shakespeare", lambda content: True)
    assert cache_folder() is None
    said: list[str] = []
    assert load_corpus(DataConfig(), said.append).text == "a play"
    assert "not kept" in said[0]
    with pytest.raises(VaaniError, match="set HOME"):
        local("~/run", "--workdir")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["/dev/null", "/dev/stdout", "a", "pipe", ""])
def test_a_picture_replaces_a_plain_file_only(name, tmp_path):
    (tmp_path / "a").mkdir()
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(VaaniError, match="--output is"):
        new_file(tmp_path / name if name[:1] != "/" and name else name, "--output")


@pytest.mark.parametrize(
    "changes",
    [
        {"init_from": "/nonexistent/run"},
        {"data": {"tokenizer_file": "/nonexistent/tokenizer.json"}},
        {"data": {"tokenizer_file": "{}"}},
        {"data": {"validation_fraction": 0.001}},
        {"model": {"vocab_size": 2}},
        {"quantization": {"weight_scale": "stored"}},
    ],
    ids=str,
)
def test_a_run_that_cannot_start_leaves_nothing(changes, trained, tmp_path):
    folder = tmp_path / "no" / "run"
    data = {"path": str(trained.text), **changes.get("data", {})}
    if data.get("tokenizer_file") == "{}":
        data["tokenizer_file"] = str(trained.text.parent)  # a folder
    with pytest.raises(VaaniError):
        run(folder, **{**changes, "data": data})
    assert list(tmp_path.iterdir()) == []


def test_an_import_that_fails_leaves_nothing(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(VaaniError):
        import_model(tmp_path / "empty", tmp_path / "no" / "run")
    assert [p.name for p in tmp_path.iterdir()] == ["empty"]


# -- Texts -----------------------------------------------------------------------------


def test_a_byte_order_mark_is_no_character(tmp_path):
    folder = tmp_path / "bom"
    folder.mkdir()
    for name in ("1", "2"):
        (folder / f"{name}.txt").write_bytes(MARK + b"some text\n")
    assert load_corpus(DataConfig(path=str(folder))).text == "some text\n\nsome text\n"
    prompts = tmp_path / "prompts.txt"
    prompts.write_bytes(MARK + b"one\r\ntwo\r\n")
    options = argparse.Namespace(prompts_file=str(prompts), prompt=[])
    assert _read_prompts(options) == ["one", "two"]
    path = spelled(tmp_path)
    plain = make_tokenizer(DataConfig(tokenizer_file=str(path)), None)
    path.write_bytes(MARK + path.read_bytes())
    marked = make_tokenizer(DataConfig(tokenizer_file=str(path)), None)
    assert marked.to_json() == plain.to_json()


def test_bytes_that_are_no_text(tmp_path, capsys, trained):
    file = tmp_path / "bytes"
    for content, words in (
        (b"abc\xffdef", r"not UTF-8 text \(byte 3\)"),
        ("zwölf".encode("utf-16"), "it is UTF-16"),
    ):
        file.write_bytes(content)
        with pytest.raises(VaaniError, match=words):
            read_text(file)
    said = fails(capsys, "generate", f"--workdir={trained.workdir}", "--prompt=\udcff")
    assert "no UTF-8" in said
    with pytest.raises(VaaniError, match=r"sample\.prompts"):
        from_dict({"sample": {"prompts": ["a\ud800"]}})
    for tokenizer in (ByteTokenizer(), CharTokenizer("ab")):
        with pytest.raises(VaaniError, match="not valid Unicode"):
            tokenizer.encode("\ud800")


def test_pipes_are_read_like_files(tmp_path):
    def piped(content: bytes) -> pathlib.Path:
        path = tmp_path / f"pipe-{len(list(tmp_path.iterdir()))}"
        os.mkfifo(path)
        threading.Thread(target=path.write_bytes, args=(content,), daemon=True).start()
        return path

    text = DataConfig(path=str(piped(b"a text")))
    assert load_corpus(text).text == "a text"
    options = argparse.Namespace(prompts_file=str(piped(b"one\n")), prompt=[])
    assert _read_prompts(options) == ["one"]
    content = spelled(tmp_path).read_bytes()
    assert make_tokenizer(DataConfig(tokenizer_file=str(piped(content))), None)
    config = b"from vaani_jax import default_config as get_config\n"
    assert load_config(piped(config)).batch_size == 12


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"import nothing_of_this_name\n", "line 1: No module named"),
        (b"x = 1\ny = (\n", "line 2: "),
        (b"\ndef get_config():\n    return 1 / 0\n", "line 3: ZeroDivisionError"),
        (b"raise SystemExit(3)\n", "line 1: SystemExit"),
        (b"get_config = 3\n", "defines no get_config()"),
        (b"def get_config():\n    pass\n", "it returned NoneType"),
        (b"x = '\xff'\n", ": "),
        (b"\0", ": "),
    ],
)
def test_a_config_file_that_fails_is_a_line_with_its_place(
    content, words, tmp_path, capsys
):
    file = tmp_path / "mine.py"
    file.write_bytes(content)
    said = fails(capsys, "train", f"--config={file}")
    assert f"config file {file}" in said
    assert words in said
    assert [p.name for p in tmp_path.iterdir()] == ["mine.py"]  # nothing compiled


# -- Texts without what is usual -------------------------------------------------------


def test_prompts_come_from_a_text_without_line_breaks(trained, capsys):
    assert "ACGTTGCAACGTTGCA" in trained.said
    model = load(trained.workdir)
    assert isinstance(model.tokenizer, CharTokenizer)
    assert model.tokenizer.characters == "ACGT"
    (sample,) = (trained.workdir / "samples").iterdir()
    assert sample.read_text().startswith("ACGTTGCAACGTTGCA")
    command = ["generate", f"--workdir={trained.workdir}", "--max-new-tokens=3"]
    assert cli.main(command) == 0
    assert capsys.readouterr().out.startswith("ACGTTGCAACGTTGCA")


def test_no_line_break_of_ours_joins_files_without_any(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text("ACGT")
    assert load_corpus(DataConfig(path=str(tmp_path))).text == "ACGTACGT"
    (tmp_path / "c.txt").write_text("A\n")
    assert load_corpus(DataConfig(path=str(tmp_path))).text == "ACGT\nACGT\nA\n"


def test_a_prompt_is_what_has_ids(tmp_path):
    words = make_tokenizer(DataConfig(tokenizer_file=str(spelled(tmp_path))), None)
    assert default_prompt(words, "Speak,") == "Speak,"
    assert words.encode(default_prompt(words)).size
    assert default_prompt(ByteTokenizer(), "Speak") == "\n"
    assert default_prompt(CharTokenizer("xy")) == "x"


@pytest.mark.parametrize("tuned", [False, True])
def test_a_text_of_one_character_is_learned(tuned, tmp_path):
    """Its loss is 0 from the start, which is no divergence."""
    text = tmp_path / "a.txt"
    text.write_text("a" * 600)
    run(tmp_path / "run", data={"path": str(text)}, use_tuner=tuned)
    results = json.loads((tmp_path / "run" / "run.json").read_text())
    assert results["final"]["loss"] == 0
    assert math.isfinite(results["best"]["loss"])


def test_clipping_says_how_to_switch_it_off():
    for off in (0, 0.0, math.inf):
        with pytest.raises(VaaniError, match=r"--config\.optim\.clip_norm=1e9"):
            from_dict({"optim": {"clip_norm": off}})
    assert from_dict({"optim": {"clip_norm": 1e9}})


# -- What has moved --------------------------------------------------------------------


def test_a_moved_text_is_known_by_its_content(trained, tmp_path, capsys):
    workdir, text = tmp_path / "run", tmp_path / "moved.txt"
    shutil.copytree(trained.workdir, workdir)
    shutil.copy(trained.text, text)
    assert "this run is done" in run(workdir, data={"path": str(text)})
    text.write_text(text.read_text() + "A")
    with pytest.raises(VaaniError, match="this is another text"):
        run(workdir, data={"path": str(text)})

    def evaluated(*arguments) -> dict:
        capsys.readouterr()
        command = ["evaluate", f"--workdir={workdir}", "--json", *arguments]
        assert cli.main(command) == 0
        return json.loads(capsys.readouterr().out)

    held_out = evaluated()
    elsewhere = tmp_path / "elsewhere.txt"
    shutil.move(trained.text, elsewhere)
    try:
        assert "--data" in fails(capsys, "evaluate", f"--workdir={workdir}")
        assert evaluated(f"--data={elsewhere}") == held_out
        assert evaluated(f"--data={text}")["tokens"] > 5 * held_out["tokens"]
    finally:
        shutil.move(elsewhere, trained.text)


def test_a_moved_tokenizer_is_known_by_its_content(tmp_path):
    text = tmp_path / "play.txt"
    text.write_text(PLAY)
    path = spelled(tmp_path)

    def data(file: pathlib.Path | str) -> dict:
        return {"path": str(text), "tokenizer_file": str(file)}

    assert "no ids with this tokenizer" in run(tmp_path / "run", data=data(path))
    moved = tmp_path / "moved.json"
    moved.write_text(json.dumps(json.loads(path.read_text()), indent=4))
    path.unlink()
    assert "this run is done" in run(tmp_path / "run", data=data(moved))
    assert "is not there: going on" in run(tmp_path / "run", data=data(path))
    spelled(tmp_path, "other words, other tokens\n" * 9)
    with pytest.raises(VaaniError, match="another tokenizer"):
        run(tmp_path / "run", data=data(path))
    with pytest.raises(VaaniError, match="names none"):
        run(tmp_path / "run", data=data(""))

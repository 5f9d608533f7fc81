"""README and pages: code runs, commands parse, figures have an origin.

Pages are built by ``sphinx-build -W`` in CI, which runs the tutorial; here it is what a
reader copies.
"""

import argparse
import importlib
import itertools
import json
import pathlib
import pkgutil
import re
import shlex
import sys

import pytest

import vaani_jax
from vaani_jax.cli import make_parser
from vaani_jax.cli.flags import config_from_flags
from vaani_jax.errors import VaaniError
from vaani_jax.train.config import from_dict
from vaani_jax.train.loop import train

ROOT = pathlib.Path(__file__).parents[1]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
FENCE = re.compile(r"^```(\w+)[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(page: pathlib.Path, *languages: str) -> list[tuple[int, str]]:
    """Line number and text of every block of code in one of the languages."""
    text = page.read_text(encoding="utf-8")
    return [
        (text[: found.start(2)].count("\n"), found[2])
        for found in FENCE.finditer(text)
        if found[1] in languages
    ]


def commands(page: pathlib.Path) -> list[list[str]]:
    """The words of each command that the page tells people to type."""
    found = []
    for _, block in blocks(page, "sh", "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            while words and (words[0] in ("srun", "&&") or re.match(r"\w+=", words[0])):
                words = words[1:]
            # An ellipsis stands for flags of the reader's own.
            words = [word for word in words if word != "..."]
            if words:
                found.append(words)
    return found


@pytest.fixture(scope="module")
def toy_run(tmp_path_factory):
    """A folder with the run that the pages speak of, runs/small, at toy size."""
    folder = tmp_path_factory.mktemp("pages")
    (folder / "text.txt").write_text(
        "To be, or not to be, that is the question:\n" * 40
    )
    config = from_dict(
        {
            "num_steps": 2,
            "batch_size": 2,
            "use_tuner": False,
            "learning_rate": 0.01,
            "eval_interval": 2,
            "save_interval": 2,
            "model": {"dim": 16, "n_layers": 1, "n_heads": 1, "max_seq_len": 16},
            "optim": {"warmup_steps": 1},
            "data": {"path": str(folder / "text.txt")},
            "sample": {"max_new_tokens": 4},
        }
    )
    train(config, folder / "runs" / "small")
    return folder


@pytest.fixture
def _tables_kept():
    """What a page adds to the tables of the package is gone after it."""
    for module in pkgutil.walk_packages(vaani_jax.__path__, "vaani_jax."):
        if not module.name.endswith(("__main__", "._cpu")):
            importlib.import_module(module.name)
    tables = {
        id(table): (table, dict(table))
        for name, module in list(sys.modules.items())
        if name.partition(".")[0] == "vaani_jax"
        for key, table in vars(module).items()
        if key.isupper() and isinstance(table, dict)
    }
    yield
    for table, before in tables.values():
        table.clear()
        table.update(before)


@pytest.mark.usefixtures("_tables_kept")
@pytest.mark.parametrize(
    "page", [page for page in PAGES if blocks(page, "python")], ids=lambda p: p.name
)
def test_python_blocks_run_in_order(page, toy_run, monkeypatch):
    monkeypatch.chdir(toy_run)
    names = {"__name__": page.stem}
    for line, block in blocks(page, "python"):
        # Line breaks first, so that a traceback names the line of the page.
        exec(compile("\n" * line + block, str(page), "exec"), names)


@pytest.mark.parametrize(
    "page", [page for page in PAGES if commands(page)], ids=lambda p: p.name
)
def test_commands_parse(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    for words in commands(page):
        check(words)


def parsed(words: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Options of a command, and the flags that it leaves to the config."""
    try:
        return make_parser().parse_known_args(words)
    except VaaniError as stopped:
        raise AssertionError(f"vaani {shlex.join(words)} is refused") from stopped


def check(words: list[str]) -> None:
    """Fails where a command has a file, a command or a flag that isn't there."""
    said = shlex.join(words)
    if words[:3] == ["python", "-m", "vaani_jax"]:
        words = ["vaani", *words[3:]]
    if words[:2] in (["python", "train.py"], ["vaani", "train"]):
        config_from_flags(words[2:])
    elif words[0] == "vaani":
        options, rest = parsed(words[1:])
        if options.command == "plan":
            config_from_flags(rest)
        else:
            assert not rest, f"{said}: {rest}"
    elif words[:3] == ["python", "-m", "pytest"]:
        paths = [w for w in words[3:] if w.startswith("tests")]
        assert all((ROOT / path).exists() for path in paths), said
    elif words[0] == "python" and words[1].endswith(".py"):
        source = (ROOT / words[1]).read_text(encoding="utf-8")
        flags = [w.split("=")[0] for w in words[2:] if w.startswith("--")]
        assert not [flag for flag in flags if f'"{flag}"' not in source], said
    elif words[:4] == ["python", "-m", "pip", "install"]:
        files = [b for a, b in itertools.pairwise(words) if a == "-r"]
        assert all((ROOT / file).exists() for file in files), said
    else:
        outside = {"tensorboard", "sphinx-build", "git", "ruff", "mypy", "pre-commit"}
        assert words[0] in outside | {".ci/run"}, f"{said}: no program of ours"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page):
    text = re.sub(FENCE, "", page.read_text(encoding="utf-8"))
    for target in re.findall(r"\]\(([^)#\s]+)", text):
        if not target.startswith(("http://", "https://")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_readme_is_one_page_with_two_blocks_to_paste():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text) <= 8000
    start = re.split(r"^## ", text, flags=re.MULTILINE)[1]
    assert start.startswith("Quick start\n")
    assert text.count("```bash\n") == start.count("```bash\n") == 2


@pytest.mark.parametrize(
    "path",
    sorted((ROOT / "benchmarks" / "results").glob("*.json")),
    ids=lambda p: p.stem,
)
def test_figures_have_an_origin(path):
    result = json.loads(path.read_text(encoding="utf-8"))
    assert set(result) == {"about", "command", "machine", "date", "tables"}
    assert re.fullmatch(r"\d{4}-\d{2}-\d{2}", result["date"])
    program = shlex.split(result["command"])
    if program[1].endswith(".py"):
        assert (ROOT / program[1]).exists()
    for table in result["tables"].values():
        assert table["rows"]
        assert {len(row) for row in table["rows"]} == {len(table["columns"])}
    shown = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    for name in result["tables"]:
        assert f"{{results}} {path.stem} {name}\n" in shown, "no page shows it"

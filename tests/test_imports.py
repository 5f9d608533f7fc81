"""Imports run downward only, floors are folders, and there is no circle."""

import ast
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = "vaani_jax"

# Lowest first: a module imports from lower floors, or from its own folder.
FLOORS = (
    "__init__",
    "errors",
    "files",
    "words",
    "paths",
    "settings",
    "leaves",
    "devices",
    "quant",
    "kernels",
    "model",
    "text",
    "data",
    "runs",
    "inference",
    "evaluate",
    "train",
    "interop",
    "plan",
    "cli",
    "__main__",
)

# What may be imported from outside in one place only: whoever knows it knows it alone.
CONFINED = {
    "ml_collections": {"cli.flags"},
    "absl": {"cli.flags"},
    "orbax": {"runs.checkpoints"},
    "grain": {"data.batches"},
    "tensorboardX": {"runs.tensorboard"},
    "matplotlib": {"runs.curves"},
    "safetensors": {"interop.formats.hf"},
    "gguf": {"interop.formats.gguf"},
    "tokenizers": {"text.tokenizers"},
    "jinja2": {"text.rendering"},
}
# The face of the package: it names what lies above, and imports it when it is used.
FACE = "__init__"
FORBIDDEN = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "shelve", "joblib"}
FORBIDDEN |= {"marshal", "torch", "tensorflow", "transformers"}


def _name(file: pathlib.Path) -> str:
    """``model.norm``; a folder's ``__init__.py`` has the folder's name."""
    parts = file.relative_to(ROOT / PACKAGE).with_suffix("").parts
    if parts[-1] == "__init__" and len(parts) > 1:
        parts = parts[:-1]
    return ".".join(parts)


FILES = {_name(file): file for file in sorted((ROOT / PACKAGE).rglob("*.py"))}


def _tree(file: pathlib.Path) -> ast.AST:
    return ast.parse(file.read_text(encoding="utf-8"))


def _imported(file: pathlib.Path) -> set[str]:
    """Dotted names that a file imports, at any depth; from X import Y gives X.Y."""
    names = set()
    for node in ast.walk(_tree(file)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file.name}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def _modules(file: pathlib.Path) -> set[str]:
    """Modules of the package that a file imports."""
    found = set()
    for name in _imported(file):
        top, _, rest = name.partition(".")
        if top == PACKAGE:
            while rest and rest not in FILES:  # an object: its module
                rest = rest.rpartition(".")[0]
            found.add(rest or "__init__")
    return found


def _floor(module: str) -> int:
    return FLOORS.index(module.partition(".")[0])


def test_every_folder_has_its_floor():
    assert {module.partition(".")[0] for module in FILES} == set(FLOORS)


def test_the_walk_sees_imports():
    assert _modules(FILES["train.program"]) >= {"train.steps", "devices.mesh"}
    # Imported within a function.
    assert "interop.convert" in {m for f in FILES for m in _modules(FILES[f])}


@pytest.mark.parametrize("module", sorted(FILES))
def test_imports_run_downward(module):
    own = module.partition(".")[0]
    upward = {
        other
        for other in _modules(FILES[module])
        if other.partition(".")[0] != own and _floor(other) >= _floor(module)
    }
    assert not upward or module == FACE


def test_there_is_no_circle():
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join((*path, module))
        if module in done:
            return
        for other in _modules(FILES[module]) - {module, FACE}:
            visit(other, (*path, module))
        done.add(module)

    for module in FILES:
        visit(module, ())
    assert done == set(FILES)


def test_checkpoints_know_pytrees_and_json_only():
    floors = {m.partition(".")[0] for m in _modules(FILES["runs.checkpoints"])}
    assert floors <= {"errors", "devices", "files", "leaves", "words", "runs"}


@pytest.mark.parametrize("package", sorted(CONFINED))
def test_packages_stay_where_they_belong(package):
    users = {
        module
        for module, file in FILES.items()
        if package in {name.partition(".")[0] for name in _imported(file)}
    }
    assert users == CONFINED[package]


def test_no_pickle_anywhere():
    for file in [*FILES.values(), ROOT / "train.py", *(ROOT / "configs").glob("*.py")]:
        tops = {name.partition(".")[0] for name in _imported(file)}
        assert not tops & FORBIDDEN, file.name
        keywords = {n.arg for n in ast.walk(_tree(file)) if isinstance(n, ast.keyword)}
        assert "allow_pickle" not in keywords, file.name


def test_nothing_that_is_read_is_executed():
    for file in FILES.values():
        calls = [n.func for n in ast.walk(_tree(file)) if isinstance(n, ast.Call)]
        called = {func.id for func in calls if isinstance(func, ast.Name)}
        assert not called & {"eval", "exec", "compile", "__import__"}, file.name
        # A template comes with a model: what it may do is for the sandbox to say.
        names = {n for n in _imported(file) if n.partition(".")[0] == "jinja2"}
        parts = ("jinja2.sandbox", "jinja2.ext", "jinja2.nodes")  # syntax, at most
        assert all(name.startswith(parts) for name in names), file.name


def test_nobody_imports_the_entry_point():
    for module, file in FILES.items():
        tops = {name.partition(".")[0] for name in _imported(file)}
        assert not tops & {"train", "configs", "tests"}, module


@pytest.mark.parametrize(
    "module", ["vaani_jax", "vaani_jax.cli", "vaani_jax.errors", "train"]
)
def test_the_command_line_starts_without_jax(module):
    heavy = ["jax", "flax", "numpy", "orbax", "matplotlib", "rich", "absl"]
    code = f"import sys, {module}; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stdout.strip() == "[]"

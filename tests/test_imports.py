"""Imports run downward only, and stay where DESIGN puts them."""

import ast
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = "vaani_jax"

# Lowest first: a module imports from lower lines only, or as SAME_LINE says.
LINES = (
    ("__init__", "errors"),
    ("files", "memory", "chips", "hlo", "sharding", "distributed"),
    ("quant", "norm"),
    ("pack",),
    ("kernels",),
    ("attention",),
    ("layers",),
    ("model", "optim", "tuner", "tokenizer", "metrics"),
    ("step", "evaluate", "generate", "data", "checkpoint", "plots", "journal"),
    ("config",),
    ("load", "program"),
    ("trainer", "plan"),
    ("interop",),
    ("cli",),
    ("__main__",),
)
SAME_LINE = {("evaluate", "data")}
RANK = {module: rank for rank, line in enumerate(LINES) for module in line}

# What may be imported from outside only where DESIGN says.
CONFINED = {
    "ml_collections": {"config"},
    "absl": {"config"},
    "orbax": {"checkpoint"},
    "grain": {"data"},
    "tensorboardX": {"metrics"},
    "matplotlib": {"plots"},
    "safetensors": {"interop"},
    "gguf": {"interop"},
    "tokenizers": {"tokenizer"},
}
FORBIDDEN = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "shelve", "joblib"}
FORBIDDEN |= {"marshal", "torch", "tensorflow", "transformers"}

FILES = {file.stem: file for file in (ROOT / PACKAGE).glob("*.py")}
# A folder counts as one module.
FOLDERS = {
    folder.name: sorted(folder.glob("*.py"))
    for folder in (ROOT / PACKAGE).iterdir()
    if (folder / "__init__.py").exists()
}
MODULES = {**{module: [file] for module, file in FILES.items()}, **FOLDERS}


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
            module = rest.partition(".")[0]
            found.add(module if module in MODULES else "__init__")
    return found


def _users(package: str) -> set[str]:
    return {
        module
        for module, files in MODULES.items()
        for file in files
        if package in {name.partition(".")[0] for name in _imported(file)}
    }


def test_every_module_has_its_line():
    assert set(MODULES) == set(RANK), "give a new module its place in LINES"
    assert len(RANK) == sum(map(len, LINES))


def test_the_walk_sees_imports():
    assert _modules(FILES["trainer"]) >= {"__init__", "plots", "step", "checkpoint"}
    assert "trainer" in _modules(FILES["cli"])  # it is imported within a function


@pytest.mark.parametrize("module", sorted(MODULES.keys() & RANK))
def test_imports_run_downward(module):
    upward = {
        other
        for file in MODULES[module]
        for other in _modules(file) - ({module} if module in FOLDERS else set())
        if RANK.get(other, 99) >= RANK[module] and (module, other) not in SAME_LINE
    }
    assert not upward


def test_exceptions_are_used_and_run_one_way():
    for module, other in SAME_LINE:
        assert RANK[module] == RANK[other]
        assert other in _modules(FILES[module])
    # No module stands on both sides: no path, so no cycle.
    assert not {a for a, _ in SAME_LINE} & {b for _, b in SAME_LINE}


def test_checkpoint_knows_pytrees_and_json_only():
    assert _modules(FILES["checkpoint"]) <= {"errors", "distributed"}


def test_the_tuner_knows_no_model():
    assert _modules(FILES["tuner"]) <= {"errors"}
    outside = {name.partition(".")[0] for name in _imported(FILES["tuner"])}
    third = outside - set(sys.stdlib_module_names) - {PACKAGE}
    assert third == {"flax", "jax"}


@pytest.mark.parametrize("package", sorted(CONFINED))
def test_packages_stay_where_they_belong(package):
    assert _users(package) == CONFINED[package]


def test_no_pickle_anywhere():
    files = [
        *(file for files in MODULES.values() for file in files),
        ROOT / "train.py",
        *(ROOT / "configs").glob("*.py"),
    ]
    for file in files:
        tops = {name.partition(".")[0] for name in _imported(file)}
        assert not tops & FORBIDDEN, file.name
        keywords = {n.arg for n in ast.walk(_tree(file)) if isinstance(n, ast.keyword)}
        assert "allow_pickle" not in keywords, file.name


def test_nobody_imports_the_entry_point():
    for module, file in FILES.items():
        tops = {name.partition(".")[0] for name in _imported(file)}
        assert not tops & {"train", "configs", "tests"}, module


@pytest.mark.parametrize("module", ["vaani_jax.cli", "vaani_jax.errors", "train"])
def test_the_command_line_starts_without_jax(module):
    heavy = ["jax", "flax", "numpy", "orbax", "matplotlib", "rich"]
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

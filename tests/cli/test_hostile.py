"""Whatever a flag or a key is given: it is taken, or refused in one line.

Nothing is loaded or trained: values are checked before that. Each command is pointed at
what is not there, so that a value that passes ends in the line that says so.
"""

import contextlib
import io
import os
import pathlib
from collections.abc import Iterator
from typing import Any

import hypothesis
import pytest
from hypothesis import strategies as st

from vaani_jax import cli
from vaani_jax.cli.flags import config_from_flags
from vaani_jax.errors import VaaniError
from vaani_jax.settings import described
from vaani_jax.train.config import Config, from_dict

ROOT = pathlib.Path(__file__).resolve().parents[2]
NOWHERE = "/nonexistent/vaani"

# As words of a command line, and as values of a config file.
WORDS = (
    *("", "nan", "inf", "-1", "0", "1e400", "9" * 5000, "None", "True", "two\nlines"),
    *("\0", "\udc80", "gs://bucket/x", "~nobody-here/x", "/dev/null", "(1,", "{1: 2}"),
    *("[" * 300, "%s {0}", "--json"),
)
VALUES: tuple[Any, ...] = (
    *(None, True, -1, 0, 10**400, float("nan"), float("-inf"), 1e39, 0.5j, b"bytes"),
    *("", "\0", "\ud800", "s3://bucket/x", [], ["a", 1], {"a": {}}, {1: 2}, object()),
)
KEYS = [name for name, _, _ in described(Config())]
FLAGS_OF_TRAINING = ["workdir", "coordinator", "num_processes", "process_id"]
FLAGS_OF_TRAINING += ["distributed"]

# 100 tries, the same ones each time; VAANI_TRIES=2000 tries others.
TRIES = int(os.environ.get("VAANI_TRIES", "0"))
some_tries = hypothesis.settings(
    max_examples=TRIES or 100,
    derandomize=not TRIES,
    deadline=None,
    database=None,
    suppress_health_check=list(hypothesis.HealthCheck),
)


def is_one_line(text: str) -> bool:
    return bool(text) and len(text.splitlines()) == 1


def build_from_flags(arguments: list[str]) -> None:
    """Passes where the flags make a run, or are refused in a line."""
    printed = io.StringIO()

    def read(given: Any) -> int:
        config_from_flags(given)
        return 0

    with contextlib.redirect_stderr(printed):
        status = cli.run_guarded(
            read, [f"--config={ROOT}/configs/debug.py", *arguments]
        )
    said = printed.getvalue()
    assert status in (0, 1)
    if status:
        assert said.splitlines()[-1].startswith("error: "), said


def nested(key: str, value: Any) -> dict[str, Any]:
    for part in reversed(key.split(".")):
        value = {part: value}
    result: dict[str, Any] = value
    return result


def build_from_values(key: str, value: Any) -> None:
    with contextlib.suppress(VaaniError):
        from_dict(nested(key, value))


def run_command(arguments: list[str]) -> str:
    """What a command says in its one line; it must fail, for there is no model."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stderr(err), contextlib.redirect_stdout(out):
        status = cli.main(arguments)
    assert status == 1, (arguments, out.getvalue())
    assert is_one_line(err.getvalue()), (arguments, err.getvalue())
    assert err.getvalue().startswith("error: ")
    assert not out.getvalue()
    return err.getvalue()


# What a command can't do without; a flag that is tried replaces its own.
NEEDED = {
    "generate": {"--workdir": NOWHERE},
    "chat": {"--workdir": NOWHERE},
    "evaluate": {"--workdir": NOWHERE},
    "pack": {"--workdir": NOWHERE, "--output": f"{NOWHERE}/out"},
    "export": {"--workdir": NOWHERE, "--output": f"{NOWHERE}/out", "--format": "hf"},
    "import": {"--workdir": f"{NOWHERE}/run", "--from": NOWHERE},
    "plot": {"--workdir": NOWHERE},
    "plan": {"--config": NOWHERE},
    "config": {"--config": NOWHERE},
}


def flags_of(command: str) -> Iterator[str]:
    parser = cli.make_parser([command])
    (commands,) = (a for a in parser._actions if isinstance(a.choices, dict))
    assert isinstance(commands.choices, dict)
    for action in commands.choices[command]._actions:
        if "--help" not in action.option_strings:
            yield from action.option_strings


def line(command: str, flag: str, word: str) -> list[str]:
    needed = {**NEEDED[command], flag: word}
    return [command, *(f"{name}={value}" for name, value in needed.items())]


FLAGS = [(command, flag) for command in NEEDED for flag in flags_of(command)]


def test_the_walk_sees_every_command():
    assert set(NEEDED) | {"train"} == set(cli.COMMANDS)
    assert len(FLAGS) > 30
    assert ("generate", "--temperature") in FLAGS
    assert len(KEYS) > 60


@pytest.mark.parametrize(("command", "flag"), FLAGS, ids=" ".join)
def test_every_flag(command, flag, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for word in WORDS:
        run_command(line(command, flag, word))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("key", [*KEYS, *FLAGS_OF_TRAINING, "config", ""])
def test_every_key_on_the_command_line(key):
    prefix = "" if key in FLAGS_OF_TRAINING else "config."
    for word in WORDS:
        build_from_flags([f"--{prefix}{key}={word}"])
    build_from_flags([f"--{prefix}{key}", "nan"])
    build_from_flags([f"--{prefix}{key}"])


@pytest.mark.parametrize("key", KEYS)
def test_every_key_in_a_config(key):
    for value in VALUES:
        build_from_values(key, value)


NUMBERS = [
    (name, value)
    for name, value, _ in described(Config())
    if isinstance(value, int | float) and not isinstance(value, bool)
]


@pytest.mark.parametrize("name", [*dict(NUMBERS), "learning_rate"])
def test_no_number_may_be_none_at_all(name):
    for value in (float("nan"), float("inf"), -float("inf"), 10**400, 1e39):
        with pytest.raises(VaaniError, match=name.rpartition(".")[2]):
            from_dict(nested(name, value))


@pytest.mark.parametrize("flag", ["temperature", "top-p", "min-p"])
@pytest.mark.parametrize("word", ["nan", "inf", "-inf", "-1", "1e39"])
def test_no_number_of_a_sampler_may_be_none(flag, word):
    said = run_command(["generate", f"--workdir={NOWHERE}", f"--{flag}={word}"])
    assert flag.replace("-", "_") in said.replace("-", "_")
    assert "must be" in said


@pytest.mark.parametrize(
    "words",
    [
        "generate --max-new-tokens=0",
        "generate --num-samples=1000000000",
        "generate --segment=-1",
        "generate --seed=-1",
        "generate --seed=99999999999999999999",
        "import --max-seq-len=-1",
        "plan --devices=0",
        "plan --devices=1000000000",
        "plan --utilization=nan",
        "plan --utilization=1.5",
    ],
)
def test_numbers_are_within_their_limits(words):
    command, given = words.split()
    flag, _, value = given.partition("=")
    said = run_command(line(command, flag, value))
    assert f"argument {flag}" in said
    assert f"{value} must be " in said


WORD = st.one_of(
    st.sampled_from(WORDS),
    st.text(max_size=20),
    st.integers().map(str),
    st.floats().map(str),
    st.builds("{}://{}".format, st.sampled_from(["gs", "file", "x"]), st.text()),
    st.recursive(
        st.none() | st.integers() | st.floats() | st.text(max_size=5),
        lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=5), x),
        max_leaves=5,
    ).map(repr),
)
VALUE = st.one_of(
    st.sampled_from(VALUES),
    st.integers(),
    st.floats(),
    st.text(st.characters(), max_size=20),
    st.lists(st.text(st.characters(), max_size=5), max_size=3),
)
FLAG = st.sampled_from(FLAGS)
KEY = st.one_of(
    st.sampled_from(KEYS), st.text(max_size=8), st.sampled_from(["model", "data."])
)


@some_tries
@hypothesis.given(st.lists(st.tuples(KEY, WORD), min_size=1, max_size=3))
def test_any_keys_on_the_command_line(pairs):
    build_from_flags([f"--config.{key}={word}" for key, word in pairs])


@some_tries
@hypothesis.given(st.sampled_from(KEYS), VALUE)
def test_any_value_in_a_config(key, value):
    build_from_values(key, value)


@some_tries
@hypothesis.given(FLAG, st.lists(WORD, min_size=1, max_size=2), st.booleans())
def test_any_words_on_the_command_line(flag, words, apart):
    command, name = flag
    arguments = line(command, name, words[0]) + words[1:]
    if apart:
        arguments = [x for a in arguments for x in a.split("=", 1)]
    if not set(arguments) & {"-h", "--help"}:
        run_command(arguments)

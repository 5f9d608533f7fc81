"""`vaani chat`: in process through a pipe, and at a terminal of its own."""

import io
import json
import os
import pathlib
import pty
import select
import signal
import subprocess
import sys
import time

import jax
import pytest
from text.words_tokenizer import words_tokenizer

from vaani_jax import cli
from vaani_jax.cli import chat as chat_command
from vaani_jax.inference.generate import generate
from vaani_jax.inference.model import Model, pack_model, save_packed
from vaani_jax.inference.sampling import SamplerConfig
from vaani_jax.model.transformer import Vaani, init_variables
from vaani_jax.text.chat import TEMPLATES, ChatTemplate
from vaani_jax.text.special import Special
from vaani_jax.text.tokenizers import ByteTokenizer, HFTokenizer, continuation

ROOT = pathlib.Path(__file__).resolve().parents[2]
NAMES = {"bos_token": "<s>", "eos_token": "</s>"}
SUGGESTED = {"do_sample": True, "temperature": 0.6, "top_k": 5, "top_p": 0.9}


def model_with(tokenizer, context=3000):
    """A ternary model that has learned nothing."""
    module = Vaani().changed(
        vocab_size=tokenizer.vocab_size,
        dim=16,
        n_layers=1,
        n_heads=2,
        ffn_dim=16,
        max_seq_len=context,
        init_std=0.5,
        tie_embeddings=False,
    )
    variables = init_variables(module, jax.random.key(2))
    return pack_model(Model(module, variables, tokenizer))


def tokenizer_with(**special):
    own = Special(NAMES, chat_template=TEMPLATES["chatml"], **special)
    return HFTokenizer(words_tokenizer().to_str(), special=own)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Packed models: of a chat, with suggestions, of bytes, and of a narrow context."""
    folder = tmp_path_factory.mktemp("chat")
    for name, model in {
        "plain": model_with(tokenizer_with()),
        "suggests": model_with(tokenizer_with(generation=SUGGESTED)),
        "greedy": model_with(tokenizer_with(generation={"do_sample": False})),
        "odd": model_with(tokenizer_with(generation={"top_k": "many"})),
        "wrong": model_with(tokenizer_with(generation={"top_p": 2})),
        "bytes": model_with(ByteTokenizer()),
        "narrow": model_with(tokenizer_with(), context=120),
    }.items():
        save_packed(model, folder / name)
    return folder


@pytest.fixture
def talk(folders, monkeypatch, capsys):
    """Runs the command on lines of standard input; status, output and errors."""

    def run(name, *lines, flags=()):
        text = "".join(f"{line}\n" for line in lines)
        monkeypatch.setattr(sys, "stdin", io.StringIO(text))
        status = cli.main(["chat", f"--workdir={folders / name}", *flags])
        captured = capsys.readouterr()
        return status, captured.out, captured.err.splitlines()

    return run


def by_hand(messages, seed=0, count=6, sampler=SamplerConfig(), tokenizer=None):
    """The answer to messages, from a reading of all of them."""
    tokenizer = tokenizer or tokenizer_with()
    template = ChatTemplate(TEMPLATES["chatml"], NAMES)
    ids = tokenizer.encode(template.render(messages))
    (found,) = generate(
        model_with(tokenizer),
        ids,
        max_new_tokens=count,
        sampler=sampler,
        seed=seed,
        ignore_eos=True,
    )
    ends = [i for i, token in enumerate(found) if token in (1, 3)]
    return continuation(tokenizer, ids, found[: ends[0]] if ends else found)


def said(*texts, system=""):
    roles = ["user", "assistant"] * len(texts)
    found = [{"role": r, "content": t} for r, t in zip(roles, texts, strict=False)]
    return [{"role": "system", "content": system}, *found] if system else found


FEW = ("--max-new-tokens=6",)


def test_lines_of_a_pipe_are_turns(talk, tmp_path):
    file = tmp_path / "chat.json"
    lines = ["the cat", "", "sat on\\", "the mat", f"/save {file}"]
    status, out, err = talk("plain", *lines, flags=[*FEW, "--system=on"])
    first = by_hand(said("the cat", system="on"))
    turns = ["the cat", first, "sat on\nthe mat"]
    turns.append(by_hand(said(*turns, system="on"), seed=1))
    assert status == 0
    assert out == f"{turns[1]}\n{turns[3]}\n"
    assert json.loads(file.read_text()) == {"messages": said(*turns, system="on")}
    assert err[0] == "sampling: temperature 0.8 (default)"
    assert err[-1] == f"saved {file}"
    assert not any("> " in line for line in err)


def test_commands_do_what_they_say(talk, tmp_path):
    files = [str(tmp_path / f"{i}.json") for i in range(4)]
    lines = [
        *("the", f"/save {files[0]}", "cat", "/undo", f"/save {files[1]}"),
        *("/system on", f"/save {files[2]}", "/reset", "/system", f"/save {files[3]}"),
        *("/undo", "/help", "/exit", "never said"),
    ]
    status, out, err = talk("plain", *lines, flags=FEW)
    assert status == 0
    saved = [json.loads(pathlib.Path(f).read_text())["messages"] for f in files]
    first = by_hand(said("the"))
    assert saved == [
        said("the", first),
        said("the", first),
        said("the", first, system="on"),
        [],
    ]
    assert out == f"{first}\n{by_hand(said('the', first, 'cat'), seed=1)}\n"
    assert "there is nothing to undo" in err
    for name in chat_command.COMMANDS:
        assert any(line.startswith(name) for line in err), name


def test_two_slashes_begin_a_message(talk, tmp_path):
    file = tmp_path / "chat.json"
    _, _, err = talk("plain", "//help", f"/save {file}", flags=FEW)
    messages = json.loads(file.read_text())["messages"]
    assert messages[0]["content"] == "/help"
    assert not any(line.startswith("/reset") for line in err)


@pytest.mark.parametrize(
    ("name", "flags", "line", "sampler"),
    [
        (
            "suggests",
            [],
            "temperature 0.6 (generation_config.json), top-k 5"
            " (generation_config.json), top-p 0.9 (generation_config.json)",
            SamplerConfig(0.6, 5, 0.9),
        ),
        (
            "suggests",
            ["--temperature=1.5", "--top-p=1", "--min-p=0.1"],
            "temperature 1.5 (flag), top-k 5 (generation_config.json),"
            " top-p 1.0 (flag), min-p 0.1 (flag)",
            SamplerConfig(1.5, 5, 1.0, 0.1),
        ),
        (
            "greedy",
            [],
            "temperature 0.0 (generation_config.json)",
            SamplerConfig(0.0),
        ),
        (
            "suggests",
            ["--greedy"],
            "temperature 0.0 (flag)",
            SamplerConfig(0.0),
        ),
        (
            "odd",
            ["--top-k=3"],
            "temperature 0.8 (default), top-k 3 (flag)",
            SamplerConfig(top_k=3),
        ),
    ],
)
def test_tokens_are_drawn_as_the_model_suggests(talk, name, flags, line, sampler):
    status, out, err = talk(name, "the cat", flags=[*FEW, *flags, "--seed=5"])
    assert status == 0
    assert err[0] == f"sampling: {line}"
    assert out == by_hand(said("the cat"), seed=5, sampler=sampler) + "\n"


def test_an_answer_may_be_short_and_statistics_are_asked_for(talk):
    _, _, err = talk("plain", "the", flags=["--max-new-tokens=3"])
    assert err[1:] == ["the answer ends here: --max-new-tokens is 3"]
    _, _, err = talk("plain", "the", "cat", flags=["--max-new-tokens=3", "--stats"])
    stats = [line for line in err if line.startswith("prompt: ")]
    assert len(stats) == 2
    assert ", 0 of them read before; answer: 3 tokens, " in stats[0]
    assert ", 0 of them read before" not in stats[1]
    assert "tokens/s" in stats[1]


def test_a_narrow_context_is_said_to_be_one(talk):
    lines = ["the cat sat on the mat " * 2] * 4
    status, _, err = talk("narrow", *lines, flags=["--max-new-tokens=20"])
    assert status == 0
    assert any("outgrown the context of 120 tokens" in line for line in err)
    status, _, err = talk("narrow", "x" * 300, flags=FEW)
    assert status == 1
    assert err[-1].startswith("error: this message does not fit the context of 120")
    status, _, err = talk("narrow", "the", flags=["--greedy"])
    assert status == 0
    assert err[-1] == "the answer ends here: the context is full"


@pytest.mark.parametrize(
    ("name", "line", "flags", "message"),
    [
        ("bytes", "a", [], "no chat template, so it may be no chat model"),
        ("plain", "/nothing", [], "there is no command '/nothing': there are /reset,"),
        ("plain", "/save", [], "/save is empty: name a path"),
        ("plain", "/save /", [], "a folder: name a file"),
        ("plain", "/save /proc/none/x", [], "/proc/none"),
        ("plain", "a", ["--template=none"], "--template is 'none': it must be one of"),
        ("plain", "a", ["--top-p=0"], "top-p must be in (0, 1]"),
        ("plain", "a", ["--checkpoint=7"], "it has no checkpoints"),
        ("plain", "a", ["--variable=x"], "'x' is not of the form NAME=JSON"),
        ("plain", "a", ["--variable=x=y"], "'y' is not JSON"),
        ("plain", "\udc80", [], "is not UTF-8"),
        ("odd", "a", [], "generation_config.json has top_k = 'many'"),
        (
            "wrong",
            "a",
            [],
            "top-p must be in (0, 1], it is 2.0; say --top-p",
        ),
    ],
)
def test_mistakes_are_one_line(talk, name, line, flags, message):
    status, out, err = talk(name, line, flags=[*FEW, *flags])
    assert status == 1
    assert out == ""
    assert [one.startswith("error: ") for one in err].count(True) == 1
    assert message in err[-1]


def test_a_template_is_named_or_is_a_file(talk, tmp_path):
    status, out, _ = talk("bytes", "hi", flags=[*FEW, "--template=chatml"])
    assert status == 0
    assert out == by_hand(said("hi"), tokenizer=ByteTokenizer()) + "\n"
    file = tmp_path / "own.jinja"
    file.write_text("{{ raise_exception(reason) }}")
    flags = [f"--template={file}", '--variable=reason="tired"']
    status, out, err = talk("plain", "hi", flags=flags)
    assert status == 1
    assert err[-1] == "error: the chat template refuses this chat: tired"


@pytest.mark.parametrize("kv_dtype", ["bfloat16", "int8"])
def test_the_cache_may_have_another_dtype(talk, kv_dtype):
    lines, flags = ["the cat", "sat"], [*FEW, "--greedy", f"--kv-dtype={kv_dtype}"]
    status, out, _ = talk("plain", *lines, flags=flags)
    assert status == 0
    assert len(out) > 2


def test_generate_ends_where_a_text_ends_unless_it_is_told_to_go_on(
    folders, tmp_path, capsys
):
    """At either of two tokens that generation_config.json names."""
    prompt = tokenizer_with().encode_prompt("the cat")
    options = {"max_new_tokens": 12, "sampler": SamplerConfig(0.0)}
    (drawn,) = generate(
        model_with(tokenizer_with()), prompt, ignore_eos=True, **options
    )
    end = int(drawn[7])
    first = drawn.tolist().index(end)
    tokenizer = tokenizer_with(ids={"eos_token": (2, end)})
    assert tokenizer.eos_ids == (1, 2, end)
    save_packed(model_with(tokenizer), tmp_path / "model")
    command = ["generate", f"--workdir={tmp_path / 'model'}", "--prompt=the cat"]
    command += ["--greedy", "--max-new-tokens=12"]
    for flags, ids in (([], drawn[:first]), (["--ignore-eos"], drawn)):
        assert cli.main([*command, *flags]) == 0
        text = continuation(tokenizer, prompt, ids)
        assert capsys.readouterr().out == f"the cat{text}\n"


# -- At a terminal ------------------------------------------------------------------


# Ctrl-C goes to the processes that have the terminal for their own.
AT_TERMINAL = """
import fcntl, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
from vaani_jax.cli import main
sys.exit(main())
"""


class Terminal:
    """The command at a terminal of its own."""

    def __init__(self, *arguments):
        self.master, slave = pty.openpty()
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "dumb"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", AT_TERMINAL, "chat", *arguments],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            cwd=ROOT,
            env=environment,
            start_new_session=True,
        )
        os.close(slave)
        self.seen = ""

    def until(self, text, within=120.0):
        """Reads on until the text appears; what came before it."""
        deadline = time.monotonic() + within
        while text not in self.seen:
            ready, _, _ = select.select([self.master], [], [], 1.0)
            assert time.monotonic() < deadline, self.seen
            if ready:
                self.seen += self.read()
        before, _, self.seen = self.seen.partition(text)
        return before

    def read(self):
        try:
            return os.read(self.master, 4096).decode("utf-8", errors="replace")
        except OSError:  # the other side is closed
            raise AssertionError(self.seen) from None

    def type(self, text):
        os.write(self.master, text.encode())

    def close(self):
        self.process.kill()
        self.process.wait()
        os.close(self.master)


@pytest.fixture
def terminal():
    opened = []

    def start(*arguments):
        opened.append(Terminal(*arguments))
        return opened[-1]

    yield start
    for one in opened:
        one.close()


def test_ctrl_c_ends_an_answer_and_at_the_prompt_the_program(
    folders, terminal, tmp_path
):
    file = tmp_path / "chat.json"
    talk = terminal(
        *(f"--workdir={folders / 'plain'}", "--greedy", "--segment=1"),
        "--max-new-tokens=100000",
    )
    talk.until("Ctrl-D ends")
    talk.until("> ")
    talk.type("the cat\n")
    talk.until("the cat\r\n")
    while not talk.seen.strip():  # the answer has begun
        talk.seen += talk.read()
    talk.type("\x03")
    talk.until("> ")
    talk.type(f"/save {file}\n")
    talk.until("saved ")
    talk.until("> ")
    user, answer = json.loads(file.read_text())["messages"]
    assert user["content"] == "the cat"
    whole = by_hand(said("the cat"), count=3000 - 60, sampler=SamplerConfig(0.0))
    assert 0 < len(answer["content"]) < len(whole)
    assert whole.startswith(answer["content"])
    talk.type("/nothing\n")  # a mistake ends nothing
    talk.until("error: there is no command '/nothing'")
    talk.until("> ")
    talk.type("one\\\n")
    talk.until(". ")
    talk.type("two\n")
    talk.until("two\r\n")
    talk.until("\r\n", 60)
    talk.type("\x03")
    talk.until("> ")
    talk.type("\x03")
    assert talk.process.wait(60) == 130


def test_ctrl_d_ends_the_program(folders, terminal):
    talk = terminal(f"--workdir={folders / 'plain'}")
    talk.until("> ")
    talk.type("\x04")
    assert talk.process.wait(60) == 0


def test_a_second_ctrl_c_does_not_wait():
    with chat_command._stoppable() as stopped:
        assert not stopped()
        signal.raise_signal(signal.SIGINT)
        assert stopped()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler

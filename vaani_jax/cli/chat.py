"""Talks to a chat model, in the terminal or through a pipe."""

import argparse
import contextlib
import io
import json
import signal
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from vaani_jax.cli.drawing import (
    add_decoding,
    add_sampling,
    given,
    kv_dtype,
    make_sampler,
)
from vaani_jax.cli.output import notify
from vaani_jax.errors import VaaniError
from vaani_jax.files import to_json, write_atomically
from vaani_jax.paths import new_file
from vaani_jax.words import duration, plural, shown

if TYPE_CHECKING:
    from vaani_jax.inference.conversation import Answer, Conversation
    from vaani_jax.inference.model import Model
    from vaani_jax.inference.sampling import SamplerConfig

HELP = "Talk to a chat model."

PROMPT = "> "
PROMPT_AGAIN = ". "  # for the next line of a message


def add_arguments(parser: argparse.ArgumentParser) -> None:
    option = parser.add_argument
    option("--workdir", required=True, help="of the run, or packed")
    option("--system", default="", help="a message that stays before all others")
    option(
        "--template",
        default="",
        help="how chats are written: the name of one of the model's templates, chatml,"
        " or a .jinja file; the model's own if not given",
    )
    option(
        "--variable",
        action="append",
        default=[],
        type=_variable,
        metavar="NAME=JSON",
        help="of the template, such as enable_thinking=false",
    )
    add_sampling(parser, suggested=True)
    add_decoding(parser, max_new_tokens=1024, segment=4)
    option("--stats", action="store_true", help="say how fast each answer was")
    option("--checkpoint", default="best", help="best, last or a step")


def _variable(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not name.isidentifier() or not equals:
        raise argparse.ArgumentTypeError(f"{shown(text)} is not of the form NAME=JSON")
    try:
        return name, json.loads(value)
    except (ValueError, RecursionError):
        raise argparse.ArgumentTypeError(
            f"{shown(value)} is not JSON: write false, 3 or '\"text\"', for example"
        ) from None


def run(options: argparse.Namespace) -> int:
    from vaani_jax.cli.generate import keep_compiled
    from vaani_jax.devices.memory import return_freed_memory
    from vaani_jax.inference.conversation import Conversation
    from vaani_jax.inference.model import load
    from vaani_jax.text.chat import find_template

    make_sampler(options)  # what is wrong with flags is said before a model is read
    keep_compiled()
    return_freed_memory()  # masters, that are packed as they are read
    model = load(
        options.workdir, checkpoint=options.checkpoint, packed=True, notify=notify
    )
    sampler, source = _sampler(options, model)
    conversation = Conversation(
        model,
        find_template(model.tokenizer, options.template),
        system=options.system,
        sampler=sampler,
        max_new_tokens=options.max_new_tokens,
        seed=options.seed,
        kv_dtype=kv_dtype(options),
        segment=options.segment,
        variables=dict(options.variable),
        notify=notify,
    )
    notify(f"sampling: {source}")
    talk(conversation, stats=options.stats)
    return 0


def _sampler(
    options: argparse.Namespace, model: "Model"
) -> tuple["SamplerConfig", str]:
    """How tokens are drawn, and a line that says whose numbers these are."""
    from vaani_jax.inference.sampling import FILTERS, NUMBERS, suggested
    from vaani_jax.text.tokenizers import HFTokenizer

    generation: dict[str, Any] = {}
    if isinstance(model.tokenizer, HFTokenizer):
        generation = model.tokenizer.special.generation
    flags = given(options)
    # What a flag says need make no sense elsewhere.
    of_model = suggested({k: v for k, v in generation.items() if k not in flags})
    sampler = make_sampler(options, of_model)
    parts = []
    # Where the likeliest token is taken, no filter matters.
    for name in NUMBERS if sampler.temperature else ["temperature"]:
        value = getattr(sampler, name)
        if name in flags:
            whose = "flag"
        elif name in of_model:
            whose = "generation_config.json"
        elif name in FILTERS and value == FILTERS[name].off:
            continue
        else:
            whose = "default"
        parts.append(f"{name.replace('_', '-')} {value} ({whose})")
    return sampler, ", ".join(parts)


# -- Talking ------------------------------------------------------------------------


def talk(conversation: "Conversation", *, stats: bool = False) -> None:
    """Reads messages and commands from standard input, to its end, and answers.

    At a terminal, what is wrong with a message is said, and the talk goes on; from a
    pipe, which nobody watches, it is an error like any other.
    """
    watched = sys.stdin.isatty()
    if watched:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 - lines can be edited, and come back
        notify("/help lists the commands; Ctrl-D ends")
    for message in _messages(watched):
        try:
            if not message.startswith("/") or message.startswith("//"):
                _answer(conversation, message.removeprefix("/"), watched, stats)
            elif _command(conversation, message):
                return
        except VaaniError as error:
            if not watched:
                raise
            notify(f"error: {error}")


def _messages(watched: bool) -> Iterator[str]:
    """Lines of standard input; those that end with a backslash go on in the next."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # refused below, by name
    pending: list[str] = []
    while (line := _line(watched, PROMPT_AGAIN if pending else PROMPT)) is not None:
        pending.append(line.removesuffix("\\"))
        if line.endswith("\\"):
            continue
        message, pending = "\n".join(pending), []
        if any("\ud800" <= character <= "\udfff" for character in message):
            raise VaaniError(f"the message {shown(message)} is not UTF-8")
        if message.strip():
            yield message
    if pending:
        yield "\n".join(pending)


def _line(watched: bool, prompt: str) -> str | None:
    """The next line; None at the end."""
    if not watched:
        line = sys.stdin.readline()
        return line.removesuffix("\n").removesuffix("\r") if line else None
    if not sys.stdout.isatty():  # what is printed there is no place for a prompt
        print(prompt, end="", file=sys.stderr, flush=True)
        prompt = ""
    try:
        return input(prompt)
    except EOFError:
        print(file=sys.stderr)
        return None


def _answer(
    conversation: "Conversation", message: str, watched: bool, stats: bool
) -> None:
    """Prints the answer to a message, as it comes; at a terminal, Ctrl-C ends it."""
    with (
        _stoppable() if watched else contextlib.nullcontext(bool) as stopped,
        contextlib.closing(conversation.say(message)) as pieces,
    ):
        said = False
        for piece in pieces:
            print(piece, end="", flush=True)
            said = said or bool(piece)
            if stopped():
                break
    print(flush=True)
    found = conversation.last
    if found is None:
        return
    if found.end == "stopped" and not said:
        notify("nothing was said: the message is taken back")
    elif found.end == "length":
        notify(f"the answer ends here: --max-new-tokens is {found.drawn:,}")
    elif found.end == "context":
        notify("the answer ends here: the context is full")
    if stats:
        notify(_stats(found))


@contextlib.contextmanager
def _stoppable() -> Iterator[Callable[[], bool]]:
    """Has the first Ctrl-C set what is yielded, and the next one raise, as ever."""
    pressed: list[int] = []

    def press(number: int, frame: Any) -> None:
        if pressed:
            raise KeyboardInterrupt
        pressed.append(number)

    before = signal.signal(signal.SIGINT, press)
    try:
        yield lambda: bool(pressed)
    finally:
        signal.signal(signal.SIGINT, before)


def _stats(answer: "Answer") -> str:
    return (
        f"prompt: {plural(answer.prompt, 'token')}, {answer.reused:,} of them read"
        f" before; answer: {plural(answer.drawn, 'token')},"
        f" {answer.rate:,.1f} tokens/s; {duration(answer.waited)} to the first"
    )


# -- Commands -----------------------------------------------------------------------


def _reset(conversation: "Conversation", argument: str) -> None:
    conversation.reset()
    notify("the chat begins again")


def _system(conversation: "Conversation", argument: str) -> None:
    conversation.begin(argument)
    notify("the system message is set" if argument else "there is no system message")


def _undo(conversation: "Conversation", argument: str) -> None:
    done = conversation.undo()
    notify("the last exchange is taken back" if done else "there is nothing to undo")


def _save(conversation: "Conversation", argument: str) -> None:
    path = new_file(argument, "/save")
    text = to_json({"messages": conversation.chat()}, indent=1)
    try:
        write_atomically(path, f"{text}\n".encode())
    except OSError as error:
        raise VaaniError(f"can't write {path}: {error.strerror or error}") from None
    notify(f"saved {path}")


def _help(conversation: "Conversation", argument: str) -> None:
    for name, (text, _) in COMMANDS.items():
        notify(f"{name:14} {text}")
    notify("A backslash at its end continues a line, and // begins one with a slash.")
    notify("Ctrl-C ends an answer; at the prompt it ends the program, as Ctrl-D does.")


# What each does, for people, and a function; None ends. A further one is a row.
COMMANDS: dict[str, tuple[str, Callable[["Conversation", str], None] | None]] = {
    "/reset": ("begins the chat again", _reset),
    "/system TEXT": ("sets the system message; without TEXT there is none", _system),
    "/undo": ("takes the last exchange back", _undo),
    "/save FILE": ("writes the messages as JSON", _save),
    "/help": ("lists the commands", _help),
    "/exit": ("ends", None),
}


def _command(conversation: "Conversation", line: str) -> bool:
    """Does what a line says; whether that is to end.

    Raises VaaniError where there is no such command.
    """
    word, _, argument = line.partition(" ")
    functions = {name.split()[0]: function for name, (_, function) in COMMANDS.items()}
    if word not in functions:
        raise VaaniError(
            f"there is no command {shown(word)}: there are {', '.join(functions)};"
            f" // begins a message with a slash"
        )
    function = functions[word]
    if function is not None:
        function(conversation, argument.strip())
    return function is None

"""Chats as text: the templates of chat models, and where their answers end.

A template is a program in Jinja that came with a model. `text/rendering.py` runs it, in
a process of its own with limits; one such process serves all templates, for as long as
it lives.
"""

import atexit
import contextlib
import dataclasses
import json
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from typing import Any

from vaani_jax.errors import VaaniError
from vaani_jax.paths import local, read_small
from vaani_jax.text import rendering
from vaani_jax.text.special import DEFAULT
from vaani_jax.text.tokenizers import HFTokenizer, Tokenizer
from vaani_jax.words import one_line, shown

Message = dict[str, Any]  # "role" and "content", and whatever else a template reads

# What a template of today calls the reasoning of a message, and what others call it.
REASONING = "reasoning_content"
REASONING_ALSO = ("thinking", "reasoning")

# Templates to use where a model has none. A further one is a row.
TEMPLATES = {
    "chatml": (
        "{% for message in messages %}"
        "{{ '<|im_start|>' + message['role'] + '\\n' + message['content']"
        " + '<|im_end|>\\n' }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    ),
}


@dataclasses.dataclass(frozen=True)
class ChatTemplate:
    """How a chat is written.

    Attributes:
      source: in Jinja.
      names: texts of special tokens by their part ("bos_token"), which it may use.
    """

    source: str
    names: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Any] | None = None,
        **variables: Any,
    ) -> str:
        """The text of a chat, as `apply_chat_template` of transformers writes it.

        Args:
          messages: in order; keys whose value is None count as missing.
          add_generation_prompt: whether to open the answer that comes next.
          tools: their JSON schemas.
          variables: whatever else the template reads, such as ``enable_thinking``;
            plain values.

        Raises:
          VaaniError: the template refuses these messages, is broken, or takes more
            time, memory or room than a template may; or Jinja is not installed.
        """
        given = {
            **self.names,
            "documents": None,
            **variables,
            "messages": [_plain(message) for message in messages],
            "tools": tools,
            "add_generation_prompt": add_generation_prompt,
        }
        reply = _PROCESS.ask(
            {
                "template": self.source,
                "variables": given,
                "seconds": rendering.SECONDS,
            }
        )
        if "text" in reply:
            return str(reply["text"])
        if reply.get("missing"):
            raise VaaniError(
                "chat templates need a package that is not installed:"
                " pip install 'vaani-jax[interop]'"
            )
        said = one_line(str(reply.get("error")))[:300]
        if reply.get("refused"):
            raise VaaniError(f"the chat template refuses this chat: {said}")
        line = f" at line {reply['line']}" if reply.get("line") else ""
        raise VaaniError(f"the chat template fails{line}: {said}")


def _plain(message: Message) -> Message:
    """A message without keys that hold nothing, its reasoning under all its names."""
    message = {key: value for key, value in message.items() if value is not None}
    names = (REASONING, *REASONING_ALSO)
    reasoning = next((message[name] for name in names if name in message), None)
    if reasoning is None:
        return message
    return {REASONING_ALSO[0]: reasoning, **message, REASONING: reasoning}


class _Process:
    """The process that renders, started when it is first asked."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: subprocess.Popen[str] | None = None
        atexit.register(self.end)

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """Its reply; an "error" where it ends instead. Raises VaaniError."""
        try:
            line = json.dumps(request, allow_nan=True)
        except (TypeError, ValueError, RecursionError) as error:
            raise VaaniError(f"a chat holds plain values only: {error}") from None
        with self._lock:
            try:
                return self._reply(line)
            except BaseException:
                self.end()  # what it may still say is the reply to no later request
                raise

    def _reply(self, line: str) -> dict[str, Any]:
        if self._running is None:
            # Of a session of its own, so that no Ctrl-C at a terminal reaches it.
            self._running = subprocess.Popen(
                [sys.executable, "-P", rendering.__file__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                encoding="ascii",
                start_new_session=True,
            )
        process = self._running
        assert process.stdin is not None
        assert process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended: it says nothing
            process.stdin.write(f"{line}\n")
            process.stdin.flush()
        if reply := process.stdout.readline():
            found: dict[str, Any] = json.loads(reply)
            return found
        status = process.wait()
        self.end()
        if status == -signal.SIGXCPU:
            return {"error": f"it takes more than {rendering.SECONDS} s"}
        return {"error": f"the process that renders it has ended (status {status})"}

    def end(self) -> None:
        """Ends the process, if there is one."""
        process, self._running = self._running, None
        if process is None:
            return
        process.kill()
        for stream in (process.stdin, process.stdout):
            with contextlib.suppress(OSError):
                if stream is not None:
                    stream.close()
        process.wait()


_PROCESS = _Process()


def find_template(tokenizer: Tokenizer, wanted: str = "") -> ChatTemplate:
    """The chat template of a model, or another one.

    Args:
      tokenizer: of the model.
      wanted: the name of one of its templates, a key of `TEMPLATES`, or the path of a
        ``.jinja`` file; "" for the model's own.

    Raises VaaniError where there is none.
    """
    own, names = {}, {}
    if isinstance(tokenizer, HFTokenizer):
        own, names = tokenizer.special.templates, tokenizer.special.names
    if not wanted:
        if DEFAULT in own or len(own) == 1:
            return ChatTemplate(own.get(DEFAULT) or next(iter(own.values())), names)
        if own:
            raise VaaniError(
                "this model has several chat templates, and none is its default: choose"
                f" one with --template, of {', '.join(own)}"
            )
        raise VaaniError(
            "this model has no chat template, so it may be no chat model: `vaani"
            " generate` continues a text; to chat all the same, name a template with"
            f" --template ({', '.join(TEMPLATES)}, or a .jinja file)"
        )
    known = {**TEMPLATES, **own}
    if wanted in known:
        return ChatTemplate(known[wanted], names)
    path = local(wanted, "--template")
    if not path.is_file():
        raise VaaniError(
            f"--template is {shown(wanted)}: it must be one of {', '.join(known)}, or"
            " the path of a .jinja file"
        )
    return ChatTemplate(read_small(path), names)


@dataclasses.dataclass(frozen=True)
class Ending:
    """What ends an answer, besides the length that is asked for.

    Attributes:
      ids: tokens, each of which ends it.
      text: ends it as well, and is no part of it; "" for nothing.
    """

    ids: tuple[int, ...]
    text: str = ""


_MARK = "Xyzzy."  # no template writes it


def find_ending(
    tokenizer: Tokenizer, template: ChatTemplate, variables: Mapping[str, Any] = {}
) -> Ending:
    """What ends an answer: tokens that end a text, and what the template writes there.

    Not every model names the token that ends its turns among those that end a text; but
    its template writes it behind an answer. Where the tokenizer has no token for that,
    its letters end the answer.

    Args:
      tokenizer: of the model.
      template: how its chats are written.
      variables: see `ChatTemplate.render`.
    """
    ids = tokenizer.eos_ids
    chat = [
        {"role": "user", "content": "?"},
        {"role": "assistant", "content": _MARK},
    ]
    try:
        text = template.render(chat, add_generation_prompt=False, **variables)
    except VaaniError:
        return Ending(ids)  # whatever is wrong, the chat itself will show
    _, mark, behind = text.rpartition(_MARK)
    behind = behind.strip()
    if not mark or not behind:
        return Ending(ids)
    if isinstance(tokenizer, HFTokenizer):
        first = int(tokenizer.encode(behind)[0])
        if tokenizer.is_special(first):
            return Ending(tuple(dict.fromkeys((*ids, first))))
    return Ending(ids, behind.splitlines()[0])

"""A chat with a model: what was said, and what of it the model still sees.

The template of the model writes the chat; the model continues that text, and what it
adds is its answer. Where the chat outgrows the context, its oldest exchanges are
dropped, until half of the context is free: a turn at a time, the rest would be read
again at each.
"""

import bisect
import dataclasses
import time
from collections.abc import Callable, Generator, Mapping
from typing import Any, Literal

import numpy as np

from vaani_jax.errors import VaaniError
from vaani_jax.inference.generate import SEGMENT, Session
from vaani_jax.inference.model import Model
from vaani_jax.inference.sampling import SamplerConfig
from vaani_jax.settings import LARGEST_SEED
from vaani_jax.text.chat import ChatTemplate, Message, find_ending
from vaani_jax.text.tokenizers import Spelling

LEAST_ROOM = 4  # a message may take all of the context but one part in so many


End = Literal["ended", "length", "context", "stopped"]


@dataclasses.dataclass(frozen=True)
class Answer:
    """What an answer has cost.

    Attributes:
      prompt: tokens of the chat before it.
      reused: how many of them the cache held already.
      drawn: tokens of it.
      first: how many of these came first, together.
      waited: seconds until these.
      seconds: from there to the end.
      end: why it ended: the model ended it, it is as long as was asked for, the context
        is full, or nobody wanted more.
    """

    prompt: int
    reused: int
    drawn: int
    first: int
    waited: float
    seconds: float
    end: End

    @property
    def rate(self) -> float:
        """Tokens per second, apart from those that came first, where more followed."""
        if self.drawn > self.first:
            return (self.drawn - self.first) / max(self.seconds, 1e-9)
        return self.drawn / max(self.waited, 1e-9)


class Conversation:
    """A chat with a model, turn by turn.

    Attributes:
      system: the system message; "" for none.
      messages: of the user and the assistant, in turn, as far as the model sees them.
      answers: how many there have been, with those that were taken back.
      last: what the last one has cost; None before there is one.
    """

    last: Answer | None

    def __init__(
        self,
        model: Model,
        template: ChatTemplate,
        *,
        system: str = "",
        sampler: SamplerConfig = SamplerConfig(),
        max_new_tokens: int = 1024,
        seed: int = 0,
        kv_dtype: str | None = None,
        segment: int = SEGMENT,
        variables: Mapping[str, Any] | None = None,
        notify: Callable[[str], None] = print,
    ) -> None:
        """Begins a chat; the model reads nothing yet.

        Args:
          model: packed or not.
          template: how its chats are written.
          system: a message that stays before all others; "" for none.
          sampler: how tokens are drawn.
          max_new_tokens: the most of an answer.
          seed: of the first answer; the next ones count on from it.
          kv_dtype, segment: see `inference.generate.segments`.
          variables: of the template, see `ChatTemplate.render`.
          notify: receives a line where messages are dropped.

        Raises VaaniError where the template fails on a chat that only begins.
        """
        self.messages = list[Message]()
        self.answers, self.last = 0, None
        self._model, self._template = model, template
        self._variables = dict(variables or {})
        self._sampler, self._most, self._seed = sampler, max_new_tokens, seed
        self._notify = notify
        self._session = Session(model, kv_dtype=kv_dtype, segment=segment)
        self.begin(system)
        self._ending = find_ending(model.tokenizer, template, self._variables)

    def begin(self, system: str) -> None:
        """Sets the system message; "" for none. What was said stays.

        Raises VaaniError, and leaves the old one, where the template takes none.
        """
        self._written(system, [{"role": "user", "content": "?"}])
        self.system = system

    def say(self, text: str) -> Generator[str, None, None]:
        """Says something, and yields the answer as it comes, in whole characters.

        What is yielded may be empty. The chat then holds both. Whoever closes the
        iterator early ends the answer there: what was yielded stays. Where that is
        nothing, the chat is what it was.

        Raises VaaniError, with the chat left as it was, for a message that does not fit
        the context, or that the template or the tokenizer refuses.
        """
        said: Message = {"role": "user", "content": text}
        ids = self._fitting([*self.messages, said])
        spelling, stop = Spelling(self._model.tokenizer, ids), self._ending.text
        shown, drawn, first = "", 0, 0
        end: End = "stopped"
        begun = waited = time.perf_counter()
        try:
            for new in self._session.continued(
                ids,
                max_new_tokens=self._most,
                sampler=self._sampler,
                seed=(self._seed + self.answers) % (LARGEST_SEED + 1),
                ends=self._ending.ids,
            ):
                if not drawn:
                    first, waited = len(new), time.perf_counter()
                drawn += len(new)
                over = int(new[-1]) in self._ending.ids
                spelling.add(new[:-1] if over else new)
                whole = spelling.text.partition(stop)[0] if stop else spelling.text
                if over or len(whole) < len(spelling.text):
                    end = "ended"
                    break
                ready = whole[: len(whole) - _begun(whole, stop)]
                piece, shown = ready[len(shown) :], max(shown, ready, key=len)
                yield piece  # nothing, at times: whoever listens may have enough
            else:
                end = "length" if drawn == self._most else "context"
            spelling.end()
            whole = spelling.text.partition(stop)[0] if stop else spelling.text
            if len(whole) > len(shown):
                piece, shown = whole[len(shown) :], whole
                yield piece
        finally:
            self.answers += 1
            self.last = Answer(
                len(ids),
                self._session.reused,
                drawn,
                first,
                waited - begun,
                time.perf_counter() - waited,
                end,
            )
            if shown or end != "stopped":
                answer: Message = {"role": "assistant", "content": shown}
                self.messages += [said, answer]

    def undo(self) -> bool:
        """Takes the last exchange back; False where there is none."""
        taken, self.messages = self.messages[-2:], self.messages[:-2]
        return bool(taken)

    def reset(self) -> None:
        """Begins again, with the same system message."""
        self.messages = []

    def chat(self) -> list[Message]:
        """All messages, with that of the system."""
        return self._with_system(self.system, self.messages)

    @staticmethod
    def _with_system(system: str, messages: list[Message]) -> list[Message]:
        first = [{"role": "system", "content": system}] if system else []
        return first + messages

    def _written(self, system: str, messages: list[Message]) -> str:
        chat = self._with_system(system, messages)
        return self._template.render(chat, **self._variables)

    def _fitting(self, messages: list[Message]) -> np.ndarray:
        """The ids of a chat, of which the oldest exchanges are dropped if need be."""

        def without(count: int) -> np.ndarray:
            text = self._written(self.system, messages[2 * count :])
            return self._model.tokenizer.encode(text)

        context = self._model.architecture.max_seq_len
        most = context - max(1, min(self._most, context // LEAST_ROOM))
        ids = without(0)
        if len(ids) <= most:
            return ids
        exchanges = len(messages) // 2
        # Longer chats have more tokens; a few looks find how many exchanges stay.
        dropped = bisect.bisect_left(
            range(exchanges), True, key=lambda n: len(without(n)) <= context // 2
        )
        ids = without(dropped)
        if len(ids) > most:
            raise VaaniError(
                f"this message does not fit the context of {context:,} tokens: with"
                f" what the template adds it has {len(ids):,}, and at most {most:,}"
                " leave room for an answer; shorten it"
            )
        self.messages = messages[2 * dropped : -1]
        many = (
            f"{dropped:,} oldest exchanges were"
            if dropped > 1
            else "oldest exchange was"
        )
        self._notify(
            f"the chat has outgrown the context of {context:,} tokens: its {many}"
            " dropped"
        )
        return ids


def _begun(text: str, stop: str) -> int:
    """How many characters at the end of a text may be the beginning of ``stop``."""
    longest = min(len(text), max(0, len(stop) - 1))
    return next((n for n in range(longest, 0, -1) if stop.startswith(text[-n:])), 0)

"""A chat: what the model sees of it, where its answers end, what stays."""

import itertools
import json

import jax
import numpy as np
import pytest
from text.words_tokenizer import words_tokenizer

from vaani_jax.errors import VaaniError
from vaani_jax.inference import conversation as conversation_module
from vaani_jax.inference.conversation import Conversation, _begun
from vaani_jax.inference.generate import generate, until_end
from vaani_jax.inference.model import Model
from vaani_jax.inference.sampling import SamplerConfig
from vaani_jax.model.transformer import Vaani, init_variables
from vaani_jax.text.chat import TEMPLATES, ChatTemplate
from vaani_jax.text.special import Special
from vaani_jax.text.tokenizers import ByteTokenizer, HFTokenizer, continuation

CHATML = ChatTemplate(TEMPLATES["chatml"])
SPECIAL = Special({"bos_token": "<s>", "eos_token": "</s>"})
TOKENIZER = HFTokenizer(words_tokenizer().to_str(), special=SPECIAL)
END = 3  # <|im_end|>


def model_with(tokenizer, context=200):
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
    return Model(module, init_variables(module, jax.random.key(2)), tokenizer)


class Scripted:
    """A session that draws what it is told to, a few ids at a time."""

    def __init__(self, tokenizer, answers, step=2):
        self.tokenizer, self.answers, self.step = tokenizer, list(answers), step
        self.reused, self.read = 0, []

    def continued(self, text, *, max_new_tokens, sampler, seed, ends):
        self.read.append(self.tokenizer.decode(text))
        answer = self.answers.pop(0)
        ids = answer if isinstance(answer, list) else self.tokenizer.encode(answer)
        ids = np.asarray(ids, np.int32)[:max_new_tokens]
        for i in range(0, len(ids), self.step):
            new = ids[i : i + self.step]
            hits = np.isin(new, ends)
            if hits.any():
                yield new[: int(hits.argmax()) + 1]
                return
            yield new


def scripted(answers, tokenizer=TOKENIZER, context=200, step=2, **options):
    talk = Conversation(model_with(tokenizer, context), CHATML, **options)
    session = Scripted(tokenizer, answers, step)
    talk._session = session  # type: ignore[assignment]
    return talk, session


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def test_a_chat_is_what_a_fresh_reading_of_it_would_be():
    """Turn by turn, with a cache that stays, from a model and not a script."""
    model = model_with(TOKENIZER, 600)
    sampler = SamplerConfig(temperature=1.0)
    options: dict = {"sampler": sampler, "max_new_tokens": 12}
    talk = Conversation(model, CHATML, system="the mat", seed=7, segment=5, **options)
    messages = [{"role": "system", "content": "the mat"}]
    reused = []
    for turn, text in enumerate(["the cat", "sat on", "é?", "the"]):
        messages.append(user(text))
        ids = TOKENIZER.encode(CHATML.render(messages))
        (expected,) = generate(model, ids, seed=7 + turn, ignore_eos=True, **options)
        cut = [i for i, token in enumerate(expected) if token in (1, END)]
        kept = expected[: cut[0]] if cut else expected
        answer = continuation(TOKENIZER, ids, kept)
        assert "".join(talk.say(text)) == answer
        messages.append(assistant(answer))
        assert talk.chat() == messages
        assert talk.last is not None
        assert talk.last.prompt == len(ids)
        assert talk.last.end == ("ended" if cut else "length")
        reused.append(talk.last.reused)
    assert reused[0] == 0
    assert all(np.diff(reused) > 5)


def test_an_answer_ends_at_any_token_that_ends_one():
    special = Special(
        {"eos_token": "</s>"},
        generation={"eos_token_id": [1, 4]},
        ids={"eos_token": (4,)},
    )
    tokenizer = HFTokenizer(words_tokenizer().to_str(), special=special)
    assert tokenizer.eos_ids == (1, 4)
    the, cat = tokenizer.encode("the cat").tolist()[0], 5
    for end in (1, END, 4):
        talk, _ = scripted([[the, cat, the, end, the]], tokenizer)
        text = "".join(talk.say("the"))
        assert text == tokenizer.decode([the, cat, the])
        assert talk.messages == [user("the"), assistant(text)]
        assert talk.last is not None
        assert (talk.last.end, talk.last.drawn) == ("ended", 4)
    assert until_end(np.asarray([the, 4]), tokenizer).tolist() == [the]


@pytest.mark.parametrize("step", [1, 2, 3, 7, 50])
@pytest.mark.parametrize(
    ("drawn", "said", "end"),
    [
        ("yes<|im_end|>\nno", "yes", "ended"),
        ("<|im_end|>", "", "ended"),
        ("a < b <|im_e", "a < b <|im_e", "length"),
        ("<<|im_<|im_end|>", "<<|im_", "ended"),
        ("é😀<|im_end|><|im_end|>", "é😀", "ended"),
    ],
)
def test_letters_end_an_answer_wherever_they_are_cut(step, drawn, said, end):
    tokenizer = ByteTokenizer()
    count = len(tokenizer.encode(drawn))
    talk, _ = scripted([drawn], tokenizer, step=step, max_new_tokens=count)
    parts = list(talk.say("?"))
    assert "".join(parts) == said
    assert talk.messages == [user("?"), assistant(said)]
    assert talk.last is not None
    assert talk.last.end == end


def test_the_beginning_of_an_ending_is_held_back():
    assert [_begun(text, "<|e|>") for text in ("", "a", "a<", "<|e|", "<<|", "|e")] == [
        *(0, 0, 1, 4, 2, 0)
    ]
    assert _begun("anything", "") == 0


def test_half_characters_wait_and_what_is_none_comes_last():
    smile = list("😀".encode())
    talk, _ = scripted([smile + smile[:2]], ByteTokenizer(), step=3, max_new_tokens=6)
    assert list(talk.say("?")) == ["", "😀", "\ufffd"]


def test_what_was_said_stays_when_nobody_wants_more():
    talk, session = scripted(["the cat sat", "on", "mat"])
    answer = talk.say("one")
    first = next(answer)
    answer.close()
    assert talk.messages == [user("one"), assistant(first)]
    assert talk.last is not None
    assert talk.last.end == "stopped"
    assert "".join(talk.say("two")) == "on"
    assert f"assistant\n{first}<|im_end|>" in session.read[1]
    # Where nothing was said, as of half a character, the message goes as well.
    silent, _ = scripted([[*"😀".encode()]], ByteTokenizer())
    answer = silent.say("three")
    assert next(answer) == ""
    answer.close()
    assert silent.messages == []
    answer = talk.say("three")
    assert next(answer)
    with pytest.raises(KeyboardInterrupt):
        answer.throw(KeyboardInterrupt)
    assert [m["content"] for m in talk.messages[-2:]] == ["three", "mat"]


def test_undo_reset_and_another_system_message():
    talk, session = scripted(["a", "b", "c", "d", "e"])
    for text in ("1", "2"):
        list(talk.say(text))
    assert talk.undo()
    assert talk.chat() == [user("1"), assistant("a")]
    talk.begin("the mat")
    list(talk.say("3"))
    assert session.read[-1].startswith("<|im_start|>system\nthe mat<|im_end|>\n")
    assert "2" not in session.read[-1]
    assert talk.chat()[0] == {"role": "system", "content": "the mat"}
    talk.reset()
    assert talk.chat() == [{"role": "system", "content": "the mat"}]
    assert not talk.undo()
    talk.begin("")
    assert talk.chat() == []
    assert talk.answers == 3


def test_the_next_answer_has_another_seed(monkeypatch):
    seeds = []
    talk, session = scripted(["a"] * 3, seed=2**32 - 2)
    continued = session.continued

    def spy(text, *, seed, **options):
        seeds.append(seed)
        return continued(text, seed=seed, **options)

    monkeypatch.setattr(session, "continued", spy)
    for _ in range(3):
        list(talk.say("?"))
        talk.undo()
    assert seeds == [2**32 - 2, 2**32 - 1, 0]


def test_the_oldest_exchanges_are_dropped_whole_and_it_is_said():
    said: list[str] = []
    talk, session = scripted(
        ["the cat"] * 40,
        ByteTokenizer(),
        context=600,
        system="first",
        max_new_tokens=50,
        notify=said.append,
    )
    sizes = []
    for i in range(30):
        list(talk.say(f"message {i}"))
        sizes.append(len(session.read[-1].encode()))
        shown = session.read[-1]
        assert shown.startswith("<|im_start|>system\nfirst<|im_end|>\n")
        assert shown.count("<|im_start|>user") == shown.count("<|im_start|>assistant")
        assert f"message {i}<" in shown
        # Those that stay are the newest, without a gap.
        kept = [f"message {n}<" in shown for n in range(i + 1)]
        assert kept == sorted(kept)
    assert max(sizes) <= 550
    falls = [(a, b) for a, b in itertools.pairwise(sizes) if b < a]
    assert len(falls) == len(said) >= 3
    assert all(b <= 300 for _, b in falls)  # half of the context is free again
    assert all("outgrown the context of 600 tokens" in line for line in said)
    assert all("oldest exchanges were dropped" in line for line in said)


def test_a_message_that_does_not_fit_is_refused_and_changes_nothing():
    talk, session = scripted(["a", "b"], ByteTokenizer(), context=200)
    list(talk.say("one"))
    before = talk.chat()
    with pytest.raises(VaaniError) as caught:
        list(talk.say("x" * 150))
    assert "does not fit the context of 200 tokens" in str(caught.value)
    assert "at most 150" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert talk.chat() == before
    list(talk.say("two"))
    assert len(session.read) == 2


def test_what_the_template_refuses_changes_nothing():
    source = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}"
        "{% endif %}{% for m in messages %}{% if 'bad' in m.content %}"
        "{{ raise_exception('bad') }}{% endif %}{{ m.content }}\n{% endfor %}"
    )
    model = model_with(ByteTokenizer())
    with pytest.raises(VaaniError, match="no system"):
        Conversation(model, ChatTemplate(source), system="x")
    talk = Conversation(model, ChatTemplate(source), max_new_tokens=2)
    with pytest.raises(VaaniError, match="no system"):
        talk.begin("x")
    assert talk.system == ""
    with pytest.raises(VaaniError, match="bad"):
        list(talk.say("so bad"))
    assert talk.messages == []
    list(talk.say("good"))
    assert len(talk.messages) == 2


def test_variables_reach_the_template():
    source = "{{ messages[-1].content }}{% if enable_thinking is false %}!{% endif %}"
    model = model_with(ByteTokenizer())
    options: dict = {"variables": {"enable_thinking": False}, "max_new_tokens": 1}
    talk = Conversation(model, ChatTemplate(source), **options)
    list(talk.say("abc"))
    assert talk.last is not None
    assert talk.last.prompt == 4


def test_the_rate_leaves_the_prompt_out_where_it_can():
    answer = conversation_module.Answer(10, 0, 9, 4, 2.0, 0.5, "length")
    assert answer.rate == 10.0
    answer = conversation_module.Answer(10, 0, 4, 4, 2.0, 0.5, "length")
    assert answer.rate == 2.0


def test_a_chat_is_json():
    talk, _ = scripted(["é"])
    list(talk.say("?"))
    assert json.loads(json.dumps(talk.chat())) == [user("?"), assistant("é")]

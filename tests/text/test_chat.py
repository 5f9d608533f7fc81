"""Chats are written as transformers writes them, and no template takes all there is."""

import concurrent.futures
import datetime
import json
import os
import random
import subprocess
import sys
import time
from typing import Any

os.environ["TORCHDYNAMO_DISABLE"] = "1"

import jinja2
import pytest
import transformers
from text.words_tokenizer import words_tokenizer

from vaani_jax.errors import VaaniError
from vaani_jax.text import chat, rendering
from vaani_jax.text.chat import (
    TEMPLATES,
    ChatTemplate,
    find_ending,
    find_template,
)
from vaani_jax.text.special import Special
from vaani_jax.text.tokenizers import ByteTokenizer, HFTokenizer

NAMES = {"bos_token": "<s>", "eos_token": "</s>"}

# Of the kinds in circulation: what they do, and what of Jinja they use.
LLAMA3 = """\
{{- bos_token }}
{%- if date_string is not defined %}
    {%- set date_string = strftime_now("%d %b %Y") %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{{- "Today Date: " + date_string + "\\n\\n" + system_message + "<|eot_id|>" }}
{%- if tools is not none %}
    {%- for t in tools %}
        {{- t | tojson(indent=4) }}
        {{- "\\n\\n" }}
    {%- endfor %}
{%- endif %}
{%- for message in messages %}
    {%- if not (message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' -}}
        {{- message['content'] | trim + '<|eot_id|>' }}
    {%- elif 'tool_calls' in message %}
        {%- if not message.tool_calls|length == 1 %}
            {{- raise_exception("This model takes one tool call at a time!") }}
        {%- endif %}
        {{- message.tool_calls[0].function | tojson }}
    {%- else %}
        {{- "ipython: " + (message.content | tojson) }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
MISTRAL = """\
{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{%- set user_messages = loop_messages | selectattr("role", "equalto", "user") | list %}
{{- bos_token }}
{%- set ns = namespace(index=0) %}
{%- for message in loop_messages %}
    {%- if (message["role"] == "user") != (ns.index % 2 == 0) %}
        {{- raise_exception("roles must alternate user/assistant/user/assistant/...") }}
    {%- endif %}
    {%- set ns.index = ns.index + 1 %}
    {%- if message["role"] == "user" %}
        {%- if loop.last and system_message is defined %}
            {{- "[INST] " + system_message + "\\n\\n" -}}
            {{- message["content"] + "[/INST]" }}
        {%- else %}
            {{- "[INST] " + message["content"] + "[/INST]" }}
        {%- endif %}
    {%- elif message["role"] == "assistant" %}
        {{- " " + message["content"]|trim + eos_token}}
    {%- else %}
        {{- raise_exception("Only user and assistant roles, not " + message["role"]) }}
    {%- endif %}
{%- endfor %}
{{- user_messages | length }}
"""
QWEN3 = """\
{%- if messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(multi_step_tool=true, last=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" and message.content is string
           and not(message.content.startswith('<tool_response>')
                   and message.content.endswith('</tool_response>')) %}
        {%- set ns.multi_step_tool = false %}
        {%- set ns.last = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.content is string %}
        {%- set content = message.content %}
    {%- else %}
        {%- set content = '' %}
    {%- endif %}
    {%- if message.role == "user" or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {%- set reasoning = '' %}
        {%- if message.reasoning_content is string %}
            {%- set reasoning = message.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set reasoning = content.split('</think>')[0].rstrip('\\n') -%}
            {%- set reasoning = reasoning.split('<think>')[-1].lstrip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {{- '<|im_start|>' + message.role + '\\n' }}
        {%- if loop.index0 > ns.last and (loop.last or reasoning) %}
            {{- '<think>\\n' + reasoning.strip('\\n') + '\\n</think>\\n\\n' }}
        {%- endif %}
        {{- content.lstrip('\\n') + '<|im_end|>\\n' }}
    {%- elif message.role == "tool" %}
        {%- if loop.first or (messages[loop.index0 - 1].role != "tool") %}
            {{- '<|im_start|>user' }}
        {%- endif %}
        {{- '\\n<tool_response>\\n' + content + '\\n</tool_response>' }}
        {%- if loop.last or (messages[loop.index0 + 1].role != "tool") %}
            {{- '<|im_end|>\\n' }}
        {%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""
GEMMA = """\
{{ bos_token }}{% if messages[0]['role'] == 'system' %}\
{{ raise_exception('System role not supported') }}{% endif %}
{% for message in messages %}
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('Conversation roles must alternate user/assistant/...') }}
{% endif %}
{% if (message['role'] == 'assistant') %}
{% set role = 'model' %}
{% else %}
{% set role = message['role'] %}
{% endif %}
{{ '<start_of_turn>' + role + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}
{% endfor %}
{% if add_generation_prompt %}{{'<start_of_turn>model\\n'}}{% endif %}
"""
BLOCKS = """\
{% macro say(role, text) -%}<{{ role }}>{{ text }}</{{ role }}>{%- endmacro %}
{% for message in messages %}
  {% if message.role == 'tool' %}{% continue %}{% endif %}
  {% if loop.index > 4 %}{% break %}{% endif %}
  {%- if message.role == 'assistant' %}
    {% generation %}{% set note = 1 %}{{ say('a', message.content) }}{% endgeneration %}
  {%- else %}
    {{ say(message.role[0]|upper, message.content|default('-', true)) }}{{ note }}
  {%- endif %}
  {% for key, value in message.items() %}{{ key }}={{ value }};{% endfor %}
{% endfor %}
{{ {'b': [1, none, true], 'a': "é<&'"} | tojson }}|{{ documents }}|{{ nothing }}|\
{{ dict(x=1) | tojson(indent=2, sort_keys=true) }}{{ range(3) | join(',') }}
"""
STYLES = {
    "chatml": TEMPLATES["chatml"],
    "llama3": LLAMA3,
    "mistral": MISTRAL,
    "qwen3": QWEN3,
    "gemma": GEMMA,
    "blocks": BLOCKS,
}
TEXTS = ("Hi", "  two  lines\n\nof it \n", "<|im_end|>", "é 😀 <b>&'\"", "a {{ b }} %}")
THOUGHTS = ("<think>\nwell\n</think>\n\nYes.", "</think>x", "Yes. ")


def chats():
    """Message lists of many kinds, the same ones each time."""
    draw = random.Random(0)
    for _ in range(60):
        found = []
        if draw.random() < 0.4:
            found.append({"role": "system", "content": draw.choice(TEXTS)})
        roles = ["user", "assistant"] * 3
        if draw.random() < 0.3:
            draw.shuffle(roles)
        for role in roles[: draw.randint(1, 6)]:
            message: dict[str, Any] = {"role": role, "content": draw.choice(TEXTS)}
            if role == "assistant" and draw.random() < 0.5:
                message["content"] = draw.choice(THOUGHTS)
            if role == "assistant" and draw.random() < 0.3:
                message[draw.choice(["reasoning_content", "thinking"])] = "I think."
            if draw.random() < 0.1:
                message = {"role": "tool", "content": "42", "name": None}
            if draw.random() < 0.05:
                message["tool_calls"] = [{"function": {"name": "f", "b": "é"}}] * 2
            found.append(message)
        yield found


@pytest.fixture(scope="module")
def theirs():
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words_tokenizer(), **NAMES
    )
    return made


def outcome(function):
    """The text, or what is refused."""
    try:
        return function(), ""
    except (VaaniError, jinja2.TemplateError, TypeError) as error:
        return None, str(error)


@pytest.mark.parametrize("style", STYLES)
def test_a_chat_is_written_as_transformers_writes_it(style, theirs):
    ours, source = ChatTemplate(STYLES[style], NAMES), STYLES[style]
    written = refused = 0
    variables: list[dict[str, Any]] = [
        {},
        {"add_generation_prompt": False},
        {"enable_thinking": False, "tools": [{"name": "f", "of": ["ü", 1.5]}]},
        {"date_string": "1 Jan 2026", "bos_token": "<other>"},
    ]
    for messages in chats():
        for more in variables:
            given = {"add_generation_prompt": True, **more}
            expected, why = outcome(
                lambda messages=messages, given=given: theirs.apply_chat_template(
                    messages, chat_template=source, tokenize=False, **given
                )
            )
            found, said = outcome(
                lambda messages=messages, given=given: ours.render(messages, **given)
            )
            assert found == expected, messages
            if expected is None:
                refused += 1
                assert why.splitlines()[0][:60] in said
                assert "\n" not in said
            else:
                written += 1
    assert written > 20
    assert bool(refused) == (style in ("llama3", "mistral", "gemma"))


def test_the_ids_are_those_of_transformers(theirs):
    tokenizer = HFTokenizer(words_tokenizer().to_str(), special=Special(NAMES))
    messages = [{"role": "user", "content": "the cat"}]
    text = ChatTemplate(MISTRAL, NAMES).render(messages)
    expected = theirs.apply_chat_template(
        messages, chat_template=MISTRAL, return_dict=False
    )
    assert tokenizer.encode(text).tolist() == expected


def test_the_day_is_today():
    text = ChatTemplate("{{ strftime_now('%Y-%m') }}").render([])
    assert text == datetime.datetime.now().strftime("%Y-%m")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("a\n\n{{ nobody.name }}", "fails at line 3: 'nobody' is undefined"),
        ("a\n{% for %}", "fails at line 2: Expected an expression"),
        ("{% if x %}", "fails at line 1: Unexpected end of template"),
        ("{{ 1 // 0 }}", "fails at line 1: integer division"),
        ("{{ 'a' + 1 }}", "fails at line 1"),
        ("{{ raise_exception('not\nthis') }}", r"refuses this chat: not\nthis"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "calls itself without end"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ cycler.__init__.__globals__ }}", "unsafe"),
        ("{% include '/etc/passwd' %}", "no loader"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ lipsum() }}", "'lipsum' is undefined"),
    ],
)
def test_what_is_wrong_with_a_template_is_one_line(source, message):
    with pytest.raises(VaaniError) as caught:
        ChatTemplate(source).render([{"role": "user", "content": "a"}])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


MANY = "{% for a in range(99999) %}" * 3


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ 'a' * 10 ** 10 }}", "more than 512 MiB of memory"),
        ("{{ [0] * 10 ** 10 }}", "more than 512 MiB of memory"),
        ("{{ 'a'.ljust(10 ** 10) }}", "more than 512 MiB of memory"),
        (
            "{% set n = namespace(s='ab') %}{% for i in range(99) %}"
            "{% set n.s = n.s ~ n.s %}{% endfor %}",
            "more than 512 MiB of memory",
        ),
        (f"{MANY}a{'{% endfor %}' * 3}", "more than 16,777,216 characters"),
        ("{% for i in range(10 ** 9) %}{% endfor %}", "Range too big"),
        ("{{ 'é' * (2 ** 24 - 9) }}", ""),  # as much as there may be
    ],
)
def test_what_a_template_takes_is_limited(source, message):
    begun = time.perf_counter()
    text, said = outcome(lambda: ChatTemplate(source).render([]))
    assert message in said
    assert (text is None) == bool(message)
    assert time.perf_counter() - begun < 60


@pytest.mark.parametrize(
    "endless", [f"{MANY}{'{% endfor %}' * 3}", "{{ 9 ** (9 ** 9) }}"]
)
def test_a_template_without_end_is_ended_and_the_next_one_runs(endless, monkeypatch):
    monkeypatch.setattr(rendering, "SECONDS", 1)
    rendered = ChatTemplate("{{ 1 + 1 }}")
    assert rendered.render([]) == "2"
    process = chat._PROCESS._running
    assert process is not None
    with pytest.raises(VaaniError, match="it takes more than 1 s"):
        ChatTemplate(endless).render([])
    assert process.poll() is not None
    assert rendered.render([]) == "2"


def test_one_process_serves_all_and_an_interruption_ends_it(monkeypatch):
    template = ChatTemplate("{{ messages[0].content }}")
    assert template.render([{"role": "user", "content": "a"}]) == "a"
    process = chat._PROCESS._running
    assert process is not None
    assert template.render([{"role": "user", "content": "b"}]) == "b"
    assert chat._PROCESS._running is process

    def interrupted(text):
        raise KeyboardInterrupt

    monkeypatch.setattr(chat.json, "loads", interrupted)
    with pytest.raises(KeyboardInterrupt):
        template.render([{"role": "user", "content": "c"}])
    monkeypatch.undo()
    assert process.poll() is not None
    # The reply that nobody took is not the reply to what comes next.
    assert template.render([{"role": "user", "content": "d"}]) == "d"


def test_threads_get_their_own_replies():
    template = ChatTemplate("{{ messages[0].content }}")

    def ask(i):
        return template.render([{"role": "user", "content": f"{i}"}])

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        assert list(pool.map(ask, range(100))) == [str(i) for i in range(100)]


def test_damaged_templates_give_a_text_or_a_line(monkeypatch):
    monkeypatch.setattr(rendering, "SECONDS", 1)
    draw = random.Random(0)
    texts = refused = 0
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    for source in STYLES.values():
        for _ in range(40):
            a, b = sorted(draw.choices(range(len(source)), k=2))
            odd = draw.choice(["", "{{", "%}", "}}", "'", "\0", "{% for", source[a:b]])
            damaged = ChatTemplate(source[:a] + odd + source[b:])
            text, said = outcome(lambda damaged=damaged: damaged.render(messages))
            assert isinstance(text, str) or said.startswith("the chat template ")
            assert len(said.splitlines()) < 2
            texts, refused = texts + (not said), refused + bool(said)
    assert min(texts, refused) > 20


def test_the_process_opens_no_file(tmp_path):
    """Whatever gets out of the sandbox finds nothing to read."""
    code = (
        "import runpy, sys\n"
        f"module = runpy.run_path({rendering.__file__!r})\n"
        "module['limit']()\n"
        "try: open('/etc/passwd')\n"
        "except OSError as error: print(error.errno)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "24\n", done.stderr


def test_values_that_are_no_json_are_refused():
    with pytest.raises(VaaniError, match="plain values"):
        ChatTemplate("a").render([{"role": "user", "content": object()}])


def test_any_characters_pass():
    content = "\ud800 \0 \u2028 \U0010ffff"
    found = ChatTemplate("{{ messages[0].content }}\udfff").render(
        [{"role": "user", "content": content}]
    )
    assert found == f"{content}\udfff"


def test_without_jinja_a_line_says_what_to_install(tmp_path, monkeypatch):
    bare = tmp_path / "python"
    bare.write_text(f'#!/bin/sh\nunset PYTHONPATH\nexec "{sys.executable}" -S "$@"\n')
    bare.chmod(0o755)
    chat._PROCESS.end()
    monkeypatch.setattr(sys, "executable", str(bare))
    with pytest.raises(VaaniError, match=r"pip install 'vaani-jax\[interop\]'"):
        ChatTemplate("a").render([])
    chat._PROCESS.end()


# -- Which template, and where answers end ------------------------------------------


def tokenizer_with(template, **special):
    special = {"names": NAMES, "chat_template": template, **special}
    return HFTokenizer(words_tokenizer().to_str(), special=Special(**special))


def named(**templates):
    return [{"name": name, "template": text} for name, text in templates.items()]


def test_the_template_of_the_model_comes_first(tmp_path):
    assert find_template(tokenizer_with("own")).source == "own"
    several = tokenizer_with(named(default="own", tool_use="tools"))
    assert find_template(several).source == "own"
    assert find_template(several, "tool_use").source == "tools"
    assert find_template(several).names == NAMES
    assert find_template(tokenizer_with(named(rag="only"))).source == "only"
    assert find_template(several, "chatml").source == TEMPLATES["chatml"]
    file = tmp_path / "mine.jinja"
    file.write_text("{{ 'mine' }}", encoding="utf-8")
    for tokenizer in (several, ByteTokenizer()):
        assert find_template(tokenizer, str(file)).source == "{{ 'mine' }}"


@pytest.mark.parametrize(
    ("tokenizer", "wanted", "message"),
    [
        (ByteTokenizer(), "", "no chat template, so it may be no chat model"),
        (tokenizer_with(None), "", "--template (chatml, or a .jinja file)"),
        (
            tokenizer_with(named(a="1", b="2")),
            "",
            "choose one with --template, of a, b",
        ),
        (tokenizer_with("own"), "none.jinja", "one of chatml, default, or the path"),
        (ByteTokenizer(), "/", "must be one of chatml"),
    ],
)
def test_where_there_is_no_template(tokenizer, wanted, message):
    with pytest.raises(VaaniError) as caught:
        find_template(tokenizer, wanted)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("source", "ids", "text"),
    [
        (TEMPLATES["chatml"], (1, 3), ""),  # <|im_end|> ends no text, but a turn
        (MISTRAL, (1,), ""),
        (
            "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}",
            (1,),
            "",
        ),
        ("{% for m in messages %}{{ m.content }}\n###\n{% endfor %}", (1,), "###"),
        ("{{ raise_exception('never') }}", (1,), ""),
        ("{{ messages[0].content }}", (1,), ""),
    ],
)
def test_what_a_template_writes_behind_an_answer_ends_it(source, ids, text):
    ending = find_ending(tokenizer_with(source), ChatTemplate(source, NAMES))
    assert ending.ids == ids
    assert ending.text == text


def test_letters_end_an_answer_where_there_is_no_token_for_that():
    ending = find_ending(ByteTokenizer(), ChatTemplate(TEMPLATES["chatml"]))
    assert (ending.ids, ending.text) == ((), "<|im_end|>")


def test_variables_reach_the_template_that_is_asked_for_its_end():
    source = "{{ messages[1].content + '\\n' + tail }}"
    template = ChatTemplate(source)
    assert find_ending(ByteTokenizer(), template, {"tail": "END\n"}).text == "END"


def test_the_script_speaks_json_only():
    """Line by line, as `chat` reads it."""
    asked = [
        {"template": "{{ a }}", "variables": {"a": "é"}, "seconds": 5},
        {"template": "{{ b.c }}", "variables": {}, "seconds": 5},
    ]
    done = subprocess.run(
        [sys.executable, "-P", rendering.__file__],
        input="".join(json.dumps(one) + "\n" for one in asked),
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr == ""
    replies = [json.loads(line) for line in done.stdout.splitlines()]
    assert replies == [{"text": "é"}, {"error": "'b' is undefined", "line": 1}]

"""The process that renders chat templates, with limits on what that may take.

A template comes with a model, from anybody. Jinja's sandbox keeps it from what lies
outside of it; but loops within loops, or a text that doubles ten times a line, end no
sooner for that, and no thread can be told to stop. So `text.chat` starts this file as a
script, as a process of its own, which the system ends where a rendering takes too long,
and denies memory and files. It imports nothing of the package.

A line of JSON comes in, with "template", "variables" and the "seconds" of processor
time that it may take. One goes out: "text"; or "error", with the "line" of the template
if it is known, or with "refused" where the template itself says so; or "missing" where
there is no Jinja.
"""

import contextlib
import datetime
import json
import math
import resource
import signal
import sys
from typing import Any

SECONDS = 5  # of processor time, for one rendering
MEMORY = 2**29  # bytes of address space, for all of the process
LONGEST = 2**24  # characters of a rendered text
NO_MEMORY = f"it takes more than {MEMORY // 2**20} MiB of memory"


class RefusedError(Exception):
    """What a template raises with ``raise_exception``."""


def make_environment() -> Any:
    """Jinja as the templates of transformers expect it.

    Blocks are trimmed; ``break``, ``continue`` and ``{% generation %}`` are known; so
    are ``raise_exception``, ``strftime_now`` and a ``tojson`` that escapes nothing.
    """
    from jinja2.ext import Extension
    from jinja2.nodes import Scope
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """Marks what an assistant says, for training; here it is what it encloses."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return Scope(body, lineno=line)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[Generation, "jinja2.ext.loopcontrols"],
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = now
    del environment.globals["lipsum"]
    return environment


def to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: Any = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def refuse(message: Any) -> None:
    raise RefusedError(str(message))


def now(form: str) -> str:
    return datetime.datetime.now().strftime(form)


def render(environment: Any, template: str, variables: dict[str, Any]) -> str:
    """The text; raises whatever goes wrong in a template."""
    parts, length = [], 0
    for part in environment.from_string(template).generate(**variables):
        length += len(part)
        if length > LONGEST:
            raise OverflowError(f"it writes more than {LONGEST:,} characters")
        parts.append(part)
    return "".join(parts)


def answer(environment: Any, request: dict[str, Any]) -> dict[str, Any]:
    """What is said to a request; never raises."""
    try:
        text = render(environment, request["template"], request["variables"])
        return {"text": text}
    except RefusedError as error:
        return {"error": str(error), "refused": True}
    except MemoryError:
        return {"error": NO_MEMORY}
    except RecursionError:
        return {"error": "it calls itself without end", "line": line_of(None)}
    except Exception as error:  # of Jinja, and of whatever a template computes
        said = str(error).strip() or type(error).__name__
        return {"error": said, "line": line_of(error)}


def line_of(error: Exception | None) -> int | None:
    """The line of the template that an error came from, if it is known."""
    line = getattr(error, "lineno", None)  # of a mistake in what is written
    trace = None if error is None else error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == "<template>":
            line = trace.tb_lineno
        trace = trace.tb_next
    return line


def limit() -> None:
    """Denies this process memory, files and processes from now on."""
    now("%c")  # reads where we are, while files can be read
    for kind, most in (
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_AS, MEMORY),
        (resource.RLIMIT_NOFILE, 3),  # those that are open
    ):
        with contextlib.suppress(ValueError, OSError):  # not on every system
            resource.setrlimit(kind, (most, most))


def limit_time(seconds: int) -> None:
    """Has the system end this process so many seconds of work from now."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    most = math.ceil(used.ru_utime + used.ru_stime) + seconds
    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    if hard != resource.RLIM_INFINITY:
        most = min(most, hard)
    resource.setrlimit(resource.RLIMIT_CPU, (most, hard))


def main() -> None:
    signal.signal(signal.SIGXCPU, signal.SIG_DFL)
    try:
        environment = make_environment()
    except ImportError:
        environment = None
    else:
        # Loads what Jinja and Python load when something goes wrong.
        answer(environment, {"template": "{{ 'x'.y.z }}", "variables": {}})
    limit()
    for line in sys.stdin:
        if environment is None:
            reply: dict[str, Any] = {"missing": True}
        else:
            request = json.loads(line)
            limit_time(request["seconds"])
            reply = answer(environment, request)
        try:
            written = json.dumps(reply)
        except MemoryError:  # a text that fits once, and not twice
            written = json.dumps({"error": NO_MEMORY})
        print(written, flush=True)


if __name__ == "__main__":
    main()

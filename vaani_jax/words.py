"""Words for people: durations, sizes, counts, the gist of an error."""

import errno
import os
from typing import Any

# What keeps a disk from being written, however well the program does.
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)


def duration(seconds: float) -> str:
    """ "1 h 02 min", "3 min 05 s", "4.2 s"."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def size(number: float) -> str:
    """Bytes for people, in powers of 1000."""
    for unit in ("B", "kB", "MB"):
        if number < 1000:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:.3g} GB"


def plural(count: int, one: str, many: str = "") -> str:
    """ "1 step", "2,000 steps"; ``many`` is ``one`` with an s where it isn't given."""
    return f"{count:,} {one if count == 1 else many or one + 's'}"


def times(count: int) -> str:
    """ "once", "twice", "3 times"."""
    return {1: "once", 2: "twice"}.get(count) or plural(count, "time")


def first_line(error: BaseException, limit: int = 300) -> str:
    """The first line of what an error says, cut; its type where it says nothing."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:limit]


def cause_on_disk(error: BaseException) -> str:
    """What is wrong with a disk, as the system calls it, in whatever form; or nothing.

    Libraries of other languages hide it in long messages of types of their own.
    """
    cause: BaseException | None = error
    while cause is not None:
        for number in NO_ROOM:
            if os.strerror(number) in str(cause):
                return os.strerror(number)
        cause = cause.__cause__ or cause.__context__
    return ""


def one_line(text: str) -> str:
    """The text, with escapes for what is no printable character of a line."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def shown(value: Any, limit: int = 100) -> str:
    """A value as Python writes it, cut where it is long."""
    try:
        text = repr(value)
    except ValueError:  # Python writes no integer of thousands of digits
        return "a number of thousands of digits"
    return text if len(text) <= limit else f"{text[: limit - 3]}..."

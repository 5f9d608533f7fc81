"""Paths that people name: the places on this machine that they mean, or a refusal.

Whatever reads or writes a path that came from a flag, a config or the environment asks
`local` for it first, so that ``~`` is somebody's home in each of them, and a URL makes
no folder named ``gs:``.
"""

import json
import os
import pathlib
import re
from typing import Any

from vaani_jax.errors import VaaniError
from vaani_jax.words import first_line

LARGEST_SMALL = 256 * 2**20  # bytes; the largest tokenizer.json about has 35 MB

# pathlib makes one slash of two. A single letter is a drive.
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/")


def check_path(text: str, what: str) -> None:
    """Raises VaaniError for what can be no path of this machine, whatever is there.

    Args:
      text: as given; "" is none, and passes.
      what: the flag or key that gave it, such as ``--workdir``.
    """
    if "\0" in text:
        raise VaaniError(f"{what} holds a NUL character: {text!r} can be no path")
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise VaaniError(
            f"{what} is {text!r}, which is not UTF-8: rename the file or folder"
        )
    found = _URL.match(text)
    if found is None:
        return
    if found[1].lower() == "file":
        plain = "/" + text[found.end() :].lstrip("/")
        raise VaaniError(f"{what} is the URL {text}: write the path, {plain}")
    raise VaaniError(
        f"{what} is the URL {text}: only paths of this machine are read and written;"
        " mount the bucket (with gcsfuse, rclone or s3fs) and name the folder, or copy"
        " the files"
    )


def local(path: str | os.PathLike[str], what: str) -> pathlib.Path:
    """The path that is meant, ``~`` expanded.

    Args:
      path: as given.
      what: as for `check_path`.

    Raises VaaniError for an empty one, a URL, or a home folder that nobody knows.
    """
    text = os.fspath(path)
    if not text:
        raise VaaniError(f"{what} is empty: name a path")
    check_path(text, what)
    try:
        return pathlib.Path(text).expanduser()
    except RuntimeError:  # neither HOME nor the list of users says
        name = text.partition("/")[0]
        raise VaaniError(
            f"{what} is {text}, and nothing says where {name} is: set HOME, or write"
            " the whole path"
        ) from None


def cache_folder() -> pathlib.Path | None:
    """Where Vaani keeps what it can get again; None where there is no home for it."""
    root = os.environ.get("XDG_CACHE_HOME", "") or "~/.cache"
    try:
        return local(root, "XDG_CACHE_HOME") / "vaani"
    except VaaniError:
        return None


def is_writable(folder: pathlib.Path) -> bool:
    """Whether files can be put into a folder, which is made if need be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(folder, os.W_OK)


def new_file(path: str | os.PathLike[str], what: str) -> pathlib.Path:
    """A file to write, or to write again.

    Raises VaaniError for a folder, and for a pipe or a device, which would be replaced
    by a file of that name; and as `local` does.
    """
    found = local(path, what)
    if found.is_dir():
        raise VaaniError(f"{what} is {found}, a folder: name a file")
    # An open file of a process, such as its output, may be a plain one by chance.
    open_already = any(map(found.absolute().is_relative_to, ("/dev", "/proc")))
    if open_already or (found.exists() and not found.is_file()):
        raise VaaniError(f"{what} is {found}, which is no plain file: name a file")
    return found


def read_bytes(path: pathlib.Path) -> bytes:
    """The content of a file or a pipe; raises VaaniError."""
    try:
        return path.read_bytes()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise VaaniError(f"can't read {path}: {reason}") from None


def read_text(path: pathlib.Path, advice: str = "convert it to UTF-8") -> str:
    """The text of a file or a pipe, without a byte order mark; raises VaaniError.

    Args:
      path: as `local` gives it.
      advice: what to do about bytes that are no UTF-8.
    """
    content = read_bytes(path)
    try:
        return content.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        wide = content[:2] in (b"\xff\xfe", b"\xfe\xff")
        advice = "it is UTF-16: convert it to UTF-8" if wide else advice
        raise VaaniError(
            f"{path} is not UTF-8 text (byte {error.start:,}); {advice}"
        ) from None


def read_small(path: pathlib.Path) -> str:
    """The text of a file that holds little, such as a config; raises VaaniError."""
    try:
        if path.stat().st_size > LARGEST_SMALL:
            raise VaaniError(f"{path} is too large for what it should hold")
    except OSError as error:
        raise VaaniError(f"can't read {path}: {error.strerror or error}") from None
    return read_text(path)


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """The object in a small JSON file; raises VaaniError."""
    text = read_small(path)
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        reason = first_line(error, 200)
        raise VaaniError(f"{path} is not JSON: {reason}") from None
    if not isinstance(content, dict):
        raise VaaniError(f"{path} must hold a JSON object")
    return content

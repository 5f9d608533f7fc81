"""Reading small files of others, and results that appear whole or not at all."""

import json
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from vaani_jax.errors import VaaniError

LARGEST_TEXT = 256 * 2**20  # bytes; the largest tokenizer.json about has 35 MB


def read_text(path: pathlib.Path) -> str:
    """A text file of a bearable size; raises VaaniError."""
    try:
        if path.stat().st_size > LARGEST_TEXT:
            raise VaaniError(f"{path} is too large for what it should hold")
        return path.read_bytes().decode("utf-8")
    except OSError as error:
        raise VaaniError(f"can't read {path}: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise VaaniError(f"{path} is not UTF-8 text") from None


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """The object in a JSON file; raises VaaniError."""
    text = read_text(path)
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        reason = str(error).splitlines()[0][:200]
        raise VaaniError(f"{path} is not JSON: {reason}") from None
    if not isinstance(content, dict):
        raise VaaniError(f"{path} must hold a JSON object")
    return content


@contextmanager
def appearing(target: pathlib.Path, *, folder: bool) -> Iterator[pathlib.Path]:
    """A temporary path that becomes ``target`` when all went well.

    Args:
      target: must not be there yet; an empty folder may be.
      folder: whether it is to be a folder.

    Raises VaaniError where the target is taken, and OSError.
    """
    taken = target.exists() and not (
        folder and target.is_dir() and not any(target.iterdir())
    )
    if taken:
        raise VaaniError(f"{target} is there already: choose another name")
    parent = target.absolute().parent
    parent.mkdir(parents=True, exist_ok=True)
    room = pathlib.Path(tempfile.mkdtemp(dir=parent, prefix=f".{target.name}."))
    try:
        temporary = room / target.name
        if folder:
            temporary.mkdir()
        yield temporary
        os.replace(temporary, target)
    finally:
        shutil.rmtree(room, ignore_errors=True)

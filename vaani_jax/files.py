"""Files and folders that are written whole or not at all."""

import json
import math
import os
import pathlib
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from vaani_jax.errors import VaaniError


def to_json(value: Any, indent: int | None = None) -> str:
    """JSON as the standard has it: null stands for numbers that aren't finite."""

    def plain(value: Any) -> Any:
        if isinstance(value, float):
            return value if math.isfinite(value) else None
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [plain(item) for item in value]
        return value

    return json.dumps(plain(value), indent=indent, allow_nan=False)


@contextmanager
def naming(path: pathlib.Path) -> Iterator[None]:
    """Has an OSError from inside name what was written: failing writes don't."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


def write_atomically(path: pathlib.Path, content: bytes) -> None:
    """Writes a file under a temporary name, then moves it into place.

    Makes the folder where it is missing. Raises OSError, with nothing left behind.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with naming(path), os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        pathlib.Path(name).unlink(missing_ok=True)
        raise


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
    with without_trace(parent):
        parent.mkdir(parents=True, exist_ok=True)
        room = pathlib.Path(tempfile.mkdtemp(dir=parent, prefix=f".{target.name}."))
        try:
            temporary = room / target.name
            if folder:
                temporary.mkdir()
            with naming(target):
                yield temporary
                os.replace(temporary, target)
        finally:
            _remove(room)


def _remove(folder: pathlib.Path) -> None:
    """Removes a folder that threads of a library may still be writing to."""
    deadline = time.monotonic() + 5.0
    while folder.exists() and time.monotonic() < deadline:
        shutil.rmtree(folder, ignore_errors=True)
        time.sleep(0.05 if folder.exists() else 0.0)


@contextmanager
def without_trace(folder: pathlib.Path) -> Iterator[None]:
    """Where an error ends the block, removes a folder that it made and left empty.

    Args:
      folder: that the block may make; with it go those above that it made for it.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        yield
    except BaseException:
        for path in made:
            with suppress(OSError):  # not there, or in use
                path.rmdir()
        raise

"""Files and folders that are written whole or not at all."""

import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from vaani_jax.errors import VaaniError


def write_atomically(path: pathlib.Path, content: bytes) -> None:
    """Writes a file under a temporary name, then moves it into place.

    Makes the folder where it is missing. Raises OSError, with nothing left behind.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
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
            yield temporary
            os.replace(temporary, target)
        finally:
            shutil.rmtree(room, ignore_errors=True)


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

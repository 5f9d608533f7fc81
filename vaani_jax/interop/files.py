"""Reading small files of others."""

import json
import pathlib
from typing import Any

from vaani_jax import paths
from vaani_jax.errors import VaaniError
from vaani_jax.words import first_line

LARGEST_TEXT = 256 * 2**20  # bytes; the largest tokenizer.json about has 35 MB


def read_text(path: pathlib.Path) -> str:
    """A text file of a bearable size; raises VaaniError."""
    try:
        if path.stat().st_size > LARGEST_TEXT:
            raise VaaniError(f"{path} is too large for what it should hold")
    except OSError as error:
        raise VaaniError(f"can't read {path}: {error.strerror or error}") from None
    return paths.read_text(path)


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """The object in a JSON file; raises VaaniError."""
    text = read_text(path)
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        reason = first_line(error, 200)
        raise VaaniError(f"{path} is not JSON: {reason}") from None
    if not isinstance(content, dict):
        raise VaaniError(f"{path} must hold a JSON object")
    return content

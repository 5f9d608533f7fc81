"""What the code says of itself: ``{keys}`` and ``{commands}``.

``{keys}`` makes a table of each section of the config from the dataclasses that hold
the keys; ``{commands}`` shows what each command prints when asked for ``--help``.
"""

import dataclasses
import os
import re
import subprocess
import sys
import typing
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from vaani_jax.train.config import Config


def _kind(annotation: Any) -> str:
    """A type as people write it: ``float``, ``"token"`` or ``"ema"``."""
    if typing.get_origin(annotation) is typing.Literal:
        return " or ".join(f'"{word}"' for word in typing.get_args(annotation))
    if annotation is type(None):
        return "None"
    if typing.get_origin(annotation) is tuple:
        return "tuple"
    if typing.get_args(annotation):
        return " or ".join(map(_kind, typing.get_args(annotation)))
    return getattr(annotation, "__name__", str(annotation))


def _default(field: "dataclasses.Field[Any]") -> str:
    if field.default is not dataclasses.MISSING:
        return repr(field.default)
    if field.default_factory is not dataclasses.MISSING:
        return repr(field.default_factory())
    return ""


def _table(cls: type[Any], prefix: str) -> list[str]:
    """The keys of one dataclass, but for those that are sections."""
    kinds = typing.get_type_hints(cls)
    lines = ["| key | type | default | what |", "|---|---|---|---|"]
    for field in dataclasses.fields(cls):
        if dataclasses.is_dataclass(kinds[field.name]):
            continue
        cells = [
            f"`{prefix}{field.name}`",
            _kind(kinds[field.name]),
            f"`{_default(field)}`",
            field.metadata.get("text", ""),
        ]
        cells = [cell.replace("|", r"\|") for cell in cells]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


class Keys(SphinxDirective):
    """The keys of a run, then those of each section."""

    def run(self) -> list[nodes.Node]:
        lines = _table(Config, "")
        for name, kind in typing.get_type_hints(Config).items():
            if dataclasses.is_dataclass(kind):
                lines += ["", f"**Section `{name}`**", ""]
                lines += _table(typing.cast(type[Any], kind), f"{name}.")
        return self.parse_text_to_nodes("\n".join(lines))


class Commands(SphinxDirective):
    """What ``vaani --help`` prints, and ``vaani COMMAND --help`` for each command."""

    def run(self) -> list[nodes.Node]:
        overview = self._help()
        names = re.findall(r"^ {4}(\w+)(?: {2,}|$)", overview, re.MULTILINE)
        if not names:
            raise self.error(f"no commands in:\n{overview}")
        found: list[nodes.Node] = []
        for text in [overview, *map(self._help, names)]:
            block = nodes.literal_block(text, text)
            block["language"] = "text"
            found.append(block)
        return found

    def _help(self, *command: str) -> str:
        path = os.pathsep.join(filter(None, sys.path))
        result = subprocess.run(
            [sys.executable, "-m", "vaani_jax", *command, "--help"],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "PYTHONPATH": path, "COLUMNS": "80"},
        )
        if result.returncode or not result.stdout.strip():
            raise self.error(f"vaani {' '.join(command)} --help: {result.stderr}")
        return result.stdout


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_directive("keys", Keys)
    app.add_directive("commands", Commands)
    return {"parallel_read_safe": True, "parallel_write_safe": True}

"""What the code says of itself: ``{keys}`` and ``{help}``.

``{keys} SECTION`` is a table of the keys of a section of the config ("run" for those
outside sections), from the dataclasses; ``{help} COMMAND`` what the command prints.
"""

import dataclasses
import os
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


class Keys(SphinxDirective):
    """The keys of one section of the config."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        section = self.arguments[0]
        kinds = typing.get_type_hints(Config)
        cls = Config if section == "run" else kinds.get(section)
        if cls is None:
            raise self.error(f"the config has no section {section!r}")
        prefix = "" if section == "run" else f"{section}."
        kinds = typing.get_type_hints(cls)
        lines = ["| key | type | default | what |", "|---|---|---|---|"]
        for field in dataclasses.fields(cls):
            if dataclasses.is_dataclass(kinds[field.name]):
                continue
            cells = [
                f"`{prefix}{field.name}`",
                _kind(kinds[field.name]),
                f"`{_default(field)}`",
                field.metadata.get("text", "").replace("|", r"\|"),
            ]
            lines.append("| " + " | ".join(cells) + " |")
        return self.parse_text_to_nodes("\n".join(lines))


class Help(SphinxDirective):
    """What ``vaani COMMAND --help`` prints."""

    optional_arguments = 1

    def run(self) -> list[nodes.Node]:
        command = [sys.executable, "-m", "vaani_jax", *self.arguments, "--help"]
        result = subprocess.run(
            command,
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "COLUMNS": "80"},
        )
        if result.returncode or not result.stdout.strip():
            raise self.error(f"{' '.join(command)} failed: {result.stderr}")
        block = nodes.literal_block(result.stdout, result.stdout)
        block["language"] = "text"
        return [block]


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_directive("keys", Keys)
    app.add_directive("help", Help)
    return {"parallel_read_safe": True, "parallel_write_safe": True}

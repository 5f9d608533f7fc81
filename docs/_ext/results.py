"""``{results} FILE TABLE``: a table of benchmarks/results/FILE.json, with its origin.

Figures are written once, in the JSON that a benchmark leaves: "about", "command",
"machine" and "date" of the run, and "tables" by name, each with "columns" and "rows".
"""

import json
import pathlib
from typing import Any

from docutils import nodes
from docutils.parsers.rst import directives
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

RESULTS = pathlib.Path(__file__).parents[2] / "benchmarks" / "results"


def _row(cells: list[Any]) -> str:
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


class Results(SphinxDirective):
    """Renders one table; a line under it says what was measured, how and when.

    With ``:optional:``, a table that is not there yet says so.
    """

    required_arguments = 2
    option_spec = {"optional": directives.flag}  # noqa: RUF012

    def run(self) -> list[nodes.Node]:
        name, key = self.arguments
        path = RESULTS / f"{name}.json"
        self.env.note_dependency(str(path))
        try:
            result = json.loads(path.read_text(encoding="utf-8"))
            table = result["tables"][key]
        except (OSError, KeyError, ValueError) as problem:
            if "optional" in self.options and not isinstance(problem, ValueError):
                return self.parse_text_to_nodes("Not run yet.")
            raise self.error(f"no table {key!r} in {path.name}: {problem}") from problem
        columns, rows = table["columns"], table["rows"]
        if any(len(row) != len(columns) for row in rows):
            raise self.error(f"table {key!r} of {path.name} has rows of other lengths")
        lines = [
            _row(columns),
            _row(["---"] * len(columns)),
            *map(_row, rows),
            "",
            f"*{result['about']}; `{result['command']}`, {result['machine']},"
            f" {result['date']}. Measured on the code of that date.*",
        ]
        return self.parse_text_to_nodes("\n".join(lines))


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_directive("results", Results)
    return {"parallel_read_safe": True, "parallel_write_safe": True}

"""Sphinx: ``sphinx-build -W --keep-going -b html docs build/docs``."""

import importlib.metadata
import pathlib
import re
import sys
from typing import Any

from sphinx.application import Sphinx

HERE = pathlib.Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE / "_ext")]

project = "Vaani"
author = "The authors of Vaani"
copyright = "the authors of Vaani, MIT license"
try:
    release = importlib.metadata.version("vaani-jax")
except importlib.metadata.PackageNotFoundError:
    release = ""

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "results",
    "keys",
]
exclude_patterns = ["_ext"]

# Notebooks run at every build; an error in a cell is an error of the build.
nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_timeout = 300
nb_merge_streams = True
nb_output_stderr = "remove"  # warnings of libraries, with paths of this machine
myst_enable_extensions = ["deflist", "dollarmath"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "none"
autodoc_preserve_defaults = True
autodoc_inherit_docstrings = False
napoleon_google_docstring = True
napoleon_numpy_docstring = False
# "Returns:" is prose here: the words before its first colon are no type.
napoleon_custom_sections = ["Returns", "Yields"]
# A word in single backquotes is code, as in the docstrings of JAX and Flax.
default_role = "code"

html_theme = "furo"
html_title = "Vaani"


def _own_arguments(
    _app: Any, _what: str, _name: str, _object: Any, _options: Any, given: str, to: str
) -> tuple[str, str]:
    """A signature without the two arguments that Flax adds to every module's."""
    return re.sub(r",? ?parent=<[^>]*>, name=None", "", given or ""), to


def setup(app: Sphinx) -> None:
    app.connect("autodoc-process-signature", _own_arguments)

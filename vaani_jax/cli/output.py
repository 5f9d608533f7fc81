"""Where commands write: results to standard output, everything else beside it."""

import sys


def notify(message: str) -> None:
    """Shows a line to a person, on standard error."""
    print(message, file=sys.stderr)

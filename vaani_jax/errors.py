"""The one exception type that a user is meant to read."""


class VaaniError(ValueError):
    """A problem that the user can mend: its message is one line saying what to do.

    The command lines print it without a traceback and exit with status 1. Anything
    else that escapes is a bug and keeps its traceback.
    """

"""What a run can do without: pictures, samples, words to people.

None of it may end a training that goes well, or take it along.
"""

import contextlib
from collections.abc import Callable, Iterator

from vaani_jax.devices.processes import is_peer_error
from vaani_jax.words import first_line


class Extras:
    """Tries what may fail, and says once of each kind what is left out."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._said: set[str] = set()

    @contextlib.contextmanager
    def trying(self, what: str, *, way_on: str = "") -> Iterator[None]:
        """Survives what goes wrong inside, with a line: "no <what>: <reason>".

        Args:
          what: is left out then.
          way_on: said behind the reason.
        """
        try:
            yield
        except Exception as error:
            if is_peer_error(error):
                raise
            if what not in self._said:
                self._said.add(what)
                more = f"; {way_on}" if way_on else ""
                self._say(f"no {what}: {first_line(error)}{more}. Training goes on")

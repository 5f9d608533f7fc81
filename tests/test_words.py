"""Words for people."""

import pytest

from vaani_jax.words import plural, times


@pytest.mark.parametrize(
    ("count", "words"),
    [(0, "0 steps"), (1, "1 step"), (2, "2 steps"), (2000, "2,000 steps")],
)
def test_plural(count, words):
    assert plural(count, "step") == words


def test_plural_of_an_irregular_word():
    assert plural(1, "process", "processes") == "1 process"
    assert plural(2, "process", "processes") == "2 processes"


def test_times():
    assert [times(n) for n in (0, 1, 2, 3)] == ["0 times", "once", "twice", "3 times"]

"""What a compiled program sends between devices, read from its text.

XLA prints optimized programs as computations of named operations; loops name their
bodies and, where the compiler knows it, how often they run. Collectives are read where
they are synchronous, as in code for CPUs.
"""

import dataclasses
import math
import re

_KINDS = [
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
]


_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")


_OPERATION = re.compile(r"^\s+(?:ROOT )?%?[\w.\-]+ = (\(.*?\)|\S+) ([\w\-]+)\(")


_SHAPE = re.compile(r"\b([a-z]\w*)\[([\d,]*)\]")


_CALLED = re.compile(
    r"(?:body|to_apply|calls|true_computation|false_computation)=%?([\w.\-]+)"
)


_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")


_TRIPS = re.compile(r'"known_trip_count":\s*\{"n":\s*"(\d+)"')


# Groups of devices: listed, as a grid, or as axes of a mesh (a part of an axis is
# written 'axis':(before)size).
_GROUPS = re.compile(r"replica_groups=(?:\{\{([\d,]*)\}|\[\d+,(\d+)\])")


_MESH = re.compile(
    r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(.*?\))? \{(.*?)\}"
)


_AXIS = re.compile(r"'([^']+)'(?:=(\d+)|:\(\d+\)(\d+))?")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One exchange between devices.

    Attributes:
      kind: "all-gather", "all-reduce", "reduce-scatter", "all-to-all" or
        "collective-permute".
      dtype: of its elements, as XLA writes it: "u8", "f32".
      nbytes: of its result, on each device.
      group: how many devices take part.
      times: how often it runs in one call of the program.
    """

    kind: str
    dtype: str
    nbytes: int
    group: int
    times: int

    @property
    def received(self) -> float:
        """Bytes that come in at each device, in all runs, by the usual ring.

        Chan et al., "Collective communication: theory, practice, and experience"
        (2007): ``(p - 1) / p`` of the whole for a gather or an exchange, twice that for
        a reduction whose result is everywhere.
        """
        others = (self.group - 1) / self.group
        share = {
            "all-gather": others,
            "all-reduce": 2 * others,
            "reduce-scatter": self.group - 1.0,  # of a part
            "all-to-all": others,
            "collective-permute": 1.0,
        }[self.kind]
        return share * self.nbytes * self.times


def collectives(text: str) -> list[Collective]:
    """The collectives of a program that runs on several devices.

    Those of a branch count as if it were taken, those of a loop once for each turn;
    between groups of one device nothing is sent.

    Args:
      text: of `jax.stages.Compiled.as_text`.

    Raises:
      ValueError: a loop with collectives whose number of turns the compiler doesn't
        know, or no entry.
    """
    bodies, entry = _computations(text)
    found: list[Collective] = []
    contains = _Contains(bodies)

    def visit(name: str, times: int) -> None:
        for line in bodies[name]:
            operation = _OPERATION.match(line)
            if operation is None:
                continue
            shape, kind = operation.groups()
            if kind in _KINDS:
                group = _group(line)
                if group > 1:
                    found.extend(_exchange(kind, shape, group, times))
                continue
            for called in _called(line):
                if not contains(called):
                    continue
                turns = 1
                if kind == "while":
                    known = _TRIPS.search(line)
                    if known is None:
                        raise ValueError(
                            f"a loop over {called} exchanges data, its number of turns"
                            " is unknown"
                        )
                    turns = int(known.group(1))
                visit(called, times * turns)

    visit(entry, 1)
    return found


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    bodies: dict[str, list[str]] = {}
    entry, lines = "", []
    for line in text.splitlines():
        header = _COMPUTATION.match(line)
        if header:
            lines = bodies[header.group(2)] = []
            if header.group(1):
                entry = header.group(2)
        else:
            lines.append(line)
    if not entry:
        raise ValueError("no entry in the text of a program")
    return bodies, entry


class _Contains:
    """Whether a computation, or one that it calls, holds collectives."""

    def __init__(self, bodies: dict[str, list[str]]) -> None:
        self.bodies = bodies
        self.known: dict[str, bool] = {}

    def __call__(self, name: str) -> bool:
        if name not in self.known:
            lines = self.bodies.get(name, [])
            self.known[name] = any(
                ((operation := _OPERATION.match(line)) and operation[2] in _KINDS)
                or any(map(self, _called(line)))
                for line in lines
            )
        return self.known[name]


def _called(line: str) -> list[str]:
    names = _CALLED.findall(line)
    for branches in _BRANCHES.findall(line):
        names += [name.strip().lstrip("%") for name in branches.split(",")]
    return names


def _group(line: str) -> int:
    """How many devices exchange with each other."""
    if "source_target_pairs=" in line:
        return 2
    if groups := _GROUPS.search(line):
        listed, size = groups.groups()
        return int(size) if size else len(listed.split(","))
    if mesh := _MESH.search(line):
        sizes = {name: size for name, size, _ in _AXIS.findall(mesh[1])}
        axes = _AXIS.findall(mesh[2])
        return math.prod(int(part or sizes[name]) for name, _, part in axes)
    raise ValueError(f"a collective with unknown groups: {line.strip()[:200]}")


def _exchange(kind: str, shape: str, group: int, times: int) -> list[Collective]:
    """One for each array: XLA joins several into a tuple."""
    found = []
    for dtype, sizes in _SHAPE.findall(shape):
        bits = 8 if dtype == "pred" else int(re.findall(r"\d+", dtype)[0])
        count = math.prod(int(n) for n in sizes.split(",") if n)
        found.append(Collective(kind, dtype, math.ceil(count * bits / 8), group, times))
    return found

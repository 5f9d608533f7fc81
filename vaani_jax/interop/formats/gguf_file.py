"""GGUF files, versions 2 and 3, as they are read: header, metadata, table of tensors.

PyPI's ``gguf`` reads them too, executes nothing, and trusts every length in the file: a
damaged one has it allocate gigabytes, or read what isn't there; nor does it open types
that it doesn't know. Here every length, offset, count and type is checked against the
size of the file before anything is allocated. Tensors stay in the file, which is
mapped: rows are looked at where they are.

Layout: the magic word, version, number of tensors, number of keys; keys, each a name, a
type and a value; tensors, each a name, its dimensions (from the fastest), a type and an
offset; padding up to the alignment; the tensors' data, in the order of the table, each
padded up to the alignment. Numbers are little-endian.
"""

import dataclasses
import math
import mmap
import pathlib
import struct
from typing import Any

import numpy as np

from vaani_jax.errors import VaaniError
from vaani_jax.interop.formats.gguf_types import LEGACY, Type, named
from vaani_jax.paths import LARGEST_SMALL
from vaani_jax.words import shown

MAGIC = b"GGUF"
ALIGNMENT = 32  # where no key says another
LARGEST_ALIGNMENT = 2**20
LARGEST_COUNT = 2**16  # of keys and of tensors; models have a few thousand
LARGEST_ARRAY = 2**22  # texts of an array; the largest vocabularies have 300,000
LONGEST_NAME = 2**16 - 1  # bytes of a key
AXES = 4

# Kinds of values by their number; 8 is a text, 9 an array.
SCALARS = {
    0: "<B",
    1: "<b",
    2: "<H",
    3: "<h",
    4: "<I",
    5: "<i",
    6: "<f",
    7: "<?",
    10: "<Q",
    11: "<q",
    12: "<d",
}
TEXT, ARRAY, BOOL = 8, 9, 7


@dataclasses.dataclass(frozen=True)
class Entry:
    """A tensor of the table.

    Attributes:
      name: as in the file.
      type: of its blocks.
      shape: from the slowest axis; the last one is a row.
      offset: of its data, in bytes from the start of the file.
    """

    name: str
    type: Type
    shape: tuple[int, ...]
    offset: int

    @property
    def rows(self) -> int:
        """How many rows there are."""
        return math.prod(self.shape[:-1])

    @property
    def row_bytes(self) -> int:
        """Bytes of a row."""
        return self.shape[-1] // self.type.block * self.type.bytes

    @property
    def bytes(self) -> int:
        """Bytes of the tensor."""
        return self.rows * self.row_bytes


class GGUFFile:
    """A GGUF file whose every length has been checked.

    Attributes:
      path: of the file.
      metadata: values by their keys: numbers, texts, lists of texts, arrays of numbers.
      tensors: the table, by name.

    Raises VaaniError for whatever is wrong with it; no other error.
    """

    def __init__(self, path: pathlib.Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                # The mapping outlives the file's descriptor.
                self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or "it is empty"
            raise VaaniError(f"can't read {path}: {reason}") from None
        self._at = 0
        self._end = min(len(self._data), LARGEST_SMALL)
        self.metadata: dict[str, Any] = {}
        self.tensors: dict[str, Entry] = {}
        self._read()

    def rows(self, entry: Entry, which: slice | np.ndarray) -> np.ndarray:
        """Rows of a tensor as bytes, uint8 [n, row bytes].

        Args:
          entry: of `tensors`.
          which: a range, which stays in the file, or indices, whose rows are copied.
        """
        data = np.frombuffer(self._data, np.uint8, entry.bytes, entry.offset)
        found: np.ndarray = data.reshape(entry.rows, entry.row_bytes)[which]
        return found

    def floats(self, entry: Entry, which: slice | np.ndarray) -> np.ndarray:
        """Rows of a tensor, float32 [n, columns]; VaaniError where its type has one."""
        return entry.type.floats(entry.type.split(self.rows(entry, which)))

    def release(self) -> None:
        """Lets the system take back the memory of what has been read so far.

        It takes it anyhow where memory is short; until then it counts as ours.
        """
        if hasattr(self._data, "madvise"):
            self._data.madvise(mmap.MADV_DONTNEED)

    # -- Reading ------------------------------------------------------------------

    def _damaged(self, what: str) -> VaaniError:
        return VaaniError(f"{self.path} is damaged: {what}")

    def _take(self, size: int, what: str) -> int:
        """Moves past ``size`` bytes; returns where they begin."""
        at = self._at
        if size > self._end - at:
            raise self._damaged(f"{what} is longer than the file")
        self._at += size
        return at

    def _number(self, form: str, what: str) -> Any:
        return struct.unpack_from(
            form, self._data, self._take(struct.calcsize(form), what)
        )[0]

    def _text(self, what: str, longest: int = LARGEST_SMALL) -> str:
        size = self._number("<Q", what)
        if size > longest:
            raise self._damaged(f"{what} has {size} bytes")
        at = self._take(size, what)
        try:
            return self._data[at : at + size].decode("utf-8")
        except UnicodeDecodeError:
            raise self._damaged(f"{what} is not UTF-8") from None

    def _value(self, kind: int, what: str) -> Any:
        if kind == TEXT:
            return self._text(what)
        if kind == ARRAY:
            return self._array(what)
        if kind not in SCALARS:
            raise self._damaged(f"{what} has a value of the unknown kind {kind}")
        if kind == BOOL:
            return bool(self._number("<B", what))
        return self._number(SCALARS[kind], what)

    def _array(self, what: str) -> Any:
        kind = self._number("<I", what)
        count = self._number("<Q", what)
        if kind == TEXT:
            # Eight bytes at least for each: a list never outgrows the file by much.
            if count > min(LARGEST_ARRAY, (self._end - self._at) // 8):
                raise self._damaged(f"{what} has {count} texts")
            return [self._text(what) for _ in range(count)]
        if kind not in SCALARS:
            raise self._damaged(f"{what} is an array of the kind {kind}")
        dtype = np.dtype("u1" if kind == BOOL else SCALARS[kind])
        if count > (self._end - self._at) // dtype.itemsize:
            raise self._damaged(f"{what} is longer than the file")
        at = self._take(count * dtype.itemsize, what)
        return np.frombuffer(self._data, dtype, count, at).copy()

    def _read(self) -> None:
        if self._data[:4] != MAGIC:
            raise VaaniError(f"{self.path} is no GGUF file: it doesn't begin with GGUF")
        self._at = 4
        version = self._number("<I", "the version")
        if version not in (2, 3):
            swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
            kind = "big-endian" if swapped in (2, 3) else f"of version {version}"
            raise VaaniError(
                f"{self.path} is a GGUF file {kind}: versions 2 and 3, little-endian,"
                " can be read"
            )
        tensors = self._count("tensors", 24)
        keys = self._count("keys", 13)
        for _ in range(keys):
            name = self._text("the name of a key", LONGEST_NAME)
            if name in self.metadata:
                raise self._damaged(f"it has the key {shown(name)} twice")
            kind = self._number("<I", f"the key {shown(name)}")
            self.metadata[name] = self._value(kind, f"the key {shown(name)}")
        alignment = self.metadata.get("general.alignment", ALIGNMENT)
        if (
            type(alignment) is not int
            or not 1 <= alignment <= LARGEST_ALIGNMENT
            or alignment & (alignment - 1)
        ):
            raise self._damaged(
                f"general.alignment is {shown(alignment)}, which is no power of two up"
                f" to {LARGEST_ALIGNMENT}"
            )
        self._check_whole()
        found = [self._tensor() for _ in range(tensors)]
        self._place(found, alignment)

    def _count(self, what: str, least: int) -> int:
        """How many of something there are, of ``least`` bytes each or more."""
        count = self._number("<Q", f"the number of {what}")
        if count > min(LARGEST_COUNT, (self._end - self._at) // least):
            raise self._damaged(f"it has {count} {what}, more than there is room for")
        return int(count)

    def _check_whole(self) -> None:
        count = self.metadata.get("split.count", 1)
        if type(count) is int and count in (0, 1):
            return
        number = self.metadata.get("split.no")
        first = type(number) is int and number == 0
        what = self.path.name if first else "the first of its files"
        raise VaaniError(
            f"{self.path} is one of {shown(count)} files that make a model: merge them"
            f" with llama-gguf-split --merge, given {what}"
        )

    def _tensor(self) -> tuple[str, Type, tuple[int, ...], int]:
        """Name, type, shape and offset of a tensor, as its row of the table says."""
        name = self._text("the name of a tensor", LONGEST_NAME)
        what = f"the tensor {shown(name)}"
        axes = self._number("<I", what)
        if not 1 <= axes <= AXES:
            raise self._damaged(f"{what} has {axes} dimensions")
        shape = tuple(self._number("<Q", what) for _ in range(axes))[::-1]
        if not all(shape):
            raise self._damaged(f"{what} has shape {list(shape)}")
        try:
            kind = named(self._number("<I", what))
        except VaaniError as error:
            raise VaaniError(f"{self.path} has {what} {error}") from None
        if shape[-1] % kind.block:
            raise self._damaged(
                f"{what} has rows of {shape[-1]}, no multiple of the {kind.block} of a"
                f" block of {kind.name}"
            )
        return name, kind, shape, self._number("<Q", what)

    def _place(
        self, found: list[tuple[str, Type, tuple[int, ...], int]], alignment: int
    ) -> None:
        """Checks that tensors follow each other, and end where the file does or before.

        Files that hold other blocks under the number of Q2_0 do so in their own sizes.
        """
        start = -(-self._at // alignment) * alignment
        total = len(self._data)

        def ends(legacy: bool) -> bool:
            at = 0
            for _, kind, shape, offset in found:
                block, size = kind.block, kind.bytes
                if legacy and kind.name == "Q2_0":
                    block, size = LEGACY
                if offset != at or shape[-1] % block:
                    return False
                end = start + at + math.prod(shape[:-1]) * (shape[-1] // block) * size
                if end > total:
                    return False
                at = -(-(end - start) // alignment) * alignment
            return True

        if not ends(legacy=False):
            if any(kind.name == "Q2_0" for _, kind, _, _ in found) and ends(True):
                raise VaaniError(
                    f"{self.path} holds blocks of 128 weights under the number of Q2_0,"
                    " as PrismML's did before llama.cpp had the type: get a newer file"
                    " of the model (Q2_0 in blocks of 64, or PQ2_0)"
                )
            raise self._damaged(
                "its tensors do not follow each other up to the end of the file, as"
                " their types and shapes have it; get it again"
            )
        for name, kind, shape, offset in found:
            if name in self.tensors:
                raise self._damaged(f"it has the tensor {shown(name)} twice")
            self.tensors[name] = Entry(name, kind, shape, start + offset)

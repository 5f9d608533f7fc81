"""Writes a packed folder in parts, for models larger than memory would hold twice."""

import dataclasses
import pathlib
from typing import Any

import jax
import numpy as np

from vaani_jax import leaves
from vaani_jax.files import to_json
from vaani_jax.inference.model import (
    FORMAT,
    PACKED_ARRAYS,
    PACKED_CONFIG,
    is_packed,
    packed_shapes,
)
from vaani_jax.inference.tensors import TensorWriter
from vaani_jax.model.packing import Embedding
from vaani_jax.model.transformer import Vaani
from vaani_jax.quant.packed import (
    PackedRows,
    PackedTernary,
    tiles_of_rows,
    tiles_of_scales,
)
from vaani_jax.runs.metadata import Metadata

Path = tuple[str, ...]


class PackedWriter:
    """The two files of a packed folder, see `inference.model`.

    Parameters come by their paths, each in one part or in several, in order. As a
    context manager, it ends with all of them written, or an error.
    """

    def __init__(
        self,
        folder: pathlib.Path,
        module: Vaani,
        metadata: Metadata,
        embedding: Embedding = "float32",
    ) -> None:
        """Makes the files.

        Args:
          folder: it is there, and empty.
          module: the model; its activation ranges, if tracked, are not written.
          metadata: to go along.
          embedding: see `pack_variables`.
        """
        shapes: dict[str, Any] = {}
        kinds: dict[str, Any] = {}
        for part, tree in packed_shapes(module, embedding).items():
            for name, leaf in leaves.named(tree, is_leaf=is_packed).items():
                name = f"{part}/{name}"
                if isinstance(leaf, PackedTernary):
                    kinds[name] = {"kind": "ternary", "shape": list(leaf.shape)}
                elif isinstance(leaf, PackedRows):
                    kinds[name] = {"kind": "rows"}
                arrays = {name: leaf}
                if name in kinds:
                    arrays = {
                        f"{name}.codes": leaf.codes,
                        f"{name}.scale": leaf.scale,
                    }
                shapes |= {n: (a.shape, np.dtype(a.dtype)) for n, a in arrays.items()}
        metadata = dataclasses.replace(metadata, stacked=False)
        description = {**metadata.to_json(), "format": FORMAT, "packed": kinds}
        text = to_json(description, indent=1)
        (folder / PACKED_CONFIG).write_text(text, encoding="utf-8")
        self._shapes = shapes
        self._writer = TensorWriter(folder / PACKED_ARRAYS, shapes)
        self._begun: set[str] = set()

    def __enter__(self) -> "PackedWriter":
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        self._writer.__exit__(kind, error, trace)

    def _write(self, name: str, array: Any) -> None:
        self._writer.write(name, np.asarray(array, self._shapes[name][1]))

    def ternary(
        self, path: Path, codes: np.ndarray, scales: np.ndarray, shared: str = ""
    ) -> None:
        """The next outputs of a ternary kernel.

        Args:
          path: of the parameter.
          codes: int8 [n, in] in {-1, 0, 1}; n a multiple of 16 but for the last.
          scales: [n, groups], or [n, 1] where ``shared``.
          shared: "tensor" or "channel", where scales are not of groups.
        """
        name = "/".join(("params", *path))
        self._write(f"{name}.codes", tiles_of_rows(codes))
        if not shared:
            self._write(f"{name}.scale", tiles_of_scales(scales))
        elif shared == "channel":
            self._write(f"{name}.scale", scales[:, 0])
        elif name not in self._begun:
            self._write(f"{name}.scale", scales[0, 0])
        self._begun.add(name)

    def packed(self, path: Path, kernel: PackedTernary) -> None:
        """A whole ternary kernel, in tiles."""
        name = "/".join(("params", *path))
        self._write(f"{name}.codes", kernel.codes)
        self._write(f"{name}.scale", kernel.scale)

    def rows(self, path: Path, part: PackedRows) -> None:
        """The next rows of an embedding in 8 bits."""
        name = "/".join(("params", *path))
        self._write(f"{name}.codes", part.codes)
        self._write(f"{name}.scale", part.scale)

    def left(self) -> list[tuple[Path, tuple[int, ...]]]:
        """Paths and shapes of the parameters that nothing was written of yet."""
        names = [name for name in self._shapes if not self._writer.done(name)]
        return [
            (tuple(name.split("/")[1:]), self._shapes[name][0])
            for name in names
            if name.startswith("params/")
        ]

    def floats(self, path: Path, part: np.ndarray | jax.Array) -> None:
        """The next rows of a parameter in floats."""
        self._write("/".join(("params", *path)), part)

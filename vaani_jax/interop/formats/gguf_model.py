"""A model in a GGUF file, read by ranges of rows.

What a file is: keys of its architecture, tensors by their names, a tokenizer. Whether
weights are ternary, the tensors say: where their types are, or where every group of
their weights holds -s, 0 and s only (`interop.ternary`). Scales that several groups
share are found by looking, too, so that a model with one scale for each matrix is that
model again, though its file repeats the scale in every block.

llama.cpp's `llama` rotates pairs of neighbors where others rotate halves: rows of q and
k are in that order in its files, and come back in ours.
"""

import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from vaani_jax.errors import VaaniError
from vaani_jax.interop.formats import gguf_rotary
from vaani_jax.interop.formats.gguf_file import Entry, GGUFFile
from vaani_jax.interop.formats.gguf_settings import (
    FACTORED,
    PERMUTED,
    activations,
    architecture_keys,
)
from vaani_jax.interop.formats.source import (
    LARGEST_SCALE,
    RANGE,
    Source,
    quantization_of,
)
from vaani_jax.interop.names import Storage, Tensor, Weights, tensors
from vaani_jax.interop.ternary import (
    CHANNEL,
    TENSOR,
    Grouping,
    Survey,
    block_of,
    coarsest,
    regrouped,
    split,
)
from vaani_jax.interop.vocabularies import from_gguf
from vaani_jax.model.config import Architecture, Quantization
from vaani_jax.model.transformer import Vaani
from vaani_jax.quant.packed import TILE
from vaani_jax.settings import build
from vaani_jax.words import shown

SPLIT_HEADS = ("q_proj", "k_proj")


class GGUFModel(Source):
    """A model in a GGUF file.

    Attributes: those of `Source`, and
      half: whether all scales are float16.

    Making one checks names, types and shapes, and looks whether weights are ternary;
    `variables`, `ternary` and `floats` read them.

    Raises VaaniError for whatever is wrong with it.
    """

    def __init__(self, path: pathlib.Path, kind: Weights = "auto") -> None:
        """Looks at everything.

        Args:
          path: of the file.
          kind: what to take weights in floats for that are not ternary as they are.
        """
        self._file = GGUFFile(path)
        metadata = self._file.metadata
        if rotated := [key for key in metadata if key.startswith("prism.hadamard")]:
            raise VaaniError(
                f"{path} has {shown(rotated[0])}: its matrices expect inputs rotated by"
                " a Hadamard matrix, which is not known here"
            )
        architecture = build(Architecture, architecture_keys(self._file), "model.")
        self._name = metadata["general.architecture"]
        self._head_size = architecture.head_size
        self._tensors = tensors(architecture)
        self._check_tensors(architecture)
        self.tokenizer = from_gguf(metadata, architecture.vocab_size)
        self._surveys: dict[str, Survey] = {}
        self.grouping: Grouping | None = None
        self.half = False
        self.storage, self.reason = self._look(kind)
        quantization = self._quantization(architecture)
        quantization.check_fits(architecture)
        self.module = Vaani(architecture, quantization)

    # -- Checking -----------------------------------------------------------------

    def _entry(self, tensor: Tensor) -> Entry:
        return self._file.tensors[tensor.gguf_name]

    def _check_tensors(self, architecture: Architecture) -> None:
        left = dict(self._file.tensors)
        left.pop(gguf_rotary.FACTORS if self._name in FACTORED else "", None)
        for tensor in self._tensors:
            name = tensor.gguf_name
            entry = left.pop(name, None)
            if entry is None:
                raise VaaniError(f"{self._file.path} has no tensor {name}")
            flip = tensor.kind in ("linear", "head")
            shape = tensor.shape[::-1] if flip else tensor.shape
            if entry.shape != shape:
                raise VaaniError(
                    f"{name} has shape {list(entry.shape)}: the keys of"
                    f" {self._file.path} ask for {list(shape)}"
                )
            if tensor.kind in ("norm", "bias") and entry.type.block > 1:
                raise VaaniError(
                    f"{name} is of type {entry.type.name}: it must be F32, F16 or BF16"
                )
            if tensor.kind != "linear":  # llama.cpp reads none of others
                continue
            scale = left.pop(f"{tensor.gguf}.scale", None)
            if scale is not None and (scale.shape != (1,) or scale.type.block > 1):
                raise VaaniError(
                    f"{scale.name} is {scale.type.name} {list(scale.shape)}: it must be"
                    " F32 [1]"
                )
        if left:
            raise VaaniError(
                f"{self._file.path} holds a tensor that {architecture.n_layers} layers"
                f" of {self._name} do not have: {ascii(min(left))[:100]}"
                f" ({len(left)} in all)"
            )

    def _factor(self, tensor: Tensor) -> np.float32:
        """What the tensor beside a matrix multiplies its products by; 1 without one."""
        entry = self._file.tensors.get(f"{tensor.gguf}.scale")
        if tensor.kind != "linear" or entry is None:
            return np.float32(1)
        scale: np.float32 = self._file.floats(entry, slice(None))[0, 0]
        if not 0 < scale < LARGEST_SCALE:
            raise VaaniError(
                f"{entry.name} is {float(scale)}: it must be above 0 and below"
                f" {LARGEST_SCALE:g}"
            )
        return scale

    # -- Looking ------------------------------------------------------------------

    def _ranges(self, tensor: Tensor) -> Iterator[tuple[int, np.ndarray]]:
        """Where ranges of rows begin, and their bytes, in the order of our outputs."""
        entry = self._entry(tensor)
        order = None if len(entry.shape) < 2 else self._order(tensor)
        step = max(TILE, RANGE // entry.shape[-1] // TILE * TILE)
        for start in range(0, entry.rows, step):
            which: slice | np.ndarray = slice(start, start + step)
            if order is not None:
                which = order[which]
            yield start, self._file.rows(entry, which)
            self._file.release()

    def _order(self, tensor: Tensor) -> np.ndarray | None:
        """The row in the file of each of ours; None where they are the same."""
        return order_in_file(tensor, self._name, self._head_size)

    def _split(self, tensor: Tensor, rows: np.ndarray, block: int) -> Any:
        """Codes and scales of rows, or None where they are not ternary."""
        kind = self._entry(tensor).type
        try:
            if kind.is_ternary:
                return kind.ternary(rows)
        except VaaniError as error:
            raise VaaniError(f"{tensor.gguf_name} is {error}") from None
        return split(kind.values(rows), block)

    def _survey(self, tensor: Tensor) -> Survey | None:
        """Which weights of a matrix share scales; None where it isn't ternary."""
        entry = self._entry(tensor)
        kind, columns = entry.type, entry.shape[-1]
        survey = Survey(columns, kind.block if kind.is_ternary else block_of(columns))
        for _, rows in self._ranges(tensor):
            if kind.is_ternary:
                try:
                    scales = kind.magnitudes(rows)
                except VaaniError as error:
                    raise VaaniError(f"{tensor.gguf_name} is {error}") from None
            else:
                found = self._split(tensor, rows, survey.block)
                if found is None:
                    return None
                scales = found[1]
            survey.add(scales)
        if not survey.largest < LARGEST_SCALE:
            raise VaaniError(
                f"{tensor.gguf_name} has a scale of {survey.largest:g}: it must be"
                f" below {LARGEST_SCALE:g}"
            )
        return survey

    def _look(self, kind: Weights) -> tuple[Storage, str]:
        """How the weights are kept, and why; sets what it finds out on the way."""
        linear = [t for t in self._tensors if t.kind == "linear"]
        types = sorted({self._entry(t).type.name for t in linear})
        coded = [t for t in linear if self._entry(t).type.is_ternary]
        if kind == "full" and coded:
            raise VaaniError(
                f"--weights full: {coded[0].gguf_name} is of the ternary type"
                f" {self._entry(coded[0]).type.name}; leave the flag out"
            )
        says = f"its matrices are {' and '.join(types)}"
        if kind == "full":
            return "full", f"full precision, as you say (--weights), and {says}"
        for tensor in linear:
            survey = self._survey(tensor)
            if survey is not None:
                self._surveys[tensor.gguf_name] = survey
                continue
            self._surveys.clear()
            if coded:
                raise VaaniError(
                    f"{tensor.gguf_name} is no ternary matrix, and"
                    f" {coded[0].gguf_name} is one: all linear layers of a block are"
                    " ternary here, or none"
                )
            if kind == "ternary":
                return "masters", "ternary masters, as you say (--weights)"
            return "full", f"full precision, as {says} with more than three values"
        self.grouping = coarsest(self._surveys.values())
        if self.grouping is None:
            raise VaaniError(
                f"{self._file.path} has matrices whose scales go by groups of different"
                " sizes: they are alike here"
            )
        for tensor in self._tensors:
            if tensor.kind in ("embedding", "head"):
                survey = self._survey(tensor)
                if survey is not None and self.grouping in survey.fits:
                    self._surveys[tensor.gguf_name] = survey
        self.half = all(survey.half for survey in self._surveys.values()) and all(
            self._factor(t) == 1 for t in self._tensors
        )
        per = {TENSOR: "one scale per matrix", CHANNEL: "one scale per output"}.get(
            str(self.grouping), f"one scale per {self.grouping} inputs of an output"
        )
        if len(coded) == len(linear):
            return "multiply", f"ternary, as {says}, with {per}"
        return "multiply", f"ternary, as {says} that hold {per}, its negative and 0"

    def is_ternary(self, tensor: Tensor) -> bool:
        """Whether a tensor is codes and scales."""
        return tensor.gguf_name in self._surveys

    def _quantization(self, architecture: Architecture) -> Quantization:
        if self.storage == "full":
            return Quantization(quantize=False)
        if self.storage == "masters":
            return Quantization()
        assert self.grouping is not None
        tracking, group = activations(self._file.metadata)
        return quantization_of(
            architecture,
            self.grouping,
            half=self.half,
            kinds={t.kind for t in self._tensors if self.is_ternary(t)},
            tracking=tracking,
            activation_group=group,
        )

    # -- Reading ------------------------------------------------------------------

    def ternary(self, tensor: Tensor) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """A ternary matrix, by ranges of its outputs, in order.

        Yields:
          Codes int8 [n, columns] in {-1, 0, 1} and scales [n, groups], float16 where
          all of the model's are and go by groups, else float32; [n, 1] where a row or
          the matrix has one. Those of groups of zeros are 1.

        Raises VaaniError for codes that are not ternary.
        """
        survey = self._surveys[tensor.gguf_name]
        assert self.grouping is not None
        factor = self._factor(tensor)
        half = self.half and self.grouping not in (TENSOR, CHANNEL)
        for _, rows in self._ranges(tensor):
            codes, scales = self._split(tensor, rows, survey.block)
            found = regrouped(scales.astype(np.float32), survey, self.grouping)
            found = found * factor
            yield codes, found.astype(np.float16) if half else found

    def float_rows(self, tensor: Tensor) -> Iterator[np.ndarray]:
        """A tensor by ranges of its rows there, float32 [n, columns], in order.

        Raises VaaniError for values that are not finite.
        """
        kind, factor = self._entry(tensor).type, self._factor(tensor)
        for _, rows in self._ranges(tensor):
            try:
                part = kind.floats(kind.split(rows))
            except VaaniError as error:
                raise VaaniError(f"{tensor.gguf_name} is {error}") from None
            if factor != 1:
                part = part * factor
            if not np.isfinite(part).all():
                raise VaaniError(f"{tensor.gguf_name} holds values that are not finite")
            if tensor.kind == "bias" and (order := self._order(tensor)) is not None:
                part = part[:, order]
            yield part


def order_in_file(tensor: Tensor, architecture: str, size: int) -> np.ndarray | None:
    """The row in a file of each of our rows of q or k; None where they are the same.

    A head's rows ``2 j`` and ``2 j + 1`` there are our ``j`` and ``j + size / 2``.

    Args:
      tensor: any; of a bias, numbers are rows.
      architecture: of the file.
      size: of a head.
    """
    split_heads = tensor.kind in ("linear", "bias") and tensor.module[-1] in SPLIT_HEADS
    if architecture not in PERMUTED or not split_heads:
        return None
    order = np.arange(tensor.shape[-1]).reshape(-1, size // 2, 2)
    return order.swapaxes(1, 2).reshape(-1)

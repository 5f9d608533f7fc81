"""What is alike in models that are read: tensors in parts, and what becomes of them.

A format says which tensors are codes and scales, and reads them, and floats, by ranges
of rows. Here they become masters to train from, or a packed folder, for which no matrix
is ever in memory as a whole, let alone in floats.
"""

import abc
import dataclasses
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from vaani_jax.errors import VaaniError
from vaani_jax.inference.packed_writer import PackedWriter
from vaani_jax.interop.names import Storage, Tensor, tensors
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
from vaani_jax.model.config import Architecture, Quantization
from vaani_jax.model.packing import Embedding, pack_kernel, pack_rows
from vaani_jax.model.transformer import Vaani
from vaani_jax.quant.masters import masters_of
from vaani_jax.runs.metadata import Metadata
from vaani_jax.settings import build
from vaani_jax.text.tokenizers import Tokenizer

Tree = Any

LARGEST_SCALE = 1e6  # a kernel's; one that is trained has some 0.01
RANGE = 2**22  # weights of a range of rows: little memory, and few calls


class Source(abc.ABC):
    """A model of other tools that was looked at, and is to be read.

    Attributes:
      module: the model, with the context that it was made for.
      storage: how its kernels are kept.
      reason: why they are taken for that, for people.
      tokenizer: its tokenizer.
      grouping: which weights share a scale, where kernels are codes; else None.
    """

    module: Vaani
    storage: Storage
    reason: str
    tokenizer: Tokenizer
    grouping: Grouping | None

    @property
    def coded(self) -> bool:
        """Whether its kernels are codes and scales."""
        return self.storage in ("multiply", "divide")

    @abc.abstractmethod
    def is_ternary(self, tensor: Tensor) -> bool:
        """Whether a tensor is codes and scales."""

    @abc.abstractmethod
    def ternary(self, tensor: Tensor) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """A ternary matrix, by ranges of its outputs, in order.

        Yields:
          Codes int8 [n, columns] in {-1, 0, 1}, n a multiple of 16 but for the last,
          and scales [n, groups], float16 where those of the model are, else float32;
          [n, 1] where a row or the matrix has one.

        Raises VaaniError for codes that are not ternary.
        """

    @abc.abstractmethod
    def float_rows(self, tensor: Tensor) -> Iterator[np.ndarray]:
        """A tensor by ranges of its rows there, float32 [n, columns], in order.

        Raises VaaniError for values that are not finite.
        """

    def floats(self, tensor: Tensor) -> np.ndarray:
        """A tensor as it is here, float32, whatever it is stored as."""
        found = np.concatenate(list(self.float_rows(tensor)))
        if tensor.kind in ("linear", "head"):
            return np.ascontiguousarray(found.T)
        return found.reshape(tensor.shape)

    def codes(self, tensor: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """A ternary matrix as a kernel: codes int8 [in, out], and its scale.

        The scale is [] for the matrix, [out] for each output, [groups, out] else.
        """
        parts, scales = zip(*self.ternary(tensor), strict=True)
        codes = np.ascontiguousarray(np.concatenate(parts).T)
        return codes, self._shaped(np.concatenate(scales))

    def _shaped(self, scales: np.ndarray) -> np.ndarray:
        """Scales [n, groups] in the shape that a kernel has them."""
        scale = scales.T
        if self.grouping == TENSOR:
            return np.array(scale[0, 0])
        return np.array(scale[0] if self.grouping == CHANNEL else scale)

    def variables(self) -> Tree:
        """Parameters and quantizer variables, as `init_variables` shapes them.

        Masters of codes quantize to them again. Streams: one tensor at a time is in
        memory twice.
        """
        params: Tree = {}
        quant: Tree = {}
        for tensor in tensors(self.module.architecture):
            if not self.is_ternary(tensor):
                put(params, tensor.path, jnp.asarray(self.floats(tensor)))
                if tensor.kind == "linear" and self.storage == "masters":
                    kept = {"threshold": np.asarray(0.5, np.float32)}
                    put(quant, (*tensor.module, "weight_quantizer"), kept)
                continue
            codes, scale = self.codes(tensor)
            scale = scale.astype(np.float32)
            array = masters_of(codes, scale)
            kept = {"threshold": np.asarray(0.5, np.float32), "scale": scale}
            if tensor.kind == "embedding":
                array = np.ascontiguousarray(array.T)
                put(quant, ("embedding_quantizer",), kept)
            else:
                put(quant, (*tensor.module, "weight_quantizer"), kept)
            put(params, tensor.path, jnp.asarray(array))
        return {"params": params, "quant": quant}

    def write_packed(
        self,
        folder: pathlib.Path,
        module: Vaani,
        metadata: Metadata,
        embedding: Embedding = "float32",
    ) -> None:
        """Writes a packed folder, a range of rows at a time.

        Args:
          folder: to write to; it is there.
          module: `module`, its context may be another.
          metadata: to go along.
          embedding: how to store an embedding that isn't ternary, and such a head.

        Raises VaaniError for weights in full precision.
        """
        if self.storage == "full":
            raise VaaniError(
                "these weights are in full precision: they can't be packed"
            )
        threshold = jnp.asarray(0.5, jnp.float32)
        with PackedWriter(folder, module, metadata, embedding) as writer:
            for tensor in tensors(module.architecture):
                if self.is_ternary(tensor):
                    shared = self.grouping if self.grouping in (TENSOR, CHANNEL) else ""
                    for codes, scales in self.ternary(tensor):
                        writer.ternary(tensor.path, codes, scales, str(shared))
                elif tensor.kind == "linear":
                    masters = jnp.asarray(self.floats(tensor))
                    packed = pack_kernel(masters, threshold, None, module.spec)
                    writer.packed(tensor.path, packed)
                elif tensor.kind in ("embedding", "head") and embedding == "int8":
                    for part in self.float_rows(tensor):
                        writer.rows(tensor.path, pack_rows(jnp.asarray(part)))
                elif tensor.kind == "embedding":
                    for part in self.float_rows(tensor):
                        writer.floats(tensor.path, part)
                else:
                    writer.floats(tensor.path, self.floats(tensor))


def quantization_of(
    architecture: Architecture,
    grouping: Grouping,
    *,
    half: bool,
    kinds: set[str],
    tracking: str = "",
    activation_group: int = 32,
) -> Quantization:
    """How a model rounds whose kernels are codes and scales.

    Args:
      architecture: of the model.
      grouping: of its scales.
      half: whether all are float16.
      kinds: of its tensors that are codes: "linear", maybe "embedding" and "head".
      tracking: how inputs are rounded. Where nothing says, a model with one scale per
        matrix is taken for a b1.58 (8 bits per token), and one with more is computed as
        llama.cpp does it, 8 bits for each ``activation_group`` inputs.
      activation_group: inputs that share a scale where that is "group".
    """
    a = architecture
    if not tracking:
        sizes = (a.dim, a.hidden_dim, a.n_heads * a.head_size)
        fits = not any(size % activation_group for size in sizes)
        tracking = "group" if grouping != TENSOR and fits else "token"
    values: dict[str, Any] = {"activation_tracking": tracking}
    if tracking == "group":
        values["activation_group"] = activation_group
    if grouping not in (TENSOR, CHANNEL):
        values["weight_group"] = grouping
        values["scale_dtype"] = "float16" if half else "float32"
        grouping = "group"
    return build(
        Quantization,
        {
            **values,
            "weight_scale": "stored",
            "weight_granularity": grouping,
            "ternary_head": "head" in kinds,
            "ternary_embedding": "embedding" in kinds,
        },
        "quantization.",
    )


@dataclasses.dataclass
class Found:
    """Matrices in floats that are ternary as they are.

    Attributes:
      surveys: of each, by its path; empty where there are none.
      kinds: of their tensors.
      grouping: which weights share a scale in all of them.
      half: whether all scales are float16.
    """

    surveys: dict[tuple[str, ...], Survey] = dataclasses.field(default_factory=dict)
    kinds: set[str] = dataclasses.field(default_factory=set)
    grouping: Grouping = TENSOR
    half: bool = False

    @property
    def described(self) -> str:
        """Their values, for people."""
        per = {TENSOR: "one scale", CHANNEL: "one scale per output"}.get(
            str(self.grouping), f"one scale per {self.grouping} inputs of an output"
        )
        return f"{per}, its negative and 0"

    def module(self, architecture: Architecture) -> Vaani:
        """The model that has them."""
        return Vaani(
            architecture,
            quantization_of(
                architecture, self.grouping, half=self.half, kinds=self.kinds
            ),
        )

    def parts(
        self, tensor: Tensor, values: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Codes and scales of some rows, as `Source.ternary` gives them."""
        survey = self.surveys[tensor.path]
        found = split(values, survey.block)
        assert found is not None  # it was looked at
        codes, scales = found
        scales = regrouped(scales.astype(np.float32), survey, self.grouping)
        half = self.half and self.grouping not in (TENSOR, CHANNEL)
        return codes, scales.astype(np.float16) if half else scales


def look(source: Source, among: Sequence[Tensor]) -> Found | None:
    """Looks whether kernels in floats are ternary; None where one isn't."""
    found = Found()
    for tensor in among:
        if tensor.kind == "linear":
            survey = survey_of(source, tensor)
            if survey is None:
                return None
            found.surveys[tensor.path] = survey
    grouping = coarsest(found.surveys.values())
    if grouping is None:
        return None
    found.grouping = grouping
    for tensor in among:
        if tensor.kind in ("embedding", "head"):
            survey = survey_of(source, tensor)
            if survey is not None and grouping in survey.fits:
                found.surveys[tensor.path] = survey
    found.kinds = {t.kind for t in among if t.path in found.surveys}
    found.half = all(survey.half for survey in found.surveys.values())
    return found


def survey_of(source: Source, tensor: Tensor) -> Survey | None:
    """Which weights of a matrix share scales; None where it isn't ternary."""
    survey: Survey | None = None
    for rows in source.float_rows(tensor):
        columns = rows.shape[1]
        survey = survey or Survey(columns, block_of(columns))
        parts = split(rows, survey.block)
        if parts is None:
            return None
        survey.add(parts[1])
    if survey is None or not survey.largest < LARGEST_SCALE:
        return None
    return survey


def put(tree: Tree, path: tuple[str, ...], value: Any) -> None:
    """Sets a leaf of a nested dict."""
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
    tree[path[-1]] = value

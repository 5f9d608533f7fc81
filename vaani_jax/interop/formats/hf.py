"""Folders of Hugging Face transformers: ``config.json`` and safetensors.

Kernels are stored in one of four ways (`names.Storage`); packed ones are uint8
[out / 4, in] (`quant.packed.pack_quarters`). Beside them is ``weight_scale`` [1]. Where
transformers multiplies by it (``AutoBitLinear``), it does so after it has added the
bias: that is stored divided by the scale.

A packed kernel comes back as codes and a scale; for training, as masters of them
(`quant.masters`).
"""

import json
import pathlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from vaani_jax.errors import VaaniError
from vaani_jax.interop.formats.source import (
    LARGEST_SCALE,
    RANGE,
    Found,
    Source,
    look,
    survey_of,
)
from vaani_jax.interop.names import (
    Storage,
    Tensor,
    family_of,
    hf_config,
    model_from_hf,
    tensors,
)
from vaani_jax.interop.names import Weights as WeightsKind
from vaani_jax.interop.ternary import TENSOR
from vaani_jax.interop.tokenizers import from_folder, padding_of, to_hf
from vaani_jax.model.config import Architecture, Quantization
from vaani_jax.model.names import ternary_kernels
from vaani_jax.model.transformer import Vaani
from vaani_jax.paths import read_json
from vaani_jax.quant.packed import TILE, pack_quarters, quarter_rows
from vaani_jax.text.special import GENERATION, MAP
from vaani_jax.text.tokenizers import (
    ByteTokenizer,
    CharTokenizer,
    HFTokenizer,
    Tokenizer,
)
from vaani_jax.words import first_line

Tree = Any


SINGLE = "model.safetensors"


INDEX = "model.safetensors.index.json"


SHARD_BYTES = 2 * 10**9


FLOATS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


IGNORED = ("rotary_emb.inv_freq",)  # buffers that older versions saved


# What names begin with that were saved from a module within another: one that was
# compiled, or trained on several devices.
WRAPPERS = ("_orig_mod.", "module.")


# Names that other folders have for tensors of ours.
ALIASES = {  # 1bitLLM
    "self_attn.inner_attn_ln": "self_attn.attn_sub_norm",
    "mlp.ffn_layernorm": "mlp.ffn_sub_norm",
}


def _safetensors() -> Any:
    try:
        import safetensors
        import safetensors.numpy
    except ImportError:
        raise VaaniError(
            "Hugging Face folders need packages that are not installed:"
            " pip install 'vaani-jax[interop]'"
        ) from None
    return safetensors


# -- Checking ---------------------------------------------------------------------


def check_block(architecture: Architecture) -> None:
    """Raises VaaniError for blocks that no class of transformers has."""
    row, heads = family_of(architecture), architecture.n_heads
    if row.block.sub_norms and architecture.head_size * heads != architecture.dim:
        raise VaaniError(
            f"transformers' {row.model_type} has heads of dim / n_heads, and this model"
            f" has model.head_dim = {architecture.head_dim}: train with model.head_dim"
            " = 0 to export"
        )
    if row.model_type == "llama" and architecture.dim % heads:
        raise VaaniError(
            f"transformers' llama needs a model.dim that is a multiple of n_heads ="
            f" {heads}, and this model has {architecture.dim}"
        )


def check_quantization(quantization: Quantization) -> None:
    """Raises VaaniError for what transformers' BitLinear does not do."""
    q = quantization
    if not q.quantize:
        return
    if q.ternary_head or q.ternary_embedding:
        part = "head" if q.ternary_head else "embedding"
        raise VaaniError(
            f"this model's {part} is ternary, which transformers can't read: use"
            f" --format gguf, or train with quantization.ternary_{part}=False"
        )
    if q.weight_granularity != "tensor":
        raise VaaniError(
            f"this model has a scale per {q.weight_granularity}, which transformers"
            " can't read: use --format gguf, or train with"
            " quantization.weight_granularity=tensor"
        )
    if q.activation_tracking != "token":
        raise VaaniError(
            "this model quantizes activations in another way than per token, which is"
            " transformers': use --format gguf, or train with"
            " quantization.activation_tracking=token"
        )


def check_packed(module: Vaani) -> None:
    """Raises VaaniError, with what works instead, for what they can't hold."""
    if not module.quantization.quantize:
        raise VaaniError("this model is in full precision: use --format hf")
    narrow = {t.shape[1] for t in tensors(module.architecture) if t.kind == "linear"}
    odd = [n for n in sorted(narrow) if n % 4]
    if odd:
        raise VaaniError(
            f"packed weights need outputs in multiples of 4, and this model has"
            f" {odd[0]}: use --format hf"
        )


def check_masters(quantization: Quantization, quant: Tree) -> None:
    """Raises VaaniError, with what works instead, for what readers of masters lack."""
    if not quantization.quantize:
        return
    if quantization.weight_scale != "absmean":
        raise VaaniError(
            f"readers of masters take mean|W| for the scale, and this model has"
            f" weight_scale = {quantization.weight_scale}: use --format hf-packed"
        )
    for entry in ternary_kernels({"params": _stand_ins(quant), "quant": quant}):
        if float(entry.threshold) != 0.5:
            raise VaaniError(
                "readers of masters quantize with the threshold 0.5, and"
                f" {entry.name} has {float(entry.threshold):.4g}: use --format"
                " hf-packed"
            )


def _stand_ins(quant: Tree) -> Tree:
    """Stand-ins for the parameters, where only thresholds are asked for."""
    if "weight_quantizer" in quant:
        return {"kernel": None}
    return {k: _stand_ins(v) for k, v in quant.items() if isinstance(v, dict)}


# -- Writing ----------------------------------------------------------------------


def write_folder(
    folder: pathlib.Path,
    architecture: Architecture,
    storage: Storage,
    tokenizer: Tokenizer,
    take: Callable[[Tensor], tuple[np.ndarray, np.ndarray | None]],
    *,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes a model into an empty folder.

    Args:
      folder: is there.
      architecture: of the model.
      storage: how kernels are kept.
      tokenizer: goes along.
      take: gives the array of a tensor as it is here, and a scale for kernels that are
        packed (the array then holds codes); called once each, in order.
      shard_bytes: a file is not longer, unless one tensor is.
    """
    content = hf_config(architecture, storage)
    serialized, settings = to_hf(tokenizer)
    if isinstance(tokenizer, HFTokenizer):
        for part in ("bos_token", "pad_token"):
            content[f"{part}_id"] = tokenizer.id_of(part)
        ends: Any = list(tokenizer.eos_ids) or None
        content["eos_token_id"] = ends[0] if ends and len(ends) == 1 else ends
        if tokenizer.special.by_part:
            _write_json(folder / MAP, tokenizer.special.by_part)
        if tokenizer.special.generation:
            _write_json(folder / GENERATION, tokenizer.special.generation)
    elif isinstance(tokenizer, CharTokenizer | ByteTokenizer):
        content["pad_token_id"] = int(tokenizer.encode(padding_of(tokenizer))[0])
    settings["model_max_length"] = architecture.max_seq_len
    _write_json(folder / "config.json", content)
    (folder / "tokenizer.json").write_text(serialized, encoding="utf-8")
    _write_json(folder / "tokenizer_config.json", settings)
    _write_weights(folder, _converted(architecture, take), shard_bytes)


def _converted(
    architecture: Architecture,
    take: Callable[[Tensor], tuple[np.ndarray, np.ndarray | None]],
) -> Iterator[tuple[str, np.ndarray]]:
    scales: dict[tuple[str, ...], np.ndarray] = {}
    for tensor in tensors(architecture):
        array, scale = take(tensor)
        if tensor.kind in ("linear", "head"):
            array = array.T
        if scale is not None:
            scales[tensor.module] = scale
            yield tensor.hf_name, pack_quarters(np.ascontiguousarray(array))
            yield f"{tensor.hf}.weight_scale", scale.reshape(1)
            continue
        if tensor.kind == "bias" and tensor.module in scales:
            array = _divided(np.asarray(array), scales.pop(tensor.module))
        yield tensor.hf_name, np.ascontiguousarray(array)


def _divided(array: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """The float32 numbers that come nearest to ``array`` when multiplied by ``scale``.

    What was read so is written so that it is read again.
    """
    quotient = array / scale
    nearest = quotient
    for other in (np.nextafter(quotient, -np.inf), np.nextafter(quotient, np.inf)):
        closer = np.abs(other * scale - array) < np.abs(nearest * scale - array)
        nearest = np.where(closer, other, nearest)
    return nearest.astype(np.float32)


def _write_weights(
    folder: pathlib.Path, items: Iterable[tuple[str, np.ndarray]], shard_bytes: int
) -> None:
    library = _safetensors()
    shards: list[list[str]] = []
    pending: dict[str, np.ndarray] = {}
    total = 0

    def flush() -> None:
        path = folder / f"shard-{len(shards)}"
        try:
            library.numpy.save_file(pending, path, metadata={"format": "pt"})
        except library.SafetensorError as error:  # what a full disk becomes there
            raise VaaniError(
                f"can't write {folder.name}: {first_line(error, 200)}"
            ) from None
        shards.append(list(pending))
        pending.clear()

    for name, array in items:
        held = sum(a.nbytes for a in pending.values())
        if pending and held + array.nbytes > shard_bytes:
            flush()
        pending[name] = array
        total += array.nbytes
    flush()
    if len(shards) == 1:
        (folder / "shard-0").rename(folder / SINGLE)
        return
    places: dict[str, str] = {}
    for i, keys in enumerate(shards):
        name = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"shard-{i}").rename(folder / name)
        places |= dict.fromkeys(keys, name)
    index = {"metadata": {"total_size": total}, "weight_map": places}
    _write_json(folder / INDEX, index)


def _write_json(path: pathlib.Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


# -- Reading ----------------------------------------------------------------------


class Weights:
    """The tensors of a folder, read one at a time.

    Attributes:
      names: what there is.
    """

    def __init__(self, folder: pathlib.Path) -> None:
        self._folder = folder
        self._files: dict[str, Any] = {}
        if (folder / INDEX).is_file():
            self._places = self._index(read_json(folder / INDEX))
        elif (folder / SINGLE).is_file():
            self._places = dict.fromkeys(self._open(SINGLE).keys(), SINGLE)
        else:
            raise VaaniError(
                f"{folder} has neither {SINGLE} nor {INDEX} (pickled weights are not"
                " read: save the model with save_pretrained, which writes safetensors)"
            )
        # By our names, the name that each has there.
        self._theirs: dict[str, str] = {}
        for name in self._places:
            ours = _ours(name)
            if other := self._theirs.get(ours):
                raise VaaniError(
                    f"{folder} holds {ascii(ours)[:80]} twice: as {ascii(other)[:80]}"
                    f" and as {ascii(name)[:80]}"
                )
            self._theirs[ours] = name
        self.names = set(self._theirs)

    def _index(self, content: dict[str, Any]) -> dict[str, str]:
        places = content.get("weight_map")
        if not isinstance(places, dict) or not places:
            raise VaaniError(f"{INDEX} has no weight_map")
        for file in places.values():
            plain = isinstance(file, str) and file.endswith(".safetensors")
            if not plain or pathlib.PurePath(file).name != file or "\\" in file:
                raise VaaniError(
                    f"{INDEX} names {ascii(file)[:80]}: it must be a .safetensors file"
                    " in the same folder"
                )
        held = {file: set(self._open(file).keys()) for file in set(places.values())}
        for name, file in places.items():
            if name not in held[file]:
                raise VaaniError(f"{file} does not hold {ascii(name)[:80]}")
        return places

    def _open(self, file: str) -> Any:
        if file not in self._files:
            library = _safetensors()
            path = self._folder / file
            if not path.is_file():
                raise VaaniError(f"{path} is missing")
            try:
                self._files[file] = library.safe_open(
                    path, framework="np", backend="pread"
                )
            except (library.SafetensorError, OSError) as error:
                raise VaaniError(
                    f"{path} is damaged: {first_line(error, 200)}"
                ) from None
        return self._files[file]

    def describe(self, name: str) -> tuple[str, tuple[int, ...]]:
        """Type and shape of a tensor; raises VaaniError where it is missing."""
        if name not in self._theirs:
            raise VaaniError(f"{self._folder} has no tensor {name}")
        there = self._theirs[name]
        part = self._open(self._places[there]).get_slice(there)
        return part.get_dtype(), tuple(part.get_shape())

    def read(
        self, name: str, shape: tuple[int, ...], dtypes: Iterable[str]
    ) -> np.ndarray:
        """A tensor, float32 or uint8; raises VaaniError for another shape or type."""
        parts = list(self.ranges(name, shape, dtypes))
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def ranges(
        self, name: str, shape: tuple[int, ...], dtypes: Iterable[str]
    ) -> Iterator[np.ndarray]:
        """A tensor as `read` gives it, by ranges of rows if it is a matrix."""
        dtype, found = self.describe(name)
        if dtype not in dtypes:
            raise VaaniError(
                f"{name} is of type {dtype}: it must be {' or '.join(dtypes)}"
            )
        if found != shape:
            raise VaaniError(
                f"{name} has shape {list(found)}: the config asks for {list(shape)}"
            )
        if not shape:
            yield self._part(name, dtype, ())
            return
        step = shape[0]
        if len(shape) == 2:
            step = max(TILE, RANGE // shape[1] // TILE * TILE)
        for start in range(0, shape[0], step):
            # The library takes no end beyond the last row.
            yield self._part(name, dtype, slice(start, min(shape[0], start + step)))

    def _part(self, name: str, dtype: str, which: Any) -> np.ndarray:
        library = _safetensors()
        there = self._theirs[name]
        try:
            array = self._open(self._places[there]).get_slice(there)[which]
        except (library.SafetensorError, OSError, ValueError) as error:
            raise VaaniError(
                f"{name} can't be read: {first_line(error, 200)}"
            ) from None
        if dtype == "U8":
            return array
        array = array.astype(np.float32, copy=False)
        if not np.isfinite(array).all():
            raise VaaniError(f"{name} holds values that are not finite")
        return array


def _ours(name: str) -> str:
    while name.startswith(WRAPPERS):
        name = name.partition(".")[2]
    for theirs, ours in ALIASES.items():
        name = name.replace(f".{theirs}.", f".{ours}.")
    return name


class Folder(Source):
    """A model in a Hugging Face folder.

    Making one checks names, types and shapes, and looks whether weights that nothing is
    said of are ternary as they are.

    Raises VaaniError for whatever is wrong with it.
    """

    def __init__(self, path: pathlib.Path, kind: WeightsKind = "auto") -> None:
        """Looks at everything.

        Args:
          path: of the folder.
          kind: what to take the weights for where its config doesn't say.
        """
        if not path.is_dir():
            raise VaaniError(f"{path} is no folder")
        if not (path / "config.json").is_file():
            raise VaaniError(f"{path} has no config.json")
        content = read_json(path / "config.json")
        weights = self._weights = Weights(path)
        sub_norms = any("_sub_norm." in name for name in weights.names)
        self.module, self.storage, self.reason = model_from_hf(
            content, kind, sub_norms=sub_norms
        )
        architecture = self.module.architecture
        if architecture.n_layers > len(weights.names):
            raise VaaniError(
                f"config.json has {architecture.n_layers} layers, more than there"
                " are tensors"
            )
        expected = self._expected()
        extra = {n for n in weights.names - set(expected) if not n.endswith(IGNORED)}
        if architecture.tie_embeddings:
            extra.discard("lm_head.weight")
        if extra:
            raise VaaniError(
                f"{path} holds a tensor that {architecture.n_layers} layers of this"
                f" kind do not have: {ascii(min(extra))[:100]} ({len(extra)} in all)"
            )
        for name, (shape, dtypes) in expected.items():
            dtype, found = weights.describe(name)
            if dtype not in dtypes or (
                found != shape and not (shape == (1,) and found == ())
            ):
                raise VaaniError(
                    f"{name} is {dtype} {list(found)}: the config asks for"
                    f" {' or '.join(dtypes)} {list(shape)}"
                )
        self.grouping = TENSOR if self.coded else None
        self._found = Found()
        self._kept = self.storage  # as the config has it
        if content.get("quantization_config") is None and kind != "full":
            self._look()
        self.tokenizer = from_folder(path, architecture.vocab_size)

    def _expected(self) -> dict[str, tuple[tuple[int, ...], tuple[str, ...]]]:
        floats = tuple(FLOATS)
        expected: dict[str, tuple[tuple[int, ...], tuple[str, ...]]] = {}
        for tensor in tensors(self.module.architecture):
            shape = tensor.shape
            if tensor.kind in ("linear", "head"):
                shape = shape[::-1]
            if tensor.kind == "linear" and self.storage in ("multiply", "divide"):
                if shape[0] % 4:
                    raise VaaniError(f"{tensor.hf} can't be packed: {shape[0]} rows")
                shape = (shape[0] // 4, shape[1])
                expected[f"{tensor.hf}.weight_scale"] = ((1,), floats)
                expected[tensor.hf_name] = (shape, ("U8",))
            else:
                expected[tensor.hf_name] = (shape, floats)
        return expected

    def _look(self) -> None:
        """Finds out whether every kernel is ternary as it is; see `interop.ternary`."""
        among = tensors(self.module.architecture)
        found = look(self, among)
        if found is None and self.storage == "masters":
            self._check_are_masters(among)
        if found is None:
            return
        self._found, self.storage, self.grouping = found, "multiply", found.grouping
        self.reason = f"ternary, as all its kernels hold {found.described} only"
        self.module = found.module(self.module.architecture)

    def _check_are_masters(self, among: Sequence[Tensor]) -> None:
        """Refuses a kernel of three values: its scale is no mean of magnitudes."""
        for tensor in among:
            if tensor.kind == "linear" and survey_of(self, tensor) is not None:
                raise VaaniError(
                    f"{tensor.hf} holds three values, so it is a ternary kernel and no"
                    " master of one, as others are: leave --weights ternary out to"
                    " compute with all of them as they are, in full precision"
                )

    def is_ternary(self, tensor: Tensor) -> bool:
        """Whether a tensor is codes and scales."""
        if self._found.surveys:
            return tensor.path in self._found.surveys
        return tensor.kind == "linear" and self.coded

    def float_rows(self, tensor: Tensor) -> Iterator[np.ndarray]:
        """See `Source.float_rows`."""
        shape = tensor.shape
        if tensor.kind in ("linear", "head"):
            shape = shape[::-1]
        for part in self._weights.ranges(tensor.hf_name, shape, FLOATS):
            if tensor.kind == "bias" and self._kept == "multiply":
                part = part * self._scale(tensor)
            yield part.reshape(-1, shape[-1])

    def ternary(self, tensor: Tensor) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """See `Source.ternary`."""
        if self._found.surveys:
            for part in self.float_rows(tensor):
                yield self._found.parts(tensor, part)
            return
        columns, rows = tensor.shape
        scale = self._scale(tensor).reshape(1, 1)
        packed = self._weights.read(tensor.hf_name, (rows // 4, columns), ("U8",))
        step = max(TILE, RANGE // columns // TILE * TILE)
        for start in range(0, rows, step):
            codes = quarter_rows(packed, start, min(rows, start + step))
            yield codes, np.repeat(scale, len(codes), axis=0)

    def _scale(self, tensor: Tensor) -> np.ndarray:
        """Scale [] of the packed kernel of a module."""
        name = f"{tensor.hf}.weight_scale"
        _, found = self._weights.describe(name)
        scale = self._weights.read(name, found, FLOATS).reshape(())
        with np.errstate(all="ignore"):
            if self.storage == "divide":
                scale = np.float32(1) / scale
        scale = np.asarray(scale, np.float32)
        if not 0 < scale < LARGEST_SCALE:
            raise VaaniError(
                f"{name} gives a scale of {float(scale)}: it must be above 0 and below"
                f" {LARGEST_SCALE:g}"
            )
        return scale

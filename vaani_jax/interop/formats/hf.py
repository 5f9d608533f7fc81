"""Folders of Hugging Face transformers: ``config.json`` and safetensors.

Kernels are stored in one of four ways (`names.Storage`); packed ones are uint8
[out / 4, in] (`quant.packed.pack_quarters`). Beside them is ``weight_scale`` [1].

A packed kernel comes back as a scale and, for training, as masters ``c T`` with ``c``
chosen so that ``mean|c T|`` is that scale: the rule of b1.58 then finds the same codes,
and the same scale but for the rounding of the mean.
"""

import json
import pathlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vaani_jax.errors import VaaniError
from vaani_jax.interop.names import (
    Storage,
    Tensor,
    hf_config,
    model_from_hf,
    tensors,
)
from vaani_jax.interop.names import Weights as WeightsKind
from vaani_jax.interop.tokenizers import from_folder, padding_of, to_hf
from vaani_jax.model.config import Architecture, Quantization
from vaani_jax.model.names import ternary_kernels
from vaani_jax.model.packing import pack_kernel
from vaani_jax.model.transformer import Vaani
from vaani_jax.paths import read_json
from vaani_jax.quant.packed import pack, pack_quarters, unpack_quarters
from vaani_jax.quant.rounding import EPSILON
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


LARGEST_SCALE = 1e6  # a kernel's; one that is trained has some 0.01


_packed = jax.jit(pack)  # traced: codes that were read are ternary


IGNORED = ("rotary_emb.inv_freq",)  # buffers that older versions saved


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
    for tensor in tensors(architecture):
        array, scale = take(tensor)
        if tensor.kind in ("linear", "head"):
            array = array.T
        if scale is not None:
            yield f"{tensor.hf}.weight", pack_quarters(np.ascontiguousarray(array))
            yield f"{tensor.hf}.weight_scale", scale.reshape(1)
        else:
            yield f"{tensor.hf}.weight", np.ascontiguousarray(array)


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
        self._theirs = {_ours(name): name for name in self._places}
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
        dtype, found = self.describe(name)
        if dtype not in dtypes:
            raise VaaniError(
                f"{name} is of type {dtype}: it must be {' or '.join(dtypes)}"
            )
        if found != shape:
            raise VaaniError(
                f"{name} has shape {list(found)}: the config asks for {list(shape)}"
            )
        library = _safetensors()
        try:
            there = self._theirs[name]
            array = self._open(self._places[there]).get_tensor(there)
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
    for theirs, ours in ALIASES.items():
        name = name.replace(f".{theirs}.", f".{ours}.")
    return name


class Folder:
    """A model in a Hugging Face folder.

    Attributes:
      module: the model, with the context that the folder names.
      storage: how its kernels are kept.
      reason: why they are taken for that, for people.
      tokenizer: its tokenizer.

    Making one checks names, types and shapes; `variables` reads the weights.

    Raises VaaniError for whatever is wrong with it.
    """

    def __init__(self, path: pathlib.Path, kind: WeightsKind = "auto") -> None:
        """Looks at everything but the numbers.

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
        if kind == "ternary" and self.storage == "masters":
            self._check_are_masters()
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
                expected[f"{tensor.hf}.weight"] = (shape, ("U8",))
            else:
                expected[f"{tensor.hf}.weight"] = (shape, floats)
        return expected

    def _check_are_masters(self) -> None:
        """Refuses kernels of three values: their scale is no mean of magnitudes."""
        first = next(t for t in tensors(self.module.architecture) if t.kind == "linear")
        if len(np.unique(np.abs(self._floats(first)))) <= 2:
            raise VaaniError(
                f"{first.hf} holds three values, so it is a ternary kernel and no"
                " master of one: leave --weights ternary out to compute with it as it"
                " is, in full precision"
            )

    def variables(self) -> Tree:
        """Parameters and quantizer variables, as `init_variables` shapes them.

        Streams: one tensor at a time is in memory twice.
        """
        params: Tree = {}
        quant: Tree = {}
        for tensor in tensors(self.module.architecture):
            packed = tensor.kind == "linear" and self.storage in ("multiply", "divide")
            if packed:
                codes, scale = self._codes(tensor)
                array = masters_of(codes, scale)
            else:
                array = self._floats(tensor)
            put(params, tensor.path, jnp.asarray(array))
            if tensor.kind == "linear" and self.storage != "full":
                kept = {"threshold": np.asarray(0.5, np.float32)}
                if packed:
                    kept["scale"] = scale
                put(quant, (*tensor.module, "weight_quantizer"), kept)
        return {"params": params, "quant": quant}

    def packed_variables(self) -> Tree:
        """Variables as `packing.pack_variables` returns them; never masters of a model.

        Raises VaaniError for weights in full precision.
        """
        if self.storage == "full":
            raise VaaniError(
                "these weights are in full precision: they can't be packed"
            )
        params: Tree = {}
        threshold = jnp.asarray(0.5, jnp.float32)
        for tensor in tensors(self.module.architecture):
            if tensor.kind != "linear":
                leaf: Any = jnp.asarray(self._floats(tensor))
            elif self.storage == "masters":
                masters = jnp.asarray(self._floats(tensor))
                leaf = pack_kernel(masters, threshold, None, self.module.spec)
            else:
                codes, scale = self._codes(tensor)
                leaf = _packed(jnp.asarray(codes), jnp.asarray(scale))
            put(params, tensor.path, leaf)
        return {"params": params, "quant": {}}

    def _floats(self, tensor: Tensor) -> np.ndarray:
        """A tensor as it is here, float32."""
        shape = tensor.shape
        flip = tensor.kind in ("linear", "head")
        array = self._weights.read(
            f"{tensor.hf}.weight", shape[::-1] if flip else shape, FLOATS
        )
        return np.ascontiguousarray(array.T) if flip else array

    def _codes(self, tensor: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """Codes [in, out], int8, and scale of a packed kernel."""
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
        columns, rows = tensor.shape
        packed = self._weights.read(
            f"{tensor.hf}.weight", (rows // 4, columns), ("U8",)
        )
        return np.ascontiguousarray(unpack_quarters(packed).T), scale


def masters_of(codes: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Masters [in, out] from which the rule of b1.58 finds these codes again.

    They are ``c T``, with c = scale / share of non-zeros, so that ``mean|c T|`` is the
    scale up to rounding; the codes are exact, as c is above half of any mean.
    """
    kept = np.count_nonzero(codes) / codes.size
    c = np.float32(max(float(scale), EPSILON) / kept) if kept else np.float32(0)
    return codes.astype(np.float32) * c


def put(tree: Tree, path: tuple[str, ...], value: Any) -> None:
    """Sets a leaf of a nested dict."""
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
    tree[path[-1]] = value

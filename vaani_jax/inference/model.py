"""A trained model, from wherever it is: a checkpoint of a run, or a packed folder.

A packed folder holds two files. ``model.safetensors`` has the arrays, in an order that
puts every packed kernel at a multiple of 64 bytes: it is mapped into memory, and on a
CPU the mapped pages are the weights. ``packed.json`` has the rest: config, tokenizer,
and the kind and shape of each packed array.
"""

import contextlib
import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from vaani_jax import leaves
from vaani_jax.errors import VaaniError
from vaani_jax.files import appearing, to_json
from vaani_jax.inference.tensors import read_tensors, write_tensors
from vaani_jax.kernels import layout
from vaani_jax.model.config import Architecture, Quantization
from vaani_jax.model.packing import (
    Embedding,
    pack_kernel,
    pack_variables,
    round_embedding,
)
from vaani_jax.model.transformer import Vaani, init_variables, unrolled
from vaani_jax.paths import local
from vaani_jax.quant.packed import PackedRows, PackedTernary, relayout
from vaani_jax.runs.metadata import Metadata
from vaani_jax.runs.workdir import Workdir
from vaani_jax.text.tokenizers import Tokenizer, from_json
from vaani_jax.words import first_line

if TYPE_CHECKING:
    from vaani_jax.runs.checkpoints import Checkpoints, Restored

Notify = Callable[[str], None]

PACKED_CONFIG = "packed.json"
PACKED_ARRAYS = "model.safetensors"
FORMAT = "vaani-packed-2"
FORMATS = (FORMAT, "vaani-packed-1")  # what is read

ATTEMPTS = 5  # to read from a run that replaces its checkpoints meanwhile


@dataclasses.dataclass(frozen=True)
class Model:
    """A model, ready for inference: what it is, its numbers, and how it spells.

    Attributes:
      module: the graph, layers unrolled.
      variables: its ``params`` (masters, or packed) and ``quant``.
      tokenizer: as trained.
      metadata: what was saved beside the arrays; None for a model made in memory.
    """

    module: Vaani
    variables: Any
    tokenizer: Tokenizer
    metadata: Metadata | None = None

    def __call__(self, tokens: Any) -> jax.Array:
        """Logits [B, T, V], float32, of ids [B, T]."""
        logits: Any = self.module.apply(self.variables, tokens)
        return logits

    @property
    def architecture(self) -> Architecture:
        return self.module.architecture

    @property
    def quantization(self) -> Quantization:
        return self.module.quantization

    @property
    def params(self) -> Any:
        """Masters, or packed arrays."""
        return self.variables["params"]

    @property
    def quant(self) -> Any:
        """What the quantizers keep: thresholds, and ranges where they are tracked."""
        return self.variables["quant"]

    @property
    def step(self) -> int:
        """Of the checkpoint; 0 for a model made in memory."""
        return self.metadata.step if self.metadata else 0

    @property
    def packed(self) -> bool:
        """Whether its kernels are packed."""
        return any(map(is_packed, jax.tree.leaves(self.params, is_leaf=is_packed)))


def load(
    workdir: str | pathlib.Path,
    *,
    checkpoint: str = "best",
    packed: bool = False,
    notify: Notify = print,
) -> Model:
    """Loads the model of a run, or a packed one.

    Args:
      workdir: of the run; or a folder that `save_packed` wrote.
      checkpoint: "best" (lowest validation loss), "last", or a step; a packed model is
        what it is.
      packed: whether to pack the kernels of a run as they are read, so that no more
        than a few masters are in memory at a time. A full-precision twin stays what it
        is.
      notify: receives a line for each damaged checkpoint passed over.

    Raises:
      VaaniError: no run there, or nothing in it that can be read.
    """
    workdir = local(workdir, "the workdir")
    if is_packed_folder(workdir):
        if checkpoint not in ("best", "last"):
            raise VaaniError(f"{workdir} holds a packed model: it has no checkpoints")
        return load_packed(workdir)
    restored = _read(workdir, checkpoint, packed, notify)
    metadata = Metadata.from_json(restored.meta)
    module, variables = unrolled(metadata.module, restored.items["model"])
    if packed and module.quantization.quantize:
        variables = pack_variables(variables, module.spec, layout=layout())
    return Model(module, variables, from_json(metadata.tokenizer), metadata)


def _read(
    workdir: pathlib.Path, checkpoint: str, packed: bool, notify: Notify
) -> "Restored":
    """Reads a checkpoint; looks again where the run removes it meanwhile."""
    # Orbax takes a second to import; packed models start without it.
    from vaani_jax.runs.checkpoints import Checkpoints, GoneError

    folder = Workdir(workdir).checkpoints
    for _ in range(ATTEMPTS):
        try:
            with contextlib.closing(Checkpoints(folder, read_only=True)) as checkpoints:
                return _read_once(checkpoints, workdir, checkpoint, packed, notify)
        except GoneError:
            continue  # a step that was asked for is missing the next time
    raise VaaniError(
        f"{workdir} replaces its checkpoints faster than they can be read: try again"
        " later, or raise --config.save_interval of its run"
    )


def _read_once(
    checkpoints: "Checkpoints",
    workdir: pathlib.Path,
    checkpoint: str,
    packed: bool,
    notify: Notify,
) -> "Restored":
    if checkpoint == "best":
        step = checkpoints.best_step()
    elif checkpoint == "last":
        step = None
    elif checkpoint.isdecimal() and len(checkpoint) < 20:
        step = int(checkpoint)
    else:
        raise VaaniError(
            f"checkpoint {checkpoint!r}: choose best, last or a step number"
        )

    def target(meta: dict[str, Any]) -> dict[str, Any]:
        module = Metadata.from_json(meta).module
        # Onto one device, however many the run had.
        device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        variables = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device),
            jax.eval_shape(lambda: init_variables(module, jax.random.key(0))),
        )
        return {"model": variables}

    read = functools.partial(
        checkpoints.restore,
        target,
        notify=notify,
        make_take=_packing if packed else None,
    )
    if step is not None and checkpoint == "best":
        try:
            restored = read(step=step)
        except VaaniError as error:
            notify(f"{error}; taking the newest one")
            restored = read()
    else:
        restored = read(step=step)
    if restored is None:
        raise VaaniError(f"{workdir} has no checkpoint yet")
    return restored


def _packing(meta: dict[str, Any]) -> Callable[[tuple[str, ...], jax.Array], Any]:
    """What packs kernels as they are read; each comes after its quantizer's numbers."""
    spec = Metadata.from_json(meta).module.spec
    numbers: dict[tuple[str, ...], jax.Array] = {}

    def take(path: tuple[str, ...], array: jax.Array) -> Any:
        part, *names, last = path
        if part == "quant":
            numbers[(*names, last)] = array
            return array
        quantizer = (*names, "weight_quantizer")
        threshold = numbers.get((*quantizer, "threshold"))
        if last != "kernel" or threshold is None:
            return array
        scale = numbers.get((*quantizer, "scale"))
        if array.ndim == 2:
            return pack_kernel(array, threshold, scale, spec, layout())
        layers = [
            pack_kernel(
                array[i],
                threshold[i],
                None if scale is None else scale[i],
                spec,
                layout(),
            )
            for i in range(len(array))
        ]
        return jax.tree.map(lambda *parts: jnp.stack(parts), *layers)

    return take


# -- Packed folders -----------------------------------------------------------------


def is_packed_folder(folder: str | pathlib.Path) -> bool:
    """Whether `save_packed` wrote it; else it is the workdir of a run, or nothing."""
    return (pathlib.Path(folder) / PACKED_CONFIG).exists()


def pack_model(model: Model, embedding: Embedding = "float32") -> Model:
    """The same model with packed weights (see `packing.pack_variables`).

    `load` can pack while it reads, which needs less memory.
    """
    if model.packed:
        raise VaaniError("the model is packed already")
    if not model.quantization.quantize:
        raise VaaniError(
            "a full-precision twin (quantization.quantize=False) can't be packed"
        )
    variables = pack_variables(model.variables, model.module.spec, embedding=embedding)
    return dataclasses.replace(model, variables=variables)


def rounded_embedding(model: Model) -> Model:
    """A packed model with its embedding, and a float32 head, in eight bits."""
    variables = {**model.variables, "params": round_embedding(model.params)}
    return dataclasses.replace(model, variables=variables)


def save_packed(model: Model, folder: str | pathlib.Path) -> None:
    """Writes a packed model, whole or not at all.

    Raises:
      VaaniError: the folder exists already.
      OSError: it can't be written; nothing is left behind.
    """
    arrays: dict[str, np.ndarray] = {}
    kinds: dict[str, Any] = {}
    for part, tree in model.variables.items():
        for name, leaf in leaves.named(tree, is_leaf=is_packed).items():
            name = f"{part}/{name}"
            if isinstance(leaf, PackedTernary):
                leaf = relayout(leaf, "tiles")
                kinds[name] = {"kind": "ternary", "shape": list(leaf.shape)}
            elif isinstance(leaf, PackedRows):
                kinds[name] = {"kind": "rows"}
            if name in kinds:
                arrays[f"{name}.codes"] = np.asarray(leaf.codes)
                arrays[f"{name}.scale"] = np.asarray(leaf.scale)
            else:
                arrays[name] = np.asarray(leaf)
    metadata = model.metadata or Metadata.of(model.module, model.tokenizer.to_json())
    metadata = dataclasses.replace(metadata, stacked=False)
    description = {**metadata.to_json(), "format": FORMAT, "packed": kinds}
    with appearing(local(folder, "the output"), folder=True) as building:
        write_tensors(building / PACKED_ARRAYS, arrays)
        text = to_json(description, indent=1)
        (building / PACKED_CONFIG).write_text(text, encoding="utf-8")


def load_packed(folder: str | pathlib.Path) -> Model:
    """Maps a packed model into memory.

    Raises:
      VaaniError: files are missing, damaged, or do not fit each other.
    """
    folder = local(folder, "the packed folder")
    try:
        description = json.loads((folder / PACKED_CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise VaaniError(f"can't read {folder / PACKED_CONFIG}: {error}") from None
    if not isinstance(description, dict) or description.get("format") not in FORMATS:
        raise VaaniError(f"{folder / PACKED_CONFIG} is not of format {FORMAT}")
    try:
        metadata = Metadata.from_json(description)
        spelling = from_json(metadata.tokenizer)
        kinds = dict(description["packed"])
        kind = kinds.get("params/embedding", {}).get("kind", "float32")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise VaaniError(
            f"{folder / PACKED_CONFIG} is damaged: {first_line(error)}"
        ) from None
    module = metadata.module
    arrays = read_tensors(folder / PACKED_ARRAYS)
    embedding: Embedding = "int8" if kind == "rows" else "float32"
    variables = {
        part: _filled(tree, f"{part}/", arrays, folder)
        for part, tree in packed_shapes(module, embedding).items()
    }
    if arrays:
        raise VaaniError(f"{folder / PACKED_ARRAYS} holds {min(arrays)}, not expected")
    return Model(module, variables, spelling, metadata)


def packed_shapes(module: Vaani, embedding: Embedding) -> Any:
    """Shapes and dtypes of a packed model's variables, in layout "tiles"."""
    return jax.eval_shape(
        lambda: pack_variables(
            init_variables(module, jax.random.key(0)), module.spec, embedding=embedding
        )
    )


def is_packed(leaf: Any) -> bool:
    """Whether a leaf of variables is a packed matrix."""
    return isinstance(leaf, PackedTernary | PackedRows)


def _filled(
    tree: Any, prefix: str, arrays: dict[str, np.ndarray], folder: pathlib.Path
) -> Any:
    """``tree`` of shapes with arrays in their place, taken out of ``arrays``."""
    order = layout()

    def take(name: str, like: Any) -> Any:
        array = arrays.pop(name, None)
        if array is None:
            raise VaaniError(f"{folder / PACKED_ARRAYS} lacks {name}")
        if array.shape != like.shape or array.dtype != like.dtype:
            raise VaaniError(
                f"{name} in {folder / PACKED_ARRAYS} is {array.dtype}"
                f" {list(array.shape)}, not {like.dtype} {list(like.shape)}"
            )
        return jax.device_put(array)

    def fill(path: Any, like: Any) -> Any:
        name = prefix + leaves.name(path)
        if not is_packed(like):
            return take(name, like)
        leaf = dataclasses.replace(
            like,
            codes=take(f"{name}.codes", like.codes),
            scale=take(f"{name}.scale", like.scale),
        )
        return relayout(leaf, order) if isinstance(leaf, PackedTernary) else leaf

    return jax.tree_util.tree_map_with_path(fill, tree, is_leaf=is_packed)

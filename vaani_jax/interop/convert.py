"""Exporting a run, and importing a model as one.

An export is read back before it takes its name: codes and scales must have come out
as they went in, and the logits of a probe are compared with those of the model.
"""

import contextlib
import dataclasses
import functools
import gc
import hashlib
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vaani_jax import leaves
from vaani_jax.devices.memory import return_freed_memory
from vaani_jax.errors import VaaniError
from vaani_jax.files import appearing
from vaani_jax.inference.model import load
from vaani_jax.interop.formats import FORMATS, Options, gguf, hf, opened
from vaani_jax.interop.formats.source import put
from vaani_jax.interop.names import (
    ACTIVATIONS,
    Tensor,
    Weights,
    family_of,
    tensors,
)
from vaani_jax.interop.rotary import TYPES
from vaani_jax.model.config import Architecture
from vaani_jax.model.names import ternary_kernels
from vaani_jax.model.packing import Embedding, unpacked_variables
from vaani_jax.model.rotary import SCALING_FIELDS
from vaani_jax.model.transformer import Vaani
from vaani_jax.paths import local
from vaani_jax.quant.weights import ternarize
from vaani_jax.runs.checkpoints import Checkpoints
from vaani_jax.runs.metadata import Metadata
from vaani_jax.runs.workdir import Workdir
from vaani_jax.settings import named
from vaani_jax.words import first_line

Tree = Any


Notify = Callable[[str], None]


Flat = dict[tuple[str, ...], Any]  # arrays of a tree by their keys


PROBE_TOKENS = 64


CONTEXT = 4096  # the longest that an import takes over unless told to


# Largest median of |logit difference|, in units of the logits' standard deviation,
# from a model whose embedding is rounded as the format rounds it: the arithmetic is the
# same, but for sums that compiled code may take in another order.
BOUND = 1e-4


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Logits of a model and of its export, over a probe.

    Attributes:
      largest, median: of the absolute difference.
      spread: standard deviation of the model's logits.
      tokens: length of the probe.
    """

    largest: float
    median: float
    spread: float
    tokens: int


@functools.partial(jax.jit, static_argnums=0)
def _logits(module: Vaani, variables: Tree, tokens: Any) -> Any:
    return module.apply(variables, tokens)


@functools.partial(jax.jit, static_argnums=2)
def _ternarize(w: Any, threshold: Any, spec: Any, stored: Any) -> Any:
    codes, scale = ternarize(w, threshold, spec, stored)
    return codes.astype(jnp.int8), scale


def _codes(module: Vaani, variables: Tree) -> dict[str, tuple[str, np.ndarray]]:
    """Digest of the codes, and scales, of every ternary kernel."""
    found = {}
    for entry in ternary_kernels(variables):
        codes, scale = _ternarize(
            entry.kernel, entry.threshold, module.spec, entry.scale
        )
        codes, scale = np.asarray(codes), np.asarray(scale)
        digest = hashlib.sha256(codes.data).hexdigest()
        found[entry.name] = (digest, _fine_scales(codes, scale))
    return found


def _fine_scales(codes: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """The scale of every 32 inputs [in / 32, out], whatever inputs share it.

    A format may find that more of them do; 1 where all codes are 0, as any will do.
    """
    inputs, outputs = codes.shape
    parts = inputs // 32 if inputs % 32 == 0 else 1
    coarse = scale if scale.ndim == 2 else np.broadcast_to(scale, (1, outputs))
    used = codes.reshape(parts, -1, outputs).any(axis=1)
    return np.where(used, np.repeat(coarse, parts // len(coarse), axis=0), 1)


def _check_holdable(module: Vaani) -> None:
    """Raises VaaniError, with what works instead, for what no format can hold."""
    activation, q = module.architecture.activation, module.quantization
    if activation not in ACTIVATIONS:
        raise VaaniError(
            f"no other tool is known to have the activation {activation}: export"
            f" knows {', '.join(ACTIVATIONS)}"
        )
    scaling = module.architecture.rope_scaling
    if scaling not in TYPES:
        raise VaaniError(
            f"no other tool is known to have the rotary scaling {scaling}: export knows"
            f" {', '.join(TYPES)}"
        )
    if module.architecture.norm != "rms_norm":
        raise VaaniError(
            f"no format holds the norm {module.architecture.norm}: train with"
            " model.norm=rms_norm to export"
        )
    if q.quantize and q.activation_tracking == "ema":
        raise VaaniError(
            "this model quantizes activations with a tracked range, and other tools per"
            " token: train with quantization.activation_tracking=token to export"
        )


def export_model(
    workdir: str | pathlib.Path,
    output: str | pathlib.Path,
    *,
    target: str,
    gguf_type: str = "q2_0",
    embedding: gguf.Embedding = "float16",
    checkpoint: str = "best",
    shard_bytes: int = hf.SHARD_BYTES,
    notify: Notify = print,
) -> Comparison:
    """Writes the model of a run in a format of other tools, and checks what it wrote.

    Args:
      workdir: of the run.
      output: a folder for "hf" and "hf-packed", a file for "gguf"; appears whole or
        not at all.
      target: the format, a key of `vaani_jax.interop.formats.FORMATS`.
      gguf_type: of the kernels in GGUF, a key of `gguf.KINDS`.
      embedding: type of the embedding in GGUF; folders have float32.
      checkpoint: see `load`.
      shard_bytes: largest file of a folder.
      notify: receives a line for what a person should know.

    Returns:
      How the logits of the export compare.

    Raises:
      VaaniError: no such format, no model there, one that the format can't hold, a
        target that is taken, or an export that does not come back as it was.
    """
    form = named(FORMATS, target, "the format")
    return_freed_memory()
    output = local(output, "the output")
    model = load(workdir, checkpoint=checkpoint, notify=notify)
    if model.packed:
        module, variables = unpacked_variables(model.module, model.variables)
        model = dataclasses.replace(model, module=module, variables=variables)
    tokenizer = model.tokenizer
    name = local(workdir, "the workdir").resolve().name
    options = Options(gguf_type, embedding, shard_bytes, name)
    # As other tools compute it: in float32.
    module = model.module.changed(dtype="float32")
    variables, architecture = model.variables, model.architecture
    ternary, quant = module.quantization.quantize, model.variables["quant"]
    del model
    _check_holdable(module)
    form.check(module, quant, options)
    probe = np.random.Generator(np.random.Philox(0)).integers(
        min(architecture.vocab_size, tokenizer.vocab_size),
        size=(1, min(PROBE_TOKENS, architecture.max_seq_len)),
        dtype=np.int32,
    )
    # Copies: a view would keep what the call holds.
    before = np.array(_logits(module, variables, probe))
    codes = _codes(module, variables)
    kernels = {e.name: (e.threshold, e.scale) for e in ternary_kernels(variables)}
    # Arrays are replaced, and leave, one by one: no second copy of the model builds up.
    left = _flat(variables["params"])
    del variables
    gc.collect()  # reading the checkpoint left cycles that hold the arrays
    expected = before
    if form.rounded is not None:
        # In place; rounding again changes nothing.
        for tensor in tensors(architecture):
            coded = _kernel_name(tensor) in kernels
            left[tensor.path] = form.rounded(tensor, left[tensor.path], options, coded)
        expected = np.array(
            _logits(module, {"params": _nested(left), "quant": quant}, probe)
        )

    def take(tensor: Tensor) -> tuple[np.ndarray, np.ndarray | None]:
        array = left.pop(tensor.path)
        if _kernel_name(tensor) not in kernels or not form.codes:
            return np.asarray(array), None
        threshold, stored = kernels[_kernel_name(tensor)]
        is_embedding = tensor.kind == "embedding"  # a kernel is its transpose
        kernel = array.T if is_embedding else array
        t, scale = _ternarize(kernel, threshold, module.spec, stored)
        return np.asarray(t.T if is_embedding else t), np.asarray(scale)

    with appearing(output, folder=form.folder) as temporary:
        form.write(temporary, module, tokenizer, take, options)
        found, variables = form.read(temporary, module, tokenizer)
        after = np.asarray(_logits(found, variables, probe))
        result = _compare(before, after)
        if ternary:
            _check_codes(codes, _codes(found, variables))
        off = _compare(expected, after)
        if not off.median <= BOUND * off.spread:
            raise VaaniError(
                f"the export does not come back as it was: half of its logits are off"
                f" by {off.median:.3g} or more, beside a standard deviation of"
                f" {off.spread:.3g}; nothing was kept. This is a defect: please report"
                " it"
            )
    if note := form.note(tokenizer):
        notify(f"note: {note}")
    return result


def _kernel_name(tensor: Tensor) -> str:
    """What `ternary_kernels` calls a parameter, if it is one."""
    if tensor.kind not in ("linear", "head", "embedding"):
        return ""
    return "/".join(tensor.module) or "embedding"


def _flat(params: Tree) -> Flat:
    found = jax.tree_util.tree_flatten_with_path(params)[0]
    return {leaves.keys(path): leaf for path, leaf in found}


def _nested(left: Flat) -> Tree:
    result: Tree = {}
    for path, leaf in left.items():
        put(result, path, leaf)
    return result


def _compare(before: np.ndarray, after: np.ndarray) -> Comparison:
    difference = np.abs(after - before)
    return Comparison(
        float(difference.max()),
        float(np.median(difference)),
        float(before.std()),
        before.shape[1],
    )


def _check_codes(before: dict[str, Any], after: dict[str, Any]) -> None:
    wrong = [k for k in before if before[k][0] != after.get(k, ("", 0.0))[0]]
    if wrong or before.keys() != after.keys():
        raise VaaniError(
            f"the export does not come back as it was: other codes in {wrong[:1]};"
            " nothing was kept. This is a defect: please report it"
        )
    for name, (_, scales) in before.items():
        found = after[name][1]
        if (found != scales).any():
            at = np.unravel_index(np.argmax(found != scales), scales.shape)
            raise VaaniError(
                f"the export does not come back as it was: {name} has the scale"
                f" {found[at]!r}, not {scales[at]!r}; nothing was kept. This is a"
                " defect: please report it"
            )


def import_model(
    source: str | pathlib.Path,
    workdir: str | pathlib.Path,
    *,
    max_seq_len: int = 0,
    packed: bool = False,
    masters: bool = False,
    embedding: Embedding = "float32",
    weights: Weights = "auto",
    notify: Notify = print,
) -> Vaani:
    """Makes a packed folder, or a run, out of a Hugging Face folder or a GGUF file.

    Codes and scales become a packed folder, a range of rows at a time, and never a
    model of masters; masters, and weights in full precision, become a run.

    Args:
      source: the folder, or the file.
      workdir: receives the run, whole or not at all; must not be there yet.
      max_seq_len: context of the imported model; 0 takes the source's, up to
        `CONTEXT`.
      packed: whether masters become a packed folder, too.
      masters: whether codes become a run, as masters that quantize to them.
      embedding: how a packed folder stores an embedding that isn't ternary, and such a
        head.
      weights: what to take kernels for where the source doesn't say: "ternary"
        (masters) or "full" (precision); "auto" takes full precision.
      notify: receives lines for people, one of them what the weights are taken for.

    Returns:
      The model.

    Raises:
      VaaniError: anything wrong with the source, or a workdir that is taken.
    """
    if packed and masters:
        raise VaaniError("an import is packed, or has masters: leave one of them out")
    return_freed_memory()
    source = local(source, "the model to import")
    workdir = local(workdir, "the workdir")
    with appearing(workdir, folder=True) as temporary:
        found = opened(source, weights)
        notify(f"weights: {found.reason}")
        architecture = found.module.architecture
        limit = max_seq_len or min(architecture.max_seq_len, CONTEXT)
        if limit > architecture.max_seq_len:
            raise VaaniError(
                f"the model was trained on {architecture.max_seq_len} positions, fewer"
                f" than {limit}"
            )
        if limit < architecture.max_seq_len and not max_seq_len:
            notify(
                f"context: {limit} of the {architecture.max_seq_len} positions it can"
                " take (--max-seq-len N changes that; its cache grows with it)"
            )
        module = found.module.changed(max_seq_len=limit)
        imported = {
            "from": source.resolve().name,
            "model_type": family_of(architecture).model_type,
            "storage": found.storage,
        }
        metadata = Metadata.of(module, found.tokenizer.to_json(), imported)
        if packed or (found.coded and not masters):
            found.write_packed(temporary, module, metadata, embedding)
            return module
        variables = found.variables()
        checkpoints = Checkpoints(Workdir(temporary).checkpoints)
        try:
            checkpoints.save(0, {"model": variables}, metadata.to_json())
            del variables
            checkpoints.wait()
            checkpoints.close()
        except BaseException as error:  # orbax and tensorstore raise many types
            with contextlib.suppress(Exception):
                checkpoints.close()
            if not isinstance(error, Exception):
                raise
            raise VaaniError(
                f"can't write {workdir}: {first_line(error, 200)}; nothing was kept"
            ) from None
    return module


def as_flags(module: Vaani) -> str:
    """What to tell train.py so that ``--config.init_from`` fits a model."""
    keys = "dim n_layers n_heads n_kv_heads ffn_dim max_seq_len activation rope_theta"
    keys += " norm_eps tie_embeddings"
    a, plain = module.architecture, Architecture()
    if module.quantization.quantize or a.qk_norm or a.attention_bias:
        keys += " sub_norms"  # which any other block gets on the way
    others = ["head_dim", "qk_norm", "attention_bias", "rope_scaling"]
    others += [f"rope_{name}" for name in SCALING_FIELDS]
    changed = [key for key in others if getattr(a, key) != getattr(plain, key)]
    told = [*keys.split(), *changed]
    return " ".join(f"--config.model.{key}={getattr(a, key)}" for key in told)

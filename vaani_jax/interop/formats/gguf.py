"""GGUF files for a stock llama.cpp: what may leave as one, and writing it.

Ternary matrices are written as blocks of codes and scales. A scale that is a float16 is
in the blocks, whatever the weights that share it: one for the matrix, for an output, or
for a group of whole blocks. One for a linear layer's matrix that is no float16 is
beside them: the blocks' own are 1, and a float32 tensor ``.scale`` [1] multiplies the
product. So every type holds codes and scales exactly, or the model is refused. Norms
and biases are float32, an embedding and a head that aren't ternary float16 or float32.
Kernels of a full-precision model are written as they are, in float16 or Q8_0.

What llama.cpp computes is near the model, not the model: it rounds activations to 8
bits per block of 256 inputs (TQ types) or 32 (Q2_0, Q8_0), not per token, or not at all
(F16). Where rows are one block of 256, TQ types with a float32 embedding agree but for
sums in another order; a float16 embedding moves some roundings of the first layer, and
all that follows. A model that was trained with activations by groups of 32 agrees in
Q2_0 but for the rounding of their scales to float16.
"""

import pathlib
from collections.abc import Callable
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np

from vaani_jax.errors import VaaniError
from vaani_jax.interop.formats import gguf_rotary
from vaani_jax.interop.formats.gguf_model import GGUFModel, order_in_file
from vaani_jax.interop.formats.gguf_settings import FACTORED, GROUP, TRACKING
from vaani_jax.interop.formats.gguf_types import TYPES, Type
from vaani_jax.interop.names import Tensor, family_of, settings, tensors
from vaani_jax.interop.tokenizers import GGUFVocabulary, left_out_of_gguf, to_gguf
from vaani_jax.model.transformer import Vaani
from vaani_jax.text.tokenizers import (
    CharTokenizer,
    HFTokenizer,
    Tokenizer,
)

Tree = Any


Embedding = Literal["float16", "float32"]


# Types of kernels, and what `general.file_type` calls a file of them (`llama.h`). All
# hold codes; those in `FLOATS` hold full precision too, rounded.
KINDS = {"q2_0": 41, "tq2_0": 37, "tq1_0": 36, "q8_0": 7, "f16": 1}
FLOATS = ("f16", "q8_0")


# Weights of a row that make a block.
BLOCKS = {kind: TYPES[kind.upper()].block for kind in KINDS}


def _gguf() -> Any:
    try:
        import gguf
    except ImportError:
        raise VaaniError(
            "GGUF files need a package that is not installed:"
            " pip install 'vaani-jax[interop]'"
        ) from None
    return gguf


def check(module: Vaani, kind: str) -> None:
    """Raises VaaniError, with what works instead, for what llama.cpp can't hold."""
    architecture = module.architecture
    name = family_of(architecture).model_type
    heads = architecture.n_heads * architecture.head_size
    if architecture.activation != "swiglu":
        raise VaaniError(
            f"llama.cpp's {name} is hard-wired to SwiGLU, and a squared-ReLU model"
            " would come out as garbage: use --format hf or hf-packed"
        )
    if name == "bitnet" and not architecture.tie_embeddings:
        raise VaaniError(
            "llama.cpp's bitnet always takes the embedding for its head, and this"
            " model has a head of its own: use --format hf or hf-packed"
        )
    if name == "bitnet" and heads != architecture.dim:
        raise VaaniError(
            "llama.cpp's bitnet has heads of dim / n_heads, and this model's are"
            f" {architecture.head_size}: use --format hf or hf-packed"
        )
    if architecture.rope_scaling == "llama3" and name not in FACTORED:
        raise VaaniError(
            f"llama.cpp's {name} does not know the rotary scaling llama3: use --format"
            " hf or hf-packed"
        )
    q = module.quantization
    tied = architecture.tie_embeddings and not q.ternary_embedding
    if q.quantize and q.ternary_head and tied:
        raise VaaniError(
            "GGUF files hold a tied head once, and this model's is ternary and its"
            " embedding is not: train with quantization.ternary_embedding=True"
        )
    if not module.quantization.quantize and kind not in FLOATS:
        raise VaaniError(
            f"this model is in full precision, which --type {kind} can't hold: use"
            " --type f16 or q8_0"
        )
    sizes = {
        "model.dim": architecture.dim,
        "model.ffn_dim": architecture.hidden_dim,
        "model.n_heads times the head dimension": heads,
    }
    for key, size in sizes.items():
        if size % BLOCKS[kind]:
            fits = [
                other
                for other, block in BLOCKS.items()
                if not any(s % block for s in sizes.values())
                and (module.quantization.quantize or other in FLOATS)
            ]
            raise VaaniError(
                f"--type {kind} stores rows in blocks of {BLOCKS[kind]}, and {key} ="
                f" {size} is no multiple of that: use --type {' or '.join(fits)}"
            )


# -- Blocks -----------------------------------------------------------------------


def _block_scales(
    scale: np.ndarray, shape: tuple[int, int], kind: Type, label: str
) -> np.ndarray:
    """The scale of each block of a matrix, [rows, blocks], in the dtype it has.

    Args:
      scale: [], [rows] or [groups, rows].
      shape: rows and columns of the matrix.
      kind: its type.
      label: its name, for people.

    Raises VaaniError where weights of a block have different ones.
    """
    rows, columns = shape
    count = columns // kind.block
    if scale.ndim < 2:
        return np.broadcast_to(scale.reshape(-1, 1), (rows, count))
    by_row = scale.T
    groups = by_row.shape[1]
    if count % groups == 0:
        return np.repeat(by_row, count // groups, axis=1)
    parts = by_row.reshape(rows, count, -1) if groups % count == 0 else None
    if parts is None or (parts != parts[..., :1]).any():
        fits = [k for k, block in BLOCKS.items() if columns // groups % block == 0]
        raise VaaniError(
            f"{label} has a scale for every {columns // groups} inputs, and --type"
            f" {kind.name.lower()} holds one for every {kind.block}: use --type"
            f" {' or '.join(fits)}"
        )
    return np.ascontiguousarray(parts[..., 0])


def _coded(
    codes: np.ndarray, scale: np.ndarray, kind: Type, tensor: Tensor
) -> tuple[np.ndarray, np.ndarray | None]:
    """Blocks of a ternary matrix, and the scale beside it, if it needs one.

    Args:
      codes: int8 [rows, columns] in {-1, 0, 1}.
      scale: [], [rows] or [groups, rows].
      kind: with an `encode`.
      tensor: which matrix it is. llama.cpp reads scales beside those of blocks only.

    Returns:
      uint8 [rows, bytes], and float32 [1] or None.

    Raises VaaniError, with what works instead, for scales that it can't hold exactly.
    """
    assert kind.encode is not None
    label = tensor.gguf_name
    scales = _block_scales(np.asarray(scale), codes.shape, kind, label)
    with np.errstate(over="ignore"):
        halves = scales.astype(np.float16)
    beside = None
    if (halves.astype(np.float32) != scales.astype(np.float32)).any():
        if scale.ndim or tensor.kind != "linear":
            raise VaaniError(
                f"{label} has scales that are no float16, and llama.cpp reads others"
                " only where a matrix of a block has one: train with"
                " quantization.scale_dtype=float16 to export"
            )
        halves = np.ones_like(halves)
        beside = np.asarray(scale, np.float32).reshape(1)
    return kind.encode(codes, halves).reshape(len(codes), -1), beside


def _stored(array: np.ndarray, kind: Type) -> np.ndarray:
    """A float matrix [rows, columns] in a type, as bytes; rounded, but for F32."""
    if kind.name == "F32":
        return np.ascontiguousarray(array, np.float32)
    gguf = _gguf()
    found: np.ndarray = gguf.quants.quantize(
        np.ascontiguousarray(array), gguf.GGMLQuantizationType[kind.name]
    )
    return found


# -- Writing ----------------------------------------------------------------------


def write(
    path: pathlib.Path,
    module: Vaani,
    kind: str,
    tokenizer: Tokenizer,
    take: Callable[[Tensor], tuple[np.ndarray, np.ndarray | None]],
    *,
    name: str,
    embedding: Embedding = "float16",
) -> None:
    """Writes a model.

    Args:
      path: of the file.
      module: a model that passes `check`.
      kind: a key of `KINDS`.
      tokenizer: goes along.
      take: gives the array of a tensor as it is here, and a scale for matrices that
        are ternary (the array then holds codes; those of an embedding are as it is,
        and its scale as that of its transpose); called once each, in order.
      name: of the model, for people.
      embedding: type of an embedding and of a head that aren't ternary.

    Raises VaaniError, with what works instead, for scales that the type can't hold.
    """
    architecture = module.architecture
    family = family_of(architecture).model_type
    vocabulary = to_gguf(tokenizer, architecture.vocab_size)
    writer = _gguf().GGUFWriter(path, family)
    try:
        _write_keys(writer, module, kind, family, name)
        _write_vocabulary(writer, vocabulary)
        factors = gguf_rotary.to_factors(architecture)
        if factors is not None:
            add_tensor(writer, gguf_rotary.FACTORS, factors, TYPES["F32"])
        for tensor in tensors(architecture):
            array, scale = take(tensor)
            if tensor.kind in ("linear", "head"):
                array = array.T
            order = order_in_file(tensor, family, architecture.head_size)
            if order is not None:
                there = np.argsort(order)
                array = array[there]
                if scale is not None and scale.ndim:
                    scale = scale[..., there]
            if scale is not None:
                coded = TYPES[kind.upper()]
                blocks, beside = _coded(array, scale, coded, tensor)
                add_tensor(writer, tensor.gguf_name, blocks, coded)
                if beside is not None:
                    add_tensor(writer, f"{tensor.gguf}.scale", beside, TYPES["F32"])
                continue
            kept = TYPES["F32"]
            if tensor.kind == "linear":
                kept = TYPES[kind.upper()]
            elif tensor.kind in ("embedding", "head") and embedding == "float16":
                kept = TYPES["F16"]
            add_tensor(writer, tensor.gguf_name, _stored(array, kept), kept)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def add_tensor(writer: Any, label: str, data: np.ndarray, kind: Type) -> None:
    """Adds a tensor, given as its numbers or as bytes [rows, bytes].

    The package derives the shape of bytes from a table of types, which has no Q2_0. It
    takes shape and number as they are told for what it does not see as bytes.
    """
    shape = data.shape
    if data.dtype == np.uint8:
        shape = (*shape[:-1], shape[-1] // kind.bytes * kind.block)
        data = data.view(np.int8)
    writer.add_tensor(label, data, raw_shape=shape, raw_dtype=kind.id)


def _write_keys(writer: Any, module: Vaani, kind: str, family: str, name: str) -> None:
    architecture = module.architecture
    writer.add_name(name)
    values = settings(architecture)
    writer.add_vocab_size(values["vocab_size"])
    writer.add_embedding_length(values["dim"])
    writer.add_block_count(values["n_layers"])
    writer.add_head_count(values["n_heads"])
    writer.add_head_count_kv(values["n_kv_heads"])
    writer.add_feed_forward_length(values["ffn_dim"])
    writer.add_context_length(values["max_seq_len"])
    writer.add_layer_norm_rms_eps(values["norm_eps"])
    if architecture.n_heads * architecture.head_size != architecture.dim:
        writer.add_key_length(architecture.head_size)
        writer.add_value_length(architecture.head_size)
    for key, value in gguf_rotary.to_keys(architecture).items():
        add = {int: writer.add_uint32, float: writer.add_float32}.get(
            type(value), writer.add_string
        )
        add(f"{family}.{key}", value)
    quantization = module.quantization
    if quantization.quantize:
        writer.add_string(TRACKING, quantization.activation_tracking)
        if quantization.activation_tracking == "group":
            writer.add_uint32(GROUP, quantization.activation_group)
    writer.add_file_type(KINDS[kind])
    writer.add_quantization_version(_gguf().GGML_QUANT_VERSION)


def _write_vocabulary(writer: Any, vocabulary: GGUFVocabulary) -> None:
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    if vocabulary.merges is not None:
        writer.add_token_merges(vocabulary.merges)
    for key, value in vocabulary.special.items():
        writer.add_uint32(f"tokenizer.ggml.{_ggml_key(key)}", value)
    if vocabulary.chat_template:
        writer.add_chat_template(vocabulary.chat_template)
    if vocabulary.named_templates:
        writer.add_array("tokenizer.chat_templates", [*vocabulary.named_templates])
    for name, template in vocabulary.named_templates.items():
        writer.add_string(f"tokenizer.chat_template.{name}", template)
    writer.add_add_bos_token(vocabulary.add_bos)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(False)


def _ggml_key(key: str) -> str:
    return {"unk_token_id": "unknown_token_id", "pad_token_id": "padding_token_id"}.get(
        key, key
    )


def rounded(
    tensor: Tensor, array: Any, kind: str, embedding: Embedding, *, coded: bool
) -> Any:
    """A tensor as it comes out of a file; itself, where that holds it exactly.

    Args:
      tensor: which one.
      array: float32, in its shape; a `jax.Array`, so that nothing is copied to round.
      kind: of the kernels, a key of `KINDS`.
      embedding: type of the embedding and of the head.
      coded: whether it is written as codes.

    Raises VaaniError for values that float16 can't hold.
    """
    wide = tensor.kind in ("embedding", "head") and embedding == "float32"
    if coded or wide or tensor.kind in ("norm", "bias"):
        return array
    if max(float(array.max()), -float(array.min())) > np.finfo(np.float16).max:
        raise VaaniError(
            f"{'/'.join(tensor.path)} holds values that float16 can't: use"
            + (" --format hf" if tensor.kind == "linear" else " --embedding float32")
        )
    if kind != "q8_0" or tensor.kind != "linear":
        # Two calls: XLA would drop a rounding inside of one.
        return jnp.asarray(array, jnp.float16).astype(jnp.float32)
    q8_0 = TYPES["Q8_0"]
    rows = _stored(np.asarray(array).T, q8_0)
    return jnp.asarray(q8_0.floats(q8_0.split(rows)).T)


# -- Reading back -----------------------------------------------------------------


def read(path: pathlib.Path, tokenizer: Tokenizer) -> tuple[Vaani, Tree]:
    """Reads an export again: the model that is there, and its variables.

    Raises VaaniError where the tokenizer does not come back as it was.
    """
    found = GGUFModel(path)
    if isinstance(tokenizer, HFTokenizer):
        # Its file says less than a tokenizer.json, and in other words.
        ids = np.arange(tokenizer.vocab_size)
        same = found.tokenizer.decode(ids) == tokenizer.decode(ids)
    else:
        same = found.tokenizer.to_json() == tokenizer.to_json()
    if not same:
        raise VaaniError("the tokenizer does not come back as it was")
    return found.module, found.variables()


def note(tokenizer: Tokenizer) -> str:
    """What a person should know of a file with that tokenizer; empty for nothing."""
    if left_out := left_out_of_gguf(tokenizer):
        return f"GGUF has no room for {'; '.join(left_out)}"
    if not isinstance(tokenizer, CharTokenizer) or tokenizer.characters.isascii():
        return ""
    return (
        "llama.cpp does not return from characters outside the vocabulary that begin"
        " with the same byte as one inside: keep to the characters of the training text"
    )

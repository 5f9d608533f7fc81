"""GGUF files of architecture ``bitnet``, for a stock llama.cpp.

Kernels are written as codes: blocks of +-1 and 0 whose own scale is 1, which each of
the four types holds exactly, and a float32 ``.scale`` tensor [1] beside each, by which
llama.cpp multiplies the product (`src/models/bitnet.cpp`). Norms are float32, the
embedding, which is the head too, float16 or float32. Kernels of a full-precision model
are written as they are, in float16 or Q8_0.

What llama.cpp computes is near the model, not the model: it rounds activations to 8
bits per block of 256 inputs (TQ types) or 32 (Q8_0), not per token, or not at all
(F16). Where rows are one block of 256, TQ types with a float32 embedding agree but for
sums in another order; a float16 embedding moves some roundings of the first layer, and
all that follows.
"""

import pathlib
from collections.abc import Callable
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np

from vaani_jax.errors import VaaniError
from vaani_jax.interop.formats.hf import masters_of, put
from vaani_jax.interop.names import SETTINGS, Tensor, settings, tensors
from vaani_jax.interop.tokenizers import left_out_of_gguf, to_gguf, unescaped
from vaani_jax.model.config import Architecture, Quantization
from vaani_jax.model.transformer import Vaani
from vaani_jax.text.tokenizers import ByteTokenizer, CharTokenizer, Tokenizer

Tree = Any


Embedding = Literal["float16", "float32"]


ARCHITECTURE = "bitnet"


# Weights of a row that make a block.
BLOCKS = {"tq2_0": 256, "tq1_0": 256, "f16": 1, "q8_0": 32}


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
    if architecture.activation != "swiglu":
        raise VaaniError(
            "llama.cpp's bitnet is hard-wired to SwiGLU, and a squared-ReLU model would"
            " come out as garbage: use --format hf or hf-packed"
        )
    if not architecture.tie_embeddings:
        raise VaaniError(
            "llama.cpp's bitnet always takes the embedding for its head, and this"
            " model has a head of its own: use --format hf or hf-packed"
        )
    if not architecture.sub_norms:
        raise VaaniError(
            "llama.cpp's bitnet has sub-norms, and this model has none: use --format hf"
            " or hf-packed"
        )
    if not module.quantization.quantize and kind.startswith("tq"):
        raise VaaniError(
            f"this model is in full precision, which --type {kind} can't hold: use"
            " --type f16 or q8_0"
        )
    block = BLOCKS[kind]
    for name, size in (("dim", architecture.dim), ("ffn_dim", architecture.hidden_dim)):
        if size % block:
            nearest = "q8_0 or f16" if size % 32 == 0 and block > 32 else "f16"
            raise VaaniError(
                f"--type {kind} stores rows in blocks of {block}, and model.{name} ="
                f" {size} is no multiple of that: use --type {nearest}"
            )


def _codes_q8_0(codes: np.ndarray) -> np.ndarray:
    """Q8_0 blocks of codes [rows, columns]: a float16 scale of 1, then 32 int8."""
    rows, columns = codes.shape
    blocks = np.empty((rows, columns // 32, 34), np.uint8)
    blocks[..., :2] = np.asarray([1.0], np.float16).view(np.uint8)
    blocks[..., 2:] = codes.astype(np.int8).reshape(rows, -1, 32).view(np.uint8)
    return blocks.reshape(rows, -1)


def write(
    path: pathlib.Path,
    architecture: Architecture,
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
      architecture: of a model that passes `check`.
      kind: a key of `BLOCKS`.
      tokenizer: goes along.
      take: gives the array of a tensor as it is here, and a scale for kernels that are
        ternary (the array then holds codes); called once each, in order.
      name: of the model, for people.
      embedding: type of the embedding.
    """
    gguf = _gguf()
    vocabulary = to_gguf(tokenizer, architecture.vocab_size)
    types = gguf.GGMLQuantizationType
    files = gguf.LlamaFileType
    writer = gguf.GGUFWriter(path, ARCHITECTURE)
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
    writer.add_rope_freq_base(values["rope_theta"])
    writer.add_rope_dimension_count(architecture.head_dim)
    writer.add_file_type(
        {
            "tq2_0": files.MOSTLY_TQ2_0,
            "tq1_0": files.MOSTLY_TQ1_0,
            "f16": files.MOSTLY_F16,
            "q8_0": files.MOSTLY_Q8_0,
        }[kind]
    )
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
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
    chosen = types[kind.upper()]
    for tensor in tensors(architecture):
        array, scale = take(tensor)
        label = f"{tensor.gguf}.weight"
        if tensor.kind == "norm":
            writer.add_tensor(label, np.ascontiguousarray(array, np.float32))
            continue
        if tensor.kind == "linear":
            array = np.ascontiguousarray(array.T)
        if scale is None:
            kept = types.F16
            if tensor.kind == "embedding" and embedding == "float32":
                kept = types.F32
            elif tensor.kind == "linear" and kind == "q8_0":
                kept = chosen
            writer.add_tensor(label, gguf.quants.quantize(array, kept), raw_dtype=kept)
            continue
        if kind == "q8_0":
            data = _codes_q8_0(array)
        else:
            data = gguf.quants.quantize(array.astype(np.float32), chosen)
        writer.add_tensor(label, data, raw_dtype=chosen)
        writer.add_tensor(f"{tensor.gguf}.scale", scale.reshape(1))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _ggml_key(key: str) -> str:
    return {"unk_token_id": "unknown_token_id", "pad_token_id": "padding_token_id"}.get(
        key, key
    )


def rounded(
    tensor: Tensor, array: Any, kind: str, embedding: Embedding, *, ternary: bool
) -> Any:
    """A tensor as it comes out of a file; itself, where that holds it exactly.

    Args:
      tensor: which one.
      array: float32, in its shape; a `jax.Array`, so that nothing is copied to round.
      kind: of the kernels, a key of `BLOCKS`.
      embedding: type of the embedding.
      ternary: whether kernels are written as codes.

    Raises VaaniError for values that float16 can't hold.
    """
    exact = {"norm": True, "linear": ternary, "embedding": embedding == "float32"}
    if exact[tensor.kind]:
        return array
    if max(float(array.max()), -float(array.min())) > np.finfo(np.float16).max:
        raise VaaniError(
            f"{'/'.join(tensor.path)} holds values that float16 can't: use"
            + (" --embedding float32" if tensor.kind == "embedding" else " --format hf")
        )
    if kind != "q8_0" or tensor.kind != "linear":
        # Two calls: XLA would drop a rounding inside of one.
        return jnp.asarray(array, jnp.float16).astype(jnp.float32)
    gguf = _gguf()
    type_ = gguf.GGMLQuantizationType.Q8_0
    blocks = gguf.quants.quantize(np.ascontiguousarray(np.asarray(array).T), type_)
    return jnp.asarray(gguf.quants.dequantize(blocks, type_).T)


def read(path: pathlib.Path, like: Vaani) -> tuple[Vaani, Tree]:
    """Reads a file back, as llama.cpp would, for the comparison after an export.

    Args:
      path: of a file that `write` made.
      like: for what GGUF doesn't say (whether the model is ternary).

    Returns:
      The model as the file has it, and variables as `Folder.variables` gives them.
    """
    gguf = _gguf()
    reader = gguf.GGUFReader(path)

    def field(key: str) -> Any:
        found = reader.get_field(key)
        if found is None:
            raise VaaniError(f"{path} lacks the key {key}")
        return found.contents()

    values = {ours: field(f"{ARCHITECTURE}.{key}") for ours, _, key in SETTINGS}
    values["rope_theta"] = float(values["rope_theta"])
    # A float32 in the file; the float64 that was meant is what rounds to it.
    if np.float32(like.architecture.norm_eps) == np.float32(values["norm_eps"]):
        values["norm_eps"] = like.architecture.norm_eps
    architecture, ternary = Architecture(**values), like.quantization.quantize
    quantization = Quantization(
        quantize=ternary, weight_scale="stored" if ternary else "absmean"
    )
    found = {tensor.name: tensor for tensor in reader.tensors}
    params: Tree = {}
    quant: Tree = {}
    for tensor in tensors(architecture):
        stored = found[f"{tensor.gguf}.weight"]
        array = gguf.quants.dequantize(stored.data, stored.tensor_type)
        array = np.asarray(array, np.float32)
        if tensor.kind == "linear":
            array = np.ascontiguousarray(array.T)
        if array.shape != tensor.shape:
            raise VaaniError(f"{stored.name} came out with shape {array.shape}")
        if tensor.kind == "linear" and ternary:
            codes = array.astype(np.int8)
            if (codes != array).any():
                raise VaaniError(f"{stored.name} came out with values besides -1, 0, 1")
            scale = np.array(found[f"{tensor.gguf}.scale"].data, np.float32).reshape(())
            array = masters_of(codes, scale)
            kept = {"threshold": np.asarray(0.5, np.float32), "scale": scale}
            put(quant, (*tensor.module, "weight_quantizer"), kept)
        put(params, tensor.path, jnp.asarray(array))
    variables = {"params": params, "quant": quant}
    return Vaani(architecture, quantization), variables


def tokens_of(path: pathlib.Path) -> list[str]:
    """The texts of a file's vocabulary, as spelled there."""
    return _gguf().GGUFReader(path).get_field("tokenizer.ggml.tokens").contents()


def check_vocabulary(path: pathlib.Path, tokenizer: Tokenizer) -> None:
    """Compares the vocabulary in a file with a character or byte tokenizer."""
    if isinstance(tokenizer, CharTokenizer | ByteTokenizer):
        for i, token in enumerate(tokens_of(path)[: tokenizer.vocab_size]):
            piece = unescaped(token)
            if isinstance(tokenizer, ByteTokenizer):
                same = piece == bytes([i])
            else:
                same = piece.decode("utf-8") == tokenizer.characters[i]
            if not same:
                raise VaaniError(f"token {i} came out as {token!r}")


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

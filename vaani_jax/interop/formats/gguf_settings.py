"""What a GGUF file says of a model, as keys of ours: what it is, and how it rounds.

A file does not say how inputs are rounded; an export of ours has a key for it.
"""

from typing import Any

import numpy as np

from vaani_jax.errors import VaaniError
from vaani_jax.interop.formats import gguf_rotary
from vaani_jax.interop.formats.gguf_file import GGUFFile
from vaani_jax.interop.formats.gguf_keys import Keys
from vaani_jax.model.families import FAMILIES
from vaani_jax.words import shown

ARCHITECTURES = ("bitnet", "llama", "qwen2", "qwen3")
PERMUTED = ("llama",)  # whose q and k rows are in the order of pairs
FACTORED = ("llama",)  # that read what rotary frequencies are divided by

# Names that microsoft/BitNet's fork has for its architectures.
FORKS = ("bitnet-25", "bitnet-b1.58")

# Where an export of ours says how inputs are rounded, and what it may say.
TRACKING, GROUP = "vaani.activation_tracking", "vaani.activation_group"
KNOWN_TRACKING = ("token", "group", "none")
USUAL_GROUP = 32  # of llama.cpp, and the default of ours

# Keys that change what a model computes, where they are not what is said here.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "expert_count": (0,),
    "attention.causal": (True,),
    "attention.clamp_kqv": (0.0,),
    "attention.max_alibi_bias": (0.0,),
    "attention.scale": (0.0,),
    "attention.sliding_window": (0,),
    "attn_logit_softcapping": (0.0,),
    "embedding_scale": (0.0, 1.0),
    "final_logit_softcapping": (0.0,),
    "logit_scale": (0.0, 1.0),
    "residual_scale": (0.0, 1.0),
    "use_parallel_residual": (False,),
}

# llama.cpp's names of activations, of `bitnet` only; others are SwiGLU.
ACTIVATIONS = {"silu": "swiglu", "relu2": "relu2", "relu_sqr": "relu2"}


def architecture_keys(file: GGUFFile) -> dict[str, Any]:
    """The keys of `Architecture` that a file decides, those with defaults left out.

    Raises VaaniError, naming the key, for what this project's model can't express.
    """
    name = file.metadata.get("general.architecture")
    if not isinstance(name, str):
        raise VaaniError(f"{file.path} does not say of which architecture it is")
    if name in FORKS:
        raise VaaniError(
            f"{file.path} is of the architecture {name}, of microsoft/BitNet's fork of"
            " llama.cpp alone: import the model's Hugging Face folder"
        )
    if name not in ARCHITECTURES:
        raise VaaniError(
            f"{file.path} is of the architecture {shown(name)[:60]}:"
            f" {', '.join(ARCHITECTURES)} can be imported"
        )
    keys = Keys(file.metadata, name)
    for key, known in NEUTRAL.items():
        value = file.metadata.get(keys.name(key))
        if value is not None and (
            isinstance(value, np.ndarray | list) or value not in known
        ):
            raise VaaniError(
                f"{file.path} has {keys.name(key)} = {shown(value)[:60]}: models that"
                " need it can't be imported"
            )
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise VaaniError(f"{file.path} has no matrix token_embd.weight")
    dim, heads = keys.whole("embedding_length"), keys.whole("attention.head_count")
    size = keys.whole("attention.key_length", -(-dim // heads))
    if size % 2:
        raise VaaniError(
            f"{keys.name('attention.key_length')} is {size}: rotary embedding needs an"
            " even head dimension"
        )
    if keys.whole("attention.value_length", size) != size:
        raise VaaniError(
            f"{keys.name('attention.value_length')} is not {size}, as the keys have:"
            " heads of both are alike here"
        )
    layers = keys.whole("block_count")
    if layers > len(file.tensors):
        raise VaaniError(
            f"{keys.name('block_count')} is {layers}, more than there are tensors"
        )
    act = keys.text("hidden_act", "silu") if name == "bitnet" else "silu"
    if act not in ACTIVATIONS:
        raise VaaniError(
            f"{keys.name('hidden_act')} is {shown(act)[:60]}: silu and relu2 can be"
            " imported"
        )
    values: dict[str, Any] = {
        "vocab_size": embedding.shape[0],
        "dim": dim,
        "n_layers": layers,
        "n_heads": heads,
        "n_kv_heads": keys.whole("attention.head_count_kv", heads),
        "ffn_dim": keys.whole("feed_forward_length"),
        "max_seq_len": keys.whole("context_length"),
        "activation": ACTIVATIONS[act],
        "norm_eps": keys.number(
            "attention.layer_norm_rms_epsilon", low=1e-30, high=1.0
        ),
        "tie_embeddings": "output.weight" not in file.tensors,
    }
    if keys.whole("vocab_size", embedding.shape[0]) != embedding.shape[0]:
        raise VaaniError(
            f"{keys.name('vocab_size')} is not the {embedding.shape[0]} rows of"
            " token_embd.weight"
        )
    if size * heads != dim:
        values["head_dim"] = size
    values |= gguf_rotary.from_keys(keys, size, _factors(file, size))
    block = FAMILIES[name]
    values["sub_norms"] = block.sub_norms
    if block.qk_norm:
        values["qk_norm"] = True
    if block.attention_bias or (
        name in PERMUTED and "blk.0.attn_q.bias" in file.tensors
    ):
        values["attention_bias"] = True
    return values


def _factors(file: GGUFFile, size: int) -> np.ndarray | None:
    """What a file has frequencies divided by, float32 [H / 2]."""
    entry = file.tensors.get(gguf_rotary.FACTORS)
    if entry is None:
        return None
    if entry.shape != (size // 2,) or entry.type.name != "F32":
        raise VaaniError(
            f"{entry.name} is {entry.type.name} {list(entry.shape)}: it must be F32"
            f" [{size // 2}]"
        )
    found: np.ndarray = file.floats(entry, slice(None))[0]
    return found


def activations(metadata: dict[str, Any]) -> tuple[str, int]:
    """How a file says that inputs of a ternary model are rounded; "" where it doesn't.

    Returns that, and how many inputs share a scale.
    """
    said, group = metadata.get(TRACKING, ""), metadata.get(GROUP, USUAL_GROUP)
    if not isinstance(said, str) or said not in ("", *KNOWN_TRACKING):
        raise VaaniError(
            f"{TRACKING} is {shown(said)[:60]}: {', '.join(KNOWN_TRACKING)} are known"
        )
    if type(group) is not int or group < 1:
        raise VaaniError(f"{GROUP} is {shown(group)[:60]}: it must be a whole number")
    return said, group

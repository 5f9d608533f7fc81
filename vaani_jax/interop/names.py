"""What tensors and settings are called elsewhere: one table for both directions.

A new family is a row of `FAMILIES`; where its settings have names of their
own, so are they in `SETTINGS`. Sources: `modeling_bitnet.py` and `modeling_llama.py` of
transformers 5, `src/models/bitnet.cpp` of llama.cpp.

Kernels are [in, out] here and [out, in] there.
"""

import dataclasses
from typing import Any, Literal

from vaani_jax.errors import VaaniError
from vaani_jax.model.config import Architecture, Quantization
from vaani_jax.model.transformer import Vaani

Kind = Literal["embedding", "norm", "linear", "head"]


# How the kernels of a folder are stored: masters that the reader quantizes; codes whose
# product is multiplied, or divided, by the scale beside them; or plain weights.
Storage = Literal["masters", "multiply", "divide", "full"]


# What a person may say of weights whose config.json doesn't: what it says counts else.
Weights = Literal["auto", "ternary", "full"]


LARGEST = 2**31 - 1  # of any integer setting: what int32 indices can count


@dataclasses.dataclass(frozen=True)
class Row:
    """A parameter: its path here, its names there (less ``.weight``), its axes."""

    path: str
    hf: str
    gguf: str
    kind: Kind
    axes: str


OUTSIDE = (
    Row("embedding", "model.embed_tokens", "token_embd", "embedding", "VD"),
    Row("final_norm/scale", "model.norm", "output_norm", "norm", "D"),
    Row("lm_head/kernel", "lm_head", "output", "head", "DV"),
)


BLOCK = (
    Row("attn_norm/scale", "input_layernorm", "attn_norm", "norm", "D"),
    Row("attn/q_proj/kernel", "self_attn.q_proj", "attn_q", "linear", "DD"),
    Row("attn/k_proj/kernel", "self_attn.k_proj", "attn_k", "linear", "DK"),
    Row("attn/v_proj/kernel", "self_attn.v_proj", "attn_v", "linear", "DK"),
    Row("attn/sub_norm/scale", "self_attn.attn_sub_norm", "attn_sub_norm", "norm", "D"),
    Row("attn/o_proj/kernel", "self_attn.o_proj", "attn_output", "linear", "DD"),
    Row("ffn_norm/scale", "post_attention_layernorm", "ffn_norm", "norm", "D"),
    Row("ffn/gate_proj/kernel", "mlp.gate_proj", "ffn_gate", "linear", "DF"),
    Row("ffn/up_proj/kernel", "mlp.up_proj", "ffn_up", "linear", "DF"),
    Row("ffn/sub_norm/scale", "mlp.ffn_sub_norm", "ffn_sub_norm", "norm", "F"),
    Row("ffn/down_proj/kernel", "mlp.down_proj", "ffn_down", "linear", "FD"),
)


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A parameter of one model.

    Attributes:
      path: keys into the parameters.
      hf, gguf: its names, less ``.weight``.
      kind: "linear" are the ternary kernels.
      shape: as it is here.
    """

    path: tuple[str, ...]
    hf: str
    gguf: str
    kind: Kind
    shape: tuple[int, ...]

    @property
    def module(self) -> tuple[str, ...]:
        """Keys of the module that owns it."""
        return self.path[:-1]


def tensors(architecture: Architecture) -> list[Tensor]:
    """Every parameter of a model with unrolled layers, in a fixed order."""
    sizes = {
        "V": architecture.vocab_size,
        "D": architecture.dim,
        "K": architecture.kv_heads * architecture.head_dim,
        "F": architecture.hidden_dim,
    }

    def named(row: Row, here: str, hf: str, gguf: str) -> Tensor:
        return Tensor(
            tuple((here + row.path).split("/")),
            hf + row.hf,
            gguf + row.gguf,
            row.kind,
            tuple(sizes[axis] for axis in row.axes),
        )

    found = [
        named(row, "", "", "")
        for row in OUTSIDE
        if row.kind != "head" or not architecture.tie_embeddings
    ]
    for i in range(architecture.n_layers):
        found += [
            named(row, f"layers_{i}/", f"model.layers.{i}.", f"blk.{i}.")
            for row in BLOCK
            if architecture.sub_norms or "sub_norm" not in row.path
        ]
    return found


@dataclasses.dataclass(frozen=True)
class Family:
    """A model class of transformers that holds one of ours.

    Attributes:
      model_type, hf_class: its names.
      sub_norms: whether its blocks have them.
      defaults: of settings that its config files may leave out.
    """

    model_type: str
    hf_class: str
    sub_norms: bool
    defaults: dict[str, Any]


FAMILIES = (
    Family(
        "bitnet",
        "BitNetForCausalLM",
        True,
        {"rope_theta": 500_000.0, "rms_norm_eps": 1e-5, "hidden_act": "relu2"},
    ),
    Family(
        "llama",
        "LlamaForCausalLM",
        False,
        {"rope_theta": 10_000.0, "rms_norm_eps": 1e-6, "hidden_act": "silu"},
    ),
)


# Ours, that of config.json, and the method of gguf's writer with the key it writes.
SETTINGS = (
    ("vocab_size", "vocab_size", "vocab_size"),
    ("dim", "hidden_size", "embedding_length"),
    ("n_layers", "num_hidden_layers", "block_count"),
    ("n_heads", "num_attention_heads", "attention.head_count"),
    ("n_kv_heads", "num_key_value_heads", "attention.head_count_kv"),
    ("ffn_dim", "intermediate_size", "feed_forward_length"),
    ("max_seq_len", "max_position_embeddings", "context_length"),
    ("norm_eps", "rms_norm_eps", "attention.layer_norm_rms_epsilon"),
    ("rope_theta", "rope_theta", "rope.freq_base"),
)


# What other tools call our activations; one that isn't here can't be exported.
ACTIVATIONS = {"swiglu": "silu", "relu2": "relu2"}


def settings(architecture: Architecture) -> dict[str, int | float]:
    """The values of `SETTINGS`, with what 0 stands for filled in."""
    values = {ours: getattr(architecture, ours) for ours, _, _ in SETTINGS}
    return {
        **values,
        "n_kv_heads": architecture.kv_heads,
        "ffn_dim": architecture.hidden_dim,
    }


def family_of(architecture: Architecture) -> Family:
    """The row that holds a model of ours."""
    return next(a for a in FAMILIES if a.sub_norms == architecture.sub_norms)


def hf_config(architecture: Architecture, storage: Storage) -> dict[str, Any]:
    """The content of ``config.json``, as transformers 4 and 5 read it."""
    row = family_of(architecture)
    ours = settings(architecture)
    content: dict[str, Any] = {
        "architectures": [row.hf_class],
        "model_type": row.model_type,
        **{theirs: ours[name] for name, theirs, _ in SETTINGS},
        "hidden_act": ACTIVATIONS[architecture.activation],
        "rope_parameters": {
            "rope_theta": architecture.rope_theta,
            "rope_type": "default",
        },
        "head_dim": architecture.head_dim,
        "initializer_range": architecture.init_std,
        "tie_word_embeddings": architecture.tie_embeddings,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
        "dtype": "float32",
        "torch_dtype": "float32",
    }
    if storage != "full":
        content["quantization_config"] = {
            "quant_method": "bitnet",
            "linear_class": "bitlinear" if storage == "divide" else "autobitlinear",
            "quantization_mode": "online" if storage == "masters" else "offline",
            "modules_to_not_convert": ["lm_head"],
        }
    return content


def model_from_hf(
    content: dict[str, Any], weights: Weights = "auto", *, sub_norms: bool = False
) -> tuple[Vaani, Storage, str]:
    """The model that a ``config.json`` describes, and how its kernels are stored.

    Args:
      content: of the file.
      weights: what to take them for where the file doesn't say.
      sub_norms: whether the folder holds sub-norms, whatever family it names.

    Returns:
      The model, the storage, and why it is that, for people.

    Raises VaaniError, naming the key, for what this project's model can't express.
    """
    rows = {row.model_type: row for row in FAMILIES}
    model_type = content.get("model_type")
    if not isinstance(model_type, str) or model_type not in rows:
        raise VaaniError(
            f"config.json has model_type {_brief(model_type)}: {' and '.join(rows)} can"
            " be imported"
        )
    row = rows[model_type]
    if sub_norms and not row.sub_norms:  # a llama of 1bitLLM: bitnet by another name
        row = dataclasses.replace(row, sub_norms=True)
    values: dict[str, Any] = {}
    rope = _rope(content, row)
    for ours, theirs, _ in SETTINGS:
        value = content.get(theirs, row.defaults.get(theirs))
        if ours == "rope_theta":
            values[ours] = rope
        elif ours == "norm_eps":
            values[ours] = _number(theirs, value, 0.0, 1.0)
        elif ours == "n_kv_heads" and value is None:
            values[ours] = 0
        else:
            values[ours] = _integer(theirs, value)
    dim, heads = values["dim"], values["n_heads"]
    width = content.get("head_dim")
    if width is not None and (
        isinstance(width, bool) or not isinstance(width, int) or width * heads != dim
    ):
        raise VaaniError(
            f"config.json has head_dim {_brief(width)}: it must be hidden_size /"
            " num_attention_heads"
        )
    for key in ("attention_bias", "mlp_bias"):
        if content.get(key):
            raise VaaniError(f"config.json has {key}: there are no biases here")
    named = {theirs: ours for ours, theirs in ACTIVATIONS.items()}
    act = content.get("hidden_act", row.defaults["hidden_act"])
    if not isinstance(act, str) or act not in named:
        raise VaaniError(
            f"config.json has hidden_act {_brief(act)}: it must be silu or relu2"
        )
    tied = content.get("tie_word_embeddings", False)
    if not isinstance(tied, bool):
        raise VaaniError("config.json: tie_word_embeddings must be true or false")
    storage, reason = _storage(content, weights)
    std = content.get("initializer_range", 0.02)
    architecture = Architecture(
        **values,
        activation=named[act],
        sub_norms=row.sub_norms,
        tie_embeddings=tied,
        init_std=_number("initializer_range", std, 0.0, 10.0),
    )
    quantization = Quantization(
        quantize=storage != "full",
        weight_scale="stored" if storage in ("multiply", "divide") else "absmean",
    )
    return Vaani(architecture, quantization), storage, reason


# Of a rotary embedding that is not scaled; factors count where they aren't 1.
ROPE_KEYS = {"rope_theta", "rope_type", "type", "partial_rotary_factor"}
ROPE_FACTORS = {"factor", "attention_factor", "attn_factor"}


def _rope(content: dict[str, Any], row: Family) -> float:
    """The base of the rotary embedding; transformers 5 and 4 keep it differently."""
    found = content.get("rope_theta")
    for key in ("rope_parameters", "rope_scaling"):
        rope = content.get(key)
        if rope is None:
            continue
        if not isinstance(rope, dict):
            raise VaaniError(f"config.json: {key} must hold keys")
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind != "default":
            raise VaaniError(
                f"config.json has rotary scaling of type {_brief(kind)}: only the plain"
                " rotary embedding can be imported"
            )
        plain = ROPE_KEYS | {k for k in ROPE_FACTORS if rope.get(k) in (None, 1)}
        if other := sorted(map(str, rope.keys() - plain)):
            raise VaaniError(
                f"config.json has {', '.join(f'{key}.{k}' for k in other)[:100]}: this"
                " scales the rotary embedding, or gives layers their own, and only the"
                " plain one can be imported"
            )
        found = rope.get("rope_theta", found)
        _check_share(rope)
    _check_share(content)
    if found is None:
        found = row.defaults["rope_theta"]
    return _number("rope_theta", found, 1.0, 1e12)


def _check_share(found: dict[str, Any]) -> None:
    for key in ("partial_rotary_factor", "rotary_pct", "rope_pct"):
        if found.get(key) not in (None, 1):
            raise VaaniError(
                f"config.json has {key} {_brief(found[key])}: it rotates a part of each"
                " head only, and all of it is rotated here"
            )


def _storage(content: dict[str, Any], weights: Weights) -> tuple[Storage, str]:
    """How kernels are stored, and why."""
    quantization = content.get("quantization_config")
    bits = content.get("weight_bits")
    if quantization is None and bits is None:
        if weights == "ternary":
            return "masters", "ternary, as you say (--weights)"
        says = "config.json names neither quantization_config nor weight_bits"
        if weights == "full":
            return "full", f"full precision, as you say (--weights), and {says}"
        return "full", (
            f"full precision, as {says}; if they are masters of a ternary model, import"
            " them with --weights ternary"
        )
    found = _by_bits(content) if quantization is None else _by_method(quantization)
    if weights != "auto" and (weights == "full") != (found[0] == "full"):
        raise VaaniError(
            f"--weights {weights}: by its config.json the folder is {found[1]}; leave"
            " the flag out"
        )
    return found


def _by_method(quantization: Any) -> tuple[Storage, str]:
    """Of transformers' ``quantization_config``."""
    if not isinstance(quantization, dict):
        raise VaaniError("config.json: quantization_config must hold keys")
    method = quantization.get("quant_method")
    if method != "bitnet":
        raise VaaniError(
            f"config.json has quant_method {_brief(method)}: only bitnet can be"
            " imported"
        )
    if quantization.get("use_rms_norm"):
        raise VaaniError(
            "config.json has use_rms_norm: norms inside linear layers are not supported"
        )
    kept = quantization.get("modules_to_not_convert")
    for name in kept if isinstance(kept, list) else []:
        if any(part in str(name) for part in ("layers", "self_attn", "mlp", "_proj")):
            raise VaaniError(
                f"config.json keeps {_brief(name)} in full precision: all linear layers"
                " of a block are ternary here, or none"
            )
    linear = quantization.get("linear_class", "bitlinear")
    mode = quantization.get("quantization_mode", "offline")
    if linear not in ("bitlinear", "autobitlinear"):
        raise VaaniError(f"config.json has linear_class {_brief(linear)}")
    if mode not in ("online", "offline"):
        raise VaaniError(f"config.json has quantization_mode {_brief(mode)}")
    reason = f"ternary, as quantization_config says (bitnet, {linear}, {mode})"
    if linear == "bitlinear":
        return "divide", reason
    return "masters" if mode == "online" else "multiply", reason


def _by_bits(content: dict[str, Any]) -> tuple[Storage, str]:
    """Of 1bitLLM's keys: ``weight_bits`` 1 stands for ternary masters."""
    weights, inputs = content.get("weight_bits"), content.get("input_bits", 8)
    if weights == 16 and inputs in (16, 8):
        return "full", "full precision, as weight_bits is 16"
    if weights not in (1, 1.58):
        raise VaaniError(
            f"config.json has weight_bits {_brief(weights)}: 1, which stands for"
            " ternary weights, can be imported"
        )
    if inputs != 8:
        raise VaaniError(
            f"config.json has input_bits {_brief(inputs)}: activations have 8 bits here"
        )
    return "masters", f"ternary masters, as weight_bits is {weights}"


def _integer(key: str, value: Any) -> int:
    fits = isinstance(value, int) and not isinstance(value, bool)
    if not fits or not 1 <= value <= LARGEST:
        raise VaaniError(
            f"config.json has {key} {_brief(value)}: it must be a whole number from 1"
            f" to {LARGEST}"
        )
    return value


def _number(key: str, value: Any, low: float, high: float) -> float:
    fits = isinstance(value, int | float) and not isinstance(value, bool)
    if not fits or not low <= value <= high:  # which NaN is not, either
        raise VaaniError(
            f"config.json has {key} {_brief(value)}: it must be from {low} to {high}"
        )
    return float(value)


def _brief(value: Any) -> str:
    """A value in a message: one line, not too long."""
    text = ascii(value)
    return text if len(text) <= 60 else f"{text[:57]}..."

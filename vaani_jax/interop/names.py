"""What tensors and settings are called elsewhere: one table for both directions.

A new family is a row of `FAMILIES`, and one of `model/families.py`; where its settings
have names of their own, so are they in `SETTINGS`. Sources: `configuration_*.py` and
`modeling_*.py` of transformers 5, `src/llama-arch.cpp` of llama.cpp.

Kernels are [in, out] here and [out, in] there.
"""

import dataclasses
from typing import Any, Literal

from vaani_jax.errors import VaaniError
from vaani_jax.interop import rotary
from vaani_jax.interop.values import brief, integer, number
from vaani_jax.model import families
from vaani_jax.model.config import Architecture, Quantization
from vaani_jax.model.transformer import Vaani

Kind = Literal["embedding", "norm", "linear", "bias", "head"]


# How the kernels of a folder are stored: masters that the reader quantizes; codes whose
# product is multiplied, or divided, by the scale beside them; or plain weights.
Storage = Literal["masters", "multiply", "divide", "full"]


# What a person may say of weights whose config.json doesn't: what it says counts else.
Weights = Literal["auto", "ternary", "full"]


@dataclasses.dataclass(frozen=True)
class Row:
    """A parameter: its path here, its names there (less ``.weight``), its axes.

    ``when`` is the key of `Architecture` that makes it be there, if it depends on one.
    """

    path: str
    hf: str
    gguf: str
    kind: Kind
    axes: str
    when: str = ""


OUTSIDE = (
    Row("embedding", "model.embed_tokens", "token_embd", "embedding", "VD"),
    Row("final_norm/scale", "model.norm", "output_norm", "norm", "D"),
    Row("lm_head/kernel", "lm_head", "output", "head", "DV"),
)


BIAS, QK_NORM, SUB_NORMS = "attention_bias", "qk_norm", "sub_norms"


BLOCK = (
    Row("attn_norm/scale", "input_layernorm", "attn_norm", "norm", "D"),
    Row("attn/q_proj/kernel", "self_attn.q_proj", "attn_q", "linear", "DQ"),
    Row("attn/k_proj/kernel", "self_attn.k_proj", "attn_k", "linear", "DK"),
    Row("attn/v_proj/kernel", "self_attn.v_proj", "attn_v", "linear", "DK"),
    Row("attn/q_proj/bias", "self_attn.q_proj", "attn_q", "bias", "Q", BIAS),
    Row("attn/k_proj/bias", "self_attn.k_proj", "attn_k", "bias", "K", BIAS),
    Row("attn/v_proj/bias", "self_attn.v_proj", "attn_v", "bias", "K", BIAS),
    Row("attn/q_norm/scale", "self_attn.q_norm", "attn_q_norm", "norm", "H", QK_NORM),
    Row("attn/k_norm/scale", "self_attn.k_norm", "attn_k_norm", "norm", "H", QK_NORM),
    Row(
        "attn/sub_norm/scale",
        "self_attn.attn_sub_norm",
        "attn_sub_norm",
        "norm",
        "Q",
        SUB_NORMS,
    ),
    Row("attn/o_proj/kernel", "self_attn.o_proj", "attn_output", "linear", "QD"),
    Row("ffn_norm/scale", "post_attention_layernorm", "ffn_norm", "norm", "D"),
    Row("ffn/gate_proj/kernel", "mlp.gate_proj", "ffn_gate", "linear", "DF"),
    Row("ffn/up_proj/kernel", "mlp.up_proj", "ffn_up", "linear", "DF"),
    Row(
        "ffn/sub_norm/scale",
        "mlp.ffn_sub_norm",
        "ffn_sub_norm",
        "norm",
        "F",
        SUB_NORMS,
    ),
    Row("ffn/down_proj/kernel", "mlp.down_proj", "ffn_down", "linear", "FD"),
)


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A parameter of one model.

    Attributes:
      path: keys into the parameters.
      hf, gguf: names of its module: a kernel and its bias share them.
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

    @property
    def hf_name(self) -> str:
        """Its whole name in transformers."""
        return f"{self.hf}.{self._part}"

    @property
    def gguf_name(self) -> str:
        """Its whole name in llama.cpp."""
        return f"{self.gguf}.{self._part}"

    @property
    def _part(self) -> str:
        return "bias" if self.kind == "bias" else "weight"


def tensors(architecture: Architecture) -> list[Tensor]:
    """Every parameter of a model with unrolled layers, in a fixed order."""
    sizes = {
        "V": architecture.vocab_size,
        "D": architecture.dim,
        "Q": architecture.n_heads * architecture.head_size,
        "K": architecture.kv_heads * architecture.head_size,
        "H": architecture.head_size,
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
            if not row.when or getattr(architecture, row.when)
        ]
    return found


@dataclasses.dataclass(frozen=True)
class Family:
    """A model class of transformers that holds one of ours.

    Attributes:
      model_type, hf_class: its names.
      block: what its blocks have.
      defaults: of settings that its config files may leave out.
      says: of its ``config.json``, what other readers look for.
    """

    model_type: str
    hf_class: str
    block: families.Family
    defaults: dict[str, Any]
    says: dict[str, Any]


FAMILIES = (
    Family(
        "bitnet",
        "BitNetForCausalLM",
        families.FAMILIES["bitnet"],
        {"rope_theta": 500_000.0, "rms_norm_eps": 1e-5, "hidden_act": "relu2"},
        {"attention_bias": False, "mlp_bias": False},
    ),
    Family(
        "llama",
        "LlamaForCausalLM",
        families.FAMILIES["llama"],
        {"rope_theta": 10_000.0, "rms_norm_eps": 1e-6, "hidden_act": "silu"},
        {"attention_bias": False, "mlp_bias": False},
    ),
    Family(
        "qwen2",
        "Qwen2ForCausalLM",
        families.FAMILIES["qwen2"],
        {"rope_theta": 10_000.0, "rms_norm_eps": 1e-6, "hidden_act": "silu"},
        {"use_sliding_window": False},
    ),
    Family(
        "qwen3",
        "Qwen3ForCausalLM",
        families.FAMILIES["qwen3"],
        {
            "rope_theta": 10_000.0,
            "rms_norm_eps": 1e-6,
            "hidden_act": "silu",
            "head_dim": 128,
        },
        {"attention_bias": False, "use_sliding_window": False},
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
    """The row that holds a model of ours, by what its blocks have.

    Raises VaaniError where no other tool has such blocks.
    """
    keys = [field.name for field in dataclasses.fields(families.Family)]
    block = families.Family(**{key: getattr(architecture, key) for key in keys})
    for row in FAMILIES:
        if row.block == block:
            return row
    had = " and ".join(f"model.{key}" for key in keys if getattr(block, key))
    raise VaaniError(
        f"no other tool is known to have blocks with {had}: train with model.family ="
        f" {', '.join(row.model_type for row in FAMILIES)} to export"
    )


def hf_config(architecture: Architecture, storage: Storage) -> dict[str, Any]:
    """The content of ``config.json``, as transformers 4 and 5 read it."""
    row = family_of(architecture)
    ours = settings(architecture)
    content: dict[str, Any] = {
        "architectures": [row.hf_class],
        "model_type": row.model_type,
        **{theirs: ours[name] for name, theirs, _ in SETTINGS},
        "hidden_act": ACTIVATIONS[architecture.activation],
        **rotary.to_config(architecture),
        "head_dim": architecture.head_size,
        "initializer_range": architecture.init_std,
        "tie_word_embeddings": architecture.tie_embeddings,
        **row.says,
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
            f"config.json has model_type {brief(model_type)}: {', '.join(rows)} can be"
            " imported"
        )
    row = rows[model_type]
    if sub_norms and model_type == "llama":  # of 1bitLLM: bitnet by another name
        row = dataclasses.replace(row, block=families.FAMILIES["bitnet"])
    _check_block(content, row)
    values = rotary.from_config(content, row.defaults["rope_theta"])
    for ours, theirs, _ in SETTINGS:
        value = content.get(theirs, row.defaults.get(theirs))
        if ours == "rope_theta":
            continue
        if ours == "norm_eps":
            values[ours] = number(theirs, value, 0.0, 1.0)
        elif ours == "n_kv_heads" and value is None:
            values[ours] = 0
        else:
            values[ours] = integer(theirs, value)
    values["head_dim"] = _head_dim(content, row, values["dim"], values["n_heads"])
    named = {theirs: ours for ours, theirs in ACTIVATIONS.items()}
    act = content.get("hidden_act", row.defaults["hidden_act"])
    if not isinstance(act, str) or act not in named:
        raise VaaniError(
            f"config.json has hidden_act {brief(act)}: it must be silu or relu2"
        )
    tied = content.get("tie_word_embeddings", False)
    if not isinstance(tied, bool):
        raise VaaniError("config.json: tie_word_embeddings must be true or false")
    storage, reason = _storage(content, weights)
    std = content.get("initializer_range", 0.02)
    architecture = Architecture(
        **values,
        activation=named[act],
        **dataclasses.asdict(row.block),
        tie_embeddings=tied,
        init_std=number("initializer_range", std, 0.0, 10.0),
    )
    quantization = Quantization(
        quantize=storage != "full",
        weight_scale="stored" if storage in ("multiply", "divide") else "absmean",
    )
    return Vaani(architecture, quantization), storage, reason


def _check_block(content: dict[str, Any], row: Family) -> None:
    """Refuses what a config asks of blocks and no row has."""
    for key in ("attention_bias", "mlp_bias"):
        # Where transformers reads the first, it gives o_proj a bias, too.
        if content.get(key) and not (key == BIAS and row.block.attention_bias):
            raise VaaniError(
                f"config.json has {key}: the only biases known here are those of"
                " q_proj, k_proj and v_proj, in qwen2"
            )
    kinds = content.get("layer_types")
    if kinds is not None and (
        not isinstance(kinds, list) or any(kind != "full_attention" for kind in kinds)
    ):
        raise VaaniError(
            f"config.json has layer_types {brief(kinds)}: every layer here has"
            " full_attention"
        )
    if kinds is None and content.get("use_sliding_window"):
        # It begins after so many layers, which may be all of them.
        whole = content.get("max_window_layers", 28)
        layers = integer("num_hidden_layers", content.get("num_hidden_layers"))
        if not isinstance(whole, int) or whole < layers:
            raise VaaniError(
                "config.json has use_sliding_window: every layer here sees the whole"
                " context"
            )


def _head_dim(content: dict[str, Any], row: Family, dim: int, heads: int) -> int:
    """Our key; 0 for hidden_size / num_attention_heads."""
    found = content.get("head_dim")
    if found is None:
        found = row.defaults.get("head_dim")
    if found is None:
        return 0
    width = integer("head_dim", found)
    if width * heads == dim:
        return 0
    if row.block.sub_norms:
        raise VaaniError(
            f"config.json has head_dim {width}: with sub-norms it must be hidden_size /"
            " num_attention_heads"
        )
    return width


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
            f"config.json has quant_method {brief(method)}: only bitnet can be imported"
        )
    if quantization.get("use_rms_norm"):
        raise VaaniError(
            "config.json has use_rms_norm: norms inside linear layers are not supported"
        )
    kept = quantization.get("modules_to_not_convert")
    for name in kept if isinstance(kept, list) else []:
        if any(part in str(name) for part in ("layers", "self_attn", "mlp", "_proj")):
            raise VaaniError(
                f"config.json keeps {brief(name)} in full precision: all linear layers"
                " of a block are ternary here, or none"
            )
    linear = quantization.get("linear_class", "bitlinear")
    mode = quantization.get("quantization_mode", "offline")
    if linear not in ("bitlinear", "autobitlinear"):
        raise VaaniError(f"config.json has linear_class {brief(linear)}")
    if mode not in ("online", "offline"):
        raise VaaniError(f"config.json has quantization_mode {brief(mode)}")
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
            f"config.json has weight_bits {brief(weights)}: 1, which stands for"
            " ternary weights, can be imported"
        )
    if inputs != 8:
        raise VaaniError(
            f"config.json has input_bits {brief(inputs)}: activations have 8 bits here"
        )
    return "masters", f"ternary masters, as weight_bits is {weights}"

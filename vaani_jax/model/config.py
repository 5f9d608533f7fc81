"""What a model is, how it rounds, and how it is computed here: a dataclass each.

The first two decide every number that a model gives, and travel with its weights. The
third says how this machine computes them, and may be another one elsewhere.
"""

import dataclasses
from typing import Any, Literal

from vaani_jax.errors import VaaniError
from vaani_jax.model.activations import ACTIVATIONS
from vaani_jax.model.families import FAMILIES
from vaani_jax.model.norm import NORMS
from vaani_jax.model.rotary import SCALING_FIELDS, SCALINGS, Rotary
from vaani_jax.quant.spec import TernarySpec, Wire
from vaani_jax.settings import check, key, named


@dataclasses.dataclass(frozen=True)
class Architecture:
    """What a model is: what decides which parameters there are, and what they mean."""

    vocab_size: int = key(
        0, 'V. 0 in a config file stands for "as the tokenizer has"', at_least=0
    )
    dim: int = key(128, "D, width of the residual stream", at_least=1)
    n_layers: int = key(4, "number of blocks", at_least=1)
    n_heads: int = key(4, "N, query heads", at_least=1)
    n_kv_heads: int = key(
        0, "K, key-value heads, a divisor of N; 0 stands for N", at_least=0
    )
    head_dim: int = key(
        0, "H, dimension of a head, even; 0 stands for D / N", at_least=0
    )
    ffn_dim: int = key(
        0, "F; 0 stands for 8/3 D rounded to a multiple of 64", at_least=0
    )
    max_seq_len: int = key(
        64, "longest sequence, in tokens; the capacity of the KV cache", at_least=1
    )
    dropout: float = key(
        0.0, "rate on embeddings and on both branches of a block", at_least=0, below=1
    )
    activation: str = key("swiglu", '"swiglu" or "relu2" (squared ReLU, gated alike)')
    rope_theta: float = key(500_000.0, "base of the rotary embedding", above=0)
    rope_scaling: str = key(
        "none",
        'how rotary frequencies are changed for a longer context: "none", "linear", '
        '"llama3" or "yarn"',
    )
    rope_factor: float = key(
        1.0, "of a rotary scaling: by how much the context grows", at_least=1
    )
    rope_original_len: int = key(
        0,
        "of llama3 and yarn: the context, in tokens, before it was scaled",
        at_least=0,
    )
    rope_attention_factor: float = key(
        0.0,
        "of yarn: what cosines and sines are multiplied by; 0 stands for "
        "``0.1 ln(rope_factor) + 1``",
        at_least=0,
    )
    rope_low_freq_factor: float = key(
        1.0,
        "of llama3: frequencies that turn less often than this within "
        "``rope_original_len`` are divided by ``rope_factor``",
        above=0,
    )
    rope_high_freq_factor: float = key(
        4.0, "of llama3: those that turn more often stay as they are", above=0
    )
    rope_beta_fast: float = key(
        32.0, "of yarn: frequencies that turn more often stay as they are", above=0
    )
    rope_beta_slow: float = key(
        1.0,
        "of yarn: those that turn less often are divided by ``rope_factor``",
        above=0,
    )
    norm: str = key("rms_norm", '"rms_norm", or "layer_norm" (without a bias)')
    norm_eps: float = key(
        1e-5, "added to the mean square, or the variance, in a norm", above=0
    )
    init_std: float = key(
        0.02,
        "standard deviation of initial weights; ``o_proj`` and ``down_proj`` start "
        "with ``init_std / sqrt(2 n_layers)``",
        at_least=0,
    )
    family: str = key(
        "",
        'whose block it is: "bitnet", "llama", "qwen2" or "qwen3" decide '
        "``sub_norms``, ``qk_norm`` and ``attention_bias``; empty leaves them as they "
        "are set",
    )
    sub_norms: bool = key(
        True,
        "whether o_proj and down_proj have a norm of their own before them, as BitNet "
        "2B4T has; False is the plain Llama block",
    )
    qk_norm: bool = key(
        False, "whether each head of q and of k passes an RMSNorm before it is rotated"
    )
    attention_bias: bool = key(False, "whether q_proj, k_proj and v_proj have biases")
    tie_embeddings: bool = key(True, "whether the head reuses the embedding")

    def __post_init__(self) -> None:
        check(self, "model.")
        named(ACTIVATIONS, self.activation, "model.activation")
        named(NORMS, self.norm, "model.norm")
        if self.family:
            self._join(self.family)
        if self.head_dim % 2:
            raise VaaniError(
                f"model.head_dim is {self.head_dim}: rotary embedding needs an even"
                " head dimension"
            )
        if not self.head_dim and self.dim % (2 * self.n_heads):
            raise VaaniError(
                f"model.dim = {self.dim} is no multiple of 2 x n_heads ="
                f" {2 * self.n_heads}: rotary embedding needs an even head dimension"
                " (model.head_dim gives it another than dim / n_heads)"
            )
        if self.n_heads % self.kv_heads:
            raise VaaniError(
                f"model.n_kv_heads = {self.n_kv_heads} does not divide"
                f" n_heads = {self.n_heads}"
            )
        self._check_rotary()

    def _join(self, family: str) -> None:
        """Sets what the family decides; an explicit value may say the same."""
        row = named(FAMILIES, family, "model.family")
        defaults = self._defaults()
        for name, value in dataclasses.asdict(row).items():
            given = getattr(self, name)
            if given not in (value, defaults[name]):
                raise VaaniError(
                    f"model.{name} is {given}, and in the blocks of model.family ="
                    f" {family} it is {value}: leave one of the two out"
                )
            object.__setattr__(self, name, value)

    @classmethod
    def _defaults(cls) -> dict[str, Any]:
        return {field.name: field.default for field in dataclasses.fields(cls)}

    def _check_rotary(self) -> None:
        read = named(SCALINGS, self.rope_scaling, "model.rope_scaling").fields
        defaults = self._defaults()
        for name in SCALING_FIELDS:
            key = f"rope_{name}"
            value = getattr(self, key)
            if name not in read and value != defaults[key]:
                raise VaaniError(
                    f"model.{key} is {value}, which model.rope_scaling ="
                    f" {self.rope_scaling} does not read: leave it out, or choose a"
                    " scaling that does"
                )
        if "original_len" in read and not self.rope_original_len:
            raise VaaniError(
                f"model.rope_original_len is 0: rope_scaling = {self.rope_scaling}"
                " needs the context that the model had before"
            )
        if self.rope_high_freq_factor <= self.rope_low_freq_factor:
            raise VaaniError(
                f"model.rope_high_freq_factor is {self.rope_high_freq_factor}: it must"
                f" be above rope_low_freq_factor = {self.rope_low_freq_factor}"
            )
        if self.rope_beta_fast < self.rope_beta_slow:
            raise VaaniError(
                f"model.rope_beta_fast is {self.rope_beta_fast}: it must be at least"
                f" rope_beta_slow = {self.rope_beta_slow}"
            )
        if self.rope_scaling == "yarn" and self.rope_theta <= 1:
            raise VaaniError(
                f"model.rope_theta is {self.rope_theta}: yarn needs a base above 1"
            )

    @property
    def kv_heads(self) -> int:
        """K."""
        return self.n_kv_heads or self.n_heads

    @property
    def head_size(self) -> int:
        """H."""
        return self.head_dim or self.dim // self.n_heads

    @property
    def rotary(self) -> Rotary:
        """How positions rotate heads."""
        scaling = {name: getattr(self, f"rope_{name}") for name in SCALING_FIELDS}
        return Rotary(self.head_size, self.rope_theta, self.rope_scaling, **scaling)

    @property
    def branch_init_std(self) -> float:
        """Standard deviation of the initial weights that end a branch."""
        return self.init_std / (2 * self.n_layers) ** 0.5

    @property
    def hidden_dim(self) -> int:
        """F."""
        return self.ffn_dim or max(64, 64 * round(8 * self.dim / 3 / 64))


@dataclasses.dataclass(frozen=True)
class Quantization:
    """How a model rounds: weights, activations, and what is computed between them."""

    quantize: bool = key(
        True, "False gives the full-precision twin: same parameters, plain products"
    )
    ternary_head: bool = key(
        False, "whether the head is ternary too (b1.58 keeps it in full precision)"
    )
    ternary_embedding: bool = key(
        False,
        "whether the embedding is ternary too, and with it a head that is tied to it",
    )
    threshold: float = key(
        0.5, "tau of every BitLinear at the start, in units of mean|W|", at_least=0
    )
    weight_scale: Literal["absmean", "least_squares", "stored"] = key(
        "absmean",
        '"absmean" (b1.58) or "least_squares"; "stored" for models that were imported '
        "as codes and scales, which are not trained as they are",
    )
    weight_granularity: Literal["tensor", "channel", "group"] = key(
        "tensor",
        'one scale per "tensor" (b1.58), per output "channel", or per "group" of inputs'
        " of an output",
    )
    weight_group: int = key(
        128,
        "inputs of such a group, a multiple of 32; the inputs of every ternary layer "
        "must be a multiple of it",
        at_least=32,
        at_most=256,
    )
    scale_dtype: Literal["float32", "float16"] = key(
        "float32",
        '"float16" rounds scales to numbers that it holds, while training too: GGUF '
        "files with groups keep them so, and then hold the model exactly",
    )
    activation_tracking: Literal["token", "ema", "group", "none"] = key(
        "token",
        'how inputs are rounded to 8 bits: a scale per "token" (b1.58); "ema" for a '
        'tracked range; per "group" of inputs, as llama.cpp does; or "none", which '
        "leaves them as they are",
    )
    activation_group: int = key(
        32, "inputs of a group of activations, a multiple of 32", at_least=32
    )
    activation_momentum: float = key(
        0.99, "momentum of the tracked range", at_least=0, below=1
    )
    dtype: Literal["float32", "bfloat16"] = key(
        "float32", 'compute dtype, "float32" or "bfloat16"; parameters stay float32'
    )

    def __post_init__(self) -> None:
        check(self, "quantization.")
        for name in ("weight_group", "activation_group"):
            if getattr(self, name) % 32:
                raise VaaniError(
                    f"quantization.{name} is {getattr(self, name)}: it must be a"
                    " multiple of 32"
                )

    @property
    def activation_pieces(self) -> int:
        """Inputs that share a scale of activations; 0 where a token has one."""
        return self.activation_group if self.activation_tracking == "group" else 0

    def check_fits(self, architecture: Architecture) -> None:
        """Raises VaaniError where inputs of a layer are no multiple of a group."""
        a = architecture
        if not self.quantize:
            return
        sizes = {
            "model.dim": a.dim,
            "model.ffn_dim": a.hidden_dim,
            "model.n_heads times the head dimension": a.n_heads * a.head_size,
        }
        by_groups = self.weight_granularity == "group"
        groups = {
            "activation_group": self.activation_pieces,
            "weight_group": self.weight_group if by_groups else 0,
        }
        for key_, group in groups.items():
            for name, size in sizes.items():
                if group and size % group:
                    raise VaaniError(
                        f"{name} is {size}: it must be a multiple of"
                        f" quantization.{key_} = {group}"
                    )
        small, large = sorted(groups.values())
        if small and large % small:
            raise VaaniError(
                f"quantization.weight_group = {groups['weight_group']} and"
                f" activation_group = {groups['activation_group']} do not fit each"
                " other: one must be a multiple of the other"
            )


@dataclasses.dataclass(frozen=True)
class Execution:
    """How a model is computed here. Nothing in it is of the model's."""

    operands: Literal["auto", "bfloat16", "float32", "int8"] = key(
        "auto", "dtype of the forward integers; equal results (see `TernarySpec`)"
    )
    wire: Wire = key(
        "2bit",
        "what devices send each other of ternary kernels that are cut over them (see "
        "`TernarySpec`)",
    )
    attention: Literal["auto", "library", "explicit"] = key(
        "auto",
        '"library" (`jax.nn.dot_product_attention`), "explicit" (products and a '
        'softmax), or "auto": the native kernel on CPUs, which serving uses too, the '
        "library on accelerators",
    )
    scan_layers: bool = key(
        False, "one traced block under `nn.scan`: compiles faster, same results"
    )
    remat: bool = key(
        False, "recompute blocks in the backward pass instead of storing them"
    )
    remat_save: Literal["nothing", "products"] = key(
        "nothing",
        'what ``remat`` stores besides the input of each block: "nothing", or the '
        '"products" of its linear layers in the compute dtype, which leaves norms, '
        "quantizers and attention to recompute: ``D + N H + 2 K H + 2 F`` numbers "
        "more per token and layer, and no linear product done twice. Equal results. "
        "Goes with ``scan_layers``: without it, XLA on a CPU undoes "
        "rematerialization. For 8 layers of 512 and 2048 tokens in float32, its CPU "
        "code has 1316 MB of temporaries without ``remat`` (1087 with int8 operands), "
        '222 with "nothing" saved and 536 with "products"',
    )


def ternary_spec(quantization: Quantization, execution: Execution) -> TernarySpec:
    """How the ternary products of such a model quantize."""
    tracking = quantization.activation_tracking
    return TernarySpec(
        scale=quantization.weight_scale,
        granularity=quantization.weight_granularity,
        group=quantization.weight_group,
        scale_dtype=quantization.scale_dtype,
        activations="token" if tracking == "ema" else tracking,
        activation_group=quantization.activation_group,
        operands=execution.operands,
        wire=execution.wire,
    )


# Where the keys of version 0.1's one section ``model`` are now.
RENAMED = {
    "model.quantize": "quantization.quantize",
    "model.ternary_head": "quantization.ternary_head",
    "model.threshold": "quantization.threshold",
    "model.weight_scale": "quantization.weight_scale",
    "model.weight_granularity": "quantization.weight_granularity",
    "model.activation_tracking": "quantization.activation_tracking",
    "model.activation_momentum": "quantization.activation_momentum",
    "model.dtype": "quantization.dtype",
    "model.operands": "execution.operands",
    "model.wire": "execution.wire",
    "model.attention": "execution.attention",
    "model.scan_layers": "execution.scan_layers",
    "model.remat": "execution.remat",
    "model.remat_save": "execution.remat_save",
}

"""What a model is, how it rounds, and how it is computed here."""

import dataclasses
from typing import Literal

from vaani_jax.errors import VaaniError
from vaani_jax.model.activations import ACTIVATIONS
from vaani_jax.quant.spec import TernarySpec, Wire
from vaani_jax.settings import named


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The architecture: everything that decides what the parameters are and mean.

    Attributes:
      vocab_size: V. 0 in a config file stands for "as the tokenizer has".
      dim: D, width of the residual stream.
      n_layers: number of blocks.
      n_heads: N, query heads; D must be a multiple of 2 N.
      n_kv_heads: K, key-value heads, a divisor of N; 0 stands for N.
      ffn_dim: F; 0 stands for 8/3 D rounded to a multiple of 64.
      max_seq_len: longest sequence, in tokens; the capacity of the KV cache.
      dropout: rate on embeddings and on both branches of a block.
      activation: "swiglu" or "relu2" (squared ReLU, gated alike).
      rope_theta: base of the rotary embedding.
      norm_eps: added to the mean square in RMSNorm.
      init_std: standard deviation of initial weights; ``o_proj`` and ``down_proj``
        start with ``init_std / sqrt(2 n_layers)``.
      sub_norms: whether o_proj and down_proj have a norm of their own before them, as
        BitNet 2B4T has; False is the plain Llama block.
      tie_embeddings: whether the head reuses the embedding.
      ternary_head: whether the head is ternary too (b1.58 keeps it in full precision).
      quantize: False gives the full-precision twin: same parameters, plain products.
      threshold: tau of every BitLinear at the start, in units of mean|W|.
      weight_scale: "absmean" (b1.58) or "least_squares"; "stored" for models that were
        imported as codes and scales, which are not trained as they are.
      weight_granularity: one scale per "tensor" or per output "channel".
      activation_tracking: "token" (b1.58), or "ema" for a tracked range.
      activation_momentum: momentum of the tracked range.
      operands: dtype of the forward integers; equal results (see `TernarySpec`).
      wire: what devices send each other of ternary kernels that are cut over them
        (see `TernarySpec`).
      attention: "library" (`jax.nn.dot_product_attention`), "explicit", or "auto":
        the former on accelerators, the latter on CPUs.
      dtype: compute dtype, "float32" or "bfloat16"; parameters stay float32.
      scan_layers: one traced block under `nn.scan`: compiles faster, same results.
      remat: recompute blocks in the backward pass instead of storing them.
      remat_save: what ``remat`` stores besides the input of each block: "nothing", or
        the "products" of its linear layers in the compute dtype, which leaves norms,
        quantisers and attention to recompute: ``2 D + 2 D K / N + 2 F`` numbers more
        per token and layer, and no linear product done twice. Equal results. Goes
        with ``scan_layers``: without it, XLA on a CPU undoes rematerialisation. For 8
        layers of 512 and 2048 tokens in float32, its CPU code has 1316 MB of
        temporaries without ``remat`` (1087 with int8 operands), 222 with "nothing"
        saved and 536 with "products".
    """

    vocab_size: int = 0
    dim: int = 128
    n_layers: int = 4
    n_heads: int = 4
    n_kv_heads: int = 0
    ffn_dim: int = 0
    max_seq_len: int = 64
    dropout: float = 0.0
    activation: str = "swiglu"
    rope_theta: float = 500_000.0
    norm_eps: float = 1e-5
    init_std: float = 0.02
    sub_norms: bool = True
    tie_embeddings: bool = True
    ternary_head: bool = False
    quantize: bool = True
    threshold: float = 0.5
    weight_scale: Literal["absmean", "least_squares", "stored"] = "absmean"
    weight_granularity: Literal["tensor", "channel"] = "tensor"
    activation_tracking: Literal["token", "ema"] = "token"
    activation_momentum: float = 0.99
    operands: Literal["auto", "bfloat16", "float32", "int8"] = "auto"
    wire: Wire = "2bit"
    attention: Literal["auto", "library", "explicit"] = "auto"
    dtype: Literal["float32", "bfloat16"] = "float32"
    scan_layers: bool = False
    remat: bool = False
    remat_save: Literal["nothing", "products"] = "nothing"

    def __post_init__(self) -> None:
        named(ACTIVATIONS, self.activation, "model.activation")
        for name in ("dim", "n_layers", "n_heads", "max_seq_len"):
            if getattr(self, name) < 1:
                raise VaaniError(
                    f"model.{name} is {getattr(self, name)}: it must be at least 1"
                )
        for name in ("vocab_size", "n_kv_heads", "ffn_dim"):
            if getattr(self, name) < 0:
                raise VaaniError(
                    f"model.{name} is {getattr(self, name)}: it must be 0 (choose for"
                    " me) or positive"
                )
        if self.dim % (2 * self.n_heads):
            raise VaaniError(
                f"model.dim = {self.dim} is no multiple of 2 x n_heads ="
                f" {2 * self.n_heads}: rotary embedding needs an even head dimension"
            )
        if self.n_heads % self.kv_heads:
            raise VaaniError(
                f"model.n_kv_heads = {self.n_kv_heads} does not divide"
                f" n_heads = {self.n_heads}"
            )
        if not 0 <= self.dropout < 1:
            raise VaaniError(f"model.dropout is {self.dropout}: it must be in [0, 1)")
        if not 0 <= self.activation_momentum < 1:
            raise VaaniError(
                f"model.activation_momentum is {self.activation_momentum}: it must be"
                " in [0, 1)"
            )
        if self.threshold < 0:
            raise VaaniError(f"model.threshold is {self.threshold}: it can't be < 0")
        if self.weight_scale == "stored" and self.weight_granularity != "tensor":
            raise VaaniError("model.weight_scale = stored has one scale per tensor")

    @property
    def kv_heads(self) -> int:
        """K."""
        return self.n_kv_heads or self.n_heads

    @property
    def head_dim(self) -> int:
        """H."""
        return self.dim // self.n_heads

    @property
    def hidden_dim(self) -> int:
        """F."""
        return self.ffn_dim or max(64, 64 * round(8 * self.dim / 3 / 64))

    @property
    def spec(self) -> TernarySpec:
        return TernarySpec(
            self.weight_scale, self.weight_granularity, self.operands, self.wire
        )

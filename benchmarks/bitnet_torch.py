"""BitNet b1.58 in PyTorch, to be compared with: the FAQ's formulas, as published.

The same architecture and quantizers as `vaani_jax`, written the way the training-tips
FAQ of b1.58 writes them (`x + (quant(x) - x).detach()`), with scaled dot-product
attention; for `train_step.py`, which compiles it.
"""

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn


def activation_quant(x: Tensor) -> Tensor:
    scale = 127.0 / x.abs().max(dim=-1, keepdim=True).values.clamp_(min=1e-5)
    return (x * scale).round().clamp_(-128, 127) / scale


def weight_quant(w: Tensor) -> Tensor:
    scale = 1.0 / w.abs().mean().clamp_(min=1e-5)
    return (w * scale).round().clamp_(-1, 1) / scale


class BitLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        x = x + (activation_quant(x) - x).detach()
        w = self.weight + (weight_quant(self.weight) - self.weight).detach()
        return F.linear(x, w)


class Block(nn.Module):
    def __init__(self, dim: int, heads: int, ffn: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.attn_norm = nn.RMSNorm(dim, 1e-5)
        self.attn_sub_norm = nn.RMSNorm(dim, 1e-5)
        self.ffn_norm = nn.RMSNorm(dim, 1e-5)
        self.ffn_sub_norm = nn.RMSNorm(ffn, 1e-5)
        self.q, self.k, self.v, self.o = (
            BitLinear(dim, dim, bias=False) for _ in range(4)
        )
        self.gate = BitLinear(dim, ffn, bias=False)
        self.up = BitLinear(dim, ffn, bias=False)
        self.down = BitLinear(ffn, dim, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, length, dim = x.shape
        y = self.attn_norm(x)
        q, k, v = (
            f(y).view(batch, length, self.heads, -1).transpose(1, 2)
            for f in (self.q, self.k, self.v)
        )
        y = F.scaled_dot_product_attention(
            rotate(q, cos, sin), rotate(k, cos, sin), v, is_causal=True
        )
        y = y.transpose(1, 2).reshape(batch, length, dim)
        x = x + self.dropout(self.o(self.attn_sub_norm(y)))
        y = self.ffn_norm(x)
        y = F.silu(self.gate(y)) * self.up(y)
        return x + self.dropout(self.down(self.ffn_sub_norm(y)))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    low, high = x.chunk(2, dim=-1)
    return torch.cat([low * cos - high * sin, high * cos + low * sin], dim=-1)


class Model(nn.Module):
    """Tied head; ``forward`` gives the mean cross-entropy of tokens [B, T + 1]."""

    def __init__(
        self,
        *,
        vocab: int,
        dim: int,
        layers: int,
        heads: int,
        ffn: int,
        context: int,
        dropout: float,
        theta: float = 500_000.0,
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab, dim)
        self.blocks = nn.ModuleList(
            Block(dim, heads, ffn, dropout) for _ in range(layers)
        )
        self.norm = nn.RMSNorm(dim, 1e-5)
        self.dropout = nn.Dropout(dropout)
        half = dim // heads // 2
        angle = torch.arange(context)[:, None] * theta ** (-torch.arange(half) / half)
        self.register_buffer("cos", angle.cos())
        self.register_buffer("sin", angle.sin())
        for p in self.parameters():
            if p.ndim == 2:
                nn.init.normal_(p, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.dropout(self.embedding(tokens[:, :-1]))
        for block in self.blocks:
            x = block(x, self.cos, self.sin)
        logits = self.norm(x) @ self.embedding.weight.T
        return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())

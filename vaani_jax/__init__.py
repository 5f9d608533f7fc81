"""Vaani: BitNet b1.58 ternary language models in JAX."""

__version__ = "0.1.0"

"""Symmetric rounding to 8 bits."""

EPSILON = 1e-5  # lower bound of every scale, as in the reference implementations

"""Symmetric rounding to 8 bits: half to even, the largest magnitude maps to 127.

Three things are rounded so, and differ in what is written down elsewhere:

* activations, as b1.58 has them: codes from -128, and no range below `EPSILON`;
* rows of an embedding: codes from -127, and no scale for less than `EPSILON`;
* keys and values of a cache: codes from -127, and the scale may be 0, as a vector of
  zeros has to come back.
"""

import jax
import jax.numpy as jnp

Array = jax.Array

EPSILON = 1e-5  # lower bound of every range, as in the reference implementations
LARGEST = 127.0


def to_codes(ratio: Array, lowest: float = -LARGEST) -> Array:
    """Codes, integers in float32, of numbers in units of their scale."""
    return jnp.clip(jnp.round(ratio), lowest, LARGEST)

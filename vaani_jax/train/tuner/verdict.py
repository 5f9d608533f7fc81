"""What the tuner makes of a step before it is applied.

The two rules that judge are `non_finite` and `explosion`; this is the form of what they
say.
"""

import flax.struct
import jax

Array = jax.Array

# Kinds of verdicts.
ACCEPTED, NON_FINITE, GRADIENT, UPDATE, SHRUNK = range(5)


@flax.struct.dataclass
class Verdict:
    """Of a step; scalars.

    Attributes:
      kind: ACCEPTED, NON_FINITE, GRADIENT, UPDATE or SHRUNK, int32.
      scale: to multiply the update with: 0 for a skipped step.
      value, usual: the norm that decided, and its running median.
      layer: the layer whose gradient norm stands out most: an index into the names of
        `memory.layer_labels`.
    """

    kind: Array
    scale: Array
    value: Array
    usual: Array
    layer: Array

    @property
    def accepted(self) -> Array:
        return self.scale > 0

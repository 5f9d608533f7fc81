"""The gated feed-forward layer and its activations."""

import flax.linen as nn
import jax

from vaani_jax.devices.mesh import BATCH, constrain
from vaani_jax.model.activations import ACTIVATIONS
from vaani_jax.model.config import Architecture, Execution, Quantization
from vaani_jax.model.linear import BitLinear, project
from vaani_jax.model.norm import NORMS, Norm

Array = jax.Array


class FeedForward(nn.Module):
    """Gated feed-forward: ``down(norm(activation(gate(x)) * up(x)))``.

    SwiGLU (arXiv:2002.05202) or its squared-ReLU form (BitNet 2B4T, arXiv:2504.12285).

    Parameters: ``gate_proj``, ``up_proj``, ``down_proj`` and ``sub_norm``.
    """

    architecture: Architecture
    quantization: Quantization
    execution: Execution

    def setup(self) -> None:
        a, how = self.architecture, (self.quantization, self.execution)
        self.gate_proj = BitLinear(a.hidden_dim, *how, a.init_std)
        self.up_proj = BitLinear(a.hidden_dim, *how, a.init_std)
        self.sub_norm = NORMS[a.norm](a.norm_eps) if a.sub_norms else None
        self.down_proj = BitLinear(a.dim, *how, a.branch_init_std, "in")

    def __call__(
        self,
        x: Array,
        *,
        norm: Norm | None = None,
        train: bool = False,
        mix: Array | None = None,
    ) -> Array:
        """Maps [..., D] to [..., D]; ``norm`` is applied to ``x`` first."""
        gate, up = project(
            x, (self.gate_proj, self.up_proj), norm=norm, train=train, mix=mix
        )
        gated = ACTIVATIONS[self.architecture.activation]
        hidden = constrain(gated(gate, up), BATCH, None, "tensor")
        (y,) = project(
            hidden, (self.down_proj,), norm=self.sub_norm, train=train, mix=mix
        )
        return y

"""Schedules, masks and the one optimizer.

The optimizer is `optax.inject_hyperparams` over plain numbers: learning rate, weight
decay and clipping norm are entries of its state, written in the jitted step from the
schedule (and whatever adjusts it), so that what was applied can be read back.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from optax import contrib

from vaani_jax import leaves
from vaani_jax.errors import VaaniError
from vaani_jax.settings import check, key, named

Array = jax.Array
Tree = Any


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """The optimizer and its schedule; the peak learning rate is given beside it."""

    name: str = key(
        "adamw",
        '"adamw", or "muon" for the matrices of the blocks with AdamW for the rest',
    )
    adam_lr_ratio: float = key(
        0.15, "for muon, the rest's learning rate over that of the matrices", at_least=0
    )
    weight_decay: float = key(
        0.1,
        "decoupled, times the learning rate, on matrices only (kernels, embedding, "
        "head; not on norms)",
        at_least=0,
    )
    beta1: float = key(0.9, "decay of Adam's first moment", at_least=0, below=1)
    beta2: float = key(0.95, "decay of Adam's second moment", at_least=0, below=1)
    eps: float = key(1e-8, "added to the root of Adam's second moment", above=0)
    momentum: float = key(0.95, "of Muon", at_least=0, below=1)
    moment_dtype: Literal["float32", "bfloat16"] = key(
        "float32",
        "in which the first moment (Muon's momentum) is kept between steps; "
        '"bfloat16" saves two bytes a parameter. Updates are computed in float32, and '
        "Adam's second moment stays there",
    )
    clip_norm: float = key(
        1.0, "largest global gradient norm; 1e9 is as good as none", above=0
    )
    warmup_steps: int = key(100, "linear ramp from 0 to the peak", at_least=0)
    schedule: str = key(
        "linear",
        'after it, "linear" or "cosine" to ``final_ratio`` of the peak, "constant", '
        'or "two_stage" (b1.58): a linear decay to ``final_ratio`` whose peak drops '
        "to ``second_stage_ratio`` at half of the run, where weight decay goes to 0",
    )
    final_ratio: float = key(
        0.0, "learning rate at the end over the peak", at_least=0, at_most=1
    )
    second_stage_ratio: float = key(
        2 / 3, "two_stage: peak of the second half / first", at_least=0, at_most=1
    )
    accumulation_steps: int = key(
        1, "micro-batches per step; the result is the large batch's", at_least=1
    )

    def __post_init__(self) -> None:
        if self.clip_norm in (0, math.inf):
            raise VaaniError(
                f"optim.clip_norm is {self.clip_norm}: it must be finite and above 0."
                " To switch clipping off, set it so high that no gradient gets there:"
                " --config.optim.clip_norm=1e9"
            )
        check(self, "optim.")
        named(OPTIMIZERS, self.name, "optim.name")


def decay_mask(params: Tree) -> Tree:
    """True for matrices: kernels and the embedding, stacked or not; not for norms."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: leaves.keys(path)[-1] in ("kernel", "embedding"), params
    )


def muon_labels(params: Tree) -> Tree:
    """ "muon" for the kernels of the blocks, "adamw" for everything else."""

    def label(path: Any, _: Array) -> str:
        names = leaves.keys(path)
        inside = names[0].startswith("layers") and names[-1] == "kernel"
        return "muon" if inside else "adamw"

    return jax.tree_util.tree_map_with_path(label, params)


def _muon_dimensions(params: Tree) -> Tree:
    # Kernels are [..., in, out]; leading axes of stacked layers are batch axes.
    dimensions = contrib.MuonDimensionNumbers(reduction_axis=-2, output_axis=-1)
    return jax.tree.map(lambda _: dimensions, params)


def _adamw(
    config: OptimConfig, learning_rate: Any, weight_decay: Any
) -> optax.GradientTransformation:
    return optax.adamw(
        learning_rate,
        b1=config.beta1,
        b2=config.beta2,
        eps=config.eps,
        mu_dtype=jnp.dtype(config.moment_dtype),
        weight_decay=weight_decay,
        mask=decay_mask,
    )


def _muon(
    config: OptimConfig, learning_rate: Any, weight_decay: Any
) -> optax.GradientTransformation:
    matrices = optax.chain(
        contrib.scale_by_muon(
            beta=config.momentum,
            mu_dtype=jnp.dtype(config.moment_dtype),
            weight_dimension_numbers=_muon_dimensions,
        ),
        _scale_by_shape(),
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(learning_rate),
    )
    rest = _adamw(config, config.adam_lr_ratio * learning_rate, weight_decay)
    return optax.partition({"muon": matrices, "adamw": rest}, muon_labels)


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """A kind of optimizer.

    Attributes:
      build: of the config, the learning rate and the weight decay, both float32
        scalars that may be traced: the transformation after clipping.
      usual_learning_rate: the peak for where nothing better is known, measured on a
        small character model.
    """

    build: Callable[[OptimConfig, Any, Any], optax.GradientTransformation]
    usual_learning_rate: float


# A further optimizer is a function and a row.
OPTIMIZERS: dict[str, Optimizer] = {
    "adamw": Optimizer(_adamw, 3e-3),
    "muon": Optimizer(_muon, 1e-2),
}


def make_optimizer(config: OptimConfig) -> optax.GradientTransformation:
    """The optimizer that a config names behind clipping, with injected numbers.

    ``state.hyperparams`` holds ``learning_rate``, ``weight_decay`` and ``clip_norm``,
    float32 scalars: write them before each update.

    Raises VaaniError for a name that `OPTIMIZERS` doesn't have.
    """
    kind = named(OPTIMIZERS, config.name, "optim.name")

    def build(
        learning_rate: Any, weight_decay: Any, clip_norm: Any
    ) -> optax.GradientTransformation:
        return optax.chain(
            optax.clip_by_global_norm(clip_norm),
            kind.build(config, learning_rate, weight_decay),
        )

    return optax.inject_hyperparams(build, hyperparam_dtype=jnp.float32)(
        learning_rate=0.0,
        weight_decay=config.weight_decay,
        clip_norm=config.clip_norm,
    )


def _scale_by_shape() -> optax.GradientTransformation:
    """Muon's width scaling, ``sqrt(max(1, out / in))``, for kernels [..., in, out]."""
    return optax.stateless(
        lambda updates, _: jax.tree.map(
            lambda u: u * max(1.0, u.shape[-1] / u.shape[-2]) ** 0.5, updates
        )
    )

"""Everything that a resumed run needs, in one pytree."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from vaani_jax.model.names import ternary_codes
from vaani_jax.model.transformer import Vaani, init_variables
from vaani_jax.train.tuner import HyperparameterTuner
from vaani_jax.train.tuner.flat import FlatTunerState, flattened, nested

Array = jax.Array
Tree = Any


@flax.struct.dataclass
class TrainState:
    """A run, at the boundary between two steps.

    Attributes:
      step: steps done, int32 scalar.
      params: float32 master parameters.
      quant: thresholds and activation ranges, see `vaani_jax.model`.
      opt_state: of `make_optimizer`.
      codes: ternary codes, int8, at the last report: what "flipped since" means.
      key: raw data of the random key (uint32) that dropout keys are folded from.
      tuner: a `TunerState`; None where nothing is tuned.
    """

    step: Array
    params: Tree
    quant: Tree
    opt_state: Tree
    codes: Tree
    key: Array
    tuner: Any = None

    @property
    def variables(self) -> Tree:
        """Of the model, as `Vaani.apply` takes them."""
        return {"params": self.params, "quant": self.quant}


def codes_of(model: Vaani, variables: Tree) -> Tree:
    """The int8 codes of every ternary kernel, by name."""
    return {k: t for k, (t, _) in ternary_codes(model.spec, variables).items()}


def init_state(
    model: Vaani,
    optimizer: optax.GradientTransformation,
    seed: int,
    tuner: HyperparameterTuner | None = None,
) -> TrainState:
    """The state before the first step. Pure: `jax.eval_shape` gives its structure."""
    init_key, dropout_key = jax.random.split(jax.random.key(seed))
    variables = init_variables(model, init_key)
    params = variables["params"]
    codes = codes_of(model, variables)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        **variables,
        opt_state=optimizer.init(params),
        codes=codes,
        key=jax.random.key_data(dropout_key),
        tuner=tuner.init(codes, layer_norms(params)) if tuner else None,
    )


def to_items(state: TrainState, *, flat_tuner: bool = False) -> dict[str, Any]:
    """A state in the two parts that a checkpoint holds: what inference needs, the rest.

    The tuner's part is missing where nothing is tuned. ``flat_tuner`` gives it the form
    that checkpoints of version 0.1 have.
    """
    training = {
        "step": state.step,
        "opt_state": state.opt_state,
        "codes": state.codes,
        "key": state.key,
    }
    if state.tuner is not None:
        training["tuner"] = flattened(state.tuner) if flat_tuner else state.tuner
    return {
        "model": state.variables,
        "training": training,
    }


def from_items(
    items: dict[str, Any], tuner: HyperparameterTuner | None = None
) -> TrainState:
    """The state that `to_items` took apart; ``tuner`` is that of the run."""
    training = dict(items["training"])
    if tuner is not None and isinstance(training["tuner"], FlatTunerState):
        training["tuner"] = nested(training["tuner"], tuner)
    return TrainState(**items["model"], **training)


def layer_norms(grads: Tree) -> dict[str, Array]:
    """Gradient norm of every layer, embedding and head, by its name in the tree.

    Float32 scalars; [layers] for stacked layers. The root of their summed squares is
    the global norm.
    """
    norms = {}
    for name, part in grads.items():
        first = 1 if name == "layers" else 0  # stacked: one norm per layer
        squares = [
            jnp.sum(jnp.square(g.astype(jnp.float32)), axis=tuple(range(first, g.ndim)))
            for g in jax.tree.leaves(part)
        ]
        norms[name] = jnp.sqrt(sum(squares))
    return norms

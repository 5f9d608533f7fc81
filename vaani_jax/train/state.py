"""Everything that a resumed run needs, in one pytree."""

import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding

from vaani_jax import leaves
from vaani_jax.devices.mesh import MeshConfig, param_shardings, replicated
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


def state_shardings(
    state: TrainState,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    config: MeshConfig,
) -> TrainState:
    """A `NamedSharding` for every array of a training state.

    What the optimizer keeps of a parameter lies as the parameter does; optax says which
    leaves that are. One of another shape, such as a factored moment, is whole on every
    device, and so is all that is of no parameter. Ternary codes, here and in the tuner,
    lie as the kernel that has their name; those of a tied head are whole.

    Args:
      state: arrays or shapes.
      optimizer: of `make_optimizer`.
      mesh: the devices.
      config: gives the rules.

    Raises:
      VaaniError: see `param_shardings`.
    """
    whole = replicated(mesh)
    of_params = param_shardings(state.params, mesh, config)

    def of_optimizer(leaf: Any, sharding: NamedSharding, param: Any) -> Any:
        if isinstance(leaf, optax.MaskedNode):
            return leaf
        return sharding if leaf.shape == param.shape else whole

    by_name = leaves.named(of_params)

    def of_codes(codes: Tree) -> Tree:
        return {name: by_name.get(f"{name}/kernel", whole) for name in codes}

    result = jax.tree.map(lambda _: whole, state)
    tuner = result.tuner
    if tuner is not None:
        memory = dataclasses.replace(
            tuner.memory, codes=of_codes(state.tuner.memory.codes)
        )
        tuner = dataclasses.replace(tuner, memory=memory)
    return dataclasses.replace(
        result,
        params=of_params,
        opt_state=optax.tree.map_params(
            optimizer,
            of_optimizer,
            state.opt_state,
            of_params,
            state.params,
            transform_non_params=lambda _: whole,
            is_leaf=lambda leaf: isinstance(leaf, optax.MaskedNode),
        ),
        codes=of_codes(state.codes),
        tuner=tuner,
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

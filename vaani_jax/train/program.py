"""The compiled functions of a run, and how its state lies on the devices.

The trainer calls them, the planner only compiles them.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from vaani_jax.devices.mesh import BATCH, check_batch, replicated
from vaani_jax.evaluate.loss import make_eval_step
from vaani_jax.train.config import Config
from vaani_jax.train.optimizers import OPTIMIZERS, make_optimizer
from vaani_jax.train.schedules import Schedule
from vaani_jax.train.state import TrainState, init_state, state_shardings
from vaani_jax.train.steps import make_adjust_step, make_report_step, make_train_step
from vaani_jax.train.tuner import HyperparameterTuner


@dataclasses.dataclass(frozen=True)
class Program:
    """Jitted functions of one config on one mesh; call them with the mesh set.

    Every function that takes a `TrainState` donates it, leaves it cut as it was, and
    tells its results in every process.

    Attributes:
      tuner: what judges the steps; None where nothing is tuned.
      shapes: the state, as `jax.ShapeDtypeStruct` with shardings.
      shardings: of the state.
      batch: sharding of tokens [B, T + 1].
      everywhere: sharding of what is whole on every device.
      first_state: makes the state before the first step.
      train_step, adjust_step, report_step, eval_step: see `train.steps`; the second is
        None without a tuner.
      see_evaluation: of the tuner; None without one.
    """

    tuner: HyperparameterTuner | None
    shapes: TrainState
    shardings: TrainState
    batch: NamedSharding
    everywhere: NamedSharding
    first_state: Callable[..., Any]
    train_step: Any
    adjust_step: Any
    report_step: Any
    eval_step: Any
    see_evaluation: Any


def make_program(config: Config, mesh: Mesh, num_steps: int) -> Program:
    """Builds the program of a run; nothing is compiled or allocated yet.

    Args:
      config: the run, with its vocabulary.
      mesh: the devices.
      num_steps: length of the run.

    Raises:
      VaaniError: the batch or a parameter can't be cut over the mesh.
    """
    check_batch(mesh, config.batch_size, config.optim.accumulation_steps)
    model, rounding = config.vaani, config.quantization
    optimizer = make_optimizer(config.optim)
    peak = config.learning_rate
    if peak == "auto":
        peak = OPTIMIZERS[config.optim.name].usual_learning_rate
    schedule = Schedule(config.optim, peak, num_steps)
    tuner = None
    if config.use_tuner:
        tuner = HyperparameterTuner(
            config.tuner,
            learning_rate=peak,
            warmup_steps=schedule.warmup_steps,
            clip_norm=config.optim.clip_norm,
            momentum=(
                rounding.activation_momentum
                if rounding.activation_tracking == "ema"
                else None
            ),
            band=config.sparsity_band,
            aggressive=config.aggressive_tuning,
        )
    make_state = functools.partial(init_state, model, optimizer, config.seed, tuner)
    shapes = jax.eval_shape(make_state)
    shardings = state_shardings(shapes, optimizer, mesh, config.mesh)
    shapes = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=sharding
        ),
        shapes,
        shardings,
    )
    everywhere = replicated(mesh)
    jit = functools.partial(
        jax.jit, donate_argnums=0, out_shardings=(shardings, everywhere)
    )
    mix_steps = config.quantize_steps
    adjust_step = see_evaluation = None
    if tuner is not None:
        adjust_step = jit(make_adjust_step(model, tuner, mix_steps=mix_steps))
        see_evaluation = jax.jit(
            tuner.see_evaluation, out_shardings=(shardings.tuner, everywhere)
        )
    train_step = make_train_step(
        model,
        optimizer,
        schedule,
        accumulation_steps=config.optim.accumulation_steps,
        exchange=config.mesh.exchange,
        mix_steps=mix_steps,
        tuner=tuner,
    )
    return Program(
        tuner=tuner,
        shapes=shapes,
        shardings=shardings,
        batch=NamedSharding(mesh, PartitionSpec(BATCH)),
        everywhere=everywhere,
        first_state=jax.jit(make_state, out_shardings=shardings),
        train_step=jit(train_step),
        adjust_step=adjust_step,
        report_step=jit(make_report_step(model)),
        eval_step=jax.jit(make_eval_step(model), out_shardings=everywhere),
        see_evaluation=see_evaluation,
    )

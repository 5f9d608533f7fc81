"""The training state and the jitted steps.

Everything that a resumed run needs is in `TrainState` or in the checkpoint's metadata:
2N steps equal N steps, a kill, a restore and N more, bit for bit.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from vaani_jax.devices.mesh import Exchange
from vaani_jax.model.names import held, ternary_codes, ternary_kernels, with_settings
from vaani_jax.model.transformer import Vaani
from vaani_jax.train.accumulation import accumulated
from vaani_jax.train.losses import cross_entropy
from vaani_jax.train.schedules import Schedule
from vaani_jax.train.state import TrainState, codes_of, layer_norms
from vaani_jax.train.tuner import HyperparameterTuner
from vaani_jax.train.tuner.sparsity import zeros_share

Array = jax.Array
Tree = Any


Metrics = dict[str, Any]


def _global_norm(norms: dict[str, Array]) -> Array:
    return jnp.sqrt(sum(jnp.sum(jnp.square(norm)) for norm in norms.values()))


def make_train_step(
    model: Vaani,
    optimizer: optax.GradientTransformation,
    schedule: Schedule,
    *,
    accumulation_steps: int = 1,
    exchange: Exchange = "step",
    mix_steps: int = 0,
    tuner: HyperparameterTuner | None = None,
) -> Callable[[TrainState, Array], tuple[TrainState, Metrics]]:
    """Builds the training step; jit it with the state donated.

    Args:
      model: what is trained.
      optimizer: of `make_optimizer`.
      schedule: gives learning rate and weight decay.
      accumulation_steps: micro-batches that one batch is cut into.
      exchange: when gradients and codes cross ``fsdp``, see `MeshConfig`.
      mix_steps: steps over which quantization is phased in, ``lambda = step / n``; 0
        quantizes from the start.
      tuner: judges every step, and sets learning rate and clipping; None leaves both to
        the schedule and the config.

    Returns:
      A function of the state and tokens [B, T + 1]; it returns the next state and
      float32 scalars: ``train/loss`` (nats), ``train/gradient_norm`` (unclipped),
      ``train/learning_rate`` and ``train/weight_decay`` as applied; with a tuner, also
      ``tuner/clip_norm`` and its `Verdict`, ``verdict``. A skipped step leaves the
      parameters as they were, and what is not sound leaves everything but the count.
    """

    def gradients(
        state: TrainState, tokens: Array, mix: Array | None
    ) -> tuple[Array, Tree, Tree]:
        codes: Tree = {}

        def loss_of(
            params: Tree, quant: Tree, tokens: Array, key: Array
        ) -> tuple[Array, Tree]:
            logits, changed = model.apply(
                {"params": params, "quant": quant, "held": codes},
                tokens[:, :-1],
                train=True,
                mix=mix,
                rngs={"dropout": key},
                mutable=["quant"],
            )
            return cross_entropy(logits, tokens[:, 1:]), changed.get("quant", quant)

        key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
        compute = jax.value_and_grad(loss_of, has_aux=True)
        several = accumulation_steps > 1
        # Once for all products, where a step has more than one with each kernel.
        if several or model.execution.remat:
            # A mix crosses the wire as floats, in every product.
            whole = several and exchange == "step" and mix is None
            codes = held(model.spec, state.variables, whole=whole)
        if not several:
            (loss, quant), grads = compute(state.params, state.quant, tokens, key)
            return loss, quant, grads
        return accumulated(
            compute,
            state.params,
            state.quant,
            tokens,
            key,
            micro_batches=accumulation_steps,
            exchange=exchange,
        )

    def train_step(state: TrainState, tokens: Array) -> tuple[TrainState, Metrics]:
        mix = None
        if mix_steps and model.quantization.quantize:
            mix = jnp.minimum(state.step.astype(jnp.float32) / mix_steps, 1.0)
        loss, quant, grads = gradients(state, tokens, mix)
        hyperparams = dict(
            state.opt_state.hyperparams,
            weight_decay=schedule.weight_decay(state.step),
        )
        if tuner is None:
            hyperparams["learning_rate"] = schedule.learning_rate(state.step)
        else:
            hyperparams["learning_rate"] = tuner.applied(
                state.tuner, schedule.decay(state.step)
            )
            hyperparams["clip_norm"] = state.tuner.rules["clipping"].norm
        opt_state = state.opt_state._replace(hyperparams=hyperparams)
        norms = layer_norms(grads)
        gradient_norm = _global_norm(norms)

        def update() -> tuple[Tree, Any]:
            return optimizer.update(grads, opt_state, state.params)

        if tuner is None:
            updates, opt_state = update()
        else:
            # A branch, and not a choice between two results: selecting every moment
            # costs a pass over all of them. Where only the update leaps, the moments
            # have seen a good gradient and go on.
            sound = tuner.sound(state.tuner, loss, gradient_norm)
            nothing = lambda: (jax.tree.map(jnp.zeros_like, grads), opt_state)  # noqa: E731
            updates, opt_state = jax.lax.cond(sound, update, nothing)
            quant = jax.tree.map(
                lambda new, old: jnp.where(sound, new, old), quant, state.quant
            )
        metrics: Metrics = {
            "train/loss": loss,
            "train/gradient_norm": gradient_norm,
            "train/learning_rate": opt_state.hyperparams["learning_rate"],
            "train/weight_decay": opt_state.hyperparams["weight_decay"],
        }
        tuned = state.tuner
        if tuner is not None:
            tuned, verdict = tuner.observe(
                state.tuner,
                loss=loss,
                gradient_norm=gradient_norm,
                layer_norms=norms,
                update_norm=optax.tree.norm(updates),
            )
            metrics["tuner/clip_norm"] = opt_state.hyperparams["clip_norm"]
            metrics["verdict"] = verdict
            # Zeros where skipped: NaN times 0 would be NaN.
            updates = jax.tree.map(
                lambda u: jnp.where(verdict.accepted, u * verdict.scale, 0), updates
            )
        state = dataclasses.replace(
            state,
            step=state.step + 1,
            params=optax.apply_updates(state.params, updates),
            quant=quant,
            opt_state=opt_state,
            tuner=tuned,
        )
        return state, metrics

    return train_step


def make_report_step(
    model: Vaani,
) -> Callable[[TrainState], tuple[TrainState, dict[str, Any]]]:
    """Builds the quantizer report; jit it with the state donated.

    Returns:
      A function of the state. It returns the state with ``codes`` renewed, and
      float32 values: ``quant/sparsity`` (share of zeros), ``quant/scale`` and
      ``quant/flipped`` (share of codes that differ from the last report's), each a
      dict by kernel name, with one entry per layer for stacked kernels.
    """

    def report(state: TrainState) -> tuple[TrainState, dict[str, Any]]:
        sparsity, scale, flipped, codes = {}, {}, {}, {}
        entries = ternary_codes(model.spec, state.variables)
        kinds = {"tensor": (), "channel": (-1,), "group": (-2, -1)}
        scale_axes = kinds[model.spec.granularity]
        for name, (t, gamma) in entries.items():
            codes[name] = t
            axes = (-2, -1)
            sparsity[name] = zeros_share(t)
            flipped[name] = jnp.mean(
                t != state.codes[name], axis=axes, dtype=jnp.float32
            )
            scale[name] = gamma.mean(axis=scale_axes)
        stats = {
            "quant/sparsity": sparsity,
            "quant/scale": scale,
            "quant/flipped": flipped,
        }
        return dataclasses.replace(state, codes=codes), stats

    return report


def make_adjust_step(
    model: Vaani, tuner: HyperparameterTuner, *, mix_steps: int = 0
) -> Callable[[TrainState], tuple[TrainState, dict[str, Any]]]:
    """Builds the step in which the tuner sets what it doesn't set every step.

    Jit it with the state donated. ``mix_steps`` as in `make_train_step`.
    """

    def adjust(state: TrainState) -> tuple[TrainState, dict[str, Any]]:
        kernels = ternary_kernels(state.variables)
        tuned, thresholds, adjustment = tuner.adjust(
            state.tuner,
            thresholds={entry.name: entry.threshold for entry in kernels},
            codes=codes_of(model, state.variables),
            settling=state.step < mix_steps,
        )
        quant = with_settings(state.quant, thresholds, tuned.rules["momentum"].value)
        return dataclasses.replace(state, quant=quant, tuner=tuned), adjustment

    return adjust

"""What the tuner has seen: past losses and norms, in rings summed up by medians.

A spike in a ring moves no median by itself. Nothing here decides anything.
"""

import dataclasses
import math

import flax.struct
import jax
import jax.numpy as jnp

Array = jax.Array
ByName = dict[str, Array]

LOSSES, RECENT = 64, 16  # steps that the loss's trend looks back on; the newest of them
NORMS = 128  # steps of gradient and update norms kept
DEVIATION = 1.4826  # standard deviation of a normal over its median deviation
SPIKE_RATIO = 4.0  # norms over their usual ones that count as not calm
RISE_SIGMA = 4.0  # standard errors by which the loss must rise to be a sign


@flax.struct.dataclass
class Memory:
    """Float32 and int32 scalars where not said.

    Attributes:
      losses [64], gradient_norms [128], update_norms [128]: rings, inf where unset.
      layer_norms: running mean of each layer's gradient norm; 0 where unset.
      count: steps accepted since the rings began.
      gradient_median, update_median: of the rings at the last adjustment; inf before.
      loss_median, loss_deviation: likewise.
      codes: int8 codes of every ternary kernel at the last adjustment.
      flip_rate: running mean of the share of codes that flip in a step; 0 where unset.
      calm: steps since the last one that was not calm.
      skipped, shrunk: steps, in all.
      running: steps skipped just now, one after the other.
    """

    losses: Array
    gradient_norms: Array
    update_norms: Array
    layer_norms: ByName
    count: Array
    gradient_median: Array
    update_median: Array
    loss_median: Array
    loss_deviation: Array
    codes: ByName
    flip_rate: Array
    calm: Array
    skipped: Array
    shrunk: Array
    running: Array


def make_memory(codes: ByName, layer_norms: ByName) -> Memory:
    """Nothing seen yet; ``codes`` are kept, of the norms only the shapes count."""
    inf = jnp.asarray(math.inf, jnp.float32)
    none = jnp.asarray(0, jnp.int32)

    def unset(size: int) -> Array:
        return jnp.full(size, math.inf, jnp.float32)

    memory = Memory(
        losses=unset(LOSSES),
        gradient_norms=unset(NORMS),
        update_norms=unset(NORMS),
        layer_norms={
            name: jnp.zeros(value.shape, jnp.float32)
            for name, value in layer_norms.items()
        },
        count=none,
        gradient_median=inf,
        update_median=inf,
        loss_median=inf,
        loss_deviation=inf,
        codes=codes,
        flip_rate=jnp.asarray(0, jnp.float32),
        calm=none,
        skipped=none,
        shrunk=none,
        running=none,
    )
    # Copies: a donated state must not hold one buffer twice.
    return jax.tree.map(jnp.array, memory)


def above_usual(memory: Memory, layer_norms: ByName) -> Array:
    """Each layer's gradient norm over its running mean, in the order of `labels`."""
    norms, usual = _in_order(layer_norms), _in_order(memory.layer_norms)
    above = jnp.where(usual > 0, norms / usual, 1.0)
    return jnp.where(jnp.isfinite(norms), above, jnp.inf)


def stands_out(
    memory: Memory, loss: Array, gradient_norm: Array, above: Array
) -> Array:
    """Whether a step's loss or gradients are unlike those before it."""
    spikes = (gradient_norm > SPIKE_RATIO * memory.gradient_median) | jnp.any(
        above > SPIKE_RATIO
    )
    high = loss > memory.loss_median + RISE_SIGMA * memory.loss_deviation
    return spikes | high


def remembered(
    memory: Memory,
    *,
    loss: Array,
    gradient_norm: Array,
    layer_norms: ByName,
    update_norm: Array,
    accepted: Array,
    shrunk: Array,
    calm: Array,
) -> Memory:
    """The memory with a step more; rings and means take in accepted ones only."""

    def put(ring: Array, value: Array) -> Array:
        at = memory.count % ring.shape[0]
        return ring.at[at].set(jnp.where(accepted, value, ring[at]))

    def mean(old: Array, value: Array) -> Array:
        new = jnp.where(old > 0, 0.95 * old + 0.05 * value, value)
        return jnp.where(accepted, new, old)

    skip = (~accepted).astype(jnp.int32)
    return dataclasses.replace(
        memory,
        losses=put(memory.losses, loss),
        gradient_norms=put(memory.gradient_norms, gradient_norm),
        update_norms=put(memory.update_norms, update_norm),
        layer_norms={
            name: mean(memory.layer_norms[name], layer_norms[name])
            for name in memory.layer_norms
        },
        count=memory.count + 1 - skip,
        calm=calm,
        skipped=memory.skipped + skip,
        shrunk=memory.shrunk + shrunk,
        running=jnp.where(accepted, 0, memory.running + 1),
    )


@flax.struct.dataclass
class Summary:
    """What the memory amounts to at an adjustment; float32 scalars where not said.

    Attributes:
      recent, older: medians of the newest 16 losses, and of those before them.
      median, deviation, error: of all losses; the last is the standard error of the
        difference of the two medians.
      full: whether the ring of losses is; bool.
      gradient_median, update_median: of the rings now.
      recent_gradient: median of the newest 16 gradient norms.
      flipped, flip_rate: share of codes flipped in a step, lately, and its new running
        mean.
      thresholds: of every ternary kernel, [] or [layers].
      codes: of every ternary kernel, int8, as they are now.
      settling: whether the task itself still grows harder; bool.
    """

    recent: Array
    older: Array
    median: Array
    deviation: Array
    error: Array
    full: Array
    gradient_median: Array
    update_median: Array
    recent_gradient: Array
    flipped: Array
    flip_rate: Array
    thresholds: ByName
    codes: ByName
    settling: Array


def summarized(
    memory: Memory, *, thresholds: ByName, codes: ByName, settling: Array, interval: int
) -> Summary:
    """Sums up the memory, ``interval`` steps after the last time."""
    newest = (memory.count - 1 - jnp.arange(LOSSES)) % LOSSES
    ordered = memory.losses[newest]  # newest first
    known = jnp.isfinite(memory.losses)
    middle = finite_percentile(memory.losses)
    deviation = DEVIATION * finite_percentile(
        jnp.where(known, jnp.abs(memory.losses - middle), jnp.inf)
    )
    last_norms = memory.gradient_norms[(memory.count - 1 - jnp.arange(RECENT)) % NORMS]
    flipped, flip_rate = _flips(memory, codes, interval)
    return Summary(
        recent=finite_percentile(ordered[:RECENT]),
        older=finite_percentile(ordered[RECENT:]),
        median=middle,
        deviation=deviation,
        # Of the difference of two medians, normal approximation.
        error=1.2533 * deviation * math.sqrt(1 / RECENT + 1 / (LOSSES - RECENT)),
        full=memory.count >= LOSSES,
        gradient_median=finite_percentile(memory.gradient_norms),
        update_median=finite_percentile(memory.update_norms),
        recent_gradient=finite_percentile(last_norms),
        flipped=flipped,
        flip_rate=flip_rate,
        thresholds=thresholds,
        codes=codes,
        settling=settling,
    )


def refreshed(memory: Memory, seen: Summary) -> Memory:
    """The memory with the medians of a summary, until the next one."""
    return dataclasses.replace(
        memory,
        gradient_median=seen.gradient_median,
        update_median=seen.update_median,
        loss_median=jnp.where(seen.full, seen.median, jnp.inf),
        loss_deviation=jnp.where(seen.full, seen.deviation, jnp.inf),
        codes=seen.codes,
        flip_rate=seen.flip_rate,
    )


def _flips(memory: Memory, codes: ByName, interval: int) -> tuple[Array, Array]:
    """Share of codes flipped in a step, lately, and its new running mean."""
    if not codes:
        nothing = jnp.asarray(0, jnp.float32)
        return nothing, nothing
    changed = [jnp.mean(codes[k] != memory.codes[k], dtype=jnp.float32) for k in codes]
    flipped = jnp.mean(jnp.stack(changed)) / interval
    mean = jnp.where(
        memory.flip_rate > 0, 0.9 * memory.flip_rate + 0.1 * flipped, flipped
    )
    return flipped, mean


def finite_percentile(ring: Array, percent: float = 50.0) -> Array:
    """Lower percentile of the finite entries; inf where there is none."""
    ordered = jnp.sort(ring)  # inf, that is unset, comes last
    known = jnp.sum(jnp.isfinite(ring))
    index = jnp.floor((known - 1) * (percent / 100)).astype(jnp.int32)
    return jnp.where(known > 0, ordered[jnp.maximum(index, 0)], jnp.inf)


def layer_labels(layer_norms: ByName) -> list[str]:
    """Names of layers, in the order of `above_usual`; stacked ones get an index."""
    labels = []
    for name in sorted(layer_norms):
        value = layer_norms[name]
        if value.ndim:
            labels += [f"{name}[{i}]" for i in range(value.shape[0])]
        else:
            labels.append(name)
    return labels


def _in_order(layer_norms: ByName) -> Array:
    return jnp.concatenate([jnp.ravel(layer_norms[k]) for k in sorted(layer_norms)])

"""Where arrays lie: a mesh of devices, and rules that cut parameters over it.

The mesh has three axes. Each is a way to use more devices:

* ``data``: every device holds the whole model and sees other rows of the batch;
* ``fsdp``: other rows of the batch too, but parameters and the optimizer's state are
  cut, and gathered layer by layer where they are multiplied;
* ``tensor``: heads, feed-forward and vocabulary are cut, and stay so in the products.

XLA's partitioner does the rest: programs are written as for one device, arrays say how
they are cut (`jax.sharding.NamedSharding`), and `constrain` pins the few places where
its choice would not be the one that is wanted. Outside of a mesh it does nothing.

A rule is ``pattern: axes``: a regular expression, searched for in the path of a
parameter, and the axes that cut each of its dimensions, ``-`` for none, ``+`` between
several. The first rule that matches wins. Stacked layers keep their leading axis whole.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from vaani_jax import leaves
from vaani_jax.devices.apart import mapped_axes
from vaani_jax.errors import VaaniError
from vaani_jax.settings import check, key

Array = jax.Array
Tree = Any


AXES = ("data", "fsdp", "tensor")


BATCH = ("data", "fsdp")  # the axes that cut a batch


# Products of column kernels leave heads and feed-forward cut over ``tensor``; those of
# row kernels sum over that axis. ``fsdp`` cuts the other dimension of each.
RULES = (
    r"(q|k|v|gate|up)_proj/kernel$: fsdp, tensor",
    r"(o|down)_proj/kernel$: tensor, fsdp",
    r"(q|k|v)_proj/bias$: tensor",  # as the products that they join
    r"^lm_head/kernel$: fsdp, -",  # a vocabulary has any size
    r"^embedding$: -, fsdp",
    r"norm/scale$: -",
)


Exchange = Literal["step", "micro_batch"]


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """How the devices of a run are arranged."""

    data: int = key(-1, "copies of the model; -1: as many as there are devices for")
    fsdp: int = key(1, "parts that parameters and the optimizer's state are cut into")
    tensor: int = key(1, "parts that heads, feed-forward and vocabulary are cut into")
    rules: tuple[str, ...] = key((), "tried before `RULES`")
    exchange: Exchange = key(
        "step",
        "how often gradients and ternary codes cross ``fsdp`` where a step has several "
        'micro-batches: once a "step", for which every device holds two gradients and '
        "the codes of the whole model, 8.25 bytes a parameter (over ``tensor``); or in "
        'every "micro_batch". Gradients cross ``data`` once a step with either. Equal '
        "results, up to the order of sums",
    )

    def __post_init__(self) -> None:
        check(self, "mesh.")
        sizes = [getattr(self, axis) for axis in AXES]
        if any(size < 1 and size != -1 for size in sizes) or sizes.count(-1) > 1:
            raise VaaniError(
                f"mesh.data, mesh.fsdp and mesh.tensor are {sizes}: each must be at"
                " least 1, or -1, for one of them, to take the rest"
            )
        parse_rules(self.rules)


def parse_rules(rules: Sequence[str]) -> list[tuple[re.Pattern[str], PartitionSpec]]:
    """Patterns and specs; raises VaaniError for a rule that can't be read."""
    parsed = []
    for rule in rules:
        pattern, colon, axes = rule.rpartition(":")
        if not colon:
            raise VaaniError(
                f"mesh rule {rule!r} has no colon: write 'pattern: axes', such as"
                " 'q_proj/kernel$: fsdp, tensor'"
            )
        entries: list[Any] = []
        for entry in axes.split(","):
            names = tuple(name.strip() for name in entry.split("+"))
            if names == ("-",):
                entries.append(None)
                continue
            if unknown := [name for name in names if name not in AXES]:
                raise VaaniError(
                    f"mesh rule {rule!r}: {unknown[0]!r} is no axis; write"
                    " 'pattern: axes', with data, fsdp, tensor or - for each dimension"
                )
            entries.append(names[0] if len(names) == 1 else names)
        try:
            compiled = re.compile(pattern.strip())
        except (re.error, OverflowError, RecursionError) as error:
            raise VaaniError(f"mesh rule {rule!r}: {error}") from None
        parsed.append((compiled, PartitionSpec(*entries)))
    return parsed


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh of a run, over all devices of all processes where None are given.

    In one process, sizes may leave devices over.

    Raises:
      VaaniError: more devices are asked for than there are, or they don't divide.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = [getattr(config, axis) for axis in AXES]
    given = math.prod(size for size in sizes if size != -1)
    asked = " x ".join(f"{axis}={getattr(config, axis)}" for axis in AXES)
    if -1 in sizes:
        if len(devices) % given:
            raise VaaniError(
                f"the mesh {asked} does not fit {len(devices)} devices: {given} does"
                f" not divide {len(devices)}"
            )
        sizes[sizes.index(-1)] = len(devices) // given
    elif given > len(devices):
        raise VaaniError(
            f"the mesh {asked} needs {given} devices, there are {len(devices)}: set one"
            " axis to -1 to take what is there"
        )
    elif given < len(devices) and jax.process_count() > 1:
        raise VaaniError(
            f"the mesh {asked} leaves {len(devices) - given} of {len(devices)} devices"
            " without work: with several processes, all must have some"
        )
    used = devices[: math.prod(sizes)]
    return jax.make_mesh(
        sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=used
    )


def batch_parts(mesh: Mesh) -> int:
    """Into how many parts a batch is cut."""
    return _parts(mesh, BATCH)


def check_batch(mesh: Mesh, batch_size: int, accumulation_steps: int = 1) -> None:
    """Raises VaaniError unless every device gets the same number of rows."""
    shards = batch_parts(mesh)
    rows = batch_size // accumulation_steps
    if rows % shards:
        part = "" if accumulation_steps == 1 else " / optim.accumulation_steps"
        fits = math.gcd(rows, shards)
        raise VaaniError(
            f"batch_size{part} = {rows} can't be cut into mesh data x fsdp = {shards}"
            f" equal parts: take a multiple of {shards} for it, or use fewer devices,"
            f" as with --config.mesh.data={fits} --config.mesh.fsdp=1"
        )


def param_specs(params: Tree, config: MeshConfig) -> dict[str, PartitionSpec]:
    """The spec of every parameter, by its path.

    Args:
      params: arrays or shapes; names as in `vaani_jax.model`.
      config: gives the rules.

    Raises:
      VaaniError: no rule covers a parameter, or one has more axes than it.
    """
    rules = parse_rules((*config.rules, *RULES))
    specs = {}
    for name, leaf in leaves.named(params).items():
        spec = next((s for pattern, s in rules if pattern.search(name)), None)
        if spec is None:
            raise VaaniError(
                f"no mesh rule covers the parameter {name} {list(leaf.shape)}: add one"
                f" to mesh.rules, such as '{re.escape(name)}$: -'"
            )
        stacked = name.startswith("layers/")
        if len(spec) > leaf.ndim - stacked:
            raise VaaniError(
                f"the mesh rule for {name} cuts {len(spec)} dimensions, it has"
                f" {leaf.ndim - stacked}"
            )
        specs[name] = PartitionSpec(None, *spec) if stacked else spec
    return specs


def param_shardings(params: Tree, mesh: Mesh, config: MeshConfig) -> Tree:
    """A `NamedSharding` for every parameter, as the rules cut it.

    Args:
      params: arrays or shapes.
      mesh: the devices.
      config: gives the rules.

    Raises:
      VaaniError: see `param_specs`; or a dimension can't be cut as its rule says.
    """
    specs = param_specs(params, config)

    def sharding(path: Any, leaf: Any) -> NamedSharding:
        name = leaves.name(path)
        _check_cut(name, leaf.shape, specs[name], mesh)
        return NamedSharding(mesh, specs[name])

    return jax.tree_util.tree_map_with_path(sharding, params)


def _check_cut(
    name: str, shape: Sequence[int], spec: PartitionSpec, mesh: Mesh
) -> None:
    for size, entry in zip(shape, spec, strict=False):
        parts = _parts(mesh, entry)
        if size % parts:
            raise VaaniError(
                f"{name} {list(shape)} can't be cut into {parts} equal parts along"
                f" {_written(entry)}: choose other sizes for the mesh, or a rule of"
                " your own in mesh.rules"
            )


def _written(entry: Any) -> str:
    return entry if isinstance(entry, str) else "+".join(entry)


def _parts(mesh: Any, entry: Any) -> int:
    """Into how many parts an entry of a spec cuts its dimension."""
    names = (entry,) if isinstance(entry, str) else entry or ()
    return math.prod(mesh.shape[name] for name in names)


def shards(entry: Any) -> int:
    """Into how many parts the axes ``entry`` cut, in the mesh that is set; else 1."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else _parts(mesh, entry)


def constrain(x: Array, *axes: Any) -> Array:
    """``x``, cut as said; an axis that does not divide its dimension is left out.

    Args:
      x: an array that depends on the rows of a batch, traced under `jax.set_mesh`.
        Where these are kept apart (`devices/apart.py`), so is it.
      axes: one entry per dimension: a name, several, or None.
    """
    return _constrain(x, [_rest(entry, mapped_axes()) for entry in axes])


def constrain_weights(w: Array, *axes: Any) -> Array:
    """As `constrain`, of an array that depends on no row; its gradient does."""
    return _constrain_weights(axes, w) if mapped_axes() else _constrain(w, axes)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _constrain_weights(axes: tuple[Any, ...], w: Array) -> Array:
    return _constrain(w, axes)


_constrain_weights.defvjp(
    lambda axes, w: (_constrain(w, axes), None),
    lambda axes, _, g: (constrain(g, *axes),),
)


def _rest(entry: Any, without: Sequence[str]) -> Any:
    """An entry of a spec without some axes."""
    names = (entry,) if isinstance(entry, str) else entry or ()
    return tuple(name for name in names if name not in without) or None


def _constrain(x: Array, axes: Sequence[Any]) -> Array:
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    fitting = (
        entry if size % _parts(mesh, entry) == 0 else None
        for size, entry in zip(x.shape, axes, strict=True)
    )
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*fitting))


def replicated(mesh: Mesh) -> NamedSharding:
    """Whole on every device."""
    return NamedSharding(mesh, PartitionSpec())


def place(value: np.ndarray | np.generic, sharding: NamedSharding) -> Array:
    """A host array, equal in all processes, on the devices of a mesh."""
    if sharding.is_fully_addressable:
        return jax.device_put(value, sharding)
    whole = np.asarray(value)
    return place_parts(whole.shape, sharding, lambda index: whole[index])


def place_parts(
    shape: Sequence[int], sharding: NamedSharding, part: Callable[[Any], np.ndarray]
) -> Array:
    """An array of which each process makes the parts that its devices hold.

    Args:
      shape: of the whole.
      sharding: how it is cut.
      part: from a tuple of slices to that part of it.
    """
    with jax.transfer_guard_host_to_device("allow"):  # said, though not by device_put
        return jax.make_array_from_callback(tuple(shape), sharding, part)

"""What a run will take: memory, communication, time.

The step that `train.py` would run is compiled for as many virtual CPU devices as the
run would have, from shapes alone: nothing is allocated, no accelerator is touched. So
are an evaluation's batch and a sample, for their memory.

* **Memory** of a device is what the compiler says: arguments (parameters, optimizer,
  the rest of the state, tokens), results that don't take the place of an argument, and
  temporaries. Compilers for other chips order the work otherwise and use other
  temporaries. On a CPU, libraries that multiply matrices copy operands behind the
  compiler's back: `Memory.scratch` estimates it.
* **Communication** is read from the compiled program (`hlo.py`). CPU code sends
  bfloat16 as float32, and sums gradients everywhere before each device takes its part:
  of either, a GPU or a TPU sends half.
* **Time** is arithmetic, not a measurement: executed FLOPs at an assumed utilization of
  the chip's bfloat16 peak, beside communication at the speed of its links, and after
  both the state read and written once from its memory.

Checkpoints are not planned: on a CPU, what is written is copied first.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from vaani_jax.devices.chips import Chip
from vaani_jax.devices.mesh import make_mesh
from vaani_jax.errors import VaaniError
from vaani_jax.inference.room import cache_bytes
from vaani_jax.kernels.floats import compiled_floats
from vaani_jax.model.cache import DTYPES
from vaani_jax.model.size import flops_per_token, model_size
from vaani_jax.plan.boundaries import (
    bytes_of,
    bytes_within,
    evaluation_bytes,
    sampling_bytes,
)
from vaani_jax.plan.hlo import Collective, collectives
from vaani_jax.train.config import Config
from vaani_jax.train.program import Program, make_program
from vaani_jax.words import size

Tree = Any


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on one device while a step runs.

    Attributes:
      params: float32 masters.
      optimizer: its state.
      other: ternary codes of the last report, thresholds, the tuner's state.
      tokens: the batch.
      temporaries: gradients, activations, and all else that lives within a step;
        results that don't take the place of an argument.
      scratch: on CPUs only, what libraries take besides: two float32 arrays as large as
        the scores of attention. An estimate: what the compiler leaves out was 1.6 to
        2.1 of them, for ``large`` in 2 and in 12 layers and batches of 4 and 8.
      second_state: the copy of the state that the tuner's range test holds while it
        runs; 0 where there is none.
      evaluation: beside the state, while the run evaluates: a batch of windows, and all
        that lives within it.
      sampling: beside the state, while the run samples: caches and all that lives
        within a call, and the layers one by one where they are stacked; 0 where the
        context is too short to sample.
    """

    params: int
    optimizer: int
    other: int
    tokens: int
    temporaries: int
    scratch: int
    second_state: int
    evaluation: int
    sampling: int

    @property
    def state(self) -> int:
        """Of what is there all the time."""
        return self.params + self.optimizer + self.other

    @property
    def step(self) -> int:
        """Of any step but those of the range test."""
        return self.state + self.tokens + self.temporaries

    @property
    def peak(self) -> int:
        """The most: of a step, with the second state if there is one, or else."""
        return max(
            self.step + self.second_state,
            self.state + self.evaluation,
            self.state + self.sampling,
        )

    @property
    def cpu_step(self) -> int:
        """Of a step on a CPU."""
        return self.step + self.scratch


@dataclasses.dataclass(frozen=True)
class Time:
    """An estimate of one step on one kind of chip.

    Attributes:
      compute: seconds for the executed FLOPs at the assumed utilization.
      communication: seconds to receive all bytes from other devices.
      update: seconds to read and write the state once.
    """

    compute: float
    communication: float
    update: float

    @property
    def step(self) -> float:
        """Seconds; communication hides behind compute as far as it goes."""
        return max(self.compute, self.communication) + self.update

    @property
    def limit(self) -> str:
        """What takes the longest."""
        parts = dataclasses.asdict(self)
        return max(parts, key=lambda key: parts[key])


@dataclasses.dataclass(frozen=True)
class Plan:
    """A training step on a mesh.

    Attributes:
      config: the run, with its vocabulary.
      mesh: sizes of its axes, by name.
      idle: devices that the mesh leaves without work.
      parameters: of the model.
      flops: of a step on all devices, as `flops_per_token` counts them.
      executed: the same with what rematerialization computes again.
      memory: of a device.
      exchanges: collectives of a step, as one device sees them.
      compilation: seconds that it took.
    """

    config: Config
    mesh: dict[str, int]
    idle: int
    parameters: int
    flops: float
    executed: float
    memory: Memory
    exchanges: tuple[Collective, ...]
    compilation: float

    @property
    def devices(self) -> int:
        return math.prod(self.mesh.values())

    @property
    def tokens(self) -> int:
        """Of a step."""
        return self.config.batch_size * self.config.model.max_seq_len

    @property
    def caches(self) -> dict[str, int]:
        """Bytes that serving takes for a text of the whole context, by dtype."""
        model = self.config.model
        return {
            dtype: cache_bytes(model, 1, model.max_seq_len, dtype) for dtype in DTYPES
        }

    @property
    def received(self) -> float:
        """Bytes that a device receives from others in a step."""
        return sum(exchange.received for exchange in self.exchanges)

    def time(self, chip: Chip, utilization: float) -> Time:
        """Seconds of a step.

        Args:
          chip: every device is one.
          utilization: share of its bfloat16 peak at which FLOPs are executed.
        """
        memory = self.memory
        state = memory.params + memory.optimizer
        return Time(
            compute=self.executed / self.devices / (utilization * chip.bf16_flops),
            communication=self.received / chip.interconnect,
            update=2 * state / chip.memory_bandwidth,
        )

    def mfu(self, chip: Chip, utilization: float) -> float:
        """Model FLOPs of the estimated step over the chip's bfloat16 peak."""
        seconds = self.time(chip, utilization).step
        return self.flops / self.devices / (seconds * chip.bf16_flops)


def make_plan(
    config: Config,
    devices: Sequence[Any] | None = None,
    notify: Callable[[str], None] = lambda message: None,
) -> Plan:
    """Compiles the training step of a run, and reads what it takes.

    Args:
      config: the run, with its vocabulary.
      devices: stand for those of the run; all that JAX has where None are given.
      notify: is told what takes long.

    Raises:
      VaaniError: the mesh, the batch or a parameter doesn't fit the devices; or the
        compiled step sends something that `hlo.py` can't read.
    """
    devices = list(jax.devices() if devices is None else devices)
    mesh = make_mesh(config.mesh, devices)
    # How long a run is decides on constants of the schedule, which take no memory.
    program = make_program(config, mesh, config.num_steps or 1)
    notify(f"compiling the training step for {mesh.size} devices")
    start = time.perf_counter()
    compiled = compile_step(program, config, mesh)
    seconds = time.perf_counter() - start
    try:
        exchanges = tuple(collectives(compiled.as_text()))
    except ValueError as error:
        raise VaaniError(f"can't read what the compiled step sends: {error}") from error
    model, execution = config.model, config.execution
    tokens = config.batch_size * model.max_seq_len
    flops = tokens * flops_per_token(config.vaani, model.max_seq_len)
    executed = float(flops)
    if execution.remat:
        # The forward third once more, or only its attention.
        again = flops / 3
        if execution.remat_save == "products":
            width = model.n_heads * model.head_size
            again = tokens * 4 * model.n_layers * width * model.max_seq_len
        executed += again
    return Plan(
        config=config,
        mesh=dict(mesh.shape),
        idle=len(devices) - mesh.size,
        parameters=model_size(config.vaani).parameters,
        flops=flops,
        executed=executed,
        memory=_memory(program, config, mesh, compiled),
        exchanges=exchanges,
        compilation=seconds,
    )


def as_text(plan: Plan, chips: Sequence[Chip], utilization: float) -> str:
    """The plan as people read it."""
    config, model, memory = plan.config, plan.config.model, plan.memory
    execution = config.execution
    axes = " x ".join(f"{axis} {n}" for axis, n in plan.mesh.items())
    idle = f"; {plan.idle} more are not used" if plan.idle else ""
    remat = f", remat saves {execution.remat_save}" if execution.remat else ""
    lines = [
        f"model    {'ternary' if config.quantization.quantize else 'full precision'},"
        f" {plan.parameters:,} parameters, compute in {config.quantization.dtype}"
        + remat,
        f"devices  {plan.devices}: {axes}{idle}",
        f"step     {config.batch_size:,} x {model.max_seq_len:,} tokens in"
        f" {config.optim.accumulation_steps} micro-batches, {plan.flops:.3g} FLOP,"
        f" {plan.executed:.3g} with what is computed again",
        f"compiled in {plan.compilation:.1f} s, for CPUs",
        "",
        "memory per device",
    ]
    rows = [
        ("parameters", memory.params),
        ("optimizer", memory.optimizer),
        ("codes, tuner, rest", memory.other),
        ("tokens", memory.tokens),
        ("gradients, activations", memory.temporaries),
        ("a step", memory.step),
    ]
    if memory.second_state:
        rows.append(("+ range test's copy", memory.second_state))
    rows += [
        ("+ on a CPU, about", memory.scratch),
        ("an evaluation", memory.state + memory.evaluation),
        ("a sample", memory.state + memory.sampling),
    ]
    lines += [f"  {title:24} {size(nbytes):>10}" for title, nbytes in rows]
    caches = ", ".join(f"{dtype} {size(n)}" for dtype, n in plan.caches.items())
    lines += ["", f"cache of a whole context, when it is served: {caches}"]
    lines += ["", "received per device and step"]
    kinds: dict[tuple[str, str], list[float]] = {}
    for exchange in plan.exchanges:
        entry = kinds.setdefault((exchange.kind, exchange.dtype), [0, 0.0])
        entry[0] += exchange.times
        entry[1] += exchange.received
    for (kind, dtype), (times, received) in sorted(
        kinds.items(), key=lambda item: -item[1][1]
    ):
        title = f"{kind} of {dtype}"
        lines.append(f"  {title:24} {size(received):>10} in {times:,}")
    lines += [f"  {'all':24} {size(plan.received):>10}", ""]
    lines += [
        f"estimates, with FLOPs executed at {utilization:.0%} of the bfloat16 peak",
        f"  {'':10} {'memory':>16} {'s/step':>8} {'tokens/s':>12} {'MFU':>5}  limit",
    ]
    for chip in chips:
        spent = plan.time(chip, utilization)
        share = memory.peak / chip.memory_bytes
        fits = f"{share:.0%}" if share <= 1 else f"no, {share:.1f} x"
        lines.append(
            f"  {chip.name:10} {fits:>16} {spent.step:8.3g}"
            f" {plan.tokens / spent.step:12,.0f} {plan.mfu(chip, utilization):5.0%}"
            f"  {spent.limit}"
        )
    return "\n".join(lines)


def as_dict(plan: Plan, chips: Sequence[Chip], utilization: float) -> dict[str, Any]:
    """The plan for programs: bytes, seconds."""
    return {
        "devices": plan.devices,
        "mesh": plan.mesh,
        "parameters": plan.parameters,
        "flops": plan.flops,
        "memory": {
            **dataclasses.asdict(plan.memory),
            "step": plan.memory.step,
            "peak": plan.memory.peak,
        },
        "caches": plan.caches,
        "exchanges": [dataclasses.asdict(exchange) for exchange in plan.exchanges],
        "received": plan.received,
        "chips": {
            chip.name: {
                **dataclasses.asdict(plan.time(chip, utilization)),
                "step": plan.time(chip, utilization).step,
                "mfu": plan.mfu(chip, utilization),
                "memory_share": plan.memory.peak / chip.memory_bytes,
            }
            for chip in chips
        },
    }


def compile_step(program: Program, config: Config, mesh: Mesh) -> Any:
    """The training step, a `jax.stages.Compiled`."""
    # Native calls are no operations that the compiler could count.
    with jax.set_mesh(mesh), compiled_floats():
        tokens = _tokens(program, config)
        return program.train_step.lower(program.shapes, tokens).compile()


def _tokens(program: Program, config: Config) -> jax.ShapeDtypeStruct:
    shape = (config.batch_size, config.model.max_seq_len + 1)
    return jax.ShapeDtypeStruct(shape, jnp.int32, sharding=program.batch)


def _memory(program: Program, config: Config, mesh: Mesh, compiled: Any) -> Memory:
    shapes = program.shapes
    params, optimizer = bytes_of(shapes.params), bytes_of(shapes.opt_state)
    other = bytes_of(shapes) - params - optimizer
    model, rows = config.model, config.batch_size // config.optim.accumulation_steps
    scores = rows * model.n_heads * model.max_seq_len**2 * 4 // mesh.size
    second = 0
    # A run that is given in epochs may well be long enough for a range test.
    steps, tuner = config.num_steps, program.tuner
    if tuner is not None and (not steps or tuner.range_test.rates(steps)):
        second = params + optimizer + other
    return Memory(
        params=params,
        optimizer=optimizer,
        other=other,
        tokens=bytes_of(_tokens(program, config)),
        temporaries=bytes_within(compiled),
        scratch=2 * scores,
        second_state=second,
        evaluation=evaluation_bytes(program, config, mesh),
        sampling=sampling_bytes(program, config, mesh),
    )

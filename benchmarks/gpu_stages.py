"""The stages of gpu.py, each part in a process of its own.

    python benchmarks/gpu_stages.py STAGE PART FOLDER SECONDS [--rehearse] [--data=FILE]

A part appends what it finds to rows.jsonl in the folder, a row at a time, and prints
it. Rows whose names are there already it leaves out: `gpu.py --resume` goes on so. At
toy size every stage runs on a CPU, the kernels in Pallas's interpreter.
"""

import argparse
import contextlib
import dataclasses
import functools
import glob
import json
import os
import pathlib
import random
import shutil
import subprocess
import sys
import tarfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

OUT_OF_MEMORY = ("RESOURCE_EXHAUSTED", "MemoryError", "Out of memory")
REFERENCE = ROOT / "benchmarks" / "results" / "gpu_losses.json"
MAIN_STEPS = 300
VOCABULARY = 50_304  # of the training stage: GPT-2's, rounded up


@dataclasses.dataclass
class Part:
    """What a part of a stage is called with.

    Attributes:
      stage, name: which one.
      folder: of the results.
      seconds: until it is killed.
      toy: whether sizes are those of a rehearsal.
      data: a text file, or "".
      compile_only: whether to fill the compilation cache and do nothing else.
    """

    stage: str
    name: str
    folder: pathlib.Path
    seconds: float
    toy: bool
    data: str
    compile_only: bool
    start: float = dataclasses.field(default_factory=time.monotonic)

    @property
    def left(self) -> float:
        """Seconds until it is killed."""
        return self.seconds - (time.monotonic() - self.start)

    @functools.cached_property
    def found(self) -> set[str]:
        """Names of rows that an earlier process of this stage has found."""
        path, names = self.folder / "rows.jsonl", set()
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        for line in lines:
            with contextlib.suppress(ValueError):
                row = json.loads(line)
                if row["stage"] == self.stage and not row.get("note"):
                    names.add(row.get("name"))
        return names

    def row(self, name: str, *, table: str = "", **values: Any) -> None:
        """Keeps what was found, at once, and shows it; ``table`` is the stage's."""
        row = {"stage": self.stage, "part": self.name, "name": name, **values}
        row["table"] = table or self.stage
        with open(self.folder / "rows.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        shown = (
            f"{key} {value:,.4g}" if isinstance(value, float) else f"{key} {value}"
            for key, value in values.items()
            if value is not None
        )
        print(f"  {name}: {', '.join(shown)}", flush=True)

    @contextlib.contextmanager
    def trying(self, name: str) -> Iterator[None]:
        """Keeps a failure as a row, and goes on after it."""
        try:
            yield
        except Exception as error:
            text = f"{type(error).__name__}: {error}"
            self.row(name, note=reason_of(text.splitlines()) or text[:200])


def reason_of(lines: list[str]) -> str:
    """Why something failed, in a few words, from what it said last; or ""."""
    if any(words in line for line in lines for words in OUT_OF_MEMORY):
        return "out of memory"
    return lines[-1][:200] if lines else ""


def seconds_of(run: Callable[[], Any], repeats: int = 5) -> float:
    """The least of some times of what returns arrays, after a first."""
    import jax

    jax.block_until_ready(run())
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(run())
        best = min(best, time.perf_counter() - start)
    return best


def device_kind() -> str:
    import jax

    return jax.devices()[0].device_kind


def bandwidth() -> float | None:
    """Of the chip's memory by its data sheet, B/s."""
    from vaani_jax.devices.chips import chip_of

    chip = chip_of(device_kind())
    return chip.memory_bandwidth if chip else None


# -- The machine ----------------------------------------------------------------------


def machine(part: Part) -> None:
    import jax
    import jax.numpy as jnp

    device = jax.devices()[0]
    part.row("chip", value=device.device_kind)
    stats = device.memory_stats() or {}
    part.row("memory", value=stats.get("bytes_limit", 0) / 1e9, unit="GB for JAX")
    driver = ""
    if shutil.which("nvidia-smi"):
        driver = subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
            capture_output=True,
            text=True,
        ).stdout.strip()
    part.row("driver", value=driver or "-")
    part.row("jax", value=jax.__version__)
    part.row("python", value=sys.version.split()[0])

    size = 2**12 if part.toy else 2**29
    x = jnp.ones(size, jnp.float32)
    copy = jax.jit(lambda x: x + 1)
    with part.trying("copy bandwidth"):
        rate = 2 * x.nbytes / seconds_of(lambda: copy(x))
        part.row("copy bandwidth", value=rate / 1e9, unit="GB/s, read and written")
    side = 256 if part.toy else 8192
    key = jax.random.key(0)
    for name, dtype, total, unit in (
        ("bfloat16 product", jnp.bfloat16, jnp.float32, "TFLOP/s"),
        ("int8 product", jnp.int8, jnp.int32, "TOP/s"),
    ):
        with part.trying(name):
            a, b = (
                jax.random.randint(k, (side, side), -100, 100).astype(dtype)
                for k in jax.random.split(key)
            )
            dot = jax.jit(functools.partial(jnp.dot, preferred_element_type=total))
            rate = 2 * side**3 / seconds_of(functools.partial(dot, a, b))
            part.row(name, value=rate / 1e12, unit=unit)
    with part.trying("a kernel in a loop"):
        steps = 1000

        @jax.jit
        def loop(x: Any) -> Any:
            sort = lambda x: jnp.cumsum(x) * 0.5  # noqa: E731
            return jax.lax.fori_loop(0, steps, lambda i, x: sort(x), x)

        spent = seconds_of(lambda: loop(jnp.ones(64))) / steps
        part.row("a kernel in a loop", value=1e6 * spent, unit="us")


# -- Kernels against the reference ----------------------------------------------------

ROWS = (1, 2, 3, 5, 8, 9, 16, 17, 31, 32, 33, 64, 100, 128, 512)
SHAPES = {(100, 72): ROWS, (17, 33): ROWS, (1, 1): (1, 40), (768, 2048): (1, 8, 33)}
SHAPES |= {(2560, 640): (1, 8, 512), (6912, 2560): (1, 8, 64)}
TOY_SHAPES = {(100, 72): (1, 3, 33)}


def kernels(part: Part) -> None:
    import jax
    import jax.numpy as jnp
    import numpy as np

    from vaani_jax.kernels import ternary_matmul
    from vaani_jax.quant.packed import pack, unpack

    rng = np.random.default_rng(0)
    using: Any = "tpu" if jax.default_backend() == "tpu" else "gpu"
    layout: Any = "planes" if using == "tpu" else "rows"
    for (k, n), counts in (TOY_SHAPES if part.toy else SHAPES).items():
        half = max(1, n // 2)
        weights = [jnp.asarray(rng.integers(-1, 2, (k, w))) for w in (n, half)]
        scales = jnp.float32(0.02), jnp.asarray(rng.uniform(0.5, 2, half), jnp.float32)
        packed = [pack(w, s, layout) for w, s in zip(weights, scales, strict=True)]
        for rows in counts:
            name = f"{k} x {n}, {rows} rows"
            if name in part.found:
                continue
            with part.trying(name):
                different = 0
                for dtype in (jnp.float32, jnp.bfloat16):
                    x = jnp.asarray(rng.normal(size=(rows, k)), dtype)
                    product = jax.jit(ternary_matmul, static_argnames="using")
                    got = product(x, packed, using=using)
                    expected = product(x, packed, using="reference")
                    different += sum(
                        int((np.asarray(a) != np.asarray(b)).sum())
                        for a, b in zip(got, expected, strict=True)
                    )
                assert (np.asarray(unpack(packed[0])) == np.asarray(weights[0])).all()
                part.row(name, outputs=rows * (n + half) * 2, different=different)


def products(part: Part) -> None:
    """The kernels' times in the layers of the 2B4T shape, by tiles."""
    import jax
    import jax.numpy as jnp

    from vaani_jax.kernels import gpu, tiles

    layers = 1 if part.toy else 6  # which no cache holds
    shapes = [(2560, (2560, 640, 640)), (2560, (2560,))]
    shapes += [(2560, (6912, 6912)), (6912, (2560,))]
    if part.toy:
        shapes = [(64, (32, 16))]
    key = jax.random.key(0)
    weights = [
        [[random_kernel(key, k, n) for n in widths] for k, widths in shapes]
        for _ in range(layers)
    ]
    candidates: dict[int, list[Any]] = {
        rows: [tiles.VectorTiles(*t) for t in choices]
        for rows, choices in {
            1: [(8, 128, 4), (4, 128, 4), (4, 512, 4), (2, 256, 1), (4, 64, 2)],
            8: [(8, 128, 4), (4, 128, 4), (16, 128, 4)],
        }.items()
    } | {
        rows: [tiles.MatrixTiles(*t) for t in choices]
        for rows, choices in {
            32: [
                (64, 32, 128, 1, 4, 3),
                (64, 32, 128, 4, 4, 3),
                (64, 32, 64, 2, 4, 4),
                (128, 32, 128, 2, 8, 3),
            ],
            512: [
                (128, 128, 128, 1, 8, 3),
                (64, 128, 128, 1, 4, 3),
                (128, 256, 64, 1, 8, 3),
                (128, 128, 64, 1, 8, 4),
            ],
        }.items()
    }
    if part.toy:
        candidates = {rows: choices[:1] for rows, choices in candidates.items()}
        candidates.pop(512)
    for rows, choices in candidates.items():
        xs = [jax.random.normal(key, (rows, k), jnp.bfloat16) for k, _ in shapes]
        name_of = "vector_tiles" if rows <= gpu.FEW_ROWS else "matrix_tiles"
        for choice in [None, *choices]:
            cut = ", ".join(map(str, dataclasses.astuple(choice))) if choice else "ours"
            row = f"{rows} rows, {cut}"
            if row in part.found or part.left < 10:
                continue
            chosen = getattr(gpu, name_of)
            with part.trying(row):
                if choice:
                    setattr(gpu, name_of, functools.partial(_always, choice))
                try:

                    @jax.jit
                    def run(weights: Any, xs: Any) -> Any:
                        total = jnp.bfloat16(0)
                        for layer in weights:
                            for x, kernels in zip(xs, layer, strict=True):
                                ys = gpu.ternary_matmul(x + total, kernels, None)
                                total = ys[0][0, 0] * 1e-9
                        return total

                    call = functools.partial(run, weights, xs)
                    seconds_of(call, 1)
                    spent = profiled(functools.partial(seconds_of, call, 1))
                finally:
                    setattr(gpu, name_of, chosen)
                for kernel, (count, seconds) in sorted(spent.items()):
                    if kernel.startswith("ternary"):
                        part.row(f"{row}: {kernel}", us=1e6 * seconds / count)
                # Two calls; the rest is quantization.
                whole = sum(seconds for _, seconds in spent.values())
                part.row(row, us=1e6 * whole / 2 / layers)


def _always(choice: Any, *shape: int) -> Any:
    return choice


def profiled(run: Callable[[], Any]) -> dict[str, tuple[int, float]]:
    """Kernels of a device, or operations of a CPU: how often, and seconds in all."""
    import tempfile

    import jax

    accelerated = jax.default_backend() != "cpu"
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    options.host_tracer_level = 0 if accelerated else 2
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, profiler_options=options):
            run()
        (path,) = glob.glob(f"{folder}/**/*.xplane.pb", recursive=True)
        data = jax.profiler.ProfileData.from_file(path)
    counts: Counter[str] = Counter()
    seconds: defaultdict[str, float] = defaultdict(float)
    for plane in data.planes:
        if accelerated and not plane.name.startswith("/device:"):
            continue
        for line in plane.lines:
            wanted = ("Stream", "XLA Ops") if accelerated else ("tf_", "Eigen")
            if not any(words in line.name for words in wanted):
                continue
            for event in line.events:
                counts[event.name] += 1
                seconds[event.name] += event.duration_ns * 1e-9
    return {name: (counts[name], seconds[name]) for name in counts}


# -- Models of random weights ---------------------------------------------------------

MODELS: dict[str, dict[str, Any]] = {
    "2b4t": {
        "vocab_size": 128_256,
        "dim": 2560,
        "n_layers": 30,
        "n_heads": 20,
        "n_kv_heads": 5,
        "ffn_dim": 6912,
        "activation": "relu2",
    },
    "700m": {
        "vocab_size": 32_000,
        "dim": 1536,
        "n_layers": 24,
        "n_heads": 16,
        "ffn_dim": 4096,
    },
    "125m": {
        "vocab_size": 32_000,
        "dim": 768,
        "n_layers": 12,
        "n_heads": 12,
        "ffn_dim": 2048,
    },
    "toy": {"vocab_size": 256, "dim": 64, "n_layers": 1, "n_heads": 2, "ffn_dim": 64},
}


def random_kernel(key: Any, k: int, n: int) -> Any:
    """A packed kernel [k, n] in the layout of a GPU; one code in two is a 1."""
    import jax.numpy as jnp

    from vaani_jax.quant.packed import PackedTernary

    shape = (-(-n // 128) * 128, -(-k // 64) * 16)
    return PackedTernary(_codes(key, shape), jnp.float32(0.02), (k, n), "rows")


def _codes(key: Any, shape: tuple[int, ...]) -> Any:
    import jax
    import jax.numpy as jnp

    @jax.jit
    def draw(key: Any) -> Any:
        bits = jax.random.bits(key, shape, jnp.uint8)
        return bits ^ (((bits >> 1) & bits & 0x55) << 1)  # 3 becomes 1

    return draw(key)


def drawn(shapes: Any, dtype: Any) -> Any:
    """Numbers for a tree of shapes, drawn on the device; matrices in ``dtype``."""
    import jax
    import jax.numpy as jnp

    from vaani_jax.quant.packed import PackedRows, PackedTernary

    def fill(leaf: Any) -> Any:
        key = jax.random.key(0)
        if isinstance(leaf, PackedTernary):
            scale = jnp.full(leaf.scale.shape, 0.02, jnp.float32)
            codes = _codes(key, leaf.codes.shape)
            return dataclasses.replace(leaf, codes=codes, scale=scale)
        if isinstance(leaf, PackedRows):
            codes = jax.random.bits(key, leaf.codes.shape, jnp.uint8)
            scale = jnp.full(leaf.scale.shape, 2e-4, jnp.float32)
            return PackedRows(jax.lax.bitcast_convert_type(codes, jnp.int8), scale)
        if leaf.ndim < 2:
            return jnp.ones(leaf.shape, leaf.dtype)
        return jax.random.normal(key, leaf.shape, dtype) * 0.02

    return jax.tree.map(fill, shapes, is_leaf=_is_packed)


def _is_packed(leaf: Any) -> bool:
    from vaani_jax.quant.packed import PackedRows, PackedTernary

    return isinstance(leaf, PackedTernary | PackedRows)


def model_shapes(name: str, packed: bool) -> tuple[Any, Any]:
    """A module, and shapes of its variables: packed, or a twin's in bfloat16."""
    import jax
    import jax.numpy as jnp

    from vaani_jax.kernels import layout
    from vaani_jax.model.config import Architecture, Quantization
    from vaani_jax.model.packing import pack_variables
    from vaani_jax.model.transformer import Vaani, init_variables

    module = Vaani(
        Architecture(**MODELS[name], max_seq_len=2048),
        Quantization(dtype="bfloat16", quantize=packed),
    )

    def make() -> Any:
        variables = init_variables(module, jax.random.key(0))
        if packed:
            how: Any = {"embedding": "int8", "layout": layout()}
            return pack_variables(variables, module.spec, **how)
        narrow = lambda x: x.astype(jnp.bfloat16) if x.ndim > 1 else x  # noqa: E731
        return jax.tree.map(narrow, variables)

    return module, jax.eval_shape(make)


def decode(part: Part) -> None:
    """128 tokens in one compiled loop, behind 512."""
    import jax
    import jax.numpy as jnp

    from vaani_jax.inference.generate import decode as generate
    from vaani_jax.inference.sampling import SamplerConfig
    from vaani_jax.model.cache import KVCache

    steps, before, capacity = (4, 16, 64) if part.toy else (128, 512, 1024)
    module, shapes, batch = _served(part)
    cache = KVCache.create(module.architecture, batch, capacity, "bfloat16")
    logits = jnp.zeros((batch, module.architecture.vocab_size), jnp.float32)
    rest = jax.random.key(0), jnp.int32(0)
    sampler = SamplerConfig(temperature=0)
    lowered = generate.lower(module, sampler, steps, shapes, logits, cache, *rest)
    compiled = lowered.compile()
    if part.compile_only:
        return
    variables = drawn(shapes, jnp.bfloat16)
    state: dict[str, Any] = {"logits": logits, "cache": cache}

    def run() -> Any:
        # What is donated is handed on.
        cache = dataclasses.replace(state["cache"], length=jnp.int32(before))
        _, _, logits, cache = compiled(variables, state["logits"], cache, *rest)
        state.update(logits=logits, cache=cache)
        return logits

    _speed(part, variables, run, batch * steps, steps)
    if batch == 1:
        found = profiled(lambda: jax.block_until_ready(run()))
        _expensive(part, part.name, found, steps)


def prefill(part: Part) -> None:
    """512 tokens a row, read at once."""
    import jax.numpy as jnp

    from vaani_jax.inference.generate import prefill as read

    length, capacity = (16, 64) if part.toy else (512, 1024)
    module, shapes, batch = _served(part)
    ids = jnp.ones((batch, length), jnp.int32)
    rest = ids, jnp.int32(length), jnp.zeros(batch, jnp.int32)
    how: Any = {"capacity": capacity, "kv_dtype": "bfloat16"}
    compiled = read.lower(module, shapes, *rest, **how).compile()
    if part.compile_only:
        return
    variables = drawn(shapes, jnp.bfloat16)
    run = functools.partial(compiled, variables, *rest)
    _speed(part, variables, run, batch * length, 1)


def _served(part: Part) -> tuple[Any, Any, int]:
    """Of a part's name, "model, kind, batch": module, shapes of variables, batch."""
    name, kind, batch = part.name.split(", ")
    return *model_shapes(name, kind == "packed"), int(batch)


def _speed(
    part: Part, variables: Any, run: Callable[[], Any], tokens: int, passes: int
) -> None:
    """A row of tokens and of bytes of weights, each read once a pass."""
    import jax

    spent = seconds_of(run, 3)
    nbytes = sum(x.nbytes for x in jax.tree.leaves(variables))
    moved, peak = nbytes * passes / spent, bandwidth()
    part.row(
        part.name,
        tokens_s=tokens / spent,
        ms=1e3 * spent / passes,
        gb=nbytes / 1e9,
        gb_s=moved / 1e9,
        of_peak=moved / peak if peak else None,
        starting=time.monotonic() - part.start,
    )


def _expensive(
    part: Part, name: str, found: dict[str, tuple[int, float]], steps: int
) -> None:
    """The ten kernels that take most, of so many steps."""
    whole = sum(seconds for _, seconds in found.values())
    part.row(
        f"{name}: all",
        table="expensive",
        count=sum(count for count, _ in found.values()) / steps,
        ms=1e3 * whole / steps,
    )
    most = sorted(found.items(), key=lambda item: -item[1][1])[:10]
    for kernel, (count, seconds) in most:
        part.row(
            f"{name}: {kernel[:60]}",
            table="expensive",
            count=count / steps,
            ms=1e3 * seconds / steps,
            share=seconds / whole,
        )


# -- Training -------------------------------------------------------------------------

# Batch, and what of a block is recomputed: what fits an H100's 80 GB.
SIZES: dict[str, tuple[dict[str, Any], int, dict[str, Any]]] = {
    "125m": (
        {"dim": 768, "n_layers": 12, "n_heads": 12, "ffn_dim": 2048},
        16,
        {"scan_layers": True, "remat": True, "remat_save": "products"},
    ),
    "350m": (
        {"dim": 1024, "n_layers": 24, "n_heads": 16, "ffn_dim": 2816},
        16,
        {"scan_layers": True, "remat": True, "remat_save": "products"},
    ),
    "1.3b": (
        {
            "dim": 2048,
            "n_layers": 24,
            "n_heads": 16,
            "ffn_dim": 5504,
            "vocab_size": 32_000,
        },
        8,
        {"scan_layers": True, "remat": True, "remat_save": "products"},
    ),
    "toy": ({"dim": 64, "n_layers": 1, "n_heads": 2, "ffn_dim": 64}, 2, {}),
}
VARIANTS: dict[str, dict[str, Any]] = {
    "twin": {"quantize": False},
    "ternary, bfloat16": {"quantize": True, "operands": "bfloat16"},
    "ternary, int8": {"quantize": True, "operands": "int8"},
}


def make_step(part: Part) -> tuple[Callable[[int], Any], Any] | None:
    """A training step on random tokens, which runs so often; and its model.

    None where it was only to be compiled.
    """
    import jax
    import jax.numpy as jnp
    import numpy as np

    from vaani_jax import leaves
    from vaani_jax.model.config import Architecture, Execution, Quantization
    from vaani_jax.model.transformer import Vaani
    from vaani_jax.train.config import OptimConfig
    from vaani_jax.train.optimizers import make_optimizer
    from vaani_jax.train.schedules import Schedule
    from vaani_jax.train.state import init_state
    from vaani_jax.train.steps import make_train_step

    size, _, variant = part.name.partition(", ")
    shape, batch, how = SIZES[size]
    context, vocabulary = (32, 256) if part.toy else (2048, VOCABULARY)
    model = Vaani(
        Architecture(**{"vocab_size": vocabulary, **shape, "max_seq_len": context}),
        Quantization(dtype="bfloat16"),
        Execution(**how),
    ).changed(**VARIANTS[variant])
    optim = OptimConfig(name="adamw")
    optimizer = make_optimizer(optim)
    step = make_train_step(model, optimizer, Schedule(optim, 1e-3, 1_000_000))
    shapes = jax.eval_shape(lambda: init_state(model, optimizer, 0, None))
    vocabulary = model.architecture.vocab_size
    ids = np.random.default_rng(0).integers(0, vocabulary, (batch, context + 1))
    tokens = jax.device_put(ids.astype(np.int32))
    compiled = jax.jit(step, donate_argnums=0).lower(shapes, tokens).compile()
    if part.compile_only:
        return None

    def fill(path: Any, leaf: Any) -> Any:
        name = leaves.name(path)
        if name.startswith("params/"):
            return drawn(leaf, jnp.float32)
        constant = {"threshold": 0.5, "clip_norm": 1.0}.get(name.rpartition("/")[2], 0)
        return jnp.full(leaf.shape, constant, leaf.dtype)

    # Not by init_state, which takes as long to compile as the step.
    state = jax.tree_util.tree_map_with_path(fill, shapes)

    def run(count: int) -> Any:
        nonlocal state
        for _ in range(count):
            state, metrics = compiled(state, tokens)
        return metrics["train/loss"].block_until_ready()

    return run, model


def training(part: Part) -> None:
    import jax

    from vaani_jax.devices.chips import chip_of
    from vaani_jax.model.size import flops_per_token, model_size

    made = make_step(part)
    if made is None:
        return
    run, model = made
    run(1)
    first = time.monotonic() - part.start
    run(1 if part.toy else 3)
    count, times = 1 if part.toy else 5, []
    for _ in range(3):
        begin = time.perf_counter()
        loss = run(count)
        times.append((time.perf_counter() - begin) / count)
    batch = SIZES[part.name.partition(", ")[0]][1]
    context = model.architecture.max_seq_len
    rate = batch * context / sorted(times)[1]
    device = jax.devices()[0]
    chip = chip_of(device.device_kind)
    flops = flops_per_token(model, context)
    peak = (device.memory_stats() or {}).get("peak_bytes_in_use")
    part.row(
        part.name,
        batch=batch,
        tokens_s=rate,
        mfu=rate * flops / chip.bf16_flops if chip else None,
        gb=peak / 1e9 if peak else None,
        ms=1e3 * sorted(times)[1],
        starting=first,
        parameters=model_size(model).parameters,
        loss=float(loss),
    )


def profile(part: Part) -> None:
    made = make_step(part)
    if made is None:
        return
    run, _ = made
    run(2)
    _expensive(part, part.name, profiled(lambda: run(2)), 2)


# -- Attention ------------------------------------------------------------------------


def attention(part: Part) -> None:
    import jax
    import jax.numpy as jnp

    from vaani_jax.model.attention import causal_attention

    library = jax.nn.dot_product_attention
    ways: dict[str, Callable[..., Any]] = {
        "ours": causal_attention,
        "cudnn": functools.partial(library, is_causal=True, implementation="cudnn"),
        "xla": functools.partial(library, is_causal=True, implementation="xla"),
    }
    if jax.default_backend() != "gpu":
        del ways["cudnn"]
    lengths = (64,) if part.toy else (2048, 8192, 32_768)
    heads, size = (2, 16) if part.toy else (16, 128)
    for length in lengths:
        batch = max(1, lengths[0] // length * 4)
        x = jax.random.normal(jax.random.key(0), (batch, length, heads, size))
        x = x.astype(jnp.bfloat16)
        for way, function in ways.items():
            name = f"{length} tokens, {way}"
            if name in part.found or part.left < 8:
                continue
            with part.trying(name):

                @jax.jit
                def run(q: Any, k: Any, v: Any, function: Any = function) -> Any:
                    def total(*qkv: Any) -> Any:
                        return jnp.sum(function(*qkv).astype(jnp.float32))

                    return jax.grad(total, (0, 1, 2))(q, k, v)

                spent = seconds_of(functools.partial(run, x, x, x), 3)
                # Of the causal half: 2 products forward, 5 backward.
                flops = 7 * batch * heads * size * length**2
                part.row(
                    name, batch=batch, ms=1e3 * spent, tflop_s=flops / spent / 1e12
                )


# -- Whole runs -----------------------------------------------------------------------


def word_salad(path: pathlib.Path) -> pathlib.Path:
    """A text that is the same everywhere: sentences of invented words, 400 kB."""
    draw = random.Random(0)
    syllables = [
        a + b for a in "bdfgklmnprstv" for b in ("a", "e", "i", "o", "u", "an")
    ]
    words = [
        "".join(draw.choices(syllables, k=draw.choice((1, 2, 2, 3))))
        for _ in range(800)
    ]
    weights = [1 / (rank + 1) for rank in range(len(words))]
    lines, size = [], 0
    while size < 400_000:
        chosen = draw.choices(words, weights, k=draw.randint(4, 12))
        line = " ".join(chosen).capitalize() + draw.choice(".,;?!")
        lines.append(line)
        size += len(line) + 1
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def _command(*arguments: str) -> tuple[str, float]:
    """Runs a command of the project: its standard output, and seconds."""
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(done.stderr.strip()[-500:] or done.stdout.strip()[-500:])
    return done.stdout, time.monotonic() - start


def _losses(workdir: pathlib.Path) -> dict[str, float]:
    """Training and validation losses by step."""
    found = {}
    for line in (workdir / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        for key in ("train/loss", "eval/loss"):
            if row.get(key) is not None:
                found[f"{key} {row['step']}"] = row[key]
    return found


def main_job(part: Part) -> None:
    """`configs/small.py`, then generation from masters, packing, and from packed."""
    room = part.folder / "main_job"
    shutil.rmtree(room, ignore_errors=True)
    room.mkdir()
    text = word_salad(room / "text.txt")
    steps = 4 if part.toy else MAIN_STEPS
    work = room / "run"
    config = "debug" if part.toy else "small"
    _, spent = _command(
        "train.py",
        f"--config=configs/{config}.py",
        f"--workdir={work}",
        f"--config.data.path={text}",
        f"--config.num_steps={steps}",
        "--config.use_tuner=False",
        "--config.learning_rate=0.012",
        "--config.log_interval=20",
        f"--config.eval_interval={steps}",
        f"--config.save_interval={steps}",
    )
    losses = _losses(work)
    part.row("training", seconds=spent, loss=losses.get(f"eval/loss {steps}"))
    if not part.toy:
        (part.folder / "losses.json").write_text(json.dumps(losses, indent=1) + "\n")
        if REFERENCE.exists():
            table = json.loads(REFERENCE.read_text())["tables"]["losses"]
            expected = dict(table["rows"])
            apart = {key: abs(losses[key] - expected[key]) for key in expected}
            part.row(
                "beside the CPU",
                largest=max(apart.values()),
                last=apart[f"eval/loss {steps}"],
                loss=expected[f"eval/loss {steps}"],
            )
    options = ["--prompt=Ba", "--max-new-tokens=64", "--temperature=0"]
    masters, spent = _command(
        "-m", "vaani_jax", "generate", f"--workdir={work}", *options
    )
    part.row("generation, masters", seconds=spent)
    _, spent = _command(
        "-m", "vaani_jax", "pack", f"--workdir={work}", f"--out={room / 'packed'}"
    )
    part.row("packing", seconds=spent)
    packed, spent = _command(
        "-m", "vaani_jax", "generate", f"--workdir={room / 'packed'}", *options
    )
    part.row("generation, packed", seconds=spent, same_text=masters == packed)


def medium(part: Part) -> None:
    """`configs/medium.py` for as long as there is time; the same again goes on.

    It goes on from its folder, or, on another machine, from pieces of what it left.
    """
    import gpu_medium
    from rich.console import Console

    from vaani_jax.cli.flags import config_from_flags
    from vaani_jax.train.loop import train

    text = part.data or str(word_salad(part.folder / "text.txt"))
    name = "debug" if part.toy else "medium"
    flags = [
        f"--config={ROOT / 'configs' / name}.py",
        f"--config.data.path={pathlib.Path(text).resolve()}",
        "--config.use_tuner=False",
        "--config.learning_rate=0.001",
        "--config.sample_interval=0",
    ]
    if part.toy:
        flags += ["--config.num_steps=4", "--config.log_interval=2"]
    config = config_from_flags(flags).config
    work = part.folder / "medium"
    blob = gpu_medium.unpieced(part.folder)
    if blob is not None and not work.exists():
        gpu_medium.unpack_run(blob, config, work)
    margin = min(25.0, part.left / 3)  # to evaluate, save and pack
    with open(part.folder / "medium.log", "a", encoding="utf-8") as log:
        train(
            config,
            work,
            console=Console(file=log),
            stop=lambda: part.left < margin,
        )
    losses = _losses(work)
    for key, value in losses.items():
        if "eval" in key:
            part.row(key, loss=value)
    steps = max((int(key.split()[1]) for key in losses), default=0)
    size = gpu_medium.pack_run(config, work, part.folder)
    part.row("steps", steps=steps, of=config.num_steps, to_go_on=size / 1e6)
    # What people look at: curves, rows and the weights in two bits.
    packed = part.folder / "medium-packed"
    shutil.rmtree(packed, ignore_errors=True)
    _command("-m", "vaani_jax", "pack", f"--workdir={work}", f"--out={packed}")
    with tarfile.open(part.folder / "medium.tar.gz", "w:gz") as archive:
        for path in (packed, work / "metrics.jsonl", work / "training_curves.png"):
            if path.exists():
                archive.add(path, path.name)


# -- The table ------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Stage:
    """A row of the table of stages.

    Attributes:
      run: does a part.
      parts: each a process; ``toys`` in a rehearsal.
      seconds: that a part may take.
      columns: of its table, from its rows.
      compiles: whether its parts can be compiled before, side by side.
    """

    run: Callable[[Part], None]
    parts: tuple[str, ...]
    toys: tuple[str, ...]
    seconds: float
    columns: tuple[str, ...]
    compiles: bool = False


SERVED = tuple(
    f"{name}, {kind}, {batch}"
    for batch in (1, 8, 32)
    for name in ("2b4t", "700m", "125m")
    for kind in ("packed", "bfloat16")
)
TRAINED = tuple(
    f"{size}, {variant}" for size in ("1.3b", "125m", "350m") for variant in VARIANTS
)
STAGES = {
    "machine": Stage(machine, ("all",), ("all",), 60, ("value", "unit", "note")),
    "kernels": Stage(
        kernels, ("bits",), ("bits",), 80, ("outputs", "different", "note")
    ),
    "main_job": Stage(
        main_job,
        ("small",),
        ("debug",),
        120,
        ("seconds", "loss", "largest", "last", "same_text", "note"),
    ),
    "decode": Stage(
        decode,
        SERVED,
        ("toy, packed, 1", "toy, bfloat16, 1"),
        60,
        ("tokens_s", "ms", "gb", "gb_s", "of_peak", "note"),
        compiles=True,
    ),
    "training": Stage(
        training,
        TRAINED,
        tuple(f"toy, {variant}" for variant in VARIANTS),
        75,
        ("batch", "tokens_s", "mfu", "gb", "ms", "starting", "note"),
        compiles=True,
    ),
    "prefill": Stage(
        prefill,
        SERVED,
        ("toy, packed, 1", "toy, bfloat16, 1"),
        60,
        ("tokens_s", "ms", "gb", "note"),
        compiles=True,
    ),
    "attention": Stage(
        attention, ("all",), ("all",), 60, ("batch", "ms", "tflop_s", "note")
    ),
    "profile": Stage(
        profile,
        ("1.3b, twin", "1.3b, ternary, bfloat16"),
        ("toy, ternary, bfloat16",),
        60,
        ("note",),
        compiles=True,
    ),
    "products": Stage(products, ("2b4t",), ("toy",), 90, ("us", "note")),
    "medium": Stage(
        medium, ("medium",), ("debug",), 600, ("steps", "of", "loss", "note")
    ),
}


TABLES = {name: stage.columns for name, stage in STAGES.items()}
TABLES["expensive"] = ("count", "ms", "share")  # kernels of a token, or of a step


def main() -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("stage", choices=list(STAGES))
    parser.add_argument("part")
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("seconds", type=float)
    parser.add_argument("--rehearse", action="store_true")
    parser.add_argument("--data", default="")
    parser.add_argument("--compile", action="store_true")
    given = parser.parse_args()
    STAGES[given.stage].run(
        Part(
            given.stage,
            given.part,
            given.folder,
            given.seconds,
            given.rehearse,
            given.data,
            given.compile,
        )
    )


if __name__ == "__main__":
    main()

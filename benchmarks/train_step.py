"""Speed of a training step: ternary, with the tuner, its twin, and PyTorch.

    python benchmarks/train_step.py                        # the shape of small.py
    python benchmarks/train_step.py --config=configs/medium.py

Each contender trains on random tokens in a process of its own, with AdamW and clipping,
in float32; the processes take turns, pass by pass, so that a drift of the machine's
speed meets them all. PyTorch (``pip install torch``) runs the same architecture with
the same quantizers, see bitnet_torch.py, under torch.compile; it is left out, with a
line that says so, where it is not installed.

    python benchmarks/train_step.py --accelerator --batch 8 16
    python benchmarks/train_step.py --accelerator --config configs/b1_3b.py \\
        --config.execution.remat_save=products

is for GPUs and TPUs: the first device alone, configs from 125M to 1.3B as they are
(bfloat16, scanned layers, rematerialization) but with AdamW, sequences of 2048 tokens
and no accumulation; the full-precision twin beside ternary with its integers in
bfloat16 and in int8. Each variant has a process and the device for itself, one after
the other, so that peaks of memory are its own; one that fails, for lack of memory or
otherwise, is a row that says so.

MFU is tokens per second x `vaani_jax.model.flops_per_token` (PaLM's count: what is
recomputed and quantizers count nothing) over the peak of the chip in bfloat16
(`vaani_jax.chips`), for int8 operands too: only a third of the products are integers.
"-" stands for a chip that is not in the table, and for memory that a backend doesn't
tell. "spread" is slowest less fastest pass.

This part has run on a CPU only, with tiny configs, to see that it works: there are no
figures of an accelerator yet, and whether the three shapes fit at these batches is not
known.
"""

import argparse
import importlib.util
import itertools
import json
import os
import pathlib
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

CONTENDERS = {
    "ternary": "Vaani, ternary",
    "tuned": "the same, with the tuner",
    "twin": "Vaani, full-precision twin",
    "torch": "PyTorch, ternary, compiled",
}
VARIANTS: dict[str, dict[str, Any]] = {
    "twin": {"quantize": False},
    "ternary, bfloat16": {"quantize": True, "operands": "bfloat16"},
    "ternary, int8": {"quantize": True, "operands": "int8"},
}
ACCELERATOR_CONFIGS = ("large", "b700m", "b1_3b")
VOCABULARY = 50_304  # where a config leaves it to the tokenizer: GPT-2's, rounded up
OUT_OF_MEMORY = ("RESOURCE_EXHAUSTED", "MemoryError", "Out of memory")


def load_config(path: str, overrides: list[str]) -> Any:
    import dataclasses

    from vaani_jax.cli.flags import config_from_flags

    config = config_from_flags([f"--config={path}", *overrides]).config
    optim = dataclasses.replace(config.optim, name="adamw")
    return dataclasses.replace(config, optim=optim)


def load_characters(path: str, overrides: list[str]) -> Any:
    """A config with the vocabulary of Tiny Shakespeare."""
    import dataclasses

    config = load_config(path, overrides)
    model = dataclasses.replace(config.model, vocab_size=65)
    return dataclasses.replace(config, model=model)


def vaani_step(config: Any, quantize: bool, tuned: bool) -> Callable[[int], float]:

    import jax
    import numpy as np

    from vaani_jax.devices.memory import keep_freed_memory
    from vaani_jax.train.optimizers import make_optimizer
    from vaani_jax.train.schedules import Schedule
    from vaani_jax.train.state import init_state
    from vaani_jax.train.steps import make_adjust_step, make_train_step
    from vaani_jax.train.tuner import HyperparameterTuner

    keep_freed_memory()
    model = config.vaani.changed(quantize=quantize)
    optimizer = make_optimizer(config.optim)
    schedule = Schedule(config.optim, 1e-3, 1_000_000)
    tuner = HyperparameterTuner(learning_rate=1e-3) if tuned else None
    step = jax.jit(
        make_train_step(
            model,
            optimizer,
            schedule,
            accumulation_steps=config.optim.accumulation_steps,
            tuner=tuner,
        ),
        donate_argnums=0,
    )
    adjust = None
    if tuner is not None:
        adjust = jax.jit(make_adjust_step(model, tuner), donate_argnums=0)
    state = jax.jit(lambda: init_state(model, optimizer, 0, tuner))()
    rng = np.random.default_rng(0)
    shape = (config.batch_size, config.model.max_seq_len + 1)
    ids = rng.integers(0, config.model.vocab_size, shape, dtype=np.int32)
    tokens = jax.device_put(ids)

    def run(count: int) -> float:
        nonlocal state
        start = time.perf_counter()
        for i in range(count):
            state, metrics = step(state, tokens)
            if adjust is not None and tuner and i % tuner.config.interval == 0:
                state, _ = adjust(state)
        metrics["train/loss"].block_until_ready()
        return time.perf_counter() - start

    return run


def torch_step(config: Any) -> Callable[[int], float]:
    import bitnet_torch
    import torch

    torch.manual_seed(0)
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    c = config.model
    model = bitnet_torch.Model(
        vocab=65,
        dim=c.dim,
        layers=c.n_layers,
        heads=c.n_heads,
        ffn=c.hidden_dim,
        context=c.max_seq_len,
        dropout=c.dropout,
    )
    optimizer = torch.optim.AdamW(
        model.parameters(), 1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )
    loss_of = torch.compile(model)
    tokens = torch.randint(0, 65, (config.batch_size, c.max_seq_len + 1))

    def run(count: int) -> float:
        start = time.perf_counter()
        for _ in range(count):
            optimizer.zero_grad(set_to_none=True)
            loss_of(tokens).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        return time.perf_counter() - start

    return run


def serve(contender: str, path: str, overrides: list[str]) -> None:
    """A worker: reads step counts from standard input, answers with seconds."""
    config = load_characters(path, overrides)
    if contender == "torch":
        run = torch_step(config)
    else:
        quantize, tuned = contender != "twin", contender == "tuned"
        run = vaani_step(config, quantize, tuned)
    run(2)
    print("ready", flush=True)
    for line in sys.stdin:
        print(run(int(line)), flush=True)


class Worker:
    def __init__(self, contender: str, config: str, overrides: list[str]) -> None:
        command = [sys.executable, __file__, f"--worker={contender}"]
        self.process = subprocess.Popen(
            [*command, f"--config={config}", *overrides],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._answer()

    def _answer(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit("a worker ended early: its error is above")
        return line.strip()

    def milliseconds(self, steps: int) -> float:
        assert self.process.stdin is not None
        print(steps, file=self.process.stdin, flush=True)
        return 1e3 * float(self._answer()) / steps

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def measure(options: argparse.Namespace, path: str, overrides: list[str]) -> None:
    """A process of `compare_variants`: prints its row as JSON."""
    import dataclasses

    import jax

    from vaani_jax.devices.chips import chip_of
    from vaani_jax.model.size import flops_per_token, model_size

    config, (batch,) = load_config(path, overrides), options.batch
    model = config.vaani.changed(
        vocab_size=config.model.vocab_size or VOCABULARY,
        max_seq_len=options.context,
        **VARIANTS[options.measure],
    )
    config = dataclasses.replace(
        config,
        model=model.architecture,
        quantization=model.quantization,
        execution=model.execution,
        optim=dataclasses.replace(config.optim, accumulation_steps=1),
        batch_size=batch,
    )
    device = jax.devices()[0]
    start = time.perf_counter()
    run = vaani_step(config, model.quantization.quantize, tuned=False)
    run(1)
    first = time.perf_counter() - start
    count = max(1, round(options.seconds / run(1)))
    seconds = [run(count) / count for _ in range(options.passes)]
    median = statistics.median(seconds)
    rate = batch * options.context / median
    chip, flops = chip_of(device.device_kind), flops_per_token(model, options.context)
    row = {
        "device": device.device_kind,
        "parameters": model_size(model).parameters,
        "flops_per_token": flops,
        "tokens_per_second": rate,
        "spread": (max(seconds) - min(seconds)) / median,
        "mfu": rate * flops / chip.bf16_flops if chip else None,
        "peak_bytes": (device.memory_stats() or {}).get("peak_bytes_in_use"),
        "seconds_to_first_step": first,
    }
    print(json.dumps(row))


def failure(done: subprocess.CompletedProcess[str]) -> str:
    """Why a variant gave no row, in a few words."""
    if any(words in done.stderr for words in OUT_OF_MEMORY):
        return "out of memory"
    if done.returncode < 0:
        return f"killed by signal {-done.returncode}"
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    return lines[-1][:100] if lines else f"exit status {done.returncode}"


def compare_variants(options: argparse.Namespace, overrides: list[str]) -> None:
    """The table of ``--accelerator``: a process for each variant, one after another."""
    environment = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.95", **os.environ}
    paths = options.config or [
        str(ROOT / "configs" / f"{name}.py") for name in ACCELERATOR_CONFIGS
    ]
    rows: list[dict[str, Any]] = []
    for path, batch in itertools.product(paths, options.batch):
        name, twin = pathlib.Path(path).stem, None
        for variant in VARIANTS:
            print(f"{name}, batch {batch}: {variant}", file=sys.stderr)
            done = subprocess.run(
                [
                    sys.executable,
                    __file__,
                    f"--measure={variant}",
                    f"--config={path}",
                    f"--batch={batch}",
                    f"--context={options.context}",
                    f"--seconds={options.seconds}",
                    f"--passes={options.passes}",
                    *overrides,
                ],
                capture_output=True,
                text=True,
                env=environment,
            )
            row: dict[str, Any] = {"config": name, "batch": batch, "variant": variant}
            if done.returncode:
                row["failed"] = failure(done)
            else:
                row |= json.loads(done.stdout.splitlines()[-1])
                if variant == "twin":
                    twin = row["tokens_per_second"]
                row["of_twin"] = row["tokens_per_second"] / twin if twin else None
            rows.append(row)
    if options.json:
        print(json.dumps(rows))
        return
    devices = sorted({row["device"] for row in rows if "device" in row})
    print(f"\n{', '.join(devices) or 'nothing ran'}, one device;")
    print(f"{options.context} tokens a sequence, medians of {options.passes} passes\n")
    print(
        f"{'':26} {'batch':>5} {'tokens/s':>10} {'spread':>7} {'of twin':>8} {'MFU':>7}"
        f" {'memory':>9} {'first step':>10}"
    )
    for row in rows:
        print(f"{row['config'] + ', ' + row['variant']:26} {row['batch']:5}", end="")
        if "failed" in row:
            print(f"   {row['failed']}")
            continue
        of_twin = f"{row['of_twin']:.2f} x" if row["of_twin"] else "-"
        mfu = f"{row['mfu']:.1%}" if row["mfu"] else "-"
        memory = f"{row['peak_bytes'] / 1e9:.1f} GB" if row["peak_bytes"] else "-"
        print(
            f" {row['tokens_per_second']:10,.0f} {row['spread']:7.1%} {of_twin:>8}"
            f" {mfu:>7} {memory:>9} {row['seconds_to_first_step']:8.1f} s"
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog="Flags --config.KEY=VALUE change the config.",
        allow_abbrev=False,
    )
    parser.add_argument("--config", action="append", help="several for --accelerator")
    parser.add_argument("--passes", type=int, default=7)
    parser.add_argument("--toy", action="store_true", help="seconds: does it run?")
    parser.add_argument("--seconds", type=float, default=3.0, help="per turn, roughly")
    parser.add_argument("--json", action="store_true")
    parser.add_argument(
        "--accelerator", action="store_true", help="variants on a GPU or a TPU"
    )
    parser.add_argument(
        "--batch", type=int, nargs="+", default=[8], help="its sequences a step"
    )
    parser.add_argument("--context", type=int, default=2048, help="and their length")
    parser.add_argument("--worker", choices=list(CONTENDERS), help=argparse.SUPPRESS)
    parser.add_argument("--measure", choices=list(VARIANTS), help=argparse.SUPPRESS)
    options, overrides = parser.parse_known_args()
    for flag in overrides:
        if not (flag.startswith("--config.") and "=" in flag):
            parser.error(f"unknown argument {flag}")
    if options.toy:
        options.config = options.config or [str(ROOT / "configs" / "debug.py")]
        options.passes, options.seconds = 1, 0.01
        options.context = 16
        os.environ["TORCHDYNAMO_DISABLE"] = "1"  # its compiler takes most of a minute
    if options.accelerator:
        compare_variants(options, overrides)
        return
    if len(options.config or []) > 1:
        parser.error("several configs go with --accelerator only")
    path = (options.config or [str(ROOT / "configs" / "small.py")])[0]
    if options.measure:
        measure(options, path, overrides)
        return
    if options.worker:
        serve(options.worker, path, overrides)
        return

    names = list(CONTENDERS)
    if importlib.util.find_spec("torch") is None:
        names.remove("torch")
        print("PyTorch is not installed (pip install torch): left out", file=sys.stderr)
    workers = {}
    for name in names:
        print(f"compiling: {CONTENDERS[name]}", file=sys.stderr)
        workers[name] = Worker(name, path, overrides)
    times: dict[str, list[float]] = {name: [] for name in names}
    counts = {
        n: max(1, int(1e3 * options.seconds / w.milliseconds(1)))
        for n, w in workers.items()
    }
    for i in range(options.passes):
        print(f"pass {i + 1} of {options.passes}", file=sys.stderr)
        for name, worker in workers.items():
            times[name].append(worker.milliseconds(counts[name]))
    for worker in workers.values():
        worker.close()

    config = load_characters(path, overrides)
    tokens = config.batch_size * config.model.max_seq_len
    rows = []
    for name in names:
        # Ratios pass by pass: neighbors in time met the same machine.
        ratios = [own / t for t, own in zip(times["ternary"], times[name], strict=True)]
        rows.append(
            {
                "contender": CONTENDERS[name],
                "ms_per_step": statistics.median(times[name]),
                "tokens_per_second": 1e3 * tokens / statistics.median(times[name]),
                "speed_of_ternary_over_it": statistics.median(ratios),
            }
        )
    if options.json:
        print(json.dumps(rows))
        return
    file = pathlib.Path(path).name
    print(f"\n{file}: {config.batch_size} x {config.model.max_seq_len} tokens a step,")
    print(f"median of {options.passes} passes, {os.cpu_count()} processors\n")
    print(f"{'':28} {'ms/step':>10} {'tokens/s':>10} {'ternary is':>12}")
    for row in rows:
        print(
            f"{row['contender']:28} {row['ms_per_step']:10.1f}"
            f" {row['tokens_per_second']:10,.0f}"
            f" {row['speed_of_ternary_over_it']:10.2f} x"
        )


if __name__ == "__main__":
    main()

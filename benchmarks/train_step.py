"""Speed of a training step: ternary, with the tuner, its twin, and PyTorch.

    python benchmarks/train_step.py                        # the shape of small.py
    python benchmarks/train_step.py --config=configs/medium.py

Each contender trains on random tokens in a process of its own, with AdamW and clipping,
in float32; the processes take turns, pass by pass, so that a drift of the machine's
speed meets them all. PyTorch (``pip install torch``) runs the same architecture with
the same quantizers, see bitnet_torch.py, under torch.compile; it is left out, with a
line that says so, where it is not installed.

GPUs and TPUs: see gpu.py.
"""

import argparse
import importlib.util
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


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog="Flags --config.KEY=VALUE change the config.",
        allow_abbrev=False,
    )
    parser.add_argument("--config", default=str(ROOT / "configs" / "small.py"))
    parser.add_argument("--passes", type=int, default=7)
    parser.add_argument("--toy", action="store_true", help="seconds: does it run?")
    parser.add_argument("--seconds", type=float, default=3.0, help="per turn, roughly")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--worker", choices=list(CONTENDERS), help=argparse.SUPPRESS)
    options, overrides = parser.parse_known_args()
    for flag in overrides:
        if not (flag.startswith("--config.") and "=" in flag):
            parser.error(f"unknown argument {flag}")
    if options.toy:
        options.config = str(ROOT / "configs" / "debug.py")
        options.passes, options.seconds = 1, 0.01
        os.environ["TORCHDYNAMO_DISABLE"] = "1"  # its compiler takes most of a minute
    path = options.config
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

"""The planner's memory beside what the training step really takes, on this CPU.

    python benchmarks/plan.py

``medium`` as it is, ``large`` with a batch of 8, each on one device and cut over four
virtual ones (mesh.fsdp=4). Each is measured in a process of its own: the step is
compiled, what the compiler took goes back to the system, and from there the resident
memory is followed while the state is made and two steps run, as `train.py` runs them:
the peak is that of the second.
The plan is that of all devices together: "compiler" as the compiler counts, "planned"
with the scratch of libraries (`vaani_jax.plan.Memory.scratch`). The tuner is on; its
range test, which holds a second state, is not run.

Then what ``mesh.exchange`` trades, as planned: b3b on 32 devices, with fsdp=32.
"""

import argparse
import ctypes
import dataclasses
import json
import pathlib
import subprocess
import sys
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

# A config, its batch and the number of devices.
CASES = (("medium", 0, 1), ("medium", 0, 4), ("large", 8, 1), ("large", 8, 4))
TOY = (("debug", 0, 2),)
EXCHANGES = "step", "micro_batch"


def resident(key: str) -> int:
    """Bytes of memory of this process: VmRSS, or VmHWM for its peak."""
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    line = next(line for line in lines if line.startswith(f"{key}:"))
    return 1024 * int(line.split()[1])


def measure(name: str, batch: int, devices: int) -> None:
    """The worker: prints the planned and the measured bytes as JSON."""
    import jax

    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", devices)
    import numpy as np

    from vaani_jax.cli.flags import config_from_flags
    from vaani_jax.devices.memory import keep_freed_memory
    from vaani_jax.devices.mesh import make_mesh, place
    from vaani_jax.plan import compile_step, make_plan
    from vaani_jax.train.program import make_program

    keep_freed_memory()
    path = ROOT / "configs" / f"{name}.py"
    config = config_from_flags([f"--config={path}"]).config
    model = dataclasses.replace(config.model, vocab_size=config.model.vocab_size or 256)
    config = dataclasses.replace(
        config,
        model=model,
        batch_size=batch or config.batch_size,
        num_steps=1000,
        mesh=dataclasses.replace(config.mesh, fsdp=devices),
    )
    plan = make_plan(config)
    mesh = make_mesh(config.mesh)
    program = make_program(config, mesh, config.num_steps)
    step = compile_step(program, config, mesh)
    rng = np.random.default_rng(0)
    shape = (config.batch_size, model.max_seq_len + 1)
    tokens = rng.integers(0, model.vocab_size, shape, dtype=np.int32)
    with jax.set_mesh(mesh):
        first_state: Any = program.first_state  # jitted
        make = first_state.lower().compile()
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        before = resident("VmRSS")
        state, held = make(), place(tokens, program.batch)
        state, metrics = step(state, held)
        assert np.isfinite(float(metrics["train/loss"]))
        pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        state, metrics = step(state, held)
        metrics["train/loss"].block_until_ready()
    row = {
        "compiler": devices * plan.memory.step,
        "planned": devices * plan.memory.cpu_step,
        "measured": resident("VmHWM") - before,
    }
    print(json.dumps(row))


def exchange(toy: bool) -> list[dict[str, Any]]:
    """GB that a device receives in a step and holds, for each ``mesh.exchange``."""
    rows = []
    name, devices = ("debug", 2) if toy else ("b3b", 32)
    for kind in EXCHANGES:
        command = [sys.executable, "-m", "vaani_jax", "plan", "--json", "--chip=H100"]
        flags = {"mesh.fsdp": devices, "mesh.exchange": kind}
        if toy:
            flags |= {"optim.accumulation_steps": 2, "model.vocab_size": 256}
        done = subprocess.run(
            [
                *command,
                f"--config={ROOT / 'configs' / name}.py",
                f"--devices={devices}",
                *(f"--config.{key}={value}" for key, value in flags.items()),
            ],
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise SystemExit(f"the planner failed:\n{done.stderr[-2000:]}")
        plan = json.loads(done.stdout)
        sums = dict.fromkeys(("all-reduce f32", "all-gather u8"), 0.0)
        for sent in plan["exchanges"]:
            key = f"{sent['kind']} {sent['dtype']}"
            if key in sums:
                whole = sent["nbytes"] * sent["times"] * (1 - 1 / sent["group"])
                sums[key] += whole * (1 + (sent["kind"] == "all-reduce"))
        gradients, codes = sums.values()
        rows.append(
            {
                "exchange": kind,
                "gradients": gradients / 1e9,
                "codes": codes / 1e9,
                "received": plan["received"] / 1e9,
                "memory": plan["memory"]["step"] / 1e9,
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--toy", action="store_true", help="seconds: does it run?")
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        name, batch, devices = options.worker
        measure(name, int(batch), int(devices))
        return
    rows: list[dict[str, Any]] = []
    for case in TOY if options.toy else CASES:
        print(f"measuring {case[0]} on {case[2]} devices", file=sys.stderr)
        done = subprocess.run(
            [sys.executable, __file__, "--worker", *map(str, case)],
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise SystemExit(f"the worker failed:\n{done.stderr[-2000:]}")
        row = json.loads(done.stdout.splitlines()[-1])
        name, batch, devices = case
        rows.append({"config": name, "batch": batch, "devices": devices, **row})
    traded = exchange(options.toy)
    if options.json:
        print(json.dumps({"memory": rows, "exchange": traded}))
        return
    titles = "compiler", "planned", "measured", "ratio"
    print(f"{'MB, all devices':24}" + "".join(f"{title:>10}" for title in titles))
    for row in rows:
        title = f"{row['config']}, {row['devices']} device(s)"
        print(
            f"{title:24}{row['compiler'] / 1e6:10.0f}{row['planned'] / 1e6:10.0f}"
            f"{row['measured'] / 1e6:10.0f}{row['planned'] / row['measured']:10.2f}"
        )
    print()
    print("GB a step".ljust(14) + "".join(f"{key:>12}" for key in [*traded[0]][1:]))
    for row in traded:
        kind, *numbers = row.values()
        print(f"{kind:14}" + "".join(f"{number:12.2f}" for number in numbers))


if __name__ == "__main__":
    main()

"""What the tuner is worth: learning rates, sparsity targets, accidents.

    python benchmarks/tuner.py --data=tinyshakespeare.txt          # about an hour
    python benchmarks/tuner.py --data=FILE --shape=2x64x192x32 --seeds=0 --parts=robust

Every run trains configs/small.py (or another --shape) for --steps steps in a process of
its own, on one core each, as many at a time as there are cores, and reports the loss
on all held-out windows. Finished runs are kept in --results and not run again. Parts:

* robust: starting learning rates over five decades with and without the tuner, "auto",
  and a grid around the best;
* others: learning-rate-free and schedule-free optimizers of optax.contrib;
* sparsity: from three thresholds to two bands of zeros;
* rescue: the learning rate times 100 for 20 steps in mid-run, and a batch that makes
  the loss NaN;
* full: "auto" and the worst start of "robust" at 2000 steps, with a grid as long.
"""

import argparse
import concurrent.futures
import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import queue
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from typing import Any
from unittest import mock

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

STARTS = [1e-5, 1e-4, 1e-3, 1e-2, 1e-1]
GRID = [3e-3, 6e-3, 1e-2, 1.5e-2, 2e-2, 3e-2]
FULL_GRID = [6e-3, 1.2e-2, 2.4e-2]  # longer runs want lower learning rates
OTHERS = {  # name: learning rates; 1 is "by itself"
    "prodigy": [1.0],
    "dadapt_adamw": [1.0],
    "schedule_free_adamw": [2.5e-3, 1e-2],
}
THRESHOLDS = [0.1, 0.5, 2.0]
BANDS = [(0.3, 0.4), (0.5, 0.6)]
FAULTS = ["rate", "nan"]
SETTLE = 200  # steps until the band must be reached
Job = dict[str, Any]

# -- One run, in a process of its own ---------------------------------------------


def load_config(job: Job) -> Any:
    """The config of a job."""
    from vaani_jax.cli.flags import config_from_flags
    from vaani_jax.train.config import from_dict

    path = str(ROOT / "configs" / "small.py")
    sys.argv = ["train.py", f"--config={path}"]
    values = config_from_flags(sys.argv[1:]).config.to_dict()
    steps = job["steps"]
    values |= {
        "num_steps": steps,
        "seed": job["seed"],
        "learning_rate": job["rate"],
        "use_tuner": job["tuner"],
        "eval_interval": steps // 4,
        "save_interval": 100,
        "sample_interval": 0,
        "log_interval": 1 if "band" in job else 10,
    }
    if "band" in job:
        values["target_sparsity_min"], values["target_sparsity_max"] = job["band"]
    values["model"]["threshold"] = job.get("threshold", 0.5)
    layers, dim, ffn, context = job["shape"]
    values["model"] |= {
        "n_layers": layers,
        "dim": dim,
        "n_heads": max(1, dim // 32),
        "ffn_dim": ffn,
        "max_seq_len": context,
    }
    if job.get("optimizer") == "adamw":
        values["optim"] |= {"name": "adamw", "weight_decay": 0.1}
    values["data"] |= {"path": job["data"], "fallback": False}
    values["sample"]["max_new_tokens"] = 1
    return from_dict(values)


@contextlib.contextmanager
def accident(kind: str, steps: int) -> Iterator[None]:
    """Makes something go wrong in the middle of a run."""
    import jax.numpy as jnp

    from vaani_jax.data.batches import Batches
    from vaani_jax.train import program
    from vaani_jax.train.schedules import Schedule

    middle = steps // 2

    class Multiplied(Schedule):
        def decay(self, step: Any) -> Any:
            hit = (step >= middle) & (step < middle + 20)
            return super().decay(step) * jnp.where(hit, 100.0, 1.0)

    batch_at = Batches.batch_at

    def poisoned(self: Batches, step: int) -> Any:
        tokens = batch_at(self, step)
        # An id past the vocabulary embeds as NaN.
        return tokens * 0 + 1_000_000 if step == middle else tokens

    if kind == "rate":
        with mock.patch.object(program, "Schedule", Multiplied):
            yield
    elif kind == "nan":
        with mock.patch.object(Batches, "batch_at", poisoned):
            yield
    else:
        yield


def run_vaani(job: Job) -> dict[str, Any]:
    from rich.console import Console

    from vaani_jax.errors import VaaniError
    from vaani_jax.train.loop import train

    config = load_config(job)
    with (
        tempfile.TemporaryDirectory() as folder,
        open(os.devnull, "w") as sink,
        accident(job.get("fault", ""), job["steps"]),
    ):
        workdir = pathlib.Path(folder) / "run"
        try:
            result = train(config, workdir, console=Console(file=sink))
        except VaaniError as error:
            return {"loss": float("nan"), "error": str(error)}
        assert result is not None
        answer: dict[str, Any] = {"loss": result.loss}
        if (workdir / "tuner.jsonl").exists():
            text = (workdir / "tuner.jsonl").read_text()
            events = [json.loads(line) for line in text.splitlines()]
            answer["events"] = [
                e for e in events if e["setting"] in ("learning_rate", "step", "state")
            ]
            answer["cuts"] = sum(
                e["setting"] == "learning_rate_factor" and e["new"] < e["old"]
                for e in events
            )
        if "band" in job:
            answer |= band_kept(workdir / "metrics.jsonl", job["band"])
    return answer


def band_kept(path: pathlib.Path, band: tuple[float, float]) -> dict[str, Any]:
    """When every layer first was in the band, and the share of later steps in it."""
    inside = {}
    for line in path.read_text().splitlines():
        row = json.loads(line)
        zeros = [v for k, v in row.items() if k.startswith("quant/sparsity/")]
        if zeros:
            inside[int(row["step"])] = all(band[0] <= z <= band[1] for z in zeros)
    reached = min((s for s, ok in inside.items() if ok), default=None)
    later = [ok for step, ok in inside.items() if step > SETTLE]
    return {"reached": reached, "kept": sum(later) / len(later)}


def run_other(job: Job) -> dict[str, Any]:
    """An optimizer of optax.contrib in the place of ours, with the same schedule."""
    import jax
    import optax
    from optax import contrib

    from vaani_jax.data.batches import Batches
    from vaani_jax.data.corpus import make_tokenizer, split_tokens
    from vaani_jax.data.sources import load_corpus
    from vaani_jax.devices.memory import keep_freed_memory
    from vaani_jax.evaluate.loss import make_eval_step, validation_set
    from vaani_jax.train.schedules import Schedule
    from vaani_jax.train.state import init_state
    from vaani_jax.train.steps import make_train_step

    keep_freed_memory()
    config, name = load_config(job), job["optimizer"]
    corpus = load_corpus(config.data)
    tokenizer = make_tokenizer(config.data, corpus)
    architecture = dataclasses.replace(config.model, vocab_size=tokenizer.vocab_size)
    config = dataclasses.replace(config, model=architecture)
    model, length = config.vaani, architecture.max_seq_len
    split = split_tokens(config.data, corpus, tokenizer, length)
    batches = Batches(
        split.train,
        seq_len=length,
        batch_size=config.batch_size,
        seed=config.seed,
    )
    optim = config.optim
    if name == "schedule_free_adamw":  # it averages in the place of a decay
        optim = dataclasses.replace(optim, schedule="constant")

    def build(learning_rate: Any, weight_decay: Any, clip_norm: Any) -> Any:
        make = getattr(contrib, name)
        options = {"weight_decay": weight_decay}
        if name == "schedule_free_adamw":
            options |= {"b2": 0.95}
        return optax.chain(
            optax.clip_by_global_norm(clip_norm), make(learning_rate, **options)
        )

    optimizer = optax.inject_hyperparams(build)(
        learning_rate=1.0, weight_decay=optim.weight_decay, clip_norm=optim.clip_norm
    )
    schedule = Schedule(optim, job["rate"], config.num_steps)
    step = jax.jit(make_train_step(model, optimizer, schedule), donate_argnums=0)
    state = jax.jit(lambda: init_state(model, optimizer, config.seed))()
    for i in range(config.num_steps):
        state, metrics = step(state, batches.batch_at(i))
        metrics["train/loss"].block_until_ready()
    params = state.params
    if name == "schedule_free_adamw":
        inner = state.opt_state.inner_state[1]
        params = contrib.schedule_free_eval_params(inner, params)
    result = validation_set(architecture, split, tokenizer).evaluate(
        jax.jit(make_eval_step(model)), {"params": params, "quant": state.quant}
    )
    assert result is not None
    return {"loss": result.loss}


def answer_to(job: Job) -> dict[str, Any]:
    began = time.perf_counter()
    other = job.get("optimizer") in OTHERS
    answer = run_other(job) if other else run_vaani(job)
    return answer | {"seconds": round(time.perf_counter() - began, 1)}


# -- All runs -----------------------------------------------------------------------


class Results:
    """Answers by job, kept in a file that a second call goes on with."""

    def __init__(self, path: pathlib.Path) -> None:
        self._path, self._lock = path, threading.Lock()
        self._known = {}
        if path.exists():
            for line in path.read_text().splitlines():
                entry = json.loads(line)
                self._known[self._key(entry["job"])] = entry["answer"]

    @staticmethod
    def _key(job: Job) -> str:
        return json.dumps(job, sort_keys=True)

    def get(self, job: Job) -> dict[str, Any] | None:
        return self._known.get(self._key(json.loads(json.dumps(job))))

    def put(self, job: Job, answer: dict[str, Any]) -> None:
        with self._lock:
            self._known[self._key(json.loads(json.dumps(job)))] = answer
            with self._path.open("a") as file:
                file.write(json.dumps({"job": job, "answer": answer}) + "\n")

    def median(self, jobs: list[Job]) -> float:
        """Median loss; a run that ended with an error counts as infinite."""
        losses = []
        for job in jobs:
            answer = self.get(job)
            assert answer is not None
            loss = answer["loss"]
            losses.append(loss if loss == loss else float("inf"))
        return statistics.median(losses)


def run_here(jobs: list[Job], results: Results) -> None:
    """One after another in this process, which keeps what it compiled."""
    for job in jobs:
        if results.get(job) is None:
            results.put(job, answer_to(job))


def run_all(jobs: list[Job], results: Results, processes: int) -> None:
    jobs = [job for job in jobs if results.get(job) is None]
    cores: queue.Queue[int | None] = queue.Queue()
    available = (
        sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    )
    for i in range(processes):
        cores.put(available[i % len(available)] if available else None)
    began, done = time.perf_counter(), 0
    cache = tempfile.mkdtemp(prefix="vaani-compiled-")

    def one(job: Job) -> None:
        nonlocal done
        core = cores.get()
        pin = None if core is None else (lambda: os.sched_setaffinity(0, {core}))
        try:
            process = subprocess.run(
                [sys.executable, __file__, "--job", json.dumps(job)],
                stdout=subprocess.PIPE,
                text=True,
                preexec_fn=pin,
                env={**os.environ, "JAX_COMPILATION_CACHE_DIR": cache},
            )
        finally:
            cores.put(core)
        if process.returncode:
            raise SystemExit(f"a run failed, its error is above: {job}")
        answer = json.loads(process.stdout.splitlines()[-1])
        results.put(job, answer)
        done += 1
        left = (time.perf_counter() - began) / done * (len(jobs) - done)
        about = {k: v for k, v in job.items() if k not in ("data", "shape", "steps")}
        print(
            f"{done}/{len(jobs)}  loss {answer['loss']:.4f}  {answer['seconds']:.0f} s"
            f"  {about}  {left / 60:.0f} min left",
            file=sys.stderr,
            flush=True,
        )

    with concurrent.futures.ThreadPoolExecutor(processes) as pool:
        for future in [pool.submit(one, job) for job in jobs]:
            future.result()


@dataclasses.dataclass(frozen=True)
class Sweep:
    """Builds the jobs of the table."""

    shape: tuple[int, ...]
    data: str
    seeds: tuple[int, ...]
    steps: int

    def jobs(self, rate: Any, *, tuner: bool, **more: Any) -> list[Job]:
        common = {
            "shape": self.shape,
            "data": self.data,
            "steps": self.steps,
            "rate": rate,
            "tuner": tuner,
        }
        return [{**common, "seed": seed, **more} for seed in self.seeds]

    def grid(self) -> dict[float, list[Job]]:
        return {r: self.jobs(r, tuner=False) for r in sorted({*STARTS, *GRID})}

    def tuned(self) -> dict[Any, list[Job]]:
        return {r: self.jobs(r, tuner=True) for r in ["auto", *STARTS]}

    def others(self) -> dict[str, list[list[Job]]]:
        return {
            name: [self.jobs(r, tuner=False, optimizer=name) for r in rates]
            for name, rates in OTHERS.items()
        }

    def bands(self) -> dict[Any, list[Job]]:
        return {
            (threshold, band): self.jobs(
                "auto", tuner=True, threshold=threshold, band=band
            )
            for threshold in THRESHOLDS
            for band in BANDS
        }

    def accidents(self) -> dict[Any, list[Job]]:
        return {
            (fault, tuner): self.jobs(1e-2, tuner=tuner, fault=fault)
            for fault in FAULTS
            for tuner in (True, False)
        }


def flat(groups: Any) -> list[Job]:
    if isinstance(groups, dict):
        groups = groups.values()
    return [j for g in groups for j in ([g] if isinstance(g, dict) else flat(g))]


def versus(loss: float, best: float) -> str:
    return f"{loss:8.4f}  {100 * (loss / best - 1):+6.1f} %"


def report(sweep: Sweep, results: Results, parts: list[str]) -> None:
    median = results.median
    if {"robust", "others"} & set(parts):
        grid = {rate: median(jobs) for rate, jobs in sweep.grid().items()}
        rate, best = min(grid.items(), key=lambda item: item[1])
        print(f"\nBest of the grid without the tuner: {best:.4f} at {rate:g}")
    if "robust" in parts:
        tuned = {rate: median(jobs) for rate, jobs in sweep.tuned().items()}
        print(f"\n{'learning rate':>14} {'without':>20} {'with the tuner':>20}")
        rates: list[Any] = ["auto", *sorted(grid)]
        for rate in rates:
            own = versus(grid[rate], best) if rate in grid else "-"
            ours = versus(tuned[rate], best) if rate in tuned else ""
            print(f"{rate!s:>14} {own:>20} {ours:>20}")
        worst = max(loss for rate, loss in tuned.items() if rate != "auto")
        spread = max(grid[rate] for rate in STARTS)
        print(f"worst start: {versus(spread, best)} without,", end=" ")
        print(f"{versus(worst, best)} with the tuner (bar: +3 %);")
        print(f"auto {versus(tuned['auto'], best)} (bar: +1 %)")
    if "others" in parts:
        print()
        for name, choices in sweep.others().items():
            loss = min(median(jobs) for jobs in choices)
            print(f"{name:>20} {versus(loss, best)}")
        print(f"{'ours, auto':>20} {versus(median(sweep.tuned()['auto']), best)}")
    if "sparsity" in parts:
        base = median(sweep.tuned()["auto"])
        print("\nShare of zeros: every layer in the band within 200 steps, and after")
        print(f"{'threshold':>10} {'band':>12} {'reached':>8} {'kept':>7}  loss")
        for (threshold, band), jobs in sweep.bands().items():
            answers = [results.get(job) for job in jobs]
            reached = [a["reached"] if a["reached"] else 10**9 for a in answers if a]
            kept = min(a["kept"] for a in answers if a)
            print(
                f"{threshold:10} {band[0]:>5} - {band[1]:<4} {max(reached):>8}"
                f" {kept:7.1%} {versus(median(jobs), base)}"
            )
    if "rescue" in parts:
        print("\nAccidents in mid-run, against the undisturbed run with the tuner")
        calm = median(sweep.tuned()[1e-2])
        for (fault, tuner), jobs in sweep.accidents().items():
            name = {"rate": "learning rate x 100, 20 steps", "nan": "NaN batch"}[fault]
            with_ = "with" if tuner else "without"
            print(f"{name:>32} {with_:>8} {versus(median(jobs), calm)}")


def full_length(sweep: Sweep, results: Results) -> dict[str, list[Job]]:
    """The runs of 2000 steps: a grid, "auto", and the worst start of the short ones."""
    tuned = {r: results.median(j) for r, j in sweep.tuned().items() if r != "auto"}
    worst = max(tuned, key=tuned.__getitem__)
    longer = dataclasses.replace(sweep, steps=2000)
    return {
        **{f"without, {r:g}": longer.jobs(r, tuner=False) for r in FULL_GRID},
        "auto": longer.jobs("auto", tuner=True),
        f"with, from {worst:g}": longer.jobs(worst, tuner=True),
    }


def use_toy_sizes() -> None:
    """One of each kind of run."""
    global STARTS, GRID, THRESHOLDS, BANDS, SETTLE
    STARTS, GRID, THRESHOLDS, BANDS = [1e-2], [1e-2], [0.5], [(0.3, 0.4)]
    SETTLE = 8
    del OTHERS["prodigy"], OTHERS["dadapt_adamw"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="", help="text; default: Tiny Shakespeare")
    parser.add_argument(
        "--shape", default="4x128x320x64", help="layers x dim x ffn x T"
    )
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--parts", default="robust,others,sparsity,rescue,full")
    parser.add_argument("--results", default="", help="file to keep finished runs in")
    parser.add_argument("--toy", action="store_true", help="seconds: does it run?")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.job:
        print(json.dumps(answer_to(json.loads(options.job))))
        return
    if options.toy:
        use_toy_sizes()
        options.shape, options.seeds, options.steps = "1x32x64x16", "0", 24
        options.parts = "robust,others,sparsity,rescue"
        options.data = options.data or str(ROOT / "README.md")
    data = options.data and str(pathlib.Path(options.data).resolve())
    sweep = Sweep(
        shape=tuple(map(int, options.shape.split("x"))),
        data=data,
        seeds=tuple(map(int, options.seeds.split(","))),
        steps=options.steps,
    )
    mark = hashlib.sha256(f"{data}{sweep}".encode()).hexdigest()[:8]
    default = pathlib.Path(tempfile.gettempdir()) / f"vaani-tuner-{mark}.jsonl"
    kept = pathlib.Path(options.results) if options.results else default
    if options.toy:  # nothing of an earlier call: it shows that each kind still runs
        kept = pathlib.Path(tempfile.mkdtemp(prefix="vaani-tuner-")) / "results.jsonl"
    results = Results(kept)
    parts = options.parts.split(",")
    jobs = []
    if {"robust", "others", "full"} & set(parts):
        jobs += flat(sweep.grid()) + flat(sweep.tuned())
    if "others" in parts:
        jobs += flat(sweep.others())
    if "sparsity" in parts:
        jobs += flat(sweep.tuned()["auto"]) + flat(sweep.bands())
    if "rescue" in parts:
        jobs += sweep.tuned()[1e-2] + flat(sweep.accidents())
    unique = list({json.dumps(job): job for job in jobs}.values())
    if options.toy:
        run_here(unique, results)
    else:
        run_all(unique, results, options.processes)
    print(f"{options.shape}, {sweep.steps} steps, seeds {options.seeds}: median losses")
    report(sweep, results, parts)
    if "full" in parts:
        named = full_length(sweep, results)
        run_all(flat(named), results, options.processes)
        losses = {name: results.median(group) for name, group in named.items()}
        reference = min(v for k, v in losses.items() if k.startswith("without"))
        print("\nAt 2000 steps")
        for name, loss in losses.items():
            print(f"{name:>20} {versus(loss, reference)}")


if __name__ == "__main__":
    main()

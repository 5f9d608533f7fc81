"""What each type of cache costs in quality, and how fast a long one is read.

    python benchmarks/kv_cache.py --text tinyshakespeare.txt       # about half an hour
    python benchmarks/kv_cache.py --workdir runs/long              # of a run there is
    python benchmarks/kv_cache.py --parts speed

* quality: a model is trained (configs/small.py with a context of 512) and reads the
  held-out end of its text through each cache, in pieces; its loss, and greedy texts of
  prompts from there beside those with a float32 cache.
* speed: attention of one token to 65,536 slots, 16 heads of 128 in 8 groups, beside the
  bandwidth that machine.cc reads memory with. Each row is the best of several calls.

``--output FILE`` keeps the tables as JSON.
"""

import argparse
import contextlib
import datetime
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from decode import machine, pinned
from rich.console import Console
from rich.table import Table

from vaani_jax.inference.generate import generate
from vaani_jax.inference.model import Model, load, pack_model
from vaani_jax.inference.room import cache_bytes
from vaani_jax.inference.sampling import SamplerConfig
from vaani_jax.kernels import cpu
from vaani_jax.kernels.floats import log_likelihood
from vaani_jax.model import codes
from vaani_jax.model.cache import DTYPES, KVCache

ROOT = pathlib.Path(__file__).resolve().parent.parent
BARE = "int4, not centered"
QUALITY = ["cache", "bytes a token", "loss", "more", "perplexity", "texts", "same for"]
SPEED = ["cache", "threads", "MB", "ms", "GB/s", "of read"]
WINDOWS, PIECE = 32, 128  # held-out texts, and what of them is read at a time
PROMPTS, PROMPT, NEW = 64, 64, 256
SLOTS, HEADS, KV_HEADS, SIZE = 65_536, 16, 8, 128
REPEATS = 15


def use_toy_sizes() -> None:
    """Seconds: does it run?"""
    global WINDOWS, PIECE, PROMPTS, PROMPT, NEW, SLOTS, REPEATS
    WINDOWS, PIECE, PROMPTS, PROMPT, NEW = 2, 32, 3, 8, 16
    SLOTS, REPEATS = 2048, 2


# -- Quality -------------------------------------------------------------------------


def trained(text: str, steps: int, context: int, folder: str) -> str:
    """The workdir of a run, as `train.py` makes it."""
    workdir = f"{folder}/run"
    command = [sys.executable, str(ROOT / "train.py"), f"--workdir={workdir}"]
    command += [f"--config={ROOT}/configs/small.py", f"--config.data.path={text}"]
    command += [f"--config.num_steps={steps}", "--config.use_tuner=False"]
    command += [f"--config.model.max_seq_len={context}"]
    subprocess.run(command, check=True, stdout=sys.stderr)
    return workdir


@contextlib.contextmanager
def not_centered() -> Iterator[None]:
    """Centers of zero, in what is compiled from here on."""

    def nothing(keys: Any, rotary: Any) -> Any:
        del rotary
        return jnp.zeros_like(keys[:, 0])

    jax.clear_caches()
    with mock.patch.object(codes, "_next_center", nothing):
        yield
    jax.clear_caches()


def read_through(model: Model, tokens: np.ndarray, dtype: str) -> float:
    """Loss in nats of tokens [B, T + 1], read through a cache in pieces."""
    module, length = model.module, tokens.shape[1] - 1

    @jax.jit
    def step(variables: Any, given: Any, following: Any, cache: Any) -> Any:
        logits, cache = module.apply(variables, given, cache)
        return log_likelihood(logits, following).sum(), cache

    cache = KVCache.create(module.architecture, len(tokens), length, dtype)
    total = 0.0
    for i in range(0, length, PIECE):
        part = tokens[:, i : min(length, i + PIECE) + 1]
        found, cache = step(model.variables, part[:, :-1], part[:, 1:], cache)
        total -= float(found)
    return total / (len(tokens) * length)


def quality(workdir: str, text: str) -> list[list[str]]:
    """Rows of the table."""
    model = pack_model(load(workdir))
    a = model.architecture
    ids = model.tokenizer.encode(pathlib.Path(text).read_text(encoding="utf-8"))
    held_out = np.asarray(ids[-len(ids) // 10 :], np.int32)
    length = (a.max_seq_len - 1) // PIECE * PIECE or a.max_seq_len - 1
    spread = np.linspace(0, len(held_out) - length - 1, WINDOWS).astype(int)
    windows = np.stack([held_out[i : i + length + 1] for i in spread])
    spread = np.linspace(0, len(held_out) - PROMPT, PROMPTS).astype(int)
    prompts = [held_out[i : i + PROMPT] for i in spread]

    def of(dtype: str) -> tuple[float, np.ndarray]:
        greedy = SamplerConfig(temperature=0.0)
        texts = generate(
            model, prompts, max_new_tokens=NEW, sampler=greedy, kv_dtype=dtype
        )
        return read_through(model, windows, dtype), texts

    found = {name: of(name) for name in DTYPES}
    with not_centered():
        found[BARE] = of("int4")
    loss, texts = found["float32"]
    rows = []
    for name, (own, other) in found.items():
        dtype = "int4" if name == BARE else name
        each = cache_bytes(a, 1, 2**16, dtype) / 2**16
        same = other == texts
        until = np.where(same.all(axis=1), same.shape[1], same.argmin(axis=1))
        rows.append(
            [
                name,
                f"{each:,.0f}",
                f"{own:.4f}",
                f"{own - loss:+.4f}",
                f"{np.exp(own):.4f}",
                f"{same.all(axis=1).mean():.0%}",
                f"{until.mean():.0f} of {NEW} tokens",
            ]
        )
    return rows


# -- Speed ---------------------------------------------------------------------------


def layer(dtype: str) -> tuple[Any, ...]:
    """One layer of a full cache, as `KVCache.layers` has it: random numbers."""
    from vaani_jax.model.config import Architecture

    a = Architecture(
        dim=HEADS * SIZE, n_heads=HEADS, n_kv_heads=KV_HEADS, n_layers=1, vocab_size=2
    )
    (parts,) = KVCache.create(a, 1, SLOTS, dtype).layers
    rng = np.random.default_rng(0)
    found = []
    for part in parts:
        if part.dtype in (jnp.int8, jnp.uint8):
            found.append(jnp.asarray(rng.integers(0, 100, part.shape), part.dtype))
        else:
            found.append(jnp.asarray(rng.normal(size=part.shape), part.dtype))
    return tuple(found)


def seconds(dtype: str) -> tuple[int, float]:
    """Bytes of a layer, and the best time of one token's attention to it."""
    parts = layer(dtype)
    rng = np.random.default_rng(1)
    q = jnp.asarray(rng.normal(size=(1, 1, HEADS, SIZE)), jnp.float32)
    at, start = jnp.int32(SLOTS - 1), jnp.zeros(1, jnp.int32)
    attend = jax.jit(cpu.attention)
    best = float("inf")
    for _ in range(REPEATS):
        began = time.perf_counter()
        jax.block_until_ready(attend(q, parts[0], parts[1], at, start, parts[2:]))
        best = min(best, time.perf_counter() - began)
    return sum(part.nbytes for part in parts), best


def speed(threads: list[int], toy: bool) -> list[list[str]]:
    """Rows of the table: each number of threads in a process of its own."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for count in threads:
            read = machine(count, pathlib.Path(folder)).get("read_GB/s", float("nan"))
            command = [sys.executable, __file__, "--work", *(["--toy"] if toy else [])]
            environment = {**os.environ, "PYTHONPATH": str(ROOT)}
            done = subprocess.run(
                pinned(command, count),
                stdout=subprocess.PIPE,
                text=True,
                check=True,
                env=environment,
            )
            rows.append(["a plain read", str(count), "", "", f"{read:.1f}", ""])
            for dtype, (size, best) in json.loads(done.stdout.splitlines()[-1]).items():
                rate = size / best / 1e9
                cells = [f"{size / 1e6:.0f}", f"{1e3 * best:.2f}", f"{rate:.1f}"]
                rows.append([dtype, str(count), *cells, f"{rate / read:.0%}"])
    return rows


# -- The tables ----------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--text", default="", help="to train on, and to be read")
    parser.add_argument("--workdir", default="", help="of a run on that text")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--parts", default="quality,speed")
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--output", default="", help="a JSON file for the tables")
    parser.add_argument("--machine", default="this machine", help="its name there")
    parser.add_argument("--toy", action="store_true", help="seconds: does it run?")
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.toy:
        use_toy_sizes()
        options.text = options.text or str(ROOT / "docs" / "faq.md")
        options.steps, options.context, options.threads = 20, 128, "1"
    if options.work:
        print(json.dumps({dtype: seconds(dtype) for dtype in DTYPES}))
        return
    parts = options.parts.split(",")
    tables: dict[str, Any] = {}
    if "quality" in parts:
        if not options.text:
            parser.error("--text FILE is what the model is trained on, and reads")
        with tempfile.TemporaryDirectory() as folder:
            workdir = options.workdir or trained(
                options.text, options.steps, options.context, folder
            )
            rows = quality(workdir, options.text)
        tables["quality"] = {"columns": QUALITY, "rows": rows}
    if "speed" in parts:
        threads = [int(count) for count in options.threads.split(",")]
        tables["speed"] = {"columns": SPEED, "rows": speed(threads, options.toy)}
    for name, table in tables.items():
        shown = Table(title=name, title_justify="left")
        for i, column in enumerate(table["columns"]):
            shown.add_column(column, justify="right" if i else "left")
        for row in table["rows"]:
            shown.add_row(*row)
        Console(width=100).print(shown)
    if options.output:
        content = {
            "about": f"quality: a model of configs/small.py with a context of"
            f" {options.context}, {options.steps} steps; speed: attention of one token"
            f" to {SLOTS:,} slots, {HEADS} heads of {SIZE} in {KV_HEADS} groups",
            "command": "python benchmarks/kv_cache.py --text tinyshakespeare.txt",
            "machine": options.machine,
            "date": f"{datetime.date.today():%Y-%m-%d}",
            "tables": tables,
        }
        text = json.dumps(content, indent=1) + "\n"
        pathlib.Path(options.output).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()

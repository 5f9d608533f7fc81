"""What llama.cpp makes of an export: perplexity and greedy text beside ours.

    python -m pip install llama-cpp-python -r requirements-interop.txt
    python train.py --config=configs/gguf.py
    python benchmarks/gguf_parity.py --workdir runs/gguf

Perplexity over the non-overlapping windows of the held-out text (``--windows`` of them;
0 takes all), and greedy text for ``--prompts`` prompts at equal distances in them.
llama.cpp rounds activations per block of 256 (TQ types) or 32 (Q2_0, Q8_0), not per
token, or not at all (F16), so that its figures come near ours without being them; where
a text parts from ours, the last column says by how much our own logits preferred ours.
"positions" are those of the windows where llama.cpp finds another token likeliest: the
figure to go by, as ten prompts say little. Exits with status 1 where a bar is missed:
1 % of perplexity, nine prompts of ten.

The AMX code of llama-cpp-python 0.3.36 crashed on any Q8_0 file, also one that gguf
quantized; compiled for AVX-512 without AMX, it runs them.
"""

import argparse
import importlib.util
import itertools
import math
import os
import pathlib
import sys
import tempfile
from typing import Any

import jax
import numpy as np
from rich.console import Console

from vaani_jax.cli.flags import config_from_flags
from vaani_jax.data.batches import validation_windows
from vaani_jax.data.config import DataConfig
from vaani_jax.data.corpus import split_tokens
from vaani_jax.data.sources import load_corpus
from vaani_jax.evaluate.loss import ValidationSet, make_eval_step
from vaani_jax.inference.generate import generate
from vaani_jax.inference.model import load
from vaani_jax.inference.sampling import SamplerConfig
from vaani_jax.interop.convert import export_model
from vaani_jax.settings import build
from vaani_jax.train.loop import train

ROOT = pathlib.Path(__file__).resolve().parent.parent
PROMPT, NEW = 16, 32


def perplexity(
    llm: Any, windows: np.ndarray, likeliest: np.ndarray
) -> tuple[float, float]:
    """Of llama.cpp, over windows [n, length + 1].

    Also the share of positions where the likeliest token is not ours [n, length].
    """
    total = 0.0
    other = 0
    for window, expected in zip(windows, likeliest, strict=True):
        llm.reset()
        llm.eval(window[:-1].tolist())
        logits = np.asarray(llm.scores[: len(window) - 1], np.float64)
        top = logits.max(axis=-1)
        other += int((logits.argmax(axis=-1) != expected).sum())
        norm = top + np.log(np.exp(logits - top[:, None]).sum(axis=-1))
        total += float((norm - logits[np.arange(len(norm)), window[1:]]).sum())
    return math.exp(total / likeliest.size), other / likeliest.size


def continuation(llm: Any, prompt: np.ndarray) -> list[int]:
    """The greedy text of llama.cpp, as ids."""
    llm.reset()
    llm.eval(prompt.tolist())
    found: list[int] = []
    for _ in range(NEW):
        found.append(int(np.argmax(llm.scores[llm.n_tokens - 1])))
        llm.eval(found[-1:])
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", default="", help="of the run")
    parser.add_argument("--toy", action="store_true", help="seconds: does it run?")
    parser.add_argument("--types", default="q2_0,tq2_0,tq1_0,q8_0,f16")
    parser.add_argument("--embeddings", default="float32", help="float16,float32")
    parser.add_argument("--prompts", type=int, default=10)
    parser.add_argument("--windows", type=int, default=400)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if options.toy:
            options.types, options.prompts, options.windows = "tq2_0,f16", 2, 4
            options.workdir = options.workdir or make_toy(pathlib.Path(folder))
        if not options.workdir:
            parser.error("the following arguments are required: --workdir")
        return compare(options)


def make_toy(folder: pathlib.Path) -> str:
    """A run of two steps, as wide as a block of GGUF's ternary types."""
    flags = [
        f"--config={ROOT / 'configs' / 'gguf.py'}",
        f"--config.data.path={ROOT / 'README.md'}",
        *("--config.num_steps=2", "--config.batch_size=2"),
        *("--config.model.n_layers=1", "--config.model.dim=256"),
        *("--config.model.n_heads=4", "--config.model.ffn_dim=256"),
        *("--config.model.max_seq_len=64", "--config.sample_interval=0"),
    ]
    config = config_from_flags(flags).config
    with open(os.devnull, "w") as sink:
        train(config, folder / "run", console=Console(file=sink))
    return str(folder / "run")


def compare(options: argparse.Namespace) -> int:
    """Prints the table; 1 where a bar is missed."""
    llama = importlib.util.find_spec("llama_cpp") is not None
    if not llama:
        print("llama-cpp-python is not installed: its rows are left out")
    model = load(options.workdir)
    length = model.architecture.max_seq_len
    assert model.metadata is not None  # it was loaded
    data = build(DataConfig, model.metadata.run["data"], "data.")
    corpus = load_corpus(data)
    split = split_tokens(data, corpus, model.tokenizer, length)
    ids = split.validation
    if options.windows:
        ids = ids[: options.windows * length + 1]
    windows = validation_windows(ids, length)
    held = ValidationSet(ids, model.tokenizer, seq_len=length, batch_size=64)
    ours = held.evaluate(jax.jit(make_eval_step(model.module)), model.variables)
    forward = jax.jit(model.module.apply)
    likeliest = np.concatenate(
        [
            np.argmax(forward(model.variables, part[:, :-1]), axis=-1)
            for part in np.array_split(windows, -(-len(windows) // 64))
        ]
    )
    count = options.prompts
    prompts = [ids[i * len(ids) // count :][:PROMPT] for i in range(count)]
    greedy = SamplerConfig(temperature=0.0)
    texts = [
        generate(
            model,
            prompt,
            max_new_tokens=NEW,
            sampler=greedy,
        )[0].tolist()
        for prompt in prompts
    ]
    print(f"{len(windows)} windows of {length} tokens of {corpus.source}")
    print(
        "| | embedding | perplexity | of ours | positions | greedy text equal |"
        " margins where they part |"
    )
    print("|---|---|---|---|---|---|---|")
    assert ours is not None  # it was not told to stop
    print(f"| Vaani | | {ours.perplexity:.4f} | | | | |")
    if not llama:
        return 0
    from llama_cpp import Llama

    missed = False
    kinds = itertools.product(options.types.split(","), options.embeddings.split(","))
    with tempfile.TemporaryDirectory() as folder:
        for kind, embedding in kinds:
            path = pathlib.Path(folder) / f"{kind}-{embedding}.gguf"
            export_model(
                options.workdir,
                path,
                target="gguf",
                gguf_type=kind,
                embedding=embedding,
                notify=lambda line: print(line, file=sys.stderr),
            )
            llm = Llama(
                str(path),
                n_ctx=length + NEW,
                logits_all=True,
                verbose=False,
                n_threads=2,
                type_k=0,  # float32 keys and values, as ours
                type_v=0,
            )
            text = model.tokenizer.decode(ids[:500])
            told = llm.tokenize(text.encode(), add_bos=False, special=False)
            assert told == ids[:500].tolist(), "llama.cpp encodes otherwise"
            assert llm.detokenize(told).decode() == text
            theirs, other = perplexity(llm, windows, likeliest)
            same = 0
            margins = []
            for prompt, expected in zip(prompts, texts, strict=True):
                found = continuation(llm, prompt)
                same += found == expected
                equal = next((i for i in range(NEW) if found[i] != expected[i]), NEW)
                if equal < NEW:
                    seen = np.concatenate([prompt, expected[:equal]]).astype(np.int32)
                    logits = model(seen[None])[0, -1]
                    margin = logits[expected[equal]] - logits[found[equal]]
                    margins.append(float(margin))
            ratio = theirs / ours.perplexity
            missed |= not (abs(ratio - 1) <= 0.01 and same >= 0.9 * count)
            parted = f"{max(margins):.3f} at most" if margins else ""
            print(
                f"| {kind.upper()} | {embedding} | {theirs:.4f} | {ratio:.4f} |"
                f" {100 * other:.2f} % | {same} of {count} | {parted} |",
                flush=True,
            )
            llm.close()
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())

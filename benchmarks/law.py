"""What you train is what you serve, to the bit: counted on the machine at hand.

    python train.py --config=configs/small.py
    python benchmarks/law.py --workdir runs/small

Greedy texts of masters and of packed weights, one by one and in batches, beside those
of masters one by one; logits after every token of five texts, from a cache, beside the
forward pass of the training graph over the finished text; and the log-probabilities
that `generate` reports beside those of that pass. For every instruction set that the
processor has. Exits with status 1 where a bit differs.

Without a workdir, or with ``--toy``, random weights of the shape of `configs/debug.py`.
``--output FILE`` keeps the table as JSON.
"""

import argparse
import dataclasses
import datetime
import json
import pathlib
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from vaani_jax.inference.generate import generate, segments
from vaani_jax.inference.model import Model, load, pack_model
from vaani_jax.inference.sampling import SamplerConfig
from vaani_jax.kernels import cpu
from vaani_jax.kernels.floats import log_likelihood, native
from vaani_jax.model.cache import KVCache
from vaani_jax.model.transformer import Vaani, init_variables
from vaani_jax.text.tokenizers import ByteTokenizer

GREEDY, WARM = SamplerConfig(temperature=0.0), SamplerConfig(temperature=1.0)
COLUMNS = ["", "texts", "logits", "log-probabilities"]


def random_model() -> Model:
    """Weights that no training has moved, of a vocabulary of bytes."""
    module = Vaani().changed(
        vocab_size=256, dim=64, n_layers=2, n_heads=4, ffn_dim=128, max_seq_len=64
    )
    variables = init_variables(module, jax.random.key(0))
    return Model(module, variables, ByteTokenizer())


def texts(model: Model, prompts: list[np.ndarray], new: int, rows: int) -> np.ndarray:
    """Greedy ids [P, new], ``rows`` prompts at a time."""
    parts = [
        generate(
            model,
            prompts[i : i + rows],
            max_new_tokens=new,
            sampler=GREEDY,
            ignore_eos=True,
        )
        for i in range(0, len(prompts), rows)
    ]
    return np.concatenate(parts)


def training_logits(model: Model, ids: np.ndarray) -> np.ndarray:
    """Logits [B, T, V] of the training graph's forward pass, gradients and all."""
    module, quant = model.module, model.variables["quant"]

    def loss(params: Any) -> Any:
        variables = {"params": params, "quant": quant}
        logits, _ = module.apply(variables, ids, train=True, mutable=["quant"])
        following = jnp.asarray(ids[:, 1:])
        return log_likelihood(logits[:, :-1], following).sum(), logits

    step = jax.jit(jax.value_and_grad(loss, has_aux=True))
    return np.asarray(step(model.variables["params"])[0][1])


def served_logits(model: Model, ids: np.ndarray, first: int) -> np.ndarray:
    """Logits [B, T, V] with a cache: a prompt of ``first`` tokens, then one by one."""
    module = model.module
    cache = KVCache.create(
        module.architecture, len(ids), ids.shape[1], module.quantization.dtype
    )

    @jax.jit
    def step(variables: Any, tokens: Any, cache: Any) -> Any:
        return module.apply(variables, tokens, cache)

    logits, cache = step(model.variables, ids[:, :first], cache)
    found = [logits]
    for i in range(first, ids.shape[1]):
        logits, cache = step(model.variables, ids[:, i : i + 1], cache)
        found.append(logits)
    return np.asarray(jnp.concatenate(found, axis=1))


def reported(model: Model, prompts: list[np.ndarray], new: int) -> tuple[Any, Any]:
    """Ids [P, new] drawn together, and the log-probabilities that are told of them."""
    found = list(
        segments(
            model,
            prompts,
            max_new_tokens=new,
            sampler=WARM,
            ignore_eos=True,
            scored=True,
        )
    )
    scores = [part.scores for part in found if part.scores is not None]
    return np.concatenate([part.ids for part in found], axis=1), np.concatenate(
        scores, axis=1
    )


def compare(
    name: str, model: Model, trained: Model, prompts: list[np.ndarray], new: int
) -> tuple[list[list[str]], bool]:
    """Rows of the table for ``model`` beside ``trained``, and whether all is equal."""
    rows, equal = [], True
    expected = texts(trained, prompts, new, 1)
    length = len(prompts[0])
    whole = [np.concatenate(pair) for pair in zip(prompts, expected, strict=True)]
    five = np.stack(whole[:5])
    logits = training_logits(trained, five)
    drawn, scores = reported(model, prompts[:5], new)
    sampled = np.concatenate([np.stack(prompts[:5]), drawn], axis=1)
    passed = training_logits(trained, sampled)[:, length - 1 : -1]
    told = np.asarray(jax.jit(log_likelihood)(passed, drawn))
    scored = int((told == scores).sum())
    for batch in (1, 4, len(prompts)):
        same = (texts(model, prompts, new, batch) == expected).all(axis=1)
        found = np.concatenate(
            [
                served_logits(model, five[i : i + batch], length)
                for i in range(0, len(five), batch)
            ]
        )
        steps = (found == logits).all(axis=-1)
        rows.append(
            [
                f"{name}, {'singly' if batch == 1 else f'{batch} together'}",
                f"{int(same.sum())} of {len(same)}",
                f"{int(steps.sum())} of {steps.size}",
                f"{scored} of {scores.size}",
            ]
        )
        equal &= bool(same.all() and steps.all() and scored == scores.size)
    return rows, equal


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workdir", default="", help="of a run; empty: random weights")
    parser.add_argument("--prompts", type=int, default=20)
    parser.add_argument("--new", type=int, default=256, help="tokens of each text")
    parser.add_argument("--output", default="", help="a JSON file for the table")
    parser.add_argument("--machine", default="", help="what to call this machine there")
    parser.add_argument("--toy", action="store_true")
    options = parser.parse_args()
    model = load(options.workdir) if options.workdir else random_model()
    new = min(options.new, 24) if options.toy else options.new
    # A context that holds a text whole: where one is cut, there is no forward pass.
    context = 16 + new
    module = model.module.changed(max_seq_len=context)
    model = dataclasses.replace(model, module=module)
    vocabulary = model.tokenizer.vocab_size
    rng = np.random.default_rng(0)
    count = 6 if options.toy else options.prompts
    prompts = [rng.integers(0, vocabulary, 16, dtype=np.int32) for _ in range(count)]
    packed = pack_model(model)
    if not native():
        print("no native float parts here: XLA's are equal up to the order of sums")
    table = Table(
        title=f"equal to the bit, texts of {new} tokens", title_justify="left"
    )
    for column in COLUMNS:
        table.add_column(column, justify="right" if column else "left")
    rows: list[list[str]] = []
    equal = True
    for isa in cpu.isas() if native() else ["XLA"]:
        if native() and not cpu.choose_isa(isa):
            continue  # this processor lacks it
        jax.clear_caches()
        for name, one in ((f"{isa}: masters", model), (f"{isa}: packed", packed)):
            found, same = compare(name, one, model, prompts, new)
            rows += found
            equal &= same
    for row in rows:
        table.add_row(*row)
    Console(width=100).print(table)
    if options.output:
        about = (
            f"texts of {new} tokens, greedy, beside those of masters one by one; logits"
            " of five of them at every position, and log-probabilities of five sampled"
            " ones, beside the forward pass of the training graph, to the bit"
        )
        command = "python benchmarks/law.py --workdir runs/small"
        content = {
            "about": about,
            "command": command,
            "machine": options.machine or "this machine",
            "date": f"{datetime.date.today():%Y-%m-%d}",
            "tables": {"law": {"columns": COLUMNS, "rows": rows}},
        }
        text = json.dumps(content, indent=1) + "\n"
        pathlib.Path(options.output).write_text(text, encoding="utf-8")
    return int(not equal)


if __name__ == "__main__":
    sys.exit(main())

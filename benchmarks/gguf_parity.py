"""What llama.cpp makes of an export: perplexity and greedy text beside ours.

    python -m pip install llama-cpp-python -r requirements-interop.txt
    python train.py --config=configs/gguf.py
    python benchmarks/gguf_parity.py --workdir runs/gguf

Perplexity over the non-overlapping windows of the held-out text (``--windows`` of them;
0 takes all), greedy text for ten prompts from it. llama.cpp rounds activations per
block of 256 (TQ types), not per token, or not at all (F16), so that its figures come
near ours without being them; where a text parts from ours, the last column says by how
much our own logits preferred our token. Exits with status 1 where a bar is missed: 1 %
of perplexity, nine prompts of ten.

q8_0 can be added to ``--types``; the AMX code of llama-cpp-python 0.3.36 crashed on any
Q8_0 file, also one that gguf quantised, where this was written.
"""

import argparse
import math
import pathlib
import sys
import tempfile

import jax
import numpy as np

from vaani_jax.data import load_corpus, split_tokens, validation_windows
from vaani_jax.evaluate import ValidationSet
from vaani_jax.generate import SamplerConfig, generate
from vaani_jax.interop.convert import export_model
from vaani_jax.load import load_model
from vaani_jax.model import Vaani
from vaani_jax.step import make_eval_step

PROMPT, NEW = 16, 32


def perplexity(llm, windows):
    """Of llama.cpp, over windows [n, length + 1]."""
    total = 0.0
    for window in windows:
        llm.reset()
        llm.eval(window[:-1].tolist())
        logits = np.asarray(llm.scores[: len(window) - 1], np.float64)
        top = logits.max(axis=-1)
        norm = top + np.log(np.exp(logits - top[:, None]).sum(axis=-1))
        total += float((norm - logits[np.arange(len(norm)), window[1:]]).sum())
    return math.exp(total / windows[:, 1:].size)


def continuation(llm, prompt):
    """The greedy text of llama.cpp, as ids."""
    llm.reset()
    llm.eval(prompt.tolist())
    found = []
    for _ in range(NEW):
        found.append(int(np.argmax(llm.scores[llm.n_tokens - 1])))
        llm.eval(found[-1:])
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", required=True)
    parser.add_argument("--types", default="tq2_0,tq1_0,f16")
    parser.add_argument("--windows", type=int, default=400)
    options = parser.parse_args()
    from llama_cpp import Llama

    model = load_model(options.workdir)
    length = model.config.max_seq_len
    corpus = load_corpus(model.run.data)
    split = split_tokens(model.run.data, corpus, model.tokenizer, length)
    ids = split.validation
    if options.windows:
        ids = ids[: options.windows * length + 1]
    windows = validation_windows(ids, length)
    held = ValidationSet(ids, model.tokenizer, seq_len=length, batch_size=64)
    ours = held.evaluate(
        jax.jit(make_eval_step(model.config)), model.params, model.quant
    )
    prompts = [ids[i * len(ids) // 10 :][:PROMPT] for i in range(10)]
    greedy = SamplerConfig(temperature=0.0)
    texts = [
        generate(
            model.config,
            model.params,
            model.quant,
            prompt,
            max_new_tokens=NEW,
            sampler=greedy,
        )[0].tolist()
        for prompt in prompts
    ]
    print(f"{len(windows)} windows of {length} tokens of {corpus.source}")
    print(
        "| | perplexity | of ours | greedy text equal | tokens equal | margins where"
        " they part |"
    )
    print("|---|---|---|---|---|---|")
    print(f"| Vaani | {ours.perplexity:.4f} | | | | |")
    missed = False
    with tempfile.TemporaryDirectory() as folder:
        for kind in options.types.split(","):
            path = pathlib.Path(folder) / f"{kind}.gguf"
            export_model(
                options.workdir,
                path,
                target="gguf",
                gguf_type=kind,
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
            theirs = perplexity(llm, windows)
            same = tokens = 0
            margins = []
            for prompt, expected in zip(prompts, texts, strict=True):
                found = continuation(llm, prompt)
                same += found == expected
                equal = next((i for i in range(NEW) if found[i] != expected[i]), NEW)
                tokens += equal
                if equal < NEW:
                    seen = np.concatenate([prompt, expected[:equal]]).astype(np.int32)
                    logits = Vaani(model.config).apply(
                        {"params": model.params, "quant": model.quant}, seen[None]
                    )[0, -1]
                    margin = logits[expected[equal]] - logits[found[equal]]
                    margins.append(f"{float(margin):.3f}")
            ratio = theirs / ours.perplexity
            missed |= not (abs(ratio - 1) <= 0.01 and same >= 9)
            print(
                f"| llama.cpp, {kind.upper()} | {theirs:.4f} | {ratio:.4f} |"
                f" {same} of 10 | {tokens} of {10 * NEW} | {', '.join(margins)} |"
            )
            llm.close()
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())

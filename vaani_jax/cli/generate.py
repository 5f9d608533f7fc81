"""Continues prompts."""

import argparse
import itertools
import time
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from vaani_jax.cli.drawing import add_decoding, add_sampling, kv_dtype, make_sampler
from vaani_jax.cli.numbers import number
from vaani_jax.cli.output import notify
from vaani_jax.errors import VaaniError
from vaani_jax.files import to_json
from vaani_jax.paths import cache_folder, is_writable, local, read_text

MOST_SAMPLES = 65_536  # all are drawn at once
HELP = "Continue a prompt."

NOTICES = 3  # of prompts that are cut; then they are counted


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--workdir", required=True, help="of the run, or packed")
    given = parser.add_mutually_exclusive_group()
    given.add_argument(
        "--prompt",
        action="append",
        default=[],
        help="text to continue; repeat it for a batch; a line break, or how the text"
        " of the training begins, if not given",
    )
    given.add_argument("--prompts-file", default="", help="one prompt a line")
    option = parser.add_argument
    option(
        "--batch-size",
        type=number(int, at_least=0),
        default=0,
        help="most texts to continue together; 0: as many as 256 MiB of caches hold",
    )
    add_sampling(parser)
    add_decoding(parser, max_new_tokens=200, segment=16)
    option(
        "--num-samples",
        type=number(int, at_least=1, at_most=MOST_SAMPLES),
        default=1,
        help="continuations of each prompt",
    )
    option(
        "--ignore-eos",
        action="store_true",
        help="go on where a token that ends a text is drawn",
    )
    option(
        "--log-probabilities",
        action="store_true",
        help="with --json: ids and log-probabilities, in nats, of what is drawn",
    )
    parser.add_argument("--checkpoint", default="best", help="best, last or a step")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(options: argparse.Namespace) -> int:
    from vaani_jax.devices.memory import return_freed_memory
    from vaani_jax.inference import generate
    from vaani_jax.inference.model import load
    from vaani_jax.text.tokenizers import continuation

    keep_compiled()
    return_freed_memory()  # masters, that are packed as they are read

    if options.log_probabilities and not options.json:
        raise VaaniError("--log-probabilities are part of the JSON: add --json")
    sampler = make_sampler(options)
    prompts = _read_prompts(options)
    model = load(
        options.workdir, checkpoint=options.checkpoint, packed=True, notify=notify
    )
    prompts = prompts or [_default_prompt(model)]
    # A file holds several prompts, however many lines it has today.
    several = len(prompts) > 1 or bool(options.prompts_file)
    encoded = _encode_prompts(model.tokenizer, prompts, model.architecture.max_seq_len)
    chosen: dict[str, Any] = {
        "max_new_tokens": options.max_new_tokens,
        "num_samples": options.num_samples,
        "kv_dtype": kv_dtype(options),
        "segment": options.segment,
    }

    said = {""}

    def continued(part: list[Any]) -> Iterable[Any]:
        line = generate.room_for(model.module, part, **chosen)
        if line not in said:
            said.add(line)
            notify(line)
        return generate.segments(
            model,
            part,
            sampler=sampler,
            seed=options.seed,
            ignore_eos=options.ignore_eos,
            scored=options.log_probabilities,
            reading=Progress(),
            **chosen,
        )

    if options.num_samples == 1 and not several and not options.json:
        _show(prompts[0], encoded[0], continued(encoded), model, options.ignore_eos)
        return 0
    results = []
    for batch in generate.batches(
        model.module, encoded, rows=options.batch_size, **chosen
    ):
        rows = iter(_rows(continued(encoded[batch]), model, options.ignore_eos))
        for i, prompt in enumerate(prompts[batch], batch.start):
            drawn = list(itertools.islice(rows, options.num_samples))
            samples = [
                continuation(model.tokenizer, encoded[i], row.text) for row in drawn
            ]
            if not options.json:
                _print(i if several else None, prompt, samples)
                continue
            result: dict[str, Any] = {"prompt": prompt, "samples": samples}
            if options.log_probabilities:
                result["ids"] = [row.ids.tolist() for row in drawn]
                result["log_probabilities"] = [row.scores.tolist() for row in drawn]
            results.append(result)
        if batch.stop - batch.start < len(prompts):
            notify(f"{batch.stop:,} of {len(prompts):,} prompts")
    if options.json:
        result = {"results": results} if several else results[0]
        print(to_json({**result, "checkpoint": model.step, "seed": options.seed}))
    return 0


class Progress:
    """Says how far a long prompt is read, every few seconds."""

    SECONDS = 5.0

    def __init__(self) -> None:
        self.began = self.said = time.perf_counter()

    def __call__(self, done: int, total: int) -> None:
        now = time.perf_counter()
        if now - self.said >= self.SECONDS and done < total:
            self.said = now
            rate = done / (now - self.began)
            notify(
                f"{done:,} of {total:,} tokens of the prompt are read, {rate:,.0f} a"
                " second"
            )


class _Row(NamedTuple):
    """What was drawn: all of it, with its scores, and what of it is text."""

    ids: Any
    scores: Any
    text: Any


def _rows(segments: Iterable[Any], model: Any, ignore_eos: bool) -> Iterator[_Row]:
    import numpy as np

    from vaani_jax.inference.generate import until_end

    parts = list(segments)
    ids = np.concatenate([part.ids for part in parts], axis=1)
    scores = None
    if parts[0].scores is not None:
        scores = np.concatenate([part.scores for part in parts], axis=1)
    for i, row in enumerate(ids):
        text = row if ignore_eos else until_end(row, model.tokenizer)
        count = min(len(row), len(text) + 1)  # with the token that ends it
        yield _Row(row[:count], None if scores is None else scores[i, :count], text)


def _show(
    prompt: str,
    prompt_ids: Any,
    segments: Iterable[Any],
    model: Any,
    ignore_eos: bool,
) -> None:
    """Prints a prompt and its continuation, as it comes."""
    from vaani_jax.inference.generate import until_end
    from vaani_jax.text.tokenizers import Spelling

    spelling = Spelling(model.tokenizer, prompt_ids)
    print(prompt, end="", flush=True)
    for segment in segments:
        new = segment.ids[0]
        ids = new if ignore_eos else until_end(new, model.tokenizer)
        # A character may span two segments: it is shown when it is whole.
        print(spelling.add(ids), end="", flush=True)
    print(spelling.end())


def _print(place: int | None, prompt: str, samples: list[str]) -> None:
    """Prints the continuations of a prompt under titles."""
    for i, text in enumerate(samples):
        titles = [] if place is None else [f"prompt {place + 1}"]
        if len(samples) > 1:
            titles.append(f"sample {i + 1}")
        print(f"--- {', '.join(titles)}\n{prompt}{text}")


def _read_prompts(options: argparse.Namespace) -> list[str]:
    """What to continue: the prompts given, or the lines of a file; may be none."""
    if not options.prompts_file:
        return list(options.prompt)
    text = read_text(local(options.prompts_file, "--prompts-file"))
    lines = text.removesuffix("\n").split("\n")
    return [line.removesuffix("\r") for line in lines]


def _default_prompt(model: Any) -> str:
    from vaani_jax.text.prompts import default_prompt

    corpus = model.metadata.corpus if model.metadata else None
    opening = (corpus or {}).get("opening", "")
    return default_prompt(model.tokenizer, opening)


def _encode_prompts(tokenizer: Any, prompts: list[str], context: int) -> list[Any]:
    """Ids of each prompt, with a notice for those that the context can't hold."""
    encoded = []
    cut = 0
    for i, prompt in enumerate(prompts):
        number = f"prompt {i + 1}" if len(prompts) > 1 else ""
        try:
            ids = tokenizer.encode_prompt(prompt)
        except VaaniError as error:
            raise VaaniError(f"{number}: {error}" if number else str(error)) from error
        if len(ids) > context:
            cut += 1
            if cut <= NOTICES:
                notify(
                    f"{number or 'the prompt'} has {len(ids)} tokens, the context"
                    f" {context}: its end is used"
                )
        encoded.append(ids)
    if cut > NOTICES:
        notify(f"so it is with {cut - NOTICES:,} more prompts")
    return encoded


def keep_compiled() -> None:
    """Keeps compiled code from one command to the next, so that text comes sooner."""
    import jax

    if not jax.config.values["jax_compilation_cache_dir"]:  # the user chooses first
        root = cache_folder()
        if root is None or not is_writable(root / "compiled"):
            return
        jax.config.update("jax_compilation_cache_dir", str(root / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)

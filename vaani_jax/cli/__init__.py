"""The command line: ``python -m vaani_jax generate | evaluate | pack | ...``.

Results go to standard output, everything else to standard error.
"""

import argparse
import json
import logging
import os
import pathlib
import sys
from collections.abc import Callable
from typing import Any

from vaani_jax.errors import VaaniError


def run_guarded(main: Callable[[Any], int], argument: Any) -> int:
    """Runs a command; what a user can mend becomes one line and status 1."""
    # Orbax tells its life through absl; people get our lines.
    logging.getLogger("absl").setLevel(logging.ERROR)
    try:
        return main(argument)
    except VaaniError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:
        # Whoever read our output has left. Python would complain again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        print(f"error: {error.strerror or error}{where}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _notify(message: str) -> None:
    print(message, file=sys.stderr)


def _read_prompts(options: argparse.Namespace) -> list[str]:
    """What to continue: the prompts given, the lines of a file, or a line break."""
    if not options.prompts_file:
        return options.prompt or ["\n"]
    path = pathlib.Path(options.prompts_file)
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise VaaniError(f"{path} is no UTF-8 text: {error.reason}") from error
    return text.removesuffix("\n").split("\n")


def _encode_prompts(tokenizer: Any, prompts: list[str], context: int) -> list[Any]:
    """Ids of each prompt, with a notice for those that the context can't hold."""
    encoded = []
    for i, prompt in enumerate(prompts):
        number = f"prompt {i + 1}" if len(prompts) > 1 else ""
        try:
            ids = tokenizer.encode_prompt(prompt)
        except VaaniError as error:
            raise VaaniError(f"{number}: {error}" if number else str(error)) from error
        if len(ids) > context:
            _notify(
                f"{number or 'the prompt'} has {len(ids)} tokens, the context"
                f" {context}: its end is used"
            )
        encoded.append(ids)
    return encoded


def _keep_compiled() -> None:
    """Keeps compiled code from one command to the next, so that text comes sooner."""
    import jax

    if not jax.config.values["jax_compilation_cache_dir"]:  # the user chooses first
        root = os.environ.get("XDG_CACHE_HOME", "") or "~/.cache"
        folder = pathlib.Path(root).expanduser() / "vaani" / "compiled"
        jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def _generate(options: argparse.Namespace) -> int:
    from vaani_jax.inference import generate
    from vaani_jax.inference.model import load_model

    _keep_compiled()

    sampler = generate.SamplerConfig(
        0.0 if options.greedy else options.temperature,
        options.top_k,
        options.top_p,
        options.min_p,
    )
    prompts = _read_prompts(options)
    # A file holds several prompts, however many lines it has today.
    several = len(prompts) > 1 or bool(options.prompts_file)
    model = load_model(options.workdir, checkpoint=options.checkpoint, notify=_notify)
    segments = generate.stream(
        model.config,
        model.params,
        model.quant,
        _encode_prompts(model.tokenizer, prompts, model.config.max_seq_len),
        max_new_tokens=options.max_new_tokens,
        sampler=sampler,
        seed=options.seed,
        num_samples=options.num_samples,
        kv_dtype=None if options.kv_dtype == "auto" else options.kv_dtype,
        segment=options.segment,
    )
    count = options.num_samples
    alone = count == 1 and not several and not options.json
    ids: list[list[int]] = [[] for _ in range(len(prompts) * count)]
    shown = ""
    if alone:
        print(prompts[0], end="", flush=True)
    for segment in segments:
        for row, new in zip(ids, segment.tolist(), strict=True):
            row.extend(new)
        if alone:
            # Decoded as a whole: a character may span two segments of bytes.
            text = model.tokenizer.decode(ids[0])
            ready = text.rstrip("\ufffd")
            print(ready[len(shown) :], end="", flush=True)
            shown = ready
    texts = [model.tokenizer.decode(row) for row in ids]
    results = [
        {"prompt": prompt, "samples": texts[i * count : (i + 1) * count]}
        for i, prompt in enumerate(prompts)
    ]
    if alone:
        print(texts[0][len(shown) :])
    elif options.json:
        result = {"results": results} if several else results[0]
        print(json.dumps({**result, "checkpoint": model.step, "seed": options.seed}))
    else:
        for i, text in enumerate(texts):
            titles = [f"prompt {i // count + 1}"] if several else []
            if count > 1:
                titles.append(f"sample {i % count + 1}")
            print(f"--- {', '.join(titles)}\n{prompts[i // count]}{text}")
    return 0


def _held_out(model: Any, data: str = "") -> Any:
    """The validation part of the text of a model's training, or all of another."""
    from vaani_jax.data.config import DataConfig
    from vaani_jax.data.corpus import Split, split_tokens
    from vaani_jax.data.sources import load_corpus
    from vaani_jax.settings import build

    seq_len = model.config.max_seq_len
    if data:
        ids = model.tokenizer.encode(load_corpus(DataConfig(path=data)).text)
        if len(ids) < seq_len + 1:
            raise VaaniError(
                f"{data} has {len(ids):,} tokens, fewer than one window of"
                f" max_seq_len + 1 = {seq_len + 1}: take a longer text"
            )
        return Split(ids[:0], ids)
    trained_on = model.metadata.corpus
    if trained_on is None:
        raise VaaniError(
            "an imported model has no text of its own: name one with --data FILE"
        )
    config = build(DataConfig, model.metadata.run["data"], "data.")
    corpus = load_corpus(config, _notify)
    if corpus.sha256 != trained_on["sha256"]:
        raise VaaniError(
            f"the run was trained on {trained_on['source']}, which is not"
            f" {corpus.source} as it is now: bring the text back"
        )
    return split_tokens(config, corpus, model.tokenizer, seq_len)


def _measured(model: Any, split: Any) -> Any:
    import jax

    from vaani_jax.evaluate.loss import make_eval_step, validation_set

    return validation_set(model.config.max_seq_len, split, model.tokenizer).evaluate(
        jax.jit(make_eval_step(model.config)), model.params, model.quant
    )


def _evaluate(options: argparse.Namespace) -> int:
    from vaani_jax.inference.model import load_model

    model = load_model(options.workdir, checkpoint=options.checkpoint, notify=_notify)
    result = _measured(model, _held_out(model, options.data))
    if options.json:
        print(json.dumps(result.as_dict()))
    else:
        print(f"checkpoint     {model.step:,}")
        print(f"loss           {result.loss:.4f} nats per token")
        print(f"perplexity     {result.perplexity:.3f}")
        print(f"bits per byte  {result.bits_per_byte:.4f}")
        print(f"tokens         {result.tokens:,}")
    return 0


def _pack(options: argparse.Namespace) -> int:
    import jax

    from vaani_jax.inference.model import (
        PACKED_ARRAYS,
        load_model,
        pack_model,
        save_packed,
    )
    from vaani_jax.model.packing import packed_bytes
    from vaani_jax.model.size import model_size
    from vaani_jax.quant.packed import PackedTernary

    model = load_model(options.workdir, checkpoint=options.checkpoint, notify=_notify)
    small = pack_model(model, options.embedding)
    save_packed(small, options.output)
    kernels = [
        leaf
        for leaf in jax.tree.leaves(
            small.params, is_leaf=lambda x: isinstance(x, PackedTernary)
        )
        if isinstance(leaf, PackedTernary)
    ]
    weights = sum(k.shape[0] * k.shape[1] for k in kernels)
    taken = packed_bytes(kernels)
    bytes_ = (pathlib.Path(options.output) / PACKED_ARRAYS).stat().st_size
    fp16 = model_size(model.config).bytes_fp16
    print(f"checkpoint       {model.step:,}")
    print(f"ternary weights  {weights:,} in {8 * taken / weights:.3f} bits each")
    print(
        f"file             {bytes_ / 1e6:.2f} MB, {fp16 / bytes_:.1f} x less than fp16"
    )
    if options.embedding == "int8":
        # What the rounding of the embedding costs is measured, where the text is.
        try:
            split = _held_out(model)
        except VaaniError as error:
            _notify(f"the loss was not measured: {error}")
        else:
            before, after = (_measured(m, split) for m in (model, small))
            print(
                f"validation loss  {after.loss:.4f},"
                f" {before.loss:.4f} with a float32 embedding"
            )
    print(f"next: python -m vaani_jax generate --workdir={options.output}")
    return 0


def _export(options: argparse.Namespace) -> int:
    from vaani_jax.interop.convert import export_model

    result = export_model(
        options.workdir,
        options.output,
        target=options.format,
        gguf_type=options.type,
        embedding=options.embedding,
        checkpoint=options.checkpoint,
        notify=_notify,
    )
    _notify(
        f"read back and compared over {result.tokens} tokens: logits differ by"
        f" {result.largest:.3g} at most, {result.median:.3g} in the median; their"
        f" standard deviation is {result.spread:.3g}"
    )
    print(options.output)
    return 0


def _import(options: argparse.Namespace) -> int:
    from vaani_jax.interop.convert import as_flags, import_model

    config = import_model(
        options.source,
        options.workdir,
        max_seq_len=options.max_seq_len,
        notify=_notify,
    )
    _notify(
        "to train from it: python train.py --config=configs/base.py --workdir=NEW"
        f" --config.init_from={options.workdir} {as_flags(config)}"
    )
    print(options.workdir)
    return 0


def _plan(options: argparse.Namespace) -> int:
    import dataclasses

    import jax

    # Before anything asks for devices: no accelerator is touched.
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", options.devices)

    from vaani_jax.cli.flags import config_from_flags
    from vaani_jax.data.corpus import make_tokenizer
    from vaani_jax.data.sources import load_corpus
    from vaani_jax.devices.chips import CHIPS
    from vaani_jax.plan import as_dict, as_text, make_plan
    from vaani_jax.text.tokenizers import maker

    unknown = [name for name in options.chip if name not in CHIPS]
    if unknown:
        raise VaaniError(
            f"no data of a chip named {unknown[0]!r}: there are {', '.join(CHIPS)}"
        )
    chips = [CHIPS[name] for name in options.chip or CHIPS]
    config = config_from_flags(options.flags).config
    if not config.model.vocab_size:
        data = config.data
        wanted = not data.tokenizer_file and maker(data.tokenizer).needs_text
        corpus = load_corpus(data, _notify) if wanted else None
        tokenizer = make_tokenizer(data, corpus)
        model = dataclasses.replace(config.model, vocab_size=tokenizer.vocab_size)
        config = dataclasses.replace(config, model=model)
    plan = make_plan(config, notify=_notify)
    if options.json:
        print(json.dumps(as_dict(plan, chips, options.utilisation)))
    else:
        print(as_text(plan, chips, options.utilisation))
    return 0


def _plot(options: argparse.Namespace) -> int:
    from vaani_jax.runs.curves import plot_curves
    from vaani_jax.runs.metrics import read_rows
    from vaani_jax.runs.workdir import Workdir
    from vaani_jax.train.journal import read_events

    workdir = pathlib.Path(options.workdir)
    paths = Workdir(workdir)
    rows = read_rows(paths.metrics)
    if not rows:
        raise VaaniError(f"{workdir} holds no {paths.metrics.name} with rows to plot")
    output = pathlib.Path(options.output or paths.curves)
    plot_curves(
        rows,
        output,
        title=workdir.resolve().name,
        sparsity_band=_sparsity_band(paths.summary),
        events=read_events(paths.events),
    )
    print(output)
    return 0


def _sparsity_band(summary: pathlib.Path) -> tuple[float, float] | None:
    """The band that a run aimed at, where it has written its results."""
    try:
        config = json.loads(summary.read_text(encoding="utf-8"))["config"]
        low, high = config["target_sparsity_min"], config["target_sparsity_max"]
    except (OSError, ValueError, KeyError):
        return None
    return None if low is None else (low, high)


def _positive(kind: Callable[[str], Any]) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        value = kind(text)
        if not value > 0:
            raise argparse.ArgumentTypeError(f"{text} is not above 0")
        return value

    parse.__name__ = kind.__name__  # what argparse says of text that is no number
    return parse


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m vaani_jax", description="Ternary language models in JAX."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, function: Any, text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(
            name,
            help=text,
            description=text,
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        )
        sub.set_defaults(function=function)
        if function is not _plan:
            sub.add_argument("--workdir", required=True, help="of the run, or packed")
        return sub

    sub = command("generate", _generate, "Continue a prompt.")
    given = sub.add_mutually_exclusive_group()
    given.add_argument(
        "--prompt",
        action="append",
        default=[],
        help="text to continue, a line break if not given; repeat it for a batch",
    )
    given.add_argument("--prompts-file", default="", help="one prompt a line")
    sub.add_argument("--max-new-tokens", type=int, default=200, help="tokens to draw")
    sub.add_argument("--temperature", type=float, default=0.8, help="0 is greedy")
    sub.add_argument("--greedy", action="store_true", help="same as --temperature 0")
    sub.add_argument("--top-k", type=int, default=0, help="keep the k likeliest; 0 all")
    sub.add_argument("--top-p", type=float, default=1.0, help="nucleus; 1 keeps all")
    sub.add_argument("--min-p", type=float, default=0.0, help="relative floor; 0 none")
    sub.add_argument("--seed", type=int, default=0, help="equal seeds, equal text")
    sub.add_argument(
        "--num-samples", type=int, default=1, help="continuations of each prompt"
    )
    sub.add_argument(
        "--kv-dtype",
        default="auto",
        choices=["auto", "float32", "bfloat16", "int8"],
        help="of cached keys and values; auto is the compute dtype",
    )
    sub.add_argument(
        "--segment", type=int, default=16, help="tokens decoded, and shown, at a time"
    )
    sub.add_argument("--checkpoint", default="best", help="best, last or a step")
    sub.add_argument("--json", action="store_true", help="print one JSON object")

    sub = command("evaluate", _evaluate, "Measure a model on its held-out text.")
    sub.add_argument("--checkpoint", default="best", help="best, last or a step")
    sub.add_argument("--json", action="store_true", help="print one JSON object")
    sub.add_argument(
        "--data", default="", help="another text (file, folder, glob): all of it"
    )

    sub = command("pack", _pack, "Write a model in 2 bits a weight.")
    sub.add_argument("--output", required=True, help="folder to write")
    sub.add_argument(
        "--embedding",
        choices=("float32", "int8"),
        default="float32",
        help="int8: 8 bits with a scale per row, for the embedding and its head",
    )
    sub.add_argument("--checkpoint", default="best", help="best, last or a step")

    sub = command("export", _export, "Write a model for other tools, and check it.")
    sub.add_argument("--format", required=True, choices=["hf", "hf-packed", "gguf"])
    sub.add_argument("--output", required=True, help="folder, or GGUF file")
    sub.add_argument(
        "--type",
        default="tq2_0",
        choices=["tq2_0", "tq1_0", "f16", "q8_0"],
        help="of the kernels in GGUF",
    )
    sub.add_argument(
        "--embedding",
        default="float16",
        choices=["float16", "float32"],
        help="in GGUF; float32 is nearer to the model, and twice as large",
    )
    sub.add_argument("--checkpoint", default="best", help="best, last or a step")

    sub = command("import", _import, "Make a run of a Hugging Face folder.")
    sub.add_argument("--from", required=True, dest="source", help="the folder")
    sub.add_argument(
        "--max-seq-len", type=int, default=0, help="context; 0: the model's, up to 4096"
    )

    sub = command("plan", _plan, "Say what a training step will take, before it runs.")
    sub.epilog = "--config=FILE and --config.KEY=VALUE are those of train.py."
    sub.add_argument(
        "--devices", type=_positive(int), default=1, help="that the run would have"
    )
    sub.add_argument(
        "--chip", action="append", default=[], help="to estimate; all if not given"
    )
    sub.add_argument(
        "--utilisation",
        type=_positive(float),
        default=0.5,
        help="assumed, of a chip's bfloat16 peak, by executed FLOPs",
    )
    sub.add_argument("--json", action="store_true", help="print one JSON object")

    sub = command("plot", _plot, "Draw the training curves of a run.")
    sub.add_argument("--output", default="", help="PNG; in the workdir if not given")
    return parser


def main(arguments: list[str] | None = None) -> int:
    parser = make_parser()
    options, flags = parser.parse_known_args(arguments)
    options.flags = flags  # of a config: argparse does not know them
    if options.function is _plan:
        flags = [flag for flag in flags if not flag.startswith("--config")]
    if flags:
        parser.error(f"unrecognized arguments: {' '.join(flags)}")
    return run_guarded(options.function, options)

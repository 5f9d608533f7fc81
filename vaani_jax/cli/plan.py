"""Says what a run will take, before it runs."""

import argparse

from vaani_jax.cli.numbers import number
from vaani_jax.cli.output import notify
from vaani_jax.errors import VaaniError
from vaani_jax.files import to_json

FLAGS = "config"  # --config, --config.KEY=VALUE
MOST_DEVICES = 16_384  # each costs memory here, and no run is so large
HELP = "Say what a run will take, before it runs."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = "--config=FILE and --config.KEY=VALUE are those of train.py."
    parser.add_argument(
        "--devices",
        type=number(int, at_least=1, at_most=MOST_DEVICES),
        default=1,
        help="that the run would have",
    )
    parser.add_argument(
        "--chip", action="append", default=[], help="to estimate; all if not given"
    )
    parser.add_argument(
        "--utilization",
        "--utilisation",  # as it was spelled in version 0.1
        type=number(float, above=0, at_most=1),
        default=0.5,
        help="assumed, of a chip's bfloat16 peak, by executed FLOPs",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(options: argparse.Namespace) -> int:
    import dataclasses

    import jax

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
    # Before anything asks for devices: no accelerator is touched.
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", options.devices)
    if not config.model.vocab_size:
        data = config.data
        wanted = not data.tokenizer_file and maker(data.tokenizer).needs_text
        corpus = load_corpus(data, notify) if wanted else None
        tokenizer = make_tokenizer(data, corpus)
        model = dataclasses.replace(config.model, vocab_size=tokenizer.vocab_size)
        config = dataclasses.replace(config, model=model)
    plan = make_plan(config, notify=notify)
    if options.json:
        print(to_json(as_dict(plan, chips, options.utilization)))
    else:
        print(as_text(plan, chips, options.utilization))
    return 0

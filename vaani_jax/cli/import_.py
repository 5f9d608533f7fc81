"""Makes a run of a model of other tools."""

import argparse

from vaani_jax.cli.numbers import number
from vaani_jax.cli.output import notify

HELP = "Make a run of a Hugging Face folder or a GGUF file."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--workdir", required=True, help="of the run, or packed")
    parser.add_argument("--from", required=True, dest="source", help="folder or .gguf")
    parser.add_argument(
        "--max-seq-len",
        type=number(int, at_least=0),
        default=0,
        help="context; 0: the model's, up to 4096",
    )
    parser.add_argument(
        "--packed",
        action="store_true",
        help="write a packed folder, to generate from and not to train from",
    )
    parser.add_argument(
        "--weights",
        choices=["auto", "ternary", "full"],
        default="auto",
        help="what the weights are, where the source doesn't say; auto: full precision",
    )


def run(options: argparse.Namespace) -> int:
    from vaani_jax.interop.convert import as_flags, import_model

    config = import_model(
        options.source,
        options.workdir,
        max_seq_len=options.max_seq_len,
        packed=options.packed,
        weights=options.weights,
        notify=notify,
    )
    if not options.packed:
        notify(
            "to train from it: python train.py --config=configs/base.py --workdir=NEW"
            f" --config.init_from={options.workdir} {as_flags(config)}"
        )
    print(options.workdir)
    return 0

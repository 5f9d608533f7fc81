"""Makes a run of a model of other tools."""

import argparse

from vaani_jax.cli.numbers import number
from vaani_jax.cli.output import notify

HELP = "Make a packed folder, or a run, of a Hugging Face folder or a GGUF file."


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
        help="pack masters, too; codes are packed unless --masters is given",
    )
    parser.add_argument(
        "--masters",
        action="store_true",
        help="make a run of codes, with masters that quantize to them",
    )
    parser.add_argument(
        "--embedding",
        choices=["float32", "int8"],
        default="float32",
        help="packed: how to store an embedding, and a head, that aren't ternary",
    )
    parser.add_argument(
        "--weights",
        choices=["auto", "ternary", "full"],
        default="auto",
        help="what the weights are, where the source doesn't say; auto: full precision",
    )


def run(options: argparse.Namespace) -> int:
    from vaani_jax.interop.convert import as_flags, import_model

    module = import_model(
        options.source,
        options.workdir,
        max_seq_len=options.max_seq_len,
        packed=options.packed,
        masters=options.masters,
        embedding=options.embedding,
        weights=options.weights,
        notify=notify,
    )
    notify(
        "to train from it: python train.py --config=configs/base.py --workdir=NEW"
        f" --config.init_from={options.workdir} {as_flags(module)}"
    )
    print(options.workdir)
    return 0

"""Measures a model on its held-out text."""

import argparse

from vaani_jax.cli.held_out import held_out, measured
from vaani_jax.cli.output import notify
from vaani_jax.files import to_json

HELP = "Measure a model on its held-out text."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--workdir", required=True, help="of the run, or packed")
    parser.add_argument("--checkpoint", default="best", help="best, last or a step")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument(
        "--data", default="", help="another text (file, folder, glob): all of it"
    )


def run(options: argparse.Namespace) -> int:
    from vaani_jax.devices.memory import return_freed_memory
    from vaani_jax.inference.model import load

    return_freed_memory()  # masters, that are packed as they are read
    model = load(
        options.workdir, checkpoint=options.checkpoint, packed=True, notify=notify
    )
    result = measured(model, held_out(model, options.data))
    if options.json:
        print(to_json(result.as_dict()))
    else:
        print(f"checkpoint     {model.step:,}")
        print(f"loss           {result.loss:.4f} nats per token")
        print(f"perplexity     {result.perplexity:.3f}")
        print(f"bits per byte  {result.bits_per_byte:.4f}")
        print(f"tokens         {result.tokens:,}")
    return 0

"""Writes a model for other tools, and checks it."""

import argparse

from vaani_jax.cli.output import notify

HELP = "Write a model for other tools, and check it."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--workdir", required=True, help="of the run, or packed")
    # The table decides, and lists itself: reading it here would load JAX for --help.
    parser.add_argument("--format", required=True, help="such as hf, hf-packed or gguf")
    parser.add_argument("--output", required=True, help="folder, or GGUF file")
    parser.add_argument(
        "--type",
        default="q2_0",
        choices=["q2_0", "tq2_0", "tq1_0", "q8_0", "f16"],
        help="of the kernels in GGUF",
    )
    parser.add_argument(
        "--embedding",
        default="float16",
        choices=["float16", "float32"],
        help="in GGUF; float32 is nearer to the model, and twice as large",
    )
    parser.add_argument("--checkpoint", default="best", help="best, last or a step")


def run(options: argparse.Namespace) -> int:
    from vaani_jax.interop.convert import export_model

    result = export_model(
        options.workdir,
        options.output,
        target=options.format,
        gguf_type=options.type,
        embedding=options.embedding,
        checkpoint=options.checkpoint,
        notify=notify,
    )
    notify(
        f"read back and compared over {result.tokens} tokens: logits differ by"
        f" {result.largest:.3g} at most, {result.median:.3g} in the median; their"
        f" standard deviation is {result.spread:.3g}"
    )
    print(options.output)
    return 0

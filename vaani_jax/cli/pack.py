"""Writes a model in two bits a weight."""

import argparse

from vaani_jax.cli.held_out import held_out, measured
from vaani_jax.cli.output import notify
from vaani_jax.errors import VaaniError
from vaani_jax.paths import local

HELP = "Write a model in 2 bits a weight."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--workdir", required=True, help="of the run, or packed")
    parser.add_argument("--output", required=True, help="folder to write")
    parser.add_argument(
        "--embedding",
        choices=("float32", "int8"),
        default="float32",
        help="int8: 8 bits with a scale per row, for the embedding and its head",
    )
    parser.add_argument("--checkpoint", default="best", help="best, last or a step")


def run(options: argparse.Namespace) -> int:
    import jax

    from vaani_jax.devices.memory import return_freed_memory
    from vaani_jax.inference.model import (
        PACKED_ARRAYS,
        is_packed_folder,
        load,
        rounded_embedding,
        save_packed,
    )
    from vaani_jax.model.packing import packed_bytes
    from vaani_jax.model.size import model_size
    from vaani_jax.quant.packed import PackedTernary

    return_freed_memory()
    if is_packed_folder(options.workdir):
        raise VaaniError("the model is packed already")
    model = load(
        options.workdir, checkpoint=options.checkpoint, packed=True, notify=notify
    )
    if not model.packed:
        raise VaaniError(
            "a full-precision twin (quantization.quantize=False) can't be packed"
        )
    small = rounded_embedding(model) if options.embedding == "int8" else model
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
    bytes_ = (local(options.output, "--output") / PACKED_ARRAYS).stat().st_size
    fp16 = model_size(model.module).bytes_fp16
    print(f"checkpoint       {model.step:,}")
    print(f"ternary weights  {weights:,} in {8 * taken / weights:.3f} bits each")
    print(
        f"file             {bytes_ / 1e6:.2f} MB, {fp16 / bytes_:.1f} x less than fp16"
    )
    if options.embedding == "int8":
        # What the rounding of the embedding costs is measured, where the text is.
        try:
            split = held_out(model)
        except VaaniError as error:
            notify(f"the loss was not measured: {error}")
        else:
            before, after = (measured(m, split) for m in (model, small))
            print(
                f"validation loss  {after.loss:.4f},"
                f" {before.loss:.4f} with a float32 embedding"
            )
    print(f"next: python -m vaani_jax generate --workdir={options.output}")
    return 0

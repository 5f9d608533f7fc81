"""Trains a ternary language model.

    python train.py --config=configs/small.py
    python train.py --config=configs/small.py --workdir=runs/mine --config.seed=1

The same command again resumes the run in its workdir (runs/<name of the config> by
default). Ctrl-C stops it without loss. Any key of configs/base.py can be set with
--config.KEY=VALUE.
"""

import pathlib
import shlex
import sys

from vaani_jax.cli import run_guarded


def main(arguments: list[str]) -> int:
    # These imports take seconds: here, Ctrl-C already ends in one line.
    from vaani_jax.config import config_from_flags
    from vaani_jax.trainer import train

    if not arguments or {"-h", "--help"} & set(arguments):
        print(__doc__.strip())
        return 0 if arguments else 2
    config, path, workdir = config_from_flags(arguments)
    workdir = workdir or str(pathlib.Path("runs") / pathlib.Path(path).stem)
    train(config, workdir, command=shlex.join(["python", "train.py", *arguments]))
    return 0


if __name__ == "__main__":
    sys.exit(run_guarded(main, sys.argv[1:]))

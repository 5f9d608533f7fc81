"""Trains a ternary language model.

    python train.py --config=configs/small.py
    python train.py --config=configs/small.py --workdir=runs/mine --config.seed=1

The same command again resumes the run in its workdir (runs/<name of the config> by
default). Ctrl-C stops it without loss. Any key of configs/base.py can be set with
--config.KEY=VALUE.

All devices are used, see mesh in configs/base.py. Processes of one job, on one machine
or many, find each other under Slurm, Open MPI and on TPU slices; --distributed asks
JAX to look further (Kubernetes), and without any scheduler each is told:

    python train.py --config=configs/small.py --coordinator=HOST:PORT \
        --num_processes=2 --process_id=0
"""

import pathlib
import shlex
import sys

from vaani_jax.cli import run_guarded


def main(arguments: list[str]) -> int:
    # These imports take seconds: here, Ctrl-C already ends in one line.
    from vaani_jax.cli.flags import config_from_flags
    from vaani_jax.devices.processes import join
    from vaani_jax.train.loop import train

    if not arguments or {"-h", "--help"} & set(arguments):
        print(__doc__.strip())
        return 0 if arguments else 2
    given = config_from_flags(arguments)
    join(
        given.coordinator,
        given.num_processes,
        given.process_id,
        expected=given.distributed,
    )
    workdir = given.workdir or str(pathlib.Path("runs") / pathlib.Path(given.path).stem)
    command = shlex.join(["python", "train.py", *arguments])
    train(given.config, workdir, command=command)
    return 0


if __name__ == "__main__":
    status = run_guarded(main, sys.argv[1:])
    if status:
        from vaani_jax.devices.processes import leave

        leave(status)
    sys.exit(status)

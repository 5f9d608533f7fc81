"""Shows every key of a config."""

import argparse

from vaani_jax.files import to_json

FLAGS = "config"  # --config, --config.KEY=VALUE
HELP = "Show every key of a config, with its value and what it is."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = "--config=FILE and --config.KEY=VALUE are those of train."
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(options: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.table import Table

    from vaani_jax.cli.flags import config_from_flags
    from vaani_jax.settings import described
    from vaani_jax.train.config import Config

    config = config_from_flags(options.flags).config if options.flags else Config()
    if options.json:
        print(to_json(config.to_dict(), indent=1))
        return 0
    table = Table(box=None, pad_edge=False)
    for title in ("key", "value", "what it is"):
        table.add_column(title, overflow="fold")
    for name, value, text in described(config):
        table.add_row(name, repr(value), text)
    Console(highlight=False, markup=False).print(table)
    return 0

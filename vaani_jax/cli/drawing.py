"""Flags of what draws text: how tokens are drawn, how many, and from which cache."""

import argparse
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from vaani_jax.cli.numbers import number
from vaani_jax.settings import LARGEST_SEED, described

if TYPE_CHECKING:
    from vaani_jax.inference.sampling import SamplerConfig

at_least_one = number(int, at_least=1)


def add_sampling(parser: argparse.ArgumentParser, *, suggested: bool = False) -> None:
    """Adds the numbers of a sampler, and the seed.

    Args:
      parser: of the command.
      suggested: whether the model may suggest what no flag says.
    """
    from vaani_jax.inference.sampling import NUMBERS, SamplerConfig

    option = parser.add_argument
    option("--greedy", action="store_true", help="same as --temperature 0")
    numbers = {name: (value, text) for name, value, text in described(SamplerConfig())}
    for name in NUMBERS:
        value, text = numbers[name]
        if suggested:
            text += f" (default: the model's, else {value})"
        option(
            f"--{name.replace('_', '-')}",
            type=type(value),
            default=argparse.SUPPRESS if suggested else value,
            help=text,
        )
    seed = number(int, at_least=0, at_most=LARGEST_SEED)
    option("--seed", type=seed, default=0, help="equal seeds, equal text")


def add_decoding(
    parser: argparse.ArgumentParser, *, max_new_tokens: int, segment: int
) -> None:
    """Adds how many tokens there are, and how they are kept and shown.

    Args:
      parser: of the command.
      max_new_tokens, segment: defaults.
    """
    from vaani_jax.model.cache import DTYPES

    parser.add_argument(
        "--max-new-tokens",
        type=at_least_one,
        default=max_new_tokens,
        help="tokens to draw",
    )
    parser.add_argument(
        "--kv-dtype",
        default="auto",
        choices=["auto", *DTYPES],
        help="of cached keys and values; auto is the compute dtype",
    )
    parser.add_argument(
        "--segment",
        type=at_least_one,
        default=segment,
        help="tokens decoded, and shown, at a time",
    )


def given(options: argparse.Namespace) -> dict[str, Any]:
    """The numbers of a sampler that the flags give, by name."""
    from vaani_jax.inference.sampling import NUMBERS

    found = {name: getattr(options, name) for name in NUMBERS if hasattr(options, name)}
    return {**found, "temperature": 0.0} if options.greedy else found


def make_sampler(
    options: argparse.Namespace, suggested: Mapping[str, Any] = {}
) -> "SamplerConfig":
    """The sampler of the flags, and of what a model suggests where there are none.

    Raises VaaniError for numbers that make no sense.
    """
    from vaani_jax.inference.sampling import SamplerConfig

    return SamplerConfig(**{**suggested, **given(options)})


def kv_dtype(options: argparse.Namespace) -> str | None:
    """The dtype of the cache; None for that of the computation."""
    return None if options.kv_dtype == "auto" else options.kv_dtype

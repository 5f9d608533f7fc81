"""How the next token is drawn."""

import dataclasses
import typing
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from vaani_jax.errors import VaaniError
from vaani_jax.kernels.floats import log_sum_exp
from vaani_jax.settings import check, key, named
from vaani_jax.words import shown

Array = jax.Array


_BITS = 30  # of a probability: their sum, a little above 1, stays below 2^31


def _top_k(logits: Array, k: Any) -> Array:
    if k >= logits.shape[-1]:
        return logits
    kth = jax.lax.top_k(logits, k)[0][:, -1:]
    return jnp.where(logits >= kth, logits, -jnp.inf)


def _top_p(logits: Array, p: Any) -> Array:
    ordered = -jnp.sort(-logits, axis=-1)
    probabilities = jnp.exp(ordered - log_sum_exp(logits)[..., None])
    # As integers, whose sums don't depend on what else is in the batch.
    units = jnp.round(probabilities * 2.0**_BITS).astype(jnp.int32)
    before = jnp.cumsum(units, axis=-1) - units
    wanted = jnp.round(jnp.float32(p) * 2.0**_BITS).astype(jnp.int32)
    last = jnp.sum(before < wanted, axis=-1, keepdims=True) - 1
    least = jnp.take_along_axis(ordered, last, axis=-1)
    return jnp.where(logits >= least, logits, -jnp.inf)


def _min_p(logits: Array, p: Any) -> Array:
    floor = jnp.max(logits, axis=-1, keepdims=True) + jnp.log(p)
    return jnp.where(logits >= floor, logits, -jnp.inf)


@dataclasses.dataclass(frozen=True)
class Filter:
    """What a sampler leaves of the logits.

    Attributes:
      apply: of logits [B, V], float32 and divided by the temperature, and the value:
        logits with -inf where a token is out.
      off: the value at which it does nothing.
      allowed: whether a value makes sense.
      rule: what `allowed` demands, for people.
    """

    apply: Callable[[Array, Any], Array]
    off: float
    allowed: Callable[[Any], bool]
    rule: str


# In the order in which they apply. A further filter is a function and a row.
FILTERS: dict[str, Filter] = {
    "top_k": Filter(_top_k, 0, lambda k: k >= 0, "at least 0"),
    "top_p": Filter(_top_p, 1.0, lambda p: 0 < p <= 1, "in (0, 1]"),
    "min_p": Filter(_min_p, 0.0, lambda p: 0 <= p <= 1, "in [0, 1]"),
}


@dataclasses.dataclass(frozen=True)
class SamplerConfig:
    """How the next token is drawn; filters apply in the order given here.

    ``others`` holds values of further rows of `FILTERS`, as pairs of name and value.
    """

    temperature: float = key(
        0.8, "divides the logits; 0 takes the likeliest token", at_least=0
    )
    top_k: int = key(0, "keep the k likeliest; 0 keeps all")
    top_p: float = key(
        1.0, "keep the smallest set whose probability reaches it; 1 keeps all"
    )
    min_p: float = key(
        0.0, "keep tokens at least so probable, beside the likeliest; 0 keeps all"
    )
    others: tuple[tuple[str, float], ...] = ()

    def __post_init__(self) -> None:
        check(self)
        for name, _ in self.others:
            named(FILTERS, name, "a sampler's filter")
        for name, kept in FILTERS.items():
            value = self.value(name)
            if not kept.allowed(value):
                raise VaaniError(
                    f"{name.replace('_', '-')} must be {kept.rule}, it is {value}"
                )

    def value(self, name: str) -> Any:
        """The value of the filter of that name; its "off" where none is given."""
        if name in NUMBERS:
            return getattr(self, name)
        return dict(self.others).get(name, FILTERS[name].off)


# The numbers of a sampler, which configs and commands have as well.
NUMBERS = tuple(f.name for f in dataclasses.fields(SamplerConfig) if f.metadata)


def suggested(generation: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers of a sampler that a ``generation_config.json`` gives.

    Args:
      generation: its content; ``do_sample = false`` asks for the likeliest token.

    Raises VaaniError for values that make no sense, with the flag to say instead.
    """
    if generation.get("do_sample") is False:
        return {"temperature": 0.0}
    kinds = typing.get_type_hints(SamplerConfig)
    found: dict[str, Any] = {}
    for name in NUMBERS:
        value, kind = generation.get(name), kinds[name]
        if value is None:
            continue
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or (kind is int and value != int(value)):
            raise VaaniError(
                f"the model's generation_config.json has {name} = {shown(value)}, which"
                f" is no number of that kind: say --{name.replace('_', '-')}"
            )
        found[name] = kind(value)
        try:
            SamplerConfig(**{name: found[name]})
        except VaaniError as error:
            raise VaaniError(
                f"the model's generation_config.json: {error}; say"
                f" --{name.replace('_', '-')}"
            ) from None
    return found


def sample_token(
    logits: Array, key: Array, sampler: SamplerConfig, num_samples: int | None = None
) -> Array:
    """Draws ids [B], int32, from logits [B, V] (float32).

    Rows are independent; with ``num_samples``, a divisor of B, those of each run of
    this many rows are, and all runs share their random numbers: a row draws the same
    whatever other runs there are.
    """
    if sampler.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = logits / sampler.temperature
    for name, kept in FILTERS.items():
        value = sampler.value(name)
        if value != kept.off:
            logits = kept.apply(logits, value)
    # Adding Gumbel noise and taking the largest draws from the softmax.
    noise = jax.random.gumbel(key, (num_samples or len(logits), logits.shape[-1]))
    noise = jnp.tile(noise, (len(logits) // len(noise), 1))
    return jnp.argmax(logits + noise, axis=-1).astype(jnp.int32)

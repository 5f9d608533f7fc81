"""Text from a model: prefill, one jitted decode loop, samplers.

A prompt is padded to a bucket and run once (prefill); then a jitted loop decodes a
segment of tokens with the KV cache, and hands it over as a whole, which is what
streaming shows. Neither recompiles for another prompt length within a bucket. Where the
context is full, the newest half of it becomes the prompt of the next segment.
"""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vaani_jax.errors import VaaniError
from vaani_jax.model import KVCache, ModelConfig, Vaani

Array = jax.Array

SEGMENT = 16  # tokens decoded per call: what streaming shows at a time


@dataclasses.dataclass(frozen=True)
class SamplerConfig:
    """How the next token is drawn; filters apply in the order given here.

    Attributes:
      temperature: divides the logits; 0 takes the likeliest token (greedy).
      top_k: keep the k likeliest; 0 keeps all.
      top_p: keep the smallest set whose probability reaches p; 1 keeps all.
      min_p: keep tokens at least this probable relative to the likeliest; 0 keeps all.
    """

    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    def __post_init__(self) -> None:
        if self.temperature < 0 or self.top_k < 0:
            raise VaaniError("temperature and top-k must be at least 0")
        if not 0 < self.top_p <= 1 or not 0 <= self.min_p <= 1:
            raise VaaniError("top-p must be in (0, 1] and min-p in [0, 1]")


@dataclasses.dataclass(frozen=True)
class SampleConfig:
    """The samples that a training run shows.

    Attributes:
      prompts: one sample each; a prompt outside the vocabulary is skipped with a line.
      max_new_tokens: length of a sample.
      temperature, top_k, top_p, min_p: see `SamplerConfig`.
    """

    prompts: tuple[str, ...] = ("\n",)
    max_new_tokens: int = 200
    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    @property
    def sampler(self) -> SamplerConfig:
        return SamplerConfig(self.temperature, self.top_k, self.top_p, self.min_p)

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise VaaniError("sample.max_new_tokens must be at least 1")
        _ = self.sampler


def sample_token(logits: Array, key: Array, sampler: SamplerConfig) -> Array:
    """Draws ids [B], int32, from logits [B, V] (float32)."""
    if sampler.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = logits / sampler.temperature
    if 0 < sampler.top_k < logits.shape[-1]:
        kth = jax.lax.top_k(logits, sampler.top_k)[0][:, -1:]
        logits = jnp.where(logits >= kth, logits, -jnp.inf)
    if sampler.top_p < 1:
        ordered = -jnp.sort(-logits, axis=-1)
        probabilities = jax.nn.softmax(ordered, axis=-1)
        before = jnp.cumsum(probabilities, axis=-1) - probabilities
        last = jnp.sum(before < sampler.top_p, axis=-1, keepdims=True) - 1
        logits = jnp.where(
            logits >= jnp.take_along_axis(ordered, last, axis=-1), logits, -jnp.inf
        )
    if sampler.min_p > 0:
        floor = jnp.max(logits, axis=-1, keepdims=True) + jnp.log(sampler.min_p)
        logits = jnp.where(logits >= floor, logits, -jnp.inf)
    return jax.random.categorical(key, logits, axis=-1).astype(jnp.int32)


@functools.partial(jax.jit, static_argnums=0)
def prefill(
    config: ModelConfig, params: Any, quant: Any, tokens: Array, length: Array
) -> tuple[Array, KVCache]:
    """Reads a prompt.

    Args:
      config: the model.
      params, quant: its variables.
      tokens: [B, T], padded at the end.
      length: real tokens in each row, int32 scalar.

    Returns:
      Logits [B, V] after the last real token, and the cache.
    """
    cache = KVCache.create(config, tokens.shape[0])
    variables = {"params": params, "quant": quant}
    output: Any = Vaani(config).apply(variables, tokens, cache)
    logits, filled = output
    # What was written beyond the real length is masked until it is overwritten.
    last = jax.lax.dynamic_index_in_dim(logits, length - 1, axis=1, keepdims=False)
    return last, dataclasses.replace(filled, length=length)


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=(6,))
def decode(
    config: ModelConfig,
    sampler: SamplerConfig,
    steps: int,
    params: Any,
    quant: Any,
    logits: Array,
    cache: KVCache,
    key: Array,
    start: Array,
) -> tuple[Array, Array, KVCache]:
    """Draws ``steps`` tokens in one loop.

    Args:
      config, sampler: static.
      steps: tokens to draw; the cache must have room for them.
      params, quant: variables of the model.
      logits: [B, V] after the last token seen.
      cache: donated.
      key: of the whole generation.
      start: index of the first token drawn, int32 scalar; token i uses
        ``fold_in(key, i)``, so segments don't change what is drawn.

    Returns:
      Ids [B, steps] int32, the logits after them, and the cache.
    """
    model = Vaani(config)

    def body(carry: Any, index: Array) -> tuple[Any, Array]:
        logits, cache = carry
        token = sample_token(logits, jax.random.fold_in(key, index), sampler)
        logits, cache = model.apply(
            {"params": params, "quant": quant}, token[:, None], cache
        )
        return (logits[:, -1], cache), token

    (logits, cache), tokens = jax.lax.scan(
        body, (logits, cache), start + jnp.arange(steps, dtype=jnp.int32)
    )
    return tokens.T, logits, cache


def _bucket(length: int, limit: int) -> int:
    """The padded length of a prompt: the next power of two, from 16 up."""
    return min(limit, max(16, 1 << (length - 1).bit_length()))


def stream(
    config: ModelConfig,
    params: Any,
    quant: Any,
    prompt: np.ndarray,
    *,
    max_new_tokens: int,
    sampler: SamplerConfig = SamplerConfig(),
    seed: int = 0,
    num_samples: int = 1,
) -> Iterator[np.ndarray]:
    """Continues a prompt, a segment at a time.

    Args:
      config: the model; scanned layers are unrolled by the caller, see `unrolled`.
      params, quant: its variables.
      prompt: ids [length], at least one; of a prompt longer than the context, the
        end counts.
      max_new_tokens: how many to draw.
      sampler: how.
      seed: equal seeds draw equal tokens.
      num_samples: independent continuations.

    Yields:
      Ids [num_samples, n], int32, n <= `SEGMENT`.
    """
    if len(prompt) < 1:
        raise VaaniError("the prompt is empty: give at least one character")
    if max_new_tokens < 1 or num_samples < 1:
        raise VaaniError("ask for at least one token and one sample")
    context = config.max_seq_len
    if context < 2:
        raise VaaniError("a model with a context of one token can't continue a prompt")
    key = jax.random.key(seed)
    history = np.tile(np.asarray(prompt, np.int32), (num_samples, 1))
    drawn = 0
    room = 0
    logits = cache = None
    while drawn < max_new_tokens:
        if room == 0:
            keep = min(history.shape[1], context - 1)
            if history.shape[1] >= context:
                keep = max(1, context // 2)
            history = history[:, -keep:]
            padded = np.zeros((num_samples, _bucket(keep, context)), np.int32)
            padded[:, :keep] = history
            logits, cache = prefill(
                config, params, quant, jnp.asarray(padded), jnp.asarray(keep, jnp.int32)
            )
            room = context - keep
        # Two compiled lengths serve everything: a full segment, whose surplus is cut,
        # and single tokens up to the end of the context.
        wanted = min(SEGMENT, max_new_tokens - drawn)
        steps = SEGMENT if room >= SEGMENT else 1
        tokens, logits, cache = decode(
            config,
            sampler,
            steps,
            params,
            quant,
            logits,
            cache,
            key,
            jnp.asarray(drawn, jnp.int32),
        )
        segment = np.asarray(jax.device_get(tokens))[:, :wanted]
        history = np.concatenate([history, segment], axis=1)
        drawn += segment.shape[1]
        room -= steps
        yield segment


def generate(
    config: ModelConfig, params: Any, quant: Any, prompt: np.ndarray, **options: Any
) -> np.ndarray:
    """All that `stream` yields at once: ids [num_samples, max_new_tokens], int32."""
    return np.concatenate(
        list(stream(config, params, quant, prompt, **options)), axis=1
    )


def unrolled(
    config: ModelConfig, params: Any, quant: Any
) -> tuple[ModelConfig, Any, Any]:
    """The same model with its layers unrolled, which decodes faster on a CPU."""
    if not config.scan_layers:
        return config, params, quant

    def unstack(tree: Any) -> Any:
        if "layers" not in tree:
            return tree
        rest = {k: v for k, v in tree.items() if k != "layers"}
        for i in range(config.n_layers):
            rest[f"layers_{i}"] = jax.tree.map(lambda x, i=i: x[i], tree["layers"])
        return rest

    config = dataclasses.replace(config, scan_layers=False)
    return config, unstack(params), unstack(quant)

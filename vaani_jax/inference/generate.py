"""Text from a model: prefill, one jitted decode loop, samplers.

Prompts are padded to a bucket and run once (prefill), or, where they are long, in
pieces that join one cache; then a jitted loop decodes a segment of tokens with the KV
cache, and hands it over as a whole, which is what streaming shows. None of these
recompiles for other prompt lengths within a bucket. The cache has room for what is
asked, not for the whole context, in buckets too.

Prompts of one batch end together: shorter ones are padded on the left, and the cache
knows where each row starts. So the padding to the bucket, on the right, is overwritten
by what is drawn. Where a row fills the context, its newest half becomes its prompt, as
it would alone, and the batch is read again.

Ids without a token, which pad some vocabularies, are never drawn. A row ends with the
first id that ends a text; what the loop draws behind it is thrown away.

A `Session` keeps the cache of a text for the next one, as the turns of a chat need it.
"""

import dataclasses
import functools
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vaani_jax.errors import VaaniError
from vaani_jax.inference.model import Model
from vaani_jax.inference.room import cache_bytes, check_room, in_words
from vaani_jax.inference.sampling import SamplerConfig, sample_token
from vaani_jax.kernels.floats import log_likelihood, native
from vaani_jax.model.cache import KVCache
from vaani_jax.model.transformer import Vaani, with_angles
from vaani_jax.settings import LARGEST_INT, LARGEST_SEED
from vaani_jax.text.tokenizers import Tokenizer

Array = jax.Array


SEGMENT = 16  # tokens decoded per call: what streaming shows at a time


BATCH_BYTES = 2**28  # of what prompts that are continued together take, see `row_bytes`


PIECE = 2048  # tokens of a long prompt that are read at a time, at most


SCORES_BYTES = 2**31  # of attention to a piece, where no native kernel keeps them small


Reading = Callable[[int, int], None]  # is told of tokens that are read, of how many


@functools.partial(jax.jit, static_argnames=("module", "capacity", "kv_dtype"))
def prefill(
    module: Vaani,
    variables: Any,
    tokens: Array,
    length: Array,
    start: Array | None = None,
    *,
    capacity: int | None = None,
    kv_dtype: str | None = None,
) -> tuple[Array, KVCache]:
    """Reads prompts.

    Args:
      module: static.
      variables: its ``params`` and ``quant``.
      tokens: [B, T]; row b has its tokens at ``start[b]`` to ``length - 1``, and
        padding, any ids, around them.
      length: where all prompts end, int32 scalar.
      start: where each begins, [B] int32; 0 where None.
      capacity: of the cache, T at least; ``max_seq_len`` where None.
      kv_dtype: of the cache, see `KVCache.create`; the compute dtype where None.

    Returns:
      Logits [B, V] after the last token, and the cache.
    """
    dtype = kv_dtype or module.quantization.dtype
    cache = KVCache.create(module.architecture, tokens.shape[0], capacity, dtype, start)
    output: Any = module.apply(variables, tokens, cache, last=length - 1)
    logits, filled = output
    # What was written beyond the real length is masked until it is overwritten.
    return logits[:, 0], dataclasses.replace(filled, length=length)


@functools.partial(jax.jit, static_argnums=(0,), donate_argnums=(3,))
def read_on(
    module: Vaani, variables: Any, tokens: Array, cache: KVCache, last: Array
) -> tuple[Array, KVCache]:
    """Reads a piece of prompts, after those that the cache has.

    Args:
      module: static.
      variables: of the model.
      tokens: [B, T]; the cache must have room for them.
      cache: donated.
      last: index along T of the token whose logits are wanted, int32 scalar.

    Returns:
      Logits [B, V] after that token, and the cache.
    """
    output: Any = module.apply(variables, tokens, cache, last=last)
    logits, filled = output
    return logits[:, 0], filled


def piece_length(module: Vaani, rows: int, capacity: int) -> int:
    """Tokens that are read at a time: `PIECE`, or less where scores are stored."""
    if native():
        return PIECE
    each = 2 * 4 * rows * module.architecture.n_heads * capacity
    fitting = max(1, SCORES_BYTES // each)
    return min(PIECE, max(16, 1 << (fitting.bit_length() - 1)))


def read(
    module: Vaani,
    variables: Any,
    tokens: np.ndarray,
    length: int,
    start: np.ndarray,
    *,
    capacity: int,
    kv_dtype: str | None = None,
    reading: Reading | None = None,
) -> tuple[Array, KVCache]:
    """What `prefill` gives; prompts that are longer than a piece are read in pieces.

    So memory is that of a piece, not of all tokens at once. Numbers are the same, to
    the bit where attention is native, else up to the order of float sums.

    Args:
      module, variables, tokens, length, start, capacity, kv_dtype: see `prefill`.
      reading: is told of each piece of a long prompt, once it is read.
    """
    piece = piece_length(module, len(tokens), capacity)
    if tokens.shape[1] <= piece:
        return prefill(
            module,
            variables,
            jnp.asarray(tokens),
            jnp.asarray(length, jnp.int32),
            jnp.asarray(start),
            capacity=capacity,
            kv_dtype=kv_dtype,
        )
    dtype = kv_dtype or module.quantization.dtype
    cache = KVCache.create(
        module.architecture, len(tokens), capacity, dtype, jnp.asarray(start)
    )
    logits = None
    for first in range(0, length, piece):
        count = min(piece, length - first)
        part = tokens[:, first : first + bucket(count, tokens.shape[1] - first)]
        logits, cache = read_on(
            module, variables, jnp.asarray(part), cache, jnp.asarray(count - 1)
        )
        if reading is not None:
            logits.block_until_ready()
            reading(first + count, length)
    assert logits is not None  # there is a token at least
    return logits, dataclasses.replace(cache, length=jnp.asarray(length, jnp.int32))


@functools.partial(
    jax.jit,
    static_argnums=(0, 1, 2),
    static_argnames=("num_samples", "scored"),
    donate_argnums=(5,),
)
def decode(
    module: Vaani,
    sampler: SamplerConfig,
    steps: int,
    variables: Any,
    logits: Array,
    cache: KVCache,
    key: Array,
    start: Array,
    allowed: Array | None = None,
    *,
    num_samples: int | None = None,
    scored: bool = False,
) -> tuple[Array, Array | None, Array, KVCache]:
    """Draws ``steps`` tokens in one loop.

    Args:
      module, sampler: static.
      steps: tokens to draw; the cache must have room for them.
      variables: of the model.
      logits: [B, V] after the last token seen.
      cache: donated.
      key: of the whole generation.
      start: index of the first token drawn, int32 scalar; token i uses
        ``fold_in(key, i)``, so segments don't change what is drawn.
      allowed: [V] bool, the ids that may be drawn; all where None.
      num_samples: static; see `sample_token`.
      scored: static; whether log-likelihoods are asked for.

    Returns:
      Ids [B, steps] int32; their log-likelihoods [B, steps] float32, in nats, given
      what is before them, as the model has them before temperature and filters, or
      None; the logits after them; and the cache.
    """

    def body(carry: Any, index: Array) -> tuple[Any, Any]:
        logits, cache = carry
        token_key = jax.random.fold_in(key, index)
        drawn_from = logits
        if allowed is not None:
            drawn_from = jnp.where(allowed, logits, -jnp.inf)
        token = sample_token(drawn_from, token_key, sampler, num_samples)
        score = log_likelihood(logits, token) if scored else None
        logits, cache = module.apply(variables, token[:, None], cache)
        return (logits[:, -1], cache), (token, score)

    (logits, cache), (tokens, scores) = jax.lax.scan(
        body, (logits, cache), start + jnp.arange(steps, dtype=jnp.int32)
    )
    return tokens.T, None if scores is None else scores.T, logits, cache


def bucket(length: int, limit: int) -> int:
    """The padded length of a prompt: the next power of two, from 16 up.

    Above 4,096, the next multiple of an eighth of it: memory is then worth a program.
    """
    power = max(16, 1 << (length - 1).bit_length())
    step = power if power <= 4096 else power // 8
    return min(limit, -(-length // step) * step)


def _split(prompt: Any) -> list[np.ndarray]:
    """One prompt or several as a list of int32 vectors."""
    several = len(prompt) > 0 and np.ndim(prompt[0]) == 1
    prompts = [np.asarray(p, np.int32) for p in (prompt if several else [prompt])]
    for i, one in enumerate(prompts):
        if len(one) < 1:
            which = f"prompt {i + 1}" if len(prompts) > 1 else "the prompt"
            raise VaaniError(f"{which} is empty: give at least one character")
    return prompts


def _align(rows: list[np.ndarray], limit: int) -> tuple[np.ndarray, int, np.ndarray]:
    """Rows that end together, padded to a bucket: as `prefill` takes them.

    Returns:
      Tokens [B, T], where the rows end, and where each starts [B]; all int32.
    """
    length = max(map(len, rows))
    tokens = np.zeros((len(rows), bucket(length, limit)), np.int32)
    start = np.asarray([length - len(row) for row in rows], np.int32)
    for padded, row, first in zip(tokens, rows, start, strict=True):
        padded[first:length] = row
    return tokens, length, start


def _check_counts(max_new_tokens: int, num_samples: int, segment: int) -> None:
    if max_new_tokens < 1 or num_samples < 1:
        raise VaaniError("ask for at least one token and one sample")
    if segment < 1:
        raise VaaniError("a segment has at least one token")


def _check_seed(seed: int) -> None:
    if not 0 <= seed <= LARGEST_SEED:
        raise VaaniError(f"seed is {seed}: it must be in [0, {LARGEST_SEED}]")


def capacity_for(longest: int, ahead: int, segment: int, context: int) -> int:
    """Slots of a cache for prompts of up to ``longest`` tokens and ``ahead`` new ones.

    A full segment is decoded even if less is asked for. Starting from the bucket, not
    from the prompt, other lengths in it lead to the same capacity.
    """
    whole = -(-ahead // segment) * segment
    return bucket(bucket(min(longest, context), context) + whole, context)


def row_bytes(
    module: Vaani,
    longest: int,
    *,
    max_new_tokens: int,
    kv_dtype: str | None = None,
    segment: int = SEGMENT,
) -> int:
    """What each row of a batch takes while it is read and continued, about, in bytes.

    Its cache, which calls hand on in its place; of one layer of the prefill, or of a
    piece of it, the states, and the scores of attention and their weights where no
    native kernel keeps them to itself; and nine times its logits: as they come and go,
    sorted, with probabilities and their sums, filtered, and with noise.

    Args:
      module: the model.
      longest: tokens of the longest prompt of the batch.
      max_new_tokens, kv_dtype, segment: see `stream`.
    """
    a = module.architecture
    length = bucket(min(longest, a.max_seq_len), a.max_seq_len)
    capacity = capacity_for(longest, max_new_tokens, segment, a.max_seq_len)
    length = min(length, piece_length(module, 1, capacity))
    cached = cache_bytes(a, 1, capacity, kv_dtype or module.quantization.dtype)
    scores = 0 if native() else 2 * a.n_heads * length * capacity
    states = length * (2 * a.dim + 2 * a.n_heads * a.head_size + 3 * a.hidden_dim)
    return cached + 4 * (scores + states + 9 * a.vocab_size)


def room_for(
    module: Vaani,
    prompts: Sequence[np.ndarray],
    *,
    max_new_tokens: int,
    num_samples: int = 1,
    kv_dtype: str | None = None,
    segment: int = SEGMENT,
) -> str:
    """A line on the cache that prompts need together; "" where it is not large.

    Args:
      module: the model.
      prompts: ids of each.
      max_new_tokens, num_samples, kv_dtype, segment: see `segments`.

    Raises VaaniError for a cache that the free memory can't hold.
    """
    a = module.architecture
    longest, rows = max(map(len, prompts)), len(prompts) * num_samples
    capacity = capacity_for(longest, max_new_tokens, segment, a.max_seq_len)
    dtype = kv_dtype or module.quantization.dtype
    each = row_bytes(
        module,
        longest,
        max_new_tokens=max_new_tokens,
        kv_dtype=kv_dtype,
        segment=segment,
    )
    beside = rows * (each - cache_bytes(a, 1, capacity, dtype))
    check_room(a, rows, capacity, dtype, beside)
    return in_words(a, rows, capacity, dtype)


def batches(
    module: Vaani,
    prompts: Sequence[np.ndarray],
    *,
    max_new_tokens: int,
    num_samples: int = 1,
    kv_dtype: str | None = None,
    segment: int = SEGMENT,
    rows: int = 0,
) -> Iterator[slice]:
    """Cuts a list of prompts into runs, each to be continued as one batch.

    Each run has a power of two of prompts, or all that are left, so that not many
    programs are compiled: what fits `BATCH_BYTES`, one prompt at least.

    Args:
      module: the model.
      prompts: ids of each.
      num_samples: continuations of each prompt.
      rows: the most continuations of a batch, unless one prompt has more; 0 for as many
        as fit.
      max_new_tokens, kv_dtype, segment: see `stream`.

    Raises VaaniError for counts that `stream` refuses, and for negative ``rows``.
    """
    _check_counts(max_new_tokens, num_samples, segment)
    if rows < 0:
        raise VaaniError(f"the batch size is {rows}: it must be at least 0")
    context = module.architecture.max_seq_len

    @functools.cache
    def cost(longest: int) -> int:
        return row_bytes(
            module,
            longest,
            max_new_tokens=max_new_tokens,
            kv_dtype=kv_dtype,
            segment=segment,
        )

    lengths = [bucket(min(len(prompt), context), context) for prompt in prompts]
    first = 0
    while first < len(lengths):
        count = 1
        while count < len(lengths) - first:
            wanted = min(2 * count, len(lengths) - first)
            batch = wanted * num_samples
            taken = batch * cost(max(lengths[first : first + wanted]))
            if taken > BATCH_BYTES or (rows and batch > rows):
                break
            count = wanted
        yield slice(first, first + count)
        first += count


@dataclasses.dataclass(frozen=True)
class Segment:
    """Tokens drawn together.

    Attributes:
      ids: [P * num_samples, n], int32: the samples of the first prompt, then those of
        the second. Where a row has ended before, its last id, which ended it, is
        repeated.
      scores: [P * num_samples, n], float32: log-likelihoods in nats of these tokens
        given what is before them, as the model has them before temperature and filters;
        None unless asked for. 0 where a row has ended before.
    """

    ids: np.ndarray
    scores: np.ndarray | None = None


def _allowed(tokenizer: Tokenizer, vocab_size: int) -> np.ndarray | None:
    """Which ids of a model its tokenizer has a token for, [V]; None for all."""
    allowed = np.zeros(vocab_size, bool)
    has_token = tokenizer.has_token()[:vocab_size]
    allowed[: len(has_token)] = has_token
    return None if allowed.all() else allowed


def segments(
    model: Model,
    prompt: np.ndarray | Sequence[np.ndarray],
    *,
    max_new_tokens: int,
    sampler: SamplerConfig = SamplerConfig(),
    seed: int = 0,
    num_samples: int = 1,
    kv_dtype: str | None = None,
    segment: int = SEGMENT,
    ignore_eos: bool = False,
    scored: bool = False,
    reading: Reading | None = None,
) -> Iterator[Segment]:
    """Continues prompts, a segment at a time, until all rows have ended.

    Each prompt continues as it does alone: a ternary model to the bit on a CPU with
    native kernels, else up to the order of float sums.

    Args:
      model: packed or not.
      prompt: ids [length], at least one; or a list of P such prompts, of any lengths.
        Of a prompt longer than the context, the end counts.
      max_new_tokens: how many to draw at most.
      sampler: how.
      seed: equal seeds draw equal tokens. Token i of sample s depends on the seed, i
        and s, not on which prompt it continues: equal prompts continue equally.
      num_samples: independent continuations of each prompt.
      kv_dtype: of the cache: "float32", "bfloat16", "int8" or "int4"; the compute dtype
        where None.
      segment: tokens at a time.
      ignore_eos: whether to go on where an id that ends a text is drawn.
      scored: whether log-likelihoods are asked for.
      reading: see `read`.

    Yields:
      Segments of ``segment`` tokens or fewer.

    Raises:
      VaaniError: an empty prompt, nothing asked for, a dtype that caches don't have, or
        a cache that the free memory can't hold.
    """
    prompts = _split(prompt)
    _check_counts(max_new_tokens, num_samples, segment)
    _check_seed(seed)
    module = model.module
    context = module.architecture.max_seq_len
    if context < 2:
        raise VaaniError("a model with a context of one token can't continue a prompt")
    key = jax.random.key(seed)
    windows = [ids for ids in prompts for _ in range(num_samples)]
    longest = max(map(len, prompts))
    capacity = capacity_for(longest, max_new_tokens, segment, context)
    room_for(
        module,
        prompts,
        max_new_tokens=max_new_tokens,
        num_samples=num_samples,
        kv_dtype=kv_dtype,
        segment=segment,
    )
    variables = with_angles(module, model.variables, capacity)
    allowed = _allowed(model.tokenizer, module.architecture.vocab_size)
    ends = np.asarray([] if ignore_eos else model.tokenizer.eos_ids, np.int32)
    ended = np.full(len(windows), -1, np.int32)  # by which id; -1 for none
    drawn = 0
    room = 0
    logits = cache = None
    while drawn < max_new_tokens and (ended < 0).any():
        if room == 0:
            half = max(1, context // 2)
            windows = [w if len(w) < context else w[-half:] for w in windows]
            tokens, length, start = _align(windows, context)
            logits = cache = None  # not two caches at a time
            logits, cache = read(
                module,
                variables,
                tokens,
                length,
                start,
                capacity=capacity,
                kv_dtype=kv_dtype,
                reading=reading,
            )
            room = capacity - length
        # Two compiled lengths serve everything: a full segment, whose surplus is cut,
        # and single tokens up to the end of the context.
        wanted = min(segment, max_new_tokens - drawn)
        steps = segment if room >= segment else 1
        ids, scores, logits, cache = decode(
            module,
            sampler,
            steps,
            variables,
            logits,
            cache,
            key,
            jnp.asarray(drawn, jnp.int32),
            None if allowed is None else jnp.asarray(allowed),
            num_samples=num_samples,
            scored=scored,
        )
        new = Segment(
            _cut(ids, wanted), None if scores is None else _cut(scores, wanted)
        )
        new, ended = _ended(new, ended, ends)
        windows = [np.concatenate(pair) for pair in zip(windows, new.ids, strict=True)]
        drawn += new.ids.shape[1]
        room -= steps
        yield new


def _cut(array: Array, wanted: int) -> np.ndarray:
    return np.asarray(jax.device_get(array))[:, :wanted]


def _ended(
    new: Segment, before: np.ndarray, ends: np.ndarray
) -> tuple[Segment, np.ndarray]:
    """Overwrites what was drawn behind the end of a row, and cuts what all rows have.

    Args:
      new: as drawn.
      before: [rows] the id that has ended each row, or -1.
      ends: the ids that end a text.

    Returns:
      What counts, and the id that has ended each row by now.
    """
    if not len(ends):
        return new, before
    ids, count = new.ids.copy(), new.ids.shape[1]
    hits = np.isin(ids, ends)
    # Where the row ends: before this segment, at a token of it, or not.
    first = np.where(hits.any(axis=1), hits.argmax(axis=1), count)
    first = np.where(before >= 0, -1, first)
    rows = np.arange(len(ids))
    here = ids[rows, np.clip(first, 0, count - 1)]
    ended = np.where(before >= 0, before, np.where(first < count, here, -1))
    behind = np.arange(count) > first[:, None]
    ids = np.where(behind, ended[:, None], ids).astype(np.int32)
    scores = None if new.scores is None else np.where(behind, 0, new.scores)
    kept = count if (first == count).any() else max(1, int(first.max()) + 1)
    return Segment(ids[:, :kept], None if scores is None else scores[:, :kept]), ended


def stream(
    model: Model, prompt: np.ndarray | Sequence[np.ndarray], **options: Any
) -> Iterator[np.ndarray]:
    """The ids of `segments`, [P * num_samples, n], int32."""
    for new in segments(model, prompt, **options):
        yield new.ids


def until_end(ids: np.ndarray, tokenizer: Tokenizer) -> np.ndarray:
    """The part of a row of ids that comes before the first one that ends a text."""
    hits = np.isin(ids, np.asarray(tokenizer.eos_ids, np.int32))
    return ids[: int(hits.argmax())] if hits.any() else ids


def generate(
    model: Model,
    prompt: np.ndarray | Sequence[np.ndarray],
    **options: Any,
) -> np.ndarray:
    """All that `stream` yields at once.

    Returns:
      Ids [P * num_samples, n], int32; P = 1 for a single prompt. n is
      ``max_new_tokens``, or less where all rows have ended before; see `Segment` and
      `until_end` for rows that end before others.
    """
    return np.concatenate(list(stream(model, prompt, **options)), axis=1)


class Session:
    """Continues one text after another, and reads only what is new of each.

    The cache of a text stays. Where the next one begins alike, as the next turn of a
    chat does, it is read from where they part. What is drawn equals what `segments`
    draws for the whole text: a ternary model to the bit on a CPU with native kernels,
    else up to the order of float sums.

    Attributes:
      held: the ids that the cache holds, in order, int32.
      reused: how many ids of the last text were held already.
    """

    def __init__(
        self, model: Model, *, kv_dtype: str | None = None, segment: int = SEGMENT
    ) -> None:
        """Begins with an empty cache.

        Args:
          model: packed or not.
          kv_dtype, segment: see `segments`.

        Raises VaaniError where a segment has no token.
        """
        _check_counts(1, 1, segment)
        self._model, self._kv_dtype, self._segment = model, kv_dtype, segment
        self._cache: KVCache | None = None
        self.held = np.zeros(0, np.int32)
        self.reused = 0

    def continued(
        self,
        text: np.ndarray,
        *,
        max_new_tokens: int,
        sampler: SamplerConfig = SamplerConfig(),
        seed: int = 0,
        ends: Sequence[int] = (),
    ) -> Generator[np.ndarray, None, None]:
        """Continues a text, a segment at a time.

        Args:
          text: all of its ids [length], at least one.
          max_new_tokens: how many to draw at most; no more than fit the context.
          sampler: how.
          seed: equal seeds draw equal tokens.
          ends: ids that end it.

        Yields:
          Ids [n], int32; the last one of all may be of ``ends``.

        Raises:
          VaaniError: an empty text, or one that fills the context; nothing asked for.
        """
        (ids,) = _split(text)
        _check_counts(max_new_tokens, 1, self._segment)
        _check_seed(seed)
        model, module = self._model, self._model.module
        room = module.architecture.max_seq_len - len(ids)
        if room < 1:
            raise VaaniError(
                f"the text has {len(ids):,} tokens, and the context"
                f" {module.architecture.max_seq_len:,}: nothing can follow"
            )
        wanted = min(max_new_tokens, room)
        logits, cache = self._read(ids, wanted)
        allowed = _allowed(model.tokenizer, module.architecture.vocab_size)
        key = jax.random.key(seed)
        drawn, ended = 0, False
        while drawn < wanted and not ended:
            before = len(ids) + drawn
            steps = self._segment
            steps = steps if cache.capacity - before >= steps else 1
            self._forget()  # the cache is donated: it is gone if this is interrupted
            found, _, logits, cache = decode(
                module,
                sampler,
                steps,
                with_angles(module, model.variables, cache.capacity),
                logits,
                cache,
                key,
                jnp.asarray(drawn, jnp.int32),
                None if allowed is None else jnp.asarray(allowed),
            )
            new = _cut(found, wanted - drawn)[0]
            hits = np.isin(new, np.asarray(ends, np.int32))
            if ended := bool(hits.any()):
                new = new[: int(hits.argmax()) + 1]
            ids = np.concatenate([ids[:before], new])
            self._cache, self.held = cache, ids
            drawn += len(new)
            yield new

    def _forget(self) -> None:
        self._cache, self.held = None, self.held[:0]

    def _read(self, ids: np.ndarray, ahead: int) -> tuple[Array, KVCache]:
        """Logits [1, V] after a text, and a cache with room for what is ahead."""
        context = self._model.architecture.max_seq_len
        capacity = capacity_for(len(ids), ahead, self._segment, context)
        # At least the last one is read: its logits are asked for.
        n = min(len(ids) - 1, len(self.held))
        differs = ids[:n] != self.held[:n]
        begin = int(differs.argmax()) if differs.any() else n
        cache, self.reused = self._cache, begin
        self._forget()
        module, variables = self._model.module, self._model.variables
        if begin == 0:
            cache = None  # before there is another
        if cache is None:
            tokens, length, start = _align([ids], context)
            logits, cache = read(
                module,
                with_angles(module, variables, capacity),
                tokens,
                length,
                start,
                capacity=capacity,
                kv_dtype=self._kv_dtype,
            )
        else:
            if cache.capacity < capacity:
                cache = _grown(cache, module, capacity, self._kv_dtype)
            variables = with_angles(module, variables, cache.capacity)
            while begin < len(ids):
                wanted = min(len(ids) - begin, piece_length(module, 1, cache.capacity))
                padded = _piece(wanted, cache.capacity - begin)
                part = ids[begin : begin + padded]
                tokens = np.zeros((1, padded), np.int32)
                tokens[0, : len(part)] = part
                logits, cache = read_on(
                    module,
                    variables,
                    jnp.asarray(tokens),
                    _shortened(cache, begin),
                    jnp.asarray(len(part) - 1, jnp.int32),
                )
                begin += len(part)
                cache = _shortened(cache, begin)
        self._cache, self.held = cache, ids
        return logits, cache


def _shortened(cache: KVCache, length: int) -> KVCache:
    """A cache of which only the first slots count."""
    return dataclasses.replace(cache, length=jnp.asarray(length, jnp.int32))


def _grown(
    cache: KVCache, module: Vaani, capacity: int, kv_dtype: str | None
) -> KVCache:
    """A cache of a row with more slots, and what the smaller one has."""
    dtype = kv_dtype or module.quantization.dtype
    larger = KVCache.create(module.architecture, 1, capacity, dtype)

    def placed(new: Array, old: Array) -> Array:
        if new.shape == old.shape:  # no array of slots
            return old
        return jax.lax.dynamic_update_slice(new, old, (0,) * new.ndim)

    grown: KVCache = jax.tree.map(placed, larger, cache)
    return grown


def _piece(wanted: int, room: int) -> int:
    """How many slots the next piece of a text takes, of those that there are.

    A bucket, so that few programs are compiled; where that has no room, a smaller one,
    and in the last few slots a single token.
    """
    length = bucket(wanted, LARGEST_INT)
    while length > room:
        length //= 2
    return length if length >= 16 else 1

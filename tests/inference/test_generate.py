"""Text from a model: decoding against no cache at all, samplers against numpy."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from structure import same_structure

from vaani_jax.errors import VaaniError
from vaani_jax.inference import generate as generate_module
from vaani_jax.inference import room
from vaani_jax.inference.generate import (
    SEGMENT,
    batches,
    decode,
    generate,
    prefill,
    read_on,
    room_for,
    row_bytes,
    segments,
    stream,
    until_end,
)
from vaani_jax.inference.model import Model
from vaani_jax.inference.sampling import SamplerConfig, sample_token
from vaani_jax.kernels.floats import log_likelihood, native
from vaani_jax.model.cache import KVCache
from vaani_jax.model.transformer import Vaani, init_variables, unrolled, with_angles
from vaani_jax.text.tokenizers import CharTokenizer
from vaani_jax.train.config import SampleConfig
from vaani_jax.words import size

CONTEXT = 24
CONFIG = Vaani().changed(
    vocab_size=17,
    dim=16,
    n_layers=1,
    n_heads=2,
    ffn_dim=16,
    max_seq_len=CONTEXT,
    init_std=0.5,
    tie_embeddings=False,  # a tied model of random weights repeats itself
)
TWIN = CONFIG.changed(quantize=False)
GREEDY = SamplerConfig(temperature=0.0)
WARM = SamplerConfig(temperature=1.0)
TOKENS = np.arange(16, dtype=np.int32)[None]


@functools.cache
def variables_of(module):
    return init_variables(module, jax.random.key(2))


def model_of(module):
    """A model whose greedy text is no cycle of a few tokens."""
    return Model(module, variables_of(module), CharTokenizer("abcdefghijklmnopq"))


@functools.cache
def forward(module):
    return jax.jit(module.apply)


def prompt_of(length):
    return np.random.default_rng(length).integers(0, 17, length, dtype=np.int32)


def programs():
    """How many programs of each kind there are."""
    functions: tuple[Any, ...] = (prefill, decode)
    return [function._cache_size() for function in functions]


def generate_by_hand(module, prompt, max_new_tokens):
    """Greedy tokens from the full forward over all that the context holds."""
    variables = variables_of(module)
    window, drawn = list(prompt), list[int]()
    while len(drawn) < max_new_tokens:
        if len(window) >= CONTEXT:  # full: its newest half stays
            window = window[-(CONTEXT // 2) :]
        # Padding comes after, where a causal model doesn't see it.
        padded = np.zeros((1, CONTEXT), np.int32)
        padded[0, : len(window)] = window
        logits = forward(module)(variables, jnp.asarray(padded))
        drawn.append(int(jnp.argmax(logits[0, len(window) - 1])))
        window.append(drawn[-1])
    return drawn


@pytest.mark.parametrize("module", [CONFIG, TWIN], ids=["bit", "fp"])
def test_greedy_text_equals_a_loop_without_a_cache(module):
    """At the edges of the buckets (16, 24), of the context, and sliding past it."""
    for length in (1, 2, 15, 16, 17, 23, 24, 25, 60):
        prompt = prompt_of(length)
        found = generate(
            model_of(module),
            prompt,
            max_new_tokens=45,
            sampler=GREEDY,
            num_samples=2,
        )
        assert found.shape == (2, 45)
        assert found.dtype == np.int32
        expected = generate_by_hand(module, prompt, 45)
        assert len(set(expected)) > 4  # a loop of one token would prove little
        np.testing.assert_array_equal(found, [expected, expected])


RAGGED = (5, 1, 17, 23, 24, 60)  # of all buckets; full contexts slide at once


@pytest.mark.parametrize(
    "changes",
    [{}, {"quantize": False}, {"n_kv_heads": 1, "attention": "library"}],
    ids=["bit", "fp", "gqa"],
)
def test_prompts_of_a_batch_continue_as_each_alone(changes):
    """Past the end of the context too, which each row reaches at its own time."""
    module = CONFIG.changed(**changes)
    prompts = [prompt_of(length) for length in RAGGED]
    found = generate(model_of(module), prompts, max_new_tokens=45, sampler=GREEDY)
    assert found.shape == (len(RAGGED), 45)
    for row, prompt in zip(found, prompts, strict=True):
        np.testing.assert_array_equal(row, generate_by_hand(module, prompt, 45))


@pytest.mark.parametrize("kv_dtype", [None, "bfloat16", "int8"])
def test_samples_of_a_prompt_are_the_same_in_any_batch(kv_dtype):
    def draw(prompt):
        return generate(
            model_of(TWIN),
            prompt,
            max_new_tokens=30,
            sampler=WARM,
            num_samples=2,
            seed=5,
            kv_dtype=kv_dtype,
        )

    prompts = [prompt_of(4), prompt_of(9), prompt_of(4)]
    found = draw(prompts)
    assert found.shape == (6, 30)
    for i, prompt in enumerate(prompts):
        np.testing.assert_array_equal(found[2 * i : 2 * i + 2], draw(prompt))
    assert np.mean(found[0] != found[1]) > 0.3
    assert np.mean(found[0] != found[2]) > 0.3
    same = np.stack([prompt_of(9), prompt_of(9)])  # rows of a matrix are prompts
    np.testing.assert_array_equal(draw(same)[:2], found[2:4])


LONG = CONFIG.changed(max_seq_len=300, n_kv_heads=1, n_layers=2)


@pytest.mark.parametrize("kv_dtype", ["float32", "bfloat16", "int8", "int4"])
def test_long_prompts_are_read_in_pieces_as_at_once(kv_dtype, monkeypatch):
    """Alone and in a batch, whose rows begin anywhere in a piece."""
    model, prompts = model_of(LONG), [prompt_of(n) for n in (150, 3, 77, 200)]
    told: list[tuple[int, int]] = []

    def drawn(prompts):
        found = list(
            segments(
                model,
                prompts,
                max_new_tokens=70,
                sampler=GREEDY,
                kv_dtype=kv_dtype,
                scored=True,
                reading=lambda *counts: told.append(counts),
            )
        )
        return (
            np.concatenate([part.ids for part in found], axis=1),
            np.concatenate([part.scores for part in found], axis=1),
        )

    ids, scores = drawn(prompts)
    assert len(np.unique(ids)) > 8  # a loop of a few tokens would prove little
    assert not told  # nothing of this is long
    for row, prompt in enumerate(prompts):
        alone, own = drawn(prompt)
        np.testing.assert_array_equal(alone[0], ids[row])
        if native():
            np.testing.assert_array_equal(own[0], scores[row])
    for piece in (64, 128):
        monkeypatch.setattr(generate_module, "PIECE", piece)
        told.clear()
        again, others = drawn(prompts)
        assert told == [(min(n, 200), 200) for n in range(piece, 200 + piece, piece)]
        np.testing.assert_array_equal(again, ids)
        if native():
            np.testing.assert_array_equal(others, scores)


def test_pieces_do_not_recompile(monkeypatch):
    module = LONG.changed(max_seq_len=301)  # compiled by no other test
    monkeypatch.setattr(generate_module, "PIECE", 32)

    reader: Any = read_on

    def compiled(*lengths):
        before = reader._cache_size(), *programs()
        for length in lengths:
            generate(model_of(module), prompt_of(length), max_new_tokens=20)
        return tuple(np.subtract((reader._cache_size(), *programs()), before))

    assert compiled(130) == (2, 0, 1)  # whole pieces, and one of 16
    assert compiled(129, 140, 192, 210, 224) == (0, 0, 0)


def test_a_long_context_costs_nothing_until_it_is_used():
    """No compiled program holds the angles of all its positions."""
    module = TWIN.changed(max_seq_len=2**17, dim=256)
    model = model_of(module)
    found = generate(model, prompt_of(5), max_new_tokens=3)
    assert found.shape == (1, 3)
    for capacity in (64, 2**17):
        cache = KVCache.create(module.architecture, 1, capacity)
        variables = with_angles(module, model.variables, capacity)
        lowered: Any = read_on.lower(
            module, variables, jnp.zeros((1, 16), jnp.int32), cache, jnp.int32(0)
        )
        assert len(lowered.as_text()) < 700_000
    # They are those of the table that training has.
    logits, _ = read_on(module, variables, jnp.asarray(TOKENS), cache, jnp.int32(15))
    expected = forward(module.changed(max_seq_len=64))(model.variables, TOKENS)[:, 15]
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)


def test_the_cache_has_room_for_what_is_asked(monkeypatch):
    module = TWIN.changed(max_seq_len=300)
    capacities, bytes_of = [], []

    def spy(*args, **options):
        logits, cache = prefill(*args, **options)
        capacities.append(cache.capacity)
        bytes_of.append(cache.nbytes)
        return logits, cache

    monkeypatch.setattr(generate_module, "prefill", spy)

    def run(lengths, new, **options):
        prompts = [prompt_of(length) for length in lengths]
        found = generate(model_of(module), prompts, max_new_tokens=new, **options)
        assert found.shape == (len(lengths), new)

    run([3], 1)
    run([16], 16)
    run([17], 16)
    run([3, 16], 17)
    run([290], 3)
    assert capacities == [32, 32, 64, 64, 300]
    capacities.clear()
    run([3], 1, segment=64)  # the surplus of a segment has room too
    assert capacities == [128]
    run([3], 1, kv_dtype="int8")
    assert bytes_of[-1] < 0.4 * bytes_of[0]  # H = 8


def test_equal_seeds_draw_equal_tokens_wherever_segments_end():
    def draw(max_new_tokens, seed=3, segment=SEGMENT):
        return generate(
            model_of(TWIN),
            prompt_of(5),
            max_new_tokens=max_new_tokens,
            sampler=WARM,
            seed=seed,
            num_samples=2,
            segment=segment,
        )

    longest = draw(50)
    for length in (1, SEGMENT - 1, SEGMENT, SEGMENT + 1, 19, 20, 33):
        np.testing.assert_array_equal(draw(length), longest[:, :length])
    for segment in (1, 5, 30):  # 30 is more than the context holds
        np.testing.assert_array_equal(draw(50, segment=segment), longest)
    assert np.mean(draw(50, seed=4) != longest) > 0.3


def test_samples_differ_but_greedy_ones_do_not():
    run = functools.partial(generate, model_of(TWIN), prompt_of(5), max_new_tokens=30)
    warm = run(num_samples=2, sampler=WARM)
    assert warm.shape == (2, 30)
    assert np.mean(warm[0] != warm[1]) > 0.3
    greedy = run(num_samples=2, sampler=GREEDY)
    np.testing.assert_array_equal(greedy[0], greedy[1])


@pytest.mark.parametrize("length", [1, 16, 17, 40, 61])
def test_a_stream_yields_what_was_asked_for(length):
    segments = list(stream(model_of(TWIN), prompt_of(3), max_new_tokens=length))
    assert all(1 <= s.shape[1] <= SEGMENT and s.shape[0] == 1 for s in segments)
    assert sum(s.shape[1] for s in segments) == length
    tokens = np.concatenate(segments, axis=1)
    assert tokens.min() >= 0
    assert tokens.max() < 17


def test_a_new_prompt_length_in_a_bucket_does_not_recompile():
    module = TWIN.changed(max_seq_len=64)  # compiled by no other test

    def compiled(*lengths):
        before = programs()
        for length in lengths:
            generate(
                model_of(module),
                prompt_of(length),
                max_new_tokens=20,
                sampler=WARM,
                seed=length,
            )
        return tuple(np.subtract(programs(), before))

    assert compiled(5) == (1, 1)
    assert compiled(1, 7, 15, 16) == (0, 0)
    assert compiled(17) == (1, 0)  # the next bucket; decoding stays as it is
    assert compiled(18, 23, 24) == (0, 0)


def test_new_lengths_in_a_batch_do_not_recompile():
    module = TWIN.changed(max_seq_len=65)  # compiled by no other test

    def compiled(*lengths, seed=0):
        before = programs()
        generate(
            model_of(module),
            [prompt_of(length) for length in lengths],
            max_new_tokens=20,
            sampler=WARM,
            seed=seed,
        )
        return tuple(np.subtract(programs(), before))

    assert compiled(5, 9, 1) == (1, 1)
    assert compiled(16, 2, 3) == (0, 0)
    assert compiled(7, 7, 7, seed=1) == (0, 0)
    assert compiled(5, 9) == (1, 1)  # another batch


def test_a_prompt_alone_is_padded_on_the_right_only(monkeypatch):
    seen = []

    def spy(*args, **options):
        seen.append([np.asarray(x) for x in args[2:5]])
        return prefill(*args, **options)

    monkeypatch.setattr(generate_module, "prefill", spy)
    prompts = [prompt_of(5), prompt_of(5)[::-1]]
    generate(model_of(TWIN), prompts, max_new_tokens=1)
    (tokens, length, start), *rest = seen
    assert not rest
    assert length == 5
    np.testing.assert_array_equal(start, [0, 0])
    np.testing.assert_array_equal(tokens[:, :5], prompts)
    assert tokens.shape == (2, 16)


def test_scanned_layers_unroll_to_the_same_model():
    module = CONFIG.changed(n_layers=2, scan_layers=True)
    plain = module.changed(scan_layers=False)
    found, trees = unrolled(module, variables_of(module))
    assert found == plain
    expected = variables_of(plain)
    assert same_structure(trees, expected)
    for a, b in zip(jax.tree.leaves(trees), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(a, b)
    same, same_variables = unrolled(plain, expected)
    assert same is plain
    assert same_variables is expected


# Samplers.


def reference_probabilities(logits, sampler):
    """Of one row, in float64: temperature, then top-k, top-p and min-p."""
    logits = logits.astype(np.float64) / sampler.temperature
    p = np.exp(logits - logits.max())
    p /= p.sum()
    order = np.argsort(-p)
    if sampler.top_k:
        p[order[sampler.top_k :]] = 0
        p /= p.sum()
    if sampler.top_p < 1:
        size = 1 + int(np.searchsorted(np.cumsum(p[order]), sampler.top_p))
        p[order[size:]] = 0
        p /= p.sum()
    p[p < sampler.min_p * p.max()] = 0
    return p / p.sum()


SAMPLERS = [
    SamplerConfig(1.0),
    SamplerConfig(0.5),
    SamplerConfig(2.0),
    SamplerConfig(1.0, top_k=1),
    SamplerConfig(1.0, top_k=4),
    SamplerConfig(1.0, top_k=100),
    SamplerConfig(1.0, top_p=0.05),
    SamplerConfig(1.0, top_p=0.6),
    SamplerConfig(1.5, top_p=0.9),
    SamplerConfig(1.0, min_p=0.2),
    SamplerConfig(0.7, min_p=1.0),
    SamplerConfig(1.5, top_k=7, top_p=0.8, min_p=0.3),
]


@pytest.mark.parametrize("sampler", SAMPLERS, ids=str)
def test_samplers_draw_from_the_reference_distribution(sampler):
    rows, draws, vocab = 4, 2000, 11
    logits = np.random.default_rng(1).normal(0, 1, (rows, vocab)).astype(np.float32)
    tiled = jnp.asarray(np.repeat(logits, draws, axis=0))
    ids = sample_token(tiled, jax.random.key(0), sampler)
    assert ids.shape == (rows * draws,)
    assert ids.dtype == jnp.int32
    # In groups, each row draws as the group does alone.
    group = sample_token(tiled[: 2 * draws], jax.random.key(0), sampler, draws)
    alone = sample_token(tiled[draws : 2 * draws], jax.random.key(0), sampler)
    np.testing.assert_array_equal(group[draws:], alone)
    for row, drawn in zip(logits, np.asarray(ids).reshape(rows, draws), strict=True):
        found = np.bincount(drawn, minlength=vocab) / draws
        expected = reference_probabilities(row, sampler)
        np.testing.assert_array_equal(found[expected == 0], 0)
        likely = expected > 0.01
        assert (found[likely] > 0).all()
        np.testing.assert_allclose(found, expected, atol=0.04)


def test_temperature_zero_takes_the_likeliest_whatever_the_filters():
    logits = np.random.default_rng(2).normal(size=(50, 9)).astype(np.float32)
    for sampler in (GREEDY, SamplerConfig(0.0, top_k=3, top_p=0.2, min_p=0.5)):
        ids = sample_token(jnp.asarray(logits), jax.random.key(0), sampler)
        np.testing.assert_array_equal(ids, logits.argmax(axis=-1))
        assert ids.dtype == jnp.int32


# Refusals.


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"prompt": np.zeros(0, np.int32)}, "prompt is empty"),
        ({"prompt": []}, "prompt is empty"),
        ({"prompt": [prompt_of(3), prompt_of(0)]}, "prompt 2 is empty"),
        ({"segment": 0}, "segment has at least one token"),
        ({"kv_dtype": "int2"}, "float32, bfloat16, int8 or int4, not int2"),
        ({"max_new_tokens": 0}, "at least one token"),
        ({"num_samples": 0}, "one sample"),
        ({"model": model_of(TWIN.changed(max_seq_len=1))}, "context of one token"),
    ],
)
def test_impossible_requests_are_refused(changes, words):
    options = {
        "model": model_of(TWIN),
        "prompt": prompt_of(3),
        "max_new_tokens": 4,
        **changes,
    }
    with pytest.raises(VaaniError, match=words):
        generate(**options)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("temperature", -0.1),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("min_p", -0.1),
        ("min_p", 1.1),
    ],
)
def test_impossible_samplers_are_refused_by_name(key, value):
    for kind in (SamplerConfig, SampleConfig):
        with pytest.raises(VaaniError, match=key.replace("_", "-")):
            kind(**{key: value})


def test_sample_settings_become_a_sampler():
    config = SampleConfig(temperature=0.3, top_k=5, top_p=0.7, min_p=0.1)
    assert config.sampler == SamplerConfig(0.3, 5, 0.7, 0.1)
    with pytest.raises(VaaniError, match="max_new_tokens"):
        SampleConfig(max_new_tokens=0)


# -- Many prompts ---------------------------------------------------------------------


WIDE = Vaani().changed(
    vocab_size=3000, dim=32, n_layers=2, n_heads=2, ffn_dim=64, max_seq_len=64
)


def test_batches_take_every_prompt_once_and_no_more_than_fits(monkeypatch):
    rng = np.random.default_rng(0)
    prompts = [np.zeros(n, np.int32) for n in rng.integers(1, 90, size=300)]
    cost = functools.partial(row_bytes, WIDE, max_new_tokens=20)
    monkeypatch.setattr(generate_module, "BATCH_BYTES", 20 * cost(64))
    for samples, rows in ((1, 0), (3, 0), (1, 5), (50, 0)):
        found = list(
            batches(WIDE, prompts, max_new_tokens=20, num_samples=samples, rows=rows)
        )
        assert [i for b in found for i in range(b.start, b.stop)] == [*range(300)]
        sizes = {b.stop - b.start for b in found[:-1]}
        assert all(size & (size - 1) == 0 for size in sizes)  # powers of two
        for batch in found:
            count = batch.stop - batch.start
            longest = max(map(len, prompts[batch]))
            assert count == 1 or count * samples * cost(longest) <= 20 * cost(64)
            assert count == 1 or not rows or count * samples <= rows
        # A batch twice as large would not have fitted.
        assert (
            max(sizes) == {(1, 0): 16, (3, 0): 4, (1, 5): 4, (50, 0): 1}[samples, rows]
        )


@pytest.mark.parametrize("kv_dtype", ["float32", "int8", "int4"])
@pytest.mark.parametrize("length", [16, 64])
def test_a_batch_takes_what_is_counted(length, kv_dtype):
    """What the compiler says of prefill and decode grows by no more for each row."""
    model, rows = model_of(WIDE), 8
    capacity = 64
    sampler = SamplerConfig(top_p=0.9)

    def taken(batch):
        tokens = jnp.zeros((batch, length), jnp.int32)
        start = jnp.zeros(batch, jnp.int32)
        static = {"capacity": capacity, "kv_dtype": kv_dtype}
        lowered: Any = prefill.lower(
            WIDE, model.variables, tokens, jnp.int32(length), start, **static
        )
        logits, cache = lowered.out_info
        further: Any = decode.lower(
            *(WIDE, sampler, SEGMENT, model.variables),
            *(jax.tree.map(jnp.zeros_like, (logits, cache))),
            *(jax.random.key(0), jnp.int32(0)),
        )
        return max(
            part.temp_size_in_bytes + part.output_size_in_bytes
            for part in (p.compile().memory_analysis() for p in (lowered, further))
        )

    counted = row_bytes(WIDE, length, max_new_tokens=64, kv_dtype=kv_dtype)
    assert (taken(2 * rows) - taken(rows)) / rows <= counted
    assert counted < 10 * (taken(2 * rows) - taken(rows)) / rows


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"max_new_tokens": 0}, "at least one token"),
        ({"num_samples": 0}, "one sample"),
        ({"segment": 0}, "segment"),
        ({"rows": -1}, "batch size is -1"),
        ({"kv_dtype": "float16"}, "KV cache holds"),
    ],
)
def test_batches_refuse_what_cannot_be(options, match):
    prompts = [np.zeros(3, np.int32)] * 2
    with pytest.raises(VaaniError, match=match):
        list(batches(WIDE, prompts, **{"max_new_tokens": 5, **options}))


def test_a_large_cache_is_said_before_it_is_taken(monkeypatch):
    wide = WIDE.changed(max_seq_len=2**20, dim=256)
    prompts = [np.zeros(40_000, np.int32)] * 3
    line = room_for(wide, prompts, max_new_tokens=2000)
    numbers = 2 * 2 * 256  # of a token: two layers, keys and values
    scales = 4 * 2 * 2 * 2  # bytes
    each = {
        "float32": 4 * numbers,
        "bfloat16": 2 * numbers,
        "int8": numbers + scales,
        "int4": numbers / 2 + scales + 4 * numbers / 2 / 64,
    }
    capacity = 49_152  # with what is drawn, in eighths of powers of two
    sizes = {name: size(3 * capacity * one) for name, one in each.items()}
    assert line == (
        f"the cache of keys and values takes {sizes['float32']} in float32: 49,152"
        f" tokens for each of 3 texts; --kv-dtype makes it bfloat16"
        f" {sizes['bfloat16']}, int8 {sizes['int8']}, int4 {sizes['int4']}"
    )
    few = room_for(wide, prompts, max_new_tokens=2000, kv_dtype="int4")
    assert few == ""
    # What can't be had is refused in one line, by the library too.
    monkeypatch.setattr(room, "available_memory", lambda: 200_000_000)
    match = "takes 604 MB in float32.* 200 MB of memory are free: --kv-dtype int8 fits"
    with pytest.raises(VaaniError, match=match):
        room_for(wide, prompts, max_new_tokens=2000)
    with pytest.raises(VaaniError, match=match):
        generate(model_of(wide), prompts, max_new_tokens=2000)
    monkeypatch.setattr(room, "available_memory", lambda: 1000)
    with pytest.raises(VaaniError, match="none of --kv-dtype fits"):
        room_for(wide, prompts, max_new_tokens=2000)
    monkeypatch.setattr(room, "available_memory", lambda: None)
    assert room_for(wide, prompts, max_new_tokens=2000) == line


# -- Ends, ids without a token, log-likelihoods ------------------------------------


class Ending(CharTokenizer):
    """Some of its characters end a text, and some ids have none."""

    def __init__(self, ends=(), missing=()):
        super().__init__("abcdefghijklmnopq")
        self.eos_ids, self.missing = tuple(ends), list(missing)

    def has_token(self):
        found = super().has_token()
        found[self.missing] = False
        return found


def test_each_row_ends_for_itself_and_the_batch_with_the_last():
    model = model_of(CONFIG)
    prompts = [prompt_of(n) for n in (3, 7, 12)]
    options = {"max_new_tokens": 20, "sampler": GREEDY, "segment": 4}
    plain = generate(model, prompts, **options)
    ends = (int(plain[0, 5]), int(plain[1, 2]))
    ending = dataclasses.replace(model, tokenizer=Ending(ends))
    cut = []
    for row in plain:
        hits = np.flatnonzero(np.isin(row, ends))
        cut.append(row if not len(hits) else row[: hits[0] + 1])
    assert min(map(len, cut)) < max(map(len, cut))
    found = generate(ending, prompts, **options)
    assert found.shape[1] <= max(map(len, cut)) + 3  # of the segment
    for row, expected in zip(found, cut, strict=True):
        np.testing.assert_array_equal(row[: len(expected)], expected)
        assert (row[len(expected) :] == expected[-1]).all()
        if expected[-1] in ends:
            np.testing.assert_array_equal(
                until_end(row, ending.tokenizer), expected[:-1]
            )
    for prompt, expected in zip(prompts, cut, strict=True):
        alone = generate(ending, prompt, **options)
        np.testing.assert_array_equal(alone[0], expected)
    everything = generate(ending, prompts, ignore_eos=True, **options)
    np.testing.assert_array_equal(everything, plain)


def test_ids_without_a_token_are_never_drawn():
    model = model_of(CONFIG)
    prompt, hot = prompt_of(3), SamplerConfig(temperature=5.0)
    options = {"max_new_tokens": 64, "num_samples": 8}
    drawn = np.unique(generate(model, prompt, sampler=hot, **options))
    missing = [int(i) for i in drawn[:12]]
    other = dataclasses.replace(model, tokenizer=Ending(missing=missing))
    for sampler in (hot, GREEDY):
        found = generate(other, prompt, sampler=sampler, **options)
        assert not np.isin(found, missing).any()
    # A vocabulary padded beyond the tokenizer.
    few = dataclasses.replace(model, tokenizer=CharTokenizer("abc"))
    assert generate(few, prompt % 3, sampler=hot, **options).max() < 3


@pytest.mark.parametrize("module", [CONFIG, TWIN], ids=["bit", "fp"])
def test_scores_are_those_of_the_forward_pass(module):
    """To the bit where float sums are native, in a batch, segments and alone."""
    model, prompts = model_of(module), [prompt_of(n) for n in (2, 9)]
    found = list(
        segments(
            model, prompts, max_new_tokens=10, sampler=WARM, segment=4, scored=True
        )
    )
    ids = np.concatenate([part.ids for part in found], axis=1)
    scores = np.concatenate([part.scores for part in found], axis=1)
    assert scores.shape == ids.shape == (2, 10)
    assert scores.dtype == np.float32
    for prompt, row, score in zip(prompts, ids, scores, strict=True):
        text = np.concatenate([prompt, row])[None]
        logits = forward(module)(variables_of(module), jnp.asarray(text))
        logits = logits[0, len(prompt) - 1 : -1]
        exact = np.asarray(jax.jit(log_likelihood)(logits, jnp.asarray(row)))
        if native():
            np.testing.assert_array_equal(score, exact)
        np.testing.assert_allclose(score, exact, rtol=1e-5, atol=1e-5)
        wide = np.asarray(logits, np.float64)
        wide = wide[np.arange(10), row] - np.log(np.exp(wide).sum(-1))
        np.testing.assert_allclose(score, wide, rtol=1e-5, atol=1e-5)

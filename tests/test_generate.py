"""Text from a model: decoding against no cache at all, samplers against numpy."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vaani_jax.generate
from vaani_jax.errors import VaaniError
from vaani_jax.generate import (
    SEGMENT,
    SampleConfig,
    SamplerConfig,
    decode,
    generate,
    prefill,
    sample_token,
    stream,
    unrolled,
)
from vaani_jax.model import ModelConfig, Vaani, init_variables

CONTEXT = 24
CONFIG = ModelConfig(
    vocab_size=17,
    dim=16,
    n_layers=1,
    n_heads=2,
    ffn_dim=16,
    max_seq_len=CONTEXT,
    init_std=0.5,
    tie_embeddings=False,  # a tied model of random weights repeats itself
)
TWIN = dataclasses.replace(CONFIG, quantize=False)
GREEDY = SamplerConfig(temperature=0.0)
WARM = SamplerConfig(temperature=1.0)


@functools.cache
def variables_of(config):
    """A model whose greedy text is no cycle of a few tokens."""
    return init_variables(config, jax.random.key(2))


@functools.cache
def forward(config):
    return jax.jit(Vaani(config).apply)


def prompt_of(length):
    return np.random.default_rng(length).integers(0, 17, length, dtype=np.int32)


def generate_by_hand(config, prompt, max_new_tokens):
    """Greedy tokens from the full forward over all that the context holds."""
    params, quant = variables_of(config)
    variables = {"params": params, "quant": quant}
    window, drawn = list(prompt), []
    while len(drawn) < max_new_tokens:
        if len(window) >= CONTEXT:  # full: its newest half stays
            window = window[-(CONTEXT // 2) :]
        # Padding comes after, where a causal model doesn't see it.
        padded = np.zeros((1, CONTEXT), np.int32)
        padded[0, : len(window)] = window
        logits = forward(config)(variables, jnp.asarray(padded))
        drawn.append(int(jnp.argmax(logits[0, len(window) - 1])))
        window.append(drawn[-1])
    return drawn


@pytest.mark.parametrize("config", [CONFIG, TWIN], ids=["bit", "fp"])
def test_greedy_text_equals_a_loop_without_a_cache(config):
    """At the edges of the buckets (16, 24), of the context, and sliding past it."""
    for length in (1, 2, 15, 16, 17, 23, 24, 25, 60):
        prompt = prompt_of(length)
        found = generate(
            config,
            *variables_of(config),
            prompt,
            max_new_tokens=45,
            sampler=GREEDY,
            num_samples=2,
        )
        assert found.shape == (2, 45)
        assert found.dtype == np.int32
        expected = generate_by_hand(config, prompt, 45)
        assert len(set(expected)) > 4  # a loop of one token would prove little
        np.testing.assert_array_equal(found, [expected, expected])


def test_equal_seeds_draw_equal_tokens_wherever_segments_end(monkeypatch):
    def draw(max_new_tokens, seed=3):
        return generate(
            TWIN,
            *variables_of(TWIN),
            prompt_of(5),
            max_new_tokens=max_new_tokens,
            sampler=WARM,
            seed=seed,
            num_samples=2,
        )

    longest = draw(50)
    for length in (1, SEGMENT - 1, SEGMENT, SEGMENT + 1, 19, 20, 33):
        np.testing.assert_array_equal(draw(length), longest[:, :length])
    monkeypatch.setattr(vaani_jax.generate, "SEGMENT", 5)
    np.testing.assert_array_equal(draw(50), longest)
    assert np.mean(draw(50, seed=4) != longest) > 0.3


def test_samples_differ_but_greedy_ones_do_not():
    run = functools.partial(
        generate, TWIN, *variables_of(TWIN), prompt_of(5), max_new_tokens=30
    )
    warm = run(num_samples=2, sampler=WARM)
    assert warm.shape == (2, 30)
    assert np.mean(warm[0] != warm[1]) > 0.3
    greedy = run(num_samples=2, sampler=GREEDY)
    np.testing.assert_array_equal(greedy[0], greedy[1])


@pytest.mark.parametrize("length", [1, 16, 17, 40, 61])
def test_a_stream_yields_what_was_asked_for(length):
    segments = list(
        stream(TWIN, *variables_of(TWIN), prompt_of(3), max_new_tokens=length)
    )
    assert all(1 <= s.shape[1] <= SEGMENT and s.shape[0] == 1 for s in segments)
    assert sum(s.shape[1] for s in segments) == length
    tokens = np.concatenate(segments, axis=1)
    assert tokens.min() >= 0
    assert tokens.max() < 17


def test_a_new_prompt_length_in_a_bucket_does_not_recompile():
    config = dataclasses.replace(TWIN, max_seq_len=64)  # compiled by no other test

    def compiled(*lengths):
        before = prefill._cache_size(), decode._cache_size()
        for length in lengths:
            generate(
                config,
                *variables_of(config),
                prompt_of(length),
                max_new_tokens=20,
                sampler=WARM,
                seed=length,
            )
        return prefill._cache_size() - before[0], decode._cache_size() - before[1]

    assert compiled(5) == (1, 1)
    assert compiled(1, 7, 15, 16) == (0, 0)
    assert compiled(17) == (1, 0)  # the next bucket; decoding stays as it is
    assert compiled(18, 23, 24) == (0, 0)


def test_scanned_layers_unroll_to_the_same_model():
    config = dataclasses.replace(CONFIG, n_layers=2, scan_layers=True)
    plain = dataclasses.replace(config, scan_layers=False)
    params, quant = variables_of(config)
    found, *trees = unrolled(config, params, quant)
    assert found == plain
    expected = list(variables_of(plain))
    assert jax.tree.structure(trees) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(trees), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(a, b)
    same, same_params, _ = unrolled(plain, *expected)
    assert same is plain
    assert same_params is expected[0]


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
        ({"max_new_tokens": 0}, "at least one token"),
        ({"num_samples": 0}, "one sample"),
        ({"config": dataclasses.replace(TWIN, max_seq_len=1)}, "context of one token"),
    ],
)
def test_impossible_requests_are_refused(changes, words):
    options = {"config": TWIN, "prompt": prompt_of(3), "max_new_tokens": 4, **changes}
    params, quant = variables_of(TWIN)
    with pytest.raises(VaaniError, match=words):
        generate(params=params, quant=quant, **options)


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

"""Evaluation against float64, over every window, whatever the batch size."""

import functools
import math
from typing import Any

import jax
import numpy as np
import pytest

from vaani_jax.data.batches import validation_windows
from vaani_jax.data.corpus import Split
from vaani_jax.evaluate.loss import (
    Evaluation,
    ValidationSet,
    make_eval_step,
    validation_set,
)
from vaani_jax.model.transformer import Vaani, init_variables
from vaani_jax.text.tokenizers import ByteTokenizer, CharTokenizer

# Most of the time here is spent in LLVM: what it optimizes is not what is tested.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
SEQ_LEN = 6
ALPHABET = "abcdefghijk"
MODEL = Vaani().changed(
    vocab_size=11, dim=16, n_layers=1, n_heads=2, ffn_dim=32, max_seq_len=SEQ_LEN
)
# 7 whole windows and 3 tokens that fill none.
TOKENS = np.random.default_rng(0).integers(11, size=7 * SEQ_LEN + 1 + 3)
TOKENS = TOKENS.astype(np.int32)


@pytest.fixture(scope="module")
def model():
    # Larger weights than usual, for logits that differ.
    variables = jit(lambda: init_variables(MODEL, jax.random.key(0)))()
    return {**variables, "params": jax.tree.map(lambda w: 4 * w, variables["params"])}


@pytest.fixture(scope="module")
def expected(model):
    """Mean loss in float64: window after window, token after token."""
    forward = jit(lambda x: MODEL.apply(model, x))
    losses = []
    for start in range(0, 7 * SEQ_LEN, SEQ_LEN):
        found: Any = forward(TOKENS[None, start : start + SEQ_LEN])
        logits = np.asarray(found[0], np.float64)
        for row, target in zip(
            logits, TOKENS[start + 1 : start + SEQ_LEN + 1], strict=True
        ):
            losses.append(math.log(np.exp(row).sum()) - row[target])
    assert len(losses) == 42
    assert np.std(losses) > 0.1
    return math.fsum(losses) / 42


@pytest.fixture(scope="module")
def eval_step():
    return jit(make_eval_step(MODEL))


def _set(tokens=TOKENS, tokenizer=None, *, batch_size, seq_len=SEQ_LEN, limit=0):
    tokenizer = tokenizer or CharTokenizer(ALPHABET)
    return ValidationSet(
        tokens, tokenizer, seq_len=seq_len, batch_size=batch_size, limit=limit
    )


@pytest.mark.parametrize("batch_size", [1, 3, 7, 100])
def test_equals_float64_for_every_batch_size(model, expected, eval_step, batch_size):
    validation = _set(batch_size=batch_size)
    result = validation.evaluate(eval_step, model)
    assert result.loss == pytest.approx(expected, rel=1e-6)
    assert result.tokens == 42
    assert result.bytes == 42
    assert result.perplexity == pytest.approx(math.exp(expected), rel=1e-5)
    assert result.bits_per_byte == pytest.approx(expected / math.log(2), rel=1e-6)
    assert set(result.as_dict()) == {"loss", "perplexity", "bits_per_byte", "tokens"}
    # One shape: one compilation.
    shapes = {(w.shape, v.shape) for w, v in validation.batches}
    rows = min(batch_size, 7)
    assert shapes == {((rows, SEQ_LEN + 1), (rows,))}
    assert sum(float(v.sum()) for _, v in validation.batches) == 7


def test_a_sample_is_the_same_windows_and_the_whole_text_still_all(model, eval_step):
    """Windows 0, 2 and 4 of 7, alone and then with the others."""
    validation = _set(batch_size=2, limit=3)
    alone = TOKENS[np.arange(SEQ_LEN + 1) + SEQ_LEN * np.array([[0], [2], [4]])]
    expected = float(eval_step(model, alone, np.ones(3, np.float32))) / (3 * SEQ_LEN)
    sampled = validation.evaluate(eval_step, model, whole=False)
    assert sampled.loss == sampled.comparable == pytest.approx(expected, rel=1e-6)
    assert (sampled.tokens, sampled.bytes, sampled.sampled) == (18, 18, None)
    result = validation.evaluate(eval_step, model)
    everything = _set(batch_size=2).evaluate(eval_step, model)
    assert result.loss == pytest.approx(everything.loss, rel=1e-6)
    assert (result.tokens, result.bytes) == (everything.tokens, everything.bytes)
    assert result.comparable == sampled.loss != result.loss
    assert everything.comparable == everything.loss
    assert "sampled_loss" not in everything.as_dict()
    # A sample of all is no sample; every batch has one shape.
    assert _set(batch_size=2, limit=7).evaluate(eval_step, model) == everything
    assert {w.shape for w, _ in validation.batches} == {(2, SEQ_LEN + 1)}


def test_windows_are_the_tokens_themselves():
    """A text of gigabytes is not copied into windows."""
    tokens = np.zeros(10**6, np.int32)
    windows = validation_windows(tokens, 100)
    assert windows.shape == (9999, 101)
    assert np.shares_memory(windows, tokens)
    assert validation_windows(tokens[:100], 100).shape == (0, 101)


LIMIT = 2**18  # bytes
LARGE = MODEL.changed(vocab_size=5000, max_seq_len=50)


@pytest.mark.parametrize(
    "keys", [{}, {"tie_embeddings": False}, {"ternary_head": True}]
)
def test_logits_are_never_whole(keys):
    """What a batch takes is bounded by the limit, and the loss is that of one piece."""
    module = LARGE.changed(**keys)
    variables = init_variables(module, jax.random.key(0))
    tokens = np.random.default_rng(0).integers(5000, size=(3, 51)).astype(np.int32)
    weights = np.array([1, 1, 0], np.float32)
    logits = 4 * 3 * 50 * 5000
    found, taken = [], []
    for limit in (LIMIT, 2**40):
        step = jax.jit(make_eval_step(module, limit))
        compiled = step.lower(variables, tokens, weights).compile()
        analysis: Any = compiled.memory_analysis()
        taken.append(analysis.temp_size_in_bytes)
        found.append(float(compiled(variables, tokens, weights)))
    assert taken[1] > logits > 10 * LIMIT
    # What a ternary head rounds is as large as the embedding, and no matter of T.
    assert taken[0] < 4 * LIMIT + (4 * 4 * 16 * 5000 if keys else 0)
    assert found[0] == pytest.approx(found[1], rel=1e-6)


@pytest.mark.parametrize(
    ("keys", "rows"),
    [
        ({"vocab_size": 4096, "max_seq_len": 64}, 128),
        ({"vocab_size": 2**20, "max_seq_len": 64}, 32),  # 128 MiB are 32 tokens
        ({"vocab_size": 2**30, "max_seq_len": 64}, 1),
        ({"vocab_size": 4096, "max_seq_len": 2048, "n_heads": 4}, 4),
        ({"vocab_size": 4096, "max_seq_len": 2048, "dim": 64, "n_heads": 16}, 1),
        ({"vocab_size": 4096, "max_seq_len": 16384}, 1),
    ],
)
def test_batches_are_as_large_as_settings_allow(keys, rows):
    architecture = MODEL.changed(**keys).architecture
    tokens = np.zeros(200 * architecture.max_seq_len, np.int32)
    split = Split(tokens[:0], tokens)
    validation = validation_set(architecture, split, ByteTokenizer())
    windows, weights = next(validation.batches)
    assert len(windows) == len(weights) == rows


def _uniform(vocab_size):
    """An evaluation step that gives every token the same probability."""

    def step(variables, tokens, weights):
        del variables
        return (weights * (tokens.shape[1] - 1)).sum() * np.float32(np.log(vocab_size))

    return step


@pytest.mark.parametrize(
    "text",
    ["plain ascii, nothing else. " * 4, "वाणी का अर्थ है भाषा " * 4, "a€👩é" * 9],
    ids=["ascii", "hindi", "mixed"],
)
def test_bits_per_byte_of_characters(text):
    tokenizer = CharTokenizer(text)
    validation = _set(tokenizer.encode(text), tokenizer, batch_size=4)
    result = validation.evaluate(_uniform(tokenizer.vocab_size), None)
    characters = (len(text) - 1) // SEQ_LEN * SEQ_LEN
    length = len(text[1 : 1 + characters].encode())
    assert result.tokens == characters
    assert result.bytes == length
    bits = math.log2(tokenizer.vocab_size) * characters / length
    assert result.bits_per_byte == pytest.approx(bits, rel=1e-6)


@pytest.mark.parametrize("text", ["plain ascii. " * 4, "a" + "é" * 20, "ab" + "€c" * 6])
def test_bits_per_byte_of_bytes(text):
    tokenizer = ByteTokenizer()
    validation = _set(tokenizer.encode(text), tokenizer, batch_size=4, seq_len=4)
    result = validation.evaluate(_uniform(256), None)
    assert result.bytes == result.tokens
    assert result.bits_per_byte == pytest.approx(8.0, rel=1e-6)


def test_measures():
    result = Evaluation(loss=2.0, tokens=30, bytes=40)
    assert result.perplexity == pytest.approx(7.389056, rel=1e-6)
    assert result.bits_per_byte == pytest.approx(2.0 / 0.6931472 * 0.75, rel=1e-6)
    assert math.isfinite(Evaluation(loss=1e6, tokens=1, bytes=1).perplexity)


@pytest.mark.parametrize("after", [0, 1, 2, 3, 4])
def test_stop_is_asked_between_batches(after):
    answers = iter([False] * after + [True] * 9)
    steps = []

    def step(variables, tokens, weights):
        steps.append(len(tokens))
        return weights.sum()

    result = _set(batch_size=2).evaluate(step, None, lambda: next(answers))
    assert (result is None) == (after < 4)
    assert steps == [2] * after

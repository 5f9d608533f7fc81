"""A session reads only what is new, and draws what the whole text would."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vaani_jax.errors import VaaniError
from vaani_jax.inference import generate as generate_module
from vaani_jax.inference.generate import Session, _piece, generate, prefill
from vaani_jax.inference.model import Model, pack_model
from vaani_jax.inference.sampling import SamplerConfig
from vaani_jax.kernels.floats import native
from vaani_jax.model.transformer import Vaani, init_variables
from vaani_jax.text.tokenizers import CharTokenizer, HFTokenizer

CONTEXT = 100
MODULE = Vaani().changed(
    vocab_size=17,
    dim=16,
    n_layers=1,
    n_heads=2,
    n_kv_heads=1,
    ffn_dim=16,
    max_seq_len=CONTEXT,
    init_std=0.5,
    tie_embeddings=False,
)
GREEDY = SamplerConfig(temperature=0.0)
WARM = SamplerConfig(temperature=1.0)


@functools.cache
def model_of(quantize=True, packed=False):
    module = MODULE.changed(quantize=quantize)
    variables = init_variables(module, jax.random.key(2))
    model = Model(module, variables, CharTokenizer("abcdefghijklmnopq"))
    return pack_model(model) if packed else model


def text_of(length, seed=0):
    return np.random.default_rng(seed).integers(0, 17, length, dtype=np.int32)


def drawn(session, text, max_new_tokens, **options):
    options = {"sampler": GREEDY, **options}
    found = list(session.continued(text, max_new_tokens=max_new_tokens, **options))
    assert all(new.ndim == 1 and new.dtype == np.int32 for new in found)
    return np.concatenate(found)


def texts():
    """As the turns of chats are: most go on from the last one, some part from it."""
    rng = np.random.default_rng(1)
    text = text_of(9)
    for _ in range(30):
        yield text
        kept = rng.choice([len(text), len(text) - 1, len(text) // 2, 1, 0])
        more = rng.integers(0, 17, rng.choice([1, 2, 7, 20]), dtype=np.int32)
        text = np.concatenate([text[:kept], more])
        if len(text) >= CONTEXT - 4:
            text = text[:40]


@pytest.mark.parametrize(
    ("kind", "kv_dtype"),
    [
        ({}, None),
        ({"quantize": False}, None),
        ({"packed": True}, None),
        ({"packed": True}, "bfloat16"),
        ({"packed": True}, "int8"),
    ],
    ids=["masters", "full precision", "packed", "bfloat16", "int8"],
)
def test_what_is_drawn_is_what_the_whole_text_gives(kind, kv_dtype):
    model = model_of(**kind)
    session = Session(model, kv_dtype=kv_dtype, segment=5)
    reused = []
    for i, text in enumerate(texts()):
        count = min((7, 12, 3)[i % 3], CONTEXT - len(text))
        options: dict[str, Any] = {"sampler": WARM, "seed": i, "max_new_tokens": count}
        found = drawn(session, text, **options)
        expected = generate(model, text, kv_dtype=kv_dtype, segment=5, **options)
        np.testing.assert_array_equal(found, expected[0])
        reused.append(session.reused)
        np.testing.assert_array_equal(session.held, [*text, *found])
    assert np.mean(np.asarray(reused) > 5) > 0.5


@pytest.mark.parametrize("kv_dtype", [None, "int8"])
def test_logits_and_cache_are_those_of_one_reading(kv_dtype):
    """To the bit where the project promises bits."""
    model = model_of(packed=True)
    session = Session(model, kv_dtype=kv_dtype, segment=5)
    text = text_of(95)
    for length in (3, 4, 20, 21, 54, 89, 95):
        drawn(session, text[:length], 2)
        logits, cache = session._read(text[:length], 3)
        padded = np.zeros((1, CONTEXT), np.int32)
        padded[0, :length] = text[:length]
        expected, whole = prefill(
            model.module,
            model.variables,
            jnp.asarray(padded),
            jnp.asarray(length, jnp.int32),
            kv_dtype=kv_dtype,
        )
        assert session.reused == length - 1
        assert int(cache.length) == length
        off = 0 if native() else 1e-4
        np.testing.assert_allclose(logits, expected, rtol=0, atol=off)
        if not native():
            continue
        for ours, theirs in zip(cache.layers, whole.layers, strict=True):
            for a, b in zip(ours[:4], theirs[:4], strict=True):
                np.testing.assert_array_equal(a[:, :length], b[:, :length])


@pytest.fixture
def readings(monkeypatch):
    """How many slots each call reads, by its name."""
    found = []
    for name in ("prefill", "read_on"):
        function = getattr(generate_module, name)

        def spy(module, variables, tokens, *rest, name=name, call=function, **options):
            found.append((name, tokens.shape[1]))
            return call(module, variables, tokens, *rest, **options)

        monkeypatch.setattr(generate_module, name, spy)
    return found


def test_only_what_is_new_is_read(readings):
    model, text = model_of(), text_of(60)
    session = Session(model, segment=4)
    answer = drawn(session, text[:30], 4)
    assert readings == [("prefill", 32)]
    assert (session.reused, len(session.held)) == (0, 34)
    turn = np.concatenate([text[:30], answer, text[30:40]])
    drawn(session, turn, 4)
    assert readings[1:] == [("read_on", 16)]
    assert session.reused == 34
    drawn(session, turn, 4)  # the same again: its last token is read for its logits
    assert readings[2:] == [("read_on", 16)]
    assert session.reused == len(turn) - 1
    drawn(session, turn[:10], 4)  # the beginning of it
    assert readings[3:] == [("read_on", 16)]
    drawn(session, text[::-1][:10], 4)  # another text
    assert readings[4:] == [("prefill", 16)]
    assert session.reused == 0


def test_the_cache_grows_and_the_end_of_the_context_is_read_in_pieces(readings):
    model, text = model_of(), text_of(99)
    session = Session(model, segment=4)
    capacities = []
    for length in (5, 30, 60, 90, 98, 99):
        found = drawn(session, text[:length], 3)
        expected = generate(
            model,
            text[:length],
            max_new_tokens=min(3, CONTEXT - length),
            sampler=GREEDY,
        )
        np.testing.assert_array_equal(found, expected[0])
        assert session._cache is not None
        capacities.append(session._cache.capacity)
    assert capacities == sorted(capacities)
    assert (capacities[0], capacities[-1]) == (32, CONTEXT)
    assert readings.count(("prefill", 16)) > 0
    assert ("read_on", 1) in readings  # in the last slots, of which 16 are too many


def test_pieces_fit_what_room_there_is():
    for room in range(1, 70):
        for wanted in range(1, room + 1):
            left, taken, sizes = wanted, 0, []
            while left > 0:
                size = _piece(left, room - taken)
                assert 1 <= size <= room - taken
                taken += min(size, left)
                left -= size
                sizes.append(size)
            assert set(sizes) <= {1, 16, 32, 64, 128}
            assert sizes.count(1) < 16


def test_what_ends_an_answer_is_the_last_of_it():
    model = model_of()
    whole = drawn(Session(model, segment=5), text_of(9), 40)
    ending = int(whole[12])
    first = int(np.argmax(whole == ending))
    session = Session(model, segment=5)
    found = drawn(session, text_of(9), 40, ends=(ending, 99))
    np.testing.assert_array_equal(found, whole[: first + 1])
    # What was drawn behind it is none of the text: the next one goes on from the end.
    following = np.concatenate([text_of(9), found, text_of(3, seed=5)])
    after = drawn(session, following, 10)
    assert session.reused == 9 + len(found)
    np.testing.assert_array_equal(after, drawn(Session(model), following, 10))


def test_an_answer_ends_with_the_context():
    text = text_of(90)
    session = Session(model_of(), segment=4)
    assert len(drawn(session, text, 50)) == 10
    with pytest.raises(VaaniError, match="100 tokens, and the context 100"):
        drawn(session, text_of(100), 1)
    for count, wrong in ((0, text), (1, text[:0])):
        with pytest.raises(VaaniError):
            drawn(session, wrong, count)
    with pytest.raises(VaaniError, match="seed"):
        drawn(session, text, 1, seed=-1)
    with pytest.raises(VaaniError, match="segment"):
        Session(model_of(), segment=0)


def test_after_an_interruption_everything_is_read_again(monkeypatch):
    model, text = model_of(), text_of(20)
    session = Session(model, segment=4)
    decode = generate_module.decode
    calls = []

    def interrupted(*arguments, **options):
        result = decode(*arguments, **options)  # the cache that it had is gone
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return result

    monkeypatch.setattr(generate_module, "decode", interrupted)
    with pytest.raises(KeyboardInterrupt):
        drawn(session, text, 20)
    assert len(session.held) == 0
    found = drawn(session, text, 20)
    assert session.reused == 0
    np.testing.assert_array_equal(found, drawn(Session(model), text, 20))


def test_whoever_stops_listening_keeps_the_cache():
    model, text = model_of(), text_of(20)
    session = Session(model, segment=4)
    answer = session.continued(text, max_new_tokens=20, sampler=GREEDY)
    first = next(answer)
    answer.close()
    np.testing.assert_array_equal(session.held, [*text, *first])
    drawn(session, np.asarray([*text, *first, 3], np.int32), 4)
    assert session.reused == 24


def test_padded_ids_are_never_drawn():
    tokenizers = pytest.importorskip("tokenizers")
    vocabulary = {f"w{i}": i for i in range(9)}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, "w0"))
    padded = HFTokenizer(made.to_str(), vocab_size=17)
    plain = model_of()
    model = Model(plain.module, plain.variables, padded)
    found = drawn(Session(model), text_of(9) % 9, 40, sampler=WARM)
    assert found.max() < 9
    assert drawn(Session(plain), text_of(9) % 9, 40, sampler=WARM).max() >= 9

"""Two bits a weight: what goes in comes out, and padding never shows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vaani_jax.errors import VaaniError
from vaani_jax.model.names import ternary_codes
from vaani_jax.model.norm import NORMS, RMSNorm
from vaani_jax.model.packing import pack_variables, packed_bytes
from vaani_jax.model.transformer import Vaani, init_variables
from vaani_jax.quant.packed import (
    PackedRows,
    PackedTernary,
    pack,
    pack_neighbors,
    pack_quarters,
    pack_rows,
    relayout,
    take_rows,
    unpack,
    unpack_neighbors,
    unpack_quarters,
)

SHAPES = [(1, 1), (4, 16), (16, 16), (17, 33), (100, 7), (256, 128), (300, 130)]


def ternary(k, n, seed=0):
    return np.random.default_rng(seed).integers(-1, 2, (k, n)).astype(np.float32)


@pytest.mark.parametrize("layout", ["tiles", "rows", "planes"])
@pytest.mark.parametrize(("k", "n"), SHAPES)
def test_unpack_undoes_pack(k, n, layout):
    w = ternary(k, n)
    packed = pack(w, jnp.float32(0.5), layout)
    assert packed.codes.dtype == jnp.uint8
    assert packed.shape == (k, n)
    np.testing.assert_array_equal(unpack(packed), w)
    assert unpack(packed, jnp.float32).dtype == jnp.float32


@pytest.mark.parametrize(("k", "n"), SHAPES)
def test_tiles_are_where_the_description_says(k, n):
    w = ternary(k, n)
    codes = np.asarray(pack(w, jnp.float32(1)).codes)
    assert codes.shape == (-(-n // 16), -(-k // 16), 64)
    for i in range(k):
        for j in range(0, n, max(1, n // 5)):
            byte = int(codes[j // 16, i // 16, 4 * (j % 16) + i % 4])
            assert (byte >> (2 * (i % 16 // 4)) & 3) - 1 == w[i, j]


def test_planes_are_where_the_description_says():
    w = ternary(300, 130)
    codes = np.asarray(pack(w, jnp.float32(1), "planes").codes)
    assert codes.shape == (128, 256)
    for i in range(300):
        byte = int(codes[i % 128, 7])
        assert (byte >> (2 * (i // 128)) & 3) - 1 == w[i, 7]


@pytest.mark.parametrize(("k", "n"), SHAPES)
def test_rows_are_where_the_description_says(k, n):
    w = ternary(k, n)
    codes = np.asarray(pack(w, jnp.float32(1), "rows").codes)
    assert codes.shape == (-(-n // 128) * 128, -(-k // 64) * 16)
    for i in range(k):
        for j in range(0, n, max(1, n // 5)):
            byte = int(codes[j, 4 * (i // 16) + i % 4])
            assert (byte >> (2 * (i % 16 // 4)) & 3) - 1 == w[i, j]


def byte_of(weights):
    """A byte by the definition, from four weights."""
    return sum((int(w) + 1) * 4**i for i, w in enumerate(weights))


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("shape", [(4, 4), (8, 12), (12, 20)])
def test_neighbors_share_a_byte_on_the_wire(axis, shape):
    weights = ternary(*shape)
    found = np.asarray(jax.jit(pack_neighbors, static_argnums=1)(weights, axis))
    rows = np.moveaxis(np.asarray(weights), axis, -1)
    expected = [
        [byte_of(row[i : i + 4]) for i in range(0, len(row), 4)] for row in rows
    ]
    np.testing.assert_array_equal(np.moveaxis(found, axis, -1), expected)
    back = unpack_neighbors(jnp.asarray(found), axis)
    np.testing.assert_array_equal(back, weights)


@pytest.mark.parametrize("shape", [(4, 1), (8, 3), (20, 7)])
def test_rows_a_quarter_apart_share_a_byte_in_folders(shape):
    weights = np.asarray(ternary(*shape), np.int8)
    found, quarter = pack_quarters(weights), shape[0] // 4
    assert (found.dtype, found.shape) == (np.uint8, (quarter, shape[1]))
    for r in range(quarter):
        for c in range(shape[1]):
            assert found[r, c] == byte_of(weights[r::quarter, c])
    np.testing.assert_array_equal(unpack_quarters(found), weights)
    with pytest.raises(VaaniError, match="none of -1, 0 and 1"):
        unpack_quarters(found | 3)


def test_padding_holds_zeros():
    packed = pack(ternary(17, 5), jnp.float32(1))
    whole = PackedTernary(packed.codes, packed.scale, (32, 16))
    padded = np.asarray(unpack(whole))
    assert not padded[17:].any()
    assert not padded[:, 5:].any()


@pytest.mark.parametrize("layout", ["rows", "planes"])
@pytest.mark.parametrize(("k", "n"), SHAPES)
def test_relayout_there_and_back(k, n, layout):
    packed = pack(ternary(k, n), jnp.ones(n))
    there = relayout(packed, layout)
    assert there.layout == layout
    back = relayout(there, "tiles")
    np.testing.assert_array_equal(back.codes, packed.codes)
    assert relayout(packed, "tiles") is packed


def test_a_pytree_with_two_leaves():
    packed = pack(ternary(17, 5), jnp.float32(2))
    leaves, structure = jax.tree.flatten(packed)
    assert len(leaves) == 2
    again = jax.tree.unflatten(structure, leaves)
    assert again.shape == (17, 5)
    jitted = jax.jit(unpack)(packed)
    np.testing.assert_array_equal(jitted, ternary(17, 5))


def test_refusals():
    with pytest.raises(VaaniError, match=r"\[K, N\]"):
        pack(jnp.zeros((2, 3, 4)), jnp.float32(1))
    with pytest.raises(VaaniError, match="scale"):
        pack(ternary(4, 5), jnp.ones(4))
    with pytest.raises(VaaniError, match="-1, 0 or 1"):
        pack(jnp.full((4, 5), 0.5), jnp.float32(1))


def test_rows_are_off_by_half_a_step_at_most():
    matrix = np.random.default_rng(0).normal(size=(50, 33)).astype(np.float32)
    matrix[3] *= 1000
    matrix[4] = 0
    rows = pack_rows(jnp.asarray(matrix))
    assert rows.codes.dtype == jnp.int8
    back = np.asarray(take_rows(rows, jnp.arange(50)), np.float64)
    step = np.abs(matrix).max(axis=1, keepdims=True) / 127
    assert (np.abs(back - matrix) <= 0.5001 * step + 1e-12).all()


def small(**changes):
    values = {"vocab_size": 40, "dim": 48, "n_layers": 2, "n_heads": 4, "ffn_dim": 80}
    return Vaani().changed(**values | changes)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"weight_granularity": "channel"},
        {"weight_scale": "least_squares", "threshold": 0.7},
        {"weight_scale": "stored"},
        {"sub_norms": False},
        {"tie_embeddings": False},
        {"tie_embeddings": False, "ternary_head": True},
        {"ternary_head": True},
    ],
)
def test_pack_variables_holds_the_codes_of_training(changes):
    model = small(**changes)
    variables = init_variables(model, jax.random.key(0))
    found = jax.jit(pack_variables, static_argnums=1)(variables, model.spec)
    packed = found["params"]
    assert found["quant"] == {}
    expected = jax.jit(lambda v: ternary_codes(model.spec, v))(variables)
    for name, (codes, scale) in expected.items():
        node = packed
        for part in name.split("/"):
            node = node[part]
        kernel = node if isinstance(node, PackedTernary) else node["kernel"]
        np.testing.assert_array_equal(unpack(kernel), codes)
        np.testing.assert_array_equal(kernel.scale, scale)
    kinds = [
        x
        for x in jax.tree.leaves(packed, is_leaf=lambda x: isinstance(x, PackedTernary))
        if isinstance(x, PackedTernary)
    ]
    assert len(kinds) == len(expected)


def test_pack_variables_keeps_tracked_ranges():
    model = small(activation_tracking="ema")
    variables = init_variables(model, jax.random.key(0))
    left = pack_variables(variables, model.spec)["quant"]
    ranges = left["layers_0"]["attn"]["q_proj"]["activation_quantizer"]
    assert set(ranges) == {"range", "momentum"}


def test_an_8_bit_embedding_serves_as_head():
    for changes in ({}, {"tie_embeddings": False}):
        model = small(**changes)
        variables = init_variables(model, jax.random.key(0))
        variables["params"]["embedding"] *= 50
        packed = pack_variables(variables, model.spec, embedding="int8")
        assert isinstance(packed["params"]["embedding"], PackedRows)
        tokens = jnp.arange(12).reshape(2, 6)
        full = model.apply(variables, tokens)
        ours = model.apply(packed, tokens)
        error = np.abs(np.asarray(ours - full)).max()
        assert error < 0.05 * np.abs(np.asarray(full)).max()


class Doubled(RMSNorm):
    """Of the kind that kernels have, and yet another."""

    def __call__(self, x):
        return 2 * super().__call__(x) + 0.1


@pytest.mark.parametrize("norm", ["layer_norm", "doubled"])
def test_a_norm_that_kernels_lack_is_computed_before_them(monkeypatch, norm):
    monkeypatch.setitem(NORMS, "doubled", Doubled)
    model = small(norm=norm)
    variables = init_variables(model, jax.random.key(0))
    tokens = jnp.arange(12).reshape(2, 6)
    full = jax.jit(model.apply)(variables, tokens)
    ours = jax.jit(model.apply)(pack_variables(variables, model.spec), tokens)
    off = np.abs(np.asarray(ours - full)).max(axis=-1)
    assert np.median(off) < 1e-5 * np.abs(np.asarray(full)).max()
    plain = small().apply(variables, tokens)
    assert np.abs(np.asarray(plain - full)).max() > 1e-3  # the norm does count


def test_bits_per_weight():
    model = small(dim=256, ffn_dim=640, vocab_size=16)
    variables = init_variables(model, jax.random.key(0))
    packed = pack_variables(variables, model.spec)["params"]
    layers = {k: v for k, v in packed.items() if k.startswith("layers_")}
    kernels = [
        x
        for x in jax.tree.leaves(layers, is_leaf=lambda x: isinstance(x, PackedTernary))
        if isinstance(x, PackedTernary)
    ]
    weights = sum(x.shape[0] * x.shape[1] for x in kernels)
    assert 8 * packed_bytes(kernels) / weights <= 2.1


def test_stacked_layers_are_refused():
    model = small(scan_layers=True)
    variables = init_variables(model, jax.random.key(0))
    with pytest.raises(VaaniError, match="unroll"):
        pack_variables(variables, model.spec)

"""Reading GGUF files: the table, types of tensors, and whatever may be wrong."""

import random
import struct
from typing import Any

import gguf
import numpy as np
import pytest
from interop import gguf_reference
from interop.gguf_reference import LEGACY, PQ2_0, PTQ1_0, Q2_0, q2_blocks, trits, write

from vaani_jax.errors import VaaniError
from vaani_jax.interop.formats.gguf_file import GGUFFile
from vaani_jax.interop.formats.gguf_types import TYPES
from vaani_jax.interop.ternary import (
    CHANNEL,
    TENSOR,
    Survey,
    block_of,
    coarsest,
    regrouped,
    split,
)

KINDS: Any = gguf.GGMLQuantizationType
WHOLE = slice(None)


def codes_of(rows, columns, seed=0):
    return np.random.default_rng(seed).integers(-1, 2, (rows, columns)).astype(np.int8)


def scales_of(rows, blocks, seed=1):
    rng = np.random.default_rng(seed)
    return rng.uniform(0.01, 3, (rows, blocks)).astype(np.float16)


def one_tensor(path, data, kind):
    """A file with one tensor, as it is there."""
    write(path, "bitnet", {}, {"a": (data, kind)})
    file = GGUFFile(path)
    return file, file.tensors["a"]


# -- Types ------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["F32", "F16", "BF16", "Q8_0", "TQ1_0", "TQ2_0"])
def test_what_gguf_quantizes_comes_out_as_it_dequantizes(name, tmp_path):
    values = np.random.default_rng(0).standard_normal((5, 768)).astype(np.float32)
    data = gguf.quants.quantize(values, KINDS[name])
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "bitnet")
    writer.add_tensor("a", data, raw_dtype=KINDS[name])
    writer.add_tensor("b", np.ones(7, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = GGUFFile(tmp_path / "a.gguf")
    entry = file.tensors["a"]
    assert (entry.type.name, entry.shape) == (name, (5, 768))
    expected = gguf.quants.dequantize(data, KINDS[name])
    found = entry.type.floats(entry.type.split(file.rows(entry, WHOLE)))
    np.testing.assert_array_equal(found, expected)
    # And any rows, in any order.
    for which in (slice(1, 3), np.array([4, 0])):
        rows = entry.type.split(file.rows(entry, which))
        np.testing.assert_array_equal(entry.type.floats(rows), expected[which])
    if entry.type.is_ternary:
        codes, scales = entry.type.ternary(file.rows(entry, WHOLE))
        assert codes.dtype == np.int8
        wide = np.repeat(scales.astype(np.float32), 256, axis=1)
        np.testing.assert_array_equal(codes * wide, expected)


@pytest.mark.parametrize("name", ["TQ1_0", "TQ2_0", "Q8_0", "F16"])
def test_codes_are_written_as_gguf_quantizes_them(name):
    kind = TYPES[name]
    assert kind.encode is not None
    codes = codes_of(4, 512)
    scales = scales_of(4, 512 // kind.block)
    if name == "Q8_0":
        scales[:] = np.float16(2.0) ** -3  # times 127 and over it, exactly
    values = codes * np.repeat(scales.astype(np.float32), kind.block, axis=1)
    found = kind.encode(codes, scales).reshape(4, -1)
    back = gguf.quants.dequantize(found, KINDS[name])
    np.testing.assert_array_equal(back, values)
    if name.startswith("TQ"):
        expected = gguf.quants.quantize(values, KINDS[name])
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(("kind", "block"), [(Q2_0, 64), (PQ2_0, 128)])
def test_two_bit_blocks_against_weights_one_by_one(kind, block, tmp_path):
    codes, scales = codes_of(3, 384), scales_of(3, 384 // block)
    data = q2_blocks(codes, scales, block)
    file, entry = one_tensor(tmp_path / "a.gguf", data, kind)
    assert entry.shape == (3, 384)
    rows = file.rows(entry, WHOLE)
    found, kept = entry.type.ternary(rows)
    np.testing.assert_array_equal(found, codes)
    np.testing.assert_array_equal(kept, scales)
    expected = gguf_reference.decode_q2(data.tobytes(), block)
    floats = entry.type.floats(entry.type.split(rows))
    np.testing.assert_array_equal(floats.ravel(), expected)


def test_ptq1_0_against_trits_one_by_one(tmp_path):
    codes, scales = codes_of(3, 384), scales_of(3, 3)
    data = trits(codes, scales)
    file, entry = one_tensor(tmp_path / "a.gguf", data, PTQ1_0)
    rows = file.rows(entry, WHOLE)
    found, kept = entry.type.ternary(rows)
    np.testing.assert_array_equal(found, codes)
    np.testing.assert_array_equal(kept, scales)
    # Bytes that no quantizer writes stand for something, too: for the same.
    data = np.random.default_rng(0).integers(0, 256, (4, 84), np.uint8)
    data.reshape(4, 3, 28)[..., 26:] = scales_of(4, 3)[..., None].view(np.uint8)
    found, kept = TYPES["PTQ1_0"].ternary(data)
    expected = gguf_reference.decode_ptq1_0(data.tobytes())
    floats = TYPES["PTQ1_0"].floats(TYPES["PTQ1_0"].split(data))
    np.testing.assert_array_equal(floats.ravel(), expected)


def test_q2_0_is_written_as_its_decoder_reads_it():
    codes, scales = codes_of(3, 320), scales_of(3, 5)
    kind = TYPES["Q2_0"]
    assert kind.encode is not None
    found = kind.encode(codes, scales).reshape(3, -1)
    np.testing.assert_array_equal(found, q2_blocks(codes, scales, 64))


@pytest.mark.parametrize("name", ["Q2_0", "PQ2_0", "TQ2_0"])
def test_a_code_of_3_is_refused(name):
    kind = TYPES[name]
    data = np.zeros((1, 768 // kind.block * kind.bytes), np.uint8)
    data[0, 5] = 0b11_00_01_10
    with pytest.raises(VaaniError, match=f"{name} with the code 3"):
        kind.ternary(data)


@pytest.mark.parametrize("name", ["Q2_0", "PTQ1_0", "TQ1_0", "TQ2_0"])
def test_signs_of_scales_move_into_codes_and_what_is_not_finite_is_refused(name):
    kind = TYPES[name]
    columns = 2 * kind.block
    codes = codes_of(1, columns)
    scales = np.array([[-0.5, 2.0]], np.float16)
    if kind.encode is not None:
        data = kind.encode(codes, scales).reshape(1, -1)
    else:
        data = trits(codes, scales)
    found, kept = kind.ternary(data)
    wide = np.repeat(scales.astype(np.float32), kind.block, axis=1)
    np.testing.assert_array_equal(found * np.repeat(kept, kind.block, 1), codes * wide)
    assert (kept > 0).all()
    place = kind.split(data)[0, 0]
    where = slice(0, 2) if name == "Q2_0" else slice(-2, None)
    for wrong in (np.inf, np.nan):
        place[where] = np.array([wrong], np.float16).view(np.uint8)
        with pytest.raises(VaaniError, match="not finite"):
            kind.ternary(data)
    # A scale of 0 makes every weight 0, whatever its code.
    place[where] = 0
    found, kept = kind.ternary(data)
    assert not found[0, : kind.block].any()
    assert kept[0, 0] == 0


# -- Ternary matrices in floats ---------------------------------------------------


def unpacked(codes, scales, dtype):
    """Weights as a float type holds them, seen as float32."""
    group = codes.shape[1] // scales.shape[1]
    values = codes * np.repeat(scales.astype(np.float32), group, axis=1)
    if dtype == "BF16":
        data = gguf.quants.quantize(values, KINDS.BF16)
        return gguf.quants.dequantize(data, KINDS.BF16)
    if dtype == "Q8_0":
        data = gguf.quants.quantize(values, KINDS.Q8_0)
        return gguf.quants.dequantize(data, KINDS.Q8_0)
    return values.astype(dtype).astype(np.float32)


def surveyed(values):
    block = block_of(values.shape[1])
    survey = Survey(values.shape[1], block)
    for start in range(0, len(values), 3):
        found = split(values[start : start + 3], block)
        if found is None:
            return None
        survey.add(found[1])
    return survey


@pytest.mark.parametrize("dtype", ["float16", "BF16", "float32", "Q8_0"])
@pytest.mark.parametrize("group", [32, 64, 128, 256, 512])
def test_the_largest_groups_are_found(group, dtype):
    codes = codes_of(7, 512)
    scales = np.random.default_rng(0).uniform(0.01, 1, (7, 512 // group))
    values = unpacked(codes, scales, dtype)
    survey = surveyed(values)
    assert survey is not None
    grouping = coarsest([survey])
    assert grouping is not None
    assert grouping == (CHANNEL if group == 512 else group)
    if dtype != "Q8_0":
        assert survey.half == (dtype != "float32")  # bfloat16 here: 8 bits from 0.01 on
    found = split(values, survey.block)
    assert found is not None
    kept = regrouped(found[1], survey, grouping)
    assert kept.shape == scales.shape
    np.testing.assert_array_equal(found[0], codes)
    wide = np.repeat(kept, group, axis=1)
    np.testing.assert_array_equal(found[0] * wide, values)


def test_one_scale_for_a_matrix_is_found_and_a_weight_that_is_off_is_too():
    codes = codes_of(7, 96)
    codes[0], codes[3, :40] = 0, 0  # zeros fit any scale
    values = unpacked(codes, np.full((7, 1), 0.0173), "float16")
    survey = surveyed(values)
    assert survey is not None
    assert coarsest([survey]) == TENSOR
    found = split(values, survey.block)
    assert found is not None
    kept = regrouped(found[1], survey, TENSOR)
    assert (kept == np.float16(0.0173)).all()
    assert regrouped(found[1], survey, CHANNEL)[0] == 1  # of a row of zeros
    values[5, 50] = np.nextafter(np.float16(values[5, 50]), np.float16(1))
    codes[5, 50] = 1
    other = surveyed(values)
    assert other is None or coarsest([other]) != TENSOR
    assert surveyed(np.random.default_rng(0).standard_normal((4, 64))) is None
    values[2, 2] = np.nan
    assert surveyed(values) is None
    # Of several matrices, what holds in all.
    grouped = unpacked(
        codes_of(7, 512), np.linspace(0.1, 1, 28).reshape(7, 4), "float16"
    )
    others = [
        surveyed(grouped),
        surveyed(unpacked(codes_of(2, 512), np.ones((2, 1)), "float16")),
    ]
    assert coarsest([s for s in others if s is not None]) == 128


def test_blocks_of_a_file_make_larger_groups_or_smaller_ones():
    scales = np.repeat(scales_of(3, 2), 2, axis=1)
    scales[1, 1] = 0  # as a quantizer has it for 64 zeros
    survey = Survey(256, 64)
    survey.add(scales)
    assert coarsest([survey]) == 128
    np.testing.assert_array_equal(
        regrouped(scales, survey, 128), scales.reshape(3, 2, 2).max(axis=-1)
    )
    other = Survey(256, 256)
    other.add(scales_of(3, 1))
    assert coarsest([survey, other]) == 128
    assert regrouped(scales_of(3, 1), other, 128).shape == (3, 2)


# -- The file ---------------------------------------------------------------------


def test_every_kind_of_value_and_the_table_are_those_of_ggufs_reader(tmp_path):
    path = tmp_path / "a.gguf"
    writer = gguf.GGUFWriter(path, "bitnet")
    kinds = "uint8 int8 uint16 int16 uint32 int32 float32 uint64 int64 float64 bool"
    for kind in kinds.split():
        getattr(writer, f"add_{kind}")(f"a.{kind}", 1)
    writer.add_int64("a.negative", -(2**40))
    writer.add_float64("a.third", 1 / 3)
    writer.add_string("a.text", "naïve €")
    writer.add_array("a.texts", ["one", "", "zwölf"])
    writer.add_array("a.numbers", [1, -2, 3])
    writer.add_array("a.floats", [0.5, -2.0])
    writer.add_custom_alignment(64)
    writer.add_tensor("w", np.arange(24, dtype=np.float32).reshape(2, 3, 4))
    writer.add_tensor("x", np.arange(3, dtype=np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file, theirs = GGUFFile(path), gguf.GGUFReader(path)
    compared = 0
    for key, value in file.metadata.items():
        field = theirs.get_field(key)
        assert field is not None
        expected = field.contents()
        found = value.tolist() if isinstance(value, np.ndarray) else value
        assert found == expected
        compared += 1
    assert compared == 19
    for tensor in theirs.tensors:
        entry = file.tensors[tensor.name]
        assert entry.shape == tuple(tensor.shape.tolist()[::-1])
        assert entry.offset == tensor.data_offset
        found = file.rows(entry, WHOLE)
        assert found.tobytes() == tensor.data.tobytes()
    file.release()  # and what is read after that is the same
    entry = file.tensors["w"]
    rows = entry.type.floats(entry.type.split(file.rows(entry, WHOLE)))
    np.testing.assert_array_equal(rows.ravel(), np.arange(24))
    with pytest.raises((ValueError, TypeError)):
        file.rows(entry, WHOLE)[0, 0] = 1


def small(path):
    """A small file of everything, and its bytes."""
    write(
        path,
        "bitnet",
        {"number": 3, "texts": ["a", "bc"], ".general.alignment": 32},
        {
            "a": (q2_blocks(codes_of(3, 128), scales_of(3, 2), 64), Q2_0),
            "b": np.ones(5, np.float32),
            "c": (trits(codes_of(2, 128), scales_of(2, 1)), PTQ1_0),
        },
    )
    return bytearray(path.read_bytes())


def refused(path, content, words):
    path.write_bytes(content)
    with pytest.raises(VaaniError, match=words) as caught:
        GGUFFile(path)
    assert len(str(caught.value).splitlines()) == 1
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("at", "form", "value", "words"),
    [
        (0, "4s", b"GGML", "no GGUF file"),
        (4, "I", 1, "of version 1"),
        (4, "I", 3 << 24, "big-endian"),
        (8, "Q", 2**63, "tensors, more than there is room for"),
        (8, "Q", 2**16, "tensors, more than there is room for"),
        (16, "Q", 2**64 - 1, "keys, more than there is room for"),
        (24, "Q", 2**63, "name of a key"),
        (24, "Q", 2**16, "name of a key"),
    ],
)
def test_a_header_that_lies(at, form, value, words, tmp_path):
    content = small(tmp_path / "a.gguf")
    struct.pack_into("<" + form, content, at, value)
    refused(tmp_path / "a.gguf", content, words)


@pytest.mark.parametrize("count", [2**63, 2**40, 2**22 + 1, 10**4])
def test_arrays_longer_than_the_file(count, tmp_path):
    content = small(tmp_path / "a.gguf")
    at = content.index(b"bitnet.texts") + len(b"bitnet.texts")
    struct.pack_into("<Q", content, at + 8, count)
    refused(tmp_path / "a.gguf", content, "bitnet.texts")
    struct.pack_into("<I", content, at + 4, 6)  # numbers, now
    refused(tmp_path / "a.gguf", content, "longer than the file")
    struct.pack_into("<I", content, at + 4, 9)  # arrays within arrays
    refused(tmp_path / "a.gguf", content, "array of the kind 9")


@pytest.mark.parametrize("alignment", [0, 3, 2**31])
def test_alignments_that_are_none(alignment, tmp_path):
    content = small(tmp_path / "a.gguf")
    key = b"general.alignment"
    struct.pack_into("<I", content, content.index(key) + len(key) + 4, alignment)
    refused(tmp_path / "a.gguf", content, "power of two")


def row_of(content, name):
    """Where the dimensions of a tensor begin, in the table."""
    return content.rindex(struct.pack("<Q", len(name)) + name) + 8 + len(name)


@pytest.mark.parametrize(
    ("at", "form", "value", "words"),
    [
        (0, "I", 0, "0 dimensions"),
        (0, "I", 5, "5 dimensions"),
        (4, "Q", 0, "shape"),
        (4, "Q", 100, "no multiple of the 64"),
        (4, "Q", 192, "do not follow each other"),
        (12, "Q", 2**62, "do not follow each other"),
        (12, "Q", 2**64 - 1, "do not follow each other"),
        (20, "I", 36, "I2_S"),
        (20, "I", 12, "Q4_K: F32"),
        (20, "I", 4, "number 4"),
        (20, "I", 2**32 - 1, "number 4294967295"),
        (24, "Q", 32, "do not follow each other"),
        (24, "Q", 2**64 - 32, "do not follow each other"),
    ],
)
def test_a_table_that_lies(at, form, value, words, tmp_path):
    content = small(tmp_path / "a.gguf")
    struct.pack_into("<" + form, content, row_of(content, b"a") + at, value)
    refused(tmp_path / "a.gguf", content, words)


def _lengthened(content):
    """The first of two keys with the name of the second."""
    before, after = b"bitnet.number", b"bitnet.texts"
    return content.replace(
        struct.pack("<Q", len(before)) + before, struct.pack("<Q", len(after)) + after
    )


def test_names_that_come_twice(tmp_path):
    content = small(tmp_path / "a.gguf")
    refused(tmp_path / "a.gguf", _lengthened(content), "the key 'bitnet.texts' twice")
    at = row_of(content, b"b") - 1
    content[at : at + 1] = b"a"
    refused(tmp_path / "a.gguf", content, "the tensor 'a' twice")


def test_files_that_end_too_early(tmp_path):
    content = small(tmp_path / "a.gguf")
    for end in range(0, len(content) - 8, 3):
        (tmp_path / "a.gguf").write_bytes(content[:end])
        if end >= len(content) - 24:
            continue  # the padding after the last tensor
        with pytest.raises(VaaniError) as caught:
            GGUFFile(tmp_path / "a.gguf")
        assert len(str(caught.value).splitlines()) == 1
    with pytest.raises(VaaniError, match="can't read"):
        GGUFFile(tmp_path / "b.gguf")
    with pytest.raises(VaaniError, match="can't read"):
        GGUFFile(tmp_path)


def test_old_files_with_groups_of_128_are_refused_by_name(tmp_path):
    # Two bytes in 36 must be more than the padding between tensors.
    data = q2_blocks(codes_of(24, 256), scales_of(24, 2), 128)
    tensors: dict[str, Any] = {
        "a": (data, LEGACY),
        "b": np.ones(3, np.float32),
        "c": (data[:20], LEGACY),
    }
    write(tmp_path / "a.gguf", "qwen3", {}, tensors)
    with pytest.raises(
        VaaniError, match="blocks of 128 weights under the number of Q2"
    ):
        GGUFFile(tmp_path / "a.gguf")
    del tensors["b"], tensors["c"]  # by the end of the file alone
    write(tmp_path / "a.gguf", "qwen3", {}, tensors)
    with pytest.raises(
        VaaniError, match="blocks of 128 weights under the number of Q2"
    ):
        GGUFFile(tmp_path / "a.gguf")


def test_split_files_say_which_to_merge(tmp_path):
    keys: dict[str, Any] = {".split.no": 1, ".split.count": 3}
    write(tmp_path / "m-00002-of-00003.gguf", "qwen3", keys, {"b": np.ones(3)})
    with pytest.raises(VaaniError, match=r"--merge, given the first of its files"):
        GGUFFile(tmp_path / "m-00002-of-00003.gguf")
    write(tmp_path / "m.gguf", "qwen3", {**keys, ".split.no": 0}, {"b": np.ones(3)})
    with pytest.raises(VaaniError, match=r"--merge, given m.gguf"):
        GGUFFile(tmp_path / "m.gguf")


def outcome(path):
    """A file, or what is wrong with it."""
    try:
        return GGUFFile(path)
    except VaaniError as error:
        return error


def test_damaged_files_are_refused_or_read_within_their_bytes(tmp_path):
    """Every byte of the header may be any other, and numbers may be far too large."""
    content = bytes(small(tmp_path / "a.gguf"))
    rng = random.Random(0)
    ends = {"read": 0, "refused": 0}
    for _ in range(800):
        damaged = bytearray(content)
        for _ in range(rng.choice([1, 1, 2, 8])):
            at = rng.randrange(len(damaged) - 8)
            kind = rng.randrange(4)
            if kind == 0:
                damaged[at] = rng.randrange(256)
            elif kind == 1:
                damaged[at] ^= 1 << rng.randrange(8)
            elif kind == 2:
                value = rng.choice([0, 1, 2**31, 2**32, 2**40, 2**63, 2**64 - 1])
                struct.pack_into("<Q", damaged, at, value)
            else:
                del damaged[rng.randrange(len(damaged) - 16, len(damaged)) :]
        path = tmp_path / "b.gguf"
        path.write_bytes(damaged)
        file = outcome(path)
        if isinstance(file, VaaniError):
            assert len(str(file).splitlines()) == 1
            assert len(str(file)) < 500
            ends["refused"] += 1
            continue
        for entry in file.tensors.values():
            assert entry.offset + entry.bytes <= len(damaged)
            assert file.rows(entry, WHOLE).size == entry.bytes
        ends["read"] += 1
    assert min(ends.values()) > 80, ends

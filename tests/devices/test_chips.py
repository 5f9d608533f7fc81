"""The table of chips: units, and no guesses."""

import pytest

from vaani_jax.devices.chips import CHIPS, Chip, chip_of


@pytest.mark.parametrize("name", CHIPS)
def test_figures_are_in_their_units(name):
    chip = CHIPS[name]
    assert isinstance(chip, Chip)
    assert chip.name == name
    assert 1e14 < chip.bf16_flops < 1e16
    assert 1 <= chip.int8_ops / chip.bf16_flops <= 2
    assert 1e10 < chip.memory_bytes < 1e12
    assert 1e11 < chip.memory_bandwidth < 1e13
    assert 1e11 <= chip.interconnect < chip.memory_bandwidth
    # A product of two large matrices is bound by arithmetic, a vector by memory.
    assert 50 < chip.bf16_flops / chip.memory_bandwidth < 1000


def test_a_device_kind_is_one_chip_or_none():
    kinds = [kind for chip in CHIPS.values() for kind in chip.device_kinds]
    assert len(kinds) == len(set(kinds))
    for chip in CHIPS.values():
        assert {chip_of(kind) for kind in chip.device_kinds} == {chip}
    assert chip_of("NVIDIA H100 80GB HBM3") is CHIPS["H100"]
    assert chip_of("TPU v5 lite") is CHIPS["TPU-v5e"]
    for other in ("cpu", "", "NVIDIA H100 PCIe", "NVIDIA H100", "TPU", "tpu v4"):
        assert chip_of(other) is None

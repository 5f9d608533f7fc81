"""What accelerators can do, by their makers' data sheets.

Peaks are of dense products; figures in powers of ten, per device as JAX counts devices
(a TPU v4 or v5p chip with its two cores is one). They are what to measure against, not
what a program gets.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Chip:
    """An accelerator.

    Attributes:
      name: as people say it, and as `CHIPS` has it.
      device_kinds: what `jax.Device.device_kind` says of it.
      bf16_flops: peak of products of bfloat16 with float32 sums, FLOP/s.
      int8_ops: peak of products of int8 with int32 sums, OP/s.
      memory_bytes: of the data sheet; programs get a little more or less.
      memory_bandwidth: B/s.
      interconnect: what a device can send to its neighbors, B/s in one direction: half
        of the bidirectional figure of the data sheet.
    """

    name: str
    device_kinds: tuple[str, ...]
    bf16_flops: float
    int8_ops: float
    memory_bytes: float
    memory_bandwidth: float
    interconnect: float


CHIPS = {
    chip.name: chip
    for chip in (
        # NVIDIA A100 Tensor Core GPU data sheet, A100 80GB SXM: 312 TFLOPS, 624 TOPS,
        # 2,039 GB/s, NVLink 600 GB/s in both directions.
        Chip(
            "A100-80G",
            ("NVIDIA A100-SXM4-80GB",),
            312e12,
            624e12,
            80e9,
            2.039e12,
            300e9,
        ),
        # NVIDIA H100 Tensor Core GPU data sheet, H100 SXM: 1,979 TFLOPS and 3,958 TOPS
        # with sparsity, half of them without; 3.35 TB/s, NVLink 900 GB/s.
        Chip(
            "H100",
            ("NVIDIA H100 80GB HBM3",),
            989.5e12,
            1979e12,
            80e9,
            3.35e12,
            450e9,
        ),
        # NVIDIA H200 Tensor Core GPU data sheet, H200 SXM: peaks of the H100, 141 GB,
        # 4.8 TB/s, NVLink 900 GB/s.
        Chip(
            "H200",
            ("NVIDIA H200",),
            989.5e12,
            1979e12,
            141e9,
            4.8e12,
            450e9,
        ),
        # docs.cloud.google.com/tpu/docs/v4: 275 TFLOPS in bf16 or int8, 32 GiB,
        # 1,200 GB/s; interconnect of six links of 50 GB/s each way: arXiv:2304.01433.
        Chip(
            "TPU-v4",
            ("TPU v4",),
            275e12,
            275e12,
            32 * 2.0**30,
            1.2e12,
            300e9,
        ),
        # docs.cloud.google.com/tpu/docs/v5e: 197 TFLOPS, 393 TOPS, 16 GB, 819 GB/s,
        # interconnect 400 GB/s bidirectional.
        Chip(
            "TPU-v5e",
            ("TPU v5 lite", "TPU v5e"),
            197e12,
            393e12,
            16e9,
            819e9,
            200e9,
        ),
        # docs.cloud.google.com/tpu/docs/v5p: 459 TFLOPS, 95 GB, 2,765 GB/s, 1,200 GB/s
        # bidirectional; int8 918 TOPS: docs.jax.dev, Pallas, TPU hardware reference.
        Chip(
            "TPU-v5p",
            ("TPU v5", "TPU v5p"),
            459e12,
            918e12,
            95e9,
            2.765e12,
            600e9,
        ),
        # docs.cloud.google.com/tpu/docs/v6e: 918 TFLOPS, 1,836 TOPS, 32 GB, 1,638 GB/s,
        # 800 GB/s bidirectional.
        Chip(
            "TPU-v6e",
            ("TPU v6 lite", "TPU v6e"),
            918e12,
            1836e12,
            32e9,
            1.638e12,
            400e9,
        ),
    )
}


def chip_of(device_kind: str) -> Chip | None:
    """The chip that `jax.Device.device_kind` names, letter for letter; else None.

    Kin with other clocks or memory ("NVIDIA H100 PCIe") are not in the table: no figure
    is better than a wrong one.
    """
    for chip in CHIPS.values():
        if device_kind in chip.device_kinds:
            return chip
    return None

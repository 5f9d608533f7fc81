"""Which backend this process computes packed products with."""

import functools
import importlib.util
import logging
import os
from typing import Literal

import jax

from vaani_jax.errors import VaaniError
from vaani_jax.kernels import cpu
from vaani_jax.quant.packed import Layout

Backend = Literal["reference", "cpu", "gpu", "tpu"]
BACKENDS: tuple[Backend, ...] = ("reference", "cpu", "gpu", "tpu")


log = logging.getLogger("vaani_jax")


@functools.cache
def backend() -> Backend:
    """The backend that this process uses.

    Raises:
      VaaniError: VAANI_KERNELS names one that is unknown or missing.
    """
    forced = os.environ.get("VAANI_KERNELS", "")
    platform = jax.default_backend()
    if forced:
        if forced not in BACKENDS:
            raise VaaniError(
                f"VAANI_KERNELS is {forced!r}: choose one of {', '.join(BACKENDS)}"
            )
        if forced not in ("reference", platform):
            raise VaaniError(
                f"VAANI_KERNELS is {forced}, but JAX runs on {platform} here: unset it"
            )
        missing = {"cpu": cpu.missing, "gpu": gpu_missing}.get(forced, lambda: "")()
        if missing:
            raise VaaniError(f"VAANI_KERNELS is {forced}, but {missing}")
        log.info("kernels: %s (forced)", _described(forced))
        return forced
    choice: Backend = "reference"
    if platform == "tpu":
        choice = "tpu"
    elif platform in ("gpu", "cpu"):
        missing = gpu_missing() if platform == "gpu" else cpu.missing()
        if missing:
            log.warning("slow products: %s", missing)
        else:
            choice = "gpu" if platform == "gpu" else "cpu"
    log.info("kernels: %s", _described(choice))
    return choice


def gpu_missing() -> str:
    """Why the kernels for GPUs can't run here; empty where they can."""
    if importlib.util.find_spec("jax.experimental.pallas.triton") is None:
        return "this JAX has no Pallas through Triton any more"
    if "cuda" not in jax.devices()[0].client.platform_version:
        return "they are written for NVIDIA's GPUs"
    return ""


def _described(name: str) -> str:
    return f"cpu, {cpu.isa()}" if name == "cpu" else name


def layout(name: Backend | None = None) -> Layout:
    """The order of codes that a backend multiplies fastest."""
    orders: dict[str, Layout] = {"gpu": "rows", "tpu": "planes"}
    return orders.get(name or backend(), "tiles")

"""Vaani: BitNet b1.58 ternary language models in JAX.

    import vaani_jax as vaani

    model = vaani.load("runs/small")

Names are imported when they are first used: importing the package costs nothing.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vaani_jax.cli.flags import default_config
    from vaani_jax.errors import VaaniError
    from vaani_jax.inference.generate import generate
    from vaani_jax.inference.model import Model, load
    from vaani_jax.model.cache import KVCache
    from vaani_jax.model.config import Architecture, Execution, Quantization
    from vaani_jax.model.linear import BitLinear
    from vaani_jax.model.transformer import Vaani
    from vaani_jax.quant.activations import ActivationQuantizer
    from vaani_jax.quant.weights import TernaryQuantizer
    from vaani_jax.train.config import Config
    from vaani_jax.train.loop import train
    from vaani_jax.train.tuner import HyperparameterTuner
    from vaani_jax.train.tuner.config import TunerConfig

__version__ = "0.2.0"

# Where each name is.
_FACE = {
    "ActivationQuantizer": "vaani_jax.quant.activations",
    "Architecture": "vaani_jax.model.config",
    "BitLinear": "vaani_jax.model.linear",
    "Config": "vaani_jax.train.config",
    "Execution": "vaani_jax.model.config",
    "HyperparameterTuner": "vaani_jax.train.tuner",
    "KVCache": "vaani_jax.model.cache",
    "Model": "vaani_jax.inference.model",
    "Quantization": "vaani_jax.model.config",
    "TernaryQuantizer": "vaani_jax.quant.weights",
    "TunerConfig": "vaani_jax.train.tuner.config",
    "Vaani": "vaani_jax.model.transformer",
    "VaaniError": "vaani_jax.errors",
    "default_config": "vaani_jax.cli.flags",
    "generate": "vaani_jax.inference.generate",
    "load": "vaani_jax.inference.model",
    "train": "vaani_jax.train.loop",
}
__all__ = [
    "ActivationQuantizer",
    "Architecture",
    "BitLinear",
    "Config",
    "Execution",
    "HyperparameterTuner",
    "KVCache",
    "Model",
    "Quantization",
    "TernaryQuantizer",
    "TunerConfig",
    "Vaani",
    "VaaniError",
    "__version__",
    "default_config",
    "generate",
    "load",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _FACE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_FACE[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

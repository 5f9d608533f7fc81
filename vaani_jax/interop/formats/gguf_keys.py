"""Keys of a GGUF file that begin with the name of its architecture, checked."""

from typing import Any

import numpy as np

from vaani_jax.errors import VaaniError
from vaani_jax.words import shown

LARGEST = 2**31 - 1  # of any whole number: what int32 indices can count


class Keys:
    """The keys of a file that begin with the name of its architecture.

    Attributes:
      architecture: that name.
    """

    def __init__(self, metadata: dict[str, Any], architecture: str) -> None:
        self._metadata = metadata
        self.architecture = architecture

    def name(self, key: str) -> str:
        """The whole name of a key."""
        return f"{self.architecture}.{key}"

    def _get(self, key: str) -> Any:
        """The value of a key, or None; one for all layers where they have their own."""
        value = self._metadata.get(self.name(key))
        if isinstance(value, np.ndarray):
            if not len(value) or (value != value[0]).any():
                raise VaaniError(
                    f"{self.name(key)} gives layers their own: they are alike here"
                )
            value = value[0].item()
        return value

    def whole(self, key: str, default: int | None = None) -> int:
        """A number from 1; raises VaaniError, as where there is neither it nor one."""
        value = self._get(key)
        if value is None and default is not None:
            return default
        if type(value) is not int or not 1 <= value <= LARGEST:
            raise VaaniError(
                f"{self.name(key)} is {shown(value)[:60]}: it must be a whole number"
                f" from 1 to {LARGEST}"
            )
        return value

    def number(
        self,
        key: str,
        default: float | None = None,
        low: float = -1e30,
        high: float = 1e30,
    ) -> float:
        """A number; one that is a float32 there is the shortest that rounds to it."""
        value = self._get(key)
        if value is None and default is not None:
            return default
        if type(value) not in (int, float) or not low <= value <= high:
            raise VaaniError(
                f"{self.name(key)} is {shown(value)[:60]}: it must be a number from"
                f" {low:g} to {high:g}"
            )
        narrow = np.float32(value)
        return float(str(narrow)) if float(narrow) == value else float(value)

    def text(self, key: str, default: str) -> str:
        """A text."""
        value = self._get(key)
        if value is None:
            return default
        if not isinstance(value, str):
            raise VaaniError(f"{self.name(key)} is {shown(value)[:60]}: no text")
        return value

"""Masters out of codes and scales: what a packed kernel goes on training from."""

import numpy as np

from vaani_jax.quant.rounding import EPSILON


def masters_of(codes: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Masters from which the rule of b1.58 finds codes and scales again.

    They are ``c T``, in every group that has a scale of its own, with c = scale / share
    of non-zeros, so that ``mean|c T|`` is the scale up to rounding; the codes are
    exact, as c is above half of any mean.

    Args:
      codes: [K, N] in {-1, 0, 1}, int8.
      scale: float32 [], [N] or [K / group, N].

    Returns:
      float32 [K, N].
    """
    k, n = codes.shape
    if scale.ndim == 0:
        kept = np.count_nonzero(codes) / codes.size
        c = np.float32(max(float(scale), EPSILON) / kept) if kept else np.float32(0)
        return codes.astype(np.float32) * c
    groups = 1 if scale.ndim == 1 else len(scale)
    parts = codes.reshape(groups, k // groups, n)
    shares = np.count_nonzero(parts, axis=1) / (k // groups)
    factors = np.maximum(scale.reshape(groups, n), EPSILON) / np.maximum(shares, 1e-9)
    factors = np.where(shares > 0, factors, 0).astype(np.float32)
    return (parts * factors[:, None]).reshape(k, n)

r"""Ternary weights and 8-bit activations, with straight-through gradients.

The maths (arXiv:2402.17764 and the training-tips FAQ that came with it), for a
kernel ``W [K, N]`` and activations ``x [..., K]``:

* weights, per tensor:   ``gamma = max(mean|W|, 1e-5)``,
  ``T = sign(W) * (|W| > tau * gamma)``, so that ``W ~ gamma * T``.
  ``tau = 0.5`` is ``clip(round(W / gamma), -1, 1)``, the rule of b1.58.
* activations, per token: ``s = max(max|x|, 1e-5) / 127``,
  ``q = clip(round(x / s), -128, 127)`` (half to even), so that ``x ~ s * q``.
* product: ``y = (q @ T) * (s * gamma)``, where ``s * gamma`` is rounded in one order
  everywhere (`output_scale`).

``q`` and ``T`` are small integers that ride in floats. Their products summed over K
inputs stay below ``127 * K``: float32 accumulation is exact for ``K < 132,000`` and
bfloat16 holds every operand exactly, so ``q @ T`` is, bit for bit, what an
int8 x ternary integer kernel computes, whatever the dtype of the operands. Beyond that
K, float32 sums round on the way; int8 operands sum exactly in int32 (up to K of
16 million) and round once, when the sum becomes a float32.

The sums behind ``gamma`` and ``alpha`` are exact, too (`exact_sum`): a kernel has one
scale, whatever the order in which it is read, and however it is cut over devices.

Straight through: the gradient passes both quantizers unchanged and unmasked,
``dL/dx = g @ (gamma T)^T`` and ``dL/dW = (s q)^T @ g``.

Beyond b1.58: any threshold ``tau``; the least-squares scale of ternary weight
networks (arXiv:1605.04711), ``alpha = sum(|W| |T|) / sum(|T|)``; scales per output
channel; a tracked activation range in the place of the per-token one; and a mix
``lambda`` that moves the operands from full precision (0) to quantized (1).
"""

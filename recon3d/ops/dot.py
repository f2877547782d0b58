"""Inner products that decide something: float64, in an order that no thread count or batch size changes.

Each slice is summed in fixed chunks (chunk sums in float64, then the chunks in order), so a slice's value does not
depend on its neighbours, and the whole-volume value is the ordered sum of the slices.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from recon3d.ops import _library

__all__ = ["dot"]

_CHUNK = 4096


def dot(x: Tensor, y: Tensor, per_slice: bool = False) -> Tensor:
    """Real inner product <x, y>.

    Args:
        x: [slice, ...] float32 or float64.
        y: same shape, dtype and device as x.
        per_slice: one value per leading index instead of one for everything.

    Returns:
        float64, [slices] or a scalar tensor on x's device; nothing waits for the device.

    Raises:
        ValueError: shapes differ or x has no axis.
        TypeError: not float32 or float64, or dtypes differ.

    >>> dot(torch.ones(2, 3), torch.ones(2, 3), per_slice=True).tolist()
    [3.0, 3.0]
    """
    if x.shape != y.shape or x.ndim == 0:
        raise ValueError(f"dot: x and y need one shape of at least one axis, got {tuple(x.shape)} and {tuple(y.shape)}")
    if x.dtype != y.dtype or x.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"dot: x and y need one dtype, float32 or float64, got {x.dtype} and {y.dtype}")
    _library.ensure()
    slices = torch.ops.recon3d.dot(x.contiguous(), y.contiguous())
    # cumsum runs in order on every device, unlike sum
    return slices if per_slice else (slices.cumsum(0)[-1] if slices.numel() else slices.sum())


def _reference(x: Tensor, y: Tensor) -> Tensor:
    if x[:1].numel() == 0:
        return x.new_zeros(x.shape[0], dtype=torch.float64)
    product = (x.double() * y.double()).reshape(x.shape[0], -1)
    product = torch.nn.functional.pad(product, (0, -product.shape[1] % _CHUNK))
    return product.reshape(x.shape[0], -1, _CHUNK).sum(2).cumsum(1)[:, -1]


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
    x, y = ctx.saved_tensors
    g = grad.reshape(-1, *[1] * (x.ndim - 1)).to(x.dtype)
    return g * y, g * x


_library.define(
    "dot(Tensor x, Tensor y) -> Tensor",
    _reference,
    lambda x, y: x.new_empty(x.shape[0], dtype=torch.float64),
    backward=_backward,
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)

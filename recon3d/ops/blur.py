"""Gaussian blur of volumes: the image-space resolution model of a PET scanner.

    weights exp(-k^2 / (2 sigma^2)) for |k| <= int(4 sigma + 1/2), divided by their sum, along each axis

with zeros outside the volume, so that the blur is symmetric: it is its own adjoint. What leaves through a face is
lost; inside, sums are kept.
"""

from __future__ import annotations

import importlib.util
import math
from typing import Any

import torch
from torch import Tensor

from recon3d.ops import _library

__all__ = ["gaussian_blur"]

# beyond this the kernel would be wider than any volume it is meant for
_LARGEST = 64.0


def gaussian_blur(x: Tensor, sigma_voxels: tuple[float, float, float]) -> Tensor:
    """Separable Gaussian blur, zero outside the volume.

    Args:
        x: volume, [..., z, y, x] float32 or float64, any unit.
        sigma_voxels: standard deviations (z, y, x) in voxels; full width at half maximum / 2.3548 / voxel size. 0
            leaves an axis alone.

    Returns:
        The blurred volume, like x. Differentiable; the gradient is the blur itself.

    Raises:
        ValueError: fewer than three axes, or sigma not between 0 and 64.
        TypeError: x is not float32 or float64.

    Kernels: torch (any device), C++ (CPU), Triton (CUDA).

    >>> x = torch.zeros(1, 1, 5)
    >>> x[0, 0, 2] = 1
    >>> [round(v, 3) for v in gaussian_blur(x, (0.0, 0.0, 0.5)).flatten().tolist()]
    [0.0, 0.106, 0.787, 0.106, 0.0]
    """
    if x.ndim < 3:
        raise ValueError(f"gaussian_blur: a volume [..., z, y, x] is needed, got {tuple(x.shape)}")
    if x.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"gaussian_blur: float32 or float64 is needed, got {x.dtype}")
    sigmas = tuple(float(s) for s in sigma_voxels)
    if len(sigmas) != 3 or not all(0 <= s <= _LARGEST for s in sigmas):
        raise ValueError(
            f"gaussian_blur: sigma_voxels must be three numbers (z, y, x) in 0..{_LARGEST:g}, got {sigma_voxels}"
        )
    _library.ensure()
    volumes = x.reshape(-1, *x.shape[-3:]) if x.ndim != 4 else x
    out: Tensor = torch.ops.recon3d.gaussian_blur(volumes.contiguous(), *sigmas)
    return out.reshape(x.shape)


def blur_weights(sigma: float) -> list[float]:
    """Weights 0..radius of one axis; the others mirror them."""
    radius = int(4 * sigma + 0.5)
    raw = [math.exp(-0.5 * (k / sigma) ** 2) if k else 1.0 for k in range(radius + 1)]
    total = raw[0] + 2 * math.fsum(raw[1:])
    return [w / total for w in raw]


def _blur(x: Tensor, sz: float, sy: float, sx: float) -> Tensor:
    for axis, sigma in ((1, sz), (2, sy), (3, sx)):
        weights, n = blur_weights(sigma), x.shape[axis]
        out = x * weights[0]
        for k, w in enumerate(weights[1:], start=1):
            if k < n:
                out.narrow(axis, 0, n - k).add_(x.narrow(axis, k, n - k), alpha=w)
                out.narrow(axis, k, n - k).add_(x.narrow(axis, 0, n - k), alpha=w)
        x = out
    return x


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.sigmas = inputs[1:]


_library.define(
    "gaussian_blur(Tensor x, float sz, float sy, float sx) -> Tensor",
    _blur,
    lambda x, *_: x.new_empty(x.shape),
    setup_context=_keep,
    backward=lambda ctx, g: (torch.ops.recon3d.gaussian_blur(g.contiguous(), *ctx.sigmas), None, None, None),
)


def _cuda_blur(x: Tensor, sz: float, sy: float, sx: float) -> Tensor:
    from recon3d.kernels import blur as kernels

    return kernels.blur(x, [blur_weights(s) for s in (sz, sy, sx)])


if importlib.util.find_spec("triton") is not None:
    _library.register_cuda("gaussian_blur", _cuda_blur)

"""Relative difference prior: smooths neighbours by their difference relative to their sum, along z or in 3D.

    R(x) = sum over pairs of neighbours (a, b) of  w (a - b)^2 / (a + b + gamma |a - b| + epsilon),   x >= 0

(Nuyts, Beque, Dupont, Mortelmans, IEEE Trans. Nucl. Sci. 49 (2002) 56). Every pair counts once; neighbours share a
face and end at the volume's faces (Neumann); w = dx / distance, so that a jump counts per millimetre along every
axis. R is convex and grows in proportion to x: beta R and the log-likelihood balance alike at every activity when
beta is given in units of the sensitivity. gamma leaves edges alone, epsilon (unit of x) rounds R off at zero.

With c = 2 b + epsilon and r = 1 / (c + a - b + gamma |a - b|) the gradient of a pair is  w (a - b) r (1 + c r).
"""

from __future__ import annotations

import importlib.util
import math
from typing import Any, Literal

import torch
from torch import Tensor

from recon3d.ops import _library

__all__ = ["Axes", "rdp", "rdp_gradient"]

Axes = Literal["z", "zyx"]
Weights = tuple[float, float, float]


def rdp(
    x: Tensor,
    gamma: float = 2.0,
    epsilon: float = 1e-6,
    axes: Axes = "zyx",
    spacing_mm: tuple[float, float, float] | None = None,
) -> Tensor:
    """Value of the relative difference prior.

    Args:
        x: volume, [z, y, x] float32 or float64, at least 0.
        gamma: 0 or above; larger keeps edges more.
        epsilon: above 0, unit of x; far below the activities that matter.
        axes: "z" ties slices alone, "zyx" ties the six neighbours that share a face.
        spacing_mm: voxel size (z, y, x); None takes cubes.

    Returns:
        float64 scalar tensor in the unit of x, summed slice by slice in order. Autograd is :func:`rdp_gradient`.

    Raises:
        ValueError: x has not three axes, or a number is out of range.
        TypeError: x is not float32 or float64.

    >>> round(rdp(torch.tensor([[[1.0]], [[3.0]]]), gamma=2.0).item(), 6)  # 4 / (4 + 2 * 2)
    0.5
    """
    weights = _check("rdp", x, gamma, epsilon, axes, spacing_mm)
    value: Tensor = torch.ops.recon3d.rdp(x.contiguous(), gamma, epsilon, *weights)
    return value


def rdp_gradient(
    x: Tensor,
    gamma: float = 2.0,
    epsilon: float = 1e-6,
    axes: Axes = "zyx",
    spacing_mm: tuple[float, float, float] | None = None,
) -> Tensor:
    """Gradient of :func:`rdp`: a pure number for every voxel.

    Args:
        x: as in rdp.
        gamma: as in rdp.
        epsilon: as in rdp.
        axes: as in rdp.
        spacing_mm: as in rdp.

    Returns:
        dR/dx, shape and dtype of x. No autograd.

    Raises:
        ValueError: as rdp.
        TypeError: as rdp.

    Kernels: torch (any device), C++ (CPU), Triton (CUDA).

    >>> [round(v, 4) for v in rdp_gradient(torch.tensor([[[1.0]], [[3.0]]]), gamma=2.0).flatten().tolist()]
    [-0.4375, 0.3125]
    """
    weights = _check("rdp_gradient", x, gamma, epsilon, axes, spacing_mm)
    gradient: Tensor = torch.ops.recon3d.rdp_gradient(x.contiguous(), gamma, epsilon, *weights)
    return gradient


def _check(
    name: str, x: Tensor, gamma: float, epsilon: float, axes: str, spacing_mm: tuple[float, float, float] | None
) -> Weights:
    if x.ndim != 3:
        raise ValueError(f"{name}: a volume [z, y, x] is needed, got {tuple(x.shape)}")
    if x.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{name}: float32 or float64 is needed, got {x.dtype}")
    if not (math.isfinite(gamma) and gamma >= 0):
        raise ValueError(f"{name}: gamma must be finite and at least 0, got {gamma}")
    if not (math.isfinite(epsilon) and epsilon > 0):
        raise ValueError(f"{name}: epsilon must be finite and above 0, got {epsilon}")
    _library.ensure()
    return pair_weights(name, axes, spacing_mm)


def pair_weights(name: str, axes: str, spacing_mm: tuple[float, float, float] | None) -> Weights:
    """Weights (wz, wy, wx) of pairs along each axis: dx / distance, 0 where the axis is not tied."""
    if axes not in ("z", "zyx"):
        raise ValueError(f"{name}: axes must be 'z' or 'zyx', got {axes!r}")
    spacing = (1.0, 1.0, 1.0) if spacing_mm is None else tuple(float(s) for s in spacing_mm)
    if len(spacing) != 3 or not all(math.isfinite(s) and s > 0 for s in spacing):
        raise ValueError(f"{name}: spacing_mm must be three positive lengths (z, y, x) in mm, got {spacing_mm}")
    dz, dy, dx = spacing
    return (dx / dz, dx / dy if axes == "zyx" else 0.0, 1.0 if axes == "zyx" else 0.0)


def _value(x: Tensor, gamma: float, epsilon: float, wz: float, wy: float, wx: float) -> Tensor:
    total = torch.zeros((), dtype=torch.float64, device=x.device)
    for k in range(x.shape[0]):
        here = x[k : k + 2].double()
        for axis, weight in enumerate((wz, wy, wx)):
            part = here if axis == 0 else here[:1]
            n = part.shape[axis] - 1
            if weight and n > 0:
                a, b = part.narrow(axis, 0, n), part.narrow(axis, 1, n)
                d = a - b
                total = total + weight * (d * d / (a + b + gamma * d.abs() + epsilon)).sum()
    return total


def _gradient(x: Tensor, gamma: float, epsilon: float, wz: float, wy: float, wx: float) -> Tensor:
    return slope_and_curvature(x, gamma, epsilon, (wz, wy, wx), curvature=False)[0]


def slope_and_curvature(
    x: Tensor, gamma: float, epsilon: float, weights: Weights, curvature: bool = True
) -> tuple[Tensor, Tensor]:
    """dR/dx, and per voxel a curvature with which  R(x) + dR (v - x) + curvature/2 (v - x)^2  stays above R(v), v >= 0.

    Along a line through t = a - b = 0 the potential is t^2 / (c + (gamma + 1) t) to the right and
    t^2 / (c + (gamma - 1) |t|) to the left, c = 2 b + epsilon. The left branch, mirrored, is even and has a falling
    slope / t, so slope / |t| at |t| is the curvature of a parabola above it (Huber); from a point of the flatter right
    branch the same curvature serves as well, because the gap between the branches over |t| grows with |t|. Moving both
    neighbours at once splits by convexity, R(a, b) <= R(2a - a0, b0)/2 + R(a0, 2b - b0)/2 (De Pierro, IEEE Trans. Med.
    Imaging 14 (1995) 132), which doubles it. gamma >= 1 is needed: then the denominator stays positive on the way.
    """
    slope, curve = torch.zeros_like(x), torch.zeros_like(x)
    for axis, weight in enumerate(weights):
        n = x.shape[axis] - 1
        if not weight or n < 1:
            continue
        lower, upper = x.narrow(axis, 0, n), x.narrow(axis, 1, n)
        for at, a, b in ((0, lower, upper), (1, upper, lower)):
            d = a - b
            c = 2 * b + epsilon
            r = 1 / (a + b + gamma * d.abs() + epsilon)
            slope.narrow(axis, at, n).add_(d * r * (1 + c * r), alpha=weight)
            if curvature:
                r = 1 / (c + (gamma - 1) * d.abs())
                curve.narrow(axis, at, n).add_(r * (1 + c * r), alpha=2 * weight)
    return slope, curve


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(inputs[0])
    ctx.settings = inputs[1:]


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    (x,) = ctx.saved_tensors
    return torch.ops.recon3d.rdp_gradient(x, *ctx.settings) * grad.to(x.dtype), None, None, None, None, None


_ARGUMENTS = "Tensor x, float gamma, float epsilon, float wz, float wy, float wx"
_library.define(
    f"rdp({_ARGUMENTS}) -> Tensor",
    _value,
    lambda x, *_: x.new_empty((), dtype=torch.float64),
    setup_context=_keep,
    backward=_backward,
)
_library.define(f"rdp_gradient({_ARGUMENTS}) -> Tensor", _gradient, lambda x, *_: x.new_empty(x.shape))


def _cuda_gradient(x: Tensor, gamma: float, epsilon: float, wz: float, wy: float, wx: float) -> Tensor:
    from recon3d.kernels import rdp as kernels

    out = torch.empty_like(x)
    kernels.gradient(x, out, gamma, epsilon, (wz, wy, wx))
    return out


if importlib.util.find_spec("triton") is not None:
    _library.register_cuda("rdp_gradient", _cuda_gradient)

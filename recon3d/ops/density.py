"""Density compensation: how much of k-space every sample stands for.

A weight is an area (volume in 3D) in Nyquist cells: 1 for every sample of a full Cartesian grid. So
A^H (weight * y), gridding, is a quantitative image where the trajectory is fully sampled: with
X(k) = sqrt(prod N) y(k),  x_n = (2 pi)^-d int X(k) e^{ikn} dk ~ A^H (weight * y)  for weight = area prod N / (2 pi)^d.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from recon3d.geometry import Trajectory
from recon3d.ops import _library
from recon3d.ops.nufft_plan import NufftPlan, nufft_plan

__all__ = ["density_compensation", "pipe_menon", "ramp"]

Points = NDArray[np.float64]

# radians per pixel: nearer to the centre a direction is rounding, and nearer to each other two radii are one
_SAME_RADIUS = 1e-5
# radians: spokes nearer than this are one; golden angles of ten thousand spokes are farther apart
_SAME_ANGLE = 5e-5
# Nyquist distances a sample may lie beside its spoke
_BESIDE = 0.1
# a kernel of 6 taps, 1.5 Nyquist cells to either side, whatever the plan in use. Narrower ones see the gaps of a
# Cartesian grid (its weights are 0.97 with 5 taps, 0.99 with 6), wider ones settle slowly: 320 x 320 pixels, 402 spokes
# of 640, gridded Shepp-Logan, 30 iterations: error 6.4 % (areas: 6.5 %), with oversampling 1.5 and 5 taps 9.2 %
_EPS, _OVERSAMPLING = 3e-5, 2.0
# of the second moments of directions in 3D, which are 1/3
_UNEVEN = 0.1


def density_compensation(
    samples: Trajectory | NufftPlan, method: Literal["pipe_menon", "ramp"] = "pipe_menon", iterations: int = 30
) -> Tensor:
    """Density compensation weights of any trajectory, in Nyquist cells.

    Args:
        samples: a trajectory, or the plan made of one.
        method: "pipe_menon" for any trajectory, or "ramp" for spokes through the centre (exact areas, no iterations).
        iterations: of pipe_menon.

    Returns:
        [M] float32 in the order of the samples, on the plan's device. Multiply samples by them before nufft_adjoint.

    Raises:
        ValueError: an unknown method, no iterations, or "ramp" for samples that do not lie on spokes.

    >>> from recon3d.geometry.mri import cartesian
    >>> round(density_compensation(cartesian((8, 8))).mean().item(), 2)
    0.99
    """
    if method == "pipe_menon":
        return pipe_menon(samples, iterations)
    if method != "ramp":
        raise ValueError(f"density_compensation: method must be 'pipe_menon' or 'ramp', got {method!r}")
    if isinstance(samples, Trajectory):
        return ramp(samples)
    return ramp(Trajectory(samples.radians().cpu(), samples.shape)).to(samples.device)


def pipe_menon(samples: Trajectory | NufftPlan, iterations: int = 30) -> Tensor:
    """Weights w that make sum_j w_j K(k_i - k_j) = 1 at every sample, K the NUFFT's kernel correlated with itself.

    Iterates w <- w / (C w) with C w = interpolate(spread(w)), which needs no FFT. K is scaled to unit integral over
    Nyquist cells, so that w is an area. A sample without neighbours within three Nyquist cells stands for the kernel's
    own area: between the spokes of an undersampled scan the weights do not fill all of k-space.
    Source: Pipe and Menon, Magnetic Resonance in Medicine 41 (1999) 179.

    Args:
        samples: a trajectory, or the plan made of one.
        iterations: at least one; after 30 a fully sampled image is right to 1 %.

    Returns:
        [M] float32 in the order of the samples, on the plan's device.

    Raises:
        ValueError: no iterations.

    Kernels: torch (any device), C++ (CPU), CUDA; computed in float64.
    """
    if int(iterations) != iterations or iterations < 1:
        raise ValueError(f"pipe_menon: at least one iteration is needed, got {iterations}")
    points = samples.radians().cpu() if isinstance(samples, NufftPlan) else samples.points
    plan = nufft_plan(points, samples.shape, eps=_EPS, oversampling=_OVERSAMPLING)
    plan = plan.to(samples.device) if isinstance(samples, NufftPlan) else plan
    _library.ensure()
    taps = plan.weights(torch.float64)
    table = (plan.order, plan.first, taps, plan.tiles, plan.grid, plan.tile)
    # sum of the taps of an axis, the same for every sample to the kernel's error
    total = math.prod((taps[:, a] if g > 1 else taps[:, a, :1]).sum(1).mean().item() for a, g in enumerate(plan.grid))
    unit = total**2 * math.prod(plan.shape) / math.prod(plan.grid)
    weight = torch.ones(1, plan.n_points, dtype=torch.complex128, device=plan.device)
    for _ in range(int(iterations)):
        cells = torch.ops.recon3d.nufft_spread(weight, *table)
        weight = weight * (unit / torch.ops.recon3d.nufft_interpolate(cells, *table).real)
    return weight[0].real.float()


def ramp(trajectory: Trajectory) -> Tensor:
    """Weights of spokes through the centre, from the area between neighbouring samples and neighbouring spokes.

    2D: a sample of radius r within [a, b] whose ray has the angle g to itself weighs g (b^2 - a^2) / 2; full and half
    spokes, uneven angles and repeated ones are all allowed. The innermost samples, which share the disc that is left,
    give up g h^2 / 24 per ray (h: distance of samples): the integral of |r| f(r) by equal steps errs by that much of
    f(0), which the area alone would turn into an offset of the whole image (Euler and Maclaurin's next term). 3D:
    directions are taken as even over the sphere, and a shell r^2 (b - a) is shared by the samples on it; r^2 is smooth,
    so nothing is owed and the centre weighs nothing.

    Args:
        trajectory: radial (2D) or kooshball (3D); see recon3d.geometry.mri.

    Returns:
        [M] float32, in the order of trajectory.points.

    Raises:
        ValueError: the samples do not lie on spokes through the centre.

    >>> from recon3d.geometry.mri import radial
    >>> t = radial(64, 32, (32, 32))
    >>> round(ramp(t).double().sum().item()), round(32**2 * torch.pi / 4)  # the disc's area
    (805, 804)
    """
    points = trajectory.points.numpy()
    radius = np.sqrt((points**2).sum(1))
    centre = radius < _SAME_RADIUS
    weight = np.zeros(len(points))
    if not centre.all():
        if trajectory.ndim == 2:
            nyquist = 2 * math.pi / max(trajectory.shape)
            inner = _plane(points[~centre], radius[~centre], bool(centre.any()), weight, ~centre, nyquist)
        elif trajectory.ndim == 3:
            _ball(points[~centre], radius[~centre], bool(centre.any()), weight, ~centre)
            inner = 0.0
        else:
            raise ValueError(f"ramp: two or three axes needed, the trajectory has {trajectory.ndim}")
        weight[centre] = inner / max(1, int(centre.sum()))
        weight *= math.prod(trajectory.shape) / (2 * math.pi) ** trajectory.ndim
    else:
        weight[:] = 1 / len(points)
    return torch.from_numpy(weight.astype(np.float32))


def _plane(
    points: Points, radius: Points, has_centre: bool, weight: Points, where: NDArray[np.bool_], nyquist: float
) -> float:
    """Fills the weights of samples off the centre; returns the area left to the centre."""
    angle = np.mod(np.arctan2(points[:, 0], points[:, 1]), 2 * math.pi)
    # directions from far samples, where coordinates that were rounded to float32 tell them best
    far = np.sort(angle[radius > 0.25 * radius.max()])
    rays = far[np.append(True, np.diff(far) > _SAME_ANGLE)]
    if len(rays) > 1 and rays[0] + 2 * math.pi - far[-1] <= _SAME_ANGLE:
        rays = rays[1:]  # the first and the last are one, seen from either side of zero
    right = np.searchsorted(rays, angle) % len(rays)
    apart = [np.abs(np.mod(angle - rays[i] + math.pi, 2 * math.pi) - math.pi) for i in (right - 1, right)]
    ray = np.where(apart[0] < apart[1], (right - 1) % len(rays), right)
    beside = float((np.minimum(*apart) * radius).max()) / nyquist
    if beside > _BESIDE or len(rays) * 4 > len(points):
        raise ValueError(
            "ramp: the samples do not lie on spokes through the centre, four and more on each; "
            "use pipe_menon for this trajectory"
        )
    gap = (np.roll(rays, -1) - np.roll(rays, 1)) / 2
    gap = np.mod(gap, math.pi) if len(rays) > 2 else np.full(len(rays), 2 * math.pi / len(rays))
    cells, of = _cells(ray, radius, has_centre)
    area = (cells.high**2 - cells.low**2) / 2
    owed = np.where(cells.first, cells.step**2 / 24, 0.0)
    if not has_centre:
        area -= owed
    weight[where] = gap[ray] * (area / cells.size)[of]
    return float((gap[cells.ray] * (cells.low**2 / 2 - owed))[cells.first].sum())


def _ball(points: Points, radius: Points, has_centre: bool, weight: Points, where: NDArray[np.bool_]) -> None:
    cells, of = _cells(np.zeros(len(radius), dtype=np.int64), radius, has_centre)
    if len(cells.low) * 4 > len(radius):
        raise ValueError("ramp: the samples do not share radii, as spokes of one kind do; use pipe_menon")
    rim = radius > 0.9 * radius.max()
    direction = points[rim] / radius[rim, None]
    if np.abs(direction.T @ direction / len(direction) - np.eye(3) / 3).max() > _UNEVEN:
        raise ValueError("ramp: the spokes are not spread evenly over the sphere; use pipe_menon for this trajectory")
    width = np.where(cells.first, 2 * (cells.high - cells.middle), cells.high - cells.low)
    weight[where] = (4 * math.pi * cells.middle**2 * width / cells.size)[of]


class _Cells(NamedTuple):
    ray: NDArray[np.int64]
    middle: Points  # radius of the samples
    low: Points
    high: Points
    size: NDArray[np.int64]  # samples in the cell
    first: NDArray[np.bool_]  # innermost of its ray
    step: Points  # to the next sample inwards (at the innermost, outwards unless the centre was measured)


def _cells(ray: NDArray[np.int64], radius: Points, has_centre: bool) -> tuple[_Cells, NDArray[np.int64]]:
    """Cells of the samples, one for those of the same ray and radius, and the cell of every sample."""
    order = np.lexsort((radius, ray))
    r, line = radius[order], ray[order]
    new = np.append(True, (np.diff(r) > _SAME_RADIUS) | (np.diff(line) != 0))
    group = np.empty(len(r), dtype=np.int64)
    group[order] = np.cumsum(new) - 1
    r, line = r[new], line[new]
    first = np.append(True, np.diff(line) != 0)
    last = np.append(first[1:], True)
    before, after = np.where(first, 0.0, np.roll(r, 1)), np.roll(r, -1)
    low = np.where(first, r / 2 if has_centre else 0.0, (before + r) / 2)
    high = np.where(last, r + (r - before) / 2, (r + after) / 2)
    step = np.where(first & ~last & (not has_centre), after - r, r - before)
    return _Cells(line, r, low, high, np.bincount(group), first, step), group

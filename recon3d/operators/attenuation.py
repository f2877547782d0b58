"""Attenuation in PET: factors of every bin from a map of the linear attenuation coefficient at 511 keV.

Both photons of a pair have to leave the body, so that the factor of a line does not depend on where on it the pair
arose: exp(-integral of mu along the line).
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from recon3d import ops
from recon3d.geometry import PETGeometry, VolumeGrid

__all__ = ["attenuation_factors", "mu_from_hu", "resample_volume"]

# tube voltage -> slope and offset of mu in 1/cm over HU + 1000 above the break point, and the break point in HU:
# Carney, Townsend, Rappoport and Bendriem, Med Phys 33 (2006) 976, table I
_ABOVE = {
    80: (3.64e-5, 6.26e-2, 50.0),
    100: (4.43e-5, 5.44e-2, 52.0),
    110: (4.92e-5, 4.88e-2, 43.0),
    120: (5.10e-5, 4.71e-2, 47.0),
    130: (5.51e-5, 4.24e-2, 37.0),
    140: (5.64e-5, 4.08e-2, 30.0),
}
_WATER = 9.6e-5  # 1/cm per HU + 1000 below the break point
# an edge of the map with more than this holds something, air has 1e-5 / mm
_AIR = 1e-3


def mu_from_hu(hu: Tensor, kvp: int = 120) -> Tensor:
    """Attenuation at 511 keV in 1/mm from CT numbers: one line for air to water, one for water to bone.

    Below the break point (47 HU at 120 kV) mu = 9.6e-5 (HU + 1000) / cm; above it the line of Carney et al. (2006) for
    the tube voltage, because bone owes more of its CT number to the photoelectric effect. Contrast agent and metal
    come out too high.

    Args:
        hu: CT numbers, any shape.
        kvp: tube voltage: 80, 100, 110, 120, 130 or 140.

    Raises:
        ValueError: another tube voltage.

    >>> [round(v, 5) for v in mu_from_hu(torch.tensor([-1000.0, 0.0, 1000.0])).tolist()]
    [0.0, 0.0096, 0.01491]
    """
    if kvp not in _ABOVE:
        raise ValueError(f"mu_from_hu: kvp must be one of {', '.join(map(str, _ABOVE))}, got {kvp}")
    slope, offset, corner = _ABOVE[kvp]
    above_air = (hu + 1000.0).clamp_min(0.0)
    return torch.where(hu > corner, slope * above_air + offset, _WATER * above_air) / 10


def attenuation_factors(
    mu_per_mm: Tensor, grid: VolumeGrid, geometry: PETGeometry, *, onto: VolumeGrid | None = None
) -> Tensor:
    """exp(-line integral of mu) for every bin, [view, radial, plane]; without time of flight, it is the same for all.

    Args:
        mu_per_mm: [z, y, x] attenuation at 511 keV in 1/mm.
        grid: its grid. Without `onto` it is taken to be centred on the scanner, as the volumes of a PET operator are.
        geometry: the bins.
        onto: the grid of the activity; the map is then brought there through both affines first, see resample_volume.

    Raises:
        ValueError: negative or unbelievably large attenuation, a map that does not fit its grid, or one that ends
            inside the object.
    """
    if tuple(mu_per_mm.shape) != grid.shape:
        raise ValueError(f"attenuation_factors: the map is {tuple(mu_per_mm.shape)}, its grid says {grid.shape}")
    low, high = float(mu_per_mm.amin()), float(mu_per_mm.amax())
    if not (low >= 0 and high < 1):
        raise ValueError(
            f"attenuation_factors: mu runs from {low:.4g} to {high:.4g}; it must lie in 0..1 per mm (water 0.0096), so "
            "convert CT numbers with mu_from_hu, and 1/cm by dividing by 10"
        )
    if high > 0.05:
        raise ValueError(
            f"attenuation_factors: mu reaches {high:.4g} per mm, water has 0.0096 and bone 0.017; this looks like "
            "1/cm, so divide by 10"
        )
    if onto is not None:
        mu_per_mm, grid = resample_volume(mu_per_mm, grid, onto, empty_below=_AIR), onto
    lines, segments = torch.from_numpy(geometry.lines()), torch.from_numpy(geometry.segments)
    mu = mu_per_mm if mu_per_mm.is_floating_point() else mu_per_mm.float()
    integral = ops.joseph3d_sinogram(mu, lines, segments, grid.spacing_mm)
    return integral.neg_().exp_().reshape(geometry.shape[0], geometry.n_radial, geometry.n_planes)


def resample_volume(volume: Tensor, grid: VolumeGrid, onto: VolumeGrid, *, empty_below: float | None = None) -> Tensor:
    """A volume on another grid: trilinear at the places that both affines give, zero outside.

    Fine voxels are not averaged: smooth a map first that is much finer than the grid it goes to.

    Args:
        volume: [z, y, x].
        grid: its grid.
        onto: the grid wanted.
        empty_below: refuse a volume that ends inside the wanted grid unless its outermost voxels on that side are at
            most this; None = take zero for what is missing.

    Raises:
        ValueError: the volume does not fit its grid, or it ends where it is not empty.
    """
    if tuple(volume.shape) != grid.shape:
        raise ValueError(f"resample_volume: the volume is {tuple(volume.shape)}, its grid says {grid.shape}")
    turn = np.linalg.inv(grid.matrix()) @ onto.matrix()  # wanted (x, y, z) index -> given index
    if empty_below is not None:
        _check_cover(volume, grid, onto, turn, empty_below)
    source = volume if volume.is_floating_point() else volume.float()
    nz, ny, nx = onto.shape
    i, j = (torch.arange(n, dtype=torch.float64) for n in (nx, ny))
    out = source.new_empty(onto.shape)
    for k in range(nz):  # a slice at a time keeps the temporaries small
        place = [turn[a, 0] * i[None, :] + turn[a, 1] * j[:, None] + (turn[a, 2] * k + turn[a, 3]) for a in (2, 1, 0)]
        out[k] = _trilinear(source, place)
    return out


def _trilinear(volume: Tensor, place: list[Tensor]) -> Tensor:
    """Values at fractional (z, y, x) indices; zero beyond the outermost voxels' edges."""
    total = torch.zeros(place[0].shape, dtype=torch.float64)
    low = [p.floor() for p in place]
    for corner in range(8):
        weight = torch.ones_like(total)
        index = []
        for axis, (p, base) in enumerate(zip(place, low, strict=True)):
            up = corner >> axis & 1
            weight = weight * ((p - base) if up else (1 - (p - base)))
            index.append((base + up).clamp(0, volume.shape[axis] - 1).long())  # the last value reaches its voxel's edge
        total += weight * volume[index[0], index[1], index[2]].double()
    inside = torch.ones_like(total, dtype=torch.bool)
    for p, n in zip(place, volume.shape, strict=True):
        inside &= (p >= -0.5 - 1e-6) & (p <= n - 0.5 + 1e-6)
    return torch.where(inside, total, 0.0).to(volume.dtype)


def _check_cover(volume: Tensor, grid: VolumeGrid, onto: VolumeGrid, turn: np.ndarray, empty_below: float) -> None:
    nz, ny, nx = onto.shape
    corners = np.array([[x, y, z, 1] for x in (0, nx - 1) for y in (0, ny - 1) for z in (0, nz - 1)], dtype=float)
    reach = (turn @ corners.T)[:3][::-1]  # (z, y, x) indices in the given volume
    for axis, name in enumerate("zyx"):
        n, ends = grid.shape[axis], reach[axis]
        for missing, side in ((-0.5 - ends.min(), 0), (ends.max() - (n - 0.5), n - 1)):
            if missing <= 0.5:
                continue
            most = float(volume.select(axis, side).amax())
            if most > empty_below:
                raise ValueError(
                    f"resample_volume: the map ends {missing * grid.spacing_mm[axis]:.1f} mm inside the wanted grid "
                    f"along {name} although it is not empty there (up to {most:.4g}); give a map that covers the "
                    "object, or pad it yourself"
                )

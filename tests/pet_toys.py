"""Small PET scans that several test files use."""

from __future__ import annotations

import torch
from torch import Tensor

from recon3d.geometry import PETScanner, VolumeGrid


def ring_scanner(**change) -> PETScanner:
    """Eight rings of 64 crystals, 200 mm across."""
    good = dict(
        name="toy",
        rings=8,
        ring_spacing_mm=6.0,
        crystals=64,
        radius_mm=100.0,
        block_crystals=8,
        block_rings=4,
        n_radial=44,
    )
    return PETScanner(**{**good, **change})


def cylinder(grid: VolumeGrid, radius_mm: float, value: float = 1.0, length_mm: float | None = None) -> Tensor:
    """[z, y, x] a cylinder along the axis, edges averaged over 5 x 5 points of a pixel."""
    nz, ny, nx = grid.shape
    dz, dy, dx = grid.spacing_mm
    fine = (torch.arange(5, dtype=torch.float64) - 2) / 5
    y = ((torch.arange(ny)[:, None] + fine).flatten() - (ny - 1) / 2) * dy
    x = ((torch.arange(nx)[:, None] + fine).flatten() - (nx - 1) / 2) * dx
    inside = (y[:, None] ** 2 + x**2 <= radius_mm**2).double()
    disc = inside.reshape(ny, 5, nx, 5).mean((1, 3)).float() * value
    volume = disc.expand(nz, ny, nx).clone()
    if length_mm is not None:
        z = (torch.arange(nz) - (nz - 1) / 2) * dz
        volume *= (z.abs() <= length_mm / 2)[:, None, None]
    return volume


def em_step(x: Tensor, y: Tensor, operator, sensitivity: Tensor) -> Tensor:
    """One update of the expectation maximisation, as every text book has it."""
    expected = operator.expected(x)
    ratio = torch.where(expected > 0, y / expected.clamp_min(1e-30), 0.0)
    return torch.where(sensitivity > 0, x * operator.adjoint(ratio) / sensitivity.clamp_min(1e-30), 0.0)

"""Measurements made from a known volume, without the inverse crime."""

from __future__ import annotations

import warnings
from dataclasses import replace

import torch
from torch import Tensor

from recon3d.geometry import GeometryWarning, ScanGeometry, VolumeGrid
from recon3d.operators.ct import CTOperator
from recon3d.operators.noise import NoiseModel


def simulate_ct(
    volume: Tensor,
    grid: VolumeGrid,
    geometry: ScanGeometry,
    noise: NoiseModel | None = None,
    seed: int = 0,
    oversample: int = 2,
) -> Tensor:
    """Sinogram of a volume, projected on finer pixels and a finer detector than any reconstruction will use.

    Pixels are split into oversample² equal ones and every detector cell averages the transmitted intensity of
    oversample rays, so the simulated scan has the blur a real cell has and differs from the operator of the
    reconstruction.

    Args:
        volume: [z, y, x] attenuation in 1/mm.
        grid: its grid.
        geometry: the scan.
        noise: a noise model, or None for noise-free line integrals.
        seed: of the noise.
        oversample: rays per cell and sub-pixels per pixel side; 1 uses the reconstruction's own operator.

    Returns:
        [z, view, u] line integrals, float32.

    Raises:
        ValueError: shapes disagree, or oversample < 1.
    """
    if tuple(volume.shape) != grid.shape:
        raise ValueError(f"simulate_ct: the volume is {tuple(volume.shape)}, its grid says {grid.shape}")
    if oversample < 1:
        raise ValueError(f"simulate_ct: oversample needs at least 1, got {oversample}")
    n = oversample
    nz, ny, nx = grid.shape
    dz, dy, dx = grid.spacing_mm
    fine_grid = VolumeGrid((1, ny * n, nx * n), (dz, dy / n, dx / n))
    fine = replace(
        geometry,
        n_detector=geometry.n_detector * n,
        detector_spacing_mm=geometry.detector_spacing_mm / n,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", GeometryWarning)  # the caller's own operator tells
        operator = CTOperator(fine, fine_grid)
    rows = []
    for first in range(0, nz, 16):  # a slab at a time: the fine volume is oversample² as large
        slab = volume[first : first + 16].float()
        slab = slab.repeat_interleave(n, -2).repeat_interleave(n, -1)
        lines = operator(slab)
        if n > 1:
            cells = lines.reshape(*lines.shape[:-1], geometry.n_detector, n)
            lines = -torch.log(torch.exp(-cells.double()).mean(-1)).float()
        rows.append(lines)
    clean = torch.cat(rows)
    return clean if noise is None else noise.simulate(clean, seed)

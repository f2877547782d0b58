"""What `recon3d simulate` makes of a volume: a sinogram, or the k-space of several coils."""

from __future__ import annotations

import math
from pathlib import Path

from torch import Tensor

from recon3d.config import ConfigError
from recon3d.geometry import FanBeam, ParallelBeam, VolumeGrid, equiangular


def slab(x: Tensor, grid: VolumeGrid, rows: str | None) -> tuple[Tensor, VolumeGrid]:
    """Slices first:end of a volume.

    Raises:
        ConfigError: they are not within it.
    """
    if rows is None:
        return x, grid
    first, colon, end = rows.partition(":")
    if not (colon and first.isdigit() and end.isdigit() and int(first) < int(end) <= grid.shape[0]):
        raise ConfigError(f"--rows {rows}: expected first:end within 0:{grid.shape[0]}")
    return x[int(first) : int(end)], grid.slab(int(first), int(end))


def sinogram(
    volume: Path,
    output: Path,
    views: int,
    photons: float | None,
    detector: int | None,
    detector_spacing_mm: float | None,
    range_deg: float | None,
    source_to_axis_mm: float | None,
    source_to_detector_mm: float | None,
    rows: str | None,
    seed: int,
    mu_water_per_mm: float,
) -> str:
    """Write a sinogram; gives one line about it."""
    from recon3d.io import Measurement, read_nifti, write_measurement
    from recon3d.operators.noise import PoissonNoise
    from recon3d.operators.simulate import simulate_ct

    x, grid = slab(*read_nifti(volume, "hu", mu_water_per_mm), rows)
    fan = source_to_axis_mm is not None
    sod = source_to_axis_mm or 1.0
    sdd = source_to_detector_mm or 2 * sod
    pitch = detector_spacing_mm or min(grid.pixel_mm) * (sdd / sod if fan else 1.0)
    radius = math.hypot(grid.shape[1] * grid.spacing_mm[1], grid.shape[2] * grid.spacing_mm[2]) / 2
    if fan and radius >= sod:
        raise ConfigError(
            f"--source-to-axis-mm {sod:g}: the source must lie outside the volume, at least {radius:.0f} mm"
        )
    reach = sdd * math.tan(math.asin(radius / sod)) if fan else radius
    cells = detector or 2 * math.ceil(reach / pitch) + 1
    angles = equiangular(views, math.radians(range_deg or (360.0 if fan else 180.0)))
    geometry = FanBeam(angles, cells, pitch, 0.0, sod, sdd) if fan else ParallelBeam(angles, cells, pitch)
    noise = None if photons is None else PoissonNoise(photons)
    y = simulate_ct(x, grid, geometry, noise, seed)
    write_measurement(output, Measurement(y, geometry, grid, photons, "recon3d"))
    return f"{output}: {y.shape[0]} slices, {views} views, {cells} cells of {pitch:.4g} mm"


def kspace(
    volume: Path,
    output: Path,
    coils: int,
    acceleration: float,
    centre_fraction: float,
    noise: float,
    rows: str | None,
    seed: int,
) -> str:
    """Write Cartesian k-space with smooth coil maps and a smooth phase; gives one line about it."""
    import torch

    from recon3d.engine.scan_mri import percentile
    from recon3d.io import KSpace, read_nifti, write_kspace_hdf5
    from recon3d.operators.masks import equispaced
    from recon3d.operators.mri import CartesianMRI
    from recon3d.operators.noise import GaussianNoise
    from recon3d.operators.simulate_mri import simulate_mri
    from recon3d.testing.phantoms import coil_maps, smooth_phase

    x, grid = slab(*read_nifti(volume), rows)
    columns = grid.shape[2]
    mask = equispaced(columns, acceleration, centre_fraction, seed) if acceleration > 1 else torch.ones(columns)
    operator = CartesianMRI(mask, coil_maps(coils, grid.shape))
    sigma = noise * percentile(x)
    level = GaussianNoise(sigma) if sigma > 0 else None
    y = simulate_mri(x.clamp_min(0), operator, smooth_phase(grid.shape, seed), level, seed)
    covariance = 2 * sigma**2 * torch.eye(coils, dtype=torch.complex64) if level else None
    sampled = mask.expand(grid.slice_shape).contiguous()
    write_kspace_hdf5(output, KSpace(y, sampled, None, grid, None, covariance, "recon3d"))
    return f"{output}: {y.shape[0]} slices, {coils} coils, {int(mask.sum())} of {columns} columns"

"""What `recon3d simulate` makes of a volume: a sinogram, the k-space of several coils, or the counts of a PET scan."""

from __future__ import annotations

import math
from dataclasses import replace
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


def counts(
    volume: Path,
    output: Path,
    scanner: str,
    rows: str | None = None,
    seed: int = 0,
    counts: float = 1e7,
    mu: Path | None = None,
    span: int = 1,
    max_ring_difference: int | None = None,
    mashing: int = 1,
    tof: bool = False,
    scatter_fraction: float = 0.2,
    randoms_fraction: float = 0.2,
    psf_fwhm_mm: float = 4.5,
) -> str:
    """Write a folder with prompts, factors, additive terms and the attenuation map; gives one line about it.

    The volume's middle is put on the scanner's, its slices on the scanner's planes.
    """
    import torch

    from recon3d.geometry import pet_geometry
    from recon3d.io import PETData, PETInfo, read_mu_map, read_nifti, write_pet_folder
    from recon3d.operators.attenuation import resample_volume
    from recon3d.operators.simulate_pet import simulate_pet

    activity, grid = slab(*read_nifti(volume), rows)
    activity = activity.clamp_min(0)
    lost, own = None, None
    if mu is not None:
        lost, own, _ = read_mu_map(mu)
    try:
        geometry = pet_geometry(scanner, span=span, max_ring_difference=max_ring_difference, mashing=mashing, tof=tof)
        dz = geometry.scanner.ring_spacing_mm / 2
        # all of the scanner's slices, so that the map says what lies beside the volume: nothing
        place = _centred(VolumeGrid((2 * geometry.scanner.rings - 1, *grid.slice_shape), (dz, *grid.pixel_mm)), grid)
        activity = resample_volume(activity, grid, place)
        lost = None if lost is None or own is None else resample_volume(lost, own, place)
        made = simulate_pet(
            activity, place, geometry, mu_per_mm=lost, counts=counts, scatter_fraction=scatter_fraction,
            randoms_fraction=randoms_fraction, psf_fwhm_mm=psf_fwhm_mm or None, seed=seed,
        )  # fmt: skip
    except ValueError as error:
        raise ConfigError(str(error)) from None
    factors = made.factors if geometry.tof is None else made.factors.unsqueeze(2).expand(geometry.shape).contiguous()
    info = PETInfo(scale=made.scale, calibrated=True)
    map_ = None if lost is None else (torch.as_tensor(lost), VolumeGrid(place.shape, place.spacing_mm))
    write_pet_folder(output, PETData(made.prompts, geometry, factors, made.additive, mu=map_, info=info))
    return f"{output}: {made.prompts.sum():.4g} prompts in {' x '.join(map(str, geometry.shape))} bins of {scanner}"


def _centred(grid: VolumeGrid, like: VolumeGrid) -> VolumeGrid:
    """A grid with the axes and the middle of another one."""
    matrix = like.matrix()
    middle = matrix @ [*((n - 1) / 2 for n in like.shape[::-1]), 1.0]
    for k, (new, old) in enumerate(zip(grid.spacing_mm[::-1], like.spacing_mm[::-1], strict=True)):
        matrix[:3, k] *= new / old
    matrix[:3, 3] = middle[:3] - matrix[:3, :3] @ [(n - 1) / 2 for n in grid.shape[::-1]]
    return replace(grid, affine=tuple(tuple(float(v) for v in row) for row in matrix))

"""The demonstration: jobs from start to end beside their classical rivals; see demo_mri.py and demo_pet.py for those.

The chest is a real scan that ships with the package and that no packaged prior was trained on; its sparse, noisy
sinogram is simulated on a finer grid than any reconstruction uses. Files of measured projections are cut to a few of
their views; the filtered back projection of all views is the reference. FBP here means the Hann window, its better one.
"""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from recon3d import baselines, demo_mri, demo_pet
from recon3d.api import reconstruct
from recon3d.engine.events import Listener
from recon3d.engine.scan import modality_of
from recon3d.geometry import FanBeam, GeometryWarning, ParallelBeam, ScanGeometry, VolumeGrid, equiangular
from recon3d.io import demo_volume_path, read_nifti, read_projections, write_nifti
from recon3d.io.atomic import atomic_write
from recon3d.metrics import compare
from recon3d.operators import CTOperator, NoiseModel, PoissonNoise, estimate_noise, simulate_ct
from recon3d.ops import fbp
from recon3d.priors import load_prior
from recon3d.priors.base import Prior
from recon3d.report import markdown, metrics_table, preview

__all__ = ["DemoJob", "chest", "default_measured", "measured", "run", "run_one"]

Say = Callable[[str], None]

# what two public files do not say about themselves (see docs/results.md for their sources)
_KNOWN: dict[str, dict[str, Any]] = {
    "tooth_parallel_aps.h5": {"detector_spacing_mm": 0.01, "rotation_centre": "estimate"},
    "htc2022_ta_fan_full360.h5": {
        "type": "fan",
        "angle_sign": -1,
        "detector_spacing_mm": 0.2,
        "source_to_axis_mm": 410.66,
        "source_to_detector_mm": 553.74,
    },
}


@dataclass(frozen=True)
class DemoJob:
    """One demonstration.

    Attributes:
        name: of its folder.
        title: over its picture.
        y: sinogram [slice, view, u].
        geometry: the scan.
        grid: the volume.
        reference: [z, y, x] in 1/mm, what the figures are taken against.
        reference_name: what it is.
        noise: of y; None weighs all rays the same.
        prior: denoiser of slices.
        recipe: packaged recipe.
        unit: of the picture and the figures.
        accept_mismatch: the object is not of the kind the prior was trained on.
    """

    name: str
    title: str
    y: Tensor
    geometry: ScanGeometry
    grid: VolumeGrid
    reference: Tensor
    reference_name: str
    prior: Prior
    noise: NoiseModel | None = None
    recipe: str = "ct"
    unit: str = "hu"
    accept_mismatch: bool = False


def run(output: Path, files: list[Path], say: Say, listener: Listener, quick: bool = False) -> dict[str, Any]:
    """Run chest, brain, body and one job per measured file; one folder each below `output`, and a summary beside them.

    Args:
        output: folder of all jobs.
        files: files of measured projections or k-space, any format `read_measurement` reads.
        say: called with a line or a table for the user.
        listener: called with the events of the reconstructions.
        quick: a slab of the chest, one acceleration of the brain, coarse pixels of the body.

    Returns:
        The figures by job and method, as written to summary.json.
    """
    started = time.perf_counter()
    output.mkdir(parents=True, exist_ok=True)
    makers: list[Callable[[], DemoJob | demo_mri.KSpaceJob | demo_pet.CountsJob]] = [
        lambda: chest(slices=8 if quick else None)
    ]
    makers += [lambda a=a: demo_mri.brain(a) for a in ((4,) if quick else (4, 8))]  # type: ignore[misc]
    makers += [lambda: demo_pet.body(pixels=48 if quick else 64)]
    makers += [lambda path=path: measured(path) for path in files]  # type: ignore[misc]
    summary: dict[str, Any] = {}
    for make in makers:
        job, before = make(), time.perf_counter()
        say(f"{job.name}: {job.title}")
        if isinstance(job, DemoJob):
            summary[job.name] = run_one(job, output / job.name, say, listener)
        elif isinstance(job, demo_pet.CountsJob):
            summary[job.name] = demo_pet.run_one(job, output / job.name, say, listener)
        else:
            summary[job.name] = demo_mri.run_one(job, output / job.name, say, listener)
        say(f"  {job.name}: {time.perf_counter() - before:.0f} s")
    _write_json(output / "summary.json", summary)
    say(f"all jobs: {time.perf_counter() - started:.0f} s; pictures and volumes are in {output}")
    return summary


def chest(views: int = 40, photons: float = 5e4, seed: int = 0, slices: int | None = None) -> DemoJob:
    """The packaged chest CT, seen from a few views with photon noise.

    Args:
        views: number of parallel-beam views over 180 degrees.
        photons: counts of a ray that meets nothing.
        seed: of the noise.
        slices: a central slab of so many; None takes all.
    """
    volume, grid = read_nifti(demo_volume_path(), unit="hu")
    if slices is not None:
        first = (grid.shape[0] - slices) // 2
        volume, grid = volume[first : first + slices].contiguous(), grid.slab(first, first + slices)
    dy, dx = grid.pixel_mm
    diagonal = float(np.hypot(grid.shape[1] * dy, grid.shape[2] * dx))
    geometry = ParallelBeam(equiangular(views), int(np.ceil(diagonal / dx / 2) * 2) + 2, dx)
    noise = PoissonNoise(photons)
    y = simulate_ct(volume, grid, geometry, noise, seed)
    return DemoJob(
        name="chest",
        title=f"{grid.shape[0]} slices of a real chest CT from {views} simulated views, {photons:g} photons per ray",
        y=y,
        geometry=geometry,
        grid=grid,
        reference=volume,
        reference_name="the scan",
        prior=load_prior("ct"),
        noise=noise,
    )


def measured(path: Path) -> DemoJob | demo_mri.KSpaceJob:
    """A file of measurements, cut to a part: projections to a sixth (parallel beam) or a twelfth (fan beam) of their
    views, trajectories to a sixth of their spokes, Cartesian k-space to a quarter of its columns."""
    modality = modality_of(path)
    if modality == "mri":
        return demo_mri.measured(path)
    if modality == "pet":
        raise ValueError(f"{path}: no part of measured counts is a reference; reconstruct them with recon3d recon")
    full = read_projections(path, **_KNOWN.get(path.name, {}))
    fan = isinstance(full.geometry, FanBeam)
    step = 12 if fan else 6
    n = full.geometry.n_views
    kept = np.arange(n // step) * step
    few = full.views(kept)
    grid = full.default_grid()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", GeometryWarning)
        reference = fbp(full.sinogram, full.geometry, grid.slice_shape, grid.pixel_mm, window="hann")
    prior = load_prior("ct")
    # an object that is no patient has no Hounsfield units: its own typical attenuation takes the place of water's
    prior.offset = prior.scale = typical_attenuation(CTOperator(few.geometry, grid).pinv(few.sinogram))
    return DemoJob(
        name=path.stem,
        title=f"{grid.shape[0]} measured slice(s), {len(kept)} of {n} views",
        y=few.sinogram,
        geometry=few.geometry,
        grid=grid,
        reference=reference,
        reference_name=f"the filtered back projection of all {n} views",
        prior=prior,
        noise=PoissonNoise(few.photons) if few.photons else estimate_noise(few.sinogram),
        recipe="ct",
        unit="per_mm",
        accept_mismatch=True,
    )


def run_one(job: DemoJob, folder: Path, say: Say, listener: Listener) -> dict[str, Any]:
    """Reconstruct one job and its baselines; figures by method.

    The strength of total variation is chosen against the reference, which no user has: the rival at its best.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", GeometryWarning)
        operator = CTOperator(job.geometry, job.grid)
        weights = None if job.noise is None else job.noise.weights(job.y)
        volumes: dict[str, Tensor] = {}
        seconds: dict[str, float] = {}

        def timed(name: str, make: Callable[[], Tensor]) -> None:
            start = time.perf_counter()
            volumes[name] = make()
            seconds[name] = time.perf_counter() - start

        timed("FBP", lambda: fbp(job.y, job.geometry, job.grid.slice_shape, job.grid.pixel_mm, window="hann"))
        timed("SIRT", lambda: baselines.sirt(job.y, operator, iterations=100, weights=weights))
        strength = _tuned_strength(job, weights)
        say(f"  total variation: strength {strength:.2e} is the best against {job.reference_name}")
        timed("3D TV, tuned", lambda: baselines.tv3d(job.y, operator, strength, weights=weights))
        result = reconstruct(
            job.y,
            job.geometry,
            job.grid,
            recipe=job.recipe,
            prior=job.prior,
            noise=job.noise,
            folder=folder,
            force=True,
            accept_mismatch=job.accept_mismatch,
            listeners=(listener,),
        )
    name = f"recon3d {job.recipe}"
    volumes[name] = result.volume
    seconds[name] = result.timings.total
    inside = field_of_view(job.geometry, job.grid) if job.unit != "hu" else None
    # an object that is no patient is measured in its own attenuation, over the range its reference spans
    span = float(job.reference.max() - job.reference.min())
    unit: dict[str, Any] = {"unit": "per_mm"} if job.unit == "hu" else {"unit": "au", "data_range": span}
    figures = {
        method: {**compare(volume, job.reference, job.grid, mask=inside, **unit), "seconds": round(seconds[method], 2)}
        for method, volume in volumes.items()
    }
    preview(
        folder / "preview.png",
        volumes,
        job.grid,
        reference=job.reference,
        metrics=figures,
        unit="hu" if job.unit == "hu" else "per_mm",
        title=job.title,
    )
    write_nifti(folder / "reference.nii.gz", job.reference, job.grid, unit="hu" if job.unit == "hu" else "per_mm")
    table = {
        "reference": job.reference_name,
        "methods": figures,
        "timings": result.timings.as_dict(),
        "data": result.metrics,
    }
    _write_json(folder / "metrics.json", table)
    say(markdown(*metrics_table(figures)))
    say(
        f"  outside the network: {100 * result.timings.outside_network:.0f} % of {result.timings.total:.0f} s; "
        f"picture: {folder / 'preview.png'}"
    )
    return table


def _tuned_strength(job: DemoJob, weights: Tensor | None, slices: int = 8) -> float:
    # a slab in the middle is enough to choose one number, and leaves the time to the methods themselves
    depth = job.grid.shape[0]
    first = max(0, (depth - slices) // 2)
    part = slice(first, min(depth, first + slices))
    grid = job.grid.slab(part.start, part.stop)
    operator, y = CTOperator(job.geometry, grid), job.y[part]
    w = weights if weights is None or weights.shape[0] == 1 else weights[part]
    tuned = baselines.tune(
        lambda strength: baselines.tv3d(y, operator, strength, weights=w, tolerance=3e-4), job.reference[part]
    )
    return tuned.strength


def field_of_view(geometry: ScanGeometry, grid: VolumeGrid) -> Tensor:
    """Voxels that every view sees, [z, y, x] bool: outside them no reconstruction is a reference."""
    low, high = geometry.reach_mm()
    radius = min(-low, high)
    y, x = (
        (torch.arange(n, dtype=torch.float64) - (n - 1) / 2) * d
        for n, d in zip(grid.slice_shape, grid.pixel_mm, strict=True)
    )
    disc = y[:, None] ** 2 + x[None, :] ** 2 < radius**2
    return disc.expand(grid.shape).contiguous()


def typical_attenuation(image: Tensor) -> float:
    """Mean attenuation of the object: of the voxels above half the 99th percentile.

    Raises:
        ValueError: nothing absorbs.
    """
    values = np.asarray(image.detach().cpu(), dtype=np.float64).ravel()
    high = float(np.quantile(values, 0.99))
    if not high > 0:
        raise ValueError("typical_attenuation: the image shows no absorbing object")
    return float(values[values > high / 2].mean())


def default_measured() -> list[Path]:
    """Files of measured projections and k-space at hand: in $RECON3D_DATA, else in ../shared/data beside a checkout."""
    import os

    candidates = [os.environ.get("RECON3D_DATA"), str(Path(__file__).resolve().parents[2] / "shared" / "data")]
    for root in filter(None, candidates):
        found = [Path(root) / "raw_ct" / name for name in _KNOWN]
        found += [Path(root) / "raw_mr" / name for name in demo_mri.KNOWN]
        if any(path.exists() for path in found):
            return [path for path in found if path.exists()]
    return []


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    text = json.dumps(content, indent=1, allow_nan=False)
    with atomic_write(path) as file:
        file.write(text.encode())

"""The MRI half of the demonstration: measured k-space with samples left out, beside what scanners and papers offer.

The packaged brain was sampled whole, so all of its samples give the reference: the coil images joined with their maps.
Noise is made white once, on the whole measurement; maps of the reconstructions come from the samples that are kept.
"""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from recon3d import baselines
from recon3d.api import reconstruct_mri
from recon3d.config import UndersampleConfig
from recon3d.engine.events import Listener
from recon3d.engine.scan_mri import MRIScan, prepare, undersampled
from recon3d.geometry import GeometryWarning
from recon3d.io import demo_kspace_path, read_kspace, write_nifti
from recon3d.io.atomic import atomic_write
from recon3d.metrics import compare
from recon3d.priors import load_prior
from recon3d.priors.base import Prior
from recon3d.report import markdown, metrics_table, preview

__all__ = ["KNOWN", "KSpaceJob", "brain", "measured", "run_one"]

Say = Callable[[str], None]

# what a public file does not say about itself (see docs/results.md for its source)
KNOWN: dict[str, dict[str, Any]] = {"brain_radial_vfa_5ch.h5": {"merge_frames": True, "trajectory_unit": "cycles"}}


@dataclass(frozen=True)
class KSpaceJob:
    """One demonstration.

    Attributes:
        name: of its folder.
        title: over its picture.
        scan: the samples that are kept, with the maps made from them.
        reference: [z, y, x] magnitude, what the figures are taken against.
        reference_name: what it is.
        prior: denoiser of slices.
        recipe: packaged recipe.
    """

    name: str
    title: str
    scan: MRIScan
    reference: Tensor
    reference_name: str
    prior: Prior
    recipe: str = "mri"


def _object(magnitude: Tensor) -> Tensor:
    """Voxels of [z, y, x] with signal on all four sides in their slice."""
    mean = torch.nn.functional.avg_pool2d(magnitude[:, None], 5, 1, 2)[:, 0]
    level = [0.1 * float(np.percentile(image.numpy(), 99)) for image in magnitude]
    bright = (mean > torch.tensor(level)[:, None, None]).int()
    out = torch.ones_like(bright)
    for axis in (1, 2):
        out &= bright.cummax(axis).values & bright.flip(axis).cummax(axis).values.flip(axis)
    return out.bool()


def brain(acceleration: float = 4, seed: int = 0, path: Path | None = None) -> KSpaceJob:
    """Measured Cartesian k-space of a brain, 13 coils, with columns left out.

    Args:
        acceleration: all columns over those kept; an eighth of the kept ones or more lie in the centre.
        seed: of the columns' offset.
        path: another file of whole Cartesian k-space; None takes the packaged one.
    """
    kspace = read_kspace(path or demo_kspace_path())
    full = prepare(kspace)
    white = replace(kspace, data=full.y, maps=None)
    fraction = 0.08 if acceleration <= 4 else 0.045
    few = undersampled(white, UndersampleConfig(acceleration=float(acceleration), centre_fraction=fraction, seed=seed))
    slices, coils, _, columns = few.data.shape
    assert few.mask is not None  # undersampled k-space is Cartesian
    kept = int((few.mask.reshape(-1, columns).sum(0) > 0).sum())
    name = "brain" if path is None else path.stem
    return KSpaceJob(
        name=f"{name}_x{acceleration:g}",
        title=f"{slices} measured slice(s) of {coils} coils, {kept} of {columns} columns of k-space",
        scan=prepare(few, noise=full.noise),  # type: ignore[arg-type]
        reference=full.operator().pinv(full.y).abs(),
        reference_name="all columns",
        prior=load_prior("mr"),
    )


def measured(path: Path) -> KSpaceJob:
    """A file of measured k-space, cut to a sixth of its spokes, or to a quarter of its columns."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", GeometryWarning)
        kspace = read_kspace(path, **KNOWN.get(path.name, {}))
    if kspace.trajectories is None:
        return brain(4, path=path)
    full = prepare(kspace)
    spokes, samples = kspace.trajectories[0].layout[0], kspace.trajectories[0].n_samples
    kept = torch.arange(samples).reshape(spokes, -1)[::6].flatten()
    few = replace(
        kspace,
        data=full.y[..., kept].contiguous(),
        trajectories=tuple(t.subset(kept) for t in kspace.trajectories),
        maps=None,
    )
    return KSpaceJob(
        name=path.stem,
        title=f"{kspace.grid.shape[0]} measured slice(s), {-(-spokes // 6)} of {spokes} spokes",
        scan=prepare(few, noise=full.noise),  # type: ignore[arg-type]
        reference=baselines.cg_sense(full.y, full.operator()).abs(),
        reference_name=f"CG-SENSE of all {spokes} spokes",
        prior=load_prior("mr"),
    )


def run_one(job: KSpaceJob, folder: Path, say: Say, listener: Listener) -> dict[str, Any]:
    """Reconstruct one job and its baselines; figures of magnitudes by method.

    The strength of compressed sensing is chosen against the reference, which no user has: the rival at its best.
    """
    scan = job.scan
    operator, y = scan.operator(), scan.y
    volumes: dict[str, Tensor] = {}
    seconds: dict[str, float] = {}

    def timed(name: str, make: Callable[[], Tensor]) -> None:
        start = time.perf_counter()
        volumes[name] = make().abs()
        seconds[name] = time.perf_counter() - start

    direct = "zero-filled" if scan.mask is not None else "gridding"
    timed(direct, lambda: baselines.zero_filled(y, operator))
    timed("CG-SENSE", lambda: baselines.cg_sense(y, operator))
    strength = baselines.tune_cs(y, operator, job.reference, tolerance=1e-3).strength
    say(f"  compressed sensing: strength {strength:.2e} is the best against {job.reference_name}")
    timed("TV CS, tuned", lambda: baselines.cs(y, operator, strength))
    sampling = scan.mask if scan.mask is not None else list(scan.trajectories or ())
    result = reconstruct_mri(
        y,
        sampling,
        scan.maps,
        scan.grid,
        recipe=job.recipe,
        prior=job.prior,
        noise=scan.noise,  # type: ignore[arg-type]
        folder=folder,
        force=True,
        accept_mismatch=True,
        listeners=(listener,),
    )
    name = f"recon3d {job.recipe}"
    volumes[name] = result.volume.abs()
    seconds[name] = result.timings.total
    # a measured reference shows noise in the air, which no method should be praised for showing too
    inside = _object(job.reference)
    span = float(job.reference[inside].max())
    figures = {
        method: {
            **compare(volume, job.reference, scan.grid, span, inside, unit="au"),
            "seconds": round(seconds[method], 2),
        }
        for method, volume in volumes.items()
    }
    preview(
        folder / "preview.png",
        volumes,
        scan.grid,
        reference=job.reference,
        metrics=figures,
        unit="au",
        title=job.title,
    )
    write_nifti(folder / "reference.nii.gz", job.reference, scan.grid)
    table = {
        "reference": job.reference_name,
        "methods": figures,
        "timings": result.timings.as_dict(),
        "data": result.metrics,
    }
    text = json.dumps(table, indent=1, allow_nan=False)
    with atomic_write(folder / "metrics.json") as file:
        file.write(text.encode())
    say("  figures inside the object, of magnitudes")
    say(markdown(*metrics_table(figures)))
    say(
        f"  outside the network: {100 * result.timings.outside_network:.0f} % of {result.timings.total:.0f} s; "
        f"picture: {folder / 'preview.png'}"
    )
    return table

"""The PET part of the demonstration: an image-quality body whose activity is known, from simulated prompt counts.

The body has hot and cold spheres of known size and ratio, so that two things can be asked that no picture tells: how
far the activity of a sphere is recovered, and at what noise. Counts come with attenuation, scatter and randoms, from
pixels split finer than any reconstruction's.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from recon3d import baselines
from recon3d.api import reconstruct_pet
from recon3d.engine.events import Listener
from recon3d.geometry import VolumeGrid, pet_geometry
from recon3d.io import write_nifti
from recon3d.io.atomic import atomic_write
from recon3d.metrics import compare
from recon3d.operators.simulate_pet import SimulatedPET, simulate_pet
from recon3d.priors import load_prior
from recon3d.priors.base import Prior
from recon3d.recipes import load_recipe
from recon3d.report import markdown, metrics_table, preview
from recon3d.testing.pet_phantoms import PETPhantom, body_phantom

__all__ = ["CountsJob", "body", "recovery", "run_one"]

Say = Callable[[str], None]

_SUBSETS = 12
# of the simulated scanner, and of the reconstructions' model of it
_RESOLUTION_MM = 4.0
# slices at either end that few lines cross
_ENDS = 4


@dataclass(frozen=True)
class CountsJob:
    """One demonstration.

    Attributes:
        name: of its folder.
        title: over its picture.
        scan: the counts with what a reconstruction needs to know.
        phantom: the truth.
        prior: denoiser of slices.
        recipe: packaged recipe.
    """

    name: str
    title: str
    scan: SimulatedPET
    phantom: PETPhantom
    prior: Prior
    recipe: str = "pet"


def body(counts: float = 2e6, pixels: int = 64, seed: int = 0) -> CountsJob:
    """The body of the IEC, smaller, in a small scanner without time of flight.

    Args:
        counts: expected prompts; 20 % of them random, 20 % of the others scattered.
        pixels: of a side.
        seed: of the noise.
    """
    geometry = pet_geometry("small", span=3, mashing=2)
    grid = geometry.default_grid(n=pixels)
    phantom = body_phantom(grid, shrink=0.6)
    scan = simulate_pet(
        phantom.activity,
        grid,
        geometry,
        mu_per_mm=phantom.mu_per_mm,
        counts=counts,
        psf_fwhm_mm=_RESOLUTION_MM,
        seed=seed,
    )
    return CountsJob(
        name="body_counts",
        title=f"{counts / 1e6:g} million simulated counts of a body with four hot and two cold spheres",
        scan=scan,
        phantom=phantom,
        prior=load_prior("pet"),
    )


def recovery(volume: Tensor, phantom: PETPhantom) -> dict[str, float]:
    """Mean contrast of hot and of cold spheres over the true one, and the spread of the background over its mean.

    Contrast is sphere over background less 1; 1 is full recovery, 0 a sphere that cannot be seen.
    """
    inside = phantom.regions["background"]
    level, true_level = float(volume[inside].mean()), float(phantom.activity[inside].mean())
    found: dict[str, list[float]] = {"hot": [], "cold": []}
    for name, region in phantom.regions.items():
        kind = name.split()[0]
        if kind in found:
            true = float(phantom.activity[region].mean()) / true_level - 1
            found[kind].append((float(volume[region].mean()) / level - 1) / true)
    out = {kind: sum(values) / len(values) for kind, values in found.items() if values}
    return {**out, "noise": float(volume[inside].std()) / level}


def run_one(job: CountsJob, folder: Path, say: Say, listener: Listener) -> dict[str, Any]:
    """Reconstruct one job and its baselines; figures by method.

    OSEM with the relative difference prior is given the strength and the number of passes that the truth likes best.
    """
    scan, grid, truth = job.scan, job.scan.grid, job.phantom.activity
    operator, y = scan.operator(grid, _RESOLUTION_MM), scan.prompts
    volumes: dict[str, Tensor] = {}
    seconds: dict[str, float] = {}

    def timed(name: str, make: Callable[[], Tensor]) -> None:
        start = time.perf_counter()
        volumes[name] = make()
        seconds[name] = time.perf_counter() - start

    operator.sensitivity()
    timed("FBP", lambda: operator.pinv(y).clamp_min(0))
    timed("OSEM", lambda: baselines.osem(y, operator, 2, _SUBSETS))
    tuned = baselines.tune_osem_rdp(y, operator, truth, subsets=_SUBSETS, iterations=6)
    say(f"  OSEM with RDP: strength {tuned.strength:.2e} is the best against the truth")
    timed("OSEM+RDP, tuned", lambda: baselines.osem_rdp(y, operator, tuned.strength, tuned.iterations, _SUBSETS))
    result = reconstruct_pet(
        y,
        scan.geometry,
        scan.factors,
        scan.additive,
        grid,
        recipe=load_recipe(job.recipe, {"start.subsets": _SUBSETS, "consistency.subsets": _SUBSETS}),
        prior=job.prior,
        scale=scan.scale,
        psf_fwhm_mm=_RESOLUTION_MM,
        folder=folder,
        force=True,
        listeners=(listener,),
    )
    name = f"recon3d {job.recipe}"
    volumes[name] = result.volume
    seconds[name] = result.timings.total
    middle = slice(_ENDS, grid.shape[0] - _ENDS)
    part = VolumeGrid((middle.stop - middle.start, *grid.slice_shape), grid.spacing_mm)
    span = float(truth.max())
    figures = {
        method: {
            **compare(volume[middle], truth[middle], part, span, unit="au"),
            "recovery": recovery(volume, job.phantom),
            "seconds": round(seconds[method], 2),
        }
        for method, volume in volumes.items()
    }
    preview(
        folder / "preview.png",
        volumes,
        grid,
        reference=truth,
        metrics=figures,
        unit="au",
        window=(0.0, span),  # the spheres are few voxels, and what the picture is for
        title=job.title,
    )
    write_nifti(folder / "reference.nii.gz", truth, grid, label="Bq/mL")
    table = {
        "reference": "the activity that was simulated",
        "methods": figures,
        "timings": result.timings.as_dict(),
        "data": result.metrics,
    }
    with atomic_write(folder / "metrics.json") as file:
        file.write(json.dumps(table, indent=1, allow_nan=False).encode())
    say("  figures of all slices but four at either end; recovery: contrast of the spheres over the true one")
    say(markdown(*metrics_table(figures)))
    say(
        f"  outside the network: {100 * result.timings.outside_network:.0f} % of {result.timings.total:.0f} s; "
        f"picture: {folder / 'preview.png'}"
    )
    return table

"""Which slices the prior should see: axial alone, planes in turn, planes averaged, groups of neighbours, with and
without total variation along z and noise shared between slices, on left-out CT from few views and on left-out
multi-coil MR.

All methods of a case share the scan, the data term, the levels and the start of the modality's default recipe; only how
slices are shown and tied together differs. Figures are those of recon3d.metrics.compare: PSNR and SSIM per plane, and
of the gradient along z its mean error over its mean (error) and its mean over that of the truth (ratio: above 1 slices
jitter, below 1 they were smoothed into each other). CT counts all voxels in HU, MR those inside the head.

The slices of both volumes lie several pixels apart (5 of 1.1 mm, 3 of 0.9 mm), where recon3d refuses to show a prior
other planes than axial ones unless told to; the table shows what that costs.

Priors that are not packaged are looked for in $RECON3D_PRIORS: ct_triplet, mr_triplet (groups of three slices),
ct_coronal, mr_coronal. Methods whose prior is not there are left out. Figures go to bench/results/planes.csv.
"""

from __future__ import annotations

import csv
import datetime
import os
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from bench._common import RESULTS, Row, commit, machine
from bench.job_mri import COILS, HEAD, NOISE, _data, head_mask, left_out_head
from recon3d import demo
from recon3d.api import Result, reconstruct, reconstruct_mri
from recon3d.geometry import VolumeGrid
from recon3d.metrics import compare
from recon3d.operators import CartesianMRI, GaussianNoise, simulate_mri
from recon3d.operators.masks import equispaced
from recon3d.priors import load_prior
from recon3d.priors.base import Prior
from recon3d.priors.per_plane import PerPlane
from recon3d.recipes import Recipe, load_recipe
from recon3d.testing.phantoms import coil_maps, smooth_phase

SLICES = 16  # from the middle; a whole volume takes three times as long
PLANES = ("axial", "coronal", "sagittal", "planes_mean")
ALONE = {"noise.kind": "independent", "regulariser.kind": "none"}
SHARED = {**ALONE, "noise.kind": "iscs_mm"}  # of the default recipes, with their distance
# chosen on training volumes; of ct the recipe's own
TVS: dict[str, dict[str, Any]] = {
    "ct": {"regulariser.kind": "tvz"},
    "mr": {"regulariser.kind": "tvz", "regulariser.threshold": 0.004, "regulariser.rho": 0.005},
}
TURN, MEAN = {"planes.kind": "in_turn"}, {"planes.kind": "averaged"}
TWO = {**TURN, "planes.order": ["axial", "axial", "coronal"]}
OVERLAP = {"planes.overlap": True}


@dataclass(frozen=True)
class Method:
    """How slices are shown and tied together: changes to the default recipe, and priors by plane ("": all others)."""

    name: str
    changes: dict[str, Any]
    priors: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Case:
    """A scan whose truth is known."""

    name: str
    modality: str  # names of priors begin with it
    recipe: str
    judge: Callable[[Tensor], dict[str, Any]]
    run: Callable[[Recipe, Prior], Result]


def methods(modality: str) -> list[Method]:
    """All methods of a modality, the plain one first."""
    triplet, perpendicular = {"": f"{modality}_triplet"}, {"coronal": f"{modality}_coronal"}
    tv = TVS[modality]
    return [
        Method("axial", ALONE),
        Method("axial, TV", {**ALONE, **tv}),
        Method("axial, ISCS", SHARED),
        Method("axial, TV, ISCS", {**SHARED, **tv}),
        Method("in turn", {**ALONE, **TURN}),
        Method("in turn, TV", {**ALONE, **TURN, **tv}),
        Method("in turn, ISCS", {**SHARED, **TURN}),
        Method("two priors in turn, K 3", {**ALONE, **TWO}, perpendicular),
        Method("two priors in turn, K 3, TV", {**ALONE, **TWO, **tv}, perpendicular),
        Method("averaged", {**ALONE, **MEAN}),
        Method("averaged, TV", {**ALONE, **MEAN, **tv}),
        Method("triplets", ALONE, triplet),
        Method("triplets, TV", {**ALONE, **tv}, triplet),
        Method("triplets, ISCS", SHARED, triplet),
        Method("triplets, TV, ISCS", {**SHARED, **tv}, triplet),
        Method("triplets, overlapping", {**ALONE, **OVERLAP}, triplet),
        Method("triplets, overlapping, TV", {**ALONE, **OVERLAP, **tv}, triplet),
    ]


def run(quick: bool, device: str) -> list[Row]:
    """All methods on 20 views of the chest and on every fourth column of the head; few slices and levels when quick."""
    for case in (ct(quick, device), mri(quick, device)):
        if case is None:
            continue
        found = [row for method in methods(case.modality) if (row := measured(case, method, quick)) is not None]
        print(table(case, found))
        if not quick:
            record(case, found)
    return []


def ct(quick: bool, device: str, views: int = 20) -> Case:
    """The left-out chest from few views with photon noise."""
    job = demo.chest(views=views, slices=6 if quick else SLICES)

    def reconstructed(recipe: Recipe, prior: Prior) -> Result:
        return reconstruct(
            job.y, job.geometry, job.grid, recipe, prior, noise=job.noise, device=device, accept_mismatch=True
        )

    name = f"chest {job.grid.shape[0]} x {job.grid.shape[1]}², {views} views, 5e4 photons"
    return Case(name, "ct", "ct", lambda x: compare(x, job.reference, job.grid), reconstructed)


def mri(quick: bool, device: str, acceleration: int = 4) -> Case | None:
    """The left-out head, simulated for 8 coils with noise; None where it is not at hand."""
    if (path := _data(HEAD)) is None:
        return None
    head, grid = left_out_head(path, (44, 224, 192))
    head = (head[19:25, 48:176, 32:160] if quick else head[14 : 14 + SLICES]).contiguous()
    nz, ny, nx = head.shape
    grid = VolumeGrid((nz, ny, nx), grid.spacing_mm)
    shape = grid.shape
    operator = CartesianMRI(equispaced(shape[2], acceleration, 0.08, seed=1), coil_maps(COILS, shape))
    noise = GaussianNoise(NOISE * float(np.percentile(head.numpy(), 99.9)))
    y = simulate_mri(head * smooth_phase(shape, seed=5, turns=1.0), operator, noise=noise, seed=1)
    inside = head_mask(head.numpy().astype(np.float64))
    top = float(head[inside].max())

    def reconstructed(recipe: Recipe, prior: Prior) -> Result:
        return reconstruct_mri(
            y, operator.mask, operator.maps, grid, recipe, prior, noise=noise, device=device, accept_mismatch=True
        )

    def judged(x: Tensor) -> dict[str, Any]:
        return compare(x.abs(), head, grid, top, inside, unit="au")

    name = f"head {shape[0]} x {shape[1]} x {shape[2]}, {COILS} coils, x{acceleration}"
    return Case(name, "mr", "mri", judged, reconstructed)


def prior_for(modality: str, names: dict[str, str], device: str) -> Prior | str:
    """The prior of a method, or why there is none."""
    folder = Path(os.environ.get("RECON3D_PRIORS", "priors"))
    found: dict[str, Prior] = {}
    for plane, name in {"": modality, **names}.items():
        if name == modality:
            found[plane] = load_prior(name, device)
        elif (folder / name / "card.json").exists():
            found[plane] = load_prior(folder / name, device)
        else:
            return f"there is no prior {name} in {folder} (set RECON3D_PRIORS)"
    others = found.pop("")
    return PerPlane({"axial": others, **found}) if found else others


def measured(case: Case, method: Method, quick: bool) -> dict[str, Any] | None:
    """Figures and seconds of one method; None where its prior is not at hand."""
    prior = prior_for(case.modality, method.priors, "cpu")
    if isinstance(prior, str):
        print(f"{case.name}: {method.name} is left out, {prior}")
        return None
    changes = {**method.changes, **({"trajectory.levels": 2} if quick else {})}
    recipe = load_recipe(case.recipe, changes)
    wall, cpu = time.perf_counter(), time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = case.run(recipe, prior)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    found = {"method": method.name, **case.judge(result.volume), "seconds": wall, "cpu_seconds": cpu}
    print(f"{case.name}: {method.name}: {found['planes_mean']['psnr_db']:.2f} dB, {cpu:.0f} s CPU", flush=True)
    return found


def table(case: Case, found: list[dict[str, Any]]) -> str:
    """The figures as Markdown, in the order of the methods."""
    head = ["method", *(f"{plane.replace('_', ' ')} dB / SSIM" for plane in PLANES), "along z error, ratio", "s CPU"]
    lines = [f"\n{case.name}\n", "| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for row in found:
        cells = [row["method"]]
        cells += [f"{row[plane]['psnr_db']:.2f} / {_ssim(row[plane]['ssim'])}" for plane in PLANES]
        cells += [
            f"{row['through_plane']['error']:.3f}, {row['through_plane']['ratio']:.3f}",
            f"{row['cpu_seconds']:.0f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def record(case: Case, found: list[dict[str, Any]], folder: Path = RESULTS) -> None:
    """Append the figures to planes.csv."""
    path = folder / "planes.csv"
    new = not path.exists()
    with path.open("a", newline="") as file:
        out = csv.writer(file)
        if new:
            figures = [f"{plane}_{figure}" for plane in PLANES for figure in ("psnr_db", "ssim")]
            along = ["along_z_error", "along_z_ratio"]
            out.writerow(["date", "commit", "machine", "case", "method", "rmse", *figures, *along, "seconds", "cpu_s"])
        for row in found:
            cells = [datetime.date.today(), commit(), machine("cpu"), case.name, row["method"]]
            cells.append(f"{row['volume']['rmse']:.5g}")
            for plane in PLANES:
                cells += [f"{row[plane]['psnr_db']:.4f}", _ssim(row[plane]["ssim"])]
            cells += [f"{row['through_plane'][key]:.4f}" for key in ("error", "ratio")]
            out.writerow([*cells, f"{row['seconds']:.1f}", f"{row['cpu_seconds']:.1f}"])


def _ssim(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"

"""How often the truth lies in the nominal 90 % interval of several samples, on volumes that no packaged prior was
trained on: CT from few views, MRI from every fourth column, PET from counts.

Scans of CT and MRI are simulated on the volume's own pixels with the noise that the reconstruction is told: judged are
prior and sampler, not the scanner's model. Slabs are small: 8 samples of a recipe that draws ask the prior hundreds of
times per slice each. Figures: recon3d.metrics.calibration, over the voxels of the body.

The spread factor, by which a recipe's spread must be multiplied for 90 % to be 90 %, is measured on volumes of the
training set that are alike in kind, and then judged on the left-out ones. Figures go to bench/results/calibration.csv,
reliability curves to docs/images/calibration.png.
"""

from __future__ import annotations

import csv
import datetime
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from bench._common import RESULTS, Row, commit, machine
from bench.job_mri import _data, head_mask
from bench.pet_quality import scanned, subjects
from recon3d import reconstruct, reconstruct_mri, reconstruct_pet
from recon3d.api import Result
from recon3d.geometry import ParallelBeam, VolumeGrid, equiangular
from recon3d.io import hu_to_mu, read_nifti
from recon3d.metrics import calibration, interval_factor
from recon3d.operators import CartesianMRI, CTOperator, GaussianNoise, simulate_mri
from recon3d.operators.masks import equispaced
from recon3d.operators.noise import PoissonNoise
from recon3d.recipes import Recipe, load_recipe
from recon3d.testing.phantoms import coil_maps, smooth_phase

Device = Literal["auto", "cpu", "cuda"]

SAMPLES = 8
SIDE = 64
LEVELS = 100  # of the recipe posterior, whose own 300 take three times as long
PICTURE = Path(__file__).parents[1] / "docs" / "images" / "calibration.png"
# left out, and of the training set: file, slices, first row and column of the square
CT = {
    "left out": ("ct/ct_chest_pyrad_lung1.nii.gz", (18, 26, 34), (70, 60)),
    "training": ("ct/ct_chest_lidc0314.nii.gz", (35, 45, 55), (70, 60)),
}
MR = {
    "left out": ("mr/mr_brain_oms20_t1w.nii.gz", (14, 22, 30), (60, 40)),
    "training": ("mr/mr_brain_oms12_t1w.nii.gz", (14, 22, 30), (60, 40)),
}
VIEWS, PHOTONS = 20, 5e4
COILS, ACCELERATION, NOISE = 6, 4, 0.015


@dataclass(frozen=True)
class Case:
    """A scan whose truth is known; `run` reconstructs it with a recipe."""

    name: str
    truth: Tensor
    inside: np.ndarray[Any, Any]
    unit: float  # of the figures, in units of the volume
    run: Callable[[Recipe, int], Result]


def run(quick: bool, device: Device) -> list[Row]:
    """One slice of the chest with few levels when quick; else all three scanners."""
    plans = {"CT": (ct, CT, ct_recipes(quick)), "MRI": (mri, MR, mri_recipes())}
    curves: dict[str, dict[str, dict[str, Any]]] = {}
    for name, (make, volumes, recipes) in plans.items():
        if quick and name != "CT":
            continue
        cases = {which: make(*volumes[which], device, 1 if quick else None) for which in volumes}
        curves[name] = judged(name, cases, recipes, 4 if quick else SAMPLES)
        if not quick:
            record(name, curves[name])
    if not quick:
        chosen = {"left out": subjects()[:1], "training": subjects(held_out=False)[:1]}
        cases = {which: pet(found[0], device) if found else None for which, found in chosen.items()}
        curves["PET"] = judged("PET", cases, pet_recipes(), SAMPLES)
        record("PET", curves["PET"])
        picture(PICTURE, curves)
    return []


def ct_recipes(quick: bool) -> dict[str, Recipe]:
    """Those that draw, and the default."""
    levels = 20 if quick else LEVELS
    return {
        f"posterior, {levels} levels": load_recipe("posterior", {"trajectory.levels": levels}),
        "dds, eta 1": load_recipe("dds", {"renoise.eta": 1.0}),
        "predictor-corrector": load_recipe(
            "dds", {"renoise.kind": "ancestral", "renoise.variance": "large", "trajectory.correctors": 1}
        ),
        "ct": load_recipe("ct"),
    }


def mri_recipes() -> dict[str, Recipe]:
    """Those that draw, and the default."""
    return {
        f"posterior, {LEVELS} levels": load_recipe("posterior", {"trajectory.levels": LEVELS}),
        "dds_mri, eta 1": load_recipe("dds_mri", {"renoise.eta": 1.0}),
        "mri": load_recipe("mri"),
    }


def pet_recipes() -> dict[str, Recipe]:
    """No recipe for counts claims to draw; the default, and the default with all noise fresh."""
    return {"pet, amount 1": load_recipe("pet", {"renoise.amount": 1.0}), "pet": load_recipe("pet")}


def judged(
    what: str, cases: dict[str, Case | None], recipes: dict[str, Recipe], samples: int
) -> dict[str, dict[str, Any]]:
    """Figures of every recipe on the left-out volume, with the factor that the training volume asks for."""
    out: dict[str, dict[str, Any]] = {}
    left, training = cases["left out"], cases["training"]
    if left is None:
        return out
    for name, recipe in recipes.items():
        factor = None if training is None else figures(training, recipe, samples)["spread_factor"]
        found = figures(left, recipe, samples, factor)
        out[name] = {**found, "case": left.name, "training": "" if training is None else training.name}
        widened = "" if factor is None else f"; times {factor:.2f} (training volume): {100 * found['widened']:.0f} %"
        print(
            f"{what}, {left.name}, {name}: {100 * found['share']:.1f} % inside the 90 % interval{widened}; "
            f"calibration error {found['calibration_error']:.3f}",
            f"error and spread correlate {found['correlation']:.2f}",
            f"rms error {found['rmse']:.4g}, rms spread {found['spread']:.4g}, {found['cpu_s']:.0f} s CPU",
            sep="; ",
            flush=True,
        )
    return out


def figures(case: Case, recipe: Recipe, samples: int, factor: float | None = None) -> dict[str, Any]:
    """Calibration of one recipe on one case; with a factor also the share inside the widened interval."""
    wall, cpu = time.perf_counter(), time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = case.run(recipe, samples)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    assert result.uncertainty is not None
    std = result.uncertainty.std / case.unit
    # of magnitudes, where the volume is complex
    centre = result.uncertainty.high / case.unit - interval_factor(samples) * std
    found = calibration(centre, std, case.truth / case.unit, samples, case.inside)
    m, s, t = (x.numpy()[case.inside].astype(np.float64) for x in (centre, std, case.truth / case.unit))
    found["rmse"], found["spread"] = float(np.sqrt(np.mean((m - t) ** 2))), float(np.sqrt(np.mean(s**2)))
    found["seconds"], found["cpu_s"], found["factor"] = wall, cpu, factor
    if factor is not None:
        found["widened"] = float(np.mean(np.abs(t - m) <= factor * interval_factor(samples) * s))
    return found


def ct(file: str, slices: tuple[int, ...], corner: tuple[int, int], device: Device, only: int | None) -> Case | None:
    """A square of a few slices as an object of its own, from few views."""
    if (path := _data(file)) is None:
        return None
    volume, grid = read_nifti(path)
    attenuation = hu_to_mu(_square(volume.float(), slices[:only], corner).numpy()).clip(min=0)
    truth = torch.as_tensor(attenuation, dtype=torch.float32)
    small = _spread_out(grid, slices, len(truth))
    pixel = grid.spacing_mm[2]
    scan = ParallelBeam(equiangular(VIEWS), int(1.5 * SIDE), pixel)
    noise = PoissonNoise(PHOTONS)
    y = noise.simulate(CTOperator(scan, small)(truth), 1)

    def solve(recipe: Recipe, samples: int) -> Result:
        return reconstruct(
            y, scan, small, recipe, "ct", noise=noise, samples=samples, device=device, accept_mismatch=True
        )

    name = f"{Path(file).name.split('.')[0]}, {len(truth)} x {SIDE}², {VIEWS} views"
    return Case(name, truth, truth.numpy() > 0.002, 0.0193e-3, solve)


def mri(file: str, slices: tuple[int, ...], corner: tuple[int, int], device: Device, only: int | None) -> Case | None:
    """A square of a few slices as an object of its own, every fourth column."""
    if (path := _data(file)) is None:
        return None
    volume, grid = read_nifti(path)
    magnitude = _square(volume.float(), slices[:only], corner).contiguous()
    shape = (len(magnitude), SIDE, SIDE)
    maps, mask = coil_maps(COILS, shape), equispaced(SIDE, ACCELERATION, 0.08, seed=1)
    top = float(np.percentile(magnitude.numpy(), 99.9))
    noise = GaussianNoise(NOISE * top)
    truth = magnitude * smooth_phase(shape, seed=5, turns=1.0)
    y = simulate_mri(truth, CartesianMRI(mask, maps), noise=noise, seed=1)
    small = _spread_out(grid, slices, len(magnitude))

    def solve(recipe: Recipe, samples: int) -> Result:
        return reconstruct_mri(
            y, mask, maps, small, recipe, "mr", noise=noise, samples=samples, device=device, accept_mismatch=True
        )

    name = f"{Path(file).name.split('.')[0]}, {shape[0]} x {SIDE}², {COILS} coils, x{ACCELERATION}"
    return Case(name, magnitude, head_mask(magnitude.numpy().astype(np.float64)), top / 1000, solve)


def pet(subject: Any, device: Device) -> Case:
    """A subject of the PET quality bench at its middle count level."""
    counts = subject.counts[1]
    scan = scanned(subject, counts)

    def solve(recipe: Recipe, samples: int) -> Result:
        return reconstruct_pet(
            scan.prompts, scan.geometry, scan.factors, scan.additive, scan.grid, recipe, "pet",
            scale=scan.scale, samples=samples, device=device, accept_mismatch=True,
        )  # fmt: skip

    truth = subject.phantom.activity.float()
    inside = subject.body.numpy().astype(bool)
    return Case(f"{subject.name}, {counts:g} counts", truth, inside, float(truth[subject.body].mean()) / 1000, solve)


def _spread_out(grid: VolumeGrid, slices: tuple[int, ...], count: int) -> VolumeGrid:
    dz, dy, dx = grid.spacing_mm
    return VolumeGrid((count, SIDE, SIDE), (dz * (slices[1] - slices[0]), dy, dx))


def _square(volume: Tensor, slices: tuple[int, ...], corner: tuple[int, int]) -> Tensor:
    row, column = corner
    return volume[list(slices), row : row + SIDE, column : column + SIDE]


def record(scanner: str, curves: dict[str, dict[str, Any]]) -> None:
    """Append to bench/results/calibration.csv."""
    if not curves:
        return
    path = RESULTS / "calibration.csv"
    new = not path.exists()
    keys = ("share", "calibration_error", "correlation", "rmse", "spread", "factor", "widened", "seconds", "cpu_s")
    with path.open("a", newline="") as file:
        out = csv.writer(file)
        if new:
            levels = [f"observed_{p:g}" for p in next(iter(curves.values()))["nominal"]]
            head = ["date", "commit", "machine", "scanner", "case", "training", "recipe", "samples", "voxels"]
            out.writerow([*head, *keys, *levels])
        for name, found in curves.items():
            row = [datetime.date.today(), commit(), machine("cpu"), scanner, found["case"], found["training"], name]
            values = [found.get(key) for key in keys] + found["observed"]
            out.writerow([*row, found["samples"], found["voxels"], *("" if v is None else f"{v:.4g}" for v in values)])


def picture(path: Path, curves: dict[str, dict[str, dict[str, Any]]]) -> None:
    """Reliability curves, a panel per scanner."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4 * len(curves), 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    for k, (scanner, found) in enumerate(curves.items()):
        axes = figure.add_subplot(1, len(curves), k + 1)
        axes.plot([0, 100], [0, 100], color="0.6", linewidth=1)
        for name, values in found.items():
            nominal, observed = (100 * np.asarray(values[key]) for key in ("nominal", "observed"))
            axes.plot(
                nominal, observed, marker="o", markersize=3, label=f"{name}: {100 * values['share']:.0f} % at 90 %"
            )
        axes.set(xlim=(0, 100), ylim=(0, 100), aspect="equal", title=scanner, xlabel="nominal share, %")
        axes.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.15))
        if k == 0:
            axes.set_ylabel("voxels inside the interval, %")
    figure.savefig(path, dpi=110, bbox_inches="tight")

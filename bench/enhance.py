"""Image enhancement on two volumes that no packaged prior was trained on: the tables of the source papers, re-run.

Tasks: denoising, noisy 4x and 8x super-resolution and deblurring of a chest CT; 4x and 8x super-resolution of a head MR
with a little noise. Two slices of each, 192 x 192 pixels around the middle, degraded here with noise of a fixed seed.
Methods: the pseudo-inverse H+, bicubic interpolation, a deep image prior (DIP), ILVR, DPS, DDNM, DDNM+ and the default
recipe, all that have a prior with the packaged one and the same number of levels. Strengths were chosen on a chest and
a head that the priors were trained on (lidc0314, oms04); nothing looks at the volumes judged here.

PSNR and SSIM: range 2000 HU, clipped to [-1000, 1000] HU; of MR the largest value of the slices. VIF as recon3d.metrics
defines it, with the same range. Means over slices. Figures go to bench/results/enhance.csv.
`RECON3D_ENHANCE_PICTURE=FILE` draws a slice of each task.
"""

from __future__ import annotations

import csv
import datetime
import os
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from bench._common import RESULTS, Row, commit, machine
from recon3d import baselines, enhance
from recon3d.engine.scan_image import Degradation
from recon3d.geometry import VolumeGrid
from recon3d.io import mu_to_hu, read_nifti
from recon3d.metrics import psnr, ssim, vif
from recon3d.operators.image import ImageOperator
from recon3d.recipes import Recipe, load_recipe

PICTURE = os.environ.get("RECON3D_ENHANCE_PICTURE")
LEVELS = 24
SIDE = 192  # pixels around the middle
DIP_ITERATIONS = 250
# (subject, slices) judged, and those that strengths were chosen on
JUDGED = {"ct": ("ct/ct_chest_pyrad_lung1.nii.gz", (14, 30)), "mr": ("mr/mr_brain_oms20_t1w.nii.gz", (16, 26))}
TUNED = {"ct": ("ct/ct_chest_lidc0314.nii.gz", (20, 40)), "mr": ("mr/mr_brain_oms04_t1w.nii.gz", (18, 28))}


@dataclass(frozen=True)
class Task:
    """A degradation and the noise after it: in HU, or in per cent of the MR volume's range."""

    name: str
    modality: str
    degradation: Degradation
    noise: float


TASKS = (
    Task("CT denoising, 120 HU", "ct", Degradation("identity"), 120.0),
    Task("CT 4x, 40 HU", "ct", Degradation("sr", 4), 40.0),
    Task("CT 8x, 40 HU", "ct", Degradation("sr", 8), 40.0),
    Task("CT deblurring, 5 mm, 20 HU", "ct", Degradation("blur", blur_mm=(0.0, 5.0, 5.0)), 20.0),
    Task("MR 4x, 1 %", "mr", Degradation("sr", 4), 1.0),
    Task("MR 8x, 1 %", "mr", Degradation("sr", 8), 1.0),
)
RECIPES: dict[str, dict[str, Any]] = {
    "ilvr": {"consistency.factor": 2},  # for coarse images their own factor: finer, it repeats the pixels
    "dps_image": {"consistency.strength": 4.0},
    "ddnm": {},
    "ddnm_plus": {},
    "image": {},
}


@dataclass(frozen=True)
class Measured:
    """A task's data: truth on its grid, what was measured of it, and the noise in the truth's unit."""

    truth: Tensor
    grid: VolumeGrid
    operator: ImageOperator
    y: Tensor
    coarse: VolumeGrid
    sigma: float
    data_range: float


def run(quick: bool, device: str) -> list[Row]:
    """All tasks; quick: one slice of the first two, few levels."""
    drawn = []
    for task in TASKS[: 2 if quick else None]:
        found = measure(task, slices=1, side=128) if quick else measure(task)
        if found is None:
            print(f"{task.name}: the volume is not at hand (set RECON3D_DATA)")
            continue
        images, rows = {"truth": found.truth, "measured": found.operator.pinv(found.y)}, []
        for name, method in methods(task, found, LEVELS // (4 if quick else 1), 40 if quick else DIP_ITERATIONS):
            wall, cpu = time.perf_counter(), time.process_time()
            images[name] = method()
            spent = time.perf_counter() - wall, time.process_time() - cpu
            rows.append((name, judge(images[name], found, task.modality), spent))
            figures = "  ".join(f"{k} {v:.3f}" for k, v in rows[-1][1].items())
            print(f"{task.name}: {name:10} {figures}  {spent[0]:.1f} s, {spent[1]:.1f} s CPU", flush=True)
        if not quick:
            _record(task, rows)
        drawn.append((task, found, images, {name: figures for name, figures, _ in rows}))
    if PICTURE and drawn:
        picture(Path(PICTURE), drawn)
    return []


def measure(
    task: Task,
    files: Mapping[str, tuple[str, tuple[int, ...]]] = JUDGED,
    slices: int | None = None,
    side: int = SIDE,
) -> Any:
    """The task's data from a volume, or None where it is not at hand."""
    name, chosen = files[task.modality]
    root = os.environ.get("RECON3D_DATA") or Path(__file__).parents[2] / "shared" / "data"
    path = Path(root) / name
    if not path.exists():
        return None
    volume, grid = read_nifti(path)
    truth = _cropped(volume[list(chosen[:slices])].float(), side)
    fine = VolumeGrid(tuple(truth.shape), grid.spacing_mm)  # type: ignore[arg-type]
    operator: Any = task.degradation.operator(fine)
    top = float(truth.max())
    sigma = task.noise if task.modality == "ct" else task.noise / 100 * top
    clean = operator(truth)
    y = clean + sigma * torch.from_numpy(np.random.default_rng(7).standard_normal(clean.shape)).float()
    block = task.degradation.block
    coarse = VolumeGrid(tuple(y.shape), tuple(s * b for s, b in zip(fine.spacing_mm, block, strict=True)))  # type: ignore[arg-type]
    return Measured(truth, fine, operator, y, coarse, sigma, 2000.0 if task.modality == "ct" else top)


def methods(task: Task, m: Measured, levels: int, dip_iterations: int) -> list[tuple[str, Callable[[], Tensor]]]:
    """Every method's name and a call that gives its image."""
    d = task.degradation

    def recipe(name: str) -> Recipe:
        own = {"consistency.factor": d.factor} if name == "ilvr" and d.factor else {}
        return load_recipe(name, {"trajectory.levels": levels, **RECIPES[name], **own})

    def sampled(name: str) -> Tensor:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            out = enhance(
                m.y, m.coarse, d.kind, recipe(name), unit="hu" if task.modality == "ct" else "au",
                noise=m.sigma, factor=d.factor, blur_mm=d.blur_mm, seed=5, device="cpu", accept_mismatch=True,
            ).volume  # fmt: skip
        return mu_to_hu(out) if task.modality == "ct" else out

    out: list[tuple[str, Callable[[], Tensor]]] = [("H+", lambda: m.operator.pinv(m.y))]
    if d.kind == "sr":
        out.append(("bicubic", lambda: F.interpolate(m.y[:, None], m.truth.shape[1:], mode="bicubic")[:, 0]))
    out.append(("DIP", lambda: baselines.dip(m.y, m.operator, m.sigma, dip_iterations)))
    names = {"ilvr": "ILVR", "dps_image": "DPS", "ddnm": "DDNM", "ddnm_plus": "DDNM+", "image": "recon3d"}
    for key, shown in names.items():
        out.append((shown, lambda key=key: sampled(key)))  # type: ignore[misc]
    return out


def judge(x: Tensor, m: Measured, modality: str) -> dict[str, float]:
    """PSNR, SSIM and VIF, means over slices."""
    a, r = (v.clamp(-1000, 1000).numpy() if modality == "ct" else v.numpy() for v in (x, m.truth))
    return {
        "psnr_db": float(np.mean([psnr(p, q, m.data_range) for p, q in zip(a, r, strict=True)])),
        "ssim": float(ssim(a, r, m.data_range).mean()),
        "vif": float(vif(a, r, m.data_range).mean()),
    }


def picture(path: Path, drawn: list[tuple[Task, Measured, dict[str, Tensor], dict[str, dict[str, float]]]]) -> None:
    """The first slice of each task: truth and every method, with their PSNR."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns = ["truth", *[n for n in max((d[2] for d in drawn), key=len) if n not in ("truth", "measured")]]
    figure, axes = plt.subplots(len(drawn), len(columns), figsize=(1.75 * len(columns), 1.95 * len(drawn)))
    for row, (task, m, images, figures) in zip(np.atleast_2d(axes), drawn, strict=True):
        low, high = (-1000, 400) if task.modality == "ct" else (0.0, float(torch.quantile(m.truth[0], 0.998)))
        for ax, name in zip(row, columns, strict=True):
            ax.set_xticks([])
            ax.set_yticks([])
            if name in images:
                ax.imshow(images[name][0].numpy(), cmap="gray", vmin=low, vmax=high)
                label = f"{figures[name]['psnr_db']:.1f} dB" if name in figures else ""
                ax.set_title(f"{name} {label}", fontsize=7, pad=2)
            else:
                ax.set_axis_off()
        row[0].set_ylabel(task.name, fontsize=6)
    figure.tight_layout(pad=0.3)
    figure.savefig(path, dpi=80)
    plt.close(figure)


def _cropped(x: Tensor, side: int) -> Tensor:
    """The middle, sides a multiple of 8."""
    rows, columns = (min(side, n // 8 * 8) for n in x.shape[1:])
    top, left = (x.shape[1] - rows) // 2, (x.shape[2] - columns) // 2
    return x[:, top : top + rows, left : left + columns].contiguous()


def _record(task: Task, rows: list[tuple[str, dict[str, float], tuple[float, float]]]) -> None:
    path = RESULTS / "enhance.csv"
    new = not path.exists()
    with path.open("a", newline="") as file:
        out = csv.writer(file)
        if new:
            names = ["psnr_db", "ssim", "vif"]
            out.writerow(["date", "commit", "machine", "task", "method", *names, "seconds", "cpu_seconds"])
        for method, figures, spent in rows:
            numbers = [f"{figures['psnr_db']:.2f}", f"{figures['ssim']:.4f}", f"{figures['vif']:.4f}"]
            seconds = [f"{s:.1f}" for s in spent]
            out.writerow([datetime.date.today(), commit(), machine("cpu"), task.name, method, *numbers, *seconds])

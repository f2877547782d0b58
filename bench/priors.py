"""Priors of one modality side by side on its left-out volume: what denoising leaves, and what the default recipe makes
of few data with each of them.

Besides the packaged ct and mr, every folder of $RECON3D_PRIORS whose prior sees the same slices (plane, channels,
single slices, no condition) takes part. Denoising counts six slices, PSNR with a peak of one network unit (1000 HU; the
99.9th percentile of the head) at noise levels in that unit; the EDM loss is the squared error over
sigma^2 sigma_data^2 / (sigma^2 + sigma_data^2), the mean of the levels. Reconstruction is that of bench planes: 16
slices from the middle, default recipe. Figures go to bench/results/priors.csv.
"""

from __future__ import annotations

import csv
import datetime
import math
import os
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from bench import planes
from bench._common import RESULTS, Row, commit, machine
from bench.job_mri import HEAD, _data
from recon3d import demo
from recon3d.io import read_nifti
from recon3d.priors import Prior, find_prior, load_prior
from recon3d.priors.checkpoints import read_folder
from recon3d.priors.self_test import known_slices
from recon3d.recipes import load_recipe

LEVELS = (0.02, 0.05, 0.1, 0.3, 1.0)  # network units
VIEWS, ACCELERATION = (20, 40), 4


def run(quick: bool, device: str) -> list[Row]:
    """All priors at hand, one modality after the other; few slices and levels when quick."""
    for modality in ("ct", "mr"):
        volume, cases = _left_out(modality, quick, device)
        if volume is None:
            print(f"{modality}: the left-out volume is not at hand")
            continue
        found = []
        for folder in _candidates(modality):
            prior = load_prior(folder, device)
            figures = {**_denoised(prior, volume, 2 if quick else 6), **_reconstructed(prior, cases, modality, quick)}
            found.append((folder.name, prior.card.training.get("images", "-"), figures))
            print(f"{modality}: {folder.name}: " + ", ".join(f"{k} {v:.4g}" for k, v in figures.items()), flush=True)
            if not quick:
                _record(modality, *found[-1])
        print(_table(modality, found))
    return []


def _left_out(modality: str, quick: bool, device: str) -> tuple[Tensor | None, list[planes.Case]]:
    if modality == "ct":
        volume, _ = read_nifti(demo.demo_volume_path(), unit="hu")
        return volume, [planes.ct(quick, device, views) for views in VIEWS]
    path, case = _data(HEAD), planes.mri(quick, device, ACCELERATION)
    return (None, []) if path is None or case is None else (read_nifti(path, unit="au")[0], [case])


def _candidates(modality: str) -> Iterator[Path]:
    first = find_prior(modality)
    yield first
    wanted, _ = read_folder(first)
    for path in sorted(Path(os.environ.get("RECON3D_PRIORS", "priors")).glob("*/card.json")):
        card, _ = read_folder(path.parent)
        alike = ("channels", "slices", "plane", "cond_channels", "unit")
        if all(getattr(card, key) == getattr(wanted, key) for key in alike):
            yield path.parent


def _denoised(prior: Prior, volume: Tensor, slices: int) -> dict[str, float]:
    clean, _ = known_slices(prior.card, volume, slices)
    found, losses = {}, []
    for k, level in enumerate(LEVELS):
        noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(k))
        left = (prior.denoise(clean + level * prior.scale * noise, level * prior.scale) - clean) / prior.scale
        error = float(left.double().square().mean())
        found[f"dB at {level:g}"] = -10 * math.log10(error)
        inverse = 1 / level**2 + 1 / (prior.card.sigma_data or 1.0) ** 2
        losses.append(error * inverse)
    return {"loss": sum(losses) / len(losses), **found}


def _reconstructed(prior: Prior, cases: list[planes.Case], modality: str, quick: bool) -> dict[str, float]:
    names = [f"{views} views" for views in VIEWS] if modality == "ct" else [f"every {ACCELERATION}th column"]
    found = {}
    for case, name in zip(cases, names, strict=True):
        recipe = load_recipe(case.recipe, {"trajectory.levels": 2} if quick else {})
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            judged = case.judge(case.run(recipe, prior).volume)
        found[f"{name} dB"], found[f"{name} SSIM"] = judged["axial"]["psnr_db"], judged["axial"]["ssim"]
    return found


def _table(modality: str, found: list[tuple[str, object, dict[str, float]]]) -> str:
    keys = list(found[0][2])
    lines = [f"\n| {modality} prior | images seen | " + " | ".join(keys) + " |", "|" + " --- |" * (len(keys) + 2)]
    for name, images, figures in found:
        cells = [f"{v:.4f}" if "loss" in k or "SSIM" in k else f"{v:.2f}" for k, v in figures.items()]
        lines.append(f"| {name} | {images} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _record(modality: str, name: str, images: object, figures: dict[str, float], folder: Path = RESULTS) -> None:
    path = folder / "priors.csv"
    new = not path.exists()
    with path.open("a", newline="") as file:
        out = csv.writer(file)
        if new:
            out.writerow(["date", "commit", "machine", "modality", "prior", "images_seen", "figure", "value"])
        for key, value in figures.items():
            head = [datetime.date.today(), commit(), machine("cpu"), modality, name, images]
            out.writerow([*head, key, f"{value:.5f}"])

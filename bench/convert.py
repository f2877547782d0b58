"""MR to CT of a left-out thigh by a conditional prior: every sampler of the field beside a plain regression.

Input: the T1-weighted MR of STS_036; truth: its CT, resampled onto the MR's grid (same world frame; a few mm of
deformation stay and count as error). The prior is not packaged: `RECON3D_PRIORS` names the folder that holds `mr2ct`,
trained by docs/train_mr_to_ct.yaml without this subject. Regression is one call of the same network from pure noise at
its highest level, which is the mean of CT given MR, the best that squared error can ask for: samples cannot beat it
there, they say what is uncertain.

Figures over the body (CT above -500 HU, holes filled) and slices spread over the volume: mean absolute error in HU,
PSNR (range 2000 HU), SSIM (range 2000 HU, mean over the slices' bodies), share of voxels inside the 90 % interval of
ten samples. Seconds include planning. Figures go to bench/results/convert.csv; `RECON3D_CONVERT_PICTURE=FILE` draws a
slice.
"""

from __future__ import annotations

import csv
import datetime
import os
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bench._common import RESULTS, Row, commit, machine
from recon3d.api import Result, convert_modality
from recon3d.cli.converted import sampling
from recon3d.geometry import VolumeGrid
from recon3d.io import read_nifti
from recon3d.metrics import psnr, ssim
from recon3d.operators.attenuation import resample_volume
from recon3d.priors import condition_volume, load_prior
from recon3d.recipes import recipe_from

RANGE_HU = 2000.0
SAMPLES = 10
# about as many calls of the network each
LEVELS = {"ddpm": 32, "em": 40, "pc": 16, "ode": 16, "rk45": 2}
RK45_TOLERANCE = 0.05
NAMES = {"ddpm": "DDPM", "em": "Euler-Maruyama", "pc": "predictor-corrector", "ode": "ODE, Heun", "rk45": "ODE, RK45"}
PICTURE = os.environ.get("RECON3D_CONVERT_PICTURE")

Array = NDArray[np.float32]


@dataclass(frozen=True)
class Pair:
    """MR, CT in HU on its grid, and where the body is; `slices` are those converted."""

    mr: Tensor
    ct: Array
    body: NDArray[np.bool_]
    grid: VolumeGrid
    slices: list[int]


def run(quick: bool, device: str) -> list[Row]:
    """Convert 2 slices by every sampler, once and ten times; 1 slice, few levels and 3 samples when quick."""
    data = Path(os.environ.get("RECON3D_DATA", Path(__file__).parents[1] / ".." / "shared" / "data"))
    folder = Path(os.environ.get("RECON3D_PRIORS", "priors")) / "mr2ct"
    for needed, hint in (
        (folder / "card.json", "train it with docs/train_mr_to_ct.yaml and set RECON3D_PRIORS to the folder it is in"),
        (data / "mr/mr_extremity_sts036_t1w.nii.gz", "set RECON3D_DATA"),
        (data / "ct/ct_extremity_sts036.nii.gz", "set RECON3D_DATA"),
    ):
        if not needed.exists():
            print(f"convert: left out, {needed} is not there; {hint}")
            return []
    pair = _pair(data, 1 if quick else 2)
    figures, shown = [], {"MR": pair.mr[pair.slices].numpy(), "CT": pair.ct[pair.slices]}
    start = time.perf_counter()
    mean = _regression(pair, folder, device)
    figures.append(_figures("regression", 1, 1, mean, None, pair, time.perf_counter() - start))
    shown["regression"] = mean
    samples = 3 if quick else SAMPLES
    for sampler, levels in LEVELS.items():
        levels = min(levels, 16) if quick else levels
        for count in (1, samples):
            start = time.perf_counter()
            parts = [_convert(pair, z, folder, sampler, levels, count, device) for z in pair.slices]
            volume = np.concatenate([part.volume.numpy() for part in parts])
            inside = None
            if count > 1:
                low, high = (_stack(parts, name) for name in ("low", "high"))
                inside = (pair.ct[pair.slices] >= low) & (pair.ct[pair.slices] <= high)
            seconds = time.perf_counter() - start
            figures.append(_figures(NAMES[sampler], levels, count, volume, inside, pair, seconds))
            shown[f"{NAMES[sampler]}, {count}"] = volume
            if sampler == "ddpm" and count > 1:
                shown["spread"] = _stack(parts, "std")
    print(_table(figures))
    if not quick:
        _record(figures)
    if PICTURE:
        _draw(Path(PICTURE), shown)
    return []


def _pair(data: Path, count: int) -> Pair:
    from scipy.ndimage import binary_fill_holes

    mr, grid = read_nifti(data / "mr/mr_extremity_sts036_t1w.nii.gz")
    ct, own = read_nifti(data / "ct/ct_extremity_sts036.nii.gz")
    ct = resample_volume(ct + 1000, own, grid) - 1000
    body = np.stack([binary_fill_holes(s) for s in (ct > -500).numpy()])
    slices = np.linspace(0, len(mr), count + 2)[1:-1].round().astype(int).tolist()
    return Pair(mr, ct.numpy(), body, grid, slices)


def _regression(pair: Pair, folder: Path, device: str) -> Array:
    """E[CT | MR]: one call from noise so strong that nothing of the image is in it."""
    prior = load_prior(folder, device)
    assert prior.card.sigma_range is not None
    sigma = prior.card.sigma_range[1] * prior.scale
    cond = condition_volume(prior.card, pair.mr)[pair.slices][:, None].to(device)
    noise = torch.randn(cond.shape, generator=torch.Generator().manual_seed(0)).to(device)
    return prior.denoise(sigma * noise + prior.offset, sigma, cond)[:, 0].cpu().numpy()


def _convert(pair: Pair, z: int, folder: Path, sampler: str, levels: int, samples: int, device: str) -> Result:
    settings = sampling(folder, sampler, levels)
    if sampler == "rk45":
        settings["renoise"] = {"kind": "rk45", "rtol": RK45_TOLERANCE, "atol": RK45_TOLERANCE}
    recipe = recipe_from(settings, "sample")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return convert_modality(
            pair.mr, pair.grid, folder, recipe, slices=(z, z + 1), samples=samples, seed=z, device=device
        )


def _stack(parts: list[Result], name: str) -> Array:
    return np.concatenate([getattr(part.uncertainty, name).numpy() for part in parts])


def _figures(
    method: str, levels: int, samples: int, x: Array, inside: NDArray[np.bool_] | None, pair: Pair, seconds: float
) -> dict[str, str]:
    ct, body = pair.ct[pair.slices], pair.body[pair.slices]
    error = np.abs(x.astype(np.float64) - ct)[body]
    bone = (ct > 200) & body
    return {
        "method": method,
        "levels": str(levels),
        "samples": str(samples),
        "slices": str(len(pair.slices)),
        "mae_hu": f"{error.mean():.1f}",
        "mae_bone_hu": f"{np.abs(x - ct)[bone].mean():.1f}",
        "psnr_db": f"{psnr(x, ct, RANGE_HU, body):.2f}",
        "ssim": f"{ssim(x, ct, RANGE_HU, body).mean():.3f}",
        "inside_90": "" if inside is None else f"{inside[body].mean():.3f}",
        "seconds": f"{seconds:.1f}",
    }


def _table(figures: list[dict[str, str]]) -> str:
    header = list(figures[0])
    lines = [" | ".join(header), " | ".join("---" for _ in header)]
    return "\n".join([*lines, *(" | ".join(row.values()) for row in figures)])


def _record(figures: list[dict[str, str]]) -> None:
    path = RESULTS / "convert.csv"
    new = not path.exists()
    with path.open("a", newline="") as file:
        out = csv.writer(file)
        if new:
            out.writerow(["date", "commit", "machine", *figures[0]])
        for row in figures:
            out.writerow([datetime.date.today(), commit(), machine("cpu"), *row.values()])


def _draw(path: Path, shown: dict[str, Array]) -> None:
    """The middle of the converted slices by every method."""
    from matplotlib.figure import Figure

    names = [name for name in shown if name == "regression" or not name.endswith(", 1")]
    columns = (len(names) + 1) // 2
    figure = Figure(figsize=(2.4 * columns, 5.2), layout="constrained")
    for name, place in zip(names, figure.subplots(2, columns).flat, strict=False):
        image = shown[name][len(shown[name]) // 2]
        window = {"MR": (0, np.percentile(image, 99.5)), "spread": (0, 300)}.get(name, (-250, 600))
        place.imshow(image, cmap="magma" if name == "spread" else "gray", vmin=window[0], vmax=window[1])
        title = {"spread": "standard deviation (DDPM), 0 to 300 HU", "CT": "CT (truth)"}.get(name, name)
        place.set_title(title.replace(f", {SAMPLES}", f"\nmean of {SAMPLES}"), fontsize=8)
    for place in figure.axes:
        place.set_axis_off()
    figure.savefig(path, dpi=110)

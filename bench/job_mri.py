"""MRI as whole jobs: the left-out head and measured brains against CG-SENSE and tuned compressed sensing, and a volume
from its file to NIfTI with the share of time outside the network.

Quality: PSNR and SSIM of magnitudes inside the head (air is left out: what a measured reference shows there is noise),
with the largest value of the reference there as the range.
All methods get the same data and the same maps, by ESPIRiT from the 24 x 24 central points, as a calibration scan gives
them. CG-SENSE gets its best number of iterations and compressed sensing its best strength, both against the reference.
Figures go to bench/results/job_mri_quality.csv. Volumes that are not in the repository are taken from $RECON3D_DATA.
"""

from __future__ import annotations

import csv
import datetime
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor

from bench._common import RESULTS, Gate, Refused, Row, commit, machine
from recon3d import baselines, reconstruct_mri
from recon3d.geometry import Trajectory, VolumeGrid
from recon3d.io import KSpace, read_kspace, read_nifti, write_kspace_hdf5
from recon3d.metrics import psnr, ssim
from recon3d.operators import CartesianMRI, GaussianNoise, LinearOperator, NonCartesianMRI, simulate_mri
from recon3d.operators.coils import noise_covariance, outer_noise, prewhiten
from recon3d.operators.espirit import espirit
from recon3d.operators.masks import equispaced
from recon3d.testing.phantoms import coil_maps, smooth_phase

HEAD = "mr/mr_brain_oms20_t1w.nii.gz"  # no packaged prior was trained on it
BRAIN = "raw_mr/brain_cartesian_vfa_13ch.h5"
RADIAL = "raw_mr/brain_radial_vfa_5ch.h5"
COILS = 8
NOISE = 0.015  # of a k-space sample's part, in units of the head's 99.9th percentile
ACCELERATIONS = ((4, 0.08), (8, 0.04))  # and the part of the lines in the fully sampled centre
OUTSIDE_LIMIT = 0.15


def run(quick: bool, device: str) -> list[Row]:
    """Two slices of everything when quick; else all slices of the head, and the whole job."""
    rows = []
    if (data := _data(HEAD)) is not None:
        head, _ = left_out_head(data, (44, 224, 192))
        keep = [14, 31] if quick else range(head.shape[0])
        rows += _simulated("left-out head, simulated", head[list(keep)], device)
    if (data := _data(BRAIN)) is not None:
        rows += _measured(data, device)
    if (data := _data(RADIAL)) is not None:
        rows += _radial(data, device)
    if not quick and (data := _data(HEAD)) is not None:
        rows.append(whole_job(data, device))
    return rows


def left_out_head(path: Path, shape: tuple[int, int, int]) -> tuple[Tensor, VolumeGrid]:
    """Magnitudes [z, y, x] on a grid of `shape`: interpolated along z, cut or filled with air in plane."""
    volume, grid = read_nifti(path)
    volume = volume.float()
    if shape[0] != volume.shape[0]:
        at = torch.linspace(0, volume.shape[0] - 1, shape[0])
        low = at.floor().long().clamp(max=volume.shape[0] - 2)
        part = (at - low)[:, None, None]
        volume = (1 - part) * volume[low] + part * volume[low + 1]
    out = torch.zeros(shape)
    cut, to = [], []
    for have, want in zip(volume.shape[1:], shape[1:], strict=True):
        n = min(have, want)
        cut.append(slice((have - n) // 2, (have - n) // 2 + n))
        to.append(slice((want - n) // 2, (want - n) // 2 + n))
    out[:, to[0], to[1]] = volume[:, cut[0], cut[1]]
    dz, dy, dx = grid.spacing_mm
    return out, VolumeGrid(shape, (dz * volume.shape[0] / shape[0], dy, dx))


def head_mask(magnitude: NDArray[np.float64]) -> NDArray[np.bool_]:
    """The largest bright region of each slice [z, y, x], its holes filled."""
    out = np.zeros(magnitude.shape, dtype=bool)
    for k, image in enumerate(magnitude):
        labels, count = ndimage.label(ndimage.uniform_filter(image, 5) > 0.1 * np.percentile(image, 99))
        if count:
            largest = 1 + int(np.argmax(np.bincount(labels.ravel())[1:]))
            out[k] = ndimage.binary_fill_holes(labels == largest)
    return out


def _simulated(name: str, head: Tensor, device: str) -> list[Row]:
    rows = []
    shape = tuple(head.shape)
    truth = head * smooth_phase(shape, seed=5, turns=1.0)
    sensitivities = coil_maps(COILS, shape)
    sigma = NOISE * float(np.percentile(head.numpy(), 99.9))
    full = simulate_mri(truth, CartesianMRI(torch.ones(shape[2]), sensitivities), noise=GaussianNoise(sigma), seed=1)
    maps = espirit(full, 24)
    for acceleration, centre in ACCELERATIONS:
        mask = equispaced(shape[2], acceleration, centre, seed=1)
        operator = CartesianMRI(mask, maps)
        case = f"{name}, {shape[0]} x {shape[1]} x {shape[2]}, {COILS} coils, x{acceleration}"
        rows += _case(case, full * mask, mask, operator, sigma, truth.abs(), device)
    return rows


def _measured(path: Path, device: str) -> list[Row]:
    rows = []
    raw = read_kspace(path)
    white = prewhiten(raw.data, noise_covariance(outer_noise(raw.data, share=0.05)))
    full, maps = white.kspace, espirit(white.kspace, 24)
    reference = CartesianMRI(torch.ones(full.shape[-1]), maps).pinv(full).abs()
    for acceleration, centre in ACCELERATIONS:
        mask = equispaced(full.shape[-1], acceleration, centre, seed=1)
        operator = CartesianMRI(mask, maps)
        case = f"measured brain, {full.shape[0]} slices of {full.shape[2]}², {full.shape[1]} coils, x{acceleration}"
        rows += _case(case, full * mask, mask, operator, white.sigma, reference, device)
    return rows


def _radial(path: Path, device: str) -> list[Row]:
    """Every sixth of 204 spokes, so that the mixture of contrasts is that of the reference: CG-SENSE of all of them."""
    raw = read_kspace(path, merge_frames=True)
    assert raw.trajectories is not None
    every, spokes = raw.trajectories[0], 204
    per = every.n_samples // spokes
    keep = (torch.arange(0, spokes, 6)[:, None] * per + torch.arange(per)).flatten()
    outer = raw.data.reshape(1, -1, spokes, per)[..., [0, 1, 2, 3, -4, -3, -2, -1]]
    white = prewhiten(raw.data, noise_covariance(outer))
    n = every.shape[0]
    maps = espirit(_gridded_centre(white.kspace, every, 24), 24, shape=(n, n))
    whole = NonCartesianMRI(every, maps)
    reference = baselines.cg_sense(white.kspace, whole, 15).abs()
    few = Trajectory(every.points[keep], every.shape)
    return _case(
        f"measured brain, radial, 34 of 204 spokes, {n}², {raw.data.shape[1]} coils",
        white.kspace[..., keep].contiguous(), few, NonCartesianMRI(few, maps), white.sigma, reference, device,
    )  # fmt: skip


def _gridded_centre(kspace: Tensor, trajectory: Trajectory, size: int) -> Tensor:
    """The Cartesian centre [slice, coil, size, size] of coil images reconstructed from all samples, coil by coil."""
    from recon3d.operators.fourier import centred_fft

    one = torch.ones(1, 1, *trajectory.shape, dtype=torch.complex64)
    operator = NonCartesianMRI(trajectory, one)
    images = torch.stack([baselines.cg_sense(kspace[:, c : c + 1], operator, 10) for c in range(kspace.shape[1])], 1)
    cut = [slice(n // 2 - size // 2, n // 2 - size // 2 + size) for n in trajectory.shape]
    return centred_fft(images)[..., cut[0], cut[1]]


def _case(
    case: str,
    y: Tensor,
    sampling: Tensor | Trajectory,
    operator: LinearOperator,
    sigma: float,
    reference: Tensor,
    device: str,
) -> list[Row]:
    """All methods on one measurement."""
    truth = reference.numpy().astype(np.float64)
    inside = head_mask(truth)
    top = float(truth[inside].max())
    seconds: dict[str, tuple[float, float]] = {}
    figures: dict[str, tuple[float, float]] = {}

    def judge(x: Tensor) -> tuple[float, float]:
        found = x.abs().numpy().astype(np.float64)
        return psnr(found, truth, top, inside), float(np.nanmean(ssim(found, truth, top, inside)))

    def timed(name: str, make: Callable[[], Tensor]) -> None:
        wall, cpu = time.perf_counter(), time.process_time()
        x = make()
        seconds[name] = time.perf_counter() - wall, time.process_time() - cpu
        figures[name] = judge(x)
        print(
            f"{case}: {name}: {figures[name][0]:.2f} dB, {figures[name][1]:.4f}, {seconds[name][1]:.1f} s CPU",
            flush=True,
        )

    timed("zero-filled", lambda: operator.pinv(y))
    steps = max(range(2, 21), key=lambda n: judge(baselines.cg_sense(y, operator, n))[0])
    timed(f"CG-SENSE, {steps} iterations", lambda: baselines.cg_sense(y, operator, steps))
    for kind in ("tv", "wavelet"):
        tuned = baselines.tune_cs(y, operator, reference, regulariser=kind)
        timed(f"CS {kind}, tuned", lambda kind=kind, s=tuned.strength: baselines.cs(y, operator, s, regulariser=kind))

    def ours() -> Tensor:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return reconstruct_mri(
                y, sampling, operator.maps, noise=GaussianNoise(sigma), device=device, accept_mismatch=True
            ).volume

    timed("recon3d mri", ours)
    _record(case, figures, seconds)
    best = max(v[0] for k, v in figures.items() if k != "recon3d mri")
    gate = Gate("best rival's PSNR above ours", best - figures["recon3d mri"][0], 0.0)
    if not gate.passed:
        raise Refused(f"job_mri, {case}: {gate.what} by {gate.value:.2f} dB")
    wall, cpu = seconds["recon3d mri"]
    return [
        Row(
            op="job_mri", case=case, direction="volume", device=device, ours_ms=1e3 * wall, ours_cpu_ms=1e3 * cpu,
            rival=name, rival_ms=1e3 * w, rival_cpu_ms=1e3 * c, ratio=w / wall, cpu_ratio=c / cpu,
            ours_error=figures["recon3d mri"][0], rival_error=figures[name][0],
            peak_mb=float("nan"), rival_peak_mb=float("nan"),
        )
        for name, (w, c) in seconds.items()
        if name != "recon3d mri"
    ]  # fmt: skip


def whole_job(path: Path, device: str, slices: int = 64, size: int = 256, overrides: tuple[str, ...] = ()) -> Row:
    """From a k-space file to NIfTI through `recon3d recon`: 64 slices, 8 coils, 256², every fourth column."""
    head, grid = left_out_head(path, (slices, size, size))
    mask = equispaced(size, 4, 0.08, seed=1)
    truth = head * smooth_phase(tuple(head.shape), seed=5, turns=1.0)
    sigma = NOISE * float(np.percentile(head.numpy(), 99.9))
    operator = CartesianMRI(mask, coil_maps(COILS, tuple(head.shape)))
    y = simulate_mri(truth, operator, noise=GaussianNoise(sigma), seed=2)
    with tempfile.TemporaryDirectory() as folder:
        scan, out = Path(folder) / "head.h5", Path(folder) / "run"
        write_kspace_hdf5(scan, KSpace(y, mask.expand(size, size).contiguous(), None, grid))
        wall, cpu = time.perf_counter(), _children_cpu()
        command = [sys.executable, "-m", "recon3d", "recon", "-i", str(scan), "-o", str(out), "--recipe", "mri", "-q"]
        command += ["--prior", "mr", "--device", device, *overrides]
        subprocess.run(command, check=True, cwd=Path(__file__).parents[1])
        wall, cpu = time.perf_counter() - wall, _children_cpu() - cpu
        timings = json.loads((out / "manifest.json").read_text())["timings"]
        volume, _ = read_nifti(out / "volume.nii.gz")
    inside = (head > 0.05 * head.max()).numpy()
    figure = psnr(volume.numpy(), head.numpy(), float(head.max()), inside)
    # of everything the process does: start, reading, coil maps, the loop, writing
    share = 1 - timings["cpu_network_s"] / cpu
    case = f"file to NIfTI, {slices} x {size}², {COILS} coils, x4"
    print(
        f"{case}: {wall:.0f} s, {cpu:.0f} s of processor time, {100 * share:.1f} % of it outside the network "
        f"({100 * timings['cpu_outside_network_share']:.1f} % in the loop alone), {figure:.2f} dB"
    )
    print(json.dumps(timings))
    if share > OUTSIDE_LIMIT:
        print(
            f"{case}: more than {100 * OUTSIDE_LIMIT:.0f} % of the time is spent outside the network", file=sys.stderr
        )
    return Row(
        op="job_mri", case=case, direction="file to NIfTI", device=device, ours_ms=1e3 * wall,
        ours_cpu_ms=1e3 * cpu, rival="share outside the network", rival_ms=float("nan"), rival_cpu_ms=float("nan"),
        ratio=share, cpu_ratio=share, ours_error=figure, rival_error=float("nan"),
        peak_mb=float("nan"), rival_peak_mb=float("nan"),
    )  # fmt: skip


def _children_cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _record(case: str, figures: dict[str, tuple[float, float]], seconds: dict[str, tuple[float, float]]) -> None:
    path = RESULTS / "job_mri_quality.csv"
    new = not path.exists()
    with path.open("a", newline="") as file:
        out = csv.writer(file)
        if new:
            out.writerow(["date", "commit", "machine", "case", "method", "psnr_db", "ssim", "seconds", "cpu_seconds"])
        for name, (decibel, similarity) in figures.items():
            row = [datetime.date.today(), commit(), machine("cpu"), case, name, f"{decibel:.2f}", f"{similarity:.4f}"]
            out.writerow([*row, *(f"{s:.1f}" for s in seconds[name])])


def _data(name: str) -> Path | None:
    root = os.environ.get("RECON3D_DATA") or Path(__file__).parents[2] / "shared" / "data"
    path = Path(root) / name
    if not path.exists():
        print(f"{name} is not at hand (set RECON3D_DATA to its folder): its cases are left out")
        return None
    return path

"""Whole jobs on the left-out chest: what they reach in every plane, what they cost, and where the time goes.

The rivals are tuned total variation and the published recipes, each with the same projector, noise weights and
network; figures go to bench/results/job_quality.csv, times to bench/results/job.csv.
"""

from __future__ import annotations

import csv
import datetime
import math
import time
import warnings
from collections.abc import Callable

from torch import Tensor

from bench._common import RESULTS, Gate, Refused, Row, commit, machine
from recon3d import baselines, demo
from recon3d.api import reconstruct
from recon3d.metrics import compare
from recon3d.operators import CTOperator
from recon3d.report import markdown, metrics_table

RECIPES = ("dds", "dds_tv", "dds_iscs", "ct")


def run(quick: bool, device: str) -> list[Row]:
    """Reconstruct the chest from 20 and 40 views with every method; 8 slices and 40 views when quick."""
    rows: list[Row] = []
    for views in (40,) if quick else (20, 40):
        rows += _views(views, 8 if quick else None, device)
    return rows


def _views(views: int, slices: int | None, device: str) -> list[Row]:
    job = demo.chest(views=views, slices=slices)
    assert job.noise is not None
    weights = job.noise.weights(job.y)
    operator = CTOperator(job.geometry, job.grid)
    case = f"chest {job.grid.shape[0]} x {job.grid.shape[1]}², {views} views, 5e4 photons"
    seconds: dict[str, tuple[float, float]] = {}
    figures: dict[str, dict] = {}
    peaks: dict[str, float] = {}

    def timed(name: str, make: Callable[[], Tensor]) -> None:
        wall, cpu = time.perf_counter(), time.process_time()
        volume = make()
        seconds[name] = time.perf_counter() - wall, time.process_time() - cpu
        figures[name] = {**compare(volume, job.reference, job.grid), "seconds": seconds[name][0]}

    def recipe(name: str) -> Tensor:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result = reconstruct(
                job.y, job.geometry, job.grid, name, job.prior, noise=job.noise, device=device, accept_mismatch=True
            )
        peaks[f"recon3d {name}"] = result.peak_memory_bytes / 1e6  # of the process so far
        share = 100 * result.timings.cpu_outside_network
        print(f"{case}: {name} {result.timings.total:.1f} s, {share:.0f} % of the processor time outside the network")
        return result.volume

    timed("FBP", lambda: demo.fbp(job.y, job.geometry, job.grid.slice_shape, job.grid.pixel_mm, window="hann"))
    timed("SIRT", lambda: baselines.sirt(job.y, operator, iterations=100, weights=weights))
    tuned = baselines.tune(lambda s: baselines.tv3d(job.y, operator, s, weights=weights), job.reference)
    timed("3D TV, tuned", lambda: baselines.tv3d(job.y, operator, tuned.strength, weights=weights))
    for name in RECIPES:
        timed(f"recon3d {name}", lambda name=name: recipe(name))

    print(markdown(*metrics_table(figures)))
    _record(case, figures)
    error = {name: figure["volume"]["rmse"] for name, figure in figures.items()}
    ours = "recon3d ct"
    gate = Gate("RMSE in HU against the best rival's", error[ours], min(v for k, v in error.items() if k != ours))
    if not gate.passed:
        raise Refused(f"job, {case}: {gate.what} is {gate.value:.1f}, limit {gate.limit:.1f}")
    wall, cpu = seconds[ours]
    return [
        Row(
            op="job", case=case, direction="volume", device=device, ours_ms=1e3 * wall, ours_cpu_ms=1e3 * cpu,
            rival=name, rival_ms=1e3 * w, rival_cpu_ms=1e3 * c, ratio=w / wall, cpu_ratio=c / cpu,
            ours_error=error[ours], rival_error=error[name],
            peak_mb=peaks.get(ours, math.nan), rival_peak_mb=peaks.get(name, math.nan),
        )
        for name, (w, c) in seconds.items()
        if name != ours
    ]  # fmt: skip


def _record(case: str, figures: dict[str, dict]) -> None:
    path = RESULTS / "job_quality.csv"
    planes = ("axial", "coronal", "sagittal", "planes_mean")
    header = ["date", "commit", "machine", "case", "method", "rmse_hu", "seconds"]
    header += [f"{plane}_{figure}" for plane in planes for figure in ("psnr_db", "ssim")]
    new = not path.exists()
    with path.open("a", newline="") as file:
        out = csv.writer(file)
        if new:
            out.writerow(header)
        for name, figure in figures.items():
            row = [datetime.date.today(), commit(), machine("cpu"), case, name]
            row += [f"{figure['volume']['rmse']:.2f}", f"{figure['seconds']:.1f}"]
            row += [f"{figure[plane][k]:.4f}" for plane in planes for k in ("psnr_db", "ssim")]
            out.writerow(row)

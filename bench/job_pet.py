"""A whole PET reconstruction on the mMR's geometry: what it costs, and which part of it is the projector's.

A drawn body (an elliptic trunk with hot and cold spheres) is simulated with attenuation, scatter and randoms and
reconstructed by `pet_dds` with the default prior: 252 views x 344 x 837 planes (span 11), 128 x 128 x 127 voxels, 28
subsets, 30 levels. Quick: a small scanner, four levels, eight subsets. The parts are wall and processor time of the
network, of the projector (every forward and adjoint: the start image's, the sensitivity's and the updates'), of the
passes over counts and volume (Poisson ratio, EM update), and the rest. Ordered-subsets EM alone stands beside it.
"""

from __future__ import annotations

import math
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from bench._common import Gate, Row, judge
from recon3d import baselines, ops, reconstruct_pet
from recon3d.geometry import VolumeGrid, pet_geometry
from recon3d.operators import simulate_pet
from recon3d.recipes import load_recipe
from recon3d.testing.pet_phantoms import body_phantom

PROJECTOR_LIMIT = 0.5  # of the wall time
ERROR_LIMIT = 0.5  # of the volume in the body: a job that went wrong is not timed
# scanner, span, mashing, grid, pixel, subsets, levels, counts; in full and quick
SIZES = {False: ("mmr", 11, 1, (127, 128, 128), 2.0863, 28, 30, 1e8), True: ("small", 3, 2, None, None, 8, 4, 2e6)}


_PROJECTOR = ("joseph3d_sinogram", "joseph3d_sinogram_adjoint")
_PASSES = ("poisson_ratio", "em_update")


class Clock:
    """Stands in for a function and adds up the seconds spent in it."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function, self.wall, self.cpu = function, 0.0, 0.0

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        wall, cpu = time.perf_counter(), time.process_time()
        out = self.function(*arguments, **named)
        if isinstance(out, Tensor) and out.is_cuda:
            torch.cuda.synchronize(out.device)
        self.wall += time.perf_counter() - wall
        self.cpu += time.process_time() - cpu
        return out


def run(quick: bool, device: str) -> list[Row]:
    """One row per part of the job, and one for ordered subsets alone."""
    name, span, mashing, shape, pixel_mm, subsets, levels, counts = SIZES[quick]
    geometry = pet_geometry(name, span=span, mashing=mashing)
    grid = geometry.default_grid(n=64)
    if shape is not None and pixel_mm is not None:
        grid = VolumeGrid(shape, (geometry.scanner.ring_spacing_mm / 2, pixel_mm, pixel_mm))
    nz, ny, nx = grid.shape
    case = (
        f"{name}, {' x '.join(map(str, geometry.shape))} bins, {ny} x {nx} x {nz}, {subsets} subsets, {levels} levels"
    )
    body = body_phantom(grid, shrink=0.42 * ny * grid.spacing_mm[1] / 147.0)
    scan = simulate_pet(body.activity, grid, geometry, mu_per_mm=body.mu_per_mm, counts=counts, seed=1)
    sizes = {"trajectory.levels": levels, "consistency.subsets": subsets, "start.subsets": subsets}
    recipe = load_recipe("pet_dds", sizes)

    wall, cpu = time.perf_counter(), time.process_time()
    osem = baselines.osem(scan.prompts, scan.operator(), 2, subsets)
    osem_time = time.perf_counter() - wall, time.process_time() - cpu
    with ExitStack() as stack:
        clocks = {n: Clock(getattr(ops, n)) for n in (*_PROJECTOR, *_PASSES)}
        for function, clock in clocks.items():
            stack.enter_context(patch.object(ops, function, clock))
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        wall, cpu = time.perf_counter(), time.process_time()
        result = reconstruct_pet(
            scan.prompts, geometry, scan.factors, scan.additive, grid, recipe, "pet", scale=scan.scale,
            device="cuda" if device == "cuda" else "cpu", accept_mismatch=True,
        )  # fmt: skip
        total = time.perf_counter() - wall, time.process_time() - cpu
    parts = {
        "network": (result.timings.network, result.timings.cpu_network),
        "projector": _spent(clocks, _PROJECTOR),
        "passes over counts and volume": _spent(clocks, _PASSES),
    }
    wall, cpu = (t - sum(part[k] for part in parts.values()) for k, t in enumerate(total))
    parts["rest"] = (wall, cpu)
    inside = body.regions["body"]
    error = {k: _error(v, body.activity, inside) for k, v in (("ours", result.volume), ("OSEM", osem))}
    judge(f"job_pet, {case}", [Gate("relative error in the body", error["ours"], ERROR_LIMIT)])
    print(
        f"{case}: {total[0]:.1f} s, {total[1]:.1f} s of processor time; relative error in the body {error['ours']:.3f}"
    )
    for part, (seconds, cpu_seconds) in parts.items():
        print(
            f"  {part}: {seconds:.1f} s, {100 * seconds / total[0]:.1f} %; "
            f"{cpu_seconds:.1f} s of processor time, {100 * cpu_seconds / total[1]:.1f} %"
        )
    share = parts["projector"][0] / total[0]
    if share > PROJECTOR_LIMIT:
        print(f"{case}: the projector takes {100 * share:.0f} % of the time, more than half", file=sys.stderr)
    both = error["ours"], error["OSEM"]
    rows = [_row(case, part, device, mine, "whole job", total, both) for part, mine in parts.items()]
    return [*rows, _row(case, "volume", device, total, "OSEM alone, 2 passes", osem_time, both)]


def _spent(clocks: dict[str, Clock], names: tuple[str, ...]) -> tuple[float, float]:
    return sum(clocks[n].wall for n in names), sum(clocks[n].cpu for n in names)


def _row(
    case: str, what: str, device: str, mine: tuple[float, float], rival: str, its: tuple[float, float],
    errors: tuple[float, float],
) -> Row:  # fmt: skip
    wall, cpu = (1e3 * max(t, 1e-6) for t in mine)
    return Row(
        op="job_pet", case=case, direction=what, device=device, ours_ms=wall, ours_cpu_ms=cpu,
        rival=rival, rival_ms=1e3 * its[0], rival_cpu_ms=1e3 * its[1], ratio=1e3 * its[0] / wall,
        cpu_ratio=1e3 * its[1] / cpu, ours_error=errors[0], rival_error=errors[1],
        peak_mb=math.nan, rival_peak_mb=math.nan,
    )  # fmt: skip


def _error(x: Tensor, truth: Tensor, inside: Tensor) -> float:
    want = truth[inside].double()
    return float((x[inside].double() - want).norm() / want.norm())

"""How much memory and time a job will take, told before anything the size of the volume is allocated.

Memory is counted: the process as it stands (libraries, weights, the measurement), whole volumes and sinograms of the
largest phase, and the activations of the slices in flight, measured by denoising so many slices once. It does not
depend on the number of levels. Time is an estimate: seconds of such a pass times the number of prior and projector
calls; other work on the machine changes it.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from recon3d.config import ComputeConfig
from recon3d.engine.executor import Executor, usable_cores
from recon3d.engine.memory import available_bytes, peak_above, resident_bytes, trim

if TYPE_CHECKING:
    from recon3d.engine.problem import Problem

# volumes alive at once, see the loop: while the prior runs, u and x0; in the data term also x, r, p and A^T A p
_PRIOR_VOLUMES, _DATA_VOLUMES = 2, 6
_DUAL_VOLUMES = 2
# sinograms made in the data term: A p, and its weighted copy
_DATA_SINOGRAMS = 2


@dataclass(frozen=True)
class Plan:
    """What a job is predicted to take.

    Attributes:
        host_bytes: peak resident memory of the process.
        device_bytes: peak memory on the GPU; 0 on a CPU.
        parts: bytes by what they are for, of the largest phase.
        seconds: an estimate; None without a probe.
        levels: visits of the prior to every slice.
        device: "cpu" or "cuda".
        available: bytes free on the host.
        device_available: bytes free on the GPU.
        budget: bytes allowed by the job; None for all that is free.
    """

    host_bytes: int
    device_bytes: int
    parts: dict[str, int]
    seconds: float | None
    levels: int
    device: str
    available: int
    device_available: int = 0
    budget: int | None = None
    resident: int = 0
    seconds_by: dict[str, float] = field(default_factory=dict)

    @property
    def short_of_memory(self) -> str | None:
        """One sentence when the job does not fit, else None."""
        allowed = self.available + self.resident if self.budget is None else self.budget
        what = "free" if self.budget is None else "allowed by compute.memory_budget_gib"
        hint = "choose a smaller grid, fewer slices or fewer workers, or start it anyway with --force"
        if self.host_bytes > allowed:
            return f"memory: {_gib(self.host_bytes)} predicted, {_gib(allowed)} {what}; {hint}"
        if self.device_bytes > self.device_available:
            return f"GPU memory: {_gib(self.device_bytes)} predicted, {_gib(self.device_available)} free; {hint}"
        return None

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "host_bytes": self.host_bytes,
            "device_bytes": self.device_bytes,
            "parts_bytes": self.parts,
            "estimated_s": None if self.seconds is None else round(self.seconds, 1),
            "estimated_by_s": {name: round(value, 1) for name, value in self.seconds_by.items()},
            "levels": self.levels,
            "device": self.device,
            "available_bytes": self.available,
        }

    def text(self) -> str:
        """For people."""
        lines = [f"peak memory  {_gib(self.host_bytes)} of {_gib(self.available + self.resident)} that can be had"]
        lines += [f"  {name:26} {_gib(size)}" for name, size in self.parts.items()]
        if self.device_bytes:
            lines.append(f"GPU memory   {_gib(self.device_bytes)} of {_gib(self.device_available)} free")
        if self.seconds is not None:
            split = ", ".join(f"{name} {_duration(value)}" for name, value in self.seconds_by.items())
            lines.append(f"time         {_duration(self.seconds)} for {self.levels} levels on {self.device} ({split}),")
            lines.append("             an estimate from a short probe; other work on this machine changes it")
        short = self.short_of_memory
        return "\n".join([*lines, *([f"does not fit: {short}"] if short else [])])


def predict(problem: Problem, compute: ComputeConfig, probe: bool = True) -> Plan:
    """Predict peak memory and time.

    Args:
        problem: what is to be reconstructed; its measurement and prior are in memory already.
        compute: the machine's settings.
        probe: also time the prior and the projector; a second or two.

    Returns:
        The plan; `short_of_memory` says whether it fits.
    """
    cuda = problem.device.type == "cuda"
    workers = compute.workers or usable_cores()
    batch = compute.batch_size or (8 if cuda else workers)
    flight = min(batch if cuda else min(batch, workers), problem.grid.shape[0])
    trim()  # what reading left behind is not the job's
    resident = resident_bytes()
    recipe = problem.recipe.resolved()
    levels = len(_levels(problem))
    activations, seconds_by = _probe(problem, compute, flight, workers, probe, levels)
    voxel_bytes = 4 * problem.grid.shape[0] * problem.grid.shape[1] * problem.grid.shape[2]
    sinogram_bytes = 4 * problem.y.numel()
    duals = _DUAL_VOLUMES if recipe.regulariser.kind == "tvz" else 0
    weights = sinogram_bytes if problem.noise is not None and _full_weights(problem) else 0
    # the preconditioner keeps a map of the rays' weights, and one filtered direction in the data term
    kept = 1 if recipe.consistency.precondition != "none" else 0
    kept += duals
    prior_phase = (_PRIOR_VOLUMES + kept) * voxel_bytes + activations
    extra = kept  # the split's right-hand side and its difference; the filtered direction
    data_phase = (_DATA_VOLUMES + kept + extra) * voxel_bytes + _DATA_SINOGRAMS * sinogram_bytes
    if prior_phase >= data_phase:
        parts = {"volumes": (_PRIOR_VOLUMES + kept) * voxel_bytes, "activations": activations, "weights": weights}
    else:
        parts = {
            "volumes": (_DATA_VOLUMES + kept + extra) * voxel_bytes,
            "sinograms": _DATA_SINOGRAMS * sinogram_bytes,
            "weights": weights,
        }
    work = sum(parts.values())
    if cuda:
        free, _ = torch.cuda.mem_get_info(problem.device)
        host = {"process with data and prior": resident, "volume on the host": voxel_bytes}
        return Plan(
            sum(host.values()), work + sinogram_bytes, host, _total(seconds_by), levels, "cuda", available_bytes(),
            int(free), _budget(compute), resident, seconds_by,
        )  # fmt: skip
    parts = {"process with data and prior": resident, **{name: size for name, size in parts.items() if size}}
    return Plan(
        sum(parts.values()), 0, parts, _total(seconds_by), levels, "cpu", available_bytes(), 0, _budget(compute),
        resident, seconds_by,
    )  # fmt: skip


def _probe(
    problem: Problem, compute: ComputeConfig, flight: int, workers: int, timed: bool, levels: int
) -> tuple[int, dict[str, float]]:
    """Bytes of activations with `flight` slices at once and, when `timed`, estimated seconds by part."""
    nz, ny, nx = problem.grid.shape
    device, sigma = problem.device, problem.prior.scale
    x = torch.full((flight, ny, nx), problem.prior.offset, dtype=torch.float32, device=device)
    views = list(range(flight))
    with Executor(compute.batch_size, workers) as executor:
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            before = torch.cuda.memory_allocated(device)
            executor.denoise(problem.prior, _Rows(), x, views, sigma)
            activations = torch.cuda.max_memory_allocated(device) - before
        else:
            with peak_above() as peak:
                executor.denoise(problem.prior, _Rows(), x, views, sigma)
            activations = peak[0]
        if not timed:
            return activations, {}
        executor.seconds = 0.0
        executor.denoise(problem.prior, _Rows(), x, views, sigma)  # the first pass may have compiled or tuned
        network = executor.seconds / flight
    operator = problem.operator()
    operator.adjoint(operator(x))
    start = time.perf_counter()
    operator.adjoint(operator(x))
    if x.is_cuda:
        torch.cuda.synchronize(x.device)
    projector = (time.perf_counter() - start) / flight
    calls = levels * (problem.recipe.resolved().consistency.iterations + 1)
    return activations, {"network": network * nz * levels, "projector": projector * nz * calls}


class _Rows:
    """The first rows of a stack as views, for the probe."""

    def gather(self, u: Tensor, view: int) -> Tensor:
        return u[view][None, None]

    def scatter(self, out: Tensor, x0: Tensor, view: int) -> None:
        out[view] = x0[0, 0]


def _levels(problem: Problem) -> list[Any]:
    from recon3d.engine.assemble import levels

    return list(levels(problem.recipe.resolved().trajectory, problem.prior.scale))


def _full_weights(problem: Problem) -> bool:
    assert problem.noise is not None
    return problem.noise.weights(problem.y[:1, :1, :2]).numel() > 1


def _total(seconds_by: dict[str, float]) -> float | None:
    return sum(seconds_by.values()) * 1.03 if seconds_by else None


def _budget(compute: ComputeConfig) -> int | None:
    return None if compute.memory_budget_gib is None else int(compute.memory_budget_gib * 2**30)


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"

"""How much memory and time a job will take, told before anything the size of the volume is allocated.

Memory is counted: the process as it stands (libraries, weights, the measurement), whole volumes and what the scanner
needs in the largest phase, and the activations of the slices in flight, measured by denoising so many slices once. It
does not depend on the number of levels. Time is an estimate: seconds of such a pass times the number of prior and
projector calls; other work on the machine changes it.
"""

from __future__ import annotations

import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from recon3d.config import ComputeConfig
from recon3d.engine.batch import gpu_batch
from recon3d.engine.executor import Executor, usable_cores
from recon3d.engine.memory import available_bytes, peak_above, resident_bytes, trim
from recon3d.planes import View
from recon3d.priors.base import differentiable
from recon3d.priors.per_plane import prior_of
from recon3d.trajectory import Level, expected_visits

if TYPE_CHECKING:
    from recon3d.engine.problem import Problem
    from recon3d.recipes.model import Recipe

# volumes alive at once, see loop.py and consistency/solve.py: u and x0 while the prior runs; in the data term also x,
# r, p and A^T A p; with the filter preconditioner its map, the outer residual, the filter's argument and answer
_PRIOR_VOLUMES, _DATA_VOLUMES, _FILTER_VOLUMES = 2, 6, 5
# split and dual of total variation along z; the pull towards them and its difference in the data term
_DUAL_VOLUMES, _PULL_VOLUMES = 2, 2
# a step of several visits: Heun's half-way state; base and slopes of a Runge-Kutta step, and its error
_STEP_VOLUMES = {"heun": 1, "rk45": 9}
# volumes of complex numbers that the filter preconditioner takes for one slab
_SPECTRA, _SPECTRUM_SLAB = 5, 8
# code and tables that load on first use, and gaps in the heap: 5 to 55 MiB measured over recipes and sizes
_OVERHEAD = 32 << 20
# mean and squared deviations of several samples (complex mean, both of magnitudes); std and both ends of the interval
_MOMENTS, _MAPS = 2, 3
# picture: the direct image, both volumes in their unit, and the plotting library
_PICTURE_VOLUMES, _PICTURE_BYTES = 5, 70 << 20


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
        batch_size: slices that the prior works on at once; None on a CPU leaves it to the workers.
        available: bytes free on the host.
        device_available: bytes free on the GPU.
        budget: bytes allowed by the job; None for all that is free.
        samples: runs with other random numbers, which `seconds` counts all.
    """

    host_bytes: int
    device_bytes: int
    parts: dict[str, int]
    seconds: float | None
    levels: int
    device: str
    available: int
    batch_size: int | None = None
    device_available: int = 0
    budget: int | None = None
    resident: int = 0
    samples: int = 1
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
            "samples": self.samples,
            "device": self.device,
            "batch_size": self.batch_size,
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
            work = f"{self.levels} levels" if self.samples == 1 else f"{self.samples} samples of {self.levels} levels"
            lines.append(f"time         {_duration(self.seconds)} for {work} on {self.device} ({split}),")
            lines.append("             an estimate from a short probe; other work on this machine changes it")
        short = self.short_of_memory
        return "\n".join([*lines, *([f"does not fit: {short}"] if short else [])])


def predict(
    problem: Problem,
    compute: ComputeConfig,
    probe: bool = True,
    picture: bool = False,
    samples: int = 1,
    disk: bool = True,
) -> Plan:
    """Predict peak memory and time.

    Args:
        problem: what is to be reconstructed; its measurement, weights and prior are in memory already.
        compute: the machine's settings.
        probe: also time the prior and the projector; a second or two.
        picture: count a preview too.
        samples: runs with other random numbers.
        disk: their moments lie in a folder while a sample is drawn.

    Returns:
        The plan; `short_of_memory` says whether it fits.
    """
    cuda = problem.scan.device.type == "cuda"
    workers = compute.workers or usable_cores()
    batch = compute.batch_size or (_gpu_batch(problem, workers) if cuda else workers)
    flight = min(batch if cuda else min(batch, workers), problem.scan.grid.shape[0])
    visits = _visits(problem)
    activations, seconds_by = _probe(problem, batch, flight, workers, probe, visits * samples)
    trim()  # what reading and the probe left behind is not the job's
    resident = resident_bytes()
    phases = _phases(problem, activations, picture and not cuda)
    if samples > 1:
        _add_samples(phases, problem, disk)
    parts = max(phases.values(), key=lambda found: sum(found.values()))
    budget = None if compute.memory_budget_gib is None else int(compute.memory_budget_gib * 2**30)
    seconds = sum(seconds_by.values()) * 1.03 if seconds_by else None
    device_bytes = free = 0
    if cuda:
        # a recorded graph keeps the activations for itself in every phase
        kept = max(sum(size for name, size in found.items() if name != "activations") for found in phases.values())
        device_bytes = kept + activations + problem.scan.y_bytes
        free = int(torch.cuda.mem_get_info(problem.scan.device)[0])
        # the sample that is finished, mean and squared deviations
        parts = {"volumes on the host": (1 if samples == 1 else 1 + _MOMENTS) * problem.scan.volume_bytes}
    parts = {"process with data and prior": resident, **{name: size for name, size in parts.items() if size}}
    parts["code and heap gaps"] = _OVERHEAD
    return Plan(
        host_bytes=sum(parts.values()),
        device_bytes=device_bytes,
        parts=parts,
        seconds=seconds,
        levels=visits,
        device=problem.scan.device.type,
        batch_size=batch if cuda else compute.batch_size,
        available=available_bytes(),
        device_available=free,
        budget=budget,
        resident=resident,
        samples=samples,
        seconds_by=seconds_by,
    )


def _phases(problem: Problem, activations: int, picture: bool) -> dict[str, dict[str, int]]:
    """Bytes beyond the process itself in each phase, by what they are for."""
    recipe, scan = problem.recipe.resolved(), problem.scan
    volume, depth, work = scan.volume_bytes, scan.grid.shape[0], scan.work_bytes()
    tv = recipe.regulariser.kind == "tvz"
    # EM that begins at the previous level's image keeps it
    duals = _DUAL_VOLUMES if tv else int(recipe.consistency.begin == "previous")
    duals += _STEP_VOLUMES.get(recipe.renoise.kind, 0)
    # a start image that the prior's scale was taken from stays
    kept = int(scan.keeps_start)
    data = {"volumes": (_DATA_VOLUMES + kept + duals + (_PULL_VOLUMES if tv else 0)) * volume, **work["data"]}
    filtered = recipe.consistency.precondition == "filter"
    if filtered:
        data["volumes"] += _FILTER_VOLUMES * volume
        data["spectra"] = _SPECTRA * volume * min(_SPECTRUM_SLAB, depth) // depth
    prior_volumes = _PRIOR_VOLUMES + kept + duals + (1 if filtered else 0)
    phases = {
        "prior": {"volumes": prior_volumes * volume, "activations": activations},
        "data": data,
        "start": {"volumes": (2 + kept) * volume, **work["start"]},
    }
    if picture:
        phases["picture"] = {"volumes": _PICTURE_VOLUMES * volume, "plotting": _PICTURE_BYTES}
    return phases


def _add_samples(phases: dict[str, dict[str, int]], problem: Problem, disk: bool) -> None:
    """What several samples need beside one run: the start image they share, and moments that no disk has."""
    volume, recipe = problem.scan.volume_bytes, problem.recipe.resolved()
    shared = 0 if problem.scan.keeps_start or recipe.start.image == "offset" else volume
    moments = 0 if disk else _MOMENTS * volume
    for name in ("prior", "data", "start"):
        phases[name]["volumes"] += shared + moments
    if "picture" in phases:
        phases["picture"]["volumes"] += _MAPS * volume
    phases["moments"] = {"volumes": (1 + _MOMENTS + _MAPS) * volume + shared}


def _probe(
    problem: Problem, batch: int, flight: int, workers: int, timed: bool, visits: int
) -> tuple[int, dict[str, float]]:
    """Bytes of activations with `flight` views at once and, when `timed`, estimated seconds by part."""
    scan, recipe = problem.scan, problem.recipe.resolved()
    activations, network = 0, 0.0
    for axis, calls in _calls(problem, visits).items():
        size, seconds = _probe_prior(problem, batch, flight, workers, timed, axis)
        activations, network = max(activations, size), network + seconds * calls
    part, share = scan.sample(flight)
    operator = part.operator()
    x = torch.full(part.grid.shape, problem.denoiser.offset, dtype=scan.dtype, device=scan.device)
    y = operator(x)
    with suppress(NotImplementedError):  # a part of the views has no direct inverse
        operator.pinv(y)  # the first call loads kernels and tables, which then count as the process's
    operator.residual(x, y)
    operator.normal(x)
    if not timed:
        return activations, {}
    start = time.perf_counter()
    operator.normal(x)
    if x.is_cuda:
        torch.cuda.synchronize(x.device)
    whole = (time.perf_counter() - start) / share
    return activations, {"network": network, "projector": whole * visits * _projections(recipe)}


def _gpu_batch(problem: Problem, workers: int) -> int:
    """The batch that fits beside what the largest phase keeps on the GPU."""
    scan = problem.scan
    kept = max(sum(sizes.values()) for sizes in _phases(problem, 0, picture=False).values()) + scan.y_bytes
    room = int(torch.cuda.mem_get_info(scan.device)[0]) - kept

    def activations(slices: int) -> int:
        return max(
            _probe_prior(problem, slices, slices, workers, False, axis)[0] for axis in _calls(problem, _visits(problem))
        )

    return gpu_batch(activations, room, scan.grid.shape[0])


def _calls(problem: Problem, visits: int) -> Counter[int]:
    """How many views the prior is asked about, by the axis that they lie across."""
    from recon3d.engine.assemble import planes

    seen = planes(problem.recipe.resolved().planes, problem.scan.grid.shape, problem.denoiser, problem.seed)
    levels = (Level(k, 1.0, 0.0, False) for k in range(visits))  # which slices are seen goes by the index alone
    return Counter(view.axis for level in levels for view in seen.views(level))


def _probe_prior(problem: Problem, batch: int, flight: int, workers: int, timed: bool, axis: int) -> tuple[int, float]:
    """Bytes of activations with `flight` views at once and, when `timed`, seconds of one, for views across an axis."""
    # a prior that records gradients is not compiled, which would be paid for every size of batch that is tried
    scan, prior = problem.scan, differentiable(prior_of(problem.denoiser, [View(0, axis=axis)]))
    consistency = problem.recipe.resolved().consistency
    guided = consistency.kind == "gradient" and consistency.through == "prior"
    rows, columns = (n for k, n in enumerate(scan.grid.shape) if k != axis)
    device, sigma = scan.device, prior.scale
    stack = _Stack(getattr(getattr(prior, "card", None), "slices", 1))
    x = torch.full((flight * stack.slices, rows, columns), prior.offset, dtype=scan.dtype, device=device)
    views = list(range(flight))
    cond = None if scan.guide is None else torch.zeros_like(x)

    def visit(executor: Executor) -> None:
        executor.denoise(prior, stack, x, views, sigma, cond=cond)
        if guided:
            executor.pull(prior, stack, x, views, sigma, x, cond=cond)

    with Executor(batch, workers) as executor:
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            before = torch.cuda.memory_allocated(device)
            visit(executor)
            activations = torch.cuda.max_memory_allocated(device) - before
        else:
            with peak_above() as peak:
                visit(executor)
            activations = peak[0]
        network = executor.seconds / flight
        if timed:  # the first pass may have compiled or tuned
            executor.seconds = 0.0
            visit(executor)
            network = executor.seconds / flight
    return activations, network


def _projections(recipe: Recipe) -> float:
    """Times per level that the whole measurement is projected and back projected."""
    c = recipe.consistency
    if c.kind in ("em", "gradient"):
        return (c.iterations if c.kind == "em" else 1) / c.subsets
    return c.iterations + 1


@dataclass(frozen=True)
class _Stack:
    """Views of so many slices each from a stack, for the probe."""

    slices: int

    def gather(self, u: Tensor, view: int) -> Tensor:
        return u[view * self.slices : (view + 1) * self.slices][None]

    def scatter(self, out: Tensor, x0: Tensor, view: int) -> None:
        out[view * self.slices : (view + 1) * self.slices] = x0[0]


def _visits(problem: Problem) -> int:
    from recon3d.engine.assemble import trajectory

    return expected_visits(trajectory(problem.recipe.resolved(), problem.denoiser.scale))


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"

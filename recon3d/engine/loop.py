"""The reconstruction loop: every method is this loop with parts exchanged.

The state is canonical, u = x0 + sigma eps in user units, whatever path the prior's network was trained on. Each pass
of the loop leaves a state from which the rest is determined, so it can be saved between any two levels and the run
continued to the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch
from torch import Tensor

from recon3d.consistency import Consistency, Guidance, Visit, conjugate_gradients, ordered_subsets_em
from recon3d.consistency.em import uniform_start
from recon3d.operators.base import LinearOperator
from recon3d.ops.philox import NoiseKey
from recon3d.planes import Planes, View
from recon3d.priors.base import Prior
from recon3d.priors.per_plane import prior_of
from recon3d.real_view import draw_like
from recon3d.renoise import Renoise
from recon3d.trajectory import Level, Trajectory, first_sigma, next_level

__all__ = ["Executor", "InProcess", "Job", "Start", "State", "begin", "reconstruct", "run", "start_image"]

# streams of the noise key: one level's different uses of noise stay independent
_STEP, _START = 0, 1


class Executor(Protocol):
    """Runs the prior over the views of a volume; recon3d.engine.executor has the one for real jobs."""

    def denoise(
        self,
        prior: Prior,
        planes: Planes,
        u: Tensor,
        views: Sequence[View],
        sigma: float,
        *,
        level: int = 0,
        cond: Tensor | None = None,
    ) -> Tensor:
        """The volume of estimates x0; u is not changed."""
        ...

    def pull(
        self,
        prior: Prior,
        planes: Planes,
        u: Tensor,
        views: Sequence[View],
        sigma: float,
        v: Tensor,
        *,
        level: int = 0,
        cond: Tensor | None = None,
    ) -> Tensor:
        """(dx0/du)^T v."""
        ...


class InProcess:
    """The executor in few lines: view after view, in the calling thread."""

    def denoise(
        self,
        prior: Prior,
        planes: Planes,
        u: Tensor,
        views: Sequence[View],
        sigma: float,
        *,
        level: int = 0,
        cond: Tensor | None = None,
    ) -> Tensor:
        x0 = torch.zeros_like(u)
        for view in views:
            beside = () if cond is None else (planes.gather(cond, view),)
            planes.scatter(x0, prior.denoise(planes.gather(u, view), sigma, *beside), view)
        return x0

    def pull(
        self,
        prior: Prior,
        planes: Planes,
        u: Tensor,
        views: Sequence[View],
        sigma: float,
        v: Tensor,
        *,
        level: int = 0,
        cond: Tensor | None = None,
    ) -> Tensor:
        out = torch.zeros_like(u)
        for view in views:
            beside = () if cond is None else (planes.gather(cond, view),)
            rows = planes.gather(u, view).detach().clone().requires_grad_()
            x0 = prior.denoise(rows, sigma, *beside)
            planes.scatter(out, torch.autograd.grad(x0, rows, planes.gather(v, view))[0], view)
        return out


@dataclass(frozen=True)
class Start:
    """Where the trajectory starts: u = image + sigma z at the first level.

    Attributes:
        image: "offset" is the prior's zero everywhere (a cold start), "pinv" the operator's direct inverse (FBP), "cg"
            conjugate gradients on A^T W A from the prior's zero, "osem" ordered-subsets EM on counts from a uniform
            image; or the image itself.
        iterations: of "cg"; passes over the data of "osem".
        weights: W of "cg"; None for 1.
        noise: key of the start's noise; None takes the job's, so that it is tied between slices as the steps' noise is.
        subsets: of "osem".
    """

    image: Literal["offset", "pinv", "cg", "osem"] | Tensor = "offset"
    iterations: int = 20
    weights: Tensor | None = None
    noise: NoiseKey | None = None
    subsets: int = 1


@dataclass
class Job:
    """Everything that stays fixed during a run.

    Attributes:
        operator: the scanner.
        y: its measurement.
        prior: what slices look like; recon3d.priors.per_plane.PerPlane has one for each plane.
        trajectory: the levels, in order; or the rule that finds them on the way.
        planes: which slices meet the prior.
        consistency: how the data enter.
        renoise: how to go to the next level.
        noise: key of all random numbers of the run, for the volume's slices.
        start: the first state.
        executor: runs the prior.
        cond: a volume that the prior is shown beside the state (an MR or CT image on the same grid), or None.
        check: called with (tensor, stage, level index) after every part; raises on NaN.
    """

    operator: LinearOperator
    y: Tensor
    prior: Prior
    trajectory: Trajectory
    planes: Planes
    consistency: Consistency | Guidance
    renoise: Renoise
    noise: NoiseKey
    start: Start = field(default_factory=Start)
    executor: Executor = field(default_factory=InProcess)
    cond: Tensor | None = None
    check: Callable[[Tensor, str, int], None] = lambda x, stage, level: None


@dataclass
class State:
    """What a run carries from level to level; saved and restored as it stands.

    Attributes:
        u: [z, y, x] in user units, real or complex; the reconstruction once `index` has passed the last level.
        duals: tensors of the consistency part, and of steps that take several visits.
        index: the next level.
        seed: of all random numbers.
    """

    u: Tensor
    duals: dict[str, Tensor]
    index: int
    seed: int


def start_image(start: Start, operator: LinearOperator, y: Tensor, offset: float = 0.0) -> Tensor:
    """The image that a run starts from, before noise; a new tensor.

    Args:
        start: which image.
        operator: the scanner.
        y: its measurement.
        offset: the prior's zero.
    """
    if isinstance(start.image, Tensor):
        return start.image.clone()
    if start.image == "pinv":
        return operator.pinv(y)
    if start.image == "osem":
        x = uniform_start(operator, y, start.subsets)
        return ordered_subsets_em(x, y, operator, subsets=start.subsets, iterations=start.subsets * start.iterations)
    image = torch.full(operator.domain.shape, offset, dtype=y.dtype, device=y.device)
    if start.image == "offset":
        return image
    return conjugate_gradients(
        lambda p: operator.normal(p, start.weights),
        image,
        operator.residual(image, y, start.weights),
        start.iterations,
        operator.coupling == "slice",
    )


def begin(job: Job) -> State:
    """The state before the first level."""
    image = start_image(job.start, job.operator, job.y, job.prior.offset)
    job.check(image, "the start image", 0)
    if sigma := first_sigma(job.trajectory):
        z = draw_like(image, (job.start.noise or job.noise).at(0, _START))
        image = image.add_(z, alpha=sigma)
    return State(image, {}, 0, job.noise.seed)


def run(job: Job, state: State) -> Iterator[Level]:
    """Advance the state in place, yielding each level once it is done and the state could be saved.

    Stop iterating to cancel; iterate again with a saved state to continue. state.u is the volume in the end.
    """
    if state.seed != job.noise.seed:
        raise ValueError(f"run: the state was made with seed {state.seed}, but the job has seed {job.noise.seed}")
    on_estimate = job.consistency.on == "estimate"

    while (level := next_level(job.trajectory, state.index, state.duals)) is not None:
        views = job.planes.views(level)
        prior = prior_of(job.prior, views)
        x0 = job.executor.denoise(prior, job.planes, state.u, views, level.sigma, level=level.index, cond=job.cond)
        job.check(x0, "the prior", level.index)
        x0c = _consistent(job, x0, level, state, views) if on_estimate else x0
        state.u = job.renoise(state.u, x0, x0c, level, job.noise.at(level.index, _STEP), state.duals)
        if not on_estimate:
            state.u = _consistent(job, state.u, level, state, views)
        state.index = level.index + 1
        yield level


def reconstruct(job: Job) -> Tensor:
    """Run a job from start to end; the volume in user units."""
    state = begin(job)
    for _ in run(job, state):
        pass
    return state.u


def _consistent(job: Job, x: Tensor, level: Level, state: State, views: Sequence[View]) -> Tensor:
    if not level.data:
        return x
    if isinstance(job.consistency, Guidance):
        u = state.u

        def pull(v: Tensor) -> Tensor:
            prior, planes = prior_of(job.prior, views), job.planes.pulling(v)
            return job.executor.pull(prior, planes, u, views, level.sigma, v, level=level.index, cond=job.cond)

        x = job.consistency.guide(x, job.y, job.operator, level, state.duals, Visit(u, pull))
    else:
        x = job.consistency.step(x, job.y, job.operator, level, state.duals)
    job.check(x, "data consistency", level.index)
    return x

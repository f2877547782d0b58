"""Drives the loop through a whole run: checkpoints, requests to stop, progress, and where the time went.

A run is in one of four states, told by its folder alone: new (no checkpoint), unfinished (a checkpoint), complete
(manifest.json), or another job's (fingerprints differ: refused). Every way into `solve` leads to the same bits.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field

from torch import Tensor

from recon3d.engine import loop
from recon3d.engine.checkpoint import Checkpoint
from recon3d.engine.events import Events
from recon3d.engine.executor import Executor, Interrupted, NonFiniteError, check_finite
from recon3d.trajectory import expected_visits


@dataclass
class Timings:
    """Seconds of a run, over all its attempts; `cpu_*` is processor time of all threads together.

    Attributes:
        total: wall time in the loop, checkpoints included.
        network: wall time in the executor, that is in the prior with gathering and scattering.
        projector: wall time in the scanner's operator.
        checkpoint: wall time saving states.
        cpu_total: processor time in the loop.
        cpu_network: processor time in the executor.
    """

    total: float = 0.0
    network: float = 0.0
    projector: float = 0.0
    checkpoint: float = 0.0
    cpu_total: float = 0.0
    cpu_network: float = 0.0

    @property
    def outside_network(self) -> float:
        """Share of the wall time spent outside the network, 0 to 1."""
        return 0.0 if self.total <= 0 else 1 - self.network / self.total

    @property
    def cpu_outside_network(self) -> float:
        """Share of the processor time spent outside the network, 0 to 1; steadier than wall time on a busy machine."""
        return 0.0 if self.cpu_total <= 0 else 1 - self.cpu_network / self.cpu_total

    def as_dict(self) -> dict[str, float]:
        """For the manifest."""
        values = {f"{name}_s": round(value, 3) for name, value in asdict(self).items()}
        values["other_s"] = round(max(0.0, self.total - self.network - self.projector - self.checkpoint), 3)
        values["outside_network_share"] = round(self.outside_network, 4)
        values["cpu_outside_network_share"] = round(self.cpu_outside_network, 4)
        return values


@dataclass
class Schedule:
    """When the state is saved.

    Attributes:
        every_levels: after so many levels at the latest.
        every_seconds: or when so much time has passed, whichever comes first; always at a level boundary.
    """

    every_levels: int = 5
    every_seconds: float = 20.0


@dataclass
class Solved:
    """What `solve` gives.

    Attributes:
        volume: [z, y, x] in the scan's unit.
        timings: over all attempts.
        attempts: processes that worked on the run, this one included.
        resumed_at: level this attempt began with.
    """

    volume: Tensor
    timings: Timings
    attempts: int = 1
    resumed_at: int = 0
    saved_bytes: int = 0


@dataclass
class _Progress:
    """Saves when due and keeps the clocks; one per attempt."""

    state: loop.State
    store: Checkpoint | None
    schedule: Schedule
    timings: Timings
    clocks: Callable[[], tuple[float, float, float]]
    attempts: int
    saved_index: int = -1
    saved_at: float = field(default_factory=time.monotonic)
    saved_bytes: int = 0
    _start: float = field(default_factory=time.perf_counter)
    _cpu_start: float = field(default_factory=time.process_time)

    def now(self) -> Timings:
        """Timings up to this moment, earlier attempts included."""
        network, cpu_network, projector = self.clocks()
        before = self.timings
        return Timings(
            total=before.total + time.perf_counter() - self._start,
            network=before.network + network,
            projector=before.projector + projector,
            checkpoint=before.checkpoint,
            cpu_total=before.cpu_total + time.process_time() - self._cpu_start,
            cpu_network=before.cpu_network + cpu_network,
        )

    def due(self) -> bool:
        return (
            self.state.index - max(self.saved_index, 0) >= self.schedule.every_levels
            or time.monotonic() - self.saved_at >= self.schedule.every_seconds
        )

    def save(self) -> None:
        if self.store is None or self.saved_index == self.state.index:
            return
        start = time.perf_counter()
        tensors = {"u": self.state.u, **{f"dual.{name}": dual for name, dual in self.state.duals.items()}}
        meta = {
            "index": self.state.index,
            "seed": self.state.seed,
            "attempts": self.attempts,
            "timings": asdict(self.now()),
        }
        self.saved_bytes = self.store.save(tensors, meta)
        self.timings.checkpoint += time.perf_counter() - start
        self.saved_index, self.saved_at = self.state.index, time.monotonic()


def solve(
    job: loop.Job,
    executor: Executor,
    *,
    store: Checkpoint | None = None,
    schedule: Schedule | None = None,
    events: Events | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> Solved:
    """Run a job to its end, from its checkpoint where there is one.

    Args:
        job: the parts; its executor and check are set here.
        executor: runs the prior; its `events` and `stop` should be the same as here.
        store: where the state is kept; None keeps nothing.
        schedule: when it is saved.
        events: told about "start", "level", "checkpoint", "interrupted", "not_finite".
        stop: asked after every level and between micro-batches.

    Raises:
        Interrupted: `stop` said so; the state is saved at the last level boundary.
        NonFiniteError: a slice became NaN or infinite; the last checkpoint is kept.
        CheckpointError: the checkpoint belongs to another job.
        ResourceError: memory or disk ran out; the last checkpoint is kept.
    """
    events = events or Events()
    job.executor = executor
    job.check = _check
    saved = store.load() if store is not None else None
    timings, attempts = Timings(), 1

    # executor and operator may have served runs before
    before = executor.seconds, executor.cpu_seconds, getattr(job.operator, "seconds", 0.0)

    def clocks() -> tuple[float, float, float]:
        now = executor.seconds, executor.cpu_seconds, getattr(job.operator, "seconds", 0.0)
        return now[0] - before[0], now[1] - before[1], now[2] - before[2]

    if saved is None:
        start, cpu = time.perf_counter(), time.process_time()
        state = loop.begin(job)
        timings.total, timings.cpu_total = time.perf_counter() - start, time.process_time() - cpu
    else:
        device = job.y.device
        duals = {name[5:]: t.to(device) for name, t in saved.tensors.items() if name.startswith("dual.")}
        state = loop.State(saved.tensors["u"].to(device), duals, int(saved.meta["index"]), int(saved.meta["seed"]))
        timings, attempts = Timings(**saved.meta["timings"]), int(saved.meta["attempts"]) + 1
        del saved
    progress = _Progress(state, store, schedule or Schedule(), timings, clocks, attempts)
    first, levels = state.index, expected_visits(job.trajectory, state.index, state.duals)
    if first:
        progress.saved_index = first
    events.emit("start", level=first, levels=levels, attempt=attempts)
    try:
        if not first:
            progress.save()
        for level in loop.run(job, state):
            if progress.due() and not level.last:
                progress.save()
                events.emit("checkpoint", level=state.index)
            levels = expected_visits(job.trajectory, state.index, state.duals)
            events.emit("level", level=level.index, levels=levels, sigma=level.sigma)
            if stop() and not level.last:
                raise Interrupted
        progress.save()
    except Interrupted:
        progress.save()
        events.emit("interrupted", level=state.index, levels=levels)
        raise
    except NonFiniteError as error:
        events.emit("not_finite", level=error.level, slice=error.index, stage=error.stage)
        raise
    return Solved(state.u, progress.now(), attempts, first, progress.saved_bytes)


def _check(x: Tensor, stage: str, level: int) -> None:
    if stage != "the prior":  # the executor has looked already, slice by slice
        check_finite(x, stage, level)

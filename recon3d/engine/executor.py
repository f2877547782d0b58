"""Runs the prior over the views of a volume in fixed micro-batches, with the same result whatever the batching.

On the CPU a pool of worker threads takes one slice at a time, each with one intra-op thread, so neither the number
of slices in flight nor the number of cores can change a sum's order. On CUDA the views go in batches of one fixed
size, the last one padded, so every slice meets the same kernels. When memory runs out the batch is halved and the
unfinished views run again.
"""

from __future__ import annotations

import cmath
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any, Protocol

import torch
from torch import Tensor

from recon3d.engine.events import Events
from recon3d.engine.memory import trim

# halvings allowed in one pass over the views: 8 slices in flight become 1
MAX_RETRIES = 3
_CUDA_BATCH = 8
# stages of a level, for messages
_ESTIMATE, _GRADIENT = "the prior", "the gradient through the prior"


class NonFiniteError(ArithmeticError):
    """A slice became NaN or infinite; names the stage, the level and the slice."""

    def __init__(self, stage: str, level: int, index: int) -> None:
        self.stage, self.level, self.index = stage, level, index
        super().__init__(f"slice {index} is not finite after {stage} at level {level}")


class Interrupted(Exception):
    """The run was asked to stop; the state at the start of the level is intact."""


class ResourceError(RuntimeError):
    """Memory, disk or a lock is missing; nothing was lost and the run can be resumed."""


class PriorLike(Protocol):
    """What the executor needs of a prior."""

    def denoise(self, u: Tensor, sigma: float, cond: Tensor | None = None) -> Tensor: ...


class PlanesLike(Protocol):
    """What the executor needs of planes; a view is opaque to it."""

    def gather(self, u: Tensor, view: Any) -> Tensor: ...

    def scatter(self, out: Tensor, x0: Tensor, view: Any) -> Any: ...


class Executor:
    """Maps `prior.denoise` over views.

    Args:
        batch_size: slices in flight; None takes the number of workers on the CPU and 8 on CUDA, where the plan of a
            job knows better (recon3d.engine.batch). The result does not depend on it.
        workers: CPU threads, each running one slice; None takes the cores this process may use.
        events: told about retries ("out_of_memory") and, many times a second, about progress ("slices").
        stop: asked between micro-batches; when it gives True the pass ends with Interrupted.
    """

    def __init__(
        self,
        batch_size: int | None = None,
        workers: int | None = None,
        events: Events | None = None,
        stop: Callable[[], bool] | None = None,
    ) -> None:
        for name, value in (("batch_size", batch_size), ("workers", workers)):
            if value is not None and value < 1:
                raise ValueError(f"executor: {name} must be at least 1, got {value}")
        self.workers = workers or usable_cores()
        self.batch_size = batch_size
        self.events = events or Events()
        self.stop = stop or (lambda: False)
        self.seconds = 0.0
        self.cpu_seconds = 0.0
        self._pool: ThreadPoolExecutor | None = None

    def denoise(
        self,
        prior: PriorLike,
        planes: PlanesLike,
        u: Tensor,
        views: Sequence[Any],
        sigma: float,
        *,
        level: int = 0,
        cond: Tensor | None = None,
    ) -> Tensor:
        """Denoise every view of the state once.

        Args:
            prior: called on [batch, channel, row, col].
            planes: gathers a view from u and scatters its estimate; scattered in the order of `views`.
            u: state, [z, y, x], user units, real or complex; not changed.
            views: what `planes.views` gave for this level.
            sigma: noise level, user units.
            level: index of the level, for messages.
            cond: a volume beside u that the prior sees the same views of; for priors that take a condition.

        Returns:
            The estimate x0 with the shape, dtype and device of u.

        Raises:
            NonFiniteError: the prior gave NaN or infinity; the first such slice is named.
            Interrupted: `stop` said so.
            ResourceError: memory ran out even after the batch was halved three times.
        """

        def denoise(rows: Tensor, *condition: Tensor) -> Tensor:
            with torch.inference_mode():
                return prior.denoise(rows, sigma, *condition)

        return self._map(denoise, planes, (u,) if cond is None else (u, cond), views, level, _ESTIMATE)

    def pull(
        self,
        prior: PriorLike,
        planes: PlanesLike,
        u: Tensor,
        views: Sequence[Any],
        sigma: float,
        v: Tensor,
        *,
        level: int = 0,
        cond: Tensor | None = None,
    ) -> Tensor:
        """(dx0/du)^T v for x0 = denoise(u): the direction v of estimates, carried back to the state.

        Every view is denoised again, with gradients, so no more activations are alive than for the slices in flight,
        and the result depends on batches and threads as little as the estimate's does. Planes must scatter by the
        transpose of how they gather.

        Args:
            prior: differentiable (`recon3d.priors.base.differentiable`).
            planes, u, views, sigma, level, cond: as for the estimate.
            v: the shape of u.

        Raises:
            ValueError: the prior records no gradients.
            NonFiniteError, Interrupted, ResourceError: as `denoise`.
        """

        def pulled(rows: Tensor, direction: Tensor, *condition: Tensor) -> Tensor:
            with torch.enable_grad():
                leaf = rows.detach().requires_grad_()
                x0 = prior.denoise(leaf, sigma, *condition)
            if not x0.requires_grad:
                raise ValueError(f"pull: {type(prior).__name__} records no gradients; it cannot be differentiated")
            return torch.autograd.grad(x0, leaf, direction)[0]

        volumes = (u, v) if cond is None else (u, v, cond)
        return self._map(pulled, planes, volumes, views, level, _GRADIENT)

    def close(self) -> None:
        """End the worker threads."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = None

    def __enter__(self) -> Executor:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _map(
        self,
        function: Callable[..., Tensor],
        planes: PlanesLike,
        volumes: Sequence[Tensor],
        views: Sequence[Any],
        level: int,
        stage: str,
    ) -> Tensor:
        """The volume of what `function` gives for each view of the volumes, all shaped as the first one."""
        out = torch.zeros_like(volumes[0])
        start, cpu = time.perf_counter(), time.process_time()
        try:
            self._work(function, planes, volumes, views, level, stage, out)
        finally:
            if out.is_cuda:
                torch.cuda.synchronize(out.device)
            else:
                trim()  # activations make room for the data term's volumes
            self.seconds += time.perf_counter() - start
            self.cpu_seconds += time.process_time() - cpu
        return out

    def _work(
        self,
        function: Callable[..., Tensor],
        planes: PlanesLike,
        volumes: Sequence[Tensor],
        views: Sequence[Any],
        level: int,
        stage: str,
        out: Tensor,
    ) -> None:
        """Work through the views in order, starting again behind the last scattered one when memory runs out."""
        batch = self.batch_size or (_CUDA_BATCH if out.is_cuda else self.workers)
        run = self._run_batches if out.is_cuda else self._run_pool
        done = 0

        def finish(rows: Tensor, view: Any, ok: bool) -> None:
            nonlocal done
            if not ok:
                raise NonFiniteError(stage, level, _first_slice(view, done))
            planes.scatter(out, rows, view)
            done += 1
            if stage == _ESTIMATE:
                self.events.emit("slices", level=level, done=done, total=len(views))

        for retry in range(MAX_RETRIES + 1):
            try:
                run(function, planes, volumes, views, batch, finish, lambda: done)
                return
            except (MemoryError, RuntimeError) as error:
                if not out_of_memory(error):
                    raise
                message = str(error).splitlines()[0] if str(error) else type(error).__name__
            if batch == 1 or retry == MAX_RETRIES:
                raise ResourceError(
                    f"memory ran out at level {level} with {batch} slice{'s' * (batch > 1)} in flight ({message}); "
                    "free some memory, or choose a smaller grid or prior, and resume"
                )
            batch = max(1, batch // 2)
            self.batch_size = batch
            if out.is_cuda:
                torch.cuda.empty_cache()
            self.events.emit("out_of_memory", level=level, batch_size=batch, message=message)

    def _run_pool(
        self,
        function: Callable[..., Tensor],
        planes: PlanesLike,
        volumes: Sequence[Tensor],
        views: Sequence[Any],
        batch: int,
        finish: Callable[[Tensor, Any, bool], None],
        done: Callable[[], int],
    ) -> None:
        """CPU: `batch` views in flight, one slice at a time each; results are scattered in order."""
        if self._pool is None:
            self._pool = _single_threaded_pool(self.workers)

        def work(view: Any) -> tuple[Tensor, bool]:
            if torch.get_num_threads() != 1:
                torch.set_num_threads(1)
            gathered = [planes.gather(volume, view).split(1) for volume in volumes]
            # cloned: a slice starts on an aligned address wherever it lies in the stack
            x0 = torch.cat(
                [
                    function(*(row.clone(memory_format=torch.contiguous_format) for row in rows))
                    for rows in zip(*gathered, strict=True)
                ]
            )
            return x0, finite(x0)

        pending: dict[int, Future[tuple[Tensor, bool]]] = {}
        following = done()
        flight = min(batch, self.workers)
        # this thread only copies slices meanwhile; waking others for that would take cores from the workers
        before = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            while done() < len(views):
                if self.stop():
                    raise Interrupted
                running = sum(not future.done() for future in pending.values())
                # finished slices wait for their turn; at most one more batch of them is kept
                while following < len(views) and running < flight and len(pending) < 2 * flight:
                    pending[following] = self._pool.submit(work, views[following])
                    following += 1
                    running += 1
                first = pending[done()]
                if not first.done():
                    wait([f for f in pending.values() if not f.done()], 0.2, FIRST_COMPLETED)
                    continue
                x0, ok = first.result()
                del pending[done()]
                finish(x0, views[done()], ok)
        finally:
            torch.set_num_threads(before)
            for future in pending.values():
                future.cancel()
            wait([future for future in pending.values() if not future.cancelled()])

    def _run_batches(
        self,
        function: Callable[..., Tensor],
        planes: PlanesLike,
        volumes: Sequence[Tensor],
        views: Sequence[Any],
        batch: int,
        finish: Callable[[Tensor, Any, bool], None],
        done: Callable[[], int],
    ) -> None:
        """CUDA: groups of views filled up to `batch` rows with copies of the last row."""
        while done() < len(views):
            if self.stop():
                raise Interrupted
            parts: list[list[Tensor]] = []
            group: list[Any] = []
            rows = 0
            for view in views[done() :]:
                part = [planes.gather(volume, view) for volume in volumes]
                count = part[0].shape[0]
                if group and rows + count > batch:
                    break
                parts.append(part)
                group.append(view)
                rows += count
                if rows >= batch:
                    break
            counts = [part[0].shape[0] for part in parts]
            if rows < batch:
                parts.append([p[-1:].expand(batch - rows, *p.shape[1:]) for p in parts[-1]])
            x0 = function(*(torch.cat(stack) for stack in zip(*parts, strict=True)))
            first = 0
            for view, count in zip(group, counts, strict=True):
                rows0 = x0[first : first + count]
                finish(rows0, view, finite(rows0))
                first += count


def finite(x: Tensor) -> bool:
    """Whether all of x is finite: a sum tells in one pass, unless it overflows and every value has to be asked."""
    return cmath.isfinite(complex(x.sum())) or bool(torch.isfinite(x).all())


def check_finite(x: Tensor, stage: str, level: int) -> None:
    """Raise NonFiniteError naming the first slice of x, [z, y, x], that holds NaN or infinity."""
    if finite(x):
        return
    for index in range(x.shape[0]):
        if not bool(torch.isfinite(x[index]).all()):
            raise NonFiniteError(stage, level, index)


def out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that host or device memory ran out."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(
        words in text for words in ("not enough memory", "can't allocate memory", "out of memory", "bad_alloc")
    )


def usable_cores() -> int:
    """The cores this process may run on, which a container or a batch system can limit."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _first_slice(view: Any, position: int) -> int:
    index = getattr(view, "index", position)
    return index if isinstance(index, int) else position


def _single_threaded_pool(workers: int) -> ThreadPoolExecutor:
    """A pool whose threads run torch on one thread each, leaving the calling thread's setting as it was."""
    before = torch.get_num_threads()
    barrier = threading.Barrier(workers)

    def prepare() -> None:
        torch.set_num_threads(1)
        torch.get_num_threads()  # settles the thread's own number now, not at its first parallel region

    def settle() -> None:
        barrier.wait(60)

    pool = ThreadPoolExecutor(workers, thread_name_prefix="recon3d-prior", initializer=prepare)
    wait([pool.submit(settle) for _ in range(workers)])
    # the number is also a process-wide default for threads yet to come; give them the caller's
    torch.set_num_threads(before)
    return pool

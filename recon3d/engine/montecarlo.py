"""Several draws of one job: their mean, spread and interval, in the memory of one run and one volume more.

Sample k is the job with random numbers of its own: sample 0 has the job's seed and is the plain run to the bit, the
others have seeds that Philox makes of it. All share the operator, what the data term has prepared (norms, filters,
weights) and the start image, the one volume more. Mean and squared deviations run along (Welford, Technometrics 4
(1962) 419); with a folder they lie there while a sample is drawn, and are brought back to take it in.

The interval is the one that holds one more draw with 90 % (recon3d.metrics.calibration): mean +- f std with Student's
factor, which is right at any number of samples where voxels are Gaussian; or, where the samples themselves are kept
and are 19 or more, between order statistics, which assumes nothing. Of complex images, mean is complex, and std and
interval are those of the magnitude.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from recon3d.config import ConfigError
from recon3d.engine import loop
from recon3d.engine.checkpoint import Checkpoint, CheckpointError, write_safetensors
from recon3d.engine.events import Events
from recon3d.engine.executor import Executor
from recon3d.engine.job import Schedule, Solved, Timings, solve
from recon3d.metrics.calibration import interval_factor, order_rank
from recon3d.ops.philox import philox4x32

__all__ = ["NOMINAL", "Kept", "Moments", "Uncertainty", "draw", "reseeded", "sample_seed"]

NOMINAL = 0.9
# third and fourth word of the counter whose random words are a sample's seed
_TAG = (0x72656333, 0x73616D70)
# voxels at a time, so that temporaries stay small beside a volume
_CHUNK = 1 << 22


@dataclass(frozen=True)
class Uncertainty:
    """What several samples say about each voxel.

    Attributes:
        std: standard deviation over the samples, [z, y, x] real, in the volume's unit; of the magnitude where the
            volume is complex.
        low: lower end of the 90 % interval.
        high: upper end.
        samples: how many there were.
        form: "student", mean +- f std; or "order", between order statistics.
        claims: what the recipe says its results are.
    """

    std: Tensor
    low: Tensor
    high: Tensor
    samples: int
    form: Literal["student", "order"]
    claims: str

    def as_dict(self) -> dict[str, Any]:
        """Definitions, for the manifest."""
        found: dict[str, Any] = {"count": self.samples, "nominal": NOMINAL, "form": self.form, "claims": self.claims}
        if self.form == "student":
            found["factor"] = interval_factor(self.samples, NOMINAL)
            words = "mean +- factor std; holds one more draw with the nominal probability where voxels are Gaussian"
        else:
            found["rank"] = order_rank(self.samples, NOMINAL)
            words = "from the rank-th smallest to the rank-th largest sample, interpolated; assumes no law"
        found["definitions"] = {
            "volume": "mean of the samples",
            "std": "over the samples, count - 1 in the denominator; of complex images that of magnitudes",
            "interval": words,
            "seeds": "sample 0 has the job's seed; sample k one made of it and k by Philox4x32-10",
        }
        return found


@dataclass(frozen=True)
class Kept:
    """Where the samples themselves go.

    Attributes:
        raw: folder of what exact intervals are made of; one file a sample.
        save: writes sample k for the user.
    """

    raw: Path
    save: Callable[[int, Tensor], None]


class Moments:
    """Running mean and sum of squared deviations of volumes, in memory or, with a store, on the disk between samples.

    Args:
        store: a checkpoint of its own; None keeps everything in memory.
    """

    def __init__(self, store: Checkpoint | None = None) -> None:
        self.store, self.count, self.attempts = store, 0, 1
        self.timings = Timings()
        self._tensors: dict[str, Tensor] = {}
        meta = None if store is None else store.meta()
        if meta is not None:
            self.count, self.attempts = int(meta["count"]), int(meta["attempts"])
            self.timings = Timings(**meta["timings"])

    def add(self, x: Tensor, solved: Solved) -> None:
        """Take in a finished sample and publish the result.

        Args:
            x: [z, y, x] on the host, real or complex.
            solved: its run.
        """
        tensors = self._read() if self.count else _zeros(x)
        self.count += 1
        self.attempts += solved.attempts - 1
        self.timings = Timings(**{k: v + getattr(solved.timings, k) for k, v in asdict(self.timings).items()})
        for rows in _slabs(x):
            part = x[rows]
            if x.is_complex():
                tensors["mean"][rows] += (part - tensors["mean"][rows]) / self.count
                part = part.abs()
            centre = tensors["centre"][rows]
            delta = part - centre
            centre += delta / self.count
            tensors["m2"][rows].addcmul_(delta, delta, value=(self.count - 1) / self.count)
        if self.store is None:
            self._tensors = tensors
        else:
            meta = {"count": self.count, "attempts": self.attempts, "timings": asdict(self.timings)}
            self.store.save(tensors, meta)

    def result(self) -> tuple[Tensor, Tensor, Tensor]:
        """Mean of the samples; mean and standard deviation of what is shown, real. The moments are used up."""
        tensors, self._tensors = self._read(), {}
        centre = tensors["centre"]
        return tensors.get("mean", centre), centre, tensors["m2"].div_(self.count - 1).sqrt_()

    def _read(self) -> dict[str, Tensor]:
        if self.store is None:
            return self._tensors
        saved = self.store.load()
        if saved is None:
            raise CheckpointError(f"{self.store.folder}: finished samples are gone; start afresh with --force")
        return saved.tensors


def sample_seed(seed: int, k: int) -> int:
    """The seed of sample k of a job.

    >>> sample_seed(7, 0), sample_seed(7, 1) != sample_seed(8, 1)
    (7, True)
    """
    if k == 0:
        return seed
    words = philox4x32(torch.tensor([k, 0, *_TAG]), seed)
    return int(words[0]) | int(words[1]) << 32


def reseeded(job: loop.Job, seed: int) -> loop.Job:
    """The same job with other random numbers; parts without any are shared, with all they have prepared."""
    random = ("noise", "start", "planes", "consistency", "renoise")
    return replace(job, **{name: _with_seed(getattr(job, name), seed) for name in random})


def draw(
    job: loop.Job,
    executor: Executor,
    samples: int,
    *,
    finish: Callable[[Tensor], Tensor] = lambda volume: volume,
    claims: str = "estimate",
    store: Checkpoint | None = None,
    kept: Kept | None = None,
    schedule: Schedule | None = None,
    events: Events | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> tuple[Solved, Uncertainty]:
    """Run a job several times with other random numbers, going on where an earlier attempt ended.

    Args:
        job: the parts.
        executor: runs the prior.
        samples: how many, at least 2.
        finish: what the scan does to a result before it is handed out; done to every sample.
        claims: what the recipe says its results are.
        store: where the state of the sample at work is kept, and beside it the moments of finished ones.
        kept: where the samples themselves go; None keeps none.
        schedule, events, stop: as in `solve`; events of a sample also say "sample" and "samples".

    Returns:
        The mean as `volume` with the clocks of all samples, and the uncertainty.

    Raises:
        ConfigError: fewer samples are asked for than are finished.
        Interrupted, NonFiniteError, CheckpointError, ResourceError: as `solve`.
    """
    if samples < 2:
        raise ValueError(f"samples: a spread needs at least 2, got {samples}")
    events = events or Events()
    moments = Moments(None if store is None else Checkpoint(store.folder / "moments", store.fingerprint))
    if moments.count > samples:
        raise ConfigError(
            f"samples: {samples} asked for, {moments.count} are finished already; ask for at least so many"
        )
    resumed_at, begun = 0, False
    for k in range(moments.count, samples):
        counted = _Counted(events, k, samples)
        executor.events = counted
        seed = sample_seed(job.noise.seed, k)
        job, seconds = _prepared(job, store, seed)
        solved = solve(reseeded(job, seed), executor, store=store, schedule=schedule, events=counted, stop=stop)
        solved.timings.total += seconds
        resumed_at = resumed_at if begun else solved.resumed_at
        begun = True
        x = finish(solved.volume).cpu()
        if kept is not None:
            kept.save(k, x)
            write_safetensors(_raw(kept.raw, k), {"x": x.abs() if x.is_complex() else x})
        moments.add(x, solved)
        if store is not None:
            store.remove()
        counted.emit("sampled")
        del solved, x
    mean, centre, std = moments.result()
    form: Literal["student", "order"] = "student" if kept is None or order_rank(samples, NOMINAL) is None else "order"
    low, high = _interval(centre, std, samples, finish) if form == "student" else _between(kept, samples, centre.shape)
    if mean.is_complex():
        low = low.clamp_min_(0)
    found = Uncertainty(std, low, high, samples, form, claims)
    return Solved(mean, moments.timings, moments.attempts, resumed_at), found


class _Counted(Events):
    """Events of one sample, saying which of how many it is."""

    def __init__(self, inner: Events, sample: int, samples: int) -> None:
        super().__init__()
        self._inner, self._which = inner, {"sample": sample, "samples": samples}

    def emit(self, event: str, **fields: Any) -> None:
        self._inner.emit(event, **fields, **self._which)


def _prepared(job: loop.Job, store: Checkpoint | None, seed: int) -> tuple[loop.Job, float]:
    """The job with its start image made, where the sample begins afresh; and the seconds that took."""
    meta = None if store is None else store.meta()
    if store is not None and meta is not None:
        if int(meta["seed"]) == seed:
            return job, 0.0
        store.remove()  # of a sample that is in the moments already: the process ended between the two
    if isinstance(job.start.image, Tensor) or job.start.image == "offset":
        return job, 0.0
    start = time.perf_counter()
    image = loop.start_image(job.start, job.operator, job.y, job.prior.offset)
    return replace(job, start=replace(job.start, image=image)), time.perf_counter() - start


def _with_seed(part: Any, seed: int) -> Any:
    """A part with another seed wherever it or a part of it has one; itself where none has."""
    if not dataclasses.is_dataclass(part) or isinstance(part, type):
        return part
    changes = {}
    for field in (f for f in dataclasses.fields(part) if f.init):
        value = getattr(part, field.name)
        changed = seed if field.name == "seed" else _with_seed(value, seed)
        if changed is not value:
            changes[field.name] = changed
    return replace(part, **changes) if changes else part


def _interval(centre: Tensor, std: Tensor, samples: int, finish: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """mean -+ f std, as a result of the scan can be: an activity is not negative."""
    factor = interval_factor(samples, NOMINAL)
    return finish(torch.add(centre, std, alpha=-factor)), finish(torch.add(centre, std, alpha=factor))


def _between(kept: Kept | None, samples: int, shape: torch.Size) -> tuple[Tensor, Tensor]:
    """Order statistics of the kept samples, a slab at a time that takes no more than a volume."""
    from safetensors import safe_open

    assert kept is not None
    rank = order_rank(samples, NOMINAL)
    assert rank is not None
    below, part = int(rank) - 1, rank - int(rank)
    low, high = torch.empty(shape), torch.empty(shape)
    files = [safe_open(_raw(kept.raw, k), framework="pt") for k in range(samples)]
    step = max(1, shape[0] // samples)
    for first in range(0, shape[0], step):
        rows = slice(first, min(shape[0], first + step))
        ordered = torch.stack([file.get_slice("x")[rows] for file in files]).sort(0).values
        above = min(below + 1, samples - 1)
        low[rows] = torch.lerp(ordered[below], ordered[above], part)
        high[rows] = torch.lerp(ordered[-1 - below], ordered[-1 - above], part)
    return low, high


def _raw(folder: Path, k: int) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"sample-{k:04d}.safetensors"


def _zeros(x: Tensor) -> dict[str, Tensor]:
    real = torch.zeros(x.shape, dtype=x.real.dtype if x.is_complex() else x.dtype)
    tensors = {"centre": real, "m2": torch.zeros_like(real)}
    return {**tensors, "mean": torch.zeros_like(x)} if x.is_complex() else tensors


def _slabs(x: Tensor) -> list[slice]:
    step = max(1, _CHUNK // max(1, x[0].numel()))
    return [slice(first, first + step) for first in range(0, x.shape[0], step)]

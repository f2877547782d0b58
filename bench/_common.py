"""Rules that every timing obeys: correctness first, rivals in the same run, both clocks, every row kept.

An op's module has `run(quick, device) -> list[Row]` and builds its rows with :func:`compare`:

* the gates (error against the truth, adjoint gap) are judged before a clock starts; one that fails refuses;
* ours and every rival are timed in turn, round after round, so that a busy machine is busy for all of them;
  a figure is the median over rounds, of the wall clock and of the process's CPU time (all threads), the
  latter being the one to trust on a shared machine;
* on a GPU the clock is a pair of CUDA events around one call, and the L2 cache is overwritten before each.
"""

from __future__ import annotations

import csv
import ctypes
import datetime
import functools
import gc
import math
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from importlib import metadata
from pathlib import Path
from typing import TypeVar

import torch

RESULTS = Path(__file__).parent / "results"
MRI_PEERS = ("finufft", "cufinufft", "ducc0", "mrpro", "sigpy", "torchkbnufft", "deepinv", "scipy")
# packages whose versions a row tells
PEERS = {"nufft": MRI_PEERS, "sense": MRI_PEERS, "pet": (), "job_pet": (), "network": ()}
Thunk = Callable[[], object]
K = TypeVar("K", bound=Hashable)


class Refused(RuntimeError):
    """A gate failed, so there is nothing to time."""


@dataclass(frozen=True)
class Gate:
    """A figure of correctness and the largest value at which a timing means something."""

    what: str
    value: float
    limit: float

    @property
    def passed(self) -> bool:
        return self.value <= self.limit  # false for NaN


@dataclass(frozen=True)
class Row:
    """One comparison; ratio > 1: ours is faster. Times are medians in ms, errors whatever the gate names."""

    op: str
    case: str
    direction: str
    ours_ms: float
    ours_cpu_ms: float
    rival: str
    rival_ms: float
    rival_cpu_ms: float
    ratio: float  # wall clock
    cpu_ratio: float
    ours_error: float
    rival_error: float
    peak_mb: float  # memory one call adds at its peak
    rival_peak_mb: float  # the same, plus what the rival keeps resident (a matrix, a grid)
    copy_fraction: float = math.nan  # share of the measured copy bandwidth; GPU only
    device: str = "cpu"


@dataclass(frozen=True)
class Timing:
    """Medians over rounds of one call, in ms."""

    wall_ms: float
    cpu_ms: float


@dataclass(frozen=True)
class Measured:
    """What one contender costs, and how exact it is."""

    wall_ms: float
    cpu_ms: float
    peak_mb: float = math.nan
    error: float = math.nan

    def times(self, factor: float) -> Measured:
        """The same for `factor` times the work, done in turn."""
        return replace(self, wall_ms=self.wall_ms * factor, cpu_ms=self.cpu_ms * factor)

    def plus(self, other: Measured) -> Measured:
        """Both, one after the other: times add; the larger peak and error stand."""
        return Measured(
            self.wall_ms + other.wall_ms, self.cpu_ms + other.cpu_ms, max(self.peak_mb, other.peak_mb),
            max(self.error, other.error),
        )  # fmt: skip


def compare(
    op: str,
    case: str,
    direction: str,
    ours: Thunk,
    rivals: Mapping[str, Thunk],
    *,
    gates: Sequence[Gate],
    errors: Mapping[str, float] | None = None,
    resident_mb: Mapping[str, float] | None = None,
    bytes_moved: float | None = None,
    rounds: int = 7,
    device: str = "cpu",
) -> list[Row]:
    """Judge the gates, then time ours and the rivals in turn.

    Args:
        op: name of the op, also of its results file.
        case: sizes in physical words, such as "parallel 512² x 360 views x 16 slices".
        direction: "forward", "adjoint", "update", ...
        ours: one call of our op.
        rivals: name -> one call doing the same work. A rival that is not at hand is left out by the caller.
        gates: at least one; the first one's value is printed as our error.
        errors: rival name -> its value of the first gate's figure.
        resident_mb: rival name (or "ours") -> memory it keeps between calls.
        bytes_moved: compulsory memory traffic of one call; gives the share of the copy bandwidth on a GPU.
        rounds: how often everybody has a turn.
        device: "cpu" or "cuda".

    Raises:
        Refused: a gate failed.
    """
    if not gates:
        raise ValueError(f"{op}: a timing needs at least one gate")
    judge(f"{op}, {case}, {direction}", gates)
    found = measure(
        {"ours": ours, **rivals}, errors={"ours": gates[0].value, **(errors or {})}, resident_mb=resident_mb,
        rounds=rounds, device=device,
    )  # fmt: skip
    mine = found["ours"]
    share = math.nan
    if bytes_moved and device == "cuda":
        share = bytes_moved / (mine.wall_ms * 1e-3) / copy_bandwidth()
    return [pair(op, case, direction, mine, k, found[k], device, share) for k in rivals]


def judge(what: str, gates: Sequence[Gate]) -> None:
    """Raise Refused when a gate is not passed."""
    failed = [f"{g.what} is {g.value:.3e}, limit {g.limit:.3e}" for g in gates if not g.passed]
    if failed:
        raise Refused(f"{what}: not timed, {'; '.join(failed)}")


def measure(
    thunks: Mapping[K, Thunk],
    *,
    errors: Mapping[K, float] | None = None,
    resident_mb: Mapping[K, float] | None = None,
    rounds: int = 7,
    device: str = "cpu",
    warm: bool = False,
    slow_s: float = 3.0,
) -> dict[K, Measured]:
    """Peak memory of every contender, then their times in turn; `warm`: each has run before."""
    # peak_mb warms everybody up
    peaks = {k: peak_mb(f, device, warm) + (resident_mb or {}).get(k, 0.0) for k, f in thunks.items()}
    times = interleave(thunks, rounds=rounds, device=device, slow_s=slow_s)
    return {
        k: Measured(t.wall_ms, t.cpu_ms, peaks[k], (errors or {}).get(k, math.nan)) for k, t in times.items()
    }  # fmt: skip


def pair(
    op: str, case: str, direction: str, mine: Measured, rival: str, its: Measured, device: str = "cpu",
    copy_fraction: float = math.nan,
) -> Row:  # fmt: skip
    """The row that sets ours beside one rival."""
    return Row(
        op=op, case=case, direction=direction, device=device,
        ours_ms=mine.wall_ms, ours_cpu_ms=mine.cpu_ms,
        rival=rival, rival_ms=its.wall_ms, rival_cpu_ms=its.cpu_ms,
        ratio=its.wall_ms / mine.wall_ms, cpu_ratio=its.cpu_ms / mine.cpu_ms,
        ours_error=mine.error, rival_error=its.error,
        peak_mb=mine.peak_mb, rival_peak_mb=its.peak_mb, copy_fraction=copy_fraction,
    )  # fmt: skip


def interleave(
    thunks: Mapping[K, Thunk], rounds: int = 7, device: str = "cpu", least_s: float = 0.02, slow_s: float = 3.0
) -> dict[K, Timing]:
    """Time every thunk, warmed up, once per round, in turn.

    A turn repeats a call until `least_s` has passed, so that clocks and wake-ups of threads do not show. A
    slow thunk (more than `slow_s` a call) stops after two turns.
    """
    sample = _cuda_sample if device == "cuda" else _cpu_sample
    samples: dict[K, list[Timing]] = {k: [] for k in thunks}
    for turn in range(rounds):
        for k, f in thunks.items():
            if turn >= 2 and samples[k][0].wall_ms > 1e3 * slow_s:
                continue
            samples[k].append(sample(f, least_s))
    return {
        k: Timing(statistics.median(s.wall_ms for s in v), statistics.median(s.cpu_ms for s in v))
        for k, v in samples.items()
    }


def _cpu_sample(f: Thunk, least_s: float) -> Timing:
    calls, wall, cpu = 0, time.perf_counter(), time.process_time()
    while calls == 0 or time.perf_counter() - wall < least_s:
        f()
        calls += 1
    return Timing((time.perf_counter() - wall) * 1e3 / calls, (time.process_time() - cpu) * 1e3 / calls)


def _cuda_sample(f: Thunk, least_s: float) -> Timing:
    walls: list[float] = []
    cpu = time.process_time()
    while sum(walls) < least_s * 1e3 and len(walls) < 50:
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        _flush().zero_()
        start.record()
        f()
        stop.record()
        torch.cuda.synchronize()
        walls.append(start.elapsed_time(stop))
    return Timing(statistics.median(walls), (time.process_time() - cpu) * 1e3 / len(walls))


@functools.cache
def _flush() -> torch.Tensor:
    # larger than any L2 to date (50 MB on H100 and H200, 126 MB on B200)
    return torch.empty(256 << 20, dtype=torch.int8, device="cuda")


@functools.cache
def copy_bandwidth() -> float:
    """Bytes read plus written per second by a device-to-device copy of 1 GiB, best of 20."""
    source = torch.empty(1 << 28, device="cuda")
    target = torch.empty_like(source)
    target.copy_(source)
    best = min(_cuda_sample(lambda: target.copy_(source), 1e-9).wall_ms for _ in range(20))
    return 2 * source.numel() * 4 / (best * 1e-3)


def peak_mb(f: Thunk, device: str = "cpu", warm: bool = False) -> float:
    """Memory one call adds at its peak, in MB (resident set on Linux, allocator on CUDA, NaN elsewhere)."""
    if not warm:
        f()  # what a library allocates once and keeps does not count as a call's
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        f()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
        before = _status_mb("VmRSS")
        f()
        return max(0.0, _status_mb("VmHWM") - before)
    except (OSError, AttributeError):
        return math.nan


def _status_mb(key: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) / 1024
    return math.nan


def relative_error(got: torch.Tensor, truth: torch.Tensor) -> float:
    """|got - truth| / |truth| in float64."""
    want = truth.detach().double().cpu()
    return float((got.detach().double().cpu() - want).norm() / want.norm())


def machine(device: str = "cpu") -> str:
    """Processor (or GPU) in words, with its number of threads."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return f"{name}, {torch.get_num_threads()} threads"


def versions(op: str = "") -> str:
    """recon3d's dependencies that matter to a timing, and the rivals of the op at hand."""
    found = [f"python {platform.python_version()}"]
    for name in ("torch", "triton", "numpy", *PEERS.get(op, ("astra-toolbox", "scikit-image"))):
        try:
            found.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            continue
    return " ".join(found)


def commit() -> str:
    """Short hash of the checkout, "+" where it has uncommitted changes, "unknown" outside git."""
    root = Path(__file__).parent.parent

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def record(rows: Sequence[Row], folder: Path = RESULTS) -> None:
    """Append the rows to folder/<op>.csv with date, machine, load, versions and commit."""
    folder.mkdir(parents=True, exist_ok=True)
    for op in {row.op for row in rows}:
        path = folder / f"{op}.csv"
        new = not path.exists()
        with path.open("a", newline="") as file:
            stamp = ["date", "machine", "load", "versions", "commit"]
            writer = csv.DictWriter(file, stamp + [f.name for f in fields(Row)])
            if new:
                writer.writeheader()
            for row in (r for r in rows if r.op == op):
                values = {k: f"{v:.5g}" if isinstance(v, float) else v for k, v in asdict(row).items()}
                writer.writerow(
                    {
                        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M"),
                        "machine": machine(row.device),
                        "load": f"{os.getloadavg()[0]:.1f}",
                        "versions": versions(op),
                        "commit": commit(),
                        **values,
                    }
                )


def table(rows: Sequence[Row]) -> str:
    """The rows as aligned text, one line per rival."""
    head = ["case", "direction", "ours ms", "cpu ms", "rival", "rival ms", "cpu ms", "ratio", "cpu ratio",
            "our error", "its error", "MB", "its MB", "of copy"]  # fmt: skip
    body = [
        [r.case, r.direction, _n(r.ours_ms), _n(r.ours_cpu_ms), r.rival, _n(r.rival_ms), _n(r.rival_cpu_ms),
         f"{r.ratio:.1f}x", f"{r.cpu_ratio:.1f}x", f"{r.ours_error:.2e}", f"{r.rival_error:.2e}",
         f"{r.peak_mb:.0f}", f"{r.rival_peak_mb:.0f}",
         "" if math.isnan(r.copy_fraction) else f"{r.copy_fraction:.0%}"]
        for r in rows
    ]  # fmt: skip
    widths = [max(len(line[i]) for line in [head, *body]) for i in range(len(head))]
    words = {0, 1, 4}

    def cell(i: int, text: str) -> str:
        return text.ljust(widths[i]) if i in words else text.rjust(widths[i])

    return "\n".join("  ".join(cell(i, text) for i, text in enumerate(line)) for line in [head, *body])


def _n(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"

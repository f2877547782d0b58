"""A progress bar with the time left, fed by the events of a run; and signals turned into a request to stop."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


@contextmanager
def stop_signals() -> Iterator[Callable[[], bool]]:
    """Gives a function that says whether SIGTERM or SIGINT came; a second signal ends the process at once."""
    asked = threading.Event()
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def ask(number: int, frame: FrameType | None) -> None:
        asked.set()
        for known, handler in before.items():
            signal.signal(known, handler)

    for number in before:
        signal.signal(number, ask)
    try:
        yield asked.is_set
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def progress_bar(quiet: bool = False) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Gives a listener for a run's events that draws one bar on stderr: level, slices, time left."""
    if quiet:
        yield lambda event: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    console = Console(file=sys.stderr)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[detail]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(elapsed_when_finished=False),
    )
    with Progress(*columns, console=console, transient=False, speed_estimate_period=120) as bar:
        task = bar.add_task("reading", total=None, detail="")
        levels = sample = samples = 1
        of = ""

        def listen(event: dict[str, Any]) -> None:
            nonlocal levels, sample, samples, of
            kind = event["event"]
            before = event.get("sample", 0) * levels
            if kind == "start":
                levels, follows, sample = event["levels"], event.get("sample", 0) == sample + 1, event.get("sample", 0)
                of = f"sample {sample + 1}/{event['samples']}, " if "samples" in event else ""
                again = f", attempt {event['attempt']}" if event["attempt"] > 1 else ""
                samples = event.get("samples", 1)
                done, detail = sample * levels + event["level"], f"{of}level {event['level']}/{levels}{again}"
                if follows:
                    bar.update(task, completed=done, detail=detail)
                else:
                    # a new task: the time spent reading says nothing about the time left
                    total = float(levels * samples)
                    bar.reset(task, description="reconstructing", total=total, completed=done, detail=detail)
            elif kind == "slices":
                # the data term takes the rest of a level; this keeps the bar from jumping
                part = 0.95 * event["done"] / event["total"]
                bar.update(task, completed=before + event["level"] + part)
            elif kind == "level":
                done, levels = event["level"] + 1, event["levels"]  # an estimate where steps are found on the way
                detail = f"{of}level {done}/{levels}"
                bar.update(task, completed=before + done, total=float(samples * levels), detail=detail)
            elif kind == "stage":
                bar.update(task, description=event["name"])
            elif kind == "out_of_memory":
                bar.console.print(f"memory ran out: going on with {event['batch_size']} slices at a time")
            elif kind == "warning":
                bar.console.print(f"warning: {event['message']}")

        yield listen


@contextmanager
def training_bar(quiet: bool = False) -> Iterator[Callable[[Any], None]]:
    """Gives a listener for a training run: progress, loss, speed, time left; a line per validation."""
    if quiet:
        yield lambda progress: None
        return
    from datetime import timedelta

    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("training"),
        BarColumn(),
        TextColumn("{task.fields[detail]}"),
        TimeElapsedColumn(),
        TextColumn("left {task.fields[left]}"),
    )
    with Progress(*columns, console=Console(file=sys.stderr)) as bar:
        task = bar.add_task("training", total=1.0, detail="", left="-:--:--")

        def listen(progress: Any) -> None:
            detail = f"step {progress.step}, loss {progress.loss:.4g}, {progress.images_per_s:.3g} images/s"
            if progress.peak_share is not None:
                detail += f", {progress.peak_share:.1%} of the bf16 peak"
            left = str(timedelta(seconds=round(progress.left_s)))
            bar.update(task, completed=progress.fraction, detail=detail, left=left)
            if progress.validation is not None:
                levels = ", ".join(f"{db:.2f} dB at sigma {sigma:g}" for sigma, db in progress.validation.items())
                bar.console.print(f"step {progress.step}: {levels}", highlight=False)

        yield listen

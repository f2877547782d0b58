"""What memory there is, what this process has, and how it is handed out."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_M_ARENA_MAX = -8
_tamed = False
_CGROUP_LIMITS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)


def tame_allocator() -> bool:
    """Make all threads share one heap of the C library, so that freed activations are reused and memory is predictable.

    With a heap per thread a 256 x 256 slice of a small U-Net left 338 MiB resident in two threads instead of 240 (glibc
    2.36), for the same processor time. For commands, which own their process; before threads are started. Gives
    False where the C library has no such setting.
    """
    global _tamed
    if sys.platform.startswith("linux"):
        try:
            _tamed = bool(ctypes.CDLL(None).mallopt(_M_ARENA_MAX, 1))
        except (OSError, AttributeError):
            _tamed = False
    return _tamed


def trim() -> None:
    """Give freed memory back to the system, in processes whose allocator was tamed; a few milliseconds."""
    if _tamed:
        ctypes.CDLL(None).malloc_trim(0)


def available_bytes() -> int:
    """Host memory that can be had now without swapping, within the limit of a container."""
    import psutil

    free = int(psutil.virtual_memory().available)
    for limit, usage in _CGROUP_LIMITS:
        try:
            most = Path(limit).read_text(encoding="ascii").strip()
            used = int(Path(usage).read_text(encoding="ascii"))
        except (OSError, ValueError):
            continue
        if most.isdigit():
            free = min(free, max(0, int(most) - used))
    return free


def resident_bytes() -> int:
    """Resident memory of this process now."""
    import psutil

    return int(psutil.Process().memory_info().rss)


def peak_resident_bytes() -> int:
    """The most resident memory this process has had, or has had since `peak_above` began where that is supported."""
    try:
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError):
        pass
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


@contextmanager
def peak_above() -> Iterator[list[int]]:
    """Measure how far resident memory rises above its start; the list holds that one number after the block.

    Linux lets a process reset its own high-water mark; elsewhere the number is 0 unless the block set a new record.
    """
    found: list[int] = []
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    start = resident_bytes()
    try:
        yield found
    finally:
        found.append(max(0, peak_resident_bytes() - start))

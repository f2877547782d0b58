"""What a run tells about itself: one JSON object per event, to a file, to listeners, or to nobody.

The library prints nothing; a command line, a notebook or a log adapter listens. Events that come many times a
second ("slices") reach listeners only; the others also go to events.jsonl, one line each, flushed at once, so that
the file of a killed run tells how far it came.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

Listener = Callable[[dict[str, Any]], None]

_TRANSIENT = frozenset({"slices"})


class Events:
    """Sends every event to the listeners and, when a path is given, appends it to a JSON-lines file.

    Args:
        path: file to append to; None keeps events in memory only for the listeners.
        listeners: called with each event in the order given; an event is a dict with "event" and "time_s".
    """

    def __init__(self, path: Path | None = None, listeners: tuple[Listener, ...] = ()) -> None:
        self._listeners = listeners
        self._lock = threading.Lock()
        self._file: TextIO | None = None
        if path is not None:
            self._file = path.open("a", encoding="utf-8")
            if self._file.tell() and not _ends_a_line(path):
                self._file.write("\n")  # the process before us died inside a line

    def emit(self, event: str, **fields: Any) -> None:
        """Tell that something happened; fields must be JSON values."""
        record = {"event": event, "time_s": round(time.time(), 3), **fields}
        with self._lock:
            if self._file is not None and event not in _TRANSIENT:
                self._file.write(json.dumps(record) + "\n")
                self._file.flush()
        for listener in self._listeners:
            listener(record)

    def close(self) -> None:
        """Close the file; later events reach listeners only."""
        with self._lock:
            if self._file is not None:
                self._file.close()
                self._file = None


def read_events(path: Path) -> list[dict[str, Any]]:
    """The events of a file, leaving out a line that a kill cut short."""
    events: list[dict[str, Any]] = []
    if path.exists():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                continue
            if isinstance(record, dict):
                events.append(record)
    return events


def _ends_a_line(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(-1, 2)
        return file.read(1) == b"\n"

"""Files that appear whole or not at all: written beside their place, synced, and renamed into it."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """A binary file that replaces `path` when the block ends well and vanishes when it does not.

    Raises:
        OSError: the folder is missing, read-only or full.
    """
    path = Path(path)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(handle, "w+b") as file:
            yield file
        publish(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def publish(temporary: str | os.PathLike[str], path: str | os.PathLike[str]) -> None:
    """Syncs a finished temporary file and renames it into its place in the same folder.

    Raises:
        OSError: the disk is full or read-only.
    """
    temporary, path = Path(temporary), Path(path)
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    # temporary files are private; a result is as readable as the umask allows
    mask = os.umask(0)
    os.umask(mask)
    temporary.chmod(0o666 & ~mask)
    temporary.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)

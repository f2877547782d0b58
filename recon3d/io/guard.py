"""The one gate every reader passes: believe nothing in a file before it is checked, and nothing beyond a cap.

Order of every read: size of the file, header alone, dimensions and bytes against the budget and against what a file of
this size can hold, geometry, and only then the data, inflated in bounded pieces. Whatever is wrong becomes one
`BadInput` sentence. Nothing is unpickled, no link is followed out of the file, no plug-in filter is loaded.
"""

from __future__ import annotations

import contextlib
import math
import os
import stat
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

# deflate cannot do better than 1032:1, so a larger claim is a lie whatever the content
_DEFLATE_RATIO = 1000.0
# what free memory a single file may claim; the rest is for the reconstruction itself
_MEMORY_SHARE = 0.5
_SPACING_MM = (1e-4, 1e3)
_PIECE = 1 << 20
# bytes that may follow the described content of a compressed file before it counts as a bomb
_TRAILING = 1 << 20


class BadInput(ValueError):
    """A file that cannot be used: what is wrong with it and what to do, in one sentence.

    Attributes:
        path: the file.
        why: what was found, and what is allowed.
        hint: what to do about it.
    """

    def __init__(self, path: str | os.PathLike[str], why: str, hint: str) -> None:
        self.path, self.why, self.hint = os.fspath(path), _one_line(why), _one_line(hint)
        super().__init__(f"{self.path}: {self.why}; {self.hint}")

    def __reduce__(self) -> tuple[type[BadInput], tuple[str, str, str]]:
        return type(self), (self.path, self.why, self.hint)


@dataclass(frozen=True)
class Limits:
    """How much a file may ask for.

    Attributes:
        budget_bytes: bytes one array may take once read; None takes half of the memory free at that moment.
        ratio: how many times its compressed size an array may have.
    """

    budget_bytes: int | None = None
    ratio: float = _DEFLATE_RATIO

    def budget(self) -> int:
        """The budget in bytes."""
        if self.budget_bytes is not None:
            return self.budget_bytes
        import psutil

        return int(psutil.virtual_memory().available * _MEMORY_SHARE)


DEFAULT_LIMITS = Limits()


def check_file(path: str | os.PathLike[str]) -> int:
    """The size in bytes of a regular, readable, non-empty file.

    Raises:
        BadInput: the path is missing, a folder, a device or pipe, empty, or not readable.
    """
    try:
        info = Path(path).stat()
    except (OSError, ValueError) as error:
        reason = "does not exist" if isinstance(error, FileNotFoundError) else f"cannot be reached ({error})"
        raise BadInput(path, reason, "check the path") from None
    if stat.S_ISDIR(info.st_mode):
        raise BadInput(path, "is a folder", "give one file")
    if not stat.S_ISREG(info.st_mode):
        raise BadInput(path, "is not a regular file", "copy its content to a file first")
    if info.st_size == 0:
        raise BadInput(path, "is empty", "copy or export it again")
    if not os.access(path, os.R_OK):
        raise BadInput(path, "may not be read by this user", "change its permissions")
    return info.st_size


def check_array(
    path: str | os.PathLike[str],
    name: str,
    shape: Sequence[int],
    itemsize: int,
    stored_bytes: int,
    compressed: bool,
    limits: Limits = DEFAULT_LIMITS,
    working_itemsize: int = 0,
) -> int:
    """The bytes of an array that a header describes, if they can be true and fit.

    Args:
        path: the file, for the sentence.
        name: the array's name, for the sentence.
        shape: sizes as the header has them.
        itemsize: bytes of an element.
        stored_bytes: bytes the file can have for it.
        compressed: whether those are deflated.
        limits: what may be asked for.
        working_itemsize: bytes of an element that reading takes on top.

    Raises:
        BadInput: a size is not positive, the file is too short for it, or it does not fit the budget.
    """
    sizes = [int(n) for n in shape]
    text = " x ".join(map(str, sizes)) or "scalar"
    if any(n <= 0 for n in sizes):
        raise BadInput(path, f"{name} has size {text}; every size must be positive", "export it again")
    nbytes = math.prod(sizes) * itemsize  # Python integers: cannot overflow
    if compressed and nbytes > limits.ratio * stored_bytes:
        raise BadInput(
            path,
            f"{name} claims {text} ({_human(nbytes)}), over {limits.ratio:g} times the {_human(stored_bytes)} stored",
            "the header lies or the file is truncated; copy or export it again",
        )
    if not compressed and nbytes > stored_bytes:
        raise BadInput(
            path,
            f"{name} claims {text} ({_human(nbytes)}) but only {_human(stored_bytes)} are stored",
            "the file is truncated; copy or export it again",
        )
    needed, budget = math.prod(sizes) * (itemsize + working_itemsize), limits.budget()
    if needed > budget:
        raise BadInput(
            path,
            f"{name} of {text} needs {_human(needed)}, more than the budget of {_human(budget)}",
            "free memory or cut it into slabs",
        )
    return nbytes


def check_affine(path: str | os.PathLike[str], affine: ArrayLike) -> NDArray[np.float64]:
    """A finite, invertible 4x4 voxel-to-world matrix whose columns are plausible voxel sizes.

    Raises:
        BadInput: it is not.
    """
    matrix = np.asarray(affine, dtype=np.float64)
    hint = "repair its orientation (sform or qform) in an image viewer"
    if matrix.shape != (4, 4) or not np.isfinite(matrix).all():
        raise BadInput(path, "its affine holds NaN or infinity", hint)
    if not np.array_equal(matrix[3], [0, 0, 0, 1]):
        raise BadInput(path, f"the last row of its affine is {matrix[3].tolist()}, not 0 0 0 1", hint)
    if np.abs(matrix).max() > 1e6:
        raise BadInput(path, "its affine reaches more than a kilometre away", hint)
    spacing = np.sqrt((matrix[:3, :3] ** 2).sum(axis=0))
    for axis, size in zip("ijk", spacing, strict=True):
        check_spacing(path, f"voxel size along {axis}", float(size))
    # relative to the voxel's volume: 1 for orthogonal axes, 0 for axes in one plane
    if abs(np.linalg.det(matrix[:3, :3] / spacing)) < 1e-3:
        raise BadInput(path, "the axes of its affine lie in one plane", hint)
    return matrix


def check_spacing(path: str | os.PathLike[str], name: str, value: float) -> float:
    """A length in (1e-4, 1e3) mm.

    Raises:
        BadInput: it is not.
    """
    low, high = _SPACING_MM
    if not (math.isfinite(value) and low < value < high):
        raise BadInput(
            path, f"{name} is {value:g} mm; {low:g} to {high:g} mm is allowed", "check the unit, mm is expected"
        )
    return value


def check_scaling(path: str | os.PathLike[str], slope: float, intercept: float) -> tuple[float, float]:
    """Slope and intercept of stored values; a slope of 0 means unscaled.

    Raises:
        BadInput: either is not finite or the slope is absurd.
    """
    if not (math.isfinite(slope) and math.isfinite(intercept)) or abs(slope) > 1e30 or abs(intercept) > 1e30:
        raise BadInput(path, f"its scaling is {slope:g} x + {intercept:g}", "write it again with a finite slope")
    return (1.0, 0.0) if slope == 0 else (slope, intercept)


def check_finite(path: str | os.PathLike[str], name: str, values: NDArray[Any]) -> None:
    """No NaN and no infinity in an array.

    Raises:
        BadInput: there is one; says how many and where the first is.
    """
    flat = values.reshape(-1)
    bad, first = 0, -1
    for start in range(0, flat.size, _PIECE):
        wrong = ~np.isfinite(flat[start : start + _PIECE])
        if wrong.any():
            first = start + int(wrong.argmax()) if first < 0 else first
            bad += int(wrong.sum())
    if bad:
        where = tuple(int(i) for i in np.unravel_index(first, values.shape))
        raise BadInput(
            path,
            f"{name} holds {bad} NaN or infinite values of {flat.size}, the first at {where}",
            "replace or mask them before reconstruction",
        )


def read_bytes(path: str | os.PathLike[str], file: IO[bytes], count: int) -> bytes:
    """Exactly `count` bytes of an open file.

    Raises:
        BadInput: the file ends before.
    """
    data = file.read(count)
    if len(data) != count:
        raise BadInput(path, f"ends after {len(data)} of {count} header bytes", "copy or export it again")
    return data


class Inflater:
    """A gzip stream read in bounded pieces; never holds more than a piece beyond what was asked for."""

    def __init__(self, path: str | os.PathLike[str], file: IO[bytes]) -> None:
        self._path, self._file = path, file
        self._inflate = zlib.decompressobj(wbits=31)
        self._pending = b""
        self._members = 1
        self._done = False

    def read(self, count: int) -> bytes:
        """Up to `count` bytes; fewer only at the end of the stream.

        Raises:
            BadInput: the stream is corrupt or truncated.
        """
        out = bytearray()
        while len(out) < count and not self._done:
            out += self._piece(min(count - len(out), _PIECE))
        return bytes(out)

    def readinto(self, view: memoryview) -> int:
        """Fills a byte view as far as the stream goes; returns the bytes written."""
        at = 0
        while at < len(view) and not self._done:
            piece = self._piece(min(len(view) - at, _PIECE))
            view[at : at + len(piece)] = piece
            at += len(piece)
        return at

    def finish(self) -> None:
        """Reads on to the end, so that the checksum is verified.

        Raises:
            BadInput: the checksum is wrong, the end is missing, or much more follows than was described.
        """
        rest = 0
        while not self._done:
            rest += len(self._piece(_PIECE))
            if rest > _TRAILING:
                raise BadInput(
                    self._path, "holds far more data than its header describes", "the header is wrong; export it again"
                )

    def _piece(self, count: int) -> bytes:
        if self._inflate.eof:
            return self._next_member()
        if not self._pending:
            self._pending = self._file.read(_PIECE)
            if not self._pending:
                raise BadInput(self._path, "its compressed data end too early", "copy or export it again")
        try:
            piece = self._inflate.decompress(self._pending, count)
        except zlib.error as error:
            raise BadInput(
                self._path, f"its compressed data are corrupt ({error})", "copy or export it again"
            ) from None
        self._pending = self._inflate.unused_data if self._inflate.eof else self._inflate.unconsumed_tail
        return piece

    def _next_member(self) -> bytes:
        # gzip files may be concatenated, and may be padded with zeros
        rest = (self._pending or self._file.read(_PIECE)).lstrip(b"\0")
        if not rest:
            if not self._file.read(1):
                self._done = True
                return b""
            raise BadInput(self._path, "zeros and more follow its compressed data", "copy or export it again")
        self._members += 1
        if self._members > 4096:
            raise BadInput(self._path, "consists of thousands of gzip pieces", "compress it again in one piece")
        self._inflate, self._pending = zlib.decompressobj(wbits=31), rest
        return b""


@contextlib.contextmanager
def as_bad_input(
    path: str | os.PathLike[str],
    what: str,
    kinds: tuple[type[BaseException], ...],
    hint: str = "copy or export it again",
) -> Iterator[None]:
    """Turns the listed errors of a parser into BadInput; BadInput itself passes through unchanged."""
    try:
        yield
    except BadInput:
        raise
    except kinds as error:
        text = _one_line(str(error))[:200] or type(error).__name__
        raise BadInput(path, f"{what} ({text})", hint) from None


def _one_line(text: str) -> str:
    return " ".join(text.split()).rstrip(".;")


def _human(nbytes: float) -> str:
    for unit in ("bytes", "KiB", "MiB", "GiB", "TiB"):
        if nbytes < 1024 or unit == "TiB":
            return f"{nbytes:.0f} {unit}" if unit == "bytes" else f"{nbytes:.3g} {unit}"
        nbytes /= 1024
    raise AssertionError("unreachable")

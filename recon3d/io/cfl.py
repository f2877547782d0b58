"""BART's pairs of files: a text `.hdr` with up to 16 sizes, and a `.cfl` of complex64, first axis fastest.

Axes: read, phase 1, phase 2, coil, maps, echo time, two of coefficients, iteration, shift, time, time 2, level, slice,
average, batch. A first axis of 1 means a trajectory, which is a pair of its own. Format: mrirecon.github.io/bart.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recon3d.geometry import VolumeGrid
from recon3d.io.acquisitions import take_apart
from recon3d.io.guard import DEFAULT_LIMITS, BadInput, Limits, check_array, check_file
from recon3d.io.kspace import (
    KSpace,
    KSpaceOptions,
    assemble_cartesian,
    assemble_noncartesian,
    check_kspace,
    describe_sampling,
    sampled_points,
    slices_of,
)

_AXES = (
    *("read", "phase 1", "phase 2", "coil", "maps", "echo time", "coefficient", "coefficient 2", "iteration"),
    *("shift", "time", "time 2", "level", "slice", "average", "batch"),
)
_READ, _PHASE, _PARTITION, _COIL, _ECHO, _TIME, _TIME_2, _SLICE, _AVERAGE = 0, 1, 2, 3, 5, 10, 11, 13, 14
_MOST_HEADER = 1 << 20
_MOST_SLICES = 1 << 14


def cfl_pair(path: str | os.PathLike[str]) -> tuple[Path, Path] | None:
    """Header and data of a pair named by either file, or by what they share; None if it is not one."""
    path = Path(path)
    base = path.with_suffix("") if path.suffix in (".hdr", ".cfl") else path
    header, data = base.with_name(base.name + ".hdr"), base.with_name(base.name + ".cfl")
    if not (header.is_file() and data.is_file()) or (path == base and path.exists()):
        return None
    with header.open("rb") as file:
        return (header, data) if file.read(12) == b"# Dimensions" else None


def read_cfl(path: str | os.PathLike[str], options: KSpaceOptions, limits: Limits = DEFAULT_LIMITS) -> KSpace:
    """k-space from a BART pair, named by either file.

    Raises:
        BadInput: as read_kspace.
    """
    header, data_path = _pair(path)
    dims = _dims(path, header, data_path)
    notes: list[str] = []
    kept = {_ECHO: options.contrast, _TIME: options.repetition, _TIME_2: options.phase}
    for axis, size in enumerate(dims):
        if axis in (_READ, _PHASE, _PARTITION, _COIL, _SLICE, _AVERAGE) or size == 1:
            continue
        if axis not in kept:
            raise BadInput(path, f"has {size} entries along {_AXES[axis]}", "extract one of them with BART first")
        if kept[axis] >= size:
            raise BadInput(
                path, f"has {size} entries along {_AXES[axis]}, number {kept[axis]} was asked for", "counted from 0"
            )
        notes.append(f"entry {kept[axis]} of {size} along {_AXES[axis]} is read, the others are left out")
    first, last = slices_of(path, options, dims[_SLICE])
    if last - first > _MOST_SLICES:
        raise BadInput(path, f"has {last - first} slices", f"at most {_MOST_SLICES} are read; name some with slices=")
    average = options.average
    if average is not None and average >= dims[_AVERAGE]:
        raise BadInput(path, f"has {dims[_AVERAGE]} averages, number {average} was asked for", "counted from 0")
    chosen = range(dims[_AVERAGE]) if average is None else (average,)
    if len(chosen) > 1:
        notes.append(f"the mean of {len(chosen)} averages is taken")
    block = [dims[_COIL], dims[_PARTITION], dims[_PHASE], dims[_READ]]
    check_array(path, "its k-space", [last - first, *block], 8, 1 << 62, False, limits, working_itemsize=16)
    data = np.zeros((last - first, *block), np.complex64)
    for k in range(first, last):
        for a in chosen:
            index = {**kept, _SLICE: k, _AVERAGE: a}
            with np.errstate(all="ignore"):  # what is not finite is told below
                data[k - first] += _block(path, data_path, dims, {i: v for i, v in index.items() if dims[i] > 1})
        if len(chosen) > 1:
            data[k - first] /= len(chosen)
    if options.pixel_mm is None:
        notes.append("the size of pixels is not recorded in this format; 1 mm is assumed")
    steps = (options.slice_spacing_mm or 1.0, *(options.pixel_mm or (1.0, 1.0)))
    if dims[_READ] == 1 and dims[_PHASE] * dims[_PARTITION] > 1:
        return _noncartesian(path, data, options, steps, notes, limits)
    check_kspace(path, data.reshape(len(data), dims[_COIL], -1, dims[_READ]))
    if dims[_PARTITION] == 1:
        return assemble_cartesian(path, data[:, :, 0], _grid(data[:, 0, 0].shape, steps), "bart", notes)
    if len(data) > 1:
        raise BadInput(
            path, f"has {len(data)} slabs of {dims[_PARTITION]} partitions", "read one with slices=(k, k + 1)"
        )
    volume = np.ascontiguousarray(data[0].transpose(1, 0, 2, 3))
    turned, mask, axes = take_apart(path, volume, sampled_points(volume), notes)
    spacing = {"s": steps[0], "p": steps[1], "r": steps[2]}
    grid = _grid((turned.shape[0], *turned.shape[2:]), tuple(spacing[a] for a in axes))
    return assemble_cartesian(path, turned, grid, "bart", notes, mask)


def describe_cfl(path: str | os.PathLike[str]) -> dict[str, Any]:
    """From the header and one coil of the middle slice."""
    header, data_path = _pair(path)
    dims = _dims(path, header, data_path)
    out: dict[str, Any] = {
        "format": "BART cfl",
        "sizes": {name: n for name, n in zip(_AXES, dims, strict=True) if n > 1},
        "coils": dims[_COIL],
        "slices": dims[_SLICE],
        "orientation": "not recorded",
        "noise scans": "none",
    }
    if dims[_READ] == 1:
        return {**out, "sampling": {"kind": "non-Cartesian, its trajectory is another pair"}}
    at = {_SLICE: dims[_SLICE] // 2} if dims[_SLICE] > 1 else {}
    count = math.prod(dims[:3])
    check_array(path, "one coil", [count], 8, 1 << 62, False)
    one = _load(path, data_path, _offset(dims, at), count).reshape(dims[2], 1, dims[1], dims[0])
    mask = np.asarray(sampled_points(one).any(axis=2)) if dims[2] > 1 else sampled_points(one)[0]
    return {**out, "matrix_yx": [dims[1], dims[0]], "sampling": describe_sampling(mask)}


def _pair(path: str | os.PathLike[str]) -> tuple[Path, Path]:
    pair = cfl_pair(path)
    if pair is None:
        raise BadInput(path, "is not a pair of .hdr and .cfl", "both files must lie side by side")
    return pair


def _dims(path: str | os.PathLike[str], header: Path, data: Path) -> tuple[int, ...]:
    """The sixteen sizes, checked against the size of the data."""
    size = check_file(header)
    if size > _MOST_HEADER:
        raise BadInput(path, f"has a header of {size} bytes", "the first lines suffice")
    lines = header.read_bytes().decode("latin1").splitlines()
    words = lines[1].split() if len(lines) > 1 else []
    if not 1 <= len(words) <= len(_AXES) or any(not w.isascii() or not w.isdigit() or len(w) > 12 for w in words):
        raise BadInput(path, f"has sizes {' '.join(words)[:60]!r}", f"1 to {len(_AXES)} whole numbers are expected")
    dims = [int(w) for w in words] + [1] * (len(_AXES) - len(words))
    if min(dims) < 1:
        raise BadInput(path, f"has sizes {dims}", "every size must be positive")
    stored = check_file(data)
    if math.prod(dims) * 8 != stored:
        text = " x ".join(str(n) for n in dims if n > 1)
        raise BadInput(
            path, f"claims {text or 1} samples ({math.prod(dims) * 8} bytes), its .cfl has {stored}", "export it again"
        )
    return tuple(dims)


def _offset(dims: tuple[int, ...], index: dict[int, int]) -> int:
    return 8 * sum(k * math.prod(dims[:axis]) for axis, k in index.items())


def _block(
    path: str | os.PathLike[str], data: Path, dims: tuple[int, ...], index: dict[int, int]
) -> NDArray[np.complex64]:
    """[coil, phase 2, phase 1, read] at an index of the slower axes."""
    count = math.prod(dims[:4])
    return _load(path, data, _offset(dims, index), count).reshape(dims[3], dims[2], dims[1], dims[0])


def _load(path: str | os.PathLike[str], data: Path, offset: int, count: int) -> NDArray[np.complex64]:
    values = np.fromfile(data, "<c8", count, offset=offset)
    if values.size != count:
        raise BadInput(path, "changed while it was read", "try again")
    return values.astype(np.complex64, copy=False)


def _grid(shape: tuple[int, ...], steps: tuple[float, ...]) -> VolumeGrid:
    return VolumeGrid((shape[0], shape[1], shape[2]), (steps[0], steps[1], steps[2]))


def _noncartesian(
    path: str | os.PathLike[str],
    data: NDArray[np.complex64],
    options: KSpaceOptions,
    steps: tuple[float, ...],
    notes: list[str],
    limits: Limits,
) -> KSpace:
    """Samples [slice, coil, spoke, sample, 1] with the trajectory that the options name, in cycles per field."""
    if options.trajectory is None:
        raise BadInput(path, "is not Cartesian (its first size is 1)", "name its trajectory with trajectory=")
    header, values = _pair(options.trajectory)
    dims = _dims(options.trajectory, header, values)
    if dims[0] != 3 or dims[1:3] != data.shape[3:1:-1] or math.prod(dims[3:]) != 1:
        raise BadInput(
            options.trajectory,
            f"has sizes {' x '.join(map(str, dims[:4]))} for {data.shape[3]} samples and {data.shape[2]} spokes",
            "3 coordinates for every sample of one slice are expected",
        )
    check_array(path, "its trajectory", dims, 8, 1 << 62, False, limits)
    stored = _load(options.trajectory, values, 0, math.prod(dims)).reshape(dims[2], dims[1], 3)
    if not (np.isfinite(stored).all() and (stored.imag == 0).all()):
        raise BadInput(options.trajectory, "has coordinates that are not finite and real", "export it again")
    points = stored.real
    volume = bool(points[..., 2].any())
    points = points if volume else points[..., :2]
    matrix = options.matrix
    if matrix is None:
        reach = np.abs(points).max(axis=(0, 1)).astype(float)
        wide = [2 * max(1, math.ceil(r - 1e-3)) for r in reach[::-1]]
        matrix = tuple(wide) if volume else (max(wide), max(wide))
        notes.append(f"the image is taken to have {' x '.join(map(str, matrix))} pixels, as the trajectory reaches")
    if volume and len(matrix) != 3:
        raise BadInput(path, f"has a three-dimensional trajectory and a matrix {matrix}", "give matrix=(z, y, x)")
    if volume:
        if len(data) > 1:
            raise BadInput(path, f"has {len(data)} volumes", "read one with slices=(k, k + 1)")
        grid, flat = _grid(matrix, steps), data[0].reshape(data.shape[1], -1)
    else:
        grid, flat = _grid((len(data), *matrix[-2:]), steps), data.reshape(*data.shape[:2], -1)
    return assemble_noncartesian(path, flat, [points], grid, "bart", options, "index", notes)

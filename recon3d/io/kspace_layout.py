"""recon3d's own k-space layout in HDF5, and any HDF5 file with `kspace` and, if not Cartesian, `trajectory`.

The layout is described in docs/formats.md. Cartesian: `kspace` [slice, coil, ky, kx], `mask`. Non-Cartesian: `kspace`
[slice, coil, ...] with `trajectory` [..., 2] for all slices or [slice, ..., 2], or `kspace` [coil, ...] with
`trajectory` [..., 3]. Slices with trajectories of their own may be frames of a series, chosen or merged on reading.
"""

from __future__ import annotations

import math
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recon3d.geometry import VolumeGrid
from recon3d.io.guard import DEFAULT_LIMITS, BadInput, Limits, as_bad_input, check_spacing
from recon3d.io.hdf5 import HDF5Reader, Selection, Tree, write_hdf5
from recon3d.io.kspace import (
    KSpace,
    KSpaceOptions,
    assemble_cartesian,
    assemble_noncartesian,
    describe_grid,
    describe_sampling,
    sampled_points,
    slices_of,
)

FORMAT = "recon3d-kspace"
VERSION = 1

_UNITS = ("rad", "cycles", "index")
_MOST_SIZE = 1 << 16
# "trajectory (...) in cycles/pixel of a 256x256 image grid", as some files say in words
_MATRIX_IN_WORDS = re.compile(r"(\d{1,5}) ?x ?(\d{1,5}) image grid")


def read_kspace_hdf5(
    path: str | os.PathLike[str],
    options: KSpaceOptions,
    reader: HDF5Reader,
    tree: Tree,
    limits: Limits = DEFAULT_LIMITS,
) -> KSpace:
    """k-space from an open reader whose tree has a dataset `kspace`.

    Raises:
        BadInput: as read_kspace.
    """
    version = tree[""]["attrs"].get("version", VERSION)
    if tree[""]["attrs"].get("format") == FORMAT and version != VERSION:
        raise BadInput(path, f"has layout version {str(version)[:20]}", f"version {VERSION} is read; update recon3d")
    if "trajectory" in tree:
        return _read_noncartesian(path, options, reader, tree, limits)
    shape = _shape(path, tree, "kspace")
    if len(shape) != 4:
        raise BadInput(path, f"has kspace of size {shape} and no trajectory", "[slice, coil, ky, kx] is read")
    notes: list[str] = []
    first, last = slices_of(path, options, shape[0])
    cut: Selection = [(first, last, None)]
    grid = _grid(path, tree, options, (shape[0], shape[2], shape[3]), notes)
    mask = None
    if "mask" in tree:
        stacked = len(_shape(path, tree, "mask")) == 3 and _shape(path, tree, "mask")[0] == shape[0]
        mask = reader.load(path, "mask", cut if stacked else (), limits)
    return assemble_cartesian(
        path,
        reader.load(path, "kspace", cut, limits),
        grid.slab(first, last) if (first, last) != (0, shape[0]) else grid,
        "recon3d",
        notes,
        mask,
        reader.load(path, "maps", cut, limits) if "maps" in tree else None,
        _covariance(path, reader, tree, limits),
    )


def describe_kspace_hdf5(path: str | os.PathLike[str], reader: HDF5Reader, tree: Tree) -> dict[str, Any]:
    """From the headers and one coil of the middle slice."""
    shape, notes = _shape(path, tree, "kspace"), list[str]()
    out: dict[str, Any] = {"format": "recon3d k-space HDF5", "coils": shape[1] if len(shape) > 1 else 1}
    if "trajectory" in tree:
        points = _shape(path, tree, "trajectory")
        volume = points[-1:] == (3,)
        first = reader.load(path, "trajectory", [(0, 1, None)])
        out |= {"coils": shape[0] if volume else out["coils"], "slices or frames": 1 if volume else shape[0]}
        out["sampling"] = {
            "kind": f"non-Cartesian, {points[-1]} coordinates",
            "samples": math.prod(shape[1:] if volume else shape[2:]),
            "trajectories": shape[0] if len(points) == len(shape) and not volume else 1,
            "unit": tree["trajectory"].get("attrs", {}).get("unit", "not stated"),
            "largest coordinate of the first part": round(float(np.abs(first).max()), 5),
        }
        with as_bad_input(path, "is not described whole", (BadInput,)):
            out |= describe_grid(_grid(path, tree, KSpaceOptions(), _matrix(path, tree, KSpaceOptions(), shape), notes))
        return {**out, "notes": notes}
    if len(shape) != 4:
        return out
    part: Selection = [(shape[0] // 2, shape[0] // 2 + 1, None), (0, 1, None)]
    mask = sampled_points(reader.load(path, "kspace", part))[0]
    if "mask" in tree:
        with as_bad_input(path, "has a mask of another size", (ValueError,)):
            mask = mask & (reader.load(path, "mask") != 0)
    grid = _grid(path, tree, KSpaceOptions(), (shape[0], shape[2], shape[3]), notes)
    out |= {"matrix_yx": list(shape[2:]), "slices": shape[0], **describe_grid(grid)}
    out["sampling"] = describe_sampling(mask)
    out["noise scans"] = "covariance known" if "noise_covariance" in tree else "none"
    return {**out, "notes": notes}


def write_kspace_hdf5(path: str | os.PathLike[str], kspace: KSpace) -> None:
    """Writes k-space in recon3d's layout; the file appears whole or not at all.

    Args:
        path: ends in .h5 or .hdf5.
        kspace: what to write; notes are not kept.

    Raises:
        ValueError: the name ends in something else.
        OSError: the folder is missing, read-only or full.
    """
    path = Path(path)
    if path.suffix not in (".h5", ".hdf5"):
        raise ValueError(f"write_kspace_hdf5: the name must end in .h5 or .hdf5, got {path.name}")
    data = kspace.data.detach().cpu().numpy()
    arrays: list[tuple[str, NDArray[Any]]] = []
    attributes: list[tuple[str, str, Any]] = [("/", "format", FORMAT), ("/", "version", VERSION)]
    if kspace.mask is not None:
        arrays += [("kspace", data), ("mask", kspace.mask.detach().cpu().numpy().astype(np.uint8))]
        attributes.append(("kspace", "axes", "slice:coil:ky:kx"))
    elif kspace.trajectories is not None:
        layouts = {t.layout for t in kspace.trajectories}
        layout = layouts.pop() if len(layouts) == 1 else (kspace.trajectories[0].n_samples,)
        points = [t.points.numpy()[:, ::-1].reshape(*layout, t.ndim) for t in kspace.trajectories]
        alone = len(points) == 1 and (kspace.is_volume or kspace.grid.shape[0] > 1 or len(layout) > 0)
        arrays.append(("kspace", data.reshape(*data.shape[:-1], *layout)))
        arrays.append(("trajectory", points[0] if alone else np.stack(points)))
        attributes += [("trajectory", "unit", "rad"), ("trajectory", "axes", "kx:ky:kz"[: 3 * points[0].shape[-1] - 1])]
        attributes.append(("kspace", "axes", "coil:sample" if kspace.is_volume else "slice:coil:sample"))
    for name, values in (("maps", kspace.maps), ("noise_covariance", kspace.noise_covariance)):
        if values is not None:
            arrays.append((name, values.detach().cpu().numpy()))
    attributes += [("grid", "shape", kspace.grid.shape), ("grid", "spacing_mm", kspace.grid.spacing_mm)]
    if kspace.grid.affine is not None:
        attributes.append(("grid", "affine", kspace.grid.affine))
    write_hdf5(path, arrays, attributes)


def _read_noncartesian(
    path: str | os.PathLike[str], options: KSpaceOptions, reader: HDF5Reader, tree: Tree, limits: Limits
) -> KSpace:
    shape, points_shape, notes = _shape(path, tree, "kspace"), _shape(path, tree, "trajectory"), list[str]()
    d = points_shape[-1] if points_shape else 0
    volume = d == 3 and points_shape[:-1] == shape[1:]
    own = d == 2 and points_shape[:-1] == (shape[0], *shape[2:])
    shared = d == 2 and points_shape[:-1] == shape[2:]
    if len(shape) < 2 or not (volume or own or shared):
        raise BadInput(
            path,
            f"has kspace of size {shape} with a trajectory of {points_shape}",
            "[slice, coil, ...] goes with [..., 2] or [slice, ..., 2], and [coil, ...] with [..., 3]",
        )
    unit = _stated_unit(path, tree)
    covariance = _covariance(path, reader, tree, limits)
    data = reader.load(path, "kspace", (), limits)
    points = reader.load(path, "trajectory", (), limits)
    maps = reader.load(path, "maps", (), limits) if "maps" in tree else None
    grid = _grid(path, tree, options, _matrix(path, tree, options, shape), notes)
    if volume:
        flat = data.reshape(shape[0], -1)
        return assemble_noncartesian(path, flat, [points], grid, "recon3d", options, unit, notes, maps, covariance)
    frames = _frames(path, options, shape[0])
    whole = frames == list(range(shape[0]))
    data = data if whole else data[frames]
    per_slice = [points[k] for k in frames] if own else [points]
    if maps is not None and not whole and maps.shape[:1] == shape[:1]:
        maps = maps[frames]
    if options.merge_frames:
        layout = [p.reshape(-1, *p.shape[-1:]) if p.ndim < 3 else p for p in per_slice] * (1 if own else len(frames))
        data = np.concatenate(list(data), axis=1)[None]
        per_slice = [np.concatenate(layout, axis=0)]
        maps = None if maps is None else maps[:1]
        grid = VolumeGrid((1, *grid.slice_shape), grid.spacing_mm)
        notes.append(f"{len(frames)} frames are merged into one slice")
    else:
        if own and shape[0] > 1 and tree[""]["attrs"].get("format") != FORMAT:
            notes.append(f"{len(frames)} of {shape[0]} frames are read as slices, each with its own trajectory")
        if not whole:
            contiguous = frames == list(range(frames[0], frames[-1] + 1))
            sized = VolumeGrid((len(frames), *grid.slice_shape), grid.spacing_mm)
            grid = grid.slab(frames[0], frames[-1] + 1) if contiguous and grid.affine is not None else sized
    return assemble_noncartesian(
        path, data.reshape(*data.shape[:2], -1), per_slice, grid, "recon3d", options, unit, notes, maps, covariance
    )


def _frames(path: str | os.PathLike[str], options: KSpaceOptions, n: int) -> list[int]:
    if options.frames is None:
        return list(range(*slices_of(path, options, n)))
    if options.slices is not None:
        raise BadInput(path, "is asked for frames and slices", "give one of the two")
    if max(options.frames) >= n:
        raise BadInput(path, f"has {n} frames, {list(options.frames)} were asked for", "frames are counted from 0")
    return [int(k) for k in options.frames]


def _stated_unit(path: str | os.PathLike[str], tree: Tree) -> Any:
    unit = tree["trajectory"].get("attrs", {}).get("unit")
    if unit is not None and unit not in _UNITS:
        raise BadInput(path, f"has a trajectory in {str(unit)[:30]!r}", f"{', '.join(_UNITS)} is read")
    return unit


def _shape(path: str | os.PathLike[str], tree: Tree, name: str) -> tuple[int, ...]:
    item = tree[name]
    if item["kind"] != "dataset" or not item["shape"] or 0 in item["shape"]:
        raise BadInput(path, f"has no usable dataset {name}", "check its layout")
    return tuple(item["shape"])


def _covariance(path: str | os.PathLike[str], reader: HDF5Reader, tree: Tree, limits: Limits) -> NDArray[Any] | None:
    return reader.load(path, "noise_covariance", (), limits) if "noise_covariance" in tree else None


def _matrix(
    path: str | os.PathLike[str], tree: Tree, options: KSpaceOptions, shape: tuple[int, ...]
) -> tuple[int, int, int]:
    """Image size [z, y, x] of non-Cartesian k-space: the option's, the grid's, or the file's in words."""
    volume = tree["trajectory"]["shape"][-1] == 3
    matrix = options.matrix
    if matrix is None:
        stated = tree.get("grid", {}).get("attrs", {}).get("shape")
        if isinstance(stated, list) and len(stated) == 3:
            return _sizes(path, stated if volume else [shape[0], *stated[1:]])
        words = _MATRIX_IN_WORDS.search(str(tree[""]["attrs"].get("layout", "")))
        matrix = (int(words[1]), int(words[2])) if words else None
    if matrix is None or (volume and len(matrix) != 3):
        raise BadInput(path, "does not say the size of its image", f"give matrix=({'z, ' if volume else ''}y, x)")
    return _sizes(path, list(matrix) if volume else [shape[0], *matrix[-2:]])


def _sizes(path: str | os.PathLike[str], sizes: list[Any]) -> tuple[int, int, int]:
    if any(not isinstance(n, int | float) or n != n or not 1 <= n <= _MOST_SIZE for n in sizes):
        raise BadInput(path, f"has an image of {str(sizes)[:60]} pixels", f"1 to {_MOST_SIZE} an axis is allowed")
    return int(sizes[0]), int(sizes[1]), int(sizes[2])


def _grid(
    path: str | os.PathLike[str],
    tree: Tree,
    options: KSpaceOptions,
    shape: tuple[int, int, int],
    notes: list[str],
) -> VolumeGrid:
    attributes = tree.get("grid", {}).get("attrs", {})
    stated = attributes.get("shape")
    if stated is not None and np.asarray(stated).reshape(-1).tolist() != list(shape) and options.matrix is None:
        raise BadInput(path, f"has a grid of {str(stated)[:60]} for k-space of {shape}", "they must agree")
    spacing = attributes.get("spacing_mm")
    if spacing is None:
        spacing = [1.0, 1.0, 1.0]
        if options.pixel_mm is None:
            notes.append("the size of pixels is not recorded; 1 mm is assumed")
    with as_bad_input(path, "its grid is not usable", (ValueError, TypeError, OverflowError)):
        steps = [float(s) for s in np.atleast_1d(spacing).tolist()]
        if len(steps) != 3:
            raise BadInput(path, f"has a grid of {len(steps)} spacings", "z, y and x are expected")
        if options.pixel_mm is not None:
            steps[1:] = options.pixel_mm
        if options.slice_spacing_mm is not None:
            steps[0] = options.slice_spacing_mm
        for step in steps:
            check_spacing(path, "grid spacing_mm", step)
        affine = attributes.get("affine")
        matrix = None if affine is None else tuple(map(tuple, np.asarray(affine, np.float64).reshape(4, 4).tolist()))
        return VolumeGrid(shape, (steps[0], steps[1], steps[2]), matrix)

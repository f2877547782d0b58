"""recon3d's own sinogram layout, in HDF5 and npz, and any HDF5 sinogram with angles beside it.

The layout is described in docs/formats.md: a dataset `sinogram` [slice, view, u], the attributes of the group
`geometry`, optionally those of `grid`, a dataset `weights` and an attribute `photons`. A file that has a `sinogram` and
`angles_deg` or `angles_rad` but no `geometry` is read too; what it does not say is given as options.
"""

from __future__ import annotations

import math
import os
import tokenize
import zipfile
import zlib
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from recon3d.geometry import FanBeam
from recon3d.io.atomic import atomic_write
from recon3d.io.guard import DEFAULT_LIMITS, BadInput, Limits, as_bad_input, check_array, check_file
from recon3d.io.hdf5 import HDF5Reader, Selection, Tree, write_hdf5
from recon3d.io.measurement import Measurement, ReadOptions, assemble

FORMAT = "recon3d-sinogram"
VERSION = 1

_GEOMETRY = (
    "type",
    "angles_rad",
    "angles_deg",
    "detector_spacing_mm",
    "detector_offset_mm",
    "source_to_axis_mm",
    "source_to_detector_mm",
)
_GRID = ("shape", "spacing_mm", "affine")
# attributes hold 64 KiB; more angles go into a dataset
_MOST_ANGLES_IN_ATTRIBUTE = 4096
_MOST_MEMBERS = 64
_PIECE = 1 << 20

# the Helsinki Tomography Challenge 2022 (Meaney et al., doi 10.5281/zenodo.6984868), whose source turns backwards
_HTC = {
    "source_to_axis_mm": "distanceSourceOrigin",
    "source_to_detector_mm": "distanceSourceDetector",
    "detector_spacing_mm": "pixelSizePost",
}


def read_sinogram_hdf5(
    path: str | os.PathLike[str],
    options: ReadOptions,
    reader: HDF5Reader,
    tree: Tree,
    limits: Limits = DEFAULT_LIMITS,
) -> Measurement:
    """A measurement from an open reader whose tree has a dataset `sinogram`.

    Raises:
        BadInput: as read_measurement.
    """
    root = tree[""]["attrs"]
    own = root.get("format") == FORMAT or "geometry" in tree
    if own and int(_scalar(root.get("version", VERSION), VERSION)) > VERSION:
        raise BadInput(path, f"has layout version {root['version']}", f"version {VERSION} is read; update recon3d")
    rank = len(tree["sinogram"].get("shape", ()))
    rows: Selection = [(options.rows[0], options.rows[1], None)] if options.rows and rank == 3 else []
    found: dict[str, Any] = {"sinogram": reader.load(path, "sinogram", rows, limits)}
    if "weights" in tree:
        found["weights"] = reader.load(path, "weights", rows, limits)
    for owner, prefix, names in (("geometry", "", _GEOMETRY), ("grid", "grid_", _GRID)):
        attributes = tree.get(owner, {}).get("attrs", {})
        for name in names:
            if f"{owner}/{name}" in tree:
                found[prefix + name] = reader.load(path, f"{owner}/{name}", (), limits)
            elif name in attributes:
                found[prefix + name] = attributes[name]
    for name in ("angles_rad", "angles_deg"):
        if name not in found and name in tree:
            found[name] = reader.load(path, name, (), limits)
    for name in (*_GEOMETRY, "photons", "rotation_centre", "angle_sign"):
        if name not in found and name in root:
            found[name] = root[name]
    if not own and all(theirs in root for theirs in _HTC.values()):
        if root.get("distanceUnit", "mm") != "mm":
            raise BadInput(path, f"gives distances in {root['distanceUnit']}", "mm is expected")
        found |= {ours: root[theirs] for ours, theirs in _HTC.items()} | {"type": "fan", "angle_sign": -1}
    _take_logarithm(path, found, options, tree["sinogram"].get("attrs", {}).get("unit"))
    return assemble(path, found, options, "recon3d" if own else "sinogram")


def read_sinogram_npz(
    path: str | os.PathLike[str], options: ReadOptions, limits: Limits = DEFAULT_LIMITS
) -> Measurement:
    """A measurement from an npz file with the layout's names as members.

    Raises:
        BadInput: as read_measurement.
    """
    names = {
        *_GEOMETRY,
        *(f"grid_{name}" for name in _GRID),
        "sinogram",
        "weights",
        "photons",
        "unit",
        "rotation_centre",
    }
    found: dict[str, Any] = load_npz(path, names, limits)
    if "sinogram" not in found:
        raise BadInput(path, "has no array named sinogram", "see the layout in docs/formats.md")
    for name in ("type", "unit"):
        if name in found:
            found[name] = str(found[name].reshape(-1)[0]) if found[name].size else ""
    if options.rows is not None and found["sinogram"].ndim == 3:
        for name in ("sinogram", "weights"):
            if name in found:
                found[name] = found[name][slice(*options.rows)]
    _take_logarithm(path, found, options, found.get("unit"))
    return assemble(path, found, options, "npz")


def write_measurement(path: str | os.PathLike[str], measurement: Measurement) -> None:
    """Writes a measurement in recon3d's layout; the file appears whole or not at all.

    Args:
        path: ends in .h5, .hdf5 or .npz.
        measurement: what to write; notes are not kept.

    Raises:
        ValueError: the name ends in something else.
        OSError: the folder is missing, read-only or full.
    """
    path = Path(path)
    g = measurement.geometry
    geometry: dict[str, Any] = {
        "type": "fan" if isinstance(g, FanBeam) else "parallel",
        "angles_rad": g.angles,
        "detector_spacing_mm": g.detector_spacing_mm,
        "detector_offset_mm": g.detector_offset_mm,
    }
    if isinstance(g, FanBeam):
        geometry |= {"source_to_axis_mm": g.source_to_axis_mm, "source_to_detector_mm": g.source_to_detector_mm}
    grid: dict[str, Any] = {}
    if measurement.grid is not None:
        grid = {"shape": measurement.grid.shape, "spacing_mm": measurement.grid.spacing_mm}
        if measurement.grid.affine is not None:
            grid["affine"] = measurement.grid.affine
    arrays = [("sinogram", measurement.sinogram.detach().cpu().numpy().astype(np.float32, copy=False))]
    if measurement.weights is not None:
        arrays.append(("weights", measurement.weights.detach().cpu().numpy().astype(np.float32, copy=False)))
    if path.suffix == ".npz":
        members = {**dict(arrays), **geometry, **{f"grid_{name}": value for name, value in grid.items()}}
        if measurement.photons is not None:
            members["photons"] = measurement.photons
        with atomic_write(path) as file:
            np.savez_compressed(file, **{name: np.asarray(value) for name, value in members.items()})  # type: ignore[arg-type]
        return
    if path.suffix not in (".h5", ".hdf5"):
        raise ValueError(f"write_measurement: the name must end in .h5, .hdf5 or .npz, got {path.name}")
    if g.n_views > _MOST_ANGLES_IN_ATTRIBUTE:
        arrays.append(("geometry/angles_rad", geometry.pop("angles_rad")))
    attributes: list[tuple[str, str, Any]] = [("/", "format", FORMAT), ("/", "version", VERSION)]
    if measurement.photons is not None:
        attributes.append(("/", "photons", measurement.photons))
    attributes += [("sinogram", "unit", "line integrals"), ("sinogram", "axes", "slice:view:u")]
    attributes += [("geometry", name, value) for name, value in geometry.items()]
    attributes += [("grid", name, value) for name, value in grid.items()]
    write_hdf5(path, arrays, attributes)


def load_npz(path: str | os.PathLike[str], names: set[str], limits: Limits = DEFAULT_LIMITS) -> dict[str, NDArray[Any]]:
    """The named arrays of an npz archive; others are not touched. Objects are refused, members are capped.

    Raises:
        BadInput: the archive is damaged, lies about sizes, or an array is not made of numbers or text.
    """
    size = check_file(path)
    out: dict[str, NDArray[Any]] = {}
    broken = (
        zipfile.BadZipFile,
        zlib.error,
        EOFError,
        OSError,
        ValueError,
        KeyError,
        NotImplementedError,
        RuntimeError,
        OverflowError,
        SyntaxError,
        TypeError,
        tokenize.TokenError,  # numpy parses headers of old files so
    )
    with as_bad_input(path, "is not a readable npz archive", broken), zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        if len(members) > _MOST_MEMBERS:
            raise BadInput(path, f"has {len(members)} members", f"at most {_MOST_MEMBERS} are read")
        total = 0
        for member in members:
            name = member.filename.removesuffix(".npy")
            if name not in names or name == member.filename:
                continue
            if name in out:
                raise BadInput(path, f"holds {name} twice", "save it again")
            if member.flag_bits & 1:
                raise BadInput(path, f"{name} is encrypted", "save it without a password")
            if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise BadInput(
                    path, f"{name} is packed by method {member.compress_type}", "stored and deflate are read"
                )
            total += member.file_size
            check_array(path, "its arrays", [total], 1, size, True, limits)
            with archive.open(member) as file:
                out[name] = _read_npy(path, name, file, member.file_size)
    return out


def _read_npy(path: str | os.PathLike[str], name: str, file: IO[bytes], size: int) -> NDArray[Any]:
    version = np.lib.format.read_magic(file)
    read_header = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }.get(version)
    if read_header is None:
        raise BadInput(path, f"{name} has npy version {version}", "versions 1.0 and 2.0 are read")
    shape, fortran, dtype = read_header(file, max_header_size=10_000)
    if dtype.hasobject or dtype.kind not in "iufU" or dtype.names:
        raise BadInput(path, f"{name} holds values of type {dtype}", "numbers are read, never Python objects")
    if any(n < 0 for n in shape):
        raise BadInput(path, f"{name} has size {shape}", "save it again")
    count = math.prod(shape)
    left = size - file.tell()
    if count * dtype.itemsize != left:
        raise BadInput(
            path, f"{name} of {shape} {dtype} needs {count * dtype.itemsize} bytes, {left} follow", "save it again"
        )
    raw = np.empty(left, np.uint8)  # pages are only taken as they are filled
    at = 0
    while at < left:
        piece = file.read(min(_PIECE, left - at))
        if not piece:
            raise BadInput(path, f"{name} ends after {at} of {left} bytes", "it is truncated; save it again")
        raw[at : at + len(piece)] = np.frombuffer(piece, np.uint8)
        at += len(piece)
    if file.read(1):
        raise BadInput(path, f"{name} goes on after its described end", "save it again")
    values = raw.view(dtype) if dtype.itemsize else np.empty(count, dtype)
    return values.reshape(shape[::-1]).T if fortran else values.reshape(shape)


def _take_logarithm(path: str | os.PathLike[str], found: dict[str, Any], options: ReadOptions, unit: Any) -> None:
    kind = options.unit or ("line integrals" if unit is None or unit in ("", "1") else unit)
    if kind == "line integrals":
        return
    if kind != "transmission":
        raise BadInput(path, f"has a sinogram in {str(unit)[:40]!r}", "line integrals or transmission is read")
    from recon3d.io.dataexchange import line_integrals

    values = np.asarray(found["sinogram"], np.float32)
    found["sinogram"], notes = line_integrals(path, values, options.smallest_transmission)
    found["notes"] = [*found.get("notes", ()), *notes]


def _scalar(value: Any, default: float) -> float:
    return value if isinstance(value, int | float) and math.isfinite(value) else default

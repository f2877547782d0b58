"""NIfTI-1 and -2 volumes, plain or gzipped, in and out.

Whatever the voxel order of the file, a volume arrives as [z, y, x] with x to the patient's left, y to the back and z
to the head (LPS, as axial slices are looked at), by permuting and flipping axes alone: voxels keep their values and,
through the affine, their place. Format: nifti.nimh.nih.gov; sform before qform before pixdim, as the standard says.
"""

from __future__ import annotations

import gzip
import os
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from recon3d.geometry import VolumeGrid
from recon3d.io.atomic import atomic_write
from recon3d.io.guard import (
    DEFAULT_LIMITS,
    BadInput,
    Inflater,
    Limits,
    as_bad_input,
    check_affine,
    check_array,
    check_file,
    check_finite,
    check_scaling,
    check_spacing,
    read_bytes,
)
from recon3d.io.units import MU_WATER_PER_MM, hu_to_mu, mu_to_hu

Unit = Literal["hu", "per_mm", "au"]

_REAL = {2: "u1", 4: "i2", 8: "i4", 16: "f4", 64: "f8", 256: "i1", 512: "u2", 768: "u4", 1024: "i8", 1280: "u8"}
_TO_MM = {0: 1.0, 1: 1000.0, 2: 1.0, 3: 1e-3}  # xyzt_units: unknown, metre, millimetre, micrometre
_MOST_EXTENSION = 64 << 20
_CANONICAL = "LPS"


@dataclass(frozen=True)
class NiftiHeader:
    """What a NIfTI header says, checked.

    Attributes:
        shape: voxels along the stored axes i, j, k.
        dtype: type of the stored values, with its byte order.
        offset: where the values start.
        affine: 4x4, stored voxel (i, j, k) to world RAS mm.
        scaling: slope and intercept.
        orientation: where i, j, k point, such as "LPS".
        compressed: whether the file is gzipped.
        description, intent: free texts of the header, where units are written down.
    """

    shape: tuple[int, int, int]
    dtype: np.dtype[Any]
    offset: int
    affine: NDArray[np.float64]
    scaling: tuple[float, float]
    orientation: str
    compressed: bool
    description: str = ""
    intent: str = ""


def read_nifti(
    path: str | os.PathLike[str],
    unit: Unit = "au",
    mu_water_per_mm: float = MU_WATER_PER_MM,
    limits: Limits = DEFAULT_LIMITS,
) -> tuple[Tensor, VolumeGrid]:
    """A volume and its grid.

    Args:
        path: .nii or .nii.gz, one volume of real numbers.
        unit: what the file's values are: "hu" are converted to 1/mm, "per_mm" and "au" are taken as they stand.
        mu_water_per_mm: attenuation of water for that conversion.
        limits: how much memory the file may claim.

    Returns:
        volume [z, y, x] float32, x to the left, y to the back, z to the head of the patient; and its VolumeGrid.

    Raises:
        BadInput: the file is not such a volume.
    """
    _check_unit("read_nifti", unit)
    with as_bad_input(path, "does not fit into memory", (MemoryError,), "free memory or cut it into slabs"):
        volume, grid = _read_volume(path, limits)
    return (hu_to_mu(volume, mu_water_per_mm) if unit == "hu" else volume), grid


def read_nifti_header(path: str | os.PathLike[str], limits: Limits = DEFAULT_LIMITS) -> NiftiHeader:
    """The checked header alone; no voxel is read.

    Raises:
        BadInput: as read_nifti.
    """
    size = check_file(path)
    with Path(path).open("rb") as file:
        return _read_header(path, file, size, limits)[0]


def write_nifti(
    path: str | os.PathLike[str],
    volume: Tensor | NDArray[np.floating],
    grid: VolumeGrid,
    unit: Unit = "au",
    dtype: Literal["float32", "int16"] = "float32",
    orientation: str | None = None,
    mu_water_per_mm: float = MU_WATER_PER_MM,
    label: str | None = None,
) -> None:
    """Writes a volume with sform and qform; the file appears whole or not at all.

    Args:
        path: ends in .nii or .nii.gz.
        volume: [z, y, x]; 1/mm if it is to be stored in HU.
        grid: its grid; without an affine the volume is centred on the world's origin.
        unit: what the file is to hold: "hu" converts from 1/mm, "per_mm" and "au" are stored as they are.
        dtype: "int16" rounds HU to whole units and other values to 1/65534 of their range, with the slope stated.
        orientation: where the stored axes are to point, such as "RAS"; None keeps the volume's own.
        mu_water_per_mm: attenuation of water.
        label: the unit as the header's texts are to state it, such as "Bq/mL"; None states `unit`.

    Raises:
        ValueError: the shape is not the grid's, a value is not finite, or the name or orientation is unknown.
        OSError: the folder is missing, read-only or full.
    """
    import nibabel as nib

    _check_unit("write_nifti", unit)
    path = Path(path)
    if not path.name.endswith((".nii", ".nii.gz")):
        raise ValueError(f"write_nifti: the name must end in .nii or .nii.gz, got {path.name}")
    values = volume.detach().cpu().numpy() if isinstance(volume, Tensor) else np.asarray(volume)
    if values.shape != grid.shape:
        raise ValueError(f"write_nifti: volume has shape {values.shape}, the grid {grid.shape}")
    values = values.astype(np.float32, copy=False)
    if not np.isfinite(values).all():
        raise ValueError("write_nifti: the volume holds NaN or infinity; nothing was written")
    if unit == "hu":
        values = mu_to_hu(values, mu_water_per_mm)
    ijk, affine = values.T, grid.matrix()
    if orientation is not None:
        ijk, affine = reorient(ijk, affine, orientation)
    slope, intercept = 1.0, 0.0
    if dtype == "int16":
        ijk, slope, intercept = _to_int16(ijk, whole=unit == "hu")
    header = nib.Nifti1Header()
    if max(ijk.shape) > 32767:
        raise ValueError(f"write_nifti: NIfTI-1 holds at most 32767 voxels along an axis, got {ijk.shape}")
    header.set_data_dtype(ijk.dtype)
    header.set_data_shape(ijk.shape)
    header.set_xyzt_units("mm")
    header.set_sform(affine, code=1)
    header.set_qform(affine, code=1, strip_shears=True)  # sets pixdim; a quaternion cannot hold shear, the sform does
    header["scl_slope"], header["scl_inter"], header["vox_offset"] = slope, intercept, 352
    header["descrip"] = f"recon3d, {label or ('HU' if unit == 'hu' else unit)}"
    header["intent_name"] = label or ""
    with atomic_write(path) as file:
        if path.name.endswith(".gz"):
            # no name and no time inside: the same volume gives the same bytes; level 6 costs twice less than 9
            with gzip.GzipFile(filename="", fileobj=file, mode="wb", compresslevel=6, mtime=0) as packed:
                _write_body(packed, header, ijk)
        else:
            _write_body(file, header, ijk)


def reorient(
    ijk: NDArray[Any], affine: NDArray[np.float64], orientation: str
) -> tuple[NDArray[Any], NDArray[np.float64]]:
    """A view of [i, j, k] whose axes point where `orientation` says, and its affine; no voxel is touched.

    Raises:
        ValueError: the orientation is not three letters, one each of L/R, P/A, I/S.
    """
    from nibabel import orientations as o

    code = orientation.upper()
    if len(code) != 3 or any(len(set(code) & set(pair)) != 1 for pair in ("LR", "PA", "IS")):
        raise ValueError(f"reorient: orientation needs three letters, one each of L/R, P/A, I/S, got {orientation!r}")
    change = o.ornt_transform(o.io_orientation(affine), o.axcodes2ornt(tuple(code)))
    return o.apply_orientation(ijk, change), affine @ o.inv_ornt_aff(change, ijk.shape)


def _check_unit(owner: str, unit: str) -> None:
    if unit not in get_args(Unit):
        raise ValueError(f"{owner}: unit must be one of {', '.join(get_args(Unit))}, got {unit!r}")


def _read_volume(path: str | os.PathLike[str], limits: Limits) -> tuple[Tensor, VolumeGrid]:
    size = check_file(path)
    with Path(path).open("rb") as file:
        header, stream = _read_header(path, file, size, limits)
        raw = _read_values(path, header, stream)
    stored = raw.view(header.dtype).reshape(header.shape[::-1])  # [k, j, i]
    volume = np.empty(stored.shape, np.float32)
    slope, intercept = header.scaling
    with np.errstate(all="ignore"):  # what overflows is reported below
        for k in range(len(stored)):
            volume[k] = stored[k] if (slope, intercept) == (1.0, 0.0) else stored[k] * slope + intercept
    check_finite(path, "the volume", volume)
    ijk, affine = reorient(volume.T, header.affine, _CANONICAL)
    spacing = np.sqrt((affine[:3, :3] ** 2).sum(axis=0))
    grid = VolumeGrid(ijk.shape[::-1], tuple(spacing[::-1].tolist()), tuple(map(tuple, affine.tolist())))
    return torch.from_numpy(np.ascontiguousarray(ijk.T)), grid


def _read_header(
    path: str | os.PathLike[str], file: IO[bytes], size: int, limits: Limits
) -> tuple[NiftiHeader, IO[bytes] | Inflater]:
    import nibabel as nib
    from nibabel.orientations import aff2axcodes
    from nibabel.spatialimages import HeaderDataError

    compressed = file.read(2) == b"\x1f\x8b"
    file.seek(0)
    stream: IO[bytes] | Inflater = Inflater(path, file) if compressed else file
    head = stream.read(4)
    kind = {348: nib.Nifti1Header, 540: nib.Nifti2Header}.get(
        next((n for n in (int.from_bytes(head, "little"), int.from_bytes(head, "big")) if n in (348, 540)), 0)
    )
    if kind is None:
        raise BadInput(path, "is not a NIfTI file", "NIfTI-1 or -2, plain or gzipped, is read here")
    block = head + _exactly(path, stream, kind.template_dtype.itemsize - 4)
    unreadable = (HeaderDataError, ValueError, TypeError, KeyError, OverflowError, np.linalg.LinAlgError)
    with np.errstate(all="ignore"), as_bad_input(path, "its header cannot be understood", unreadable):
        raw = kind(block, check=False)
        magic = raw["magic"].item().rstrip(b"\0\r\n\x1a")
        if magic in (b"ni1", b"ni2"):
            raise BadInput(path, "is one half of an .hdr/.img pair", "convert the pair to a single .nii")
        if magic not in (b"n+1", b"n+2"):
            raise BadInput(path, f"has NIfTI magic {magic!r}", "n+1 or n+2 is expected; export it again")
        rank = int(raw["dim"][0])
        if not 1 <= rank <= 7:
            raise BadInput(path, f"has {rank} dimensions", "one volume of 3 dimensions is read")
        sizes = [int(n) for n in raw["dim"][1 : rank + 1]]
        if rank < 3 or any(n != 1 for n in sizes[3:]):
            raise BadInput(
                path,
                f"holds {' x '.join(map(str, sizes))} values",
                "one volume of 3 dimensions is read; split it first",
            )
        code = int(raw["datatype"])
        if code not in _REAL:
            raise BadInput(path, f"stores values of NIfTI type {code}", "integers and real floats are read")
        dtype = np.dtype(_REAL[code]).newbyteorder(raw.endianness)
        offset = float(raw["vox_offset"])
        least = len(block) + 4
        if not (len(block) <= offset <= least + _MOST_EXTENSION and offset == int(offset)):
            raise BadInput(path, f"says its values start at byte {offset:g}", f"at least {least} is expected")
        available = size if compressed else size - int(offset)
        # beside the stored values: the float32 volume and its reordered copy
        check_array(path, "the volume", sizes[:3], dtype.itemsize, available, compressed, limits, 8)
        for axis in range(3):
            check_spacing(path, f"pixdim[{axis + 1}]", _mm(raw) * abs(float(raw["pixdim"][axis + 1])))
        affine = np.asarray(raw.get_best_affine(), np.float64)
        affine[:3] *= _mm(raw)
        affine = check_affine(path, affine)
        header = NiftiHeader(
            shape=(sizes[0], sizes[1], sizes[2]),
            dtype=dtype,
            offset=int(offset),
            affine=affine,
            scaling=check_scaling(path, float(raw["scl_slope"]), float(raw["scl_inter"])),
            orientation="".join(aff2axcodes(affine)),
            compressed=compressed,
            description=_text(raw["descrip"]),
            intent=_text(raw["intent_name"]),
        )
    _skip(path, stream, header.offset - len(block))
    return header, stream


def _text(raw: Any) -> str:
    text = raw.item().split(b"\0", 1)[0].decode("latin1")
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def _mm(raw: Any) -> float:
    return _TO_MM.get(int(raw["xyzt_units"]) & 7, 1.0)


def _exactly(path: str | os.PathLike[str], stream: IO[bytes] | Inflater, count: int) -> bytes:
    return read_bytes(path, stream, count)  # type: ignore[arg-type]


def _skip(path: str | os.PathLike[str], stream: IO[bytes] | Inflater, count: int) -> None:
    while count > 0:
        step = min(count, 1 << 20)
        _exactly(path, stream, step)
        count -= step


def _read_values(path: str | os.PathLike[str], header: NiftiHeader, stream: IO[bytes] | Inflater) -> NDArray[np.uint8]:
    nbytes = int(np.prod(header.shape, dtype=object)) * header.dtype.itemsize
    raw = np.empty(nbytes, np.uint8)  # pages are only taken as they are filled
    got = stream.readinto(raw.data)  # type: ignore[union-attr]
    if got != nbytes:
        raise BadInput(
            path, f"ends after {got} of {nbytes} bytes of voxels", "it is truncated; copy or export it again"
        )
    if isinstance(stream, Inflater):
        stream.finish()
    return raw


def _to_int16(values: NDArray[np.float32], whole: bool) -> tuple[NDArray[np.int16], float, float]:
    low, high = float(values.min()), float(values.max())
    slope, intercept = 1.0, 0.0
    if not whole or low < -32767 or high > 32767:
        slope = float(np.float32((high - low) / 65534)) or 1.0  # as stored, so that reading inverts it exactly
        intercept = float(np.float32((high + low) / 2))
    stored = np.rint((values.astype(np.float64) - intercept) / slope)
    return stored.clip(-32768, 32767).astype(np.int16), slope, intercept


def _write_body(file: IO[bytes] | gzip.GzipFile, header: Any, ijk: NDArray[Any]) -> None:
    file.write(header.binaryblock + b"\0\0\0\0")  # no extensions
    little = ijk.dtype.newbyteorder("<")
    for k in range(ijk.shape[2]):
        file.write(np.ascontiguousarray(ijk[:, :, k].T, dtype=little).tobytes())

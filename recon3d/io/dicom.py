"""Series of classic DICOM images of PET, CT and MR, one slice a file, with the patient's geometry, units and SUV.

Slices are ordered by their position along the normal, not by their numbers; each has its own slope. What does not make
one even stack of one series is refused: several series or time frames, missing slices, tilted gantries. SUVbw follows
the QIBA profile: with decay correction to the start, activity refers to the series time, unless that lies after the
acquisition (rewritten series), and then to the first acquisition.
"""

from __future__ import annotations

import contextlib
import math
import os
import struct
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from recon3d.geometry import VolumeGrid
from recon3d.io.guard import (
    DEFAULT_LIMITS,
    BadInput,
    Limits,
    as_bad_input,
    check_affine,
    check_array,
    check_file,
    check_finite,
    check_scaling,
    check_spacing,
)
from recon3d.io.nifti import reorient
from recon3d.io.pet import PETInfo

__all__ = ["DICOMImage", "describe_dicom", "is_dicom", "read_dicom"]

_DEFLATED = "1.2.840.10008.1.2.1.99"
_PLAIN = {"1.2.840.10008.1.2": "<", "1.2.840.10008.1.2.1": "<", "1.2.840.10008.1.2.2": ">"}
_MODALITIES = {"PT": "Bq/mL", "CT": "HU", "MR": "au"}
_UNITS = {"BQML": "Bq/mL", "GML": "SUV", "CNTS": "counts"}
_MOST_FILES = 20_000
_MOST_BYTES = 256 << 20
# unevenness of slice positions that is rounding, in mm and as a share of the distance
_SLACK_MM, _SLACK = 0.02, 0.02
_BROKEN = (
    *(ValueError, TypeError, KeyError, AttributeError, IndexError, OverflowError, NotImplementedError, RecursionError),
    *(EOFError, OSError, struct.error, RuntimeError, MemoryError, ArithmeticError, LookupError),
)


@dataclass(frozen=True)
class DICOMImage:
    """A series as one volume.

    Attributes:
        volume: [z, y, x] float32 in `unit`, x to the left, y to the back, z to the head of the patient.
        grid: its grid.
        unit: "Bq/mL", "SUV", "HU" or "au".
        modality: "PT", "CT" or "MR".
        suv_factor: SUVbw in g/mL of 1 Bq/mL; None where the file does not say enough.
        info: time and dose of a PET series.
        notes: what was assumed or looks doubtful.
    """

    volume: Tensor
    grid: VolumeGrid
    unit: str
    modality: str
    suv_factor: float | None
    info: PETInfo
    notes: tuple[str, ...]


def is_dicom(path: str | os.PathLike[str]) -> bool:
    """Whether a file is DICOM, or a folder holds a DICOM file."""
    path = Path(path)
    if path.is_dir():
        return any(_has_magic(p) for p in _listing(path))
    return _has_magic(path)


def read_dicom(path: str | os.PathLike[str], limits: Limits = DEFAULT_LIMITS) -> DICOMImage:
    """The series of a folder, or that which a file belongs to, as a volume.

    Args:
        path: a folder with one series, or one file of a series; its neighbours are found beside it.
        limits: how much memory it may claim.

    Raises:
        BadInput: there is no single even stack of slices, a file is damaged, or units are of no known kind.
        ImportError: pydicom is not installed.
    """
    with as_bad_input(path, "does not fit into memory", (MemoryError,), "free memory"):
        slices, notes = _series(path)
        return _volume(path, slices, notes, limits)


def describe_dicom(path: str | os.PathLike[str]) -> dict[str, Any]:
    """From the headers of a series; no pixel is read."""
    slices, notes = _series(path)
    place = _stack(path, slices)
    first = slices[0].head
    info, factor = _dose(path, [s.head for s in slices], notes)
    out = {
        "format": "DICOM series",
        "modality": str(first.get("Modality")),
        "files": len(slices),
        "shape_kji": [len(slices), int(first.Rows), int(first.Columns)],
        "spacing_kji_mm": [float(s) for s in np.sqrt((place[:3, :3] ** 2).sum(axis=0))[::-1]],
        "unit": _unit(path, first),
        "duration_s": info.duration_s,
        "half_life_s": info.half_life_s,
        "suv_factor": factor,
        "notes": notes,
    }
    return {key: value for key, value in out.items() if value is not None}


@dataclass(frozen=True)
class _Slice:
    path: Path
    head: Any
    syntax: str


# ---- files ---------------------------------------------------------------------------------------------------------


def _has_magic(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(132)[128:] == b"DICM"
    except OSError:
        return False


def _listing(folder: Path) -> list[Path]:
    out = sorted(p for p in folder.iterdir() if p.is_file() and p.name != "DICOMDIR")
    if len(out) > _MOST_FILES:
        raise BadInput(folder, f"holds {len(out)} files", f"at most {_MOST_FILES} are read; give the series a folder")
    return out


def _series(path: str | os.PathLike[str]) -> tuple[list[_Slice], list[str]]:
    """The slices of one series, headers alone, in no order; with what was noticed."""
    place = Path(path)
    notes: list[str] = []
    if place.is_dir():
        files = [p for p in _listing(place) if _has_magic(p)]
        if not files:
            raise BadInput(path, "holds no DICOM files", "give the folder of one series")
        slices = [_header(p) for p in files]
        series: dict[str, int] = {}
        for s in slices:
            series[_series_of(s)] = series.get(_series_of(s), 0) + 1
        if len(series) > 1:
            sizes = ", ".join(str(n) for n in list(series.values())[:8])
            raise BadInput(path, f"holds {len(series)} series of {sizes} files", "give one file of the one wanted")
        return slices, notes
    check_file(place)
    if not _has_magic(place):
        raise BadInput(path, "is not a DICOM file", "give a file or folder of a DICOM series")
    chosen = _header(place)
    slices = [chosen]
    for other in _listing(place.parent):
        if other.name != place.name and _has_magic(other):
            try:
                found = _header(other)
            except BadInput:
                notes.append(f"{other.name[:60]} beside it cannot be read and is left out")
                continue
            if _series_of(found) == _series_of(chosen):
                slices.append(found)
    return slices, notes


def _series_of(item: _Slice) -> str:
    return str(item.head.get("SeriesInstanceUID", ""))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No warnings and no log lines of the parser: what matters is told in sentences."""
    import logging

    log = logging.getLogger("pydicom")
    level = log.level
    log.setLevel(logging.CRITICAL + 1)
    try:
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)


def _pydicom() -> Any:
    try:
        import pydicom
    except ImportError:
        raise ImportError("reading DICOM needs the package pydicom: pip install 'recon3d[pet]'") from None
    return pydicom


def _broken() -> tuple[type[BaseException], ...]:
    """What the parser raises at damaged files."""
    errors = _pydicom().errors
    return (*_BROKEN, errors.BytesLengthException, errors.InvalidDicomError)


def _header(path: Path) -> _Slice:
    """A parsed header without pixels.

    Raises:
        BadInput: it is no classic image, deflated, or damaged.
    """
    dicom = _pydicom()
    size = check_file(path)
    if size > _MOST_BYTES:
        raise BadInput(path, f"has {size} bytes", "series of one slice a file are read")
    with _quiet(), as_bad_input(path, "cannot be understood as DICOM", _broken()):
        syntax = str(dicom.filereader.read_file_meta_info(path).get("TransferSyntaxUID", ""))
        if syntax == _DEFLATED:  # unpacked without bound by the parser
            raise BadInput(path, "is deflated", "store it uncompressed first")
        head = dicom.dcmread(path, stop_before_pixels=True, force=False)
        for name in ("Modality", "Rows", "Columns", "BitsAllocated", "PixelRepresentation"):
            if head.get(name) in (None, ""):
                raise BadInput(path, f"has no {name}", "images are read; export the series again")
        if str(head.Modality) not in _MODALITIES:
            raise BadInput(path, f"is of modality {str(head.Modality)[:16]!r}", "PT, CT and MR are read")
        frames = head.get("NumberOfFrames") or 1
        if int(frames) != 1:
            raise BadInput(path, f"holds {int(frames)} frames", "series of one slice a file are read")
        for name, length in (("PixelSpacing", 2), ("ImageOrientationPatient", 6), ("ImagePositionPatient", 3)):
            _numbers(path, head, name, length)
        _dates(head)
    return _Slice(path, head, syntax)


def _numbers(path: Path, head: Any, name: str, length: int) -> list[float]:
    value = head.get(name)
    items = list(value) if isinstance(value, Sequence | np.ndarray) and not isinstance(value, str) else []
    numbers = [float(v) for v in items]
    if len(numbers) != length or not all(math.isfinite(v) and abs(v) < 1e6 for v in numbers):
        raise BadInput(path, f"has no {name} of {length} numbers", "export the series again")
    return numbers


# ---- geometry ------------------------------------------------------------------------------------------------------


def _stack(path: str | os.PathLike[str], slices: list[_Slice]) -> NDArray[np.float64]:
    """Sorts slices along the normal; returns the affine (column, row, slice) to RAS.

    Raises:
        BadInput: they are no even stack.
    """
    first = slices[0]
    for name in ("Rows", "Columns", "Modality", "FrameOfReferenceUID", "Units"):
        values = {str(s.head.get(name, "")) for s in slices}
        if len(values) > 1:
            shown = ", ".join(sorted(values)[:4])[:80]
            raise BadInput(path, f"has slices of different {name} ({shown})", "give one series")
    spacing = np.array(_numbers(first.path, first.head, "PixelSpacing", 2))
    turn = np.array(_numbers(first.path, first.head, "ImageOrientationPatient", 6))
    for s in slices:
        if not np.allclose(_numbers(s.path, s.head, "PixelSpacing", 2), spacing, rtol=1e-4, atol=0):
            raise BadInput(s.path, "has another pixel spacing than the other slices", "give one series")
        if not np.allclose(_numbers(s.path, s.head, "ImageOrientationPatient", 6), turn, atol=1e-3):
            raise BadInput(s.path, "has another orientation than the other slices", "give one series")
    row, column = turn[:3], turn[3:]
    if abs(row @ row - 1) > 1e-2 or abs(column @ column - 1) > 1e-2 or abs(row @ column) > 1e-2:
        raise BadInput(first.path, "has an ImageOrientationPatient that is no pair of axes", "export it again")
    normal = np.cross(row, column)
    places = {id(s): np.array(_numbers(s.path, s.head, "ImagePositionPatient", 3)) for s in slices}
    slices.sort(key=lambda s: float(places[id(s)] @ normal))
    positions = np.stack([places[id(s)] for s in slices])
    along = positions @ normal
    if len(slices) > 1:
        steps = np.diff(along)
        step = float(np.median(steps))
        slack = max(_SLACK_MM, _SLACK * step)
        if float(steps.min()) < _SLACK_MM:
            raise BadInput(
                path,
                "has several slices at one position",
                "time frames or repeats: put one stack into a folder of its own",
            )
        if float(np.abs(steps - step).max()) > slack:
            k = int(np.abs(steps - step).argmax())
            raise BadInput(
                path,
                f"has slices {steps[k]:.4g} mm apart at {along[k]:.4g} mm where others are {step:.4g} mm apart",
                "slices are missing or mixed; export the series again",
            )
        move = (positions[-1] - positions[0]) / (len(slices) - 1)
        if float(np.abs(move - (move @ normal) * normal).max()) * (len(slices) - 1) > max(1.0, spacing.max()):
            raise BadInput(path, "has slices that are shifted against each other (gantry tilt)", "resample it first")
        move = (move @ normal) * normal
    else:
        thickness = first.head.get("SpacingBetweenSlices") or first.head.get("SliceThickness")
        with as_bad_input(first.path, "has no thickness of its only slice", (TypeError, ValueError)):
            move = check_spacing(first.path, "the slice thickness", float(thickness)) * normal
    matrix = np.eye(4)
    matrix[:3, 0], matrix[:3, 1], matrix[:3, 2] = row * spacing[1], column * spacing[0], move
    matrix[:3, 3] = positions[0]
    matrix[:2] *= -1  # DICOM counts to the left and back, affines to the right and front
    return check_affine(path, matrix)


# ---- values --------------------------------------------------------------------------------------------------------


def _volume(path: str | os.PathLike[str], slices: list[_Slice], notes: list[str], limits: Limits) -> DICOMImage:
    affine = _stack(path, slices)
    first = slices[0].head
    shape = (len(slices), int(first.Rows), int(first.Columns))
    check_array(path, "the volume", shape, 4, 1 << 62, False, limits, working_itemsize=4)
    unit = _unit(path, first)
    volume = np.empty(shape, np.float32)
    for k, item in enumerate(slices):
        volume[k] = _pixels(item, shape[1:])
    check_finite(path, "the volume", volume)
    modality = str(first.Modality)
    if modality == "PT" and unit == "counts":
        factor = _philips(first)
        if factor is None:
            raise BadInput(path, "is in counts without a factor to Bq/mL", "export it in Bq/mL")
        volume *= np.float32(factor)
        unit = "Bq/mL"
        notes.append("counts were turned into Bq/mL with the factor that Philips stores")
    info, factor = _dose(path, [s.head for s in slices], notes) if modality == "PT" else (PETInfo(), None)
    ijk, matrix = reorient(volume.T, affine, "LPS")
    spacing = np.sqrt((matrix[:3, :3] ** 2).sum(axis=0))
    grid = VolumeGrid(ijk.shape[::-1], tuple(spacing[::-1].tolist()), tuple(map(tuple, matrix.tolist())))
    values = torch.from_numpy(np.ascontiguousarray(ijk.T))
    return DICOMImage(values, grid, unit, modality, factor, info, tuple(dict.fromkeys(notes)))


def _unit(path: str | os.PathLike[str], head: Any) -> str:
    modality = str(head.Modality)
    if modality != "PT":
        return _MODALITIES[modality]
    said = str(head.get("Units", ""))
    if said not in _UNITS:
        raise BadInput(path, f"is in units {said[:16]!r}", f"{', '.join(_UNITS)} are read")
    return _UNITS[said]


def _philips(head: Any) -> float | None:
    try:
        value = float(head[0x7053, 0x1009].value)
    except _broken():
        return None
    return value if math.isfinite(value) and 0 < value < 1e12 else None


def _pixels(item: _Slice, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """A slice in the unit of its series."""
    path, head = item.path, item.head
    dicom = _pydicom()
    with _quiet(), as_bad_input(path, "has pixels that cannot be read", _broken(), "store it uncompressed first"):
        bits, stored = int(head.BitsAllocated), int(head.get("BitsStored") or head.BitsAllocated)
        signed = int(head.PixelRepresentation)
        if bits not in (8, 16, 32) or not 1 <= stored <= bits or signed not in (0, 1):
            raise BadInput(path, f"stores {stored} of {bits} bits a pixel", "8, 16 and 32 bits are read")
        if int(head.get("SamplesPerPixel") or 1) != 1:
            raise BadInput(path, f"has {int(head.SamplesPerPixel)} samples a pixel", "one is read: no colours")
        slope, intercept = float(head.get("RescaleSlope", 1.0)), float(head.get("RescaleIntercept", 0.0))
        check_scaling(path, slope, intercept)
        if slope == 0:
            raise BadInput(path, "has a RescaleSlope of 0", "export it again")
        full = dicom.dcmread(path, force=False)
        if item.syntax in _PLAIN:
            raw = full.PixelData if "PixelData" in full else b""
            needed = shape[0] * shape[1] * bits // 8
            if len(raw) not in (needed, needed + needed % 2):
                raise BadInput(path, f"has {len(raw)} bytes of pixels, {needed} are described", "export it again")
            kind = f"{_PLAIN[item.syntax]}{'i' if signed else 'u'}{bits // 8}"
            values = np.frombuffer(raw, kind, shape[0] * shape[1]).reshape(shape)
            if stored < bits:  # older files keep overlays in the bits above
                values = _low_bits(values, stored, bool(signed))
        else:
            values = np.asarray(full.pixel_array)
            if values.shape != shape:
                raise BadInput(path, f"has pixels of size {values.shape}, {shape} are described", "export it again")
        return (values * slope + intercept).astype(np.float32)


def _low_bits(values: NDArray[Any], stored: int, signed: bool) -> NDArray[Any]:
    wide = values.astype(np.int64) & ((1 << stored) - 1)
    return np.where(wide >> (stored - 1), wide - (1 << stored), wide) if signed else wide


# ---- time and dose -------------------------------------------------------------------------------------------------


def _moment(head: Any, day: str, hour: str) -> datetime | None:
    date, time = str(head.get(day) or ""), str(head.get(hour) or "").split(".")
    clock = (time[0] + "000000")[:6] if time and time[0] else ""
    try:
        found = datetime.strptime(date + clock, "%Y%m%d%H%M%S")
    except ValueError:
        return None
    share = time[1][:6] if len(time) > 1 and time[1].isdigit() else "0"
    return found + timedelta(seconds=float(f"0.{share}"))


def _dates(head: Any) -> None:
    """Touches what is parsed late, so that damage shows where it is caught."""
    for name in ("SeriesTime", "AcquisitionTime", "PatientWeight", "RadiopharmaceuticalInformationSequence"):
        head.get(name)


def _positive(item: Any, name: str) -> float | None:
    try:
        value = float(item.get(name))
    except _broken():
        return None
    return value if math.isfinite(value) and value > 0 else None


def _dose(path: str | os.PathLike[str], heads: list[Any], notes: list[str]) -> tuple[PETInfo, float | None]:
    """Time and dose of a PET series, and its SUVbw factor."""
    with _quiet(), as_bad_input(path, "has times or doses that cannot be understood", _broken()):
        head = heads[0]
        sequence = head.get("RadiopharmaceuticalInformationSequence")
        drug = sequence[0] if sequence is not None and len(sequence) == 1 else {}
        half_life = _positive(drug, "RadionuclideHalfLife")
        injected = _positive(drug, "RadionuclideTotalDose")
        weight = _positive(head, "PatientWeight")
        duration = _positive(head, "ActualFrameDuration")
        code = drug.get("RadionuclideCodeSequence") if drug else None
        isotope = str(code[0].get("CodeMeaning", ""))[:40] if code else ""
        acquired = [m for m in (_moment(h, "AcquisitionDate", "AcquisitionTime") for h in heads) if m is not None]
        series = _moment(head, "SeriesDate", "SeriesTime")
        start = series
        if acquired and (start is None or start > min(acquired)):
            start = min(acquired)
            notes.append("the series time lies after the acquisition; decay is counted from the first acquisition")
        injection = _injection(drug, start)
        if injected is not None and injected < 1e5:
            notes.append(f"the dose of {injected:.4g} Bq is written in MBq, it seems; SUV is left out")
            injected = None
        if weight is not None and weight > 500:
            notes.append(f"the weight of {weight:.4g} kg is written in g, it seems; SUV is left out")
            weight = None
        since = None if injection is None or start is None else (start - injection).total_seconds()
        if since is not None and since < 0:
            notes.append("the injection lies after the scan; SUV is left out")
            since = None
        info = PETInfo(
            duration_s=None if duration is None else duration / 1000,
            isotope=isotope or None,
            half_life_s=half_life,
            branching=_positive(drug, "RadionuclidePositronFraction"),
            injected_bq=injected,
            injection_to_scan_s=since,
            weight_kg=weight,
            calibrated=str(head.get("Units", "")) == "BQML",
        )
        correction = str(head.get("DecayCorrection", ""))
        if str(head.get("Units", "")) == "GML":
            return info, None
        if correction == "ADMIN" and injected is not None and weight is not None:
            return info, 1000 * weight / injected
        if correction != "START":
            notes.append(f"decay correction is {correction[:16] or 'not stated'!r}; SUV is left out")
            return replace(info, injection_to_scan_s=None), None
        _check_decay(head, info, start, notes)
        if info.suv_factor is None:
            notes.append("dose, weight or times are not stated; SUV is left out")
        return info, info.suv_factor


def _injection(drug: Any, start: datetime | None) -> datetime | None:
    if not drug or start is None:
        return None
    stamp = str(drug.get("RadiopharmaceuticalStartDateTime") or "")
    if len(stamp) >= 14:
        return _moment({"d": stamp[:8], "t": stamp[8:].split("+")[0].split("-")[0]}, "d", "t")
    found = _moment({"d": start.strftime("%Y%m%d"), "t": drug.get("RadiopharmaceuticalStartTime")}, "d", "t")
    if found is not None and drug.get("RadiopharmaceuticalStartTime") and found > start:
        return found - timedelta(days=1)
    return found if drug.get("RadiopharmaceuticalStartTime") else None


def _check_decay(head: Any, info: PETInfo, start: datetime | None, notes: list[str]) -> None:
    """Whether the file's own decay factor is that of a correction to `start`."""
    said, acquired = _positive(head, "DecayFactor"), _moment(head, "AcquisitionDate", "AcquisitionTime")
    if said is None or acquired is None or start is None or info.half_life_s is None or info.duration_s is None:
        return
    mine = 1 / replace(info, start_s=(acquired - start).total_seconds()).decay_factor
    if abs(said / mine - 1) > 0.01:
        notes.append(
            f"the file's decay factor is {said:.4f}, a correction to {start:%H:%M:%S} would be {mine:.4f}; "
            "SUV may be off by as much"
        )

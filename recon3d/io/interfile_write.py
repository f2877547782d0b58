"""Interfile sinograms written as STIR reads them: a .hs header and little-endian numbers beside it in .s."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from recon3d.geometry.pet import TOF, PETGeometry
from recon3d.io.atomic import atomic_write
from recon3d.io.pet import PETInfo

# what STIR calls the scanners that both know, and the depth of interaction in cm it has for them
_STIR_NAMES = {
    "mmr": ("Siemens mMR", 0.7),
    "mct": ("Siemens mCT", 0.7),
    "vision": ("Siemens Vision 600", 0.7),
    "signa": ("GE Signa PET/MR", 0.85),
    "d690": ("GE Discovery 690", 0.94),
}


def write_interfile(
    path: str | os.PathLike[str],
    values: Tensor | NDArray[np.floating],
    geometry: PETGeometry,
    info: PETInfo | None = None,
    dtype: Literal["float32", "uint16", "int16"] = "float32",
) -> None:
    """A sinogram as STIR reads it: `path` ending in .hs, and the numbers beside it in .s; each whole or not at all.

    Args:
        path: the header.
        values: [view, radial, plane] or [view, radial, tof, plane].
        geometry: its bins; all views.
        info: time and dose for the header.
        dtype: how numbers are stored; whole numbers must fit.

    Raises:
        ValueError: sizes disagree, views are missing, values are not finite or do not fit the type.
        OSError: the folder is missing, read-only or full.
    """
    path = Path(path)
    if path.suffix != ".hs":
        raise ValueError(f"write_interfile: the name must end in .hs, got {path.name}")
    array = values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)
    if array.shape != tuple(geometry.shape):
        raise ValueError(f"write_interfile: values are {array.shape}, the geometry has {tuple(geometry.shape)}")
    if geometry.views is not None and geometry.views != tuple(range(geometry.n_views)):
        raise ValueError(f"write_interfile: {len(geometry.views)} of {geometry.n_views} views are held; all are needed")
    if geometry.tof is not None and geometry.tof.bins % 2 == 0:
        raise ValueError(f"write_interfile: the format counts an odd number of time bins, got {geometry.tof.bins}")
    whole = dtype != "float32"
    for part in array:
        if not np.isfinite(part).all() or (
            whole and not np.array_equal(part, np.clip(np.rint(part), np.iinfo(dtype).min, np.iinfo(dtype).max))
        ):
            raise ValueError(f"write_interfile: the values are not all finite and of type {dtype}")
    order = sorted(range(len(geometry.segment_numbers)), key=lambda k: geometry.segment_numbers[k])
    # our segment n is the file's -n, so in the file's ascending order ours descend
    segments = [(geometry.segment_numbers[k], geometry.segment_planes[k]) for k in reversed(order)]
    data = path.with_suffix(".s")
    stored = np.dtype(dtype).newbyteorder("<")
    with atomic_write(data) as file:
        for time in range(geometry.tof.bins - 1, -1, -1) if geometry.tof is not None else (None,):
            part = array if time is None else array[:, :, time]
            for number, count in segments:
                start = sum(geometry.segment_planes[: geometry.segment_numbers.index(number)])
                run = falling(np.arange(start + count - 1, start - 1, -1))
                for view in part:
                    file.write(np.ascontiguousarray(view[:, run].T, dtype=stored).tobytes())
    with atomic_write(path) as file:
        file.write(_stir_header(geometry, info or PETInfo(), data.name, dtype, segments).encode())


def _stir_header(geometry: PETGeometry, info: PETInfo, data: str, dtype: str, segments: list[tuple[int, int]]) -> str:
    device = geometry.scanner
    half = (geometry.span - 1) // 2
    differences = [-number * geometry.span for number, _ in segments]
    name, depth = _STIR_NAMES.get(device.name, (device.name, 0.0))
    kind = {"f": "float", "u": "unsigned integer", "i": "signed integer"}[np.dtype(dtype).kind]
    lines = [
        *("!INTERFILE  :=", "!imaging modality := PT", f"name of data file := {data}", f"originating system := {name}"),
        *("!version of keys := STIR6.0", "!GENERAL DATA :=", "!GENERAL IMAGE DATA :=", "!type of data := PET"),
        *position_lines(info),
        "imagedata byte order := LITTLEENDIAN",
        *dose_lines(info),
        *("!PET STUDY (General) :=", "!PET data type := Emission", "applied corrections := {None}"),
        f"!number format := {kind}",
        f"!number of bytes per pixel := {np.dtype(dtype).itemsize}",
        f"number of dimensions := {4 if geometry.tof is None else 5}",
    ]
    if geometry.tof is not None:
        lines += ["matrix axis label [5] := timing positions", f"!matrix size [5] := {geometry.tof.bins}"]
    lines += [
        *("matrix axis label [4] := segment", f"!matrix size [4] := {len(segments)}"),
        *("matrix axis label [3] := view", f"!matrix size [3] := {geometry.n_views}"),
        "matrix axis label [2] := axial coordinate",
        f"!matrix size [2] := {{ {','.join(str(count) for _, count in segments)}}}",
        *("matrix axis label [1] := tangential coordinate", f"!matrix size [1] := {geometry.n_radial}"),
    ]
    if geometry.tof is not None:
        lines.append("TOF mashing factor := 1")
    lines += [
        f"minimum ring difference per segment := {{ {','.join(str(d - half) for d in differences)}}}",
        f"maximum ring difference per segment := {{ {','.join(str(d + half) for d in differences)}}}",
        "Scanner parameters:=",
        f"Scanner type := {name}",
        f"Number of rings := {device.rings}",
        f"Number of detectors per ring := {device.crystals}",
        f"Inner ring diameter (cm) := {device.radius_mm / 5 - 2 * depth!r}",
        f"Average depth of interaction (cm) := {depth!r}",
        f"Distance between rings (cm) := {device.ring_spacing_mm / 10!r}",
        f"Default bin size (cm) := {geometry.bin_mm / 10!r}",
        f"View offset (degrees) := {math.degrees(device.tilt_rad)!r}",
        f"Maximum number of non-arc-corrected bins := {max(device.n_radial, geometry.n_radial)}",
        f"Default number of arc-corrected bins := {max(device.n_radial, geometry.n_radial)}",
    ]
    if geometry.tof is not None:
        bin_ps, fwhm_ps = _picoseconds(geometry.tof)
        lines += [
            f"Maximum number of (unmashed) TOF time bins := {geometry.tof.bins}",
            f"Size of unmashed TOF time bins (ps) := {bin_ps!r}",
            f"TOF timing resolution (ps) := {fwhm_ps!r}",
        ]
    for key, gaps in (("crystals", device.gap_crystals), ("rings", device.gap_rings)):
        if gaps:
            lines.append(f"recon3d gap {key} := {{{','.join(map(str, gaps))}}}")
    lines += [
        "Number of blocks per bucket in transaxial direction := 1",
        "Number of blocks per bucket in axial direction := 1",
        f"Number of crystals per block in axial direction := {device.block_rings}",
        f"Number of crystals per block in transaxial direction := {device.block_crystals}",
        "Number of detector layers := 1",
        f"Number of crystals per singles unit in axial direction := {device.block_rings}",
        f"Number of crystals per singles unit in transaxial direction := {device.block_crystals}",
        "end scanner parameters:=",
        f"effective central bin size (cm) := {geometry.bin_mm / 10!r}",
        *frame_lines(info),
        "!END OF INTERFILE :=",
    ]
    return "\n".join(lines) + "\n"


def _picoseconds(tof: TOF) -> tuple[float, float]:
    """Width of a bin and resolution, inverting TOF.from_ps."""
    unit = TOF.from_ps(1, 1.0, 1.0)
    return tof.bin_mm / unit.bin_mm, tof.sigma_mm / unit.sigma_mm


def position_lines(info: PETInfo) -> list[str]:
    """How the patient lies."""
    return [
        f"patient orientation := {'feet_in' if info.position.startswith('FF') else 'head_in'}",
        f"patient rotation := {'prone' if info.position.endswith('P') else 'supine'}",
    ]


def dose_lines(info: PETInfo) -> list[str]:
    """Calibration, isotope and dose."""
    lines = []
    if info.calibrated:
        lines += [f"calibration factor := {1.0 / info.scale!r}", f"recon3d scale (counts mL/Bq/mm) := {info.scale!r}"]
    if info.isotope or info.half_life_s:
        lines.append("number of radionuclides := 1")
        if info.isotope:
            lines.append(f"radionuclide name[1] := {' '.join(info.isotope.split())}")
        if info.half_life_s:
            lines.append(f"radionuclide halflife (sec)[1] := {info.half_life_s!r}")
        if info.branching:
            lines.append(f"radionuclide branching factor[1] := {info.branching!r}")
    for key, value in (
        ("tracer activity at time of injection (Bq)", info.injected_bq),
        ("injection to scan (sec)", info.injection_to_scan_s),
        ("patient weight (kg)", info.weight_kg),
        ("%GIM loss fraction", None if info.dead_time_factor == 1.0 else info.dead_time_factor),
    ):
        if value is not None:
            lines.append(f"{key} := {value!r}")
    return lines


def frame_lines(info: PETInfo) -> list[str]:
    """The time frame."""
    lines = ["number of time frames := 1"]
    if info.duration_s is not None:
        lines.append(f"image duration (sec)[1] := {info.duration_s!r}")
        lines.append(f"image relative start time (sec)[1] := {info.start_s!r}")
    return lines


def falling(planes: NDArray[np.int64]) -> slice:
    """Falling plane numbers as a slice, so that numpy copies without gathering."""
    stop = int(planes[-1]) - 1
    return slice(int(planes[0]), None if stop < 0 else stop, -1)

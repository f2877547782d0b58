"""What an Interfile sinogram header says of its bins: scanner, segments, time bins, time and dose, in our order.

STIR lists lowest and highest ring difference of every segment; Siemens gives span and a table of planes in the order
0, -1, +1, -2, ...
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recon3d.geometry.pet import TOF, PETGeometry, PETScanner, scanner, scanner_names
from recon3d.io.guard import BadInput, as_bad_input, check_spacing
from recon3d.io.interfile_header import InterfileHeader
from recon3d.io.pet import PETInfo

# names that scanners go by, in lower case -> the presets of recon3d.geometry
_NAMES = {
    **{name: name for name in scanner_names()},
    **dict.fromkeys(("siemens mmr", "2008"), "mmr"),
    **dict.fromkeys(("siemens mct", "2011", "1104", "1094"), "mct"),
    **dict.fromkeys(("siemens vision 600", "vision 600", "1208"), "vision"),
    **dict.fromkeys(("ge signa pet/mr", "pet/mr signa", "signa pet/mr"), "signa"),
    **dict.fromkeys(("ge discovery 690", "discovery 690", "ge discovery 710", "discovery 710"), "d690"),
}
_MOST_SEGMENTS = 2049
_ARC = ("arc correction", "arc corrected", "radial arc-correction")


@dataclass(frozen=True)
class Sinogram:
    """What a sinogram header says, checked, with every order translated into ours.

    Attributes:
        planes: for every segment of the file, our plane of each of its planes.
        tof: our time bin of each of the file's; empty without time of flight.
        view_outer: whether the file's views vary slower than its planes.
    """

    header: InterfileHeader
    geometry: PETGeometry
    info: PETInfo
    planes: tuple[NDArray[np.int64], ...]
    tof: tuple[int, ...]
    view_outer: bool
    dtype: np.dtype[Any]
    scale: float
    corrected: bool
    notes: tuple[str, ...]

    @property
    def numbers(self) -> int:
        return math.prod(self.geometry.shape)


def sinogram_of(header: InterfileHeader) -> Sinogram:
    path = header.path
    if is_image(header):
        raise BadInput(path, "describes an image, not a sinogram", "use it where an image is asked for")
    if (header.text("imaging modality") or "PT").upper() in ("NM", "NUCMED"):
        raise BadInput(path, "describes SPECT data", "PET sinograms are read")
    if (header.text("data format") or "").lower() == "coincidencelist":
        raise BadInput(path, "describes list mode", "read it with read_measurement")
    if (header.text("%compression") or "").lower() == "on":
        raise BadInput(path, "has compressed data", "uncompress them with the scanner's tools (intfcompr)")
    notes: list[str] = []
    corrected = _corrections(header, notes)
    sizes = _siemens_sizes(header) if header.is_siemens else _stir_sizes(header)
    device = scanner_of(header, notes, sizes.n_radial)
    with as_bad_input(path, "its bins do not fit the scanner", (ValueError, TypeError), "correct the header"):
        tof = tof_of(header, device, sizes.n_tof)
        geometry = PETGeometry(device, sizes.n_views, sizes.n_radial, sizes.span, sizes.largest, tof)
    planes = tuple(our_planes(path, geometry, low, high, count) for low, high, count in sizes.segments)
    if (
        sum(len(p) for p in planes) != geometry.n_planes
        or len({int(i) for p in planes for i in p}) != geometry.n_planes
    ):
        raise BadInput(
            path, f"has {sum(len(p) for p in planes)} planes, span {sizes.span} has {geometry.n_planes}", "correct it"
        )
    return Sinogram(
        header,
        geometry,
        read_info(header),
        planes,
        _tof_order(header, sizes.n_tof),
        sizes.view_outer,
        header.dtype(),
        header.scale(),
        corrected,
        tuple(notes),
    )


@dataclass(frozen=True)
class _Sizes:
    n_views: int
    n_radial: int
    n_tof: int
    span: int
    largest: int
    segments: tuple[tuple[int, int, int], ...]  # lowest and highest ring difference, planes; as the file counts
    view_outer: bool


def _stir_sizes(header: InterfileHeader) -> _Sizes:
    path = header.path
    rank = header.whole("number of dimensions", low=1, high=9)
    header.required("number of dimensions", rank)
    if rank not in (4, 5):
        raise BadInput(path, f"has {rank} dimensions", "4 are expected, or 5 with time of flight")
    axes: dict[str, list[int]] = {}
    order = []
    for k in range(1, int(rank or 0) + 1):
        label = (header.text("matrix axis label", index=k) or "").lower()
        size = header.wholes("matrix size", index=k, low=1, high=1 << 20)
        header.required(f"matrix size [{k}]", size)
        axes[label] = list(size or ())
        order.append(label)
    head = ["tangential coordinate"]
    outer = [*head, "axial coordinate", "view", "segment"]
    inner = [*head, "view", "axial coordinate", "segment"]
    if order[:4] not in (outer, inner) or (rank == 5 and order[4] != "timing positions"):
        raise BadInput(path, f"has axes {', '.join(order)[:120]}", f"{', '.join(outer)} (timing positions) are read")
    single = [label for label in order if label != "axial coordinate" and len(axes[label]) != 1]
    if single:
        raise BadInput(path, f"has a list of sizes along {single[0]}", "one size is expected")
    count = axes["segment"][0]
    lows = header.wholes("minimum ring difference per segment", low=-4096, high=4096)
    highs = header.wholes("maximum ring difference per segment", low=-4096, high=4096)
    header.required("minimum ring difference per segment", lows)
    header.required("maximum ring difference per segment", highs)
    planes = axes["axial coordinate"]
    low_list, high_list = list(lows or ()), list(highs or ())
    if not len(low_list) == len(high_list) == len(planes) == count or count > _MOST_SEGMENTS:
        raise BadInput(
            path,
            f"has {count} segments with {len(planes)} sizes, {len(low_list)} lowest and {len(high_list)} highest ring "
            "differences",
            "one of each for every segment is expected",
        )
    widths = {high - low + 1 for low, high in zip(low_list, high_list, strict=True)}
    if len(widths) != 1 or min(widths) < 1 or min(widths) % 2 == 0:
        raise BadInput(
            path,
            f"adds up {', '.join(str(w) for w in sorted(widths)[:6])} ring differences in its segments",
            "the same odd number in all of them is read; GE's compression by 2 is not",
        )
    return _Sizes(
        axes["view"][0],
        axes["tangential coordinate"][0],
        axes["timing positions"][0] if rank == 5 else 0,
        widths.pop(),
        max(max(high_list), -min(low_list)),
        tuple(zip(low_list, high_list, planes, strict=True)),
        order[2] == "view",
    )


def _siemens_sizes(header: InterfileHeader) -> _Sizes:
    path = header.path
    rank = header.whole("number of dimensions", low=1, high=9)
    header.required("number of dimensions", rank)
    if rank not in (3, 4):
        raise BadInput(path, f"has {rank} dimensions", "3 are expected, or 4 with time of flight")
    sizes = []
    for k in range(1, int(rank or 0) + 1):
        size = header.whole("matrix size", index=k, low=1, high=1 << 20)
        header.required(f"matrix size [{k}]", size)
        sizes.append(int(size or 0))
    span, largest, table = siemens_segments(header)
    if sizes[2] != sum(table):
        raise BadInput(path, f"has {sizes[2]} planes, its segment table {sum(table)}", "correct the header")
    time = header.whole("%number of tof time bins", low=1, high=4096) or 1
    if rank == 4:
        time = sizes[3]
    return _Sizes(
        sizes[1],
        sizes[0],
        time if time > 1 else 0,
        span,
        largest,
        siemens_order(span, table),
        False,
    )


def siemens_segments(header: InterfileHeader) -> tuple[int, int, list[int]]:
    """Span, largest ring difference and planes of every segment, as a header of Siemens states them.

    Raises:
        BadInput: they are missing.
    """
    span = header.whole("%axial compression", low=1, high=4095)
    largest = header.whole("%maximum ring difference", high=4095)
    table = header.wholes("%segment table", low=1, high=1 << 20)
    header.required("%axial compression", span)
    header.required("%maximum ring difference", largest)
    header.required("%segment table", table)
    return int(span or 1), int(largest or 0), list(table or ())


def siemens_order(span: int, table: list[int]) -> tuple[tuple[int, int, int], ...]:
    """Lowest and highest ring difference and planes of segments in Siemens' order 0, -1, +1, -2, ..."""
    half = (span - 1) // 2
    numbers = [(k + 1) // 2 * (-1 if k % 2 else 1) for k in range(len(table))]
    return tuple((n * span - half, n * span + half, count) for n, count in zip(numbers, table, strict=True))


def our_planes(
    path: str | os.PathLike[str], geometry: PETGeometry, low: int, high: int, count: int
) -> NDArray[np.int64]:
    """Our plane of every plane of a file's segment: rings turned round, so ring differences change their sign.

    Raises:
        BadInput: there is no such segment, or it has another number of planes.
    """
    number, off = divmod(-(low + high) // 2, geometry.span)
    numbers, planes = geometry.segment_numbers, geometry.segment_planes
    if off or number not in numbers:
        raise BadInput(path, f"has a segment of ring differences {low}..{high}", "segments must cover -k..k evenly")
    place = numbers.index(number)
    if planes[place] != count:
        raise BadInput(
            path,
            f"has {count} planes for ring differences {low}..{high}, {geometry.scanner.rings} rings give "
            f"{planes[place]}",
            "correct the header",
        )
    start = sum(planes[:place])
    return np.arange(start + count - 1, start - 1, -1)


def scanner_of(header: InterfileHeader, notes: list[str], n_radial: int = 0) -> PETScanner:
    """The scanner that a header names, with every number it states checked; an unknown one from its numbers alone.

    Raises:
        BadInput: a number contradicts the scanner named, or is missing for one that is not known.
    """
    path = header.path
    layout = (header.text("scanner geometry (blocksoncylindrical/cylindrical/generic)") or "cylindrical").lower()
    if layout not in ("cylindrical", "blocksoncylindrical"):
        raise BadInput(path, f"has a scanner geometry {layout[:40]!r}", "crystals on a cylinder are read")
    if layout != "cylindrical":
        notes.append("flat blocks are taken as bent onto the cylinder")
    said = [header.text("originating system"), header.text("scanner type")]
    preset = next((_NAMES[name.lower()] for name in said if name and name.lower() in _NAMES), None)
    rings = header.whole("number of rings", low=1, high=4096)
    crystals = header.whole("number of detectors per ring", low=1, high=1 << 16)
    inner = _length(header, "inner ring diameter (cm)", "gantry crystal radius (cm)")
    depth = header.number("average depth of interaction (cm)")
    pitch = header.positive("distance between rings (cm)")
    tilt = header.number("view offset (degrees)") or 0.0
    if preset is not None:
        known = scanner(preset)
        stated = {
            "number of rings": (rings, known.rings, 0.0),
            "number of detectors per ring": (crystals, known.crystals, 0.0),
            "distance between rings (cm)": (pitch, known.ring_spacing_mm / 10, 1e-4),
            "view offset (degrees)": (None if header.is_siemens else tilt, math.degrees(known.tilt_rad), 0.05),
            "inner ring diameter and depth of interaction (cm)": (
                None if inner is None or depth is None else inner + 2 * depth,
                known.radius_mm / 5,
                0.11,
            ),
        }
        for key, (value, expected, slack) in stated.items():
            if value is not None and abs(value - expected) > slack:
                raise BadInput(
                    path,
                    f"says {key} := {value:g}, a {said[0] or said[1]} has {expected:.6g}",
                    "correct the number, or the scanner's name",
                )
        return known
    for name, value in (
        ("number of rings", rings),
        ("number of detectors per ring", crystals),
        ("inner ring diameter (cm)", inner),
        ("distance between rings (cm)", pitch),
    ):
        header.required(name, value)
    if depth is None:
        notes.append("the depth of interaction is not stated; 0 is assumed")
    name = next((n for n in said if n), None) or "unknown"
    around = header.whole("number of crystals per block in transaxial direction", low=-1, high=1 << 16) or 0
    along = header.whole("number of crystals per block in axial direction", low=-1, high=4096) or 0
    assert rings is not None and crystals is not None and inner is not None and pitch is not None
    check_spacing(path, "the distance between rings", 10 * pitch)
    with as_bad_input(path, "describes a scanner that cannot be", (ValueError,), "correct the header"):
        return PETScanner(
            name[:80],
            rings,
            10 * pitch,
            crystals,
            5 * (inner + 2 * (depth or 0.0)),
            around if around > 0 and crystals % around == 0 else 1,
            along if along > 0 and rings % along == 0 else 1,
            n_radial=n_radial if 0 < n_radial < crystals else 0,
            gap_crystals=tuple(header.wholes("recon3d gap crystals", high=1 << 16) or ()),
            gap_rings=tuple(header.wholes("recon3d gap rings", high=4096) or ()),
            tilt_rad=math.radians(tilt),
        )


def _length(header: InterfileHeader, diameter: str, radius: str) -> float | None:
    value = header.positive(diameter)
    if value is None:
        half = header.positive(radius)
        value = None if half is None else 2 * half
    if value is not None and not 1e-2 < value < 1e4:
        raise BadInput(header.path, f"says {diameter!r} := {value:g}", "check the unit, cm is expected")
    return value


def tof_of(header: InterfileHeader, device: PETScanner, n_bins: int) -> TOF | None:
    """The time bins that a header or else the scanner states; None for 0 of them.

    Raises:
        BadInput: nobody states them, or they contradict each other.
    """
    if n_bins == 0:
        return None
    unmashed = header.positive("size of unmashed tof time bins (ps)", "size of timing bin (ps)")
    fwhm = header.positive("tof timing resolution (ps)", "timing resolution (ps)")
    mashing = header.whole("tof mashing factor", "%tof mashing factor", low=1, high=4096) or 1
    most = header.whole("maximum number of (unmashed) tof time bins", "number of tof time bins", low=1, high=1 << 20)
    if most is not None and not header.is_siemens and most // mashing != n_bins:
        raise BadInput(
            header.path, f"has {n_bins} time bins, {most} mashed by {mashing} are {most // mashing}", "correct it"
        )
    if unmashed is not None and fwhm is not None:
        return TOF.from_ps(n_bins, unmashed * mashing, fwhm)
    if device.tof is None:
        raise BadInput(
            header.path,
            "has time of flight but states neither its bins nor its resolution in ps",
            "add 'Size of unmashed TOF time bins (ps)' and 'TOF timing resolution (ps)'",
        )
    if device.tof.bins != n_bins:
        raise BadInput(
            header.path, f"has {n_bins} time bins, a {device.name} has {device.tof.bins}", "state their size"
        )
    return device.tof


def _tof_order(header: InterfileHeader, n_bins: int) -> tuple[int, ...]:
    """Our time bin of every bin of the file; STIR counts towards the p0 end, we towards p1."""
    if n_bins == 0:
        return ()
    if n_bins % 2 == 0:
        raise BadInput(header.path, f"has {n_bins} time bins", "an odd number is read")
    half = n_bins // 2
    if header.is_siemens:
        return siemens_tof_order(n_bins)
    order = header.wholes("tof bin order", low=-4096, high=4096) or list(range(-half, half + 1))
    if sorted(order) != list(range(-half, half + 1)):
        raise BadInput(header.path, f"has an order of time bins {order[:6]}", f"-{half}..{half} are expected")
    return tuple(half - k for k in order)


def siemens_tof_order(n_bins: int) -> tuple[int, ...]:
    """Our time bin of every bin of Siemens' order 0, +1, -1, ..., whose positive bins lie towards the p0 end."""
    return tuple(n_bins // 2 - (k + 1) // 2 * (1 if k % 2 else -1) for k in range(n_bins))


def _corrections(header: InterfileHeader, notes: list[str]) -> bool:
    """Whether counts were corrected; refuses what changes the bins."""
    said = header.text("applied corrections")
    if said is None:
        if not header.is_siemens:
            raise BadInput(
                header.path,
                "does not say whether it is arc-corrected, which STIR takes for yes",
                "add 'applied corrections := {None}' if it is not",
            )
        return False
    words = [w.strip().lower() for w in said.strip("{} ").split(",") if w.strip()]
    if any(w in _ARC for w in words):
        raise BadInput(header.path, "is arc-corrected", "export the sinogram with the scanner's own radial bins")
    done = [w for w in words if w != "none"]
    if done:
        notes.append(f"corrections were applied before: {', '.join(done)[:120]}")
    return bool(done)


def read_info(header: InterfileHeader) -> PETInfo:
    """Time, dose and calibration as a header states them.

    Raises:
        BadInput: a value is no number.
    """
    frames = header.whole("number of time frames", low=1, high=1 << 16) or 1
    if frames > 1:
        raise BadInput(header.path, f"holds {frames} time frames", "one is read; split it first")
    duration = start = None
    for at in (1, 0):
        duration = duration or header.positive("image duration (sec)", index=at)
        start = start or header.number("image relative start time (sec)", index=at)
    half_life = header.positive("radionuclide halflife (sec)", index=1) or header.positive(
        "isotope gamma halflife (sec)"
    )
    branching = header.positive("radionuclide branching factor", index=1) or header.positive("isotope branching factor")
    calibration = header.positive("calibration factor")
    orientation, rotation = header.text("patient orientation"), header.text("patient rotation")
    said = (header.text("%patient orientation") or "").upper()
    position = said if said in ("HFS", "HFP", "FFS", "FFP") else None
    if position is None:
        feet, prone = (orientation or "").lower() == "feet_in", (rotation or "").lower() == "prone"
        position = ("FF" if feet else "HF") + ("P" if prone else "S")
    ours = header.positive("recon3d scale (counts mL/Bq/mm)".lower())
    injected = header.positive("tracer activity at time of injection (bq)")
    loss = header.positive("%gim loss fraction")
    with as_bad_input(header.path, "has times or doses that cannot be", (ValueError, OverflowError), "correct them"):
        return PETInfo(
            duration_s=duration,
            start_s=start or 0.0,
            isotope=(header.text("radionuclide name", index=1) or header.text("isotope name") or "")[:40] or None,
            half_life_s=half_life,
            branching=branching,
            dead_time_factor=loss or 1.0,
            injected_bq=injected,
            injection_to_scan_s=_since_injection(header),
            weight_kg=header.positive("patient weight (kg)"),
            scale=ours or (1.0 if calibration is None else 1.0 / calibration),
            calibrated=ours is not None or calibration is not None,
            position=position,  # type: ignore[arg-type]
        )


def _since_injection(header: InterfileHeader) -> float | None:
    given = header.number("injection to scan (sec)")
    if given is not None:
        return given

    def moment(what: str) -> datetime | None:
        day = header.text(f"%{what} date (yyyy:mm:dd)")
        hour = next((v for (k, _), v in header.values.items() if k.startswith(f"%{what} time (hh:mm:ss") and v), None)
        try:
            return datetime.strptime(f"{day} {hour}", "%Y:%m:%d %H:%M:%S") if day and hour else None
        except ValueError:
            return None

    scan, injection = moment("study"), moment("tracer injection")
    if scan is None or injection is None or scan < injection:
        return None
    return (scan - injection).total_seconds()


def is_image(header: InterfileHeader) -> bool:
    """Whether a header describes an image."""
    said = (header.text("pet data type") or "").lower()
    if said:
        return said == "image"
    return (header.text("matrix axis label", index=1) or "").lower() == "x" and header.whole(
        "number of dimensions"
    ) == 3

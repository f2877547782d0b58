"""Siemens raw data (twix, meas.dat) of software VB and of VD and later.

A file is a list of measurements (one before VD); each has a header of named texts, of which the protocol between
ASCCONV marks is used, and lines: a header (128 bytes with each coil's samples before VD, 192 bytes and 32 for each coil
since), then complex64 samples. The last measurement with image lines is read, noise scans come from any of them.
Nothing official describes the format; this follows what twixtools, mapVBVD and siemens_to_ismrmrd agree on.
"""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from recon3d.io.acquisitions import (
    HEAD,
    NOISE,
    REVERSE,
    Heads,
    Scan,
    covariance_of,
    describe_scan,
    has_flag,
    kspace_of,
    places_of,
    sort,
    trimmed,
)
from recon3d.io.guard import DEFAULT_LIMITS, BadInput, Limits, check_array, check_file, check_finite, read_bytes
from recon3d.io.kspace import KSpace, KSpaceOptions
from recon3d.io.mrheader import MRHeader, MRSpace

_MOST_MEASUREMENTS = 64
_ENTRY_BYTES = 152
_MOST_HEADER = 64 << 20
_NAME = re.compile(rb"[A-Za-z]{4,16}\0")
_PROTOCOL = re.compile(rb"### ASCCONV BEGIN[^\n]{0,400}\n")
_SETTING = re.compile(rb"^([A-Za-z][A-Za-z0-9_.\[\]]{1,80})[ \t]*=[ \t]*([^\s]{1,60})", re.MULTILINE)
# ADC flags of a line that end it, or that mark what is not a line of samples
_END, _SYNC = 0, 5
# their flags, and those of ISMRMRD (counted from 1) that mean the same
_FLAGS = {1: 28, 2: 26, 14: 30, 15: 31, 21: 24, 22: 20, 23: 21, 24: REVERSE, 25: NOISE, 51: 27}
_COUNTERS = (
    "kspace_encode_step_1",
    "average",
    "slice",
    "kspace_encode_step_2",
    "contrast",
    "phase",
    "repetition",
    "set",
)
# share of the nominal receiver bandwidth that noise passes
_NOISE_BANDWIDTH = 0.793
_THREE_DIMENSIONS = 4
_CARTESIAN = 1
_MOST_SIZE = 1 << 14


def _layout(mask: int, samples: int, counters: int, cut: int, centre: int, place: int, size: int) -> np.dtype[Any]:
    fields: dict[str, tuple[Any, int]] = {
        "length": (np.dtype("<u4"), 0),
        "mask": (np.dtype("<u8"), mask),
        "samples": (np.dtype("<u2"), samples),
        "coils": (np.dtype("<u2"), samples + 2),
        "counters": (np.dtype(("<u2", (8,))), counters),
        "cut": (np.dtype(("<u2", (2,))), cut),
        "centre_column": (np.dtype("<u2"), cut + 4),
        "centre": (np.dtype(("<u2", (2,))), centre),
        "position": (np.dtype(("<f4", (3,))), place),
        "quaternion": (np.dtype(("<f4", (4,))), place + 12),
    }
    return np.dtype(
        {
            "names": list(fields),
            "formats": [kind for kind, _ in fields.values()],
            "offsets": [offset for _, offset in fields.values()],
            "itemsize": size,
        }
    )


_VB = _layout(20, 28, 32, 60, 76, 96, 128)
_VD = _layout(40, 48, 52, 80, 96, 100, 192)


@dataclass(frozen=True)
class _Measurement:
    """One measurement of a file: its protocol, the lines' headers, and where their samples begin."""

    protocol: dict[str, str]
    lines: NDArray[Any]
    offsets: NDArray[np.int64]
    new: bool  # VD and later

    @property
    def coil_header(self) -> int:
        return 32 if self.new else _VB.itemsize

    def load(self, path: str | os.PathLike[str], file: IO[bytes], row: int) -> NDArray[np.complex64]:
        """The samples [coil, sample] of a line."""
        samples, coils = int(self.lines["samples"][row]), int(self.lines["coils"][row])
        file.seek(int(self.offsets[row]))
        raw = np.frombuffer(read_bytes(path, file, coils * (self.coil_header + 8 * samples)), np.uint8)
        return raw.reshape(coils, -1)[:, self.coil_header :].copy().view("<c8").astype(np.complex64, copy=False)


def is_twix(path: str | os.PathLike[str]) -> bool:
    """Whether a file begins as raw data of a Siemens scanner do."""
    with Path(path).open("rb") as file:
        return bool(_starts(path, file, Path(path).stat().st_size)[0])


def read_twix(path: str | os.PathLike[str], options: KSpaceOptions, limits: Limits = DEFAULT_LIMITS) -> KSpace:
    """k-space from a Siemens raw data file.

    Raises:
        BadInput: as read_kspace.
    """
    notes: list[str] = []
    with Path(path).open("rb") as file:
        measurements = _measurements(path, file)
        chosen = measurements[-1]
        scan = _scan(path, chosen, options, notes)
        places = places_of(path, scan, options, notes)
        rows = scan.image[np.isin(scan.heads["idx"]["slice"][scan.image], [p.index for p in places])]
        size = check_file(path)
        check_array(
            path, "its samples", [len(rows), scan.coils, scan.samples], 8, size, False, limits, working_itemsize=16
        )
        lines = np.empty((len(rows), scan.coils, scan.samples), np.complex64)
        for k, row in enumerate(rows):
            lines[k] = chosen.load(path, file, int(row))
        check_finite(path, "its samples", lines.view(np.float32))
        covariance = _noise_covariance(path, file, measurements, scan, rows, notes, size, limits)
    return kspace_of(path, scan, rows, places, trimmed(path, scan, rows, lines), None, covariance, options, notes)


def describe_twix(path: str | os.PathLike[str]) -> dict[str, Any]:
    """From the headers alone."""
    notes: list[str] = []
    with Path(path).open("rb") as file:
        measurements = _measurements(path, file)
    scan = _scan(path, measurements[-1], KSpaceOptions(), notes)
    noise = sum(int(((m.lines["mask"] >> np.uint64(25)) & np.uint64(1)).sum()) for m in measurements)
    out = {
        "format": f"Siemens twix, {'VD or later' if measurements[-1].new else 'VB'}",
        "measurements": len(measurements),
    }
    return {**out, **describe_scan(path, scan, None, notes), "noise scans": f"{noise} lines" if noise else "none"}


# ---- the file ------------------------------------------------------------------------------------------------------


def _starts(path: str | os.PathLike[str], file: IO[bytes], size: int) -> tuple[list[tuple[int, int]], bool]:
    """Where measurements begin and end, and whether the file is of VD or later; none if it is no such file."""
    file.seek(0)
    first = file.read(8)
    if len(first) < 8:
        return [], False
    a, b = int.from_bytes(first[:4], "little"), int.from_bytes(first[4:], "little")
    new = a < 10_000 and 1 <= b <= _MOST_MEASUREMENTS
    places = [(0, size)]
    if new:
        table = file.read(_ENTRY_BYTES * b)
        if len(table) < _ENTRY_BYTES * b:
            return [], False
        places = []
        for k in range(b):
            entry = table[k * _ENTRY_BYTES : (k + 1) * _ENTRY_BYTES]
            start, length = (int.from_bytes(entry[at : at + 8], "little") for at in (8, 16))
            places.append((start, start + length if length or b > 1 else size))
    for start, _ in places:
        if start + 24 > size:
            return [], False
        file.seek(start)
        head = file.read(24)
        if int.from_bytes(head[:4], "little") < 16 or not _NAME.match(head, 8):
            return [], False
    return places, new


def _measurements(path: str | os.PathLike[str], file: IO[bytes]) -> list[_Measurement]:
    """All measurements that have lines.

    Raises:
        BadInput: one is damaged, or none has lines.
    """
    size = check_file(path)
    places, new = _starts(path, file, size)
    if not places:
        raise BadInput(path, "does not begin as Siemens raw data do", "export it again")
    out = []
    for k, (start, end) in enumerate(places):
        if not start < end <= size:
            raise BadInput(
                path,
                f"says that measurement {k} ends at byte {end} of {size}",
                "it is truncated; copy or export it again",
            )
        file.seek(start)
        length = int.from_bytes(read_bytes(path, file, 4), "little")
        if not 16 <= length <= min(_MOST_HEADER, end - start):
            raise BadInput(path, f"has a header of {length} bytes in measurement {k}", "it is damaged; export it again")
        protocol = _protocol(read_bytes(path, file, length - 4))
        lines, offsets = _lines(path, file, start + length, end, _VD if new else _VB, new)
        if lines.size:
            out.append(_Measurement(protocol, lines, offsets, new))
    if not out:
        raise BadInput(path, "holds no lines", "export it again")
    return out


def _protocol(text: bytes) -> dict[str, str]:
    """Settings of the protocol, as text by name."""
    begin = _PROTOCOL.search(text, max(0, text.find(b"MeasYaps\0")))
    if begin is None:
        return {}
    end = text.find(b"### ASCCONV END", begin.end())
    block = text[begin.end() : end if end > 0 else len(text)]
    return {m[1].decode("ascii"): m[2].decode("latin1") for m in _SETTING.finditer(block)}


def _lines(
    path: str | os.PathLike[str], file: IO[bytes], start: int, end: int, kind: np.dtype[Any], new: bool
) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """Headers of all lines, and where their samples begin."""
    heads, offsets, at = [], [], start
    while at + kind.itemsize <= end:
        file.seek(at)
        raw = read_bytes(path, file, kind.itemsize)
        head = np.frombuffer(raw, kind)[0]
        mask, length = int(head["mask"]), int(head["length"]) & 0x1FFFFFF
        if mask >> _END & 1:
            break
        if mask >> _SYNC & 1:
            if length < kind.itemsize:
                raise BadInput(path, f"has a block of {length} bytes at {at}", "it is damaged; export it again")
            at += length
            continue
        samples, coils = int(head["samples"]), int(head["coils"])
        if not (samples and coils):
            raise BadInput(path, f"has a line of {samples} samples and {coils} coils at byte {at}", "it is damaged")
        begin = at + (kind.itemsize if new else 0)
        at = begin + coils * ((32 if new else kind.itemsize) + 8 * samples)
        if at > end:
            raise BadInput(path, f"ends within a line of {samples} samples and {coils} coils", "the scan was cut off")
        heads.append(raw)
        offsets.append(begin)
    return np.frombuffer(b"".join(heads), kind), np.array(offsets, np.int64)


# ---- headers -------------------------------------------------------------------------------------------------------


def _scan(path: str | os.PathLike[str], measurement: _Measurement, options: KSpaceOptions, notes: list[str]) -> Scan:
    heads = _heads(measurement)
    header = _header(path, measurement, heads)
    if has_flag(heads["flags"], REVERSE).any():
        notes.append("lines run in both directions: they are turned, but ghosts are not corrected")
    return sort(path, header, heads, options, notes, "twix")


def _heads(measurement: _Measurement) -> Heads:
    """Their headers as ISMRMRD has them."""
    theirs = measurement.lines
    out = np.zeros(theirs.size, HEAD)
    for flag, ours in _FLAGS.items():
        hit = (theirs["mask"] >> np.uint64(flag)) & np.uint64(1)
        out["flags"] |= hit << np.uint64(ours - 1)
    out["number_of_samples"], out["active_channels"] = theirs["samples"], theirs["coils"]
    out["discard_pre"], out["discard_post"] = theirs["cut"][:, 0], theirs["cut"][:, 1]
    out["center_sample"] = theirs["centre_column"]
    for k, name in enumerate(_COUNTERS):
        out["idx"][name] = theirs["counters"][:, k]
    out["position"] = theirs["position"]
    w, x, y, z = theirs["quaternion"].astype(np.float64).T
    with np.errstate(all="ignore"):  # what is not finite is told later
        out["phase_dir"] = np.stack([1 - 2 * (y * y + z * z), 2 * (x * y + z * w), 2 * (x * z - y * w)], 1)
        out["read_dir"] = np.stack([2 * (x * y - z * w), 1 - 2 * (x * x + z * z), 2 * (y * z + x * w)], 1)
        out["slice_dir"] = np.stack([2 * (x * z + y * w), 2 * (y * z - x * w), 1 - 2 * (x * x + y * y)], 1)
    return out


def _header(path: str | os.PathLike[str], measurement: _Measurement, heads: Heads) -> MRHeader:
    """Matrix and field of view from the protocol, widened where lines go beyond."""
    protocol = measurement.protocol
    trajectory = _number(path, protocol, "sKSpace.ucTrajectory", _CARTESIAN)
    if trajectory != _CARTESIAN:
        raise BadInput(
            path,
            f"is not Cartesian (trajectory {trajectory:g})",
            "its trajectory is not recorded; convert it to ISMRMRD",
        )
    image = ~has_flag(heads["flags"], NOISE)
    if not image.any():
        image[:] = True
    first = int(np.flatnonzero(image)[0])
    samples = int(heads["number_of_samples"][first])
    base = int(_number(path, protocol, "sKSpace.lBaseResolution", samples // 2))
    nx = max(samples, 2 * base if samples > base else base)
    centre = [int(n) for n in measurement.lines["centre"][first]]
    sizes = [int(_number(path, protocol, "sKSpace.lPhaseEncodingLines", 1)), 1]
    if _number(path, protocol, "sKSpace.ucDimension", 2) == _THREE_DIMENSIONS:
        sizes[1] = int(_number(path, protocol, "sKSpace.lPartitions", 1))
    slice_of = "sSliceArray.asSlice[0]."
    lengths = [_number(path, protocol, slice_of + f"d{name}", 0.0) for name in ("ReadoutFOV", "PhaseFOV", "Thickness")]
    over = ("dPhaseOversamplingForDialog", "dSliceOversamplingForDialog")
    fov = [f * (1 + _number(path, protocol, f"sKSpace.{o}", 0.0)) for f, o in zip(lengths[1:], over, strict=True)]
    for k, name in enumerate(("kspace_encode_step_1", "kspace_encode_step_2")):
        used = heads["idx"][name][image].astype(int) - centre[k]
        wide = max(sizes[k], 2 * -int(used.min()), 2 * (int(used.max()) + 1)) if sizes[k] > 1 or used.any() else 1
        fov[k] *= wide / max(sizes[k], 1)
        sizes[k] = wide
    if max(nx, *sizes, base) > _MOST_SIZE or base < 1:
        raise BadInput(path, f"has a matrix of {nx} x {sizes[0]} x {sizes[1]}", f"at most {_MOST_SIZE} is read")
    dwell = _number(path, protocol, "sRXSPEC.alDwellTime[0]", 0.0) * 1e-3  # from ns to microseconds
    heads["sample_time_us"] = dwell
    return MRHeader(
        MRSpace((nx, sizes[0], sizes[1]), (lengths[0] * nx / base, fov[0], fov[1])),
        MRSpace((base, sizes[0], sizes[1]), (lengths[0], fov[0], fov[1])),
        {"kspace_encoding_step_1": centre[0], "kspace_encoding_step_2": centre[1]},
        "cartesian",
        "embedded" if _number(path, protocol, "sPat.ucRefScanMode", 2) == 2 else "separate",  # 2: lines of the scan
        _NOISE_BANDWIDTH,
        "Siemens",
        "Siemens",
        1,
    )


def _number(path: str | os.PathLike[str], protocol: dict[str, str], name: str, default: float) -> float:
    text = protocol.get(name)
    if text is None:
        return default
    try:
        value = float(int(text, 16)) if text.lower().startswith("0x") else float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < 1e9:
        raise BadInput(path, f"says {name} = {text[:30]!r}", "its protocol is damaged; export it again")
    return value


def _noise_covariance(
    path: str | os.PathLike[str],
    file: IO[bytes],
    measurements: list[_Measurement],
    scan: Scan,
    rows: NDArray[np.intp],
    notes: list[str],
    size: int,
    limits: Limits,
) -> NDArray[np.complex64] | None:
    """From the noise scans of any measurement with as many coils."""
    wanted = []
    for m in measurements:
        hit = ((m.lines["mask"] >> np.uint64(25)) & np.uint64(1) != 0) & (m.lines["coils"] == scan.coils)
        wanted += [(m, int(row)) for row in np.flatnonzero(hit)]
    if not wanted:
        return None
    counts = [int(m.lines["samples"][row]) for m, row in wanted]
    check_array(path, "its noise", [sum(counts), scan.coils], 8, size, False, limits, working_itemsize=16)
    noise = [m.load(path, file, row) for m, row in wanted]
    for part in noise:
        check_finite(path, "the noise scans", part)
    # the receiver's bandwidth in a noise scan is fixed: 130 Hz a sample before VD, a 76.8 ms readout since
    dwell = math.floor(76800 / counts[0]) / 10 if measurements[-1].new else 1e6 / counts[0] / 130
    return covariance_of(scan, noise, (dwell, float(scan.heads["sample_time_us"][rows[0]])), notes)

"""Acquisitions of any vendor sorted by their headers into k-space, with their place in the patient.

Encoding steps place a line: step - centre + N // 2. Directions are those of DICOM (LPS); pixel N // 2 of each axis lies
at the acquisition's position. Siemens scanners encode with the other sign of the exponent, so that their images run
against the directions of readout, phase and partition; the samples stay as they are and the affine says so.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recon3d.geometry import VolumeGrid
from recon3d.io.guard import DEFAULT_LIMITS, BadInput, check_array, check_finite
from recon3d.io.kspace import (
    KSpace,
    KSpaceOptions,
    affine_from_directions,
    assemble_cartesian,
    assemble_noncartesian,
    crop_axis,
    describe_grid,
    describe_sampling,
    hybrid,
    slices_of,
)
from recon3d.io.mrheader import MRHeader

# flags of an acquisition, counted from 1 as the format does
NOISE, CALIBRATION, CALIBRATION_AND_IMAGE, REVERSE = 19, 20, 21, 22
_NOT_FOR_IMAGES = {
    23: "navigators",
    24: "phase correction",
    26: "feedback",
    27: "dummy scans",
    28: "feedback",
    29: "coil correction scans",
    30: "phase stabilisation",
    31: "phase stabilisation",
}
_CHOICES = ("contrast", "repetition", "phase", "set")
_STEPS = ("kspace_encode_step_1", "kspace_encode_step_2")
INDEX = np.dtype([(name, "u2") for name in (*_STEPS, "average", "slice", *_CHOICES)])
HEAD = np.dtype(
    [
        ("flags", "u8"),
        ("number_of_samples", "u2"),
        ("active_channels", "u2"),
        ("discard_pre", "u2"),
        ("discard_post", "u2"),
        ("center_sample", "u2"),
        ("encoding_space_ref", "u2"),
        ("trajectory_dimensions", "u2"),
        ("sample_time_us", "f4"),
        ("position", "f4", (3,)),
        ("read_dir", "f4", (3,)),
        ("phase_dir", "f4", (3,)),
        ("slice_dir", "f4", (3,)),
        ("idx", INDEX),
    ]
)
# a direction shorter or longer than one by this was not filled in
_UNIT_LENGTH = 0.01
# slice distances that differ by more than this share are uneven
_UNEVEN = 0.05
_SAME_PLACE_MM = 1e-3
_FARTHEST_MM = 1e5

Heads = NDArray[Any]


@dataclass(frozen=True)
class Scan:
    """What the headers of a file say, sorted."""

    header: MRHeader
    heads: Heads  # of all acquisitions
    image: NDArray[np.intp]  # rows that make the image, in file order
    noise: NDArray[np.intp]  # rows of noise scans
    cartesian: bool
    samples: int
    coils: int
    source_format: str
    sign: int  # of the exponent of the scanner's encoding against the usual one


def sort(
    path: str | os.PathLike[str],
    header: MRHeader,
    heads: Heads,
    options: KSpaceOptions,
    notes: list[str],
    source_format: str,
) -> Scan:
    """Which acquisitions make the image that is asked for, and which are noise.

    Args:
        path: the file, for the sentences.
        header: what the file says of the whole measurement.
        heads: of all acquisitions, of type HEAD.
        options: contrast, repetition and so on.
        notes: what is left out is added here.
        source_format: as in KSpace.

    Raises:
        BadInput: nothing is left, or acquisitions are of different kinds.
    """
    for name in ("position", "read_dir", "phase_dir", "slice_dir", "sample_time_us"):
        check_finite(path, f"{name} of the acquisitions", heads[name])
    flags = heads["flags"]
    noise = np.flatnonzero(has_flag(flags, NOISE))
    image = ~has_flag(flags, NOISE)
    for flag, what in _NOT_FOR_IMAGES.items():
        hit = has_flag(flags, flag) & image
        if hit.any():
            notes.append(f"{int(hit.sum())} acquisitions are {what} and left out")
            image &= ~hit
    if header.encodings > 1:
        other = image & (heads["encoding_space_ref"] != 0)
        if other.any():
            notes.append(f"{int(other.sum())} acquisitions belong to another encoding space and are left out")
            image &= ~other
    calibration = image & has_flag(flags, CALIBRATION) & ~has_flag(flags, CALIBRATION_AND_IMAGE)
    if calibration.any() and not calibration[image].all():
        if header.calibration in ("embedded", "interleaved", ""):
            notes.append(f"{int(calibration.sum())} calibration lines are used for the image too")
        else:
            notes.append(f"{int(calibration.sum())} calibration lines were measured apart and are left out")
            image &= ~calibration
    for name in (*_CHOICES, "average"):
        present = np.unique(heads["idx"][name][image])
        wanted = getattr(options, name)
        if present.size == 0:
            break
        if wanted is None:
            continue
        if wanted >= present.size:
            raise BadInput(path, f"has {present.size} {name}s, number {wanted} was asked for", "counted from 0")
        if present.size > 1:
            rest = "the others are" if present.size > 2 else "the other is"
            notes.append(f"{name} {wanted} of {present.size} is read, {rest} left out; choose with {name}=")
            image &= heads["idx"][name] == present[wanted]
    rows = np.flatnonzero(image)
    if rows.size == 0:
        raise BadInput(path, "holds no acquisitions of an image", "noise and calibration scans alone make none")
    samples, coils, dims = (
        same(path, heads[name][rows], name)
        for name in ("number_of_samples", "active_channels", "trajectory_dimensions")
    )
    named_cartesian = header.trajectory in ("cartesian", "epi")
    cartesian = named_cartesian or (header.trajectory == "other" and dims == 0)
    if header.trajectory == "epi":
        notes.append("an echo-planar scan: lines are put in order, but ghosts and distortion are not corrected")
    if not cartesian and dims not in (2, 3):
        raise BadInput(
            path, f"is {header.trajectory} with {dims} coordinates a sample", "2 or 3 coordinates must be stored"
        )
    if samples == 0 or coils == 0:
        raise BadInput(path, f"has acquisitions of {samples} samples and {coils} coils", "export it again")
    sign = -1 if header.vendor.lower().startswith("siemens") else 1
    if sign < 0:
        notes.append("a Siemens scanner: its image runs against the encoding directions, and the affine says so")
    return Scan(header, heads, rows, noise, cartesian, samples, coils, source_format, sign)


def has_flag(flags: NDArray[np.uint64], flag: int) -> NDArray[np.bool_]:
    return (flags >> np.uint64(flag - 1)) & np.uint64(1) != 0


def same(path: str | os.PathLike[str], values: NDArray[Any], name: str) -> int:
    found = np.unique(values)
    if found.size > 1:
        raise BadInput(
            path, f"has acquisitions whose {name} varies from {found[0]} to {found[-1]}", "lines of one kind are read"
        )
    return int(found[0])


# ---- place ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Place:
    """A slice: its index in the file, and where it lies and how it is turned (LPS) if that is known."""

    index: int
    known: bool
    position: NDArray[np.float64]
    directions: NDArray[np.float64]  # rows: read, phase, slice


def places_of(path: str | os.PathLike[str], scan: Scan, options: KSpaceOptions, notes: list[str]) -> list[Place]:
    """The chosen slices in spatial order."""
    heads = scan.heads[scan.image]
    out = []
    indices, firsts = np.unique(heads["idx"]["slice"], return_index=True)
    for index, head in zip(indices.tolist(), heads[firsts], strict=True):
        directions = np.stack([head[f"{name}_dir"].astype(np.float64) for name in ("read", "phase", "slice")])
        known = bool((np.abs(np.sqrt((directions**2).sum(axis=1)) - 1) < _UNIT_LENGTH).all())
        if known and np.abs(directions @ directions.T - np.eye(3)).max() > 2 * _UNIT_LENGTH:
            raise BadInput(path, "has read, phase and slice directions that are not perpendicular", "export it again")
        position = head["position"].astype(np.float64)
        if np.abs(position).max() > _FARTHEST_MM:
            raise BadInput(path, f"has a slice {np.abs(position).max():g} mm away", "positions are in mm")
        out.append(Place(int(index), known, position, directions))
    if all(p.known for p in out):
        along = np.array([p.position @ out[0].directions[2] for p in out])
        order = np.argsort(along, kind="stable")
        if np.ptp(along) > _SAME_PLACE_MM and not np.array_equal(order, np.arange(len(out))):
            out = [out[k] for k in order]
            notes.append("slices are put in spatial order")
    first, last = slices_of(path, options, len(out))
    return out[first:last]


def _grid(
    path: str | os.PathLike[str],
    scan: Scan,
    places: list[Place],
    shape: tuple[int, int, int],
    options: KSpaceOptions,
    notes: list[str],
    axes: str = "spr",
) -> VolumeGrid:
    """The grid of a volume whose axes [z, y, x] are slices or partitions (s), phase (p) and readout (r)."""
    encoded, recon = scan.header.encoded, scan.header.recon
    if scan.cartesian or options.pixel_mm is not None:
        read, phase = scan.header.pixel_mm(path, (encoded.matrix[0], encoded.matrix[1]), options, notes)
    else:
        # the phase encoding of a radial scan counts spokes: pixels have the shape of those that the scanner shows
        read = scan.header.pixel_mm(path, (encoded.matrix[0], encoded.matrix[1]), options, notes)[0]
        shown = [recon.pixel_mm(k) for k in (0, 1)]
        phase = read * shown[1] / shown[0] if min(shown) > 0 else read
    if options.pixel_mm is not None:
        phase, read = options.pixel_mm
    thick = scan.header.slice_step_mm(path, options, notes)
    first, last, middle = places[0], places[-1], places[len(places) // 2]
    if not all(p.known for p in places):
        notes.append("the orientation is not recorded")
        spacing = {"s": thick, "p": phase, "r": read}
        return VolumeGrid(shape, (spacing[axes[0]], spacing[axes[1]], spacing[axes[2]]))
    if any(np.abs(p.directions - first.directions).max() > 1e-3 for p in places):
        raise BadInput(path, "has slices that are turned against each other", "read them one by one with slices=")
    step = first.directions[2] * thick
    if len(places) > 1 and options.slice_spacing_mm is None:
        gaps = np.diff([p.position @ first.directions[2] for p in places])
        if np.abs(gaps).max() < _SAME_PLACE_MM:
            notes.append("all slices are recorded at one place; they are taken to touch")
        else:
            if np.ptp(gaps) > _UNEVEN * abs(gaps.mean()):
                notes.append(f"slices are {gaps.min():.3g} to {gaps.max():.3g} mm apart; their mean is taken")
            step = (last.position - first.position) / (len(places) - 1)
            thick = float(np.sqrt((step**2).sum()))
    if scan.sign < 0 and shape[axes.index("s")] > len(places):
        step = -step  # partitions are encoded, slices are not
    steps = {"s": step, "p": scan.sign * first.directions[1] * phase, "r": scan.sign * first.directions[0] * read}
    spacing = {"s": thick, "p": phase, "r": read}
    affine = affine_from_directions(path, shape, [steps[a] for a in axes[::-1]], middle.position)
    return VolumeGrid(shape, (spacing[axes[0]], spacing[axes[1]], spacing[axes[2]]), affine)


# ---- to k-space ----------------------------------------------------------------------------------------------------


def kspace_of(
    path: str | os.PathLike[str],
    scan: Scan,
    rows: NDArray[np.intp],
    places: list[Place],
    lines: NDArray[np.complex64],
    points: NDArray[np.float32] | None,
    covariance: NDArray[np.complex64] | None,
    options: KSpaceOptions,
    notes: list[str],
) -> KSpace:
    """k-space of the chosen acquisitions.

    Args:
        path: the file, for the sentences.
        scan: the sorted file.
        rows: the acquisitions, in file order.
        places: the slices they belong to.
        lines: their samples [acquisition, coil, sample], without what is discarded; overwritten.
        points: their trajectories [acquisition, sample, d]; None for a Cartesian scan.
        covariance: of the noise.
        options: what to read.
        notes: what was noticed so far.

    Raises:
        BadInput: they do not fit each other.
    """
    if points is None:
        return _cartesian(path, scan, rows, places, lines, covariance, options, notes)
    return _noncartesian(path, scan, rows, places, lines, points, covariance, options, notes)


def trimmed(
    path: str | os.PathLike[str], scan: Scan, rows: NDArray[np.intp], lines: NDArray[np.complex64]
) -> NDArray[np.complex64]:
    """Lines [acquisition, coil, sample] without what is to be discarded; those that ran backwards are turned.

    Raises:
        BadInput: nothing is left of them.
    """
    heads = scan.heads[rows]
    back = np.flatnonzero(has_flag(heads["flags"], REVERSE))
    if scan.cartesian and back.size:
        lines[back] = lines[back, :, ::-1].copy()
    pre, post = (same(path, heads[name], name) for name in ("discard_pre", "discard_post"))
    if pre + post >= scan.samples:
        raise BadInput(path, f"discards {pre} + {post} of {scan.samples} samples", "export it again")
    return lines[:, :, pre : scan.samples - post]


def covariance_of(
    scan: Scan, noise: list[NDArray[np.complex64]], dwell_us: tuple[float, float], notes: list[str]
) -> NDArray[np.complex64] | None:
    """Mean of n n^H of an image sample from noise scans [coil, sample]; the receiver's bandwidth is allowed for.

    Args:
        scan: the sorted file.
        noise: noise scans, [coil, sample] each.
        dwell_us: time of a sample of the noise scans and of the image; 0 where not known.
        notes: what was noticed so far.
    """
    total, count = np.zeros((scan.coils, scan.coils), np.complex128), 0
    for part in noise:
        wide = part.astype(np.complex128)
        total += wide @ wide.conj().T
        count += part.shape[1]
    if count < 2 * scan.coils:
        notes.append(f"the noise scans hold {count} samples, too few for {scan.coils} coils, and are not used")
        return None
    covariance = total / count
    if not (covariance.diagonal().real > 0).all():
        notes.append("the noise scans are empty in some coils and are not used")
        return None
    if min(dwell_us) > 0:
        covariance *= dwell_us[0] / (dwell_us[1] * scan.header.noise_bandwidth)
    else:
        notes.append("the noise scans' bandwidth is not recorded; it is taken to be that of the image")
    with np.errstate(all="ignore"):  # what overflows is reported as not finite
        return covariance.astype(np.complex64)


# ---- Cartesian -----------------------------------------------------------------------------------------------------


def _steps(path: str | os.PathLike[str], scan: Scan, rows: NDArray[np.intp], k: int) -> NDArray[np.intp]:
    """Lines of k-space that acquisitions fill along phase (0) or partition (1)."""
    n = scan.header.encoded.matrix[1 + k]
    centre = scan.header.centres.get(f"kspace_encoding_step_{k + 1}", n // 2)
    lines: NDArray[np.intp] = scan.heads["idx"][_STEPS[k]][rows].astype(np.intp)
    if k == 1 and not lines.any():
        return lines
    lines = lines - centre + n // 2
    if lines.min() < 0 or lines.max() >= n:
        raise BadInput(
            path,
            f"encodes lines {lines.min()} to {lines.max()} of {('phase', 'partition')[k]} on a matrix of {n}",
            "its limits, centre and matrix do not agree; export it again",
        )
    return lines


def _cartesian_shape(path: str | os.PathLike[str], scan: Scan, rows: NDArray[np.intp]) -> tuple[int, int, int]:
    nx, ny, nz = scan.header.encoded.matrix
    three = nz > 1 and bool(scan.heads["idx"][_STEPS[1]][rows].any())
    kept = scan.samples - int(scan.heads["discard_pre"][rows[0]]) - int(scan.heads["discard_post"][rows[0]])
    return (nz if three else 1), ny, max(nx, kept)


def _cartesian(
    path: str | os.PathLike[str],
    scan: Scan,
    rows: NDArray[np.intp],
    places: list[Place],
    lines: NDArray[np.complex64],
    covariance: NDArray[np.complex64] | None,
    options: KSpaceOptions,
    notes: list[str],
) -> KSpace:
    heads, samples = scan.heads[rows], lines.shape[2]
    nz, ny, nx = _cartesian_shape(path, scan, rows)
    if nx > scan.header.encoded.matrix[0]:
        notes.append(f"lines have {samples} samples on a matrix of {scan.header.encoded.matrix[0]}, which is widened")
    start = _readout_start(path, heads, samples, nx, notes)
    if nz > 1 and len(places) > 1:
        raise BadInput(path, f"has {len(places)} slabs of {nz} partitions", "read one with slices=(k, k + 1)")
    shape = (max(nz, len(places)), scan.coils, ny, nx)
    check_array(path, "its k-space", shape, 8, 1 << 62, False, DEFAULT_LIMITS, working_itemsize=8)
    data = np.zeros(shape, np.complex64)
    counts = np.zeros((shape[0], ny), np.int64)
    number = {p.index: k for k, p in enumerate(places)}
    order = np.array([number[int(i)] for i in heads["idx"]["slice"]])
    deep = _steps(path, scan, rows, 1) if nz > 1 else order
    phase = _steps(path, scan, rows, 0)
    for k in range(len(rows)):
        data[deep[k], :, phase[k], start : start + samples] += lines[k]
        counts[deep[k], phase[k]] += 1
    del lines
    several = counts[counts > 0]
    if several.max() > 1:
        data /= np.maximum(counts, 1)[:, None, :, None].astype(np.float32)
        if several.min() == several.max():
            notes.append(f"the mean of {several.max()} averages is taken")
            covariance = None if covariance is None else covariance / several.max()
        else:
            notes.append(f"lines were measured {several.min()} to {several.max()} times; their means are taken")
    mask = np.zeros((shape[0], ny, nx), bool)
    mask[..., start : start + samples] = (counts > 0)[:, :, None]
    axes = "spr"
    if nz > 1:
        data, mask, axes = take_apart(path, data, mask, notes)
    data, mask = _without_oversampling(path, scan, data, mask, axes, options, notes)
    grid = _grid(path, scan, places, (data.shape[0], data.shape[2], data.shape[3]), options, notes, axes)
    return assemble_cartesian(path, data, grid, scan.source_format, notes, mask, None, covariance)


def _readout_start(path: str | os.PathLike[str], heads: Heads, samples: int, nx: int, notes: list[str]) -> int:
    """Where on the matrix a line's first sample lies."""
    centre = same(path, heads["center_sample"], "center_sample") - int(heads["discard_pre"][0])
    if samples == nx:
        if centre not in (nx // 2, (nx - 1) // 2, 0):
            notes.append(f"lines are as long as the matrix, so their centre is taken at {nx // 2}, not at {centre}")
        return 0
    start = nx // 2 - centre
    if not 0 <= start <= nx - samples:
        raise BadInput(
            path,
            f"has lines of {samples} samples with centre {centre} on a matrix of {nx}",
            "they do not fit; export again",
        )
    return start


def take_apart(
    path: str | os.PathLike[str], data: NDArray[np.complex64], mask: NDArray[np.bool_], notes: list[str]
) -> tuple[NDArray[np.complex64], NDArray[np.bool_], str]:
    """Three-dimensional k-space as slices: along partitions if all were measured, else along the readout."""
    if (mask == mask[:1]).all():
        notes.append("all partitions were measured: an FFT along them makes slices of them")
        return hybrid(data, 0), mask, "spr"
    if not mask.any(axis=(0, 1)).all():
        raise BadInput(path, "has a partial readout of an undersampled volume", "zero-fill the readout first")
    notes.append("partitions are undersampled: an FFT along the readout makes slices across it")
    turned = np.ascontiguousarray(hybrid(data, 3).transpose(3, 1, 0, 2))  # [read, coil, partition, phase]
    flat = np.ascontiguousarray(np.broadcast_to(mask.any(axis=2), (turned.shape[0], *turned.shape[2:])))
    return turned, flat, "rsp"


def _without_oversampling(
    path: str | os.PathLike[str],
    scan: Scan,
    data: NDArray[np.complex64],
    mask: NDArray[np.bool_],
    axes: str,
    options: KSpaceOptions,
    notes: list[str],
) -> tuple[NDArray[np.complex64], NDArray[np.bool_]]:
    """The readout cut to the field of view that the scanner shows; its middle pixel stays the middle one."""
    n, wide, wanted = scan.header.encoded.matrix[0], scan.header.encoded.fov_mm[0], scan.header.recon.fov_mm[0]
    across = axes[0] == "r"
    if options.crop_readout is False or not 0 < wanted < wide or n != data.shape[0 if across else 3]:
        return data, mask
    size = max(1, min(n, round(n * wanted / wide)))
    if size == n:
        return data, mask
    if across:
        start = n // 2 - size // 2
        data, mask = data[start : start + size], mask[start : start + size]
    elif mask.any(axis=(0, 1)).all():
        data, mask = crop_axis(data, 3, size), mask[..., :size]
    elif options.crop_readout:
        raise BadInput(path, "does not sample its readout whole", "read it without crop_readout")
    else:
        notes.append("the readout is oversampled but not sampled whole, so it is not cut to the image's field of view")
        return data, mask
    notes.append(f"the readout of {n} samples is cut to the {size} pixels of the image's field of view")
    return data, mask


# ---- non-Cartesian -------------------------------------------------------------------------------------------------


def _matrix(scan: Scan, options: KSpaceOptions) -> tuple[int, ...]:
    if options.matrix is not None:
        return options.matrix
    nx, ny, nz = scan.header.recon.matrix
    return (nz, ny, nx) if nz > 1 else (ny, nx)


def _noncartesian(
    path: str | os.PathLike[str],
    scan: Scan,
    rows: NDArray[np.intp],
    places: list[Place],
    lines: NDArray[np.complex64],
    points: NDArray[np.float32],
    covariance: NDArray[np.complex64] | None,
    options: KSpaceOptions,
    notes: list[str],
) -> KSpace:
    heads = scan.heads[rows]
    check_finite(path, "the trajectory", points)
    matrix = _matrix(scan, options)
    if points.shape[2] == 3 and (scan.header.encoded.matrix[2] == 1 or not points[..., 2].any()):
        if points[..., 2].any():
            notes.append("the third coordinate of a scan of slices is taken as density weights and left out")
        points = points[..., :2]
    if points.shape[2] == 3:
        if len(places) > 1:
            raise BadInput(path, f"has {len(places)} slabs", "read one with slices=(k, k + 1)")
        if len(matrix) != 3:
            raise BadInput(path, f"has a three-dimensional trajectory and a matrix {matrix}", "give matrix=(z, y, x)")
        grid = _grid(path, scan, places, (matrix[0], matrix[1], matrix[2]), options, notes)
        data = lines.transpose(1, 0, 2).reshape(scan.coils, -1)
        return assemble_noncartesian(
            path, data, [points], grid, scan.source_format, options, None, notes, noise_covariance=covariance
        )
    order = [np.flatnonzero(heads["idx"]["slice"] == p.index) for p in places]
    counts = [len(o) for o in order]
    if min(counts) != max(counts):
        raise BadInput(path, f"has {min(counts)} to {max(counts)} lines a slice", "read slices one by one with slices=")
    partitions = np.unique(heads["idx"][_STEPS[1]])
    if partitions.size > 1:
        order, lines = _stack(path, scan, rows, partitions, lines, points, notes)
        counts = [len(o) for o in order]
    data = np.stack([lines[o].transpose(1, 0, 2).reshape(scan.coils, -1) for o in order])
    grid = _grid(path, scan, places, (len(order), matrix[-2], matrix[-1]), options, notes)
    return assemble_noncartesian(
        path,
        data,
        [points[o] for o in order],
        grid,
        scan.source_format,
        options,
        None,
        notes,
        noise_covariance=covariance,
    )


def _stack(
    path: str | os.PathLike[str],
    scan: Scan,
    rows: NDArray[np.intp],
    partitions: NDArray[Any],
    lines: NDArray[np.complex64],
    points: NDArray[np.float32],
    notes: list[str],
) -> tuple[list[NDArray[np.intp]], NDArray[np.complex64]]:
    """A stack of stars or spirals as slices: an FFT along partitions that share their trajectory."""
    steps = _steps(path, scan, rows, 1)
    order = [np.flatnonzero(steps == k) for k in np.unique(steps)]
    n = scan.header.encoded.matrix[2]
    alike = len({len(o) for o in order}) == 1 and all(np.array_equal(points[o], points[order[0]]) for o in order)
    if len(partitions) != n or not alike or np.unique(scan.heads["idx"]["slice"][rows]).size > 1:
        raise BadInput(
            path,
            f"is a stack of {n} partitions that are not all measured along the same trajectory",
            "only aligned, complete stacks are read; give three coordinates a sample",
        )
    stacked = hybrid(np.stack([lines[o] for o in order]), 0)
    notes.append("all partitions share a trajectory: an FFT along them makes slices of them")
    for k, o in enumerate(order):
        lines[o] = stacked[k]
    return order, lines


def describe_scan(path: str | os.PathLike[str], scan: Scan, reach: float | None, notes: list[str]) -> dict[str, Any]:
    """What the headers say; `reach` is the largest coordinate of the first line of a trajectory."""
    options = KSpaceOptions()
    out: dict[str, Any] = {
        "acquisitions": f"{len(scan.heads)}, {len(scan.image)} of them for the image",
        "encoded_matrix_xyz": list(scan.header.encoded.matrix),
        "encoded_fov_xyz_mm": list(scan.header.encoded.fov_mm),
        "slices": int(np.unique(scan.heads["idx"]["slice"][scan.image]).size),
        "coils": scan.coils,
        "samples_a_line": scan.samples,
        **{f"{name}s": int(np.unique(scan.heads["idx"][name]).size) for name in (*_CHOICES, "average")},
        "noise scans": f"{len(scan.noise)} acquisitions" if len(scan.noise) else "none",
        "scanner": scan.header.description or "not recorded",
    }
    places = places_of(path, scan, options, notes)
    if scan.cartesian:
        rows, partitions = (_steps(path, scan, scan.image, k) for k in (0, 1))
        nz, ny, nx = _cartesian_shape(path, scan, scan.image)
        mask = np.zeros((ny, nz), bool)
        mask[rows, partitions if nz > 1 else 0] = True
        out["sampling"] = describe_sampling(mask)
    else:
        ny, nx = _matrix(scan, options)[-2:]
        out["sampling"] = {
            "kind": f"{scan.header.trajectory}, {scan.heads['trajectory_dimensions'][scan.image[0]]} coordinates",
            "lines": len(scan.image),
            "largest coordinate of the first line": reach,
        }
    return {**out, **describe_grid(_grid(path, scan, places, (len(places), ny, nx), options, [])), "notes": notes}

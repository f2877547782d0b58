"""What an MR scanner measured, as the operators take it: k-space, where it was sampled, coils, noise, place.

Cartesian k-space is [slice, coil, ky, kx]; index k of an axis of N samples is the frequency k - N // 2, and the image
is the centred orthonormal inverse FFT. Non-Cartesian k-space is [slice, coil, sample], or [coil, sample] of a volume,
with one `Trajectory` for all slices or one a slice.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from recon3d.geometry import VolumeGrid
from recon3d.geometry.mri import Trajectory, Unit
from recon3d.io.guard import BadInput, as_bad_input, check_affine, check_finite, check_spacing

# a side of k-space that reaches less than this share of the other was left out on purpose
_PARTIAL = 0.9
# exact zeros among measured samples up to this share are values, not gaps
_STRAY_ZEROS = 0.01
_MOST_SIZE = 1 << 16
_MOST_COILS = 1024
# beyond it squares leave float32
_LARGEST = 1e18


@dataclass(frozen=True)
class KSpaceOptions:
    """What a file of k-space does not say, or which part of it is wanted.

    Attributes:
        slices: first and last + 1 of the slices to read; None reads all.
        contrast, repetition, phase, set: which of several to read, counted from 0.
        average: which average to read; None takes the mean of all.
        frames: frames of a non-Cartesian series, each as a slice of its own with its own trajectory; None takes all.
        merge_frames: one slice with the samples of all chosen frames.
        crop_readout: whether an oversampled readout is cut to the field of view of the image; None cuts it where
            the readout is sampled whole.
        matrix: image size (y, x) or (z, y, x) where the file does not say.
        pixel_mm: pixel size (y, x) in mm, where the file does not say, or says wrongly.
        slice_spacing_mm: distance of slices in mm.
        trajectory: file of the trajectory that belongs to a non-Cartesian BART file.
        trajectory_unit: "rad" or "cycles" per pixel, or "index"; None goes by the file, else by the range.
        trajectory_order: "xy" if the file's points are (kx, ky[, kz]) as usual, "yx" for ([kz,] ky, kx).
    """

    slices: tuple[int, int] | None = None
    contrast: int = 0
    repetition: int = 0
    phase: int = 0
    set: int = 0
    average: int | None = None
    frames: tuple[int, ...] | None = None
    merge_frames: bool = False
    crop_readout: bool | None = None
    matrix: tuple[int, ...] | None = None
    pixel_mm: tuple[float, float] | None = None
    slice_spacing_mm: float | None = None
    trajectory: str | os.PathLike[str] | None = None
    trajectory_unit: Unit | None = None
    trajectory_order: Literal["xy", "yx"] = "xy"

    def __post_init__(self) -> None:
        if self.slices is not None and (len(self.slices) != 2 or not 0 <= self.slices[0] < self.slices[1]):
            raise ValueError(f"read_kspace: slices must be (first, last + 1) with first <= last, got {self.slices}")
        for name in ("contrast", "repetition", "phase", "set", "average"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 0):
                raise ValueError(f"read_kspace: {name} must be a whole number of at least 0, got {value}")
        if self.frames is not None and (not self.frames or any(k != int(k) or k < 0 for k in self.frames)):
            raise ValueError(f"read_kspace: frames must name at least one frame, counted from 0, got {self.frames}")
        if self.matrix is not None and (len(self.matrix) not in (2, 3) or any(n < 1 for n in self.matrix)):
            raise ValueError(f"read_kspace: matrix must be (y, x) or (z, y, x), each at least 1, got {self.matrix}")
        lengths = [*(self.pixel_mm or ()), *([] if self.slice_spacing_mm is None else [self.slice_spacing_mm])]
        if (self.pixel_mm is not None and len(self.pixel_mm) != 2) or any(not 1e-4 < s < 1e3 for s in lengths):
            raise ValueError("read_kspace: pixel_mm is (y, x) and lengths lie between 1e-4 and 1e3 mm")
        if self.trajectory_unit not in (None, "rad", "cycles", "index"):
            raise ValueError(f"read_kspace: trajectory_unit is rad, cycles or index, got {self.trajectory_unit!r}")
        if self.trajectory_order not in ("xy", "yx"):
            raise ValueError(f"read_kspace: trajectory_order is xy or yx, got {self.trajectory_order!r}")

    @classmethod
    def of(cls, options: dict[str, Any]) -> KSpaceOptions:
        """From keyword arguments.

        Raises:
            TypeError: an option that does not exist, with the list of those that do.
        """
        names = [field.name for field in fields(cls)]
        unknown = sorted(set(options) - set(names))
        if unknown:
            raise TypeError(f"read_kspace: no option {', '.join(unknown)}; there are {', '.join(names)}")
        given: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in options.items()
        }
        return cls(**given)


@dataclass(frozen=True)
class KSpace:
    """Measured k-space and what is known about it.

    Attributes:
        data: complex64; Cartesian [slice, coil, ky, kx], 0 where not sampled; else [slice, coil, sample], or
            [coil, sample] for a trajectory in three dimensions.
        mask: float32 0 or 1, [ky, kx] or [slice, ky, kx]; None for non-Cartesian k-space.
        trajectories: one for all slices or one a slice; None for Cartesian k-space.
        grid: where the volume is to be.
        maps: coil maps as in the file, [slice, coil, y, x] or [coil, z, y, x].
        noise_covariance: [coil, coil] complex64, mean of n n^H over the noise n of a sample.
        source_format: "fastmri", "ismrmrd", "recon3d", "bart" or "twix".
        notes: sentences about what was assumed, left out or looks doubtful; show them to the user.

    Raises:
        ValueError: a value is not finite, or sizes disagree.
    """

    data: Tensor
    mask: Tensor | None
    trajectories: tuple[Trajectory, ...] | None
    grid: VolumeGrid
    maps: Tensor | None = None
    noise_covariance: Tensor | None = None
    source_format: str = ""
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        shape = tuple(self.data.shape)
        if self.data.dtype != torch.complex64 or 0 in shape:
            raise ValueError(f"KSpace: data must be complex64 and not empty, got {self.data.dtype} of {shape}")
        if not bool(torch.view_as_real(self.data).isfinite().all()):
            raise ValueError("KSpace: data hold NaN or infinity; replace or mask them first")
        if (self.mask is None) == (self.trajectories is None):
            raise ValueError("KSpace: give a mask (Cartesian) or trajectories (non-Cartesian), one of the two")
        if self.mask is not None:
            self._check_cartesian(self.mask)
        else:
            self._check_trajectories()
        coils = self.n_coils
        if self.noise_covariance is not None:
            if tuple(self.noise_covariance.shape) != (coils, coils):
                raise ValueError(
                    f"KSpace: noise_covariance must be {coils} x {coils}, got {tuple(self.noise_covariance.shape)}"
                )
            if not bool(torch.view_as_real(self.noise_covariance).isfinite().all()):
                raise ValueError("KSpace: noise_covariance holds NaN or infinity")
        if self.maps is not None:
            z, y, x = self.grid.shape
            want = (coils, z, y, x) if self.is_volume else (z, coils, y, x)
            if tuple(self.maps.shape) != want or not bool(torch.view_as_real(self.maps).isfinite().all()):
                raise ValueError(f"KSpace: maps must be finite and of size {want}, got {tuple(self.maps.shape)}")

    def _check_cartesian(self, mask: Tensor) -> None:
        shape = tuple(self.data.shape)
        if len(shape) != 4 or (shape[0], *shape[2:]) != self.grid.shape:
            raise ValueError(f"KSpace: data must be [slice, coil, ky, kx] on the grid {self.grid.shape}, got {shape}")
        if tuple(mask.shape) not in (shape[2:], (shape[0], *shape[2:])):
            raise ValueError(
                f"KSpace: mask must be [ky, kx] or [slice, ky, kx] of k-space {shape}, got {tuple(mask.shape)}"
            )
        if not bool(((mask == 0) | (mask == 1)).all()):
            raise ValueError("KSpace: a mask holds 0 and 1 alone")

    def _check_trajectories(self) -> None:
        assert self.trajectories is not None  # the caller looked
        shape = tuple(self.data.shape)
        if not self.trajectories:
            raise ValueError("KSpace: at least one trajectory is needed")
        volume = self.trajectories[0].ndim == 3
        want = self.grid.shape if volume else self.grid.slice_shape
        if len(shape) != (2 if volume else 3):
            raise ValueError(f"KSpace: data must be {'[coil' if volume else '[slice, coil'}, sample], got {shape}")
        if not volume and shape[0] != self.grid.shape[0]:
            raise ValueError(f"KSpace: {shape[0]} slices of data for a grid {self.grid.shape}")
        if len(self.trajectories) not in ((1,) if volume else (1, shape[0])):
            raise ValueError(
                f"KSpace: one trajectory, or one for each of {shape[0]} slices, got {len(self.trajectories)}"
            )
        for t in self.trajectories:
            if tuple(t.shape) != tuple(want) or t.n_samples != shape[-1]:
                raise ValueError(
                    f"KSpace: a trajectory of {t.n_samples} samples for images {tuple(t.shape)} does not fit data of "
                    f"{shape[-1]} samples for images {tuple(want)}"
                )

    @property
    def n_coils(self) -> int:
        """Receive coils."""
        return self.data.shape[-2] if self.mask is None else self.data.shape[1]

    @property
    def is_volume(self) -> bool:
        """Whether the trajectory runs in three dimensions, so that slices are coupled by the measurement."""
        return self.trajectories is not None and self.trajectories[0].ndim == 3

    def slab(self, start: int, stop: int) -> KSpace:
        """The same measurement of slices start..stop-1 alone.

        Raises:
            ValueError: an empty range, one outside the volume, or a trajectory in three dimensions.
        """
        if self.is_volume:
            raise ValueError("KSpace.slab: slices of a three-dimensional trajectory cannot be taken apart")
        grid = self.grid.slab(start, stop)
        own = self.trajectories is not None and len(self.trajectories) > 1
        return replace(
            self,
            data=self.data[start:stop],
            mask=self.mask[start:stop] if self.mask is not None and self.mask.ndim == 3 else self.mask,
            trajectories=self.trajectories[start:stop] if own and self.trajectories else self.trajectories,
            grid=grid,
            maps=None if self.maps is None else self.maps[start:stop],
        )

    def describe(self) -> dict[str, Any]:
        """Matrix, coils, slices, sampling, noise and orientation, ready for JSON or a table."""
        out: dict[str, Any] = {
            "matrix_yx": list(self.grid.slice_shape),
            "slices": self.grid.shape[0],
            "coils": self.n_coils,
            **describe_grid(self.grid),
        }
        if self.mask is not None:
            out["sampling"] = describe_sampling(self.mask.numpy())
        elif self.trajectories is not None:
            out["sampling"] = describe_trajectories(self.trajectories)
        out["noise scans"] = "none" if self.noise_covariance is None else "covariance known"
        return out


# ---- what readers share --------------------------------------------------------------------------------------------


def assemble_cartesian(
    path: str | os.PathLike[str],
    data: NDArray[Any],
    grid: VolumeGrid,
    source_format: str,
    notes: Sequence[str] = (),
    mask: NDArray[Any] | None = None,
    maps: NDArray[Any] | None = None,
    noise_covariance: NDArray[Any] | None = None,
) -> KSpace:
    """Checked Cartesian k-space; without a mask the samples that are zero in every coil were not measured.

    Args:
        path: the file, for the sentences.
        data: [slice, coil, ky, kx] complex64.
        grid: its grid.
        source_format: as in KSpace.
        notes: what was noticed so far.
        mask: where it was sampled, broadcastable to [slice, ky, kx].
        maps: coil maps.
        noise_covariance: [coil, coil].

    Raises:
        BadInput: something is not finite, or sizes disagree.
    """
    notes = list(notes)
    data = check_kspace(path, data)
    found = sampled_points(data)
    if mask is not None:
        given = check_mask(path, mask, data.shape)
        outside = found & ~given
        if outside.any():
            notes.append(f"{_share(outside, found)} of the samples lie outside the file's mask and are left out")
            data = np.where(given[:, None], data, np.complex64(0))
        # a mask from a table may claim lines that the scanner filled up with zeros
        found = given & found.any(axis=(0, 1), keepdims=True) & found.any(axis=(0, 2), keepdims=True)
        if not found.any():
            raise BadInput(path, "has a mask that samples nothing but empty lines", "export it again")
        if (given & ~found).any():
            notes.append(f"{_share(given & ~found, given)} of the mask fall on empty lines and count as not measured")
    sampled = found[0] if (found == found[:1]).all() else found
    notes += partial_fourier_notes(sampled)
    with as_bad_input(path, "its parts do not fit each other", (ValueError, TypeError), "export it again"):
        return KSpace(
            torch.from_numpy(np.ascontiguousarray(data)),
            torch.from_numpy(np.ascontiguousarray(sampled, dtype=np.float32)),
            None,
            grid,
            _complex(path, "maps", maps),
            _complex(path, "noise_covariance", noise_covariance),
            source_format,
            tuple(notes),
        )


def assemble_noncartesian(
    path: str | os.PathLike[str],
    data: NDArray[Any],
    points: Sequence[NDArray[Any]],
    grid: VolumeGrid,
    source_format: str,
    options: KSpaceOptions,
    unit: Unit | None = None,
    notes: Sequence[str] = (),
    maps: NDArray[Any] | None = None,
    noise_covariance: NDArray[Any] | None = None,
    order: Literal["xy", "yx"] | None = None,
) -> KSpace:
    """Checked non-Cartesian k-space.

    Args:
        path: the file, for the sentences.
        data: [slice, coil, sample] or [coil, sample] complex64.
        points: one array [..., d] for all slices, or one a slice, in the file's order and unit.
        grid: its grid.
        source_format: as in KSpace.
        options: unit and order, where they are given.
        unit: the unit the file states; None goes by the range.
        notes: what was noticed so far.
        maps: coil maps.
        noise_covariance: [coil, coil].
        order: order of the coordinates when the file states it; None goes by the options.

    Raises:
        BadInput: something is not finite, lies outside k-space, or sizes disagree.
    """
    notes = list(notes)
    data = check_kspace(path, data, noncartesian=True)
    for p in points:
        if p.ndim < 2 or p.shape[-1] not in (2, 3) or p.dtype.kind not in "iuf" or 0 in p.shape:
            raise BadInput(path, f"has trajectory points of size {p.shape}", "2 or 3 real coordinates are read")
        check_finite(path, "the trajectory", p)
    shape = grid.slice_shape if points[0].shape[-1] == 2 else grid.shape
    largest = max(float(np.abs(p).max()) for p in points)
    chosen = options.trajectory_unit or unit
    if chosen is None:
        chosen = _unit_by_range(largest)
        notes.append(
            f"the trajectory's unit is not stated; its largest coordinate {largest:.4g} is taken as "
            + {"cycles": "cycles per pixel", "rad": "radians per pixel", "index": "index of the image's FFT"}[chosen]
            + " (trajectory_unit says otherwise)"
        )
    if (order or options.trajectory_order) == "xy":
        points = [p[..., ::-1] for p in points]
    trajectories = []
    with (
        as_bad_input(path, "its trajectory is not usable", (ValueError, TypeError), "check unit and matrix"),
        warnings.catch_warnings(record=True) as doubts,
    ):
        warnings.simplefilter("always")
        for p in points:
            trajectories.append(Trajectory(np.asarray(p, dtype=np.float64), shape, unit=chosen))
    notes += dict.fromkeys(str(doubt.message) for doubt in doubts)
    if len(trajectories) > 1 and all(t == trajectories[0] for t in trajectories[1:]):
        trajectories = trajectories[:1]
    with as_bad_input(path, "its parts do not fit each other", (ValueError, TypeError), "export it again"):
        return KSpace(
            torch.from_numpy(np.ascontiguousarray(data)),
            None,
            tuple(trajectories),
            grid,
            _complex(path, "maps", maps),
            _complex(path, "noise_covariance", noise_covariance),
            source_format,
            tuple(notes),
        )


def check_kspace(path: str | os.PathLike[str], data: NDArray[Any], noncartesian: bool = False) -> NDArray[np.complex64]:
    """k-space as finite complex64 with believable sizes, not all of it zero.

    Raises:
        BadInput: it is not.
    """
    if data.dtype.kind != "c":
        raise BadInput(path, f"has k-space of type {data.dtype}", "complex numbers are read")
    if 0 in data.shape:
        raise BadInput(path, f"has k-space of size {data.shape}", "every size must be positive")
    sizes = data.shape[:-1] if noncartesian else data.shape
    coils = data.shape[-2] if noncartesian else data.shape[1]
    if max(sizes) > _MOST_SIZE or coils > _MOST_COILS:
        raise BadInput(
            path, f"has k-space of size {data.shape}", f"at most {_MOST_COILS} coils and {_MOST_SIZE} lines are read"
        )
    with np.errstate(all="ignore"):  # what overflows is reported as not finite
        data = data.astype(np.complex64, copy=False)
    check_finite(path, "k-space", data)
    largest = max(float(np.abs(part.view(np.float32)).max()) for part in np.ascontiguousarray(data))
    if largest > _LARGEST:
        raise BadInput(path, f"has k-space up to {largest:.3g}", f"at most {_LARGEST:g} is read; scale it")
    if largest == 0:
        raise BadInput(path, "has k-space that is zero everywhere", "export it again")
    return data


def check_mask(path: str | os.PathLike[str], mask: NDArray[Any], shape: Sequence[int]) -> NDArray[np.bool_]:
    """A mask of 0 and 1, broadcast to [slice, ky, kx] of k-space [slice, coil, ky, kx]; a row of kx is allowed.

    Raises:
        BadInput: it is something else, or nothing is sampled.
    """
    full = (shape[0], shape[2], shape[3])
    if mask.dtype.kind not in "biuf" or mask.ndim not in (1, 2, 3) or not np.isin(mask, (0, 1)).all():
        raise BadInput(path, f"has a mask of type {mask.dtype} and size {mask.shape}", "0 and 1 along kx are read")
    try:
        given = np.array(np.broadcast_to(mask, full)) != 0
    except ValueError:
        raise BadInput(
            path, f"has a mask of size {mask.shape} for k-space of {tuple(shape)}", "they must agree"
        ) from None
    if not given.any():
        raise BadInput(path, "has a mask that samples nothing", "export it again")
    return given


def sampled_points(data: NDArray[np.complex64]) -> NDArray[np.bool_]:
    """Where any coil of [slice, coil, ky, kx] has a value, whole lines completed: [slice, ky, kx]."""
    found = np.zeros((data.shape[0], *data.shape[2:]), dtype=bool)
    for k in range(data.shape[1]):
        found |= data[:, k] != 0
    lines = found.any(axis=1, keepdims=True) & found.any(axis=2, keepdims=True)
    stray = (lines & ~found).sum(axis=(1, 2)) / np.maximum(lines.sum(axis=(1, 2)), 1)
    return np.where((stray <= _STRAY_ZEROS)[:, None, None], lines, found)


def crop_axis(data: NDArray[np.complex64], axis: int, size: int) -> NDArray[np.complex64]:
    """Fully sampled k-space whose image is cut to its middle `size` pixels along an axis; noise stays as it is.

    Args:
        data: [slice, ...]; a slice is worked on at a time.
        axis: which axis, not the first.
        size: pixels to keep, at most what there is.
    """
    n = data.shape[axis]
    start = n // 2 - size // 2
    out = np.empty((*data.shape[:axis], size, *data.shape[axis + 1 :]), np.complex64)
    for source, target in zip(data, out, strict=True):
        image = _ifft(source, axis - 1)
        target[...] = _fft(np.take(image, range(start, start + size), axis=axis - 1), axis - 1)
    return out


def hybrid(data: NDArray[np.complex64], axis: int) -> NDArray[np.complex64]:
    """The centred orthonormal inverse FFT along one fully sampled axis, in place, part by part of the first axis."""
    for part in np.moveaxis(data, axis, -1):
        part[...] = _ifft(part, -1)
    return data


def _ifft(values: NDArray[np.complex64], axis: int) -> NDArray[np.complex64]:
    with np.errstate(all="ignore"):  # what overflows is reported as not finite
        inner = np.fft.ifft(np.fft.ifftshift(values, axes=axis), axis=axis, norm="ortho")
        return np.fft.fftshift(inner, axes=axis).astype(np.complex64, copy=False)


def _fft(values: NDArray[np.complex64], axis: int) -> NDArray[np.complex64]:
    with np.errstate(all="ignore"):
        inner = np.fft.fft(np.fft.ifftshift(values, axes=axis), axis=axis, norm="ortho")
        return np.fft.fftshift(inner, axes=axis).astype(np.complex64, copy=False)


def affine_from_directions(
    path: str | os.PathLike[str],
    shape: tuple[int, int, int],
    steps: ArrayLike,
    centre_lps: ArrayLike,
) -> tuple[tuple[float, ...], ...]:
    """The affine (voxel x, y, z to RAS mm) of a grid whose voxel N // 2 along each axis lies at `centre_lps`.

    Args:
        path: the file, for the sentence.
        shape: voxels along z, y, x.
        steps: [3, 3], rows are the steps in mm from one voxel to the next along x, y and z, in LPS coordinates.
        centre_lps: where voxel (N // 2, N // 2, N // 2) lies, LPS mm.

    Raises:
        BadInput: the axes are not finite or lie in one plane.
    """
    to_ras = np.array([-1.0, -1.0, 1.0])
    columns = np.asarray(steps, np.float64).T * to_ras[:, None]
    middle = np.array([shape[2] // 2, shape[1] // 2, shape[0] // 2], np.float64)
    matrix = np.eye(4)
    matrix[:3, :3] = columns
    matrix[:3, 3] = np.asarray(centre_lps, np.float64) * to_ras - columns @ middle
    checked = check_affine(path, matrix)
    return tuple(tuple(float(v) for v in row) for row in checked)


def spacing_or_nominal(
    path: str | os.PathLike[str], name: str, value: float | None, notes: list[str], default: float = 1.0
) -> float:
    """A checked length in mm; one that is missing or 0 becomes the default, which is noted."""
    if value is None or value == 0:
        notes.append(f"{name} is not recorded; {default:g} mm is assumed")
        return default
    return check_spacing(path, name, float(value))


def slices_of(path: str | os.PathLike[str], options: KSpaceOptions, n: int) -> tuple[int, int]:
    """First and last + 1 of the slices asked for.

    Raises:
        BadInput: the file has fewer.
    """
    if options.slices is None:
        return 0, n
    if options.slices[1] > n:
        raise BadInput(path, f"has {n} slices, {options.slices} were asked for", "ask for slices it has")
    return options.slices


# ---- describing ----------------------------------------------------------------------------------------------------


def describe_grid(grid: VolumeGrid) -> dict[str, Any]:
    """Field of view, pixel and orientation of a grid."""
    y, x = grid.slice_shape
    dz, dy, dx = grid.spacing_mm
    out: dict[str, Any] = {"fov_yx_mm": [y * dy, x * dx], "pixel_yx_mm": [dy, dx], "slice_spacing_mm": dz}
    if grid.affine is None:
        return {**out, "orientation": "not recorded"}
    return {**out, "orientation": f"x to {_axis_name(grid, 0)}, y to {_axis_name(grid, 1)}, z to {_axis_name(grid, 2)}"}


def _axis_name(grid: VolumeGrid, axis: int) -> str:
    column = grid.matrix()[:3, axis]
    column = column / np.sqrt((column**2).sum())
    k = int(np.abs(column).argmax())
    name = (("R", "L"), ("A", "P"), ("S", "I"))[k][int(column[k] < 0)]
    tilt = math.degrees(math.acos(min(1.0, abs(float(column[k])))))
    return name if tilt < 0.5 else f"{name} ({tilt:.0f} degrees oblique)"


def describe_sampling(mask: NDArray[Any]) -> dict[str, Any]:
    """Acceleration, kind of mask and calibration region of a mask [ky, kx] or [slice, ky, kx]."""
    mask = np.asarray(mask) != 0
    every = mask[None] if mask.ndim == 2 else mask
    middle = every[every.shape[0] // 2]
    share = float(every.mean())
    out: dict[str, Any] = {"acceleration": round(1 / share, 3) if share else None}
    if every.all():
        return {**out, "kind": "fully sampled", "calibration": "all"}
    columns, rows = middle.any(axis=0), middle.any(axis=1)
    if (middle == columns[None, :] & rows[:, None]).all():
        kinds = []
        for name, line in (("kx", columns), ("ky", rows)):
            if not line.all():
                kinds.append(f"{_line_kind(line)} along {name} ({int(line.sum())} of {line.size})")
        out["kind"] = "Cartesian, " + " and ".join(kinds) if kinds else "Cartesian, slices missing"
        runs = [
            f"{_centre_run(line)} lines of {line.size}" for _, line in (("kx", columns), ("ky", rows)) if not line.all()
        ]
        out["calibration"] = " x ".join(runs)
    else:
        out["kind"] = "Cartesian, points in ky and kx"
        out["calibration"] = "{} x {}".format(*_centre_block(middle))
    if mask.ndim == 3 and not (mask == mask[:1]).all():
        out["kind"] += ", another one a slice"
    return out


def describe_trajectories(trajectories: Sequence[Trajectory]) -> dict[str, Any]:
    """Samples, range and number of trajectories."""
    reach = max(float(t.points.abs().max()) for t in trajectories)
    return {
        "kind": f"non-Cartesian, {trajectories[0].ndim} dimensions",
        "samples": trajectories[0].n_samples,
        "trajectories": len(trajectories),
        "largest_rad_per_pixel": round(reach, 5),
        "share_of_k_space": round(reach / math.pi, 4),
    }


def partial_fourier_notes(mask: NDArray[Any]) -> list[str]:
    """Sentences on a side of k-space that was not measured, or on both where the scanner filled up with zeros."""
    mask = np.asarray(mask) != 0
    every = mask[None] if mask.ndim == 2 else mask
    notes = []
    for name, line in (("ky", every.any(axis=(0, 2))), ("kx", every.any(axis=(0, 1)))):
        places = np.flatnonzero(line)
        if places.size < 2:
            continue
        n = line.size
        below, above = n // 2 - int(places[0]), int(places[-1]) - n // 2
        full = (n // 2, n - 1 - n // 2)
        gap = max(int(np.diff(places).max()), 2)
        if min(below, above) < _PARTIAL * max(below, above) - gap:
            side, reach = ("below", below) if below < above else ("above", above)
            notes.append(
                f"partial Fourier: {name} reaches {max(reach, 0)} lines {side} the centre and {max(below, above)} on "
                "the other side; the missing side is not measured, nothing is copied into it, and the prior fills it in"
            )
        elif full[0] - below >= gap and full[1] - above >= gap and max(below, above) < _PARTIAL * (n // 2):
            notes.append(
                f"the outer lines of {name} are empty ({places[0]} and {n - 1 - places[-1]} of {n}): the scanner "
                "filled up with zeros; they count as not measured"
            )
    return notes


def _line_kind(line: NDArray[np.bool_]) -> str:
    places = np.flatnonzero(line)
    steps = np.diff(places)
    outside = steps[steps > 1]
    if outside.size == 0:
        return "one block of lines"
    return "equispaced lines" if (outside == outside[0]).mean() > 0.9 else "irregular lines"


def _centre_run(line: NDArray[np.bool_]) -> int:
    n = line.size // 2
    if not line[n]:
        return 0
    gaps = np.flatnonzero(~line)
    below, above = gaps[gaps < n], gaps[gaps > n]
    return int((above[0] if above.size else line.size) - (below[-1] if below.size else -1) - 1)


def _centre_block(mask: NDArray[np.bool_]) -> tuple[int, int]:
    ny, nx = mask.shape
    half = 0
    while half < min(ny, nx) // 2:
        part = mask[ny // 2 - half - 1 : ny // 2 + half + 1, nx // 2 - half - 1 : nx // 2 + half + 1]
        if part.mean() < 0.999:
            break
        half += 1
    return 2 * half, 2 * half


def _share(part: NDArray[np.bool_], whole: NDArray[np.bool_]) -> str:
    return f"{100 * float(part.sum()) / float(whole.sum()):.0f} %"


def _unit_by_range(largest: float) -> Unit:
    # a little beyond the edge is rounding; between the ranges the smaller unit that holds it
    if largest <= 0.5 * 1.01:
        return "cycles"
    return "rad" if largest <= math.pi * 1.01 else "index"


def _complex(path: str | os.PathLike[str], name: str, values: NDArray[Any] | None) -> Tensor | None:
    if values is None:
        return None
    if values.dtype.kind not in "iufc":
        raise BadInput(path, f"has {name} of type {values.dtype}", "complex numbers are read")
    with np.errstate(all="ignore"):
        out = values.astype(np.complex64, copy=False)
    check_finite(path, name, out)
    return torch.from_numpy(np.ascontiguousarray(out))

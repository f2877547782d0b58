"""What a scanner measured, as the loop takes it: line integrals, geometry, noise, and what was noticed on the way."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from recon3d.geometry import FanBeam, ParallelBeam, VolumeGrid
from recon3d.io.guard import BadInput, as_bad_input, check_finite, check_spacing

# signal in the outermost cells, as a share of the scan's strongest rays, above which the object is cut off
_EDGE_SIGNAL = 0.05
_EDGE_CELLS = 3


@dataclass(frozen=True)
class ReadOptions:
    """What a file does not say, or says wrongly; an option that is given wins over the file.

    Attributes:
        type: "parallel" or "fan".
        angles_rad: view angles.
        angles_deg: the same in degrees; not both.
        angle_sign: +1 or -1, the sense of rotation: the angles are multiplied by it.
        detector_spacing_mm: distance of detector cells.
        detector_offset_mm: detector coordinate of the row's middle; not together with rotation_centre.
        rotation_centre: detector cell of the rotation axis, counted from 0; "estimate" finds it from the data.
        source_to_axis_mm: fan beam only.
        source_to_detector_mm: fan beam only.
        photons: mean count of an unattenuated ray.
        rows: first and last + 1 of the slices to read; None reads all.
        unit: "line integrals" or "transmission" (I / I0, of which the negative logarithm is taken).
        smallest_transmission: transmissions below are raised to it before the logarithm.
    """

    type: Literal["parallel", "fan"] | None = None
    angles_rad: tuple[float, ...] | None = None
    angles_deg: tuple[float, ...] | None = None
    angle_sign: int | None = None
    detector_spacing_mm: float | None = None
    detector_offset_mm: float | None = None
    rotation_centre: float | Literal["estimate"] | None = None
    source_to_axis_mm: float | None = None
    source_to_detector_mm: float | None = None
    photons: float | None = None
    rows: tuple[int, int] | None = None
    unit: Literal["line integrals", "transmission"] | None = None
    smallest_transmission: float = 1e-4

    def __post_init__(self) -> None:
        if self.angles_rad is not None and self.angles_deg is not None:
            raise ValueError("read_measurement: give angles_rad or angles_deg, not both")
        if self.detector_offset_mm is not None and self.rotation_centre is not None:
            raise ValueError("read_measurement: give detector_offset_mm or rotation_centre, not both")
        if self.angle_sign not in (None, 1, -1):
            raise ValueError(f"read_measurement: angle_sign must be 1 or -1, got {self.angle_sign}")
        if not 0 < self.smallest_transmission < 1:
            raise ValueError(
                f"read_measurement: smallest_transmission must lie between 0 and 1, got {self.smallest_transmission}"
            )
        if self.rows is not None and not 0 <= self.rows[0] < self.rows[1]:
            raise ValueError(f"read_measurement: rows must be (first, last + 1) with first < last + 1, got {self.rows}")

    @classmethod
    def of(cls, options: dict[str, Any]) -> ReadOptions:
        """From keyword arguments.

        Raises:
            TypeError: an option that does not exist, with the list of those that do.
        """
        names = [field.name for field in fields(cls)]
        unknown = sorted(set(options) - set(names))
        if unknown:
            raise TypeError(f"read_measurement: no option {', '.join(unknown)}; there are {', '.join(names)}")
        given: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in options.items()
        }
        return cls(**given)


@dataclass(frozen=True)
class Measurement:
    """A measured sinogram and what is known about it.

    Attributes:
        sinogram: [slice, view, u] float32, line integrals (no unit: 1/mm times mm).
        geometry: how it was measured.
        grid: where the volume is to be, if the file says; see default_grid.
        photons: mean count of an unattenuated ray, if known.
        source_format: "data exchange", "recon3d", "sinogram" or "npz".
        weights: [slice, view, u] float32, one over the variance of each ray, if the file holds them.
        notes: sentences about what was assumed, repaired or looks doubtful; show them to the user.
    """

    sinogram: Tensor
    geometry: ParallelBeam | FanBeam
    grid: VolumeGrid | None
    photons: float | None
    source_format: str
    weights: Tensor | None = None
    notes: tuple[str, ...] = ()

    def views(self, chosen: Any) -> Measurement:
        """The same measurement with the chosen views only: a slice or a list of indices.

        Raises:
            ValueError: the choice is empty or names a view that does not exist.
        """
        geometry = self.geometry.subset(chosen)
        index = torch.arange(self.geometry.n_views)[chosen if isinstance(chosen, slice) else torch.as_tensor(chosen)]
        return replace(
            self,
            sinogram=self.sinogram.index_select(1, index),
            weights=None if self.weights is None else self.weights.index_select(1, index),
            geometry=geometry,
        )

    def default_grid(self, pixel_mm: float | None = None, slice_spacing_mm: float | None = None) -> VolumeGrid:
        """The file's grid, else the square that the field of view circumscribes, at the detector's resolution.

        Args:
            pixel_mm: in-plane pixel; None takes the detector spacing at the rotation axis.
            slice_spacing_mm: slice distance; None takes the pixel.
        """
        if self.grid is not None and pixel_mm is None and slice_spacing_mm is None:
            return self.grid
        pixel = pixel_mm or self.geometry.detector_spacing_mm / self.geometry.magnification
        low, high = self.geometry.reach_mm()
        n = max(1, math.floor(2 * max(min(-low, high), (high - low) / 4) / pixel + 1e-6))
        return VolumeGrid((self.sinogram.shape[0], n, n), (slice_spacing_mm or pixel, pixel, pixel))


def assemble(
    path: str | os.PathLike[str], found: dict[str, Any], options: ReadOptions, source_format: str
) -> Measurement:
    """A checked measurement from what a file holds, by name, and the options, which win.

    Raises:
        BadInput: something is missing, contradicts itself or is not finite.
    """
    notes = list(found.get("notes", ()))
    sinogram = _three_axes(path, "sinogram", found["sinogram"])
    check_finite(path, "sinogram", sinogram)
    angles = _angles(path, found, options, notes)
    sinogram, angles, keep = _match(path, sinogram, angles, notes)
    n = sinogram.shape[2]
    pitch = _number(path, "detector_spacing_mm", found, options)
    if pitch is None:
        raise BadInput(path, "does not say its detector spacing", "give detector_spacing_mm")
    check_spacing(path, "detector_spacing_mm", pitch)
    offset = _offset(path, found, options, sinogram, angles, pitch, notes)
    kind = options.type or found.get("type") or "parallel"
    if kind not in ("parallel", "fan"):
        raise BadInput(path, f"has geometry type {str(kind)[:40]!r}", "parallel or fan is read")
    geometry: ParallelBeam | FanBeam
    with as_bad_input(path, "its geometry is not usable", (ValueError, TypeError), "check units and geometry options"):
        if kind == "fan":
            distances = {}
            for name in ("source_to_axis_mm", "source_to_detector_mm"):
                value = _number(path, name, found, options)
                if value is None:
                    raise BadInput(path, f"is a fan-beam scan without {name}", f"give {name}")
                distances[name] = value
            geometry = FanBeam(tuple(angles.tolist()), n, pitch, detector_offset_mm=offset, **distances)
        else:
            geometry = ParallelBeam(tuple(angles.tolist()), n, pitch, offset)
    weights = None
    if found.get("weights") is not None:
        weights = _three_axes(path, "weights", found["weights"])[:, keep]
        check_finite(path, "weights", weights)
        if weights.shape != sinogram.shape or (weights < 0).any():
            raise BadInput(
                path,
                f"has weights {weights.shape} for a sinogram {sinogram.shape}",
                "one weight >= 0 a ray is expected",
            )
    photons = _number(path, "photons", found, options)
    if photons is not None and not photons > 0:
        raise BadInput(path, f"says photons = {photons:g}", "a positive count is expected")
    grid = _grid(path, found)
    if grid is not None and grid.shape[0] != sinogram.shape[0]:
        if options.rows is None:
            raise BadInput(
                path, f"has a grid of {grid.shape[0]} slices for {sinogram.shape[0]} sinograms", "they must agree"
            )
        grid = grid.slab(*options.rows)
    notes += truncation_notes(sinogram)
    if grid is not None:
        with as_bad_input(path, "its grid does not fit its geometry", (ValueError,), "check the units"):
            notes += geometry.check(grid)
    return Measurement(
        torch.from_numpy(np.ascontiguousarray(sinogram)),
        geometry,
        grid,
        photons,
        source_format,
        None if weights is None else torch.from_numpy(np.ascontiguousarray(weights)),
        tuple(notes),
    )


def truncation_notes(sinogram: NDArray[np.floating]) -> list[str]:
    """A sentence when rays at the edges of the detector still pass through much of the object."""
    strong = float(np.quantile(np.abs(sinogram).max(axis=2), 0.5))
    if strong <= 0:
        return []
    edges = {
        "first": float(np.abs(sinogram[..., :_EDGE_CELLS].mean(axis=2)).mean()) / strong,
        "last": float(np.abs(sinogram[..., -_EDGE_CELLS:].mean(axis=2)).mean()) / strong,
    }
    cut = [name for name, share in edges.items() if share > _EDGE_SIGNAL]
    if not cut:
        return []
    worst = max(edges.values())
    return [
        f"truncation: the {' and '.join(cut)} detector cells see {100 * worst:.0f} % of the strongest signal, so the "
        "object reaches beyond the detector and its rim will be bright; use a wider detector or read the rim with care"
    ]


def _three_axes(path: str | os.PathLike[str], name: str, values: NDArray[Any]) -> NDArray[np.float32]:
    if values.dtype.kind not in "iuf":
        raise BadInput(path, f"{name} holds values of type {values.dtype}", "real numbers are read")
    if values.ndim == 2:
        values = values[None]
    if values.ndim != 3 or 0 in values.shape:
        raise BadInput(path, f"{name} has size {values.shape}", "[slice, view, u] or [view, u] is read, none empty")
    with np.errstate(all="ignore"):  # what overflows is reported as not finite
        return values.astype(np.float32, copy=False)


def _angles(
    path: str | os.PathLike[str], found: dict[str, Any], options: ReadOptions, notes: list[str]
) -> NDArray[np.float64]:
    if options.angles_rad is not None or options.angles_deg is not None:
        source: dict[str, Any] = {"angles_rad": options.angles_rad, "angles_deg": options.angles_deg}
    else:
        source = found
    in_degrees = source.get("angles_rad") is None
    values = source.get("angles_deg") if in_degrees else source.get("angles_rad")
    if values is None:
        raise BadInput(path, "does not say its view angles", "give angles_deg or angles_rad")
    angles = np.asarray(values)
    if angles.dtype.kind not in "iuf" or angles.ndim > 1:
        raise BadInput(path, f"has angles of type {angles.dtype} and size {angles.shape}", "one number a view is read")
    angles = np.atleast_1d(angles).astype(np.float64)
    if angles.size == 0:
        raise BadInput(path, "has zero views", "at least one view is needed")
    check_finite(path, "the view angles", angles)
    if in_degrees:
        # half a turn or a whole one, in radians by all appearance; an option is believed
        if source is found and angles.size > 8 and 3 < np.ptp(angles) <= 2 * math.pi * 1.01:
            span = f"{angles.size} views over {np.ptp(angles):.4g} degrees"
            raise BadInput(path, f"has {span}, which looks like radians", "give angles_rad, or angles_deg to confirm")
        angles = np.deg2rad(angles)
    sign = options.angle_sign or found.get("angle_sign") or 1
    if sign == -1 and options.angle_sign is None:
        notes.append("the source turns against the angles of this file's format: their sign is changed")
    return angles * sign


def _match(
    path: str | os.PathLike[str], sinogram: NDArray[np.float32], angles: NDArray[np.float64], notes: list[str]
) -> tuple[NDArray[np.float32], NDArray[np.float64], slice]:
    n_views = sinogram.shape[1]
    if angles.size != n_views:
        hint = "check which axis is the view axis" if angles.size in sinogram.shape else "check the angles"
        raise BadInput(path, f"has {angles.size} angles for a sinogram of {n_views} views, size {sinogram.shape}", hint)
    keep = slice(None)
    step = abs(angles[1] - angles[0]) if n_views > 2 else 0.0
    if n_views > 2 and abs(abs(angles[-1] - angles[0]) - 2 * math.pi) < 1e-3 * step:
        keep = slice(0, -1)
        notes.append("the last view repeats the first after a full turn and is left out")
    return sinogram[:, keep], angles[keep], keep


def _offset(
    path: str | os.PathLike[str],
    found: dict[str, Any],
    options: ReadOptions,
    sinogram: NDArray[np.float32],
    angles: NDArray[np.float64],
    pitch: float,
    notes: list[str],
) -> float:
    middle = (sinogram.shape[2] - 1) / 2
    centre = options.rotation_centre
    if centre is None and options.detector_offset_mm is not None:
        return float(options.detector_offset_mm)
    if centre is None:
        offset = _number(path, "detector_offset_mm", found, options)
        if offset is not None:
            return offset
        centre = found.get("rotation_centre")
    if centre is None:
        return 0.0
    if centre == "estimate":
        from recon3d.io.centre import estimate_rotation_centre

        with as_bad_input(path, "its rotation centre cannot be estimated", (ValueError,), "give rotation_centre"):
            centre = estimate_rotation_centre(sinogram, angles)
        notes.append(f"rotation centre estimated at detector cell {centre:.2f} (the middle is {middle:.1f})")
    centre = float(centre)
    if not 0 <= centre <= 2 * middle:
        raise BadInput(path, f"has its rotation centre at cell {centre:g}", f"0 to {2 * middle:g} is expected")
    return (middle - centre) * pitch


def _number(path: str | os.PathLike[str], name: str, found: dict[str, Any], options: ReadOptions) -> float | None:
    value = getattr(options, name, None)
    value = found.get(name) if value is None else value
    if value is None:
        return None
    array = np.asarray(value)
    if array.dtype.kind not in "iuf" or array.size != 1 or not np.isfinite(array).all():
        raise BadInput(path, f"says {name} = {str(value)[:60]}", "one finite number is expected")
    return float(array.reshape(()))


def _grid(path: str | os.PathLike[str], found: dict[str, Any]) -> VolumeGrid | None:
    shape, spacing, affine = (found.get(f"grid_{name}") for name in ("shape", "spacing_mm", "affine"))
    if shape is None and spacing is None:
        return None
    if shape is None or spacing is None:
        raise BadInput(path, "has half a grid", "shape and spacing_mm are both needed")
    with as_bad_input(path, "its grid is not usable", (ValueError, TypeError, OverflowError)):
        sizes, steps = np.atleast_1d(shape).tolist(), np.atleast_1d(spacing).tolist()
        if any(int(n) > 1 << 20 for n in sizes):
            raise BadInput(path, f"has a grid of {sizes} voxels", "at most 1048576 along an axis is read")
        for step in steps:
            check_spacing(path, "grid spacing_mm", float(step))
        matrix = None if affine is None else tuple(map(tuple, np.asarray(affine, np.float64).reshape(4, 4).tolist()))
        return VolumeGrid(tuple(sizes), tuple(steps), matrix)

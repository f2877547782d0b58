"""Parallel-beam and flat-detector fan-beam scans of a stack of slices.

Parallel: the ray of view angle t and detector coordinate s is X cos t + Y sin t = s. Fan: the source turns on a circle
of radius SOD; a point has t = X cos a + Y sin a, depth l = SOD + X sin a - Y cos a from the source and falls on the
detector at u = t SDD / l (Kak and Slaney, Principles of Computerized Tomographic Imaging, 1988, ch. 3).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Self

import numpy as np
from numpy.typing import NDArray

from recon3d.geometry.grid import VolumeGrid

# nobody's scan turns more often than this; a larger angle is a degree that was not converted
_MOST_TURNS = 20


class GeometryWarning(UserWarning):
    """The scan is usable, but part of the object was not measured as the user may believe."""


@dataclass(frozen=True)
class ParallelBeam:
    """Parallel-beam scan, the same for every slice.

    Attributes:
        angles_rad: view angles; any order, any spacing, at least one.
        n_detector: detector cells in a row.
        detector_spacing_mm: distance of neighbouring cells.
        detector_offset_mm: detector coordinate of the row's middle; with the rotation axis at cell c it is
            ((n-1)/2 - c) * detector_spacing_mm.

    Raises:
        ValueError: no angles, angles that look like degrees, a size that is not positive and finite.
    """

    angles_rad: tuple[float, ...] = field(repr=False)
    n_detector: int
    detector_spacing_mm: float
    detector_offset_mm: float = 0.0

    def __post_init__(self) -> None:
        name = type(self).__name__
        angles = np.asarray(self.angles_rad, dtype=np.float64).ravel()
        if angles.size == 0:
            raise ValueError(f"{name}: zero views; a scan needs at least one angle")
        if not np.isfinite(angles).all():
            raise ValueError(f"{name}: angles_rad holds NaN or infinity")
        if np.abs(angles).max() > _MOST_TURNS * 2 * math.pi or _looks_like_degrees(angles):
            raise ValueError(
                f"{name}: angles_rad runs to {np.abs(angles).max():.6g}, which looks like degrees; "
                "convert them with numpy.deg2rad"
            )
        if int(self.n_detector) != self.n_detector or self.n_detector < 1:
            raise ValueError(f"{name}: n_detector needs at least one cell, got {self.n_detector}")
        _positive(name, "detector_spacing_mm", self.detector_spacing_mm)
        if not math.isfinite(self.detector_offset_mm):
            raise ValueError(f"{name}: detector_offset_mm needs a finite length, got {self.detector_offset_mm}")
        object.__setattr__(self, "angles_rad", tuple(angles.tolist()))
        object.__setattr__(self, "n_detector", int(self.n_detector))

    @property
    def n_views(self) -> int:
        """Number of views."""
        return len(self.angles_rad)

    @property
    def angles(self) -> NDArray[np.float64]:
        """The angles as an array, in radians."""
        return np.asarray(self.angles_rad, dtype=np.float64)

    @property
    def magnification(self) -> float:
        """Detector length per length at the rotation axis."""
        return 1.0

    def detector_mm(self) -> NDArray[np.float64]:
        """Coordinates of the detector cells in mm."""
        n = self.n_detector
        return (np.arange(n, dtype=np.float64) - (n - 1) / 2) * self.detector_spacing_mm + self.detector_offset_mm

    def subset(self, views: Sequence[int] | NDArray[np.integer] | slice) -> Self:
        """The same scan with the chosen views only.

        Raises:
            ValueError: the choice is empty or names a view that does not exist.
        """
        try:
            chosen = self.angles[views]
        except IndexError as error:
            raise ValueError(f"subset: views must lie in 0..{self.n_views - 1}") from error
        return replace(self, angles_rad=tuple(np.atleast_1d(chosen).tolist()))

    def reach_mm(self) -> tuple[float, float]:
        """Signed radii of the field of view: the smallest and largest distance from the axis a ray passes at."""
        edge = (self.n_detector / 2) * self.detector_spacing_mm
        return self.detector_offset_mm - edge, self.detector_offset_mm + edge

    def check(self, grid: VolumeGrid) -> list[str]:
        """Sentences about what this scan does not see of the grid; empty when it covers the inscribed circle."""
        dy, dx = grid.pixel_mm
        radius = min(grid.shape[1] * dy, grid.shape[2] * dx) / 2
        low, high = self.reach_mm()
        covered = min(-low, high)
        if covered >= radius - 0.5 * max(dy, dx):
            return []
        return [
            f"truncation: the detector covers {covered:.1f} mm from the rotation axis on its short side, the image "
            f"reaches {radius:.1f} mm; an object outside gives bright rims"
        ]


@dataclass(frozen=True)
class FanBeam(ParallelBeam):
    """Flat-detector fan-beam scan, the same for every slice.

    Attributes:
        source_to_axis_mm: SOD, source to rotation axis.
        source_to_detector_mm: SDD, source to detector; at least SOD.

    Raises:
        ValueError: as ParallelBeam; or a distance that is missing, or SDD < SOD.
    """

    source_to_axis_mm: float = 0.0
    source_to_detector_mm: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _positive("FanBeam", "source_to_axis_mm", self.source_to_axis_mm)
        _positive("FanBeam", "source_to_detector_mm", self.source_to_detector_mm)
        if self.source_to_detector_mm < self.source_to_axis_mm:
            raise ValueError(
                f"FanBeam: source_to_detector_mm ({self.source_to_detector_mm}) must not be below "
                f"source_to_axis_mm ({self.source_to_axis_mm})"
            )

    @property
    def magnification(self) -> float:
        """SDD / SOD."""
        return self.source_to_detector_mm / self.source_to_axis_mm

    def reach_mm(self) -> tuple[float, float]:
        """Signed radii of the field of view: distance of the outermost rays from the axis."""
        low, high = super().reach_mm()
        sdd = self.source_to_detector_mm
        return tuple(self.source_to_axis_mm * u / math.hypot(u, sdd) for u in (low, high))  # type: ignore[return-value]

    def check(self, grid: VolumeGrid) -> list[str]:
        """As for the parallel beam.

        Raises:
            ValueError: the source passes through the image.
        """
        dy, dx = grid.pixel_mm
        corner = math.hypot(grid.shape[1] * dy, grid.shape[2] * dx) / 2
        if corner >= self.source_to_axis_mm:
            raise ValueError(
                f"FanBeam: the source, {self.source_to_axis_mm:.1f} mm from the axis, turns inside the image, whose "
                f"corners reach {corner:.1f} mm; check the units of source_to_axis_mm and spacing_mm"
            )
        return super().check(grid)


ScanGeometry = ParallelBeam | FanBeam


def equiangular(n_views: int, range_rad: float = math.pi, start_rad: float = 0.0) -> tuple[float, ...]:
    """n angles start + k range / n: the end point, which repeats the start after a full range, is left out.

    >>> [round(a, 3) for a in equiangular(4)]
    [0.0, 0.785, 1.571, 2.356]
    """
    if n_views < 1:
        raise ValueError(f"equiangular: at least one view needed, got {n_views}")
    return tuple((start_rad + np.arange(n_views) * (range_rad / n_views)).tolist())


def _looks_like_degrees(angles: Iterable[float]) -> bool:
    # more than one turn, and whole or half numbers throughout: radians never look like that
    values = np.asarray(list(angles))
    return bool(np.abs(values).max() > 2 * math.pi + 1e-6 and np.allclose(values * 2, np.round(values * 2), atol=1e-9))


def _positive(owner: str, name: str, value: float) -> None:
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{owner}: {name} needs a positive length in mm, got {value}")

"""Sinograms of a cylindrical PET scanner: which pairs of crystals a bin holds, and where its line runs.

In the plane. With N crystals to a ring, view v and radial bin t (counted from the middle) hold the pair

    p0 = v + floor(t/2),    p1 = v - floor((t+1)/2) + N/2        (mod N)

so that odd radial bins lie half a view before the even ones: angle phi = 2 pi v/N - (t odd) pi/N, distance from the
axis s = r sin(pi t/N). With d = (-sin phi, cos phi) and n = (cos phi, sin phi) in (X, Y) the line runs from
p0 = s n - h d to p1 = s n + h d. This is how Siemens and STIR count. Mashing adds up neighbouring views.

Along the axis. A segment holds the ring differences ring(p1) - ring(p0) from its lowest to its highest: `span` many,
centred on k span. Segments come in the order 0, -1, +1, -2, +2, ...; the planes of a segment follow one another along
z, one for every ring pair (span 1) or for every sum of ring numbers (compressed: a plane adds up the ring pairs of the
segment with that sum, and stands for one line at the segment's mean difference). Span 1 with differences up to 60 has
the 4084 planes of Siemens' mMR list mode; there rings are counted from the head, so that its planes are these turned
round.

Data lie [view, radial, plane], with time of flight [view, radial, tof, plane].
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recon3d.geometry.grid import VolumeGrid
from recon3d.geometry.pet_events import Events
from recon3d.geometry.pet_scanner import SPEED_MM_PER_PS, TOF, PETScanner, scanner, scanner_names

__all__ = ["SPEED_MM_PER_PS", "TOF", "Events", "PETGeometry", "PETScanner", "pet_geometry", "scanner", "scanner_names"]

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class PETGeometry:
    """Sinogram bins of a scanner. pet_geometry fills in what a scanner has.

    Attributes:
        scanner: the crystals.
        n_views: views over 180 degrees; half of the scanner's crystals to a ring over the mashing.
        n_radial: radial bins; bin i is t = i - n_radial // 2.
        span: ring differences that a segment adds up, odd; 1 keeps every ring pair.
        max_ring_difference: None = rings - 1 for span 1, else the largest that fills whole segments.
        tof: time bins along the lines, or None.
        views: those of the n_views that are held, in their order; None = all.

    Raises:
        ValueError: sizes that do not fit the scanner.
    """

    scanner: PETScanner
    n_views: int
    n_radial: int
    span: int = 1
    max_ring_difference: int | None = None
    tof: TOF | None = None
    views: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        half = self.scanner.crystals // 2
        if int(self.n_views) != self.n_views or self.n_views < 1 or half % self.n_views:
            raise ValueError(
                f"PETGeometry: n_views must divide {half}, half of the {self.scanner.crystals} crystals of a ring, "
                f"got {self.n_views}"
            )
        if int(self.n_radial) != self.n_radial or not 1 <= self.n_radial < self.scanner.crystals:
            raise ValueError(f"PETGeometry: n_radial must lie in 1..{self.scanner.crystals - 1}, got {self.n_radial}")
        if int(self.span) != self.span or self.span < 1 or self.span % 2 == 0:
            raise ValueError(f"PETGeometry: span must be an odd number, got {self.span}")
        most, half_span = self.scanner.rings - 1, (self.span - 1) // 2
        if half_span > most:
            raise ValueError(f"PETGeometry: span {self.span} is more than {self.scanner.rings} rings have")
        if self.max_ring_difference is None:
            fills = (most - half_span) // self.span * self.span + half_span
            object.__setattr__(self, "max_ring_difference", fills)
        largest = self.ring_difference
        if not 0 <= largest <= most or (largest - half_span) % self.span or largest < half_span:
            raise ValueError(
                f"PETGeometry: max_ring_difference {largest} does not fill segments of span {self.span} within "
                f"{self.scanner.rings} rings; take k * {self.span} + {half_span} up to {most}"
            )
        if self.views is not None:
            views = tuple(int(v) for v in self.views)
            if not views or min(views) < 0 or max(views) >= self.n_views or len(set(views)) != len(views):
                raise ValueError(f"PETGeometry: views must be different ones of 0..{self.n_views - 1}, at least one")
            object.__setattr__(self, "views", views)

    @property
    def ring_difference(self) -> int:
        """The largest ring difference, as a number."""
        assert self.max_ring_difference is not None
        return int(self.max_ring_difference)

    @property
    def mashing(self) -> int:
        """Views of the scanner that a view adds up."""
        return self.scanner.crystals // 2 // self.n_views

    @property
    def view_numbers(self) -> Ints:
        """Which of the n_views are held."""
        return np.arange(self.n_views) if self.views is None else np.asarray(self.views, dtype=np.int64)

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of the data: (view, radial, plane), with time of flight (view, radial, tof, plane)."""
        held = self.n_views if self.views is None else len(self.views)
        time = () if self.tof is None else (self.tof.bins,)
        return (held, self.n_radial, *time, self.n_planes)

    @property
    def n_planes(self) -> int:
        """Planes of all segments."""
        return sum(count for *_, count in self._table())

    @property
    def segment_numbers(self) -> tuple[int, ...]:
        """Numbers of the segments in the order of the planes: 0, -1, +1, ..."""
        return tuple(number for number, *_ in self._table())

    @property
    def segment_planes(self) -> tuple[int, ...]:
        """Planes of every segment."""
        return tuple(count for *_, count in self._table())

    @property
    def segments(self) -> Floats:
        """[segment, 4] in mm: z of the middle of the first plane's line, z(p1) - z(p0), step along z, planes."""
        pitch, rings = self.scanner.ring_spacing_mm, self.scanner.rings
        rows = []
        for number, _, _, first, count in self._table():
            step = pitch if self.span == 1 else pitch / 2
            rows.append((first / 2 * pitch - (rings - 1) / 2 * pitch, number * self.span * pitch, step, count))
        return np.asarray(rows, dtype=np.float64)

    @property
    def bin_mm(self) -> float:
        """Distance of neighbouring radial bins at the centre."""
        return self.scanner.radius_mm * math.sin(math.pi / self.scanner.crystals)

    @property
    def fov_mm(self) -> float:
        """Diameter of the circle that every view sees."""
        edge = (self.n_radial - 1) // 2 + 0.5
        return 2 * self.scanner.radius_mm * math.sin(math.pi * min(edge / self.scanner.crystals, 0.5))

    def radial_mm(self) -> Floats:
        """Distance of every radial bin from the axis."""
        t = np.arange(self.n_radial) - self.n_radial // 2
        return self.scanner.radius_mm * np.sin(math.pi * t / self.scanner.crystals)

    def angles_rad(self, views: Sequence[int] | NDArray[np.integer] | None = None) -> Floats:
        """[view, radial] angle phi of every line; `views` count within the held ones."""
        n, m = self.scanner.crystals, self.mashing
        chosen = self.view_numbers if views is None else self.view_numbers[np.asarray(views, dtype=np.int64)]
        t = np.arange(self.n_radial) - self.n_radial // 2
        middle = (chosen * m + (m - 1) / 2) * (2 * math.pi / n) + self.scanner.tilt_rad
        return middle[:, None] - (t % 2) * (math.pi / n)

    def lines(self, views: Sequence[int] | NDArray[np.integer] | None = None) -> Floats:
        """[view * radial, 4] mm: (y0, x0, y1, x1) of the ends p0 and p1 in the plane, radial bins innermost.

        Exact crystal pairs; with mashing the line at the mean angle of those added up.
        """
        phi = self.angles_rad(views)
        s = self.radial_mm()
        h = np.sqrt(self.scanner.radius_mm**2 - s * s)
        cos, sin = np.cos(phi), np.sin(phi)
        ends = (s * sin - h * cos, s * cos + h * sin, s * sin + h * cos, s * cos - h * sin)
        return np.stack(ends, -1).reshape(-1, 4)

    def subset(self, views: Sequence[int] | NDArray[np.integer]) -> PETGeometry:
        """The same sinograms with the chosen views only; they count within the held ones.

        Raises:
            ValueError: the choice is empty, repeats a view or names one that is not there.
        """
        numbers, chosen = self.view_numbers, np.atleast_1d(np.asarray(views, dtype=np.int64))
        if chosen.size == 0 or chosen.min() < 0 or chosen.max() >= len(numbers):
            raise ValueError(f"subset: views must be some of 0..{len(numbers) - 1}, at least one")
        return replace(self, views=tuple(numbers[chosen].tolist()))

    def default_grid(self, pixel_mm: float | None = None, n: int | None = None) -> VolumeGrid:
        """A volume over the field of view: two slices for every ring, less one; pixels the size of a radial bin.

        Args:
            pixel_mm: pixel size; None = the radial bin, or with n what fills the field of view.
            n: pixels of a side; None = as many as fill the field of view.
        """
        if pixel_mm is None:
            pixel_mm = self.bin_mm if n is None else self.fov_mm / n
        if n is None:
            n = math.ceil(self.fov_mm / pixel_mm - 1e-9)
        dz, nz = self.scanner.ring_spacing_mm / 2, 2 * self.scanner.rings - 1
        return VolumeGrid((nz, n, n), (dz, pixel_mm, pixel_mm))

    # pairs of crystals ----------------------------------------------------------------------------------------------

    def michelogram(self) -> NDArray[np.int32]:
        """[ring of p0, ring of p1] -> plane, or -1 where no plane holds the pair."""
        rings = np.arange(self.scanner.rings)
        ring0, ring1 = rings[:, None], rings[None, :]
        difference, both = ring1 - ring0, ring0 + ring1
        out = np.full((len(rings), len(rings)), -1, dtype=np.int32)
        start = 0
        for _, low, high, first, count in self._table():
            inside = (difference >= low) & (difference <= high)
            plane = (both - first) // 2 if self.span == 1 else both - first
            out[inside] = (start + plane)[inside]
            start += count
        return out

    def ring_pairs(self) -> tuple[Ints, Ints]:
        """All pairs of rings that are measured: (plane of each, ascending; [pair, 2] rings of p0 and p1)."""
        table = self.michelogram()
        ring0, ring1 = np.nonzero(table >= 0)
        plane = table[ring0, ring1].astype(np.int64)
        order = np.lexsort((ring0, plane))
        return plane[order], np.stack([ring0, ring1], -1)[order]

    def crystal_pairs(self) -> Ints:
        """[view, mashed, radial, 2] crystals within their rings of p0 and p1."""
        n, m = self.scanner.crystals, self.mashing
        v = (self.view_numbers[:, None] * m + np.arange(m))[..., None]
        t = np.arange(self.n_radial) - self.n_radial // 2
        return np.stack([(v + (t >> 1)) % n, (v - ((t + 1) >> 1) + n // 2) % n], -1)

    def multiplicity(self) -> Floats:
        """[plane] pairs of crystals that a bin adds up: ring pairs times mashed views."""
        plane, _ = self.ring_pairs()
        return np.bincount(plane, minlength=self.n_planes).astype(np.float64) * self.mashing

    def bin_of(self, pairs: Any, tof_bins: Any = None) -> Ints:
        """Flat index, within `shape`, of the bin of every pair of crystals; -1 where no bin holds it.

        A pair is held the one way round or the other: where p0 and p1 are exchanged the time bin is mirrored.

        Args:
            pairs: [n, 2] crystal ids of p0 and p1, ring * crystals + crystal.
            tof_bins: [n] time bins; needed when the geometry has time of flight, else not looked at.

        Raises:
            ValueError: pairs that are no crystals, or time bins that are missing.
        """
        ids = np.asarray(pairs, dtype=np.int64)
        if ids.ndim != 2 or ids.shape[1] != 2:
            raise ValueError(f"bin_of: pairs must be [n, 2] crystal ids, got {ids.shape}")
        if ids.size and (ids.min() < 0 or ids.max() >= self.scanner.n_crystals):
            raise ValueError(f"bin_of: crystal ids run over 0..{self.scanner.n_crystals - 1}")
        n, half = self.scanner.crystals, self.scanner.crystals // 2
        ring, crystal = np.divmod(ids, n)
        a, b = crystal[:, 0], crystal[:, 1]
        # p0 - p1 = t - N/2 (mod N); the way round whose view lies in the first half turn is the one that is stored
        t = (a - b + half) % n
        t = np.where(t >= half, t - n, t)
        v = (a - (t >> 1)) % n
        turned = v >= half
        t = np.where(turned, (b - a + half) % n, t)
        t = np.where(t >= half, t - n, t)
        v = np.where(turned, (b - (t >> 1)) % n, v)
        r0 = np.where(turned, ring[:, 1], ring[:, 0])
        r1 = np.where(turned, ring[:, 0], ring[:, 1])
        plane = self.michelogram()[r0, r1].astype(np.int64)
        radial = t + self.n_radial // 2
        place = np.full(self.n_views, -1, dtype=np.int64)
        place[self.view_numbers] = np.arange(self.shape[0])
        view = place[np.minimum(v, half - 1) // self.mashing]
        good = (a != b) & (plane >= 0) & (radial >= 0) & (radial < self.n_radial) & (view >= 0)
        flat = view * self.n_radial + radial
        if self.tof is not None:
            if tof_bins is None:
                raise ValueError("bin_of: the geometry has time of flight, so tof_bins are needed")
            time = np.asarray(tof_bins, dtype=np.int64)
            if time.shape != (len(ids),):
                raise ValueError(f"bin_of: tof_bins must be [{len(ids)}], got {time.shape}")
            time = np.where(turned, self.tof.bins - 1 - time, time)
            good &= (time >= 0) & (time < self.tof.bins)
            flat = flat * self.tof.bins + time
        return np.where(good, flat * self.n_planes + plane, -1)

    def pairs_of(self, bins: Any) -> tuple[NDArray[np.int32], NDArray[np.int16] | None]:
        """The pair of crystals of every bin, and its time bin: the inverse of bin_of.

        Args:
            bins: [n] flat indices within `shape`.

        Raises:
            ValueError: an index outside, or a geometry that adds up pairs (span or mashing above 1).
        """
        if self.span != 1 or self.mashing != 1:
            raise ValueError(
                f"pairs_of: with span {self.span} and mashing {self.mashing} a bin holds several pairs; ring_pairs and "
                "crystal_pairs list them"
            )
        flat = np.asarray(bins, dtype=np.int64)
        if flat.size and (flat.min() < 0 or flat.max() >= math.prod(self.shape)):
            raise ValueError(f"pairs_of: bins run over 0..{math.prod(self.shape) - 1}")
        index = np.unravel_index(flat, self.shape)
        view, radial, plane = index[0], index[1], index[-1]
        n = self.scanner.crystals
        v, t = self.view_numbers[view], radial - self.n_radial // 2
        rings = self.ring_pairs()[1][plane]
        out = np.empty((len(flat), 2), dtype=np.int32)
        out[:, 0] = rings[:, 0] * n + (v + (t >> 1)) % n
        out[:, 1] = rings[:, 1] * n + (v - ((t + 1) >> 1) + n // 2) % n
        return out, None if self.tof is None else index[2].astype(np.int16)

    def _table(self) -> tuple[tuple[int, int, int, int, int], ...]:
        return _segment_table(self.scanner.rings, self.span, self.ring_difference)


def pet_geometry(
    device: PETScanner | str,
    *,
    span: int = 1,
    max_ring_difference: int | None = None,
    n_radial: int | None = None,
    mashing: int = 1,
    tof: TOF | bool = False,
) -> PETGeometry:
    """Sinograms of a scanner, with what the scanner has where nothing is said.

    Args:
        device: the scanner, or the name of one that recon3d.geometry.scanner knows.
        span: ring differences that a segment adds up.
        max_ring_difference: None = as many as fill whole segments.
        n_radial: radial bins; None = the scanner's.
        mashing: views that are added up.
        tof: time bins; True = the scanner's, False = none.

    Raises:
        ValueError: sizes that do not fit the scanner, or time of flight that it does not have.

    >>> pet_geometry("mmr", max_ring_difference=60).shape
    (252, 344, 4084)
    >>> pet_geometry("mmr", span=11).segment_planes[:3]
    (127, 115, 115)
    """
    made = scanner(device) if isinstance(device, str) else device
    if mashing < 1 or (made.crystals // 2) % mashing:
        raise ValueError(f"pet_geometry: mashing must divide {made.crystals // 2} views, got {mashing}")
    if tof is True:
        if made.tof is None:
            raise ValueError(f"pet_geometry: {made.name} has no time of flight; give a TOF")
        tof = made.tof
    return PETGeometry(
        made,
        made.crystals // 2 // mashing,
        made.n_radial if n_radial is None else n_radial,
        span,
        max_ring_difference,
        tof or None,
    )


@functools.lru_cache(maxsize=64)
def _segment_table(rings: int, span: int, largest: int) -> tuple[tuple[int, int, int, int, int], ...]:
    """Per segment: number, lowest and highest ring difference, ring sum of the first plane, planes."""
    half = (span - 1) // 2
    count = (largest - half) // span
    table = []
    for number in [0, *(sign * k for k in range(1, count + 1) for sign in (-1, 1))]:
        low, high = number * span - half, number * span + half
        nearest = 0 if low <= 0 <= high else min(abs(low), abs(high))
        planes = rings - nearest if span == 1 else 2 * (rings - nearest) - 1
        table.append((number, low, high, nearest, planes))
    return tuple(table)

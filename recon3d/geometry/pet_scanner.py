"""Cylindrical PET scanners made of blocks of crystals, and the numbers of a few that are public.

Crystal c of a ring sits at the angle psi = 2 pi c / N + tilt with X = r sin(psi), Y = -r cos(psi): crystal 0 above
the patient, the next ones towards the patient's left. Ring k lies at z = (k - (rings-1)/2) pitch, counted from the
feet of a patient who lies head first (vendors may count from the head: readers turn rings round). Blocks are taken as
bent: every crystal at the same distance from the axis, which is the inner radius and the mean depth of interaction.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["SPEED_MM_PER_PS", "TOF", "PETScanner", "scanner", "scanner_names"]

# a difference of one picosecond in arrival moves the annihilation by half of what light travels
SPEED_MM_PER_PS = 0.299792458
_FWHM = 2 * math.sqrt(2 * math.log(2))


@dataclass(frozen=True)
class TOF:
    """Time of flight: bins along the line of response, counted from its p0 end to its p1 end.

    Bin b of T has its centre (b - (T-1)/2) bin_mm from the middle of the line towards p1. The kernel is a Gaussian
    that is cut at truncation sigmas and scaled to integrate to one.

    Attributes:
        bins: number of bins.
        bin_mm: their width along the line.
        sigma_mm: standard deviation of the kernel.
        truncation: where the kernel ends, in sigmas.

    Raises:
        ValueError: no bins, or a length that is not positive and finite.

    >>> round(TOF.from_ps(bins=13, bin_ps=312.0, fwhm_ps=555.0).bin_mm, 3)
    46.768
    """

    bins: int
    bin_mm: float
    sigma_mm: float
    truncation: float = 3.0

    def __post_init__(self) -> None:
        if int(self.bins) != self.bins or self.bins < 1:
            raise ValueError(f"TOF: bins needs at least one bin, got {self.bins}")
        for name in ("bin_mm", "sigma_mm", "truncation"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"TOF: {name} needs a positive number, got {value}")
        object.__setattr__(self, "bins", int(self.bins))

    @classmethod
    def from_ps(cls, bins: int, bin_ps: float, fwhm_ps: float, truncation: float = 3.0) -> TOF:
        """From times as data sheets give them: width of a bin and coincidence resolution, in picoseconds."""
        half = SPEED_MM_PER_PS / 2
        return cls(bins, bin_ps * half, fwhm_ps * half / _FWHM, truncation)

    def centres_mm(self) -> NDArray[np.float64]:
        """Distances of the bins' centres from the middle of the line, towards p1."""
        return (np.arange(self.bins, dtype=np.float64) - (self.bins - 1) / 2) * self.bin_mm


@dataclass(frozen=True)
class PETScanner:
    """A cylinder of crystals; crystal id = ring * crystals + crystal.

    Attributes:
        name: what it is called.
        rings: rings of crystals, with those that gaps between blocks are counted as.
        ring_spacing_mm: distance of neighbouring rings.
        crystals: crystals of a ring, with those that gaps between blocks are counted as (virtual crystals).
        radius_mm: inner radius and mean depth of interaction together.
        block_crystals: crystals of a block around the ring, the virtual ones counted.
        block_rings: rings of a block, the virtual ones counted.
        gap_crystals: crystals of a block, from 0, that do not exist.
        gap_rings: rings of a block, from 0, that do not exist.
        n_radial: radial bins that the scanner's sinograms have.
        tilt_rad: angle of crystal 0 from the top.
        tof: time of flight as the scanner stores it, or None.

    Raises:
        ValueError: a count below one, an odd number of crystals, blocks that do not fill the ring, or a gap outside a
            block.
    """

    name: str
    rings: int
    ring_spacing_mm: float
    crystals: int
    radius_mm: float
    block_crystals: int = 1
    block_rings: int = 1
    gap_crystals: tuple[int, ...] = ()
    gap_rings: tuple[int, ...] = ()
    n_radial: int = 0
    tilt_rad: float = 0.0
    tof: TOF | None = None

    def __post_init__(self) -> None:
        for name in ("rings", "crystals", "block_crystals", "block_rings"):
            value = getattr(self, name)
            if int(value) != value or value < 1:
                raise ValueError(f"PETScanner: {name} must be a whole number of at least one, got {value}")
            object.__setattr__(self, name, int(value))
        for name in ("ring_spacing_mm", "radius_mm"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"PETScanner: {name} needs a positive length, got {value}")
        if self.crystals % 2 or self.crystals < 4:
            raise ValueError(f"PETScanner: crystals must be an even number of at least 4, got {self.crystals}")
        if self.crystals % self.block_crystals:
            raise ValueError(
                f"PETScanner: {self.crystals} crystals cannot be cut into blocks of {self.block_crystals}; count the "
                "virtual crystals of the gaps too"
            )
        for name, size in (("gap_crystals", self.block_crystals), ("gap_rings", self.block_rings)):
            gaps = tuple(int(g) for g in getattr(self, name))
            if any(not 0 <= g < size for g in gaps) or len(set(gaps)) >= size:
                raise ValueError(f"PETScanner: {name} must be some of 0..{size - 1}, got {gaps}")
            object.__setattr__(self, name, gaps)
        radial = int(self.n_radial) or self.crystals // 2
        if not 1 <= radial < self.crystals:
            raise ValueError(f"PETScanner: n_radial must lie in 1..{self.crystals - 1}, got {self.n_radial}")
        object.__setattr__(self, "n_radial", radial)

    @property
    def n_crystals(self) -> int:
        """Crystals of the whole scanner, virtual ones counted."""
        return self.rings * self.crystals

    @property
    def axial_mm(self) -> float:
        """Length of the field of view along z, from edge to edge."""
        return self.rings * self.ring_spacing_mm

    def ring_z_mm(self) -> NDArray[np.float64]:
        """z of the rings."""
        return (np.arange(self.rings, dtype=np.float64) - (self.rings - 1) / 2) * self.ring_spacing_mm

    def crystal_positions(self) -> NDArray[np.float64]:
        """Where every crystal is, [rings * crystals, 3] mm as (z, y, x)."""
        psi = np.arange(self.crystals, dtype=np.float64) * (2 * math.pi / self.crystals) + self.tilt_rad
        out = np.empty((self.rings, self.crystals, 3))
        out[..., 0] = self.ring_z_mm()[:, None]
        out[..., 1] = -self.radius_mm * np.cos(psi)
        out[..., 2] = self.radius_mm * np.sin(psi)
        return out.reshape(-1, 3)

    def real_crystals(self) -> NDArray[np.bool_]:
        """[rings, crystals] whether a crystal exists: False for the virtual ones of the gaps."""
        rings = ~np.isin(np.arange(self.rings) % self.block_rings, self.gap_rings)
        around = ~np.isin(np.arange(self.crystals) % self.block_crystals, self.gap_crystals)
        return rings[:, None] & around


def scanner(name: str) -> PETScanner:
    """A scanner whose numbers are public.

    "mmr": Siemens Biograph mMR (Delso et al., J Nucl Med 52 (2011) 1914), 56 x 8 blocks of 8 x 8 crystals, a virtual
        crystal between blocks (the first of nine: list mode has none of its counts), 656 mm inner diameter.
    "mct": Siemens Biograph mCT (Rausch et al., EJNMMI Phys 2 (2015) 26), 48 x 4 blocks of 13 x 13 crystals, virtual
        crystals both ways, 13 time bins of 312 ps, 555 ps.
    "vision": Siemens Biograph Vision 600 (van Sluis et al., J Nucl Med 60 (2019) 1031), 38 x 8 blocks of 20 x 10
        crystals, virtual crystals around the ring, 33 time bins of 143 ps, 214 ps.
    "signa": GE Signa PET/MR (Levin et al., IEEE TMI 35 (2016) 1907), 45 rings of 448 crystals, 390 ps.
    "d690": GE Discovery 690 (Bettinardi et al., Med Phys 38 (2011) 5394), 24 rings of 576 crystals, 550 ps.
    "small": nobody's, a quick one for tests and the demo.

    GE stores sinograms in an order of its own and compresses by two along z, which this geometry does not have: take
    "signa" and "d690" for list mode and simulation; "signa" has its 351 time bins mashed to 27. Depths of interaction,
    ring spacings and tilts are those of STIR's table of scanners. Which crystal of a block is the virtual one was seen
    in data for "mmr" only; "mct" and "vision" take the last.

    Raises:
        ValueError: an unknown name.

    >>> scanner("mmr").crystals
    504
    """
    try:
        return _SCANNERS[name]
    except KeyError:
        raise ValueError(f"scanner: {name!r} is not one of {', '.join(sorted(_SCANNERS))}") from None


def scanner_names() -> tuple[str, ...]:
    """The names that scanner knows."""
    return tuple(sorted(_SCANNERS))


_SCANNERS = {
    s.name: s
    for s in (
        PETScanner("mmr", 64, 4.0625, 504, 328.0 + 7.0, 9, 8, (0,), (), 344),
        PETScanner("mct", 55, 4.054, 672, 421.0 + 7.0, 14, 14, (13,), (13,), 400, 0.0, TOF.from_ps(13, 312.0, 555.0)),
        PETScanner("vision", 80, 3.29114, 798, 417.0, 21, 10, (20,), (), 520, 0.0324, TOF.from_ps(33, 143.231, 214.0)),
        PETScanner(
            "signa", 45, 5.56, 448, 311.8 + 8.5, 4, 9, (), (), 357, math.radians(-5.23), TOF.from_ps(27, 169.26, 390.0)
        ),
        PETScanner(
            "d690", 24, 6.54, 576, 405.1 + 9.4, 9, 6, (), (), 381, math.radians(-5.021), TOF.from_ps(55, 89.0, 550.0)
        ),
        PETScanner("small", 16, 4.0, 192, 130.0, 8, 8, n_radial=128, tof=TOF(11, 25.0, 20.0)),
    )
}

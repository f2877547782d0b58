"""What a PET scanner measured, as the operators take it: counts, the terms of their model, geometry, time and dose.

The model of a bin is  expected = scale * factors * (P x) + additive  with x in Bq/mL and P line integrals in mm;
prompts are Poisson counts of that. Files are brought into one frame: rings count towards z, which is towards the head
of a patient who lies head first, x to the left and y to the back of one who lies supine. STIR and Siemens count rings
the other way (their z runs from the gantry to the bed), so their planes are turned round on the way in and out; no
value changes.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from recon3d.geometry import VolumeGrid
from recon3d.geometry.pet import Events, PETGeometry
from recon3d.io.guard import BadInput, check_finite

MuUnit = Literal["1/mm", "1/cm", "hu"]
Kind = Literal["counts", "terms", "corrected"]
Position = Literal["HFS", "HFP", "FFS", "FFP"]
# where x, y, z of the scanner's frame point, as signs of right, front and head
_POSITIONS = {"HFS": (-1, -1, 1), "HFP": (1, 1, 1), "FFS": (1, -1, -1), "FFP": (-1, 1, -1)}
# float32 holds every whole number up to here
MOST_COUNTS = 1 << 24
_LARGEST_TERM = 1e30


@dataclass(frozen=True)
class PETOptions:
    """What a PET file does not say, or which part of it is wanted.

    Attributes:
        precorrected: prompts may be negative or fractional, because randoms or more were subtracted from them.
        histogram: whether list mode is sorted into a sinogram; without, `prompts` stays empty and `events` counts.
        span, max_ring_difference, mashing: compression of that sinogram; None and 1 take that of the file.
        seconds: first and last second of the list mode to take; None takes all.
        mu_unit: unit of an attenuation map that does not say it.
    """

    precorrected: bool = False
    histogram: bool = True
    span: int | None = None
    max_ring_difference: int | None = None
    mashing: int = 1
    seconds: tuple[float, float] | None = None
    mu_unit: MuUnit | None = None

    def __post_init__(self) -> None:
        if self.seconds is not None and not (len(self.seconds) == 2 and 0 <= self.seconds[0] < self.seconds[1]):
            raise ValueError(f"read_pet: seconds must be (first, last) with first < last, got {self.seconds}")
        if self.mu_unit is not None and self.mu_unit not in get_args(MuUnit):
            raise ValueError(f"read_pet: mu_unit is one of {', '.join(get_args(MuUnit))}, got {self.mu_unit!r}")
        for name in ("span", "max_ring_difference", "mashing"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < (name != "max_ring_difference")):
                raise ValueError(f"read_pet: {name} must be a whole number, got {value!r}")

    @classmethod
    def of(cls, options: dict[str, Any]) -> PETOptions:
        """From keyword arguments.

        Raises:
            TypeError: an option that does not exist, with the list of those that do.
        """
        names = [f.name for f in fields(cls)]
        unknown = sorted(set(options) - set(names))
        if unknown:
            raise TypeError(f"read_pet: no option {', '.join(unknown)}; there are {', '.join(names)}")
        given: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in options.items()
        }
        return cls(**given)


@dataclass(frozen=True)
class PETInfo:
    """Time, dose and calibration of a scan; None is what nobody wrote down.

    Attributes:
        duration_s: length of the frame.
        start_s: its start after the start of the scan, to which activity refers.
        isotope: such as "F-18".
        half_life_s: of the isotope.
        branching: share of its decays that emit a positron.
        dead_time_factor: share of the coincidences that the scanner was alive for.
        injected_bq: activity at the time of injection.
        injection_to_scan_s: from the injection to the start of the scan.
        weight_kg: of the patient.
        scale: counts per Bq/mL and mm of a line.
        calibrated: whether `scale` is known; without, images come out in counts per mm, not in Bq/mL.
        position: how the patient lies in the scanner.

    Raises:
        ValueError: a value that is not finite, or not positive where it has to be.
    """

    duration_s: float | None = None
    start_s: float = 0.0
    isotope: str | None = None
    half_life_s: float | None = None
    branching: float | None = None
    dead_time_factor: float = 1.0
    injected_bq: float | None = None
    injection_to_scan_s: float | None = None
    weight_kg: float | None = None
    scale: float = 1.0
    calibrated: bool = False
    position: Position = "HFS"

    def __post_init__(self) -> None:
        for name in (
            *("duration_s", "half_life_s", "branching", "dead_time_factor", "injected_bq", "weight_kg", "scale"),
        ):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise ValueError(f"PETInfo: {name} needs a positive number, got {value}")
        for name in ("start_s", "injection_to_scan_s"):
            value = getattr(self, name)
            if value is not None and not math.isfinite(value):
                raise ValueError(f"PETInfo: {name} needs a finite number, got {value}")
        if self.position not in _POSITIONS:
            raise ValueError(f"PETInfo: position is one of {', '.join(_POSITIONS)}, got {self.position!r}")

    @property
    def decay_factor(self) -> float:
        """Mean of the activity over the frame, as a share of that at the start of the scan; 1 where unknown.

        >>> round(PETInfo(duration_s=6586.2, half_life_s=6586.2).decay_factor, 5)
        0.72135
        """
        if self.half_life_s is None or self.duration_s is None:
            return 1.0
        rate = math.log(2) / self.half_life_s
        return math.exp(-rate * self.start_s) * -math.expm1(-rate * self.duration_s) / (rate * self.duration_s)

    @property
    def suv_factor(self) -> float | None:
        """SUVbw of an activity of 1 Bq/mL at the start of the scan, in g/mL; None where dose or weight are unknown.

        >>> PETInfo(injected_bq=70e6, weight_kg=70.0, injection_to_scan_s=0.0, half_life_s=6586.2).suv_factor
        0.001
        """
        if self.injected_bq is None or self.weight_kg is None or self.injection_to_scan_s is None:
            return None
        if self.half_life_s is None:
            return None
        left = self.injected_bq * 2.0 ** (-self.injection_to_scan_s / self.half_life_s)
        return 1000.0 * self.weight_kg / left


@dataclass(frozen=True)
class PETData:
    """Measured counts and what is known about them.

    Attributes:
        prompts: float32 [view, radial, plane] or [view, radial, tof, plane]; empty (size 0) for list mode alone.
        geometry: the bins.
        factors: like prompts, what a bin counts of what it would without attenuation and with perfect crystals.
        additive: like prompts, expected randoms and scatter in counts.
        delayed: like prompts, delayed coincidences.
        mu: attenuation at 511 keV in 1/mm, and its grid.
        events: the coincidences one by one.
        info: time, dose and calibration.
        grid: where the volume is to be, with the patient's orientation; None leaves it to geometry.default_grid.
        source_format: "interfile", "siemens", "petlink", "petsird" or "folder".
        notes: sentences about what was assumed, left out or looks doubtful; show them to the user.

    Raises:
        ValueError: sizes that disagree.
    """

    prompts: Tensor
    geometry: PETGeometry
    factors: Tensor | None = None
    additive: Tensor | None = None
    delayed: Tensor | None = None
    mu: tuple[Tensor, VolumeGrid] | None = None
    events: Events | None = None
    info: PETInfo = field(default_factory=PETInfo)
    grid: VolumeGrid | None = None
    source_format: str = ""
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        shape = tuple(self.geometry.shape)
        if tuple(self.prompts.shape) != shape and not (self.events is not None and self.prompts.numel() == 0):
            raise ValueError(f"PETData: prompts are {tuple(self.prompts.shape)}, the geometry has {shape}")
        for name in ("factors", "additive", "delayed"):
            value = getattr(self, name)
            if value is not None and tuple(value.shape) != shape:
                raise ValueError(f"PETData: {name} are {tuple(value.shape)}, the geometry has {shape}")
        if self.mu is not None and tuple(self.mu[0].shape) != self.mu[1].shape:
            raise ValueError(f"PETData: mu is {tuple(self.mu[0].shape)}, its grid {self.mu[1].shape}")

    @property
    def counts(self) -> int:
        """Prompt coincidences."""
        if self.prompts.numel() == 0 and self.events is not None:
            return int(self.events.prompt.sum())
        return round(total(self.prompts))

    def histogram(self, geometry: PETGeometry) -> PETData:
        """Its events sorted into the bins of a geometry.

        Raises:
            ValueError: there are no events.
        """
        if self.events is None:
            raise ValueError("PETData.histogram: there are no events, only a sinogram")
        prompts, delayed = self.events.histogram(geometry)
        some = bool((~self.events.prompt).any())
        return replace(self, prompts=prompts, delayed=delayed if some else None, geometry=geometry)

    def describe(self) -> dict[str, Any]:
        """What a user wants to see of it."""
        found = {
            "format": self.source_format,
            "scanner": self.geometry.scanner.name,
            "shape": list(self.geometry.shape),
            "prompts": self.counts,
            "factors": self.factors is not None,
            "additive": self.additive is not None,
            "attenuation": self.mu is not None,
            "duration_s": self.info.duration_s,
            "calibrated": self.info.calibrated,
        }
        if self.delayed is not None:
            found["delayed"] = round(total(self.delayed))
        return {key: value for key, value in found.items() if value is not None}


def total(values: Tensor) -> float:
    """Sum in float64, view by view: torch would make a float64 copy of all of it."""
    return math.fsum(float(view.sum(dtype=torch.float64)) for view in values)


def patient_grid(grid: VolumeGrid, position: str) -> VolumeGrid:
    """The grid of a volume centred on the scanner, with an affine that says how the patient lies in it.

    Args:
        grid: shape and spacing.
        position: "HFS", "HFP", "FFS" or "FFP".

    >>> patient_grid(VolumeGrid((3, 4, 4), (2.0, 1.0, 1.0)), "HFS").affine is None
    True
    """
    if position == "HFS":
        return replace(grid, affine=None)
    signs = np.asarray(_POSITIONS[position], np.float64)
    matrix = np.eye(4)
    matrix[:3, :3] = np.diag(signs * np.asarray(grid.spacing_mm[::-1]))
    matrix[:3, 3] = -matrix[:3, :3] @ ((np.asarray(grid.shape[::-1], np.float64) - 1) / 2)
    return replace(grid, affine=tuple(tuple(float(v) for v in row) for row in matrix))


def sinogram_for(geometry: PETGeometry, options: PETOptions) -> PETGeometry:
    """The sinogram that options ask for; by default that of the list mode itself.

    Raises:
        ValueError: the scanner has no such bins.
    """
    span = options.span or 1
    if geometry.n_views % options.mashing:
        raise ValueError(f"mashing must divide {geometry.n_views} views, got {options.mashing}")
    largest = options.max_ring_difference
    if largest is None:
        half = (span - 1) // 2
        largest = (geometry.ring_difference - half) // span * span + half
    return replace(geometry, n_views=geometry.n_views // options.mashing, span=span, max_ring_difference=largest)


# ---- what numbers a file may hold ----------------------------------------------------------------------------------


def check_counts(path: str | os.PathLike[str], name: str, stored: NDArray[Any], kind: Kind) -> None:
    """Numbers of bins as stored, in the file's own type.

    Args:
        path: the file, for the sentence.
        name: what they are, for the sentence.
        stored: some of them.
        kind: "counts" are non-negative whole numbers, "terms" are non-negative, "corrected" may be negative.

    Raises:
        BadInput: they are not; says so when only the byte order is wrong.
    """
    trouble = _trouble(stored, kind)
    if trouble is None:
        return
    with np.errstate(all="ignore"):
        swapped = stored.byteswap()
        sensible = _trouble(swapped, kind) is None and (kind == "counts" or float(np.abs(swapped).max()) < 1e9)
    if stored.dtype.itemsize > 1 and sensible:
        raise BadInput(
            path,
            f"holds {name} that {trouble}, but sensible ones with the bytes of each number in the other order",
            "correct the header's byte order",
        )
    if stored.dtype.kind == "f" and not np.isfinite(stored).all():
        check_finite(path, name, stored)
    hint = "say precorrected=True if something was subtracted from them" if kind == "counts" else "export it again"
    raise BadInput(path, f"holds {name} that {trouble}", hint)


def _trouble(stored: NDArray[Any], kind: Kind) -> str | None:
    with np.errstate(all="ignore"):
        low, high = float(stored.min()), float(stored.max())
        if not (math.isfinite(low) and math.isfinite(high)):
            return "are not finite"
        if kind != "corrected" and low < 0:
            return f"fall to {low:.4g}"
        if kind != "counts":
            largest = max(high, -low)
            return f"reach {largest:.4g}" if largest > _LARGEST_TERM else None
        if high > MOST_COUNTS:
            return f"reach {high:.4g}, beyond {MOST_COUNTS}"
        if stored.dtype.kind == "f" and not np.array_equal(stored, np.rint(stored)):
            part = stored[stored != np.rint(stored)]
            return f"are no whole numbers ({float(part.flat[0]):.4g})"
    return None

"""PET: expected coincidences of an activity, in sinogram bins or event by event.

    expected counts = scale * factors * P G x + additive

x is activity in Bq/mL on a grid centred on the scanner, G a Gaussian resolution model in the image, P the line
integrals (mm) of Joseph's method with time-of-flight weights where the data have them, factors what a pair of crystals
loses or gains (attenuation, normalisation, number of pairs that a bin adds up) and additive the expected scattered and
random coincidences. A is the linear part, scale * factors * P G.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Self

import torch
from torch import Tensor

from recon3d import ops
from recon3d.geometry import TOF, Events, PETGeometry, PETScanner, VolumeGrid
from recon3d.operators.base import LinearOperator, Space

__all__ = ["PETListmode", "PETOperator", "herman_meyer", "quantitative_scale"]

_FWHM = 2 * math.sqrt(2 * math.log(2))


def herman_meyer(n: int) -> list[int]:
    """An order of n equally spaced views in which each lies far from those before it.

    The prime factors of n are the digits of a mixed radix; an index is read with its digits reversed (Herman and
    Meyer, IEEE TMI 12 (1993) 600).

    Raises:
        ValueError: n is below one.

    >>> herman_meyer(12)
    [0, 6, 3, 9, 1, 7, 4, 10, 2, 8, 5, 11]
    """
    if int(n) != n or n < 1:
        raise ValueError(f"herman_meyer: a whole number of at least one is needed, got {n}")
    factors, rest, prime = [], int(n), 2
    while rest > 1:
        if rest % prime == 0:
            factors.append(prime)
            rest //= prime
        else:
            prime += 1
    order = []
    for index in range(int(n)):
        weight, place = int(n), 0
        for factor in factors:
            index, digit = divmod(index, factor)
            weight //= factor
            place += digit * weight
        order.append(place)
    return order


def quantitative_scale(
    duration_s: float,
    half_life_s: float = math.inf,
    *,
    start_s: float = 0.0,
    branching: float = 1.0,
    dead_time: float = 1.0,
    calibration: float = 1.0,
) -> float:
    """Counts that one Bq/mL over one mm of a line gives: the `scale` of a PET operator.

        scale = calibration * branching / dead_time * duration * 2^(-start / half_life) * (1 - e^-a) / a,
        a = ln 2 * duration / half_life

    The last two terms are the decay from the reference time to the start of the frame and its mean over the frame; the
    usual decay correction a / (1 - e^-a) is the inverse of the latter. The image is activity at the reference time.

    Args:
        duration_s: length of the frame.
        half_life_s: of the isotope; infinite = no decay.
        start_s: start of the frame after the time that the image's activity refers to.
        branching: positrons per decay (F-18: 0.967).
        dead_time: correction factor for lost coincidences, at least 1.
        calibration: coincidences per second, positron per second and mL, and mm, that a bin with factor 1 counts.

    Raises:
        ValueError: a number outside its range.

    >>> round(quantitative_scale(600.0, 6586.2, branching=0.967), 3)
    562.261
    """
    for name, value, least in (
        ("duration_s", duration_s, 0.0),
        ("half_life_s", half_life_s, 0.0),
        ("branching", branching, 0.0),
        ("calibration", calibration, 0.0),
    ):
        if math.isnan(value) or value <= least or (math.isinf(value) and name != "half_life_s"):
            raise ValueError(f"quantitative_scale: {name} must be positive, got {value}")
    if branching > 1:
        raise ValueError(f"quantitative_scale: branching is at most 1, got {branching}")
    if not (math.isfinite(dead_time) and dead_time >= 1):
        raise ValueError(
            f"quantitative_scale: dead_time is the factor that corrects counts, at least 1, got {dead_time}; give the "
            "inverse of a live-time fraction"
        )
    if not math.isfinite(start_s):
        raise ValueError(f"quantitative_scale: start_s must be a time in seconds, got {start_s}")
    rate = math.log(2) / half_life_s
    a = rate * duration_s
    mean = -math.expm1(-a) / a if a > 0 else 1.0
    return calibration * branching / dead_time * duration_s * math.exp(-rate * start_s) * mean


class _Emission(LinearOperator):
    """What sinogram and list mode share: resolution model, factors, additive counts."""

    coupling = "volume"
    grid: VolumeGrid
    factors: Tensor | None
    additive: Tensor | None
    scale: float
    _sigma: tuple[float, float, float] | None

    def _project(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def _back_project(self, y: Tensor) -> Tensor:
        raise NotImplementedError

    def project(self, x: Tensor) -> Tensor:
        """P G x alone, without scale and factors, which EM weighs in together with the counts."""
        if tuple(x.shape[-3:]) != self.grid.shape:
            raise ValueError(
                f"{type(self).__name__}: the volume must end in {self.grid.shape}, got {tuple(x.shape)}; resample it "
                "onto the grid of the operator"
            )
        if self._sigma is not None:
            x = ops.gaussian_blur(x, self._sigma)
        return self._project(x)

    def forward(self, x: Tensor) -> Tensor:
        """scale * factors * P G x: expected true coincidences of x [..., z, y, x] in Bq/mL."""
        return self._weighted(self.project(x))

    def back_project(self, y: Tensor) -> Tensor:
        """Transpose of project."""
        if tuple(y.shape[-len(self.range.shape) :]) != self.range.shape:
            raise ValueError(
                f"{type(self).__name__}: the measurement must end in {self.range.shape}, got {tuple(y.shape)}"
            )
        x = self._back_project(y)
        return x if self._sigma is None else ops.gaussian_blur(x, self._sigma)

    def adjoint(self, y: Tensor) -> Tensor:
        """Transpose of forward: counts to [..., z, y, x]."""
        return self.back_project(self._weighted(y.clone() if not y.requires_grad and self._weighs else y))

    def expected(self, x: Tensor) -> Tensor:
        """Expected counts: forward(x) + additive."""
        y = self.forward(x)
        if self.additive is None:
            return y
        return y + self.additive if y.requires_grad else y.add_(self.additive.to(y.dtype))

    @property
    def _weighs(self) -> bool:
        return self.factors is not None or self.scale != 1.0

    def _weighted(self, y: Tensor) -> Tensor:
        """scale * factors * y, in place where nobody looks."""
        if not self._weighs:
            return y
        if y.requires_grad:
            y = y * self.scale
            return y if self.factors is None else y * self.factors.to(y.dtype)
        if self.scale != 1.0:
            y.mul_(self.scale)
        return y if self.factors is None else y.mul_(self.factors.to(y.dtype))


class PETOperator(_Emission):
    """Activity [..., z, y, x] in Bq/mL to counts in sinogram bins [..., view, radial, (tof,) plane].

    The volume is centred on the scanner, whatever the affine of its grid says.

    Args:
        geometry: the bins.
        grid: the volume; its slices must be the distance of the planes apart, or a whole fraction.
        factors: counts per unit of scale * P G x, broadcast to the bins; with time of flight [view, radial, plane] is
            the same for all time bins. None = 1.
        additive: expected scattered and random counts, like factors (but with time bins where the data have them);
            None = none.
        psf_fwhm_mm: resolution in the image, one width or (z, y, x).
        scale: counts of a bin with factor 1 for 1 Bq/mL along 1 mm; quantitative_scale makes it.

    Raises:
        ValueError: shapes that do not fit; factors or additive counts that are negative or not finite; a scale that
            is not positive.

    >>> from recon3d.geometry import pet_geometry
    >>> geometry = pet_geometry("small", span=3)
    >>> PETOperator(geometry, geometry.default_grid(n=32)).range.shape
    (96, 128, 175)
    """

    def __init__(
        self,
        geometry: PETGeometry,
        grid: VolumeGrid,
        *,
        factors: Tensor | None = None,
        additive: Tensor | None = None,
        psf_fwhm_mm: float | Sequence[float] | None = None,
        scale: float = 1.0,
    ) -> None:
        self.geometry = geometry
        self.grid = grid
        self.scale = _scale(scale)
        self.factors = _counts("factors", factors, geometry)
        self.additive = _counts("additive", additive, geometry)
        self._sigma = _sigma_voxels(psf_fwhm_mm, grid)
        self.psf_fwhm_mm = psf_fwhm_mm
        self.domain = Space(grid.shape, torch.float32, "Bq/mL")
        self.range = Space(geometry.shape, torch.float32, "counts")
        self._lines = torch.from_numpy(geometry.lines())
        self._segments = torch.from_numpy(geometry.segments)
        self._sensitivity: Tensor | None = None
        self._parts: dict[int, list[tuple[PETOperator, Tensor]]] = {}

    def sensitivity(self) -> Tensor:
        """A^T 1, [z, y, x]; computed once."""
        if self._sensitivity is None:
            self._sensitivity = self.adjoint(torch.ones(self.range.shape, device=self._device()))
        return self._sensitivity

    def subsets(self, n: int) -> list[tuple[PETOperator, Tensor]]:
        """n subsets of interleaved views (operator, indices along the view axis), in the order of Herman and Meyer.

        They are made once for every n, and keep their sensitivity. Factors are shared with the whole, not copied.

        Raises:
            ValueError: n is not between 1 and the number of views.
        """
        views = self.range.shape[0]
        if int(n) != n or not 1 <= n <= views:
            raise ValueError(f"PETOperator.subsets: 1..{views} subsets possible, got {n}")
        if n not in self._parts:
            self._parts[n] = [self._part(k, n) for k in herman_meyer(n)]
        return self._parts[n]

    def pinv(self, y: Tensor) -> Tensor:
        """An image for a look: corrected counts, rebinned to slices and filtered back, in Bq/mL; may be negative.

        Raises:
            NotImplementedError: the operator holds some of the views only.
        """
        from recon3d.operators.pet_rebin import rebinned_fbp

        return rebinned_fbp(self, y)

    def to(self, device: torch.device | str) -> PETOperator:
        """The same operator with its factors on another device."""
        moved = copy.copy(self)
        for name in ("factors", "additive", "_sensitivity"):
            value = getattr(self, name)
            setattr(moved, name, None if value is None else value.to(device))
        moved._parts = {}
        return moved

    def _part(self, first: int, step: int) -> tuple[PETOperator, Tensor]:
        views = torch.arange(first, self.range.shape[0], step)
        part = copy.copy(self)
        part.geometry = self.geometry.subset(views.numpy())
        part.range = replace(self.range, shape=part.geometry.shape)
        lines = self._lines.reshape(self.range.shape[0], -1, 4)
        part._lines = lines[first::step].reshape(-1, 4)
        for name in ("factors", "additive"):
            value = getattr(self, name)
            if value is not None and value.ndim == len(self.range.shape) and value.shape[0] > 1:
                setattr(part, name, value[first::step])
        part._sensitivity, part._parts = None, {}
        return part, views

    def _project(self, x: Tensor) -> Tensor:
        y = ops.joseph3d_sinogram(x, self._lines, self._segments, self.grid.spacing_mm, tof=self.geometry.tof)
        return y.reshape(*x.shape[:-3], *self.range.shape)

    def _back_project(self, y: Tensor) -> Tensor:
        rows = y.reshape(*y.shape[: y.ndim - len(self.range.shape)], -1, *self.range.shape[2:])
        return ops.joseph3d_sinogram_adjoint(
            rows, self._lines, self._segments, self.grid.shape, self.grid.spacing_mm, tof=self.geometry.tof
        )

    def _device(self) -> torch.device:
        held = self.factors if self.factors is not None else self.additive
        return torch.device("cpu") if held is None else held.device


class PETListmode(_Emission):
    """Activity [..., z, y, x] in Bq/mL to the expected counts of the bins that events fell into, [..., n].

    In the EM update every event stands for itself: y is 1 for each, and the sensitivity is that of all bins that could
    have counted, which the events alone do not tell.

    Args:
        events: coincidences; delayed ones must have been taken out.
        scanner: where the crystals are.
        grid: the volume.
        tof: time bins of the events; needed to use them.
        factors: [n] of the bins that the events fell into; None = 1.
        additive: [n] expected scattered and random counts of those bins; None = none.
        sensitivity: [z, y, x], PETOperator(...).sensitivity() with the same factors and scale.
        psf_fwhm_mm: resolution in the image, one width or (z, y, x).
        scale: as in PETOperator.

    Raises:
        ValueError: shapes that do not fit, delayed events, or time bins that are missing.
    """

    def __init__(
        self,
        events: Events,
        scanner: PETScanner,
        grid: VolumeGrid,
        *,
        tof: TOF | None = None,
        factors: Tensor | None = None,
        additive: Tensor | None = None,
        sensitivity: Tensor | None = None,
        psf_fwhm_mm: float | Sequence[float] | None = None,
        scale: float = 1.0,
    ) -> None:
        if not bool(events.prompt.all()):
            raise ValueError("PETListmode: delayed events are no activity; give events[events.prompt]")
        if tof is not None and events.tof_bins is None:
            raise ValueError("PETListmode: tof was given but the events have no time bins")
        self.events = events
        self.scanner = scanner
        self.grid = grid
        self.tof = tof
        self.scale = _scale(scale)
        for name, value in (("factors", factors), ("additive", additive)):
            if value is not None:
                _check_counts(f"PETListmode: {name}", value)
                if tuple(value.shape) != (len(events),):
                    raise ValueError(f"PETListmode: {name} must be [{len(events)}], got {tuple(value.shape)}")
        self.factors, self.additive = factors, additive
        if sensitivity is not None and tuple(sensitivity.shape) != grid.shape:
            raise ValueError(f"PETListmode: sensitivity must be {grid.shape}, got {tuple(sensitivity.shape)}")
        self._given = sensitivity
        self._sigma = _sigma_voxels(psf_fwhm_mm, grid)
        self.psf_fwhm_mm = psf_fwhm_mm
        self.domain = Space(grid.shape, torch.float32, "Bq/mL")
        self.range = Space((len(events),), torch.float32, "counts")
        self._points = torch.from_numpy(scanner.crystal_positions())
        self._parts: dict[int, list[tuple[PETListmode, Tensor]]] = {}

    def sensitivity(self) -> Tensor:
        """What was given.

        Raises:
            ValueError: nothing was.
        """
        if self._given is None:
            raise ValueError(
                "PETListmode: events do not tell the sensitivity; give sensitivity=PETOperator(...).sensitivity()"
            )
        return self._given

    def subsets(self, n: int) -> list[tuple[Self, Tensor]]:
        """n subsets of every n-th event (operator, indices); each has an n-th of the sensitivity.

        Raises:
            ValueError: n is not between 1 and the number of events.
        """
        if int(n) != n or not 1 <= n <= len(self.events):
            raise ValueError(f"PETListmode.subsets: 1..{len(self.events)} subsets possible, got {n}")
        if n not in self._parts:
            share = None if self._given is None else self._given / n
            self._parts[n] = [self._part(k, n, share) for k in herman_meyer(n)]
        return self._parts[n]  # type: ignore[return-value]

    def _part(self, first: int, step: int, share: Tensor | None) -> tuple[PETListmode, Tensor]:
        chosen = slice(first, None, step)
        part = copy.copy(self)
        part.events = self.events[chosen]
        part.factors = None if self.factors is None else self.factors[chosen]
        part.additive = None if self.additive is None else self.additive[chosen]
        part.range = replace(self.range, shape=(len(part.events),))
        part._given, part._parts = share, {}
        return part, torch.arange(first, len(self.events), step)

    def _project(self, x: Tensor) -> Tensor:
        bins = self.events.tof_bins if self.tof is not None else None
        return ops.joseph3d(x, self._points, self.events.pairs, self.grid.spacing_mm, tof=self.tof, tof_bins=bins)

    def _back_project(self, y: Tensor) -> Tensor:
        bins = self.events.tof_bins if self.tof is not None else None
        return ops.joseph3d_adjoint(
            y, self._points, self.events.pairs, self.grid.shape, self.grid.spacing_mm, tof=self.tof, tof_bins=bins
        )

    def _device(self) -> torch.device:
        return torch.device("cpu") if self._given is None else self._given.device


def _scale(scale: float) -> float:
    value = float(scale)
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"PET: scale must be a positive number of counts per Bq/mL and mm, got {scale}")
    return value


def _check_counts(what: str, value: Tensor) -> None:
    low = value.detach().amin()
    # a sum meets every NaN and infinity without a mask as large as the data
    if not (bool(low >= 0) and bool(value.detach().sum(dtype=torch.float64).isfinite())):
        raise ValueError(f"{what} must be finite and not negative; the smallest is {float(low):.6g}")


def _counts(name: str, value: Tensor | None, geometry: PETGeometry) -> Tensor | None:
    """Factors or additive counts, broadcastable to the bins, checked."""
    if value is None:
        return None
    if value.is_complex() or not value.is_floating_point():
        value = value.to(torch.float32)
    shape = geometry.shape
    if geometry.tof is not None and name == "factors" and tuple(value.shape) == (*shape[:2], shape[3]):
        value = value.unsqueeze(2)
    fits = value.ndim <= len(shape) and all(
        m in (1, n) for m, n in zip(reversed(value.shape), reversed(shape), strict=False)
    )
    if not fits:
        raise ValueError(
            f"PETOperator: {name} must be {shape} as [view, radial, {'tof, ' if len(shape) == 4 else ''}plane], or "
            f"broadcast to it, got {tuple(value.shape)}"
        )
    _check_counts(f"PETOperator: {name}", value)
    return value


def _sigma_voxels(fwhm_mm: float | Sequence[float] | None, grid: VolumeGrid) -> tuple[float, float, float] | None:
    if fwhm_mm is None:
        return None
    widths = (fwhm_mm,) * 3 if isinstance(fwhm_mm, (int, float)) else tuple(fwhm_mm)
    if len(widths) != 3 or not all(math.isfinite(w) and w >= 0 for w in widths):
        raise ValueError(f"PET: psf_fwhm_mm must be one width in mm or three (z, y, x), got {fwhm_mm}")
    if not any(widths):
        return None
    dz, dy, dx = grid.spacing_mm
    return widths[0] / _FWHM / dz, widths[1] / _FWHM / dy, widths[2] / _FWHM / dx

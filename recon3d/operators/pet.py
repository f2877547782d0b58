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

import torch
from torch import Tensor

from recon3d import ops
from recon3d.geometry import PETGeometry, VolumeGrid
from recon3d.operators.base import Space
from recon3d.operators.pet_model import EmissionOperator, check_counts, checked_scale, sigma_voxels
from recon3d.operators.pet_rebin import rebinned_fbp

__all__ = ["PETOperator", "herman_meyer"]

# bins at a time of which a sensitivity is formed
_SHARE = 1 << 23


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


class PETOperator(EmissionOperator):
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
        self.scale = checked_scale(scale)
        self.factors = _counts("factors", factors, geometry)
        self.additive = _counts("additive", additive, geometry)
        self._sigma = sigma_voxels(psf_fwhm_mm, grid)
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
            # a share of the views at a time: ones for all bins would be a whole measurement
            n = max(1, min(self.range.shape[0], math.prod(self.range.shape) // _SHARE))
            total = torch.zeros(self.domain.shape, device=self._device())
            for k in range(n):
                part, _ = self._part(k, n)
                total += part.adjoint(torch.ones(part.range.shape, device=self._device()))
            self._sensitivity = total
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

    def _project(self, x: Tensor, out: Tensor | None) -> Tensor:
        if out is not None:
            out = out.view(*x.shape[:-3], -1, *self.range.shape[2:])
        y = ops.joseph3d_sinogram(x, self._lines, self._segments, self.grid.spacing_mm, tof=self.geometry.tof, out=out)
        return y.reshape(*x.shape[:-3], *self.range.shape)

    def _back_project(self, y: Tensor) -> Tensor:
        rows = y.reshape(*y.shape[: y.ndim - len(self.range.shape)], -1, *self.range.shape[2:])
        return ops.joseph3d_sinogram_adjoint(
            rows, self._lines, self._segments, self.grid.shape, self.grid.spacing_mm, tof=self.geometry.tof
        )

    def _device(self) -> torch.device:
        held = self.factors if self.factors is not None else self.additive
        return torch.device("cpu") if held is None else held.device


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
    check_counts(f"PETOperator: {name}", value)
    return value

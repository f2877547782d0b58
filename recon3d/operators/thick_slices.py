"""Thick slices of a volume of thin ones: super-resolution along z.

    y_k = sum over thin slices j of P_kj x_j,    P_kj the part of thick slice k's profile that falls into thin slice j

Every row of P sums to one, so a thick slice has the brightness of what it averages. On its own the operator takes
images; with a scanner of thick slices behind it, k-space or sinograms.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from recon3d.operators.base import LinearOperator, Space

__all__ = ["ThickSlices"]

Profile = Literal["box", "gaussian"]


class ThickSlices(LinearOperator):
    """Thin slices [..., z, y, x] averaged to thick ones, then measured by a scanner if there is one.

    Thick slice k is centred at offset_mm + k spacing_mm from the centre of the first thin slice.

    Args:
        shape: the thin volume, (z, y, x).
        thin_mm: distance of thin slices.
        thick_mm: thickness of a thick slice: the width of a box, or the full width at half maximum of a Gaussian.
        spacing_mm: distance of thick slices; None takes thick_mm. More leaves gaps, less makes slices overlap.
        count: thick slices; None takes as many as have their centre inside the volume.
        offset_mm: centre of the first; None puts its lower face on that of the volume.
        profile: "box" or "gaussian".
        scanner: an operator on the thick volume [count, y, x]; None measures the thick volume itself.
        dtype: of the volume, where there is no scanner to tell.

    Raises:
        ValueError: sizes that do not fit, or a thick slice outside the volume.
    """

    coupling = "volume"

    def __init__(
        self,
        shape: tuple[int, int, int],
        thin_mm: float,
        thick_mm: float,
        *,
        spacing_mm: float | None = None,
        count: int | None = None,
        offset_mm: float | None = None,
        profile: Profile = "box",
        scanner: LinearOperator | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        spacing = thick_mm if spacing_mm is None else spacing_mm
        for name, value in (("thin_mm", thin_mm), ("thick_mm", thick_mm), ("spacing_mm", spacing)):
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"ThickSlices: {name} must be positive, got {value}")
        if profile not in ("box", "gaussian"):
            raise ValueError(f"ThickSlices: profile must be 'box' or 'gaussian', got {profile!r}")
        first = (thick_mm - thin_mm) / 2 if offset_mm is None else offset_mm
        last = (shape[0] - 0.5) * thin_mm
        if count is None:
            count = max(1, math.floor((last - first) / spacing * (1 + 1e-9)) + 1)
        centres = first + spacing * torch.arange(count, dtype=torch.float64)
        if count < 1 or not (-0.5 * thin_mm <= first and float(centres[-1]) <= last * (1 + 1e-9)):
            raise ValueError(
                f"ThickSlices: {count} slices every {spacing:g} mm from {first:g} mm do not lie within the volume, "
                f"which reaches from {-thin_mm / 2:g} to {last:g} mm"
            )
        if scanner is not None and tuple(scanner.domain.shape) != (count, *shape[1:]):
            raise ValueError(
                f"ThickSlices: the scanner is for {scanner.domain.shape}, the thick volume is {(count, *shape[1:])}"
            )
        self.scanner = scanner
        self.weights = _profile(centres, shape[0], thin_mm, thick_mm, profile)
        kind = dtype if scanner is None else scanner.domain.dtype
        unit = "1" if scanner is None else scanner.domain.unit
        self.domain = Space(tuple(shape), kind, unit)
        self.range = Space((count, *shape[1:]), kind, unit) if scanner is None else scanner.range

    def forward(self, x: Tensor) -> Tensor:
        """P x, [..., z, y, x] -> [..., thick slice, y, x], measured by the scanner."""
        if tuple(x.shape[-3:]) != self.domain.shape:
            raise ValueError(f"ThickSlices: the volume must end in {self.domain.shape}, got {tuple(x.shape)}")
        thick = _mix(self.weights, x)
        return thick if self.scanner is None else self.scanner.forward(thick)

    def adjoint(self, y: Tensor) -> Tensor:
        """Transpose of forward."""
        return _mix(self.weights.T, y if self.scanner is None else self.scanner.adjoint(y))

    def normal(self, x: Tensor, weights: Tensor | None = None) -> Tensor:
        """A^H W A x through the scanner's own normal operator."""
        if self.scanner is None:
            return super().normal(x, weights)
        return _mix(self.weights.T, self.scanner.normal(_mix(self.weights, x), weights))

    def residual(self, x: Tensor, y: Tensor, weights: Tensor | None = None) -> Tensor:
        """A^H W (y - A x) through the scanner's own residual."""
        if self.scanner is None:
            return super().residual(x, y, weights)
        return _mix(self.weights.T, self.scanner.residual(_mix(self.weights, x), y, weights))

    def pinv(self, y: Tensor) -> Tensor:
        """Linear interpolation between the centres of the thick slices, constant beyond them."""
        thick = y if self.scanner is None else self.scanner.pinv(y)
        return _mix(self._interpolation(), thick)

    def _interpolation(self) -> Tensor:
        count, thin = self.weights.shape
        at = torch.arange(thin, dtype=torch.float64)
        centres = (self.weights * at).sum(1)
        if count == 1:
            return torch.ones(thin, 1, dtype=torch.float64)
        right = torch.searchsorted(centres, at).clamp(1, count - 1)
        t = ((at - centres[right - 1]) / (centres[right] - centres[right - 1])).clamp(0, 1)
        out = torch.zeros(thin, count, dtype=torch.float64)
        rows = torch.arange(thin)
        out[rows, right - 1] = 1 - t
        out[rows, right] += t
        return out

    def _device(self) -> torch.device:
        return torch.device("cpu") if self.scanner is None else self.scanner._device()


def _profile(centres: Tensor, thin: int, thin_mm: float, thick_mm: float, profile: Profile) -> Tensor:
    """[thick, thin] float64 integrals of the profile over the thin slices, rows summing to one."""
    edges = (torch.arange(thin + 1, dtype=torch.float64) - 0.5) * thin_mm
    u = (edges - centres[:, None]) / thick_mm
    # integral of the profile up to an edge; a Gaussian of full width at half maximum 1 has this width
    rising = (u + 0.5).clamp(0, 1) if profile == "box" else 0.5 * (1 + torch.erf(2 * math.sqrt(math.log(2)) * u))
    weights = rising.diff(dim=1)
    return weights / weights.sum(1, keepdim=True)


def _mix(matrix: Tensor, x: Tensor) -> Tensor:
    """A real matrix times the z axis of [..., z, y, x]."""
    real = torch.view_as_real(x) if x.is_complex() else x
    rows = real.flatten(x.ndim - 2)
    out = (matrix.to(real.device, real.dtype) @ rows).reshape(*x.shape[:-3], matrix.shape[0], *real.shape[x.ndim - 2 :])
    return torch.view_as_complex(out) if x.is_complex() else out

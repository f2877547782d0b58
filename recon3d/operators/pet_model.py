"""What PET operators of sinograms and of list mode share: resolution model, factors, scale, additive counts."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from recon3d import ops
from recon3d.geometry import VolumeGrid
from recon3d.operators.base import LinearOperator

__all__ = ["EmissionOperator", "check_counts", "checked_scale", "sigma_voxels"]

_FWHM = 2 * math.sqrt(2 * math.log(2))


class EmissionOperator(LinearOperator):
    """What sinogram and list mode share: resolution model, factors, additive counts."""

    coupling = "volume"
    grid: VolumeGrid
    factors: Tensor | None
    additive: Tensor | None
    scale: float
    _sigma: tuple[float, float, float] | None

    def _project(self, x: Tensor, out: Tensor | None) -> Tensor:
        raise NotImplementedError

    def _back_project(self, y: Tensor) -> Tensor:
        raise NotImplementedError

    def project(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """P G x alone, without scale and factors, which EM weighs in together with the counts.

        Args:
            x: activity [..., z, y, x].
            out: what an earlier call gave for as many volumes, to be overwritten; sinograms alone take it.
        """
        if tuple(x.shape[-3:]) != self.grid.shape:
            raise ValueError(
                f"{type(self).__name__}: the volume must end in {self.grid.shape}, got {tuple(x.shape)}; resample it "
                "onto the grid of the operator"
            )
        if self._sigma is not None:
            x = ops.gaussian_blur(x, self._sigma)
        return self._project(x, out)

    def forward(self, x: Tensor) -> Tensor:
        """scale * factors * P G x: expected true coincidences of x [..., z, y, x] in Bq/mL."""
        return self._weighted(self.project(x))

    def back_project(self, y: Tensor) -> Tensor:
        """Transpose of project."""
        self._check_measurement(y)
        x = self._back_project(y)
        return x if self._sigma is None else ops.gaussian_blur(x, self._sigma)

    def adjoint(self, y: Tensor) -> Tensor:
        """Transpose of forward: counts to [..., z, y, x]."""
        self._check_measurement(y)
        return self.back_project(self._weighted(y.clone() if not y.requires_grad and self._weighs else y))

    def expected(self, x: Tensor) -> Tensor:
        """Expected counts: forward(x) + additive."""
        y = self.forward(x)
        if self.additive is None:
            return y
        return y + self.additive if y.requires_grad else y.add_(self.additive.to(y.dtype))

    def _check_measurement(self, y: Tensor) -> None:
        if tuple(y.shape[-len(self.range.shape) :]) != self.range.shape:
            raise ValueError(
                f"{type(self).__name__}: the measurement must end in {self.range.shape}, got {tuple(y.shape)}"
            )

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


def checked_scale(scale: float) -> float:
    """The scale as a number; ValueError unless it is positive and finite."""
    value = float(scale)
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"PET: scale must be a positive number of counts per Bq/mL and mm, got {scale}")
    return value


def check_counts(what: str, value: Tensor) -> None:
    """ValueError when a factor or a count is negative or not finite."""
    low = value.detach().amin()
    # a sum meets every NaN and infinity without a mask as large as the data
    if not (bool(low >= 0) and bool(value.detach().sum().isfinite())):
        raise ValueError(f"{what} must be finite and not negative; the smallest is {float(low):.6g}")


def sigma_voxels(fwhm_mm: float | Sequence[float] | None, grid: VolumeGrid) -> tuple[float, float, float] | None:
    """Standard deviations (z, y, x) in voxels of a resolution given as full width at half maximum; None for none."""
    if fwhm_mm is None:
        return None
    widths = (fwhm_mm,) * 3 if isinstance(fwhm_mm, (int, float)) else tuple(fwhm_mm)
    if len(widths) != 3 or not all(math.isfinite(w) and w >= 0 for w in widths):
        raise ValueError(f"PET: psf_fwhm_mm must be one width in mm or three (z, y, x), got {fwhm_mm}")
    if not any(widths):
        return None
    dz, dy, dx = grid.spacing_mm
    return widths[0] / _FWHM / dz, widths[1] / _FWHM / dy, widths[2] / _FWHM / dx

"""A preconditioner for proximal data terms of tomography: in few iterations what plain conjugate gradients need 20 for.

For projections A^T A blurs with about 1/|k|, and weighting rays by W multiplies by a slowly varying map,

    A^T W A + rho I  ~  E (K + rho <1/w> I) E,     w = A^T W 1 / A^T 1,  E = diag(sqrt w),  K a filter in the plane.

K's radial spectrum is measured with one projection and back projection of noise; nothing about the scanner is
assumed, and an operator that is nothing like this gets a poor but valid preconditioner. With
S = E^-1 (K + rho <1/w>)^(-1/2) the system S^T H S d = S^T r is solved and x = x0 + S d. Filter and map after Fessler
and Booth (IEEE TIP 8 (1999) 688).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from recon3d.operators.base import LinearOperator
from recon3d.ops.philox import philox_normal

__all__ = ["FilterPreconditioner"]

# of the spectrum's and the map's largest value: directions seen less than this count as seen that much
_FLOOR = 1e-3
# slices that the spectrum is measured on, and slices that are filtered at once (bounds the temporaries)
_PROBES = 8
_CHUNK = 8


@dataclass
class FilterPreconditioner:
    """S and its transpose for one operator and one set of weights.

    Attributes:
        spectrum: K over [row, column >= 0] frequencies.
        root: E, [z, y, x], or None where the weights are one number.
        softening: <1/w>, which turns rho into K's unit.
        shape: rows and columns of a slice.
    """

    spectrum: Tensor
    root: Tensor | None
    softening: float
    shape: tuple[int, int]

    @classmethod
    def of(cls, operator: LinearOperator, weights: Tensor | None, y: Tensor) -> FilterPreconditioner:
        """Measure one; costs about two projections.

        Args:
            operator: with slice coupling, taking any number of slices.
            weights: inverse variances, broadcast over y; or None.
            y: a measurement, for shape, dtype and device.

        Raises:
            ValueError: the operator couples slices.
        """
        if operator.coupling != "slice":
            raise ValueError("FilterPreconditioner: the operator couples slices; set consistency.precondition to none")
        depth, rows, columns = operator.domain.shape
        root, softening = None, 1.0
        if weights is not None and weights.numel() > 1:
            seen = operator.adjoint(torch.ones_like(y[:1]))
            w = operator.adjoint(weights.expand_as(y).contiguous())
            w /= seen.clamp_(min=_FLOOR * float(seen.max()))
            w.clamp_(min=_FLOOR * float(w.max()))
            softening = float(w.reciprocal().mean(dtype=torch.float64))
            root = w.sqrt_()
        picked = torch.linspace(0, depth - 1, min(_PROBES, depth)).round().long().to(y.device)
        z = philox_normal(0, 0, len(picked), (rows, columns), dtype=y.dtype, device=y.device)
        part = weights[picked] if weights is not None and weights.shape[0] == depth else weights
        near = root[picked] if root is not None else 1.0
        response = operator.normal(z / near, part) / near
        return cls(_radial_spectrum(z, response), root, softening, (rows, columns))

    def apply(self, d: Tensor, rho: float) -> Tensor:
        """S d."""
        gain, out = self._gain(rho), torch.empty_like(d)
        for part in _chunks(d.shape[0]):
            filtered = self._filtered(d[part], gain)
            out[part] = filtered if self.root is None else filtered.div_(self.root[part])
        return out

    def transpose_(self, r: Tensor, rho: float) -> Tensor:
        """S^T r, in the place of r."""
        gain = self._gain(rho)
        for part in _chunks(r.shape[0]):
            r[part] = self._filtered(r[part] if self.root is None else r[part] / self.root[part], gain)
        return r

    def _gain(self, rho: float) -> Tensor:
        return (self.spectrum + rho * self.softening).rsqrt()

    def _filtered(self, v: Tensor, gain: Tensor) -> Tensor:
        return torch.fft.irfft2(torch.fft.rfft2(v).mul_(gain), s=self.shape)


def _chunks(n: int) -> list[slice]:
    return [slice(k, k + _CHUNK) for k in range(0, n, _CHUNK)]


def _radial_spectrum(z: Tensor, response: Tensor) -> Tensor:
    """<F z, F response> / <F z, F z> averaged over rings of equal frequency, laid out as rfft2's output."""
    rows, columns = z.shape[-2:]
    fz = torch.fft.rfft2(z)
    power = fz.abs().square().sum(0).double().cpu()
    cross = (fz.conj() * torch.fft.rfft2(response)).real.sum(0).double().cpu()
    ky, kx = torch.fft.fftfreq(rows)[:, None], torch.fft.rfftfreq(columns)[None]
    ring = (torch.hypot(ky, kx) * max(rows, columns)).round().long()
    sums = torch.zeros(2, int(ring.max()) + 1, dtype=torch.float64)
    sums[0].index_add_(0, ring.flatten(), cross.flatten())
    sums[1].index_add_(0, ring.flatten(), power.flatten())
    profile = sums[0] / sums[1].clamp(min=1e-300)
    profile.clamp_(min=_FLOOR * float(profile.max()))
    return profile[ring].to(z)

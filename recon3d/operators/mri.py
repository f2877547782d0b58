"""Multi-coil MRI of a stack of slices, Cartesian: coil maps, centred orthonormal FFT, sampling mask.

    y_zc = M F (S_zc x_z)          A^H A x_z = sum over coils of conj(S_zc) F^H M F (S_zc x_z)

(Pruessmann et al., MRM 42 (1999) 952.) Images are complex; inner products and adjoints are Hermitian.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Self

import torch
from torch import Tensor

from recon3d.operators.base import LinearOperator, Space
from recon3d.operators.fourier import centred_fft, centred_ifft

__all__ = ["CartesianMRI", "MRIOperator"]


class MRIOperator(LinearOperator):
    """What all multi-coil operators share: coil maps, and a residual that goes through the normal operator.

    Attributes:
        maps: coil maps.
    """

    maps: Tensor
    _given: tuple[Tensor, int, Tensor | None, int, Tensor] | None = None

    def residual(self, x: Tensor, y: Tensor, weights: Tensor | None = None) -> Tensor:
        """A^H W (y - A x) as A^H W y - A^H W A x; the first term is kept for the next call with the same y."""
        key = (id(y), y._version, id(weights), 0 if weights is None else weights._version)
        held = self._given
        if held is None or (id(held[0]), held[1], id(held[2]), held[3]) != key:
            rhs = self.adjoint(y if weights is None else y * weights)
            self._given = held = (y, key[1], weights, key[3], rhs)
        return held[4] - self.normal(x, weights)

    @abstractmethod
    def coil_images(self, y: Tensor) -> Tensor:
        """The image of every coil, transformed back with the density divided out: like the maps."""

    def rss(self, y: Tensor) -> Tensor:
        """Root of the sum of squares of the coil images, [z, y, x] real: an image without maps."""
        images = self.coil_images(y)
        return torch.linalg.vector_norm(images, dim=-3 if self.coupling == "slice" else -4)

    def norm(self, weights: Tensor | None = None, iterations: int = 20) -> float:
        """As LinearOperator.norm; a single weight scales the plain value."""
        if weights is not None and weights.numel() == 1:
            return abs(weights.item()) * self.norm(None, iterations)
        return super().norm(weights, iterations)

    def _device(self) -> torch.device:
        return self.maps.device


class CartesianMRI(MRIOperator):
    """A volume [..., z, y, x] to the sampled points of the k-space of every coil, [..., z, coil, ky, kx].

    Points that the mask leaves out are zero. Slices are independent.

    Args:
        mask: 1 where k-space was sampled and 0 elsewhere, broadcast to [slice, ky, kx].
        maps: coil maps, [slice, coil, y, x] complex64; the device of the operator is theirs.

    Raises:
        ValueError: shapes that do not fit, or a mask or maps with NaN.
        TypeError: complex mask or real maps.
    """

    coupling = "slice"

    def __init__(self, mask: Tensor, maps: Tensor) -> None:
        _check_maps("CartesianMRI", maps)
        self.maps = maps
        self.mask = _mask("CartesianMRI", mask, maps)
        slices, coils, ny, nx = maps.shape
        self.domain = Space((slices, ny, nx), torch.complex64, "1")
        self.range = Space((slices, coils, ny, nx), torch.complex64, "1")

    def forward(self, x: Tensor) -> Tensor:
        """M F S x: [..., z, y, x] -> [..., z, coil, ky, kx], slice by slice."""
        _check_shape("CartesianMRI", "the volume", x, self.domain.shape)
        out = x.new_empty((*x.shape[:-3], *self.range.shape), dtype=torch.promote_types(x.dtype, self.maps.dtype))
        for k in range(x.shape[-3]):
            out[..., k, :, :, :] = centred_fft(x[..., k, None, :, :] * self.maps[k]) * self._rows(k)
        return out

    def adjoint(self, y: Tensor) -> Tensor:
        """Conjugate transpose of forward: [..., z, coil, ky, kx] -> [..., z, y, x]."""
        _check_shape("CartesianMRI", "k-space", y, self.range.shape)
        kind = torch.promote_types(y.dtype, self.maps.dtype)
        out = y.new_empty((*y.shape[:-4], *self.domain.shape), dtype=kind)
        for k in range(y.shape[-4]):
            images = centred_ifft(y[..., k, :, :, :] * self._rows(k))
            out[..., k, :, :] = (images * self.maps[k].conj()).sum(-3)
        return out

    def normal(self, x: Tensor, weights: Tensor | None = None) -> Tensor:
        """A^H W A x; k-space exists for one slice at a time."""
        _check_shape("CartesianMRI", "the volume", x, self.domain.shape)
        out = x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, self.maps.dtype))
        if weights is not None and weights.numel() > 1:
            weights = weights.broadcast_to(torch.broadcast_shapes(weights.shape, self.range.shape))
        for k in range(x.shape[-3]):
            y = centred_fft(x[..., k, None, :, :] * self.maps[k]) * self._rows(k).square()
            if weights is not None and weights.numel() > 1:
                y = y * weights[..., k, :, :, :]
            out[..., k, :, :] = (centred_ifft(y) * self.maps[k].conj()).sum(-3)
        return out if weights is None or weights.numel() > 1 else out * weights.reshape(())

    def pinv(self, y: Tensor) -> Tensor:
        """Zero-filled: coil images combined with the maps, the least-squares image of a full k-space."""
        return self.adjoint(y) * _inverse_power(self.maps)

    def coil_images(self, y: Tensor) -> Tensor:
        """Zero-filled image of every coil, [..., z, coil, y, x]."""
        _check_shape("CartesianMRI", "k-space", y, self.range.shape)
        return torch.stack([centred_ifft(y[..., k, :, :, :] * self._rows(k)) for k in range(y.shape[-4])], -4)

    def slab(self, start: int, stop: int) -> Self:
        """The operator of slices start to stop - 1 alone."""
        _check_slab("CartesianMRI", start, stop, self.domain.shape[0])
        mask = self.mask if self.mask.shape[0] == 1 else self.mask[start:stop]
        return type(self)(mask, self.maps[start:stop])

    def to(self, device: str | torch.device) -> Self:
        """The same operator on a device."""
        return type(self)(self.mask.to(device), self.maps.to(device))

    def _rows(self, k: int) -> Tensor:
        return self.mask[k if self.mask.shape[0] > 1 else 0]


def _inverse_power(maps: Tensor) -> Tensor:
    power = maps.abs().square().sum(-3)
    return torch.where(power > 1e-6 * power.amax(), 1 / power, 0.0)


def _mask(what: str, mask: Tensor, maps: Tensor) -> Tensor:
    if mask.is_complex():
        raise TypeError(f"{what}: the mask must be real, 1 where k-space was sampled, got {mask.dtype}")
    slices, _, ny, nx = maps.shape
    shape = (1,) * (3 - mask.ndim) + tuple(mask.shape)
    if len(shape) != 3 or any(m not in (1, n) for m, n in zip(shape, (slices, ny, nx), strict=True)):
        raise ValueError(
            f"{what}: the mask {tuple(mask.shape)} does not broadcast to [slice, ky, kx] = {(slices, ny, nx)}; "
            "give one for the k-space that the maps belong to"
        )
    mask = mask.reshape(shape).to(maps.device, maps.real.dtype)
    if not bool(mask.isfinite().all()):
        raise ValueError(f"{what}: the mask holds NaN or infinity; give 1 where k-space was sampled and 0 elsewhere")
    # what is the same along an axis is stored once, which lets the normal operator skip that axis
    if mask.shape[1] > 1 and bool((mask == mask[:, :1]).all()):
        mask = mask[:, :1]
    if mask.shape[2] > 1 and bool((mask == mask[:, :, :1]).all()):
        mask = mask[:, :, :1]
    return mask.contiguous()


def _check_maps(what: str, maps: Tensor, ndim: int = 4) -> None:
    if not maps.is_complex():
        raise TypeError(f"{what}: coil maps must be complex, got {maps.dtype}")
    if maps.ndim != ndim or maps.numel() == 0:
        axes = "[slice, coil, y, x]" if ndim == 4 else "[coil, z, y, x]"
        raise ValueError(f"{what}: coil maps must be {axes}, got {tuple(maps.shape)}")
    if not bool(torch.view_as_real(maps).isfinite().all()):
        raise ValueError(f"{what}: the coil maps hold NaN or infinity; set them to zero outside the object")


def _check_shape(what: str, name: str, x: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(x.shape[-len(shape) :]) != shape:
        raise ValueError(f"{what}: {name} must end in {shape}, got {tuple(x.shape)}")


def _check_slab(what: str, start: int, stop: int, slices: int) -> None:
    if not 0 <= start < stop <= slices:
        raise ValueError(f"{what}.slab: 0 <= start < stop <= {slices} expected, got {start}, {stop}")

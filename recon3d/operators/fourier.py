"""Centred orthonormal Fourier transforms, and the FFT along one axis that makes the planes of a 3D scan independent.

Index i of an axis of length N is the position or frequency i - N//2, the sign is e^-i forwards and the scale 1/sqrt(N)
per axis, so the inverse is the conjugate transpose.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["centred_fft", "centred_ifft", "decouple_readout", "decouple_stack"]


def centred_fft(x: Tensor, dims: Sequence[int] = (-2, -1)) -> Tensor:
    """Image to k-space along the given axes.

    Args:
        x: [...] real or complex.
        dims: axes to transform.

    Returns:
        complex, the shape of x.

    >>> centred_fft(torch.ones(2, 2)).real.tolist()
    [[0.0, 0.0], [0.0, 2.0]]
    """
    dims = tuple(dims)
    return torch.fft.fftshift(torch.fft.fftn(torch.fft.ifftshift(x, dims), dim=dims, norm="ortho"), dims)


def centred_ifft(y: Tensor, dims: Sequence[int] = (-2, -1)) -> Tensor:
    """K-space to image, the inverse and conjugate transpose of centred_fft.

    Args:
        y: [...] real or complex.
        dims: axes to transform.

    Returns:
        complex, the shape of y.
    """
    dims = tuple(dims)
    return torch.fft.fftshift(torch.fft.ifftn(torch.fft.ifftshift(y, dims), dim=dims, norm="ortho"), dims)


def decouple_stack(kspace: Tensor) -> Tensor:
    """A stack of stars or spirals as independent slices: the inverse FFT along kz, once.

    Every kz must have been measured with the same trajectory.

    Args:
        kspace: [kz, coil, sample] or [kz, coil, ky, kx] complex.

    Returns:
        [slice, coil, ...], the k-space of each slice; white noise stays white with the same level.

    Raises:
        ValueError: fewer than three axes.
    """
    if kspace.ndim < 3:
        raise ValueError(f"decouple_stack: expected [kz, coil, sample], got {tuple(kspace.shape)}")
    return centred_ifft(kspace, (0,))


def decouple_readout(kspace: Tensor, axis: int = -1) -> Tensor:
    """A 3D Cartesian scan as independent slices: the inverse FFT along the readout, which is fully sampled.

    Args:
        kspace: [coil, kz, ky, kx] complex.
        axis: the fully sampled axis; the slices of the answer lie along it.

    Returns:
        [slice, coil, ...] with the two other k-space axes in their order.

    Raises:
        ValueError: not four axes, or `axis` is the coil's.
    """
    if kspace.ndim != 4:
        raise ValueError(f"decouple_readout: expected [coil, kz, ky, kx], got {tuple(kspace.shape)}")
    if axis % 4 == 0 or not -4 <= axis < 4:
        raise ValueError(f"decouple_readout: axis must be one of -3, -2, -1 (kz, ky, kx), got {axis}")
    return centred_ifft(kspace, (axis,)).movedim(axis, 0).contiguous()

"""Multi-coil k-space made from a known volume."""

from __future__ import annotations

import torch
from torch import Tensor

from recon3d.operators.base import LinearOperator
from recon3d.operators.mri import CartesianMRI
from recon3d.operators.noise import GaussianNoise

__all__ = ["simulate_mri"]


def simulate_mri(
    volume: Tensor,
    operator: LinearOperator,
    phase: Tensor | None = None,
    noise: GaussianNoise | None = None,
    seed: int = 0,
) -> Tensor:
    """K-space of a volume: what the operator measures, with noise where it samples.

    Args:
        volume: [z, y, x], a magnitude or a complex image.
        operator: CartesianMRI or NonCartesianMRI.
        phase: exp(i phase) of the image, [z, y, x] complex, such as recon3d.testing.phantoms.smooth_phase; None leaves
            the volume as it is.
        noise: sigma is that of the real and of the imaginary part; None for noise-free k-space.
        seed: of the noise.

    Returns:
        complex64 in the operator's range; Cartesian points that are not sampled are zero.

    Raises:
        ValueError: shapes disagree.

    >>> from recon3d.testing.phantoms import coil_maps
    >>> operator = CartesianMRI(torch.ones(8), coil_maps(4, (2, 8, 8)))
    >>> simulate_mri(torch.ones(2, 8, 8), operator, noise=GaussianNoise(0.1)).shape
    torch.Size([2, 4, 8, 8])
    """
    if tuple(volume.shape) != operator.domain.shape:
        raise ValueError(f"simulate_mri: the volume is {tuple(volume.shape)}, the operator's {operator.domain.shape}")
    image = volume.to(torch.complex64)
    if phase is not None:
        if phase.shape != volume.shape:
            raise ValueError(f"simulate_mri: the phase is {tuple(phase.shape)}, the volume {tuple(volume.shape)}")
        image = image * phase.to(image)
    clean = operator(image)
    if noise is None:
        return clean
    y = noise.simulate(clean, seed)
    return y.mul_(operator.mask[:, None] != 0) if isinstance(operator, CartesianMRI) else y

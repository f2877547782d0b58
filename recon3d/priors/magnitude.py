"""Priors of complex slices asked about real images: magnitudes of MR as they come in NIfTI and DICOM files."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from recon3d.ops.philox import philox_normal
from recon3d.priors.base import ModelCard, Prior

__all__ = ["MagnitudePrior"]


class MagnitudePrior:
    """A network of two channels, real and imaginary part, as a prior of real slices.

    A real image is a complex one whose imaginary part is known to be zero, so the second channel is shown zero plus
    noise of the state's level. That noise is the same for all slices and levels: a call depends on nothing but its
    arguments.

    Args:
        prior: a prior whose card has two channels.
        scale: user units per network unit; for an MR image a high percentile over the whole volume.

    Raises:
        ValueError: the card has another number of channels, or scale is not positive.
    """

    offset = 0.0

    def __init__(self, prior: Prior, scale: float) -> None:
        if prior.card.channels != 2:
            raise ValueError(
                f"MagnitudePrior: prior {prior.card.name!r} must have 2 channels, real and imaginary part, got "
                f"{prior.card.channels}; a prior of real images needs no adapter"
            )
        if not (math.isfinite(scale) and scale > 0):
            raise ValueError(f"MagnitudePrior: scale must be positive user units per network unit, got {scale}")
        self.prior = prior
        self.card: ModelCard = prior.card
        self.scale = float(scale)
        # from this prior's user unit to that of the other, whose network unit is the same
        self._factor = prior.scale / self.scale

    def denoise(self, u: Tensor, sigma: float, cond: Tensor | None = None) -> Tensor:
        """E[x0 | x0 + sigma eps = u] for u [batch, 1, row, col] in user units; cond goes on to the prior.

        Raises:
            ValueError: u has other axes, or the prior refuses sigma or cond.
        """
        if u.ndim != 4 or u.shape[1] != 1:
            raise ValueError(f"denoise: u must be [batch, 1, row, col] for real images, got {tuple(u.shape)}")
        level = sigma * self._factor
        z = philox_normal(0, 0, 1, tuple(u.shape[-2:]), dtype=u.dtype, device=u.device)
        beside = (self.prior.offset + level * z).expand(u.shape[0], *u.shape[-2:])
        x = torch.stack([u[:, 0] * self._factor + self.prior.offset, beside], 1)
        d = self.prior.denoise(x, level, *(() if cond is None else (cond,)))
        return (d[:, :1] - self.prior.offset) / self._factor

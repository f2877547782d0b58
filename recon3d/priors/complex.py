"""Priors of complex slices (MRI) made from networks that know real channels only.

A complex state u = x0 + sigma (e_r + i e_i), with sigma per real component, is two real images under white noise of
one level, so a real denoiser takes it without any change to the noise arithmetic:

* `TwoChannelPrior`: a network of two channels a slice sees both parts at once and can use that they share edges;
* `RealImaginaryPrior`: a network of one channel a slice sees the parts as slices of their own (Chung, Ye: Score-based
  diffusion models for accelerated MRI, Medical Image Analysis 2022). Cheap to have, blind to what the parts share.

Both take u in the scanner's units: network value = part / scale, so a part that is 0 is 0 to the network. An offset of
the network's own card plays no role, for an image without signal is 0 whatever its phase.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from recon3d.priors.base import ModelCard, Prior
from recon3d.priors.gaussian import ComplexGaussianPrior

__all__ = ["RealImaginaryPrior", "TwoChannelPrior", "complex_prior"]


class _Parts:
    """The real and the imaginary parts of u as channels of a real prior."""

    card: ModelCard
    offset = 0.0

    def __init__(self, prior: Prior, scale: float, parts: int) -> None:
        slices = prior.card.slices
        channels = parts * slices
        if prior.card.channels != channels:
            other = "RealImaginaryPrior" if parts == 2 else "TwoChannelPrior"
            raise ValueError(
                f"{type(self).__name__}: prior {prior.card.name!r} must have {channels} channel"
                f"{'s' * (channels > 1)}, got {prior.card.channels}; {other} is for the other kind"
            )
        if not (math.isfinite(scale) and scale > 0):
            raise ValueError(f"{type(self).__name__}: scale must be positive user units per network unit, got {scale}")
        self.prior = prior
        self.card = prior.card
        self.scale = float(scale)
        self._slices, self._channels = slices, channels
        # from this prior's user unit to that of the real one, whose network unit is the same
        self._factor = prior.scale / self.scale

    def denoise(self, u: Tensor, sigma: float, cond: Tensor | None = None) -> Tensor:
        """E[x0 | x0 + sigma (e_r + i e_i) = u].

        Args:
            u: state, [batch, 1, row, col] complex64 or complex128 in user units; for a prior of several slices
                [batch, slice, row, col], and the network is given all real parts, then all imaginary parts.
            sigma: noise level of a real component in user units, positive.
            cond: handed on to the real prior.

        Returns:
            The denoised slices with the shape and dtype of u.

        Raises:
            ValueError: u is real or has other axes, or the real prior refuses sigma or cond.
        """
        if not u.is_complex() or u.ndim != 4 or u.shape[1] != self._slices:
            raise ValueError(
                f"denoise: u must be complex [batch, {self._slices}, row, col] for a complex prior, "
                f"got {str(u.dtype).removeprefix('torch.')} {tuple(u.shape)}"
            )
        b, s, h, w = u.shape
        parts = torch.view_as_real(u).movedim(-1, 1)  # [batch, 2, slice, row, col]
        x = parts.reshape(-1, self._channels, h, w) * self._factor + self.prior.offset
        d = self.prior.denoise(x, sigma * self._factor, cond)
        d = ((d - self.prior.offset) / self._factor).reshape(b, 2, s, h, w)
        return torch.complex(d[:, 0], d[:, 1])


class TwoChannelPrior(_Parts):
    """A network of two channels a slice, real and imaginary part, as a prior of complex slices.

    Args:
        prior: a prior whose card has two channels a slice. scale: user units per network unit; for an MR image a high
        percentile of its magnitude over the whole volume.
    """

    def __init__(self, prior: Prior, scale: float) -> None:
        super().__init__(prior, scale, 2)


class RealImaginaryPrior(_Parts):
    """A network of one channel a slice, applied to the real and to the imaginary part as to two slices.

    Args:
        prior: a prior whose card has one channel a slice. scale: user units per network unit, as for `TwoChannelPrior`.
    """

    def __init__(self, prior: Prior, scale: float) -> None:
        super().__init__(prior, scale, 1)


def complex_prior(prior: Prior, scale: float) -> Prior:
    """A prior of complex slices from what is at hand.

    Args:
        prior: of one or two channels a slice; one that is complex already is returned as it is, with its own scale.
        scale: user units per network unit.

    Raises:
        ValueError: the card has another number of channels, or scale is not positive.
    """
    if isinstance(prior, (_Parts, ComplexGaussianPrior)):
        return prior
    parts = prior.card.channels // prior.card.slices
    if parts not in (1, 2):
        raise ValueError(
            f"prior {prior.card.name!r} has {parts} channels a slice; a complex image needs a prior of one or two"
        )
    return TwoChannelPrior(prior, scale) if parts == 2 else RealImaginaryPrior(prior, scale)

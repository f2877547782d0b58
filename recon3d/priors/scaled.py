"""A prior of images without a unit of their own, used in the unit of a scan."""

from __future__ import annotations

import math

from torch import Tensor

from recon3d.priors.base import ModelCard, Prior

__all__ = ["ScaledPrior"]


class ScaledPrior:
    """A prior whose network unit is `scale` user units and whose zero is zero, such as activity over its typical value.

    Args:
        prior: of any unit; its own offset and scale play no role but to reach its network's values.
        scale: user units per network unit.

    Raises:
        ValueError: scale is not positive.
    """

    offset = 0.0

    def __init__(self, prior: Prior, scale: float) -> None:
        if not (math.isfinite(scale) and scale > 0):
            raise ValueError(f"ScaledPrior: scale must be positive user units per network unit, got {scale}")
        self.prior = prior
        self.card: ModelCard = prior.card
        self.scale = float(scale)
        # from this prior's user unit to that of the other, whose network unit is the same
        self._factor = prior.scale / self.scale

    def denoise(self, u: Tensor, sigma: float, cond: Tensor | None = None) -> Tensor:
        """E[x0 | x0 + sigma eps = u] for u [batch, channel, row, col] in user units; cond goes on to the prior."""
        x = u * self._factor + self.prior.offset
        d = self.prior.denoise(x, sigma * self._factor, *(() if cond is None else (cond,)))
        return (d - self.prior.offset) / self._factor

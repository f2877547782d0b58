"""Iterative latent variable refinement: low frequencies of a reference, at the level of the state (ILVR).

    u' <- u' + phi(r + sigma' z) - phi(u')

phi makes an image N times smaller and as large as it was, both bicubic; r is A+ y for coarse images, else the
measurement itself. Choi et al., ICCV 2021. What of the reference is below the N-fold pixel, noise too, is taken as it
stands.
"""

from __future__ import annotations

import math
from collections.abc import MutableMapping
from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from recon3d.consistency.base import On
from recon3d.operators.base import LinearOperator
from recon3d.ops.philox import NoiseKey
from recon3d.real_view import draw_like
from recon3d.trajectory import Level

__all__ = ["LowPass", "low_pass"]

# stream of the noise key; 0 to 3 are the loop's and those of other data terms
_REFERENCE = 4


@dataclass(frozen=True)
class LowPass:
    """The refinement of a noisy state.

    Attributes:
        noise: independent keyed noise for the reference.
        factor: N.
    """

    noise: NoiseKey
    factor: int
    on: On = "iterate"

    def __post_init__(self) -> None:
        if self.factor < 2:
            raise ValueError(f"LowPass: factor must be at least 2, got {self.factor}")

    def step(
        self, x0: Tensor, y: Tensor, operator: LinearOperator, level: Level, state: MutableMapping[str, Tensor]
    ) -> Tensor:
        reference = y.clone() if tuple(y.shape) == tuple(x0.shape) else operator.pinv(y)
        if level.sigma_next:
            reference.add_(draw_like(reference, self.noise.at(level.index, _REFERENCE)), alpha=level.sigma_next)
        return low_pass(reference.sub_(x0), self.factor).add_(x0)


def low_pass(x: Tensor, factor: int) -> Tensor:
    """Slices [z, y, x] made `factor` times smaller and as large as they were, bicubic with antialiasing."""
    rows, columns = x.shape[-2:]
    small = (math.ceil(rows / factor), math.ceil(columns / factor))
    down = F.interpolate(x[:, None], small, mode="bicubic", antialias=True, align_corners=False)
    return F.interpolate(down, (rows, columns), mode="bicubic", align_corners=False)[:, 0]

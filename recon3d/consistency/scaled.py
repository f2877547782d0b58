"""Null-space sampling for noisy measurements (DDNM+): every singular component enters as far as its noise allows.

With A = U diag(s) V^T and a measurement of noise sigma_y, a component y_i / s_i of A+ y has the noise sigma_y / s_i.
At a step to the level sigma' with weights (a, b) of the old noise's direction and of fresh noise (recon3d.renoise),

    x0c = x0 + V lam V^T (A+ y - x0)      lam = 1 where sigma' >= sigma_y / s, else a s sigma' / sigma_y; 0 where s = 0
    u'  = x0c + V n,      s = 0:  n = sigma' (a eps + b z)      s > 0:  n = d z,  d^2 = sigma'^2 - (lam sigma_y / s)^2

so the noise that x0c takes from y and the fresh noise add up to sigma'^2 on every component when a^2 + b^2 = 1. This is
the published rule with x_t / sqrt(abar_t) as the state and eta = b; for sigma_y = 0 it is the projection on consistent
images with the common renoising (Wang, Yu, Zhang: Zero-shot image restoration using denoising diffusion null-space
model, ICLR 2023, section 3.3 and appendix). recon3d.ops.renoise has the same in one pass for the identity, masks and
means of blocks.
"""

from __future__ import annotations

import math
from collections.abc import MutableMapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from recon3d.consistency.base import On
from recon3d.dormand_prince import DormandPrince
from recon3d.operators.base import LinearOperator
from recon3d.ops.philox import NoiseKey
from recon3d.real_view import draw_like
from recon3d.renoise import Renoise, Rule
from recon3d.trajectory import Level

__all__ = ["ScaledProjection", "ScaledRenoise", "sigma_of", "spectral"]


def _gain(s: Tensor, level: Level, rule: Rule, sigma_y: float) -> Tensor:
    """lam of each singular value."""
    if level.down == 0:
        return torch.zeros_like(s)  # the limit: the last estimate is the prior's
    assert not isinstance(rule, DormandPrince)  # recipes refuse it here
    a, _ = rule.weights(level.sigma, level.down)
    room = s * (level.down / sigma_y)
    return torch.where(s > 0, torch.where(room >= 1, 1.0, a * room), 0.0)


@dataclass(frozen=True)
class ScaledProjection:
    """x0 + V lam V^T (A+ y - x0).

    Attributes:
        sigma_y: noise of the measurement.
        rule: of the renoising that follows; its weights are part of lam.
    """

    sigma_y: float
    rule: Rule
    on: On = "estimate"

    def step(
        self, x0: Tensor, y: Tensor, operator: LinearOperator, level: Level, state: MutableMapping[str, Tensor]
    ) -> Tensor:
        a = spectral(operator)
        # A^T r has s once, A+ r has it not at all: a small s never divides what it did not multiply
        misfit = operator.adjoint(y - operator(x0))
        gain = lambda s: _gain(s, level, self.rule, self.sigma_y) / torch.where(s > 0, s, 1.0).square()  # noqa: E731
        out: Tensor = a.spectral(misfit, gain)
        return out.add_(x0)


@dataclass(frozen=True)
class ScaledRenoise(Renoise):
    """The renoising that goes with it.

    Attributes:
        operator: of the measurement.
        sigma_y: its noise.
    """

    operator: LinearOperator | None = None
    sigma_y: float = 0.0

    def __call__(
        self,
        u: Tensor,
        x0: Tensor,
        x0c: Tensor,
        level: Level,
        noise: NoiseKey,
        memory: MutableMapping[str, Tensor] | None = None,
    ) -> Tensor:
        """As Renoise; measured components get fresh noise alone, as much as the measurement's leaves room for."""
        if level.kind != "step" or level.sigma_next == 0:
            return super().__call__(u, x0, x0c, level, noise, memory)
        assert self.operator is not None
        a, b = self._weights(level)
        known = spectral(self.operator)
        z = draw_like(u, noise)
        eps = u.sub_(x0c if self.direction == "corrected" else x0).div_(level.sigma)
        following = level.sigma_next

        def fresh(s: Tensor) -> Tensor:
            inherited = _gain(s, level, self.rule, self.sigma_y) * self.sigma_y / torch.where(s > 0, s, 1.0)
            return torch.where(s > 0, (following**2 - inherited**2).clamp_min(0).sqrt(), following * b)

        out = known.spectral(z, fresh).add_(x0c)
        if a:
            out.add_(known.spectral(eps, lambda s: torch.where(s > 0, 0.0, torch.full_like(s, following * a))))
        return u.copy_(out)


def spectral(operator: LinearOperator) -> Any:
    """The operator, if its singular values are known (recon3d.operators.image.ImageOperator).

    Raises:
        ValueError: they are not.
    """
    if not hasattr(operator, "spectral"):
        raise ValueError(
            "consistency.noise scaled: needs an operator on images, whose singular values are known; for a scanner use "
            "consistency proximal_cg"
        )
    return operator


def sigma_of(weights: Tensor | None) -> float:
    """The noise level behind weights that are one number.

    Raises:
        ValueError: they are not, or there are none.
    """
    if weights is None or weights.numel() != 1:
        raise ValueError("consistency.noise scaled: needs noise of one stated level; set noise.sigma")
    return math.sqrt(1 / float(weights))

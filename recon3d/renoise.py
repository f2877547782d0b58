"""How the loop goes from one noise level to the next: rules give the weights (a, b) of one formula,

    u' = x0c + sigma' (a eps + b z),    eps = (u - x0) / sigma,  z fresh noise,

which one fused kernel evaluates (recon3d.ops.renoise). With q = sigma'^2 / sigma^2:

* ddim, convention "canonical" (Song et al., ICLR 2021): b = eta sqrt(1 - q), a = sqrt(1 - b^2). On every noise path
  eta = 1 is ancestral sampling and eta = 0 the probability flow.
* ddim, convention "dds" (DDS, DDNM code): b = eta, a = sqrt(1 - eta^2), whatever the step. Its eta = 0.85 injects
  more noise than ancestral sampling at most steps; the two numbers cannot be exchanged.
* ancestral: a = sqrt(q) and b^2 sigma'^2 = q (sigma^2 - sigma'^2) + (1-q)^2 v with v the variance of x0 given u that
  one step is to add: 0 ("small", DDPM's posterior variance), sigma^2 ("large", the reverse diffusion step of score
  SDE) or 1/(1/sigma^2 + 1/prior_std^2), which is exact for a white prior of that spread, whatever the number of steps.
  With prior_std of one network unit that is DDPM's other choice, variance beta_t (Ho et al., NeurIPS 2020).
* time travel (Level.dip): a step goes down to the dip, and noise of the missing variance lifts the state to sigma'
  in the same pass: a sigma' = a_dip dip, (b sigma')^2 = (b_dip dip)^2 + sigma'^2 - dip^2.
* full: a = 0, b = 1 (DAPS, SITCOM, Flower, ISCS). The estimate is a mean, so full renoising alone has too little
  spread; `prior_std` adds the missing variance v. A point estimate gains from the opposite: the error of x0c is part of
  what the prior is to remove next, and b = `amount` below 1 leaves room for it within sigma'.
* em: Euler-Maruyama of the reverse diffusion du = -(dsigma^2/dt) score dt + (dsigma^2/dt)^(1/2) dw, which is the same
  on every path once the state is canonical. The path's clock says how much variance v = (dsigma^2/dt) dt a step of the
  grid has: "ve" 2 sigma^2 log(sigma/sigma'), "vp" (1 + sigma^2) log((1 + sigma^2)/(1 + sigma'^2)), sigma in network
  units; u' = u + v score + sqrt(v) z. (ancestral "large" is the same with v = sigma^2 - sigma'^2, with no clock.)
* heun: the probability flow du/dsigma = (u - x0c) / sigma by Heun's rule, two visits a step; second order where eta = 0
  is first order.
* corrector visits: one Langevin step u' = u + h score + sqrt(2 h) z with h = 2 (snr |z| / |score|)^2 (Song et al.,
  ICLR 2021), norms per slice; over the batch only to compare with published code. The step depends on the very noise
  it scales, which widens the law by about 4 / pixels; "expected" norms, h = 2 (snr sigma)^2, do not and need no pass
  of their own.
"""

from __future__ import annotations

import math
from collections.abc import MutableMapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from recon3d import ops
from recon3d.dormand_prince import DormandPrince
from recon3d.ops.philox import NoiseKey
from recon3d.real_view import draw_like, real_view
from recon3d.trajectory import Level

__all__ = ["DDIM", "Ancestral", "EulerMaruyama", "Full", "Heun", "Renoise", "Rule", "langevin"]

# the half-way state of a Heun step, among what a run carries
_HALF_WAY = "heun"

Norms = Literal["slice", "part", "expected", "volume"]


@dataclass(frozen=True)
class DDIM:
    """Mixture of the old noise direction and fresh noise; eta belongs to its convention."""

    eta: float = 0.0
    convention: Literal["canonical", "dds"] = "canonical"

    def __post_init__(self) -> None:
        if not 0 <= self.eta <= 1:
            raise ValueError(f"DDIM: eta must be in [0, 1], got {self.eta}")
        if self.convention not in ("canonical", "dds"):
            raise ValueError(f"DDIM: convention must be 'canonical' or 'dds', got {self.convention!r}")

    def weights(self, sigma: float, sigma_next: float) -> tuple[float, float]:
        b = self.eta
        if self.convention == "canonical":
            b *= math.sqrt(max(0.0, 1 - (sigma_next / sigma) ** 2))
        return math.sqrt(1 - b * b), b


@dataclass(frozen=True)
class Ancestral:
    """One step of the reverse diffusion; `variance` is what a step adds for the spread of x0 given u.

    Attributes:
        variance: "small", "large", or "prior" with prior_std.
        prior_std: spread of the prior's pixels, user units.
    """

    variance: Literal["small", "large", "prior"] = "small"
    prior_std: float | None = None

    def __post_init__(self) -> None:
        if (self.variance == "prior") != (self.prior_std is not None):
            raise ValueError("Ancestral: give prior_std with variance 'prior' and only there")

    def weights(self, sigma: float, sigma_next: float) -> tuple[float, float]:
        q = (sigma_next / sigma) ** 2
        if self.prior_std is not None:
            v = _spread(sigma, self.prior_std)
        else:
            v = sigma**2 if self.variance == "large" else 0.0
        return math.sqrt(q), math.sqrt(q * (1 - q) * sigma**2 + (1 - q) ** 2 * v) / sigma_next


@dataclass(frozen=True)
class Full:
    """Forget the old noise.

    Attributes:
        prior_std: (user units) adds the variance that a mean estimate lacks.
        amount: part of sigma' that is drawn afresh; below 1, the error the estimate already has counts as the rest.
    """

    prior_std: float | None = None
    amount: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.amount <= 1:
            raise ValueError(f"Full: amount must be above 0 and at most 1, got {self.amount}")

    def weights(self, sigma: float, sigma_next: float) -> tuple[float, float]:
        lacking = _spread(sigma, self.prior_std) if self.prior_std else 0.0
        return 0.0, self.amount * math.sqrt(1 + lacking / sigma_next**2)


@dataclass(frozen=True)
class EulerMaruyama:
    """Euler-Maruyama of the reverse diffusion; steps are measured by the clock of a path.

    Attributes:
        clock: "ve", equal times are equal ratios of sigma; or "vp", dt is an increment of log(1 + sigma^2).
        scale: user units per network unit, for "vp".
    """

    clock: Literal["ve", "vp"] = "ve"
    scale: float = 1.0

    def __post_init__(self) -> None:
        if self.clock not in ("ve", "vp"):
            raise ValueError(f"EulerMaruyama: clock must be 've' or 'vp', got {self.clock!r}")

    def weights(self, sigma: float, sigma_next: float) -> tuple[float, float]:
        if self.clock == "ve":
            v = 2 * sigma**2 * math.log(sigma / sigma_next)
        else:
            unit = self.scale**2
            v = (unit + sigma**2) * math.log((unit + sigma**2) / (unit + sigma_next**2))
        if v > 2 * sigma**2:  # then what is left of the noise grows from step to step instead
            raise ValueError(
                f"EulerMaruyama: a step from sigma {sigma:.3g} to {sigma_next:.3g} is too long; take more levels, or "
                "levels of equal ratio (trajectory.grid geometric)"
            )
        return (1 - v / sigma**2) * sigma / sigma_next, math.sqrt(v) / sigma_next


@dataclass(frozen=True)
class Heun:
    """Heun's rule for the probability flow; needs a trajectory of "predict" and "refine" visits.

    The slope is that of the estimate the data agree with, at both visits: direction does not apply.
    """

    def weights(self, sigma: float, sigma_next: float) -> tuple[float, float]:
        """Of the first visit, which is an Euler step."""
        return 1.0, 0.0


Rule = DDIM | Ancestral | Full | EulerMaruyama | Heun | DormandPrince


@dataclass(frozen=True)
class Renoise:
    """The renoising part of the loop.

    Attributes:
        rule: weights of a step.
        direction: eps from the "network" estimate (DDS) or from the "corrected" one (DiffPIR); the corrected one
            makes u' a state of the posterior where the data term gives the mean of x0 given u and y. Correctors
            always follow the corrected one.
        snr: signal-to-noise ratio of corrector visits.
        norms: of the corrector's step length: "slice", "expected" (no norms), or as published: "volume", or "part"
            (real and imaginary parts of a complex slice apart).
    """

    rule: Rule
    direction: Literal["network", "corrected"] = "network"
    snr: float = 0.16
    norms: Norms = "slice"

    def __call__(
        self,
        u: Tensor,
        x0: Tensor,
        x0c: Tensor,
        level: Level,
        noise: NoiseKey,
        memory: MutableMapping[str, Tensor] | None = None,
    ) -> Tensor:
        """The next state; overwrites u.

        Args:
            u: state, [z, y, x], user units, real or complex; its memory is reused.
            x0: the prior's estimate.
            x0c: the estimate the data agree with (x0 itself at a visit without data).
            level: the visit.
            noise: key of this visit's noise.
            memory: what the run carries, for rules whose steps take several visits.
        """
        if isinstance(self.rule, DormandPrince):
            return self.rule.advance(u, x0c, level, _carried(memory))
        if level.kind == "travel" or level.sigma_next == 0:
            # a finished image gets no noise; a travelling state has its noise from the data term
            return u.copy_(x0c)
        a, b = 1 - 2 * self.snr**2, 2 * self.snr  # a corrector's h = 2 (snr sigma)^2 in the common formula
        from_corrected = self.direction == "corrected" or isinstance(self.rule, Heun)
        if level.kind == "refine":
            return _refine(u, x0c, level, _carried(memory))
        if level.kind == "correct":
            if self.norms != "expected":
                return langevin(u, x0c, level.sigma, self.snr, noise, self.norms)
            from_corrected = True
        else:
            a, b = self._weights(level)
        before = u.clone() if level.kind == "predict" else None
        ops.renoise(
            real_view(u),
            real_view(x0),
            real_view(x0c),
            level.sigma,
            level.sigma_next,
            a,
            b,
            noise,
            eps_from="x0c" if from_corrected else "x0",
            inplace=True,
        )
        if before is not None:
            _carried(memory)[_HALF_WAY] = before.add_(u).div_(2)
        return u

    def _weights(self, level: Level) -> tuple[float, float]:
        assert not isinstance(self.rule, DormandPrince)  # it advances by itself
        a, b = self.rule.weights(level.sigma, level.down)
        if level.dip is None:
            return a, b
        lost = level.sigma_next**2 - level.dip**2
        return a * level.dip / level.sigma_next, math.sqrt((b * level.dip) ** 2 + lost) / level.sigma_next


def _refine(u: Tensor, x0: Tensor, level: Level, memory: MutableMapping[str, Tensor]) -> Tensor:
    """Second half of Heun's step, in place: u is where the Euler step ended, and from m, half-way there from where it
    began, u' = m + (sigma' - sigma)/2 (u - x0)/sigma'.
    """
    if _HALF_WAY not in memory:
        raise ValueError("Renoise: the first visit of this Heun step is missing; begin with its predict visit")
    u.sub_(x0).mul_((level.sigma - level.began) / (2 * level.sigma))
    return u.add_(memory.pop(_HALF_WAY))


def _carried(memory: MutableMapping[str, Tensor] | None) -> MutableMapping[str, Tensor]:
    if memory is None:
        raise ValueError("Renoise: a step of several visits needs the memory that the run carries between them")
    return memory


def langevin(u: Tensor, x0: Tensor, sigma: float, snr: float, noise: NoiseKey, norms: Norms = "slice") -> Tensor:
    """One Langevin corrector step along score = (x0 - u) / sigma^2, in place.

    A slice whose score is exactly zero stays where it is.
    """
    z, score = draw_like(u, noise), torch.sub(x0, u).div_(sigma**2)
    if norms == "part" and u.is_complex():
        pairs = [torch.view_as_real(t) for t in (u, score, z)]
        for part in range(2):
            state, s, fresh = (pair[..., part] for pair in pairs)
            _langevin(state, s, fresh, snr, "slice")
    else:
        _langevin(real_view(u), real_view(score), real_view(z), snr, norms)
    return u


def _langevin(u: Tensor, score: Tensor, z: Tensor, snr: float, norms: Norms) -> None:
    zz, ss = ops.dot(z, z, per_slice=True).sqrt(), ops.dot(score, score, per_slice=True).sqrt()
    if norms == "volume":
        zz, ss = zz.mean(0, keepdim=True).expand_as(zz), ss.mean(0, keepdim=True).expand_as(ss)
    h = torch.where(ss > 0, 2 * (snr * zz / ss) ** 2, torch.zeros_like(ss))
    h = h.to(u.dtype).reshape(-1, *[1] * (u.ndim - 1))
    u.addcmul_(h, score).addcmul_((2 * h).sqrt(), z)


def _spread(sigma: float, prior_std: float) -> float:
    return 1 / (1 / sigma**2 + 1 / prior_std**2)

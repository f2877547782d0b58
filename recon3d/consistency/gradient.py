"""Gradient steps on the data's likelihood: through the prior (DPS), or at the noisy state.

The misfit L(x) = -log p(y | x) is the Gaussian 1/2 ||A x - y||^2_W, or for counts the Poisson
sum of e - y + y log(y/e) with e = c A x + b, which is 0 for a perfect fit and never negative. A step is

    through "prior":  x0' = x0 - step (dx0/du)^T P grad L(x0)        "state":  x0' = x0 - step P grad L(u)

so that with the old noise taken from the prior's estimate (renoise.direction "network") the next state is the sampler's
own, shifted by the step: diffusion posterior sampling (Chung et al., ICLR 2023) and, for counts, PET-DPS and PET-Naive
(Singh et al., MELBA 2 (2024) 547). Counts belong to activities that are not negative: the argument of the likelihood is
clamped at 0, the state never is, for a clamped state is no noisy image any more and the sampler runs away.

Four kinds of step:

* "objective", as published: strength / L, in the prior's network units. Right for one level of counts only.
* "norm", as published for images: strength / sqrt(2 L), L of each slice, in the coordinates x_t = u / sqrt(1 + sigma^2)
  of a variance-preserving network, so there is a factor sqrt((1 + sigma^2) (1 + sigma'^2)) here.
* "variance": strength (sigma^2 - sigma'^2), a score of the likelihood in the reverse diffusion; 1 is Bayes' rule as far
  as p(y | u) is p(y | x = argument).
* "curvature": strength sigma^2, and P = 1 / (1 + sigma^2 H) with H an upper bound of the misfit's curvature, for counts
  A^T c / max(x, sigma), else ||A^T W A||. The curvature of the data is then weighed against that of the prior, which
  bounds the step at every level of noise and counts (Song et al., pseudo-inverse guidance, ICLR 2023).
"""

from __future__ import annotations

import math
from collections.abc import Callable, MutableMapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from recon3d.consistency.base import On, Visit
from recon3d.operators.base import LinearOperator
from recon3d.trajectory import Level

__all__ = ["Gradient", "poisson_misfit"]

_COUNTER = "gradient_subset"


@dataclass
class Gradient:
    """One step down the misfit per level.

    Attributes:
        strength: dimensionless; see the steps above.
        through: "prior" carries the gradient at x0 back to the state, "state" takes it at the state.
        step_kind: "curvature", "variance", "objective" or "norm".
        poisson: y are counts and the operator has `expected`; else y is Gaussian.
        weights: W of the Gaussian misfit; None for 1.
        scale: user units per network unit, for "objective" and "norm".
        subsets: of the measurement, one per level in turn; the counter lives in the state.
    """

    strength: float
    through: Literal["prior", "state"] = "prior"
    step_kind: Literal["curvature", "variance", "objective", "norm"] = "curvature"
    poisson: bool = False
    weights: Tensor | None = None
    scale: float = 1.0
    subsets: int = 1
    on: On = "estimate"
    _parts: dict[int, tuple[Any, Tensor]] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if not self.strength > 0:
            raise ValueError(f"Gradient: strength must be positive, got {self.strength}")
        if self.subsets < 1:
            raise ValueError(f"Gradient: subsets must be at least 1, got {self.subsets}")
        if self.subsets > 1 and not self.poisson:
            raise ValueError("Gradient: subsets are for counts; set consistency.subsets to 1")
        if self.poisson and self.step_kind == "norm":
            raise ValueError("Gradient: step norm is for Gaussian measurements; counts take curvature or objective")

    def guide(
        self,
        x0: Tensor,
        y: Tensor,
        operator: LinearOperator,
        level: Level,
        state: MutableMapping[str, Tensor],
        visit: Visit,
    ) -> Tensor:
        count = int(state[_COUNTER]) if _COUNTER in state else 0
        at = x0 if self.through == "prior" else visit.u
        if self.step_kind == "norm":
            return self._norm_step(x0, at, y, operator, level, visit)
        misfit, gradient, bound = self._misfit(at, y, operator, level.sigma, count % self.subsets)
        if self.step_kind == "curvature":
            factor = self.strength * level.sigma**2
            gradient = gradient / (1 + level.sigma**2 * bound())
        elif self.step_kind == "variance":
            factor = self.strength * (level.sigma**2 - level.down**2)
        else:
            # a network unit is `scale` user units; the step and the gradient have one each
            factor = self.strength * self.scale**2 / max(misfit, torch.finfo(torch.float32).tiny)
        if self.through == "prior":
            gradient = visit.pull(gradient)
        # last, for a pull may be interrupted and the level begun again
        state[_COUNTER] = torch.tensor(count + 1, dtype=torch.int64)
        return torch.add(x0, gradient, alpha=-factor)

    def _norm_step(
        self, x0: Tensor, at: Tensor, y: Tensor, operator: LinearOperator, level: Level, visit: Visit
    ) -> Tensor:
        rest = operator(at) - y
        weighted = rest if self.weights is None else rest * self.weights
        kept = 1 if operator.coupling == "slice" else 0
        squared = (rest.conj() * weighted).real.flatten(kept).sum(-1, dtype=torch.float64)
        root = squared.sqrt().clamp_min(torch.finfo(torch.float32).tiny).to(x0.device, torch.float32)
        gradient = operator.adjoint(weighted) / (root[:, None, None] if kept else root)
        if self.through == "prior":
            gradient = visit.pull(gradient)
        now, following = (s / self.scale for s in (level.sigma, level.sigma_next))
        factor = self.strength * self.scale * math.sqrt((1 + now**2) * (1 + following**2))
        return torch.add(x0, gradient, alpha=-factor)

    def _misfit(
        self, x: Tensor, y: Tensor, operator: LinearOperator, sigma: float, subset: int
    ) -> tuple[float, Tensor, Callable[[], Any]]:
        """L, its gradient at x, and a bound of its curvature."""
        if not self.poisson:
            rest = operator(x) - y
            weighted = rest if self.weights is None else rest * self.weights
            value = 0.5 * float((rest.conj() * weighted).real.sum(dtype=torch.float64))
            return value, operator.adjoint(weighted), lambda: operator.norm(self.weights)
        part, counts = self._part(operator, y, subset)
        seen = x.clamp_min(0)
        value, gradient = poisson_misfit(part, counts, seen)
        # an activity of zero can only grow
        gradient = torch.where((x < 0) & (gradient > 0), 0.0, gradient)
        share = float(self.subsets)
        return value * share, gradient.mul_(share), lambda: part.sensitivity() * share / seen.clamp_min(sigma)

    def _part(self, operator: Any, y: Tensor, subset: int) -> tuple[Any, Tensor]:
        if self.subsets == 1:
            return operator, y
        if not self._parts:
            for k, (part, index) in enumerate(operator.subsets(self.subsets)):
                self._parts[k] = (part, index.to(y.device))
        part, index = self._parts[subset]
        return part, y.index_select(0, index)


def poisson_misfit(operator: Any, y: Tensor, x: Tensor) -> tuple[float, Tensor]:
    """sum of e - y + y log(y/e) for e = operator.expected(x), and its gradient A^T (1 - y/e).

    Where nothing is expected, counts that were seen nevertheless are left out: no activity explains them.
    """
    expected = operator.expected(x)
    possible = expected > 0
    ratio = torch.where(possible, y / torch.where(possible, expected, 1.0), 0.0)
    terms = torch.where(possible, expected - y + torch.special.xlogy(y, ratio), 0.0)
    value = float(terms.sum(dtype=torch.float64))
    del terms, expected, possible
    return value, operator.sensitivity() - operator.adjoint(ratio)

"""Data terms that are one linear system, met by a few conjugate-gradient iterations from the prior's estimate.

    (A^T W A + rho I + rho_z D^T D) x = A^T W y + rho x0 + rho_z D^T (z - w)

* rho = rho_z = 0: Krylov. Only directions the scanner sees move; the null space stays the prior's (DDS).
* rho > 0: proximal. With W = 1/variance and rho = 1/r^2 this is the mean of x given y and x0 +- r.
* rho_z > 0: ADMM with total variation along z; the split and the dual live in the state across levels and belong to
  x0, not to the noisy iterate, whose noise level would change under them.

The solve starts at x0, where the residual is A^T W (y - A x0) + rho_z (g - D^T D x0) whatever rho is, so neither the
right-hand side nor A^T y is stored: one solve holds x, r, p and A p.
"""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from recon3d import ops
from recon3d.consistency.base import On
from recon3d.consistency.precondition import FilterPreconditioner
from recon3d.operators.base import LinearOperator
from recon3d.real_view import real_view
from recon3d.regularisers.tvz import TVz
from recon3d.trajectory import Level

__all__ = ["Rho", "Solve", "conjugate_gradients"]


# residual, in units of the dtype's resolution of the first one, at which a system counts as solved
_SOLVED = 32
_ASK_EVERY = 8


@dataclass(frozen=True)
class Rho:
    """Weight of the prior's estimate in a proximal data term, level by level.

    Attributes:
        rule: "relative": value ||A^T W A||, the same at every level;
            "growing": value ||A^T W A|| (sigma_ref / sigma)^2, relative at sigma_ref;
            "bayes": value / r^2 with 1/r^2 = 1/sigma^2 + 1/prior_std^2, for weights that are 1/variance;
            "absolute": value itself, in the unit of A^T W A.
        value: dimensionless factor (1/unit^2 for "absolute").
        sigma_ref: user units, for "growing".
        prior_std: spread of the prior's pixels, user units, for "bayes"; None takes 1/r^2 = 1/sigma^2.
    """

    rule: Literal["relative", "growing", "bayes", "absolute"]
    value: float
    sigma_ref: float = 1.0
    prior_std: float | None = None

    def __post_init__(self) -> None:
        if not self.value >= 0:
            raise ValueError(f"Rho: value must not be negative, got {self.value}")
        if not self.sigma_ref > 0 or (self.prior_std is not None and not self.prior_std > 0):
            raise ValueError(f"Rho: sigma_ref and prior_std must be positive, got {self.sigma_ref}, {self.prior_std}")

    def at(self, sigma: float, norm: Callable[[], float]) -> float:
        """rho at a level; `norm` gives ||A^T W A|| and is called only where it matters."""
        if self.rule == "absolute":
            return self.value
        if self.rule == "bayes":
            return self.value * (1 / sigma**2 + (1 / self.prior_std**2 if self.prior_std else 0.0))
        return self.value * norm() * ((self.sigma_ref / sigma) ** 2 if self.rule == "growing" else 1.0)


def conjugate_gradients(
    apply: Callable[[Tensor], Tensor], x: Tensor, r: Tensor, iterations: int, per_slice: bool, tolerance: float = 0.0
) -> Tensor:
    """Conjugate gradients on a symmetric (Hermitian) positive semidefinite system, in place.

    Complex vectors run as pairs of reals: for a Hermitian matrix <p, A p> and <r, r> are real. Published code for
    complex images that leaves out the conjugation converges to something else.

    Args:
        apply: the matrix; its answer may be overwritten.
        x: start, becomes the solution.
        r: residual b - apply(x) at the start; overwritten.
        iterations: at most; a slice that is solved stays where it is, whatever its neighbours still need.
        per_slice: one step length for each slice (block-diagonal systems) instead of one for the volume.
        tolerance: a slice is solved when its residual has fallen to this part of its first one.
    """
    p = r.clone()
    x_real, r_real, p_real = real_view(x), real_view(r), real_view(p)
    rr = ops.dot(r_real, r_real, per_slice)
    # below this the residual is rounding, and on a system with a null space further steps would amplify it
    solved = rr * max(tolerance, _SOLVED * torch.finfo(r_real.dtype).eps) ** 2
    for k in range(iterations):
        rr = torch.where(rr <= solved, 0.0, rr)
        # asking a GPU costs a wait, so it is asked now and then
        if (r.device.type == "cpu" or k % _ASK_EVERY == _ASK_EVERY - 1) and not rr.any():
            break
        rr = ops.cg_step_(x_real, r_real, p_real, real_view(apply(p)), rr)
    return x


@dataclass
class Solve:
    """The linear system above with fixed work per level.

    Attributes:
        iterations: conjugate-gradient iterations at most; each costs one A and one A^T, and so does the start.
        tolerance: a slice is left alone once its residual has fallen to this part of its first one; 0 runs them all.
        rho: proximal weight, or None for the Krylov form.
        tvz: total variation along z, or None.
        rho_z_rel: rho_z / ||A^T W A||.
        weights: W, the measurement's inverse variances, broadcast over it; None for W = 1.
        scalars: "auto" takes per-slice step lengths where neither the scanner nor TV couples slices.
        on: correct the estimate or, as published in DiffusionMBIR, the noisy iterate.
        finish: "sirt" adds one Kaczmarz/SIRT step x += A^T (y - A x) / A^T A 1 after the last level.
        precondition: solve with the tomographic filter; for proximal forms only, since it moves the null space.
    """

    iterations: int = 5
    rho: Rho | None = None
    tvz: TVz | None = None
    rho_z_rel: float = 0.0
    weights: Tensor | None = None
    scalars: Literal["auto", "slice", "volume"] = "auto"
    on: On = "estimate"
    finish: Literal["none", "sirt"] = "none"
    tolerance: float = 0.0
    precondition: bool = False
    _norm: float | None = None
    _filter: FilterPreconditioner | None = None

    def __post_init__(self) -> None:
        if self.iterations < 1:
            raise ValueError(f"Solve: iterations must be at least 1, got {self.iterations}")
        if not 0 <= self.tolerance < 1:
            raise ValueError(f"Solve: tolerance must be in [0, 1), got {self.tolerance}")
        if (self.tvz is None) != (self.rho_z_rel == 0):
            raise ValueError("Solve: give TVz and a positive rho_z_rel together, or neither")
        if self.precondition and (self.rho is None or self.rho.value == 0):
            raise ValueError("Solve: the preconditioner needs rho > 0; the Krylov form would lose the null space")

    def step(
        self, x0: Tensor, y: Tensor, operator: LinearOperator, level: Level, state: MutableMapping[str, Tensor]
    ) -> Tensor:
        def norm() -> float:
            if self._norm is None:
                self._norm = operator.norm(self.weights)
            return self._norm

        rho = self.rho.at(level.sigma, norm) if self.rho else 0.0
        rho_z = self.rho_z_rel * norm() if self.tvz else 0.0

        def apply(p: Tensor) -> Tensor:
            q = operator.normal(p, self.weights)
            if rho:
                q.add_(p, alpha=rho)
            return self.tvz.add_normal(q, p, rho_z) if self.tvz else q

        r = operator.residual(x0, y, self.weights)
        if self.tvz:
            _, pull = self.tvz.duals(x0, state)
            self.tvz.add_normal(r, x0, -rho_z).add_(pull, alpha=rho_z)
        # D^T D lies in [0, 4]; its middle keeps the filter, which knows the plane only, from amplifying along z
        x = self._solved(apply, x0, r, rho + 2 * rho_z, y, operator)
        if self.tvz:
            self.tvz.update(x, state)
        if level.last and self.finish == "sirt":
            x += _sirt(x, y, operator)
        return x

    def _solved(
        self,
        apply: Callable[[Tensor], Tensor],
        x0: Tensor,
        r: Tensor,
        rho: float,
        y: Tensor,
        operator: LinearOperator,
    ) -> Tensor:
        per_slice = self._per_slice(operator)
        if self.precondition and x0.is_complex():
            raise ValueError("Solve: the preconditioner is made for tomography; set consistency.precondition to none")
        if not self.precondition:
            return conjugate_gradients(apply, x0.clone(), r, self.iterations, per_slice, self.tolerance)
        if self._filter is None:
            self._filter = FilterPreconditioner.of(operator, self.weights, y)
        s = self._filter
        d = conjugate_gradients(
            lambda p: s.transpose_(apply(s.apply(p, rho)), rho),
            torch.zeros_like(x0),
            s.transpose_(r, rho),
            self.iterations,
            per_slice,
            self.tolerance,
        )
        return s.apply(d, rho).add_(x0)

    def _per_slice(self, operator: LinearOperator) -> bool:
        if self.scalars == "auto":
            return operator.coupling == "slice" and self.tvz is None
        return self.scalars == "slice"


def _sirt(x: Tensor, y: Tensor, operator: LinearOperator) -> Tensor:
    weight = operator.normal(torch.ones_like(x))
    weight = weight.real if weight.is_complex() else weight
    return operator.residual(x, y).div_(weight.clamp(min=1e-6 * float(weight.max())))

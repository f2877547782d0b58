"""A draw instead of a mean: x ~ N(m, Q^-1), Q = A^T W A + I / r^2, Q m = A^T W y + x0 / r^2.

This is the data half of split Gibbs sampling (Vono, Dobigeon, Chainais, IEEE TSP 67 (2019) 1648; with a diffusion
prior: Wu et al., PnP-DM, NeurIPS 2024): given a draw x0 from the prior's half, the next state is a draw of the variable
that sees the data, held to x0 within r. Perturb and solve (Papandreou and Yuille, NeurIPS 2010): solve the normal
equations with A^T W^(1/2) z1 + z2 / r added to the right-hand side.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from recon3d.consistency.base import On
from recon3d.consistency.solve import conjugate_gradients
from recon3d.noise import independent
from recon3d.operators.base import LinearOperator
from recon3d.ops.philox import NoiseKey
from recon3d.real_view import draw_like
from recon3d.trajectory import Level

__all__ = ["Conditional"]

# streams of the noise key; 0 and 1 are the loop's
_DATA, _IMAGE = 2, 3


@dataclass
class Conditional:
    """Draws of x given y and x0 +- sigma_next.

    Attributes:
        weights: W = 1/variance of the measurement, broadcast over it.
        noise: independent keyed noise for the measurement's and the image's perturbation.
        iterations: conjugate-gradient iterations; too few and the draw keeps part of x0 in place of its own.
        scalars: as in Solve.
    """

    weights: Tensor
    noise: NoiseKey
    iterations: int = 20
    scalars: Literal["auto", "slice", "volume"] = "auto"
    on: On = "estimate"

    def step(
        self, x0: Tensor, y: Tensor, operator: LinearOperator, level: Level, state: MutableMapping[str, Tensor]
    ) -> Tensor:
        if not level.sigma_next > 0:
            raise ValueError("Conditional: needs a level that travels to a positive sigma; use the sweeps trajectory")
        r = level.sigma_next
        key = self.noise.at(level.index)
        pull = (y - operator(x0)).mul_(self.weights)
        rays = key if y.shape[0] == key.n_slices else independent(y.shape[0], seed=key.seed)
        pull.addcmul_(self.weights.sqrt(), draw_like(y, rays.at(level.index, _DATA)))
        residual = operator.adjoint(pull)
        residual.add_(draw_like(x0, key.at(level.index, _IMAGE)), alpha=1 / r)
        per_slice = self.scalars == "slice" or (self.scalars == "auto" and operator.coupling == "slice")
        return conjugate_gradients(
            lambda p: operator.normal(p, self.weights).add_(p, alpha=1 / r**2),
            x0.clone(),
            residual,
            self.iterations,
            per_slice,
        )

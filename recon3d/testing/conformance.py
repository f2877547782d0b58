"""Laws that a new operator, prior or recipe can be held to, for tests here and in other packages.

Each check returns the figure it measured and raises AssertionError, saying the figure and the limit, when it is over.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from recon3d.operators.base import LinearOperator
from recon3d.ops import dot
from recon3d.priors.base import Prior
from recon3d.priors.gaussian import GaussianPrior

__all__ = [
    "Posterior",
    "check_adjoint",
    "check_posterior",
    "check_prior",
    "check_slices_independent",
    "dense",
    "gaussian_posterior",
]


def check_adjoint(operator: LinearOperator, seed: int = 0, limit: float = 1e-6) -> float:
    """|<A x, y> - <x, A* y>| / (|A x| |y|) for random x and y, inner products in float64."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(operator.domain.shape, generator=generator, dtype=operator.domain.dtype)
    y = torch.randn(operator.range.shape, generator=generator, dtype=operator.range.dtype)
    ax, aty = operator(x), operator.adjoint(y)
    real = [torch.view_as_real(t) if t.is_complex() else t for t in (x, y, ax, aty)]
    x, y, ax, aty = real
    gap = float(abs(dot(ax, y) - dot(x, aty)) / (dot(ax, ax) * dot(y, y)).sqrt())
    assert gap <= limit, f"adjoint gap {gap:.2e} is over {limit:.0e}"
    return gap


def check_slices_independent(operator: LinearOperator, seed: int = 0, limit: float = 1e-6) -> float:
    """An operator that says coupling = "slice" gives a slice's measurement from that slice alone."""
    assert operator.coupling == "slice", f"the operator couples slices: coupling is {operator.coupling!r}"
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(operator.domain.shape, generator=generator, dtype=operator.domain.dtype)
    whole = operator(x)
    gap = 0.0
    for k in range(x.shape[0]):
        try:
            part = operator.slab(k, k + 1)
        except NotImplementedError:  # then it takes any number of slices
            part = operator
        gap = max(gap, float((part(x[k : k + 1]) - whole[k : k + 1]).norm() / whole.norm()))
    assert gap <= limit, f"a slice alone differs from the slice in the stack by {gap:.2e}, over {limit:.0e}"
    return gap


def check_prior(prior: Prior, shape: tuple[int, int] = (32, 32), limit: float = 1e-5, seed: int = 0) -> float:
    """A prior keeps shape and dtype, leaves its input alone, repeats itself and does not mix the slices of a batch."""
    z = torch.randn(3, 1, *shape, generator=torch.Generator().manual_seed(seed))
    u = prior.offset + 0.5 * prior.scale * z
    kept, sigma = u.clone(), 0.5 * prior.scale
    x0 = prior.denoise(u, sigma)
    kind = f"got {tuple(x0.shape)} {x0.dtype} for {tuple(u.shape)} {u.dtype}"
    assert x0.shape == u.shape and x0.dtype == u.dtype, kind
    assert torch.equal(u, kept), "denoise changed its input"
    assert torch.equal(x0, prior.denoise(u, sigma)), "two calls differ"
    assert bool(x0.isfinite().all()), "the estimate is not finite"
    gap = max(float((prior.denoise(u[k : k + 1], sigma) - x0[k : k + 1]).norm() / x0.norm()) for k in range(3))
    assert gap <= limit, f"a slice alone differs from the slice in a batch by {gap:.2e}, over {limit:.0e}"
    return gap


@dataclass(frozen=True)
class Posterior:
    """The Gaussian posterior of one slice.

    Attributes:
        mean: [row, col] float64.
        covariance: [pixels, pixels] float64.
    """

    mean: Tensor
    covariance: Tensor

    @property
    def std(self) -> Tensor:
        """Spread of every pixel, [row, col]."""
        return self.covariance.diagonal().sqrt().reshape(self.mean.shape)


def dense(operator: LinearOperator) -> Tensor:
    """The matrix [measurements, pixels] float64 of one slice of an operator with slice coupling."""
    rows, columns = operator.domain.shape[-2:]
    unit = torch.eye(rows * columns, dtype=torch.float64).reshape(-1, rows, columns)
    return operator(unit).flatten(1).T.contiguous()


def gaussian_posterior(prior: GaussianPrior, matrix: Tensor, y: Tensor, weights: Tensor) -> Posterior:
    """The exact posterior of a slice x ~ prior given y = matrix x + n, n ~ N(0, 1/weights).

    Args:
        prior: the Gaussian prior.
        matrix: [measurements, pixels] float64, as from `dense`.
        y: one slice's measurement, any shape of that many values.
        weights: inverse variances, broadcast over y.
    """
    y = y.double()
    w = weights.double().expand_as(y).flatten()
    inverse = torch.linalg.inv(prior.covariance())
    covariance = torch.linalg.inv(inverse + matrix.T @ (w[:, None] * matrix))
    misfit = y.flatten() - matrix @ prior.mean.flatten()
    mean = prior.mean.flatten() + covariance @ (matrix.T @ (w * misfit))
    return Posterior(mean.reshape(prior.mean.shape), covariance)


def check_posterior(
    samples: Tensor, posterior: Posterior, mean_limit: float = 0.01, std_limit: float = 0.05
) -> tuple[float, float]:
    """Independent samples [n, row, col] have the posterior's mean and spread.

    Returns:
        (|mean - m| / |m|, largest over the pixels of |std / s - 1|), both with the Monte Carlo error of n samples in.
    """
    x = samples.double()
    mean_error = float((x.mean(0) - posterior.mean).norm() / posterior.mean.norm())
    std_error = float((x.std(0) / posterior.std - 1).abs().max())
    assert math.isfinite(mean_error), "the samples are not finite"
    assert mean_error <= mean_limit, f"mean is off by {mean_error:.2%}, over {mean_limit:.0%}"
    assert std_error <= std_limit, f"spread is off by {std_error:.2%}, over {std_limit:.0%}"
    return mean_error, std_error

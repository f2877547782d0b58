"""The contract of every scanner model: a linear map, its exact adjoint, and what solvers ask of it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal, Self

import torch
from torch import Tensor

from recon3d.ops.dot import dot

Coupling = Literal["slice", "volume"]


@dataclass(frozen=True)
class Space:
    """What a vector of an operator looks like.

    Attributes:
        shape: sizes without leading batch axes.
        dtype: torch.float32 or torch.complex64 (float64 and complex128 are accepted by every operator too).
        unit: physical unit of a value, such as "1/mm"; "1" for pure numbers.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    unit: str


class LinearOperator(ABC):
    """A linear scanner model A with its exact adjoint.

    Attributes:
        domain: the volumes A takes.
        range: the measurements A gives.
        coupling: "slice" when slice k of the measurement depends on slice k of the volume alone, else "volume".
    """

    domain: Space
    range: Space
    coupling: Coupling

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """A x: the noise-free measurement of a volume; leading batch axes allowed."""

    @abstractmethod
    def adjoint(self, y: Tensor) -> Tensor:
        """A* y: the transpose of the same discrete map (same weights), not an approximate inverse."""

    def __call__(self, x: Tensor) -> Tensor:
        return self.forward(x)

    def normal(self, x: Tensor, weights: Tensor | None = None) -> Tensor:
        """A* W A x with W = diag(weights), or A* A x; weights broadcast over the measurement."""
        y = self.forward(x)
        return self.adjoint(y if weights is None else y.mul_(weights) if not y.requires_grad else y * weights)

    def residual(self, x: Tensor, y: Tensor, weights: Tensor | None = None) -> Tensor:
        """A* W (y - A x), the downhill direction of 1/2 ||y - A x||^2_W; weights broadcast over the measurement."""
        misfit = y - self.forward(x)
        return self.adjoint(misfit if weights is None else misfit.mul_(weights))

    def slab(self, start: int, stop: int) -> LinearOperator:
        """The operator of slices start to stop - 1 alone, for operators with slice coupling.

        Raises:
            NotImplementedError: this operator cannot be cut along z.
        """
        raise NotImplementedError(f"{type(self).__name__} cannot be cut into slabs")

    def pinv(self, y: Tensor) -> Tensor:
        """An approximate inverse (filtered back projection, gridding).

        Raises:
            NotImplementedError: this operator has none; use a few iterations of conjugate gradients.
        """
        raise NotImplementedError(f"{type(self).__name__} has no direct inverse; start from conjugate gradients")

    def subsets(self, n: int) -> list[tuple[Self, Tensor]]:
        """Split the measurement into n interleaved parts: (operator, indices along the split axis) each.

        Raises:
            NotImplementedError: this operator cannot be split.
        """
        raise NotImplementedError(f"{type(self).__name__} has no subsets")

    def norm(self, weights: Tensor | None = None, iterations: int = 20) -> float:
        """Largest eigenvalue of A* W A by power iteration, at least 99 % of it in practice; 0 for a zero operator.

        The unweighted value is computed once and kept. With slice coupling the largest over all slices is returned.
        """
        if weights is None:
            cached: float | None = getattr(self, "_norm", None)
            if cached is not None:
                return cached
        device = weights.device if weights is not None else self._device()
        dtype = torch.float32 if not self.domain.dtype.is_complex else torch.complex64
        # a positive start has a large part along the leading, all-positive eigenvector; the ripple reaches the rest
        n = int(torch.tensor(self.domain.shape).prod())
        x = (1 + 0.1 * torch.arange(n, device=device, dtype=torch.float64).mul(0.7548776662).frac()).to(dtype)
        x = x.reshape(self.domain.shape)
        value = 0.0
        for _ in range(iterations):
            real = torch.view_as_real(x) if x.is_complex() else x
            size = float(dot(real, real)) ** 0.5
            if size == 0:
                value = 0.0
                break
            x = self.normal(x / size, weights)
            real = torch.view_as_real(x) if x.is_complex() else x
            value = float(dot(real, real)) ** 0.5
        if weights is None:
            self._norm = value
        return value

    def _device(self) -> torch.device:
        return torch.device("cpu")

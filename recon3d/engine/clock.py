"""An operator with a clock, so that a run can say where its time went."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor

from recon3d.operators.base import LinearOperator

__all__ = ["Timed"]


class Timed(LinearOperator):
    """Any operator, counting the wall time spent in it.

    Attributes:
        inner: the operator.
        seconds: so far.
    """

    def __init__(self, inner: LinearOperator) -> None:
        self.inner = inner
        self.domain, self.range, self.coupling = inner.domain, inner.range, inner.coupling
        self.seconds = 0.0

    def forward(self, x: Tensor) -> Tensor:
        """As the inner operator, and so the others."""
        return self._timed(self.inner.forward, x)

    def adjoint(self, y: Tensor) -> Tensor:
        return self._timed(self.inner.adjoint, y)

    def normal(self, x: Tensor, weights: Tensor | None = None) -> Tensor:
        return self._timed(self.inner.normal, x, weights)

    def residual(self, x: Tensor, y: Tensor, weights: Tensor | None = None) -> Tensor:
        return self._timed(self.inner.residual, x, y, weights)

    def pinv(self, y: Tensor) -> Tensor:
        return self._timed(self.inner.pinv, y)

    def subsets(self, n: int) -> list[tuple[Self, Tensor]]:
        return [(type(self)(part), index) for part, index in self.inner.subsets(n)]

    def norm(self, weights: Tensor | None = None, iterations: int = 20) -> float:
        start = time.perf_counter()
        value = self.inner.norm(weights, iterations)
        self.seconds += time.perf_counter() - start
        return value

    def _timed(self, function: Callable[..., Tensor], *arguments: Any) -> Tensor:
        start = time.perf_counter()
        out = function(*arguments)
        if out.is_cuda:
            torch.cuda.synchronize(out.device)
        self.seconds += time.perf_counter() - start
        return out

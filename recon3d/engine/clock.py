"""An operator with a clock, so that a run can say where its time went."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor

from recon3d.operators.base import LinearOperator

__all__ = ["Timed"]


class _Clock:
    seconds = 0.0


class Timed(LinearOperator):
    """Any operator, counting the wall time spent in it; its subsets count on the same clock.

    What an operator has beyond the contract (`factors`, `additive`, `expected`, `sensitivity` of PET) is found here
    too; functions of it are timed.

    Attributes:
        inner: the operator.
    """

    def __init__(self, inner: LinearOperator, clock: _Clock | None = None) -> None:
        self.inner = inner
        self.domain, self.range, self.coupling = inner.domain, inner.range, inner.coupling
        self._clock = clock or _Clock()
        self._subsets: dict[int, list[tuple[Self, Tensor]]] = {}

    @property
    def seconds(self) -> float:
        """Spent so far."""
        return self._clock.seconds

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
        if n not in self._subsets:
            parts = self._timed(self.inner.subsets, n)
            self._subsets[n] = [(type(self)(part, self._clock), index) for part, index in parts]
        return self._subsets[n]

    def norm(self, weights: Tensor | None = None, iterations: int = 20) -> float:
        return self._timed(self.inner.norm, weights, iterations)

    def __getattr__(self, name: str) -> Any:
        if name == "inner":  # not set yet
            raise AttributeError(name)
        value = getattr(self.inner, name)
        if not callable(value):
            return value
        return lambda *arguments, **named: self._timed(value, *arguments, **named)

    def _timed(self, function: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        start = time.perf_counter()
        out = function(*arguments, **named)
        if isinstance(out, Tensor) and out.is_cuda:
            torch.cuda.synchronize(out.device)
        self._clock.seconds += time.perf_counter() - start
        return out

"""Small stand-ins for scanners and priors, exact and fast enough to run loops on in tests."""

from __future__ import annotations

import torch
from torch import Tensor

from recon3d.operators.base import LinearOperator, Space


class MatrixOperator(LinearOperator):
    """The same dense matrix [rays, pixels] on every slice; measurement [slice, view=1, ray]."""

    coupling = "slice"

    def __init__(self, matrix: Tensor, shape: tuple[int, int, int]) -> None:
        self.matrix = matrix
        self.domain = Space(shape, matrix.dtype, "1")
        self.range = Space((shape[0], 1, matrix.shape[0]), matrix.dtype, "1")

    def forward(self, x: Tensor) -> Tensor:
        return (x.flatten(-2) @ self.matrix.T).unsqueeze(-2)

    def adjoint(self, y: Tensor) -> Tensor:
        return (y.squeeze(-2) @ self.matrix).unflatten(-1, self.domain.shape[1:])

    def pinv(self, y: Tensor) -> Tensor:
        return (y.squeeze(-2) @ torch.linalg.pinv(self.matrix.double()).to(y).T).unflatten(-1, self.domain.shape[1:])

    def norm(self, weights: Tensor | None = None, iterations: int = 20) -> float:
        w = 1.0 if weights is None else float(weights.max())
        return w * float(torch.linalg.matrix_norm(self.matrix.double(), 2)) ** 2


class Shrink:
    """A denoiser with memory of its neighbours' pixels: nothing statistical, only repeatable arithmetic."""

    offset, scale = 0.0, 1.0

    def __init__(self, spread: float = 0.5, dtype: torch.dtype = torch.float64) -> None:
        self.spread = spread

    def denoise(self, u: Tensor, sigma: float, cond: Tensor | None = None) -> Tensor:
        gain = self.spread**2 / (self.spread**2 + sigma**2)
        return gain * (0.8 * u + 0.1 * (u.roll(1, -1) + u.roll(-1, -2))) + 0.05 * torch.tanh(u)

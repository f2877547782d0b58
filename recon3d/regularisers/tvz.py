"""Total variation along z by ADMM, with the split and its dual carried from level to level.

Adds rho D^T D to the matrix of the data term and rho D^T (z - w) to its right-hand side; after each solve
z = shrink(D x + w, threshold), w += D x - z. D is the slice difference times reference_mm / spacing_mm, zero at the
last slice (Neumann). Real and imaginary parts of a complex volume are shrunk apart: a phase that turns from slice to
slice then costs as much as a change of magnitude, and the split stays a one-pass kernel.
Source: Chung et al., DiffusionMBIR (CVPR 2023), with the split variables shared across levels.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from dataclasses import dataclass

import torch
from torch import Tensor

from recon3d import ops
from recon3d.real_view import real_view

__all__ = ["TVz"]


@dataclass
class TVz:
    """Split state and strength of TV along z.

    Attributes:
        threshold: lambda / rho, the jump that is shrunk to nothing, user units per reference spacing.
        factor: reference spacing / slice spacing.
        periodic: join the last slice to the first, as the published code does; for comparison with it only.
    """

    threshold: float
    factor: float = 1.0
    periodic: bool = False

    def __post_init__(self) -> None:
        if not self.threshold >= 0:
            raise ValueError(f"TVz: threshold must not be negative, got {self.threshold}")
        if not self.factor > 0:
            raise ValueError(f"TVz: factor must be positive, got {self.factor}")

    def duals(self, x: Tensor, state: MutableMapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """(w, g = D^T (z - w)) from the state, zeros at first use."""
        for name in ("tvz_dual", "tvz_pull"):
            if name not in state:
                state[name] = torch.zeros_like(x)
        return state["tvz_dual"], state["tvz_pull"]

    def add_normal(self, q: Tensor, x: Tensor, rho: float) -> Tensor:
        """q += rho D^T D x in place."""
        ops.tvz_normal(real_view(x), rho * self.factor**2, self.periodic, add_to=real_view(q))
        return q

    def update(self, x: Tensor, state: MutableMapping[str, Tensor]) -> None:
        """The split and dual update after a solve, in place in the state."""
        w, g = self.duals(x, state)
        views = real_view(x), None, real_view(w), real_view(g)
        ops.tvz_update_(*views, self.threshold, self.factor, self.periodic)

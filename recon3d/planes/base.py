"""What the loop asks of planes, and the views they are made of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from recon3d.trajectory import Level

__all__ = ["PLANES", "Planes", "View", "turn"]

# the axis of [z, y, x] that a plane's slices are counted along
PLANES = {"axial": 0, "coronal": 1, "sagittal": 2}


@dataclass(frozen=True)
class View:
    """Slices index .. index+count-1 across one axis of the volume, which the prior answers for.

    Attributes:
        index: first of them.
        count: how many.
        axis: 0 = z (axial), 1 = y (coronal), 2 = x (sagittal).
        weight: of the answer where several views share a voxel; they add up to 1.
        before: of a group of neighbours, how many come before `index` and are only looked at.
    """

    index: int
    count: int = 1
    axis: int = 0
    weight: float = 1.0
    before: int = 0


class Planes(Protocol):
    """Maps a volume to the prior's batches and back."""

    def views(self, level: Level) -> list[View]:
        """What the prior sees at this level; together the views cover the volume."""
        ...

    def gather(self, u: Tensor, view: View) -> Tensor:
        """The view as [batch, channel, row, col]; may share memory with u."""
        ...

    def scatter(self, out: Tensor, x0: Tensor, view: View) -> None:
        """Put the prior's answer to a view into the volume `out`, which starts as zeros."""
        ...

    def pulling(self, v: Tensor) -> Planes:
        """Planes for (dx0/du)^T v: they gather v by the transpose of scatter, and scatter by the transpose of gather.

        Where scatter is the transpose of gather already, these planes themselves.
        """
        ...


def turn(level: Level) -> int:
    """Which turn of the planes a visit is: all visits of one step ask about the same slices.

    The halves of a Heun step share a turn; a Runge-Kutta method of adaptive steps needs one field from start to end.
    """
    if level.kind == "stage":
        return 0
    return level.index // 2 if level.kind in ("predict", "refine") else level.index

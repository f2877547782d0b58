"""Which slices of a volume the prior sees at a level, and how its answers become a volume again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from recon3d.trajectory import Level

__all__ = ["Axial", "Planes", "View"]


@dataclass(frozen=True)
class View:
    """Slices index .. index+count-1 across one axis of the volume (0 = z: axial)."""

    index: int
    count: int = 1
    axis: int = 0


class Planes(Protocol):
    """Maps a volume to the prior's batches and back."""

    def views(self, level: Level) -> list[View]:
        """What the prior sees at this level; together the views cover the volume."""
        ...

    def gather(self, u: Tensor, view: View) -> Tensor:
        """The view as [batch, channel, row, col]; may share memory with u."""
        ...

    def scatter(self, out: Tensor, x0: Tensor, view: View) -> None:
        """Write the prior's answer to a view into the volume `out`, which starts as zeros."""
        ...


@dataclass(frozen=True)
class Axial:
    """Every axial slice once per level.

    Attributes:
        depth: slices of the volume.
        block: slices per view; the result does not depend on it.
    """

    depth: int
    block: int = 1

    def __post_init__(self) -> None:
        if self.depth < 1 or self.block < 1:
            raise ValueError(f"Axial: depth and block must be at least 1, got {self.depth} and {self.block}")

    def views(self, level: Level) -> list[View]:
        return [View(k, min(self.block, self.depth - k)) for k in range(0, self.depth, self.block)]

    def gather(self, u: Tensor, view: View) -> Tensor:
        return u[view.index : view.index + view.count, None]

    def scatter(self, out: Tensor, x0: Tensor, view: View) -> None:
        out[view.index : view.index + view.count] = x0[:, 0]

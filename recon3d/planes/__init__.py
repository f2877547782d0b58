"""Which slices of a volume the prior sees at a level, and how its answers become a volume again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from recon3d.trajectory import Level

__all__ = ["Axial", "InTurn", "Planes", "View"]


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


@dataclass(frozen=True)
class InTurn:
    """Slices across one axis per level, the axes in turn, so that no direction is left to itself.

    Webber et al. (IEEE Trans. Med. Imaging 44 (2025) 4445) ask perpendicular networks; here one sees them all.

    Attributes:
        shape: of the volume.
        order: axes (0 = z: axial, 1 = y: coronal, 2 = x: sagittal) of the levels, from the first on.
    """

    shape: tuple[int, ...]
    order: tuple[int, ...] = (0, 1, 0, 2)

    def __post_init__(self) -> None:
        if not self.order or any(axis not in (0, 1, 2) for axis in self.order):
            raise ValueError(f"InTurn: order must name axes 0, 1, 2, got {self.order}")

    def views(self, level: Level) -> list[View]:
        axis = self.order[level.index % len(self.order)]
        return [View(k, 1, axis) for k in range(self.shape[axis])]

    def gather(self, u: Tensor, view: View) -> Tensor:
        return u.movedim(view.axis, 0)[view.index : view.index + view.count, None]

    def scatter(self, out: Tensor, x0: Tensor, view: View) -> None:
        out.movedim(view.axis, 0)[view.index : view.index + view.count] = x0[:, 0]

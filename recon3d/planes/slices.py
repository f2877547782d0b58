"""Single slices: of one plane, of several in turn, or of all three with their answers averaged."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from recon3d.ops.philox import philox_bits
from recon3d.planes.base import View, turn
from recon3d.trajectory import Level

__all__ = ["Averaged", "Axial", "InTurn"]

# stream of the key by which a plane is drawn; noise has 0 to 3
_STREAM = 16


class _Slices:
    """Views of whole slices, each its own channel."""

    def gather(self, u: Tensor, view: View) -> Tensor:
        return u.movedim(view.axis, 0)[view.index : view.index + view.count, None]

    def scatter(self, out: Tensor, x0: Tensor, view: View) -> None:
        place = out.movedim(view.axis, 0)[view.index : view.index + view.count]
        if view.weight == 1:
            place.copy_(x0[:, 0])
        else:
            place.add_(x0[:, 0], alpha=view.weight)


@dataclass(frozen=True)
class Axial(_Slices):
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

    def pulling(self, v: Tensor) -> Axial:
        return self


@dataclass(frozen=True)
class InTurn(_Slices):
    """Slices across one axis per level, the axes in turn, so that no direction is left to itself.

    Lee et al. (TPDM, ICCV 2023, arXiv 2303.08440) ask a second network across the first one's slices at every K-th
    step; Webber et al. (IEEE Trans. Med. Imaging 44 (2025) 4445) perpendicular networks.

    Attributes:
        shape: of the volume.
        order: axes (0 = z: axial, 1 = y: coronal, 2 = x: sagittal) of the levels, from the first on, again and again.
        second_every: K of two axes: the second one's level is the last of every K; of a K that is no whole number, a
            level is the second one's with probability 1/K.
        seed: of these draws, which do not depend on anything else.
    """

    shape: tuple[int, ...]
    order: tuple[int, ...] = (0, 1, 0, 2)
    second_every: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.order or any(axis not in (0, 1, 2) for axis in self.order):
            raise ValueError(f"InTurn: order must name axes 0, 1, 2, got {self.order}")
        if self.second_every is not None and not (len(self.order) == 2 and self.second_every > 1):
            raise ValueError(
                f"InTurn: second_every goes with an order of two axes and is above 1, got {self.second_every} and "
                f"{self.order}"
            )

    def views(self, level: Level) -> list[View]:
        axis = self._axis(turn(level))
        return [View(k, 1, axis) for k in range(self.shape[axis])]

    def pulling(self, v: Tensor) -> InTurn:
        return self

    def _axis(self, turn: int) -> int:
        k = self.second_every
        if k is None:
            return self.order[turn % len(self.order)]
        if k == int(k):
            return self.order[turn % int(k) == int(k) - 1]
        return self.order[int(philox_bits(self.seed, turn, 1, 4, _STREAM)[0, 0]) < 2**32 / k]


@dataclass(frozen=True)
class Averaged(_Slices):
    """Slices of all three planes at every level, a voxel's estimate the mean of the three.

    The average of estimates of Li et al. (TOSM, Comput. Biol. Med. 168 (2024) 107819, arXiv 2308.08511); a sum of their
    scores would count the prior three times.

    Attributes:
        shape: of the volume.
    """

    shape: tuple[int, ...]

    def views(self, level: Level) -> list[View]:
        return [View(k, 1, axis, 1 / 3) for axis in range(3) for k in range(self.shape[axis])]

    def pulling(self, v: Tensor) -> Averaged:
        return self

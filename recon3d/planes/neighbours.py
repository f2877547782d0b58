"""Groups of neighbouring slices, for priors that denoise several at once."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from recon3d.ops.philox import philox_bits
from recon3d.planes.base import Planes, View, turn
from recon3d.trajectory import Level

__all__ = ["Neighbours"]

# stream of the key by which offsets are drawn; noise has 0 to 3
_STREAM = 17


@dataclass(frozen=True)
class Neighbours:
    """Groups of neighbouring slices, side by side in the channels, instead of the single slices of other planes.

    A level's groups do not overlap; where the first one begins is drawn anew for every level, so that no two slices
    are always apart (Song et al., DiffusionBlend, NeurIPS 2024, arXiv 2406.10211). A group that reaches beyond the
    volume is completed by slices reflected at its end, whose answers are dropped.

    Attributes:
        planes: single slices, axis by axis.
        shape: of the volume.
        slices: in a group.
        seed: of the offsets, which depend on nothing else but the level.
        overlap: all groups at every level, a slice's estimate the mean of its places in them: less error than in any
            one place, at as many times the cost.
    """

    planes: Planes
    shape: tuple[int, ...]
    slices: int = 3
    seed: int = 0
    overlap: bool = False

    def __post_init__(self) -> None:
        if self.slices < 1:
            raise ValueError(f"Neighbours: slices must be at least 1, got {self.slices}")

    def views(self, level: Level) -> list[View]:
        singles = self.planes.views(level)
        views: list[View] = []
        for (axis, weight), _ in itertools.groupby(singles, lambda view: (view.axis, view.weight)):
            views += self._groups(turn(level), axis, weight)
        return views

    def gather(self, u: Tensor, view: View) -> Tensor:
        return u.movedim(view.axis, 0)[self._places(view)][None]

    def scatter(self, out: Tensor, x0: Tensor, view: View) -> None:
        self.planes.scatter(out, x0[0, view.before : view.before + view.count, None], view)

    def pulling(self, v: Tensor) -> Planes:
        return _Pulling(self, v)

    def _groups(self, turn: int, axis: int, weight: float) -> list[View]:
        depth, n = self.shape[axis], self.slices
        if self.overlap:
            starts, weight = range(1 - n, depth), weight / n
        else:
            starts = range(-(int(philox_bits(self.seed, turn, 3, 4, _STREAM)[axis, 0]) % n), depth, n)
        views = []
        for start in starts:
            first, end = max(start, 0), min(start + n, depth)
            views.append(View(first, end - first, axis, weight, first - start))
        return views

    def _places(self, view: View) -> list[int]:
        """The slices of a group, those beyond the ends reflected."""
        depth = self.shape[view.axis]
        start = view.index - view.before
        return [_reflected(k, depth) for k in range(start, start + self.slices)]


@dataclass(frozen=True, eq=False)
class _Pulling:
    """The transposes of how `Neighbours` gather and scatter, for a direction v."""

    forward: Neighbours
    v: Tensor

    def views(self, level: Level) -> list[View]:
        return self.forward.views(level)

    def gather(self, u: Tensor, view: View) -> Tensor:
        group = self.forward.gather(u, view)
        if u is not self.v:
            return group
        own = torch.zeros_like(group)
        inside = slice(view.before, view.before + view.count)
        own[:, inside] = group[:, inside] * view.weight
        return own

    def scatter(self, out: Tensor, x0: Tensor, view: View) -> None:
        place = out.movedim(view.axis, 0)
        # one by one: a reflected slice and its original are added in a fixed order
        for k, row in zip(self.forward._places(view), x0[0], strict=True):
            place[k].add_(row)

    def pulling(self, v: Tensor) -> Planes:
        return _Pulling(self.forward, v)


def _reflected(k: int, depth: int) -> int:
    """Index k of a row of `depth` that goes back and forth for ever, its ends once a turn."""
    if depth == 1:
        return 0
    k %= 2 * (depth - 1)
    return min(k, 2 * (depth - 1) - k)

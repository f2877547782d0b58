"""The steps of the NUFFT between which the FFT stands: pad, interpolate, spread, crop; and the NUFFT made of them.

Interpolation and spreading alone, without FFT, also serve density compensation. On CUDA the four steps are kernels and
the FFT is torch's; `forward`, `adjoint`, `normal` and `points_vjp` put them together and are registered there as the
ops of recon3d/ops/nufft.py. Cells are the oversampled grid in FFT order, k = 0 first; the rest is as in that file.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from recon3d.ops import _library

__all__ = ["adjoint", "forward", "normal", "points_vjp"]

# images at a time: bounds the oversampled grids in memory, and is what the kernels take at once
_TOGETHER = 64


def forward(
    x: Tensor,
    order: Tensor,
    first: Tensor,
    weights: Tensor,
    scale: Tensor,
    tiles: Tensor,
    grid: Sequence[int],
    tile: int,
) -> Tensor:
    """recon3d::nufft by pad, FFT and interpolation."""
    d = len(grid)

    def step(images: Tensor) -> Tensor:
        cells = _transformed(images, scale, grid)
        out: Tensor = torch.ops.recon3d.nufft_interpolate(cells, order, first, weights, tiles, grid, tile)
        return out

    return _in_parts(step, x.reshape(-1, *x.shape[-d:])).reshape(*x.shape[:-d], len(order))


def adjoint(
    y: Tensor,
    order: Tensor,
    first: Tensor,
    weights: Tensor,
    scale: Tensor,
    tiles: Tensor,
    shape: Sequence[int],
    grid: Sequence[int],
    tile: int,
) -> Tensor:
    """recon3d::nufft_adjoint by spreading, FFT and crop."""

    def step(samples: Tensor) -> Tensor:
        cells = torch.ops.recon3d.nufft_spread(samples, order, first, weights, tiles, grid, tile)
        cells = torch.fft.ifftn(cells.reshape(-1, *grid), dim=_axes(grid), norm="forward")
        out: Tensor = torch.ops.recon3d.nufft_crop(cells, scale, shape)
        return out

    return _in_parts(step, y.reshape(-1, y.shape[-1])).reshape(*y.shape[:-1], *shape)


def normal(
    x: Tensor,
    density: Tensor,
    order: Tensor,
    first: Tensor,
    weights: Tensor,
    scale: Tensor,
    tiles: Tensor,
    grid: Sequence[int],
    tile: int,
) -> Tensor:
    """recon3d::nufft_normal: forward, weights, adjoint, a part of the stack at a time."""
    d = len(grid)
    shape = x.shape[-d:]

    def step(images: Tensor) -> Tensor:
        y = forward(images, order, first, weights, scale, tiles, grid, tile)
        if density.numel():
            y *= density
        return adjoint(y, order, first, weights, scale, tiles, shape, grid, tile)

    return _in_parts(step, x.reshape(-1, *shape)).reshape(x.shape)


def points_vjp(
    x: Tensor,
    y: Tensor,
    order: Tensor,
    first: Tensor,
    weights: Tensor,
    slopes: Tensor,
    scale: Tensor,
    tiles: Tensor,
    grid: Sequence[int],
    tile: int,
) -> Tensor:
    """recon3d::nufft_points_vjp: one FFT, and an interpolation with slopes for every axis."""
    d = len(grid)
    images, samples = x.reshape(-1, *x.shape[-d:]), y.reshape(-1, y.shape[-1])
    out = weights.new_zeros(len(order), d)
    for part, given in zip(images.split(_TOGETHER), samples.split(_TOGETHER), strict=True):
        cells = _transformed(part, scale, grid)
        for a in range(d):
            mixed = weights.clone()
            mixed[:, a] = slopes[:, a]
            by_k = torch.ops.recon3d.nufft_interpolate(cells, order, first, mixed, tiles, grid, tile)
            out[:, a] += (by_k * given.conj()).real.sum(0)
    return out


def _transformed(images: Tensor, scale: Tensor, grid: Sequence[int]) -> Tensor:
    padded = torch.ops.recon3d.nufft_pad(images, scale, grid)
    return torch.fft.fftn(padded, dim=_axes(grid)).flatten(1)


def _in_parts(step: Callable[[Tensor], Tensor], data: Tensor) -> Tensor:
    if len(data) <= _TOGETHER:
        return step(data)
    return torch.cat([step(part) for part in data.split(_TOGETHER)])


def _axes(grid: Sequence[int]) -> tuple[int, ...]:
    return tuple(range(1, len(grid) + 1))


# ---- references -----------------------------------------------------------------------------------------------------


def _scaled(x: Tensor, scale: Tensor, shape: Sequence[int]) -> Tensor:
    for a, part in enumerate(scale.split(list(shape))):
        x = x * part.reshape(-1, *[1] * (len(shape) - 1 - a))
    return x


def _pad(x: Tensor, scale: Tensor, grid: Sequence[int]) -> Tensor:
    shape = x.shape[1:]
    cells = x.new_zeros(len(x), *grid)
    cells[(slice(None), *(slice(0, n) for n in shape))] = _scaled(x, scale, shape)
    return cells.roll([-(n // 2) for n in shape], _axes(grid))


def _crop(cells: Tensor, scale: Tensor, shape: Sequence[int]) -> Tensor:
    cells = cells.roll([n // 2 for n in shape], _axes(shape))
    return _scaled(cells[(slice(None), *(slice(0, n) for n in shape))], scale, shape)


def _taps(first: Tensor, weights: Tensor, grid: Sequence[int]) -> Iterator[tuple[Tensor, Tensor]]:
    """Of every tap: the cell [M] in FFT order and its weight [M]."""
    for tap in itertools.product(*(range(weights.shape[2] if g > 1 else 1) for g in grid)):
        cell = torch.zeros_like(first[:, 0], dtype=torch.int64)
        weight = torch.ones_like(weights[:, 0, 0])
        for a, (t, g) in enumerate(zip(tap, grid, strict=True)):
            cell = cell * g + (first[:, a].long() + (t - g // 2)) % g
            weight = weight * weights[:, a, t]
        yield cell, weight


def _interpolate(
    cells: Tensor, order: Tensor, first: Tensor, weights: Tensor, tiles: Tensor, grid: Sequence[int], tile: int
) -> Tensor:
    found = cells.new_zeros(len(cells), len(order))
    for cell, weight in _taps(first, weights, grid):
        found += cells[:, cell] * weight
    return torch.empty_like(found).index_copy_(1, order.long(), found)


def _spread(
    y: Tensor, order: Tensor, first: Tensor, weights: Tensor, tiles: Tensor, grid: Sequence[int], tile: int
) -> Tensor:
    sorted_y = y[:, order.long()]
    cells = y.new_zeros(len(y), math.prod(grid))
    for cell, weight in _taps(first, weights, grid):
        cells.index_add_(1, cell, sorted_y * weight)
    return cells


# x [b, *shape] -> [b, *grid] and back; scale real, per axis one after another
_library.define(
    "nufft_pad(Tensor x, Tensor scale, int[] grid) -> Tensor",
    _pad,
    lambda x, scale, grid: x.new_empty((x.shape[0], *grid)),
)
_library.define(
    "nufft_crop(Tensor cells, Tensor scale, int[] shape) -> Tensor",
    _crop,
    lambda cells, scale, shape: cells.new_empty((cells.shape[0], *shape)),
)
# cells [b, prod(grid)], y [b, M] in the order of the points; order, first, weights and tiles as in NufftPlan
_PLAN = "Tensor order, Tensor first, Tensor weights, Tensor tiles, int[] grid, int tile"
_library.define(
    f"nufft_interpolate(Tensor cells, {_PLAN}) -> Tensor",
    _interpolate,
    lambda cells, order, first, weights, tiles, grid, tile: cells.new_empty((cells.shape[0], order.shape[0])),
)
_library.define(
    f"nufft_spread(Tensor y, {_PLAN}) -> Tensor",
    _spread,
    lambda y, order, first, weights, tiles, grid, tile: y.new_empty((y.shape[0], math.prod(grid))),
)

"""Non-uniform FFT of stacks of images in one, two or three dimensions, and its exact conjugate transpose.

    y_j = 1 / sqrt(prod N) sum_n x_n exp(-i k_j . n),     n = i - N // 2,   k_j in radians per pixel

evaluated within the plan's eps: the image is divided by the kernel's transform, zero-padded and Fourier transformed to
an oversampled grid whose middle is k = 0, and every sample is a weighted sum of the w^d grid points around it
(recon3d/ops/nufft_kernel.py has the kernel). The adjoint runs the same steps backwards with the same weights, so it is
the transpose to rounding, whatever eps. All images of a stack share the points, and so the weights.

Source of the method: Dutt and Rokhlin, SIAM J. Sci. Comput. 14 (1993) 1368; Greengard and Lee, SIAM Review 46 (2004).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from recon3d.ops import _library, nufft_grid
from recon3d.ops.nufft_plan import LEAST_EPS, NufftPlan, Unit, nufft_plan

__all__ = ["NufftPlan", "nufft", "nufft_adjoint", "nufft_normal", "nufft_plan", "nufft_toeplitz_kernel"]

_REAL = {torch.complex64: torch.float32, torch.complex128: torch.float64}
# of the plan behind a Toeplitz kernel: below float32's reach, so that the kernel's own error never shows
_TOEPLITZ_EPS = 1e-8


def nufft(x: Tensor, plan: NufftPlan) -> Tensor:
    """Samples of the Fourier transform of every image at the plan's points.

    Args:
        x: images, [..., [z,] y, x] complex64 or complex128; any leading axes, any unit.
        plan: from nufft_plan, on x's device.

    Returns:
        [..., M] with x's dtype, device and unit, in the order of the points. Differentiable in x, and in the points
        when they required grad.

    Raises:
        ValueError: a shape or device that does not fit, or eps below the reach of x's dtype.
        TypeError: x is not complex.

    Kernels: torch (any device), C++ (CPU), CUDA. An image's result does not depend on its neighbours or on threads.

    >>> plan = nufft_plan([[0.0, 0.0]], (4, 4))
    >>> nufft(torch.ones(4, 4, dtype=torch.complex64), plan).real.round(decimals=2).tolist()
    [4.0]
    """
    _check("nufft", x, plan, plan.shape)
    if plan.source is not None and plan.source.requires_grad and torch.is_grad_enabled():
        out: Tensor = _AtPoints.apply(x, plan.source, plan)
        return out
    return _forward(x, plan)


def nufft_adjoint(y: Tensor, plan: NufftPlan) -> Tensor:
    """Conjugate transpose of nufft: every sample is spread over the images.

    Args:
        y: samples, [..., M] complex64 or complex128, in the order of the points.
        plan: from nufft_plan, on y's device.

    Returns:
        [..., [z,] y, x] with y's dtype, device and unit; differentiable like nufft. No density compensation: multiply
        y by it first.

    Raises:
        ValueError: a shape or device that does not fit, or eps below the reach of y's dtype.
        TypeError: y is not complex.

    Kernels: torch (any device), C++ (CPU), CUDA.

    >>> plan = nufft_plan([[0.0, 0.0]], (2, 2))
    >>> nufft_adjoint(torch.ones(1, dtype=torch.complex64), plan).real.round(decimals=2).tolist()
    [[0.5, 0.5], [0.5, 0.5]]
    """
    _check("nufft_adjoint", y, plan, (plan.n_points,))
    if plan.source is not None and plan.source.requires_grad and torch.is_grad_enabled():
        out: Tensor = _FromPoints.apply(y, plan.source, plan)
        return out
    return _adjoint(y, plan)


def nufft_normal(x: Tensor, plan: NufftPlan, weights: Tensor | None = None) -> Tensor:
    """nufft_adjoint(weights * nufft(x)) in one pass, without the samples in between in memory.

    Args:
        x: images, [..., [z,] y, x] complex64 or complex128.
        plan: from nufft_plan, on x's device.
        weights: [M] real, per sample; None weighs all alike. Not differentiable.

    Returns:
        Images like x, differentiable in x.

    Raises:
        ValueError: a shape or device that does not fit, or eps below the reach of x's dtype.
        TypeError: x is not complex, or weights are.

    Kernels: torch (any device), C++ (CPU), CUDA.

    >>> plan = nufft_plan([[0.0, 0.0]], (2, 2))
    >>> nufft_normal(torch.ones(2, 2, dtype=torch.complex64), plan).real.round(decimals=2).tolist()
    [[1.0, 1.0], [1.0, 1.0]]
    """
    _check("nufft_normal", x, plan, plan.shape)
    if weights is None:
        density = plan.order.new_empty(0, dtype=_REAL[x.dtype])
    else:
        density = _check_weights("nufft_normal", weights, plan.n_points).to(x.device, _REAL[x.dtype])
    out: Tensor = torch.ops.recon3d.nufft_normal(x, density, *_tensors(plan, x.dtype), plan.grid, plan.tile)
    return out


def nufft_toeplitz_kernel(
    points: NufftPlan | Tensor,
    shape: Sequence[int],
    weights: Tensor | None = None,
    *,
    unit: Unit = "rad",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The circulant twice the image's size that holds A* W A, where A is nufft and W the weights.

    A* W A x = crop(ifftn(kernel * fftn(pad(x)))): pad appends zeros to 2 N along every axis, crop takes the first N.
    Exact to 1e-8 and independent of the plan's eps.

    Args:
        points: a plan, or points as for nufft_plan.
        shape: image, ([z,] y, x).
        weights: [M] real, per sample; None weighs all alike.
        unit: of the points; a plan knows its own.
        dtype: of the kernel, float32 or float64; computed in float64.

    Returns:
        [2 N ...] real, in FFT order, all scaling included; on the device of the points.

    Raises:
        ValueError: as nufft_plan, or weights or shape that do not fit.
    """
    sizes = tuple(int(n) for n in shape)
    if isinstance(points, NufftPlan):
        if points.shape != sizes:
            raise ValueError(f"nufft_toeplitz_kernel: the plan is for shape {points.shape}, got {sizes}")
        radians = points.radians()
    else:
        radians = nufft_plan(points, sizes, unit=unit, eps=1e-2).radians()
    double = nufft_plan(radians.detach(), [2 * n for n in sizes], eps=_TOEPLITZ_EPS).to(radians.device)
    density = torch.ones(len(radians), device=radians.device)
    if weights is not None:
        density = _check_weights("nufft_toeplitz_kernel", weights, len(radians)).to(radians.device)
    lags = nufft_adjoint(density.to(torch.complex128), double)
    for axis in range(len(sizes)):  # lag -N has no partner, and no pixel pair needs it
        lags.select(axis, 0).zero_()
    axes = tuple(range(len(sizes)))
    kernel = torch.fft.fftn(torch.fft.ifftshift(lags, axes), dim=axes).real
    return (kernel * math.sqrt(2 ** len(sizes) / math.prod(sizes))).to(dtype)


def _check(op: str, data: Tensor, plan: NufftPlan, last: tuple[int, ...]) -> None:
    if data.dtype not in _REAL:
        raise TypeError(f"{op}: complex64 or complex128 needed, got {data.dtype}")
    if data.ndim < len(last) or tuple(data.shape[-len(last) :]) != last:
        raise ValueError(f"{op}: the plan is for data [..., {', '.join(map(str, last))}], got {list(data.shape)}")
    if data.device != plan.device:
        raise ValueError(f"{op}: data on {data.device}, plan on {plan.device}; use plan.to({str(data.device)!r})")
    if plan.eps < LEAST_EPS[data.dtype]:
        raise ValueError(
            f"{op}: eps {plan.eps:g} is below complex64's reach of {LEAST_EPS[torch.complex64]:g}; "
            "give complex128 data or plan with a larger eps"
        )


def _check_weights(op: str, weights: Tensor, n: int) -> Tensor:
    if weights.is_complex():
        raise TypeError(f"{op}: weights must be real, got {weights.dtype}")
    if weights.shape != (n,):
        raise ValueError(f"{op}: one weight per sample needed, [{n}], got {list(weights.shape)}")
    return weights.detach()


def _tensors(plan: NufftPlan, dtype: torch.dtype) -> tuple[Tensor, ...]:
    _library.ensure()
    real = _REAL[dtype]
    return plan.order, plan.first, plan.weights(real), plan.scales(real), plan.tiles


def _forward(x: Tensor, plan: NufftPlan) -> Tensor:
    out: Tensor = torch.ops.recon3d.nufft(x, *_tensors(plan, x.dtype), plan.grid, plan.tile)
    return out


def _adjoint(y: Tensor, plan: NufftPlan) -> Tensor:
    out: Tensor = torch.ops.recon3d.nufft_adjoint(y, *_tensors(plan, y.dtype), plan.shape, plan.grid, plan.tile)
    return out


def _lanes(x: Tensor, plan: NufftPlan) -> Tensor:
    """nufft between engine layouts, [chunk, ([z,] y, x), 8] -> [chunk, M, 8] in the plan's sorted order."""
    out: Tensor = torch.ops.recon3d.nufft_lanes(x, *_tensors(plan, x.dtype), plan.grid, plan.tile)
    return out


def _lanes_adjoint(y: Tensor, plan: NufftPlan) -> Tensor:
    """nufft_adjoint between engine layouts, the way back of _lanes."""
    out: Tensor = torch.ops.recon3d.nufft_lanes_adjoint(y, *_tensors(plan, y.dtype), plan.shape, plan.grid, plan.tile)
    return out


# ---- gradients by the points ----------------------------------------------------------------------------------------


def _points_vjp(x: Tensor, y: Tensor, plan: NufftPlan) -> Tensor:
    """Re sum_b conj(y_bj) d(A x_b)_j / dk_ja, [M, d] float64, in the order of the points."""
    order, first, weights, scale, tiles = _tensors(plan, x.dtype)
    slopes = plan.slopes(_REAL[x.dtype])
    out: Tensor = torch.ops.recon3d.nufft_points_vjp(
        x, y, order, first, weights, slopes, scale, tiles, plan.grid, plan.tile
    )
    return out.double()


class _AtPoints(torch.autograd.Function):
    """nufft as a function of the image and of the points."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, points: Tensor, plan: NufftPlan) -> Tensor:
        ctx.save_for_backward(x)
        ctx.plan, ctx.device = plan, points.device
        return _forward(x, plan)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        by_x = _adjoint(grad, ctx.plan) if ctx.needs_input_grad[0] else None
        by_points = _points_vjp(x, grad, ctx.plan).to(ctx.device) if ctx.needs_input_grad[1] else None
        return by_x, by_points, None


class _FromPoints(torch.autograd.Function):
    """nufft_adjoint as a function of the samples and of the points."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, points: Tensor, plan: NufftPlan) -> Tensor:
        ctx.save_for_backward(y)
        ctx.plan, ctx.device = plan, points.device
        return _adjoint(y, plan)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (y,) = ctx.saved_tensors
        by_y = _forward(grad, ctx.plan) if ctx.needs_input_grad[0] else None
        by_points = _points_vjp(grad, y, ctx.plan).to(ctx.device) if ctx.needs_input_grad[1] else None
        return by_y, by_points, None


# ---- reference ------------------------------------------------------------------------------------------------------


def _axes(scale: Tensor, shape: Sequence[int]) -> Iterator[Tensor]:
    # the scale of each axis, shaped to multiply images
    for a, part in enumerate(scale.split(list(shape))):
        yield part.reshape(-1, *[1] * (len(shape) - 1 - a))


def _to_grid(x: Tensor, scale: Tensor, grid: Sequence[int]) -> Tensor:
    """Images [b, ...] to their oversampled transforms [b, cells], k = 0 at the middle."""
    shape = x.shape[1:]
    if not x.shape[0]:
        return x.new_zeros(0, math.prod(grid))
    for part in _axes(scale, shape):
        x = x * part
    axes = tuple(range(1, x.ndim))
    padded = x.new_zeros(x.shape[0], *grid)
    padded[(slice(None), *(slice(0, n) for n in shape))] = x
    padded = padded.roll([-(n // 2) for n in shape], axes)
    return torch.fft.fftshift(torch.fft.fftn(padded, dim=axes), axes).flatten(1)


def _from_grid(cells: Tensor, scale: Tensor, shape: Sequence[int], grid: Sequence[int]) -> Tensor:
    """Conjugate transpose of _to_grid."""
    if not cells.shape[0]:
        return cells.new_zeros(0, *shape)
    axes = tuple(range(1, len(shape) + 1))
    full = torch.fft.ifftshift(cells.reshape(-1, *grid), axes)
    full = torch.fft.ifftn(full, dim=axes, norm="forward").roll([n // 2 for n in shape], axes)
    x = full[(slice(None), *(slice(0, n) for n in shape))]
    for part in _axes(scale, shape):
        x = x * part
    return x


def _taps(first: Tensor, weights: Sequence[Tensor], grid: Sequence[int]) -> Iterator[tuple[Tensor, Tensor]]:
    """Of every tap: the cell [M] and its weight [M]."""
    used = [weights[a].shape[1] if g > 1 else 1 for a, g in enumerate(grid)]
    for tap in itertools.product(*map(range, used)):
        cell = torch.zeros_like(first[:, 0], dtype=torch.int64)
        weight = torch.ones_like(weights[0][:, 0])
        for a, (t, g) in enumerate(zip(tap, grid, strict=True)):
            cell = cell * g + (first[:, a].long() + t) % g
            weight = weight * weights[a][:, t]
        yield cell, weight


def _interpolate(cells: Tensor, first: Tensor, weights: Sequence[Tensor], grid: Sequence[int]) -> Tensor:
    out = cells.new_zeros(cells.shape[0], first.shape[0])
    for cell, weight in _taps(first, weights, grid):
        out += cells[:, cell] * weight
    return out


def _reference(
    x: Tensor,
    order: Tensor,
    first: Tensor,
    weights: Tensor,
    scale: Tensor,
    tiles: Tensor,
    grid: Sequence[int],
    tile: int,
) -> Tensor:
    d = len(grid)
    cells = _to_grid(x.reshape(-1, *x.shape[-d:]), scale, grid)
    y = cells.new_empty(cells.shape[0], len(order))
    y[:, order.long()] = _interpolate(cells, first, weights.unbind(1), grid)
    return y.reshape(*x.shape[:-d], len(order))


def _reference_adjoint(
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
    sorted_y = y.reshape(-1, y.shape[-1])[:, order.long()]
    cells = y.new_zeros(len(sorted_y), math.prod(grid))
    for cell, weight in _taps(first, weights.unbind(1), grid):
        cells.index_add_(1, cell, sorted_y * weight)
    return _from_grid(cells, scale, shape, grid).reshape(*y.shape[:-1], *shape)


def _reference_normal(
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
    y = _reference(x, order, first, weights, scale, tiles, grid, tile)
    if density.numel():
        y = y * density
    return _reference_adjoint(y, order, first, weights, scale, tiles, x.shape[-len(grid) :], grid, tile)


def _reference_lanes(
    x: Tensor,
    order: Tensor,
    first: Tensor,
    weights: Tensor,
    scale: Tensor,
    tiles: Tensor,
    grid: Sequence[int],
    tile: int,
) -> Tensor:
    y = _reference(x.movedim(-1, 1), order, first, weights, scale, tiles, grid, tile)
    return y[..., order.long()].movedim(1, -1).contiguous()


def _reference_lanes_adjoint(
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
    samples = torch.empty_like(y).index_copy_(1, order.long(), y).movedim(-1, 1)
    x = _reference_adjoint(samples, order, first, weights, scale, tiles, shape, grid, tile)
    return x.movedim(1, -1).contiguous()


def _reference_points_vjp(
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
    d = len(grid)
    cells = _to_grid(x.reshape(-1, *x.shape[-d:]), scale, grid)
    sorted_y = y.reshape(-1, y.shape[-1])[:, order.long()]
    out = weights.new_empty(len(order), d)
    for a in range(d):
        mixed = [slopes[:, b] if b == a else weights[:, b] for b in range(d)]
        change = _interpolate(cells, first, mixed, grid)
        out[order.long(), a] = (change.real * sorted_y.real + change.imag * sorted_y.imag).sum(0)
    return out


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, *plan, ctx.grid, ctx.tile = inputs
    ctx.save_for_backward(*plan)
    ctx.shape = x.shape[-len(ctx.grid) :]


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    back = torch.ops.recon3d.nufft_adjoint(grad, *ctx.saved_tensors, ctx.shape, ctx.grid, ctx.tile)
    return (back, *[None] * 7)


def _setup_adjoint(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, *plan, _, ctx.grid, ctx.tile = inputs
    ctx.save_for_backward(*plan)


def _backward_adjoint(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    back = torch.ops.recon3d.nufft(grad, *ctx.saved_tensors, ctx.grid, ctx.tile)
    return (back, *[None] * 8)


def _setup_normal(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, *plan, ctx.grid, ctx.tile = inputs
    ctx.save_for_backward(*plan)


def _backward_normal(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    back = torch.ops.recon3d.nufft_normal(grad, *ctx.saved_tensors, ctx.grid, ctx.tile)
    return (back, *[None] * 8)


# order, first, weights, scale and tiles as in NufftPlan; weights, scale and density real in the dtype of the data
_PLAN = "Tensor order, Tensor first, Tensor weights, Tensor scale, Tensor tiles"

_library.define(
    f"nufft(Tensor x, {_PLAN}, int[] grid, int tile) -> Tensor",
    _reference,
    lambda x, order, first, weights, scale, tiles, grid, tile: x.new_empty((*x.shape[: -len(grid)], order.shape[0])),
    backward=_backward,
    setup_context=_setup,
)
_library.define(
    f"nufft_adjoint(Tensor y, {_PLAN}, int[] shape, int[] grid, int tile) -> Tensor",
    _reference_adjoint,
    lambda y, order, first, weights, scale, tiles, shape, grid, tile: y.new_empty((*y.shape[:-1], *shape)),
    backward=_backward_adjoint,
    setup_context=_setup_adjoint,
)
# density: [M] in the order of the points, or empty
_library.define(
    f"nufft_normal(Tensor x, Tensor density, {_PLAN}, int[] grid, int tile) -> Tensor",
    _reference_normal,
    lambda x, density, order, first, weights, scale, tiles, grid, tile: x.new_empty(x.shape),
    backward=_backward_normal,
    setup_context=_setup_normal,
)
# The same between engine layouts: [chunk, ([z,] y, x), 8] and, in the order of the tiles, [chunk, M, 8]. Nothing is
# transposed or reordered, which saves a fifth of the time; for solvers that keep their data so.
_library.define(
    f"nufft_lanes(Tensor x, {_PLAN}, int[] grid, int tile) -> Tensor",
    _reference_lanes,
    lambda x, order, first, weights, scale, tiles, grid, tile: x.new_empty((x.shape[0], order.shape[0], x.shape[-1])),
)
_library.define(
    f"nufft_lanes_adjoint(Tensor y, {_PLAN}, int[] shape, int[] grid, int tile) -> Tensor",
    _reference_lanes_adjoint,
    lambda y, order, first, weights, scale, tiles, shape, grid, tile: y.new_empty((y.shape[0], *shape, y.shape[-1])),
)
# slopes: [M, d, w], derivatives of the weights by frequency
_library.define(
    "nufft_points_vjp(Tensor x, Tensor y, Tensor order, Tensor first, Tensor weights, Tensor slopes, Tensor scale, "
    "Tensor tiles, int[] grid, int tile) -> Tensor",
    _reference_points_vjp,
    lambda x, y, order, first, weights, slopes, scale, tiles, grid, tile: weights.new_empty(
        (order.shape[0], len(grid))
    ),
)
for _name, _steps in (
    ("nufft", nufft_grid.forward),
    ("nufft_adjoint", nufft_grid.adjoint),
    ("nufft_normal", nufft_grid.normal),
    ("nufft_points_vjp", nufft_grid.points_vjp),
):
    _library.register_cuda(_name, _steps)

"""Line integrals of a volume along arbitrary lines of response, and their exact transpose; optionally time of flight.

A line is a pair of rows (p0, p1) of a table of points: crystals of a PET scanner, a source and a detector cell. Its
main axis is the one along which it runs longest in mm (y before x, and z only where it is strictly longest). For every
plane of voxels across that axis that the segment p0..p1 meets, the volume is interpolated bilinearly in the other two
axes (zero outside, so the border fades within one voxel) and multiplied by the step, spacing * |p1 - p0| / |component|
in mm. A segment that ends inside the volume ends there; p0 = p1 gives 0.
Source: Joseph, IEEE Transactions on Medical Imaging 1 (1982) 192; time-of-flight weights: recon3d.ops.tof.

The volume is centred on the origin of the points: voxel (k, j, i) lies at ((k - (nz-1)/2) dz, (j - (ny-1)/2) dy,
(i - (nx-1)/2) dx). Both operators are linear, and the adjoint uses the very weights of the forward, so each is the
other's gradient.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from recon3d.ops import _library
from recon3d.ops.tof import tof_numbers, tof_weights

if TYPE_CHECKING:
    from recon3d.geometry.pet import TOF

__all__ = ["joseph3d", "joseph3d_adjoint"]

# as in radon: a line at 45 degrees steps over the same axis whatever the last bit of its direction
TIE = 1.0 - 1e-9
# a plane through an end point belongs to the segment; in voxels
SLACK = 1e-9
# elements of the reference's largest temporaries
_CHUNK = 1 << 20


def joseph3d(
    x: Tensor,
    points: Tensor,
    pairs: Tensor,
    spacing_mm: tuple[float, float, float],
    *,
    tof: TOF | None = None,
    tof_bins: Tensor | None = None,
) -> Tensor:
    """Line integrals of every volume along every line.

    Args:
        x: volumes, [..., z, y, x] float32 or float64, usually activity in Bq/mL; any leading axes.
        points: end points of lines, [K, 3] float64, (z, y, x) in mm from the volume's centre.
        pairs: rows of points that a line runs between, [n, 2] int32 (or int64): p0, p1.
        spacing_mm: (dz, dy, dx), distance of voxels in mm.
        tof: time-of-flight bins along the lines; None for plain line integrals.
        tof_bins: the bin of every line, [n] integers from 0 to tof.bins - 1 (bin 0 is nearest to p0); with `tof` and
            without `tof_bins` every line gets all its bins.

    Returns:
        [..., n], or [..., n, T] for all bins, with x's dtype and device, in x's unit times mm. Differentiable in x;
        the gradient is joseph3d_adjoint.

    Raises:
        ValueError: a shape or size that does not fit, a point that is not finite, a pair or bin out of range.
        TypeError: x is neither float32 nor float64, or points, pairs or tof_bins are of the wrong kind.

    Kernels: torch (any device), C++ (CPU), CUDA. A line's value depends neither on the other lines nor on threads.

    >>> ends = torch.tensor([[0.0, -9.0, 0.0], [0.0, 9.0, 0.0]], dtype=torch.float64)
    >>> joseph3d(torch.ones(3, 4, 3), ends, torch.tensor([[0, 1]]), (1.0, 0.5, 1.0)).tolist()
    [2.0]
    """
    spacing = check_data("joseph3d", x, spacing_mm)
    if x.ndim < 3 or 0 in x.shape[-3:]:
        raise ValueError(f"joseph3d: x must be [..., z, y, x] and not empty, got shape {tuple(x.shape)}")
    lines = _check_lines("joseph3d", points, pairs, tof, tof_bins)
    _library.ensure()
    out: Tensor = torch.ops.recon3d.joseph3d(x, *lines[:3], *spacing, *lines[3])
    return out


def joseph3d_adjoint(
    y: Tensor,
    points: Tensor,
    pairs: Tensor,
    shape: tuple[int, int, int],
    spacing_mm: tuple[float, float, float],
    *,
    tof: TOF | None = None,
    tof_bins: Tensor | None = None,
) -> Tensor:
    """Transpose of joseph3d: every line's value is spread over the voxels it met, with the same weights.

    Args:
        y: one value per line, [..., n] float32 or float64; [..., n, T] with `tof` and without `tof_bins`.
        points: as in joseph3d.
        pairs: as in joseph3d, [n, 2].
        shape: (nz, ny, nx) of the volume.
        spacing_mm: (dz, dy, dx) in mm.
        tof: as in joseph3d.
        tof_bins: as in joseph3d.

    Returns:
        [..., z, y, x] with y's dtype and device, in y's unit times mm. Differentiable in y; the gradient is joseph3d.

    Raises:
        ValueError: a shape or size that does not fit, a point that is not finite, a pair or bin out of range.
        TypeError: y is neither float32 nor float64, or points, pairs or tof_bins are of the wrong kind.

    Kernels: torch (any device), C++ (CPU), CUDA. The result does not depend on threads: nothing is added atomically on
    the CPU, and integers are on CUDA.

    >>> ends = torch.tensor([[0.0, -9.0, 0.0], [0.0, 9.0, 0.0]], dtype=torch.float64)
    >>> joseph3d_adjoint(torch.tensor([3.0]), ends, torch.tensor([[0, 1]]), (1, 2, 3), (1.0, 0.5, 1.0)).tolist()
    [[[0.0, 1.5, 0.0], [0.0, 1.5, 0.0]]]
    """
    spacing = check_data("joseph3d_adjoint", y, spacing_mm)
    lines = _check_lines("joseph3d_adjoint", points, pairs, tof, tof_bins)
    tail = (len(pairs),) if tof is None or tof_bins is not None else (len(pairs), int(tof.bins))
    if tuple(y.shape[y.ndim - len(tail) :]) != tail:
        raise ValueError(
            f"joseph3d_adjoint: y must be [..., {', '.join(map(str, tail))}] for {len(pairs)} lines, "
            f"got shape {tuple(y.shape)}"
        )
    if len(shape) != 3 or any(int(n) != n or n < 1 for n in shape):
        raise ValueError(f"joseph3d_adjoint: shape must be three positive sizes (nz, ny, nx), got {tuple(shape)}")
    _library.ensure()
    out: Tensor = torch.ops.recon3d.joseph3d_adjoint(y, *lines[:3], *map(int, shape), *spacing, *lines[3])
    return out


def check_data(op: str, data: Tensor, spacing_mm: tuple[float, float, float]) -> tuple[float, float, float]:
    """The spacing as numbers, of data that either projector takes."""
    if data.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{op}: float32 or float64 needed, got {data.dtype}")
    spacing = tuple(float(s) for s in spacing_mm)
    if len(spacing) != 3 or not all(math.isfinite(s) and s > 0 for s in spacing):
        raise ValueError(f"{op}: spacing_mm must be three positive lengths (dz, dy, dx), got {tuple(spacing_mm)}")
    return spacing[0], spacing[1], spacing[2]


def _check_lines(
    op: str, points: Tensor, pairs: Tensor, tof: TOF | None, tof_bins: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None, tuple[int, float, float, float]]:
    """Points, int32 pairs, int16 bins or None, and the numbers of tof."""
    if points.dtype != torch.float64:
        raise TypeError(f"{op}: points must be float64, got {points.dtype}")
    if points.ndim != 2 or points.shape[1] != 3 or len(points) >= 1 << 31:
        raise ValueError(f"{op}: points must be [K, 3] (z, y, x) in mm, got shape {tuple(points.shape)}")
    if pairs.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{op}: pairs must be int32 or int64, got {pairs.dtype}")
    if pairs.ndim != 2 or pairs.shape[1] != 2:
        raise ValueError(f"{op}: pairs must be [n, 2] rows of points, got shape {tuple(pairs.shape)}")
    if not points.isfinite().all():
        at = int((~points.isfinite()).any(1).nonzero()[0])
        raise ValueError(f"{op}: points must be finite, row {at} is {points[at].tolist()}")
    _check_range(op, "pairs", pairs, len(points), "rows of points")
    numbers = tof_numbers(op, tof)
    if tof_bins is not None:
        if tof is None:
            raise ValueError(f"{op}: tof_bins were given without tof; pass the bins' width and resolution as tof")
        if tof_bins.dtype not in (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64):
            raise TypeError(f"{op}: tof_bins must be integers, got {tof_bins.dtype}")
        if tof_bins.ndim != 1 or len(tof_bins) != len(pairs):
            raise ValueError(f"{op}: tof_bins must be [{len(pairs)}], one per line, got {tuple(tof_bins.shape)}")
        _check_range(op, "tof_bins", tof_bins, numbers[0], "bins")
        tof_bins = tof_bins.to(torch.int32)
    return points, pairs.to(torch.int32), tof_bins, numbers


def _check_range(op: str, name: str, index: Tensor, n: int, what: str) -> None:
    if not index.numel():
        return
    low, high = (int(v) for v in index.aminmax())
    if low < 0 or high >= n:
        raise ValueError(f"{op}: {name} must lie in 0 to {n - 1} for {n} {what}, got {low} to {high}")


class _Rays(NamedTuple):
    """Lines of one main axis; float64, one element per line. Plane j is met at (a + b j, c + e j) of the other axes."""

    which: Tensor  # rows of pairs
    first: Tensor  # planes from first to last, both met
    last: Tensor
    a: Tensor
    b: Tensor
    c: Tensor
    e: Tensor
    d0: Tensor  # distance from the line's middle towards p1 at plane j: d0 + dd j, mm
    dd: Tensor
    step: Tensor  # mm per plane


def _rays(
    points: Tensor, pairs: Tensor, shape: tuple[int, ...], spacing: tuple[float, ...]
) -> Iterator[tuple[int, _Rays]]:
    """Main axis (0 z, 1 y, 2 x) and its lines, for the axes that any line has."""
    p0, p1 = points[pairs[:, 0].long()], points[pairs[:, 1].long()]
    delta = p1 - p0
    length = delta.norm(dim=1)
    z, y, x = delta.abs().unbind(1)
    along = torch.where(y < x * TIE, 2, 1)
    main = torch.where(torch.maximum(y, x) < z * TIE, 0, along)
    for axis in range(3):
        which = ((main == axis) & (length > 0)).nonzero()[:, 0]
        if not len(which):
            continue
        others = [k for k in range(3) if k != axis]
        half = [(n - 1) / 2 for n in shape]
        o, d, total = p0[which], delta[which], length[which]
        # index of p0 on the main axis and planes from there to p1
        start, reach = o[:, axis] / spacing[axis] + half[axis], d[:, axis] / spacing[axis]
        first = (torch.minimum(start, start + reach) - SLACK).ceil().clamp(0, shape[axis])
        last = (torch.maximum(start, start + reach) + SLACK).floor().clamp(-1, shape[axis] - 1)
        slopes = [d[:, k] / spacing[k] / reach for k in others]
        at_zero = [o[:, k] / spacing[k] + half[k] - s * start for k, s in zip(others, slopes, strict=True)]
        per_plane = total / reach
        yield (
            axis,
            _Rays(
                which,
                first,
                last,
                a=at_zero[0],
                b=slopes[0],
                c=at_zero[1],
                e=slopes[1],
                d0=-start * per_plane - total / 2,
                dd=per_plane,
                step=spacing[axis] * total / d[:, axis].abs(),
            ),
        )


def _taps(
    points: Tensor,
    pairs: Tensor,
    bins: Tensor | None,
    shape: tuple[int, ...],
    spacing: tuple[float, ...],
    tof: tuple[int, float, float, float],
    like: Tensor,
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor | None]]:
    """Lines [m], voxel index and weight of four taps [4, m, planes], and weights of all bins [m, planes, T] or None."""
    device = like.device
    stride = (shape[1] * shape[2], shape[2], 1)
    for axis, rays in _rays(points.to(device), pairs.to(device), shape, spacing):
        p, q = (k for k in range(3) if k != axis)
        plane = torch.arange(shape[axis], device=device)
        for part in zip(*(t.split(max(1, _CHUNK // shape[axis])) for t in rays), strict=True):
            r = _Rays(*part)
            j = plane.to(like.dtype)
            met = (plane >= r.first[:, None]) & (plane <= r.last[:, None])
            weight = torch.where(met, r.step[:, None].to(like), torch.zeros((), dtype=like.dtype, device=device))
            spread = None
            if tof[0]:
                distance = r.d0[:, None].to(like) + r.dd[:, None].to(like) * j
                if bins is not None:
                    weight = weight * tof_weights(distance, *tof, which=bins.to(device)[r.which, None])
                else:
                    spread = tof_weights(distance, *tof)
            cells, fractions, inside = [], [], []
            for k, a, b in ((p, r.a, r.b), (q, r.c, r.e)):
                at = (a[:, None].to(like) + b[:, None].to(like) * j).clamp(-1.0, float(shape[k]))
                cell = at.floor()
                cells.append([cell.long(), cell.long() + 1])
                fractions.append([1 - (at - cell), at - cell])
                inside.append([(c >= 0) & (c < shape[k]) for c in cells[-1]])
            index, weights = [], []
            for s in range(2):
                for t in range(2):
                    both = inside[0][s] & inside[1][t]
                    flat = plane * stride[axis] + cells[0][s] * stride[p] + cells[1][t] * stride[q]
                    index.append(torch.where(both, flat, torch.zeros_like(flat)))
                    weights.append(
                        torch.where(both, weight * fractions[0][s] * fractions[1][t], torch.zeros_like(weight))
                    )
            yield r.which, torch.stack(index), torch.stack(weights), spread


def _reference(
    x: Tensor,
    points: Tensor,
    pairs: Tensor,
    line_bins: Tensor | None,
    dz: float,
    dy: float,
    dx: float,
    tof_bins: int,
    tof_bin_mm: float,
    tof_sigma_mm: float,
    tof_truncation: float,
) -> Tensor:
    lead, shape = x.shape[:-3], x.shape[-3:]
    flat = x.reshape(-1, math.prod(shape))
    tof = (tof_bins, tof_bin_mm, tof_sigma_mm, tof_truncation)
    every_bin = tof_bins > 0 and line_bins is None
    out = x.new_zeros(len(flat), len(pairs), *([tof_bins] if every_bin else []))
    for which, index, weight, spread in _taps(points, pairs, line_bins, tuple(shape), (dz, dy, dx), tof, x):
        for k in range(len(flat)):
            value = (flat[k][index] * weight).sum(0)
            out[k, which] = value.sum(-1) if spread is None else (value[:, None] @ spread)[:, 0]
    return out.reshape(*lead, *out.shape[1:])


def _reference_adjoint(
    y: Tensor,
    points: Tensor,
    pairs: Tensor,
    line_bins: Tensor | None,
    nz: int,
    ny: int,
    nx: int,
    dz: float,
    dy: float,
    dx: float,
    tof_bins: int,
    tof_bin_mm: float,
    tof_sigma_mm: float,
    tof_truncation: float,
) -> Tensor:
    every_bin = tof_bins > 0 and line_bins is None
    tail = 2 if every_bin else 1
    lead = y.shape[: y.ndim - tail]
    flat = y.reshape(math.prod(lead), *y.shape[y.ndim - tail :])
    tof = (tof_bins, tof_bin_mm, tof_sigma_mm, tof_truncation)
    out = y.new_zeros(len(flat), nz * ny * nx)
    for which, index, weight, spread in _taps(points, pairs, line_bins, (nz, ny, nx), (dz, dy, dx), tof, y):
        for k in range(len(flat)):
            value = flat[k, which]
            per_plane = value[:, None] if spread is None else (spread @ value[..., None])[..., 0]
            out[k].scatter_add_(0, index.flatten(), (weight * per_plane).flatten())
    return out.reshape(*lead, nz, ny, nx)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    data, points, pairs, bins, *ctx.rest = inputs
    ctx.save_for_backward(points, pairs, *([] if bins is None else [bins]))
    ctx.size = data.shape[-3:]


def _lines_of(ctx: Any) -> tuple[Tensor, Tensor, Tensor | None]:
    points, pairs, *bins = ctx.saved_tensors
    return points, pairs, bins[0] if bins else None


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    back = torch.ops.recon3d.joseph3d_adjoint(grad, *_lines_of(ctx), *ctx.size, *ctx.rest)
    return (back, *[None] * 10)


def _backward_adjoint(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    back = torch.ops.recon3d.joseph3d(grad, *_lines_of(ctx), *ctx.rest[3:])
    return (back, *[None] * 13)


def _fake(x: Tensor, points: Tensor, pairs: Tensor, line_bins: Tensor | None, *rest: Any) -> Tensor:
    tail = [rest[3]] if rest[3] and line_bins is None else []
    return x.new_empty((*x.shape[:-3], pairs.shape[0], *tail))


def _fake_adjoint(y: Tensor, points: Tensor, pairs: Tensor, line_bins: Tensor | None, *rest: Any) -> Tensor:
    tail = 2 if rest[6] and line_bins is None else 1
    return y.new_empty((*y.shape[: y.ndim - tail], *rest[:3]))


# points are float64, pairs and line_bins int32, on any device; tof_bins = 0 means no time of flight, and with tof_bins
# but without line_bins every line has all bins
_LINES = "Tensor points, Tensor pairs, Tensor? line_bins"
_SCALARS = "float dz, float dy, float dx, int tof_bins, float tof_bin_mm, float tof_sigma_mm, float tof_truncation"

_library.define(
    f"joseph3d(Tensor x, {_LINES}, {_SCALARS}) -> Tensor",
    _reference,
    _fake,
    backward=_backward,
    setup_context=_setup,
)
_library.define(
    f"joseph3d_adjoint(Tensor y, {_LINES}, int nz, int ny, int nx, {_SCALARS}) -> Tensor",
    _reference_adjoint,
    _fake_adjoint,
    backward=_backward_adjoint,
    setup_context=_setup,
)

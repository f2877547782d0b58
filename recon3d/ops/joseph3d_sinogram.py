"""Projection of a volume onto the sinogram of a PET scanner and its exact transpose; optionally time of flight.

A sinogram is lines times axial segments. A line is the projection of lines of response onto a plane z = const, from
(y0, x0) to (y1, x1) in mm. A segment is a stack of planes: plane p runs from z_mid + p step - delta_z/2 at the line's
first end to z_mid + p step + delta_z/2 at its second. Every line is combined with every plane, which gives the lines of
response of a cylindrical scanner: its views and radial bins in the plane, its ring pairs along the axis.

Every line of response is integrated as in recon3d.ops.joseph3d, with its main axis chosen among x and y: at every plane
of voxels across that axis that it meets, bilinear interpolation in the other two, zero outside, times the step in mm.
Source: Joseph, IEEE Transactions on Medical Imaging 1 (1982) 192; time-of-flight weights: recon3d.ops.tof.

step is a whole number of voxels, so all planes of a segment share the weights of both interpolations and of the time
bins: along an interpolated line of voxels in z they are one shifted vector.

Both operators are linear, and the adjoint uses the very weights of the forward, so each is the other's gradient.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from recon3d.ops import _library
from recon3d.ops.joseph3d import SLACK, TIE, check_data
from recon3d.ops.tof import tof_numbers, tof_weights

if TYPE_CHECKING:
    from recon3d.geometry.pet import TOF

__all__ = ["joseph3d_sinogram", "joseph3d_sinogram_adjoint"]

# how far plane distances may be from whole voxels, in voxels
_WHOLE = 1e-4
# elements of the reference's largest temporaries
_CHUNK = 1 << 21


def joseph3d_sinogram(
    x: Tensor,
    lines: Tensor,
    segments: Tensor,
    spacing_mm: tuple[float, float, float],
    *,
    tof: TOF | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Line integrals of every volume along every line of every plane of the segments.

    Args:
        x: volumes, [..., z, y, x] float32 or float64, usually activity in Bq/mL; any leading axes.
        lines: both ends of every line in the plane, [L, 4] float64, (y0, x0, y1, x1) in mm from the volume's centre.
        segments: [G, 4] float64: z of the middle of the first plane's lines, their z1 - z0, the distance of planes
            (all in mm) and the number of planes. The distance must be a positive whole number of voxels.
        spacing_mm: (dz, dy, dx), distance of voxels in mm.
        tof: time-of-flight bins along the lines; None for plain line integrals.
        out: where the result goes, contiguous and of its shape; loops that give one again spare fresh memory, which
            costs more than the projection where bins are many. No gradients then.

    Returns:
        [..., L, P], with tof [..., L, T, P]; P planes in all, those of one segment after those of the one before. x's
        dtype and device, in x's unit times mm. Differentiable in x; the gradient is joseph3d_sinogram_adjoint.

    Raises:
        ValueError: a shape or size that does not fit, an end that is not finite, a line or plane distance of length 0,
            a plane distance that is no whole number of voxels, or out that does not fit.
        TypeError: x is neither float32 nor float64, or lines or segments are not float64.

    Kernels: torch (any device), C++ (CPU), CUDA. A line's values depend neither on the other lines nor on threads.

    >>> line = torch.tensor([[-9.0, 0.0, 9.0, 0.0]], dtype=torch.float64)
    >>> direct = torch.tensor([[-1.0, 0.0, 1.0, 3.0]], dtype=torch.float64)
    >>> joseph3d_sinogram(torch.ones(3, 4, 3), line, direct, (1.0, 0.5, 1.0)).tolist()
    [[2.0, 2.0, 2.0]]
    """
    spacing = check_data("joseph3d_sinogram", x, spacing_mm)
    if x.ndim < 3 or 0 in x.shape[-3:]:
        raise ValueError(f"joseph3d_sinogram: x must be [..., z, y, x] and not empty, got shape {tuple(x.shape)}")
    planes = _check_sinogram("joseph3d_sinogram", lines, segments, spacing[0])
    numbers = tof_numbers("joseph3d_sinogram", tof)
    _library.ensure()
    op = torch.ops.recon3d.joseph3d_sinogram
    if out is None:
        made: Tensor = op(x, lines, segments, planes, *spacing, *numbers)
        return made
    _check_out(out, x, (*x.shape[:-3], len(lines), *([numbers[0]] if numbers[0] else []), planes))
    if x.is_cuda:  # a copy is cheap there
        return out.copy_(op(x, lines, segments, planes, *spacing, *numbers))
    torch.ops.recon3d.joseph3d_sinogram_into_(out, x, lines, segments, planes, *spacing, *numbers)
    return out


def joseph3d_sinogram_adjoint(
    y: Tensor,
    lines: Tensor,
    segments: Tensor,
    shape: tuple[int, int, int],
    spacing_mm: tuple[float, float, float],
    *,
    tof: TOF | None = None,
) -> Tensor:
    """Transpose of joseph3d_sinogram: every value is spread over the voxels its line met, with the same weights.

    Args:
        y: sinograms, [..., L, P] float32 or float64, with tof [..., L, T, P]; any leading axes.
        lines: as in joseph3d_sinogram, [L, 4].
        segments: as in joseph3d_sinogram, [G, 4].
        shape: (nz, ny, nx) of the volume.
        spacing_mm: (dz, dy, dx) in mm.
        tof: as in joseph3d_sinogram.

    Returns:
        [..., z, y, x] with y's dtype and device, in y's unit times mm. Differentiable in y; the gradient is
        joseph3d_sinogram.

    Raises:
        ValueError: a shape or size that does not fit, an end that is not finite, a line or plane distance of length 0,
            a plane distance that is no whole number of voxels.
        TypeError: y is neither float32 nor float64, or lines or segments are not float64.

    Kernels: torch (any device), C++ (CPU), CUDA. The result does not depend on threads; nothing is added atomically.

    >>> line = torch.tensor([[-9.0, 0.0, 9.0, 0.0]], dtype=torch.float64)
    >>> direct = torch.tensor([[-0.5, 0.0, 1.0, 2.0]], dtype=torch.float64)
    >>> joseph3d_sinogram_adjoint(torch.tensor([[1.0, 3.0]]), line, direct, (2, 1, 3), (1.0, 0.5, 1.0)).tolist()
    [[[0.0, 0.5, 0.0]], [[0.0, 1.5, 0.0]]]
    """
    op = "joseph3d_sinogram_adjoint"
    spacing = check_data(op, y, spacing_mm)
    planes = _check_sinogram(op, lines, segments, spacing[0])
    numbers = tof_numbers(op, tof)
    tail = (len(lines), numbers[0], planes) if numbers[0] else (len(lines), planes)
    if y.ndim < len(tail) or tuple(y.shape[y.ndim - len(tail) :]) != tail:
        axes = "line, tof, plane" if numbers[0] else "line, plane"
        raise ValueError(
            f"{op}: y must be [..., {axes}] = [..., {', '.join(map(str, tail))}], got shape {tuple(y.shape)}"
        )
    if len(shape) != 3 or any(int(n) != n or n < 1 for n in shape):
        raise ValueError(f"{op}: shape must be three positive sizes (nz, ny, nx), got {tuple(shape)}")
    _library.ensure()
    sizes = (int(n) for n in shape)
    out: Tensor = torch.ops.recon3d.joseph3d_sinogram_adjoint(y, lines, segments, *sizes, *spacing, *numbers)
    return out


def _check_sinogram(op: str, lines: Tensor, segments: Tensor, dz: float) -> int:
    """The number of planes of all segments."""
    for name, table, columns in (("lines", lines, "(y0, x0, y1, x1)"), ("segments", segments, "(z, dz, step, count)")):
        if table.dtype != torch.float64:
            raise TypeError(f"{op}: {name} must be float64, got {table.dtype}")
        if table.ndim != 2 or table.shape[1] != 4:
            raise ValueError(f"{op}: {name} must be [n, 4] {columns}, got shape {tuple(table.shape)}")
        bad = (~table.isfinite()).any(1).nonzero()
        if len(bad):
            raise ValueError(f"{op}: {name} must be finite, row {int(bad[0])} is {table[int(bad[0])].tolist()}")
    points = ((lines[:, 0] == lines[:, 2]) & (lines[:, 1] == lines[:, 3])).nonzero()
    if len(points):
        raise ValueError(f"{op}: both ends of line {int(points[0])} are the same point; leave such lines out")
    for z, delta, step, count in segments.tolist():
        if count != int(count) or not 0 <= count < 1 << 31:
            raise ValueError(f"{op}: a segment's number of planes must be a whole number, got {count}")
        whole = round(step / dz)
        if count > 1 and (whole < 1 or abs(step / dz - whole) > _WHOLE):
            raise ValueError(
                f"{op}: planes {step:.6g} mm apart are {step / dz:.6g} voxels of {dz:.6g} mm apart, which must be a "
                f"whole number from 1; choose dz = {abs(step) / max(whole, 1) or 1.0:.6g} mm"
            )
        if max(abs(z), abs(delta)) > 1e6 * dz:
            raise ValueError(f"{op}: a segment at {z:.6g} mm with z1 - z0 = {delta:.6g} mm is far away; check its unit")
    return int(segments[:, 3].sum())


def _check_out(out: Tensor, x: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(out.shape) != shape or out.dtype != x.dtype or out.device != x.device or not out.is_contiguous():
        raise ValueError(
            f"joseph3d_sinogram: out must be contiguous, {shape}, {x.dtype} on {x.device}, got {tuple(out.shape)}, "
            f"{out.dtype} on {out.device}"
        )
    if torch.is_grad_enabled() and (x.requires_grad or out.requires_grad):
        raise ValueError("joseph3d_sinogram: out keeps no gradients; leave it out or use torch.no_grad()")


class _Lines(NamedTuple):
    """Lines of one main axis; float64, one element per line. Plane j is met at column (or row) a + b j."""

    which: Tensor  # rows of lines
    first: Tensor  # planes from first to last are met
    last: Tensor
    a: Tensor
    b: Tensor
    t: Tensor  # fraction of the way from the line's middle to its end, -1/2 to 1/2: t + dt j
    dt: Tensor
    length: Tensor  # in the plane, mm
    step: Tensor  # mm per plane of voxels, in the plane


def _lines_along(lines: Tensor, columns: bool, shape: tuple[int, ...], spacing: tuple[float, ...]) -> _Lines:
    """Lines that step over columns, or those that step over rows."""
    y0, x0, y1, x1 = lines.unbind(1)
    steep = (y1 - y0).abs() < (x1 - x0).abs() * TIE
    which = (steep == columns).nonzero()[:, 0]
    main, cross = (2, 1) if columns else (1, 2)
    # index of both ends on the main axis and on the other one
    ends = (x0, y0, x1, y1) if columns else (y0, x0, y1, x1)
    s0, c0, s1, c1 = (
        e[which] / spacing[k] + (shape[k] - 1) / 2 for e, k in zip(ends, (main, cross, main, cross), strict=True)
    )
    length = torch.hypot((y1 - y0)[which], (x1 - x0)[which])
    b, dt = (c1 - c0) / (s1 - s0), 1 / (s1 - s0)
    first = (torch.minimum(s0, s1) - SLACK).ceil().clamp(0, shape[main])
    last = (torch.maximum(s0, s1) + SLACK).floor().clamp(-1, shape[main] - 1)
    return _Lines(which, first, last, c0 - b * s0, b, -s0 * dt - 0.5, dt, length, length * dt.abs())


def _planes(
    lines: Tensor,
    segments: Tensor,
    shape: tuple[int, ...],
    spacing: tuple[float, ...],
    tof: tuple[int, float, float, float],
    like: Tensor,
) -> Iterator[tuple[Tensor, list[Tensor], list[Tensor], list[Tensor], list[Tensor], Tensor | None]]:
    """What lines [m] take from one plane of voxels.

    Yields lines, pixel and weight of both taps in the plane [m], z and weight of both taps along z [m, P], and weights
    of time bins [m, P, T] or None.
    """
    device, nz = like.device, shape[0]
    z, delta, step, count = segments.to(device).unbind(1)
    segment = torch.repeat_interleave(torch.arange(len(z), device=device), count.long())
    plane = torch.arange(len(segment), device=device) - (count.long().cumsum(0) - count.long())[segment]
    middle = z / spacing[0] + (nz - 1) / 2
    shift = ((step / spacing[0]).round().long()[segment] * plane) + middle.floor().long()[segment]
    part, tilt = (middle - middle.floor()).to(like), (delta / spacing[0]).to(like)
    rows = max(1, _CHUNK // max(1, len(segment) * max(1, tof[0])))
    for columns in (False, True):
        over, across = (shape[2], shape[1]) if columns else (shape[1], shape[2])
        stride, stride_across = (1, shape[2]) if columns else (shape[2], 1)
        every = _lines_along(lines.to(device), columns, shape, spacing)
        for j in range(over):
            met = ((every.first <= j) & (j <= every.last)).nonzero()[:, 0]
            at = every.a[met] + every.b[met] * j
            met = met[(at > -1) & (at < across)]
            for rows_met in met.split(rows):
                line = _Lines(*(t[rows_met] for t in every))
                u = line.a + line.b * j
                cell = u.floor()
                fraction = (u - cell).to(like)
                pixels, in_plane = [], []
                for k, w in ((cell.long(), 1 - fraction), (cell.long() + 1, fraction)):
                    inside = (k >= 0) & (k < across)
                    pixels.append(j * stride + k.clamp(0, across - 1) * stride_across)
                    in_plane.append(torch.where(inside, w, torch.zeros_like(w)))
                t = (line.t + line.dt * j).to(like)[:, None]
                length = torch.hypot(line.length[:, None], delta)
                mm = (line.step[:, None] * length / line.length[:, None]).to(like)
                up = t * tilt + part
                whole = up.floor()
                low = whole.long()[:, segment] + shift
                w_high = (up - whole) * mm
                axial, along = [], []
                for k, w in ((low, mm - w_high), (low + 1, w_high)):
                    inside = (k >= 0) & (k < nz)
                    axial.append(k.clamp(0, nz - 1))
                    along.append(torch.where(inside, w[:, segment], torch.zeros_like(w[:, segment])))
                bins = tof_weights(t * length.to(like), *tof)[:, segment] if tof[0] else None
                yield line.which, pixels, in_plane, axial, along, bins


def _reference(
    x: Tensor,
    lines: Tensor,
    segments: Tensor,
    planes: int,
    dz: float,
    dy: float,
    dx: float,
    tof_bins: int,
    tof_bin_mm: float,
    tof_sigma_mm: float,
    tof_truncation: float,
) -> Tensor:
    lead, shape = x.shape[:-3], tuple(x.shape[-3:])
    flat = x.reshape(math.prod(lead), shape[0], shape[1] * shape[2])
    tof = (tof_bins, tof_bin_mm, tof_sigma_mm, tof_truncation)
    out = x.new_zeros(len(flat), len(lines), *([tof_bins] if tof_bins else []), planes)
    for which, pixels, in_plane, axial, along, bins in _planes(lines, segments, shape, (dz, dy, dx), tof, x):
        for k in range(len(flat)):
            column = (flat[k][:, pixels[0]] * in_plane[0] + flat[k][:, pixels[1]] * in_plane[1]).T
            value = column.gather(1, axial[0]) * along[0] + column.gather(1, axial[1]) * along[1]
            out[k, which] += value if bins is None else value[:, None] * bins.transpose(1, 2)
    return out.reshape(*lead, *out.shape[1:])


def _reference_into(y: Tensor, x: Tensor, *rest: Any) -> None:
    y.copy_(_reference(x, *rest))


def _reference_adjoint(
    y: Tensor,
    lines: Tensor,
    segments: Tensor,
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
    tail = 3 if tof_bins else 2
    lead = y.shape[: y.ndim - tail]
    flat = y.reshape(math.prod(lead), *y.shape[y.ndim - tail :])
    tof = (tof_bins, tof_bin_mm, tof_sigma_mm, tof_truncation)
    out = y.new_zeros(len(flat), nz, ny * nx)
    for which, pixels, in_plane, axial, along, bins in _planes(lines, segments, (nz, ny, nx), (dz, dy, dx), tof, y):
        for k in range(len(flat)):
            value = flat[k, which] if bins is None else (flat[k, which] * bins.transpose(1, 2)).sum(1)
            column = y.new_zeros(len(which), nz)
            column.scatter_add_(1, axial[0], value * along[0]).scatter_add_(1, axial[1], value * along[1])
            for pixel, weight in zip(pixels, in_plane, strict=True):
                out[k].index_add_(1, pixel, (column * weight[:, None]).T)
    return out.reshape(*lead, nz, ny, nx)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, lines, segments, _, *ctx.numbers = inputs
    ctx.save_for_backward(lines, segments)
    ctx.shape = x.shape[-3:]


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    lines, segments = ctx.saved_tensors
    back = torch.ops.recon3d.joseph3d_sinogram_adjoint(grad, lines, segments, *ctx.shape, *ctx.numbers)
    return (back, *[None] * 10)


def _setup_adjoint(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    y, lines, segments, _, _, _, *ctx.numbers = inputs
    ctx.save_for_backward(lines, segments)
    ctx.planes = y.shape[-1]


def _backward_adjoint(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    lines, segments = ctx.saved_tensors
    back = torch.ops.recon3d.joseph3d_sinogram(grad, lines, segments, ctx.planes, *ctx.numbers)
    return (back, *[None] * 12)


# lines and segments live on the host whatever x's device; lengths in mm; tof_bins = 0 means no time of flight
_SCALARS = "float dz, float dy, float dx, int tof_bins, float tof_bin_mm, float tof_sigma_mm, float tof_truncation"

_library.define(
    f"joseph3d_sinogram(Tensor x, Tensor lines, Tensor segments, int planes, {_SCALARS}) -> Tensor",
    _reference,
    lambda x, lines, segments, planes, dz, dy, dx, tof_bins, *rest: x.new_empty(
        (*x.shape[:-3], lines.shape[0], *([tof_bins] if tof_bins else []), planes)
    ),
    backward=_backward,
    setup_context=_setup,
)
_library.define(
    f"joseph3d_sinogram_into_(Tensor(a!) y, Tensor x, Tensor lines, Tensor segments, int planes, {_SCALARS}) -> ()",
    _reference_into,
    lambda *_: None,
)
_library.define(
    f"joseph3d_sinogram_adjoint(Tensor y, Tensor lines, Tensor segments, int nz, int ny, int nx, {_SCALARS}) -> Tensor",
    _reference_adjoint,
    lambda y, lines, segments, nz, ny, nx, dz, dy, dx, tof_bins, *rest: y.new_empty(
        (*y.shape[: y.ndim - (3 if tof_bins else 2)], nz, ny, nx)
    ),
    backward=_backward_adjoint,
    setup_context=_setup_adjoint,
)

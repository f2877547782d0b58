"""Radon transform of stacks of slices and its exact transpose: parallel and flat-detector fan beam.

Every ray is a line  X p + Y r = c  in millimetres (parallel: p = cos t, r = sin t, c = s; fan, with q = u / SDD:
p = cos a - q sin a, r = sin a + q cos a, c = q SOD). Written on the pixel grid it crosses row i at column
alpha + beta i (or column j at row alpha + beta j when it runs closer to the rows).

"joseph": one linear interpolation per row or column crossed, times the length of the step; zero outside the image.
Source: Joseph, IEEE Transactions on Medical Imaging 1 (1982) 192.
"shear": rows are shifted onto the unit-slope grid of the view by linear interpolation and added, then the sum is
resampled to the detector cells with Keys' cubic (a = -1/2; IEEE Trans. ASSP 29 (1981) 1153). Parallel beam only;
one pass of shifted adds per view, at an error 8 % above Joseph's.

Both are linear in x, and the adjoint uses the very weights of the forward, so each is the other's gradient.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor

from recon3d.geometry import FanBeam, ScanGeometry
from recon3d.ops import _library

__all__ = ["radon", "radon_adjoint"]

Method = Literal["joseph", "shear"]
# codes in the schema; the stable ABI passes integers everywhere
JOSEPH, SHEAR = 0, 1
_METHODS = {"joseph": JOSEPH, "shear": SHEAR}
# a ray at 45 degrees steps over rows; the slack keeps that choice the same for every compiler's cosine
_TIE = 1.0 - 1e-9


def radon(
    x: Tensor,
    geometry: ScanGeometry,
    pixel_mm: tuple[float, float],
    method: Method = "joseph",
) -> Tensor:
    """Line integrals of every slice along every ray of the scan.

    Args:
        x: slices, [..., y, x] float32 or float64, usually attenuation in 1/mm; any leading axes.
        geometry: the scan, the same for every slice; a view subset is a geometry with fewer angles.
        pixel_mm: (dy, dx), distance of rows and of columns in mm. The image is centred on the rotation axis.
        method: "joseph", or "shear" (parallel beam only; faster for few slices, error 8 % higher).

    Returns:
        [..., view, u] with x's dtype and device, in x's unit times mm. Differentiable; the gradient is radon_adjoint.

    Raises:
        ValueError: a shape, size or method that does not fit, or a source inside the image.
        TypeError: x is neither float32 nor float64.

    Kernels: torch (any device), C++ (CPU), CUDA ("joseph"; "shear" runs in torch there). A slice's result does not
    depend on its neighbours or on threads.

    >>> from recon3d.geometry import ParallelBeam
    >>> radon(torch.ones(4, 4), ParallelBeam((0.0,), n_detector=4, detector_spacing_mm=0.5), (0.5, 0.5)).tolist()
    [[2.0, 2.0, 2.0, 2.0]]
    """
    dy, dx = _check("radon", x, geometry, pixel_mm, method)
    _source_outside("radon", geometry, x.shape[-2], x.shape[-1], dy, dx)
    _library.ensure()
    angles, pitch, offset, sod, sdd = _scan(geometry)
    # no CUDA kernel of "shear": its definition runs there, on the device and differentiable as it stands
    op = _reference if x.is_cuda and method == "shear" else torch.ops.recon3d.radon
    out: Tensor = op(x, angles, geometry.n_detector, pitch, offset, sod, sdd, dy, dx, _METHODS[method])
    return out


def radon_adjoint(
    y: Tensor,
    geometry: ScanGeometry,
    shape: tuple[int, int],
    pixel_mm: tuple[float, float],
    method: Method = "joseph",
) -> Tensor:
    """Transpose of radon: every ray's value is spread over the pixels it crossed, with the same weights.

    Args:
        y: sinograms, [..., view, u] float32 or float64; any leading axes.
        geometry: the scan; its views and detector cells must match y.
        shape: (ny, nx) of the slices.
        pixel_mm: (dy, dx) in mm.
        method: as in radon.

    Returns:
        [..., y, x] with y's dtype and device, in y's unit times mm. Differentiable; the gradient is radon.

    Raises:
        ValueError: a shape, size or method that does not fit, or a source inside the image.
        TypeError: y is neither float32 nor float64.

    Kernels: torch (any device), C++ (CPU), CUDA ("joseph"; "shear" runs in torch there).

    >>> from recon3d.geometry import ParallelBeam
    >>> scan = ParallelBeam((0.0,), n_detector=3, detector_spacing_mm=2.0)
    >>> radon_adjoint(torch.tensor([[1.0, 2.0, 3.0]]), scan, (2, 3), (2.0, 2.0)).tolist()
    [[2.0, 4.0, 6.0], [2.0, 4.0, 6.0]]
    """
    dy, dx = _check("radon_adjoint", y, geometry, pixel_mm, method)
    if y.shape[-2] != geometry.n_views or y.shape[-1] != geometry.n_detector:
        raise ValueError(
            f"radon_adjoint: the scan has {geometry.n_views} views of {geometry.n_detector} cells, "
            f"y has {y.shape[-2]} of {y.shape[-1]}; y must be [..., view, u]"
        )
    if len(shape) != 2 or any(int(n) != n or n < 1 for n in shape):
        raise ValueError(f"radon_adjoint: shape must be two positive sizes (ny, nx), got {tuple(shape)}")
    ny, nx = int(shape[0]), int(shape[1])
    _source_outside("radon_adjoint", geometry, ny, nx, dy, dx)
    _library.ensure()
    angles, pitch, offset, sod, sdd = _scan(geometry)
    op = _reference_adjoint if y.is_cuda and method == "shear" else torch.ops.recon3d.radon_adjoint
    out: Tensor = op(y, angles, ny, nx, pitch, offset, sod, sdd, dy, dx, _METHODS[method])
    return out


def _check(
    op: str, data: Tensor, geometry: ScanGeometry, pixel_mm: tuple[float, float], method: str
) -> tuple[float, float]:
    if data.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{op}: float32 or float64 needed, got {data.dtype}")
    if data.ndim < 2 or 0 in data.shape[-2:]:
        raise ValueError(f"{op}: at least two axes and no empty slice needed, got shape {tuple(data.shape)}")
    if method not in _METHODS:
        raise ValueError(f"{op}: method must be 'joseph' or 'shear', got {method!r}")
    if method == "shear" and isinstance(geometry, FanBeam):
        raise ValueError(f"{op}: method 'shear' serves parallel beams only; use 'joseph' for a fan beam")
    pixel = tuple(float(p) for p in pixel_mm)
    if len(pixel) != 2 or not all(math.isfinite(p) and p > 0 for p in pixel):
        raise ValueError(f"{op}: pixel_mm must be two positive lengths (dy, dx) in mm, got {tuple(pixel_mm)}")
    return pixel[0], pixel[1]


def _source_outside(op: str, geometry: ScanGeometry, ny: int, nx: int, dy: float, dx: float) -> None:
    corner = math.hypot(ny * dy, nx * dx) / 2
    if isinstance(geometry, FanBeam) and corner >= geometry.source_to_axis_mm:
        raise ValueError(
            f"{op}: the source, {geometry.source_to_axis_mm:.6g} mm from the axis, turns inside the image, whose "
            f"corners reach {corner:.6g} mm; check the units of source_to_axis_mm and pixel_mm"
        )


def _scan(geometry: ScanGeometry) -> tuple[Tensor, float, float, float, float]:
    source = (0.0, 0.0)
    if isinstance(geometry, FanBeam):
        source = float(geometry.source_to_axis_mm), float(geometry.source_to_detector_mm)
    pitch, offset = float(geometry.detector_spacing_mm), float(geometry.detector_offset_mm)
    return torch.from_numpy(geometry.angles), pitch, offset, *source


def _lines(
    angles: Tensor,
    n: int,
    pitch: float,
    offset: float,
    sod: float,
    sdd: float,
    ny: int,
    nx: int,
    dy: float,
    dx: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """alpha, beta, step length in mm and "steps over columns", each [view, u] (float64, host)."""
    s = (torch.arange(n, dtype=torch.float64) - (n - 1) / 2) * pitch + offset
    cos, sin = angles.double().cpu().cos()[:, None], angles.double().cpu().sin()[:, None]
    if sod > 0:
        q = s / sdd
        p, r, c = cos - q * sin, sin + q * cos, (q * sod).expand(len(angles), n)
    else:
        p, r, c = cos.expand(-1, n), sin.expand(-1, n), s.expand(len(angles), n)
    over_columns = (p * dx).abs() < (r * dy).abs() * _TIE
    main, cross = torch.where(over_columns, r * dy, p * dx), torch.where(over_columns, p * dx, r * dy)
    centre_main, centre_cross = (ny - 1) / 2, (nx - 1) / 2  # of the interpolated and of the stepped index
    ci = torch.where(over_columns, centre_main, centre_cross)
    cs = torch.where(over_columns, centre_cross, centre_main)
    beta = -cross / main
    alpha = c / main + ci - beta * cs
    length = dx * dy * torch.hypot(p, r) / main.abs()
    return alpha, beta, length, over_columns


def _joseph_taps(
    line: tuple[Tensor, Tensor, Tensor, Tensor], view: int, ny: int, nx: int, like: Tensor
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor, Tensor]]:
    """For the rays over rows, then those over columns: rays [r], and pixel index and weight of both taps [step, r]."""
    alpha, beta, length, over_columns = (t[view] for t in line)
    for columns in (False, True):
        rays = (over_columns == columns).nonzero()[:, 0]
        if not len(rays):
            continue
        steps, cells, stride_step, stride_cell = (nx, ny, 1, nx) if columns else (ny, nx, nx, 1)
        a, b, w = (t[rays].to(like) for t in (alpha, beta, length))
        step = torch.arange(steps, device=like.device)
        u = a + b * step.to(like.dtype)[:, None]
        first = u.clamp(-1.0, float(cells)).floor()
        fraction = (u - first).clamp(0.0, 1.0)
        taps = []
        for index, weight in ((first.long(), 1 - fraction), (first.long() + 1, fraction)):
            inside = (index >= 0) & (index < cells)
            flat = step[:, None] * stride_step + index.clamp(0, cells - 1) * stride_cell
            taps += [flat, torch.where(inside, weight * w, torch.zeros_like(weight))]
        yield rays.to(like.device), taps[0], taps[1], taps[2], taps[3]


def _shear_plan(
    angle: Tensor, n: int, pitch: float, offset: float, ny: int, nx: int, dy: float, dx: float, like: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, int]:
    """Pixel index and weight of both taps [step, m], and sum index and weight of four taps [4, u]; grid length."""
    cos, sin = float(angle.double().cos()), float(angle.double().sin())
    columns = abs(cos * dx) < abs(sin * dy) * _TIE
    if columns:
        steps, cells, stride_step, stride_cell, main, cross, length = (
            nx,
            ny,
            1,
            nx,
            sin * dy,
            cos * dx,
            dx / abs(sin),
        )
    else:
        steps, cells, stride_step, stride_cell, main, cross, length = (
            ny,
            nx,
            nx,
            1,
            cos * dx,
            sin * dy,
            dy / abs(cos),
        )
    shift = (torch.arange(steps, dtype=torch.float64) - (steps - 1) / 2) * (-cross / main)
    whole = shift.floor()
    left = -int(whole.max()) - 1  # first cell of the unit-slope grid: the leftmost that any row reaches
    size = cells - int(whole.min()) - left
    step = torch.arange(steps)[:, None]
    cell = torch.arange(size) + left + whole.long()[:, None]
    taps = []
    for index, weight in ((cell, 1 - (shift - whole)), (cell + 1, shift - whole)):
        inside = (index >= 0) & (index < cells)
        taps += [step * stride_step + index.clamp(0, cells - 1) * stride_cell, inside * weight[:, None]]
    s = (torch.arange(n, dtype=torch.float64) - (n - 1) / 2) * pitch + offset
    at = s / main + (cells - 1) / 2 - left
    first = at.floor()
    t = at - first
    cubic = torch.stack(
        [(-t + 2 * t**2 - t**3), (2 - 5 * t**2 + 3 * t**3), (t + 4 * t**2 - 3 * t**3), (-(t**2) + t**3)]
    )
    node = first.clamp(-4, size + 4).long() + torch.arange(-1, 3)[:, None]
    weight = torch.where((node >= 0) & (node < size), cubic * (length / 2), torch.zeros_like(cubic))
    pixels = torch.stack([taps[0], taps[2]]).to(like.device)
    blend = torch.stack([taps[1], taps[3]]).to(like)
    return pixels, blend, node.clamp(0, size - 1).to(like.device), weight.to(like), size


def _reference(
    x: Tensor,
    angles: Tensor,
    n_detector: int,
    pitch: float,
    offset: float,
    source_to_axis: float,
    source_to_detector: float,
    dy: float,
    dx: float,
    method: int,
) -> Tensor:
    ny, nx = x.shape[-2:]
    flat = x.reshape(-1, ny * nx)
    out = x.new_zeros(flat.shape[0], len(angles), n_detector)
    line = _lines(angles, n_detector, pitch, offset, source_to_axis, source_to_detector, ny, nx, dy, dx)
    for view in range(len(angles)):
        if method == SHEAR:
            pixels, blend, node, weight, _ = _shear_plan(angles[view], n_detector, pitch, offset, ny, nx, dy, dx, x)
            total = (flat[:, pixels[0]] * blend[0] + flat[:, pixels[1]] * blend[1]).sum(1)
            out[:, view] = (total[:, node] * weight).sum(1)
            continue
        for rays, i0, w0, i1, w1 in _joseph_taps(line, view, ny, nx, x):
            out[:, view, rays] = (flat[:, i0] * w0 + flat[:, i1] * w1).sum(1)
    return out.reshape(*x.shape[:-2], len(angles), n_detector)


def _reference_adjoint(
    y: Tensor,
    angles: Tensor,
    ny: int,
    nx: int,
    pitch: float,
    offset: float,
    source_to_axis: float,
    source_to_detector: float,
    dy: float,
    dx: float,
    method: int,
) -> Tensor:
    views, n = y.shape[-2:]
    flat = y.reshape(-1, views, n)
    out = y.new_zeros(flat.shape[0], ny * nx)
    line = _lines(angles, n, pitch, offset, source_to_axis, source_to_detector, ny, nx, dy, dx)

    def add(index: Tensor, value: Tensor) -> None:
        out.scatter_add_(1, index.reshape(1, -1).expand(len(out), -1), value.reshape(len(out), index.numel()))

    for view in range(views):
        if method == SHEAR:
            pixels, blend, node, weight, size = _shear_plan(angles[view], n, pitch, offset, ny, nx, dy, dx, y)
            total = y.new_zeros(len(out), size)
            spread = (flat[:, None, view] * weight).reshape(len(out), node.numel())
            total.scatter_add_(1, node.reshape(1, -1).expand(len(out), -1), spread)
            for k in range(2):
                add(pixels[k], total[:, None] * blend[k])
            continue
        for rays, i0, w0, i1, w1 in _joseph_taps(line, view, ny, nx, y):
            value = flat[:, view, rays][:, None]
            add(i0, value * w0)
            add(i1, value * w1)
    return out.reshape(*y.shape[:-2], ny, nx)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    data, angles, *ctx.rest = inputs
    ctx.save_for_backward(angles)
    ctx.size = data.shape[-2:]


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (angles,) = ctx.saved_tensors
    _, *scalars = ctx.rest
    back = torch.ops.recon3d.radon_adjoint(grad, angles, ctx.size[0], ctx.size[1], *scalars)
    return (back, *[None] * 9)


def _backward_adjoint(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (angles,) = ctx.saved_tensors
    _, _, *scalars = ctx.rest
    back = torch.ops.recon3d.radon(grad, angles, ctx.size[1], *scalars)
    return (back, *[None] * 10)


# angles live on the host whatever x's device; source_to_axis = 0 means a parallel beam; lengths in mm
_SCALARS = "float pitch, float offset, float source_to_axis, float source_to_detector, float dy, float dx, int method"

_library.define(
    f"radon(Tensor x, Tensor angles, int n_detector, {_SCALARS}) -> Tensor",
    _reference,
    lambda x, angles, n_detector, *rest: x.new_empty((*x.shape[:-2], angles.shape[0], n_detector)),
    backward=_backward,
    setup_context=_setup,
)
_library.define(
    f"radon_adjoint(Tensor y, Tensor angles, int ny, int nx, {_SCALARS}) -> Tensor",
    _reference_adjoint,
    lambda y, angles, ny, nx, *rest: y.new_empty((*y.shape[:-2], ny, nx)),
    backward=_backward_adjoint,
    setup_context=_setup,
)

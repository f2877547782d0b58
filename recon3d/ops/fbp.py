"""Filtered back projection: parallel and flat-detector fan beam, quantitative in 1/mm.

    f(x, y) = sum over views of  dview / U^2 * q_view(u(x, y)),      q = h * (redundancy * cosine * p)

h is the ramp, U = depth of the pixel / distance from source to axis (1 for a parallel beam), u(x, y) the detector
coordinate of the pixel, read with linear interpolation. Weights follow the angles as they are, see
:func:`recon3d.ops.ramp_filter`. Source: Kak and Slaney, Principles of Computerized Tomographic Imaging, sections
3.3 and 3.4.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from recon3d.geometry import FanBeam, ParallelBeam
from recon3d.ops import _library
from recon3d.ops.ramp_filter import Window, ramp_filter_beyond

__all__ = ["fbp"]

_PAD = 2  # zero cells on either side of a line, where everything beyond the detector is read
_TEMPORARY = 1 << 24  # elements of one temporary of the reference: 64 MB in float32


def fbp(
    y: Tensor,
    geometry: ParallelBeam | FanBeam,
    shape: tuple[int, int],
    pixel_mm: tuple[float, float],
    window: Window = "ram-lak",
    cutoff: float = 1.0,
) -> Tensor:
    """Reconstruct slices from line integrals by filtered back projection.

    Args:
        y: line integrals without unit, [..., view, u] float32 or float64.
        geometry: parallel or flat-detector fan beam with the views of y.
        shape: pixels of a slice, (ny, nx).
        pixel_mm: their size, (dy, dx).
        window: apodisation of the ramp, see :func:`ramp_filter`.
        cutoff: highest frequency kept, as a fraction of the detector's Nyquist frequency, in (0, 1].

    Returns:
        Attenuation in 1/mm, [..., ny, nx], with the dtype and device of y; pixels that a view does not see get
        nothing from it.

    Raises:
        ValueError: y does not fit the geometry, or shape, pixel_mm, window or cutoff is out of range.
        TypeError: y is not float32 or float64.

    Kernels: torch (any device), C++ (CPU), CUDA. A slice's result does not depend on its neighbours or on threads.

    >>> beam = ParallelBeam(tuple(i * math.pi / 90 for i in range(90)), 64, 1.0)
    >>> fbp(torch.zeros(2, 90, 64), beam, (48, 40), (1.0, 1.0)).shape
    torch.Size([2, 48, 40])
    """
    ny, nx = shape
    if ny < 1 or nx < 1:
        raise ValueError(f"fbp: shape needs at least one row and one column, got {tuple(shape)}")
    if not all(math.isfinite(p) and p > 0 for p in pixel_mm):
        raise ValueError(f"fbp: pixel_mm must be positive, got {tuple(pixel_mm)}")
    q, geometry = ramp_filter_beyond(y, geometry, window, cutoff)
    _library.ensure()
    source = (0.0, 0.0)
    if isinstance(geometry, FanBeam):
        source = geometry.source_to_axis_mm, geometry.source_to_detector_mm
    image: Tensor = torch.ops.recon3d.fbp_back_project(
        q.reshape(-1, *q.shape[-2:]),
        torch.from_numpy(geometry.angles),
        int(ny),
        int(nx),
        geometry.detector_spacing_mm,
        geometry.detector_offset_mm,
        *source,
        *map(float, pixel_mm),
    )
    return image.reshape(*q.shape[:-2], ny, nx)


def _cells(
    angle: float, n: int, ny: int, nx: int, lengths: tuple[float, ...], like: Tensor
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Where each pixel reads a view: first of two cells in the padded line, weight of the second, 1 / U^2 for a fan."""
    pitch, offset, source_to_axis, source_to_detector, dy, dx = lengths
    column = (torch.arange(nx, dtype=torch.float64, device=like.device) - (nx - 1) / 2) * dx
    row = ((torch.arange(ny, dtype=torch.float64, device=like.device) - (ny - 1) / 2) * dy)[:, None]
    cos, sin = math.cos(angle), math.sin(angle)
    u, scale = column * cos + row * sin, None
    if source_to_axis > 0:
        depth = source_to_axis + column * sin - row * cos
        u = torch.where(depth > 0, u * source_to_detector / depth, math.inf)  # behind the source: the zero cells
        scale = (source_to_axis / depth).square().to(like.dtype).reshape(-1, 1)
    cell = ((u - offset) / pitch + (n - 1) / 2).clamp(-1.5, n + 0.5).reshape(-1)
    low = cell.floor()
    return low.long() + _PAD, (cell - low).to(like.dtype)[:, None], scale


def _reference(q: Tensor, angles: Tensor, ny: int, nx: int, *lengths: float) -> Tensor:
    n = q.shape[2]
    parts = []
    for part in q.split(max(1, _TEMPORARY // (ny * nx))):
        lines = torch.nn.functional.pad(part.permute(1, 2, 0), (0, 0, _PAD, _PAD)).contiguous()  # [view, u, slice]
        image = q.new_zeros(ny * nx, len(part))
        for view, angle in enumerate(angles.tolist()):
            cell, weight, scale = _cells(angle, n, ny, nx, lengths, q)
            line = lines[view]
            value = torch.lerp(line.index_select(0, cell), line.index_select(0, cell + 1), weight)
            image += value if scale is None else value * scale
        parts.append(image.T.reshape(-1, ny, nx))
    return torch.cat(parts) if parts else q.new_zeros(0, ny, nx)


def _reference_transpose(image: Tensor, angles: Tensor, n: int, *lengths: float) -> Tensor:
    # only gradients need it, so torch must do; on a GPU its sums come in any order
    slices, ny, nx = image.shape
    flat = image.reshape(slices, -1).T
    q = image.new_zeros(len(angles), n + 2 * _PAD, slices)
    for view, angle in enumerate(angles.tolist()):
        cell, weight, scale = _cells(angle, n, ny, nx, lengths, image)
        value = flat if scale is None else flat * scale
        q[view].index_add_(0, cell, value * (1 - weight)).index_add_(0, cell + 1, value * weight)
    return q[:, _PAD:-_PAD].permute(2, 0, 1).contiguous()


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    data, angles, *ctx.rest = inputs
    ctx.save_for_backward(angles)
    ctx.size = data.shape[1:]


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (angles,) = ctx.saved_tensors
    back = torch.ops.recon3d.fbp_transpose(grad, angles, ctx.size[1], *ctx.rest[2:])
    return (back, *[None] * 9)


def _backward_transpose(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (angles,) = ctx.saved_tensors
    back = torch.ops.recon3d.fbp_back_project(grad, angles, *ctx.size, *ctx.rest[1:])
    return (back, *[None] * 8)


# angles live on the host whatever q's device; source_to_axis = 0 means a parallel beam; lengths in mm
_LENGTHS = "float pitch, float offset, float source_to_axis, float source_to_detector, float dy, float dx"
_library.define(
    f"fbp_back_project(Tensor q, Tensor angles, int ny, int nx, {_LENGTHS}) -> Tensor",
    _reference,
    lambda q, angles, ny, nx, *lengths: q.new_empty(q.shape[0], ny, nx),
    backward=_backward,
    setup_context=_setup,
)
_library.define(
    f"fbp_transpose(Tensor image, Tensor angles, int n, {_LENGTHS}) -> Tensor",
    _reference_transpose,
    lambda image, angles, n, *lengths: image.new_empty(image.shape[0], angles.shape[0], n),
    backward=_backward_transpose,
    setup_context=_setup,
)

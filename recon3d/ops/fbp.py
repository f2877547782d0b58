"""Filtered back projection: parallel and flat-detector fan beam, quantitative in 1/mm.

    f(x, y) = sum over views of  dview / U^2 * q_view(u(x, y)),      q = h * (redundancy * cosine * p)

h is the ramp, U = depth of the pixel / distance from source to axis (1 for a parallel beam), u(x, y) the detector
coordinate of the pixel, read with linear interpolation. Weights follow the angles as they are, see
:func:`recon3d.ops.ramp_filter`. Source: Kak and Slaney, Principles of Computerized Tomographic Imaging, sections
3.3 and 3.4.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from recon3d.geometry import FanBeam, ParallelBeam
from recon3d.ops.ramp_filter import Window, ramp_filter

__all__ = ["fbp"]

_TEMPORARY = 1 << 24  # elements of one temporary: 64 MB in float32


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

    >>> beam = ParallelBeam(tuple(i * math.pi / 90 for i in range(90)), 64, 1.0)
    >>> fbp(torch.zeros(2, 90, 64), beam, (48, 40), (1.0, 1.0)).shape
    torch.Size([2, 48, 40])
    """
    ny, nx = shape
    if ny < 1 or nx < 1:
        raise ValueError(f"fbp: shape needs at least one row and one column, got {tuple(shape)}")
    if not all(math.isfinite(p) and p > 0 for p in pixel_mm):
        raise ValueError(f"fbp: pixel_mm must be positive, got {tuple(pixel_mm)}")
    q = ramp_filter(y, geometry, window, cutoff)
    batch = q.shape[:-2]
    q = q.reshape(-1, *q.shape[-2:])
    step = max(1, _TEMPORARY // (ny * nx))
    parts = [_back_project(part, geometry, shape, pixel_mm) for part in q.split(step)]
    image = torch.cat(parts) if parts else q.new_zeros(0, ny, nx)
    return image.reshape(*batch, ny, nx)


def _back_project(
    q: Tensor, geometry: ParallelBeam | FanBeam, shape: tuple[int, int], pixel_mm: tuple[float, float]
) -> Tensor:
    """Sum over views of q read at every pixel's detector coordinate, divided by U^2 for a fan."""
    (ny, nx), (dy, dx), n = shape, pixel_mm, geometry.n_detector
    column = (torch.arange(nx, dtype=torch.float64, device=q.device) - (nx - 1) / 2) * dx
    row = ((torch.arange(ny, dtype=torch.float64, device=q.device) - (ny - 1) / 2) * dy)[:, None]
    # [view, u, slice] between two zero cells on either side, where everything beyond the detector is read
    lines = torch.nn.functional.pad(q.permute(1, 2, 0), (0, 0, 2, 2)).contiguous()
    image = q.new_zeros(ny * nx, q.shape[0])
    for view, angle in enumerate(geometry.angles_rad):
        cos, sin = math.cos(angle), math.sin(angle)
        u = column * cos + row * sin
        scale = None
        if isinstance(geometry, FanBeam):
            depth = geometry.source_to_axis_mm + column * sin - row * cos
            u = u * geometry.source_to_detector_mm / depth
            # behind or at the source: read the zero cells
            u = torch.where(depth > 0, u, math.inf)
            scale = (geometry.source_to_axis_mm / depth).square().to(q.dtype).reshape(-1, 1)
        cell = (u - geometry.detector_offset_mm) / geometry.detector_spacing_mm + (n - 1) / 2
        cell = cell.clamp(-1.5, n + 0.5).reshape(-1)
        low = cell.floor()
        weight = (cell - low).to(q.dtype)[:, None]
        index = low.to(torch.int64) + 2
        value = torch.lerp(lines[view].index_select(0, index), lines[view].index_select(0, index + 1), weight)
        image += value if scale is None else value.mul_(scale)
    return image.T.reshape(-1, ny, nx)

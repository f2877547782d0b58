"""Rebinning of 3D PET sinograms to slices, arc correction and filtered back projection: an image for a look.

Single-slice rebinning puts an oblique line into the slice that its middle lies in (Daube-Witherspoon and Muehllehner,
J Nucl Med 28 (1987) 1717), which is right near the axis and blurs along z away from it. Counts and what a uniform
activity of 1 Bq/mL would have given are rebinned alike and divided afterwards, so that bins without a crystal pair
fall out; where no line at all was measured the neighbours along the detector step in.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from recon3d import ops
from recon3d.geometry import ParallelBeam, PETGeometry

if TYPE_CHECKING:
    from recon3d.operators.pet import PETOperator

__all__ = ["parallel_sinogram", "rebinned_fbp", "single_slice"]

# below this share of the usual weight a rebinned bin counts as not measured
_MEASURED = 0.02


def single_slice(values: Tensor, geometry: PETGeometry, oblique: bool = False) -> Tensor:
    """Sum of all planes that share a middle: [slice, view, radial] with slices half a ring apart, 2 rings - 1 of them.

    Args:
        values: [view, radial, (tof,) plane]; time bins are added up.
        geometry: the bins.
        oblique: multiply every plane by the length of its oblique line over that of the direct one.
    """
    if geometry.tof is not None:
        values = values.sum(2)
    slices = 2 * geometry.scanner.rings - 1
    out = torch.zeros(*values.shape[:2], slices, dtype=values.dtype, device=values.device)
    pitch = geometry.scanner.ring_spacing_mm / 2
    across = 2 * np.sqrt(geometry.scanner.radius_mm**2 - geometry.radial_mm() ** 2)
    start = 0
    for middle, delta, step, count in geometry.segments:
        planes, stride = round(count), round(step / pitch)
        first = round(middle / pitch + geometry.scanner.rings - 1)
        part = values[..., start : start + planes]
        if oblique:
            longer = torch.from_numpy(np.sqrt(1 + (delta / across) ** 2)).to(part)
            part = part * longer[:, None]
        out[..., first : first + stride * (planes - 1) + 1 : stride] += part
        start += planes
    return out.permute(2, 0, 1)


def parallel_sinogram(y: Tensor, geometry: PETGeometry) -> tuple[Tensor, ParallelBeam]:
    """Evenly spaced parallel rays from the arcs of a ring scanner.

    Odd radial bins are measured half a scanner view before the even ones; their value at the angle of the even ones
    is interpolated between two views (the one after the last is the first, mirrored). Then the bins, which crowd
    towards the edge as sines do, are interpolated to the central bin's distance.

    Args:
        y: [..., view, radial] of all views.
        geometry: where they were measured.

    Raises:
        ValueError: some of the views only.
    """
    if geometry.views is not None:
        raise ValueError("parallel_sinogram: all views are needed")
    n, t = geometry.n_radial, np.arange(geometry.n_radial) - geometry.n_radial // 2
    # p(phi + pi, s) = p(phi, -s); a bin without a mirror image takes its neighbour's
    mirror = torch.from_numpy(np.clip(-t + n // 2, 0, n - 1))
    after = torch.cat([y[..., 1:, :], y[..., :1, :][..., mirror]], -2)
    odd = torch.from_numpy(t % 2 == 1).to(y.device)
    share = 0.5 / geometry.mashing
    even_angles = torch.where(odd, (1 - share) * y + share * after, y)
    s = geometry.radial_mm()
    spacing = geometry.bin_mm
    cells = 2 * int(min(-s[0], s[-1]) / spacing) + 1
    want = (np.arange(cells) - (cells - 1) / 2) * spacing
    low = np.clip(np.searchsorted(s, want, side="right") - 1, 0, n - 2)
    weight = torch.from_numpy((want - s[low]) / (s[low + 1] - s[low])).to(y)
    left = torch.from_numpy(low)
    rows = (1 - weight) * even_angles[..., left] + weight * even_angles[..., left + 1]
    middle = geometry.angles_rad()[:, n // 2]
    return rows, ParallelBeam(tuple(middle.tolist()), cells, spacing)


def rebinned_fbp(operator: PETOperator, y: Tensor) -> Tensor:
    """Corrected counts rebinned, filtered and back projected onto the operator's grid, in Bq/mL.

    Raises:
        NotImplementedError: the operator holds some of the views only.
        ValueError: y does not fit the operator.
    """
    geometry, grid = operator.geometry, operator.grid
    if geometry.views is not None:
        raise NotImplementedError("PETOperator.pinv: filtered back projection needs all views, not a subset's")
    if tuple(y.shape) != operator.range.shape:
        raise ValueError(f"PETOperator.pinv: the measurement must be {operator.range.shape}, got {tuple(y.shape)}")
    trues = y if operator.additive is None else y - operator.additive.to(y.dtype)
    weights = y.new_ones(1) if operator.factors is None else operator.factors.to(y.dtype)
    shape = (*y.shape[:2], y.shape[-1])
    if geometry.tof is not None and weights.ndim == 4:
        weights = weights.mean(2)
    counts = single_slice(trues, geometry)
    seen = single_slice(weights.expand(shape), _without_tof(geometry), oblique=True)
    rows, beam = parallel_sinogram(_filled(counts, seen) / operator.scale, geometry)
    image = ops.fbp(rows.contiguous(), beam, grid.slice_shape, grid.pixel_mm, window="hann")
    return _resliced(image, geometry.scanner.ring_spacing_mm / 2, grid.shape[0], grid.spacing_mm[0])


def _without_tof(geometry: PETGeometry) -> PETGeometry:
    return geometry if geometry.tof is None else replace(geometry, tof=None)


def _filled(counts: Tensor, seen: Tensor) -> Tensor:
    """counts / seen, and between measured bins of a row where nothing was seen."""
    usual = seen.amax()
    good = seen > _MEASURED * usual
    ratio = torch.where(good, counts / seen.clamp_min(torch.finfo(seen.dtype).tiny), 0.0)
    if bool(good.all()) or not bool(good.any()):
        return ratio
    # index of the last good bin at or before, and of the next one at or after
    n = ratio.shape[-1]
    place = torch.arange(n, device=ratio.device).expand(ratio.shape)
    before = torch.where(good, place, -1).cummax(-1).values
    after = n - 1 - torch.where(good.flip(-1), place, -1).cummax(-1).values.flip(-1)
    left, right = before.clamp_min(0), after.clamp_max(n - 1)
    left = torch.where(before < 0, right, left)
    right = torch.where(after > n - 1, left, right)
    weight = torch.where(right > left, (place - left).to(ratio.dtype) / (right - left).clamp_min(1), 0.0)
    filled = (1 - weight) * ratio.gather(-1, left) + weight * ratio.gather(-1, right)
    return torch.where(good, ratio, filled)


def _resliced(image: Tensor, have_mm: float, slices: int, want_mm: float) -> Tensor:
    """Linear interpolation of slices onto another distance, both centred; nothing beyond the first and last."""
    n = image.shape[0]
    if n == slices and math.isclose(have_mm, want_mm, rel_tol=1e-6):
        return image
    place = (torch.arange(slices, dtype=torch.float64) - (slices - 1) / 2) * (want_mm / have_mm) + (n - 1) / 2
    low = place.floor().clamp(0, n - 1).long()
    high = (low + 1).clamp_max(n - 1)
    weight = (place - low).clamp(0, 1).to(image)[:, None, None]
    out = (1 - weight) * image[low] + weight * image[high]
    outside = (place < -0.5) | (place > n - 0.5)
    out[outside] = 0
    return out

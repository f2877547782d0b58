"""The filter of filtered back projection, with every weight that makes the result quantitative.

    q = dview * ramp * (redundancy * cosine * y)

ramp        band-limited, sampled in space: h(0) = 1/(4 t^2), h(odd k) = -1/(pi k t)^2, h(even k) = 0 with t the cell
            size at the axis. Its transform is not |f| sampled, whose missing DC term would lower the whole image.
dview       the angle each view stands for, from the gaps to its neighbours: a half turn (parallel) or a full turn (fan)
            in total. Equal angles share theirs. A gap much wider than the others is missing data, not a wide view.
cosine      fan: SDD / sqrt(SDD^2 + u^2).
redundancy  a ray and its reverse must count once together. One half on a full turn, or, where the detector reaches
            further on one side of the axis, weights that rise from 0 to 1 across what both sides see. Fan: Parker's
            smooth weights on an arc from a half turn plus the fan angle on; below that 1 for rays measured once
            (Noo's weights).

Sources: Kak and Slaney, Principles of Computerized Tomographic Imaging, eq. 61 and section 3.4; Parker, Med. Phys. 9
(1982) 254; Silver, Med. Phys. 27 (2000) 773 for arcs longer than the minimum; Noo et al., Phys. Med. Biol. 47 (2002)
2525; Wang, Med. Phys. 29 (2002) 1634 for the displaced detector.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from recon3d.geometry import FanBeam, ParallelBeam

__all__ = ["Window", "ramp_filter"]

Window = Literal["ram-lak", "shepp-logan", "cosine", "hann"]
_Array = NDArray[np.float64]

_MISSING = 2.5  # a gap this many times the next widest is missing data; golden-angle gaps differ by 1.62 at most
_DISPLACED = 1.1  # one side reaching this much further is meant to see alone; below, the axis is merely off centre
_NOO_TAPER_RAD = math.radians(10.0)  # as in the paper


def ramp_filter(y: Tensor, geometry: ParallelBeam | FanBeam, window: Window = "ram-lak", cutoff: float = 1.0) -> Tensor:
    """Filter line integrals for back projection.

    Args:
        y: line integrals without unit, [..., view, u] float32 or float64.
        geometry: parallel or flat-detector fan beam with the views of y; angles in any order and spacing.
        window: apodisation of the ramp, from sharp to smooth "ram-lak" (none), "shepp-logan", "cosine", "hann".
        cutoff: highest frequency kept, as a fraction of the detector's Nyquist frequency, in (0, 1].

    Returns:
        1/mm times radians, shape, dtype and device of y: the sum over views of what each pixel reads (divided by
        U^2 for a fan) is the attenuation in 1/mm, see :func:`recon3d.ops.fbp`. Linear in y, differentiable.

    Raises:
        ValueError: y does not fit the geometry, the window is unknown, or cutoff is out of range.
        TypeError: y is not float32 or float64.

    Kernels: torch (any device).

    >>> beam = ParallelBeam((0.0, 1.0, 2.0), 8, 1.0)
    >>> ramp_filter(torch.ones(3, 8), beam).shape
    torch.Size([3, 8])
    """
    _check(y, geometry, window, cutoff)
    return _filtered(y, geometry, window, cutoff, (0, 0))


def ramp_filter_beyond(
    y: Tensor, geometry: ParallelBeam | FanBeam, window: Window, cutoff: float
) -> tuple[Tensor, ParallelBeam | FanBeam]:
    """As ramp_filter; for a displaced detector also where it has no cells, which the reverse views reach.

    Returns:
        The filtered views and the geometry of their cells.
    """
    _check(y, geometry, window, cutoff)
    u = geometry.detector_mm()
    full = isinstance(geometry, FanBeam) or geometry.n_views > 2
    if not (full and _displaced(u) and not _gaps(geometry.angles, 2 * math.pi)[3]):
        return _filtered(y, geometry, window, cutoff, (0, 0)), geometry
    blind = round(abs(float(u[0] + u[-1])) / geometry.detector_spacing_mm)
    left, right = (blind, 0) if -u[0] < u[-1] else (0, blind)
    wider = replace(
        geometry,
        n_detector=geometry.n_detector + blind,
        detector_offset_mm=geometry.detector_offset_mm + (right - left) * geometry.detector_spacing_mm / 2,
    )
    return _filtered(y, geometry, window, cutoff, (left, right)), wider


def _check(y: Tensor, geometry: ParallelBeam | FanBeam, window: str, cutoff: float) -> None:
    if y.ndim < 2 or tuple(y.shape[-2:]) != (geometry.n_views, geometry.n_detector):
        expected = f"[..., {geometry.n_views}, {geometry.n_detector}]"
        raise ValueError(f"ramp_filter: y must be {expected} as the geometry says, got {tuple(y.shape)}")
    if y.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"ramp_filter: y must be float32 or float64, got {y.dtype}")
    if window not in get_args(Window):
        raise ValueError(f"ramp_filter: window must be one of {', '.join(get_args(Window))}, got {window!r}")
    if not 0 < cutoff <= 1:
        raise ValueError(f"ramp_filter: cutoff must be in (0, 1] of the Nyquist frequency, got {cutoff}")


def _filtered(
    y: Tensor, geometry: ParallelBeam | FanBeam, window: Window, cutoff: float, beyond: tuple[int, int]
) -> Tensor:
    angles = geometry.angles
    n, cell_mm = geometry.n_detector, geometry.detector_spacing_mm
    if isinstance(geometry, FanBeam):
        gamma = np.arctan(geometry.detector_mm() / geometry.source_to_detector_mm)
        y = y * _like(np.cos(gamma) * _redundancy(angles, gamma), y)
        cell_mm /= geometry.magnification
        dview = _angular_widths(angles, 2 * math.pi)
    elif len(angles) > 2 and not _gaps(angles, 2 * math.pi)[3]:  # a full turn
        y = y * _like(_shared_sides(geometry.detector_mm()), y)
        dview = _angular_widths(angles, 2 * math.pi)
    else:
        dview = _angular_widths(angles, math.pi)

    y = torch.nn.functional.pad(y, beyond)
    n += sum(beyond)
    if y.numel() == 0:  # MKL refuses to transform nothing
        return torch.zeros_like(y)
    length = 1 << (2 * n - 1).bit_length()  # at least 2 n: the convolution never wraps
    response = _like(_response(length, window, cutoff) / cell_mm, y)
    spectrum = torch.fft.rfft(y, length) * response
    return torch.fft.irfft(spectrum, length)[..., :n] * _like(dview, y)[:, None]


def _response(length: int, window: Window, cutoff: float) -> _Array:
    """Transform of the ramp for cells of size 1, times the window; real because the ramp is even."""
    k = np.fft.fftfreq(length, 1 / length)
    h = np.zeros(length)
    h[0] = 0.25
    odd = k.astype(np.int64) % 2 == 1
    h[odd] = -1 / (math.pi * k[odd]) ** 2
    f = np.arange(length // 2 + 1) / (length // 2) / cutoff  # 1 at the cutoff
    shape = {
        "ram-lak": np.ones_like(f),
        "shepp-logan": np.sinc(f / 2),
        "cosine": np.cos(math.pi * f / 2),
        "hann": (1 + np.cos(math.pi * f)) / 2,
    }[window]
    return np.asarray(np.fft.rfft(h).real * shape * (f <= 1))


def _gaps(angles: _Array, period: float) -> tuple[NDArray[np.intp], _Array, float, bool]:
    """Order of the angles on the circle, the gap after each, the typical gap, and whether one gap is missing data."""
    turned = np.mod(angles, period)
    turned[period - turned < 1e-9 * period] = 0.0  # 2 pi is 0 again, whatever its rounding
    order = np.argsort(turned, kind="stable")
    gaps = np.diff(turned[order], append=turned[order[0]] + period)
    wide = np.sort(gaps[gaps > 1e-9 * period])  # repeated views leave gaps of zero
    typical = float(np.median(wide))
    return order, gaps, typical, len(wide) > 2 and bool(wide[-1] > _MISSING * wide[-2])


def _angular_widths(angles: _Array, period: float) -> _Array:
    """The angle each view stands for: half the gap on either side; equal angles share."""
    order, gaps, typical, missing = _gaps(angles, period)
    if missing:
        gaps[np.argmax(gaps)] = typical
    new = np.concatenate(([True], gaps[:-1] > 1e-9 * period))
    group = np.cumsum(new) - 1
    last = np.flatnonzero(np.append(new[1:], True))
    after = gaps[last]
    share = (after + np.roll(after, 1)) / 2 / np.bincount(group)
    widths = np.empty_like(angles)
    widths[order] = share[group]
    return widths


def _redundancy(angles: _Array, gamma: _Array) -> _Array:
    """Fan: weight of each ray, [view, u] or [1, u]; it and its reverse (a + pi + 2 gamma, -gamma) add to one."""
    order, gaps, typical, missing = _gaps(angles, 2 * math.pi)
    if not missing:
        return _shared_sides(np.tan(gamma))[None]
    widest = int(np.argmax(gaps))
    start = angles[order[(widest + 1) % len(order)]]
    arc = 2 * math.pi - gaps[widest] + typical  # every view stands for half a gap on either side
    beta = (np.mod(angles - start + 1e-9, 2 * math.pi) + typical / 2)[:, None]
    gamma = gamma[None, :]
    delta = max((arc - math.pi) / 2, 1e-12)
    if delta >= np.abs(gamma).max():
        tiny = 1e-12
        rise = np.sin(math.pi / 4 * np.clip(beta / np.maximum(delta - gamma, tiny), 0, 2)) ** 2
        fall = np.sin(math.pi / 4 * np.clip((arc - beta) / np.maximum(delta + gamma, tiny), 0, 2)) ** 2
        return np.where(beta <= 2 * (delta - gamma), rise, np.where(beta < math.pi - 2 * gamma, 1.0, fall))
    taper = min(_NOO_TAPER_RAD, arc / 4)

    def trust(b: _Array) -> _Array:
        return np.sin(math.pi / 2 * np.clip(np.minimum(b, arc - b) / taper, 0, 1)) ** 2

    own, reverse = trust(beta), trust(np.mod(beta + math.pi + 2 * gamma, 2 * math.pi))
    return np.asarray(own / (own + reverse))


def _shared_sides(u: _Array) -> _Array:
    """Full turn: weight of each cell at u from the axis, w(u) + w(-u) = 1; 1 where only one side sees."""
    if not _displaced(u):
        return np.full_like(u, 0.5)
    both = max(min(-float(u[0]), float(u[-1])), float(u[1] - u[0]))
    rise = np.sin(math.pi / 2 * np.clip(u / both, -1, 1))
    return np.asarray((1 + math.copysign(1, float(u[0] + u[-1])) * rise) / 2)


def _displaced(u: _Array) -> bool:
    left, right = -float(u[0]), float(u[-1])
    return len(u) > 1 and max(left, right) > _DISPLACED * min(left, right)


def _like(values: _Array, y: Tensor) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(values)).to(y)

"""The rotation axis on the detector, found from the sinogram alone.

A point at (X, Y) is seen at X cos t + Y sin t, so the sinogram of a half turn, followed by its mirror image about the
axis, is that of a full turn: its 2D Fourier transform vanishes outside a double wedge, |frequency along t| <= radius x
|frequency along u|, only if the mirror is right. The centre that leaves least energy outside is taken (Vo et al., Opt.
Express 22 (2014) 19078). For a full turn, opposite views are compared directly.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

_MOST_VIEWS = 720
"""Views beyond are not needed to find one number."""


def estimate_rotation_centre(sinogram: NDArray[np.floating], angles_rad: NDArray[np.float64]) -> float:
    """Detector cell of the rotation axis of a parallel-beam scan, counted from 0, to about a tenth of a cell.

    Args:
        sinogram: [slice, view, u], line integrals of an object that the detector sees whole.
        angles_rad: evenly spaced angles of half a turn or more.

    Raises:
        ValueError: too few views, uneven angles, less than half a turn, or nothing to see.
    """
    angles = np.asarray(angles_rad, np.float64)
    order = np.argsort(angles)
    angles, data = angles[order], np.asarray(sinogram, np.float64)[:, order]
    steps = np.diff(angles)
    if angles.size < 16 or steps.max() > 1.05 * np.median(steps) + 1e-9 or steps.min() < 0.95 * np.median(steps) - 1e-9:
        raise ValueError("at least 16 evenly spaced views are needed")
    step = float(np.median(steps))
    if angles[-1] - angles[0] + step < math.pi * (1 - 1e-3):
        raise ValueError(f"half a turn is needed, the views cover {math.degrees(angles[-1] - angles[0]):.0f} degrees")
    # half a turn of the slice with most signal
    half = round(math.pi / step)
    brightest = int(np.abs(data).sum(axis=(1, 2)).argmax())
    view = data[brightest, :half]
    view = view[:: max(1, half // _MOST_VIEWS)]
    if not np.ptp(view) > 0:
        raise ValueError("the sinogram is constant")
    first = _moment_centre(data[brightest, :half], angles[:half])
    n = view.shape[1]
    reach = max(8.0, 0.05 * n)
    low, high = max(1.0, first - reach), min(n - 2.0, first + reach)
    candidates = np.arange(math.ceil(low), high + 0.5)
    scores = [_outside(view, c) for c in candidates]
    best = float(candidates[int(np.argmin(scores))])
    for width in (0.5, 0.1):
        candidates = np.clip(best + width * np.arange(-4, 5), 1.0, n - 2.0)
        scores = [_outside(view, c) for c in candidates]
        best = float(candidates[int(np.argmin(scores))])
    return best


def _moment_centre(view: NDArray[np.float64], angles: NDArray[np.float64]) -> float:
    # the centre of mass of every view lies at c + X cos t + Y sin t
    u = np.arange(view.shape[1])
    weight = np.clip(view, 0, None)
    mass = weight.sum(axis=1)
    good = mass > 0.1 * np.median(mass)
    if good.sum() < 8:
        return (view.shape[1] - 1) / 2
    moment = (weight[good] * u).sum(axis=1) / mass[good]
    basis = np.stack([np.ones(good.sum()), np.cos(angles[good]), np.sin(angles[good])], axis=1)
    return float(np.clip(np.linalg.lstsq(basis, moment, rcond=None)[0][0], 0, view.shape[1] - 1))


def _outside(view: NDArray[np.float64], centre: float) -> float:
    """Energy outside the double wedge of the full turn made by mirroring about `centre`."""
    n_views, n = view.shape
    u = np.arange(n)
    mirrored_at = 2 * centre - u
    mirror = np.empty_like(view)
    for k in range(n_views):
        mirror[k] = np.interp(mirrored_at, u, view[k], left=np.nan, right=np.nan)
    seen = (mirrored_at >= 0) & (mirrored_at <= n - 1)
    # both halves on the cells they share, so that a wider overlap is no advantage
    full = np.concatenate([view[:, seen], mirror[:, seen]])
    full = full - full.mean()
    m = full.shape[1]
    if m < 8:
        return math.inf
    window = np.hanning(m + 2)[1:-1]
    power = np.abs(np.fft.rfft2(full * window)) ** 2
    along_t = np.abs(np.fft.fftfreq(2 * n_views) * 2 * n_views)[:, None]  # cycles a turn
    along_u = np.arange(power.shape[1])[None] / m  # cycles a cell
    radius = m / 2
    outside = along_t > 2 * math.pi * radius * along_u + 2
    return float(power[outside].sum() / power.sum())

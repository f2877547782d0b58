"""PSNR, SSIM, RMSE, NMSE and through-plane variation, in float64 and in a fixed order whatever the thread count.

SSIM is that of Wang et al., IEEE TIP 13 (2004) 600, with a uniform 7x7 window, sample covariances, K1 = 0.01, K2 =
0.03, averaged over the pixels whose window lies inside the slice: what scikit-image computes by default, which most
published tables use.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.floating]
Mask = NDArray[np.bool_]

SSIM_WINDOW = 7
_K1, _K2 = 0.01, 0.03
# a slice without any error counts as this much, so that means stay finite
PSNR_CAP_DB = 100.0
_CHUNK = 1 << 18  # voxels at a time: five maps of them stay in the cache


def psnr(x: Array, reference: Array, data_range: float, mask: Mask | None = None) -> float:
    """10 log10(data_range^2 / mean squared error) in dB, at most 100.

    >>> psnr(np.zeros(4), np.full(4, 0.1), data_range=1.0)
    20.0
    """
    squared = _mean((x.astype(np.float64) - reference) ** 2, mask)
    if squared <= 0 or not data_range:
        return PSNR_CAP_DB
    return min(PSNR_CAP_DB, round(float(10 * np.log10(data_range**2 / squared)), 10))


def rmse(x: Array, reference: Array, mask: Mask | None = None) -> float:
    """Root of the mean squared error, in the unit of x."""
    return float(np.sqrt(_mean((x.astype(np.float64) - reference) ** 2, mask)))


def nmse(x: Array, reference: Array, mask: Mask | None = None) -> float:
    """Sum of squared errors over the sum of squares of the reference; infinite for an empty reference."""
    power = _mean(reference.astype(np.float64) ** 2, mask)
    error = _mean((x.astype(np.float64) - reference) ** 2, mask)
    return error / power if power > 0 else float("inf")


def ssim(x: Array, reference: Array, data_range: float, mask: Mask | None = None) -> NDArray[np.float64]:
    """SSIM of every slice [slice, row, col].

    Args:
        x: slices in any unit.
        reference: what they should be, same shape and unit.
        data_range: the range L of the constants (K L)^2.
        mask: pixels that count, same shape; None counts all.

    Returns:
        one value per slice; NaN where the mask leaves none of its interior.

    Raises:
        ValueError: a slice is smaller than the 7x7 window, or the range is not positive.
    """
    if min(x.shape[-2:]) < SSIM_WINDOW:
        raise ValueError(f"ssim: slices need at least {SSIM_WINDOW} pixels a side, got {x.shape[-2]} x {x.shape[-1]}")
    if not data_range > 0:
        raise ValueError(f"ssim: data_range must be positive, got {data_range}")
    step = max(1, _CHUNK // (x.shape[-2] * x.shape[-1]))
    out = np.empty(len(x))
    edge = SSIM_WINDOW // 2
    for start in range(0, len(x), step):
        part = slice(start, start + step)
        values = _ssim_map(x[part], reference[part], data_range)
        if mask is None:
            out[part] = values.mean(axis=(1, 2))
        else:
            inside = mask[part, edge:-edge, edge:-edge]
            count = inside.sum(axis=(1, 2))
            total = np.where(inside, values, 0).sum(axis=(1, 2))
            out[part] = np.where(count > 0, total / np.maximum(count, 1), np.nan)
    return out


def through_plane(x: Array, reference: Array, dz_mm: float, mask: Mask | None = None) -> dict[str, float]:
    """How neighbouring slices differ, against how the reference's do.

    Args:
        x: volume [z, y, x], at least two slices.
        reference: same shape and unit.
        dz_mm: slice distance.
        mask: voxels that count; a pair counts where both do.

    Returns:
        gradient: mean |x[k+1] - x[k]| / dz; reference_gradient: the same of the reference; ratio: their quotient, below
        1 when slices were smoothed into each other, above when they jitter; error: mean |dx - dr| / mean |dr|.
    """
    pair = None if mask is None else mask[1:] & mask[:-1]
    dx = np.diff(x.astype(np.float64), axis=0)
    dr = np.diff(reference.astype(np.float64), axis=0)
    ours, theirs = _mean(np.abs(dx), pair), _mean(np.abs(dr), pair)
    error = _mean(np.abs(dx - dr), pair)
    safe = theirs if theirs > 0 else float("nan")
    return {
        "gradient": ours / dz_mm,
        "reference_gradient": theirs / dz_mm,
        "ratio": ours / safe,
        "error": error / safe,
    }


def _mean(values: NDArray[np.float64], mask: Mask | None) -> float:
    return float(values.mean() if mask is None else values[mask].mean())


def _ssim_map(x: Array, r: Array, data_range: float) -> NDArray[np.float64]:
    # centred on the reference's mean, so that variances do not cancel
    centre = float(r.mean(dtype=np.float64))
    x, r = x.astype(np.float64) - centre, r.astype(np.float64) - centre
    n = SSIM_WINDOW**2
    mean_x, mean_r = _box(x) / n, _box(r) / n
    unbiased = n / (n - 1)
    var_x = unbiased * (_box(x * x) / n - mean_x * mean_x)
    var_r = unbiased * (_box(r * r) / n - mean_r * mean_r)
    cov = unbiased * (_box(x * r) / n - mean_x * mean_r)
    mean_x += centre
    mean_r += centre
    c1, c2 = (_K1 * data_range) ** 2, (_K2 * data_range) ** 2
    top = (2 * mean_x * mean_r + c1) * (2 * cov + c2)
    return top / ((mean_x**2 + mean_r**2 + c1) * (var_x + var_r + c2))


def _box(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Sums over 7x7 windows inside the slice, by doubling: four additions an axis instead of six."""
    for axis in (1, 2):
        x = np.moveaxis(x, axis, -1)
        two = x[..., :-1] + x[..., 1:]
        four = two[..., :-2] + two[..., 2:]
        x = np.moveaxis(four[..., :-3] + two[..., 4:-1] + x[..., 6:], -1, axis)
    return x

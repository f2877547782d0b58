"""Visual information fidelity in the pixel domain: how much of a reference's information an image still carries.

Sheikh and Bovik, IEEE TIP 15 (2006) 430, in the multi-scale pixel form of their own program (vifp_mscale), which papers
on medical images quote as VIF. At each of four scales the image is taken to be x = g r + v locally, with g and the
variance of v from moments in a Gaussian window, and

    VIF = sum log(1 + g^2 var(r) / (var(v) + n)) / sum log(1 + var(r) / n),      n = 2 for values of 0 .. 255.

Windows of 17, 9, 5 and 3 pixels with a standard deviation of a fifth of that, moments where the window lies inside,
and from scale to scale the window's blur and every second pixel.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["VIF_SMALLEST", "vif"]

Array = NDArray[np.floating]

VIF_SMALLEST = 41
_WINDOWS = (17, 9, 5, 3)
_NOISE = 2.0
_LEAST = 1e-8


def vif(x: Array, reference: Array, data_range: float) -> NDArray[np.float64]:
    """VIF of every slice [slice, row, col].

    Args:
        x: slices in any unit.
        reference: what they should be, same shape and unit.
        data_range: what counts as 255; the noise of the visual system is a part of it.

    Returns:
        one value per slice: 1 for the reference itself, towards 0 as its details are lost, above 1 for an image that
        shows them with more contrast.

    Raises:
        ValueError: shapes differ, a slice is smaller than 41 pixels a side, or the range is not positive.
    """
    if x.shape != reference.shape or x.ndim != 3:
        raise ValueError(f"vif: [slice, row, col] of one shape are needed, got {x.shape} and {reference.shape}")
    if min(x.shape[1:]) < VIF_SMALLEST:
        raise ValueError(f"vif: slices need at least {VIF_SMALLEST} pixels a side, got {x.shape[1]} x {x.shape[2]}")
    if not data_range > 0:
        raise ValueError(f"vif: data_range must be positive, got {data_range}")
    return np.array([_one(a, b, data_range) for a, b in zip(x, reference, strict=True)])


def _one(x: Array, reference: Array, data_range: float) -> float:
    # variances do not mind a common shift, rounding does
    shift = float(reference.mean(dtype=np.float64))
    a, r = ((v.astype(np.float64) - shift) * (255.0 / data_range) for v in (x, reference))
    kept = all_ = 0.0
    for scale, size in enumerate(_WINDOWS):
        if scale:
            a, r = (_blur(v, size)[::2, ::2] for v in (a, r))
        mean_a, mean_r = _blur(a, size), _blur(r, size)
        var_a = np.maximum(_blur(a * a, size) - mean_a**2, 0)
        var_r = np.maximum(_blur(r * r, size) - mean_r**2, 0)
        both = _blur(a * r, size) - mean_a * mean_r
        gain = both / (var_r + _LEAST)
        rest = var_a - gain * both
        flat = var_r < _LEAST
        gain, rest, var_r = np.where(flat, 0, gain), np.where(flat, var_a, rest), np.where(flat, 0, var_r)
        gone = var_a < _LEAST
        gain, rest = np.where(gone, 0, gain), np.where(gone, 0, rest)
        rest = np.where(gain < 0, var_a, rest)  # an inverted detail is no detail
        gain, rest = np.maximum(gain, 0), np.maximum(rest, _LEAST)
        kept += float(np.log10(1 + gain**2 * var_r / (rest + _NOISE)).sum())
        all_ += float(np.log10(1 + var_r / _NOISE).sum())
    return (kept + _LEAST) / (all_ + _LEAST)


def _blur(x: NDArray[np.float64], size: int) -> NDArray[np.float64]:
    """A Gaussian window, where it lies inside."""
    at = np.arange(size) - size // 2
    w = np.exp(-0.5 * (at / (size / 5)) ** 2)
    w /= w.sum()
    for axis in (0, 1):
        n = x.shape[axis] - size + 1
        x = sum(w[k] * (x[k : k + n] if axis == 0 else x[:, k : k + n]) for k in range(size))
    return x

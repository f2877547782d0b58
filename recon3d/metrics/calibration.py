"""Whether an interval that says 90 % holds the truth nine times in ten, from few samples and without assuming many.

With K independent draws of which the truth is one more (a calibrated posterior sampler), two intervals keep a promise
at any K:

* Gaussian voxels: (truth - mean) / (std sqrt(1 + 1/K)) is Student's t with K - 1 degrees of freedom, because mean and
  std are themselves estimates. The factor at 90 % is 1.92 for 10 samples and tends to 1.645.
* any voxels: the truth falls between the r-th smallest and the r-th largest with probability (K + 1 - 2 r) / (K + 1),
  as every rank among K + 1 draws is as likely. The widest such interval, r = 1, holds (K - 1) / (K + 1): 82 % for 10
  samples; 90 % needs 19.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["LEVELS", "calibration", "interval_factor", "order_rank", "student_central"]

# nominal shares at which a reliability curve is taken
LEVELS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
_NOMINAL = 0.9


def student_central(t: float, degrees: int) -> float:
    """Probability that |T| <= t for Student's t with a whole number of degrees of freedom.

    The finite sums of Abramowitz and Stegun, 26.7.3 and 26.7.4.

    >>> round(student_central(1.8331129, 9), 6)
    0.9
    """
    angle = math.atan(t / math.sqrt(degrees))
    cosine = math.cos(angle)
    term, total = (cosine, 0.0) if degrees % 2 else (1.0, 0.0)
    for k in range(1 + degrees % 2, degrees, 2):
        total += term
        term *= cosine * cosine * k / (k + 1)
    if degrees % 2:
        return 2 / math.pi * (angle + math.sin(angle) * total)
    return math.sin(angle) * total


def interval_factor(samples: int, nominal: float = _NOMINAL) -> float:
    """f such that mean +- f std of so many draws holds one more draw with the nominal probability, if Gaussian.

    Args:
        samples: number of draws K that mean and std (with K - 1 in the denominator) are of, at least 2.
        nominal: probability, in (0, 1).

    Raises:
        ValueError: a number out of range.

    >>> round(interval_factor(10), 3), round(interval_factor(10_000), 3)
    (1.923, 1.645)
    """
    if samples < 2:
        raise ValueError(f"interval_factor: a spread needs at least 2 samples, got {samples}")
    _check_nominal("interval_factor", nominal)
    low, high = 0.0, math.pi / 2
    while high - low > 1e-13:  # in the angle, where the tail of few degrees of freedom is short
        middle = (low + high) / 2
        t = math.sqrt(samples - 1) * math.tan(middle)
        low, high = (middle, high) if student_central(t, samples - 1) < nominal else (low, middle)
    return math.sqrt(samples - 1) * math.tan((low + high) / 2) * math.sqrt(1 + 1 / samples)


def order_rank(samples: int, nominal: float = _NOMINAL) -> float | None:
    """Rank r, counted from 1, such that the r-th smallest to the r-th largest draw holds one more nominally.

    A fractional rank is between two draws. None where even the smallest to the largest hold less.

    >>> order_rank(19), order_rank(39), order_rank(10)
    (1.0, 2.0, None)
    """
    _check_nominal("order_rank", nominal)
    rank = round((samples + 1) * (1 - nominal) / 2, 9)
    return rank if rank >= 1 else None


def calibration(
    mean: Tensor | NDArray[np.floating],
    std: Tensor | NDArray[np.floating],
    truth: Tensor | NDArray[np.floating],
    samples: int,
    mask: Tensor | NDArray[np.bool_] | None = None,
    levels: Sequence[float] = LEVELS,
) -> dict[str, Any]:
    """How often the truth lies where mean and spread of some samples say it does.

    Args:
        mean: of the samples, any shape, one unit throughout; for complex images of their magnitudes.
        std: their standard deviation (K - 1 in the denominator), same shape.
        truth: same shape; never used for anything but these figures.
        samples: how many there were; fixes the width of the intervals.
        mask: voxels that count; None counts all.
        levels: nominal shares of the reliability curve.

    Returns:
        a dictionary, ready for JSON: "nominal" and "observed" shares of the reliability curve; "share" of voxels inside
        the nominal 90 % interval; "calibration_error"; "sharpness" (mean width of the 90 % interval); "spread_factor",
        by which the spread must be multiplied for 90 % to be 90 %; "z_rms"; "correlation" of |error| and spread;
        and "definitions".

    Raises:
        ValueError: shapes differ, a value is not finite, a spread is negative, or the mask is empty.
    """
    arrays = [_array(name, x) for name, x in (("mean", mean), ("std", std), ("truth", truth))]
    if len({a.shape for a in arrays}) != 1:
        raise ValueError(f"calibration: mean, std and truth must have one shape, got {[a.shape for a in arrays]}")
    if mask is not None:
        inside = np.asarray(mask.cpu() if isinstance(mask, Tensor) else mask).astype(bool)
        if inside.shape != arrays[0].shape or not inside.any():
            raise ValueError(f"calibration: the mask must have shape {arrays[0].shape} and leave some voxel")
        arrays = [a[inside] for a in arrays]
    m, s, t = (a.astype(np.float64).ravel() for a in arrays)
    if (s < 0).any():
        raise ValueError("calibration: std holds negative values")
    error = np.abs(t - m)
    # no spread is right only where there is no error
    z = np.divide(error, s, out=np.where(error > 0, np.inf, 0.0), where=s > 0)
    ordered = np.sort(z)
    observed = [
        float(np.searchsorted(ordered, interval_factor(samples, p) * (1 + 1e-12), "right")) / z.size for p in levels
    ]
    factor = interval_factor(samples)
    at_90 = float(ordered[max(0, math.ceil(_NOMINAL * z.size) - 1)])
    finite = z[np.isfinite(z)]
    return {
        "samples": samples,
        "voxels": int(z.size),
        "nominal": [float(p) for p in levels],
        "observed": observed,
        "share": float((z <= factor).mean()),
        "calibration_error": float(np.mean(np.abs(np.subtract(observed, levels)))),
        "sharpness": float(2 * factor * s.mean()),
        "spread_factor": at_90 / factor if math.isfinite(at_90) else None,
        "z_rms": float(np.sqrt(np.mean(finite**2))) if finite.size else None,
        "correlation": _correlation(error, s),
        "definitions": {
            "interval": f"mean +- f std, f = t sqrt(1 + 1/K) with t of Student's law of K - 1 degrees of freedom; "
            f"{factor:.4f} at 90 % for K = {samples}",
            "share": "part of the voxels whose truth lies inside the nominal 90 % interval",
            "observed": "the same at each nominal share",
            "calibration_error": "mean of |observed - nominal| over the curve",
            "sharpness": "mean width of the 90 % interval, in the volumes' unit; small is good once the share is right",
            "spread_factor": "c such that 90 % of the voxels lie inside mean +- c f std; above 1: spread too small",
            "z_rms": "root of the mean of ((truth - mean) / std)^2 over voxels with spread",
            "correlation": "Pearson's, of |truth - mean| and std over voxels",
        },
    }


def _correlation(error: NDArray[np.float64], std: NDArray[np.float64]) -> float | None:
    e, s = error - error.mean(), std - std.mean()
    power = float((e @ e) * (s @ s))
    return float(e @ s) / math.sqrt(power) if power > 0 else None


def _array(name: str, values: Tensor | NDArray[Any]) -> NDArray[Any]:
    array = values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)
    if array.dtype.kind not in "fiu":
        raise ValueError(
            f"calibration: {name} needs real numbers, got {array.dtype}; take magnitudes of complex images"
        )
    if not np.isfinite(array).all():
        raise ValueError(f"calibration: {name} holds NaN or infinity")
    return array


def _check_nominal(name: str, nominal: float) -> None:
    if not 0 < nominal < 1:
        raise ValueError(f"{name}: nominal must be between 0 and 1, got {nominal}")

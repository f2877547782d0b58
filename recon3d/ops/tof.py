"""Weights of time-of-flight bins along a line of response.

The detected position along a line is the true one plus a Gaussian error of standard deviation sigma, cut off at
+-q sigma and renormalised (q = truncation, 3 by default). Bin b of T is centred (b - (T-1)/2) w from the line's middle,
measured towards p1, and is w wide. A point at distance d from the middle contributes to it with

    F((hi - d) / sigma) - F((lo - d) / sigma),   lo = (b - T/2) w,   hi = (b + 1 - T/2) w
    F(u) = clamp(1/2 + erf(u / sqrt 2) / (2 erf(q / sqrt 2)), 0, 1)

so the weights of bins that cover d +- q sigma add up to 1: data summed over its bins is the non-TOF data.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from recon3d.geometry.pet import TOF

__all__ = ["tof_numbers", "tof_weights"]


def tof_weights(
    distance: Tensor, bins: int, bin_mm: float, sigma_mm: float, truncation: float = 3.0, which: Tensor | None = None
) -> Tensor:
    """Weight of points of a line in its time-of-flight bins.

    Args:
        distance: distance of the points from the line's middle towards p1, [...] float32 or float64, mm.
        bins: number of bins T of the line.
        bin_mm: width of a bin in mm of position (c/2 times the time difference).
        sigma_mm: standard deviation of the detected position in mm.
        truncation: where the Gaussian ends, in standard deviations.
        which: one bin per point, integers that broadcast against distance; None gives all bins.

    Returns:
        [..., T], or with `which` the shape of distance and which together; 0 to 1, without unit.

    >>> at = torch.tensor([0.0, 20.0], dtype=torch.float64)
    >>> tof_weights(at, bins=3, bin_mm=40.0, sigma_mm=10.0).round(decimals=4).tolist()
    [[0.0215, 0.9571, 0.0215], [0.0, 0.5, 0.5]]
    """
    if which is None:
        low = (torch.arange(bins, dtype=distance.dtype, device=distance.device) - bins / 2) * bin_mm
        distance = distance[..., None]
    else:
        low = (which.to(distance) - bins / 2) * bin_mm
    reach = 2 * math.erf(truncation / math.sqrt(2))

    def cumulative(edge: Tensor) -> Tensor:
        u = (edge - distance) / (sigma_mm * math.sqrt(2))
        return (0.5 + torch.erf(u) / reach).clamp(0.0, 1.0)

    return cumulative(low + bin_mm) - cumulative(low)


def tof_numbers(op: str, tof: TOF | None) -> tuple[int, float, float, float]:
    """(bins, bin_mm, sigma_mm, truncation) as the schemas take them; no TOF is 0 bins.

    Raises:
        ValueError: a number of bins, a length or a truncation that is not positive.
    """
    if tof is None:
        return 0, 1.0, 1.0, 3.0
    bins, lengths = int(tof.bins), (float(tof.bin_mm), float(tof.sigma_mm), float(tof.truncation))
    if bins < 1 or not all(math.isfinite(v) and v > 0 for v in lengths):
        raise ValueError(
            f"{op}: tof needs a positive number of bins, bin_mm, sigma_mm and truncation, got {bins}, {lengths[0]}, "
            f"{lengths[1]} and {lengths[2]}"
        )
    return bins, *lengths

"""SIRT: simultaneous algebraic reconstruction with the row and column sums of the scanner.

    x <- x + relaxation C A^T R (y - A x),   R = 1 / (A 1),   C = 1 / (A^T R A 1)   (= 1 / A^T 1 where every ray counts)

(Gilbert, J. Theor. Biol. 36 (1972) 105; Gregor and Benson, IEEE TMI 27 (2008) 918). With statistical weights W, R
becomes W / (A 1). Each step lowers sum R (y - A x)^2 for 0 < relaxation < 2.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from recon3d.baselines.progress import CHECK_EVERY, Callback, settled
from recon3d.operators.base import LinearOperator

__all__ = ["sirt"]

# a ray or voxel with less than this share of the largest sum is left alone: its quotient would be noise
_LEAST = 1e-4


def sirt(
    y: Tensor,
    operator: LinearOperator,
    iterations: int = 200,
    weights: Tensor | None = None,
    nonnegative: bool = True,
    relaxation: float = 1.0,
    tolerance: float | None = None,
    x0: Tensor | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """Reconstruct by SIRT.

    Args:
        y: measurement [slice, view, u] (any range of the operator).
        operator: the scanner; the sums assume that its weights are not negative, as those of CT and PET are.
        iterations: at most this many; one A and one A^T each.
        weights: inverse variances, broadcast over y; None weighs all rays alike.
        nonnegative: keep the volume at or above zero.
        relaxation: between 0 and 2; 1 is plain SIRT.
        tolerance: stop when a step is at most this part of the volume (looked at every 10 iterations); None never.
        x0: start; None starts at zero.
        callback: called after every iteration with (iteration, volume); returning True stops.

    Returns:
        The volume.

    Raises:
        ValueError: iterations, relaxation or tolerance out of range, or y that does not fit the operator.
    """
    if iterations < 1:
        raise ValueError(f"sirt: iterations must be at least 1, got {iterations}")
    if not 0 < relaxation < 2:
        raise ValueError(f"sirt: relaxation must lie between 0 and 2, got {relaxation}")
    if tolerance is not None and not (math.isfinite(tolerance) and tolerance > 0):
        raise ValueError(f"sirt: tolerance must be positive, got {tolerance}")
    x = operator.adjoint(torch.zeros_like(y)) if x0 is None else x0.clone()
    ones = torch.ones_like(x[:1]) if operator.coupling == "slice" else torch.ones_like(x)
    length = operator(ones)
    row = _inverse(length)
    if weights is not None:
        row = row * weights
    column = _inverse(operator.adjoint(row * length)).mul_(relaxation)
    for k in range(1, iterations + 1):
        step = operator.adjoint(torch.sub(y, operator(x)).mul_(row)).mul_(column)
        if nonnegative:
            step = torch.maximum(step, -x)  # the step that was really made
        x += step
        if callback is not None and callback(k, x):
            break
        if tolerance is not None and k % CHECK_EVERY == 0 and settled(step, x, tolerance):
            break
    return x


def _inverse(sums: Tensor) -> Tensor:
    return torch.where(sums > _LEAST * sums.amax(), 1 / sums, 0.0) if sums.numel() else sums

"""CG-SENSE: least squares on multi-coil k-space by conjugate gradients, with an optional Tikhonov term.

    min over x of  1/2 ||A x - y||^2_W + tikhonov / 2 ||A^H W A|| ||x||^2

(Pruessmann et al., MRM 46 (2001) 638). The system is Hermitian, so its inner products are those of the real and
imaginary parts; slices that do not couple have step lengths of their own. Few iterations regularise, many amplify
noise.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from recon3d import ops
from recon3d.baselines.progress import Callback
from recon3d.operators.base import LinearOperator

__all__ = ["cg_sense"]


def cg_sense(
    y: Tensor,
    operator: LinearOperator,
    iterations: int = 15,
    tikhonov: float = 0.0,
    weights: Tensor | None = None,
    tolerance: float = 1e-4,
    x0: Tensor | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """Reconstruct by conjugate gradients.

    Args:
        y: k-space in the operator's range.
        operator: the scanner.
        iterations: at most this many; one A^H A each.
        tikhonov: weight of ||x||^2 in units of ||A^H W A||, 0 or above; 1e-3 to 1e-1 helps where coils overlap.
        weights: inverse variances or sampling density, broadcast over y; None weighs all samples alike.
        tolerance: a slice is left alone once its residual has fallen to this part of its first one.
        x0: start; None starts at zero.
        callback: called after every iteration with (iteration, volume); returning True stops.

    Returns:
        The volume, complex64.

    Raises:
        ValueError: a number out of range, or y that does not fit the operator.
    """
    if iterations < 1:
        raise ValueError(f"cg_sense: iterations must be at least 1, got {iterations}")
    if not (math.isfinite(tikhonov) and tikhonov >= 0):
        raise ValueError(f"cg_sense: tikhonov must not be negative, got {tikhonov}")
    if not 0 <= tolerance < 1:
        raise ValueError(f"cg_sense: tolerance must be in [0, 1), got {tolerance}")
    rho = tikhonov * operator.norm(weights) if tikhonov else 0.0
    residual = operator.adjoint(y if weights is None else y * weights)
    x = torch.zeros_like(residual)
    # the first residual of a start at zero is the scale of the problem, whatever x0 is
    target = _dots(residual, operator.coupling == "slice") * tolerance**2
    if x0 is not None:
        x.copy_(x0)
        residual -= operator.normal(x, weights).add_(x, alpha=rho)
    p = residual.clone()
    rr = _dots(residual, operator.coupling == "slice")
    for k in range(1, iterations + 1):
        rr = torch.where(rr <= target, 0.0, rr)
        if k > 1 and not bool(rr.any()):
            break
        q = operator.normal(p, weights)
        if rho:
            q.add_(p, alpha=rho)
        rr = ops.cg_step_(_parts(x), _parts(residual), _parts(p), _parts(q), rr)
        if callback is not None and callback(k, x):
            break
    return x


def _parts(x: Tensor) -> Tensor:
    return torch.view_as_real(x) if x.is_complex() else x


def _dots(r: Tensor, per_slice: bool) -> Tensor:
    return ops.dot(_parts(r), _parts(r), per_slice)

"""Filtered back projection: what every scanner shows, and what a new method has to beat first."""

from __future__ import annotations

from torch import Tensor

from recon3d.baselines.progress import Callback
from recon3d.operators.base import LinearOperator

__all__ = ["fbp"]


def fbp(
    y: Tensor,
    operator: LinearOperator,
    weights: Tensor | None = None,
    nonnegative: bool = False,
    callback: Callback | None = None,
) -> Tensor:
    """The operator's direct inverse.

    Args:
        y: measurement in the operator's range.
        operator: a scanner with a pinv.
        weights: taken and not used, so that all baselines are called alike.
        nonnegative: cut negative values.
        callback: called once, with (1, volume).

    Returns:
        The volume, in the unit of the operator's domain.

    Raises:
        NotImplementedError: the operator has no direct inverse.
    """
    x = operator.pinv(y)
    if nonnegative:
        x = x.clamp_(min=0)
    if callback is not None:
        callback(1, x)
    return x

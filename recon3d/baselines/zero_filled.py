"""Zero-filled MRI: the adjoint with the sampling density divided out, which is what a scanner shows first."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from recon3d.baselines.progress import Callback
from recon3d.operators.base import LinearOperator
from recon3d.operators.mri import MRIOperator

__all__ = ["zero_filled"]


def zero_filled(
    y: Tensor,
    operator: LinearOperator,
    weights: Tensor | None = None,
    combine: Literal["sense", "rss"] = "sense",
    callback: Callback | None = None,
) -> Tensor:
    """What is measured, transformed back: zeros elsewhere (Cartesian), or density-weighted gridding.

    Args:
        y: k-space in the operator's range.
        operator: an MRI scanner.
        weights: taken and not used, so that all baselines are called alike.
        combine: "sense" joins the coils with their maps and gives a complex volume; "rss" takes the root of the sum of
            squares of the coil images, real, without using the maps.
        callback: called once, with (1, volume).

    Returns:
        [z, y, x], complex64 for "sense" and float32 for "rss".

    Raises:
        ValueError: `combine` is another word.
        TypeError: "rss" and the operator has no coils.
    """
    if combine == "sense":
        x = operator.pinv(y)
    elif combine == "rss":
        if not isinstance(operator, MRIOperator):
            raise TypeError(f"zero_filled: rss needs an MRI operator, got {type(operator).__name__}; use 'sense'")
        x = operator.rss(y)
    else:
        raise ValueError(f"zero_filled: combine must be 'sense' or 'rss', got {combine!r}")
    if callback is not None:
        callback(1, x)
    return x

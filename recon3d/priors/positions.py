"""Where in its slice a pixel lies, as two channels that a patch network is shown beside the image.

Columns run from -1 at the first to 1 at the last, rows likewise, and both go on in the same steps beyond the slice. A
crop that was zoomed or mirrored is a crop of a zoomed or mirrored slice, so the channels are always such ramps.
Source: PaDIS (Hu et al., NeurIPS 2024, arXiv 2406.02462), columns first.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["positions"]


def positions(
    size: Sequence[int],
    whole: Sequence[int] | None = None,
    corner: Sequence[float] = (0.0, 0.0),
    step: float = 1.0,
    device: torch.device | str | None = None,
) -> Tensor:
    """Column and row of every pixel of a crop, [2, row, col] float32.

    Args:
        size: rows and columns of the crop.
        whole: rows and columns of the slice that it was cut from; the crop itself by default.
        corner: row and column in the slice of the crop's first pixel; it may lie outside.
        step: pixels of the slice from one pixel of the crop to the next.
        device: of the result.

    >>> positions((2, 3))[0].tolist()
    [[-1.0, 0.0, 1.0], [-1.0, 0.0, 1.0]]
    >>> positions((1, 2), whole=(5, 5), corner=(4, 3))[:, 0].tolist()
    [[0.5, 1.0], [1.0, 1.0]]
    """
    whole = size if whole is None else whole
    ramps = []
    for n, length, first in zip(size, whole, corner, strict=True):
        at = first + step * torch.arange(n, dtype=torch.float32, device=device)
        # a slice of one pixel has no other place than its middle
        ramps.append(2 * at / (length - 1) - 1 if length > 1 else torch.zeros_like(at))
    row, col = ramps
    return torch.stack([col[None].expand(len(row), -1), row[:, None].expand(-1, len(col))])

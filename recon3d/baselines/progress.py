"""What the iterative baselines share: the callback that watches them and the test that stops them."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from recon3d import ops

__all__ = ["CHECK_EVERY", "Callback", "settled"]

# called after every iteration with (iteration from 1, volume), where True stops; the volume is the working one
Callback = Callable[[int, Tensor], bool | None]

# iterations between two looks at the change, each of which waits for the device
CHECK_EVERY = 10


def settled(change: Tensor, x: Tensor, tolerance: float) -> bool:
    """Whether the last step was at most tolerance times the volume, |change| <= tolerance |x|."""
    return bool(ops.dot(change, change) <= tolerance**2 * ops.dot(x, x))

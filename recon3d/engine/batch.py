"""How many slices a GPU works on at once: the largest power of two that fits its memory and wastes little."""

from __future__ import annotations

from collections.abc import Callable

__all__ = ["gpu_batch"]

# a GPU is busy with fewer: 32 slices of 256 x 256 pixels are more rows of every product than it has lanes
_MOST = 32
# rows that fill up the last batch are work for nothing
_PADDING = 1.25
# of the free memory; the rest is for fragments of the heap
_SHARE = 0.9


def gpu_batch(activations: Callable[[int], int], room: int, views: int) -> int:
    """The batch for a pass over some views.

    Args:
        activations: bytes that so many slices take while they are denoised; asked for two slices, then for one.
        room: bytes that are free for them.
        views: of a pass; batches are filled up to their size, so that all have one shape.

    Returns:
        A power of two, at least 1: when even one slice does not fit, the engine says so.

    >>> gpu_batch(lambda n: 100 + 50 * n, 1000, 64)
    16
    """
    two = activations(2)  # first, for it takes along what libraries allocate once
    one = activations(1)
    each = max(two - one, 1)
    fixed = max(one - each, 0)
    batch = _MOST
    while batch > 1 and (fixed + batch * each > _SHARE * room or -(-views // batch) * batch > _PADDING * views):
        batch //= 2
    return batch

"""A prior of patches as a prior of slices of any size, and a prior of slices in bounded memory.

A slice is covered by patches whose weights add up to one at every pixel. Neighbours share `overlap` pixels; the outer
quarter of what they share counts for nothing (there a network misses its surroundings), the half between fades from one
to the other. Patches lie inside the slice, so the slice's border stays a border and nothing is made up beyond it.

* A prior that was trained on patches sees patches of exactly that size, on a grid whose origin is drawn anew for every
  noise level, so that no seam stays where it is (PaDIS: Hu et al., NeurIPS 2024, arXiv 2406.02462; for partitions of a
  stack: DiffusionBlend, Song et al., NeurIPS 2024, arXiv 2406.10211). The draw is a function of the noise level alone.
* A prior that takes whole slices sees the fewest equal patches that are not larger than asked for, at fixed places:
  activations are those of one patch.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from recon3d.ops.philox import philox_bits
from recon3d.priors.base import ModelCard, Prior

__all__ = ["Cover", "TiledPrior", "cover"]

# shared by neighbours unless told otherwise: nothing for a patch prior, which was trained up to its patch's border
_OVERLAP = 64
# sides of equal patches are multiples of this, which suits every network at hand
_MULTIPLE = 32
_STREAM = 0x7411


@dataclass(frozen=True)
class Cover:
    """Patches along one axis: where each starts, how long all are, and their weights [patch, length], float64."""

    starts: tuple[int, ...]
    length: int
    weights: Tensor


def cover(n: int, length: int, overlap: int, origin: int = 0) -> Cover:
    """Cover n pixels by patches of one length.

    Args:
        n: pixels of the axis. length: of a patch; an axis that is not longer is one patch of its own length.
        overlap: what neighbours share at least, less than length.
        origin: shifts the seams, in pixels; patches at the ends stay inside.

    >>> found = cover(10, 6, 2)
    >>> found.starts, [row.tolist() for row in found.weights]
    ((0, 4), [[1.0, 1.0, 1.0, 1.0, 1.0, 0.0], [0.0, 1.0, 1.0, 1.0, 1.0, 1.0]])
    """
    if n <= length:
        return Cover((0,), n, torch.ones(1, n, dtype=torch.float64))
    step = length - overlap
    first = origin % step - step
    last = n - length
    starts = sorted({min(max(first + k * step, 0), last) for k in range(2 + -(-n // step))})
    ramp = max(overlap // 2, 1)
    at = torch.arange(n, dtype=torch.float64) + 0.5
    # how far each pixel has passed from patch i to patch i + 1; passings in order, so that differences are weights
    seams = [(a + b + length) // 2 for a, b in pairwise(starts)]
    passed = [torch.ones(n, dtype=torch.float64)]
    for seam in seams:
        t = ((at - seam) / ramp + 0.5).clamp(0, 1)
        passed.append(t * t * (3 - 2 * t) if overlap > 1 else (at > seam).double())
    passed.append(torch.zeros(n, dtype=torch.float64))
    weights = [passed[i][s : s + length] - passed[i + 1][s : s + length] for i, s in enumerate(starts)]
    return Cover(tuple(starts), length, torch.stack(weights))


class TiledPrior:
    """A prior asked patch by patch.

    Its estimate is the weighted sum of the patches' estimates. Where a prior's answer at a pixel depends on no more
    than overlap // 4 pixels around it, that is the answer for the whole slice, but for rounding. Activations are those
    of one patch at a time, with gradients too: a patch is then denoised again on the way back.

    Args:
        prior: what sees the patches. A card with `positions` asks for where they lie; then `denoise` takes `whole` and
            `corner`, as `NetworkPrior.denoise` does.
        patch: side of a patch in pixels, at least 16: exact for a card with `patch`, whose value is the default; the
            largest allowed for any other.
        overlap: what neighbours share at least; less than half of a patch. None: nothing for a patch prior, as
            published, else 64, or a quarter of the patch where that is less.

    Raises:
        ValueError: a number out of range, or no patch is given or told by the card.
    """

    def __init__(self, prior: Prior, patch: int | None = None, overlap: int | None = None) -> None:
        card: ModelCard | None = getattr(prior, "card", None)
        trained = None if card is None else card.patch
        side = patch if patch is not None else trained
        if side is None:
            raise ValueError("TiledPrior: the prior's card names no patch; give the side of a patch in pixels")
        if side < 16:
            raise ValueError(f"TiledPrior: patch must be at least 16 pixels, got {side}")
        usual = min(_OVERLAP, side // 4) if trained is None else 0
        shared = usual if overlap is None else overlap
        if not 0 <= 2 * shared < side:
            raise ValueError(f"TiledPrior: overlap must be at least 0 and less than half of {side}, got {shared}")
        self.prior = prior
        self.patch, self.overlap = side, shared
        self._moves = trained is not None
        self._positions = card is not None and card.positions
        if card is not None:
            self.card = card.model_copy(update={"patch": side})

    @property
    def offset(self) -> float:
        """The prior's."""
        return self.prior.offset

    @offset.setter
    def offset(self, value: float) -> None:
        self.prior.offset = value

    @property
    def scale(self) -> float:
        """The prior's."""
        return self.prior.scale

    @scale.setter
    def scale(self, value: float) -> None:
        self.prior.scale = value

    def denoise(self, u: Tensor, sigma: float, cond: Tensor | None = None) -> Tensor:
        """E[x0 | x0 + sigma eps = u] of slices of any size.

        Args:
            u: state, [batch, channel, row, col] in user units.
            sigma: noise level in user units, positive.
            cond: for a conditional prior, [batch, channel, row, col]; cut like u.

        Returns:
            The denoised slices with the shape and dtype of u.

        Raises:
            ValueError: as the prior's.
        """
        if u.ndim != 4:
            raise ValueError(f"denoise: u must be [batch, channel, row, col], got {tuple(u.shape)}")
        h, w = u.shape[-2:]
        rows, cols = (self._cover(n, shift) for n, shift in zip((h, w), self._origin(sigma), strict=True))
        out = torch.zeros_like(u)
        for i, top in enumerate(rows.starts):
            for j, left in enumerate(cols.starts):
                window = (..., slice(top, top + rows.length), slice(left, left + cols.length))
                weight = (rows.weights[i][:, None] * cols.weights[j]).to(device=u.device, dtype=u.dtype)
                part = None if cond is None else cond[window]
                out[window] += weight * self._patch(u[window], sigma, part, (h, w), (top, left))
        return out

    def _patch(
        self, u: Tensor, sigma: float, cond: Tensor | None, whole: tuple[int, int], corner: tuple[int, int]
    ) -> Tensor:
        place: dict[str, Any] = {"whole": whole, "corner": corner} if self._positions else {}
        extra = () if cond is None else (cond.contiguous(),)

        def ask(v: Tensor) -> Tensor:
            return self.prior.denoise(v.contiguous(), sigma, *extra, **place)

        if torch.is_grad_enabled() and u.requires_grad:
            kept: Tensor = checkpoint(ask, u, use_reentrant=False, preserve_rng_state=False)
            return kept
        return ask(u)

    def _cover(self, n: int, origin: int) -> Cover:
        if self._moves or n <= self.patch:
            return cover(n, self.patch, self.overlap, origin)
        count = -(-(n - self.overlap) // (self.patch - self.overlap))
        equal = -(-(n + (count - 1) * self.overlap) // count)
        return cover(n, min(self.patch, -(-equal // _MULTIPLE) * _MULTIPLE), self.overlap)

    def _origin(self, sigma: float) -> tuple[int, int]:
        """Row and column that the grid of a level begins at, in [0, step)."""
        if not self._moves:
            return 0, 0
        key = struct.unpack("<Q", struct.pack("<d", float(sigma)))[0]
        row, col = philox_bits(key, 0, 1, 2, _STREAM)[0].tolist()
        step = self.patch - self.overlap
        return math.floor(row / 2**32 * step), math.floor(col / 2**32 * step)

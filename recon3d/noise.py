"""Where randomness comes from: keyed noise, independent from slice to slice or correlated along z.

A NoiseKey (recon3d.ops.philox) says for each slice which two anchor fields it mixes; recon3d.ops.renoise
draws them in its pass. Correlated noise is inter-slice consistent stochasticity: z_k = cos(t pi/2) f(j) +
sin(t pi/2) f(j+1), slice k a fraction t of the way from anchor j to anchor j+1, so every slice has unit
variance and neighbours are alike.
Source: ISCS, ICLR 2026, arXiv 2602.04162, where two anchors span the whole stack; spacing in mm is ours.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from recon3d.ops.philox import NoiseKey, philox_normal

__all__ = ["NoiseKey", "Slerp", "correlation", "independent", "iscs", "iscs_mm"]

# (1 - d/2) cos(pi d/2) + sin(pi d/2)/pi = 1/2 at this d, in anchor distances
_HALF = 0.7867964186048699


def independent(n_slices: int, *, seed: int = 0, level: int = 0, first_slice: int = 0) -> NoiseKey:
    """Each slice has noise of its own, keyed by its global index.

    Args:
        n_slices: slices in the stack.
        seed: 0 <= seed < 2^64.
        level: step of the trajectory; NoiseKey.at changes it.
        first_slice: global index of slice 0.
    """
    _check_slices("independent", n_slices)
    index = torch.arange(first_slice, first_slice + n_slices)
    return NoiseKey(seed, level, torch.stack([index, index], 1), torch.tensor([[1.0, 0.0]]).repeat(n_slices, 1))


def iscs(n_slices: int, *, seed: int = 0, level: int = 0) -> NoiseKey:
    """As published: one spherical interpolation between two anchors over the whole stack.

    The correlation of slices k apart is cos(pi k / (2 (n_slices - 1))), so it depends on the number of
    slices, not on millimetres. The angle between the anchors is taken as pi/2, its expectation, which gives
    exactly unit variance.
    """
    _check_slices("iscs", n_slices)
    t = torch.linspace(0, 1, n_slices, dtype=torch.float64) if n_slices > 1 else torch.zeros(n_slices).double()
    return _between(torch.zeros(n_slices, dtype=torch.int64), t, seed, level)


def iscs_mm(
    n_slices: int,
    spacing_mm: float,
    correlation_mm: float,
    *,
    seed: int = 0,
    level: int = 0,
    first_slice: int = 0,
) -> NoiseKey:
    """Anchors at a fixed distance in mm along z, spherical interpolation between neighbours.

    Args:
        n_slices: slices in the stack.
        spacing_mm: distance of slice centres, > 0.
        correlation_mm: distance at which the correlation of two slices, averaged over where they lie between
            anchors, is one half; >= 0, and 0 gives independent slices. Noise further apart than 2.55 times
            this is independent.
        seed: 0 <= seed < 2^64.
        level: step of the trajectory; NoiseKey.at changes it.
        first_slice: global index of slice 0, so that a slab of a volume gets the volume's noise.

    Raises:
        ValueError: a number out of range.

    >>> key = iscs_mm(100, spacing_mm=0.8, correlation_mm=5.0)
    >>> bool(((key.coefficients.double() ** 2).sum(1) - 1).abs().max() < 1e-6)
    True
    """
    _check_slices("iscs_mm", n_slices)
    if not (math.isfinite(spacing_mm) and spacing_mm > 0):
        raise ValueError(f"iscs_mm: spacing_mm must be finite and positive, got {spacing_mm}")
    if not (math.isfinite(correlation_mm) and correlation_mm >= 0):
        raise ValueError(f"iscs_mm: correlation_mm must be finite and not negative, got {correlation_mm}")
    # from here on two slices never share an anchor, however they fall
    if correlation_mm <= spacing_mm * _HALF / 2:
        return independent(n_slices, seed=seed, level=level, first_slice=first_slice)
    position = torch.arange(first_slice, first_slice + n_slices, dtype=torch.float64)
    position *= spacing_mm * _HALF / correlation_mm
    anchor = position.floor()
    return _between(anchor.to(torch.int64), position - anchor, seed, level)


@dataclass(frozen=True, eq=False)
class Slerp(NoiseKey):
    """`iscs` with the angle between the two anchor fields as drawn instead of its expectation pi/2.

    The published code does so; it differs by about one part in the square root of the number of pixels, and each level
    costs two slices of noise more. Coefficients are made when `at` names the level.

    Attributes:
        shape: of one slice.
    """

    shape: tuple[int, ...] = ()

    def at(self, level: int, stream: int | None = None) -> NoiseKey:
        stream = self.stream if stream is None else stream
        a, b = philox_normal(self.seed, level, 2, self.shape, stream=stream, dtype=torch.float64)
        angle = float(torch.arccos((a * b).sum() / (a.norm() * b.norm())))
        t = torch.linspace(0, 1, max(2, self.n_slices), dtype=torch.float64)[: self.n_slices]
        c = torch.stack([((1 - t) * angle).sin(), (t * angle).sin()], 1) / math.sin(angle)
        return NoiseKey(self.seed, level, self.anchors, c.float(), stream)


def correlation(key: NoiseKey) -> Tensor:
    """Correlation of the noise of every two slices, float64 [slices, slices], from the key alone."""
    a, c = key.anchors, key.coefficients.double()
    same = (a[:, None, :, None] == a[None, :, None, :]).double()
    return torch.einsum("ip,jq,ijpq->ij", c, c, same)


def _between(anchor: Tensor, t: Tensor, seed: int, level: int) -> NoiseKey:
    angle = t * (math.pi / 2)
    coefficients = torch.stack([angle.cos(), angle.sin()], 1).float()
    coefficients[t == 1, 0] = 0.0  # cos(pi/2) is 6e-17 in floating point
    return NoiseKey(seed, level, torch.stack([anchor, anchor + 1], 1), coefficients)


def _check_slices(what: str, n_slices: int) -> None:
    if n_slices < 0:
        raise ValueError(f"{what}: the number of slices must not be negative, got {n_slices}")

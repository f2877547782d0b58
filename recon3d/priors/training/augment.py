"""What training crops are varied by: spots of activity, phases of MR images, shading by coils."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from recon3d.priors.training.config import LesionConfig, PhaseConfig

__all__ = ["between", "random_phase", "shading", "turned", "with_lesions"]


def with_lesions(rng: np.random.Generator, x: Tensor, lesions: LesionConfig, step_px: float = 1.0) -> Tensor:
    """Activity with hot and cold spots where there is activity; activity that is zero comes back as it is.

    Args:
        rng: of all choices.
        x: [row, col], or [slice, row, col] of neighbouring slices, whose spots are ellipsoids.
        lesions: number, size and strength.
        step_px: distance of slices in pixels.
    """
    h, w = x.shape[-2:]
    slices = x.reshape(-1, h, w)
    inside = (slices > 0.1 * slices.mean()).nonzero()[:, 1:]
    if float(x.max()) <= 0 or len(inside) == 0:
        return x
    depth = torch.arange(len(slices), dtype=torch.float32)[:, None, None] * step_px
    rows, cols = torch.arange(h, dtype=torch.float32)[:, None], torch.arange(w, dtype=torch.float32)[None]
    for _ in range(int(rng.integers(1, lesions.most + 1))):
        cy, cx = (float(v) + rng.uniform(-0.5, 0.5) for v in inside[int(rng.integers(len(inside)))])
        a = between(rng, lesions.radius_px)
        b = min(max(a * math.exp(rng.uniform(-0.4, 0.4)), lesions.radius_px[0]), lesions.radius_px[1])
        turn, edge = rng.uniform(0, math.pi), rng.uniform(*lesions.edge_px)
        mean = math.sqrt(a * b)
        # the spot may have its middle beyond the slices, of which a single one shows it whole
        cz = rng.uniform(-0.8 * mean, float(depth[-1]) + 0.8 * mean) if len(slices) > 1 else 0.0
        c, s = math.cos(turn), math.sin(turn)
        u, v = (c * (cols - cx) + s * (rows - cy)) / a, (c * (rows - cy) - s * (cols - cx)) / b
        cover = torch.sigmoid((1 - (u * u + v * v + ((depth - cz) / mean) ** 2).sqrt()) * (mean / edge))
        level = float((slices * cover).sum() / cover.sum().clamp(min=1e-6))
        cold = rng.random() < lesions.cold_share
        ratio = rng.uniform(*lesions.cold) if cold else between(rng, lesions.hot)
        slices = slices + cover * (ratio * level - slices) if cold else slices + cover * ((ratio - 1) * level)
    return slices.reshape(x.shape)


def random_phase(rng: np.random.Generator, magnitude: Tensor, phase: PhaseConfig, step_px: float = 1.0) -> Tensor:
    """A smooth phase in radians for magnitudes, as `PhaseConfig` describes it.

    Args:
        rng: of all choices.
        magnitude: [row, col], or [slice, row, col] of neighbouring slices, between which the phase changes as slowly.
        phase: its parts.
        step_px: distance of slices in pixels.

    Returns:
        Phases shaped as the magnitudes.
    """
    flat, step = rng.random() < phase.flat, rng.random() < phase.step
    h, w = magnitude.shape[-2:]
    cycles = torch.full(magnitude.shape, float(rng.random()))
    if flat:
        return 2 * math.pi * cycles
    row, col = ((torch.arange(n, dtype=torch.float32) - n / 2) / 256 for n in (h, w))
    y, x = row[:, None], col[None]
    cycles = cycles + phase.slope * (float(rng.normal()) * y + float(rng.normal()) * x)
    cycles = cycles + phase.bowl * (rng.normal() * y**2 + rng.normal() * y * x + rng.normal() * x**2)
    cycles = cycles + phase.waves * _waves(rng, y, x, 3)
    if step:  # fat precesses at another frequency than water
        level, turn = rng.uniform(0.3, 0.8) * float(magnitude.max()), rng.uniform(-0.5, 0.5)
        cycles = cycles + turn * torch.sigmoid((magnitude - level) / 0.05)
    if magnitude.ndim == 3 and len(magnitude) > 1:
        z = torch.arange(len(magnitude), dtype=torch.float32)[:, None, None] * (step_px / 256)
        cycles = cycles + phase.slope * float(rng.normal()) * z
    return 2 * math.pi * cycles


def turned(magnitude: Tensor, phase: Tensor) -> Tensor:
    return torch.cat([magnitude * phase.cos(), magnitude * phase.sin()])


def _waves(rng: np.random.Generator, y: Tensor, x: Tensor, n: int) -> Tensor:
    """The sum of n cosines of random amplitude, direction, shift and length, y and x in units of 256 pixels."""
    total = torch.zeros(())
    for _ in range(n):
        angle, k = rng.uniform(0, 2 * math.pi), 256 / math.exp(rng.uniform(math.log(90), math.log(400)))
        at = k * (math.cos(angle) * y + math.sin(angle) * x) + rng.random()
        total = total + float(rng.normal()) * torch.cos(2 * math.pi * at)
    return total


def shading(rng: np.random.Generator, size: int, ratio: float) -> Tensor:
    """A smooth positive field [size, size], highest over lowest value at most `ratio`, about 1 in the middle."""
    t = (torch.arange(size, dtype=torch.float32) - size / 2) / 256
    f = _waves(rng, t[:, None], t[None], 2) + float(rng.normal()) * t[:, None] + float(rng.normal()) * t[None]
    f = f - 0.5 * (f.amax() + f.amin())
    return torch.exp(f * (0.5 * math.log(ratio) * rng.random() / float(f.abs().amax().clamp(min=1e-6))))


def between(rng: np.random.Generator, ends: tuple[float, float]) -> float:
    """Log-uniform; nothing is drawn where there is no choice."""
    low, high = ends
    return low if low == high else math.exp(rng.uniform(math.log(low), math.log(high)))

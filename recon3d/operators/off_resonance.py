"""Off-resonance in long readouts: the phase that a field map adds while a trajectory is being sampled.

    y(t) = sum over pixels of x exp(-2 pi i f t) exp(-i k(t) n) ~ sum over segments l of b_l(t) A (c_l x),
    c_l = exp(-2 pi i f t_l)

b_l are the least-squares interpolators between the times t_l for the frequencies that occur in the map (Sutton, Noll,
Fessler, IEEE TMI 22 (2003) 178): one transform per segment, all of the same trajectory.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from recon3d.operators.base import LinearOperator

__all__ = ["OffResonance"]

# frequencies that stand for the map, and segments at most
_BINS, _MOST = 256, 64


class OffResonance(LinearOperator):
    """A scanner whose readout takes time in a field that is not even.

    Args:
        scanner: NonCartesianMRI, or any operator whose last measurement axis is the readout's time.
        field_hz: deviation of the resonance frequency, [z, y, x] real; the sign is that of exp(-2 pi i f t).
        times_s: time of every sample of the last axis, from where the image's phase is taken; [sample].
        error: largest error of the interpolated phase factor over the map and the times, relative to 1.
        segments: number of them; None takes as few as reach `error`.

    Attributes:
        segments: number of transforms that replace one.

    Raises:
        ValueError: shapes that do not fit, NaN, or more than 64 segments would be needed.
    """

    def __init__(
        self,
        scanner: LinearOperator,
        field_hz: Tensor,
        times_s: Tensor,
        *,
        error: float = 1e-3,
        segments: int | None = None,
    ) -> None:
        if tuple(field_hz.shape) != tuple(scanner.domain.shape):
            raise ValueError(
                f"OffResonance: the field map is {tuple(field_hz.shape)}, the volume {tuple(scanner.domain.shape)}"
            )
        if tuple(times_s.shape) != (scanner.range.shape[-1],):
            raise ValueError(
                f"OffResonance: {scanner.range.shape[-1]} sample times are needed, got {tuple(times_s.shape)}"
            )
        if not (bool(field_hz.isfinite().all()) and bool(times_s.isfinite().all())):
            raise ValueError("OffResonance: the field map or the times hold NaN or infinity")
        if segments is not None and not 1 <= segments <= _MOST:
            raise ValueError(f"OffResonance: 1 to {_MOST} segments are possible, got {segments}")
        if not error > 0:
            raise ValueError(f"OffResonance: error must be positive, got {error}")
        self.scanner = scanner
        self.domain, self.range, self.coupling = scanner.domain, scanner.range, scanner.coupling
        device = scanner._device()
        field, times = field_hz.double().cpu(), times_s.double().cpu()
        bins = torch.linspace(float(field.min()), float(field.max()), _BINS, dtype=torch.float64)
        for count in range(1, _MOST + 1) if segments is None else (segments,):
            at, b, reached = _interpolators(bins, times, count)
            if reached <= error or segments is not None:
                break
        else:
            raise ValueError(
                f"OffResonance: {_MOST} segments reach an error of {reached:.1g}, {error:g} is asked for; "
                "take a larger error or split the readout"
            )
        self.segments = count
        self.b = b.to(device, torch.complex64)  # [segment, sample]
        angle = -2 * math.pi * at[:, None, None, None] * field
        self.c = torch.polar(torch.ones_like(angle), angle).to(device, torch.complex64)

    def forward(self, x: Tensor) -> Tensor:
        """Sum of the segments' measurements."""
        return _sum(self.scanner.forward(x * c) * b for b, c in zip(self.b, self.c, strict=True))

    def adjoint(self, y: Tensor) -> Tensor:
        """Conjugate transpose of forward."""
        return _sum(self.scanner.adjoint(y * b.conj()) * c.conj() for b, c in zip(self.b, self.c, strict=True))

    def pinv(self, y: Tensor) -> Tensor:
        """The scanner's own, segment by segment with its phase taken back (conjugate phase)."""
        return _sum(self.scanner.pinv(y * b.conj()) * c.conj() for b, c in zip(self.b, self.c, strict=True))

    def _device(self) -> torch.device:
        return self.scanner._device()


def _sum(parts: Iterator[Tensor]) -> Tensor:
    total = next(parts)
    for part in parts:
        total = total + part
    return total


def _interpolators(bins: Tensor, times: Tensor, count: int) -> tuple[Tensor, Tensor, float]:
    """(times of the segments, [segment, sample] interpolators, largest error over bins and times)."""
    first, last = float(times.min()), float(times.max())
    at = torch.linspace(first, last, count, dtype=torch.float64) if count > 1 else torch.tensor([(first + last) / 2])
    angle = -2 * math.pi * bins[:, None]
    basis = torch.polar(torch.ones(len(bins), count, dtype=torch.float64), angle * at)
    gram = basis.mH @ basis + 1e-10 * len(bins) * torch.eye(count, dtype=basis.dtype)
    own, place = times.unique(return_inverse=True)  # spokes share their times
    parts, worst = [], 0.0
    for some in own.split(4096):
        wanted = torch.polar(torch.ones(len(bins), len(some), dtype=torch.float64), angle * some)
        b = torch.linalg.solve(gram, basis.mH @ wanted)
        parts.append(b)
        worst = max(worst, float((basis @ b - wanted).abs().max()))
    return at, torch.cat(parts, 1)[:, place], worst

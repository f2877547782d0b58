"""Receive coils: their noise made white, their number reduced, their sensitivities read off the k-space centre.

The coil axis of k-space is the second ([slice, coil, ...]), or the first of two ([coil, sample]).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from recon3d.geometry import Trajectory

__all__ = ["Compressed", "Whitened", "apply_coils", "compress_coils", "noise_covariance", "outer_noise", "prewhiten"]

# samples per coil below which a covariance is mostly chance
_SAMPLES_PER_COIL = 10


def noise_covariance(noise: Tensor) -> Tensor:
    """Covariance E[n n^H] of the coils' noise.

    Args:
        noise: [coil, sample] or [slice, coil, ...] complex, measured without excitation.

    Returns:
        [coil, coil] complex128, Hermitian.

    Raises:
        ValueError: fewer than ten samples per coil, or NaN among them.
        TypeError: real noise.
    """
    if not noise.is_complex():
        raise TypeError(f"noise_covariance: noise must be complex, got {noise.dtype}")
    rows = _coil_first(noise).to(torch.complex128)
    coils, samples = rows.shape
    if samples < _SAMPLES_PER_COIL * coils:
        raise ValueError(
            f"noise_covariance: {samples} samples for {coils} coils are too few; at least "
            f"{_SAMPLES_PER_COIL * coils} are needed"
        )
    if not bool(torch.view_as_real(rows).isfinite().all()):
        raise ValueError("noise_covariance: the noise holds NaN or infinity; leave such samples out")
    rows = rows - rows.mean(1, keepdim=True)
    return rows @ rows.mH / (samples - 1)


def outer_noise(kspace: Tensor, sampling: Tensor | Trajectory | None = None, share: float = 0.1) -> Tensor:
    """Samples far from the centre of k-space, where noise is all there is in most scans.

    Points that were not sampled, zero in every coil, are skipped.

    Args:
        kspace: [slice, coil, ky, kx] complex; or [slice, coil, sample] or [coil, sample] with a trajectory.
        sampling: mask, 1 where sampled, broadcast to [slice, ky, kx]; or the trajectory; None finds the mask itself.
        share: part of the sampled points to take, those furthest from the centre.

    Returns:
        [coil, sample], ready for noise_covariance.

    Raises:
        ValueError: wrong shape or share, or nothing is sampled.
    """
    if not 0 < share <= 1:
        raise ValueError(f"outer_noise: share must lie between 0 and 1, got {share}")
    if isinstance(sampling, Trajectory):
        if kspace.ndim not in (2, 3) or kspace.shape[-1] != sampling.n_samples:
            raise ValueError(
                f"outer_noise: expected [slice, coil, sample] with {sampling.n_samples} samples, "
                f"got {tuple(kspace.shape)}"
            )
        rows = kspace if kspace.ndim == 3 else kspace[None]
        radius = sampling.points.square().sum(1).to(kspace.device)
    elif kspace.ndim == 4:
        rows = kspace.flatten(2)
        ky, kx = (torch.arange(n, device=kspace.device, dtype=torch.float64) for n in kspace.shape[-2:])
        radius = ((ky / len(ky) - len(ky) // 2 / len(ky)) ** 2)[:, None] + (kx / len(kx) - len(kx) // 2 / len(kx)) ** 2
    else:
        raise ValueError(
            f"outer_noise: expected [slice, coil, ky, kx], or a trajectory with samples, got {tuple(kspace.shape)}"
        )
    sampled = (rows != 0).any(1)
    if isinstance(sampling, Tensor):
        sampled &= (sampling.to(kspace.device) != 0).broadcast_to(kspace.shape[0], *kspace.shape[-2:]).flatten(1)
    distance = radius.flatten().expand(sampled.shape)[sampled]
    if distance.numel() == 0:
        raise ValueError("outer_noise: no sampled point; every value of the k-space is zero")
    limit = distance.kthvalue(max(1, math.ceil((1 - share) * distance.numel()))).values
    return rows.movedim(1, 0)[:, sampled & (radius.flatten() >= limit)]


@dataclass(frozen=True)
class Whitened:
    """K-space whose noise is independent from coil to coil and equally strong.

    Attributes:
        kspace: whitened, in about the unit it came in.
        matrix: [coil, coil] complex128, what each sample was multiplied with; coil maps that come from elsewhere take
            the same (`apply_coils`).
        sigma: standard deviation of the real, and of the imaginary, part of a sample's noise.
    """

    kspace: Tensor
    matrix: Tensor
    sigma: float


def prewhiten(kspace: Tensor, covariance: Tensor) -> Whitened:
    """Multiply with the inverse Cholesky factor of the noise covariance.

    The level is kept: sigma² is half the mean of the coils' variances.

    Args:
        kspace: [slice, coil, ...] or [coil, sample] complex.
        covariance: E[n n^H], [coil, coil].

    Raises:
        ValueError: shapes disagree, or the covariance is not positive definite (a dead coil).
    """
    coils = kspace.shape[_coil_axis(kspace)]
    if tuple(covariance.shape) != (coils, coils):
        raise ValueError(
            f"prewhiten: k-space has {coils} coils, the covariance is {tuple(covariance.shape)}; give [coil, coil]"
        )
    wide = covariance.to(torch.complex128)
    factor, info = torch.linalg.cholesky_ex((wide + wide.mH) / 2)
    if int(info) or not bool(torch.view_as_real(factor).isfinite().all()):
        raise ValueError("prewhiten: the noise covariance is not positive definite; leave out coils without noise")
    level = float(wide.diagonal().real.mean())  # E|n|^2, twice the variance of a part
    eye = torch.eye(coils, dtype=wide.dtype, device=wide.device)
    matrix = math.sqrt(level) * torch.linalg.solve_triangular(factor, eye, upper=False)
    return Whitened(apply_coils(matrix, kspace), matrix, math.sqrt(level / 2))


@dataclass(frozen=True)
class Compressed:
    """K-space of fewer, virtual coils.

    Attributes:
        kspace: compressed.
        matrix: [virtual coil, coil] complex128 with orthonormal rows, which keep white noise white; coil maps take the
            same (`apply_coils`).
        energy: share of the signal's energy that is kept.
    """

    kspace: Tensor
    matrix: Tensor
    energy: float


def compress_coils(kspace: Tensor, n: int) -> Compressed:
    """The n leading principal components over the coils (Buehrer et al., MRM 57 (2007) 1131).

    Prewhiten first.

    Args:
        kspace: [slice, coil, ...] or [coil, sample] complex.
        n: virtual coils.

    Raises:
        ValueError: n is not between 1 and the number of coils.
    """
    axis = _coil_axis(kspace)
    coils = kspace.shape[axis]
    if not 1 <= n <= coils:
        raise ValueError(f"compress_coils: 1 to {coils} virtual coils are possible, got {n}")
    gram = _gram(kspace)
    values, vectors = torch.linalg.eigh(gram)
    total = float(values.clamp(min=0).sum())
    kept = float(values[-n:].clamp(min=0).sum())
    matrix = _fixed_phase(vectors[:, -n:].flip(1)).mH
    return Compressed(apply_coils(matrix, kspace), matrix, kept / total if total else 1.0)


def apply_coils(matrix: Tensor, x: Tensor) -> Tensor:
    """Multiply the coil axis of k-space or maps with a matrix.

    Args:
        matrix: [new coil, coil].
        x: [slice, coil, ...] or [coil, sample] complex.

    Returns:
        x with its coil axis replaced, contiguous, of x's dtype.
    """
    axis = _coil_axis(x)
    rows = x if axis == 0 else x.flatten(2)
    out = matrix.to(x.device, x.dtype) @ rows
    return out.reshape(*x.shape[:axis], matrix.shape[0], *x.shape[axis + 1 :])


def _coil_axis(x: Tensor) -> int:
    if x.ndim < 2:
        raise ValueError(f"coils: expected [slice, coil, ...] or [coil, sample], got {tuple(x.shape)}")
    return 0 if x.ndim == 2 else 1


def _coil_first(x: Tensor) -> Tensor:
    return x.movedim(_coil_axis(x), 0).flatten(1)


def _gram(kspace: Tensor) -> Tensor:
    """Sum over samples of y y^H, float64, slice by slice."""
    parts = [kspace] if kspace.ndim == 2 else [slice_.flatten(1) for slice_ in kspace]
    coils = parts[0].shape[0]
    total = torch.zeros(coils, coils, dtype=torch.complex128, device=kspace.device)
    for rows in parts:
        rows = rows.to(torch.complex128)
        total += rows @ rows.mH
    return total


def _fixed_phase(vectors: Tensor) -> Tensor:
    """Columns turned so that their largest entry is real and positive: eigenvectors leave the phase open."""
    largest = vectors.gather(-2, vectors.abs().argmax(-2, keepdim=True))
    return vectors * (largest.conj() / largest.abs())

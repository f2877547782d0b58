"""Compressed sensing MRI: total variation or wavelets on complex multi-coil data, by ADMM.

    min over x of  1/2 ||A x - y||^2_W / ||A^H W A|| + strength value_scale R(x)

    R = TV       sum over voxels of |D x|_2, one norm over directions and over real and imaginary part
    R = wavelet  sum over wavelet details of |.|, orthonormal Daubechies wavelets, shifted anew in each iteration

(Lustig, Donoho, Pauly, MRM 58 (2007) 1182; Boyd et al., Foundations and Trends in Machine Learning 3 (2011) 1.) The
x step is a few conjugate-gradient iterations from where the last one ended, so dense trajectories need no density
weights to converge.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from recon3d import ops
from recon3d.baselines.progress import Callback, settled
from recon3d.baselines.tv import Tuned, tune
from recon3d.operators.base import LinearOperator
from recon3d.ops.cg import solve

__all__ = ["CS_STRENGTHS", "cs", "cs_objective", "tune_cs"]

Regulariser = Literal["tv", "wavelet"]

# 1e-5 to 1e-1 in steps of 10^(1/4)
CS_STRENGTHS: tuple[float, ...] = tuple([10 ** (-5 + k / 4) for k in range(17)])
# penalty in units of ||A^H W A||: with three inner iterations the PSNR of a brain (13 coils, 4 times undersampled)
# settles within 20 iterations for every strength; 0.05 and 0.1 need 25 to 40
_PENALTY = 0.02
# Daubechies' filter with four vanishing moments (Ten Lectures on Wavelets, table 6.1)
_DB4 = (
    0.2303778133088965, 0.7148465705529156, 0.6308807679298589, -0.0279837694168599,
    -0.1870348117190931, 0.0308413818355607, 0.0328830116668852, -0.0105974017850690,
)  # fmt: skip


def cs(
    y: Tensor,
    operator: LinearOperator,
    strength: float = 1e-3,
    iterations: int = 30,
    regulariser: Regulariser = "tv",
    weights: Tensor | None = None,
    value_scale: float | None = None,
    along_z: bool = False,
    spacing_mm: tuple[float, float, float] | None = None,
    cg_iterations: int = 3,
    levels: int = 4,
    tolerance: float | None = 1e-4,
    x0: Tensor | None = None,
    seed: int = 0,
    callback: Callback | None = None,
) -> Tensor:
    """Reconstruct by compressed sensing.

    Args:
        y: k-space in the operator's range.
        operator: the scanner, on volumes [z, y, x].
        strength: dimensionless weight of R, above 0; 1e-4 (many clean samples) to 1e-2 (few or noisy ones).
        iterations: ADMM iterations at most, `cg_iterations` A^H A each.
        regulariser: "tv" or "wavelet".
        weights: inverse variances or sampling density, broadcast over y; None weighs all samples alike.
        value_scale: a typical bright value; None takes the 99.9th percentile of |pinv(y)|.
        along_z: TV over z too, per millimetre as in the plane; wavelets are always in the plane.
        spacing_mm: voxel size (z, y, x) for TV; None takes cubes.
        cg_iterations: conjugate-gradient iterations in each x step.
        levels: of the wavelet decomposition.
        tolerance: stop when an iteration changes the volume by at most this part; None never.
        x0: start; None takes pinv(y) where the operator has one.
        seed: of the wavelets' shifts.
        callback: called after every iteration with (iteration, volume); returning True stops.

    Returns:
        The volume, complex64.

    Raises:
        ValueError: a number out of range, an unknown regulariser, or y that does not fit the operator.
    """
    _check(strength, iterations, regulariser, value_scale, cg_iterations, levels, tolerance)
    x = _start(y, operator) if x0 is None else x0.clone()
    scale = _bright(x) if value_scale is None else value_scale
    norm = operator.norm(weights)
    if norm == 0 or scale == 0:
        return x
    # objective times the norm, as A^H W A comes unscaled
    rho = norm * _PENALTY
    limit = strength * scale / _PENALTY
    factors = _factors(spacing_mm, along_z)
    tv = regulariser == "tv"
    shifts = torch.Generator().manual_seed(seed)
    rhs = operator.adjoint(y if weights is None else y * weights)
    per_slice = operator.coupling == "slice" and not (tv and along_z)

    def apply(p: Tensor) -> Tensor:
        pulled = _gradient_adjoint(_gradient(p, factors), factors) if tv else p
        return operator.normal(p, weights).add_(pulled, alpha=rho)

    z = _gradient(x, factors) if tv else x.clone()
    u = torch.zeros_like(z)
    for k in range(1, iterations + 1):
        wanted = z - u
        b = rhs + rho * (_gradient_adjoint(wanted, factors) if tv else wanted)
        new = solve(apply, b, x, cg_iterations, per_slice)
        change, x = new - x, new
        u += _gradient(x, factors) if tv else x
        if tv:
            z = _shrink(u, limit)
        else:
            # drawn anew each time, so that no grid of blocks stays (cycle spinning)
            move = torch.randint(0, 2**levels, (2,), generator=shifts).tolist()
            z = _shrink_wavelets(u.roll(move, (-2, -1)), limit, levels).roll([-m for m in move], (-2, -1))
        u -= z
        if callback is not None and callback(k, x):
            break
        if tolerance is not None and settled(torch.view_as_real(change), torch.view_as_real(x), tolerance):
            break
    return x


def cs_objective(
    x: Tensor,
    y: Tensor,
    operator: LinearOperator,
    strength: float,
    value_scale: float,
    weights: Tensor | None = None,
    along_z: bool = False,
    spacing_mm: tuple[float, float, float] | None = None,
) -> float:
    """What cs with TV minimises.

    Args:
        x: volume [z, y, x] complex.
        y: as in cs.
        operator: as in cs.
        strength: as in cs.
        value_scale: as in cs.
        weights: as in cs.
        along_z: as in cs.
        spacing_mm: as in cs.

    Returns:
        1/2 ||A x - y||^2_W / ||A^H W A|| + strength value_scale TV(x).
    """
    misfit = operator(x) - y
    weighted = misfit if weights is None else misfit * weights
    data = ops.dot(torch.view_as_real(misfit), torch.view_as_real(weighted.to(misfit.dtype)).contiguous())
    size = torch.view_as_real(_gradient(x, _factors(spacing_mm, along_z))).double().square().sum((0, -1)).sqrt()
    return float(data / (2 * operator.norm(weights)) + strength * value_scale * size.sum())


def tune_cs(
    y: Tensor,
    operator: LinearOperator,
    reference: Tensor,
    strengths: Sequence[float] = CS_STRENGTHS,
    score: Callable[[Tensor], float] | None = None,
    start: float = 1e-3,
    **options: object,
) -> Tuned:
    """Pick the strength of cs with the truth in hand, which favours compressed sensing.

    Args:
        y: as in cs.
        operator: as in cs.
        reference: the true volume; magnitudes are compared.
        strengths: ascending grid.
        score: volume -> figure to maximise; None takes the PSNR of the magnitude with the reference's range.
        start: where to begin.
        options: of cs.

    Returns:
        As tune.
    """
    truth = reference.abs().float()
    span = float(truth.max() - truth.min())

    def psnr(x: Tensor) -> float:
        error = (x.abs() - truth).contiguous()
        return 10 * math.log10(span**2 * error.numel() / max(float(ops.dot(error, error)), 1e-300))

    def run(strength: float) -> Tensor:
        return cs(y, operator, strength, **options)  # type: ignore[arg-type]

    return tune(run, truth, strengths, score or psnr, start)


def _start(y: Tensor, operator: LinearOperator) -> Tensor:
    try:
        return operator.pinv(y)
    except NotImplementedError:
        return operator.adjoint(torch.zeros_like(y))


def _bright(x: Tensor) -> float:
    size = x.abs().flatten()
    return float(size.kthvalue(max(1, math.ceil(0.999 * size.numel()))).values)


def _factors(spacing_mm: tuple[float, float, float] | None, along_z: bool) -> tuple[float, ...]:
    dz, dy, dx = spacing_mm or (1.0, 1.0, 1.0)
    return (dx / dz, dx / dy, 1.0) if along_z else (0.0, dx / dy, 1.0)


def _axes(factors: tuple[float, ...]) -> list[tuple[int, float]]:
    return [(axis, f) for axis, f in enumerate(factors) if f]


def _gradient(x: Tensor, factors: tuple[float, ...]) -> Tensor:
    """Forward differences times the factors, zero at the far border: [axis, z, y, x]."""
    axes = _axes(factors)
    out = x.new_zeros(len(axes), *x.shape)
    for part, (axis, f) in zip(out, axes, strict=True):
        n = x.shape[axis]
        torch.sub(x.narrow(axis, 1, n - 1), x.narrow(axis, 0, n - 1), out=part.narrow(axis, 0, n - 1)).mul_(f)
    return out


def _gradient_adjoint(p: Tensor, factors: tuple[float, ...]) -> Tensor:
    out = torch.zeros_like(p[0])
    for part, (axis, f) in zip(p, _axes(factors), strict=True):
        n = out.shape[axis]
        inner = part.narrow(axis, 0, n - 1)
        out.narrow(axis, 1, n - 1).add_(inner, alpha=f)
        out.narrow(axis, 0, n - 1).sub_(inner, alpha=f)
    return out


def _shrink(p: Tensor, limit: float) -> Tensor:
    """Vectors along the first axis shortened by `limit`."""
    size = torch.view_as_real(p).square().sum((0, -1)).sqrt()
    return p * (1 - limit / size.clamp(min=limit))


def _shrink_wavelets(x: Tensor, limit: float, levels: int) -> Tensor:
    ny, nx = x.shape[-2:]
    step = 2**levels
    padded = torch.nn.functional.pad(x, (0, -nx % step, 0, -ny % step))
    y, x_ = padded.shape[-2:]
    coefficients = padded
    sizes = [(y >> k, x_ >> k) for k in range(levels)]
    for h, w in sizes:
        low = coefficients[..., :h, :w].clone()
        coefficients[..., :h, :w] = _analyse(_analyse(low, -1), -2)
    h, w = y >> levels, x_ >> levels
    smooth = coefficients[..., :h, :w].clone()
    coefficients *= 1 - limit / coefficients.abs().clamp(min=limit)
    coefficients[..., :h, :w] = smooth
    for h, w in reversed(sizes):
        low = coefficients[..., :h, :w].clone()
        coefficients[..., :h, :w] = _synthesise(_synthesise(low, -2), -1)
    return coefficients[..., :ny, :nx]


def _filters() -> list[tuple[int, float, float]]:
    """(tap, low pass, high pass): the high pass is the low pass backwards with alternating signs."""
    n = len(_DB4)
    return [(k, _DB4[k], (-1) ** k * _DB4[n - 1 - k]) for k in range(n)]


def _analyse(x: Tensor, axis: int) -> Tensor:
    """One level of the periodic transform along an axis: the low half, then the high half."""
    x = x.movedim(axis, -1)
    even, odd = x[..., ::2], x[..., 1::2]
    low, high = torch.zeros_like(even), torch.zeros_like(even)
    for k, a, b in _filters():
        part = (odd if k % 2 else even).roll(-(k // 2), -1)
        low.add_(part, alpha=a)
        high.add_(part, alpha=b)
    return torch.cat([low, high], -1).movedim(-1, axis)


def _synthesise(c: Tensor, axis: int) -> Tensor:
    """Transpose, and inverse, of _analyse."""
    c = c.movedim(axis, -1)
    low, high = c.chunk(2, -1)
    out = torch.zeros_like(c)
    for k, a, b in _filters():
        out[..., k % 2 :: 2].add_((a * low + b * high).roll(k // 2, -1))
    return out.movedim(-1, axis)


def _check(
    strength: float,
    iterations: int,
    regulariser: str,
    value_scale: float | None,
    cg_iterations: int,
    levels: int,
    tolerance: float | None,
) -> None:
    if not (math.isfinite(strength) and strength > 0):
        raise ValueError(f"cs: strength must be positive, got {strength}; without a regulariser use cg_sense")
    for name, value in (("iterations", iterations), ("cg_iterations", cg_iterations), ("levels", levels)):
        if value < 1:
            raise ValueError(f"cs: {name} must be at least 1, got {value}")
    if regulariser not in ("tv", "wavelet"):
        raise ValueError(f"cs: regulariser must be 'tv' or 'wavelet', got {regulariser!r}")
    for name, number in (("value_scale", value_scale), ("tolerance", tolerance)):
        if number is not None and not (math.isfinite(number) and number > 0):
            raise ValueError(f"cs: {name} must be positive, got {number}")

"""Types 1 and 2 of the NUFFT as finufft calls them, on recon3d's operators.

    type 1   f[n] = sum_j c_j exp(isign i (n_1 x_j + n_2 y_j + ...))       non-uniform to uniform
    type 2   c_j  = sum_n f[n] exp(isign i (n_1 x_j + n_2 y_j + ...))      uniform to non-uniform

Coordinates are radians, of any period, one array per axis; x belongs to the first axis of f, y to the second. n runs
from -N/2 to N/2 - 1 (modeord 0) or in FFT order (modeord 1). No scaling. A leading axis of c or f is a stack of
transforms, which share the points. Differences from finufft: `eps` is the relative L2 error on white data and below
1e-6 needs complex128; coordinates are always taken as float64; type 3 and other options are not offered. Plans are kept
and found again by the content of the coordinates. Differentiable for torch tensors, in the coordinates too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from recon3d.interop.arrays import as_given, to_torch
from recon3d.ops.nufft import NufftPlan, nufft, nufft_adjoint, nufft_plan

__all__ = ["nufft1d1", "nufft1d2", "nufft2d1", "nufft2d2", "nufft3d1", "nufft3d2"]

# what the planner takes; a larger error asked for is served with this one
_MOST_EPS = 1e-2


def nufft1d1(
    x: Any, c: Any, n_modes: Any, out: Any = None, eps: float = 1e-6, isign: int = 1, *, modeord: int = 0
) -> Any:
    """Type 1 in one dimension.

    Args:
        x: coordinates in radians, [M].
        c: strengths, [M] or [stack, M] complex64 or complex128.
        n_modes: number of modes N, or a tuple of one.
        out: where to put the result as well.
        eps: relative L2 error, 1e-12 to 1e-2.
        isign: sign of the exponent.
        modeord: 0 = modes from -N/2, 1 = FFT order.

    Returns:
        Modes, [N] or [stack, N], an array like c.

    Raises:
        ValueError: sizes that differ, an eps out of reach, no modes, NaN or infinity.
        TypeError: c is not complex.

    >>> nufft1d1([0.0], [2.0 + 0j], 4).real.round(4).tolist()
    [2.0, 2.0, 2.0, 2.0]
    """
    return _type1("nufft1d1", (x,), c, n_modes, out, eps, isign, modeord)


def nufft1d2(x: Any, f: Any, out: Any = None, eps: float = 1e-6, isign: int = -1, *, modeord: int = 0) -> Any:
    """Type 2 in one dimension: modes f, [N] or [stack, N], to strengths at x, [M] or [stack, M]; see nufft1d1."""
    return _type2("nufft1d2", (x,), f, out, eps, isign, modeord)


def nufft2d1(
    x: Any, y: Any, c: Any, n_modes: Any, out: Any = None, eps: float = 1e-6, isign: int = 1, *, modeord: int = 0
) -> Any:
    """Type 1 in two dimensions: strengths c, [M] or [stack, M], to modes [N1, N2] or [stack, N1, N2]; see nufft1d1."""
    return _type1("nufft2d1", (x, y), c, n_modes, out, eps, isign, modeord)


def nufft2d2(x: Any, y: Any, f: Any, out: Any = None, eps: float = 1e-6, isign: int = -1, *, modeord: int = 0) -> Any:
    """Type 2 in two dimensions: modes f, [N1, N2] or [stack, N1, N2], to strengths [M] or [stack, M]; see nufft1d1."""
    return _type2("nufft2d2", (x, y), f, out, eps, isign, modeord)


def nufft3d1(
    x: Any,
    y: Any,
    z: Any,
    c: Any,
    n_modes: Any,
    out: Any = None,
    eps: float = 1e-6,
    isign: int = 1,
    *,
    modeord: int = 0,
) -> Any:
    """Type 1 in three dimensions: strengths c to modes [N1, N2, N3]; see nufft1d1."""
    return _type1("nufft3d1", (x, y, z), c, n_modes, out, eps, isign, modeord)


def nufft3d2(
    x: Any, y: Any, z: Any, f: Any, out: Any = None, eps: float = 1e-6, isign: int = -1, *, modeord: int = 0
) -> Any:
    """Type 2 in three dimensions: modes f, [N1, N2, N3], to strengths; see nufft1d1."""
    return _type2("nufft3d2", (x, y, z), f, out, eps, isign, modeord)


def _type1(
    name: str, axes: tuple[Any, ...], c: Any, n_modes: Any, out: Any, eps: float, isign: int, modeord: int
) -> Any:
    shape = tuple(n_modes) if isinstance(n_modes, Sequence) else (n_modes,)
    if len(shape) != len(axes):
        raise ValueError(f"{name}: n_modes must be {len(axes)} sizes, got {shape}")
    data = _complex(name, c, 1)
    plan = _plan(name, axes, shape, eps, -1 if isign >= 0 else 1, data.device)
    if data.shape[-1] != plan.n_points:
        raise ValueError(f"{name}: {plan.n_points} points and {data.shape[-1]} strengths; c must be [M] or [stack, M]")
    f = nufft_adjoint(data, plan) * math.sqrt(math.prod(plan.shape))
    dims = tuple(range(-len(axes), 0))
    return _give(torch.fft.ifftshift(f, dims) if _fft_order(name, modeord) else f, c, out)


def _type2(name: str, axes: tuple[Any, ...], f: Any, out: Any, eps: float, isign: int, modeord: int) -> Any:
    data = _complex(name, f, len(axes))
    plan = _plan(name, axes, tuple(data.shape[-len(axes) :]), eps, isign, data.device)
    if _fft_order(name, modeord):
        data = torch.fft.fftshift(data, tuple(range(-len(axes), 0)))
    return _give(nufft(data, plan) * math.sqrt(math.prod(plan.shape)), f, out)


def _complex(name: str, values: Any, axes: int) -> Tensor:
    data = to_torch(values)
    if data.dtype not in (torch.complex64, torch.complex128):
        raise TypeError(f"{name}: complex64 or complex128 data needed, got {data.dtype}")
    if data.ndim not in (axes, axes + 1):
        raise ValueError(f"{name}: data must have {axes} axes, or one more for a stack, got shape {tuple(data.shape)}")
    return data


def _plan(
    name: str, axes: tuple[Any, ...], shape: tuple[int, ...], eps: float, isign: int, device: torch.device
) -> NufftPlan:
    """Plan for exp(-i k x) where isign is negative, for exp(+i k x) otherwise."""
    given = [to_torch(a).double() for a in axes]
    if any(a.ndim != 1 or a.shape != given[0].shape for a in given):
        raise ValueError(f"{name}: coordinates must be one array [M] per axis, got {[tuple(a.shape) for a in given]}")
    points = torch.stack([a if isign < 0 else -a for a in given], 1)
    folded = torch.remainder(points + math.pi, 2 * math.pi) - math.pi
    return nufft_plan(folded, shape, eps=min(eps, _MOST_EPS)).to(device)


def _fft_order(name: str, modeord: int) -> bool:
    if modeord not in (0, 1):
        raise ValueError(f"{name}: modeord must be 0 (from -N/2) or 1 (FFT order), got {modeord}")
    return modeord == 1


def _give(result: Tensor, given: Any, out: Any) -> Any:
    if out is not None:
        to_torch(out).copy_(result)
        return out
    return as_given(result, given)

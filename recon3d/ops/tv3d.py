"""Isotropic total variation in 3D: its value, and the two sweeps of a primal-dual step for  f(x) + limit TV(x).

    (D x) = (fz dz x, fy dy x, fx dx x)  with forward differences, zero at the last slice, row and column (Neumann)
    TV(x) = sum over voxels of |D x|_2

    dual sweep      p <- (p + sigma D xbar) cut to |p|_2 <= limit, voxel by voxel
    primal sweep    x' = x - tau (g + D^T p), at least 0 where asked;  xbar <- 2 x' - x;  x <- x'

with g the gradient of f or A^T q of its own dual (Chambolle and Pock, J. Math. Imaging Vis. 40 (2011) 120). `factors`
carry the spacing: fz = dx / dz compares a jump between slices with a jump between columns per millimetre.
||D^T D|| <= 4 (fz^2 + fy^2 + fx^2).
"""

from __future__ import annotations

import importlib.util
import math

import torch
from torch import Tensor

from recon3d.ops import _library

__all__ = ["tv3d_dual_", "tv3d_primal_", "tv3d_value"]

Factors = tuple[float, float, float]


def tv3d_value(x: Tensor, factors: Factors = (1.0, 1.0, 1.0)) -> Tensor:
    """Isotropic total variation of a volume.

    Args:
        x: [z, y, x] float32 or float64.
        factors: weights (fz, fy, fx) of the differences.

    Returns:
        float64 scalar tensor in the unit of x, summed slice by slice in order.

    Raises:
        ValueError: x has not three axes or a factor is not finite.
        TypeError: x is not float32 or float64.

    >>> tv3d_value(torch.tensor([[[0.0, 3.0], [4.0, 3.0]]])).item()  # 5 + 0 + 1 + 0
    6.0
    """
    _check("tv3d_value", x, factors)
    total = torch.zeros((), dtype=torch.float64, device=x.device)
    for k in range(x.shape[0]):
        total = total + _diff(x[k : k + 2].double(), factors)[:, 0].square().sum(0).sqrt().sum()
    return total


def tv3d_dual_(p: Tensor, xbar: Tensor, sigma: float, limit: float, factors: Factors = (1.0, 1.0, 1.0)) -> None:
    """Dual sweep, in place: p <- (p + sigma D xbar) / max(1, norm / limit).

    Args:
        p: dual field, [3, z, y, x] float32 or float64, contiguous; components along z, y, x. Those of a last slice, row
            or column, where no difference exists, become zero.
        xbar: volume, [z, y, x], same dtype and device.
        sigma: dual step, above 0.
        limit: weight of TV, at least 0.
        factors: weights (fz, fy, fx) of the differences.

    Raises:
        ValueError: shapes do not fit, p is not contiguous or requires a gradient, or a number is out of range.
        TypeError: not float32 or float64, or dtypes differ.

    Kernels: torch (any device), C++ (CPU), Triton (CUDA).
    """
    _check("tv3d_dual_", xbar, factors, sigma=sigma, limit=limit)
    _check_state("tv3d_dual_", xbar, p=p)
    torch.ops.recon3d.tv3d_dual_(p, xbar.contiguous(), sigma, limit, *map(float, factors))


def tv3d_primal_(
    x: Tensor,
    xbar: Tensor,
    p: Tensor,
    g: Tensor,
    tau: float,
    factors: Factors = (1.0, 1.0, 1.0),
    nonnegative: bool = True,
) -> None:
    """Primal sweep, in place: x' = x - tau (g + D^T p), cut at zero if nonnegative; xbar <- 2 x' - x; x <- x'.

    Args:
        x: volume, [z, y, x] float32 or float64, contiguous; updated.
        xbar: like x; overwritten with the extrapolated volume.
        p: dual field, [3, z, y, x]; not changed.
        g: gradient, like x; not changed.
        tau: primal step, above 0.
        factors: weights (fz, fy, fx) of the differences.
        nonnegative: keep x' at or above zero.

    Raises:
        ValueError: shapes do not fit, or what is changed in place is not contiguous or requires a gradient.
        TypeError: not float32 or float64, or dtypes differ.

    Kernels: torch (any device), C++ (CPU), Triton (CUDA).
    """
    _check("tv3d_primal_", x, factors, tau=tau)
    _check_state("tv3d_primal_", x, x=x, xbar=xbar, p=p.contiguous())
    if g.shape != x.shape or g.dtype != x.dtype:
        raise ValueError(f"tv3d_primal_: g needs x's {tuple(x.shape)} {x.dtype}, got {tuple(g.shape)} {g.dtype}")
    torch.ops.recon3d.tv3d_primal_(x, xbar, p.contiguous(), g.contiguous(), tau, *map(float, factors), nonnegative)


def _check(name: str, x: Tensor, factors: Factors, **numbers: float) -> None:
    if x.ndim != 3:
        raise ValueError(f"{name}: a volume [z, y, x] is needed, got {tuple(x.shape)}")
    if x.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{name}: float32 or float64 is needed, got {x.dtype}")
    if len(factors) != 3 or not all(map(math.isfinite, factors)):
        raise ValueError(f"{name}: factors need three finite numbers (fz, fy, fx), got {factors}")
    for key, value in numbers.items():
        if not math.isfinite(value) or value < 0 or (value == 0 and key != "limit"):
            raise ValueError(
                f"{name}: {key} must be finite and {'at least' if key == 'limit' else 'above'} 0, got {value}"
            )
    _library.ensure()


def _check_state(name: str, like: Tensor, /, **state: Tensor) -> None:
    spans: list[tuple[int, int]] = []
    for key, t in state.items():
        shape = (3, *like.shape) if key == "p" else tuple(like.shape)
        if tuple(t.shape) != shape:
            raise ValueError(f"{name}: {key} needs shape {shape}, got {tuple(t.shape)}")
        if t.dtype != like.dtype or t.device != like.device:
            raise TypeError(f"{name}: {key} needs {like.dtype} on {like.device}, got {t.dtype} on {t.device}")
        if not t.is_contiguous() or (torch.is_grad_enabled() and t.requires_grad):
            raise ValueError(f"{name}: {key} is changed in place: it must be contiguous and not require a gradient")
        span = (t.data_ptr(), t.data_ptr() + t.numel() * t.element_size())
        if any(span[0] < end and start < span[1] for start, end in spans):
            raise ValueError(f"{name}: {key} shares memory with another argument; each needs its own")
        spans.append(span)


def _diff(x: Tensor, factors: Factors) -> Tensor:
    parts = [torch.diff(x, dim=d, append=x.narrow(d, x.shape[d] - 1, 1)) * f for d, f in enumerate(factors)]
    return torch.stack(parts)


def _adjoint(p: Tensor, factors: Factors) -> Tensor:
    out = torch.zeros_like(p[0])
    for d, f in enumerate(factors):
        n = p.shape[d + 1] - 1
        inner = p[d].narrow(d, 0, n) * f  # the last difference does not exist
        out.narrow(d, 0, n).sub_(inner)
        out.narrow(d, 1, n).add_(inner)
    return out


def _dual(p: Tensor, xbar: Tensor, sigma: float, limit: float, fz: float, fy: float, fx: float) -> None:
    if xbar.numel() == 0:
        return
    p += sigma * _diff(xbar, (fz, fy, fx))
    for d in range(3):
        p[d].narrow(d, xbar.shape[d] - 1, 1).zero_()
    norm = p.square().sum(0).sqrt()
    p *= torch.where(norm > limit, limit / norm, 1.0)


def _primal(
    x: Tensor, xbar: Tensor, p: Tensor, g: Tensor, tau: float, fz: float, fy: float, fx: float, nonnegative: bool
) -> None:
    if x.numel() == 0:
        return
    new = x - tau * (g + _adjoint(p, (fz, fy, fx)))
    if nonnegative:
        new = new.clamp_(min=0)
    torch.sub(2 * new, x, out=xbar)
    x.copy_(new)


_library.define(
    "tv3d_dual_(Tensor(a!) p, Tensor xbar, float sigma, float limit, float fz, float fy, float fx) -> ()",
    _dual,
    lambda *_: None,
)
_library.define(
    "tv3d_primal_(Tensor(a!) x, Tensor(b!) xbar, Tensor p, Tensor g, float tau, float fz, float fy, float fx,"
    " bool nonnegative) -> ()",
    _primal,
    lambda *_: None,
)


def _cuda_dual(p: Tensor, xbar: Tensor, sigma: float, limit: float, fz: float, fy: float, fx: float) -> None:
    from recon3d.kernels import tv3d as kernels

    kernels.dual(p, xbar, sigma, limit, fz, fy, fx)


def _cuda_primal(
    x: Tensor, xbar: Tensor, p: Tensor, g: Tensor, tau: float, fz: float, fy: float, fx: float, nonnegative: bool
) -> None:
    from recon3d.kernels import tv3d as kernels

    kernels.primal(x, xbar, p, g, tau, fz, fy, fx, nonnegative)


if importlib.util.find_spec("triton") is not None:
    _library.register_cuda("tv3d_dual_", _cuda_dual)
    _library.register_cuda("tv3d_primal_", _cuda_primal)

"""Conjugate gradients without a word to the host: fused vector updates, scalars that stay on the device.

One step, given q = A p and rz = <r, r>:

    alpha = rz / <p, q>,   x += alpha p,   r -= alpha q,   rz' = <r, r>,   p = r + (rz' / rz) p

(Hestenes and Stiefel, J. Res. NBS 49 (1952) 409). The scalars are float64 tensors, one for the volume or one per slice;
with one per slice every slice runs its own Krylov process and does not depend on its neighbours. Where rz = 0 (solved)
or <p, q> <= 0 (no curvature) the step is zero and the slice is frozen: rz' = 0. A NaN stays a NaN. Sums run in fixed
chunks, so no thread count changes a bit.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from recon3d.ops import _library
from recon3d.ops.dot import dot

__all__ = ["cg_step_", "solve"]


def solve(
    apply: Callable[[Tensor], Tensor],
    b: Tensor,
    x0: Tensor | None = None,
    iterations: int = 5,
    per_slice: bool = False,
    tolerance: float | None = None,
) -> Tensor:
    """Run conjugate gradients on apply(x) = b for a symmetric positive semi-definite operator.

    Args:
        apply: x -> A x as a new tensor; it must not change or keep its argument.
        b: right-hand side, [slice, ...] float32 or float64 (or complex: A Hermitian).
        x0: start, like b; None starts at zero. It is not changed.
        iterations: number of steps, at least 0. What the start leaves in A's null space stays there.
        per_slice: own step lengths for every slice, for operators that do not couple slices.
        tolerance: freeze what has |b - A x| <= tolerance |b| and stop when all has; costs one wait for the device per
            step, None never waits.

    Returns:
        The last iterate, with the shape and dtype of b.

    Raises:
        ValueError: x0 or apply's result has another shape, iterations or tolerance is negative.
        TypeError: x0 or apply's result has another dtype.

    >>> diagonal = torch.tensor([[1.0, 2.0, 4.0]], dtype=torch.float64)
    >>> solve(lambda x: diagonal * x, torch.ones_like(diagonal), iterations=3).round(decimals=9).tolist()
    [[1.0, 0.5, 0.25]]
    """
    if iterations < 0:
        raise ValueError(f"cg: iterations must be at least 0, got {iterations}")
    if tolerance is not None and not tolerance >= 0:
        raise ValueError(f"cg: tolerance must be at least 0, got {tolerance}")
    with torch.no_grad():
        b = b.detach()
        if x0 is None:
            x, r = torch.zeros_like(b, memory_format=torch.contiguous_format), _new(b)
        else:
            _check_like("x0", x0, b)
            x = _new(x0.detach())
            r = b - _applied(apply, x)
        p = r.clone()  # its own memory: the step changes r in place
        x_real, r_real, p_real = _real(x), _real(r), _real(p)
        rz = dot(r_real, r_real, per_slice)
        limit = None if tolerance is None else tolerance**2 * dot(_real(b), _real(b), per_slice)
        for _ in range(iterations):
            if limit is not None:
                rz = torch.where(rz <= limit, 0.0, rz)
                if not rz.any():
                    break
            rz = cg_step_(x_real, r_real, p_real, _real(_applied(apply, p)), rz)
    return x


def cg_step_(x: Tensor, r: Tensor, p: Tensor, q: Tensor, rz: Tensor) -> Tensor:
    """One step of conjugate gradients, in place.

    Args:
        x: iterate, [slice, ...] float32 or float64, contiguous; updated.
        r: residual b - A x, like x; updated.
        p: direction, like x; updated. x, r and p need their own memory each.
        q: A p, like x.
        rz: float64, scalar tensor or [slices]: <r, r> as the last step returned it. Its shape chooses one step length
            for the volume or one per slice.

    Returns:
        <r', r'>, float64 with the shape of rz, on x's device; nothing waits for the device.

    Raises:
        ValueError: shapes differ, x, r or p is not contiguous or shares memory, or rz has a wrong shape.
        TypeError: not float32 or float64, dtypes differ, or rz is not float64.

    Kernels: torch (any device), C++ (CPU), Triton (CUDA).
    """
    if x.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"cg_step_: float32 or float64 is needed, got {x.dtype}")
    if x.ndim == 0 or (rz.ndim != 0 and tuple(rz.shape) != (x.shape[0],)):
        raise ValueError(
            f"cg_step_: rz needs shape () or [{x.shape[0] if x.ndim else 'slices'}], got {tuple(rz.shape)}"
        )
    if rz.dtype != torch.float64:
        raise TypeError(f"cg_step_: rz must be float64, got {rz.dtype}")
    ends: list[tuple[int, int]] = []
    for key, t in (("x", x), ("r", r), ("p", p), ("q", q)):
        if t.shape != x.shape:
            raise ValueError(f"cg_step_: {key} needs the shape of x {tuple(x.shape)}, got {tuple(t.shape)}")
        if t.dtype != x.dtype or t.device != x.device:
            raise TypeError(f"cg_step_: {key} needs x's {x.dtype} on {x.device}, got {t.dtype} on {t.device}")
        if key != "q" and not t.is_contiguous():
            raise ValueError(f"cg_step_: {key} is changed in place and must be contiguous")
        span = (t.data_ptr(), t.data_ptr() + t.numel() * t.element_size())
        if any(span[0] < end and start < span[1] for start, end in ends):
            raise ValueError(f"cg_step_: {key} shares memory with another vector; each needs its own")
        ends.append(span)
    _library.ensure()
    return torch.ops.recon3d.cg_step_(x, r, p, q.contiguous(), rz.contiguous())


def _new(t: Tensor) -> Tensor:
    return t.clone(memory_format=torch.contiguous_format)


def _real(t: Tensor) -> Tensor:
    # for a Hermitian A both <p, A p> and <r, r> are real, so complex vectors run as pairs of reals
    return torch.view_as_real(t.resolve_conj()) if t.is_complex() else t


def _applied(apply: Callable[[Tensor], Tensor], p: Tensor) -> Tensor:
    q = apply(p)
    _check_like("the operator's result", q, p)
    return q


def _check_like(what: str, t: Tensor, like: Tensor) -> None:
    if t.shape != like.shape:
        raise ValueError(f"cg: {what} needs shape {tuple(like.shape)}, got {tuple(t.shape)}")
    if t.dtype != like.dtype or t.device != like.device:
        raise TypeError(f"cg: {what} needs {like.dtype} on {like.device}, got {t.dtype} on {t.device}")


def _reference(x: Tensor, r: Tensor, p: Tensor, q: Tensor, rz: Tensor) -> Tensor:
    per_slice = rz.ndim == 1

    def factor(scalar: Tensor) -> Tensor:
        return (scalar.reshape(-1, *[1] * (x.ndim - 1)) if per_slice else scalar).to(x.dtype)

    curvature = dot(p, q, per_slice)
    frozen = (rz == 0) | (curvature <= 0)
    alpha = factor(torch.where(frozen, 0.0, rz / curvature))
    x += alpha * p
    r -= alpha * q
    rz_new = torch.where(frozen, 0.0, dot(r, r, per_slice))
    p *= factor(torch.where(frozen, 0.0, rz_new / rz))
    p += r
    return rz_new


def _fake(x: Tensor, r: Tensor, p: Tensor, q: Tensor, rz: Tensor) -> Any:
    return rz.new_empty(rz.shape)


_library.define("cg_step_(Tensor(a!) x, Tensor(b!) r, Tensor(c!) p, Tensor q, Tensor rz) -> Tensor", _reference, _fake)


def _cuda(x: Tensor, r: Tensor, p: Tensor, q: Tensor, rz: Tensor) -> Tensor:
    from recon3d.kernels import cg as kernels

    return kernels.step(x, r, p, q, rz)


if importlib.util.find_spec("triton") is not None:
    _library.register_cuda("cg_step_", _cuda)

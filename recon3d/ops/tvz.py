"""Total variation along z: differences between slices and the one-pass ADMM update built on them.

    (D x)_k = scale (x_{k+1} - x_k),  (D x)_last = 0   (Neumann: the two faces of a volume are not neighbours)

    z' = shrink(D x + w, threshold),   w' = w + D x - z',   g = D^T (z' - w')

is the split, the scaled dual and the right-hand side of the next solve of (A^T A + rho D^T D) x = A^T y + rho g
(Boyd et al., Found. Trends Mach. Learn. 3 (2011) 1, section 6.4). `scale` carries the slice spacing, for example
reference spacing / spacing. With a = D x + w the update is w' = clamp(a, -threshold, threshold) and z' = a - w', so
one sweep reads x and w and writes z', w' and g. `periodic=True` wraps the last slice onto the first: it exists to
reproduce published code that does so.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from recon3d.ops import _library

__all__ = ["tvz_adjoint", "tvz_diff", "tvz_normal", "tvz_update", "tvz_update_"]


def tvz_diff(x: Tensor, scale: float = 1.0, periodic: bool = False) -> Tensor:
    """Forward difference along the first axis: D x.

    Args:
        x: volume, [z, ...] float32 or float64, any unit.
        scale: factor of every difference (spacing).
        periodic: the last difference is first minus last instead of zero.

    Returns:
        D x, shape and dtype of x. Autograd is :func:`tvz_adjoint`.

    Raises:
        ValueError: x has no axis or scale is not finite.
        TypeError: x is not float32 or float64.

    >>> tvz_diff(torch.tensor([1.0, 4.0, 2.0])).tolist()
    [3.0, -2.0, 0.0]
    """
    _check("tvz_diff", x, scale=scale)
    return torch.ops.recon3d.tvz_diff(x.contiguous(), scale, periodic)


def tvz_adjoint(v: Tensor, scale: float = 1.0, periodic: bool = False) -> Tensor:
    """Exact adjoint of :func:`tvz_diff`: (D^T v)_k = scale (v_{k-1} - v_k).

    Args:
        v: differences, [z, ...] float32 or float64.
        scale: as in tvz_diff.
        periodic: as in tvz_diff.

    Returns:
        D^T v, shape and dtype of v. Autograd is :func:`tvz_diff`.

    Raises:
        ValueError: v has no axis or scale is not finite.
        TypeError: v is not float32 or float64.

    >>> tvz_adjoint(torch.tensor([3.0, -2.0, 7.0])).tolist()
    [-3.0, 5.0, -2.0]
    """
    _check("tvz_adjoint", v, scale=scale)
    return torch.ops.recon3d.tvz_adjoint(v.contiguous(), scale, periodic)


def tvz_normal(x: Tensor, weight: float = 1.0, periodic: bool = False, add_to: Tensor | None = None) -> Tensor:
    """weight D^T D x for unit differences, in one pass; optionally added to what a solver has already computed.

    Args:
        x: volume, [z, ...] float32 or float64.
        weight: factor of the result; rho scale^2 where the differences carry a scale.
        periodic: as in tvz_diff.
        add_to: contiguous, like x and not sharing its memory; the result is added to it in place. No autograd then.

    Returns:
        The result, or add_to. Autograd of the result is the operator itself.

    Raises:
        ValueError: x has no axis, weight is not finite, or add_to has another shape, is not contiguous or is x.
        TypeError: x is not float32 or float64, or add_to has another dtype.

    >>> tvz_normal(torch.tensor([1.0, 4.0, 2.0])).tolist()
    [-3.0, 5.0, -2.0]
    """
    _check("tvz_normal", x, weight=weight)
    if add_to is None:
        return torch.ops.recon3d.tvz_normal(x.contiguous(), weight, periodic)
    _check_state("tvz_normal", x, add_to=add_to)
    torch.ops.recon3d.tvz_add_normal_(add_to, x.contiguous(), weight, periodic)
    return add_to


def tvz_update(
    x: Tensor, z: Tensor, w: Tensor, threshold: float, scale: float = 1.0, periodic: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """One ADMM update of the split and the dual of TV along z.

    Args:
        x: volume, [z, ...] float32 or float64.
        z: split variable, like x. The update replaces it without reading it; it travels with w as one state.
        w: scaled dual, like x.
        threshold: lambda / rho, at least 0, in the unit of scale times x.
        scale: factor of the differences (spacing).
        periodic: as in tvz_diff.

    Returns:
        z', w' and g = D^T(z' - w'), each with the shape and dtype of x. Differentiable in x and w.

    Raises:
        ValueError: shapes differ, no axis, threshold negative, or a number is not finite.
        TypeError: not float32 or float64, or dtypes differ.

    Kernels: torch (any device), C++ (CPU), Triton (CUDA). See `tvz_update_` for the form that allocates nothing.

    >>> x = torch.tensor([0.0, 5.0, 5.5])
    >>> z, w, g = tvz_update(x, torch.zeros(3), torch.zeros(3), threshold=1.0)
    >>> z.tolist(), w.tolist(), g.tolist()
    ([4.0, 0.0, 0.0], [1.0, 0.5, 0.0], [-3.0, 3.5, -0.5])
    """
    _check("tvz_update", x, threshold=threshold, scale=scale)
    _check_alike("tvz_update", x, z=z, w=w)
    z_new, w_new, g = torch.ops.recon3d.tvz_update(x.contiguous(), w.contiguous(), threshold, scale, periodic)
    return z_new, w_new, g


def tvz_update_(
    x: Tensor, z: Tensor | None, w: Tensor, g: Tensor, threshold: float, scale: float = 1.0, periodic: bool = False
) -> None:
    """tvz_update in place: z and w become z' and w', g becomes D^T(z' - w'). No autograd.

    Args:
        x: volume, [z, ...] float32 or float64.
        z: split, overwritten; contiguous. None where only w and g go on (they are all that a solver needs).
        w: scaled dual, updated; contiguous.
        g: right-hand side, overwritten; contiguous.
        threshold: as in tvz_update.
        scale: as in tvz_update.
        periodic: as in tvz_update.

    Raises:
        ValueError: as tvz_update; or z, w, g are not contiguous or share memory with one another or with x.
        TypeError: as tvz_update.
    """
    _check("tvz_update_", x, threshold=threshold, scale=scale)
    _check_state("tvz_update_", x, w=w, g=g, **({} if z is None else {"z": z}))
    torch.ops.recon3d.tvz_update_(x.contiguous(), z, w, g, threshold, scale, periodic)


def _check(name: str, x: Tensor, **numbers: float) -> None:
    if x.ndim == 0:
        raise ValueError(f"{name}: a volume of at least one axis (z) is needed, got a scalar")
    if x.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{name}: float32 or float64 is needed, got {x.dtype}")
    for key, value in numbers.items():
        if not math.isfinite(value):
            raise ValueError(f"{name}: {key} must be finite, got {value}")
    if numbers.get("threshold", 0.0) < 0:
        raise ValueError(f"{name}: threshold must be at least 0, got {numbers['threshold']}")
    _library.ensure()


def _check_alike(name: str, x: Tensor, **others: Tensor) -> None:
    for key, other in others.items():
        if other.shape != x.shape:
            raise ValueError(f"{name}: {key} needs the shape of x {tuple(x.shape)}, got {tuple(other.shape)}")
        if other.dtype != x.dtype or other.device != x.device:
            raise TypeError(f"{name}: {key} needs x's {x.dtype} on {x.device}, got {other.dtype} on {other.device}")


def _check_state(name: str, x: Tensor, **state: Tensor) -> None:
    _check_alike(name, x, **state)
    spans = [(x.data_ptr(), x.data_ptr() + x.numel() * x.element_size())]
    for key, tensor in state.items():
        if not tensor.is_contiguous():
            raise ValueError(f"{name}: {key} is changed in place and must be contiguous")
        if torch.is_grad_enabled() and tensor.requires_grad:
            raise ValueError(f"{name}: {key} is changed in place and cannot require a gradient")
        span = (tensor.data_ptr(), tensor.data_ptr() + tensor.numel() * tensor.element_size())
        if any(span[0] < end and start < span[1] for start, end in spans):
            raise ValueError(f"{name}: {key} is changed in place and cannot share memory with another argument")
        spans.append(span)


def _diff(x: Tensor, scale: float, periodic: bool) -> Tensor:
    last = x[:1] if periodic else x[-1:]
    return torch.diff(x, dim=0, append=last) * scale


def _adjoint(v: Tensor, scale: float, periodic: bool) -> Tensor:
    if not periodic:
        v = torch.cat((v[:-1], torch.zeros_like(v[-1:])))  # the last row of D is zero
    return (v.roll(1, 0) - v) * scale


def _normal(x: Tensor, weight: float, periodic: bool) -> Tensor:
    return _adjoint(_diff(x, 1.0, periodic), weight, periodic)


def _add_normal(q: Tensor, x: Tensor, weight: float, periodic: bool) -> None:
    q += _normal(x, weight, periodic)


def _update(x: Tensor, w: Tensor, threshold: float, scale: float, periodic: bool) -> tuple[Tensor, Tensor, Tensor]:
    a = _diff(x, scale, periodic) + w
    w_new = a.clamp(-threshold, threshold)
    z_new = a - w_new
    return z_new, w_new, _adjoint(z_new - w_new, scale, periodic)


def _update_in_place(
    x: Tensor, z: Tensor | None, w: Tensor, g: Tensor, threshold: float, scale: float, periodic: bool
) -> None:
    for old, new in zip((z, w, g), _update(x, w, threshold, scale, periodic), strict=True):
        if old is not None:
            old.copy_(new)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.scale, ctx.periodic = inputs[1], inputs[2]


def _update_keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(output[0])
    ctx.scale, ctx.periodic = inputs[3], inputs[4]


def _update_backward(ctx: Any, grad_z: Tensor, grad_w: Tensor, grad_g: Tensor) -> tuple[Any, ...]:
    (z,) = ctx.saved_tensors
    through_g = torch.ops.recon3d.tvz_diff(grad_g.contiguous(), ctx.scale, ctx.periodic)
    # z' is exactly zero where the clamp does not act: there w' = a, elsewhere z' = a - const
    grad_a = torch.where(z == 0, grad_w - through_g, grad_z + through_g)
    return torch.ops.recon3d.tvz_adjoint(grad_a, ctx.scale, ctx.periodic), grad_a, None, None, None


def _empty(x: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape)


_library.define(
    "tvz_diff(Tensor x, float scale, bool periodic) -> Tensor",
    _diff,
    _empty,
    setup_context=_keep,
    backward=lambda ctx, g: (torch.ops.recon3d.tvz_adjoint(g.contiguous(), ctx.scale, ctx.periodic), None, None),
)
_library.define(
    "tvz_adjoint(Tensor v, float scale, bool periodic) -> Tensor",
    _adjoint,
    _empty,
    setup_context=_keep,
    backward=lambda ctx, g: (torch.ops.recon3d.tvz_diff(g.contiguous(), ctx.scale, ctx.periodic), None, None),
)
_library.define(
    "tvz_normal(Tensor x, float weight, bool periodic) -> Tensor",
    _normal,
    _empty,
    setup_context=_keep,
    backward=lambda ctx, g: (torch.ops.recon3d.tvz_normal(g.contiguous(), ctx.scale, ctx.periodic), None, None),
)
_library.define(
    "tvz_add_normal_(Tensor(a!) q, Tensor x, float weight, bool periodic) -> ()", _add_normal, lambda *_: None
)
_library.define(
    "tvz_update(Tensor x, Tensor w, float threshold, float scale, bool periodic) -> (Tensor, Tensor, Tensor)",
    _update,
    lambda x, *_: (_empty(x), _empty(x), _empty(x)),
    setup_context=_update_keep,
    backward=_update_backward,
)
_library.define(
    "tvz_update_(Tensor x, Tensor(a!)? z, Tensor(b!) w, Tensor(c!) g, float threshold, float scale, bool periodic)"
    " -> ()",
    _update_in_place,
    lambda *_: None,
)


def _cuda_new(kind: int) -> Callable[..., Tensor]:
    def launch(x: Tensor, scale: float, periodic: bool) -> Tensor:
        from recon3d.kernels import tvz as kernels

        out = torch.empty_like(x)
        kernels.stencil(kind, x, out, scale, periodic, add=False)
        return out

    return launch


def _cuda_add_normal(q: Tensor, x: Tensor, weight: float, periodic: bool) -> None:
    from recon3d.kernels import tvz as kernels

    kernels.stencil(kernels.NORMAL, x, q, weight, periodic, add=True)


def _cuda_update(x: Tensor, w: Tensor, threshold: float, scale: float, periodic: bool) -> tuple[Tensor, Tensor, Tensor]:
    from recon3d.kernels import tvz as kernels

    z, w_new, g = (torch.empty_like(x) for _ in range(3))
    kernels.update(x, w, z, w_new, g, threshold, scale, periodic)
    return z, w_new, g


def _cuda_update_in_place(
    x: Tensor, z: Tensor | None, w: Tensor, g: Tensor, threshold: float, scale: float, periodic: bool
) -> None:
    from recon3d.kernels import tvz as kernels

    kernels.update(x, w, z, w, g, threshold, scale, periodic)


if importlib.util.find_spec("triton") is not None:
    _library.register_cuda("tvz_diff", _cuda_new(0))
    _library.register_cuda("tvz_adjoint", _cuda_new(1))
    _library.register_cuda("tvz_normal", _cuda_new(2))
    _library.register_cuda("tvz_add_normal_", _cuda_add_normal)
    _library.register_cuda("tvz_update", _cuda_update)
    _library.register_cuda("tvz_update_", _cuda_update_in_place)

"""From one noise level to the next, fused: u' = x0c + sigma' (a eps + b z), with z drawn in the kernel.

eps is the noise direction, (u - x0) / sigma from the network's estimate x0 (DDS) or (u - x0c) / sigma from
the corrected one (DiffPIR); z is Philox noise (recon3d.ops.philox) that is never stored. One pass: u, x0, x0c
are read once, u' is written once.

x0c is either given or computed in the same pass for data terms that are diagonal, y = H x + n with
n ~ N(0, sigma_y^2): identity (denoising), mask (inpainting), block mean (down-sampling by an integer factor
in the plane). With P = H+ H and s the one non-zero singular value of H (1, 1, 1/factor):

    x0c = x0 + lam (H+ y - P x0)
    sigma_y = 0:  lam = 1, noise as above on every component            (DDNM)
    sigma_y > 0:  on null components, (I - P): sigma' (a eps + b z)       (DDNM+)
                  on measured ones, P: d z without eps, d^2 = sigma'^2 - (lam sigma_y / s)^2, and
                  lam = 1 where sigma' >= sigma_y / s, else s sigma' a / sigma_y

so the noise that x0c inherits from y and the fresh noise add up to sigma'^2 on every component when
a^2 + b^2 = 1. This is the published rule with x_t / sqrt(abar_t) as the state, so its factor sqrt(abar_t) is
1 here; eta = b.
Sources: Wang, Yu, Zhang, ICLR 2023 (DDNM); Chung, Lee, Ye, ICLR 2024 (DDS); Zhu et al., CVPRW 2023 (DiffPIR).
"""

from __future__ import annotations

import importlib.util
import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from recon3d.ops import _library
from recon3d.ops.philox import NoiseKey, _signed, mixed_normals

__all__ = ["DataTerm", "renoise"]


@dataclass(frozen=True, eq=False)
class DataTerm:
    """A diagonal data term y = H x + n that ops.renoise applies in the same pass.

    Attributes:
        kind: "identity" (y = x + n), "mask" (y = x + n where mask), "block_mean" (y = means of blocks of
            factor x factor + n).
        y: measurement, shape of u (for block_mean with y and x divided by factor), unit of u. Under a false
            mask ignored.
        sigma_y: standard deviation of n in the unit of y; 0 means exact data.
        mask: bool, [y, x] for every slice alike or the shape of u; true where measured. For kind "mask" only.
        factor: block edge in pixels, at least 2. For kind "block_mean" only.
    """

    kind: Literal["identity", "mask", "block_mean"]
    y: Tensor
    sigma_y: float = 0.0
    mask: Tensor | None = None
    factor: int = 1

    def __post_init__(self) -> None:
        if self.kind not in ("identity", "mask", "block_mean"):
            raise ValueError(f"DataTerm: kind must be identity, mask or block_mean, got {self.kind!r}")
        if not (math.isfinite(self.sigma_y) and self.sigma_y >= 0):
            raise ValueError(f"DataTerm: sigma_y must be finite and not negative, got {self.sigma_y}")
        if (self.mask is not None) != (self.kind == "mask"):
            raise ValueError(f"DataTerm: kind {self.kind!r} {'needs' if self.mask is None else 'takes no'} mask")
        if self.mask is not None and self.mask.dtype != torch.bool:
            raise TypeError(f"DataTerm: mask must be bool, got {self.mask.dtype}")
        if (self.factor > 1) != (self.kind == "block_mean"):
            raise ValueError(f"DataTerm: kind {self.kind!r} does not go with factor {self.factor}")


def renoise(
    u: Tensor,
    x0: Tensor,
    x0c: Tensor | DataTerm,
    sigma: float,
    sigma_next: float,
    a: float,
    b: float,
    noise: NoiseKey | None = None,
    *,
    eps_from: Literal["x0", "x0c"] = "x0",
    inplace: bool = False,
) -> Tensor:
    """Next state u' = x0c + sigma_next (a eps + b z), eps = (u - x0) / sigma.

    Args:
        u: state, [z, y, x] or [z, c, y, x], float32 or float64, any unit.
        x0: the network's estimate of the clean volume; shape, dtype, device and unit of u.
        x0c: the estimate after data consistency, like x0; or a DataTerm, which is applied to x0 in the same
            pass.
        sigma: noise level of u, same unit, > 0.
        sigma_next: noise level of the result, >= 0; 0 returns x0c exactly.
        a: weight of the deterministic direction eps.
        b: weight of fresh noise; a^2 + b^2 = 1 keeps the level (required with a noisy DataTerm).
        noise: which noise the slices get (recon3d.noise); None is allowed when none is drawn.
        eps_from: the estimate that eps is taken from: "x0" as DDS, "x0c" as DiffPIR.
        inplace: write the result into u, which must be contiguous and not need a gradient; saves one volume.

    Returns:
        u', contiguous (u itself with inplace). Linear in u, x0, x0c and DataTerm.y, with autograd.

    Raises:
        ValueError: shapes differ, a level or weight is out of range, or noise is missing or of another slice
        count. TypeError: dtypes or devices differ, or u is neither float32 nor float64.

    Kernels: torch (any device), C++ (CPU), Triton (CUDA).

    >>> u, x0, x0c = torch.ones(1, 2, 2), torch.zeros(1, 2, 2), torch.full((1, 2, 2), 3.0)
    >>> renoise(u, x0, x0c, sigma=0.5, sigma_next=0.25, a=1.0, b=0.0).unique().tolist()
    [3.5]
    """
    if u.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"renoise: u must be float32 or float64, got {u.dtype}")
    if u.ndim not in (3, 4):
        raise ValueError(f"renoise: u must be [z, y, x] or [z, c, y, x], got {tuple(u.shape)}")
    term = x0c if isinstance(x0c, DataTerm) else None
    given = None if isinstance(x0c, DataTerm) else x0c
    _like(u, x0, "x0", tuple(u.shape))
    if given is not None:
        _like(u, given, "x0c", tuple(u.shape))
    if not (math.isfinite(sigma) and sigma > 0):
        raise ValueError(f"renoise: sigma must be finite and positive, got {sigma}")
    if not (math.isfinite(sigma_next) and sigma_next >= 0):
        raise ValueError(f"renoise: sigma_next must be finite and not negative, got {sigma_next}")
    if not (math.isfinite(a) and math.isfinite(b)):
        raise ValueError(f"renoise: a and b must be finite, got {a} and {b}")
    if eps_from not in ("x0", "x0c"):
        raise ValueError(f"renoise: eps_from must be 'x0' or 'x0c', got {eps_from!r}")
    y, mask = _check_term(u, term) if term is not None else (None, None)
    k_null, z_null, k_measured, z_measured, lam = weights(term, sigma, sigma_next, a, b)
    draws = z_null != 0 or (term is not None and z_measured != 0)
    if noise is None and draws:
        raise ValueError(f"renoise: noise is missing, but b = {b} and sigma_next = {sigma_next} draw some")
    if noise is not None and noise.n_slices != u.shape[0]:
        raise ValueError(f"renoise: noise is for {noise.n_slices} slices, but u has {u.shape[0]}")
    if noise is not None and u.shape[1:].numel() > 2**34:
        raise ValueError(f"renoise: a slice may have up to 2^34 pixels, got shape {tuple(u.shape)}")
    anchors, coefficients = noise.on(u.device) if noise is not None and draws else _no_noise(u)
    seed, level, stream = (_signed(noise.seed), noise.level, noise.stream) if noise is not None else (0, 0, 0)
    _library.ensure()
    rest = (
        None if given is None else given.contiguous(),
        y,
        mask,
        1 if term is None else term.factor,
        anchors,
        coefficients,
        seed,
        level,
        stream,
        k_null,
        z_null,
        k_measured,
        z_measured,
        lam,
        eps_from == "x0c",
    )
    if not inplace:
        stepped: Tensor = torch.ops.recon3d.renoise(u.contiguous(), x0.contiguous(), *rest)
        return stepped
    if not u.is_contiguous():
        raise ValueError(f"renoise: inplace needs a contiguous u, got strides {u.stride()}")
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (u, x0, given, y)):
        raise ValueError("renoise: inplace gives no gradient; use inplace=False or torch.no_grad()")
    if any(t is not None and t.numel() and t.data_ptr() == u.data_ptr() for t in (x0, given, y)):
        raise ValueError("renoise: inplace needs u to share no memory with x0, x0c or y")
    torch.ops.recon3d.renoise_(u, x0.contiguous(), *rest)
    return u


def weights(
    term: DataTerm | None, sigma: float, sigma_next: float, a: float, b: float
) -> tuple[float, float, float, float, float]:
    """Weights of u - x0 and z on null and on measured components, and lam; see the module's formula.

    Returns:
        (k_null, z_null, k_measured, z_measured, lam).
    """
    k, z = sigma_next * a / sigma, sigma_next * b
    if term is None or term.sigma_y == 0:
        return k, z, k, z, 1.0
    if a < 0 or abs(a * a + b * b - 1) > 1e-6:
        raise ValueError(f"renoise: a noisy DataTerm needs a >= 0 and a^2 + b^2 = 1, got a = {a}, b = {b}")
    inherited = term.sigma_y * term.factor  # sigma_y / s
    lam = 1.0 if sigma_next >= inherited else sigma_next * a / inherited
    return k, z, 0.0, math.sqrt(max(0.0, sigma_next**2 - (lam * inherited) ** 2)), lam


def _like(u: Tensor, t: Tensor, name: str, shape: tuple[int, ...]) -> None:
    if tuple(t.shape) != shape:
        raise ValueError(f"renoise: {name} must have shape {shape} to go with u, got {tuple(t.shape)}")
    if t.dtype != u.dtype or t.device != u.device:
        raise TypeError(f"renoise: {name} must be {u.dtype} on {u.device} as u is, got {t.dtype} on {t.device}")


def _check_term(u: Tensor, term: DataTerm) -> tuple[Tensor, Tensor | None]:
    rows, columns = u.shape[-2:]
    if rows % term.factor or columns % term.factor:
        raise ValueError(f"renoise: blocks of {term.factor} pixels do not tile slices of {rows} x {columns}")
    _like(u, term.y, "DataTerm.y", (*u.shape[:-2], rows // term.factor, columns // term.factor))
    mask = term.mask
    if mask is not None:
        if tuple(mask.shape) not in (tuple(u.shape[-2:]), tuple(u.shape)) or mask.device != u.device:
            raise ValueError(
                f"renoise: DataTerm.mask must be {tuple(u.shape[-2:])} or {tuple(u.shape)} on {u.device}, "
                f"got {tuple(mask.shape)} on {mask.device}"
            )
        mask = mask.expand(u.shape[1:]) if mask.ndim == 2 else mask
        mask = mask.contiguous()
    return term.y.contiguous(), mask


def _no_noise(u: Tensor) -> tuple[Tensor, Tensor]:
    return (
        torch.zeros((u.shape[0], 2), dtype=torch.int64, device=u.device),
        torch.zeros((u.shape[0], 2), dtype=torch.float32, device=u.device),
    )


def _project(v: Tensor, mask: Tensor | None, factor: int) -> Tensor:
    """P v = H+ H v, the part of v that H sees."""
    if mask is not None:
        return torch.where(mask, v, torch.zeros((), dtype=v.dtype, device=v.device))
    return v if factor == 1 else _spread(_block_sum(v, factor) / factor**2, factor)


def _block_sum(v: Tensor, factor: int) -> Tensor:
    *lead, rows, columns = v.shape
    return v.reshape(*lead, rows // factor, factor, columns // factor, factor).sum((-3, -1))


def _spread(v: Tensor, factor: int) -> Tensor:
    return v.repeat_interleave(factor, -2).repeat_interleave(factor, -1)


def _reference(
    u: Tensor,
    x0: Tensor,
    x0c: Tensor | None,
    y: Tensor | None,
    mask: Tensor | None,
    factor: int,
    anchors: Tensor,
    coefficients: Tensor,
    seed: int,
    level: int,
    stream: int,
    k_null: float,
    z_null: float,
    k_measured: float,
    z_measured: float,
    lam: float,
    corrected: bool,
) -> Tensor:
    if x0c is None:
        assert y is not None  # the public function passes one of the two
        if factor > 1:
            x0c = x0 + lam * _spread(y - _block_sum(x0, factor) / factor**2, factor)
        else:
            x0c = (1 - lam) * x0 + lam * y
            x0c = x0c if mask is None else torch.where(mask, x0c, x0)
    else:
        k_measured, z_measured = k_null, z_null
    out = x0c
    if k_null != 0 or k_measured != 0:
        out = out + _weigh(u - (x0c if corrected else x0), k_null, k_measured, mask, factor, y is not None)
    if z_null != 0 or z_measured != 0:
        z = mixed_normals(anchors, coefficients, u.shape[1:].numel(), seed, level, stream, u.dtype).reshape(u.shape)
        out = out + _weigh(z, z_null, z_measured, mask, factor, y is not None)
    return out.clone() if out is x0c else out.contiguous()


def _weigh(v: Tensor, null: float, measured: float, mask: Tensor | None, factor: int, data: bool) -> Tensor:
    """null (I - P) v + measured P v."""
    if null == measured:
        return null * v
    if data and mask is None and factor == 1:
        return measured * v
    if mask is not None:
        return torch.where(mask, measured * v, null * v)
    return null * v + (measured - null) * _project(v, mask, factor)


def _reference_(u: Tensor, *rest: Any) -> None:
    u.copy_(_reference(u, *rest))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, _, x0c, _, mask, factor, *_, k_null, _, k_measured, _, lam, corrected = inputs
    ctx.save_for_backward(mask)
    ctx.weights = (x0c is not None, factor, k_null, k_measured if x0c is None else k_null, lam, corrected)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    # linear in u, x0, x0c, y; P is symmetric, so the transpose is the same projections the other way round
    (mask,) = ctx.saved_tensors
    given, factor, k_null, k_measured, lam, corrected = ctx.weights
    along = _weigh(grad, k_null, k_measured, mask, factor, not given)
    into_x0c = grad - along if corrected else grad
    direct = torch.zeros_like(grad) if corrected else -along  # what x0 gets as the base of eps
    if given:
        return (along, direct, into_x0c, *[None] * 14)
    seen = lam * _project(into_x0c, mask, factor)
    to_y = seen if factor == 1 else lam * _block_sum(into_x0c, factor)
    return (along, into_x0c - seen + direct, None, to_y, *[None] * 13)


_ARGUMENTS = (
    "Tensor x0, Tensor? x0c, Tensor? y, Tensor? mask, int factor, Tensor anchors, Tensor coefficients, "
    "int seed, int level, int stream, float k_null, float z_null, float k_measured, float z_measured, "
    "float lam, bool corrected"
)
_library.define(
    f"renoise(Tensor u, {_ARGUMENTS}) -> Tensor",
    _reference,
    lambda u, *rest: torch.empty_like(u, memory_format=torch.contiguous_format),
    backward=_backward,
    setup_context=_setup,
)
_library.define(f"renoise_(Tensor(a!) u, {_ARGUMENTS}) -> ()", _reference_, lambda u, *rest: None)


def _cuda(u: Tensor, *rest: Any) -> Tensor:
    from recon3d.kernels import renoise as kernels

    result: Tensor = kernels.renoise(u, *rest)
    return result


def _cuda_(u: Tensor, *rest: Any) -> None:
    from recon3d.kernels import renoise as kernels

    kernels.renoise(u, *rest, out=u)


if importlib.util.find_spec("triton") is not None:
    _library.register_cuda("renoise", _cuda)
    _library.register_cuda("renoise_", _cuda_)

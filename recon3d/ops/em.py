"""Expectation maximisation for Poisson data: the one pass over the measurement and the one over the volume.

    y ~ Poisson(scale factors P x + additive),   A = scale factors P,   s = A^T 1

    poisson_ratio    scale factors y / (scale factors P x + additive), which P^T takes back to `back`
    em_update        x' from x, back, s, an anchor a of weight w and the relative difference prior R of weight beta

"surrogate" minimises, voxel by voxel and in closed form,

    s v - x back log v + w/2 (v - a)^2 + beta (dR (v - x) + curvature/2 (v - x)^2)     over v >= 0

(De Pierro, IEEE Trans. Med. Imaging 14 (1995) 132): with w = beta = 0 it is x back / s (Shepp and Vardi, IEEE Trans.
Med. Imaging 1 (1982) 113; Lange and Carson, JCAT 8 (1984) 306), no weight makes it diverge, and on all data at once
each step raises the penalised likelihood. "gradient" is the preconditioned gradient step of PET-DDS (Singh et al.,
MELBA 2 (2024) 547),  max(0, x + max(x, floor) / s (back - s + w (a - x) - beta dR)).
"""

from __future__ import annotations

import importlib.util
import math
from typing import Any, Literal

import torch
from torch import Tensor

from recon3d.ops import _library
from recon3d.ops.rdp import Axes, pair_weights, slope_and_curvature

__all__ = ["Form", "em_update", "poisson_ratio"]

Form = Literal["surrogate", "gradient"]

# expected counts are never taken smaller, so that a quotient stays a float32 (no scanner expects 1e-20 counts)
_LEAST = 1e-20
# values in a row that are worth a visit of their own
_LONG = 64


def poisson_ratio(
    y: Tensor,
    projection: Tensor,
    factors: Tensor | None = None,
    additive: Tensor | None = None,
    scale: float = 1.0,
) -> Tensor:
    """Measured over expected counts, ready for back projection, in one pass.

    Args:
        y: counts, float32 or float64, at least 0.
        projection: P x, like y.
        factors: multiplicative factors, broadcast over y (attenuation needs no time-of-flight axis); None for 1.
        additive: expected randoms and scatter in counts, broadcast over y; None for 0.
        scale: further factor of the projection, above 0.

    Returns:
        f y / (f projection + additive) with f = scale factors, like y; 0 where nothing is expected, also where y > 0:
        EM cannot explain such a count, as there is no activity on its line. Finite for finite input. Differentiable in
        y and projection.

    Raises:
        ValueError: shapes do not fit or scale is not above 0.
        TypeError: not float32 or float64, or dtypes or devices differ.

    Kernels: torch (any device), C++ (CPU), Triton (CUDA).

    >>> y, p = torch.tensor([4.0, 0.0, 3.0]), torch.tensor([1.0, 0.0, 0.0])
    >>> poisson_ratio(y, p, additive=torch.tensor([1.0, 0.0, 0.0])).tolist()
    [2.0, 0.0, 0.0]
    """
    _like("poisson_ratio", y, projection=projection)
    if not (math.isfinite(scale) and scale > 0):
        raise ValueError(f"poisson_ratio: scale must be finite and above 0, got {scale}")
    if y.ndim == 0:
        raise ValueError("poisson_ratio: a measurement of at least one axis is needed, got a scalar")
    f, f_axes = _broadcast("factors", y, factors)
    b, b_axes = _broadcast("additive", y, additive)
    if b is not None and f_axes and b_axes and f_axes != b_axes:  # the kernel knows one pattern
        b, b_axes = b.expand(y.shape).contiguous(), None
    repeat, inner = _repeat(y, f_axes or b_axes)
    _library.ensure()
    out: Tensor = torch.ops.recon3d.poisson_ratio(
        _rows(y), projection.contiguous(), f, b, scale, repeat, inner, f_axes is not None, b_axes is not None
    )
    return out


def em_update(
    x: Tensor,
    back: Tensor,
    sensitivity: Tensor,
    *,
    anchor: Tensor | None = None,
    anchor_weight: float = 0.0,
    rdp: float = 0.0,
    gamma: float = 2.0,
    epsilon: float = 1e-6,
    axes: Axes = "z",
    spacing_mm: tuple[float, float, float] | None = None,
    form: Form = "surrogate",
    floor: float = 1e-4,
    scale: float = 1.0,
) -> Tensor:
    """One EM update of the activity with an anchor and the relative difference prior, in one pass over the volume.

    Args:
        x: activity, [z, y, x] float32 or float64; taken as 0 where it is negative.
        back: A^T (y / expected), like x; the back projection of `poisson_ratio`.
        sensitivity: A^T 1 of the same data, like x, counts per unit of x.
        anchor: volume to stay near, like x; None for none.
        anchor_weight: w, at least 0, counts per squared unit of x.
        rdp: beta, at least 0, counts per unit of x.
        gamma: of the relative difference prior; at least 1 for "surrogate".
        epsilon: of the relative difference prior, unit of x.
        axes: "z" or "zyx", which neighbours the prior ties.
        spacing_mm: voxel size (z, y, x); None takes cubes.
        form: "surrogate" or "gradient".
        floor: smallest activity in the gradient form's step size, unit of x.
        scale: factor of w and beta, 1 / number of subsets when back and sensitivity are a subset's.

    Returns:
        x', like x and at least 0; x itself, whatever its sign, where sensitivity <= 0. No autograd.

    Raises:
        ValueError: shapes do not fit or a number is out of range.
        TypeError: not float32 or float64, or dtypes or devices differ.

    Kernels: torch (any device), C++ (CPU), Triton (CUDA).

    >>> x, back, s = torch.full((1, 1, 2), 2.0), torch.full((1, 1, 2), 3.0), torch.tensor([[[4.0, 0.0]]])
    >>> em_update(x, back, s).flatten().tolist()
    [1.5, 2.0]
    >>> em_update(x, back, s, anchor=3 * x, anchor_weight=1e9).flatten().tolist()
    [6.0, 2.0]
    """
    if x.ndim != 3:
        raise ValueError(f"em_update: a volume [z, y, x] is needed, got {tuple(x.shape)}")
    others = {"back": back, "sensitivity": sensitivity}
    _like("em_update", x, **others, **({} if anchor is None else {"anchor": anchor}))
    numbers = {"anchor_weight": anchor_weight, "rdp": rdp, "gamma": gamma, "floor": floor, "scale": scale}
    for name, value in numbers.items():
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"em_update: {name} must be finite and at least 0, got {value}")
    if not (math.isfinite(epsilon) and epsilon > 0):
        raise ValueError(f"em_update: epsilon must be finite and above 0, got {epsilon}")
    if form not in ("surrogate", "gradient"):
        raise ValueError(f"em_update: form must be 'surrogate' or 'gradient', got {form!r}")
    if anchor is None and anchor_weight > 0:
        raise ValueError(f"em_update: anchor_weight is {anchor_weight} and there is no anchor; give one")
    if form == "surrogate" and rdp > 0 and gamma < 1:
        raise ValueError(f"em_update: the surrogate form needs gamma of at least 1, got {gamma}; use form='gradient'")
    weights = pair_weights("em_update", axes, spacing_mm)
    _library.ensure()
    out: Tensor = torch.ops.recon3d.em_update(
        x.contiguous(),
        back.contiguous(),
        sensitivity.contiguous(),
        anchor.contiguous() if anchor is not None and anchor_weight * scale > 0 else None,
        anchor_weight * scale,
        rdp * scale,
        gamma,
        epsilon,
        *weights,
        form == "surrogate",
        floor,
    )
    return out


def _like(op: str, x: Tensor, **others: Tensor) -> None:
    if x.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{op}: float32 or float64 is needed, got {x.dtype}")
    for name, other in others.items():
        if other.shape != x.shape:
            raise ValueError(f"{op}: {name} needs shape {tuple(x.shape)}, got {tuple(other.shape)}")
        if other.dtype != x.dtype or other.device != x.device:
            raise TypeError(f"{op}: {name} needs {x.dtype} on {x.device}, got {other.dtype} on {other.device}")


def _rows(t: Tensor) -> Tensor:
    """t itself where it consists of long contiguous rows, as a subset of views does; else contiguous."""
    long = t.shape[0] > 0 and t[0].numel() >= _LONG and t[0].is_contiguous()
    return t if long else t.contiguous()


def _broadcast(name: str, y: Tensor, t: Tensor | None) -> tuple[Tensor | None, tuple[int, int] | None]:
    """t ready for the kernel, and the run of axes [first, end) along which it repeats (None where it does not)."""
    if t is None:
        return None, None
    if t.dtype != y.dtype or t.device != y.device:
        raise TypeError(f"poisson_ratio: {name} needs {y.dtype} on {y.device}, got {t.dtype} on {t.device}")
    shape = (1,) * (y.ndim - t.ndim) + tuple(t.shape)
    if len(shape) != y.ndim or any(a not in (1, b) for a, b in zip(shape, y.shape, strict=True)):
        raise ValueError(f"poisson_ratio: {name} {tuple(t.shape)} cannot be broadcast over y {tuple(y.shape)}")
    t = t.reshape(shape)
    short = [axis for axis, (a, b) in enumerate(zip(shape, y.shape, strict=True)) if a != b]
    if not short:
        return _rows(t), None
    first, end = short[0], short[-1] + 1
    if first == 0 or any(a != 1 for a in shape[first:end]):  # not one run within the rows
        return t.expand(y.shape).contiguous(), None
    return _rows(t), (first, end)


def _repeat(y: Tensor, axes: tuple[int, int] | None) -> tuple[int, int]:
    if axes is None:
        return 1, max(1, math.prod(y.shape[1:]))
    return math.prod(y.shape[slice(*axes)]), math.prod(y.shape[axes[1] :])


def _spread(t: Tensor | None, y: Tensor, repeat: int, inner: int, short: bool) -> Tensor | None:
    if t is None or not short:
        return t
    return t.reshape(-1, 1, inner).expand(-1, repeat, inner).reshape(y.shape)


def _ratio(
    y: Tensor,
    projection: Tensor,
    factors: Tensor | None,
    additive: Tensor | None,
    scale: float,
    repeat: int,
    inner: int,
    short_factors: bool,
    short_additive: bool,
) -> Tensor:
    f, expected = _expected(y, projection, factors, additive, scale, repeat, inner, short_factors, short_additive)
    return torch.where(expected <= 0, 0.0, f * y / expected.clamp(min=_LEAST))


def _expected(
    y: Tensor,
    projection: Tensor,
    factors: Tensor | None,
    additive: Tensor | None,
    scale: float,
    repeat: int,
    inner: int,
    short_factors: bool,
    short_additive: bool,
) -> tuple[Tensor | float, Tensor]:
    spread = _spread(factors, y, repeat, inner, short_factors)
    f = scale if spread is None else scale * spread
    b = _spread(additive, y, repeat, inner, short_additive)
    expected = f * projection
    return f, expected if b is None else expected + b


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs[:4], output)
    ctx.settings = inputs[4:]


def _ratio_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    y, projection, factors, additive, ratio = ctx.saved_tensors
    f, expected = _expected(y, projection, factors, additive, *ctx.settings)
    share = torch.where(expected <= 0, 0.0, f / expected.clamp(min=_LEAST)) * grad
    return share, -share * ratio, None, None, None, None, None, None, None


def _update(
    x: Tensor,
    back: Tensor,
    sensitivity: Tensor,
    anchor: Tensor | None,
    anchor_weight: float,
    rdp: float,
    gamma: float,
    epsilon: float,
    wz: float,
    wy: float,
    wx: float,
    surrogate: bool,
    floor: float,
) -> Tensor:
    start = x.clamp(min=0)
    a = start if anchor is None else anchor
    if rdp:
        slope, curvature = slope_and_curvature(start, gamma, epsilon, (wz, wy, wx), surrogate)
        slope, curvature = rdp * slope, rdp * curvature
    else:
        slope, curvature = torch.zeros_like(x), torch.zeros_like(x)
    w = 0.0 if anchor is None else anchor_weight
    if not surrogate:
        climb = (back - sensitivity) + w * (a - start) - slope
        new = (start + start.clamp(min=floor) / sensitivity * climb).clamp(min=0)
        return torch.where(sensitivity <= 0, x, new)
    # q v^2 + p v - c = 0, divided by a size that keeps the three from overflowing
    q = w + curvature
    size = 1 / (sensitivity + q * torch.maximum(a.abs(), start))
    p = (sensitivity + slope - w * a - curvature * start) * size
    c = start * back * size
    q = q * size
    root = (p * p + 4 * q * c).sqrt()
    # of the two equal forms the one without cancellation
    new = torch.where(p > 0, 2 * c, root - p) / torch.where(p > 0, p + root, 2 * q)
    return torch.where(sensitivity <= 0, x, new)


_library.define(
    "poisson_ratio(Tensor y, Tensor projection, Tensor? factors, Tensor? additive, float scale, int repeat, int inner,"
    " bool short_factors, bool short_additive) -> Tensor",
    _ratio,
    lambda y, projection, *_: projection.new_empty(projection.shape),
    setup_context=_keep,
    backward=_ratio_backward,
)
_library.define(
    "em_update(Tensor x, Tensor back, Tensor sensitivity, Tensor? anchor, float anchor_weight, float rdp, float gamma,"
    " float epsilon, float wz, float wy, float wx, bool surrogate, float floor) -> Tensor",
    _update,
    lambda x, *_: x.new_empty(x.shape),
)


def _cuda_ratio(
    y: Tensor,
    projection: Tensor,
    factors: Tensor | None,
    additive: Tensor | None,
    scale: float,
    repeat: int,
    inner: int,
    short_factors: bool,
    short_additive: bool,
) -> Tensor:
    from recon3d.kernels import em as kernels

    out = torch.empty_like(projection)
    f, b = (None if t is None else t.contiguous() for t in (factors, additive))
    kernels.ratio(y.contiguous(), projection, f, b, out, scale, repeat, inner, short_factors, short_additive)
    return out


def _cuda_update(
    x: Tensor,
    back: Tensor,
    sensitivity: Tensor,
    anchor: Tensor | None,
    anchor_weight: float,
    rdp: float,
    gamma: float,
    epsilon: float,
    wz: float,
    wy: float,
    wx: float,
    surrogate: bool,
    floor: float,
) -> Tensor:
    from recon3d.kernels import em as kernels

    out = torch.empty_like(x)
    weights = (wz, wy, wx)
    kernels.update(
        x, back, sensitivity, anchor, out, anchor_weight, rdp, gamma, epsilon, weights, surrogate, floor
    )  # fmt: skip
    return out


if importlib.util.find_spec("triton") is not None:
    _library.register_cuda("poisson_ratio", _cuda_ratio)
    _library.register_cuda("em_update", _cuda_update)

"""Plan of a NUFFT: everything that depends on the sampling points alone, made once in float64.

Axis by axis, a point of frequency k [radians per pixel] lies at g = k G / (2 pi) + G // 2 on a grid of G points; its
first tap is ceil(g - w / 2), wrapped into [0, G), and its fraction z in [-1, 1) says how far that tap lies beyond the
left end of the kernel. Points are sorted by the tile of the grid that holds their first tap, so that neighbours in
memory touch neighbouring cells. Oversampling and width are those of the least predicted run time among those whose
predicted error, from the kernel and the actual fractions, stays within eps.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from recon3d.ops import _library
from recon3d.ops.nufft_kernel import MAX_WIDTH, OFFSETS, AxisKernel, axis_kernel, grid_size

__all__ = ["LEAST_EPS", "NufftPlan", "Unit", "nufft_plan"]

Unit = Literal["rad", "cycles", "index"]
OVERSAMPLING = (1.25, 1.5, 2.0)
# what rounding leaves reachable
LEAST_EPS = {torch.complex64: 1e-6, torch.complex128: 1e-12}
# the prediction is a mean over white data: a few percent for the chance in a measurement of it
_HEADROOM = 1.08
# roundings of a value on its way through the FFT and the taps, in units of the dtype's half ulp
_ROUNDINGS = 4.0
# edge of the sorting tiles: 4 to 12 are within 3 %, 16 costs 8 %, 32 20 % (320^2, 402 spokes)
_TILE = 8
# points beyond pi are another trajectory's unit, not rounding of a file
_SLACK = 1e-5
_CACHE_BYTES = 512 << 20


@dataclass(frozen=True, eq=False)
class NufftPlan:
    """A set of sampling points prepared for images of one shape; made by nufft_plan.

    Attributes:
        shape: image, ([z,] y, x).
        grid: oversampled grid, same order; 1 where the image has one pixel, and such an axis has one tap.
        width: taps w of every other axis.
        eps: error asked for; `error` is the one predicted: relative, L2, for white data.
        digest: of points, shape and eps; equal plans have equal digests.
        tile: edge of the sorting tiles, in grid points.
        order: [M] int32, index of the point at each sorted place. All below are in sorted order.
        first: [M, d] int32, first tap on each axis, in [0, grid).
        fraction: [M, d] float64, z of the module docstring.
        tiles: [number of tiles + 1] int32, where the points of each tile start (tiles row by row, x fastest).
        coefficients: [d, w, degree + 1] float64, the weights as polynomials in z, highest power first.
        scale: [sum of shape] float64, per axis 1 / (kernel's Fourier transform) / sqrt(n), one after another.
        source: the points in radians as the caller's differentiable tensor [M, d], else None.
    """

    shape: tuple[int, ...]
    grid: tuple[int, ...]
    width: int
    eps: float
    error: float
    digest: str
    tile: int
    order: Tensor
    first: Tensor
    fraction: Tensor
    tiles: Tensor
    coefficients: Tensor
    scale: Tensor
    source: Tensor | None = None
    _made: dict[Any, Any] = field(default_factory=dict, repr=False)

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def n_points(self) -> int:
        return int(self.order.shape[0])

    @property
    def device(self) -> torch.device:
        return self.order.device

    def weights(self, dtype: torch.dtype) -> Tensor:
        """[M, d, w] weights of the taps; float32 or float64, made on first use."""
        return self._once("weights", dtype, lambda: _weights(self.fraction, self.coefficients, dtype))

    def slopes(self, dtype: torch.dtype) -> Tensor:
        """[M, d, w] derivatives of the weights by the point's frequency in radians."""
        return self._once("slopes", dtype, lambda: _weights(self.fraction, self._slope_coefficients(), dtype))

    def scales(self, dtype: torch.dtype) -> Tensor:
        return self._once("scale", dtype, lambda: self.scale.to(dtype))

    def radians(self) -> Tensor:
        """[M, d] float64, the points in their own order, folded into one period."""
        grid = torch.tensor(self.grid, dtype=torch.float64, device=self.device)
        at = self.first - (self.fraction + 1) / 2 + self.width / 2  # on the grid
        folded = torch.remainder((at - (grid / 2).floor()) * (2 * math.pi / grid) + math.pi, 2 * math.pi) - math.pi
        return torch.empty_like(folded).index_copy_(0, self.order.long(), folded)

    def to(self, device: torch.device | str) -> NufftPlan:
        """The plan with its tensors on another device; copied once per device."""
        target = torch.empty(0, device=device).device
        if target == self.device:
            return self
        moved: NufftPlan = self._once(
            "on",
            target,
            lambda: replace(
                self,
                _made={},
                **{name: getattr(self, name).to(target) for name in (*_SORTED, "tiles", "coefficients", "scale")},
            ),
        )
        return moved

    def nbytes(self) -> int:
        held = (*(getattr(self, name) for name in _SORTED), *(v for v in self._made.values() if isinstance(v, Tensor)))
        return sum(t.numel() * t.element_size() for t in held)

    def _slope_coefficients(self) -> Tensor:
        degree = self.coefficients.shape[2] - 1
        powers = torch.arange(degree, -1, -1, dtype=torch.float64, device=self.device)
        by_z = torch.nn.functional.pad((self.coefficients * powers)[..., :-1], (1, 0))
        # dz = -2 dg and dg = G / (2 pi) dk
        by_k = torch.tensor(self.grid, dtype=torch.float64, device=self.device) / -math.pi
        return by_z * by_k[:, None, None]

    def _once(self, what: str, key: Any, make: Any) -> Any:
        if (what, key) not in self._made:
            self._made[what, key] = make()
        return self._made[what, key]


_SORTED = ("order", "first", "fraction")


def nufft_plan(
    points: Any,
    shape: Sequence[int],
    *,
    eps: float = 1e-3,
    unit: Unit = "rad",
    oversampling: float | None = None,
) -> NufftPlan:
    """Prepare sampling points for images of one shape. Plans of equal input are made once and kept for a while.

    Args:
        points: [M, d] array or tensor, d = 1, 2 or 3 in the order of the image's axes ([z,] y, x); taken as float64.
            A tensor that requires grad makes nufft and nufft_adjoint differentiable by the points.
        shape: image, ([z,] y, x); any sizes.
        eps: relative L2 error allowed on white data, 1e-12 to 1e-2. complex64 data reach 1e-6. The default is far
            below the noise of any scan.
        unit: of the points: "rad" per pixel in [-pi, pi], "cycles" per pixel in [-1/2, 1/2], or "index" on the
            k-space grid of the image in [-n/2, n/2]. The border itself is allowed.
        oversampling: of the grid, 1.25 to 2; chosen by predicted run time when not given.

    Returns:
        The plan, on the host; plan.to(device) moves it.

    Raises:
        ValueError: a shape, unit, eps or point that does not fit, or no point at all.

    >>> plan = nufft_plan([[0.0, 0.0], [0.5, -0.25]], (32, 32), unit="cycles")
    >>> plan.n_points, plan.grid
    (2, (40, 40))
    """
    sizes = _check_shape(shape)
    given = points if isinstance(points, Tensor) else torch.from_numpy(np.array(points, dtype=np.float64))
    radians = _radians(given, sizes, unit)
    if not 1e-12 <= eps <= 1e-2:
        raise ValueError(f"nufft_plan: eps must lie between 1e-12 and 1e-2, got {eps}")
    if oversampling is not None and not 1.25 <= oversampling <= 2:
        raise ValueError(f"nufft_plan: oversampling must lie between 1.25 and 2, got {oversampling}")
    host = radians.detach().cpu().contiguous()
    digest = hashlib.blake2b(host.numpy().data, digest_size=16)
    digest.update(repr((sizes, float(eps), oversampling)).encode())
    plan = _cached(digest.hexdigest(), host, sizes, float(eps), oversampling)
    return replace(plan, source=radians) if radians.requires_grad else plan


def _check_shape(shape: Sequence[int]) -> tuple[int, ...]:
    sizes = tuple(int(n) for n in shape)
    if not 1 <= len(sizes) <= 3 or any(n < 1 for n in sizes):
        raise ValueError(f"nufft_plan: shape must be one to three positive sizes ([z,] y, x), got {tuple(shape)}")
    return sizes


def _radians(points: Tensor, sizes: tuple[int, ...], unit: str) -> Tensor:
    if points.ndim != 2 or points.shape[1] != len(sizes):
        raise ValueError(f"nufft_plan: points must be [M, {len(sizes)}] for shape {sizes}, got {list(points.shape)}")
    if not points.shape[0]:
        raise ValueError("nufft_plan: no points given, at least one is needed")
    if points.is_complex():
        raise ValueError("nufft_plan: points must be real, one column per axis; got complex numbers")
    factors = {
        "rad": [1.0] * len(sizes),
        "cycles": [2 * math.pi] * len(sizes),
        "index": [2 * math.pi / n for n in sizes],
    }
    if unit not in factors:
        raise ValueError(f"nufft_plan: unit must be 'rad', 'cycles' or 'index', got {unit!r}")
    wide = points.double()
    radians = wide if unit == "rad" else wide * torch.tensor(factors[unit], dtype=torch.float64, device=points.device)
    low, high = (m.item() for m in radians.detach().aminmax())
    if not math.isfinite(low) or not math.isfinite(high):
        raise ValueError("nufft_plan: points hold NaN or infinity; remove those samples from points and data")
    if max(-low, high) > math.pi * (1 + _SLACK):
        raise ValueError(
            f"nufft_plan: points in {unit!r} reach {max(-low, high):.6g} radians per pixel, at most pi is allowed; "
            "name their unit: 'rad', 'cycles' or 'index'"
        )
    return radians


_lock = threading.Lock()
_plans: OrderedDict[str, NufftPlan] = OrderedDict()


def _cached(digest: str, points: Tensor, shape: tuple[int, ...], eps: float, oversampling: float | None) -> NufftPlan:
    with _lock:
        if digest in _plans:
            _plans.move_to_end(digest)
            return _plans[digest]
    plan = _make(digest, points, shape, eps, oversampling)
    with _lock:
        plan = _plans.setdefault(digest, plan)
        held = sum(p.nbytes() for p in _plans.values())
        while held > _CACHE_BYTES and len(_plans) > 1:
            held -= _plans.popitem(last=False)[1].nbytes()
    return plan


def _make(digest: str, points: Tensor, shape: tuple[int, ...], eps: float, oversampling: float | None) -> NufftPlan:
    _library.ensure()
    for kernels in _candidates(shape, len(points), eps, oversampling):
        grid, width = tuple(k.g for k in kernels), kernels[0].width
        order, first, fraction, tiles = torch.ops.recon3d.nufft_sort(points, grid, width, _TILE)
        error = _error(kernels, [_histogram(fraction[:, a]) for a in range(len(shape))], eps)
        if error <= eps:
            break
    else:
        raise ValueError(
            f"nufft_plan: eps {eps:g} is out of reach at oversampling {oversampling} for shape {shape}; "
            "leave oversampling out or ask for less"
        )
    degree = max(k.polynomials.shape[1] for k in kernels)
    polynomials = [np.pad(k.polynomials, ((0, 0), (degree - k.polynomials.shape[1], 0))) for k in kernels]
    return NufftPlan(
        shape=shape,
        grid=grid,
        width=width,
        eps=eps,
        error=error,
        digest=digest,
        tile=_TILE,
        order=order,
        first=first,
        fraction=fraction,
        tiles=tiles,
        coefficients=torch.from_numpy(np.stack(polynomials)),
        scale=torch.from_numpy(np.concatenate([k.scale / math.sqrt(k.n) for k in kernels])),
    )


def _candidates(shape: tuple[int, ...], points: int, eps: float, oversampling: float | None) -> list[list[AxisKernel]]:
    """Kernels good enough for uniformly spread fractions, fastest first, then wider ones."""
    even = [np.full(OFFSETS, 1 / OFFSETS)] * len(shape)
    found: list[tuple[float, list[list[AxisKernel]]]] = []
    for sigma in OVERSAMPLING if oversampling is None else (oversampling,):
        enough: list[list[AxisKernel]] = []
        for width in range(2, MAX_WIDTH + 1):
            # a factor 4 to 10 per tap: start near the answer
            if width < MAX_WIDTH and 30 * 10.0 ** -(width + 1) > eps:
                continue
            kernels = [axis_kernel(n, grid_size(n, sigma, width), width) for n in shape]
            if enough or _error(kernels, even, eps) <= eps:
                enough.append(kernels)
            if len(enough) == 3:
                break
        if enough:
            found.append((_cost(shape, enough[0], points), enough))
    found.sort(key=lambda item: item[0])
    return list(itertools.chain.from_iterable(widths for _, widths in found))


def _error(kernels: list[AxisKernel], fractions: list[Any], eps: float) -> float:
    """Relative L2 error expected on white data whose fractions have these histograms, rounding included."""
    aliasing = sum(float(k.error2 @ h) for k, h in zip(kernels, fractions, strict=True))
    half_ulp = 2.0**-24 if eps >= LEAST_EPS[torch.complex64] else 2.0**-53
    rounding = _ROUNDINGS * half_ulp * math.prod(k.growth for k in kernels)
    return _HEADROOM * math.sqrt(aliasing + rounding**2)


def _cost(shape: tuple[int, ...], kernels: list[AxisKernel], points: int) -> float:
    """Predicted time of a forward and an adjoint of eight complex64 images on one core, in nanoseconds."""
    cells = 0.0
    for a in range(len(shape)):  # lines of the pruned FFT: transformed axes are long, the others still short
        cells += math.prod(k.g if b >= a else k.n for b, k in enumerate(kernels))
    taps = math.prod(k.width if k.g > 1 else 1 for k in kernels)
    # fitted at 256^2 and 320^2, 64 and 402 spokes: the grid of the finer sampling leaves the cache sooner
    return 16.0 * cells + points * (12.0 + 0.5 * taps)


def _histogram(fraction: Tensor) -> Any:
    bins = ((fraction + 1) * (OFFSETS / 2)).clamp_(0, OFFSETS - 1).to(torch.int64)
    return torch.bincount(bins, minlength=OFFSETS).numpy() / len(fraction)


# ---- ops ------------------------------------------------------------------------------------------------------------


def _sort_reference(
    points: Tensor, grid: Sequence[int], width: int, tile: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    size = torch.tensor(grid, dtype=torch.float64, device=points.device)
    left = points * (size / (2 * math.pi)) + (size / 2).floor() - width / 2
    whole = left.ceil()
    single = size == 1
    fraction = torch.where(single, 0.0, (whole - left) * 2 - 1)
    first = torch.where(single, 0.0, torch.remainder(whole, size)).to(torch.int32)
    key = torch.zeros(len(points), dtype=torch.int64, device=points.device)
    count = 1
    for a, g in enumerate(grid):
        along = (g + tile - 1) // tile
        key = key * along + first[:, a].long() // tile
        count *= along
    key, order = key.sort(stable=True)
    tiles = torch.searchsorted(key, torch.arange(count + 1, device=points.device))
    return order.to(torch.int32), first[order], fraction[order], tiles.to(torch.int32)


def _sort_fake(points: Tensor, grid: Sequence[int], width: int, tile: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    count = math.prod((g + tile - 1) // tile for g in grid) + 1
    new = points.new_empty
    return (
        new(points.shape[0], dtype=torch.int32),
        new(points.shape, dtype=torch.int32),
        new(points.shape),
        new(count, dtype=torch.int32),
    )


def _weights_reference(fraction: Tensor, coefficients: Tensor, double: bool) -> Tensor:
    z = fraction[..., None]
    value = torch.zeros(1, dtype=torch.float64, device=fraction.device)
    for power in range(coefficients.shape[2]):
        value = value * z + coefficients[..., power]
    return value.to(torch.float64 if double else torch.float32)


def _weights_fake(fraction: Tensor, coefficients: Tensor, double: bool) -> Tensor:
    dtype = torch.float64 if double else torch.float32
    return fraction.new_empty((*fraction.shape, coefficients.shape[1]), dtype=dtype)


# points [M, d] float64 in radians -> order, first, fraction, tiles of NufftPlan
_library.define(
    "nufft_sort(Tensor points, int[] grid, int width, int tile) -> (Tensor, Tensor, Tensor, Tensor)",
    _sort_reference,
    _sort_fake,
)
# fraction [M, d] and coefficients [d, w, degree + 1], both float64 -> [M, d, w]
_library.define(
    "nufft_weights(Tensor fraction, Tensor coefficients, bool double) -> Tensor", _weights_reference, _weights_fake
)


def _weights(fraction: Tensor, coefficients: Tensor, dtype: torch.dtype) -> Tensor:
    out: Tensor = torch.ops.recon3d.nufft_weights(fraction, coefficients, dtype == torch.float64)
    return out

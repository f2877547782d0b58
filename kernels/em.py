"""EM for Poisson data on CUDA: the ratio of counts to expectation, and the update of the activity, one pass each."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from recon3d.kernels.aot import Variant
from recon3d.kernels.rdp import rdp_around
from torch import Tensor


@triton.jit
def poisson_ratio_kernel(
    y_ptr,
    p_ptr,
    f_ptr,
    b_ptr,
    out_ptr,
    n,
    repeat,
    inner,
    scale: tl.float64,
    FACTORS: tl.constexpr,
    ADDITIVE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """f y / (f p + b), f = scale factors; FACTORS and ADDITIVE are 0 absent, 1 like y, 2 repeating along y's middle."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m = i < n
    e = y_ptr.dtype.element_ty
    short = i
    if FACTORS == 2 or ADDITIVE == 2:
        short = i // (repeat * inner) * inner + i % inner
    f = tl.full((), scale, e)
    if FACTORS == 1:
        f = f * tl.load(f_ptr + i, mask=m, other=0.0)
    elif FACTORS == 2:
        f = f * tl.load(f_ptr + short, mask=m, other=0.0)
    expected = f * tl.load(p_ptr + i, mask=m, other=0.0)
    if ADDITIVE == 1:
        expected += tl.load(b_ptr + i, mask=m, other=0.0)
    elif ADDITIVE == 2:
        expected += tl.load(b_ptr + short, mask=m, other=0.0)
    safe = tl.where(expected < 1e-20, 1e-20, expected)  # as in recon3d/ops/em.py; a NaN stays one
    value = f * tl.load(y_ptr + i, mask=m, other=0.0) / safe.to(e)
    tl.store(out_ptr + i, tl.where(expected <= 0, 0.0, value), mask=m)


@triton.jit
def em_update_kernel(
    x_ptr,
    back_ptr,
    sensitivity_ptr,
    anchor_ptr,
    out_ptr,
    slices,
    rows,
    columns,
    anchor_weight: tl.float64,
    rdp: tl.float64,
    gamma: tl.float64,
    epsilon: tl.float64,
    wz: tl.float64,
    wy: tl.float64,
    wx: tl.float64,
    floor: tl.float64,
    ANCHOR: tl.constexpr,
    PRIOR: tl.constexpr,
    SURROGATE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """x' from x; PRIOR is 0 none, 1 along z, 2 in 3D; one program per BLOCK voxels of one slice."""
    k = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m = i < rows * columns
    at = k * (rows * columns) + i
    e = x_ptr.dtype.element_ty
    old = tl.load(x_ptr + at, mask=m, other=0.0)
    s = tl.load(sensitivity_ptr + at, mask=m, other=0.0)
    back = tl.load(back_ptr + at, mask=m, other=0.0)
    blind = s <= 0
    s = tl.where(blind, 1.0, s)
    x = tl.where(old < 0, 0.0, old)
    a, w = x, tl.full((), 0.0, e)
    if ANCHOR:
        a = tl.load(anchor_ptr + at, mask=m, other=0.0)
        w = tl.full((), anchor_weight, e)
    slope, curvature = tl.zeros_like(x), tl.zeros_like(x)
    if PRIOR > 0:
        slope, curvature = rdp_around(
            x_ptr, x, at, i, k, slices, rows, columns, m, tl.full((), gamma, e), tl.full((), epsilon, e),
            tl.full((), wz, e), tl.full((), wy, e), tl.full((), wx, e), PRIOR == 2,
        )  # fmt: skip
        slope *= tl.full((), rdp, e)
        curvature *= tl.full((), rdp, e)
    if SURROGATE:
        # q v^2 + p v - c = 0, divided by a size that keeps the three from overflowing
        q = w + curvature
        large = tl.where(tl.abs(a) > x, tl.abs(a), x)
        size = 1 / (s + q * large)
        p = (s + slope - w * a - curvature * x) * size
        c = x * back * size
        q *= size
        root = tl.sqrt(p * p + 4 * q * c)
        down = p > 0  # of the two equal forms the one without cancellation
        new = tl.where(down, 2 * c, root - p) / tl.where(down, p + root, 2 * q)
    else:
        climb = (back - s) + w * (a - x) - slope
        least = tl.full((), floor, e)
        new = x + tl.where(x < least, least, x) / s * climb
        new = tl.where(new < 0, 0.0, new)
    tl.store(out_ptr + at, tl.where(blind, old, new), mask=m)


def ratio(
    y: Tensor,
    projection: Tensor,
    factors: Tensor | None,
    additive: Tensor | None,
    out: Tensor,
    scale: float,
    repeat: int,
    inner: int,
    short_factors: bool,
    short_additive: bool,
    block: int = 1024,
) -> None:
    """Launch poisson_ratio_kernel; all contiguous, y as [outer, repeat, inner] where a tensor repeats."""
    if y.numel() == 0:
        return
    with torch.cuda.device_of(y):
        poisson_ratio_kernel[(triton.cdiv(y.numel(), block),)](
            y, projection, y if factors is None else factors, y if additive is None else additive, out,
            y.numel(), repeat, inner, scale,
            FACTORS=0 if factors is None else 1 + short_factors,
            ADDITIVE=0 if additive is None else 1 + short_additive,
            BLOCK=block, enable_fp_fusion=True,
        )  # fmt: skip


def update(
    x: Tensor,
    back: Tensor,
    sensitivity: Tensor,
    anchor: Tensor | None,
    out: Tensor,
    anchor_weight: float,
    rdp: float,
    gamma: float,
    epsilon: float,
    weights: tuple[float, float, float],
    surrogate: bool,
    floor: float,
    block: int = 512,
) -> None:
    """Launch em_update_kernel; all contiguous [z, y, x], out sharing memory with none."""
    if x.numel() == 0:
        return
    slices, rows, columns = x.shape
    prior = 0 if rdp == 0 else 2 if weights[1] or weights[2] else 1
    with torch.cuda.device_of(x):
        em_update_kernel[(triton.cdiv(rows * columns, block), slices)](
            x, back, sensitivity, x if anchor is None else anchor, out, slices, rows, columns,
            anchor_weight, rdp, gamma, epsilon, *weights, floor,
            ANCHOR=anchor is not None, PRIOR=prior, SURROGATE=surrogate, BLOCK=block, enable_fp_fusion=True,
        )  # fmt: skip


_SIZES = {"slices": "i32", "rows": "i32", "columns": "i32"}
_NUMBERS = dict.fromkeys(("anchor_weight", "rdp", "gamma", "epsilon", "wz", "wy", "wx", "floor"), "fp64")
_RATIO, _UPDATE = ("y_ptr", "p_ptr", "f_ptr", "b_ptr", "out_ptr"), ("x_ptr", "back_ptr", "sensitivity_ptr")
VARIANTS = [
    *(
        Variant(
            f"ratio-{dtype}-{factors}{additive}",
            poisson_ratio_kernel,
            {**dict.fromkeys(_RATIO, f"*{dtype}"), "n": "i64", "repeat": "i64", "inner": "i64", "scale": "fp64"},
            {"FACTORS": factors, "ADDITIVE": additive, "BLOCK": 1024},
            max_registers=128,
            aligned=(*_RATIO, "n", "inner"),
            load_bits=128,
            store_bits=128,
        )
        for dtype, factors, additive in (("fp32", 0, 0), ("fp32", 1, 1), ("fp32", 2, 1), ("fp64", 2, 1))
    ),
    *(
        Variant(
            f"update-{dtype}-{prior}{'' if surrogate else '-gradient'}",
            em_update_kernel,
            {**dict.fromkeys((*_UPDATE, "anchor_ptr", "out_ptr"), f"*{dtype}"), **_SIZES, **_NUMBERS},
            {"ANCHOR": True, "PRIOR": prior, "SURROGATE": surrogate, "BLOCK": 512},
            max_registers=128 if dtype == "fp32" else 255,
            aligned=(*_UPDATE, "anchor_ptr", "out_ptr", "columns"),
            load_bits=128,
            store_bits=128,
        )
        for dtype, prior, surrogate in (
            *(("fp32", prior, surrogate) for prior in (0, 1, 2) for surrogate in (True, False)),
            ("fp64", 2, True),
        )
    ),
]

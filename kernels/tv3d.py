"""The two sweeps of a primal-dual step for isotropic total variation in 3D on CUDA, one pass over the volume each."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from recon3d.kernels.aot import Variant
from torch import Tensor


@triton.jit
def _component(p, xbar_ptr, here, at, stride, exists, m, step):
    """p + step (xbar one stride on - xbar here) where that neighbour exists, else zero."""
    there = tl.load(xbar_ptr + at + stride, mask=m & exists, other=0.0)
    return tl.where(exists, p + step * (there - here), 0.0)


@triton.jit
def tv3d_dual_kernel(
    p_ptr,
    xbar_ptr,
    slices,
    rows,
    columns,
    sigma: tl.float64,
    limit: tl.float64,
    fz: tl.float64,
    fy: tl.float64,
    fx: tl.float64,
    BLOCK: tl.constexpr,
):
    """p = (p + sigma D xbar) cut to length limit; one program per BLOCK voxels of one slice."""
    k = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    pixels = rows * columns
    m = i < pixels
    at = k * pixels + i
    volume = slices.to(tl.int64) * pixels
    element = p_ptr.dtype.element_ty
    here = tl.load(xbar_ptr + at, mask=m, other=0.0)
    z = tl.load(p_ptr + at, mask=m, other=0.0)
    y = tl.load(p_ptr + volume + at, mask=m, other=0.0)
    x = tl.load(p_ptr + 2 * volume + at, mask=m, other=0.0)
    z = _component(z, xbar_ptr, here, at, pixels, k < slices - 1, m, tl.full((), sigma * fz, element))
    y = _component(y, xbar_ptr, here, at, columns, i < pixels - columns, m, tl.full((), sigma * fy, element))
    x = _component(x, xbar_ptr, here, at, 1, i % columns < columns - 1, m, tl.full((), sigma * fx, element))
    norm = tl.sqrt(z * z + y * y + x * x)
    bound = tl.full((), limit, element)
    over = norm > bound
    cut = tl.where(over, bound / tl.where(over, norm, 1.0), 1.0)
    tl.store(p_ptr + at, z * cut, mask=m)
    tl.store(p_ptr + volume + at, y * cut, mask=m)
    tl.store(p_ptr + 2 * volume + at, x * cut, mask=m)


@triton.jit
def _pull(p_ptr, at, stride, has_before, exists, m, f):
    """f (p one stride back - p here), each where it exists."""
    before = tl.load(p_ptr + at - stride, mask=m & has_before, other=0.0)
    return f * (before - tl.load(p_ptr + at, mask=m & exists, other=0.0))


@triton.jit
def tv3d_primal_kernel(
    x_ptr,
    xbar_ptr,
    p_ptr,
    g_ptr,
    slices,
    rows,
    columns,
    tau: tl.float64,
    fz: tl.float64,
    fy: tl.float64,
    fx: tl.float64,
    NONNEGATIVE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """x' = x - tau (g + D^T p), xbar = 2 x' - x; one program per BLOCK voxels of one slice."""
    k = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    pixels = rows * columns
    m = i < pixels
    at = k * pixels + i
    volume = slices.to(tl.int64) * pixels
    element = x_ptr.dtype.element_ty
    column = i % columns
    pull = _pull(p_ptr, at, pixels, k > 0, k < slices - 1, m, tl.full((), fz, element))
    pull += _pull(p_ptr + volume, at, columns, i >= columns, i < pixels - columns, m, tl.full((), fy, element))
    pull += _pull(p_ptr + 2 * volume, at, 1, column > 0, column < columns - 1, m, tl.full((), fx, element))
    old = tl.load(x_ptr + at, mask=m, other=0.0)
    new = old - tl.full((), tau, element) * (tl.load(g_ptr + at, mask=m, other=0.0) + pull)
    if NONNEGATIVE:
        new = tl.where(new < 0, 0.0, new)
    tl.store(xbar_ptr + at, new + (new - old), mask=m)
    tl.store(x_ptr + at, new, mask=m)


def dual(
    p: Tensor, xbar: Tensor, sigma: float, limit: float, fz: float, fy: float, fx: float, block: int = 1024
) -> None:
    """Launch tv3d_dual_kernel; p [3, z, y, x] and xbar [z, y, x] contiguous."""
    if xbar.numel() == 0:
        return
    slices, rows, columns = xbar.shape
    with torch.cuda.device_of(xbar):
        tv3d_dual_kernel[(triton.cdiv(rows * columns, block), slices)](
            p, xbar, slices, rows, columns, sigma, limit, fz, fy, fx, BLOCK=block, enable_fp_fusion=True
        )


def primal(
    x: Tensor,
    xbar: Tensor,
    p: Tensor,
    g: Tensor,
    tau: float,
    fz: float,
    fy: float,
    fx: float,
    nonnegative: bool,
    block: int = 1024,
) -> None:
    """Launch tv3d_primal_kernel; all contiguous, none sharing memory."""
    if x.numel() == 0:
        return
    slices, rows, columns = x.shape
    with torch.cuda.device_of(x):
        tv3d_primal_kernel[(triton.cdiv(rows * columns, block), slices)](
            x, xbar, p, g, slices, rows, columns, tau, fz, fy, fx,
            NONNEGATIVE=nonnegative, BLOCK=block, enable_fp_fusion=True,
        )  # fmt: skip


_SIZES = {"slices": "i32", "rows": "i32", "columns": "i32", "fz": "fp64", "fy": "fp64", "fx": "fp64"}
VARIANTS = [
    variant
    for dtype in ("fp32", "fp64")
    for variant in (
        Variant(
            f"dual-{dtype}",
            tv3d_dual_kernel,
            {"p_ptr": f"*{dtype}", "xbar_ptr": f"*{dtype}", **_SIZES, "sigma": "fp64", "limit": "fp64"},
            {"BLOCK": 1024},
            max_registers=128,
            aligned=("p_ptr", "xbar_ptr", "columns"),
            load_bits=128,
            store_bits=128,
        ),
        Variant(
            f"primal-{dtype}",
            tv3d_primal_kernel,
            {**{f"{v}_ptr": f"*{dtype}" for v in ("x", "xbar", "p", "g")}, **_SIZES, "tau": "fp64"},
            {"NONNEGATIVE": True, "BLOCK": 1024},
            max_registers=128,
            aligned=("x_ptr", "xbar_ptr", "p_ptr", "g_ptr", "columns"),
            load_bits=128,
            store_bits=128,
        ),
    )
]

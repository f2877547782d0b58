"""Relative difference prior on CUDA: its gradient, and the pair terms that the EM update shares."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from recon3d.kernels.aot import Variant
from torch import Tensor


@triton.jit
def rdp_pair(x_ptr, a, at, stride, exists, m, weight, gamma, epsilon):
    """Gradient at a of the pair with the neighbour one stride on, and the curvature of the parabola above it."""
    b = tl.load(x_ptr + at + stride, mask=m & exists, other=0.0)
    b = tl.where(b < 0, 0.0, b)
    d = a - b
    size = tl.abs(d)
    c = 2 * b + epsilon
    r = 1 / (a + b + gamma * size + epsilon)
    q = 1 / (c + (gamma - 1) * size)
    slope = tl.where(exists, weight * (d * r * (1 + c * r)), 0.0)
    curvature = tl.where(exists, 2 * weight * (q * (1 + c * q)), 0.0)
    return slope, curvature


@triton.jit
def rdp_around(x_ptr, a, at, i, k, slices, rows, columns, m, gamma, epsilon, wz, wy, wx, IN_PLANE: tl.constexpr):
    """Sums of rdp_pair over the neighbours of voxel i of slice k."""
    pixels = rows * columns
    s0, c0 = rdp_pair(x_ptr, a, at, -pixels, k > 0, m, wz, gamma, epsilon)
    s1, c1 = rdp_pair(x_ptr, a, at, pixels, k < slices - 1, m, wz, gamma, epsilon)
    slope, curvature = s0 + s1, c0 + c1
    if IN_PLANE:
        column = i % columns
        s2, c2 = rdp_pair(x_ptr, a, at, -columns, i >= columns, m, wy, gamma, epsilon)
        s3, c3 = rdp_pair(x_ptr, a, at, columns, i < pixels - columns, m, wy, gamma, epsilon)
        s4, c4 = rdp_pair(x_ptr, a, at, -1, column > 0, m, wx, gamma, epsilon)
        s5, c5 = rdp_pair(x_ptr, a, at, 1, column < columns - 1, m, wx, gamma, epsilon)
        slope += (s2 + s3) + (s4 + s5)
        curvature += (c2 + c3) + (c4 + c5)
    return slope, curvature


@triton.jit
def rdp_gradient_kernel(
    x_ptr,
    out_ptr,
    slices,
    rows,
    columns,
    gamma: tl.float64,
    epsilon: tl.float64,
    wz: tl.float64,
    wy: tl.float64,
    wx: tl.float64,
    IN_PLANE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out = dR/dx; one program per BLOCK voxels of one slice."""
    k = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m = i < rows * columns
    at = k * (rows * columns) + i
    e = x_ptr.dtype.element_ty
    a = tl.load(x_ptr + at, mask=m, other=0.0)
    slope, _ = rdp_around(
        x_ptr, a, at, i, k, slices, rows, columns, m, tl.full((), gamma, e), tl.full((), epsilon, e),
        tl.full((), wz, e), tl.full((), wy, e), tl.full((), wx, e), IN_PLANE,
    )  # fmt: skip
    tl.store(out_ptr + at, slope, mask=m)


def gradient(
    x: Tensor, out: Tensor, gamma: float, epsilon: float, weights: tuple[float, float, float], block: int = 512
) -> None:
    """Launch rdp_gradient_kernel; x and out contiguous [z, y, x], not sharing memory."""
    if x.numel() == 0:
        return
    slices, rows, columns = x.shape
    with torch.cuda.device_of(x):
        rdp_gradient_kernel[(triton.cdiv(rows * columns, block), slices)](
            x, out, slices, rows, columns, gamma, epsilon, *weights,
            IN_PLANE=bool(weights[1] or weights[2]), BLOCK=block, enable_fp_fusion=True,
        )  # fmt: skip


_SIZES = {"slices": "i32", "rows": "i32", "columns": "i32"}
_NUMBERS = dict.fromkeys(("gamma", "epsilon", "wz", "wy", "wx"), "fp64")
VARIANTS = [
    Variant(
        f"gradient-{dtype}{'' if in_plane else '-z'}",
        rdp_gradient_kernel,
        {"x_ptr": f"*{dtype}", "out_ptr": f"*{dtype}", **_SIZES, **_NUMBERS},
        {"IN_PLANE": in_plane, "BLOCK": 512},
        max_registers=128,
        aligned=("x_ptr", "out_ptr", "columns"),
        load_bits=128,
        store_bits=128,
    )
    for dtype in ("fp32", "fp64")
    for in_plane in (False, True)
]

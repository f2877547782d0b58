"""Separable Gaussian blur on CUDA: one pass over the volume for every axis, zeros outside."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from recon3d.kernels.aot import Variant
from torch import Tensor


@triton.jit
def blur_axis_kernel(x_ptr, w_ptr, out_ptr, total, stride, length, radius, BLOCK: tl.constexpr):
    """out = weighted sum of x over 2 radius + 1 neighbours at `stride` along an axis of `length`; any leading axes."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m = at < total
    place = at // stride % length
    value = tl.load(w_ptr) * tl.load(x_ptr + at, mask=m, other=0.0)
    k = 1
    while k <= radius:
        low = tl.load(x_ptr + at - k * stride, mask=m & (place >= k), other=0.0)
        high = tl.load(x_ptr + at + k * stride, mask=m & (place < length - k), other=0.0)
        value += tl.load(w_ptr + k) * (low + high)
        k += 1
    tl.store(out_ptr + at, value, mask=m)


def blur(x: Tensor, weights: list[list[float]], block: int = 1024) -> Tensor:
    """Blur contiguous volumes [n, z, y, x] with weights 0..radius along z, y and x; a new tensor."""
    if x.numel() == 0:
        return torch.empty_like(x)
    out, total = x, x.numel()
    for axis, w in enumerate(weights, start=1):
        if len(w) == 1 and axis < 3:  # nothing to do, but the last axis at least makes the copy
            continue
        source, out = out, torch.empty_like(x)
        taps = torch.tensor(w, dtype=x.dtype).to(x.device, non_blocking=True)
        with torch.cuda.device_of(x):
            blur_axis_kernel[(triton.cdiv(total, block),)](
                source, taps, out, total, x.stride(axis), x.shape[axis], len(w) - 1, BLOCK=block, enable_fp_fusion=True
            )
    return out


VARIANTS = [
    Variant(
        dtype,
        blur_axis_kernel,
        {"x_ptr": f"*{dtype}", "w_ptr": f"*{dtype}", "out_ptr": f"*{dtype}", "total": "i64", "stride": "i32",
         "length": "i32", "radius": "i32"},
        {"BLOCK": 1024},
        max_registers=128,
        aligned=("x_ptr", "out_ptr", "total"),
        store_bits=128,
    )
    for dtype in ("fp32", "fp64")
]  # fmt: skip

"""Total variation along z on CUDA: differences, their normal operator, and the one-pass ADMM update.

The update walks each block of pixel columns from the last slice to the first in tiles of [SLICES, PIXELS]. A tile
also forms the row before its own from what is still unchanged, so z, w and g cost one sweep even when w is updated in
place.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from recon3d.kernels.aot import Variant
from torch import Tensor

DIFF, ADJOINT, NORMAL = 0, 1, 2


@triton.jit
def tvz_stencil_kernel(
    x_ptr,
    out_ptr,
    slices,
    pixels,
    scale: tl.float64,
    KIND: tl.constexpr,
    ADD: tl.constexpr,
    PERIODIC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out (+)= scale times D x, D^T x or D^T D x; one program per BLOCK pixels of one slice."""
    k = tl.program_id(1).to(tl.int64)
    p = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m = p < pixels
    first, last = k == 0, k == slices - 1
    before_k = tl.where(first, (slices - 1 if PERIODIC else 0), k - 1)
    after_k = tl.where(last, (0 if PERIODIC else slices - 1), k + 1)
    here = tl.load(x_ptr + k * pixels + p, mask=m, other=0.0)
    factor = tl.full((), scale, x_ptr.dtype.element_ty)
    if KIND == 0:
        out = factor * (tl.load(x_ptr + after_k * pixels + p, mask=m, other=0.0) - here)
    elif KIND == 1:
        before = tl.load(x_ptr + before_k * pixels + p, mask=m, other=0.0)
        if not PERIODIC:  # the last difference does not exist
            before = tl.where(first, 0.0, before)
            here = tl.where(last, 0.0, here)
        out = factor * (before - here)
    else:
        before = tl.load(x_ptr + before_k * pixels + p, mask=m, other=0.0)
        after = tl.load(x_ptr + after_k * pixels + p, mask=m, other=0.0)
        out = factor * ((here - before) + (here - after))
    if ADD:
        out += tl.load(out_ptr + k * pixels + p, mask=m, other=0.0)
    tl.store(out_ptr + k * pixels + p, out, mask=m)


@triton.jit
def _split_and_dual(x_ptr, w_ptr, at, after, m, threshold, factor):
    """z' and w' of a row: a = factor (x_after - x_at) + w_at, cut at the threshold."""
    a = factor * (tl.load(x_ptr + after, mask=m, other=0.0) - tl.load(x_ptr + at, mask=m, other=0.0))
    a += tl.load(w_ptr + at, mask=m, other=0.0)
    w = tl.where(a > threshold, threshold, a)
    w = tl.where(w < -threshold, -threshold, w)  # a NaN stays one
    return a - w, w


@triton.jit
def tvz_update_kernel(
    x_ptr,
    w_ptr,
    z_ptr,
    w_new_ptr,
    g_ptr,
    slices,
    pixels,
    threshold: tl.float64,
    scale: tl.float64,
    HAS_Z: tl.constexpr,
    PERIODIC: tl.constexpr,
    SLICES: tl.constexpr,
    PIXELS: tl.constexpr,
):
    """z', w' = split(scale D x + w), g = scale D1^T (z' - w'); one program per PIXELS columns of all slices."""
    p = tl.program_id(0).to(tl.int64) * PIXELS + tl.arange(0, PIXELS)[None, :]
    inside = p < pixels
    factor = tl.full((), scale, x_ptr.dtype.element_ty)
    limit = tl.full((), threshold, x_ptr.dtype.element_ty)
    start = (slices - 1) // SLICES * SLICES
    while start >= 0:  # from the last slices to the first: what this tile overwrites, no later one reads
        k = start + tl.arange(0, SLICES)[:, None].to(tl.int64)
        m = inside & (k < slices)
        at = k * pixels + p
        if PERIODIC:
            after = tl.where(k == slices - 1, 0, k + 1) * pixels + p
            before = tl.where(k == 0, slices - 1, k - 1) * pixels + p
            has_before = m
        else:
            after = tl.where(k == slices - 1, k, k + 1) * pixels + p
            before = at - pixels
            has_before = m & (k > 0)
        z, w = _split_and_dual(x_ptr, w_ptr, at, after, m, limit, factor)
        z_before, w_before = _split_and_dual(x_ptr, w_ptr, before, at, has_before, limit, factor)
        v_before = tl.where(has_before, z_before - w_before, 0.0)
        v = z - w
        if not PERIODIC:
            v = tl.where(k == slices - 1, 0.0, v)  # the last difference does not exist
        tl.debug_barrier()  # another thread of this program may still read a row that this one writes
        if HAS_Z:
            tl.store(z_ptr + at, z, mask=m)
        tl.store(w_new_ptr + at, w, mask=m)
        tl.store(g_ptr + at, factor * (v_before - v), mask=m)
        start -= SLICES


def stencil(kind: int, x: Tensor, out: Tensor, scale: float, periodic: bool, add: bool, block: int = 1024) -> None:
    """Launch tvz_stencil_kernel; x and out contiguous [z, ...], not sharing memory."""
    slices, pixels = x.shape[0], x[:1].numel()
    if x.numel() == 0:
        return
    grid = (triton.cdiv(pixels, block), slices)
    with torch.cuda.device_of(x):
        tvz_stencil_kernel[grid](
            x, out, slices, pixels, scale, KIND=kind, ADD=add, PERIODIC=periodic, BLOCK=block, enable_fp_fusion=True
        )


def update(
    x: Tensor,
    w: Tensor,
    z: Tensor | None,
    w_new: Tensor,
    g: Tensor,
    threshold: float,
    scale: float,
    periodic: bool,
    tile: tuple[int, int] = (16, 64),
) -> None:
    """Launch tvz_update_kernel; all contiguous [z, ...]; w_new may be w, nothing else may share memory."""
    slices, pixels = x.shape[0], x[:1].numel()
    if x.numel() == 0:
        return
    if periodic and w_new is w:
        w = w.clone()  # slice 0 needs the last slice's old dual, which the walk has overwritten by then
    rows = min(tile[0], triton.next_power_of_2(slices))
    with torch.cuda.device_of(x):
        tvz_update_kernel[(triton.cdiv(pixels, tile[1]),)](
            x, w, w if z is None else z, w_new, g, slices, pixels, threshold, scale,
            HAS_Z=z is not None, PERIODIC=periodic, SLICES=rows, PIXELS=tile[1], enable_fp_fusion=True,
        )  # fmt: skip


_SIZES = {"slices": "i32", "pixels": "i32"}
VARIANTS = [
    *(
        Variant(
            f"{name}-{dtype}",
            tvz_stencil_kernel,
            {"x_ptr": f"*{dtype}", "out_ptr": f"*{dtype}", **_SIZES, "scale": "fp64"},
            {"KIND": kind, "ADD": bool(add), "PERIODIC": False, "BLOCK": 1024},
            aligned=("x_ptr", "out_ptr", "pixels"),
            load_bits=128,
            store_bits=128,
        )
        for name, kind, add in (("diff", 0, 0), ("adjoint", 1, 0), ("normal", 2, 0), ("add-normal", 2, 1))
        for dtype in ("fp32", "fp64")
    ),
    *(
        Variant(
            f"update-{dtype}{'' if split else '-dual-only'}",
            tvz_update_kernel,
            {**{f"{v}_ptr": f"*{dtype}" for v in ("x", "w", "z", "w_new", "g")}, **_SIZES,
             "threshold": "fp64", "scale": "fp64"},
            {"HAS_Z": split, "PERIODIC": False, "SLICES": 16, "PIXELS": 64},
            max_registers=128 if dtype == "fp32" else 255,
            aligned=("x_ptr", "w_ptr", "z_ptr", "w_new_ptr", "g_ptr", "pixels"),
            load_bits=128,
            store_bits=128,
        )
        for dtype in ("fp32", "fp64")
        for split in (True, False)
    ),
]  # fmt: skip

"""One conjugate gradient step on CUDA: three sweeps, and two tiny kernels between them that make the scalars.

A slice is summed in chunks of CHUNK in float64 and the chunks in a fixed tree, so neither the batch nor the schedule of
the GPU changes a bit; no scalar visits the host.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from recon3d.kernels.aot import Variant
from torch import Tensor

CHUNK = 8192  # as in csrc/cpu/cg.h; enough programs for a GPU from 2 million elements on


@triton.jit
def cg_curvature_kernel(p_ptr, q_ptr, sums_ptr, n, chunks, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    """sums = <p, q>; one program per chunk of a slice."""
    slice_start = tl.program_id(1).to(tl.int64) * n
    chunk = tl.program_id(0)
    total = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, CHUNK, BLOCK):
        i = chunk * CHUNK + start + tl.arange(0, BLOCK)
        m = i < n
        p = tl.load(p_ptr + slice_start + i, mask=m, other=0.0)
        q = tl.load(q_ptr + slice_start + i, mask=m, other=0.0)
        total += p.to(tl.float64) * q.to(tl.float64)
    tl.store(sums_ptr + tl.program_id(1).to(tl.int64) * chunks + chunk, tl.sum(total, 0))


@triton.jit
def _summed(sums_ptr, count, BLOCK: tl.constexpr):
    """Sum of `count` values, BLOCK running sums and then their tree."""
    total = tl.zeros((BLOCK,), tl.float64)
    start = 0
    while start < count:
        i = start + tl.arange(0, BLOCK)
        total += tl.load(sums_ptr + i, mask=i < count, other=0.0)
        start += BLOCK
    return tl.sum(total, 0)


@triton.jit
def cg_alpha_kernel(sums_ptr, rz_ptr, alpha_ptr, live_ptr, share, BLOCK: tl.constexpr):
    """alpha = rz / <p, q>, and rz itself or 0 where the step is frozen; one program per scalar."""
    s = tl.program_id(0).to(tl.int64)
    curvature = _summed(sums_ptr + s * share, share, BLOCK)
    rz = tl.load(rz_ptr + s)
    frozen = (rz == 0) | (curvature <= 0)  # false for a NaN, which must stay visible
    tl.store(alpha_ptr + s, tl.where(frozen, 0.0, rz / tl.where(frozen, 1.0, curvature)))
    tl.store(live_ptr + s, tl.where(frozen, 0.0, rz))


@triton.jit
def cg_residual_kernel(
    r_ptr, q_ptr, alpha_ptr, sums_ptr, n, chunks, PER_SLICE: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr
):
    """r -= alpha q, sums = <r, r>; one program per chunk of a slice."""
    k = tl.program_id(1).to(tl.int64)
    chunk = tl.program_id(0)
    alpha = tl.load(alpha_ptr + (k if PER_SLICE else 0)).to(r_ptr.dtype.element_ty)
    total = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, CHUNK, BLOCK):
        i = chunk * CHUNK + start + tl.arange(0, BLOCK)
        m = i < n
        r = tl.load(r_ptr + k * n + i, mask=m, other=0.0) - alpha * tl.load(q_ptr + k * n + i, mask=m, other=0.0)
        tl.store(r_ptr + k * n + i, r, mask=m)
        r = tl.where(m, r, 0.0).to(tl.float64)
        total += r * r
    tl.store(sums_ptr + k * chunks + chunk, tl.sum(total, 0))


@triton.jit
def cg_beta_kernel(sums_ptr, live_ptr, beta_ptr, rz_new_ptr, share, BLOCK: tl.constexpr):
    """rz' = <r, r> and beta = rz' / rz, both 0 where frozen; one program per scalar."""
    s = tl.program_id(0).to(tl.int64)
    residual = _summed(sums_ptr + s * share, share, BLOCK)
    live = tl.load(live_ptr + s)
    tl.store(rz_new_ptr + s, tl.where(live == 0, 0.0, residual))
    tl.store(beta_ptr + s, tl.where(live == 0, 0.0, residual / tl.where(live == 0, 1.0, live)))


@triton.jit
def cg_direction_kernel(x_ptr, p_ptr, r_ptr, alpha_ptr, beta_ptr, n, PER_SLICE: tl.constexpr, BLOCK: tl.constexpr):
    """x += alpha p, p = r + beta p; one program per BLOCK of a slice."""
    k = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m = i < n
    at = k * n + i
    scalar = k if PER_SLICE else 0
    alpha = tl.load(alpha_ptr + scalar).to(x_ptr.dtype.element_ty)
    beta = tl.load(beta_ptr + scalar).to(x_ptr.dtype.element_ty)
    p = tl.load(p_ptr + at, mask=m, other=0.0)
    x = tl.load(x_ptr + at, mask=m, other=0.0)
    r = tl.load(r_ptr + at, mask=m, other=0.0)
    tl.store(x_ptr + at, x + alpha * p, mask=m)
    tl.store(p_ptr + at, r + beta * p, mask=m)


def step(x: Tensor, r: Tensor, p: Tensor, q: Tensor, rz: Tensor, chunk: int = CHUNK, block: int = 1024) -> Tensor:
    """Launch one step on contiguous vectors [slice, ...]; returns rz' and waits for nothing."""
    rz_new = torch.empty_like(rz)
    per_slice = rz.ndim == 1
    slices, n = x.shape[0], x[:1].numel()
    if x.numel() == 0:
        return rz_new.zero_()
    chunks = triton.cdiv(n, chunk)
    sums = torch.empty((slices, chunks), dtype=torch.float64, device=x.device)
    alpha, beta, live = torch.empty((3, max(1, rz.numel())), dtype=torch.float64, device=x.device)
    share = chunks if per_slice else slices * chunks
    scalars, grid = (rz.numel(),), (chunks, slices)
    with torch.cuda.device_of(x):
        cg_curvature_kernel[grid](p, q, sums, n, chunks, CHUNK=chunk, BLOCK=block, enable_fp_fusion=True)
        cg_alpha_kernel[scalars](sums, rz, alpha, live, share, BLOCK=256, enable_fp_fusion=True)
        cg_residual_kernel[grid](
            r, q, alpha, sums, n, chunks, PER_SLICE=per_slice, CHUNK=chunk, BLOCK=block, enable_fp_fusion=True
        )
        cg_beta_kernel[scalars](sums, live, beta, rz_new, share, BLOCK=256, enable_fp_fusion=True)
        cg_direction_kernel[(triton.cdiv(n, block), slices)](
            x, p, r, alpha, beta, n, PER_SLICE=per_slice, BLOCK=block, enable_fp_fusion=True
        )
    return rz_new


def _signature(dtype: str, *vectors: str) -> dict[str, str]:
    return {f"{v}_ptr": f"*{dtype}" for v in vectors}


_SCALARS = {"alpha_ptr": "*fp64", "beta_ptr": "*fp64", "live_ptr": "*fp64", "rz_ptr": "*fp64", "rz_new_ptr": "*fp64"}
_SWEEP = {"CHUNK": CHUNK, "BLOCK": 1024}
VARIANTS = [
    *(
        variant
        for dtype, limit in (("fp32", 96), ("fp64", 96))
        for variant in (
            Variant(
                f"curvature-{dtype}",
                cg_curvature_kernel,
                {**_signature(dtype, "p", "q"), "sums_ptr": "*fp64", "n": "i32", "chunks": "i32"},
                _SWEEP,
                max_registers=limit,
                max_shared=64,
                aligned=("p_ptr", "q_ptr", "sums_ptr", "n"),
                load_bits=128,
            ),
            Variant(
                f"residual-{dtype}",
                cg_residual_kernel,
                {**_signature(dtype, "r", "q"), "alpha_ptr": "*fp64", "sums_ptr": "*fp64", "n": "i32", "chunks": "i32"},
                {"PER_SLICE": True, **_SWEEP},
                max_registers=limit,
                max_shared=64,
                aligned=("r_ptr", "q_ptr", "alpha_ptr", "sums_ptr", "n"),
                load_bits=128,
                store_bits=128,
            ),
            Variant(
                f"direction-{dtype}",
                cg_direction_kernel,
                {**_signature(dtype, "x", "p", "r"), "alpha_ptr": "*fp64", "beta_ptr": "*fp64", "n": "i32"},
                {"PER_SLICE": True, "BLOCK": 1024},
                max_registers=limit,
                aligned=("x_ptr", "p_ptr", "r_ptr", "alpha_ptr", "beta_ptr", "n"),
                load_bits=128,
                store_bits=128,
            ),
        )
    ),
    Variant(
        "alpha",
        cg_alpha_kernel,
        {"sums_ptr": "*fp64", "share": "i32", **{k: _SCALARS[k] for k in ("rz_ptr", "alpha_ptr", "live_ptr")}},
        {"BLOCK": 256},
        max_shared=64,
    ),
    Variant(
        "beta",
        cg_beta_kernel,
        {"sums_ptr": "*fp64", "share": "i32", **{k: _SCALARS[k] for k in ("live_ptr", "beta_ptr", "rz_new_ptr")}},
        {"BLOCK": 256},
        max_shared=64,
    ),
]

"""The fused step between noise levels in Triton; recon3d/ops/renoise.py has the formula.

renoise_kernel: u' = x0c + k (u - base) + w z, where x0c is given or is x0 pulled to y on (masked) pixels; a program
handles 4 BLOCK consecutive pixels of one slice, so u, x0 and x0c are read once and u' is written once, 128 bits a time.
renoise_block_kernel: data are block means; a program handles BLOCKS whole blocks, one row of its tile each, and draws
a pixel's noise alone, since four consecutive pixels may lie in different programs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .aot import Variant
from .philox import box_muller, mixed_normals, scalar, words

GIVEN = tl.constexpr(0)
IDENTITY = tl.constexpr(1)
MASK = tl.constexpr(2)


@triton.jit(do_not_specialize=["level", "stream", "seed"])
def renoise_kernel(
    u_ptr,
    x0_ptr,
    x0c_ptr,
    y_ptr,
    mask_ptr,
    out_ptr,
    anchors_ptr,
    coefficients_ptr,
    pixels,
    tiles,
    mask_stride,
    level,
    stream,
    seed,
    k_null: tl.float64,
    z_null: tl.float64,
    k_measured: tl.float64,
    z_measured: tl.float64,
    lam: tl.float64,
    KIND: tl.constexpr,
    CORRECTED: tl.constexpr,
    EPS: tl.constexpr,
    NOISE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per 4 BLOCK pixels of one slice; absent terms (EPS, NOISE) are neither read nor drawn."""
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    program = tl.program_id(0).to(tl.int64)
    row, first = program // tiles, (program % tiles) * BLOCK
    at = row * pixels + 4 * first
    pixel = tl.arange(0, 4 * BLOCK)
    inside = pixel < pixels - 4 * first
    if KIND == GIVEN:
        x0c = tl.load(x0c_ptr + at + pixel, mask=inside)
        k = scalar(k_null, dtype)
        w = scalar(z_null, dtype)
    else:
        x0 = tl.load(x0_ptr + at + pixel, mask=inside)
        y = tl.load(y_ptr + at + pixel, mask=inside)
        x0c = (1 - scalar(lam, dtype)) * x0 + scalar(lam, dtype) * y
        k = scalar(k_measured, dtype)
        w = scalar(z_measured, dtype)
        if KIND == MASK:
            seen = tl.load(mask_ptr + (row * mask_stride + 4 * first) + pixel, mask=inside, other=0) != 0
            x0c = tl.where(seen, x0c, x0)
            k = tl.where(seen, k, scalar(k_null, dtype))
            w = tl.where(seen, w, scalar(z_null, dtype))
    value = x0c
    if EPS:
        u = tl.load(u_ptr + at + pixel, mask=inside)
        if CORRECTED:
            value += k * (u - x0c)
        elif KIND == GIVEN:
            value += k * (u - tl.load(x0_ptr + at + pixel, mask=inside))
        else:
            value += k * (u - x0)
    if NOISE:
        block = first + tl.arange(0, BLOCK)
        one = tl.full((), 1, dtype)
        value += w * mixed_normals(anchors_ptr, coefficients_ptr, row, block, level, stream, seed, one, dtype)
    tl.store(out_ptr + at + pixel, value, mask=inside)


@triton.jit
def normal_of_pixel(index, pixel, level, stream, seed, dtype: tl.constexpr):
    """The normals of single pixels: their block's words, of which one pair is used."""
    w0, w1, w2, w3 = words(index, pixel >> 2, level, stream, seed)
    late = (pixel & 2) != 0
    even, odd = box_muller(tl.where(late, w2, w0), tl.where(late, w3, w1), dtype)
    return tl.where((pixel & 1) != 0, odd, even)


@triton.jit(do_not_specialize=["level", "stream", "seed"])
def renoise_block_kernel(
    u_ptr,
    x0_ptr,
    y_ptr,
    out_ptr,
    anchors_ptr,
    coefficients_ptr,
    blocks,
    columns,
    tiles,
    level,
    stream,
    seed,
    k_null: tl.float64,
    z_null: tl.float64,
    k_measured: tl.float64,
    z_measured: tl.float64,
    lam: tl.float64,
    FACTOR: tl.constexpr,
    CORRECTED: tl.constexpr,
    EPS: tl.constexpr,
    NOISE: tl.constexpr,
    BLOCKS: tl.constexpr,
    PIXELS: tl.constexpr,
):
    """One program per BLOCKS blocks of FACTOR x FACTOR pixels; PIXELS is the power of two that holds one block."""
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    program = tl.program_id(0).to(tl.int64)
    row = program // tiles
    b = (program % tiles) * BLOCKS + tl.arange(0, BLOCKS)
    t = tl.arange(0, PIXELS)
    inside = (b < blocks)[:, None] & (t < FACTOR * FACTOR)[None, :]
    corner = (b // (columns // FACTOR)) * FACTOR * columns + (b % (columns // FACTOR)) * FACTOR
    pixel = corner[:, None] + ((t // FACTOR) * columns + t % FACTOR)[None, :]
    at = row * blocks * (FACTOR * FACTOR) + pixel
    x0 = tl.load(x0_ptr + at, mask=inside, other=0.0)
    y = tl.load(y_ptr + row * blocks + b, mask=b < blocks, other=0.0)
    k = scalar(k_null, dtype)
    w = scalar(z_null, dtype)
    mean = scalar(1 / (FACTOR * FACTOR), dtype)
    shift = scalar(lam, dtype) * (y - tl.sum(x0, 1) * mean)
    term = shift
    value = x0
    if EPS:
        u = tl.load(u_ptr + at, mask=inside, other=0.0)
        eps_mean = tl.sum(u - x0, 1) * mean
        if CORRECTED:
            eps_mean -= shift
            term -= k * shift
        term += (scalar(k_measured, dtype) - k) * eps_mean
        value += k * (u - x0)
    if NOISE:
        z = tl.zeros([BLOCKS, PIXELS], dtype)
        for anchor in tl.static_range(2):
            c = tl.load(coefficients_ptr + 2 * row + anchor).to(dtype)
            if c != 0:
                z += c * normal_of_pixel(tl.load(anchors_ptr + 2 * row + anchor), pixel, level, stream, seed, dtype)
        z = tl.where(inside, z, 0.0)
        term += (scalar(z_measured, dtype) - w) * (tl.sum(z, 1) * mean)
        value += w * z
    tl.store(out_ptr + at, value + term[:, None], mask=inside)


def renoise(
    u: torch.Tensor,
    x0: torch.Tensor,
    x0c: torch.Tensor | None,
    y: torch.Tensor | None,
    mask: torch.Tensor | None,
    factor: int,
    anchors: torch.Tensor,
    coefficients: torch.Tensor,
    seed: int,
    level: int,
    stream: int,
    k_null: float,
    z_null: float,
    k_measured: float,
    z_measured: float,
    lam: float,
    corrected: bool,
    *,
    out: torch.Tensor | None = None,
    block: int = 256,
) -> torch.Tensor:
    """Launcher for recon3d::renoise and, with out = u, for recon3d::renoise_."""
    out = torch.empty_like(u) if out is None else out
    if out.numel() == 0:
        return out
    given = x0c is not None
    eps = k_null != 0 or (not given and k_measured != 0)
    noise = z_null != 0 or (not given and z_measured != 0)
    slices, pixels = u.shape[0], u[0].numel()
    rest = (level, stream, seed, k_null, z_null, k_measured, z_measured, lam)
    switches = {"CORRECTED": corrected, "EPS": eps, "NOISE": noise, "enable_fp_fusion": True}
    if factor > 1:
        held = triton.next_power_of_2(factor * factor)
        blocks, most = pixels // factor**2, max(1, 4 * block // held)
        tiles = triton.cdiv(blocks, most)
        renoise_block_kernel[(slices * tiles,)](
            u, x0, y, out, anchors, coefficients, blocks, u.shape[-1], tiles, *rest,
            FACTOR=factor, BLOCKS=most, PIXELS=held, **switches,
        )  # fmt: skip
        return out
    tiles = triton.cdiv(pixels, 4 * block)
    kind = 0 if given else 1 if mask is None else 2
    stride = 0 if mask is None or mask.numel() == pixels else pixels
    seen = None if mask is None else mask.view(torch.uint8)
    renoise_kernel[(slices * tiles,)](
        u, x0, x0c, y, seen, out, anchors, coefficients, pixels, tiles, stride, *rest,
        KIND=kind, BLOCK=block, **switches,
    )  # fmt: skip
    return out


_NUMBERS = {
    "level": "i32",
    "stream": "i32",
    "seed": "i64",
    "k_null": "fp64",
    "z_null": "fp64",
    "k_measured": "fp64",
    "z_measured": "fp64",
    "lam": "fp64",
}


def _pixelwise(kind: int, dtype: str, corrected: bool) -> Variant:
    data = {"u_ptr": f"*{dtype}", "x0_ptr": f"*{dtype}", "out_ptr": f"*{dtype}"}
    absent = {}
    for name, present, pointer in (
        ("x0c_ptr", kind == 0, f"*{dtype}"),
        ("y_ptr", kind > 0, f"*{dtype}"),
        ("mask_ptr", kind == 2, "*u8"),
    ):
        if present:
            data[name] = pointer
        else:
            absent[name] = None
    sizes = {"pixels": "i32", "tiles": "i32", "mask_stride": "i32"}
    return Variant(
        f"{('given', 'identity', 'mask')[kind]}-{dtype}{'-corrected' if corrected else ''}",
        renoise_kernel,
        {**data, "anchors_ptr": "*i64", "coefficients_ptr": "*fp32", **sizes, **_NUMBERS},
        {**absent, "KIND": kind, "CORRECTED": corrected, "EPS": True, "NOISE": True, "BLOCK": 256},
        max_registers=64 if dtype == "fp32" else 128,
        # two doubles fill a vector and a mask is loaded 16 bytes a thread, so values change owners
        max_shared=4096 if kind == 2 or dtype == "fp64" else 0,
        aligned=(*data, "anchors_ptr", "coefficients_ptr", "pixels", "mask_stride"),
        load_bits=128,
        store_bits=128,
    )


def _blockwise(factor: int) -> Variant:
    data = {"u_ptr": "*fp32", "x0_ptr": "*fp32", "y_ptr": "*fp32", "out_ptr": "*fp32", "anchors_ptr": "*i64"}
    held = triton.next_power_of_2(factor * factor)
    return Variant(
        f"block_mean-{factor}-fp32",
        renoise_block_kernel,
        {**data, "coefficients_ptr": "*fp32", "blocks": "i32", "columns": "i32", "tiles": "i32", **_NUMBERS},
        {
            "FACTOR": factor,
            "CORRECTED": True,
            "EPS": True,
            "NOISE": True,
            "BLOCKS": 1024 // held,
            "PIXELS": held,
        },
        max_registers=128,
        max_shared=8192,
        aligned=(*data, "coefficients_ptr", "columns"),
    )


VARIANTS = [
    _pixelwise(0, "fp32", False),
    _pixelwise(0, "fp32", True),
    _pixelwise(0, "fp64", False),
    _pixelwise(1, "fp32", False),
    _pixelwise(2, "fp32", False),
    _blockwise(2),
    _blockwise(3),
    _blockwise(4),
]

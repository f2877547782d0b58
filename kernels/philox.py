"""Keyed noise in Triton: the integers and normals of recon3d.ops.philox; renoise draws through the same functions.

A program handles BLOCK counters, that is 4 BLOCK consecutive pixels of one slice, four to a thread, so that loads and
stores of pixels are 128 bits wide. log, sin and cos are polynomials (the ones of csrc/philox.h, errors below one ulp of
float32), as the hardware's approximations differ from every other backend.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .aot import Variant


@triton.jit
def box_muller(w0, w1, dtype: tl.constexpr):
    """Two normals from two uint32 words; recon3d.ops.philox has the formula."""
    u = ((w0 >> 9).to(tl.int32).to(dtype) + 0.5) * 1.1920928955078125e-07  # 2^-23
    k = (w1 >> 9).to(tl.int32)
    quarter = (k + 1048576) >> 21
    f = ((k - (quarter << 21)).to(dtype) + 0.5) * 1.1920928955078125e-07  # turns, in [-1/8, 1/8]
    if dtype == tl.float32:
        bits = u.to(tl.int32, bitcast=True)
        e = (bits - 0x3F3504F3) >> 23
        t = (bits - (e << 23)).to(tl.float32, bitcast=True) - 1.0  # in [sqrt(1/2) - 1, sqrt(2) - 1]
        q = t * -0.07634429633617401 + 0.12761549651622772
        q = q * t - 0.131601944565773
        q = q * t + 0.14201761782169342
        q = q * t - 0.16623356938362122
        q = q * t + 0.20001226663589478
        q = q * t - 0.250008225440979
        q = q * t + 0.3333333134651184
        t2 = t * t
        ef = e.to(tl.float32)
        log = ef * 0.693359375 + (t + (t2 * (q * t - 0.5) + ef * -2.12194440e-4))
        f2 = f * f
        sin = f * (((f2 * -75.39356231689453 + 81.59235382080078) * f2 - 41.3416633605957) * f2 + 6.2831854820251465)
        cos = 1.0 + f2 * (
            ((f2 * 59.22924041748047 - 85.4432373046875) * f2 + 64.93932342529297) * f2 - 19.739208221435547
        )
    else:
        # log m = 2 atanh(s); the series, like those of sin and cos, is cut below the rounding of float64
        bits = u.to(tl.int64, bitcast=True)
        e = (bits - 0x3FE6A09E667F3BCD) >> 52
        t = (bits - (e << 52)).to(tl.float64, bitcast=True) - 1.0
        s = t / (t + 2.0)
        z = s * s
        p = tl.full(z.shape, 2 / 23, dtype)
        p = p * z + 2 / 21
        p = p * z + 2 / 19
        p = p * z + 2 / 17
        p = p * z + 2 / 15
        p = p * z + 2 / 13
        p = p * z + 2 / 11
        p = p * z + 2 / 9
        p = p * z + 2 / 7
        p = p * z + 2 / 5
        p = p * z + 2 / 3
        p = p * z + 2.0
        log = e.to(tl.float64) * 0.6931471805599453 + s * p
        x = f * 6.283185307179586
        x2 = x * x
        p = tl.full(x2.shape, 2.8114572543455206e-15, dtype)
        p = p * x2 + -7.647163731819816e-13
        p = p * x2 + 1.6059043836821613e-10
        p = p * x2 + -2.505210838544172e-08
        p = p * x2 + 2.7557319223985893e-06
        p = p * x2 + -0.0001984126984126984
        p = p * x2 + 0.008333333333333333
        p = p * x2 + -0.16666666666666666
        sin = x + x * x2 * p
        p = tl.full(x2.shape, 4.779477332387385e-14, dtype)
        p = p * x2 + -1.1470745597729725e-11
        p = p * x2 + 2.08767569878681e-09
        p = p * x2 + -2.755731922398589e-07
        p = p * x2 + 2.48015873015873e-05
        p = p * x2 + -0.001388888888888889
        p = p * x2 + 0.041666666666666664
        p = p * x2 + -0.5
        cos = 1.0 + x2 * p
    radius = tl.sqrt(log * -2.0)
    odd = (quarter & 1) == 1
    c = tl.where(odd, sin, cos)
    s = tl.where(odd, cos, sin)
    c = tl.where(((quarter + 1) & 2) == 2, -c, c)
    s = tl.where((quarter & 2) == 2, -s, s)
    return radius * c, radius * s


@triton.jit
def words(index, block, level, stream, seed):
    """The four uint32 words of each block of slice `index`."""
    block = block.to(tl.uint32)
    zero = tl.zeros_like(block)
    return tl.philox(
        seed, block, zero + index.to(tl.uint32), zero + level.to(tl.uint32), zero + stream.to(tl.uint32), n_rounds=10
    )


@triton.jit
def in_order(n0, n1, n2, n3):
    """[blocks] x 4 -> [4 blocks], word by word; stays within a thread."""
    return tl.reshape(tl.join(tl.join(n0, n2), tl.join(n1, n3)), [4 * n0.shape[0]])


@triton.jit
def normals(index, block, level, stream, seed, dtype: tl.constexpr):
    """Normals of the 4 pixels of each block, [4 blocks]."""
    w0, w1, w2, w3 = words(index, block, level, stream, seed)
    n0, n1 = box_muller(w0, w1, dtype)
    n2, n3 = box_muller(w2, w3, dtype)
    return in_order(n0, n1, n2, n3)


@triton.jit
def scalar(value, dtype: tl.constexpr):
    """A float64 argument in the data's dtype."""
    return (tl.full((), 0, tl.float64) + value).to(dtype)


@triton.jit
def mixed_normals(anchors_ptr, coefficients_ptr, slice_index, block, level, stream, seed, scale, dtype: tl.constexpr):
    """scale times the noise of a slice: two anchors, of which one with coefficient 0 is not drawn; [4 blocks]."""
    c0 = tl.load(coefficients_ptr + 2 * slice_index).to(dtype)
    c1 = tl.load(coefficients_ptr + 2 * slice_index + 1).to(dtype)
    z = tl.zeros([4 * block.shape[0]], dtype)
    if c0 != 0:
        z += (scale * c0) * normals(tl.load(anchors_ptr + 2 * slice_index), block, level, stream, seed, dtype)
    if c1 != 0:
        z += (scale * c1) * normals(tl.load(anchors_ptr + 2 * slice_index + 1), block, level, stream, seed, dtype)
    return z


@triton.jit(do_not_specialize=["level", "stream", "seed"])
def philox_bits_kernel(slices_ptr, bits_ptr, pixels, tiles, level, stream, seed, BLOCK: tl.constexpr):
    """bits[slice, pixel], one program per tile of 4 BLOCK pixels of one slice."""
    program = tl.program_id(0).to(tl.int64)
    row, first = program // tiles, (program % tiles) * BLOCK
    w0, w1, w2, w3 = words(tl.load(slices_ptr + row), first + tl.arange(0, BLOCK), level, stream, seed)
    pixel = tl.arange(0, 4 * BLOCK)
    bits = in_order(w0, w1, w2, w3).to(tl.int64)
    tl.store(bits_ptr + (row * pixels + 4 * first) + pixel, bits, mask=pixel < pixels - 4 * first)


@triton.jit(do_not_specialize=["level", "stream", "seed"])
def philox_normal_kernel(anchors_ptr, coefficients_ptr, z_ptr, pixels, tiles, level, stream, seed, BLOCK: tl.constexpr):
    """z[slice, pixel], one program per tile of 4 BLOCK pixels of one slice."""
    dtype: tl.constexpr = z_ptr.dtype.element_ty
    program = tl.program_id(0).to(tl.int64)
    row, first = program // tiles, (program % tiles) * BLOCK
    block = first + tl.arange(0, BLOCK)
    z = mixed_normals(anchors_ptr, coefficients_ptr, row, block, level, stream, seed, tl.full((), 1, dtype), dtype)
    pixel = tl.arange(0, 4 * BLOCK)
    tl.store(z_ptr + (row * pixels + 4 * first) + pixel, z, mask=pixel < pixels - 4 * first)


def philox_bits(
    slices: torch.Tensor, pixels: int, seed: int, level: int, stream: int, block: int = 256
) -> torch.Tensor:
    """Launcher for recon3d::philox_bits."""
    bits = torch.empty((slices.shape[0], pixels), dtype=torch.int64, device=slices.device)
    tiles = triton.cdiv(pixels, 4 * block)
    if bits.numel():
        philox_bits_kernel[(slices.shape[0] * tiles,)](
            slices, bits, pixels, tiles, level, stream, seed, BLOCK=block, enable_fp_fusion=True
        )
    return bits


def philox_normal(
    anchors: torch.Tensor,
    coefficients: torch.Tensor,
    pixels: int,
    seed: int,
    level: int,
    stream: int,
    wide: bool,
    block: int = 256,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Launcher for recon3d::philox_normal; out is for tests."""
    dtype = torch.float64 if wide else torch.float32
    z = torch.empty((anchors.shape[0], pixels), dtype=dtype, device=anchors.device) if out is None else out
    tiles = triton.cdiv(pixels, 4 * block)
    if z.numel():
        philox_normal_kernel[(anchors.shape[0] * tiles,)](
            anchors, coefficients, z, pixels, tiles, level, stream, seed, BLOCK=block, enable_fp_fusion=True
        )
    return z


_KEY = {"level": "i32", "stream": "i32", "seed": "i64"}
VARIANTS = [
    Variant(
        "bits",
        philox_bits_kernel,
        {"slices_ptr": "*i64", "bits_ptr": "*i64", "pixels": "i32", "tiles": "i32", **_KEY},
        {"BLOCK": 256},
        max_registers=48,
        max_shared=4096,  # words become int64, two to a vector
        aligned=("slices_ptr", "bits_ptr", "pixels"),
    ),
    *(
        Variant(
            f"normal-{dtype}",
            philox_normal_kernel,
            {
                "anchors_ptr": "*i64",
                "coefficients_ptr": "*fp32",
                "z_ptr": f"*{dtype}",
                "pixels": "i32",
                "tiles": "i32",
                **_KEY,
            },
            {"BLOCK": 256},
            max_registers=limit,
            max_shared=0 if dtype == "fp32" else 8192,
            aligned=("anchors_ptr", "coefficients_ptr", "z_ptr", "pixels"),
        )
        for dtype, limit in (("fp32", 64), ("fp64", 128))
    ),
]

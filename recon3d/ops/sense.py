"""SENSE normal operators of Cartesian and of gridded non-Cartesian MRI, with the coils in the vector lanes.

    A^H A x = sum_c conj(S_c) F^H M F S_c x        M diagonal, F orthonormal, S_c the coil maps

never leaves the image grid: k-space exists one line, or one slice of eight coils, at a time. Centring (fftshift)
cancels except on M, so M alone is shifted. Where M depends on one axis the transform along the other axis cancels too,
and each line goes through one pair of transforms in the L1 cache. The normal operator of a trajectory is the same with
a kernel on the doubled grid, F of size 2 N on the padded slice (Toeplitz; Fessler et al., IEEE Trans. Signal Process.
53 (2005) 3393), here as transforms of size N: the frequencies 2 k + 1 of the doubled grid are those of the line turned
by exp(-i pi n / N).

Coils lie innermost in chunks of eight, [z, chunk, y, x, 8], so that a vector register holds one pixel of eight coils.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from recon3d.ops import _library

__all__ = ["SenseMaps", "pack_maps", "sense_normal", "sense_toeplitz"]

CHUNK = 8
# complex numbers of a line that the CUDA kernels hold in shared memory
_CUDA_LINE = {torch.complex64: 3072, torch.complex128: 1536}
_REAL = {torch.complex64: torch.float32, torch.complex128: torch.float64}


class SenseMaps:
    """Coil maps of a stack of slices, packed once for the normal operators.

    Args:
        maps: sensitivities, [z, coil, y, x] complex64 or complex128; kept as they are, not copied, in `.maps`.

    Raises:
        ValueError: not four axes, an axis without elements, or a gradient is asked for.
        TypeError: not complex.
    """

    def __init__(self, maps: Tensor) -> None:
        if maps.dtype not in _REAL:
            raise TypeError(f"SenseMaps: maps must be complex64 or complex128, got {maps.dtype}")
        if maps.ndim != 4 or 0 in maps.shape[1:]:
            raise ValueError(f"SenseMaps: maps must be [z, coil, y, x] with no empty axis, got {tuple(maps.shape)}")
        if maps.requires_grad and torch.is_grad_enabled():
            raise ValueError("SenseMaps: gradients with respect to maps are not offered; pass maps.detach()")
        self.maps = maps.detach()
        self._packed: dict[bool, Tensor] = {}

    @property
    def coils(self) -> int:
        """How many coils there are."""
        return self.maps.shape[1]

    def packed(self, along_y: bool = False) -> Tensor:
        """[z, chunk, y, x, 8], or [z, chunk, x, y, 8] for lines along y; made on first use, unused lanes are zero."""
        if along_y not in self._packed:
            _library.ensure()
            self._packed[along_y] = torch.ops.recon3d.sense_pack(self.maps, along_y)
        return self._packed[along_y]

    def to(self, *args: Any, **kwargs: Any) -> SenseMaps:
        """Copies on another device or in another precision, as Tensor.to."""
        return SenseMaps(self.maps.to(*args, **kwargs))


def pack_maps(maps: Tensor) -> SenseMaps:
    """Coil maps [z, coil, y, x] as the normal operators want them; see SenseMaps."""
    return SenseMaps(maps)


def sense_normal(x: Tensor, maps: SenseMaps | Tensor, mask: Tensor) -> Tensor:
    """Normal operator of Cartesian parallel imaging: sum over coils of conj(S) F^H mask F S x.

    F is the centred orthonormal transform of a slice: index k of a k-space axis is the frequency k - N // 2.

    Args:
        x: image, [z, y, x] complex64 or complex128.
        maps: coil maps [z, coil, y, x] of x's dtype, or those packed by pack_maps (do so where they are used again).
        mask: real, finite weights of k-space; 0 and 1 for a sampling pattern. [kx] or [1, kx]: one for all ky, the
            fast case; [ky, 1] likewise for all kx; [ky, kx]; or [z, ky, kx] with one pattern per slice (each size
            may be 1). A mask on the host that is constant along an axis is recognised.

    Returns:
        Like x. The gradient with respect to x is the operator itself; maps and mask have none.

    Raises:
        ValueError: a shape that does not fit, or a gradient asked for with respect to maps or mask.
        TypeError: x is not complex, or dtypes or devices differ.

    Kernels: torch (any device), C++ (CPU), CUDA (sizes with factors up to 7; others run in torch). A slice's result
    does not depend on its neighbours or on threads.

    >>> image, maps = torch.ones(1, 2, 4, dtype=torch.complex64), torch.ones(1, 3, 2, 4, dtype=torch.complex64)
    >>> sense_normal(image, maps, torch.ones(4)).real.tolist()
    [[[3.0, 3.0, 3.0, 3.0], [3.0, 3.0, 3.0, 3.0]]]
    """
    packed = _check("sense_normal", x, maps, mask=mask)
    z, ny, nx = x.shape
    if not 1 <= mask.ndim <= 3 or any(
        have not in (1, want) for have, want in zip(reversed(mask.shape), (nx, ny, z), strict=False)
    ):
        raise ValueError(
            f"sense_normal: mask must be [kx], [ky, kx] or [z, ky, kx] with sizes 1 or {(z, ny, nx)}, "
            f"got {tuple(mask.shape)}"
        )
    ops = torch.ops.recon3d
    weights = _compact(mask.detach().reshape(*[1] * (3 - mask.ndim), *mask.shape)).to(_REAL[x.dtype])
    _library.ensure()
    if weights.shape[1] == 1 or weights.shape[2] == 1:
        along_y = weights.shape[1] > 1
        line = torch.fft.ifftshift(weights.flatten(1), 1).expand(-1, ny if along_y else nx)
        # lengths without a CUDA kernel: the definition runs there, on the device and differentiable as it stands
        lines = _lines_reference if x.is_cuda and not serves_cuda(line.shape[1], x.dtype) else ops.sense_lines
        return lines(x, packed.packed(along_y), line.contiguous(), packed.coils, along_y)
    return _planes(x, packed, torch.fft.ifftshift(weights, (1, 2)))


def sense_toeplitz(x: Tensor, maps: SenseMaps | Tensor, kernel: Tensor) -> Tensor:
    """Normal operator of parallel imaging on a trajectory: sum of conj(S) crop(ifft2(kernel fft2(pad(S x)))).

    Args:
        x: image, [z, y, x] complex64 or complex128.
        maps: as in sense_normal.
        kernel: real, in FFT order on the doubled grid, [2 y, 2 x] or one per slice [z, 2 y, 2 x], with every scale
            included (nufft_toeplitz_kernel makes it).

    Returns:
        Like x. The gradient with respect to x is the operator itself; maps and kernel have none.

    Raises:
        ValueError: a shape that does not fit, or a gradient asked for with respect to maps or kernel.
        TypeError: x is not complex, or dtypes or devices differ.

    Kernels: torch (any device), C++ (CPU), CUDA (sizes with factors up to 7; others run in torch). A slice's result
    does not depend on its neighbours or on threads.
    """
    packed = _check("sense_toeplitz", x, maps, kernel=kernel)
    z, ny, nx = x.shape
    if kernel.ndim not in (2, 3) or kernel.shape[-2:] != (2 * ny, 2 * nx) or kernel.shape[:-2] not in ((), (1,), (z,)):
        raise ValueError(
            f"sense_toeplitz: kernel must be {(2 * ny, 2 * nx)}, or one per slice {(z, 2 * ny, 2 * nx)}, "
            f"got {tuple(kernel.shape)}"
        )
    weights = kernel.detach().reshape(-1, 2 * ny, 2 * nx).to(_REAL[x.dtype])
    _library.ensure()
    return _planes(x, packed, weights)


def serves_cuda(n: int, dtype: torch.dtype) -> bool:
    """Whether lines of n elements have a CUDA kernel: factors up to 7, and short enough for shared memory."""
    if not 0 < n <= _CUDA_LINE[dtype]:
        return False
    for prime in (2, 3, 5, 7):
        while n % prime == 0:
            n //= prime
    return n == 1


def _planes(x: Tensor, packed: SenseMaps, weights: Tensor) -> Tensor:
    if x.is_cuda and not all(serves_cuda(n, x.dtype) for n in x.shape[1:]):
        return _planes_reference(x, packed.packed(), weights, packed.coils)
    out: Tensor = torch.ops.recon3d.sense_planes(x, packed.packed(), weights, packed.coils)
    return out


def _check(op: str, x: Tensor, maps: SenseMaps | Tensor, **weights: Tensor) -> SenseMaps:
    if x.dtype not in _REAL:
        raise TypeError(f"{op}: x must be complex64 or complex128, got {x.dtype}")
    if x.ndim != 3 or 0 in x.shape[1:]:
        raise ValueError(f"{op}: x must be [z, y, x] with no empty slice, got shape {tuple(x.shape)}")
    if isinstance(maps, Tensor) and maps.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{op}: gradients with respect to maps are not offered; pass maps.detach()")
    packed = maps if isinstance(maps, SenseMaps) else SenseMaps(maps)
    have = packed.maps
    if (have.shape[0], *have.shape[2:]) != tuple(x.shape):
        raise ValueError(f"{op}: maps {tuple(have.shape)} do not fit x {tuple(x.shape)}; they must be [z, coil, y, x]")
    if have.dtype != x.dtype or have.device != x.device:
        raise TypeError(f"{op}: maps must be {x.dtype} on {x.device} like x, got {have.dtype} on {have.device}")
    for name, weight in weights.items():
        if weight.is_complex():
            raise TypeError(f"{op}: {name} must be real, got {weight.dtype}")
        if weight.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{op}: gradients with respect to {name} are not offered; pass {name}.detach()")
        if weight.device != x.device:
            raise TypeError(f"{op}: {name} must be on {x.device} like x, got {weight.device}")
    return packed


def _compact(mask: Tensor) -> Tensor:
    """Axes along which a mask on the host does not change, reduced to one element (a device is not made to wait)."""
    if mask.device.type != "cpu":
        return mask
    for axis in range(3):
        first = mask.narrow(axis, 0, 1)
        # one column or row decides most cases before the whole mask is read
        if mask.shape[axis] > 1 and bool((mask.narrow(axis, 1, 1) == first).all()) and bool((mask == first).all()):
            mask = first
    return mask


def _pack_shape(maps: Tensor, along_y: bool) -> tuple[int, ...]:
    z, coils, ny, nx = maps.shape
    return (z, -(-coils // CHUNK), *((nx, ny) if along_y else (ny, nx)), CHUNK)


def _pack_reference(maps: Tensor, along_y: bool) -> Tensor:
    out = maps.new_zeros(_pack_shape(maps, along_y))
    for c in range(out.shape[1]):  # not more than one chunk in transit
        part = maps[:, c * CHUNK : (c + 1) * CHUNK]
        out[:, c, :, :, : part.shape[1]] = part.permute(0, 3, 2, 1) if along_y else part.permute(0, 2, 3, 1)
    return out


def _unpack(maps: Tensor, coils: int) -> Tensor:
    """Maps of one slice, [coil, line, element]."""
    return maps.permute(0, 3, 1, 2).flatten(0, 1)[:coils]


def _lines_reference(x: Tensor, maps: Tensor, weights: Tensor, coils: int, along_y: bool) -> Tensor:
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    axis = 1 if along_y else 2
    for k in range(x.shape[0]):  # slice by slice: one slice of coils stays in the cache
        s = _unpack(maps[k], coils)
        s = s.transpose(1, 2) if along_y else s
        w = weights[k if weights.shape[0] > 1 else 0]
        y = torch.fft.fft(s * x[k], dim=axis) * (w[:, None] if along_y else w)
        out[k] = (s.conj() * torch.fft.ifft(y, dim=axis)).sum(0)
    return out


def _planes_reference(x: Tensor, maps: Tensor, weights: Tensor, coils: int) -> Tensor:
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    _, ny, nx = x.shape
    for k in range(x.shape[0]):
        s = _unpack(maps[k], coils)
        y = torch.fft.fft2(s * x[k], s=weights.shape[1:]) * weights[k if weights.shape[0] > 1 else 0]
        out[k] = (s.conj() * torch.fft.ifft2(y)[:, :ny, :nx]).sum(0)
    return out


def _fft_reference(x: Tensor, sign: int, shift: int) -> Tensor:
    y = torch.fft.fft(x) if sign < 0 else torch.fft.ifft(x, norm="forward")
    return y.roll(shift, 1)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, maps, weights, *ctx.rest = inputs
    ctx.save_for_backward(maps, weights)


def _lines_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return torch.ops.recon3d.sense_lines(grad, *ctx.saved_tensors, *ctx.rest), None, None, None, None


def _planes_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return torch.ops.recon3d.sense_planes(grad, *ctx.saved_tensors, *ctx.rest), None, None, None


def _like(x: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape)


_library.define(
    "sense_pack(Tensor maps, bool along_y) -> Tensor",
    _pack_reference,
    lambda maps, along_y: maps.new_empty(_pack_shape(maps, along_y)),
)
# maps packed; weights real, in FFT order, [1 or z, n] for lines and [1 or z, y, x] or [1 or z, 2 y, 2 x] for planes
_library.define(
    "sense_lines(Tensor x, Tensor maps, Tensor weights, int coils, bool along_y) -> Tensor",
    _lines_reference,
    _like,
    backward=_lines_backward,
    setup_context=_keep,
)
_library.define(
    "sense_planes(Tensor x, Tensor maps, Tensor weights, int coils) -> Tensor",
    _planes_reference,
    _like,
    backward=_planes_backward,
    setup_context=_keep,
)
# the FFT of the lane kernels by itself, for tests: x [row, n], unscaled; output k at (k + shift) mod n
_library.define("lane_fft(Tensor x, int sign, int shift) -> Tensor", _fft_reference, _like)

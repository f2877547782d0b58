"""Keyed Gaussian noise: z = f(seed, level, slice index, pixel), the same integers on every backend.

Philox4x32-10 turns a counter of four 32-bit words and a 64-bit key into four random words, with no state
between calls, so batch size, slab order, number of devices and restarts cannot change a draw. The counter is
(block of four consecutive pixels, slice index, level, stream), the key is the seed. Words (0, 1) and (2, 3)
each give two normals:

    radius = sqrt(-2 log u),  u = (w0 >> 9 + 1/2) 2^-23        angle = 2 pi v,  v = (w1 >> 9 + 1/2) 2^-23

both uniforms are exact in float32, so backends and dtypes differ only by the rounding of log, sin and cos. No
value exceeds 5.77 standard deviations (missing tail 8e-9).
Source: Salmon, Moraes, Dror, Shaw, SC 2011; Box and Muller, Ann. Math. Stat. 29 (1958) 610.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from recon3d.ops import _library

__all__ = ["NoiseKey", "philox4x32", "philox_bits", "philox_normal"]

_ROUND = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_WORD = 0xFFFFFFFF


@dataclass(frozen=True, eq=False)
class NoiseKey:
    """Which noise a stack of slices gets: z[k] = c[k,0] f(anchor[k,0]) + c[k,1] f(anchor[k,1]).

    Independent noise has anchor[k,0] = global slice index and c = (1, 0); correlated noise mixes two anchor
    fields with c0^2 + c1^2 = 1. A coefficient of 0 costs no draw. Constructors are in recon3d.noise.

    Attributes:
        seed: 0 <= seed < 2^64.
        level: which step of the trajectory, 0 <= level < 2^32.
        anchors: [slices, 2] int64 on the CPU, each 0 <= index < 2^32.
        coefficients: [slices, 2] float32 on the CPU.
        stream: what the noise is for, so that different uses of one level stay independent.
    """

    seed: int
    level: int
    anchors: Tensor
    coefficients: Tensor
    stream: int = 0
    _copies: dict[torch.device, tuple[Tensor, Tensor]] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**64:
            raise ValueError(f"NoiseKey: seed must be in [0, 2^64), got {self.seed}")
        for name, value in (("level", self.level), ("stream", self.stream)):
            if not 0 <= value < 2**32:
                raise ValueError(f"NoiseKey: {name} must be in [0, 2^32), got {value}")
        a, c = self.anchors, self.coefficients
        if a.dtype != torch.int64 or c.dtype != torch.float32 or a.device.type != "cpu" or c.device.type != "cpu":
            raise TypeError(
                "NoiseKey: anchors must be int64 and coefficients float32, both on the CPU, "
                f"got {a.dtype} on {a.device} and {c.dtype} on {c.device}"
            )
        if a.ndim != 2 or a.shape[1] != 2 or a.shape != c.shape:
            raise ValueError(
                "NoiseKey: anchors and coefficients must both be [slices, 2], "
                f"got {tuple(a.shape)} and {tuple(c.shape)}"
            )
        if a.numel() and not (int(a.min()) >= 0 and int(a.max()) <= _WORD):
            raise ValueError(f"NoiseKey: anchors must be in [0, 2^32), got {int(a.min())} to {int(a.max())}")

    @property
    def n_slices(self) -> int:
        """How many slices this key gives noise to."""
        return self.anchors.shape[0]

    def at(self, level: int, stream: int | None = None) -> NoiseKey:
        """The same slices at another level (and stream)."""
        return dataclasses.replace(self, level=level, stream=self.stream if stream is None else stream)

    def slab(self, start: int, stop: int) -> NoiseKey:
        """The key of slices [start, stop): they get the noise they have in the whole stack."""
        if not 0 <= start <= stop <= self.n_slices:
            raise ValueError(f"NoiseKey: slab [{start}, {stop}) is not inside the {self.n_slices} slices")
        return dataclasses.replace(
            self, anchors=self.anchors[start:stop], coefficients=self.coefficients[start:stop], _copies={}
        )

    def on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Anchors and coefficients on a device; copied once and kept for later levels."""
        if device not in self._copies:
            self._copies[device] = (
                self.anchors.to(device).contiguous(),
                self.coefficients.to(device).contiguous(),
            )
        return self._copies[device]

    def draw(
        self, shape: Sequence[int], dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> Tensor:
        """The noise itself, [slices, *shape]; what ops.renoise draws without storing it."""
        if dtype not in (torch.float32, torch.float64):
            raise TypeError(f"NoiseKey.draw: dtype must be float32 or float64, got {dtype}")
        pixels = _pixels("NoiseKey.draw", shape)
        _library.ensure()
        anchors, coefficients = self.on(torch.empty(0, device=device).device)
        z = torch.ops.recon3d.philox_normal(
            anchors, coefficients, pixels, _signed(self.seed), self.level, self.stream, dtype == torch.float64
        )
        return z.reshape(self.n_slices, *shape)


def philox4x32(counter: Tensor, key: int, rounds: int = 10) -> Tensor:
    """Philox4x32: four random words for each counter of four words.

    Args:
        counter: [..., 4] int64, each in [0, 2^32).
        key: 64 bits, 0 <= key < 2^64; the low half is key word 0.
        rounds: 10 as published; other numbers are for known-answer tests.

    Returns:
        [..., 4] int64 in [0, 2^32).

    >>> [f"{w:08x}" for w in philox4x32(torch.zeros(4, dtype=torch.int64), 0).tolist()]
    ['6627e8d5', 'e169c58d', 'bc57ac4c', '9b00dbd8']
    """
    if counter.dtype != torch.int64 or counter.ndim == 0 or counter.shape[-1] != 4:
        raise ValueError(f"philox4x32: counter must be [..., 4] int64, got {tuple(counter.shape)} {counter.dtype}")
    if not 0 <= key < 2**64:
        raise ValueError(f"philox4x32: key must be in [0, 2^64), got {key}")
    c0, c1, c2, c3 = counter.unbind(-1)
    return torch.stack(_rounds(c0, c1, c2, c3, key & _WORD, key >> 32, rounds), -1)


def philox_bits(seed: int, level: int, slices: Tensor | int, pixels: int, stream: int = 0) -> Tensor:
    """The random words behind the noise of some slices.

    Args:
        seed: 0 <= seed < 2^64.
        level: 0 <= level < 2^32.
        slices: global slice indices, int64 [slices] on any device, or a number n for slices 0 .. n-1.
        pixels: words per slice.
        stream: as in NoiseKey.

    Returns:
        int64 [slices, pixels] in [0, 2^32).

    Raises:
        ValueError: a number out of range.
        TypeError: slices is neither a number nor int64.
    """
    index = _indices("philox_bits", seed, level, slices, stream)
    pixels = _pixels("philox_bits", (pixels,))
    _library.ensure()
    bits: Tensor = torch.ops.recon3d.philox_bits(index.contiguous(), pixels, _signed(seed), level, stream)
    return bits


def philox_normal(
    seed: int,
    level: int,
    slices: Tensor | int,
    shape: Sequence[int],
    *,
    stream: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Independent standard normal noise for slices named by their global index.

    Args:
        seed: 0 <= seed < 2^64.
        level: 0 <= level < 2^32; each level has fresh noise.
        slices: global slice indices, int64 [slices], or a number n for slices 0 .. n-1.
        shape: of one slice; pixels are counted in row-major order.
        stream: what the noise is for, 0 <= stream < 2^32.
        dtype: float32 or float64 (the same draws, rounded later).
        device: where the noise is made.

    Returns:
        [slices, *shape].

    Raises:
        ValueError: a number out of range.
        TypeError: slices or dtype of a wrong type.

    Kernels: torch (any device), C++ (CPU), Triton (CUDA).

    >>> whole, part = philox_normal(7, 0, 4, (8, 8)), philox_normal(7, 0, torch.tensor([2, 3]), (8, 8))
    >>> torch.equal(whole[2:], part)
    True
    """
    index = _indices("philox_normal", seed, level, slices, stream).cpu()
    anchors = torch.stack([index, index], 1)
    coefficients = torch.tensor([1.0, 0.0]).expand(len(index), 2)
    return NoiseKey(seed, level, anchors, coefficients, stream).draw(shape, dtype, device)


def _indices(op: str, seed: int, level: int, slices: Tensor | int, stream: int) -> Tensor:
    if not 0 <= seed < 2**64:
        raise ValueError(f"{op}: seed must be in [0, 2^64), got {seed}")
    for name, value in (("level", level), ("stream", stream)):
        if not 0 <= value < 2**32:
            raise ValueError(f"{op}: {name} must be in [0, 2^32), got {value}")
    if isinstance(slices, int):
        if slices < 0:
            raise ValueError(f"{op}: the number of slices must not be negative, got {slices}")
        return torch.arange(slices)
    if not isinstance(slices, Tensor) or slices.dtype != torch.int64 or slices.ndim != 1:
        what = f"{tuple(slices.shape)} {slices.dtype}" if isinstance(slices, Tensor) else type(slices).__name__
        raise TypeError(f"{op}: slices must be a number or an int64 vector of slice indices, got {what}")
    if slices.numel() and not (int(slices.min()) >= 0 and int(slices.max()) <= _WORD):
        raise ValueError(f"{op}: slice indices must be in [0, 2^32), got {int(slices.min())} to {int(slices.max())}")
    return slices


def _pixels(op: str, shape: Sequence[int]) -> int:
    pixels = math.prod(shape)
    if any(n < 0 for n in shape) or pixels > 2**34:
        raise ValueError(f"{op}: a slice must have 0 to 2^34 pixels, got shape {tuple(shape)}")
    return pixels


def _signed(seed: int) -> int:
    # torch schemas know signed 64-bit integers only
    return seed - 2**64 if seed >= 2**63 else seed


def _rounds(
    c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor, k0: int, k1: int, rounds: int = 10
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    for _ in range(rounds):
        # int64 products wrap, which leaves all 64 bits right; >> keeps the sign, so the high word is masked
        p, q = c0 * _ROUND[0], c2 * _ROUND[1]
        c0, c1 = ((q >> 32) & _WORD) ^ c1 ^ k0, q & _WORD
        c2, c3 = ((p >> 32) & _WORD) ^ c3 ^ k1, p & _WORD
        k0, k1 = (k0 + _WEYL[0]) & _WORD, (k1 + _WEYL[1]) & _WORD
    return c0, c1, c2, c3


def words(slices: Tensor, pixels: int, seed: int, level: int, stream: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The four words of every block, each [slices, ceil(pixels / 4)]."""
    block = torch.arange(-(-pixels // 4), device=slices.device)
    c0, c1 = torch.broadcast_tensors(block[None], slices[:, None])
    return _rounds(c0, c1, torch.full_like(c0, level), torch.full_like(c0, stream), seed & _WORD, (seed >> 32) & _WORD)


def normals(slices: Tensor, pixels: int, seed: int, level: int, stream: int, dtype: torch.dtype) -> Tensor:
    """Reference draws, [slices, pixels]."""
    w = words(slices, pixels, seed, level, stream)
    z = [value for pair in ((w[0], w[1]), (w[2], w[3])) for value in _box_muller(*pair, dtype)]
    return torch.stack(z, -1).flatten(1)[:, :pixels]


def _box_muller(w0: Tensor, w1: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    radius = (-2 * (((w0 >> 9).to(dtype) + 0.5) * 2.0**-23).log()).sqrt()
    # the angle is reduced to an eighth of a turn in integers, so it is exact whatever the dtype
    k = w1 >> 9
    quarter = (k + (1 << 20)) >> 21
    angle = ((k - (quarter << 21)).to(dtype) + 0.5) * (2 * math.pi * 2.0**-23)
    sin, cos = angle.sin(), angle.cos()
    odd = (quarter & 1).bool()
    sin, cos = torch.where(odd, cos, sin), torch.where(odd, sin, cos)
    cos = torch.where(((quarter + 1) & 2).bool(), -cos, cos)
    sin = torch.where((quarter & 2).bool(), -sin, sin)
    return radius * cos, radius * sin


def mixed_normals(
    anchors: Tensor, coefficients: Tensor, pixels: int, seed: int, level: int, stream: int, dtype: torch.dtype
) -> Tensor:
    """Reference noise of a NoiseKey, [slices, pixels]."""
    c = coefficients.to(dtype)
    z = c[:, :1] * normals(anchors[:, 0], pixels, seed, level, stream, dtype)
    if bool((coefficients[:, 1] != 0).any()):
        z = z + c[:, 1:] * normals(anchors[:, 1], pixels, seed, level, stream, dtype)
    return z


def _bits_reference(slices: Tensor, pixels: int, seed: int, level: int, stream: int) -> Tensor:
    return torch.stack(words(slices, pixels, seed, level, stream), -1).flatten(1)[:, :pixels].contiguous()


def _normal_reference(
    anchors: Tensor, coefficients: Tensor, pixels: int, seed: int, level: int, stream: int, wide: bool
) -> Tensor:
    dtype = torch.float64 if wide else torch.float32
    return mixed_normals(anchors, coefficients, pixels, seed, level, stream, dtype).contiguous()


_library.define(
    "philox_bits(Tensor slices, int pixels, int seed, int level, int stream) -> Tensor",
    _bits_reference,
    lambda slices, pixels, seed, level, stream: slices.new_empty((slices.shape[0], pixels)),
)
_library.define(
    "philox_normal(Tensor anchors, Tensor coefficients, int pixels, int seed, int level, int stream, "
    "bool wide) -> Tensor",
    _normal_reference,
    lambda anchors, coefficients, pixels, seed, level, stream, wide: coefficients.new_empty(
        (anchors.shape[0], pixels), dtype=torch.float64 if wide else torch.float32
    ),
)


def _cuda(name: str) -> Any:
    def launch(*arguments: Any) -> Tensor:
        from recon3d.kernels import philox as kernels

        result: Tensor = getattr(kernels, name)(*arguments)
        return result

    return launch


if importlib.util.find_spec("triton") is not None:
    _library.register_cuda("philox_bits", _cuda("philox_bits"))
    _library.register_cuda("philox_normal", _cuda("philox_normal"))

"""What may be wrong with an image: noise, coarse pixels, blur. Linear operators whose singular values are known.

    y = A x + n        A the identity, the mean over blocks of voxels, or a separable symmetric blur

An image is mirrored at its faces where a blur looks beyond them, so a blur is a multiplication of cosine transforms
(type II): its singular vectors are cosines. Methods that need A+ or that weigh every singular component by its noise
(DDNM, DDNM+) therefore cost a transform and no solver. All operators take float32 and float64 on any device, any
leading batch axes and, where slices are not coupled, any number of slices.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from recon3d.operators.base import Coupling, LinearOperator, Space
from recon3d.ops.blur import blur_weights

__all__ = ["BlockMean", "Blur", "ImageOperator", "Nothing", "SameImage", "box_weights", "gaussian_weights"]

Shape = tuple[int, int, int]
Gain = Callable[[Tensor], Tensor]

# of the largest singular value; what is transferred less than this counts as lost in A+
_FLOOR = 1e-2


class ImageOperator(LinearOperator):
    """An operator on images with A = U diag(s) V^T known in closed form."""

    domain: Space
    range: Space
    coupling: Coupling = "slice"

    @abstractmethod
    def spectral(self, x: Tensor, gain: Gain) -> Tensor:
        """V diag(gain(s)) V^T x, where s is 0 for what A does not see.

        Args:
            x: [..., z, y, x].
            gain: singular values (a tensor in float64) to factors, elementwise.
        """

    @abstractmethod
    def largest(self) -> float:
        """The largest singular value."""

    def norm(self, weights: Tensor | None = None, iterations: int = 20) -> float:
        """Largest eigenvalue of A* W A; exact for weights that are one number."""
        if weights is not None and weights.numel() > 1:
            return super().norm(weights, iterations)
        return self.largest() ** 2 * (1.0 if weights is None else float(weights))

    def _check(self, x: Tensor, space: Space, what: str) -> None:
        first = 1 if self.coupling == "slice" else 0
        if x.ndim < 3 or tuple(x.shape[-3:][first:]) != space.shape[first:]:
            raise ValueError(f"{type(self).__name__}: the {what} must end in {space.shape}, got {tuple(x.shape)}")


class SameImage(ImageOperator):
    """A = 1: the image itself was measured, with noise.

    Args:
        shape: (z, y, x).
    """

    def __init__(self, shape: Shape) -> None:
        self.domain = self.range = _space(shape)

    def forward(self, x: Tensor) -> Tensor:
        """A copy of x."""
        self._check(x, self.domain, "image")
        return x.clone()

    def adjoint(self, y: Tensor) -> Tensor:
        """A copy of y."""
        self._check(y, self.range, "measurement")
        return y.clone()

    def pinv(self, y: Tensor) -> Tensor:
        """A copy of y."""
        return self.adjoint(y)

    def spectral(self, x: Tensor, gain: Gain) -> Tensor:
        """gain(1) x."""
        return x * _numbers(gain, 1.0)[0]

    def largest(self) -> float:
        """1."""
        return 1.0

    def slab(self, start: int, stop: int) -> SameImage:
        """The same for fewer slices."""
        return SameImage((stop - start, *self.domain.shape[1:]))  # type: ignore[arg-type]


class BlockMean(ImageOperator):
    """Means over blocks of voxels: coarser pixels, thicker slices.

    Its one singular value other than 0 is 1 / sqrt(voxels of a block).

    Args:
        shape: of the fine volume, (z, y, x).
        block: voxels of a block along z, y, x.

    Raises:
        ValueError: blocks do not tile the volume.
    """

    def __init__(self, shape: Shape, block: Shape) -> None:
        if len(block) != 3 or any(b < 1 for b in block):
            raise ValueError(f"BlockMean: block needs three sizes of at least 1 (z, y, x), got {block}")
        if any(n % b for n, b in zip(shape, block, strict=True)):
            raise ValueError(
                f"BlockMean: blocks of {' x '.join(map(str, block))} voxels do not tile a volume of "
                f"{' x '.join(map(str, shape))}; crop it or choose another factor"
            )
        self.block = block
        self.voxels = math.prod(block)
        self.coupling = "slice" if block[0] == 1 else "volume"
        self.domain = _space(shape)
        self.range = _space((shape[0] // block[0], shape[1] // block[1], shape[2] // block[2]))

    def forward(self, x: Tensor) -> Tensor:
        """Means of blocks."""
        self._check(x, self.domain, "image")
        (bz, by, bx), (*lead, nz, ny, nx) = self.block, x.shape
        return x.reshape(*lead, nz // bz, bz, ny // by, by, nx // bx, bx).mean((-5, -3, -1))

    def adjoint(self, y: Tensor) -> Tensor:
        """Each value to all voxels of its block, over their number."""
        return self._spread(y).div_(self.voxels)

    def pinv(self, y: Tensor) -> Tensor:
        """Each value to all voxels of its block, which is A+."""
        return self._spread(y)

    def spectral(self, x: Tensor, gain: Gain) -> Tensor:
        """gain(s) P x + gain(0) (x - P x), P x the blocks' means in their places."""
        seen, unseen = _numbers(gain, self.largest(), 0.0)
        return (x * unseen).add_(self._spread(self.forward(x)), alpha=seen - unseen)

    def largest(self) -> float:
        """1 / sqrt(voxels of a block)."""
        return self.voxels**-0.5

    def slab(self, start: int, stop: int) -> BlockMean:
        """The same for fewer slices."""
        if self.coupling == "volume":
            return super().slab(start, stop)  # type: ignore[return-value]
        return BlockMean((stop - start, *self.domain.shape[1:]), self.block)  # type: ignore[arg-type]

    def _spread(self, y: Tensor) -> Tensor:
        self._check(y, self.range, "measurement")
        for axis, times in zip((-3, -2, -1), self.block, strict=True):
            if times > 1:
                y = y.repeat_interleave(times, axis)
        return y if self.voxels > 1 else y.clone()


class Blur(ImageOperator):
    """A separable symmetric blur with the image mirrored at its faces; its own adjoint.

    Along an axis of n voxels the blur w_0, w_1, ... (each side alike) has the eigenvalues
    w_0 + 2 sum_k w_k cos(pi j k / n), j = 0 .. n-1.

    Args:
        shape: (z, y, x).
        weights: for z, y, x the weights of a voxel, its neighbour, the next one; (1.0,) leaves an axis alone.
        floor: of the largest singular value; smaller ones count as 0 in `pinv` and `spectral`, and there alone.

    Raises:
        ValueError: weights that do not add up to one over both sides.
    """

    def __init__(self, shape: Shape, weights: Sequence[Sequence[float]], floor: float = _FLOOR) -> None:
        if len(weights) != 3:
            raise ValueError(f"Blur: weights are needed for z, y and x, got {len(weights)}")
        for w in weights:
            if not (len(w) and all(map(math.isfinite, w)) and abs(w[0] + 2 * math.fsum(w[1:]) - 1) < 1e-6):
                raise ValueError(f"Blur: weights must be finite and add up to 1 over both sides, got {list(w)[:4]}")
        self.weights = [tuple(w) for w in weights]
        self.floor = floor
        self.domain = self.range = _space(shape)
        self.axes = tuple(axis for axis, w in zip((-3, -2, -1), self.weights, strict=True) if len(w) > 1)
        self.coupling = "volume" if -3 in self.axes else "slice"
        self._eigen = _eigenvalues(shape, self.weights)

    def forward(self, x: Tensor) -> Tensor:
        """The blurred image."""
        self._check(x, self.domain, "image")
        return self._multiply(x, self._eigen)

    def adjoint(self, y: Tensor) -> Tensor:
        """The blurred measurement: the blur is symmetric."""
        return self.forward(y)

    def pinv(self, y: Tensor) -> Tensor:
        """The image that blurs to y, without what is transferred less than `floor`."""
        self._check(y, self.range, "measurement")
        lost = self._eigen.abs() < self.floor * self.largest()
        return self._multiply(y, torch.where(lost, 0.0, self._eigen.masked_fill(lost, 1.0).reciprocal()))

    def spectral(self, x: Tensor, gain: Gain) -> Tensor:
        """gain of each cosine's transfer."""
        s = self._eigen.abs()
        return self._multiply(x, gain(torch.where(s < self.floor * self.largest(), 0.0, s)))

    def largest(self) -> float:
        """1 for weights that are not negative."""
        return float(self._eigen.abs().max())

    def slab(self, start: int, stop: int) -> Blur:
        """The same for fewer slices."""
        if self.coupling == "volume":
            return super().slab(start, stop)  # type: ignore[return-value]
        return Blur((stop - start, *self.domain.shape[1:]), self.weights, self.floor)  # type: ignore[arg-type]

    def _multiply(self, x: Tensor, gain: Tensor) -> Tensor:
        out = x
        for axis in self.axes:
            out = _dct(out, axis)
        out = out * gain.to(x)
        for axis in self.axes:
            out = _idct(out, axis)
        return out


class Nothing(LinearOperator):
    """Nothing was measured: the prior alone speaks, or a prior with a condition.

    Args:
        shape: of the volume, (z, y, x).
    """

    coupling: Coupling = "slice"

    def __init__(self, shape: Shape) -> None:
        self.domain = _space(shape)
        self.range = _space((shape[0], 0, 0))

    def forward(self, x: Tensor) -> Tensor:
        """No values."""
        return x.new_zeros(*x.shape[:-2], 0, 0)

    def adjoint(self, y: Tensor) -> Tensor:
        """Zero."""
        return y.new_zeros(*y.shape[:-2], *self.domain.shape[1:])

    def pinv(self, y: Tensor) -> Tensor:
        """Zero."""
        return self.adjoint(y)

    def norm(self, weights: Tensor | None = None, iterations: int = 20) -> float:
        """0."""
        return 0.0

    def slab(self, start: int, stop: int) -> Nothing:
        """The same for fewer slices."""
        return Nothing((stop - start, *self.domain.shape[1:]))  # type: ignore[arg-type]


def gaussian_weights(fwhm_voxels: float) -> list[float]:
    """A Gaussian of this full width at half maximum, cut at four standard deviations; weights from the middle out.

    >>> [round(w, 3) for w in gaussian_weights(2.3548)]
    [0.399, 0.242, 0.054, 0.004, 0.0]
    """
    sigma = fwhm_voxels / math.sqrt(8 * math.log(2))
    return blur_weights(sigma) if sigma > 0 else [1.0]


def box_weights(width_voxels: float) -> list[float]:
    """A mean over this width, with the part of the outer voxels that lies within; weights from the middle out.

    >>> box_weights(4.0)
    [0.25, 0.25, 0.125]
    """
    if width_voxels <= 1:
        return [1.0]
    half = width_voxels / 2
    inside = [min(1.0, half - k + 0.5) for k in range(math.ceil(half + 0.5)) if half - k + 0.5 > 1e-9]
    return [v / width_voxels for v in inside]


def _space(shape: Sequence[int]) -> Space:
    return Space(tuple(shape), torch.float32, "1")


def _numbers(gain: Gain, *singular: float) -> list[float]:
    values: list[float] = gain(torch.tensor(singular, dtype=torch.float64)).tolist()
    return values


def _eigenvalues(shape: Shape, weights: Sequence[Sequence[float]]) -> Tensor:
    """Products of the axes' eigenvalues, float64, broadcast over [z, y, x]."""
    out = torch.ones(1, 1, 1, dtype=torch.float64)
    for axis, (n, w) in enumerate(zip(shape, weights, strict=True)):
        if len(w) == 1:
            continue
        j = torch.arange(n, dtype=torch.float64)
        along = torch.full_like(j, w[0])
        for k, value in enumerate(w[1:], start=1):
            along += 2 * value * torch.cos(math.pi * k / n * j)
        side = [1, 1, 1]
        side[axis] = n
        out = out * along.reshape(side)
    return out


def _dct(x: Tensor, axis: int) -> Tensor:
    """Orthonormal cosine transform of type II along an axis, by one complex transform (Makhoul, 1980)."""
    v = x.movedim(axis, -1)
    n = v.shape[-1]
    v = torch.cat([v[..., ::2], v[..., 1::2].flip(-1)], -1)
    spectrum = torch.fft.fft(v)
    turn = _turn(n, x)
    out = spectrum.real * turn.real - spectrum.imag * turn.imag
    return out.mul_(_scale(n, x)).movedim(-1, axis)


def _idct(x: Tensor, axis: int) -> Tensor:
    """The inverse, and transpose, of _dct."""
    c = x.movedim(axis, -1)
    n = c.shape[-1]
    c = c / _scale(n, x)
    mirrored = torch.cat([torch.zeros_like(c[..., :1]), c[..., 1:].flip(-1)], -1)
    v = torch.fft.ifft(torch.complex(c, -mirrored) * _turn(n, x).conj()).real
    out = torch.empty_like(c)
    half = (n + 1) // 2
    out[..., ::2] = v[..., :half]
    out[..., 1::2] = v[..., half:].flip(-1)
    return out.movedim(-1, axis)


def _turn(n: int, like: Tensor) -> Tensor:
    angle = -math.pi / (2 * n) * torch.arange(n, dtype=torch.float64)
    return torch.polar(torch.ones_like(angle), angle).to(like.device, torch.promote_types(like.dtype, torch.complex64))


def _scale(n: int, like: Tensor) -> Tensor:
    scale = torch.full((n,), math.sqrt(2 / n), dtype=torch.float64)
    scale[0] = math.sqrt(1 / n)
    return scale.to(like)

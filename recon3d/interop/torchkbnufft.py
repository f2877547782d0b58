"""KbNufft and KbNufftAdjoint as torchkbnufft calls them, on recon3d's operators.

Images (B, C, [z,] y, x) complex, k-space (B, C, M) complex, trajectories `omega` (d, M) or (B, d, M) in radians per
pixel within [-pi, pi], axes ordered as the image's. The forward sign is e^{-i}, and unless `norm` says otherwise
nothing is scaled, so the adjoint is the conjugate transpose, not an inverse. Differentiable in images and k-space, and
in omega where it requires grad. Plans are kept and found again by the content of omega.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from recon3d.ops.nufft import NufftPlan, nufft, nufft_adjoint, nufft_plan

__all__ = ["KbNufft", "KbNufftAdjoint"]

Norm = Literal["ortho"] | None


class _Nufft:
    """What both directions share."""

    def __init__(self, im_size: Sequence[int], grid_size: Sequence[int] | None = None, *, eps: float = 1e-4) -> None:
        self.im_size = tuple(int(n) for n in im_size)
        self.grid_size = (
            tuple(int(n) for n in grid_size) if grid_size is not None else tuple(2 * n for n in self.im_size)
        )
        self.eps = float(eps)
        if len(self.grid_size) != len(self.im_size):
            raise ValueError(f"{self._name}: grid_size must have {len(self.im_size)} sizes, got {self.grid_size}")

    @property
    def _name(self) -> str:
        return type(self).__name__

    def _scale(self, norm: Norm) -> float:
        # our operators carry 1 / sqrt(prod N)
        root = math.sqrt(math.prod(self.im_size))
        if norm is None:
            return root
        if norm == "ortho":
            return root / math.sqrt(math.prod(self.grid_size))
        raise ValueError(f"{self._name}: norm must be None or 'ortho', got {norm!r}")

    def _check(self, data: Tensor, axes: int) -> None:
        if not data.is_complex():
            raise TypeError(f"{self._name}: complex data needed, got {data.dtype}; use torch.view_as_complex")
        if data.ndim != axes + 2:
            raise ValueError(f"{self._name}: (batch, coil, ...) of {axes + 2} axes needed, got {tuple(data.shape)}")

    def _each(self, op: Callable[[Tensor, NufftPlan], Tensor], data: Tensor, omega: Tensor) -> Tensor:
        """op on the whole batch, or on every element with its own trajectory."""
        d = len(self.im_size)
        if omega.ndim not in (2, 3) or omega.shape[-2] != d or (omega.ndim == 3 and len(omega) != len(data)):
            raise ValueError(
                f"{self._name}: omega must be ({d}, M), or ({len(data)}, {d}, M) with one per batch element, "
                f"got {tuple(omega.shape)}"
            )
        if omega.ndim == 2:
            return op(data, self._plan(omega, data))
        return torch.stack([op(x, self._plan(k, x)) for x, k in zip(data, omega, strict=True)])

    def _plan(self, omega: Tensor, data: Tensor) -> NufftPlan:
        return nufft_plan(omega.mT, self.im_size, eps=self.eps).to(data.device)


class KbNufft(_Nufft):
    """Images to k-space samples.

    Args:
        im_size: pixels of the image, ([nz,] ny, nx).
        grid_size: the oversampled grid whose size "ortho" divides by; None = twice im_size. It says nothing about the
            grid in use.
        eps: relative L2 error on white data; torchkbnufft's table interpolation reaches 7e-4.

    Raises:
        ValueError: sizes that do not fit each other.

    >>> KbNufft((4, 4))(torch.ones(1, 1, 4, 4) + 0j, torch.zeros(2, 1)).real.round(decimals=3).tolist()
    [[[16.0]]]
    """

    def __call__(self, image: Tensor, omega: Tensor, smaps: Tensor | None = None, norm: Norm = None) -> Tensor:
        """Samples of every image.

        Args:
            image: (B, C, [z,] y, x) complex; (B, 1, ...) with smaps.
            omega: (d, M) or (B, d, M), radians per pixel.
            smaps: coil maps (1 or B, C, [z,] y, x) that multiply the image first.
            norm: None = plain sums; "ortho" = divided by sqrt(prod grid_size), as torchkbnufft does.

        Returns:
            (B, C, M) complex.

        Raises:
            ValueError: shapes, a norm or an omega out of [-pi, pi] that do not fit.
            TypeError: image is not complex.
        """
        self._check(image, len(self.im_size))
        x = image if smaps is None else image * smaps
        return self._each(nufft, x, omega) * self._scale(norm)


class KbNufftAdjoint(_Nufft):
    """K-space samples to images, the conjugate transpose of KbNufft.

    Args:
        im_size: pixels of the image, ([nz,] ny, nx).
        grid_size: the oversampled grid whose size "ortho" divides by; None = twice im_size. It says nothing about the
            grid in use.
        eps: relative L2 error on white data; torchkbnufft's table interpolation reaches 7e-4.

    Raises:
        ValueError: sizes that do not fit each other.

    >>> KbNufftAdjoint((2, 2))(torch.ones(1, 1, 1) + 0j, torch.zeros(2, 1)).real.round(decimals=3).tolist()
    [[[[1.0, 1.0], [1.0, 1.0]]]]
    """

    def __call__(self, data: Tensor, omega: Tensor, smaps: Tensor | None = None, norm: Norm = None) -> Tensor:
        """Images of every set of samples.

        Args:
            data: (B, C, M) complex; multiply by density compensation first where an image is wanted.
            omega: (d, M) or (B, d, M), radians per pixel.
            smaps: coil maps (1 or B, C, [z,] y, x); their conjugates multiply the images, which are added over C.
            norm: as KbNufft.

        Returns:
            (B, C, [z,] y, x) complex; (B, 1, ...) with smaps.

        Raises:
            ValueError: shapes, a norm or an omega out of [-pi, pi] that do not fit.
            TypeError: data are not complex.
        """
        self._check(data, 1)
        x = self._each(nufft_adjoint, data, omega) * self._scale(norm)
        return x if smaps is None else (x * smaps.conj()).sum(1, keepdim=True)

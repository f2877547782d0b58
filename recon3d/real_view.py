"""Complex volumes for parts that work number by number: the real and imaginary parts as twice as many columns.

A complex state has noise of one standard deviation on its real and on its imaginary part, u = x0 + sigma (e_r + i e_i),
so everything elementwise (renoising, noise, shrinking, inner products of Hermitian solvers) is the real thing on
[z, y, 2 x]. Real tensors pass unchanged.
"""

from __future__ import annotations

import torch
from torch import Tensor

from recon3d.ops.philox import NoiseKey

__all__ = ["draw_like", "real_view"]


def real_view(x: Tensor) -> Tensor:
    """x itself, or for a complex x its parts side by side in the last axis; memory is shared where x is contiguous.

    >>> real_view(torch.tensor([[1 + 2j, 3 - 1j]])).tolist()
    [[1.0, 2.0, 3.0, -1.0]]
    """
    return torch.view_as_real(x.resolve_conj()).flatten(-2) if x.is_complex() else x


def draw_like(x: Tensor, key: NoiseKey) -> Tensor:
    """Noise of a key with the shape, dtype and device of x, standard deviation 1 per real component."""
    if not x.is_complex():
        return key.draw(x.shape[1:], x.dtype, x.device)
    real = torch.float64 if x.dtype == torch.complex128 else torch.float32
    return torch.view_as_complex(key.draw((*x.shape[1:], 2), real, x.device))

"""SENSE normal operators of Cartesian and of gridded non-Cartesian MRI, with the coils in the vector lanes."""

from __future__ import annotations

import torch
from torch import Tensor

from recon3d.ops import _library

__all__: list[str] = []


def _fft_reference(x: Tensor, sign: int, shift: int) -> Tensor:
    y = torch.fft.fft(x) if sign < 0 else torch.fft.ifft(x, norm="forward")
    return y.roll(shift, 1)


# the FFT of the lane kernels by itself, for tests: x [row, n], unscaled; output k at (k + shift) mod n
_library.define("lane_fft(Tensor x, int sign, int shift) -> Tensor", _fft_reference, lambda x, *_: x.new_empty(x.shape))

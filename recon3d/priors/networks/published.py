"""What networks with published names share: how they are frozen, which images they take, sines of the time step."""

from __future__ import annotations

import math
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["PublishedNetwork", "step_embedding"]


class PublishedNetwork(nn.Module):
    """A network whose configuration has `multiple`, which image sides must be multiples of."""

    config: Any

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self.compute_dtype: torch.dtype | None = None

    def for_inference(self, compute_dtype: torch.dtype) -> Self:
        """Freeze the network; its convolutions and attention run in `compute_dtype`, its weights stay float32."""
        self.eval().requires_grad_(False)
        self.float().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.compute_dtype = compute_dtype if compute_dtype != torch.float32 else None
        return self

    def _fast(self, x: Tensor) -> torch.autocast:
        return torch.autocast(x.device.type, self.compute_dtype, enabled=self.compute_dtype is not None)

    def _first(self, convolution: nn.Module, x: Tensor) -> Tensor:
        """The first convolution in float32, for it carries the image itself, which half precision would quantise."""
        h: Tensor = convolution(x)
        return h if self.compute_dtype is None else h.to(self.compute_dtype)

    def _check(self, x: Tensor) -> None:
        m = self.config.multiple
        if x.ndim != 4 or x.shape[-1] % m or x.shape[-2] % m:
            name = type(self).__name__
            raise ValueError(f"{name}: x must be [b, c, row, col] with sides multiples of {m}, got {tuple(x.shape)}")


def step_embedding(t: Tensor, width: int, longest: float = 10_000.0, shift: float = 0.0) -> Tensor:
    """[b] -> [b, width]: cosines, then sines, of t times frequencies from 1 down to about 1/longest.

    Vaswani et al. (2017). There are width/2 frequencies, and the last exponent is (width/2 - 1) / (width/2 - shift).
    """
    half = width // 2
    rates = torch.exp(-math.log(longest) / (half - shift) * torch.arange(half, dtype=torch.float32, device=t.device))
    phase = t.float()[:, None] * rates
    emb = torch.cat([phase.cos(), phase.sin()], dim=1)
    return F.pad(emb, (0, width % 2))

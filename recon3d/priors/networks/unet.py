"""A small, fully convolutional U-Net conditioned on the noise level.

Residual blocks of GroupNorm, SiLU and 3x3 convolution; the noise level enters every block as a scale and
shift after its second norm. Levels are joined by 2x2 means on the way down and nearest-neighbour doubling on
the way up, so any image whose sides are multiples of `UNetConfig.multiple` goes through, whatever size it was
trained on. The first and the last convolution run in float32 under autocast: they carry the image itself, and
bfloat16 would quantise it.

Sources: Ronneberger et al. (MICCAI 2015); scale-shift conditioning as in Dhariwal, Nichol (NeurIPS 2021);
residual sums divided by sqrt(2) and the zero-initialised second convolution as in Karras et al. (NeurIPS
2022).
"""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal, cast

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["UNet", "UNetConfig"]


class UNetConfig(BaseModel):
    """Architecture of a `UNet`; the model card stores it, so a file of weights rebuilds its own network."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    in_channels: int = Field(1, ge=1, le=16)
    out_channels: int = Field(1, ge=1, le=16)
    channels: tuple[int, ...] = Field((32, 64, 128, 192), min_length=1, max_length=8)
    blocks: int = Field(2, ge=1, le=8, description="residual blocks per level and direction")
    embedding: int = Field(128, ge=8, le=1024, description="width of the noise embedding")
    group_size: int = Field(16, ge=1, description="channels per normalisation group")

    @property
    def multiple(self) -> int:
        """Image sides must be multiples of this."""
        return int(2 ** (len(self.channels) - 1))


class UNet(nn.Module):
    """F(x, c_noise): [b, c, row, col] and [b], or [1] for all -> [b, c_out, row, col].

    >>> net = UNet(UNetConfig(channels=(8, 16), blocks=1, group_size=8))
    >>> net(torch.zeros(2, 1, 6, 10), torch.zeros(2)).shape
    torch.Size([2, 1, 6, 10])
    """

    clock: ClassVar[Literal["time", "sigma", "log_sigma"]] = "log_sigma"

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        width, emb = config.channels, config.embedding
        for c in width:
            if c % config.group_size:
                raise ValueError(f"UNet: channels must be multiples of group_size={config.group_size}, got {c}")
        self.embed = nn.Sequential(nn.Linear(2 * _FREQUENCIES, emb), nn.SiLU(), nn.Linear(emb, emb), nn.SiLU())
        self.stem = nn.Conv2d(config.in_channels, width[0], 3, padding=1)
        self.down = nn.ModuleList()
        skips, c = [], width[0]
        for w in width:
            level = nn.ModuleList()
            for _ in range(config.blocks):
                level.append(_ResBlock(c, w, config))
                c = w
            skips.append(c)
            self.down.append(level)
        self.up = nn.ModuleList()
        for w, s in zip(reversed(width), reversed(skips), strict=True):
            level = nn.ModuleList()
            for i in range(config.blocks):
                # the coarsest level has no skip to take: it simply goes on
                extra = s if i == 0 and len(self.up) > 0 else 0
                level.append(_ResBlock(c + extra, w, config))
                c = w
            self.up.append(level)
        self.norm = nn.GroupNorm(c // config.group_size, c)
        self.head = nn.Conv2d(c, config.out_channels, 3, padding=1)
        _zero(self.head)
        self.compute_dtype: torch.dtype | None = None
        # Fourier features of c_noise = log(sigma)/4, which lives in about [-1.6, 1.2]; fixed, not stored
        self.frequencies: Tensor
        self.register_buffer("frequencies", _frequencies(), persistent=False)

    def for_inference(self, compute_dtype: torch.dtype) -> UNet:
        """Freeze the network, its residual blocks' convolutions in `compute_dtype`, the rest float32."""
        self.eval().requires_grad_(False)
        self.float().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        for block in self.modules():
            if isinstance(block, _ResBlock):
                for conv in (block.conv1, block.conv2, block.skip):
                    conv.to(compute_dtype)
        self.compute_dtype = compute_dtype
        return self

    def forward(self, x: Tensor, c_noise: Tensor) -> Tensor:
        m = self.config.multiple
        if x.ndim != 4 or x.shape[-1] % m or x.shape[-2] % m:
            raise ValueError(f"UNet: x must be [b, c, row, col] with sides multiples of {m}, got {tuple(x.shape)}")
        phase = c_noise.float()[:, None] * self.frequencies
        with _fp32(x):
            emb = self.embed(torch.cat([phase.cos(), phase.sin()], dim=1))
            h = self.stem(x.float())
        if self.compute_dtype is not None:
            h = h.to(self.compute_dtype)
        elif torch.is_autocast_enabled(x.device.type):
            h = h.to(torch.get_autocast_dtype(x.device.type))
        kept = []
        for i, level in enumerate(self.down):
            if i:
                h = F.avg_pool2d(h, 2)
            for block in cast(nn.ModuleList, level):
                h = block(h, emb)
            kept.append(h)
        kept.pop()
        for i, level in enumerate(self.up):
            if i:
                h = torch.cat([F.interpolate(h, scale_factor=2.0, mode="nearest"), kept.pop()], dim=1)
            for block in cast(nn.ModuleList, level):
                h = block(h, emb)
        h = F.silu(self.norm(h))
        with _fp32(x):
            out: Tensor = self.head(h.float())
        return out


class _ResBlock(nn.Module):
    def __init__(self, c_in: int, c_out: int, config: UNetConfig) -> None:
        super().__init__()
        g = config.group_size
        self.norm1 = nn.GroupNorm(max(1, c_in // g), c_in)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.affine = nn.Linear(config.embedding, 2 * c_out)
        self.norm2 = nn.GroupNorm(c_out // g, c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()
        _zero(self.conv2)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        quiet = not torch.is_grad_enabled()
        h = self.conv1(F.silu(self.norm1(x), inplace=quiet))
        scale, shift = self.affine(emb).chunk(2, dim=1)
        if len(emb) == 1:
            # one noise level for all: the norm's own scale and shift take it along, one pass over h less
            weight = self.norm2.weight * (1 + scale[0])
            bias = torch.addcmul(shift[0], self.norm2.bias, 1 + scale[0])
            h = F.group_norm(h, self.norm2.num_groups, weight, bias, self.norm2.eps)
        else:
            scale, shift = (t.to(h.dtype)[:, :, None, None] for t in (scale, shift))
            h = torch.addcmul(shift, self.norm2(h), scale + 1)
        h = F.silu(h, inplace=quiet)
        out: Tensor = (self.skip(x) + self.conv2(h)) * math.sqrt(0.5)
        return out


_FREQUENCIES = 16


def _zero(conv: nn.Conv2d) -> None:
    for p in conv.parameters():
        nn.init.zeros_(p)


def _frequencies() -> Tensor:
    # periods from 8 down to 1/4 in units of c_noise: sigma apart by a factor 2.7 is told apart by the finest
    # on the CPU even while a network is built on "meta", where logspace would import the compiler: two seconds
    return 2 * math.pi * torch.logspace(math.log10(1 / 8), math.log10(4), _FREQUENCIES, device="cpu")


def _fp32(x: Tensor) -> Any:
    return torch.autocast(x.device.type, enabled=False)

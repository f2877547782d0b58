"""NCSN++ of score_sde, with the names that its published checkpoints use.

All layers hang in one list, `all_modules.0, 1, 2, ...`, in the order of the forward pass: Fourier features of
log sigma, two linear layers, the first convolution, residual blocks (BigGAN style, resampling by the filter 1 3 3 1)
with attention at some levels, and beside them a pyramid of the input that joins every coarser level. Sums of branches
are divided by sqrt(2). The answer is divided by sigma: it is the score of x0 + sigma eps.

Where attention sits follows the checkpoint, not the width of the image at hand: published code looks at the image, and
breaks on any other size than the one it was trained on.

Source: Song, Sohl-Dickstein, Kingma, Kumar, Ermon, Poole (ICLR 2021).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, cast

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from torch.nn import functional as F

from recon3d.priors.networks.published import PublishedNetwork

__all__ = ["NCSNpp", "NCSNppConfig", "ncsnpp_config"]

Shape = tuple[int, ...]
_HALF = math.sqrt(0.5)


class NCSNppConfig(BaseModel):
    """Architecture of an `NCSNpp`; all but `centered` is read off the shapes by `ncsnpp_config`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    in_channels: int = Field(1, ge=1, le=64)
    width: int = Field(128, ge=4, le=2048, description="of the first convolution and of the Fourier features")
    channels: tuple[int, ...] = Field(min_length=1, max_length=10, description="of every level, finest first")
    blocks: int = Field(4, ge=1, le=16, description="residual blocks of a level on the way down")
    attention: tuple[int, ...] = Field((), description="levels with self-attention, 0 the finest")
    pyramid: bool = Field(True, description="a pyramid of the input joins every coarser level")
    centered: bool = Field(False, description="the network takes what it is given; else it maps 0..1 to -1..1 itself")

    @property
    def multiple(self) -> int:
        """Image sides must be multiples of this."""
        return int(2 ** (len(self.channels) - 1))

    @property
    def out_channels(self) -> int:
        """As many as go in."""
        return self.in_channels


class NCSNpp(PublishedNetwork):
    """score(x, sigma): [b, c, row, col] and noise levels [b], or [1] for all -> [b, c, row, col].

    >>> net = NCSNpp(NCSNppConfig(width=16, channels=(16, 32), blocks=1))
    >>> net(torch.zeros(2, 1, 8, 12), torch.ones(2)).shape
    torch.Size([2, 1, 8, 12])
    """

    clock: ClassVar[Literal["time", "sigma"]] = "sigma"

    def __init__(self, config: NCSNppConfig) -> None:
        super().__init__(config)
        emb, c, last = 4 * config.width, config.width, len(config.channels) - 1
        self.all_modules = modules = nn.ModuleList()
        modules.extend([_Fourier(config.width), nn.Linear(2 * config.width, emb), nn.Linear(emb, emb)])
        modules.append(nn.Conv2d(config.in_channels, c, 3, padding=1))
        skips, inputs = [c], config.in_channels
        for level, width in enumerate(config.channels):
            for _ in range(config.blocks):
                modules.append(_Res(c, width, emb))
                c = width
                if level in config.attention:
                    modules.append(_Attention(c))
                skips.append(c)
            if level < last:
                modules.append(_Res(c, c, emb, "down"))
                if config.pyramid:
                    modules.append(_Downsample(inputs, c))
                    inputs = c
                skips.append(c)
        modules.extend([_Res(c, c, emb), _Attention(c), _Res(c, c, emb)])
        for level in range(last, -1, -1):
            for _ in range(config.blocks + 1):
                modules.append(_Res(c + skips.pop(), config.channels[level], emb))
                c = config.channels[level]
            if level in config.attention:
                modules.append(_Attention(c))
            if level:
                modules.append(_Res(c, c, emb, "up"))
        modules.extend([_norm(c), nn.Conv2d(c, config.in_channels, 3, padding=1)])

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        self._check(x)
        if not self.config.centered:
            x = 2 * x - 1
        steps = iter(self.all_modules)
        emb = next(steps)(sigma.log())
        emb = next(steps)(emb)
        emb = next(steps)(F.silu(emb))
        h = self._first(next(steps), x)
        with self._fast(x):
            h = self._levels(x, h, emb, steps)
            h = F.silu(next(steps)(h))
        out: Tensor = next(steps)(h.float())
        return out / sigma[:, None, None, None]

    def _levels(self, x: Tensor, h: Tensor, emb: Tensor, steps: Any) -> Tensor:
        config, last = self.config, len(self.config.channels) - 1
        kept = [h]
        for level in range(last + 1):
            for _ in range(config.blocks):
                h = next(steps)(h, emb)
                if level in config.attention:
                    h = next(steps)(h)
                kept.append(h)
            if level < last:
                h = next(steps)(h, emb)
                if config.pyramid:
                    x = h = (next(steps)(x) + h) * _HALF
                kept.append(h)
        h = next(steps)(h, emb)
        h = next(steps)(h)
        h = next(steps)(h, emb)
        for level in range(last, -1, -1):
            for _ in range(config.blocks + 1):
                h = next(steps)(torch.cat([h, kept.pop()], dim=1), emb)
            if level in config.attention:
                h = next(steps)(h)
            if level:
                h = next(steps)(h, emb)
        return h


def ncsnpp_config(shapes: Mapping[str, Shape], *, centered: bool = False) -> NCSNppConfig:
    """The architecture that the names and shapes of a state dict tell.

    Args:
        shapes: of every tensor, names beginning with all_modules.
        centered: as in NCSNppConfig; no shape depends on it.

    Raises:
        ValueError: a tensor that every such network has is missing, or the layers make no NCSN++.
    """

    def shape(name: str) -> Shape:
        if name not in shapes:
            raise ValueError(f"tensor {name} is missing; it is not an NCSN++, or a renamed one")
        return shapes[name]

    width = shape("all_modules.0.W")[0]
    inputs = shape("all_modules.3.weight")[1]
    total = 1 + max(int(found[1]) for name in shapes if (found := re.match(r"all_modules\.(\d+)\.", name)))
    channels: list[int] = []
    counts, attention, c, pyramid = [0], set(), width, False
    for i in range(4, total):
        at = f"all_modules.{i}"
        if f"{at}.NIN_0.W" in shapes:
            # after a block of a level, or that of the middle, which follows a block of unchanged width
            if f"all_modules.{i + 1}.Conv_0.weight" in shapes and counts[-1] and _is_middle(shapes, i, c):
                counts[-1] -= 1
                break
            attention.add(len(channels))
        elif f"{at}.Conv2d_0.weight" in shapes:
            pyramid = True
        else:
            out, entering = shape(f"{at}.Conv_0.weight")[:2]
            if out == entering and f"{at}.Conv_2.weight" in shapes:
                channels.append(c)
                counts.append(0)
            else:
                counts[-1], c = counts[-1] + 1, out
    channels.append(c)
    if len(set(counts)) != 1 or not counts[0]:
        raise ValueError(f"levels of {', '.join(map(str, counts))} residual blocks make no NCSN++; a tensor is missing")
    return NCSNppConfig(
        in_channels=inputs,
        width=width,
        channels=tuple(channels),
        blocks=counts[0],
        attention=tuple(sorted(attention)),
        pyramid=pyramid,
        centered=centered,
    )


def _is_middle(shapes: Mapping[str, Shape], i: int, c: int) -> bool:
    """Whether attention at i is that between the middle's two blocks: the next but one block takes a skip in."""
    after = shapes.get(f"all_modules.{i + 2}.Conv_0.weight")
    return after is not None and after[1] > c and shapes[f"all_modules.{i + 1}.Conv_0.weight"][:2] == (c, c)


def _norm(c: int) -> nn.GroupNorm:
    return nn.GroupNorm(min(max(c // 4, 1), 32), c, eps=1e-6)


def _filtered(x: Tensor, up: int = 1, down: int = 1, pad: tuple[int, int] = (0, 0)) -> Tensor:
    """Zeros put in, the filter 1 3 3 1 in both directions (of sum 1, times up^2), every down-th sample kept."""
    b, c, h, w = x.shape
    if up > 1:
        wide = x.new_zeros(b, c, h, up, w, up)
        wide[:, :, :, 0, :, 0] = x
        x = wide.reshape(b, c, h * up, w * up)
    taps = torch.tensor([1.0, 3.0, 3.0, 1.0], dtype=x.dtype, device=x.device) * (up / 8)
    x = F.pad(x, (*pad, *pad))
    x = F.conv2d(x, taps.view(1, 1, 4, 1).expand(c, 1, 4, 1), groups=c, stride=(down, 1))
    return F.conv2d(x, taps.view(1, 1, 1, 4).expand(c, 1, 1, 4), groups=c, stride=(1, down))


class _Fourier(nn.Module):
    def __init__(self, n: int) -> None:
        super().__init__()
        self.W = nn.Parameter(torch.zeros(n), requires_grad=False)

    def forward(self, log_sigma: Tensor) -> Tensor:
        phase = log_sigma[:, None] * self.W * (2 * math.pi)
        return torch.cat([phase.sin(), phase.cos()], dim=1)


class _Res(nn.Module):
    def __init__(self, c_in: int, c_out: int, emb: int, resample: str = "") -> None:
        super().__init__()
        self.resample = resample
        self.GroupNorm_0 = _norm(c_in)
        self.Conv_0 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.Dense_0 = nn.Linear(emb, c_out)
        self.GroupNorm_1 = _norm(c_out)
        self.Conv_1 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.Conv_2 = nn.Conv2d(c_in, c_out, 1) if resample or c_in != c_out else None

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = F.silu(self.GroupNorm_0(x))
        if self.resample == "up":
            h, x = (_filtered(t, up=2, pad=(2, 1)) for t in (h, x))
        elif self.resample == "down":
            h, x = (_filtered(t, down=2, pad=(1, 1)) for t in (h, x))
        h = self.Conv_0(h) + self.Dense_0(F.silu(emb))[:, :, None, None]
        h = self.Conv_1(F.silu(self.GroupNorm_1(h)))
        if self.Conv_2 is not None:
            x = self.Conv_2(x)
        return (x + h) * _HALF


class _Downsample(nn.Module):
    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__()
        self.Conv2d_0 = nn.Conv2d(c_in, c_out, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.Conv2d_0(_filtered(x, pad=(2, 2))))


class _Dense(nn.Module):
    """A 1x1 convolution whose weight lies [in, out]."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.W, self.b = nn.Parameter(torch.zeros(c, c)), nn.Parameter(torch.zeros(c))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bcn,co->bon", x, self.W) + self.b[:, None]


class _Attention(nn.Module):
    def __init__(self, c: int) -> None:
        super().__init__()
        self.GroupNorm_0 = _norm(c)
        self.NIN_0, self.NIN_1, self.NIN_2, self.NIN_3 = _Dense(c), _Dense(c), _Dense(c), _Dense(c)

    def forward(self, x: Tensor) -> Tensor:
        h = self.GroupNorm_0(x).flatten(2)
        q, k, v = self.NIN_0(h), self.NIN_1(h), self.NIN_2(h)
        h = F.scaled_dot_product_attention(q.mT[:, None], k.mT[:, None], v.mT[:, None])[:, 0].mT
        return cast(Tensor, (x + self.NIN_3(h).view(x.shape)) * _HALF)

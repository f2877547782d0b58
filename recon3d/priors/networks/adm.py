"""The U-Net of guided diffusion ("ADM"), with the names that its published checkpoints use.

Residual blocks of GroupNorm, SiLU and 3x3 convolution, conditioned on the time step; self-attention at some levels and
in the middle; levels joined by strided convolutions or by resampling residual blocks. The module tree exists for its
parameter names, so that a published state dict loads key by key. What the names and shapes do not tell (heads of the
attention, order of its channels) stands in `ADMConfig`.

Source: Dhariwal, Nichol (NeurIPS 2021), and Nichol, Dhariwal (ICML 2021) for the legacy order of attention channels.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import ClassVar, Literal, cast

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from torch.nn import functional as F

from recon3d.priors.networks.published import PublishedNetwork, step_embedding

__all__ = ["ADM", "ADMConfig", "adm_config"]

Shape = tuple[int, ...]
_GROUPS = 32


class ADMConfig(BaseModel):
    """Architecture of an `ADM`.

    Attributes that shapes tell are filled in by `adm_config`; `head_channels`, `heads`, `legacy_attention` and
    `longest_period` are not among them and must be known.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    in_channels: int = Field(1, ge=1, le=64)
    out_channels: int = Field(1, ge=1, le=64)
    model_channels: int = Field(128, ge=2, le=2048)
    channels: tuple[int, ...] = Field(min_length=1, max_length=10, description="of every level, finest first")
    blocks: int = Field(1, ge=1, le=16, description="residual blocks of a level on the way down")
    attention: tuple[int, ...] = Field((), description="levels with self-attention, 0 the finest")
    scale_shift: bool = Field(True, description="the time step scales and shifts, instead of being added")
    resampling_blocks: bool = Field(True, description="residual blocks change the resolution, not convolutions")
    middle_attention: bool = True
    head_channels: int | None = Field(64, ge=1, description="channels of an attention head; null: `heads` of them")
    heads: int = Field(1, ge=1)
    legacy_attention: bool = Field(True, description="q, k, v next to each other within a head, as published weights")
    longest_period: float = Field(10_000.0, gt=0, description="of the time step's sines; the shortest is 1")

    @property
    def multiple(self) -> int:
        """Image sides must be multiples of this."""
        return int(2 ** (len(self.channels) - 1))


class ADM(PublishedNetwork):
    """F(x, t): [b, c, row, col] and time steps [b] -> [b, c_out, row, col]; time steps are 0 .. 999, fractions too.

    >>> net = ADM(ADMConfig(model_channels=32, channels=(32, 64), attention=(1,), head_channels=32))
    >>> net(torch.zeros(1, 1, 8, 12), torch.zeros(1)).shape
    torch.Size([1, 1, 8, 12])
    """

    clock: ClassVar[Literal["time", "sigma"]] = "time"

    def __init__(self, config: ADMConfig) -> None:
        super().__init__(config)
        for width in config.channels:
            if width % _GROUPS:
                raise ValueError(f"ADM: channels must be multiples of {_GROUPS}, got {width}")
        emb = 4 * config.model_channels
        self.time_embed = nn.Sequential(nn.Linear(config.model_channels, emb), nn.SiLU(), nn.Linear(emb, emb))
        c = config.channels[0]
        self.input_blocks = nn.ModuleList([_Steps(nn.Conv2d(config.in_channels, c, 3, padding=1))])
        skips = [c]
        last = len(config.channels) - 1
        for level, width in enumerate(config.channels):
            for _ in range(config.blocks):
                self.input_blocks.append(self._block(c, width, level))
                c = width
                skips.append(c)
            if level < last:
                down = _Res(c, c, emb, config.scale_shift, "down") if config.resampling_blocks else _Downsample(c)
                self.input_blocks.append(_Steps(down))
                skips.append(c)
        middle: list[nn.Module] = [_Res(c, c, emb, config.scale_shift)]
        if config.middle_attention:
            middle.append(_Attention(c, config))
        self.middle_block = _Steps(*middle, _Res(c, c, emb, config.scale_shift))
        self.output_blocks = nn.ModuleList()
        for level in range(last, -1, -1):
            width = config.channels[level]
            for k in range(config.blocks + 1):
                block = self._block(c + skips.pop(), width, level)
                c = width
                if level and k == config.blocks:
                    block.append(
                        _Res(c, c, emb, config.scale_shift, "up") if config.resampling_blocks else _Upsample(c)
                    )
                self.output_blocks.append(block)
        self.out = nn.Sequential(nn.GroupNorm(_GROUPS, c), nn.SiLU(), nn.Conv2d(c, config.out_channels, 3, padding=1))

    def _block(self, c_in: int, c_out: int, level: int) -> _Steps:
        steps: list[nn.Module] = [_Res(c_in, c_out, 4 * self.config.model_channels, self.config.scale_shift)]
        if level in self.config.attention:
            steps.append(_Attention(c_out, self.config))
        return _Steps(*steps)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        self._check(x)
        emb = self.time_embed(step_embedding(t, self.config.model_channels, self.config.longest_period))
        h = self._first(cast(_Steps, self.input_blocks[0])[0], x)
        kept = [h]
        with self._fast(x):
            for block in self.input_blocks[1:]:
                h = block(h, emb)
                kept.append(h)
            h = self.middle_block(h, emb)
            for block in self.output_blocks:
                h = block(torch.cat([h, kept.pop()], dim=1), emb)
        return cast(Tensor, self.out(h.float()))


def adm_config(
    shapes: Mapping[str, Shape],
    *,
    head_channels: int | None = 64,
    heads: int = 1,
    legacy_attention: bool = True,
    longest_period: float = 10_000.0,
) -> ADMConfig:
    """The architecture that the names and shapes of a state dict tell.

    Args:
        shapes: of every tensor.
        head_channels, heads, legacy_attention, longest_period: as in ADMConfig; no shape depends on them.

    Raises:
        ValueError: a tensor that every such network has is missing.
    """

    def shape(name: str) -> Shape:
        if name not in shapes:
            raise ValueError(f"tensor {name} is missing; it is not a guided-diffusion U-Net, or a renamed one")
        return shapes[name]

    numbers = [_number(name, "output_blocks") for name in shapes if name.startswith("output_blocks.")]
    total = max(numbers, default=-1) + 1
    # on the way up, the last block of every level but the finest ends in an up-sampling one
    ups = [i for i in range(total) if _up(shapes, i) is not None]
    levels = len(ups) + 1
    if not total or total % levels or total // levels < 2:
        raise ValueError(f"{total} output_blocks with {len(ups)} up-sampling ones make no U-Net; a tensor is missing")
    blocks = total // levels - 1
    # input_blocks: 0 the first convolution, then per level `blocks` and one that halves
    first = [1 + level * (blocks + 1) for level in range(levels)]
    embedded = [shape(f"input_blocks.{i}.0.emb_layers.1.weight") for i in first]
    widths = [shape(f"input_blocks.{i}.0.out_layers.3.weight")[0] for i in first]
    return ADMConfig(
        in_channels=shape("input_blocks.0.0.weight")[1],
        out_channels=shape("out.2.weight")[0],
        model_channels=shape("time_embed.0.weight")[1],
        channels=tuple(widths),
        blocks=blocks,
        attention=tuple(level for level, i in enumerate(first) if f"input_blocks.{i}.1.qkv.weight" in shapes),
        scale_shift=embedded[0][0] == 2 * widths[0],
        resampling_blocks=levels == 1 or _up(shapes, ups[0]) == "block",
        middle_attention="middle_block.1.qkv.weight" in shapes,
        head_channels=head_channels,
        heads=heads,
        legacy_attention=legacy_attention,
        longest_period=longest_period,
    )


def _number(name: str, stem: str) -> int:
    found = re.match(rf"{stem}\.(\d+)\.", name)
    return int(found[1]) if found else -1


def _up(shapes: Mapping[str, Shape], i: int) -> str | None:
    """What up-samples at the end of output block i."""
    for j in (1, 2):
        if f"output_blocks.{i}.{j}.in_layers.0.weight" in shapes:
            return "block"
        if f"output_blocks.{i}.{j}.conv.weight" in shapes:
            return "convolution"
    return None


class _Steps(nn.Sequential):
    """Modules in a row; those that want the time step get it."""

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:  # type: ignore[override]
        for step in self:
            x = step(x, emb) if isinstance(step, _Res) else step(x)
        return x


class _Res(nn.Module):
    def __init__(self, c_in: int, c_out: int, emb: int, scale_shift: bool, resample: str = "") -> None:
        super().__init__()
        self.resample, self.scale_shift = resample, scale_shift
        self.in_layers = nn.Sequential(nn.GroupNorm(_GROUPS, c_in), nn.SiLU(), nn.Conv2d(c_in, c_out, 3, padding=1))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb, 2 * c_out if scale_shift else c_out))
        # the third is dropout's place
        self.out_layers = nn.Sequential(
            nn.GroupNorm(_GROUPS, c_out), nn.SiLU(), nn.Identity(), nn.Conv2d(c_out, c_out, 3, padding=1)
        )
        self.skip_connection = nn.Identity() if c_in == c_out else nn.Conv2d(c_in, c_out, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        norm, act, conv = self.in_layers
        h, x = self._resampled(act(norm(x))), self._resampled(x)
        h = conv(h)
        e = self.emb_layers(emb)[:, :, None, None]
        if self.scale_shift:
            scale, shift = e.chunk(2, dim=1)
            h = self.out_layers[0](h) * (1 + scale) + shift
            h = self.out_layers[1:](h)
        else:
            h = self.out_layers(h + e)
        return cast(Tensor, self.skip_connection(x) + h)

    def _resampled(self, x: Tensor) -> Tensor:
        if self.resample == "down":
            return F.avg_pool2d(x, 2)
        return F.interpolate(x, scale_factor=2.0, mode="nearest") if self.resample == "up" else x


class _Downsample(nn.Module):
    def __init__(self, c: int) -> None:
        super().__init__()
        self.op = nn.Conv2d(c, c, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.op(x))


class _Upsample(nn.Module):
    def __init__(self, c: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest")))


class _Attention(nn.Module):
    def __init__(self, c: int, config: ADMConfig) -> None:
        super().__init__()
        self.heads = config.heads if config.head_channels is None else c // config.head_channels
        if self.heads < 1 or c % self.heads:
            raise ValueError(f"ADM: {c} channels cannot be shared out to {self.heads} heads of attention")
        self.legacy = config.legacy_attention
        self.norm = nn.GroupNorm(_GROUPS, c)
        self.qkv = nn.Conv1d(c, 3 * c, 1)
        self.proj_out = nn.Conv1d(c, c, 1)

    def forward(self, x: Tensor) -> Tensor:
        b, c, *sides = x.shape
        flat = x.flatten(2)
        mixed = self.qkv(self.norm(flat))
        if self.legacy:
            q, k, v = mixed.view(b, self.heads, 3, c // self.heads, -1).unbind(2)
        else:
            q, k, v = mixed.view(b, 3, self.heads, c // self.heads, -1).unbind(1)
        out = F.scaled_dot_product_attention(q.mT, k.mT, v.mT).mT.reshape(b, c, -1)
        return cast(Tensor, (flat + self.proj_out(out)).view(b, c, *sides))

"""The unconditional U-Net of the diffusers library (UNet2DModel), with the names that its folders use.

Residual blocks of GroupNorm, SiLU and 3x3 convolution conditioned on the time step, self-attention at some levels of
the way down, of the way up and in the middle, strided convolutions down and nearest-neighbour doubling with a
convolution up. A folder's config.json says what no shape tells: groups of the norms, channels of a head, on which sides
the strided convolutions are padded, the order of the time step's sines. Blocks of other kinds are refused by name.

Sources: Ho, Jain, Abbeel (NeurIPS 2020) for the architecture; the format is that of diffusers 0.1 to 0.3x.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, cast

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from torch.nn import functional as F

from recon3d.priors.networks.published import PublishedNetwork, step_embedding

__all__ = ["UNet2D", "UNet2DConfig", "unet2d_config"]

Shape = tuple[int, ...]


class UNet2DConfig(BaseModel):
    """Architecture of a `UNet2D`, made by `unet2d_config` from a config.json or from shapes."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    in_channels: int = Field(1, ge=1, le=64)
    out_channels: int = Field(1, ge=1, le=64)
    channels: tuple[int, ...] = Field(min_length=1, max_length=10, description="of every level, finest first")
    blocks: int = Field(2, ge=1, le=16, description="residual blocks of a level on the way down")
    embedding: int = Field(512, ge=4, le=16384)
    attention_down: tuple[int, ...] = Field((), description="levels with self-attention, 0 the finest")
    attention_up: tuple[int, ...] = ()
    middle: Literal["attention", "plain", "none"] = "attention"
    middle_groups: int = Field(32, ge=0, description="of the norm before the middle's attention; 0: it has none")
    middle_scale: float = Field(1.0, gt=0, description="sums in the middle are divided by this")
    head_channels: int | None = Field(8, ge=1, description="channels of an attention head; null: one head has all")
    scale_shift: bool = Field(False, description="the time step scales and shifts, instead of being added")
    groups: int = Field(32, ge=1)
    eps: float = Field(1e-5, gt=0)
    lopsided: bool = Field(False, description="strided convolutions are padded at the right and the bottom only")
    cosines_first: bool = True
    frequency_shift: float = Field(0.0, ge=0)
    centered: bool = Field(True, description="the network takes what it is given; else it maps 0..1 to -1..1 itself")
    time_scale: float = Field(1.0, gt=0, description="the network is shown this many times the time of its path")

    @property
    def multiple(self) -> int:
        """Image sides must be multiples of this."""
        return int(2 ** (len(self.channels) - 1))


class UNet2D(PublishedNetwork):
    """F(x, t): [b, c, row, col] and times [b], or [1] for all -> [b, c_out, row, col].

    >>> net = UNet2D(UNet2DConfig(channels=(32, 64), attention_down=(1,), attention_up=(1,)))
    >>> net(torch.zeros(2, 1, 8, 12), torch.zeros(1)).shape
    torch.Size([2, 1, 8, 12])
    """

    clock: ClassVar[Literal["time", "sigma"]] = "time"

    def __init__(self, config: UNet2DConfig) -> None:
        super().__init__(config)
        c, last = config.channels[0], len(config.channels) - 1
        for width in config.channels:
            if width % config.groups:
                raise ValueError(f"UNet2D: channels must be multiples of groups={config.groups}, got {width}")
        self.conv_in = nn.Conv2d(config.in_channels, c, 3, padding=1)
        self.time_embedding = nn.ModuleDict(
            {"linear_1": nn.Linear(c, config.embedding), "linear_2": nn.Linear(config.embedding, config.embedding)}
        )
        self.down_blocks, self.up_blocks = nn.ModuleList(), nn.ModuleList()
        skips = [c]
        for level, width in enumerate(config.channels):
            inputs = [c] + [width] * (config.blocks - 1)
            resampler = None if level == last else _Downsampler(width, config.lopsided)
            self.down_blocks.append(_Level(config, inputs, width, level in config.attention_down, down=resampler))
            c = width
            skips += [c] * (config.blocks + (level < last))
        if config.middle != "none":
            self.mid_block = _Middle(config, c)
        for level in range(last, -1, -1):
            width = config.channels[level]
            inputs = [(c if k == 0 else width) + skips.pop() for k in range(config.blocks + 1)]
            upsampler = _Upsampler(width) if level else None
            self.up_blocks.append(_Level(config, inputs, width, level in config.attention_up, up=upsampler))
            c = width
        self.conv_norm_out = nn.GroupNorm(config.groups, c, eps=config.eps)
        self.conv_out = nn.Conv2d(c, config.out_channels, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        self._check(x)
        config = self.config
        wave = step_embedding(config.time_scale * t, config.channels[0], shift=config.frequency_shift)
        if not config.cosines_first:
            half = config.channels[0] // 2
            wave = torch.cat([wave[:, half : 2 * half], wave[:, :half], wave[:, 2 * half :]], dim=1)
        emb = F.silu(self.time_embedding["linear_2"](F.silu(self.time_embedding["linear_1"](wave))))
        h = self._first(self.conv_in, x if config.centered else 2 * x - 1)
        kept = [h]
        with self._fast(x):
            for level in self.down_blocks:
                h = level(h, emb, kept, down=True)
            if config.middle != "none":
                h = self.mid_block(h, emb)
            for level in self.up_blocks:
                h = level(h, emb, kept, down=False)
        return cast(Tensor, self.conv_out(F.silu(self.conv_norm_out(h.float()))))


def unet2d_config(
    shapes: Mapping[str, Shape],
    *,
    settings: Mapping[str, Any] | None = None,
    head_channels: int | None = 8,
    time_scale: float = 1.0,
) -> UNet2DConfig:
    """The architecture of a UNet2DModel.

    Args:
        shapes: of every tensor.
        settings: the folder's config.json; without it the shapes and the library's defaults have to do.
        head_channels: as in UNet2DConfig, where there are no settings.
        time_scale: as in UNet2DConfig.

    Raises:
        ValueError: a block, or another setting, is of a kind that is not known here; or a tensor is missing.
    """
    if settings is None:
        settings = {**_settings(shapes), "attention_head_dim": head_channels}
    given: dict[str, Any] = {**_DEFAULTS, **settings}
    for name, known in _KNOWN.items():
        if given[name] not in known:
            allowed = ", ".join(str(value) for value in known)
            raise ValueError(f"{name} is {given[name]!r}; only {allowed} is known here")
    channels = [int(width) for width in _list(given, "block_out_channels")]
    down, up = _list(given, "down_block_types"), _list(given, "up_block_types")
    for kind in (*down, *up):
        if kind not in _BLOCKS:
            raise ValueError(f"block type {kind} is not known here; known are {', '.join(_BLOCKS)}")
    if not len(channels) == len(down) == len(up):
        raise ValueError(f"{len(channels)} block_out_channels, {len(down)} down_block_types, {len(up)} up_block_types")
    attentive = [kind for kind in (*down, *up) if kind.startswith("Attn")]
    if attentive and (given["downsample_type"], given["upsample_type"]) != ("conv", "conv"):
        raise ValueError(f"{attentive[0]} with downsample_type or upsample_type other than conv is not known here")
    scale_shift = given["resnet_time_scale_shift"] == "scale_shift"
    middle = "none" if given["mid_block_type"] is None else "attention" if given["add_attention"] else "plain"
    middle_groups = given["attn_norm_num_groups"]
    if middle_groups is None:
        middle_groups = 0 if scale_shift else given["norm_num_groups"]
    return UNet2DConfig.model_validate(
        {
            "in_channels": given["in_channels"],
            "out_channels": given["out_channels"],
            "channels": tuple(channels),
            "blocks": given["layers_per_block"],
            "embedding": given["time_embedding_dim"] or 4 * channels[0],
            "attention_down": tuple(i for i, kind in enumerate(down) if kind.startswith("Attn")),
            "attention_up": tuple(i for i, kind in enumerate(reversed(up)) if kind.startswith("Attn")),
            "middle": middle,
            "middle_groups": middle_groups,
            "middle_scale": given["mid_block_scale_factor"],
            "head_channels": given["attention_head_dim"],
            "scale_shift": scale_shift,
            "groups": given["norm_num_groups"],
            "eps": given["norm_eps"],
            "lopsided": given["downsample_padding"] == 0,
            "cosines_first": given["flip_sin_to_cos"],
            "frequency_shift": given["freq_shift"],
            "centered": not given["center_input_sample"],
            "time_scale": time_scale,
        }
    )


# what the library assumes where a config.json is silent
_DEFAULTS: dict[str, Any] = {
    "_class_name": "UNet2DModel", "in_channels": 3, "out_channels": 3, "center_input_sample": False,
    "time_embedding_type": "positional", "time_embedding_dim": None, "freq_shift": 0, "flip_sin_to_cos": True,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"],
    "mid_block_type": "UNetMidBlock2D",
    "up_block_types": ["AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
    "block_out_channels": [224, 448, 672, 896], "layers_per_block": 2, "mid_block_scale_factor": 1,
    "downsample_padding": 1, "downsample_type": "conv", "upsample_type": "conv", "act_fn": "silu",
    "attention_head_dim": 8, "norm_num_groups": 32, "attn_norm_num_groups": None, "norm_eps": 1e-5,
    "resnet_time_scale_shift": "default", "add_attention": True, "class_embed_type": None, "num_class_embeds": None,
}  # fmt: skip
_KNOWN: dict[str, tuple[Any, ...]] = {
    "_class_name": ("UNet2DModel",),
    "time_embedding_type": ("positional",),
    "mid_block_type": ("UNetMidBlock2D", None),
    "downsample_padding": (0, 1),
    "act_fn": ("silu", "swish"),
    "resnet_time_scale_shift": ("default", "scale_shift"),
    "class_embed_type": (None,),
    "num_class_embeds": (None,),
}
_MOST_LEVELS = 10
_BLOCKS = ("DownBlock2D", "AttnDownBlock2D", "UpBlock2D", "AttnUpBlock2D")


def _list(given: Mapping[str, Any], name: str) -> list[Any]:
    value = given[name]
    if not isinstance(value, (list, tuple)) or not value:
        raise ValueError(f"{name} must be a list, got {value!r}")
    return list(value)


def _settings(shapes: Mapping[str, Shape]) -> dict[str, Any]:
    """What a config.json would say, as far as the shapes tell."""

    def shape(name: str) -> Shape:
        if name not in shapes:
            raise ValueError(f"tensor {name} is missing; it is not a UNet2DModel of diffusers, or a renamed one")
        return shapes[name]

    def count(stem: str) -> int:
        numbers = {name[len(stem) + 1 :].partition(".")[0] for name in shapes if name.startswith(stem + ".")}
        return next(k for k in range(len(numbers) + 1) if str(k) not in numbers)

    levels = count("down_blocks")
    if levels > _MOST_LEVELS:
        raise ValueError(f"{levels} down_blocks make no network of images; at most {_MOST_LEVELS} levels are known")
    widths = [shape(f"down_blocks.{i}.resnets.0.conv1.weight")[0] for i in range(levels)]
    scale_shift = shape("down_blocks.0.resnets.0.time_emb_proj.weight")[0] == 2 * widths[0]
    middle = any(name.startswith("mid_block.") for name in shapes)
    kinds = {
        way: [f"{'Attn' * (count(f'{way.lower()}_blocks.{i}.attentions') > 0)}{way}Block2D" for i in range(levels)]
        for way in ("Down", "Up")
    }
    # a scaling and shifting network has no norm there unless it was asked for
    normed = scale_shift and "mid_block.attentions.0.group_norm.weight" in shapes
    return {
        "in_channels": shape("conv_in.weight")[1],
        "out_channels": shape("conv_out.weight")[0],
        "block_out_channels": widths,
        "layers_per_block": count("down_blocks.0.resnets"),
        "time_embedding_dim": shape("time_embedding.linear_1.weight")[0],
        "down_block_types": kinds["Down"],
        "up_block_types": kinds["Up"],
        "mid_block_type": "UNetMidBlock2D" if middle else None,
        "add_attention": count("mid_block.attentions") > 0,
        "attn_norm_num_groups": _DEFAULTS["norm_num_groups"] if normed else None,
        "resnet_time_scale_shift": "scale_shift" if scale_shift else "default",
    }


class _Res(nn.Module):
    def __init__(self, config: UNet2DConfig, c_in: int, c_out: int, divisor: float = 1.0) -> None:
        super().__init__()
        self.divisor, self.scale_shift = divisor, config.scale_shift
        self.norm1 = nn.GroupNorm(config.groups, c_in, eps=config.eps)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.time_emb_proj = nn.Linear(config.embedding, 2 * c_out if config.scale_shift else c_out)
        self.norm2 = nn.GroupNorm(config.groups, c_out, eps=config.eps)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else None

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        e = self.time_emb_proj(emb)[:, :, None, None]
        if self.scale_shift:
            scale, shift = e.chunk(2, dim=1)
            h = self.norm2(h) * (1 + scale) + shift
        else:
            h = self.norm2(h + e)
        h = self.conv2(F.silu(h))
        out: Tensor = (h + (x if self.conv_shortcut is None else self.conv_shortcut(x))) / self.divisor
        return out


class _Attention(nn.Module):
    def __init__(self, config: UNet2DConfig, c: int, groups: int, divisor: float = 1.0) -> None:
        super().__init__()
        self.heads, self.divisor = c // (config.head_channels or c), divisor
        if self.heads < 1 or c % self.heads:
            raise ValueError(f"UNet2D: {c} channels cannot be shared out to heads of {config.head_channels}")
        self.group_norm = nn.GroupNorm(groups, c, eps=config.eps) if groups else None
        self.to_q, self.to_k, self.to_v = nn.Linear(c, c), nn.Linear(c, c), nn.Linear(c, c)
        self.to_out = nn.ModuleList([nn.Linear(c, c)])

    def forward(self, x: Tensor) -> Tensor:
        h = (x if self.group_norm is None else self.group_norm(x)).flatten(2).mT
        q, k, v = (to(h).unflatten(-1, (self.heads, -1)).transpose(1, 2) for to in (self.to_q, self.to_k, self.to_v))
        h = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        out: Tensor = (x + self.to_out[0](h).mT.view(x.shape)) / self.divisor
        return out


class _Level(nn.Module):
    """The residual blocks of one level, each with attention after it where the level has any, then the resampling."""

    def __init__(
        self,
        config: UNet2DConfig,
        inputs: list[int],
        width: int,
        attention: bool,
        down: nn.Module | None = None,
        up: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(_Res(config, c, width) for c in inputs)
        if attention:
            self.attentions = nn.ModuleList(_Attention(config, width, config.groups) for _ in inputs)
        if down is not None:
            self.downsamplers = nn.ModuleList([down])
        if up is not None:
            self.upsamplers = nn.ModuleList([up])

    def forward(self, x: Tensor, emb: Tensor, kept: list[Tensor], down: bool) -> Tensor:
        for k, res in enumerate(self.resnets):
            x = res(x if down else torch.cat([x, kept.pop()], dim=1), emb)
            if hasattr(self, "attentions"):
                x = self.attentions[k](x)
            if down:
                kept.append(x)
        if hasattr(self, "downsamplers"):
            x = self.downsamplers[0](x)
            kept.append(x)
        return self.upsamplers[0](x) if hasattr(self, "upsamplers") else x


class _Middle(nn.Module):
    def __init__(self, config: UNet2DConfig, c: int) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(_Res(config, c, c, config.middle_scale) for _ in range(2))
        if config.middle == "attention":
            self.attentions = nn.ModuleList([_Attention(config, c, config.middle_groups, config.middle_scale)])

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        x = self.resnets[0](x, emb)
        if hasattr(self, "attentions"):
            x = self.attentions[0](x)
        return cast(Tensor, self.resnets[1](x, emb))


class _Downsampler(nn.Module):
    def __init__(self, c: int, lopsided: bool) -> None:
        super().__init__()
        self.lopsided = lopsided
        self.conv = nn.Conv2d(c, c, 3, stride=2, padding=0 if lopsided else 1)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.conv(F.pad(x, (0, 1, 0, 1)) if self.lopsided else x))


class _Upsampler(nn.Module):
    def __init__(self, c: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest")))

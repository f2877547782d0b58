"""The two U-Nets of EDM, with the names that its checkpoints use.

`song` is DDPM++ and NCSN++ in one: residual blocks whose sums are divided by sqrt(2), attention of one head, and beside
the blocks, where a network has it, a pyramid of its input or of its answer. `dhariwal` is guided diffusion's once more,
under other names. Layers are named after the image side they were trained at (`enc.32x32_block0`); any other side goes
through as well, for the plan of layers is fixed here.

How a network wants to be called depends on what it was trained inside of: an EDM network is called with ln(sigma)/4, as
recon3d's own; a "vp" one with 999 t for the time t of its path, and gives the noise; a "ve" one with ln(sigma/2), and
gives minus the noise, which is turned here; an "iddpm" one with the time step 0 .. 999, and gives noise and a variance.

Source: Karras, Aittala, Aila, Laine (NeurIPS 2022), table 1 and appendix C.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Literal, cast

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from recon3d.priors.networks.published import PublishedNetwork, step_embedding

__all__ = ["EDMUNet", "EDMUNetConfig", "edm_unet_config"]

Shape = tuple[int, ...]


class EDMUNetConfig(BaseModel):
    """Architecture of an `EDMUNet`; all but `called` and `label` is read off the shapes by `edm_unet_config`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    style: Literal["song", "dhariwal"]
    called: Literal["edm", "vp", "ve", "iddpm"] = Field("edm", description="what the network was trained inside of")
    resolution: int = Field(ge=1, le=8192, description="image side it was trained at; layers are named after it")
    in_channels: int = Field(1, ge=1, le=64)
    out_channels: int = Field(1, ge=1, le=64)
    stem: int = Field(128, ge=4, le=4096, description="channels of the first convolution")
    noise: int = Field(128, ge=4, le=8192, description="width of the noise level's sines and cosines")
    embedding: int = Field(512, ge=4, le=16384)
    channels: tuple[int, ...] = Field(min_length=1, max_length=10, description="of every level, finest first")
    blocks: int = Field(4, ge=1, le=16, description="residual blocks of a level on the way down")
    attention: tuple[int, ...] = Field((), description="levels with self-attention, 0 the finest")
    fourier: bool = Field(False, description="stored random frequencies of the noise level")
    encoder: Literal["standard", "skip", "residual"] = "standard"
    decoder: Literal["standard", "skip"] = "standard"
    taps: int = Field(2, ge=2, le=16, multiple_of=2, description="of the filter that resamples")
    labels: int = Field(0, ge=0, le=100_000, description="classes it was trained with")
    label: int | None = Field(None, ge=0, description="the class to denoise as; null: none of them")
    augment: int = Field(0, ge=0, le=1024, description="numbers that told of augmentation in training; 0 is given")
    vp_steps: int = Field(1000, ge=2, description="vp: time 1 is this, less one")

    @property
    def multiple(self) -> int:
        """Image sides must be multiples of this."""
        return int(2 ** (len(self.channels) - 1))

    @model_validator(mode="after")
    def _sound(self) -> EDMUNetConfig:
        if self.label is not None and self.label >= self.labels:
            raise ValueError(f"label must be one of the {self.labels} classes, from 0, got {self.label}")
        return self


class EDMUNet(PublishedNetwork):
    """F(x, t): [b, c, row, col] and one number per image, or [1] for all -> [b, c_out, row, col].

    >>> net = EDMUNet(EDMUNetConfig(style="song", resolution=16, stem=16, noise=16, embedding=64, channels=(16, 32)))
    >>> net(torch.zeros(2, 1, 8, 12), torch.zeros(2)).shape
    torch.Size([2, 1, 8, 12])
    """

    def __init__(self, config: EDMUNetConfig) -> None:
        super().__init__(config)
        song, last, c = config.style == "song", len(config.channels) - 1, config.stem
        self.map_noise = _Frequencies(config)
        if config.labels:
            # one is added before the layers, with a bias, the other after them
            self.map_label = nn.Linear(config.labels, config.noise if song else config.embedding, bias=song)
        if config.augment:
            self.map_augment = nn.Linear(config.augment, config.noise, bias=False)
        self.map_layer0 = nn.Linear(config.noise, config.embedding)
        self.map_layer1 = nn.Linear(config.embedding, config.embedding)
        self.enc, self.dec = nn.ModuleDict(), nn.ModuleDict()
        skips, aux = [c], config.in_channels
        self.enc[f"{self._at(0)}_conv"] = _Conv(config, config.in_channels, c, 3)
        for level, width in enumerate(config.channels):
            at = self._at(level)
            if level:
                self.enc[f"{at}_down"] = _Block(config, c, c, "down")
                skips.append(c)
                if config.encoder == "skip":
                    self.enc[f"{at}_aux_down"] = _Conv(config, aux, aux, 0, "down")
                    self.enc[f"{at}_aux_skip"] = _Conv(config, aux, c, 1)
                elif config.encoder == "residual":
                    self.enc[f"{at}_aux_residual"] = _Conv(config, aux, c, 3, "down", late=True)
                    aux = c
            for k in range(config.blocks):
                self.enc[f"{at}_block{k}"] = _Block(config, c, width, attention=level in config.attention)
                c = width
                skips.append(c)
        for level in range(last, -1, -1):
            at, width = self._at(level), config.channels[level]
            if level == last:
                self.dec[f"{at}_in0"] = _Block(config, c, c, attention=True)
                self.dec[f"{at}_in1"] = _Block(config, c, c)
            else:
                self.dec[f"{at}_up"] = _Block(config, c, c, "up")
            for k in range(config.blocks + 1):
                seeing = level in config.attention and (not song or k == config.blocks)
                self.dec[f"{at}_block{k}"] = _Block(config, c + skips.pop(), width, attention=seeing)
                c = width
            if song and (config.decoder == "skip" or level == 0):
                if config.decoder == "skip" and level < last:
                    self.dec[f"{at}_aux_up"] = _Conv(config, config.out_channels, config.out_channels, 0, "up")
                self.dec[f"{at}_aux_norm"] = _norm(config, c)
                self.dec[f"{at}_aux_conv"] = _Conv(config, c, config.out_channels, 3)
        if not song:
            self.out_norm, self.out_conv = _norm(config, c), _Conv(config, c, config.out_channels, 3)

    @property
    def clock(self) -> Literal["time", "sigma", "log_sigma"]:
        """What t is: log(sigma)/4, the noise level itself, or the path's time."""
        clocks: dict[str, Literal["sigma", "log_sigma"]] = {"edm": "log_sigma", "ve": "sigma"}
        return clocks.get(self.config.called, "time")

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        self._check(x)
        called = self.config.called
        if called == "vp":
            t = (self.config.vp_steps - 1) * t
        elif called == "ve":
            t = (0.5 * t).log()
        emb = self._embedding(t)
        h = self._first(self.enc[f"{self._at(0)}_conv"], x)
        with self._fast(x):
            out = self._up(*self._down(x, h, emb), emb)
        return -out if called == "ve" else out

    def _at(self, level: int) -> str:
        side = self.config.resolution >> level
        return f"{side}x{side}"

    def _embedding(self, t: Tensor) -> Tensor:
        config, emb = self.config, self.map_noise(t)
        chosen = torch.zeros(1, config.labels, dtype=emb.dtype, device=emb.device)
        if config.label is not None:
            chosen[0, config.label] = 1
        if config.style == "song":
            emb = emb.unflatten(1, (2, -1)).flip(1).flatten(1)
            if config.labels:
                emb = emb + self.map_label(chosen * math.sqrt(config.labels))
            return F.silu(self.map_layer1(F.silu(self.map_layer0(emb))))
        emb = self.map_layer1(F.silu(self.map_layer0(emb)))
        return F.silu(emb + self.map_label(chosen) if config.labels else emb)

    def _down(self, x: Tensor, h: Tensor, emb: Tensor) -> tuple[Tensor, list[Tensor]]:
        config, aux = self.config, x
        kept = [h]
        for level in range(len(config.channels)):
            at = self._at(level)
            if level:
                h = self.enc[f"{at}_down"](h, emb)
                if config.encoder == "skip":
                    aux = self.enc[f"{at}_aux_down"](aux)
                    h = h + self.enc[f"{at}_aux_skip"](aux)
                elif config.encoder == "residual":
                    aux = h = (h + self.enc[f"{at}_aux_residual"](aux)) * _HALF
                kept.append(h)
            for k in range(config.blocks):
                h = self.enc[f"{at}_block{k}"](h, emb)
                kept.append(h)
        return h, kept

    def _up(self, h: Tensor, kept: list[Tensor], emb: Tensor) -> Tensor:
        config, last, answer = self.config, len(self.config.channels) - 1, None
        for level in range(last, -1, -1):
            at = self._at(level)
            for name in ("in0", "in1") if level == last else ("up",):
                h = self.dec[f"{at}_{name}"](h, emb)
            for k in range(config.blocks + 1):
                h = self.dec[f"{at}_block{k}"](torch.cat([h, kept.pop()], dim=1), emb)
            if f"{at}_aux_conv" in self.dec:
                with torch.autocast(h.device.type, enabled=False):
                    share = self.dec[f"{at}_aux_conv"](F.silu(self.dec[f"{at}_aux_norm"](h.float())))
                    answer = share if answer is None else share + self.dec[f"{at}_aux_up"](answer)
        if answer is None:
            with torch.autocast(h.device.type, enabled=False):
                answer = self.out_conv(F.silu(self.out_norm(h.float())))
        return cast(Tensor, answer)


def edm_unet_config(
    shapes: Mapping[str, Shape], *, called: str = "edm", label: int | None = None, vp_steps: int = 1000
) -> EDMUNetConfig:
    """The architecture that the names and shapes of a state dict tell.

    Args:
        shapes: of every tensor, names without the `model.` of the wrapper.
        called, label, vp_steps: as in EDMUNetConfig; no shape depends on them.

    Raises:
        ValueError: a tensor that every such network has is missing.
    """

    def shape(name: str) -> Shape:
        if name not in shapes:
            raise ValueError(f"tensor {name} is missing; it is not a U-Net of EDM, or a renamed one")
        return shapes[name]

    found = [re.match(r"(enc|dec)\.(\d+)x\2_", name) for name in shapes]
    sides = sorted({int(match[2]) for match in found if match}, reverse=True)
    if not sides:
        raise ValueError("no tensor is named after an image side, such as enc.64x64_conv.weight")
    at = [f"{side}x{side}" for side in sides]
    for level, side in enumerate(sides):
        if side != sides[0] >> level:
            raise ValueError(f"its layers are of sides {', '.join(map(str, sides))}, which are no halves")
    blocks = 0
    while f"enc.{at[0]}_block{blocks}.conv1.weight" in shapes:
        blocks += 1
    shape(f"enc.{at[0]}_block0.conv1.weight")
    song = f"dec.{at[0]}_aux_conv.weight" in shapes
    head = shape(f"dec.{at[0]}_aux_conv.weight" if song else "out_conv.weight")
    coarse = at[1] if len(at) > 1 else at[0]
    first, noise = shape(f"enc.{at[0]}_conv.weight"), shape("map_layer0.weight")
    filters = [value[-1] for name, value in shapes.items() if name.endswith(".resample_filter")]
    return EDMUNetConfig.model_validate(
        {
            "style": "song" if song else "dhariwal",
            "called": called,
            "resolution": sides[0],
            "in_channels": first[1],
            "out_channels": head[0],
            "stem": first[0],
            "noise": noise[1],
            "embedding": noise[0],
            "channels": tuple(shape(f"enc.{name}_block0.conv1.weight")[0] for name in at),
            "blocks": blocks,
            "attention": tuple(i for i, name in enumerate(at) if f"enc.{name}_block0.qkv.weight" in shapes),
            "fourier": "map_noise.freqs" in shapes,
            "encoder": next((k for k in ("skip", "residual") if f"enc.{coarse}_aux_{k}.weight" in shapes), "standard"),
            "decoder": "skip" if song and len(at) > 1 and f"dec.{coarse}_aux_conv.weight" in shapes else "standard",
            "taps": filters[0] if filters else 2,
            "labels": shapes["map_label.weight"][1] if "map_label.weight" in shapes else 0,
            "label": label,
            "augment": shapes["map_augment.weight"][1] if "map_augment.weight" in shapes else 0,
            "vp_steps": vp_steps,
        }
    )


_HALF = math.sqrt(0.5)
_CHANNELS_PER_HEAD = 64  # of a dhariwal network; a song network has one head


def _norm(config: EDMUNetConfig, c: int) -> nn.GroupNorm:
    return nn.GroupNorm(max(min(32, c // 4), 1), c, eps=1e-6 if config.style == "song" else 1e-5)


class _Frequencies(nn.Module):
    """Cosines, then sines, of the noise level."""

    def __init__(self, config: EDMUNetConfig) -> None:
        super().__init__()
        self.width = config.noise
        self.shift = 1.0 if config.style == "song" else 0.0
        if config.fourier:
            self.register_buffer("freqs", torch.zeros(config.noise // 2))

    def forward(self, t: Tensor) -> Tensor:
        freqs = getattr(self, "freqs", None)
        if freqs is None:
            return step_embedding(t, self.width, shift=self.shift)
        phase = t[:, None] * (2 * math.pi * freqs)
        return torch.cat([phase.cos(), phase.sin()], dim=1)


class _Conv(nn.Module):
    """A convolution, a resampling by a fixed filter (kernel 0), or both; `late` filters after the convolution."""

    def __init__(
        self, config: EDMUNetConfig, c_in: int, c_out: int, kernel: int, resample: str = "", late: bool = False
    ) -> None:
        super().__init__()
        self.resample, self.kernel, self.late = resample, kernel, late
        if kernel:
            self.weight = nn.Parameter(torch.zeros(c_out, c_in, kernel, kernel))
            self.bias = nn.Parameter(torch.zeros(c_out))
        if resample:
            self.register_buffer("resample_filter", torch.zeros(1, 1, config.taps, config.taps))

    def forward(self, x: Tensor) -> Tensor:
        if self.late:
            # the filter's margin comes from the image, not from the convolved one
            x = F.conv2d(x, self.weight, padding=self.kernel // 2 + self._margin())
            return self._filtered(x, 0) + self.bias[:, None, None]
        if self.resample:
            x = self._filtered(x, self._margin())
        return F.conv2d(x, self.weight, self.bias, padding=self.kernel // 2) if self.kernel else x

    def _margin(self) -> int:
        return (cast(Tensor, self.resample_filter).shape[-1] - 1) // 2

    def _filtered(self, x: Tensor, margin: int) -> Tensor:
        c = x.shape[1]
        taps = cast(Tensor, self.resample_filter).to(x.dtype).expand(c, -1, -1, -1)
        if self.resample == "down":
            return F.conv2d(x, taps, groups=c, stride=2, padding=margin)
        return F.conv_transpose2d(x, 4 * taps, groups=c, stride=2, padding=margin)


class _Block(nn.Module):
    """A residual block, with self-attention at its end where it has any."""

    def __init__(
        self, config: EDMUNetConfig, c_in: int, c_out: int, resample: str = "", attention: bool = False
    ) -> None:
        super().__init__()
        self.song = song = config.style == "song"
        self.scale = _HALF if song else 1.0
        self.norm0 = _norm(config, c_in)
        self.conv0 = _Conv(config, c_in, c_out, 3, resample)
        self.affine = nn.Linear(config.embedding, c_out if song else 2 * c_out)
        self.norm1 = _norm(config, c_out)
        self.conv1 = _Conv(config, c_out, c_out, 3)
        if resample or c_in != c_out:
            # a dhariwal network resamples its skip without a convolution
            self.skip = _Conv(config, c_in, c_out, 1 if song or c_in != c_out else 0, resample)
        self.heads = (1 if song else c_out // _CHANNELS_PER_HEAD) if attention else 0
        if attention:
            if self.heads < 1 or c_out % self.heads:
                raise ValueError(f"EDMUNet: attention needs multiples of {_CHANNELS_PER_HEAD} channels, got {c_out}")
            self.norm2 = _norm(config, c_out)
            self.qkv, self.proj = _Conv(config, c_out, 3 * c_out, 1), _Conv(config, c_out, c_out, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.conv0(F.silu(self.norm0(x)))
        e = self.affine(emb)[:, :, None, None]
        if self.song:
            h = F.silu(self.norm1(h + e))
        else:
            scale, shift = e.chunk(2, dim=1)
            h = F.silu(torch.addcmul(shift, self.norm1(h), scale + 1))
        h = self.conv1(h)
        h = (h + (self.skip(x) if hasattr(self, "skip") else x)) * self.scale
        return self._attention(h) if self.heads else cast(Tensor, h)

    def _attention(self, x: Tensor) -> Tensor:
        b, c, *sides = x.shape
        # q, k and v of a channel stand next to each other
        q, k, v = self.qkv(self.norm2(x)).reshape(b, self.heads, c // self.heads, 3, -1).unbind(3)
        h = F.scaled_dot_product_attention(q.mT, k.mT, v.mT).mT.reshape(b, c, *sides)
        return cast(Tensor, (self.proj(h) + x) * self.scale)

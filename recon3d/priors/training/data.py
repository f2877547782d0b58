"""Training slices of volumes: random crops, spacings, orientations and slice thicknesses.

Every batch is a function of (seed, step) alone, so a resumed run sees the crops an uninterrupted one would have seen.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from recon3d.priors.positions import positions
from recon3d.priors.training.augment import between, random_phase, shading, turned, with_lesions
from recon3d.priors.training.config import TrainConfig
from recon3d.priors.training.objectives import sigmas
from recon3d.priors.training.pairs import partners, with_condition
from recon3d.priors.training.volumes import Volume, check_alike, find, load_volume, stem

__all__ = ["SliceData"]


@dataclass(frozen=True)
class _Place:
    """Where a crop lies in its slice, which the turn by `angle` about its middle has made upright.

    Attributes:
        row, col: of the first pixel's middle, in pixels of the slice.
        step: pixels of the slice from one pixel of the crop to the next.
        whole: rows and columns of the slice.
    """

    row: float
    col: float
    step: float
    whole: tuple[int, int]

    def mirrored(self, axis: int, size: int) -> _Place:
        """The crop's place in the mirrored slice when it is mirrored too; axis 0: upside down."""
        last = (size - 1) * self.step
        if axis == 0:
            return replace(self, row=self.whole[0] - 1 - self.row - last)
        return replace(self, col=self.whole[1] - 1 - self.col - last)

    def transposed(self) -> _Place:
        return _Place(self.col, self.row, self.step, (self.whole[1], self.whole[0]))

    def channels(self, size: int) -> Tensor:
        return positions((size, size), self.whole, (self.row, self.col), self.step)


class SliceData:
    """All training volumes and the validation slices, with `batch(step)` as the only source of randomness."""

    def __init__(self, config: TrainConfig) -> None:
        data = config.data
        self.config = config
        root = Path(data.root)
        held_out = root / data.validation
        skip = {*data.exclude, stem(held_out)}
        self.volumes: list[Volume] = []
        for source in data.sources:
            found = find(root, source, skip)
            beside = [] if source.condition is None else partners(found, source.path, source.condition, root)
            volumes = []
            for k, path in enumerate(found):
                weight = source.weight / len(found)
                volume = load_volume(path, data, weight, source.max_block_z, source.plane, source)
                if data.condition is not None:
                    volume = with_condition(volume, path, beside[k], data.condition, source.plane or data.plane)
                volumes.append(volume)
            check_alike(volumes, source.path)
            self.volumes += volumes
        said = next((s for s in data.sources if s.spacing_mm is not None), None)
        self.validation = load_volume(held_out, data, source=said)
        if data.condition is not None:
            other = root / data.condition.validation
            self.validation = with_condition(self.validation, held_out, other, data.condition, data.plane)
        self._check_size()
        self._background = (data.background - data.file_offset) / data.file_scale

    def _check_size(self) -> None:
        m = self.config.network.multiple
        for v in (*self.volumes, self.validation):
            h, w = v.values.shape[-2:]
            if min(h, w) < m:
                raise ValueError(
                    f"training data {v.name}: slices of {h} x {w} are smaller than the network's stride of {m}; "
                    "exclude it, or give the network fewer levels"
                )

    def batch(self, step: int) -> tuple[Tensor, ...]:
        """Clean crops [b, channel, row, col], noise levels [b], unit noise shaped as the crops, and what is beside."""
        cfg = self.config
        rng = np.random.Generator(np.random.Philox(key=cfg.seed, counter=[0, 0, 0, step]))
        shares = np.array([c.share for c in cfg.crops])
        crop = cfg.crops[int(rng.choice(len(shares), p=shares / shares.sum()))]
        drawn = [self._crop(rng, crop.size) for _ in range(crop.batch)]
        clean, *beside = (torch.stack(crops) for crops in zip(*drawn, strict=True))
        # stratified over the batch: every step sees low and high levels
        u = (rng.permutation(crop.batch) + rng.random(crop.batch)) / crop.batch
        sigma = sigmas(cfg, u)
        noise = torch.from_numpy(rng.standard_normal(clean.shape, dtype=np.float32))
        return clean, sigma, noise, *beside

    def validation_set(self) -> tuple[Tensor, ...]:
        """Evenly spaced slices or groups of the held-out volume, cut to the network's multiple, and fixed noise.

        What else the network is shown comes third where there is anything: the condition, then positions.
        """
        held, data = self.validation, self.config.data
        v, depth, n = held.values, len(held.values) // held.parts, data.slices
        k = min(self.config.validation_slices, depth)
        index = np.linspace(0, depth - 1, k + 2).round().astype(int)[1:-1] if k + 2 <= depth else np.arange(k)
        m = self.config.network.multiple
        h, w = v.shape[1] // m * m, v.shape[2] // m * m
        first = np.clip(index - n // 2, 0, depth - n)
        clean = torch.stack([v[z * held.parts : (z + n) * held.parts, :h, :w] for z in first])
        rng = np.random.Generator(np.random.Philox(key=[self.config.seed, 1]))
        if data.complex and held.parts == 1:
            step = self._step_px(held)
            clean = torch.stack([turned(x, random_phase(rng, x, data.phase, step)) for x in clean])
        noise = rng.standard_normal(clean.shape, dtype=np.float32)
        beside = []
        if held.condition is not None:
            c = held.condition
            beside.append(torch.stack([c[z : z + n, :h, :w] for z in first]))
        if data.positions:
            beside.append(positions((h, w), (v.shape[1], v.shape[2])).expand(k, -1, -1, -1))
        return clean, torch.from_numpy(noise), *([torch.cat(beside, dim=1)] if beside else [])

    def _crop(self, rng: np.random.Generator, size: int) -> tuple[Tensor, ...]:
        """A crop [channel, row, col], and what the network is shown beside it where there is anything."""
        data = self.config.data
        fits = [v for v in self.volumes if min(v.values.shape[1:]) >= 0.75 * size] or self.volumes
        p = np.array([v.weight for v in fits])
        volume = fits[int(rng.choice(len(fits), p=p / p.sum()))]
        zoom, angle = self._grid(rng, volume)
        parts, n = volume.parts, data.slices * volume.parts
        depth = len(volume.values) // parts
        thick = min(1 + int(rng.random() < 0.4) * int(rng.integers(1, 8)), volume.max_block_z, depth // data.slices)
        thick = thick if parts == 1 else 1
        is_complex = data.complex and parts == 2
        for _ in range(4):
            z = parts * int(rng.integers(0, depth - data.slices * thick + 1))
            slab = slice(z, z + n * thick)
            place = _place(rng, volume.values.shape[1:], size, zoom, angle, volume.open_air)
            x = _blocks(volume.values[slab], thick)
            x = self._cut(x, size, place, angle, volume.open_air, signed=is_complex)
            level = torch.hypot(x[0], x[1]) if is_complex else x
            if float(level.mean()) > self._background + data.least_mean:  # not an all-background crop
                break
        both = [x]
        if volume.condition is not None and data.condition is not None:
            c = _blocks(volume.condition[slab], thick)
            both.append(self._cut(c, size, place, angle, volume.open_air, data.condition.empty))
        for axis, share in ((1, 0.5), (0, data.flip_rows)):
            if rng.random() < share:
                both, place = [x.flip(axis + 1) for x in both], place.mirrored(axis, size)
        if data.slices > 1 and rng.random() < 0.5:
            both = [x.flip(0) for x in both]
        step = self._step_px(volume) * thick / zoom
        if data.lesions.share > 0 and rng.random() < data.lesions.share:
            both[0] = with_lesions(rng, both[0], data.lesions, step)
        if data.quarter_turns > 0 and rng.random() < data.quarter_turns:
            both, place = [x.mT for x in both], place.transposed()
        x = self._varied(rng, both[0], step, is_complex)
        beside = []
        if data.condition is not None:
            gain = 1 + data.condition.gain_jitter * (2 * rng.random() - 1)
            beside.append((both[1] - data.condition.empty) * gain + data.condition.empty)
        if data.positions:
            beside.append(place.channels(size))
        return (x, torch.cat(beside)) if beside else (x,)

    def _varied(self, rng: np.random.Generator, x: Tensor, step: float, is_complex: bool) -> Tensor:
        """A crop with another brightness and contrast, and a phase; slices are `step` pixels apart.

        One that is complex by itself keeps its phase but for a constant.
        """
        data = self.config.data
        gain = 1 + data.gain_jitter * (2 * rng.random() - 1)
        shift = data.offset_jitter * (2 * rng.random() - 1)
        gain *= between(rng, data.gain)
        gamma = between(rng, data.gamma)
        if gamma != 1:
            x = x.clamp(min=0) ** gamma
        if data.shading > 1:
            x = (x - self._background) * shading(rng, x.shape[-1], data.shading) + self._background
        if is_complex:
            constant = 2 * math.pi * torch.full((), rng.random())
            real, imaginary = gain * x
            return torch.stack(
                [
                    real * constant.cos() - imaginary * constant.sin(),
                    real * constant.sin() + imaginary * constant.cos(),
                ]
            )
        # the gain acts about the background, so that air stays air
        x = (x - self._background) * gain + self._background + shift
        return turned(x, random_phase(rng, x, data.phase, step)) if data.complex else x

    @staticmethod
    def _step_px(volume: Volume) -> float:
        """Distance of slices in pixels."""
        return volume.spacing_mm[0] / math.sqrt(volume.spacing_mm[1] * volume.spacing_mm[2])

    def _grid(self, rng: np.random.Generator, volume: Volume) -> tuple[float, float]:
        """(spacing change, rotation in radians); (1, 0) = the voxel grid itself."""
        data = self.config.data
        native = math.sqrt(volume.spacing_mm[1] * volume.spacing_mm[2])
        if rng.random() < data.native_share and data.spacing_mm[0] <= native <= data.spacing_mm[1]:
            return 1.0, 0.0
        low = max(data.zoom[0], data.spacing_mm[0] / native)
        high = min(data.zoom[1], data.spacing_mm[1] / native)
        if low >= high:  # a volume coarser or finer than everything asked for: nearest allowed spacing
            low = high = data.spacing_mm[1] / native if native > data.spacing_mm[1] else data.spacing_mm[0] / native
        zoom = math.exp(rng.uniform(math.log(low), math.log(high)))
        return zoom, math.radians(data.rotate_deg) * (2 * rng.random() - 1)

    def _cut(
        self,
        x: Tensor,
        size: int,
        place: _Place,
        angle: float,
        open_air: bool,
        background: float | None = None,
        signed: bool = False,
    ) -> Tensor:
        """A crop; `background` (network units) lies around x in open air, None for that of the target.

        Nothing but a `signed` crop is below its background.
        """
        h, w = x.shape[-2:]
        background = self._background if background is None else background
        if _on_voxels(place.step, angle, (h, w), size, open_air):
            top, left = round(place.row), round(place.col)
            pad = (max(0, -left), max(0, left + size - w), max(0, -top), max(0, top + size - h))
            x = F.pad(x, pad, value=background)
            return x[..., top + pad[2] : top + pad[2] + size, left + pad[0] : left + pad[0] + size]
        zoom = place.step
        # coarser than the voxels: average 2x2 samples, as a larger voxel would
        over = 2 if zoom > 1.05 else 1
        n = size * over
        at = (torch.arange(n, dtype=torch.float32) + 0.5) / over - 0.5
        # from the middle of the slice, upright; then turned
        down, right = place.row + zoom * at - (h - 1) / 2, place.col + zoom * at - (w - 1) / 2
        c, s = math.cos(angle), math.sin(angle)
        rows = c * down[:, None] - s * right[None, :]
        cols = s * down[:, None] + c * right[None, :]
        grid = torch.stack([2 * cols / w, 2 * rows / h], dim=-1)[None]
        mode = "zeros" if open_air else "reflection"
        above = (x - background).reshape(1, -1, h, w)
        y = F.grid_sample(above, grid, mode="bicubic", padding_mode=mode, align_corners=False)
        if over == 2:
            y = F.avg_pool2d(y, 2)
        y = y.reshape(*x.shape[:-2], size, size)
        return (y if signed else y.clamp(min=0)) + background


def _on_voxels(zoom: float, angle: float, whole: tuple[int, ...], size: int, open_air: bool) -> bool:
    """Whether a crop is a window of its slice, and nothing is interpolated."""
    return zoom == 1.0 and angle == 0.0 and (open_air or min(whole) >= size)


def _place(
    rng: np.random.Generator, whole: tuple[int, ...], size: int, zoom: float, angle: float, open_air: bool
) -> _Place:
    """A place for a crop: anywhere inside, or about centred where it does not fit."""
    h, w = whole
    if _on_voxels(zoom, angle, whole, size, open_air):
        top, left = (_start(rng, n, size) for n in (h, w))
        return _Place(float(top), float(left), 1.0, (h, w))
    # the crop's middle from the slice's, by the rule above for a cut of `size * zoom` pixels; then turned upright
    y, x = (_start(rng, n, round(size * zoom)) + 0.5 * size * zoom - n / 2 for n in (h, w))
    c, s = math.cos(angle), math.sin(angle)
    first = 0.5 * (size - 1) * zoom
    return _Place(c * y + s * x + (h - 1) / 2 - first, c * x - s * y + (w - 1) / 2 - first, zoom, (h, w))


def _blocks(x: Tensor, thick: int) -> Tensor:
    """Means over blocks of `thick` slices."""
    return x if thick == 1 else x.unflatten(0, (-1, thick)).mean(dim=1)


def _start(rng: np.random.Generator, n: int, size: int) -> int:
    """First index of a cut of `size` from `n`: anywhere inside, or about centred when it does not fit."""
    if n > size:
        return int(rng.integers(0, n - size + 1))
    return (n - size) // 2 + int(rng.integers(-8, 9)) * int(n < size)

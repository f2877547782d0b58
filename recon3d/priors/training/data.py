"""Training slices from NIfTI volumes: random crops, spacings, orientations and slice thicknesses.

Volumes are held as [z, y, x] float32 in network units. Every batch is a function of (seed, step) alone, so a
resumed run sees the crops an uninterrupted one would have seen.
"""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from recon3d.io import BadInput
from recon3d.priors.training.config import DataConfig, LesionConfig, PhaseConfig, TrainConfig
from recon3d.priors.training.objectives import sigmas
from recon3d.priors.training.pairs import partners, with_condition

__all__ = ["SliceData", "Volume", "load_volume", "random_phase", "with_lesions"]


@dataclass(frozen=True)
class Volume:
    """One training volume in network units."""

    name: str
    values: Tensor  # [z, y, x] float32
    spacing_mm: tuple[float, float, float]  # z, y, x
    weight: float
    max_block_z: int
    open_air: bool  # the border is background, so background may be continued beyond it
    condition: Tensor | None = None  # [z, y, x] float32 in network units, for a conditional prior


def load_volume(
    path: Path, data: DataConfig, weight: float = 1.0, max_block_z: int = 1, plane: str | None = None
) -> Volume:
    """A NIfTI volume turned to [z, y, x] = (superior, posterior, left), clipped and mapped to network units.

    Another plane than the axial one puts its own axis first; `plane` None is that of `data`.

    Raises:
        BadInput: the file cannot be read.
        ValueError: the file is not a 3D volume, has no finite values, a spacing that is not positive or fewer slices
            than a crop has.
    """
    import nibabel
    from nibabel.filebasedimages import ImageFileError

    try:
        image = nibabel.load(path)
        values = np.asarray(image.dataobj, dtype=np.float32)
    except (OSError, EOFError, ValueError, zlib.error, ImageFileError) as error:
        why = f"cannot be read as a NIfTI volume ({str(error).splitlines()[0]})"
        raise BadInput(path, why, "check data.root and the file") from None
    if values.ndim != 3:
        raise ValueError(f"training data {path}: expected a 3D volume, got {values.ndim} axes")
    start = nibabel.orientations.io_orientation(image.affine)
    want = nibabel.orientations.axcodes2ornt(("L", "P", "S"))
    turn = nibabel.orientations.ornt_transform(start, want)
    values = nibabel.orientations.apply_orientation(values, turn)
    zooms = np.linalg.norm(image.affine[:3, :3], axis=0)[np.argsort(start[:, 0])]
    if not np.isfinite(values).all() or not (zooms > 0).all():
        raise ValueError(f"training data {path}: values must be finite and spacings positive")
    low, high = data.clip
    volume = np.clip(values.transpose(2, 1, 0), low, high)  # L, P, S -> z, y, x
    spacing = (float(zooms[2]), float(zooms[1]), float(zooms[0]))
    plane = plane or data.plane
    if plane == "coronal":
        volume, spacing = volume.transpose(1, 0, 2), (spacing[1], spacing[0], spacing[2])
    elif plane == "sagittal":
        volume, spacing = volume.transpose(2, 0, 1), (spacing[2], spacing[0], spacing[1])
    if len(volume) < data.slices:
        raise ValueError(f"training data {path}: crops have {data.slices} {plane} slices, it has {len(volume)}")
    scale = data.file_scale
    if data.percentile is not None:
        scale = float(np.percentile(volume, data.percentile)) - data.file_offset
        if not scale > 0:
            raise ValueError(f"training data {path}: percentile {data.percentile:g} is not above file_offset")
    if data.mean_above is not None:
        if not volume.max() > max(0.0, data.file_offset):
            raise ValueError(f"training data {path}: mean_above needs values above 0 and file_offset")
        scale = float(volume[volume > data.mean_above * volume.max()].mean(dtype=np.float64)) - data.file_offset
    border = np.concatenate(
        [volume[:, 0].ravel(), volume[:, -1].ravel(), volume[:, :, 0].ravel(), volume[:, :, -1].ravel()]
    )
    open_air = bool(np.median(np.abs(border - data.background)) < 0.1 * scale)
    net = torch.from_numpy(np.ascontiguousarray((volume - data.file_offset) / scale, dtype=np.float32))
    if data.floor > 0:
        net = (net.square() - data.floor**2).clamp(min=0).sqrt()
    return Volume(Path(path).name.removesuffix(".gz").removesuffix(".nii"), net, spacing, weight, max_block_z, open_air)


class SliceData:
    """All training volumes and the validation slices, with `batch(step)` as the only source of randomness."""

    def __init__(self, config: TrainConfig) -> None:
        data = config.data
        self.config = config
        root = Path(data.root)
        held_out = root / data.validation
        skip = {*data.exclude, held_out.name.removesuffix(".gz").removesuffix(".nii")}
        self.volumes: list[Volume] = []
        for source in data.sources:
            found = sorted(root.glob(source.path)) if not Path(source.path).is_absolute() else [Path(source.path)]
            found = [p for p in found if p.name.removesuffix(".gz").removesuffix(".nii") not in skip]
            if not found:
                raise ValueError(f"training data: no volume matches {source.path!r} under {root}")
            beside = [] if source.condition is None else partners(found, source.path, source.condition, root)
            for k, path in enumerate(found):
                volume = load_volume(path, data, source.weight / len(found), source.max_block_z, source.plane)
                if data.condition is not None:
                    volume = with_condition(volume, path, beside[k], data.condition, source.plane or data.plane)
                self.volumes.append(volume)
        self.validation = load_volume(held_out, data)
        if data.condition is not None:
            other = root / data.condition.validation
            self.validation = with_condition(self.validation, held_out, other, data.condition, data.plane)
        self._background = (data.background - data.file_offset) / data.file_scale

    def batch(self, step: int) -> tuple[Tensor, ...]:
        """Clean crops [b, channel, row, col], noise levels [b], unit noise shaped as the crops, and any conditions."""
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

        The slices of the condition come third where there is one.
        """
        v = self.validation.values
        k = min(self.config.validation_slices, v.shape[0])
        index = np.linspace(0, v.shape[0] - 1, k + 2).round().astype(int)[1:-1] if k + 2 <= v.shape[0] else np.arange(k)
        m = self.config.network.multiple
        h, w = v.shape[1] // m * m, v.shape[2] // m * m
        n = self.config.data.slices
        first = np.clip(index - n // 2, 0, v.shape[0] - n)
        clean = torch.stack([v[z : z + n, :h, :w] for z in first])
        rng = np.random.Generator(np.random.Philox(key=[self.config.seed, 1]))
        if self.config.data.complex:
            step = self._step_px(self.validation)
            clean = torch.stack([_turned(x, random_phase(rng, x, self.config.data.phase, step)) for x in clean])
        noise = rng.standard_normal(clean.shape, dtype=np.float32)
        c = self.validation.condition
        beside = () if c is None else (torch.stack([c[z : z + n, :h, :w] for z in first]),)
        return clean, torch.from_numpy(noise), *beside

    def _crop(self, rng: np.random.Generator, size: int) -> tuple[Tensor, ...]:
        """A crop [channel, row, col], and that of the condition where there is one."""
        data = self.config.data
        fits = [v for v in self.volumes if min(v.values.shape[1:]) >= 0.75 * size] or self.volumes
        p = np.array([v.weight for v in fits])
        volume = fits[int(rng.choice(len(fits), p=p / p.sum()))]
        zoom, angle = self._grid(rng, volume)
        depth, n = volume.values.shape[0], data.slices
        thick = min(1 + int(rng.random() < 0.4) * int(rng.integers(1, 8)), volume.max_block_z, depth // n)
        for _ in range(4):
            z = int(rng.integers(0, depth - n * thick + 1))
            drawn = rng.bit_generator.state
            x = _blocks(volume.values[z : z + n * thick], thick)
            x = self._cut(rng, x, size, zoom, angle, volume.open_air)
            if float(x.mean()) > self._background + data.least_mean:  # not an all-background crop
                break
        both = [x]
        if volume.condition is not None and data.condition is not None:
            # the same draws once more: the condition is cut where the target was
            rng.bit_generator.state = drawn
            c = _blocks(volume.condition[z : z + n * thick], thick)
            both.append(self._cut(rng, c, size, zoom, angle, volume.open_air, data.condition.empty))
        for axis, share in ((2, 0.5), (1, data.flip_rows)):
            if rng.random() < share:
                both = [x.flip(axis) for x in both]
        if n > 1 and rng.random() < 0.5:
            both = [x.flip(0) for x in both]
        step = self._step_px(volume) * thick / zoom
        if data.lesions.share > 0 and rng.random() < data.lesions.share:
            both[0] = with_lesions(rng, both[0], data.lesions, step)
        if data.quarter_turns > 0 and rng.random() < data.quarter_turns:
            both = [x.mT for x in both]
        x = self._varied(rng, both[0], step)
        if data.condition is None:
            return (x,)
        gain = 1 + data.condition.gain_jitter * (2 * rng.random() - 1)
        return x, (both[1] - data.condition.empty) * gain + data.condition.empty

    def _varied(self, rng: np.random.Generator, x: Tensor, step: float) -> Tensor:
        """A crop with another brightness and contrast, and a phase; slices are `step` pixels apart."""
        data = self.config.data
        gain = 1 + data.gain_jitter * (2 * rng.random() - 1)
        shift = data.offset_jitter * (2 * rng.random() - 1)
        gain *= _between(rng, data.gain)
        gamma = _between(rng, data.gamma)
        if gamma != 1:
            x = x.clamp(min=0) ** gamma
        if data.shading > 1:
            x = (x - self._background) * _shading(rng, x.shape[-1], data.shading) + self._background
        # the gain acts about the background, so that air stays air
        x = (x - self._background) * gain + self._background + shift
        return _turned(x, random_phase(rng, x, data.phase, step)) if data.complex else x

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
        rng: np.random.Generator,
        x: Tensor,
        size: int,
        zoom: float,
        angle: float,
        open_air: bool,
        background: float | None = None,
    ) -> Tensor:
        """A crop; `background` (network units) lies around x in open air, None for that of the target."""
        h, w = x.shape[-2:]
        background = self._background if background is None else background
        if zoom == 1.0 and angle == 0.0 and open_air | (min(h, w) >= size):
            top, left = (_start(rng, n, size) for n in (h, w))
            pad = (max(0, -left), max(0, left + size - w), max(0, -top), max(0, top + size - h))
            x = F.pad(x, pad, value=background)
            return x[..., top + pad[2] : top + pad[2] + size, left + pad[0] : left + pad[0] + size]
        # centre of the crop, in pixels of x, with the same rule as above for the cut of `size * zoom` pixels
        cy, cx = (_start(rng, n, round(size * zoom)) + 0.5 * size * zoom for n in (h, w))
        c, s = math.cos(angle) * zoom, math.sin(angle) * zoom
        # coarser than the voxels: average 2x2 samples, as a larger voxel would
        over = 2 if zoom > 1.05 else 1
        n = size * over
        at = (torch.arange(n, dtype=torch.float32) + 0.5) / over - size / 2
        rows = cy + c * at[:, None] - s * at[None, :]
        cols = cx + s * at[:, None] + c * at[None, :]
        grid = torch.stack([2 * cols / w - 1, 2 * rows / h - 1], dim=-1)[None]
        mode = "zeros" if open_air else "reflection"
        above = (x - background).reshape(1, -1, h, w)
        y = F.grid_sample(above, grid, mode="bicubic", padding_mode=mode, align_corners=False)
        if over == 2:
            y = F.avg_pool2d(y, 2)
        return y.reshape(*x.shape[:-2], size, size).clamp(min=0) + background


def _blocks(x: Tensor, thick: int) -> Tensor:
    """Means over blocks of `thick` slices."""
    return x if thick == 1 else x.unflatten(0, (-1, thick)).mean(dim=1)


def _start(rng: np.random.Generator, n: int, size: int) -> int:
    """First index of a cut of `size` from `n`: anywhere inside, or about centred when it does not fit."""
    if n > size:
        return int(rng.integers(0, n - size + 1))
    return (n - size) // 2 + int(rng.integers(-8, 9)) * int(n < size)


def with_lesions(rng: np.random.Generator, x: Tensor, lesions: LesionConfig, step_px: float = 1.0) -> Tensor:
    """Activity with hot and cold spots where there is activity; activity that is zero comes back as it is.

    Args:
        rng: of all choices.
        x: [row, col], or [slice, row, col] of neighbouring slices, whose spots are ellipsoids.
        lesions: number, size and strength.
        step_px: distance of slices in pixels.
    """
    h, w = x.shape[-2:]
    slices = x.reshape(-1, h, w)
    inside = (slices > 0.1 * slices.mean()).nonzero()[:, 1:]
    if float(x.max()) <= 0 or len(inside) == 0:
        return x
    depth = torch.arange(len(slices), dtype=torch.float32)[:, None, None] * step_px
    rows, cols = torch.arange(h, dtype=torch.float32)[:, None], torch.arange(w, dtype=torch.float32)[None]
    for _ in range(int(rng.integers(1, lesions.most + 1))):
        cy, cx = (float(v) + rng.uniform(-0.5, 0.5) for v in inside[int(rng.integers(len(inside)))])
        a = _between(rng, lesions.radius_px)
        b = min(max(a * math.exp(rng.uniform(-0.4, 0.4)), lesions.radius_px[0]), lesions.radius_px[1])
        turn, edge = rng.uniform(0, math.pi), rng.uniform(*lesions.edge_px)
        mean = math.sqrt(a * b)
        # the spot may have its middle beyond the slices, of which a single one shows it whole
        cz = rng.uniform(-0.8 * mean, float(depth[-1]) + 0.8 * mean) if len(slices) > 1 else 0.0
        c, s = math.cos(turn), math.sin(turn)
        u, v = (c * (cols - cx) + s * (rows - cy)) / a, (c * (rows - cy) - s * (cols - cx)) / b
        cover = torch.sigmoid((1 - (u * u + v * v + ((depth - cz) / mean) ** 2).sqrt()) * (mean / edge))
        level = float((slices * cover).sum() / cover.sum().clamp(min=1e-6))
        cold = rng.random() < lesions.cold_share
        ratio = rng.uniform(*lesions.cold) if cold else _between(rng, lesions.hot)
        slices = slices + cover * (ratio * level - slices) if cold else slices + cover * ((ratio - 1) * level)
    return slices.reshape(x.shape)


def random_phase(rng: np.random.Generator, magnitude: Tensor, phase: PhaseConfig, step_px: float = 1.0) -> Tensor:
    """A smooth phase in radians for magnitudes, as `PhaseConfig` describes it.

    Args:
        rng: of all choices.
        magnitude: [row, col], or [slice, row, col] of neighbouring slices, between which the phase changes as slowly.
        phase: its parts.
        step_px: distance of slices in pixels.

    Returns:
        Phases shaped as the magnitudes.
    """
    flat, step = rng.random() < phase.flat, rng.random() < phase.step
    h, w = magnitude.shape[-2:]
    cycles = torch.full(magnitude.shape, float(rng.random()))
    if flat:
        return 2 * math.pi * cycles
    row, col = ((torch.arange(n, dtype=torch.float32) - n / 2) / 256 for n in (h, w))
    y, x = row[:, None], col[None]
    cycles = cycles + phase.slope * (float(rng.normal()) * y + float(rng.normal()) * x)
    cycles = cycles + phase.bowl * (rng.normal() * y**2 + rng.normal() * y * x + rng.normal() * x**2)
    cycles = cycles + phase.waves * _waves(rng, y, x, 3)
    if step:  # fat precesses at another frequency than water
        level, turn = rng.uniform(0.3, 0.8) * float(magnitude.max()), rng.uniform(-0.5, 0.5)
        cycles = cycles + turn * torch.sigmoid((magnitude - level) / 0.05)
    if magnitude.ndim == 3 and len(magnitude) > 1:
        z = torch.arange(len(magnitude), dtype=torch.float32)[:, None, None] * (step_px / 256)
        cycles = cycles + phase.slope * float(rng.normal()) * z
    return 2 * math.pi * cycles


def _turned(magnitude: Tensor, phase: Tensor) -> Tensor:
    return torch.cat([magnitude * phase.cos(), magnitude * phase.sin()])


def _waves(rng: np.random.Generator, y: Tensor, x: Tensor, n: int) -> Tensor:
    """The sum of n cosines of random amplitude, direction, shift and length, y and x in units of 256 pixels."""
    total = torch.zeros(())
    for _ in range(n):
        angle, k = rng.uniform(0, 2 * math.pi), 256 / math.exp(rng.uniform(math.log(90), math.log(400)))
        at = k * (math.cos(angle) * y + math.sin(angle) * x) + rng.random()
        total = total + float(rng.normal()) * torch.cos(2 * math.pi * at)
    return total


def _shading(rng: np.random.Generator, size: int, ratio: float) -> Tensor:
    """A smooth positive field [size, size], highest over lowest value at most `ratio`, about 1 in the middle."""
    t = (torch.arange(size, dtype=torch.float32) - size / 2) / 256
    f = _waves(rng, t[:, None], t[None], 2) + float(rng.normal()) * t[:, None] + float(rng.normal()) * t[None]
    f = f - 0.5 * (f.amax() + f.amin())
    return torch.exp(f * (0.5 * math.log(ratio) * rng.random() / float(f.abs().amax().clamp(min=1e-6))))


def _between(rng: np.random.Generator, ends: tuple[float, float]) -> float:
    """Log-uniform; nothing is drawn where there is no choice."""
    low, high = ends
    return low if low == high else math.exp(rng.uniform(math.log(low), math.log(high)))

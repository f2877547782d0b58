"""Images for the engine: a volume that is noisy, coarse or blurred stands for the measurement.

    y = A x + n        A: the identity (denoising), means of blocks (super-resolution) or a blur

HU are attenuation inside, so that air is zero; images in arbitrary units stay as they are, and the scale that a prior
needs is read off the image.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from recon3d.config import ConfigError, JobConfig, OutputConfig
from recon3d.engine.executor import finite
from recon3d.engine.scan import Modality, Pictures, Scan
from recon3d.engine.scan_mri import percentile
from recon3d.engine.scan_pet import typical_activity
from recon3d.geometry import VolumeGrid
from recon3d.io.units import MU_WATER_PER_MM, hu_to_mu
from recon3d.operators.base import LinearOperator
from recon3d.operators.image import BlockMean, Blur, SameImage, box_weights, gaussian_weights
from recon3d.operators.noise import GaussianNoise
from recon3d.priors.base import ModelCard, Prior
from recon3d.priors.magnitude import MagnitudePrior
from recon3d.priors.scaled import ScaledPrior
from recon3d.recipes.model import Recipe

if TYPE_CHECKING:
    from recon3d.engine.events import Events

__all__ = ["Degradation", "ImageScan", "defaults", "estimate_image_noise", "finer", "load", "prepare"]

Kind = Literal["identity", "sr", "blur"]
ImageUnit = Literal["hu", "per_mm", "au"]

# volumes of numbers alive in a blur: a complex transform and its neighbours
_TRANSFORMS = 4
# of the brightest; what is darker says nothing about noise in tissue
_FOREGROUND = 0.1
_LEAST_BLOCKS = 100


@dataclass(frozen=True)
class Degradation:
    """What was done to the image that is looked for.

    Attributes:
        kind: "identity" (noise alone), "sr" (means of blocks) or "blur".
        factor: sr: fine pixels along the side of a coarse one.
        factor_z: sr: thin slices in a thick one.
        blur_mm: blur along z, y, x: full width at half maximum, of a uniform blur the width; 0 leaves an axis alone.
        blur_kind: "gaussian" or "uniform".

    Raises:
        ValueError: a number is missing, out of range, or belongs to another kind.
    """

    kind: Kind
    factor: int | None = None
    factor_z: int | None = None
    blur_mm: tuple[float, float, float] | None = None
    blur_kind: Literal["gaussian", "uniform"] | None = None

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ValueError(f"operator: one of {', '.join(get_args(Kind))} is needed, got {self.kind!r}")
        own = {"sr": ("factor", "factor_z"), "blur": ("blur_mm", "blur_kind")}.get(self.kind, ())
        for name in ("factor", "factor_z", "blur_mm", "blur_kind"):
            if getattr(self, name) is not None and name not in own:
                raise ValueError(f"{name}: has no meaning with operator {self.kind}; leave it out")
        for name in ("factor", "factor_z"):
            value = getattr(self, name)
            if value is not None and (value != int(value) or value < 1):
                raise ValueError(f"{name}: a whole number of at least 1 is needed, got {value}")
        if self.kind == "sr" and (self.factor or 1) * (self.factor_z or 1) == 1:
            raise ValueError("operator sr: needs a factor of at least 2, in the plane (factor) or along z (factor_z)")
        if self.kind == "blur":
            widths = self.blur_mm or (0.0, 0.0, 0.0)
            if len(widths) != 3 or not all(math.isfinite(w) and w >= 0 for w in widths) or not any(widths):
                raise ValueError(f"operator blur: needs blur_mm, three widths (z, y, x) in mm, got {self.blur_mm}")
            if self.blur_kind not in (None, "gaussian", "uniform"):
                raise ValueError(f"blur_kind: gaussian or uniform is needed, got {self.blur_kind!r}")

    @property
    def block(self) -> tuple[int, int, int]:
        """Fine voxels of a measured one along z, y, x."""
        return int(self.factor_z or 1), int(self.factor or 1), int(self.factor or 1)

    def grid(self, measured: VolumeGrid) -> VolumeGrid:
        """The grid of the image that is looked for."""
        return finer(measured, self.block) if self.kind == "sr" else measured

    def operator(self, grid: VolumeGrid) -> LinearOperator:
        """The operator on images of this grid."""
        if self.kind == "identity":
            return SameImage(grid.shape)
        if self.kind == "sr":
            return BlockMean(grid.shape, self.block)
        make = box_weights if self.blur_kind == "uniform" else gaussian_weights
        assert self.blur_mm is not None
        return Blur(grid.shape, [make(w / s) for w, s in zip(self.blur_mm, grid.spacing_mm, strict=True)])


@dataclass(frozen=True, kw_only=True)
class ImageScan(Scan):
    """An image [z, y, x] as measurement; the volume is in 1/mm for HU and attenuation, else in the image's unit.

    Attributes:
        degradation: how the volume became the image; the grid is the volume's.
        values: unit of files: "hu", "per_mm" or "au".
        mu_water_per_mm: attenuation of water, for HU.
    """

    modality: ClassVar[Modality] = "image"
    unit: ClassVar[str] = "a.u."

    degradation: Degradation
    values: ImageUnit = "au"
    mu_water_per_mm: float = MU_WATER_PER_MM

    def check(self) -> list[str]:
        want = tuple(self.operator().range.shape)
        if tuple(self.y.shape) != want:
            raise ValueError(f"image: shape {tuple(self.y.shape)}, but the volume's grid asks for [z, y, x] = {want}")
        for k in range(self.y.shape[0]):
            if not finite(self.y[k]):
                raise ValueError(f"image: slice {k} holds NaN or infinity; mend the image first")
        low, high = (float(v) for v in self.y.aminmax())
        if low == high:
            raise ValueError(f"image: every voxel is {low:g}; there is nothing to enhance")
        return []

    def operator(self) -> LinearOperator:
        return self.degradation.operator(self.grid)

    def slab(self, first: int, end: int) -> Self:
        if self.operator().coupling == "volume":
            return self
        return replace(self, y=self.y[first:end], grid=self.grid.slab(first, end))

    def _setting(self) -> list[Any]:
        d = self.degradation
        return ["image", d.kind, d.factor, d.factor_z, d.blur_mm, d.blur_kind, self.values, self.mu_water_per_mm]

    def weights(self) -> Tensor | None:
        if not isinstance(self.noise, GaussianNoise):
            return None
        return torch.full((1, 1, 1), self.noise.sigma**-2)

    def fit(self, prior: Prior, recipe: Recipe) -> tuple[Prior, Tensor | None]:
        """The prior in the unit of this image.

        A prior of attenuation has that unit. For others a network unit is the 99.9th percentile of the image over the
        whole volume; for priors of activity the mean of what exceeds 1 % of the maximum.

        Raises:
            ValueError: the image is nowhere positive.
        """
        card = getattr(prior, "card", None)
        if card is None or card.unit == "1/mm" or isinstance(prior, (ScaledPrior, MagnitudePrior)):
            return prior, None
        scale = typical_activity(self.y) if card.unit == "Bq/mL" else percentile(self.y.clamp_min(0))
        if not scale > 0:
            raise ValueError("image: it is zero or negative nearly everywhere; there is nothing to enhance")
        return (MagnitudePrior if card.channels == 2 else ScaledPrior)(prior, scale), None

    def prior_mismatch(self, card: ModelCard) -> str | None:
        attenuation = self.values != "au"
        if (card.unit == "1/mm") != attenuation and card.unit != "a.u.":
            have = "HU or attenuation" if attenuation else "arbitrary units"
            return f"prior {card.name!r} was trained on images in {card.unit}, this one is in {have} (input.image_unit)"
        if card.channels not in ((1,) if card.unit == "1/mm" else (1, 2)):
            return f"prior {card.name!r} is for images of {card.channels} channels, this one has one"
        return None

    def pictures(self, volume: Tensor, name: str, output: OutputConfig) -> Pictures:
        # as it came, on the volume's voxels
        seen = self.y if self.degradation.kind == "blur" else self.operator().pinv(self.y)
        return Pictures({"as measured": seen, name: volume}, self._shown(output))

    def save(self, path: Path, volume: Tensor, output: OutputConfig) -> None:
        from recon3d.io import write_nifti

        write_nifti(path, volume, self.grid, **self._shown(output))

    def save_spread(self, path: Path, spread: Tensor, output: OutputConfig) -> None:
        """In HU without their zero point, or as `save`."""
        from recon3d.io import write_nifti

        if self._shown(output)["unit"] != "hu":
            self.save(path, spread, output)
            return
        write_nifti(path, spread * (1000 / self.mu_water_per_mm), self.grid, label="HU")

    def _shown(self, output: OutputConfig) -> dict[str, Any]:
        unit = output.unit if output.unit in ("hu", "per_mm") else self.values
        return {"unit": unit, "mu_water_per_mm": self.mu_water_per_mm}

    def work_bytes(self) -> dict[str, dict[str, int]]:
        taken = (_TRANSFORMS if self.degradation.kind == "blur" else 1) * self.volume_bytes
        return {"data": {"transforms": taken}, "start": {"transforms": taken}}


def finer(grid: VolumeGrid, block: Sequence[int]) -> VolumeGrid:
    """A grid whose blocks of voxels are the given grid's voxels, at their place in the world."""
    matrix = grid.matrix()
    for axis, times in enumerate(block[::-1]):  # the affine counts x, y, z
        matrix[:3, 3] += ((1 / times - 1) / 2) * matrix[:3, axis]
        matrix[:3, axis] /= times
    nz, ny, nx = (n * b for n, b in zip(grid.shape, block, strict=True))
    dz, dy, dx = (s / b for s, b in zip(grid.spacing_mm, block, strict=True))
    return VolumeGrid((nz, ny, nx), (dz, dy, dx), tuple(tuple(float(v) for v in row) for row in matrix))


def estimate_image_noise(image: Tensor) -> GaussianNoise:
    """A noise level read off an image of which nobody stated it.

    Differences across 2 x 2 pixels, (a - b - c + d) / 2, keep white noise as it is and of an image little but its
    finest edges, which their median shrugs off (Donoho and Johnstone, Biometrika 81 (1994) 425). Blocks darker than a
    tenth of the range are left out: air is often cut off at a value or masked. Noise that neighbours share, as after
    filtering or interpolation, is told too small.

    Args:
        image: [..., y, x], at least two pixels a side.

    Raises:
        ValueError: fewer pixels.
    """
    ny, nx = (n // 2 * 2 for n in image.shape[-2:])
    if min(ny, nx) < 2:
        raise ValueError(f"estimate_image_noise: at least 2 x 2 pixels are needed, got {tuple(image.shape)}")
    x = image[..., :ny, :nx].double()
    a, b, c, d = (x[..., i::2, j::2] for i in (0, 1) for j in (0, 1))
    fine = ((a - b - c + d) / 2).flatten()
    mean = ((a + b + c + d) / 4).flatten()
    low, high = (float(v) for v in np.percentile(image.numpy(), (0.0, 99.9)))
    tissue = fine[mean > low + _FOREGROUND * (high - low)]
    used = tissue if tissue.numel() >= _LEAST_BLOCKS else fine
    # noise-free or quantised data: rounding of the stored numbers is noise too
    floor = float(image.abs().max()) * torch.finfo(torch.float32).eps
    return GaussianNoise(max(float(used.abs().median()) / 0.6745, floor, torch.finfo(torch.float32).tiny))


def prepare(
    image: Tensor | NDArray[Any],
    grid: VolumeGrid,
    degradation: Degradation,
    *,
    values: ImageUnit = "hu",
    noise: float | Literal["auto"] | None = "auto",
    mu_water_per_mm: float = MU_WATER_PER_MM,
    device: torch.device | None = None,
) -> ImageScan:
    """An image as the engine takes it.

    Args:
        image: [z, y, x] in the unit that `values` names.
        grid: its grid.
        degradation: how the wanted volume became it.
        values: unit of the image.
        noise: standard deviation in that unit; "auto" reads it off the image, None says that it is not known.
        mu_water_per_mm: attenuation of water, for HU.
        device: where the work is done.

    Raises:
        ValueError: it is no volume on the grid, or not finite, or sigma is not positive.
        TypeError: it is complex.
    """
    x = torch.as_tensor(image)
    if x.is_complex():
        raise TypeError(f"enhance: a real image is needed, got {x.dtype}; take its magnitude")
    x = x.detach().to("cpu", torch.float32).contiguous()
    if tuple(x.shape) != grid.shape:
        raise ValueError(f"enhance: the image has shape {tuple(x.shape)}, its grid {grid.shape}; a volume is [z, y, x]")
    if values not in get_args(ImageUnit):
        raise ValueError(f"enhance: the unit must be one of {', '.join(get_args(ImageUnit))}, got {values!r}")
    if not finite(x):
        raise ValueError("enhance: the image holds NaN or infinity; mend it first")
    if noise == "auto":
        level: GaussianNoise | None = estimate_image_noise(x)
    else:
        level = GaussianNoise(noise) if isinstance(noise, (int, float)) else None
    if values == "hu":
        x = hu_to_mu(x, mu_water_per_mm)
        level = None if level is None else GaussianNoise(level.sigma * mu_water_per_mm / 1000)
    return ImageScan(
        y=x,
        grid=degradation.grid(grid),
        noise=level,
        device=device or torch.device("cpu"),
        degradation=degradation,
        values=values,
        mu_water_per_mm=mu_water_per_mm,
    )


def defaults(config: JobConfig) -> tuple[str, str]:
    """Recipe and prior of a job on an image that names none.

    Raises:
        BadInput: the image cannot be read.
        ConfigError: neither the file nor the job states the image's unit.
    """
    recipe = "ddnm" if config.noise.kind == "none" else "image"
    return recipe, config.prior or ("mr" if _stated(config, Path(config.input.path)) == "au" else "ct")


def load(config: JobConfig, device: torch.device, events: Events) -> ImageScan:
    """The scan of a job on an image.

    Raises:
        BadInput: the image cannot be read or used.
        ConfigError: a setting does not fit it, or one is missing.
    """
    from recon3d.io import BadInput, read_image

    wanted, path = config.input, Path(config.input.path)
    if wanted.operator is None or wanted.operator == "none":
        raise BadInput(
            path,
            "is an image volume, not a measurement",
            "say in input.operator what it lacks (identity, sr, blur), or simulate a measurement of it first",
        )
    try:
        degradation = Degradation(wanted.operator, wanted.factor, wanted.factor_z, wanted.blur_mm, wanted.blur_kind)
    except ValueError as error:
        raise ConfigError(f"input.{error}") from None
    values = _stated(config, path)
    if config.output.unit is not None and values == "au":
        raise ConfigError(f"output.unit {config.output.unit}: {path} is in arbitrary units, and so is the result")
    image, grid, _ = read_image(path)
    if wanted.slices is not None:
        first, end = wanted.slices
        if not first < end <= image.shape[0]:
            raise ConfigError(f"input.slices: {first} to {end} asked for, {path} has {image.shape[0]} slices")
        image, grid = image[first:end], grid.slab(first, end)
    kind = config.noise.kind
    noise: float | Literal["auto"] | None = "auto" if kind == "auto" else config.noise.sigma
    try:
        scan = prepare(
            image,
            grid,
            degradation,
            values=values,
            noise=noise,
            mu_water_per_mm=config.output.mu_water_per_mm or MU_WATER_PER_MM,
            device=device,
        )
    except ValueError as error:
        raise BadInput(path, f"cannot be used ({error})", "see the input section of the job") from None
    if noise == "auto" and isinstance(scan.noise, GaussianNoise):
        sigma = scan.noise.sigma * (1000 / scan.mu_water_per_mm if values == "hu" else 1.0)
        unit = {"hu": " HU", "per_mm": " 1/mm", "au": ""}[values]
        events.emit(
            "warning", message=f"noise: not stated; a spread of {sigma:.3g}{unit} is read off the image (noise.sigma)"
        )
    return scan


def _stated(config: JobConfig, path: Path) -> ImageUnit:
    """The unit of an image, from the job or else from the file.

    Raises:
        ConfigError: neither says it.
    """
    if config.input.image_unit is not None:
        return config.input.image_unit
    from recon3d.io import image_unit

    found = image_unit(path)
    known: dict[str, ImageUnit] = {"HU": "hu", "1/mm": "per_mm", "au": "au"}
    if found not in known:
        have = f"is in {found}" if found else "does not state its unit"
        raise ConfigError(f"input.image_unit: {path} {have}; set hu, per_mm (1/mm) or au (arbitrary, such as MR)")
    return known[found]

"""An image to be converted into another modality: nothing is measured, a conditional prior sees the image and draws.

The loop is that of every job, with an operator that measures nothing, so levels, samplers, planes, samples, plan and
resumption are the same. The result is on the image's grid, in the unit of the prior's card.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from numpy.typing import NDArray
from torch import Tensor

from recon3d.config import ConfigError, JobConfig, OutputConfig
from recon3d.engine.executor import finite
from recon3d.engine.scan import Modality, Pictures, Scan
from recon3d.geometry import VolumeGrid
from recon3d.io.units import MU_WATER_PER_MM
from recon3d.operators.base import LinearOperator
from recon3d.operators.image import Nothing
from recon3d.priors.base import ModelCard, condition_volume

if TYPE_CHECKING:
    from recon3d.engine.events import Events

__all__ = ["ConversionScan", "defaults", "load", "prepare"]


@dataclass(frozen=True, kw_only=True)
class ConversionScan(Scan):
    """An image [z, y, x] as the condition (`guide`) and nothing as measurement; the volume is in the prior's unit.

    The guide is divided by the percentile that the prior's card asks for, taken over the whole image, already; slabs
    and parts are of that.

    Attributes:
        made: unit of the volume, from the prior's card.
        mu_water_per_mm: attenuation of water, for priors in 1/mm, whose results are written in HU.
    """

    modality: ClassVar[Modality] = "image"
    unit: ClassVar[str] = "a.u."

    made: str = "a.u."
    mu_water_per_mm: float = MU_WATER_PER_MM

    def check(self) -> list[str]:
        image = self.guide
        if image is None or tuple(image.shape) != self.grid.shape:
            got = None if image is None else tuple(image.shape)
            raise ValueError(f"image: shape {got}, its grid has {self.grid.shape}; a volume is [z, y, x]")
        for k in range(image.shape[0]):
            if not finite(image[k]):
                raise ValueError(f"image: slice {k} holds NaN or infinity; mend the image first")
        low, high = (float(v) for v in image.aminmax())
        if low == high:
            raise ValueError(f"image: every voxel is {low:g}; there is nothing to convert")
        return []

    def operator(self) -> LinearOperator:
        return Nothing(self.grid.shape)

    def slab(self, first: int, end: int) -> Self:
        guide = None if self.guide is None else self.guide[first:end]
        return replace(self, y=self.y[first:end], grid=self.grid.slab(first, end), guide=guide)

    def _setting(self) -> list[Any]:
        return ["conversion", self.made, self.mu_water_per_mm]

    def condition(self, card: ModelCard | None) -> Tensor | None:
        return self.guide

    def prior_mismatch(self, card: ModelCard) -> str | None:
        return None  # the card has said the unit; the rest is the plane's and the spacing's

    def pictures(self, volume: Tensor, name: str, output: OutputConfig) -> Pictures:
        return Pictures({name: volume}, self._stored(output))

    def save(self, path: Path, volume: Tensor, output: OutputConfig) -> None:
        from recon3d.io import write_nifti

        label = None if self.made in ("1/mm", "a.u.") else self.made
        write_nifti(path, volume, self.grid, label=label, **self._stored(output))

    def save_spread(self, path: Path, spread: Tensor, output: OutputConfig) -> None:
        from recon3d.io import write_nifti

        if self._stored(output)["unit"] != "hu":
            self.save(path, spread, output)
            return
        # differences know no water: 1/mm to HU is a factor
        write_nifti(path, spread * (1000 / self.mu_water_per_mm), self.grid, label="HU")

    def _stored(self, output: OutputConfig) -> dict[str, Any]:
        """What the volume's unit is to those who write and draw it."""
        unit = (output.unit or "hu") if self.made == "1/mm" else "au"
        return {"unit": unit, "mu_water_per_mm": self.mu_water_per_mm}

    def work_bytes(self) -> dict[str, dict[str, int]]:
        return {"data": {}, "start": {}}

    def data_fit(self, volume: Tensor) -> dict[str, Any]:
        return {"definitions": {"nothing": "the image is a condition of the prior; nothing was measured"}}


def prepare(
    image: Tensor | NDArray[Any],
    grid: VolumeGrid,
    card: ModelCard,
    *,
    slices: tuple[int, int] | None = None,
    mu_water_per_mm: float = MU_WATER_PER_MM,
    device: torch.device | None = None,
) -> ConversionScan:
    """An image as the engine takes it.

    Args:
        image: [z, y, x] real, of the kind that the prior's condition is.
        grid: its grid.
        card: of the conditional prior.
        slices: first and end of those to convert; the percentile is still that of the whole image.
        mu_water_per_mm: attenuation of water, for priors in 1/mm.
        device: where the work is done.

    Raises:
        ValueError: the image is no volume on the grid, not finite or constant, or the prior takes no condition.
        TypeError: the image is complex.
    """
    x = torch.as_tensor(image)
    if x.is_complex():
        raise TypeError(f"image: a real image is needed, got {x.dtype}; take its magnitude")
    x = x.detach().to("cpu", torch.float32).contiguous()
    scan = ConversionScan(
        y=torch.zeros(x.shape[0], 0, 0),
        grid=grid,
        device=device or torch.device("cpu"),
        guide=x,
        made=card.unit,
        mu_water_per_mm=mu_water_per_mm,
    )
    scan.check()
    scan = replace(scan, guide=condition_volume(card, x))
    if slices is None:
        return scan
    first, end = slices
    if not 0 <= first < end <= len(x):
        raise ValueError(f"slices: {first} to {end} asked for, the image has {len(x)}")
    return scan.slab(first, end)


def defaults(config: JobConfig) -> tuple[str, str]:
    """Recipe and prior of a conversion that names no recipe.

    Raises:
        ConfigError: no prior is named.
    """
    if config.prior is None:
        raise ConfigError("input.operator none: the prior alone decides; name a conditional prior")
    return "sample", config.prior


def load(config: JobConfig, device: torch.device, events: Events) -> ConversionScan:
    """The scan of a job that converts an image (`input.operator: none`).

    Raises:
        BadInput: the image or the prior's card cannot be read or used.
        ConfigError: a setting does not fit them, or no prior is named.
    """
    from recon3d.io import BadInput, read_image
    from recon3d.priors import find_prior
    from recon3d.priors.checkpoints import read_card

    if config.prior is None:
        raise ConfigError("prior: an image is converted by a conditional prior; name its folder")
    card = read_card(find_prior(config.prior))
    if config.output.unit is not None and card.unit != "1/mm":
        raise ConfigError(
            f"output.unit {config.output.unit}: prior {card.name!r} makes images in {card.unit}; leave it"
        )
    path = Path(config.input.path)
    image, grid, _ = read_image(path)
    water = config.output.mu_water_per_mm or MU_WATER_PER_MM
    try:
        return prepare(image, grid, card, slices=config.input.slices, mu_water_per_mm=water, device=device)
    except ValueError as error:
        raise BadInput(path, f"cannot be converted ({error})", "see the input section of the job") from None

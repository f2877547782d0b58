"""CT for the engine: line integrals of a stack of slices."""

from __future__ import annotations

import warnings
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import torch
from torch import Tensor

from recon3d.config import ConfigError, GridConfig, JobConfig, OutputConfig
from recon3d.engine.executor import finite
from recon3d.engine.scan import Modality, Pictures, Scan
from recon3d.geometry import GeometryWarning, ScanGeometry, VolumeGrid
from recon3d.io.units import MU_WATER_PER_MM
from recon3d.operators.ct import CTOperator
from recon3d.operators.noise import GaussianNoise, NoiseModel, PoissonNoise, estimate_noise
from recon3d.priors.base import ModelCard

if TYPE_CHECKING:
    from recon3d.engine.events import Events
    from recon3d.io.measurement import Measurement

__all__ = ["CTScan", "GivenWeights", "load"]

# sinograms alive in the data term: the misfit and A x
_DATA_SINOGRAMS = 2
# sinograms of complex numbers that filtering one slab takes: padded transforms there and back
_FILTERED = 10
# slices filtered at once; the projectors work on so many side by side
_SLAB = 16


class _Slabwise(CTOperator):
    """The CT operator, filtering a slab at a time: it takes ten times the memory of what it filters."""

    def pinv(self, y: Tensor) -> Tensor:
        """As CTOperator."""
        direct = super().pinv
        if y.ndim != 3 or y.shape[0] <= _SLAB:
            return direct(y)
        out = torch.empty((y.shape[0], *self.domain.shape[1:]), dtype=y.dtype, device=y.device)
        for first in range(0, y.shape[0], _SLAB):
            out[first : first + _SLAB] = direct(y[first : first + _SLAB])
        return out


@dataclass(frozen=True, kw_only=True)
class CTScan(Scan):
    """Line integrals [slice, view, u] float32; the volume is in 1/mm.

    Attributes:
        geometry: how y was measured.
        projector: "joseph" or "shear".
    """

    modality: ClassVar[Modality] = "ct"
    unit: ClassVar[str] = "1/mm"

    geometry: ScanGeometry
    projector: Literal["joseph", "shear"] = "joseph"

    def check(self) -> list[str]:
        expected = (self.grid.shape[0], self.geometry.n_views, self.geometry.n_detector)
        if tuple(self.y.shape) != expected:
            what = ("slices", "views", "detector cells")
            k = next((k for k in range(3) if self.y.ndim != 3 or self.y.shape[k] != expected[k]), 0)
            raise ValueError(
                f"sinogram: shape {tuple(self.y.shape)}, but grid and geometry say {expected[k]} {what[k]}; "
                f"expected [slice, view, u] = {expected}"
            )
        for k in range(expected[0]):
            if not finite(self.y[k]):
                raise ValueError(f"sinogram: slice {k} holds NaN or infinity; replace dead cells before reconstruction")
        return self.geometry.check(self.grid)

    def operator(self) -> CTOperator:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", GeometryWarning)  # `check` has told
            return _Slabwise(self.geometry, self.grid, self.projector, self.device)

    def slab(self, first: int, end: int) -> Self:
        noise = self.noise
        if isinstance(noise, GivenWeights):
            noise = GivenWeights(noise.values[first:end])
        return replace(self, y=self.y[first:end], grid=self.grid.slab(first, end), noise=noise)

    def _setting(self) -> list[Any]:
        return [type(self.geometry).__name__, asdict(self.geometry)]

    def prior_mismatch(self, card: ModelCard) -> str | None:
        if card.channels != card.slices:
            channels = card.channels // card.slices
            return f"prior {card.name!r} is for images of {channels} channels, those of CT have one"
        return super().prior_mismatch(card)

    def pictures(self, volume: Tensor, name: str, output: OutputConfig) -> Pictures:
        direct = self.operator().pinv(self.y.to(self.device)).cpu()
        return Pictures({"filtered back projection": direct, name: volume}, _unit(output))

    def save(self, path: Path, volume: Tensor, output: OutputConfig) -> None:
        from recon3d.io import write_nifti

        write_nifti(path, volume, self.grid, **_unit(output))

    def save_spread(self, path: Path, spread: Tensor, output: OutputConfig) -> None:
        """In HU without their zero point, or in 1/mm."""
        from recon3d.io import write_nifti

        hu = _unit(output)["unit"] == "hu"
        factor = 1000 / _unit(output)["mu_water_per_mm"] if hu else 1.0
        write_nifti(path, spread * factor, self.grid, label="HU" if hu else "1/mm")

    def work_bytes(self) -> dict[str, dict[str, int]]:
        depth = self.grid.shape[0]
        return {
            "data": {"sinograms": _DATA_SINOGRAMS * self.y_bytes},
            "start": {"filtering": _FILTERED * self.y_bytes * min(_SLAB, depth) // depth},
        }


@dataclass(frozen=True)
class GivenWeights:
    """Inverse variances that came with the measurement."""

    values: Tensor = field(repr=False)

    def weights(self, y: Tensor) -> Tensor:
        """As given."""
        return self.values.to(y)

    def simulate(self, clean: Tensor, seed: int) -> Tensor:
        """Gaussian noise of these variances."""
        spread = self.values.clamp_min(torch.finfo(torch.float32).tiny).rsqrt().to(clean)
        return clean + spread * GaussianNoise(1.0).simulate(torch.zeros_like(clean), seed)


def load(config: JobConfig, measured: Measurement, device: torch.device, events: Events) -> CTScan:
    """The scan of a job from what was read.

    Raises:
        ConfigError: a setting does not fit the measurement.
    """
    chosen = config.input.views
    if chosen is not None:
        total = measured.geometry.n_views
        if chosen > total:
            raise ConfigError(f"input.views: {chosen} asked for, {config.input.path} has {total}")
        measured = measured.views([k * total // chosen for k in range(chosen)])
    return CTScan(
        y=measured.sinogram.contiguous(),
        geometry=measured.geometry,
        grid=_grid(config.grid, measured),
        noise=_noise(config, measured, events),
        projector=config.projector,
        device=device,
    )


def _unit(output: OutputConfig) -> dict[str, Any]:
    return {"unit": output.unit or "hu", "mu_water_per_mm": output.mu_water_per_mm or MU_WATER_PER_MM}


def _noise(config: JobConfig, measured: Measurement, events: Events) -> NoiseModel | None:
    noise = config.noise
    if noise.kind == "gaussian" and noise.sigma is not None:
        return GaussianNoise(noise.sigma)
    if noise.kind == "poisson" and noise.photons is not None:
        return PoissonNoise(noise.photons)
    if noise.kind == "none":
        return None
    if measured.weights is not None:
        return GivenWeights(measured.weights)
    if measured.photons is not None:
        return PoissonNoise(measured.photons)
    found = estimate_noise(measured.sinogram)
    events.emit(
        "warning", message=f"noise: the file does not state it; a spread of {found.sigma:.3g} is read off the rays"
    )
    return found


def _grid(wanted: GridConfig, measured: Measurement) -> VolumeGrid:
    if wanted.shape is None and wanted.spacing_mm is None:
        return measured.default_grid()
    slices = measured.sinogram.shape[0]
    if wanted.spacing_mm is None:
        assert wanted.shape is not None
        found = measured.default_grid()
        # the same field of view on other pixels
        shape = wanted.shape
        dy, dx = (found.spacing_mm[k] * found.shape[k] / shape[k] for k in (1, 2))
        spacing = (found.spacing_mm[0], dy, dx)
    else:
        dz, dy, dx = spacing = wanted.spacing_mm
        side = measured.default_grid(min(dy, dx), dz).shape[2] * min(dy, dx)
        shape = wanted.shape or (slices, max(1, round(side / dy)), max(1, round(side / dx)))
    if shape[0] != slices:
        raise ConfigError(f"grid.shape: {shape[0]} slices asked for, the measurement has {slices}")
    return VolumeGrid(shape, spacing)

"""MRI for the engine: multi-coil k-space of a stack of slices or of a volume, complex images.

K-space arrives as a file has it; here its noise is made white (so that one sigma holds for every coil), its coils are
compressed where asked for, and coil maps are taken or made. Images stay in the scanner's unit: the scale that a prior
needs is a property of the start image and lives in the prior (see MRIScan.fit).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from recon3d.config import ConfigError, JobConfig, OutputConfig, UndersampleConfig
from recon3d.engine.executor import finite
from recon3d.engine.loop import Start, start_image
from recon3d.engine.scan import Modality, Pictures, Scan, digest
from recon3d.geometry import VolumeGrid
from recon3d.geometry.mri import Trajectory
from recon3d.operators import masks
from recon3d.operators.base import LinearOperator
from recon3d.operators.coils import apply_coils, compress_coils, noise_covariance, outer_noise, prewhiten
from recon3d.operators.espirit import espirit, gridded_calibration
from recon3d.operators.mri import CartesianMRI, MRIOperator, NonCartesianMRI
from recon3d.operators.noise import GaussianNoise
from recon3d.priors.base import Prior
from recon3d.priors.complex import complex_prior
from recon3d.recipes.model import Recipe

if TYPE_CHECKING:
    from recon3d.engine.events import Events
    from recon3d.io.kspace import KSpace

__all__ = ["MRIScan", "kspace_of", "load", "prepare", "undersampled"]

# of |start image| over the whole volume; what a network unit is
_PERCENTILE = 99.9
# samples furthest from the centre of k-space in which a non-Cartesian scan's noise is looked for
_OUTER = 0.1
_CALIBRATION = 24

Noise = GaussianNoise | Literal["auto"] | None


@dataclass(frozen=True, kw_only=True)
class MRIScan(Scan):
    """K-space with white noise; the volume is complex, in the scanner's unit.

    y is [slice, coil, ky, kx], zero where it was not sampled; [slice, coil, sample] along trajectories of slices, or
    [coil, sample] along one of the volume.

    Attributes:
        maps: coil maps [slice, coil, y, x], of a volume [coil, z, y, x].
        mask: where Cartesian k-space was sampled, [ky, kx] or [slice, ky, kx]; else None.
        trajectories: of non-Cartesian k-space, one for all slices or one a slice; else None.
    """

    modality: ClassVar[Modality] = "mri"
    unit: ClassVar[str] = "a.u."
    keeps_start: ClassVar[bool] = True

    maps: Tensor
    mask: Tensor | None = None
    trajectories: tuple[Trajectory, ...] | None = None

    def check(self) -> list[str]:
        z, y, x = self.grid.shape
        shape = tuple(self.y.shape)
        if self.y.dtype != torch.complex64:
            raise TypeError(f"k-space: complex64 is needed, got {self.y.dtype}")
        coils = shape[0] if self.couples else shape[1] if len(shape) > 1 else 0
        if self.mask is not None and shape != (z, coils, y, x):
            raise ValueError(f"k-space: shape {shape}, but the grid asks for [slice, coil, ky, kx] with {z, y, x}")
        if self.trajectories is not None and (
            shape[-1] != self.trajectories[0].n_samples or len(shape) != 3 - self.couples
        ):
            raise ValueError(
                f"k-space: shape {shape}, but the trajectory has {self.trajectories[0].n_samples} samples and asks for "
                f"{'[coil, sample]' if self.couples else '[slice, coil, sample]'}"
            )
        want = (coils, z, y, x) if self.couples else (z, coils, y, x)
        if tuple(self.maps.shape) != want:
            raise ValueError(
                f"coil maps: shape {tuple(self.maps.shape)}, but k-space and grid ask for "
                f"{'[coil, z, y, x]' if self.couples else '[slice, coil, y, x]'} = {want}"
            )
        if self.mask is not None and tuple(self.mask.shape) not in ((y, x), (z, y, x)):
            raise ValueError(
                f"mask: shape {tuple(self.mask.shape)}, but k-space has [slice, ky, kx] = {z, y, x}; give one of its "
                "last two or of all three axes"
            )
        for k in range(shape[0]):
            if not finite(self.y[k]):
                what = "coil" if self.couples else "slice"
                raise ValueError(f"k-space: {what} {k} holds NaN or infinity; mask such samples out")
        if not bool(self.y.any()):
            raise ValueError("k-space: every sample is zero; there is nothing to reconstruct")
        return []

    @property
    def couples(self) -> bool:
        """Whether the measurement couples slices."""
        return self.trajectories is not None and self.trajectories[0].ndim == 3

    def operator(self) -> LinearOperator:
        return self._operator

    @cached_property
    def _operator(self) -> MRIOperator:
        maps = self.maps.to(self.device)
        if self.mask is not None:
            return CartesianMRI(self.mask.to(self.device), maps)
        assert self.trajectories is not None
        return _noncartesian(self.trajectories, maps)

    def slab(self, first: int, end: int) -> Self:
        if self.couples or (first, end) == (0, self.grid.shape[0]):
            return self
        mask, trajectories = self.mask, self.trajectories
        if trajectories is not None and len(trajectories) > 1:
            trajectories = trajectories[first:end]
        part = replace(
            self,
            y=self.y[first:end],
            maps=self.maps[first:end],
            mask=mask[first:end] if mask is not None and mask.ndim == 3 else mask,
            trajectories=trajectories,
            grid=self.grid.slab(first, end),
        )
        # it shares the plans of the whole
        part.__dict__["_operator"] = self._operator.slab(first, end)
        return part

    def weights(self) -> Tensor | None:
        # sigma is that of a real component, and so is the noise of a complex state
        if not isinstance(self.noise, GaussianNoise):
            return None
        return torch.full((1,) * self.y.ndim, self.noise.sigma**-2)

    def measured(self) -> Tensor | None:
        if self.mask is None:
            return None
        return (self.mask if self.mask.ndim == 3 else self.mask[None])[:, None]

    def _setting(self) -> list[Any]:
        sampling = [t.digest for t in self.trajectories] if self.trajectories else [digest(self._mask())]
        return ["mri", sampling, digest(self.maps)]

    def fit(self, prior: Prior, recipe: Recipe) -> tuple[Prior, Tensor | None]:
        """The prior of complex slices with the scale of this scan, and the recipe's start image it was taken from.

        A network unit is the 99.9th percentile of the magnitude of the start image (of the direct image for a cold
        start) over the whole volume: fixed by the data, for all slices alike, and blind to a few bright voxels.

        Raises:
            ValueError: the start image is zero.
        """
        if complex_prior(prior, 1.0) is prior:  # complex already, with a scale of its own
            return prior, None
        used = self.weights() if recipe.consistency.weights == "noise" else None
        cold = recipe.start.image == "offset"
        kind = "pinv" if cold else recipe.start.image
        weights = None if used is None else used.to(self.device)
        image = start_image(Start(kind, recipe.start.iterations, weights), self._operator, self.y.to(self.device))
        scale = percentile(image)
        if not scale > 0:
            raise ValueError("k-space: its image is zero nearly everywhere; there is nothing to reconstruct")
        return complex_prior(prior, scale), None if cold else image

    def finish(self, volume: Tensor) -> Tensor:
        """Zero where no coil sees anything: there the data say nothing, and the prior's word is not handed out."""
        seen = (self.maps != 0).any(0 if self.couples else 1)
        return torch.where(seen.to(volume.device), volume, 0)

    def pictures(self, volume: Tensor, name: str, output: OutputConfig) -> Pictures:
        direct = self._operator.pinv(self.y.to(self.device)).abs().cpu()
        kind = "zero-filled" if self.mask is not None else "gridding"
        return Pictures({kind: direct, name: volume.abs()}, {"unit": "au"})

    def save(self, path: Path, volume: Tensor, output: OutputConfig) -> None:
        """The magnitude, in the scanner's unit."""
        from recon3d.io import write_nifti

        write_nifti(path, volume.abs(), self.grid, unit="au")

    def write(self, folder: Path, volume: Tensor, output: OutputConfig) -> None:
        """The magnitude as volume.nii.gz and the phase in radians as phase.nii.gz."""
        from recon3d.io import write_nifti

        super().write(folder, volume, output)
        write_nifti(folder / "phase.nii.gz", volume.angle(), self.grid, unit="au")

    def work_bytes(self) -> dict[str, dict[str, int]]:
        # A^H W y is kept; adjoint and direct image make the coil images of one slice at a time
        work = self.volume_bytes
        coils = self.y_bytes // (1 if self.couples else self.grid.shape[0])
        return {"data": {"A^H W y": work, "coil images": 2 * coils}, "start": {"coil images": 3 * coils}}

    def _mask(self) -> Tensor:
        assert self.mask is not None
        return self.mask


def percentile(image: Tensor, percent: float = _PERCENTILE) -> float:
    """Percentile of the magnitude over a whole volume, in float64."""
    return float(np.percentile(image.detach().abs().cpu().numpy().astype(np.float64), percent))


def undersampled(kspace: KSpace, wanted: UndersampleConfig) -> KSpace:
    """The same scan with fewer samples.

    Raises:
        ConfigError: the scan is not Cartesian, or its centre alone is more than the acceleration allows.
    """
    if kspace.mask is None:
        raise ConfigError("input.undersample: leaves out samples of a Cartesian scan; this one has spokes, see spokes")
    ny, nx = kspace.mask.shape[-2:]
    try:
        if wanted.kind == "poisson_disc":
            chosen = masks.poisson_disc((ny, nx), wanted.acceleration, wanted.calibration, wanted.seed)
        else:
            make = masks.equispaced if wanted.kind == "equispaced" else masks.random_lines
            n = nx if wanted.along == "x" else ny
            line = make(n, wanted.acceleration, wanted.centre_fraction, wanted.seed)
            chosen = (line[None] if wanted.along == "x" else line[:, None]).expand(ny, nx)
    except ValueError as error:
        raise ConfigError(f"input.undersample: {error}") from None
    mask = (kspace.mask * chosen).contiguous()
    rows = mask if mask.ndim == 3 else mask[None]
    return replace(kspace, data=kspace.data * rows[:, None], mask=mask)


def prepare(
    kspace: KSpace,
    *,
    noise: Noise = "auto",
    maps: Literal["file", "espirit"] | None = None,
    calibration: int = _CALIBRATION,
    coils: int | None = None,
    device: torch.device | None = None,
    tell: Callable[[str], object] = lambda sentence: None,
) -> MRIScan:
    """K-space as the engine takes it: noise white, coils compressed, maps at hand.

    Args:
        kspace: as measured.
        noise: "auto" takes the file's covariance of the coils, else that of the samples furthest from the centre; a
            GaussianNoise says that the noise is white already; None leaves it unknown.
        maps: where coil maps come from; None takes the measurement's, else makes them.
        calibration: width of the centre that ESPIRiT looks at.
        coils: compress to so many virtual coils.
        device: where the work is done.
        tell: called with a sentence about what was assumed.

    Raises:
        ValueError: maps are asked for that are not there, or cannot be made, or a number is out of range.
    """
    place, y, given = device or torch.device("cpu"), kspace.data, kspace.maps
    if maps == "file" and given is None:
        raise ValueError("coil maps: the measurement has none; leave input.maps out, or set it to espirit")
    given = None if maps == "espirit" else given
    level: GaussianNoise | None = None if noise == "auto" else noise
    if noise == "auto":
        y, given, level = _whitened(kspace, y, given, tell)
    if coils is not None and coils != kspace.n_coils:
        packed = compress_coils(y, coils)
        y = packed.kspace
        if given is not None:
            given = _turned(packed.matrix, given, kspace.is_volume)
        tell(f"{coils} virtual coils keep {100 * packed.energy:.2f} % of the signal's energy")
    if given is None:
        given = _made_maps(kspace, y, calibration)
    return MRIScan(
        y=y.contiguous(),
        grid=kspace.grid,
        noise=level,
        device=place,
        maps=given.contiguous(),
        mask=kspace.mask,
        trajectories=kspace.trajectories,
    )


def kspace_of(
    kspace: Tensor | NDArray[Any],
    sampling: Tensor | NDArray[Any] | Trajectory | Sequence[Trajectory],
    maps: Tensor | NDArray[Any] | None = None,
    grid: VolumeGrid | None = None,
    covariance: Tensor | NDArray[Any] | None = None,
) -> KSpace:
    """Arrays as a measurement; see recon3d.reconstruct_mri.

    Raises:
        ValueError: shapes disagree, or a value is not finite.
        TypeError: k-space is real.
    """
    from recon3d.io.kspace import KSpace

    y = torch.as_tensor(kspace)
    if not y.is_complex():
        raise TypeError(f"reconstruct_mri: kspace must be complex, got {y.dtype}")
    y = y.detach().to("cpu", torch.complex64).contiguous()
    mask: Tensor | None = None
    trajectories: tuple[Trajectory, ...] | None = None
    if isinstance(sampling, Trajectory):
        trajectories = (sampling,)
    elif isinstance(sampling, (list, tuple)) and all(isinstance(t, Trajectory) for t in sampling) and sampling:
        trajectories = tuple(sampling)
    else:
        mask = torch.as_tensor(sampling).detach().cpu()
        if y.ndim != 4:
            raise ValueError(f"reconstruct_mri: kspace must be [slice, coil, ky, kx], got {tuple(y.shape)}")
        if mask.is_complex():
            raise TypeError(f"reconstruct_mri: the mask must be real, 1 where sampled, got {mask.dtype}")
        try:
            rows = mask.float().broadcast_to(y.shape[-2:] if mask.ndim < 3 else (y.shape[0], *y.shape[-2:]))
        except RuntimeError:
            raise ValueError(
                f"reconstruct_mri: the mask {tuple(mask.shape)} does not match k-space {tuple(y.shape)}; give [kx], "
                "[ky, kx] or [slice, ky, kx]"
            ) from None
        mask = rows.contiguous()
        y = y * (mask if mask.ndim == 3 else mask[None])[:, None]
    if grid is None:
        shape = trajectories[0].shape if trajectories else tuple(y.shape[-2:])
        sides = tuple(shape) if len(shape) == 3 else (y.shape[0], *shape)
        grid = VolumeGrid((sides[0], sides[1], sides[2]), (1.0, 1.0, 1.0))
    given = None if maps is None else torch.as_tensor(maps).detach().to("cpu", torch.complex64)
    known = None if covariance is None else torch.as_tensor(covariance).detach().to("cpu", torch.complex64)
    return KSpace(y, mask, trajectories, grid, given, known)


def load(config: JobConfig, kspace: KSpace, device: torch.device, events: Events) -> MRIScan:
    """The scan of a job from what was read.

    Raises:
        ConfigError: a setting does not fit the measurement.
        BadInput: coil maps are needed and cannot be made.
    """
    from recon3d.io import BadInput

    wanted = config.input
    if wanted.undersample is not None:
        kspace = undersampled(kspace, wanted.undersample)
    if wanted.spokes is not None:
        kspace = _first_spokes(kspace, wanted.spokes)
    if wanted.coils is not None and wanted.coils > kspace.n_coils:
        raise ConfigError(f"input.coils: {wanted.coils} asked for, {wanted.path} has {kspace.n_coils}")
    noise: Noise = "auto"
    if config.noise.kind == "gaussian" and config.noise.sigma is not None:
        noise = GaussianNoise(config.noise.sigma)
    elif config.noise.kind == "none":
        noise = None

    def tell(sentence: str) -> None:
        events.emit("warning", message=sentence)

    try:
        return prepare(
            kspace,
            noise=noise,
            maps=wanted.maps,
            calibration=wanted.calibration or _CALIBRATION,
            coils=wanted.coils,
            device=device,
            tell=tell,
        )
    except ValueError as error:
        raise BadInput(wanted.path, f"cannot be prepared ({error})", "see the input section of the job") from None


def _whitened(
    kspace: KSpace, y: Tensor, maps: Tensor | None, tell: Callable[[str], object]
) -> tuple[Tensor, Tensor | None, GaussianNoise]:
    covariance = kspace.noise_covariance
    if covariance is None:
        outer = _outer_samples(kspace)
        try:
            covariance = noise_covariance(outer)
        except ValueError:
            # too few samples to tell how coils correlate: one level for all
            sigma = float(torch.view_as_real(outer).double().std()) if outer.numel() > 1 else 0.0
            sigma = max(sigma, float(y.abs().max()) * torch.finfo(torch.float32).eps)
            tell(f"noise: unknown; all coils are given the spread of the outermost samples, {sigma:.3g}")
            return y, maps, GaussianNoise(sigma)
        # noise-free data: rounding of the stored numbers is noise too
        floor = (float(y.abs().max()) * torch.finfo(torch.float32).eps) ** 2
        covariance = covariance + torch.eye(len(covariance), dtype=covariance.dtype) * floor
    white = prewhiten(y, covariance)
    if kspace.noise_covariance is None:
        tell(f"noise: not measured apart; a spread of {white.sigma:.3g} is read off the outermost samples")
    if maps is not None:
        maps = _turned(white.matrix, maps, kspace.is_volume)
    return white.kspace, maps, GaussianNoise(white.sigma)


def _outer_samples(kspace: KSpace) -> Tensor:
    """Samples far from the centre, [coil, sample]."""
    if kspace.mask is not None:
        return outer_noise(kspace.data, kspace.mask, _OUTER)
    assert kspace.trajectories is not None
    parts = []
    for k, trajectory in enumerate(kspace.trajectories):
        radius = trajectory.points.norm(dim=-1)
        outer = radius >= radius.quantile(1 - _OUTER) if len(radius) < 1 << 24 else radius >= 0.9 * radius.max()
        rows = kspace.data if kspace.is_volume or len(kspace.trajectories) == 1 else kspace.data[k : k + 1]
        parts.append(rows[..., outer] if rows.ndim == 2 else rows[..., outer].movedim(1, 0).flatten(1))
    return torch.cat(parts, 1)


def _turned(matrix: Tensor, maps: Tensor, volume: bool) -> Tensor:
    """A matrix over coils applied to maps of slices, or of a volume."""
    return apply_coils(matrix, maps[None])[0] if volume else apply_coils(matrix, maps)


def _made_maps(kspace: KSpace, y: Tensor, calibration: int) -> Tensor:
    if kspace.mask is not None:
        return espirit(y, calibration)
    assert kspace.trajectories is not None
    region = gridded_calibration(y, kspace.trajectories, calibration)
    maps = espirit(region, calibration, shape=(kspace.grid.shape[1], kspace.grid.shape[2]))
    return maps.movedim(1, 0).contiguous() if kspace.is_volume else maps


def _noncartesian(trajectories: Sequence[Trajectory], maps: Tensor) -> MRIOperator:
    return NonCartesianMRI(trajectories[0] if len(trajectories) == 1 else list(trajectories), maps)


def _first_spokes(kspace: KSpace, count: int) -> KSpace:
    if kspace.trajectories is None:
        raise ConfigError("input.spokes: keeps readouts of a trajectory; this scan is Cartesian, see undersample")
    layout = kspace.trajectories[0].layout
    total = layout[0] if len(layout) > 1 else 1
    if count > total:
        raise ConfigError(f"input.spokes: {count} asked for, the trajectory has {total}")
    samples = kspace.trajectories[0].n_samples // total * count
    kept = torch.arange(samples)
    return replace(
        kspace,
        data=kspace.data[..., :samples].contiguous(),
        trajectories=tuple(t.subset(kept) for t in kspace.trajectories),
    )

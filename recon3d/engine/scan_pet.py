"""PET for the engine: counts of a whole volume, Poisson, with a multiplicative and an additive model.

    counts ~ Poisson(scale * factors * P x + additive)          x in Bq/mL, never negative

The state of a run is not clamped; only where the likelihood looks at an activity is it. What a network unit is, no
card can know: it is the typical activity of this scan, read off a quick ordered-subsets EM image (PETScan.fit).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from recon3d.config import ConfigError, GridConfig, JobConfig, OutputConfig
from recon3d.engine.loop import Start, start_image
from recon3d.engine.scan import Modality, Pictures, Scan, digest
from recon3d.geometry import PETGeometry, VolumeGrid
from recon3d.operators.attenuation import attenuation_factors, resample_volume
from recon3d.operators.normalisation import efficiency_factors, fan_sum_efficiencies, fan_sums, randoms_from_delayed
from recon3d.operators.pet import PETOperator, herman_meyer
from recon3d.priors.base import ModelCard, Prior
from recon3d.priors.scaled import ScaledPrior
from recon3d.recipes.model import Recipe

if TYPE_CHECKING:
    from recon3d.engine.events import Events as Told
    from recon3d.geometry import Events
    from recon3d.io.pet import PETData

__all__ = ["PETScan", "load", "prepare", "typical_activity"]

# of the start image's maximum; what lies below is no activity
_ACTIVE = 0.01
# of the largest sensitivity; where the scanner sees less, an EM image is noise that can reach any height
_SEEN = 0.05
# passes of the quick image that tells the scale where the recipe starts from none
_QUICK = 2
# measurements alive in the projection of one subset: counts, projection, ratio
_PROJECTIONS = 3
# views on which the operator is timed
_TIMED_VIEWS = 8

Tell = Callable[[str], object]


@dataclass(frozen=True, kw_only=True)
class PETScan(Scan):
    """Prompt counts [view, radial, plane], with time of flight [view, radial, tof, plane]; the volume is in Bq/mL.

    Attributes:
        geometry: the bins.
        factors: attenuation and normalisation of every bin, broadcast over y; None for 1.
        additive: expected random and scattered counts, broadcast over y; None for 0.
        scale: counts of a bin with factor 1 for 1 Bq/mL along 1 mm.
        psf_fwhm_mm: resolution in the image; None leaves it to the pixels.
        suv_factor: SUV of 1 Bq/mL; None where dose or weight are unknown.
        calibrated: whether scale is known; without, a volume is in counts per mm.
        precorrected: counts may be fractional.
    """

    modality: ClassVar[Modality] = "pet"
    unit: ClassVar[str] = "Bq/mL"
    keeps_start: ClassVar[bool] = True

    geometry: PETGeometry
    factors: Tensor | None = None
    additive: Tensor | None = None
    scale: float = 1.0
    psf_fwhm_mm: float | None = None
    suv_factor: float | None = None
    calibrated: bool = True
    precorrected: bool = False

    def check(self) -> list[str]:
        if tuple(self.y.shape) != tuple(self.geometry.shape):
            raise ValueError(
                f"counts: shape {tuple(self.y.shape)}, but the geometry says [view, radial, "
                f"{'tof, ' if self.geometry.tof else ''}plane] = {tuple(self.geometry.shape)}"
            )
        low, high = (float(v) for v in self.y.aminmax())
        if not (np.isfinite(low) and np.isfinite(high)):
            raise ValueError("counts: NaN or infinity among them; set bins that did not count to 0, with factor 0")
        if low < 0:
            raise ValueError(
                f"counts: values fall to {low:.4g}; give prompts as they were counted, and randoms and scatter as the "
                "additive term"
            )
        if not high > 0:
            raise ValueError("counts: every bin is zero; there is nothing to reconstruct")
        if self.guide is not None and tuple(self.guide.shape) != self.grid.shape:
            raise ValueError(f"guide: shape {tuple(self.guide.shape)}, the grid has {self.grid.shape}; resample it")
        operator = self._operator  # refuses factors and additive counts that do not fit or are negative
        sentences = []
        if not self.precorrected and any(bool((row != row.round()).any()) for row in self.y):
            sentences.append(
                "counts: some are no whole numbers; their noise is taken to be that of counts nevertheless"
            )
        if operator.factors is None:
            sentences.append("factors: none are given; neither attenuation nor normalisation is corrected for")
        if not self.calibrated:
            sentences.append("calibration: unknown; the volume is in counts per mm, not in Bq/mL (counts_per_unit)")
        return sentences

    def operator(self) -> PETOperator:
        return self._operator

    @cached_property
    def _operator(self) -> PETOperator:
        made = PETOperator(
            self.geometry,
            self.grid,
            factors=self.factors,
            additive=self.additive,
            psf_fwhm_mm=self.psf_fwhm_mm,
            scale=self.scale,
        )
        return made if self.device.type == "cpu" else made.to(self.device)

    def slab(self, first: int, end: int) -> Self:
        return self

    def sample(self, slices: int) -> tuple[Scan, float]:
        """A few views spread over the half turn, and their share of all."""
        views = self.y.shape[0]
        chosen = sorted(herman_meyer(views)[: min(_TIMED_VIEWS, views)])
        part = replace(
            self,
            y=self.y[chosen],
            geometry=self.geometry.subset(chosen),
            factors=_of_views(self.factors, chosen, views, self.y.ndim),
            additive=_of_views(self.additive, chosen, views, self.y.ndim),
        )
        return part, len(chosen) / views

    def _setting(self) -> list[Any]:
        terms = [None if t is None else digest(t) for t in (self.factors, self.additive)]
        return ["pet", asdict(self.geometry), *terms, self.scale, self.psf_fwhm_mm]

    def fit(self, prior: Prior, recipe: Recipe) -> tuple[Prior, Tensor | None]:
        """The prior in units of this scan's typical activity, and the recipe's start image.

        A network unit is the mean over the voxels above 1 % of the maximum of the recipe's ordered-subsets EM image, of
        a quick one for another start: fixed by the data, for all slices alike. A ScaledPrior
        has a unit already and keeps it.

        Raises:
            ValueError: the scanner sees nothing, or there is no activity.
        """
        start, operator, y = recipe.start, self._operator, self.y.to(self.device)
        if start.image == "cg":
            raise ValueError("start: conjugate gradients are not for counts; set recipe.start.image to osem")
        for section, n in (("start", start.subsets), ("consistency", recipe.consistency.subsets)):
            if n > y.shape[0]:
                raise ValueError(
                    f"recipe.{section}.subsets: {n} asked for, the counts have {y.shape[0]} views; ask for fewer"
                )
        # what the recipe needs anyway: its subsets keep what they see
        subsets = start.subsets if start.image == "osem" else recipe.consistency.subsets
        passes = start.iterations if start.image == "osem" else _QUICK
        image = start_image(Start("osem", passes, subsets=subsets), operator, y)
        seen = operator.sensitivity()
        most = float(seen.max())
        if not most > 0:
            raise ValueError("counts: the scanner sees no voxel of the grid; check factors, grid and geometry")
        scale = typical_activity(torch.where(seen >= _SEEN * most, image, 0.0))
        first = image if start.image == "osem" else operator.pinv(y) if start.image == "pinv" else None
        if isinstance(prior, ScaledPrior):
            return prior, first
        return ScaledPrior(prior, scale), first

    def prior_mismatch(self, card: ModelCard) -> str | None:
        if card.channels != card.slices:
            channels = card.channels // card.slices
            return f"prior {card.name!r} is for images of {channels} channels, those of PET have one"
        return super().prior_mismatch(card)

    def finish(self, volume: Tensor) -> Tensor:
        """Not negative, and zero where the scanner sees nothing: the prior's word alone is not handed out."""
        seen = self._operator.sensitivity() > 0
        return torch.where(seen.to(volume.device), volume.clamp_min(0), 0.0)

    def data_fit(self, volume: Tensor) -> dict[str, Any] | None:
        """Counts against expected ones, a few views at a time."""
        operator, chi2, used, expected, squared, power = self._operator, 0.0, 0, 0.0, 0.0, 0.0
        for part, index in operator.subsets(max(1, self.y.shape[0] // _TIMED_VIEWS)):
            y = self.y[index].double()
            mean = part.expected(volume.to(self.device)).cpu().double()
            possible = mean > 0
            difference = (y - mean).square_()
            chi2 += float(torch.where(possible, difference / mean, 0.0).sum())
            squared += float(difference.sum())
            expected += float(mean.sum())
            used += int(possible.sum())
            power += float(y.square_().sum())
        return {
            "relative_residual": (squared / power) ** 0.5,
            "chi2_per_bin": chi2 / used if used else None,
            "counts": float(self.y.sum(dtype=torch.float64)),
            "expected_counts": expected,
            "definitions": {
                "relative_residual": "|y - e| / |y| over all bins, e the counts that the volume lets expect",
                "chi2_per_bin": "mean of (y - e)^2 / e over bins where counts are expected; 1 for the truth, whatever "
                "the number of counts",
                "counts": "sum of y",
                "expected_counts": "sum of e",
            },
        }

    def pictures(self, volume: Tensor, name: str, output: OutputConfig) -> Pictures:
        direct = self._operator.pinv(self.y.to(self.device)).cpu().clamp_min(0)
        factor, _ = self._written(output)
        # hot spots are few voxels, and what one looks for
        top = max(float(np.percentile(volume.numpy(), 99.9)) * factor, float(np.finfo(np.float32).tiny))
        shown = {"rebinned filtered back projection": direct * factor, name: volume * factor}
        return Pictures(shown, {"unit": "au", "window": (0.0, top)})

    def save(self, path: Path, volume: Tensor, output: OutputConfig) -> None:
        """Bq/mL, or SUV by body weight; the header says which."""
        from recon3d.io import write_nifti

        factor, label = self._written(output)
        write_nifti(path, volume * factor, self.grid, label=label)

    def _written(self, output: OutputConfig) -> tuple[float, str]:
        if output.unit != "suv":
            return 1.0, "Bq/mL" if self.calibrated else "counts/mm"
        if self.suv_factor is None or not self.calibrated:
            raise ValueError(
                "output.unit suv: needs the calibration, weight_kg, injected_bq, injection_to_scan_s and half_life_s; "
                "give what the file does not say"
            )
        return self.suv_factor, "SUVbw g/mL"

    def work_bytes(self) -> dict[str, dict[str, int]]:
        views = self.y.shape[0]
        part = self.y_bytes * min(_TIMED_VIEWS, views) // views
        return {
            "data": {"projections of a subset": _PROJECTIONS * part},
            "start": {"projections": 2 * self.y_bytes},
        }


def typical_activity(image: Tensor) -> float:
    """Mean of an activity over the voxels above 1 % of its maximum, in float64.

    Raises:
        ValueError: there is none.
    """
    values = image.detach().double()
    high = float(values.max())
    if not (high > 0 and np.isfinite(high)):
        raise ValueError("counts: their image is zero; there is nothing above the expected randoms and scatter")
    return float(values[values > _ACTIVE * high].mean())


def prepare(
    prompts: Tensor | NDArray[Any],
    geometry: PETGeometry,
    factors: Tensor | NDArray[Any] | None = None,
    additive: Tensor | NDArray[Any] | None = None,
    grid: VolumeGrid | None = None,
    *,
    mu: tuple[Tensor, VolumeGrid] | None = None,
    scale: float = 1.0,
    psf_fwhm_mm: float | None = None,
    suv_factor: float | None = None,
    calibrated: bool = True,
    precorrected: bool = False,
    guide: Tensor | None = None,
    device: torch.device | None = None,
) -> PETScan:
    """Arrays as the engine takes them; see recon3d.reconstruct_pet.

    Raises:
        ValueError: shapes disagree, or mu ends inside the grid where it is not empty.
        TypeError: counts are complex.
    """
    y = torch.as_tensor(prompts)
    if y.is_complex():
        raise TypeError(f"reconstruct_pet: prompts must be real counts, got {y.dtype}")
    place = grid or geometry.default_grid()
    term = None if factors is None else torch.as_tensor(factors).float()
    if mu is not None:
        lost = attenuation_factors(mu[0], mu[1], geometry, onto=place)
        term = lost if term is None else _times(term, lost)
    return PETScan(
        y=y.detach().to("cpu", torch.float32).contiguous(),
        grid=place,
        device=device or torch.device("cpu"),
        geometry=geometry,
        factors=term,
        additive=None if additive is None else torch.as_tensor(additive).float(),
        scale=scale,
        psf_fwhm_mm=psf_fwhm_mm,
        suv_factor=suv_factor,
        calibrated=calibrated,
        precorrected=precorrected,
        guide=None if guide is None else torch.as_tensor(guide).float(),
    )


def load(config: JobConfig, data: PETData, device: torch.device, events: Told) -> PETScan:
    """The scan of a job from what was read, with the terms that the job names.

    Factors that came with the counts hold attenuation and normalisation together and are taken as they are; where
    there are none, they are made of the normalisation and the attenuation map.

    Raises:
        ConfigError: a setting does not fit the measurement.
        BadInput: a term cannot be read or does not fit.
    """
    from recon3d.io import BadInput, read_mu_map, read_nifti
    from recon3d.io.interfile import read_interfile_terms
    from recon3d.io.pet import patient_grid

    wanted, geometry, info = config.input, data.geometry, data.info

    def tell(sentence: str) -> None:
        events.emit("warning", message=sentence)

    if data.prompts.numel() == 0:
        data = data.histogram(geometry)
    info = replace(
        info,
        **{
            name: getattr(wanted, name)
            for name in ("weight_kg", "injected_bq", "injection_to_scan_s", "half_life_s")
            if getattr(wanted, name) is not None
        },
    )
    grid = patient_grid(_grid(config.grid, data), info.position)
    try:
        factors, additive = data.factors, data.additive
        if wanted.multiplicative is not None:
            factors = read_interfile_terms(Path(wanted.multiplicative), "multiplicative factors", geometry)
        made = factors is None
        if wanted.normalisation is not None:
            if factors is not None:
                raise ConfigError("input.normalisation: the multiplicative factors hold it already; leave one out")
            factors = _normalisation(wanted.normalisation, data, tell)
        mu = data.mu
        if wanted.attenuation is not None:
            if not made:
                raise ConfigError("input.attenuation: the multiplicative factors hold it already; leave one out")
            volume, own, notes = read_mu_map(Path(wanted.attenuation), wanted.mu_unit)
            mu = volume, own
            for note in notes:
                tell(note)
        elif mu is not None and not made:
            mu = None  # within the factors
        if factors is None:
            tell("normalisation: none is given; crystals are taken to be alike (input.normalisation=fansum)")
            factors = efficiency_factors(torch.from_numpy(geometry.scanner.real_crystals()).double(), geometry)
        if wanted.additive is not None:
            additive = read_interfile_terms(Path(wanted.additive), "additive terms", geometry)
        if additive is None and wanted.randoms != "none":
            additive = _randoms(data, wanted.randoms == "delayed", tell)
        guide = None
        if wanted.guide is not None:
            image, own = read_nifti(Path(wanted.guide))
            guide = resample_volume(image, own, grid)
        scale, calibrated = info.scale, info.calibrated
        if wanted.counts_per_unit is not None:
            scale, calibrated = wanted.counts_per_unit, True
        scan = prepare(
            data.prompts,
            geometry,
            factors,
            additive,
            grid,
            mu=mu,
            scale=scale,
            psf_fwhm_mm=wanted.psf_fwhm_mm,
            suv_factor=info.suv_factor,
            calibrated=calibrated,
            precorrected=bool(wanted.precorrected),
            guide=guide,
            device=device,
        )
    except (ConfigError, BadInput):
        raise
    except ValueError as error:
        raise BadInput(wanted.path, f"cannot be prepared ({error})", "see the input section of the job") from None
    scan._written(config.output)  # a unit that cannot be had is told before the work
    return scan


def _normalisation(wanted: str, data: PETData, tell: Tell) -> Tensor:
    if wanted != "fansum":
        from recon3d.io.interfile import read_interfile_terms

        return read_interfile_terms(Path(wanted), "normalisation factors", data.geometry)
    tell("normalisation: estimated from the fan sums of the counts themselves; a measured one is better")
    geometry = data.geometry
    fans = fan_sums(data.prompts if data.events is None else data.events, geometry)
    return efficiency_factors(fan_sum_efficiencies(fans, geometry.scanner), geometry)


def _randoms(data: PETData, asked: bool, tell: Tell) -> Tensor | None:
    delayed: Tensor | Events | None = data.delayed
    if data.events is not None and bool((~data.events.prompt).any()):
        delayed = data.events  # crystals are counted faster than bins
    if delayed is None:
        if asked:
            raise ConfigError("input.randoms: delayed asked for, but the measurement has no delayed coincidences")
        return None
    tell("randoms: estimated from the delayed coincidences; scatter is not corrected for")
    return randoms_from_delayed(delayed, data.geometry)


def _grid(wanted: GridConfig, data: PETData) -> VolumeGrid:
    geometry = data.geometry
    if wanted.shape is None and wanted.spacing_mm is None:
        return data.grid or geometry.default_grid()
    found = data.grid or geometry.default_grid()
    if wanted.spacing_mm is None:
        assert wanted.shape is not None
        # the same field of view on other pixels; slices stay as far apart as planes are
        dy, dx = (found.spacing_mm[k] * found.shape[k] / wanted.shape[k] for k in (1, 2))
        return VolumeGrid(wanted.shape, (found.spacing_mm[0], dy, dx))
    if wanted.shape is not None:
        return VolumeGrid(wanted.shape, wanted.spacing_mm)
    nz, ny, nx = (
        max(1, round(n * old / new))
        for n, old, new in zip(found.shape, found.spacing_mm, wanted.spacing_mm, strict=True)
    )
    return VolumeGrid((nz, ny, nx), wanted.spacing_mm)


def _times(term: Tensor, lost: Tensor) -> Tensor:
    """Factors of all bins times attenuation, which has no time bins."""
    return term * (lost if term.ndim <= lost.ndim else lost.unsqueeze(2))


def _of_views(term: Tensor | None, chosen: list[int], views: int, ndim: int) -> Tensor | None:
    """The part of a term that belongs to some views; terms that are broadcast over them are left."""
    if term is None or term.ndim not in (3, ndim) or term.shape[0] != views:
        return term
    return term[chosen]

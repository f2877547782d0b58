"""Everything that decides a reconstruction, from arrays or from a job file, checked before it starts."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from recon3d.config import ConfigError, GridConfig, JobConfig, validate
from recon3d.engine.events import Events
from recon3d.engine.executor import finite
from recon3d.engine.job import TimedCT
from recon3d.geometry import GeometryWarning, ScanGeometry, VolumeGrid
from recon3d.operators.noise import GaussianNoise, NoiseModel, PoissonNoise, estimate_noise
from recon3d.priors.base import Prior, check_plane
from recon3d.recipes.model import Recipe

if TYPE_CHECKING:
    from recon3d.engine import loop
    from recon3d.io.measurement import Measurement


@dataclass(frozen=True, kw_only=True)
class Scan:
    """A measurement and the volume it is to become.

    Attributes:
        y: line integrals, [slice, view, u] float32.
        geometry: how it was measured.
        grid: the volume.
        noise: how y scatters; None when it is not known.
        projector: "joseph" or "shear".
        device: where the work is done.
        files: path to sha256 of what was read.
    """

    y: Tensor
    geometry: ScanGeometry
    grid: VolumeGrid
    noise: NoiseModel | None = None
    projector: Literal["joseph", "shear"] = "joseph"
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    files: Mapping[str, str] = field(default_factory=dict)

    def check(self) -> list[str]:
        """Sentences about what a user should know before the result is believed.

        Raises:
            ValueError: shapes disagree, or the measurement holds NaN.
        """
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

    def operator(self) -> TimedCT:
        """The scanner, with a clock."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", GeometryWarning)  # `check` has told
            return TimedCT(self.geometry, self.grid, self.projector, self.device)

    def weights(self, first: int = 0, end: int | None = None) -> Tensor | None:
        """Inverse variances of y on its slices first .. end-1, on the host; None when the noise is not known."""
        if self.noise is None:
            return None
        rows = slice(first, end)
        noise = GivenWeights(self.noise.values[rows]) if isinstance(self.noise, GivenWeights) else self.noise
        return noise.weights(self.y[rows])

    def digests(self) -> dict[str, str]:
        """Digests of what goes in: measurement, scan and grid."""
        scan = json.dumps([type(self.geometry).__name__, asdict(self.geometry), asdict(self.grid)], sort_keys=True)
        return {
            "sinogram": hashlib.sha256(self.y.numpy().data).hexdigest(),
            "scan": hashlib.sha256(scan.encode()).hexdigest(),
        }


@dataclass(frozen=True, kw_only=True)
class Problem(Scan):
    """A scan with everything that decides its reconstruction.

    Attributes:
        recipe: the method.
        prior: the denoiser, on `device`.
        seed: of all random numbers.
        accept_mismatch: use the prior outside what it was trained on, with a warning.
    """

    recipe: Recipe
    prior: Prior
    seed: int = 0
    accept_mismatch: bool = False

    def check(self) -> list[str]:
        """As Scan, and whether the prior was made for such slices.

        Raises:
            ValueError: as Scan; or the prior was made for others and `accept_mismatch` is not set.
        """
        sentences = super().check()
        card = getattr(self.prior, "card", None)
        if card is not None:
            mismatches = [check_plane(card, "axial", self.grid.pixel_mm), self._check_sigma()]
            for sentence in filter(None, mismatches):
                if not self.accept_mismatch:
                    raise ValueError(f"{sentence}; or set accept_mismatch")
                sentences.append(sentence)
        return sentences

    def job(self) -> loop.Job:
        """The loop's parts, ready to run on the device."""
        from recon3d.engine.assemble import assemble

        weights = self.weights()
        return assemble(
            self.recipe,
            self.operator(),
            self.y.to(self.device),
            self.prior,
            spacing_mm=self.grid.spacing_mm[0],
            weights=None if weights is None else weights.to(self.device),
            seed=self.seed,
        )

    def prior_digest(self) -> str:
        """Digest of the prior: of its weights and card, or of its description when it has none."""
        card = getattr(self.prior, "card", None)
        text = card.model_dump_json() if card is not None else repr(self.prior)
        text += f" {self.prior.offset!r} {self.prior.scale!r}"  # a caller may have set them apart from the card
        return hashlib.sha256(text.encode()).hexdigest()

    def _check_sigma(self) -> str | None:
        from recon3d.engine.assemble import levels
        from recon3d.priors.network_prior import check_sigma

        sigmas = [level.sigma for level in levels(self.recipe.resolved().trajectory, 1.0)]
        return check_sigma(self.prior.card, max(sigmas), min(sigmas)) if sigmas else None


def load_scan(config: JobConfig, events: Events) -> Scan:
    """Read the measurement that a job names, with the volume and the noise it asks for.

    Raises:
        BadInput: the measurement cannot be used.
        ConfigError: a setting does not fit it, or none is named.
    """
    from recon3d.engine.checkpoint import sha256_file
    from recon3d.io import read_projections

    if not config.input.path:
        raise ConfigError("no measurement is given; name a file with -i or input.path")
    device = choose_device(config.compute.device)
    path = Path(config.input.path)
    measured = read_projections(path, **config.input.options())
    for sentence in measured.notes:
        events.emit("warning", message=sentence)
    chosen = config.input.views
    if chosen is not None:
        total = measured.geometry.n_views
        if chosen > total:
            raise ConfigError(f"input.views: {chosen} asked for, {path} has {total}")
        measured = measured.views([k * total // chosen for k in range(chosen)])
    return Scan(
        y=measured.sinogram.contiguous(),
        geometry=measured.geometry,
        grid=_grid(config.grid, measured),
        noise=_noise(config, measured, events),
        projector=config.projector,
        device=device,
        files={str(path): sha256_file(path)},
    )


def load_problem(config: JobConfig, events: Events) -> Problem:
    """Read everything that a resolved job names.

    Raises:
        BadInput: the measurement or the prior cannot be used.
        ConfigError: a setting does not fit the measurement.
    """
    from recon3d.engine.checkpoint import sha256_file
    from recon3d.priors import find_prior, load_prior

    folder = find_prior(config.prior)
    scan = load_scan(config, events)
    weights = [file for file in sorted(folder.glob("*")) if file.suffix in (".json", ".safetensors")]
    files = {**scan.files, **{str(file): sha256_file(file) for file in weights}}
    return Problem(
        **{**{f.name: getattr(scan, f.name) for f in fields(Scan)}, "files": files},
        recipe=validate(Recipe, config.recipe, "recipe"),
        prior=load_prior(config.prior, scan.device),
        seed=config.seed,
        accept_mismatch=config.accept_mismatch,
    )


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


def choose_device(name: str) -> torch.device:
    """The device a job runs on.

    Raises:
        ValueError: cuda is asked for and there is none.
    """
    cuda = torch.cuda.is_available()
    if name == "cuda" and not cuda:
        raise ValueError("device: cuda was asked for, but torch finds no GPU here; use auto or cpu")
    if name not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device: expected auto, cpu or cuda, got {name!r}")
    return torch.device("cuda" if cuda and name != "cpu" else "cpu")

"""What a modality brings to the engine. Everything else there knows volumes, operators and priors only.

A modality is one subclass of Scan, in a file of its own (scan_ct.py, scan_mri.py, scan_pet.py, scan_image.py,
scan_convert.py): the
measurement with its noise, the operator and what can go wrong with them, a direct image to look at and to start from,
the unit of the result, how it is written, and what the data term takes in memory. A second function there makes the
scan of a job's config from what recon3d.io read.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import torch
from torch import Tensor

from recon3d.config import ConfigError, JobConfig, OutputConfig
from recon3d.geometry import VolumeGrid
from recon3d.operators.base import LinearOperator
from recon3d.operators.noise import NoiseModel
from recon3d.priors.base import ModelCard, Prior, condition_volume
from recon3d.recipes.model import Recipe

if TYPE_CHECKING:
    from recon3d.engine.events import Events

__all__ = ["DEFAULTS", "Modality", "Pictures", "Scan", "choose_device", "defaults_of", "load_scan", "modality_of"]

Modality = Literal["ct", "mri", "pet", "image"]

# recipe and prior of a job that names none; those of an image depend on its unit (scan_image.defaults)
DEFAULTS: dict[Modality, tuple[str, str]] = {"ct": ("ct", "ct"), "mri": ("mri", "mr"), "pet": ("pet", "pet")}


@dataclass(frozen=True)
class Pictures:
    """What a preview shows: volumes by name, in the unit that `arguments` of recon3d.report.preview name."""

    volumes: Mapping[str, Tensor]
    arguments: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Scan(ABC):
    """A measurement and the volume it is to become.

    Attributes:
        y: the measurement, in the operator's range.
        grid: the volume.
        noise: how y scatters; None when it is not known.
        device: where the work is done.
        files: path to sha256 of what was read.
        guide: a volume on the grid for a prior that takes a condition, an MR or CT image; None for all others.
    """

    modality: ClassVar[Modality]
    unit: ClassVar[str]  # of the volume
    keeps_start: ClassVar[bool] = False  # whether `fit` gives a start image

    y: Tensor
    grid: VolumeGrid
    noise: NoiseModel | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    files: Mapping[str, str] = field(default_factory=dict)
    guide: Tensor | None = None

    @abstractmethod
    def check(self) -> list[str]:
        """Sentences about what a user should know before the result is believed.

        Raises:
            ValueError: shapes disagree, or the measurement holds NaN.
        """

    @abstractmethod
    def operator(self) -> LinearOperator:
        """The scanner."""

    @abstractmethod
    def slab(self, first: int, end: int) -> Self:
        """Slices first .. end-1 alone; the scan itself where the scanner couples them."""

    def weights(self) -> Tensor | None:
        """Inverse variances of y, broadcast over it, on the host; None when the noise is not known."""
        return None if self.noise is None else self.noise.weights(self.y)

    def measured(self) -> Tensor | None:
        """Where y holds a measurement, broadcast over it, 1 or 0; None for everywhere."""
        return None

    def digests(self) -> dict[str, str]:
        """Digests of what goes in: measurement, scan and grid."""
        setting = json.dumps([*self._setting(), asdict(self.grid)], sort_keys=True)
        found = {"measurement": digest(self.y), "scan": hashlib.sha256(setting.encode()).hexdigest()}
        return found if self.guide is None else {**found, "guide": digest(self.guide)}

    @abstractmethod
    def _setting(self) -> list[Any]:
        """All of the scan but y, grid and noise, as JSON values."""

    def fit(self, prior: Prior, recipe: Recipe) -> tuple[Prior, Tensor | None]:
        """The prior as it meets this scan, and the start image where that had to be known for it.

        Args:
            prior: as loaded.
            recipe: resolved; tells the start image.
        """
        return prior, None

    def condition(self, card: ModelCard | None) -> Tensor | None:
        """The guide in the values that a conditional prior's card asks for; as it is for other priors."""
        if self.guide is None or card is None or card.condition is None:
            return self.guide
        return condition_volume(card, self.guide)

    def prior_mismatch(self, card: ModelCard) -> str | None:
        """One sentence when a prior is for other images than this scan's, beyond its plane and spacing."""
        if card.unit in (self.unit, "a.u."):
            return None
        return f"prior {card.name!r} was trained on images in {card.unit}, this scan's are in {self.unit}"

    def finish(self, volume: Tensor) -> Tensor:
        """The result of the loop as it is handed out."""
        return volume

    @abstractmethod
    def pictures(self, volume: Tensor, name: str, output: OutputConfig) -> Pictures:
        """What stands in preview.png: the operator's direct image, and the result under its name."""

    @abstractmethod
    def save(self, path: Path, volume: Tensor, output: OutputConfig) -> None:
        """Write a volume as NIfTI."""

    def save_spread(self, path: Path, spread: Tensor, output: OutputConfig) -> None:
        """Write differences of volumes, such as a standard deviation, in the unit of `save`."""
        self.save(path, spread, output)

    def write(self, folder: Path, volume: Tensor, output: OutputConfig) -> None:
        """Write the result as volume.nii.gz, and what else belongs to it."""
        self.save(folder / "volume.nii.gz", volume, output)

    @abstractmethod
    def work_bytes(self) -> dict[str, dict[str, int]]:
        """Bytes beyond whole volumes in the phases "data" and "start", by what they are for."""

    def sample(self, slices: int) -> tuple[Scan, float]:
        """A part small enough to time the operator on, and its share of the work."""
        part = self.slab(0, slices)
        return part, part.grid.shape[0] / self.grid.shape[0]

    def data_fit(self, volume: Tensor) -> dict[str, Any] | None:
        """How well a volume explains the measurement, with definitions; None for the weighted residual of api.py."""
        return None

    @property
    def dtype(self) -> torch.dtype:
        """Of the volume."""
        return torch.complex64 if self.y.is_complex() else torch.float32

    @property
    def volume_bytes(self) -> int:
        """Of one volume."""
        nz, ny, nx = self.grid.shape
        return nz * ny * nx * self.dtype.itemsize

    @property
    def y_bytes(self) -> int:
        """Of one measurement."""
        return self.y.numel() * self.y.element_size()

    def slabs(self, depth: int) -> Iterator[tuple[slice, Self]]:
        """Parts of at most `depth` slices, or one part where the scanner couples them."""
        total = self.grid.shape[0]
        for first in range(0, total, depth):
            part = self.slab(first, min(total, first + depth))
            if part.grid.shape[0] == total:
                yield slice(0, total), part
                return
            yield slice(first, min(total, first + depth)), part


def digest(tensor: Tensor) -> str:
    """The sha256 of a host tensor's bytes, as hex."""
    flat = tensor.detach().contiguous()
    return hashlib.sha256(
        (torch.view_as_real(flat.resolve_conj()) if flat.is_complex() else flat).numpy().data
    ).hexdigest()


def modality_of(path: str | Path) -> Modality:
    """What kind of measurement a file holds, from its headers.

    Raises:
        BadInput: it is of no known format, or damaged.
    """
    from recon3d.io import describe

    found = describe(path)
    if found["format"].startswith(("NIfTI", "DICOM")):
        return "image"
    if "coils" in found:
        return "mri"
    return "pet" if "scanner" in found else "ct"


def defaults_of(config: JobConfig) -> tuple[str, str]:
    """Recipe and prior for a job's measurement, where the job names none.

    Raises:
        BadInput: the measurement cannot be read.
        ConfigError: it does not say enough.
    """
    modality = modality_of(config.input.path)
    if modality != "image":
        return DEFAULTS[modality]
    from recon3d.engine import scan_convert, scan_image

    return (scan_convert if config.input.operator == "none" else scan_image).defaults(config)


def load_scan(config: JobConfig, events: Events) -> Scan:
    """Read the measurement that a job names, with the volume and the noise it asks for.

    Raises:
        BadInput: the measurement cannot be used.
        ConfigError: a setting does not fit it, or none is named.
    """
    from recon3d.engine import scan_convert, scan_ct, scan_image, scan_mri, scan_pet
    from recon3d.io import KSpace, PETData, read_measurement

    if not config.input.path:
        raise ConfigError("no measurement is given; name a file with -i or input.path")
    device = choose_device(config.compute.device)
    path = Path(config.input.path)
    modality = modality_of(path)
    refuse_foreign(config, modality)
    scan: Scan
    if modality == "image":
        made = scan_convert.load if config.input.operator == "none" else scan_image.load
        scan = made(config, device, events)
        return replace(scan, files=_digests(path))
    measured = read_measurement(path, **config.input.options(modality))
    for sentence in measured.notes:
        events.emit("warning", message=sentence)
    if isinstance(measured, KSpace):
        scan = scan_mri.load(config, measured, device, events)
    elif isinstance(measured, PETData):
        scan = scan_pet.load(config, measured, device, events)
    else:
        scan = scan_ct.load(config, measured, device, events)
    return replace(scan, files=_digests(path))


def _digests(path: Path) -> dict[str, str]:
    from recon3d.engine.checkpoint import sha256_file

    read = [path] if path.is_file() else sorted(p for p in path.glob("*") if p.is_file())
    return {str(file): sha256_file(file) for file in read}


def refuse_foreign(config: JobConfig, modality: Modality) -> None:
    """Raise ConfigError when a job sets what has no meaning for its measurement."""
    kinds = {
        "ct": "line integrals of a CT scan",
        "mri": "k-space of an MRI scan",
        "pet": "counts of a PET scan",
        "image": "an image",
    }
    units: dict[Modality, tuple[str, ...]] = {
        "ct": ("hu", "per_mm"),
        "mri": (),
        "pet": ("bq_per_ml", "suv"),
        "image": ("hu", "per_mm"),
    }
    found = [f"input.{name}" for name in config.input.foreign(modality)]
    if modality in ("mri", "image"):
        found += [f"grid.{name}" for name, value in config.grid if value is not None]
    if config.output.unit is not None and config.output.unit not in units[modality]:
        found.append("output.unit" if modality == "mri" else f"output.unit {config.output.unit}")
    if modality not in ("ct", "image"):
        found += ["output.mu_water_per_mm"] if config.output.mu_water_per_mm is not None else []
    if modality != "ct":
        found += ["noise.photons"] if config.noise.photons is not None else []
    if modality == "pet":
        found += ["noise.sigma"] if config.noise.sigma is not None else []
    if found:
        has, them = ("these have", "them") if len(found) > 1 else ("this has", "it")
        raise ConfigError(
            f"{', '.join(found)}: {config.input.path} holds {kinds[modality]}, where {has} no meaning; leave {them} out"
        )


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

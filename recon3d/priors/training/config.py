"""What a training run is told: data, network, noise, optimiser, budget. Units are in the field names."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from recon3d.priors.networks import UNetConfig
from recon3d.priors.paths import noise_path

__all__ = ["ConditionConfig", "CropConfig", "DataConfig", "LesionConfig", "PhaseConfig", "SourceConfig", "TrainConfig"]


Plane = Literal["axial", "coronal", "sagittal"]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class SourceConfig(_Strict):
    """Volumes of one kind that share a sampling weight."""

    path: str = Field(
        description="file or glob, relative to DataConfig.root: NIfTI, folders of a DICOM series, .npy, .npz, .h5"
    )
    spacing_mm: tuple[float, float, float] | None = Field(
        None, description="z, y, x of arrays (.npy, .npz, .h5), which lie [z, y, x] or [channel, z, y, x]"
    )
    dataset: str | None = Field(None, description="name of the array in .npz and .h5; null: volume")
    weight: float = Field(1.0, gt=0, description="share of the crops drawn from this source, before normalisation")
    max_block_z: int = Field(
        1, ge=1, le=8, description="up to so many neighbouring slices are averaged (thicker slices)"
    )
    attribution: str = Field("", description="source and licence, copied to the model card")
    plane: Plane | None = Field(None, description="plane of its slices; null: data.plane")
    condition: str | None = Field(
        None,
        description="file or glob of the images beside the volumes, relative to DataConfig.root; what its wildcards "
        "stand for says which belongs to which",
    )


class CropConfig(_Strict):
    """One shape of training batch and how often it is drawn."""

    size: int = Field(128, ge=8)
    batch: int = Field(8, ge=1)
    share: float = Field(1.0, gt=0)


class PhaseConfig(_Strict):
    """The random phase of complex slices: a constant, a slope, a bowl, a few waves, and a step where fat is."""

    flat: float = Field(0.15, ge=0, le=1, description="share of slices with the constant phase alone")
    slope: float = Field(0.7, ge=0, description="cycles over 256 pixels and axis, standard deviation")
    bowl: float = Field(1.0, ge=0, description="cycles at 256 pixels from its centre, standard deviation")
    waves: float = Field(
        0.12, ge=0, description="cycles, standard deviation of each of three waves of 90 to 400 pixels"
    )
    step: float = Field(0.3, ge=0, le=1, description="share of slices whose bright voxels are turned against the rest")


class LesionConfig(_Strict):
    """Spots put into slices of activity: soft-edged ellipsoids, hotter or colder than what they lie in."""

    share: float = Field(0.0, ge=0, le=1, description="share of crops that get any")
    most: int = Field(4, ge=1, description="up to so many spots in a crop")
    radius_px: tuple[float, float] = Field((1.0, 6.0), description="half axes, log-uniform")
    hot: tuple[float, float] = Field((1.5, 20.0), description="hot spot over its surroundings, log-uniform")
    cold: tuple[float, float] = Field((0.0, 0.6), description="cold spot over its surroundings, uniform")
    cold_share: float = Field(0.25, ge=0, le=1)
    edge_px: tuple[float, float] = Field((0.3, 1.2), description="width of the edge: the scanner's blur")


class ConditionConfig(_Strict):
    """The image that a conditional prior is shown, cut and turned with the target; without noise.

    A volume is clipped and divided by its percentile where one is given; the network sees (value - offset) / scale.
    """

    validation: str = Field(description="the image of the validation volume")
    what: str = Field(description="contrast and unit, such as T1-weighted MR in arbitrary units")
    clip: tuple[float, float] = Field((-1e9, 1e9), description="file values are clipped to this first")
    percentile: float | None = Field(None, gt=50, le=100, description="each volume is divided by this percentile")
    offset: float = 0.0
    scale: float = Field(1.0, gt=0)
    background: float = Field(0.0, description="value outside the image, after the division by the percentile")
    gain_jitter: float = Field(0.1, ge=0, lt=1, description="brightness of its crops, apart from the target's")

    @property
    def empty(self) -> float:
        """The background in network units."""
        return (self.background - self.offset) / self.scale


class DataConfig(_Strict):
    """Slices and how they are augmented. The network sees (value - offset) / scale, values in `unit`."""

    root: str = "."
    sources: tuple[SourceConfig, ...] = Field(min_length=1)
    validation: str = Field(
        description="one volume that is never trained on; an array has the spacing of the first source that says one"
    )
    exclude: tuple[str, ...] = Field(
        (), description="file stems a glob must not bring in (the validation volume is always left out)"
    )
    plane: Plane = "axial"
    slices: int = Field(
        1, ge=1, le=9, description="neighbouring slices in a crop, cut alike, which the network denoises together"
    )
    clip: tuple[float, float] = Field((-1024.0, 3072.0), description="file values are clipped to this, then mapped")
    file_offset: float = Field(0.0, description="network value = (file value - file_offset) / file_scale")
    file_scale: float = Field(1000.0, gt=0)
    percentile: float | None = Field(
        None, gt=50, le=100, description="each volume is divided by this percentile of its values, not by file_scale"
    )
    mean_above: float | None = Field(
        None,
        ge=0,
        lt=1,
        description="each volume is divided by the mean of its voxels above this share of its maximum (activity)",
    )
    lesions: LesionConfig = LesionConfig()
    floor: float = Field(
        0.0, ge=0, description="network units: a magnitude m becomes sqrt(max(0, m^2 - floor^2)), which empties air"
    )
    background: float = Field(-1024.0, description="file value outside the image (air)")
    spacing_mm: tuple[float, float] = Field((0.8, 2.2), description="in-plane spacings the network is shown")
    native_share: float = Field(
        0.5, ge=0, le=1, description="share of crops on the voxel grid itself: no interpolation"
    )
    zoom: tuple[float, float] = Field(
        (0.75, 1.4), description="range of spacing change of the other crops, times native"
    )
    rotate_deg: float = Field(12.0, ge=0, le=180)
    flip_rows: float = Field(
        0.25, ge=0, le=1, description="share of crops turned upside down; columns are flipped in half"
    )
    gain_jitter: float = Field(0.03, ge=0, lt=1)
    offset_jitter: float = Field(0.01, ge=0, description="network units")
    least_mean: float = Field(0.2, description="a crop whose mean is no further above the background is drawn again")
    quarter_turns: float = Field(0.0, ge=0, le=1, description="share of crops transposed (with the flips: all 8 poses)")
    gain: tuple[float, float] = Field((1.0, 1.0), description="brightness of a crop, log-uniform")
    gamma: tuple[float, float] = Field((1.0, 1.0), description="contrast of a crop: a magnitude m becomes m^gamma")
    shading: float = Field(
        1.0, ge=1, description="a smooth field, as receive coils leave it, brightens and darkens by up to this ratio"
    )
    complex: bool = Field(
        False, description="twice the channels: the real parts, then the imaginary ones, under a random phase"
    )
    phase: PhaseConfig = PhaseConfig()
    channels: int = Field(1, ge=1, le=8, description="real values of a voxel, such as echoes or contrasts")
    positions: bool = Field(False, description="the network is shown where in its slice a crop lies, for patch priors")
    condition: ConditionConfig | None = Field(None, description="for a conditional prior: the image beside the state")

    @model_validator(mode="after")
    def _paired(self) -> DataConfig:
        for source in self.sources:
            if (source.condition is None) != (self.condition is None):
                raise ValueError(
                    f"sources: {source.path!r} {'lacks' if source.condition is None else 'has'} a condition; "
                    "a conditional prior has data.condition and a condition in every source, all others neither"
                )
        return self

    @model_validator(mode="after")
    def _ordered(self) -> DataConfig:
        for name in ("clip", "spacing_mm", "zoom"):
            low, high = getattr(self, name)
            if not low < high:
                raise ValueError(f"{name} must be [low, high] with low < high, got [{low}, {high}]")
        for name in ("gain", "gamma"):
            low, high = getattr(self, name)
            if not 0 < low <= high:
                raise ValueError(f"{name} must be [low, high] with 0 < low <= high, got [{low}, {high}]")
        if self.channels > 1 and (self.slices > 1 or self.complex or self.condition is not None):
            raise ValueError("channels above 1 go with single real slices: leave out slices, complex and condition")
        if self.percentile is not None and self.mean_above is not None:
            raise ValueError("give percentile or mean_above, not both")
        low, high = self.lesions.radius_px
        if not (0 < low <= high and 0 < self.lesions.hot[0] <= self.lesions.hot[1]):
            raise ValueError("lesions: radius_px and hot must be [low, high] with 0 < low <= high")
        if self.lesions.share > 0 and (self.background != 0 or self.file_offset != 0 or self.clip[0] < 0):
            raise ValueError("lesions need activity: set background and file_offset to 0 and clip from 0")
        magnitudes = self.floor > 0 or self.gamma != (1.0, 1.0) or self.complex
        if magnitudes and (self.background != 0 or self.file_offset != 0 or self.clip[0] < 0):
            raise ValueError(
                "complex, floor and gamma need magnitudes: set background and file_offset to 0 and clip from 0"
            )
        return self


class CardConfig(_Strict):
    """What the model card says that the run cannot know by itself."""

    name: str = "prior"
    offset: float = Field(0.0, description="user units: network value = (user value - offset) / scale")
    scale: float = Field(1.0, gt=0, description="user units per network unit")
    unit: str = "a.u."
    statement: str = ""
    licence: str = ""
    attribution: tuple[str, ...] = ()


class TrainConfig(_Strict):
    """A whole run. Either `steps` (resumes to the bit) or `budget_minutes` (schedule follows the clock)."""

    out: str = Field(description="folder for checkpoints, validation curve and the finished prior")
    seed: int = 0
    init: str | None = Field(
        None, description="prior folder whose tensors are taken where names and shapes agree; the rest starts anew"
    )
    network: UNetConfig = UNetConfig()
    data: DataConfig
    card: CardConfig = CardConfig()
    crops: tuple[CropConfig, ...] = (CropConfig(),)
    steps: int | None = Field(None, ge=1)
    budget_minutes: float | None = Field(None, gt=0)
    objective: Literal["edm", "eps", "v", "flow"] = Field("edm", description="what the network learns to answer")
    path: Literal["vp", "vp_continuous"] = Field("vp", description="noise path of eps and v; edm and flow have theirs")
    schedule: dict[str, float | str] = Field(default_factory=dict, description="of the path, such as schedule: cosine")
    sigma_data: float = Field(0.5, gt=0, description="network units")
    log_sigma_mean: float = Field(-2.0, description="of edm; the others spread their times evenly over the path")
    log_sigma_std: float = Field(1.5, gt=0)
    sigma_range: tuple[float, float] = Field((0.003, 4.0), description="network units; less where the path has less")
    learning_rate: float = Field(6e-4, gt=0)
    decay_share: float = Field(0.4, gt=0, le=1, description="last share of the run, in which the rate falls to 0")
    warmup_steps: int = Field(200, ge=0)
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = Field(0.0, ge=0)
    clip_norm: float = Field(1.0, gt=0)
    ema_halflife_images: float = Field(8000.0, gt=0)
    ema_ramp: float = Field(0.05, gt=0, description="half-life is at most this share of the images seen so far")
    compile: bool = Field(False, description="torch.compile: minutes at the start, faster steps on a GPU")
    bfloat16: bool = Field(True, description="convolutions in bfloat16 where the device is fast at it")
    device: str = "cpu"
    workers: int = Field(
        2,
        ge=1,
        description="CPU: shares of a batch computed side by side, one thread each; GPU: threads that cut crops",
    )
    save_every_s: float = Field(120.0, gt=0)
    save_every_steps: int | None = Field(None, ge=1, description="checkpoint by step count instead of by the clock")
    validate_every_s: float = Field(600.0, gt=0)
    validate_every_steps: int | None = Field(None, ge=1)
    validation_sigmas: tuple[float, ...] = (0.02, 0.05, 0.1, 0.3, 1.0)
    validation_slices: int = Field(6, ge=1)
    patience: int | None = Field(
        None, ge=1, description="stop after so many validations without a lower held-out loss, and keep the best prior"
    )
    samples: int = Field(4, ge=0, description="images drawn from the prior at every validation")
    sample_levels: int = Field(24, ge=2, description="noise levels on their way")

    @model_validator(mode="after")
    def _one_end(self) -> TrainConfig:
        if (self.steps is None) == (self.budget_minutes is None):
            raise ValueError("give exactly one of steps and budget_minutes")
        if not 0 < self.sigma_range[0] < self.sigma_range[1]:
            raise ValueError(f"sigma_range must be [low, high] with 0 < low < high, got {list(self.sigma_range)}")
        if self.schedule and self.objective in ("edm", "flow"):
            raise ValueError(f"schedule belongs to the objectives eps and v, got objective {self.objective!r}")
        noise_path(self.path_name, self.schedule)
        wanted = self.data.slices * self.data.channels * (2 if self.data.complex else 1)
        seen = wanted + self.beside_channels
        if (self.network.in_channels, self.network.out_channels) != (seen, wanted):
            must = f"in_channels and out_channels must be {wanted}"
            if self.beside_channels:
                parts = f"{self.cond_channels} for the condition" if self.cond_channels else ""
                parts += (
                    ", " * (self.cond_channels > 0 and self.data.positions) + "2 for positions" * self.data.positions
                )
                must = f"in_channels must be {seen} ({parts}) and out_channels {wanted}"
            raise ValueError(
                f"network: {must} where data.complex is {self.data.complex} and data.slices is {self.data.slices}, "
                f"got {self.network.in_channels} and {self.network.out_channels}"
            )
        for crop in self.crops:
            if crop.size % self.network.multiple:
                raise ValueError(f"crops: size must be a multiple of {self.network.multiple}, got {crop.size}")
        return self

    @property
    def cond_channels(self) -> int:
        """Channels of the condition that join the state's at the network's input."""
        return 0 if self.data.condition is None else self.data.slices

    @property
    def beside_channels(self) -> int:
        """All channels that join the state's: the condition's, then those of the positions."""
        return self.cond_channels + 2 * self.data.positions

    @property
    def path_name(self) -> Literal["edm", "flow", "vp", "vp_continuous"]:
        """The noise path by the name that a model card gives it."""
        return self.objective if self.objective in ("edm", "flow") else self.path

    @classmethod
    def load(cls, path: str | Path) -> TrainConfig:
        """Read a YAML file; relative `data.root` and `out` are taken from the working directory."""
        import yaml

        text = Path(path).read_text(encoding="utf-8")
        raw: Any = yaml.safe_load(text)
        if not isinstance(raw, dict):
            raise ValueError(f"train config {path}: expected a mapping of fields, got {type(raw).__name__}")
        return cls.model_validate(raw)

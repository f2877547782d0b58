"""The job file: what to reconstruct from what, how, and on which machine, checked before anything is read.

YAML, every key known (a misspelt one is an error), units in the names. A job on disk, the same job with `--set
section.key=value` on top, and the resolved copy beside a result are all this one model.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, Strict, ValidationError, model_validator

_MAX_BYTES = 1 << 20
Model = TypeVar("Model", bound=BaseModel)


class ConfigError(ValueError):
    """A job file or an override is wrong; one sentence names the key, what was given and what is allowed."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, validate_default=True, allow_inf_nan=False)


# YAML gives lists; strict mode would ask for tuples
Shape = Annotated[
    tuple[
        Annotated[int, Field(ge=1), Strict()],
        Annotated[int, Field(ge=1), Strict()],
        Annotated[int, Field(ge=1), Strict()],
    ],
    Strict(False),
]
Lengths = Annotated[
    tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]], Strict(False)
]
Widths = Annotated[
    tuple[Annotated[float, Field(ge=0)], Annotated[float, Field(ge=0)], Annotated[float, Field(ge=0)]], Strict(False)
]
Interval = Annotated[tuple[Annotated[int, Field(ge=0), Strict()], Annotated[int, Field(ge=0), Strict()]], Strict(False)]


class UndersampleConfig(_Section):
    """Leave out samples of a Cartesian scan, to see what fewer would have given."""

    kind: Literal["equispaced", "random", "poisson_disc"] = Field(
        "equispaced", description="lines at equal distances, lines at random, or points with a distance in both axes"
    )
    acceleration: float = Field(4.0, gt=1, description="all points over those kept")
    centre_fraction: float = Field(0.08, ge=0, le=1, description="part of the lines that is kept around the centre")
    calibration: int = Field(24, ge=0, description="poisson_disc: side of the square that is kept in the centre")
    along: Literal["x", "y"] = Field("x", description="lines: axis that loses samples, the phase encoding's")
    seed: int = Field(0, ge=0, lt=1 << 63)


class InputConfig(_Section):
    """The measurement, which part of it is used, and what its file does not say; a value given here wins."""

    path: str = Field("", description="line integrals, k-space or counts; the content tells the format")
    # line integrals
    views: int | None = Field(None, ge=1, description="CT: keep this many views, evenly spread; null keeps all")
    rows: Interval | None = Field(None, description="CT: keep slices [first, end); null keeps all")
    type: Literal["parallel", "fan"] | None = None
    angle_sign: Literal[-1, 1] | None = Field(None, description="CT: sense of rotation")
    detector_spacing_mm: float | None = Field(None, gt=0)
    detector_offset_mm: float | None = Field(None, description="CT: detector coordinate of the row's middle")
    rotation_centre: float | Literal["estimate"] | None = Field(
        None, description="CT: detector cell of the rotation axis, from 0; estimate finds it"
    )
    source_to_axis_mm: float | None = Field(None, gt=0)
    source_to_detector_mm: float | None = Field(None, gt=0)
    photons: float | None = Field(None, gt=0, description="CT: mean count of a ray that meets no object")
    unit: Literal["line integrals", "transmission"] | None = None
    smallest_transmission: float | None = Field(
        None, gt=0, lt=1, description="CT: floor before the logarithm, 1e-4 unless given"
    )
    # k-space
    slices: Interval | None = Field(None, description="MRI, image: keep slices [first, end); null keeps all")
    contrast: int | None = Field(None, ge=0, description="MRI: which of several, from 0; null takes the first")
    repetition: int | None = Field(None, ge=0, description="MRI: which of several, from 0")
    phase: int | None = Field(None, ge=0, description="MRI: which of several, from 0")
    set: int | None = Field(None, ge=0, description="MRI: which of several, from 0")
    average: int | None = Field(None, ge=0, description="MRI: which of several, from 0; null takes their mean")
    frames: list[int] | None = Field(None, min_length=1, description="MRI: frames of a series, each as a slice")
    merge_frames: bool | None = Field(None, description="MRI: one slice from the samples of all chosen frames")
    crop_readout: bool | None = Field(None, description="MRI: cut an oversampled readout to the image")
    matrix: list[int] | None = Field(
        None, min_length=2, max_length=3, description="MRI: image size (y, x) or (z, y, x)"
    )
    pixel_mm: list[float] | None = Field(None, min_length=2, max_length=2, description="MRI: pixel size (y, x)")
    slice_spacing_mm: float | None = Field(None, gt=0, description="MRI: distance of slices")
    trajectory: str | None = Field(None, description="MRI: file of the trajectory that belongs to the measurement")
    trajectory_unit: Literal["rad", "cycles", "index"] | None = Field(
        None, description="MRI: rad or cycles per pixel, or index; null goes by the file, else by the range"
    )
    trajectory_order: Literal["xy", "yx"] | None = Field(None, description="MRI: order of a point's coordinates")
    spokes: int | None = Field(None, ge=1, description="MRI: keep the first so many readouts of a trajectory")
    undersample: UndersampleConfig | None = Field(None, description="MRI: leave out samples of a Cartesian scan")
    coils: int | None = Field(None, ge=1, description="MRI: compress to so many virtual coils; null keeps all")
    maps: Literal["file", "espirit"] | None = Field(
        None, description="MRI: coil maps; null takes the file's where it has some, else makes them by ESPIRiT"
    )
    calibration: int | None = Field(None, ge=8, description="MRI: width of the centre for ESPIRiT, 24 unless given")
    # counts
    precorrected: bool | None = Field(
        None, description="PET: prompts may be negative or fractional, because something was subtracted from them"
    )
    span: int | None = Field(None, ge=1, description="PET: ring differences that a segment of list mode adds up")
    max_ring_difference: int | None = Field(None, ge=0, description="PET: largest one taken from list mode")
    mashing: int | None = Field(None, ge=1, description="PET: views of list mode that are added up")
    seconds: Annotated[tuple[float, float], Strict(False)] | None = Field(
        None, description="PET: first and last second of list mode to take; null takes all"
    )
    mu_unit: Literal["1/mm", "1/cm", "hu"] | None = Field(
        None, description="PET: of an attenuation map that does not state it"
    )
    multiplicative: str | None = Field(
        None, description="PET: sinogram of factors, attenuation and normalisation together; wins over what is beside"
    )
    additive: str | None = Field(None, description="PET: sinogram of expected randoms and scatter, in counts")
    attenuation: str | None = Field(None, description="PET: attenuation map, NIfTI or Interfile; put on the grid")
    normalisation: str | None = Field(
        None, description="PET: sinogram of factors without attenuation, or fansum to estimate it from the counts"
    )
    randoms: Literal["delayed", "none"] | None = Field(
        None, description="PET: from delayed coincidences where no additive term is given, unless none"
    )
    counts_per_unit: float | None = Field(
        None, gt=0, description="PET: counts of a bin with factor 1 for 1 Bq/mL along 1 mm; calibrates the image"
    )
    psf_fwhm_mm: float | None = Field(None, gt=0, description="PET: resolution of the scanner in the image")
    weight_kg: float | None = Field(None, gt=0, description="PET: of the patient, for SUV")
    injected_bq: float | None = Field(None, gt=0, description="PET: activity at injection, for SUV")
    injection_to_scan_s: float | None = Field(None, description="PET: for SUV")
    half_life_s: float | None = Field(None, gt=0, description="PET: of the isotope, for SUV")
    # images
    operator: Literal["none", "identity", "sr", "blur"] | None = Field(
        None,
        description="image: what it lacks. identity: it is noisy; sr: it is coarse; blur: it is blurred; none: nothing "
        "was measured, the image is the condition of the prior",
    )
    image_unit: Literal["hu", "per_mm", "au"] | None = Field(
        None, description="image: its unit, where the file does not state it; au is arbitrary, such as MR"
    )
    factor: int | None = Field(None, ge=1, le=64, description="image, sr: fine pixels along the side of a coarse one")
    factor_z: int | None = Field(None, ge=1, le=64, description="image, sr: thin slices in a thick one")
    blur_mm: Widths | None = Field(
        None, description="image, blur: full width at half maximum along z, y, x; of a uniform blur the width"
    )
    blur_kind: Literal["gaussian", "uniform"] | None = Field(None, description="image, blur: gaussian unless given")
    guide: str | None = Field(
        None, description="PET: NIfTI of an aligned MR or CT image, for a prior that takes a condition"
    )

    def options(self, modality: str) -> dict[str, Any]:
        """What the readers of a modality are told: everything given that they know."""
        own = _READER_KEYS[modality]
        return {k: v for k, v in self.model_dump().items() if k in own and v is not None}

    def foreign(self, modality: str) -> list[str]:
        """Keys that are given and belong to another modality."""
        others = set().union(*_KEYS.values()) - _KEYS[modality]
        return [name for name, value in self if name in others and value is not None]


_READER_KEYS = {
    "ct": {
        "rows", "type", "angle_sign", "detector_spacing_mm", "detector_offset_mm", "rotation_centre",
        "source_to_axis_mm", "source_to_detector_mm", "photons", "unit", "smallest_transmission",
    },
    "mri": {
        "slices", "contrast", "repetition", "phase", "set", "average", "frames", "merge_frames", "crop_readout",
        "matrix", "pixel_mm", "slice_spacing_mm", "trajectory", "trajectory_unit", "trajectory_order",
    },
    "pet": {"precorrected", "span", "max_ring_difference", "mashing", "seconds", "mu_unit"},
}  # fmt: skip
_KEYS = {
    "ct": _READER_KEYS["ct"] | {"views"},
    "mri": _READER_KEYS["mri"] | {"spokes", "undersample", "coils", "maps", "calibration"},
    "pet": _READER_KEYS["pet"]
    | {
        "multiplicative", "additive", "attenuation", "normalisation", "randoms", "counts_per_unit", "psf_fwhm_mm",
        "weight_kg", "injected_bq", "injection_to_scan_s", "half_life_s", "guide",
    },
    "image": {"slices", "operator", "image_unit", "factor", "factor_z", "blur_mm", "blur_kind"},
}  # fmt: skip


class GridConfig(_Section):
    """The volume of a CT or PET scan; null takes what the file says, else the size of a detector's cell at the axis."""

    shape: Shape | None = Field(None, description="voxels along z, y, x")
    spacing_mm: Lengths | None = Field(None, description="voxel size along z, y, x")


class NoiseConfig(_Section):
    """How the measurement scatters; it sets the weights of the data term."""

    kind: Literal["auto", "none", "gaussian", "poisson"] = Field(
        "auto",
        description="auto takes what the file says (weights, photons, noise covariance), or a spread read off the data",
    )
    sigma: float | None = Field(
        None,
        gt=0,
        description="gaussian: standard deviation of a line integral, of either part of a k-space sample, or of an "
        "image's voxel in its unit",
    )
    photons: float | None = Field(None, gt=0, description="poisson: mean count of a ray that meets no object")

    @model_validator(mode="after")
    def _complete(self) -> NoiseConfig:
        for kind, name in (("gaussian", "sigma"), ("poisson", "photons")):
            if self.kind == kind and getattr(self, name) is None:
                raise ValueError(f"kind {kind} needs {name}")
            if self.kind != kind and getattr(self, name) is not None:
                raise ValueError(f"{name} belongs to kind {kind}, got kind {self.kind}")
        return self


class ComputeConfig(_Section):
    """The machine; nothing here changes the result but by the rounding of a compiled network or a GPU's batches."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    batch_size: int | None = Field(None, ge=1, description="slices the prior works on at once; null: what fits a GPU")
    workers: int | None = Field(None, ge=1, description="CPU threads; null takes the cores at hand")
    compile: Literal["auto", "on", "off"] = Field(
        "auto", description="compile the network before the first slice, which takes a minute or more; auto: on a GPU"
    )
    memory_budget_gib: float | None = Field(None, gt=0, description="refuse above it; null takes what is free")


class CheckpointConfig(_Section):
    """When the state is saved: at the first level boundary that meets either condition."""

    every_levels: int = Field(5, ge=1)
    every_seconds: float = Field(20.0, ge=0)


class OutputConfig(_Section):
    """What is written."""

    unit: Literal["hu", "per_mm", "bq_per_ml", "suv"] | None = Field(
        None, description="CT: HU unless given, or attenuation in 1/mm; PET: Bq/mL unless given, or SUV by body weight"
    )
    mu_water_per_mm: float | None = Field(
        None, gt=0, description="CT: attenuation of water for HU, 0.0193 unless given"
    )
    preview: bool = Field(True, description="write preview.png, with the scanner's direct image beside")
    samples: bool = Field(
        False,
        description="of several samples, write each one too; from 19 on intervals are then their order statistics",
    )


class JobConfig(_Section):
    """A whole job."""

    input: InputConfig = InputConfig()
    grid: GridConfig = GridConfig()
    noise: NoiseConfig = NoiseConfig()
    projector: Literal["joseph", "shear"] = "joseph"
    recipe: str | dict[str, Any] | None = Field(
        None,
        description="a packaged recipe, a YAML file, or the recipe itself (with a key `like`: changes to that recipe); "
        "null takes ct, mri or pet by the measurement",
    )
    prior: str | None = Field(
        None,
        description="a packaged prior or a folder with card.json and model.safetensors; null takes ct, mr or pet by "
        "the measurement",
    )
    priors: dict[Literal["axial", "coronal", "sagittal"], str] = Field(
        default_factory=dict,
        description="priors for some planes of a recipe that shows them in turn; `prior` is for the others",
    )
    tile: int | None = Field(
        None,
        ge=64,
        description="largest side in pixels of what the prior is shown at once, for slices too large for the memory; "
        "null shows it whole slices",
    )
    accept_mismatch: bool = Field(
        False, description="use the prior on spacings and noise levels it was not trained on, with a warning"
    )
    seed: int = Field(0, ge=0, lt=1 << 63)
    samples: int = Field(
        1, ge=1, le=10_000, description="runs with other random numbers; of several, the mean and its uncertainty"
    )
    compute: ComputeConfig = ComputeConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    output: OutputConfig = OutputConfig()

    def meaning(self) -> dict[str, Any]:
        """What every sample of the result depends on: all but the machine, the checkpoints and the input's place."""
        full = self.model_dump(mode="json")
        for name in ("compute", "checkpoint", "samples"):
            full.pop(name)
        full["input"].pop("path")
        return full


def load_config(
    path: str | Path | None = None,
    overrides: Iterable[str] = (),
    values: Mapping[str, Any] | None = None,
) -> JobConfig:
    """Read a job.

    Args:
        path: YAML file; None starts from the defaults.
        overrides: "section.key=value" strings, value in YAML; later ones win.
        values: dotted keys to values, set before the overrides (the command line's own options).

    Raises:
        ConfigError: the file cannot be read, a key is unknown or a value is not allowed.
    """
    source = "command line" if path is None else str(path)
    raw = {} if path is None else read_yaml(Path(path))
    for key, value in (values or {}).items():
        _assign(raw, key, value)
    for text in overrides:
        key, sign, value = text.partition("=")
        if not sign or not all(key.split(".")):
            raise ConfigError(f"--set {text}: expected section.key=value")
        _assign(raw, key, parse_yaml(value, f"--set {text}"))
    return validate(JobConfig, raw, source)


def validate(model: type[Model], raw: Any, source: str) -> Model:
    """Check plain data against a pydantic model, with one sentence naming the first wrong key.

    Raises:
        ConfigError: a key is unknown or a value is not allowed.
    """
    try:
        return model.model_validate(raw)
    except ValidationError as error:
        raise ConfigError(f"{source}: {_sentence(error, model)}") from None


def save_config(config: BaseModel) -> str:
    """The config as YAML text, every default written out."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file holding one mapping.

    Raises:
        ConfigError: it is missing, larger than 1 MiB, not YAML, or not a mapping.
    """
    try:
        size = path.stat().st_size
        if not path.is_file():
            raise ConfigError(f"{path}: is not a file; give a YAML file")
        if size > _MAX_BYTES:
            raise ConfigError(f"{path}: {size} bytes is too large for a configuration file, at most {_MAX_BYTES}")
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise ConfigError(f"{path}: cannot be read ({reason})") from None
    raw = parse_yaml(text, str(path))
    if raw is None:
        return {}
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: expected keys and values, got a {type(raw).__name__}")
    return raw


def parse_yaml(text: str, source: str) -> Any:
    """YAML text as plain data; no tags, no anchors.

    Raises:
        ConfigError: the text is not such YAML.
    """
    try:
        return yaml.load(text, _Loader)  # a SafeLoader
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}" if mark else ""
        problem = " ".join(str(getattr(error, "problem", None) or error).split())
        raise ConfigError(f"{source}: not valid YAML{where} ({problem})") from None
    except (RecursionError, ValueError) as error:
        raise ConfigError(f"{source}: not valid YAML ({type(error).__name__})") from None


class _Loader(yaml.SafeLoader):
    """Plain data only: no anchors (a page of them can stand for gigabytes), no repeated keys, 1e-3 is a number."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            raise yaml.constructor.ConstructorError(None, None, "anchors are not allowed", event.start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key must be plain text", key.start_mark)
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key.value!r} twice", key.start_mark)
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def _assign(raw: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    for depth, name in enumerate(parents):
        inner = raw.setdefault(name, {})
        if inner is None:  # a section that is null in the file
            inner = raw[name] = {}
        if name == "recipe" and depth == 0 and isinstance(inner, (str, int)):
            inner = raw[name] = _recipe_as_data(inner)
        elif name == "recipe" and depth == 0 and not inner:
            inner = raw[name] = {"like": "auto"}  # the default's, which the measurement decides
        if not isinstance(inner, dict):
            raise ConfigError(f"--set {key}: {'.'.join(parents[: depth + 1])} is a value, it has no keys")
        raw = inner
    raw[last] = value


def _recipe_as_data(name: object) -> dict[str, Any]:
    from recon3d import recipes

    return dict(recipes.load_recipe(str(name)).model_dump(mode="json"))


def _sentence(error: ValidationError, model: type[BaseModel]) -> str:
    problems = error.errors(include_url=False)
    first = problems[0]
    # a union reports every branch; the keys of the path are the fields
    where = ".".join(str(part) for part in first["loc"])
    where = where if len(where) <= 80 else where[:77] + "..."
    given = first.get("input")
    if first["type"] == "extra_forbidden":
        allowed = _keys_at(model, first["loc"][:-1])
        close = difflib.get_close_matches(str(first["loc"][-1]), allowed, 1)
        hint = f"did you mean {close[0]}?" if close else f"allowed are {', '.join(allowed)}"
        text = f"unknown key {where}; {hint}"
    elif first["type"] == "missing":
        text = f"{where} is missing"
    elif first["type"] == "value_error":
        text = f"{where}: {first['ctx']['error']}" if where else str(first["ctx"]["error"])
    else:
        reason = first["msg"][0].lower() + first["msg"][1:]
        text = f"{where}: {reason}, got {_brief(given)}"
    more = len(problems) - 1
    return text + (f" (and {more} more)" if more else "")


def _keys_at(model: type[BaseModel], path: tuple[int | str, ...]) -> list[str]:
    for name in path:
        field = model.model_fields.get(str(name))
        kind = field.annotation if field else None
        inner = next((k for k in (get_args(kind) or (kind,)) if isinstance(k, type) and issubclass(k, BaseModel)), None)
        if inner is None:
            return []
        model = inner
    return list(model.model_fields)


def _brief(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."

"""What a recipe may say, checked key by key."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from recon3d.config import ConfigError, parse_yaml, read_yaml, validate

__all__ = ["Recipe", "load_recipe", "recipe_from", "recipe_names", "recipe_schema"]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False, validate_default=True)


class Provenance(_Section):
    """Where a method comes from."""

    paper: str = Field("", description="authors, title, venue")
    arxiv: str | None = Field(None, pattern=r"^\d{4}\.\d{4,5}$")
    protocol: str = Field("", description="task, views, metric and settings of the published figures")
    differs: str = Field("", description="what the corrected values change, and what is left out of the published ones")


class StartSection(_Section):
    """The first state: an image plus noise of the first level."""

    image: Literal["offset", "pinv", "cg", "osem"] = Field(
        "offset",
        description="the prior's zero (cold), the operator's direct inverse (FBP), conjugate gradients, or for counts "
        "ordered-subsets EM",
    )
    iterations: int = Field(20, ge=1, description="of cg; passes over all counts of osem")
    subsets: int = Field(1, ge=1, description="osem: subsets of the views")


class TrajectorySection(_Section):
    """Noise levels, network units."""

    grid: Literal["karras", "geometric", "vp", "explicit", "sweeps"] = "karras"
    levels: int = Field(20, ge=1, le=100_000, description="noise levels; sweeps: couplings")
    sigma_max: float = Field(2.0, gt=0, description="first level (not for vp and explicit)")
    sigma_min: float = Field(0.02, gt=0, description="last level before zero (not for vp and explicit)")
    rho: float = Field(7.0, gt=0, description="karras and sweeps: larger is denser near sigma_min")
    times: Literal["even", "published"] = Field(
        "even", description="vp: meet both ends, or range(0, 1000, 1000 // levels)"
    )
    beta_max: float = Field(0.02, gt=0, lt=1, description="vp: last of the network's 1000 linear steps from 1e-4")
    last_time: int = Field(0, ge=0, le=998, description="vp: even times end here")
    sigmas: list[float] = Field(default_factory=list, description="explicit: the levels, descending")
    inner: int = Field(8, ge=1, description="sweeps: prior calls per sweep")
    inner_floor: float = Field(0.1, gt=0, lt=1, description="sweeps: lowest level as a fraction of the coupling")
    repeats: int = Field(0, ge=0, description="sweeps: further sweeps at the last coupling")
    correctors: int = Field(0, ge=0, le=100, description="Langevin visits after each level")
    stale_correctors: bool = Field(False, description="correctors ask the prior at the level the step came from")
    data_at: Literal["every", "steps", "corrected"] = Field("every", description="visits at which the data enter")
    polish: float | None = Field(
        None,
        gt=0,
        description="one more visit at this level, network units, without the data: its estimate is the result",
    )
    travel_length: int = Field(10, ge=1, description="time travel: levels of a stretch that is passed again")
    travel_repeats: int = Field(0, ge=0, le=1000, description="time travel: further passes of each stretch; 0 is none")

    @model_validator(mode="after")
    def _sound(self) -> TrajectorySection:
        if self.travel_repeats and (self.correctors or self.polish or self.grid == "sweeps"):
            raise ValueError("travel_repeats goes with plain steps; leave out correctors, polish and sweeps")
        if (self.grid == "explicit") != bool(self.sigmas):
            raise ValueError("sigmas go with grid explicit, and grid explicit needs them")
        if self.grid in ("karras", "geometric", "sweeps") and self.levels > 1 and not self.sigma_min < self.sigma_max:
            raise ValueError(f"sigma_min must be below sigma_max, got {self.sigma_min} and {self.sigma_max}")
        if self.correctors and self.grid == "sweeps":
            raise ValueError("sweeps take no correctors; set correctors to 0")
        lowest = min(self.sigmas) if self.sigmas else self.sigma_min
        if self.polish is not None and (self.grid in ("vp", "sweeps") or self.polish >= lowest):
            raise ValueError(
                f"polish goes with karras, geometric or explicit levels and is below them, got {self.polish}"
            )
        return self


class ConsistencySection(_Section):
    """How the data enter. With a regulariser, krylov and proximal_cg become ADMM."""

    kind: Literal["none", "krylov", "proximal_cg", "projection", "low_pass", "conditional", "em", "gradient"] = Field(
        "proximal_cg",
        description="em: ordered-subsets expectation maximisation for counts; gradient: one step down the misfit; "
        "low_pass: low frequencies of the measured image",
    )
    iterations: int = Field(
        5, ge=1, le=10_000, description="conjugate-gradient iterations, at most; em: subset updates per level"
    )
    tolerance: float = Field(0.0, ge=0, lt=1, description="a slice is solved at this relative residual")
    rho_rule: Literal["relative", "growing", "bayes", "absolute"] = Field(
        "relative",
        description="proximal_cg: rho ||A^T W A||; that times (sigma_ref/sigma)^2; rho/r^2 with 1/r^2 = 1/sigma^2 + "
        "1/prior_std^2 (weights must be inverse variances; counts know theirs); or rho itself. em: relative to "
        "the mean of A^T 1 over the network unit; absolute in network units",
    )
    rho: float = Field(0.01, ge=0, description="proximal_cg, em: weight of the prior's estimate")
    sigma_ref: float = Field(1.0, gt=0, description="growing: level at which rho is relative, network units")
    prior_std: float | None = Field(None, gt=0, description="bayes: spread of the prior's pixels, network units")
    weights: Literal["noise", "none"] = Field("noise", description="inverse variances of the noise model, or 1")
    scalars: Literal["auto", "slice", "volume"] = Field("auto", description="step lengths per slice or for the volume")
    relax: float = Field(1.0, gt=0, lt=2, description="projection: step")
    noise: Literal["ignored", "scaled"] = Field(
        "ignored",
        description="projection: data are exact, or each singular component enters as far as its noise allows (images)",
    )
    factor: int = Field(4, ge=2, le=64, description="low_pass: frequencies below those of pixels so many times larger")
    on: Literal["estimate", "iterate"] = Field("estimate", description="correct x0, or the noisy state after renoising")
    finish: Literal["none", "sirt"] = Field("none", description="one SIRT step after the last level")
    precondition: Literal["none", "filter"] = Field(
        "none", description="proximal_cg: solve with a tomographic filter, 5 iterations for 20"
    )
    subsets: int = Field(1, ge=1, description="em, gradient of counts: subsets of the views, one per update in turn")
    form: Literal["surrogate", "gradient"] = Field(
        "surrogate",
        description="em: the maximum of a separable surrogate, which no weight makes diverge, or a preconditioned "
        "gradient step (published)",
    )
    begin: Literal["estimate", "previous"] = Field(
        "estimate", description="em: a level's first image, the prior's estimate or the result of the level before"
    )
    target: Literal["iterations", "likelihood"] = Field(
        "iterations",
        description="em: updates of a level; or groups of so many until the likelihood is that of plain EM at the same "
        "part of its way",
    )
    passes: int = Field(10, ge=1, description="em, target likelihood: passes over all counts of the plain EM")
    strength: float = Field(1.0, gt=0, description="gradient: step length, see step")
    through: Literal["prior", "state"] = Field(
        "prior", description="gradient: at the estimate and back through the prior, or at the noisy state"
    )
    step: Literal["curvature", "variance", "objective", "norm"] = Field(
        "curvature",
        description="gradient: strength times sigma^2 over 1 + sigma^2 curvature, times the level's loss of variance, "
        "over the misfit (published for counts), or over a slice's root of the misfit (published for images)",
    )


class RegulariserSection(_Section):
    """How slices are tied together."""

    kind: Literal["none", "tvz", "rdp"] = Field(
        "none", description="total variation along z, or the relative difference prior (consistency em)"
    )
    threshold: float = Field(0.004, ge=0, description="tvz: jump between slices that is shrunk away, network units")
    rho: float = Field(0.025, gt=0, description="tvz: rho_z / ||A^T W A||")
    reference_mm: float | None = Field(
        None, gt=0, description="tvz: threshold is per this distance; null: per slice, whatever the spacing"
    )
    boundary: Literal["neumann", "periodic"] = Field("neumann", description="periodic joins the last to the first")
    strength: float = Field(0.1, ge=0, description="rdp: weight, in the unit of rule")
    rule: Literal["relative", "absolute", "noise"] = Field(
        "relative",
        description="rdp: strength is of the mean of A^T 1, of the log-likelihood in network units, or between them "
        "(noise): of the mean of A^T 1 over N^0.7, N the counts of a voxel",
    )
    gamma: float = Field(2.0, ge=0, description="rdp: larger keeps edges; at least 1 with form surrogate")
    epsilon: float = Field(1e-3, gt=0, description="rdp: sums of activities below count as this, network units")
    axes: Literal["z", "zyx"] = Field("z", description="rdp: neighbours along z, or along all three axes")


Plane = Literal["axial", "coronal", "sagittal"]


class PlanesSection(_Section):
    """Which slices the prior sees; groups of neighbours where its card says so."""

    kind: Literal["axial", "coronal", "sagittal", "in_turn", "averaged"] = Field(
        "axial",
        description="in_turn: one plane per level, see order; averaged: all three at every level, a voxel's estimate "
        "their mean. All but axial are for voxels about as long as wide",
    )
    order: list[Plane] = Field(
        ["axial", "coronal", "axial", "sagittal"], min_length=1, description="in_turn: planes of the levels, repeated"
    )
    second_every: float | None = Field(
        None,
        gt=1,
        description="in_turn with an order of two: the second plane at the last of so many levels, for a fraction at "
        "random; null takes turns",
    )
    overlap: bool = Field(
        False,
        description="a prior of groups sees all of them, a slice's estimate the mean of its places in them, at so many "
        "times the cost; else groups lie side by side, elsewhere at every level",
    )

    @model_validator(mode="after")
    def _sound(self) -> PlanesSection:
        if self.second_every is not None and (self.kind != "in_turn" or len(self.order) != 2):
            raise ValueError("second_every goes with kind in_turn and an order of two planes")
        return self

    @property
    def seen(self) -> tuple[Plane, ...]:
        """The planes that the prior sees slices of, each once."""
        if self.kind == "in_turn":
            return tuple(dict.fromkeys(self.order))
        return ("axial", "coronal", "sagittal") if self.kind == "averaged" else (self.kind,)


class RenoiseSection(_Section):
    """How to go to the next level."""

    kind: Literal["ddim", "ancestral", "em", "full", "heun", "rk45"] = Field(
        "ddim",
        description="ddim: eta 0 is the probability-flow ODE by Euler steps; ancestral: DDPM; em: Euler-Maruyama of "
        "the reverse diffusion; full: all noise afresh; heun: the ODE at second order, two prior calls a level; rk45: "
        "the ODE with steps found from rtol and atol, between the ends of the grid",
    )
    eta: float = Field(0.0, ge=0, le=1, description="ddim: fresh noise; its meaning is the convention's")
    convention: Literal["canonical", "dds"] = Field("canonical", description="ddim: meaning of eta")
    variance: Literal["small", "large", "prior"] = Field("small", description="ancestral: variance a step adds")
    prior_std: float | None = Field(
        None, gt=0, description="ancestral prior, full: spread of pixels, network units; ancestral: 1 is DDPM's beta_t"
    )
    clock: Literal["ve", "vp"] = Field("ve", description="em: times in which the diffusion is even")
    rtol: float = Field(1e-2, ge=0, lt=1, description="rk45: error of a step over the root mean square of the state")
    atol: float = Field(1e-2, ge=0, description="rk45: error of a step allowed besides, network units")
    amount: float = Field(
        1.0, gt=0, le=1, description="full: fresh noise over sigma; below 1 the estimate's own error counts as noise"
    )
    direction: Literal["network", "corrected"] = Field("network", description="estimate that tells the old noise")
    snr: float = Field(0.16, gt=0, description="correctors: signal-to-noise ratio")
    norms: Literal["slice", "part", "expected", "volume"] = Field(
        "slice",
        description="correctors: step length from norms per slice, per real and imaginary part of a slice, from sigma "
        "alone, or from mean norms",
    )

    @model_validator(mode="after")
    def _sound(self) -> RenoiseSection:
        if self.kind == "ancestral" and (self.variance == "prior") != (self.prior_std is not None):
            raise ValueError("prior_std goes with variance prior, and variance prior needs it")
        if not self.rtol + self.atol > 0:
            raise ValueError("rtol and atol cannot both be 0")
        return self


class NoiseSection(_Section):
    """Where randomness comes from."""

    kind: Literal["independent", "iscs", "iscs_mm"] = "independent"
    correlation_mm: float = Field(8.0, ge=0, description="iscs_mm: distance of half correlation")
    start: Literal["same", "independent"] = Field("same", description="noise of the first state")
    angle: Literal["expected", "drawn"] = Field(
        "expected", description="iscs: between the anchors, pi/2 or as drawn (published; differs by 1/sqrt(pixels))"
    )


class Recipe(_Section):
    """One choice per part of the loop."""

    name: str = Field("custom", pattern=r"^[a-z][a-z0-9_]*$")
    title: str = ""
    claims: Literal["estimate", "posterior_sample"] = Field(
        "estimate",
        description="what a result is: a point estimate, or a draw from the posterior in the limit of its settings",
    )
    provenance: Provenance = Provenance()
    compat: Literal["corrected", "published"] = "corrected"
    start: StartSection = StartSection()
    trajectory: TrajectorySection = TrajectorySection()
    consistency: ConsistencySection = ConsistencySection()
    regulariser: RegulariserSection = RegulariserSection()
    planes: PlanesSection = PlanesSection()
    renoise: RenoiseSection = RenoiseSection()
    noise: NoiseSection = NoiseSection()
    published: dict[str, Any] = Field(
        default_factory=dict, description="section.key: value, put in when compat is published"
    )

    @model_validator(mode="after")
    def _sound(self) -> Recipe:
        for key in self.published:
            section, _, name = key.partition(".")
            if section not in _PARTS or name not in _PARTS[section].model_fields:
                raise ValueError(f"published: unknown key {key}; write section.key of this recipe")
        if (self.consistency.kind == "conditional") != (self.trajectory.grid == "sweeps"):
            raise ValueError("consistency conditional and trajectory sweeps belong together")
        if self.regulariser.kind == "tvz" and self.consistency.kind not in ("krylov", "proximal_cg"):
            raise ValueError(f"regulariser tvz needs consistency krylov or proximal_cg, got {self.consistency.kind}")
        if self.regulariser.kind == "rdp" and self.consistency.kind != "em":
            raise ValueError(f"regulariser rdp needs consistency em, got {self.consistency.kind}")
        if self.consistency.subsets > 1 and self.consistency.kind not in ("em", "gradient"):
            raise ValueError(f"subsets need consistency em or gradient, got {self.consistency.kind}")
        if self.consistency.precondition != "none" and self.consistency.kind != "proximal_cg":
            raise ValueError(f"precondition filter needs consistency proximal_cg, got {self.consistency.kind}")
        self._check_flow()
        if self.trajectory.polish and self.consistency.finish != "none":
            raise ValueError(f"polish ends without the data, got consistency.finish {self.consistency.finish}")
        if self.consistency.noise == "scaled":
            self._check_scaled()
        if self.claims == "posterior_sample" and self.noise.kind != "independent":
            raise ValueError("a posterior sample needs independent noise; noise correlated along z changes the law")
        return self

    def _check_scaled(self) -> None:
        """The shares of data and of fresh noise are worked out together, for steps of one visit."""
        c, kind = self.consistency, self.renoise.kind
        if c.kind != "projection" or c.on != "estimate":
            raise ValueError(f"noise scaled needs consistency projection on the estimate, got {c.kind} on {c.on}")
        if kind in ("heun", "rk45"):
            raise ValueError(f"noise scaled needs renoise ddim, ancestral, em or full, got {kind}")

    def _check_flow(self) -> None:
        """Heun and Runge-Kutta steps join the slopes of several visits, which must be slopes of one thing."""
        kind, c, t = self.renoise.kind, self.consistency, self.trajectory
        if kind not in ("heun", "rk45"):
            return
        if t.grid == "sweeps" or t.travel_repeats or t.correctors or t.data_at == "corrected" or t.polish:
            raise ValueError(f"renoise {kind} takes no sweeps, time travel, correctors, polish or data_at corrected")
        if c.kind != "none" and c.on == "iterate":
            raise ValueError(f"renoise {kind} needs consistency on estimate; a changed state leaves the flow")
        if c.kind == "gradient" and c.step != "curvature":
            raise ValueError(
                f"renoise {kind} needs consistency.step curvature; the other steps depend on the level that follows"
            )
        if self.planes.kind == "in_turn":
            raise ValueError(
                f"renoise {kind} needs the same planes at every visit; set planes.kind to axial or averaged"
            )
        if kind == "rk45" and (c.kind == "em" or self.regulariser.kind != "none"):
            raise ValueError("renoise rk45 may take a step again, so it goes without EM and regularisers")

    def resolved(self) -> Recipe:
        """The recipe that runs: with the published values put in where compat asks for them."""
        if self.compat == "corrected" or not self.published:
            return self
        raw = self.model_dump(mode="json")
        for key, value in self.published.items():
            section, _, name = key.partition(".")
            raw[section][name] = value
        raw["published"] = {}
        return validate(Recipe, raw, f"recipe {self.name}")


_PARTS: dict[str, type[BaseModel]] = {
    "start": StartSection,
    "trajectory": TrajectorySection,
    "consistency": ConsistencySection,
    "regulariser": RegulariserSection,
    "renoise": RenoiseSection,
    "noise": NoiseSection,
}


def recipe_names() -> list[str]:
    """The packaged recipes."""
    folder = resources.files("recon3d.recipes")
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def load_recipe(source: str | Path, overrides: dict[str, Any] | None = None) -> Recipe:
    """A packaged recipe by name, or a YAML file.

    Args:
        source: "dds", or a path.
        overrides: dotted keys to values, such as {"consistency.iterations": 3}.

    Raises:
        recon3d.config.ConfigError: no such recipe, an unknown key, or a value that is not allowed.
    """
    text = str(source)
    if text in recipe_names():
        raw = parse_yaml((resources.files("recon3d.recipes") / f"{text}.yaml").read_text("utf-8"), f"recipe {text}")
    elif Path(text).suffix in (".yaml", ".yml"):
        raw = read_yaml(Path(text))
    else:
        raise ConfigError(
            f"recipe {text!r} is not one of {', '.join(recipe_names())}; name one of them or a .yaml file"
        )
    for key, value in (overrides or {}).items():
        *sections, last = key.split(".")
        inner = raw
        for section in sections:
            inner = inner.setdefault(section, {})
            if not isinstance(inner, dict):
                raise ConfigError(f"{key}: {section} is a value, it has no keys")
        inner[last] = value
    return validate(Recipe, raw, f"recipe {text}")


def recipe_from(raw: str | dict[str, Any] | None, default: str) -> Recipe:
    """The recipe that a job file means.

    Args:
        raw: a name or YAML file; a whole recipe; changes to the recipe that the key `like` names, which "auto" leaves
            to the default; None for the default.
        default: the recipe of the measurement's modality.

    Raises:
        recon3d.config.ConfigError: as load_recipe.
    """
    if raw is None:
        return load_recipe(default)
    if isinstance(raw, str):
        return load_recipe(raw)
    if "like" not in raw:
        return validate(Recipe, raw, "recipe")
    base = default if raw["like"] == "auto" else str(raw["like"])
    changes = {key: value for key, value in raw.items() if key != "like"}
    return validate(Recipe, _merged(load_recipe(base).model_dump(mode="json"), changes), f"recipe like {base}")


def _merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    out = dict(base)
    for key, value in changes.items():
        inner = out.get(key)
        if isinstance(inner, dict) and isinstance(value, dict) and key != "published":
            out[key] = _merged(inner, value)
        else:
            out[key] = value
    return out


def recipe_schema() -> dict[str, Any]:
    """The JSON schema of recipe files, for editors and forms."""
    return Recipe.model_json_schema()

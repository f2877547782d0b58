"""Reconstruction from Python: arrays in, volume out; and the same job from a config, in a folder.

result = recon3d.reconstruct(sinogram, geometry, grid, recipe="ct", prior="ct")
result.volume   # [z, y, x], 1/mm

result = recon3d.reconstruct_mri(kspace, mask, recipe="mri", prior="mr")
result.volume   # [z, y, x], complex

result = recon3d.reconstruct_pet(prompts, geometry, factors, additive, recipe="pet", prior="pet")
result.volume   # [z, y, x], Bq/mL

result = recon3d.enhance(image, grid, "sr", factor=4, unit="hu", noise=20.0)
result.volume   # [z, 4 y, 4 x], 1/mm
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import yaml
from numpy.typing import NDArray
from torch import Tensor

from recon3d.config import ComputeConfig, ConfigError, JobConfig, OutputConfig, save_config
from recon3d.engine import plan as planning
from recon3d.engine.events import Events, Listener
from recon3d.engine.executor import Executor, ResourceError
from recon3d.engine.folder import CHECKPOINT, RunFolder, fingerprint, hardware, versions
from recon3d.engine.job import Schedule, Solved, Timings, solve
from recon3d.engine.memory import peak_resident_bytes
from recon3d.engine.montecarlo import Kept, Uncertainty, draw
from recon3d.engine.problem import Problem, load_problem
from recon3d.engine.scan import Scan, choose_device, defaults_of, digest
from recon3d.engine.scan_convert import prepare as prepare_conversion
from recon3d.engine.scan_ct import CTScan
from recon3d.engine.scan_image import Degradation
from recon3d.engine.scan_image import prepare as prepare_image
from recon3d.engine.scan_mri import kspace_of, prepare
from recon3d.engine.scan_pet import prepare as prepare_pet
from recon3d.geometry import GeometryWarning, PETGeometry, ScanGeometry, VolumeGrid
from recon3d.geometry.mri import Trajectory
from recon3d.io.units import MU_WATER_PER_MM
from recon3d.operators.noise import GaussianNoise, NoiseModel
from recon3d.priors.base import Prior
from recon3d.real_view import real_view
from recon3d.recipes import Recipe, load_recipe, recipe_from

__all__ = [
    "Problem", "Result", "convert_modality", "enhance", "plan_job", "reconstruct", "reconstruct_mri", "reconstruct_pet",
    "run_job",
]  # fmt: skip


@dataclass(frozen=True)
class Result:
    """A reconstruction.

    Attributes:
        volume: [z, y, x] on the CPU: attenuation in 1/mm for CT, complex in the scanner's unit for MRI, activity
            in Bq/mL for PET, in 1/mm for images in HU and else in the image's unit.
        grid: its grid.
        timings: where the time went, over all attempts.
        peak_memory_bytes: most resident memory of this process.
        attempts: processes that worked on it.
        metrics: how well the volume explains the measurement.
        folder: where it was written; None without one.
        uncertainty: spread and interval of several samples, whose mean the volume then is; None for one.
    """

    volume: Tensor
    grid: VolumeGrid
    timings: Timings
    peak_memory_bytes: int
    attempts: int
    metrics: dict[str, Any]
    folder: Path | None = None
    uncertainty: Uncertainty | None = None


def reconstruct(
    sinogram: Tensor | NDArray[np.floating],
    geometry: ScanGeometry,
    grid: VolumeGrid,
    recipe: str | Recipe = "ct",
    prior: str | Path | Prior = "ct",
    *,
    noise: NoiseModel | None = None,
    seed: int = 0,
    samples: int = 1,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    projector: Literal["joseph", "shear"] = "joseph",
    batch_size: int | None = None,
    workers: int | None = None,
    accept_mismatch: bool = False,
    folder: str | Path | None = None,
    schedule: Schedule | None = None,
    output: OutputConfig | None = None,
    force: bool = False,
    listeners: tuple[Listener, ...] = (),
    stop: Callable[[], bool] = lambda: False,
) -> Result:
    """Reconstruct a volume from line integrals.

    Args:
        sinogram: [slice, view, u], line integrals without unit (-log of the transmission).
        geometry: the scan, ParallelBeam or FanBeam.
        grid: the volume to reconstruct; as many slices as the sinogram.
        recipe: a packaged recipe ("ct", "dds", ...), a YAML file, or a Recipe.
        prior: a packaged prior ("ct"), a folder, or any object with `denoise`, `offset` and `scale`.
        noise: GaussianNoise or PoissonNoise; None weighs all rays the same.
        seed: of all random numbers.
        samples: runs with other random numbers; of several, `volume` is the mean and `uncertainty` tells the spread.
        device: "auto" takes a GPU where there is one.
        projector: "joseph", or "shear" for parallel beams.
        batch_size: slices the prior works on at once; never changes the result on a CPU.
        workers: CPU threads; never changes the result.
        accept_mismatch: use the prior on spacings and noise levels it was not trained on, with a warning.
        folder: keep checkpoints and outputs here; the same call goes on with an unfinished run.
        schedule: when the state is saved to the folder; by default every 5 levels or 20 seconds.
        output: what is written to the folder; by default HU and a picture.
        force: discard what the folder holds, and start although memory looks short.
        listeners: called with every event of the run (recon3d.engine.events).
        stop: asked between slices; True ends the run with recon3d.engine.executor.Interrupted.

    Returns:
        The volume with timings and its fit to the data.

    Raises:
        ValueError: shapes disagree, the sinogram holds NaN, or the prior does not fit the grid.
        NonFiniteError: a slice became NaN or infinite on the way.
        ResourceError: memory or disk is short, or the folder is in use.

    Warns:
        GeometryWarning: the detector does not cover the volume.
    """
    y = torch.as_tensor(sinogram)
    if not y.is_floating_point():
        raise TypeError(f"reconstruct: sinogram needs float32 or float64 line integrals, got {y.dtype}")
    place = choose_device(device)
    y = y.detach().to(torch.float32).contiguous()
    scan = CTScan(y=y, geometry=geometry, grid=grid, noise=noise, projector=projector, device=place)
    problem = Problem(
        scan=scan,
        recipe=recipe if isinstance(recipe, Recipe) else load_recipe(recipe),
        prior=_prior(prior, place),
        seed=seed,
        accept_mismatch=accept_mismatch,
    )
    return _execute(
        problem, ComputeConfig(batch_size=batch_size, workers=workers), schedule or Schedule(),
        *_kept_in(folder, problem, noise=repr(noise), projector=projector),
        listeners, stop, force, output or OutputConfig(), samples,
    )  # fmt: skip


def reconstruct_mri(
    kspace: Tensor | NDArray[np.complexfloating],
    sampling: Tensor | NDArray[Any] | Trajectory | Sequence[Trajectory],
    maps: Tensor | NDArray[np.complexfloating] | None = None,
    grid: VolumeGrid | None = None,
    recipe: str | Recipe = "mri",
    prior: str | Path | Prior = "mr",
    *,
    noise: GaussianNoise | Literal["auto"] | None = "auto",
    noise_covariance: Tensor | NDArray[np.complexfloating] | None = None,
    coils: int | None = None,
    seed: int = 0,
    samples: int = 1,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    batch_size: int | None = None,
    workers: int | None = None,
    accept_mismatch: bool = False,
    folder: str | Path | None = None,
    schedule: Schedule | None = None,
    output: OutputConfig | None = None,
    force: bool = False,
    listeners: tuple[Listener, ...] = (),
    stop: Callable[[], bool] = lambda: False,
) -> Result:
    """Reconstruct a complex volume from multi-coil k-space.

    Args:
        kspace: Cartesian [slice, coil, ky, kx] (centre at index N // 2); or samples along a trajectory, [slice, coil,
            sample] of slices, [coil, sample] of a volume.
        sampling: Cartesian: 1 where k-space was sampled and 0 elsewhere, [ky, kx], [slice, ky, kx], or [kx] for whole
            columns. Else one trajectory for all slices, or one a slice.
        maps: coil maps [slice, coil, y, x], of a volume [coil, z, y, x]; None makes them by ESPIRiT.
        grid: the volume; None takes the sampling's matrix and voxels of 1 mm.
        recipe: a packaged recipe ("mri", "dds_mri", ...), a YAML file, or a Recipe.
        prior: a packaged prior ("mr"), a folder, or any object with `denoise`, `offset` and `scale`; one that does not
            take complex images gets the real and imaginary parts, in units of the start image's 99.9th percentile.
        noise: "auto" makes the noise white by the covariance, or by that of the outermost samples; a GaussianNoise
            (sigma of either part of a sample) says it is white; None weighs nothing.
        noise_covariance: [coil, coil] of the coils' noise, E[n n^H].
        coils: compress to so many virtual coils.
        seed, samples, device, batch_size, workers, accept_mismatch, folder, schedule, output, force, listeners, stop:
            as in `reconstruct`.

    Returns:
        The complex volume in the unit of k-space, with timings and its fit to the data.

    Raises:
        ValueError: shapes disagree, k-space holds NaN, there is no centre for coil maps, or the prior does not fit.
        NonFiniteError, ResourceError: as `reconstruct`.
    """
    found = kspace_of(kspace, sampling, maps, grid, noise_covariance)
    place = choose_device(device)
    told: list[str] = []
    scan = prepare(found, noise=noise, coils=coils, device=place, tell=told.append)
    problem = Problem(
        scan=scan,
        recipe=recipe if isinstance(recipe, Recipe) else load_recipe(recipe),
        prior=_prior(prior, place),
        seed=seed,
        accept_mismatch=accept_mismatch,
    )
    for listener in listeners:
        for sentence in told:
            listener({"event": "warning", "time_s": round(time.time(), 3), "message": sentence})
    return _execute(
        problem, ComputeConfig(batch_size=batch_size, workers=workers), schedule or Schedule(),
        *_kept_in(folder, problem, noise=repr(scan.noise)),
        listeners, stop, force, output or OutputConfig(), samples,
    )  # fmt: skip


def reconstruct_pet(
    prompts: Tensor | NDArray[Any],
    geometry: PETGeometry,
    factors: Tensor | NDArray[np.floating] | None = None,
    additive: Tensor | NDArray[np.floating] | None = None,
    grid: VolumeGrid | None = None,
    recipe: str | Recipe = "pet",
    prior: str | Path | Prior = "pet",
    *,
    mu: tuple[Tensor, VolumeGrid] | None = None,
    scale: float | None = None,
    psf_fwhm_mm: float | None = None,
    suv_factor: float | None = None,
    guide: Tensor | None = None,
    seed: int = 0,
    samples: int = 1,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    batch_size: int | None = None,
    workers: int | None = None,
    accept_mismatch: bool = False,
    folder: str | Path | None = None,
    schedule: Schedule | None = None,
    output: OutputConfig | None = None,
    force: bool = False,
    listeners: tuple[Listener, ...] = (),
    stop: Callable[[], bool] = lambda: False,
) -> Result:
    """Reconstruct an activity from PET counts, counts ~ Poisson(scale * factors * P x + additive).

    Args:
        prompts: [view, radial, plane], with time of flight [view, radial, tof, plane]: prompt coincidences as counted.
        geometry: their bins; recon3d.geometry.pet_geometry makes it for a known scanner.
        factors: attenuation and normalisation of every bin; None for 1. [view, radial, plane] serves all time bins.
        additive: expected random and scattered counts; None for none.
        grid: the volume, centred on the scanner; None takes geometry.default_grid().
        recipe: a packaged recipe ("pet", "pet_dds", ...), a YAML file, or a Recipe.
        prior: a packaged prior ("pet"), a folder, or any object with `denoise`, `offset` and `scale`; a unit of its
            network is this scan's typical activity, unless it is a recon3d.priors.scaled.ScaledPrior.
        mu: attenuation map in 1/mm and its grid, for factors that hold none; brought onto the grid.
        scale: counts of a bin with factor 1 for 1 Bq/mL along 1 mm (recon3d.operators.quantitative_scale); without it
            the volume is in counts per mm.
        psf_fwhm_mm: resolution of the scanner in the image.
        suv_factor: SUV of 1 Bq/mL, for output.unit "suv".
        guide: [z, y, x] on the grid, an MR or CT image for a prior that takes a condition.
        seed, samples, device, batch_size, workers, accept_mismatch, folder, schedule, output, force, listeners, stop:
            as in `reconstruct`.

    Returns:
        The activity, not negative and 0 where the scanner sees nothing, with timings and its fit to the data.

    Raises:
        ValueError: shapes disagree, counts are negative or all zero, or the prior does not fit the grid.
        NonFiniteError, ResourceError: as `reconstruct`.
    """
    place = choose_device(device)
    scan = prepare_pet(
        prompts,
        geometry,
        factors,
        additive,
        grid,
        mu=mu,
        scale=1.0 if scale is None else scale,
        psf_fwhm_mm=psf_fwhm_mm,
        suv_factor=suv_factor,
        calibrated=scale is not None,
        guide=guide,
        device=place,
    )
    problem = Problem(
        scan=scan,
        recipe=recipe if isinstance(recipe, Recipe) else load_recipe(recipe),
        prior=_prior(prior, place),
        seed=seed,
        accept_mismatch=accept_mismatch,
    )
    return _execute(
        problem, ComputeConfig(batch_size=batch_size, workers=workers), schedule or Schedule(),
        *_kept_in(folder, problem),
        listeners, stop, force, output or OutputConfig(), samples,
    )  # fmt: skip


def enhance(
    image: Tensor | NDArray[np.floating],
    grid: VolumeGrid,
    operator: Literal["identity", "sr", "blur"] = "identity",
    recipe: str | Recipe | None = None,
    prior: str | Path | Prior | None = None,
    *,
    unit: Literal["hu", "per_mm", "au"],
    factor: int | None = None,
    factor_z: int | None = None,
    blur_mm: tuple[float, float, float] | None = None,
    blur_kind: Literal["gaussian", "uniform"] | None = None,
    noise: float | Literal["auto"] | None = "auto",
    seed: int = 0,
    samples: int = 1,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    batch_size: int | None = None,
    workers: int | None = None,
    accept_mismatch: bool = False,
    folder: str | Path | None = None,
    schedule: Schedule | None = None,
    output: OutputConfig | None = None,
    force: bool = False,
    listeners: tuple[Listener, ...] = (),
    stop: Callable[[], bool] = lambda: False,
) -> Result:
    """Denoise, super-resolve or deblur an image volume: image = A volume + noise.

    Args:
        image: [z, y, x] in `unit`.
        grid: its grid.
        operator: A: "identity", "sr" (means of blocks of finer voxels) or "blur".
        recipe: a packaged recipe ("image", "ddnm_plus", "ddnm", "dps_image", ...), a YAML file, or a Recipe; None takes
            "image", without noise "ddnm".
        prior: a packaged prior, a folder, or any object with `denoise`, `offset` and `scale`; None takes "mr" for
            arbitrary units, else "ct". For images in arbitrary units a network unit is the 99.9th percentile.
        unit: "hu", "per_mm" (attenuation in 1/mm) or "au" (arbitrary, such as a magnitude of MR).
        factor: sr: fine pixels along the side of a coarse one.
        factor_z: sr: thin slices in a thick one.
        blur_mm: blur along z, y, x in mm: full width at half maximum, of a uniform blur the width.
        blur_kind: "gaussian" unless given, or "uniform".
        noise: standard deviation of a voxel in `unit`; "auto" reads it off the image, None takes the image as exact.
        seed, samples, device, batch_size, workers, accept_mismatch, folder, schedule, output, force, listeners, stop:
            as in `reconstruct`.

    Returns:
        The volume in 1/mm for "hu" and "per_mm", else in the image's unit, with timings and its fit to the image; its
        grid is finer than the image's for "sr".

    Raises:
        ValueError: the image is no volume on the grid, holds NaN or is constant, or a number is missing or has no
            meaning with the operator.
        NonFiniteError, ResourceError: as `reconstruct`.
    """
    place = choose_device(device)
    degradation = Degradation(operator, factor, factor_z, blur_mm, blur_kind)
    water = (output or OutputConfig()).mu_water_per_mm or MU_WATER_PER_MM
    scan = prepare_image(image, grid, degradation, values=unit, noise=noise, mu_water_per_mm=water, device=place)
    recipe = recipe or ("ddnm" if noise is None else "image")
    problem = Problem(
        scan=scan,
        recipe=recipe if isinstance(recipe, Recipe) else load_recipe(recipe),
        prior=_prior(prior or ("mr" if unit == "au" else "ct"), place),
        seed=seed,
        accept_mismatch=accept_mismatch,
    )
    return _execute(
        problem, ComputeConfig(batch_size=batch_size, workers=workers), schedule or Schedule(),
        *_kept_in(folder, problem, noise=repr(scan.noise)),
        listeners, stop, force, output or OutputConfig(), samples,
    )  # fmt: skip


def convert_modality(
    image: Tensor | NDArray[np.floating],
    grid: VolumeGrid,
    prior: str | Path | Prior,
    recipe: str | Recipe = "sample",
    *,
    slices: tuple[int, int] | None = None,
    seed: int = 0,
    samples: int = 1,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    batch_size: int | None = None,
    workers: int | None = None,
    accept_mismatch: bool = False,
    folder: str | Path | None = None,
    schedule: Schedule | None = None,
    output: OutputConfig | None = None,
    force: bool = False,
    listeners: tuple[Listener, ...] = (),
    stop: Callable[[], bool] = lambda: False,
) -> Result:
    """Draw an image of another modality with a prior that is shown this one, such as CT from MR; nothing is measured.

    Args:
        image: [z, y, x] of the kind that the prior's card names as its condition.
        grid: its grid, and that of the result.
        prior: the folder of a conditional prior, or any object with `denoise`, `offset`, `scale` and such a card.
        recipe: "sample", a YAML file, or a Recipe.
        slices: first and end of those to convert; what scales the image is still taken from all of it.
        seed, samples, device, batch_size, workers, accept_mismatch, folder, schedule, output, force, listeners, stop:
            as in `reconstruct`.

    Returns:
        The volume in the unit of the prior's card; of several samples, their mean and spread.

    Raises:
        ValueError: the image is no volume on the grid, holds NaN or is constant, or the prior takes no condition.
        NonFiniteError, ResourceError: as `reconstruct`.
    """
    place = choose_device(device)
    denoiser = _prior(prior, place)
    water = (output or OutputConfig()).mu_water_per_mm or MU_WATER_PER_MM
    problem = Problem(
        scan=prepare_conversion(image, grid, denoiser.card, slices=slices, mu_water_per_mm=water, device=place),
        recipe=recipe if isinstance(recipe, Recipe) else load_recipe(recipe),
        prior=denoiser,
        seed=seed,
        accept_mismatch=accept_mismatch,
    )
    return _execute(
        problem, ComputeConfig(batch_size=batch_size, workers=workers), schedule or Schedule(),
        *_kept_in(folder, problem),
        listeners, stop, force, output or OutputConfig(), samples,
    )  # fmt: skip


def run_job(
    config: JobConfig,
    folder: str | Path,
    *,
    force: bool = False,
    listeners: tuple[Listener, ...] = (),
    stop: Callable[[], bool] = lambda: False,
) -> Result:
    """Run a job from files in a folder; an unfinished run of the same job goes on.

    Args:
        config: the job.
        folder: where everything goes; complete when it holds manifest.json.
        force: discard what the folder holds, and start although memory looks short.
        listeners: called with every event.
        stop: asked between slices; True saves the state and raises Interrupted.

    Raises:
        ConfigError: the job is incomplete, or the folder holds a complete run.
        CheckpointError: the folder holds an unfinished run of another job.
        BadInput: the measurement or the prior cannot be used.
        Interrupted, NonFiniteError, ResourceError: as `reconstruct`.
    """
    config = resolve(config)
    run = RunFolder(folder)
    run.refuse_complete(force)  # before anything is read
    early = Events(listeners=listeners)
    early.emit("stage", name="reading")
    problem = load_problem(config, early)
    schedule = Schedule(config.checkpoint.every_levels, config.checkpoint.every_seconds)
    meaning, text = config.meaning(), save_config(config)
    return _execute(
        problem, config.compute, schedule, run, meaning, text, listeners, stop, force, config.output, config.samples
    )


def plan_job(config: JobConfig, probe: bool = True) -> planning.Plan:
    """Predict memory and time of a job; nothing the size of the volume is allocated.

    Args:
        config: the job.
        probe: time one slice through the prior and the projector.
    """
    config = resolve(config)
    events = Events()
    problem = load_problem(config, events)
    job = problem.job()  # its weights are part of what the process holds
    found = planning.predict(
        problem, config.compute, probe=probe, picture=config.output.preview, samples=config.samples
    )
    del job
    return found


def resolve(config: JobConfig) -> JobConfig:
    """The job with recipe and prior chosen, the recipe written out and paths absolute: it means the same anywhere.

    Raises:
        ConfigError: no input is given, or the recipe is not known.
        BadInput: recipe or prior go by the measurement, and it cannot be read.
    """
    if not config.input.path:
        raise ConfigError("no measurement is given; name a file with -i or input.path")
    place = Path(config.input.path).absolute()
    raw, prior = config.recipe, config.prior
    if raw is None or prior is None or (isinstance(raw, dict) and raw.get("like") == "auto"):
        default_recipe, default_prior = defaults_of(config)
    else:
        default_recipe, default_prior = "", prior
    recipe, prior = recipe_from(raw, default_recipe), prior or default_prior
    return config.model_copy(
        update={
            "recipe": recipe.model_dump(mode="json"),
            "input": config.input.model_copy(update={"path": str(place)}),
            "prior": _absolute(prior),
            "priors": {plane: _absolute(name) for plane, name in config.priors.items()},
        }
    )


def _absolute(prior: str) -> str:
    return str(Path(prior).absolute()) if Path(prior).is_dir() else prior


def _prior(prior: str | Path | Prior, device: torch.device) -> Prior:
    if not isinstance(prior, (str, Path)):
        return prior
    from recon3d.priors import load_prior

    return load_prior(prior, device)


def _kept_in(folder: str | Path | None, problem: Problem, **more: str) -> tuple[RunFolder | None, dict[str, Any], str]:
    """Where a run from arrays is kept, what decides its result, and that as the folder's config."""
    meaning = {"recipe": problem.recipe.model_dump(mode="json"), **more, "seed": problem.seed}
    return None if folder is None else RunFolder(folder), meaning, yaml.safe_dump(meaning, sort_keys=False)


def _execute(
    problem: Problem,
    compute: ComputeConfig,
    schedule: Schedule,
    run: RunFolder | None,
    meaning: Mapping[str, Any],
    config_text: str,
    listeners: tuple[Listener, ...],
    stop: Callable[[], bool],
    force: bool,
    output: OutputConfig,
    samples: int = 1,
) -> Result:
    if samples < 1:
        raise ValueError(f"samples: must be at least 1, got {samples}")
    sentences = [*problem.check(), *_unclaimed(problem, samples)]
    job = problem.job()
    plan = planning.predict(
        problem, compute, probe=False, picture=run is not None and output.preview, samples=samples, disk=run is not None
    )
    if plan.short_of_memory and not force:
        raise ResourceError(plan.short_of_memory)
    # from here on the job is sound, and a folder may be made
    with nullcontext() if run is None else run.open(*listeners, force=force):
        events = Events(listeners=listeners) if run is None else run.events
        for sentence in sentences:
            events.emit("warning", message=sentence)
            warnings.warn(sentence, GeometryWarning, stacklevel=3)
        events.emit("plan", **plan.as_dict())
        stamp: dict[str, str] = {}
        store = None
        if run is not None:
            stamp = fingerprint(meaning, problem.scan.digests(), problem.prior_digest(), problem.scan.device.type)
            stamp.update({"samples": "several"} if samples > 1 else {})
            store = run.checkpoint(stamp)
            store.verify()  # another job's checkpoint is refused before its config is touched
            run.write_config(config_text)
        with _threads(compute.workers), Executor(plan.batch_size, compute.workers, events, stop) as executor:
            if samples == 1:
                solved = solve(job, executor, store=store, schedule=schedule, events=events, stop=stop)
                volume, uncertainty = problem.scan.finish(solved.volume), None
            else:
                solved, uncertainty = draw(
                    job, executor, samples, finish=problem.scan.finish, claims=problem.recipe.claims, store=store,
                    kept=_kept(run, problem.scan, output), schedule=schedule, events=events, stop=stop,
                )  # fmt: skip
                volume = solved.volume
        events.emit("stage", name="writing")
        volume, metrics = volume.cpu(), {"data": _fit(problem.scan, volume)}
        peak, place = peak_resident_bytes(), None if run is None else run.path
        result = Result(volume, problem.scan.grid, solved.timings, peak, solved.attempts, metrics, place, uncertainty)
        if run is not None:
            _write_outputs(run, problem, result, output)
            run.write_manifest(_manifest(problem, result, solved, stamp, plan))
            events.emit("complete", **solved.timings.as_dict())
        return result


def _unclaimed(problem: Problem, samples: int) -> list[str]:
    recipe = problem.recipe
    if samples == 1 or recipe.claims == "posterior_sample":
        return []
    # there is none for counts yet
    other = "" if problem.scan.modality == "pet" else "; recipe posterior draws from the posterior"
    return [
        f"samples: recipe {recipe.name} claims an estimate, so the spread of its {samples} samples is that of the "
        f"method and may be far from the uncertainty of the image{other}"
    ]


def _kept(run: RunFolder | None, scan: Scan, output: OutputConfig) -> Kept | None:
    if run is None or not output.samples:
        return None
    folder = run.path

    def save(k: int, volume: Tensor) -> None:
        scan.save(folder / f"sample_{k:04d}.nii.gz", volume, output)

    return Kept(folder / CHECKPOINT / "samples", save)


def _fit(scan: Scan, volume: Tensor, depth: int = 8) -> dict[str, Any]:
    """How well the volume explains the measurement, a few slices at a time."""
    from recon3d.metrics import data_fit

    own = scan.data_fit(volume)
    if own is not None:
        return own
    squared, power, chi2, used = 0.0, 0.0, 0.0, 0
    for slices, part in scan.slabs(depth):
        y, measured, weights = part.y, part.measured(), part.weights()
        difference = real_view(part.operator()(volume[slices]).cpu() - y).double().square_()
        squared += float(difference.sum())
        power += float(real_view(y).double().square().sum())
        if weights is not None:
            seen = weights if measured is None else weights * measured
            per_value = difference.reshape(*y.shape, -1).sum(-1)  # both parts of a complex value
            chi2 += float((per_value * seen.double()).sum())
            used += int((seen > 0).expand_as(y).sum()) * (2 if y.is_complex() else 1)
    definitions, value = dict(data_fit(np.zeros(1), np.ones(1))["definitions"]), chi2 / used if used else None
    found = {"relative_residual": (squared / power) ** 0.5 if power > 0 else None}
    if scan.modality == "ct":
        return {**found, "chi2_per_ray": value, "definitions": definitions}
    definitions["chi2_per_sample"] = definitions.pop("chi2_per_ray").replace("rays", "samples' real components")
    return {**found, "chi2_per_sample": value, "definitions": definitions}


def _write_outputs(run: RunFolder, problem: Problem, result: Result, output: OutputConfig) -> None:
    from recon3d.engine.checkpoint import write_json

    problem.scan.write(run.path, result.volume, output)
    if result.uncertainty is not None:
        problem.scan.save_spread(run.path / "std.nii.gz", result.uncertainty.std, output)
        problem.scan.save(run.path / "low.nii.gz", result.uncertainty.low, output)
        problem.scan.save(run.path / "high.nii.gz", result.uncertainty.high, output)
    if output.preview:
        from recon3d.report import preview

        shown = problem.scan.pictures(result.volume, f"recon3d {problem.recipe.name}", output)
        preview(run.path / "preview.png", shown.volumes, result.grid, **shown.arguments)
    write_json(run.path / "metrics.json", result.metrics)


def _manifest(
    problem: Problem, result: Result, solved: Solved, stamp: Mapping[str, str], plan: planning.Plan
) -> dict[str, Any]:
    card = getattr(problem.prior, "card", None)
    return {
        "format": 1,
        "versions": versions(),
        "recipe": problem.recipe.model_dump(mode="json"),
        "modality": problem.scan.modality,
        "prior": {
            "name": getattr(card, "name", type(problem.prior).__name__),
            "sha256": getattr(card, "sha256", None),
            "scale": problem.denoiser.scale,
        },
        "seed": problem.seed,
        **({} if result.uncertainty is None else {"samples": result.uncertainty.as_dict()}),
        "inputs": {**problem.scan.digests(), "files": {**problem.scan.files, **problem.files}},
        "fingerprint": dict(stamp),
        "grid": asdict(problem.scan.grid),
        "hardware": hardware(problem.scan.device.type),
        "timings": result.timings.as_dict(),
        "peak_memory_bytes": result.peak_memory_bytes,
        "predicted": plan.as_dict(),
        "attempts": solved.attempts,
        "volume_sha256": digest(result.volume),
        "finished_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


@contextmanager
def _threads(workers: int | None) -> Iterator[None]:
    """Let the operators use as many threads as the prior has workers."""
    before = torch.get_num_threads()
    if workers is not None:
        torch.set_num_threads(workers)
    try:
        yield
    finally:
        torch.set_num_threads(before)

"""The verb convert-modality: an image as another modality would show it; the same job as recon, fewer words."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

# what the field calls its samplers, as settings of the recipe `sample`
_SAMPLERS: dict[str, dict[str, Any]] = {
    "ddpm": {"renoise": {"kind": "ancestral"}},
    "em": {"renoise": {"kind": "em"}},
    "pc": {"renoise": {"kind": "ancestral", "variance": "large"}, "trajectory": {"correctors": 1}},
    "ode": {"renoise": {"kind": "heun"}},
    "rk45": {"renoise": {"kind": "rk45"}},
}


def convert_modality(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the run.")],
    input_: Annotated[
        Path | None, typer.Option("--input", "-i", help="Image volume: NIfTI, a DICOM file or a series' folder.")
    ] = None,
    prior: Annotated[str | None, typer.Option(help="Folder of a conditional prior.")] = None,
    sampler: Annotated[
        str | None, typer.Option(help="ddpm, em, pc (predictor-corrector), ode (Heun) or rk45; ode unless given.")
    ] = None,
    levels: Annotated[int | None, typer.Option(help="Noise levels.")] = None,
    recipe: Annotated[str | None, typer.Option(help="Packaged recipe or a YAML file, instead of a sampler.")] = None,
    samples: Annotated[
        int | None, typer.Option(help="Draws; of several, mean, standard deviation and 90 % interval.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu or cuda.")] = None,
    config: Annotated[Path | None, typer.Option("--config", "-c", help="Job file in YAML.")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", "-s", help="section.key=value, repeatable.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Discard what the folder holds.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar.")] = False,
) -> None:
    """Draw an image as another modality, such as CT from MR. The same command on an unfinished run goes on with it."""
    from recon3d.cli.app import run_in
    from recon3d.config import ConfigError, load_config

    if recipe is not None and (sampler is not None or levels is not None):
        raise ConfigError("--recipe: has its own sampler and levels; leave --sampler and --levels out, or the recipe")
    if prior is None and config is None:
        raise ConfigError("--prior: an image is converted by a conditional prior; name its folder")
    made = recipe if recipe is not None or prior is None else sampling(prior, sampler or "ode", levels)
    values: dict[str, Any] = {
        "input.path": None if input_ is None else str(input_),
        "input.operator": "none",
        "recipe": made,
        "prior": prior,
        "samples": samples,
        "compute.device": device,
    }
    job = load_config(config, set_ or (), {key: value for key, value in values.items() if value is not None})
    run_in(job, output, force, quiet)


def sampling(prior: str | Path, sampler: str, levels: int | None = None) -> dict[str, Any]:
    """The recipe `sample` with a sampler of the field, over the noise levels that a prior was trained on.

    Raises:
        BadInput: the prior's card cannot be read.
        ConfigError: the sampler is not known.
    """
    from recon3d.config import ConfigError
    from recon3d.priors import find_prior
    from recon3d.priors.checkpoints import read_card

    if sampler not in _SAMPLERS:
        raise ConfigError(f"--sampler: one of {', '.join(_SAMPLERS)}, got {sampler}")
    own = _SAMPLERS[sampler]
    trajectory = dict(own.get("trajectory", {}))
    trained = read_card(find_prior(prior)).sigma_range
    if trained is not None:
        trajectory |= {"sigma_max": trained[1], "sigma_min": max(trained[0], 0.01)}
    if levels is not None:
        trajectory["levels"] = levels
    return {"like": "sample", **own, "trajectory": trajectory}

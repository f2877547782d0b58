"""The verb enhance: an image volume denoised, super-resolved or deblurred; the same job as recon, fewer words."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer


def enhance(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the run.")],
    input_: Annotated[
        Path | None, typer.Option("--input", "-i", help="Image volume: NIfTI, a DICOM file or a series' folder.")
    ] = None,
    operator: Annotated[
        str | None, typer.Option(help="What it lacks: identity (it is noisy), sr (coarse) or blur (blurred).")
    ] = None,
    factor: Annotated[int | None, typer.Option(help="sr: fine pixels along the side of a coarse one.")] = None,
    factor_z: Annotated[int | None, typer.Option(help="sr: thin slices in a thick one.")] = None,
    blur_mm: Annotated[
        str | None, typer.Option(help="blur: full width at half maximum in mm, in the plane or as z,y,x.")
    ] = None,
    unit: Annotated[str | None, typer.Option(help="hu, per_mm or au, where the file does not state it.")] = None,
    noise: Annotated[float | None, typer.Option(help="Standard deviation of a voxel in the image's unit.")] = None,
    noise_hu: Annotated[float | None, typer.Option(help="The same in HU; says that the image is in HU.")] = None,
    exact: Annotated[
        bool, typer.Option("--exact", help="The image has no noise; without any noise given it is read off the image.")
    ] = False,
    recipe: Annotated[str | None, typer.Option(help="Packaged recipe or a YAML file.")] = None,
    prior: Annotated[str | None, typer.Option(help="Packaged prior or a folder.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu or cuda.")] = None,
    samples: Annotated[
        int | None,
        typer.Option(help="Runs with other random numbers; of several, mean, standard deviation and 90 % interval."),
    ] = None,
    config: Annotated[Path | None, typer.Option("--config", "-c", help="Job file in YAML.")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", "-s", help="section.key=value, repeatable.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Discard what the folder holds.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar.")] = False,
) -> None:
    """Denoise, super-resolve or deblur an image volume. The same command on an unfinished run goes on with it."""
    from recon3d.cli.app import run_in
    from recon3d.config import ConfigError, load_config

    if (noise is not None) + (noise_hu is not None) + exact > 1:
        raise ConfigError("--noise, --noise-hu, --exact: give one of them")
    if noise_hu is not None and unit not in (None, "hu"):
        raise ConfigError(f"--noise-hu: is for images in HU, got --unit {unit}")
    level = noise if noise is not None else noise_hu
    values: dict[str, Any] = {
        "input.path": None if input_ is None else str(input_),
        "input.operator": operator or (None if config is not None else "identity"),
        "input.factor": factor,
        "input.factor_z": factor_z,
        "input.blur_mm": None if blur_mm is None else _widths(blur_mm),
        "input.image_unit": unit or ("hu" if noise_hu is not None else None),
        "noise.kind": "none" if exact else None if level is None else "gaussian",
        "noise.sigma": level,
        "recipe": recipe,
        "prior": prior,
        "compute.device": device,
        "samples": samples,
    }
    job = load_config(config, set_ or (), {key: value for key, value in values.items() if value is not None})
    if job.input.operator == "none":
        raise ConfigError("--operator none: leaves nothing to enhance; give identity, sr or blur")
    run_in(job, output, force, quiet)


def _widths(text: str) -> list[float]:
    from recon3d.config import ConfigError

    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        found = []
    if len(found) not in (1, 3):
        raise ConfigError(f"--blur-mm {text}: expected one width in mm, or three (z,y,x)")
    return found if len(found) == 3 else [0.0, found[0], found[0]]

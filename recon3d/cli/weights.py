"""recon3d weights: what a published checkpoint is, the folder made of it, and whether it denoises."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from recon3d.priors import ModelCard

app = typer.Typer(name="weights", help="Published checkpoints: inspect, convert, test.", no_args_is_help=True)

File = Annotated[
    Path,
    typer.Argument(
        help="Checkpoint (.pt, .pth, .safetensors; nothing in it is executed) or folder of a diffusers model."
    ),
]
HeadChannels = Annotated[
    int | None,
    typer.Option(help="Channels of a head of attention where no shape tells: ADM 64, diffusers 8 unless given."),
]
Heads = Annotated[int | None, typer.Option(help="ADM: heads of attention, instead of --head-channels.")]
NewOrder = Annotated[bool, typer.Option("--new-attention-order", help="ADM: q, k and v one after another.")]
Centered = Annotated[bool, typer.Option("--centered", help="NCSN++: it does not map 0..1 to -1..1 by itself.")]
LongestPeriod = Annotated[float | None, typer.Option(help="ADM, PET: of the time step's sines, 10000 unless given.")]
TimeScale = Annotated[
    float | None, typer.Option(help="diffusers: the network is shown this many times the time of its path.")
]


@app.command()
def inspect(
    checkpoint: File,
    head_channels: HeadChannels = None,
    heads: Heads = None,
    new_attention_order: NewOrder = False,
    centered: Centered = False,
    longest_period: LongestPeriod = None,
    time_scale: TimeScale = None,
) -> None:
    """Family, architecture and size of a checkpoint, from its tensors' names and shapes and what lies beside them."""
    from recon3d.priors.checkpoints.convert import FAMILIES
    from recon3d.priors.checkpoints.convert import inspect as look

    found = look(
        checkpoint,
        **_options(head_channels, heads, new_attention_order, centered, longest_period, time_scale),
    )
    typer.echo(f"{checkpoint}: {FAMILIES[found.family].title}")
    typer.echo(f"  {len(found.tensors)} tensors, {found.parameters / 1e6:.1f} million parameters")
    variance = ", and a variance" if found.learned_variance else ""
    beside = f", shown {found.conditions} more beside them" if found.conditions else ""
    typer.echo(f"  images of {found.channels} channel{'s' * (found.channels > 1)}{beside}{variance}")
    for key, value in {**found.architecture, **found.card}.items():
        typer.echo(f"  {key}: {value}")


@app.command()
def convert(
    checkpoint: File,
    folder: Annotated[Path, typer.Argument(help="Prior folder to write.")],
    range_: Annotated[
        tuple[float, float],
        typer.Option("--range", help="What the network was shown for the two ends of --values, such as -1 1."),
    ],
    values: Annotated[tuple[float, float], typer.Option(help="Values in --unit of the same two ends.")],
    unit: Annotated[str, typer.Option(help="Unit of the images: 1/mm for CT, Bq/mL for PET, a.u. for MR.")],
    name: Annotated[str | None, typer.Option(help="Of the prior; the folder's unless given.")] = None,
    plane: Annotated[str, typer.Option(help="axial, coronal, sagittal or any.")] = "any",
    spacing_mm: Annotated[
        tuple[float, float] | None, typer.Option(help="Smallest and largest pixel it was trained on.")
    ] = None,
    schedule: Annotated[
        str | None, typer.Option(help="Discrete variance preserving path: linear, scaled_linear or cosine.")
    ] = None,
    sigma_max: Annotated[float | None, typer.Option(help="Variance exploding path: highest noise level.")] = None,
    beta_max: Annotated[float | None, typer.Option(help="Continuous variance preserving path: last beta.")] = None,
    prediction: Annotated[
        str | None, typer.Option(help="eps, x0, v, score or flow (with its path); the family's unless given.")
    ] = None,
    positions: Annotated[
        bool, typer.Option("--positions", help="The last two input channels say where a pixel lies (PaDIS).")
    ] = False,
    patch: Annotated[
        int | None, typer.Option(min=16, help="Side of the patches it was trained on and is to see.")
    ] = None,
    licence: Annotated[str, typer.Option(help="Of the weights.")] = "",
    head_channels: HeadChannels = None,
    heads: Heads = None,
    new_attention_order: NewOrder = False,
    centered: Centered = False,
    longest_period: LongestPeriod = None,
    time_scale: TimeScale = None,
) -> None:
    """Make a prior folder from a checkpoint; every tensor is checked before anything is written."""
    from recon3d.config import ConfigError
    from recon3d.priors.checkpoints.convert import convert as make

    low, high = range_
    if low == high or values[0] == values[1]:
        raise ConfigError("--range and --values: their two ends must differ")
    scale = (values[1] - values[0]) / (high - low)
    card: dict[str, Any] = {
        "name": name or folder.name,
        "plane": plane,
        "spacing_mm": spacing_mm,
        "offset": values[0] - scale * low,
        "scale": scale,
        "unit": unit,
        "value_range": (min(values), max(values)),
        "licence": licence,
        "positions": positions,
        "patch": patch,
        **_path(schedule, sigma_max, beta_max, prediction),
    }
    options = _options(head_channels, heads, new_attention_order, centered, longest_period, time_scale)
    made = make(checkpoint, folder, card, **options)
    typer.echo(f"{folder}: prior {made.name!r}, {(made.parameters or 0) / 1e6:.1f} million parameters")


@app.command("export-script")
def export_script(kind: Annotated[str, typer.Argument(help="edm: Python objects (.pkl) of NVlabs' EDM.")]) -> None:
    """Print the program that turns published Python objects into tensors, to be run once where their source is."""
    from recon3d.config import ConfigError
    from recon3d.priors.checkpoints.beside import edm_script

    if kind != "edm":
        raise ConfigError(f"export-script: only edm is published as Python objects, got {kind!r}")
    typer.echo(edm_script(), nl=False)


@app.command()
def test(
    prior: Annotated[str, typer.Argument(help="Packaged prior or a folder.")],
    volume: Annotated[
        Path,
        typer.Argument(
            help="NIfTI volume of what it was trained on: HU for CT, else in the prior's unit; any unit where training "
            "divided every volume by a level of its own. Complex priors see its magnitudes under a made-up phase."
        ),
    ],
    slices: Annotated[int, typer.Option(help="Slices to look at, evenly spread.", min=1)] = 4,
    condition: Annotated[
        Path | None, typer.Option(help="Conditional prior: NIfTI volume of the image beside, voxel on voxel.")
    ] = None,
    mu_water_per_mm: Annotated[float, typer.Option(help="CT: attenuation of water.")] = 0.0193,
) -> None:
    """Denoise known noise and compare with what a filter leaves; a wrong schedule, range or prediction is named."""
    from recon3d.config import ConfigError
    from recon3d.io import read_nifti
    from recon3d.priors import find_prior
    from recon3d.priors.checkpoints import build_network, read_folder
    from recon3d.priors.network_prior import NetworkPrior
    from recon3d.priors.self_test import known_slices, self_test

    folder = find_prior(prior)
    card, state = read_folder(folder)
    x, _ = read_nifti(volume, "hu" if card.unit == "1/mm" else "au", mu_water_per_mm)
    image = None if condition is None else read_nifti(condition, "au")[0]
    try:
        images, index = known_slices(card, x, slices)
        beside = _beside(card, image, x.shape)
        found = self_test(
            NetworkPrior(build_network(card, state, folder), card),
            images,
            cond=None if beside is None else beside[index, None],
            remake=lambda other: NetworkPrior(build_network(other, state, folder), other),
        )
    except ValueError as error:
        raise ConfigError(f"weights test: {error}") from None
    typer.echo(f"{'noise':>10} {'left':>10} {'a filter leaves':>16}   ({card.unit})")
    for level in found.levels:
        typer.echo(f"{level.sigma:10.4g} {level.error:10.4g} {level.expected:16.4g}")
    typer.echo(f"{card.name}: {found.verdict}")
    if not found.sound:
        raise typer.Exit(5)


def _beside(card: ModelCard, image: Tensor | None, shape: torch.Size) -> Tensor | None:
    """The image that a conditional prior is shown, as it wants it."""
    from recon3d.priors import condition_volume

    if image is None and not card.cond_channels:
        return None
    if image is None or card.cond_channels != 1:
        raise ValueError(
            f"prior {card.name!r} is shown {card.cond_channels} image(s) beside the slices; --condition gives one"
        )
    if image.shape != shape:
        raise ValueError(f"--condition must have the voxels of the volume {tuple(shape)}, got {tuple(image.shape)}")
    return condition_volume(card, image.float())


def _path(
    schedule: str | None, sigma_max: float | None, beta_max: float | None, prediction: str | None
) -> dict[str, Any]:
    """The card's fields of the noise path, as far as they were given."""
    from recon3d.config import ConfigError
    from recon3d.priors.checkpoints.beside import noise_fields

    paths: dict[str, tuple[str, dict[str, Any]]] = {}
    if schedule is not None:
        paths["--schedule"] = ("vp", {"schedule": schedule})
    if sigma_max is not None:
        paths["--sigma-max"] = ("ve", {"sigma_max": sigma_max})
    if beta_max is not None:
        paths["--beta-max"] = ("vp_continuous", {"beta_max": beta_max})
    if prediction == "flow":
        paths["--prediction flow"] = ("flow", {})
    if len(paths) > 1:
        raise ConfigError(f"{' and '.join(paths)}: one of them, they are of different noise paths")
    if not paths:
        return {} if prediction is None else {"prediction": prediction}
    (option, (path, numbers)), *_ = paths.items()
    try:
        fields = noise_fields(path, numbers, prediction or "")
    except ValueError as error:
        raise ConfigError(f"{option}: {error}") from None
    if prediction is None:
        del fields["prediction"]
    return fields


def _options(
    head_channels: int | None,
    heads: int | None,
    new_order: bool,
    centered: bool,
    longest_period: float | None,
    time_scale: float | None,
) -> dict[str, Any]:
    from recon3d.config import ConfigError

    if head_channels is not None and heads is not None:
        raise ConfigError("--heads and --head-channels: give one of them")
    options: dict[str, Any] = {"longest_period": longest_period, "time_scale": time_scale}
    options = {name: value for name, value in options.items() if value is not None}
    if new_order:
        options["legacy_attention"] = False
    if centered:
        options["centered"] = True
    if heads is not None:
        options.update(heads=heads, head_channels=None)
    elif head_channels is not None:
        options["head_channels"] = head_channels
    return options

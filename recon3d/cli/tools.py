"""The smaller verbs: demo, train, metrics, baseline, simulate."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer


def add_to(app: typer.Typer) -> None:
    """Register the verbs."""
    for verb in (demo, train, metrics, baseline, simulate):
        app.command()(verb)


def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder; one folder per job goes in it.")],
    measured: Annotated[list[Path] | None, typer.Option("--measured", help="File of measured projections.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A few slices of the chest only.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar.")] = False,
) -> None:
    """Reconstruct a chest from few noisy views, and measured projections where there are any."""
    import warnings

    from recon3d import demo as jobs
    from recon3d.cli.progress import progress_bar
    from recon3d.engine.memory import tame_allocator

    tame_allocator()
    with warnings.catch_warnings(), progress_bar(quiet) as listen:
        warnings.simplefilter("ignore")  # they arrive as events
        jobs.run(output, measured if measured is not None else jobs.default_measured(), typer.echo, listen, quick)


def train(
    config: Annotated[Path, typer.Argument(help="Training file in YAML.")],
    device: Annotated[str | None, typer.Option(help="cpu or cuda.")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar.")] = False,
) -> None:
    """Train a prior on slices of volumes; the same command goes on with an interrupted run."""
    from recon3d.cli.progress import stop_signals, training_bar
    from recon3d.config import read_yaml, validate
    from recon3d.priors.training import TrainConfig
    from recon3d.priors.training import train as run

    raw = read_yaml(config) | ({"device": device} if device else {})
    settings = validate(TrainConfig, raw, str(config))
    with stop_signals() as stop, training_bar(quiet) as listen:
        result = run(settings, listen, stop)
    if not result.finished:
        from recon3d.engine.executor import Interrupted

        raise Interrupted(f"interrupted; go on with: recon3d train {config}")
    typer.echo(f"{result.prior}: trained prior")


def metrics(
    volume: Annotated[Path, typer.Argument(help="NIfTI volume.")],
    reference: Annotated[Path, typer.Argument(help="NIfTI volume it should equal.")],
    unit: Annotated[str, typer.Option(help="hu or au (arbitrary units).")] = "hu",
    data_range: Annotated[float | None, typer.Option(help="Range of PSNR and SSIM; au needs it.")] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print everything, with definitions.")] = False,
) -> None:
    """Compare two volumes: PSNR and SSIM in three planes, RMSE, NMSE, change from slice to slice."""
    from recon3d import metrics as figures
    from recon3d.config import ConfigError
    from recon3d.io import BadInput, read_nifti

    if unit not in ("hu", "au"):
        raise ConfigError(f"--unit: expected hu or au, got {unit!r}")
    x, grid = read_nifti(volume)
    truth, other = read_nifti(reference)
    if grid.shape != other.shape:
        raise BadInput(volume, f"has shape {grid.shape}, {reference} {other.shape}", "resample one of them first")
    found = figures.compare(x, truth, grid, data_range, unit="hu" if unit == "hu" else "au")
    _show({volume.name: found}, json_)


def baseline(
    method: Annotated[str, typer.Argument(help="fbp, sirt or tv.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="NIfTI volume to write.")],
    input_: Annotated[Path | None, typer.Option("--input", "-i", help="Measured sinogram.")] = None,
    config: Annotated[
        Path | None, typer.Option("--config", "-c", help="Job file; recipe and prior are ignored.")
    ] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", "-s", help="section.key=value, repeatable.")] = None,
    iterations: Annotated[int | None, typer.Option(help="Of sirt and tv.")] = None,
    strength: Annotated[float | None, typer.Option(help="Of tv, dimensionless.")] = None,
) -> None:
    """Reconstruct with a classical method, to compare with."""
    from recon3d.cli import classical
    from recon3d.config import load_config

    job = load_config(config, set_ or (), {} if input_ is None else {"input.path": str(input_)})
    given: dict[str, Any] = {"iterations": iterations, "strength": strength}
    seconds = classical.run(method, job, output, {k: v for k, v in given.items() if v is not None})
    typer.echo(f"{output}: {method} in {seconds:.1f} s")


def simulate(
    volume: Annotated[Path, typer.Argument(help="NIfTI volume in HU.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Sinogram to write (.h5 or .npz).")],
    views: Annotated[int, typer.Option(help="Number of views.")] = 60,
    photons: Annotated[
        float | None, typer.Option(help="Mean count of an unattenuated ray; without it no noise.")
    ] = None,
    detector: Annotated[int | None, typer.Option(help="Detector cells; enough for the diagonal by default.")] = None,
    detector_spacing_mm: Annotated[float | None, typer.Option(help="Default: the pixel, magnified.")] = None,
    range_deg: Annotated[float | None, typer.Option(help="Default: 180 for parallel, 360 for fan.")] = None,
    source_to_axis_mm: Annotated[float | None, typer.Option(help="Makes it a fan beam.")] = None,
    source_to_detector_mm: Annotated[
        float | None, typer.Option(help="Fan beam; default twice source_to_axis_mm.")
    ] = None,
    rows: Annotated[str | None, typer.Option(help="first:end, slices to take.")] = None,
    seed: Annotated[int, typer.Option(help="Of the noise.")] = 0,
    mu_water_per_mm: Annotated[float, typer.Option(help="Attenuation of water.")] = 0.0193,
) -> None:
    """Make a noisy sinogram of a volume, on finer pixels than a reconstruction will use."""
    import math

    from recon3d.config import ConfigError
    from recon3d.geometry import FanBeam, ParallelBeam, equiangular
    from recon3d.io import Measurement, read_nifti, write_measurement
    from recon3d.operators.noise import PoissonNoise
    from recon3d.operators.simulate import simulate_ct

    x, grid = read_nifti(volume, "hu", mu_water_per_mm)
    if rows is not None:
        first, colon, end = rows.partition(":")
        if not (colon and first.isdigit() and end.isdigit() and int(first) < int(end) <= grid.shape[0]):
            raise ConfigError(f"--rows {rows}: expected first:end within 0:{grid.shape[0]}")
        x, grid = x[int(first) : int(end)], grid.slab(int(first), int(end))
    fan = source_to_axis_mm is not None
    sod = source_to_axis_mm or 1.0
    sdd = source_to_detector_mm or 2 * sod
    pitch = detector_spacing_mm or min(grid.pixel_mm) * (sdd / sod if fan else 1.0)
    radius = math.hypot(grid.shape[1] * grid.spacing_mm[1], grid.shape[2] * grid.spacing_mm[2]) / 2
    if fan and radius >= sod:
        raise ConfigError(
            f"--source-to-axis-mm {sod:g}: the source must lie outside the volume, at least {radius:.0f} mm"
        )
    reach = sdd * math.tan(math.asin(radius / sod)) if fan else radius
    cells = detector or 2 * math.ceil(reach / pitch) + 1
    angles = equiangular(views, math.radians(range_deg or (360.0 if fan else 180.0)))
    geometry = FanBeam(angles, cells, pitch, 0.0, sod, sdd) if fan else ParallelBeam(angles, cells, pitch)
    noise = None if photons is None else PoissonNoise(photons)
    y = simulate_ct(x, grid, geometry, noise, seed)
    write_measurement(output, Measurement(y, geometry, grid, photons, "recon3d"))
    typer.echo(f"{output}: {y.shape[0]} slices, {views} views, {cells} cells of {pitch:.4g} mm")


def _show(results: dict[str, Any], as_json: bool) -> None:
    if as_json:
        import json

        typer.echo(json.dumps(results, indent=2))
    else:
        from recon3d.report import markdown, metrics_table

        typer.echo(markdown(*metrics_table(results)))

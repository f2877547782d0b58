"""The smaller verbs: demo, train, metrics, baseline, simulate."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer


def add_to(app: typer.Typer) -> None:
    """Register the verbs."""
    for verb in (demo, train, metrics, baseline, osem, fbp, simulate):
        app.command()(verb)


def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder; one folder per job goes in it.")],
    measured: Annotated[
        list[Path] | None, typer.Option("--measured", help="File of measured projections or k-space.")
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="A few slices of the chest, one acceleration of the brain, a coarse body.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar.")] = False,
) -> None:
    """Reconstruct a chest from few views, a brain from undersampled k-space, a body from counts, and measured files."""
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
    tensorboard: Annotated[Path | None, typer.Option(help="Folder for TensorBoard, which must be installed.")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar.")] = False,
) -> None:
    """Train a prior on slices of volumes; the same command goes on with an interrupted run. torchrun shares it out."""
    import os

    from recon3d.cli.progress import stop_signals, training_bar
    from recon3d.config import read_yaml, validate
    from recon3d.priors.training import TensorBoard, TrainConfig
    from recon3d.priors.training import train as run

    raw = read_yaml(config) | ({"device": device} if device else {})
    settings = validate(TrainConfig, raw, str(config))
    first = os.environ.get("RANK", "0") == "0"  # of the processes that torchrun started one alone speaks
    if settings.budget_minutes is not None and first and not quiet:
        typer.echo("budget_minutes follows the clock: resumed, the run ends with other bits; steps does not", err=True)
    board = TensorBoard(tensorboard) if tensorboard is not None and first else None
    with stop_signals() as stop, training_bar(quiet or not first) as listen:

        def told(progress: Any) -> None:
            listen(progress)
            if board is not None:
                board(progress)

        result = run(settings, told, stop)
    if not result.finished:
        from recon3d.engine.executor import Interrupted

        raise Interrupted(f"interrupted; go on with: recon3d train {config}")
    if first:
        early = " (stopped early: the held-out loss fell no more)" if result.stopped_early else ""
        typer.echo(f"{result.prior}: trained prior{early}")


def metrics(
    volume: Annotated[Path, typer.Argument(help="NIfTI volume.")],
    reference: Annotated[Path, typer.Argument(help="NIfTI volume it should equal.")],
    unit: Annotated[str, typer.Option(help="hu, or au (arbitrary units, such as magnitudes of MRI).")] = "hu",
    data_range: Annotated[
        float | None, typer.Option(help="Range of PSNR and SSIM; by default 2000 HU, for au that of the reference.")
    ] = None,
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
    if unit == "au" and data_range is None:
        data_range = float(truth.max() - truth.min())
    found = figures.compare(x, truth, grid, data_range, unit="hu" if unit == "hu" else "au")
    _show({volume.name: found}, json_)


def baseline(
    method: Annotated[
        str,
        typer.Argument(help="CT: fbp, sirt or tv; MRI: zero_filled, cg_sense or cs; PET: fbp, mlem or osem."),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="NIfTI volume to write.")],
    input_: Annotated[Path | None, typer.Option("--input", "-i", help="Sinogram, k-space or counts.")] = None,
    config: Annotated[
        Path | None, typer.Option("--config", "-c", help="Job file; recipe and prior are ignored.")
    ] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", "-s", help="section.key=value, repeatable.")] = None,
    iterations: Annotated[int | None, typer.Option(help="Of sirt, tv, cg_sense and cs; passes of mlem, osem.")] = None,
    strength: Annotated[float | None, typer.Option(help="Of tv and cs, dimensionless.")] = None,
    subsets: Annotated[int | None, typer.Option(help="Of osem, 14 unless given.")] = None,
    rdp: Annotated[float | None, typer.Option(help="Of osem: relative difference prior in 3D, dimensionless.")] = None,
) -> None:
    """Reconstruct with a classical method, to compare with."""
    given = {"iterations": iterations, "strength": strength, "subsets": subsets, "rdp": rdp}
    _baseline(method, output, input_, config, set_, given)


def osem(
    output: Annotated[Path, typer.Option("--output", "-o", help="NIfTI volume to write.")],
    input_: Annotated[Path | None, typer.Option("--input", "-i", help="Counts: a file or a folder.")] = None,
    config: Annotated[Path | None, typer.Option("--config", "-c", help="Job file.")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", "-s", help="section.key=value, repeatable.")] = None,
    iterations: Annotated[int, typer.Option(help="Passes over all counts.")] = 2,
    subsets: Annotated[int, typer.Option(help="Subsets of the views; 1 is MLEM.")] = 14,
    rdp: Annotated[float, typer.Option(help="Weight of the relative difference prior in 3D; 0.01 to 0.3.")] = 0.0,
) -> None:
    """PET by ordered-subsets EM, with the relative difference prior where a weight is given."""
    _baseline("osem", output, input_, config, set_, {"iterations": iterations, "subsets": subsets, "rdp": rdp})


def fbp(
    output: Annotated[Path, typer.Option("--output", "-o", help="NIfTI volume to write.")],
    input_: Annotated[Path | None, typer.Option("--input", "-i", help="Sinogram or counts.")] = None,
    config: Annotated[Path | None, typer.Option("--config", "-c", help="Job file.")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", "-s", help="section.key=value, repeatable.")] = None,
) -> None:
    """Filtered back projection, of PET after rebinning: for a look."""
    _baseline("fbp", output, input_, config, set_, {})


def _baseline(
    method: str, output: Path, input_: Path | None, config: Path | None, set_: list[str] | None, options: dict[str, Any]
) -> None:
    from recon3d.cli import classical
    from recon3d.config import load_config

    job = load_config(config, set_ or (), {} if input_ is None else {"input.path": str(input_)})
    seconds = classical.run(method, job, output, {k: v for k, v in options.items() if v is not None})
    typer.echo(f"{output}: {method} in {seconds:.1f} s")


def simulate(
    volume: Annotated[
        Path,
        typer.Argument(help="NIfTI volume: HU for a sinogram, a magnitude for k-space, activity for counts."),
    ],
    output: Annotated[
        Path,
        typer.Option("--output", "-o", help="Measurement to write: .h5, a sinogram also .npz; counts a folder."),
    ],
    views: Annotated[int | None, typer.Option(help="CT: number of views, 60 by default.")] = None,
    photons: Annotated[
        float | None, typer.Option(help="CT: mean count of an unattenuated ray; without it no noise.")
    ] = None,
    detector: Annotated[int | None, typer.Option(help="CT: cells; enough for the diagonal by default.")] = None,
    detector_spacing_mm: Annotated[float | None, typer.Option(help="CT: default the pixel, magnified.")] = None,
    range_deg: Annotated[float | None, typer.Option(help="CT: default 180 for parallel, 360 for fan.")] = None,
    source_to_axis_mm: Annotated[float | None, typer.Option(help="CT: makes it a fan beam.")] = None,
    source_to_detector_mm: Annotated[
        float | None, typer.Option(help="CT: fan beam; default twice source_to_axis_mm.")
    ] = None,
    mu_water_per_mm: Annotated[float | None, typer.Option(help="CT: attenuation of water, default 0.0193.")] = None,
    coils: Annotated[int | None, typer.Option(help="MRI: makes it k-space of so many coils.")] = None,
    acceleration: Annotated[float | None, typer.Option(help="MRI: columns over those sampled, default 1.")] = None,
    centre_fraction: Annotated[float | None, typer.Option(help="MRI: part kept in the centre, default 0.08.")] = None,
    noise: Annotated[
        float | None,
        typer.Option(help="MRI: spread of a sample over the volume's 99.9th percentile, default 0."),
    ] = None,
    scanner: Annotated[
        str | None, typer.Option(help="PET: makes it counts of this scanner: mmr, mct, vision, signa, d690 or small.")
    ] = None,
    counts: Annotated[float | None, typer.Option(help="PET: expected prompts, 1e7 by default.")] = None,
    mu: Annotated[Path | None, typer.Option(help="PET: attenuation map, NIfTI or Interfile.")] = None,
    span: Annotated[int | None, typer.Option(help="PET: ring differences of a segment, default 1.")] = None,
    max_ring_difference: Annotated[int | None, typer.Option(help="PET: default as many as fill segments.")] = None,
    mashing: Annotated[int | None, typer.Option(help="PET: views that are added up, default 1.")] = None,
    tof: Annotated[
        bool | None, typer.Option("--tof/--no-tof", help="PET: time of flight, where the scanner has it.")
    ] = None,
    scatter_fraction: Annotated[float | None, typer.Option(help="PET: of true and scattered, default 0.2.")] = None,
    randoms_fraction: Annotated[float | None, typer.Option(help="PET: of all prompts, default 0.2.")] = None,
    psf_fwhm_mm: Annotated[float | None, typer.Option(help="PET: resolution of the scanner, default 4.5.")] = None,
    rows: Annotated[str | None, typer.Option(help="first:end, slices to take.")] = None,
    seed: Annotated[int, typer.Option(help="Of the noise.")] = 0,
) -> None:
    """Make a noisy measurement of a volume: a sinogram on finer pixels, k-space of several coils, or counts."""
    from recon3d.cli import simulated
    from recon3d.config import ConfigError

    ct = {
        "views": views, "photons": photons, "detector": detector, "detector-spacing-mm": detector_spacing_mm,
        "range-deg": range_deg, "source-to-axis-mm": source_to_axis_mm,
        "source-to-detector-mm": source_to_detector_mm, "mu-water-per-mm": mu_water_per_mm,
    }  # fmt: skip
    mri = {"coils": coils, "acceleration": acceleration, "centre-fraction": centre_fraction, "noise": noise}
    pet: dict[str, Any] = {
        "scanner": scanner, "counts": counts, "mu": mu, "span": span, "max-ring-difference": max_ring_difference,
        "mashing": mashing, "tof": tof, "scatter-fraction": scatter_fraction, "randoms-fraction": randoms_fraction,
        "psf-fwhm-mm": psf_fwhm_mm,
    }  # fmt: skip
    groups: dict[str, dict[str, Any]] = {
        "is for CT": ct,
        "is for k-space, which --coils asks for": mri,
        "is for PET, which --scanner asks for": pet,
    }
    mine = pet if scanner is not None else mri if coils is not None else ct
    for reason, group in groups.items():
        for name, value in group.items():
            if group is not mine and value is not None:
                raise ConfigError(f"--{name}: {reason}")
    if scanner is not None:
        given = {name.replace("-", "_"): value for name, value in pet.items() if value is not None}
        typer.echo(simulated.counts(volume, output, rows=rows, seed=seed, **given))
        return
    if coils is not None:
        sampling = (acceleration or 1.0, 0.08 if centre_fraction is None else centre_fraction)
        typer.echo(simulated.kspace(volume, output, coils, *sampling, noise or 0.0, rows, seed))
        return
    water = mu_water_per_mm or 0.0193
    typer.echo(
        simulated.sinogram(
            volume, output, views or 60, photons, detector, detector_spacing_mm, range_deg, source_to_axis_mm,
            source_to_detector_mm, rows, seed, water,
        )
    )  # fmt: skip


def _show(results: dict[str, Any], as_json: bool) -> None:
    if as_json:
        import json

        typer.echo(json.dumps(results, indent=2))
    else:
        from recon3d.report import markdown, metrics_table

        typer.echo(markdown(*metrics_table(results)))

"""The verbs that run jobs: recon, resume, plan, info. Heavy imports wait until a verb needs them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from recon3d.cli import converted, enhanced, tools, weights

if TYPE_CHECKING:
    from recon3d.api import Result

app = typer.Typer(
    name="recon3d",
    help="Whole CT, MRI and PET volumes from few, noisy or incomplete measurements, with 2D diffusion priors.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    epilog="Exit codes: 0 done, 2 usage, 3 bad input, 4 memory or disk, 5 numerical failure, 130 interrupted.",
)

Config = Annotated[Path | None, typer.Option("--config", "-c", help="Job file in YAML.")]
Input = Annotated[
    Path | None, typer.Option("--input", "-i", help="Sinogram, k-space or counts; the content tells the format.")
]
Recipe = Annotated[str | None, typer.Option(help="Packaged recipe or a YAML file.")]
Prior = Annotated[str | None, typer.Option(help="Packaged prior or a folder.")]
Device = Annotated[str | None, typer.Option(help="auto, cpu or cuda.")]
Sets = Annotated[list[str] | None, typer.Option("--set", "-s", help="section.key=value, repeatable.")]
Force = Annotated[bool, typer.Option("--force", help="Discard what the folder holds; go on beyond free memory.")]
Samples = Annotated[
    int | None,
    typer.Option(help="Runs with other random numbers; of several, mean, standard deviation and 90 % interval."),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar.")]


@app.callback()
def main(debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False) -> None:
    """Taken off the line before it comes here; listed for the help."""


@app.command()
def recon(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the run.")],
    input_: Input = None,
    recipe: Recipe = None,
    prior: Prior = None,
    device: Device = None,
    samples: Samples = None,
    config: Config = None,
    set_: Sets = None,
    force: Force = False,
    quiet: Quiet = False,
) -> None:
    """Reconstruct a volume. The same command on an unfinished run goes on with it."""
    from recon3d.config import load_config

    job = load_config(config, set_ or (), _given(input_, recipe, prior, device, samples))
    run_in(job, output, force, quiet)


@app.command()
def resume(
    folder: Annotated[Path, typer.Argument(help="Folder of an unfinished run.")],
    device: Device = None,
    samples: Annotated[int | None, typer.Option(help="Of a run of several samples: another number of them.")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", "-s", help="compute.* and checkpoint.* only.")] = None,
    quiet: Quiet = False,
) -> None:
    """Go on with an interrupted run; the result is the uninterrupted one's to the bit."""
    from recon3d.config import ConfigError, load_config
    from recon3d.engine.folder import CONFIG, RunFolder

    status = RunFolder(folder).status
    if status == "new":
        raise ConfigError(f"{folder}: there is no run to resume; start one with recon3d recon")
    if status == "complete":
        typer.echo(f"{folder}: already complete")
        return
    for text in set_ or ():
        if not text.startswith(("compute.", "checkpoint.")):
            raise ConfigError(f"--set {text}: a run can only be resumed with other compute.* and checkpoint.* settings")
    job = load_config(folder / CONFIG, set_ or (), _given(None, None, None, device, samples))
    run_in(job, folder, False, quiet)


@app.command()
def plan(
    input_: Input = None,
    recipe: Recipe = None,
    prior: Prior = None,
    device: Device = None,
    samples: Samples = None,
    config: Config = None,
    set_: Sets = None,
    probe: Annotated[bool, typer.Option(help="Time one slice; without it only memory is predicted.")] = True,
    json_: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say how much memory and time a job will take, before it is started."""
    from recon3d.api import plan_job
    from recon3d.config import load_config

    job = load_config(config, set_ or (), _given(input_, recipe, prior, device, samples))
    found = plan_job(job, probe=probe)
    if json_:
        import json

        typer.echo(json.dumps(found.as_dict(), indent=2))
    else:
        typer.echo(found.text())


@app.command()
def info(file: Annotated[Path | None, typer.Argument(help="Describe this file or run folder instead.")] = None) -> None:
    """Show versions, kernels, devices, priors and recipes; or describe a file."""
    from recon3d.cli import about

    typer.echo(about.describe(file) if file is not None else about.installation())


app.command()(enhanced.enhance)
app.command()(converted.convert_modality)
tools.add_to(app)
app.add_typer(weights.app)


def _given(
    input_: Path | None, recipe: str | None, prior: str | None, device: str | None, samples: int | None
) -> dict[str, Any]:
    values = {
        "input.path": None if input_ is None else str(input_),
        "recipe": recipe,
        "prior": prior,
        "compute.device": device,
        "samples": samples,
    }
    return {key: value for key, value in values.items() if value is not None}


def run_in(job: Any, output: Path, force: bool, quiet: bool) -> None:
    """Run a job in a folder, with a progress bar and a line about the result."""
    import warnings

    from recon3d.api import resolve, run_job
    from recon3d.cli.progress import progress_bar, stop_signals
    from recon3d.engine.executor import Interrupted
    from recon3d.engine.memory import tame_allocator

    tame_allocator()
    job = resolve(job)  # mistakes are told before a bar appears
    try:
        # warnings arrive as events, once, instead of as Python's two lines with a source path
        with warnings.catch_warnings(), stop_signals() as stop, progress_bar(quiet) as listen:
            warnings.simplefilter("ignore")
            result = run_job(job, output, force=force, listeners=(listen,), stop=stop)
    except Interrupted:
        raise Interrupted(f"interrupted; go on with: recon3d resume {output}") from None
    if not quiet:
        typer.echo(_summary(result, output))


def _summary(result: Result, output: Path) -> str:
    t = result.timings
    nz, ny, nx = result.grid.shape
    several = "" if result.uncertainty is None else f"mean of {result.uncertainty.samples} samples, "
    return (
        f"{output / 'volume.nii.gz'}: {several}{nz} x {ny} x {nx} voxels in {t.total:.1f} s, "
        f"{100 * t.outside_network:.0f} % of it outside the network; "
        f"peak memory {result.peak_memory_bytes / 2**30:.2f} GiB"
    )

"""What `recon3d info` says about this installation, or about a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def installation() -> str:
    """Versions, kernels with the reason for each gap, devices, priors and recipes."""
    import torch

    from recon3d.engine import folder
    from recon3d.engine.executor import usable_cores
    from recon3d.engine.memory import available_bytes
    from recon3d.priors import packaged_priors
    from recon3d.recipes import recipe_names

    cuda = torch.cuda.is_available()
    lines = ["versions   " + ", ".join(f"{name} {version}" for name, version in folder.versions().items())]
    machine = folder.hardware("cuda" if cuda else "cpu")
    lines.append(
        f"machine    {machine['processor']}, {usable_cores()} cores, {available_bytes() / 2**30:.1f} of "
        f"{machine['memory_gib']:.1f} GiB memory free"
    )
    if cuda:
        for k in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(k)
            lines.append(f"cuda:{k}     {properties.name}, {properties.total_memory / 2**30:.0f} GiB")
    else:
        lines.append("cuda       none" + ("" if torch.version.cuda else ": this torch is built without CUDA"))
    lines += ["", *_kernels(cuda), ""]
    lines.append("priors     " + (", ".join(packaged_priors()) or "none packaged"))
    lines.append("recipes    " + ", ".join(recipe_names()))
    return "\n".join(lines)


def _kernels(cuda: bool) -> list[str]:
    import recon3d.ops  # noqa: F401 - defines the ops
    from recon3d.ops import _library

    table = _library.backends()
    error = _library.build_error()
    width = max(len(name) for name in table)
    lines = [f"{'op':{width}}  reference  cpu  cuda"]
    for name, has in table.items():
        marks = ["yes" if has[key] else "-" for key in ("reference", "cpu", "cuda")]
        lines.append(f"{name:{width}}  {marks[0]:9}  {marks[1]:3}  {marks[2]}")
    for key in ("cpu", "cuda"):
        gaps = [name for name, has in table.items() if not has[key]]
        if gaps:
            lines.append(f"no {key} kernel for {', '.join(gaps)}: {_reason(key, error, cuda)}")
    return lines


def _reason(key: str, error: str | None, gpu: bool) -> str:
    if error:
        return error.splitlines()[0]
    if key == "cpu":
        return "none is needed or none is written; the torch reference runs"
    return "nvcc or triton was not found when kernels were built" if gpu else "there is no GPU here to run them on"


def describe(path: Path) -> str:
    """A run folder, a volume, a prior, or a file or folder of measurements, in a few lines.

    Raises:
        BadInput: it is none of these, or damaged.
    """
    from recon3d.engine.folder import CONFIG, MANIFEST
    from recon3d.io import BadInput
    from recon3d.io.dicom import is_dicom
    from recon3d.io.pet_folder import is_pet_folder

    if path.is_dir():
        if (path / MANIFEST).exists() or (path / CONFIG).exists():
            return _run(path)
        if (path / "card.json").exists():
            return _prior(path)
        if not (is_pet_folder(path) or is_dicom(path)):
            hint = "give a run folder, a prior folder, a folder of PET counts or of a DICOM series, or a file"
            raise BadInput(path, "is neither a run nor a prior nor a measurement", hint)
    from recon3d import io

    found = io.describe(path)
    width = max(len(name) for name in found)
    return "\n".join(f"{name:{width}}  {_shown(value)}" for name, value in found.items())


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return "".join(f"\n    {name}  {_shown(inner)}" for name, inner in value.items())
    if isinstance(value, (list, tuple)) and value and not isinstance(value[0], (list, tuple, dict)):
        between = "; " if isinstance(value[0], str) else " x "
        return between.join(f"{v:.5g}" if isinstance(v, float) else str(v) for v in value)
    return str(value)


def _prior(path: Path) -> str:
    from recon3d.priors.checkpoints import read_folder

    card, _ = read_folder(path)
    spacing = "any spacing" if card.spacing_mm is None else f"{card.spacing_mm[0]:g} to {card.spacing_mm[1]:g} mm"
    lines = [f"{path}: prior {card.name!r}, {card.plane} slices, {spacing}"]
    if card.parameters:
        lines.append(f"parameters   {card.parameters / 1e6:.2f} million")
    lines += [card.statement] if card.statement else []
    return "\n".join([*lines, *(f"from         {source}" for source in card.attribution)])


def _run(path: Path) -> str:
    from recon3d.engine.events import read_events
    from recon3d.engine.folder import EVENTS, RunFolder, read_manifest

    folder = RunFolder(path)
    lines = [f"{path}: {folder.status} run"]
    manifest: dict[str, Any] | None = read_manifest(path)
    if manifest is not None:
        timings = manifest.get("timings", {})
        lines.append(f"recipe       {manifest.get('recipe', {}).get('name', '?')}")
        peak = manifest.get("peak_memory_bytes", 0) / 2**30
        lines.append(f"time         {timings.get('total_s', 0)} s, peak memory {peak:.2f} GiB")
        lines += [f"output       {name} {entry['bytes']} bytes" for name, entry in manifest.get("outputs", {}).items()]
        return "\n".join(lines)
    events = read_events(path / EVENTS)
    if events:
        last = {k: v for k, v in events[-1].items() if k != "time_s"}
        lines.append(f"last event   {last.pop('event')} " + ", ".join(f"{k} {v}" for k, v in last.items()))
    lines.append(f"go on with   recon3d resume {path}")
    return "\n".join(lines)

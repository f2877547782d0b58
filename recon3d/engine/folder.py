"""The folder of one run: what is in it, whose it is, and when it is complete.

config.resolved.yaml   the job with every default written out
events.jsonl           what happened, one line each
checkpoint/            the state of an unfinished run; removed once the run is complete
volume.nii.gz (and phase.nii.gz of complex images), preview.png, metrics.json
std.nii.gz, low.nii.gz, high.nii.gz, sample_0000.nii.gz, ...: of a run of several samples
manifest.json          written last: the run is complete when it exists, and only then
"""

from __future__ import annotations

import hashlib
import json
import platform
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from recon3d import __version__
from recon3d.config import ConfigError
from recon3d.engine.checkpoint import Checkpoint, disk_errors, locked, sha256_file, sweep, write_atomically, write_json
from recon3d.engine.events import Events, Listener

MANIFEST, CONFIG, EVENTS, CHECKPOINT = "manifest.json", "config.resolved.yaml", "events.jsonl", "checkpoint"
OUTPUTS = ("volume.nii.gz", "phase.nii.gz", "std.nii.gz", "low.nii.gz", "high.nii.gz", "preview.png", "metrics.json")
SAMPLES = "sample_[0-9][0-9][0-9][0-9].nii.gz"

Status = Literal["new", "unfinished", "complete"]


class RunFolder:
    """A run's folder; use `open` to work in it.

    Args:
        path: made when first opened.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.events = Events()

    @property
    def status(self) -> Status:
        """New, unfinished or complete, by the files that are there."""
        if (self.path / MANIFEST).exists():
            return "complete"
        return "unfinished" if (self.path / CONFIG).exists() else "new"

    @contextmanager
    def open(self, *listeners: Listener, force: bool = False) -> Iterator[RunFolder]:
        """Hold the folder for this process: made, locked, stale temporary files swept, events opened.

        Args:
            listeners: of the run's events.
            force: remove what an earlier run left.

        Raises:
            ConfigError: it holds a complete run and `force` is not set.
            ResourceError: another process works in it, or the disk is full or read-only.
        """
        with disk_errors(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            with locked(self.path):
                self.refuse_complete(force)
                if force:
                    self.clear()
                sweep(self.path)
                self.events = Events(self.path / EVENTS, listeners)
                try:
                    yield self
                finally:
                    self.events.close()

    def refuse_complete(self, force: bool) -> None:
        """Raise ConfigError when a complete run is here and may not be overwritten."""
        if self.status == "complete" and not force:
            raise ConfigError(f"{self.path}: holds a complete run; choose another folder, or overwrite it with --force")

    def checkpoint(self, fingerprint: Mapping[str, str]) -> Checkpoint:
        """The run's checkpoint, which only the same job may read."""
        return Checkpoint(self.path / CHECKPOINT, fingerprint)

    def clear(self) -> None:
        """Remove what a run left, and nothing else; the manifest goes first."""
        for name in (MANIFEST, CONFIG, EVENTS, *OUTPUTS):
            (self.path / name).unlink(missing_ok=True)
        for sample in self.path.glob(SAMPLES):
            sample.unlink()
        if (self.path / CHECKPOINT).is_dir():
            shutil.rmtree(self.path / CHECKPOINT)

    def write_config(self, text: str) -> None:
        """Publish config.resolved.yaml."""
        write_atomically(self.path / CONFIG, lambda file: file.write(text.encode()))

    def write_manifest(self, content: Mapping[str, Any]) -> None:
        """Publish manifest.json with the digests of all outputs, which completes the run; the checkpoint goes after."""
        outputs = {
            name: {"sha256": sha256_file(self.path / name), "bytes": (self.path / name).stat().st_size}
            for name in (*OUTPUTS, *sorted(path.name for path in self.path.glob(SAMPLES)))
            if (self.path / name).exists()
        }
        write_json(self.path / MANIFEST, {**content, "outputs": outputs})
        if (self.path / CHECKPOINT).is_dir():
            shutil.rmtree(self.path / CHECKPOINT, ignore_errors=True)


def read_manifest(path: Path) -> dict[str, Any] | None:
    """The manifest of a complete run, or None."""
    try:
        content = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def fingerprint(meaning: Mapping[str, Any], inputs: Mapping[str, str], prior: str, device: str) -> dict[str, str]:
    """What a checkpoint belongs to: digests of resolved config, inputs and prior, the version, the kind of device."""
    text = json.dumps(meaning, sort_keys=True)
    everything = json.dumps(dict(inputs), sort_keys=True)
    return {
        "config": hashlib.sha256(text.encode()).hexdigest(),
        "inputs": hashlib.sha256(everything.encode()).hexdigest(),
        "prior": prior,
        "version": __version__,
        "device": device,
    }


def versions() -> dict[str, str]:
    """Versions of recon3d, Python and the packages results can depend on."""
    found = {"recon3d": __version__, "python": platform.python_version()}
    for name in ("torch", "numpy", "triton", "pydantic", "safetensors", "nibabel", "h5py"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def hardware(device: str) -> dict[str, Any]:
    """The machine in words: processor, cores, memory, and the GPU when one is used."""
    import psutil

    from recon3d.engine.executor import usable_cores

    found: dict[str, Any] = {
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "cores": usable_cores(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "device": device,
    }
    if device.startswith("cuda"):
        import torch

        found["gpu"] = torch.cuda.get_device_name(device)
        found["cuda"] = torch.version.cuda
    return found


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or "unknown"

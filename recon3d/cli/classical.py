"""What `recon3d baseline` runs: a classical method on the measurement that a job names."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from recon3d import baselines
from recon3d.config import ConfigError, JobConfig
from recon3d.engine.events import Events
from recon3d.engine.scan import load_scan
from recon3d.io import write_nifti

# options each method takes
_TAKES = {"fbp": (), "sirt": ("iterations",), "tv": ("iterations", "strength")}


def run(method: str, config: JobConfig, output: Path, options: dict[str, Any]) -> float:
    """Reconstruct and write a volume; gives the seconds of the reconstruction.

    Raises:
        ConfigError: the method or an option of it does not exist.
        BadInput: the measurement cannot be used.
    """
    if method not in _TAKES:
        raise ConfigError(f"baseline {method!r}: there are {', '.join(_TAKES)}")
    for name in options:
        if name not in _TAKES[method]:
            raise ConfigError(f"baseline {method}: takes no --{name}")
    if not output.name.endswith((".nii", ".nii.gz")):
        raise ConfigError(f"--output {output}: the name must end in .nii or .nii.gz")
    scan = load_scan(config, Events())
    scan.check()
    operator, y, weights = scan.operator(), scan.y.to(scan.device), scan.weights()
    weights = None if weights is None else weights.to(scan.device)
    start = time.perf_counter()
    if method == "fbp":
        volume = baselines.fbp(y, operator)
    elif method == "sirt":
        volume = baselines.sirt(y, operator, weights=weights, **options)
    else:
        volume = baselines.tv3d(y, operator, weights=weights, **options)
    seconds = time.perf_counter() - start
    write_nifti(
        output,
        volume.cpu(),
        scan.grid,
        unit=config.output.unit,
        mu_water_per_mm=config.output.mu_water_per_mm,
    )
    return seconds

"""What `recon3d baseline` runs: a classical method on the measurement that a job names."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from recon3d import baselines
from recon3d.config import ConfigError, JobConfig
from recon3d.engine.events import Events
from recon3d.engine.scan import Modality, load_scan
from recon3d.operators.base import LinearOperator

# the method, and the options it takes besides measurement, operator and weights
_METHODS: dict[Modality, dict[str, tuple[Callable[..., Tensor], tuple[str, ...]]]] = {
    "ct": {
        "fbp": (lambda y, operator, weights: baselines.fbp(y, operator), ()),
        "sirt": (baselines.sirt, ("iterations",)),
        "tv": (baselines.tv3d, ("iterations", "strength")),
    },
    "mri": {
        "zero_filled": (baselines.zero_filled, ()),
        "cg_sense": (baselines.cg_sense, ("iterations",)),
        "cs": (baselines.cs, ("iterations", "strength")),
    },
    "pet": {
        "fbp": (lambda y, operator, weights: operator.pinv(y), ()),
        "mlem": (lambda y, operator, weights, **given: baselines.mlem(y, operator, **given), ("iterations",)),
        "osem": (lambda y, operator, weights, **given: _osem(y, operator, **given), ("iterations", "subsets", "rdp")),
    },
    "image": {
        "pinv": (lambda y, operator, weights: operator.pinv(y), ()),
        "dip": (lambda y, operator, weights, **given: _dip(y, operator, weights, **given), ("iterations",)),
    },
}


def _osem(y: Tensor, operator: LinearOperator, iterations: int = 2, subsets: int = 14, rdp: float = 0.0) -> Tensor:
    """Ordered-subsets EM, with the relative difference prior in 3D where rdp is not 0."""
    subsets = min(subsets, y.shape[0])
    if rdp:
        return baselines.osem_rdp(y, operator, rdp, iterations, subsets)
    return baselines.osem(y, operator, iterations, subsets)


def _dip(y: Tensor, operator: LinearOperator, weights: Tensor | None, iterations: int = 600) -> Tensor:
    """Deep image prior, stopped at the noise that the weights tell."""
    return baselines.dip(y, operator, None if weights is None else float(weights) ** -0.5, iterations)


def run(method: str, config: JobConfig, output: Path, options: dict[str, Any]) -> float:
    """Reconstruct and write a volume (a magnitude for MRI, Bq/mL for PET); gives the seconds of the reconstruction.

    Raises:
        ConfigError: the method or an option of it does not exist, or it is for another kind of measurement.
        BadInput: the measurement cannot be used.
    """
    names = list(dict.fromkeys(name for methods in _METHODS.values() for name in methods))
    if method not in names:
        raise ConfigError(f"baseline {method!r}: there are {', '.join(names)}")
    for name in options:
        if not any(name in methods[method][1] for methods in _METHODS.values() if method in methods):
            raise ConfigError(f"baseline {method}: takes no --{name}")
    if not output.name.endswith((".nii", ".nii.gz")):
        raise ConfigError(f"--output {output}: the name must end in .nii or .nii.gz")
    scan = load_scan(config, Events())
    if method not in _METHODS[scan.modality]:
        raise ConfigError(
            f"baseline {method}: {config.input.path} is a measurement of {scan.modality.upper()}; for it there are "
            f"{', '.join(_METHODS[scan.modality])}"
        )
    scan.check()
    operator, y, weights = scan.operator(), scan.y.to(scan.device), scan.weights()
    weights = None if weights is None else weights.to(scan.device)
    start = time.perf_counter()
    volume = _METHODS[scan.modality][method][0](y, operator, weights=weights, **options)
    seconds = time.perf_counter() - start
    scan.save(output, volume.cpu() if scan.modality != "pet" else scan.finish(volume).cpu(), config.output)
    return seconds

"""Runs of seconds for the tests of training: discs in air, a network of a thousand weights."""

from __future__ import annotations

import multiprocessing
import os
import signal
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import nibabel
import numpy as np

from recon3d.priors.training import TrainConfig, loop


def discs(seed: int, shape: tuple[int, int, int] = (40, 36, 6)) -> np.ndarray:
    """Discs of soft tissue in air, in HU; [x, y, z]."""
    rng = np.random.default_rng(seed)
    x, y, _ = np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij")
    hu = np.full(shape, -1000.0)
    hu[(x / 0.8) ** 2 + (y / 0.7) ** 2 < 1] = 40
    for _k in range(3):
        cx, cy = rng.uniform(-0.4, 0.4, 2)
        hu[(x - cx) ** 2 + (y - cy) ** 2 < 0.03] = rng.choice([-800, 400])
    return hu.astype(np.float32)


def save(path: Path, values: np.ndarray, spacing: tuple[float, float, float] = (1.0, 1.0, 3.0)) -> None:
    """A NIfTI file whose voxel axes run to the left, to the back and to the head."""
    affine = np.diag([-spacing[0], -spacing[1], spacing[2], 1.0])
    nibabel.save(nibabel.Nifti1Image(values.astype(np.int16), affine), path)


def raw(folder: Path) -> dict[str, Any]:
    """The YAML of a run on two volumes and a held-out one, which are written."""
    for name, seed in (("train0", 0), ("train1", 1), ("held", 9)):
        save(folder / f"{name}.nii.gz", discs(seed))
    return {
        "out": str(folder / "run"),
        "seed": 4,
        "workers": 1,
        "steps": 8,
        "network": {"channels": [8, 16], "blocks": 1, "embedding": 16, "group_size": 8},
        "data": {"root": str(folder), "validation": "held.nii.gz", "sources": [{"path": "*.nii.gz"}]},
        "crops": [{"size": 16, "batch": 4}],
        "warmup_steps": 3,
        "save_every_steps": 2,
        "validate_every_steps": 100,
        "validation_slices": 2,
        "validation_sigmas": [0.1, 0.5],
        "samples": 0,
        "bfloat16": False,
    }


def config(settings: dict[str, Any], **changes: Any) -> TrainConfig:
    return TrainConfig.model_validate({**settings, **changes})


# processes of their own without the seconds that importing torch takes each of them
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["recon3d.priors.training.loop"])


def tell_steps(settings: dict[str, Any], told: Connection) -> None:
    """A process that trains and sends the number of every step."""
    loop.train(TrainConfig.model_validate(settings), lambda p: told.send(p.step))


def member(settings: dict[str, Any], rank: int, size: int, port: int, out: str, die: int) -> None:
    """One of several processes, told what torchrun tells; kills itself after step `die`, else leaves its weights."""
    from safetensors.torch import save_file

    ranks = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({k: str(v) for k, v in ranks.items()})
    step = loop._Run._step

    def watched(run: loop._Run) -> float:
        rate = step(run)
        if run.state.count.step == die:
            os.kill(os.getpid(), signal.SIGKILL)
        if run.state.count.step == run.config.steps:
            weights = {k: p.detach().contiguous().clone() for k, p in run.state.named.items()}
            save_file(weights, out, {"loss": repr(run.state.count.loss)})
        return rate

    loop._Run._step = watched  # type: ignore[method-assign]
    loop.train(TrainConfig.model_validate(settings))

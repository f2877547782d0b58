"""Training of slice priors: `train(TrainConfig.load(path))`."""

from __future__ import annotations

from recon3d.priors.training.config import TrainConfig
from recon3d.priors.training.loop import Progress, TrainResult, train

__all__ = ["Progress", "TrainConfig", "TrainResult", "train"]

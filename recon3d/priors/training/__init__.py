"""Training of slice priors: `train(TrainConfig.load(path))`."""

from __future__ import annotations

from recon3d.priors.training.config import TrainConfig
from recon3d.priors.training.loop import Progress, TrainResult, train
from recon3d.priors.training.tensorboard import TensorBoard

__all__ = ["Progress", "TensorBoard", "TrainConfig", "TrainResult", "train"]

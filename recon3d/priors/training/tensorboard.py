"""Curves of a run for TensorBoard: `train(config, TensorBoard(folder))`."""

from __future__ import annotations

from pathlib import Path

from recon3d.priors.training.loop import Progress

__all__ = ["TensorBoard"]


class TensorBoard:
    """A progress callback that writes scalars: loss, rate, speed, and the denoising PSNR of validations.

    Args:
        folder: where TensorBoard looks; a resumed run goes on in it.
        every: steps from one point of the training curves to the next.

    Raises:
        ImportError: the package tensorboard is not installed.
    """

    def __init__(self, folder: str | Path, every: int = 20) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise ImportError("TensorBoard needs the package tensorboard: pip install recon3d[tensorboard]") from None
        self.every = every
        self._writer = SummaryWriter(str(folder))

    def __call__(self, progress: Progress) -> None:
        scalars: dict[str, float] = {}
        if progress.step % self.every == 0:
            scalars["train/loss"] = progress.loss
            scalars["train/learning_rate"] = progress.learning_rate
            scalars["train/images_per_s"] = progress.images_per_s
            if progress.peak_share is not None:
                scalars["train/share_of_bf16_peak"] = progress.peak_share
        for sigma, psnr in (progress.validation or {}).items():
            scalars[f"validation/psnr_db_sigma_{sigma:g}"] = psnr
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, progress.step)
        if progress.saved:
            self._writer.flush()

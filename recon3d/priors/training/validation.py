"""The held-out volume at every noise level: errors for the curve, and what the pictures show."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from recon3d.consistency import Identity
from recon3d.engine.loop import Job, Start, reconstruct
from recon3d.noise import independent
from recon3d.planes import Axial
from recon3d.priors.base import ModelCard
from recon3d.priors.training.config import TrainConfig
from recon3d.priors.training.objectives import Objective, path_range
from recon3d.renoise import DDIM, Renoise
from recon3d.trajectory import descend, karras

__all__ = ["Measured", "best", "draw", "measure", "row", "waited"]

# how many slices are kept for the picture
_SHOWN = 4

Map = Callable[[Callable[[Any], Any], Iterable[Any]], Iterable[Any]]


@dataclass(frozen=True)
class Measured:
    """What a validation found.

    Attributes:
        errors: noise level to mean squared error, network units.
        denoised: noise level to [n, c, row, col], the first few slices.
        noisy: the same slices as the network saw them.
    """

    errors: dict[float, float]
    denoised: dict[float, Tensor]
    noisy: dict[float, Tensor]

    @property
    def psnr_db(self) -> dict[float, float]:
        """With a peak of one network unit."""
        return {level: 10 * math.log10(1 / max(error, 1e-30)) for level, error in self.errors.items()}


def measure(
    objective: Objective,
    clean: Tensor,
    noise: Tensor,
    beside: Tensor | None,
    levels: Iterable[float],
    context: Callable[[], Any],
    over: Map = map,
) -> Measured:
    """Denoise slices one at a time, so that no figure depends on a batch size.

    Args:
        objective: the network with averaged weights.
        clean: slices [n, c, row, col] in network units, noise: of unit variance, beside: further input or None.
        levels: noise levels.
        context: entered around the network in whatever thread it runs.
        over: `map`, or that of a thread pool.
    """
    errors, denoised, noisy = {}, {}, {}
    for level in levels:

        def one(k: int, level: float = level) -> Tensor:
            with torch.no_grad(), context():
                u = clean[k : k + 1] + level * noise[k : k + 1]
                also = None if beside is None else beside[k : k + 1]
                d: Tensor = objective(u, torch.full((1,), level, device=u.device), also)
                return d.float()

        d = torch.cat(list(over(one, range(len(clean)))))
        # slices first: the order in which an earlier version added up, so curves go on as they were
        errors[level] = float(sum((d - clean).double().square().mean((1, 2, 3)).tolist()) / len(clean))
        denoised[level] = d[:_SHOWN].cpu()
        noisy[level] = (clean + level * noise)[:_SHOWN].cpu()
    return Measured(errors, denoised, noisy)


def row(found: Measured, counts: Mapping[str, float], sigma_data: float) -> dict[str, float]:
    """A row of the validation curve; losses are weighted as EDM weights them, whatever the objective."""
    out = dict(counts)
    for level, error in found.errors.items():
        out[f"loss_sigma_{level:g}"] = error * (level**2 + sigma_data**2) / (level * sigma_data) ** 2
        out[f"psnr_db_sigma_{level:g}"] = found.psnr_db[level]
    return out


def best(curve: list[dict[str, float]]) -> int:
    """Index of the validation whose loss, summed over the levels, was lowest."""
    return min(range(len(curve)), key=lambda k: sum(v for n, v in curve[k].items() if n.startswith("loss_sigma_")))


def waited(curve: list[dict[str, float]]) -> int:
    """How many validations there were since the best."""
    return len(curve) - 1 - best(curve) if curve else 0


class _Stack:
    """The network as a prior of a volume in which the channels of an image lie one after another."""

    card = ModelCard(name="in training")
    offset, scale = 0.0, 1.0

    def __init__(self, objective: Objective, channels: int, beside: Tensor | None, context: Callable[[], Any]) -> None:
        self.objective, self.channels, self.beside, self.context = objective, channels, beside, context

    def denoise(self, u: Tensor, sigma: float, cond: Tensor | None = None) -> Tensor:
        with torch.no_grad(), self.context():
            x = u.reshape(-1, self.channels, *u.shape[-2:])
            d: Tensor = self.objective(x, torch.full((len(x),), sigma, device=u.device), self.beside)
        return d.float().reshape(u.shape)


def draw(
    objective: Objective,
    config: TrainConfig,
    shape: tuple[int, int, int],
    beside: Tensor | None,
    device: torch.device,
    context: Callable[[], Any],
) -> Tensor:
    """`config.samples` images [n, c, row, col] by the reconstruction loop without data: DDIM from the highest level.

    Args:
        objective: the network with averaged weights.
        config: numbers of images and levels; the seed.
        shape: channels, rows and columns of an image.
        beside: further input channels of the images, [n, .., row, col], or None.
        device: where the network is.
        context: entered around the network.
    """
    n = config.samples * shape[0]
    low, high = path_range(config)
    nothing: Any = None  # no scanner: the identity asks none
    job = Job(
        operator=nothing,
        y=torch.empty(0, device=device),
        prior=_Stack(objective, shape[0], beside, context),
        trajectory=descend(karras(config.sample_levels, high * 0.999, low * 1.001)),  # both ends well on the path
        planes=Axial(n, n),
        consistency=Identity(),
        renoise=Renoise(DDIM()),
        noise=independent(n, seed=config.seed),
        start=Start(torch.zeros(n, *shape[1:], device=device)),
    )
    return reconstruct(job).reshape(config.samples, *shape)

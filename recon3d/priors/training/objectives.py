"""What the network is asked during training, and the denoiser that its answer stands for.

With u = x0 + sigma eps a batch of canonical states, s the path's scale and the network's clock c = log(sigma)/4:

    edm    D = c_skip u + c_out F(c_in u, c)     loss  mean of (sigma^2 + d^2)/(sigma d)^2 (D - x0)^2
    eps    F(s u, c) is to be eps                loss  mean of (F - eps)^2
    v      F(s u, c) is to be (eps - sigma x0)/sqrt(1 + sigma^2), likewise
    flow   F(s u, c) is to be eps - x0, likewise

Sources: Karras et al. (NeurIPS 2022); Ho et al. (NeurIPS 2020); Salimans, Ho (ICLR 2022); Liu et al. (ICLR 2023).
Which noise levels are drawn is told by `sigmas`: log-normal for edm, times spread evenly over the path for the others.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from recon3d.priors.networks.edm import coefficients
from recon3d.priors.paths import VP, VPContinuous, noise_path
from recon3d.priors.training.config import TrainConfig

__all__ = ["Objective", "path_range", "sigmas"]


class Objective(nn.Module):
    """The network under training, as a loss and as a denoiser; all in network units.

    Args:
        net: maps [b, c, row, col] and log(sigma)/4 [b] to [b, c, row, col].
        config: says what it is asked.
    """

    def __init__(self, net: nn.Module, config: TrainConfig) -> None:
        super().__init__()
        self.net = net
        self.kind = config.objective
        self.sigma_data = config.sigma_data
        self.flat = config.path_name != "flow"  # s = 1/sqrt(1+sigma^2), not 1/(1+sigma)

    def forward(self, u: Tensor, sigma: Tensor, beside: Tensor | None = None) -> Tensor:
        """D(u; sigma) for u [b, c, row, col], sigma [b] and further input channels, which are not noisy."""
        at = sigma[:, None, None, None]
        if self.kind == "edm":
            c_skip, c_out, c_in, c_noise = coefficients(sigma, self.sigma_data)
            c_skip, c_out, c_in = (c[:, None, None, None] for c in (c_skip, c_out, c_in))
            return c_skip * u + c_out * self._net(c_in * u, c_noise, beside)
        out = self._net(self._scale(at) * u, sigma.log() / 4, beside)
        if self.kind == "eps":
            return u - at * out
        if self.kind == "v":
            n = 1 + at.square()
            return (u - at * n.sqrt() * out) / n
        return (u - at * out) / (1 + at)

    def loss(self, x: Tensor, sigma: Tensor, noise: Tensor, beside: Tensor | None = None) -> Tensor:
        """The batch mean, for clean images x and noise of unit variance shaped as x."""
        at = sigma[:, None, None, None]
        u = x + at * noise
        if self.kind == "edm":
            weight = (sigma.square() + self.sigma_data**2) / (sigma * self.sigma_data).square()
            return torch.mean(weight[:, None, None, None] * (self(u, sigma, beside) - x).square())
        out = self._net(self._scale(at) * u, sigma.log() / 4, beside)
        return torch.mean((out - self.target(x, at, noise)).square())

    def target(self, x: Tensor, at: Tensor, noise: Tensor) -> Tensor:
        """What the network is to answer; sigma in a shape that broadcasts."""
        if self.kind == "eps":
            return noise
        if self.kind == "v":
            return (noise - at * x) * (1 + at.square()).rsqrt()
        return noise - x

    def _scale(self, at: Tensor) -> Tensor:
        return (1 + at.square()).rsqrt() if self.flat else 1 / (1 + at)

    def _net(self, x: Tensor, clock: Tensor, beside: Tensor | None) -> Tensor:
        if beside is not None:
            x = torch.cat([x, beside], dim=1)
        out: Tensor = self.net(x.contiguous(memory_format=torch.channels_last), clock)
        return out.float()


def path_range(config: TrainConfig) -> tuple[float, float]:
    """The noise levels of a run: `sigma_range`, as far as the path goes."""
    low, high = config.sigma_range
    path = noise_path(config.path_name, config.schedule)
    if isinstance(path, VP):
        return max(low, path.sigma(0)), min(high, path.sigma(path.steps - 1))
    return low, min(high, path.sigma(1)) if isinstance(path, VPContinuous) else high


def sigmas(config: TrainConfig, u: NDArray[np.float64]) -> Tensor:
    """Noise levels [n] float32 of numbers u in (0, 1): the inverse of what a run's levels are distributed by."""
    low, high = path_range(config)
    if config.objective == "edm":
        quantile = torch.special.ndtri(torch.from_numpy(np.clip(u, 1e-6, 1 - 1e-6))).numpy()
        level = np.exp(config.log_sigma_mean + config.log_sigma_std * quantile)
        return torch.from_numpy(np.clip(level, low, high)).float()
    path = noise_path(config.path_name, config.schedule)
    first, last = path.time(low), path.time(high)
    return torch.tensor([path.sigma(first + (last - first) * float(v)) for v in u], dtype=torch.float32)

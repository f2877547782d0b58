"""Noise models: how measurements scatter around A x, as weights for least squares and as a simulator."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor


class NoiseModel(Protocol):
    """What solvers and simulators ask of a noise model."""

    def weights(self, y: Tensor) -> Tensor:
        """Inverse variances 1/var(y), broadcastable to y."""
        ...

    def simulate(self, clean: Tensor, seed: int) -> Tensor:
        """A noisy measurement of the noise-free one; the same seed gives the same noise."""
        ...


@dataclass(frozen=True)
class GaussianNoise:
    """Independent Gaussian noise of one standard deviation.

    Attributes:
        sigma: standard deviation in the measurement's unit; of complex values, that of each of the two parts.

    Raises:
        ValueError: sigma is not positive and finite.
    """

    sigma: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.sigma) and self.sigma > 0):
            raise ValueError(f"GaussianNoise: sigma needs a positive number, got {self.sigma}")

    def weights(self, y: Tensor) -> Tensor:
        """1/sigma^2, one value for all."""
        return torch.full((1,) * y.ndim, self.sigma**-2, dtype=y.dtype.to_real(), device=y.device)

    def simulate(self, clean: Tensor, seed: int) -> Tensor:
        """clean + sigma z."""
        shape = (*clean.shape, 2) if clean.is_complex() else tuple(clean.shape)
        z = torch.from_numpy(_generator(seed).standard_normal(shape))
        return clean + self.sigma * (torch.view_as_complex(z) if clean.is_complex() else z).to(clean)


@dataclass(frozen=True)
class PoissonNoise:
    """Photon counting followed by the logarithm: y = -log(N / photons), N ~ Poisson(photons exp(-A x)).

    The variance of y is close to 1/N, hence pre-log weights photons exp(-y) (Sauer and Bouman, IEEE TSP 41 (1993) 534).

    Attributes:
        photons: mean count per detector cell without an object.

    Raises:
        ValueError: photons is not positive and finite.
    """

    photons: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.photons) and self.photons > 0):
            raise ValueError(f"PoissonNoise: photons needs a positive count, got {self.photons}")

    def weights(self, y: Tensor) -> Tensor:
        """photons exp(-y): the expected count of each ray, which is 1/var(y)."""
        return torch.exp(-y).mul_(self.photons)

    def simulate(self, clean: Tensor, seed: int) -> Tensor:
        """Draw counts and take the logarithm; a ray without a count is given half a one."""
        rate = self.photons * np.exp(-clean.detach().cpu().double().numpy())
        counts = np.maximum(_generator(seed).poisson(rate), 0.5)
        return torch.from_numpy(-np.log(counts / self.photons)).to(clean)


def estimate_noise(y: Tensor) -> GaussianNoise:
    """A noise level read off a sinogram whose noise nobody stated.

    Second differences along the detector remove what is smooth; their median absolute value, over sqrt(6) and the
    Gaussian's 0.6745, is the standard deviation of white noise and shrugs off edges (Donoho and Johnstone 1994).

    Args:
        y: [..., view, u] line integrals, at least three detector cells.

    Raises:
        ValueError: fewer than three cells.
    """
    if y.shape[-1] < 3:
        raise ValueError(f"estimate_noise: at least three detector cells are needed, got {y.shape[-1]}")
    second = y[..., 2:].double() - 2 * y[..., 1:-1].double() + y[..., :-2].double()
    sigma = float(second.abs().flatten().median()) / (0.6745 * math.sqrt(6))
    # noise-free or quantised data: rounding of the stored numbers is noise too
    floor = float(y.abs().max()) * torch.finfo(torch.float32).eps
    return GaussianNoise(max(sigma, floor, torch.finfo(torch.float32).tiny))


def _generator(seed: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(seed))

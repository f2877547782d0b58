"""The Gaussian prior whose denoiser is exact: the oracle against which samplers are tested.

For x0 ~ N(mean, C) with C diagonal in the orthonormal cosine basis of a slice,

    E[x0 | u] = mean + C (C + sigma^2 I)^-1 (u - mean),

so with a linear Gaussian measurement every posterior mean and covariance is known in closed form. A spectrum that
falls with frequency looks like smooth random texture; a flat one is white noise.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from recon3d.priors.base import ModelCard

__all__ = ["ComplexGaussianPrior", "GaussianPrior", "cosine_basis", "power_law"]


def cosine_basis(n: int) -> Tensor:
    """Orthonormal DCT-II matrix, [frequency, sample] float64."""
    k = torch.arange(n, dtype=torch.float64)
    basis = torch.cos(math.pi / n * (k[None] + 0.5) * k[:, None]) * math.sqrt(2 / n)
    basis[0] /= math.sqrt(2)
    return basis


def power_law(shape: tuple[int, int], std: float, corner: float = 2.0, power: float = 3.0) -> Tensor:
    """Variances (1 + (k/corner)^2)^(-power/2) over cosine frequencies, scaled to a mean pixel spread of std."""
    rows, columns = (torch.arange(n, dtype=torch.float64) for n in shape)
    k2 = rows[:, None] ** 2 + columns[None] ** 2
    spectrum = (1 + k2 / corner**2) ** (-power / 2)
    return spectrum * (std**2 / spectrum.mean())


class GaussianPrior:
    """N(mean, C) over slices, C diagonal in the cosine basis; in user units.

    Args:
        spectrum: variances over [row, col] frequencies, user units squared, positive.
        mean: one number or a [row, col] slice, user units.
        offset: as every prior's: network value = (user value - offset) / scale.
        scale: as above; recipes give noise levels in network units.
    """

    def __init__(self, spectrum: Tensor, mean: float | Tensor = 0.0, offset: float = 0.0, scale: float = 1.0) -> None:
        if spectrum.ndim != 2 or not bool((spectrum > 0).all()):
            raise ValueError(
                f"GaussianPrior: spectrum must be positive [row, col] variances, got {tuple(spectrum.shape)}"
            )
        self.spectrum = spectrum.double()
        self.mean = torch.as_tensor(mean, dtype=torch.float64).expand(spectrum.shape)
        self.offset, self.scale = offset, scale
        self.card = ModelCard(
            name="gaussian",
            statement="exact denoiser of a Gaussian; for tests and teaching, not for images of patients",
            offset=offset,
            scale=scale,
            path="exact",
        )
        self._rows, self._columns = (cosine_basis(n) for n in spectrum.shape)

    def denoise(self, u: Tensor, sigma: float, cond: Tensor | None = None) -> Tensor:
        """E[x0 | u], [batch, channel, row, col] in user units."""
        if tuple(u.shape[-2:]) != tuple(self.spectrum.shape):
            raise ValueError(f"GaussianPrior: slices must be {tuple(self.spectrum.shape)}, got {tuple(u.shape[-2:])}")
        rows, columns, mean = (t.to(u) for t in (self._rows, self._columns, self.mean))
        gain = (self.spectrum / (self.spectrum + sigma**2)).to(u)
        # each product is one matrix against the whole batch
        coefficients = ((u - mean) @ columns.T).mT @ rows.T
        return mean + ((coefficients * gain.T) @ rows).mT @ columns

    def sample(self, n: int, seed: int = 0) -> Tensor:
        """n slices from the prior, [n, row, col] float64."""
        z = torch.randn(n, *self.spectrum.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        return self.mean + self._rows.T @ (self.spectrum.sqrt() * z) @ self._columns

    def covariance(self) -> Tensor:
        """C over flattened slices, [pixels, pixels] float64."""
        basis = torch.kron(self._rows, self._columns)  # [frequencies, pixels]
        return basis.T @ (self.spectrum.flatten()[:, None] * basis)


class ComplexGaussianPrior:
    """A circular complex Gaussian over slices: both parts N(., C), independent, C as in `GaussianPrior`.

    Args:
        spectrum: variances of one real component over [row, col] frequencies, user units squared, positive.
        mean: one complex number or a [row, col] slice, user units.
        scale: user units per network unit; recipes give noise levels in network units.
    """

    offset = 0.0

    def __init__(self, spectrum: Tensor, mean: complex | Tensor = 0.0, scale: float = 1.0) -> None:
        self.part = GaussianPrior(spectrum, 0.0, 0.0, scale)
        self.mean = torch.as_tensor(mean, dtype=torch.complex128).expand(spectrum.shape)
        self.scale = scale
        self.card = self.part.card

    def denoise(self, u: Tensor, sigma: float, cond: Tensor | None = None) -> Tensor:
        """E[x0 | x0 + sigma (e_r + i e_i) = u], [batch, 1, row, col] complex in user units."""
        if not u.is_complex():
            raise ValueError(f"ComplexGaussianPrior: u must be complex, got {str(u.dtype).removeprefix('torch.')}")
        mean = self.mean.to(u)
        rest = u - mean
        return mean + torch.complex(self.part.denoise(rest.real, sigma), self.part.denoise(rest.imag, sigma))

    def sample(self, n: int, seed: int = 0) -> Tensor:
        """n slices from the prior, [n, row, col] complex128."""
        parts = self.part.sample(2 * n, seed)
        return self.mean + torch.complex(parts[:n], parts[n:])

    def covariance(self) -> Tensor:
        """C of either part over flattened slices, [pixels, pixels] float64; the parts are independent."""
        return self.part.covariance()

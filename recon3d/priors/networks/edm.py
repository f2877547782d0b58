"""EDM preconditioning: a denoiser D(u; sigma) around a raw network F.

    D = c_skip u + c_out F(c_in u, log(sigma)/4),   c_skip = d^2/(s^2+d^2),   c_out = s d/sqrt(s^2+d^2),
    c_in = 1/sqrt(s^2+d^2)

with s = sigma and d = sigma_data, everything in network units. F then sees unit variance and learns a target
of unit variance at every noise level. Source: Karras, Aittala, Aila, Laine (NeurIPS 2022), table 1.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["EDMDenoiser", "coefficients"]


def coefficients(sigma: Tensor, sigma_data: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(c_skip, c_out, c_in, c_noise) of noise levels, each with sigma's shape.

    >>> [round(float(c), 4) for c in coefficients(torch.tensor(0.5), 0.5)]
    [0.5, 0.3536, 1.4142, -0.1733]
    """
    var = sigma.square() + sigma_data**2
    return sigma_data**2 / var, sigma * sigma_data * var.rsqrt(), var.rsqrt(), sigma.log() / 4


class EDMDenoiser(nn.Module):
    """The preconditioned network; `net` maps [b, c, row, col] and c_noise [b] to [b, c, row, col].

    A conditional network takes the condition's channels after the state's, as they are: they carry no noise.
    """

    def __init__(self, net: nn.Module, sigma_data: float) -> None:
        super().__init__()
        self.net = net
        self.sigma_data = sigma_data

    def forward(self, u: Tensor, sigma: Tensor, cond: Tensor | None = None) -> Tensor:
        """D(u; sigma) for u [b, c, row, col], sigma [b] and a condition [b, c', row, col], in network units."""
        c_skip, c_out, c_in, c_noise = coefficients(sigma, self.sigma_data)
        c_skip, c_out, c_in = (c[:, None, None, None] for c in (c_skip, c_out, c_in))
        seen = c_in * u if cond is None else torch.cat([c_in * u, cond], dim=1)
        out: Tensor = self.net(seen, c_noise)
        return c_skip * u + c_out * out.float()

    def loss(self, x: Tensor, sigma: Tensor, noise: Tensor, cond: Tensor | None = None) -> Tensor:
        """Mean of (s^2+d^2)/(s d)^2 (D - x)^2, about 1 untrained; x is clean, noise has unit variance."""
        d = self(x + sigma[:, None, None, None] * noise, sigma, cond)
        weight = (sigma.square() + self.sigma_data**2) / (sigma * self.sigma_data).square()
        return torch.mean(weight[:, None, None, None] * (d - x).square())

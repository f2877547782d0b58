"""Network architectures a prior can be made of, and the preconditioning that turns one into a denoiser."""

from __future__ import annotations

from recon3d.priors.networks.edm import EDMDenoiser
from recon3d.priors.networks.unet import UNet, UNetConfig

__all__ = ["EDMDenoiser", "UNet", "UNetConfig"]

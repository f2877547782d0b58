"""Network architectures a prior can be made of, one file per family, and what turns one into a denoiser."""

from __future__ import annotations

from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from recon3d.priors.networks.adm import ADM, ADMConfig
from recon3d.priors.networks.edm import EDMDenoiser
from recon3d.priors.networks.edm_unet import EDMUNet, EDMUNetConfig
from recon3d.priors.networks.ncsnpp import NCSNpp, NCSNppConfig
from recon3d.priors.networks.unet import UNet, UNetConfig
from recon3d.priors.networks.unet2d import UNet2D, UNet2DConfig

__all__ = [
    "ADM", "FAMILIES", "ADMConfig", "EDMDenoiser", "EDMUNet", "EDMUNetConfig", "NCSNpp", "NCSNppConfig", "Network",
    "UNet", "UNet2D", "UNet2DConfig", "UNetConfig",
]  # fmt: skip


class Network(Protocol):
    """F(x, t): [b, c, row, col] and one number per image, or [1] for all -> [b, c_out, row, col]."""

    config: Any  # has `multiple`, which image sides must be multiples of

    @property
    def clock(self) -> Literal["time", "sigma", "log_sigma"]:
        """What t is: the path's time, the noise level itself, or log(sigma)/4 (on an EDM path always the last)."""
        ...

    def __call__(self, x: Tensor, t: Tensor) -> Tensor: ...

    def for_inference(self, compute_dtype: torch.dtype) -> Any:
        """Freeze the network, its heavy convolutions in `compute_dtype`."""
        ...

    def to(self, device: torch.device) -> Any: ...

    def state_dict(self) -> dict[str, Tensor]: ...

    def load_state_dict(self, state: dict[str, Tensor]) -> Any: ...


# architecture.family of a card -> its configuration and its network
FAMILIES: dict[str, tuple[Any, Any]] = {
    "unet": (UNetConfig, UNet),
    "adm": (ADMConfig, ADM),
    "ncsnpp": (NCSNppConfig, NCSNpp),
    "edm": (EDMUNetConfig, EDMUNet),
    "unet2d": (UNet2DConfig, UNet2D),
}

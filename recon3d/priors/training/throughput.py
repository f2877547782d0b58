"""How fast a run is: images a second, the time left, and the share of what the device could compute."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor, nn

from recon3d.priors.networks import UNet, UNetConfig

__all__ = ["Rate", "bf16_peak", "flops_per_pixel"]

# dense bfloat16 operations a second from the vendors' data sheets, by a part of the device's name; the first that fits
_PEAKS = (
    ("B200", 2250e12),
    ("H200", 989e12),
    ("H100 PCIe", 756e12),
    ("H100 NVL", 835e12),
    ("H100", 989e12),
    ("A100", 312e12),
    ("A40", 150e12),
    ("A10", 125e12),
    ("L40S", 362e12),
    ("L4", 121e12),
    ("RTX 4090", 165e12),
    ("RTX 3090", 71e12),
)


class Rate:
    """What steps get through in a second, over about the last minute of them; time between them does not count."""

    def __init__(self) -> None:
        self._steps = self._images = self._pixels = self._seconds = 0.0

    def add(self, images: int, pixels: int, seconds: float) -> None:
        keep = 0.5 ** (seconds / 30.0)
        self._steps = keep * self._steps + 1
        self._images = keep * self._images + images
        self._pixels = keep * self._pixels + pixels
        self._seconds = keep * self._seconds + seconds

    @property
    def images_per_s(self) -> float:
        return self._images / max(self._seconds, 1e-9)

    @property
    def pixels_per_s(self) -> float:
        return self._pixels / max(self._seconds, 1e-9)

    @property
    def seconds_per_step(self) -> float:
        return self._seconds / max(self._steps, 1e-9)


@lru_cache
def flops_per_pixel(network: UNetConfig) -> float:
    """Multiplications and additions of a training step per image pixel, in convolutions and matrix products.

    Backward costs twice what forward does: the gradients of the weights, and those of the inputs.

    >>> net = UNetConfig(channels=(16,), blocks=1, embedding=8)
    >>> stem, blocks, head = 9 * 16, 4 * 9 * 16 * 16, 9 * 16
    >>> 1 <= flops_per_pixel(net) / (3 * 2 * (stem + blocks + head)) < 1.1  # the rest is the noise embedding
    True
    """
    side = 2 * network.multiple
    net = UNet(network).requires_grad_(False)
    total = 0

    def count(layer: nn.Module, _: tuple[Tensor, ...], out: Tensor) -> None:
        nonlocal total
        weight = layer.get_parameter("weight")
        total += 2 * out.numel() * weight.numel() // weight.shape[0]

    for layer in net.modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            layer.register_forward_hook(count)
    net(torch.zeros(1, network.in_channels, side, side), torch.zeros(1))
    return 3 * total / side**2


def bf16_peak(device: torch.device) -> float | None:
    """Operations a second of a GPU that is known by name, or None."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in _PEAKS if part in name), None)

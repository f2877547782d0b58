"""A trained network as a prior: range transform, padding, number format, and nothing else.

The network works on  x_net = (u - offset) / scale  at  sigma_net = sigma / scale  and on sides that are
multiples of its stride. The adapter maps there and back, pads by reflection and crops, and runs the
convolutions in bfloat16 where the device is fast at it. On a CPU slices go through one at a time, so a
slice's result never depends on its batch.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from recon3d.priors.base import ModelCard
from recon3d.priors.compiled import Compile, CompiledNetwork, compiles
from recon3d.priors.networks import Network
from recon3d.priors.paths import noise_path, to_denoiser
from recon3d.priors.positions import positions

__all__ = ["NetworkPrior", "check_sigma", "compute_dtype"]

Precision = Literal["auto", "float32", "bfloat16", "float16"]
_FORMATS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# rows and columns of the slice, and row and column of the first pixel in it
_Place = tuple[tuple[int, int], tuple[int, int]]


class NetworkPrior:
    """A network with the card that says what it answers. Calls may come from several threads at once.

    Args:
        net: the raw network; it is frozen and put into evaluation mode. card: offset, scale, prediction and
        the rest. device: where it runs. precision: "auto" is bfloat16 where the device computes with it
        natively, else float32; for "float16" see `load_prior`. differentiable: record gradients with respect to u
        (needed by gradient-through-the-prior methods only); the network then runs as it is. compile: let torch compile
        the network, and on a GPU replay it as a CUDA graph; "auto" does so on a GPU. The first call of a shape takes up
        to minutes then.
    """

    def __init__(
        self,
        net: Network,
        card: ModelCard,
        device: str | torch.device = "cpu",
        precision: Precision = "auto",
        differentiable: bool = False,
        compile: Compile = "auto",
    ) -> None:
        if card.prediction == "edm" and card.sigma_data is None:
            raise ValueError(f"NetworkPrior: card of {card.name!r} must give sigma_data, got none")
        self.card = card
        self.offset = card.offset
        self.scale = card.scale
        self.device = torch.device(device)
        self.dtype = compute_dtype(self.device, precision)
        self.differentiable = differentiable
        self._path = None if card.prediction == "edm" else (card.prediction, noise_path(card.path, card.schedule))
        self._net = net.to(self.device).for_inference(self.dtype)
        wanted = compiles(self.device, compile)
        self._compiled = CompiledNetwork(self._net, fall_back=compile == "auto") if wanted else None

    def denoise(
        self,
        u: Tensor,
        sigma: float,
        cond: Tensor | None = None,
        *,
        whole: tuple[int, int] | None = None,
        corner: tuple[int, int] = (0, 0),
    ) -> Tensor:
        """E[x0 | x0 + sigma eps = u].

        Args:
            u: state, [batch, channel, row, col] float32 or float64 in user units.
            sigma: noise level in user units, positive.
            cond: of a conditional prior (`card.cond_channels`) the image beside the state, [batch, channel, row, col]
                in the values of `condition_volume`; None for all others.
            whole, corner: rows and columns of the slice that u was cut from, and where in it u begins; for a prior
                that is shown positions (`card.positions`). None: u is the slice.

        Returns:
            The denoised slices with the shape and dtype of u.

        Raises:
            ValueError: u has other axes, channels or another device, sigma is not positive, or cond is
                missing, not wanted or of another shape.
        """
        if u.ndim != 4 or u.shape[1] != self.card.channels:
            raise ValueError(
                f"denoise: u must be [batch, {self.card.channels}, row, col] for prior {self.card.name!r}, "
                f"got {tuple(u.shape)}"
            )
        if u.device != self.device:
            raise ValueError(f"denoise: u is on {u.device}, prior {self.card.name!r} on {self.device}; move one")
        level = float(sigma) / self.scale
        if not (math.isfinite(level) and level > 0):
            raise ValueError(f"denoise: sigma must be positive and finite, got {sigma}")
        if u.numel() == 0:
            return u.clone()
        beside = self._beside(u, cond)
        place = (whole or (u.shape[-2], u.shape[-1]), corner)
        with torch.set_grad_enabled(self.differentiable and torch.is_grad_enabled()):
            x = (u.float() - self.offset) / self.scale
            # one at a time on a CPU: how a convolution rounds may follow the batch size
            n = 1 if self.device.type == "cpu" else len(x)
            parts = [self._network(x[i : i + n], beside[i : i + n], level, place) for i in range(0, len(x), n)]
            d = torch.cat(parts)
            return (d * self.scale + self.offset).to(u.dtype)

    def _beside(self, u: Tensor, cond: Tensor | None) -> Tensor:
        """The condition in network units; no channels for a prior that takes none."""
        channels, how = self.card.cond_channels, self.card.condition
        if how is None:
            if cond is not None:
                raise ValueError(f"denoise: prior {self.card.name!r} takes no condition; leave cond out")
            return u.new_empty((len(u), 0, *u.shape[-2:]), dtype=torch.float32)
        wanted = (len(u), channels, *u.shape[-2:])
        if cond is None or tuple(cond.shape) != wanted or cond.device != u.device:
            got = "none" if cond is None else f"{tuple(cond.shape)} on {cond.device}"
            raise ValueError(
                f"denoise: prior {self.card.name!r} needs a condition ({how.what or 'an image'}), "
                f"cond must be {wanted} on {u.device}, got {got}"
            )
        return (cond.float() - how.offset) / how.scale

    def _network(
        self, x: Tensor, beside: Tensor, sigma: float, place: tuple[tuple[int, int], tuple[int, int]]
    ) -> Tensor:
        h, w = x.shape[-2:]
        m = self._net.config.multiple
        dh, dw = -h % m, -w % m

        def net(y: Tensor, t: float) -> Tensor:
            if beside.shape[1]:
                y = torch.cat([y, beside], dim=1)
            if dh or dw:
                y = F.pad(y, (0, dw, 0, dh), mode="reflect" if dh < h and dw < w else "replicate")
            if self.card.positions:
                where = positions((h + dh, w + dw), *place, device=y.device)
                y = torch.cat([y, where.expand(len(y), -1, -1, -1)], dim=1)
            time = torch.full((1,), t, dtype=torch.float32, device=x.device)
            run = self._net if self._compiled is None or self.differentiable else self._compiled
            out: Tensor = run(y.contiguous(memory_format=torch.channels_last), time)
            # networks that learned a variance too give it in further channels
            return out[:, : x.shape[1], :h, :w]

        if self._path is not None:
            kind, path = self._path
            s = path.s(t := path.time(sigma))
            seen = {"time": t, "sigma": sigma, "log_sigma": math.log(sigma) / 4}[self._net.clock]
            return to_denoiser(net(s * x, seen), x, sigma, kind, s)
        # the coefficients of recon3d.priors.networks.edm, in double precision
        d = self.card.sigma_data or 1.0
        norm = 1 / math.hypot(sigma, d)
        return (d * norm) ** 2 * x + sigma * d * norm * net(x * norm, math.log(sigma) / 4)


def compute_dtype(device: torch.device, precision: Precision = "auto") -> torch.dtype:
    """The number format of the convolutions on a device."""
    if precision in _FORMATS:
        return _FORMATS[precision]
    if precision != "auto":
        raise ValueError(f"precision must be auto, {', '.join(_FORMATS)}, got {precision!r}")
    if device.type == "cuda":
        # emulated below compute capability 8.0
        fast = torch.cuda.get_device_capability(device)[0] >= 8
    elif device.type == "cpu":
        fast = bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    else:
        fast = False
    return torch.bfloat16 if fast else torch.float32


def check_sigma(card: ModelCard, sigma_max: float, sigma_min: float | None = None) -> str | None:
    """One sentence when noise levels (network units) leave what the prior was trained on, or None.

    >>> print(check_sigma(ModelCard(name="ct", sigma_range=(0.003, 4.0)), 10.0))
    prior 'ct' was trained on noise levels 0.003 to 4, got 10; start from a level in that range
    """
    if card.sigma_range is None:
        return None
    low, high = card.sigma_range
    for sigma in (sigma_max, sigma_min):
        if sigma is not None and not low * (1 - 1e-6) <= sigma <= high * (1 + 1e-6):
            verb = "start from" if sigma > high else "stop at"
            return (
                f"prior {card.name!r} was trained on noise levels {low:g} to {high:g}, got {sigma:g}; "
                f"{verb} a level in that range"
            )
    return None

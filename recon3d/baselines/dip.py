"""Deep image prior: an untrained network fitted to one measurement, stopped before it fits the noise.

    minimise |A f_theta(z) - y|^2 over theta,   z noise that stays

A convolutional net finds structure sooner than noise (Ulyanov, Vedaldi, Lempitsky, CVPR 2018), so the fit ends when the
misfit has come down to the noise of y (Morozov's discrepancy principle); nothing else tells when, for no reference is
looked at. Here f is a small U-Net with skips, a slice at a time, with a running mean of its outputs as the result.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from recon3d.operators.base import LinearOperator
from recon3d.ops.philox import philox_normal

__all__ = ["dip"]

# channels of the noise that goes in, of a skip
_INPUT, _SKIP = 8, 4
_SCALES = 4
# the running mean remembers about so many outputs
_MEMORY = 30
# spread of the noise that goes in, and of what is added to it afresh at every iteration
_SPREAD, _JITTER = 0.1, 0.03


def dip(
    y: Tensor,
    operator: LinearOperator,
    sigma: float | None = None,
    iterations: int = 600,
    width: int = 16,
    learning_rate: float = 0.01,
    seed: int = 0,
) -> Tensor:
    """Fit a network to each slice of an image.

    Args:
        y: measurement, [z, ...] in the operator's range.
        operator: on images, with slice coupling; a constant image must have that constant as measurement.
        sigma: noise of y; the fit ends when the mean squared misfit is sigma^2. None goes on to the last iteration.
        iterations: of Adam, at most.
        width: channels of the network.
        learning_rate: of Adam.
        seed: of first weights and noise.

    Returns:
        The volume [z, y, x].

    Raises:
        ValueError: the operator couples slices, y does not fit, or a number is out of range.
    """
    if operator.coupling != "slice":
        raise ValueError("dip: the operator couples slices; a network is fitted to one slice at a time")
    if tuple(y.shape) != tuple(operator.range.shape):
        raise ValueError(f"dip: y must have the operator's range {tuple(operator.range.shape)}, got {tuple(y.shape)}")
    if iterations < 1 or width < 1 or not learning_rate > 0 or (sigma is not None and not sigma > 0):
        raise ValueError(
            f"dip: iterations, width, learning_rate and sigma must be positive, got {iterations}, {width}, "
            f"{learning_rate} and {sigma}"
        )
    out = torch.empty(operator.domain.shape, dtype=y.dtype, device=y.device)
    with torch.enable_grad():
        for k in range(y.shape[0]):
            part = operator.slab(k, k + 1)
            out[k] = _fit(y[k : k + 1], part, sigma, iterations, width, learning_rate, seed, k)
    return out


def _fit(
    y: Tensor,
    operator: LinearOperator,
    sigma: float | None,
    iterations: int,
    width: int,
    learning_rate: float,
    seed: int,
    index: int,
) -> Tensor:
    # all of these operators keep a constant, so an image can be scaled as its measurement is
    shift, scale = float(y.mean()), max(float(y.std()), torch.finfo(torch.float32).tiny)
    want = (y - shift) / scale
    enough = 0.0 if sigma is None else (sigma / scale) ** 2
    rows, columns = operator.domain.shape[1:]
    net = _Net(width, seed, y.device)
    z = _SPREAD * philox_normal(seed, index, _INPUT, (rows, columns), stream=1, device=y.device)
    optimiser = torch.optim.Adam(net.weights, learning_rate)
    mean = torch.zeros(rows, columns, device=y.device)
    for i in range(iterations):
        jitter = philox_normal(seed, i, _INPUT, (rows, columns), stream=2, device=y.device)
        x = net(z + _JITTER * _SPREAD * jitter)
        loss = (operator(x) - want).square().mean()
        keep = min(i / (i + 1), 1 - 1 / _MEMORY)
        mean.mul_(keep).add_(x.detach()[0], alpha=1 - keep)
        if float(loss.detach()) <= enough:
            break
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return mean * scale + shift


class _Net:
    """A U-Net [channel, row, col] -> [1, row, col]; its weights come from keyed noise."""

    def __init__(self, width: int, seed: int, device: torch.device) -> None:
        self.weights: list[Tensor] = []
        self._seed, self._device = seed, device
        inside = _INPUT
        for _ in range(_SCALES):
            self._add(_SKIP, inside, 1)
            self._add(width, inside, 3)
            self._add(width, width, 3)
            inside = width
        for _ in range(_SCALES):
            self._add(width, width + _SKIP, 3)
        self._add(1, width, 1)

    def _add(self, outside: int, inside: int, size: int) -> None:
        fan = inside * size * size
        z = philox_normal(self._seed, len(self.weights), 1, (outside, fan), stream=3, device=self._device)[0]
        weight = (z * math.sqrt(2 / fan)).reshape(outside, inside, size, size)
        self.weights += [weight.requires_grad_(), torch.zeros(outside, device=self._device, requires_grad=True)]

    def __call__(self, z: Tensor) -> Tensor:
        pairs = iter(zip(self.weights[::2], self.weights[1::2], strict=True))

        def conv(x: Tensor, stride: int = 1, activate: bool = True) -> Tensor:
            weight, bias = next(pairs)
            if weight.shape[-1] == 3:
                x = F.pad(x, (1, 1, 1, 1), mode="replicate")
            x = F.conv2d(x, weight, bias, stride)
            return F.leaky_relu(F.instance_norm(x), 0.2) if activate and min(x.shape[-2:]) > 1 else x

        x, skips = z[None], []
        for _ in range(_SCALES):
            skips.append(conv(x))
            x = conv(conv(x, stride=2))
        for skip in reversed(skips):
            x = F.interpolate(x, skip.shape[-2:], mode="bilinear", align_corners=False)
            x = conv(torch.cat([x, skip], 1))
        return conv(x, activate=False)[0]

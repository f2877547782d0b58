"""Noise paths: what noise level t is, and what a network trained on that path says about the clean image.

Every forward process used here is  x_t = s(t) (x0 + sigma(t) eps),  eps ~ N(0, I).  The canonical state is
u = x_t / s(t), the canonical network output the denoiser D(u; sigma) = E[x0 | u]. All conversions are exact:

    eps   = (u - D) / sigma                   D = (x_t - s sigma eps) / s
    score = (D - u) / (s sigma^2)             D = (x_t + (s sigma)^2 score) / s
    v     = (eps - sigma x0) / sqrt(1+sigma^2) D = (u - sigma sqrt(1+sigma^2) v) / (1+sigma^2)

with D in the place of x0. v is the velocity of Salimans and Ho (ICLR 2022), cos eps - sin x0 with tan = sigma;
on a variance-preserving path D = sqrt(abar) x_t - sqrt(1-abar) v. A rectified-flow network gives eps - x0
instead (kind "flow"): with t = sigma/(1+sigma) and x_t = (1-t) u it is D = x_t - t v.

Sources: Song et al. (ICLR 2021) for VP and VE; Karras et al. (NeurIPS 2022) for EDM and the common form.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Literal, Protocol

from torch import Tensor

__all__ = [
    "EDM",
    "VE",
    "VP",
    "NoisePath",
    "RectifiedFlow",
    "VPContinuous",
    "from_denoiser",
    "noise_path",
    "to_denoiser",
]

Kind = Literal["x0", "eps", "score", "v", "flow"]


class NoisePath(Protocol):
    """Clock of a forward process."""

    def sigma(self, t: float) -> float:
        """Noise level of u at time t."""
        ...

    def s(self, t: float) -> float:
        """Scale of x_t: x_t = s(t) u."""
        ...

    def time(self, sigma: float) -> float:
        """The (fractional) time at which the noise level is sigma."""
        ...


@dataclass(frozen=True)
class VP:
    """Variance preserving, discrete times 0 .. steps-1 (DDPM, guided-diffusion).

    s = sqrt(abar_t), sigma = sqrt((1-abar_t)/abar_t). Between two times log sigma is interpolated linearly.

    Attributes:
        beta_min, beta_max: ends of a linear or scaled linear beta; a cosine has none and keeps them at their defaults.
        steps: number of times.
        schedule: "linear" beta (Ho et al., NeurIPS 2020); "scaled_linear", whose square root is (Rombach et al., CVPR
            2022); or "cosine": abar(t) = cos^2((t/T + 0.008)/1.008 pi/2) over its value at 0, no beta above 0.999
            (Nichol and Dhariwal, ICML 2021).

    >>> round(VP().sigma(400), 2), round(VP().sigma(999))
    (2.04, 157)
    """

    beta_min: float = 1e-4
    beta_max: float = 0.02
    steps: int = 1000
    schedule: Literal["linear", "scaled_linear", "cosine"] = "linear"
    _log_sigma: tuple[float, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        # a table is made of them
        if (
            not 2 <= self.steps <= 100_000
            or self.steps != int(self.steps)
            or not 0 < self.beta_min <= self.beta_max < 1
        ):
            raise ValueError(
                "VP: need whole steps from 2 to 100000 and 0 < beta_min <= beta_max < 1, "
                f"got {self.steps}, {self.beta_min}, {self.beta_max}"
            )
        if self.schedule not in ("linear", "scaled_linear", "cosine"):
            raise ValueError(f"VP: schedule must be linear, scaled_linear or cosine, got {self.schedule!r}")
        log_abar, table = 0.0, []
        for t in range(int(self.steps)):  # a card's numbers are floats
            log_abar += math.log1p(-self._beta(t))
            # sigma^2 = 1/abar - 1
            table.append(0.5 * math.log(math.expm1(-log_abar)))
        object.__setattr__(self, "_log_sigma", tuple(table))

    def _beta(self, t: int) -> float:
        share = t / (self.steps - 1)
        if self.schedule == "linear":
            return self.beta_min + (self.beta_max - self.beta_min) * share
        if self.schedule == "scaled_linear":
            return (math.sqrt(self.beta_min) * (1 - share) + math.sqrt(self.beta_max) * share) ** 2
        now, then = (math.cos((k / self.steps + 0.008) / 1.008 * math.pi / 2) ** 2 for k in (t, t + 1))
        return min(1 - then / now, 0.999)

    def sigma(self, t: float) -> float:
        if not 0 <= t <= self.steps - 1:
            raise ValueError(f"VP: time must be in [0, {self.steps - 1}], got {t}")
        i = min(int(t), len(self._log_sigma) - 2)
        a, b = self._log_sigma[i], self._log_sigma[i + 1]
        return math.exp(a + (t - i) * (b - a))

    def s(self, t: float) -> float:
        return 1 / math.sqrt(1 + self.sigma(t) ** 2)

    def time(self, sigma: float) -> float:
        log = math.log(_positive("VP", sigma))
        low, high = self._log_sigma[0], self._log_sigma[-1]
        # rounding in exp/log may leave the ends by an ulp
        if not low - 1e-12 <= log <= high + 1e-12:
            raise ValueError(f"VP: sigma must be in [{math.exp(low):.4g}, {math.exp(high):.4g}], got {sigma}")
        i = min(max(bisect.bisect_right(self._log_sigma, log) - 1, 0), len(self._log_sigma) - 2)
        a, b = self._log_sigma[i], self._log_sigma[i + 1]
        return min(max(i + (log - a) / (b - a), 0.0), self.steps - 1.0)


@dataclass(frozen=True)
class VPContinuous:
    """Variance preserving in continuous time t in [0, 1], beta(t) from beta_min to beta_max (score SDE; PET: 0.1, 10).

    s = exp(-B/2) and sigma^2 = e^B - 1 with B = beta_min t + (beta_max - beta_min) t^2 / 2.

    >>> round(VPContinuous(0.1, 10.0).sigma(1.0), 1)
    12.5
    """

    beta_min: float = 0.1
    beta_max: float = 20.0

    def __post_init__(self) -> None:
        if not 0 < self.beta_min < self.beta_max:
            raise ValueError(f"VPContinuous: need 0 < beta_min < beta_max, got {self.beta_min}, {self.beta_max}")

    def sigma(self, t: float) -> float:
        if not 0 < t <= 1:
            raise ValueError(f"VPContinuous: time must be in (0, 1], got {t}")
        return math.sqrt(math.expm1(self.beta_min * t + (self.beta_max - self.beta_min) * t * t / 2))

    def s(self, t: float) -> float:
        return 1 / math.sqrt(1 + self.sigma(t) ** 2)

    def time(self, sigma: float) -> float:
        total, slope = math.log1p(_positive("VPContinuous", sigma) ** 2), self.beta_max - self.beta_min
        # the positive root of slope/2 t^2 + beta_min t = total, written without cancellation
        t = 2 * total / (self.beta_min + math.sqrt(self.beta_min**2 + 2 * slope * total))
        if t > 1 + 1e-12:
            raise ValueError(f"VPContinuous: sigma must be at most {self.sigma(1.0):.4g}, got {sigma}")
        return min(t, 1.0)


@dataclass(frozen=True)
class VE:
    """Variance exploding (score SDE): s = 1, sigma = sigma_min (sigma_max/sigma_min)^t for t in [0, 1]."""

    sigma_min: float = 0.01
    sigma_max: float = 378.0

    def __post_init__(self) -> None:
        if not 0 < self.sigma_min < self.sigma_max:
            raise ValueError(f"VE: need 0 < sigma_min < sigma_max, got {self.sigma_min}, {self.sigma_max}")

    def sigma(self, t: float) -> float:
        if not 0 <= t <= 1:
            raise ValueError(f"VE: time must be in [0, 1], got {t}")
        return self.sigma_min * math.pow(self.sigma_max / self.sigma_min, t)

    def s(self, t: float) -> float:
        return 1.0

    def time(self, sigma: float) -> float:
        t = math.log(_positive("VE", sigma) / self.sigma_min) / math.log(self.sigma_max / self.sigma_min)
        if not -1e-12 <= t <= 1 + 1e-12:
            raise ValueError(f"VE: sigma must be in [{self.sigma_min:g}, {self.sigma_max:g}], got {sigma}")
        return min(max(t, 0.0), 1.0)


@dataclass(frozen=True)
class EDM:
    """Karras et al.: s = 1, sigma = t."""

    def sigma(self, t: float) -> float:
        return _positive("EDM", t)

    def s(self, t: float) -> float:
        return 1.0

    def time(self, sigma: float) -> float:
        return _positive("EDM", sigma)


@dataclass(frozen=True)
class RectifiedFlow:
    """Straight lines from image to noise: x_t = (1-t) x0 + t eps, s = 1-t, sigma = t/(1-t), t in (0, 1)."""

    def sigma(self, t: float) -> float:
        if not 0 < t < 1:
            raise ValueError(f"RectifiedFlow: time must be in (0, 1), got {t}")
        return t / (1 - t)

    def s(self, t: float) -> float:
        return 1 - t

    def time(self, sigma: float) -> float:
        return _positive("RectifiedFlow", sigma) / (1 + sigma)


def noise_path(name: str, schedule: Mapping[str, float | str]) -> NoisePath:
    """The path that a model card names, with what its schedule says.

    Args:
        name: "vp", "vp_continuous", "ve", "edm" or "flow".
        schedule: fields of that path, such as {"beta_max": 0.02}; the others keep their defaults.

    Raises:
        ValueError: no such path, no such field, or a value it does not take.
    """
    paths: dict[str, type] = {"vp": VP, "vp_continuous": VPContinuous, "ve": VE, "edm": EDM, "flow": RectifiedFlow}
    if name not in paths:
        raise ValueError(f"path must be one of {', '.join(paths)}, got {name!r}")
    known = [f.name for f in fields(paths[name]) if f.init]
    for key in schedule:
        if key not in known:
            raise ValueError(f"path {name!r} has no {key!r}; it has {', '.join(known) or 'no numbers'}")
    made: NoisePath = paths[name](**schedule)
    return made


def to_denoiser(output: Tensor, u: Tensor, sigma: float, kind: Kind, s: float = 1.0) -> Tensor:
    """D(u; sigma) from what a network put out.

    Args:
        output: the network's answer, the shape of u.
        u: canonical state x_t / s.
        sigma: canonical noise level.
        kind: what the network was trained to give: "x0", "eps", "score" (of x_t), "v" or "flow" (eps - x0).
        s: scale of x_t; matters to "score" only.
    """
    if kind == "x0":
        return output
    if kind == "eps":
        return u - _positive(kind, sigma) * output
    if kind == "score":
        return u + s * _positive(kind, sigma) ** 2 * output
    if kind == "v":
        n = 1 + _positive(kind, sigma) ** 2
        return (u - sigma * math.sqrt(n) * output) / n
    if kind == "flow":
        return (u - _positive(kind, sigma) * output) / (1 + sigma)
    raise ValueError(f"to_denoiser: kind must be x0, eps, score, v or flow, got {kind!r}")


def from_denoiser(d: Tensor, u: Tensor, sigma: float, kind: Kind, s: float = 1.0) -> Tensor:
    """The inverse of `to_denoiser`: what a network of that kind would have put out."""
    if kind == "x0":
        return d
    if kind == "eps":
        return (u - d) / _positive(kind, sigma)
    if kind == "score":
        return (d - u) / (s * _positive(kind, sigma) ** 2)
    if kind == "v":
        n = 1 + _positive(kind, sigma) ** 2
        return (u - n * d) / (sigma * math.sqrt(n))
    if kind == "flow":
        return (u - (1 + _positive(kind, sigma)) * d) / sigma
    raise ValueError(f"from_denoiser: kind must be x0, eps, score, v or flow, got {kind!r}")


def _positive(name: str, sigma: float) -> float:
    if not (math.isfinite(sigma) and sigma > 0):
        raise ValueError(f"{name}: sigma must be positive and finite, got {sigma}")
    return sigma

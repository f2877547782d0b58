"""Does a prior denoise? Known noise goes in, and what is left of it is held against what a linear filter leaves.

A converted checkpoint whose schedule, value range or kind of prediction is not the one it was trained with still gives
images, only wrong ones. Slices it should know are given noise of known levels. The Wiener filter that knows these very
slices' power spectrum is the best a filter can do; a trained network is better than it or close. Where one is not, the
usual mistakes are tried in turn, and the one that repairs it is named.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from recon3d.priors.base import ModelCard, Prior
from recon3d.priors.training.augment import random_phase
from recon3d.priors.training.card import own_unit
from recon3d.priors.training.config import PhaseConfig

__all__ = ["LevelResult", "SelfTest", "known_slices", "self_test"]

# of the Wiener filter's error: a network that was trained stays below, a wrong convention is far above
_LIMIT = 1.25
# slices, images beside them, seed of the noise
_Given = tuple[Tensor, Tensor | None, int]


@dataclass(frozen=True)
class LevelResult:
    """One noise level, user units.

    Attributes:
        sigma: noise that was added.
        error: root mean square of what the prior left.
        expected: the same of the Wiener filter.
    """

    sigma: float
    error: float
    expected: float


@dataclass(frozen=True)
class SelfTest:
    """What a self-test found.

    Attributes:
        levels: results, from low noise to high.
        sound: every level is within the limit.
        verdict: one sentence.
    """

    levels: tuple[LevelResult, ...]
    sound: bool
    verdict: str


def known_slices(card: ModelCard, volume: Tensor, count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Slices of a volume, evenly spread, as a prior is shown them.

    Where every training volume had its own unit, the volume is divided by what its training would have divided it by.
    A prior of groups gets each slice with those that follow it; one of complex slices gets them under a smooth phase of
    the kind that training makes up.

    Args:
        card: of the prior.
        volume: [z, y, x] real, in the card's unit or, where that is a volume's own, in any.
        count: slices or groups, fewer where the volume has not so many.
        seed: of the phases.

    Returns:
        The slices [n, channel, row, col] float32 in user units, and the indices [n] of the first of each group.

    Raises:
        ValueError: the volume has fewer slices than a group, no values above 0 to take its unit from, or the prior
            has channels that are neither slices nor their real and imaginary parts.
    """
    groups = len(volume) - card.slices + 1
    if groups < 1:
        raise ValueError(f"prior {card.name!r} sees {card.slices} slices at once, the volume has {len(volume)}")
    if card.channels not in (card.slices, 2 * card.slices):
        raise ValueError(
            f"prior {card.name!r} has {card.channels} channels for {card.slices} slice(s); a volume shows a prior of "
            "real or complex slices only"
        )
    x = volume.float()
    if (unit := own_unit(card, x)) is not None:
        x = card.offset + card.scale * x / unit
    index = torch.linspace(0, groups - 1, min(count, groups) + 2).round().long()[1:-1].unique()
    shown = torch.stack([x[i : i + card.slices] for i in index])
    if card.channels > card.slices:
        rng = np.random.Generator(np.random.Philox(key=[seed, 1 << 32]))
        turns = torch.stack([random_phase(rng, group, PhaseConfig()) for group in shown])
        shown = torch.cat([shown * turns.cos(), shown * turns.sin()], dim=1)
    return shown.contiguous(), index


def self_test(
    prior: Prior,
    slices: Tensor,
    *,
    cond: Tensor | None = None,
    remake: Callable[[ModelCard], Prior] | None = None,
    levels: int = 6,
    seed: int = 0,
) -> SelfTest:
    """Denoise known noise at levels over the range that the prior was trained on.

    Args:
        prior: the denoiser.
        slices: clean images that it should know, [n, channel, row, col] in user units.
        cond: of a conditional prior the images beside them, [n, channel, row, col]; the filter does not see them.
        remake: makes the prior anew with another card; with it a failure is followed up and its cause named.
        levels: noise levels, spread evenly in the logarithm.
        seed: of the noise.

    Raises:
        ValueError: the slices are constant, or have other channels than the prior.
    """
    spread = float(slices.double().std())
    if not spread > 0:
        raise ValueError("self_test: the slices are constant; give images of what the prior was trained on")
    sigmas = _sigmas(prior.card, spread, levels)
    given = (slices, cond, seed)
    results = _measure(prior, sigmas, given)
    sound = _worst(results) <= _LIMIT
    if sound:
        return SelfTest(results, True, f"sound: at most {_worst(results):.2f} times the Wiener filter's error")
    at = max(results, key=lambda r: r.error / r.expected)
    verdict = f"not sound: {at.error / at.expected:.1f} times the Wiener filter's error at noise {at.sigma:.3g}"
    if remake is not None:
        best, name = min(_tried(prior.card, remake, sigmas, given), default=(math.inf, ""))
        if best <= _LIMIT:
            verdict += f"; {name} repairs it ({best:.2f} times)"
        else:
            verdict += "; no other schedule, range or kind of prediction repairs it: are these the images it knows?"
    return SelfTest(results, False, verdict)


def _tried(
    card: ModelCard, remake: Callable[[ModelCard], Prior], sigmas: list[float], given: _Given
) -> list[tuple[float, str]]:
    """How far each suspect is from the filter at its worst; a handful of levels rules most of them out."""
    tried = []
    few = sorted({sigmas[0], sigmas[len(sigmas) // 2], sigmas[-1]})
    for name, other in _suspects(card):
        try:
            prior = remake(other)
            # in its own units a level may lie outside another schedule
            worst = _worst(_measure(prior, few, given))
            tried.append((worst if worst > _LIMIT else _worst(_measure(prior, sigmas, given)), name))
        except ValueError:
            continue
    return tried


def _sigmas(card: ModelCard, spread: float, levels: int) -> list[float]:
    low, high = (s * card.scale for s in card.sigma_range) if card.sigma_range else (0.0, math.inf)
    low, high = max(low * 1.01, 0.05 * spread), min(high * 0.99, 20 * spread)
    if not low < high:
        return [math.sqrt(low * high)]
    return [float(s) for s in np.geomspace(low, high, levels)]


def _measure(prior: Prior, sigmas: list[float], given: _Given) -> tuple[LevelResult, ...]:
    x, cond, seed = given
    power = torch.fft.fft2(x.double() - x.double().mean(), norm="ortho").abs().square().mean(0)
    results = []
    for k, sigma in enumerate(sigmas):
        rng = np.random.Generator(np.random.Philox(key=[seed, k]))
        noise = torch.from_numpy(rng.standard_normal(tuple(x.shape), dtype=np.float32)).to(x.device)
        left = prior.denoise(x + sigma * noise, sigma, cond).double() - x
        expected = float((power * sigma**2 / (power + sigma**2)).mean())
        results.append(LevelResult(sigma, float(left.square().mean().sqrt()), math.sqrt(expected)))
    return tuple(results)


def _worst(results: tuple[LevelResult, ...]) -> float:
    ratios = [r.error / r.expected for r in results]
    return max(ratios) if all(map(math.isfinite, ratios)) else math.inf


def _suspects(card: ModelCard) -> Iterator[tuple[str, ModelCard]]:
    """Cards with one mistake undone, the commonest first."""

    def but(**changes: Any) -> ModelCard:
        return card.model_copy(update=changes)

    half = card.scale / 2
    yield "a range of -1 to 1 where the card says 0 to 1", but(offset=card.offset + half, scale=half)
    yield "a range of 0 to 1 where the card says -1 to 1", but(offset=card.offset - card.scale, scale=2 * card.scale)
    for kind in ("eps", "x0", "v", "score", "flow"):
        if kind != card.prediction and card.prediction != "edm":
            yield f"prediction {kind!r} where the card says {card.prediction!r}", but(prediction=kind)
    if card.path == "vp":
        now = card.schedule.get("schedule", "linear")
        for other in ("linear", "scaled_linear", "cosine"):
            if other != now:
                steps = {"steps": card.schedule["steps"]} if "steps" in card.schedule else {}
                yield f"a {other} schedule where the card says {now}", but(schedule={"schedule": other, **steps})
    if card.path == "vp_continuous":
        now = card.schedule.get("beta_max", 20.0)
        for beta in (10.0, 20.0):
            if beta != now:
                yield (
                    f"beta_max {beta:g} where the card says {now:g}",
                    but(schedule={**card.schedule, "beta_max": beta}),
                )
    clocks = {"vp": 1.0, "vp_continuous": 1.0, "flow": 1000.0}  # what diffusers multiplies the path's time by
    for path, factor in clocks.items():
        if path != card.path and card.path in clocks:
            built = {**card.architecture, **({"time_scale": factor} if "time_scale" in card.architecture else {})}
            changes = {"prediction": "flow"} if path == "flow" else {}
            yield (
                f"the path {path} where the card says {card.path}",
                but(path=path, schedule={}, architecture=built, **changes),
            )
    if card.path == "edm" and card.sigma_data is not None:
        for value in (0.5, 1.0):
            if value != card.sigma_data:
                yield f"sigma_data {value} where the card says {card.sigma_data}", but(sigma_data=value)
    for name, built in _constructions(card.architecture):
        yield name, but(architecture={**card.architecture, **built})


def _constructions(architecture: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """What no shape tells of a network, undone."""
    if "legacy_attention" in architecture:
        now = architecture["legacy_attention"]
        order = "q, k and v one after another" if now else "q, k and v within a head"
        yield f"{order} where the card says otherwise (--new-attention-order)", {"legacy_attention": not now}
    if "longest_period" in architecture:
        for value in (10_000.0, 0.005):
            if value != architecture["longest_period"]:
                yield (
                    f"longest_period {value:g} where the card says {architecture['longest_period']:g}",
                    {"longest_period": value},
                )
    if "centered" in architecture:
        now = architecture["centered"]
        words = ("a network that maps 0..1 to -1..1 itself", "a network that takes what it is given (--centered)")
        yield f"{words[not now]} where the card says otherwise", {"centered": not now}
    if "head_channels" in architecture:
        now = architecture["head_channels"]
        for width in (8, 16, 32, 64, 128, None):
            if width != now:
                yield f"head_channels {width or 'of all'} where the card says {now or 'all'}", {"head_channels": width}
    if "time_scale" in architecture:
        for value in (1.0, 1000.0):
            if value != architecture["time_scale"]:
                yield f"time_scale {value:g} where the card says {architecture['time_scale']:g}", {"time_scale": value}

"""OSEM with the relative difference prior, the penalised likelihood that clinical scanners offer.

    max over x >= 0 of  L(y | x) - strength mean(A^T 1) R(x)

with the prior R of recon3d.ops.rdp on the neighbours of every voxel, by De Pierro's separable surrogate in each
subset: monotone with one subset, close to the maximum with several. R grows in proportion to x as L's gradient does,
so the strength is a pure number and suits every activity and unit; more counts need less of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from recon3d import ops
from recon3d.baselines.osem import osem
from recon3d.baselines.progress import Callback
from recon3d.baselines.tv import tune
from recon3d.consistency.em import log_likelihood, mean_sensitivity, ordered_subsets_em, ordered_sum
from recon3d.operators.base import LinearOperator
from recon3d.ops.rdp import Axes

__all__ = ["RDP_STRENGTHS", "TunedRDP", "osem_rdp", "osem_rdp_objective", "tune_osem_rdp"]

# 1e-4 to 10 in steps of 10^(1/4)
RDP_STRENGTHS: tuple[float, ...] = tuple([10 ** (-4 + k / 4) for k in range(21)])
# epsilon in units of the mean activity: far below what matters, far above what float32 rounds off
_EPSILON = 1e-3


def osem_rdp(
    y: Tensor,
    operator: LinearOperator,
    strength: float = 0.03,
    iterations: int = 8,
    subsets: int = 1,
    gamma: float = 2.0,
    axes: Axes = "zyx",
    spacing_mm: tuple[float, float, float] | None = None,
    value_scale: float | None = None,
    x0: Tensor | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """Reconstruct by OSEM with the relative difference prior.

    Args:
        y: counts in the operator's range, at least 0 (ones for the events of a list).
        operator: the scanner; weights that are not negative. Its `additive` counts and `sensitivity()` are used.
        strength: dimensionless weight of the prior, above 0; 1e-3 (many counts) to 1 (few).
        iterations: passes over the measurement, `subsets` updates each.
        subsets: of the measurement.
        gamma: how much the prior spares edges, at least 1.
        axes: "zyx" ties the six neighbours of a voxel, "z" those in the next slices alone.
        spacing_mm: voxel size (z, y, x); None takes the operator's grid, or cubes without one.
        value_scale: a typical activity, which fixes the prior's epsilon; None takes the mean of the start's voxels
            above 1 % of its maximum.
        x0: start; None takes one pass of OSEM.
        callback: called after every pass with (pass, volume); returning True stops.

    Returns:
        The activity, at least 0, in the unit of the operator's domain.

    Raises:
        ValueError: counts are negative, or a number or y does not fit.
    """
    _check(strength, iterations, gamma, value_scale)
    x = osem(y, operator, 1, subsets) if x0 is None else x0
    epsilon = _EPSILON * (mean_activity(x) if value_scale is None else value_scale)
    beta = strength * mean_sensitivity(operator, y, subsets)
    for k in range(1, iterations + 1):
        x = ordered_subsets_em(
            x, y, operator, subsets=subsets, iterations=subsets, rdp=beta, gamma=gamma, epsilon=epsilon, axes=axes,
            spacing_mm=spacing_mm,
        )  # fmt: skip
        if callback is not None and callback(k, x):
            break
    return x


def osem_rdp_objective(
    x: Tensor,
    y: Tensor,
    operator: LinearOperator,
    strength: float,
    value_scale: float,
    gamma: float = 2.0,
    axes: Axes = "zyx",
    spacing_mm: tuple[float, float, float] | None = None,
) -> float:
    """What osem_rdp with one subset raises at every iteration.

    Args:
        x: activity [z, y, x], at least 0.
        y: as in osem_rdp.
        operator: as in osem_rdp.
        strength: as in osem_rdp.
        value_scale: as in osem_rdp.
        gamma: as in osem_rdp.
        axes: as in osem_rdp.
        spacing_mm: as in osem_rdp.

    Returns:
        log-likelihood - strength mean(A^T 1) R(x), in float64 and without the term log(y!).
    """
    grid = getattr(operator, "grid", None)
    spacing = spacing_mm or (None if grid is None else grid.spacing_mm)
    penalty = ops.rdp(x, gamma, _EPSILON * value_scale, axes, spacing)
    return log_likelihood(x, y, operator) - strength * mean_sensitivity(operator, y) * float(penalty)


@dataclass(frozen=True)
class TunedRDP:
    """The best of several strengths and numbers of passes.

    Attributes:
        strength: the best one.
        iterations: passes at which it was best.
        volume: its reconstruction.
        scores: every strength tried, with the best score over its passes, in ascending order.
    """

    strength: float
    iterations: int
    volume: Tensor
    scores: tuple[tuple[float, float], ...]


def tune_osem_rdp(
    y: Tensor,
    operator: LinearOperator,
    reference: Tensor,
    strengths: Sequence[float] = RDP_STRENGTHS,
    iterations: int = 10,
    score: Callable[[Tensor], float] | None = None,
    start: float = 0.03,
    **options: object,
) -> TunedRDP:
    """Pick strength and number of passes with the truth in hand, which favours the rival.

    Args:
        y: as in osem_rdp.
        operator: as in osem_rdp.
        reference: the true activity.
        strengths: ascending grid, climbed as recon3d.baselines.tune does.
        iterations: passes at most; every pass is scored.
        score: volume -> figure to maximise; None takes the PSNR in dB with the reference's range.
        start: where to begin.
        options: of osem_rdp.

    Returns:
        The best strength and number of passes, its volume and the scores.

    Raises:
        ValueError: as osem_rdp; or the grid is empty, not ascending or not positive, or all scores are NaN.
    """
    span = float(reference.max() - reference.min())

    def psnr(x: Tensor) -> float:
        error = (x - reference).contiguous()
        return 10 * math.log10(max(span, 1e-30) ** 2 * error.numel() / max(float(ops.dot(error, error)), 1e-300))

    judge = score or psnr
    if options.get("x0") is None:  # the same start for every strength
        options["x0"] = osem(y, operator, 1, int(options.get("subsets", 1)))  # type: ignore[call-overload]
    passes: dict[float, int] = {}
    scores: dict[float, float] = {}
    now = start

    def run(strength: float) -> Tensor:
        nonlocal now
        now = strength
        scores[strength], passes[strength] = -math.inf, 0
        best = reference

        def look(k: int, x: Tensor) -> None:
            nonlocal best
            found = judge(x)
            if found > scores[strength]:  # a NaN is not better
                scores[strength], passes[strength], best = found, k, x

        osem_rdp(y, operator, strength, iterations, callback=look, **options)  # type: ignore[arg-type]
        return best

    # tune asks for the score of what was just run
    found = tune(run, reference, strengths, lambda x: scores[now] if passes[now] else math.nan, start)
    return TunedRDP(found.strength, passes[found.strength], found.volume, found.scores)


def mean_activity(x: Tensor) -> float:
    """Mean over the voxels above 1 % of the maximum; 1 for an empty volume."""
    inside = x > 0.01 * x.amax()
    number = int(inside.sum())
    return ordered_sum(torch.where(inside, x, 0.0)) / number if number else 1.0


def _check(strength: float, iterations: int, gamma: float, value_scale: float | None) -> None:
    if not (math.isfinite(strength) and strength > 0):
        raise ValueError(f"osem_rdp: strength must be positive, got {strength}; without the prior use osem")
    if iterations < 1:
        raise ValueError(f"osem_rdp: iterations must be at least 1, got {iterations}")
    if not (math.isfinite(gamma) and gamma >= 1):
        raise ValueError(f"osem_rdp: gamma must be at least 1, got {gamma}")
    if value_scale is not None and not (math.isfinite(value_scale) and value_scale > 0):
        raise ValueError(f"osem_rdp: value_scale must be positive, got {value_scale}")

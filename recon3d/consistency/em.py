"""Ordered-subset EM: Poisson data met by a few multiplicative updates from the prior's estimate.

    L(x) = sum y log(A x + b) - (A x + b),   maximise  L(x) - w/2 |x - x0|^2 - beta R(x)  over x >= 0

one subset of the measurement after another (Hudson and Larkin, IEEE Trans. Med. Imaging 13 (1994) 601), each taking
1/subsets of the anchor and of the relative difference prior R. A sampler makes a few such sub-iterations at every
level and goes on with the next subset at the next one (PET-DDS, Singh et al., MELBA 2 (2024) 547), so the count of
sub-iterations is part of its state.

Units. y and b are counts, x is an activity such as Bq/mL, the sensitivity s = A^T 1 is counts per Bq/mL. R grows in
proportion to x, so beta / mean(s) is a pure number; w is counts per (Bq/mL)^2, so w times an activity / mean(s) is one.
"""

from __future__ import annotations

import math
from collections.abc import MutableMapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from recon3d import ops
from recon3d.consistency.base import On
from recon3d.consistency.solve import Rho
from recon3d.operators.base import LinearOperator
from recon3d.ops.em import Form
from recon3d.ops.rdp import Axes
from recon3d.trajectory import Level

__all__ = [
    "OrderedSubsets",
    "log_likelihood",
    "mean_sensitivity",
    "ordered_subsets_em",
    "poisson_log_likelihood",
    "uniform_start",
]

_CHUNK = 1 << 22
# how smoothing falls with the counts of a voxel: a fit by hand to three levels of counts (about 22, 88 and 350 of them)
# of simulated scans of subjects that the packaged prior was trained on
_SMOOTHING = 0.7


def poisson_log_likelihood(y: Tensor, expected: Tensor) -> float:
    """sum y log(expected) - expected, summed in float64; without the term log(y!), which no image changes.

    Args:
        y: counts, at least 0.
        expected: like y. Bins where nothing is expected are left out, as EM leaves them out.

    >>> poisson_log_likelihood(torch.tensor([2.0, 3.0]), torch.tensor([1.0, 0.0]))
    -1.0
    """
    return _counts_times_log(y, expected) - ordered_sum(expected.clamp(min=0))


def log_likelihood(x: Tensor, y: Tensor, operator: LinearOperator) -> float:
    """Poisson log-likelihood of an activity, sum y log(A x + b) - s x - b.

    Args:
        x: activity [z, y, x].
        y: counts in the operator's range (ones for the events of a list).
        operator: the scanner. `additive`, the expected background in counts, and `sensitivity()`, its A^T 1, are used
            where it has them; for a list of events s x is what all lines expect, whether they had an event or not.
    """
    (part,) = _parts(operator, 1)
    x = x.clamp(min=0)
    total = _counts_times_log(y, part.expected(x)) - float(ops.dot(part.sensitivity(y), x))
    additive = getattr(operator, "additive", None)
    return total if additive is None else total - ordered_sum(additive.expand(y.shape))


def _counts_times_log(y: Tensor, expected: Tensor) -> float:
    total = torch.zeros((), dtype=torch.float64, device=y.device)
    for counts, mean in zip(y.flatten().split(_CHUNK), expected.flatten().split(_CHUNK), strict=True):
        total += ops.dot(counts[None], torch.where(mean > 0, mean, 1.0).log_()[None])
    return float(total)


def ordered_sum(t: Tensor) -> float:
    """Sum in float64, in an order that does not depend on the number of threads."""
    total = torch.zeros((), dtype=torch.float64, device=t.device)
    for part in t.flatten().split(_CHUNK):
        total += ops.dot(part[None], torch.ones_like(part)[None])
    return float(total)


def mean_sensitivity(operator: LinearOperator, y: Tensor, subsets: int = 1) -> float:
    """Mean of A^T 1 over the voxels that the scanner sees, in counts per unit of x; what dimensionless strengths mean.

    Args:
        operator: the scanner.
        y: a measurement, for its dtype and device.
        subsets: whose sensitivities to add up; the sum does not depend on it but for rounding, the work kept does.
    """
    return _whole(operator, subsets, y)[1]


def uniform_start(operator: LinearOperator, y: Tensor, subsets: int = 1) -> Tensor:
    """The constant volume that explains all counts above the background, 0 where the scanner sees nothing."""
    seen, mean = _whole(operator, subsets, y)
    additive = getattr(operator, "additive", None)
    counts = ordered_sum(y)
    if additive is not None:
        counts = max(counts - ordered_sum(additive.expand(y.shape)), 0.01 * counts)
    number = int(seen.sum())
    value = counts / (mean * number) if number and mean > 0 else 0.0
    return seen.to(y.dtype) * value


def ordered_subsets_em(
    x: Tensor,
    y: Tensor,
    operator: LinearOperator,
    *,
    subsets: int = 1,
    iterations: int = 1,
    start: int = 0,
    anchor: Tensor | None = None,
    anchor_weight: float = 0.0,
    rdp: float = 0.0,
    gamma: float = 2.0,
    epsilon: float = 1e-6,
    axes: Axes = "z",
    spacing_mm: tuple[float, float, float] | None = None,
    form: Form = "surrogate",
    floor: float = 1e-4,
) -> Tensor:
    """EM sub-iterations, each on the next subset of the measurement.

    Args:
        x: activity [z, y, x] to start from; negative voxels count as 0. Where all is 0, EM without an anchor stays.
        y: counts in the operator's range, at least 0.
        operator: the scanner, with weights that are not negative. `additive` (expected background in counts) and
            `sensitivity()` (A^T 1) are used where it has them; else there is no background and A^T 1 is formed.
        subsets: number of subsets, the operator's own for more than 1.
        iterations: sub-iterations; `subsets` of them pass over the measurement once.
        start: sub-iterations made before; the first one takes subset start mod subsets.
        anchor: volume to stay near; may be negative in places.
        anchor_weight: w, counts per squared unit of x.
        rdp: beta of the relative difference prior, counts per unit of x.
        gamma: of the prior.
        epsilon: of the prior, unit of x.
        axes: of the prior, "z" or "zyx".
        spacing_mm: voxel size (z, y, x) for the prior; None takes the operator's grid, or cubes without one.
        form: "surrogate" (never diverges) or "gradient", see recon3d.ops.em_update.
        floor: of the gradient form, unit of x.

    Returns:
        The volume, at least 0; voxels that no line crosses keep their value.

    Raises:
        ValueError: negative or non-finite counts, a number out of range, or y that does not fit the operator.
    """
    check_counts("ordered_subsets_em", y, operator)
    _check_numbers("ordered_subsets_em", subsets=subsets, iterations=iterations)
    if start < 0:
        raise ValueError(f"ordered_subsets_em: start must be at least 0, got {start}")
    prior = _Prior(anchor_weight, rdp, gamma, epsilon, axes, _spacing(operator, spacing_mm), form, floor)
    return _iterate(x, y, operator, subsets, iterations, start, anchor, prior)


def check_counts(name: str, y: Tensor, operator: LinearOperator) -> None:
    """Refuse what is no measurement in counts of this scanner."""
    if y.shape != torch.Size(operator.range.shape):
        raise ValueError(f"{name}: y needs the operator's shape {tuple(operator.range.shape)}, got {tuple(y.shape)}")
    if y.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{name}: counts in float32 or float64 are needed, got {y.dtype}; convert them")
    if y.numel():
        least, most = (float(v) for v in y.aminmax())
        if not (least >= 0 and math.isfinite(most)):
            raise ValueError(
                f"{name}: counts must be finite and at least 0, got values in [{least:g}, {most:g}]; "
                "give prompts, and randoms and scatter as the operator's additive term"
            )


@dataclass
class OrderedSubsets:
    """Ordered-subset EM from the prior's estimate, with the estimate as anchor.

    Attributes:
        iterations: sub-iterations per level; between two looks at the likelihood where that decides.
        subsets: of the measurement. The state counts sub-iterations, so levels go on through the subsets.
        anchor: weight w of the prior's estimate: "bayes" is value / sigma^2, the posterior's weight at level sigma in
            user units; "relative" is value mean(s) / value_scale, the same at every level; "growing" is that times
            (sigma_ref / sigma)^2; "absolute" is w. None leaves the estimate as start alone.
        rdp: strength of the relative difference prior.
        rdp_rule: "relative" is beta / mean(s), "absolute" beta value_scale, both pure numbers; the second weighs R of
            the image in units of value_scale against the log-likelihood, whatever the number of counts. "noise" lies
            between, beta / mean(s) = rdp N^-0.7 with N = mean(s) value_scale, the counts that a voxel of typical
            activity gives: four times the counts take 0.38 times the smoothing.
        value_scale: a typical activity, such as the prior's scale; the unit of epsilon and floor.
        gamma: of the relative difference prior.
        epsilon: of the relative difference prior, in units of value_scale.
        axes: of the relative difference prior, "z" or "zyx".
        spacing_mm: voxel size (z, y, x); None takes the operator's grid, or cubes without one.
        form: "surrogate" or "gradient", see recon3d.ops.em_update.
        floor: of the gradient form, in units of value_scale.
        begin: updates of a level begin at its "estimate", or at the image of the "previous" level, which few updates
            then bring nearer to the maximum: it fits the counts already, and the estimate pulls as the anchor alone.
        target: "iterations", or "likelihood": go on until the log-likelihood reaches that of plain EM at the same part
            of its way (Webber et al., IEEE Trans. Med. Imaging 44 (2025) 4445).
        levels: levels of the trajectory, for "likelihood".
        passes: length of the plain run from a uniform start that sets the targets; made at first use.
        most: sub-iterations of one level at most, for "likelihood".
        on: "estimate" alone: clamping the noisy iterate at 0 makes samplers diverge.
    """

    iterations: int = 5
    subsets: int = 1
    anchor: Rho | None = None
    rdp: float = 0.0
    rdp_rule: Literal["relative", "absolute", "noise"] = "relative"
    value_scale: float = 1.0
    gamma: float = 2.0
    epsilon: float = 1e-3
    axes: Axes = "z"
    spacing_mm: tuple[float, float, float] | None = None
    form: Form = "surrogate"
    floor: float = 1e-4
    begin: Literal["estimate", "previous"] = "estimate"
    target: Literal["iterations", "likelihood"] = "iterations"
    levels: int = 0
    passes: int = 10
    most: int = 100
    on: On = "estimate"
    _checked: bool = False

    def __post_init__(self) -> None:
        name = "OrderedSubsets"
        _check_numbers(name, iterations=self.iterations, subsets=self.subsets, passes=self.passes, most=self.most)
        for key in ("rdp", "floor"):
            if not (math.isfinite(getattr(self, key)) and getattr(self, key) >= 0):
                raise ValueError(f"{name}: {key} must be finite and at least 0, got {getattr(self, key)}")
        for key in ("value_scale", "epsilon"):
            if not (math.isfinite(getattr(self, key)) and getattr(self, key) > 0):
                raise ValueError(f"{name}: {key} must be finite and positive, got {getattr(self, key)}")
        if self.on != "estimate":
            raise ValueError(f"{name}: on must be 'estimate', got {self.on!r}; EM would clamp the noisy state at 0")
        if self.target not in ("iterations", "likelihood"):
            raise ValueError(f"{name}: target must be 'iterations' or 'likelihood', got {self.target!r}")
        if self.target == "likelihood" and self.levels < 1:
            raise ValueError(f"{name}: target 'likelihood' needs the number of levels, got {self.levels}")

    def step(
        self, x0: Tensor, y: Tensor, operator: LinearOperator, level: Level, state: MutableMapping[str, Tensor]
    ) -> Tensor:
        if not self._checked:
            check_counts("OrderedSubsets", y, operator)
            self._checked = True
        count = int(state["em_count"]) if "em_count" in state else 0
        x = state["em_image"] if self.begin == "previous" and "em_image" in state else x0

        def go_on(x: Tensor, iterations: int) -> Tensor:
            nonlocal count
            x = _iterate(x, y, operator, self.subsets, iterations, count, x0, prior)
            count += iterations
            return x

        prior = self._prior(y, operator, level)
        if self.target == "iterations":
            x = go_on(x, self.iterations)
        else:
            goal, made = self._goal(y, operator, level, state), 0
            while made < self.most and log_likelihood(x, y, operator) < goal:
                now = min(self.iterations, self.most - made)
                x, made = go_on(x, now), made + now
            if not made:
                x = _start(x0, _whole(operator, self.subsets, y)[0])
        state["em_count"] = torch.tensor([count])
        if self.begin == "previous":
            state["em_image"] = x
        return x

    def _prior(self, y: Tensor, operator: LinearOperator, level: Level) -> _Prior:
        needed = (self.rdp and self.rdp_rule != "absolute") or self.anchor
        mean = mean_sensitivity(operator, y, self.subsets) if needed else 0.0
        weight = self.anchor.at(level.sigma, lambda: mean / self.value_scale) if self.anchor else 0.0
        unit = self.value_scale
        spacing = _spacing(operator, self.spacing_mm)
        smoothing = (mean * unit) ** -_SMOOTHING if mean > 0 else 0.0
        per_strength = {"relative": mean, "noise": mean * smoothing, "absolute": 1 / unit}
        beta = self.rdp * per_strength[self.rdp_rule]
        return _Prior(weight, beta, self.gamma, self.epsilon * unit, self.axes, spacing, self.form, self.floor * unit)

    def _goal(self, y: Tensor, operator: LinearOperator, level: Level, state: MutableMapping[str, Tensor]) -> float:
        if "em_targets" not in state:
            plain = _Prior(0.0, 0.0, 2.0, 1.0, "z", None, "surrogate", 0.0)
            x = uniform_start(operator, y, self.subsets)
            values = [log_likelihood(x, y, operator)]
            for k in range(self.passes):
                x = _iterate(x, y, operator, self.subsets, self.subsets, k * self.subsets, None, plain)
                values.append(log_likelihood(x, y, operator))
            state["em_targets"] = torch.tensor(values, dtype=torch.float64)
        values = [float(v) for v in state["em_targets"]]
        at = min(1.0, (level.index + 1) / self.levels) * self.passes
        k = min(int(at), self.passes - 1)
        return float(values[k] + (at - k) * (values[k + 1] - values[k]))


@dataclass(frozen=True)
class _Prior:
    """Terms beside the likelihood, in the units of ops.em_update."""

    anchor_weight: float
    rdp: float
    gamma: float
    epsilon: float
    axes: Axes
    spacing_mm: tuple[float, float, float] | None
    form: Form
    floor: float


class _Part:
    """One subset: its operator, where its data lie in the measurement, and its sensitivity once that was asked for."""

    def __init__(self, operator: LinearOperator, whole: LinearOperator, index: Tensor | None) -> None:
        self.operator, self._index, self._slice = operator, index, slice(None)
        self._sensitivity: Tensor | None = None
        pairs = zip(operator.range.shape, whole.range.shape, strict=True)
        self._axis = next((axis for axis, (a, b) in enumerate(pairs) if a != b), 0)
        if index is not None and self._axis == 0 and index.numel() > 1:
            first, step = int(index[0]), int(index[1] - index[0])
            if step > 0 and torch.equal(index.cpu(), first + step * torch.arange(index.numel())):
                self._slice, self._index = slice(first, int(index[-1]) + 1, step), None  # a view, not a copy

    def data(self, y: Tensor) -> Tensor:
        return y[self._slice] if self._index is None else y.index_select(self._axis, self._index.to(y.device))

    def sensitivity(self, y: Tensor) -> Tensor:
        if hasattr(self.operator, "sensitivity"):
            given: Tensor = self.operator.sensitivity()
            return given.to(y)
        kept = self._sensitivity
        if kept is None or kept.dtype != y.dtype or kept.device != y.device:
            kept = self.operator.adjoint(torch.ones(self.operator.range.shape, dtype=y.dtype, device=y.device))
            self._sensitivity = kept
        return kept

    def expected(self, x: Tensor) -> Tensor:
        projection, additive = self.operator(x), self._additive(x)
        return projection if additive is None else projection + additive

    def back(self, x: Tensor, y: Tensor, rooms: dict[torch.Size, Tensor]) -> Tensor:
        """A^T (y / (A x + b)); factors join in the pass over the measurement where the operator offers P alone.

        Projections go where an earlier one of their size went: fresh memory may cost more than they do.
        """
        a: Any = self.operator
        additive = self._additive(y)
        if hasattr(a, "project") and hasattr(a, "back_project"):
            factors = None if a.factors is None else a.factors.to(y)
            projection = rooms[y.shape] = a.project(x, rooms.get(y.shape))
            out: Tensor = a.back_project(ops.poisson_ratio(y, projection, factors, additive, a.scale))
            return out
        out = a.adjoint(ops.poisson_ratio(y, a(x), None, additive))
        return out

    def _additive(self, like: Tensor) -> Tensor | None:
        additive: Tensor | None = getattr(self.operator, "additive", None)
        return None if additive is None else additive.to(like)


class _Plan:
    """What EM works out about an operator once: subsets, and what they see per dtype and device."""

    def __init__(self, owner: LinearOperator) -> None:
        self.owner = owner
        self.parts: dict[int, list[_Part]] = {}
        self.wholes: dict[tuple[object, ...], tuple[Tensor, float]] = {}


def _plan(operator: LinearOperator) -> _Plan:
    # kept with the operator, as its norm is; a shallow copy of an operator is another one
    plan: _Plan | None = vars(operator).get("_em_plan")
    if plan is None or plan.owner is not operator:
        plan = vars(operator)["_em_plan"] = _Plan(operator)
    return plan


def _parts(operator: LinearOperator, n: int) -> list[_Part]:
    kept = _plan(operator).parts
    if n not in kept:
        parts = [(operator, None)] if n == 1 else operator.subsets(n)
        kept[n] = [_Part(part, operator, index) for part, index in parts]
    return kept[n]


def _whole(operator: LinearOperator, subsets: int, y: Tensor) -> tuple[Tensor, float]:
    """Where the scanner sees anything, and the mean of its sensitivity there."""
    kept = _plan(operator).wholes
    key = (subsets, y.dtype, y.device)
    if key not in kept:
        parts = _parts(operator, subsets)
        total = parts[0].sensitivity(y).clone()
        for part in parts[1:]:
            total += part.sensitivity(y)
        seen = total > 0
        number = int(seen.sum())
        kept[key] = (seen, ordered_sum(total.clamp(min=0)) / number if number else 0.0)
    return kept[key]


def _iterate(
    x: Tensor,
    y: Tensor,
    operator: LinearOperator,
    subsets: int,
    iterations: int,
    start: int,
    anchor: Tensor | None,
    prior: _Prior,
) -> Tensor:
    parts = _parts(operator, subsets)
    x = _start(x, _whole(operator, subsets, y)[0])
    rooms: dict[torch.Size, Tensor] = {}
    for i in range(start, start + iterations):
        part = parts[i % subsets]
        x = ops.em_update(
            x,
            part.back(x, part.data(y), rooms),
            part.sensitivity(y),
            anchor=anchor if prior.anchor_weight else None,
            anchor_weight=prior.anchor_weight,
            rdp=prior.rdp,
            gamma=prior.gamma,
            epsilon=prior.epsilon,
            axes=prior.axes,
            spacing_mm=prior.spacing_mm,
            form=prior.form,
            floor=prior.floor,
            scale=1 / subsets,
        )
    return x


def _start(x: Tensor, seen: Tensor) -> Tensor:
    return torch.where(seen, x.clamp(min=0), x)


def _spacing(
    operator: LinearOperator, spacing_mm: tuple[float, float, float] | None
) -> tuple[float, float, float] | None:
    grid = getattr(operator, "grid", None)
    return spacing_mm or (None if grid is None else grid.spacing_mm)


def _check_numbers(name: str, **numbers: int) -> None:
    for key, value in numbers.items():
        if value < 1:
            raise ValueError(f"{name}: {key} must be at least 1, got {value}")

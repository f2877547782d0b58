"""The probability flow with steps found on the way: Dormand and Prince's Runge-Kutta pair of orders 5 and 4.

In the canonical state the flow of every noise path is du/dsigma = (u - D(u, sigma)) / sigma, with D the estimate that
the data agree with. One visit of the prior is one stage; seven stages make a step, of which the last is the first of
the next step, so a step costs six visits. The difference of the two orders tells the error of a step: the step is taken
again with a smaller one where the error is above  atol + rtol * (root mean square of the state, the prior's zero taken
off).  The worst slice of the volume decides, for all slices go down together. After sigma_min one visit more goes to
zero.

Everything between two visits lives in the run's memory, seven volumes and four numbers, so a run can be saved and
resumed to the same bits after any visit, in the middle of a step too.

Sources: Dormand, Prince, J. Comput. Appl. Math. 6 (1980) 19; Song et al., ICLR 2021 (appendix D.2: a probability flow
by such a pair); step control as in Hairer, Norsett, Wanner, Solving Ordinary Differential Equations I, section II.4.
"""

from __future__ import annotations

import math
from collections.abc import MutableMapping
from dataclasses import dataclass

import torch
from torch import Tensor

from recon3d import ops
from recon3d.real_view import real_view
from recon3d.trajectory import Level

__all__ = ["Adaptive", "DormandPrince"]

# row i: weights of the stages before stage i + 2; the last row is the fifth-order result, too
_WEIGHTS = (
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
)
# part of the step at which each stage is
_NODES = (0.0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0)
# fifth minus fourth order, stages 1 to 7
_ERROR = (71 / 57600, 0.0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40)
_STAGES = 7
# the usual bounds: a step is a little shorter than the error allows, and changes by these factors at most
_SAFETY, _SHRINK, _GROW = 0.9, 0.2, 5.0
# first step, as a part of the first level: a guess that the first error corrects
_FIRST = 0.1
# visits after which the tolerance counts as out of reach
_MOST = 100_000
_CONTROL, _BASE = "ode.control", "ode.base"


@dataclass(frozen=True)
class _Control:
    """Where the integration is: the level a step began at, its length, the next stage, and whether it is a retry."""

    sigma: float
    step: float
    stage: int
    retry: bool = False

    @classmethod
    def of(cls, memory: MutableMapping[str, Tensor]) -> _Control | None:
        if _CONTROL not in memory:
            return None
        sigma, step, stage, retry = memory[_CONTROL].tolist()
        return cls(sigma, step, int(stage), bool(retry))

    def store(self, memory: MutableMapping[str, Tensor]) -> None:
        values = [self.sigma, self.step, float(self.stage), float(self.retry)]
        memory[_CONTROL] = torch.tensor(values, dtype=torch.float64)

    def at(self, stage: int) -> float:
        return self.sigma - _NODES[stage - 1] * self.step


@dataclass(frozen=True)
class Adaptive:
    """The trajectory of a Dormand-Prince integration from sigma_max to sigma_min, and to zero.

    Attributes:
        sigma_max, sigma_min: user units.
        tolerance: guides the estimate of how many visits there will be.
    """

    sigma_max: float
    sigma_min: float
    tolerance: float = 1e-3

    def __post_init__(self) -> None:
        if not 0 < self.sigma_min < self.sigma_max < math.inf:
            raise ValueError(f"Adaptive: need 0 < sigma_min < sigma_max, got {self.sigma_min} and {self.sigma_max}")

    @property
    def start(self) -> float:
        return self.sigma_max

    def level(self, index: int, memory: MutableMapping[str, Tensor]) -> Level | None:
        """The stage that the memory says is next; None after the visit that went to zero."""
        if index == 0:
            return Level(0, self.sigma_max, self.sigma_max, False, kind="stage")
        control = _Control.of(memory)
        if control is None:
            return None
        if index >= _MOST:
            raise ValueError(
                f"Adaptive: {index} visits and still at sigma {control.sigma:.3g}; raise renoise.rtol or renoise.atol"
            )
        if control.sigma <= self.sigma_min:
            return Level(index, control.sigma, 0.0, True)
        following = control.at(min(control.stage + 1, _STAGES))
        return Level(index, control.at(control.stage), following, False, kind="stage")

    def expected(self, index: int, memory: MutableMapping[str, Tensor]) -> int:
        """Visits in all: those that were, and as many as the tolerance lets expect for the rest of the way."""
        control = _Control.of(memory)
        if control is None:
            return index or 2 + (_STAGES - 1) * self._steps(self.sigma_max)
        if control.sigma <= self.sigma_min:
            return index + 1
        in_hand = _STAGES + 1 - control.stage
        return index + in_hand + (_STAGES - 1) * max(0, self._steps(control.sigma) - 1) + 1

    def _steps(self, sigma: float) -> int:
        """Steps from sigma on, as counted with the Gaussian prior and the packaged CT prior."""
        whole = math.log10(self.sigma_max / self.sigma_min)
        part = math.log10(max(sigma, self.sigma_min) / self.sigma_min) / whole
        return math.ceil(part * (3 + 0.5 * whole * self.tolerance**-0.2))


@dataclass(frozen=True)
class DormandPrince:
    """The renoising rule that goes with `Adaptive`.

    Attributes:
        rtol: error of a step allowed, relative to the root mean square of the state less the prior's zero.
        atol: and in addition, user units.
        offset: the prior's zero, user units.
        sigma_min: level at which the integration ends, user units.
    """

    rtol: float
    atol: float
    offset: float
    sigma_min: float

    def __post_init__(self) -> None:
        if not (self.rtol >= 0 and self.atol >= 0 and self.rtol + self.atol > 0):
            raise ValueError(
                f"DormandPrince: rtol and atol must not be negative, nor both 0, got {self.rtol}, {self.atol}"
            )

    def advance(self, u: Tensor, x0: Tensor, level: Level, memory: MutableMapping[str, Tensor]) -> Tensor:
        """Put the slope of a stage into the memory, and in u the state of the next stage.

        Args:
            u: the stage's state, [z, y, x]; overwritten.
            x0: the estimate there.
            level: the stage.
            memory: what the run carries.
        """
        if level.kind != "stage":
            if not level.last:
                raise ValueError("DormandPrince: needs the stages of recon3d.dormand_prince.Adaptive as its trajectory")
            del memory[_CONTROL]
            return u.copy_(x0)
        control = _Control.of(memory) or _Control(level.sigma, self._first(level.sigma), 1)
        slope = torch.sub(u, x0).div_(level.sigma)
        if control.stage == 1:
            memory[_BASE] = u.clone()
        if control.stage < _STAGES:
            memory[_slope(control.stage)] = slope
            control = _Control(control.sigma, control.step, control.stage + 1, control.retry)
        else:
            control = self._judge(u, slope, control, memory)
        control.store(memory)
        if control.sigma <= self.sigma_min:  # u is the result; the last visit needs nothing else
            for name in [_BASE, *(_slope(k) for k in range(1, _STAGES))]:
                del memory[name]
            return u
        return _argument(u, control, memory)

    def _judge(self, u: Tensor, slope: Tensor, control: _Control, memory: MutableMapping[str, Tensor]) -> _Control:
        """Take the step or refuse it, from its error; the control of the step that follows."""
        error = slope.mul(_ERROR[-1])
        for k in range(1, _STAGES):
            error.add_(memory[_slope(k)], alpha=_ERROR[k - 1])
        wrong = _rms(error) * control.step
        allowed = self.atol + self.rtol * _rms(torch.sub(u, self.offset, out=error))
        ratio = float((wrong / allowed).max())
        # an error that is not finite is refused as the largest is; the executor names slices that are not finite
        factor = _SAFETY * ratio**-0.2 if ratio > 0 else _GROW
        if not ratio <= 1:
            return _Control(control.sigma, control.step * max(_SHRINK, factor if ratio < math.inf else 0.0), 2, True)
        sigma = self.sigma_min if self._ends(control) else control.sigma - control.step
        memory[_BASE].copy_(u)
        memory[_slope(1)] = slope
        grown = control.step * min(_GROW if not control.retry else 1.0, max(_SHRINK, factor))
        return _Control(sigma, min(grown, sigma - self.sigma_min), 2)

    def _ends(self, control: _Control) -> bool:
        return control.sigma - control.step <= self.sigma_min * (1 + 1e-12)

    def _first(self, sigma: float) -> float:
        return min(_FIRST * sigma, sigma - self.sigma_min)


def _argument(u: Tensor, control: _Control, memory: MutableMapping[str, Tensor]) -> Tensor:
    """The state of the next stage in u: base - step * (weighted slopes), sigma going down."""
    u.copy_(memory[_BASE])
    for k, weight in enumerate(_WEIGHTS[control.stage - 2], 1):
        if weight:
            u.add_(memory[_slope(k)], alpha=-control.step * weight)
    return u


def _slope(stage: int) -> str:
    return f"ode.slope{stage}"


def _rms(x: Tensor) -> Tensor:
    """Root mean square of every slice, float64; the same whatever the number of threads."""
    flat = real_view(x)
    return (ops.dot(flat, flat, per_slice=True) / max(1, flat[0].numel())).sqrt()

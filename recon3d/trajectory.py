"""Which noise levels a reconstruction visits, in which order, and where it starts.

A trajectory is a list of `Level`, or a rule that names the next one from what the run carries
(`recon3d.dormand_prince.Adaptive`). Grids are written in the prior's network units and multiplied by `prior.scale`
when the list is made, so everything the loop sees is in user units. The last level always lands on zero noise: no
random number is drawn for it and no prior call is spent on a finished image.

Grids: even or published DDIM times of a variance-preserving network (Song et al., ICLR 2021; Chung et al., ICLR
2024), geometric (variance exploding), and Karras et al. (NeurIPS 2022)
sigma_k = (max^(1/r) + k/(n-1) (min^(1/r) - max^(1/r)))^r.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol

from torch import Tensor

from recon3d.priors.paths import VP

__all__ = [
    "Level",
    "Steered",
    "Trajectory",
    "descend",
    "expected_visits",
    "first_sigma",
    "geometric",
    "karras",
    "next_level",
    "sweeps",
    "time_travel",
    "vp_times",
]

Kind = Literal["step", "correct", "travel", "predict", "refine", "stage"]


@dataclass(frozen=True)
class Level:
    """One visit of the prior.

    Attributes:
        index: counts visits from 0; random numbers are keyed by it.
        sigma: noise level at which the prior is asked, user units.
        sigma_next: noise level of the state afterwards, user units.
        last: nothing follows.
        data: the measurement enters at this visit.
        kind: "step" goes down, "correct" stays (a Langevin corrector), "travel" jumps back up after a sweep; "predict"
            and "refine" are the two halves of one Heun step, "stage" is one of a Runge-Kutta step.
        dip: the level that a step of time travel goes down to before fresh noise lifts the state to sigma_next; None
            for a step that ends where it goes.
        began: the level at which the step of a "refine" visit began.
    """

    index: int
    sigma: float
    sigma_next: float
    last: bool
    data: bool = True
    kind: Kind = "step"
    dip: float | None = None
    began: float = 0.0

    @property
    def down(self) -> float:
        """The level that the step itself goes down to."""
        return self.sigma_next if self.dip is None else self.dip


class Steered(Protocol):
    """A trajectory whose next level depends on the state: how long its steps may be is found on the way."""

    @property
    def start(self) -> float:
        """Noise level of the first state, user units."""
        ...

    def level(self, index: int, memory: MutableMapping[str, Tensor]) -> Level | None:
        """Visit `index`, from what the run carries; None when the run is over."""
        ...

    def expected(self, index: int, memory: MutableMapping[str, Tensor]) -> int:
        """How many visits there will have been in all, as far as can be told before visit `index`."""
        ...


Trajectory = Sequence[Level] | Steered


def next_level(trajectory: Trajectory, index: int, memory: MutableMapping[str, Tensor]) -> Level | None:
    """Visit `index`; None when the trajectory is over."""
    if not isinstance(trajectory, Sequence):
        return trajectory.level(index, memory)
    return trajectory[index] if index < len(trajectory) else None


def expected_visits(trajectory: Trajectory, index: int = 0, memory: MutableMapping[str, Tensor] | None = None) -> int:
    """Visits in all: a number, or for a steered trajectory an estimate that gets better as the run goes on."""
    if isinstance(trajectory, Sequence):
        return len(trajectory)
    return trajectory.expected(index, memory or {})


def first_sigma(trajectory: Trajectory) -> float:
    """Noise level of the first state, user units; 0 when there is nothing to visit."""
    if not isinstance(trajectory, Sequence):
        return trajectory.start
    return trajectory[0].sigma if trajectory else 0.0


def karras(n: int, sigma_max: float, sigma_min: float, rho: float = 7.0) -> list[float]:
    """n levels from sigma_max down to sigma_min, denser near sigma_min the larger rho is.

    >>> [round(s, 3) for s in karras(3, 2.0, 0.02)]
    [2.0, 0.29, 0.02]
    """
    _range("karras", n, sigma_max, sigma_min)
    if not rho > 0:
        raise ValueError(f"karras: rho must be positive, got {rho}")
    if n == 1:
        return [sigma_max]
    high, low = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    # the ends are exact, whatever the powers round to
    return [sigma_max, *((high + k / (n - 1) * (low - high)) ** rho for k in range(1, n - 1)), sigma_min]


def geometric(n: int, sigma_max: float, sigma_min: float) -> list[float]:
    """n levels of equal ratio from sigma_max down to sigma_min, the variance-exploding grid.

    >>> geometric(3, 1.0, 0.25)
    [1.0, 0.5, 0.25]
    """
    _range("geometric", n, sigma_max, sigma_min)
    if n == 1:
        return [sigma_max]
    return [sigma_max, *(sigma_max * (sigma_min / sigma_max) ** (k / (n - 1)) for k in range(1, n - 1)), sigma_min]


def vp_times(n: int, grid: Literal["even", "published"] = "even", path: VP | None = None, last: int = 0) -> list[int]:
    """n integer times of a discrete VP network, descending.

    Args:
        n: number of prior calls.
        grid: "even" spreads the times over [last, T-1] and meets both ends whatever n is; "published" is
            range(0, T, T // n) backwards, which starts at 980 for n = 50 and gives more than n times where n does
            not divide T.
        path: the network's schedule, 1000 linear steps by default.
        last: the last of the even times.

    >>> vp_times(50, "published")[:2], len(vp_times(50, "published")), vp_times(3)
    ([980, 960], 50, [999, 500, 0])
    """
    steps = (path or VP()).steps
    if not 1 <= n <= steps:
        raise ValueError(f"vp_times: n must be from 1 to {steps}, got {n}")
    if grid == "published":
        return list(range(0, steps, steps // n))[::-1]
    if grid != "even":
        raise ValueError(f"vp_times: grid must be 'even' or 'published', got {grid!r}")
    if not 0 <= last <= steps - n:
        raise ValueError(f"vp_times: last must leave room for {n} times below {steps}, got {last}")
    if n == 1:
        return [steps - 1]
    return [last + math.floor((steps - 1 - last) * (n - 1 - k) / (n - 1) + 0.5) for k in range(n)]


def descend(
    sigmas: Sequence[float],
    scale: float = 1.0,
    correctors: int = 0,
    stale: bool = False,
    data_at: Literal["every", "steps", "corrected"] = "every",
    heun: bool = False,
    polish: bool = False,
) -> list[Level]:
    """One pass down a grid, ending at zero noise.

    Args:
        sigmas: strictly descending, positive, network units; zero is appended.
        scale: user units per network unit.
        correctors: Langevin visits after each step that still has noise.
        stale: ask the corrector's prior at the level the step came from, as some published samplers do, instead of
            at the level the state has reached.
        data_at: where the measurement enters: at every visit, at steps, or once per level after its correctors.
        heun: two visits a step, "predict" at its beginning and "refine" at its end, as one formula of second order; the
            step to zero, where the slope is not defined, stays a single visit.
        polish: the last visit goes without the data, so that its estimate is the result.
    """
    _descending("descend", sigmas)
    if correctors < 0:
        raise ValueError(f"descend: correctors must not be negative, got {correctors}")
    if heun and (correctors or data_at == "corrected"):
        raise ValueError("descend: Heun's two visits must see the same data; use data_at every or steps, no correctors")
    levels: list[Level] = []
    ends = [*sigmas[1:], 0.0]
    for sigma, following in zip(sigmas, ends, strict=True):
        visits: list[Kind] = ["predict", "refine"] if heun and following else ["step"]
        visits += ["correct"] * (correctors if following else 0)
        for k, kind in enumerate(visits):
            data = data_at == "every" or (kind != "correct" if data_at == "steps" else k == len(visits) - 1)
            above = kind in ("step", "predict")
            seen = sigma if above or (stale and kind == "correct") else following
            reached = sigma if stale and kind == "correct" else following
            began = sigma * scale if kind == "refine" else 0.0
            levels.append(Level(len(levels), seen * scale, reached * scale, False, data, kind, began=began))
    return [*levels[:-1], replace(levels[-1], sigma_next=0.0, last=True, data=levels[-1].data and not polish)]


def time_travel(levels: Sequence[Level], length: int, repeats: int) -> list[Level]:
    """Pass every stretch of a descent several times: noise lifts the state back to where the stretch began.

    With r = repeats + 1 passes this is RePaint's schedule of jumps (Lugmayr et al., CVPR 2022: jump_length,
    jump_n_sample) and the time travel of DDNM (travel_length, travel_repeat). Stretches end at the last level before
    zero and at every length-th level above it; what is left over at the top is passed once.

    Args:
        levels: plain steps, as from `descend`.
        length: levels of a stretch.
        repeats: further passes of each stretch.

    >>> way = time_travel(descend([4.0, 2.0, 1.0]), length=2, repeats=1)
    >>> [(level.sigma, level.down, level.sigma_next) for level in way]
    [(4.0, 2.0, 2.0), (2.0, 1.0, 4.0), (4.0, 2.0, 2.0), (2.0, 1.0, 1.0), (1.0, 0.0, 0.0)]
    """
    if length < 1 or repeats < 0:
        raise ValueError(f"time_travel: need length >= 1 and repeats >= 0, got {length} and {repeats}")
    if any(level.kind != "step" for level in levels):
        raise ValueError(
            "time_travel: levels must be plain steps; leave out correctors, sweeps and Heun's second visits"
        )
    way: list[Level] = []
    for k, level in enumerate(levels):
        # after this step the state is at levels[k + 1], so many levels above the last one
        above = len(levels) - 2 - k
        if repeats and above >= 0 and above % length == 0 and k + 1 >= length:
            stretch = levels[k + 1 - length : k + 1]
            back = replace(level, sigma_next=stretch[0].sigma, dip=level.sigma_next)
            way += [back, *[*stretch[:-1], back] * (repeats - 1), *stretch]
        else:
            way.append(level)
    return [replace(level, index=index) for index, level in enumerate(way)]


def sweeps(
    couplings: Sequence[float], inner: int, floor: float = 0.1, scale: float = 1.0, rho: float = 7.0
) -> list[Level]:
    """Split Gibbs sampling: for each coupling r, descend from r to zero without data, then travel to the next r.

    Args:
        couplings: distances between the prior's and the data's variable, one per sweep, network units, none larger
            than the one before; the first is also the noise of the start.
        inner: prior calls per sweep.
        floor: the lowest level of a sweep as a fraction of its coupling.
        scale: user units per network unit.
        rho: spacing of the inner Karras grid.
    """
    if not couplings or any(not (math.isfinite(r) and r > 0) for r in couplings):
        raise ValueError(f"sweeps: couplings must be positive and finite, got {list(couplings)}")
    if any(b > a for a, b in itertools.pairwise(couplings)):
        raise ValueError("sweeps: couplings must not grow; sort them from the largest to the smallest")
    if inner < 1 or not 0 < floor < 1:
        raise ValueError(f"sweeps: need inner >= 1 and floor in (0, 1), got {inner} and {floor}")
    levels: list[Level] = []
    for k, r in enumerate(couplings):
        grid = karras(inner, r, r * floor, rho)
        final = k == len(couplings) - 1
        for sigma, following in zip(grid, [*grid[1:], 0.0], strict=True):
            if following or final:
                levels.append(Level(len(levels), sigma * scale, following * scale, not following, False))
            else:
                levels.append(Level(len(levels), sigma * scale, couplings[k + 1] * scale, False, True, "travel"))
    return levels


def _range(name: str, n: int, sigma_max: float, sigma_min: float) -> None:
    if n < 1 or not (math.isfinite(sigma_max) and sigma_min > 0 and (sigma_min < sigma_max or n == 1)):
        raise ValueError(f"{name}: need n >= 1 and 0 < sigma_min < sigma_max, got {n}, {sigma_min}, {sigma_max}")


def _descending(name: str, sigmas: Sequence[float]) -> None:
    if not sigmas or not all(math.isfinite(s) and s > 0 for s in sigmas):
        raise ValueError(f"{name}: sigmas must be positive and finite, got {list(sigmas)}")
    if any(b >= a for a, b in itertools.pairwise(sigmas)):
        raise ValueError(f"{name}: sigmas must strictly descend, got {list(sigmas)}")

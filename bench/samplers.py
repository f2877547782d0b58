"""samplers: how fast each sampler's error falls with its prior calls, where the answer is known; and what it draws.

The prior is a Gaussian with a power-law spectrum, whose flow and whose law at every noise level are closed forms:

* ODE: distance of the end of the flow from the exact end, relative, from one start (Euler 1st order, Heun 2nd, Dormand
  and Prince by its tolerance);
* SDE, in law: error of the variance of the worst frequency. A step is linear, so the law of what a rule draws is a
  recursion over its weights, without Monte-Carlo error;
* SDE, path by path: distance of n Euler-Maruyama steps from 2n steps with the same Brownian motion, two fine increments
  of which add up to a coarse one. Noise that does not depend on the state makes the strong order 1.

Figures go to bench/results/samplers.csv, the curves to docs/images/samplers.png. docs/images/samples.png shows slices
that the packaged CT prior draws from the same noise.
"""

from __future__ import annotations

import csv
import dataclasses
import datetime
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench._common import RESULTS, Gate, Row, commit, judge
from recon3d import noise
from recon3d.consistency import Identity
from recon3d.dormand_prince import Adaptive, DormandPrince
from recon3d.engine.loop import Job, Start, begin
from recon3d.engine.loop import run as visits
from recon3d.operators.base import LinearOperator, Space
from recon3d.ops.philox import NoiseKey
from recon3d.planes import Axial
from recon3d.priors import load_prior
from recon3d.priors.base import Prior
from recon3d.priors.gaussian import GaussianPrior, cosine_basis, power_law
from recon3d.renoise import DDIM, Ancestral, EulerMaruyama, Heun, Renoise, Rule
from recon3d.trajectory import Trajectory, descend, geometric, karras

SHAPE, MEAN, STD = (5, 6), 1.0, 0.6
HIGH, LOW = 10.0, 0.02
IMAGES = Path(__file__).parent.parent / "docs" / "images"
COLUMNS = ("date", "commit", "kind", "sampler", "setting", "prior_calls", "error")


class Blind(LinearOperator):
    """A scanner that sees nothing: for sampling the prior."""

    coupling = "slice"

    def __init__(self, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
        self.domain = Space(shape, dtype, "1")
        self.range = Space((shape[0], 1, 1), dtype, "1")

    def forward(self, x: Tensor) -> Tensor:
        return x.new_zeros(self.range.shape)

    def adjoint(self, y: Tensor) -> Tensor:
        return y.new_zeros(self.domain.shape)


@dataclass(frozen=True)
class Point:
    """One measurement of a curve."""

    kind: str
    sampler: str
    setting: float
    calls: int
    error: float


def gaussian() -> GaussianPrior:
    """The prior with a closed form."""
    return GaussianPrior(power_law(SHAPE, STD), MEAN, offset=MEAN)


def sampling(
    prior: Prior,
    shape: tuple[int, int, int],
    way: Trajectory,
    rule: Rule,
    key: NoiseKey | None = None,
    dtype: torch.dtype = torch.float64,
    seed: int = 1,
) -> Job:
    """A job without data."""
    alone = noise.independent(shape[0], seed=seed)
    operator = Blind(shape, dtype)
    return Job(
        operator, torch.zeros(operator.range.shape, dtype=dtype), prior, way, Axial(shape[0], shape[0]), Identity(),
        Renoise(rule), key or alone, Start(noise=alone),
    )  # fmt: skip


def finish(job: Job) -> tuple[Tensor, int]:
    """The volume and the number of prior calls."""
    state = begin(job)
    for _ in visits(job, state):
        pass
    return state.u, state.index


def flow_end(prior: GaussianPrior, u: Tensor, high: float, low: float) -> Tensor:
    """What the exact flow from u at level `high` becomes: followed to `low`, and denoised there."""
    rows, columns = (cosine_basis(n) for n in prior.spectrum.shape)
    spectrum = prior.spectrum
    factor = ((spectrum + low**2) / (spectrum + high**2)).sqrt() * spectrum / (spectrum + low**2)
    return MEAN + rows.T @ (factor * (rows @ (u - MEAN) @ columns.T)) @ columns


def flow_error(way: Trajectory, rule: Rule) -> tuple[int, float]:
    """Prior calls of an ODE sampler, and how far it ends from the exact end, relative to the spread of ends."""
    prior = gaussian()
    job = sampling(prior, (8, *SHAPE), way, rule)
    want = flow_end(prior, begin(job).u, HIGH, LOW)
    got, calls = finish(job)
    return calls, float((got - want).norm() / (want - MEAN).norm())


def law_error(grid: Sequence[float], rule: Any) -> float:
    """Error of the variance at the grid's last level, relative, of the worst frequency."""
    spectrum = gaussian().spectrum
    variance = spectrum + grid[0] ** 2
    for sigma, following in itertools.pairwise(grid):
        a, b = rule.weights(sigma, following)
        gain = spectrum / (spectrum + sigma**2)
        variance = (gain + a * following / sigma * (1 - gain)) ** 2 * variance + (b * following) ** 2
    return float((variance / (spectrum + grid[-1] ** 2) - 1).abs().max())


@dataclass(frozen=True, eq=False)
class Brownian(NoiseKey):
    """One Brownian motion for n steps (`coarse`) and for 2n: a coarse increment is the sum of two fine ones."""

    coarse: bool = False

    def at(self, level: int, stream: int | None = None) -> NoiseKey:
        first = 2 * level if self.coarse else level
        second = first + 1 if self.coarse else first
        path = torch.arange(self.n_slices)[:, None] * 2**16
        part = math.sqrt(0.5) if self.coarse else 1.0
        weights = torch.tensor([[part, part if self.coarse else 0.0]]).repeat(self.n_slices, 1)
        return NoiseKey(self.seed, 0, path + torch.tensor([[first, second]]), weights, 7)


def even_in(clock: str, n: int) -> list[float]:
    """n steps of equal time from HIGH to LOW, and so n + 1 levels."""
    if clock == "ve":
        return geometric(n + 1, HIGH, LOW)
    high, low = math.log1p(HIGH**2), math.log1p(LOW**2)
    return [math.sqrt(math.expm1(high + k / n * (low - high))) for k in range(n + 1)]


def path_gap(clock: Any, n: int) -> float:
    """Root mean square distance of n from 2n Euler-Maruyama steps of one Brownian motion, over the prior's spread."""
    prior, slices, ends = gaussian(), 64, []
    base = noise.independent(slices, seed=3)
    for coarse in (True, False):
        key = Brownian(base.seed, 0, base.anchors, base.coefficients, coarse=coarse)
        way = descend(even_in(clock, n if coarse else 2 * n))
        ends.append(finish(sampling(prior, (slices, *SHAPE), way, EulerMaruyama(clock), key))[0])
    return float((ends[0] - ends[1]).square().mean().sqrt() / STD)


LAWS: dict[str, tuple[Any, Callable[[int], list[float]]]] = {
    "DDPM, small": (Ancestral("small"), lambda n: karras(n, HIGH, LOW)),
    "DDPM, beta": (Ancestral("prior", 1.0), lambda n: karras(n, HIGH, LOW)),
    "reverse diffusion": (Ancestral("large"), lambda n: karras(n, HIGH, LOW)),
    "Euler-Maruyama, VE": (EulerMaruyama("ve"), lambda n: even_in("ve", n - 1)),
    "Euler-Maruyama, VP": (EulerMaruyama("vp"), lambda n: karras(n, HIGH, LOW)),
}


def curves(quick: bool = False) -> list[Point]:
    """All three kinds of error over the number of calls."""
    points = []
    for n in (10, 20, 40) if quick else (5, 10, 20, 40, 80, 160):
        points.append(Point("flow", "Euler", n, *flow_error(descend(karras(n, HIGH, LOW)), DDIM())))
        points.append(Point("flow", "Heun", n, *flow_error(descend(karras(n, HIGH, LOW), heun=True), Heun())))
    for tolerance in (1e-2, 1e-4) if quick else (1e-1, 3e-2, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7):
        way, rule = Adaptive(HIGH, LOW, 2 * tolerance), DormandPrince(tolerance, tolerance, MEAN, LOW)
        points.append(Point("flow", "Dormand-Prince", tolerance, *flow_error(way, rule)))
    for name, (rule, grid) in LAWS.items():
        points += [Point("law", name, n, n, law_error(grid(n), rule)) for n in (20, 40, 80, 160, 320, 640)]
    for clock in ("ve", "vp"):
        for n in (32, 64) if quick else (16, 32, 64, 128, 256):
            points.append(Point("path", f"Euler-Maruyama, {clock.upper()}", n, n, path_gap(clock, n)))
    return points


def order(points: Sequence[Point], kind: str, sampler: str) -> float:
    """Order of convergence between the two largest numbers of calls."""
    a, b = sorted((p for p in points if (p.kind, p.sampler) == (kind, sampler)), key=lambda p: p.calls)[-2:]
    return math.log(a.error / b.error) / math.log(b.calls / a.calls)


def run(quick: bool, device: str) -> list[Row]:
    """Curves, pictures and the file; no timings."""
    points = curves(quick)
    wanted = {("flow", "Euler"): 1, ("flow", "Heun"): 2, ("path", "Euler-Maruyama, VE"): 1}
    judge("samplers", [Gate(f"order of {k[1]} less {n}", abs(order(points, *k) - n), 0.3) for k, n in wanted.items()])
    print("\n".join(f"{p.kind:5} {p.sampler:20} {p.setting:8g} {p.calls:5d} calls {p.error:.3g}" for p in points))
    if not quick:
        _write(points)
        _draw(points)
        _sheet(slices(device))
    return []


def slices(device: str = "cpu", side: int = 96, seeds: Sequence[int] = (1, 2, 3)) -> dict[str, Tensor]:
    """Slices that the packaged CT prior draws by each sampler from the same first noise, in its unit."""
    prior = load_prior("ct", device)
    unit = prior.scale
    high, low = 4.0, 0.01

    def grid(n: int) -> list[float]:
        return karras(n, high, low)

    ways: dict[str, tuple[Trajectory, Rule]] = {
        "DDPM, small": (descend(grid(50), unit), Ancestral("small")),
        "DDPM, beta": (descend(grid(50), unit), Ancestral("prior", unit)),
        "Euler-Maruyama": (descend(geometric(50, high, low), unit), EulerMaruyama("ve")),
        "predictor-corrector": (descend(grid(25), unit, correctors=1), Ancestral("large")),
        "Euler": (descend(grid(20), unit), DDIM()),
        "Heun": (descend(grid(10), unit, heun=True), Heun()),
        "Dormand-Prince": (
            Adaptive(high * unit, low * unit, 0.02), DormandPrince(0.01, 0.01 * unit, prior.offset, low * unit)
        ),
    }  # fmt: skip
    drawn: dict[str, Tensor] = {}
    for name, (way, rule) in ways.items():
        ends = [finish(sampling(prior, (1, side, side), way, rule, dtype=torch.float32, seed=s)) for s in seeds]
        calls = round(sum(c for _, c in ends) / len(ends))
        drawn[f"{name}\n{calls} calls"] = torch.cat([x for x, _ in ends])
    return drawn


def _write(points: Sequence[Point]) -> None:
    with (RESULTS / "samplers.csv").open("w", newline="") as file:
        out = csv.writer(file)
        out.writerow(COLUMNS)
        today, at = datetime.datetime.now(datetime.UTC).date().isoformat(), commit()
        for p in points:
            kind, sampler, setting, calls, error = dataclasses.astuple(p)
            out.writerow([today, at, kind, sampler, f"{setting:g}", calls, f"{error:.4g}"])


def _draw(points: Sequence[Point]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    titles = {
        "flow": "probability-flow ODE:\ndistance from the exact end",
        "law": "reverse SDE, in law:\nerror of the worst variance",
        "path": "reverse SDE, path by path:\ndistance of n from 2n steps",
    }
    figure, axes = pyplot.subplots(1, 3, figsize=(10.5, 3.6))
    for panel, (kind, title) in zip(axes, titles.items(), strict=True):
        mine = [p for p in points if p.kind == kind]
        for name in dict.fromkeys(p.sampler for p in mine):
            line = [(p.calls, p.error) for p in mine if p.sampler == name]
            label = name if name == "Dormand-Prince" else f"{name} (order {order(points, kind, name):.2f})"
            panel.loglog(*zip(*sorted(line), strict=True), "o-", ms=3, lw=1.2, label=label)
        panel.set_title(title, fontsize=9)
        panel.set_xlabel("prior calls", fontsize=8)
        calls = sorted({p.calls for p in mine if p.sampler == mine[0].sampler})
        panel.set_xticks(calls, [str(n) for n in calls])
        panel.minorticks_off()
        panel.tick_params(labelsize=7)
        panel.grid(alpha=0.3)
        panel.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(IMAGES / "samplers.png", dpi=100)
    pyplot.close(figure)


def _sheet(drawn: dict[str, Tensor]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from PIL import Image

    rows = len(next(iter(drawn.values())))
    figure, axes = pyplot.subplots(rows, len(drawn), figsize=(1.25 * len(drawn), 1.25 * rows + 0.4))
    for column, (name, images) in zip(axes.T, drawn.items(), strict=True):
        column[0].set_title(name, fontsize=7)
        for axis, image in zip(column, images, strict=True):
            # -300 to 350 HU
            axis.imshow(image.cpu(), cmap="gray", vmin=0.7 * 0.0193, vmax=1.35 * 0.0193)
            axis.set_axis_off()
    figure.tight_layout(pad=0.3)
    # grey images alone: one channel is a third of the file
    figure.canvas.draw()
    Image.frombuffer("RGBA", figure.canvas.get_width_height(), figure.canvas.buffer_rgba()).convert("L").save(
        IMAGES / "samples.png", optimize=True
    )
    pyplot.close(figure)

"""nufft: batched non-uniform FFTs that share a trajectory, and A^H A, against the packages MRI uses; one thread.

Truth is the non-uniform DFT in float64 of white noise, at 1500 random samples and, for the adjoint, on whole lines of
pixels, for two entries of the batch. Ours must keep the eps it was asked for; its rows name that eps, and both errors
stand in the row, so that a rival is judged beside the setting of ours that is at least as exact (or said not to be).
A rival that loops over the batch anyway may be timed with 8 transforms and scaled: its name then says "of 8".
"""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from bench import _nufft_rivals as rivals
from bench._common import Gate, Row, judge, measure, pair
from bench._goals import goals, report
from bench._nufft_rivals import Absent, Rival, waves
from recon3d.geometry.mri import Trajectory, kooshball, radial, spiral
from recon3d.ops.nufft import _lanes, _lanes_adjoint, nufft, nufft_adjoint, nufft_normal, nufft_plan

Thunk = Callable[[], object]
_LANES = "eps {:g}, engine layout"
CASES: dict[str, tuple[tuple[int, ...], str, Callable[[tuple[int, ...]], Trajectory]]] = {
    "A": ((256, 256), "256², 64 spokes x 512", lambda s: radial(64, 512, s)),
    "B": ((256, 256), "256², 402 spokes x 512", lambda s: radial(402, 512, s)),
    "C": ((320, 320), "320², 64 spokes x 640", lambda s: radial(64, 640, s)),
    "D": ((320, 320), "320², 402 spokes x 640", lambda s: radial(402, 640, s)),
    "E": ((320, 320), "320², spiral 48 x 2048", lambda s: spiral(48, 2048, s)),
    "V": ((128, 128, 128), "128³, 4000 spokes x 256", lambda s: kooshball(4000, 256, s)),
}
COARSE, MIDDLE, FINE, FINEST = 1.5e-3, 4e-4, 9e-5, 2e-5
# what each rival is set beside: the coarsest of ours that is about as exact, and where that is worse a finer one too
BESIDE = {
    "finufft 1e-3": (COARSE,), "finufft native 1e-3": (COARSE,),
    "finufft 1e-4": (FINE,), "finufft native 1e-4": (FINE, MIDDLE), "ducc0 1e-3": (MIDDLE, FINE),
    "finufft 1e-5": (FINEST,), "finufft native 1e-5": (FINEST,), "mrpro": (MIDDLE, FINEST),
    "sigpy": (MIDDLE,), "sigpy sigma 2 width 6": (FINEST,), "torchkbnufft": (MIDDLE,), "BART": (COARSE, MIDDLE),
    "cufinufft 1e-3": (COARSE,), "cufinufft 1e-3 sigma 2": (MIDDLE,), "cufinufft 1e-3 by points": (COARSE,),
    "cufinufft 1e-3 output driven": (COARSE,),
}  # fmt: skip
WIDE = ("finufft 1e-3", "finufft native 1e-3", "finufft 1e-4", "finufft native 1e-4", "ducc0 1e-3")
BESIDE_3D = {"finufft 1e-3": (1e-3,), "finufft native 1e-3": (1e-3,), "ducc0 1e-3": (1e-3, 2e-4)}


def run(quick: bool, device: str = "cpu") -> list[Row]:
    """Rows for every case and batch; forward, adjoint and both, A^H A, plans, and two threads."""
    jobs: list[tuple[str, int, Sequence[str] | None]]
    if device == "cuda":
        jobs = [("D", 64, None)] if quick else [("D", 1024, None), ("D", 128, None), ("A", 1024, None)]
    elif quick:
        jobs = [("A", 8, WIDE), ("D", 8, WIDE)]
    else:
        jobs = [(name, 8, None) for name in "ABCDE"] + [("D", 1, WIDE)]
        jobs += [("A", 128, WIDE), ("D", 128, WIDE), ("E", 128, WIDE)]
        jobs += [("B", 128, ("finufft native 1e-3", "ducc0 1e-3")), ("C", 128, ("finufft native 1e-3", "ducc0 1e-3"))]
    rows: list[Row] = []
    for name in sorted({job[0] for job in jobs}):
        data = Data.make(name, max(batch for case, batch, _ in jobs if case == name), device)
        for _, batch, only in (job for job in jobs if job[0] == name):
            few = 2 if quick or batch > 8 else 3
            rows += _pairs(data.first(batch), BESIDE, only, rounds=few)
        if name in "AD":
            rows += _normal(data.first(32 if device == "cuda" else 8), rounds=3)
            rows += _plan(data) if device == "cpu" else []
        if name == "D" and device == "cpu":
            rows += _threads(data.first(16 if quick else 32))
    if device == "cpu":
        data = Data.make("V", 8, device, small=quick)
        rows += _pairs(data, BESIDE_3D, ("finufft 1e-3", "finufft native 1e-3", "ducc0 1e-3"), rounds=2)
    return rows


@dataclass(frozen=True)
class Data:
    """A case: white images and samples, and the truth for some of them."""

    name: str
    words: str
    trajectory: Trajectory
    points: np.ndarray  # [M, d] rad, float64 values that float32 holds too: no package is charged for rounding them
    x: Tensor  # [batch, *shape] complex64
    y: Tensor  # [batch, M] complex64
    chosen: Tensor  # samples
    lines: tuple[Tensor, ...]  # all but the last index of lines of pixels
    samples: Tensor  # truth at chosen, [2, ...]
    image: Tensor  # truth on lines, [2, line, n]

    @classmethod
    def make(cls, name: str, batch: int, device: str, small: bool = False) -> Data:
        shape, words, build = CASES[name]
        if small:
            shape, words, build = (64, 64, 64), "64³, 1000 spokes x 128", lambda s: kooshball(1000, 128, s)
        points = build(shape).points.float().double().clamp(-math.pi, math.pi)
        trajectory, g = Trajectory(points, shape), torch.Generator().manual_seed(0)
        x = torch.randn(batch, *shape, generator=g, dtype=torch.complex64)
        y = torch.randn(batch, len(points), generator=g, dtype=torch.complex64)
        chosen = torch.randperm(len(points), generator=g)[:1500]
        # spread evenly, so that the rim, where errors are largest, has its share
        steps = torch.arange(1, 33, dtype=torch.float64)[:, None] * torch.tensor(
            [0.6180339887498949, 0.7548776662466927]
        )
        lines = tuple(((0.5 + steps[:, d]) % 1 * n).long() for d, n in enumerate(shape[:-1]))
        samples, image = exact(points, shape, x[:2], y[:2], chosen, lines)
        x, y = x.to(device), y.to(device)
        return cls(name, words, trajectory, points.numpy(), x, y, chosen, lines, samples, image)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.trajectory.shape

    def first(self, batch: int) -> Data:
        return replace(self, x=self.x[:batch], y=self.y[:batch])

    def errors(self, samples: Tensor, image: Tensor) -> dict[str, float]:
        """Relative distance from the truth of the first entries of a batch, flat or not."""
        batch = len(self.x)
        got_y = samples.reshape(batch, -1)[:2, self.chosen.to(samples.device)]
        got_x = image.reshape(batch, *self.shape)[:2][(slice(None), *self.lines)]
        n = min(2, batch)
        return {
            "forward": _distance(got_y, self.samples[:n]),
            "adjoint": _distance(got_x, self.image[:n]),
        }


def exact(
    points: Tensor, shape: tuple[int, ...], x: Tensor, y: Tensor, chosen: Tensor, lines: tuple[Tensor, ...]
) -> tuple[Tensor, Tensor]:
    """The orthonormal non-uniform DFT in complex128: at chosen samples of x, and on lines of pixels of y."""
    scale = 1 / math.sqrt(math.prod(shape))
    value = x.to(torch.complex128)
    value = torch.einsum("b...n,jn->b...j", value, waves(points[chosen, -1], shape[-1]))
    for d in reversed(range(len(shape) - 1)):
        value = torch.einsum("b...nj,jn->b...j", value, waves(points[chosen, d], shape[d]))
    image = torch.zeros(len(y), len(lines[0]), shape[-1], dtype=torch.complex128)
    for k, part in zip(points.split(8192), y.split(8192, dim=-1), strict=True):
        factor = torch.ones(1, dtype=torch.complex128)
        for d, line in enumerate(lines):
            factor = factor * waves(k[:, d], shape[d])[:, line].conj()
        along = waves(k[:, -1], shape[-1]).conj()
        image += torch.einsum("bj,jl,jn->bln", part.to(torch.complex128), factor, along)
    return scale * value, scale * image


def _pairs(data: Data, beside: dict[str, tuple[float, ...]], only: Iterable[str] | None, rounds: int) -> list[Row]:
    """Forward, adjoint and their sum: ours at each eps against the rivals set beside it."""
    batch, device = len(data.x), data.x.device.type
    words = f"{data.name} {data.words}, batch {batch}"
    theirs = {}
    for kind in rivals.PAIRS:
        if kind.name in beside and device in kind.devices and (only is None or kind.name in only):
            if len(data.points) > kind.max_points:
                continue
            made = _build(kind, data.first(min(batch, kind.max_batch)), words)
            if made is not None:
                theirs[kind.name] = made
    levels = sorted({eps for name in theirs for eps in beside[name]} | {min(beside.values())[0]}, reverse=True)
    thunks: dict[tuple[object, str], Thunk] = {}
    errors: dict[object, dict[str, float]] = {}
    for eps in levels:
        plan = nufft_plan(data.trajectory.points, data.shape, eps=eps).to(device)
        thunks[eps, "forward"], thunks[eps, "adjoint"] = (
            partial(nufft, data.x, plan),
            partial(nufft_adjoint, data.y, plan),
        )
        errors[eps] = data.errors(nufft(data.x, plan), nufft_adjoint(data.y, plan))
        judge(f"nufft, {words}", [Gate(f"{k} error at eps {eps:g}", v, eps) for k, v in errors[eps].items()])
        if batch % 8 == 0 and device == "cpu":  # images and samples as the solvers keep them
            lanes = _LANES.format(eps)
            x, y = _to_lanes(data.x), _to_lanes(data.y[:, plan.order.long()])
            thunks[lanes, "forward"] = partial(_lanes, x, plan)
            thunks[lanes, "adjoint"] = partial(_lanes_adjoint, y, plan)
            errors[lanes] = errors[eps]
            want = nufft_adjoint(data.y[:2], plan).to(torch.complex128)
            gap = _distance(_from_lanes(_lanes_adjoint(y, plan))[:2], want)
            judge(f"nufft, {words}", [Gate("distance of the layouts' results", gap, 1e-6)])
    for name, rival in theirs.items():
        part = data.first(min(batch, rival.max_batch))
        thunks[name, "forward"], thunks[name, "adjoint"] = rival.forward, rival.adjoint
        samples, image = rival.read(rival.forward()) * rival.scale, rival.read(rival.adjoint()) * rival.scale
        errors[name] = part.errors(samples, image)
    flat = {(k, way): v for k, ways in errors.items() for way, v in ways.items()}
    found = measure(thunks, errors=flat, rounds=rounds, device=device, warm=True, slow_s=1.0)
    for k in errors:
        found[k, "both"] = found[k, "forward"].plus(found[k, "adjoint"])
    rows = []
    for name, rival in theirs.items():
        factor = max(1.0, batch / rival.max_batch)
        label = name if factor == 1 else f"{name}, {rival.max_batch} of {batch}"
        for eps, way in itertools.product(beside[name], ("forward", "adjoint", "both")):
            its = found[name, way].times(factor)
            rows.append(pair("nufft", f"{words}, eps {eps:g}", way, found[eps, way], label, its, device))
            lanes = _LANES.format(eps)
            if lanes in errors:
                rows.append(pair("nufft", f"{words}, {lanes}", way, found[lanes, way], label, its, device))
    return rows


def _to_lanes(v: Tensor) -> Tensor:
    """[batch, ...] as the engine's [batch / 8, ..., 8]."""
    return v.unflatten(0, (-1, 8)).movedim(1, -1).contiguous()


def _from_lanes(v: Tensor) -> Tensor:
    return v.movedim(-1, 1).flatten(0, 1)


def _normal(data: Data, rounds: int) -> list[Row]:
    """A^H A on a batch of images, against the rivals' own means; bench/sense.py has it with coil maps."""
    batch, device = len(data.x), data.x.device.type
    words = f"{data.name} {data.words}, batch {batch}"
    truth = _toeplitz64(data)
    plan = nufft_plan(data.trajectory.points, data.shape, eps=COARSE).to(device)
    ours: dict[str, Thunk] = {"adjoint of forward": lambda: nufft_normal(data.x, plan)}
    theirs = {}
    for kind in rivals.NORMALS:
        made = _build(kind, data, words) if device in kind.devices else None
        if made is not None:
            theirs[kind.name] = made
    limit = {"adjoint of forward": 2 * COARSE}
    thunks: dict[str, Thunk] = {f"ours, {k}": f for k, f in ours.items()}
    errors = {f"ours, {k}": _distance(f().reshape(data.x.shape)[:2], truth) for k, f in ours.items()}
    judge(f"nufft, {words}", [Gate(f"error of {k}", errors[f"ours, {k}"], limit[k]) for k in ours])
    for name, rival in theirs.items():
        thunks[name] = rival.normal
        errors[name] = _distance(rival.read(rival.normal()).reshape(data.x.shape)[:2] * rival.scale**2, truth)
    found = measure(thunks, errors=errors, rounds=rounds, device=device, warm=True)
    return [
        pair("nufft", words, f"A^H A, {k}", found[f"ours, {k}"], name, found[name], device)
        for k, name in itertools.product(ours, theirs)
    ]


def _plan(data: Data) -> list[Row]:
    """Making a plan from points, cache aside, against finufft's."""
    points, shape = data.trajectory.points.numpy(), data.shape
    small = data.first(1)
    fresh = itertools.count(1)

    def ours() -> object:
        # other points each time, for plans are cached by content
        return nufft_plan(points * (1 - 1e-9 * next(fresh)), shape, eps=MIDDLE).weights(torch.float32)

    theirs: dict[str, Thunk] = {}
    for kind in (rivals.Finufft3, rivals.Native3):
        if _build(kind, small, "plan") is not None:
            theirs[kind.name] = partial(kind, data.points, shape, small.x, small.y)
    found = measure({"ours": ours, **theirs}, rounds=3)
    return [pair("nufft", f"{data.name} {data.words}", "plan", found["ours"], name, found[name]) for name in theirs]


def _threads(data: Data) -> list[Row]:
    """Ours and two rivals with two threads; the rival "ours, 1 thread" tells the scaling, by the wall clock."""
    before = torch.get_num_threads()
    plan = nufft_plan(data.trajectory.points, data.shape, eps=COARSE)
    thunks: dict[tuple[str, str], Thunk] = {}

    def with_threads(n: int, f: Thunk) -> object:
        torch.set_num_threads(n)
        return f()

    ours = {"forward": partial(nufft, data.x, plan), "adjoint": partial(nufft_adjoint, data.y, plan)}
    for n, (way, f) in itertools.product((1, 2), ours.items()):
        thunks[f"ours, {n} thread{'s'[: n - 1]}", way] = partial(with_threads, n, f)
    try:
        torch.set_num_threads(2)
        for kind in (rivals.Finufft3, rivals.Native3, rivals.Ducc):
            rival = _build(kind, data, "two threads")
            if rival is not None:
                thunks[f"{kind.name}, 2 threads", "forward"] = rival.forward
                thunks[f"{kind.name}, 2 threads", "adjoint"] = rival.adjoint
        found = measure(thunks, rounds=3)
    finally:
        torch.set_num_threads(before)
    for name in {k for k, _ in thunks}:
        found[name, "both"] = found[name, "forward"].plus(found[name, "adjoint"])
    words = f"{data.name} {data.words}, batch {len(data.x)}, eps {COARSE:g}, 2 threads"
    mine = "ours, 2 threads"
    return [
        pair("nufft", words, way, found[mine, way], name, found[name, way])
        for name in dict.fromkeys(k for k, _ in thunks if k != mine)
        for way in ("forward", "adjoint", "both")
    ]


def _words(name: str, batch: int, eps: float | None = None, lanes: bool = False) -> str:
    more = "" if eps is None else ", " + _LANES.format(eps) if lanes else f", eps {eps:g}"
    return f"{name} {CASES[name][1]}, batch {batch}{more}"


FINUFFT, NATIVE, DUCC, CUFINUFFT = "finufft 1e-3", "finufft native 1e-3", "ducc0 1e-3", "cufinufft 1e-3 sigma 2"
GOALS = [
    *goals(_words("D", 128, COARSE, True), "both", {FINUFFT: (9, 14), NATIVE: (5.5, 9)}),
    *goals(_words("D", 128, FINE, True), "both", {"finufft 1e-4": (7.5, 12), "finufft native 1e-4": (4.5, 7)}),
    *goals(_words("D", 128, MIDDLE, True), "both", {DUCC: (6, 9)}),
    *goals(_words("D", 128, MIDDLE), "both", {DUCC: (5, 7), "finufft native 1e-4": (4, 6)}),
    *goals(_words("A", 8, COARSE, True), "both", {FINUFFT: (3, 4), NATIVE: (2, 3)}),
    *goals(_words("A", 8, MIDDLE, True), "both", {DUCC: (3, 4)}),
    *goals(_words("A", 128, COARSE, True), "both", {FINUFFT: (3, 4), NATIVE: (2, 3)}),
    *goals(_words("A", 128, MIDDLE, True), "both", {DUCC: (3, 4)}),
    *goals(_words("E", 128, COARSE, True), "both", {FINUFFT: (5.5, 8), NATIVE: (3.5, 5)}),
    *goals(_words("E", 128, MIDDLE, True), "both", {DUCC: (4, 6)}),
    *goals(_words("D", 8, MIDDLE), "both", {"mrpro": (15, 23), "sigpy": (40, 64), "torchkbnufft": (60, 116)}),
    *goals(_words("D", 8, COARSE), "both", {"BART": (80, 134)}),
    *goals(_words("V", 8, 1e-3), "both", {FINUFFT: (2, 4), NATIVE: (1.4, 3)}),
    *goals(_words("D", 8), "A^H A, adjoint of forward", {FINUFFT: (10, 16), NATIVE: (6, 9)}),
    *goals(_words("D", 1024, MIDDLE), "forward", {CUFINUFFT: (5, 10)}),
    *goals(_words("D", 1024, MIDDLE), "adjoint", {CUFINUFFT: (5, 10)}),
]


def summary(rows: Sequence[Row]) -> str:
    """One line per goal: what it asks, what was measured, whether it is met."""
    return report(rows, GOALS)


def _build(kind: type[Rival], data: Data, words: str) -> Rival | None:
    try:
        return kind(data.points, data.shape, data.x, data.y)
    except Absent as reason:
        print(f"{words}: without {kind.name} ({reason})", file=sys.stderr)
        return None


def _toeplitz64(data: Data) -> Tensor:
    """A^H A of the first two images, in float64 by the padded FFT."""
    kernel = rivals.toeplitz_kernel(data.points, data.shape, data.x.device.type)
    axes = tuple(range(1, data.x.ndim))
    wide = torch.fft.fftn(data.x[:2].cpu().to(torch.complex128), s=kernel.shape, dim=axes) * kernel
    return torch.fft.ifftn(wide, dim=axes)[(slice(None), *(slice(0, n) for n in data.shape))]


def _distance(got: Tensor, truth: Tensor) -> float:
    """|got - truth| / |truth| in complex128."""
    got = got.detach().cpu().to(torch.complex128)
    return float((got - truth).norm() / truth.norm())

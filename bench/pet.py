"""pet: the projectors of PET against parallelproj's C library, and the passes of EM against plain torch.

Sinograms: a few views of a whole scanner, all planes of all segments; and the 32-ring scanner of earlier comparisons.
List mode: events of a uniform cylinder, in the order in which they came. Truth is the definition in float64 on some of
the lines. Before anything is timed, our distance from it must be at most LIMIT or twice that of the definition in
float32, the adjoint gap of random data on all lines at most 1e-6, and the library's results must lie within AGREE of
the truth: both versions cut the Gaussian of the time bins off in ways of their own. Images are compared inside the disc
where there is activity: version 2 leaves part of the outermost voxels out of its adjoint.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from bench._common import Gate, Row, compare, relative_error
from bench._goals import Goal, goals, report
from bench._pet_rivals import ParallelProj, libraries
from recon3d import ops
from recon3d.geometry import TOF, PETScanner, pet_geometry, scanner
from recon3d.ops import em
from recon3d.ops.joseph3d import _reference as lines_reference
from recon3d.ops.joseph3d import _reference_adjoint as lines_reference_adjoint
from recon3d.ops.joseph3d_sinogram import _reference as sinogram_reference
from recon3d.ops.joseph3d_sinogram import _reference_adjoint as sinogram_reference_adjoint
from recon3d.ops.rdp import _gradient
from recon3d.ops.tof import tof_numbers

TIME = TOF(bins=17, bin_mm=37.5, sigma_mm=25.5)
VIEWS = (7, 49, 91, 133, 175, 217)  # of 252, none at 45 degrees, where axes tie
LIMIT = 1e-6
ADJOINT_GAP = 1e-6
AGREE = {False: 1e-4, True: 1e-2}  # without and with time of flight
Thunk = Callable[[], object]
Map = Callable[[Tensor], Tensor]
Three = tuple[float, float, float]
Shape = tuple[int, int, int]


@dataclass(frozen=True)
class Case:
    """A projector pair in words, its data, its lines for the library, and the same of some lines."""

    words: str
    x: Tensor  # [z, y, x]
    y: Tensor
    spacing_mm: Three
    forward: Map
    adjoint: Map
    reference: Map  # the definition in torch
    reference_adjoint: Map
    ends: tuple[np.ndarray, np.ndarray]  # [n, 3] (z, y, x) in mm each
    tof: TOF | None = None
    bins: np.ndarray | None = None

    def rival(self, version: int, path: str) -> ParallelProj:
        nz, ny, nx = self.x.shape
        return ParallelProj(version, path, *self.ends, (nz, ny, nx), self.spacing_mm, self.tof, self.bins)

    def for_rival(self, y: Tensor) -> Tensor:
        """[line, plane] or [line, tof, plane] as [line of response] or [line of response, tof]; events as they are."""
        if self.bins is not None or y.ndim == 1:
            return y
        return y.reshape(-1) if self.tof is None else y.transpose(1, 2).reshape(-1, self.tof.bins)

    def from_rival(self, y: Tensor) -> Tensor:
        if self.bins is not None or self.y.ndim == 1:
            return y
        if self.tof is None:
            return y.reshape(self.y.shape)
        return y.reshape(self.y.shape[0], self.y.shape[2], self.tof.bins).transpose(1, 2)


def run(quick: bool, device: str = "cpu") -> list[Row]:
    """Rows for the sinogram pairs, list mode and the passes over volumes."""
    rounds = 2 if quick else 5
    rows: list[Row] = []
    for tof in (None, TIME):
        for make in (whole_scanner, small_scanner):
            rows += _pair(make, tof, quick, rounds, device)
    for tof in (None, TIME):
        rows += _pair(list_mode, tof, quick, rounds, device)
    return rows + _volumes(quick, rounds, device)


def whole_scanner(tof: TOF | None, quick: bool, few: bool = False) -> Case:
    """64 rings of the mMR, 127 x 128 x 128 voxels of 2.03 x 2.1 x 2.1 mm: all planes of some views, 344 bins each."""
    views = VIEWS[:1] if quick or tof else VIEWS
    scan = pet_geometry("mmr", max_ring_difference=2 if quick and tof else 60).subset(views)
    lines, segments = torch.from_numpy(scan.lines()), torch.from_numpy(scan.segments)
    words = f"mMR, {len(views)} of 252 views x 344 x {scan.n_planes} planes, 128 x 128 x 127"
    return _sinogram(
        words, lines[10 :: 97 if tof else 31] if few else lines, segments, (127, 128, 128), (2.03125, 2.1, 2.1), tof
    )


def small_scanner(tof: TOF | None, quick: bool, few: bool = False) -> Case:
    """32 rings of 5 mm on a cylinder of 300 mm, ring differences up to 8, 63 x 128 x 128 voxels of 2.5 mm, 120 bins."""
    rings, most, pitch, views = 32, 8, 5.0, (2 if tof else 4) if quick else 12
    radial = (np.arange(120) - 59.5) * 2.5
    phi = (np.arange(views) + (0.5 if views == 12 else 0.3)) * np.pi / views  # none at 45 degrees
    cos, sin, half = np.cos(phi)[:, None], np.sin(phi)[:, None], np.sqrt(300.0**2 - radial**2)
    s, h = radial[None] * np.ones((views, 1)), half[None]
    ends = (s * sin - h * cos, s * cos + h * sin, s * sin + h * cos, s * cos - h * sin)
    lines = torch.from_numpy(np.stack(ends, -1).reshape(-1, 4))
    rows = [((abs(d) / 2 - (rings - 1) / 2) * pitch, d * pitch, pitch, rings - abs(d)) for d in range(-most, most + 1)]
    segments = torch.tensor(rows, dtype=torch.float64)
    planes = int(segments[:, 3].sum())
    words = f"32 rings, {views} views x 120 x {planes} planes, 128 x 128 x 63"
    return _sinogram(words, lines[::29] if few else lines, segments, (63, 128, 128), (2.5, 2.5, 2.5), tof)


def _sinogram(
    words: str,
    lines: Tensor,
    segments: Tensor,
    shape: Shape,
    spacing: Three,
    tof: TOF | None,
) -> Case:
    count = segments[:, 3].long()
    segment = torch.repeat_interleave(torch.arange(len(count)), count)
    plane = torch.arange(len(segment)) - (count.cumsum(0) - count)[segment]
    middle = segments[segment, 0] + plane * segments[segment, 2]
    tilt = segments[segment, 1] / 2
    ends = []
    for at, z in ((0, middle - tilt), (2, middle + tilt)):
        y, x = lines[:, at, None].expand(-1, len(z)), lines[:, at + 1, None].expand(-1, len(z))
        ends.append(torch.stack((z.expand_as(y), y, x), -1).reshape(-1, 3).numpy())
    g = torch.Generator().manual_seed(0)
    size = (len(lines), *([tof.bins] if tof else []), len(segment))
    numbers = (*spacing, *tof_numbers("pet", tof))
    rooms: dict[tuple[torch.dtype, torch.device], Tensor] = {}

    def forward(x: Tensor) -> Tensor:
        # like parallelproj, whose caller owns the result: the memory of the call before
        key = (x.dtype, x.device)
        rooms[key] = ops.joseph3d_sinogram(x, lines, segments, spacing, tof=tof, out=rooms.get(key))
        return rooms[key]

    return Case(
        words + (f", {tof.bins} time bins" if tof else ""),
        _disc(shape, g),
        torch.rand(size, generator=g),
        spacing,
        forward,
        lambda y: ops.joseph3d_sinogram_adjoint(y, lines, segments, shape, spacing, tof=tof),
        lambda x: sinogram_reference(x, lines, segments, len(segment), *numbers),
        lambda y: sinogram_reference_adjoint(y, lines, segments, *shape, *numbers),
        (ends[0], ends[1]),
        tof,
    )


def list_mode(tof: TOF | None, quick: bool, few: bool = False) -> Case:
    """Pairs of crystals of the mMR that a uniform cylinder of 120 mm radius and 220 mm length hits, unsorted."""
    n = 10**6 if quick else 10**7
    device = scanner("mmr")
    pairs, bins = cylinder_events(device, 2000 if few else n, 120.0, 220.0, tof)
    points = torch.from_numpy(device.crystal_positions())
    shape: Shape = (127, 128, 128)
    spacing: Three = (2.03125, 2.1, 2.1)
    numbers = (*spacing, *tof_numbers("pet", tof))
    if few:  # where two axes tie, each chooses its own, and both are right
        way = np.abs(np.diff(points.numpy()[pairs], axis=1)[:, 0])
        clear = np.abs(way[:, 1] - way[:, 2]) > 1e-3
        pairs, bins = pairs[clear], bins[clear] if tof else bins
    index, at = torch.from_numpy(pairs), None if tof is None else torch.from_numpy(bins).int()
    ends = points.numpy()[pairs[:, 0]], points.numpy()[pairs[:, 1]]
    g = torch.Generator().manual_seed(0)
    return Case(
        f"mMR, 10^{len(str(n)) - 1} events, 128 x 128 x 127" + (f", {tof.bins} time bins" if tof else ""),
        _disc(shape, g),
        torch.rand(len(pairs), generator=g),
        spacing,
        lambda x: ops.joseph3d(x, points, index, spacing, tof=tof, tof_bins=at),
        lambda y: ops.joseph3d_adjoint(y, points, index, shape, spacing, tof=tof, tof_bins=at),
        lambda x: lines_reference(x, points, index, at, *numbers),
        lambda y: lines_reference_adjoint(y, points, index, at, *shape, *numbers),
        ends,
        tof,
        None if tof is None else bins,
    )


def cylinder_events(
    device: PETScanner, count: int, radius_mm: float, length_mm: float, tof: TOF | None
) -> tuple[np.ndarray, np.ndarray]:
    """Crystal pairs [count, 2] int32 of isotropic decays in a cylinder, and their time bins [count]."""
    rng = np.random.default_rng(0)
    pairs, bins, have = [], [], 0
    half = (device.rings - 1) / 2
    while have < count:
        m = min(1_000_000, 2 * (count - have) + 1000)
        r, phi, z = (
            radius_mm * np.sqrt(rng.random(m)),
            rng.uniform(0, 2 * np.pi, m),
            rng.uniform(-0.5, 0.5, m) * length_mm,
        )
        point = np.stack((z, r * np.sin(phi), r * np.cos(phi)), 1)
        cosine, psi = rng.uniform(-1, 1, m), rng.uniform(0, 2 * np.pi, m)
        flat = np.sqrt(1 - cosine**2)
        way = np.stack((cosine, flat * np.sin(psi), flat * np.cos(psi)), 1)
        along, square = (point[:, 1:] * way[:, 1:]).sum(1), (way[:, 1:] ** 2).sum(1)
        root = np.sqrt(along**2 - square * ((point[:, 1:] ** 2).sum(1) - device.radius_mm**2))
        crystals, keep, reach = [], np.ones(m, bool), []
        for sign in (-1, 1):
            t = (-along + sign * root) / square
            hit = point + t[:, None] * way
            ring = np.rint(hit[:, 0] / device.ring_spacing_mm + half).astype(np.int64)
            turn = np.arctan2(hit[:, 1], hit[:, 2]) / (2 * np.pi) * device.crystals
            keep &= (ring >= 0) & (ring < device.rings)
            crystals.append(ring * device.crystals + np.rint(turn).astype(np.int64) % device.crystals)
            reach.append(t)
        distance = -(reach[0] + reach[1]) / 2  # of the decay from the middle, towards the second crystal
        pairs.append(np.stack(crystals, 1)[keep])
        if tof is not None:
            seen = distance + tof.sigma_mm * rng.standard_normal(m)
            bins.append(np.clip(np.floor(seen / tof.bin_mm + tof.bins / 2), 0, tof.bins - 1).astype(np.int64)[keep])
        have += int(keep.sum())
    kept = np.concatenate(pairs)[:count].astype(np.int32)
    return kept, np.concatenate(bins)[:count] if tof is not None else np.zeros(0, np.int64)


def _disc(shape: Shape, g: torch.Generator) -> Tensor:
    """Random activity inside a disc of 55 of 64 half-widths."""
    nz, ny, nx = shape
    y, x = torch.arange(ny) - (ny - 1) / 2, torch.arange(nx) - (nx - 1) / 2
    return (torch.rand(nz, ny, nx, generator=g) + 0.5) * ((y[:, None] ** 2 + x**2) < (0.43 * nx) ** 2)


def _pair(make: Callable[..., Case], tof: TOF | None, quick: bool, rounds: int, device: str) -> list[Row]:
    """Rows of one projector pair, forward and adjoint."""
    few, case = make(tof, quick, few=True), make(tof, quick)
    truth = few.reference(few.x.double()), few.reference_adjoint(few.y.double())
    x, y = case.x.to(device), case.y.to(device)
    ax, aty = case.forward(x), case.adjoint(y)
    gap = abs(_dot(ax, y) - _dot(x, aty)) / (ax.double().norm() * y.double().norm()).item()
    del ax, aty
    mine = few.forward(few.x.to(device)), few.adjoint(few.y.to(device))
    single = few.reference(few.x), few.reference_adjoint(few.y)
    inside = few.x != 0
    gates = [
        [
            Gate("error", relative_error(a, exact), max(LIMIT, 2 * relative_error(b, exact))),
            Gate("adjoint gap", gap, ADJOINT_GAP),
        ]
        for a, b, exact in zip(mine, single, truth, strict=True)
    ]
    thunks: tuple[dict[str, Thunk], dict[str, Thunk]] = {}, {}
    errors: tuple[dict[str, float], dict[str, float]] = {}, {}
    resident: dict[str, float] = {}
    found = dict(libraries()) if device == "cpu" else {}
    if not found and device == "cpu":
        print(f"{case.words}: without parallelproj (set RECON3D_PARALLELPROJ)", file=sys.stderr)
    for version, path in sorted(found.items()):
        judge = few.rival(version, path)
        judge.load_image(few.x)
        judge.forward()
        errors[0][judge.name] = relative_error(few.from_rival(judge.data()), truth[0])
        judge.load_data(few.for_rival(few.y))
        judge.adjoint()
        errors[1][judge.name] = relative_error(judge.image()[inside], truth[1][inside])
        for k in range(2):
            gates[k].append(Gate(f"distance of {judge.name}", errors[k][judge.name], AGREE[tof is not None]))
        one, two = case.rival(version, path), case.rival(version, path)
        one.load_image(case.x)
        two.load_data(case.for_rival(case.y))
        thunks[0][one.name], thunks[1][one.name] = one.forward, two.adjoint
        resident[one.name] = one.resident_mb
    if device == "cuda":
        thunks[0]["C++ on the host"], thunks[1]["C++ on the host"] = (
            lambda: case.forward(case.x),
            lambda: case.adjoint(case.y),
        )
    rows = []
    for k, (name, ours) in enumerate((("forward", lambda: case.forward(x)), ("adjoint", lambda: case.adjoint(y)))):
        rows += compare(
            "pet", case.words, name, ours, thunks[k], gates=gates[k], errors=errors[k], resident_mb=resident,
            rounds=rounds, device=device,
        )  # fmt: skip
    return rows


def _dot(a: Tensor, b: Tensor) -> float:
    return float((a.double() * b.double()).sum())


def _volumes(quick: bool, rounds: int, device: str) -> list[Row]:
    """The passes of EM: over the data, over the volume, and the relative difference prior alone."""
    shape = (31, 64, 64) if quick else (127, 128, 128)
    data = (10, 344, 400 if quick else 4084)
    g = torch.Generator().manual_seed(0)
    settings = {"rounds": rounds, "device": device}
    x, back, sensitivity, anchor = (torch.rand(shape, generator=g).add(0.1).to(device) for _ in range(4))
    y, projection, factors, additive = (torch.rand(data, generator=g).add(0.1).to(device) for _ in range(4))
    rows: list[Row] = []
    words = f"{shape[0]} x {shape[1]} x {shape[2]}"
    for axes, weights in (("z", (1.0, 0.0, 0.0)), ("zyx", (1.0, 1.0, 1.0))):
        rest = (0.3, 0.2, 2.0, 1e-6, *weights, True, 1e-4)

        def ours(axes: str = axes) -> Tensor:
            return ops.em_update(
                x, back, sensitivity, anchor=anchor, anchor_weight=0.3, rdp=0.2, gamma=2.0, epsilon=1e-6, axes=axes
            )  # type: ignore[call-overload]

        def eager(rest: tuple[object, ...] = rest) -> Tensor:
            return em._update(x, back, sensitivity, anchor, *rest)  # type: ignore[arg-type]

        truth = em._update(x.double(), back.double(), sensitivity.double(), anchor.double(), *rest)  # type: ignore[arg-type]
        rows += compare(
            "pet", f"{words}, em_update with anchor and prior along {axes}", "update", ours,
            {"torch": eager, "copy of as many bytes": _copy(x, 5)},
            gates=[Gate("error", relative_error(ours(), truth), LIMIT)],
            errors={"torch": relative_error(eager(), truth)}, bytes_moved=5 * x.nbytes, **settings,
        )  # fmt: skip
        numbers = (2.0, 1e-6, *weights)
        exact = _gradient(x.double(), *numbers)
        rows += compare(
            "pet", f"{words}, rdp along {axes}", "gradient", lambda axes=axes: ops.rdp_gradient(x, 2.0, 1e-6, axes),
            {"torch": lambda n=numbers: _gradient(x, *n), "copy of as many bytes": _copy(x, 2)},
            gates=[Gate("error", relative_error(ops.rdp_gradient(x, 2.0, 1e-6, axes), exact), LIMIT)],
            errors={"torch": relative_error(_gradient(x, *numbers), exact)}, bytes_moved=2 * x.nbytes, **settings,
        )  # fmt: skip

    def plain() -> Tensor:
        expected = factors * projection + additive
        return torch.where(expected > 0, factors * y / expected, 0.0)

    exact = factors.double() * y.double() / (factors.double() * projection.double() + additive.double())
    got = ops.poisson_ratio(y, projection, factors, additive)
    rows += compare(
        "pet", f"{y.numel() / 1e6:.1f} M bins, poisson_ratio", "ratio",
        lambda: ops.poisson_ratio(y, projection, factors, additive),
        {"torch": plain, "copy of as many bytes": _copy(y, 5)},
        gates=[Gate("error", relative_error(got, exact), LIMIT)],
        errors={"torch": relative_error(plain(), exact)}, bytes_moved=5 * y.nbytes, **settings,
    )  # fmt: skip
    return rows


def _copy(x: Tensor, volumes: int) -> Thunk:
    """Copies so many bytes that reads and writes together make `volumes` times x."""
    source = torch.ones(volumes * x.numel() // 2, device=x.device, dtype=x.dtype)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def wanted(quick: bool) -> list[Goal]:
    """What a run is judged by, against each version of the library; list mode is the same in all directions."""
    plain = {"forward": (25, 39), "adjoint": (80, 139)}
    timed = {"forward": (80, 148), "adjoint": (80, 134)}
    found: list[Goal] = []
    for tof, pair in ((None, plain), (TIME, timed)):
        cases = {make(tof, quick, few=True).words: pair for make in (whole_scanner, small_scanner)}
        cases[list_mode(tof, quick, few=True).words] = {"forward": (3, 5), "adjoint": (3, 5)}
        for words, ratios in cases.items():
            for name, ratio in ratios.items():
                found += goals(words, name, {f"parallelproj {v}": ratio for v in (1, 2)})
    return found


def summary(rows: list[Row]) -> str:
    """Which goals the run met."""
    return report(rows, [goal for quick in (False, True) for goal in wanted(quick)])

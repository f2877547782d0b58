"""recon3d.ops.joseph3d: chords by hand and of ellipsoids, laws, time of flight, every instruction set, errors."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import pytest
import torch
from laws import (
    check_adjoint,
    check_batch_independent,
    check_close_to_float64,
    check_linear,
    check_threads,
)

from recon3d.geometry.pet import TOF
from recon3d.ops import joseph3d, joseph3d_adjoint, tof_weights
from recon3d.ops.joseph3d import _reference, _reference_adjoint
from recon3d.ops.tof import tof_numbers

FLIGHT = TOF(9, 6.0, 5.0)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def sphere_points(n: int, radius: float, seed: int = 0, squash: float = 1.0) -> torch.Tensor:
    """Points on a sphere; squash flattens z, as in a ring scanner."""
    p = torch.randn(n, 3, generator=generator(seed), dtype=torch.float64)
    p[:, 0] *= squash
    return p / p.norm(dim=1, keepdim=True) * radius


@dataclass(frozen=True)
class Case:
    name: str
    shape: tuple[int, int, int]
    spacing: tuple[float, float, float] = (1.0, 1.0, 1.0)
    lines: int = 200
    radius: float = 60.0
    squash: float = 0.3
    inside: float = 0.0  # share of the points that lie anywhere within the sphere
    tof: TOF | None = None
    every: bool = False

    def __str__(self) -> str:
        return self.name

    @property
    def points(self):
        p = sphere_points(150, self.radius, squash=self.squash)
        n = int(self.inside * len(p))
        p[:n] *= torch.rand(n, 1, generator=generator(5), dtype=torch.float64)
        return p

    @property
    def pairs(self):
        return torch.randint(0, 150, (self.lines, 2), generator=generator(3), dtype=torch.int32)

    @property
    def bins(self):
        if self.tof is None or self.every:
            return None
        return torch.randint(0, self.tof.bins, (self.lines,), generator=generator(4), dtype=torch.int32)

    def A(self, x):
        return joseph3d(x, self.points, self.pairs, self.spacing, tof=self.tof, tof_bins=self.bins)

    def AT(self, y):
        lines = self.points, self.pairs, self.shape, self.spacing
        return joseph3d_adjoint(y, *lines, tof=self.tof, tof_bins=self.bins)

    def reference(self, x):
        return _reference(x, self.points, self.pairs, self.bins, *self.spacing, *tof_numbers("", self.tof))

    def reference_adjoint(self, y):
        numbers = tof_numbers("", self.tof)
        return _reference_adjoint(y, self.points, self.pairs, self.bins, *self.shape, *self.spacing, *numbers)

    def domain(self, volumes: int = 2, dtype=torch.float32, seed: int = 0):
        return torch.randn(volumes, *self.shape, generator=generator(seed), dtype=dtype)

    def range(self, volumes: int = 2, dtype=torch.float32, seed: int = 1):
        tail = [self.tof.bins] if self.every else []
        return torch.randn(volumes, self.lines, *tail, generator=generator(seed), dtype=dtype)


PLAIN = [
    Case("ring", (21, 40, 40)),
    Case("odd", (13, 31, 27), (2.5, 1.7, 2.1), lines=333),
    Case("sphere", (30, 24, 28), squash=1.0),
    Case("inside", (20, 40, 36), inside=0.7, radius=40.0),
    Case("along-z", (50, 9, 11), squash=20.0),
    Case("long-z", (70, 12, 12), (1.0, 3.0, 3.0)),
    Case("one-voxel", (1, 1, 1), (20.0, 15.0, 18.0)),
    Case("one-slice", (1, 33, 30), (30.0, 1.0, 1.0)),
    Case("one-row", (12, 1, 30), (3.0, 30.0, 2.0)),
    Case("one-column", (12, 30, 1), (3.0, 2.0, 30.0)),
    Case("sixteen", (14, 16, 16), (3.0, 3.0, 3.0), lines=16),
    Case("one-line", (14, 16, 16), (3.0, 3.0, 3.0), lines=1),
    Case("far-away", (5, 6, 7), (150.0, 160.0, 140.0), radius=3000.0),
    Case("thousands", (17, 48, 48), lines=2500),
]  # fmt: skip
CASES = PLAIN + [
    replace(c, name=f"{c.name}-{kind}", tof=FLIGHT, every=every)
    for c in PLAIN
    if c.name in ("ring", "odd", "sphere", "inside", "one-voxel", "thousands")
    for kind, every in (("tof", False), ("bins", True))
    if not (every and c.name == "thousands")
]
SOME = [c for c in CASES if c.name.split("-")[0] in ("odd", "sphere", "inside", "thousands")]


@pytest.fixture(params=["best", "avx2", "portable"])
def isa(request, monkeypatch):
    """Every instruction-set path of the compiled kernels; a path the machine lacks falls to the next."""
    if request.param != "best":
        monkeypatch.setenv("RECON3D_ISA", request.param)
    return request.param


# ---- laws


@pytest.mark.parametrize("case", CASES, ids=str)
def test_adjoint(case, isa):
    check_adjoint(case.A, case.AT, case.domain(), case.range())


@pytest.mark.parametrize("case", CASES, ids=str)
def test_adjoint_float64(case):
    x, y = case.domain(dtype=torch.float64), case.range(dtype=torch.float64)
    check_adjoint(case.A, case.AT, x, y, 1e-12)
    check_adjoint(case.reference, case.reference_adjoint, x, y, 1e-12)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_close_to_float64(case, isa):
    x, y = case.domain(), case.range()
    check_close_to_float64(case.A(x), case.reference(x), case.reference(x.double()), "forward")
    truth = case.reference_adjoint(y.double())
    check_close_to_float64(case.AT(y), case.reference_adjoint(y), truth, "adjoint")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_float64_is_the_definition(case):
    x, y = case.domain(dtype=torch.float64), case.range(dtype=torch.float64)
    for got, want in ((case.A(x), case.reference(x)), (case.AT(y), case.reference_adjoint(y))):
        assert (got - want).norm() <= 1e-12 * want.norm()


@pytest.mark.parametrize("case", SOME, ids=str)
def test_linear(case):
    check_linear(case.A, case.domain(), case.domain(seed=7))
    check_linear(case.AT, case.range(), case.range(seed=7))


@pytest.mark.parametrize("case", SOME, ids=str)
def test_batch_and_threads(case, isa):
    check_batch_independent(case.A, case.domain(3))
    check_batch_independent(case.AT, case.range(3))
    check_threads(lambda: case.A(case.domain()))
    check_threads(lambda: case.AT(case.range()))


@pytest.mark.parametrize("case", SOME, ids=str)
def test_other_lines_do_not_matter(case, isa):
    """A line alone, and in another order and company, gives bitwise the same value."""
    x, full = case.domain(1)[0], case.A(case.domain(1)[0])
    for chosen in (torch.randperm(case.lines, generator=generator(1))[: case.lines // 3], torch.tensor([2])):
        bins = None if case.bins is None else case.bins[chosen]
        part = joseph3d(x, case.points, case.pairs[chosen], case.spacing, tof=case.tof, tof_bins=bins)
        assert torch.equal(part, full[chosen])


def test_many_threads():
    case = next(c for c in CASES if c.name == "thousands-tof")
    before = torch.get_num_threads()
    x, y = case.domain(1), case.range(1)
    want = case.A(x), case.AT(y)
    try:
        torch.set_num_threads(7)
        assert torch.equal(case.A(x), want[0]) and torch.equal(case.AT(y), want[1])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("kind", ["plain", "tof", "bins"])
def test_gradient(kind):
    tof, every = (None, False) if kind == "plain" else (TOF(3, 3.0, 1.5), kind == "bins")
    case = Case("small", (3, 4, 5), lines=6, radius=5.0, inside=0.3, tof=tof, every=every)
    x, y = (t.requires_grad_() for t in (case.domain(1, torch.float64), case.range(1, torch.float64)))
    assert torch.autograd.gradcheck(case.A, x) and torch.autograd.gradcheck(case.AT, y)
    value = case.range(1, torch.float64)
    case.A(x).backward(value)
    assert torch.equal(x.grad, case.AT(value))


@pytest.mark.parametrize("case", [c for c in CASES if c.name.startswith("sphere")], ids=str)
def test_opcheck(case):
    lines = case.points, case.pairs, case.bins
    numbers = (*case.spacing, *tof_numbers("", case.tof))
    torch.library.opcheck(torch.ops.recon3d.joseph3d, (case.domain(), *lines, *numbers))
    torch.library.opcheck(torch.ops.recon3d.joseph3d_adjoint, (case.range(), *lines, *case.shape, *numbers))


def test_outputs_are_written_whole(isa):
    """What memory held before a call shows nowhere in its result: lines that miss, voxels without a line."""
    case = Case("misses", (9, 10, 11), lines=64)
    points = torch.cat([case.points, torch.tensor([[500.0, 0, 0], [500.0, 80, 3]], dtype=torch.float64)])
    pairs = torch.cat([case.pairs, torch.tensor([[150, 151], [4, 4]], dtype=torch.int32)])
    for _ in range(3):
        junk = torch.full((66,), math.nan), torch.full((9, 10, 11), math.nan)
        del junk
        y = joseph3d(torch.ones(9, 10, 11), points, pairs, case.spacing)
        x = joseph3d_adjoint(torch.ones(66), points, pairs, case.shape, case.spacing)
        assert y.isfinite().all() and x.isfinite().all() and (y[-2:] == 0).all()


# ---- lengths known by hand


def line(p0, p1, shape, spacing, volume=None, **flight):
    points = torch.tensor([p0, p1], dtype=torch.float64)
    volume = torch.ones(shape, dtype=torch.float64) if volume is None else volume
    return joseph3d(volume, points, torch.tensor([[0, 1]], dtype=torch.int32), spacing, **flight)[0]


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_length_along_an_axis(axis):
    """Through the middle of a box, inside the plateau of the interpolation: the box's length, both ways."""
    shape, spacing = (6, 8, 10), (3.0, 2.0, 1.5)
    p0 = [0.0, 0.0, 0.0]
    p0[axis] = -100.0
    p1 = [-v for v in p0]
    want = shape[axis] * spacing[axis]
    for a, b in ((p0, p1), (p1, p0)):
        assert line(a, b, shape, spacing).item() == pytest.approx(want, rel=1e-12)


def test_length_of_a_diagonal():
    """At 45 degrees in the plane every row is sqrt 2 long; the two ends leave the box half a row early."""
    n = 12
    got = line([0.0, -50.0, -50.0], [0.0, 50.0, 50.0], (3, n, n), (1.0, 1.0, 1.0)).item()
    assert got == pytest.approx(n * math.sqrt(2), rel=1e-12)
    oblique = line([-25.0, -50.0, 0.0], [25.0, 50.0, 0.0], (80, n, 3), (1.0, 1.0, 1.0)).item()
    assert oblique == pytest.approx(n * math.hypot(1, 0.5), rel=1e-12)


def test_single_voxel_ramps_to_zero():
    """The weight of one voxel is the hat of the distance in both other axes, times the step."""
    volume = torch.zeros(5, 5, 5, dtype=torch.float64)
    volume[2, 2, 2] = 1
    for dz in (-1.2, -0.75, 0.0, 0.3, 0.999):
        for dx in (-0.5, 0.0, 0.8):
            got = line([dz * 3, -40.0, dx * 2], [dz * 3, 40.0, dx * 2], (5, 5, 5), (3.0, 1.0, 2.0), volume).item()
            assert got == pytest.approx(max(0, 1 - abs(dz)) * max(0, 1 - abs(dx)), abs=1e-12)


def test_border_fades_within_one_voxel():
    """Beside the box by f voxels of the outermost centre: 1 - f of the length, then nothing."""
    shape, spacing = (4, 6, 8), (2.0, 2.0, 2.0)
    for f, want in ((0.0, 12.0), (0.25, 9.0), (1.0, 0.0), (3.0, 0.0)):
        at = (3.5 + f) * 2.0
        assert line([0.0, -90.0, at], [0.0, 90.0, at], shape, spacing).item() == pytest.approx(want, abs=1e-12)


def test_ends_inside_the_volume():
    """Only planes whose centre lies on the segment count; a plane through an end point belongs to it."""
    shape, spacing = (3, 20, 3), (1.0, 1.0, 1.0)
    # plane centres at -9.5 ... 9.5
    assert line([0, -3.0, 0], [0, 2.0, 0], shape, spacing).item() == pytest.approx(5.0)
    assert line([0, -3.5, 0], [0, 2.5, 0], shape, spacing).item() == pytest.approx(7.0)
    assert line([0, 2.5, 0], [0, -3.5, 0], shape, spacing).item() == pytest.approx(7.0)
    assert line([0, 0.1, 0], [0, 0.3, 0], shape, spacing).item() == 0.0
    assert line([0, -100.0, 0], [0, 0.0, 0], shape, spacing).item() == pytest.approx(10.0)
    # both ends on the same side
    assert line([0, -100.0, 0], [0, -50.0, 0], shape, spacing).item() == 0.0


def test_segments_of_a_line_add_up():
    volume = torch.rand(9, 31, 29, generator=generator(0), dtype=torch.float64)
    p0, p1 = (
        torch.tensor([-3.0, -40.0, 17.0], dtype=torch.float64),
        torch.tensor([2.0, 43.0, -9.0], dtype=torch.float64),
    )
    cut = p0 + 0.437 * (p1 - p0)
    whole, *parts = (
        line(a.tolist(), b.tolist(), volume.shape, (1.0, 1.0, 1.0), volume) for a, b in ((p0, p1), (p0, cut), (cut, p1))
    )
    assert sum(parts).item() == pytest.approx(whole.item(), rel=1e-12)


def test_zero_length_line():
    assert line([0.0, 1.0, 2.0], [0.0, 1.0, 2.0], (5, 5, 5), (1.0, 1.0, 1.0)).item() == 0.0


@pytest.mark.parametrize(("first", "second"), [(1, 2), (1, 0), (2, 0)])
def test_ties_between_axes(first, second):
    """At 45 degrees planes are those of y, then x, then z: twice as far apart there, they meet one voxel once."""
    volume = torch.zeros(9, 9, 9, dtype=torch.float64)
    volume[4, 4, 4] = 1
    spacing, p0, p1 = [1.0] * 3, [0.0] * 3, [0.0] * 3
    spacing[first] = 2.0
    p0[first], p1[first], p0[second], p1[second] = -20.0, 20.0, -19.6, 20.4
    for a, b in ((p0, p1), (p1, p0)):
        got = line(a, b, (9, 9, 9), tuple(spacing), volume).item()
        assert got == pytest.approx(0.6 * 2 * math.sqrt(2), rel=1e-12)


# ---- analytic bodies


def ellipsoid(shape, spacing, axes, centre, oversample=4):
    """Mean of the indicator of an ellipsoid over every voxel."""
    fine = []
    for n, s, c in zip(shape, spacing, centre, strict=True):
        at = (torch.arange(n * oversample, dtype=torch.float64) + 0.5) / oversample - 0.5 - (n - 1) / 2
        fine.append(at * s - c)
    z, y, x = fine
    a, b, c = axes
    inside = ((z / a)[:, None, None] ** 2 + (y / b)[:, None] ** 2 + (x / c) ** 2 <= 1).double()
    parts = [v for n in shape for v in (n, oversample)]
    return inside.reshape(parts).mean((1, 3, 5))


def chords(points, pairs, axes, centre):
    """Length of every segment inside the ellipsoid."""
    scale = torch.tensor(axes, dtype=torch.float64)
    p = (points[pairs[:, 0]] - torch.tensor(centre, dtype=torch.float64)) / scale
    d = (points[pairs[:, 1]] - points[pairs[:, 0]]) / scale
    a, b, c = (d * d).sum(1), (p * d).sum(1), (p * p).sum(1) - 1
    root = (b * b - a * c).clamp(min=0).sqrt()
    low, high = ((-b - root) / a).clamp(0, 1), ((-b + root) / a).clamp(0, 1)
    return (high - low) * (points[pairs[:, 1]] - points[pairs[:, 0]]).norm(dim=1)


@pytest.mark.parametrize("squash", [0.3, 1.0, 4.0], ids=["ring", "sphere", "along-z"])
def test_ellipsoid(squash):
    shape, spacing, axes, centre = (40, 48, 44), (1.2, 1.0, 1.1), (15.0, 18.0, 13.0), (1.5, -2.0, 3.0)
    points = sphere_points(400, 90.0, 3, squash)
    pairs = torch.randint(0, 400, (4000, 2), generator=generator(9))
    pairs = pairs[pairs[:, 0] != pairs[:, 1]]
    want = chords(points, pairs, axes, centre)
    hit = want > 0
    got = joseph3d(ellipsoid(shape, spacing, axes, centre).float(), points, pairs, spacing).double()
    assert (got - want)[hit].norm() / want.norm() < 0.02
    assert abs(got.sum() / want.sum() - 1) < 5e-3


def test_cylinder():
    """Oblique lines through an upright cylinder: the in-plane chord over the cosine of the tilt."""
    shape, spacing, radius = (40, 64, 64), (1.0, 1.0, 1.0), 22.0
    body = ellipsoid(shape, spacing, (1e9, radius, radius), (0.0, 0.0, 0.0))
    angle = torch.rand(500, generator=generator(0), dtype=torch.float64) * 2 * math.pi
    s = (torch.rand(500, generator=generator(1), dtype=torch.float64) - 0.5) * 1.8 * radius
    h, tilt = 100.0, 0.2
    n, d = torch.stack([angle.sin(), angle.cos()], 1), torch.stack([angle.cos(), -angle.sin()], 1)
    ends = [torch.cat([torch.full((500, 1), k * h * tilt), s[:, None] * n + k * h * d], 1) for k in (-1.0, 1.0)]
    points = torch.cat(ends).double()
    pairs = torch.stack([torch.arange(500), torch.arange(500) + 500], 1)
    want = 2 * (radius**2 - s**2).sqrt() * math.sqrt(1 + tilt**2)
    got = joseph3d(body, points, pairs, spacing)
    assert (got - want).norm() / want.norm() < 0.01


# ---- time of flight


@pytest.mark.parametrize("bins", [4, 9, 1])
def test_bins_add_up(bins, isa):
    """Bins that cover the line add up to the value without time of flight."""
    case = Case("whole", (13, 31, 27), (2.5, 1.7, 2.1), inside=0.2)
    tof = TOF(bins, 160.0 / bins, 6.0)
    x = case.domain()
    plain, every = case.A(x), replace(case, tof=tof, every=True).A(x)
    assert (every.sum(-1) - plain).norm() <= 1e-5 * plain.norm()


def test_listmode_is_a_column_of_all_bins(isa):
    case = replace(PLAIN[1], tof=FLIGHT)
    x = case.domain(1)[0]
    every = replace(case, every=True).A(x)
    single = case.A(x)
    want = every.gather(1, case.bins.long()[:, None])[:, 0]
    assert (single - want).norm() <= 1e-5 * every.norm()


def test_bins_of_a_point_source():
    """A point shares its value between the bins as the Gaussian's integral says; bin 0 is nearest to p0."""
    volume = torch.zeros(3, 81, 3, dtype=torch.float64)
    volume[1, 40 + 12, 1] = 1
    tof = TOF(7, 10.0, 8.0)
    got = line([0, -100.0, 0], [0, 100.0, 0], volume.shape, (1.0, 1.0, 1.0), volume, tof=tof)
    edges = (torch.arange(8, dtype=torch.float64) - 3.5) * 10.0
    phi = lambda u: 0.5 * (1 + torch.erf(u / math.sqrt(2)))  # noqa: E731
    reach = phi(torch.tensor(3.0, dtype=torch.float64)) - phi(torch.tensor(-3.0, dtype=torch.float64))
    f = ((phi((edges - 12.0) / 8.0) - phi(torch.tensor(-3.0, dtype=torch.float64))) / reach).clamp(0, 1)
    assert torch.allclose(got, f.diff(), atol=1e-12, rtol=0)
    assert got.argmax() == 4 and got[0] == 0
    back = line([0, 100.0, 0], [0, -100.0, 0], volume.shape, (1.0, 1.0, 1.0), volume, tof=tof)
    assert torch.allclose(back, got.flip(0), atol=1e-12, rtol=0)


def test_middle_is_that_of_the_segment():
    """Bins count from the middle between the two points, wherever the volume lies."""
    volume = torch.zeros(3, 81, 3, dtype=torch.float64)
    volume[1, 40, 1] = 1
    got = line([0, -30.0, 0], [0, 110.0, 0], volume.shape, (1.0, 1.0, 1.0), volume, tof=TOF(9, 20.0, 3.0))
    assert got.argmax() == 2 and got[2].item() == pytest.approx(1.0)  # 40 mm before the middle


def test_tof_weights():
    at = torch.linspace(-30, 30, 61, dtype=torch.float64)
    weights = tof_weights(at, 20, 7.0, 9.0)
    assert torch.allclose(weights.sum(-1), torch.ones(61, dtype=torch.float64), atol=1e-14, rtol=0)
    assert (weights >= 0).all() and torch.allclose(weights, weights.flip(0, 1), atol=1e-14, rtol=0)
    one = tof_weights(at, 20, 7.0, 9.0, which=torch.full((61,), 4))
    assert torch.equal(one, weights[:, 4])


# ---- sizes and errors


def test_no_lines_and_no_volumes():
    case = Case("none", (4, 5, 6), lines=0)
    assert case.A(case.domain()).shape == (2, 0)
    assert torch.equal(case.AT(case.range()), torch.zeros(2, 4, 5, 6))
    some = Case("some", (4, 5, 6), lines=3)
    assert some.A(torch.zeros(0, 4, 5, 6)).shape == (0, 3)
    assert some.AT(torch.zeros(0, 3)).shape == (0, 4, 5, 6)
    assert some.A(torch.ones(2, 3, 4, 5, 6)).shape == (2, 3, 3)


def test_int64_pairs_and_strided_inputs():
    case = PLAIN[1]
    x = case.domain().transpose(-1, -2).contiguous().transpose(-1, -2)
    pairs = torch.stack([case.pairs[:, 0], case.pairs[:, 1]]).long().T
    assert torch.equal(joseph3d(x, case.points, pairs, case.spacing), case.A(case.domain()))


def test_nan_stays_where_it_is(isa):
    """A voxel that is not a number reaches the lines through its neighbourhood and no others."""
    case = Case("nan", (15, 24, 24), lines=1500, squash=0.3)
    x = case.domain(1)[0]
    want = case.A(x)
    x[7, 12, 12] = math.nan
    probe = torch.zeros_like(x)
    probe[7, 12, 12] = 1
    near = torch.zeros_like(x)
    near[6:9, 11:14, 11:14] = 1
    got = case.A(x)
    assert got[case.A(probe) > 1e-3].isnan().all()
    away = case.A(near) == 0
    assert torch.equal(got[away], want[away]) and away.sum() > 700


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"x": torch.zeros(4, 5)}, ValueError, "z, y, x"),
        ({"x": torch.zeros(3, 0, 5)}, ValueError, "not empty"),
        ({"x": torch.zeros(3, 4, 5, dtype=torch.int32)}, TypeError, "float32 or float64"),
        ({"points": torch.zeros(2, 3)}, TypeError, "float64"),
        ({"points": torch.zeros(2, 2, dtype=torch.float64)}, ValueError, "K, 3"),
        ({"points": torch.tensor([[0, 0, 0], [1, math.nan, 0]], dtype=torch.float64)}, ValueError, "row 1"),
        ({"points": torch.tensor([[0, math.inf, 0], [1, 0, 0]], dtype=torch.float64)}, ValueError, "finite"),
        ({"pairs": torch.tensor([[0.0, 1.0]])}, TypeError, "int32"),
        ({"pairs": torch.tensor([0, 1])}, ValueError, "n, 2"),
        ({"pairs": torch.tensor([[0, 2]])}, ValueError, "0 to 1"),
        ({"pairs": torch.tensor([[-1, 1]])}, ValueError, "got -1 to 1"),
        ({"spacing_mm": (1.0, 1.0)}, ValueError, "three positive"),
        ({"spacing_mm": (1.0, 0.0, 1.0)}, ValueError, "three positive"),
        ({"tof_bins": torch.tensor([0])}, ValueError, "without tof"),
        ({"tof": FLIGHT, "tof_bins": torch.tensor([9])}, ValueError, "0 to 8"),
        ({"tof": FLIGHT, "tof_bins": torch.tensor([0.5])}, TypeError, "integers"),
        ({"tof": FLIGHT, "tof_bins": torch.tensor([1, 2])}, ValueError, "one per line"),
    ],
)
def test_errors(change, error, says):
    given = {
        "x": torch.zeros(3, 4, 5),
        "points": torch.tensor([[0, -9, 0], [0, 9, 0]], dtype=torch.float64),
        "pairs": torch.tensor([[0, 1]]),
        "spacing_mm": (1.0, 1.0, 1.0),
    }
    with pytest.raises(error, match=says) as caught:
        joseph3d(**{**given, **change})
    assert "\n" not in str(caught.value)


def test_errors_of_the_adjoint():
    points, pairs = torch.tensor([[0, -9, 0], [0, 9, 0]], dtype=torch.float64), torch.tensor([[0, 1]])
    good = (points, pairs, (3, 4, 5), (1.0, 1.0, 1.0))
    with pytest.raises(ValueError, match=r"\[..., 1\]"):
        joseph3d_adjoint(torch.zeros(2), *good)
    with pytest.raises(ValueError, match="1, 9"):
        joseph3d_adjoint(torch.zeros(1), *good, tof=FLIGHT)
    with pytest.raises(ValueError, match="shape"):
        joseph3d_adjoint(torch.zeros(1), points, pairs, (3, 4), (1.0, 1.0, 1.0))
    with pytest.raises(TypeError, match="float32"):
        joseph3d_adjoint(torch.zeros(1, dtype=torch.float16), *good)


def test_direct_callers_cannot_read_outside():
    points = torch.zeros(2, 3, dtype=torch.float64)
    numbers = (1.0, 1.0, 1.0, 0, 1.0, 1.0, 3.0)
    for pair in ([0, 2], [-1, 0]):
        with pytest.raises((RuntimeError, IndexError)):
            torch.ops.recon3d.joseph3d(
                torch.zeros(3, 3, 3), points, torch.tensor([pair], dtype=torch.int32), None, *numbers
            )

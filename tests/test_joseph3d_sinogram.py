"""recon3d.ops.joseph3d_sinogram: hand-computed chords, laws, odd sizes, every instruction set, gradients, errors."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import pytest
import torch
from laws import (
    adjoint_gap,
    check_adjoint,
    check_batch_independent,
    check_close_to_float64,
    check_linear,
    check_threads,
)
from torch import Tensor

from recon3d.geometry import TOF
from recon3d.ops import joseph3d, joseph3d_adjoint, joseph3d_sinogram, joseph3d_sinogram_adjoint
from recon3d.ops.joseph3d_sinogram import _reference, _reference_adjoint
from recon3d.ops.tof import tof_numbers

Rows = list[tuple[float, float, float, float]]


def fan_lines(views: int, radial: int, pitch: float, radius: float, first: float = 0.03, shift: float = 0.0) -> Tensor:
    """(y0, x0, y1, x1) of a ring scanner, view after view: from s n - h d to s n + h d."""
    phi = (first + torch.arange(views, dtype=torch.float64) * math.pi / views)[:, None]
    s = ((torch.arange(radial, dtype=torch.float64) - (radial - 1) / 2) * pitch + shift)[None]
    h = (radius**2 - s**2).clamp(min=1.0).sqrt()
    cos, sin = phi.cos(), phi.sin()
    y, x, hy, hx = s * sin, s * cos, h * cos, -h * sin
    return torch.stack([y - hy, x - hx, y + hy, x + hx], -1).reshape(-1, 4)


def ring_pairs(rings: int, most: int, pitch: float) -> Rows:
    """Segments of span 1: ring differences 0, -1, +1, ... up to `most`."""
    rows: Rows = []
    for k in range(2 * most + 1):
        d = (k + 1) // 2 * (-1 if k % 2 else 1)
        first = 2 * max(0, -d) + d  # sum of the ring numbers of the first plane
        rows.append(((first / 2 - (rings - 1) / 2) * pitch, d * pitch, pitch, rings - abs(d)))
    return rows


@dataclass(frozen=True)
class Case:
    name: str
    shape: tuple[int, int, int]
    segments: Rows
    lines: Tensor = field(default_factory=lambda: fan_lines(6, 13, 1.6, 25.0))
    spacing: tuple[float, float, float] = (1.0, 1.0, 1.0)
    tof: TOF | None = None

    def __str__(self) -> str:
        return self.name + ("-tof" if self.tof else "")

    @property
    def table(self) -> Tensor:
        return torch.tensor(self.segments, dtype=torch.float64).reshape(-1, 4)

    @property
    def planes(self) -> int:
        return int(self.table[:, 3].sum())

    def A(self, x):
        return joseph3d_sinogram(x, self.lines, self.table, self.spacing, tof=self.tof)

    def AT(self, y):
        return joseph3d_sinogram_adjoint(y, self.lines, self.table, self.shape, self.spacing, tof=self.tof)

    def reference(self, x):
        return _reference(x, self.lines, self.table, self.planes, *self.spacing, *tof_numbers("test", self.tof))

    def reference_adjoint(self, y):
        numbers = tof_numbers("test", self.tof)
        return _reference_adjoint(y, self.lines, self.table, *self.shape, *self.spacing, *numbers)

    def domain(self, volumes: int = 1, dtype=torch.float32, seed: int = 0):
        return torch.randn(volumes, *self.shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)

    def range(self, volumes: int = 1, dtype=torch.float32, seed: int = 1):
        bins = [self.tof.bins] if self.tof else []
        size = (volumes, len(self.lines), *bins, self.planes)
        return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=dtype)


SINOGRAMS = [
    Case("span-1", (23, 20, 20), ring_pairs(12, 7, 2.0)),
    Case("odd", (17, 13, 22), ring_pairs(9, 8, 2.6), fan_lines(7, 11, 2.1, 31.0, 0.0, 0.4), (1.3, 1.7, 0.9)),
    Case("step-1", (21, 12, 15), [(-10.0, 0.0, 1.0, 21), (-8.5, -5.0, 1.0, 18), (-8.5, 5.0, 1.0, 18)]),
    Case("step-3", (25, 11, 9), ring_pairs(9, 4, 3.0)),
    Case("step-5", (25, 9, 12), ring_pairs(5, 2, 5.0), fan_lines(3, 9, 1.6, 25.0)),
    Case("mixed-steps", (24, 12, 12), [(-8, 3.0, 2.0, 9), (-3.3, -4.0, 1.0, 11), (-6.0, 1.0, 4.0, 4), (0.2, 0, 7, 1)]),
    Case("long", (331, 6, 7), [(-165.0, 0.0, 1.0, 331), (-150.2, 17.0, 2.0, 150)], fan_lines(3, 5, 1.7, 25.0)),
    Case("partly-outside", (9, 14, 14), ring_pairs(12, 11, 2.0)),
    Case("far-outside", (5, 8, 8), [(60.0, 4.0, 1.0, 3), (-90.0, -4.0, 2.0, 30), (0.0, 300.0, 1.0, 2)]),
    Case("between-planes", (15, 10, 10), [(-7.77, 1.9, 1.0, 14), (-4.31, -3.3, 1.0, 9)]),
    Case("ends-inside", (11, 24, 24), ring_pairs(6, 2, 2.0), fan_lines(8, 9, 1.3, 8.3)),
    Case("diagonal", (9, 12, 12), ring_pairs(5, 3, 2.0), fan_lines(4, 12, 1.4142, 25.0, math.pi / 4)),
    Case("quarter-turns", (9, 12, 12), ring_pairs(5, 3, 2.0), fan_lines(2, 13, 1.0, 25.0, 0.0)),
    Case("flat", (1, 16, 16), [(0.0, 0.0, 1.0, 1)], fan_lines(9, 17, 1.0, 25.0)),
    Case("one-voxel", (1, 1, 1), [(0.2, 0.1, 1.0, 1)], fan_lines(5, 4, 0.6, 9.0)),
    Case("one-row", (7, 1, 19), ring_pairs(4, 2, 2.0)),
    Case("one-column", (7, 19, 1), ring_pairs(4, 2, 2.0)),
    Case("one-line", (7, 12, 11), ring_pairs(4, 2, 2.0), fan_lines(1, 1, 1.0, 20.0, 0.9)),
    Case("wide", (5, 90, 41), ring_pairs(3, 1, 2.0), fan_lines(4, 11, 7.0, 95.0)),
]  # fmt: skip
BINS = [TOF(5, 6.0, 3.0), TOF(6, 4.0, 2.2), TOF(71, 0.35, 3.5), TOF(1, 12.0, 9.0, 2.0), TOF(4, 5.0, 2.0, 4.5)]
CASES = SINOGRAMS + [replace(c, tof=BINS[k % len(BINS)]) for k, c in enumerate(SINOGRAMS)]
SOME = [c for c in CASES if c.name in ("span-1", "odd", "mixed-steps", "long")]


@pytest.fixture(params=["best", "avx2", "portable"])
def isa(request, monkeypatch):
    """Every instruction-set path of the compiled kernels; a path the machine lacks falls to the next."""
    if request.param != "best":
        monkeypatch.setenv("RECON3D_ISA", request.param)
    return request.param


@pytest.mark.parametrize("case", CASES, ids=str)
def test_adjoint(case, isa):
    check_adjoint(case.A, case.AT, case.domain(), case.range())


@pytest.mark.parametrize("case", CASES, ids=str)
def test_close_to_float64(case, isa):
    x, y = case.domain(2), case.range(2)
    one, two = case.reference(x), case.reference_adjoint(y)
    exact_one, exact_two = case.reference(x.double()), case.reference_adjoint(y.double())
    check_close_to_float64(case.A(x), one, exact_one, "forward")
    check_close_to_float64(case.AT(y), two, exact_two, "adjoint")
    for got, want in ((case.A(x.double()), exact_one), (case.AT(y.double()), exact_two)):
        assert (got - want).norm() <= 1e-12 * (want.norm() + 1)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_adjoint_float64(case):
    x, y = case.domain(dtype=torch.float64), case.range(dtype=torch.float64)
    check_adjoint(case.A, case.AT, x, y, 1e-12)
    check_adjoint(case.reference, case.reference_adjoint, x, y, 1e-12)


@pytest.mark.parametrize("case", SOME, ids=str)
def test_linear(case, isa):
    check_linear(case.A, case.domain(seed=3), case.domain(seed=4))
    check_linear(case.AT, case.range(seed=3), case.range(seed=4))


@pytest.mark.parametrize("case", SOME, ids=str)
def test_volumes_are_independent(case, isa):
    check_batch_independent(case.A, case.domain(3))
    check_batch_independent(case.AT, case.range(3))


@pytest.mark.parametrize("case", [*SOME, *(c for c in CASES if c.name == "wide")], ids=str)
def test_threads(case, isa):
    check_threads(lambda: case.A(case.domain()))
    check_threads(lambda: case.AT(case.range()))


@pytest.mark.parametrize("case", SOME, ids=str)
def test_lines_are_independent(case, isa):
    """A subset of the lines or segments is that part of the whole; adjoints of subsets add up."""
    x, y = case.domain(), case.range()
    whole, which = case.A(x), torch.arange(1, len(case.lines), 3)
    rest = torch.ones(len(case.lines), dtype=torch.bool)
    rest[which] = False
    part, other = replace(case, lines=case.lines[which]), replace(case, lines=case.lines[rest])
    assert torch.equal(part.A(x), whole[:, which])
    total, want = part.AT(y[:, which]) + other.AT(y[:, rest]), case.AT(y)
    assert (total - want).norm() <= 1e-6 * want.norm()
    last = replace(case, segments=case.segments[-1:])
    assert torch.equal(last.A(x), whole[..., -last.planes :])


@pytest.mark.parametrize("tof", [None, BINS[0]], ids=["plain", "tof"])
def test_gradcheck(tof):
    case = Case("grad", (3, 2, 3), ring_pairs(2, 1, 2.0), fan_lines(2, 2, 1.1, 9.0), (1.0, 1.2, 0.9), tof)
    x, y = case.domain(2, torch.float64).requires_grad_(), case.range(2, torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(case.A, (x,)) and torch.autograd.gradcheck(case.AT, (y,))
    assert torch.autograd.gradgradcheck(case.A, (x[:1],))


@pytest.mark.parametrize("case", SOME, ids=str)
def test_gradient_is_the_adjoint(case):
    x, y = case.domain().requires_grad_(), case.range()
    case.A(x).backward(y)
    assert torch.equal(x.grad, case.AT(y))


@pytest.mark.parametrize("case", [c for c in CASES if c.name == "odd"], ids=str)
def test_opcheck(case):
    numbers = (*case.spacing, *tof_numbers("test", case.tof))
    x, y = case.domain().requires_grad_(), case.range().requires_grad_()
    ops = torch.ops.recon3d
    torch.library.opcheck(ops.joseph3d_sinogram.default, (x, case.lines, case.table, case.planes, *numbers))
    torch.library.opcheck(ops.joseph3d_sinogram_adjoint.default, (y, case.lines, case.table, *case.shape, *numbers))


@pytest.mark.parametrize("case", [c for c in CASES if c.name == "odd"], ids=str)
def test_layouts(case, isa):
    """Leading axes, no volumes, no lines, no planes, and views in memory give what plain stacks give."""
    x, y = case.domain(6), case.range(6)
    ax, aty = case.A(x), case.AT(y)
    assert torch.equal(case.A(x[0]), ax[0]) and torch.equal(case.AT(y[0]), aty[0])
    assert torch.equal(case.A(x.reshape(2, 3, *case.shape)), ax.reshape(2, 3, *ax.shape[1:]))
    assert case.A(x[:0]).shape == ax[:0].shape and case.AT(y[:0]).shape == aty[:0].shape
    assert torch.equal(case.A(x.transpose(1, 3).contiguous().transpose(1, 3)), ax)
    assert torch.equal(case.A(torch.stack((x, x), -1)[..., 0]), ax)
    assert torch.equal(case.AT(y.transpose(0, 1).contiguous().transpose(0, 1)), aty)
    assert torch.equal(case.AT(y[:1].expand_as(y))[3], aty[0])
    none = replace(case, lines=case.lines[:0])
    assert none.A(x).shape == (6, 0, *ax.shape[2:]) and torch.equal(none.AT(y[:, :0]), torch.zeros_like(aty))
    empty = replace(case, segments=[(0.0, 0.0, 2.6, 0)])
    assert empty.A(x).shape == (*ax.shape[:-1], 0) and torch.equal(empty.AT(y[..., :0]), torch.zeros_like(aty))


@pytest.mark.parametrize("case", SOME, ids=str)
def test_nan_stays_in_its_volume(case, isa):
    """A volume of NaN neither reaches its neighbours nor leaves stale memory for what runs next."""
    x, y = case.domain(3), case.range(3)
    ax, aty = case.A(x), case.AT(y)
    x[1], y[1] = math.nan, math.nan
    got, back = case.A(x), case.AT(y)
    assert torch.equal(got[::2], ax[::2]) and torch.equal(back[::2], aty[::2])
    del got, back
    assert torch.equal(case.A(x[2]), ax[2]) and torch.equal(case.AT(y[2]), aty[2])


def test_lines_that_miss_give_zero(isa):
    lines = torch.tensor([[-40.0, 12.0, 40.0, 12.5], [11.0, -40.0, 11.0, 40.0], [20.0, 1.0, 30.0, 2.0]]).double()
    case = Case("miss", (5, 10, 12), ring_pairs(3, 2, 2.0), torch.cat((lines, fan_lines(1, 1, 1.0, 20.0))))
    got = case.A(torch.ones(case.shape))
    assert (got[:3] == 0).all() and (got[3] > 0).all()
    assert (replace(case, lines=lines).AT(torch.ones(3, case.planes)) == 0).all()


@pytest.mark.parametrize("turn", [0.0, 0.3, -0.5, math.pi / 2, math.pi / 2 + 0.4, math.pi])
def test_box_chords(turn, isa):
    """A line through two opposite faces of a uniform box: thickness over the cosines, by hand."""
    thick, pixel, rings, pitch = 30 * 1.2, 1.2, 10, 4.0
    cos, sin = math.cos(turn), math.sin(turn)
    radius = 60.0
    lines = torch.tensor([[-radius * cos, radius * sin, radius * cos, -radius * sin]], dtype=torch.float64)
    case = Case("box", (19 + 40, 30, 30), ring_pairs(rings, 6, pitch), lines, (pitch / 2, pixel, pixel))
    got = case.A(torch.full(case.shape, 0.25))[0]
    planes = [(d, int(n)) for _, d, _, n in case.segments]
    want = torch.cat(
        [
            torch.full((n,), 0.25 * thick / max(abs(cos), abs(sin)) * math.hypot(1.0, d / (2 * radius)))
            for d, n in planes
        ]
    )
    assert torch.allclose(got, want, rtol=3e-6, atol=0)


def test_cylinder_chords(isa):
    """A uniform cylinder: 2 sqrt(R^2 - s^2), longer by the slope of the plane."""
    n, r, radius, radial = 160, 60.0, 150.0, 41
    axis = (torch.arange(4 * n, dtype=torch.float64) - (4 * n - 1) / 2) / 4
    fine = (axis[:, None] ** 2 + axis[None] ** 2 <= r * r).double()
    disc = torch.nn.functional.avg_pool2d(fine[None], 4)[0].float()
    case = Case("cylinder", (27, n, n), ring_pairs(7, 6, 4.0), fan_lines(12, radial, 2.5, radius), (2.0, 1.0, 1.0))
    got = case.A(disc.expand(case.shape)).reshape(12, radial, -1)
    s = (torch.arange(radial) - (radial - 1) / 2) * 2.5
    plane = 0
    for _, d, _, count in case.segments:
        slope = (1 + d * d / (4 * (radius**2 - s**2))).sqrt()
        want = 2 * (r * r - s * s).sqrt() * slope
        for p in range(plane, plane + int(count)):
            assert ((got[..., p] - want).abs() <= 0.6).all(), "more than 0.6 mm off a chord of 66 to 121 mm"
            assert abs(float((got[..., p] / want).mean()) - 1) <= 1e-3
        plane += int(count)


@pytest.mark.parametrize("case", SINOGRAMS, ids=str)
def test_time_bins_add_up(case, isa):
    """Bins that cover the whole line and the resolution sum to the plain line integral."""
    x = case.domain().abs()
    span = 2 * 140.0 + 350
    for tof in (TOF(math.ceil(span / 9.0), 9.0, 5.0), TOF(64, span / 64, 3.0, 2.0)):
        got, want = replace(case, tof=tof).A(x).sum(2), case.A(x)
        assert (got - want).norm() <= 2e-6 * want.norm()


def test_point_arrives_in_its_time_bin():
    """A voxel off the middle: its mean bin is its signed distance from the middle, p1 positive, in every segment."""
    case = Case("point", (11, 31, 31), ring_pairs(6, 3, 2.0), fan_lines(1, 1, 1.0, 40.0, 0.2), tof=TOF(41, 2.0, 4.0))
    y0, x0, y1, x1 = case.lines[0].tolist()
    length = math.hypot(y1 - y0, x1 - x0)
    for d in (-8.0, 0.0, 7.0):
        y, x = d * (y1 - y0) / length, d * (x1 - x0) / length
        volume = torch.zeros(case.shape, dtype=torch.float64)
        volume[:, round(y + 15), round(x + 15)] = 1.0
        along = ((round(y + 15) - 15) * (y1 - y0) + (round(x + 15) - 15) * (x1 - x0)) / length
        got = case.A(volume)[0]
        where = (torch.arange(41, dtype=torch.float64) - 20) * 2.0
        mean = (got * where[:, None]).sum(0) / got.sum(0)
        plane = 0
        for _, delta, _, count in case.segments:
            # the sampled planes lie within half a voxel of the voxel's centre
            want = along * math.hypot(length, delta) / length
            assert ((mean[plane : plane + int(count)] - want).abs() <= 0.6).all()
            plane += int(count)


@pytest.mark.parametrize("case", [c for c in CASES if c.name not in ("one-voxel", "far-outside", "long")], ids=str)
def test_same_as_lines_of_response(case):
    """joseph3d on the same lines of response, one by one."""
    x, y = case.domain(dtype=torch.float64)[0], case.range(dtype=torch.float64)[0]
    rows = []
    for z, delta, step, count in case.segments:
        middle = z + step * torch.arange(int(count), dtype=torch.float64)
        rows.append(torch.stack((middle - delta / 2, middle + delta / 2), 1))
    axial, flat = torch.cat(rows), case.lines
    ends = [
        torch.stack(
            torch.broadcast_tensors(axial[None, :, e], flat[:, None, 2 * e], flat[:, None, 2 * e + 1]), -1
        ).reshape(-1, 3)
        for e in (0, 1)
    ]
    n = len(ends[0])
    points, pairs = torch.cat(ends), torch.stack((torch.arange(n), torch.arange(n) + n), 1).int()
    got, want = case.A(x), joseph3d(x, points, pairs, case.spacing, tof=case.tof)
    want = want.reshape(len(flat), case.planes, -1)
    got = got.transpose(1, 2) if case.tof else got[..., None]
    assert (got - want).norm() <= 1e-11 * want.norm()
    spread = (y.transpose(1, 2).reshape(n, -1) if case.tof else y.reshape(n)).contiguous()
    back = joseph3d_adjoint(spread, points, pairs, case.shape, case.spacing, tof=case.tof)
    assert (case.AT(y) - back).norm() <= 1e-11 * back.norm()


def test_the_adjoint_test_can_fail():
    case = CASES[0]
    assert adjoint_gap(case.A, lambda y: 1.001 * case.AT(y), case.AT(case.range()), case.range()) > 1e-6


def test_bad_input():
    x, lines, one = torch.zeros(5, 8, 8), fan_lines(1, 2, 1.0, 9.0), (1.0, 1.0, 1.0)
    table = torch.tensor([[0.0, 0.0, 2.0, 3.0]], dtype=torch.float64)

    def project(x=x, lines=lines, table=table, spacing=one, **kwargs):
        return joseph3d_sinogram(x, lines, table, spacing, **kwargs)

    with pytest.raises(TypeError, match=r"joseph3d_sinogram: float32 or float64 needed, got torch\.int64"):
        project(x.long())
    with pytest.raises(ValueError, match=r"x must be \[\.\.\., z, y, x\]"):
        project(x[0])
    with pytest.raises(ValueError, match="not empty"):
        project(x[:, :0])
    with pytest.raises(ValueError, match="spacing_mm must be three positive lengths"):
        project(spacing=(1.0, 0.0, 1.0))
    with pytest.raises(TypeError, match=r"lines must be float64, got torch\.float32"):
        project(lines=lines.float())
    with pytest.raises(ValueError, match=r"segments must be \[n, 4\]"):
        project(table=table[0])
    with pytest.raises(ValueError, match=r"lines must be finite, row 1"):
        project(lines=torch.cat((lines[:1], lines[:1] * math.inf)))
    with pytest.raises(ValueError, match="both ends of line 2 are the same point"):
        project(lines=torch.cat((lines, torch.zeros(1, 4).double())))
    with pytest.raises(ValueError, match=r"planes 2 mm apart are 1\.6 voxels .* choose dz = 1 mm"):
        project(spacing=(1.25, 1.0, 1.0))
    with pytest.raises(ValueError, match=r"whole number from 1"):
        project(table=table * torch.tensor([1.0, 1.0, -1.0, 1.0]))
    with pytest.raises(ValueError, match=r"number of planes must be a whole number, got 2\.5"):
        project(table=torch.tensor([[0.0, 0.0, 2.0, 2.5]], dtype=torch.float64))
    with pytest.raises(ValueError, match="far away"):
        project(table=torch.tensor([[1e9, 0.0, 2.0, 2.0]], dtype=torch.float64))
    with pytest.raises(ValueError, match=r"y must be \[\.\.\., line, plane\] = \[\.\.\., 2, 3\], got shape \(2, 4\)"):
        joseph3d_sinogram_adjoint(torch.zeros(2, 4), lines, table, (5, 8, 8), one)
    with pytest.raises(ValueError, match=r"\[\.\.\., line, tof, plane\] = \[\.\.\., 2, 5, 3\]"):
        joseph3d_sinogram_adjoint(torch.zeros(2, 3), lines, table, (5, 8, 8), one, tof=BINS[0])
    with pytest.raises(ValueError, match="shape must be three positive sizes"):
        joseph3d_sinogram_adjoint(torch.zeros(2, 3), lines, table, (5, 0, 8), one)


def test_the_result_goes_where_it_is_asked_to():
    line = torch.tensor([[-9.0, 0.3, 9.0, 1.0], [-9.0, -2.0, 9.0, 2.0]], dtype=torch.float64)
    segments = torch.tensor([[-2.0, 0.0, 1.0, 5.0], [-1.0, 1.0, 1.0, 3.0]], dtype=torch.float64)
    tof = TOF(bins=3, bin_mm=2.0, sigma_mm=1.5)
    for lead, time in (((), None), ((2,), tof)):
        x = torch.rand(*lead, 5, 6, 7)
        want = joseph3d_sinogram(x, line, segments, (1.0, 1.0, 1.0), tof=time)
        room = torch.full_like(want, math.nan)
        got = joseph3d_sinogram(x, line, segments, (1.0, 1.0, 1.0), tof=time, out=room)
        assert got.data_ptr() == room.data_ptr()
        assert torch.equal(got, want)
        for bad in (room[..., :-1], room.double(), room.mT.contiguous().mT):
            with pytest.raises(ValueError, match="out must be contiguous"):
                joseph3d_sinogram(x, line, segments, (1.0, 1.0, 1.0), tof=time, out=bad)
    with pytest.raises(ValueError, match="keeps no gradients"):
        joseph3d_sinogram(x.requires_grad_(), line, segments, (1.0, 1.0, 1.0), tof=tof, out=room)

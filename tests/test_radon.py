"""recon3d.ops.radon: exact line integrals, laws, odd sizes, every instruction set, gradients, errors."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import numpy as np
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

from recon3d.geometry import FanBeam, ParallelBeam, equiangular
from recon3d.ops import radon, radon_adjoint
from recon3d.ops.radon import _METHODS, _reference, _reference_adjoint, _scan
from recon3d.testing.phantoms import Ellipse, line_integrals, rasterise, shepp_logan

FULL = 2 * math.pi


def fan(n_views: int, n: int, pitch: float, sod: float, sdd: float, offset: float = 0.0, span: float = FULL) -> FanBeam:
    return FanBeam(equiangular(n_views, span), n, pitch, offset, source_to_axis_mm=sod, source_to_detector_mm=sdd)


@dataclass(frozen=True)
class Case:
    name: str
    geometry: ParallelBeam
    shape: tuple[int, int]
    pixel: tuple[float, float] = (1.0, 1.0)
    method: str = "joseph"

    def __str__(self) -> str:
        return self.name

    def A(self, x):
        return radon(x, self.geometry, self.pixel, self.method)

    def AT(self, y):
        return radon_adjoint(y, self.geometry, self.shape, self.pixel, self.method)

    def reference(self, x):
        angles, *scan = _scan(self.geometry)
        return _reference(x, angles, self.geometry.n_detector, *scan, *self.pixel, _METHODS[self.method])

    def reference_adjoint(self, y):
        angles, *scan = _scan(self.geometry)
        return _reference_adjoint(y, angles, *self.shape, *scan, *self.pixel, _METHODS[self.method])

    def domain(self, slices: int = 2, dtype=torch.float32, seed: int = 0):
        return torch.randn(slices, *self.shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)

    def range(self, slices: int = 2, dtype=torch.float32, seed: int = 1):
        size = (slices, self.geometry.n_views, self.geometry.n_detector)
        return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def _parallel_cases(method: str) -> list[Case]:
    m = f"-{method}"
    return [
        Case("square" + m, ParallelBeam(equiangular(8), 48, 1.0), (48, 48), method=method),
        Case("odd" + m, ParallelBeam(equiangular(7, FULL, 0.1), 67, 1.3, 2.7), (61, 53), (1.1, 0.9), method),
        Case("flat-pixels" + m, ParallelBeam(equiangular(9, FULL), 41, 0.8, -1.0), (19, 45), (2.0, 0.7), method),
        Case("fine-detector" + m, ParallelBeam(equiangular(6, FULL, 0.3), 130, 0.3), (40, 33), method=method),
        Case("coarse-detector" + m, ParallelBeam(equiangular(6, FULL, 0.3), 11, 5.0), (40, 33), method=method),
        Case("45-degrees" + m, ParallelBeam(equiangular(4, FULL, math.pi / 4), 40, 1.0), (32, 32), method=method),
        Case("quadrants" + m, ParallelBeam(equiangular(5, FULL * 1.25), 36, 1.0), (32, 32), method=method),
        Case("far-offset" + m, ParallelBeam(equiangular(5), 20, 1.0, 40.0), (48, 64), method=method),
        Case("one-pixel" + m, ParallelBeam(equiangular(5), 4, 0.5), (1, 1), method=method),
        Case("one-view" + m, ParallelBeam((0.4,), 33, 1.0), (17, 30), method=method),
        Case("one-cell" + m, ParallelBeam(equiangular(4), 1, 1.0), (9, 8), method=method),
        Case("four-cells" + m, ParallelBeam(equiangular(5), 4, 1.4), (47, 27), (0.65, 0.38), method),
        Case("one-small-cell" + m, ParallelBeam(equiangular(7), 1, 0.4), (13, 29), (2.1, 0.45), method),
        Case("one-row" + m, ParallelBeam(equiangular(5), 30, 1.0), (1, 23), method=method),
        Case("one-column" + m, ParallelBeam(equiangular(5), 30, 1.0), (37, 1), method=method),
    ]  # fmt: skip


FAN_CASES = [
    Case("fan", fan(9, 48, 2.1, 96.0, 192.0), (48, 48)),
    Case("fan-odd", fan(11, 71, 1.3, 90.0, 150.0, 3.3), (61, 53), (1.1, 0.9)),
    Case("fan-wide", fan(10, 90, 2.0, 30.0, 60.0), (31, 37)),
    Case("fan-few-cells", fan(10, 9, 25.0, 30.0, 60.0), (31, 37)),
    Case("fan-fine-detector", fan(8, 160, 0.5, 60.0, 110.0), (32, 40)),
    Case("fan-source-at-corner", fan(8, 136, 0.38, 3.5993, 5.592, -1.12), (13, 1), (0.5237, 2.3353)),
    Case("fan-one-pixel", fan(3, 5, 0.7, 3.0, 6.0), (1, 1)),
    Case("fan-one-view", fan(1, 40, 1.5, 60.0, 100.0, 0.5), (30, 20), (0.8, 1.2)),
]
CASES = _parallel_cases("joseph") + _parallel_cases("shear") + FAN_CASES
SOME = [
    c for c in CASES if "odd" in c.name or "-detector" in c.name or c.name in ("fan", "fan-wide", "one-pixel-joseph")
]


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
def test_adjoint_float64(case):
    check_adjoint(case.A, case.AT, case.domain(dtype=torch.float64), case.range(dtype=torch.float64), 1e-12)
    x, y = case.domain(dtype=torch.float64), case.range(dtype=torch.float64)
    check_adjoint(case.reference, case.reference_adjoint, x, y, 1e-12)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_close_to_float64(case, isa):
    """Alone, in a small stack and in the last, partly filled group of a large one."""
    x, y = case.domain(), case.range()
    one, two = case.reference(x), case.reference_adjoint(y)
    exact_one, exact_two = case.reference(x.double()), case.reference_adjoint(y.double())
    for slices in (2, 18):
        xs, ys = case.domain(slices), case.range(slices)
        xs[-2:], ys[-2:] = x, y
        check_close_to_float64(case.A(xs)[-2:], one, exact_one, "forward")
        check_close_to_float64(case.AT(ys)[-2:], two, exact_two, "adjoint")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_float64_is_the_reference(case):
    x, y = case.domain(3, torch.float64), case.range(3, torch.float64)
    for got, want in ((case.A(x), case.reference(x)), (case.AT(y), case.reference_adjoint(y))):
        assert (got - want).norm() <= 1e-12 * (want.norm() + 1)


@pytest.mark.parametrize("case", SOME, ids=str)
def test_linear(case, isa):
    check_linear(case.A, case.domain(seed=3), case.domain(seed=4))
    check_linear(case.AT, case.range(seed=3), case.range(seed=4))


@pytest.mark.parametrize("case", SOME, ids=str)
def test_slice_does_not_depend_on_stack(case, isa):
    """7 slices go through every small kernel, 25 through full and partly filled groups of 16."""
    for slices in (7, 25 if isa == "best" else 18):
        check_batch_independent(case.A, case.domain(slices))
        check_batch_independent(case.AT, case.range(slices))


@pytest.mark.parametrize("case", [c for c in CASES if "odd" in c.name or c.name == "fan"], ids=str)
def test_threads(case, isa):
    for slices in (1, 17):
        check_threads(lambda n=slices: case.A(case.domain(n)))
        check_threads(lambda n=slices: case.AT(case.range(n)))


@pytest.mark.parametrize("case", [c for c in CASES if "odd" in c.name], ids=str)
def test_views_are_independent(case, isa):
    """A subset of the views is those views of the whole, and the subsets' adjoints add up."""
    views = [4, 1, 5]
    x, y = case.domain(), case.range()
    part = Case("part", case.geometry.subset(views), case.shape, case.pixel, case.method)
    got, want = part.A(x), case.A(x)[:, views]
    assert (got - want).norm() <= 1e-5 * want.norm()
    rest = [v for v in range(case.geometry.n_views) if v not in views]
    other = Case("rest", case.geometry.subset(rest), case.shape, case.pixel, case.method)
    total, want = part.AT(y[:, views]) + other.AT(y[:, rest]), case.AT(y)
    assert (total - want).norm() <= 1e-5 * want.norm()


@pytest.mark.parametrize("method", ["joseph", "shear"])
def test_gradcheck(method):
    case = Case("grad", ParallelBeam((0.1, 1.2), 5, 1.1), (3, 4), (1.0, 0.9), method)
    x, y = case.domain(2, torch.float64).requires_grad_(), case.range(2, torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(case.A, (x,)) and torch.autograd.gradcheck(case.AT, (y,))
    assert torch.autograd.gradgradcheck(case.A, (x,))


def test_gradient_is_the_adjoint():
    case = FAN_CASES[1]
    x, y = case.domain().requires_grad_(), case.range()
    case.A(x).backward(y)
    assert torch.equal(x.grad, case.AT(y))


@pytest.mark.parametrize("case", [CASES[1], FAN_CASES[1]], ids=str)
def test_opcheck(case):
    angles, *scan = _scan(case.geometry)
    args = (*scan, *case.pixel, _METHODS[case.method])
    x, y = case.domain().requires_grad_(), case.range().requires_grad_()
    torch.library.opcheck(torch.ops.recon3d.radon.default, (x, angles, case.geometry.n_detector, *args))
    torch.library.opcheck(torch.ops.recon3d.radon_adjoint.default, (y, angles, *case.shape, *args))


@pytest.mark.parametrize("case", [CASES[1], next(c for c in CASES if c.name == "odd-shear"), FAN_CASES[1]], ids=str)
def test_layouts(case, isa):
    """Leading axes, no slices, and views in memory give what plain stacks give."""
    x, y = case.domain(6), case.range(6)
    ax, aty = case.A(x), case.AT(y)
    assert torch.equal(case.A(x[0]), ax[0]) and torch.equal(case.AT(y[0]), aty[0])
    assert torch.equal(case.A(x.reshape(2, 3, *case.shape)), ax.reshape(2, 3, *ax.shape[1:]))
    assert case.A(x[:0]).shape == ax[:0].shape and case.AT(y[:0]).shape == aty[:0].shape
    turned = x.transpose(1, 2).contiguous().transpose(1, 2)
    assert not turned.is_contiguous() and torch.equal(case.A(turned), ax)
    assert torch.equal(case.A(torch.stack((x, x), -1)[..., 0]), ax)
    assert torch.equal(case.AT(y.transpose(0, 1).contiguous().transpose(0, 1)), aty)
    assert torch.equal(case.AT(y[:1].expand(4, -1, -1))[3], aty[0])


@pytest.mark.parametrize("case", SOME, ids=str)
def test_nan_stays_in_its_slice(case, isa):
    """A slice of NaN neither reaches its neighbours nor leaves stale memory in the output."""
    x, y = case.domain(5), case.range(5)
    ax, aty = case.A(x), case.AT(y)
    x[3], y[3] = math.nan, math.nan
    keep = [0, 1, 2, 4]
    assert torch.equal(case.A(x)[keep], ax[keep]) and torch.equal(case.AT(y)[keep], aty[keep])


@functools.cache
def _head(n: int) -> torch.Tensor:
    return torch.from_numpy(rasterise(shepp_logan(n / 2), (n, n), (1.0, 1.0))).float()


def _error(n: int, geometry, method: str) -> float:
    exact = torch.from_numpy(line_integrals(shepp_logan(n / 2), geometry))
    return float((radon(_head(n), geometry, (1.0, 1.0), method).double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("method, slack", [("joseph", 1.02), ("shear", 1.10)])
def test_shepp_logan_parallel(method, slack, isa):
    """Within the error Joseph's method has against the exact integrals, and falling with the pixel."""
    coarse = _error(256, ParallelBeam(equiangular(180), 256, 1.0), method)
    fine = _error(512, ParallelBeam(equiangular(60), 512, 1.0), method)
    assert coarse <= slack * 0.0141 and fine <= slack * 0.0069 and fine < 0.6 * coarse


def test_shepp_logan_fan(isa):
    coarse = _error(256, fan(90, 256, 2.1, 512.0, 1024.0), "joseph")
    fine = _error(512, fan(60, 512, 2.1, 1024.0, 2048.0), "joseph")
    assert coarse <= 1.02 * 0.0145 and fine <= 1.02 * 0.0072 and fine < 0.6 * coarse


@pytest.mark.parametrize(
    "geometry",
    [ParallelBeam(equiangular(8, FULL), 301, 0.1, 0.7), fan(8, 601, 0.1, 60.0, 110.0, 0.9)],
    ids=["parallel", "fan"],
)
def test_small_disc_lands_where_the_geometry_says(geometry):
    """Centre of gravity of a small disc's shadow, from the documented formula rather than from the ray equation."""
    x, y = 4.0, -7.0
    pixel = (0.2, 0.25)
    image = torch.from_numpy(rasterise([Ellipse(1.0, 0.8, 0.8, x, y)], (161, 129), pixel))
    got = radon(image, geometry, pixel).numpy()
    u = geometry.detector_mm()
    for k, a in enumerate(geometry.angles):
        want = x * math.cos(a) + y * math.sin(a)
        if isinstance(geometry, FanBeam):
            depth = geometry.source_to_axis_mm - (-x * math.sin(a) + y * math.cos(a))
            want *= geometry.source_to_detector_mm / depth
        assert abs((got[k] * u).sum() / got[k].sum() - want) <= 0.03
        assert abs(got[k].max() - 1.6) <= 0.05  # the chord through its middle, in mm


def test_phantom_integrals_are_integrals():
    """line_integrals against points summed along the ray."""
    shapes = [Ellipse(2.0, 5.0, 9.0, 3.0, -4.0, 0.7), *shepp_logan(20.0)]
    t = np.linspace(-40, 40, 200001)
    for geometry in (ParallelBeam((0.3, 2.0), 3, 4.0, 1.0), fan(2, 3, 4.0, 60.0, 90.0, 1.0)):
        got = line_integrals(shapes, geometry)
        for v, a in enumerate(geometry.angles):
            for k, u in enumerate(geometry.detector_mm()):
                if isinstance(geometry, FanBeam):
                    source = np.array([-math.sin(a), math.cos(a)]) * geometry.source_to_axis_mm
                    cell = source + np.array([math.sin(a), -math.cos(a)]) * geometry.source_to_detector_mm
                    cell = cell + u * np.array([math.cos(a), math.sin(a)])
                    way = (cell - source) / np.linalg.norm(cell - source)
                    near = source - (source @ way) * way
                else:
                    way, near = np.array([-math.sin(a), math.cos(a)]), u * np.array([math.cos(a), math.sin(a)])
                points = near + t[:, None] * way
                total = 0.0
                for e in shapes:
                    c, s = math.cos(e.turn_rad), math.sin(e.turn_rad)
                    p = points - (e.x_mm, e.y_mm)
                    inside = ((p @ (c, s)) / e.a_mm) ** 2 + ((p @ (-s, c)) / e.b_mm) ** 2 <= 1
                    total += e.value * inside.sum() * (t[1] - t[0])
                assert abs(got[v, k] - total) <= 0.01


def test_the_adjoint_test_can_fail():
    case = CASES[1]
    assert adjoint_gap(case.A, lambda y: 1.001 * case.AT(y), case.AT(case.range()), case.range()) > 1e-6


def test_bad_input():
    g, f = ParallelBeam((0.0, 1.0), 8, 1.0), fan(2, 8, 1.0, 20.0, 40.0)
    x, one = torch.zeros(2, 8, 8), (1.0, 1.0)
    with pytest.raises(TypeError, match=r"radon: float32 or float64 needed, got torch\.int64"):
        radon(x.long(), g, one)
    with pytest.raises(ValueError, match="radon: at least two axes"):
        radon(torch.zeros(8), g, one)
    with pytest.raises(ValueError, match="no empty slice"):
        radon(torch.zeros(2, 0, 8), g, one)
    with pytest.raises(ValueError, match="radon: method must be"):
        radon(x, g, one, "siddon")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="'shear' serves parallel beams only"):
        radon(x, f, one, "shear")
    with pytest.raises(ValueError, match="pixel_mm must be two positive lengths"):
        radon(x, g, (1.0, 0.0))
    with pytest.raises(ValueError, match="turns inside the image"):
        radon(torch.zeros(1, 40, 40), f, one)
    with pytest.raises(ValueError, match="the scan has 2 views of 8 cells, y has 3 of 8"):
        radon_adjoint(torch.zeros(3, 8), g, (8, 8), one)
    with pytest.raises(ValueError, match="shape must be two positive sizes"):
        radon_adjoint(torch.zeros(2, 8), g, (8, 0), one)

"""recon3d.ops.nufft: exact transforms, laws, odd sizes, every instruction set, gradients, Toeplitz kernel, errors."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import pytest
import torch
from laws import (
    check_adjoint,
    check_batch_independent,
    check_close_to_float64,
    check_linear,
    check_threads,
)

from recon3d.ops import nufft, nufft_adjoint, nufft_normal, nufft_plan, nufft_toeplitz_kernel
from recon3d.ops.nufft import _lanes, _lanes_adjoint, _reference, _reference_adjoint, _tensors

PI = math.pi


def radial(spokes: int, samples: int, d: int = 2) -> torch.Tensor:
    """Golden-angle spokes from -pi to just below pi; in 3D their directions cover the sphere."""
    radius = (torch.arange(samples, dtype=torch.float64) - samples // 2) * (2 * PI / samples)
    angle = torch.arange(spokes, dtype=torch.float64) * (PI * (math.sqrt(5) - 1) / 2)
    direction = torch.stack([angle.sin(), angle.cos()], -1)
    if d == 3:
        up = (torch.arange(spokes) + 0.5) / spokes
        direction = torch.cat([up[:, None], (1 - up**2).sqrt()[:, None] * direction], -1)
    return (direction[:, None] * radius[:, None]).reshape(-1, d)


def spiral(turns: int, samples: int) -> torch.Tensor:
    t = torch.linspace(0, 1, samples, dtype=torch.float64).sqrt()
    return PI * t[:, None] * torch.stack([(2 * PI * turns * t).sin(), (2 * PI * turns * t).cos()], -1)


def scattered(n: int, d: int, seed: int = 0) -> torch.Tensor:
    return (torch.rand(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2 - 1) * PI


def border(n: int, d: int) -> torch.Tensor:
    """Points on and beside the border at +-pi, where taps wrap."""
    points = scattered(n, d)
    points[0::4, 0] = PI
    points[1::4, d - 1] = -PI
    points[2::4, 0] = -PI * (1 - 1e-9)
    return points


@dataclass(frozen=True)
class Case:
    name: str
    points: torch.Tensor
    shape: tuple[int, ...]
    eps: float = 1e-3
    oversampling: float | None = None

    def __str__(self) -> str:
        return self.name

    @functools.cached_property
    def plan(self):
        return nufft_plan(self.points, self.shape, eps=self.eps, oversampling=self.oversampling)

    def A(self, x):
        return nufft(x, self.plan)

    def AT(self, y):
        return nufft_adjoint(y, self.plan)

    def reference(self, x):
        plan = _tensors(self.plan, x.dtype)
        return _reference(x, *plan, self.plan.grid, self.plan.tile)

    def reference_adjoint(self, y):
        plan = _tensors(self.plan, y.dtype)
        return _reference_adjoint(y, *plan, self.shape, self.plan.grid, self.plan.tile)

    def domain(self, images: int = 2, dtype=torch.complex64, seed: int = 0):
        return torch.randn(images, *self.shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)

    def range(self, images: int = 2, dtype=torch.complex64, seed: int = 1):
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(images, len(self.points), generator=generator, dtype=dtype)

    def matrix(self, points=None):
        """The transform by its definition: [M, pixels] complex128."""
        points = self.points if points is None else points
        rows = torch.ones(len(points), 1, dtype=torch.complex128)
        for a, n in enumerate(self.shape):
            pixels = torch.arange(n, dtype=torch.float64) - n // 2
            rows = (rows[:, :, None] * torch.exp(-1j * points[:, a, None, None] * pixels)).flatten(1)
        return rows / math.sqrt(math.prod(self.shape))


CASES = [
    Case("radial", radial(37, 48), (32, 32)),
    Case("radial-coarse", radial(21, 64), (32, 32), 1e-2),
    Case("radial-fine", radial(13, 48), (24, 24), 1e-6),
    Case("spiral", spiral(12, 1500), (30, 36), 1e-4),
    Case("scattered", scattered(700, 2), (31, 45), 1e-5),
    Case("border", border(900, 2), (28, 17), 1e-3),
    Case("prime", scattered(900, 2), (13, 47), 3e-4),
    Case("wide-grid", scattered(900, 2), (40, 24), 1e-4, 2.0),
    Case("one-row", scattered(300, 2), (1, 33)),
    Case("one-column", scattered(300, 2), (26, 1), 1e-4),
    Case("one-pixel", scattered(50, 2), (1, 1)),
    Case("few-pixels", scattered(400, 2), (3, 2), 1e-4),
    Case("one-point", torch.tensor([[0.3, -2.0]], dtype=torch.float64), (16, 20), 1e-4),
    Case("line", scattered(600, 1), (50,), 1e-4),
    Case("kooshball", radial(60, 24, 3), (12, 12, 12)),
    Case("volume", border(600, 3), (7, 10, 9), 1e-4),
    Case("tall-volume", border(900, 3), (70, 6, 37), 1e-3),
]
SOME = [c for c in CASES if c.name in ("radial", "border", "few-pixels", "volume", "tall-volume", "radial-fine")]


@pytest.fixture(params=["best", "avx2", "portable"])
def isa(request, monkeypatch):
    """Every instruction-set path of the compiled kernels; a path the machine lacks falls to the next."""
    if request.param != "best":
        monkeypatch.setenv("RECON3D_ISA", request.param)
    return request.param


@pytest.mark.parametrize("case", CASES, ids=str)
def test_error_within_eps(case, isa):
    """Forward and adjoint against the definition in float64, on white data."""
    matrix, images = case.matrix(), 24
    x, y = case.domain(images), case.range(images)
    flat = x.flatten(1).to(torch.complex128)
    want = flat @ matrix.T
    # few pixels or points: the error of a finite draw scatters about its mean
    chance = 1 + 2 / math.sqrt(images * min(flat.shape[1], len(case.points)))
    assert (case.A(x) - want).norm() <= case.eps * chance * want.norm()
    want = y.to(torch.complex128) @ matrix.conj()
    assert (case.AT(y).flatten(1) - want).norm() <= case.eps * chance * want.norm()


@pytest.mark.parametrize("eps", [1e-8, 1e-12])
@pytest.mark.parametrize(
    "case", [c for c in CASES if c.name in ("radial", "border", "volume", "prime", "line")], ids=str
)
def test_error_within_eps_complex128(case, eps):
    case = Case(case.name, case.points, case.shape, eps)
    matrix, x, y = case.matrix(), case.domain(8, torch.complex128), case.range(8, torch.complex128)
    want = x.flatten(1) @ matrix.T
    assert (case.A(x) - want).norm() <= 1.1 * eps * want.norm()
    want = y @ matrix.conj()
    assert (case.AT(y).flatten(1) - want).norm() <= 1.1 * eps * want.norm()


@pytest.mark.parametrize("eps", [1e-2, 1e-3, 1e-4, 1e-5, 1e-6])
@pytest.mark.parametrize("oversampling", [None, 2.0])
def test_every_eps_of_complex64(eps, oversampling):
    case = Case("", radial(40, 64), (32, 36), eps, oversampling)
    x = case.domain(16)
    want = x.flatten(1).to(torch.complex128) @ case.matrix().T
    assert (case.A(x) - want).norm() <= eps * want.norm()
    assert case.plan.error <= eps


def test_samples_on_the_grid():
    """Points all at the same offset between taps, where the mean error over offsets says little."""
    k = 2 * PI / 32 * (torch.arange(32, dtype=torch.float64) - 16)
    points = torch.stack(torch.meshgrid(k, k, indexing="ij"), -1).reshape(-1, 2)
    for eps in (1e-2, 1e-3, 1e-4):
        for oversampling in (None, 1.25, 2.0):
            case = Case("", points, (32, 32), eps, oversampling)
            x = case.domain(16)
            want = torch.fft.fftshift(torch.fft.fft2(torch.fft.ifftshift(x, (1, 2)), norm="ortho"), (1, 2)).flatten(1)
            assert (case.A(x) - want).norm() <= eps * want.norm()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_adjoint(case, isa):
    check_adjoint(case.A, case.AT, case.domain(), case.range(), 1e-5)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_adjoint_complex128(case):
    x, y = case.domain(dtype=torch.complex128), case.range(dtype=torch.complex128)
    check_adjoint(case.A, case.AT, x, y, 1e-12)
    check_adjoint(case.reference, case.reference_adjoint, x, y, 1e-12)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_close_to_reference(case, isa):
    """Alone, in a small stack and in the last, partly filled group of a larger one; as far as rounding alone goes."""
    x, y = case.domain(), case.range()
    one, two = case.reference(x), case.reference_adjoint(y)
    exact_one, exact_two = case.reference(x.to(torch.complex128)), case.reference_adjoint(y.to(torch.complex128))
    for images in (2, 18):
        xs, ys = case.domain(images), case.range(images)
        xs[-2:], ys[-2:] = x, y
        for got, want, exact in ((case.A(xs)[-2:], one, exact_one), (case.AT(ys)[-2:], two, exact_two)):
            parts = [torch.view_as_real(t.resolve_conj()) for t in (got, want, exact)]
            check_close_to_float64(*parts)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_complex128_is_the_reference(case):
    x, y = case.domain(3, torch.complex128), case.range(3, torch.complex128)
    for got, want in ((case.A(x), case.reference(x)), (case.AT(y), case.reference_adjoint(y))):
        assert (got - want).norm() <= 1e-13 * want.norm()


@pytest.mark.parametrize("case", SOME, ids=str)
def test_linear(case, isa):
    check_linear(case.A, case.domain(seed=2), case.domain(seed=3))
    check_linear(case.AT, case.range(seed=4), case.range(seed=5))


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
@pytest.mark.parametrize("case", SOME, ids=str)
def test_batch_threads_and_runs(case, isa, dtype):
    """The same bits for an image alone and in a stack, for one thread and several, and again."""
    for images in (1, 3, 11):
        x, y = case.domain(images, dtype), case.range(images, dtype)
        check_batch_independent(case.A, x)
        check_batch_independent(case.AT, y)
        check_threads(lambda x=x: case.A(x))
        check_threads(lambda y=y: case.AT(y))
        assert torch.equal(case.A(x), case.A(x)) and torch.equal(case.AT(y), case.AT(y))
        check_threads(lambda x=x: nufft_normal(x, case.plan))


@pytest.mark.parametrize("case", SOME, ids=str)
def test_engine_layout(case, isa):
    """The same bits as in the usual layout, transposed and in the plan's order."""
    order = case.plan.order.long()
    for dtype in (torch.complex64, torch.complex128):
        x, y = case.domain(16, dtype), case.range(16, dtype)
        chunks = x.reshape(2, 8, *case.shape).movedim(1, -1).contiguous()
        got = _lanes(chunks, case.plan)
        assert torch.equal(got.movedim(-1, 1).reshape(16, -1), case.A(x)[:, order])
        chunks = y[:, order].reshape(2, 8, -1).movedim(1, -1).contiguous()
        got = _lanes_adjoint(chunks, case.plan)
        assert torch.equal(got.movedim(-1, 1).reshape(16, *case.shape), case.AT(y))


def test_shapes_and_views():
    case = CASES[4]
    x, y = case.domain(6), case.range(6)
    assert torch.equal(case.A(x.reshape(2, 3, *case.shape)), case.A(x).reshape(2, 3, -1))
    assert torch.equal(case.A(x[0]), case.A(x)[0])
    assert torch.equal(case.AT(y[0]), case.AT(y)[0])
    assert case.A(x[:0]).shape == (0, 700) and case.AT(y[:0]).shape == (0, *case.shape)
    assert nufft_normal(x[:0], case.plan).shape == x[:0].shape
    strided = x.mT.contiguous().mT
    assert torch.equal(case.A(strided), case.A(x))
    assert torch.equal(case.A(x.conj()), case.A(x.conj().resolve_conj()))
    assert torch.equal(case.AT(y.mT.contiguous().mT), case.AT(y))


@pytest.mark.parametrize("case", SOME, ids=str)
def test_normal(case, isa):
    x = case.domain(9)
    weights = torch.rand(len(case.points), generator=torch.Generator().manual_seed(7))
    for w in (None, weights):
        want = case.AT(case.A(x) * (1 if w is None else w))
        assert (nufft_normal(x, case.plan, w) - want).norm() <= 2e-6 * want.norm()


@pytest.mark.parametrize("case", [c for c in CASES if c.name not in ("radial-coarse", "wide-grid")], ids=str)
def test_toeplitz(case):
    weights = torch.rand(len(case.points), generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    x, matrix = case.domain(2, torch.complex128), case.matrix()
    want = ((x.flatten(1) @ matrix.T) * weights) @ matrix.conj()
    d = len(case.shape)
    axes, crop = tuple(range(1, d + 1)), (slice(None), *(slice(0, n) for n in case.shape))
    for points in (case.plan, case.points):
        kernel = nufft_toeplitz_kernel(points, case.shape, weights, dtype=torch.float64)
        assert kernel.shape == tuple(2 * n for n in case.shape)
        spectrum = torch.fft.fftn(x, s=kernel.shape, dim=axes)
        got = torch.fft.ifftn(kernel * spectrum, dim=axes)[crop].flatten(1)
        assert (got - want).norm() <= 1e-7 * want.norm()
    assert nufft_toeplitz_kernel(case.plan, case.shape).dtype == torch.float32


@pytest.mark.parametrize("shape", [(5, 4), (3, 4, 2), (9,)], ids=str)
def test_gradients(shape):
    points = scattered(6, len(shape), 3)
    plan = nufft_plan(points, shape, eps=1e-4)
    x = torch.randn(2, *shape, dtype=torch.complex128, requires_grad=True)
    y = torch.randn(2, 6, dtype=torch.complex128, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: nufft(x, plan), x)
    assert torch.autograd.gradcheck(lambda y: nufft_adjoint(y, plan), y)
    assert torch.autograd.gradcheck(lambda x: nufft_normal(x, plan), x)
    points.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x, p: nufft(x, nufft_plan(p, shape, eps=1e-5)), (x, points), rtol=1e-4, fast_mode=True
    )
    assert torch.autograd.gradcheck(
        lambda y, p: nufft_adjoint(y, nufft_plan(p / (2 * PI), shape, eps=1e-5, unit="cycles")),
        (y, points),
        rtol=1e-4,
        fast_mode=True,
    )


def test_gradient_by_points_is_that_of_the_exact_transform():
    case = Case("", scattered(200, 2), (20, 24), 1e-4)
    points = case.points.clone().requires_grad_()
    x, target = case.domain(3), case.range(3)
    loss = (nufft(x, nufft_plan(points, case.shape, eps=case.eps)) - target).abs().square().sum()
    (got,) = torch.autograd.grad(loss, points)
    exact = (x.flatten(1).to(torch.complex128) @ case.matrix(points).T - target).abs().square().sum()
    (want,) = torch.autograd.grad(exact, points)
    assert (got - want).norm() <= 1e-3 * want.norm()


@pytest.mark.parametrize("case", [c for c in CASES if c.name == "few-pixels"], ids=str)
def test_opcheck(case):
    plan = _tensors(case.plan, torch.complex64)
    grid, tile = case.plan.grid, case.plan.tile
    x, y = case.domain().requires_grad_(), case.range().requires_grad_()
    slopes = case.plan.slopes(torch.float64)
    ops = torch.ops.recon3d
    torch.library.opcheck(ops.nufft.default, (x, *plan, grid, tile))
    torch.library.opcheck(ops.nufft_adjoint.default, (y, *plan, case.shape, grid, tile))
    torch.library.opcheck(ops.nufft_normal.default, (x, torch.rand(len(case.points)), *plan, grid, tile))
    order, first, weights, scale, tiles = _tensors(case.plan, torch.complex128)
    x, y = case.domain(dtype=torch.complex128), case.range(dtype=torch.complex128)
    torch.library.opcheck(ops.nufft_points_vjp.default, (x, y, order, first, weights, slopes, scale, tiles, grid, tile))
    torch.library.opcheck(ops.nufft_sort.default, (case.points, grid, case.plan.width, tile))
    torch.library.opcheck(ops.nufft_weights.default, (case.plan.fraction, case.plan.coefficients, False))


def test_plan_is_kept_and_units_agree():
    points = scattered(40, 2)
    plan = nufft_plan(points, (12, 15))
    assert nufft_plan(points.tolist(), [12, 15]) is plan
    assert nufft_plan(points, (12, 15), eps=1e-4) is not plan
    x = torch.randn(12, 15, dtype=torch.complex64)
    want = nufft(x, plan)
    cycles = nufft_plan(points / (2 * PI), (12, 15), unit="cycles")
    index = nufft_plan(points / (2 * PI) * torch.tensor([12, 15]), (12, 15), unit="index")
    for other in (cycles, index):
        assert (nufft(x, other) - want).norm() <= 1e-5 * want.norm()
    assert (plan.radians() - points).abs().max() <= 1e-12
    assert plan.to("cpu") is plan


def test_bad_input():
    points, x = scattered(9, 2), torch.zeros(8, 8, dtype=torch.complex64)
    plan = nufft_plan(points, (8, 8))
    with pytest.raises(ValueError, match="shape must be one to three positive sizes"):
        nufft_plan(points, (8, 0))
    with pytest.raises(ValueError, match=r"points must be \[M, 2\]"):
        nufft_plan(points[:, :1], (8, 8))
    with pytest.raises(ValueError, match="no points given"):
        nufft_plan(points[:0], (8, 8))
    with pytest.raises(ValueError, match="unit must be 'rad', 'cycles' or 'index'"):
        nufft_plan(points, (8, 8), unit="deg")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"reach .* radians per pixel, at most pi"):
        nufft_plan(points, (8, 8), unit="cycles")
    with pytest.raises(ValueError, match="NaN or infinity"):
        nufft_plan(points.masked_fill(points > 1, math.nan), (8, 8))
    with pytest.raises(ValueError, match="eps must lie between"):
        nufft_plan(points, (8, 8), eps=0.0)
    with pytest.raises(ValueError, match="oversampling must lie between"):
        nufft_plan(points, (8, 8), oversampling=1.0)
    with pytest.raises(TypeError, match="nufft: complex64 or complex128 needed"):
        nufft(x.real, plan)
    with pytest.raises(ValueError, match=r"nufft: the plan is for data \[\.\.\., 8, 8\]"):
        nufft(x[:7], plan)
    with pytest.raises(ValueError, match=r"nufft_adjoint: the plan is for data \[\.\.\., 9\]"):
        nufft_adjoint(x, plan)
    with pytest.raises(ValueError, match="below complex64's reach"):
        nufft(x, nufft_plan(points, (8, 8), eps=1e-7))
    with pytest.raises(ValueError, match="one weight per sample"):
        nufft_normal(x, plan, torch.ones(3))
    with pytest.raises(TypeError, match="weights must be real"):
        nufft_toeplitz_kernel(points, (8, 8), torch.ones(9) * 1j)
    with pytest.raises(ValueError, match="the plan is for shape"):
        nufft_toeplitz_kernel(plan, (8, 9))

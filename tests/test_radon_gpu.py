"""recon3d.ops.radon and fbp on a CUDA device: the laws, and the kernels against the torch definition."""

import pytest
import torch
from laws import check_adjoint, check_batch_independent, check_close_to_float64, check_linear
from test_radon import CASES

from recon3d.geometry import FanBeam, ParallelBeam, equiangular
from recon3d.ops import _library, fbp, radon, radon_adjoint

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def device():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")


def test_kernels_are_there():
    found = _library.backends()
    assert all(found[op]["cuda"] for op in ("radon", "radon_adjoint", "fbp_back_project")), _library.build_error()


@pytest.mark.parametrize("slices", [1, 3, 17, 40, 150])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_close_to_float64(case, slices):
    x, y = case.domain(slices), case.range(slices)
    forward, back = case.A(x.cuda()).cpu(), case.AT(y.cuda()).cpu()
    check_close_to_float64(forward, case.reference(x), case.reference(x.double()), "forward")
    check_close_to_float64(back, case.reference_adjoint(y), case.reference_adjoint(y.double()), "adjoint")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_laws(case):
    x, y = case.domain(20).cuda(), case.range(20).cuda()
    check_adjoint(case.A, case.AT, x, y)
    check_adjoint(case.A, case.AT, x[:2].double(), y[:2].double(), 1e-12)
    check_linear(case.A, x, case.domain(20, seed=5).cuda())
    check_linear(case.AT, y, case.range(20, seed=6).cuda())


@pytest.mark.parametrize("case", [c for c in CASES if c.method == "joseph"], ids=str)
def test_bits(case):
    """Run to run, and alone or in a stack on either side of every change of kernel."""
    x, y = case.domain(130).cuda(), case.range(130).cuda()
    for op, data in ((case.A, x), (case.AT, y)):
        assert torch.equal(op(data), op(data))
        for slices in (16, 33, 64, 97):
            assert torch.equal(op(data[:slices]), op(data)[:slices])
        check_batch_independent(op, data[:17])


def test_gradient():
    case = next(c for c in CASES if c.name == "fan-odd")
    x, y = case.domain().cuda().requires_grad_(), case.range().cuda()
    (case.A(x) * y).sum().backward()
    assert torch.equal(x.grad, case.AT(y))


def test_capture_and_replay():
    """No synchronisation, no host copy: the pair survives a CUDA graph."""
    scan, pixel = ParallelBeam(equiangular(30), 96, 1.0), (1.0, 1.0)
    x = torch.randn(33, 64, 64, device="cuda")
    radon_adjoint(radon(x, scan, pixel), scan, (64, 64), pixel)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = radon_adjoint(radon(x, scan, pixel), scan, (64, 64), pixel)
    x.copy_(torch.randn_like(x))
    graph.replay()
    assert torch.equal(out, radon_adjoint(radon(x, scan, pixel), scan, (64, 64), pixel))


@pytest.mark.parametrize("slices", [1, 20])
def test_fbp(slices):
    angles = equiangular(40, 6.283)
    for scan in (
        ParallelBeam(angles, 65, 1.1, 0.7),
        FanBeam(angles, 65, 2.0, source_to_axis_mm=90.0, source_to_detector_mm=150.0),
    ):
        y = torch.randn(slices, 40, 65, generator=torch.Generator().manual_seed(0))
        got, want = fbp(y.cuda(), scan, (50, 41), (1.0, 1.2)).cpu(), fbp(y, scan, (50, 41), (1.0, 1.2))
        assert (got - want).norm() <= 1e-5 * want.norm()
        check_batch_independent(lambda y, scan=scan: fbp(y, scan, (50, 41), (1.0, 1.2)), y.cuda())

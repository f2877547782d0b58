"""The PET projectors on a CUDA device: the laws, and the kernels against the torch definition."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from laws import check_adjoint, check_batch_independent, check_close_to_float64, check_linear
from test_joseph3d_cuda import LINES
from test_joseph3d_sinogram import CASES, fan_lines, ring_pairs
from torch import Tensor

from recon3d.geometry import TOF
from recon3d.ops import _library, joseph3d, joseph3d_adjoint, joseph3d_sinogram, joseph3d_sinogram_adjoint

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def device():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")


def forward(case, x: Tensor) -> Tensor:
    if hasattr(case, "table"):
        return case.A(x)
    return joseph3d(x, case.points, case.pairs, case.spacing, tof=case.tof, tof_bins=case.line_bins)


def back(case, y: Tensor) -> Tensor:
    if hasattr(case, "table"):
        return case.AT(y)
    lines = (case.points, case.pairs, case.shape, case.spacing)
    return joseph3d_adjoint(y, *lines, tof=case.tof, tof_bins=case.line_bins)


ALL = [*CASES, *LINES]
SOME = [c for c in CASES if c.name in ("odd", "mixed-steps")] + [c for c in LINES if c.name == "odd"]


def test_kernels_are_there():
    found = _library.backends()
    names = ("joseph3d", "joseph3d_adjoint", "joseph3d_sinogram", "joseph3d_sinogram_adjoint")
    assert all(found[op]["cuda"] for op in names), _library.build_error()


@pytest.mark.parametrize("case", ALL, ids=str)
def test_close_to_float64(case):
    x, y = case.domain(2), case.range(2)
    exact, exact_back = case.reference(x.double()), case.reference_adjoint(y.double())
    check_close_to_float64(forward(case, x.cuda()).cpu(), case.reference(x), exact, "forward")
    check_close_to_float64(back(case, y.cuda()).cpu(), case.reference_adjoint(y), exact_back, "adjoint")
    assert (forward(case, x.double().cuda()).cpu() - exact).norm() <= 1e-11 * (exact.norm() + 1)
    assert (back(case, y.double().cuda()).cpu() - exact_back).norm() <= 1e-11 * (exact_back.norm() + 1)


@pytest.mark.parametrize("case", SOME, ids=str)
def test_laws(case):
    x, y = case.domain(3).cuda(), case.range(3).cuda()
    check_adjoint(lambda x: forward(case, x), lambda y: back(case, y), x, y)
    check_linear(lambda x: forward(case, x), x, case.domain(3, seed=5).cuda())
    check_linear(lambda y: back(case, y), y, case.range(3, seed=6).cuda())
    check_batch_independent(lambda x: forward(case, x), x)
    check_batch_independent(lambda y: back(case, y), y)


@pytest.mark.parametrize("case", SOME, ids=str)
def test_gradient(case):
    x, y = case.domain().cuda().requires_grad_(), case.range().cuda()
    (forward(case, x) * y).sum().backward()
    assert torch.equal(x.grad, back(case, y))


SCANNER = fan_lines(16, 200, 2.1, 328.0), torch.tensor(ring_pairs(64, 60, 4.0625), dtype=torch.float64)
VOLUME, SPACING = (127, 128, 128), (2.03125, 2.1, 2.1)


@pytest.mark.parametrize("tof", [None, TOF(17, 37.5, 25.5)], ids=["plain", "tof"])
def test_whole_scanner(tof):
    """64 rings with all ring differences: matched, the same bits run after run, and those of the CPU's definition."""
    lines, segments = SCANNER
    lines = lines[::16].contiguous() if tof else lines
    g = torch.Generator().manual_seed(0)
    x = torch.rand(*VOLUME, generator=g).cuda()
    y = joseph3d_sinogram(x, lines, segments, SPACING, tof=tof)
    noise = torch.randn(y.shape, generator=g).cuda()
    spread = joseph3d_sinogram_adjoint(noise, lines, segments, VOLUME, SPACING, tof=tof)
    check_adjoint(lambda _: y, lambda _: spread, x, noise)
    assert torch.equal(y, joseph3d_sinogram(x, lines, segments, SPACING, tof=tof))
    assert torch.equal(spread, joseph3d_sinogram_adjoint(noise, lines, segments, VOLUME, SPACING, tof=tof))
    some = lines[::97].contiguous()
    want = joseph3d_sinogram(x.cpu(), some, segments, SPACING, tof=tof)
    assert (y[::97].cpu() - want).norm() <= 1e-6 * want.norm()
    if tof:
        plain = joseph3d_sinogram(x, lines, segments, SPACING)
        assert (y.sum(-2) - plain).norm() <= 1e-5 * plain.norm()


def test_many_lines():
    """The transpose adds integers, so the bits are the same run after run, however threads arrive."""
    case = replace(next(c for c in LINES if c.name == "odd" and c.tof is None), count=300_000)
    y = case.range().cuda()
    first = back(case, y)
    assert torch.equal(first, back(case, y))
    want = case.reference_adjoint(y.cpu().double())
    assert (first.cpu() - want).norm() <= 1e-6 * want.norm()

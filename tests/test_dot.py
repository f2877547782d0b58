"""recon3d.ops.dot: value, order, batch and thread independence, gradient."""

import pytest
import torch
from laws import check_threads

from recon3d.ops import dot


@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (2, 61, 53), (5, 4096), (2, 70001), (0, 4), (3, 0)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_value(shape, dtype):
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(shape, generator=g, dtype=dtype), torch.randn(shape, generator=g, dtype=dtype)
    want = (x.double() * y.double()).reshape(shape[0], -1).sum(1) if x.numel() else torch.zeros(shape[0]).double()
    got = dot(x, y, per_slice=True)
    scale = (x.double() * y.double()).abs().sum() + 1
    assert got.dtype == torch.float64
    # float64 sums of float products: a few thousand roundings at most
    assert (got - want).abs().le(1e-13 * scale).all()
    assert (dot(x, y) - want.sum()).abs() <= 1e-13 * scale


def test_slice_does_not_depend_on_stack():
    x = torch.randn(4, 10007)
    whole = dot(x, x, per_slice=True)
    assert all(torch.equal(dot(x[k : k + 1], x[k : k + 1], per_slice=True), whole[k : k + 1]) for k in range(4))


def test_threads():
    x = torch.randn(7, 50001)
    check_threads(lambda: dot(x, x, per_slice=True))


def test_gradient():
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    y = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a, b: dot(a, b, per_slice=True), (x, y))


def test_bad_input():
    with pytest.raises(ValueError, match="dot: x and y need one shape"):
        dot(torch.zeros(2, 3), torch.zeros(3, 2))
    with pytest.raises(TypeError, match="dot: x and y need one dtype"):
        dot(torch.zeros(2, 3), torch.zeros(2, 3).double())

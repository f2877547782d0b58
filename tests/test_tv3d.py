"""recon3d.ops.tv3d: value by hand, sweeps against float64, adjoint of the differences, ends, bounds, threads."""

import math

import pytest
import torch
from laws import check_adjoint, check_close_to_float64, check_threads, guarded

from recon3d.ops import _library, tv3d, tv3d_dual_, tv3d_primal_, tv3d_value

SHAPES = [(1, 1, 1), (1, 5, 7), (3, 1, 4), (4, 6, 1), (3, 61, 53), (7, 16, 33), (0, 3, 3), (2, 0, 3)]
DTYPES = [torch.float32, torch.float64]
FACTORS = (0.4, 1.0, 1.3)


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def test_value_by_hand():
    assert tv3d_value(torch.tensor([[[0.0, 3.0], [4.0, 3.0]]])).item() == 6.0
    assert tv3d_value(torch.tensor([[[0.0]], [[2.0]], [[1.0]]]), (0.5, 1.0, 1.0)).item() == 1.5
    assert tv3d_value(torch.full((3, 4, 5), 7.0)).item() == 0.0


def test_sweeps_by_hand():
    p, x = torch.zeros(3, 1, 1, 2), torch.tensor([[[0.0, 4.0]]])
    tv3d_dual_(p, x, sigma=0.5, limit=1.5)
    assert p[2].flatten().tolist() == [1.5, 0.0] and not p[:2].any()
    xbar = torch.empty_like(x)
    tv3d_primal_(x, xbar, p, torch.zeros_like(x), tau=1.0)
    assert x.flatten().tolist() == [1.5, 2.5] and xbar.flatten().tolist() == [3.0, 1.0]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_close_to_float64(shape, dtype):
    p0, x0, g = randn(3, *shape, dtype=dtype), randn(*shape, seed=1, dtype=dtype), randn(*shape, seed=2, dtype=dtype)

    def dual(op, to):
        p = p0.to(to, copy=True)
        op(p, x0.to(to))
        return p

    own = dual(lambda p, x: tv3d._dual(p, x, 0.3, 0.8, *FACTORS), dtype)
    truth = dual(lambda p, x: tv3d._dual(p, x, 0.3, 0.8, *FACTORS), torch.float64)
    got = dual(lambda p, x: tv3d_dual_(p, x, 0.3, 0.8, FACTORS), dtype)
    check_close_to_float64(got, own, truth, "dual")
    for nonnegative in (False, True):
        results = []
        for op, to in ((tv3d._primal, dtype), (tv3d._primal, torch.float64), (torch.ops.recon3d.tv3d_primal_, dtype)):
            x = x0.to(to, copy=True)
            xbar = torch.full_like(x, math.nan)
            op(x, xbar, p0.to(to), g.to(to), 0.2, *FACTORS, nonnegative)
            results.append((x, xbar))
        for name, a, b, c in zip(("x", "xbar"), results[2], results[0], results[1], strict=True):
            check_close_to_float64(a, b, c, name)
        assert not nonnegative or not (results[2][0] < 0).any()


@pytest.mark.parametrize("shape", [(1, 5, 7), (4, 6, 1), (7, 16, 33)], ids=str)
def test_adjoint_of_the_differences(shape):
    x, p = randn(*shape), randn(3, *shape, seed=1)
    check_adjoint(lambda v: tv3d._diff(v, FACTORS), lambda v: tv3d._adjoint(v, FACTORS), x, p, 1e-14)

    # the kernels' D and D^T: without a bound and without a gradient the sweeps are p = D x and x = -D^T p
    def forward(v):
        q = torch.zeros(3, *shape, dtype=torch.float64)
        tv3d_dual_(q, v, 1.0, 1e30, FACTORS)
        return q

    def adjoint(q):
        out, bar = torch.zeros(shape, dtype=torch.float64), torch.zeros(shape, dtype=torch.float64)
        tv3d_primal_(out, bar, q, torch.zeros_like(out), 1.0, FACTORS, nonnegative=False)
        return -out

    check_adjoint(forward, adjoint, x, p, 1e-14)


def test_dual_stays_in_its_ball_and_is_a_subgradient():
    x, p = randn(5, 9, 8), torch.zeros(3, 5, 9, 8, dtype=torch.float64)
    tv3d_dual_(p, x, 1e9, 0.7, FACTORS)  # a huge step: p points along D x with length 0.7
    assert p.square().sum(0).sqrt().max() <= 0.7 * (1 + 1e-12)
    assert ((p * tv3d._diff(x, FACTORS)).sum() - 0.7 * tv3d_value(x, FACTORS)).abs() <= 1e-9
    assert not p[0, -1].any() and not p[1, :, -1].any() and not p[2, :, :, -1].any()


def test_writes_whole_and_nothing_else():
    (p, check_p), (x, check_x), (bar, check_bar) = (guarded(*s) for s in ((3, 4, 7, 9), (4, 7, 9), (4, 7, 9)))
    p.zero_()
    x.copy_(randn(4, 7, 9))
    tv3d_dual_(p, randn(4, 7, 9).float(), 0.3, 0.5)
    tv3d_primal_(x, bar, p, torch.ones(4, 7, 9), 0.1)
    for check in (check_p, check_x, check_bar):
        check()


def test_threads():
    p0, x0, g = randn(3, 5, 61, 53).float(), randn(5, 61, 53, seed=1).float(), randn(5, 61, 53, seed=2).float()

    def run():
        p, x, bar = p0.clone(), x0.clone(), x0.clone()
        tv3d_dual_(p, bar, 0.3, 0.8, FACTORS)
        tv3d_primal_(x, bar, p, g, 0.2, FACTORS)
        return torch.stack((x, bar, *p))

    check_threads(run)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 1, 4), (4, 6, 1), (3, 5, 19)], ids=str)
def test_triton_interpreted(shape, dtype):
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("a GPU is here: the kernels run compiled")
    from recon3d.kernels import tv3d as kernels

    p0, x0, g = randn(3, *shape, dtype=dtype), randn(*shape, seed=1, dtype=dtype), randn(*shape, seed=2, dtype=dtype)
    (p, check_p), (x, check_x), (bar, check_bar) = (guarded(*s, dtype=dtype) for s in ((3, *shape), shape, shape))
    p.copy_(p0)
    kernels.dual(p, x0, 0.3, 0.8, *FACTORS, block=64)
    own, truth = p0.clone(), p0.double()
    tv3d._dual(own, x0, 0.3, 0.8, *FACTORS)
    tv3d._dual(truth, x0.double(), 0.3, 0.8, *FACTORS)
    check_p()
    check_close_to_float64(p, own, truth, "dual")
    for nonnegative in (False, True):
        x.copy_(x0)
        kernels.primal(x, bar, p0, g, 0.2, *FACTORS, nonnegative, block=64)
        for check in (check_x, check_bar):
            check()
        results = []
        for to in (dtype, torch.float64):
            results.append((x0.to(to, copy=True), torch.empty(shape, dtype=to)))
            tv3d._primal(*results[-1], p0.to(to), g.to(to), 0.2, *FACTORS, nonnegative)
        for name, a, b, c in zip(("x", "xbar"), (x, bar), *results, strict=True):
            check_close_to_float64(a, b, c, name)


def test_opcheck():
    _library.ensure()
    p, x, g = randn(3, 2, 3, 4).float(), randn(2, 3, 4).float(), randn(2, 3, 4, seed=1).float()
    torch.library.opcheck(torch.ops.recon3d.tv3d_dual_.default, (p, x, 0.3, 0.8, *FACTORS))
    torch.library.opcheck(torch.ops.recon3d.tv3d_primal_.default, (x, x.clone(), p, g, 0.3, *FACTORS, True))


def test_bad_input():
    x, p = torch.zeros(2, 3, 4), torch.zeros(3, 2, 3, 4)
    with pytest.raises(ValueError, match="tv3d_dual_: p needs shape"):
        tv3d_dual_(x, x, 1.0, 1.0)
    with pytest.raises(ValueError, match="tv3d_dual_: sigma must be finite and above 0, got 0"):
        tv3d_dual_(p, x, 0.0, 1.0)
    with pytest.raises(ValueError, match="limit must be finite and at least 0"):
        tv3d_dual_(p, x, 1.0, -1.0)
    with pytest.raises(ValueError, match="tv3d_primal_: xbar shares memory"):
        tv3d_primal_(x, x, p, x, 1.0)
    with pytest.raises(ValueError, match="factors need three finite"):
        tv3d_value(x, (1.0, math.inf, 1.0))
    with pytest.raises(TypeError, match="float32 or float64"):
        tv3d_value(x.half())

"""recon3d.ops.tvz: by hand, against an independent ADMM, laws, ends, state in place, kernels against float64."""

import math

import numpy as np
import pytest
import torch
from laws import check_adjoint, check_close_to_float64, check_linear, check_threads, guarded

from recon3d.ops import _library, tvz, tvz_adjoint, tvz_diff, tvz_normal, tvz_update, tvz_update_

SHAPES = [(1, 4), (2, 1), (7,), (3, 61, 53), (9, 1, 4097), (48, 33, 31), (0, 5), (4, 0)]
DTYPES = [torch.float32, torch.float64]


def volumes(shape, count, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=g, dtype=torch.float64).to(dtype) for _ in range(count)]


def numpy_update(x, w, threshold, scale, periodic):
    """The textbook form, slice by slice: shrink, dual, and D^T from the matrix of D."""
    n = len(x)
    d = np.zeros((n, n))
    for k in range(n if periodic else n - 1):
        d[k, k] -= scale
        d[k, (k + 1) % n] += scale
    dx = np.tensordot(d, x, 1)
    z = np.sign(dx + w) * np.maximum(np.abs(dx + w) - threshold, 0)
    w_new = w + dx - z
    return z, w_new, np.tensordot(d.T, z - w_new, 1)


def test_by_hand():
    x = torch.tensor([[0.0], [5.0], [5.5]])
    z, w, g = tvz_update(x, torch.zeros(3, 1), torch.zeros(3, 1), threshold=1.0)
    assert z.flatten().tolist() == [4.0, 0.0, 0.0]
    assert w.flatten().tolist() == [1.0, 0.5, 0.0]
    assert g.flatten().tolist() == [-3.0, 3.5, -0.5]
    z, w, g = tvz_update(x, torch.zeros(3, 1), torch.zeros(3, 1), threshold=1.0, periodic=True)
    assert z.flatten().tolist() == [4.0, 0.0, -4.5]
    assert w.flatten().tolist() == [1.0, 0.5, -1.0]
    assert g.flatten().tolist() == [-3.5 - 3.0, 3.0 + 0.5, -0.5 + 3.5]


@pytest.mark.parametrize("periodic", [False, True])
@pytest.mark.parametrize("shape", [s for s in SHAPES if math.prod(s)], ids=str)
def test_against_numpy(shape, periodic):
    x, w = volumes(shape, 2)
    want = numpy_update(x.numpy(), w.numpy(), 0.4, 1.7, periodic)
    got = tvz_update(x, torch.zeros_like(x), w, 0.4, 1.7, periodic)
    for a, b in zip(got, want, strict=True):
        assert np.abs(a.numpy() - b).max() <= 1e-12


@pytest.mark.parametrize("periodic", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_close_to_float64(shape, dtype, periodic):
    x, w, q = volumes(shape, 3, dtype)
    scale, threshold = 1.7, 0.4
    truth = tvz._update(x.double(), w.double(), threshold, scale, periodic)
    torch_own = tvz._update(x, w, threshold, scale, periodic)
    for name, a, b, c in zip("zwg", tvz_update(x, q, w, threshold, scale, periodic), torch_own, truth, strict=True):
        check_close_to_float64(a, b, c, name)
    for name, op, ref in (
        ("diff", tvz_diff, tvz._diff),
        ("adjoint", tvz_adjoint, tvz._adjoint),
        ("normal", tvz_normal, tvz._normal),
    ):
        check_close_to_float64(op(x, scale, periodic), ref(x, scale, periodic), ref(x.double(), scale, periodic), name)
    want = q.double() + tvz._normal(x.double(), scale, periodic)
    check_close_to_float64(tvz_normal(x, scale, periodic, add_to=q.clone()), q + tvz._normal(x, scale, periodic), want)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 3), (3, 61, 53), (48, 33, 31)], ids=str)
def test_in_place_equals_functional(shape, dtype):
    x, w0 = volumes(shape, 2, dtype)
    (z, check_z), (w, check_w), (g, check_g) = (guarded(*shape, dtype=dtype) for _ in range(3))
    w.copy_(w0)
    tvz_update_(x, z, w, g, 0.4, 1.7)
    for check in (check_z, check_w, check_g):
        check()
    for a, b in zip((z, w, g), tvz_update(x, z, w0, 0.4, 1.7), strict=True):
        assert torch.equal(a, b)
    w_only, g_only = w0.clone(), torch.full_like(g, math.nan)
    tvz_update_(x, None, w_only, g_only, 0.4, 1.7)
    assert torch.equal(w_only, w) and torch.equal(g_only, g)


def test_outputs_are_whole():
    (x,) = volumes((5, 61, 53), 1, torch.float32)
    before = torch.are_deterministic_algorithms_enabled()
    try:
        torch.use_deterministic_algorithms(True)  # fresh memory is filled with NaN
        assert torch.empty(3).isnan().all()
        outputs = [tvz_diff(x), tvz_adjoint(x), tvz_normal(x), *tvz_update(x, x, x, 0.1)]
    finally:
        torch.use_deterministic_algorithms(before)
    assert all(o.isfinite().all() for o in outputs)


@pytest.mark.parametrize("periodic", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_adjoint_and_linear(dtype, periodic):
    x, y = volumes((11, 17, 13), 2, dtype)
    forward, adjoint = (lambda t: tvz_diff(t, 1.3, periodic)), (lambda t: tvz_adjoint(t, 1.3, periodic))
    check_adjoint(forward, adjoint, x, y, 20 * torch.finfo(dtype).eps)
    check_linear(forward, x, y)
    check_linear(adjoint, x, y)
    normal = tvz_normal(x, 1.3**2, periodic)
    assert (normal - adjoint(forward(x))).norm() <= 20 * torch.finfo(dtype).eps * normal.norm()


def test_neumann_does_not_see_the_other_face():
    (x,) = volumes((6, 5), 1)
    y = x.clone()
    y[0] += 100
    assert torch.equal(tvz_update(x, x, x * 0, 0.1)[0][1:], tvz_update(y, x, x * 0, 0.1)[0][1:])
    assert not torch.equal(tvz_update(x, x, x * 0, 0.1, 1.0, True)[0][5], tvz_update(y, x, x * 0, 0.1, 1.0, True)[0][5])


def test_one_slice_has_no_difference():
    x, w = volumes((1, 5, 4), 2)
    for periodic in (False, True):
        z, w_new, g = tvz_update(x, w, w, 0.1, 1.0, periodic)
        assert torch.equal(z + w_new, w) and not g.any()
        assert not tvz_diff(x, 1.0, periodic).any() and not tvz_normal(x, 1.0, periodic).any()


def test_columns_do_not_depend_on_their_block():
    x, w = volumes((9, 3, 4099), 2, torch.float32)
    whole = tvz_update(x, w, w, 0.3)
    part = tvz_update(x[:, 1:2, 100:301].contiguous(), w[:, 1:2, 100:301], w[:, 1:2, 100:301], 0.3)
    for a, b in zip(whole, part, strict=True):
        assert torch.equal(a[:, 1:2, 100:301], b)


def test_non_contiguous():
    x, w = volumes((8, 6, 7), 2)
    xt, wt = x.permute(2, 0, 1), w.permute(2, 0, 1)
    for a, b in zip(tvz_update(xt, wt, wt, 0.3), tvz_update(xt.contiguous(), wt, wt.contiguous(), 0.3), strict=True):
        assert torch.equal(a, b)


def test_threads():
    x, w = volumes((13, 61, 530), 2, torch.float32)
    check_threads(lambda: torch.stack(tvz_update(x, w, w, 0.3)))
    check_threads(lambda: tvz_normal(x))


@pytest.mark.parametrize("periodic", [False, True])
def test_gradients(periodic):
    x, w = (t.requires_grad_() for t in volumes((5, 6), 2))
    check = torch.autograd.gradcheck
    assert check(lambda a, b: tvz_update(a, b.detach(), b, 0.7, 1.3, periodic), (x, w))
    assert check(lambda a: tvz_diff(a, 1.3, periodic), (x,))
    assert check(lambda a: tvz_adjoint(a, 1.3, periodic), (x,))
    assert check(lambda a: tvz_normal(a, 1.3, periodic), (x,))


def test_opcheck():
    _library.ensure()
    x, w = volumes((3, 4), 2, torch.float32)
    ops = torch.ops.recon3d
    torch.library.opcheck(ops.tvz_update.default, (x.requires_grad_(), w, 0.3, 1.0, False))
    torch.library.opcheck(ops.tvz_update_.default, (x.detach(), x.detach() * 0, w, w * 0, 0.3, 1.0, False))
    torch.library.opcheck(ops.tvz_update_.default, (x.detach(), None, w.clone(), w * 0, 0.3, 1.0, True))
    for op in (ops.tvz_diff, ops.tvz_adjoint, ops.tvz_normal):
        torch.library.opcheck(op.default, (x.detach().requires_grad_(), 1.5, False))
    torch.library.opcheck(ops.tvz_add_normal_.default, (w.clone(), x.detach(), 1.5, False))


def test_admm_reaches_the_optimum():
    """Denoising one column: ADMM with this update meets the optimality conditions of 1/2|x-y|^2 + lam |D x|_1."""
    (y,) = volumes((12, 1), 1)
    lam, rho = 0.6, 1.0
    x, z, w, g = y.clone(), y * 0, y * 0, y * 0
    matrix = torch.eye(12, dtype=y.dtype) + rho * tvz_normal(torch.eye(12, dtype=y.dtype))
    for _ in range(2000):
        x = torch.linalg.solve(matrix, y + rho * g)
        tvz_update_(x, z, w, g, lam / rho)
    # y - x = D^T (rho w) with |rho w| <= lam and rho w = lam sign(D x) where D x is not zero
    dual, jump = rho * w, tvz_diff(x)
    assert (y - x - tvz_adjoint(dual)).abs().max() <= 1e-9
    assert dual.abs().max() <= lam + 1e-12
    moving = jump.abs() > 1e-6
    assert moving.any() and not moving.all()
    assert (dual[moving] - lam * jump[moving].sign()).abs().max() <= 1e-9


@pytest.mark.parametrize("periodic", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 5), (2, 9, 7), (9, 61), (5, 3, 11)], ids=str)
def test_triton_interpreted(shape, dtype, periodic):
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("a GPU is here: test_cuda runs the kernels themselves")
    from recon3d.kernels import tvz as kernels

    x, w0 = volumes(shape, 2, dtype)
    for kind, reference in ((0, tvz._diff), (1, tvz._adjoint), (2, tvz._normal)):
        out, check = guarded(*shape, dtype=dtype)
        kernels.stencil(kind, x, out, 1.3, periodic, add=False, block=64)
        check()
        check_close_to_float64(
            out, reference(x, 1.3, periodic), reference(x.double(), 1.3, periodic), f"stencil {kind}"
        )
        out.copy_(w0)
        kernels.stencil(kind, x, out, 1.3, periodic, add=True, block=64)
        check()
        truth = w0.double() + reference(x.double(), 1.3, periodic)
        check_close_to_float64(out, w0 + reference(x, 1.3, periodic), truth, f"add {kind}")
    own, truth = (tvz._update(x.to(t), w0.to(t), 0.4, 1.3, periodic) for t in (dtype, torch.float64))
    for in_place in (False, True):
        (z, *checks), (w, check_w), (g, check_g) = (guarded(*shape, dtype=dtype) for _ in range(3))
        w.copy_(w0)
        kernels.update(x, w if in_place else w0, z, w, g, 0.4, 1.3, periodic, tile=(4, 16))
        for check in (*checks, check_w, check_g):
            check()
        for name, a, b, c in zip("zwg", (z, w, g), own, truth, strict=True):
            check_close_to_float64(a, b, c, name)
    w, g2 = w0.clone(), torch.full_like(g, math.nan)
    kernels.update(x, w, None, w, g2, 0.4, 1.3, periodic, tile=(4, 16))
    assert torch.equal(g2, g)


@pytest.mark.gpu
def test_cuda():
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    for shape in ((48, 61, 53), (3, 256, 256), (1, 5)):
        for dtype in DTYPES:
            x, w = volumes(shape, 2, dtype)
            own, truth = (tvz._update(x.to(t), w.to(t), 0.4, 1.3, False) for t in (dtype, torch.float64))
            gx, gw, gz, gg = x.cuda(), w.cuda(), torch.empty_like(x, device="cuda"), torch.empty_like(x, device="cuda")
            for a, b, c in zip(tvz_update(gx, gx, gw, 0.4, 1.3), own, truth, strict=True):
                check_close_to_float64(a.cpu(), b, c)
            tvz_update_(gx, gz, gw, gg, 0.4, 1.3)
            for a, b, c in zip((gz, gw, gg), own, truth, strict=True):
                check_close_to_float64(a.cpu(), b, c)
            for op, ref in ((tvz_diff, tvz._diff), (tvz_adjoint, tvz._adjoint), (tvz_normal, tvz._normal)):
                check_close_to_float64(op(gx, 1.3).cpu(), ref(x, 1.3, False), ref(x.double(), 1.3, False))


def test_bad_input():
    x = torch.zeros(3, 4)
    with pytest.raises(ValueError, match="tvz_update: threshold must be at least 0, got -1"):
        tvz_update(x, x, x, -1.0)
    with pytest.raises(ValueError, match="tvz_update: w needs the shape"):
        tvz_update(x, x, x[:2], 1.0)
    with pytest.raises(TypeError, match="tvz_update: w needs x's"):
        tvz_update(x, x, x.double(), 1.0)
    with pytest.raises(ValueError, match="tvz_diff: scale must be finite"):
        tvz_diff(x, math.nan)
    with pytest.raises(TypeError, match="float32 or float64"):
        tvz_diff(x.half())
    with pytest.raises(ValueError, match="cannot share memory"):
        tvz_update_(x, x.clone(), x, x.clone(), 1.0)
    with pytest.raises(ValueError, match="must be contiguous"):
        tvz_update_(x, x.clone(), torch.zeros(4, 3).T, x.clone(), 1.0)
    with pytest.raises(ValueError, match="cannot share memory"):
        tvz_normal(x, add_to=x)

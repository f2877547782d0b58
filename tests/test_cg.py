"""recon3d.ops.cg: against direct solutions, per slice and for the volume, breakdown, order, kernel against float64."""

import itertools
import math

import pytest
import torch
from laws import check_close_to_float64, check_threads, guarded

from recon3d.ops import _library, cg, cg_step_, dot

DTYPES = [torch.float32, torch.float64]


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def spd(n, seed=0, low=0.5):
    q = torch.linalg.qr(randn(n, n, seed=seed))[0]
    return (q * torch.linspace(low, 4.0, n, dtype=torch.float64)) @ q.T


@pytest.mark.parametrize("per_slice", [False, True])
@pytest.mark.parametrize("n", [1, 2, 7, 40])
def test_direct_solution(n, per_slice):
    matrix, b, x0 = spd(n), randn(3, n), randn(3, n, seed=1)
    want = torch.linalg.solve(matrix, b.T).T
    for start in (None, x0):
        got = cg.solve(lambda v: v @ matrix, b, start, iterations=80, per_slice=per_slice)
        assert (got - want).norm() <= 1e-10 * want.norm()
    assert torch.equal(x0, randn(3, n, seed=1)), "the start was changed"


def test_exact_after_n_steps_in_one_krylov_process():
    matrix, b = spd(6), randn(1, 6)
    errors = [(cg.solve(lambda v: v @ matrix, b, None, k) @ matrix - b).norm() for k in range(7)]
    assert errors[6] <= 1e-10 * b.norm() < errors[5]


def test_energy_norm_falls_at_every_step():
    # a direction that shares the residual's memory breaks this from the second step on
    matrix, b = spd(50, low=0.1), randn(2, 50)
    want = torch.linalg.solve(matrix, b.T).T
    errors = []
    for k in range(12):
        e = cg.solve(lambda v: v @ matrix, b, None, k) - want
        errors.append(dot(e, e @ matrix).item())
    assert all(b < a for a, b in itertools.pairwise(errors))
    assert errors[-1] < 0.02 * errors[0]


def test_volume_matrix_couples_slices():
    matrix, b = spd(12), randn(3, 4)
    got = cg.solve(lambda v: (matrix @ v.flatten()).reshape(3, 4), b, None, 30)
    assert (matrix @ got.flatten() - b.flatten()).norm() <= 1e-10 * b.norm()


def test_per_slice_does_not_see_neighbours():
    matrices = torch.stack([spd(20, s, 10.0**-s) for s in range(4)]).float()
    b = randn(4, 20, dtype=torch.float32) * torch.tensor([1e-3, 1.0, 1e3, 1.0])[:, None]

    def solve(rows):
        return cg.solve(lambda v: torch.stack([matrices[k] @ v[i] for i, k in enumerate(rows)]), b[rows], None, 5, True)

    stack = solve([0, 1, 2, 3])
    assert all(torch.equal(solve([k])[0], stack[k]) for k in range(4))
    volume = cg.solve(lambda v: torch.stack([matrices[k] @ v[k] for k in range(4)]), b, None, 5, False)
    assert not torch.allclose(volume, stack, rtol=1e-3), "one step length for all should differ from one per slice"


def test_zero_right_hand_side_and_solved_slices():
    matrix = spd(9)
    b = randn(3, 9)
    b[1] = 0
    x = cg.solve(lambda v: v @ matrix, b, None, 60, per_slice=True)  # far past convergence
    assert x.isfinite().all() and not x[1].any()
    assert (x @ matrix - b).norm() <= 1e-10 * b.norm()
    assert not cg.solve(lambda v: v @ matrix, torch.zeros(2, 9, dtype=b.dtype), None, 4).any()


def test_no_curvature_freezes():
    singular = torch.diag(torch.tensor([1.0, 2.0, 0.0]))
    start = torch.tensor([[5.0, 5.0, 5.0]])
    x = cg.solve(lambda v: v @ singular, torch.tensor([[1.0, 1.0, 0.0]]), start, 9)
    assert torch.allclose(x, torch.tensor([[1.0, 0.5, 5.0]])), "the null space keeps the start"
    x = cg.solve(lambda v: 0 * v, torch.ones(2, 3), torch.ones(2, 3), 3, per_slice=True)
    assert torch.equal(x, torch.ones(2, 3))
    x = cg.solve(lambda v: -v, torch.ones(2, 3), None, 3)
    assert not x.any(), "negative curvature: no step"


@pytest.mark.parametrize("per_slice", [False, True])
def test_nan_stays_visible(per_slice):
    b = torch.ones(3, 4)
    b[1, 2] = math.nan
    x = cg.solve(lambda v: 2 * v, b, None, 3, per_slice)
    assert x[1].isnan().any()
    assert x[0].isfinite().all() == per_slice


def test_tolerance_stops_each_slice_on_its_own():
    matrices = torch.stack([spd(40, 1, 3.0), spd(40, 2, 1e-3)])
    b, calls = randn(2, 40), []

    def apply(v):
        calls.append(1)
        return torch.stack([m @ row for m, row in zip(matrices[-len(v) :], v, strict=True)])

    x = cg.solve(apply, b, None, 500, True, tolerance=1e-6)
    assert ((apply(x) - b).norm(dim=1) <= 1.01e-6 * b.norm(dim=1)).all()
    assert len(calls) < 400
    alone = cg.solve(apply, b[1:], None, 500, True, tolerance=1e-6)
    assert torch.equal(alone[0], x[1])


def test_complex_hermitian():
    a = torch.complex(randn(8, 8), randn(8, 8, seed=1))
    matrix = a @ a.mH + torch.eye(8)
    b = torch.complex(randn(2, 8, seed=2), randn(2, 8, seed=3))
    want = torch.linalg.solve(matrix, b.T).T
    got = cg.solve(lambda v: v @ matrix.T, b, None, 60, per_slice=True)
    assert (got - want).norm() <= 1e-10 * want.norm()


@pytest.mark.parametrize("shape", [(1, 1), (5,), (3, 61, 53), (2, 8192), (1, 3, 40003), (0, 4), (3, 0)], ids=str)
@pytest.mark.parametrize("per_slice", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_step_close_to_float64(shape, per_slice, dtype):
    vectors = [randn(*shape, seed=s, dtype=dtype) for s in range(4)]
    vectors[3] = 1.5 * vectors[2] + 0.1 * vectors[3]  # positive curvature
    rz = dot(vectors[1], vectors[1], per_slice)

    def step(op, to):
        x, r, p, q = (v.to(to, copy=True) for v in vectors)
        rz_new = op(x, r, p, q, rz.clone())
        return x, r, p, rz_new

    truth, own, got = step(cg._reference, torch.float64), step(cg._reference, dtype), step(cg_step_, dtype)
    for name, a, b, c in zip(("x", "r", "p"), got, own, truth, strict=False):
        check_close_to_float64(a, b, c, name)
    assert got[3].dtype == torch.float64 and got[3].shape == rz.shape
    # summed in float64, but from a residual of this dtype
    assert (got[3] - truth[3]).abs().le(40 * torch.finfo(dtype).eps * (truth[3].abs() + 1e-300)).all()


def test_step_writes_nothing_else():
    big = torch.full((5, 700), math.nan)
    x, r, p, q = (big[k, 100:600].view(2, 250) for k in range(4))
    for k, t in enumerate((x, r, p, q)):
        t.copy_(randn(2, 250, seed=k))
    q.copy_(2 * p)
    cg_step_(x, r, p, q, dot(r, r))
    assert big[:4, 100:600].isfinite().all()
    assert big[:, :100].isnan().all() and big[:, 600:].isnan().all() and big[4].isnan().all()


@pytest.mark.parametrize("per_slice", [False, True])
def test_threads(per_slice):
    x, r, p = (randn(3, 100, 301, seed=s, dtype=torch.float32) for s in range(3))

    def run():
        vectors = x.clone(), r.clone(), p.clone()
        rz = cg_step_(*vectors, 1.5 * p, dot(r, r, per_slice))
        return torch.cat([v.flatten().double() for v in (*vectors, rz)])

    check_threads(run)


@pytest.mark.parametrize("per_slice", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_triton_interpreted(per_slice, dtype):
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("a GPU is here: test_cuda runs the kernels themselves")
    from recon3d.kernels import cg as kernels

    for frozen in (False, True):
        vectors = [randn(3, 7, 19, seed=s, dtype=dtype) for s in range(4)]
        vectors[3] = 1.5 * vectors[2] + 0.1 * vectors[3]
        if frozen:
            vectors[3][1] *= -1
        rz = dot(vectors[1], vectors[1], per_slice)
        own, truth = [v.clone() for v in vectors], [v.double() for v in vectors]
        outputs = [guarded(3, 7, 19, dtype=dtype) for _ in range(3)]
        for (out, _), v in zip(outputs, vectors, strict=False):
            out.copy_(v)
        rz_new = kernels.step(*(o for o, _ in outputs), vectors[3], rz, chunk=64, block=32)
        own_rz, true_rz = cg._reference(*own, rz.clone()), cg._reference(*truth, rz.clone())
        for (out, check), a, b in zip(outputs, own, truth, strict=False):
            check()
            check_close_to_float64(out, a, b)
        assert rz_new.shape == rz.shape and rz_new.dtype == torch.float64
        assert (rz_new - true_rz).abs().le(40 * torch.finfo(dtype).eps * true_rz).all()
        assert not (frozen and per_slice) or (rz_new[1] == 0 and own_rz[1] == 0)


@pytest.mark.gpu
def test_cuda():
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    for per_slice in (False, True):
        vectors = [randn(5, 61, 530, seed=s, dtype=torch.float32) for s in range(4)]
        vectors[3] = 1.5 * vectors[2] + 0.1 * vectors[3]
        rz = dot(vectors[1], vectors[1], per_slice)
        on_gpu = [v.cuda() for v in vectors]
        own, truth = [v.clone() for v in vectors], [v.double() for v in vectors]
        rz_new = cg_step_(*on_gpu, rz.cuda())
        cg._reference(*own, rz.clone())
        true_rz = cg._reference(*truth, rz.clone())
        for out, a, b in zip(on_gpu, own, truth, strict=True):
            check_close_to_float64(out.cpu(), a, b)
        assert (rz_new.cpu() - true_rz).abs().le(1e-5 * true_rz).all()


def test_opcheck():
    _library.ensure()
    x, r, p = (randn(3, 4, seed=s, dtype=torch.float32) for s in range(3))
    for rz in (dot(r, r), dot(r, r, per_slice=True)):
        torch.library.opcheck(torch.ops.recon3d.cg_step_.default, (x, r, p, 2 * p, rz))


def test_bad_input():
    x, r, p, q = (torch.ones(2, 3) * k for k in range(1, 5))
    rz = dot(r, r)
    with pytest.raises(ValueError, match="cg_step_: p shares memory"):
        cg_step_(x, r, r, q, rz)
    with pytest.raises(ValueError, match=r"cg_step_: rz needs shape \(\) or \[2\]"):
        cg_step_(x, r, p, q, rz.repeat(3))
    with pytest.raises(TypeError, match="rz must be float64"):
        cg_step_(x, r, p, q, rz.float())
    with pytest.raises(ValueError, match="must be contiguous"):
        cg_step_(torch.ones(3, 2).T, r, p, q, rz)
    with pytest.raises(TypeError, match="q needs x's"):
        cg_step_(x, r, p, q.double(), rz)
    with pytest.raises(ValueError, match="cg: iterations must be at least 0, got -1"):
        cg.solve(lambda v: v, x, None, -1)
    with pytest.raises(ValueError, match="the operator's result needs shape"):
        cg.solve(lambda v: v[:1].clone(), x, None, 1)
    with pytest.raises(ValueError, match="cg: x0 needs shape"):
        cg.solve(lambda v: v.clone(), x, x[:1], 1)

"""recon3d.ops.rdp: value by hand, gradient against differences and float64, the parabola above, ends, spacing."""

import math

import pytest
import torch
from laws import check_close_to_float64, check_threads, guarded

from recon3d.ops import _library, rdp, rdp_gradient
from recon3d.ops.rdp import _gradient, _value, pair_weights, slope_and_curvature

SHAPES = [(1, 1, 1), (1, 5, 7), (3, 1, 4), (4, 6, 1), (5, 13, 33), (0, 3, 3), (2, 0, 3)]
DTYPES = [torch.float32, torch.float64]
WEIGHTS = (0.5, 0.8, 1.0)


def activity(*shape, seed=0, dtype=torch.float64):
    """Decades of activity, with zeros."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (10 ** (2 * x)).where(x > -1, 0.0).to(dtype)


def test_value_by_hand():
    x = torch.tensor([[[1.0, 3.0], [0.0, 0.0]], [[1.0, 3.0], [0.0, 4.0]]])
    along_z = 16 / (4 + 2 * 4)
    assert rdp(x, 2.0, 1e-12, "z").item() == pytest.approx(along_z)
    assert rdp(x, 2.0, 1e-12, "z", (4.0, 2.0, 2.0)).item() == pytest.approx(along_z / 2)
    rows = [(1 / 3, 9 / 9), (1 / 3, 1 / 9)]
    columns = [4 / 8, 0, 4 / 8, 16 / 12]
    assert rdp(x, 2.0, 1e-12).item() == pytest.approx(along_z + sum(map(sum, rows)) + sum(columns))
    assert rdp(torch.zeros(3, 4, 5)).item() == 0 == rdp_gradient(torch.zeros(3, 4, 5)).abs().max()
    # homogeneous of degree one
    v = activity(4, 5, 6)
    assert rdp(1e6 * v, 2.0, 1e3).item() == pytest.approx(1e6 * rdp(v, 2.0, 1e-3).item())


@pytest.mark.parametrize("gamma", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("axes", ["z", "zyx"])
def test_gradient_is_the_derivative(gamma, axes):
    x = (activity(3, 4, 5).clamp(max=5) + 0.1).requires_grad_()
    assert torch.autograd.gradcheck(lambda v: rdp(v, gamma, 1e-2, axes, (2.0, 1.0, 0.8)), x, eps=1e-7, rtol=1e-5)
    (found,) = torch.autograd.grad(rdp(x, gamma, 1e-2, axes), x)
    assert torch.equal(found, rdp_gradient(x.detach(), gamma, 1e-2, axes))


@pytest.mark.parametrize("gamma", [1.0, 1.5, 2.0, 20.0])
def test_parabola_lies_above(gamma):
    epsilon = 1e-3
    x = activity(4, 5, 6, seed=1)
    slope, curvature = slope_and_curvature(x, gamma, epsilon, WEIGHTS)
    here = _value(x, gamma, epsilon, *WEIGHTS)
    for seed in range(200):
        size = 10.0 ** (seed % 7 - 4)
        v = (x + size * torch.randn(x.shape, generator=torch.Generator().manual_seed(seed), dtype=x.dtype)).clamp(min=0)
        if seed % 5 == 0:
            v = activity(4, 5, 6, seed=seed + 2)
        above = here + (slope * (v - x) + curvature / 2 * (v - x) ** 2).sum()
        assert _value(v, gamma, epsilon, *WEIGHTS) <= above + 1e-9 * (above.abs() + here)


@pytest.mark.parametrize("gamma", [1.0, 2.0, 7.0])
def test_parabola_of_a_pair_lies_above_everywhere(gamma):
    grid = torch.tensor([0.0, *torch.logspace(-4, 3, 28).tolist()], dtype=torch.float64)
    a, b = (t.reshape(-1) for t in torch.meshgrid(grid, grid, indexing="ij"))

    def pair(a, b):
        return (a - b) ** 2 / (a + b + gamma * (a - b).abs() + 1e-3)

    x = torch.stack((a, b))[:, :, None]  # [2, pairs, 1]: tied along z alone
    slope, curvature = (t.squeeze(-1)[..., None] for t in slope_and_curvature(x, gamma, 1e-3, (1.0, 0.0, 0.0)))
    here = pair(a, b)[:, None]
    da, db = a[None] - a[:, None], b[None] - b[:, None]  # from pair i to pair j
    above = here + slope[0] * da + slope[1] * db + (curvature[0] * da**2 + curvature[1] * db**2) / 2
    assert (pair(a, b)[None] <= above + 1e-9 * (1 + above.abs())).all()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("weights", [WEIGHTS, (0.5, 0.0, 0.0)], ids=["3d", "z"])
def test_close_to_float64(shape, dtype, weights):
    x = activity(*shape, dtype=dtype)
    own, truth = _gradient(x, 2.0, 1e-3, *weights), _gradient(x.double(), 2.0, 1e-3, *weights)
    _library.ensure()
    check_close_to_float64(torch.ops.recon3d.rdp_gradient(x, 2.0, 1e-3, *weights), own, truth)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 1, 4), (4, 6, 1), (3, 5, 19)], ids=str)
@pytest.mark.parametrize("weights", [WEIGHTS, (0.5, 0.0, 0.0)], ids=["3d", "z"])
def test_triton_interpreted(shape, dtype, weights):
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("a GPU is here: the kernels run compiled")
    from recon3d.kernels import rdp as kernels

    x = activity(*shape, dtype=dtype)
    out, check = guarded(*shape, dtype=dtype)
    kernels.gradient(x, out, 2.0, 1e-3, weights, block=64)
    check()
    check_close_to_float64(out, _gradient(x, 2.0, 1e-3, *weights), _gradient(x.double(), 2.0, 1e-3, *weights))


def test_threads_and_memory():
    x = activity(7, 31, 30).float()
    check_threads(lambda: rdp_gradient(x))
    big, check = guarded(4, 7, 9)
    big.copy_(activity(4, 7, 9))
    assert rdp_gradient(big).isfinite().all()
    check()


@pytest.mark.parametrize("activity_unit", [1e-3, 1.0, 1e9])
def test_finite_at_every_activity(activity_unit):
    x = (activity(4, 5, 6) * activity_unit).float()
    for epsilon in (1e-6, 1e-3 * activity_unit):
        assert rdp_gradient(x, 2.0, epsilon).isfinite().all()
        assert math.isfinite(rdp(x, 2.0, epsilon).item())


def test_opcheck():
    _library.ensure()
    x = activity(3, 4, 5)
    torch.library.opcheck(torch.ops.recon3d.rdp.default, (x.requires_grad_(), 2.0, 1e-3, *WEIGHTS))
    torch.library.opcheck(torch.ops.recon3d.rdp_gradient.default, (activity(3, 4, 5), 2.0, 1e-3, *WEIGHTS))


def test_bad_input():
    x = torch.ones(2, 3, 4)
    for call in (rdp, rdp_gradient):
        with pytest.raises(ValueError, match=rf"{call.__name__}: a volume \[z, y, x\] is needed"):
            call(x[0])
        with pytest.raises(ValueError, match="gamma must be finite and at least 0, got -1"):
            call(x, -1.0)
        with pytest.raises(ValueError, match="epsilon must be finite and above 0, got 0"):
            call(x, 2.0, 0.0)
        with pytest.raises(ValueError, match="axes must be 'z' or 'zyx', got 'xy'"):
            call(x, axes="xy")
        with pytest.raises(ValueError, match="three positive lengths"):
            call(x, spacing_mm=(1.0, 0.0, 1.0))
        with pytest.raises(TypeError, match="float32 or float64"):
            call(x.half())
    assert pair_weights("", "zyx", (4.0, 2.0, 1.0)) == (0.25, 0.5, 1.0)
    assert pair_weights("", "z", (4.0, 2.0, 1.0)) == (0.25, 0.0, 0.0)

"""The CT operator, its norm, weights, subsets and the simulator."""

import math

import numpy as np
import pytest
import torch
from laws import check_adjoint, check_batch_independent, check_linear

from recon3d.geometry import FanBeam, GeometryWarning, ParallelBeam, VolumeGrid, equiangular
from recon3d.operators import (
    CTOperator,
    GaussianNoise,
    LinearOperator,
    PoissonNoise,
    Space,
    estimate_noise,
    simulate_ct,
)

GRID = VolumeGrid((3, 19, 23), (4.0, 1.5, 1.2))
PARALLEL = ParallelBeam(equiangular(11), 31, 1.3, 0.4)
FAN = FanBeam(equiangular(13, 2 * math.pi), 41, 2.1, 0.4, source_to_axis_mm=120.0, source_to_detector_mm=220.0)


@pytest.fixture(params=["parallel", "fan", "shear"])
def operator(request):
    if request.param == "fan":
        return CTOperator(FAN, GRID)
    return CTOperator(PARALLEL, GRID, "shear" if request.param == "shear" else "joseph")


def _random(shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def test_laws(operator):
    x, y = _random(operator.domain.shape), _random(operator.range.shape, 1)
    check_adjoint(operator, operator.adjoint, x, y)
    check_linear(operator, x, _random(operator.domain.shape, 2))
    check_batch_independent(operator, x)
    assert tuple(operator(x).shape) == operator.range.shape


def test_gradient_is_the_adjoint(operator):
    x = _random(operator.domain.shape).requires_grad_()
    y = _random(operator.range.shape, 1)
    (operator(x) * y).sum().backward()
    assert torch.allclose(x.grad, operator.adjoint(y), rtol=0, atol=1e-5 * float(x.grad.abs().max()))


def _dense(operator):
    n = math.prod(operator.domain.shape)
    eye = torch.eye(n, dtype=torch.float64).reshape(n, *operator.domain.shape)
    return torch.stack([operator(e) for e in eye]).reshape(n, -1).T


@pytest.mark.parametrize("weighted", [False, True])
def test_norm_is_the_largest_eigenvalue(weighted):
    small = CTOperator(ParallelBeam(equiangular(5), 11, 1.0), VolumeGrid((2, 7, 7), (1.0, 1.0, 1.0)))
    matrix = _dense(small).numpy()
    weights = None
    if weighted:
        weights = _random(small.range.shape, 3).abs() + 0.1
        matrix = np.sqrt(weights.double().numpy().reshape(-1, 1)) * matrix
    top = np.linalg.svd(matrix, compute_uv=False)[0] ** 2
    assert 0.99 * top <= small.norm(weights) <= 1.0001 * top


def test_norm_of_nothing_is_zero():
    class Zero(LinearOperator):
        domain = range = Space((2, 3, 3), torch.float32, "1")
        coupling = "slice"

        def forward(self, x):
            return torch.zeros_like(x)

        adjoint = forward

    assert Zero().norm() == 0.0


def test_subsets_make_up_the_whole(operator):
    x = _random(operator.domain.shape)
    whole = operator(x)
    seen = []
    for part, views in operator.subsets(4):
        assert torch.equal(part(x), whole[:, views])
        seen += views.tolist()
    assert sorted(seen) == list(range(operator.geometry.n_views))
    with pytest.raises(ValueError, match="subsets possible"):
        operator.subsets(operator.geometry.n_views + 1)


def test_truncation_warns():
    with pytest.warns(GeometryWarning, match="truncation"):
        CTOperator(ParallelBeam(equiangular(3), 5, 1.0), GRID)


def test_weights_are_inverse_variances():
    y = torch.full((1, 50, 200), 2.0)
    model = PoissonNoise(1e4)
    draws = model.simulate(y, seed=1)
    # 10 000 draws: the sample variance scatters by 1.4 %; delta-method bias is 1/N, 0.1 %
    assert float(draws.var()) == pytest.approx(1 / float(model.weights(y).mean()), rel=0.06)
    assert float(draws.mean()) == pytest.approx(2.0, abs=3e-3)
    gauss = GaussianNoise(0.3)
    assert float(gauss.simulate(y, 2).std()) == pytest.approx(0.3, rel=0.03)
    assert float(gauss.weights(y)) == pytest.approx(1 / 0.09)
    assert torch.equal(model.simulate(y, 5), model.simulate(y, 5))
    assert not torch.equal(model.simulate(y, 5), model.simulate(y, 6))


def test_no_photon_is_finite():
    assert PoissonNoise(10.0).simulate(torch.full((1, 2, 2), 50.0), 0).isfinite().all()


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan])
def test_bad_noise(bad):
    with pytest.raises(ValueError, match="PoissonNoise"):
        PoissonNoise(bad)
    with pytest.raises(ValueError, match="GaussianNoise"):
        GaussianNoise(bad)


@pytest.mark.parametrize("geometry", [PARALLEL, FAN], ids=["parallel", "fan"])
def test_simulation_is_near_the_operator_but_not_it(geometry):
    yy, xx = torch.meshgrid(torch.linspace(-1, 1, 19), torch.linspace(-1, 1, 23), indexing="ij")
    volume = 0.02 * torch.exp(-4 * (xx**2 + yy**2)).expand(GRID.shape).contiguous()
    fine = simulate_ct(volume, GRID, geometry, oversample=2)
    coarse = CTOperator(geometry, GRID)(volume)
    gap = float((fine - coarse).norm() / coarse.norm())
    assert 1e-5 < gap < 0.03
    exact = simulate_ct(volume, GRID, geometry, oversample=1)
    assert torch.allclose(exact, coarse)
    with pytest.raises(ValueError, match="the volume is"):
        simulate_ct(volume[:2], GRID, geometry)


@pytest.mark.parametrize("sigma", [1e-3, 0.05])
def test_noise_level_is_read_off_the_sinogram(sigma):
    u = torch.linspace(-1, 1, 400)
    smooth = torch.sqrt((1 - u**2).clamp(min=0)).expand(1, 60, 400)
    assert estimate_noise(smooth + sigma * _random(smooth.shape)).sigma == pytest.approx(sigma, rel=0.05)
    assert estimate_noise(torch.zeros(1, 2, 5)).sigma > 0
    with pytest.raises(ValueError, match="three detector cells"):
        estimate_noise(torch.zeros(1, 2, 2))

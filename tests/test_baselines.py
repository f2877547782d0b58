"""FBP, SIRT and 3D TV: monotone, right at the optimum, better than one another where they should be."""

import itertools
import math

import numpy as np
import pytest
import torch
from laws import check_threads
from toys import MatrixOperator

from recon3d.baselines import fbp, sirt, tune, tv3d, tv3d_objective
from recon3d.geometry import ParallelBeam, VolumeGrid
from recon3d.operators.ct import CTOperator
from recon3d.operators.noise import PoissonNoise
from recon3d.testing.phantoms import line_integrals, rasterise, shepp_logan

MU = 0.0193


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def toy(shape=(4, 5, 6), rays=18, seed=0):
    """A few non-negative rays through a blocky volume, with noise."""
    matrix = randn(rays, shape[1] * shape[2], seed=seed).clamp(min=0)
    truth = torch.zeros(shape, dtype=torch.float64)
    truth[1:, 1:4, 2:5] = 1.0
    truth[2:, 2:, 3:] += 0.5
    operator = MatrixOperator(matrix, shape)
    y = operator(truth)
    return operator, y + 0.05 * randn(*y.shape, seed=seed + 1), truth


def head(n=64, slices=3, views=20, photons=5e4):
    """Shepp-Logan head of exact, noisy line integrals; the slices differ in size."""
    pixel = 200.0 / n
    grid = VolumeGrid((slices, n, n), (2 * pixel, pixel, pixel))
    scan = ParallelBeam(np.arange(views) * math.pi / views, int(1.5 * n), pixel)
    heads = [shepp_logan(95.0 - 3 * k, MU) for k in range(slices)]
    truth = torch.tensor(np.stack([rasterise(h, (n, n), (pixel, pixel), 4) for h in heads]), dtype=torch.float32)
    clean = torch.tensor(np.stack([line_integrals(h, scan) for h in heads]), dtype=torch.float32)
    noise = PoissonNoise(photons)
    y = noise.simulate(clean, seed=0)
    return CTOperator(scan, grid), y, noise.weights(y), truth


def rmse(x, truth):
    return float((x - truth).square().mean().sqrt())


@pytest.fixture(scope="module")
def scan():
    return head()


def differences(shape, factors):
    """The three difference matrices, voxel by voxel."""
    index = np.arange(math.prod(shape)).reshape(shape)
    out = []
    for axis, f in enumerate(factors):
        d = np.zeros((index.size, index.size))
        here = np.take(index, range(shape[axis] - 1), axis).ravel()
        there = np.take(index, range(1, shape[axis]), axis).ravel()
        d[here, here], d[here, there] = -f, f
        out.append(d)
    return np.concatenate(out)


def admm_tv(operator, y, weights, limit, factors, iterations=2000):
    """The same minimum by another method, dense and in numpy: splits D x and x >= 0 off a direct solve."""
    shape = operator.domain.shape
    a = np.kron(np.eye(shape[0]), operator.matrix.numpy())
    w = np.broadcast_to(weights.numpy(), y.shape).ravel()
    k = np.concatenate([differences(shape, factors), np.eye(a.shape[1])])
    norm = operator.norm(None if (w == 1).all() else weights)
    rho = 0.02
    inverse = np.linalg.inv(a.T @ (w[:, None] * a) / norm + rho * k.T @ k)
    b = a.T @ (w * y.numpy().ravel()) / norm
    n = a.shape[1]
    z = u = np.zeros(len(k))
    for _ in range(iterations):
        x = inverse @ (b + rho * k.T @ (z - u))
        v = k @ x + u
        length = np.sqrt((v[: 3 * n].reshape(3, n) ** 2).sum(0))
        shrink = np.maximum(1 - limit / rho / np.maximum(length, 1e-300), 0)
        z = np.concatenate([(v[: 3 * n].reshape(3, n) * shrink).ravel(), np.maximum(v[3 * n :], 0)])
        u = v - z
    return torch.from_numpy(np.maximum(x, 0).reshape(shape))


def test_fbp_is_the_direct_inverse(scan):
    operator, y, _, _ = scan
    seen = []
    x = fbp(y, operator, callback=lambda k, v: seen.append(k))
    assert torch.equal(x, operator.pinv(y)) and seen == [1]
    assert (x < 0).any() and not (fbp(y, operator, nonnegative=True) < 0).any()


@pytest.mark.parametrize("weighted", [False, True])
def test_sirt_lowers_its_residual_at_every_step(weighted):
    operator, y, _ = toy()
    weights = randn(*y.shape, seed=5).abs() + 0.1 if weighted else None
    row = (1 if weights is None else weights) / operator(torch.ones(operator.domain.shape, dtype=torch.float64))
    for relaxation in (0.5, 1.9):
        residuals = []

        def note(_, x, residuals=residuals):
            residuals.append(float((row * (y - operator(x)).square()).sum()))

        sirt(y, operator, 40, weights, relaxation=relaxation, callback=note)
        assert len(residuals) == 40
        assert all(b <= a * (1 + 1e-12) for a, b in itertools.pairwise(residuals))
        assert residuals[-1] < 0.5 * residuals[0]


def test_sirt_solves_a_consistent_system():
    _, _, truth = toy()
    operator = MatrixOperator(torch.eye(30, dtype=torch.float64) + randn(30, 30).clamp(min=0) / 30, truth.shape)
    x = sirt(operator(truth), operator, 150, nonnegative=False)
    assert (x - truth).norm() <= 1e-6 * truth.norm()


def test_sirt_keeps_to_zero_and_leaves_unseen_voxels():
    operator, y, _ = toy()
    operator.matrix[:, 7] = 0  # no ray meets this pixel
    operator.matrix[3] = 0  # this ray meets nothing
    start = torch.full(operator.domain.shape, 0.3, dtype=torch.float64)
    x = sirt(y - 5, operator, 20, x0=start)
    assert x.isfinite().all() and (x >= 0).all()
    assert (x.flatten(1)[:, 7] == 0.3).all() and (start == 0.3).all()


def test_sirt_stops():
    operator, y, _ = toy()
    seen = []
    sirt(y, operator, 50, callback=lambda k, x: seen.append(k) or k == 7)
    assert seen == list(range(1, 8))
    seen.clear()
    sirt(y, operator, 500, tolerance=1e-3, callback=lambda k, x: seen.append(k) and None)
    assert 10 <= len(seen) < 500 and len(seen) % 10 == 0


@pytest.mark.parametrize(("weighted", "spacing_mm"), [(False, (1.0, 1.0, 1.0)), (True, (2.5, 1.0, 0.8))], ids=str)
def test_tv_reaches_the_minimum(weighted, spacing_mm):
    operator, y, _ = toy()
    weights = randn(*y.shape, seed=5).abs() + 0.1 if weighted else None
    strength = 2e-3
    factors = (spacing_mm[2] / spacing_mm[0], spacing_mm[2] / spacing_mm[1], 1.0)
    settings = {"weights": weights, "value_scale": 1.0, "spacing_mm": spacing_mm}
    best = admm_tv(operator, y, torch.ones(1) if weights is None else weights, strength, factors)
    least = tv3d_objective(best, y, operator, strength, **settings)
    trace = []

    def note(k, v):
        if k in (10, 100, 200):
            trace.append(tv3d_objective(v, y, operator, strength, **settings))

    x = tv3d(y, operator, strength, 2000, tolerance=None, callback=note, **settings)
    assert (x >= 0).all()
    assert tv3d_objective(x, y, operator, strength, **settings) <= least * (1 + 1e-4)
    assert (x - best).norm() <= 2e-2 * best.norm()
    assert trace[0] > trace[1] > trace[2] >= least * (1 - 1e-6)
    assert trace[2] <= 1.01 * least, "200 iterations should be within one per cent of the minimum"


def test_tv_objective_by_hand():
    operator = MatrixOperator(torch.eye(2, dtype=torch.float64), (1, 1, 2))
    x, y = torch.tensor([[[1.0, 4.0]]]).double(), torch.tensor([[[1.0, 2.0]]]).double()
    assert tv3d_objective(x, y, operator, 0.5, value_scale=2.0) == pytest.approx(0.5 * 4 / 1.02 + 0.5 * 2 * 3)


def test_tv_stops():
    operator, y, _ = toy()
    seen = []
    tv3d(y, operator, 1e-3, 50, callback=lambda k, x: seen.append(k) or k == 4)
    assert seen == [1, 2, 3, 4]
    seen.clear()
    tv3d(y, operator, 1e-3, 500, tolerance=1e-3, callback=lambda k, x: seen.append(k) and None)
    assert 10 <= len(seen) < 500 and len(seen) % 10 == 0


def test_tv_beats_sirt_beats_fbp(scan):
    operator, y, weights, truth = scan
    errors = [rmse(fbp(y, operator), truth), rmse(sirt(y, operator, 40), truth)]
    errors.append(rmse(tv3d(y, operator, 7e-4, 100), truth))
    errors.append(rmse(tv3d(y, operator, 7e-4, 100, weights), truth))
    assert errors[1] < errors[0] and errors[2] < 0.85 * errors[1] and errors[3] < 0.85 * errors[1], errors


def test_threads(scan):
    operator, y, weights, _ = scan
    check_threads(lambda: tv3d(y, operator, 1e-4, 4, weights))
    check_threads(lambda: sirt(y, operator, 2, weights))


def test_tune_finds_the_peak():
    tried = []

    def run(strength):
        tried.append(strength)
        return torch.tensor([math.log10(strength)])

    for peak in (-4.6, -3.9, -2.3, -9.0, 0.0):
        tried.clear()
        tuned = tune(run, torch.zeros(1), score=lambda x, peak=peak: -abs(float(x) - peak))
        grid = [-5 + k / 4 for k in range(13)]
        assert math.log10(tuned.strength) == pytest.approx(min(grid, key=lambda v: abs(v - peak)))
        assert len(tried) == len(set(tried)) == len(tuned.scores) <= 10
        assert float(tuned.volume) == pytest.approx(math.log10(tuned.strength))
    reference = torch.tensor([0.0, 1.0])
    tuned = tune(lambda s: reference + s, reference, [1e-3, 1e-2, 1e-1])
    assert tuned.strength == 1e-3 and dict(tuned.scores)[1e-3] == pytest.approx(60.0, abs=1e-3)


def test_bad_input():
    operator, y, _ = toy()
    with pytest.raises(ValueError, match="tv3d: strength must be positive, got 0"):
        tv3d(y, operator, 0.0)
    with pytest.raises(ValueError, match="tv3d: iterations must be at least 1"):
        tv3d(y, operator, 1e-3, 0)
    with pytest.raises(ValueError, match="tv3d: value_scale must be positive"):
        tv3d(y, operator, value_scale=-1.0)
    with pytest.raises(ValueError, match="sirt: relaxation must lie between 0 and 2, got 2"):
        sirt(y, operator, relaxation=2.0)
    with pytest.raises(ValueError, match="sirt: tolerance must be positive"):
        sirt(y, operator, tolerance=0.0)
    with pytest.raises(ValueError, match="tune: strengths must be positive and ascending"):
        tune(lambda s: y, y, [1e-3, 1e-4])
    with pytest.raises(ValueError, match=r"tune: strength 0\.000316228 gave the score nan"):
        tune(lambda s: y * math.nan, y)


def test_a_deep_image_prior_stops_at_the_noise():
    from recon3d.baselines import dip
    from recon3d.operators.image import BlockMean, SameImage

    rows, columns = torch.meshgrid(torch.arange(48), torch.arange(40), indexing="ij")
    truth = (100 + 80 * (((rows - 20) ** 2 + (columns - 18) ** 2) < 150).float()).expand(2, 48, 40)
    noise = 25 * torch.randn(2, 48, 40, generator=torch.Generator().manual_seed(0))
    y = truth + noise
    before = torch.random.get_rng_state()
    x = dip(y, SameImage((2, 48, 40)), 25.0, iterations=120, width=8)
    assert torch.equal(torch.random.get_rng_state(), before)  # nothing global is drawn
    assert float((x - truth).std()) < 0.6 * 25
    # the misfit is the noise's, not less
    assert 0.85 * 25 < float((x - y).std()) < 1.3 * 25
    assert torch.equal(x, dip(y, SameImage((2, 48, 40)), 25.0, iterations=120, width=8))
    # a slice does not depend on its neighbours but by its number
    coarse = BlockMean((2, 48, 40), (1, 4, 4))
    x = dip(coarse(truth), coarse, None, iterations=60, width=8)
    assert x.shape == truth.shape and float((coarse(x) - coarse(truth)).std()) < 10


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"iterations": 0}, "must be positive"),
        ({"sigma": -1.0}, "must be positive"),
        ({"shape": (2, 8, 9)}, "operator's range"),
        ({"block": (2, 2, 2)}, "couples slices"),
    ],
)
def test_a_deep_image_prior_refuses(settings, sentence):
    from recon3d.baselines import dip
    from recon3d.operators.image import BlockMean

    settings = dict(settings)
    block = settings.pop("block", (1, 2, 2))
    shape = settings.pop("shape", (2, 4, 4) if block[0] == 1 else (1, 4, 4))
    with pytest.raises(ValueError, match=sentence):
        dip(torch.zeros(shape), BlockMean((2, 8, 8), block), **settings)

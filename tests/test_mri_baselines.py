"""Classical MRI: zero-filled, CG-SENSE and compressed sensing against closed forms and on a measured brain."""

import math

import pytest
import torch

from recon3d import baselines
from recon3d.baselines.cs import _analyse, _gradient, _gradient_adjoint, _shrink_wavelets, _synthesise
from recon3d.geometry import Trajectory
from recon3d.operators import (
    CartesianMRI,
    CTOperator,
    GaussianNoise,
    NonCartesianMRI,
    espirit,
    gridded_calibration,
    masks,
    noise_covariance,
    outer_noise,
    prewhiten,
    simulate_mri,
)
from recon3d.testing.phantoms import coil_maps, rasterise, shepp_logan, smooth_phase

N, COILS, SLICES = 48, 6, 2


def _random(*shape, seed=0, dtype=torch.complex64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def _gap(a, b):
    return float((a - b).norm() / b.norm())


def _psnr(x, truth):
    error = (x.abs() - truth.abs()).square().mean()
    return 10 * math.log10(float(truth.abs().max()) ** 2 / float(error))


@pytest.fixture(scope="module")
def scan():
    """(true volume, operator of 2.5-fold undersampling, k-space)."""
    image = torch.from_numpy(rasterise(shepp_logan(0.45 * N), (N, N), (1.0, 1.0), 3)).float()
    volume = torch.stack([image, 0.5 * image.flip(0)])
    phase = smooth_phase((SLICES, N, N), 2)
    operator = CartesianMRI(masks.equispaced(N, 2.5, 0.16, 1), coil_maps(COILS, (SLICES, N, N)))
    return volume * phase, operator, simulate_mri(volume, operator, phase, GaussianNoise(0.01), 3)


def test_zero_filled(scan):
    truth, operator, y = scan
    seen = []
    x = baselines.zero_filled(y, operator, callback=lambda k, v: seen.append((k, v.shape)))
    assert torch.equal(x, operator.pinv(y)) and seen == [(1, truth.shape)]
    rss = baselines.zero_filled(y, operator, combine="rss")
    assert rss.dtype == torch.float32 and rss.shape == truth.shape
    full = CartesianMRI(torch.ones(N), operator.maps)
    assert _gap(baselines.zero_filled(full(truth), full, combine="rss"), truth.abs()) < 1e-5
    with pytest.raises(ValueError, match="'sense' or 'rss'"):
        baselines.zero_filled(y, operator, combine="sum")
    with pytest.raises(TypeError, match="needs an MRI operator"):
        baselines.zero_filled(y, CTOperator.__new__(CTOperator), combine="rss")


def test_cg_sense_is_least_squares():
    operator = CartesianMRI(masks.random_lines(10, 2, 0.2, 1), coil_maps(5, (2, 9, 10)).to(torch.complex128))
    y = _random(*operator.range.shape, seed=4, dtype=torch.complex128)
    rho = 0.05
    x = baselines.cg_sense(y, operator, 200, rho, tolerance=1e-12)
    eye = torch.eye(90, dtype=torch.complex128).reshape(-1, 1, 9, 10)
    for k in range(2):
        part = operator.slab(k, k + 1)
        matrix = part(eye).reshape(90, -1).T
        system = matrix.mH @ matrix + rho * operator.norm() * torch.eye(90)
        want = torch.linalg.solve(system, matrix.mH @ y[k].flatten()).reshape(9, 10)
        assert _gap(x[k], want) < 1e-8
        alone = baselines.cg_sense(y[k : k + 1], part, 7)
        assert torch.equal(alone[0], baselines.cg_sense(y, operator, 7)[k])


def test_cg_sense_starts_where_it_is_told(scan):
    _, operator, y = scan
    first = baselines.cg_sense(y, operator, 8)
    assert _gap(baselines.cg_sense(y, operator, 1, tolerance=0.5, x0=first), first) == 0
    weights = torch.full((1, 1, 1, 1), 4.0)
    assert _gap(baselines.cg_sense(y, operator, 8, weights=weights), first) < 1e-5


def test_callbacks_watch_and_stop(scan):
    _, operator, y = scan
    for run in (baselines.cg_sense, baselines.cs):
        seen = []
        run(y, operator, iterations=9, callback=lambda k, x, seen=seen: seen.append(k) or k == 3)
        assert seen == [1, 2, 3]


def test_gradient_has_its_transpose():
    for factors in ((0.0, 1.3, 1.0), (0.4, 1.3, 1.0)):
        x = _random(3, 5, 7, dtype=torch.complex128)
        d = _gradient(x, factors)
        p = _random(*d.shape, seed=1, dtype=torch.complex128)
        gap = torch.vdot(p.flatten(), d.flatten()) - torch.vdot(_gradient_adjoint(p, factors).flatten(), x.flatten())
        assert abs(gap.item()) < 1e-12
        assert float(_gradient(torch.ones_like(x), factors).abs().max()) == 0


@pytest.mark.parametrize("n", [8, 14, 64])
def test_wavelets_are_orthonormal(n):
    x = _random(3, n, dtype=torch.complex128)
    c = _analyse(x, -1)
    assert float(c.norm()) == pytest.approx(float(x.norm()))
    assert _gap(_synthesise(c, -1), x) < 1e-10
    # four vanishing moments: cubics leave no detail away from the periodic border
    cubic = (torch.arange(64, dtype=torch.float64) / 64) ** 3
    assert float(_analyse(cubic[None], -1)[0, 32:61].abs().max()) < 1e-9
    image = _random(2, 21, 30, seed=3)
    assert _gap(_shrink_wavelets(image, 0.0, 3), image) < 1e-5
    assert float(_shrink_wavelets(image, 0.5, 3).norm()) < float(image.norm())


def test_cs_reaches_the_minimum(scan):
    truth, operator, y = scan
    strength, scale = 1e-3, 1.0
    x = baselines.cs(y, operator, strength, 150, value_scale=scale, tolerance=None)

    def value(v):
        return baselines.cs_objective(v, y, operator, strength, scale)

    best = value(x)
    assert value(baselines.cs(y, operator, strength, value_scale=scale)) < 1.01 * best
    for seed in range(3):  # no direction leads down: the minimum is one
        step = 0.02 * float(x.abs().max()) * _random(*x.shape, seed=seed)
        assert value(x + step) > best and value(x - step) > best
    assert value(x + 0.02 * (truth - x)) > best - 1e-6 * abs(best)


def test_cs_beats_cg_sense_and_cg_sense_beats_zero_filling(scan):
    truth, operator, y = scan
    zero = _psnr(baselines.zero_filled(y, operator), truth)
    cg = max(_psnr(baselines.cg_sense(y, operator, n), truth) for n in (4, 8, 12))
    tv = baselines.tune_cs(y, operator, truth, iterations=20)
    wavelet = baselines.tune_cs(y, operator, truth, iterations=20, regulariser="wavelet")
    assert zero + 2 < cg
    assert _psnr(wavelet.volume, truth) > cg + 0.5
    assert _psnr(tv.volume, truth) > cg + 3
    assert tv.volume.is_complex() and len(tv.scores) >= 3
    assert dict(tv.scores)[tv.strength] == pytest.approx(_psnr(tv.volume, truth), abs=0.1)


def test_tv_along_z_uses_neighbouring_slices(scan):
    truth, operator, _ = scan
    same = simulate_mri(truth[:1].repeat(2, 1, 1), operator, noise=GaussianNoise(0.05), seed=5)
    flat = baselines.cs(same, operator, 3e-3, value_scale=1.0)
    joined = baselines.cs(same, operator, 3e-3, value_scale=1.0, along_z=True, spacing_mm=(1.0, 1.0, 1.0))
    want = truth[:1].repeat(2, 1, 1)
    assert _psnr(joined, want) > _psnr(flat, want)
    assert _gap(joined[0], joined[1]) < 0.9 * _gap(flat[0], flat[1])


def test_cs_of_nothing_is_nothing(scan):
    _, operator, y = scan
    assert float(baselines.cs(torch.zeros_like(y), operator).abs().max()) == 0
    assert float(baselines.cg_sense(torch.zeros_like(y), operator).abs().max()) == 0


def test_measured_brain(data):
    h5py = pytest.importorskip("h5py")
    with h5py.File(data("raw_mr/brain_cartesian_vfa_13ch.h5")) as file:
        kspace = torch.from_numpy(file["kspace"][:1])
    kspace = prewhiten(kspace, noise_covariance(outer_noise(kspace))).kspace
    mask = masks.equispaced(224, 4, 0.08)
    truth = CartesianMRI(torch.ones(224), espirit(kspace)).pinv(kspace)
    operator = CartesianMRI(mask, espirit(kspace * mask))
    y = kspace * mask
    zero = _psnr(baselines.zero_filled(y, operator), truth)
    cg = _psnr(baselines.cg_sense(y, operator, 8), truth)
    tv = _psnr(baselines.cs(y, operator, 3e-3, 15), truth)
    assert zero + 5 < cg and cg + 4 < tv


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("cg_sense", {"iterations": 0}, "iterations"),
        ("cg_sense", {"tikhonov": -1.0}, "tikhonov"),
        ("cg_sense", {"tolerance": 1.0}, "tolerance"),
        ("cs", {"strength": 0.0}, "strength must be positive"),
        ("cs", {"iterations": 0}, "iterations"),
        ("cs", {"cg_iterations": 0}, "cg_iterations"),
        ("cs", {"levels": 0}, "levels"),
        ("cs", {"regulariser": "l2"}, "'tv' or 'wavelet'"),
        ("cs", {"value_scale": math.nan}, "value_scale"),
        ("cs", {"tolerance": 0.0}, "tolerance"),
    ],
)
def test_bad_arguments(scan, name, options, words):
    _, operator, y = scan
    with pytest.raises(ValueError, match=words):
        getattr(baselines, name)(y, operator, **options)


def test_measured_spokes(data):
    """34 golden-angle spokes against 204 (of six flip angles): tuned TV above CG-SENSE above gridding."""
    h5py = pytest.importorskip("h5py")
    with h5py.File(data("raw_mr/brain_radial_vfa_5ch.h5")) as file:
        kspace = torch.from_numpy(file["kspace"][:])  # [flip, coil, spoke, sample]
        points = torch.from_numpy(file["trajectory"][:]).flip(-1)  # (x, y) in the file
    every = Trajectory(points, (256, 256), "cycles")
    y = kspace.movedim(1, 0).reshape(1, 5, -1)
    maps = espirit(gridded_calibration(y, every), shape=(256, 256))
    whole = NonCartesianMRI(every, maps)
    truth = baselines.cg_sense(y, whole, 20)
    gridded = whole.pinv(y)
    inside = truth.abs() > 0.2 * truth.abs().max()
    assert float((gridded[inside] / truth[inside]).abs().median()) == pytest.approx(1, abs=0.1)
    part = NonCartesianMRI(Trajectory(points[2], (256, 256), "cycles"), maps)
    y = kspace[2].reshape(1, 5, -1)

    def score(x):
        size = x.abs() * float((x.abs() * truth.abs()).sum() / x.abs().square().sum())  # another contrast
        return _psnr(size, truth)

    density = part.density()
    seen = {}
    baselines.cg_sense(y, part, 12, callback=lambda k, x: seen.update({k: score(x)}))
    tv = baselines.cs(y, part, 2e-3, 12, weights=density)
    assert score(part.pinv(y)) + 3 < max(seen.values()) < score(tv) - 0.5

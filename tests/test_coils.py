"""Coils: noise made white, virtual coils, ESPIRiT against the truth, against sigpy and on a measured brain."""

import math

import pytest
import torch
from laws import check_batch_independent

from recon3d.geometry.mri import kooshball, radial
from recon3d.operators import (
    CartesianMRI,
    GaussianNoise,
    NonCartesianMRI,
    apply_coils,
    calibration_region,
    centred_fft,
    centred_ifft,
    compress_coils,
    espirit,
    gridded_calibration,
    masks,
    noise_covariance,
    outer_noise,
    prewhiten,
    simulate_mri,
)
from recon3d.testing.phantoms import coil_maps, rasterise, shepp_logan, smooth_phase

N, COILS, SLICES = 96, 8, 3


def _random(*shape, seed=0, dtype=torch.complex64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def _gap(a, b):
    return float((a - b).norm() / b.norm())


@pytest.fixture(scope="module")
def head():
    """(magnitude [z, y, x], maps, k-space with a little noise)."""
    image = torch.from_numpy(rasterise(shepp_logan(0.45 * N), (N, N), (1.0, 1.0), 3)).float()
    image = torch.stack([image, 0.7 * image.flip(1), image.roll(4, 0)])
    maps = coil_maps(COILS, (SLICES, N, N))
    operator = CartesianMRI(torch.ones(N), maps)
    kspace = simulate_mri(image, operator, smooth_phase((SLICES, N, N), 3), GaussianNoise(2e-3), 1)
    return image, maps, kspace


def _mixed(coils=5, samples=20_000, seed=2):
    mixing = _random(coils, coils, seed=seed) + 2 * torch.eye(coils)
    return mixing, mixing @ _random(coils, samples, seed=seed + 1)


def test_noise_covariance_and_whitening():
    mixing, noise = _mixed()
    covariance = noise_covariance(noise)
    assert _gap(covariance, (mixing @ mixing.mH).to(torch.complex128)) < 0.05
    white = prewhiten(noise, covariance)
    after = noise_covariance(white.kspace)
    assert _gap(after, 2 * white.sigma**2 * torch.eye(5, dtype=after.dtype)) < 1e-5
    # the level stays: half the mean of the coils' variances
    assert white.sigma == pytest.approx(math.sqrt(float(covariance.diagonal().real.mean()) / 2))
    parts = torch.view_as_real(white.kspace)
    assert float(parts[..., 0].std()) == pytest.approx(white.sigma, rel=0.01)
    assert float(parts[..., 1].std()) == pytest.approx(white.sigma, rel=0.01)


def test_whitening_carries_maps_along():
    _, noise = _mixed()
    covariance = noise_covariance(noise)
    maps, x = _random(2, 5, 6, 7, seed=7), _random(2, 6, 7, seed=8)
    kspace = CartesianMRI(torch.ones(7), maps)(x)
    white = prewhiten(kspace, covariance)
    assert _gap(CartesianMRI(torch.ones(7), apply_coils(white.matrix, maps))(x), white.kspace) < 1e-5


def test_outer_noise_skips_what_was_not_sampled():
    kspace = 0.5 * _random(2, 3, 64, 64, seed=1)
    kspace[:, :, 28:36, 28:36] += 100
    kspace[:, :, :, 1::2] = 0
    found = outer_noise(kspace, share=0.2)
    assert bool((found != 0).all()) and abs(found.shape[1] - 0.2 * 2 * 64 * 32) < 64
    assert float(found.abs().square().mean()) == pytest.approx(0.25, rel=0.1)
    held = outer_noise(kspace, torch.arange(64) % 4 == 0, share=0.2)
    assert held.shape[1] < 0.6 * found.shape[1]


def test_outer_noise_of_spokes():
    trajectory = radial(20, 64, (32, 32))
    y = 0.5 * _random(2, 3, trajectory.n_samples, seed=1)
    y[..., trajectory.points.square().sum(1) < 1] += 50
    found = outer_noise(y, trajectory, share=0.2)
    assert found.shape[0] == 3 and float(found.abs().square().mean()) == pytest.approx(0.25, rel=0.1)
    assert torch.equal(outer_noise(y[0], trajectory), outer_noise(y[:1], trajectory))
    with pytest.raises(ValueError, match="1280 samples"):
        outer_noise(y[..., 1:], trajectory)


def test_measured_corners_and_image_border_agree_on_the_noise(data):
    h5py = pytest.importorskip("h5py")
    with h5py.File(data("raw_mr/brain_cartesian_vfa_13ch.h5")) as file:
        kspace = torch.from_numpy(file["kspace"][:])
    corners = noise_covariance(outer_noise(kspace)).diagonal().real.sqrt()
    tighter = noise_covariance(outer_noise(kspace, share=0.01)).diagonal().real.sqrt()
    assert _gap(tighter, corners) < 0.03


@pytest.mark.parametrize("shape", [(4, 12, 9, 7), (12, 500), (4, 12, 60)])
def test_compression(shape):
    axis = 0 if len(shape) == 2 else 1
    basis = _random(12, 3, seed=4)
    kspace = apply_coils(basis, _random(*shape[:axis], 3, *shape[axis + 1 :], seed=5))
    squeezed = compress_coils(kspace, 3)
    assert squeezed.energy == pytest.approx(1, abs=1e-6)
    assert squeezed.kspace.shape == (*shape[:axis], 3, *shape[axis + 1 :])
    assert squeezed.kspace.norm() == pytest.approx(kspace.norm(), rel=1e-5)
    assert _gap(squeezed.matrix @ squeezed.matrix.mH, torch.eye(3, dtype=torch.complex128)) < 1e-12
    assert compress_coils(kspace, 1).energy < 0.95
    assert compress_coils(kspace, 12).energy == pytest.approx(1)
    assert _gap(apply_coils(squeezed.matrix, kspace), squeezed.kspace) < 1e-6


def test_espirit_finds_the_maps(head):
    image, maps, kspace = head
    found = espirit(kspace)
    inside = image > 0.05
    agreement = (found.conj() * maps).sum(1).abs()[inside]
    assert float(agreement.min()) > 0.999 and float(agreement.mean()) > 0.9999
    power = found.abs().square().sum(1)
    assert bool((((power - 1).abs() < 1e-4) | (power == 0)).all())
    corner = power[:, : N // 10, : N // 10]
    assert float(corner.mean()) < 0.05


def test_espirit_phase_is_smooth_along_every_axis(head):
    image, _, kspace = head
    same = kspace[:1].repeat(3, 1, 1, 1)  # alike slices get alike maps, phase included
    found = espirit(same)
    assert torch.equal(found[0], found[2])
    found = espirit(kspace)
    x = CartesianMRI(torch.ones(N), found).pinv(kspace)
    inside = image > 0.05
    both = inside[:, 1:] & inside[:, :-1]
    step = (x[:, 1:] * x[:, :-1].conj()).angle()[both].abs()
    assert float(step.quantile(0.99)) < 0.3


def test_espirit_of_undersampled_and_of_calibration_data(head):
    image, maps, kspace = head
    inside = image > 0.05
    mask = masks.equispaced(N, 4, 0.2)
    region = calibration_region(kspace * mask)
    assert region.shape == (SLICES, COILS, 24, round(0.2 * N))
    for found in (espirit(kspace * mask), espirit(region, shape=(N, N))):
        assert float((found.conj() * maps).sum(1).abs()[inside].min()) > 0.998
    assert _gap(espirit(region, shape=(N, N)), espirit(kspace * mask)) < 1e-6


@pytest.mark.parametrize("per_slice", [False, True])
def test_espirit_of_spokes(head, per_slice):
    image, maps, _ = head
    spokes = (
        [radial(31, 2 * N, (N, N), start_rad=a) for a in (0.0, 0.1, 0.2)] if per_slice else radial(31, 2 * N, (N, N))
    )
    operator = NonCartesianMRI(spokes, maps)
    y = simulate_mri(image, operator, smooth_phase((SLICES, N, N), 3), GaussianNoise(2e-3), 1)
    region = gridded_calibration(y, spokes)
    assert region.shape == (SLICES, COILS, 24, 24)
    agreement = (espirit(region, shape=(N, N)).conj() * maps).sum(1).abs()[image > 0.05]
    assert float(agreement.quantile(0.01)) > 0.999


def test_espirit_of_a_trajectory_in_space():
    shape = (16, 32, 32)
    maps = coil_maps(6, shape, rings=2).movedim(1, 0).contiguous()
    image = torch.from_numpy(rasterise(shepp_logan(14.0), shape[1:], (1.0, 1.0), 3)).float()
    image = image * torch.hann_window(18)[1:-1, None, None]
    trajectory = kooshball(500, 32, shape)
    y = simulate_mri(image, NonCartesianMRI(trajectory, maps))
    region = gridded_calibration(y, trajectory, size=14)
    assert region.shape == (16, 6, 14, 14)
    found = espirit(region, shape=shape[1:]).movedim(1, 0)
    agreement = (found.conj() * maps).sum(0).abs()[image > 0.15]
    assert float(agreement.quantile(0.05)) > 0.99


def test_gridded_calibration_is_the_centre_of_kspace(head):
    image, maps, kspace = head
    operator = NonCartesianMRI(radial(150, 2 * N, (N, N)), maps)
    y = simulate_mri(image, operator, smooth_phase((SLICES, N, N), 3))
    want = calibration_region(kspace, 16)
    got = gridded_calibration(y, operator.trajectories, 16, 30)
    scale = torch.vdot(got.flatten(), want.flatten()) / got.norm() ** 2
    assert _gap(scale * got, want) < 0.1
    assert gridded_calibration(y[..., : 17 * 2 * N], radial(17, 2 * N, (N, N))).shape[-1] in (14, 16, 18)
    with pytest.raises(ValueError, match="too sparse in the centre"):
        gridded_calibration(y[..., : 2 * N], radial(1, 2 * N, (N, N)))
    with pytest.raises(ValueError, match=r"\[slice, coil, sample\]"):
        gridded_calibration(y[..., 1:], operator.trajectories)


def test_espirit_slices_do_not_see_their_neighbours(head):
    _, _, kspace = head
    reference_free = kspace[:1].repeat(2, 1, 1, 1)
    check_batch_independent(espirit, reference_free)


@pytest.mark.slow  # sigpy compiles on first use
def test_espirit_agrees_with_sigpy(head):
    app = pytest.importorskip("sigpy.mri.app", exc_type=ImportError)
    _, _, kspace = head
    small = kspace[:1, :4, 24:72, 24:72]
    theirs = torch.from_numpy(app.EspiritCalib(small[0].numpy(), crop=0.8, max_iter=40, show_pbar=False).run())
    ours = espirit(small, iterations=20)[0]
    both = (theirs.abs().sum(0) > 0) & (ours.abs().sum(0) > 0)
    assert float(both.float().mean()) > 0.5
    assert float((ours.conj() * theirs).sum(0).abs()[both].quantile(0.01)) > 0.9999


def test_espirit_of_a_measured_brain(data):
    h5py = pytest.importorskip("h5py")
    with h5py.File(data("raw_mr/brain_cartesian_vfa_13ch.h5")) as file:
        kspace, rss = torch.from_numpy(file["kspace"][:1]), torch.from_numpy(file["reconstruction_rss"][:1])
    assert _gap(centred_ifft(kspace).abs().square().sum(1).sqrt(), rss) < 2e-3  # stored rounded
    white = prewhiten(kspace, noise_covariance(outer_noise(kspace)))
    squeezed = compress_coils(white.kspace, 8)
    assert squeezed.energy > 0.9
    maps = espirit(squeezed.kspace)
    inside = rss > 0.1 * rss.max()
    assert bool((maps.abs().square().sum(1)[inside] > 0.99).all())
    operator = CartesianMRI(torch.ones(224), maps)
    sense = operator.pinv(squeezed.kspace)
    coils = centred_ifft(squeezed.kspace).abs().square().sum(1).sqrt()
    both = torch.stack([sense.abs()[inside], coils[inside]])
    assert float(torch.corrcoef(both)[0, 1]) > 0.995


def test_calibration_regions():
    kspace = torch.ones(2, 2, 40, 40, dtype=torch.complex64)
    assert calibration_region(kspace, (16, 99)).shape[-2:] == (16, 40)
    assert calibration_region(kspace * 0).shape[-2:] == (0, 0)
    line = masks.equispaced(40, 4, 0.2)[:, None]
    assert calibration_region(kspace * line).shape[-2:] == (9, 24)  # a drawn line adjoins the centre
    kspace[:, :, 20 + 5, 20 - 7] = 0
    assert calibration_region(kspace).shape[-2:] == (24, 13)
    with pytest.raises(ValueError, match="calibration_region"):
        calibration_region(kspace[0])


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda k: espirit(k * (torch.arange(40) % 2)), ValueError, "fully sampled centre of k-space is"),
        (lambda k: espirit(k * 0), ValueError, "0 x 0 points, kernels of 6 need 8 x 8; give coil maps"),
        (lambda k: espirit(k.real), TypeError, "must be complex"),
        (lambda k: espirit(k[0]), ValueError, r"\[slice, coil, ky, kx\]"),
        (lambda k: espirit(k, kernel=1), ValueError, "kernel"),
        (lambda k: espirit(k, threshold=0), ValueError, "threshold"),
        (lambda k: espirit(k, crop=1), ValueError, "crop"),
        (lambda k: espirit(k, iterations=0), ValueError, "iterations"),
        (lambda k: noise_covariance(k[0, :, 0, :10]), ValueError, "10 samples for 3 coils are too few"),
        (lambda k: noise_covariance(k.real), TypeError, "must be complex"),
        (lambda k: noise_covariance(k * math.nan), ValueError, "NaN"),
        (lambda k: prewhiten(k, torch.eye(2)), ValueError, r"3 coils, the covariance is \(2, 2\)"),
        (lambda k: prewhiten(k, torch.diag(torch.tensor([1.0, 0.0, 1.0]))), ValueError, "not positive definite"),
        (lambda k: compress_coils(k, 4), ValueError, "1 to 3 virtual coils"),
        (lambda k: compress_coils(k[0, 0, 0], 1), ValueError, "coils: expected"),
        (lambda k: outer_noise(k[0]), ValueError, "outer_noise"),
        (lambda k: outer_noise(k, share=0), ValueError, "share"),
        (lambda k: outer_noise(k * 0), ValueError, "no sampled point"),
    ],
)
def test_bad_input_is_one_sentence(call, error, words):
    with pytest.raises(error, match=words) as caught:
        call(torch.ones(2, 3, 40, 40, dtype=torch.complex64))
    assert "\n" not in str(caught.value)


def test_maps_of_the_phantom():
    maps = coil_maps(6, (3, 20, 21), rings=2)
    assert maps.shape == (3, 6, 20, 21)
    assert float((maps.abs().square().sum(1) - 1).abs().max()) < 1e-5
    energy = centred_fft(maps).abs().square()
    assert float(energy[:, :, 8:13, 8:13].sum() / energy.sum()) > 0.9  # smooth
    with pytest.raises(ValueError, match="coil_maps"):
        coil_maps(2, (1, 8, 8), radius=0.5)
    phase = smooth_phase((2, 8, 9), 1)
    assert phase.shape == (2, 8, 9) and float((phase.abs() - 1).abs().max()) < 1e-6


def test_simulated_kspace_has_the_stated_noise():
    maps, mask = coil_maps(4, (2, 32, 32)), masks.equispaced(32, 2)
    operator = CartesianMRI(mask, maps)
    volume = torch.ones(2, 32, 32)
    clean = simulate_mri(volume, operator)
    noisy = simulate_mri(volume, operator, noise=GaussianNoise(0.3), seed=4)
    assert torch.equal(noisy, simulate_mri(volume, operator, noise=GaussianNoise(0.3), seed=4))
    parts = torch.view_as_real((noisy - clean)[..., mask != 0])
    assert float(parts[..., 0].std()) == pytest.approx(0.3, rel=0.03)
    assert float(parts[..., 1].std()) == pytest.approx(0.3, rel=0.03)
    assert not bool((noisy[..., mask == 0] != 0).any())
    with pytest.raises(ValueError, match="the volume is"):
        simulate_mri(volume[:1], operator)
    with pytest.raises(ValueError, match="the phase is"):
        simulate_mri(volume, operator, phase=smooth_phase((1, 32, 32)))

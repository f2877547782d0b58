"""Complex priors: two real images under one noise level, and the complex Gaussian whose denoiser is exact."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from recon3d.priors import ModelCard, Prior, load_prior
from recon3d.priors.complex import RealImaginaryPrior, TwoChannelPrior, complex_prior
from recon3d.priors.gaussian import ComplexGaussianPrior, GaussianPrior, power_law
from recon3d.priors.network_prior import NetworkPrior
from recon3d.priors.networks import UNet, UNetConfig


def _network(channels: int, offset: float = 0.0, scale: float = 1.0) -> NetworkPrior:
    torch.manual_seed(7)
    net = UNet(
        UNetConfig(in_channels=channels, out_channels=channels, channels=(8, 16), blocks=1, embedding=16, group_size=8)
    )
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.05 * torch.randn_like(p))
    card = ModelCard(name="tiny", channels=channels, offset=offset, scale=scale, sigma_data=0.5)
    return NetworkPrior(net, card, precision="float32")


def _state(*shape: int, dtype: torch.dtype = torch.complex64) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(1))


def test_two_channels_are_the_real_and_the_imaginary_part():
    real = _network(2)
    prior = TwoChannelPrior(real, 40.0)
    u = 40 * _state(3, 1, 10, 12)
    want = 40 * real.denoise(torch.cat([u.real, u.imag], dim=1) / 40, 0.2)
    got = prior.denoise(u, 8.0)
    assert isinstance(prior, Prior) and prior.card is real.card and (prior.offset, prior.scale) == (0.0, 40.0)
    assert got.dtype == u.dtype and got.shape == u.shape
    assert torch.allclose(got, torch.complex(want[:, :1], want[:, 1:]), atol=1e-4)


@pytest.mark.parametrize(("offset", "scale"), [(0.0, 1.0), (0.0193, 0.0193)])
def test_one_channel_sees_the_parts_as_slices(offset, scale):
    """Network value = part / scale whatever units the network's own card has: 0 stays 0."""
    real = _network(1, offset, scale)
    prior = RealImaginaryPrior(real, 40.0)
    u = 40 * _state(2, 1, 10, 12)
    parts = [(real.denoise(p / 40 * scale + offset, 0.2 * scale) - offset) / scale * 40 for p in (u.real, u.imag)]
    got = prior.denoise(u, 8.0)
    assert torch.allclose(got, torch.complex(*parts), atol=1e-3)


@pytest.mark.parametrize("channels", [1, 2])
def test_scale_is_a_unit(channels):
    real, u = _network(channels), _state(2, 1, 9, 14)
    one, other = complex_prior(real, 1.0), complex_prior(real, 2.0**9)
    assert torch.equal(other.denoise(2**9 * u, 2**9 * 0.3), 2**9 * one.denoise(u, 0.3))


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_a_slice_does_not_depend_on_its_batch_or_thread(channels, dtype):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        prior, u = complex_prior(_network(channels), 3.0), _state(5, 1, 11, 13, dtype=dtype)
        whole = prior.denoise(u, 0.4)
        assert whole.dtype == dtype
        torch.set_num_threads(1)
        with ThreadPoolExecutor(3, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            single = list(pool.map(lambda i: prior.denoise(u[i : i + 1], 0.4), range(5)))
        assert torch.equal(torch.cat(single), whole)
    finally:
        torch.set_num_threads(threads)


def test_which_adapter():
    assert isinstance(complex_prior(_network(1), 2.0), RealImaginaryPrior)
    two = complex_prior(_network(2), 2.0)
    assert isinstance(two, TwoChannelPrior) and complex_prior(two, 5.0) is two
    gaussian = ComplexGaussianPrior(torch.ones(4, 4))
    assert complex_prior(gaussian, 5.0) is gaussian
    assert complex_prior(_network(2), 2.0).denoise(_state(0, 1, 8, 8), 1.0).shape == (0, 1, 8, 8)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: TwoChannelPrior(_network(1), 1.0), "must have 2 channels, got 1"),
        (lambda: RealImaginaryPrior(_network(2), 1.0), "must have 1 channel, got 2"),
        (lambda: complex_prior(_network(3), 1.0), "has 3 channels"),
        (lambda: complex_prior(_network(2), 0.0), "scale must be positive"),
        (lambda: complex_prior(_network(2), math.nan), "scale must be positive"),
        (lambda: complex_prior(_network(2), 1.0).denoise(torch.zeros(1, 1, 8, 8), 1.0), "complex .*got float32"),
        (lambda: complex_prior(_network(2), 1.0).denoise(_state(1, 2, 8, 8), 1.0), r"got complex64 \(1, 2, 8, 8\)"),
        (lambda: complex_prior(_network(2), 1.0).denoise(_state(8, 8), 1.0), r"got complex64 \(8, 8\)"),
        (lambda: complex_prior(_network(2), 1.0).denoise(_state(1, 1, 8, 8), -1.0), "sigma must be positive"),
        (lambda: ComplexGaussianPrior(torch.ones(4, 4)).denoise(torch.zeros(1, 1, 4, 4), 1.0), "must be complex"),
    ],
)
def test_rejects(call, says):
    with pytest.raises(ValueError, match=says):
        call()


# ---------------------------------------------------------------- the exact one


def test_complex_gaussian_is_the_conditional_mean():
    """Against the textbook formula over flattened pixels, with a complex mean."""
    shape, sigma = (6, 5), 0.7
    mean = _state(*shape, dtype=torch.complex128)
    prior = ComplexGaussianPrior(power_law(shape, 1.3), mean, scale=4.0)
    u = _state(3, 1, *shape, dtype=torch.complex128)
    c = prior.covariance()
    gain = c @ torch.linalg.inv(c + sigma**2 * torch.eye(30, dtype=torch.float64))
    want = mean.flatten() + (u - mean).reshape(3, 30) @ gain.T.to(u.dtype)
    assert torch.allclose(prior.denoise(u, sigma).reshape(3, 30), want, atol=1e-12)
    assert (prior.offset, prior.scale) == (0.0, 4.0) and isinstance(prior, Prior)


def test_complex_gaussian_samples_have_its_moments():
    prior = ComplexGaussianPrior(power_law((4, 4), 0.8), 2 - 1j)
    x = (prior.sample(20000, 3) - (2 - 1j)).reshape(-1, 16)
    c = prior.covariance()
    for got, want in ((x.real.T @ x.real, c), (x.imag.T @ x.imag, c), (x.real.T @ x.imag, 0 * c)):
        assert (got / len(x) - want).abs().max() < 0.04 * c.abs().max()
    assert torch.equal(prior.sample(2, 3), prior.sample(2, 3))


def test_a_real_gaussian_on_both_parts_is_the_complex_one():
    spectrum, u = power_law((8, 8), 1.0), _state(2, 1, 8, 8, dtype=torch.complex128)
    parts = RealImaginaryPrior(GaussianPrior(spectrum), 1.0)
    assert torch.allclose(parts.denoise(u, 0.5), ComplexGaussianPrior(spectrum).denoise(u, 0.5), atol=1e-12)


def test_the_packaged_ct_prior_takes_complex_slices():
    u = 100 * _state(1, 1, 24, 16)
    d = complex_prior(load_prior("ct"), 100.0).denoise(u, 100.0)
    assert d.is_complex() and bool(torch.isfinite(torch.view_as_real(d)).all())

"""recon3d.noise: unit variance, correlation in millimetres, slabs, levels."""

import math

import pytest
import torch

from recon3d import noise
from recon3d.ops import philox_normal


def test_independent_is_the_plain_draw():
    key = noise.independent(3, seed=5, level=2)
    assert torch.equal(key.draw((7, 9)), philox_normal(5, 2, 3, (7, 9)))
    assert torch.equal(key.at(4).draw((7, 9)), philox_normal(5, 4, 3, (7, 9)))
    later = noise.independent(2, seed=5, level=2, first_slice=1)
    assert torch.equal(later.draw((7, 9)), key.draw((7, 9))[1:])
    assert not torch.equal(key.at(2, stream=1).draw((7, 9)), key.draw((7, 9)))


KEYS = {
    "independent": lambda n: noise.independent(n, seed=1),
    "iscs": lambda n: noise.iscs(n, seed=1),
    "iscs_mm": lambda n: noise.iscs_mm(n, 0.8, 5.0, seed=1),
    "iscs_mm_coarse": lambda n: noise.iscs_mm(n, 5.0, 4.0, seed=1),
}


@pytest.mark.parametrize("make", KEYS.values(), ids=KEYS)
@pytest.mark.parametrize("n", [0, 1, 2, 40])
def test_variance_is_one(make, n):
    key = make(n)
    assert key.n_slices == n
    # the stated coefficients are float32
    assert (noise.correlation(key).diagonal() - 1).abs().lt(2e-7).all()


@pytest.mark.parametrize("make", KEYS.values(), ids=KEYS)
def test_drawn_correlation(make):
    key = make(12)
    z = key.draw((256, 256), torch.float64).flatten(1)
    assert (z @ z.T / z.shape[1] - noise.correlation(key)).abs().max() < 6 / 256


def test_published_iscs():
    key = noise.iscs(9, seed=3, level=1)
    ends = philox_normal(3, 1, 2, (64, 64))
    z = key.draw((64, 64))
    assert torch.equal(z[0], ends[0]) and torch.equal(z[-1], ends[1])
    for k in range(9):
        slerp = math.cos(k / 8 * math.pi / 2) * ends[0] + math.sin(k / 8 * math.pi / 2) * ends[1]
        assert (z[k] - slerp).abs().max() < 1e-5
    want = torch.cos(math.pi / 16 * (torch.arange(9)[:, None] - torch.arange(9)).abs().double())
    assert (noise.correlation(key) - want).abs().max() < 1e-6


@pytest.mark.parametrize("spacing", [0.25, 0.5, 1.0])
def test_length_is_in_mm(spacing):
    # the position-averaged correlation at correlation_mm is one half, and 0 from 2.55 times that on, whatever
    # the spacing
    n = int(800 / spacing)
    r = noise.correlation(noise.iscs_mm(n, spacing, 6.0))
    lag = lambda mm: r.diagonal(round(mm / spacing)).mean().item()  # noqa: E731
    assert abs(lag(6.0) - 0.5) < 0.01
    assert abs(lag(3.0) - ((1 - 0.1967) * math.cos(0.618) + math.sin(0.618) / math.pi)) < 0.01
    assert lag(15.5) == 0.0
    assert lag(1.0) > 0.97


def test_number_of_slices_does_not_matter():
    short, long = noise.iscs_mm(20, 1.0, 4.0, seed=2), noise.iscs_mm(90, 1.0, 4.0, seed=2)
    assert torch.equal(long.slab(0, 20).draw((5, 5)), short.draw((5, 5)))
    assert torch.equal(noise.iscs_mm(30, 1.0, 4.0, seed=2, first_slice=60).draw((5, 5)), long.slab(60, 90).draw((5, 5)))


def test_bad_input():
    with pytest.raises(ValueError, match="iscs_mm: spacing_mm must be"):
        noise.iscs_mm(3, 0.0, 1.0)
    with pytest.raises(ValueError, match="iscs_mm: correlation_mm must be"):
        noise.iscs_mm(3, 1.0, math.nan)
    with pytest.raises(ValueError, match="independent: the number of slices"):
        noise.independent(-1)
    with pytest.raises(ValueError, match=r"NoiseKey: anchors must be in"):
        noise.independent(2, first_slice=2**32 - 1)
    with pytest.raises(ValueError, match="NoiseKey: level must be"):
        noise.independent(2, level=-1)
    with pytest.raises(ValueError, match="slab"):
        noise.independent(2).slab(1, 3)
    with pytest.raises(TypeError, match="NoiseKey: anchors must be int64"):
        noise.NoiseKey(0, 0, torch.zeros(1, 2), torch.zeros(1, 2))
    with pytest.raises(ValueError, match="NoiseKey: anchors and coefficients"):
        noise.NoiseKey(0, 0, torch.zeros(1, 3, dtype=torch.int64), torch.zeros(1, 3))

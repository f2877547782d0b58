"""Cartesian sampling patterns: exact counts, full centres, distances, seeds, and what is refused."""

import math

import numpy as np
import pytest
import torch

from recon3d.operators import masks

LINES = [masks.equispaced, masks.random_lines]


@pytest.mark.parametrize("make", LINES)
@pytest.mark.parametrize("n", [7, 64, 225, 320])
@pytest.mark.parametrize("factor", [1, 2.5, 4])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_lines_have_the_exact_count_and_a_full_centre(make, n, factor, seed):
    mask = make(n, factor, 0.08, seed)
    assert mask.dtype == torch.float32 and set(mask.tolist()) <= {0.0, 1.0}
    assert int(mask.sum()) == max(1, round(n / factor))
    assert masks.acceleration(mask) == n / int(mask.sum())
    width = round(0.08 * n)
    assert bool(mask[n // 2 - width // 2 : n // 2 - width // 2 + width].all())
    assert torch.equal(mask, make(n, factor, 0.08, seed))


@pytest.mark.parametrize("make", LINES)
def test_seeds_differ(make):
    assert len({tuple(make(320, 8, 0.04, seed).tolist()) for seed in range(6)}) >= 4


def test_equispaced_lines_are_equispaced():
    gaps = np.diff(np.flatnonzero(masks.equispaced(320, 8, 0.04, 3).numpy()[:150]))
    assert gaps.max() - gaps.min() <= 1


@pytest.mark.parametrize("density", [0.0, 2.0])
@pytest.mark.parametrize("shape", [(60, 61), (48, 90)])
def test_poisson_disc(shape, density):
    mask = masks.poisson_disc(shape, 5, 8, 4, density)
    ny, nx = shape
    assert int(mask.sum()) == round(ny * nx / 5)
    assert bool(mask[ny // 2 - 4 : ny // 2 + 4, nx // 2 - 4 : nx // 2 + 4].all())
    assert torch.equal(mask, masks.poisson_disc(shape, 5, 8, 4, density))
    assert not torch.equal(mask, masks.poisson_disc(shape, 5, 8, 5, density))
    points = np.argwhere(mask.numpy())
    away = np.abs(points - [ny // 2, nx // 2]).max(1) > 6
    d = np.hypot(*(points[away][:, None] - points[away][None]).transpose(2, 0, 1))
    np.fill_diagonal(d, np.inf)
    # even draws of the same number would have half of their nearest neighbours within 1.05 points
    assert np.median(d.min(1)) >= (1.4 if density else 1.9)
    if density:
        inner = mask[ny // 4 : -ny // 4, nx // 4 : -nx // 4].mean()
        assert float(inner) > 1.3 * float(mask.mean())


def test_poisson_disc_without_corners():
    mask = masks.poisson_disc((50, 50), 4, 6, corners=False)
    assert int(mask.sum()) == 625
    assert not bool(mask[0, 0]) and not bool(mask[:4, :4].any())


def test_partial_fourier():
    full = torch.ones(64, 48)
    assert masks.partial_fourier(full) == (1.0, 1.0)
    assert masks.partial_fourier(masks.equispaced(320, 8, 0.04, 2)) == (1.0, 1.0)
    assert masks.partial_fourier(masks.poisson_disc((64, 64), 6, 8)) == (1.0, 1.0)
    part = full.clone()
    part[:16] = 0
    assert masks.partial_fourier(part) == (0.75, 1.0)
    assert masks.partial_fourier(part.flip(0)) == (0.75, 1.0)
    undersampled = part.T.clone()
    undersampled[:, 1::2] = 0
    share = masks.partial_fourier(undersampled.expand(3, -1, -1))
    assert share[0] == 1.0 and share[1] == pytest.approx(0.75)
    with pytest.raises(ValueError, match="samples nothing"):
        masks.partial_fourier(torch.zeros(4, 4))
    with pytest.raises(ValueError, match=r"\[ky, kx\]"):
        masks.partial_fourier(torch.ones(1, 1, 4, 4))


@pytest.mark.parametrize("make", LINES)
def test_bad_lines(make):
    with pytest.raises(ValueError, match="at least 1"):
        make(0, 4)
    with pytest.raises(ValueError, match="at least 1"):
        make(64, 0.5)
    with pytest.raises(ValueError, match="at least 1"):
        make(64, math.nan)
    with pytest.raises(ValueError, match="between 0 and 1"):
        make(64, 4, 1.5)
    with pytest.raises(ValueError, match="20 centre lines of 64 are more than acceleration 8 allows"):
        make(64, 8, 0.31)


def test_bad_poisson_disc():
    with pytest.raises(ValueError, match="at least 1"):
        masks.poisson_disc((0, 4), 2)
    with pytest.raises(ValueError, match="must not be negative"):
        masks.poisson_disc((64, 64), 4, -1)
    with pytest.raises(ValueError, match="calibration square"):
        masks.poisson_disc((64, 64), 32, 24)
    with pytest.raises(ValueError, match="are possible"):
        masks.poisson_disc((64, 64), 1.0, 4, corners=False)

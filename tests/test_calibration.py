"""Intervals that say 90 % hold the truth nine times in ten, at any number of samples; where they do not, it is seen."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats
from toys import MatrixOperator

from recon3d.engine.assemble import assemble
from recon3d.engine.loop import InProcess
from recon3d.engine.montecarlo import draw
from recon3d.metrics import calibration, interval_factor, order_rank
from recon3d.planes import Axial
from recon3d.priors.gaussian import GaussianPrior, power_law
from recon3d.recipes import load_recipe

VOXELS = 200_000


@pytest.mark.parametrize("samples", [2, 3, 4, 9, 10, 51, 1000])
@pytest.mark.parametrize("nominal", [0.1, 0.5, 0.9, 0.95])
def test_the_factor_is_students(samples, nominal):
    want = stats.t.ppf(0.5 + nominal / 2, samples - 1) * np.sqrt(1 + 1 / samples)
    assert interval_factor(samples, nominal) == pytest.approx(want, rel=1e-9)


def drawn(samples, spread=1.0, seed=0):
    """Mean and spread of draws, and one more draw of voxels with different spreads, as truth."""
    rng = np.random.default_rng(seed)
    centre, std = rng.normal(0, 5, VOXELS), rng.uniform(0.5, 2, VOXELS)
    x = centre + spread * std * rng.normal(size=(samples, VOXELS))
    return x, centre + std * rng.normal(size=VOXELS)


@pytest.mark.parametrize("samples", [2, 5, 10, 40])
def test_exact_draws_cover_as_promised(samples):
    x, truth = drawn(samples)
    found = calibration(x.mean(0), x.std(0, ddof=1), truth, samples)
    # five standard deviations of a share of so many independent voxels
    assert found["share"] == pytest.approx(0.9, abs=5 * np.sqrt(0.09 / VOXELS))
    assert np.abs(np.subtract(found["observed"], found["nominal"])).max() < 5 * np.sqrt(0.25 / VOXELS)
    assert found["calibration_error"] < 0.005 and found["spread_factor"] == pytest.approx(1, abs=0.03)


def test_without_the_correction_ten_samples_would_promise_too_much():
    x, truth = drawn(10)
    inside = np.abs(truth - x.mean(0)) <= 1.645 * x.std(0, ddof=1)
    assert inside.mean() == pytest.approx(2 * stats.t.cdf(1.645 / np.sqrt(1.1), 9) - 1, abs=0.005)
    assert inside.mean() < 0.86


def test_half_the_spread_is_found_out():
    x, truth = drawn(10, spread=0.5)
    found = calibration(x.mean(0), x.std(0, ddof=1), truth, 10)
    assert found["share"] < 0.67 and found["calibration_error"] > 0.15
    # the mean of narrow draws is better known, hence a little below 2
    assert found["spread_factor"] == pytest.approx(2, rel=0.06) and found["z_rms"] > 2


@pytest.mark.parametrize("samples", [19, 25, 39])
def test_order_statistics_cover_whatever_the_law(samples):
    rng = np.random.default_rng(1)
    x, truth = rng.exponential(size=(samples, VOXELS)), rng.exponential(size=VOXELS)
    rank = order_rank(samples)
    ordered, below, part = np.sort(x, 0), int(rank) - 1, rank - int(rank)
    low = ordered[below] + part * (ordered[below + 1] - ordered[below])
    high = ordered[-1 - below] + part * (ordered[-2 - below] - ordered[-1 - below])
    # exact at whole ranks; between them a straight line through two draws is a little off
    assert np.mean((low <= truth) & (truth <= high)) == pytest.approx(0.9, abs=0.004 if part == 0 else 0.01)


def test_fewer_than_nineteen_samples_have_no_such_interval():
    assert order_rank(18) is None and order_rank(19) == 1.0
    assert order_rank(10, 9 / 11) == 1.0


def test_masks_constants_and_magnitudes():
    truth = np.zeros((2, 3))
    found = calibration(truth, truth, truth, 4)
    assert found["share"] == 1.0 and found["correlation"] is None and found["sharpness"] == 0
    wrong = calibration(truth + 1, truth, truth, 4)
    assert wrong["share"] == 0.0 and wrong["spread_factor"] is None
    mask = np.zeros((2, 3), bool)
    mask[0] = True
    assert calibration(truth, truth + 1, truth, 4, mask)["voxels"] == 3
    for bad, match in (
        ((truth, truth, truth[:1], 4), "one shape"),
        ((truth, truth - 1, truth, 4), "negative"),
        ((truth, truth, truth + np.nan, 4), "NaN"),
        ((truth, truth, truth, 4, ~mask & mask), "mask"),
        ((truth, truth, truth, 1), "at least 2 samples"),
        ((truth * 1j, truth, truth, 4), "magnitudes"),
    ):
        with pytest.raises(ValueError, match=match):
            calibration(*bad)
    with pytest.raises(ValueError, match="between 0 and 1"):
        interval_factor(4, 1.0)


ROWS, COLUMNS, SLICES, SAMPLES = 4, 5, 600, 10


class AtOnce(InProcess):
    """All slices in one call, which takes a hundredth of the time of a call each."""

    seconds = cpu_seconds = 0.0


@pytest.fixture(scope="module")
def posterior_samples():
    """Ten samples by the recipe `posterior` of slices drawn from the prior, each with noisy data of its own."""
    prior = GaussianPrior(power_law((ROWS, COLUMNS), 0.6), 1.0, offset=1.0)
    truth = prior.sample(SLICES, seed=5).float()
    matrix = torch.randn(8, ROWS * COLUMNS, generator=torch.Generator().manual_seed(2))
    operator = MatrixOperator(matrix, (SLICES, ROWS, COLUMNS))
    y = operator(truth)
    y += 0.5 * torch.randn(y.shape, generator=torch.Generator().manual_seed(6))
    recipe = load_recipe("posterior", {"trajectory.levels": 120})
    job = assemble(recipe, operator, y, prior, weights=torch.full((1, 1, 1), 4.0), seed=1)
    job.planes = Axial(SLICES, SLICES)
    solved, uncertainty = draw(job, AtOnce(), SAMPLES)
    return solved.volume, uncertainty, truth


def test_samples_of_the_recipe_posterior_cover_as_promised(posterior_samples):
    mean, found, truth = posterior_samples
    got = calibration(mean, found.std, truth, SAMPLES)
    # the 20 pixels of a slice go together: at worst 600 independent ones, of which this is 1.6 standard deviations
    assert got["share"] == pytest.approx(0.9, abs=0.02)
    assert got["calibration_error"] < 0.02, got["observed"]
    inside = ((truth >= found.low) & (truth <= found.high)).float().mean()
    assert float(inside) == pytest.approx(got["share"], abs=1e-3)


def test_a_sampler_with_half_the_spread_would_not_pass(posterior_samples):
    mean, found, truth = posterior_samples
    got = calibration(mean, 0.5 * found.std, truth, SAMPLES)
    assert got["share"] < 0.7 and got["spread_factor"] == pytest.approx(2, rel=0.1)

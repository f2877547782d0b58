"""Simulated PET: totals, fractions, reproducibility, and that a reconstruction gets its activity back."""

from __future__ import annotations

import math

import pytest
import torch
from laws import check_threads
from pet_toys import cylinder, em_step, ring_scanner

from recon3d.geometry import TOF, pet_geometry
from recon3d.operators import simulate_pet


def scan(tof=None, seed=0, gaps=(7,), **change):
    geometry = pet_geometry(ring_scanner(gap_crystals=gaps), max_ring_difference=2, tof=tof)
    grid = geometry.default_grid(pixel_mm=6.0, n=22)
    activity = cylinder(grid, 50.0, 5000.0, 36.0)
    mu = cylinder(grid, 55.0, 0.0096)
    return simulate_pet(activity, grid, geometry, mu_per_mm=mu, seed=seed, **{"counts": 2e5, **change})


@pytest.mark.parametrize("tof", [None, TOF(5, 40.0, 20.0)], ids=["plain", "tof"])
def test_totals_and_fractions(tof):
    made = scan(tof, scatter_fraction=0.3, randoms_fraction=0.25)
    assert made.prompts.shape == made.geometry.shape == made.additive.shape
    assert float(made.clean.sum()) == pytest.approx(2e5, rel=1e-5)
    assert abs(float(made.prompts.sum()) - 2e5) < 5 * math.sqrt(2e5)
    trues = float((made.clean - made.additive).sum())
    assert trues == pytest.approx(2e5 * 0.75 * 0.7, rel=1e-4)
    assert torch.equal(made.prompts, made.prompts.round()) and float(made.prompts.min()) >= 0
    # the gaps count nothing at all
    gaps = made.factors == 0
    gaps = gaps if tof is None else gaps.unsqueeze(2).expand(made.prompts.shape)
    assert gaps.any() and float(made.prompts[gaps].max()) == 0


def test_scatter_is_smooth_and_reaches_beyond_the_object():
    made = scan(gaps=(), scatter_fraction=0.3, randoms_fraction=0.0, oversample=1, psf_fwhm_mm=None)
    trues = made.clean - made.additive
    rows = made.additive[0, :, 3]
    assert float(rows.min()) > 0 and int((trues[0, :, 3].abs() < 1e-4).sum()) > 8
    assert float(rows.diff().abs().max()) < 0.05 * float(rows.max())


def test_the_same_seed_gives_the_same_counts():
    assert torch.equal(scan(seed=3).prompts, scan(seed=3).prompts)
    assert not torch.equal(scan(seed=3).prompts, scan(seed=4).prompts)
    check_threads(lambda: scan(seed=3).prompts)
    check_threads(lambda: scan(TOF(5, 40.0, 20.0), seed=3).clean)


def test_counts_are_poisson():
    made = scan()
    many = made.clean > 5
    pull = (made.prompts[many] - made.clean[many]) / made.clean[many].sqrt()
    assert abs(float(pull.mean())) < 5 / math.sqrt(len(pull)) and abs(float(pull.var()) - 1) < 0.1


def test_the_activity_comes_back():
    made = scan(counts=1e7, psf_fwhm_mm=None)
    operator = made.operator()
    x = torch.full(made.grid.shape, 1000.0)
    parts = operator.subsets(4)
    for _ in range(8):
        for part, views in parts:
            x = em_step(x, made.prompts[views], part, part.sensitivity())
    inner = cylinder(made.grid, 35.0, length_mm=24.0) == 1
    assert float(x[inner].mean()) == pytest.approx(5000.0, rel=0.01)


def test_oversampling_is_not_the_reconstruction_s_operator():
    fine, same = scan(oversample=2, psf_fwhm_mm=None), scan(oversample=1, psf_fwhm_mm=None)
    ratio = (fine.clean - same.clean).norm() / same.clean.norm()
    assert 1e-4 < float(ratio) < 0.1
    operator = same.operator()
    activity = cylinder(same.grid, 50.0, 5000.0, 36.0)
    assert torch.allclose(operator.expected(activity), same.clean, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(counts=0), "counts"),
        (dict(scatter_fraction=1.0), "scatter_fraction"),
        (dict(randoms_fraction=-0.1), "randoms_fraction"),
        (dict(oversample=0), "oversample"),
    ],
)
def test_refusals(change, message):
    with pytest.raises(ValueError, match=message):
        scan(**change)


def test_bad_activity():
    geometry = pet_geometry(ring_scanner(), mashing=2)
    grid = geometry.default_grid(n=8)
    for activity in (torch.zeros(grid.shape), -torch.ones(grid.shape), torch.full(grid.shape, math.nan)):
        with pytest.raises(ValueError, match="activity"):
            simulate_pet(activity, grid, geometry, counts=1.0)
    with pytest.raises(ValueError, match="its grid says"):
        simulate_pet(torch.ones(2, 2, 2), grid, geometry, counts=1.0)

"""Trajectories: published grids to the digit, ends met whatever the number of levels, no call wasted."""

import itertools
import math

import pytest

from recon3d.engine.assemble import levels as assembled_levels
from recon3d.priors.paths import VP
from recon3d.recipes.model import TrajectorySection
from recon3d.trajectory import descend, geometric, karras, sweeps, vp_times


def test_published_ddim_times():
    assert vp_times(50, "published") == list(range(980, -1, -20))
    sigmas = [VP().sigma(t) for t in vp_times(50, "published")]
    assert sigmas[0] == pytest.approx(130, rel=0.01) and sigmas[-1] == pytest.approx(0.01, rel=0.01)


@pytest.mark.parametrize("n", [2, 3, 7, 30, 49, 333, 1000])
def test_even_times_meet_both_ends_where_n_does_not_divide(n):
    times = vp_times(n)
    assert len(times) == n and times[0] == 999 and times[-1] == 0
    assert all(a > b for a, b in itertools.pairwise(times))


def test_karras_formula():
    got = karras(5, 80.0, 0.002)
    want = [(80 ** (1 / 7) + k / 4 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7 for k in range(5)]
    assert got == pytest.approx(want, rel=1e-12) and got[0] == 80.0 and got[-1] == 0.002


def test_geometric_is_the_variance_exploding_grid():
    got = geometric(2000, 378.0, 0.01)
    assert got[999] == pytest.approx(0.01 * (378 / 0.01) ** (1000 / 1999), rel=1e-12)


def test_one_pass_ends_at_zero_without_a_call_for_it():
    levels = descend(karras(4, 2.0, 0.02), scale=0.5)
    assert [x.index for x in levels] == [0, 1, 2, 3]
    assert levels[0].sigma == 1.0 and levels[-1].sigma_next == 0.0
    assert [x.last for x in levels] == [False, False, False, True]
    assert all(x.sigma_next == y.sigma for x, y in itertools.pairwise(levels))


def test_correctors_stay_at_the_level_reached():
    levels = descend([2.0, 1.0], correctors=2)
    assert [(x.kind, x.sigma, x.sigma_next) for x in levels] == [
        ("step", 2.0, 1.0),
        ("correct", 1.0, 1.0),
        ("correct", 1.0, 1.0),
        ("step", 1.0, 0.0),
    ]
    stale = descend([2.0, 1.0], correctors=1, stale=True, data_at="corrected")
    assert [(x.kind, x.sigma, x.sigma_next, x.data) for x in stale] == [
        ("step", 2.0, 1.0, False),
        ("correct", 2.0, 2.0, True),
        ("step", 1.0, 0.0, True),
    ]
    assert [x.data for x in descend([2.0, 1.0], correctors=1, data_at="steps")] == [True, False, True]


def test_a_polish_ends_without_the_data():
    section = TrajectorySection(levels=2, sigma_max=2.0, sigma_min=1.0, polish=0.25)
    found = [(x.sigma, x.sigma_next, x.data, x.last) for x in assembled_levels(section, scale=2.0)]
    assert found == [(4.0, 2.0, True, False), (2.0, 0.5, True, False), (0.5, 0.0, False, True)]


def test_sweeps_travel_back_up_and_end_without_data():
    levels = sweeps([2.0, 1.0], inner=2, floor=0.1)
    assert [(x.kind, x.data) for x in levels] == [
        ("step", False),
        ("travel", True),
        ("step", False),
        ("step", False),
    ]
    assert levels[1].sigma == pytest.approx(0.2) and levels[1].sigma_next == 1.0
    assert levels[-1].last and levels[-1].sigma_next == 0.0


@pytest.mark.parametrize(
    "make",
    [
        lambda: karras(0, 2.0, 0.1), lambda: karras(3, 0.1, 2.0), lambda: karras(3, math.inf, 0.1),
        lambda: karras(3, 2.0, 0.1, rho=0), lambda: geometric(3, 2.0, 0.0), lambda: vp_times(0),
        lambda: vp_times(1001), lambda: vp_times(5, "other"), lambda: descend([1.0, 1.0]), lambda: descend([]),
        lambda: descend([1.0, math.nan]), lambda: descend([1.0], correctors=-1), lambda: sweeps([], 2),
        lambda: sweeps([1.0, 2.0], 2), lambda: sweeps([1.0], 0), lambda: sweeps([1.0], 2, floor=1.0),
    ],
)  # fmt: skip
def test_bad_grids_get_a_sentence(make):
    with pytest.raises(ValueError, match=r"^(karras|geometric|vp_times|descend|sweeps): .*(must|need)"):
        make()

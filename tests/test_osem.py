"""Ordered-subset EM on small dense scanners: likelihoods, counts, recovery, subsets, anchors, states, bad input."""

import math

import pytest
import torch
from laws import check_threads
from toys import MatrixOperator

from recon3d import ops
from recon3d.baselines import mlem, osem, osem_rdp, osem_rdp_objective, tune_osem_rdp
from recon3d.consistency import OrderedSubsets, Rho, log_likelihood, ordered_subsets_em, poisson_log_likelihood
from recon3d.consistency.em import mean_sensitivity, uniform_start
from recon3d.geometry import Events, pet_geometry
from recon3d.operators import PETListmode, PETOperator
from recon3d.operators.base import LinearOperator, Space
from recon3d.operators.simulate_pet import simulate_pet
from recon3d.trajectory import Level

SHAPE = (4, 5, 6)


class Dense(LinearOperator):
    """A dense scanner of views of rays over the whole volume; measurement [view, ray]."""

    coupling = "volume"

    def __init__(self, matrix, additive=None, shape=SHAPE):
        self.matrix, self.additive = matrix, additive
        self.domain, self.range = Space(shape, matrix.dtype, "Bq/mL"), Space(tuple(matrix.shape[:2]), matrix.dtype, "1")

    def forward(self, x):
        return self.matrix.to(x.dtype) @ x.flatten()

    def adjoint(self, y):
        return (y.flatten() @ self.matrix.to(y.dtype).flatten(0, 1)).reshape(self.domain.shape)

    def subsets(self, n):
        order = [torch.arange(k, len(self.matrix), n) for k in range(n)]
        additive = self.additive
        return [(Dense(self.matrix[i], None if additive is None else additive[i], self.domain.shape), i) for i in order]


class Factored(Dense):
    """The same with a matrix of its own factors and scale, and a projector that can be had without them."""

    scale = 0.25

    def __init__(self, matrix, factors, additive):
        super().__init__(0.25 * factors[..., None] * matrix, additive)
        self.plain, self.factors = matrix, factors

    def project(self, x, out=None):
        return self.plain.to(x.dtype) @ x.flatten()

    def back_project(self, y):
        return (y.flatten() @ self.plain.to(y.dtype).flatten(0, 1)).reshape(self.domain.shape)


def uniform(*shape, seed=0, low=0.0, high=1.0, dtype=torch.float64):
    u = torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (low + (high - low) * u).to(dtype)


def scanner(views=8, rays=20, additive=True, seed=3, dtype=torch.float64):
    matrix = uniform(views, rays, math.prod(SHAPE), seed=seed)
    matrix = matrix * (matrix > 0.8)  # lines cross few voxels
    return Dense(matrix.to(dtype), uniform(views, rays, seed=4, low=0.5, high=2, dtype=dtype) if additive else None)


def counts(operator, x, seed=5):
    mean = operator(x) + (0 if operator.additive is None else operator.additive)
    return torch.poisson(mean, generator=torch.Generator().manual_seed(seed))


def level(sigma=1.0, index=0, last=False):
    return Level(index, sigma, sigma / 2, last)


TRUTH = uniform(*SHAPE, seed=6, low=1, high=5)


def test_log_likelihood_by_hand():
    y, m = torch.tensor([2.0, 0.0, 5.0]), torch.tensor([3.0, 1.5, 0.0])
    assert poisson_log_likelihood(y, m) == pytest.approx(2 * math.log(3) - 3 - 1.5)
    a = scanner()
    y = counts(a, TRUTH)
    assert log_likelihood(TRUTH, y, a) == pytest.approx(poisson_log_likelihood(y, a(TRUTH) + a.additive), rel=1e-12)


@pytest.mark.parametrize("additive", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_mlem_is_monotone_and_conserves_counts(additive, dtype):
    a = scanner(additive=additive)
    y = counts(a, TRUTH).to(dtype)
    x, last = torch.ones(SHAPE, dtype=dtype), -math.inf
    for _ in range(30):
        x = ordered_subsets_em(x, y, a)
        now = log_likelihood(x, y, a)
        assert now >= last - 1e-6 * abs(now) * (dtype == torch.float32)
        last = now
        if not additive:
            assert a(x).sum().item() == pytest.approx(y.sum().item(), rel=1e-5 if dtype == torch.float32 else 1e-12)


@pytest.mark.parametrize("activity", [1e-3, 1.0, 1e9])
def test_uniform_object_is_recovered_at_every_activity(activity):
    a = scanner()
    a.matrix, a.additive = (a.matrix / activity).float(), a.additive.float()
    truth = torch.full(SHAPE, activity)
    y = a(truth) + a.additive
    x = ordered_subsets_em(torch.full(SHAPE, 0.2 * activity), y, a, subsets=4, iterations=400)
    assert ((x - truth).abs() <= 0.01 * activity).all()


def test_subsets_go_on_from_the_count():
    a = scanner()
    y = counts(a, TRUTH)
    whole = ordered_subsets_em(torch.ones_like(TRUTH), y, a, subsets=4, iterations=7)
    first = ordered_subsets_em(torch.ones_like(TRUTH), y, a, subsets=4, iterations=3)
    assert torch.equal(ordered_subsets_em(first, y, a, subsets=4, iterations=4, start=3), whole)
    assert not torch.equal(ordered_subsets_em(first, y, a, subsets=4, iterations=4), whole)
    # one sub-iteration by hand
    part, index = a.subsets(4)[3]
    ratio = y[index] / (part(first) + part.additive)
    want = first * part.adjoint(ratio) / part.adjoint(torch.ones_like(ratio))
    torch.testing.assert_close(ordered_subsets_em(first, y, a, subsets=4, start=3), want)


def test_factors_join_in_the_ratio():
    plain, factors = scanner(additive=False).matrix, uniform(8, 20, seed=9, low=0.2)
    factors[2, 3] = 0
    a = Factored(plain, factors, scanner().additive)
    y = counts(a, TRUTH)
    b = Dense(a.matrix, a.additive)
    for kwargs in ({"iterations": 3}, {"iterations": 2, "anchor": TRUTH, "anchor_weight": 3.0}):
        got, want = (ordered_subsets_em(torch.ones_like(TRUTH), y, op, **kwargs) for op in (a, b))
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("axes", ["z", "zyx"])
@pytest.mark.parametrize("gamma", [1.0, 2.0, 10.0])
@pytest.mark.parametrize("beta", [1.0, 30.0])
def test_penalised_likelihood_is_monotone(axes, gamma, beta):
    a = scanner()
    y = counts(a, TRUTH)
    prior = {"gamma": gamma, "epsilon": 1e-3, "axes": axes, "spacing_mm": (2.0, 1.0, 1.5)}
    x, last = uniform(*SHAPE, seed=8, high=10), -math.inf
    x[1, 2, 3] = 0
    anchor = torch.full_like(x, 2.0)
    for _ in range(40):
        x = ordered_subsets_em(x, y, a, anchor=anchor, anchor_weight=0.3, rdp=beta, **prior)
        now = log_likelihood(x, y, a) - beta * ops.rdp(x, **prior).item() - 0.15 * (x - anchor).square().sum().item()
        assert now >= last - 1e-9 * abs(now)
        last = now


def test_rdp_smooths_and_forms_agree_at_the_fixed_point():
    a = scanner(views=20)
    y = counts(a, TRUTH)
    s = {"rdp": 5.0, "epsilon": 1e-2, "axes": "zyx", "anchor": TRUTH, "anchor_weight": 30.0}
    ones = torch.ones_like(TRUTH)
    x = ordered_subsets_em(ones, y, a, iterations=600, **s)
    torch.testing.assert_close(ordered_subsets_em(x, y, a, form="gradient", floor=1e-3, **s), x, rtol=1e-6, atol=1e-8)
    plain = ordered_subsets_em(ones, y, a, iterations=400)
    assert ops.rdp(x, epsilon=1e-2) < 0.5 * ops.rdp(plain, epsilon=1e-2)


def test_start_and_blind_voxels():
    a = scanner()
    a.matrix[..., 7] = 0  # voxel (0, 1, 1) is crossed by no line
    y = counts(a, TRUTH)
    x = uniform(*SHAPE, seed=2, low=-1)
    x[0, 1, 1] = -3.0
    out = ordered_subsets_em(x, y, a, iterations=5, anchor=x, anchor_weight=1.0, rdp=0.1)
    assert out[0, 1, 1] == -3.0
    out[0, 1, 1] = 0
    assert (out >= 0).all() and out.isfinite().all()
    flat = uniform_start(a, y)
    assert flat[0, 1, 1] == 0 and flat.unique().numel() == 2
    assert (a(flat) + a.additive).sum().item() == pytest.approx(y.sum().item())
    seen = a.adjoint(torch.ones_like(y))
    assert mean_sensitivity(a, y, 4) == pytest.approx(seen[seen > 0].mean().item())


def test_counts_where_nothing_is_expected():
    a = scanner(additive=False)
    a.matrix[2, 3] = 0
    y = counts(a, TRUTH)
    y[2, 3] = 4
    for x in (torch.ones_like(TRUTH), torch.zeros_like(TRUTH)):
        for form in ("surrogate", "gradient"):
            out = ordered_subsets_em(x, y, a, subsets=2, iterations=9, form=form, rdp=1.0, anchor=x, anchor_weight=0.1)
            assert out.isfinite().all() and (out >= 0).all()
    zero = ordered_subsets_em(torch.ones_like(TRUTH), torch.zeros_like(y), a, subsets=2, iterations=2)
    assert not zero.any()
    assert math.isfinite(log_likelihood(TRUTH, y, a))


def test_step_is_the_posterior_of_many_counts():
    """With many counts the likelihood is Gaussian, and the step's fixed point the mean of a Gaussian posterior."""
    a = scanner(views=3, additive=True)
    a.matrix, a.additive = a.matrix * 1e7, a.additive * 1e6
    y = counts(a, TRUTH)
    sigma, x0 = 3e-4, TRUTH + 3e-4 * torch.randn(SHAPE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    part = OrderedSubsets(400, anchor=Rho("bayes", 1.0))
    x = part.step(x0, y, a, level(sigma), {})
    m, w = a.matrix.flatten(0, 1), 1 / y.flatten()
    precision = m.T @ (w[:, None] * m) + torch.eye(m.shape[1], dtype=torch.float64) / sigma**2
    misfit = (y - a.additive).flatten() - m @ x0.flatten()
    want = x0 + torch.linalg.solve(precision, m.T @ (w * misfit)).reshape(SHAPE)
    assert (want - x0).norm() > 0.1 * sigma * math.sqrt(x0.numel())
    assert (x - want).norm() <= 1e-3 * (want - x0).norm()


def test_levels_go_on_through_the_subsets_and_resume():
    a = scanner()
    y = counts(a, TRUTH)
    part = OrderedSubsets(3, 4, anchor=Rho("relative", 0.1), rdp=0.02, value_scale=3.0)
    state = {}
    x = part.step(torch.ones_like(TRUTH), y, a, level(), state)
    assert state["em_count"].tolist() == [3] and state["em_count"].dtype == torch.int64
    saved = {k: v.clone() for k, v in state.items()}
    once = part.step(x, y, a, level(index=1), state)
    assert state["em_count"].tolist() == [6]
    assert torch.equal(OrderedSubsets(3, 4, anchor=Rho("relative", 0.1), rdp=0.02, value_scale=3.0).step(
        x, y, a, level(index=1), saved), once)  # fmt: skip
    mean = mean_sensitivity(a, y)
    want = ordered_subsets_em(
        x, y, a, subsets=4, iterations=3, start=3, anchor=x, anchor_weight=0.1 * mean / 3.0, rdp=0.02 * mean,
        epsilon=3e-3,
    )  # fmt: skip
    torch.testing.assert_close(once, want)


def test_strengths_have_no_unit():
    a = scanner()
    y = counts(a, TRUTH)
    results = []
    for unit in (1.0, 1e4):
        b = Dense(a.matrix / unit, a.additive)
        part = OrderedSubsets(6, 2, anchor=Rho("relative", 0.2), rdp=0.3, axes="zyx", value_scale=2.0 * unit)
        results.append(part.step(torch.ones_like(TRUTH) * unit, y, b, level(), {}) / unit)
    torch.testing.assert_close(*results)


def test_likelihood_target():
    a = scanner()
    y = counts(a, TRUTH)
    part = OrderedSubsets(1, 2, target="likelihood", levels=4, passes=8, most=50)
    state, reached = {}, []
    for k in range(4):
        x = part.step(torch.full_like(TRUTH, 2.0), y, a, level(index=k, last=k == 3), state)
        reached.append(log_likelihood(x, y, a))
    targets = state["em_targets"].tolist()
    assert len(targets) == 9 and targets == sorted(targets)
    assert all(got >= targets[2 * k + 2] for k, got in enumerate(reached))
    assert reached == sorted(reached)
    # an estimate that is good enough is only clamped
    before = state["em_count"].clone()
    best = ordered_subsets_em(torch.ones_like(TRUTH), y, a, iterations=200)
    assert torch.equal(part.step(best, y, a, level(index=0), state), best)
    assert torch.equal(state["em_count"], before)


def test_scanners_without_background_or_subsets():
    matrix = uniform(9, 30, seed=1)
    a = MatrixOperator(matrix, SHAPE)
    y = a(TRUTH)
    x = ordered_subsets_em(torch.ones_like(TRUTH), y, a, iterations=50)
    assert (a(x) - y).norm() < 0.05 * y.norm()
    with pytest.raises(NotImplementedError):
        ordered_subsets_em(x, y, a, subsets=2)


# ---- the PET scanner ---------------------------------------------------------------------------------------------


class Written(LinearOperator):
    """A PETOperator by its forward, adjoint and background alone."""

    coupling = "volume"

    def __init__(self, a):
        self.a, self.domain, self.range, self.additive = a, a.domain, a.range, a.additive
        self.forward, self.adjoint = a.forward, a.adjoint

    def forward(self, x): ...

    def adjoint(self, y): ...


@pytest.fixture(scope="module")
def small_scan():
    geometry = pet_geometry("small", span=3, mashing=8, n_radial=40, max_ring_difference=4)
    grid = geometry.default_grid(n=14)
    truth = torch.zeros(grid.shape)
    truth[3:-3, 4:10, 3:11] = 2000.0
    truth[8:14, 5:7, 6:8] = 8000.0
    return truth, simulate_pet(truth, grid, geometry, counts=3e5, seed=2)


@pytest.mark.parametrize("tof", [False, True])
def test_scanner_joins_its_factors_in_the_ratio(tof):
    geometry = pet_geometry("small", span=3, mashing=8, n_radial=32, max_ring_difference=4, tof=tof)
    grid = geometry.default_grid(n=12)
    bins = (*geometry.shape[:2], geometry.shape[-1])
    factors, additive = (
        uniform(*shape, seed=k, low=low, dtype=torch.float32) for k, shape, low in ((1, bins, 0.2), (2, bins, 0.0))
    )
    additive = additive.unsqueeze(-2).expand(geometry.shape).contiguous() if tof else additive
    a = PETOperator(geometry, grid, factors=factors, additive=additive, psf_fwhm_mm=6.0, scale=0.02)
    x = uniform(*grid.shape, seed=3, dtype=torch.float32)
    y = torch.poisson(a.expected(x), generator=torch.Generator().manual_seed(1))
    got = ordered_subsets_em(x, y, a, iterations=2)
    torch.testing.assert_close(got, ordered_subsets_em(x, y, Written(a), iterations=2), rtol=1e-5, atol=1e-6)
    assert log_likelihood(x, y, a) == pytest.approx(poisson_log_likelihood(y, a.expected(x)), rel=1e-6)
    part, index = a.subsets(3)[1]
    want = ordered_subsets_em(x, y[index], Written(part))
    torch.testing.assert_close(ordered_subsets_em(x, y, a, subsets=3, start=1), want, rtol=1e-5, atol=1e-6)
    # a shallow copy has a plan of its own
    moved = a.to("cpu")
    moved.factors = moved.factors * 2
    moved._sensitivity = None
    assert mean_sensitivity(moved, y) == pytest.approx(2 * mean_sensitivity(a, y), rel=1e-5)


def test_scanner_counts_and_quality(small_scan):
    truth, scan = small_scan
    a = PETOperator(scan.geometry, scan.grid, factors=scan.factors, scale=scan.scale, psf_fwhm_mm=4.5)
    y = scan.prompts
    x = mlem(y, a, 3)
    assert float(a(x).sum(dtype=torch.float64)) == pytest.approx(float(y.sum()), rel=1e-5)
    a = PETOperator(
        scan.geometry, scan.grid, factors=scan.factors, additive=scan.additive, scale=scan.scale, psf_fwhm_mm=4.5
    )
    likelihoods = []
    mlem(y, a, 4, callback=lambda k, v: likelihoods.append(log_likelihood(v, y, a)))
    assert likelihoods == sorted(likelihoods)

    def error(x):
        return float((x - truth).norm() / truth.norm())

    plain = min(error(osem(y, a, k, 3)) for k in (1, 2, 3))
    assert error(osem_rdp(y, a, 0.03, 4, 3)) < 0.97 * plain
    part = OrderedSubsets(3, 3, anchor=Rho("relative", 0.05), rdp=0.03, value_scale=2000.0)
    estimate = truth + 300 * torch.randn(truth.shape, generator=torch.Generator().manual_seed(0))
    assert error(part.step(estimate, y, a, level(), {})) < plain
    check_threads(lambda: part.step(estimate, y, a, level(), {}))
    check_threads(lambda: torch.tensor([log_likelihood(estimate, y, a), float(uniform_start(a, y).max())]))


def test_list_mode_is_the_sinogram():
    geometry = pet_geometry("small", max_ring_difference=1)
    grid = geometry.default_grid(n=12)
    generator = torch.Generator().manual_seed(4)
    rings = torch.randint(16, (3000, 1), generator=generator).expand(-1, 2)
    angle = torch.randint(192, (3000, 1), generator=generator)
    across = angle + torch.randint(80, 113, (3000, 1), generator=generator)
    pairs = (rings * 192 + torch.cat([angle, across % 192], 1)).int()
    events = Events(pairs, torch.ones(3000, dtype=torch.bool))
    sensitivity = torch.full(grid.shape, 20.0)
    a = PETListmode(events, geometry.scanner, grid, sensitivity=sensitivity, additive=torch.full((3000,), 0.1))
    x, y = torch.ones(grid.shape), torch.ones(3000)
    likelihoods = []
    x = mlem(y, a, 5, callback=lambda k, v: likelihoods.append(log_likelihood(v, y, a)))
    assert likelihoods == sorted(likelihoods) and x.isfinite().all()
    by_hand = x * a.adjoint(1 / a.expected(x)) / sensitivity
    torch.testing.assert_close(ordered_subsets_em(x, y, a), by_hand)
    assert osem(y, a, 2, 4).isfinite().all()


# ---- baselines ---------------------------------------------------------------------------------------------------


def test_baselines_are_the_em_loop():
    a = scanner()
    y = counts(a, TRUTH)
    seen = []
    x = osem(y, a, 3, 4, callback=lambda k, v: seen.append(k) or k == 2)
    assert seen == [1, 2]
    start = uniform_start(a, y, 4)
    assert torch.equal(x, ordered_subsets_em(start, y, a, subsets=4, iterations=8))
    assert torch.equal(osem(y, a, 1, 4, x0=x), osem(y, a, 3, 4))
    likelihoods = []
    mlem(y, a, 20, callback=lambda k, v: likelihoods.append(log_likelihood(v, y, a)))
    assert len(likelihoods) == 20 and likelihoods == sorted(likelihoods)


def test_osem_rdp_climbs_its_objective_and_tunes():
    a = scanner(views=16, rays=30)
    a.matrix, a.additive = 0.3 * a.matrix, 0.3 * a.additive
    truth = torch.full(SHAPE, 2.0, dtype=torch.float64)
    truth[:, 2:4, 2:5] = 6.0
    y = counts(a, truth)
    values = []
    settings = {"strength": 0.1, "value_scale": 3.0, "spacing_mm": (2.0, 1.0, 1.0)}

    def note(k, x):
        values.append(osem_rdp_objective(x, y, a, **settings))

    osem_rdp(y, a, iterations=15, callback=note, **settings)
    assert values == sorted(values)
    found = tune_osem_rdp(y, a, truth, iterations=6, subsets=4, strengths=[10**k for k in range(-4, 2)])
    assert 1 <= found.iterations <= 6
    assert torch.equal(found.volume, osem_rdp(y, a, found.strength, found.iterations, 4))
    assert dict(found.scores)[found.strength] == max(score for _, score in found.scores)
    plain = min(float((osem(y, a, k, 4) - truth).norm()) for k in range(1, 7))
    assert (found.volume - truth).norm() < plain
    again = tune_osem_rdp(y * 1, a, truth, [0.01, 0.1], 3, score=lambda x: -float((x - truth).abs().max()), start=0.1)
    assert again.strength in (0.01, 0.1)


def test_baselines_refuse():
    a = scanner()
    y = counts(a, TRUTH)
    with pytest.raises(ValueError, match="counts must be finite and at least 0"):
        mlem(-y, a)
    with pytest.raises(ValueError, match="osem: iterations must be at least 1, got 0"):
        osem(y, a, 0)
    with pytest.raises(ValueError, match="strength must be positive, got 0"):
        osem_rdp(y, a, 0.0)
    with pytest.raises(ValueError, match="gamma must be at least 1"):
        osem_rdp(y, a, gamma=0.5)
    with pytest.raises(ValueError, match="value_scale must be positive"):
        osem_rdp(y, a, value_scale=-1.0)
    zero = torch.zeros_like(y)
    for run in (mlem, osem, osem_rdp):
        out = run(zero, a, iterations=2)
        assert not out.any()


def test_bad_input():
    a = scanner()
    y = counts(a, TRUTH)
    with pytest.raises(ValueError, match="counts must be finite and at least 0, got values in"):
        ordered_subsets_em(TRUTH, y - 100, a)
    with pytest.raises(ValueError, match="counts must be finite"):
        OrderedSubsets(1).step(TRUTH, y * math.nan, a, level(), {})
    with pytest.raises(ValueError, match=r"y needs the operator's shape \(8, 20\), got \(7, 20\)"):
        ordered_subsets_em(TRUTH, y[1:], a)
    with pytest.raises(TypeError, match=r"counts in float32 or float64 are needed, got torch.int64"):
        ordered_subsets_em(TRUTH, y.long(), a)
    with pytest.raises(ValueError, match="iterations must be at least 1"):
        OrderedSubsets(0)
    with pytest.raises(ValueError, match="clamp the noisy state"):
        OrderedSubsets(on="iterate")
    with pytest.raises(ValueError, match="needs the number of levels"):
        OrderedSubsets(target="likelihood")
    with pytest.raises(ValueError, match="value_scale must be finite and positive, got 0"):
        OrderedSubsets(value_scale=0.0)


@pytest.mark.parametrize(("rule", "power"), [("relative", 0.0), ("noise", -0.7), ("absolute", -1.0)])
def test_the_smoothing_of_a_rule_follows_the_counts_of_a_voxel(rule, power):
    """beta R(x) against the log-likelihood, which is in proportion to counts; the unit of activity does not matter."""

    def strength(times, unit):
        a = scanner(additive=False)
        a.matrix = a.matrix * (times / unit)  # x in units of `unit`, `times` the counts
        y, mean = a(unit * TRUTH), mean_sensitivity(a, a(unit * TRUTH))
        part = OrderedSubsets(rdp=0.3, rdp_rule=rule, value_scale=2.0 * unit, anchor=Rho("relative", 0.1))
        return part._prior(y, a, level()).rdp / mean

    assert strength(1.0, 1.0) > 0
    assert strength(4.0, 1.0) == pytest.approx(4**power * strength(1.0, 1.0), rel=1e-9)
    assert strength(1.0, 1e3) == pytest.approx(strength(1.0, 1.0), rel=1e-9)

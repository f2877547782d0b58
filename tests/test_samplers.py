"""Samplers against closed forms: orders of convergence, published step formulas, every noise path, any resumption."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math

import pytest
import torch

from bench.samplers import (
    HIGH,
    LAWS,
    LOW,
    MEAN,
    SHAPE,
    Point,
    even_in,
    finish,
    flow_error,
    gaussian,
    law_error,
    order,
    path_gap,
    sampling,
)  # fmt: skip
from recon3d import noise
from recon3d.dormand_prince import Adaptive, DormandPrince
from recon3d.engine.checkpoint import Checkpoint
from recon3d.engine.executor import Executor, Interrupted
from recon3d.engine.job import solve
from recon3d.engine.loop import Start, begin, run
from recon3d.priors.gaussian import ComplexGaussianPrior, cosine_basis
from recon3d.priors.paths import EDM, VE, VP, RectifiedFlow, VPContinuous, from_denoiser, to_denoiser
from recon3d.real_view import draw_like
from recon3d.renoise import DDIM, Ancestral, EulerMaruyama, Heun, Renoise
from recon3d.trajectory import descend, expected_visits, geometric, karras, time_travel

DEPTH = 3


def integrator(tolerance, high=HIGH, low=LOW):
    return Adaptive(high, low, 2 * tolerance), DormandPrince(tolerance, tolerance, MEAN, low)


@pytest.mark.parametrize(("name", "rule", "heun", "want"), [("Euler", DDIM(), False, 1), ("Heun", Heun(), True, 2)])
def test_order_of_the_flow(name, rule, heun, want):
    points = [Point("flow", name, n, *flow_error(descend(karras(n, HIGH, LOW), heun=heun), rule)) for n in (20, 40, 80)]
    # at 40 to 80 levels the term of the next order is a tenth of the leading one
    assert order(points, "flow", name) == pytest.approx(want, abs=0.15)


def test_error_of_the_adaptive_flow_follows_its_tolerance():
    calls, errors = zip(*(flow_error(*integrator(tolerance)) for tolerance in (1e-2, 1e-4, 1e-6)), strict=True)
    # steps are judged one by one; a dozen of them may add up, and each is shorter than it had to be
    assert all(error < 5 * tolerance for error, tolerance in zip(errors, (1e-2, 1e-4, 1e-6), strict=True)), errors
    # a fifth-order pair: a hundredth of the tolerance takes 100^(1/5) = 2.5 times the steps where there are many
    assert calls[0] < calls[1] < calls[2] < 2.6 * calls[1]
    assert errors[2] < flow_error(descend(karras(80, HIGH, LOW), heun=True), Heun())[1] / 100


def test_complex_states_follow_the_same_flow():
    prior = ComplexGaussianPrior(gaussian().spectrum, 1 + 0.5j)
    way, rule = Adaptive(HIGH, LOW), DormandPrince(1e-6, 1e-6, 0.0, LOW)
    heun, adaptive = (
        finish(sampling(prior, (DEPTH, *SHAPE), *ways, dtype=torch.complex128))[0]
        for ways in ((descend(karras(80, HIGH, LOW), heun=True), Heun()), (way, rule))
    )
    assert (heun - adaptive).norm() < 2e-3 * adaptive.norm()  # Heun's error at 80 levels is 6e-4


@pytest.mark.parametrize("name", LAWS)
def test_weak_order_of_the_diffusions(name):
    rule, grid = LAWS[name]
    points = [Point("law", name, n, n, law_error(grid(n), rule)) for n in (320, 640, 1280)]
    # the geometric grid's first-order term is small, and what is left of the second shows
    assert order(points, "law", name) == pytest.approx(1, abs=0.25 if "VE" in name else 0.05)


@pytest.mark.parametrize("clock", ["ve", "vp"])
def test_strong_order_of_euler_maruyama(clock):
    """Additive noise: order 1, not 1/2."""
    points = [Point("path", clock, n, n, path_gap(clock, n)) for n in (32, 64, 128)]
    assert order(points, "path", clock) == pytest.approx(1, abs=0.25)


def step(job, state):
    """One visit; the states before and after, and the estimate between them."""
    before = state.u.clone()
    level = next(run(job, state))
    return level, before, job.prior.denoise(before.unsqueeze(1), level.sigma).squeeze(1)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("variance", ["posterior", "beta"])
def test_ancestral_steps_are_ddpm(schedule, variance):
    """x_t' = mean(x_t, x0) + std z in the network's own coordinates, every tenth time and the last ones."""
    path = VP(schedule=schedule)
    abar = lambda t: path.s(t) ** 2  # noqa: E731
    times = [*range(990, 10, -70), 9, 8, 1, 0]
    rule = Ancestral("small") if variance == "posterior" else Ancestral("prior", 1.0)
    prior = gaussian()
    job = sampling(prior, (DEPTH, *SHAPE), descend([path.sigma(t) for t in times]), rule)
    state = begin(job)
    for t, s in itertools.pairwise(times):
        level, u, x0 = step(job, state)
        alpha = abar(t) / abar(s)
        beta = 1 - alpha
        mean = math.sqrt(abar(s)) * beta / (1 - abar(t)) * x0
        mean += math.sqrt(alpha) * (1 - abar(s)) / (1 - abar(t)) * path.s(t) * u
        std = math.sqrt(beta if variance == "beta" else beta * (1 - abar(s)) / (1 - abar(t)))
        want = mean + std * draw_like(u, job.noise.at(level.index, 0))
        assert torch.allclose(path.s(s) * state.u, want, rtol=1e-9, atol=1e-9), f"differs from t = {t} to {s}"


def test_predictor_corrector_is_that_of_score_sde():
    """VE: x += G^2 score + G z with G^2 = sigma_i^2 - sigma_j^2; then Langevin with eps = 2 (snr |z| / |score|)^2."""
    grid, snr = geometric(12, 20.0, 0.05), 0.16
    prior = gaussian()
    job = sampling(prior, (DEPTH, *SHAPE), descend(grid, correctors=1), Ancestral("large"))
    job.renoise = Renoise(Ancestral("large"), snr=snr, norms="volume")
    state = begin(job)
    for high, low in itertools.pairwise(grid):
        level, x, x0 = step(job, state)
        g2 = high**2 - low**2
        want = x + g2 * (x0 - x) / high**2 + math.sqrt(g2) * draw_like(x, job.noise.at(level.index, 0))
        assert torch.allclose(state.u, want, rtol=1e-9, atol=1e-9)
        level, x, x0 = step(job, state)
        assert level.kind == "correct" and level.sigma == low
        score, z = (x0 - x) / low**2, draw_like(x, job.noise.at(level.index, 0))
        norms = [t.flatten(1).norm(dim=1).mean() for t in (z, score)]
        eps = 2 * (snr * norms[0] / norms[1]) ** 2
        assert torch.allclose(state.u, x + eps * score + (2 * eps).sqrt() * z, rtol=1e-9, atol=1e-9)


def test_euler_maruyama_has_the_variance_of_its_clock():
    grid = even_in("ve", 50)
    ratio = math.log(HIGH / LOW)
    for high, low in itertools.pairwise(grid):
        a, b = EulerMaruyama("ve").weights(high, low)
        v = high**2 * 2 * ratio / 50  # g^2 dt of sigma_min (sigma_max/sigma_min)^t
        assert (b * low) ** 2 == pytest.approx(v, rel=1e-9) and a * low / high == pytest.approx(1 - v / high**2)
    path = VPContinuous(0.1, 20.0)
    t, dt = 0.5, 1e-4
    a, b = EulerMaruyama("vp", 0.02).weights(0.02 * path.sigma(t), 0.02 * path.sigma(t - dt))
    beta = 0.1 + 19.9 * (t - dt / 2)
    v = 0.02**2 * beta * dt * (1 + path.sigma(t) ** 2)
    assert (b * 0.02 * path.sigma(t - dt)) ** 2 == pytest.approx(v, rel=1e-9)


def test_euler_maruyama_agrees_with_the_networks_own_coordinates():
    """In x_t the drift has a linear part, which the canonical state does not have; the two differ at second order."""
    path, gaps = VPContinuous(0.1, 20.0), []
    for dt in (2e-3, 1e-3):
        t, x0, u, z = 0.6, 0.7, 2.0, 0.3
        sigma, low, s, h = path.sigma(t), path.sigma(t - dt), path.s(t), (0.1 + 19.9 * (t - dt / 2)) * dt
        a, b = EulerMaruyama("vp").weights(sigma, low)
        ours = x0 + low * (a * (u - x0) / sigma + b * z)
        x = s * u
        score = (s * x0 - x) / (s * sigma) ** 2
        theirs = x + (x / 2 + score) * h + math.sqrt(h) * z
        gaps.append(abs(path.s(t - dt) * ours - theirs))
    # the noise's weight differs by O(h^1.5), the drift by O(h^2)
    assert gaps[0] < 1e-3 and gaps[0] / gaps[1] > 2.5


class ThroughPath:
    """The exact prior behind a network that knows x_t and t alone, as a checkpoint of that path would be asked."""

    offset, scale = 0.0, 1.0

    def __init__(self, path, kind):
        self.path, self.kind, self.exact = path, kind, gaussian()

    def denoise(self, u, sigma, cond=None):
        t = self.path.time(sigma)
        s, level = self.path.s(t), self.path.sigma(t)
        x_t = s * u
        out = from_denoiser(self.exact.denoise(x_t / s, level), x_t / s, level, self.kind, s)
        return to_denoiser(out, u, sigma, self.kind, s)


PATHS = {
    "VP linear": (VP(), "eps"),
    "VP cosine": (VP(schedule="cosine"), "v"),
    "VP continuous": (VPContinuous(), "score"),
    "VE": (VE(0.01, 50.0), "score"),
    "EDM": (EDM(), "x0"),
    "flow": (RectifiedFlow(), "flow"),
}


def even_times(path, n, high=30.0, low=0.05):
    """n levels at even times of the path."""
    first, last = path.time(high), path.time(low)
    grid = [path.sigma(first + k / (n - 1) * (last - first)) for k in range(n)]
    return karras(n, high, low, 3.0) if isinstance(path, EDM) else grid


@pytest.mark.parametrize("name", PATHS)
def test_every_path_reaches_the_prior(name):
    """The law of the ODE by exact propagation: three samples of the flow end where the closed form says."""
    path, kind = PATHS[name]
    prior = gaussian()
    ends = {}
    for n in (50, 100):
        grid = even_times(path, n)
        job = sampling(ThroughPath(path, kind), (DEPTH, *SHAPE), descend(grid, heun=True), Heun())
        rows, columns = (cosine_basis(k) for k in SHAPE)
        spectrum = prior.spectrum
        factor = ((spectrum + grid[-1] ** 2) / (spectrum + grid[0] ** 2)).sqrt() * spectrum / (spectrum + grid[-1] ** 2)
        want = MEAN + rows.T @ (factor * (rows @ (begin(job).u - MEAN) @ columns.T)) @ columns
        ends[n] = float((finish(job)[0] - want).norm() / want.norm())
    assert ends[100] < 0.02 and ends[100] < 0.4 * ends[50], ends


@pytest.mark.parametrize("name", PATHS)
def test_every_path_is_sampled(name):
    path, kind = PATHS[name]
    n, prior = 1500, gaussian()
    job = sampling(ThroughPath(path, kind), (n, *SHAPE), descend(even_times(path, 80)), DDIM(1.0), dtype=torch.float32)
    x = finish(job)[0].double()
    std = prior.covariance().diagonal().sqrt().reshape(SHAPE)
    assert ((x.mean(0) - MEAN) / std).abs().max() < 5 / math.sqrt(n)
    assert (x.std(0) / std - 1).abs().max() < 0.11  # 5 standard deviations of a spread from 1500 draws are 9 %


def repaint_times(n, length, resamples):
    """RePaint's schedule, times n-1 .. 0 and then -1, written as in the paper: jumps from every length-th time."""
    jumps = dict.fromkeys(range(0, n - length, length), resamples - 1)
    t, visited = n - 1, [n - 1]
    while t >= 0:
        t -= 1
        visited.append(t)
        if jumps.get(t, 0) > 0:
            jumps[t] -= 1
            t += length
            visited.append(t)
    return visited


@pytest.mark.parametrize(("n", "length", "resamples"), [(12, 3, 2), (13, 5, 4), (7, 1, 3), (10, 10, 3), (9, 2, 1)])
def test_time_travel_is_repaints_schedule(n, length, resamples):
    grid = karras(n, 5.0, 0.1)
    way = time_travel(descend(grid), length, resamples - 1)
    states = [way[0].sigma]
    for level in way:
        assert level.sigma == states[-1]
        states += [level.down] if level.dip is None else [level.dip, level.sigma_next]
    levels = {n - 1 - k: sigma for k, sigma in enumerate(grid)} | {-1: 0.0}
    assert states == [levels[t] for t in repaint_times(n, length, resamples)]
    assert [level.index for level in way] == list(range(len(way))) and way[-1].last


def test_a_travelling_step_is_a_step_and_the_missing_noise():
    """Two passes with independent noise have the law of one: variances add up to that of the level above."""
    rule = Ancestral("small")
    (level,) = [x for x in time_travel(descend([2.0, 1.0, 0.5]), 2, 1) if x.dip]
    u, x0 = torch.zeros(400, 9, 9, dtype=torch.float64), torch.zeros(400, 9, 9, dtype=torch.float64)
    u += 3.0
    end = Renoise(rule)(u, x0, x0.clone(), level, noise.independent(400, seed=1).at(5))
    a, b = rule.weights(1.0, 0.5)
    assert float(end.mean()) == pytest.approx(0.5 * a * 3.0, abs=0.05)
    assert float(end.var()) == pytest.approx((b * 0.5) ** 2 + 2.0**2 - 0.5**2, rel=0.03)


@pytest.mark.parametrize("kind", ["travel", "heun", "rk45", "em"])
def test_the_prior_is_reached_by(kind):
    n, prior = 3000, gaussian()
    way, rule = {
        "travel": (time_travel(descend(karras(60, 20.0, 0.05)), 6, 1), Ancestral("large")),
        "heun": (descend(karras(30, 20.0, 0.05), heun=True), Heun()),
        "rk45": integrator(1e-3, 20.0, 0.05),
        "em": (descend(geometric(120, 20.0, 0.05)), EulerMaruyama("ve")),
    }[kind]
    x = finish(sampling(prior, (n, *SHAPE), way, rule, dtype=torch.float32))[0].double()
    std = prior.covariance().diagonal().sqrt().reshape(SHAPE)
    assert ((x.mean(0) - MEAN) / std).abs().max() < 5 / math.sqrt(n)
    assert (x.std(0) / std - 1).abs().max() < 0.08  # 5 standard deviations of a spread from 3000 draws are 6 %
    coefficients = cosine_basis(SHAPE[0]) @ (x - MEAN) @ cosine_basis(SHAPE[1]).T
    assert (coefficients.var(0) / prior.spectrum - 1).abs().max() < 0.2


def test_a_start_at_an_intermediate_level_forgets_its_image():
    """From draws of the prior the law stays the prior's, however low the start; from one image it has to be high."""
    n, prior = 1500, gaussian()
    spread = {}
    for name, high in (("draws", 0.3), ("one image", 0.3), ("one image, high", 20.0)):
        job = sampling(prior, (n, *SHAPE), descend(karras(20, high, 0.02), heun=True), Heun())
        image = prior.sample(n, seed=4) if name == "draws" else torch.full((n, *SHAPE), MEAN, dtype=torch.float64)
        job.start = Start(image)
        spread[name] = float(finish(job)[0].std(0).mean() / prior.covariance().diagonal().sqrt().mean())
    assert spread["draws"] == pytest.approx(1, abs=0.05) and spread["one image, high"] == pytest.approx(1, abs=0.05)
    assert spread["one image"] < 0.6


WAYS = {
    "heun": (descend(karras(6, HIGH, LOW), heun=True), Heun()),
    "rk45": integrator(3e-2),
    "travel": (time_travel(descend(karras(6, HIGH, LOW)), 2, 2), Ancestral()),
    "em": (descend(karras(10, HIGH, LOW)), EulerMaruyama("vp")),
}


@pytest.mark.parametrize("name", WAYS)
def test_resumes_to_the_same_bits_between_any_two_visits(name):
    job = sampling(gaussian(), (DEPTH, *SHAPE), *WAYS[name], dtype=torch.float32)
    whole, calls = finish(job)
    state = begin(job)
    for level in run(job, state):
        saved = dataclasses.replace(state, u=state.u.clone(), duals={k: v.clone() for k, v in state.duals.items()})
        for _ in run(job, saved):
            pass
        assert torch.equal(saved.u, whole) and saved.index == calls, f"differs when resumed after visit {level.index}"
    assert not state.duals  # nothing stays behind a finished run


@pytest.mark.parametrize("name", ["heun", "rk45"])
def test_an_interrupted_job_goes_on_from_its_file(tmp_path, name):
    """The checkpoint holds what a step of several visits carries; the run is stopped after every single visit."""
    job = sampling(gaussian(), (DEPTH, *SHAPE), *WAYS[name], dtype=torch.float32)
    with Executor(workers=1) as executor:
        whole = solve(job, executor).volume
    done, attempts = None, 0
    while done is None:
        attempts += 1
        with Executor(workers=1) as executor, contextlib.suppress(Interrupted):
            done = solve(job, executor, store=Checkpoint(tmp_path / "state", {"job": name}), stop=lambda: True)
    assert attempts == finish(job)[1] and torch.equal(done.volume, whole)


def test_expected_visits_of_an_adaptive_run():
    way, rule = integrator(1e-3)
    job = sampling(gaussian(), (DEPTH, *SHAPE), way, rule)
    state = begin(job)
    told = [expected_visits(way)]
    for level in run(job, state):
        told.append(expected_visits(way, state.index, state.duals))
        assert told[-1] >= level.index + 1 and (told[-1] > level.index + 1) != level.last
    assert told[-1] == state.index
    assert 0.4 * state.index < told[0] < 2.5 * state.index


def test_an_adaptive_step_is_refused_and_taken_again():
    """A prior with an edge in sigma: steps shrink there, and the base state is what it was."""

    class Edge:
        offset, scale = 0.0, 1.0

        def denoise(self, u, sigma, cond=None):
            return torch.full_like(u, 1.0 if sigma > 1 else -1.0)

    job = sampling(Edge(), (1, *SHAPE), *integrator(1e-3))
    state = begin(job)
    retries, sigmas = 0, []
    for _ in run(job, state):
        if "ode.control" in state.duals:
            sigma, length, _stage, retry = state.duals["ode.control"].tolist()
            retries += int(retry)
            sigmas.append(sigma)
            assert length >= 0
    assert retries > 6 and all(b <= a for a, b in itertools.pairwise(sigmas))
    # u - x0 shrinks with sigma on both sides, and the estimate at the end is -1
    assert torch.equal(state.u, torch.full_like(state.u, -1.0))


def test_visits_in_the_wrong_order_are_refused():
    u = torch.zeros(1, *SHAPE)
    key = noise.independent(1)
    predict, refine, *_ = descend([2.0, 1.0], heun=True)
    with pytest.raises(ValueError, match="memory that the run carries"):
        Renoise(Heun())(u.clone(), u, u, predict, key)
    with pytest.raises(ValueError, match="first visit of this Heun step"):
        Renoise(Heun())(u.clone(), u, u, refine, key, {})
    with pytest.raises(ValueError, match="stages of"):
        Renoise(integrator(1e-2)[1])(u.clone(), u, u, descend([2.0, 1.0])[0], key, {})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DormandPrince(0.0, 0.0, 0.0, 0.1), "both 0"),
        (lambda: Adaptive(1.0, 2.0), "sigma_min < sigma_max"),
        (lambda: EulerMaruyama("edm"), "clock must be"),
        (lambda: EulerMaruyama("ve").weights(3.0, 1.0), "too long"),
        (lambda: descend([2.0, 1.0], heun=True, data_at="corrected"), "same data"),
        (lambda: descend([2.0, 1.0], heun=True, correctors=1), "correctors"),
        (lambda: time_travel(descend([2.0, 1.0]), 0, 1), "length >= 1"),
        (lambda: time_travel(descend([2.0, 1.0], correctors=1), 1, 1), "plain steps"),
    ],
)
def test_bad_values_get_a_sentence(make, message):
    with pytest.raises(ValueError, match=message):
        make()

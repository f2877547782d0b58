"""Each published recipe, step by step, against the paper's equations written out in numpy.

The references below share nothing with the package but the random numbers: matrices for the scanner, the published
schedules, x_t in the network's own coordinates, conjugate gradients as printed in textbooks. One step at a time (the
reference starts from the package's state) and as a whole run.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from toys import MatrixOperator, Shrink

from recon3d import noise
from recon3d.engine.assemble import assemble
from recon3d.engine.loop import begin, run
from recon3d.geometry import ParallelBeam, VolumeGrid
from recon3d.operators.ct import CTOperator
from recon3d.ops.philox import philox_normal
from recon3d.recipes import load_recipe

DEPTH, ROWS, COLUMNS = 5, 6, 7
SEED = 11


def denoise(u, sigma):
    """toys.Shrink in numpy, slice by slice."""
    gain = 0.5**2 / (0.5**2 + sigma**2)
    return gain * (0.8 * u + 0.1 * (np.roll(u, 1, -1) + np.roll(u, -1, -2))) + 0.05 * np.tanh(u)


def matrix_scanner(dtype):
    matrix = np.random.default_rng(0).normal(size=(20, ROWS * COLUMNS)) / 5
    return MatrixOperator(torch.tensor(matrix, dtype=dtype), (DEPTH, ROWS, COLUMNS)), matrix


def ct_scanner(dtype):
    grid = VolumeGrid((DEPTH, ROWS, COLUMNS), (2.0, 1.1, 1.1))
    beam = ParallelBeam(tuple(np.pi * np.arange(4) / 4), 12, 1.0)
    operator = CTOperator(beam, grid)
    unit = torch.eye(ROWS * COLUMNS, dtype=torch.float64).reshape(-1, ROWS, COLUMNS)
    return operator, operator(unit).flatten(1).T.numpy()


SCANNERS = {"matrix": matrix_scanner, "ct": ct_scanner}


class Reference:
    """Scanner, data and noise as plain arrays."""

    def __init__(self, operator, matrix, y):
        self.a = matrix
        self.y = y.double().flatten(1).numpy()
        self.norm = operator.norm()

    def shape(self, x):
        return x.reshape(DEPTH, ROWS, COLUMNS)

    def normal(self, x):
        return self.shape(x.reshape(DEPTH, -1) @ self.a.T @ self.a)

    def back(self):
        return self.shape(self.y @ self.a)

    def cg(self, apply, b, x, iterations):
        """One Krylov process over the whole volume."""
        r = b - apply(x)
        p, rr = r.copy(), np.vdot(r, r)
        for _ in range(iterations):
            q = apply(p)
            alpha = rr / np.vdot(p, q)
            x, r = x + alpha * p, r - alpha * q
            rr, old = np.vdot(r, r), rr
            p = r + rr / old * p
        return x

    def admm_sweep(self, x, z, w, rho, lam, iterations):
        """One sweep of ADMM-TV along z with periodic differences."""

        def d(v):
            return np.roll(v, -1, 0) - v

        def dt(v):
            return np.roll(v, 1, 0) - v

        x = self.cg(lambda v: self.normal(v) + rho * dt(d(v)), self.back() + rho * dt(z - w), x, iterations)
        a = d(x) + w
        z = np.sign(a) * np.maximum(np.abs(a) - lam / rho, 0)
        return x, z, w + d(x) - z


def drawn(level, stream=0):
    return philox_normal(SEED, level, DEPTH, (ROWS, COLUMNS), stream=stream, dtype=torch.float64).numpy()


def vp_tables():
    abar = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    return abar, list(range(0, 1000, 20))[::-1]


def dds_step(ref, k, x_t, z, w, settings):
    """x_t at the k-th time of the skip-20 grid -> x_t at the next (or x0 at the end): DDS's printed algorithm."""
    abar, times = vp_tables()
    now = abar[times[k]]
    following = abar[times[k + 1]] if k + 1 < len(times) else 1.0
    sigma = np.sqrt((1 - now) / now)
    eps = (x_t / np.sqrt(now) - denoise(x_t / np.sqrt(now), sigma)) / sigma
    x0 = (x_t - np.sqrt(1 - now) * eps) / np.sqrt(now)
    if settings["rho"] is not None:
        x0, z, w = ref.admm_sweep(x0, z, w, settings["rho"], settings["lam"], 5)
    elif settings["gamma"] is not None:
        g = settings["gamma"]
        x0 = ref.cg(lambda v: v + g * ref.normal(v), x0 + g * ref.back(), x0, 5)
    else:
        x0 = ref.cg(ref.normal, ref.back(), x0, 5)
    eta = 0.85
    fresh = drawn(k)
    x_t = np.sqrt(following) * x0 + np.sqrt(1 - following) * (eta * fresh + np.sqrt(1 - eta**2) * eps)
    return x_t, z, w


def make(name, scanner, dtype, **overrides):
    operator, matrix = SCANNERS[scanner](dtype)
    truth = np.random.default_rng(1).normal(size=(DEPTH, ROWS, COLUMNS))
    y = torch.tensor(truth.reshape(DEPTH, -1) @ matrix.T).to(dtype).reshape(operator.range.shape)
    ref = Reference(operator, matrix, y)
    overrides = {"compat": "published", **{k.replace("__", "."): v for k, v in overrides.items()}}
    recipe = load_recipe(name, overrides)
    job = assemble(recipe, operator, y, Shrink(), spacing_mm=2.0, weights=torch.ones_like(y), seed=SEED)
    return job, ref


def relative(got, want):
    return np.linalg.norm(got - want) / np.linalg.norm(want)


def follow(job, step, to_reference, from_reference, limit):
    """Drive the loop and the reference side by side: from the same state at each step, and each on its own."""
    state = begin(job)
    own, last = to_reference(state.u, 0), state.u.clone()
    duals = own_duals = (np.zeros(own.shape), np.zeros(own.shape))
    count = 0
    for level in run(job, state):
        # the reference moves once per noise level, the package once per visit of the prior
        if level.kind == "step":
            before = to_reference(last, count)
        if not moved(job, level):
            continue
        single, *duals = step(count, before, *duals)
        own, *own_duals = step(count, own, *own_duals)
        count += 1
        last = state.u.clone()
        got = from_reference(state.u, count)
        assert relative(got, single) <= limit["step"], f"level {level.index}"
        assert relative(got, own) <= limit["run"], f"run up to level {level.index}"
    return count


def moved(job, level):
    """Whether this visit completes a noise level."""
    following = job.trajectory[level.index + 1] if not level.last else None
    return following is None or following.kind == "step"


LIMITS = {torch.float64: {"step": 1e-9, "run": 1e-7}, torch.float32: {"step": 1e-5, "run": 1e-3}}
CASES = [(s, d) for s in SCANNERS for d in LIMITS]
IDS = [f"{s}-{str(d)[6:]}" for s, d in CASES]


def vp_coordinates():
    abar, times = vp_tables()

    def to_reference(u, count):
        return u.double().numpy() * np.sqrt(abar[times[count]])

    def from_reference(u, count):
        return u.double().numpy() * (np.sqrt(abar[times[count]]) if count < len(times) else 1.0)

    return to_reference, from_reference


@pytest.mark.parametrize(("scanner", "dtype"), CASES, ids=IDS)
@pytest.mark.parametrize("form", ["krylov", "gamma"])
def test_dds(scanner, dtype, form):
    overrides, gamma = {}, None
    if form == "gamma":  # the form for noisy data, (I + gamma A^T A) x = x0 + gamma A^T y
        gamma = 1.7
        published = dict(load_recipe("dds").published)
        published.update({"consistency.kind": "proximal_cg", "consistency.rho_rule": "absolute"})
        overrides = {"published": published, "consistency__rho": 1 / gamma}
    job, ref = make("dds", scanner, dtype, **overrides)
    settings = {"rho": None, "gamma": gamma}
    step = lambda k, x, z, w: dds_step(ref, k, x, z, w, settings)  # noqa: E731
    assert follow(job, step, *vp_coordinates(), LIMITS[dtype]) == 50


@pytest.mark.parametrize(("scanner", "dtype"), CASES, ids=IDS)
def test_dds_tv(scanner, dtype):
    job, ref = make("dds_tv", scanner, dtype)
    rho = 0.0257 * ref.norm
    settings = {"rho": rho, "lam": 0.004 * rho}
    step = lambda k, x, z, w: dds_step(ref, k, x, z, w, settings)  # noqa: E731
    assert follow(job, step, *vp_coordinates(), LIMITS[dtype]) == 50


# 10 iterations nearly exhaust the small CT problem, where float32 conjugate gradients amplify rounding to 2e-4
@pytest.mark.parametrize(("scanner", "dtype"), CASES[:3], ids=IDS[:3])
def test_dds_iscs(scanner, dtype):
    job, ref = make("dds_iscs", scanner, dtype)
    sigmas = [5.0 * (0.01 / 5.0) ** (k / 29) for k in range(30)] + [0.0]

    def step(k, x, z, w):
        x0 = ref.cg(ref.normal, ref.back(), denoise(x, sigmas[k]), 10)
        anchors = philox_normal(SEED, k, 2, (ROWS, COLUMNS), dtype=torch.float64).numpy()
        a, b = anchors
        angle = np.arccos((a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b))
        t = np.arange(DEPTH)[:, None, None] / (DEPTH - 1)
        fresh = (np.sin((1 - t) * angle) * a + np.sin(t * angle) * b) / np.sin(angle)
        return x0 + sigmas[k + 1] * fresh, z, w

    same = lambda u, count: u.double().numpy().copy()  # noqa: E731
    # coefficients of the noise travel as float32
    limit = {name: max(value, 3e-7) for name, value in LIMITS[dtype].items()}
    assert follow(job, step, same, same, limit) == 30


@pytest.mark.parametrize(("scanner", "dtype"), CASES, ids=IDS)
def test_diffusionmbir(scanner, dtype):
    published = dict(load_recipe("diffusionmbir").published)
    published["trajectory.levels"] = 40
    job, ref = make("diffusionmbir", scanner, dtype, published=published)
    sigmas = [378.0 * (0.01 / 378.0) ** (k / 39) for k in range(40)] + [0.0]
    rho = 0.0257 * ref.norm

    def score(x, sigma):
        return (denoise(x, sigma) - x) / sigma**2

    def step(k, x, z, w):
        now, following = sigmas[k], sigmas[k + 1]
        change = now**2 - following**2
        x = x + change * score(x, now)
        if following:
            x = x + np.sqrt(change) * drawn(2 * k)
            fresh = drawn(2 * k + 1)
            s = score(x, now)  # the script asks at the level it came from

            def mean_norm(v):
                return np.linalg.norm(v.reshape(DEPTH, -1), axis=1).mean()

            h = 2 * (0.16 * mean_norm(fresh) / mean_norm(s)) ** 2
            x = x + h * s + np.sqrt(2 * h) * fresh
        x, z, w = ref.admm_sweep(x, z, w, rho, 0.004 * rho, 1)
        if not following:  # one SIRT step closes the run
            residual = ref.shape((ref.y - x.reshape(DEPTH, -1) @ ref.a.T) @ ref.a)
            weight = ref.normal(np.ones_like(x))
            x = x + residual / np.maximum(weight, 1e-6 * weight.max())
        return x, z, w

    same = lambda u, count: u.double().numpy().copy()  # noqa: E731
    assert follow(job, step, same, same, LIMITS[dtype]) == 40


def test_published_values_are_the_published_ones():
    """What the papers' scripts print, in the recipes' own units."""
    dds = load_recipe("dds", {"compat": "published"}).resolved()
    assert (dds.trajectory.grid, dds.trajectory.times, dds.trajectory.levels) == ("vp", "published", 50)
    assert (dds.renoise.eta, dds.renoise.convention, dds.consistency.iterations) == (0.85, "dds", 5)
    mbir = load_recipe("diffusionmbir", {"compat": "published"}).resolved()
    assert mbir.trajectory.levels == 2000 and mbir.consistency.iterations == 1 and mbir.renoise.snr == 0.16
    for name in ("dds_tv", "diffusionmbir"):
        tv = load_recipe(name, {"compat": "published"}).resolved().regulariser
        # rho = 10 and lambda = 0.04 against a normal operator of norm 388
        assert tv.rho == pytest.approx(10 / 388, rel=0.01) and tv.threshold == pytest.approx(0.04 / 10)
        assert tv.boundary == "periodic"
        assert load_recipe(name).regulariser.boundary == "neumann"


def test_drawn_angle_keeps_slices_near_unit_variance():
    key = noise.Slerp(3, 0, *(lambda k: (k.anchors, k.coefficients))(noise.iscs(9)), shape=(64, 64))
    z = key.at(4).draw((64, 64), torch.float64)
    assert ((z.flatten(1).std(1) - 1).abs() < 0.05).all()
    plain = noise.iscs(9, seed=3).at(4).draw((64, 64), torch.float64)
    assert 1e-6 < (z - plain).norm() / plain.norm() < 0.05

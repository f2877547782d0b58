"""Each published MRI recipe, step by step, against its equations written out in numpy on complex matrices."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from test_parity import LIMITS, SEED, denoise, relative, vp_tables
from toys import Shrink

from recon3d.engine.assemble import assemble
from recon3d.engine.loop import begin, run
from recon3d.operators.mri import CartesianMRI
from recon3d.ops.philox import philox_normal
from recon3d.recipes import load_recipe

DEPTH, ROWS, COLUMNS = 3, 6, 7


@pytest.fixture(autouse=True)
def one_thread():
    """Images of 42 pixels: on a busy machine threads wait for each other longer than they work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Parts(Shrink):
    """A real prior applied to both parts, as score-MRI does."""

    def denoise(self, u, sigma, cond=None):
        return torch.complex(super().denoise(u.real, sigma), super().denoise(u.imag, sigma))


def denoised(u, sigma):
    return denoise(u.real, sigma) + 1j * denoise(u.imag, sigma)


def drawn(level):
    z = philox_normal(SEED, level, DEPTH, (ROWS, COLUMNS, 2), dtype=torch.float64).numpy()
    return z[..., 0] + 1j * z[..., 1]


def centred_dft(n):
    k = np.arange(n) - n // 2
    return np.exp(-2j * np.pi * np.outer(k, k) / n) / np.sqrt(n)


class Reference:
    """One matrix per slice [coil ky kx, y x], data, and Hermitian conjugate gradients."""

    def __init__(self, maps, mask, y):
        dft = np.kron(centred_dft(ROWS), centred_dft(COLUMNS))
        rows = np.broadcast_to(mask, (ROWS, COLUMNS)).ravel()
        self.a = [np.concatenate([rows[:, None] * dft * coil.ravel() for coil in stack]) for stack in maps]
        self.y = [s.ravel() for s in y]
        self.norm = max(np.linalg.norm(a, 2) ** 2 for a in self.a)

    def each(self, function, *volumes):
        parts = [function(k, *(v[k].ravel() for v in volumes)) for k in range(DEPTH)]
        return np.stack(parts).reshape(DEPTH, ROWS, COLUMNS)

    def normal(self, x):
        return self.each(lambda k, v: self.a[k].conj().T @ (self.a[k] @ v), x)

    def residual(self, x):
        return self.each(lambda k, v: self.a[k].conj().T @ (self.y[k] - self.a[k] @ v), x)

    def replaced(self, x):
        return x + self.residual(x)

    def cg(self, apply, r, x, iterations):
        """Steps from x with residual r, one process over all of the volume."""
        p, rr = r.copy(), np.vdot(r, r).real
        for _ in range(iterations):
            q = apply(p)
            alpha = rr / np.vdot(p, q).real
            x, r = x + alpha * p, r - alpha * q
            rr, old = np.vdot(r, r).real, rr
            p = r + rr / old * p
        return x

    def krylov(self, x, iterations):
        """Slice by slice, as a 2D script runs."""

        def alone(k, v, r):
            return self.cg(lambda p: self.a[k].conj().T @ (self.a[k] @ p), r, v, iterations)

        return self.each(alone, x, self.residual(x))

    def sweep(self, x, z, w, rho, threshold, iterations):
        def d(v):
            return np.roll(v, -1, 0) - v

        def dt(v):
            return np.roll(v, 1, 0) - v

        r = self.residual(x) + rho * (dt(z - w) - dt(d(x)))
        x = self.cg(lambda v: self.normal(v) + rho * dt(d(v)), r, x, iterations)
        a = d(x) + w

        def shrunk(v):
            return np.sign(v) * np.maximum(np.abs(v) - threshold, 0)

        z = shrunk(a.real) + 1j * shrunk(a.imag)
        return x, z, w + d(x) - z


def make(name, dtype, coils=3, **overrides):
    generator = np.random.default_rng(2)
    maps = generator.normal(size=(DEPTH, coils, ROWS, COLUMNS, 2)) @ [1, 1j]
    maps /= np.sqrt((np.abs(maps) ** 2).sum(1, keepdims=True))
    if coils == 1:
        maps = np.ones_like(maps)
    mask = np.array([1, 0, 0, 1, 1, 0, 1.0])
    kind = torch.complex128 if dtype == torch.float64 else torch.complex64
    operator = CartesianMRI(torch.tensor(mask, dtype=dtype), torch.tensor(maps, dtype=kind))
    truth = torch.tensor(generator.normal(size=(DEPTH, ROWS, COLUMNS, 2)) @ [1, 1j]).to(kind)
    y = operator(truth)
    recipe = load_recipe(name, {"compat": "published", **{k.replace("__", "."): v for k, v in overrides.items()}})
    job = assemble(recipe, operator, y, Parts(), weights=torch.ones(1, 1, 1, 1, dtype=dtype), seed=SEED)
    return job, Reference(maps, mask, y.numpy().astype(np.complex128))


def numpy_of(u):
    return u.to(torch.complex128).numpy().copy()


def follow(job, step, scale, limit):
    """Loop and reference side by side: from the same state at every step, and each on its own; gives the steps."""
    if job.y.dtype == torch.complex64:  # rounding shows in a few steps; the whole run is followed in double
        job.trajectory = job.trajectory[:12]
    state = begin(job)
    last, own = numpy_of(state.u), numpy_of(state.u) * scale(0)
    duals = own_duals = (np.zeros(last.shape), np.zeros(last.shape))
    count = 0
    for level in run(job, state):
        following = job.trajectory[level.index + 1 :]
        if following and following[0].kind != "step":
            continue  # a corrector is still to come
        single, *duals = step(count, last * scale(count), *duals)
        own, *own_duals = step(count, own, *own_duals)
        count += 1
        last = numpy_of(state.u)
        assert relative(last * scale(count), single) <= limit["step"], f"level {level.index}"
        assert relative(last * scale(count), own) <= limit["run"], f"run up to level {level.index}"
    return count if job.y.dtype == torch.complex128 else None


def vp_step(times, correct, eta=0.85):
    """x_t at a time -> x_t at the next, with a data step on the estimate."""
    abar, _ = vp_tables()

    def step(k, x_t, z, w):
        now = abar[times[k]]
        following = abar[times[k + 1]] if k + 1 < len(times) else 1.0
        sigma = np.sqrt((1 - now) / now)
        eps = (x_t / np.sqrt(now) - denoised(x_t / np.sqrt(now), sigma)) / sigma
        x0, z, w = correct((x_t - np.sqrt(1 - now) * eps) / np.sqrt(now), z, w)
        noise = eta * drawn(k) + np.sqrt(1 - eta**2) * eps
        return np.sqrt(following) * x0 + np.sqrt(1 - following) * noise, z, w

    return step, lambda count: np.sqrt(abar[times[count]]) if count < len(times) else 1.0


DTYPES = pytest.mark.parametrize("dtype", list(LIMITS), ids=str)


@DTYPES
def test_dds_mri(dtype):
    job, ref = make("dds_mri", dtype)
    step, scale = vp_step(list(range(0, 1000, 20))[::-1], lambda x, z, w: (ref.krylov(x, 5), z, w))
    assert follow(job, step, scale, LIMITS[dtype]) in (50, None)


@DTYPES
def test_dds_mri_for_noisy_data(dtype):
    """(I + gamma A^H A) x = x0 + gamma A^H y, the equation that the published script gets wrong."""
    gamma = 1.7
    published = dict(load_recipe("dds_mri").published)
    published.update({"consistency.kind": "proximal_cg", "consistency.rho_rule": "absolute"})
    job, ref = make("dds_mri", dtype, published=published, consistency__rho=1 / gamma, consistency__iterations=5)

    def correct(x, z, w):
        def alone(k, v, r):
            a = ref.a[k]
            return ref.cg(lambda p: p + gamma * (a.conj().T @ (a @ p)), gamma * r, v, 5)

        return ref.each(alone, x, ref.residual(x)), z, w

    step, scale = vp_step(list(range(0, 1000, 20))[::-1], correct)
    assert follow(job, step, scale, LIMITS[dtype]) in (50, None)


@DTYPES
def test_dds_mri_tv(dtype):
    job, ref = make("dds_mri_tv", dtype)
    rho = 0.0257 * job.operator.norm()
    assert job.operator.norm() == pytest.approx(ref.norm, rel=0.05)  # power iteration, from below
    step, scale = vp_step(
        list(range(0, 1000, 20))[::-1], lambda x, z, w: ref.sweep(x, z, w, rho, 0.004, 5)
    )  # fmt: skip
    assert follow(job, step, scale, LIMITS[dtype]) in (50, None)


@DTYPES
@pytest.mark.parametrize("coils", [1, 3])
def test_ddnm_mri(dtype, coils):
    job, ref = make("ddnm_mri", dtype, coils)
    step, scale = vp_step(list(range(0, 1000, 10))[::-1], lambda x, z, w: (ref.replaced(x), z, w))
    assert follow(job, step, scale, LIMITS[dtype]) in (100, None)


def test_with_one_coil_the_measured_samples_are_replaced_exactly():
    job, ref = make("ddnm_mri", torch.float64, 1)
    x = torch.complex(
        *torch.randn(2, DEPTH, ROWS, COLUMNS, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    )
    got = job.consistency.step(x, job.y, job.operator, job.trajectory[0], {})
    mask = job.operator.mask[:, None]
    from recon3d.operators.fourier import centred_fft

    before, after = centred_fft(x), centred_fft(got)
    assert (after * mask[:, 0] - job.y[:, 0]).norm() < 1e-12 * job.y.norm()
    assert ((after - before) * (1 - mask[:, 0])).norm() < 1e-12 * before.norm()
    assert ref.norm == pytest.approx(1.0)


@DTYPES
@pytest.mark.parametrize("coils", [1, 3])
def test_score_mri(dtype, coils):
    published = dict(load_recipe("score_mri").published)
    published["trajectory.levels"] = 40
    job, ref = make("score_mri", dtype, coils, published=published)
    sigmas = [378.0 * (0.01 / 378.0) ** (k / 39) for k in range(40)] + [0.0]

    def score(x, sigma):
        return (denoised(x, sigma) - x) / sigma**2

    def norms(v):
        return np.linalg.norm(v.reshape(DEPTH, -1), axis=1)[:, None, None]

    def step(k, x, z, w):
        now, following = sigmas[k], sigmas[k + 1]
        change = now**2 - following**2
        x = x + change * score(x, now)
        if following:
            x = ref.replaced(x + np.sqrt(change) * drawn(2 * k))
            fresh, s, moved = drawn(2 * k + 1), score(x, now), []
            for part in (np.real, np.imag):  # each with a step length of its own
                h = 2 * (0.16 * norms(part(fresh)) / norms(part(s))) ** 2
                moved.append(part(x) + h * part(s) + np.sqrt(2 * h) * part(fresh))
            x = moved[0] + 1j * moved[1]
        return ref.replaced(x), z, w

    assert follow(job, step, lambda count: 1.0, LIMITS[dtype]) in (40, None)


def test_published_values_are_the_published_ones():
    score = load_recipe("score_mri", {"compat": "published"}).resolved()
    assert (score.trajectory.levels, score.renoise.snr, score.renoise.norms) == (2000, 0.16, "part")
    assert score.consistency.on == "iterate" and score.consistency.kind == "projection"
    ddnm = load_recipe("ddnm_mri", {"compat": "published"}).resolved()
    assert (ddnm.trajectory.levels, ddnm.renoise.eta, ddnm.renoise.convention) == (100, 0.85, "dds")
    dds = load_recipe("dds_mri", {"compat": "published"}).resolved()
    assert (dds.trajectory.levels, dds.consistency.kind, dds.consistency.iterations) == (50, "krylov", 5)

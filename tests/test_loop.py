"""The loop: deterministic, restartable between any two levels, fixed in memory, and right where the answer is known."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from toys import MatrixOperator, Shrink

from recon3d import noise
from recon3d.consistency import Identity, Projection, Rho, Solve, conjugate_gradients
from recon3d.engine.assemble import assemble
from recon3d.engine.executor import NonFiniteError, check_finite
from recon3d.engine.loop import Job, begin, reconstruct, run
from recon3d.geometry import ParallelBeam, VolumeGrid
from recon3d.operators.ct import CTOperator
from recon3d.planes import Axial
from recon3d.recipes import load_recipe, recipe_names
from recon3d.regularisers import TVz
from recon3d.renoise import DDIM, Ancestral, Full, Renoise
from recon3d.trajectory import descend, karras

DEPTH, ROWS, COLUMNS, RAYS = 5, 6, 7, 20


def scanner(depth=DEPTH, rays=RAYS, dtype=torch.float32):
    generator = torch.Generator().manual_seed(3)
    matrix = torch.randn(rays, ROWS * COLUMNS, generator=generator, dtype=torch.float64) / 5
    return MatrixOperator(matrix.to(dtype), (depth, ROWS, COLUMNS))


def measured(operator, seed=4):
    x = torch.randn(operator.domain.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x = x.to(operator.domain.dtype)
    return x, operator(x)


def a_job(recipe="dds_tv", seed=7, depth=DEPTH, **overrides):
    operator = scanner(depth)
    _, y = measured(operator)
    overrides = {k.replace("__", "."): v for k, v in overrides.items()}
    return assemble(
        load_recipe(recipe, overrides),
        operator,
        y,
        Shrink(),
        spacing_mm=2.0,
        weights=torch.full_like(y, 4.0),
        seed=seed,
    )


# counts, and operators whose singular values are known, have tests of their own
GAUSSIAN = [n for n in recipe_names() if not n.startswith("pet") and load_recipe(n).consistency.noise == "ignored"]
SMALL = {
    "posterior": {"trajectory__levels": 3, "trajectory__inner": 2},
    "diffusionmbir": {"trajectory__levels": 4},
    "score_mri": {"trajectory__levels": 4},
}


@pytest.mark.parametrize("name", GAUSSIAN)
def test_every_recipe_runs_and_repeats(name):
    small = SMALL.get(name, {"trajectory__levels": 6})
    first, second = (reconstruct(a_job(name, **small)) for _ in range(2))
    assert torch.equal(first, second) and first.isfinite().all()
    assert not torch.equal(first, reconstruct(a_job(name, seed=8, **small)))


@pytest.mark.parametrize("name", GAUSSIAN)
def test_resumes_to_the_same_bits_from_any_level(name):
    small = SMALL.get(name, {"trajectory__levels": 4})
    whole = reconstruct(a_job(name, **small))
    job = a_job(name, **small)
    state = begin(job)
    for level in run(job, state):
        saved = dataclasses.replace(state, u=state.u.clone(), duals={k: v.clone() for k, v in state.duals.items()})
        again = a_job(name, **small)  # a new process has nothing but the saved state
        for _ in run(again, saved):
            pass
        assert torch.equal(saved.u, whole), f"differs when resumed after level {level.index}"


def test_state_of_another_seed_is_refused():
    with pytest.raises(ValueError, match="seed 7"):
        list(run(a_job(seed=8), begin(a_job(seed=7))))


@pytest.mark.parametrize("name", ["dds", "diffusionmbir"])
def test_slices_do_not_depend_on_how_views_are_grouped(name):
    job = a_job(name, trajectory__levels=4)
    grouped = dataclasses.replace(a_job(name, trajectory__levels=4), planes=Axial(DEPTH, 3))
    assert torch.allclose(reconstruct(job), reconstruct(grouped), rtol=1e-5, atol=1e-6)


def test_per_slice_recipe_leaves_slices_independent():
    """Without coupling, slice k of a stack equals slice k when its neighbours' data change."""
    job = a_job("dds", trajectory__levels=4)
    changed = a_job("dds", trajectory__levels=4)
    changed.y = changed.y.clone()
    changed.y[0] *= 3
    a, b = reconstruct(job), reconstruct(changed)
    assert torch.allclose(a[1:], b[1:], rtol=1e-5, atol=1e-6) and not torch.allclose(a[0], b[0])


def test_identity_prior_and_krylov_reproduce_conjugate_gradients():
    operator = scanner()
    _, y = measured(operator)

    class Nothing:
        offset, scale = 0.0, 1.0

        def denoise(self, u, sigma, cond=None):
            return torch.zeros_like(u)

    job = Job(
        operator, y, Nothing(), descend([1.0]), Axial(DEPTH), Solve(iterations=7), Renoise(DDIM()),
        noise.independent(DEPTH),
    )  # fmt: skip
    zero = torch.zeros(operator.domain.shape)
    want = conjugate_gradients(operator.normal, zero, operator.adjoint(y), 7, True)
    assert torch.allclose(reconstruct(job), want, rtol=1e-6, atol=1e-7)


def test_constant_stack_is_untouched_by_tv():
    operator = scanner()
    x = torch.randn(1, ROWS, COLUMNS, generator=torch.Generator().manual_seed(1)).expand(DEPTH, -1, -1).contiguous()
    part = Solve(3, tvz=TVz(0.1), rho_z_rel=0.5)
    state = {}
    level = descend([1.0])[0]
    for _ in range(3):
        got = part.step(x, operator(x), operator, level, state)
        assert torch.allclose(got, x, atol=1e-5)
    assert state["tvz_dual"].abs().max() < 1e-5


def test_proximal_solution_is_the_closed_form():
    operator = scanner(dtype=torch.float64)
    x, y = measured(operator)
    weights = torch.linspace(0.5, 2.0, RAYS, dtype=torch.float64).expand_as(y)
    level = descend([0.7])[0]
    got = Solve(200, rho=Rho("bayes", 1.0, prior_std=2.0), weights=weights).step(0 * x, y, operator, level, {})
    a = operator.matrix
    rho = 1 / 0.7**2 + 1 / 2.0**2
    matrix = a.T @ (weights[0, 0][:, None] * a) + rho * torch.eye(ROWS * COLUMNS, dtype=torch.float64)
    want = torch.linalg.solve(matrix, ((weights * y)[:, 0] @ a).T).T.reshape(x.shape)
    assert (got - want).norm() < 1e-9 * want.norm()


def ct_scanner(depth=3):
    beam = ParallelBeam(tuple(math.pi * (k + 0.5) / 12 for k in range(12)), 41, 1.0)
    return CTOperator(beam, VolumeGrid((depth, 28, 27), (2.0, 1.0, 1.0)))


@pytest.mark.parametrize("uniform", [True, False])
def test_preconditioner_reaches_the_same_solution_sooner(uniform):
    operator = ct_scanner()
    generator = torch.Generator().manual_seed(2)
    y = torch.randn(operator.range.shape, generator=generator, dtype=torch.float64)
    weights = torch.ones(1, 1, 1, dtype=torch.float64)
    if not uniform:  # rays through the middle are dark, as in a patient
        u = torch.linspace(-1, 1, 41, dtype=torch.float64)
        weights = (3 * u**2).exp().expand(operator.range.shape).contiguous()
    x0 = torch.randn(operator.domain.shape, generator=generator, dtype=torch.float64)
    level = descend([0.3])[0]

    def solve(iterations, precondition):
        part = Solve(iterations, rho=Rho("bayes", 1.0), weights=weights, precondition=precondition)
        return part.step(x0, y, operator, level, {})

    exact = solve(400, False)
    gap = {(n, p): (solve(n, p) - exact).norm() / (exact - x0).norm() for n in (5, 10, 200) for p in (False, True)}
    assert gap[200, True] < 1e-9
    assert gap[5, True] < 0.6 * gap[5, False] and gap[10, True] < 0.5 * gap[10, False], gap
    with pytest.raises(ValueError, match="null space"):
        Solve(5, precondition=True)


@pytest.mark.parametrize("rho_z", [0.01, 0.05, 1.0])
def test_preconditioner_bears_tv_along_z(rho_z):
    """Coupling along z, which a filter in the plane cannot undo: the same solution, never later than without."""
    operator = ct_scanner(6)
    generator = torch.Generator().manual_seed(2)
    y = torch.randn(operator.range.shape, generator=generator, dtype=torch.float64)
    x0 = torch.randn(operator.domain.shape, generator=generator, dtype=torch.float64)

    def solve(iterations, precondition):
        part = Solve(
            iterations, rho=Rho("bayes", 1.0), tvz=TVz(0.1), rho_z_rel=rho_z, weights=torch.ones(1, 1, 1),
            precondition=precondition,
        )  # fmt: skip
        return part.step(x0, y, operator, descend([1.0])[0], {})

    exact = solve(400, False)
    assert (solve(400, True) - exact).norm() < 1e-6 * exact.norm()
    for n in (5, 10, 20):
        assert (solve(n, True) - exact).norm() < (solve(n, False) - exact).norm()


def test_threads_do_not_change_a_bit():
    operator = ct_scanner(5)
    generator = torch.Generator().manual_seed(2)
    y = torch.randn(operator.range.shape, generator=generator)
    weights = torch.rand(operator.range.shape, generator=generator)
    images, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            recipe = load_recipe("ct", {"trajectory.levels": 4})
            images.append(reconstruct(assemble(recipe, operator, y, Shrink(), weights=weights)))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(images[0], images[1]) and torch.equal(images[0], images[2])


def test_preconditioned_slices_are_independent():
    """The probes are shared, so a slice depends on its own data and weights and nothing else."""
    operator = ct_scanner()
    y = torch.randn(operator.range.shape, generator=torch.Generator().manual_seed(2))
    x0 = torch.zeros(operator.domain.shape)
    part = Solve(5, rho=Rho("bayes", 1.0), weights=torch.ones(1, 1, 1), precondition=True)
    a = part.step(x0, y, operator, descend([0.3])[0], {})
    y[0] *= 2
    b = part.step(x0, y, operator, descend([0.3])[0], {})
    assert torch.equal(a[1:], b[1:]) and not torch.equal(a[0], b[0])


def test_krylov_leaves_the_null_space_to_the_prior():
    operator = scanner(rays=9, dtype=torch.float64)
    x, y = measured(operator)
    x0 = x + torch.randn(x.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    got = Solve(60).step(x0, y, operator, descend([1.0])[0], {})
    seen = torch.linalg.pinv(operator.matrix) @ operator.matrix
    unseen = torch.eye(ROWS * COLUMNS, dtype=torch.float64) - seen
    assert ((got - x0).flatten(1) @ unseen).norm() < 1e-9
    assert (operator(got) - y).norm() < 1e-6 * y.norm()
    projected = Projection().step(x0, y, operator, descend([1.0])[0], {})
    assert (got - projected).norm() < 1e-6 * x.norm()


def test_strengths_do_not_depend_on_the_operators_scale():
    operator = scanner(dtype=torch.float64)
    x, y = measured(operator)
    other = MatrixOperator(operator.matrix * 37.0, operator.domain.shape)
    level = descend([0.5])[0]
    for part in (
        lambda: Solve(4, rho=Rho("relative", 0.1)),
        lambda: Solve(4, rho=Rho("growing", 0.1, sigma_ref=2.0)),
        lambda: Solve(4, tvz=TVz(0.1), rho_z_rel=0.2),
    ):
        states = {}, {}
        a = part().step(0.5 * x, y, operator, level, states[0])
        b = part().step(0.5 * x, 37.0 * y, other, level, states[1])
        assert (a - b).norm() < 1e-9 * a.norm()


def test_strengths_follow_the_priors_unit():
    """A prior in other units (scale 1000) gives the same image in those units."""
    operator = scanner(dtype=torch.float64)
    _, y = measured(operator)
    images = []
    for scale in (1.0, 1000.0):

        class Scaled(Shrink):
            def denoise(self, u, sigma, cond=None):
                return self.scale * super().denoise(u / self.scale, sigma / self.scale)

        prior = Scaled()
        prior.scale = scale
        recipe = load_recipe("dds_tv", {"trajectory.levels": 5})
        job = assemble(recipe, operator, y * scale, prior, spacing_mm=2.0, seed=1)
        images.append(reconstruct(job) / scale)
    assert (images[0] - images[1]).norm() < 1e-9 * images[0].norm()


@pytest.mark.parametrize("rule", [DDIM(0.85, "dds"), DDIM(1.0), Ancestral(), Ancestral("large"), Full()])
def test_last_step_adds_no_noise(rule):
    job = dataclasses.replace(a_job("dds", trajectory__levels=3), renoise=Renoise(rule), consistency=Identity())
    state = begin(job)
    *_, _ = run(job, dataclasses.replace(state, u=state.u.clone()))
    seen = {}

    class Watch(Shrink):
        def denoise(self, u, sigma, cond=None):
            seen[sigma] = super().denoise(u, sigma)
            return seen[sigma]

    job.prior, job.planes = Watch(), Axial(DEPTH, DEPTH)
    image = reconstruct(job)
    assert len(seen) == 3
    assert torch.equal(image, seen[min(seen)][:, 0])


def test_not_a_number_is_named():
    job = a_job("dds", trajectory__levels=4)
    job.check = check_finite

    class Broken(Shrink):
        calls = 0

        def denoise(self, u, sigma, cond=None):
            Broken.calls += 1
            x0 = super().denoise(u, sigma)
            return x0 / 0 if Broken.calls == 2 * DEPTH + 4 else x0

    job.prior = Broken()
    with pytest.raises(NonFiniteError, match=r"slice 3 .* the prior at level 2"):
        reconstruct(job)


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("name", GAUSSIAN)
def test_one_slice_and_two(name, depth):
    assert reconstruct(a_job(name, depth=depth, **SMALL.get(name, {"trajectory__levels": 3}))).isfinite().all()


def test_one_ray_and_zero_data():
    operator = scanner(rays=1)
    y = torch.zeros(operator.range.shape)
    for name in ("dds", "dds_tv", "ct"):
        recipe = load_recipe(name, {"trajectory.levels": 3, "start.image": "cg"})
        job = assemble(recipe, operator, y, Shrink(), weights=torch.ones_like(y))
        assert reconstruct(job).isfinite().all()


def test_memory_does_not_grow_with_levels():
    """Live volume-sized storages, counted after every operation, peak at one number whatever the levels."""
    import weakref

    from torch.utils._python_dispatch import TorchDispatchMode

    class Counting(TorchDispatchMode):
        most = 0

        def __init__(self):
            super().__init__()
            self.seen = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for t in out if isinstance(out, (tuple, list)) else (out,):
                if isinstance(t, torch.Tensor) and t.numel() == DEPTH * ROWS * COLUMNS:
                    self.seen.append(weakref.ref(t))
            alive = [t for t in (ref() for ref in self.seen) if t is not None]
            self.seen = [weakref.ref(t) for t in alive]
            self.most = max(self.most, len({t.untyped_storage().data_ptr() for t in alive}))
            return out

    peak = {}
    for n in (4, 16):
        job = a_job("dds_tv", trajectory__levels=n)
        with Counting() as counter:
            reconstruct(job)
        peak[n] = counter.most
    # u, x0, x, r, p, A p, the three of TV, and the temporaries of references
    assert 5 <= peak[4] == peak[16] <= 12, peak


def test_hot_start_images():
    operator = scanner(dtype=torch.float64)
    x, y = measured(operator)
    truth = torch.linalg.pinv(operator.matrix) @ operator.matrix @ x.flatten(1).T
    for image in ("pinv", "cg"):
        recipe = load_recipe("dds", {"start.image": image, "start.iterations": 100, "trajectory.levels": 3})
        job = assemble(recipe, operator, y, Shrink(), seed=3)
        job.trajectory = descend(karras(3, 1e-9, 1e-10))
        assert (begin(job).u.flatten(1).T - truth).norm() < 1e-6 * truth.norm()


def test_posterior_needs_a_noise_model():
    operator = scanner()
    _, y = measured(operator)
    for name in ("ct", "posterior"):
        with pytest.raises(ValueError, match="noise model"):
            assemble(load_recipe(name), operator, y, Shrink())
    with pytest.raises(ValueError, match="range"):
        assemble(load_recipe("dds"), operator, y[:2], Shrink())


def test_a_solved_slice_stays_while_its_neighbour_goes_on():
    # slice 0 is easy (one eigenvalue), slice 1 hard; with a tolerance the easy one equals itself alone, bit for bit
    torch.manual_seed(0)
    spectrum = torch.stack([torch.full((6, 6), 2.0), torch.logspace(0, 3, 36).reshape(6, 6)])
    calls = []

    def apply(p):
        calls.append(1)
        return spectrum[: len(p)] * p

    b = torch.randn(2, 6, 6)
    both = conjugate_gradients(apply, torch.zeros(2, 6, 6), b.clone(), 25, True, tolerance=1e-2)
    used = len(calls)
    alone = conjugate_gradients(apply, torch.zeros(1, 6, 6), b[:1].clone(), 25, True, tolerance=1e-2)
    assert torch.equal(both[:1], alone) and len(calls) == used + 1 and 3 < used <= 25
    residual = (b - spectrum * both).flatten(1).norm(dim=1) / b.flatten(1).norm(dim=1)
    assert (residual <= 1e-2).all() or used == 25


PLAIN = {"regulariser__kind": "none", "trajectory__polish": None}  # what a flow goes with
FLOWS = {"heun": {"renoise__kind": "heun"}, "rk45": {"renoise__kind": "rk45", "renoise__rtol": 0.1}}


@pytest.mark.parametrize("name", ["ct", "dds", "ddnm_mri", "sample"])
@pytest.mark.parametrize("kind", FLOWS)
def test_a_flow_with_data_resumes_between_any_two_visits(name, kind):
    """The data term acts at every visit of a step, and a run goes on in the middle of one."""
    small = {"trajectory__levels": 3, **PLAIN, **FLOWS[kind]}
    whole = reconstruct(a_job(name, **small))
    job = a_job(name, **small)
    state = begin(job)
    for level in run(job, state):
        if level.index % 3 == 1:
            saved = dataclasses.replace(state, u=state.u.clone(), duals={k: v.clone() for k, v in state.duals.items()})
            for _ in run(a_job(name, **small), saved):
                pass
            assert torch.equal(saved.u, whole), f"differs when resumed after visit {level.index}"
    assert whole.isfinite().all()


@pytest.mark.parametrize("recipe", ["ct", "dds"])
def test_heun_and_adaptive_steps_end_where_many_euler_steps_do(recipe):
    """One flow, of the estimate that the data agree with, whichever rule follows it."""
    solved = {**PLAIN, "consistency__iterations": 10, "trajectory__sigma_max": 1.0, "trajectory__levels": 10}
    euler = {"renoise__kind": "ddim", "renoise__eta": 0.0, "renoise__direction": "corrected"}
    dense = reconstruct(a_job(recipe, **{**solved, **euler, "trajectory__levels": 150}))
    coarse = reconstruct(a_job(recipe, **{**solved, **euler}))
    gaps = [float((coarse - dense).norm() / dense.norm())]
    for kind in ({"renoise__kind": "heun"}, {"renoise__kind": "rk45", "renoise__rtol": 1e-3, "renoise__atol": 1e-3}):
        gaps.append(float((reconstruct(a_job(recipe, **solved, **kind)) - dense).norm() / dense.norm()))
    assert gaps[1] < 0.4 * gaps[0] and gaps[2] < 0.4 * gaps[0], gaps


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("score_mri", {"compat": "published", "renoise__kind": "heun"}, "correctors"),
        ("dds", {"consistency__on": "iterate", "renoise__kind": "heun"}, "on estimate"),
        ("dds_tv", {"renoise__kind": "rk45"}, "without EM and regularisers"),
        ("sample", {"trajectory__polish": 0.005, "renoise__kind": "rk45"}, "polish"),
        ("dds", {"trajectory__travel_repeats": 1, "renoise__kind": "heun"}, "time travel"),
        ("dds", {"trajectory__travel_repeats": 1, "trajectory__correctors": 1}, "plain steps"),
        ("pet", {"trajectory__polish": None, "renoise__kind": "heun"}, "same planes"),
        ("pet_dps", {"consistency__step": "objective", "renoise__kind": "heun"}, "curvature"),
        ("dds", {"renoise__kind": "rk45", "renoise__rtol": 0.0, "renoise__atol": 0.0}, "cannot both be 0"),
    ],
)
def test_settings_that_do_not_go_together_get_a_sentence(name, overrides, message):
    with pytest.raises(ValueError, match=message):
        load_recipe(name, {k.replace("__", "."): v for k, v in overrides.items()}).resolved()


def test_a_step_too_long_for_euler_maruyama_is_told_before_the_run():
    with pytest.raises(ValueError, match="take more levels"):
        a_job("sample", renoise__kind="em", trajectory__levels=5)
    assert reconstruct(a_job("sample", renoise__kind="em", trajectory__levels=12)).isfinite().all()


def test_time_travel_by_settings():
    job = a_job("dds", trajectory__levels=9, trajectory__travel_length=4, trajectory__travel_repeats=2)
    assert len(job.trajectory) == 9 + 2 * 4 * 2
    assert reconstruct(job).isfinite().all()

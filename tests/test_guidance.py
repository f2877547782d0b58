"""Gradient steps on the likelihood: carried back through the prior exactly, the same on any machine, restartable."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from test_executor import Network, Slices, volume
from toys import MatrixOperator

from recon3d.consistency import Gradient, Guidance, Visit
from recon3d.consistency.gradient import poisson_misfit
from recon3d.engine.assemble import assemble
from recon3d.engine.executor import Executor, Interrupted, NonFiniteError
from recon3d.engine.loop import InProcess, begin, reconstruct, run
from recon3d.planes import Axial
from recon3d.priors.base import differentiable
from recon3d.priors.gaussian import ComplexGaussianPrior, GaussianPrior, power_law
from recon3d.recipes import Recipe
from recon3d.trajectory import descend

DEPTH, ROWS, COLUMNS, RAYS = 3, 5, 6, 18
LEVEL = descend([0.7, 0.4])[0]
RECIPE = {
    "name": "guided",
    "start": {"image": "pinv"},
    "trajectory": {"levels": 5, "sigma_max": 1.0, "sigma_min": 0.05},
    "consistency": {"kind": "gradient", "strength": 0.5},
    "renoise": {"kind": "ddim", "eta": 0.5},
}


class Counts(MatrixOperator):
    """Ten rays a slice as views of a volume's scanner: expected counts c A x + b, in subsets."""

    coupling = "volume"

    def __init__(self, matrix, shape, additive):
        super().__init__(matrix, shape)
        self.additive = additive
        self.range = dataclasses.replace(self.range, shape=(matrix.shape[0], shape[0]))

    def forward(self, x):
        return super().forward(x).squeeze(-2).mT.contiguous()

    def adjoint(self, y):
        return super().adjoint(y.mT.unsqueeze(-2))

    def expected(self, x):
        return self.forward(x) + self.additive

    def sensitivity(self):
        return self.adjoint(torch.ones(self.range.shape, dtype=self.domain.dtype))

    def pinv(self, y):
        return super().pinv((y - self.additive).mT.unsqueeze(-2))

    def subsets(self, n):
        parts = []
        for k in range(n):
            index = torch.arange(k, self.matrix.shape[0], n)
            parts.append((Counts(self.matrix[index], self.domain.shape, self.additive[index]), index))
        return parts


def counting(dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    matrix = torch.rand(RAYS, ROWS * COLUMNS, generator=generator, dtype=torch.float64).to(dtype)
    additive = torch.rand(RAYS, DEPTH, generator=generator, dtype=torch.float64).to(dtype)
    operator = Counts(matrix, (DEPTH, ROWS, COLUMNS), additive)
    truth = torch.rand(DEPTH, ROWS, COLUMNS, generator=generator, dtype=torch.float64).to(dtype)
    y = torch.poisson(operator.expected(truth), generator=generator)
    return operator, truth, y


def prior(dtype=torch.float64):
    return GaussianPrior(power_law((ROWS, COLUMNS), 0.4), 0.5)


def jacobian(sigma):
    c = prior().covariance()
    return c @ torch.linalg.inv(c + sigma**2 * torch.eye(len(c), dtype=torch.float64))


def test_pull_is_the_transposed_jacobian():
    generator = torch.Generator().manual_seed(2)
    u, v = torch.randn(2, DEPTH, ROWS, COLUMNS, generator=generator, dtype=torch.float64)
    views = Axial(DEPTH).views(LEVEL)
    got = InProcess().pull(prior(), Axial(DEPTH), u, views, 0.7, v)
    want = (v.flatten(1) @ jacobian(0.7)).reshape(v.shape)
    assert (got - want).norm() < 1e-10 * want.norm()
    # complex slices: both parts
    part = ComplexGaussianPrior(power_law((ROWS, COLUMNS), 0.4))
    got = InProcess().pull(part, Axial(DEPTH), torch.complex(u, v), views, 0.7, torch.complex(v, u))
    want = torch.complex(v.flatten(1) @ jacobian(0.7), u.flatten(1) @ jacobian(0.7)).reshape(v.shape)
    assert (got - want).norm() < 1e-10 * want.norm()


def test_a_network_is_pulled_through_alike_in_any_batch():
    u, net = volume(), Network()
    v = torch.randn(u.shape, generator=torch.Generator().manual_seed(3))
    views, outputs = list(range(len(u))), []
    for batch, workers in ((1, 1), (3, 2), (8, 2)):
        with Executor(batch, workers) as executor:
            outputs.append(executor.pull(net, Slices(), u, views, 0.5, v))
            x0 = executor.denoise(net, Slices(), u, views, 0.5)
    assert all(torch.equal(outputs[0], x) for x in outputs)
    # <J du, v> = <du, J^T v> by a difference
    du = 1e-3 * torch.randn(u.shape, generator=torch.Generator().manual_seed(4))
    with Executor(1, 1) as executor:
        change = executor.denoise(net, Slices(), u + du, views, 0.5) - x0
    assert float((change * v).sum()) == pytest.approx(float((du * outputs[0]).sum()), rel=0.02)


def test_the_packaged_networks_differentiate_and_only_when_asked():
    from recon3d.priors import load_prior
    from recon3d.priors.complex import complex_prior

    ct = load_prior("ct", precision="float32")
    u = ct.offset + 0.1 * ct.scale * torch.randn(2, 16, 16, generator=torch.Generator().manual_seed(1))
    v = torch.randn(u.shape, generator=torch.Generator().manual_seed(2))
    with Executor(1, 1) as executor:
        with pytest.raises(ValueError, match="records no gradients"):
            executor.pull(ct, Axial(2), u, Axial(2).views(LEVEL), 0.1 * ct.scale, v)
        able = differentiable(ct)
        got = executor.pull(able, Axial(2), u, Axial(2).views(LEVEL), 0.1 * ct.scale, v)
    assert not ct.differentiable and able.differentiable and able._net is ct._net
    assert 0 < got.norm() < 2 * v.norm()
    mr = complex_prior(load_prior("mr"), 2.0)
    assert differentiable(mr).prior.differentiable and not mr.prior.differentiable
    oracle = prior()
    assert differentiable(oracle) is oracle


def test_a_step_through_the_prior_is_the_published_one():
    """x0 - strength / L grad_u L, against the chain rule written out in numpy; the argument clamped, the state not."""
    operator, _, y = counting()
    u = torch.randn(DEPTH, ROWS, COLUMNS, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    x0 = prior().denoise(u[:, None], 0.7)[:, 0]
    views = Axial(DEPTH).views(LEVEL)
    visit = Visit(u, lambda v: InProcess().pull(prior(), Axial(DEPTH), u, views, 0.7, v))
    a, b, counts = operator.matrix.numpy(), operator.additive.numpy(), y.numpy()
    seen = np.maximum(x0.numpy(), 0).reshape(DEPTH, -1)
    expected = seen @ a.T + b.T
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = np.where(counts.T > 0, counts.T * np.log(counts.T / expected), 0)
    misfit = (expected - counts.T + logs).sum()
    gradient = (1 - counts.T / expected) @ a
    value, found = poisson_misfit(operator, y, x0.clamp_min(0))
    assert value == pytest.approx(misfit) and np.allclose(found.reshape(DEPTH, -1), gradient)
    masked = np.where((x0.numpy().reshape(DEPTH, -1) < 0) & (gradient > 0), 0, gradient)
    shift = masked @ jacobian(0.7).numpy()
    state: dict[str, torch.Tensor] = {}
    step = Gradient(3.0, "prior", "objective", True, scale=0.5)
    assert isinstance(step, Guidance)
    got = step.guide(x0, y, operator, LEVEL, state, visit)
    assert np.allclose(got.reshape(DEPTH, -1), x0.reshape(DEPTH, -1).numpy() - 3.0 * 0.25 / misfit * shift)
    assert int(state["gradient_subset"]) == 1 and state["gradient_subset"].dtype == torch.int64
    # at the state: no prior is asked, and a state below zero stays below zero
    naive = Gradient(1e-3, "state", "variance", True)
    got = naive.guide(x0, y, operator, LEVEL, {}, Visit(u, lambda v: pytest.fail("the prior was asked")))
    _, at_state = poisson_misfit(operator, y, u.clamp_min(0))
    at_state = torch.where((u < 0) & (at_state > 0), 0.0, at_state)
    assert torch.allclose(got, x0 - 1e-3 * (0.7**2 - 0.4**2) * at_state)


def test_curvature_bounds_the_step_whatever_the_counts():
    """A thousand times the counts or a vanishing noise level never throw the estimate further than it can be wrong."""
    operator, truth, y = counting()
    views = Axial(DEPTH).views(LEVEL)
    u = truth + 0.7 * torch.randn(truth.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    x0 = prior().denoise(u[:, None], 0.7)[:, 0]
    visit = Visit(u, lambda v: InProcess().pull(prior(), Axial(DEPTH), u, views, 0.7, v))
    for factor in (1.0, 1e3):
        loud = Counts(operator.matrix * factor, operator.domain.shape, operator.additive * factor)
        got = Gradient(1.0, poisson=True).guide(x0, y * factor, loud, LEVEL, {}, visit)
        assert (got - x0).abs().max() < 1.5
        before, after = (poisson_misfit(loud, y * factor, x.clamp_min(0))[0] for x in (x0, got))
        assert after < before


def test_subsets_take_turns_and_add_up():
    operator, truth, y = counting()
    visit, total = Visit(truth, lambda v: v), torch.zeros_like(truth)
    state: dict[str, torch.Tensor] = {}
    step = Gradient(1.0, "state", "variance", True, subsets=3)
    for _ in range(3):
        total += step.guide(truth, y, operator, LEVEL, state, visit) - truth
    whole = Gradient(1.0, "state", "variance", True).guide(truth, y, operator, LEVEL, {}, visit) - truth
    assert torch.allclose(total / 3, whole) and int(state["gradient_subset"]) == 3
    with pytest.raises(ValueError, match="subsets are for counts"):
        Gradient(1.0, subsets=2)


def a_job(executor=None, **consistency):
    operator, _, y = counting(torch.float32)
    recipe = Recipe.model_validate({**RECIPE, "consistency": {**RECIPE["consistency"], **consistency}})
    return assemble(recipe, operator, y, prior(), seed=3, executor=executor)


@pytest.mark.parametrize("consistency", [{"subsets": 3}, {"through": "state"}])
def test_guided_jobs_resume_to_the_same_bits(consistency):
    whole = reconstruct(a_job(**consistency))
    job = a_job(**consistency)
    state = begin(job)
    for _ in run(job, state):
        saved = dataclasses.replace(state, u=state.u.clone(), duals={k: v.clone() for k, v in state.duals.items()})
        for _ in run(a_job(**consistency), saved):
            pass
        assert torch.equal(saved.u, whole)
    with Executor(2, 2) as executor:
        assert torch.equal(reconstruct(a_job(executor, **consistency)), whole)


def test_data_without_counts_are_guided_too():
    """DPS for a linear Gaussian measurement: nearer the posterior mean than the prior alone."""
    generator = torch.Generator().manual_seed(3)
    matrix = torch.randn(20, ROWS * COLUMNS, generator=generator) / 5
    operator = MatrixOperator(matrix, (DEPTH, ROWS, COLUMNS))
    truth = prior().sample(DEPTH, 1).float()
    y = operator(truth) + 0.02 * torch.randn(operator.range.shape, generator=generator)
    recipe = Recipe.model_validate(RECIPE).model_copy(update={"start": Recipe().start})
    recipe = recipe.model_copy(update={"trajectory": recipe.trajectory.model_copy(update={"levels": 40})})
    job = assemble(recipe, operator, y, prior(), weights=torch.full((1, 1, 1), 0.02**-2))
    x = reconstruct(job)
    inverse = torch.linalg.inv(prior().covariance())
    a = matrix.double()
    rest = (y.double() - operator(torch.full_like(truth, 0.5)).double()).squeeze(1)
    mean = 0.5 + torch.linalg.solve(inverse + a.T @ a / 0.02**2, a.T @ rest.T / 0.02**2).T.reshape(truth.shape)
    assert (x - mean).norm() < 0.7 * (0.5 - mean).norm()


def test_what_goes_wrong_is_named_and_leaves_the_counter():
    operator, truth, y = counting()

    def interrupted(v):
        raise Interrupted

    state: dict[str, torch.Tensor] = {}
    with pytest.raises(Interrupted):
        Gradient(1.0, poisson=True).guide(truth, y, operator, LEVEL, state, Visit(truth, interrupted))
    assert not state

    class Steep:
        offset, scale = 0.0, 1.0

        def denoise(self, u, sigma, cond=None):
            return u * 1e-20

    v = torch.full((2, 4, 4), 1.0)
    v[1] = float("inf")
    with Executor(1, 1) as executor, pytest.raises(NonFiniteError, match=r"slice 1 .* the gradient through the prior"):
        executor.pull(Steep(), Slices(), torch.zeros(2, 4, 4), [0, 1], 1.0, v, level=3)


def test_a_condition_is_cut_like_the_state():
    """The hook for guidance by another image: a prior that takes one sees the same slices of it."""
    seen = []

    class Conditional:
        offset, scale = 0.0, 1.0

        def denoise(self, u, sigma, cond=None):
            seen.append(cond.shape)
            return u + cond

    u = torch.zeros(3, 4, 5)
    guide = torch.arange(60.0).reshape(3, 4, 5)
    for executor in (Executor(2, 2), InProcess()):
        x0 = executor.denoise(Conditional(), Axial(3), u, Axial(3).views(LEVEL), 1.0, cond=guide)
        assert torch.equal(x0, guide)
        pulled = executor.pull(Conditional(), Axial(3), u, Axial(3).views(LEVEL), 1.0, guide + 1, cond=guide)
        assert torch.equal(pulled, guide + 1)
    assert set(seen) == {(1, 1, 4, 5)}

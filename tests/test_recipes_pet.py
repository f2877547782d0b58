"""The PET recipes step by step against their equations written out in numpy on dense matrices."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from test_guidance import COLUMNS, DEPTH, ROWS, counting, jacobian
from test_guidance import prior as oracle

from recon3d import ops
from recon3d.engine.assemble import assemble
from recon3d.engine.loop import begin, run
from recon3d.ops.philox import philox_normal
from recon3d.recipes import load_recipe

SEED, LEVELS, SUBSETS = 3, 4, 3


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def published(name, **changes):
    """The published form, on few levels and subsets."""
    recipe = load_recipe(name, {"compat": "published"}).resolved()
    sections = {"trajectory": {"levels": LEVELS}, "consistency": {"subsets": SUBSETS}}
    for key, value in changes.items():
        section, field = key.split("__")
        sections.setdefault(section, {})[field] = value
    raw = recipe.model_dump(mode="json")
    for section, values in sections.items():
        raw[section].update(values)
    return type(recipe).model_validate(raw)


def sigmas(last_time):
    """Of a variance-preserving network with a thousand steps of beta from 1e-4 to 0.01."""
    beta = np.linspace(1e-4, 0.01, 1000)
    alpha = np.cumprod(1 - beta)
    times = [last_time + math.floor((999 - last_time) * (LEVELS - 1 - k) / (LEVELS - 1) + 0.5) for k in range(LEVELS)]
    return [math.sqrt(1 / alpha[t] - 1) for t in times]


def drawn(level, stream=0):
    from recon3d import noise

    return noise.independent(DEPTH, seed=SEED).at(level, stream).draw((ROWS, COLUMNS), dtype=torch.float64).numpy()


def denoised(u, sigma):
    mean = np.full(ROWS * COLUMNS, 0.5)
    return (mean + (u.reshape(DEPTH, -1) - mean) @ jacobian(sigma).numpy()).reshape(u.shape)


class Numbers:
    """The counting toy as matrices: A [ray, pixel], background and counts [slice, ray]."""

    def __init__(self):
        operator, _, y = counting()
        self.a, self.b, self.y = operator.matrix.numpy(), operator.additive.numpy().T, y.numpy().T

    def part(self, j, n):
        rows = slice(j, None, n)
        return self.a[rows], self.b[:, rows], self.y[:, rows]


def descended(recipe):
    """The engine's states after every level."""
    operator, _, y = counting()
    job = assemble(recipe, operator, y, oracle(), seed=SEED)
    state = begin(job)
    yield state.u.clone().numpy()
    for _ in run(job, state):
        yield state.u.clone().numpy()


def close(got, want):
    return np.abs(got - want).max() <= 1e-8 * max(1.0, np.abs(want).max())


def test_pet_dds_is_the_published_update():
    recipe, numbers = published("pet_dds"), Numbers()
    updates, weight, beta = recipe.consistency.iterations, recipe.consistency.rho, recipe.regulariser.strength
    assert (updates, weight, beta) == (5, 316.0, 21.9) and load_recipe("pet_dds").published["trajectory.levels"] == 50
    levels = [*sigmas(100), 0.0]
    assert levels[0] == pytest.approx(12.4, rel=0.02)
    states = descended(recipe)
    u, count = levels[0] * drawn(0, 1), 0
    assert close(next(states), u)
    for k, got in enumerate(states):
        x0 = denoised(u, levels[k])
        x = np.maximum(x0, 0)
        for _ in range(updates):
            a, b, y = numbers.part(count % SUBSETS, SUBSETS)
            flat = x.reshape(DEPTH, -1)
            sensitivity = np.broadcast_to(a.sum(0), flat.shape)
            back = (y / (flat @ a.T + b)) @ a
            smooth = ops.rdp_gradient(torch.from_numpy(x), gamma=2.0, epsilon=1e-3, axes="z").numpy()
            penalty = weight * (x0 - x) - beta * smooth
            slope = (back - sensitivity).reshape(x.shape) + penalty / SUBSETS
            x = np.maximum(0, x + np.maximum(x, 1e-4) / sensitivity.reshape(x.shape) * slope)
            count += 1
        eps = (u - x0) / levels[k]
        fresh = recipe.renoise.eta * math.sqrt(max(0, 1 - (levels[k + 1] / levels[k]) ** 2))
        noise = drawn(k) if levels[k + 1] else 0
        u = x + levels[k + 1] * (math.sqrt(1 - fresh**2) * eps + fresh * noise)
        assert close(got, u), f"level {k}"


@pytest.mark.parametrize("name", ["pet_naive", "pet_dps"])
def test_gradient_recipes_are_the_published_updates(name):
    recipe, numbers = published(name, consistency__subsets=1, consistency__strength=0.02), Numbers()
    levels = [*sigmas(0), 0.0]
    states = descended(recipe)
    u = levels[0] * drawn(0, 1)
    assert close(next(states), u)
    for k, got in enumerate(states):
        now, following = levels[k], levels[k + 1]
        x0 = denoised(u, now)
        at = u if name == "pet_naive" else x0
        seen = np.maximum(at, 0).reshape(DEPTH, -1)
        expected = seen @ numbers.a.T + numbers.b
        slope = ((1 - numbers.y / expected) @ numbers.a).reshape(u.shape)
        slope = np.where((at < 0) & (slope > 0), 0, slope)  # the clamp's own derivative, where it holds
        if name == "pet_naive":
            shift = 0.02 * (now**2 - following**2) * slope
        else:
            ratio = np.where(numbers.y > 0, numbers.y, 1) / expected
            misfit = (expected - numbers.y + numbers.y * np.log(ratio)).sum()
            shift = 0.02 / misfit * (slope.reshape(DEPTH, -1) @ jacobian(now).numpy()).reshape(u.shape)
        q = (following / now) ** 2
        spread = math.sqrt(q * (1 - q) * now**2 + (1 - q) ** 2 * now**2)  # the reverse diffusion's step
        noise = drawn(k) if following else 0
        u = x0 - shift + q * (u - x0) + spread * noise * (following > 0)
        assert close(got, u), f"level {k}"


def test_the_likelihood_schedule_meets_its_targets():
    """After every level the counts are explained at least as well as by plain EM at the same part of its way."""
    from recon3d.consistency import log_likelihood, ordered_subsets_em
    from recon3d.consistency.em import uniform_start

    operator, _, y = counting()
    small = {"trajectory.levels": 6, "consistency.subsets": SUBSETS, "start.subsets": SUBSETS}
    small |= {"regulariser.kind": "none", "consistency.passes": 3}
    job = assemble(load_recipe("pet_ls", small), operator, y, oracle(), seed=SEED)
    state, reached = begin(job), []
    step = job.consistency.step

    class Watched:
        on = "estimate"

        def step(self, *arguments):
            out = step(*arguments)
            reached.append(log_likelihood(out, y, operator))
            return out

    job.consistency = Watched()
    for _ in run(job, state):
        pass
    x, plain = uniform_start(operator, y, SUBSETS), []
    for k in range(3):
        x = ordered_subsets_em(x, y, operator, subsets=SUBSETS, iterations=SUBSETS, start=k * SUBSETS)
        plain.append(log_likelihood(x, y, operator))
    assert np.allclose(state.duals["em_targets"][1:].numpy(), plain)
    for k in (1, 3, 5):  # levels 2, 4 and 6 are passes 1, 2 and 3
        assert reached[k] >= plain[k // 2] - 1e-9 * abs(plain[0])


def test_updates_may_go_on_from_the_level_before():
    """One long run of EM cut into levels, where the anchor is nothing; and a state that resumes to the same bits."""
    import dataclasses

    from recon3d.consistency import OrderedSubsets, ordered_subsets_em
    from recon3d.trajectory import descend

    operator, truth, y = counting()
    step, state = OrderedSubsets(2, SUBSETS, begin="previous"), {}
    for level in descend([0.5, 0.4, 0.3]):
        x = step.step(torch.ones_like(truth), y, operator, level, state)
    whole = ordered_subsets_em(torch.ones_like(truth), y, operator, subsets=SUBSETS, iterations=6)
    assert torch.equal(x, whole) and torch.equal(state["em_image"], x)

    def job():
        small = {"trajectory.levels": 4, "consistency.subsets": SUBSETS, "start.subsets": SUBSETS}
        small["planes.kind"] = "axial"  # the Gaussian prior knows one shape of slice
        recipe = load_recipe("pet", {**small, "consistency.begin": "previous"})
        return assemble(recipe, operator, y, oracle(), seed=SEED)

    whole, calm = None, job()
    state = begin(calm)
    for _ in run(calm, state):
        saved = dataclasses.replace(state, u=state.u.clone(), duals={k: v.clone() for k, v in state.duals.items()})
        for _ in run(job(), saved):
            pass
        whole = saved.u if whole is None else whole
        assert torch.equal(saved.u, whole)
    assert torch.equal(state.u, whole)


def test_strengths_mean_the_same_for_any_unit_of_activity():
    """Counts a hundred times a unit's, activity a hundredth of it: the same image, in the smaller unit."""
    from test_guidance import Counts

    from recon3d.priors.scaled import ScaledPrior

    operator, _, y = counting()
    small = {"trajectory.levels": 3, "consistency.subsets": SUBSETS, "start.subsets": SUBSETS}
    small["planes.kind"] = "axial"  # the Gaussian prior knows one shape of slice
    for name in ("pet", "pet_dds", "pet_dps"):
        images = []
        for unit in (1.0, 100.0):
            scaled = Counts(operator.matrix * unit, operator.domain.shape, operator.additive)
            job = assemble(load_recipe(name, small), scaled, y, ScaledPrior(oracle(), 1 / unit), seed=SEED)
            state = begin(job)
            for _ in run(job, state):
                pass
            images.append(state.u * unit)
        assert (images[0] - images[1]).norm() < 1e-3 * images[0].norm(), name


def test_keyed_noise_is_that_of_the_loop():
    z = philox_normal(SEED, 0, DEPTH, (ROWS, COLUMNS), dtype=torch.float64)
    assert np.array_equal(z.numpy(), drawn(0))

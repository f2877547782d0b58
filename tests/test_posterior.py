"""The law of what recipes draw, against closed forms: independent samples run side by side as slices of one volume."""

from __future__ import annotations

import math

import pytest
import torch
from toys import MatrixOperator

from recon3d import noise
from recon3d.consistency import Identity, Rho, Solve
from recon3d.dormand_prince import Adaptive, DormandPrince
from recon3d.engine.assemble import assemble
from recon3d.engine.loop import Job, reconstruct
from recon3d.geometry import ParallelBeam, VolumeGrid
from recon3d.operators.ct import CTOperator
from recon3d.planes import Axial
from recon3d.priors.gaussian import GaussianPrior, cosine_basis, power_law
from recon3d.recipes import load_recipe, recipe_names
from recon3d.renoise import DDIM, Ancestral, EulerMaruyama, Full, Heun, Renoise
from recon3d.testing import Posterior, check_adjoint, check_posterior, check_prior, dense, gaussian_posterior
from recon3d.trajectory import descend, geometric, karras

ROWS, COLUMNS = 5, 6
N = 4000
MEAN = 1.0


def textured():
    return GaussianPrior(power_law((ROWS, COLUMNS), 0.6), MEAN, offset=MEAN)


def white():
    return GaussianPrior(torch.full((ROWS, COLUMNS), 0.6**2), MEAN, offset=MEAN)


def scanner(prior, n=N, std=0.2):
    """Three noisy CT views of one slice as a matrix, the same data for every sample."""
    grid = VolumeGrid((1, ROWS, COLUMNS), (1.0, 1.0, 1.0))
    beam = ParallelBeam(tuple(math.pi * k / 3 + 0.1 for k in range(3)), 9, 1.0)
    matrix = dense(CTOperator(beam, grid))
    operator = MatrixOperator(matrix.float(), (n, ROWS, COLUMNS))
    y = operator(prior.sample(1, seed=5).float())
    y += std * torch.randn(y.shape, generator=torch.Generator().manual_seed(6))
    weights = torch.full((1, 1, 1), std**-2)
    posterior = gaussian_posterior(prior, matrix, y[0], weights[0])
    return operator, y.expand(n, -1, -1).contiguous(), weights, posterior


def draw(recipe, n=N, seed=1, prior=None, **overrides):
    prior = prior or textured()
    operator, y, weights, posterior = scanner(prior, n)
    overrides = {k.replace("__", "."): v for k, v in overrides.items()}
    job = assemble(load_recipe(recipe, overrides), operator, y, prior, weights=weights, seed=seed)
    job.planes = Axial(n, n)
    return reconstruct(job), posterior


SAMPLERS = [name for name in recipe_names() if load_recipe(name).claims == "posterior_sample"]


def test_some_recipe_claims_to_sample():
    assert "posterior" in SAMPLERS
    # Krylov, fixed rho, correlated noise and full renoising draw from no stated law, and the recipes say so
    assert {"posterior", "sample"} == set(SAMPLERS)


# the recipes' own levels suit images; this prior is wider, and noise alone is its state much further up
LIMIT = {"sample": {"trajectory__sigma_max": 40.0, "trajectory__levels": 30}}


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_recipe_that_claims_to_sample_samples(name):
    samples, posterior = draw(name, **LIMIT.get(name, {}))
    if load_recipe(name).consistency.kind == "none":
        posterior = Posterior(textured().mean, textured().covariance())
    check_posterior(samples, posterior, mean_limit=0.01, std_limit=0.05)
    whitened = torch.linalg.solve_triangular(
        torch.linalg.cholesky(posterior.covariance),
        (samples.double() - posterior.mean).flatten(1).T,
        upper=False,
    )
    spread = torch.linalg.eigvalsh(torch.cov(whitened))
    # the directions the scanner sees best keep a little of the coupling's width; Monte Carlo alone gives +-13 %
    assert spread.min() > 0.8 and spread.max() < 1.35


def test_the_check_fails_where_the_claim_would_be_false():
    samples, posterior = draw("ct", n=2048, noise__kind="independent")
    with pytest.raises(AssertionError, match="off by"):
        check_posterior(samples, posterior)


def test_the_default_estimates_the_posterior_mean():
    """With rho = 1 its results scatter around the posterior mean, closer with more levels, less than the posterior."""
    errors = {}
    solved = {
        "consistency__rho": 1.0,
        "consistency__iterations": 20,
        "noise__kind": "independent",
        "regulariser__kind": "none",
        "renoise__amount": 1.0,
        "trajectory__polish": None,
        "trajectory__sigma_max": 2.0,  # a start so low as the recipe's own keeps a little of the start image
    }
    for levels in (10, 80):
        samples, posterior = draw("ct", n=4096, trajectory__levels=levels, **solved)
        errors[levels] = float((samples.double().mean(0) - posterior.mean).norm() / posterior.mean.norm())
        assert samples.double().std(0).max() < posterior.std.max()
    assert errors[80] < 0.02 and errors[80] < errors[10], errors


FLOW = DormandPrince(1e-3, 1e-3, MEAN, 0.02)


@pytest.mark.parametrize(
    ("rule", "trajectory"),
    [
        (DDIM(0.0), descend(karras(250, 10.0, 0.02))),
        (DDIM(1.0), descend(karras(250, 10.0, 0.02))),
        (Ancestral("prior", 0.6), descend(karras(250, 10.0, 0.02))),
        (EulerMaruyama("ve"), descend(geometric(150, 10.0, 0.02))),
        (Heun(), descend(karras(30, 10.0, 0.02), heun=True)),
        (FLOW, Adaptive(10.0, 0.02)),
    ],
    ids=lambda part: type(part).__name__,
)
def test_white_prior_is_sampled_in_one_pass(rule, trajectory):
    """With a white prior 1/r^2 = 1/sigma^2 + 1/prior_std^2 makes the proximal step E[x0 | u, y]: any rule samples."""
    prior = white()
    operator, y, weights, posterior = scanner(prior)
    job = Job(
        operator, y, prior, trajectory, Axial(N, N),
        Solve(12, rho=Rho("bayes", 1.0, prior_std=0.6), weights=weights), Renoise(rule, "corrected"),
        noise.independent(N, seed=3),
    )  # fmt: skip
    check_posterior(reconstruct(job), posterior)


UNCONDITIONAL = {
    "ddim-flow": (DDIM(0.0), 0),
    "ddim-canonical": (DDIM(1.0), 0),
    "ddim-dds": (DDIM(0.3, "dds"), 0),
    "ancestral-small": (Ancestral("small"), 0),
    "ancestral-large": (Ancestral("large"), 0),
    "ancestral-prior": (Ancestral("prior", 0.6), 0),
    "predictor-corrector": (Ancestral("large"), 1),
}


def unconditional(prior, rule, correctors=0, levels=200, n=N):
    operator = MatrixOperator(torch.ones(1, ROWS * COLUMNS), (n, ROWS, COLUMNS))
    job = Job(
        operator, torch.zeros(n, 1, 1), prior, descend(karras(levels, 10.0, 0.02), correctors=correctors),
        Axial(n, n), Identity(), Renoise(rule, norms="expected"), noise.independent(n, seed=2),
    )  # fmt: skip
    return reconstruct(job).double()


def check_law(x, prior, std_limit=0.05, variance_limit=0.15):
    """Mean, pixel spread, and the variance of every cosine frequency."""
    std = prior.covariance().diagonal().sqrt().reshape(ROWS, COLUMNS)
    assert ((x.mean(0) - MEAN) / std).abs().max() < 5 / math.sqrt(len(x))  # five sigma of the Monte Carlo
    assert (x.std(0) / std - 1).abs().max() < std_limit
    coefficients = cosine_basis(ROWS) @ (x - MEAN) @ cosine_basis(COLUMNS).T
    assert (coefficients.var(0) / prior.spectrum - 1).abs().max() < variance_limit


@pytest.mark.parametrize("name", UNCONDITIONAL)
def test_without_data_every_rule_reaches_the_prior(name):
    check_law(unconditional(textured(), *UNCONDITIONAL[name]), textured())


def test_full_renoising_needs_the_missing_variance():
    """A mean estimate renoised in full loses spread at every level; prior_std puts it back (exactly, if white)."""
    check_law(unconditional(white(), Full(0.6), levels=40), white())
    lacking = unconditional(white(), Full(), levels=40)
    assert (lacking.std(0) < 0.8 * 0.6).all()


def test_amount_scales_fresh_noise_and_no_estimate():
    assert Full(amount=0.4).weights(1.0, 0.5) == (0.0, 0.4)
    assert Full(0.6, 0.5).weights(1.0, 0.5)[1] == pytest.approx(0.5 * Full(0.6).weights(1.0, 0.5)[1])
    for amount in (0.0, 1.1):
        with pytest.raises(ValueError, match="amount"):
            Full(amount=amount)


def test_the_two_conventions_of_eta_differ():
    """At skip 20, ancestral sampling is 0.57, 0.44, 0.60, 0.99 of convention dds at t = 980, 500, 100, 20."""
    from recon3d.priors.paths import VP

    path = VP()
    for t, want in ((980, 0.57), (500, 0.44), (100, 0.60), (20, 0.99)):
        _, b = DDIM(1.0, "canonical").weights(path.sigma(t), path.sigma(t - 20))
        assert b == pytest.approx(want, abs=0.01)
        assert DDIM(0.85, "dds").weights(path.sigma(t), path.sigma(t - 20))[1] == 0.85


def test_canonical_eta_is_the_published_ddim_formula():
    abar = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
    now, following = float(abar[400]), float(abar[380])
    sigma, sigma_next = (math.sqrt((1 - a) / a) for a in (now, following))
    for eta in (0.0, 0.3, 1.0):
        std = eta * math.sqrt((1 - following) / (1 - now)) * math.sqrt(1 - now / following)
        a, b = DDIM(eta).weights(sigma, sigma_next)
        assert b == pytest.approx(std / math.sqrt(1 - following), rel=1e-9)
        assert a == pytest.approx(math.sqrt(1 - following - std**2) / math.sqrt(1 - following), rel=1e-9)


@pytest.mark.parametrize("rule", [DDIM(0.4), DDIM(0.85, "dds"), Ancestral(), Full()])
def test_noise_of_the_next_level_is_complete(rule):
    a, b = rule.weights(1.3, 0.9)
    assert a * a + b * b == pytest.approx(1.0)


def test_corrector_norms_are_per_slice():
    """Doubling one slice's score changes that slice's step alone; published norms change all."""
    from recon3d.renoise import langevin

    key = noise.independent(3, seed=1)
    u = torch.randn(3, 4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x0 = 0.5 * u
    other = x0.clone()
    other[0] -= u[0]
    a, b = (langevin(u.clone(), x, 1.0, 0.16, key, "slice") for x in (x0, other))
    assert torch.equal(a[1:], b[1:]) and not torch.equal(a[0], b[0])
    a, b = (langevin(u.clone(), x, 1.0, 0.16, key, "volume") for x in (x0, other))
    assert not torch.allclose(a[1:], b[1:])
    still = langevin(u.clone(), u.clone(), 1.0, 0.16, key)  # a zero score moves nothing, and divides by nothing
    assert torch.equal(still, u)


def test_public_checks_hold_and_can_fail():
    operator, *_ = scanner(textured(), n=3)
    assert check_adjoint(operator) <= 1e-6
    assert check_prior(textured(), (ROWS, COLUMNS)) <= 1e-5

    class Skewed(MatrixOperator):
        def adjoint(self, y):
            return 1.01 * super().adjoint(y)

    with pytest.raises(AssertionError, match="adjoint gap"):
        check_adjoint(Skewed(torch.ones(4, 6), (2, 2, 3)))

    class Mixing(GaussianPrior):
        def denoise(self, u, sigma, cond=None):
            return super().denoise(u - u.mean(0, keepdim=True), sigma)

    with pytest.raises(AssertionError, match="in a batch"):
        check_prior(Mixing(power_law((ROWS, COLUMNS), 0.6)), (ROWS, COLUMNS))
    samples = textured().sample(4096, seed=1)
    blind = torch.zeros(1, ROWS * COLUMNS, dtype=torch.float64)
    posterior = gaussian_posterior(textured(), blind, torch.zeros(1), torch.ones(1))
    check_posterior(samples, posterior, 0.03, 0.05)
    with pytest.raises(AssertionError, match="mean"):
        check_posterior(1.05 * samples, posterior, 0.03, 0.05)
    with pytest.raises(AssertionError, match="spread"):
        check_posterior(MEAN + 0.9 * (samples - MEAN), posterior, 0.03, 0.05)

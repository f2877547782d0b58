"""Complex volumes through the whole engine: laws, restarts, scale, memory, and the closed-form posterior."""

from __future__ import annotations

import json

import mri_jobs
import numpy as np
import pytest
import torch
from mri_jobs import COILS, GRID, SIGMA, complex_gaussian, mri_reconstruction, scan
from toys import MatrixOperator

from recon3d import noise
from recon3d.api import reconstruct_mri
from recon3d.consistency import conjugate_gradients
from recon3d.engine.assemble import assemble
from recon3d.engine.checkpoint import CheckpointError
from recon3d.engine.events import read_events
from recon3d.engine.executor import Interrupted, NonFiniteError
from recon3d.engine.loop import reconstruct
from recon3d.engine.scan_mri import kspace_of, percentile, prepare
from recon3d.operators.mri import CartesianMRI
from recon3d.operators.noise import GaussianNoise
from recon3d.planes import Axial
from recon3d.priors.gaussian import ComplexGaussianPrior, power_law
from recon3d.real_view import draw_like, real_view
from recon3d.recipes import load_recipe
from recon3d.regularisers import TVz
from recon3d.renoise import DDIM, Renoise
from recon3d.trajectory import descend


@pytest.fixture(autouse=True)
def one_thread():
    """Small images: on a busy machine threads wait for each other longer than they work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_parts_of_a_complex_volume_are_the_real_thing_twice():
    """Noise, renoising and shrinking work on real and imaginary parts as on neighbouring columns."""
    generator = torch.Generator().manual_seed(1)
    u, x0, x0c = (torch.randn(3, 4, 5, dtype=torch.complex64, generator=generator) for _ in range(3))
    key = noise.independent(3, seed=4)
    assert torch.equal(real_view(draw_like(u, key)), key.draw((4, 10)))
    level = descend([0.7, 0.4])[0]
    want = Renoise(DDIM(0.5))(real_view(u).clone(), real_view(x0), real_view(x0c), level, key)
    got = Renoise(DDIM(0.5))(u, x0, x0c, level, key)
    assert got is u and torch.equal(real_view(got), want)
    tvz, state, real = TVz(0.3, 2.0), {}, {}
    tvz.update(u, state)
    tvz.update(real_view(u), real)
    for name, dual in state.items():
        assert dual.is_complex() and torch.equal(real_view(dual), real[name])
    assert torch.equal(
        real_view(tvz.add_normal(u.clone(), x0, 0.1)), tvz.add_normal(real_view(u).clone(), real_view(x0), 0.1)
    )


def test_conjugate_gradients_are_hermitian():
    """On a Hermitian matrix with complex entries, where products without conjugation go astray."""
    generator = torch.Generator().manual_seed(2)
    a = torch.randn(2, 14, 9, dtype=torch.complex128, generator=generator)
    matrix = a.mH @ a
    b = torch.randn(2, 1, 9, dtype=torch.complex128, generator=generator)
    x = conjugate_gradients(lambda p: (matrix @ p.mT).mT, torch.zeros_like(b), b.clone(), 9, True)
    exact = torch.linalg.solve(matrix, b.mT).mT
    assert (x - exact).norm() < 1e-8 * exact.norm()


def test_residual_is_the_normal_equations_at_x():
    image, maps, mask, y = scan()
    operator = CartesianMRI(mask, maps)
    x = 0.5 * image
    weights = torch.full((1, 1, 1, 1), 4.0)
    want = operator.adjoint(4.0 * (y - operator(x)))
    assert (operator.residual(x, y, weights) - want).norm() < 1e-5 * want.norm()


@pytest.fixture(scope="module")
def calm():
    """The uninterrupted run, with a prior that the engine made complex."""
    return mri_reconstruction(None)


def test_a_job_explains_the_data_and_is_near_the_truth(calm):
    image, maps, mask, y = scan()
    zero_filled = CartesianMRI(mask, maps).pinv(y)
    assert calm.volume.dtype == torch.complex64 and calm.grid == GRID
    assert (calm.volume - image).norm() < (zero_filled - image).norm()
    fit = calm.metrics["data"]
    assert 0.2 < fit["chi2_per_sample"] < 3 and "chi2_per_ray" not in fit and "chi2_per_sample" in fit["definitions"]


def test_where_no_coil_sees_anything_the_result_is_zero():
    _, maps, mask, y = scan()
    blind = maps.clone()
    blind[:, :, :4] = 0
    recipe = load_recipe("mri", {"trajectory.levels": 2, "start.iterations": 2})
    noise_level = GaussianNoise(SIGMA)
    volume = reconstruct_mri(y, mask, blind, GRID, recipe, mri_jobs.magnitude_prior(), noise=noise_level).volume
    assert bool((volume[:, :4] == 0).all()) and bool((volume[:, 4:] != 0).all())


@pytest.mark.parametrize(("batch_size", "workers"), [(1, 1), (3, 2)])
def test_batches_and_threads_give_one_volume(calm, batch_size, workers):
    assert torch.equal(mri_reconstruction(None, batch_size=batch_size, workers=workers).volume, calm.volume)


def test_a_stopped_run_goes_on_to_the_same_bits(calm, tmp_path):
    seen = []

    def watch(event):
        if event["event"] == "slices":
            seen.append((event["level"], event["done"]))

    with pytest.raises(Interrupted):
        mri_reconstruction(tmp_path, listeners=(watch,), stop=lambda: (5, 2) in seen, workers=1)
    record = json.loads((tmp_path / "checkpoint" / "LATEST.json").read_text())
    assert record["meta"]["index"] == 5
    # the scale is the start image's, so it belongs to what a checkpoint is for
    with pytest.raises(CheckpointError, match="differing in prior"):
        mri_reconstruction(tmp_path, prior=complex_gaussian())
    result = mri_reconstruction(tmp_path)
    assert torch.equal(result.volume, calm.volume) and result.attempts == 2
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["modality"] == "mri" and manifest["prior"]["scale"] > 0
    assert set(manifest["outputs"]) == {"volume.nii.gz", "phase.nii.gz", "preview.png", "metrics.json"}
    assert not (tmp_path / "checkpoint").exists()
    from recon3d.io import read_nifti

    magnitude, grid = read_nifti(tmp_path / "volume.nii.gz")
    phase, _ = read_nifti(tmp_path / "phase.nii.gz")
    assert grid.spacing_mm == pytest.approx(GRID.spacing_mm)
    assert torch.allclose(torch.polar(magnitude, phase), calm.volume, atol=1e-6)


def test_not_a_number_is_named(tmp_path):
    class Broken:
        offset, scale, calls = 0.0, 1.0, 0
        card = complex_gaussian().card

        def denoise(self, u, sigma, cond=None):
            self.calls += 1
            return u / 0 if self.calls == 10 else u

    with pytest.raises(NonFiniteError, match="after the prior at level"):
        mri_reconstruction(tmp_path, prior=Broken(), workers=1)
    assert read_events(tmp_path / "events.jsonl")[-1]["event"] == "not_finite"
    assert not (tmp_path / "manifest.json").exists()


def test_the_scale_is_a_percentile_of_the_whole_start_image():
    _, maps, mask, y = scan()
    prepared = prepare(kspace_of(y, mask, maps, GRID), noise=GaussianNoise(SIGMA))
    recipe = load_recipe("mri", {"start.image": "pinv"})
    prior, image = prepared.fit(mri_jobs.magnitude_prior(), recipe)
    direct = CartesianMRI(mask, maps).pinv(y)
    assert torch.equal(image, direct)
    assert prior.scale == pytest.approx(np.percentile(direct.abs().numpy().astype(np.float64), 99.9))
    assert prior.scale == percentile(direct)
    # a cold start has the scale of the direct image and starts from nothing
    cold, none = prepared.fit(mri_jobs.magnitude_prior(), load_recipe("mri", {"start.image": "offset"}))
    assert cold.scale == prior.scale and none is None
    own = complex_gaussian(7.0)
    assert prepared.fit(own, recipe) == (own, None)


def test_images_follow_the_scanners_unit():
    """K-space a thousand times as large gives an image a thousand times as large, and the same one."""
    _, maps, mask, y = scan()
    recipe = load_recipe("mri", {"trajectory.levels": 4, "start.iterations": 4})
    images = []
    for unit in (1.0, 1000.0):
        result = reconstruct_mri(
            y * unit, mask, maps, GRID, recipe, mri_jobs.magnitude_prior(), noise=GaussianNoise(SIGMA * unit), workers=1
        )
        images.append(result.volume / unit)
    assert (images[0] - images[1]).norm() < 1e-4 * images[0].norm()


def test_noise_is_made_white_and_maps_go_with_it():
    image, maps, _, _ = scan()
    full = CartesianMRI(torch.ones(1), maps)
    generator = torch.Generator().manual_seed(3)
    mix = torch.eye(COILS, dtype=torch.complex128) + 0.4 * torch.randn(
        COILS, COILS, dtype=torch.complex128, generator=generator
    )
    white = torch.randn(full.range.shape, dtype=torch.complex128, generator=generator) * SIGMA * 2**0.5
    y = (full(image) + torch.einsum("dc,zcyx->zdyx", mix, white)).to(torch.complex64)
    covariance = 2 * SIGMA**2 * mix @ mix.mH
    prepared = prepare(kspace_of(y, torch.ones(GRID.slice_shape), maps, GRID, covariance))
    rest = prepared.y - prepared.operator()(image)
    flat = rest.movedim(1, 0).flatten(1).to(torch.complex128)
    found = flat @ flat.mH / flat.shape[1] / (2 * prepared.noise.sigma**2)
    assert (found - torch.eye(COILS)).abs().max() < 0.1
    # fewer coils, the same image
    fewer = prepare(kspace_of(y, torch.ones(GRID.slice_shape), maps, GRID, covariance), coils=2)
    assert fewer.y.shape[1] == fewer.maps.shape[1] == 2


@pytest.mark.parametrize("per_slice", [False, True])
def test_spokes_go_the_same_way(per_slice):
    """Radial k-space of slices, one trajectory for all or one each, maps made from its dense centre."""
    from recon3d.geometry.mri import Trajectory, radial
    from recon3d.operators.mri import NonCartesianMRI

    image, maps, _, _ = scan()
    spokes = radial(20, 48, GRID.slice_shape)
    turned = [Trajectory(spokes.points.roll(k, 0), spokes.shape) for k in range(3)] if per_slice else spokes
    operator = NonCartesianMRI(turned, maps)
    generator = torch.Generator().manual_seed(1)
    y = operator(image) + SIGMA * torch.randn(operator.range.shape, dtype=torch.complex64, generator=generator) * 2**0.5
    recipe = load_recipe("mri", {"trajectory.levels": 3, "start.iterations": 4})
    result = reconstruct_mri(y, turned, maps, GRID, recipe, mri_jobs.magnitude_prior(), workers=1)
    assert (result.volume - image).norm() < 0.5 * image.norm()
    assert 0 < result.metrics["data"]["chi2_per_sample"] < 5
    made = prepare(kspace_of(y, turned, None, GRID))
    assert made.maps.shape == maps.shape and made.check() == []


def test_memory_and_time_are_told_for_complex_volumes():
    from recon3d.config import ComputeConfig
    from recon3d.engine import plan
    from recon3d.engine.problem import Problem

    _, maps, mask, y = scan()
    prepared = prepare(kspace_of(y, mask, maps, GRID), noise=GaussianNoise(SIGMA))
    problem = Problem(scan=prepared, recipe=load_recipe("mri"), prior=mri_jobs.magnitude_prior())
    found = plan.predict(problem, ComputeConfig(workers=1), picture=True)
    assert found.seconds > 0 and found.levels == plan._visits(problem)
    assert plan._phases(problem, 0, picture=False)["prior"]["volumes"] == 3 * 8 * np.prod(GRID.shape)


ROWS, COLUMNS, N = 3, 4, 3000


def posterior_problem():
    """Two coils, half of the columns: 12 complex unknowns that the data leave partly open, as slices of one volume."""
    from recon3d.testing.phantoms import coil_maps

    prior = ComplexGaussianPrior(power_law((ROWS, COLUMNS), 0.6), 1.0 + 0.5j)
    maps = coil_maps(2, (1, ROWS, COLUMNS)).to(torch.complex128)
    operator = CartesianMRI(torch.tensor([0.0, 1.0, 1.0, 0.0]), maps)
    unit = torch.eye(ROWS * COLUMNS, dtype=torch.complex128).reshape(-1, 1, ROWS, COLUMNS)
    matrix = torch.stack([operator(e).flatten() for e in unit], 1)
    sigma = 0.2
    generator = torch.Generator().manual_seed(6)
    y = matrix @ prior.sample(1, seed=5).flatten()
    y = y + sigma * torch.complex(*torch.randn(2, len(y), generator=generator, dtype=torch.float64))
    inverse = torch.linalg.inv(prior.covariance()).to(torch.complex128)
    # both parts have variance C, so the complex Gaussian has 2 C and noise 2 sigma^2: the factors cancel in the mean
    covariance = torch.linalg.inv(inverse + matrix.mH @ matrix / sigma**2)
    mean = prior.mean.flatten() + covariance @ (matrix.mH @ (y - matrix @ prior.mean.flatten())) / sigma**2
    return prior, matrix, y, sigma, mean, covariance


def test_the_posterior_recipe_samples_complex_images():
    prior, matrix, y, sigma, mean, covariance = posterior_problem()
    operator = ComplexMatrix(matrix.to(torch.complex64), (N, ROWS, COLUMNS))
    many = y.to(torch.complex64).expand(N, 1, -1).contiguous()
    recipe = load_recipe("posterior", {"trajectory.levels": 100, "consistency.iterations": 6})
    job = assemble(recipe, operator, many, prior, weights=torch.full((1, 1, 1), sigma**-2), seed=1)
    job.planes = Axial(N, N)
    x = reconstruct(job).to(torch.complex128).flatten(1)
    assert (x.mean(0) - mean).norm() < 0.01 * mean.norm()
    std = covariance.diagonal().real.sqrt()
    for part in (x.real, x.imag):
        assert (part.std(0) / std - 1).abs().max() < 0.05
    # the parts of different pixels go together as the complex covariance says
    rest = x - x.mean(0)
    found = rest.T @ rest.conj() / N / 2
    assert (found - covariance).norm() < 0.1 * covariance.norm()


class ComplexMatrix(MatrixOperator):
    """The toy of real matrices with its adjoint conjugated."""

    def adjoint(self, y):
        return (y.squeeze(-2) @ self.matrix.conj()).unflatten(-1, self.domain.shape[1:])

    def pinv(self, y):
        inverse = torch.linalg.pinv(self.matrix.to(torch.complex128)).to(y)
        return (y.squeeze(-2) @ inverse.T).unflatten(-1, self.domain.shape[1:])

    def norm(self, weights=None, iterations=20):
        w = 1.0 if weights is None else float(weights.max())
        return w * float(torch.linalg.matrix_norm(self.matrix.to(torch.complex128), 2)) ** 2


def test_the_default_estimates_the_complex_posterior_mean():
    prior, matrix, y, sigma, mean, _ = posterior_problem()
    operator = ComplexMatrix(matrix.to(torch.complex64), (512, ROWS, COLUMNS))
    many = y.to(torch.complex64).expand(512, 1, -1).contiguous()
    changes = {"consistency.rho": 1.0, "consistency.iterations": 8, "noise.kind": "independent",
               "trajectory.sigma_max": 2.0, "trajectory.levels": 60}  # fmt: skip
    job = assemble(load_recipe("mri", changes), operator, many, prior, weights=torch.full((1, 1, 1), sigma**-2), seed=1)
    job.planes = Axial(512, 512)
    x = reconstruct(job).to(torch.complex128).flatten(1)
    assert (x.mean(0) - mean).norm() < 0.03 * mean.norm()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda a: {**a, "sampling": torch.ones(20)}, "does not match k-space"),
        (lambda a: {**a, "sampling": torch.ones(28, 24, dtype=torch.complex64)}, "mask must be real"),
        (lambda a: {**a, "maps": a["maps"][:, :3]}, "maps must be finite and of size"),
        (lambda a: {**a, "kspace": a["kspace"] * torch.tensor(float("nan"))}, "NaN or infinity"),
        (lambda a: {**a, "kspace": a["kspace"].real}, "kspace must be complex"),
        (lambda a: {**a, "kspace": torch.zeros_like(a["kspace"])}, "every sample is zero"),
        (lambda a: {**a, "coils": 9}, "1 to 4 virtual coils"),
        (lambda a: {**a, "maps": None, "sampling": torch.ones(24) * (torch.arange(24) % 2 == 0)}, "give coil maps"),
    ],
)
def test_bad_input_is_one_sentence(change, sentence):
    _, maps, mask, y = scan()
    given = {"kspace": y, "sampling": mask, "maps": maps, "grid": GRID, "recipe": "mri",
             "prior": mri_jobs.magnitude_prior(), "noise": GaussianNoise(SIGMA)}  # fmt: skip
    with pytest.raises((ValueError, TypeError), match=sentence) as caught:
        reconstruct_mri(**change(given))
    assert "\n" not in str(caught.value)


def test_the_tomographic_preconditioner_is_refused():
    recipe = load_recipe("mri", {"consistency.precondition": "filter", "trajectory.levels": 2})
    with pytest.raises(ValueError, match="made for tomography"):
        mri_reconstruction(None, recipe=recipe)

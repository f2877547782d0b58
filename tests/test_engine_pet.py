"""Counts through the whole engine: restarts, batches, the scale, what a result is, and one sentence per mistake."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
from pet_jobs import ACTIVITY, GEOMETRY, GRID, RECIPE, SCANNER, SUBSETS, body, pet_reconstruction, prior, scan

from recon3d.api import reconstruct_pet
from recon3d.config import OutputConfig
from recon3d.consistency import ordered_subsets_em
from recon3d.consistency.em import uniform_start
from recon3d.engine.checkpoint import CheckpointError
from recon3d.engine.executor import Interrupted
from recon3d.engine.scan_pet import prepare, typical_activity
from recon3d.geometry import VolumeGrid, pet_geometry
from recon3d.geometry.pet import TOF
from recon3d.priors.scaled import ScaledPrior
from recon3d.recipes import Recipe, load_recipe


@pytest.fixture(autouse=True)
def one_thread():
    """Small images: on a busy machine threads wait for each other longer than they work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def calm():
    """The uninterrupted run."""
    return pet_reconstruction(None, workers=1)


def prepared(**changes):
    _, made = scan()
    given = {"prompts": made.prompts, "geometry": made.geometry, "factors": made.factors, "additive": made.additive,
             "grid": GRID, "scale": made.scale}  # fmt: skip
    return prepare(**{**given, **changes})


def test_a_job_explains_the_counts_and_is_near_the_truth(calm):
    activity, made = scan()
    assert calm.volume.dtype == torch.float32 and calm.grid == GRID and calm.volume.min() >= 0
    start = made.operator(GRID)
    x = ordered_subsets_em(uniform_start(start, made.prompts), made.prompts, start, iterations=30)
    assert (calm.volume - activity).norm() < (x - activity).norm()
    # activity in Bq/mL: the total within the noise of the counts, without any calibration of ours
    assert float(calm.volume.sum()) == pytest.approx(float(activity.sum()), rel=0.02)
    fit = calm.metrics["data"]
    assert 0.8 < fit["chi2_per_bin"] < 1.2 and "chi2_per_bin" in fit["definitions"]
    assert fit["expected_counts"] == pytest.approx(fit["counts"], rel=0.03)
    assert calm.timings.projector > 0


@pytest.mark.parametrize("recipe", ["pet", "pet_dds", "pet_ls", "pet_naive", "pet_dps"])
def test_every_recipe_runs_repeats_and_fits_the_counts(recipe):
    activity, _ = scan()
    small = {"start.subsets": SUBSETS, "consistency.subsets": SUBSETS, "trajectory.levels": 8}
    first, second = (pet_reconstruction(None, recipe=load_recipe(recipe, small), workers=1) for _ in range(2))
    assert torch.equal(first.volume, second.volume) and first.volume.min() >= 0
    assert (first.volume - activity).norm() < 0.45 * activity.norm()
    assert 0.7 < first.metrics["data"]["chi2_per_bin"] < 2


@pytest.mark.parametrize(("batch_size", "workers"), [(1, 2), (3, 2)])
def test_batches_and_threads_give_one_volume(calm, batch_size, workers):
    assert torch.equal(pet_reconstruction(None, batch_size=batch_size, workers=workers).volume, calm.volume)


def test_guided_jobs_do_not_depend_on_batches_either():
    small = {"start.subsets": SUBSETS, "consistency.subsets": SUBSETS, "trajectory.levels": 4}
    recipe = load_recipe("pet_dps", small)
    volumes = [pet_reconstruction(None, recipe=recipe, batch_size=b, workers=w).volume for b, w in ((1, 1), (4, 2))]
    assert torch.equal(*volumes)


def test_a_stopped_run_goes_on_with_the_next_subset(calm, tmp_path):
    seen = []

    def watch(event):
        if event["event"] == "slices":
            seen.append((event["level"], event["done"]))

    with pytest.raises(Interrupted):
        pet_reconstruction(tmp_path, listeners=(watch,), stop=lambda: (5, 2) in seen, workers=1)
    record = json.loads((tmp_path / "checkpoint" / "LATEST.json").read_text())
    assert record["meta"]["index"] == 5
    from safetensors.torch import load_file

    saved = load_file(tmp_path / "checkpoint" / record["file"])
    assert saved["dual.em_count"].tolist() == [5 * RECIPE["consistency"]["iterations"]]
    with pytest.raises(CheckpointError, match="differing in prior"):
        pet_reconstruction(tmp_path, prior_=ScaledPrior(prior(), 100.0))
    result = pet_reconstruction(tmp_path, workers=1)
    assert torch.equal(result.volume, calm.volume) and result.attempts == 2
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["modality"] == "pet" and manifest["prior"]["scale"] > 0
    assert set(manifest["outputs"]) == {"volume.nii.gz", "preview.png", "metrics.json"}
    from recon3d.io import read_nifti, read_nifti_header

    stored, grid = read_nifti(tmp_path / "volume.nii.gz")
    assert torch.equal(stored, calm.volume) and grid.spacing_mm == pytest.approx(GRID.spacing_mm)
    assert "Bq/mL" in read_nifti_header(tmp_path / "volume.nii.gz").description


def test_a_network_unit_is_the_typical_activity_of_the_scan():
    activity, made = scan()
    start = prepared()
    settled = load_recipe("pet", {"start.subsets": SUBSETS, "start.iterations": 8, "consistency.subsets": SUBSETS})
    fitted, image = start.fit(prior(), settled)
    assert isinstance(fitted, ScaledPrior) and fitted.offset == 0.0
    assert fitted.scale == pytest.approx(float(activity[activity > 0].mean()), rel=0.25)
    assert typical_activity(torch.tensor([100.0, 50.0, 0.9])) == 75.0
    # a scan of other counts, another unit of activity, another unit of the prior: the same number of Bq/mL
    other, _ = prepared(scale=made.scale * 10).fit(prior(), settled)
    assert other.scale == pytest.approx(fitted.scale / 10, rel=1e-3)
    u = torch.rand(1, 1, *GRID.slice_shape) * ACTIVITY
    far = ScaledPrior(prior(7.0), fitted.scale)
    assert torch.allclose(far.denoise(u, 500.0), fitted.denoise(u, 500.0), rtol=1e-4, atol=1e-2)
    own = ScaledPrior(prior(), 123.0)
    assert start.fit(own, settled)[0] is own
    less = {"start.subsets": SUBSETS, "consistency.subsets": SUBSETS}
    cold, none = start.fit(prior(), load_recipe("pet", {"start.image": "offset", **less}))
    assert none is None and cold.scale == pytest.approx(fitted.scale, rel=0.5)
    assert image.min() >= 0
    with pytest.raises(ValueError, match=r"set recipe\.start\.image to osem"):
        start.fit(prior(), load_recipe("pet", {"start.image": "cg", **less}))


def test_images_follow_the_calibration():
    """Ten times the counts for an activity give a tenth of it, and the same image."""
    _, made = scan()
    small = load_recipe("pet", {"trajectory.levels": 3, "start.subsets": SUBSETS, "consistency.subsets": SUBSETS})
    images = [
        reconstruct_pet(
            made.prompts, GEOMETRY, made.factors, made.additive, GRID, small, prior(), scale=made.scale * f, workers=1
        ).volume
        * f
        for f in (1.0, 10.0)
    ]
    assert (images[0] - images[1]).norm() < 1e-3 * images[0].norm()


def test_where_the_scanner_sees_nothing_the_result_is_zero():
    """A grid that reaches out of the rings; no line crosses its ends."""
    _, made = scan()
    long = VolumeGrid((GRID.shape[0] + 6, *GRID.slice_shape), GRID.spacing_mm)
    recipe = load_recipe("pet", {"trajectory.levels": 2, "start.subsets": SUBSETS, "consistency.subsets": SUBSETS})
    x = reconstruct_pet(
        made.prompts, GEOMETRY, made.factors, made.additive, long, recipe, prior(), scale=made.scale, workers=1
    ).volume
    unseen = prepared(grid=long).operator().sensitivity() <= 0
    assert bool(unseen.any()) and bool((x[unseen] == 0).all()) and x.isfinite().all() and x.max() > 0


def test_time_of_flight_goes_the_same_way():
    activity, _ = body()
    timed = pet_geometry(dataclasses.replace(SCANNER, tof=TOF(5, 30.0, 20.0)), max_ring_difference=2, tof=True)
    _, made = scan(geometry=timed)
    assert made.prompts.ndim == 4 and made.factors.ndim == 3
    recipe = load_recipe("pet", {"trajectory.levels": 4, "start.subsets": SUBSETS, "consistency.subsets": SUBSETS})
    x = pet_reconstruction(None, recipe=recipe, geometry=timed, workers=1).volume
    assert (x - activity).norm() < 0.4 * activity.norm()


def test_a_map_of_attenuation_may_take_the_place_of_factors():
    _, mu = body()
    found = prepared(factors=None, mu=(mu, GRID))
    from recon3d.operators.attenuation import attenuation_factors

    assert torch.allclose(found.factors, attenuation_factors(mu, GRID, GEOMETRY))
    # on another grid: brought there
    coarse = VolumeGrid((GRID.shape[0], 10, 11), (3.0, 10.0, 10.0))
    thick = mu.reshape(GRID.shape[0], 10, 2, 11, 2).mean((2, 4))
    other = prepared(factors=None, mu=(thick, coarse))
    assert (other.factors - found.factors).abs().max() < 0.1


def test_suv_is_written_where_dose_and_weight_are_known(tmp_path):
    found = prepared(suv_factor=2e-4)
    x = torch.full(GRID.shape, 5000.0)
    from recon3d.io import read_nifti, read_nifti_header

    found.save(tmp_path / "suv.nii.gz", x, OutputConfig(unit="suv"))
    stored, _ = read_nifti(tmp_path / "suv.nii.gz")
    assert float(stored.mean()) == pytest.approx(1.0, rel=1e-6)
    assert "SUVbw" in read_nifti_header(tmp_path / "suv.nii.gz").description
    with pytest.raises(ValueError, match="weight_kg"):
        prepared().save(tmp_path / "no.nii.gz", x, OutputConfig(unit="suv"))


def test_memory_and_time_are_told_without_projecting_everything():
    from recon3d.config import ComputeConfig
    from recon3d.engine import plan
    from recon3d.engine.problem import Problem

    start = prepared()
    part, share = start.sample(2)
    assert part.y.shape[0] == 8 and share == 8 / 20 and part.operator().range.shape[0] == 8
    small = {"start.subsets": SUBSETS, "consistency.subsets": SUBSETS}
    problem = Problem(scan=start, recipe=load_recipe("pet", small), prior=prior())
    found = plan.predict(problem, ComputeConfig(workers=1), picture=True)
    assert found.seconds > 0 and found.levels == plan._visits(problem)
    assert plan._projections(load_recipe("pet_dds")) == pytest.approx(5 / 7)
    guided = Problem(scan=start, recipe=load_recipe("pet_dps", small), prior=prior())
    assert plan.predict(guided, ComputeConfig(workers=1)).seconds_by["network"] > 0


def test_a_guide_reaches_the_prior():
    seen = []

    class Guided:
        card, offset, scale = prior().card, 0.0, 1.0

        def denoise(self, u, sigma, cond=None):
            if cond is not None:
                seen.append(float(cond.max()))
            return prior().denoise(u, sigma)

    _, made = scan()
    guide = torch.full(GRID.shape, 3.0)
    less = {"trajectory.levels": 2, "start.subsets": SUBSETS, "consistency.subsets": SUBSETS}
    small = load_recipe("pet", {**less, "planes.kind": "axial"})
    reconstruct_pet(
        made.prompts, GEOMETRY, made.factors, made.additive, GRID, small, Guided(), scale=made.scale, guide=guide,
        workers=1,
    )  # fmt: skip
    assert seen.count(3.0) == 3 * GRID.shape[0]  # two levels and the polish
    assert "guide" in prepared(guide=guide).digests() and "guide" not in prepared().digests()


def test_digests_know_factors_and_background():
    _, made = scan()
    base = prepared().digests()
    assert base == prepared().digests()
    for change in ({"factors": made.factors * 0.5}, {"additive": made.additive * 2}, {"scale": 3.0},
                   {"psf_fwhm_mm": 4.0}):  # fmt: skip
        assert prepared(**change).digests()["scan"] != base["scan"], change


def with_value(t, value):
    out = t.clone()
    out.view(-1)[17] = value
    return out


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda a: {**a, "prompts": with_value(a["prompts"], -1.0)}, "values fall to -1; give prompts"),
        (lambda a: {**a, "prompts": with_value(a["prompts"], float("nan"))}, "NaN or infinity"),
        (lambda a: {**a, "prompts": torch.zeros_like(a["prompts"])}, "every bin is zero"),
        (lambda a: {**a, "prompts": a["prompts"][:5]}, r"the geometry says \[view, radial, plane\]"),
        (lambda a: {**a, "prompts": a["prompts"].to(torch.complex64)}, "must be real counts"),
        (lambda a: {**a, "factors": a["factors"][:, :4]}, "factors must be"),
        (lambda a: {**a, "factors": with_value(a["factors"], -1.0)}, "factors"),
        (lambda a: {**a, "factors": torch.zeros_like(a["factors"])}, "sees no voxel"),
        (lambda a: {**a, "additive": with_value(a["additive"], float("inf"))}, "additive"),
        (lambda a: {**a, "scale": -1.0}, "scale"),
        (lambda a: {**a, "guide": torch.zeros(2, 2, 2)}, "guide: shape"),
        (lambda a: {**a, "grid": VolumeGrid((7, 20, 22), (2.5, 5.0, 5.0))}, "2.5"),
        (lambda a: {**a, "recipe": load_recipe("pet", {"start.subsets": 4, "consistency.subsets": 99})}, "subsets"),
        (lambda a: {**a, "recipe": "ct"}, "counts take em or gradient"),
    ],
)
def test_bad_input_is_one_sentence(change, sentence, tmp_path):
    _, made = scan()
    given = {"prompts": made.prompts, "geometry": GEOMETRY, "factors": made.factors, "additive": made.additive,
             "grid": GRID, "recipe": Recipe.model_validate(RECIPE), "prior": prior(), "scale": made.scale}  # fmt: skip
    with pytest.raises((ValueError, TypeError), match=sentence) as caught:
        reconstruct_pet(**change(given), folder=tmp_path / "out", workers=1)
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


def test_what_a_user_should_know_is_told():
    _, made = scan()
    whole = prepared()
    assert whole.check() == []
    said = prepared(prompts=made.prompts * 0.5, factors=None, calibrated=False).check()
    assert [s.split(":")[0] for s in said] == ["counts", "factors", "calibration"]
    assert np.isfinite(float(whole.y.sum()))
    # counts take no Gaussian data term, and line integrals no EM
    from test_loop import measured, scanner

    from recon3d.engine.assemble import assemble

    operator = scanner()
    with pytest.raises(ValueError, match="consistency em needs counts"):
        assemble(load_recipe("pet"), operator, measured(operator)[1], prior())

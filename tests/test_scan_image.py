"""Jobs on image volumes: what comes out and where it lies, closed-form posteriors, files, mistakes."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from recon3d import enhance, io
from recon3d.cli import run
from recon3d.engine.scan_image import Degradation, estimate_image_noise, finer, prepare
from recon3d.geometry import VolumeGrid
from recon3d.operators.image import ImageOperator
from recon3d.priors import load_prior
from recon3d.priors.gaussian import GaussianPrior, power_law
from recon3d.priors.magnitude import MagnitudePrior
from recon3d.priors.scaled import ScaledPrior
from recon3d.testing import dense, gaussian_posterior

FINE = VolumeGrid((3, 16, 24), (4.0, 1.0, 1.25))
COARSE = VolumeGrid((3, 8, 12), (4.0, 2.0, 2.5))
QUICK = ["-q", "-s", "recipe.trajectory.levels=3", "-s", "output.preview=false", "-s", "accept_mismatch=true"]


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def prior(shape=FINE.slice_shape, spread=1.0):
    return GaussianPrior(power_law(shape, spread), 0.0, offset=0.0, scale=1.0)


# ---- arrays ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", ["image", "ddnm_plus", "ddnm", "ilvr", "dps_image"])
@pytest.mark.parametrize("operator", ["identity", "sr", "blur"])
def test_every_recipe_takes_every_operator(recipe, operator):
    settings = {"identity": {}, "sr": {"factor": 2}, "blur": {"blur_mm": (0.0, 2.0, 2.0)}}[operator]
    grid = COARSE if operator == "sr" else FINE
    out = enhance(randn(*grid.shape), grid, operator, recipe, prior(), unit="au", noise=0.3, **settings)
    assert out.volume.shape == FINE.shape and out.grid.spacing_mm == FINE.spacing_mm
    assert bool(out.volume.isfinite().all()) and out.metrics["data"]["chi2_per_sample"] > 0


def test_the_estimate_of_a_gaussian_prior():
    """Where the prior is Gaussian the posterior is known, and a draw is as far from its mean as its spread says. The
    null-space sampler is an approximate one: 0.93 to 1.0 of the spread with many levels."""
    p = prior(spread=1.0)
    truth = p.mean + (torch.linalg.cholesky(p.covariance()) @ randn(p.covariance().shape[0], seed=1).double()).reshape(
        FINE.slice_shape
    )
    for d, grid, sigma in ((Degradation("identity"), FINE, 0.5), (Degradation("sr", 2), COARSE, 0.1)):
        op = d.operator(d.grid(grid))
        y = op(truth.expand(3, -1, -1).float()) + sigma * randn(*op.range.shape, seed=2)
        out = enhance(
            y, grid, d.kind, "ddnm_plus", ScaledPrior(p, 1.0), unit="au", noise=sigma, factor=d.factor, seed=3
        ).volume.double()
        weights = torch.full((1,), sigma**-2)
        for k in range(3):
            posterior = gaussian_posterior(p, dense(op.slab(0, 1)), y[k], weights)
            away = float((out[k] - posterior.mean).norm())
            spread = float(posterior.covariance.trace().sqrt())
            assert 0.7 * spread < away < 1.2 * spread, d


def test_hu_are_attenuation_inside():
    image = 200 * randn(*FINE.shape)
    scan = prepare(image, FINE, Degradation("identity"), values="hu", noise=20.0)
    assert scan.noise.sigma == pytest.approx(20 * 0.0193 / 1000)
    assert torch.allclose(scan.y, 0.0193 * (1 + image / 1000), atol=1e-7)


def test_finer_voxels_lie_in_the_coarse_ones():
    matrix = np.array([[0.1, -2.4, 0.2, 5.0], [-1.9, 0.1, 0.1, -7.0], [0.3, 0.2, 4.0, 9.0], [0, 0, 0, 1]])
    grid = VolumeGrid((3, 8, 12), (4.0, 2.4, 1.9), tuple(map(tuple, matrix.tolist())))
    fine = finer(grid, (2, 4, 4))
    assert fine.shape == (6, 32, 48) and fine.spacing_mm == pytest.approx((2.0, 0.6, 0.475))
    for voxel in ((0, 0, 0), (11, 7, 2), (5, 3, 1)):
        inside = np.array([[4 * voxel[0] + i, 4 * voxel[1] + j, 2 * voxel[2] + k, 1.0]
                           for i in range(4) for j in range(4) for k in range(2)])  # fmt: skip
        assert (inside @ fine.matrix().T).mean(0) == pytest.approx(matrix @ [*voxel, 1])
    assert finer(grid, (1, 1, 1)).matrix() == pytest.approx(matrix)


def test_thick_slices_become_thin():
    out = enhance(randn(3, 16, 24), FINE, "sr", "ddnm", prior(), unit="au", noise=None, factor_z=2)
    assert out.volume.shape == (6, 16, 24) and out.grid.spacing_mm == (2.0, 1.0, 1.25)


def test_slices_do_not_depend_on_batches():
    settings = {"unit": "au", "noise": 0.2, "factor": 2}
    one = enhance(randn(*COARSE.shape), COARSE, "sr", None, prior(), batch_size=1, workers=1, **settings)
    two = enhance(randn(*COARSE.shape), COARSE, "sr", None, prior(), batch_size=3, workers=2, **settings)
    assert torch.equal(one.volume, two.volume)


def test_noise_is_read_off_an_image():
    y, x = np.mgrid[:128, :128] / 128
    smooth = torch.tensor(1000 * np.exp(-8 * ((y - 0.5) ** 2 + (x - 0.4) ** 2)), dtype=torch.float32).expand(4, -1, -1)
    noisy = smooth + 12 * randn(4, 128, 128)
    assert estimate_image_noise(noisy).sigma == pytest.approx(12, rel=0.05)
    # air that was cut off says nothing
    assert estimate_image_noise(torch.where(smooth > 200, noisy, -100.0)).sigma == pytest.approx(12, rel=0.1)
    assert 0 < estimate_image_noise(torch.full((1, 8, 8), 5.0)).sigma < 1e-5
    with pytest.raises(ValueError, match="2 x 2"):
        estimate_image_noise(torch.zeros(3, 1, 9))


def test_a_complex_prior_of_real_images():
    net = load_prior("mr")
    p = MagnitudePrior(net, 200.0)
    u = 100 + 30 * randn(2, 1, 24, 20)
    out = p.denoise(u, 30.0)
    assert out.shape == u.shape and torch.equal(out, p.denoise(u, 30.0))
    assert torch.equal(p.denoise(u[1:], 30.0), out[1:])
    # scale alone decides: the same image in other units
    assert torch.allclose(MagnitudePrior(net, 2.0).denoise(u / 100, 0.3) * 100, out, rtol=1e-3, atol=0.05)
    assert float((out - 100).std()) < 15
    with pytest.raises(ValueError, match="must have 2 channels"):
        MagnitudePrior(load_prior("ct"), 1.0)
    with pytest.raises(ValueError, match="batch, 1, row, col"):
        p.denoise(u[:, 0], 1.0)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"operator": "sr"}, "needs a factor of at least 2"),
        ({"operator": "sr", "factor": 0}, "factor: a whole number"),
        ({"operator": "identity", "factor": 2}, "factor: has no meaning with operator identity"),
        ({"operator": "blur"}, "needs blur_mm"),
        ({"operator": "blur", "blur_mm": (0.0, -1.0, 1.0)}, "needs blur_mm"),
        ({"operator": "blur", "blur_mm": (0.0, 1.0, 1.0), "blur_kind": "motion"}, "gaussian or uniform"),
        ({"operator": "sharpen"}, "one of identity, sr, blur"),
        ({"noise": -1.0}, "sigma needs a positive number"),
        ({"unit": "bq"}, "unit must be one of hu, per_mm, au"),
        ({"image": torch.zeros(*FINE.shape)}, "every voxel is 0"),
        ({"image": torch.full(FINE.shape, float("nan"))}, "NaN"),
        ({"image": torch.zeros(16, 24)}, r"a volume is \[z, y, x\]"),
        ({"image": randn(3, 16, 23)}, "its grid"),
        ({"recipe": "ddnm_plus", "noise": None}, "noise of one stated level"),
        ({"unit": "au", "prior": "ct"}, "trained on images in 1/mm"),
    ],
)  # fmt: skip
def test_mistakes_in_one_sentence(settings, sentence):
    given = {"image": randn(*FINE.shape), "operator": "identity", "unit": "au", "noise": 0.3, "prior": prior()}
    given |= settings
    with pytest.raises(ValueError, match=sentence) as caught:
        enhance(given.pop("image"), FINE, given.pop("operator"), given.pop("recipe", None), given.pop("prior"), **given)
    assert "\n" not in str(caught.value)


def test_a_complex_image_is_refused():
    with pytest.raises(TypeError, match="magnitude"):
        enhance(torch.zeros(3, 8, 8, dtype=torch.complex64), VolumeGrid((3, 8, 8), (1.0, 1.0, 1.0)), unit="au")


def test_scanners_have_no_known_singular_values():
    from recon3d.consistency.scaled import spectral
    from recon3d.engine.clock import Timed

    op = Degradation("identity").operator(FINE)
    assert isinstance(op, ImageOperator) and spectral(Timed(op)).largest() == 1
    with pytest.raises(ValueError, match="for a scanner use consistency proximal_cg"):
        spectral(object())


# ---- files -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def coarse(tmp_path_factory):
    """A coarse image in HU whose header does not say so."""
    path = tmp_path_factory.mktemp("images") / "coarse.nii"
    import nibabel

    values = (300 * randn(12, 8, 3)).numpy().astype(np.float32)
    nibabel.Nifti1Image(values, np.diag([-2.5, -2.0, 4.0, 1.0])).to_filename(path)
    return path


def test_super_resolution_from_the_command_line(coarse, tmp_path, capsys):
    out = tmp_path / "out"
    command = ["enhance", "-i", str(coarse), "--operator", "sr", "--factor", "2", "--noise-hu", "20"]
    assert run([*command, "-o", str(out), *QUICK]) == 0, capsys.readouterr().err
    volume, grid = io.read_nifti(out / "volume.nii.gz")
    assert grid.shape == (3, 16, 24) and grid.spacing_mm == pytest.approx((4.0, 1.0, 1.25))
    image, place = io.read_nifti(coarse)
    assert grid.matrix() == pytest.approx(finer(place, (1, 2, 2)).matrix())
    assert io.image_unit(out / "volume.nii.gz") == "HU"
    # what was measured is in it
    back = volume.reshape(3, 8, 2, 12, 2).mean((2, 4))
    assert float((back - image).std()) < 0.6 * float(image.std())
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["modality"] == "image" and manifest["recipe"]["name"] == "image"
    assert manifest["grid"]["shape"] == [3, 16, 24] and str(coarse) in manifest["inputs"]["files"]
    # recon with the resolved job is the same job
    again = ["recon", "-c", str(out / "config.resolved.yaml"), "-o", str(tmp_path / "again"), "-q"]
    assert run(again) == 0
    assert (tmp_path / "again" / "volume.nii.gz").read_bytes() == (out / "volume.nii.gz").read_bytes()


def test_a_picture_and_the_noise_of_an_image_that_does_not_state_it(coarse, tmp_path, capsys):
    out = tmp_path / "out"
    assert run(["enhance", "-i", str(coarse), "--unit", "hu", "-o", str(out), "-q", "-s", "accept_mismatch=true",
                "-s", "recipe.trajectory.levels=2"]) == 0  # fmt: skip
    assert (out / "preview.png").stat().st_size > 1000
    said = [json.loads(line) for line in (out / "events.jsonl").read_text().splitlines()]
    assert json.loads((out / "manifest.json").read_text())["recipe"]["name"] == "image" and said


def test_an_image_in_arbitrary_units_takes_the_mr_prior(tmp_path):
    from recon3d.api import resolve
    from recon3d.config import load_config

    path = tmp_path / "mr.nii.gz"
    io.write_nifti(path, 500 * randn(2, 16, 16).abs(), VolumeGrid((2, 16, 16), (3.0, 1.0, 1.0)))
    job = resolve(load_config(None, ["input.operator=identity", f"input.path={path}", "noise.kind=none"]))
    assert job.prior == "mr" and job.recipe["name"] == "ddnm"
    assert run(["enhance", "-i", str(path), "-o", str(tmp_path / "out"), "--noise", "20", *QUICK]) == 0
    assert io.image_unit(tmp_path / "out" / "volume.nii.gz") == "au"


def test_an_unfinished_job_goes_on(coarse, tmp_path, monkeypatch):
    from recon3d.api import run_job
    from recon3d.config import load_config
    from recon3d.engine.executor import Interrupted

    job = load_config(None, [f"input.path={coarse}", "input.operator=sr", "input.factor=2", "input.image_unit=hu",
                             "noise.kind=gaussian", "noise.sigma=20", "recipe.trajectory.levels=4",
                             "output.preview=false", "accept_mismatch=true", "checkpoint.every_levels=1"])  # fmt: skip
    whole = run_job(job, tmp_path / "whole").volume
    count = iter(range(100))
    with pytest.raises(Interrupted):
        run_job(job, tmp_path / "cut", stop=lambda: next(count) > 8)
    assert torch.equal(run_job(job, tmp_path / "cut").volume, whole)


def test_a_dicom_series_is_an_image(data):
    pytest.importorskip("pydicom")
    from recon3d.api import plan_job
    from recon3d.config import load_config

    overrides = [f"input.path={data('io/dicom_small/CT_small.dcm')}", "input.operator=identity", "accept_mismatch=true"]
    assert plan_job(load_config(None, overrides), probe=False).levels > 0


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (["--noise", "20"], 2, "does not state its unit; set hu, per_mm (1/mm) or au"),
        (["--operator", "sr", "--noise-hu", "20"], 2, "needs a factor of at least 2"),
        (["--operator", "sharpen", "--unit", "hu"], 2, "input.operator"),
        (["--operator", "none", "--unit", "hu"], 2, "leaves nothing to enhance"),
        (["--unit", "hu", "--noise", "3", "--exact"], 2, "give one of them"),
        (["--unit", "au", "--noise-hu", "3"], 2, "is for images in HU"),
        (["--operator", "blur", "--blur-mm", "2,x", "--unit", "hu"], 2, "expected one width in mm"),
        (["--factor", "2", "--unit", "hu"], 2, "no meaning with operator identity"),
        (["--unit", "hu", "-s", "input.views=3"], 2, "input.views"),
        (["--unit", "hu", "-s", "grid.shape=[3,8,8]"], 2, "grid.shape"),
        (["--unit", "hu", "-s", "input.slices=[2,9]"], 2, "has 3 slices"),
        (["--unit", "au", "-s", "output.unit=hu"], 2, "arbitrary units"),
        (["--unit", "hu"], 2, "was trained on pixels of"),
    ],
)  # fmt: skip
def test_mistakes_on_the_command_line(coarse, tmp_path, capsys, arguments, code, sentence):
    assert run(["enhance", "-i", str(coarse), "-o", str(tmp_path / "out"), "-q", *arguments]) == code
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("recon3d: ")]
    assert len(said) == 1 and sentence in said[0]
    assert not (tmp_path / "out").exists()


def test_images_that_cannot_be_used(tmp_path, capsys):
    import nibabel

    def refused(values):
        path = tmp_path / "bad.nii"
        nibabel.Nifti1Image(values, np.eye(4)).to_filename(path)
        assert run(["enhance", "-i", str(path), "-o", str(tmp_path / "out"), "-q", "--unit", "hu"]) in (2, 3)
        (said,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("recon3d: ")]
        return said

    flat = np.zeros((8, 8), np.float32)
    assert "8 x 8 values" in refused(flat)
    assert "every voxel" in refused(np.full((16, 16, 2), 7, np.float32))
    holes = np.random.default_rng(0).normal(size=(16, 16, 2)).astype(np.float32)
    holes[3, 3, 1] = np.nan
    assert "bad.nii" in refused(holes)


def test_an_image_needs_an_operator(coarse, tmp_path, capsys):
    assert run(["recon", "-i", str(coarse), "-o", str(tmp_path / "out"), "-q", "--recipe", "ct", "--prior", "ct"]) == 3
    assert "input.operator" in capsys.readouterr().err


@pytest.mark.parametrize("method", ["pinv", "dip"])
def test_baselines_on_the_same_job(coarse, tmp_path, capsys, method):
    job = ["-i", str(coarse), "-s", "input.operator=sr", "-s", "input.factor=2", "-s", "input.image_unit=hu"]
    more = ["--iterations", "5"] if method == "dip" else []
    out = tmp_path / "out.nii.gz"
    assert run(["baseline", method, "-o", str(out), *job, *more]) == 0, capsys.readouterr().err
    volume, grid = io.read_nifti(out)
    assert grid.shape == (3, 16, 24) and io.image_unit(out) == "HU"
    if method == "pinv":
        assert torch.allclose(volume[:, ::2, ::2], io.read_nifti(coarse)[0], atol=0.1)
    assert run(["baseline", "fbp", "-o", str(out), *job]) == 2
    assert "pinv, dip" in capsys.readouterr().err


def test_several_samples_tell_where_detail_is_invented():
    settings = {"unit": "au", "noise": 0.1, "factor": 2, "samples": 3, "seed": 1}
    out = enhance(randn(*COARSE.shape), COARSE, "sr", "ddnm_plus", prior(), **settings)
    assert out.volume.shape == FINE.shape and out.uncertainty is not None

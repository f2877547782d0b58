"""The command line on PET counts: the same verbs, the right defaults, one sentence per mistake."""

from __future__ import annotations

import json

import pytest
import torch
import yaml
from pet_jobs import GEOMETRY, GRID, SUBSETS, body
from survivors import scan_file, tiny_prior
from test_cli import refused

from recon3d import io
from recon3d.cli import run

SMALL = {
    "name": "small",
    "start": {"image": "osem", "iterations": 1, "subsets": SUBSETS},
    "trajectory": {"grid": "karras", "levels": 3, "sigma_max": 0.4, "sigma_min": 0.05},
    "consistency": {"kind": "em", "iterations": 2, "subsets": SUBSETS, "rho_rule": "bayes", "rho": 1.0},
    "renoise": {"kind": "full", "amount": 0.5},
}
# few views and planes of the scanner that is nobody's
SCANNER = ["--scanner", "small", "--span", "3", "--max-ring-difference", "4", "--mashing", "4"]


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """Counts simulated by the command, and a job on them."""
    root = tmp_path_factory.mktemp("job")
    activity, mu = body()
    io.write_nifti(root / "activity.nii.gz", activity, GRID, label="Bq/mL")
    io.write_nifti(root / "mu.nii.gz", mu, GRID, label="1/mm")
    assert run(["simulate", str(root / "activity.nii.gz"), "-o", str(root / "scan"), "--mu", str(root / "mu.nii.gz"),
                "--counts", "3e5", *SCANNER]) == 0  # fmt: skip
    content = {
        "input": {"path": str(root / "scan")}, "grid": {"shape": [31, 24, 24]},
        "prior": str(tiny_prior(root / "prior")), "recipe": SMALL, "seed": 3, "accept_mismatch": True,
        "compute": {"device": "cpu", "workers": 1},
    }  # fmt: skip
    (root / "job.yaml").write_text(yaml.safe_dump(content))
    return root / "job.yaml"


def becquerels(volume, grid):
    return float(volume.sum()) * float(torch.tensor(grid.spacing_mm).prod()) / 1000


@pytest.fixture(scope="module")
def finished(job, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "done"
    assert run(["recon", "-c", str(job), "-o", str(folder), "-q"]) == 0
    return folder


def test_a_simulated_folder_holds_what_a_reconstruction_needs(job, capsys):
    folder = job.parent / "scan"
    assert sorted(p.name for p in folder.iterdir() if p.suffix == ".hs") == [
        "additive_term.hs", "mult_factors.hs", "prompts.hs",
    ]  # fmt: skip
    data = io.read_pet(folder)
    assert data.counts == pytest.approx(3e5, rel=0.01) and data.info.calibrated and data.mu is not None
    assert data.geometry.scanner.name == "small" and data.geometry.span == 3 and data.geometry.mashing == 4
    assert run(["info", str(folder)]) == 0
    said = capsys.readouterr().out
    assert "small" in said and "mult_factors.hs" in said


def test_a_run_leaves_one_whole_folder_in_becquerels(finished, job, capsys):
    assert sorted(p.name for p in finished.iterdir() if p.name != ".lock") == [
        "config.resolved.yaml", "events.jsonl", "manifest.json", "metrics.json", "preview.png", "volume.nii.gz",
    ]  # fmt: skip
    volume, grid = io.read_nifti(finished / "volume.nii.gz")
    assert grid.shape == (31, 24, 24) and volume.min() >= 0
    assert becquerels(volume, grid) == pytest.approx(becquerels(body()[0], GRID), rel=0.25)  # the prior is no good
    manifest = json.loads((finished / "manifest.json").read_text())
    assert manifest["modality"] == "pet" and len(manifest["inputs"]["files"]) >= 6
    fit = json.loads((finished / "metrics.json").read_text())["data"]
    assert 0.5 < fit["chi2_per_bin"] < 2 and "chi2_per_bin" in fit["definitions"]
    assert run(["resume", str(finished), "-q"]) == 0 and "already complete" in capsys.readouterr().out


def test_the_resolved_config_runs_again_to_the_same_bits(finished, tmp_path):
    again = tmp_path / "again"
    assert run(["recon", "-c", str(finished / "config.resolved.yaml"), "-o", str(again), "-q",
                "-s", "output.preview=false"]) == 0  # fmt: skip
    assert (again / "volume.nii.gz").read_bytes() == (finished / "volume.nii.gz").read_bytes()


def test_defaults_go_by_the_measurement(job):
    from recon3d.api import resolve
    from recon3d.config import load_config

    counts = load_config(None, ["recipe.trajectory.levels=5"], {"input.path": str(job.parent / "scan")})
    found = resolve(counts)
    assert found.prior == "pet" and found.recipe["name"] == "pet" and found.recipe["trajectory"]["levels"] == 5
    assert resolve(found) == found


def test_suv_needs_and_takes_dose_and_weight(job, capsys, tmp_path):
    dose = ["-s", "input.weight_kg=70", "-s", "input.injected_bq=3e8", "-s", "input.injection_to_scan_s=3600",
            "-s", "input.half_life_s=6586.2"]  # fmt: skip
    out = tmp_path / "suv.nii.gz"
    assert run(["osem", "-c", str(job), "-o", str(out), "--subsets", "4", "-s", "output.unit=suv", *dose]) == 0
    assert "SUVbw" in io.read_nifti_header(out).description
    said = refused(capsys, 2, "osem", "-c", job, "-o", tmp_path / "no.nii", "-s", "output.unit=suv")
    assert "weight_kg" in said and not (tmp_path / "no.nii").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (["-s", "input.views=10"], 2, "input.views: "),
        (["-s", "input.coils=2", "-s", "input.photons=1e5"], 2, "where these have no meaning"),
        (["-s", "output.unit=hu"], 2, "output.unit hu: "),
        (["-s", "output.unit=sieverts"], 2, "output.unit"),
        (["-s", "noise.kind=gaussian", "-s", "noise.sigma=1"], 2, "noise.sigma: "),
        (["-s", "input.normalisation=fansum"], 2, "hold it already"),
        (["-s", "input.attenuation=mu.nii.gz"], 2, "hold it already"),
        (["-s", "input.additive=nowhere.hs"], 3, "nowhere.hs"),
        (["-s", "grid.spacing_mm=[1.7,4,4]"], 2, "1.7"),
        (["-s", "recipe.consistency.subsets=99"], 2, "recipe.consistency.subsets: 99 asked for"),
        (["--recipe", "ct"], 2, "counts take em or gradient"),
        (["--prior", "mr"], 2, "channels"),
        (["-s", "input.psf_fwhm=4"], 2, "did you mean psf_fwhm_mm?"),
    ],
)
def test_mistakes_are_one_sentence_and_leave_nothing(job, capsys, tmp_path, arguments, code, sentence):
    accept = [] if "--prior" not in arguments else ["-s", "accept_mismatch=false"]
    said = refused(capsys, code, "recon", "-c", job, "-o", tmp_path / "out", "-q", *arguments, *accept)
    assert sentence in said
    assert not (tmp_path / "out").exists()


def test_what_belongs_to_pet_is_refused_for_ct(capsys, tmp_path):
    path = scan_file(tmp_path / "ct.h5")
    said = refused(capsys, 2, "recon", "-i", path, "-o", tmp_path / "out", "-q", "-s", "input.psf_fwhm_mm=4")
    assert "input.psf_fwhm_mm: " in said and "line integrals" in said
    assert "output.unit suv" in refused(capsys, 2, "recon", "-i", path, "-o", tmp_path / "out", "-s", "output.unit=suv")


def test_terms_from_files_and_estimates(job, tmp_path, capsys):
    """Counts alone, with the terms given one by one, or estimated from the counts."""
    folder = job.parent / "scan"
    alone, common = folder / "prompts.hs", ["-s", "grid.shape=[31,24,24]", "--subsets", "4"]
    out = tmp_path / "x.nii.gz"
    given = [f"input.multiplicative={folder / 'mult_factors.hs'}", f"input.additive={folder / 'prompts.hs'}"]
    given = [part for setting in given for part in ("-s", setting)]
    assert run(["osem", "-i", str(alone), "-o", str(out), *common, *given]) == 0
    made = ["-s", f"input.attenuation={folder / 'attenuation.nii.gz'}", "-s", "input.normalisation=fansum"]
    assert run(["osem", "-i", str(alone), "-o", str(out), *common, *made]) == 0
    volume, _ = io.read_nifti(out)
    assert volume.isfinite().all() and volume.max() > 0
    said = refused(capsys, 2, "osem", "-i", alone, "-o", out, "-s", "input.randoms=delayed")
    assert "no delayed coincidences" in said


@pytest.mark.parametrize("arguments", [["fbp"], ["osem", "--subsets", "4", "--rdp", "0.05"],
                                       ["osem", "--iterations", "5", "--subsets", "4"], ["osem", "--subsets", "1"],
                                       ["baseline", "mlem", "--iterations", "2"]])  # fmt: skip
def test_classical_methods(job, tmp_path, arguments):
    out = tmp_path / "x.nii.gz"
    assert run([*arguments, "-c", str(job), "-o", str(out)]) == 0
    volume, grid = io.read_nifti(out)
    assert grid.shape == (31, 24, 24) and volume.min() >= 0 and volume.max() > 0
    if arguments[0] == "osem" and "--rdp" not in arguments and arguments[-1] == "4":
        # 7 slices of 3 mm became 11 of 2 mm
        assert becquerels(volume, grid) == pytest.approx(becquerels(body()[0], GRID) * 22 / 21, rel=0.05)


def test_classical_methods_are_checked(job, capsys, tmp_path):
    assert "fbp, mlem, osem" in refused(capsys, 2, "baseline", "sirt", "-c", job, "-o", tmp_path / "x.nii")
    assert "takes no --rdp" in refused(capsys, 2, "baseline", "mlem", "-c", job, "-o", tmp_path / "x.nii", "--rdp", "1")
    sinogram = scan_file(tmp_path / "ct.h5")
    assert "measurement of CT" in refused(capsys, 2, "osem", "-i", sinogram, "-o", tmp_path / "x.nii")


def test_simulate_is_checked(job, capsys, tmp_path):
    volume = job.parent / "activity.nii.gz"
    for arguments, sentence in (
        (["--counts", "1e5"], "--counts: is for PET, which --scanner asks for"),
        (["--scanner", "nobodys"], "is not one of"),
        (["--scanner", "small", "--views", "9"], "is for CT"),
        (["--scanner", "small", "--coils", "2"], "is for k-space"),
        (["--scanner", "small", "--span", "4"], "span"),
        (["--scanner", "small", "--counts", "-1"], "counts"),
    ):
        said = refused(capsys, 2, "simulate", volume, "-o", tmp_path / "out", *arguments)
        assert sentence in said and not (tmp_path / "out").exists()


def test_plan(job, capsys):
    assert run(["plan", "-c", str(job), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["levels"] == 3


@pytest.mark.slow
def test_measured_list_mode(data, tmp_path):
    """The excerpt of a Siemens mMR: coarse on purpose; that it is head-shaped is asked elsewhere."""
    listed = data("raw_pet/mmr_fdg_612ms.l.hdr")
    out = tmp_path / "head.nii.gz"
    assert run(["osem", "-i", str(listed), "-o", str(out), "-s", "input.span=11", "-s", "input.mashing=4",
                "-s", "input.max_ring_difference=16", "-s", "input.normalisation=fansum",
                "-s", "grid.shape=[127,48,48]", "--subsets", "7", "--iterations", "1"]) == 0  # fmt: skip
    volume, _ = io.read_nifti(out)
    assert volume.isfinite().all() and volume.max() > 0 and GEOMETRY.n_views == 20

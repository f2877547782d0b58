"""The command line on k-space: the same verbs, the right defaults, one sentence per mistake."""

from __future__ import annotations

import json

import h5py
import pytest
import torch
import yaml
from mri_jobs import GRID, SIGMA, scan
from survivors import scan_file
from test_cli import refused

from recon3d import io
from recon3d.cli import run
from recon3d.io import KSpace, write_kspace_hdf5

SMALL = {
    "name": "small",
    "start": {"image": "cg", "iterations": 3},
    "trajectory": {"grid": "karras", "levels": 3, "sigma_max": 0.4, "sigma_min": 0.02},
    "consistency": {"kind": "proximal_cg", "iterations": 2, "rho_rule": "bayes", "rho": 1.0},
    "renoise": {"kind": "full"},
}


def complex_folder(folder):
    """A two-channel network of a few thousand weights, as packaged priors are stored."""
    from recon3d.priors import ModelCard
    from recon3d.priors.checkpoints import write_folder
    from recon3d.priors.networks import UNet, UNetConfig

    torch.manual_seed(5)
    config = UNetConfig(in_channels=2, out_channels=2, channels=(8, 16), blocks=1, embedding=16, group_size=8)
    net = UNet(config)
    card = ModelCard(
        name="tiny", channels=2, sigma_data=0.5, architecture={"family": "unet", **config.model_dump()}
    )  # fmt: skip
    write_folder(folder, card, net.state_dict())
    return folder


def kspace_file(path, **changes):
    _, maps, _, y = scan(1.0)
    covariance = 2 * SIGMA**2 * torch.eye(y.shape[1], dtype=torch.complex64)
    full = {"data": y, "mask": torch.ones(GRID.slice_shape), "trajectories": None, "grid": GRID, "maps": maps,
            "noise_covariance": covariance, "source_format": "recon3d"}  # fmt: skip
    write_kspace_hdf5(path, KSpace(**{**full, **changes}))
    return path


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    root = tmp_path_factory.mktemp("job")
    content = {
        "input": {"path": str(kspace_file(root / "scan.h5")), "undersample": {"acceleration": 3.0,
                  "centre_fraction": 0.3}},
        "prior": str(complex_folder(root / "prior")), "recipe": SMALL, "seed": 3,
        "compute": {"device": "cpu", "workers": 1},
    }  # fmt: skip
    (root / "job.yaml").write_text(yaml.safe_dump(content))
    return root / "job.yaml"


@pytest.fixture(scope="module")
def finished(job, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "done"
    assert run(["recon", "-c", str(job), "-o", str(folder), "-q"]) == 0
    return folder


def test_a_run_leaves_one_whole_folder(finished, job, capsys):
    assert sorted(p.name for p in finished.iterdir() if p.name != ".lock") == [
        "config.resolved.yaml", "events.jsonl", "manifest.json", "metrics.json", "phase.nii.gz", "preview.png",
        "volume.nii.gz",
    ]  # fmt: skip
    magnitude, grid = io.read_nifti(finished / "volume.nii.gz")
    assert grid.shape == GRID.shape and magnitude.min() >= 0
    manifest = json.loads((finished / "manifest.json").read_text())
    assert manifest["modality"] == "mri" and manifest["prior"]["scale"] > 0
    assert set(manifest["outputs"]) == {"volume.nii.gz", "phase.nii.gz", "preview.png", "metrics.json"}
    fit = json.loads((finished / "metrics.json").read_text())["data"]
    assert fit["chi2_per_sample"] > 0 and "chi2_per_sample" in fit["definitions"]
    assert run(["resume", str(finished), "-q"]) == 0 and "already complete" in capsys.readouterr().out
    assert run(["info", str(finished)]) == 0 and "complete run" in capsys.readouterr().out


def test_the_resolved_config_runs_again_to_the_same_bits(finished, tmp_path):
    again = tmp_path / "again"
    assert run(["recon", "-c", str(finished / "config.resolved.yaml"), "-o", str(again), "-q",
                "-s", "output.preview=false"]) == 0  # fmt: skip
    for name in ("volume.nii.gz", "phase.nii.gz"):
        assert (again / name).read_bytes() == (finished / name).read_bytes()


def test_defaults_go_by_the_measurement(job, tmp_path):
    from recon3d.api import resolve
    from recon3d.config import load_config

    kspace = load_config(None, ["recipe.trajectory.levels=5"], {"input.path": str(job.parent / "scan.h5")})
    found = resolve(kspace)
    assert found.prior == "mr" and found.recipe["name"] == "mri" and found.recipe["trajectory"]["levels"] == 5
    sinogram = load_config(None, (), {"input.path": str(scan_file(tmp_path / "ct.h5"))})
    assert resolve(sinogram).prior == "ct" and resolve(sinogram).recipe["name"] == "ct"
    assert resolve(found) == found


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["-s", "input.views=10"], "input.views: "),
        (["-s", "input.photons=1e5", "-s", "input.unit=transmission"], "where these have no meaning"),
        (["-s", "grid.spacing_mm=[1,1,1]"], "grid.spacing_mm: "),
        (["-s", "output.unit=hu"], "output.unit: "),
        (["-s", "input.spokes=3"], "see undersample"),
        (["-s", "input.coils=9"], "input.coils: 9 asked for"),
        (["-s", "input.undersample.acceleration=20"], "input.undersample: equispaced"),
        (["-s", "input.undersample.accelleration=2"], "did you mean acceleration?"),
        (["--prior", "ct"], "prior 'ct' was trained on images in 1/mm"),
        (["-s", "recipe.trajectory.levles=2"], "did you mean levels?"),
    ],
)
def test_mistakes_are_one_sentence_and_leave_nothing(job, capsys, tmp_path, arguments, sentence):
    said = refused(capsys, 2, "recon", "-c", job, "-o", tmp_path / "out", "-q", *arguments)
    assert sentence in said
    assert not (tmp_path / "out").exists()


def test_what_belongs_to_mri_is_refused_for_ct(capsys, tmp_path):
    path = scan_file(tmp_path / "ct.h5")
    said = refused(capsys, 2, "recon", "-i", path, "-o", tmp_path / "out", "-q", "-s", "input.coils=2")
    assert "input.coils: " in said and "line integrals" in said
    assert "has no meaning" in refused(
        capsys, 2, "baseline", "fbp", "-i", path, "-o", tmp_path / "x.nii", "-s", "input.undersample.acceleration=2"
    )


def test_bad_kspace_is_refused(capsys, tmp_path):
    def said(path):
        return refused(capsys, 3, "recon", "-i", path, "-o", tmp_path / "out", "-q")

    without = kspace_file(tmp_path / "gap.h5", maps=None, mask=torch.ones(GRID.slice_shape), noise_covariance=None)
    with h5py.File(without, "r+") as file:
        file["kspace"][:, :, :, 10:14] = 0
        if "mask" in file:
            file["mask"][..., 10:14] = 0
    assert "give coil maps" in said(without)
    nan = kspace_file(tmp_path / "nan.h5")
    with h5py.File(nan, "r+") as file:
        file["kspace"][0, 0, 0, 0] = float("nan")
    assert "nan.h5" in said(nan)
    odd = kspace_file(tmp_path / "odd.h5")
    with h5py.File(odd, "r+") as file:
        maps = file["maps"][:]
        del file["maps"]
        file["maps"] = maps[:, :3]
    assert "maps" in said(odd)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("method", ["zero_filled", "cg_sense", "cs"])
def test_baselines(job, tmp_path, method):
    out = tmp_path / "x.nii.gz"
    few = [] if method == "zero_filled" else ["--iterations", "5"]
    assert run(["baseline", method, "-c", str(job), "-o", str(out), *few]) == 0
    volume, grid = io.read_nifti(out)
    assert grid.shape == GRID.shape and volume.min() >= 0 and volume.max() > 0


def test_baselines_are_checked(job, capsys, tmp_path):
    assert "zero_filled, cg_sense, cs" in refused(capsys, 2, "baseline", "fbp", "-c", job, "-o", tmp_path / "x.nii")
    assert "takes no --strength" in refused(
        capsys, 2, "baseline", "cg_sense", "-c", job, "-o", tmp_path / "x.nii", "--strength", "1"
    )


def test_simulate_info_plan_metrics(finished, job, capsys, tmp_path):
    volume, out = str(finished / "volume.nii.gz"), tmp_path / "k.h5"
    assert run(["simulate", volume, "-o", str(out), "--coils", "3", "--acceleration", "2", "--noise", "0.01",
                "--centre-fraction", "0.3", "--rows", "0:2"]) == 0  # fmt: skip
    made = io.read_measurement(out)
    assert made.data.shape == (2, 3, *GRID.slice_shape) and made.noise_covariance is not None
    assert made.mask.mean() == pytest.approx(0.5)
    assert "which --coils asks for" in refused(capsys, 2, "simulate", volume, "-o", out, "--acceleration", "2")
    assert "is for CT" in refused(capsys, 2, "simulate", volume, "-o", out, "--coils", "2", "--views", "9")
    assert run(["info", str(out)]) == 0 and "coils" in capsys.readouterr().out
    assert run(["plan", "-c", str(job), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["levels"] == 3
    assert run(["metrics", volume, volume, "--unit", "au", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["volume.nii.gz"]["volume"]["rmse"] == 0

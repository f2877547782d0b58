"""The command line: every verb, one sentence per mistake, exit codes, and nothing left behind by a refusal."""

from __future__ import annotations

import json
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from survivors import GRID, MU, job_file

from recon3d import io
from recon3d.cli import run

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    return job_file(tmp_path_factory.mktemp("job"))


@pytest.fixture(scope="module")
def finished(job, tmp_path_factory):
    """A complete run with a picture."""
    folder = tmp_path_factory.mktemp("runs") / "done"
    assert run(["recon", "-c", str(job), "-o", str(folder), "-q", "-s", "output.preview=true"]) == 0
    return folder


def refused(capsys, code, *arguments):
    """The one sentence on stderr of a command that must end with this code."""
    capsys.readouterr()
    assert run([str(a) for a in arguments]) == code
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if line.startswith("recon3d: ")]
    assert len(lines) == 1 and "Traceback" not in err and out == "", err
    return lines[0]


def test_help_comes_at_once_and_without_torch():
    code = "import sys; from recon3d.cli import run; assert run(['--help']) == 0; assert 'torch' not in sys.modules"
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    for verb in ("recon", "resume", "plan", "info", "demo", "train", "metrics", "baseline", "osem", "fbp", "simulate"):
        assert re.search(rf"\b{verb}\b", done.stdout), verb
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime - before.ru_utime < 1  # processor time: the machine may be busy


def test_the_module_is_the_command():
    done = subprocess.run(
        [sys.executable, "-m", "recon3d", "recon"], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 2 and "Missing option" in done.stderr and "Traceback" not in done.stderr


def test_a_run_leaves_one_whole_folder(finished):
    assert sorted(p.name for p in finished.iterdir() if p.name != ".lock") == [
        "config.resolved.yaml", "events.jsonl", "manifest.json", "metrics.json", "preview.png", "volume.nii.gz",
    ]  # fmt: skip
    volume, grid = io.read_nifti(finished / "volume.nii.gz", "hu")
    assert grid.shape == GRID.shape and grid.spacing_mm == pytest.approx(GRID.spacing_mm)
    # zero-mean noise around half of water: the fit says the rays are explained
    assert volume.mean() == pytest.approx(MU / 2, rel=0.15)
    metrics = json.loads((finished / "metrics.json").read_text())
    assert metrics["data"]["chi2_per_ray"] > 0 and "chi2_per_ray" in metrics["data"]["definitions"]
    manifest = json.loads((finished / "manifest.json").read_text())
    assert manifest["seed"] == 11 and manifest["versions"]["torch"].startswith("2.")
    timings = manifest["timings"]
    assert timings["total_s"] >= timings["network_s"] > 0 and 0 <= timings["outside_network_share"] <= 1
    assert manifest["peak_memory_bytes"] > 0 and manifest["attempts"] == 1
    import hashlib

    for name, entry in manifest["outputs"].items():
        assert hashlib.sha256((finished / name).read_bytes()).hexdigest() == entry["sha256"]
    assert set(manifest["outputs"]) == {"volume.nii.gz", "preview.png", "metrics.json"}
    assert all(len(digest) == 64 for digest in manifest["inputs"]["files"].values())
    events = [json.loads(line)["event"] for line in (finished / "events.jsonl").read_text().splitlines()]
    assert events[-1] == "complete" and events.count("level") == 24


def test_the_resolved_config_runs_again_to_the_same_bits(finished, tmp_path):
    assert run(["recon", "-c", str(finished / "config.resolved.yaml"), "-o", str(tmp_path / "again"), "-q",
                "-s", "output.preview=false"]) == 0  # fmt: skip
    assert (tmp_path / "again" / "volume.nii.gz").read_bytes() == (finished / "volume.nii.gz").read_bytes()


def test_a_complete_run_is_not_overwritten_unasked(finished, job, capsys):
    before = (finished / "manifest.json").read_bytes()
    assert "--force" in refused(capsys, 2, "recon", "-c", job, "-o", finished, "-q")
    assert (finished / "manifest.json").read_bytes() == before
    assert run(["resume", str(finished), "-q"]) == 0
    assert "already complete" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("code", "arguments", "sentence"),
    [
        (2, ["--set", "seed=x"], "seed: "),
        (2, ["--set", "sed=1"], "unknown key sed; did you mean seed?"),
        (2, ["--set", "recipe.consistency.iterashuns=1"], "did you mean iterations?"),
        (2, ["--recipe", "ddss"], "recipe 'ddss' is not one of"),
        (2, ["--device", "cuda"] if not torch.cuda.is_available() else ["--device", "tpu"], "device"),
        (2, ["--set", "input.views=11"], "input.views: 11 asked for"),
        (2, ["--set", "grid.shape=[5,32,32]"], "grid.shape: 5 slices asked for, the measurement has 6"),
        (2, ["--set", "grid.spacing_mm=[2,3,-3]"], "grid.spacing_mm.2"),
        (2, ["--nonsense"], "No such option"),
        (3, ["-i", "/nowhere/scan.h5"], "/nowhere/scan.h5"),
        (3, ["--prior", "/nowhere"], "no such prior"),
        (4, ["--set", "compute.memory_budget_gib=0.001"], "predicted, 0.00 GiB allowed"),
    ],
)  # fmt: skip
def test_mistakes_are_one_sentence_and_leave_nothing(job, capsys, tmp_path, code, arguments, sentence):
    said = refused(capsys, code, "recon", "-c", job, "-o", tmp_path / "out", "-q", *arguments)
    assert sentence in said
    assert not (tmp_path / "out").exists()


def test_bad_measurements_are_refused(job, capsys, tmp_path):
    (tmp_path / "scan.h5").write_bytes(b"not this")
    assert "scan.h5" in refused(capsys, 3, "recon", "-c", job, "-i", tmp_path / "scan.h5", "-o", tmp_path / "out", "-q")
    assert not (tmp_path / "out").exists()


def test_resume_needs_a_run_and_changes_only_the_machine(finished, capsys, tmp_path):
    assert "no run to resume" in refused(capsys, 2, "resume", tmp_path, "-q")
    (tmp_path / "config.resolved.yaml").write_bytes((finished / "config.resolved.yaml").read_bytes())
    assert "compute.* and checkpoint.*" in refused(capsys, 2, "resume", tmp_path, "-q", "-s", "seed=2")
    assert run(["resume", str(tmp_path), "-q", "-s", "compute.workers=1"]) == 0
    assert (tmp_path / "volume.nii.gz").read_bytes() == (finished / "volume.nii.gz").read_bytes()


def test_plan_tells_memory_and_time(job, capsys):
    assert run(["plan", "-c", str(job), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["host_bytes"] == sum(told["parts_bytes"].values()) and told["estimated_s"] > 0 and told["levels"] == 24
    assert run(["plan", "-c", str(job), "--no-probe"]) == 0
    out = capsys.readouterr().out
    assert "peak memory" in out and "time" not in out


def test_info(finished, capsys):
    assert run(["info"]) == 0
    out = capsys.readouterr().out
    for word in ("versions", "machine", "reference", "dot", "radon", "priors", "recipes", "dds_tv"):
        assert word in out
    assert run(["info", str(finished)]) == 0
    assert "complete run" in capsys.readouterr().out
    assert run(["info", str(finished / "volume.nii.gz")]) == 0
    assert "32 x 32 x 6" in capsys.readouterr().out
    assert "/nowhere" in refused(capsys, 3, "info", "/nowhere")


def test_simulate_then_metrics(finished, capsys, tmp_path):
    scan = tmp_path / "scan.h5"
    assert run(["simulate", str(finished / "volume.nii.gz"), "-o", str(scan), "--views", "12", "--photons", "1e4",
                "--rows", "1:3"]) == 0  # fmt: skip
    measured = io.read_measurement(scan)
    assert measured.sinogram.shape[:2] == (2, 12) and measured.photons == 1e4 and measured.grid.shape == (2, 32, 32)
    fan = tmp_path / "fan.npz"
    assert run(["simulate", str(finished / "volume.nii.gz"), "-o", str(fan), "--views", "8",
                "--source-to-axis-mm", "300"]) == 0  # fmt: skip
    assert type(io.read_measurement(fan).geometry).__name__ == "FanBeam"
    capsys.readouterr()
    volume = str(finished / "volume.nii.gz")
    assert run(["metrics", volume, volume, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["volume.nii.gz"]["volume"]["rmse"] == 0
    assert "0:6" in refused(capsys, 2, "simulate", volume, "-o", tmp_path / "x.h5", "--rows", "3:9")
    assert "outside the volume" in refused(
        capsys, 2, "simulate", volume, "-o", tmp_path / "x.h5", "--source-to-axis-mm", "20"
    )
    assert not (tmp_path / "x.h5").exists()


@pytest.mark.parametrize("method", ["fbp", "sirt", "tv"])
def test_baselines(job, tmp_path, method):
    pytest.importorskip("recon3d.baselines.tv")
    out = tmp_path / "x.nii.gz"
    assert (
        run(["baseline", method, "-c", str(job), "-o", str(out), *(["--iterations", "20"] if method != "fbp" else [])])
        == 0
    )
    volume, _ = io.read_nifti(out, "hu")
    assert volume.mean() == pytest.approx(MU / 2, rel=0.15)


def test_baselines_are_checked(job, capsys, tmp_path):
    out = tmp_path / "x.nii.gz"
    assert "fbp, sirt, tv" in refused(capsys, 2, "baseline", "mlem", "-c", job, "-o", out)
    assert "takes no --strength" in refused(capsys, 2, "baseline", "sirt", "-c", job, "-o", out, "--strength", "1")
    assert ".nii" in refused(capsys, 2, "baseline", "fbp", "-c", job, "-o", tmp_path / "x.png")
    assert not list(tmp_path.iterdir())


def test_debug_shows_the_traceback(job, tmp_path):
    with pytest.raises(ValueError, match="unknown key"):
        run(["--debug", "recon", "-c", str(job), "-o", str(tmp_path / "x"), "-s", "sed=1"])

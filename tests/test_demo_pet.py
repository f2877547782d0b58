"""The PET part of the demonstration: what its figures mean, and that it runs from counts to a picture."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from recon3d import demo_pet
from recon3d.priors import ModelCard


class Shrinking:
    """A prior that takes no time and slices of any plane; the packaged one is asked in the demonstration itself."""

    card, offset, scale = ModelCard(name="shrinking"), 0.0, 1.0

    def denoise(self, u, sigma, cond=None):
        return u / (1 + sigma**2)


@pytest.fixture(scope="module")
def job():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    made = demo_pet.body(3e5, pixels=48)
    yield dataclasses.replace(made, prior=Shrinking())
    torch.set_num_threads(before)


def test_recovery_is_one_for_the_truth_and_none_for_a_blank(job):
    truth = job.phantom.activity
    found = demo_pet.recovery(truth, job.phantom)
    assert found["hot"] == pytest.approx(1) and found["cold"] == pytest.approx(1) and found["noise"] < 1e-5
    blank = torch.full_like(truth, 5.0)
    assert demo_pet.recovery(blank, job.phantom)["hot"] == pytest.approx(0, abs=1e-5)
    half = truth + 0.5 * (5000 * job.phantom.regions["body"] - truth)
    assert 0.4 < demo_pet.recovery(half, job.phantom)["cold"] < 0.6


def test_a_job_leaves_figures_pictures_and_the_truth(job, tmp_path):
    lines = []
    table = demo_pet.run_one(job, tmp_path, lines.append, lambda event: None)
    assert set(table["methods"]) == {"FBP", "OSEM", "OSEM+RDP, tuned", "recon3d pet"}
    for figures in table["methods"].values():
        assert figures["axial"]["psnr_db"] > 10 and set(figures["recovery"]) == {"hot", "cold", "noise"}
    assert {p.name for p in tmp_path.iterdir()} >= {"volume.nii.gz", "reference.nii.gz", "preview.png", "metrics.json"}
    assert json.loads((tmp_path / "metrics.json").read_text())["methods"].keys() == table["methods"].keys()
    assert any("hot recovery" in line for line in lines)

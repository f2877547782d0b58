"""What a job is said to take before it starts, against what it took."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import survivors
import torch

from recon3d.config import ComputeConfig
from recon3d.engine import plan
from recon3d.engine.memory import available_bytes, peak_above, resident_bytes
from recon3d.engine.problem import Problem
from recon3d.engine.scan_ct import CTScan
from recon3d.operators.noise import PoissonNoise
from recon3d.recipes import load_recipe

HERE = Path(__file__).parent


@pytest.mark.parametrize("recipe", ["dds", "dds_tv", "ct"])
def test_predicted_memory_is_what_a_run_took(tmp_path, recipe):
    """A peak counts when the workers meet at it, which on a busy machine they may not: three runs may be asked."""
    tried = []
    for run in range(3):
        done = subprocess.run(
            [sys.executable, str(HERE / "survivors.py"), "memory", str(tmp_path / str(run)), recipe],
            capture_output=True, text=True, timeout=180, cwd=HERE.parent, check=False,
            env={**os.environ, "PYTHONPATH": str(HERE.parent), "OMP_WAIT_POLICY": "passive"},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-2000:]
        told = json.loads(done.stdout)
        # libraries are half of a small job; what the job itself adds must be right too
        whole = told["predicted"] / told["observed"] - 1
        added = (told["predicted"] - told["before"]) / (told["observed"] - told["before"]) - 1
        if abs(whole) <= 0.12 and abs(added) <= 0.25:
            return
        assert told["observed"] < 1.12 * told["predicted"], told  # more than was told is wrong at once
        tried.append(told)
    pytest.fail(f"predicted memory is not what was taken: {tried}")


def problem(**changes):
    y, noise = survivors.sinogram(), PoissonNoise(1e5)
    scan = CTScan(y=y, geometry=survivors.SCAN, grid=survivors.GRID, noise=noise)
    settings = {"scan": scan, "recipe": load_recipe("ct"), "prior": survivors.prior()}
    return Problem(**{**settings, **changes})


def test_levels_cost_time_and_no_memory():
    few, many = (
        problem(recipe=load_recipe("ct", {"trajectory.levels": n, "trajectory.polish": None})) for n in (5, 50)
    )
    assert plan._phases(few, 1000, picture=True) == plan._phases(many, 1000, picture=True)
    slices = survivors.GRID.shape[0]
    few, many = (plan.predict(replace(p, prior=Slow()), ComputeConfig(workers=1)) for p in (few, many))
    # at least what the prior sleeps; a busy machine adds to it
    assert many.seconds >= many.seconds_by["network"] >= 0.02 * slices * 50 and many.levels == 50
    assert 0.02 * slices * 5 <= few.seconds_by["network"] < many.seconds_by["network"]


class Slow:
    """A prior that takes 20 ms a slice."""

    offset, scale = 0.0, survivors.MU

    def denoise(self, u, sigma, cond=None):
        time.sleep(0.02)
        return u


def test_a_budget_is_kept():
    found = plan.predict(problem(), ComputeConfig(memory_budget_gib=0.01), probe=False)
    assert "allowed by compute.memory_budget_gib" in found.short_of_memory
    assert found.seconds is None and "does not fit" in found.text()
    assert plan.predict(problem(), ComputeConfig(), probe=False).short_of_memory is None


def test_meters_measure():
    with peak_above() as risen:
        block = torch.ones(64 << 18)  # 64 MiB
        del block
    assert 60 << 20 <= risen[0] <= 80 << 20
    assert 0 < resident_bytes() < available_bytes() + resident_bytes()

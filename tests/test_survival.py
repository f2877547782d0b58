"""Runs that are killed, stopped, starved or poisoned end with the uninterrupted result or with one clear sentence."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from survivors import GRID, reconstruction

from recon3d.config import ConfigError
from recon3d.engine.checkpoint import CheckpointError
from recon3d.engine.events import read_events
from recon3d.engine.executor import Interrupted, NonFiniteError, ResourceError
from recon3d.engine.job import Schedule
from recon3d.engine.problem import Problem
from recon3d.engine.scan_ct import CTScan
from recon3d.geometry import ParallelBeam, VolumeGrid
from recon3d.priors import load_prior
from recon3d.recipes import load_recipe

HERE = Path(__file__).parent


def scenario(name: str, folder: Path, *arguments: str) -> dict:
    done = subprocess.run(
        [sys.executable, str(HERE / "survivors.py"), name, str(folder), *arguments],
        capture_output=True, text=True, timeout=550, cwd=HERE.parent, check=False,
        env={**os.environ, "PYTHONPATH": str(HERE.parent), "OMP_WAIT_POLICY": "passive"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def test_twenty_kills_at_random_moments_change_nothing(tmp_path):
    told = scenario("kills", tmp_path)  # compares the volumes itself
    assert told["kills"] >= 20 and told["runs"] >= 2
    assert max(told["attempts"]) >= 2, "no run was resumed, so nothing was tested"


@pytest.mark.parametrize("count", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_kills_of_a_complex_job_change_nothing(tmp_path, count):
    told = scenario("kills", tmp_path, str(count), "mri")
    assert told["kills"] >= count and max(told["attempts"]) >= 2, told


@pytest.mark.parametrize("count", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_kills_of_a_job_on_counts_change_nothing(tmp_path, count):
    """The subset that comes next is part of the state."""
    told = scenario("kills", tmp_path, str(count), "pet")
    assert told["kills"] >= count and max(told["attempts"]) >= 2, told


def test_signals_save_and_end_with_130(tmp_path):
    told = scenario("signals", tmp_path)
    assert told["codes"] == [130, 130]
    assert max(told["delays"]) < 10


@pytest.fixture(scope="module")
def calm():
    """The uninterrupted volume."""
    return reconstruction(None).volume


@pytest.mark.parametrize(("batch_size", "workers"), [(1, 1), (3, 2), (8, 2), (None, 1)])
def test_batches_and_threads_give_one_volume(calm, batch_size, workers):
    assert torch.equal(reconstruction(None, batch_size=batch_size, workers=workers).volume, calm)


class Poisoned:
    """The Gaussian prior, with something done at one call of the loop."""

    def __init__(self, inner, call, act):
        self.inner, self.call, self.act, self.count = inner, call, act, 0
        self.card, self.offset, self.scale = inner.card, inner.offset, inner.scale

    def denoise(self, u, sigma, cond=None):
        self.count += sigma != self.scale  # the plan asks at that level, the loop never does
        out = self.inner.denoise(u, sigma)
        return self.act(out) if self.count == self.call else out


def poisoned(monkeypatch, call, act):
    import survivors

    inner = survivors.prior()
    monkeypatch.setattr(survivors, "prior", lambda: Poisoned(inner, call, act))


def out_of_memory(out):
    raise MemoryError


def test_memory_that_runs_out_once_changes_nothing(calm, monkeypatch):
    events = []
    poisoned(monkeypatch, 2 * GRID.shape[0], out_of_memory)
    result = reconstruction(None, batch_size=4, workers=4, listeners=(events.append,))
    assert torch.equal(result.volume, calm)
    assert [e["batch_size"] for e in events if e["event"] == "out_of_memory"] == [2]


def test_a_nan_stops_the_run_and_the_checkpoint_goes_on(calm, monkeypatch, tmp_path):
    poisoned(monkeypatch, 4 * GRID.shape[0] + 3, lambda out: out * float("nan"))
    with pytest.raises(NonFiniteError, match=r"slice \d is not finite after the prior at level 4"):
        reconstruction(tmp_path, schedule=Schedule(every_levels=1), workers=1)
    assert read_events(tmp_path / "events.jsonl")[-1]["event"] == "not_finite"
    assert not (tmp_path / "manifest.json").exists()
    monkeypatch.undo()
    result = reconstruction(tmp_path)
    assert torch.equal(result.volume, calm) and result.attempts == 2


def test_stopping_within_a_level_loses_only_that_level(calm, tmp_path):
    seen = []

    def watch(event):
        if event["event"] == "slices":
            seen.append((event["level"], event["done"]))

    with pytest.raises(Interrupted):
        reconstruction(tmp_path, listeners=(watch,), stop=lambda: (5, 2) in seen, workers=1)
    saved = json.loads((tmp_path / "checkpoint" / "LATEST.json").read_text())["meta"]
    assert saved["index"] == 5
    events = []
    result = reconstruction(tmp_path, listeners=(events.append,))
    assert next(e for e in events if e["event"] == "start")["level"] == 5
    assert torch.equal(result.volume, calm)


def test_a_folder_belongs_to_one_job(tmp_path):
    import survivors

    with pytest.raises(Interrupted):
        reconstruction(tmp_path, schedule=Schedule(every_levels=1), stop=lambda: True)
    before = sorted(p.read_bytes() for p in tmp_path.rglob("*") if p.is_file() and p.name != "events.jsonl")
    args = (survivors.sinogram(), survivors.SCAN, survivors.GRID)
    other = survivors.Recipe.model_validate({**survivors.RECIPE, "name": "other"})
    with pytest.raises(CheckpointError, match=r"belongs to another job, differing in config"):
        survivors.reconstruct(
            *args, other, survivors.prior(), noise=survivors.PoissonNoise(1e5), seed=11, folder=tmp_path
        )
    after = sorted(p.read_bytes() for p in tmp_path.rglob("*") if p.is_file() and p.name != "events.jsonl")
    assert before == after
    reconstruction(tmp_path)
    with pytest.raises(ConfigError, match="holds a complete run"):
        reconstruction(tmp_path)
    reconstruction(tmp_path, force=True)


def test_a_full_disk_while_writing_the_result(calm, tmp_path, monkeypatch):
    import errno

    from recon3d.engine import folder

    def full(path, value):
        raise OSError(errno.ENOSPC, "injected", str(path))

    monkeypatch.setattr(folder, "write_json", full)
    with pytest.raises(ResourceError, match=r"the disk is full; .* resume"):
        reconstruction(tmp_path)
    assert not (tmp_path / "manifest.json").exists()
    monkeypatch.undo()
    events = []
    result = reconstruction(tmp_path, listeners=(events.append,))
    assert torch.equal(result.volume, calm)
    assert not [e for e in events if e["event"] == "level"], "the levels were computed again"


def test_a_file_where_the_folder_should_be(tmp_path):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(OSError):
        reconstruction(tmp_path / "out")
    assert (tmp_path / "out").read_text() == "mine"


def test_a_prior_set_to_another_range_is_another_prior():
    # its card stays the same, and a checkpoint made with the first range must not be continued with the second
    beam, grid = ParallelBeam((0.0,), 8, 1.0), VolumeGrid((1, 8, 8), (1.0, 1.0, 1.0))

    def digest(scale):
        prior = load_prior("ct")
        prior.offset = prior.scale = scale
        y = torch.zeros(1, 1, 8)
        scan = CTScan(y=y, geometry=beam, grid=grid)
        return Problem(scan=scan, recipe=load_recipe("ct"), prior=prior).prior_digest()

    assert digest(0.0193) == digest(0.0193) != digest(0.02)

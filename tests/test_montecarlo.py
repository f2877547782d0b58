"""Several samples of one job: their law of large numbers, their seeds, and that no interruption changes a bit."""

from __future__ import annotations

import dataclasses
import json

import mri_jobs
import nibabel as nib
import numpy as np
import pytest
import survivors
import torch
from mri_jobs import mri_reconstruction
from pet_jobs import pet_reconstruction
from survivors import GRID, MU, SCAN, prior, reconstruction, sinogram
from test_plan import Slow
from test_survival import scenario

from recon3d.api import enhance, reconstruct, reconstruct_mri
from recon3d.cli import run as command
from recon3d.config import ComputeConfig, ConfigError, OutputConfig
from recon3d.engine import montecarlo, plan, scan_image
from recon3d.engine.assemble import assemble
from recon3d.engine.checkpoint import CheckpointError
from recon3d.engine.events import read_events
from recon3d.engine.executor import Interrupted
from recon3d.engine.job import Schedule
from recon3d.engine.loop import reconstruct as run_loop
from recon3d.engine.montecarlo import reseeded, sample_seed
from recon3d.engine.problem import Problem
from recon3d.engine.scan_ct import CTScan
from recon3d.geometry import VolumeGrid
from recon3d.metrics import interval_factor
from recon3d.operators import CTOperator
from recon3d.operators.noise import PoissonNoise
from recon3d.ops.philox import NoiseKey
from recon3d.planes import InTurn, Neighbours
from recon3d.priors.gaussian import GaussianPrior, power_law
from recon3d.recipes import Recipe, load_recipe

pytestmark = pytest.mark.filterwarnings("ignore:samples. recipe")

K = 4
BARE = OutputConfig(preview=False)
KEPT = OutputConfig(preview=False, samples=True)


def single(seed):
    return reconstruct(
        sinogram(), SCAN, GRID, Recipe.model_validate(survivors.RECIPE), prior(), noise=PoissonNoise(1e5), seed=seed,
        device="cpu", workers=1,
    ).volume  # fmt: skip


def several(folder, samples=K, **settings):
    return reconstruction(folder, samples=samples, workers=1, **{"output": BARE, **settings})


def same(a, b):
    pairs = zip((a.volume, *_maps(a)), (b.volume, *_maps(b)), strict=True)
    return all(torch.equal(x, y) for x, y in pairs)


def _maps(result):
    return result.uncertainty.std, result.uncertainty.low, result.uncertainty.high


@pytest.fixture(scope="module")
def calm():
    """The uninterrupted run."""
    return several(None)


def test_mean_and_spread_are_those_of_plain_runs_with_the_samples_seeds(calm):
    stack = torch.stack([single(sample_seed(11, k)) for k in range(K)]).double()
    assert stack.std(0).mean() > 1e-3 * MU
    # sums run in float32
    torch.testing.assert_close(calm.volume.double(), stack.mean(0), rtol=1e-5, atol=1e-6 * MU)
    torch.testing.assert_close(calm.uncertainty.std.double(), stack.std(0), rtol=1e-4, atol=1e-6 * MU)
    width = calm.uncertainty.high - calm.uncertainty.low
    torch.testing.assert_close(width, 2 * interval_factor(K) * calm.uncertainty.std, rtol=1e-4, atol=1e-6 * MU)


def test_seeds_differ_and_the_first_is_the_jobs():
    seeds = [sample_seed(s, k) for s in (0, 1, 2**63) for k in range(200)]
    assert len(set(seeds)) == len(seeds) and all(0 <= s < 2**64 for s in seeds)
    assert sample_seed(5, 0) == 5


def keys(part):
    if isinstance(part, NoiseKey):
        yield part
    elif dataclasses.is_dataclass(part):
        for field in dataclasses.fields(part):
            yield from keys(getattr(part, field.name))


@pytest.mark.parametrize("recipe", ["posterior", "dds_iscs", "diffusionmbir"])
def test_all_randomness_of_a_sample_is_its_own(recipe):
    operator = CTOperator(SCAN, GRID)
    job = assemble(load_recipe(recipe), operator, sinogram(), prior(), weights=torch.ones(1, 1, 1), seed=3)
    other = reseeded(job, 4)
    assert {key.seed for key in keys(job)} == {3} and {key.seed for key in keys(other)} == {4}
    again = reseeded(other, 3)
    assert len(list(keys(again))) == len(list(keys(job))) >= 1
    few = slice(0, 6)
    runs = [run_loop(dataclasses.replace(j, trajectory=j.trajectory[few])) for j in (job, again, other)]
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])


def test_slices_that_are_drawn_are_a_samples_own_and_what_draws_nothing_is_shared():
    operator = CTOperator(SCAN, GRID)
    job = assemble(load_recipe("dds_tv"), operator, sinogram(), prior(), weights=torch.ones(1, 1, 1), seed=3)
    drawn = Neighbours(InTurn(GRID.shape, (0, 1), 3, seed=3), GRID.shape, 3, seed=3)
    other = reseeded(dataclasses.replace(job, planes=drawn), 4)
    assert other.planes == Neighbours(InTurn(GRID.shape, (0, 1), 3, seed=4), GRID.shape, 3, seed=4)
    assert other.consistency is job.consistency and other.operator is job.operator


def test_a_folder_gives_the_same_bits_and_keeps_samples(calm, tmp_path):
    result = several(tmp_path / "several", output=KEPT)
    assert same(result, calm)
    reconstruction(tmp_path / "plain", workers=1, output=BARE)
    folder = tmp_path / "several"
    assert (folder / "sample_0000.nii.gz").read_bytes() == (tmp_path / "plain" / "volume.nii.gz").read_bytes()
    hu = np.stack([nib.load(folder / f"sample_{k:04d}.nii.gz").get_fdata() for k in range(K)])
    std, mean = (nib.load(folder / f"{name}.nii.gz").get_fdata() for name in ("std", "volume"))
    # HU have no zero point in a spread; float32 of values about 1000
    assert np.allclose(std, hu.std(0, ddof=1), atol=2e-3) and np.allclose(mean, hu.mean(0), atol=2e-3)
    low, high = (nib.load(folder / f"{name}.nii.gz").get_fdata() for name in ("low", "high"))
    assert np.allclose((high - low) / 2, interval_factor(K) * std, atol=5e-3) and np.allclose(
        (high + low) / 2, mean, atol=5e-3
    )
    manifest = json.loads((folder / "manifest.json").read_text())
    told = manifest["samples"]
    assert (told["count"], told["form"], told["claims"]) == (K, "student", "estimate")
    assert told["factor"] == pytest.approx(interval_factor(K)) and "Gaussian" in told["definitions"]["interval"]
    assert {"std.nii.gz", "low.nii.gz", "high.nii.gz", "sample_0003.nii.gz"} <= manifest["outputs"].keys()
    assert not (folder / "checkpoint").exists()
    with pytest.raises(ConfigError, match="complete run"):
        several(folder)
    several(folder, samples=2, force=True)
    assert not list(folder.glob("sample_*"))  # what the longer run kept is gone


def test_nineteen_kept_samples_give_order_statistics(tmp_path):
    result = several(tmp_path, samples=19, output=KEPT)
    hu = np.stack([nib.load(tmp_path / f"sample_{k:04d}.nii.gz").get_fdata() for k in range(19)])
    for name, want in (("low", hu.min(0)), ("high", hu.max(0))):
        assert np.array_equal(nib.load(tmp_path / f"{name}.nii.gz").get_fdata(), want)
    told = json.loads((tmp_path / "manifest.json").read_text())["samples"]
    assert result.uncertainty.form == told["form"] == "order" and told["rank"] == 1.0 and "factor" not in told


@pytest.mark.parametrize("at", [(2, 5), (0, 1), (1, 23)])
def test_an_interrupted_sample_goes_on_to_the_same_bits(calm, tmp_path, at):
    seen = []

    def watch(event):
        if event["event"] == "level":
            seen.append((event["sample"], event["level"]))

    with pytest.raises(Interrupted):
        several(tmp_path, listeners=(watch,), stop=lambda: at in seen)
    assert same(several(tmp_path), calm)
    starts = [(e["sample"], e["level"]) for e in read_events(tmp_path / "events.jsonl") if e["event"] == "start"]
    sample, level = at
    # 23 is the last level: that sample is finished, and the next one goes on from its start
    again = (sample, level + 1) if level < 23 else (sample + 1, 0)
    before = again[0] + 1
    assert starts == [(k, 0) for k in range(before)] + [again] + [(k, 0) for k in range(before, K)]
    assert json.loads((tmp_path / "manifest.json").read_text())["attempts"] == 2


@pytest.mark.parametrize("before", [True, False], ids=["before the moments", "after the moments"])
def test_a_process_that_ends_between_two_samples_changes_nothing(calm, tmp_path, monkeypatch, before):
    """The last state of a sample and the moments are two files: either may be the last one written."""
    real = montecarlo.Moments.add

    def add(self, x, solved):
        if self.count == 1 and before:
            raise KeyboardInterrupt
        real(self, x, solved)
        if self.count == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(montecarlo.Moments, "add", add)
    with pytest.raises(KeyboardInterrupt):
        several(tmp_path)
    monkeypatch.undo()
    result = several(tmp_path)
    assert same(result, calm)
    assert len([e for e in read_events(tmp_path / "events.jsonl") if e["event"] == "sampled"]) == K - (not before)


def test_more_samples_go_on_and_fewer_than_finished_are_refused(calm, tmp_path):
    done = []

    def watch(event):
        if event["event"] == "sampled":
            done.append(event["sample"])

    with pytest.raises(Interrupted):
        several(tmp_path, samples=6, listeners=(watch,), stop=lambda: 2 in done)
    with pytest.raises(ConfigError, match="2 asked for, 3 are finished already"):
        several(tmp_path, samples=2)
    assert same(several(tmp_path), calm)


def test_one_sample_and_several_are_different_jobs(tmp_path):
    with pytest.raises(Interrupted):
        several(tmp_path, stop=lambda: True, schedule=Schedule(every_levels=1))
    with pytest.raises(CheckpointError, match="differing in samples"):
        reconstruction(tmp_path, workers=1)
    with pytest.raises(ValueError, match="samples: must be at least 1"):
        reconstruction(None, samples=0)


def test_kills_of_several_samples_change_nothing(tmp_path):
    told = scenario("kills", tmp_path, "3", "several")
    assert told["kills"] >= 3 and max(told["attempts"]) >= 2, told


def test_complex_images_keep_their_phase_and_tell_the_spread_of_magnitudes():
    result = mri_reconstruction(None, samples=3, workers=1)
    _, maps, mask, y = mri_jobs.scan()
    data = (y, mask, maps, mri_jobs.GRID, Recipe.model_validate(mri_jobs.RECIPE), mri_jobs.magnitude_prior())
    noise = mri_jobs.GaussianNoise(mri_jobs.SIGMA)
    volumes = [
        reconstruct_mri(*data, noise=noise, seed=sample_seed(11, k), device="cpu", workers=1).volume for k in range(3)
    ]
    stack = torch.stack(volumes)
    torch.testing.assert_close(result.volume, stack.mean(0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(result.uncertainty.std, stack.abs().std(0), rtol=1e-3, atol=1e-5)
    centre = (result.uncertainty.low + result.uncertainty.high) / 2
    free = result.uncertainty.low > 0
    torch.testing.assert_close(centre[free], stack.abs().mean(0)[free], rtol=1e-4, atol=1e-5)
    assert float(result.uncertainty.low.min()) >= 0


def test_activities_stay_positive(tmp_path):
    result = pet_reconstruction(tmp_path, samples=3, workers=1, output=BARE)
    assert float(result.volume.min()) >= 0 and float(result.uncertainty.low.min()) >= 0
    assert float(result.uncertainty.std.max()) > 0
    assert b"Bq/mL" in nib.load(tmp_path / "std.nii.gz").header["descrip"].tobytes()


def test_images_are_enhanced_several_times():
    grid = VolumeGrid((2, 16, 12), (2.0, 1.0, 1.0))
    image = torch.rand(grid.shape, generator=torch.Generator().manual_seed(1))
    result = enhance(
        image, grid, "sr", None, GaussianPrior(power_law((32, 24), 0.3)), unit="au", noise=0.1, factor=2, samples=2,
        device="cpu", workers=1,
    )  # fmt: skip
    assert result.uncertainty.std.shape == result.volume.shape == (2, 32, 24)
    assert float(result.uncertainty.std.max()) > 0


def test_spreads_in_hu_have_no_zero_point(tmp_path):
    image = scan_image.prepare(
        torch.rand(GRID.shape) * 100, GRID, scan_image.Degradation("identity"), values="hu", noise=20.0
    )
    ct = CTScan(y=sinogram(), geometry=SCAN, grid=GRID)
    for scan in (ct, image):
        scan.save_spread(tmp_path / "std.nii.gz", torch.full(GRID.shape, 0.02 * MU), OutputConfig())
        assert np.allclose(nib.load(tmp_path / "std.nii.gz").get_fdata(), 20)
        scan.save_spread(tmp_path / "std.nii.gz", torch.full(GRID.shape, 0.02 * MU), OutputConfig(unit="per_mm"))
        assert np.allclose(nib.load(tmp_path / "std.nii.gz").get_fdata(), 0.02 * MU)


def test_recipes_that_estimate_say_so():
    warned = []

    def listen(event):
        if event["event"] == "warning":
            warned.append(event["message"])

    with pytest.warns(Warning, match="claims an estimate"):
        several(None, samples=2, listeners=(listen,))
    assert any("recipe survivor claims an estimate" in w for w in warned)
    warned.clear()
    reconstruction(None, workers=1, listeners=(listen,))
    assert not any("claims" in w for w in warned)


def test_the_plan_counts_samples():
    scan = CTScan(y=sinogram(), geometry=SCAN, grid=GRID, noise=PoissonNoise(1e5))
    problem = Problem(scan=scan, recipe=load_recipe("ct"), prior=prior())
    one, ten, apart = (
        plan.predict(problem, ComputeConfig(workers=1), probe=False, samples=k, disk=disk)
        for k, disk in ((1, True), (10, True), (10, False))
    )
    assert ten.parts["volumes"] - one.parts["volumes"] == scan.volume_bytes  # the start image
    assert apart.parts["volumes"] - ten.parts["volumes"] == 2 * scan.volume_bytes  # mean and squared deviations
    slow = dataclasses.replace(problem, prior=Slow())
    told = plan.predict(slow, ComputeConfig(workers=1), samples=20)
    # at least what the prior sleeps; a busy machine adds to it
    assert told.seconds >= told.seconds_by["network"] >= 0.02 * GRID.shape[0] * 24 * 20
    assert "20 samples of 25 levels" in told.text()  # the polish is one more


def test_the_command_counts_samples_and_goes_on(tmp_path, capsys):
    job = survivors.job_file(tmp_path / "in")
    few = ["-s", "recipe.trajectory.levels=4", "-q"]
    assert command(["recon", "-c", str(job), "-o", str(tmp_path / "out"), "--samples", "3", *few]) == 0
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["samples"]["count"] == 3
    assert "samples: 3" in (tmp_path / "out" / "config.resolved.yaml").read_text()
    assert command(["plan", "-c", str(job), "--samples", "3", "--json", "--no-probe"]) == 0
    assert json.loads(capsys.readouterr().out)["samples"] == 3
    assert command(["recon", "-c", str(job), "-o", str(tmp_path / "no"), "--samples", "0", *few]) == 2
    assert "samples" in capsys.readouterr().err


def test_the_bar_counts_samples(capsys):
    from recon3d.cli.progress import progress_bar

    with progress_bar() as listen:
        for k in range(2):
            which = {"sample": k, "samples": 2}
            listen({"event": "start", "level": 0, "levels": 3, "attempt": 1, **which})
            listen({"event": "level", "level": 1, "levels": 3, **which})
    assert "sample 2/2, level 2/3" in capsys.readouterr().err

"""Images converted by conditional priors: the law of what samplers draw given a condition, and the verb end to end."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from torch import Tensor

from recon3d.api import convert_modality
from recon3d.cli import run
from recon3d.cli.converted import sampling
from recon3d.engine.assemble import assemble
from recon3d.engine.loop import reconstruct
from recon3d.engine.problem import Problem
from recon3d.engine.scan_convert import prepare
from recon3d.engine.scan_image import Degradation, ImageScan
from recon3d.geometry import VolumeGrid
from recon3d.operators.image import Nothing
from recon3d.planes import Axial
from recon3d.priors import ConditionCard, ModelCard, load_prior
from recon3d.priors.checkpoints import write_folder
from recon3d.priors.gaussian import GaussianPrior, cosine_basis, power_law
from recon3d.priors.networks import UNet, UNetConfig
from recon3d.recipes import recipe_from
from recon3d.testing import Posterior, check_posterior

ROWS, COLUMNS = 5, 6
GAIN, SPREAD = 0.8, 0.3


class PairPrior:
    """x ~ N(1, C), c = 0.8 x + noise of 0.3: the exact E[x | u, c], C diagonal in the cosine basis."""

    offset, scale = 1.0, 1.0

    def __init__(self) -> None:
        self.alone = GaussianPrior(power_law((ROWS, COLUMNS), 0.6), 1.0)
        self.card = ModelCard(name="pair", offset=1.0, cond_channels=1, condition=ConditionCard(), path="exact")
        self.variance = 1 / (1 / self.alone.spectrum + GAIN**2 / SPREAD**2)  # of x given c
        self._rows, self._columns = cosine_basis(ROWS), cosine_basis(COLUMNS)

    def mean(self, cond: Tensor) -> Tensor:
        """E[x | c]."""
        shift = self._rows @ (cond.double() - GAIN) @ self._columns.T
        return 1 + self._rows.T @ (self.variance * GAIN / SPREAD**2 * shift) @ self._columns

    def denoise(self, u: Tensor, sigma: float, cond: Tensor | None = None) -> Tensor:
        assert cond is not None
        mean = self.mean(cond)
        rest = self._rows @ (u.double() - mean) @ self._columns.T
        kept = self.variance / (self.variance + sigma**2) * rest
        return (mean + self._rows.T @ kept @ self._columns).to(u)

    def posterior(self, cond: Tensor) -> Posterior:
        return Posterior(self.mean(cond), GaussianPrior(self.variance).covariance())


@pytest.fixture
def card_only(tmp_path: Path) -> Path:
    """As much of a prior as choosing a sampler needs."""
    card = ModelCard(name="pair", cond_channels=1, condition=ConditionCard(), sigma_range=(0.01, 15.0))
    (tmp_path / "card.json").write_text(card.model_dump_json())
    return tmp_path


@pytest.mark.parametrize(
    ("sampler", "levels"), [("ddpm", 170), ("em", 120), ("pc", 70), ("ode", 25), ("rk45", 2)]
)  # first-order rules need many levels, see the orders measured in test_posterior
def test_every_sampler_draws_from_the_law_given_the_condition(sampler, levels, card_only):
    """Half of the slices are shown one condition and half another: each half has its own mean, both the covariance."""
    n, prior = 6000, PairPrior()
    generator = torch.Generator().manual_seed(3)
    shown = GAIN * prior.alone.sample(2, seed=4) + SPREAD * torch.randn(2, ROWS, COLUMNS, generator=generator)
    cond = shown.float().repeat_interleave(n // 2, dim=0)
    changes = sampling(card_only, sampler, levels)
    changes["renoise"] |= {"norms": "expected"} if sampler == "pc" else {}
    changes["renoise"] |= {"rtol": 1e-4, "atol": 1e-4} if sampler == "rk45" else {}
    operator = Nothing((n, ROWS, COLUMNS))
    job = assemble(recipe_from(changes, "sample"), operator, torch.zeros(n, 0, 0), prior, cond=cond, seed=5)
    job.planes = Axial(n, n)
    samples = reconstruct(job)
    for half, condition in zip(samples.chunk(2), shown, strict=True):
        check_posterior(half, prior.posterior(condition), mean_limit=0.02, std_limit=0.07)
    apart = prior.posterior(shown[0])
    with pytest.raises(AssertionError, match="off by"):  # the other half's condition would not do
        check_posterior(samples.chunk(2)[1], apart, mean_limit=0.02, std_limit=0.07)


# ---------------------------------------------------------------- jobs on a toy of 16 px

AFFINE = np.array([[0, -2.0, 0, 7], [0, 0, -2.0, 9], [3.0, 0, 0, -5], [0, 0, 0, 1]])


@pytest.fixture
def toy(tmp_path: Path) -> tuple[Path, Path]:
    """An MR of 3 slices of 16 x 14 px, stored in another axis order, and a tiny conditional prior in HU."""
    rng = np.random.default_rng(0)
    nibabel.save(
        nibabel.Nifti1Image(rng.uniform(0, 900, (3, 16, 14)).astype(np.float32), AFFINE), tmp_path / "mr.nii.gz"
    )
    config = UNetConfig(in_channels=2, channels=(8, 16), blocks=1, embedding=16, group_size=8)
    net, generator = UNet(config), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(0.2 * torch.randn(p.shape, generator=generator))
    card = ModelCard(
        name="toy", plane="axial", scale=1000, unit="HU", sigma_data=0.5, sigma_range=(0.01, 10.0), cond_channels=1,
        condition=ConditionCard(what="toy MR", percentile=99), architecture={"family": "unet", **config.model_dump()},
    )  # fmt: skip
    write_folder(tmp_path / "prior", card, net.state_dict())
    return tmp_path / "mr.nii.gz", tmp_path / "prior"


def _volume(folder: Path, name: str = "volume") -> nibabel.Nifti1Image:
    return nibabel.load(folder / f"{name}.nii.gz")


def test_the_verb_writes_the_prior_s_unit_where_the_image_was(toy, tmp_path):
    image, prior = toy
    out = tmp_path / "out"
    arguments = ["convert-modality", "-i", str(image), "--prior", str(prior), "-o", str(out), "--levels", "3", "-q"]
    assert run([*arguments, "--sampler", "ddpm", "-s", "seed=4"]) == 0
    found, given = _volume(out), nibabel.load(image)
    turned = nibabel.as_closest_canonical(given)
    assert sorted(found.shape) == sorted(given.shape)
    assert np.allclose(nibabel.as_closest_canonical(found).affine, turned.affine)
    assert b"HU" in found.header["descrip"].tobytes() and np.isfinite(found.get_fdata()).all()
    assert json.loads((out / "manifest.json").read_text())["recipe"]["renoise"]["kind"] == "ancestral"
    # the same job in the words of recon
    like = yaml_of({"like": "sample", "renoise": {"kind": "ancestral"}, "trajectory": {"levels": 3, "sigma_max": 10.0}})
    again = ["recon", "-i", str(image), "--prior", str(prior), "-o", str(tmp_path / "again"), "-q"]
    assert run([*again, "-s", "input.operator=none", "-s", f"recipe={like}", "-s", "seed=4"]) == 0
    assert np.array_equal(_volume(tmp_path / "again").get_fdata(), found.get_fdata())


def yaml_of(value: dict) -> str:
    return json.dumps(value)  # YAML holds JSON


def test_several_samples_give_a_mean_and_its_spread(toy, tmp_path):
    image, prior = toy
    out = tmp_path / "out"
    common = ["convert-modality", "-i", str(image), "--prior", str(prior), "-o", str(out), "-q"]
    assert run([*common, "--sampler", "pc", "--levels", "3", "--samples", "3"]) == 0
    mean, std, low, high = (_volume(out, name).get_fdata() for name in ("volume", "std", "low", "high"))
    assert (low < mean).all() and (mean < high).all() and std.min() > 0


def test_the_api_is_the_verb_and_slices_keep_the_volume_s_percentile(toy, tmp_path):
    image, prior = toy
    values = torch.from_numpy(np.asarray(nibabel.load(image).dataobj, dtype=np.float32))
    grid = VolumeGrid(tuple(values.shape), (3.0, 2.0, 2.0))
    recipe = recipe_from(sampling(prior, "ode", 3), "sample")
    whole = convert_modality(values, grid, prior, recipe, seed=2).volume
    assert whole.shape == values.shape
    card = load_prior(prior).card
    all_of_it, part = prepare(values, grid, card), prepare(values, grid, card, slices=(1, 2))
    assert torch.equal(all_of_it.condition(card)[1:2], part.condition(card))
    assert part.grid == grid.slab(1, 2)
    assert torch.equal(convert_modality(values, grid, prior, recipe, seed=2, workers=1, batch_size=1).volume, whole)


def test_a_stopped_conversion_goes_on_to_the_same_bits(toy, tmp_path):
    from recon3d.engine.executor import Interrupted

    image, prior = toy
    values = torch.from_numpy(np.asarray(nibabel.load(image).dataobj, dtype=np.float32))
    grid = VolumeGrid(tuple(values.shape), (3.0, 2.0, 2.0))
    recipe = recipe_from(sampling(prior, "ddpm", 6), "sample")
    whole = convert_modality(values, grid, prior, recipe, seed=2).volume
    asked = iter([False, False, True])
    with pytest.raises(Interrupted):
        convert_modality(values, grid, prior, recipe, seed=2, folder=tmp_path / "run", stop=lambda: next(asked, True))
    resumed = convert_modality(values, grid, prior, recipe, seed=2, folder=tmp_path / "run").volume
    assert torch.equal(whole, resumed)


def test_what_cannot_be_converted(toy, tmp_path, capsys):
    image, prior = toy
    out = str(tmp_path / "out")

    def says(*arguments: str) -> str:
        assert run(["convert-modality", "-o", out, *arguments]) in (2, 3)
        return capsys.readouterr().err

    assert "name its folder" in says("-i", str(image))
    given = ("-i", str(image), "--prior", str(prior))
    assert "--sampler: one of ddpm, em, pc, ode, rk45, got x" in says(*given, "--sampler", "x")
    assert "leave --sampler" in says(*given, "--recipe", "sample", "--levels", "3")
    assert "takes no condition" in says("-i", str(image), "--prior", "ct")
    assert "makes images in HU" in says(*given, "-s", "output.unit=hu")
    flat = tmp_path / "flat.nii.gz"
    nibabel.save(nibabel.Nifti1Image(np.full((4, 4, 4), 3.0, np.float32), np.eye(4)), flat)
    assert "every voxel is 3" in says("-i", str(flat), "--prior", str(prior))
    assert not Path(out).exists()


def test_a_job_without_the_image_says_so_before_it_starts(toy):
    prior = load_prior(toy[1])
    grid = VolumeGrid((2, 8, 8), (3.0, 1.0, 1.0))
    scan = ImageScan(y=torch.rand(2, 8, 8), grid=grid, degradation=Degradation("identity"))
    with pytest.raises(ValueError, match=r"prior 'toy' is conditional: .* \(toy MR\) beside the state"):
        Problem(scan=scan, recipe=recipe_from("sample", "sample"), prior=prior).check()

"""The self-test of priors names the mistake in a card, and the weights verbs run end to end."""

from __future__ import annotations

import math

import nibabel as nib
import numpy as np
import pytest
import torch
from test_weights import CONFIGS, random_state

from recon3d import cli
from recon3d.priors import ConditionCard, ModelCard
from recon3d.priors.network_prior import NetworkPrior
from recon3d.priors.paths import VP, VPContinuous
from recon3d.priors.self_test import known_slices, self_test


class ExactNetwork:
    """What a perfectly trained eps network gives for white Gaussian images of mean 0.4 and spread 0.15."""

    mean, spread, clock = 0.4, 0.15, "time"

    class config:
        multiple = 1

    def __init__(self, schedule="linear", ranged=False):
        self.path, self.ranged = VP(schedule=schedule), ranged

    def to(self, device):
        return self

    def for_inference(self, dtype):
        return self

    def __call__(self, x, t):
        # `ranged`: trained on 2 x - 1
        mean, spread = (2 * self.mean - 1, 2 * self.spread) if self.ranged else (self.mean, self.spread)
        sigma, s = self.path.sigma(float(t)), self.path.s(float(t))
        u = x / s
        return sigma / (spread**2 + sigma**2) * (u - mean)


def slices():
    g = torch.Generator().manual_seed(2)
    return 100 * (ExactNetwork.mean + ExactNetwork.spread * torch.randn(3, 1, 48, 48, generator=g))


class Mistaken(ExactNetwork):
    """Trained with one convention; with `wrong` in its card's architecture it is built with another."""

    def __init__(self, path, right, architecture):
        self.path, self.ranged = path, False
        self.off = any(architecture.get(key) != value for key, value in right.items())

    def __call__(self, x, t):
        # a network takes any number for a time
        t = t.clamp(max=1.0) if isinstance(self.path, VPContinuous) else t
        return super().__call__(x, t) * (0.3 if self.off else 1.0)


def verdict_of(clock, right, **card):
    whole = {"name": "p", "scale": 100.0, "sigma_range": (0.02, 3.0), "prediction": "eps", **card}
    made = ModelCard.model_validate(whole)
    return self_test(
        NetworkPrior(Mistaken(clock, right, made.architecture), made),
        slices(),
        remake=lambda other: NetworkPrior(Mistaken(clock, right, other.architecture), other),
    )


def verdict(net, **card):
    whole = {"name": "p", "scale": 100.0, "path": "vp", "prediction": "eps", "sigma_range": (0.02, 100.0)} | card
    made = ModelCard.model_validate(whole)
    return self_test(NetworkPrior(net, made), slices(), remake=lambda other: NetworkPrior(net, other))


def test_a_true_card_is_sound():
    found = verdict(ExactNetwork())
    assert found.sound
    assert all(0.9 < level.error / level.expected < 1.1 for level in found.levels)


@pytest.mark.parametrize(
    ("net", "card", "says"),
    [
        (ExactNetwork(ranged=True), {}, "a range of -1 to 1 where the card says 0 to 1 repairs it"),
        (
            ExactNetwork(),
            {"offset": 50.0, "scale": 50.0},
            "a range of 0 to 1 where the card says -1 to 1 repairs it",
        ),
        (ExactNetwork(), {"prediction": "v"}, "prediction 'eps' where the card says 'v' repairs it"),
        (ExactNetwork("cosine"), {}, "a cosine schedule where the card says linear repairs it"),
        (ExactNetwork("scaled_linear"), {}, "a scaled_linear schedule where the card says linear repairs it"),
    ],
)
def test_a_wrong_card_is_named(net, card, says):
    found = verdict(net, **card)
    assert not found.sound
    assert says in found.verdict


@pytest.mark.parametrize(
    ("path", "card", "says"),
    [
        (VPContinuous(0.1, 10.0), {"beta_max": 20.0}, "beta_max 10 where the card says 20 repairs it"),
        (VPContinuous(0.1, 20.0), {"beta_max": 10.0}, "beta_max 20 where the card says 10 repairs it"),
    ],
)
def test_a_wrong_continuous_schedule_is_named(path, card, says):
    found = verdict_of(path, {}, path="vp_continuous", schedule={"beta_min": 0.1, **card})
    assert says in found.verdict


def test_a_wrong_path_is_named():
    found = verdict_of(VPContinuous(0.1, 20.0), {}, path="vp", sigma_range=(0.05, 20.0))
    assert "the path vp_continuous where the card says vp repairs it" in found.verdict


@pytest.mark.parametrize(
    ("right", "wrong", "says"),
    [
        ({"legacy_attention": False}, {"legacy_attention": True}, "q, k and v one after another where the card says"),
        ({"longest_period": 0.005}, {"longest_period": 1e4}, "longest_period 0.005 where the card says 10000 repairs"),
        ({"centered": True}, {"centered": False}, "takes what it is given (--centered) where the card says otherwise"),
        ({"head_channels": None}, {"head_channels": 64}, "head_channels of all where the card says 64 repairs it"),
        ({"time_scale": 1000.0}, {"time_scale": 1.0}, "time_scale 1000 where the card says 1 repairs it"),
    ],
)
def test_a_network_built_otherwise_is_named(right, wrong, says):
    """Each convention that no shape tells; the network is exact when built as it was trained."""
    found = verdict_of(VP(), right, path="vp", architecture={"family": "adm", **wrong})
    assert not found.sound
    assert says in found.verdict


def test_a_wrong_sigma_data_is_named():
    class Karras(ExactNetwork):
        clock = "log_sigma"

        def __call__(self, x, t):
            sigma, d = math.exp(4 * float(t)), 0.5
            norm = math.hypot(sigma, d)
            u = x * norm
            best = u - sigma**2 / (self.spread**2 + sigma**2) * (u - self.mean)
            return (best - (d / norm) ** 2 * u) * norm / (sigma * d)

    found = verdict(Karras(), path="edm", prediction="edm", sigma_data=1.0, sigma_range=(0.02, 20.0))
    assert "sigma_data 0.5 where the card says 1.0 repairs it" in found.verdict


def test_a_network_of_noise_is_not_repaired():
    class Noise(ExactNetwork):
        def __call__(self, x, t):
            return torch.randn(x.shape, generator=torch.Generator().manual_seed(int(1e3 * float(t))))

    assert "no other schedule, range or kind" in verdict(Noise()).verdict


def test_constant_slices_are_refused():
    with pytest.raises(ValueError, match="constant"):
        self_test(
            NetworkPrior(ExactNetwork(), ModelCard(name="p", path="vp", prediction="eps")), torch.ones(1, 1, 8, 8)
        )


def test_the_verbs_inspect_and_convert(tmp_path, capsys):
    torch.save(random_state(CONFIGS["published shape"]), tmp_path / "model.pt")
    checkpoint, folder = str(tmp_path / "model.pt"), str(tmp_path / "prior")
    assert cli.run(["weights", "inspect", checkpoint, "--head-channels", "32"]) == 0
    told = capsys.readouterr().out
    assert "guided diffusion" in told
    assert "channels: [32, 64, 64]" in told
    assert "and a variance" in told
    how = ["--range", "-1", "1", "--values", "0", "0.04", "--unit", "1/mm", "--head-channels", "32"]
    assert cli.run(["weights", "convert", checkpoint, folder, *how]) == 0
    card = ModelCard.model_validate_json((tmp_path / "prior" / "card.json").read_text())
    assert (card.offset, card.scale, card.channels) == (0.02, 0.02, 1)
    assert math.isclose(card.sigma_range[1], VP().sigma(999), rel_tol=1e-3)
    assert cli.run(["weights", "convert", checkpoint, folder, *how]) == 3
    assert "holds a prior already" in capsys.readouterr().err
    assert cli.run(["weights", "convert", checkpoint, folder, "--range", "1", "1", *how[3:]]) == 2


def test_the_packaged_ct_prior_is_sound(tmp_path, capsys):
    from importlib import resources

    chest = resources.files("recon3d") / "data" / "ct_chest_pyrad_lung1.nii.gz"
    assert cli.run(["weights", "test", "ct", str(chest), "--slices", "1"]) == 0
    assert "ct: sound" in capsys.readouterr().out


def test_slices_are_shown_as_the_prior_was_trained(tmp_path):
    volume = torch.rand(9, 12, 10, generator=torch.Generator().manual_seed(3)) * 700
    shown, index = known_slices(ModelCard(name="x"), volume, 4)
    assert torch.equal(shown, volume[index][:, None]) and index.tolist() == [2, 3, 5, 6]
    # groups stay neighbours; real parts of all of them, then imaginary parts; a unit of the volume's own
    own = {"one network unit": "percentile 99.9 of a volume"}
    card = ModelCard(name="x", channels=6, slices=3, training=own)
    shown, index = known_slices(card, volume, 2)
    top = float(np.percentile(volume.numpy(), 99.9))
    assert shown.shape == (2, 6, 12, 10)
    for group, i in zip(shown, index, strict=True):
        torch.testing.assert_close(torch.hypot(group[:3], group[3:]) * top, volume[i : i + 3])
    assert shown[:, 3:].abs().max() > 0.1  # there is a phase
    # a volume in another unit is shown the same
    torch.testing.assert_close(known_slices(card, 50 * volume, 2)[0], shown)
    bright = ModelCard(
        name="x", training={"one network unit": "mean of the voxels above 0.5 of the maximum of a volume"}
    )
    above = volume[volume > 0.5 * volume.max()].mean()
    torch.testing.assert_close(known_slices(bright, volume, 1)[0][0, 0] * above, volume[4])


def test_what_no_volume_can_show_is_refused():
    volume = torch.rand(4, 8, 8, generator=torch.Generator().manual_seed(4))
    with pytest.raises(ValueError, match="5 slices at once"):
        known_slices(ModelCard(name="x", channels=5, slices=5), volume, 1)
    with pytest.raises(ValueError, match="3 channels for 1 slice"):
        known_slices(ModelCard(name="x", channels=3), volume, 1)
    own = ModelCard(name="x", training={"one network unit": "percentile 99 of a volume"})
    with pytest.raises(ValueError, match="volume with signal"):
        known_slices(own, -volume, 1)


def test_priors_of_complex_slices_and_with_a_condition_are_tested_too(tmp_path, capsys):
    head = tmp_path / "head.nii.gz"
    # edges, which a filter blurs and a prior of heads does not
    row, col = torch.linspace(-1, 1, 96)[:, None], torch.linspace(-1, 1, 96)
    parts = ((0.9, 0.7, 0.0, 60.0), (0.75, 0.6, 0.0, 140.0), (0.3, 0.1, 0.2, -120.0), (0.3, 0.1, -0.2, -120.0))
    x = sum(level * (((row / a) ** 2 + ((col - c) / b) ** 2) < 1) for a, b, c, level in parts).expand(4, 96, 96)
    nib.save(nib.Nifti1Image(x.permute(2, 1, 0).numpy(), np.diag([-1.0, -1.0, 1.0, 1.0])), head)
    assert cli.run(["weights", "test", "mr", str(head), "--slices", "1"]) == 0
    assert "mr: sound" in capsys.readouterr().out
    assert cli.run(["weights", "test", "mr", str(head), "--condition", str(head)]) == 2
    assert "is shown 0 image(s)" in capsys.readouterr().err
    # a file that cannot be read is told apart from a wrong choice, as everywhere
    assert cli.run(["weights", "test", "ct", str(head), "--condition", str(tmp_path / "none.nii")]) == 3
    assert "does not exist" in capsys.readouterr().err

    class Guided:
        """Knows the answer from its condition, and nothing without."""

        card = ModelCard(name="guided", cond_channels=1, condition=ConditionCard())
        offset, scale = 0.0, 1.0

        def denoise(self, u, sigma, cond=None):
            return torch.zeros_like(u) if cond is None else cond / 2

    images = torch.rand(2, 1, 16, 16, generator=torch.Generator().manual_seed(5))
    assert self_test(Guided(), images, cond=2 * images).sound
    assert not self_test(Guided(), images).sound

"""Networks that are told where in its slice a pixel lies."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from training_runs import config, raw, save

from recon3d.priors import ModelCard, load_prior
from recon3d.priors.network_prior import NetworkPrior
from recon3d.priors.networks import UNetConfig
from recon3d.priors.positions import positions
from recon3d.priors.training import train
from recon3d.priors.training.data import SliceData


def test_a_crop_lies_where_it_was_cut():
    whole = positions((9, 7))
    assert torch.allclose(positions((4, 3), (9, 7), (2, 1)), whole[:, 2:6, 1:4])
    assert torch.allclose(positions((4, 3), (9, 7), (2, 1), step=2.0), whole[:, 2:9:2, 1:6:2], atol=1e-6)
    assert whole[0, 0, 0] == whole[1, 0, 0] == -1 and whole[0, -1, -1] == whole[1, -1, -1] == 1


def test_beyond_the_slice_the_ramps_go_on():
    x = positions((1, 4), (5, 5), (0, 3))[0, 0]
    assert x.diff().allclose(torch.full((3,), 0.5)) and float(x[-1]) == 2.0


def test_a_slice_of_one_pixel_is_its_own_middle():
    assert positions((1, 1)).tolist() == [[[0.0]], [[0.0]]]


class _Echo(nn.Module):
    """Gives back one of its input channels."""

    clock = "log_sigma"
    config = UNetConfig(in_channels=3, channels=(8, 16), group_size=8)  # sides are multiples of 2

    def __init__(self, channel: int) -> None:
        super().__init__()
        self.channel = channel

    def for_inference(self, dtype):
        return self

    def forward(self, x, t):
        self.seen = (tuple(x.shape), float(t))
        return x[:, [self.channel]]


@pytest.mark.parametrize("channel", [1, 2])
def test_inference_shows_the_channels_a_card_asks_for(channel):
    """The estimate of a velocity network at sigma 1 tells what it put out: D = (u - sqrt(2) v) / 2."""
    card = ModelCard(name="p", path="vp", prediction="v", positions=True, offset=3.0, scale=2.0)
    net = _Echo(channel)
    prior = NetworkPrior(net, card, precision="float32")
    u = torch.full((2, 1, 5, 7), 3.0)  # the network's zero
    d = (prior.denoise(u, 2.0) - 3.0) / 2.0
    want = positions((5, 7))[channel - 1]
    assert torch.allclose(d, (-(2**0.5) / 2 * want).expand(2, 1, -1, -1), atol=1e-6)
    assert net.seen[0] == (1, 3, 6, 8)
    assert net.seen[1] == pytest.approx(0, abs=1e-7)  # log(sigma)/4, not the path's time


@pytest.fixture
def patches(tmp_path):
    """A run with positions on slices whose value is the distance from the middle, squared: no flip or turn hides it."""
    settings = raw(tmp_path)
    at = np.arange(64) - 31.5
    rings = (at[:, None, None] ** 2 + at[None, :, None] ** 2 + np.zeros(4)) - 1000
    for name in ("train0", "train1", "held"):
        save(tmp_path / f"{name}.nii.gz", np.round(rings))
    settings["network"] |= {"in_channels": 3}
    varied = {"native_share": 0.3, "rotate_deg": 180.0, "flip_rows": 0.5, "quarter_turns": 0.5}
    still = {"gain_jitter": 0.0, "offset_jitter": 0.0, "least_mean": -10.0, "zoom": [0.8, 1.4]}
    return settings | {"data": {**settings["data"], **varied, **still, "positions": True}}


def test_crops_are_told_where_they_lie(patches):
    """Windows, turned, zoomed, mirrored and transposed crops: the middle's distance says each pixel's value."""
    data, worst, seen = SliceData(config(patches)), 0.0, []
    for step in range(20):
        clean, _, _, where = data.batch(step)
        assert where.shape == (4, 2, 16, 16)
        radius = (31.5 * where).square().sum(1)
        inside = radius.sqrt() < 28  # beyond it a turned crop may have left the slice
        off = ((clean[:, 0] * 1000 + 1000) - radius)[inside]
        worst = max(worst, float(off.abs().max()) if off.numel() else 0.0)
        seen.append(where.flatten())
    # a pixel off would be 2 x 28 + 1; torch's cubic kernel is not exact on a parabola, and values are rounded
    assert worst < 8
    assert float(torch.cat(seen).min()) < -0.8 and float(torch.cat(seen).max()) > 0.8
    clean, _, where = data.validation_set()
    assert torch.equal(where, positions((64, 64)).expand(len(clean), -1, -1, -1))


def test_a_patch_prior_is_trained_and_loaded(patches):
    prior = load_prior(train(config(patches, steps=2, samples=2, sample_levels=3)).prior)
    assert prior.card.positions and prior.card.patch == 16 and prior.card.channels == 1
    u = torch.zeros(1, 1, 20, 30)
    assert prior.denoise(u, 0.5).shape == u.shape
    with pytest.raises(ValueError, match=r"in_channels must be 3 \(2 for positions\) and out_channels 1"):
        config(patches, network={**patches["network"], "in_channels": 1})

"""Networks that are told where in its slice a pixel lies."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from recon3d.priors import ModelCard
from recon3d.priors.network_prior import NetworkPrior
from recon3d.priors.networks import UNetConfig
from recon3d.priors.positions import positions


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

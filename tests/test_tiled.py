"""Patches of slices: exact cover, the whole slice's answer, seams that move, places, gradients and memory."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from recon3d import cli
from recon3d.engine.executor import Executor
from recon3d.priors import ModelCard, load_prior
from recon3d.priors.base import differentiable
from recon3d.priors.checkpoints import write_folder
from recon3d.priors.network_prior import NetworkPrior
from recon3d.priors.networks import ADM, ADMConfig, UNet, UNetConfig
from recon3d.priors.positions import positions
from recon3d.priors.tiled import TiledPrior, cover


def image(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Blur:
    """A shift-invariant linear denoiser of radius 4 with zeros beyond the slice, as a convolution has them."""

    offset, scale = 0.0, 1.0

    def __init__(self, patch=None, radius=4):
        self.card = ModelCard(name="blur", path="exact", prediction="x0", patch=patch)
        self.kernel = image(1, 1, 2 * radius + 1, 2 * radius + 1)
        self.radius, self.seen = radius, []

    def denoise(self, u, sigma, cond=None):
        self.seen.append(tuple(u.shape[-2:]))
        return F.conv2d(u, self.kernel, padding=self.radius) / (1 + sigma)


class Placed:
    """Answers with where the pixels lie."""

    offset, scale = 0.0, 1.0

    def __init__(self, patch=None):
        self.card = ModelCard(name="placed", path="exact", prediction="x0", patch=patch, positions=True)

    def denoise(self, u, sigma, cond=None, *, whole=None, corner=(0, 0)):
        where = positions(tuple(u.shape[-2:]), whole, corner).to(u)
        return (where[0] + 10 * where[1]).expand_as(u)


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 700), st.integers(16, 256), st.floats(0, 0.49), st.integers(0, 10**6))
def test_weights_add_up_to_one_at_every_pixel(n, length, share, origin):
    found = cover(n, length, int(share * length), origin)
    total = torch.zeros(n, dtype=torch.float64)
    for start, weight in zip(found.starts, found.weights, strict=True):
        assert start >= 0 and start + found.length <= n and weight.min() >= 0
        total[start : start + found.length] += weight
    assert (total - 1).abs().max() < 1e-14
    steps = [b - a for a, b in pairwise(found.starts)]
    assert all(0 < step <= length - int(share * length) for step in steps)


@given(st.integers(100, 300), st.integers(8, 30), st.integers(0, 99))
@settings(max_examples=50, deadline=None)
def test_the_outer_quarter_of_what_neighbours_share_counts_for_nothing(n, overlap, origin):
    found = cover(n, 64, overlap, origin)
    halo = overlap // 4
    for weight in found.weights[1:]:
        assert weight[:halo].abs().max() == 0
    for weight in found.weights[:-1]:
        assert weight[-halo:].abs().max() == 0


@pytest.mark.parametrize("patch", [None, 32])
@pytest.mark.parametrize("shape", [(2, 1, 90, 71), (1, 1, 64, 33), (1, 1, 20, 100), (1, 1, 20, 21)])
def test_a_shift_invariant_denoiser_answers_as_for_the_whole_slice(shape, patch):
    # radius 4 is the quarter of 16; the same zeros are beyond the border of a patch at the slice's border
    u, blur = image(*shape, seed=1), Blur(patch)
    whole = blur.denoise(u, 0.3)
    assert (TiledPrior(blur, 48, overlap=16).denoise(u, 0.3) - whole).abs().max() < 1e-12
    # and the law can fail: less overlap than the radius asks for is seen
    if len(u) == 2:
        assert (TiledPrior(blur, 32, overlap=4).denoise(u, 0.3) - whole).abs().max() > 1e-3


def test_equal_patches_are_no_larger_than_asked_for():
    blur = Blur()
    TiledPrior(blur, 300).denoise(image(1, 1, 512, 300), 0.1)
    assert blur.seen == [(288, 300)] * 2
    with pytest.raises(ValueError, match="names no patch"):
        TiledPrior(blur)


def test_seams_of_a_patch_prior_move_with_the_level_and_with_nothing_else():
    u, prior = image(3, 1, 100, 90), TiledPrior(Blur(32))
    first = prior.denoise(u, 0.5)
    assert torch.equal(first, TiledPrior(Blur(32)).denoise(u, 0.5))
    assert torch.equal(first[1:2], prior.denoise(u[1:2], 0.5))
    origins = {prior._origin(s) for s in torch.linspace(0.1, 3, 60).tolist()}
    assert len(origins) > 50
    rows = [row for row, _ in origins]
    assert min(rows) < 6 and max(rows) > 25 and max(rows) < 32
    assert set(prior.prior.seen) == {(32, 32)}


@pytest.mark.parametrize("patch", [None, 32])
def test_a_prior_of_places_is_told_where_its_patch_lies(patch):
    u, placed = image(2, 1, 100, 71), Placed(patch)
    assert (TiledPrior(placed, 32).denoise(u, 0.2) - placed.denoise(u, 0.2)).abs().max() < 1e-5


class Squares(torch.nn.Module):
    """Not linear, so that a gradient at the wrong place or weight shows."""

    offset, scale, differentiable = 0.0, 1.0, False

    def __init__(self):
        super().__init__()
        self.blur, self.card = Blur(), Blur().card

    def denoise(self, u, sigma, cond=None):
        y = self.blur.denoise(u, sigma) + (0 if cond is None else cond)
        return torch.tanh(y) * y if self.differentiable else (torch.tanh(y) * y).detach()


def test_gradients_pass_and_match_the_whole_slices():
    u, v = image(1, 1, 70, 50, seed=3), image(1, 1, 70, 50, seed=4)
    cond = image(1, 1, 70, 50, seed=5)
    gradients = []
    for prior in (Squares(), TiledPrior(Squares(), 40, overlap=16)):
        leaf = u.clone().requires_grad_()
        x0 = differentiable(prior).denoise(leaf, 0.1, cond)
        gradients.append(torch.autograd.grad(x0, leaf, v)[0])
    assert (gradients[0] - gradients[1]).abs().max() < 1e-12
    with pytest.raises(ValueError, match="records no gradients"), Executor(workers=1) as executor:
        executor.pull(TiledPrior(Squares(), 40), Rows(), u[0], [0], 0.1, v[0])


class Rows:
    def gather(self, u, view):
        return u[view][None, None]

    def scatter(self, out, x0, view):
        out[view] = x0[0, 0]


def test_the_executors_batches_and_workers_do_not_matter():
    u, prior = image(5, 80, 60).float(), TiledPrior(network(patch=32), 32)
    found = []
    for workers, batch in ((1, 1), (2, 4)):
        with Executor(batch, workers) as executor:
            found.append(executor.denoise(prior, Rows(), u, list(range(5)), 0.4))
    assert torch.equal(*found)


def network(**card):
    torch.manual_seed(0)
    extra = 2 if card.get("positions") else 0
    net = UNet(UNetConfig(in_channels=1 + extra, channels=(8, 16), blocks=1, embedding=16, group_size=8))
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.1)
    return NetworkPrior(net, ModelCard(name="tiny", sigma_data=0.5, **card), precision="float32")


def test_a_network_shown_places_takes_those_of_the_slice():
    u, prior = image(1, 1, 40, 36).float(), network(positions=True)
    part = prior.denoise(u[..., 8:24, 4:20], 0.3, whole=(40, 36), corner=(8, 4))
    assert (part - prior.denoise(u[..., 8:24, 4:20], 0.3)).abs().max() > 1e-4
    assert torch.equal(TiledPrior(prior, 64).denoise(u, 0.3), prior.denoise(u, 0.3))


def test_activations_are_those_of_a_patch():
    """Through the gradient too: what is kept for the way back is a few slices, not every layer's answer."""
    saved = []

    def pack(t):
        saved.append(t.numel())
        return t

    u = image(1, 1, 96, 96).float().requires_grad_()
    prior = differentiable(TiledPrior(network(), 32, overlap=0))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        prior.denoise(u, 0.3).sum().backward()
    assert 0 < sum(saved) <= 4 * 96 * 96
    assert torch.isfinite(u.grad).all()


def test_units_are_the_priors():
    prior = TiledPrior(network(), 32)
    prior.offset = prior.scale = 0.02
    assert (prior.prior.offset, prior.prior.scale, prior.scale) == (0.02, 0.02, 0.02)


def test_a_card_or_the_caller_asks_for_patches(tmp_path):
    torch.manual_seed(0)
    net = UNet(UNetConfig(channels=(8, 16), blocks=1, embedding=16, group_size=8))
    card = ModelCard(
        name="p", sigma_data=0.5, patch=32, architecture={"family": "unet", **net.config.model_dump(mode="json")}
    )
    write_folder(tmp_path / "p", card, net.state_dict())
    prior = load_prior(tmp_path / "p")
    assert isinstance(prior, TiledPrior) and prior.patch == 32 and prior.card.patch == 32
    assert isinstance(load_prior("ct", tile=128), TiledPrior)
    assert isinstance(load_prior("ct"), NetworkPrior)


@pytest.mark.parametrize(
    ("settings", "words"), [((8,), "at least 16"), ((32, 16), "less than half"), ((32, -1), "half")]
)
def test_numbers_out_of_range(settings, words):
    with pytest.raises(ValueError, match=words):
        TiledPrior(Blur(), *settings)


def test_a_converted_network_of_one_size_serves_larger_slices(tmp_path):
    torch.manual_seed(0)
    torch.save(ADM(ADMConfig(model_channels=32, channels=(32, 64), head_channels=32)).state_dict(), tmp_path / "m.pt")
    how = ["--range", "0", "1", "--values", "0", "0.04", "--unit", "1/mm", "--head-channels", "32", "--patch", "32"]
    assert cli.run(["weights", "convert", str(tmp_path / "m.pt"), str(tmp_path / "p"), *how]) == 0
    prior = load_prior(tmp_path / "p")
    assert isinstance(prior, TiledPrior) and prior.patch == 32
    assert prior.denoise(torch.zeros(1, 1, 50, 70), 0.01).shape == (1, 1, 50, 70)

"""Priors: noise paths, the network adapter, stored priors and the packaged CT prior."""

from __future__ import annotations

import hashlib
import json
import math
import os
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from recon3d.io import BadInput
from recon3d.priors import ConditionCard, ModelCard, Prior, check_plane, condition_volume, load_prior, packaged_priors
from recon3d.priors.checkpoints import build_network, read_folder, write_folder
from recon3d.priors.complex import complex_prior
from recon3d.priors.network_prior import NetworkPrior, check_sigma, compute_dtype
from recon3d.priors.networks import EDMDenoiser, UNet, UNetConfig
from recon3d.priors.networks.edm import coefficients
from recon3d.priors.paths import EDM, VE, VP, RectifiedFlow, VPContinuous, from_denoiser, noise_path, to_denoiser

TINY = UNetConfig(channels=(8, 16, 16), blocks=1, embedding=16, group_size=8)
MU_WATER = 0.0193


# ---------------------------------------------------------------- noise paths

# linear beta 1e-4 -> 0.02, 1000 steps: computed once in exact rational products, printed to three digits
VP_TABLE = {
    0: 0.0100, 10: 0.0469, 20: 0.0794, 40: 0.144, 100: 0.342, 200: 0.724, 300: 1.24, 400: 2.04,
    500: 3.44, 600: 6.17, 700: 12.0, 800: 25.7, 900: 60.8, 980: 130, 999: 157,
}  # fmt: skip


@pytest.mark.parametrize("t", VP_TABLE)
def test_vp_schedule_facts(t):
    assert VP().sigma(t) == pytest.approx(VP_TABLE[t], rel=6e-3)


@pytest.mark.parametrize(("sigma", "t"), [(0.1, 26), (0.5, 144), (1, 258), (2, 396), (5, 565), (10, 674), (50, 878)])
def test_vp_inverse_facts(sigma, t):
    assert round(VP().time(sigma)) == t


def test_vp_agrees_with_cumulative_product():
    beta = np.linspace(1e-4, 0.02, 1000)
    abar = np.cumprod(1 - beta)
    path = VP()
    for t in (0, 1, 500, 999):
        assert path.sigma(t) == pytest.approx(math.sqrt((1 - abar[t]) / abar[t]), rel=1e-11)
        assert path.s(t) == pytest.approx(math.sqrt(abar[t]), rel=1e-11)


def test_cosine_schedule_agrees_with_its_definition():
    f = np.cos((np.arange(1001) / 1000 + 0.008) / 1.008 * np.pi / 2) ** 2
    abar = np.cumprod(1 - np.minimum(1 - f[1:] / f[:-1], 0.999))
    path = VP(schedule="cosine")
    for t in (0, 1, 500, 998, 999):
        assert path.sigma(t) == pytest.approx(math.sqrt((1 - abar[t]) / abar[t]), rel=1e-9)


def test_continuous_vp_agrees_with_the_integral_of_beta():
    path = VPContinuous(0.1, 10.0)
    for t in (1e-3, 0.1, 0.5, 1.0):
        mean = math.exp(-(t**2) * (10.0 - 0.1) / 4 - t * 0.1 / 2)
        assert path.s(t) == pytest.approx(mean, rel=1e-12)
        assert path.sigma(t) == pytest.approx(math.sqrt(1 - mean**2) / mean, rel=1e-9)
    assert path.sigma(1.0) == pytest.approx(12.45, abs=0.01)
    with pytest.raises(ValueError, match="at most"):
        path.time(13.0)


def test_noise_path_takes_what_the_card_says():
    assert noise_path("vp", {"beta_max": 0.03}) == VP(beta_max=0.03)
    assert noise_path("flow", {}) == RectifiedFlow()
    with pytest.raises(ValueError, match="path must be one of"):
        noise_path("exact", {})
    with pytest.raises(ValueError, match="has no 'sigma_max'; it has beta_min"):
        noise_path("vp", {"sigma_max": 3})


PATHS = {
    "vp": (VP(), 999.0),
    "vp-100": (VP(1e-3, 0.2, 100), 99.0),
    "vp-cosine": (VP(schedule="cosine"), 999.0),
    "vp-continuous": (VPContinuous(), 1.0),
    "ve": (VE(), 1.0),
    "edm": (EDM(), 80.0),
    "flow": (RectifiedFlow(), 0.99),
}


@pytest.mark.parametrize("name", PATHS)
def test_time_inverts_sigma(name):
    path, end = PATHS[name]
    for t in np.linspace(0.003 if name in ("edm", "flow", "vp-continuous") else 0.0, end, 41):
        assert path.time(path.sigma(t)) == pytest.approx(t, rel=1e-12, abs=1e-12 * end)


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("kind", ["x0", "eps", "score", "v", "flow"])
def test_conversions_round_trip(name, kind):
    path, end = PATHS[name]
    g = torch.Generator().manual_seed(3)
    x0, eps = (
        torch.randn(2, 1, 5, 7, dtype=torch.float64, generator=g),
        torch.randn(2, 1, 5, 7, dtype=torch.float64, generator=g),
    )
    for t in (0.1 * end, 0.4 * end, 0.9 * end):
        sigma, s = path.sigma(t), path.s(t)
        u = x0 + sigma * eps
        d = 0.7 * x0 + 0.1 * u
        output = from_denoiser(d, u, sigma, kind, s)
        back = to_denoiser(output, u, sigma, kind, s)
        assert (back - d).abs().max() <= 1e-12 * max(1.0, sigma)
        # and against the textbook form of each, with the true x0 in place of D
        truth = {
            "x0": x0,
            "eps": eps,
            "score": -eps / (s * sigma),
            "v": (eps - sigma * x0) / math.sqrt(1 + sigma**2),
            "flow": eps - x0,
        }[kind]
        assert (to_denoiser(truth, u, sigma, kind, s) - x0).abs().max() <= 1e-12 * max(1.0, sigma)


def test_vp_eps_network_in_its_own_coordinates():
    """D = (x_t - sqrt(1-abar) eps) / sqrt(abar) is what the canonical form says."""
    path, t = VP(), 300
    abar = path.s(t) ** 2
    x_t, eps = torch.randn(2, 3, dtype=torch.float64), torch.randn(2, 3, dtype=torch.float64)
    own = (x_t - math.sqrt(1 - abar) * eps) / math.sqrt(abar)
    assert (to_denoiser(eps, x_t / path.s(t), path.sigma(t), "eps") - own).abs().max() < 1e-12


def test_flow_clock():
    t = RectifiedFlow().time(3.0)
    s = RectifiedFlow().s(t)
    assert (t, s) == (0.75, 0.25)
    x_t, v = torch.randn(4, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    assert (to_denoiser(v, x_t / s, 3.0, "flow") - (x_t - t * v)).abs().max() < 1e-12


@pytest.mark.parametrize(
    "call",
    [
        lambda: VP(steps=1), lambda: VP(0.1, 0.01), lambda: VP().sigma(1000), lambda: VP().time(1e-3),
        lambda: VP().time(float("nan")), lambda: VE(1.0, 0.5), lambda: VE().sigma(1.5), lambda: VE().time(1e4),
        lambda: EDM().sigma(0.0), lambda: to_denoiser(torch.zeros(1), torch.zeros(1), -1.0, "eps"),
        lambda: to_denoiser(torch.zeros(1), torch.zeros(1), 1.0, "epsilon"),
        lambda: from_denoiser(torch.zeros(1), torch.zeros(1), 1.0, "epsilon"),
    ],
)  # fmt: skip
def test_paths_reject(call):
    with pytest.raises(ValueError, match="got"):
        call()


# ---------------------------------------------------------------- card


def test_check_plane():
    card = ModelCard(name="p", plane="axial", spacing_mm=(0.8, 2.2))
    assert check_plane(card, "axial", 1.1) is None
    assert check_plane(card, "axial", (0.8, 2.2)) is None
    assert "coronal" in check_plane(card, "coronal", (1.1, 5.0))
    message = check_plane(card, "axial", (1.1, 5.0))
    assert "1.1 x 5 mm" in message and "0.8 to 2.2 mm" in message and "\n" not in message
    anything = ModelCard(name="oracle")
    assert check_plane(anything, "sagittal", 9.0) is None


def test_check_sigma():
    card = ModelCard(name="p", sigma_range=(0.003, 4.0))
    assert check_sigma(card, 2.0, 0.005) is None
    assert "got 10" in check_sigma(card, 10.0)
    assert "stop at" in check_sigma(card, 2.0, 1e-4)
    assert check_sigma(ModelCard(name="oracle"), 1e3) is None


@pytest.mark.parametrize(
    "bad",
    [
        {"scale": 0.0},
        {"scale": float("inf")},
        {"spacing_mm": (2, 1)},
        {"plane": "oblique"},
        {"colour": 1},
        {"sha256": "x"},
    ],
)
def test_card_rejects(bad):
    with pytest.raises(ValueError):
        ModelCard(name="p", **bad)


# ---------------------------------------------------------------- adapter


def _net(seed: int = 0) -> UNet:
    torch.manual_seed(seed)
    net = UNet(TINY)
    with torch.no_grad():  # the zero-initialised layers would hide everything
        for p in net.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return net


def _card(**changes) -> ModelCard:
    fields = {"name": "tiny", "offset": MU_WATER, "scale": MU_WATER, "unit": "1/mm", "sigma_data": 0.5}
    return ModelCard(**fields, architecture={"family": "unet", **TINY.model_dump(mode="json")}, **changes)


def _state(*shape: int, seed: int = 1) -> torch.Tensor:
    return MU_WATER * (1 + 0.5 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed)))


@pytest.fixture
def one_thread():
    n = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n)


def test_edm_coefficients():
    sigma = torch.tensor([0.01, 0.5, 3.0], dtype=torch.float64)
    c_skip, c_out, c_in, c_noise = coefficients(sigma, 0.5)
    # unit variance in, unit variance target, and D -> u as sigma -> 0
    assert torch.allclose(c_in**2 * (sigma**2 + 0.25), torch.ones(3, dtype=torch.float64))
    assert torch.allclose(c_out**2, (1 - c_skip) ** 2 * 0.25 + c_skip**2 * sigma**2)
    assert torch.allclose(c_noise.mul(4).exp(), sigma) and c_skip[0] > 0.999


def test_loss_of_an_untrained_network_is_its_target_variance():
    model = EDMDenoiser(UNet(TINY), 0.5)  # its head is zero: D = c_skip u
    x = 0.5 * torch.randn(64, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    noise = torch.randn(64, 1, 16, 16, generator=torch.Generator().manual_seed(1))
    assert model.loss(x, torch.full((64,), 0.2), noise).item() == pytest.approx(1.0, abs=0.03)


def test_adapter_is_the_preconditioned_network_in_user_units():
    net = _net()
    truth = EDMDenoiser(net, 0.5)
    u, sigma = _state(2, 1, 16, 24), 0.3 * MU_WATER
    with torch.no_grad():
        want = truth((u - MU_WATER) / MU_WATER, torch.full((2,), 0.3)) * MU_WATER + MU_WATER
    prior = NetworkPrior(net, _card(), precision="float32")
    got = prior.denoise(u, sigma)
    assert isinstance(prior, Prior)
    assert (got - want).abs().max() <= 2e-6 * MU_WATER
    assert not got.requires_grad and not prior._net.training


def test_adapter_scales_with_its_unit():
    a = NetworkPrior(_net(), _card(), precision="float32")
    b = NetworkPrior(_net(), _card().model_copy(update={"offset": 0.0, "scale": 1.0}), precision="float32")
    u = _state(1, 1, 16, 16)
    want = b.denoise((u - MU_WATER) / MU_WATER, 0.2) * MU_WATER + MU_WATER
    assert (a.denoise(u, 0.2 * MU_WATER) - want).abs().max() <= 2e-6 * MU_WATER


@pytest.mark.parametrize("shape", [(1, 1), (2, 7), (5, 3), (61, 53), (8, 8), (9, 16)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_any_size_keeps_shape_and_dtype(shape, dtype):
    prior = NetworkPrior(_net(), _card(), precision="float32")
    u = _state(1, 1, *shape).to(dtype)
    out = prior.denoise(u, 0.1 * MU_WATER)
    assert out.shape == u.shape and out.dtype == dtype and bool(torch.isfinite(out).all())


def test_padding_reflects():
    """An image with a mirrored right and lower rim gives, where it was, what the bare image gives."""
    prior = NetworkPrior(_net(), _card(), precision="float32")
    u = _state(1, 1, 13, 14)
    whole = torch.nn.functional.pad(u, (0, 2, 0, 3), mode="reflect")
    assert torch.equal(prior.denoise(u, 0.1 * MU_WATER), prior.denoise(whole, 0.1 * MU_WATER)[..., :13, :14])


def test_empty_batch_and_no_aliasing():
    prior = NetworkPrior(_net(), _card())
    assert prior.denoise(torch.zeros(0, 1, 8, 8), 0.01).shape == (0, 1, 8, 8)
    u = _state(1, 1, 8, 8)
    kept = u.clone()
    prior.denoise(u, 0.01)
    assert torch.equal(u, kept)


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_batch_never_changes_a_slice(precision, one_thread):
    prior = NetworkPrior(_net(), _card(), precision=precision)
    u = _state(5, 1, 40, 33)
    alone = torch.cat([prior.denoise(u[k : k + 1], 0.2 * MU_WATER) for k in range(5)])
    assert torch.equal(prior.denoise(u, 0.2 * MU_WATER), alone)
    order = torch.tensor([3, 0, 4])
    assert torch.equal(prior.denoise(u[order], 0.2 * MU_WATER), alone[order])
    # a view with other strides holds the same slices
    assert torch.equal(prior.denoise(u.transpose(2, 3).contiguous().transpose(2, 3), 0.2 * MU_WATER), alone)


def test_threads_share_a_prior(one_thread):
    prior = NetworkPrior(_net(), _card())
    u = _state(8, 1, 32, 32)
    want = prior.denoise(u, 0.2 * MU_WATER)
    got: dict[int, torch.Tensor] = {}

    def work(k: int) -> None:
        torch.set_num_threads(1)
        got[k] = prior.denoise(u[k : k + 1], 0.2 * MU_WATER)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert torch.equal(torch.cat([got[k] for k in range(8)]), want)


def test_gradient_only_when_asked():
    u = _state(1, 1, 16, 16).requires_grad_()
    assert not NetworkPrior(_net(), _card()).denoise(u, 0.01).requires_grad
    prior = NetworkPrior(_net(), _card(), precision="float32", differentiable=True)
    prior.denoise(u, 0.3 * MU_WATER).square().sum().backward()
    step = torch.randn(u.shape, generator=torch.Generator().manual_seed(0)) * 1e-4
    with torch.no_grad():
        up, down = (prior.denoise(u + s * step, 0.3 * MU_WATER).double().square().sum() for s in (1, -1))
    assert float((u.grad * step).sum()) == pytest.approx(float(up - down) / 2, rel=2e-3)


@pytest.mark.parametrize(
    ("u", "sigma", "cond", "says"),
    [
        (torch.zeros(1, 2, 8, 8), 0.1, None, r"\[batch, 1, row, col\].*\(1, 2, 8, 8\)"),
        (torch.zeros(8, 8), 0.1, None, "row, col"),
        (torch.zeros(1, 1, 8, 8), 0.0, None, "sigma must be positive"),
        (torch.zeros(1, 1, 8, 8), float("nan"), None, "sigma must be positive"),
        (torch.zeros(1, 1, 8, 8), 0.1, torch.zeros(1), "takes no condition"),
        (torch.zeros(1, 1, 8, 8, device="meta"), 0.1, None, "u is on meta"),
    ],
)
def test_denoise_rejects(u, sigma, cond, says):
    with pytest.raises(ValueError, match=says):
        NetworkPrior(_net(), _card()).denoise(u, sigma, cond)


COND = ConditionCard(what="T1-weighted MR", percentile=99, offset=0.2, scale=2.0)


def _conditional(**changes) -> tuple[NetworkPrior, EDMDenoiser]:
    """One channel of state and one of condition, with weights that are not zero anywhere."""
    net = UNet(TINY.model_copy(update={"in_channels": 2}))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(0.2 * torch.randn(p.shape, generator=generator))
    card = _card().model_copy(update={"cond_channels": 1, "condition": COND, **changes})
    return NetworkPrior(net, card, precision="float32"), EDMDenoiser(net, 0.5)


def test_a_condition_joins_the_network_after_its_own_scaling():
    prior, truth = _conditional()
    u, cond = _state(2, 1, 16, 24), torch.rand(2, 1, 16, 24, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        x = truth((u - MU_WATER) / MU_WATER, torch.full((2,), 0.3), (cond - 0.2) / 2)
    got = prior.denoise(u, 0.3 * MU_WATER, cond)
    assert (got - (x * MU_WATER + MU_WATER)).abs().max() <= 5e-6 * MU_WATER
    assert (got - prior.denoise(u, 0.3 * MU_WATER, cond.flip(-1))).abs().max() > 1e-3 * MU_WATER
    # sides that are no multiples of the stride: the condition is padded as the state is
    assert prior.denoise(u[..., :13, :14], 0.3 * MU_WATER, cond[..., :13, :14]).shape == (2, 1, 13, 14)


@pytest.mark.parametrize(
    "cond", [None, torch.zeros(1, 1, 8, 9), torch.zeros(2, 1, 8, 8), torch.zeros(1, 1, 8, 8, device="meta")]
)
def test_a_conditional_prior_says_what_it_needs(cond):
    with pytest.raises(ValueError, match=r"needs a condition \(T1-weighted MR\), cond must be \(1, 1, 8, 8\) on cpu"):
        _conditional()[0].denoise(torch.zeros(1, 1, 8, 8), 0.1, cond)


def test_a_condition_is_divided_by_the_percentile_of_its_volume():
    card, volume = _conditional()[0].card, torch.arange(1001.0).reshape(7, 11, 13)
    assert torch.allclose(condition_volume(card, volume), volume / 990)
    plain = card.model_copy(update={"condition": COND.model_copy(update={"percentile": None})})
    assert condition_volume(plain, volume) is volume
    with pytest.raises(ValueError, match="percentile 99 must be positive and finite, got 0"):
        condition_volume(card, torch.zeros(2, 3, 4))
    with pytest.raises(ValueError, match="takes no condition"):
        condition_volume(_card(), volume)
    with pytest.raises(ValueError, match="condition goes with cond_channels"):
        ModelCard(name="x", cond_channels=1)


def test_precision_choice():
    cpu = torch.device("cpu")
    assert compute_dtype(cpu, "float32") is torch.float32 and compute_dtype(cpu, "bfloat16") is torch.bfloat16
    assert compute_dtype(cpu, "float16") is torch.float16
    assert compute_dtype(torch.device("meta")) is torch.float32
    with pytest.raises(ValueError, match="precision"):
        compute_dtype(cpu, "half")


def test_one_noise_level_for_all_is_each_ones_own():
    net, x = _net(), _state(3, 1, 16, 16) / MU_WATER
    with torch.no_grad():
        a, b = net(x, torch.full((3,), -0.4)), net(x, torch.full((1,), -0.4))
    assert (a - b).abs().max() <= 1e-5 * a.abs().max()


def test_unet_rejects_sides_it_cannot_halve():
    with pytest.raises(ValueError, match="multiples of 4"):
        UNet(TINY)(torch.zeros(1, 1, 6, 8), torch.zeros(1))
    with pytest.raises(ValueError, match="group_size"):
        UNet(UNetConfig(channels=(12,), group_size=8))


# ---------------------------------------------------------------- stored priors


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_folder(tmp_path / "p", _card(), _net().state_dict())
    return tmp_path / "p"


def _rewrite(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Replace the weights and make the card's digest agree."""
    from safetensors.torch import save

    content = save(tensors)
    (folder / "model.safetensors").write_bytes(content)
    card = json.loads((folder / "card.json").read_text())
    card["sha256"] = hashlib.sha256(content).hexdigest()
    (folder / "card.json").write_text(json.dumps(card))


def test_folder_round_trip(folder):
    prior = load_prior(folder, precision="float32")
    u = _state(1, 1, 16, 16)
    half = UNet(TINY)
    half.load_state_dict({k: v.half().float() for k, v in _net().state_dict().items()})
    want = NetworkPrior(half, _card(), precision="float32").denoise(u, 0.01)
    assert torch.equal(prior.denoise(u, 0.01), want)
    assert prior.card.sha256 == hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    assert sorted(p.name for p in folder.iterdir()) == ["card.json", "model.safetensors"]


def _load(folder: Path) -> None:
    card, state = read_folder(folder)
    build_network(card, state, folder)


def test_weights_of_another_digest(folder):
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(BadInput, match="SHA-256"):
        _load(folder)


@pytest.mark.parametrize("change", ["missing", "shape", "extra", "nan"])
def test_tensors_are_named(folder, change):
    _, state = read_folder(folder)
    name = "down.0.0.conv1.weight"
    if change == "missing":
        del state[name]
    elif change == "shape":
        state[name] = state[name][:1].clone()
    elif change == "nan":
        state[name][0, 0, 0, 0] = float("nan")
    else:
        state["surplus"] = torch.zeros(1)
    _rewrite(folder, state)
    with pytest.raises(BadInput, match="surplus" if change == "extra" else name):
        _load(folder)


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("scale", -1, "scale"),
        ("format", "recon3d-prior/9", "format"),
        ("sha256", None, "sha256"),
        ("architecture", {"family": "transformer"}, "family"),
        ("architecture", {"family": "unet", "channels": [7]}, "architecture"),
        ("architecture", {"family": "unet", "depth": 3}, "architecture"),
        ("architecture", {"family": "unet", "channels": [4096] * 9}, "architecture"),
    ],
)
def test_cards_that_do_not_fit(folder, field, value, says):
    card = json.loads((folder / "card.json").read_text())
    card[field] = value
    (folder / "card.json").write_text(json.dumps(card))
    with pytest.raises(BadInput, match=says):
        _load(folder)


def test_missing_and_oversized_files(folder, tmp_path):
    with pytest.raises(BadInput, match="no such prior"):
        load_prior(tmp_path / "nowhere")
    with pytest.raises(BadInput, match="cannot be read"):
        _load(tmp_path)
    (folder / "card.json").write_bytes(b" " * (2 << 20))
    with pytest.raises(BadInput, match="at most"):
        _load(folder)


@pytest.mark.parametrize("which", ["card.json", "model.safetensors"])
def test_a_hundred_malformed_files(folder, which):
    good = (folder / which).read_bytes()
    rng = np.random.default_rng(5)
    for k in range(100):
        bad = bytearray(good)
        if k % 4 == 0:
            bad = bytearray(good[: int(rng.integers(0, len(good)))])
        elif k % 4 == 1:
            bad[:64] = rng.bytes(64)
        elif k % 4 == 2:
            bad = bytearray(rng.bytes(200))
        else:
            bad[8:40] = b"{" * 32
        if which == "model.safetensors":
            (folder / which).write_bytes(bad)
            card = json.loads((folder / "card.json").read_text())
            card["sha256"] = hashlib.sha256(bad).hexdigest()
            (folder / "card.json").write_text(json.dumps(card))
        else:
            (folder / which).write_bytes(bad)
        with pytest.raises(BadInput) as caught:
            _load(folder)
        assert "\n" not in str(caught.value) and str(folder) in str(caught.value)


def test_weights_that_float16_cannot_hold(tmp_path):
    state = _net().state_dict()
    state["stem.bias"][0] = 1e6
    with pytest.raises(ValueError, match=r"stem\.bias"):
        write_folder(tmp_path / "p", _card(), state)


# ---------------------------------------------------------------- the packaged CT prior


@pytest.fixture(scope="module")
def ct() -> NetworkPrior:
    if "ct" not in packaged_priors():
        pytest.skip("no packaged CT prior in this checkout")
    return load_prior("ct")


def test_ct_card(ct):
    card = ct.card
    assert card.plane == "axial" and card.unit == "1/mm"
    assert card.offset == card.scale == MU_WATER == ct.offset == ct.scale
    assert "demonstrator" in card.statement and card.licence and len(card.attribution) >= 5
    assert card.validation["volume"] == "ct_chest_pyrad_lung1"
    assert card.training_data and "ct_chest_pyrad_lung1" not in card.training_data
    import recon3d.priors

    weights = Path(recon3d.priors.__file__).parent / "packaged" / "ct" / "model.safetensors"
    assert weights.stat().st_size <= 16 << 20


def _phantom() -> torch.Tensor:
    """A body-like ellipse with lungs, spine and air around, in 1/mm."""
    y, x = torch.meshgrid(torch.linspace(-1, 1, 480), torch.linspace(-1, 1, 480), indexing="ij")
    hu = torch.full((480, 480), -1000.0)
    hu[(x / 0.85) ** 2 + (y / 0.6) ** 2 < 1] = 40
    for side in (-0.4, 0.4):
        hu[((x - side) / 0.28) ** 2 + ((y + 0.05) / 0.4) ** 2 < 1] = -850
    hu[x**2 + ((y - 0.4) / 0.9) ** 2 < 0.01] = 500
    # a pixel is the mean over its area
    return torch.nn.functional.avg_pool2d(MU_WATER * (1 + hu / 1000)[None, None], 3)


@pytest.mark.parametrize(("sigma", "factor"), [(0.1, 2.5), (0.3, 4.0), (1.0, 4.0)])
def test_ct_denoises(ct, sigma, factor):
    """On a phantom it never saw, the error is well below the noise."""
    x = _phantom()
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(7))
    d = ct.denoise(x + sigma * MU_WATER * noise, sigma * MU_WATER)
    rmse = float((d - x).square().mean().sqrt()) / MU_WATER
    assert rmse < sigma / factor


def test_ct_precisions_agree(ct):
    """bfloat16 moves the estimate by a few per cent of the error it has anyway."""
    x = _phantom()
    exact = load_prior("ct", precision="float32")
    coarse = load_prior("ct", precision="bfloat16")
    for sigma in (0.02, 0.3):
        u = x + sigma * MU_WATER * torch.randn(x.shape, generator=torch.Generator().manual_seed(7))
        a, b = exact.denoise(u, sigma * MU_WATER), coarse.denoise(u, sigma * MU_WATER)
        assert (a - b).square().mean().sqrt() < 0.2 * (a - x).square().mean().sqrt()


def test_ct_on_the_held_out_chest(ct):
    root = Path(os.environ.get("RECON3D_DATA", Path(__file__).parents[2] / "shared" / "data"))
    path = root / "ct" / "ct_chest_pyrad_lung1.nii.gz"
    if not path.exists():
        pytest.skip(f"needs {path}")
    import nibabel

    hu = np.asarray(nibabel.load(path).dataobj, dtype=np.float32)[:, :, 24].T
    x = MU_WATER * (1 + torch.from_numpy(hu.copy()) / 1000)[None, None]
    for sigma, decibel in ((0.05, 33.0), (0.1, 30.0), (0.3, 25.0)):
        u = x + sigma * MU_WATER * torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
        d = ct.denoise(u, sigma * MU_WATER)
        mse = float(((d - x) / MU_WATER).double().square().mean())
        assert 10 * math.log10(1 / mse) > decibel


# ---------------------------------------------------------------- the packaged MR prior


@pytest.fixture(scope="module")
def mr() -> NetworkPrior:
    if "mr" not in packaged_priors():
        pytest.skip("no packaged MR prior in this checkout")
    return load_prior("mr")


def test_mr_card(mr):
    card = mr.card
    assert card.channels == 2 and card.plane == "axial" and card.unit == "a.u."
    assert (card.offset, card.scale, mr.offset, mr.scale) == (0.0, 1.0, 0.0, 1.0)
    assert "demonstrator" in card.statement and card.licence and any("CC BY-SA" in a for a in card.attribution)
    assert card.validation["volume"] == "mr_brain_oms20_t1w"
    assert card.training_data and not any("oms20" in name for name in card.training_data)
    assert card.training["one network unit"] == "percentile 99.9 of a volume"
    import recon3d.priors

    weights = Path(recon3d.priors.__file__).parent / "packaged" / "mr" / "model.safetensors"
    assert weights.stat().st_size <= 16 << 20


def _turned_ellipses() -> torch.Tensor:
    """A head-like ellipse with a bright rim and dark ventricles under a smooth phase, [1, 1, 160, 160] complex."""
    y, x = torch.meshgrid(torch.linspace(-1, 1, 480), torch.linspace(-1, 1, 480), indexing="ij")
    m = torch.zeros(480, 480)
    for a, value in ((0.85, 0.8), (0.78, 0.1), (0.72, 0.4)):
        m[(x / a) ** 2 + (y / (a + 0.08)) ** 2 < 1] = value
    for side in (-0.12, 0.12):
        m[((x - side) / 0.07) ** 2 + (y / 0.3) ** 2 < 1] = 0.1
    m = torch.nn.functional.avg_pool2d(m[None, None], 3)
    phase = torch.nn.functional.avg_pool2d((2 * x + 3 * y**2)[None, None], 3)
    return torch.polar(m, phase)


@pytest.mark.parametrize(("sigma", "factor"), [(0.05, 2.0), (0.1, 2.5), (0.3, 4.0)])
def test_mr_denoises(mr, sigma, factor):
    """On a phantom it never saw, the error of a part is well below its noise, whatever the phase's origin."""
    x = 700 * _turned_ellipses()
    prior = complex_prior(mr, 700.0)
    z = torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(7)) * math.sqrt(2)
    for turn in (1, 1j):
        d = prior.denoise(turn * x + 700 * sigma * z, 700 * sigma)
        assert torch.view_as_real(d - turn * x).square().mean().sqrt() < 700 * sigma / factor


def test_mr_on_the_held_out_brain(mr):
    root = Path(os.environ.get("RECON3D_DATA", Path(__file__).parents[2] / "shared" / "data"))
    path = root / "mr" / "mr_brain_oms20_t1w.nii.gz"
    if not path.exists():
        pytest.skip(f"needs {path}")
    import nibabel

    volume = np.asarray(nibabel.load(path).dataobj, dtype=np.float32)
    slice_ = torch.from_numpy(volume[:, :, 24].T / np.percentile(volume, 99.9))
    x = torch.polar(slice_, 0.02 * torch.arange(188).expand(225, 188))[None, None]
    z = torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(1)) * math.sqrt(2)
    for sigma, decibel in ((0.05, 33.5), (0.1, 30.0), (0.3, 25.0)):
        d = complex_prior(mr, 1.0).denoise(x + sigma * z, sigma)
        mse = float(torch.view_as_real(d - x).double().square().mean())
        assert 10 * math.log10(1 / mse) > decibel


# ---------------------------------------------------------------- the packaged PET prior


@pytest.fixture(scope="module")
def pet() -> NetworkPrior:
    if "pet" not in packaged_priors():
        pytest.skip("no packaged PET prior in this checkout")
    return load_prior("pet")


def test_pet_card(pet):
    card = pet.card
    assert card.channels == 1 and card.plane == "axial" and card.unit == "Bq/mL"
    assert (card.offset, card.scale, pet.offset, pet.scale) == (0.0, 1.0, 0.0, 1.0)
    assert "not for diagnosis" in card.statement and card.licence
    for said in ("CC BY 3.0", "PDDL", "Soft-tissue-Sarcoma", "QIN-HEADNECK", "Lesjak"):
        assert any(said in a for a in card.attribution), said
    assert card.validation["volume"] == "pet_extremity_sts036"
    for left_out in ("sts036", "oms20"):
        assert card.training_data and not any(left_out in name for name in card.training_data)
    assert [n for n in card.training_data if "qinhn0024" in n] == ["pet_wb_qinhn0024_lower"]
    assert card.training["one network unit"] == "mean of the voxels above 0.01 of the maximum of a volume"
    import recon3d.priors

    weights = Path(recon3d.priors.__file__).parent / "packaged" / "pet" / "model.safetensors"
    assert weights.stat().st_size <= 16 << 20


@pytest.mark.parametrize(("sigma", "factor"), [(0.05, 2.0), (0.2, 4.0), (1.0, 6.0)])
def test_pet_denoises_and_keeps_the_spots(pet, sigma, factor):
    """A drawn body it never saw: little error, and hot and cold spheres keep what they hold."""
    from recon3d.geometry import VolumeGrid
    from recon3d.testing.pet_phantoms import Sphere, body_phantom

    spheres = [Sphere((0.0, -30.0, 50.0), 14.0, 5.0), Sphere((0.0, 30.0, -50.0), 18.0, 0.0)]
    p = body_phantom(VolumeGrid((1, 72, 88), (4.0, 4.0, 4.0)), background=1.0, spheres=spheres, lung=False)
    x = p.activity[None]
    z = torch.randn(x.shape, generator=torch.Generator().manual_seed(7))
    d = pet.denoise(x + sigma * z, sigma)
    assert float((d - x).square().mean().sqrt()) < sigma / factor
    hot, cold = (float((d - x)[0][p.regions[name]].mean()) for name in ("hot 0", "cold 1"))
    assert abs(hot) < 0.1 * 5 + 0.1 * sigma and abs(cold) < 0.05 + 0.3 * sigma


def test_pet_on_the_held_out_limb(pet):
    root = Path(os.environ.get("RECON3D_DATA", Path(__file__).parents[2] / "shared" / "data"))
    path = root / "pet" / "pet_extremity_sts036.nii.gz"
    if not path.exists():
        pytest.skip(f"needs {path}")
    import nibabel

    volume = np.asarray(nibabel.load(path).dataobj, dtype=np.float32)
    volume /= volume[volume > 0.01 * volume.max()].mean()
    x = torch.from_numpy(volume.transpose(2, 1, 0)[30:34, None].copy())
    for sigma, decibel in ((0.1, 22.0), (0.3, 16.0), (1.0, 9.5)):
        d = pet.denoise(x + sigma * torch.randn(x.shape, generator=torch.Generator().manual_seed(1)), sigma)
        mse = float((d - x).double().square().mean())
        assert 10 * math.log10(1 / mse) > decibel

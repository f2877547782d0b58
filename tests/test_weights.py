"""Published checkpoints: read without executing anything, known by their tensors, equal to an independent network."""

from __future__ import annotations

import math
import os
import pickle

import pytest
import torch
from torch.nn import functional as F

from recon3d.io import BadInput
from recon3d.priors import load_prior
from recon3d.priors.checkpoints.convert import convert, inspect
from recon3d.priors.checkpoints.torch_file import read_checkpoint
from recon3d.priors.networks import ADM, ADMConfig, NCSNpp, NCSNppConfig
from recon3d.priors.networks.adm import adm_config
from recon3d.priors.networks.ncsnpp import ncsnpp_config
from recon3d.priors.paths import VP

CONFIGS = {
    "published shape": ADMConfig(
        in_channels=1, out_channels=2, model_channels=32, channels=(32, 64, 64), attention=(2,), head_channels=32
    ),
    "convolutions": ADMConfig(
        in_channels=2,
        out_channels=2,
        model_channels=64,
        channels=(64, 64),
        blocks=2,
        attention=(0, 1),
        scale_shift=False,
        resampling_blocks=False,
        head_channels=None,
        heads=4,
        legacy_attention=False,
    ),
}


def random_state(config: ADMConfig) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(5)
    shapes = {name: t.shape for name, t in ADM(config).state_dict().items()}
    return {name: torch.randn(s, generator=g) * (0.6 / math.sqrt(max(s[1:].numel(), 4))) for name, s in shapes.items()}


class Textbook:
    """Guided diffusion's U-Net once more, as a function of its state dict; shares no code with recon3d."""

    def __init__(self, state, config):
        self.p, self.c = {k: v.double() for k, v in state.items()}, config

    def conv(self, name, x, **how):
        return F.conv2d(x, self.p[name + ".weight"], self.p[name + ".bias"], **how)

    def norm(self, name, x):
        b, c = x.shape[:2]
        g = x.reshape(b, 32, -1)
        g = (g - g.mean(-1, keepdim=True)) / torch.sqrt(g.var(-1, unbiased=False, keepdim=True) + 1e-5)
        shape = (1, c) + (1,) * (x.ndim - 2)
        return g.reshape(x.shape) * self.p[name + ".weight"].view(shape) + self.p[name + ".bias"].view(shape)

    def linear(self, name, x):
        return x @ self.p[name + ".weight"].T + self.p[name + ".bias"]

    def res(self, name, x, emb, change=""):
        h = F.silu(self.norm(f"{name}.in_layers.0", x))
        if change == "down":
            h, x = (t.unflatten(-1, (-1, 2)).mean(-1).unflatten(-2, (-1, 2)).mean(-2) for t in (h, x))
        elif change == "up":
            h, x = (t.repeat_interleave(2, -1).repeat_interleave(2, -2) for t in (h, x))
        h = self.conv(f"{name}.in_layers.2", h, padding=1)
        e = self.linear(f"{name}.emb_layers.1", F.silu(emb))[..., None, None]
        if self.c.scale_shift:
            n = e.shape[1] // 2
            h = F.silu(self.norm(f"{name}.out_layers.0", h) * (1 + e[:, :n]) + e[:, n:])
        else:
            h = F.silu(self.norm(f"{name}.out_layers.0", h + e))
        h = self.conv(f"{name}.out_layers.3", h, padding=1)
        return h + (self.conv(f"{name}.skip_connection", x) if f"{name}.skip_connection.weight" in self.p else x)

    def attention(self, name, x):
        b, c, h, w = x.shape
        heads = self.c.heads if self.c.head_channels is None else c // self.c.head_channels
        flat = x.reshape(b, c, h * w)
        qkv = torch.einsum("oc,bcn->bon", self.p[f"{name}.qkv.weight"][..., 0], self.norm(f"{name}.norm", flat))
        qkv = qkv + self.p[f"{name}.qkv.bias"][:, None]
        width, out = c // heads, []
        for k in range(heads):
            if self.c.legacy_attention:
                q, key, v = qkv[:, 3 * width * k : 3 * width * (k + 1)].split(width, dim=1)
            else:
                q, key, v = (part[:, width * k : width * (k + 1)] for part in qkv.split(c, dim=1))
            weight = torch.softmax(torch.einsum("bcq,bck->bqk", q, key) / math.sqrt(width), dim=-1)
            out.append(torch.einsum("bqk,bck->bcq", weight, v))
        mixed = torch.einsum("oc,bcn->bon", self.p[f"{name}.proj_out.weight"][..., 0], torch.cat(out, 1))
        return (flat + mixed + self.p[f"{name}.proj_out.bias"][:, None]).reshape(x.shape)

    def block(self, name, x, emb):
        j, first = 0, True
        while any(k.startswith(f"{name}.{j}.") for k in self.p):
            at = f"{name}.{j}"
            if f"{at}.qkv.weight" in self.p:
                x = self.attention(at, x)
            elif f"{at}.conv.weight" in self.p:
                x = self.conv(f"{at}.conv", x.repeat_interleave(2, -1).repeat_interleave(2, -2), padding=1)
            else:
                x = self.res(at, x, emb, "" if first else "up")
            j, first = j + 1, False
        return x

    def __call__(self, x, t):
        x, half = x.double(), self.c.model_channels // 2
        rate = torch.tensor([10_000.0 ** (-k / half) for k in range(half)], dtype=torch.float64)
        phase = t.double()[:, None] * rate
        emb = torch.cat([phase.cos(), phase.sin()], 1)
        emb = self.linear("time_embed.2", F.silu(self.linear("time_embed.0", emb)))
        h, kept, levels, i = self.conv("input_blocks.0.0", x, padding=1), [], len(self.c.channels), 1
        kept.append(h)
        for level in range(levels):
            for _ in range(self.c.blocks):
                h, i = self.block(f"input_blocks.{i}", h, emb), i + 1
                kept.append(h)
            if level < levels - 1:
                if self.c.resampling_blocks:
                    h = self.res(f"input_blocks.{i}.0", h, emb, "down")
                else:
                    h = self.conv(f"input_blocks.{i}.0.op", h, stride=2, padding=1)
                kept.append(h)
                i += 1
        h = self.res("middle_block.2", self.attention("middle_block.1", self.res("middle_block.0", h, emb)), emb)
        for i in range(levels * (self.c.blocks + 1)):
            h = self.block(f"output_blocks.{i}", torch.cat([h, kept.pop()], 1), emb)
        return self.conv("out.2", F.silu(self.norm("out.0", h)), padding=1)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_guided_diffusion_checkpoint_equals_an_independent_network(name, tmp_path):
    config, state = CONFIGS[name], random_state(CONFIGS[name])
    torch.save({f"module.{k}": v for k, v in state.items()}, tmp_path / "model.pt")
    known = {k: getattr(config, k) for k in ("head_channels", "heads", "legacy_attention")}
    found = inspect(tmp_path / "model.pt", **known)
    assert found.architecture == {"family": "adm", **config.model_dump(mode="json")}
    net = ADM(config).eval()
    net.load_state_dict(dict(found.tensors))
    x, t = torch.randn(2, config.in_channels, 8, 16), torch.tensor([3.0, 817.5])
    want = Textbook(state, config)(x, t)
    with torch.no_grad():
        assert (net(x, t) - want).abs().max() <= 1e-5 * want.abs().max()


def test_the_published_ct_and_mri_networks_have_their_published_size():
    """Tensors and parameters of the 256 and 320 pixel networks of decomposed diffusion sampling."""
    widths = (256, 256, 512, 512, 1024, 1024)
    for attention, inputs, tensors, millions in (((4,), 1, 362, 374.0), ((), 2, 344, 361.4)):
        config = ADMConfig(
            in_channels=inputs, out_channels=2 * inputs, model_channels=256, channels=widths, attention=attention
        )
        with torch.device("meta"):
            state = ADM(config).state_dict()
        assert len(state) == tensors
        assert sum(v.numel() for v in state.values()) == pytest.approx(millions * 1e6, rel=2e-4)
        assert adm_config({k: tuple(v.shape) for k, v in state.items()}) == config


def test_a_converted_prior_is_the_network_on_its_noise_path(tmp_path):
    config, state = CONFIGS["published shape"], random_state(CONFIGS["published shape"])
    torch.save(state, tmp_path / "model.pt")
    card = {"name": "published", "offset": -1000.0, "scale": 2000.0, "unit": "HU"}
    convert(tmp_path / "model.pt", tmp_path / "prior", card, head_channels=32)
    prior = load_prior(tmp_path / "prior", precision="float32")
    u, t = 300 * torch.randn(2, 1, 7, 12, generator=torch.Generator().manual_seed(1)), 400
    path = VP()
    got = prior.denoise(u, 2000 * path.sigma(t))
    x = F.pad((u + 1000) / 2000, (0, 0, 0, 1), mode="reflect")
    eps = Textbook(state, config)(path.s(t) * x, torch.full((2,), float(t)))[:, :1]
    want = 2000 * (x - path.sigma(t) * eps)[:, :, :7] - 1000
    # the network's rounding, 1e-5, and that of its input in float32, carried to user units by scale * sigma
    assert (got - want).abs().max() <= 4e-5 * 2000 * path.sigma(t) * eps.abs().max()
    with pytest.raises(BadInput, match="holds a prior already"):
        convert(tmp_path / "model.pt", tmp_path / "prior", card, head_channels=32)


def broken(kind, state):
    state = dict(state)
    if kind == "renamed":
        state["input_blocks.1.0.in_layers.0.wieght"] = state.pop("input_blocks.1.0.in_layers.0.weight")
    elif kind == "shape":
        state["middle_block.0.in_layers.2.weight"] = torch.zeros(64, 64, 1, 1)
    elif kind == "extra":
        state["label_emb.weight"] = torch.zeros(3)
    elif kind == "nan":
        state["out.2.bias"] = torch.full_like(state["out.2.bias"], math.nan)
    elif kind == "other":
        state = {"conv_in.weight": torch.zeros(3)}
    elif kind == "nested":
        state = {"step": 3, **state}
    return state


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("renamed", "tensor input_blocks.1.0.in_layers.0.weight is missing"),
        ("shape", "tensor middle_block.0.in_layers.2.weight has shape"),
        ("extra", "tensor label_emb.weight belongs to no layer"),
        ("nan", "tensor out.2.bias has values that are not finite"),
        ("other", "no known family; it begins with tensor conv_in.weight"),
        ("nested", "'step' is a int, not a tensor"),
    ],
)
def test_a_damaged_checkpoint_is_named_and_nothing_is_written(kind, says, tmp_path):
    torch.save(broken(kind, random_state(CONFIGS["published shape"])), tmp_path / "model.pt")
    with pytest.raises(BadInput, match=says):
        convert(tmp_path / "model.pt", tmp_path / "prior", {"name": "x"}, head_channels=32)
    assert not (tmp_path / "prior").exists()


class Payload:
    def __reduce__(self):
        return os.mkdir, ("executed",)


@pytest.mark.parametrize("container", ["zip", "legacy", "pickle"])
def test_a_pickle_payload_is_not_executed(container, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if container == "pickle":
        (tmp_path / "model.pt").write_bytes(pickle.dumps({"a": Payload()}, protocol=2))
    else:
        torch.save({"a": Payload()}, tmp_path / "model.pt", _use_new_zipfile_serialization=container == "zip")
    with pytest.raises(BadInput, match="not a tensor; nothing of it was executed"):
        read_checkpoint(tmp_path / "model.pt")
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_truncated_checkpoint_is_refused(suffix, tmp_path):
    from safetensors.torch import save_file

    whole = tmp_path / f"whole{suffix}"
    state = {"a": torch.arange(1000.0)}
    save_file(state, whole) if suffix == ".safetensors" else torch.save(state, whole)
    content = whole.read_bytes()
    for size in (0, 1, 9, 100, len(content) // 2, len(content) - 1):
        (tmp_path / f"cut{suffix}").write_bytes(content[:size])
        with pytest.raises(BadInput):
            read_checkpoint(tmp_path / f"cut{suffix}")


def test_safetensors_load_as_well(tmp_path):
    from safetensors.torch import save_file

    state = random_state(CONFIGS["published shape"])
    save_file(state, tmp_path / "model.safetensors")
    assert inspect(tmp_path / "model.safetensors", head_channels=32).parameters == sum(
        v.numel() for v in state.values()
    )


# ---------------------------------------------------------------- NCSN++

NCSNPP = {
    "published shape": NCSNppConfig(width=16, channels=(16, 32, 32), blocks=2),
    "attention": NCSNppConfig(
        in_channels=2, width=16, channels=(16, 32), blocks=1, attention=(0, 1), pyramid=False, centered=True
    ),
}


def fir(x, up, down, before, after):
    """Zeros put in, 1 3 3 1 in both directions, samples kept: a sum written out, one output sample after another."""
    taps = torch.tensor([1.0, 3.0, 3.0, 1.0], dtype=x.dtype) / 8 * up

    def along(x):
        n = x.shape[-1]
        wide = torch.zeros(*x.shape[:-1], before + n * up + after, dtype=x.dtype)
        wide[..., before : before + n * up : up] = x
        out = [(wide[..., i : i + 4] * taps.flip(0)).sum(-1) for i in range(0, wide.shape[-1] - 3, down)]
        return torch.stack(out, -1)

    return along(along(x).mT).mT


class TextbookScore:
    """NCSN++ once more, as a function of its state dict; shares no code with recon3d."""

    def __init__(self, state, config):
        self.p, self.c, self.i = {k: v.double() for k, v in state.items()}, config, 0

    def norm(self, at, x):
        groups, c = min(max(x.shape[1] // 4, 1), 32), x.shape[1]
        g = x.reshape(x.shape[0], groups, -1)
        g = (g - g.mean(-1, keepdim=True)) / torch.sqrt(g.var(-1, unbiased=False, keepdim=True) + 1e-6)
        return g.reshape(x.shape) * self.p[at + ".weight"].view(1, c, 1, 1) + self.p[at + ".bias"].view(1, c, 1, 1)

    def next(self):
        self.i += 1
        return f"all_modules.{self.i - 1}"

    def conv(self, at, x, **how):
        return F.conv2d(x, self.p[at + ".weight"], self.p[at + ".bias"], **how)

    def res(self, x, emb, change=""):
        at = self.next()
        h = F.silu(self.norm(f"{at}.GroupNorm_0", x))
        if change:
            how = (2, 1, 2, 1) if change == "up" else (1, 2, 1, 1)
            h, x = fir(h, *how), fir(x, *how)
        e = F.silu(emb) @ self.p[f"{at}.Dense_0.weight"].T + self.p[f"{at}.Dense_0.bias"]
        h = self.conv(f"{at}.Conv_0", h, padding=1) + e[..., None, None]
        h = self.conv(f"{at}.Conv_1", F.silu(self.norm(f"{at}.GroupNorm_1", h)), padding=1)
        return ((self.conv(f"{at}.Conv_2", x) if f"{at}.Conv_2.weight" in self.p else x) + h) / math.sqrt(2)

    def attention(self, x):
        at = self.next()
        h = self.norm(f"{at}.GroupNorm_0", x)
        q, k, v = (
            torch.einsum("bchw,co->bohw", h, self.p[f"{at}.NIN_{j}.W"]) + self.p[f"{at}.NIN_{j}.b"].view(1, -1, 1, 1)
            for j in range(3)
        )
        weight = torch.einsum("bchw,bcij->bhwij", q, k) / math.sqrt(x.shape[1])
        weight = torch.softmax(weight.flatten(3), -1).view(weight.shape)
        h = torch.einsum("bhwij,bcij->bchw", weight, v)
        h = torch.einsum("bchw,co->bohw", h, self.p[f"{at}.NIN_3.W"]) + self.p[f"{at}.NIN_3.b"].view(1, -1, 1, 1)
        return (x + h) / math.sqrt(2)

    def __call__(self, x, sigma):
        x, sigma, self.i, levels = x.double(), sigma.double(), 0, len(self.c.channels)
        phase = 2 * math.pi * torch.log(sigma)[:, None] * self.p[f"{self.next()}.W"]
        emb = torch.cat([phase.sin(), phase.cos()], 1)
        for j in range(2):
            at = self.next()
            emb = (F.silu(emb) if j else emb) @ self.p[at + ".weight"].T + self.p[at + ".bias"]
        x = x if self.c.centered else 2 * x - 1
        h = self.conv(self.next(), x, padding=1)
        kept = [h]
        for level in range(levels):
            for _ in range(self.c.blocks):
                h = self.res(h, emb)
                h = self.attention(h) if level in self.c.attention else h
                kept.append(h)
            if level < levels - 1:
                h = self.res(h, emb, "down")
                if self.c.pyramid:
                    x = h = (self.conv(f"{self.next()}.Conv2d_0", fir(x, 1, 1, 2, 2), stride=2) + h) / math.sqrt(2)
                kept.append(h)
        h = self.res(self.attention(self.res(h, emb)), emb)
        for level in reversed(range(levels)):
            for _ in range(self.c.blocks + 1):
                h = self.res(torch.cat([h, kept.pop()], 1), emb)
            h = self.attention(h) if level in self.c.attention else h
            h = self.res(h, emb, "up") if level else h
        h = F.silu(self.norm(self.next(), h))
        return self.conv(self.next(), h, padding=1) / sigma.view(-1, 1, 1, 1)


def score_checkpoint(config):
    """As score_sde saves it: a data-parallel model with its table of noise levels, and averages in a list."""
    g = torch.Generator().manual_seed(7)
    net = NCSNpp(config)
    state = {
        name: torch.randn(t.shape, generator=g) * (0.6 / math.sqrt(max(t[0].numel(), 4)))
        for name, t in net.state_dict().items()
    }
    trained = [name for name, p in net.named_parameters() if p.requires_grad]
    model = {f"module.{k}": t if k not in trained else t + 1 for k, t in state.items()} | {
        "module.sigmas": torch.ones(5)
    }
    ema = {"decay": 0.999, "num_updates": 3, "shadow_params": [state[k] for k in trained]}
    return {"optimizer": {"state": {}, "param_groups": []}, "model": model, "ema": ema, "step": 3}, state


@pytest.mark.parametrize("name", NCSNPP)
def test_a_score_sde_checkpoint_equals_an_independent_network(name, tmp_path):
    config = NCSNPP[name]
    checkpoint, state = score_checkpoint(config)
    torch.save(checkpoint, tmp_path / "checkpoint.pth")
    options = {"centered": True} if config.centered else {}
    card = {"name": "published", "offset": 10.0, "scale": 5.0}
    found = inspect(tmp_path / "checkpoint.pth", **options)
    assert found.architecture == {"family": "ncsnpp", **config.model_dump(mode="json")}
    convert(tmp_path / "checkpoint.pth", tmp_path / "prior", card, **options)
    prior = load_prior(tmp_path / "prior", precision="float32")
    u = 10 + 5 * torch.randn(2, config.in_channels, 8, 16, generator=torch.Generator().manual_seed(1))
    for sigma in (0.3, 40.0):
        x = (u.double() - 10) / 5
        score = TextbookScore(state, config)(x, torch.full((2,), sigma))
        want = 10 + 5 * (x + sigma**2 * score)
        got = prior.denoise(u, 5 * sigma)
        # the network's rounding, 1e-5 of sigma times its answer, and that of its input in float32
        assert (got - want).abs().max() <= 4e-5 * 5 * max(float((sigma**2 * score).abs().max()), 1.0)


def test_the_published_score_network_has_its_published_size():
    """Layers, averaged tensors and parameters of the 256 pixel network of DiffusionMBIR."""
    config = NCSNppConfig(width=128, channels=(128, 256, 256, 256), blocks=4)
    with torch.device("meta"):
        net = NCSNpp(config)
    assert len(net.all_modules) == 54
    assert sum(p.requires_grad for p in net.parameters()) == 520
    assert sum(p.numel() for p in net.parameters()) == pytest.approx(61.43e6, rel=1e-3)
    assert ncsnpp_config({k: tuple(v.shape) for k, v in net.state_dict().items()}) == config


def test_averages_that_do_not_fit_are_named(tmp_path):
    checkpoint, _ = score_checkpoint(NCSNPP["published shape"])
    averages = checkpoint["ema"]["shadow_params"]
    for change, says in (
        (averages[:-1], "tensors, the model trains"),
        ([averages[1], averages[0], *averages[2:]], "stands where all_modules.1.weight has"),
        ("none", "is not a list of tensors"),
    ):
        checkpoint["ema"]["shadow_params"] = change
        torch.save(checkpoint, tmp_path / "checkpoint.pth")
        with pytest.raises(BadInput, match=says):
            inspect(tmp_path / "checkpoint.pth")
    with pytest.raises(ValueError, match="heads: NCSN"):
        checkpoint["ema"]["shadow_params"] = averages
        torch.save(checkpoint, tmp_path / "checkpoint.pth")
        inspect(tmp_path / "checkpoint.pth", heads=2)

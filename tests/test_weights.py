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
from recon3d.priors.networks import ADM, ADMConfig
from recon3d.priors.networks.adm import adm_config
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

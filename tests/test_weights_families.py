"""EDM, diffusers and PET checkpoints: each equals an independent network, and each damaged file is named."""

from __future__ import annotations

import json
import math
import re

import pytest
import torch
from test_weights import CONFIGS, NCSNPP, Payload, Textbook, fir, random_state, score_checkpoint
from torch.nn import functional as F

from recon3d.io import BadInput
from recon3d.priors import load_prior
from recon3d.priors.checkpoints.convert import FAMILIES, convert, inspect
from recon3d.priors.networks import ADM, ADMConfig, EDMUNet, EDMUNetConfig, NCSNpp, UNet2D, UNet2DConfig
from recon3d.priors.networks.edm_unet import edm_unet_config
from recon3d.priors.networks.unet2d import unet2d_config
from recon3d.priors.paths import VE, VP, VPContinuous


def drawn(net, seed=5):
    """Random tensors under the network's names: weights of unit gain or less, norms near 1, filters of sum 1."""
    g, out = torch.Generator().manual_seed(seed), {}
    for name, t in net.state_dict().items():
        if name.endswith("resample_filter"):
            taps = torch.tensor({2: [1.0, 1.0], 4: [1.0, 3.0, 3.0, 1.0]}[t.shape[-1]])
            out[name] = (taps[:, None] * taps / taps.sum() ** 2)[None, None]
        elif t.ndim == 1:
            out[name] = 0.2 * torch.randn(t.shape, generator=g) + 0.5 * name.endswith("weight")
        else:
            out[name] = torch.randn(t.shape, generator=g) * (0.6 / math.sqrt(max(t[0].numel(), 4)))
    return out


class Named:
    """Layers by their names in a state dict, in double precision."""

    def __init__(self, state, config):
        self.p, self.c = {k: v.double() for k, v in state.items()}, config

    def linear(self, at, x):
        return x @ self.p[at + ".weight"].T + self.p.get(at + ".bias", 0)

    def conv(self, at, x, **how):
        return F.conv2d(x, self.p[at + ".weight"], self.p[at + ".bias"], **{"padding": 1, **how})

    def norm(self, at, x, groups, eps):
        g = x.reshape(x.shape[0], groups, -1)
        g = (g - g.mean(-1, keepdim=True)) / torch.sqrt(g.var(-1, unbiased=False, keepdim=True) + eps)
        w, b = (self.p[f"{at}.{k}"].view(1, -1, 1, 1) for k in ("weight", "bias"))
        return g.reshape(x.shape) * w + b


def doubled(x):
    return x.repeat_interleave(2, -1).repeat_interleave(2, -2)


# ---------------------------------------------------------------- EDM

SMALL = {"resolution": 32, "stem": 16, "embedding": 32, "blocks": 1}
EDM = {
    "DDPM++": EDMUNetConfig(style="song", noise=16, channels=(32, 16), attention=(1,), augment=9, **SMALL),
    "NCSN++": EDMUNetConfig(
        style="song", noise=32, channels=(16, 32, 32), attention=(0, 2), fourier=True, encoder="residual", taps=4,
        called="ve", in_channels=2, out_channels=2, **SMALL,
    ),
    "skips": EDMUNetConfig(
        style="song", noise=16, channels=(16, 32, 16), attention=(2,), encoder="skip", decoder="skip", taps=4,
        called="vp", labels=3, **SMALL,
    ),
    "ADM": EDMUNetConfig(
        style="dhariwal", noise=16, channels=(64, 128), attention=(1,), labels=4, label=2, augment=5,
        **{**SMALL, "blocks": 2, "stem": 64},
    ),
    "iDDPM": EDMUNetConfig(style="dhariwal", noise=16, channels=(64, 64), called="iddpm", out_channels=2, **SMALL),
}  # fmt: skip


class TextbookEDM(Named):
    """The networks of EDM once more, as a function of their state dict; shares no code with recon3d.

    Layers are walked in the order in which EDM makes them, which is that of the forward pass.
    """

    def groups(self, at, x):
        return self.norm(at, x, min(32, x.shape[1] // 4), 1e-6 if self.c.style == "song" else 1e-5)

    def changed(self, x, change):
        if self.c.taps == 2:
            return F.avg_pool2d(x, 2) if change == "down" else doubled(x)
        return fir(x, 1, 2, 1, 1) if change == "down" else fir(x, 2, 1, 2, 1)

    def block(self, at, x, emb, change=""):
        song = self.c.style == "song"
        half, h = math.sqrt(0.5) if song else 1.0, F.silu(self.groups(f"{at}.norm0", x))
        if change:
            h, x = self.changed(h, change), self.changed(x, change)
        h, e = self.conv(f"{at}.conv0", h), self.linear(f"{at}.affine", emb)[..., None, None]
        n = e.shape[1] // 2
        if song:
            h = self.groups(f"{at}.norm1", h + e)
        else:
            h = self.groups(f"{at}.norm1", h) * (1 + e[:, :n]) + e[:, n:]
        h = self.conv(f"{at}.conv1", F.silu(h))
        x = half * (h + (self.conv(f"{at}.skip", x, padding=0) if f"{at}.skip.weight" in self.p else x))
        return half * (x + self.attention(at, x)) if f"{at}.qkv.weight" in self.p else x

    def attention(self, at, x):
        b, c, h, w = x.shape
        qkv = self.conv(f"{at}.qkv", self.groups(f"{at}.norm2", x), padding=0).reshape(b, 3 * c, h * w)
        width, out = c if self.c.style == "song" else 64, []
        for head in range(c // width):
            mine = qkv[:, 3 * width * head : 3 * width * (head + 1)]
            q, k, v = mine[:, 0::3], mine[:, 1::3], mine[:, 2::3]
            weight = torch.softmax(torch.einsum("bcq,bck->bqk", q, k) / math.sqrt(width), -1)
            out.append(torch.einsum("bqk,bck->bcq", weight, v))
        return self.conv(f"{at}.proj", torch.cat(out, 1).reshape(x.shape), padding=0)

    def embedding(self, t):
        song, n = self.c.style == "song", self.c.noise // 2
        rate = [10_000.0 ** (-k / (n - 1 if song else n)) for k in range(n)]
        rate = 2 * math.pi * self.p["map_noise.freqs"] if self.c.fourier else torch.tensor(rate, dtype=torch.float64)
        phase = t.double()[:, None] * rate
        emb = torch.cat([phase.sin(), phase.cos()] if song else [phase.cos(), phase.sin()], 1)
        one = torch.zeros(1, self.c.labels, dtype=torch.float64)
        if self.c.label is not None:
            one[0, self.c.label] = 1
        if song and self.c.labels:
            emb = emb + self.linear("map_label", one * math.sqrt(self.c.labels))
        emb = self.linear("map_layer1", F.silu(self.linear("map_layer0", emb)))
        if not song and self.c.labels:
            emb = emb + self.linear("map_label", one)
        return F.silu(emb)

    def __call__(self, x, t):
        x, emb, kept = x.double(), self.embedding(t), []
        aux = x
        for at in self.layers("enc"):
            if at.endswith("_conv"):
                kept.append(self.conv(at, x))
            elif at.endswith("aux_down"):
                aux = fir(aux, 1, 2, 1, 1)
            elif at.endswith("aux_skip"):
                kept[-1] = kept[-1] + self.conv(at, aux, padding=0)
            elif at.endswith("aux_residual"):
                # convolved with the margin that the filter needs, filtered by hand, every other sample kept
                wide = F.conv2d(F.pad(aux, (2, 2, 2, 2)), self.p[at + ".weight"])
                aux = fir(wide, 1, 2, 0, 0) + self.p[at + ".bias"].view(1, -1, 1, 1)
                aux = kept[-1] = (kept[-1] + aux) * math.sqrt(0.5)
            else:
                kept.append(self.block(at, kept[-1], emb, "down" if at.endswith("_down") else ""))
        h, answer = kept[-1], 0
        for at in self.layers("dec"):
            if "aux_up" in at:
                answer = fir(answer, 2, 1, 2, 1)
            elif "aux_norm" in at:
                normed = self.groups(at, h)
            elif "aux_conv" in at:
                answer = answer + self.conv(at, F.silu(normed))
            else:
                h = torch.cat([h, kept.pop()], 1) if "_block" in at else h
                h = self.block(at, h, emb, "up" if at.endswith("_up") else "")
        return answer if self.c.style == "song" else self.conv("out_conv", F.silu(self.groups("out_norm", h)))

    def layers(self, side):
        return list(dict.fromkeys(".".join(name.split(".")[:2]) for name in self.p if name.startswith(side + ".")))


def edm_export(path, config, **said):
    """As the export script writes it: the wrapper's state dict and what the wrapper is."""
    from safetensors.torch import save_file

    state = drawn(EDMUNet(config))
    kinds = {"edm": "EDMPrecond", "vp": "VPPrecond", "ve": "VEPrecond", "iddpm": "iDDPMPrecond"}
    extra = {"u": torch.ones(3)} if config.called == "iddpm" else {}
    save_file({f"model.{k}": v for k, v in state.items()} | extra, path)
    path.with_suffix(".json").write_text(json.dumps({"format": "recon3d-edm/1", "class": kinds[config.called], **said}))
    return state


def edm_denoised(net, config, x, sigma, sigma_data):
    """D(x; sigma), each line as table 1 of Karras et al. (2022) has it."""
    one = torch.ones(len(x), dtype=torch.float64)
    if config.called == "edm":
        norm = math.hypot(sigma, sigma_data)
        out = net(x / norm, one * math.log(sigma) / 4)
        return (sigma_data / norm) ** 2 * x + sigma * sigma_data / norm * out
    if config.called == "vp":
        b = VPContinuous(0.1, 20.0)
        return x - sigma * net(x / math.hypot(1, sigma), one * 999 * b.time(sigma))
    if config.called == "ve":
        return x + sigma * net(x, one * math.log(sigma / 2))
    t = VP(schedule="cosine").time(sigma)
    return x - sigma * net(x / math.hypot(1, sigma), one * t)[:, : x.shape[1]]


@pytest.mark.parametrize("name", EDM)
def test_an_edm_export_equals_an_independent_network(name, tmp_path):
    config = EDM[name]
    state = edm_export(tmp_path / "net.safetensors", config, **({"sigma_data": 0.3} if config.called == "edm" else {}))
    known = {"label": config.label} if config.label is not None else {}
    found = inspect(tmp_path / "net.safetensors", **known)
    assert found.architecture == {"family": "edm", **config.model_dump(mode="json")}
    convert(tmp_path / "net.safetensors", tmp_path / "prior", {"name": "published", "scale": 4.0}, **known)
    prior = load_prior(tmp_path / "prior", precision="float32")
    book, u = TextbookEDM(state, config), 3 * torch.randn(2, config.in_channels, 8, 12)
    for sigma in (0.1, 30.0):
        want = 4 * edm_denoised(book, config, u.double() / 4, sigma, 0.3)
        # float32 in the network, and in its input, whose phases reach 999 and 30 x 2 pi x 3
        assert (prior.denoise(u, 4 * sigma) - want).abs().max() <= 4e-5 * max(want.abs().max(), 4 * sigma)


@pytest.mark.parametrize(
    ("config", "millions"),
    [
        # CIFAR-10 of EDM, both variants, and the ImageNet-64 network
        ({"style": "song", "resolution": 32, "noise": 128, "channels": (256,) * 3, "augment": 9}, 55.7),
        (
            {
                "style": "song", "resolution": 32, "noise": 256, "channels": (256,) * 3, "augment": 9, "fourier": True,
                "encoder": "residual", "taps": 4,
            },
            56.4,
        ),
        (
            {
                "style": "dhariwal", "resolution": 64, "noise": 192, "stem": 192, "embedding": 768, "blocks": 3,
                "channels": (192, 384, 576, 768), "attention": (1, 2, 3), "labels": 1000,
            },
            295.9,
        ),
    ],
)  # fmt: skip
def test_the_published_edm_networks_have_their_published_size(config, millions):
    config = EDMUNetConfig(in_channels=3, out_channels=3, **{"attention": (1,), **config})
    with torch.device("meta"):
        net = EDMUNet(config)
    assert round(sum(p.numel() for p in net.parameters()) / 1e6, 1) == millions
    assert edm_unet_config({k: tuple(v.shape) for k, v in net.state_dict().items()}) == config


def test_an_export_that_says_something_else_is_refused(tmp_path):
    path = tmp_path / "net.safetensors"
    for said, why in (
        ({"class": "LatentPrecond"}, "class: Input should be"),
        ({"sigma_data": -1}, "sigma_data: Input should be greater than 0"),
        ({"C_1": 0.01}, "C_1"),
        ({"surprise": 1}, "surprise: Extra inputs"),
    ):
        edm_export(path, EDM["DDPM++"], **said)
        with pytest.raises(BadInput, match=why):
            inspect(path)
    path.with_suffix(".json").write_text("[]")
    with pytest.raises(BadInput, match="holds a list"):
        inspect(path)


def test_the_export_script_writes_what_is_read(tmp_path, monkeypatch, capsys):
    """Printed by the verb, run on a pickle as EDM's (there an object that holds a state dict), read back."""
    import pickle
    import sys
    import types

    from recon3d import cli

    assert cli.run(["weights", "export-script", "edm"]) == 0
    script = capsys.readouterr().out
    module = types.ModuleType("edm_source")

    class EDMPrecond(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model, self.sigma_data, self.sigma_min, self.sigma_max = EDMUNet(EDM["DDPM++"]), 0.4, 0, math.inf
            self.init_kwargs = {"img_resolution": 32, "model_type": "SongUNet"}

    module.EDMPrecond, EDMPrecond.__module__, EDMPrecond.__qualname__ = EDMPrecond, "edm_source", "EDMPrecond"
    monkeypatch.setitem(sys.modules, "edm_source", module)
    net = EDMPrecond()
    net.model.load_state_dict(drawn(net.model))
    (tmp_path / "net.pkl").write_bytes(pickle.dumps({"ema": net}))
    monkeypatch.setattr(sys, "argv", ["export", str(tmp_path / "net.pkl"), str(tmp_path / "out")])
    exec(compile(script, "export_edm.py", "exec"), {})
    found = inspect(tmp_path / "out.safetensors")
    assert found.card["sigma_data"] == 0.4
    assert found.architecture["called"] == "edm"
    assert torch.equal(found.tensors["map_layer0.bias"], net.model.map_layer0.bias)
    with pytest.raises(BadInput, match="nothing of it was executed"):
        inspect(tmp_path / "net.pkl")


def test_a_pickle_of_edm_is_refused_with_the_way_out(tmp_path):
    # the start of every network that NVIDIA publishes so
    (tmp_path / "net.pkl").write_bytes(b"\x80\x04\x95\x00ctorch_utils.persistence\n_reconstruct_persistent_obj\n.")
    with pytest.raises(BadInput, match="nothing of it was executed; it is a Python object of EDM; recon3d weights exp"):
        inspect(tmp_path / "net.pkl")


# ---------------------------------------------------------------- diffusers

SILENT = {"act_fn": "silu", "layers_per_block": 1, "_diffusers_version": "0.31.0", "_class_name": "UNet2DModel"}
DIFFUSERS = {
    "usual": {
        "in_channels": 1, "out_channels": 1, "block_out_channels": [32, 64, 64], "attention_head_dim": 16,
        "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "AttnUpBlock2D", "UpBlock2D"], **SILENT,
    },
    # as the first ones published: all settings otherwise
    "former": {
        "in_channels": 2, "out_channels": 2, "block_out_channels": [16, 32], "attention_head_dim": None,
        "down_block_types": ["DownBlock2D", "AttnDownBlock2D"], "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
        "norm_num_groups": 8, "downsample_padding": 0, "flip_sin_to_cos": False, "freq_shift": 1, "norm_eps": 1e-6,
        "center_input_sample": True, "mid_block_scale_factor": 1.4, **SILENT,
    },
    "scaled": {
        "in_channels": 1, "out_channels": 2, "block_out_channels": [32, 32], "resnet_time_scale_shift": "scale_shift",
        "down_block_types": ["AttnDownBlock2D", "DownBlock2D"], "up_block_types": ["UpBlock2D", "AttnUpBlock2D"],
        **SILENT, "layers_per_block": 2,
    },
    "plain": {
        "in_channels": 1, "out_channels": 1, "block_out_channels": [32, 64], "add_attention": False,
        "down_block_types": ["DownBlock2D", "DownBlock2D"], "up_block_types": ["UpBlock2D", "UpBlock2D"], **SILENT,
    },
}  # fmt: skip
DDPM = {"_class_name": "DDPMScheduler", "beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}


class TextbookDiffusers(Named):
    """UNet2DModel once more, as a function of state dict and config.json; shares no code with recon3d."""

    def groups(self, at, x):
        return self.norm(at, x, self.c.get("norm_num_groups", 32), self.c.get("norm_eps", 1e-5))

    def res(self, at, x, emb, over=1.0):
        h, e = self.conv(f"{at}.conv1", F.silu(self.groups(f"{at}.norm1", x))), self.linear(f"{at}.time_emb_proj", emb)
        e, n = e[..., None, None], h.shape[1]
        if self.c.get("resnet_time_scale_shift") == "scale_shift":
            h = self.groups(f"{at}.norm2", h) * (1 + e[:, :n]) + e[:, n:]
        else:
            h = self.groups(f"{at}.norm2", h + e)
        h = self.conv(f"{at}.conv2", F.silu(h))
        return (
            h + (self.conv(f"{at}.conv_shortcut", x, padding=0) if f"{at}.conv_shortcut.bias" in self.p else x)
        ) / over

    def attention(self, at, x, over=1.0):
        b, c, height, width = x.shape
        h = self.groups(f"{at}.group_norm", x) if f"{at}.group_norm.weight" in self.p else x
        h = h.reshape(b, c, -1).mT
        q, k, v = (self.linear(f"{at}.to_{one}", h) for one in "qkv")
        n, out = self.c.get("attention_head_dim", 8) or c, []
        for i in range(0, c, n):
            weight = torch.softmax(q[..., i : i + n] @ k[..., i : i + n].mT / math.sqrt(n), -1)
            out.append(weight @ v[..., i : i + n])
        return (x + self.linear(f"{at}.to_out.0", torch.cat(out, -1)).mT.reshape(b, c, height, width)) / over

    def has(self, at):
        return any(name.startswith(at + ".") for name in self.p)

    def seen(self, at, x, over=1.0):
        return self.attention(at, x, over) if self.has(at) else x

    def __call__(self, x, t):
        c, x = self.c, x.double()
        levels, blocks, n = len(c["block_out_channels"]), c["layers_per_block"], c["block_out_channels"][0] // 2
        rate = torch.tensor([10_000.0 ** (-k / (n - c.get("freq_shift", 0))) for k in range(n)], dtype=torch.float64)
        phase = t.double()[:, None] * rate
        waves = [phase.cos(), phase.sin()] if c.get("flip_sin_to_cos", True) else [phase.sin(), phase.cos()]
        emb = self.linear("time_embedding.linear_1", torch.cat(waves, 1))
        emb = F.silu(self.linear("time_embedding.linear_2", F.silu(emb)))
        h = self.conv("conv_in", 2 * x - 1 if c.get("center_input_sample") else x)
        kept = [h]
        for i in range(levels):
            for j in range(blocks):
                h = self.res(f"down_blocks.{i}.resnets.{j}", h, emb)
                h = self.seen(f"down_blocks.{i}.attentions.{j}", h)
                kept.append(h)
            if i < levels - 1:
                pad = (1, 1, 1, 1) if c.get("downsample_padding", 1) else (0, 1, 0, 1)
                h = self.conv(f"down_blocks.{i}.downsamplers.0.conv", F.pad(h, pad), stride=2, padding=0)
                kept.append(h)
        over = c.get("mid_block_scale_factor", 1.0)
        h = self.seen("mid_block.attentions.0", self.res("mid_block.resnets.0", h, emb, over), over)
        h = self.res("mid_block.resnets.1", h, emb, over)
        for i in range(levels):
            for j in range(blocks + 1):
                h = self.res(f"up_blocks.{i}.resnets.{j}", torch.cat([h, kept.pop()], 1), emb)
                h = self.seen(f"up_blocks.{i}.attentions.{j}", h)
            if i < levels - 1:
                h = self.conv(f"up_blocks.{i}.upsamplers.0.conv", doubled(h))
        return self.conv("conv_out", F.silu(self.groups("conv_norm_out", h)))


def unet2d_folder(folder, settings, scheduler=None, container="safetensors", tensors=None):
    """A folder as diffusers saves one; returns the state dict in it."""
    from safetensors.torch import save_file

    shapes = UNet2D(UNet2DConfig.model_validate(unet2d_config({}, settings=settings).model_dump()))
    state = tensors or drawn(shapes)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(settings))
    if scheduler is not None:
        (folder / "scheduler_config.json").write_text(json.dumps(scheduler))
    if container == "safetensors":
        save_file(state, folder / "diffusion_pytorch_model.safetensors")
    else:
        torch.save(state, folder / "diffusion_pytorch_model.bin")
    return state


@pytest.mark.parametrize("name", DIFFUSERS)
@pytest.mark.parametrize("container", ["safetensors", "bin"])
def test_a_diffusers_folder_equals_an_independent_network(name, container, tmp_path):
    settings = DIFFUSERS[name]
    state = unet2d_folder(tmp_path / "model", settings, container=container)
    found = inspect(tmp_path / "model")
    assert (found.family, found.learned_variance) == ("unet2d", name == "scaled")
    net = UNet2D(UNet2DConfig.model_validate({k: v for k, v in found.architecture.items() if k != "family"})).eval()
    net.load_state_dict(dict(found.tensors))
    x, t = torch.randn(2, settings["in_channels"], 8, 12), torch.tensor([3.0, 817.5])
    want = TextbookDiffusers(state, settings)(x, t)
    with torch.no_grad():
        assert (net(x, t) - want).abs().max() <= 1e-5 * want.abs().max()


@pytest.mark.parametrize("name", DIFFUSERS)
def test_a_diffusers_folder_equals_the_library(name, tmp_path):
    pytest.importorskip("safetensors.torch")  # the library counts on someone else's import of it
    diffusers = pytest.importorskip("diffusers")
    settings = {k: v for k, v in DIFFUSERS[name].items() if not k.startswith("_")}
    theirs = diffusers.UNet2DModel(**settings).eval()
    theirs.load_state_dict(drawn(theirs))
    theirs.save_pretrained(tmp_path / "model")
    found = inspect(tmp_path / "model")
    net = UNet2D(UNet2DConfig.model_validate({k: v for k, v in found.architecture.items() if k != "family"})).eval()
    net.load_state_dict(dict(found.tensors))
    x, t = torch.randn(2, settings["in_channels"], 8, 12), torch.tensor([3, 817])
    with torch.no_grad():
        want = theirs(x, t).sample
        assert (net(x, t) - want).abs().max() <= 1e-5 * want.abs().max()


@pytest.mark.parametrize(
    ("said", "card"),
    [
        (DDPM, {"path": "vp", "prediction": "eps", "schedule": {"beta_min": 1e-4, "beta_max": 0.02}}),
        (
            {**DDPM, "beta_schedule": "scaled_linear", "prediction_type": "v_prediction", "num_train_timesteps": 500},
            {"path": "vp", "prediction": "v", "schedule": {"schedule": "scaled_linear", "steps": 500}},
        ),
        (
            {**DDPM, "beta_schedule": "squaredcos_cap_v2", "prediction_type": "sample"},
            {"path": "vp", "prediction": "x0", "schedule": {"schedule": "cosine"}},
        ),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000}, {"path": "flow"}),
    ],
)
def test_the_scheduler_tells_path_and_prediction(said, card, tmp_path):
    """In the folder of a whole pipeline, and down to what the prior gives."""
    state = unet2d_folder(tmp_path / "pipeline" / "unet", DIFFUSERS["usual"])
    (tmp_path / "pipeline" / "scheduler").mkdir()
    (tmp_path / "pipeline" / "scheduler" / "scheduler_config.json").write_text(json.dumps(said))
    made = convert(tmp_path / "pipeline", tmp_path / "prior", {"name": "published"})
    assert inspect(tmp_path / "pipeline" / "unet").card == inspect(tmp_path / "pipeline").card
    for key, value in card.items():
        got = getattr(made, key)
        assert got == value if isinstance(value, str) else got.items() >= value.items()
    prior, book = load_prior(tmp_path / "prior", precision="float32"), TextbookDiffusers(state, DIFFUSERS["usual"])
    u, sigma = torch.randn(1, 1, 8, 12), 0.7
    if made.path == "flow":
        t = sigma / (1 + sigma)
        want = (1 - t) * u - t * book((1 - t) * u, torch.tensor([1000 * t]))
    else:
        path = VP(**{**made.schedule, "steps": int(made.schedule["steps"])})
        out = book(u / math.hypot(1, sigma), torch.tensor([path.time(sigma)]))
        cos, sin = 1 / math.hypot(1, sigma), sigma / math.hypot(1, sigma)
        want = {"eps": u - sigma * out, "x0": out, "v": cos * (cos * u) - sin * out}[made.prediction]
    assert (prior.denoise(u, sigma) - want).abs().max() <= 4e-5 * want.abs().max()


def test_a_scaled_linear_beta_is_the_square_of_a_line():
    beta, path = torch.linspace(1e-4**0.5, 0.02**0.5, 1000, dtype=torch.float64) ** 2, VP(schedule="scaled_linear")
    abar = torch.cumprod(1 - beta, 0)
    for t in (0, 1, 500, 999):
        assert path.sigma(t) == pytest.approx(float(torch.sqrt(1 / abar[t] - 1)), rel=1e-9)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"]}, "block type CrossAttnDownBlock2D is not known"),
        (
            {"up_block_types": ["SkipUpBlock2D", "UpBlock2D"]},
            "block type SkipUpBlock2D is not known here; known are Down",
        ),
        ({"_class_name": "UNet2DConditionModel"}, "_class_name is 'UNet2DConditionModel'; only UNet2DModel"),
        ({"time_embedding_type": "fourier"}, "time_embedding_type is 'fourier'"),
        ({"num_class_embeds": 10}, "num_class_embeds is 10"),
        ({"act_fn": "gelu"}, "act_fn is 'gelu'"),
        ({"block_out_channels": [32]}, "1 block_out_channels, 2 down_block_types"),
        ({"block_out_channels": "wide"}, "block_out_channels must be a list"),
        ({"norm_num_groups": "many"}, "groups: Input should be a valid integer"),
    ],
)
def test_settings_that_are_not_known_are_named(change, says, tmp_path):
    unet2d_folder(tmp_path / "model", DIFFUSERS["plain"])
    (tmp_path / "model" / "config.json").write_text(json.dumps({**DIFFUSERS["plain"], **change}))
    with pytest.raises(BadInput, match=says):
        inspect(tmp_path / "model")


@pytest.mark.parametrize(
    ("said", "says"),
    [
        ({"_class_name": "ScoreSdeVeScheduler"}, "ScoreSdeVeScheduler has no beta_schedule"),
        ({**DDPM, "beta_schedule": "sigmoid"}, "beta_schedule 'sigmoid' is not known; known are linear"),
        ({**DDPM, "prediction_type": "noise"}, "prediction_type 'noise' is not known; known are epsilon"),
        ({**DDPM, "trained_betas": [0.1]}, "trained_betas"),
        ({**DDPM, "rescale_betas_zero_snr": True}, "last noise level infinite"),
    ],
)
def test_schedulers_that_are_not_known_are_named(said, says, tmp_path):
    unet2d_folder(tmp_path / "model", DIFFUSERS["plain"], scheduler=said)
    with pytest.raises(BadInput, match=says):
        inspect(tmp_path / "model")


def test_folders_without_a_model_are_named(tmp_path):
    with pytest.raises(BadInput, match=r"has no config\.json"):
        inspect(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(BadInput, match="not readable JSON"):
        inspect(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(DIFFUSERS["plain"]))
    with pytest.raises(BadInput, match=r"has neither diffusion_pytorch_model\.safetensors nor"):
        inspect(tmp_path)
    (tmp_path / "vae").mkdir()
    with pytest.raises(BadInput, match="codes of an autoencoder"):
        inspect(tmp_path)


def test_former_names_of_attention_are_read(tmp_path):
    former = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    state = unet2d_folder(tmp_path / "new", DIFFUSERS["former"])
    old = {}
    for name, tensor in state.items():
        for new, was in former.items():
            name = name.replace(f".{new}.", f".{was}.")
        old[name] = tensor
    assert old.keys() != state.keys()
    unet2d_folder(tmp_path / "old", DIFFUSERS["former"], tensors=old)
    assert inspect(tmp_path / "old").tensors.keys() == state.keys()


def test_a_bare_state_dict_of_diffusers_is_known_by_its_shapes(tmp_path):
    """As flow networks of CT are kept: model_state beside an optimizer, no config.json."""
    config = UNet2DConfig.model_validate(unet2d_config({}, settings=DIFFUSERS["usual"]).model_dump())
    state = drawn(UNet2D(config))
    torch.save({"epoch": 3, "model_state": state, "optimizer_state": {"state": {}}}, tmp_path / "last.pt")
    found = inspect(tmp_path / "last.pt", head_channels=16)
    assert found.architecture == {"family": "unet2d", **config.model_dump(mode="json")}
    card = {"name": "flow", "path": "flow", "prediction": "flow"}
    convert(tmp_path / "last.pt", tmp_path / "prior", card, head_channels=16, time_scale=999.0)
    u = torch.randn(1, 1, 8, 12)
    t = 0.75
    want = (1 - t) * u - t * TextbookDiffusers(state, DIFFUSERS["usual"])((1 - t) * u, torch.tensor([999 * t]))
    got = load_prior(tmp_path / "prior", precision="float32").denoise(u, t / (1 - t))
    assert (got - want).abs().max() <= 4e-5 * want.abs().max()
    unet2d_folder(tmp_path / "model", DIFFUSERS["usual"])
    with pytest.raises(ValueError, match=r"head_channels: config\.json says it"):
        inspect(tmp_path / "model", head_channels=16)


def test_the_published_diffusers_network_has_its_published_size():
    """google/ddpm-cifar10-32: 35.7 million."""
    config = UNet2DConfig(
        in_channels=3, out_channels=3, channels=(128, 256, 256, 256), attention_down=(1,), attention_up=(1,)
    )
    with torch.device("meta"):
        net = UNet2D(config)
    assert sum(p.numel() for p in net.parameters()) == 35_746_307
    assert unet2d_config({k: tuple(v.shape) for k, v in net.state_dict().items()}) == config


# ---------------------------------------------------------------- PET

PET = ADMConfig(
    model_channels=32, channels=(32, 64), blocks=2, attention=(1,), resampling_blocks=False, head_channels=None, heads=4
)


def pet_files(folder, guided=False):
    """As the trainer writes them: a state dict, and averages without names beside it; returns the averages by name."""
    config = PET.model_copy(update={"in_channels": 2}) if guided else PET
    state = {name.replace(".out_layers.3.", ".out_layers.2."): t for name, t in drawn(ADM(config)).items()}
    torch.save({name: t + 1 for name, t in state.items()}, folder / "model.pt")
    averages = {"decay": 0.999, "num_updates": 7, "shadow_params": list(state.values())}
    torch.save(averages, folder / "ema_model.pt")
    return state


class TextbookPET(Textbook):
    """The score network of PET: guided diffusion's, blocks without dropout; gives minus the noise."""

    def __init__(self, state, config):
        super().__init__({name.replace(".out_layers.2.", ".out_layers.3."): t for name, t in state.items()}, config)


@pytest.mark.parametrize("path", ["vp", "ve"])
def test_a_pet_score_model_equals_an_independent_network(path, tmp_path):
    state = pet_files(tmp_path)
    known = {"head_channels": None, "heads": 4}
    found = inspect(tmp_path / "ema_model.pt", **known)
    assert found.architecture == {"family": "adm", **PET.model_dump(mode="json")}
    card = {"name": "pet", "scale": 3.0}
    if path == "ve":
        card |= {"path": "ve", "schedule": {"sigma_max": 40.0}, "sigma_range": (0.01, 40.0)}
    convert(tmp_path / "ema_model.pt", tmp_path / "prior", card, **known)
    prior, u = load_prior(tmp_path / "prior", precision="float32"), 3 * torch.randn(2, 1, 8, 12)
    clock = VPContinuous(0.1, 10.0) if path == "vp" else VE(0.01, 40.0)
    for sigma in (0.2, 9.0):
        t = clock.time(sigma)
        # the score of x_t is what the network gives over the standard deviation of x_t
        std = sigma * clock.s(t)
        score = TextbookPET(state, PET)(clock.s(t) * u.double() / 3, torch.full((2,), t)) / std
        want = 3 * (u.double() / 3 + clock.s(t) * sigma**2 * score)
        assert (prior.denoise(u, 3 * sigma) - want).abs().max() <= 4e-5 * max(want.abs().max(), 3 * sigma)


def test_a_guided_pet_model_wants_its_condition_told(tmp_path):
    pet_files(tmp_path, guided=True)
    known = {"head_channels": None, "heads": 4}
    found = inspect(tmp_path / "ema_model.pt", **known)
    assert (found.channels, found.conditions, found.learned_variance) == (1, 1, False)
    with pytest.raises(BadInput, match="takes 2 channels and gives 1; say in the card"):
        convert(tmp_path / "ema_model.pt", tmp_path / "prior", {"name": "pet"}, **known)
    card = {"name": "pet", "condition": {"what": "T1-weighted MR"}}
    assert convert(tmp_path / "ema_model.pt", tmp_path / "prior", card, **known).cond_channels == 1
    prior, u = load_prior(tmp_path / "prior"), torch.randn(1, 1, 8, 8)
    assert prior.denoise(u, 0.5, torch.zeros(1, 1, 8, 8)).shape == u.shape


@pytest.mark.parametrize("kept", ["named", "numbered", "list", "object"])
def test_averages_in_one_file_with_the_model_are_restored_by_order(kept, tmp_path):
    state = pet_files(tmp_path)
    ema = {
        "named": state,
        "numbered": {str(k): t for k, t in enumerate(state.values())},
        "list": list(state.values()),
        "object": {
            "decay": 0.999,
            "num_updates": 7,
            "shadow_params": {str(k): t for k, t in enumerate(state.values())},
        },
    }[kept]
    model = {f"module.{name}": t + 1 for name, t in state.items()}
    torch.save({"model": model, "ema": ema, "epoch": 3}, tmp_path / "last.pt")
    found = inspect(tmp_path / "last.pt", head_channels=None, heads=4)
    assert torch.equal(found.tensors["time_embed.0.bias"], state["time_embed.0.bias"])
    assert torch.equal(found.tensors["out.2.bias"], -state["out.2.bias"])


def test_averages_without_their_model_are_named(tmp_path):
    pet_files(tmp_path)
    (tmp_path / "model.pt").unlink()
    with pytest.raises(BadInput, match=r"averages without names; put model\.pt of the same training beside it"):
        inspect(tmp_path / "ema_model.pt")


@pytest.mark.parametrize("family", ["edm", "skips", "unet2d", "adm", "ncsnpp"])
def test_half_precision_stays_close(family):
    config = {
        "edm": EDM["DDPM++"], "skips": EDM["skips"], "adm": CONFIGS["published shape"],
        "ncsnpp": NCSNPP["published shape"], "unet2d": unet2d_config({}, settings=DIFFUSERS["usual"]),
    }[family]  # fmt: skip
    net = {"adm": ADM, "ncsnpp": NCSNpp, "unet2d": UNet2D}.get(family, EDMUNet)(config)
    net.load_state_dict(drawn(net))
    x, t = torch.randn(1, config.in_channels, 8, 16), torch.tensor([0.3])
    whole = net.for_inference(torch.float32)(x, t)
    half = net.for_inference(torch.bfloat16)(x.contiguous(memory_format=torch.channels_last), t)
    assert half.dtype == torch.float32
    # 2^-8 of the values, gathered over a dozen layers
    assert 0 < (half - whole).norm() < 0.02 * whole.norm()


# ---------------------------------------------------------------- damage


def test_files_beside_the_weights_may_hold_anything(tmp_path):
    """Values of every kind in every place: a model, or a sentence; never another error, never a long wait."""
    model, export = tmp_path / "model", tmp_path / "net.safetensors"
    unet2d_folder(model, DIFFUSERS["plain"], scheduler=DDPM)
    edm_export(export, EDM["DDPM++"])
    strange = [
        None,
        True,
        -1,
        0,
        1e300,
        10**30,
        math.inf,
        math.nan,
        "x",
        "",
        [],
        [[]],
        ["DownBlock2D", {}],
        {},
        {"a": 1},
    ]
    files = {
        model / "config.json": (model, {*DIFFUSERS["former"], "time_embedding_dim", "add_attention", "mid_block_type"}),
        model / "scheduler_config.json": (model, {*DDPM, "prediction_type", "num_train_timesteps", "trained_betas"}),
        export.with_suffix(".json"): (export, {"format", "class", "sigma_data", "sigma_min", "sigma_max", "M", "init"}),
    }
    refused = 0
    for file, (path, keys) in files.items():
        whole = json.loads(file.read_text())
        for key in sorted(keys):
            for value in strange:
                file.write_text(json.dumps({**whole, key: value}))
                try:
                    found = inspect(path)
                    assert found.parameters > 0
                except BadInput as error:
                    refused += 1
                    assert "\n" not in str(error)
        for text in ("", "[", "null", "7", '"x"', "[" * 100_000):
            file.write_text(text)
            with pytest.raises(BadInput):
                inspect(path)
        file.write_text(json.dumps(whole))
    assert refused > 300


def published(family, folder, change=dict):
    """A published file of each family with its tensors changed; returns what to open, and how."""
    from safetensors.torch import save_file

    if family == "adm":
        torch.save(change(random_state(CONFIGS["published shape"])), folder / "model.pt")
        return folder / "model.pt", {"head_channels": 32}
    if family == "ncsnpp":
        checkpoint, _ = score_checkpoint(NCSNPP["published shape"])
        model = {k.removeprefix("module."): v for k, v in checkpoint["model"].items() if k != "module.sigmas"}
        torch.save(change(model), folder / "model.pt")
        return folder / "model.pt", {}
    if family == "pet":
        torch.save(change(pet_files(folder)), folder / "model.pt")
        return folder / "model.pt", {"head_channels": None, "heads": 4}
    if family == "edm":
        state = edm_export(folder / "model.safetensors", EDM["DDPM++"])
        save_file(change({f"model.{k}": v for k, v in state.items()}), folder / "model.safetensors")
        return folder / "model.safetensors", {}
    state = unet2d_folder(folder / "model", DIFFUSERS["usual"])
    unet2d_folder(folder / "model", DIFFUSERS["usual"], tensors=change(state))
    return folder / "model", {}


# without these names a network seems to be another one
STRUCTURAL = {
    "adm": ["input_blocks.0.0.weight", "middle_block.1.qkv.weight", "output_blocks.1.2.in_layers.0.weight"],
    "ncsnpp": ["all_modules.0.W", "all_modules.6.Conv_2.weight", "all_modules.15.NIN_0.W"],
    "pet": ["input_blocks.0.0.weight", "output_blocks.2.2.conv.weight"],
    "edm": ["model.enc.32x32_block0.conv1.weight", "model.dec.32x32_aux_conv.weight", "model.map_noise_layer"],
    "unet2d": ["conv_in.weight", "mid_block.attentions.0.group_norm.weight", "down_blocks.1.resnets.0.conv1.weight"],
}


@pytest.mark.parametrize("family", STRUCTURAL)
def test_a_renamed_tensor_that_tells_the_structure_is_named(family, tmp_path):
    for k, name in enumerate(STRUCTURAL[family]):
        (tmp_path / str(k)).mkdir()

        def change(state, name=name):
            # moved to a name that no layer has; where there is no such tensor, one too many
            return {(f"{n}_" if n == name else n): t for n, t in state.items()} | (
                {} if name in state else {name + "_": torch.ones(2)}
            )

        path, options = published(family, tmp_path / str(k), change)
        with pytest.raises(BadInput, match=re.escape(f"{name.removeprefix('model.')}_")):
            convert(path, tmp_path / "prior", {"name": "x"}, **options)
    assert not (tmp_path / "prior").exists()


@pytest.mark.parametrize("family", FAMILIES)
def test_every_name_of_a_family_is_known_to_it(family):
    nets = {
        "pet": [ADM(PET)], "adm": [ADM(c) for c in CONFIGS.values()], "ncsnpp": [NCSNpp(c) for c in NCSNPP.values()],
        "edm": [EDMUNet(c) for c in EDM.values()],
        "unet2d": [UNet2D(unet2d_config({}, settings=s)) for s in DIFFUSERS.values()],
    }[family]  # fmt: skip
    names = [name for net in nets for name in net.state_dict()]
    assert [name for name in names if not re.fullmatch(FAMILIES[family].names, name)] == []


VICTIM = {
    "adm": "middle_block.0.in_layers.2.weight",
    "ncsnpp": "all_modules.5.Conv_0.weight",
    "pet": "middle_block.0.out_layers.2.weight",
    "edm": "model.dec.16x16_in1.conv1.weight",
    "unet2d": "mid_block.attentions.0.to_k.weight",
}


@pytest.mark.parametrize("family", VICTIM)
@pytest.mark.parametrize("damage", ["renamed", "misshapen", "extra", "not finite"])
def test_a_damaged_tensor_is_named_and_nothing_is_written(family, damage, tmp_path):
    name = VICTIM[family]
    known = name.removeprefix("model.").replace("out_layers.2", "out_layers.3")

    def change(state):
        state = dict(state)
        if damage == "renamed":
            state[name.replace("weight", "wieght")] = state.pop(name)
        elif damage == "misshapen":
            state[name] = state[name][:, :-1].contiguous()
        elif damage == "extra":
            state["surprise.weight"] = torch.ones(2)
        else:
            state[name] = torch.full_like(state[name], math.nan)
        return state

    path, options = published(family, tmp_path, change)
    says = {
        "renamed": f"tensor {known} is missing",
        "misshapen": f"tensor {known} has shape",
        "extra": "tensor surprise.weight belongs to no layer",
        "not finite": f"tensor {known} has values that are not finite",
    }
    with pytest.raises(BadInput, match=says[damage]):
        convert(path, tmp_path / "prior", {"name": "x"}, **options)
    assert not (tmp_path / "prior").exists()


@pytest.mark.parametrize("family", VICTIM)
def test_a_truncated_file_or_a_payload_is_refused(family, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path, options = published(family, tmp_path)
    inspect(path, **options)
    file = path if path.is_file() else path / "diffusion_pytorch_model.safetensors"
    whole = file.read_bytes()
    for size in (0, 9, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:size])
        with pytest.raises(BadInput):
            inspect(path, **options)
    if path.is_dir():
        file.unlink()
        file = path / "diffusion_pytorch_model.bin"
    torch.save({"a": Payload()}, file.with_suffix(".bin"))
    file.with_suffix(".bin").rename(file)
    # a file that calls itself safetensors is read as such
    with pytest.raises(BadInput, match=r"not a tensor; nothing of it was executed|not a safetensors file"):
        inspect(path, **options)
    assert not (tmp_path / "executed").exists()


# ---------------------------------------------------------------- verbs


def test_the_verbs_take_every_family_and_path(tmp_path, capsys):
    from recon3d import cli
    from recon3d.priors import ModelCard

    how = ["--range", "0", "1", "--values", "0", "5000", "--unit", "Bq/mL"]
    files = {}
    for family in ("pet", "unet2d"):
        (tmp_path / family).mkdir()
        files[family] = str(published(family, tmp_path / family)[0])
    pet_files(tmp_path)
    files["averages"] = str(tmp_path / "ema_model.pt")
    for k, (file, more, card) in enumerate(
        (
            ("pet", ["--heads", "4", "--beta-max", "20"], {"path": "vp_continuous", "schedule": {"beta_max": 20.0}}),
            ("averages", ["--heads", "4", "--sigma-max", "40"], {"path": "ve", "schedule": {"sigma_max": 40.0}}),
            ("unet2d", ["--schedule", "scaled_linear"], {"path": "vp", "schedule": {"schedule": "scaled_linear"}}),
            ("unet2d", ["--prediction", "flow", "--time-scale", "999"], {"path": "flow", "prediction": "flow"}),
        )
    ):
        folder = tmp_path / f"prior{k}"
        assert cli.run(["weights", "convert", files[file], str(folder), *how, *more]) == 0
        made = ModelCard.model_validate_json((folder / "card.json").read_text())
        assert {key: getattr(made, key) for key in card} == card
        assert made.sigma_range is not None
        assert load_prior(folder).denoise(torch.zeros(1, 1, 8, 8), 0.5 * made.scale).isfinite().all()
    assert cli.run(["weights", "inspect", files["unet2d"]]) == 0
    assert "diffusers UNet2DModel" in capsys.readouterr().out
    bad = ["weights", "convert", files["unet2d"], str(tmp_path / "none"), *how]
    assert cli.run([*bad, "--schedule", "cosine", "--sigma-max", "3"]) == 2
    assert "--schedule and --sigma-max: one of them" in capsys.readouterr().err
    assert cli.run([*bad, "--schedule", "sigmoid"]) == 2
    assert "schedule must be linear, scaled_linear or cosine" in capsys.readouterr().err
    assert cli.run([*bad, "--prediction", "noise"]) == 2
    assert cli.run(["weights", "export-script", "ddpm"]) == 2
    assert not (tmp_path / "none").exists()

"""What a run tells while it runs: pictures, speed, TensorBoard; and when it stops early."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch
from training_runs import config, raw

from recon3d.priors import load_prior
from recon3d.priors.networks import UNetConfig
from recon3d.priors.training import TensorBoard, train
from recon3d.priors.training import loop as training
from recon3d.priors.training.objectives import Objective
from recon3d.priors.training.throughput import Rate, bf16_peak, flops_per_pixel
from recon3d.priors.training.validation import draw, waited

PNG = b"\x89PNG"


def test_pictures_of_every_validation(tmp_path):
    settings = raw(tmp_path) | {"steps": 4, "validate_every_steps": 2, "samples": 3, "sample_levels": 3}
    out = train(config(settings)).out / "sheets"
    names = sorted(p.name for p in out.iterdir())
    assert names == [f"{kind}_0000000{step}.png" for kind in ("denoised", "samples") for step in (2, 4)]
    assert all(p.read_bytes().startswith(PNG) for p in out.iterdir())


def test_samples_come_from_the_prior_alone(tmp_path):
    """With a denoiser that knows one image, the loop ends at it; other seeds draw other noise on the way."""
    cfg = config(raw(tmp_path), samples=2, sample_levels=4)
    image = torch.rand(1, 8, 8)

    class Knows(Objective):
        def forward(self, u, sigma, beside=None):
            return image.expand_as(u)

    got = draw(Knows(torch.nn.Identity(), cfg), cfg, (1, 8, 8), None, torch.device("cpu"), torch.no_grad)
    assert got.shape == (2, 1, 8, 8) and torch.allclose(got, image.expand_as(got), atol=1e-5)


def test_early_stop_keeps_the_best_and_stays_stopped(tmp_path, monkeypatch):
    losses = iter([3.0, 2.0, 2.5, 2.2, 1.0])
    row = training.row

    def given(*args):
        return row(*args) | {"loss_sigma_0.1": next(losses), "loss_sigma_0.5": 0.0}

    monkeypatch.setattr(training, "row", given)
    settings = raw(tmp_path) | {"steps": 50, "validate_every_steps": 2, "patience": 2}
    result = train(config(settings))
    assert result.finished and result.stopped_early and result.step == 8
    assert load_prior(result.prior).card.training["steps"] == 4
    again = train(config(settings))
    assert again.stopped_early and again.step == 8
    more = train(config(settings, patience=3, steps=10))
    assert more.step == 10 and not more.stopped_early
    assert load_prior(more.prior).card.training["steps"] == 10  # 1.0 was better


def test_waiting_counts_from_the_best():
    curve = [{"loss_sigma_1": v} for v in (3.0, 1.0, 2.0, 1.5)]
    assert waited(curve) == 2 and waited(curve[:2]) == 0 and waited([]) == 0


def test_speed_and_time_left(tmp_path, monkeypatch):
    peak = 3.0 * flops_per_pixel(UNetConfig(**raw(tmp_path)["network"]))  # of a device that does three pixels a second
    monkeypatch.setattr(training, "bf16_peak", lambda device: peak)
    told = []
    train(config(raw(tmp_path), steps=6), told.append)
    assert all(p.images_per_s > 0 for p in told)
    assert told[-1].left_s == 0 and told[2].left_s > 0
    for p in told:
        assert p.peak_share == pytest.approx(p.images_per_s * 16 * 16 / 3, rel=1e-6)


def test_rates_forget_and_a_cpu_has_no_known_peak():
    rate = Rate()
    assert rate.images_per_s == 0
    for _ in range(100):
        rate.add(8, 80, 2.0)
    assert rate.images_per_s == pytest.approx(4) and rate.seconds_per_step == pytest.approx(2)
    for _ in range(100):
        rate.add(8, 80, 4.0)
    assert rate.images_per_s == pytest.approx(2, rel=0.01) and rate.pixels_per_s == pytest.approx(20, rel=0.01)
    assert bf16_peak(torch.device("cpu")) is None


def test_a_known_gpu_has_a_peak(monkeypatch):
    for name, peak in (("NVIDIA H200", 989e12), ("NVIDIA H100 PCIe", 756e12), ("NVIDIA L40S", 362e12), ("Other", None)):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert bf16_peak(torch.device("cuda")) == peak


def test_tensorboard_gets_scalars(tmp_path, monkeypatch):
    wrote = []

    class Writer:
        def __init__(self, folder):
            self.folder = folder

        def add_scalar(self, name, value, step):
            wrote.append((name, step))

        def flush(self):
            wrote.append(("flush", 0))

    module = ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = Writer
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    train(config(raw(tmp_path), steps=4, validate_every_steps=4), TensorBoard(tmp_path / "tb", every=2))
    assert [s for n, s in wrote if n == "train/loss"] == [2, 4]
    assert ("validation/psnr_db_sigma_0.1", 4) in wrote and ("flush", 0) in wrote
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ImportError, match=r"pip install recon3d\[tensorboard\]"):
        TensorBoard(tmp_path)


def test_every_share_of_a_batch_is_compiled_where_it_is_asked_for(tmp_path, monkeypatch):
    """What the compiler does is torch's business, and takes minutes."""
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: compiled.append(self))
    train(config(raw(tmp_path), steps=1, compile=True, workers=2))
    assert len(compiled) == 2

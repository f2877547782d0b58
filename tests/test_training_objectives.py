"""What a network may be asked in training: every objective gives a prior that denoises as its card says."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from training_runs import config, raw

from recon3d.priors import load_prior, self_test
from recon3d.priors.paths import from_denoiser, noise_path
from recon3d.priors.training import train
from recon3d.priors.training.data import SliceData
from recon3d.priors.training.objectives import Objective, path_range, sigmas

OBJECTIVES = {
    "edm": {},
    "eps": {"path": "vp"},
    "v": {"path": "vp_continuous", "schedule": {"beta_max": 10.0}},
    "v-cosine": {"objective": "v", "schedule": {"schedule": "cosine"}},
    "flow": {},
}


def _settings(name: str) -> dict:
    return {"objective": name.split("-")[0], **OBJECTIVES[name]}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_gives_a_prior_that_passes_its_self_test(name, tmp_path):
    """The self-test knows the card alone: path, schedule and prediction must be those of the training."""
    settings = raw(tmp_path) | _settings(name) | {"sigma_range": [0.1, 0.7], "log_sigma_mean": -1.2}
    settings |= {"save_every_steps": 1000, "warmup_steps": 5, "crops": [{"size": 24, "batch": 4}]}
    cfg = config(settings, steps=110, learning_rate=8e-3)
    prior = load_prior(train(cfg).prior)
    assert (prior.card.prediction, prior.card.path) == (cfg.objective, cfg.path_name)
    clean, _ = SliceData(cfg).validation_set()
    found = self_test.self_test(prior, clean, levels=3)
    assert found.sound, found


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_target_is_what_the_paths_say_and_is_turned_back(name, tmp_path):
    """A network that answers the target exactly has no loss, and its denoiser gives the clean image."""
    cfg = config(raw(tmp_path), **_settings(name))
    if cfg.objective == "edm":
        return
    x, noise = torch.randn(3, 1, 4, 4).double(), torch.randn(3, 1, 4, 4).double()
    sigma = torch.tensor([0.1, 0.7, 1.9]).double()
    at = sigma[:, None, None, None]
    objective = Objective(torch.nn.Identity(), cfg)
    target = objective.target(x, at, noise)
    path = noise_path(cfg.path_name, cfg.schedule)
    for k, level in enumerate(sigma.tolist()):
        u = x[k] + level * noise[k]
        assert torch.allclose(target[k], from_denoiser(x[k], u, level, cfg.objective), atol=1e-9)
        assert float(objective._scale(at)[k]) == pytest.approx(path.s(path.time(level)), rel=1e-9)
    objective.net = _Says(target)
    assert torch.allclose(objective(x + at * noise, sigma), x, atol=1e-5)  # the network answers in float32
    assert float(objective.loss(x, sigma, noise)) < 1e-12


class _Says(torch.nn.Module):
    def __init__(self, answer: torch.Tensor) -> None:
        super().__init__()
        self.answer = answer

    def forward(self, x: torch.Tensor, clock: torch.Tensor) -> torch.Tensor:
        return self.answer


def test_noise_levels_stay_on_the_path(tmp_path):
    settings = raw(tmp_path)
    u = np.linspace(0, 1, 101)
    for name in OBJECTIVES:
        cfg = config(settings, **_settings(name), sigma_range=[0.003, 30.0])
        low, high = path_range(cfg)
        drawn = sigmas(cfg, u)
        assert float(drawn.min()) >= low * (1 - 1e-5) and float(drawn.max()) <= high * (1 + 1e-5)
        assert bool((drawn.diff() >= 0).all())
        if name != "edm":  # a time for every number: the ends are reached
            assert float(drawn[0]) == pytest.approx(low, rel=1e-4) and float(drawn[-1]) == pytest.approx(high, rel=1e-4)
    assert path_range(config(settings, objective="eps", sigma_range=[0.003, 4.0]))[0] == pytest.approx(0.01, rel=0.01)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"schedule": {"beta_max": 0.02}}, "schedule belongs to the objectives eps and v"),
        ({"objective": "flow", "schedule": {"beta_max": 0.02}}, "schedule belongs to"),
        ({"objective": "v", "schedule": {"betamax": 0.02}}, "has no 'betamax'"),
        ({"objective": "x0"}, "objective"),
    ],
)
def test_objectives_rejected(tmp_path, changes, says):
    with pytest.raises(ValueError, match=says):
        config(raw(tmp_path), **changes)

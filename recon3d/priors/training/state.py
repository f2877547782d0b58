"""Everything a run carries from step to step, as one file that appears whole or not at all."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from recon3d.io import BadInput
from recon3d.priors.checkpoints.atomic import write_safetensors
from recon3d.priors.training.config import TrainConfig

__all__ = ["Counters", "State"]


@dataclass
class Counters:
    """Where a run stands."""

    step: int = 0
    images: int = 0
    elapsed_s: float = 0.0
    loss: float = math.nan  # mean of about the last 100 steps


@dataclass
class State:
    """Weights, their running average, the optimiser's moments, counters and the validation curve.

    Attributes:
        named: the network's parameters.
        adam: optimiser over them, in their order.
        ema: running average of the parameters.
        count: where the run stands.
        curve: the validations so far.
    """

    named: dict[str, nn.Parameter]
    adam: torch.optim.Optimizer
    ema: dict[str, Tensor] = field(default_factory=dict)
    count: Counters = field(default_factory=Counters)
    curve: list[dict[str, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.ema = self.ema or {k: p.detach().clone() for k, p in self.named.items()}

    def save(self, path: Path, config: TrainConfig) -> None:
        tensors: dict[str, Tensor] = {f"model.{k}": p.detach() for k, p in self.named.items()}
        tensors |= {f"ema.{k}": v for k, v in self.ema.items()}
        for k, p in self.named.items():
            tensors[f"adam.exp_avg.{k}"] = self.adam.state[p]["exp_avg"]
            tensors[f"adam.exp_avg_sq.{k}"] = self.adam.state[p]["exp_avg_sq"]
        meta = {
            "config": config.model_dump_json(),
            "counters": json.dumps(asdict(self.count)),
            "curve": json.dumps(self.curve),
        }
        write_safetensors(path, tensors, meta)

    def restore(self, path: Path, config: TrainConfig) -> None:
        """Take everything from a file that `save` wrote.

        Raises:
            BadInput: it is no such file.
            ValueError: it belongs to a run with other settings.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="pt") as f:
                meta: dict[str, str] = f.metadata()
                tensors: dict[str, Tensor] = {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118
            found = TrainConfig.model_validate_json(meta["config"])
        except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
            why = f"not a training checkpoint ({str(error).splitlines()[0]})"
            raise BadInput(path, why, "delete it to train from the start") from None
        changed = _differences(found, config)
        if changed:
            raise ValueError(
                f"train: {path.parent} holds a run with other settings ({', '.join(changed)}); "
                "give them back or choose another out"
            )
        self.count = Counters(**json.loads(meta["counters"]))
        self.curve = json.loads(meta["curve"])
        with torch.no_grad():
            for k, p in self.named.items():
                p.copy_(tensors[f"model.{k}"])
                self.ema[k].copy_(tensors[f"ema.{k}"])
                # the fused update walks memory, so the moments must lie as the weights do (channels last)
                moments = {name: torch.empty_like(p) for name in ("exp_avg", "exp_avg_sq")}
                for name, value in moments.items():
                    value.copy_(tensors[f"adam.{name}.{k}"])
                step = torch.tensor(float(self.count.step), device=p.device)
                self.adam.state[p] = {"step": step, **moments}


# a restart may change these: they say how long, how often and where, not what is learned
_FREE = {
    "out",
    "steps",
    "budget_minutes",
    "save_every_s",
    "save_every_steps",
    "validate_every_s",
    "patience",
    "samples",
    "sample_levels",
    "device",
    "card",
}


def _differences(a: TrainConfig, b: TrainConfig) -> list[str]:
    x, y = a.model_dump(mode="json"), b.model_dump(mode="json")
    return sorted(k for k in x if k not in _FREE and x[k] != y[k])

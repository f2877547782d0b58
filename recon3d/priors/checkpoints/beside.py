"""What lies beside published weights and says how to use them: folders of diffusers, exports of EDM networks.

A diffusers folder has config.json and diffusion_pytorch_model.safetensors (or .bin), a pipeline's folder has them under
unet/, and scheduler_config.json tells noise schedule and kind of prediction. EDM publishes Python objects, which run
code when they are opened; they are not opened here. The user runs `edm_script()` once where EDM lives; it writes
tensors and a small JSON file.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from recon3d.io import BadInput
from recon3d.priors.checkpoints.containers import weights_of
from recon3d.priors.paths import noise_path

__all__ = ["Published", "edm_script", "noise_fields", "read_published"]

_MAX_JSON_BYTES = 1 << 20
_WEIGHTS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")


@dataclass(frozen=True)
class Published:
    """Weights and what is said beside them.

    Attributes:
        tensors: the weights by name.
        options: what their shapes do not tell of the architecture, as the family's configuration names it.
        card: fields of a ModelCard, such as path and prediction.
    """

    tensors: dict[str, Tensor]
    options: dict[str, Any] = field(default_factory=dict)
    card: dict[str, Any] = field(default_factory=dict)


def read_published(path: str | Path) -> Published:
    """Weights of a file or a diffusers folder, with what lies beside them.

    Raises:
        BadInput: something cannot be read, or says what is not known here.
    """
    path = Path(path)
    if path.is_dir():
        return _diffusers(path)
    tensors, said = weights_of(path), path.with_suffix(".json")
    if any(name.startswith("map_layer0.") for name in tensors) and said.is_file():
        return Published(tensors, *_edm(said))
    return Published(tensors)


def noise_fields(path: str, schedule: dict[str, Any], prediction: str) -> dict[str, Any]:
    """A card's fields for a noise path, with the levels a network on it was trained on."""
    if path == "edm":
        low, high = 0.002, 80.0
    else:
        clock, ends = (
            noise_path(path, schedule),
            {"ve": (0.0, 1.0), "vp_continuous": (1e-5, 1.0), "flow": (1e-3, 0.999)},
        )
        first, last = ends.get(path, (0.0, schedule.get("steps", 1000) - 1.0))
        # rounding must not push an end out of the path
        low, high = clock.sigma(first) * 1.0001, clock.sigma(last) * 0.9999
    return {"path": path, "schedule": schedule, "prediction": prediction, "sigma_range": (low, high)}


# ---------------------------------------------------------------- EDM


def edm_script() -> str:
    """The program that turns an EDM pickle into tensors and JSON, to be run where EDM's own source is."""
    return (resources.files("recon3d.priors.checkpoints") / "export_edm.txt").read_text(encoding="utf-8")


class _EDMExport(BaseModel):
    """What `edm_script` says of a network: the class it was trained inside of, and that class's numbers."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    format: Literal["recon3d-edm/1"]
    kind: Literal["EDMPrecond", "VPPrecond", "VEPrecond", "iDDPMPrecond"] = Field(alias="class")
    sigma_data: float = Field(0.5, gt=0)
    sigma_min: float | None = Field(None, ge=0)
    sigma_max: float | None = Field(None, gt=0)
    beta_d: float = Field(19.9, gt=0)
    beta_min: float = Field(0.1, gt=0)
    M: int = Field(1000, ge=2, le=100_000)
    C_1: float = Field(0.001, ge=0.001, le=0.001, description="other cosines than the usual are not known")
    C_2: float = Field(0.008, ge=0.008, le=0.008)
    init: dict[str, Any] = Field(default_factory=dict, description="arguments the network was made with, to look at")


def _edm(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """(options, card) of an EDM network."""
    hint = "write it with the export script"
    try:
        return _preconditioned(_EDMExport.model_validate(_json(path)))
    except ValidationError as error:
        first = error.errors()[0]
        raise BadInput(path, f"{'.'.join(map(str, first['loc'])) or 'file'}: {first['msg']}", hint) from None
    except (ValueError, ArithmeticError) as error:  # numbers that make no noise path
        if isinstance(error, BadInput):
            raise
        raise BadInput(path, str(error), hint) from None


def _preconditioned(said: _EDMExport) -> tuple[dict[str, Any], dict[str, Any]]:
    if said.kind == "VPPrecond":
        schedule = {"beta_min": said.beta_min, "beta_max": said.beta_min + said.beta_d}
        return {"called": "vp", "vp_steps": said.M}, noise_fields("vp_continuous", schedule, "eps")
    if said.kind == "VEPrecond":
        schedule = {"sigma_min": said.sigma_min or 0.02, "sigma_max": said.sigma_max or 100.0}
        return {"called": "ve"}, noise_fields("ve", schedule, "eps")
    if said.kind == "iDDPMPrecond":
        return {"called": "iddpm"}, noise_fields("vp", {"schedule": "cosine", "steps": said.M}, "eps")
    return {"called": "edm"}, {**noise_fields("edm", {}, "edm"), "sigma_data": said.sigma_data}


# ---------------------------------------------------------------- diffusers


def _diffusers(folder: Path) -> Published:
    at = folder / "unet" if (folder / "unet" / "config.json").is_file() else folder
    if (folder / "vae").is_dir() or (folder / "vqvae").is_dir():
        raise BadInput(folder, "denoises codes of an autoencoder, not images", "take a model that works on pixels")
    if not (at / "config.json").is_file():
        raise BadInput(folder, "has no config.json", "give a folder of a diffusers UNet2DModel, or a file")
    settings = _json(at / "config.json")
    weights = next((at / name for name in _WEIGHTS if (at / name).is_file()), None)
    if weights is None:
        raise BadInput(at, f"has neither {' nor '.join(_WEIGHTS)}", "fetch the whole folder")
    options: dict[str, Any] = {"settings": settings}
    places = (folder / "scheduler", at, at.parent / "scheduler")
    said = next((p / "scheduler_config.json" for p in places if (p / "scheduler_config.json").is_file()), None)
    card: dict[str, Any] = {}
    if said is not None:
        scheduler = _json(said)
        try:
            card = _scheduled(scheduler)
            if card["path"] == "flow":
                options["time_scale"] = float(scheduler.get("num_train_timesteps", 1000))
        except (TypeError, ValueError, ArithmeticError) as error:
            raise BadInput(said, str(error), "name --schedule and --prediction and move this file away") from None
    return Published({_renamed(name): t for name, t in weights_of(weights).items()}, options, card)


_SCHEDULES = {"linear": "linear", "scaled_linear": "scaled_linear", "squaredcos_cap_v2": "cosine"}
_PREDICTIONS = {"epsilon": "eps", "sample": "x0", "v_prediction": "v"}


def _scheduled(said: dict[str, Any]) -> dict[str, Any]:
    """The card's fields that a scheduler_config.json tells."""
    name = str(said.get("_class_name", ""))
    if "FlowMatch" in name:
        return noise_fields("flow", {}, "flow")
    if "beta_schedule" not in said:
        raise ValueError(f"scheduler {name or 'without a name'} has no beta_schedule, and no other kind is known here")
    if said["beta_schedule"] not in tuple(_SCHEDULES):
        raise ValueError(f"beta_schedule {said['beta_schedule']!r} is not known; known are {', '.join(_SCHEDULES)}")
    kind = said.get("prediction_type", "epsilon")
    if kind not in tuple(_PREDICTIONS):
        raise ValueError(f"prediction_type {kind!r} is not known; known are {', '.join(_PREDICTIONS)}")
    if said.get("trained_betas") is not None:
        raise ValueError("trained_betas lists every beta, which is not known here")
    if said.get("rescale_betas_zero_snr"):
        raise ValueError("rescale_betas_zero_snr makes the last noise level infinite, which is not known here")
    schedule: dict[str, Any] = {
        "schedule": _SCHEDULES[said["beta_schedule"]],
        "steps": int(said.get("num_train_timesteps", 1000)),
    }
    if schedule["schedule"] != "cosine":
        schedule |= {"beta_min": float(said.get("beta_start", 1e-4)), "beta_max": float(said.get("beta_end", 0.02))}
    return noise_fields("vp", schedule, _PREDICTIONS[kind])


_FORMER = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def _renamed(name: str) -> str:
    """Attention's layers had other names until diffusers 0.15; weights published before keep them."""
    stem, _, last = name.rpartition(".")
    above, _, layer = stem.rpartition(".")
    return f"{above}.{_FORMER[layer]}.{last}" if layer in _FORMER and ".attentions." in name else name


def _json(path: Path) -> dict[str, Any]:
    try:
        size = path.stat().st_size
        if size > _MAX_JSON_BYTES:
            raise BadInput(path, f"has {size} bytes, at most {_MAX_JSON_BYTES} are read", "is it the right file?")
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, BadInput):
            raise
        raise BadInput(path, "is not readable JSON", "fetch it again") from None
    if not isinstance(value, dict):
        raise BadInput(path, f"holds a {type(value).__name__}, expected named values", "fetch it again")
    return value

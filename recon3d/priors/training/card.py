"""The model card of a run as it stands."""

from __future__ import annotations

import math
import re
from pathlib import Path

import numpy as np
from torch import Tensor

from recon3d.priors.base import ModelCard
from recon3d.priors.training.config import DataConfig, TrainConfig
from recon3d.priors.training.objectives import path_range
from recon3d.priors.training.pairs import condition_card
from recon3d.priors.training.state import State

__all__ = ["model_card", "own_unit"]


def model_card(
    config: TrainConfig, state: State, volumes: tuple[str, ...], validation: str, psnr_db: dict[float, float]
) -> ModelCard:
    """What the run knows, with what the configuration's card says.

    Args:
        config: the run. state: where it stands.
        volumes: names of the training volumes.
        validation: name of the held-out one.
        psnr_db: noise level to PSNR of the last validation.
    """
    data, card = config.data, config.card
    low, high = ((v - data.file_offset) / data.file_scale for v in data.clip)
    unit = _unit(data)
    planes = {source.plane or data.plane for source in data.sources}
    edm = config.objective == "edm"
    return ModelCard(
        name=card.name,
        statement=card.statement,
        plane=planes.pop() if len(planes) == 1 else "any",
        spacing_mm=data.spacing_mm,
        offset=card.offset,
        scale=card.scale,
        unit=card.unit,
        channels=config.network.out_channels,
        slices=data.slices,
        positions=data.positions,
        # shown as it was trained: at places of a larger slice, in patches
        patch=max(crop.size for crop in config.crops) if data.positions else None,
        cond_channels=config.cond_channels,
        condition=None if data.condition is None else condition_card(data.condition),
        value_range=(card.offset + card.scale * low, card.offset + card.scale * high) if unit is None else None,
        path=config.path_name,
        schedule=config.schedule,
        prediction=config.objective,
        sigma_range=path_range(config),
        sigma_data=config.sigma_data,
        architecture={"family": "unet", **config.network.model_dump(mode="json")},
        parameters=sum(p.numel() for p in state.named.values()),
        training_data=volumes,
        attribution=card.attribution,
        licence=card.licence,
        training={
            "steps": state.count.step,
            "images": state.count.images,
            "minutes": round(state.count.elapsed_s / 60, 1),
            **({"log_sigma": [config.log_sigma_mean, config.log_sigma_std]} if edm else {}),
            **({} if unit is None else {"one network unit": unit}),
            **({} if config.init is None else {"init": Path(config.init).name}),
        },
        validation={
            "volume": validation,
            "slices": config.validation_slices,
            "peak": "1 network unit",
            **{f"psnr_db_sigma_{s:g}": round(v, 2) for s, v in psnr_db.items()},
        },
    )


def _unit(data: DataConfig) -> str | None:
    """What one network unit is where every volume has its own."""
    if data.percentile is not None:
        return f"percentile {data.percentile:g} of a volume"
    if data.mean_above is not None:
        return f"mean of the voxels above {data.mean_above:g} of the maximum of a volume"
    return None


def own_unit(card: ModelCard, volume: Tensor) -> float | None:
    """What training divides a volume by to have it in network units; None where the card gives its values' unit.

    Args:
        card: of a prior trained here.
        volume: [z, y, x] real, in any unit.

    Raises:
        ValueError: the volume has no such level above 0.
    """
    said = str(card.training.get("one network unit", ""))
    top = float(volume.max())
    if found := re.fullmatch(r"percentile ([0-9.]+) of a volume", said):
        unit = float(np.percentile(volume.numpy(), float(found[1])))
    elif found := re.fullmatch(r"mean of the voxels above ([0-9.]+) of the maximum of a volume", said):
        unit = float(volume[volume > float(found[1]) * top].double().mean()) if top > 0 else 0.0
    else:
        return None
    if not (math.isfinite(unit) and unit > 0):
        raise ValueError(f"prior {card.name!r}: one unit is the {said}, here {unit:g}; give a volume with signal")
    return unit

"""From published checkpoints to the folder that load_prior takes.

What a checkpoint's tensors tell (family, widths, attention) is read off them; what they do not tell (value range,
noise schedule, heads of attention) the caller must know, and `recon3d weights test` shows whether it was right.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from recon3d.io import BadInput
from recon3d.priors.base import ModelCard
from recon3d.priors.checkpoints.folder import CARD, build_network, write_folder
from recon3d.priors.checkpoints.torch_file import read_checkpoint, tensors_of
from recon3d.priors.networks.adm import adm_config
from recon3d.priors.networks.ncsnpp import ncsnpp_config

__all__ = ["Found", "convert", "inspect"]

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Family:
    """A published kind of checkpoint.

    Attributes:
        title: what it is called.
        key: a tensor that every one of the family has, and no other family.
        config: shapes and what they do not tell -> architecture for the card.
        options: names of what shapes do not tell.
        card: fields of the card that all of the family share.
    """

    title: str
    key: str
    config: Callable[..., Any]
    options: tuple[str, ...]
    card: Mapping[str, Any]


FAMILIES: dict[str, Family] = {
    "adm": Family(
        "guided diffusion (ADM)",
        "input_blocks.0.0.weight",
        adm_config,
        ("head_channels", "heads", "legacy_attention"),
        {"path": "vp", "prediction": "eps", "sigma_range": (0.0101, 157.3)},
    ),
    "ncsnpp": Family(
        "NCSN++ (score_sde)",
        "all_modules.0.W",
        ncsnpp_config,
        ("centered",),
        {"path": "ve", "prediction": "score", "sigma_range": (0.01, 378.0)},
    ),
}


@dataclass(frozen=True)
class Found:
    """What a checkpoint's tensors tell.

    Attributes:
        family: a key of FAMILIES.
        architecture: as in a model card, with its family.
        channels: of the images.
        learned_variance: whether it gives a variance too.
        parameters: number of weights.
        tensors: the weights by name.
    """

    family: str
    architecture: dict[str, Any]
    channels: int
    learned_variance: bool
    parameters: int
    tensors: Mapping[str, Tensor]


def inspect(path: str | Path, **options: Any) -> Found:
    """What network a checkpoint holds, from its tensors' names and shapes.

    Args:
        path: .pt, .pth or .safetensors file of a state dict.
        options: what the shapes do not tell, as the family's configuration names it (adm: head_channels, heads,
            legacy_attention; ncsnpp: centered).

    Raises:
        BadInput: it cannot be read, holds other objects than tensors, or is of no known family.
        ValueError: an option that the family does not have.
    """
    tensors = _weights(read_checkpoint(path), path)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    name = next((name for name, family in FAMILIES.items() if family.key in shapes), None)
    if name is None:
        titles = ", ".join(f"{family.title}: {family.key}" for family in FAMILIES.values())
        raise BadInput(
            path,
            f"is of no known family; it begins with tensor {next(iter(shapes))}",
            f"tell-tale tensors are {titles}",
        )
    for option in options:
        if option not in FAMILIES[name].options:
            raise ValueError(f"{option}: {FAMILIES[name].title} has no such choice; leave it out")
    try:
        config = FAMILIES[name].config(shapes, **options)
    except ValidationError as error:
        why = f"its shapes make no {FAMILIES[name].title} network ({error.errors()[0]['msg']})"
        raise BadInput(path, why, "is it the right file?") from None
    except (ValueError, IndexError) as error:
        raise BadInput(path, str(error), "the names of a published checkpoint are expected") from None
    channels = config.in_channels
    return Found(
        name,
        {"family": name, **config.model_dump(mode="json")},
        channels,
        config.out_channels == 2 * channels,
        sum(tensor.numel() for tensor in tensors.values()),
        tensors,
    )


def convert(path: str | Path, folder: str | Path, card: Mapping[str, Any], **options: Any) -> ModelCard:
    """Write a published checkpoint as a prior folder; every tensor is checked before anything is written.

    Args:
        path: the checkpoint.
        folder: where card.json and model.safetensors go; must not hold another prior.
        card: what the checkpoint does not tell, as fields of a ModelCard: name, offset and scale (user value =
            offset + scale * network value), unit, plane, spacing_mm, licence, and the schedule if it is not the usual.
        options: as in inspect.

    Raises:
        BadInput: as inspect; or the folder is taken.
        ValueError: the card's fields are not sound.
    """
    found = inspect(path, **options)
    target = Path(folder)
    if (target / CARD).exists():
        raise BadInput(target, "holds a prior already", "name another folder")
    try:
        made = ModelCard.model_validate(
            {
                **FAMILIES[found.family].card,
                "channels": found.channels,
                "architecture": found.architecture,
                "parameters": found.parameters,
                **card,
            }
        )
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "card"
        raise ValueError(f"{where}: {first['msg']}") from None
    state = {name: tensor.float() for name, tensor in found.tensors.items()}
    build_network(made, state, path)
    return write_folder(target, made, state, torch.float32)


def _weights(content: Any, path: str | Path) -> dict[str, Tensor]:
    """The weights to denoise with: a plain state dict, or the averaged ones of a score_sde training checkpoint.

    There the average is a list without names: all that is trained, in the order of the model's own tensors. The Fourier
    frequencies are not trained, and noise levels are a table beside the weights.
    """
    if not (isinstance(content, Mapping) and isinstance(content.get("model"), Mapping) and "ema" in content):
        return tensors_of(content, path)
    model = {name: t for name, t in tensors_of(content["model"], path).items() if name != "sigmas"}
    ema = content["ema"]
    averaged = ema.get("shadow_params") if isinstance(ema, Mapping) else None
    if not isinstance(averaged, (list, tuple)) or not all(isinstance(t, Tensor) for t in averaged):
        raise BadInput(path, "ema.shadow_params is not a list of tensors", "a score_sde checkpoint is expected")
    trained = [name for name in model if name != FAMILIES["ncsnpp"].key]
    if len(averaged) != len(trained):
        raise BadInput(
            path,
            f"ema.shadow_params has {len(averaged)} tensors, the model trains {len(trained)}",
            "average and model belong to different networks",
        )
    for name, tensor in zip(trained, averaged, strict=True):
        if tensor.shape != model[name].shape:
            raise BadInput(
                path,
                f"ema.shadow_params: shape {tuple(tensor.shape)} stands where {name} has {tuple(model[name].shape)}",
                "average and model belong to different networks",
            )
        model[name] = tensor
    return model

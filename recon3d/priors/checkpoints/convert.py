"""From published checkpoints to the folder that load_prior takes.

What a checkpoint's tensors tell (family, widths, attention) is read off them, and so is what lies beside them (see
`beside`); what neither tells (value range, mostly the noise schedule, heads of attention) the caller must know, and
`recon3d weights test` shows whether it was right.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from recon3d.io import BadInput
from recon3d.priors.base import ModelCard
from recon3d.priors.checkpoints.beside import Published, noise_fields, read_published
from recon3d.priors.checkpoints.folder import CARD, build_network, write_folder
from recon3d.priors.networks.adm import adm_config
from recon3d.priors.networks.edm_unet import edm_unet_config
from recon3d.priors.networks.ncsnpp import ncsnpp_config
from recon3d.priors.networks.unet2d import unet2d_config

__all__ = ["Found", "convert", "inspect"]

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class Family:
    """A published kind of checkpoint.

    Attributes:
        title: what it is called.
        network: the family of its network in a card.
        told: a pattern of names that every one of the family has, and no family after it.
        names: a pattern of every name that the family uses.
        config: shapes and what they do not tell -> architecture for the card.
        options: names of what shapes do not tell.
        card: fields of the card that all of the family share, where nothing beside the weights says otherwise.
        adapt: the tensors as the network here wants them.
    """

    title: str
    network: str
    told: str
    names: str
    config: Callable[..., Any]
    options: tuple[str, ...]
    card: Mapping[str, Any]
    adapt: Callable[[Tensors], Tensors] = dict


def _pet(tensors: Tensors) -> Tensors:
    """The names of guided diffusion, whose blocks count a dropout, and the noise as the answer.

    The network divides what it gives by the standard deviation of the noise and calls it the score: before the division
    it is minus the noise. The last convolution's sign is turned.
    """
    named = {name.replace(".out_layers.2.", ".out_layers.3."): tensor for name, tensor in tensors.items()}
    return {name: -tensor if name.startswith("out.2.") else tensor for name, tensor in named.items()}


# layers of a block of guided diffusion
_STEP = r"(op|conv|norm|qkv|proj_out|skip_connection|in_layers\.[02]|emb_layers\.1|out_layers\.[03])"
_ADM_NAMES = (
    rf"(time_embed\.[02]|out\.[02]|input_blocks\.0\.0|((in|out)put_blocks\.\d+|middle_block)\.\d\.{_STEP})"
    r"\.(weight|bias)"
)
_NCSNPP_NAMES = r"all_modules\.\d+\.(W|((GroupNorm_[01]|Conv_[0-2]|Dense_0|Conv2d_0)\.)?(weight|bias)|NIN_[0-3]\.[Wb])"
_EDM_NAMES = (
    r"(map_(layer[01]|label|augment)|out_(norm|conv))\.(weight|bias)|map_noise\.freqs|(enc|dec)\.\d+x\d+_"
    r"(conv|down|up|in[01]|block\d+|aux_(down|skip|residual|up|norm|conv))(\.(norm[0-2]|conv[01]|affine|skip|qkv|proj))?"
    r"\.(weight|bias|resample_filter)"
)
_UNET2D_NAMES = (
    r"(conv_(in|out|norm_out)|time_embedding\.linear_[12]|((down|up)_blocks\.\d+|mid_block)\.("
    r"resnets\.\d+\.(norm[12]|conv[12]|time_emb_proj|conv_shortcut)|attentions\.\d+\.(group_norm|to_[qkv]|to_out\.0)|"
    r"(down|up)samplers\.0\.conv))\.(weight|bias)"
)
_ADM = ("head_channels", "heads", "legacy_attention", "longest_period")
FAMILIES: dict[str, Family] = {
    "pet": Family(
        "score model of PET",
        "adm",
        r"input_blocks\.\d+\.0\.out_layers\.2\.weight",
        _ADM_NAMES,
        adm_config,
        _ADM,
        noise_fields("vp_continuous", {"beta_min": 0.1, "beta_max": 10.0}, "eps"),
        _pet,
    ),
    "adm": Family(
        "guided diffusion (ADM)",
        "adm",
        r"input_blocks\.(0\.0|\d+\.0\.in_layers\.0)\.weight",
        _ADM_NAMES,
        adm_config,
        _ADM,
        {"path": "vp", "prediction": "eps", "sigma_range": (0.0101, 157.3)},
    ),
    "ncsnpp": Family(
        "NCSN++ (score_sde)",
        "ncsnpp",
        r"all_modules\.(0\.W|\d+\.Dense_0\.weight)",
        _NCSNPP_NAMES,
        ncsnpp_config,
        ("centered",),
        {"path": "ve", "prediction": "score", "sigma_range": (0.01, 378.0)},
    ),
    "edm": Family(
        "EDM",
        "edm",
        r"(enc|dec)\.\d+x\d+_block0\.conv0\.weight",
        _EDM_NAMES,
        edm_unet_config,
        ("called", "label", "vp_steps"),
        {**noise_fields("edm", {}, "edm"), "sigma_data": 0.5},
    ),
    "unet2d": Family(
        "diffusers UNet2DModel",
        "unet2d",
        r"(down|up)_blocks\.0\.resnets\.0\.conv1\.weight",
        _UNET2D_NAMES,
        unet2d_config,
        ("head_channels", "time_scale", "settings"),
        {"path": "vp", "prediction": "eps", "sigma_range": (0.0101, 157.3)},
    ),
}


@dataclass(frozen=True)
class Found:
    """What a checkpoint's tensors tell, and what lies beside them.

    Attributes:
        family: a key of FAMILIES.
        architecture: as in a model card, with its family.
        channels: of the images.
        conditions: channels the network takes beside them.
        learned_variance: whether it gives a variance too.
        parameters: number of weights.
        tensors: the weights by name.
        card: fields of the card that are known.
    """

    family: str
    architecture: dict[str, Any]
    channels: int
    conditions: int
    learned_variance: bool
    parameters: int
    tensors: Tensors
    card: Mapping[str, Any] = field(default_factory=dict)


def inspect(path: str | Path, **options: Any) -> Found:
    """What network a checkpoint holds, from its tensors' names and shapes and what lies beside them.

    Args:
        path: .pt, .pth or .safetensors file, or the folder of a diffusers model.
        options: what the shapes do not tell, as the family's configuration names it (adm: head_channels, heads,
            legacy_attention, longest_period; ncsnpp: centered; edm: called, label; unet2d: head_channels, time_scale).

    Raises:
        BadInput: it cannot be read, holds other objects than tensors, or is of no known family.
        ValueError: an option that the family does not have.
    """
    published = read_published(path)
    name = next((name for name, family in FAMILIES.items() if _has(published.tensors, family.told)), None)
    if name is None:
        titles = ", ".join(family.title for family in FAMILIES.values())
        raise BadInput(
            path, f"is of no known family; it begins with tensor {next(iter(published.tensors))}", f"known are {titles}"
        )
    family = FAMILIES[name]
    for option in options:
        if option not in family.options:
            raise ValueError(f"{option}: {family.title} has no such choice; leave it out")
    tensors = family.adapt(published.tensors)
    config = _config(family, tensors, published, options, path)
    # more channels going in than coming out are a condition, twice as many coming out are a variance
    channels = min(config.in_channels, config.out_channels)
    return Found(
        name,
        {"family": family.network, **config.model_dump(mode="json")},
        channels,
        config.in_channels - channels,
        config.out_channels == 2 * channels,
        sum(tensor.numel() for tensor in tensors.values()),
        tensors,
        dict(published.card or family.card),
    )


def _has(tensors: Tensors, pattern: str) -> bool:
    return any(re.fullmatch(pattern, name) for name in tensors)


def _config(family: Family, tensors: Tensors, published: Published, options: Mapping[str, Any], path: Any) -> Any:
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if "settings" in published.options and "head_channels" in options:
        raise ValueError("head_channels: config.json says it; leave it out")
    try:
        return family.config(shapes, **{**published.options, **options})
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        why = f"its shapes make no {family.title} network ({where}: {first['msg']})"
        raise BadInput(path, why, "is it the right file?") from None
    except (ValueError, TypeError, IndexError, ArithmeticError) as error:
        hint = _odd_name(family, tensors) or "the names of a published checkpoint are expected"
        raise BadInput(path, str(error), hint) from None


def _odd_name(family: Family, tensors: Tensors) -> str | None:
    """A hint at a tensor whose name the family does not use; a renamed one may make another seem to be missing."""
    odd = next((name for name in tensors if not re.fullmatch(family.names, name)), None)
    return odd and f"{family.title} has no tensor named {odd}: was it renamed?"


def convert(path: str | Path, folder: str | Path, card: Mapping[str, Any], **options: Any) -> ModelCard:
    """Write a published checkpoint as a prior folder; every tensor is checked before anything is written.

    Args:
        path: the checkpoint.
        folder: where card.json and model.safetensors go; must not hold another prior.
        card: what the checkpoint does not tell, as fields of a ModelCard: name, offset and scale (user value =
            offset + scale * network value), unit, plane, spacing_mm, licence, the schedule if it is not the usual, and
            for a network that takes more channels than it gives condition or positions.
        options: as in inspect.

    Raises:
        BadInput: as inspect; or the folder is taken.
        ValueError: the card's fields are not sound.
    """
    found = inspect(path, **options)
    target = Path(folder)
    if (target / CARD).exists():
        raise BadInput(target, "holds a prior already", "name another folder")
    conditions = found.conditions - 2 * bool(card.get("positions"))
    if conditions < 0 or (conditions > 0) != (card.get("condition") is not None):
        raise BadInput(
            path,
            f"the network takes {found.channels + found.conditions} channels and gives {found.channels}",
            "say in the card what the others are: condition, or positions, which are two",
        )
    try:
        made = ModelCard.model_validate(
            {
                **found.card,
                "channels": found.channels,
                "cond_channels": conditions,
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
    try:
        build_network(made, state, path)
    except BadInput as error:
        hint = _odd_name(FAMILIES[found.family], found.tensors)
        raise (BadInput(error.path, error.why, hint) if hint else error) from None
    return write_folder(target, made, state, torch.float32)

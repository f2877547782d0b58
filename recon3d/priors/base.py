"""What a prior is to the rest of recon3d, and the card that says what it was made from.

A prior denoises canonical states: u = x0 + sigma * eps in USER units (1/mm for CT). It alone knows its
network's units, related by  network value = (user value - offset) / scale,  so network sigma = sigma / scale.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

__all__ = [
    "ConditionCard", "ModelCard", "Prior", "check_plane", "check_planes", "condition_volume", "differentiable",
]  # fmt: skip

Plane = Literal["axial", "coronal", "sagittal", "any"]


class ConditionCard(BaseModel):
    """The image that a conditional prior is shown beside the state, and how the network sees its values.

    A whole volume is divided by its `percentile` first, where one is given; the network then sees
    (value - offset) / scale.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    what: str = Field("", description="contrast and unit, such as T1-weighted MR in arbitrary units")
    percentile: float | None = Field(None, gt=50, le=100, description="of the values of a volume; null: not divided")
    offset: float = Field(0.0, allow_inf_nan=False)
    scale: float = Field(1.0, gt=0, allow_inf_nan=False)


class ModelCard(BaseModel):
    """What a prior was trained on, its scale and its weights' digest (JSON beside the weights)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal["recon3d-prior/1"] = "recon3d-prior/1"
    name: str
    statement: str = Field("", description="what the prior is good for, and what it is not")
    plane: Plane = "any"
    spacing_mm: tuple[float, float] | None = Field(None, description="trained in-plane spacings, [low, high]")
    offset: float = Field(0.0, description="user units; network value = (user value - offset) / scale")
    scale: float = Field(1.0, gt=0, description="user units per network unit")
    unit: str = Field("a.u.", description="the user unit")
    value_range: tuple[float, float] | None = Field(None, description="trained user values, [low, high]")
    channels: int = Field(1, ge=1, description="of a state: slices, twice as many where they are complex")
    slices: int = Field(1, ge=1, description="neighbouring slices seen together, side by side in the channels")
    positions: bool = Field(
        False, description="the network's last two input channels say where a pixel lies: recon3d.priors.positions"
    )
    patch: int | None = Field(
        None, ge=16, description="side of the patches it was trained on and is to see; null: slices of any size"
    )
    cond_channels: int = Field(0, ge=0, description="of the image beside the state; 0: the prior takes none")
    condition: ConditionCard | None = Field(None, description="what that image is; null where there is none")
    path: Literal["edm", "ve", "vp", "vp_continuous", "flow", "exact"] = "edm"
    schedule: dict[str, float | str] = Field(default_factory=dict, description="of the path, such as beta_max")
    prediction: Literal["edm", "x0", "eps", "score", "v", "flow"] = Field(
        "edm", description="what the network gives: the preconditioned residual of EDM, or as to_denoiser names it"
    )
    sigma_range: tuple[float, float] | None = Field(None, description="trained noise levels, network units")
    sigma_data: float | None = Field(None, gt=0, description="network units")
    architecture: dict[str, Any] = Field(default_factory=dict, description="family and configuration")
    parameters: int | None = Field(None, ge=0)
    training_data: tuple[str, ...] = ()
    attribution: tuple[str, ...] = Field((), description="sources and licences of the training data")
    licence: str = ""
    training: dict[str, Any] = Field(default_factory=dict, description="steps, images, minutes and the like")
    validation: dict[str, Any] = Field(default_factory=dict, description="figures on unseen data")
    sha256: str | None = Field(None, pattern=r"^[0-9a-f]{64}$", description="digest of model.safetensors")

    @model_validator(mode="after")
    def _sound(self) -> ModelCard:
        for name in ("spacing_mm", "value_range", "sigma_range"):
            pair = getattr(self, name)
            if pair is not None and not (all(map(math.isfinite, pair)) and pair[0] <= pair[1]):
                raise ValueError(f"{name} must be finite [low, high] with low <= high, got {list(pair)}")
        if not (math.isfinite(self.offset) and math.isfinite(self.scale)):
            raise ValueError(f"offset and scale must be finite, got {self.offset} and {self.scale}")
        if (self.condition is None) != (self.cond_channels == 0):
            raise ValueError(f"condition goes with cond_channels above 0, got cond_channels {self.cond_channels}")
        if self.channels % self.slices:
            raise ValueError(f"channels must be a multiple of slices, got {self.channels} and {self.slices}")
        return self


@runtime_checkable
class Prior(Protocol):
    """A denoiser of slices. Implementations are safe to call from several threads at once."""

    card: ModelCard
    offset: float
    scale: float

    def denoise(self, u: Tensor, sigma: float, cond: Tensor | None = None) -> Tensor:
        """E[x0 | x0 + sigma eps = u] for u [batch, channel, row, col] in user units, shaped as u.

        A conditional prior (`card.cond_channels`) is given cond, [batch, channel, row, col], as well: the rows of a
        volume that `condition_volume` made.
        """
        ...


def differentiable(prior: Prior) -> Prior:
    """The prior with gradients recorded through `denoise` where the caller asks for them.

    A shallow copy where there is a switch for it, here or in the prior that an adapter (`prior.prior`) hands on to; a
    prior that is plain torch has none and comes back as it is. Weights are shared.
    """
    out: Any = prior
    if hasattr(out, "differentiable"):
        out = copy.copy(out)
        out.differentiable = True
    elif hasattr(out, "prior"):
        out = copy.copy(out)
        out.prior = differentiable(out.prior)
    elif hasattr(out, "priors"):
        out = copy.copy(out)
        out.priors = {plane: differentiable(one) for plane, one in out.priors.items()}
    return out


def condition_volume(card: ModelCard, volume: Tensor) -> Tensor:
    """A volume as a prior wants its condition: divided by its percentile where the card says so.

    Args:
        card: of the prior.
        volume: [z, y, x] real, the whole of it, in the unit of its file.

    Raises:
        ValueError: the prior takes no condition, or the volume's percentile is not positive and finite.

    >>> import torch
    >>> card = ModelCard(name="ct", cond_channels=1, condition=ConditionCard(percentile=100))
    >>> condition_volume(card, torch.tensor([[[1.0, 4.0]]]))
    tensor([[[0.2500, 1.0000]]])
    """
    if card.condition is None:
        raise ValueError(f"prior {card.name!r} takes no condition; leave it out or give a conditional prior")
    if card.condition.percentile is None:
        return volume
    level = float(np.percentile(volume.cpu().numpy(), card.condition.percentile))
    if not (math.isfinite(level) and level > 0):
        raise ValueError(
            f"condition: its percentile {card.condition.percentile:g} must be positive and finite, got {level:g}; "
            "give an image with signal"
        )
    return volume / level


def check_plane(card: ModelCard, plane: str, spacing_mm: float | Sequence[float]) -> str | None:
    """One sentence on what does not fit between a prior and the slices it is to see, or None.

    Args:
        card: the prior's card.
        plane: plane of the slices, "axial", "coronal" or "sagittal".
        spacing_mm: in-plane pixel spacing, one number or (row, col).

    >>> card = ModelCard(name="ct", plane="axial", spacing_mm=(0.8, 2.2))
    >>> check_plane(card, "axial", (1.1, 1.1))
    >>> print(check_plane(card, "axial", 5.0))
    prior 'ct' was trained on pixels of 0.8 to 2.2 mm, got 5 mm; use a grid in that range or another prior
    """
    if card.plane not in ("any", plane):
        return (
            f"prior {card.name!r} was trained on {card.plane} slices, got {plane} ones; "
            f"use {card.plane} planes or a prior trained on {plane} slices"
        )
    if card.spacing_mm is None:
        return None
    pair = (spacing_mm,) if isinstance(spacing_mm, (int, float)) else tuple(spacing_mm)
    low, high = card.spacing_mm
    # a few per cent beyond the range is nothing a network notices
    if min(pair) < 0.95 * low or max(pair) > 1.05 * high:
        shown = " x ".join(f"{s:g}" for s in dict.fromkeys(pair))
        return (
            f"prior {card.name!r} was trained on pixels of {low:g} to {high:g} mm, got {shown} mm; "
            f"use a grid in that range or another prior"
        )
    return None


# a network that was shown pixels about as high as wide still denoises such ones; slices three pixels apart it does not
_MOST_OBLONG = 2.5


def check_planes(card: ModelCard, planes: Sequence[str], spacing_mm: Sequence[float]) -> str | None:
    """One sentence on what does not fit between a prior and the planes it is to see slices of, or None.

    A prior that sees the plane it was trained on may see others beside it, which is what methods of several planes do
    with one network; spacings have to fit in every plane. Slices across coarser ones are refused, not resampled: an
    interpolated state no longer has white noise of the level that the network is told.

    Args:
        card: the prior's card.
        planes: "axial", "coronal" or "sagittal".
        spacing_mm: of the volume, z, y, x.
    """
    dz, dy, dx = spacing_mm
    sides = {"axial": (dy, dx), "coronal": (dz, dx), "sagittal": (dz, dy)}
    for plane in planes:
        known = plane if card.plane in planes else card.plane
        sentence = check_plane(card.model_copy(update={"plane": known}), plane, sides[plane])
        if sentence is not None:
            return sentence
        low, high = sorted(sides[plane])
        if high > _MOST_OBLONG * low and card.plane in ("any", "axial") and plane != "axial":
            return (
                f"{plane} slices of this grid have pixels of {sides[plane][0]:g} x {sides[plane][1]:g} mm, "
                f"prior {card.name!r} is for pixels about as high as wide; use axial planes or thinner slices"
            )
    return None

"""The folder a prior is kept in: `model.safetensors` (float16 weights) and `card.json` (its ModelCard).

The card names the architecture and carries the digest of the weights, so that neither can be swapped
unnoticed. Nothing in the folder is executed: no pickle, no code.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch
from pydantic import ValidationError
from torch import Tensor

from recon3d.io import BadInput
from recon3d.priors.base import ModelCard
from recon3d.priors.checkpoints.atomic import write_safetensors, write_text
from recon3d.priors.networks import FAMILIES, Network

__all__ = ["build_network", "read_card", "read_folder", "write_folder"]

CARD, WEIGHTS = "card.json", "model.safetensors"
_MAX_CARD_BYTES = 1 << 20
_MAX_WEIGHT_BYTES = 4 << 30  # the largest published 2D priors have 1.5 GB


def read_card(folder: str | Path) -> ModelCard:
    """The card of a prior folder; its weights are not touched.

    Raises:
        BadInput: the card is missing, too large or malformed.
    """
    folder = Path(folder)
    text = _read(folder / CARD, _MAX_CARD_BYTES)
    try:
        return ModelCard.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "file"
        raise BadInput(folder / CARD, f"{where}: {first['msg']}", "write the card with recon3d train") from None


def read_folder(folder: str | Path) -> tuple[ModelCard, dict[str, Tensor]]:
    """Card and weights (float32) of a prior folder.

    Raises:
        BadInput: a file is missing, too large, malformed, or the weights do not have the card's digest.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    folder = Path(folder)
    card = read_card(folder)
    content = _read(folder / WEIGHTS, _MAX_WEIGHT_BYTES)
    if card.sha256 is None:
        raise BadInput(folder / CARD, "sha256 is missing", f"add the SHA-256 of {WEIGHTS}")
    digest = hashlib.sha256(content).hexdigest()
    if digest != card.sha256:
        why = f"its SHA-256 starts with {digest[:12]}, the card says {card.sha256[:12]}"
        raise BadInput(folder / WEIGHTS, why, "fetch both files again from the same place")
    try:
        tensors = load(content)
    except SafetensorError as error:
        raise BadInput(folder / WEIGHTS, f"not a safetensors file ({error})", "fetch it again") from None
    return card, {k: v.float() if v.is_floating_point() else v for k, v in tensors.items()}


def write_folder(
    folder: str | Path, card: ModelCard, state: dict[str, Tensor], dtype: torch.dtype = torch.float16
) -> ModelCard:
    """Write weights and the card with their digest, weights first; returns the card as written.

    Raises:
        ValueError: a weight is not finite, or beyond what dtype holds.
    """
    folder = Path(folder)
    stored = {k: v.to(dtype) if v.is_floating_point() else v for k, v in state.items()}
    for name, value in stored.items():
        if not bool(torch.isfinite(value.float()).all()):
            kind = str(dtype).removeprefix("torch.")
            raise ValueError(f"write_folder: {name} has values {kind} cannot hold; train with a lower learning rate")
    content = write_safetensors(folder / WEIGHTS, stored)
    card = card.model_copy(update={"sha256": hashlib.sha256(content).hexdigest()})
    write_text(folder / CARD, json.dumps(card.model_dump(mode="json"), indent=2, ensure_ascii=False) + "\n")
    return card


def build_network(card: ModelCard, state: dict[str, Tensor], path: str | Path) -> Network:
    """The network a card describes, filled with weights.

    Raises:
        BadInput: the architecture is not known, or a tensor is missing, left over or has another shape.
    """
    path = Path(path)
    architecture = dict(card.architecture)
    family = architecture.pop("family", None)
    if family not in FAMILIES:
        raise BadInput(path / CARD, f"architecture.family is {family!r}", f"known are {', '.join(FAMILIES)}")
    configuration, network = FAMILIES[family]
    try:
        config = configuration.model_validate(architecture)
        with torch.device("meta"):
            net = network(config)
    except (ValueError, RuntimeError) as error:  # torch overflows on absurd widths
        first = str(error).splitlines()[0]
        hint = f"see {configuration.__name__}"
        raise BadInput(
            path / CARD, f"architecture does not describe a network of family {family} ({first})", hint
        ) from None
    wanted = {k: tuple(v.shape) for k, v in net.state_dict().items()}
    hint = "the card and the weights belong to different networks"
    for name, shape in wanted.items():
        if name not in state:
            raise BadInput(path / WEIGHTS, f"tensor {name} is missing", hint)
        if tuple(state[name].shape) != shape:
            raise BadInput(
                path / WEIGHTS, f"tensor {name} has shape {tuple(state[name].shape)}, expected {shape}", hint
            )
        if not bool(torch.isfinite(state[name]).all()):
            raise BadInput(path / WEIGHTS, f"tensor {name} has values that are not finite", "fetch it again")
    extra = sorted(set(state) - set(wanted))
    if extra:
        raise BadInput(path / WEIGHTS, f"tensor {extra[0]} belongs to no layer of the card's architecture", hint)
    filled = network(config)
    filled.load_state_dict(state)
    return filled


def _read(path: Path, limit: int) -> bytes:
    try:
        size = path.stat().st_size
        if not path.is_file():
            raise BadInput(path, "not a file", f"give the folder that holds {CARD} and {WEIGHTS}")
        if size > limit:
            raise BadInput(path, f"has {size} bytes, at most {limit} are read", "is it the right file?")
        return path.read_bytes()
    except OSError as error:
        hint = f"give the folder that holds {CARD} and {WEIGHTS}"
        raise BadInput(path, f"cannot be read ({error.strerror})", hint) from None

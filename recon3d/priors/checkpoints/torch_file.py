"""Tensors of a .pt, .pth or .safetensors file, with nothing in it executed.

torch's own files are pickles: they go through torch's restricted reader (weights_only), which builds tensors and plain
containers and refuses everything else.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from recon3d.io import BadInput

__all__ = ["read_checkpoint", "tensors_of"]

_MAX_BYTES = 8 << 30  # with optimizer; the largest published 2D priors have 1.5 GB of weights


def read_checkpoint(path: str | Path) -> Any:
    """What a checkpoint file holds: tensors in dictionaries and lists.

    Raises:
        BadInput: it cannot be read, is too large, or asks for anything but tensors and plain containers.
    """
    path = Path(path)
    try:
        size = path.stat().st_size
        if not path.is_file():
            raise BadInput(path, "not a file", "give a .pt, .pth or .safetensors file")
        if size > _MAX_BYTES:
            raise BadInput(path, f"has {size} bytes, at most {_MAX_BYTES} are read", "is it the right file?")
        with path.open("rb") as file:
            head = file.read(9)
    except OSError as error:
        raise BadInput(path, f"cannot be read ({error.strerror})", "give a .pt, .pth or .safetensors file") from None
    if path.suffix == ".safetensors" or head[8:9] == b"{":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except (SafetensorError, OSError, ValueError) as error:
            raise BadInput(path, f"not a safetensors file ({_first(error)})", "fetch it again") from None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what is refused anyway
            return torch.load(path, map_location="cpu", weights_only=True, mmap=head[:2] == b"PK" or None)
    except Exception as error:  # damaged files raise whatever the reader trips over
        text = " ".join(str(error).split())
        if type(error).__name__ != "UnpicklingError":
            raise BadInput(path, f"is damaged or not a torch file ({_first(error)})", "fetch it again") from None
        if "WeightsUnpickler" in text or "GLOBAL" in text or "nsupported" in text:
            named = text.partition("GLOBAL ")[2].split(" ")[0].strip("`") or "an object"
            raise BadInput(
                path, f"holds {named}, which is not a tensor; nothing of it was executed", _how_to_save(path)
            ) from None
        raise BadInput(path, "is damaged or not a torch file", "fetch it again") from None


def _how_to_save(path: Path) -> str:
    with path.open("rb") as file:
        start = file.read(4096)
    if b"torch_utils.persistence" in start:
        return (
            "it is a Python object of EDM; recon3d weights export-script edm prints a program that makes tensors of it"
        )
    return "save the state dict alone with torch.save or safetensors"


def tensors_of(value: Any, path: str | Path) -> dict[str, Tensor]:
    """The named tensors of a state dict, without the prefix of a data-parallel wrapper.

    Raises:
        BadInput: there are none, or something beside them.
    """
    if not isinstance(value, Mapping) or not value:
        raise BadInput(path, f"holds a {type(value).__name__}, no named tensors", "save a state dict")
    for name, tensor in value.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise BadInput(path, f"{str(name)[:80]!r} is a {type(tensor).__name__}, not a tensor", "save a state dict")
    plain = {str(name): tensor for name, tensor in value.items()}
    if all(name.startswith("module.") for name in plain):
        plain = {name.removeprefix("module."): tensor for name, tensor in plain.items()}
    return plain


def _first(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:160] if lines else type(error).__name__

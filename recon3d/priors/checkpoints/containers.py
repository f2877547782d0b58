"""The weights in a published file, by name, whatever they are wrapped in.

A file holds a state dict, or one among what a training run kept, or averages that have lost their names. An average is
a list of all that is trained, in the order of the model's own tensors: score_sde keeps both in one file, the score
models of PET keep ema_model.pt beside model.pt.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from recon3d.io import BadInput
from recon3d.priors.checkpoints.torch_file import read_checkpoint, tensors_of

__all__ = ["weights_of"]

# under which training runs keep the state dict to denoise with, the averaged one first
_KEPT_AS = ("ema", "model_state", "model_state_dict", "state_dict")
# score_sde: stored with the model, but not trained, hence not among the averages
_UNTRAINED = "all_modules.0.W"


def weights_of(path: str | Path) -> dict[str, Tensor]:
    """The weights to denoise with, without the prefixes of wrappers.

    Raises:
        BadInput: the file cannot be read, holds other objects than tensors, or averages that fit no model.
    """
    path = Path(path)
    content = read_checkpoint(path)
    if isinstance(content, Mapping) and "shadow_params" in content:
        return _beside_model(content, path)
    if isinstance(content, Mapping) and isinstance(content.get("model"), Mapping) and "ema" in content:
        return _score_sde(content, path)
    if isinstance(content, Mapping):
        kept = next((content[key] for key in _KEPT_AS if isinstance(content.get(key), Mapping)), content)
        content = kept
    return _unwrapped(tensors_of(content, path))


def _score_sde(content: Mapping[str, Any], path: Path) -> dict[str, Tensor]:
    # noise levels are a table beside the weights
    model = {name: t for name, t in tensors_of(content["model"], path).items() if name != "sigmas"}
    ema = content["ema"]
    if isinstance(ema, Mapping) and "shadow_params" in ema:
        return _averaged(model, ema["shadow_params"], "ema.shadow_params", path)
    return _averaged(model, ema, "ema", path)


def _beside_model(content: Mapping[str, Any], path: Path) -> dict[str, Tensor]:
    names = path.with_name("model.pt")
    if names == path or not names.is_file():
        raise BadInput(path, "holds averages without names", "put model.pt of the same training beside it")
    return _averaged(tensors_of(read_checkpoint(names), names), content["shadow_params"], "shadow_params", path)


def _averaged(model: dict[str, Tensor], averages: Any, where: str, path: Path) -> dict[str, Tensor]:
    """The model's tensors with the trained ones replaced by their averages: by order, whatever those are called."""
    if isinstance(averages, Mapping):
        averages = list(averages.values())
    if not isinstance(averages, Sequence) or not all(isinstance(t, Tensor) for t in averages):
        raise BadInput(path, f"{where} is not a list of tensors", "a checkpoint of a score model is expected")
    trained = [name for name in model if name != _UNTRAINED]
    hint = "average and model belong to different networks"
    if len(averages) != len(trained):
        raise BadInput(path, f"{where} has {len(averages)} tensors, the model trains {len(trained)}", hint)
    for name, tensor in zip(trained, averages, strict=True):
        if tensor.shape != model[name].shape:
            why = f"{where}: shape {tuple(tensor.shape)} stands where {name} has {tuple(model[name].shape)}"
            raise BadInput(path, why, hint)
        model[name] = tensor
    return model


def _unwrapped(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without the `model.` that the preconditioning of EDM puts before every name, and its own table `u`."""
    if not any(name.startswith("model.map_layer0.") for name in tensors):
        return tensors
    return {name.removeprefix("model."): tensor for name, tensor in tensors.items() if name != "u"}

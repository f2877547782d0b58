"""A network that starts from the tensors of another prior."""

from __future__ import annotations

import torch
from torch import Tensor

from recon3d.priors.checkpoints.folder import read_folder

__all__ = ["start_from"]


def start_from(net: torch.nn.Module, folder: str, slices: int, joined: int = 0) -> None:
    """Copy the tensors of a prior folder that the network has with the same name and shape.

    Where the network sees several slices and that prior one, the first convolution starts as one of their mean, with
    differences between slices as they were drawn, and the last one gives every slice the same. A kernel that only lacks
    the `joined` input channels of a condition gets zeros for those: the network then starts as the prior that it came
    from, blind to the condition.
    """
    card, state = read_folder(folder)
    for k, p in net.named_parameters():
        if k in state and state[k].ndim == p.ndim:
            if slices > 1 and card.slices == 1:
                state[k] = _for_slices(state[k], p.detach(), slices, joined)
            if joined and p.ndim == 4 and state[k].shape[1] + joined == p.shape[1]:
                state[k] = torch.nn.functional.pad(state[k], (0, 0, 0, 0, 0, joined))
    with torch.no_grad():
        same = [(p, state[k]) for k, p in net.named_parameters() if k in state and state[k].shape == p.shape]
        for p, value in same:
            p.copy_(value)
    if not same:
        raise ValueError(f"train: init {folder} has no tensor with a name and shape of this network; leave init out")


def _for_slices(value: Tensor, drawn: Tensor, slices: int, joined: int) -> Tensor:
    """A tensor whose channels in or out are those of one slice, for slices side by side (and `joined` channels in)."""
    for beside in {0, joined}:
        if value.ndim > 1 and value.shape[1] * slices == drawn.shape[1] - beside:
            # were all slices alike to the network, they would stay so: their gradients would be the same
            own = drawn[:, : drawn.shape[1] - beside].unflatten(1, (-1, slices))
            value = (value.unsqueeze(2) / slices + own - own.mean(2, keepdim=True)).flatten(1, 2)
    return value.repeat_interleave(slices, dim=0) if value.shape[0] * slices == drawn.shape[0] else value

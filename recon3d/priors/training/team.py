"""The processes of a run: one, or those that torchrun started, one a GPU (or a CPU, to test).

Every process computes its share of every batch; gradients are added up and every process takes the same step, so that
weights, averages and moments stay the same to the bit everywhere. Files are written by the first process alone.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["Team", "team"]


class Team:
    """Ranks of a process group; one process without a group is rank 0 of 1."""

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank = rank
        self.size = size

    @property
    def first(self) -> bool:
        return self.rank == 0

    def share(self, n: int) -> range:
        """Which of n images this process computes; shares differ by one at most."""
        return range(self.rank * n // self.size, (self.rank + 1) * n // self.size)

    def add(self, tensors: Sequence[Tensor]) -> None:
        """Replace float32 tensors, on one device, by their sums over the processes: one message for all of them."""
        if self.size == 1:
            return
        flat = torch.cat([t.flatten() for t in tensors])
        dist.all_reduce(flat)
        for t, total in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
            t.copy_(total.view(t.shape))

    def agree(self, *numbers: float) -> tuple[float, ...]:
        """The numbers as the first process has them."""
        if self.size == 1:
            return numbers
        said = torch.tensor(numbers, dtype=torch.float64)
        dist.broadcast(said, 0)
        return tuple(said.tolist())


@contextmanager
def team(device: torch.device) -> Iterator[tuple[Team, torch.device]]:
    """Join the processes that torchrun started, if it did, and say on which device this one computes.

    A process group that the caller made is used and left alone. On GPUs every process takes the one of its local rank.
    """
    mine = not dist.is_initialized() and int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ
    if mine:
        # gloo carries the few numbers that live on the host
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    if not dist.is_initialized():
        yield Team(), device
        return
    try:
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
            torch.cuda.set_device(device)
        yield Team(dist.get_rank(), dist.get_world_size()), device
    finally:
        if mine:
            dist.destroy_process_group()

"""Coincidences one by one: list mode."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from recon3d.geometry.pet import PETGeometry

__all__ = ["Events"]


@dataclass(frozen=True, eq=False)
class Events:
    """Coincidences of a scanner in the order they were stored.

    Attributes:
        pairs: [n, 2] int32, crystal ids of the p0 and the p1 end.
        prompt: [n] bool, False for delayed coincidences.
        tof_bins: [n] int16 time bins from the p0 end to the p1 end, or None.
        time_ms: [n] when, from the start, or None.

    Raises:
        ValueError: shapes that disagree.
    """

    pairs: Tensor
    prompt: Tensor
    tof_bins: Tensor | None = None
    time_ms: Tensor | None = None

    def __post_init__(self) -> None:
        if self.pairs.ndim != 2 or self.pairs.shape[1] != 2 or self.pairs.is_floating_point():
            raise ValueError(f"Events: pairs must be [n, 2] whole numbers, got {tuple(self.pairs.shape)}")
        object.__setattr__(self, "pairs", self.pairs.to(torch.int32))
        object.__setattr__(self, "prompt", self.prompt.to(torch.bool))
        for name in ("prompt", "tof_bins", "time_ms"):
            value = getattr(self, name)
            if value is not None and tuple(value.shape) != (len(self),):
                raise ValueError(f"Events: {name} must be [{len(self)}], one per pair, got {tuple(value.shape)}")

    def __len__(self) -> int:
        return int(self.pairs.shape[0])

    def __getitem__(self, choice: slice | Tensor) -> Events:
        """The chosen events: a slice, a mask or indices."""
        pick = {name: value[choice] for name in _FIELDS if (value := getattr(self, name)) is not None}
        return replace(self, **pick)

    def histogram(self, geometry: PETGeometry) -> tuple[Tensor, Tensor]:
        """Counts of the prompt and of the delayed coincidences, float32 in the geometry's shape.

        Events that no bin holds are left out.
        """
        bins = geometry.bin_of(self.pairs.numpy(), None if self.tof_bins is None else self.tof_bins.numpy())
        held, prompt = bins >= 0, self.prompt.numpy()
        out = []
        for chosen in (held & prompt, held & ~prompt):
            where, counts = np.unique(bins[chosen], return_counts=True)
            counted = torch.zeros(geometry.shape, dtype=torch.float32)
            counted.view(-1)[torch.from_numpy(where)] = torch.from_numpy(counts.astype(np.float32))
            out.append(counted)
        return out[0], out[1]


_FIELDS = ("pairs", "prompt", "tof_bins", "time_ms")

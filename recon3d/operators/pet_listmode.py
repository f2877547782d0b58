"""PET event by event: the expected counts of the bins that coincidences fell into."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Self

import torch
from torch import Tensor

from recon3d import ops
from recon3d.geometry import TOF, Events, PETScanner, VolumeGrid
from recon3d.operators.base import Space
from recon3d.operators.pet import herman_meyer
from recon3d.operators.pet_model import EmissionOperator, check_counts, checked_scale, sigma_voxels

__all__ = ["PETListmode"]


class PETListmode(EmissionOperator):
    """Activity [..., z, y, x] in Bq/mL to the expected counts of the bins that events fell into, [..., n].

    In the EM update every event stands for itself: y is 1 for each, and the sensitivity is that of all bins that could
    have counted, which the events alone do not tell.

    Args:
        events: coincidences; delayed ones must have been taken out.
        scanner: where the crystals are.
        grid: the volume.
        tof: time bins of the events; needed to use them.
        factors: [n] of the bins that the events fell into; None = 1.
        additive: [n] expected scattered and random counts of those bins; None = none.
        sensitivity: [z, y, x], PETOperator(...).sensitivity() with the same factors and scale.
        psf_fwhm_mm: resolution in the image, one width or (z, y, x).
        scale: as in PETOperator.

    Raises:
        ValueError: shapes that do not fit, delayed events, or time bins that are missing.
    """

    def __init__(
        self,
        events: Events,
        scanner: PETScanner,
        grid: VolumeGrid,
        *,
        tof: TOF | None = None,
        factors: Tensor | None = None,
        additive: Tensor | None = None,
        sensitivity: Tensor | None = None,
        psf_fwhm_mm: float | Sequence[float] | None = None,
        scale: float = 1.0,
    ) -> None:
        if not bool(events.prompt.all()):
            raise ValueError("PETListmode: delayed events are no activity; give events[events.prompt]")
        if tof is not None and events.tof_bins is None:
            raise ValueError("PETListmode: tof was given but the events have no time bins")
        self.events = events
        self.scanner = scanner
        self.grid = grid
        self.tof = tof
        self.scale = checked_scale(scale)
        for name, value in (("factors", factors), ("additive", additive)):
            if value is not None:
                check_counts(f"PETListmode: {name}", value)
                if tuple(value.shape) != (len(events),):
                    raise ValueError(f"PETListmode: {name} must be [{len(events)}], got {tuple(value.shape)}")
        self.factors, self.additive = factors, additive
        if sensitivity is not None and tuple(sensitivity.shape) != grid.shape:
            raise ValueError(f"PETListmode: sensitivity must be {grid.shape}, got {tuple(sensitivity.shape)}")
        self._given = sensitivity
        self._sigma = sigma_voxels(psf_fwhm_mm, grid)
        self.psf_fwhm_mm = psf_fwhm_mm
        self.domain = Space(grid.shape, torch.float32, "Bq/mL")
        self.range = Space((len(events),), torch.float32, "counts")
        self._points = torch.from_numpy(scanner.crystal_positions())
        self._parts: dict[int, list[tuple[PETListmode, Tensor]]] = {}

    def sensitivity(self) -> Tensor:
        """What was given.

        Raises:
            ValueError: nothing was.
        """
        if self._given is None:
            raise ValueError(
                "PETListmode: events do not tell the sensitivity; give sensitivity=PETOperator(...).sensitivity()"
            )
        return self._given

    def subsets(self, n: int) -> list[tuple[Self, Tensor]]:
        """n subsets of every n-th event (operator, indices); each has an n-th of the sensitivity.

        Raises:
            ValueError: n is not between 1 and the number of events.
        """
        if int(n) != n or not 1 <= n <= len(self.events):
            raise ValueError(f"PETListmode.subsets: 1..{len(self.events)} subsets possible, got {n}")
        if n not in self._parts:
            share = None if self._given is None else self._given / n
            self._parts[n] = [self._part(k, n, share) for k in herman_meyer(n)]
        return self._parts[n]  # type: ignore[return-value]

    def _part(self, first: int, step: int, share: Tensor | None) -> tuple[PETListmode, Tensor]:
        chosen = slice(first, None, step)
        part = copy.copy(self)
        part.events = self.events[chosen]
        part.factors = None if self.factors is None else self.factors[chosen]
        part.additive = None if self.additive is None else self.additive[chosen]
        part.range = replace(self.range, shape=(len(part.events),))
        part._given, part._parts = share, {}
        return part, torch.arange(first, len(self.events), step)

    def _project(self, x: Tensor, out: Tensor | None) -> Tensor:
        bins = self.events.tof_bins if self.tof is not None else None
        return ops.joseph3d(x, self._points, self.events.pairs, self.grid.spacing_mm, tof=self.tof, tof_bins=bins)

    def _back_project(self, y: Tensor) -> Tensor:
        bins = self.events.tof_bins if self.tof is not None else None
        return ops.joseph3d_adjoint(
            y, self._points, self.events.pairs, self.grid.shape, self.grid.spacing_mm, tof=self.tof, tof_bins=bins
        )

    def _device(self) -> torch.device:
        return torch.device("cpu") if self._given is None else self._given.device

"""Slices in turn: every level covers the volume once, and what is gathered is scattered back to its place."""

from __future__ import annotations

import pytest
import torch

from recon3d.planes import Axial, InTurn
from recon3d.trajectory import descend

SHAPE = (3, 4, 5)


def _levels(n: int) -> list:
    return descend([1.0 / (k + 1) for k in range(n)])


@pytest.mark.parametrize("planes", [Axial(3), Axial(3, 2), InTurn(SHAPE), InTurn(SHAPE, (2,))])
def test_every_level_covers_the_volume_once(planes):
    u = torch.arange(60.0).reshape(SHAPE)
    for level in _levels(5):
        out, seen = torch.zeros(SHAPE), torch.zeros(SHAPE)
        for view in planes.views(level):
            rows = planes.gather(u, view)
            assert rows.ndim == 4 and rows.shape[1] == 1
            planes.scatter(out, rows, view)
            once = torch.zeros(SHAPE)
            planes.scatter(once, torch.ones_like(rows), view)
            seen += once
        assert torch.equal(out, u) and torch.equal(seen, torch.ones(SHAPE))


def test_axes_take_turns():
    planes = InTurn(SHAPE)
    shapes = [tuple(planes.gather(torch.zeros(SHAPE), planes.views(level)[0]).shape[2:]) for level in _levels(5)]
    assert shapes == [(4, 5), (3, 5), (4, 5), (3, 4), (4, 5)]


@pytest.mark.parametrize("order", [(), (0, 3)])
def test_axes_that_a_volume_does_not_have(order):
    with pytest.raises(ValueError, match="order must name axes 0, 1, 2"):
        InTurn(SHAPE, order)

"""Which slices of a volume the prior sees at a level, and how its answers become a volume again."""

from __future__ import annotations

from recon3d.planes.base import PLANES, Planes, View
from recon3d.planes.neighbours import Neighbours
from recon3d.planes.slices import Averaged, Axial, InTurn

__all__ = ["PLANES", "Averaged", "Axial", "InTurn", "Neighbours", "Planes", "View"]

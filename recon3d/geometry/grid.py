"""The voxel grid of a volume."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

Affine = tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class VolumeGrid:
    """Shape, spacing and place of a volume [z, y, x].

    Attributes:
        shape: voxels along z, y, x; each at least 1.
        spacing_mm: voxel size along z, y, x in mm; each positive.
        affine: 4x4, voxel (x, y, z) to world RAS mm; None centres the grid on the world's origin with
            x to the left, y to the back and z to the head (LPS), as slices are looked at.

    Raises:
        ValueError: a size below 1, a spacing that is not finite and positive, or a singular affine.
    """

    shape: tuple[int, int, int]
    spacing_mm: tuple[float, float, float]
    affine: Affine | None = None

    def __post_init__(self) -> None:
        if len(self.shape) != 3 or any(int(n) != n or n < 1 for n in self.shape):
            raise ValueError(f"VolumeGrid: shape needs three sizes of at least 1 (z, y, x), got {self.shape}")
        if len(self.spacing_mm) != 3 or not all(np.isfinite(s) and s > 0 for s in self.spacing_mm):
            raise ValueError(f"VolumeGrid: spacing_mm needs three positive lengths (z, y, x), got {self.spacing_mm}")
        object.__setattr__(self, "shape", tuple(int(n) for n in self.shape))
        object.__setattr__(self, "spacing_mm", tuple(float(s) for s in self.spacing_mm))
        if self.affine is not None:
            matrix = np.asarray(self.affine, dtype=np.float64)
            if matrix.shape != (4, 4) or not np.isfinite(matrix).all() or np.linalg.det(matrix[:3, :3]) == 0:
                raise ValueError("VolumeGrid: affine needs a finite, invertible 4x4 matrix")
            object.__setattr__(self, "affine", tuple(tuple(float(v) for v in row) for row in matrix))

    @property
    def pixel_mm(self) -> tuple[float, float]:
        """In-plane pixel size (dy, dx) in mm."""
        return self.spacing_mm[1], self.spacing_mm[2]

    @property
    def slice_shape(self) -> tuple[int, int]:
        """In-plane size (ny, nx)."""
        return self.shape[1], self.shape[2]

    def matrix(self) -> NDArray[np.float64]:
        """The affine as an array, made from the spacing when none was given."""
        if self.affine is not None:
            return np.asarray(self.affine, dtype=np.float64)
        nz, ny, nx = self.shape
        dz, dy, dx = self.spacing_mm
        matrix = np.diag([-dx, -dy, dz, 1.0])
        matrix[:3, 3] = [(nx - 1) / 2 * dx, (ny - 1) / 2 * dy, -(nz - 1) / 2 * dz]
        return matrix

    def slab(self, start: int, stop: int) -> VolumeGrid:
        """The grid of slices start..stop-1, at their place in the world.

        Raises:
            ValueError: an empty range or one outside the volume.
        """
        if not 0 <= start < stop <= self.shape[0]:
            raise ValueError(f"VolumeGrid.slab: 0 <= start < stop <= {self.shape[0]} expected, got {start}, {stop}")
        matrix = self.matrix()
        matrix[:3, 3] += start * matrix[:3, 2]
        return replace(
            self,
            shape=(stop - start, *self.shape[1:]),
            affine=tuple(tuple(float(v) for v in row) for row in matrix),
        )

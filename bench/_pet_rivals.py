"""parallelproj's C library, which bench/pet.py times beside ours: version 2 (2.0.x) and version 1 (1.10.x).

pip has neither. RECON3D_PARALLELPROJ names a libparallelproj shared library of version 2 (it has a 2 in its name) or of
version 1; RECON3D_PARALLELPROJ1 names one of version 1 beside it.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from recon3d.geometry import TOF

Floats = NDArray[np.float32]
_THREADS_PER_BLOCK = 64  # of version 2 on a GPU; it wants a number all the same


def libraries() -> Iterator[tuple[int, str]]:
    """Version and path of every library at hand."""
    for name in ("RECON3D_PARALLELPROJ", "RECON3D_PARALLELPROJ1"):
        path = os.environ.get(name)
        if path:
            yield 2 if "2" in Path(path).name and not name.endswith("1") else 1, path


class ParallelProj:
    """Lines from `start` to `stop` [n, 3] (z, y, x) in mm through a volume centred on the origin.

    Images lie [y, x, z] in its memory, which is its fastest order for lines that come plane by plane.

    Args:
        version: 1 or 2.
        path: the shared library.
        start, stop: ends of the lines; kept as float32 (y, x, z).
        shape: (nz, ny, nx) of the volume.
        spacing_mm: of its voxels (z, y, x).
        tof: time-of-flight bins.
        bins: the bin of every line for list mode; None makes all bins of every line.
    """

    def __init__(
        self,
        version: int,
        path: str,
        start: NDArray[np.float64],
        stop: NDArray[np.float64],
        shape: tuple[int, int, int],
        spacing_mm: tuple[float, float, float],
        tof: TOF | None = None,
        bins: NDArray[np.int64] | None = None,
    ) -> None:
        self.name = f"parallelproj {version}"
        library = ctypes.CDLL(path)
        kind = "" if tof is None else "_tof_lm" if bins is not None else "_tof_sino"
        names = (f"joseph3d_fwd{kind}", f"joseph3d_back{kind}")
        if version == 2:
            names = (f"joseph3d{kind}_fwd", f"joseph3d{kind}_back")
        self.functions = [getattr(library, name) for name in names]
        self.ends = [np.ascontiguousarray(np.roll(e, -1, axis=1), dtype=np.float32) for e in (start, stop)]
        turn = (1, 2, 0)
        sizes, steps = np.array(shape)[list(turn)], np.array(spacing_mm)[list(turn)]
        self.origin, self.voxel = (-(sizes - 1) / 2 * steps).astype(np.float32), steps.astype(np.float32)
        self.size = sizes.astype(np.int32)
        n = len(self.ends[0])
        pointer, integer, real = ctypes.c_void_p, ctypes.c_int, ctypes.c_float
        count = ctypes.c_longlong if version == 1 else ctypes.c_size_t
        types: list[object] = [pointer] * 6 + [count, pointer]
        self.rest: list[object] = []
        if tof is not None:
            self.sigma, self.offset = np.array([tof.sigma_mm], np.float32), np.zeros(1, np.float32)
            types += [real, pointer, pointer, real]
            self.rest += [tof.bin_mm, self.sigma.ctypes.data, self.offset.ctypes.data, tof.truncation]
            if bins is not None:
                # version 1 counts from the middle bin
                self.bins = np.ascontiguousarray(bins - (tof.bins // 2 if version == 1 else 0), dtype=np.int16)
                types.append(pointer)
                self.rest.append(self.bins.ctypes.data)
            if bins is None or version == 2:
                types.append(ctypes.c_short)
                self.rest.append(tof.bins)
            types += [ctypes.c_ubyte] * 2
            self.rest += [0, 0]
        if version == 2:
            types += [integer, integer]
            self.rest += [0, _THREADS_PER_BLOCK]
        for function in self.functions:
            function.argtypes, function.restype = types, None
        self.x = np.zeros(tuple(int(s) for s in self.size), np.float32)
        self.y = np.zeros((n, tof.bins) if tof is not None and bins is None else n, np.float32)
        self.count = n
        self.resident_mb = sum(e.nbytes for e in self.ends) / 2**20

    def load_image(self, x: Tensor) -> None:
        """Take a volume [z, y, x] over."""
        self.x[:] = x.permute(1, 2, 0).numpy()

    def load_data(self, y: Tensor) -> None:
        """Take one value per line, or [line, bin], over."""
        self.y[:] = y.numpy()

    def _call(self, function: Callable[..., None], *arrays: Floats) -> None:
        pointers = [a.ctypes.data for a in (*self.ends, arrays[0], self.origin, self.voxel, arrays[1])]
        function(*pointers, self.count, self.size.ctypes.data, *self.rest)

    def forward(self) -> object:
        """Project the loaded volume; this is timed."""
        self.y[:] = 0
        return self._call(self.functions[0], self.x, self.y)

    def adjoint(self) -> object:
        """Back project the loaded data; this is timed."""
        self.x[:] = 0
        return self._call(self.functions[1], self.x, self.y)

    def data(self) -> Tensor:
        """What forward made, [line] or [line, bin]."""
        return torch.from_numpy(self.y.copy())

    def image(self) -> Tensor:
        """What adjoint made, [z, y, x]."""
        return torch.from_numpy(self.x.transpose(2, 0, 1).copy())

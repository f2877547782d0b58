"""Projectors that bench/radon.py times beside ours, each behind the same four verbs.

What pip cannot give is found through environment variables: RECON3D_LEAP is a folder with leapctype.py and
libleapct.so, RECON3D_PARALLELPROJ a libparallelproj shared library (version 1, or 2 with a 2 in its name).
"""

from __future__ import annotations

import ctypes
import importlib
import math
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from recon3d.geometry import FanBeam, ParallelBeam
from recon3d.ops.radon import _joseph_taps, _lines, _reference, _reference_adjoint, _scan


class Absent(RuntimeError):
    """The rival is not installed, or does not serve this case."""


class Rival:
    """One projector for square images with pixels of 1 mm: load, run (timed), read."""

    name = ""
    resident_mb = 0.0  # beyond images and sinograms
    max_slices = 1 << 30  # where timing more would only take long
    devices: tuple[str, ...] = ("cpu",)
    centre_shift = 0.0  # pixels from (n-1)/2 to where the package turns the image

    def __init__(self, geometry: ParallelBeam, n: int, slices: int) -> None:
        raise NotImplementedError

    def load_image(self, x: Tensor) -> None:
        """Take slices [slice, y, x] over into the rival's own layout."""
        raise NotImplementedError

    def load_sinogram(self, y: Tensor) -> None:
        """Take sinograms [slice, view, u] over into the rival's own layout."""
        raise NotImplementedError

    def forward(self) -> object:
        """Project the loaded image; this is timed."""
        raise NotImplementedError

    def adjoint(self) -> object:
        """Back project the loaded sinogram; this is timed."""
        raise NotImplementedError

    def sinogram(self) -> Tensor:
        """Result of forward as [slice, view, u]."""
        raise NotImplementedError

    def image(self) -> Tensor:
        """Result of adjoint as [slice, y, x]."""
        raise NotImplementedError


class Astra(Rival):
    """ASTRA's CPU projectors, one slice after the other: that is what its interface offers."""

    kind = "linear"

    def __init__(self, geometry: ParallelBeam, n: int, slices: int) -> None:
        astra = _import("astra")
        kind, pitch, cells = self.kind, geometry.detector_spacing_mm, geometry.n_detector
        if isinstance(geometry, FanBeam):
            if kind == "linear":
                raise Absent("ASTRA has no linear fan projector on the CPU")
            kind += "_fanflat"
            sod, sdd = geometry.source_to_axis_mm, geometry.source_to_detector_mm
            scan = astra.create_proj_geom("fanflat", pitch, cells, geometry.angles, sod, sdd - sod)
        else:
            scan = astra.create_proj_geom("parallel", pitch, cells, geometry.angles)
        volume = astra.create_vol_geom(n, n)
        projector = astra.create_projector(kind, scan, volume)
        self.one_x, self.one_y = np.zeros((n, n), np.float32), np.zeros((geometry.n_views, cells), np.float32)
        x, y = astra.data2d.link("-vol", volume, self.one_x), astra.data2d.link("-sino", scan, self.one_y)
        self.run, self.algorithms = astra.algorithm.run, []
        for name, out in (("FP", "VolumeDataId"), ("BP", "ReconstructionDataId")):
            settings = astra.astra_dict(name)
            settings.update({"ProjectorId": projector, "ProjectionDataId": y, out: x})
            self.algorithms.append(astra.algorithm.create(settings))
        self.x, self.y = np.zeros((slices, n, n), np.float32), np.zeros((slices, *self.one_y.shape), np.float32)

    def load_image(self, x: Tensor) -> None:
        self.x[:] = x.numpy()

    def load_sinogram(self, y: Tensor) -> None:
        self.y[:] = y.numpy()

    def forward(self) -> object:
        for k in range(len(self.x)):
            self.one_x[:] = self.x[k]
            self.run(self.algorithms[0])
            self.y[k] = self.one_y
        return self.y

    def adjoint(self) -> object:
        for k in range(len(self.x)):
            self.one_y[:] = self.y[k]
            self.one_x[:] = 0
            self.run(self.algorithms[1])
            self.x[k] = self.one_x
        return self.x

    def sinogram(self) -> Tensor:
        return torch.from_numpy(self.y.copy())

    def image(self) -> Tensor:
        return torch.from_numpy(self.x.copy())


class AstraLinear(Astra):
    name = "ASTRA linear"


class AstraLine(Astra):
    name, kind = "ASTRA line", "line"


class Leap(Rival):
    """LEAP's separable footprints on the CPU; a batch of slices is its third axis."""

    name = "LEAP"

    def __init__(self, geometry: ParallelBeam, n: int, slices: int) -> None:
        folder = os.environ.get("RECON3D_LEAP")
        if not folder:
            raise Absent("RECON3D_LEAP is not set")
        if folder not in sys.path:
            sys.path.insert(0, folder)
        self.model = _import("leapctype").tomographicModels(lib_dir=folder)
        self.model.set_gpu(-1)
        views, cells, pitch = geometry.n_views, geometry.n_detector, geometry.detector_spacing_mm
        degrees = np.rad2deg(geometry.angles).astype(np.float32)
        scan = (views, slices, cells, 1.0, pitch, (slices - 1) / 2, (cells - 1) / 2, degrees)
        if isinstance(geometry, FanBeam):
            self.model.set_fanbeam(*scan, geometry.source_to_axis_mm, geometry.source_to_detector_mm)
        else:
            self.model.set_parallelbeam(*scan)
        self.model.set_volume(n, n, slices, 1.0, 1.0)
        self.x, self.y = np.zeros((slices, n, n), np.float32), np.zeros((views, slices, cells), np.float32)

    def load_image(self, x: Tensor) -> None:
        self.x[:] = x.numpy()

    def load_sinogram(self, y: Tensor) -> None:
        self.y[:] = y.transpose(0, 1).numpy()

    def forward(self) -> object:
        return self.model.project_cpu(self.y, self.x)

    def adjoint(self) -> object:
        return self.model.backproject_cpu(self.y, self.x)

    def sinogram(self) -> Tensor:
        return torch.from_numpy(self.y.transpose(1, 0, 2).copy())

    def image(self) -> Tensor:
        return torch.from_numpy(self.x.copy())


class ParallelProj(Rival):
    """parallelproj's C library with one line of response per ray and slice."""

    name, max_slices = "parallelproj", 1

    def __init__(self, geometry: ParallelBeam, n: int, slices: int) -> None:
        path = os.environ.get("RECON3D_PARALLELPROJ")
        if not path:
            raise Absent("RECON3D_PARALLELPROJ is not set")
        library = ctypes.CDLL(path)
        # version 2 says who it is, and takes a device and a block size more
        extra = [ctypes.c_int] * 2 if Path(path).name.count("2") else []
        signature = [ctypes.c_void_p] * 6 + [ctypes.c_size_t, ctypes.c_void_p, *extra]
        self.f, self.b, self.tail = library.joseph3d_fwd, library.joseph3d_back, (0, 64) if extra else ()
        self.f.argtypes = self.b.argtypes = signature
        self.f.restype = self.b.restype = None
        start, stop = _ray_ends(geometry, n)
        ends = [np.broadcast_to(e[..., None, ::-1], (*e.shape[:2], slices, 2)) for e in (start, stop)]
        z = np.broadcast_to(np.arange(slices)[:, None], (*start.shape[:2], slices, 1))
        self.ends = [np.ascontiguousarray(np.concatenate((e, z), -1), np.float32) for e in ends]
        self.origin, self.voxel = np.array([-(n - 1) / 2, -(n - 1) / 2, 0], np.float32), np.ones(3, np.float32)
        self.size = np.array([n, n, slices], np.int32)
        self.x, self.y = np.zeros((n, n, slices), np.float32), np.zeros((*start.shape[:2], slices), np.float32)
        self.resident_mb = sum(e.nbytes for e in self.ends) / 2**20

    def load_image(self, x: Tensor) -> None:
        self.x[:] = x.permute(1, 2, 0).numpy()

    def load_sinogram(self, y: Tensor) -> None:
        self.y[:] = y.permute(1, 2, 0).numpy()

    def _call(self, function: Callable[..., None], image_first: tuple[np.ndarray, np.ndarray]) -> None:
        def p(a: np.ndarray) -> int:
            return int(a.ctypes.data)

        x, y = image_first
        start, stop = self.ends
        function(p(start), p(stop), p(x), p(self.origin), p(self.voxel), p(y), y.size, p(self.size), *self.tail)

    def forward(self) -> object:
        return self._call(self.f, (self.x, self.y))

    def adjoint(self) -> object:
        self.x[:] = 0
        return self._call(self.b, (self.x, self.y))

    def sinogram(self) -> Tensor:
        return torch.from_numpy(self.y.transpose(2, 0, 1).copy())

    def image(self) -> Tensor:
        return torch.from_numpy(self.x.transpose(2, 0, 1).copy())


class SparseMatrix(Rival):
    """Our own Joseph weights as two explicit CSR matrices, applied by torch (MKL or cuSPARSE)."""

    name, device = "torch CSR", "cpu"

    def __init__(self, geometry: ParallelBeam, n: int, slices: int) -> None:
        taps = 2 * n * geometry.n_views * geometry.n_detector
        if taps * 40 > _free_bytes():  # both matrices and what building them takes
            raise Absent(f"{taps * 40 / 2**30:.0f} GiB for the matrices are not free")
        fan = isinstance(geometry, FanBeam)
        source = (geometry.source_to_axis_mm, geometry.source_to_detector_mm) if fan else (0.0, 0.0)
        cells, views = geometry.n_detector, geometry.n_views
        scan = (torch.from_numpy(geometry.angles), cells, geometry.detector_spacing_mm, geometry.detector_offset_mm)
        lines = _lines(*scan, *source, n, n, 1.0, 1.0)
        like = torch.zeros((), dtype=torch.float32)
        count, column, value = [], [], []
        for view in range(views):
            hits = torch.zeros(cells, dtype=torch.int64)
            parts: list[tuple[Tensor, Tensor, Tensor]] = []
            for rays, i0, w0, i1, w1 in _joseph_taps(lines, view, n, n, like):
                index, weight = torch.stack((i0, i1)).flatten(0, 1), torch.stack((w0, w1)).flatten(0, 1)
                parts.append((rays.expand(index.shape), index, weight))
            ray, index, weight = (torch.cat([p[k].flatten() for p in parts]) for k in range(3))
            keep = weight != 0
            order = (ray[keep] * (n * n) + index[keep]).argsort()
            hits += torch.bincount(ray[keep], minlength=cells)
            count.append(hits)
            column.append(index[keep][order].int())
            value.append(weight[keep][order])
        start = torch.cat((torch.zeros(1, dtype=torch.int64), torch.cat(count).cumsum(0))).int()
        size = (views * cells, n * n)
        warnings.filterwarnings("ignore", message="Sparse ")  # beta and unchecked: known
        matrix = torch.sparse_csr_tensor(start, torch.cat(column), torch.cat(value), size)
        import scipy.sparse

        rows = scipy.sparse.csr_matrix((matrix.values().numpy(), matrix.col_indices().numpy(), start.numpy()), size)
        turned = rows.T.tocsr()
        transpose = torch.sparse_csr_tensor(
            *(torch.from_numpy(a) for a in (turned.indptr, turned.indices, turned.data)), size[::-1]
        )
        self.matrix, self.transpose = matrix.to(self.device), transpose.to(self.device)
        self.resident_mb = sum(m.values().numel() * 8 + m.shape[0] * 4 for m in (matrix, transpose)) / 2**20
        self.shape = (views, cells), (n, n)

    def load_image(self, x: Tensor) -> None:
        self.x = x.flatten(1).T.contiguous().to(self.device)

    def load_sinogram(self, y: Tensor) -> None:
        self.y = y.flatten(1).T.contiguous().to(self.device)

    def forward(self) -> object:
        self.projected = self.matrix @ self.x
        return self.projected

    def adjoint(self) -> object:
        self.back = self.transpose @ self.y
        return self.back

    def sinogram(self) -> Tensor:
        return self.projected.T.reshape(-1, *self.shape[0]).cpu()

    def image(self) -> Tensor:
        return self.back.T.reshape(-1, *self.shape[1]).cpu()


class SparseMatrixCuda(SparseMatrix):
    device, devices = "cuda", ("cuda",)


class SkImage(Rival):
    """scikit-image: rotate and sum; its iradon without filter is the adjoint up to interpolation and a factor."""

    name, max_slices, centre_shift = "scikit-image", 1, 0.5

    def __init__(self, geometry: ParallelBeam, n: int, slices: int) -> None:
        if isinstance(geometry, FanBeam) or n != geometry.n_detector:
            raise Absent("parallel beam with one cell per pixel only")
        self.transform = _import("skimage.transform")
        self.degrees, self.n = np.rad2deg(geometry.angles), n

    def load_image(self, x: Tensor) -> None:
        self.x = x.numpy()

    def load_sinogram(self, y: Tensor) -> None:
        self.y = np.ascontiguousarray(y.transpose(1, 2).numpy())

    def forward(self) -> object:
        self.projected = [self.transform.radon(s, self.degrees, circle=True, preserve_range=True) for s in self.x]
        return self.projected

    def adjoint(self) -> object:
        self.back = [self.transform.iradon(s, self.degrees, filter_name=None, circle=True) for s in self.y]
        return self.back

    def sinogram(self) -> Tensor:
        return torch.from_numpy(np.stack(self.projected)).transpose(1, 2)

    def image(self) -> Tensor:
        return torch.from_numpy(np.stack(self.back)) * (2 * len(self.degrees) / math.pi)


class Rotation(Rival):
    """The usual torch one: rotate by grid_sample and sum, its adjoint by autograd's own kernel."""

    name, max_slices, device = "torch grid_sample", 1, "cpu"

    def __init__(self, geometry: ParallelBeam, n: int, slices: int) -> None:
        if isinstance(geometry, FanBeam) or n != geometry.n_detector:
            raise Absent("parallel beam with one cell per pixel only")
        angle = torch.from_numpy(geometry.angles).float().to(self.device)
        cos, sin, zero = angle.cos(), angle.sin(), torch.zeros_like(angle)
        turn = torch.stack((torch.stack((cos, -sin, zero), -1), torch.stack((sin, cos, zero), -1)), 1)
        make = torch.nn.functional.affine_grid
        self.grids = [make(t[None], [1, 1, n, n], align_corners=True) for t in turn]
        self.resident_mb = len(self.grids) * n * n * 8 / 2**20

    def load_image(self, x: Tensor) -> None:
        self.x = x[None].to(self.device)

    def load_sinogram(self, y: Tensor) -> None:
        self.y = y.to(self.device)

    def forward(self) -> object:
        sample = torch.nn.functional.grid_sample
        self.projected = torch.stack([sample(self.x, g, align_corners=True)[0].sum(1) for g in self.grids], 1)
        return self.projected

    def adjoint(self) -> object:
        n = self.y.shape[-1]
        self.back = self.y.new_zeros(1, len(self.y), n, n)
        for view, grid in enumerate(self.grids):
            spread = self.y[None, :, None, view].expand(1, -1, n, n).contiguous()
            step = torch.ops.aten.grid_sampler_2d_backward(spread, self.back, grid, 0, 0, True, [True, False])[0]
            self.back = self.back + step
        return self.back

    def sinogram(self) -> Tensor:
        return self.projected.cpu()

    def image(self) -> Tensor:
        return self.back[0].cpu()


class RotationCuda(Rotation):
    device, devices, max_slices = "cuda", ("cuda",), 1 << 30


class Definition(Rival):
    """Our own torch reference, which runs where no kernel does."""

    name, devices = "torch reference", ("cuda",)

    def __init__(self, geometry: ParallelBeam, n: int, slices: int) -> None:
        angles, *lengths = _scan(geometry)
        self.rest = (*lengths, 1.0, 1.0, 0)
        self.angles, self.cells, self.n = angles, geometry.n_detector, n

    def load_image(self, x: Tensor) -> None:
        self.x = x.cuda()

    def load_sinogram(self, y: Tensor) -> None:
        self.y = y.cuda()

    def forward(self) -> object:
        self.projected = _reference(self.x, self.angles, self.cells, *self.rest)
        return self.projected

    def adjoint(self) -> object:
        self.back = _reference_adjoint(self.y, self.angles, self.n, self.n, *self.rest)
        return self.back

    def sinogram(self) -> Tensor:
        return self.projected.cpu()

    def image(self) -> Tensor:
        return self.back.cpu()


class AstraCuda(Rival):
    """ASTRA's 3D parallel-beam GPU kernels on tensors that stay on the device."""

    name, devices = "ASTRA CUDA par3d", ("cuda",)

    def __init__(self, geometry: ParallelBeam, n: int, slices: int) -> None:
        astra = _import("astra")
        if not astra.use_cuda() or isinstance(geometry, FanBeam):
            raise Absent("needs a CUDA build of ASTRA and a parallel beam")
        volume = astra.create_vol_geom(n, n, slices)
        cells, pitch = geometry.n_detector, geometry.detector_spacing_mm
        scan = astra.create_proj_geom("parallel3d", 1.0, pitch, slices, cells, geometry.angles)
        self.x = torch.zeros(slices, n, n, device="cuda")
        self.y = torch.zeros(slices, geometry.n_views, cells, device="cuda")
        x, y = astra.data3d.link("-vol", volume, self.x), astra.data3d.link("-proj3d", scan, self.y)
        self.run, self.algorithms = astra.algorithm.run, []
        for name, out in (("FP3D_CUDA", "VolumeDataId"), ("BP3D_CUDA", "ReconstructionDataId")):
            settings = astra.astra_dict(name)
            settings.update({"ProjectionDataId": y, out: x})
            self.algorithms.append(astra.algorithm.create(settings))

    def load_image(self, x: Tensor) -> None:
        self.x.copy_(x)

    def load_sinogram(self, y: Tensor) -> None:
        self.y.copy_(y)

    def forward(self) -> object:
        return self.run(self.algorithms[0])

    def adjoint(self) -> object:
        return self.run(self.algorithms[1])

    def sinogram(self) -> Tensor:
        return self.y.cpu()

    def image(self) -> Tensor:
        return self.x.cpu()


class TorchRadon(Rival):
    """torch-radon or a fork of it."""

    name, devices = "torch-radon", ("cuda",)

    def __init__(self, geometry: ParallelBeam, n: int, slices: int) -> None:
        module = _import("torch_radon")
        if isinstance(geometry, FanBeam):
            raise Absent("timed for the parallel beam")
        build = getattr(module, "ParallelBeam", None)
        angles = geometry.angles.astype(np.float32)
        self.radon = build(geometry.n_detector, angles) if build else module.Radon(n, angles, geometry.n_detector)

    def load_image(self, x: Tensor) -> None:
        self.x = x.cuda()

    def load_sinogram(self, y: Tensor) -> None:
        self.y = y.cuda()

    def forward(self) -> object:
        self.projected = self.radon.forward(self.x)
        return self.projected

    def adjoint(self) -> object:
        self.back = self.radon.backward(self.y)
        return self.back

    def sinogram(self) -> Tensor:
        return self.projected.cpu()

    def image(self) -> Tensor:
        return self.back.cpu()


RIVALS: tuple[type[Rival], ...] = (
    AstraLinear, AstraLine, Leap, ParallelProj, SparseMatrix, SkImage, Rotation,
    Definition, SparseMatrixCuda, RotationCuda, AstraCuda, TorchRadon,
)  # fmt: skip


def _import(name: str) -> object:
    try:
        return importlib.import_module(name)
    except (ImportError, OSError) as error:
        raise Absent(str(error)) from error


def _free_bytes() -> int:
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") + _cached_bytes()


def _cached_bytes() -> int:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Cached"))
    except (OSError, StopIteration):
        return 0


def _ray_ends(geometry: ParallelBeam, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Two points (X, Y) of every ray, outside the image on either side, [view, u, 2]."""
    angle, s = geometry.angles[:, None], geometry.detector_mm()[None]
    along, across = (
        np.stack(np.broadcast_arrays(*p), -1) for p in ((-np.sin(angle), np.cos(angle)), (np.cos(angle), np.sin(angle)))
    )
    if isinstance(geometry, FanBeam):
        sod, sdd = geometry.source_to_axis_mm, geometry.source_to_detector_mm
        source = np.broadcast_to(sod * along, (*np.broadcast_shapes(angle.shape, s.shape), 2))
        cell = (sod - sdd) * along + s[..., None] * across
        return source, source + 1.2 * (cell - source)
    middle = s[..., None] * across
    return middle - 2 * n * along, middle + 2 * n * along

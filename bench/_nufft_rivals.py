"""Non-uniform FFTs that bench/nufft.py times beside ours, each at its best settings and behind the same few verbs.

finufft's wheel holds AVX2 code and FFTW: RECON3D_FINUFFT names a folder with a `finufft` package built for this machine
(-DFINUFFT_ARCH_FLAGS=native -DFINUFFT_USE_DUCC0=ON), and RECON3D_BART the `bart` program where it is not on the path.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import os
import shutil
import subprocess
import sys
import tempfile
import types
import warnings
from pathlib import Path

import numpy as np
import torch
from torch import Tensor


class Absent(RuntimeError):
    """The rival is not installed, or does not serve this case."""


class Rival:
    """A NUFFT with one trajectory and a batch of images: load and run (timed), read.

    `forward` and `adjoint` keep their result; `samples` and `image` give it scaled to the orthonormal convention by
    the factor the package documents.
    """

    name = ""
    devices: tuple[str, ...] = ("cpu",)
    max_batch = 1 << 30  # more is timed with so many transforms and scaled: it loops over them anyway
    max_points = 1 << 30
    scale = 1.0  # what the package's output is to be multiplied with, forward and adjoint

    def __init__(self, points: np.ndarray, shape: tuple[int, ...], x: Tensor, y: Tensor) -> None:
        """points [M, d] rad, axes as the image's; x [batch, *shape], y [batch, M] complex64, kept by the rival."""
        raise NotImplementedError

    def forward(self) -> object:
        """Samples of the images; this is timed."""
        raise NotImplementedError

    def adjoint(self) -> object:
        """Images of the samples; this is timed."""
        raise NotImplementedError

    def normal(self) -> object:
        """Adjoint of forward, by the package's own best means; this is timed."""
        raise Absent(f"{self.name} has no normal operator of its own")

    def read(self, result: object) -> Tensor:
        """What forward, adjoint or normal returned, flat over each transform, in float64 on the CPU."""
        values = result if isinstance(result, Tensor) else torch.from_numpy(np.asarray(result))
        return values.cpu().to(torch.complex128)


class Finufft(Rival):
    """finufft, planned once, all transforms in one call, FFTW by measurement; sigma as suits the accuracy."""

    eps, sigma, folder = 1e-3, 1.25, ""

    def __init__(self, points: np.ndarray, shape: tuple[int, ...], x: Tensor, y: Tensor) -> None:
        finufft = _native_finufft() if self.folder else _import("finufft")
        options = dict(n_trans=len(x), eps=self.eps, dtype="complex64", upsampfac=self.sigma)
        options.update(nthreads=torch.get_num_threads(), fftw=0, showwarn=0)
        self.to_samples = finufft.Plan(2, shape, isign=-1, **options)
        self.to_image = finufft.Plan(1, shape, isign=1, **options)
        axes = [np.ascontiguousarray(points[:, d], np.float32) for d in range(len(shape))]
        self.to_samples.setpts(*axes)
        self.to_image.setpts(*axes)
        squeeze = (lambda v: v) if len(x) > 1 else (lambda v: v[0])
        self.x, self.y = squeeze(x.numpy()), squeeze(y.numpy())
        self.out_x, self.out_y = np.empty_like(self.x), np.empty_like(self.y)
        self.scale = 1 / math.sqrt(math.prod(shape))

    def forward(self) -> object:
        return self.to_samples.execute(self.x, out=self.out_y)

    def adjoint(self) -> object:
        return self.to_image.execute(self.y, out=self.out_x)

    def normal(self) -> object:
        return self.to_image.execute(self.to_samples.execute(self.x, out=self.out_y), out=self.out_x)


class Finufft3(Finufft):
    name = "finufft 1e-3"


class Finufft4(Finufft):
    name, eps = "finufft 1e-4", 1e-4


class Finufft5(Finufft):
    name, eps, sigma = "finufft 1e-5", 1e-5, 2.0


class Native3(Finufft):
    name, folder = "finufft native 1e-3", "RECON3D_FINUFFT"


class Native4(Native3):
    name, eps = "finufft native 1e-4", 1e-4


class Native5(Native3):
    name, eps, sigma = "finufft native 1e-5", 1e-5, 2.0


class Ducc(Rival):
    """ducc0 with its plan kept; it chooses oversampling and kernel by cost."""

    name, eps = "ducc0 1e-3", 1e-3

    def __init__(self, points: np.ndarray, shape: tuple[int, ...], x: Tensor, y: Tensor) -> None:
        plan = _import("ducc0").nufft.plan
        options = dict(coord=points.astype(np.float32), grid_shape=shape, epsilon=self.eps)
        options.update(nthreads=torch.get_num_threads())
        self.to_samples, self.to_image = plan(nu2u=False, **options), plan(nu2u=True, **options)
        self.x, self.y = x.numpy(), y.numpy()
        self.out_x, self.out_y = np.empty_like(self.x), np.empty_like(self.y)
        self.scale = 1 / math.sqrt(math.prod(shape))

    def forward(self) -> object:
        return self.to_samples.u2nu(grid=self.x, forward=True, out=self.out_y)

    def adjoint(self) -> object:
        return self.to_image.nu2u(points=self.y, forward=False, out=self.out_x)

    def normal(self) -> object:
        samples = self.to_samples.u2nu(grid=self.x, forward=True, out=self.out_y)
        return self.to_image.nu2u(points=samples, forward=False, out=self.out_x)


class Ducc5(Ducc):
    name, eps = "ducc0 1e-5", 1e-5


class Mrpro(Rival):
    """mrpro's Fourier operator (finufft at 1e-6, oversampling 2: it lets nobody choose) and its Gram."""

    name, max_batch, max_points = "mrpro", 8, 400_000

    def __init__(self, points: np.ndarray, shape: tuple[int, ...], x: Tensor, y: Tensor) -> None:
        self.op = mrpro_fourier(points, shape)
        blank = (1,) * (3 - len(shape))
        self.x, self.y = x.reshape(1, len(x), *blank, *shape), y.reshape(1, len(y), 1, 1, -1)
        self.gram: object = None

    def forward(self) -> object:
        return self.op(self.x)[0]

    def adjoint(self) -> object:
        return self.op.adjoint(self.y)[0]

    def normal(self) -> object:
        self.gram = self.gram or self.op.gram
        return self.gram(self.x)[0]


class Sigpy(Rival):
    """sigpy as it comes: oversampling 1.25, width 4."""

    name, sigma, width, max_batch, max_points = "sigpy", 1.25, 4, 8, 400_000

    def __init__(self, points: np.ndarray, shape: tuple[int, ...], x: Tensor, y: Tensor) -> None:
        self.sigpy = _import("sigpy")
        self.points = (points / (2 * np.pi) * np.array(shape)).astype(np.float32)
        self.x, self.y = x.numpy(), y.numpy()
        self.options = dict(oversamp=self.sigma, width=self.width)

    def forward(self) -> object:
        return self.sigpy.nufft(self.x, self.points, **self.options)

    def adjoint(self) -> object:
        return self.sigpy.nufft_adjoint(self.y, self.points, oshape=self.x.shape, **self.options)


class SigpyFine(Sigpy):
    name, sigma, width = "sigpy sigma 2 width 6", 2.0, 6


class KbNufft(Rival):
    """torchkbnufft with its interpolation table."""

    name, devices, max_batch, max_points = "torchkbnufft", ("cpu", "cuda"), 8, 400_000

    def __init__(self, points: np.ndarray, shape: tuple[int, ...], x: Tensor, y: Tensor) -> None:
        package = _import("torchkbnufft")
        self.x, self.y = x[None], y[None]
        self.points = torch.from_numpy(np.ascontiguousarray(points.T, np.float32)).to(x.device)
        self.to_samples = package.KbNufft(shape).to(x.device)
        self.to_image = package.KbNufftAdjoint(shape).to(x.device)
        self.toeplitz, self.make = package.ToepNufft().to(x.device), package.calc_toeplitz_kernel
        self.shape, self.scale, self.kernel = shape, 1 / math.sqrt(math.prod(shape)), None

    def forward(self) -> object:
        return self.to_samples(self.x, self.points)[0]

    def adjoint(self) -> object:
        return self.to_image(self.y, self.points)[0]

    def normal(self) -> object:
        if self.kernel is None:
            self.kernel = self.make(self.points, self.shape)
        return self.toeplitz(self.x, self.kernel)[0]


class Bart(Rival):
    """BART's command line on files in memory: its time holds the start of the program and reading and writing."""

    name, max_batch, max_points = "BART", 8, 400_000

    def __init__(self, points: np.ndarray, shape: tuple[int, ...], x: Tensor, y: Tensor) -> None:
        program = os.environ.get("RECON3D_BART") or shutil.which("bart")
        if not program:
            raise Absent("no bart program")
        self.keep = tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None)
        self.folder, self.program, self.shape, self.batch = Path(self.keep.name), program, shape, len(x)
        coordinates = np.zeros((3, len(points), 1), np.complex64)
        coordinates[: len(shape), :, 0] = (points / (2 * np.pi) * np.array(shape)).T
        self._write("points", coordinates)
        images, samples = np.moveaxis(x.numpy(), 0, -1), np.moveaxis(y.numpy(), 0, -1)
        self._write("x", images.reshape(*shape, *(1,) * (3 - len(shape)), len(x)))
        self._write("y", samples.reshape(1, len(points), 1, len(y)))

    def _write(self, name: str, values: np.ndarray) -> None:
        sizes = [*values.shape, *[1] * (16 - values.ndim)]
        (self.folder / f"{name}.hdr").write_text("# Dimensions\n" + " ".join(map(str, sizes)) + "\n")
        values.astype(np.complex64).ravel(order="F").tofile(self.folder / f"{name}.cfl")

    def _bart(self, *arguments: str) -> None:
        # -P: without it, taps that leave the grid are dropped
        subprocess.run([self.program, "nufft", "-P", *arguments], cwd=self.folder, check=True, capture_output=True)

    def forward(self) -> object:
        self._bart("points", "x", "to_y")
        return "to_y"

    def adjoint(self) -> object:
        sizes = ":".join(map(str, (*self.shape, *(1,) * (3 - len(self.shape)))))
        self._bart("-a", "-d", sizes, "points", "y", "to_x")
        return "to_x"

    def read(self, result: object) -> Tensor:
        sizes = (-1, self.batch) if result == "to_y" else (*self.shape, self.batch)
        values = np.fromfile(self.folder / f"{result}.cfl", np.complex64).reshape(sizes, order="F")
        return super().read(np.ascontiguousarray(np.moveaxis(values, -1, 0)))


class Cufinufft(Rival):
    """cufinufft on tensors that stay on the device."""

    name, devices, eps, sigma, method = "cufinufft 1e-3", ("cuda",), 1e-3, 1.25, 0

    def __init__(self, points: np.ndarray, shape: tuple[int, ...], x: Tensor, y: Tensor) -> None:
        package = _import("cufinufft")
        options = dict(n_trans=len(x), eps=self.eps, dtype="complex64", upsampfac=self.sigma, gpu_method=self.method)
        try:
            self.to_samples = package.Plan(2, shape, isign=-1, **options)
            self.to_image = package.Plan(1, shape, isign=1, **options)
        except (RuntimeError, TypeError) as error:
            raise Absent(str(error)) from error
        axes = [torch.from_numpy(np.ascontiguousarray(points[:, d], np.float32)).cuda() for d in range(len(shape))]
        self.to_samples.setpts(*axes)
        self.to_image.setpts(*axes)
        self.x, self.y, self.out_x, self.out_y = x, y, torch.empty_like(x), torch.empty_like(y)
        self.scale = 1 / math.sqrt(math.prod(shape))

    def forward(self) -> object:
        return self.to_samples.execute(self.x, out=self.out_y)

    def adjoint(self) -> object:
        return self.to_image.execute(self.y, out=self.out_x)

    def normal(self) -> object:
        return self.to_image.execute(self.to_samples.execute(self.x, out=self.out_y), out=self.out_x)


class Cufinufft2(Cufinufft):
    name, sigma = "cufinufft 1e-3 sigma 2", 2.0


class CufinufftPoints(Cufinufft):
    name, method = "cufinufft 1e-3 by points", 1


class CufinufftOutput(Cufinufft):
    name, method = "cufinufft 1e-3 output driven", 3


class Plain(Rival):
    """The Toeplitz product as one writes it with torch: pad, FFT, multiply, inverse FFT, crop."""

    name, devices, package = "torch FFT Toeplitz", ("cpu", "cuda"), "torch"

    def __init__(self, points: np.ndarray, shape: tuple[int, ...], x: Tensor, y: Tensor) -> None:
        self.x, self.shape, self.kernel = x, shape, toeplitz_kernel(points, shape).float().to(x.device)
        self.axes = tuple(range(1, x.ndim))
        self.crop = (slice(None), *(slice(0, n) for n in shape))

    def normal(self) -> object:
        spectrum = torch.fft.fftn(self.x, s=self.kernel.shape, dim=self.axes).mul_(self.kernel)
        return torch.fft.ifftn(spectrum, dim=self.axes)[self.crop]


class PlainScipy(Plain):
    """The same with scipy, whose times on the CPU are steadier."""

    name, devices = "scipy FFT Toeplitz", ("cpu",)

    def __init__(self, points: np.ndarray, shape: tuple[int, ...], x: Tensor, y: Tensor) -> None:
        super().__init__(points, shape, x, y)
        self.fft, self.workers = _import("scipy.fft"), torch.get_num_threads()

    def normal(self) -> object:
        work = dict(axes=self.axes, workers=self.workers)
        spectrum = self.fft.fftn(self.x.numpy(), s=self.kernel.shape, **work)
        spectrum *= self.kernel.numpy()
        return self.fft.ifftn(spectrum, overwrite_x=True, **work)[self.crop]


PAIRS: tuple[type[Rival], ...] = (
    Finufft3, Finufft4, Finufft5, Native3, Native4, Native5, Ducc, Ducc5, Mrpro, Sigpy, SigpyFine, KbNufft, Bart,
    Cufinufft, Cufinufft2, CufinufftPoints, CufinufftOutput,
)  # fmt: skip
NORMALS: tuple[type[Rival], ...] = (Finufft3, Native3, Ducc, Mrpro, KbNufft, Plain, PlainScipy, Cufinufft)


def toeplitz_kernel(points: np.ndarray, shape: tuple[int, ...], device: str = "cpu") -> Tensor:
    """Spectrum of the point spread function on the doubled grid, float64, orthonormal scaling included.

    By finufft in float64 at 1e-12 where it is at hand, else (two axes only) by the definition.
    """
    double = tuple(2 * n for n in shape)
    try:
        finufft = _import("finufft")
    except Absent:
        if len(shape) != 2:
            raise
        psf = 0
        for part in torch.from_numpy(points).to(device).split(16384):
            y, x = (waves(part[:, d], n).conj() for d, n in enumerate(double))
            psf = psf + y.T @ x
        psf = psf.cpu().numpy()
    else:
        plan = finufft.Plan(1, double, eps=1e-12, isign=1, dtype="complex128", nthreads=torch.get_num_threads())
        plan.setpts(*(np.ascontiguousarray(points[:, d], np.float64) for d in range(len(shape))))
        psf = plan.execute(np.ones(len(points), np.complex128))
    for d in range(len(shape)):  # the lag -n never meets an image of n pixels
        psf[(slice(None),) * d + (0,)] = 0
    return torch.from_numpy(np.fft.fftn(np.fft.ifftshift(psf)).real / math.prod(shape))


def waves(k: Tensor, n: int) -> Tensor:
    """exp(-i k m) for the pixels m = -n//2 ... of an axis, [points, n] complex128."""
    phase = torch.outer(k, torch.arange(n, device=k.device, dtype=torch.float64) - n // 2).neg_()
    return torch.polar(torch.ones((), dtype=torch.float64, device=k.device), phase)


def mrpro_fourier(points: np.ndarray, shape: tuple[int, ...]) -> object:
    """mrpro's non-uniform Fourier operator for points [M, d] rad."""
    mrpro = import_mrpro()
    index = (points / (2 * np.pi) * np.array(shape)).astype(np.float32)
    k = [torch.from_numpy(index[:, d].copy()).reshape(1, 1, 1, 1, -1) for d in range(len(shape))]
    zero = torch.zeros(1, 1, 1, 1, 1)
    trajectory = mrpro.data.KTrajectory(kz=k[0] if len(shape) == 3 else zero, ky=k[-2], kx=k[-1])
    return mrpro.operators.NonUniformFastFourierOp(["z", "y", "x"][-len(shape) :], shape, shape, trajectory)


def import_mrpro() -> object:
    """mrpro; where torchvision is missing, an empty stand-in serves, for only its phantoms look inside."""
    names = ("torchvision", "torchvision.transforms", "torchvision.transforms.functional")
    if names[0] not in sys.modules and importlib.util.find_spec(names[0]) is None:
        for name in names:
            sys.modules.setdefault(name, types.ModuleType(name))
        sys.modules[names[0]].transforms = sys.modules[names[1]]
        sys.modules[names[1]].functional = sys.modules[names[2]]
    for part in ("data", "operators", "algorithms.optimizers"):
        _import(f"mrpro.{part}")
    return sys.modules["mrpro"]


def _native_finufft() -> object:
    """The finufft package below RECON3D_FINUFFT, beside the one of the interpreter."""
    folder = os.environ.get("RECON3D_FINUFFT")
    if not folder:
        raise Absent("RECON3D_FINUFFT is not set")
    if not (Path(folder) / "finufft" / "__init__.py").is_file():
        raise Absent(f"no finufft package below {folder}")

    def take() -> dict[str, types.ModuleType]:
        return {k: sys.modules.pop(k) for k in list(sys.modules) if k.split(".")[0] == "finufft"}

    if "recon3d_bench_finufft" not in sys.modules:
        stock = take()
        sys.path.insert(0, folder)
        try:
            package = importlib.import_module("finufft")
        except (ImportError, OSError) as error:
            raise Absent(str(error)) from error
        finally:
            sys.path.remove(folder)
            take()
            sys.modules.update(stock)
        sys.modules["recon3d_bench_finufft"] = package
    return sys.modules["recon3d_bench_finufft"]


def _import(name: str) -> object:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module(name)
    except (ImportError, OSError) as error:
        raise Absent(str(error)) from error

"""Multi-coil MRI operators that bench/sense.py times beside ours, each as its package is meant to be used."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from bench._nufft_rivals import Absent, _import, _native_finufft, import_mrpro, mrpro_fourier

Thunk = Callable[[], object]


@dataclass(frozen=True)
class Cartesian:
    """A^H A of Cartesian SENSE: x [z, y, x], maps [z, coil, y, x], mask [ky, kx] or [kx] with k = 0 in the middle."""

    x: Tensor
    maps: Tensor
    mask: Tensor


@dataclass(frozen=True)
class Radial:
    """The same for one trajectory, or a CG run on it: maps of one slice [coil, y, x] serve all."""

    x: Tensor  # [z, y, x]
    maps: Tensor  # [coil, y, x]
    y: Tensor  # [z, coil, M]
    points: np.ndarray  # [M, 2] rad
    kernel: Tensor  # [2 ny, 2 nx], see _nufft_rivals.toeplitz_kernel
    regularisation: float
    iterations: int


def image(result: object) -> Tensor:
    """What a rival returned, as complex128."""
    values = result if isinstance(result, Tensor) else torch.from_numpy(np.asarray(result))
    return values.cpu().to(torch.complex128)


# ---- Cartesian A^H A ------------------------------------------------------------------------------------------------


def textbook(c: Cartesian) -> Thunk:
    """Centred orthonormal FFTs of the whole stack, written out as most packages write them."""
    axes = (-2, -1)

    def centred(f: Callable[..., Tensor], v: Tensor) -> Tensor:
        return torch.fft.fftshift(f(torch.fft.ifftshift(v, dim=axes), norm="ortho"), dim=axes)

    def run() -> Tensor:
        k = centred(torch.fft.fft2, c.maps * c.x[:, None]) * c.mask
        return (c.maps.conj() * centred(torch.fft.ifft2, k)).sum(1)

    return run


def loop(c: Cartesian) -> Thunk:
    """The best we can write in torch: no shifts, slices in turn so that they stay in the cache, one FFT where the
    mask is the same along ky."""
    shifted = torch.fft.ifftshift(c.mask)
    fft, ifft = (torch.fft.fft, torch.fft.ifft) if c.mask.ndim == 1 else (torch.fft.fft2, torch.fft.ifft2)
    out = torch.empty_like(c.x)

    def run() -> Tensor:
        for i, (x, maps) in enumerate(zip(c.x, c.maps, strict=True)):
            out[i] = (maps.conj() * ifft(fft(maps * x).mul_(shifted))).sum(0)
        return out

    return run


def batch(c: Cartesian) -> Thunk:
    """torch without shifts, the stack at once: what a GPU wants."""
    shifted = torch.fft.ifftshift(c.mask)
    fft, ifft = (torch.fft.fft, torch.fft.ifft) if c.mask.ndim == 1 else (torch.fft.fft2, torch.fft.ifft2)

    def run() -> Tensor:
        return (c.maps.conj() * ifft(fft(c.maps * c.x[:, None]).mul_(shifted))).sum(1)

    return run


def sigpy(c: Cartesian) -> Thunk:
    """sigpy.mri.linop.Sense and its normal operator, slice by slice as its interface wants."""
    linop = _import("sigpy.mri").linop
    weights = np.broadcast_to(c.mask.numpy(), c.maps.shape[1:]).copy()
    normals = [linop.Sense(maps.numpy(), weights=weights).N for maps in c.maps]
    x = c.x.numpy()
    return lambda: np.stack([normal(v) for normal, v in zip(normals, x, strict=True)])


def mrpro(c: Cartesian) -> Thunk:
    """mrpro's FastFourierOp between coil maps."""
    op = import_mrpro().operators.FastFourierOp(dim=(-2, -1))
    x, maps = c.x[:, None, None], c.maps[:, :, None]

    def run() -> Tensor:
        (k,) = op(x * maps)
        (images,) = op.adjoint(k * c.mask)
        return (images * maps.conj()).sum(1)

    return run


def deepinv(c: Cartesian) -> Thunk:
    """deepinv's MultiCoilMRI; where it does not import, "textbook" is its formulation."""
    physics = _import("deepinv.physics")
    op = physics.MultiCoilMRI(
        mask=c.mask.expand(1, 1, *c.maps.shape[-2:]).clone(), coil_maps=c.maps, img_size=(2, *c.maps.shape[-2:])
    )
    x = torch.view_as_real(c.x).permute(0, 3, 1, 2).contiguous()
    return lambda: torch.view_as_complex(op.A_adjoint(op.A(x)).permute(0, 2, 3, 1).contiguous())


CARTESIAN: dict[str, Callable[[Cartesian], Thunk]] = {
    "torch, best loop": loop, "sigpy": sigpy, "mrpro": mrpro, "torch, textbook": textbook, "deepinv": deepinv,
}  # fmt: skip


# ---- radial A^H A ---------------------------------------------------------------------------------------------------


def toeplitz_loop(r: Radial) -> Thunk:
    """Slices in turn: maps, padded FFT, kernel, inverse, crop, conjugate maps."""
    ny, nx = r.maps.shape[-2:]
    kernel, out, conj = r.kernel.float().to(r.x.device), torch.empty_like(r.x), r.maps.conj().resolve_conj()

    def run() -> Tensor:
        for i, x in enumerate(r.x):
            spectrum = torch.fft.fft2(r.maps * x, s=kernel.shape).mul_(kernel)
            out[i] = (conj * torch.fft.ifft2(spectrum)[:, :ny, :nx]).sum(0)
        return out

    return run


def mrpro_gram(r: Radial) -> Thunk:
    """mrpro: coil maps, the Gram of its Fourier operator, conjugate maps."""
    operators = import_mrpro().operators
    coils = operators.SensitivityOp(r.maps[None, :, None])
    gram = coils.H @ mrpro_fourier(r.points, tuple(r.maps.shape[-2:])).gram @ coils
    x = r.x[:, None, None]
    return lambda: gram(x)[0].reshape(r.x.shape)


def finufft_normal(r: Radial, native: bool = False) -> Thunk:
    """Forward and adjoint by finufft at 1e-3 between maps, slice by slice."""
    normal, _ = _finufft_sense(r, native)
    x, out = r.x.numpy(), np.empty(r.x.shape, np.complex64)

    def run() -> np.ndarray:
        for i, v in enumerate(x):
            out[i] = normal(v)
        return out

    return run


RADIAL: dict[str, Callable[[Radial], Thunk]] = {
    "torch, best loop": toeplitz_loop, "mrpro": mrpro_gram, "finufft 1e-3": finufft_normal,
    "finufft native 1e-3": partial(finufft_normal, native=True),
}  # fmt: skip


# ---- CG-SENSE, everything included ----------------------------------------------------------------------------------


def mrpro_cg(r: Radial) -> object:
    """mrpro's cg on its Gram."""
    package = import_mrpro()
    operators, cg = package.operators, package.algorithms.optimizers.cg
    fourier = mrpro_fourier(r.points, tuple(r.maps.shape[-2:]))
    coils = operators.SensitivityOp(r.maps[None, :, None])
    rhs = (coils.H @ fourier.H)(r.y[:, :, None, None])[0]
    op = coils.H @ fourier.gram @ coils + r.regularisation * operators.IdentityOp()
    start = torch.zeros_like(rhs)
    return cg(op, rhs, initial_value=start, max_iterations=r.iterations, tolerance=0.0)[0].reshape(r.x.shape)


def sigpy_cg(r: Radial) -> object:
    """sigpy's SenseRecon, slice by slice."""
    app = _import("sigpy.mri").app
    index = (r.points / (2 * np.pi) * np.array(r.maps.shape[-2:])).astype(np.float32)
    maps = r.maps.numpy()
    return np.stack([
        app.SenseRecon(
            y, maps, coord=index, lamda=r.regularisation, max_iter=r.iterations, show_pbar=False
        ).run()
        for y in r.y.numpy()
    ])  # fmt: skip


def finufft_cg(r: Radial, native: bool = False) -> object:
    """finufft at 1e-3 in a plain CG, slice by slice."""
    normal, adjoint = _finufft_sense(r, native)
    return np.stack([conjugate_gradients(normal, adjoint(y), r) for y in r.y.numpy()])


CG: dict[str, Callable[[Radial], object]] = {
    "mrpro": mrpro_cg, "sigpy": sigpy_cg, "finufft 1e-3": finufft_cg,
    "finufft native 1e-3": partial(finufft_cg, native=True),
}  # fmt: skip
CG_SLICES = {"sigpy": 1, "finufft 1e-3": 2, "finufft native 1e-3": 2}  # timed and scaled: they go slice by slice


def conjugate_gradients(
    normal: Callable[[np.ndarray], np.ndarray], rhs: np.ndarray, r: Radial, iterations: int | None = None
) -> np.ndarray:
    """r.iterations steps from zero on (normal + regularisation) x = rhs."""
    x, residual = np.zeros_like(rhs), rhs.copy()
    p, rho = residual.copy(), np.vdot(rhs, rhs).real
    for _ in range(iterations or r.iterations):
        q = normal(p) + r.regularisation * p
        alpha = rho / np.vdot(p, q).real
        x, residual = x + alpha * p, residual - alpha * q
        rho, before = np.vdot(residual, residual).real, rho
        p = residual + (rho / before) * p
    return x


def _finufft_sense(
    r: Radial, native: bool
) -> tuple[Callable[[np.ndarray], np.ndarray], Callable[[np.ndarray], np.ndarray]]:
    finufft = _native_finufft() if native else _import("finufft")
    coils, *shape = r.maps.shape
    options = dict(n_trans=coils, eps=1e-3, dtype="complex64", upsampfac=1.25, showwarn=0)
    options.update(nthreads=torch.get_num_threads(), fftw=0)
    to_samples = finufft.Plan(2, tuple(shape), isign=-1, **options)
    to_image = finufft.Plan(1, tuple(shape), isign=1, **options)
    axes = [np.ascontiguousarray(r.points[:, d], np.float32) for d in range(2)]
    to_samples.setpts(*axes)
    to_image.setpts(*axes)
    maps = r.maps.numpy()
    conj, scale = maps.conj(), np.float32(1 / math.sqrt(math.prod(shape)))

    def normal(x: np.ndarray) -> np.ndarray:
        return (conj * to_image.execute(to_samples.execute(maps * x))).sum(0) * scale**2

    def adjoint(y: np.ndarray) -> np.ndarray:
        return (conj * to_image.execute(np.ascontiguousarray(y))).sum(0) * scale

    return normal, adjoint


__all__ = ["CARTESIAN", "CG", "CG_SLICES", "RADIAL", "Absent", "Cartesian", "Radial", "conjugate_gradients", "image"]

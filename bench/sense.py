"""sense: A^H A of multi-coil MRI, Cartesian and radial, CG-SENSE and coil calibration, against MRI packages.

One thread. Errors are relative L2 distances from complex128; of CG runs, whose iterates drift apart in float32 whatever
the code, the difference of the objective from that of the complex128 iterate, relative to the fall from zero. The
slices of a CG run hold the same data, so that one step length for all and one per slice are the same method.
"""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from bench import _sense_rivals as rivals
from bench._common import Gate, Row, judge, measure, pair
from bench._goals import goals, report
from bench._nufft_rivals import toeplitz_kernel
from bench._sense_rivals import Absent, Cartesian, Radial, Thunk, image
from recon3d.geometry.mri import radial
from recon3d.operators.espirit import espirit
from recon3d.ops import cg
from recon3d.ops.nufft import nufft, nufft_adjoint, nufft_plan, nufft_toeplitz_kernel
from recon3d.ops.sense import pack_maps, sense_normal, sense_toeplitz
from recon3d.testing import phantoms

CARTESIAN, TOEPLITZ, CG = "16 coils x 32 slices x 320²", "8 coils x 8 slices x 320², 402 spokes", "CG-SENSE, 10 steps"
GOALS = [
    *goals(f"{CARTESIAN}, 1D mask", "A^H A", {"sigpy": (8, 12), "torch, textbook": (30, 50), "mrpro": (30, 50)}),
    *goals(f"{CARTESIAN}, 2D mask", "A^H A", {"sigpy": (4, 5), "torch, best loop": (2, 3)}),
    *goals(f"{TOEPLITZ}", "A^H A, Toeplitz", {"torch, best loop": (3, 5), "mrpro": (3, 5), "finufft 1e-3": (10, 16)}),
    *goals(f"{TOEPLITZ}", CG, {"mrpro": (6, 10), "sigpy": (30, 49)}),
    *goals("16 coils x 64 slices x 320², 1D mask", "A^H A", {"torch, at once": (5, 10)}),
    *goals("16 coils x 64 slices x 320², 402 spokes", "A^H A, Toeplitz", {"torch, best loop": (2.4, 4)}),
]


def run(quick: bool, device: str = "cpu") -> list[Row]:
    """Rows for Cartesian A^H A with masks along one axis and two, Toeplitz A^H A, CG-SENSE, coil calibration."""
    if device == "cuda":
        coils, slices, n = (8, 8, 192) if quick else (16, 64, 320)
        rows = [*_cartesian(coils, slices, n, 1, device), *_cartesian(coils, slices, n, 2, device)]
        return rows + _radial(coils, slices, n, 402, device)
    coils, slices, n = (8, 4, 192) if quick else (16, 32, 320)
    rows = [*_cartesian(coils, slices, n, 1, device), *_cartesian(coils, slices, n, 2, device)]
    rows += _radial(8, 2 if quick else 8, n, 241 if quick else 402, device)
    return rows + _calibration(*((4, 128) if quick else (8, 256)))


def summary(rows: Sequence[Row]) -> str:
    """One line per goal: what it asks, what was measured, whether it is met."""
    return report(rows, GOALS)


def coil_maps(coils: int, n: int) -> Tensor:
    """Coils around the image, sensitivity falling with distance and turning in phase; sum of squares one."""
    axis = torch.linspace(-1, 1, n, dtype=torch.float64)
    at = 2 * math.pi * torch.arange(coils, dtype=torch.float64) / coils
    dy, dx = axis[:, None] - 1.5 * at.sin()[:, None, None], axis - 1.5 * at.cos()[:, None, None]
    maps = torch.polar(1 / (dy**2 + dx**2).sqrt(), torch.atan2(dy, dx) + at[:, None, None])
    return (maps / maps.abs().square().sum(0).sqrt()).to(torch.complex64)


def _cartesian(coils: int, slices: int, n: int, mask_axes: int, device: str) -> list[Row]:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(slices, n, n, generator=g, dtype=torch.complex64)
    one = coil_maps(coils, n)
    shape = (n,) * mask_axes
    mask = (torch.rand(shape, generator=g) < 0.22).float()
    mask[(slice(n // 2 - n // 25, n // 2 + n // 25),) * mask_axes] = 1.0
    words = f"{coils} coils x {slices} slices x {n}², {mask_axes}D mask"
    wide = Cartesian(x[[0, -1]].to(torch.complex128), one.to(torch.complex128).expand(2, -1, -1, -1), mask.double())
    truth = rivals.textbook(wide)()
    case = Cartesian(x.to(device), one.expand(slices, -1, -1, -1).contiguous().to(device), mask.to(device))
    packed = pack_maps(case.maps)
    theirs = {"torch, at once": rivals.batch, **rivals.CARTESIAN}
    if device == "cuda":
        theirs = {k: theirs[k] for k in ("torch, at once", "torch, textbook")}
    else:
        del theirs["torch, at once"]  # fresh pages make it slower than the loop
    ours = {"A^H A": lambda: sense_normal(case.x, packed, case.mask)}
    made = _make(words, theirs, case)
    return _rows(words, ours, made, lambda v: _distance(image(v).reshape(x.shape)[[0, -1]], truth), 2e-6, 3, device)


def _radial(coils: int, slices: int, n: int, spokes: int, device: str) -> list[Row]:
    g = torch.Generator().manual_seed(0)
    points = radial(spokes, 2 * n, (n, n)).points.float().double().clamp(-math.pi, math.pi)
    maps = coil_maps(coils, n)
    head = torch.from_numpy(phantoms.rasterise(phantoms.shepp_logan(0.45 * n), (n, n), (1.0, 1.0)))
    clean = nufft(maps.to(torch.complex128) * head, nufft_plan(points, (n, n), eps=1e-9))
    noise = torch.randn(clean.shape, generator=g, dtype=clean.dtype)
    y = (clean + 1e-3 * clean.abs().max() * noise).to(torch.complex64)
    x = torch.randn(slices, n, n, generator=g, dtype=torch.complex64)
    kernel = toeplitz_kernel(points.numpy(), (n, n), device)
    case = Radial(
        x.to(device), maps.to(device), y.expand(slices, -1, -1).contiguous().to(device), points.numpy(), kernel,
        regularisation=1.0, iterations=10,
    )  # fmt: skip
    words = f"{coils} coils x {slices} slices x {n}², {spokes} spokes"
    wide_maps, wide_kernel = maps.to(torch.complex128).numpy(), kernel.numpy()

    def exact(v: np.ndarray) -> np.ndarray:
        spectrum = np.fft.fft2(wide_maps * v, s=wide_kernel.shape) * wide_kernel
        return (wide_maps.conj() * np.fft.ifft2(spectrum)[:, :n, :n]).sum(0)

    truth = torch.from_numpy(exact(x[0].to(torch.complex128).numpy()))[None]
    packed = pack_maps(case.maps.expand(slices, -1, -1, -1))
    ours_kernel = nufft_toeplitz_kernel(points, (n, n)).to(device)
    ours: dict[str, Thunk] = {"A^H A, Toeplitz": lambda: sense_toeplitz(case.x, packed, ours_kernel)}
    theirs = {k: v for k, v in rivals.RADIAL.items() if device == "cpu" or k.startswith("torch")}
    made = _make(words, theirs, case)
    rows = _rows(words, ours, made, lambda v: _distance(image(v).reshape(x.shape)[:1], truth), 1e-5, 3, device)
    if device == "cuda":
        return rows

    wide_y = y.to(torch.complex128)
    images = nufft_adjoint(wide_y, nufft_plan(points, (n, n), eps=1e-9))
    rhs = (maps.to(torch.complex128).conj() * images).sum(0).numpy()

    def objective(v: np.ndarray) -> float:
        q = exact(v) + case.regularisation * v
        return float(0.5 * np.vdot(v, q).real - np.vdot(v, rhs).real)

    best = objective(rivals.conjugate_gradients(exact, rhs, case))

    def excess(v: object) -> float:
        return abs(objective(image(v).reshape(-1, n, n)[0].numpy()) - best) / abs(best)

    fresh = itertools.count(1)
    mine: dict[str, Thunk] = {"CG-SENSE, 10 steps": lambda: _cg(case, points * (1 - 1e-12 * next(fresh)))}
    part = {k: rivals.CG_SLICES.get(k, slices) for k in rivals.CG}
    made, scale = {}, {}
    for name, solve in rivals.CG.items():
        count = min(part[name], slices)
        label = name if count == slices else f"{name}, {count} of {slices}"
        scale[label] = slices / count
        some = Radial(x[:count], maps, case.y[:count], case.points, kernel, case.regularisation, case.iterations)
        made[label] = partial(solve, some)
    return rows + _rows(words, mine, made, excess, 1e-3, 2, device, scale)


def _cg(r: Radial, points: Tensor) -> Tensor:
    """Our CG-SENSE from the points on: plan, right-hand side, Toeplitz kernel, steps with one length per slice."""
    shape = tuple(r.maps.shape[-2:])
    plan = nufft_plan(points, shape, eps=1e-3)
    kernel = nufft_toeplitz_kernel(plan, shape)
    maps = pack_maps(r.maps.expand(len(r.y), -1, -1, -1))
    rhs = torch.stack([(r.maps.conj() * nufft_adjoint(y, plan)).sum(0) for y in r.y])

    def apply(v: Tensor) -> Tensor:
        return sense_toeplitz(v, maps, kernel).add_(v, alpha=r.regularisation)

    return cg.solve(apply, rhs, iterations=r.iterations, per_slice=True)


def _calibration(coils: int, n: int) -> list[Row]:
    """ESPIRiT maps of a phantom; error: 1 - |correlation| with the true maps, worst over the middle of the image."""
    maps = coil_maps(coils, n)
    head = torch.from_numpy(phantoms.rasterise(phantoms.shepp_logan(0.45 * n), (n, n), (1.0, 1.0))).float()
    axes = (-2, -1)
    k = torch.fft.fftshift(torch.fft.fft2(torch.fft.ifftshift(maps * head, dim=axes), norm="ortho"), dim=axes)
    k = k + 1e-4 * k.abs().max() * torch.randn(k.shape, generator=torch.Generator().manual_seed(0), dtype=k.dtype)
    inside = (slice(None), slice(n // 4, -n // 4), slice(n // 4, -n // 4))

    def error(v: object) -> float:
        got, want = image(v).reshape(maps.shape)[inside], maps[inside].to(torch.complex128)
        return float(1 - ((got.conj() * want).sum(0).abs() / (got.norm(dim=0) * want.norm(dim=0))).min())

    def sigpy() -> object:
        app = rivals._import("sigpy.mri").app
        return app.EspiritCalib(k.numpy(), calib_width=24, show_pbar=False).run()

    theirs: dict[str, Thunk] = {"sigpy": sigpy}
    words = f"{coils} coils x {n}²"
    return _rows(words, {"ESPIRiT": lambda: espirit(k[None], calibration=24)}, theirs, error, 1e-2, 2, "cpu")


def _make(words: str, theirs: Mapping[str, Callable[..., Thunk]], case: object) -> dict[str, Thunk]:
    made = {}
    for name, build in theirs.items():
        try:
            made[name] = build(case)
        except Absent as reason:
            print(f"{words}: without {name} ({reason})", file=sys.stderr)
    return made


def _rows(
    words: str,
    ours: Mapping[str, Thunk],
    theirs: Mapping[str, Thunk],
    error: Callable[[object], float],
    limit: float,
    rounds: int,
    device: str,
    scale: Mapping[str, float] | None = None,
) -> list[Row]:
    """Ours (direction -> call) beside every rival; `scale`: rivals that do a part, and what to multiply them with."""
    errors = {k: error(f()) for k, f in ours.items()}
    judge(f"sense, {words}", [Gate(f"error of {k}", v, limit) for k, v in errors.items()])
    ready = {}
    for name, f in theirs.items():
        try:
            errors[name], ready[name] = error(f()), f
        except Absent as reason:
            print(f"{words}: without {name} ({reason})", file=sys.stderr)
    found = measure({**ours, **ready}, errors=errors, rounds=rounds, device=device, warm=True, slow_s=1.0)
    return [
        pair("sense", words, way, found[way], name, found[name].times((scale or {}).get(name, 1.0)), device)
        for way, name in itertools.product(ours, ready)
    ]


def _distance(got: Tensor, truth: Tensor) -> float:
    return float((got - truth).norm() / truth.norm())

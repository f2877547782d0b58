"""Analytic phantoms: sums of ellipses in millimetres, rasterised by area, integrated exactly along rays and in k-space.

Coordinates are the image's: X to the right, Y down the rows, both zero at the rotation axis. The Shepp-Logan head is
the version with raised contrast (Toft, The Radon Transform, 1996, appendix B), drawn upright.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from recon3d.geometry import FanBeam, ScanGeometry, Trajectory

__all__ = ["Ellipse", "coil_maps", "kspace", "line_integrals", "rasterise", "shepp_logan", "smooth_phase"]

# value, half axes, centre, turn in degrees; in units of the head's circle, Y up
_SHEPP_LOGAN = (
    (1.0, 0.69, 0.92, 0.0, 0.0, 0.0),
    (-0.8, 0.6624, 0.8740, 0.0, -0.0184, 0.0),
    (-0.2, 0.11, 0.31, 0.22, 0.0, -18.0),
    (-0.2, 0.16, 0.41, -0.22, 0.0, 18.0),
    (0.1, 0.21, 0.25, 0.0, 0.35, 0.0),
    (0.1, 0.046, 0.046, 0.0, 0.1, 0.0),
    (0.1, 0.046, 0.046, 0.0, -0.1, 0.0),
    (0.1, 0.046, 0.023, -0.08, -0.605, 0.0),
    (0.1, 0.023, 0.023, 0.0, -0.606, 0.0),
    (0.1, 0.023, 0.046, 0.06, -0.605, 0.0),
)


@dataclass(frozen=True)
class Ellipse:
    """A filled ellipse.

    Attributes:
        value: added inside, any unit (1/mm for attenuation).
        a_mm: half axis along X before turning.
        b_mm: half axis along Y before turning.
        x_mm: centre.
        y_mm: centre, down the rows.
        turn_rad: turn from X towards Y.
    """

    value: float
    a_mm: float
    b_mm: float
    x_mm: float = 0.0
    y_mm: float = 0.0
    turn_rad: float = 0.0

    def _unit(self, x: NDArray[np.float64], y: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        # the linear part of the map that takes the ellipse to the unit disc
        c, s = math.cos(self.turn_rad), math.sin(self.turn_rad)
        return (c * x + s * y) / self.a_mm, (c * y - s * x) / self.b_mm


def shepp_logan(radius_mm: float, scale: float = 1.0) -> list[Ellipse]:
    """The Shepp-Logan head inside a circle of the given radius.

    Args:
        radius_mm: half the field the unit square of the definition maps to; the skull reaches 0.92 of it.
        scale: value of the skull (soft tissue is 0.2 of it).

    >>> shepp_logan(100.0)[0].b_mm
    92.0
    """
    return [
        Ellipse(v * scale, a * radius_mm, b * radius_mm, x * radius_mm, -y * radius_mm, -math.radians(turn))
        for v, a, b, x, y, turn in _SHEPP_LOGAN
    ]


def rasterise(
    ellipses: Sequence[Ellipse],
    shape: tuple[int, int],
    pixel_mm: tuple[float, float],
    samples: int = 10,
    middle: tuple[float, float] | None = None,
) -> NDArray[np.float64]:
    """Area-averaged pixels: the mean of samples x samples points in each.

    Args:
        ellipses: what to draw.
        shape: (ny, nx).
        pixel_mm: (dy, dx).
        samples: points per pixel and axis; 10 leaves 0.3 % of a pixel's value at an edge.
        middle: pixel (row, column) that lies at (0, 0) mm; None = the image is centred on the axis, as in CT.
            (ny // 2, nx // 2) is the grid of MRI.

    Returns:
        [y, x] float64.
    """
    (ny, nx), (dy, dx) = shape, pixel_mm
    row, column = ((ny - 1) / 2, (nx - 1) / 2) if middle is None else middle
    inner = (np.arange(samples) + 0.5) / samples - 0.5
    xs = ((np.arange(nx)[:, None] + inner).ravel() - column) * dx
    image = np.empty(shape, dtype=np.float64)
    band = max(1, 2**20 // (nx * samples * samples))  # rows at a time, to bound memory
    for top in range(0, ny, band):
        rows = np.arange(top, min(ny, top + band))
        ys = ((rows[:, None] + inner).ravel() - row) * dy
        fine = np.zeros((len(ys), len(xs)))
        for e in ellipses:
            u, v = e._unit(xs[None] - e.x_mm, ys[:, None] - e.y_mm)
            fine += e.value * (u * u + v * v <= 1)
        image[rows] = fine.reshape(len(rows), samples, nx, samples).mean((1, 3))
    return image


def line_integrals(ellipses: Sequence[Ellipse], geometry: ScanGeometry) -> NDArray[np.float64]:
    """Exact integrals along the central ray of every detector cell.

    Args:
        ellipses: the object, in mm.
        geometry: parallel or fan beam.

    Returns:
        [view, u] float64, in the value's unit times mm.
    """
    angle, s = geometry.angles[:, None], geometry.detector_mm()[None]
    cos, sin = np.cos(angle), np.sin(angle)
    if isinstance(geometry, FanBeam):
        q = s / geometry.source_to_detector_mm
        px, py, c = cos - q * sin, sin + q * cos, q * geometry.source_to_axis_mm
        norm = np.hypot(px, py)
        px, py, c = px / norm, py / norm, c / norm
    else:
        px, py, c = cos + 0 * s, sin + 0 * s, s + 0 * angle
    total = np.zeros((geometry.n_views, geometry.n_detector))
    for e in ellipses:
        # point of the ray nearest the axis, and its direction, seen in the unit disc
        u, v = e._unit(c * px - e.x_mm, c * py - e.y_mm)
        du, dv = e._unit(-py, px)
        dd, ud, uu = du * du + dv * dv, u * du + v * dv, u * u + v * v
        total += e.value * 2 * np.sqrt(np.maximum(ud * ud - dd * (uu - 1), 0)) / dd
    return total


def kspace(
    ellipses: Sequence[Ellipse], trajectory: Trajectory, pixel_mm: tuple[float, float]
) -> NDArray[np.complex128]:
    """Exact k-space in the scale of the NUFFT: the Fourier integral over pixel area, divided by sqrt(ny nx).

    Args:
        ellipses: the object, in mm; (0, 0) mm is the pixel (ny // 2, nx // 2).
        trajectory: where to sample, two-dimensional.
        pixel_mm: (dy, dx) of the trajectory's grid.

    Returns:
        [M] complex128, in the value's unit.
    """
    dy, dx = pixel_mm
    ky, kx = trajectory.points.numpy().T / np.asarray([[dy], [dx]])
    total = np.zeros(trajectory.n_samples, dtype=np.complex128)
    for e in ellipses:
        c, s = math.cos(e.turn_rad), math.sin(e.turn_rad)
        u = np.hypot((c * kx + s * ky) * e.a_mm, (c * ky - s * kx) * e.b_mm)
        jinc = torch.special.bessel_j1(torch.from_numpy(np.maximum(u, 1e-9))).numpy() * 2 / np.maximum(u, 1e-9)
        total += e.value * math.pi * e.a_mm * e.b_mm * jinc * np.exp(-1j * (kx * e.x_mm + ky * e.y_mm))
    return total / (dy * dx * math.sqrt(math.prod(trajectory.shape)))


def coil_maps(coils: int, shape: tuple[int, int, int], radius: float = 1.4, rings: int = 1) -> Tensor:
    """Smooth receive fields of wires around the volume, as in a birdcage.

    Coil c is a line current at angle 2 pi c / n: its transverse field is 1 / (w - w_c) in the complex plane
    w = x + i y, turned by the coil's own angle; off its own z it falls with the distance.

    Args:
        coils: number of coils.
        shape: (slices, y, x).
        radius: distance of the coils in half image sides.
        rings: rings of coils along z.

    Returns:
        [slice, coil, y, x] complex64 with sum over coils of |S|^2 = 1.

    Raises:
        ValueError: fewer than one coil per ring, or coils inside the image circle.
    """
    if not 1 <= rings <= coils or radius <= 1:
        raise ValueError(f"coil_maps: 1 <= rings <= coils and radius > 1 expected, got {rings}, {coils}, {radius}")
    nz, ny, nx = shape
    z = (np.arange(nz) - (nz - 1) / 2) / max(nz / 2, 1)
    w = ((np.arange(nx) - nx // 2) / (nx / 2))[None] + 1j * ((np.arange(ny) - ny // 2) / (ny / 2))[:, None]
    fields = []
    for c in range(coils):
        ring = c % rings
        angle = 2 * math.pi * (c // rings + 0.5 * ring / rings) * rings / coils
        height = 0.0 if rings == 1 else -1 + 2 * ring / (rings - 1)
        d = radius * np.exp(1j * angle) - w
        far = np.abs(d) ** 2 + 0.5 * (z[:, None, None] - height) ** 2
        fields.append(np.conj(d) * np.exp(1j * angle) / far)
    maps = np.stack(fields, 1)
    return torch.from_numpy(maps / np.sqrt((np.abs(maps) ** 2).sum(1, keepdims=True))).to(torch.complex64)


def smooth_phase(shape: tuple[int, int, int], seed: int = 0, turns: float = 0.5) -> Tensor:
    """exp(i phase) with a phase of low order in z, y and x, such as field inhomogeneity leaves in an image.

    Args:
        shape: (z, y, x).
        seed: of the coefficients.
        turns: size of the phase in turns.

    Returns:
        [z, y, x] complex64 of modulus one.
    """
    axes = np.meshgrid(*[np.linspace(-1, 1, n) if n > 1 else np.zeros(1) for n in shape], indexing="ij")
    c = np.random.Generator(np.random.Philox(seed)).uniform(-1, 1, 10)
    z, y, x = axes
    terms = (1, z, y, x, y * x, y * y, x * x, z * y, z * x, z * z)
    phase = 2 * math.pi * turns / 3 * sum(a * t for a, t in zip(c, terms, strict=True))
    return torch.from_numpy(np.exp(1j * phase)).to(torch.complex64)

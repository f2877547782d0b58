"""The gridding kernel of the NUFFT: prolate spheroidal wave function, its width, its error.

A sample at grid position g is a sum over the w nearest points of an oversampled grid, weighted by a kernel of width w;
the image is divided by the kernel's Fourier transform beforehand. What remains is aliasing, and of all kernels of
that width the prolate spheroidal wave function of order zero keeps the most energy inside a band. Its band limit
c = pi w (1 - 1 / (2 sigma)) is lowered a little for narrow kernels, where the least mean error lies.

Source of the function: Osipov, Rokhlin, Xiao, Prolate Spheroidal Wave Functions of Order Zero (2013), section 2.4:
its Legendre coefficients are an eigenvector of a symmetric tridiagonal matrix.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import numpy as np
from numpy.polynomial import chebyshev, legendre
from numpy.typing import NDArray

__all__ = ["MAX_WIDTH", "AxisKernel", "axis_kernel", "grid_size"]

MAX_WIDTH = 16
# offsets at which the error is tabulated; it varies slowly between taps
OFFSETS = 32
_NODES, _NODE_WEIGHTS = legendre.leggauss(64)

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class AxisKernel:
    """Kernel of one axis: n pixels on a grid of g points.

    Attributes:
        n: pixels.
        g: grid points; 1 only when n is 1, and then the axis is exact.
        width: taps w.
        polynomials: [w, degree + 1], highest power first, of tap a at z in [-1, 1): the first tap lies (z + 1) / 2
            beyond the left end of the kernel's support.
        scale: [n] inverse Fourier transform of the kernel at pixel i - n // 2.
        error2: [OFFSETS] squared relative error of a sample of white data whose offset z lies in the k-th bin.
        growth: factor by which rounding errors grow (rms of scale times rms of the weights).
    """

    n: int
    g: int
    width: int
    polynomials: Floats
    scale: Floats
    error2: Floats
    growth: float


@functools.lru_cache(maxsize=256)
def axis_kernel(n: int, g: int, width: int) -> AxisKernel:
    """The kernel for n pixels on g grid points with `width` taps."""
    if g == 1:
        trivial = np.zeros((width, 1))
        trivial[0] = 1.0
        return AxisKernel(n, g, width, trivial, np.ones(n), np.zeros(OFFSETS), 1.0)
    ratio = g / n
    # mean error least there, found by search for sigma 1.25 to 2 and w 3 to 9; wider kernels want the full band
    band = math.pi * width * (1 - 0.5 / ratio) - max(0, 9 - width) * 0.042 / ratio
    prolate = _prolate(band)
    support = legendre.legval(_NODES, prolate) * _NODE_WEIGHTS * (width / 2)

    def transform(theta: Floats) -> Floats:
        return np.asarray(support @ np.cos(np.outer(_NODES, theta) * (width / 2)))

    polynomials = _polynomials(prolate, width)
    pixels = np.arange(n) - n // 2
    scale = 1 / transform(2 * math.pi * pixels / g)
    z = (np.arange(OFFSETS) + 0.5) * (2 / OFFSETS) - 1
    taps = np.stack([np.polyval(p, z) for p in polynomials])  # [w, OFFSETS]
    theta = 2 * math.pi / g * pixels
    # sum over taps of weight times exp(i distance theta), distance = a + (z + 1 - w) / 2
    seen = taps.T @ np.exp(1j * np.outer(np.arange(width), theta)) * np.exp(0.5j * np.outer(z + 1 - width, theta))
    error2 = (np.abs(1 - seen * scale) ** 2).mean(1)
    growth = math.sqrt(float((scale**2).mean() * (taps**2).sum(0).mean()))
    return AxisKernel(n, g, width, polynomials, scale, error2, growth)


def grid_size(n: int, oversampling: float, width: int) -> int:
    """The least even 2^a 3^b 5^c that holds n pixels `oversampling` times and the kernel once; 1 for one pixel."""
    if n == 1:
        return 1
    least = max(math.ceil(oversampling * n - 1e-9), width + width % 2, 2)
    g = least + least % 2
    while not _smooth(g):
        g += 2
    return g


def _smooth(g: int) -> bool:
    for prime in (2, 3, 5):
        while g % prime == 0:
            g //= prime
    return g == 1


@functools.lru_cache(maxsize=64)
def _prolate(band: float) -> Floats:
    # Legendre coefficients of the function on [-1, 1], 1 at the middle; odd ones vanish
    terms = int(band) + 30
    k = 2.0 * np.arange(terms)
    diagonal = k * (k + 1) + band**2 * (2 * k * (k + 1) - 1) / ((2 * k + 3) * (2 * k - 1))
    k = k[:-1]
    beside = band**2 * (k + 1) * (k + 2) / ((2 * k + 3) * np.sqrt((2 * k + 1) * (2 * k + 5)))
    matrix = np.diag(diagonal) + np.diag(beside, 1) + np.diag(beside, -1)
    least = np.linalg.eigh(matrix)[1][:, 0]
    coefficients = np.zeros(2 * terms)
    coefficients[::2] = least * np.sqrt(2.0 * np.arange(terms) + 0.5)
    return np.asarray(coefficients / legendre.legval(0.0, coefficients))


def _polynomials(prolate: Floats, width: int) -> Floats:
    # one per tap; at this degree the fit is a thousandth of the kernel error or better
    degree = width + 3
    nodes = np.cos(math.pi * (np.arange(degree + 1) + 0.5) / (degree + 1))
    at = (2 * np.arange(width)[:, None] + nodes + 1) / width - 1
    fit = chebyshev.chebfit(nodes, legendre.legval(at, prolate).T, degree)  # [degree + 1, w]
    out = np.zeros((width, degree + 1))
    for a in range(width):
        powers = chebyshev.cheb2poly(fit[:, a])  # without trailing zeros
        out[a, degree + 1 - len(powers) :] = powers[::-1]
    return out

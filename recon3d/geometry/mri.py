"""Where k-space was sampled: trajectories as frozen values, in radians per pixel of the image grid.

Pixel i of an axis of N pixels lies at n = i - N//2. A sample at k sees sum_n x_n e^{-i k n}, which has period 2 pi, so
k in [-pi, pi] is all there is. Axes of a point are those of the image, ([z,] y, x). Three units are in use elsewhere:
"rad" (per pixel, this one), "cycles" (per pixel, [-0.5, 0.5]) and "index" (cycles per field of view, [-N/2, N/2]); one
step of "index" is the Nyquist distance.
"""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from recon3d.geometry.ct import GeometryWarning

__all__ = ["Trajectory", "Unit", "cartesian", "kooshball", "radial", "random", "spiral", "stack"]

Unit = Literal["rad", "cycles", "index"]
Points = NDArray[np.float64]

# how far beyond the unit's end a point may lie: float32 coordinates round there by 3e-8
_SLACK = 1e-6
# reaching less than this of k-space on every axis is worth a word: pixels five times finer than the data
_COVERS_LITTLE = 0.2
_TAU = (1 + math.sqrt(5)) / 2
# golden means of the unit square: Chan et al., Magnetic Resonance in Medicine 61 (2009) 354
_GOLDEN_2D = (0.46557123187676802, 0.68232780382801933)


class Trajectory:
    """Sample positions in k-space on a given image grid; frozen and hashable by content.

    Args:
        points: [..., d], real; the last axis ordered as the image axes, ([z,] y, x). Copied.
        shape: pixels of the image, ([nz,] ny, nx).
        unit: of points: "rad" per pixel, "cycles" per pixel, or "index" (cycles per field of view).

    Attributes:
        points: [M, d] float64 radians per pixel, within [-pi, pi], on the host; not to be written to.
        shape: pixels of the image.
        layout: leading axes of points as given, such as (spokes, samples).
        digest: hexadecimal name of the content; equal trajectories have equal digests.

    Raises:
        ValueError: no points, a last axis that is not d, NaN or infinity, values outside the unit's range, or values
            that end exactly where another unit does (trajectories that cover little of k-space otherwise only warn).
        TypeError: points are complex.

    >>> Trajectory([[0.0, 0.25], [-0.5, 0.5]], (64, 64), "cycles").points.tolist()[0]
    [0.0, 1.5707963267948966]
    """

    points: Tensor
    shape: tuple[int, ...]
    layout: tuple[int, ...]
    digest: str
    __slots__ = ("digest", "layout", "points", "shape")

    def __init__(self, points: Any, shape: Sequence[int], unit: Unit = "rad") -> None:
        size = _sizes(shape)
        values = _read(points, len(size))
        reach = np.abs(values).reshape(-1, len(size)).max(0)
        _check_unit(reach, size, unit)
        step = {"rad": np.ones(len(size)), "cycles": np.full(len(size), 2 * math.pi), "index": _nyquist(size)}[unit]
        self._fill(np.clip(values * step, -math.pi, math.pi), size)

    def _fill(self, rad: Points, shape: tuple[int, ...]) -> None:
        flat = np.ascontiguousarray(rad.reshape(-1, len(shape))) + 0.0  # a copy, and no negative zero
        key = hashlib.sha256(repr(shape).encode())
        key.update(flat.tobytes())
        for name, value in (
            ("points", torch.from_numpy(flat)),
            ("shape", shape),
            ("layout", rad.shape[:-1]),
            ("digest", key.hexdigest()),
        ):
            object.__setattr__(self, name, value)

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"Trajectory: {name} cannot be changed; make a new trajectory")

    def __reduce__(self) -> tuple[Any, ...]:
        return _restore, (self.points.numpy().reshape(*self.layout, self.ndim), self.shape)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Trajectory) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def __len__(self) -> int:
        return self.n_samples

    def __repr__(self) -> str:
        grid, layout = (" x ".join(map(str, s)) for s in (self.shape, self.layout))
        return f"Trajectory({layout} samples of {grid} pixels, {self.digest[:8]})"

    @property
    def ndim(self) -> int:
        """Axes of the image and of k-space."""
        return len(self.shape)

    @property
    def n_samples(self) -> int:
        """Number of points."""
        return int(self.points.shape[0])

    def as_unit(self, unit: Unit) -> Tensor:
        """The points in another unit, [M, d] float64.

        Raises:
            ValueError: an unknown unit.

        >>> radial(1, 4, (8, 8)).as_unit("index")[:, 1].tolist()
        [-4.0, -2.0, 0.0, 2.0]
        """
        if unit == "rad":
            return self.points
        if unit == "cycles":
            return self.points / (2 * math.pi)
        if unit == "index":
            return self.points / torch.from_numpy(_nyquist(self.shape))
        raise ValueError(f"as_unit: unit must be 'rad', 'cycles' or 'index', got {unit!r}")

    def subset(self, indices: Sequence[int] | NDArray[np.integer] | Tensor | slice) -> Trajectory:
        """The trajectory with the chosen samples only; indices run over all samples in their order.

        Raises:
            ValueError: the choice is empty or names a sample that does not exist.
        """
        choice = indices if isinstance(indices, slice) else np.asarray(indices)
        try:
            chosen = np.atleast_2d(self.points.numpy()[choice])
        except IndexError as error:
            raise ValueError(f"subset: indices must be whole numbers in 0..{self.n_samples - 1}") from error
        if chosen.size == 0:
            raise ValueError("subset: no samples were chosen")
        return _restore(chosen, self.shape)

    def undersampling(self) -> float:
        """Nyquist cells within reach over those that hold a sample: about 1 when fully sampled, 4 when a quarter is.

        Reach is the ellipsoid around the samples, or the box where they fill its corners.

        >>> round(cartesian((16, 16)).undersampling(), 6)
        1.0
        """
        index = self.as_unit("index").numpy()
        # +N/2 and -N/2 are one sample
        size = np.asarray(self.shape)
        cell = np.round(index).astype(np.int64)
        occupied = np.unique(np.where(cell * 2 >= size, cell - size, cell), axis=0)
        reach = np.maximum(np.abs(occupied).max(0), 0.5)
        rim = float(np.sqrt(((occupied / reach) ** 2).sum(1)).max())
        axes = [np.unique(occupied[:, a]) for a in range(self.ndim)]
        box = [np.arange(a[0], a[-1] + 1) for a in axes]
        if rim > 1.2 and self.ndim > 1:
            return math.prod(len(b) for b in box) / len(occupied)
        radius2 = sum(r * r for r in np.meshgrid(*[b / r for b, r in zip(box, reach, strict=True)], indexing="ij"))
        return max(1.0, float((np.asarray(radius2) <= 1).sum()) / len(occupied))


def radial(
    n_spokes: int, n_samples: int, shape: Sequence[int], *, golden: bool = True, tiny: int = 1, start_rad: float = 0.0
) -> Trajectory:
    """Spokes through the centre of a plane.

    Sample j of a spoke lies at radius (j - n_samples//2) 2 pi / n_samples: the first at -pi, the centre measured by
    every spoke. Fully sampled from n_spokes = pi/2 N and n_samples = N on.

    Args:
        n_spokes: number of spokes, each a full diameter.
        n_samples: samples of a spoke; 2 N for the usual twofold readout oversampling.
        shape: (ny, nx).
        golden: angles advance by pi / (tau + tiny - 1), tau the golden ratio (Winkelmann et al., IEEE Transactions on
            Medical Imaging 26 (2007) 68), else by pi / n_spokes.
        tiny: 1 is the golden angle 111.25 degrees, 7 the tiny golden angle 23.63 degrees (Wundrak et al., 2016).
        start_rad: angle of the first spoke, from x towards y.

    Returns:
        The trajectory, layout (n_spokes, n_samples).

    Raises:
        ValueError: a count below one, or a shape that is not two sizes.

    >>> radial(402, 640, (320, 320)).n_samples
    257280
    """
    size = _plane("radial", shape)
    spokes, samples = _count("radial", "n_spokes", n_spokes), _count("radial", "n_samples", n_samples)
    step = math.pi / (_TAU + _count("radial", "tiny", tiny) - 1) if golden else math.pi / spokes
    angle = start_rad + np.mod(np.arange(spokes) * step, 2 * math.pi)
    direction = np.stack([np.sin(angle), np.cos(angle)], -1)
    return _restore(_diameter(samples)[:, None] * direction[:, None], size)


def spiral(
    n_arms: int, n_samples: int, shape: Sequence[int], *, turns: float | None = None, golden: bool = False
) -> Trajectory:
    """Archimedean spirals from the centre to the rim, sampled at even distances along the arm.

    Args:
        n_arms: interleaves, turned by 2 pi / n_arms, or by the golden angle.
        n_samples: samples of an arm; the first is the centre.
        shape: (ny, nx).
        turns: revolutions of an arm; None = as many as keep neighbouring arms one Nyquist distance apart.
        golden: turn the arms by 2 pi / tau^2, 137.5 degrees.

    Returns:
        The trajectory, layout (n_arms, n_samples).

    Raises:
        ValueError: a count below one, turns that are not positive, or a shape that is not two sizes.
    """
    size = _plane("spiral", shape)
    arms, samples = _count("spiral", "n_arms", n_arms), _count("spiral", "n_samples", n_samples)
    revolutions = max(size) / 2 / arms if turns is None else float(turns)
    if not (math.isfinite(revolutions) and revolutions > 0):
        raise ValueError(f"spiral: turns must be positive, got {turns}")
    end = 2 * math.pi * revolutions
    # arc length of r = theta on a fine table, inverted
    theta = np.linspace(0.0, end, 64 * (samples + math.ceil(revolutions)) + 1)
    arc = (theta * np.hypot(1, theta) + np.arcsinh(theta)) / 2
    theta = np.interp(np.linspace(0.0, arc[-1], samples), arc, theta)
    step = 2 * math.pi / _TAU**2 if golden else 2 * math.pi / arms
    angle = theta + np.mod(np.arange(arms) * step, 2 * math.pi)[:, None]
    radius = math.pi * theta / end
    return _restore(np.stack([radius * np.sin(angle), radius * np.cos(angle)], -1), size)


def kooshball(n_spokes: int, n_samples: int, shape: Sequence[int]) -> Trajectory:
    """Spokes through the centre of a volume, directions by the two-dimensional golden means.

    Samples of a spoke lie as in radial. Fully sampled from about n_spokes = pi/2 N^2 on.

    Args:
        n_spokes: number of spokes, each a full diameter.
        n_samples: samples of a spoke.
        shape: (nz, ny, nx).

    Returns:
        The trajectory, layout (n_spokes, n_samples).

    Raises:
        ValueError: a count below one, or a shape that is not three sizes.
    """
    size = _sizes(shape)
    if len(size) != 3:
        raise ValueError(f"kooshball: shape must be three sizes (nz, ny, nx), got {size}")
    spokes, samples = _count("kooshball", "n_spokes", n_spokes), _count("kooshball", "n_samples", n_samples)
    m = np.arange(spokes)
    z = np.mod(m * _GOLDEN_2D[0], 1.0)
    angle = 2 * math.pi * np.mod(m * _GOLDEN_2D[1], 1.0)
    across = np.sqrt(1 - z * z)
    direction = np.stack([z, across * np.sin(angle), across * np.cos(angle)], -1)
    return _restore(_diameter(samples)[:, None] * direction[:, None], size)


def stack(plane: Trajectory, n_partitions: int, partitions: Sequence[int] | None = None) -> Trajectory:
    """A stack of stars or spirals: the same plane at every kz. A Fourier transform along z turns it into slices that
    share the plane's trajectory, which is much cheaper; this is the 3D form for data that were not transformed.

    Args:
        plane: the trajectory in (y, x).
        n_partitions: pixels along z; partition p lies at frequency p - n_partitions//2.
        partitions: those measured; None = all.

    Returns:
        The trajectory, layout (partitions, *plane.layout).

    Raises:
        ValueError: plane is not two-dimensional, or a partition lies outside 0..n_partitions-1.
    """
    if plane.ndim != 2:
        raise ValueError(f"stack: a two-dimensional trajectory is needed, got {plane.ndim} dimensions")
    n = _count("stack", "n_partitions", n_partitions)
    chosen = np.arange(n) if partitions is None else np.asarray(list(partitions), dtype=np.int64)
    if chosen.size == 0 or chosen.min() < 0 or chosen.max() >= n:
        raise ValueError(f"stack: partitions must be some of 0..{n - 1}")
    kz = (chosen - n // 2) * (2 * math.pi / n)
    flat = plane.points.numpy()
    points = np.empty((len(chosen), len(flat), 3))
    points[..., 0] = kz[:, None]
    points[..., 1:] = flat
    return _restore(points.reshape(len(chosen), *plane.layout, 3), (n, *plane.shape))


def random(n_samples: int, shape: Sequence[int], seed: int = 0) -> Trajectory:
    """Points drawn evenly from the whole of k-space.

    Raises:
        ValueError: no samples, or a shape that is not one to three sizes.
    """
    size = _sizes(shape)
    count = _count("random", "n_samples", n_samples)
    return _restore(np.random.default_rng(seed).uniform(-math.pi, math.pi, (count, len(size))), size)


def cartesian(shape: Sequence[int]) -> Trajectory:
    """Every point of the centred Cartesian grid, in its order; layout = shape.

    Raises:
        ValueError: a shape that is not one to three sizes.

    >>> cartesian((2, 3)).as_unit("index").round().tolist()[:2]
    [[-1.0, -1.0], [-1.0, 0.0]]
    """
    size = _sizes(shape)
    axes = [(np.arange(n) - n // 2) * (2 * math.pi / n) for n in size]
    return _restore(np.stack(np.meshgrid(*axes, indexing="ij"), -1), size)


def _restore(rad: Points, shape: tuple[int, ...]) -> Trajectory:
    # points known to be good radians
    new = Trajectory.__new__(Trajectory)
    new._fill(rad, shape)
    return new


def _nyquist(shape: tuple[int, ...]) -> Points:
    return 2 * math.pi / np.asarray(shape, dtype=np.float64)


def _diameter(samples: int) -> Points:
    return (np.arange(samples, dtype=np.float64) - samples // 2) * (2 * math.pi / samples)


def _sizes(shape: Sequence[int]) -> tuple[int, ...]:
    given = tuple(shape)
    if not 1 <= len(given) <= 3 or any(int(n) != n or n < 1 for n in given):
        raise ValueError(f"Trajectory: shape must be one to three positive sizes ([nz,] ny, nx), got {given}")
    return tuple(int(n) for n in given)


def _plane(owner: str, shape: Sequence[int]) -> tuple[int, ...]:
    size = _sizes(shape)
    if len(size) != 2:
        raise ValueError(f"{owner}: shape must be two sizes (ny, nx), got {size}")
    return size


def _count(owner: str, name: str, value: int) -> int:
    if int(value) != value or value < 1:
        raise ValueError(f"{owner}: {name} must be a whole number of at least one, got {value}")
    return int(value)


def _read(points: Any, ndim: int) -> Points:
    given = points.detach().cpu().numpy() if isinstance(points, Tensor) else np.asarray(points)
    if np.iscomplexobj(given):
        raise TypeError("Trajectory: points are complex; give them as real numbers with a last axis ([z,] y, x)")
    values = np.asarray(given, dtype=np.float64)
    if values.size == 0:
        raise ValueError("Trajectory: points are empty; at least one sample is needed")
    if values.ndim < 2 or values.shape[-1] != ndim:
        turned = values.ndim >= 2 and values.shape[0] == ndim
        raise ValueError(
            f"Trajectory: points must be [..., {ndim}] for {ndim} image axes, got {values.shape}"
            + ("; they look like (d, M), so transpose them" if turned else "")
        )
    if not np.isfinite(values).all():
        raise ValueError(f"Trajectory: {int((~np.isfinite(values)).sum())} coordinates are NaN or infinite")
    return values


def _limits(shape: tuple[int, ...]) -> dict[str, Points]:
    half = np.asarray(shape, dtype=np.float64) / 2
    return {"rad": np.full(len(half), math.pi), "cycles": np.full(len(half), 0.5), "index": half}


def _check_unit(reach: Points, shape: tuple[int, ...], unit: str) -> None:
    """Refuses values outside the unit's range, and those that end where another unit does."""
    limits = _limits(shape)
    if unit not in limits:
        raise ValueError(f"Trajectory: unit must be 'rad', 'cycles' or 'index', got {unit!r}")
    limit, most = limits[unit], float(reach.max())
    ends = ", ".join(f"{v:g}" for v in limit) if unit == "index" else f"{limit[0]:.6g}"
    if (reach > limit * (1 + _SLACK)).any():
        fits = [u for u, other in limits.items() if u != unit and (reach <= other * (1 + 1e-3)).all()]
        if fits:
            do = f"they fit unit='{fits[0]}'"
        elif unit == "index" and (reach[::-1] <= limit * (1 + _SLACK)).all():
            do = "they fit with the axes reversed; the last axis is ordered ([z,] y, x)"
        else:
            do = "give the shape of the grid they belong to, or leave out the samples beyond"
        raise ValueError(f"Trajectory: points reach {most:.6g}, unit '{unit}' ends at {ends} for shape {shape}; {do}")
    covers = float((reach / limit).max())
    if most == 0 or covers >= _COVERS_LITTLE:
        return
    told = f"Trajectory: points reach {most:.6g}, which as unit '{unit}' is {100 * covers:.2g} % of the way to the rim"
    for other, end in limits.items():
        if other != unit and end.max() < limit.max() and 0.9 * end.max() < most <= end.max() * (1 + _SLACK):
            raise ValueError(f"{told} of k-space; they look like unit='{other}' (convert them if they are not)")
    warnings.warn(f"{told} of k-space; is the unit right?", GeometryWarning, stacklevel=3)

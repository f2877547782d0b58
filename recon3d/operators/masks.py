"""Sampling patterns of Cartesian k-space: 1 where a point is measured, 0 elsewhere; the centre is always in.

The number of sampled points is round(points / acceleration) exactly, whatever the seed. A pattern along one axis is a
[k] tensor that broadcasts as kx; `mask[:, None]` undersamples ky.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["acceleration", "equispaced", "partial_fourier", "poisson_disc", "random_lines"]

# bisections of the radius of a Poisson-disc pattern; the last points are then added or left out at random
_RADII = 12


def acceleration(mask: Tensor) -> float:
    """Points over sampled points.

    >>> acceleration(torch.tensor([1.0, 0.0, 0.0, 1.0]))
    2.0
    """
    return mask.numel() / max(1, int((mask != 0).sum()))


def equispaced(n: int, acceleration: float, centre_fraction: float = 0.08, seed: int = 0) -> Tensor:
    """Lines at equal distances around a fully sampled centre.

    The distance is stretched so that the centre's lines are paid for, as in fastMRI's "equispaced fraction"
    (arXiv 1811.08839), and the offset is drawn.

    Args:
        n: lines.
        acceleration: n over sampled lines, at least 1.
        centre_fraction: part of the lines in the centre.
        seed: of the offset.

    Returns:
        [n] float32.

    Raises:
        ValueError: a number out of range, or the centre alone is more than the acceleration allows.

    >>> equispaced(12, 3, 0.17).int().tolist()
    [1, 0, 0, 0, 0, 1, 1, 1, 0, 0, 0, 0]
    """
    total, centre = _counts("equispaced", n, acceleration, centre_fraction)
    mask = np.zeros(n, dtype=np.float32)
    mask[centre] = 1
    others = np.flatnonzero(mask == 0)
    count = total - (n - len(others))
    if count:
        # positions among the lines outside the centre, so that the count is exact
        offset = _generator(seed).uniform()
        mask[others[np.floor((np.arange(count) + offset) * len(others) / count).astype(int)]] = 1
    return torch.from_numpy(mask)


def random_lines(n: int, acceleration: float, centre_fraction: float = 0.08, seed: int = 0) -> Tensor:
    """Lines drawn evenly at random around a fully sampled centre.

    Args:
        n: lines.
        acceleration: n over sampled lines, at least 1.
        centre_fraction: part of the lines in the centre.
        seed: of the draw.

    Returns:
        [n] float32.

    Raises:
        ValueError: as equispaced.
    """
    total, centre = _counts("random_lines", n, acceleration, centre_fraction)
    mask = np.zeros(n, dtype=np.float32)
    mask[centre] = 1
    others = np.flatnonzero(mask == 0)
    mask[_generator(seed).choice(others, total - (n - len(others)), replace=False)] = 1
    return torch.from_numpy(mask)


def poisson_disc(
    shape: tuple[int, int],
    acceleration: float,
    calibration: int = 24,
    seed: int = 0,
    density: float = 0.0,
    corners: bool = True,
) -> Tensor:
    """Points at random that keep a distance from each other, around a fully sampled square.

    Points are visited in random order and taken unless a disc around one taken before covers them; the radius of the
    discs is found by bisection.

    Args:
        shape: (ky, kx).
        acceleration: points over sampled points, at least 1; with corners left out they count as points.
        calibration: side of the fully sampled square.
        seed: of the draw.
        density: growth of the radius towards the edge: 0 is uniform, 2 makes it three times the centre's.
        corners: sample the corners outside the ellipse that touches the edges.

    Returns:
        [ky, kx] float32.

    Raises:
        ValueError: a number out of range, or the centre alone is more than the acceleration allows.
    """
    ny, nx = shape
    if ny < 1 or nx < 1 or not (math.isfinite(acceleration) and acceleration >= 1):
        raise ValueError(f"poisson_disc: shape {shape} and acceleration {acceleration} must be at least 1")
    if calibration < 0 or not (math.isfinite(density) and density >= 0):
        raise ValueError(f"poisson_disc: calibration and density must not be negative, got {calibration}, {density}")
    total = round(ny * nx / acceleration)
    cy, cx = min(calibration, ny), min(calibration, nx)
    centre = np.zeros(shape, dtype=bool)
    centre[_middle(ny, cy), _middle(nx, cx)] = True
    y = (np.arange(ny) - ny // 2)[:, None] / max(1, ny / 2)
    x = (np.arange(nx) - nx // 2)[None] / max(1, nx / 2)
    distance = np.hypot(y, x)
    allowed = centre | (distance <= 1 if not corners else True)
    if not cy * cx <= total <= allowed.sum():
        raise ValueError(
            f"poisson_disc: acceleration {acceleration} asks for {total} of {ny * nx} points, between {cy * cx} "
            f"(the calibration square) and {int(allowed.sum())} are possible; change either"
        )
    generator = _generator(seed)
    order = generator.permutation(np.flatnonzero(allowed & ~centre))
    spread = 1 + density * np.minimum(distance, 1)
    # on the grid few distances exist; radii that vary by a quarter keep the density from going in steps
    spread = spread * generator.uniform(0.75, 1.25, shape)
    low, high = 0.0, 4 * math.sqrt(acceleration) + 1
    best = centre
    for _ in range(_RADII):
        radius = (low + high) / 2
        taken = _discs(centre, order, radius * spread, total)
        if taken.sum() >= total:
            low, best = radius, taken
        else:
            high = radius
            if best is centre or abs(int(taken.sum()) - total) < abs(int(best.sum()) - total):
                best = taken
    mask = best.copy()
    missing = total - int(mask.sum())
    if missing > 0:
        mask.flat[generator.choice(np.flatnonzero(allowed & ~mask), missing, replace=False)] = True
    elif missing < 0:
        mask.flat[generator.choice(np.flatnonzero(mask & ~centre), -missing, replace=False)] = False
    return torch.from_numpy(mask.astype(np.float32))


def partial_fourier(mask: Tensor) -> tuple[float, float]:
    """Share of k-space along ky and kx that a scan set out to cover: 1 where both sides were, 0.5 for one half alone.

    Undersampling does not count: a side is missing when its gap at the edge is wider than any gap inside and than the
    gap at the other edge by more than that.

    Args:
        mask: [ky, kx], or [kx]; or [slice, ky, kx], where a point counts once any slice has it.

    Returns:
        (ky share, kx share).

    Raises:
        ValueError: nothing is sampled, or the mask has more than three axes.
    """
    if not 1 <= mask.ndim <= 3:
        raise ValueError(f"partial_fourier: expected [ky, kx] or [slice, ky, kx], got {tuple(mask.shape)}")
    sampled = (mask != 0).cpu()
    sampled = sampled.any(0) if sampled.ndim == 3 else sampled.reshape(-1, sampled.shape[-1])
    if not bool(sampled.any()):
        raise ValueError("partial_fourier: the mask samples nothing")
    return _share(sampled.any(1).numpy()), _share(sampled.any(0).numpy())


def _share(line: NDArray[np.bool_]) -> float:
    n, at = len(line), np.flatnonzero(line)
    if n == 1:
        return 1.0
    inside = int(np.diff(at).max() - 1) if len(at) > 1 else 0
    before, after = int(at[0]), int(n - 1 - at[-1])
    # of an even axis the first frequency has no partner, and is often left out
    if abs(before - after) <= max(1, inside) or max(before, after) <= max(1, inside):
        return 1.0
    return (n - max(before, after)) / n


def _counts(what: str, n: int, acceleration: float, centre_fraction: float) -> tuple[int, slice]:
    if n < 1 or not (math.isfinite(acceleration) and acceleration >= 1):
        raise ValueError(f"{what}: lines and acceleration must be at least 1, got {n} and {acceleration}")
    if not 0 <= centre_fraction <= 1:
        raise ValueError(f"{what}: centre_fraction must lie between 0 and 1, got {centre_fraction}")
    total, centre = max(1, round(n / acceleration)), round(n * centre_fraction)
    if centre > total:
        raise ValueError(
            f"{what}: {centre} centre lines of {n} are more than acceleration {acceleration:g} allows ({total}); "
            "lower centre_fraction or acceleration"
        )
    return total, _middle(n, centre)


def _middle(n: int, width: int) -> slice:
    first = n // 2 - width // 2
    return slice(first, first + width)


def _discs(
    centre: NDArray[np.bool_], order: NDArray[np.int64], radius: NDArray[np.float64], most: int
) -> NDArray[np.bool_]:
    """Points taken in the given order unless covered; ends once there are more than `most`."""
    ny, nx = centre.shape
    taken, covered = centre.copy(), centre.copy()
    count = int(taken.sum())
    stamps: dict[int, NDArray[np.bool_]] = {}
    flat = covered.reshape(-1)
    for at in order:
        if flat[at]:
            continue
        y, x = divmod(int(at), nx)
        taken[y, x] = True
        count += 1
        if count > most + most // 50:
            break
        # radii in steps of a 16th of a point, so that few stamps are made
        step = int(radius[y, x] * 16)
        if step not in stamps:
            reach = step // 16
            d = np.arange(-reach, reach + 1)
            stamps[step] = d[:, None] ** 2 + d**2 < max(1, (step / 16) ** 2)
        stamp = stamps[step]
        reach = stamp.shape[0] // 2
        top, bottom, left, right = max(0, y - reach), min(ny, y + reach + 1), max(0, x - reach), min(nx, x + reach + 1)
        covered[top:bottom, left:right] |= stamp[
            top - y + reach : bottom - y + reach, left - x + reach : right - x + reach
        ]
    return taken


def _generator(seed: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(seed))

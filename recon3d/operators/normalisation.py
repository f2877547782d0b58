"""Efficiencies of crystals and rates of random coincidences from the measured counts alone.

The fan sum of a crystal is the number of coincidences that it took part in. It is proportional to the crystal's
efficiency times what reaches it, and what reaches it from an extended object changes slowly around the ring and along
the axis. So fan sums over their own smooth part are efficiencies (Hoffman et al., IEEE Trans Nucl Sci 36 (1989) 1108;
Badawi and Marsden, Phys Med Biol 44 (1999) 571, for the model with block profiles).

This is an estimate for scans that came without their normalisation. It needs an object that is roughly centred and
several blocks wide (a head, a body, a cylinder; not a point); whatever of the object varies within a block is taken
for efficiency, and slow variation of the real efficiencies is lost. The efficiency's unit is lost too: it is 1 on the
mean. A measured normalisation is always better.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from recon3d.geometry import Events, PETGeometry, PETScanner

__all__ = ["efficiency_factors", "fan_sum_efficiencies", "fan_sums", "randoms_from_delayed"]

Floats = NDArray[np.float64]

# what varies more slowly than this many blocks around the ring, or than a parabola along the axis, is the object's
_SLOWEST_BLOCKS = 4
_AXIAL_POWER = 4


def fan_sums(counts: Events | Tensor, where: PETScanner | PETGeometry) -> Tensor:
    """Coincidences that every crystal took part in, [ring, crystal] float64.

    Args:
        counts: events, prompt and delayed alike (choose before), or counts in sinogram bins. Bins that add up several
            pairs are shared out evenly among those that exist.
        where: the scanner of the events, or the geometry of the bins.

    Raises:
        ValueError: counts that do not fit.
    """
    if isinstance(counts, Events):
        scan = where.scanner if isinstance(where, PETGeometry) else where
        flat = np.bincount(counts.pairs.numpy().ravel().astype(np.int64), minlength=scan.n_crystals)
        if len(flat) != scan.n_crystals:
            raise ValueError(f"fan_sums: the events name crystal {len(flat) - 1}, {scan.name} has {scan.n_crystals}")
        return torch.from_numpy(flat.astype(np.float64).reshape(scan.rings, scan.crystals))
    if not isinstance(where, PETGeometry) or tuple(counts.shape) != where.shape:
        raise ValueError("fan_sums: give the geometry that the sinogram's bins have")
    counts = counts.sum(2) if where.tof is not None else counts
    scan, real = where.scanner, where.scanner.real_crystals()
    plane, rings = where.ring_pairs()
    pairs = where.crystal_pairs()
    first = np.searchsorted(plane, np.arange(where.n_planes))
    orders = [np.argsort(rings[:, end], kind="stable") for end in (0, 1)]
    starts = [np.flatnonzero(np.diff(rings[order, end], prepend=-1)) for end, order in enumerate(orders)]
    out = np.zeros((scan.crystals, scan.rings))
    for view in range(where.shape[0]):
        ends = [real.T[pairs[view, ..., end]][..., rings[:, end]] for end in (0, 1)]
        exist = ends[0] & ends[1]  # [mashed, radial, ring pair]
        share = np.add.reduceat(exist.sum(0), first, axis=1)
        part = counts[view].numpy() / np.maximum(share, 1)
        for k in range(where.mashing):
            value = part[:, plane] * exist[k]
            for end in (0, 1):
                held = rings[orders[end][starts[end]], end]
                summed = np.add.reduceat(value[:, orders[end]], starts[end], axis=1)
                np.add.at(out, (pairs[view, k, :, None, end], held), summed)
    return torch.from_numpy(out.T.copy())


def fan_sum_efficiencies(fans: Tensor, scan: PETScanner) -> Tensor:
    """Efficiency of every crystal from its fan sum, [ring, crystal] float64, 1 on the mean, 0 in gaps.

    Four things are multiplied: the smooth part (the object's, divided out), the profile of a block that all blocks
    share, the block's own efficiency, and the crystal's own, which is drawn towards 1 as far as its counts do not
    tell it from chance (a Gamma prior whose width is estimated from the counts). So few counts give a block profile,
    many counts every crystal.

    Args:
        fans: [ring, crystal] counts, see fan_sums.
        scan: the scanner.

    Raises:
        ValueError: fans of another scanner, negative ones, or no counts.
    """
    counts, real = _fans("fan_sum_efficiencies", fans, scan)
    _, block, crystal = _levels(counts, real, scan)
    out = block * crystal
    return torch.from_numpy(np.where(real, out / out[real].mean(), 0.0))


def efficiency_factors(efficiencies: Tensor, geometry: PETGeometry) -> Tensor:
    """Normalisation of every bin: the sum over its pairs of the product of both efficiencies, [view, radial, plane].

    With efficiencies 1 that is the number of existing pairs; bins in gaps get 0. float32.

    Args:
        efficiencies: [ring, crystal].
        geometry: the bins.

    Raises:
        ValueError: efficiencies of another scanner, negative or not finite.
    """
    values = _crystal_values("efficiency_factors", efficiencies, geometry.scanner)
    return torch.from_numpy(_pair_products(values.astype(np.float32), geometry))


def randoms_from_delayed(delayed: Events | Tensor, geometry: PETGeometry) -> Tensor:
    """Expected random coincidences of every bin from delayed ones, without their noise.

    The rate of a pair is the product of both crystals' singles rates; singles are found from the fan sums of the
    delayed coincidences by fixed-point iteration over the fans of the geometry (Badawi et al., Phys Med Biol 44 (1999)
    1941), after the fan sums were smoothed as in fan_sum_efficiencies. The total is that of the delayed ones in the
    geometry's bins; time bins share evenly.

    Args:
        delayed: delayed events (prompt ones are passed over), or delayed counts in the bins.
        geometry: the bins.

    Raises:
        ValueError: counts that do not fit, or none at all.
    """
    scan = geometry.scanner
    if isinstance(delayed, Events):
        kept = delayed[~delayed.prompt]
        bins = geometry.bin_of(kept.pairs.numpy(), None if kept.tof_bins is None else kept.tof_bins.numpy())
        held = kept[torch.from_numpy(bins >= 0)]
        total, fans = float(len(held)), fan_sums(held, scan)
    else:
        total, fans = float(delayed.sum(dtype=torch.float64)), fan_sums(delayed, geometry)
    counts, real = _fans("randoms_from_delayed", fans, scan)
    smooth, block, crystal = _levels(counts, real, scan)
    target = np.where(real, smooth * block * crystal, 0.0)
    singles = np.sqrt(target)
    for _ in range(20):
        others = _fan_of(singles, geometry)
        found = np.divide(target, others, out=np.zeros_like(target), where=others > 0)
        singles = np.sqrt(singles * found)  # the plain iteration swings between two states
    rates = _pair_products(singles.astype(np.float32), geometry)
    rates *= total / rates.sum(dtype=np.float64)
    out = torch.from_numpy(rates)
    if geometry.tof is None:
        return out
    return (out / geometry.tof.bins).unsqueeze(2).expand(geometry.shape).contiguous()


def _fans(what: str, fans: Tensor, scan: PETScanner) -> tuple[Floats, NDArray[np.bool_]]:
    counts = _crystal_values(what, fans, scan)
    real = scan.real_crystals()
    if not counts[real].sum() > 0:
        raise ValueError(f"{what}: there is not a single count; nothing can be estimated")
    return np.where(real, counts, 0.0), real


def _crystal_values(what: str, values: Tensor, scan: PETScanner) -> Floats:
    if tuple(values.shape) != (scan.rings, scan.crystals):
        raise ValueError(
            f"{what}: one value per crystal of {scan.name}, {(scan.rings, scan.crystals)}, is needed, got "
            f"{tuple(values.shape)}"
        )
    given = values.double().numpy()
    if not np.isfinite(given).all() or given.min() < 0:
        raise ValueError(f"{what}: values must be finite and not negative")
    return given


def _levels(counts: Floats, real: NDArray[np.bool_], scan: PETScanner) -> tuple[Floats, Floats, Floats]:
    """Smooth part, block profile times block efficiency, and crystal efficiency of fan sums."""
    per, tall = scan.block_crystals, scan.block_rings
    rings, crystals = counts.shape
    block_of = (np.arange(rings) // tall)[:, None] * (crystals // per) + np.arange(crystals) // per
    place_of = (np.arange(rings) % tall)[:, None] * per + np.arange(crystals) % per
    smooth = _smooth(counts, real, scan)
    level = np.ones_like(counts)
    for _ in range(8):  # profile and blocks are fitted in turn: the product model's maximum likelihood
        for group in (place_of, block_of):
            have = np.bincount(group[real], counts[real], group.max() + 1)
            want = np.bincount(group[real], (smooth * level)[real], group.max() + 1)
            level = level * np.divide(have, want, out=np.zeros_like(want), where=want > 0)[group]
        smooth = _smooth(np.divide(counts, level, out=np.zeros_like(counts), where=level > 0), real & (level > 0), scan)
    expected = smooth * level
    # excess of the spread over that of counting: the variance of the crystals' own efficiencies
    mean_square = np.square(expected[real]).mean()
    spread = float((np.square(counts - expected)[real].mean() - expected[real].mean()) / mean_square)
    strength = 1 / max(spread, 1e-6)
    own = (counts + strength) / (expected + strength)
    return smooth, level, np.where(real, own, 0.0)


def _smooth(counts: Floats, real: NDArray[np.bool_], scan: PETScanner) -> Floats:
    """What the object and the scanner's shape make of the fan sums: slow around the ring times slow along the axis."""
    have, number = np.where(real, counts, 0.0), real.astype(np.float64)
    blocks = scan.crystals // scan.block_crystals
    # one value for each position in the ring, block by block, then low frequencies only
    around = have.sum(0).reshape(blocks, -1).sum(1) / np.maximum(number.sum(0).reshape(blocks, -1).sum(1), 1)
    waves = np.fft.rfft(around)
    waves[blocks // _SLOWEST_BLOCKS + 1 :] = 0
    # evaluated at the crystals' own angles
    at = (np.arange(scan.crystals) + 0.5) / scan.block_crystals - 0.5
    k = np.arange(len(waves))
    double = np.where((k == 0) | (2 * k == blocks), 1.0, 2.0)
    ring = (double * waves * np.exp(2j * np.pi * np.outer(at, k) / blocks)).real.sum(1) / blocks
    lines = number.sum(1) > 0
    z = np.linspace(-1, 1, scan.rings)
    power = min(_AXIAL_POWER, max(0, int(lines.sum()) - 1), max(0, scan.rings // scan.block_rings - 1))
    axial = have.sum(1)[lines] / number.sum(1)[lines]
    along = np.polynomial.Polynomial.fit(z[lines], axial, power)(z)
    floor = 1e-3 * have[real].mean()
    out: Floats = np.maximum(along, floor)[:, None] * np.maximum(ring, floor) / max(have[real].mean(), floor)
    return out


def _fan_of(values: Floats, geometry: PETGeometry) -> Floats:
    """Per crystal the sum of values over all crystals that it has a bin with."""
    scan = geometry.scanner
    n = scan.crystals
    t = np.arange(geometry.n_radial) - geometry.n_radial // 2
    # p1 - p0 = N/2 - t; the pair is met from both ends
    window = np.zeros(n)
    np.add.at(window, (n // 2 - t) % n, 0.5)
    np.add.at(window, (t - n // 2) % n, 0.5)
    around = np.fft.irfft(np.fft.rfft(values, axis=1) * np.conj(np.fft.rfft(window)), n, axis=1)
    rings = geometry.michelogram() >= 0
    return np.maximum((rings | rings.T) @ around, 0.0)


def _pair_products(values: NDArray[np.float32], geometry: PETGeometry) -> NDArray[np.float32]:
    """[view, radial, plane] sum over the pairs of a bin of values[p0] values[p1]."""
    plane, rings = geometry.ring_pairs()
    pairs = geometry.crystal_pairs()
    first = np.searchsorted(plane, np.arange(geometry.n_planes))
    alone = len(plane) == geometry.n_planes
    out = np.zeros((geometry.shape[0], geometry.n_radial, geometry.n_planes), dtype=np.float32)
    columns = np.ascontiguousarray(values.T)  # [crystal, ring]
    for view in range(out.shape[0]):
        for k in range(geometry.mashing):
            both = columns[pairs[view, k, :, 0]][:, rings[:, 0]] * columns[pairs[view, k, :, 1]][:, rings[:, 1]]
            out[view] += both if alone else np.add.reduceat(both, first, axis=1)
    return out

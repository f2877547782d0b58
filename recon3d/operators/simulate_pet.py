"""PET measurements made from a known activity: Poisson counts at a stated total, with scatter and randoms."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from recon3d.geometry import PETGeometry, VolumeGrid
from recon3d.operators.attenuation import attenuation_factors
from recon3d.operators.normalisation import efficiency_factors
from recon3d.operators.pet import PETOperator
from recon3d.operators.pet_rebin import single_slice

__all__ = ["SimulatedPET", "simulate_pet"]

# scattered photons of a body blur over tens of centimetres; standard deviations of the model, in mm
_SCATTER_RADIAL_MM = 60.0
_SCATTER_AXIAL_MM = 30.0


@dataclass(frozen=True, eq=False)
class SimulatedPET:
    """A simulated measurement and what a reconstruction of it needs.

    Attributes:
        prompts: Poisson counts, float32 in the geometry's shape.
        factors: attenuation times normalisation, [view, radial, plane].
        additive: expected scattered and random counts, in the geometry's shape.
        scale: counts of a bin with factor 1 for 1 Bq/mL along 1 mm.
        clean: expected prompts; the noise-free measurement.
        geometry: the bins.
        grid: the grid of the activity.
    """

    prompts: Tensor
    factors: Tensor
    additive: Tensor
    scale: float
    clean: Tensor
    geometry: PETGeometry
    grid: VolumeGrid

    def operator(self, grid: VolumeGrid | None = None, psf_fwhm_mm: float | None = None) -> PETOperator:
        """The operator of a reconstruction on a grid; None = that of the activity."""
        return PETOperator(
            self.geometry,
            self.grid if grid is None else grid,
            factors=self.factors,
            additive=self.additive,
            psf_fwhm_mm=psf_fwhm_mm,
            scale=self.scale,
        )


def simulate_pet(
    activity: Tensor,
    grid: VolumeGrid,
    geometry: PETGeometry,
    *,
    mu_per_mm: Tensor | None = None,
    counts: float,
    scatter_fraction: float = 0.2,
    randoms_fraction: float = 0.2,
    psf_fwhm_mm: float | Sequence[float] | None = 4.5,
    efficiencies: Tensor | None = None,
    oversample: int = 2,
    seed: int = 0,
) -> SimulatedPET:
    """A sinogram of an activity with Poisson noise.

    True counts are the line integrals of the blurred activity, attenuated and normalised. Scattered counts are a model,
    not a calculation: the normalised true counts, attenuation included, blurred by Gaussians of 60 mm across the
    sinogram's rows and 30 mm along the axis, the same for all ring differences; smooth, wide, and reaching beyond the
    object. Random counts are even over all pairs of crystals and time bins, times the normalisation. The additive term
    of a reconstruction is both, exactly.

    Args:
        activity: [z, y, x] in Bq/mL, or any unit in proportion.
        grid: its grid, centred on the scanner.
        geometry: the bins.
        mu_per_mm: [z, y, x] attenuation at 511 keV in 1/mm on the same grid; None = none.
        counts: expected number of all prompts.
        scatter_fraction: scattered over true and scattered counts, 0 to below 1.
        randoms_fraction: random over all counts, 0 to below 1.
        psf_fwhm_mm: resolution of the simulated scanner in the image; None = only that of the pixels.
        efficiencies: [ring, crystal] of the crystals; None = 1 for those that exist, 0 in gaps.
        oversample: pixels are split into oversample^2 before projecting, so that the simulation is not the
            reconstruction's own operator.
        seed: of the noise; the same seed gives the same counts, whatever the number of threads.

    Raises:
        ValueError: a volume that does not fit its grid, negative or no activity, fractions outside their range, or
            counts that are not positive.

    >>> from recon3d.geometry import pet_geometry
    >>> geometry = pet_geometry("small", span=3, mashing=4)
    >>> grid = geometry.default_grid(n=16)
    >>> scan = simulate_pet(torch.ones(grid.shape), grid, geometry, counts=1e5)
    >>> abs(float(scan.prompts.sum()) / 1e5 - 1) < 0.02
    True
    """
    if tuple(activity.shape) != grid.shape:
        raise ValueError(f"simulate_pet: the activity is {tuple(activity.shape)}, its grid says {grid.shape}")
    low, high = float(activity.amin()), float(activity.amax())
    if not (low >= 0 and 0 < high < math.inf):
        raise ValueError(f"simulate_pet: activity must be finite, not negative and not all zero, got {low} to {high}")
    for name, value in (("scatter_fraction", scatter_fraction), ("randoms_fraction", randoms_fraction)):
        if not 0 <= value < 1:
            raise ValueError(f"simulate_pet: {name} must lie in 0..1, below 1, got {value}")
    if not (math.isfinite(counts) and counts > 0):
        raise ValueError(f"simulate_pet: counts must be positive, got {counts}")
    if int(oversample) != oversample or oversample < 1:
        raise ValueError(f"simulate_pet: oversample must be a whole number of at least 1, got {oversample}")

    real = torch.from_numpy(geometry.scanner.real_crystals())
    given = real.double() if efficiencies is None else efficiencies.double() * real
    normalisation = efficiency_factors(given, geometry)
    factors = normalisation
    if mu_per_mm is not None:
        factors = attenuation_factors(mu_per_mm, grid, geometry).mul_(normalisation)

    n, (nz, ny, nx), (dz, dy, dx) = int(oversample), grid.shape, grid.spacing_mm
    fine = VolumeGrid((nz, ny * n, nx * n), (dz, dy / n, dx / n))
    split = activity.float().repeat_interleave(n, -2).repeat_interleave(n, -1)
    trues = PETOperator(geometry, fine, factors=factors, psf_fwhm_mm=psf_fwhm_mm)(split)
    total = _total(trues)
    if not total > 0:
        raise ValueError("simulate_pet: no line of the scanner meets the activity; check the grid's spacing and centre")
    wanted = counts * (1 - randoms_fraction) * (1 - scatter_fraction)
    scale = wanted / total
    trues *= scale

    additive = torch.zeros(geometry.shape)
    if scatter_fraction > 0:
        scatter = _scattered(trues, normalisation, geometry)
        scatter *= counts * (1 - randoms_fraction) * scatter_fraction / _total(scatter)
        additive += scatter
    if randoms_fraction > 0:
        bins = 1 if geometry.tof is None else geometry.tof.bins
        even = normalisation if geometry.tof is None else normalisation.unsqueeze(2)
        additive += even * (counts * randoms_fraction / (_total(normalisation) * bins))
    clean = trues.add_(additive)
    prompts = _poisson(clean, seed)
    return SimulatedPET(prompts, factors, additive, scale, clean, geometry, grid)


def _scattered(trues: Tensor, normalisation: Tensor, geometry: PETGeometry) -> Tensor:
    """The blurred trues of the direct slices, spread over all planes with the same middle, not yet scaled."""
    plain = replace(geometry, tof=None)
    out = []
    bins = [trues] if geometry.tof is None else list(trues.unbind(2))
    weight = single_slice(normalisation, plain)  # [slice, view, radial]
    pitch = geometry.scanner.ring_spacing_mm / 2
    for part in bins:
        mean = single_slice(part, plain) / weight.clamp_min(1e-6 * float(weight.amax()))
        mean = torch.where(weight > 1e-6 * weight.amax(), mean, 0.0)
        seen = (weight > 1e-6 * weight.amax()).to(mean.dtype)
        for axis, sigma in ((2, _SCATTER_RADIAL_MM / geometry.bin_mm), (0, _SCATTER_AXIAL_MM / pitch)):
            mean, seen = _blur(mean, sigma, axis), _blur(seen, sigma, axis)
        mean = mean / seen.clamp_min(1e-3)
        spread = torch.empty(part.shape)
        start = 0
        for middle, _, step, count in geometry.segments:
            planes, stride = round(count), round(step / pitch)
            first = round(middle / pitch + geometry.scanner.rings - 1)
            chosen = mean[first : first + stride * (planes - 1) + 1 : stride]
            spread[..., start : start + planes] = chosen.permute(1, 2, 0)
            start += planes
        out.append(spread.mul_(normalisation))
    return out[0] if geometry.tof is None else torch.stack(out, 2)


def _blur(values: Tensor, sigma: float, axis: int) -> Tensor:
    """Gaussian along one axis, zero beyond the ends; by FFT, since the widths reach across the whole axis."""
    n = values.shape[axis]
    size = 1 << (2 * n - 1).bit_length()
    place = np.minimum(np.arange(size), size - np.arange(size)) / sigma
    kernel = np.fft.rfft(np.exp(-0.5 * place**2) / (sigma * math.sqrt(2 * math.pi))).real
    shape = [1] * values.ndim
    shape[axis] = len(kernel)
    waves = np.fft.rfft(values.numpy(), size, axis) * kernel.reshape(shape)
    blurred = np.fft.irfft(waves, size, axis).take(range(n), axis)
    return torch.from_numpy(np.maximum(blurred, 0).astype(np.float32))


def _poisson(clean: Tensor, seed: int) -> Tensor:
    """Counts drawn bin by bin in the order of the data."""
    generator = np.random.Generator(np.random.Philox(seed))
    rows = clean.numpy()
    out = torch.empty_like(clean)
    for view in range(len(rows)):  # a view at a time keeps the float64 and int64 temporaries small
        out[view] = torch.from_numpy(generator.poisson(rows[view].astype(np.float64)).astype(np.float32))
    return out


def _total(values: Tensor) -> float:
    # numpy adds up in an order that does not depend on threads
    return float(values.numpy().sum(dtype=np.float64))

"""Activity with a known truth: brains from the tissue classes of a T1 volume, and a body with hot and cold spheres.

Volumes are [z, y, x], activity in Bq/mL, attenuation at 511 keV in 1/mm. Millimetres count from the centre of the
volume, (z, y, x), as everywhere in PET.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from recon3d.geometry import VolumeGrid

__all__ = ["MU_BONE", "MU_LUNG", "MU_TISSUE", "PETPhantom", "Sphere", "body_phantom", "brain_phantom", "insert_spheres"]

MU_TISSUE = 0.0096  # 1/mm at 511 keV
MU_BONE = 0.013
MU_LUNG = 0.0026

_FWHM = 2 * math.sqrt(2 * math.log(2))


@dataclass(frozen=True)
class Sphere:
    """A ball, or an ellipsoid with its axes along the volume's, hotter or colder than what it lies in.

    Attributes:
        centre_mm: (z, y, x) from the centre of the volume.
        radius_mm: one radius, or (z, y, x) half axes.
        ratio: activity inside over the activity around it; 0 is empty.
    """

    centre_mm: tuple[float, float, float]
    radius_mm: float | tuple[float, float, float]
    ratio: float

    @property
    def half_axes_mm(self) -> tuple[float, float, float]:
        """Half axes along z, y, x."""
        r = self.radius_mm
        return (float(r),) * 3 if isinstance(r, (int, float)) else r


@dataclass(frozen=True)
class PETPhantom:
    """Activity, attenuation and what is known about them.

    Attributes:
        activity: [z, y, x] float32, Bq/mL.
        mu_per_mm: [z, y, x] float32, 1/mm.
        grid: their grid, centred on the scanner.
        regions: masks [z, y, x] by name; spheres are "hot 0", "cold 4" and so on, by their place in the list.
    """

    activity: Tensor
    mu_per_mm: Tensor
    grid: VolumeGrid
    regions: dict[str, Tensor] = field(default_factory=dict)


def body_phantom(
    grid: VolumeGrid,
    *,
    background: float = 5000.0,
    ratio: float = 4.0,
    half_axes_mm: tuple[float, float] = (110.0, 147.0),
    spheres: Sequence[Sphere] | None = None,
    ring_mm: float = 57.2,
    lung: bool = True,
    shrink: float = 1.0,
) -> PETPhantom:
    """An image-quality body like the IEC/NEMA one: an elliptic trunk, a lung insert, a ring of six spheres.

    Voxels hold the mean over their volume (3 x 3 x 3 points), so a sphere's total is right however coarse the grid.

    Args:
        grid: any grid; the phantom fills its z.
        background: activity of the trunk, Bq/mL.
        ratio: of the four small spheres (diameters 10, 13, 17, 22 mm); those of 28 and 37 mm are cold.
        half_axes_mm: of the trunk, (y, x).
        spheres: others in their place.
        ring_mm: radius of the ring of spheres.
        lung: put the insert of lung density (no activity, 50 mm across) in the middle.
        shrink: every length is multiplied by this, to fit a small scanner.

    >>> p = body_phantom(VolumeGrid((9, 64, 80), (5.0, 5.0, 5.0)))
    >>> sorted(p.regions)
    ['background', 'body', 'cold 4', 'cold 5', 'hot 0', 'hot 1', 'hot 2', 'hot 3', 'lung']
    """
    if spheres is None:
        spheres = [
            Sphere((0.0, -ring_mm * math.sin(a), ring_mm * math.cos(a)), d / 2, 0.0 if d > 25 else ratio)
            for a, d in zip((k * math.pi / 3 for k in range(6)), (10.0, 13.0, 17.0, 22.0, 28.0, 37.0), strict=True)
        ]
    spheres = [
        Sphere(_triple([shrink * c for c in s.centre_mm]), _triple([shrink * r for r in s.half_axes_mm]), s.ratio)
        for s in spheres
    ]
    far = 1e6
    trunk = _cover(grid, (0.0, 0.0, 0.0), (far, shrink * half_axes_mm[0], shrink * half_axes_mm[1]))
    insert = _cover(grid, (0.0, 0.0, 0.0), (far, 25.0 * shrink, 25.0 * shrink)) if lung else torch.zeros_like(trunk)
    filled = trunk * (1 - insert)
    plain = PETPhantom(
        background * filled,
        MU_TISSUE * filled + MU_LUNG * trunk * insert,
        grid,
        {"body": trunk > 0.999, "background": filled > 0.999} | ({"lung": insert > 0.999} if lung else {}),
    )
    return insert_spheres(plain, spheres)


def insert_spheres(phantom: PETPhantom, spheres: Sequence[Sphere], *, fwhm_mm: float = 0.0) -> PETPhantom:
    """The phantom with spheres put in, each `ratio` times the mean of the activity it replaces.

    Regions get a mask for each: voxels more than half covered. Everything within 1.5 radii plus 5 mm of a sphere
    leaves the region "background", where there is one.

    Args:
        phantom: any activity and its grid.
        spheres: what to put in.
        fwhm_mm: blur of the spheres' edges, to match an image that is blurred already.

    Raises:
        ValueError: a sphere that lies where there is no activity, or covers no voxel.
    """
    x, regions = phantom.activity, dict(phantom.regions)
    for k, s in enumerate(spheres):
        a = s.half_axes_mm
        cover = _cover(phantom.grid, s.centre_mm, a)
        region = cover > 0.5
        soft = _blur(cover, phantom.grid.spacing_mm, fwhm_mm)
        level = float((phantom.activity * cover).sum() / cover.sum().clamp(min=1e-12))
        if not region.any() or level <= 0:
            raise ValueError(
                f"insert_spheres: sphere {k} at {s.centre_mm} mm covers no voxel with activity; move or enlarge it"
            )
        x = x * (1 - soft) + s.ratio * level * soft
        if "background" in regions:
            near = _cover(phantom.grid, s.centre_mm, _triple([1.5 * r + 5 for r in a]))
            regions["background"] = regions["background"] & (near <= 0)
        regions[f"{'hot' if s.ratio > 1 else 'cold'} {k}"] = region
    return PETPhantom(x, phantom.mu_per_mm, phantom.grid, regions)


def brain_phantom(
    t1: Tensor,
    spacing_mm: tuple[float, float, float],
    *,
    voxel_mm: float | None = None,
    uptake: tuple[float, float, float, float] = (4.0, 1.0, 0.0, 0.3),
    white_bq_ml: float = 5000.0,
    variation: float = 0.0,
    fwhm_mm: float = 4.0,
    seed: int = 0,
) -> PETPhantom:
    """FDG-like activity from a T1-weighted head, by three classes of brightness inside the brain.

    The head is what is brighter than air, the brain its core behind the dark skull, and grey matter, white matter and
    CSF are cut apart by its shading-corrected brightness. It is a phantom, not a segmentation to rely on.

    Args:
        t1: [z, y, x] magnitudes, rows to the back, slices to the head.
        spacing_mm: its voxel size.
        voxel_mm: in-plane voxels of the result; None keeps the input's. Slices stay.
        uptake: grey matter, white matter, CSF, scalp and skull, relative to each other.
        white_bq_ml: activity per unit of `uptake`.
        variation: uptake varies smoothly over the head by about this share (standard deviation).
        fwhm_mm: blur, the resolution of the image it plays.
        seed: of the variation.

    Returns:
        A `PETPhantom` with the regions "grey", "white", "csf" and "head".

    Raises:
        ValueError: not a volume, or no brain found in it.
    """
    if t1.ndim != 3 or not bool(torch.isfinite(t1).all()):
        raise ValueError(f"brain_phantom: t1 must be a finite volume [z, y, x], got shape {tuple(t1.shape)}")
    t1 = t1.float().clamp(min=0)
    head, brain, flat = _brain(t1, spacing_mm)
    classes = _three_classes(_blur(flat, spacing_mm, 1.2), brain)
    csf, grey, white = (brain & (classes == k) for k in range(3))
    rest = head & ~brain
    x = torch.zeros(t1.shape)
    for u, mask in zip(uptake, (grey, white, csf, rest), strict=True):
        x += u * white_bq_ml * mask
    if variation > 0:
        g = torch.Generator().manual_seed(seed)
        field_ = _blur(torch.randn(t1.shape, generator=g), spacing_mm, 40.0)
        x = x * (1 + variation * field_ / field_.std()).clamp(min=0.2)
    bone = rest & (flat < 0.5 * _median(flat, brain))
    mu = MU_TISSUE * head.float() + (MU_BONE - MU_TISSUE) * bone.float()
    x, mu = _blur(x, spacing_mm, fwhm_mm), _blur(mu, spacing_mm, fwhm_mm)
    masks = {"grey": grey, "white": white, "csf": csf, "head": head}
    if voxel_mm is not None:
        size = [max(8, round(n * s / voxel_mm)) for n, s in zip(t1.shape[1:], spacing_mm[1:], strict=True)]
        x, mu = _resize(x, size), _resize(mu, size)
        masks = {k: _resize(m.float(), size) > 0.5 for k, m in masks.items()}
        y, x_mm = (n * s / m for n, s, m in zip(t1.shape[1:], spacing_mm[1:], size, strict=True))
        spacing_mm = (spacing_mm[0], y, x_mm)
    return PETPhantom(x.clamp(min=0), mu.clamp(min=0), VolumeGrid(_triple_int(x.shape), spacing_mm), masks)


def _brain(t1: Tensor, spacing: tuple[float, float, float]) -> tuple[Tensor, Tensor, Tensor]:
    """Masks of the head and of the brain, and the brightness with its shading divided out."""
    top = _quantile(t1, 0.995)
    smooth = _blur(t1, spacing, 4.0)
    head = smooth > 0.12 * top
    head = ~_grown(~head & _border(head), ~head)  # what air does not reach from the sides is head
    inner = _depth(head, spacing, 10.0)
    tissue = inner & (_blur(t1, spacing, 1.5) > 0.25 * _median(t1, inner))
    core = _depth(tissue, spacing, 4.0)
    if not bool(core.any()):
        raise ValueError("brain_phantom: no brain found; t1 needs a whole head, bright in dark air")
    centre = _largest(core)
    brain = ~_depth(~centre, spacing, 8.0) & _depth(head, spacing, 6.0)
    brain = ~_grown(~brain & _border(brain), ~brain)  # ventricles are brain
    weight = brain.float()
    shading = _blur(t1 * weight, spacing, 60.0) / _blur(weight, spacing, 60.0).clamp(min=1e-3)
    return head, brain, t1 / shading.clamp(min=1e-3 * top)


def _three_classes(x: Tensor, mask: Tensor) -> Tensor:
    """0, 1, 2 = CSF, grey, white: CSF is far darker than white matter, the rest is split where 55 % of it is grey."""
    values = x[mask]
    dark = 0.55 * _quantile(values, 0.8)
    return (x > dark).long() + (x > _quantile(values[values > dark], 0.55)).long()


def _cover(grid: VolumeGrid, centre: tuple[float, float, float], half_axes: tuple[float, float, float]) -> Tensor:
    """Share of every voxel inside an ellipsoid, from 3 x 3 x 3 points of it."""
    total = torch.zeros(grid.shape)
    axes = [
        [(torch.arange(n) - (n - 1) / 2 + o / 3) * s - c for o in (-1, 0, 1)]
        for n, s, c in zip(grid.shape, grid.spacing_mm, centre, strict=True)
    ]
    z, y, x = ([(v / a).square() for v in axis] for axis, a in zip(axes, half_axes, strict=True))
    for a in z:
        for b in y:
            for c in x:
                total += (a[:, None, None] + b[:, None] + c) <= 1
    return total / 27


def _blur(x: Tensor, spacing: tuple[float, float, float], fwhm_mm: float) -> Tensor:
    for axis in range(3):
        sigma = fwhm_mm / _FWHM / spacing[axis]
        half = math.ceil(3 * sigma)
        if sigma < 0.15 or x.shape[axis] == 1:
            continue
        t = torch.arange(-half, half + 1, dtype=torch.float32)
        k = torch.exp(-0.5 * (t / sigma) ** 2)
        y = x.float().movedim(axis, -1)
        flat = F.conv1d(F.pad(y.reshape(-1, 1, y.shape[-1]), (half, half), mode="constant"), (k / k.sum())[None, None])
        x = flat.reshape(y.shape).movedim(-1, axis)
    return x.contiguous()


def _resize(x: Tensor, size: list[int]) -> Tensor:
    return F.interpolate(x[:, None], size=size, mode="bilinear", antialias=True)[:, 0]


def _depth(mask: Tensor, spacing: tuple[float, float, float], mm: float) -> Tensor:
    """Voxels of the mask at least about `mm` from its outside, within the slice."""
    ry, rx = (max(1, round(mm / s)) for s in spacing[1:])
    outside = (~mask).float()[:, None]
    y, x = torch.arange(-ry, ry + 1)[:, None] / ry, torch.arange(-rx, rx + 1)[None] / rx
    disc = ((y * y + x * x) <= 1).float()
    near = F.conv2d(F.pad(outside, (rx, rx, ry, ry), value=1.0), disc[None, None])
    return mask & (near[:, 0] < 0.5)


def _border(mask: Tensor) -> Tensor:
    """Voxels at the sides of each slice."""
    edge = torch.zeros_like(mask)
    edge[:, [0, -1], :] = True
    edge[:, :, [0, -1]] = True
    return edge


def _grown(seed: Tensor, within: Tensor, across: bool = False) -> Tensor:
    """The seed grown inside `within` until it stops, in each slice or `across` slices too."""
    reach = (3, 3, 3) if across else (1, 3, 3)
    pad = tuple(r // 2 for r in reach)
    now, count = seed & within, -1
    for _ in range(2 * max(seed.shape)):
        for _ in range(4):
            now = (F.max_pool3d(now.float()[None, None], reach, stride=1, padding=pad)[0, 0] > 0) & within
        if int(now.sum()) == count:
            break
        count = int(now.sum())
    return now


def _largest(mask: Tensor) -> Tensor:
    """The connected part around the voxel deepest inside the mask."""
    deep = F.avg_pool3d(mask.float()[None, None], (1, 31, 31), stride=1, padding=(0, 15, 15))[0, 0] * mask
    seed = torch.zeros_like(mask)
    seed.view(-1)[int(deep.argmax())] = True
    return _grown(seed, mask, across=True)


def _quantile(x: Tensor, q: float) -> float:
    flat = x.flatten()
    return float(torch.quantile(flat[:: max(1, flat.numel() // 1_000_000)], q))


def _median(x: Tensor, mask: Tensor) -> float:
    return float(x[mask].median())


def _triple(values: Sequence[float]) -> tuple[float, float, float]:
    a, b, c = values
    return a, b, c


def _triple_int(values: Sequence[int]) -> tuple[int, int, int]:
    a, b, c = values
    return a, b, c

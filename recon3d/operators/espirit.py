"""ESPIRiT: coil maps from the fully sampled centre of k-space, for all slices at once.

Patches of the calibration region span a small space of k-space kernels; with Pi the projection onto it, the maps at
pixel x are the leading eigenvector of

    G_cd(x) = 1/k^2 sum over lags of P_cd(lag) exp(2 pi i lag x / N),     P_cd(lag) = sum over a - b = lag of Pi_ca,db

whose eigenvalue is 1 where the object is and falls outside (Uecker et al., MRM 71 (2014) 990). G has (2k-1)^2 lags
only, so it is evaluated by two small matrix products instead of a transform per kernel, for a few rows at a time;
power iterations start from the maps on a grid of every fourth pixel.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from recon3d.geometry import Trajectory
from recon3d.operators.fourier import centred_fft, centred_ifft
from recon3d.ops.cg import solve
from recon3d.ops.nufft import nufft_adjoint, nufft_normal, nufft_plan

__all__ = ["calibration_region", "espirit", "gridded_calibration"]

# of the grid where power iterations start from scratch, in pixels
_COARSE = 4
_COARSE_ITERATIONS = 40
# of the cells of a calibration region hold a sample where spokes are dense enough
_DENSE = 0.9
# bytes of G that are worked on at a time; fits the second or third level cache
_BLOCK_BYTES = {"cpu": 8 * 2**20, "cuda": 512 * 2**20}


def espirit(
    kspace: Tensor,
    calibration: int | tuple[int, int] = 24,
    kernel: int = 6,
    threshold: float = 0.02,
    crop: float = 0.8,
    iterations: int = 5,
    shape: tuple[int, int] | None = None,
) -> Tensor:
    """Coil maps of every slice.

    Args:
        kspace: [slice, coil, ky, kx] complex, zero where not sampled; prewhitened is best.
        calibration: points along ky and kx at most; the largest fully sampled centre within them is used.
        kernel: side of the k-space kernels in points.
        threshold: singular values of the calibration matrix above this part of the largest span the kernels.
        crop: maps are zero where the eigenvalue is below; 0.8 (generous) to 0.95 (tight).
        iterations: power iterations at full resolution.
        shape: (y, x) of the maps; None takes the k-space's. A k-space that is a calibration region only needs it.

    Returns:
        [slice, coil, y, x] with sum over coils of |S|^2 = 1 inside the object and 0 outside. The phase is such that the
        principal virtual coil, one for all slices, is real and positive.

    Raises:
        ValueError: no fully sampled centre of kernel + 2 points at least, or a number out of range.
        TypeError: real k-space.
    """
    _check(kspace, kernel, threshold, crop, iterations)
    region = calibration_region(kspace, calibration)
    low = kernel + 2
    if min(region.shape[-2:]) < low:
        found = " x ".join(str(n) for n in region.shape[-2:])
        raise ValueError(
            f"espirit: the fully sampled centre of k-space is {found} points, kernels of {kernel} need {low} x {low}; "
            "give coil maps, a calibration scan, or a smaller kernel"
        )
    slices, coils = kspace.shape[:2]
    ny, nx = shape or (kspace.shape[-2], kspace.shape[-1])
    reference = _virtual_coil(region)
    maps = kspace.new_empty((slices, coils, ny, nx))
    block = _BLOCK_BYTES.get(kspace.device.type, 2**29)
    together = 1 if kspace.device.type == "cpu" else max(1, block // (coils * coils * nx * 8 * 16))
    for first in range(0, slices, together):
        part = slice(first, first + together)
        lags = _lags(region[part], kernel, threshold)
        maps[part] = _leading(lags, (ny, nx), kernel, crop, iterations, reference, block)
    return maps


def calibration_region(kspace: Tensor, size: int | tuple[int, int] = 24) -> Tensor:
    """The largest fully sampled centre of every slice, at most `size` points along ky and kx.

    Args:
        kspace: [slice, coil, ky, kx] complex, zero where not sampled.
        size: points along both axes, or (ky, kx).

    Returns:
        [slice, coil, cy, cx], empty where the centre itself was not sampled.

    Raises:
        ValueError: wrong shape.
    """
    if kspace.ndim != 4:
        raise ValueError(f"calibration_region: expected [slice, coil, ky, kx], got {tuple(kspace.shape)}")
    most = (size, size) if isinstance(size, int) else size
    ny, nx = kspace.shape[-2:]
    wy, wx = min(most[0], ny), min(most[1], nx)
    # the centre stays where index N//2 is
    top, left = ny // 2 - wy // 2, nx // 2 - wx // 2
    box = kspace[..., top : top + wy, left : left + wx]
    missing = ~(box != 0).any(1).all(0).cpu()
    if not bool(missing.any()):
        return box
    best, area = (0, 0), 0
    sums = torch.nn.functional.pad(missing.long().cumsum(0).cumsum(1), (1, 0, 1, 0))
    for h in range(wy, 0, -1):
        for w in range(wx, 0, -1):
            y, x = wy // 2 - h // 2, wx // 2 - w // 2
            holes = int(sums[y + h, x + w] - sums[y, x + w] - sums[y + h, x] + sums[y, x])
            # a square serves better than a strip of the same area
            if holes == 0 and (min(h, w), h * w) > (min(best), area):
                best, area = (h, w), h * w
    h, w = best
    y, x = wy // 2 - h // 2, wx // 2 - w // 2
    return box[..., y : y + h, x : x + w]


def gridded_calibration(
    kspace: Tensor, trajectory: Trajectory | Sequence[Trajectory], size: int = 24, iterations: int = 12
) -> Tensor:
    """The centre of a non-Cartesian k-space on Cartesian points, for espirit(region, shape=...).

    Least squares on a small grid of the same field of view, from the samples inside the centre alone.

    Args:
        kspace: [slice, coil, sample] complex; or [coil, sample] of a trajectory in space.
        trajectory: one for all slices, or one per slice.
        size: points along each axis at most; fewer where the samples lie dense in a smaller centre only.
        iterations: of conjugate gradients.

    Returns:
        [slice, coil, size, size] with the size found. For a trajectory in space z is transformed back, so that every
        slice of the volume has a region of its own.

    Raises:
        ValueError: shapes that do not fit, or no densely sampled centre of eight points.
    """
    given = (trajectory,) if isinstance(trajectory, Trajectory) else tuple(trajectory)
    spatial = given[0].ndim == 3
    rows = kspace[None] if spatial and kspace.ndim == 2 else kspace
    if rows.ndim != 3 or rows.shape[-1] != given[0].n_samples or len(given) not in (1, rows.shape[0]):
        raise ValueError(
            f"gridded_calibration: expected [slice, coil, sample] with {given[0].n_samples} samples and one trajectory "
            f"or one per slice, got {tuple(kspace.shape)} and {len(given)}"
        )
    size = min(_dense_size(t, size) for t in dict.fromkeys(given))
    if len(given) == 1:
        region = _gridded(rows, given[0], size, iterations)
    else:
        parts = [_gridded(rows[k : k + 1], t, size, iterations) for k, t in enumerate(given)]
        region = torch.cat(parts)
    return _hybrid(region[0], given[0].shape[0]) if spatial else region


def _gridded(rows: Tensor, trajectory: Trajectory, size: int, iterations: int) -> Tensor:
    index = trajectory.as_unit("index")
    # points of the region and what leaks into them
    inside = (index.abs() <= size / 2 + 0.5).all(1)
    shape = (_even(1.5 * size),) * trajectory.ndim
    scale = torch.tensor([2 * math.pi / n for n in shape], dtype=torch.float64)
    plan = nufft_plan(index[inside] * scale, shape, eps=1e-4).to(rows.device)
    y = rows[..., inside.to(rows.device)].flatten(0, 1)
    images = solve(lambda x: nufft_normal(x, plan), nufft_adjoint(y, plan), iterations=iterations, per_slice=True)
    axes = tuple(range(-trajectory.ndim, 0))
    region = centred_fft(images, axes)
    for axis in axes:
        region = region.narrow(axis, shape[0] // 2 - size // 2, size)
    return region.reshape(*rows.shape[:2], *region.shape[1:])


def _dense_size(trajectory: Trajectory, most: int) -> int:
    """Largest even number of Nyquist distances up to `most` across which nine of ten cells hold a sample."""
    reach = most // 2
    cells = trajectory.as_unit("index").round().long() + reach
    cells = cells[((cells >= 0) & (cells <= 2 * reach)).all(1)]
    full = torch.zeros((2 * reach + 1,) * trajectory.ndim, dtype=torch.bool)
    full[tuple(cells.T)] = True
    at = (torch.arange(2 * reach + 1) - reach).square()
    radius = sum(at.reshape([-1 if a == axis else 1 for a in range(full.ndim)]) for axis in range(full.ndim))
    for half in range(reach, 3, -1):
        if float(full[radius <= half**2].double().mean()) >= _DENSE:
            return 2 * half
    raise ValueError(
        "gridded_calibration: the samples are too sparse in the centre of k-space, where eight Nyquist distances "
        "across must be full; give coil maps"
    )


def _hybrid(region: Tensor, slices: int) -> Tensor:
    """[coil, kz, ky, kx] of the centre to [slice, coil, ky, kx] of `slices` slices."""
    size = region.shape[1]
    z = torch.arange(slices, dtype=torch.float64) - slices // 2
    k = torch.arange(size, dtype=torch.float64) - size // 2
    angle = z[:, None] * k * (2 * math.pi / slices)
    waves = torch.polar(torch.ones_like(angle), angle).to(region.device, region.dtype) / math.sqrt(size)
    return torch.einsum("zk,ckyx->zcyx", waves, region)


def _even(n: float) -> int:
    return 2 * math.ceil(n / 2)


def _lags(region: Tensor, kernel: int, threshold: float) -> Tensor:
    """P_cd(lag) / k^2, [slice, coil, coil, 2k-1, 2k-1], from the calibration region [slice, coil, cy, cx]."""
    slices, coils = region.shape[:2]
    patches = region.unfold(2, kernel, 1).unfold(3, kernel, 1)  # [slice, coil, py, px, k, k]
    b = patches.permute(0, 1, 4, 5, 2, 3).reshape(slices, coils * kernel**2, -1)
    scale = b.abs().amax((1, 2), keepdim=True)
    b = b / torch.where(scale > 0, scale, 1.0)
    # eigenvectors of the smaller of the two Gram matrices give the left singular vectors of b
    wide = b.shape[2] > b.shape[1]
    values, vectors = torch.linalg.eigh(b @ b.mH if wide else b.mH @ b)
    kept = values > threshold**2 * values[:, -1:].clamp(min=torch.finfo(values.dtype).tiny)
    if wide:
        u = vectors * kept[:, None]
    else:
        u = b @ (vectors * torch.where(kept, values, 1.0).rsqrt()[:, None] * kept[:, None])
    most = int(kept.sum(1).max())
    u = u[:, :, u.shape[2] - most :]
    pi = (u @ u.mH).reshape(slices, coils, kernel, kernel, coils, kernel, kernel)
    lags = region.new_zeros(slices, coils, coils, 2 * kernel - 1, 2 * kernel - 1)
    for y in range(kernel):
        for x in range(kernel):
            # lag a - b with b = (y, x) runs over a
            rows, columns = slice(kernel - 1 - y, 2 * kernel - 1 - y), slice(kernel - 1 - x, 2 * kernel - 1 - x)
            lags[:, :, :, rows, columns] += pi[:, :, :, :, :, y, x].movedim(-1, 2)
    return lags / kernel**2


def _leading(
    lags: Tensor,
    shape: tuple[int, int],
    kernel: int,
    crop: float,
    iterations: int,
    reference: Tensor,
    block: int,
) -> Tensor:
    """Leading eigenvectors of G, phased, normalised and cropped: [slice, coil, y, x]."""
    slices, coils = lags.shape[:2]
    ny, nx = shape
    ys, xs = torch.arange(0, ny, device=lags.device), torch.arange(0, nx, device=lags.device)
    coarse_y, coarse_x = ys[_COARSE // 2 :: _COARSE], xs[_COARSE // 2 :: _COARSE]
    if len(coarse_y) == 0 or len(coarse_x) == 0:
        coarse_y, coarse_x = ys, xs
    start = reference.to(lags.dtype)[:, None, None].expand(slices, coils, len(coarse_y), len(coarse_x))
    g = _evaluate(lags, coarse_y, coarse_x, shape)
    coarse, _ = _power(g, start + 0.1, _COARSE_ITERATIONS)
    near_y = (ys // _COARSE).clamp(max=len(coarse_y) - 1)
    near_x = (xs // _COARSE).clamp(max=len(coarse_x) - 1)
    out = lags.new_empty(slices, coils, ny, nx)
    rows = max(1, block // (slices * coils * coils * nx * lags.element_size()))
    for first in range(0, ny, rows):
        part = slice(first, min(ny, first + rows))
        v = coarse[:, :, near_y[part]][:, :, :, near_x]
        v, value = _power(_evaluate(lags, ys[part], xs, shape), v, iterations)
        turn = torch.einsum("c,scyx->syx", reference.conj().to(v.dtype), v)
        size = turn.abs()
        turn = torch.where(size > 0, turn.conj() / size, 1.0)
        out[:, :, part] = v * (turn * (value > crop))[:, None]
    return out


def _evaluate(lags: Tensor, ys: Tensor, xs: Tensor, shape: tuple[int, int]) -> Tensor:
    """G on the rows and columns named: [slice, coil, coil, y, x]."""
    reach = lags.shape[-1] // 2
    lag = torch.arange(-reach, reach + 1, device=lags.device, dtype=torch.float64)

    def waves(positions: Tensor, n: int) -> Tensor:
        angle = (positions.double() - n // 2)[:, None] * lag * (2 * math.pi / n)
        return torch.polar(torch.ones_like(angle), angle).to(lags.dtype)

    wy, wx = waves(ys, shape[0]), waves(xs, shape[1])
    return (wy @ lags) @ wx.mT


def _power(g: Tensor, v: Tensor, iterations: int) -> tuple[Tensor, Tensor]:
    """Power iterations from v: unit eigenvectors [slice, coil, y, x] and eigenvalues [slice, y, x]."""
    value = v.new_zeros(v.shape[0], *v.shape[2:], dtype=v.real.dtype)
    for _ in range(iterations):
        w = g[:, :, 0] * v[:, None, 0]
        for d in range(1, v.shape[1]):
            w.addcmul_(g[:, :, d], v[:, None, d])
        value = _length(w)
        v = w / torch.where(value > 0, value, 1.0)[:, None]
    return v, value


def _length(w: Tensor) -> Tensor:
    """The norm over axis 1, coil by coil; torch's own strides across the coils and takes 25 times as long."""
    parts = torch.view_as_real(w)
    total = parts[:, 0].square()
    for c in range(1, w.shape[1]):
        total.addcmul_(parts[:, c], parts[:, c])
    return total.sum(-1).sqrt_()


def _virtual_coil(region: Tensor) -> Tensor:
    """The principal component over the coils of all slices' calibration images, [coil] complex128."""
    rows = centred_ifft(region).movedim(1, 0).flatten(1).to(torch.complex128)
    return torch.linalg.eigh(rows @ rows.mH)[1][:, -1]


def _check(kspace: Tensor, kernel: int, threshold: float, crop: float, iterations: int) -> None:
    if not kspace.is_complex():
        raise TypeError(f"espirit: k-space must be complex, got {kspace.dtype}")
    if kspace.ndim != 4 or kspace.numel() == 0:
        raise ValueError(f"espirit: expected [slice, coil, ky, kx], got {tuple(kspace.shape)}")
    if kernel < 2:
        raise ValueError(f"espirit: kernel must be at least 2 points, got {kernel}")
    if not (0 < threshold < 1 and 0 <= crop < 1):
        raise ValueError(f"espirit: threshold and crop must lie between 0 and 1, got {threshold} and {crop}")
    if iterations < 1:
        raise ValueError(f"espirit: iterations must be at least 1, got {iterations}")

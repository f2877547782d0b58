"""A volume against a reference: every figure per plane and for the volume, with its definition beside it."""

from __future__ import annotations

import math
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from recon3d.geometry import VolumeGrid
from recon3d.metrics import figures as f

# the axis of [z, y, x] that a plane's slices are counted along
PLANES = {"axial": 0, "coronal": 1, "sagittal": 2}

# a slice with less contrast than this share of the data range is air or padding; its SSIM compares noise with nothing
_LEAST_CONTRAST = 0.01


def compare(
    volume: Tensor | NDArray[np.floating],
    reference: Tensor | NDArray[np.floating],
    grid: VolumeGrid,
    data_range: float | None = None,
    mask: Tensor | NDArray[np.bool_] | None = None,
    *,
    unit: Literal["per_mm", "hu", "au"] = "per_mm",
    window: tuple[float, float] | None = None,
    mu_water_per_mm: float = 0.0193,
) -> dict[str, Any]:
    """All figures of a volume against a reference, ready for JSON.

    Args:
        volume: [z, y, x].
        reference: what it should be, same shape and unit; it is never used for anything but these figures.
        grid: their grid; gives the slice distance.
        data_range: range R of PSNR and SSIM in the compared unit (HU for CT); None takes the window's width.
        mask: voxels that count, such as the field of view; None counts all.
        unit: of both volumes; "per_mm" and "hu" are compared in HU, "au" as they stand.
        window: values outside are clipped before PSNR and SSIM, and only there; None takes [-1000, 1000] HU for CT, and
            for "au" no clipping.
        mu_water_per_mm: attenuation of water that "per_mm" is converted with.

    Returns:
        a dictionary with "definitions" of every figure, "settings", "volume", "axial", "coronal", "sagittal",
        "planes_mean" and "through_plane". A plane thinner than the SSIM window has SSIM None.

    Raises:
        ValueError: shapes differ, a value is not finite, the mask is empty, or "au" comes without a data range.
    """
    x, r = _array("volume", volume), _array("reference", reference)
    if x.shape != r.shape or x.shape != grid.shape:
        raise ValueError(f"compare: volume {x.shape}, reference {r.shape} and grid {grid.shape} must have one shape")
    inside = None if mask is None else _mask(mask, x.shape)
    if unit not in ("per_mm", "hu", "au"):
        raise ValueError(f"compare: unit must be 'per_mm', 'hu' or 'au', got {unit!r}")
    if unit == "per_mm":
        x, r = (x / mu_water_per_mm - 1) * 1000, (r / mu_water_per_mm - 1) * 1000
    if unit != "au" and window is None and data_range is None:
        window = (-1000.0, 1000.0)
    if window is not None:
        if not window[0] < window[1]:
            raise ValueError(f"compare: window must be (low, high) with low < high, got {window}")
        data_range = window[1] - window[0] if data_range is None else data_range
    if data_range is None:
        raise ValueError("compare: data_range is needed for 'au'; give it or a window")
    if not (math.isfinite(data_range) and data_range > 0):
        raise ValueError(f"compare: data_range must be positive, got {data_range}")
    xc, rc = (x, r) if window is None else (x.clip(*window), r.clip(*window))

    shown = "au" if unit == "au" else "HU"
    # NMSE needs a zero that means nothing is there: attenuation, not HU
    zero = 0.0 if unit == "au" else 1000.0
    result: dict[str, Any] = {
        "settings": {
            "unit": shown,
            "data_range": float(data_range),
            "window": None if window is None else [float(w) for w in window],
            "mask_voxels": None if inside is None else int(inside.sum()),
            "spacing_mm": list(grid.spacing_mm),
            "shape": list(grid.shape),
        },
        "volume": {
            "psnr_db": f.psnr(xc, rc, data_range, inside),
            "rmse": f.rmse(x, r, inside),
            "nmse": f.nmse(x + zero, r + zero, inside),
        },
    }
    for plane, axis in PLANES.items():
        result[plane] = _plane(xc, rc, axis, data_range, inside)
    means = {}
    for key in ("psnr_db", "ssim"):
        values = [result[plane][key] for plane in PLANES if result[plane][key] is not None]
        means[key] = float(np.mean(values)) if values else None
    result["planes_mean"] = means
    result["through_plane"] = _finite(f.through_plane(x, r, grid.spacing_mm[0], inside)) if x.shape[0] > 1 else None
    result["definitions"] = _definitions(shown, data_range, window, inside is not None)
    return result


def data_fit(
    predicted: Tensor | NDArray[np.floating],
    measured: Tensor | NDArray[np.floating],
    weights: Tensor | NDArray[np.floating] | None = None,
) -> dict[str, Any]:
    """How well a volume explains its measurement.

    Args:
        predicted: projections of the volume, A x.
        measured: y, same shape and unit.
        weights: one over the variance of each ray, same shape; None when the noise level is not known.

    Returns:
        "relative_residual" |A x - y| / |y|, "chi2_per_ray" (None without weights) and their definitions.

    Raises:
        ValueError: shapes differ or a value is not finite.
    """
    p, y = _array("predicted", predicted).astype(np.float64), _array("measured", measured).astype(np.float64)
    if p.shape != y.shape:
        raise ValueError(f"data_fit: predicted {p.shape} and measured {y.shape} must have one shape")
    squared = (p - y) ** 2
    power = float((y**2).sum())
    chi2 = None
    if weights is not None:
        w = _array("weights", weights)
        if w.shape != y.shape:
            raise ValueError(f"data_fit: weights {w.shape} must have the measurement's shape {y.shape}")
        used = int((w > 0).sum())
        chi2 = float((squared * w).sum() / used) if used else None
    return {
        "relative_residual": math.sqrt(float(squared.sum()) / power) if power > 0 else None,
        "chi2_per_ray": chi2,
        "definitions": {
            "relative_residual": "|A x - y| / |y| over all rays, Euclidean norms",
            "chi2_per_ray": "sum of w (A x - y)^2 / number of rays with w > 0, w = 1 / variance of the ray; 1 when the "
            "volume leaves exactly the noise, below 1 when it fits noise, above when it misses signal",
        },
    }


def _plane(
    x: NDArray[Any], r: NDArray[Any], axis: int, data_range: float, mask: NDArray[np.bool_] | None
) -> dict[str, Any]:
    x, r = np.moveaxis(x, axis, 0), np.moveaxis(r, axis, 0)
    m = None if mask is None else np.moveaxis(mask, axis, 0)
    kept = [k for k in range(len(r)) if _has_contrast(r[k], None if m is None else m[k], data_range)]
    out: dict[str, Any] = {"psnr_db": None, "ssim": None, "slices": len(kept), "slices_left_out": len(r) - len(kept)}
    if kept:
        out["psnr_db"] = float(np.mean([f.psnr(x[k], r[k], data_range, None if m is None else m[k]) for k in kept]))
        if min(x.shape[1:]) >= f.SSIM_WINDOW:
            values = f.ssim(x[kept], r[kept], data_range, None if m is None else m[kept])
            values = values[~np.isnan(values)]
            out["ssim"] = float(values.mean()) if values.size else None
    return out


def _has_contrast(r: NDArray[Any], mask: NDArray[np.bool_] | None, data_range: float) -> bool:
    values = r if mask is None else r[mask]
    return bool(values.size and values.std(dtype=np.float64) > _LEAST_CONTRAST * data_range)


def _definitions(unit: str, data_range: float, window: tuple[float, float] | None, masked: bool) -> dict[str, str]:
    clip = "" if window is None else f", both volumes clipped to [{window[0]:g}, {window[1]:g}] {unit} before"
    where = "over the mask" if masked else "over all voxels"
    size = f.SSIM_WINDOW
    return {
        "psnr_db": f"10 log10(R^2 / MSE) in dB, R = {data_range:g} {unit}{clip}; at most {f.PSNR_CAP_DB:g} dB; {where}",
        "ssim": f"Wang et al. 2004: uniform {size}x{size} window, sample covariances, K1 = 0.01, K2 = 0.03, "
        f"L = {data_range:g} {unit}{clip}; mean over windows that lie inside the slice, {where}",
        "planes": "mean over the slices of a plane on the voxel grid, not resampled; slices along y are coronal, "
        f"along x sagittal; slices whose clipped reference varies by a standard deviation of at most "
        f"{_LEAST_CONTRAST:g} R are left out (air, padding)",
        "planes_mean": "mean of the three planes",
        "rmse": f"root of the mean squared error in {unit}, unclipped, {where}",
        "nmse": "sum of squared errors / sum of squares of the reference, "
        + ("as they stand" if unit == "au" else "of attenuation (HU + 1000)")
        + f", unclipped, {where}",
        "through_plane": f"gradient: mean |x[k+1] - x[k]| / dz in {unit}/mm, unclipped; ratio: that over the "
        "reference's (below 1: slices smoothed into each other, above 1: they jitter); "
        "error: mean |dx - dr| / mean |dr|",
    }


def _array(name: str, values: Tensor | NDArray[Any]) -> NDArray[Any]:
    array = values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)
    if array.dtype.kind not in "fiu":
        raise ValueError(f"compare: {name} needs real numbers, got {array.dtype}")
    array = array if array.dtype.kind == "f" else array.astype(np.float32)
    if not np.isfinite(array).all():
        raise ValueError(f"compare: {name} holds NaN or infinity")
    return array


def _mask(mask: Tensor | NDArray[Any], shape: tuple[int, ...]) -> NDArray[np.bool_]:
    array = (mask.detach().cpu().numpy() if isinstance(mask, Tensor) else np.asarray(mask)).astype(bool)
    if array.shape != shape:
        raise ValueError(f"compare: mask {array.shape} must have the volume's shape {shape}")
    if not array.any():
        raise ValueError("compare: the mask leaves no voxel")
    return array


def _finite(values: dict[str, float]) -> dict[str, float | None]:
    return {key: value if math.isfinite(value) else None for key, value in values.items()}

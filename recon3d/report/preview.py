"""One picture of a reconstruction: axial, coronal and sagittal, methods side by side, in true proportions."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from recon3d.geometry import VolumeGrid
from recon3d.io.atomic import atomic_write
from recon3d.io.units import MU_WATER_PER_MM, mu_to_hu
from recon3d.metrics import PLANES

_LUNG = (-1000.0, 400.0)
_SOFT_TISSUE = (-200.0, 300.0)
_ERROR_HU = 200.0
_PANEL_INCHES = 2.6
# fewer slices than this across a plane show nothing
_LEAST_SLICES = 6
_DPI = 110


def preview(
    path: str | os.PathLike[str],
    volumes: Mapping[str, Tensor | NDArray[np.floating]],
    grid: VolumeGrid,
    reference: Tensor | NDArray[np.floating] | None = None,
    metrics: Mapping[str, Mapping[str, Any]] | None = None,
    *,
    unit: Literal["hu", "per_mm", "au"] = "hu",
    window: tuple[float, float] | None = None,
    at: tuple[int, int, int] | None = None,
    errors: bool = True,
    title: str = "",
    mu_water_per_mm: float = MU_WATER_PER_MM,
) -> None:
    """Writes a PNG; the file appears whole or not at all.

    Args:
        path: the picture.
        volumes: by the method's name, [z, y, x] in 1/mm (or "au"), in the order of the columns.
        grid: grid of all of them; its spacing gives the proportions.
        reference: shown first if given, [z, y, x], in the unit of the volumes.
        metrics: by the method's name, what `recon3d.metrics.compare` returns; PSNR and SSIM stand over each plane.
        unit: what the grey scale is in: "hu", "per_mm" for objects that are not patients, "au" for magnitudes of MRI.
        window: darkest and brightest value in that unit; None takes a lung or a soft-tissue window by content, the
            percentiles 0.5 and 99.5 for "per_mm", 0 and the percentile 99.5 for "au".
        at: voxel (z, y, x) the planes pass through; None takes the middle.
        errors: with a reference, adds a row of axial errors.
        title: a line on top.
        mu_water_per_mm: attenuation of water.

    Raises:
        ValueError: no volume, a shape that is not the grid's, or a point outside.
        OSError: the folder is missing, read-only or full.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if not volumes:
        raise ValueError("preview: at least one volume is needed")
    if unit not in ("hu", "per_mm", "au"):
        raise ValueError(f"preview: unit must be 'hu', 'per_mm' or 'au', got {unit!r}")
    panels = {"reference": reference, **volumes} if reference is not None else dict(volumes)
    shown = {name: _values(name, volume, grid, unit, mu_water_per_mm) for name, volume in panels.items()}
    point = at if at is not None else tuple(n // 2 for n in grid.shape)
    if len(point) != 3 or any(not 0 <= p < n for p, n in zip(point, grid.shape, strict=True)):
        raise ValueError(f"preview: at must be a voxel (z, y, x) of {grid.shape}, got {at}")
    first = next(iter(shown.values()))
    low, high = window if window is not None else _window(first, unit)
    planes = [p for p, axis in PLANES.items() if p == "axial" or grid.shape[0] >= _LEAST_SLICES]
    sizes = {p: _millimetres(grid, PLANES[p]) for p in planes}
    with_errors = errors and reference is not None

    widest = max(width for _, width in sizes.values())
    heights = [sizes[p][0] / widest for p in planes] + ([sizes["axial"][0] / widest] if with_errors else [])
    inches = _PANEL_INCHES
    figure = Figure(figsize=(inches * len(shown) + 0.7, inches * sum(heights) + 0.32 * len(heights) + 0.55), dpi=_DPI)
    FigureCanvasAgg(figure)
    figure.set_layout_engine("constrained", w_pad=0.02, h_pad=0.02)
    figure.set_facecolor("white")
    axes = figure.subplots(len(heights), len(shown), squeeze=False, height_ratios=heights)
    for row, plane in enumerate(planes):
        axis = PLANES[plane]
        for column, (name, values) in enumerate(shown.items()):
            _panel(axes[row][column], _slice(values, axis, point[axis]), sizes[plane], "gray", low, high)
            caption = _caption(name, plane, metrics)
            axes[row][column].set_title(f"{name}\n{caption}" if row == 0 else caption, fontsize=8)
        axes[row][0].set_ylabel(plane, fontsize=8)
    label = {"hu": "HU", "per_mm": "1/mm", "au": "a.u."}[unit]
    _bar(figure, axes[0][-1].images[0], list(axes[: len(planes), -1]), label)
    if with_errors:
        limit = _ERROR_HU if unit == "hu" else (high - low) / 4
        for column, (name, values) in enumerate(shown.items()):
            panel = axes[-1][column]
            if name == "reference":
                panel.set_axis_off()
                continue
            difference = _slice(values - first, 0, point[0])
            _panel(panel, difference, sizes["axial"], "RdBu_r", -limit, limit)
            panel.set_title("minus reference", fontsize=8)
        _bar(figure, axes[-1][-1].images[0], axes[-1][-1], label)
    if title:
        figure.suptitle(title, fontsize=9)
    with atomic_write(path) as file:
        figure.savefig(file, format="png", metadata={"Software": "recon3d"})


def _values(
    name: str, volume: Tensor | NDArray[Any], grid: VolumeGrid, unit: str, mu_water_per_mm: float
) -> NDArray[np.float32]:
    values = volume.detach().cpu().numpy() if isinstance(volume, Tensor) else np.asarray(volume)
    if values.shape != grid.shape:
        raise ValueError(f"preview: {name} has shape {values.shape}, the grid {grid.shape}")
    values = values.astype(np.float32, copy=False)
    return mu_to_hu(values, mu_water_per_mm) if unit == "hu" else values


def _window(values: NDArray[np.float32], unit: str) -> tuple[float, float]:
    if unit == "hu":
        # lungs fill a good part of a chest with -950 to -600 HU, and nothing else does
        inside = values[values > -980]
        lung = inside.size > 0 and float(((inside > -950) & (inside < -600)).mean()) > 0.08
        return _LUNG if lung else _SOFT_TISSUE
    low, high = np.percentile(values, (0.5, 99.5))
    low = 0.0 if unit == "au" else low
    return float(low), float(max(high, low + 1e-6))


def _millimetres(grid: VolumeGrid, axis: int) -> tuple[float, float]:
    """Height and width of a plane's slices."""
    rows, columns = (k for k in range(3) if k != axis)
    return grid.shape[rows] * grid.spacing_mm[rows], grid.shape[columns] * grid.spacing_mm[columns]


def _slice(values: NDArray[np.float32], axis: int, index: int) -> NDArray[np.float32]:
    picture = np.take(values, index, axis)
    return picture if axis == 0 else picture[::-1]  # the head is up


def _panel(
    axes: Any, picture: NDArray[np.float32], size_mm: tuple[float, float], colours: str, low: float, high: float
) -> None:
    height, width = size_mm
    axes.imshow(
        picture,
        cmap=colours,
        vmin=low,
        vmax=high,
        extent=(0, width, height, 0),
        aspect="equal",
        interpolation="nearest",
    )
    axes.set_xticks([])
    axes.set_yticks([])


def _bar(figure: Any, picture: Any, axes: Any, label: str) -> None:
    bar = figure.colorbar(picture, ax=axes, fraction=0.06, pad=0.02)
    bar.set_label(label, fontsize=8)
    bar.ax.tick_params(labelsize=7)


def _caption(name: str, plane: str, metrics: Mapping[str, Mapping[str, Any]] | None) -> str:
    figures = (metrics or {}).get(name, {}).get(plane)
    if not figures or figures.get("psnr_db") is None:
        return ""
    ssim = "" if figures.get("ssim") is None else f"   SSIM {figures['ssim']:.3f}"
    return f"{figures['psnr_db']:.2f} dB{ssim}"

"""Pictures of a run: what the prior makes of held-out slices, and images drawn from it alone."""

from __future__ import annotations

import io
from pathlib import Path

import torch
from torch import Tensor

from recon3d.priors.checkpoints.atomic import write_bytes
from recon3d.priors.training.validation import Measured

__all__ = ["write_denoised", "write_samples"]


def write_denoised(path: Path, found: Measured, clean: Tensor, slices: int, is_complex: bool) -> None:
    """A row per noise level: noisy and denoised slices in turn; the last row shows them clean."""
    window = _window(_grey(clean, slices, is_complex))
    rows, names = [], []
    for level, denoised in found.denoised.items():
        pair = zip(_grey(found.noisy[level], slices, is_complex), _grey(denoised, slices, is_complex), strict=True)
        rows.append([image for both in pair for image in both])
        names.append(f"sigma {level:g}")
    shown = _grey(clean, slices, is_complex)[: len(rows[0]) // 2]
    rows.append([image for x in shown for image in (x, x)])
    names.append("clean")
    _write(path, rows, names, ["noisy", "denoised"] * len(shown), window)


def write_samples(path: Path, images: Tensor, clean: Tensor, slices: int, is_complex: bool) -> None:
    """Images drawn from the prior, in the grey window of the held-out slices."""
    window = _window(_grey(clean, slices, is_complex))
    grey = list(_grey(images, slices, is_complex))
    across = min(len(grey), 4)
    rows = [grey[k : k + across] for k in range(0, len(grey), across)]
    rows[-1] += [torch.full_like(grey[0], window[0])] * (across - len(rows[-1]))
    _write(path, rows, [""] * len(rows), [""] * across, window)


def _grey(x: Tensor, slices: int, is_complex: bool) -> Tensor:
    """[n, row, col]: the middle slice's channel, or its magnitude."""
    middle = slices // 2
    if is_complex:  # all real parts, then all imaginary ones
        return torch.hypot(x[:, middle], x[:, slices + middle])
    return x[:, middle]


def _window(x: Tensor) -> tuple[float, float]:
    """Grey values from black to white: all but the outermost 1 % of the values."""
    values = x.flatten()[:: max(1, x.numel() // 100_000)]  # quantile takes no more than some millions
    low, high = torch.quantile(values, torch.tensor([0.01, 0.99], device=values.device)).tolist()
    return (low, high) if high > low else (low, low + 1.0)


def _write(
    path: Path, rows: list[list[Tensor]], names: list[str], heads: list[str], window: tuple[float, float]
) -> None:
    from matplotlib.figure import Figure

    mosaic = torch.cat([torch.cat(row, dim=1) for row in rows], dim=0).cpu().numpy()
    h, w = rows[0][0].shape
    # at least a screen pixel per image pixel, small images larger
    zoom = max(1, 96 // max(h, w)) / 100
    figure = Figure(figsize=(mosaic.shape[1] * zoom + 0.9, mosaic.shape[0] * zoom + 0.4), layout="constrained")
    axes = figure.add_subplot()
    axes.imshow(mosaic, cmap="gray", vmin=window[0], vmax=window[1], interpolation="nearest")
    axes.set_yticks([h * (k + 0.5) for k in range(len(rows))], names)
    axes.set_xticks([w * (k + 0.5) for k in range(len(heads))], heads)
    axes.tick_params(length=0, labeltop=True, labelbottom=False)
    for side in axes.spines.values():
        side.set_visible(False)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=100)
    write_bytes(path, picture.getvalue())

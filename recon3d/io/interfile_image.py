"""Interfile images: a .hv header and raw numbers, [z, y, x] with STIR's z from the gantry to the bed."""

from __future__ import annotations

import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from recon3d.geometry import VolumeGrid
from recon3d.io.atomic import atomic_write
from recon3d.io.guard import DEFAULT_LIMITS, BadInput, Limits, check_array, check_file, check_finite, check_spacing
from recon3d.io.interfile_bins import is_image, read_info
from recon3d.io.interfile_header import InterfileHeader, read_interfile_header
from recon3d.io.interfile_write import dose_lines, frame_lines, position_lines
from recon3d.io.pet import PETInfo, check_counts, patient_grid


def read_interfile_image(
    path: str | os.PathLike[str], limits: Limits = DEFAULT_LIMITS
) -> tuple[Tensor, VolumeGrid, PETInfo]:
    """An image [z, y, x] float32 with its grid; z is turned round to point to the head of a patient head first.

    The middle of an image that states no offset along z is taken as the middle of the scanner.

    Raises:
        BadInput: it is no image, or its data are damaged.
    """
    header = read_interfile_header(path)
    if not is_image(header):
        raise BadInput(path, "describes no image", "use it where a sinogram is asked for")
    grid, dtype = _image(header)
    info = read_info(header)
    data = header.data_file()
    if not data.is_file():
        raise BadInput(path, f"names the data file {data.name!r}, which is not there", "put it beside")
    stored, offset = check_file(data), header.offset()
    needed = math.prod(grid.shape) * dtype.itemsize
    if stored - offset != needed:
        raise BadInput(
            path,
            f"describes {' x '.join(map(str, grid.shape))} voxels of {dtype.itemsize} bytes ({needed} bytes), "
            f"{data.name} has {max(0, stored - offset)} after its offset of {offset}",
            "header and data must belong together",
        )
    check_array(path, "the image", grid.shape, 4 + dtype.itemsize, 1 << 62, False, limits)
    raw = np.fromfile(data, dtype, math.prod(grid.shape), offset=offset)
    if raw.size != math.prod(grid.shape):
        raise BadInput(data, "changed while it was read", "try again")
    check_counts(data, "voxels", raw, "corrected")
    scale = header.scale()
    values = raw.astype(np.float32) if scale == 1.0 else (raw * scale).astype(np.float32)
    check_finite(data, "the image", values)
    return torch.from_numpy(np.ascontiguousarray(values.reshape(grid.shape)[::-1])), grid, info


def write_interfile_image(
    path: str | os.PathLike[str],
    volume: Tensor | NDArray[np.floating],
    grid: VolumeGrid,
    info: PETInfo | None = None,
) -> None:
    """An image as STIR reads it: `path` ending in .hv, and the numbers beside it in .v; each whole or not at all.

    Args:
        path: the header.
        volume: [z, y, x] in the scanner's frame.
        grid: shape and spacing; its affine must be that of `info.position`, possibly shifted.
        info: time and dose for the header.

    Raises:
        ValueError: sizes disagree, a value is not finite, or the grid is turned against the scanner.
        OSError: the folder is missing, read-only or full.
    """
    path = Path(path)
    info = info or PETInfo()
    if path.suffix != ".hv":
        raise ValueError(f"write_interfile_image: the name must end in .hv, got {path.name}")
    array = volume.detach().cpu().numpy() if isinstance(volume, Tensor) else np.asarray(volume)
    if array.shape != grid.shape:
        raise ValueError(f"write_interfile_image: the volume is {array.shape}, its grid {grid.shape}")
    if not np.isfinite(array).all():
        raise ValueError("write_interfile_image: the volume holds NaN or infinity; nothing was written")
    turn = patient_grid(replace(grid, affine=None), info.position).matrix()
    mine = grid.matrix()
    if not np.allclose(mine[:3, :3], turn[:3, :3], atol=1e-4):
        raise ValueError(f"write_interfile_image: the grid's axes are not those of a patient lying {info.position}")
    # where the middle lies, in the scanner's frame (x, y, z)
    shift = np.linalg.solve(turn[:3, :3], mine[:3, 3] - turn[:3, 3]) * np.asarray(grid.spacing_mm[::-1])
    _, ny, nx = grid.shape
    _, dy, dx = grid.spacing_mm
    first = (shift[0] - (nx - 1) / 2 * dx, shift[1] - (ny - 1) / 2 * dy, 0.0 - shift[2])
    data = path.with_suffix(".v")
    with atomic_write(data) as file:
        for part in array[::-1]:
            file.write(np.ascontiguousarray(part, dtype="<f4").tobytes())
    lines = [
        *(
            "!INTERFILE  :=",
            "!imaging modality := PT",
            "!version of keys := STIR6.0",
            f"name of data file := {data.name}",
        ),
        *("!GENERAL DATA :=", *position_lines(info), "!GENERAL IMAGE DATA :=", "!type of data := PET"),
        *("imagedata byte order := LITTLEENDIAN", *dose_lines(info)),
        *("!PET STUDY (General) :=", "!PET data type := Image", "process status := Reconstructed"),
        *("!number format := float", "!number of bytes per pixel := 4", "number of dimensions := 3"),
    ]
    for k, (label, size, step, start) in enumerate(
        zip("xyz", grid.shape[::-1], grid.spacing_mm[::-1], first, strict=True), start=1
    ):
        lines += [
            f"matrix axis label [{k}] := {label}",
            f"!matrix size [{k}] := {size}",
            f"scaling factor (mm/pixel) [{k}] := {step!r}",
            f"first pixel offset (mm) [{k}] := {float(start)!r}",
        ]
    lines += [*frame_lines(info), "!END OF INTERFILE :="]
    with atomic_write(path) as file:
        file.write(("\n".join(lines) + "\n").encode())


def describe_interfile_image(header: InterfileHeader) -> dict[str, Any]:
    """From the header alone."""
    grid, dtype = _image(header)
    return {
        "format": "Interfile image",
        "shape_zyx": list(grid.shape),
        "spacing_zyx_mm": list(grid.spacing_mm),
        "dtype": str(dtype),
        "data": header.data_file().name,
    }


def _image(header: InterfileHeader) -> tuple[VolumeGrid, np.dtype[Any]]:
    path = header.path
    sizes, steps, first = [], [], []
    for k, label in enumerate("xyz", start=1):
        said = (header.text("matrix axis label", index=k) or label).lower()
        if said != label:
            raise BadInput(path, f"has the axis {said[:40]!r} as number {k}", "x, y, z are expected")
        size = header.whole("matrix size", index=k, low=1, high=1 << 20)
        step = header.number("scaling factor (mm/pixel)", "scale factor (mm/pixel)", index=k)
        header.required(f"matrix size [{k}]", size)
        header.required(f"scaling factor (mm/pixel) [{k}]", step)
        sizes.append(int(size or 0))
        steps.append(check_spacing(path, f"the voxel size along {label}", float(step or 0)))
        offset = header.number("first pixel offset (mm)", index=k)
        # without an offset STIR has pixel n // 2 on the axis, and the first plane at the first ring
        first.append(offset if offset is not None else 0.0 if label == "z" else -(sizes[-1] // 2) * steps[-1])
    if (header.whole("number of dimensions") or 3) != 3:
        raise BadInput(path, "has not three dimensions", "one image is read")
    info = read_info(header)
    middle = [first[k] + (sizes[k] - 1) / 2 * steps[k] for k in range(2)]
    shift = np.array([middle[0], middle[1], -first[2]])
    grid = VolumeGrid((sizes[2], sizes[1], sizes[0]), (steps[2], steps[1], steps[0]))
    if np.abs(shift).max() < 1e-6:
        return patient_grid(grid, info.position), header.dtype()
    matrix = patient_grid(grid, info.position).matrix()
    matrix[:3, 3] += matrix[:3, :3] @ (shift / np.asarray(steps))
    return replace(grid, affine=tuple(tuple(float(v) for v in row) for row in matrix)), header.dtype()

"""Volumes whatever their format, with their unit: NIfTI, Interfile images, and series of DICOM."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from recon3d.geometry import VolumeGrid
from recon3d.io.dicom import describe_dicom, is_dicom, read_dicom
from recon3d.io.guard import DEFAULT_LIMITS, Limits, check_file
from recon3d.io.interfile_header import is_interfile
from recon3d.io.interfile_image import read_interfile_image, write_interfile_image
from recon3d.io.nifti import NiftiHeader, read_nifti, read_nifti_header, write_nifti
from recon3d.io.pet import PETInfo

__all__ = ["image_unit", "read_image", "write_activity"]

ImageUnit = Literal["Bq/mL", "SUV", "HU", "1/mm", "1/cm", "au"]
_WORDS: dict[str, ImageUnit] = {
    **dict.fromkeys(("bq/ml", "bqml"), "Bq/mL"),
    **dict.fromkeys(("suv", "suvbw", "g/ml"), "SUV"),
    "hu": "HU",
    "1/mm": "1/mm",
    "per_mm": "1/mm",
    "1/cm": "1/cm",
    "au": "au",
}


def read_image(path: str | os.PathLike[str], limits: Limits = DEFAULT_LIMITS) -> tuple[Tensor, VolumeGrid, str]:
    """A volume, its grid and its unit.

    Args:
        path: NIfTI, an Interfile image (.hv), a DICOM file or the folder of a DICOM series.
        limits: how much memory it may claim.

    Returns:
        volume [z, y, x] float32, its grid, and "Bq/mL", "SUV", "HU", "1/mm", "1/cm", or "au" where none is stated.

    Raises:
        BadInput: it is none of these, or damaged.
        ImportError: it is DICOM and pydicom is not installed.
    """
    if Path(path).is_dir():
        found = read_dicom(path, limits)
        return found.volume, found.grid, found.unit
    check_file(path)
    if is_dicom(path):
        found = read_dicom(path, limits)
        return found.volume, found.grid, found.unit
    if is_interfile(path):
        volume, grid, info = read_interfile_image(path, limits)
        return volume, grid, "Bq/mL" if info.calibrated else "au"
    header = read_nifti_header(path, limits)
    volume, grid = read_nifti(path, limits=limits)
    return volume, grid, _written(header) or "au"


def image_unit(path: str | os.PathLike[str]) -> str | None:
    """The unit that an image's headers state, as `read_image` names it; None where they state none.

    Raises:
        BadInput, ImportError: as `read_image`.
    """
    if Path(path).is_dir() or (check_file(path) and is_dicom(path)):
        unit: str = describe_dicom(path)["unit"]
        return unit
    if is_interfile(path):
        return "Bq/mL" if read_interfile_image(path)[2].calibrated else None
    return _written(read_nifti_header(path))


def _written(header: NiftiHeader) -> str | None:
    words = [w.strip(",;()[]").lower() for w in f"{header.intent} {header.description}".split()]
    return next((_WORDS[w] for w in words if w in _WORDS), None)


def write_activity(
    path: str | os.PathLike[str],
    activity: Tensor | NDArray[np.floating],
    grid: VolumeGrid,
    *,
    unit: Literal["Bq/mL", "SUV"] = "Bq/mL",
    suv_factor: float | None = None,
    info: PETInfo | None = None,
    dtype: Literal["float32", "int16"] = "float32",
) -> None:
    """Writes activity, or SUV made from it, with the unit in the header; the file appears whole or not at all.

    Args:
        path: ends in .nii, .nii.gz, or .hv for Interfile (Bq/mL alone).
        activity: [z, y, x] in Bq/mL.
        grid: its grid.
        unit: what the file is to hold.
        suv_factor: SUV of 1 Bq/mL; None takes that of `info`.
        info: time and dose.
        dtype: of a NIfTI file.

    Raises:
        ValueError: SUV without a factor, a shape that is not the grid's, or a value that is not finite.
        OSError: the folder is missing, read-only or full.
    """
    values = activity
    if unit == "SUV":
        factor = suv_factor or (info.suv_factor if info is not None else None)
        if factor is None:
            raise ValueError("write_activity: SUV needs suv_factor, or dose, weight and times in info")
        values = activity * factor
    if Path(path).suffix == ".hv":
        if unit != "Bq/mL":
            raise ValueError("write_activity: Interfile holds Bq/mL here; write SUV as NIfTI")
        from dataclasses import replace

        write_interfile_image(path, values, grid, replace(info or PETInfo(), calibrated=True, scale=1.0))
        return
    write_nifti(path, values, grid, dtype=dtype, label=unit)

"""Attenuation maps: 1/mm, 1/cm or HU in files, 1/mm at 511 keV everywhere else.

The unit is what the option says, else what the file says, else what its values leave no doubt about: HU have air far
below zero; soft tissue is 0.0096 / mm = 0.096 / cm at 511 keV, and a map without any of it is of no use.
"""

from __future__ import annotations

import os
from dataclasses import replace

import torch
from torch import Tensor

from recon3d.geometry import VolumeGrid
from recon3d.io.dicom import is_dicom, read_dicom
from recon3d.io.guard import DEFAULT_LIMITS, BadInput, Limits, check_file
from recon3d.io.interfile_header import is_interfile
from recon3d.io.interfile_image import read_interfile_image
from recon3d.io.nifti import read_nifti, read_nifti_header
from recon3d.io.pet import MuUnit

__all__ = ["read_mu_map"]

_PER_MM = {"1/mm": 1.0, "1/cm": 0.1}
# names of units as files write them
_SPELLINGS = {"1/mm": "1/mm", "mm-1": "1/mm", "mm^-1": "1/mm", "1/cm": "1/cm", "cm-1": "1/cm", "cm^-1": "1/cm"}
# largest values of a map with tissue or bone (0.0096 to 0.018 / mm), with room for a little metal
_LARGEST = {"1/mm": (0.0085, 0.05), "1/cm": (0.085, 0.5)}
_AIR_HU = -200.0
# values below zero that a smooth filter leaves behind, as a share of the largest
_UNDERSHOOT = 0.1
# iron has 0.065 / mm
_MOST_PER_MM = 0.25


def read_mu_map(
    path: str | os.PathLike[str], unit: MuUnit | None = None, limits: Limits = DEFAULT_LIMITS
) -> tuple[Tensor, VolumeGrid, tuple[str, ...]]:
    """An attenuation map in 1/mm at 511 keV, its grid and what was noticed.

    Args:
        path: NIfTI, an Interfile image (.hv), which STIR holds in 1/cm, or a DICOM series of CT.
        unit: of the values, where the file does not say.
        limits: how much memory it may claim.

    Raises:
        BadInput: the file is damaged, its unit is in doubt, or its values are no attenuation.
    """
    said: str | None
    if is_dicom(path):
        image = read_dicom(path, limits)
        if image.modality != "CT":
            raise BadInput(path, f"is a series of {image.modality}, not of attenuation", "give the CT series")
        volume, grid, said = image.volume, image.grid, "hu"
    elif check_file(path) and is_interfile(path):
        volume, grid, _ = read_interfile_image(path, limits)
        said = "1/cm"
    else:
        header = read_nifti_header(path, limits)
        volume, grid = read_nifti(path, limits=limits)
        said = _stated(f"{header.intent} {header.description}")
    low, high = float(volume.min()), float(volume.max())
    if not high > low:
        raise BadInput(path, f"holds {high:.4g} everywhere", "an attenuation map with an object is expected")
    notes = []
    chosen = unit or said or _unmistakable(low, high)
    if chosen is None:
        raise BadInput(
            path,
            f"is an attenuation map of {low:.4g} to {high:.4g} that does not state its unit",
            "say mu_unit='1/mm', '1/cm' or 'hu'",
        )
    if unit is None and said is None:
        notes.append(f"the attenuation map is taken to be in {chosen}: it reaches from {low:.4g} to {high:.4g}")
    if chosen == "hu":
        from recon3d.operators.attenuation import mu_from_hu

        mu = mu_from_hu(volume)
    else:
        mu = volume * _PER_MM[chosen] if chosen != "1/mm" else volume
    low, high = float(mu.min()), float(mu.max())
    if not 0 < high <= _MOST_PER_MM or low < -_UNDERSHOOT * high:
        raise BadInput(
            path, f"reaches from {low:.4g} to {high:.4g} / mm in the unit {chosen}", "check the unit with mu_unit"
        )
    return torch.clamp_min(mu, 0.0), replace(grid), tuple(notes)


def _stated(text: str) -> str | None:
    words = {w.strip(",;()[]").lower() for w in text.split()}
    found = {_SPELLINGS[w] for w in words if w in _SPELLINGS} | ({"hu"} if "hu" in words else set())
    return found.pop() if len(found) == 1 else None


def _unmistakable(low: float, high: float) -> MuUnit | None:
    if low < _AIR_HU:
        return "hu"
    if low < -_UNDERSHOOT * high:
        return None
    if _LARGEST["1/mm"][0] <= high <= _LARGEST["1/mm"][1]:
        return "1/mm"
    return "1/cm" if _LARGEST["1/cm"][0] <= high <= _LARGEST["1/cm"][1] else None

"""A PET measurement as a folder: prompts.hs, mult_factors.hs, additive_term.hs, the names of the PETRIC challenges.

SIRF's model, which these files follow, is  expected = factors (P x + term), so additive_term holds the expected counts
of randoms and scatter divided by the factors. An attenuation map may lie beside: attenuation.nii.gz, .nii or .hv.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from recon3d.io.guard import DEFAULT_LIMITS, BadInput, Limits
from recon3d.io.interfile import describe_interfile, read_interfile, read_interfile_terms
from recon3d.io.interfile_write import write_interfile
from recon3d.io.mu_map import read_mu_map
from recon3d.io.nifti import write_nifti
from recon3d.io.pet import PETData, PETOptions

__all__ = ["describe_pet_folder", "is_pet_folder", "read_pet_folder", "write_pet_folder"]

_PROMPTS, _FACTORS, _ADDITIVE, _DELAYED = "prompts.hs", "mult_factors.hs", "additive_term.hs", "delayed.hs"
_MU_NAMES = ("attenuation.nii.gz", "attenuation.nii", "attenuation.hv", "mu_map.nii.gz", "mu_map.nii", "mu_map.hv")


def is_pet_folder(path: str | os.PathLike[str]) -> bool:
    """Whether a path is a folder with prompts."""
    return (Path(path) / _PROMPTS).is_file()


def read_pet_folder(
    path: str | os.PathLike[str], options: PETOptions | None = None, limits: Limits = DEFAULT_LIMITS
) -> PETData:
    """Prompts, factors, additive terms in counts and attenuation from a folder; only prompts have to be there.

    Raises:
        BadInput: a file is damaged, or its bins are not those of the prompts.
    """
    options, folder = options or PETOptions(), Path(path)
    if not is_pet_folder(folder):
        raise BadInput(path, f"holds no {_PROMPTS}", "a folder with prompts.hs is expected")
    data = read_interfile(folder / _PROMPTS, options, limits)
    notes, geometry = list(data.notes), data.geometry
    factors = additive = delayed = None
    if (folder / _FACTORS).is_file():
        factors = read_interfile_terms(folder / _FACTORS, "multiplicative factors", geometry, limits)
    else:
        notes.append(f"there is no {_FACTORS}; every bin counts alike, without attenuation")
    if (folder / _ADDITIVE).is_file():
        additive = read_interfile_terms(folder / _ADDITIVE, "additive terms", geometry, limits)
        if factors is not None:
            additive = additive * factors if additive.stride() != factors.stride() else additive.mul_(factors)
    else:
        notes.append(f"there is no {_ADDITIVE}; no randoms and no scatter are assumed")
    if (folder / _DELAYED).is_file():
        delayed = read_interfile_terms(folder / _DELAYED, "delayed coincidences", geometry, limits)
    mu = None
    name = next((n for n in _MU_NAMES if (folder / n).is_file()), None)
    if name is not None:
        volume, grid, found = read_mu_map(folder / name, options.mu_unit, limits)
        mu = volume, grid
        notes += found
    return replace(
        data, factors=factors, additive=additive, delayed=delayed, mu=mu, source_format="folder", notes=tuple(notes)
    )


def describe_pet_folder(path: str | os.PathLike[str]) -> dict[str, Any]:
    """From the header of the prompts and the names of the files."""
    folder = Path(path)
    there = [n for n in (_FACTORS, _ADDITIVE, _DELAYED, *_MU_NAMES) if (folder / n).is_file()]
    return {**describe_interfile(folder / _PROMPTS), "format": "PET folder", "beside": there}


def write_pet_folder(path: str | os.PathLike[str], data: PETData) -> None:
    """Writes a folder that read_pet_folder, STIR and SIRF read; it appears whole or not at all.

    Where a factor is 0 the additive term cannot be told in this layout and becomes 0; such a bin says nothing about the
    activity.

    Args:
        path: the folder, which must not be there yet, or be empty.
        data: what to write; listmode events are not.

    Raises:
        ValueError: there is no sinogram, or a value is not finite.
        FileExistsError: the folder is there and not empty.
        OSError: its parent is missing, read-only or full.
    """
    path = Path(path)
    if data.prompts.numel() == 0:
        raise ValueError("write_pet_folder: the data are list mode alone; histogram them first")
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise FileExistsError(f"write_pet_folder: {path} is there already and not empty")
    geometry, info = data.geometry, data.info
    made = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
    try:
        write_interfile(made / _PROMPTS, data.prompts, geometry, info)
        if data.factors is not None:
            write_interfile(made / _FACTORS, data.factors, geometry, info)
        if data.additive is not None:
            term = data.additive
            if data.factors is not None:
                term = torch.where(data.factors > 0, data.additive / data.factors, torch.zeros(()))
            write_interfile(made / _ADDITIVE, term, geometry, info)
        if data.delayed is not None:
            write_interfile(made / _DELAYED, data.delayed, geometry, info)
        if data.mu is not None:
            write_nifti(made / _MU_NAMES[0], data.mu[0], data.mu[1], label="1/mm")
        mask = os.umask(0)
        os.umask(mask)
        made.chmod(0o777 & ~mask)
        if path.exists():
            path.rmdir()
        made.replace(path)
    except BaseException:
        shutil.rmtree(made, ignore_errors=True)
        raise

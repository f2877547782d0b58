"""Reading a measurement whatever its format: the content decides, not the name."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from recon3d.io.cfl import cfl_pair, describe_cfl, read_cfl
from recon3d.io.dataexchange import read_data_exchange
from recon3d.io.dicom import describe_dicom, is_dicom
from recon3d.io.fastmri import check_shape, grid_of, read_fastmri, readout_size
from recon3d.io.guard import DEFAULT_LIMITS, BadInput, Limits, as_bad_input, check_file
from recon3d.io.hdf5 import HDF5_SIGNATURE, HDF5Reader, Tree
from recon3d.io.interfile import describe_interfile, read_interfile
from recon3d.io.interfile_header import is_interfile, read_interfile_header
from recon3d.io.ismrmrd import describe_ismrmrd, find_group, read_ismrmrd
from recon3d.io.kspace import KSpace, KSpaceOptions, describe_grid, describe_sampling, sampled_points
from recon3d.io.kspace_layout import describe_kspace_hdf5, read_kspace_hdf5
from recon3d.io.layout import load_npz, read_sinogram_hdf5, read_sinogram_npz
from recon3d.io.measurement import Measurement, ReadOptions
from recon3d.io.mrheader import parse_header
from recon3d.io.nifti import read_nifti_header
from recon3d.io.pet import PETData, PETOptions
from recon3d.io.pet_folder import describe_pet_folder, is_pet_folder, read_pet_folder
from recon3d.io.petlink import describe_petlink, is_petlink, read_petlink
from recon3d.io.petsird import describe_petsird, is_petsird, read_petsird
from recon3d.io.twix import describe_twix, is_twix, read_twix

_READ = (
    "Data Exchange, sinograms, fastMRI, ISMRMRD and recon3d's k-space in HDF5, sinograms in npz, "
    "BART's cfl, Siemens twix, NIfTI, and for PET PETSIRD, headers of Interfile and PETLINK, or a folder with "
    "prompts.hs are read"
)


def read_measurement(
    path: str | os.PathLike[str], *, limits: Limits = DEFAULT_LIMITS, **options: Any
) -> Measurement | KSpace | PETData:
    """A measurement of any kind: line integrals, k-space or PET counts, as the content of the file says.

    Args:
        path: the file, or the folder of a PET measurement; its content tells the format.
        limits: how much memory it may claim.
        **options: fields of ReadOptions for projections, of KSpaceOptions for k-space, of PETOptions for PET: what the
            file does not say.

    Returns:
        a Measurement, a KSpace or a PETData; its notes say what was assumed.

    Raises:
        BadInput: the file is of no known format, damaged, contradictory, not finite, or does not say what is needed.
        TypeError: an option that does not exist.
        ValueError: options that contradict each other.
    """
    with as_bad_input(path, "does not fit into memory", (MemoryError,), "free memory or read fewer rows"):
        return _read(path, options, limits)


def read_projections(path: str | os.PathLike[str], *, limits: Limits = DEFAULT_LIMITS, **options: Any) -> Measurement:
    """A measurement from Data Exchange HDF5, recon3d's layout in HDF5 or npz, or any HDF5 sinogram with angles.

    Args:
        path: the file; its content tells the format.
        limits: how much memory it may claim.
        **options: fields of ReadOptions: what the file does not say, or says wrongly.

    Returns:
        line integrals [slice, view, u] with their geometry; its notes say what was assumed.

    Raises:
        BadInput: the file is none of these, damaged, contradictory, not finite, or does not say what is needed.
        TypeError: an option that does not exist.
        ValueError: options that contradict each other.

    >>> read_projections("scan.h5", detector_spacing_mm=0.01, rotation_centre="estimate")  # doctest: +SKIP
    """
    ReadOptions.of(options)
    found = read_measurement(path, limits=limits, **options)
    if not isinstance(found, Measurement):
        kind, job = ("k-space of an MR scanner", "an MRI") if isinstance(found, KSpace) else ("PET counts", "a PET")
        raise BadInput(path, f"holds {kind}, not projections", f"use it in {job} job")
    return found


def read_kspace(path: str | os.PathLike[str], *, limits: Limits = DEFAULT_LIMITS, **options: Any) -> KSpace:
    """k-space from fastMRI, ISMRMRD or recon3d's layout in HDF5, from a BART pair, or Siemens raw data.

    Args:
        path: the file; its content tells the format.
        limits: how much memory it may claim.
        **options: fields of KSpaceOptions: what the file does not say, or which part of it is wanted.

    Returns:
        k-space with its sampling and grid; its notes say what was assumed or left out.

    Raises:
        BadInput: the file is none of these, damaged, contradictory, not finite, or does not say what is needed.
        TypeError: an option that does not exist.
        ValueError: options that contradict each other.

    >>> read_kspace("brain.h5", slices=(4, 8))  # doctest: +SKIP
    """
    KSpaceOptions.of(options)
    found = read_measurement(path, limits=limits, **options)
    if not isinstance(found, KSpace):
        kind, job = ("PET counts", "a PET") if isinstance(found, PETData) else ("projections", "a CT")
        raise BadInput(path, f"holds {kind}, not k-space of an MR scanner", f"use it in {job} job")
    return found


def read_pet(path: str | os.PathLike[str], *, limits: Limits = DEFAULT_LIMITS, **options: Any) -> PETData:
    """PET counts from Interfile sinograms, list mode of Siemens or PETSIRD, or a folder with PETRIC's names.

    Args:
        path: the header, or the folder.
        limits: how much memory it may claim.
        **options: fields of PETOptions: what the file does not say, or which part of it is wanted.

    Returns:
        counts with their bins and what belongs to them; its notes say what was assumed or left out.

    Raises:
        BadInput: the file is none of these, damaged, contradictory, or holds what are no counts.
        TypeError: an option that does not exist.
        ValueError: options that cannot be.

    >>> read_pet("scan.l.hdr", seconds=(0.0, 60.0), span=11)  # doctest: +SKIP
    """
    PETOptions.of(options)
    found = read_measurement(path, limits=limits, **options)
    if not isinstance(found, PETData):
        kind, job = ("k-space of an MR scanner", "an MRI") if isinstance(found, KSpace) else ("projections", "a CT")
        raise BadInput(path, f"holds {kind}, not PET counts", f"use it in {job} job")
    return found


def describe(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What a file is, from its headers alone, ready for JSON or a table.

    Returns:
        "format" and "bytes", and by format shapes, spacing, orientation, datasets, attributes of the root.

    Raises:
        BadInput: the file is of no known format, or damaged.
    """
    kind = _kind(path)
    if kind == "cfl":
        return {"path": os.fspath(path), **describe_cfl(path)}
    if kind == "pet folder":
        return {"path": os.fspath(path), **describe_pet_folder(path)}
    if kind == "dicom":
        return {"path": os.fspath(path), **describe_dicom(path)}
    out: dict[str, Any] = {"path": os.fspath(path), "bytes": check_file(path)}
    if kind == "twix":
        return out | describe_twix(path)
    if kind == "petsird":
        return out | describe_petsird(path)
    if kind == "interfile":
        listed = is_petlink(read_interfile_header(path))
        return out | (describe_petlink(path) if listed else describe_interfile(path))
    if kind == "nifti":
        header = read_nifti_header(path)
        steps = (header.affine[:3, :3] ** 2).sum(axis=0) ** 0.5
        return out | {
            "format": "NIfTI, gzipped" if header.compressed else "NIfTI",
            "shape_ijk": list(header.shape),
            "spacing_ijk_mm": [float(s) for s in steps],
            "orientation": header.orientation,
            "dtype": str(header.dtype),
            "scaling": list(header.scaling),
            "affine": header.affine.tolist(),
        }
    if kind == "npz":
        names = {"sinogram", "angles_rad", "angles_deg"}
        with as_bad_input(path, "is not a readable npz archive", (ValueError,)):
            arrays = load_npz(path, names)
        return out | {
            "format": "npz",
            "datasets": {name: {"shape": list(a.shape), "dtype": str(a.dtype)} for name, a in arrays.items()},
        }
    with HDF5Reader() as reader:
        tree = reader.tree(path)
        group = find_group(tree)
        if group is not None:
            out |= describe_ismrmrd(path, reader, group)
        elif _is_fastmri(tree):
            out |= _describe_fastmri(path, reader, tree)
        elif "kspace" in tree:
            out |= describe_kspace_hdf5(path, reader, tree)
    if "format" in out:
        name = out["format"]
    elif "exchange/data" in tree:
        name = "Data Exchange HDF5"
    elif "sinogram" in tree:
        name = "recon3d sinogram HDF5" if "geometry" in tree else "sinogram HDF5"
    else:
        name = "HDF5 of another kind"
    datasets = {
        key: {"shape": item["shape"], "dtype": item["dtype"][:40], **_short(item.get("attrs", {}))}
        for key, item in tree.items()
        if item["kind"] == "dataset"
    }
    links = [key for key, item in tree.items() if item["kind"] in ("soft link", "external link")]
    groups = {key: _short(item["attrs"]) for key, item in tree.items() if item["kind"] == "group" and item["attrs"]}
    return out | {"format": name, "datasets": datasets, "groups": groups, "links_not_followed": links}


def _is_fastmri(tree: Tree) -> bool:
    return all(tree.get(name, {}).get("kind") == "dataset" for name in ("kspace", "ismrmrd_header"))


def _describe_fastmri(path: str | os.PathLike[str], reader: HDF5Reader, tree: Tree) -> dict[str, Any]:
    """From the header and one coil of the middle slice."""
    header = parse_header(path, reader.text(path, "ismrmrd_header"))
    shape = check_shape(path, tree)
    notes: list[str] = []
    grid = grid_of(path, header, shape, KSpaceOptions(), notes)
    middle = shape[0] // 2
    part = [(middle, middle + 1, None), *([(0, 1, None)] if len(tree["kspace"]["shape"]) == 4 else [])]
    one = reader.load(path, "kspace", part).reshape(1, 1, *shape[2:])
    mask = sampled_points(one)[0]
    if "mask" in tree:
        with as_bad_input(path, "has a mask of another size", (ValueError,)):
            mask = mask & (reader.load(path, "mask") != 0)
    return {
        "format": "fastMRI HDF5",
        "matrix_yx": list(shape[2:]),
        "readout_kept": readout_size(header, shape[2]),
        "slices": shape[0],
        "coils": shape[1],
        **describe_grid(grid),
        "sampling": describe_sampling(mask),
        "scanner": header.description or "not recorded",
        "noise scans": "none",
        "notes": notes,
    }


def _read(path: str | os.PathLike[str], options: dict[str, Any], limits: Limits) -> Measurement | KSpace | PETData:
    kind = _kind(path)
    if kind == "pet folder":
        return read_pet_folder(path, PETOptions.of(options), limits)
    if kind == "petsird":
        return read_petsird(path, PETOptions.of(options), limits)
    if kind == "interfile":
        listed = is_petlink(read_interfile_header(path))
        return (read_petlink if listed else read_interfile)(path, PETOptions.of(options), limits)
    if kind == "cfl":
        return read_cfl(path, KSpaceOptions.of(options), limits)
    if kind == "twix":
        return read_twix(path, KSpaceOptions.of(options), limits)
    if kind == "npz":
        return read_sinogram_npz(path, ReadOptions.of(options), limits)
    if kind in ("nifti", "dicom"):
        raise BadInput(path, "is an image volume, not a measurement", "simulate a measurement of it first")
    with HDF5Reader() as reader:
        tree = reader.tree(path)
        if tree.get("exchange", {}).get("kind") == "group" and "exchange/data" in tree:
            return read_data_exchange(path, ReadOptions.of(options), reader, tree, limits)
        if "sinogram" in tree:
            return read_sinogram_hdf5(path, ReadOptions.of(options), reader, tree, limits)
        group = find_group(tree)
        if group is not None:
            return read_ismrmrd(path, KSpaceOptions.of(options), reader, group, limits)
        if _is_fastmri(tree):
            return read_fastmri(path, KSpaceOptions.of(options), reader, tree, limits)
        if "kspace" in tree:
            return read_kspace_hdf5(path, KSpaceOptions.of(options), reader, tree, limits)
    raise BadInput(path, "is HDF5 but holds neither exchange/data nor sinogram nor k-space", _READ)


def _short(attributes: dict[str, Any]) -> dict[str, Any]:
    """Attributes fit for a screen: long lists as their length."""
    return {
        name: f"{len(value)} values" if isinstance(value, list) and len(value) > 8 else value
        for name, value in attributes.items()
    }


def _kind(path: str | os.PathLike[str]) -> str:
    if cfl_pair(path) is not None:
        return "cfl"
    if is_pet_folder(path):
        return "pet folder"
    if Path(path).is_dir() and is_dicom(path):
        return "dicom"
    check_file(path)
    with Path(path).open("rb") as file:
        head = file.read(8)
    if head == HDF5_SIGNATURE:
        return "hdf5"
    if head[:4] == b"PK\x03\x04":
        return "npz"
    sizes = {int.from_bytes(head[:4], "little"), int.from_bytes(head[:4], "big")}
    if head[:2] == b"\x1f\x8b" or sizes & {348, 540}:
        return "nifti"
    if is_interfile(path):
        return "interfile"
    if is_petsird(path):
        return "petsird"
    if is_dicom(path):
        return "dicom"
    if is_twix(path):
        return "twix"
    header = _header_beside(Path(path))
    if header is not None:
        raise BadInput(path, f"holds the data of {header.name}", "give that header")
    raise BadInput(path, "is of no known format", _READ)


def _header_beside(path: Path) -> Path | None:
    """The Interfile header of a file of numbers, by its usual name."""
    names = [path.with_name(path.name + ".hdr"), *(path.with_suffix(end) for end in (".hs", ".hv"))]
    return next((n for n in names if n != path and n.is_file() and is_interfile(n)), None)

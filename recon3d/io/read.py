"""Reading a measurement whatever its format: the content decides, not the name."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from recon3d.io.dataexchange import read_data_exchange
from recon3d.io.guard import DEFAULT_LIMITS, BadInput, Limits, as_bad_input, check_file
from recon3d.io.hdf5 import HDF5_SIGNATURE, HDF5Reader
from recon3d.io.layout import load_npz, read_sinogram_hdf5, read_sinogram_npz
from recon3d.io.measurement import Measurement, ReadOptions
from recon3d.io.nifti import read_nifti_header

_READ = "Data Exchange HDF5, a sinogram in HDF5 or npz, and NIfTI volumes are read"


def read_measurement(path: str | os.PathLike[str], *, limits: Limits = DEFAULT_LIMITS, **options: Any) -> Measurement:
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

    >>> read_measurement("scan.h5", detector_spacing_mm=0.01, rotation_centre="estimate")  # doctest: +SKIP
    """
    chosen = ReadOptions.of(options)
    with as_bad_input(path, "does not fit into memory", (MemoryError,), "free memory or read fewer rows"):
        return _read(path, chosen, limits)


def describe(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What a file is, from its headers alone, ready for JSON or a table.

    Returns:
        "format" and "bytes", and by format shapes, spacing, orientation, datasets, attributes of the root.

    Raises:
        BadInput: the file is of no known format, or damaged.
    """
    kind = _kind(path)
    out: dict[str, Any] = {"path": os.fspath(path), "bytes": check_file(path)}
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
    if "exchange/data" in tree:
        name = "Data Exchange HDF5"
    elif "sinogram" in tree:
        name = "recon3d sinogram HDF5" if "geometry" in tree else "sinogram HDF5"
    else:
        name = "HDF5 of another kind"
    datasets = {
        key: {"shape": item["shape"], "dtype": item["dtype"], **_short(item.get("attrs", {}))}
        for key, item in tree.items()
        if item["kind"] == "dataset"
    }
    links = [key for key, item in tree.items() if item["kind"] in ("soft link", "external link")]
    groups = {key: _short(item["attrs"]) for key, item in tree.items() if item["kind"] == "group" and item["attrs"]}
    return out | {"format": name, "datasets": datasets, "groups": groups, "links_not_followed": links}


def _read(path: str | os.PathLike[str], chosen: ReadOptions, limits: Limits) -> Measurement:
    kind = _kind(path)
    if kind == "npz":
        return read_sinogram_npz(path, chosen, limits)
    if kind == "nifti":
        raise BadInput(path, "is an image volume, not a measurement", "simulate projections of it first")
    with HDF5Reader() as reader:
        tree = reader.tree(path)
        if tree.get("exchange", {}).get("kind") == "group" and "exchange/data" in tree:
            return read_data_exchange(path, chosen, reader, tree, limits)
        if "sinogram" in tree:
            return read_sinogram_hdf5(path, chosen, reader, tree, limits)
    raise BadInput(path, "is HDF5 but holds neither exchange/data nor sinogram", _READ)


def _short(attributes: dict[str, Any]) -> dict[str, Any]:
    """Attributes fit for a screen: long lists as their length."""
    return {
        name: f"{len(value)} values" if isinstance(value, list) and len(value) > 8 else value
        for name, value in attributes.items()
    }


def _kind(path: str | os.PathLike[str]) -> str:
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
    raise BadInput(path, "is of no known format", _READ)

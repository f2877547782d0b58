"""Data Exchange HDF5, as synchrotron beamlines write it: counts with flats and darks become line integrals.

p = -log((data - dark) / (white - dark)), with the means of the dark and white fields. Format: De Carlo et al., J.
Synchrotron Rad. 21 (2014) 1224. Axes on file are theta, y (a slice each), x.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recon3d.io.guard import DEFAULT_LIMITS, BadInput, Limits, check_finite
from recon3d.io.hdf5 import HDF5Reader, Selection, Tree
from recon3d.io.measurement import Measurement, ReadOptions, assemble

# more rays than this without signal: not dead cells, but the wrong fields
_MOST_DEAD = 0.2
_MOST_OPAQUE = 0.5


def read_data_exchange(
    path: str | os.PathLike[str],
    options: ReadOptions,
    reader: HDF5Reader,
    tree: Tree,
    limits: Limits = DEFAULT_LIMITS,
) -> Measurement:
    """A measurement from an open reader whose tree has `exchange/data`.

    The pixel size and the rotation axis are rarely recorded: give detector_spacing_mm, and rotation_centre as a number
    or "estimate".

    Raises:
        BadInput: as read_measurement; also when there are no white fields, or the fields make no sense.
    """
    for name in ("exchange/data", "exchange/data_white"):
        if tree.get(name, {}).get("kind") in ("soft link", "external link"):
            raise BadInput(
                path, f"{name} is an {tree[name]['kind']}", "links are not followed; copy the data into the file"
            )
    if "exchange/data_white" not in tree and options.unit != "line integrals":
        raise BadInput(path, "has no white fields (exchange/data_white)", 'measure them, or give unit="line integrals"')
    rows = None if options.rows is None else (options.rows[0], options.rows[1], None)
    cut: Selection = [None, rows]
    notes: list[str] = []
    data = _stack(path, "exchange/data", reader.load(path, "exchange/data", cut, limits))
    if options.unit == "line integrals":
        sinogram = data
    else:
        white = _field(path, "exchange/data_white", reader, cut, limits, data.shape)
        if "exchange/data_dark" in tree:
            dark = _field(path, "exchange/data_dark", reader, cut, limits, data.shape)
        else:
            dark = np.zeros_like(white)
            notes.append("no dark fields: the detector is taken to count nothing without beam")
        sinogram, more = _from_counts(path, data, white, dark, options.smallest_transmission)
        notes += more
    found: dict[str, Any] = {"sinogram": sinogram.transpose(1, 0, 2), "type": "parallel", "notes": notes}
    if "exchange/theta" in tree:
        unit = str(tree["exchange/theta"].get("attrs", {}).get("units", "degrees")).lower()
        if unit not in ("deg", "degree", "degrees", "rad", "radian", "radians"):
            raise BadInput(path, f"gives exchange/theta in {unit[:40]!r}", "degrees or radians is read")
        theta = reader.load(path, "exchange/theta", (), limits)
        found["angles_deg" if unit.startswith("deg") else "angles_rad"] = theta
    return assemble(path, found, options, "data exchange")


def line_integrals(
    path: str | os.PathLike[str], transmission: NDArray[np.float32], smallest: float
) -> tuple[NDArray[np.float32], list[str]]:
    """-log of a transmission, which is raised to `smallest` where it lies below; and what was noticed.

    Raises:
        BadInput: most rays carry no signal, or a value is not finite.
    """
    check_finite(path, "the transmission", transmission)
    low = transmission < smallest
    share = float(low.mean())
    if share > _MOST_OPAQUE:
        raise BadInput(
            path,
            f"lets through less than {smallest:g} of the beam in {100 * share:.0f} % of its rays",
            "are the white and dark fields exchanged, or is it line integrals already?",
        )
    notes = []
    if share > 0:
        notes.append(
            f"{int(low.sum())} of {low.size} rays count nothing or less and are taken to transmit {smallest:g} "
            f"(line integral {-np.log(smallest):.1f})"
        )
    return -np.log(np.maximum(transmission, np.float32(smallest)), dtype=np.float32), notes


def _from_counts(
    path: str | os.PathLike[str],
    data: NDArray[np.float32],
    white: NDArray[np.float64],
    dark: NDArray[np.float64],
    smallest: float,
) -> tuple[NDArray[np.float32], list[str]]:
    beam = white - dark
    dead = beam <= 0
    share = float(dead.mean())
    if share > _MOST_DEAD:
        raise BadInput(
            path,
            f"has white fields no brighter than its dark fields in {100 * share:.0f} % of the detector",
            "are data_white and data_dark exchanged?",
        )
    transmission = data - dark.astype(np.float32)
    transmission /= np.where(dead, 1, beam).astype(np.float32)
    notes = []
    if dead.any():
        for row in range(dead.shape[0]):
            if dead[row].all():
                raise BadInput(path, f"detector row {row} is dead", "leave it out with rows")
            gone = np.flatnonzero(dead[row])
            alive = np.flatnonzero(~dead[row])
            right = alive[np.searchsorted(alive, gone).clip(max=alive.size - 1)]
            left = alive[(np.searchsorted(alive, gone) - 1).clip(min=0)]
            span = np.maximum(right - left, 1)
            t = np.where(right > left, (gone - left) / span, 0).clip(0, 1).astype(np.float32)
            transmission[:, row, gone] = (1 - t) * transmission[:, row, left] + t * transmission[:, row, right]
        notes.append(f"{int(dead.sum())} dead detector cells were filled from their neighbours in the row")
    sinogram, more = line_integrals(path, transmission, smallest)
    return sinogram, notes + more


def _stack(path: str | os.PathLike[str], name: str, values: NDArray[Any]) -> NDArray[np.float32]:
    if values.ndim != 3:
        raise BadInput(path, f"{name} has {values.ndim} axes", "theta, y and x are expected")
    if values.dtype.kind not in "iuf":
        raise BadInput(path, f"{name} holds values of type {values.dtype}", "real numbers are read")
    with np.errstate(all="ignore"):  # what overflows is reported as not finite
        out = values.astype(np.float32, copy=False)
    check_finite(path, name, out)
    return out


def _field(
    path: str | os.PathLike[str],
    name: str,
    reader: HDF5Reader,
    cut: Selection,
    limits: Limits,
    shape: tuple[int, ...],
) -> NDArray[np.float64]:
    stack = _stack(path, name, reader.load(path, name, cut, limits))
    if stack.shape[1:] != shape[1:]:
        raise BadInput(path, f"{name} has size {stack.shape} for data of {shape}", "rows and columns must agree")
    return stack.mean(axis=0, dtype=np.float64)

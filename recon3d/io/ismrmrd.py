"""ISMRMRD (MRD) HDF5: a group with `xml` and `data`, a list of a 340-byte header, a trajectory and samples each.

Headers are read in one go, then the samples [coil, sample] of the acquisitions that are wanted.
Format: Inati et al., Magnetic Resonance in Medicine 77 (2017) 411; https://ismrmrd.readthedocs.io.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recon3d.io.acquisitions import (
    HEAD,
    INDEX,
    Heads,
    Scan,
    covariance_of,
    describe_scan,
    kspace_of,
    places_of,
    sort,
    trimmed,
)
from recon3d.io.guard import DEFAULT_LIMITS, BadInput, Limits, check_array, check_file, check_finite
from recon3d.io.hdf5 import HDF5Reader, Tree
from recon3d.io.kspace import KSpace, KSpaceOptions
from recon3d.io.mrheader import parse_header


def find_group(tree: Tree) -> str | None:
    """The group that holds `xml` and `data`, the first by name; None if there is none."""
    groups = [name.removesuffix("/xml") for name in tree if name.endswith("/xml")]
    kinds = [
        g for g in sorted(groups) if all(tree.get(f"{g}/{n}", {}).get("kind") == "dataset" for n in ("xml", "data"))
    ]
    return "dataset" if "dataset" in kinds else next(iter(kinds), None)


def read_ismrmrd(
    path: str | os.PathLike[str],
    options: KSpaceOptions,
    reader: HDF5Reader,
    group: str,
    limits: Limits = DEFAULT_LIMITS,
) -> KSpace:
    """k-space from an open reader and the group that holds the acquisitions.

    Raises:
        BadInput: as read_kspace.
    """
    notes: list[str] = []
    scan = _scan(path, options, reader, group, notes, limits)
    places = places_of(path, scan, options, notes)
    rows = scan.image[np.isin(scan.heads["idx"]["slice"][scan.image], [p.index for p in places])]
    covariance = _noise_covariance(path, scan, rows, reader, group, notes, limits)
    lines = _samples(path, scan, rows, reader, group, limits)
    points = None if scan.cartesian else _points(path, scan, rows, reader, group, limits)
    return kspace_of(path, scan, rows, places, lines, points, covariance, options, notes)


def describe_ismrmrd(path: str | os.PathLike[str], reader: HDF5Reader, group: str) -> dict[str, Any]:
    """From the headers alone."""
    notes: list[str] = []
    scan = _scan(path, KSpaceOptions(), reader, group, notes, DEFAULT_LIMITS)
    reach = None
    if not scan.cartesian:
        points = _points(path, scan, scan.image[:1], reader, group, DEFAULT_LIMITS)
        check_finite(path, "the trajectory", points)
        reach = round(float(np.abs(points).max()), 5)
    return {"format": "ISMRMRD HDF5", **describe_scan(path, scan, reach, notes)}


def _scan(
    path: str | os.PathLike[str],
    options: KSpaceOptions,
    reader: HDF5Reader,
    group: str,
    notes: list[str],
    limits: Limits,
) -> Scan:
    header = parse_header(path, reader.text(path, f"{group}/xml"))
    heads = _heads(path, reader.fields(path, f"{group}/data", "head", limits))
    return sort(path, header, heads, options, notes, "ismrmrd")


def _heads(path: str | os.PathLike[str], stored: NDArray[Any]) -> Heads:
    """Headers as they are laid out here, by name."""
    out = np.zeros(stored.shape[0], HEAD)
    missing = set(HEAD.names or ()) - set(stored.dtype.names or ())
    names = stored.dtype["idx"].names if not missing else ()
    missing |= set(INDEX.names or ()) - set(names or ())
    if missing:
        raise BadInput(path, f"has acquisition headers without {', '.join(sorted(missing)[:5])}", "export it again")
    for name in HEAD.names or ():
        parts = [(out[name], stored[name])]
        if name == "idx":
            parts = [(out["idx"][inner], stored["idx"][inner]) for inner in INDEX.names or ()]
        for target, source in parts:
            if source.dtype.kind not in "iuf" or source.shape != target.shape:
                raise BadInput(path, f"has acquisition headers with a strange {name}", "export it again")
            with np.errstate(all="ignore"):
                target[...] = source
    return out


def _samples(
    path: str | os.PathLike[str],
    scan: Scan,
    rows: NDArray[np.intp],
    reader: HDF5Reader,
    group: str,
    limits: Limits,
) -> NDArray[np.complex64]:
    """[acquisition, coil, sample], without what is to be discarded."""
    length = 2 * scan.samples * scan.coils
    check_array(path, "its samples", [len(rows), length], 4, check_file(path), False, limits, working_itemsize=12)
    flat = reader.ragged(path, f"{group}/data", "data", rows.tolist(), [length] * len(rows), limits)
    check_finite(path, "its samples", flat)
    return trimmed(path, scan, rows, flat.view(np.complex64).reshape(len(rows), scan.coils, scan.samples))


def _points(
    path: str | os.PathLike[str],
    scan: Scan,
    rows: NDArray[np.intp],
    reader: HDF5Reader,
    group: str,
    limits: Limits,
) -> NDArray[np.float32]:
    """[acquisition, sample, d], without what was to be discarded."""
    heads = scan.heads[rows]
    dims = int(heads["trajectory_dimensions"][0])
    length = scan.samples * dims
    flat = reader.ragged(path, f"{group}/data", "traj", rows.tolist(), [length] * len(rows), limits)
    pre, post = (int(heads[name][0]) for name in ("discard_pre", "discard_post"))
    return flat.reshape(len(rows), scan.samples, dims)[:, pre : scan.samples - post]


def _noise_covariance(
    path: str | os.PathLike[str],
    scan: Scan,
    rows: NDArray[np.intp],
    reader: HDF5Reader,
    group: str,
    notes: list[str],
    limits: Limits,
) -> NDArray[np.complex64] | None:
    heads = scan.heads[scan.noise]
    fits = heads["active_channels"] == scan.coils
    if not fits.all():
        notes.append("some noise scans have another number of coils and are not used")
    heads, use = heads[fits], scan.noise[fits]
    if heads.size == 0:
        return None
    lengths = [int(n) * scan.coils * 2 for n in heads["number_of_samples"]]
    check_array(path, "its noise", [sum(lengths)], 4, check_file(path), False, limits, working_itemsize=8)
    flat = reader.ragged(path, f"{group}/data", "data", use.tolist(), lengths, limits)
    check_finite(path, "the noise scans", flat)
    parts = np.split(flat, np.cumsum(lengths)[:-1])
    noise = [part.view(np.complex64).reshape(scan.coils, -1) for part in parts]
    dwell = float(heads["sample_time_us"][0]), float(scan.heads["sample_time_us"][rows[0]])
    return covariance_of(scan, noise, dwell, notes)

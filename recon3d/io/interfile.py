"""Interfile sinograms: a text header and a file of raw numbers, as STIR (.hs) and Siemens (.s.hdr) write them.

STIR stores [tof, segment, view, plane, radial] or [tof, segment, plane, view, radial], Siemens [tof, plane, view,
radial]; here data are [view, radial, (tof,) plane]. Rings are turned round (see recon3d.io.pet), and so are STIR's time
bins, which count towards the p0 end. Reading goes in pieces, so that one copy of the sinogram is all it takes.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from recon3d.geometry.pet import PETGeometry
from recon3d.io.guard import DEFAULT_LIMITS, BadInput, Limits, check_array, check_file
from recon3d.io.interfile_bins import Sinogram, is_image, sinogram_of
from recon3d.io.interfile_header import InterfileHeader, read_interfile_header
from recon3d.io.interfile_image import describe_interfile_image, read_interfile_image, write_interfile_image
from recon3d.io.interfile_write import falling, write_interfile
from recon3d.io.pet import Kind, PETData, PETOptions, check_counts, patient_grid

__all__ = [
    "describe_interfile",
    "read_interfile",
    "read_interfile_geometry",
    "read_interfile_image",
    "read_interfile_terms",
    "write_interfile",
    "write_interfile_image",
]

_PIECE_BYTES = 32 << 20


def read_interfile_geometry(path: str | os.PathLike[str]) -> PETGeometry:
    """The bins that a sinogram header or a template describes; data need not be there.

    Raises:
        BadInput: it is no such header, or contradicts itself or the scanner it names.
    """
    return sinogram_of(read_interfile_header(path)).geometry


def read_interfile(
    path: str | os.PathLike[str], options: PETOptions | None = None, limits: Limits = DEFAULT_LIMITS
) -> PETData:
    """Prompts (and delayed coincidences, where Siemens stores them behind) from a sinogram header and its data.

    Args:
        path: the header.
        options: whether the counts were corrected.
        limits: how much memory it may claim.

    Raises:
        BadInput: header or data are damaged, disagree, hold no counts, or what is no count.
    """
    options = options or PETOptions()
    found = sinogram_of(read_interfile_header(path))
    header = found.header
    corrected = options.precorrected or found.corrected
    kind: Kind = "corrected" if corrected else "counts"
    names = _data_sets(header)
    delayed = None
    if "prompts" in names or not names:
        prompts = _load(found, "prompts", kind, limits, names.get("prompts", 1), max(1, len(names)))
    else:
        raise BadInput(path, f"holds {', '.join(names)[:80]}", "a data set of prompts is expected")
    if "randoms" in names:
        delayed = _load(found, "delayed coincidences", "terms", limits, names["randoms"], len(names))
    notes = list(found.notes)
    if corrected:
        notes.append("the counts were corrected before, so they are not Poisson distributed")
    return PETData(
        prompts,
        found.geometry,
        delayed=delayed,
        info=found.info,
        grid=None if found.info.position == "HFS" else patient_grid(found.geometry.default_grid(), found.info.position),
        source_format="siemens" if header.is_siemens else "interfile",
        notes=tuple(notes),
    )


def read_interfile_terms(
    path: str | os.PathLike[str], name: str, geometry: PETGeometry, limits: Limits = DEFAULT_LIMITS
) -> Tensor:
    """Factors or additive terms that belong to prompts: a sinogram of non-negative numbers with their bins.

    Args:
        path: the header.
        name: what they are, for the sentence.
        geometry: that of the prompts; without time of flight the terms hold for every time bin.
        limits: how much memory they may claim.

    Raises:
        BadInput: as read_interfile, or the bins are others.
    """
    found = sinogram_of(read_interfile_header(path))
    same = _alike(found.geometry, geometry)
    flat = geometry.tof is not None and _alike(found.geometry, replace(geometry, tof=None))
    if not (same or flat):
        raise BadInput(
            path,
            f"has {name} of size {found.geometry.shape} on {found.geometry.scanner.name!r}, the prompts "
            f"{tuple(geometry.shape)} on {geometry.scanner.name!r}",
            "both must describe the same bins",
        )
    terms = _load(found, name, "terms", limits, 1, 1)
    return terms if same else terms[:, :, None, :].expand(geometry.shape)


def describe_interfile(path: str | os.PathLike[str]) -> dict[str, Any]:
    """From the header alone."""
    header = read_interfile_header(path)
    if is_image(header):
        return describe_interfile_image(header)
    found = sinogram_of(header)
    geometry = found.geometry
    out = {
        "format": "Siemens Interfile sinogram" if header.is_siemens else "Interfile sinogram",
        "scanner": geometry.scanner.name,
        "rings": geometry.scanner.rings,
        "crystals_of_a_ring": geometry.scanner.crystals,
        "views": geometry.n_views,
        "radial_bins": geometry.n_radial,
        "planes": geometry.n_planes,
        "span": geometry.span,
        "largest_ring_difference": geometry.max_ring_difference,
        "time_bins": geometry.tof.bins if geometry.tof else None,
        "dtype": str(found.dtype),
        "data": header.data_file().name if header.data_file().is_file() else "none: a template",
        "duration_s": found.info.duration_s,
        "isotope": found.info.isotope,
        "position": found.info.position,
        "notes": list(found.notes),
    }
    return {key: value for key, value in out.items() if value is not None}


def _load(found: Sinogram, name: str, kind: Kind, limits: Limits, index: int, sets: int) -> Tensor:
    header, geometry = found.header, found.geometry
    path, data = header.path, header.data_file()
    if not data.is_file():
        raise BadInput(
            path, f"names the data file {data.name!r}, which is not there", "put it beside, or take it as a template"
        )
    stored, offset = check_file(data), header.offset(index)
    needed = found.numbers * found.dtype.itemsize
    if stored - offset < needed or (sets == 1 and stored - offset != needed):
        raise BadInput(
            path,
            f"describes {' x '.join(map(str, geometry.shape))} numbers of {found.dtype.itemsize} bytes ({needed} "
            f"bytes), {data.name} has {max(0, stored - offset)} after its offset of {offset}",
            "header and data must belong together",
        )
    check_array(path, name, geometry.shape, 4, 1 << 62, False, limits)
    out = np.empty(geometry.shape, np.float32)
    total, low_bits = 0.0, 0
    for view, plane, time, block in _pieces(found, data, offset):
        check_counts(data, name, block, kind)
        if block.dtype.kind in "iu":
            low_bits |= int(np.bitwise_or.reduce(block, axis=None))
        values = block.astype(np.float32) if found.scale == 1.0 else (block * found.scale).astype(np.float32)
        total += float(values.sum(dtype=np.float64))
        target = out[view] if time is None else out[view, :, time]
        target[:, :, plane] = values.transpose((0, 2, 1) if found.view_outer else (1, 2, 0))
    if total == 0 and not (out.size and bool((out != 0).any())):
        what = "no counts" if kind != "terms" else f"{name} that are zero everywhere"
        if name != "delayed coincidences" and name != "additive terms":
            raise BadInput(data, f"holds {what}", "export it again")
    half = 4 * found.dtype.itemsize
    if kind == "counts" and found.dtype.itemsize > 1 and low_bits and not low_bits & ((1 << half) - 1):
        raise BadInput(
            data,
            f"holds counts that are all multiples of {1 << half}: their bytes are in the other order",
            "correct the header's byte order",
        )
    return torch.from_numpy(out)


def _pieces(
    found: Sinogram, data: Path, offset: int
) -> Iterator[tuple[slice, slice | NDArray[np.int64], int | None, NDArray[Any]]]:
    """Views, our planes, our time bin and the stored numbers, piece by piece in the file's order."""
    views, radial = found.geometry.n_views, found.geometry.n_radial
    with data.open("rb") as file:
        file.seek(offset)
        for time in found.tof or (None,):
            for planes in found.planes:
                shape = (views, len(planes)) if found.view_outer else (len(planes), views)
                step = max(1, _PIECE_BYTES // (shape[1] * radial * found.dtype.itemsize))
                for start in range(0, shape[0], step):
                    stop = min(start + step, shape[0])
                    count = (stop - start) * shape[1] * radial
                    block = np.fromfile(file, found.dtype, count)
                    if block.size != count:
                        raise BadInput(data, "changed while it was read", "try again")
                    piece = block.reshape(stop - start, shape[1], radial)
                    if found.view_outer:
                        yield slice(start, stop), falling(planes), time, piece
                    else:
                        yield slice(0, views), falling(planes[start:stop]), time, piece


def _alike(a: PETGeometry, b: PETGeometry) -> bool:
    """Whether two geometries have the same bins; scanners may differ in name and by what headers round."""
    one, two = a.scanner, b.scanner
    return (
        (a.shape, a.span, a.max_ring_difference, one.rings, one.crystals)
        == (b.shape, b.span, b.max_ring_difference, two.rings, two.crystals)
        and math.isclose(one.radius_mm, two.radius_mm, rel_tol=1e-3)
        and math.isclose(one.ring_spacing_mm, two.ring_spacing_mm, rel_tol=1e-3)
        and math.isclose(one.tilt_rad, two.tilt_rad, abs_tol=1e-3)
    )


def _data_sets(header: InterfileHeader) -> dict[str, int]:
    """Data sets that a header of Siemens lists: name -> index."""
    count = header.whole("number of scan data types", low=1, high=16) or 0
    names = [(header.text("scan data type description", index=k) or "").lower() for k in range(1, count + 1)]
    return {name: k for k, name in enumerate(names, start=1) if name}

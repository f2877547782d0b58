"""fastMRI HDF5: `kspace` [slice, coil, readout, phase], an ISMRMRD header, and a mask of columns in test files.

The readout runs along the rows and is oversampled, as the scanner took it; it is cut to the field of view of the
image. Undersampled files are full of zeros where nothing was measured. Format: Zbontar et al., arXiv 1811.08839.
"""

from __future__ import annotations

import os

import numpy as np

from recon3d.geometry import VolumeGrid
from recon3d.io.guard import DEFAULT_LIMITS, BadInput, Limits
from recon3d.io.hdf5 import HDF5Reader, Tree
from recon3d.io.kspace import KSpace, KSpaceOptions, assemble_cartesian, crop_axis, sampled_points, slices_of
from recon3d.io.mrheader import MRHeader, parse_header


def read_fastmri(
    path: str | os.PathLike[str],
    options: KSpaceOptions,
    reader: HDF5Reader,
    tree: Tree,
    limits: Limits = DEFAULT_LIMITS,
) -> KSpace:
    """k-space from an open reader whose tree has `kspace` and `ismrmrd_header`.

    Raises:
        BadInput: as read_kspace.
    """
    header = parse_header(path, reader.text(path, "ismrmrd_header"))
    shape = check_shape(path, tree)
    first, last = slices_of(path, options, shape[0])
    data = reader.load(path, "kspace", [(first, last, None)], limits)
    if data.ndim == 3:
        data = data[:, None]
    if data.dtype.kind != "c":
        raise BadInput(path, f"has k-space of type {data.dtype}", "complex numbers are read")
    mask = None
    if "mask" in tree:
        mask = reader.load(path, "mask", (), limits)
        if mask.ndim == 3 and mask.shape[0] == shape[0]:
            mask = mask[first:last]
    notes: list[str] = []
    grid = grid_of(path, header, shape, options, notes)
    rows, size = shape[2], readout_size(header, shape[2])
    cut = options.crop_readout
    if cut is not False and size < rows:
        whole = bool(np.isfinite(data).all() and sampled_points(data).any(axis=(0, 2)).all())
        if whole and (mask is None or mask.ndim == 1):
            data = crop_axis(data, 2, size)
            grid = VolumeGrid((grid.shape[0], size, grid.shape[2]), grid.spacing_mm)
            notes.append(f"the readout of {rows} samples is cut to the {size} pixels of the image's field of view")
        elif cut:
            raise BadInput(path, "does not sample its readout whole", "read it without crop_readout")
    if (first, last) != (0, shape[0]):
        grid = grid.slab(first, last)
    return assemble_cartesian(path, data, grid, "fastmri", notes, mask)


def check_shape(path: str | os.PathLike[str], tree: Tree) -> tuple[int, int, int, int]:
    """Slices, coils, rows and columns as the file's table says.

    Raises:
        BadInput: `kspace` is not a dataset of three or four axes.
    """
    shape = tree["kspace"].get("shape", ())
    if len(shape) not in (3, 4) or 0 in shape:
        raise BadInput(path, f"has kspace of size {shape}", "[slice, coil, readout, phase] is read")
    slices, *rest = shape if len(shape) == 4 else (shape[0], 1, *shape[1:])
    return slices, rest[0], rest[1], rest[2]


def readout_size(header: MRHeader, rows: int) -> int:
    """Pixels of the readout within the image's field of view."""
    wide, wanted = header.encoded.fov_mm[0], header.recon.fov_mm[0]
    if rows != header.encoded.matrix[0] or not 0 < wanted < wide:
        return rows
    return max(1, min(rows, round(rows * wanted / wide)))


def grid_of(
    path: str | os.PathLike[str],
    header: MRHeader,
    shape: tuple[int, int, int, int],
    options: KSpaceOptions,
    notes: list[str],
) -> VolumeGrid:
    """The grid before the readout is cut: pixels are those of the encoded space; no orientation is recorded."""
    if shape[2] != header.encoded.matrix[0]:
        notes.append(
            f"the header encodes {header.encoded.matrix[0]} samples, kspace has {shape[2]}; the header's field of view "
            "is taken for all of them"
        )
    steps = header.pixel_mm(path, (shape[2], shape[3]), options, notes)
    thickness = header.slice_step_mm(path, options, notes)
    notes.append("orientation and slice distance are not recorded in this format; slices are taken to touch")
    return VolumeGrid((shape[0], shape[2], shape[3]), (thickness, *steps))

"""Training volumes: NIfTI files, DICOM series and arrays, turned one way, checked, and in network units.

Whatever the file, axes become z to the head, y to the back, x to the left; arrays are taken to lie so already. What
no network can learn from is refused in a sentence: constant images, values of another unit than the configuration
says, and folders that mix what should not be trained on together.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from recon3d.io import BadInput, read_dicom
from recon3d.io.dicom import is_dicom
from recon3d.io.hdf5 import HDF5Reader
from recon3d.io.layout import load_npz
from recon3d.priors.training.config import DataConfig, SourceConfig

__all__ = ["Volume", "check_alike", "find", "load_volume", "stem"]

_ARRAYS = (".npy", ".npz", ".h5", ".hdf5")
_PLANES = ("axial", "coronal", "sagittal")
# in-plane spacings of one source may differ by this factor: zooming covers less than that
_MOST_RATIO = 3.0
# network units from the lowest to the highest value of a volume: beyond, the file's unit is not the configuration's
_SPREAD = (0.02, 100.0)
# slices this much thicker than wide say in which plane a volume was acquired
_THICK = 1.5


@dataclass(frozen=True)
class Volume:
    """One training volume in network units.

    Attributes:
        name: of its file.
        values: [z, y, x] float32; `parts` planes a slice one after another, [z * parts, y, x].
        spacing_mm: z, y, x.
        weight: share of the crops.
        max_block_z: up to so many slices are averaged.
        open_air: the border is background, so background may be continued beyond it.
        condition: the image beside it, [z, y, x] in network units of its own.
        parts: channels of a voxel, or 2 for real and imaginary parts.
        acquired: the plane of its thick slices, None where there are none.
    """

    name: str
    values: Tensor
    spacing_mm: tuple[float, float, float]
    weight: float
    max_block_z: int
    open_air: bool
    condition: Tensor | None = None
    parts: int = 1
    acquired: str | None = None


def stem(path: Path) -> str:
    """The name that a card and `exclude` know a file or folder by."""
    name = path.name.removesuffix(".gz").removesuffix(".nii")
    return Path(name).stem if Path(name).suffix in _ARRAYS else name


def find(root: Path, source: SourceConfig, skip: set[str]) -> list[Path]:
    """The files and DICOM folders of a source, without those to skip.

    Raises:
        ValueError: nothing matches.
    """
    found = sorted(root.glob(source.path)) if not Path(source.path).is_absolute() else [Path(source.path)]
    # a slice of a DICOM series stands for its folder
    found = list(dict.fromkeys(p.parent if p.suffix.lower() in (".dcm", ".ima") else p for p in found))
    found = [p for p in found if stem(p) not in skip]
    if not found:
        raise ValueError(f"training data: no volume matches {source.path!r} under {root}")
    return found


def load_volume(
    path: Path,
    data: DataConfig,
    weight: float = 1.0,
    max_block_z: int = 1,
    plane: str | None = None,
    source: SourceConfig | None = None,
) -> Volume:
    """A volume turned to [z, y, x] = (superior, posterior, left), clipped and mapped to network units.

    Another plane than the axial one puts its own axis first; `plane` None is that of `data`. `source` says the spacing
    of arrays.

    Raises:
        BadInput: the file cannot be read.
        ValueError: the file is not such a volume, is constant, has no finite values, a spacing that is not positive,
            another unit than `data` says or fewer slices than a crop has.
    """
    plane = plane or data.plane
    values, spacing = _read(path, data, source)
    if not np.isfinite(values).all() or not all(s > 0 and np.isfinite(s) for s in spacing):
        raise ValueError(f"training data {path}: values must be finite and spacings positive")
    if np.iscomplexobj(values):
        _check_complex(path, data)
        parts, volume = 2, values
    else:
        parts, volume = len(values), np.clip(values, *data.clip)
    acquired = _acquired(spacing)
    first = _PLANES.index(plane)
    volume = np.moveaxis(volume, 1 + first, 1)
    across, down, right = spacing[first], *(s for k, s in enumerate(spacing) if k != first)
    if volume.shape[1] < data.slices:
        raise ValueError(f"training data {path}: crops have {data.slices} {plane} slices, it has {volume.shape[1]}")
    size = np.abs(volume) if np.iscomplexobj(volume) else volume
    scale = _scale(path, size, data)
    _check_range(path, values, size, data, scale)
    border = np.concatenate(
        [size[:, :, 0].ravel(), size[:, :, -1].ravel(), size[..., 0].ravel(), size[..., -1].ravel()]
    )
    open_air = bool(np.median(np.abs(border - data.background)) < 0.1 * scale)
    volume = (volume - data.file_offset) / scale
    if np.iscomplexobj(volume):
        volume = np.concatenate([volume.real, volume.imag])
    # the parts of a slice one after another
    net = torch.from_numpy(np.ascontiguousarray(volume.swapaxes(0, 1), dtype=np.float32)).flatten(0, 1)
    if data.floor > 0:
        net = (net.square() - data.floor**2).clamp(min=0).sqrt()
    return Volume(stem(path), net, (across, down, right), weight, max_block_z, open_air, parts=parts, acquired=acquired)


def check_alike(volumes: Sequence[Volume], source: str) -> None:
    """Whether the volumes of one source may be trained on together.

    Raises:
        ValueError: their pixels differ too much, or they were acquired in different planes.
    """
    pixel = {v.name: (v.spacing_mm[1] * v.spacing_mm[2]) ** 0.5 for v in volumes}
    fine, coarse = min(pixel, key=pixel.__getitem__), max(pixel, key=pixel.__getitem__)
    if pixel[coarse] > _MOST_RATIO * pixel[fine]:
        raise ValueError(
            f"training data {source!r} mixes spacings: pixels of {pixel[fine]:.3g} mm ({fine}) and {pixel[coarse]:.3g} "
            f"mm ({coarse}), at most a factor of {_MOST_RATIO:g} is taken; give each kind a source of its own"
        )
    planes = {v.acquired: v.name for v in volumes if v.acquired is not None}
    if len(planes) > 1:
        said = " and ".join(f"{plane} ones ({name})" for plane, name in sorted(planes.items()))
        raise ValueError(
            f"training data {source!r} mixes orientations: it has thick {said}; give each kind a source of its own"
        )


def _read(path: Path, data: DataConfig, source: SourceConfig | None) -> tuple[NDArray[Any], tuple[float, float, float]]:
    """Values [part, z, y, x] in the file's unit, and spacings z, y, x."""
    if path.suffix in _ARRAYS:
        values, spacing = _read_array(path, source)
    elif path.is_dir() or is_dicom(path):
        image = read_dicom(path)
        values, spacing = image.volume.numpy(), image.grid.spacing_mm
    else:
        values, spacing = _read_nifti(path)
    channels = data.channels
    if values.ndim == 3 and channels == 1:
        values = values[None]
    elif values.ndim != 4 or len(values) != channels:
        wanted = "a 3D volume" if channels == 1 else f"a volume of {channels} channels"
        shape = " x ".join(map(str, values.shape))
        raise ValueError(f"training data {path}: expected {wanted}, got {shape}; data.channels says how many there are")
    return values, spacing


def _read_nifti(path: Path) -> tuple[NDArray[Any], tuple[float, float, float]]:
    import nibabel
    from nibabel.filebasedimages import ImageFileError

    try:
        image = nibabel.load(path)
        values = np.asanyarray(image.dataobj)
        values = values.astype(np.complex64 if np.iscomplexobj(values) else np.float32, copy=False)
    except (OSError, EOFError, ValueError, zlib.error, ImageFileError) as error:
        why = f"cannot be read as a NIfTI volume ({str(error).splitlines()[0]})"
        raise BadInput(path, why, "check data.root and the file") from None
    if values.ndim not in (3, 4):
        raise ValueError(f"training data {path}: expected a 3D volume, got {values.ndim} axes")
    start = nibabel.orientations.io_orientation(image.affine)
    want = nibabel.orientations.axcodes2ornt(("L", "P", "S"))
    values = nibabel.orientations.apply_orientation(values, nibabel.orientations.ornt_transform(start, want))
    zooms = np.linalg.norm(image.affine[:3, :3], axis=0)[np.argsort(start[:, 0])]
    return values.T, (float(zooms[2]), float(zooms[1]), float(zooms[0]))  # L, P, S, part -> part, z, y, x


def _read_array(path: Path, source: SourceConfig | None) -> tuple[NDArray[Any], tuple[float, float, float]]:
    if source is None or source.spacing_mm is None:
        raise ValueError(f"training data {path}: an array does not say its spacing; give spacing_mm: [z, y, x]")
    name = source.dataset
    if path.suffix == ".npy":
        values = _load_npy(path)
    elif path.suffix == ".npz":
        found = load_npz(path, {name or "volume"})
        if not found:
            raise BadInput(path, f"has no array {name or 'volume'}", "name it in dataset")
        values = next(iter(found.values()))
    else:
        with HDF5Reader() as reader:
            values = reader.load(path, name or "volume")
    if values.dtype.kind not in "biufc" or values.ndim not in (3, 4):
        shape = " x ".join(map(str, values.shape))
        raise ValueError(f"training data {path}: expected numbers [z, y, x] or [channel, z, y, x], got {shape}")
    return values.astype(np.complex64 if np.iscomplexobj(values) else np.float32, copy=False), source.spacing_mm


def _load_npy(path: Path) -> NDArray[Any]:
    try:
        # mapped: a header that lies about sizes claims no memory
        loaded: NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError, SyntaxError) as error:
        raise BadInput(path, f"is not a readable npy array ({str(error).splitlines()[0]})", "save it again") from None
    return loaded


def _acquired(spacing: tuple[float, float, float]) -> str | None:
    thick = int(np.argmax(spacing))
    others = [s for k, s in enumerate(spacing) if k != thick]
    return _PLANES[thick] if spacing[thick] > _THICK * max(others) else None


def _scale(path: Path, size: NDArray[Any], data: DataConfig) -> float:
    """File units of one network unit."""
    if data.percentile is not None:
        scale = float(np.percentile(size, data.percentile)) - data.file_offset
        if not scale > 0:
            raise ValueError(f"training data {path}: percentile {data.percentile:g} is not above file_offset")
        return scale
    if data.mean_above is not None:
        if not size.max() > max(0.0, data.file_offset):
            raise ValueError(f"training data {path}: mean_above needs values above 0 and file_offset")
        return float(size[size > data.mean_above * size.max()].mean(dtype=np.float64)) - data.file_offset
    return data.file_scale


def _check_range(path: Path, values: NDArray[Any], size: NDArray[Any], data: DataConfig, scale: float) -> None:
    """Constant images, and values of another unit than the configuration's."""
    shown = np.abs(values) if np.iscomplexobj(values) else values
    low, high = float(shown.min()), float(shown.max())
    if low == high:
        raise ValueError(f"training data {path}: every voxel is {low:g}; a constant image teaches nothing, exclude it")
    inside = float(np.mean((shown >= data.clip[0]) & (shown <= data.clip[1])))
    # a scale of the volume's own fits it whatever its unit
    own = data.percentile is not None or data.mean_above is not None
    if inside >= 0.5 and (own or _SPREAD[0] <= float(size.max() - size.min()) / scale <= _SPREAD[1]):
        return
    raise ValueError(
        f"training data {path}: values from {low:.4g} to {high:.4g} are far from what the configuration says (clip "
        f"{data.clip[0]:g} to {data.clip[1]:g}, one network unit = {scale:g}); is it another unit? set clip, "
        "file_offset and file_scale for it"
    )


def _check_complex(path: Path, data: DataConfig) -> None:
    if not data.complex or data.slices > 1 or data.floor > 0 or data.gamma != (1.0, 1.0) or data.lesions.share > 0:
        raise ValueError(
            f"training data {path}: complex values need complex: true and slices: 1, without floor, gamma and lesions"
        )

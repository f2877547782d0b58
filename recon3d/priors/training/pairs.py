"""Training volumes with the image that a conditional prior is shown beside them: who belongs to whom, on one grid.

Two globs name the pairs. What a wildcard of one stands for must be what the other's stands for: `ct_*.nii.gz` and
`mr_*_t1w.nii.gz` make a pair of ct_041.nii.gz and mr_041_t1w.nii.gz and of no others. The condition is brought onto
the target's voxels by trilinear interpolation at the places that both affines give, and the pair is cut to the box of
voxels where the condition shows anything: elsewhere there is nothing to learn from it. A
condition much finer than the target is not averaged; make it coarser first.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from recon3d.geometry import VolumeGrid
from recon3d.io import BadInput, read_image
from recon3d.operators.attenuation import resample_volume
from recon3d.priors.base import ConditionCard, ModelCard, condition_volume
from recon3d.priors.training.config import ConditionConfig

if TYPE_CHECKING:
    from recon3d.priors.training.volumes import Volume

__all__ = ["condition_card", "partners", "with_condition"]

_WILDCARD = re.compile(r"\*\*/|\*|\?|\[[^\]]+\]")
_AXES = {"axial": (0, 1, 2), "coronal": (1, 0, 2), "sagittal": (2, 0, 1)}


def partners(targets: Sequence[Path], pattern: str, condition: str, root: Path) -> list[Path]:
    """The condition of every target, in the targets' order.

    Args:
        targets: files that `pattern` matches.
        pattern: file or glob of the targets, relative to root.
        condition: file or glob of the conditions, with as many wildcards.
        root: folder that both are relative to.

    Raises:
        ValueError: the globs have different numbers of wildcards, or a target has no condition of its name.
    """
    wildcards = [len(_WILDCARD.findall(text)) for text in (pattern, condition)]
    if wildcards[0] != wildcards[1]:
        raise ValueError(
            f"training pairs: {pattern!r} has {wildcards[0]} wildcards and {condition!r} {wildcards[1]}; "
            "give both the same, so that names can be compared"
        )
    if not wildcards[1]:
        return [root / condition for _ in targets]  # one named file beside another
    found = sorted(root.glob(condition))
    by_key = {_key(path, condition, root): path for path in found}
    out = []
    for target in targets:
        key = _key(target, pattern, root)
        if key not in by_key:
            have = ", ".join(path.name for path in found[:3]) or "none"
            raise ValueError(
                f"training pairs: {target.name} needs a condition {condition!r} whose wildcard is "
                f"{' and '.join(key)!r}, found {have}; rename it or exclude {target.name}"
            )
        out.append(by_key[key])
    return out


def with_condition(volume: Volume, target: Path, condition: Path, config: ConditionConfig, plane: str) -> Volume:
    """A loaded volume with its condition in network units, both cut to where the condition shows anything.

    Args:
        volume: of the file `target`, as `load_volume` arranged it.
        target: its file.
        condition: the other image of the same body, in the same world coordinates.
        config: how the condition is scaled.
        plane: of the volume's slices.

    Raises:
        BadInput: a file cannot be read.
        ValueError: the two do not overlap, or the condition's percentile is not positive.
    """
    order = _AXES[plane]
    for path in (target, condition):
        if path.suffix in (".npy", ".npz", ".h5", ".hdf5"):
            raise BadInput(path, "an array has no place in the world", "give pairs as NIfTI or DICOM")
    _, onto, _ = read_image(target)
    image, own, _ = read_image(condition)
    card = condition_card(config)
    image = condition_volume(ModelCard(name=condition.name, cond_channels=1, condition=card), image.clamp(*config.clip))
    # outside is zero to the resampling, so the background is
    beside = resample_volume((image - card.offset) / card.scale - config.empty, own, onto) + config.empty
    box = _field_of_view(image != config.background, own, onto)
    if box[0].stop == 0:
        raise ValueError(
            f"training pairs: {condition} and {target} do not overlap in world coordinates; "
            "bring them into one frame or exclude them"
        )
    cut = tuple(box[axis] for axis in order)
    values = volume.values.unflatten(0, (-1, volume.parts))[cut[0], :, cut[1], cut[2]].flatten(0, 1)
    return replace(
        volume,
        values=values.contiguous(),
        condition=beside.permute(order)[cut].contiguous(),
        # the border of a cut is no air, whatever the volume's own border was
        open_air=volume.open_air and values.shape == volume.values.shape,
    )


def condition_card(config: ConditionConfig) -> ConditionCard:
    """What the model card says of the condition."""
    return ConditionCard(what=config.what, percentile=config.percentile, offset=config.offset, scale=config.scale)


def _key(path: Path, pattern: str, root: Path) -> tuple[str, ...]:
    """What the wildcards of a pattern stand for in a path that it matches."""
    parts, at = [], 0
    for found in _WILDCARD.finditer(pattern):
        parts.append(re.escape(pattern[at : found.start()]))
        text = found.group()
        parts.append({"**/": "((?:.*/)?)", "*": "([^/]*)", "?": "([^/])"}.get(text, f"({text.replace('[!', '[^')})"))
        at = found.end()
    parts.append(re.escape(pattern[at:]))
    match = re.fullmatch("".join(parts), path.relative_to(root).as_posix())
    return match.groups() if match else (path.name,)


def _field_of_view(shown: Tensor, own: VolumeGrid, onto: VolumeGrid) -> tuple[slice, slice, slice]:
    """The smallest box (z, y, x) of a grid with all voxels whose centres lie where another volume shows anything."""
    turn = np.linalg.inv(own.matrix()) @ onto.matrix()
    z, y, x = np.ogrid[tuple(slice(0, n) for n in onto.shape)]
    inside = np.ones(onto.shape, dtype=bool)
    for row, part in zip(turn[:3], reversed(_extent(shown.numpy())), strict=True):
        place = row[0] * x + row[1] * y + row[2] * z + row[3]
        inside &= (place > part.start - 0.5) & (place < part.stop - 0.5)
    return _extent(inside)


def _extent(mask: NDArray[np.bool_]) -> tuple[slice, slice, slice]:
    """The smallest box that holds all that is true; empty where nothing is."""
    box = []
    for others in ((1, 2), (0, 2), (0, 1)):
        found = np.flatnonzero(mask.any(axis=others))
        box.append(slice(int(found[0]), int(found[-1]) + 1) if len(found) else slice(0, 0))
    return box[0], box[1], box[2]

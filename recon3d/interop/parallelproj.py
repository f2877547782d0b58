"""Joseph's projectors as parallelproj calls them, on recon3d's operators.

Lines run from xstart to xend, [..., 3] world coordinates in the order of the image's axes; img_origin is where voxel
(0, 0, 0) has its centre and voxsize what separates voxels. Results are in the image's unit times the coordinates'.

Bins of time of flight are counted from xstart to xend. A sinogram's bin b of ntofbins is centred
(b - (ntofbins - 1) / 2) tofbin_width from the line's middle, a listmode event's tofbin counts from the central bin, 0;
tofcenter_offset moves all bins towards xend. sigma_tof and tofcenter_offset hold one number, or one per line.

Differences from parallelproj: the Gaussian is renormalised after its cut at nsigmas, so bins add up to the projection
without time of flight exactly; a line at exactly 45 degrees between two axes steps along the second, then the third,
then the first; nothing is added atomically, so results repeat to the bit; coordinates are taken as float64 and float64
images stay float64. threadsperblock and num_chunks are accepted and not needed. Differentiable for torch tensors, in
the image and in the projection.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from recon3d.geometry.pet import TOF
from recon3d.interop.arrays import as_given, to_torch
from recon3d.ops.joseph3d import joseph3d, joseph3d_adjoint

__all__ = [
    "joseph3d_back",
    "joseph3d_back_tof_lm",
    "joseph3d_back_tof_sino",
    "joseph3d_fwd",
    "joseph3d_fwd_tof_lm",
    "joseph3d_fwd_tof_sino",
]

# points and pairs
Part = tuple[Tensor, Tensor]

# lines handed to the operator at once: their float64 coordinates are as large as everything else
_LINES = 1 << 22
# different resolutions in one call; each is a call of the operator
_MOST_SIGMAS = 64


def joseph3d_fwd(
    xstart: Any, xend: Any, img: Any, img_origin: Any, voxsize: Any, threadsperblock: int = 32, num_chunks: int = 1
) -> Any:
    """Line integrals of an image.

    Args:
        xstart: where lines start, [..., 3].
        xend: where they end, [..., 3].
        img: image, [n0, n1, n2]; float64 stays float64, everything else becomes float32.
        img_origin: centre of voxel (0, 0, 0), [3].
        voxsize: distance of voxels along the three axes, [3].
        threadsperblock: accepted, not needed.
        num_chunks: accepted, not needed.

    Returns:
        [...], an array like img.

    Raises:
        ValueError: shapes that do not fit, coordinates that are not finite, voxel sizes that are not positive.

    >>> ones = [[[1.0] * 4] * 4] * 4
    >>> float(joseph3d_fwd([[-9.0, 2.0, 2.0]], [[9.0, 2.0, 2.0]], ones, [0.5] * 3, [1.0] * 3)[0])
    4.0
    """
    lines = _lines("joseph3d_fwd", xstart, xend)
    image = _data(img)
    grid = _grid("joseph3d_fwd", image.shape, img_origin, voxsize)
    parts = [joseph3d(image, *part, grid.spacing) for _, part in _pieces(lines, grid)]
    return as_given(_joined(parts, image, 0).reshape(lines.shape), img)


def joseph3d_back(
    xstart: Any,
    xend: Any,
    img_shape: tuple[int, int, int],
    img_origin: Any,
    voxsize: Any,
    img_fwd: Any,
    threadsperblock: int = 32,
    num_chunks: int = 1,
) -> Any:
    """Transpose of joseph3d_fwd: values img_fwd, [...], to an image of img_shape, an array like img_fwd."""
    lines = _lines("joseph3d_back", xstart, xend)
    values = _values("joseph3d_back", img_fwd, lines, ())
    grid = _grid("joseph3d_back", img_shape, img_origin, voxsize)

    def step(piece: slice, part: Part, some: Tensor) -> Tensor:
        return joseph3d_adjoint(some[piece], *part, grid.shape, grid.spacing)

    return as_given(_back(lines, grid, values, step), img_fwd)


def joseph3d_fwd_tof_sino(
    xstart: Any,
    xend: Any,
    img: Any,
    img_origin: Any,
    voxsize: Any,
    tofbin_width: float,
    sigma_tof: Any,
    tofcenter_offset: Any,
    nsigmas: float,
    ntofbins: int,
    threadsperblock: int = 32,
    num_chunks: int = 1,
) -> Any:
    """Projections of an image in all bins of time of flight.

    Args:
        xstart: as in joseph3d_fwd.
        xend: as in joseph3d_fwd.
        img: as in joseph3d_fwd.
        img_origin: as in joseph3d_fwd.
        voxsize: as in joseph3d_fwd.
        tofbin_width: width of a bin, in the unit of the coordinates.
        sigma_tof: standard deviation of the position along a line, [1] or one per line (at most 64 different ones).
        tofcenter_offset: how far the central bin lies from the line's middle towards xend, [1] or one per line.
        nsigmas: where the Gaussian ends.
        ntofbins: number of bins.
        threadsperblock: accepted, not needed.
        num_chunks: accepted, not needed.

    Returns:
        [..., ntofbins], an array like img.

    Raises:
        ValueError: as joseph3d_fwd; numbers of time of flight that are not positive or do not match the lines; an
            offset of a line that ends inside the image.
    """
    name = "joseph3d_fwd_tof_sino"
    lines, image = _lines(name, xstart, xend), _data(img)
    grid = _grid(name, image.shape, img_origin, voxsize)
    lines = _shifted(name, lines, tofcenter_offset, grid)
    out = image.new_zeros(0)
    for rows, tof in _resolutions(name, lines, ntofbins, tofbin_width, sigma_tof, nsigmas):
        some = lines.take(rows)
        parts = [joseph3d(image, *part, grid.spacing, tof=tof) for _, part in _pieces(some, grid)]
        out = _placed(out, rows, _joined(parts, image, tof.bins), lines)
    return as_given(out.reshape(*lines.shape, int(ntofbins)), img)


def joseph3d_back_tof_sino(
    xstart: Any,
    xend: Any,
    img_shape: tuple[int, int, int],
    img_origin: Any,
    voxsize: Any,
    img_fwd: Any,
    tofbin_width: float,
    sigma_tof: Any,
    tofcenter_offset: Any,
    nsigmas: float,
    ntofbins: int,
    threadsperblock: int = 32,
    num_chunks: int = 1,
) -> Any:
    """Transpose of joseph3d_fwd_tof_sino: values img_fwd, [..., ntofbins], to an image of img_shape."""
    name = "joseph3d_back_tof_sino"
    lines = _lines(name, xstart, xend)
    values = _values(name, img_fwd, lines, (int(ntofbins),))
    grid = _grid(name, img_shape, img_origin, voxsize)
    lines = _shifted(name, lines, tofcenter_offset, grid)
    out = values.new_zeros(grid.shape)
    for rows, tof in _resolutions(name, lines, ntofbins, tofbin_width, sigma_tof, nsigmas):

        def step(piece: slice, part: Part, some: Tensor, tof: TOF = tof) -> Tensor:
            return joseph3d_adjoint(some[piece], *part, grid.shape, grid.spacing, tof=tof)

        out = out + _back(lines.take(rows), grid, values if rows is None else values[rows], step)
    return as_given(out, img_fwd)


def joseph3d_fwd_tof_lm(
    xstart: Any,
    xend: Any,
    img: Any,
    img_origin: Any,
    voxsize: Any,
    tofbin_width: float,
    sigma_tof: Any,
    tofcenter_offset: Any,
    nsigmas: float,
    tofbin: Any,
    threadsperblock: int = 32,
    num_chunks: int = 1,
) -> Any:
    """Projections of an image for listmode events: as joseph3d_fwd_tof_sino, but each line in its bin alone.

    Args:
        xstart: as in joseph3d_fwd.
        xend: as in joseph3d_fwd.
        img: as in joseph3d_fwd.
        img_origin: as in joseph3d_fwd.
        voxsize: as in joseph3d_fwd.
        tofbin_width: as in joseph3d_fwd_tof_sino.
        sigma_tof: as in joseph3d_fwd_tof_sino.
        tofcenter_offset: as in joseph3d_fwd_tof_sino.
        nsigmas: as in joseph3d_fwd_tof_sino.
        tofbin: bin of every line, [...] integers, 0 is the central one and negative ones lie towards xstart.
        threadsperblock: accepted, not needed.
        num_chunks: accepted, not needed.

    Returns:
        [...], an array like img.

    Raises:
        ValueError: as joseph3d_fwd_tof_sino.
    """
    name = "joseph3d_fwd_tof_lm"
    lines, image = _lines(name, xstart, xend), _data(img)
    grid = _grid(name, image.shape, img_origin, voxsize)
    lines = _shifted(name, lines, tofcenter_offset, grid)
    bins, count = _event_bins(name, lines, tofbin)
    out = image.new_zeros(0)
    for rows, tof in _resolutions(name, lines, count, tofbin_width, sigma_tof, nsigmas):
        own = bins if rows is None else bins[rows]
        parts = [
            joseph3d(image, *part, grid.spacing, tof=tof, tof_bins=own[piece])
            for piece, part in _pieces(lines.take(rows), grid)
        ]
        out = _placed(out, rows, _joined(parts, image, 0), lines)
    return as_given(out.reshape(lines.shape), img)


def joseph3d_back_tof_lm(
    xstart: Any,
    xend: Any,
    img_shape: tuple[int, int, int],
    img_origin: Any,
    voxsize: Any,
    img_fwd: Any,
    tofbin_width: float,
    sigma_tof: Any,
    tofcenter_offset: Any,
    nsigmas: float,
    tofbin: Any,
    threadsperblock: int = 32,
    num_chunks: int = 1,
) -> Any:
    """Transpose of joseph3d_fwd_tof_lm: values img_fwd, [...], of events to an image of img_shape."""
    name = "joseph3d_back_tof_lm"
    lines = _lines(name, xstart, xend)
    values = _values(name, img_fwd, lines, ())
    grid = _grid(name, img_shape, img_origin, voxsize)
    lines = _shifted(name, lines, tofcenter_offset, grid)
    bins, count = _event_bins(name, lines, tofbin)
    out = values.new_zeros(grid.shape)
    for rows, tof in _resolutions(name, lines, count, tofbin_width, sigma_tof, nsigmas):
        own = bins if rows is None else bins[rows]

        def step(piece: slice, part: Part, some: Tensor, tof: TOF = tof, own: Tensor = own) -> Tensor:
            return joseph3d_adjoint(some[piece], *part, grid.shape, grid.spacing, tof=tof, tof_bins=own[piece])

        out = out + _back(lines.take(rows), grid, values if rows is None else values[rows], step)
    return as_given(out, img_fwd)


class _Grid(NamedTuple):
    shape: tuple[int, int, int]
    spacing: tuple[float, float, float]
    middle: Tensor  # [3] world coordinates


class _Lines(NamedTuple):
    start: Tensor  # [n, 3] float64
    end: Tensor
    shape: tuple[int, ...]  # as given, without the last axis

    def take(self, rows: Tensor | None) -> _Lines:
        return self if rows is None else _Lines(self.start[rows], self.end[rows], (len(rows),))


def _lines(name: str, xstart: Any, xend: Any) -> _Lines:
    start, end = to_torch(xstart), to_torch(xend)
    if start.ndim < 1 or start.shape != end.shape or start.shape[-1] != 3:
        raise ValueError(
            f"{name}: xstart and xend must be two arrays [..., 3] of one shape, got {tuple(start.shape)} and "
            f"{tuple(end.shape)}"
        )
    flat = [t.detach().reshape(-1, 3).double() for t in (start, end)]
    if not all(bool(t.isfinite().all()) for t in flat):
        raise ValueError(f"{name}: coordinates must be finite, xstart or xend holds NaN or infinity")
    return _Lines(flat[0], flat[1], tuple(start.shape[:-1]))


def _grid(name: str, shape: Any, origin: Any, voxsize: Any) -> _Grid:
    sizes = tuple(int(n) for n in shape)
    if len(sizes) != 3 or min(sizes) < 1:
        raise ValueError(f"{name}: an image has three axes and no empty one, got shape {sizes}")
    first, spacing = (to_torch(t).double().cpu().reshape(-1) for t in (origin, voxsize))
    if len(first) != 3 or len(spacing) != 3 or not bool((first.isfinite() & spacing.isfinite() & (spacing > 0)).all()):
        raise ValueError(
            f"{name}: img_origin must be three numbers and voxsize three positive ones, got {first.tolist()} and "
            f"{spacing.tolist()}"
        )
    half = (torch.tensor(sizes, dtype=torch.float64) - 1) / 2
    dz, dy, dx = spacing.tolist()
    return _Grid((sizes[0], sizes[1], sizes[2]), (dz, dy, dx), first + half * spacing)


def _pieces(lines: _Lines, grid: _Grid) -> Iterator[tuple[slice, Part]]:
    """Points, centred on the grid, and pairs of at most _LINES lines at a time."""
    middle = grid.middle.to(lines.start.device)
    for begin in range(0, len(lines.start), _LINES):
        piece = slice(begin, begin + _LINES)
        points = torch.cat([lines.start[piece], lines.end[piece]]) - middle
        row = torch.arange(len(points) // 2, dtype=torch.int32, device=points.device)
        yield piece, (points, torch.stack([row, row + len(row)], 1))


def _data(values: Any) -> Tensor:
    data = to_torch(values)
    return data if data.dtype in (torch.float32, torch.float64) else data.float()


def _values(name: str, values: Any, lines: _Lines, tail: tuple[int, ...]) -> Tensor:
    data = _data(values)
    want = (*lines.shape, *tail)
    if data.numel() != math.prod(want):
        raise ValueError(f"{name}: img_fwd must be {want}, one value per line and bin, got {tuple(data.shape)}")
    return data.reshape(len(lines.start), *tail)


def _joined(parts: list[Tensor], image: Tensor, bins: int) -> Tensor:
    return torch.cat(parts) if parts else image.new_zeros(0, *([bins] if bins else []))


def _placed(out: Tensor, rows: Tensor | None, values: Tensor, lines: _Lines) -> Tensor:
    """Values of some lines among those of all."""
    if rows is None:
        return values
    if not out.numel():
        out = values.new_zeros(len(lines.start), *values.shape[1:])
    return out.index_copy(0, rows.to(values.device), values)


def _back(lines: _Lines, grid: _Grid, values: Tensor, step: Callable[[slice, Part, Tensor], Tensor]) -> Tensor:
    out = values.new_zeros(grid.shape)
    for piece, part in _pieces(lines, grid):
        out = out + step(piece, part, values)
    return out


def _per_line(name: str, what: str, values: Any, n: int) -> Tensor:
    flat = to_torch(values).double().reshape(-1)
    if len(flat) not in (1, n) or not bool(flat.isfinite().all()):
        raise ValueError(f"{name}: {what} must be one finite number or one per line ({n}), got {len(flat)} of them")
    return flat


def _resolutions(
    name: str, lines: _Lines, bins: int, width: float, sigma: Any, nsigmas: float
) -> Iterator[tuple[Tensor | None, TOF]]:
    """The lines of every resolution (None: all of them) and their bins."""
    given = _per_line(name, "sigma_tof", sigma, len(lines.start))
    sigmas = given.unique()
    if len(sigmas) > _MOST_SIGMAS:
        raise ValueError(
            f"{name}: sigma_tof holds {len(sigmas)} different numbers, {_MOST_SIGMAS} at most; round them to fewer"
        )
    if int(bins) != bins or bins < 1 or not (float(width) > 0 and float(nsigmas) > 0 and bool((sigmas > 0).all())):
        raise ValueError(
            f"{name}: the number of bins, tofbin_width, sigma_tof and nsigmas must be positive, got {bins}, {width}, "
            f"{sigmas.tolist()} and {nsigmas}"
        )
    for value in sigmas:
        rows = None if len(sigmas) == 1 else (given == value).nonzero()[:, 0].to(lines.start.device)
        yield rows, TOF(int(bins), float(width), float(value), float(nsigmas))


def _event_bins(name: str, lines: _Lines, tofbin: Any) -> tuple[Tensor, int]:
    """Bins from 0 and how many there are, the central one in the middle."""
    bins = to_torch(tofbin).to(lines.start.device).reshape(-1)
    if bins.dtype not in (torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64) or len(bins) != len(
        lines.start
    ):
        raise ValueError(
            f"{name}: tofbin must be one integer per line ({len(lines.start)}), got {len(bins)} of {bins.dtype}"
        )
    bins = bins.int()
    most = int(bins.abs().max()) if len(bins) else 0
    return bins + most, 2 * most + 1


def _shifted(name: str, lines: _Lines, offset: Any, grid: _Grid) -> _Lines:
    """Lines whose middle lies where the central bin does: one end is moved away from the image."""
    shift = _per_line(name, "tofcenter_offset", offset, len(lines.start)).to(lines.start.device)
    if not bool((shift != 0).any()):
        return lines
    delta = lines.end - lines.start
    length = delta.norm(dim=1, keepdim=True)
    along = torch.where(length > 0, delta / length, torch.zeros_like(delta)) * (2 * shift)[:, None]
    forward = (shift > 0)[:, None].expand_as(delta)
    start, end = (
        torch.where(forward, lines.start, lines.start + along),
        torch.where(forward, lines.end + along, lines.end),
    )
    # what was added must not cross the image, whose interpolation reaches one voxel beyond the outermost centres
    middle = grid.middle.to(delta)
    reach = ((torch.tensor(grid.shape) + 1) / 2).to(delta) * torch.tensor(grid.spacing).to(delta)
    tip = torch.where(forward, lines.end, lines.start) - middle
    low = torch.minimum(tip, tip + along)
    high = torch.maximum(tip, tip + along)
    flat = along == 0
    a, b = ((side - tip) / along.where(~flat, torch.ones_like(along)) for side in (-reach, reach))
    near = torch.minimum(a, b).masked_fill(flat, -math.inf).amax(1).clamp(min=0)
    far = torch.maximum(a, b).masked_fill(flat, math.inf).amin(1).clamp(max=1)
    beside = ((low >= reach) | (high <= -reach)).any(1)
    if bool(((near <= far) & ~beside & (along != 0).any(1)).any()):
        raise ValueError(
            f"{name}: tofcenter_offset moves the bins of a line that ends inside the image; let lines end outside of it"
        )
    return _Lines(start, end, lines.shape)

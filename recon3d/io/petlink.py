"""Siemens' list mode of 32-bit words (PETLINK bin addresses): a .l.hdr header and a .l file.

A word whose bit 31 is 0 is a coincidence: bit 30 is 1 for a prompt and 0 for a delayed one, bits 0..29 are
radial + n_radial (view + n_views (plane + n_planes tof)) with planes of span 1 in the order of ring differences
0, -1, +1, -2, ... Words that begin with 100 are time tags in ms; 101, 110 and 111 are dead time, motion and gating,
which are counted and left out. Source: Siemens, PETLINK guideline, J1-00672485.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from recon3d.geometry.pet import Events, PETGeometry
from recon3d.io.guard import DEFAULT_LIMITS, BadInput, Limits, as_bad_input, check_array, check_file
from recon3d.io.interfile_bins import read_info, scanner_of, siemens_order, siemens_tof_order, tof_of
from recon3d.io.interfile_header import InterfileHeader, read_interfile_header
from recon3d.io.pet import PETData, PETInfo, PETOptions, patient_grid, sinogram_for

__all__ = ["describe_petlink", "is_petlink", "read_petlink"]

_PIECE_WORDS = 4 << 20
# bytes of an event once read: a pair of crystals, prompt or delayed, when, which time bin
_EVENT_BYTES = 15
_TAGS = ("time", "dead time", "motion", "gating")


@dataclass(frozen=True)
class _List:
    """What a header says of a list of words, checked.

    Attributes:
        rings: [plane of the file, 2] rings of p0 and p1 as we count them.
        tof: our time bin of each of the file's.
    """

    header: InterfileHeader
    data: Path
    words: int
    geometry: PETGeometry
    info: PETInfo
    rings: NDArray[np.int32]
    tof: NDArray[np.int16]
    order: str
    notes: tuple[str, ...]

    @property
    def bins(self) -> int:
        return self.geometry.n_radial * self.geometry.n_views * len(self.rings) * max(1, len(self.tof))


@dataclass
class _Found:
    """What a pass over the words has met so far."""

    prompts: int = 0
    delayed: int = 0
    tags: NDArray[np.int64] | None = None
    first_ms: int | None = None
    last_ms: int = 0


def is_petlink(header: InterfileHeader) -> bool:
    """Whether an Interfile header describes list mode."""
    return (header.text("data format") or "").lower() == "coincidencelist" or "petlink" in (
        header.text("%sms-mi header name space") or ""
    ).lower()


def read_petlink(
    path: str | os.PathLike[str], options: PETOptions | None = None, limits: Limits = DEFAULT_LIMITS
) -> PETData:
    """Coincidences from a header of list mode and its data, in pieces.

    Args:
        path: the header.
        options: compression of the sinogram, or none of it; which seconds.
        limits: how much memory it may claim.

    Raises:
        BadInput: header or data are damaged, disagree or hold no prompts, or the sinogram does not fit.
    """
    options = options or PETOptions()
    found = _open(read_interfile_header(path))
    span_ms = None if options.seconds is None else (1000 * options.seconds[0], 1000 * options.seconds[1])
    seen = _Found(tags=np.zeros(len(_TAGS), np.int64))
    for _ in _pieces(found, seen, span_ms):
        pass
    if seen.prompts == 0:
        raise BadInput(found.data, "holds no prompt coincidences", "export it again, or take other seconds")
    count, geometry = seen.prompts + seen.delayed, found.geometry
    tags = [int(n) for n in (seen.tags if seen.tags is not None else ())]
    notes = [
        *found.notes,
        f"{seen.prompts} prompt and {seen.delayed} delayed coincidences, {tags[0]} time tags",
        *(f"{n} tags of {name} are left out" for name, n in zip(_TAGS[1:], tags[1:], strict=True) if n),
    ]
    prompts, delayed = torch.zeros(0), None
    if options.histogram:
        with as_bad_input(path, "cannot be sorted so", (ValueError,), "choose span and max_ring_difference otherwise"):
            geometry = sinogram_for(geometry, options)
        check_array(path, "its sinogram", (2, *geometry.shape), 4, 1 << 62, False, limits)
        prompts = torch.zeros(geometry.shape)
        delayed = torch.zeros(geometry.shape) if seen.delayed else None
        if geometry.n_planes < found.geometry.n_planes and geometry.span == 1:
            notes.append(f"ring differences beyond {geometry.max_ring_difference} are not in the sinogram")
    kept = count * _EVENT_BYTES <= limits.budget() / 4
    if not kept:
        notes.append("too many coincidences to keep them one by one; they are in the sinogram alone")
        if not options.histogram:
            raise BadInput(path, f"holds {count} coincidences", "free memory, or take some seconds of it")
    events = _fill(found, count if kept else 0, span_ms, geometry, prompts.numpy(), delayed)
    if span_ms is None:
        duration, start = (seen.last_ms - (seen.first_ms or 0)) / 1000, (seen.first_ms or 0) / 1000
    else:
        start = max(span_ms[0], seen.first_ms or 0) / 1000
        duration = min(span_ms[1] / 1000, seen.last_ms / 1000) - start
    info = replace(found.info, duration_s=duration, start_s=start) if duration > 0 else found.info
    grid = None if info.position == "HFS" else patient_grid(geometry.default_grid(), info.position)
    return PETData(
        prompts,
        geometry,
        delayed=delayed,
        events=events,
        info=info,
        grid=grid,
        source_format="petlink",
        notes=tuple(notes),
    )


def describe_petlink(path: str | os.PathLike[str]) -> dict[str, Any]:
    """From the header and the size of the data."""
    found = _open(read_interfile_header(path))
    geometry = found.geometry
    out = {
        "format": "Siemens PETLINK list mode, 32 bit",
        "scanner": geometry.scanner.name,
        "rings": geometry.scanner.rings,
        "crystals_of_a_ring": geometry.scanner.crystals,
        "views": geometry.n_views,
        "radial_bins": geometry.n_radial,
        "planes": geometry.n_planes,
        "largest_ring_difference": geometry.max_ring_difference,
        "time_bins": len(found.tof) or None,
        "words": found.words,
        "data": found.data.name,
        "isotope": found.info.isotope,
        "duration_s": found.info.duration_s,
        "position": found.info.position,
        "notes": list(found.notes),
    }
    return {key: value for key, value in out.items() if value is not None}


def _open(header: InterfileHeader) -> _List:
    path = header.path
    if not is_petlink(header):
        raise BadInput(path, "describes no list mode", "a header of data format CoincidenceList is expected")
    bits = header.whole("%lm event and tag words format (bits)", low=1, high=1024)
    if bits is not None and bits != 32:
        raise BadInput(path, f"has words of {bits} bits", "words of 32 bits are read")
    span = header.whole("%axial compression", low=1, high=4095) or 1
    if span != 1:
        raise BadInput(path, f"has an axial compression of {span}", "list mode of span 1 is read")
    views = header.whole("%number of views", low=1, high=1 << 16)
    radial = header.whole("%number of projections", low=1, high=1 << 16)
    largest = header.whole("%maximum ring difference", high=4095)
    for key, value in (
        ("%number of views", views),
        ("%number of projections", radial),
        ("%maximum ring difference", largest),
    ):
        header.required(key, value)
    notes: list[str] = []
    assert views is not None and radial is not None and largest is not None
    device = scanner_of(header, notes, radial)
    n_tof = header.whole("%number of tof time bins", low=1, high=4096) or 1
    with as_bad_input(path, "its bins do not fit the scanner", (ValueError, TypeError), "correct the header"):
        tof = tof_of(header, device, n_tof if n_tof > 1 else 0)
        geometry = PETGeometry(device, views, radial, 1, largest, tof)
    if geometry.mashing != 1:
        raise BadInput(path, f"has {views} views of {device.crystals // 2}", "list mode without mashed views is read")
    table = header.wholes("%segment table", low=1, high=1 << 20)
    if table is not None and sum(table) != geometry.n_planes:
        notes.append(
            f"the header's segment table is that of a compressed sinogram; addresses have {geometry.n_planes} planes"
        )
    data = header.data_file()
    if not data.is_file():
        raise BadInput(path, f"names the data file {data.name!r}, which is not there", "put it beside")
    stored = check_file(data) - header.offset()
    if stored <= 0 or stored % 4:
        raise BadInput(data, f"has {max(0, stored)} bytes of words of 4", "copy or export it again")
    total = header.whole("%total listmode word counts", high=1 << 40)
    if total is not None and total != stored // 4:
        if total < stored // 4:
            raise BadInput(path, f"counts {total} words, {data.name} has {stored // 4}", "they must belong together")
        notes.append(f"holds {stored // 4} of the {total} words that the header counts")
    order = (header.text("imagedata byte order", "image data byte order") or "littleendian").lower()
    if order not in ("littleendian", "bigendian"):
        raise BadInput(path, f"has byte order {order[:40]!r}", "LITTLEENDIAN or BIGENDIAN is expected")
    return _List(
        header,
        data,
        stored // 4,
        geometry,
        read_info(header),
        _rings(device.rings, largest),
        np.asarray(siemens_tof_order(n_tof) if n_tof > 1 else (), np.int16),
        "<" if order == "littleendian" else ">",
        tuple(notes),
    )


def _rings(rings: int, largest: int) -> NDArray[np.int32]:
    """Rings of p0 and p1 of every plane of the file, turned round."""
    table = [rings - abs(d) for d in range(-largest, largest + 1)]
    sizes = [table[largest]] + [table[largest + k] for k in range(1, largest + 1) for _ in (0, 1)]
    out = []
    for low, _, count in siemens_order(1, sizes):
        first = np.arange(count) + max(0, -low)
        out.append(np.stack([rings - 1 - first, rings - 1 - (first + low)], -1))
    return np.concatenate(out).astype(np.int32)


def _pieces(
    found: _List, seen: _Found, span_ms: tuple[float, float] | None
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.bool_], NDArray[np.int32]]]:
    """Addresses, whether prompt, and time of the coincidences wanted, piece by piece; keeps count in `seen`."""
    last = -1
    with found.data.open("rb") as file:
        file.seek(found.header.offset())
        left = found.words
        while left:
            words = np.fromfile(file, found.order + "u4", min(left, _PIECE_WORDS)).astype(np.uint32, copy=False)
            if words.size != min(left, _PIECE_WORDS):
                raise BadInput(found.data, "changed while it was read", "try again")
            left -= words.size
            tag = words >> 29
            event, clock = tag < 4, tag == 4
            times = (words[clock] & 0x1FFFFFFF).astype(np.int64)
            address = (words[event] & 0x3FFFFFFF).astype(np.int64)
            falls = times.size > 0 and bool((np.diff(times, prepend=last) < 0).any())
            if (address.size and int(address.max()) >= found.bins) or falls:
                raise BadInput(found.data, *_why(found, words, address))
            if seen.first_ms is None and times.size:
                seen.first_ms = int(times[0])
            before = last if last >= 0 else (seen.first_ms or 0)
            when = np.concatenate([[before], times])[np.cumsum(clock)[event]]
            last = int(times[-1]) if times.size else last
            seen.last_ms = max(seen.last_ms, last)
            prompt = (words[event] >> 30) == 1
            if span_ms is not None:
                chosen = (when >= span_ms[0]) & (when < span_ms[1])
                address, prompt, when = address[chosen], prompt[chosen], when[chosen]
            if seen.tags is not None:
                seen.tags += np.bincount(tag[~event] - 4, minlength=len(_TAGS))
            seen.prompts += int(prompt.sum())
            seen.delayed += int((~prompt).sum())
            yield address, prompt, when.astype(np.int32)


def _why(found: _List, words: NDArray[np.uint32], address: NDArray[np.int64]) -> tuple[str, str]:
    """What is wrong with words that make no sense."""
    other = words.byteswap()
    event = (other >> 29) < 4
    inside = (other[event] & 0x3FFFFFFF) < found.bins
    if event.any() and inside.all() and words.size > 8:
        return (
            "holds words that make no sense, but do with their bytes in the other order",
            "swap them, or add 'imagedata byte order := BIGENDIAN' to the header",
        )
    if address.size and int(address.max()) >= found.bins:
        bad = int((address >= found.bins).sum())
        return (
            f"holds {bad} coincidences beyond the {found.bins} bins that its header describes",
            "header and data must belong together",
        )
    return "has time tags that go backwards", "it is damaged or pieced together; export it again"


def _fill(
    found: _List,
    count: int,
    span_ms: tuple[float, float] | None,
    target: PETGeometry,
    prompts: NDArray[np.float32],
    delayed: torch.Tensor | None,
) -> Events | None:
    """The second pass: events where `count` says how many there are, and counts where there is a sinogram."""
    geometry, n = found.geometry, found.geometry.scanner.crystals
    radial_bins, views, planes = geometry.n_radial, geometry.n_views, len(found.rings)
    t = np.arange(radial_bins) - radial_bins // 2
    lift, drop = (t >> 1).astype(np.int32), ((t + 1) >> 1).astype(np.int32)
    plane_of = target.michelogram()[found.rings[:, 0], found.rings[:, 1]].astype(np.int64)
    sums = [prompts.reshape(-1), None if delayed is None else delayed.numpy().reshape(-1)]
    pairs = torch.empty((count, 2), dtype=torch.int32)
    kinds = torch.empty(count, dtype=torch.bool)
    clock = torch.empty(count, dtype=torch.int32)
    bins = torch.empty(count if len(found.tof) else 0, dtype=torch.int16)
    at = 0
    for address, prompt, when in _pieces(found, _Found(), span_ms):
        rest, radial = np.divmod(address, radial_bins)
        rest, view = np.divmod(rest, views)
        time, plane = np.divmod(rest, planes)
        ours = found.tof[time] if len(found.tof) else None
        if prompts.size:
            flat = (view // target.mashing) * radial_bins + radial
            if ours is not None and target.tof is not None:
                flat = flat * target.tof.bins + ours
            place = plane_of[plane]
            flat = flat * target.n_planes + place
            for kind, counts in zip((prompt, ~prompt), sums, strict=True):
                if counts is not None:
                    np.add.at(counts, flat[kind & (place >= 0)], np.float32(1))
        if count:
            stop = at + address.size
            if stop > count:
                raise BadInput(found.data, "changed while it was read", "try again")
            v = view.astype(np.int32)
            pairs[at:stop, 0] = torch.from_numpy(found.rings[plane, 0] * n + (v + lift[radial]) % n)
            pairs[at:stop, 1] = torch.from_numpy(found.rings[plane, 1] * n + (v - drop[radial] + n // 2) % n)
            kinds[at:stop] = torch.from_numpy(prompt)
            clock[at:stop] = torch.from_numpy(when)
            if ours is not None:
                bins[at:stop] = torch.from_numpy(ours)
            at = stop
    if not count:
        return None
    if at != count:
        raise BadInput(found.data, "changed while it was read", "try again")
    return Events(pairs, kinds, bins if len(found.tof) else None, clock)

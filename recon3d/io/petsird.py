"""PETSIRD list mode (binary, as petsird 0.12 writes it): events and the crystals they were seen in.

A file is the magic "yardl", a schema in JSON, a header with the scanner, and blocks of time. It is decoded here after
its own schema, events in bulk, with every count held against the bytes that are left; no other package is needed.
Crystals are boxes anywhere in space: they are laid onto the rings of a PETScanner and refused where they do not fit.
Axes are taken as they stand: x to the left, y to the back, z to the head. Format: github.com/ETSInitiative/PETSIRD.
"""

from __future__ import annotations

import json
import math
import os
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from recon3d.geometry.pet import TOF, Events, PETGeometry, PETScanner
from recon3d.io.guard import DEFAULT_LIMITS, BadInput, Limits, as_bad_input, check_array, check_file
from recon3d.io.pet import PETData, PETInfo, PETOptions, sinogram_for, total

__all__ = ["describe_petsird", "is_petsird", "read_petsird"]

_MAGIC = b"yardl"
_MOST_SCHEMA = 4 << 20
_EVENT_BYTES = 15
# interaction in the crystal, mm behind its front; the middle of shorter ones
_DEPTH_MM = 7.0
# what a crystal may lie off its place on the ring, as a share of the distance of crystals
_OFF = 0.35
_NEAR = 0.2  # near enough not to look for gaps between blocks
_VIRTUAL = 4
_BROKEN = (
    *(ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError, RecursionError, EOFError),
    *(struct.error, UnicodeDecodeError, StopIteration, ArithmeticError),
)
_SIGNED = {"int8", "int16", "int32", "int64", "datetime", "date", "time"}
_UNSIGNED = {"uint16", "uint32", "uint64", "size"}
_FIXED = {"float32": "<f4", "float64": "<f8", "int8": "i1", "uint8": "u1", "bool": "?", "complexfloat32": "<c8"}


def is_petsird(path: str | os.PathLike[str]) -> bool:
    """Whether a file begins as yardl's binary files do."""
    with Path(path).open("rb") as file:
        return file.read(len(_MAGIC)) == _MAGIC


def read_petsird(
    path: str | os.PathLike[str], options: PETOptions | None = None, limits: Limits = DEFAULT_LIMITS
) -> PETData:
    """Coincidences with their scanner.

    Args:
        path: the file.
        options: compression of the sinogram, or none of it; which seconds.
        limits: how much memory it may claim.

    Raises:
        BadInput: the file is damaged, holds no prompts, or its crystals do not lie on rings.
    """
    options = options or PETOptions()
    size = check_file(path)
    with as_bad_input(path, "cannot be understood as PETSIRD", _BROKEN):
        decoder = _Decoder(path, size)
        head = decoder.header()
        found = _scanner(path, head["scanner"])
        blocks = _Blocks(found, options, limits.budget())
        decoder.time_blocks(blocks)
        events, duration, start = blocks.finish(path)
    geometry = PETGeometry(found.scanner, found.scanner.crystals // 2, found.scanner.n_radial, tof=found.tof)
    prompts, delayed = torch.zeros(0), None
    notes = [*found.notes, *blocks.notes()]
    if options.histogram:
        with as_bad_input(path, "cannot be sorted so", (ValueError,), "choose span and max_ring_difference otherwise"):
            geometry = sinogram_for(geometry, options)
        check_array(path, "its sinogram", (2, *geometry.shape), 4, 1 << 62, False, limits)
        prompts, counted = events.histogram(geometry)
        delayed = counted if bool((~events.prompt).any()) else None
        outside = int(events.prompt.sum()) - round(total(prompts))
        if outside:
            notes.append(f"{outside} prompts lie outside the sinogram")
    info = PETInfo(duration_s=duration or None, start_s=start, **_exam(head.get("exam")))
    return PETData(
        prompts,
        geometry,
        delayed=delayed,
        events=events,
        info=info,
        source_format="petsird",
        notes=tuple(notes),
    )


def describe_petsird(path: str | os.PathLike[str]) -> dict[str, Any]:
    """From the header alone."""
    size = check_file(path)
    with as_bad_input(path, "cannot be understood as PETSIRD", _BROKEN):
        found = _scanner(path, _Decoder(path, size).header()["scanner"])
    out = {
        "format": "PETSIRD list mode",
        "scanner": found.scanner.name,
        "rings": found.scanner.rings,
        "crystals_of_a_ring": found.scanner.crystals,
        "ring_spacing_mm": found.scanner.ring_spacing_mm,
        "radius_mm": found.scanner.radius_mm,
        "time_bins": found.tof.bins if found.tof else None,
        "notes": list(found.notes),
    }
    return {key: value for key, value in out.items() if value is not None}


# ---- decoding ------------------------------------------------------------------------------------------------------


class _Decoder:
    """Values of a yardl stream by its own schema; bounded by the bytes that are there."""

    def __init__(self, path: str | os.PathLike[str], size: int) -> None:
        self.path, self.size, self.at = path, size, 0
        self.bytes = np.memmap(path, np.uint8, mode="r", shape=(size,))
        self.work = 8 * size + 1_000_000  # values that so many bytes can mean
        if self.take(len(_MAGIC)) != _MAGIC or self.take(4) != b"\x01\0\0\0":
            raise BadInput(path, "is not a binary yardl file of version 1", "write it with petsird 0.12")
        length = self.varint()
        if length > min(_MOST_SCHEMA, size):
            raise BadInput(path, f"has a schema of {length} bytes", "export it again")
        schema = json.loads(self.take(length).decode())
        if schema["protocol"]["name"] != "PETSIRD":
            raise BadInput(path, f"holds {str(schema['protocol']['name'])[:40]!r}, not PETSIRD", "give a PETSIRD file")
        self.steps = {step["name"]: step["type"] for step in schema["protocol"]["sequence"]}
        self.types = {kind["name"]: kind for kind in schema["types"] or ()}

    def take(self, count: int) -> bytes:
        if not 0 <= count <= self.size - self.at:
            raise EOFError(f"it ends at byte {self.size}, {count} more were expected at {self.at}")
        self.at += count
        return self.bytes[self.at - count : self.at].tobytes()

    def varint(self) -> int:
        result = 0
        for shift in range(0, 70, 7):
            if self.at >= self.size:
                raise EOFError("it ends within a number")
            byte = int(self.bytes[self.at])
            self.at += 1
            result |= (byte & 0x7F) << shift
            if byte < 0x80:
                return result
        raise ValueError("a number has more than ten bytes")

    def count(self) -> int:
        """A number of elements, each of which takes a byte at least."""
        length = self.varint()
        if length > self.size - self.at:
            raise EOFError(f"{length} values are announced, {self.size - self.at} bytes are left")
        return length

    def varints(self, count: int) -> NDArray[np.int64]:
        """Many unsigned numbers at once."""
        ends: list[NDArray[np.int64]] = []
        have, at = 0, self.at
        while have < count:
            stop = min(self.size, at + max(64, 2 * (count - have)))
            if stop == at:
                raise EOFError("it ends within a list of events")
            found = np.flatnonzero(self.bytes[at:stop] < 0x80)[: count - have] + at
            ends.append(found)
            have, at = have + found.size, stop
        if not count:
            return np.zeros(0, np.int64)
        last = np.concatenate(ends)
        first = np.concatenate([[self.at], last[:-1] + 1])
        length = last - first + 1
        if int(length.max()) > 5:
            raise ValueError("an index has more than five bytes")
        out = np.zeros(count, np.int64)
        for k in range(int(length.max())):
            has = length > k
            out[has] |= (self.bytes[first[has] + k].astype(np.int64) & 0x7F) << (7 * k)
        self.at = int(last[-1]) + 1
        return out

    def header(self) -> dict[str, Any]:
        head = self.value(self.steps["header"], {})
        if not isinstance(head, dict) or not isinstance(head.get("scanner"), dict):
            raise ValueError("its header has no scanner")
        return head

    def time_blocks(self, blocks: _Blocks) -> None:
        """Hands every block of time on."""
        kind = self.steps["timeBlocks"]["stream"]["items"]
        cases = self.types[_short(kind)]["type"]
        while length := self.varint():
            for _ in range(length):
                index = self.take(1)[0]
                name = cases[index]["tag"]
                blocks.add(self.path, name, self.value(cases[index]["type"], {}))

    def value(self, kind: Any, bound: dict[str, Any]) -> Any:
        """A value of a type of the schema; `bound` are the arguments of generic types."""
        self.work -= 1
        if self.work < 0:
            raise ValueError("its schema describes more values than its bytes can hold")
        if isinstance(kind, str):
            return self._named(kind, bound, ())
        if isinstance(kind, list):
            return self._union(kind, bound)
        if "vector" in kind:
            return self._vector(kind["vector"], bound)
        if "array" in kind:
            return self._array(kind["array"], bound)
        if "map" in kind or "stream" in kind:
            raise ValueError("its schema has a map or a stream where none is known")
        return self._named(kind["name"], bound, kind.get("typeArguments", ()))

    def _named(self, name: str, bound: dict[str, Any], arguments: Any) -> Any:
        if name in bound:
            inner, scope = bound[name]
            return self.value(inner, scope)
        if name in _FIXED and name not in ("int8",):
            dtype = np.dtype(_FIXED[name])
            return np.frombuffer(self.take(dtype.itemsize), dtype)[0].item()
        if name in _UNSIGNED:
            return self.varint()
        if name in _SIGNED:
            number = self.take(1)[0] if name == "int8" else self.varint()
            return (number >> 1) ^ -(number & 1)
        if name == "string":
            return self.take(self.varint()).decode()
        entry = self.types[_short(name)]
        scope = {p: (a, bound) for p, a in zip(entry.get("typeParameters", ()), arguments, strict=True)}
        if "fields" in entry:
            return {f["name"]: self.value(f["type"], scope) for f in entry["fields"]}
        if "values" in entry:
            number = self.varint()
            return (number >> 1) ^ -(number & 1)
        return self.value(entry["type"], scope)

    def _union(self, cases: list[Any], bound: dict[str, Any]) -> Any:
        index = self.take(1)[0]
        case = cases[index]
        if case is None:
            return None
        return self.value(case["type"] if isinstance(case, dict) and "tag" in case else case, bound)

    def _vector(self, kind: dict[str, Any], bound: dict[str, Any]) -> Any:
        items = kind["items"]
        fixed = kind.get("length")
        length = self.count() if fixed is None else int(fixed)
        if not 0 <= length <= self.size - self.at:
            raise EOFError(f"{length} values are announced, {self.size - self.at} bytes are left")
        if items == "float32":
            return np.frombuffer(self.take(4 * length), "<f4")
        if isinstance(items, str) and _short(items) == "CoincidenceEvent":
            return self.varints(3 * length).reshape(length, 3)
        return [self.value(items, bound) for _ in range(length)]

    def _array(self, kind: dict[str, Any], bound: dict[str, Any]) -> Any:
        dims = kind.get("dimensions")
        if dims is None:
            shape = [self.varint() for _ in range(min(self.varint(), 16))]
        elif isinstance(dims, int):
            shape = [self.varint() for _ in range(dims)]
        elif all("length" in d for d in dims):
            shape = [int(d["length"]) for d in dims]
        else:
            shape = [self.varint() for _ in dims]
        total = math.prod(shape)
        if not 0 <= total <= self.size - self.at:
            raise EOFError(f"{total} values are announced, {self.size - self.at} bytes are left")
        if kind["items"] in _FIXED:
            dtype = np.dtype(_FIXED[kind["items"]])
            return np.frombuffer(self.take(total * dtype.itemsize), dtype).reshape(shape)
        return [self.value(kind["items"], bound) for _ in range(total)]


def _short(name: str) -> str:
    return name.rsplit(".", 1)[-1]


# ---- scanner -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Laid:
    """Crystals laid onto rings.

    Attributes:
        crystal: our crystal of every module's element, module after module.
        energies: energy bins of an element.
    """

    scanner: PETScanner
    crystal: NDArray[np.int32]
    energies: int
    tof: TOF | None
    notes: tuple[str, ...]


def _scanner(path: str | os.PathLike[str], said: dict[str, Any]) -> _Laid:
    modules = said["scannerGeometry"]["replicatedModules"]
    if len(modules) != 1:
        raise BadInput(path, f"has {len(modules)} types of modules", "scanners of one type are read")
    module = modules[0]
    elements = module["object"]["detectingElements"]
    corners = np.array([c["c"] for c in elements["object"]["shape"]["corners"]], np.float64)
    inner = np.array([t["matrix"] for t in elements["transforms"]], np.float64)
    outer = np.array([t["matrix"] for t in module["transforms"]], np.float64)
    if not (len(inner) and len(outer)) or not all(np.isfinite(a).all() for a in (corners, inner, outer)):
        raise BadInput(path, "describes no crystals", "export it again")
    boxes = np.einsum("eij,cj->eci", inner[:, :, :3], corners) + inner[:, None, :, 3]
    boxes = np.einsum("mij,ecj->meci", outer[:, :, :3], boxes) + outer[:, None, None, :, 3]
    centre, radius = _hits(path, boxes.reshape(-1, len(corners), 3))
    around = np.arctan2(centre[:, 0], -centre[:, 1]) % (2 * math.pi)
    blocks = len(_clusters(around.reshape(len(outer), -1), 2 * math.pi))
    ring, rings, pitch = _rings(path, centre[:, 2])
    place, crystals, tilt = _places(path, around, blocks)
    ids = ring * crystals + place
    if len(np.unique(ids)) != len(ids):
        raise BadInput(path, "has several crystals in one place", "scanners of one layer are read")
    free = np.setdiff1d(np.arange(crystals), place)
    block = crystals // blocks
    gaps = tuple(sorted({int(k) for k in free % block})) if len(free) else ()
    notes = ["the patient's orientation is not stated; x is taken to the left, y to the back, z to the head"]
    if len(gaps) * blocks != len(free):
        gaps = ()
        notes.append("some crystals are missing; their bins count nothing")
    if said.get("gantryAlignment") is not None:
        notes.append("the alignment of the gantry with another scanner is not applied")
    scanner = PETScanner(
        str(said.get("modelName") or "unknown")[:80],
        rings,
        pitch,
        crystals,
        float(radius.mean()),
        block,
        gap_crystals=gaps,
        tilt_rad=tilt,
    )
    energies = len(said["eventEnergyBinEdges"][0]["edges"]) - 1 if said.get("eventEnergyBinEdges") else 1
    if energies < 1:
        raise BadInput(path, "has no energy bins", "export it again")
    return _Laid(scanner, ids.astype(np.int32), energies, _tof(path, said), tuple(notes))


def _hits(path: str | os.PathLike[str], boxes: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Where crystals are hit on average, [n, 3], and how far that is from the axis."""
    if boxes.shape[1] != 8:
        raise BadInput(path, f"has crystals of {boxes.shape[1]} corners", "boxes are read")
    order = np.argsort((boxes[..., :2] ** 2).sum(-1), axis=1)
    sorted_boxes = np.take_along_axis(boxes, order[..., None], axis=1)
    front, back = sorted_boxes[:, :4].mean(axis=1), sorted_boxes[:, 4:].mean(axis=1)
    length = np.sqrt(((back - front) ** 2).sum(-1))
    share = np.minimum(_DEPTH_MM, length / 2) / np.maximum(length, 1e-9)
    place = front + share[:, None] * (back - front)
    radius = np.sqrt((place[:, :2] ** 2).sum(-1))
    if radius.min() < 1 or np.ptp(radius) > max(0.15 * float(radius.mean()), 5.0):
        raise BadInput(path, "has crystals that lie on no cylinder", "cylindrical scanners of one layer are read")
    return place, radius


def _clusters(values: NDArray[np.float64], period: float) -> list[float]:
    """Middles of the modules around the ring, those above one another counted once."""
    middle = np.angle(np.exp(1j * values * 2 * math.pi / period).mean(axis=1)) % (2 * math.pi)
    ordered = np.sort(middle)
    steps = np.diff(ordered, append=ordered[0] + 2 * math.pi)
    return [float(v) for v in ordered[steps > 1e-3]] or [float(ordered[0])]


def _rings(path: str | os.PathLike[str], z: NDArray[np.float64]) -> tuple[NDArray[np.int64], int, float]:
    """Ring of every crystal, number of rings and their distance."""
    levels = np.sort(z)
    levels = levels[np.diff(levels, prepend=-np.inf) > 0.05]
    if len(levels) < 2:
        raise BadInput(path, "has crystals of a single ring", "two rings at least are read")
    pitch = float(np.median(np.diff(levels)))
    place = (levels - levels[0]) / pitch
    # the pitch that fits all levels best, gaps between blocks counted as rings
    index = np.rint(place)
    pitch = float(np.polyfit(index, levels, 1)[0])
    off = np.abs(levels - np.polyval(np.polyfit(index, levels, 1), index)).max()
    if off > _OFF * pitch or index.max() > 4095 or len(np.unique(index)) != len(index):
        raise BadInput(path, f"has rings up to {off:.3g} mm off an even distance of {pitch:.3g} mm", "export it again")
    ring = index.astype(np.int64)[np.clip(np.searchsorted(levels, z - 0.025), 0, len(levels) - 1)]
    return ring, int(index.max()) + 1, pitch


def _places(
    path: str | os.PathLike[str], around: NDArray[np.float64], blocks: int
) -> tuple[NDArray[np.int64], int, float]:
    """Crystal within its ring, crystals of a ring with those of the gaps, and the angle of crystal 0."""
    ordered = np.sort(around)
    steps = np.diff(ordered, prepend=ordered[-1] - 2 * math.pi)
    angles = ordered[steps > 1e-4]
    if len(angles) % blocks or len(angles) < 4:
        raise BadInput(path, f"has {len(angles)} crystals around {blocks} modules", "modules must be alike")
    each = len(angles) // blocks
    best: tuple[float, int, float] | None = None
    for virtual in range(_VIRTUAL + 1):
        n = blocks * (each + virtual)
        if n % 2:
            continue
        pitch = 2 * math.pi / n
        shift = float(np.angle(np.exp(1j * angles * n).mean())) / n
        index = np.rint((angles - shift) / pitch)
        off = float(np.abs(angles - shift - index * pitch).max()) / pitch
        if len(np.unique(index % n)) == len(angles) and (best is None or off < best[0]):
            best = (off, n, shift)
            if off < _NEAR:
                break
    if best is None or best[0] > _OFF:
        raise BadInput(path, f"has {len(angles)} crystals that are not spread evenly around", "export it again")
    _, n, shift = best
    place = np.rint((around - shift) / (2 * math.pi / n)).astype(np.int64) % n
    taken = np.zeros(n, bool)
    taken[place] = True
    # blocks begin behind a gap, the first of them nearest to the top
    starts = np.flatnonzero(taken & ~np.roll(taken, 1)) if not taken.all() else np.arange(0, n, n // blocks)
    first = int(starts[np.argmin(np.minimum(starts, n - starts))])
    turn = shift + first * 2 * math.pi / n
    return (place - first) % n, n, (turn + math.pi) % (2 * math.pi) - math.pi


def _tof(path: str | os.PathLike[str], said: dict[str, Any]) -> TOF | None:
    edges = np.asarray(said["tofBinEdges"][0][0]["edges"], np.float64)
    if len(edges) <= 2:
        return None
    widths = np.diff(edges)
    if not np.isfinite(edges).all() or widths.min() <= 0 or np.ptp(widths) > 0.01 * widths.mean():
        raise BadInput(path, "has time bins that are not of one width", "bins of one width are read")
    if abs(edges[0] + edges[-1]) > 0.01 * (edges[-1] - edges[0]):
        raise BadInput(path, "has time bins that are not centred", "bins centred on the middle of a line are read")
    fwhm = float(said["tofResolution"][0][0])
    if not (math.isfinite(fwhm) and fwhm > 0):
        raise BadInput(path, f"has a time resolution of {fwhm:g} mm", "a positive one is expected")
    return TOF(len(widths), float(widths.mean()), fwhm / (2 * math.sqrt(2 * math.log(2))))


def _exam(exam: dict[str, Any] | None) -> dict[str, Any]:
    """Dose and weight, as far as they are there and make sense."""
    if not isinstance(exam, dict):
        return {}
    out: dict[str, Any] = {}
    weight = (exam.get("patient") or {}).get("patientsWeight")
    if isinstance(weight, float) and math.isfinite(weight) and 0 < weight < 1000:
        out["weight_kg"] = weight
    drugs = exam.get("radiopharmaceuticals") or []
    if len(drugs) == 1:
        dose = drugs[0].get("radionuclideTotalDose")
        if isinstance(dose, float) and math.isfinite(dose) and dose > 0:
            out["injected_bq"] = dose
        start, injection = exam.get("startOfAcquisition"), drugs[0].get("radiopharmaceuticalStartDateTime")
        if isinstance(start, int) and isinstance(injection, int) and start >= injection > 0:
            out["injection_to_scan_s"] = (start - injection) / 1e9
        name = (drugs[0].get("radionuclideCodeSequence") or {}).get("codeMeaning")
        if isinstance(name, str) and name:
            out["isotope"] = name[:40]
    return out


# ---- events --------------------------------------------------------------------------------------------------------


@dataclass
class _Blocks:
    """Events of the blocks of time met so far."""

    laid: _Laid
    options: PETOptions
    budget: int
    parts: list[tuple[NDArray[np.int32], NDArray[np.int16], bool, int]] = field(default_factory=list)
    first: int | None = None
    last: int = 0
    events: int = 0
    others: dict[str, int] = field(default_factory=dict)

    def add(self, path: str | os.PathLike[str], name: str, block: dict[str, Any]) -> None:
        if name in ("BedMovementTimeBlock", "GantryMovementTimeBlock"):
            raise BadInput(path, "has a bed or gantry that moves", "split it where it stands still")
        if name != "EventTimeBlock":
            self.others[name] = self.others.get(name, 0) + 1
            return
        start, stop = int(block["timeInterval"]["start"]), int(block["timeInterval"]["stop"])
        if stop < start or start < self.last - 1:
            raise BadInput(path, "has blocks of time that go backwards", "it is damaged or pieced together")
        wanted = self.options.seconds
        if wanted is not None and not 1000 * wanted[0] <= start < 1000 * wanted[1]:
            return
        self.first = start if self.first is None else self.first
        self.last = stop
        for kind, prompt in (("promptEvents", True), ("delayedEvents", False)):
            table = block.get(kind) or []
            stored = table[0][0] if table and len(table[0]) else np.zeros((0, 3), np.int64)
            stored = np.asarray(stored, np.int64).reshape(-1, 3)
            if not stored.size:
                continue
            bins = stored[:, :2] // self.laid.energies
            tof = self.laid.tof
            if int(bins.max()) >= len(self.laid.crystal) or (tof is not None and int(stored[:, 2].max()) >= tof.bins):
                raise BadInput(path, "has events in crystals or time bins that its scanner does not have", "export it")
            self.events += len(stored)
            if self.events * 2 * _EVENT_BYTES > self.budget:
                raise BadInput(path, f"holds more than {self.events} events", "free memory, or take some seconds of it")
            self.parts.append((self.laid.crystal[bins], stored[:, 2].astype(np.int16), prompt, start))

    def finish(self, path: str | os.PathLike[str]) -> tuple[Events, float, float]:
        """All events, length and start in seconds."""
        if not any(prompt for _, _, prompt, _ in self.parts):
            raise BadInput(path, "holds no prompt coincidences", "export it again, or take other seconds")
        sizes = [len(p[0]) for p in self.parts]
        pairs = torch.from_numpy(np.concatenate([p[0] for p in self.parts]))
        prompt = torch.from_numpy(np.repeat([p[2] for p in self.parts], sizes))
        clock = torch.from_numpy(np.repeat(np.asarray([p[3] for p in self.parts], np.int32), sizes))
        bins = None
        if self.laid.tof is not None:
            bins = torch.from_numpy(np.concatenate([p[1] for p in self.parts]))
        start = (self.first or 0) / 1000
        return Events(pairs, prompt, bins, clock), self.last / 1000 - start, start

    def notes(self) -> list[str]:
        return [f"{n} blocks of {name} are left out" for name, n in sorted(self.others.items())]

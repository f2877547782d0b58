"""Reads HDF5 for `recon3d.io.hdf5` in a process of its own; run as a script, imports h5py and numpy alone.

The HDF5 library can crash or loop forever on a damaged file, so it never runs inside the user's process: here it may,
under limits of memory and processor time. One request per line on standard input, as JSON; the answer is one line of
JSON and, for data, the bytes that line announces. Links are never followed, so nothing outside the file is opened;
datasets stored elsewhere, virtual datasets and filters other than HDF5's own are refused.
"""

from __future__ import annotations

import contextlib
import json
import math
import sys
from typing import Any, BinaryIO

import h5py
import numpy as np

try:
    import resource
except ImportError:  # no such limits on this system
    resource = None  # type: ignore[assignment]

_MOST_OBJECTS = 10_000
_MOST_ATTRIBUTES = 200
_MOST_ATTRIBUTE_BYTES = 1 << 20
_DEEPEST = 16
_MEMORY_BYTES = 1 << 30
# reading all metadata of a beamline file takes well under one
_CPU_SECONDS = 4.0
_SLOWEST_BYTES_PER_SECOND = 20e6
_SLAB_BYTES = 8 << 20
_LARGEST_CHUNK_BYTES = 256 << 20
# deflate, shuffle, Fletcher-32 and LZF: what h5py itself brings along
_FILTERS = {1: "gzip", 2: "shuffle", 3: "fletcher32", 32000: "lzf"}
# what h5py raises for whatever the library finds wrong
_ERRORS = (OSError, RuntimeError, ValueError, KeyError, TypeError, AttributeError, OverflowError, MemoryError)


class Bad(Exception):
    """Something is wrong with the file: why and what to do."""


def main() -> None:
    """Answers requests until standard input ends."""
    out = sys.stdout.buffer
    _reply(out, {"ready": True})
    for line in sys.stdin.buffer:
        request = json.loads(line)
        try:
            _limit(_CPU_SECONDS)
            with h5py.File(request["path"], "r") as file:
                if request["do"] == "tree":
                    _reply(out, {"tree": _tree(file)})
                else:
                    _send(out, file, request)
        except Bad as error:
            _reply(out, {"bad": list(error.args)})
        except RecursionError:
            _reply(out, {"bad": ["its groups are nested too deeply", "export it again"]})
        except _ERRORS as error:
            text = str(error) or type(error).__name__
            _reply(out, {"bad": [f"HDF5 cannot read it ({text[:200]})", "it is damaged; copy or export it again"]})


def _reply(out: BinaryIO, answer: dict[str, Any]) -> None:
    out.write(json.dumps(answer).encode() + b"\n")
    out.flush()


def _limit(cpu_seconds: float) -> None:
    if resource is None:
        return
    used = resource.getrusage(resource.RUSAGE_SELF)
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    soft = math.ceil(used.ru_utime + used.ru_stime + cpu_seconds)
    resource.setrlimit(resource.RLIMIT_CPU, (soft if hard == resource.RLIM_INFINITY else min(soft, hard), hard))
    if not hasattr(_limit, "memory"):
        _limit.memory = True  # type: ignore[attr-defined]
        with contextlib.suppress(OSError, ValueError), open("/proc/self/statm") as statm:  # noqa: PTH123
            now = int(statm.read().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (now + _MEMORY_BYTES, resource.getrlimit(resource.RLIMIT_AS)[1]))


def _tree(file: h5py.File) -> dict[str, Any]:
    """Every object by name: datasets with shape and type, groups, and links, which stay closed."""
    tree: dict[str, Any] = {"": {"kind": "group", "attrs": _attributes(file)}}
    _walk(file, "", tree, 0)
    return tree


def _walk(group: h5py.Group, prefix: str, tree: dict[str, Any], depth: int) -> None:
    if depth > _DEEPEST:
        return
    for name in group:
        if len(tree) >= _MOST_OBJECTS:
            return
        full = f"{prefix}{name}"
        try:
            link = group.get(name, getlink=True)
            if not isinstance(link, h5py.HardLink):
                tree[full] = {"kind": "external link" if isinstance(link, h5py.ExternalLink) else "soft link"}
                continue
            item = group[name]
            if isinstance(item, h5py.Dataset):
                entry = {"kind": "dataset", "shape": list(item.shape or ()), "dtype": str(item.dtype)}
                tree[full] = {**entry, "attrs": _attributes(item)}
            elif isinstance(item, h5py.Group):
                tree[full] = {"kind": "group", "attrs": _attributes(item)}
                _walk(item, f"{full}/", tree, depth + 1)
        except _ERRORS as error:
            # a damaged neighbour does not matter unless it is asked for
            tree[full] = {"kind": "damaged", "why": str(error)[:200]}


def _attributes(item: h5py.HLObject) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for index in range(min(h5py.h5a.get_num_attrs(item.id), _MOST_ATTRIBUTES)):
        try:
            attribute = h5py.h5a.open(item.id, index=index)
            if attribute.get_storage_size() > _MOST_ATTRIBUTE_BYTES:
                continue
            name = attribute.name.decode("utf-8", "replace")
            value = item.attrs[name]
        except _ERRORS:
            continue
        plain = _plain(value)
        if plain is not None:
            out[name] = plain
    return out


def _plain(value: Any) -> Any:
    if isinstance(value, bytes | np.bytes_):
        return value.decode("utf-8", "replace")
    if isinstance(value, str | np.str_):
        return str(value)
    array = np.asarray(value)
    if array.dtype.kind in "iufb":
        return array.tolist()
    if array.dtype.kind in "SU":
        return np.char.decode(array, "utf-8", "replace").tolist() if array.dtype.kind == "S" else array.tolist()
    return None


def _open(file: h5py.File, name: str) -> h5py.Dataset:
    item: Any = file
    for part in name.split("/"):
        link = item.get(part, getlink=True) if isinstance(item, h5py.Group) else None
        if link is None:
            raise Bad(f"has no dataset {name}", "check its layout")
        if not isinstance(link, h5py.HardLink):
            raise Bad(f"{name} is a link", "links are not followed; copy the data into the file")
        item = item[part]
    if not isinstance(item, h5py.Dataset):
        raise Bad(f"{name} is not a dataset", "check its layout")
    return item


def _send(out: BinaryIO, file: h5py.File, request: dict[str, Any]) -> None:
    name, budget, ratio, size = request["name"], request["budget"], request["ratio"], request["size"]
    data = _open(file, name)
    if data.is_virtual:
        raise Bad(f"{name} is a virtual dataset", "copy the data into the file")
    if data.id.get_create_plist().get_external_count():
        raise Bad(f"{name} is stored in other files", "copy the data into the file")
    if data.dtype.kind not in "iufS" or data.dtype.itemsize > 16 or data.dtype.names:
        raise Bad(f"{name} holds values of type {data.dtype}", "integers and real floats are read")
    if data.dtype.kind == "f" and data.dtype.itemsize > 8:
        raise Bad(f"{name} holds values of type {data.dtype}", "32 and 64 bit floats are read")
    if data.shape is None or any(n <= 0 for n in data.shape):
        raise Bad(f"{name} has size {data.shape}", "every size must be positive")
    properties = data.id.get_create_plist()
    for k in range(properties.get_nfilters()):
        code = properties.get_filter(k)[0]
        if code not in _FILTERS:
            raise Bad(f"{name} is packed with filter {code}", f"{', '.join(_FILTERS.values())} are read; repack it")
    stored = min(int(data.id.get_storage_size()), size)
    total = math.prod(data.shape) * data.dtype.itemsize
    described = f"{name} claims {' x '.join(map(str, data.shape))} {data.dtype}"
    if data.chunks is None and total > stored:
        raise Bad(f"{described} but stores {stored} bytes", "it is truncated; copy or export it again")
    if total > ratio * stored:
        raise Bad(f"{described}, over {ratio:g} times the {stored} bytes stored", "the header lies; export it again")
    if data.chunks is not None and math.prod(data.chunks) * data.dtype.itemsize > _LARGEST_CHUNK_BYTES:
        raise Bad(f"{name} has chunks of {data.chunks}", f"at most {_LARGEST_CHUNK_BYTES >> 20} MiB each; repack it")

    select = [slice(*bounds) if bounds else slice(None) for bounds in request["select"]]
    select += [slice(None)] * (data.ndim - len(select))
    ranges = [range(n)[s] for n, s in zip(data.shape, select, strict=False)]
    shape = [len(r) for r in ranges]
    if len(select) != data.ndim or 0 in shape:
        raise Bad(f"{name} of size {data.shape} leaves nothing of the rows asked for", "check the range")
    nbytes = math.prod(shape) * data.dtype.itemsize
    if nbytes > budget:
        given = f"{nbytes / 2**30:.3g} GiB, over the budget of {budget / 2**30:.3g} GiB"
        raise Bad(f"{described}: {given}", "free memory or read fewer rows")
    _limit(_CPU_SECONDS + total / _SLOWEST_BYTES_PER_SECOND)
    _reply(out, {"shape": shape, "dtype": data.dtype.newbyteorder("<").str, "nbytes": nbytes})
    if data.ndim == 0:
        out.write(np.asarray(data[()]).astype(data.dtype.newbyteorder("<")).tobytes())
        out.flush()
        return
    chunk = data.chunks[0] if data.chunks else 1
    rows = max(1, _SLAB_BYTES // max(1, nbytes // shape[0]) // chunk * chunk)
    first = ranges[0]
    sent = 0
    try:
        for start in range(0, len(first), rows):
            part = first[start : start + rows]
            slab = data[(slice(part.start, part.stop, part.step), *select[1:])]
            sent += out.write(np.ascontiguousarray(slab, dtype=data.dtype.newbyteorder("<")).tobytes())
    except _ERRORS as error:
        # bytes were announced: pad what is missing, then say what is wrong
        while sent < nbytes:
            sent += out.write(b"\0" * min(_SLAB_BYTES, nbytes - sent))
        raise Bad(f"{name} cannot be read ({str(error)[:200]})", "it is damaged; copy or export it again") from error
    _reply(out, {"done": True})


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt, BrokenPipeError):
        main()

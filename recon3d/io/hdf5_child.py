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
from collections.abc import Iterator
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
_MOST_TEXT = 4 << 20
_MOST_TEXTS = 64
_MOST_ROWS = 10_000_000
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
                _ANSWERS[request["do"]](out, file, request)
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


def _send_tree(out: BinaryIO, file: h5py.File, request: dict[str, Any]) -> None:
    _reply(out, {"tree": _tree(file)})


def _open_own(file: h5py.File, name: str) -> h5py.Dataset:
    """A dataset whose values lie in this very file, packed by filters that are known."""
    data = _open(file, name)
    if data.is_virtual:
        raise Bad(f"{name} is a virtual dataset", "copy the data into the file")
    properties = data.id.get_create_plist()
    if properties.get_external_count():
        raise Bad(f"{name} is stored in other files", "copy the data into the file")
    for k in range(properties.get_nfilters()):
        code = properties.get_filter(k)[0]
        if code not in _FILTERS:
            raise Bad(f"{name} is packed with filter {code}", f"{', '.join(_FILTERS.values())} are read; repack it")
    return data


def _send_text(out: BinaryIO, file: h5py.File, request: dict[str, Any]) -> None:
    """The one string of a dataset, of fixed or variable length."""
    name = request["name"]
    data = _open_own(file, name)
    kind = h5py.check_string_dtype(data.dtype)
    if kind is None or data.shape is None or math.prod(data.shape) not in range(1, _MOST_TEXTS + 1):
        raise Bad(f"{name} of type {str(data.dtype)[:60]} and size {data.shape} is not a text", "export it again")
    if kind.length is not None and kind.length * math.prod(data.shape) > _MOST_TEXT:
        raise Bad(f"{name} is a text of {kind.length} bytes", f"at most {_MOST_TEXT >> 20} MiB are read")
    value = data[()] if data.shape == () else data[(slice(0, 1),) * data.ndim].reshape(-1)[0]
    text = value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)
    if len(text) > _MOST_TEXT:
        raise Bad(f"{name} is a text of {len(text)} characters", f"at most {_MOST_TEXT >> 20} million are read")
    _reply(out, {"text": text})


def _open_rows(file: h5py.File, request: dict[str, Any]) -> tuple[h5py.Dataset, Any]:
    """A list of compound rows that holds a field, and the field's type; nothing is read."""
    name, field = request["name"], request["field"]
    data = _open_own(file, name)
    if data.dtype.names is None or field not in data.dtype.names or data.shape is None or data.ndim != 1:
        raise Bad(f"{name} of type {str(data.dtype)[:60]} is not a list with {field}", "export it again")
    rows = int(data.shape[0])
    stored = min(int(data.id.get_storage_size()), request["size"])
    if not 0 < rows <= _MOST_ROWS:
        raise Bad(f"{name} has {rows} rows", f"1 to {_MOST_ROWS} are read")
    if rows * data.dtype.itemsize > (request["ratio"] if data.chunks else 1) * stored:
        raise Bad(f"{name} claims {rows} rows but stores {stored} bytes", "it is truncated; copy or export it again")
    if data.chunks is not None and data.chunks[0] * data.dtype.itemsize > _LARGEST_CHUNK_BYTES:
        raise Bad(f"{name} has chunks of {data.chunks}", f"at most {_LARGEST_CHUNK_BYTES >> 20} MiB each; repack it")
    return data, data.dtype[field]


def _send_fields(out: BinaryIO, file: h5py.File, request: dict[str, Any]) -> None:
    """A field of fixed size of every row, as it is stored; fields of variable length beside it are not touched."""
    data, kind = _open_rows(file, request)
    if kind.hasobject or kind.itemsize > 65536:
        raise Bad(f"{request['name']} has a field {request['field']} of type {str(kind)[:60]}", "export it again")
    rows = int(data.shape[0])
    nbytes = rows * kind.itemsize
    if nbytes > request["budget"]:
        raise Bad(f"{request['name']} needs {nbytes / 2**30:.3g} GiB for its headers", "free memory")
    _limit(_CPU_SECONDS + nbytes / _SLOWEST_BYTES_PER_SECOND)
    _reply(out, {"shape": [rows], "descr": np.lib.format.dtype_to_descr(kind), "nbytes": nbytes})
    step = max(1, _SLAB_BYTES // kind.itemsize)
    field = data.fields(request["field"])
    _stream(out, request["name"], nbytes, (field[at : at + step] for at in range(0, rows, step)))


def _send_ragged(out: BinaryIO, file: h5py.File, request: dict[str, Any]) -> None:
    """Real numbers of variable length of chosen rows, one after the other, each as long as the request says."""
    data, kind = _open_rows(file, request)
    inner = h5py.check_vlen_dtype(kind)
    name, rows, lengths = f"{request['name']}.{request['field']}", request["rows"], request["lengths"]
    if inner is None or np.dtype(inner).kind not in "iuf" or np.dtype(inner).itemsize > 8:
        raise Bad(f"{name} is not a list of real numbers", "export it again")
    nbytes = 4 * sum(lengths)
    # what varies in length lies in the file as it is, never packed
    if np.dtype(inner).itemsize * sum(lengths) > request["size"]:
        raise Bad(f"{name} claims {nbytes} bytes of a file of {request['size']}", "the headers lie; export it again")
    if nbytes > request["budget"]:
        raise Bad(f"{name} needs {nbytes / 2**30:.3g} GiB", "free memory or read fewer slices")
    _limit(_CPU_SECONDS + nbytes / _SLOWEST_BYTES_PER_SECOND + 1e-4 * len(rows))
    _reply(out, {"shape": [sum(lengths)], "descr": "<f4", "nbytes": nbytes})
    _stream(out, name, nbytes, _ragged_slabs(data.fields(request["field"]), name, rows, lengths))


def _ragged_slabs(field: Any, name: str, rows: list[int], lengths: list[int]) -> Iterator[np.ndarray]:
    at = 0
    while at < len(rows):
        stop, count = at + 1, lengths[at]
        while stop < len(rows) and rows[stop] == rows[stop - 1] + 1 and count + lengths[stop] <= _SLAB_BYTES // 4:
            count += lengths[stop]
            stop += 1
        parts = field[rows[at] : rows[stop - 1] + 1]
        for k, part in enumerate(parts, start=at):
            if part.shape != (lengths[k],):
                raise Bad(
                    f"{name} of row {rows[k]} holds {part.size} numbers, its header says {lengths[k]}",
                    "it is damaged; export it again",
                )
        yield np.concatenate(list(parts)).astype("<f4", copy=False)
        at = stop


def _stream(out: BinaryIO, name: str, nbytes: int, slabs: Iterator[np.ndarray]) -> None:
    sent = 0
    try:
        for slab in slabs:
            sent += out.write(np.ascontiguousarray(slab).tobytes())
    except (Bad, *_ERRORS) as error:
        # bytes were announced: pad what is missing, then say what is wrong
        while sent < nbytes:
            sent += out.write(b"\0" * min(_SLAB_BYTES, nbytes - sent))
        if isinstance(error, Bad):
            raise
        raise Bad(f"{name} cannot be read ({str(error)[:200]})", "it is damaged; copy or export it again") from error
    _reply(out, {"done": True})


def _send(out: BinaryIO, file: h5py.File, request: dict[str, Any]) -> None:
    name, budget, ratio, size = request["name"], request["budget"], request["ratio"], request["size"]
    data = _open_own(file, name)
    if data.dtype.kind not in "iufcS" or data.dtype.itemsize > 16 or data.dtype.names:
        raise Bad(f"{name} holds values of type {str(data.dtype)[:60]}", "integers, real and complex floats are read")
    if data.dtype.kind == "f" and data.dtype.itemsize > 8:
        raise Bad(f"{name} holds values of type {data.dtype}", "32 and 64 bit floats are read")
    if data.shape is None or any(n <= 0 for n in data.shape):
        raise Bad(f"{name} has size {data.shape}", "every size must be positive")
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
    parts = (first[start : start + rows] for start in range(0, len(first), rows))
    kind = data.dtype.newbyteorder("<")
    slabs = (data[(slice(p.start, p.stop, p.step), *select[1:])].astype(kind, copy=False) for p in parts)
    _stream(out, name, nbytes, slabs)


_ANSWERS = {"tree": _send_tree, "load": _send, "text": _send_text, "fields": _send_fields, "ragged": _send_ragged}


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt, BrokenPipeError):
        main()

"""HDF5 files through a reader process that may crash, hang or run out of memory without harm; and an atomic writer."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn, Self

import numpy as np
from numpy.typing import NDArray

from recon3d.io.atomic import publish
from recon3d.io.guard import DEFAULT_LIMITS, BadInput, Limits, as_bad_input, check_file

HDF5_SIGNATURE = b"\x89HDF\r\n\x1a\n"

# without a byte from the reader for so long the disk is gone; its processor time is limited apart from this
_PATIENCE_S = 120.0
_MOST_LINE = 64 << 20

Tree = dict[str, dict[str, Any]]
Selection = Sequence[tuple[int | None, int | None, int | None] | None]


class HDF5Reader:
    """A reader process; use it as a context manager.

    One is enough for several files: after a crash the next request starts another.
    """

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._buffer = bytearray()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def tree(self, path: str | os.PathLike[str]) -> Tree:
        """Every object of the file by name: kind, attributes, and shape and dtype of datasets.

        Raises:
            BadInput: the file is not HDF5, or the library cannot read it.
        """
        size = _check_signature(path)
        answer = self._ask(path, {"do": "tree", "path": os.fspath(path), "size": size})
        tree: Tree = answer["tree"]
        return tree

    def load(
        self,
        path: str | os.PathLike[str],
        name: str,
        selection: Selection = (),
        limits: Limits = DEFAULT_LIMITS,
    ) -> NDArray[Any]:
        """A dataset of real numbers.

        Args:
            path: the file.
            name: the dataset, such as "exchange/data".
            selection: (start, stop, step) along the leading axes; None keeps an axis whole.
            limits: how much memory it may claim.

        Raises:
            BadInput: it is missing, linked, stored elsewhere, too large, or damaged.
        """
        request = {"do": "load", "name": name, "select": list(selection)}
        head = self._ask(path, request | _claims(path, limits))
        dtype = np.dtype(head["dtype"])
        array = self._receive(path, name, tuple(head["shape"]), dtype, head["nbytes"])
        return array.astype(dtype.newbyteorder("="), copy=False)

    def text(self, path: str | os.PathLike[str], name: str) -> str:
        """The string that a dataset holds.

        Raises:
            BadInput: it is missing, linked, not a string, or longer than a few million characters.
        """
        answer = self._ask(path, {"do": "text", "name": name} | _claims(path, DEFAULT_LIMITS))
        return str(answer["text"])

    def fields(
        self, path: str | os.PathLike[str], name: str, field: str, limits: Limits = DEFAULT_LIMITS
    ) -> NDArray[Any]:
        """One field of every row of a compound dataset, such as all headers, without the rest of the rows.

        Raises:
            BadInput: it is missing, of variable length, too large, or damaged.
        """
        head = self._ask(path, {"do": "fields", "name": name, "field": field} | _claims(path, limits))
        with as_bad_input(path, f"{name} has rows of a strange type", (TypeError, ValueError, KeyError)):
            dtype = np.dtype(np.lib.format.descr_to_dtype(_tuples(head["descr"])))
        return self._receive(path, name, tuple(head["shape"]), dtype, head["nbytes"])

    def ragged(
        self,
        path: str | os.PathLike[str],
        name: str,
        field: str,
        rows: Sequence[int],
        lengths: Sequence[int],
        limits: Limits = DEFAULT_LIMITS,
    ) -> NDArray[np.float32]:
        """A field of variable length of chosen rows, end to end.

        Args:
            path: the file.
            name: the compound dataset.
            field: its field, a list of real numbers a row.
            rows: which rows, increasing.
            lengths: how many numbers each of them must have.
            limits: how much memory it may claim.

        Raises:
            BadInput: a row is longer or shorter, the field is missing, too large, or damaged.
        """
        request = {"do": "ragged", "name": name, "field": field, "rows": list(rows), "lengths": list(lengths)}
        head = self._ask(path, request | _claims(path, limits))
        return self._receive(path, name, tuple(head["shape"]), np.dtype("<f4"), head["nbytes"])

    def _receive(
        self, path: str | os.PathLike[str], name: str, shape: tuple[int, ...], dtype: np.dtype[Any], nbytes: int
    ) -> NDArray[Any]:
        array = np.empty(shape, dtype)
        if array.nbytes != nbytes:
            raise BadInput(path, f"{name} could not be read", "try again")
        self._fill(path, array.reshape(-1).view(np.uint8).data if array.size else memoryview(b""))
        if shape:
            self._answer(path)
        return array

    def _ask(self, path: str | os.PathLike[str], request: dict[str, Any]) -> dict[str, Any]:
        if self._process is None or self._process.poll() is not None:
            self._start()
        assert self._process is not None and self._process.stdin is not None  # just started
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            self._gave_up(path)
        return self._answer(path)

    def _answer(self, path: str | os.PathLike[str]) -> dict[str, Any]:
        while b"\n" not in self._buffer:
            self._more(path)
            if len(self._buffer) > _MOST_LINE:
                self._stop()
                raise BadInput(path, "describes itself at absurd length", "export it again")
        line, _, rest = bytes(self._buffer).partition(b"\n")
        self._buffer = bytearray(rest)
        answer: dict[str, Any] = json.loads(line)
        if "bad" in answer:
            raise BadInput(path, *answer["bad"])
        return answer

    def _fill(self, path: str | os.PathLike[str], view: memoryview) -> None:
        at = 0
        while at < len(view):
            if not self._buffer:
                self._more(path)
            take = min(len(self._buffer), len(view) - at)
            view[at : at + take] = self._buffer[:take]
            del self._buffer[:take]
            at += take

    def _more(self, path: str | os.PathLike[str]) -> None:
        assert self._process is not None and self._process.stdout is not None  # only called after a request
        pipe = self._process.stdout
        ready, _, _ = select.select([pipe], [], [], _PATIENCE_S)
        if not ready:
            self._stop()
            raise BadInput(path, f"gave no data for {_PATIENCE_S:g} s", "check the disk it lies on")
        data = os.read(pipe.fileno(), 1 << 20)
        if not data:
            self._gave_up(path)
        self._buffer += data

    def _gave_up(self, path: str | os.PathLike[str]) -> NoReturn:
        assert self._process is not None  # only called after a request
        self._process.wait()
        self._stop()
        raise BadInput(path, "makes the HDF5 library crash or loop", "it is damaged; copy or export it again")

    def _start(self) -> None:
        self._stop()
        environment = {
            **os.environ,
            "HDF5_PLUGIN_PRELOAD": "::",  # no filters from outside
            "HDF5_USE_FILE_LOCKING": "FALSE",  # read-only disks have no locks
            "OMP_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
        }
        script = Path(__file__).with_name("hdf5_child.py")
        self._process = subprocess.Popen(
            [sys.executable, "-P", os.fspath(script)],
            bufsize=0,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
        )
        assert self._process.stdout is not None  # it is a pipe
        if b"ready" not in self._process.stdout.readline():
            self._stop()
            raise RuntimeError("the HDF5 reader did not start: h5py cannot be imported by " + sys.executable)

    def _stop(self) -> None:
        process, self._process = self._process, None
        self._buffer = bytearray()
        if process is None:
            return
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                pipe.close()
        try:
            process.wait(timeout=1.0)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def write_hdf5(
    path: str | os.PathLike[str],
    datasets: Iterable[tuple[str, NDArray[Any]]],
    attributes: Iterable[tuple[str, str, Any]] = (),
    compress: bool = True,
) -> None:
    """Writes datasets and attributes (object, name, value); the file appears whole or not at all.

    Raises:
        OSError: the folder is missing, read-only or full.
    """
    import h5py

    path = Path(path)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    os.close(handle)
    try:
        with h5py.File(temporary, "w", track_order=False) as file:
            for name, array in datasets:
                packed = compress and array.ndim > 0 and array.nbytes > 1 << 16
                options = {"compression": "gzip", "compression_opts": 4, "shuffle": True} if packed else {}
                # no modification times inside: the same content gives the same bytes
                file.create_dataset(name, data=array, track_times=False, **options)
            for owner, name, value in attributes:
                (file.require_group(owner) if owner not in file else file[owner]).attrs[name] = value
        publish(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _claims(path: str | os.PathLike[str], limits: Limits) -> dict[str, Any]:
    size = _check_signature(path)
    return {"path": os.fspath(path), "budget": limits.budget(), "ratio": limits.ratio, "size": size}


def _tuples(descr: Any) -> Any:
    # JSON knows lists alone, where numpy wants a list of tuples
    if isinstance(descr, str):
        return descr
    return [(str(name), _tuples(kind), *(tuple(shape) for shape in rest)) for name, kind, *rest in descr]


def _check_signature(path: str | os.PathLike[str]) -> int:
    size = check_file(path)
    with Path(path).open("rb") as file:
        if file.read(8) != HDF5_SIGNATURE:
            raise BadInput(path, "is not an HDF5 file", "export it again")
    return size

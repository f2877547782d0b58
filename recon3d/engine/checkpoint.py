"""Files that appear whole or not at all, and the checkpoint of a run built on them.

A checkpoint is one safetensors file (state and duals) and LATEST.json, which names it, its sha256 and what it belongs
to. Both are written under a temporary name in the same folder, flushed to the disk, renamed, and the folder is
flushed; LATEST.json comes last and older states go after it. A kill at any instant leaves the previous checkpoint or
the new one.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import secrets
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
from torch import Tensor

from recon3d.engine.executor import ResourceError
from recon3d.io.atomic import atomic_write

FORMAT = 1
_POINTER = "LATEST.json"
# key of the header's metadata that lists complex tensors
_COMPLEX = "complex"
_NAMES = {
    torch.float32: "F32",
    torch.float64: "F64",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_NO_SPACE = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the quota is used up",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "permission denied",
    errno.EPERM: "permission denied",
}


class CheckpointError(ValueError):
    """The checkpoint belongs to another job, or cannot be read."""


@dataclass(frozen=True)
class Saved:
    """A checkpoint as read back."""

    tensors: dict[str, Tensor]
    meta: dict[str, Any]


class Checkpoint:
    """The checkpoint of one run, in a folder of its own.

    Args:
        folder: made when first saved to; stale temporary files in it are removed.
        fingerprint: what the state belongs to, name to value (inputs, config, prior, version); a checkpoint with
            another fingerprint is refused.
    """

    def __init__(self, folder: Path, fingerprint: Mapping[str, str]) -> None:
        self.folder = folder
        self.fingerprint = dict(fingerprint)
        if folder.is_dir():
            sweep(folder)

    def save(self, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> int:
        """Publish a new checkpoint and remove the one before it.

        Args:
            tensors: host or device tensors, any shape.
            meta: JSON values, such as the level.

        Returns:
            Bytes written.

        Raises:
            ResourceError: the disk is full or not writable; the previous checkpoint is intact.
        """
        with disk_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            name = f"state-{secrets.token_hex(6)}.safetensors"
            digest, size = write_safetensors(self.folder / name, tensors)
            pointer = {
                "format": FORMAT,
                "file": name,
                "sha256": digest,
                "fingerprint": self.fingerprint,
                "meta": dict(meta),
            }
            write_json(self.folder / _POINTER, pointer)
            for old in self.folder.glob("state-*.safetensors"):
                if old.name != name:
                    old.unlink(missing_ok=True)
        return size

    def verify(self) -> bool:
        """Whether there is a checkpoint to go on from; reads the pointer alone.

        Raises:
            CheckpointError: it belongs to another job, or cannot be read.
        """
        return self._pointer() is not None

    def meta(self) -> dict[str, Any] | None:
        """What was said beside the tensors of the last published checkpoint; reads the pointer alone.

        Raises:
            CheckpointError: it belongs to another job, or cannot be read.
        """
        found = self._pointer()
        return None if found is None else found[2]

    def load(self) -> Saved | None:
        """The last published checkpoint; None when there is none yet.

        Raises:
            CheckpointError: it belongs to another job, or its bytes are not those written.
        """
        found = self._pointer()
        if found is None:
            return None
        file, expected, meta = found
        if not file.exists() or sha256_file(file) != expected:
            raise CheckpointError(
                f"checkpoint {file}: its bytes are missing or not those written; start afresh with --force"
            )
        from safetensors import safe_open

        with safe_open(file, framework="pt") as stored:
            # cloned one by one: a tensor that maps the file would end with it
            tensors = {name: stored.get_tensor(name).clone() for name in stored.keys()}  # noqa: SIM118
            for name in json.loads((stored.metadata() or {}).get(_COMPLEX, "[]")):
                tensors[name] = torch.view_as_complex(tensors[name])
        return Saved(tensors, meta)

    def _pointer(self) -> tuple[Path, str, dict[str, Any]] | None:
        pointer = self.folder / _POINTER
        if not pointer.exists():
            return None
        try:
            record = json.loads(pointer.read_text(encoding="utf-8"))
            found, file = dict(record["fingerprint"]), self.folder / Path(str(record["file"])).name
            expected, meta, version = str(record["sha256"]), dict(record["meta"]), record["format"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"checkpoint {pointer}: cannot be read ({error}); start afresh with --force"
            ) from None
        if version != FORMAT:
            raise CheckpointError(
                f"checkpoint {self.folder}: format {version}, this version reads {FORMAT}; "
                "resume with the version that wrote it, or start afresh with --force"
            )
        differing = [
            k for k in sorted(found.keys() | self.fingerprint.keys()) if found.get(k) != self.fingerprint.get(k)
        ]
        if differing:
            what = ", ".join(
                f"{k} ({_short(found.get(k))} there, {_short(self.fingerprint.get(k))} now)" for k in differing
            )
            raise CheckpointError(
                f"checkpoint {self.folder}: belongs to another job, differing in {what}; "
                "choose another output folder, or start afresh with --force"
            )
        return file, expected, meta

    def remove(self) -> None:
        """Remove the checkpoint, pointer first."""
        if self.folder.is_dir():
            (self.folder / _POINTER).unlink(missing_ok=True)
            for old in self.folder.glob("state-*.safetensors"):
                old.unlink(missing_ok=True)
            sweep(self.folder)
            if not any(self.folder.iterdir()):
                self.folder.rmdir()


def write_safetensors(path: Path, tensors: Mapping[str, Tensor]) -> tuple[str, int]:
    """Write tensors in the safetensors layout, atomically and without a second copy in memory.

    The layout has no complex numbers: such tensors are stored as pairs of reals, and the header names them.

    Returns:
        The sha256 of the file and its size in bytes.
    """
    paired = sorted(name for name, tensor in tensors.items() if tensor.is_complex())
    tensors = {
        name: torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor
        for name, tensor in tensors.items()
    }
    header: dict[str, dict[str, Any]] = {"__metadata__": {_COMPLEX: json.dumps(paired)}} if paired else {}
    offset = 0
    for name in sorted(tensors):
        tensor = tensors[name]
        if tensor.dtype not in _NAMES:
            raise TypeError(
                f"checkpoint: tensor {name!r} has dtype {tensor.dtype}, allowed are {', '.join(_NAMES.values())}"
            )
        size = tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + size],
        }
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()

    def body(file: BinaryIO) -> None:
        for chunk in _chunks(text, [tensors[name] for name in sorted(tensors)]):
            digest.update(chunk)
            file.write(chunk)

    write_atomically(path, body)
    return digest.hexdigest(), 8 + len(text) + offset


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file that appears whole or not at all."""
    text = (json.dumps(value, indent=2) + "\n").encode()
    write_atomically(path, lambda file: file.write(text))


def write_atomically(path: Path, body: Callable[[BinaryIO], object]) -> None:
    """Let `body` write a file that replaces `path` whole; when it raises, nothing is left behind."""
    with atomic_write(path) as file:
        body(cast(BinaryIO, file))


def sweep(folder: Path) -> int:
    """Remove temporary files that a killed process left in a folder; gives their number."""
    stale = list(folder.glob(".*.tmp"))  # names of recon3d.io.atomic
    for path in stale:
        path.unlink(missing_ok=True)
    return len(stale)


def sha256_file(path: Path) -> str:
    """The sha256 of a file, as hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the run folder for this process alone; the lock goes with the process, however it ends.

    Raises:
        ResourceError: another process holds it.
    """
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ResourceError(
                f"{folder}: another process is working in this folder; wait for it or choose another"
            ) from None
        yield


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn a full or read-only disk into a ResourceError in one sentence."""
    try:
        yield
    except OSError as error:
        if error.errno in _NO_SPACE:
            raise ResourceError(
                f"{path}: {_NO_SPACE[error.errno]}; what was published before is intact, make room and resume"
            ) from error
        raise


def _chunks(header: bytes, tensors: list[Tensor], step: int = 1 << 24) -> Iterator[memoryview | bytes]:
    yield len(header).to_bytes(8, "little")
    yield header
    for tensor in tensors:
        if tensor.numel() == 0:
            continue
        flat = tensor.detach().contiguous().view(-1).view(torch.uint8)
        for start in range(0, flat.numel(), step):
            yield flat[start : start + step].cpu().numpy().data


def _short(value: str | None) -> str:
    return "nothing" if value is None else value[:12]

"""Checkpoints and atomic files: whole or absent, never another job's, readable by anyone's safetensors."""

from __future__ import annotations

import contextlib
import errno
import json
import multiprocessing

import pytest
import torch

from recon3d.engine import checkpoint as cp
from recon3d.engine.checkpoint import Checkpoint, CheckpointError
from recon3d.engine.executor import ResourceError
from recon3d.io.atomic import atomic_write

STAMP = {"config": "aaaa", "inputs": "bbbb", "prior": "cccc", "version": "1"}


def tensors(seed=0):
    g = torch.Generator().manual_seed(seed)
    return {
        "u": torch.randn(3, 5, 4, generator=g),
        "w": torch.randn(2, 3, generator=g, dtype=torch.float64),
        "mask": torch.tensor([True, False]),
        "count": torch.tensor(7),
        "none": torch.zeros(0, 4),
    }


def test_what_was_saved_comes_back(tmp_path):
    store = Checkpoint(tmp_path / "c", STAMP)
    assert store.load() is None
    store.save(tensors(0), {"level": 1})
    size = store.save(tensors(1), {"level": 2, "seconds": 0.25})
    saved = Checkpoint(tmp_path / "c", STAMP).load()
    assert saved.meta == {"level": 2, "seconds": 0.25}
    for name, want in tensors(1).items():
        assert torch.equal(saved.tensors[name], want) and saved.tensors[name].dtype == want.dtype
    files = sorted(p.name for p in (tmp_path / "c").iterdir())
    assert len(files) == 2 and files[0] == "LATEST.json" and files[1].startswith("state-")
    assert (tmp_path / "c" / files[1]).stat().st_size == size
    store.remove()
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize("key", sorted(STAMP))
def test_another_jobs_checkpoint_is_refused(tmp_path, key):
    Checkpoint(tmp_path, STAMP).save(tensors(), {})
    with pytest.raises(CheckpointError, match=rf"differing in {key} \(.* there, other now\); .*--force"):
        Checkpoint(tmp_path, {**STAMP, key: "other"}).load()


def test_changed_bytes_are_refused(tmp_path):
    store = Checkpoint(tmp_path, STAMP)
    store.save(tensors(), {})
    (state,) = tmp_path.glob("state-*")
    data = bytearray(state.read_bytes())
    data[-3] ^= 1
    state.write_bytes(data)
    with pytest.raises(CheckpointError, match="not those written"):
        store.load()
    state.unlink()
    with pytest.raises(CheckpointError, match="missing"):
        store.load()
    (tmp_path / "LATEST.json").write_text("{")
    with pytest.raises(CheckpointError, match="cannot be read"):
        store.load()
    (tmp_path / "LATEST.json").write_text(
        json.dumps({"format": 99, "fingerprint": {}, "file": "x", "sha256": "", "meta": {}})
    )
    with pytest.raises(CheckpointError, match="format 99"):
        store.load()


def test_a_pointer_cannot_leave_its_folder(tmp_path):
    store = Checkpoint(tmp_path / "c", STAMP)
    store.save(tensors(), {})
    pointer = json.loads((tmp_path / "c" / "LATEST.json").read_text())
    (tmp_path / "outside.safetensors").write_bytes(next((tmp_path / "c").glob("state-*")).read_bytes())
    pointer["file"] = "../outside.safetensors"
    (tmp_path / "c" / "LATEST.json").write_text(json.dumps(pointer))
    with pytest.raises(CheckpointError, match="missing"):
        store.load()


class FullDisk:
    """A file that fails with the given error after so many bytes."""

    def __init__(self, file, room, code):
        self.file, self.room, self.code = file, room, code

    def write(self, data):
        self.room -= len(data)
        if self.room < 0:
            raise OSError(self.code, "injected")
        return self.file.write(data)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EROFS])
@pytest.mark.parametrize("room", [0, 5, 100, 500, 700])
def test_a_full_disk_keeps_the_checkpoint_before(tmp_path, monkeypatch, code, room):
    store = Checkpoint(tmp_path, STAMP)
    store.save(tensors(0), {"level": 1})
    real = cp.write_atomically
    left = [room]

    def limited(path, body):
        def write(file):
            full = FullDisk(file, left[0], code)
            try:
                body(full)
            finally:
                left[0] = full.room

        real(path, write)

    monkeypatch.setattr(cp, "write_atomically", limited)
    with pytest.raises(ResourceError, match="make room and resume"):
        store.save(tensors(1), {"level": 2})
    monkeypatch.undo()
    saved = Checkpoint(tmp_path, STAMP).load()
    assert saved.meta == {"level": 1} and torch.equal(saved.tensors["u"], tensors(0)["u"])
    assert not list(tmp_path.glob(".*.tmp"))
    store.save(tensors(1), {"level": 2})
    assert store.load().meta == {"level": 2} and len(list(tmp_path.iterdir())) == 2


def test_stale_temporaries_are_swept_and_strangers_left_alone(tmp_path):
    with contextlib.suppress(KeyboardInterrupt), atomic_write(tmp_path / "state-1.safetensors"):
        left = [p.name for p in tmp_path.iterdir()]
        raise KeyboardInterrupt
    (tmp_path / left[0]).write_bytes(b"half")  # what a kill would have left
    (tmp_path / "notes.txt").write_text("mine")
    Checkpoint(tmp_path, STAMP)
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


def test_a_failing_writer_leaves_nothing(tmp_path):
    (tmp_path / "a.json").write_text("old")

    def body(file):
        file.write(b"new")
        raise KeyError("stop")

    with pytest.raises(KeyError):
        cp.write_atomically(tmp_path / "a.json", body)
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"] and (tmp_path / "a.json").read_text() == "old"


def _try_lock(folder, queue):
    try:
        with cp.locked(folder):
            queue.put("held")
    except ResourceError as error:
        queue.put(str(error))


def test_two_processes_never_share_a_folder(tmp_path):
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    with cp.locked(tmp_path):
        child = context.Process(target=_try_lock, args=(tmp_path, queue))
        child.start()
        assert "another process" in queue.get(timeout=20)
        child.join()
    child = context.Process(target=_try_lock, args=(tmp_path, queue))
    child.start()
    assert queue.get(timeout=20) == "held"
    child.join()


def test_unknown_dtypes_are_named(tmp_path):
    with pytest.raises(TypeError, match=r"'z' has dtype torch\.int16"):
        cp.write_safetensors(tmp_path / "a.safetensors", {"z": torch.zeros(1, dtype=torch.int16)})


def test_complex_tensors_come_back(tmp_path):
    """Stored as pairs of reals, which every reader of the format understands."""
    from safetensors import safe_open

    u = torch.randn(2, 3, 4, dtype=torch.complex64, generator=torch.Generator().manual_seed(1))
    store = Checkpoint(tmp_path / "c", STAMP)
    store.save({"u": u.conj(), "w": torch.zeros(2)}, {})
    saved = store.load()
    assert torch.equal(saved.tensors["u"], u.conj().resolve_conj()) and saved.tensors["w"].dtype == torch.float32
    (file,) = (tmp_path / "c").glob("state-*")
    with safe_open(file, framework="np") as stored:
        assert stored.get_tensor("u").shape == (2, 3, 4, 2)

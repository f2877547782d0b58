"""The input guard: what it lets through, what it stops, and that it stops before memory is taken."""

import gzip
import io
import os
import pickle
import signal
import subprocess
import sys
import tracemalloc
import zlib
from pathlib import Path

import h5py
import numpy as np
import pytest

from recon3d.io import BadInput, Limits, hdf5_child
from recon3d.io.atomic import atomic_write
from recon3d.io.guard import (
    Inflater,
    as_bad_input,
    check_affine,
    check_array,
    check_file,
    check_finite,
    check_scaling,
    check_spacing,
)
from recon3d.io.hdf5 import HDF5Reader, write_hdf5
from recon3d.io.layout import load_npz


def test_sentence():
    error = BadInput("a/b.nii", "is\nbroken.", "copy it again.")
    assert str(error) == "a/b.nii: is broken; copy it again"
    assert isinstance(error, ValueError)
    again = pickle.loads(pickle.dumps(error))  # as a worker process hands it back
    assert (again.path, again.why, again.hint) == ("a/b.nii", "is broken", "copy it again")


def test_files(tmp_path):
    (tmp_path / "good").write_bytes(b"abc")
    assert check_file(tmp_path / "good") == 3
    (tmp_path / "empty").touch()
    os.mkfifo(tmp_path / "pipe")
    for name, match in (
        ("empty", "empty"),
        ("pipe", "not a regular file"),
        ("none", "does not exist"),
        (".", "folder"),
    ):
        with pytest.raises(BadInput, match=match):
            check_file(tmp_path / name)
    with pytest.raises(BadInput, match="cannot be reached"):
        check_file("bad\0name")
    with pytest.raises(BadInput, match="not a regular file"):
        check_file("/dev/zero")


@pytest.mark.parametrize(
    "shape,itemsize,stored,compressed,match",
    [
        ((3, 0, 4), 4, 100, False, "must be positive"),
        ((3, -1, 4), 4, 100, True, "must be positive"),
        ((3, 3, 3), 4, 107, False, "only 107 bytes are stored"),
        ((1 << 40, 1 << 40, 1 << 40), 8, 1 << 30, True, "times the 1 GiB stored"),
        ((10, 10, 10), 1, 0, True, "times"),
        ((1000, 1000, 10), 4, 1 << 40, False, "budget of 1 MiB"),
    ],
)
def test_array_claims(shape, itemsize, stored, compressed, match):
    with pytest.raises(BadInput, match=match):
        check_array("f", "it", shape, itemsize, stored, compressed, Limits(budget_bytes=1 << 20))


def test_array_that_fits():
    assert check_array("f", "it", (3, 3, 3), 4, 108, False) == 108
    assert check_array("f", "it", (1000,), 1, 1, True) == 1000  # a thousand to one, as zeros may be
    with pytest.raises(BadInput, match="budget"):
        check_array("f", "it", (100,), 4, 400, False, Limits(budget_bytes=1000), working_itemsize=8)
    assert Limits().budget() > 0


@pytest.mark.parametrize(
    "matrix,match",
    [
        (np.full((4, 4), np.nan), "NaN"),
        (np.eye(3), "NaN|affine"),
        (np.diag([1.0, 1, 1, 2]), "last row"),
        (np.diag([1e-5, 1, 1, 1]), "voxel size along i is 1e-05 mm"),
        (np.diag([1.0, 2e3, 1, 1]), "voxel size along j"),
        (np.array([[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]]), "one plane"),
        (np.array([[1, 0, 0, 1e7], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]]), "kilometre"),
    ],
)
def test_affines(matrix, match):
    with pytest.raises(BadInput, match=match):
        check_affine("f", matrix)


def test_good_affines_pass():
    shear = np.array([[1, 0.9, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]])
    assert np.array_equal(check_affine("f", shear), shear)
    assert np.array_equal(check_affine("f", np.diag([-0.001, 500, 1, 1])), np.diag([-0.001, 500, 1, 1]))


def test_scaling_and_spacing():
    assert check_scaling("f", 0.0, 5.0) == (1.0, 0.0)
    assert check_scaling("f", 2.0, 5.0) == (2.0, 5.0)
    for slope, intercept in ((np.nan, 0.0), (1.0, np.inf), (1e31, 0.0)):
        with pytest.raises(BadInput, match="scaling"):
            check_scaling("f", slope, intercept)
    for value in (0.0, -1.0, 1e-4, 1e3, np.nan, np.inf):
        with pytest.raises(BadInput, match="mm"):
            check_spacing("f", "pixel", value)
    assert check_spacing("f", "pixel", 0.5) == 0.5


def test_finite_counts_and_locates_across_pieces():
    values = np.zeros((3, 1 << 20), np.float32)
    check_finite("f", "it", values)
    values[1, 5], values[2, 7] = np.nan, np.inf
    with pytest.raises(BadInput, match=r"it holds 2 NaN or infinite values of 3145728, the first at \(1, 5\)"):
        check_finite("f", "it", values)


def test_inflate_members_padding_and_checksum():
    first, second = gzip.compress(b"hello "), gzip.compress(b"world")
    stream = Inflater("f", io.BytesIO(first + second + b"\0" * 50))
    assert stream.read(100) == b"hello world"
    stream.finish()
    broken = bytearray(first)
    broken[-6] ^= 1  # the checksum
    with pytest.raises(BadInput, match="corrupt"):
        Inflater("f", io.BytesIO(bytes(broken))).finish()
    with pytest.raises(BadInput, match="too early"):
        Inflater("f", io.BytesIO(first[:-3])).read(100)
    with pytest.raises(BadInput, match="corrupt"):
        Inflater("f", io.BytesIO(first + b"garbage")).read(100)
    with pytest.raises(BadInput, match="thousands"):
        Inflater("f", io.BytesIO(gzip.compress(b"") * 5000)).read(100)


def test_bomb_takes_no_memory():
    pack = zlib.compressobj(9, zlib.DEFLATED, 31)
    zeros = bytes(1 << 20)
    bomb = b"".join(pack.compress(zeros) for _ in range(256)) + pack.flush()  # 256 MiB
    assert len(bomb) < 300_000
    tracemalloc.start()
    stream = Inflater("f", io.BytesIO(bomb))
    assert len(stream.read(1000)) == 1000
    with pytest.raises(BadInput, match="far more data"):
        stream.finish()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 16 << 20


def test_errors_of_parsers():
    with (
        pytest.raises(BadInput, match=r"f: is odd \(two lines\); copy or export it again"),
        as_bad_input("f", "is odd", (KeyError, OSError)),
    ):
        raise OSError("two\nlines")
    with pytest.raises(BadInput, match=r"^g: x; y$"), as_bad_input("f", "is odd", (ValueError,)):
        raise BadInput("g", "x", "y")
    with pytest.raises(ZeroDivisionError), as_bad_input("f", "is odd", (ValueError,)):
        raise ZeroDivisionError


def test_atomic_write(tmp_path):
    path = tmp_path / "a.bin"
    with atomic_write(path) as file:
        file.write(b"one")
        assert not path.exists()
    assert path.read_bytes() == b"one"
    mask = os.umask(0)
    os.umask(mask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~mask
    with pytest.raises(KeyboardInterrupt), atomic_write(path) as file:
        file.write(b"two")
        raise KeyboardInterrupt
    assert path.read_bytes() == b"one" and [p.name for p in tmp_path.iterdir()] == ["a.bin"]
    with pytest.raises(FileNotFoundError), atomic_write(tmp_path / "none" / "a"):
        pass


def test_hdf5_writer_leaves_nothing_behind(tmp_path):
    with pytest.raises(TypeError):
        write_hdf5(tmp_path / "a.h5", [("x", np.array([object()]))])
    assert not list(tmp_path.iterdir())


# ---- HDF5 -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reader():
    with HDF5Reader() as r:
        yield r


def refused(reader, path, name, match, **options):
    with pytest.raises(BadInput, match=match) as caught:
        reader.load(path, name, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("compression", [None, "gzip", "lzf"])
def test_hdf5_loads(tmp_path, reader, compression):
    values = np.arange(5 * 7 * 9, dtype=">f4").reshape(5, 7, 9)
    with h5py.File(tmp_path / "a.h5", "w") as f:
        f.create_dataset("g/x", data=values, compression=compression, shuffle=compression is not None)
        f["g"].attrs.update({"text": "µ", "list": [1, 2, 3], "bytes": np.bytes_("b")})
        f["scalar"] = 3.5
    assert np.array_equal(reader.load(tmp_path / "a.h5", "g/x"), values)
    assert np.array_equal(reader.load(tmp_path / "a.h5", "g/x", [None, (2, 6, 3)]), values[:, 2:6:3])
    assert np.array_equal(reader.load(tmp_path / "a.h5", "g/x", [(1, None, 2)]), values[1::2])
    assert reader.load(tmp_path / "a.h5", "scalar") == 3.5
    tree = reader.tree(tmp_path / "a.h5")
    assert tree["g/x"]["shape"] == [5, 7, 9] and tree["g"]["attrs"] == {"text": "µ", "list": [1, 2, 3], "bytes": "b"}
    refused(reader, tmp_path / "a.h5", "g/y", "no dataset g/y")
    refused(reader, tmp_path / "a.h5", "g", "not a dataset")
    refused(reader, tmp_path / "a.h5", "g/x", "rows asked for", selection=[(9, 12, None)])
    refused(reader, tmp_path / "a.h5", "g/x", "budget", limits=Limits(budget_bytes=100))


def test_hdf5_large_array_comes_in_slabs(tmp_path, reader):
    values = np.random.default_rng(0).random((40, 512, 256)).astype(np.float32)  # 20 MiB
    with h5py.File(tmp_path / "a.h5", "w") as f:
        f.create_dataset("x", data=values, chunks=(7, 64, 64))
    assert np.array_equal(reader.load(tmp_path / "a.h5", "x"), values)


def test_hdf5_does_not_leave_the_file(tmp_path, reader):
    secret = tmp_path / "secret.h5"
    with h5py.File(secret, "w") as f:
        f["x"] = np.full(8, 42.0)
    raw = tmp_path / "secret.bin"
    raw.write_bytes(b"\x2a" * 64)
    layout = h5py.VirtualLayout((8,), "f8")
    layout[:] = h5py.VirtualSource(str(secret), "x", (8,))
    with h5py.File(tmp_path / "a.h5", "w") as f:
        f["external"] = h5py.ExternalLink(str(secret), "/x")
        f["soft"] = h5py.SoftLink("/real")
        f["real"] = np.ones(8)
        f["folder"] = h5py.SoftLink("/")
        f.create_virtual_dataset("virtual", layout)
        f.create_dataset("elsewhere", (8,), "f8", external=[(str(raw), 0, 64)])
    for name in ("external", "soft", "folder/real"):
        refused(reader, tmp_path / "a.h5", name, "is a link")
    refused(reader, tmp_path / "a.h5", "virtual", "virtual dataset")
    refused(reader, tmp_path / "a.h5", "elsewhere", "other files")
    kinds = {name: item["kind"] for name, item in reader.tree(tmp_path / "a.h5").items()}
    assert kinds["external"] == "external link" and kinds["soft"] == kinds["folder"] == "soft link"


def test_hdf5_lies(tmp_path, reader):
    with h5py.File(tmp_path / "a.h5", "w") as f:
        f.create_dataset("huge", (1 << 20, 1 << 20), "f4", chunks=(64, 64), compression="gzip")
        f.create_dataset("unwritten", (1 << 10, 1 << 10), "f4")
        f["objects"] = np.array([b"abc"] * 3)
        f["compound"] = np.zeros(3, [("a", "f4")])
        f["complex"] = np.full(3, 1 + 2j, np.complex64)
        f["none"] = np.zeros((3, 0))
        f["null"] = h5py.Empty("f4")
        f.create_dataset("scaled", data=np.zeros((64, 64), np.int32), chunks=(64, 64), scaleoffset=2)
        f.create_dataset("chunky", (20, 4096, 4096), "f4", chunks=(5, 4096, 4096), compression="gzip")
        f["chunky"][0, 0, 0] = 1
    for name, match in (
        ("huge", "over 1000 times|stores 0"),
        ("unwritten", "stores 0 bytes"),
        ("compound", "type"),
        ("none", "positive"),
        ("null", "positive|size"),
        ("scaled", "filter 6"),
        ("chunky", "chunks|over 1000"),
    ):
        refused(reader, tmp_path / "a.h5", name, match)
    assert reader.load(tmp_path / "a.h5", "complex").tolist() == [1 + 2j] * 3  # k-space is


def test_hdf5_reader_survives_what_the_library_does_not(tmp_path, reader):
    """A reader that dies or loops gives one sentence, and the next file is read by another."""
    with h5py.File(tmp_path / "a.h5", "w") as f:
        f["x"] = np.ones(4)
    reader.tree(tmp_path / "a.h5")
    reader._process.kill()
    reader._process.wait()
    assert reader.load(tmp_path / "a.h5", "x").sum() == 4
    # as if the library had crashed in the middle of a request
    reader._process.send_signal(signal.SIGSTOP)
    os.kill(reader._process.pid, signal.SIGSEGV)
    os.kill(reader._process.pid, signal.SIGCONT)
    with pytest.raises(BadInput, match="crash or loop"):
        reader.load(tmp_path / "a.h5", "x")
    assert reader.load(tmp_path / "a.h5", "x").sum() == 4


def test_hdf5_endless_loop_is_ended():
    """Processor time of the reader is limited by the system, so even a loop inside the library ends."""
    code = "import sys; sys.path.insert(0, sys.argv[1]); import hdf5_child as c; c._limit(0.5)\nwhile True: pass"
    folder = str(Path(hdf5_child.__file__).parent)
    done = subprocess.run([sys.executable, "-P", "-c", code, folder], timeout=120, check=False)
    assert done.returncode < 0


# ---- npz ------------------------------------------------------------------------------------------------------------


def test_npz(tmp_path):
    values = np.asfortranarray(np.arange(12.0).reshape(3, 4))
    np.savez_compressed(tmp_path / "a.npz", a=values, b=np.arange(3), other=np.array([object()], dtype=object))
    got = load_npz(tmp_path / "a.npz", {"a", "b", "c"})  # the object array is not touched
    assert sorted(got) == ["a", "b"] and np.array_equal(got["a"], values)
    with pytest.raises(BadInput, match="never Python objects"):
        load_npz(tmp_path / "a.npz", {"other"})
    with pytest.raises(BadInput, match="budget"):
        load_npz(tmp_path / "a.npz", {"a"}, Limits(budget_bytes=10))
    np.savez_compressed(tmp_path / "b.npz", a=np.zeros((3000, 3000)))
    with pytest.raises(BadInput, match="over 100 times"):
        load_npz(tmp_path / "b.npz", {"a"}, Limits(ratio=100))
    np.savez(tmp_path / "c.npz", **{f"x{k}": np.zeros(1) for k in range(65)})
    with pytest.raises(BadInput, match="65 members"):
        load_npz(tmp_path / "c.npz", {"x1"})

"""Damaged and hostile files, a hundred per reader, each read in a process with one GiB to spare.

As a module it makes the files; as a script (`python malformed.py READERS COUNT [FIRST]`) it reads them under a limit of
memory and time and prints what happened as JSON. Everything follows from a seed, so a failure can be repeated by its
number.
"""

from __future__ import annotations

import functools
import gzip
import hashlib
import io
import json
import random
import resource
import signal
import struct
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

SPARE_BYTES = 1 << 30
SLOWEST_S = 10.0

Make = Callable[[random.Random, bytes, Path], bytes]


# ---- damage that any bytes can take ------------------------------------------------------------------------------


def truncated(r, data, _):
    return data[: r.randrange(len(data))]


def flipped(r, data, _):
    out = bytearray(data)
    for _ in range(r.choice((1, 2, 8, 64))):
        out[r.randrange(len(out))] ^= 1 << r.randrange(8)
    return bytes(out)


def flipped_at_the_start(r, data, _):
    out = bytearray(data)
    for _ in range(r.choice((1, 2, 8))):
        out[r.randrange(min(len(out), 600))] ^= 1 << r.randrange(8)
    return bytes(out)


def extreme(r, data, _):
    """Four or eight bytes become the largest, smallest, zero or NaN."""
    out = bytearray(data)
    word = r.choice(
        (b"\xff" * 4, b"\xff\xff\xff\x7f", b"\0\0\0\x80", b"\0" * 4, b"\xff" * 8, struct.pack("<f", float("nan")))
    )
    at = r.randrange(max(1, min(len(out), r.choice((600, len(out)))) - len(word)))
    out[at : at + len(word)] = word
    return bytes(out)


def blanked(r, data, _):
    at, size = r.randrange(len(data)), r.choice((16, 256, 4096))
    return data[:at] + b"\0" * len(data[at : at + size]) + data[at + size :]


def repeated(r, data, _):
    at, size = r.randrange(len(data)), r.choice((16, 256, 4096))
    return data[:at] + data[at : at + size] * r.choice((2, 50)) + data[at + size :]


def garbage(r, data, _):
    return r.randbytes(r.choice((1, 7, 300, 5000))) if r.random() < 0.5 else data[:8] + r.randbytes(3000)


GENERIC: list[Make] = [
    truncated,
    flipped,
    flipped_at_the_start,
    flipped_at_the_start,
    extreme,
    extreme,
    blanked,
    repeated,
    garbage,
]


# ---- NIfTI --------------------------------------------------------------------------------------------------------

NIFTI_FIELDS = [
    (40, "<8h"),
    (70, "<h"),
    (72, "<h"),
    (76, "<8f"),
    (108, "<f"),
    (112, "<2f"),
    (252, "<2h"),
    (256, "<6f"),
    (280, "<12f"),
    (344, "4s"),
    (0, "<i"),
    (123, "B"),
]


def nifti(_: Path) -> bytes:
    import nibabel as nib

    values = np.random.default_rng(0).integers(-1000, 1000, (12, 11, 10)).astype(np.int16)
    return nib.Nifti1Image(
        values, np.array([[-1, 0.1, 0, 5], [0, -1.5, 0, 7], [0, 0, 2, -3], [0, 0, 0, 1.0]])
    ).to_bytes()


def nifti_lie(r, data, _):
    out = bytearray(data)
    offset, form = r.choice(NIFTI_FIELDS)
    count = struct.calcsize(form) // struct.calcsize(form[-1])
    if form == "4s":
        struct.pack_into(form, out, offset, r.randbytes(4))
        return bytes(out)
    wild = {
        "h": (0, -1, 1, 2, 3, 7, 8, 16, 64, 512, 1000, 20000, 32767, -32768),
        "f": (0.0, -1.0, 1e-30, 1e30, float("nan"), float("inf"), 1e9, 348.0, 352.5),
        "i": (0, -1, 2**31 - 1, 540, 1543569408),
        "B": (0, 1, 3, 255),
    }[form[-1]]
    values = list(struct.unpack_from(form, out, offset))
    for k in range(count):
        if r.random() < 0.5:
            values[k] = r.choice(wild)
    struct.pack_into(form, out, offset, *values)
    return bytes(out)


def nifti_dims(r, data, _):
    out = bytearray(data)
    struct.pack_into("<4h", out, 40, 3, *(r.choice((1, 11, 500, 5000, 32767)) for _ in range(3)))
    if r.random() < 0.5:
        struct.pack_into("<h", out, 70, r.choice((2, 16, 64, 1024)))
    return bytes(out)


def packed(make: Make) -> Make:
    """The damage first, then gzip."""

    def packed_make(r, data, folder):
        return gzip.compress(make(r, gzip.decompress(data), folder), 6, mtime=0)

    packed_make.__name__ = f"packed_{make.__name__}"
    return packed_make


@functools.cache
def _zeros() -> bytes:
    return gzip.compress(bytes(64 << 20), 6, mtime=0)


def gzip_bomb(r, data, _):
    zeros = _zeros()
    kind = r.randrange(3)
    if kind == 0:  # a good image, then a bomb
        return data + zeros * 4
    head = bytearray(gzip.decompress(data)[:352])
    struct.pack_into("<4h", head, 40, 3, *((400, 400, 100) if kind == 1 else (32767, 32767, 32767)))
    struct.pack_into("<h", head, 70, 2)
    struct.pack_into("<h", head, 72, 8)
    return gzip.compress(bytes(head), 6, mtime=0) + zeros * 4


# ---- HDF5 ---------------------------------------------------------------------------------------------------------


def exchange(folder: Path) -> bytes:
    import h5py

    path = folder / "seed.h5"
    rng = np.random.default_rng(0)
    with h5py.File(path, "w") as f:
        f["exchange/data"] = (1000 + 9000 * np.exp(-rng.random((24, 2, 30)))).astype(np.float32)
        f["exchange/data_white"] = np.full((3, 2, 30), 10000, np.float32)
        f["exchange/data_dark"] = np.full((3, 2, 30), 1000, np.float32)
        f["exchange/theta"] = np.arange(24) * 7.5
        f["exchange/theta"].attrs["units"] = "degrees"
    return _taken(path)


def layout(folder: Path) -> bytes:
    from recon3d.io import write_measurement

    path = folder / "seed.h5"
    write_measurement(path, _measurement())
    return _taken(path)


def _measurement():
    import torch

    from recon3d.geometry import ParallelBeam, VolumeGrid, equiangular
    from recon3d.io import Measurement

    sinogram = torch.rand(3, 24, 30, generator=torch.Generator().manual_seed(0))
    grid = VolumeGrid((3, 20, 20), (2, 1, 1))
    return Measurement(sinogram, ParallelBeam(equiangular(24), 30, 1.0), grid, 1e4, "recon3d", sinogram + 1)


def _taken(path: Path) -> bytes:
    data = path.read_bytes()
    path.unlink()
    return data


def hdf5_trick(r, data, folder):
    """A well-formed file that asks for something it should not get."""
    import h5py

    path = folder / "trick.h5"
    path.write_bytes(data)
    with h5py.File(path, "r+") as f:
        names = [n for n in ("exchange/data", "exchange/data_white", "exchange/theta", "sinogram", "weights") if n in f]
        name = r.choice(names)
        values = f[name][()]
        trick = r.randrange(16)
        if trick != 15:
            del f[name]
        if trick == 0:
            f[name] = h5py.ExternalLink("/etc/hostname", "/data")
        elif trick == 1:
            f[name] = h5py.SoftLink("/" + name)  # to itself
        elif trick == 2:
            f.create_dataset(name, values.shape, values.dtype, external=[("/etc/passwd", 0, h5py.h5f.UNLIMITED)])
        elif trick == 3:
            layout = h5py.VirtualLayout(values.shape, values.dtype)
            layout[:] = h5py.VirtualSource("/etc/other.h5", "x", values.shape)
            f.create_virtual_dataset(name, layout)
        elif trick == 4:
            f.create_dataset(name, (1 << 20, 1 << 20, 1 << 10), np.float32, chunks=(1, 64, 64), compression="gzip")
        elif trick == 5:
            f.create_dataset(name, (4, 1 << 14, 1 << 14), np.float32, chunks=(4, 1 << 10, 1 << 10), compression="gzip")[
                0, 0, 0
            ] = 1
        elif trick == 6:
            bad = values.astype(np.float32)
            bad.reshape(-1)[r.randrange(bad.size)] = r.choice((np.nan, np.inf, -np.inf))
            f[name] = bad
        elif trick == 7:
            f[name] = np.array([b"x" * 50] * 4)
        elif trick == 8:
            f.create_dataset(name, (3,), h5py.string_dtype())[0] = "vlen"
        elif trick == 9:
            f[name] = np.zeros(4, [("a", "f4"), ("b", "i8")])
        elif trick == 10:
            f[name] = values[..., :0]
        elif trick == 11:
            f[name] = values[:-1]
        elif trick == 12:
            f.create_group(name)
        elif trick == 13:
            inner = f
            for _ in range(400):
                inner = inner.create_group("g")
        elif trick == 14:
            f[name] = values.astype(np.complex64)
        else:
            f[name].attrs["unit"] = f[name].attrs["units"] = r.choice(("furlong", 3.0, np.arange(4000)))
            if "geometry" in f:
                f["geometry"].attrs[r.choice(("type", "angles_rad", "detector_spacing_mm"))] = r.choice(
                    ("x", -1.0, np.nan, np.full(24, 1e300), np.zeros((0,)))
                )
                f["grid"].attrs[r.choice(("shape", "spacing_mm"))] = r.choice((np.zeros(3), np.full(3, 2**60), "x"))
    return _taken(path)


# ---- npz ----------------------------------------------------------------------------------------------------------


def npz(folder: Path) -> bytes:
    from recon3d.io import write_measurement

    path = folder / "seed.npz"
    write_measurement(path, _measurement())
    return _taken(path)


class _Boom:
    def __reduce__(self):
        return (Path.touch, (Path("canary"),))


def npz_trick(r, data, _):
    with zipfile.ZipFile(io.BytesIO(data)) as old:
        members = {i.filename: old.read(i) for i in old.infolist()}
    name = r.choice(("sinogram.npy", "angles_rad.npy", "detector_spacing_mm.npy", "type.npy"))
    trick = r.randrange(9)
    if trick == 0:
        with io.BytesIO() as file:
            np.save(file, np.array([_Boom()], dtype=object))
            members[name] = file.getvalue()
    elif trick == 1:
        shape = r.choice(
            ("(1099511627776,)", "(-1,)", "(3, 24, 31)", "(0,)", "(99999, 99999, 99999)", "()", "'x'", "(1e9,)")
        )
        head = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
        members[name] = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(head)) + head.encode() + members[name][-200:]
    elif trick == 2:
        head = "__import__('pathlib').Path('canary').touch()".ljust(117) + "\n"
        members[name] = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(head)) + head.encode()
    elif trick == 3:
        members[name] = members[name][: r.randrange(len(members[name]))]
    elif trick == 4:
        members["../../canary.npy"] = members.pop(name)
    elif trick == 5:
        members[name] = flipped_at_the_start(r, members[name], _)
    elif trick == 6:
        members |= {f"x{k}.npy": b"" for k in range(100)}
    elif trick == 7:
        head = (
            b"\x93NUMPY\x01\x00v\x00"
            + b"{'descr': '<f4', 'fortran_order': False, 'shape': (3, 800, 1000), }".ljust(117)
            + b"\n"
        )
        members[name] = head + bytes(3 * 800 * 1000 * 4)
    else:
        members[name] = extreme(r, members[name], _)
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as new:
        for key, content in members.items():
            new.writestr(zipfile.ZipInfo(key), content, zipfile.ZIP_DEFLATED)
    return out.getvalue()


# ---- YAML and priors ----------------------------------------------------------------------------------------------


def config(_: Path) -> bytes:
    from recon3d.config import JobConfig, save_config

    return save_config(JobConfig()).encode()


def yaml_trick(r, data, _):
    return data + r.choice(
        (
            b"\nx: !!python/object/apply:pathlib.Path.touch [canary]\n",
            b"\nx: !!python/name:os.system\n",
            b"\na: &a [x, x, x]\nb: &b [*a, *a, *a]\nc: [*b, *b, *b]\n",
            b"\nseed: " + b"9" * 5000 + b"\n",
            b"\nseed: .nan\n",
            b"\n" + b"[" * 20000,
            b"\n? " * 3000,
            b"\nunknown_key: 1\n",
            b"\nseed: 1\nseed: 2\n",
            b"\xff\xfe\x00",
            b"\ninput: 3\n",
            b"\n" + b"k: v\n" * 300000,
        )
    )


def prior(_: Path) -> bytes:
    """Card and weights of a tiny network in one blob: length of the card, card, weights."""
    from safetensors.torch import save

    from recon3d.priors.networks import UNet, UNetConfig

    net = UNet(UNetConfig(**TINY_UNET))
    weights = save({k: v.half() for k, v in net.state_dict().items()})
    card = json.loads((Path(__import__("recon3d").__file__).parent / "priors/packaged/ct/card.json").read_text())
    card["architecture"] = {"family": "unet", **TINY_UNET}
    card["sha256"] = hashlib.sha256(weights).hexdigest()
    text = json.dumps(card).encode()
    return struct.pack("<I", len(text)) + text + weights


TINY_UNET = {"channels": [8, 16], "blocks": 1, "embedding": 8, "group_size": 8}


def prior_damage(r, data, _):
    """Damage to card or weights; the digest is often made to agree, as an attacker would."""
    size = struct.unpack_from("<I", data)[0]
    text, weights = data[4 : 4 + size], data[4 + size :]
    make = r.choice(GENERIC)
    if r.random() < 0.5:
        weights = make(r, weights, _)
        if r.random() < 0.8:
            card = json.loads(text)
            card["sha256"] = hashlib.sha256(weights).hexdigest()
            text = json.dumps(card).encode()
    elif r.random() < 0.5:
        text = make(r, text, _)
    else:
        card = json.loads(text)
        part = r.choice([card, card["architecture"]])
        part[r.choice(list(part))] = r.choice((None, -1, 10**12, 1e300, "x", [], {}, [10**9] * 3, float("nan")))
        text = json.dumps(card).encode()
    return struct.pack("<I", len(text)) + text + weights


# ---- readers ------------------------------------------------------------------------------------------------------


def read_volume(path: Path):
    from recon3d.io import read_nifti

    volume, grid = read_nifti(path)
    assert tuple(volume.shape) == grid.shape and bool(volume.isfinite().all())
    return volume.numpy().tobytes()


def read_sinogram(path: Path):
    from recon3d.io import read_measurement

    m = read_measurement(path, detector_spacing_mm=1.0)
    assert m.sinogram.ndim == 3 and m.sinogram.shape[1:] == (m.geometry.n_views, m.geometry.n_detector)
    assert bool(m.sinogram.isfinite().all())
    assert m.weights is None or (m.weights.shape == m.sinogram.shape and bool((m.weights >= 0).all()))
    assert m.grid is None or m.grid.shape[0] == m.sinogram.shape[0]
    return m.sinogram.numpy().tobytes()


def read_config(path: Path):
    from recon3d.config import JobConfig, load_config

    assert isinstance(load_config(path), JobConfig)


def read_prior(path: Path):
    from recon3d.priors import load_prior

    data = path.read_bytes()
    folder = path.with_suffix("")
    folder.mkdir(exist_ok=True)
    size = struct.unpack_from("<I", data)[0]
    (folder / "card.json").write_bytes(data[4 : 4 + size])
    (folder / "model.safetensors").write_bytes(data[4 + size :])
    try:
        load_prior(folder)
    finally:
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()


GZIPPED = [packed(nifti_lie), packed(nifti_dims), packed(flipped_at_the_start), packed(truncated), gzip_bomb]
# by name: suffix, an undamaged file, kinds of damage, and what reads it
READERS = {
    "nii": (".nii", nifti, [*GENERIC, nifti_lie, nifti_lie, nifti_lie, nifti_dims], read_volume),
    "nii.gz": (".nii.gz", lambda f: gzip.compress(nifti(f), 6, mtime=0), [*GENERIC, *GZIPPED], read_volume),
    "exchange": (".h5", exchange, [*GENERIC, *[hdf5_trick] * 7], read_sinogram),
    "layout": (".h5", layout, [*GENERIC, *[hdf5_trick] * 7], read_sinogram),
    "npz": (".npz", npz, [*GENERIC, *[npz_trick] * 7], read_sinogram),
    "yaml": (".yaml", config, [*GENERIC, *[yaml_trick] * 7], read_config),
    "prior": (".prior", prior, [prior_damage], read_prior),
}


def run(reader: str, count: int, folder: Path, first: int = 0) -> dict:
    """Reads `count` damaged files; returns counts, failures by number, and the memory that was needed."""
    from recon3d.io import BadInput

    accepted: tuple[type[Exception], ...] = (BadInput,)
    if reader == "yaml":
        from recon3d.config import ConfigError

        accepted = (BadInput, ConfigError)
    if reader in ("exchange", "layout"):
        _share_the_process()
    suffix, seed, damage, read = READERS[reader]
    good = seed(folder)
    path = folder / f"case{suffix}"
    path.write_bytes(good)
    truth = read(path)

    def out_of_time(*_):
        raise TimeoutError(f"longer than {SLOWEST_S} s")

    signal.signal(signal.SIGALRM, out_of_time)
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + SPARE_BYTES, resource.RLIM_INFINITY))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    result: dict = {"refused": 0, "read": 0, "failures": [], "slowest_s": 0.0}
    for number in range(first, first + count):
        r = random.Random(f"{reader} {number}")
        make = damage[number % len(damage)]
        data = make(r, good, folder)
        path.write_bytes(data)
        what = f"{reader} {number} ({make.__name__})"
        start = time.process_time()
        signal.alarm(int(12 * SLOWEST_S))  # wall time, on a machine that may be busy
        try:
            got = read(path)
            result["read"] += 1
            if reader == "nii.gz" and make in GENERIC and make is not garbage and got != truth and data != good:
                result["failures"].append(f"{what}: damage behind a checksum went unnoticed")
        except accepted as error:
            result["refused"] += 1
            text = str(error)
            if "\n" in text or len(text) > 600 or not text.strip():
                result["failures"].append(f"{what}: not one sentence: {text[:300]}")
        except BaseException as error:
            result["failures"].append(f"{what}: {type(error).__name__}: {str(error)[:300]}")
        finally:
            signal.alarm(0)
        spent = time.process_time() - start
        result["slowest_s"] = max(result["slowest_s"], spent)
        if spent > SLOWEST_S:
            result["failures"].append(f"{what}: took {spent:.1f} s")
        path.unlink(missing_ok=True)
        left = [p.name for p in folder.iterdir()]
        if left:
            result["failures"].append(f"{what}: left {left}")
            for name in left:
                (folder / name).unlink()
    result["extra_mib"] = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    return result


def _share_the_process() -> None:
    """One HDF5 process for all files, started again after a crash, instead of one a file."""
    import recon3d.io.read as module
    from recon3d.io.hdf5 import HDF5Reader

    shared = HDF5Reader()

    class Shared:
        def __enter__(self):
            return shared

        def __exit__(self, *_):
            return None

    module.HDF5Reader = Shared


if __name__ == "__main__":
    print(
        json.dumps(
            {
                name: run(name, int(sys.argv[2]), Path.cwd(), int(sys.argv[3]) if len(sys.argv) > 3 else 0)
                for name in sys.argv[1].split(",")
            }
        )
    )

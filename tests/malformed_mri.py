"""Damaged and hostile k-space files, a hundred per reader; run as `python malformed_mri.py READERS COUNT [FIRST]`.

The damage that any bytes can take, the limits and the bookkeeping are those of malformed.py.
"""

from __future__ import annotations

import json
import struct
import sys
from pathlib import Path

import malformed
import numpy as np
from malformed import GENERIC, _taken
from mri_files import Acquisitions, Twix, ismrmrd_header, write_cfl

WILD = (0, 1, 2, 3, 255, 65535, 32768, 24, 20)
TEXTS = (
    "<a>" * 3000,
    "<!DOCTYPE x [<!ENTITY a 'aaaaaaaaaa'><!ENTITY b '&a;&a;&a;&a;&a;&a;'>]><ismrmrdHeader>&b;</ismrmrdHeader>",
    "<!DOCTYPE x SYSTEM 'file:///etc/hostname'><ismrmrdHeader/>",
    "<ismrmrdHeader>" + "<encoding/>" * 9 + "</ismrmrdHeader>",
    "<ismrmrdHeader " + " ".join(f"a{k}='1'" for k in range(3000)) + "/>",
    "\x01\x02",
    "",
    "x" * 100_000,
    ismrmrd_header(encoded=(0, 0, 0)),
    ismrmrd_header(encoded=(65536, 65536, 65536)),
    ismrmrd_header(encoded=(65536, 65536, 1), centres=(0, 0)),
    ismrmrd_header(fov=("1e308", "-1", "nan")),
    ismrmrd_header(fov=("inf", "1", "1")),
    ismrmrd_header(recon_fov=("1e-300", 1, 1)),
    ismrmrd_header(centres=(65535, 65535)),
    ismrmrd_header(centres=(-1, 10**30)),
    ismrmrd_header(kind="spiral"),
    ismrmrd_header(kind="&lt;x&gt;\n\n"),
    ismrmrd_header(recon=(1, 1, 1), recon_fov=(0, 0, 0)),
)


def noise(*shape):
    r = np.random.default_rng(0)
    return (r.normal(size=shape) + 1j * r.normal(size=shape)).astype(np.complex64)


# ---- fastMRI and recon3d's layout ----------------------------------------------------------------------------------


def fastmri(folder):
    import h5py

    path = folder / "seed.h5"
    mask = np.arange(20) % 2
    with h5py.File(path, "w") as f:
        f["kspace"] = noise(3, 2, 24, 20) * mask
        f["mask"], f["ismrmrd_header"] = mask, ismrmrd_header()
    return _taken(path)


def kspace_layout(folder):
    import torch

    from recon3d.geometry import Trajectory, VolumeGrid
    from recon3d.io import KSpace, write_kspace_hdf5

    path = folder / "seed.h5"
    points = [Trajectory(np.random.default_rng(k).random((4, 5, 2)) - 0.5, (8, 6), "cycles") for k in range(3)]
    k = KSpace(
        torch.from_numpy(noise(3, 2, 20)),
        None,
        tuple(points),
        VolumeGrid((3, 8, 6), (2.0, 1.0, 1.0)),
        torch.from_numpy(noise(3, 2, 8, 6)),
        torch.from_numpy(noise(2, 2)),
    )
    write_kspace_hdf5(path, k)
    return _taken(path)


def hdf5_trick(r, data, folder):
    """A well-formed file that asks for something it should not get."""
    import h5py

    path = folder / "trick.h5"
    path.write_bytes(data)
    with h5py.File(path, "r+") as f:
        here = [n for n in ("kspace", "kspace", "mask", "trajectory", "maps", "noise_covariance") if n in f]
        name = r.choice(here)
        values = f[name][()]
        trick = r.randrange(16)
        if trick < 13:
            del f[name]
        if trick == 0:
            f[name] = h5py.ExternalLink("/etc/hostname", "/data")
        elif trick == 1:
            f[name] = h5py.SoftLink("/" + name)
        elif trick == 2:
            f.create_dataset(name, values.shape, values.dtype, external=[("/etc/passwd", 0, h5py.h5f.UNLIMITED)])
        elif trick == 3:
            f.create_dataset(name, (1 << 20, 64, 1 << 15, 64), "c8", chunks=(1, 1, 64, 64), compression="gzip")
        elif trick == 4:
            f.create_dataset(name, (4, 8, 1 << 12, 1 << 12), "c8", chunks=(1, 1, 1 << 12, 1 << 12), compression="gzip")[
                0, 0, 0, 0
            ] = 1
        elif trick == 5:
            bad = values.astype(np.complex128 if np.iscomplexobj(values) else np.float64)
            bad.reshape(-1)[r.randrange(bad.size)] = r.choice((np.nan, np.inf, 1e300))
            f[name] = bad
        elif trick == 6:
            f[name] = values * 0
        elif trick == 7:
            f[name] = r.choice((b"text", np.array([b"x" * 50] * 4), np.zeros(4, [("r", "f4"), ("i", "i8")])))
        elif trick == 8:
            f[name] = values[..., :0]
        elif trick == 9:
            f[name] = values[..., :-1] if values.ndim else values
        elif trick == 10:
            f[name] = values.T if r.random() < 0.5 else values[None]
        elif trick == 11:
            f.create_group(name)
        elif trick == 12:
            f[name] = values.real.astype(r.choice(("f4", "i2", "u8"))) * r.choice((1, 1000))
        elif trick == 13 and "ismrmrd_header" in f:
            del f["ismrmrd_header"]
            f["ismrmrd_header"] = r.choice((3.0, np.arange(4), "x", "", b"\xff\xfe"))
        elif "ismrmrd_header" in f:
            del f["ismrmrd_header"]
            f["ismrmrd_header"] = r.choice(TEXTS)
        elif trick == 14:
            f["trajectory"].attrs["unit"] = r.choice(("furlong", 3.0, np.arange(4000), "index", "cycles"))
        else:
            f["grid"].attrs[r.choice(("shape", "spacing_mm", "affine"))] = r.choice(
                (np.zeros(3), np.full(3, 2**60), "x", np.full((4, 4), np.nan), np.array([3, -1, 6]), 1e300)
            )
    return _taken(path)


# ---- ISMRMRD -------------------------------------------------------------------------------------------------------


def ismrmrd(folder):
    return _acquisitions(folder, lambda a: None, ismrmrd_header())


def _acquisitions(folder, change, xml):
    path = folder / "seed.h5"
    a = Acquisitions()
    lines = noise(2, 2, 6, 24)
    eye = np.eye(3)
    for k in range(2):
        for line in range(6):
            a.add(lines[k, :, line], position=eye[2] * k * 5, directions=eye, slice=k, kspace_encode_step_1=line)
    a.add(noise(2, 24), flags=[19])
    change(a)
    a.write(path, xml)
    return _taken(path)


FIELDS = (
    *("number_of_samples", "active_channels", "discard_pre", "discard_post", "center_sample", "trajectory_dimensions"),
    *("position", "read_dir", "slice_dir", "sample_time_us", "flags", "encoding_space_ref"),
    *("kspace_encode_step_1", "kspace_encode_step_2", "slice", "contrast", "average", "repetition"),
)


def lying_headers(r, data, folder):
    """Headers that lie about one acquisition or all, or lists of another length than they say."""
    name, every, value = r.choice(FIELDS), r.random() < 0.5, r.choice(WILD)
    trick = r.randrange(4)

    def change(a):
        rows = range(len(a.heads)) if every else [r.randrange(len(a.heads))]
        for k in rows:
            if trick == 0:
                a.data[k] = a.data[k][: r.randrange(a.data[k].size)]
            elif trick == 1 and r.random() < 0.5:
                a.data[k][r.randrange(a.data[k].size)] = r.choice((np.nan, np.inf, 1e38))
            elif name in a.heads[k].dtype.names:
                kind = a.heads[k].dtype[name].base.kind
                a.heads[k][name] = r.choice((np.nan, np.inf, 1e30, 0.0)) if kind == "f" else value
            else:
                a.heads[k]["idx"][name] = value

    return _acquisitions(folder, change, ismrmrd_header())


def header_text(r, data, folder):
    return _acquisitions(folder, lambda a: None, r.choice(TEXTS))


def compound(r, data, folder):
    """A dataset that is not the list of acquisitions it should be."""
    import h5py

    path = folder / "trick.h5"
    path.write_bytes(data)
    with h5py.File(path, "r+") as f:
        g = f["dataset"]
        table = g["data"][()]
        name = r.choice(("data", "data", "xml"))
        del g[name]
        trick = r.randrange(8)
        if trick == 0:
            g[name] = np.zeros(5, [("head", "f4"), ("data", "f4"), ("traj", "f4")])
        elif trick == 1:
            g[name] = table["head"]
        elif trick == 2:
            g[name] = h5py.SoftLink("/dataset/" + name)
        elif trick == 3:
            g[name] = h5py.ExternalLink("/etc/hostname", "/x")
        elif trick == 4:
            g.create_dataset(name, (10**9,), table.dtype, chunks=(1,))
        elif trick == 5:
            g.create_dataset(name, (0,), table.dtype, maxshape=(None,))
        elif trick == 6:
            g.create_dataset(name, (3, 3), h5py.string_dtype())
        else:
            g[name] = np.zeros(3, [("head", table.dtype["head"]), ("traj", "f4", (2,)), ("data", "S8")])
    return _taken(path)


# ---- BART and Siemens ----------------------------------------------------------------------------------------------


def cfl(folder):
    """Header and data in one blob: length of the header, header, data."""
    path = write_cfl(folder / "seed", noise(3, 2, 20, 24), (24, 20, 1, 2, *[1] * 9, 3))
    data = _taken(path)
    header = _taken(path.with_suffix(".hdr"))
    return struct.pack("<I", len(header)) + header + data


def cfl_damage(r, data, folder):
    size = struct.unpack_from("<I", data)[0]
    header, body = data[4 : 4 + size], data[4 + size :]
    trick = r.randrange(4)
    if trick == 0:
        header = r.choice(GENERIC)(r, header, folder)
    elif trick == 1:
        body = r.choice(GENERIC)(r, body, folder)
    elif trick == 2:
        dims = [r.choice((1, 1, 1, 2, 3, 24, 20, 0, -5, 10**9, 10**18)) for _ in range(r.choice((3, 16, 17)))]
        header = ("# Dimensions\n" + " ".join(map(str, dims)) + "\n").encode()
    else:  # the same count of samples, other axes
        dims = [24, 20, 2, 3] + [1] * 12
        r.shuffle(dims)
        header = ("# Dimensions\n" + " ".join(map(str, dims)) + "\n").encode()
    return struct.pack("<I", len(header)) + header + body


def twix(folder):
    t = Twix()
    lines, eye = noise(3, 2, 20, 24), np.eye(3)[[1, 0, 2]]
    t.add(noise(2, 256), flags=(25,))
    for k in range(3):
        for line in range(20):
            t.add(lines[k, :, line], line=line, sli=k, position=eye[2] * k * 5, directions=eye)
    return _taken(t.write(folder / "seed.dat"))


def twix_lie(r, data, _):
    """A header of the file, of a line, or a setting of the protocol becomes something else."""
    out = bytearray(data)
    trick = r.randrange(3)
    if trick == 0:
        at = r.choice((0, 4, 16, 20, 24, 28, 10240, 10244, 10257))
        struct.pack_into("<I", out, at, r.choice((0, 1, 2, 63, 64, 10**6, 2**31, 2**32 - 1, 10240)))
    elif trick == 1:
        start = len(out) - 192 - r.randrange(1, 58) * (192 + 2 * (32 + 8 * 24))
        offset, form = r.choice(((0, "I"), (40, "Q"), (48, "H"), (50, "H"), (52, "H"), (56, "H"), (80, "H"), (84, "H"),
                                 (96, "H"), (100, "f"), (112, "f"), (116, "f")))  # fmt: skip
        value = r.choice((float("nan"), 1e30, 0.0)) if form == "f" else r.choice(WILD)
        if form == "Q":
            value = 1 << r.randrange(60)
        struct.pack_into("<" + form, out, start + offset, value)
    else:
        for name in r.sample((b"lBaseResolution", b"lPhaseEncodingLines", b"ucDimension", b"dThickness", b"dReadoutFOV",
                              b"ucTrajectory", b"alDwellTime[0]"), 2):  # fmt: skip
            at = out.find(name) + len(name) + 4
            end = out.find(b"\n", at)
            out[at:end] = r.choice((b"0", b"nan", b"-1", b"9" * 60, b"0x7", b"1e300", b"x", b"")).ljust(end - at)[
                : end - at
            ]
    return bytes(out)


# ---- readers -------------------------------------------------------------------------------------------------------


def read(path: Path):
    from recon3d.io import describe, read_kspace

    if path.suffix == ".pair":
        data = path.read_bytes()
        size = struct.unpack_from("<I", data)[0]
        pair = path.with_suffix(".hdr"), path.with_suffix(".cfl")
        try:
            pair[0].write_bytes(data[4 : 4 + size])
            pair[1].write_bytes(data[4 + size :])
            k, text = read_kspace(pair[0]), describe(pair[1])
        finally:
            for file in pair:
                file.unlink(missing_ok=True)
    else:
        k, text = read_kspace(path), describe(path)
    json.dumps(text, allow_nan=False)
    assert bool(k.data.real.isfinite().all()) and k.data.abs().max() > 0
    assert all("\n" not in note for note in k.notes)
    return k.data.numpy().tobytes()


READERS = {
    "fastmri": (".h5", fastmri, [*GENERIC, *[hdf5_trick] * 9], read),
    "kspace": (".h5", kspace_layout, [*GENERIC, *[hdf5_trick] * 9], read),
    "ismrmrd": (".h5", ismrmrd, [*GENERIC, *[lying_headers] * 6, header_text, header_text, compound, compound], read),
    "cfl": (".pair", cfl, [cfl_damage], read),
    "twix": (".dat", twix, [*GENERIC, *[twix_lie] * 9], read),
}


if __name__ == "__main__":
    malformed.READERS = READERS
    malformed._share_the_process()
    names, count, first = sys.argv[1].split(","), int(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else 0
    print(json.dumps({name: malformed.run(name, count, Path.cwd(), first) for name in names}))

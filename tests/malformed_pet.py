"""Damaged and hostile PET files, a hundred per reader; run as `python malformed_pet.py READERS COUNT [FIRST]`.

A pair of header and data travels as one blob: the length of the header, the header, the data. The damage that any bytes
can take, the limits and the bookkeeping are those of malformed.py.
"""

from __future__ import annotations

import json
import re
import shutil
import struct
import sys
from pathlib import Path

import malformed
import numpy as np
from malformed import GENERIC, _taken
from petsird_files import random_events, write_petsird

VALUES = (
    *("0", "-1", "1", "2", "3", "31", "999999999", "1e9", "1e-300", "nan", "inf", "", "{", "{}", "{1,2,3}", "{0,0}"),
    *(
        "x" * 5000,
        "../../etc/hostname",
        "/etc/hostname",
        "C:\\x",
        "\x01",
        "BIGENDIAN",
        "float",
        "unsigned integer",
        "ON",
    ),
    *("{" + "1," * 5000 + "1}", "99999999999999999999", "0x10", "mmr", "Siemens mMR", "-0.0", "'; rm x", "~"),
)


def blob(header: bytes, data: bytes) -> bytes:
    return struct.pack("<I", len(header)) + header + data


def apart(data: bytes) -> tuple[bytes, bytes]:
    size = min(struct.unpack_from("<I", data.ljust(4, b"\0"))[0], len(data))
    return data[4 : 4 + size], data[4 + size :]


def small():
    from recon3d.geometry import pet_geometry

    return pet_geometry("small", max_ring_difference=2, mashing=16, n_radial=9)


def interfile(folder):
    from recon3d.geometry import TOF, pet_geometry
    from recon3d.io import PETInfo, write_interfile

    geometry = pet_geometry("small", max_ring_difference=2, mashing=16, n_radial=9, tof=TOF(3, 60.0, 30.0))
    counts = np.random.default_rng(0).poisson(3, geometry.shape).astype(np.float32)
    info = PETInfo(duration_s=3.0, half_life_s=6586.2, isotope="F-18", scale=2.0, calibrated=True)
    write_interfile(folder / "p.hs", counts, geometry, info)
    return blob(_taken(folder / "p.hs"), _taken(folder / "p.s"))


def siemens(folder):
    planes = [16, 15, 15]
    prompts = np.random.default_rng(0).poisson(3, (sum(planes), 96, 5)).astype("<i2")
    header = (
        "!INTERFILE:=\n!originating system:=small\n%SMS-MI header name space:=sinogram subheader\n"
        "!name of data file:=p.s\n%compression:=off\nimage data byte order:=LITTLEENDIAN\n%patient orientation:=HFS\n"
        "!PET data type:=emission\ndata format:=sinogram\nnumber format:=signed integer\n"
        "!number of bytes per pixel:=2\nnumber of dimensions:=3\nmatrix axis label [1]:=bin\nmatrix size [1]:=5\n"
        "matrix size [2]:=96\nmatrix size [3]:=46\n%axial compression:=1\n%maximum ring difference:=1\n"
        "number of rings:=16\n%segment table:={16,15,15}\napplied corrections:=\nnumber of scan data types:=2\n"
        "scan data type description [1]:=prompts\nscan data type description [2]:=randoms\n"
        f"data offset in bytes [1]:=0\ndata offset in bytes [2]:={prompts.nbytes}\n!image duration (sec):=1140\n"
    )
    return blob(header.encode(), 2 * prompts.tobytes())


def image(folder):
    from recon3d.geometry import VolumeGrid
    from recon3d.io import write_interfile_image

    volume = np.random.default_rng(0).random((5, 6, 7)).astype(np.float32)
    write_interfile_image(folder / "p.hv", volume, VolumeGrid(volume.shape, (2.0, 1.5, 1.5)))
    return blob(_taken(folder / "p.hv"), _taken(folder / "p.v"))


def petlink(folder):
    rng = np.random.default_rng(0)
    words = rng.integers(0, 32 * 96 * 46, 4000).astype(np.uint32) | np.uint32(0x40000000)
    words[::50] = 0x80000000 + np.arange(80)
    words[5::500] = 0xA0000001
    header = (
        "!INTERFILE:=\n!originating system:=small\n%SMS-MI header name space:=PETLINK bin address\n"
        "name of data file:=p.s\ndata format:=CoincidenceList\nnumber of rings:=16\n"
        "%LM event and tag words format (bits):=32\n%axial compression:=1\n%maximum ring difference:=1\n"
        "%number of projections:=32\n%number of views:=96\n%total listmode word counts:=4000\n"
        "isotope gamma halflife (sec):=6586.2\n%study date (yyyy:mm:dd):=2017:03:27\n"
        "%study time (hh:mm:ss GMT+00:00):=17:00:35\n%tracer injection date (yyyy:mm:dd):=2017:03:27\n"
        "%tracer injection time (hh:mm:ss GMT+00:00):=16:07:00\nimage duration (sec):=900\n"
    )
    return blob(header.encode(), words.astype("<u4").tobytes())


def pair_damage(r, data, folder):
    header, body = apart(data)
    trick = r.randrange(6)
    if trick == 0:
        header = r.choice(GENERIC)(r, header, folder)
    elif trick == 1:
        body = r.choice(GENERIC)(r, body, folder)
    elif trick == 2:  # numbers in another order, or cut
        body = np.frombuffer(body[: len(body) // 4 * 4], "<u4").byteswap().tobytes()
    else:
        lines = header.decode("latin1").splitlines()
        for _ in range(r.choice((1, 1, 2, 5))):
            k = r.randrange(len(lines))
            key = lines[k].split(":=")[0]
            kind = r.randrange(4)
            if kind == 0:
                lines[k] = f"{key}:= {r.choice(VALUES)}"
            elif kind == 1:
                del lines[k]
            elif kind == 2:
                lines.insert(r.randrange(len(lines)), f"{key}:= {r.choice(VALUES)}")
            else:
                lines[k] = re.sub(
                    r"\d+", lambda m: str(r.choice((0, 1, 7, 10**6, 10**12, int(m[0][:9]) + 1))), lines[k]
                )
        header = "\n".join(lines).encode("latin1")
    return blob(header, body)


def petsird(folder):
    from recon3d.geometry import TOF, PETScanner

    device = PETScanner("camera", 4, 4.0, 40, 90.0, 10, 4, (9,), (), 20)
    events = random_events(device, 300, TOF(3, 60.0, 30.0))
    write_petsird(folder / "s.petsird", device, events, events[:40], TOF(3, 60.0, 30.0))
    return _taken(folder / "s.petsird")


def petsird_lie(r, data, _):
    """The schema, a count or a number of the scanner becomes something else."""
    out = bytearray(data)
    start = 9
    size, shift, at = 0, 0, start
    while True:
        size |= (out[at] & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if out[at - 1] < 0x80:
            break
    schema, rest = bytes(out[at : at + size]), out[at + size :]
    trick = r.randrange(5)
    if trick == 0:
        text = schema.decode()
        old, new = r.choice(
            (
                ("PETSIRD.CoincidenceEvent", "PETSIRD.SingleEvent"),
                ('"float32"', '"uint64"'),
                ('"length":8', '"length":' + str(10**18)),
                ('"length":2', '"length":0'),
                ('"uint32"', '"PETSIRD.Header"'),
                ("scanner", "skanner"),
                ('"vector"', '"map"'),
                ('"stream"', '"vector"'),
                ("PETSIRD.BinEdges", "PETSIRD.TimeBlock"),
                ('{"name":"DICOMUID","type":"string"}', '{"name":"DICOMUID","type":"PETSIRD.DICOMUID"}'),
            )
        )
        schema = text.replace(old, new, r.choice((1, 2, 99))).encode()
    elif trick == 1:
        schema = r.choice((b"[" * 100_000, b"{}", b"null", b'{"protocol":{"name":"X"},"types":[]}', b"\xff", b""))
    elif trick == 2:
        k = r.randrange(len(rest))
        rest[k : k + 1] = r.choice((b"\xff" * 9 + b"\x01", b"\xff\xff\xff\xff\x7f", b"\x00", b"\xff" * 30))
    elif trick == 3:
        k = r.randrange(0, len(rest) - 4)
        struct.pack_into("<f", rest, k, r.choice((float("nan"), float("inf"), 1e30, 0.0, -1.0)))
    else:
        k = r.randrange(len(rest))
        rest = rest[:k] + rest[r.randrange(len(rest)) :]
    head, n = bytearray(), len(schema)
    while n >= 0x80:
        head.append(n & 0x7F | 0x80)
        n >>= 7
    return bytes(out[:9]) + bytes([*head, n]) + schema + bytes(rest)


def dicom(folder):
    """Three slices, one after another, each behind its length."""
    import pydicom
    from pydicom.dataset import Dataset, FileMetaDataset

    out = b""
    for k in range(3):
        item = Dataset()
        item.file_meta = FileMetaDataset()
        item.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
        item.file_meta.MediaStorageSOPClassUID = item.SOPClassUID = "1.2.840.10008.5.1.4.1.1.128"
        item.file_meta.MediaStorageSOPInstanceUID = item.SOPInstanceUID = f"1.2.{k + 1}"
        item.SeriesInstanceUID, item.Modality, item.Units = "1.2.3", "PT", "BQML"
        item.Rows = item.Columns = 8
        item.SamplesPerPixel, item.PhotometricInterpretation = 1, "MONOCHROME2"
        item.BitsAllocated = item.BitsStored = 16
        item.HighBit, item.PixelRepresentation = 15, 1
        item.PixelSpacing, item.ImageOrientationPatient = [2.0, 2.0], [1, 0, 0, 0, 1, 0]
        item.ImagePositionPatient = [0, 0, 3.0 * k]
        item.RescaleSlope, item.RescaleIntercept = 1.5 + k, 0
        item.SeriesDate = item.AcquisitionDate = "20200101"
        item.SeriesTime, item.AcquisitionTime = "120000", "120500"
        item.PatientWeight, item.DecayCorrection, item.DecayFactor = 70, "START", 1.1
        item.ActualFrameDuration = 180000
        drug = Dataset()
        drug.RadionuclideTotalDose, drug.RadionuclideHalfLife = 3e8, 6586.2
        drug.RadiopharmaceuticalStartTime = "110000"
        item.RadiopharmaceuticalInformationSequence = [drug]
        item.PixelData = np.random.default_rng(k).integers(0, 3000, (8, 8)).astype("<i2").tobytes()
        item.save_as(folder / "s.dcm", enforce_file_format=True)
        data = _taken(folder / "s.dcm")
        out += struct.pack("<I", len(data)) + data
    return out


def slices(data: bytes) -> list[bytes]:
    out = []
    while len(data) > 4 and len(out) < 3:
        size = struct.unpack_from("<I", data)[0]
        out.append(data[4 : 4 + size])
        data = data[4 + size :]
    return out


def dicom_damage(r, data, folder):
    """Damage to one slice: bytes, or a tag that becomes something else."""
    import pydicom

    parts = slices(data)
    k = r.randrange(3)
    trick = r.randrange(4)
    if trick == 0:
        parts[k] = r.choice(GENERIC)(r, parts[k], folder)
    elif trick == 1:  # 132 bytes of preamble, then tags
        at = 132 + r.randrange(len(parts[k]) - 140)
        parts[k] = (
            parts[k][:at]
            + r.choice((b"\xff\xff\xff\xff", b"\0\0\0\x7f", b"SQ\0\0\xff\xff\xff\xff"))
            + parts[k][at + 4 :]
        )
    elif trick == 2:
        nested = b"\xfe\xff\x00\xe0\xff\xff\xff\xff\x18\x00\x60\x90SQ\0\0\xff\xff\xff\xff" * 4000
        parts[k] = parts[k][:-140] + b"\x54\x00\x16\x00SQ\0\0\xff\xff\xff\xff" + nested
    else:
        (folder / "t.dcm").write_bytes(parts[k])
        item = pydicom.dcmread(folder / "t.dcm")
        name = r.choice(("Rows", "Columns", "BitsAllocated", "BitsStored", "PixelRepresentation", "SamplesPerPixel",
                         "PixelSpacing", "ImageOrientationPatient", "ImagePositionPatient", "RescaleSlope", "Units",
                         "SeriesInstanceUID", "Modality", "PixelData", "SeriesTime", "PatientWeight",
                         "RadiopharmaceuticalInformationSequence", "NumberOfFrames", "TransferSyntaxUID"))  # fmt: skip
        values = {
            "PixelSpacing": ([0, 0], [1e-9, 1], [1], ["x", "y"], None),
            "ImageOrientationPatient": ([0] * 6, [1, 0, 0, 1, 0, 0], [1], None, [1e9] * 6),
            "ImagePositionPatient": ([0, 0, 0], [0, 0, 1e9], [0], None, ["nan"] * 3),
            "RescaleSlope": ("nan", "1e400", 0, -1, "x"),
            "Units": ("", "CNTS", "GML", "FURLONG"),
            "SeriesInstanceUID": ("9.9", ""),
            "Modality": ("CT", "", "US"),
            "PixelData": (b"", b"\0" * 10, b"\1" * 100_000),
            "SeriesTime": ("", "99", "1", "235959", "abc"),
            "PatientWeight": ("", "-1", "1e30", "x"),
            "RadiopharmaceuticalInformationSequence": ([], None),
            "TransferSyntaxUID": ("1.2.840.10008.1.2.1.99", "1.2.840.10008.1.2.4.90", "1.2.3", "1.2.840.10008.1.2.5"),
        }.get(name, (0, 1, 7, 8, 9, 16, 32, 65535))
        value = r.choice(values)
        try:
            if name == "TransferSyntaxUID":
                item.file_meta.TransferSyntaxUID = value
            else:
                setattr(item, name, value)
            item.save_as(folder / "t.dcm")
        except Exception:  # what pydicom itself refuses to write
            (folder / "t.dcm").write_bytes(parts[k][:-50])
        parts[k] = _taken(folder / "t.dcm")
    return b"".join(struct.pack("<I", len(p)) + p for p in parts)


# ---- readers -------------------------------------------------------------------------------------------------------


def read_pair(path: Path):
    from recon3d.io import describe, read_pet

    header, body = apart(path.read_bytes())
    folder = path.with_suffix("")
    folder.mkdir()
    try:
        (folder / "p.hs").write_bytes(header)
        (folder / "p.s").write_bytes(body)
        data, text = read_pet(folder / "p.hs"), describe(folder / "p.hs")
    finally:
        shutil.rmtree(folder)
    return checked(data, text)


def checked(data, text):
    json.dumps(text, allow_nan=False)
    assert tuple(data.prompts.shape) == data.geometry.shape and bool(data.prompts.isfinite().all())
    assert data.counts > 0 and all("\n" not in note for note in data.notes)
    if data.events is not None:
        assert 0 <= int(data.events.pairs.min()) <= int(data.events.pairs.max()) < data.geometry.scanner.n_crystals
    return data.prompts.numpy().tobytes()


def read_folder(path: Path):
    """The sinogram as factors of sound prompts."""
    from recon3d.io import read_pet, write_interfile

    header, body = apart(path.read_bytes())
    folder = path.with_suffix("")
    folder.mkdir()
    try:
        geometry = small()
        write_interfile(folder / "prompts.hs", np.ones(geometry.shape, np.float32), geometry)
        (folder / "mult_factors.hs").write_bytes(header)
        (folder / "p.s").write_bytes(body)
        data = read_pet(folder)
    finally:
        shutil.rmtree(folder)
    assert bool(data.factors.isfinite().all()) and bool((data.factors >= 0).all())
    return data.factors.numpy().tobytes()


def factors(folder):
    from recon3d.io import write_interfile

    geometry = small()
    write_interfile(folder / "p.hs", np.random.default_rng(0).random(geometry.shape).astype(np.float32), geometry)
    return blob(_taken(folder / "p.hs"), _taken(folder / "p.s"))


def read_hv(path: Path):
    from recon3d.io import read_image

    header, body = apart(path.read_bytes())
    folder = path.with_suffix("")
    folder.mkdir()
    try:
        (folder / "p.hv").write_bytes(header)
        (folder / "p.v").write_bytes(body)
        volume, grid, _ = read_image(folder / "p.hv")
    finally:
        shutil.rmtree(folder)
    assert tuple(volume.shape) == grid.shape and bool(volume.isfinite().all())
    return volume.numpy().tobytes()


def read_events(path: Path):
    from recon3d.io import describe, read_pet

    return checked(read_pet(path), describe(path))


def read_series(path: Path):
    from recon3d.io import describe, read_dicom

    folder = path.with_suffix("")
    folder.mkdir()
    try:
        for k, part in enumerate(slices(path.read_bytes())):
            (folder / f"{k}.dcm").write_bytes(part)
        found, text = read_dicom(folder), describe(folder)
    finally:
        shutil.rmtree(folder)
    json.dumps(text, allow_nan=False)
    assert tuple(found.volume.shape) == found.grid.shape and bool(found.volume.isfinite().all())
    assert found.suv_factor is None or 0 < found.suv_factor < 1e6
    return found.volume.numpy().tobytes()


READERS = {
    "interfile": (".pair", interfile, [pair_damage], read_pair),
    "siemens": (".pair", siemens, [pair_damage], read_pair),
    "petlink": (".pair", petlink, [pair_damage], read_pair),
    "factors": (".pair", factors, [pair_damage], read_folder),
    "image": (".pair", image, [pair_damage], read_hv),
    "petsird": (".petsird", petsird, [*GENERIC, *[petsird_lie] * 9], read_events),
    "dicom": (".pair", dicom, [dicom_damage], read_series),
}


if __name__ == "__main__":
    malformed.READERS = READERS
    names, count, first = sys.argv[1].split(","), int(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else 0
    print(json.dumps({name: malformed.run(name, count, Path.cwd(), first) for name in names}))

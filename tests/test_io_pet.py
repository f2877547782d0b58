"""PET sinograms and list mode: what goes in comes out, in the right place, and what cannot be is refused."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
import torch

from recon3d.geometry import TOF, PETScanner, VolumeGrid, pet_geometry, scanner
from recon3d.geometry.pet import PETGeometry
from recon3d.io import (
    BadInput,
    PETData,
    PETInfo,
    describe,
    read_interfile_geometry,
    read_kspace,
    read_measurement,
    read_mu_map,
    read_pet,
    read_projections,
    write_interfile,
    write_interfile_image,
    write_nifti,
    write_pet_folder,
)
from recon3d.io.interfile_image import read_interfile_image
from recon3d.io.pet import PETOptions, patient_grid
from recon3d.io.petlink import read_petlink

INFO = PETInfo(
    duration_s=60.5,
    start_s=1.5,
    isotope="F-18",
    half_life_s=6586.2,
    branching=0.9686,
    dead_time_factor=0.98,
    injected_bq=3.1e8,
    injection_to_scan_s=3600.0,
    weight_kg=71.5,
    scale=3e-4,
    calibrated=True,
    position="FFS",
)
SPAN1 = pet_geometry("small", max_ring_difference=3, mashing=4, n_radial=31)
SPAN3 = pet_geometry("small", span=3, mashing=8, n_radial=32, tof=True)
GEOMETRIES = {"span 1": SPAN1, "span 3, time of flight": SPAN3}


def counts(geometry: PETGeometry, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).poisson(2, geometry.shape).astype(np.float32))


def edit(path, pattern, replacement):
    text = path.read_text()
    changed = re.sub(pattern, replacement, text, flags=re.MULTILINE)
    assert changed != text
    path.write_text(changed)


@pytest.fixture
def sinogram(tmp_path):
    write_interfile(tmp_path / "p.hs", counts(SPAN1), SPAN1, INFO)
    return tmp_path / "p.hs"


# ---- Interfile -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)
@pytest.mark.parametrize("dtype", ["float32", "uint16"])
def test_interfile_round_trip_is_exact(tmp_path, geometry, dtype):
    x = counts(geometry)
    write_interfile(tmp_path / "a.hs", x, geometry, INFO, dtype)
    data = read_pet(tmp_path / "a.hs")
    assert torch.equal(data.prompts, x) and data.prompts.is_contiguous()
    assert data.info == INFO
    assert data.geometry.shape == geometry.shape and data.geometry.scanner.radius_mm == geometry.scanner.radius_mm
    assert np.allclose(data.geometry.lines(), geometry.lines()) and np.allclose(
        data.geometry.segments, geometry.segments
    )
    if geometry.tof is not None:
        assert data.geometry.tof.bin_mm == pytest.approx(geometry.tof.bin_mm)
        assert data.geometry.tof.sigma_mm == pytest.approx(geometry.tof.sigma_mm)
    write_interfile(tmp_path / "b.hs", data.prompts, data.geometry, data.info, dtype)
    assert (tmp_path / "a.s").read_bytes() == (tmp_path / "b.s").read_bytes()
    assert read_pet(tmp_path / "b.hs").counts == int(x.sum())


def test_unknown_scanner_comes_from_its_own_numbers(tmp_path):
    device = PETScanner("my camera", 5, 6.5, 40, 123.25, 5, 5, (4,), (), 19, math.radians(3.0))
    geometry = pet_geometry(device)
    write_interfile(tmp_path / "a.hs", counts(geometry), geometry)
    found = read_pet(tmp_path / "a.hs").geometry.scanner
    for name in ("name", "rings", "crystals", "block_crystals", "block_rings", "gap_crystals", "n_radial"):
        assert getattr(found, name) == getattr(device, name)
    assert np.allclose(found.crystal_positions(), device.crystal_positions(), atol=1e-9)


def brute_stir(geometry: PETGeometry, values: np.ndarray, view_outer: bool) -> bytes:
    """A sinogram in STIR's order, made bin by bin: segments ascending in STIR's ring difference, its rings from the
    other end, its time bins ascending towards p0."""
    rings, top = geometry.scanner.rings, geometry.ring_difference
    table = geometry.michelogram()
    times = range(geometry.tof.bins)[::-1] if geometry.tof else [None]
    out = []
    for time in times:
        for difference in range(-top, top + 1):
            axial = range(rings - abs(difference))
            block = []
            for a in axial:
                stir0 = a + max(0, -difference)
                stir1 = stir0 + difference
                plane = table[rings - 1 - stir0, rings - 1 - stir1]
                block.append(values[:, :, plane] if time is None else values[:, :, time, plane])
            piece = np.stack(block)  # [plane, view, radial]
            out.append(piece.transpose(1, 0, 2) if view_outer else piece)
    return b"".join(np.ascontiguousarray(p, "<f4").tobytes() for p in out)


@pytest.mark.parametrize("tof", [False, True])
@pytest.mark.parametrize("view_outer", [True, False])
def test_orders_of_the_file(tmp_path, tof, view_outer):
    geometry = pet_geometry(
        "small", max_ring_difference=2, mashing=8, n_radial=9, tof=TOF(3, 60.0, 30.0) if tof else False
    )
    x = counts(geometry).numpy()
    write_interfile(tmp_path / "a.hs", x, geometry)
    expected = brute_stir(geometry, x, True)
    assert (tmp_path / "a.s").read_bytes() == expected
    if not view_outer:
        (tmp_path / "a.s").write_bytes(brute_stir(geometry, x, False))
        text = (tmp_path / "a.hs").read_text()
        text = text.replace("axial coordinate", "\0").replace(":= view", ":= axial coordinate").replace("\0", "view")
        lines = {k: re.search(rf"!matrix size \[{k}\] := (.*)", text)[1] for k in (2, 3)}
        for k in (2, 3):
            text = re.sub(rf"!matrix size \[{k}\] := .*", f"!matrix size [{k}] := {lines[5 - k]}", text)
        (tmp_path / "a.hs").write_text(text)
    assert np.array_equal(read_pet(tmp_path / "a.hs").prompts, x)


def test_siemens_sinogram_with_randoms(tmp_path):
    # planes of 0, -1, +1, -2, +2 in the scanner's counting, prompts and randoms in one file
    geometry = pet_geometry("mmr", max_ring_difference=2, n_radial=4)
    rng = np.random.default_rng(3)
    prompts, randoms = (rng.poisson(3, (geometry.n_planes, 252, 4)).astype("<i2") for _ in range(2))
    (tmp_path / "x.s").write_bytes(b"head" + prompts.tobytes() + randoms.tobytes())
    (tmp_path / "x.s.hdr").write_text(
        "!INTERFILE:=\n!originating system:=2008\n%SMS-MI header name space:=sinogram subheader\n"
        "!name of data file:=C:\\data\\x.s\n%compression:=off\nimage data byte order:=LITTLEENDIAN\n"
        "%patient orientation:=HFS\n!PET data type:=emission\ndata format:=sinogram\nnumber format:=signed integer\n"
        "!number of bytes per pixel:=2\nnumber of dimensions:=3\nmatrix axis label [1]:=bin\n"
        "matrix size [1]:=4\nmatrix size [2]:=252\nmatrix size [3]:=314\n%axial compression:=1\n"
        "%maximum ring difference:=2\nnumber of rings:=64\n%segment table:={64,63,63,62,62}\napplied corrections:=\n"
        "number of scan data types:=2\nscan data type description [1]:=prompts\n"
        "scan data type description [2]:=randoms\ndata offset in bytes [1]:=4\n"
        f"data offset in bytes [2]:={4 + prompts.nbytes}\n!image duration (sec):=1140\nEND OF INTERFILE :=\n"
    )
    data = read_pet(tmp_path / "x.s.hdr")
    assert data.source_format == "siemens" and data.info.duration_s == 1140
    starts = {0: 0, -1: 64, 1: 127, -2: 190, 2: 252}
    table = geometry.michelogram()
    for difference, start in starts.items():
        for a in (0, 7, 61):
            r0 = a + max(0, -difference)
            plane = table[63 - r0, 63 - (r0 + difference)]
            assert np.array_equal(data.prompts[:, :, plane], prompts[start + a])
            assert np.array_equal(data.delayed[:, :, plane], randoms[start + a])
    edit(tmp_path / "x.s.hdr", "compression:=off", "compression:=on")
    with pytest.raises(BadInput, match="compressed"):
        read_pet(tmp_path / "x.s.hdr")


def test_template_of_the_mmr(data):
    path = data("raw_pet/mmr_template_seg2.hs")
    geometry = read_interfile_geometry(path)
    assert geometry.scanner == scanner("mmr") and geometry.shape == (252, 344, 64 + 2 * 63 + 2 * 62)
    assert describe(path)["data"] == "none: a template"
    with pytest.raises(BadInput, match="not there"):
        read_pet(path)


def test_template_and_data_that_disagree(data, tmp_path):
    text = data("raw_pet/mmr_template_seg2.hs").read_text()
    (tmp_path / "t.hs").write_text(text)
    (tmp_path / "Siemens_mMR_seg2.s").write_bytes(bytes(4 * 252 * 344 * 100))
    with pytest.raises(BadInput, match=r"252 x 344 x 314 numbers.*Siemens_mMR_seg2.s has 34675200"):
        read_pet(tmp_path / "t.hs")


@pytest.mark.parametrize(
    ("pattern", "replacement", "message"),
    [
        (r"LITTLEENDIAN", "BIGENDIAN", "byte order"),
        (r"^(Number of rings) := 16", r"\1 := 17", "small has 16"),
        (r"^(Inner ring diameter .*) := .*", r"\1 := 27.0", "small has 26"),
        (r"^(applied corrections) := .*", r"\1 := {arc correction}", "arc-corrected"),
        (r"^applied corrections.*\n", "", "arc-corrected"),
        (r"^(minimum ring difference.*)\{ -3", r"\1{ -4", "ring differences"),
        (r"^(!number of bytes per pixel) := 4", r"\1 := 8", "numbers of 8 bytes"),
        (r"^(!matrix size \[1\]) := 31", r"\1 := 30", "numbers of 4 bytes"),
        (r"^(!matrix size \[1\]) := 31", r"\1 := 1e9", "whole number"),
        (r"^(!matrix size \[1\]) := 31", r"\1 := 31\n\1 := 32", "twice"),
        (r"^(!matrix size \[3\]) := 24", r"\1 := 25", "n_views"),
        (r"^(name of data file) := p.s", r"\1 := ../p.s", "own folder"),
        (r"^(name of data file) := p.s", r"\1 := q.s", "not there"),
        (r"number of time frames := 1", "number of time frames := 2", "time frames"),
        (
            r"^(Scanner type := small)",
            r"\1\nScanner geometry (BlocksOnCylindrical/Cylindrical/Generic) := Generic",
            "on a cyl",
        ),
        (r"image duration (.*):= 60.5", r"image duration \1:= soon", "finite number"),
    ],
)
def test_headers_that_cannot_be(sinogram, pattern, replacement, message):
    edit(sinogram, pattern, replacement)
    with pytest.raises(BadInput, match=message) as error:
        read_pet(sinogram)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x * 0, "no counts"),
        (lambda x: x - 1, "fall to -1"),
        (lambda x: x * 0.3, "no whole numbers"),
        (lambda x: np.where(x == 1, np.nan, x), "NaN"),
        (lambda x: x * 1e8, "reach"),
        (lambda x: x.astype(">f4").view("<f4"), "byte order"),
    ],
)
def test_counts_that_cannot_be(sinogram, change, message):
    raw = sinogram.with_suffix(".s")
    values = np.fromfile(raw, "<f4")
    np.asarray(change(values)).astype("<f4").tofile(raw)
    with pytest.raises(BadInput, match=message):
        read_pet(sinogram)


def test_swapped_whole_numbers(tmp_path):
    write_interfile(tmp_path / "a.hs", counts(SPAN1), SPAN1, dtype="uint16")
    edit(tmp_path / "a.hs", "LITTLEENDIAN", "BIGENDIAN")
    with pytest.raises(BadInput, match="other order"):
        read_pet(tmp_path / "a.hs")


def test_corrected_counts_are_taken_when_declared(sinogram):
    raw = sinogram.with_suffix(".s")
    values = np.fromfile(raw, "<f4") - 0.25
    values.astype("<f4").tofile(raw)
    data = read_pet(sinogram, precorrected=True)
    assert torch.equal(data.prompts, counts(SPAN1) - 0.25) and any("Poisson" in n for n in data.notes)


def test_big_endian_is_read(sinogram):
    raw = sinogram.with_suffix(".s")
    np.fromfile(raw, "<f4").astype(">f4").tofile(raw)
    edit(sinogram, "LITTLEENDIAN", "BIGENDIAN")
    assert torch.equal(read_pet(sinogram).prompts, counts(SPAN1))


def test_interfile_image_round_trip(tmp_path):
    grid = VolumeGrid((5, 6, 7), (2.0, 1.5, 1.25))
    x = torch.rand(grid.shape)
    for position in ("HFS", "HFP", "FFS", "FFP"):
        place = patient_grid(grid, position)
        write_interfile_image(tmp_path / f"{position}.hv", x, place, PETInfo(position=position))
        y, found, info = read_interfile_image(tmp_path / f"{position}.hv")
        assert torch.equal(x, y) and info.position == position
        assert found.shape == grid.shape and np.allclose(found.matrix(), place.matrix(), atol=1e-5)
    # STIR's first plane is ours farthest along z, and lies at the first ring
    raw = np.fromfile(tmp_path / "HFS.v", "<f4").reshape(grid.shape)
    assert np.array_equal(raw[0], x[-1])
    with pytest.raises(BadInput, match="image, not a sinogram"):
        read_pet(tmp_path / "HFS.hv")


def test_image_without_offsets_is_centred_as_stir_does(tmp_path):
    write_interfile_image(tmp_path / "a.hv", torch.ones(3, 4, 5), VolumeGrid((3, 4, 5), (2.0, 1.0, 1.0)))
    edit(tmp_path / "a.hv", r"^first pixel offset.*\n", "")
    _, grid, _ = read_interfile_image(tmp_path / "a.hv")
    ras = grid.matrix() @ [2, 2, 1, 1]  # pixel n // 2 in x and y, the middle plane
    assert np.allclose(ras[:3], 0)


# ---- list mode -----------------------------------------------------------------------------------------------------


def listmode(folder, words, **changes):
    """A header of a small scanner and its words."""
    folder.mkdir(exist_ok=True)
    keys = {
        "!originating system": "small",
        "%SMS-MI header name space": "PETLINK bin address",
        "name of data file": "a.l",
        "data format": "CoincidenceList",
        "number of rings": 16,
        "%LM event and tag words format (bits)": 32,
        "%axial compression": 1,
        "%maximum ring difference": 15,
        "%number of projections": 128,
        "%number of views": 96,
        "%total listmode word counts": len(words),
        "isotope name": "F-18",
        "isotope gamma halflife (sec)": 6586.2,
        **changes,
    }
    path = folder / "a.l.hdr"
    path.write_text("!INTERFILE:=\n" + "".join(f"{k}:={v}\n" for k, v in keys.items() if v is not None))
    np.asarray(words, "<u4").tofile(folder / "a.l")
    return path


def some_words(n=3000, bins=128 * 96 * 256, seed=0):
    rng = np.random.default_rng(seed)
    words = rng.integers(0, bins, n).astype(np.uint32) | (rng.integers(0, 2, n).astype(np.uint32) << 30)
    words[::100] = 0x80000000 + 7 + np.arange(len(words[::100]))
    words[5::500], words[6::500], words[7::500] = 0xA0000001, 0xC0000001, 0xE0000003
    return words


def test_the_mmr_excerpt(data):
    path = data("raw_pet/mmr_fdg_612ms.l.hdr")
    found = read_pet(path, max_ring_difference=4, mashing=2)
    events = found.events
    assert int(events.prompt.sum()) == 218_881 and int((~events.prompt).sum()) == 35_320
    assert any("613 time tags" in n for n in found.notes)
    assert (
        found.info.duration_s == 0.612 and found.info.injection_to_scan_s == 3215 and found.info.half_life_s == 6586.2
    )
    # no coincidence lies in a gap between blocks, so crystals are counted as the scanner does
    assert found.geometry.scanner.real_crystals().reshape(-1)[events.pairs.numpy()].all()
    prompts, delayed = events.histogram(found.geometry)
    assert torch.equal(prompts, found.prompts) and torch.equal(delayed, found.delayed)
    assert describe(path)["words"] == 254_816


def test_delayed_of_the_excerpt_tell_which_end_is_which(data):
    """Delayed coincidences are products of single rates; exchanging the rings of their ends fits worse."""
    found = read_pet(data("raw_pet/mmr_fdg_612ms.l.hdr"), histogram=False)
    pairs = found.events.pairs.numpy()[~found.events.prompt.numpy()]
    (r0, r1), (c0, c1) = (pairs // 504).T, (pairs % 504 // 9).T

    def likelihood(ring0, ring1):
        rate = np.zeros((64, 56))
        np.add.at(rate, (ring0, c0), 1)
        np.add.at(rate, (ring1, c1), 1)
        return np.log(rate[ring0, c0] * rate[ring1, c1]).sum()

    assert likelihood(r0, r1) > likelihood(r1, r0) + 100


def test_words_bit_by_bit(tmp_path):
    geometry = pet_geometry("small")
    words = some_words()
    found = read_pet(listmode(tmp_path / "x", words))
    table = geometry.michelogram()
    order = [0] + [s * k for k in range(1, 16) for s in (-1, 1)]
    rings = [(a + max(0, -d), a + max(0, -d) + d) for d in order for a in range(16 - abs(d))]
    prompts, delayed, times, now = np.zeros(geometry.shape), np.zeros(geometry.shape), [], 7
    for w in words.tolist():
        if w >> 29 == 4:
            now = w & 0x1FFFFFFF
        if w >> 31:
            continue
        address = w & 0x3FFFFFFF
        radial, view, plane = address % 128, address // 128 % 96, address // 128 // 96
        r0, r1 = rings[plane]
        (prompts if w >> 30 else delayed)[view, radial, table[15 - r0, 15 - r1]] += 1
        times.append(now)
    assert np.array_equal(found.prompts, prompts) and np.array_equal(found.delayed, delayed)
    assert found.events.time_ms.tolist() == times
    a, b = found.events.histogram(geometry)
    assert np.array_equal(a, prompts) and np.array_equal(b, delayed)
    assert {n.split(" tags")[0] for n in found.notes if "left out" in n} == {"6"}


def test_pieces_do_not_matter(tmp_path, monkeypatch):
    path = listmode(tmp_path / "x", some_words())
    whole = read_pet(path)
    monkeypatch.setattr("recon3d.io.petlink._PIECE_WORDS", 64)
    parts = read_pet(path)
    assert torch.equal(whole.prompts, parts.prompts) and torch.equal(whole.events.time_ms, parts.events.time_ms)
    assert whole.info == parts.info and whole.notes == parts.notes


def test_list_mode_with_time_of_flight(tmp_path):
    tof = {"%number of TOF time bins": 5, "Size of unmashed TOF time bins (ps)": 200, "TOF timing resolution (ps)": 400}
    bins = 128 * 96 * 256
    # Siemens counts time bins 0, +1, -1, ..., positive ones towards p0
    words = [0x80000001] + [0x40000000 + 77 + t * bins for t in range(5)] + [0x80000002]
    found = read_pet(listmode(tmp_path / "x", words, **tof))
    assert found.events.tof_bins.tolist() == [2, 1, 3, 0, 4]
    assert found.geometry.tof == TOF.from_ps(5, 200.0, 400.0)
    prompts, _ = found.events.histogram(found.geometry)
    assert torch.equal(prompts, found.prompts) and found.counts == 5


def test_seconds(tmp_path):
    path = listmode(tmp_path / "x", some_words())
    whole, part = read_pet(path), read_pet(path, seconds=(0.010, 0.020))
    keep = (whole.events.time_ms >= 10) & (whole.events.time_ms < 20)
    assert torch.equal(part.events.pairs, whole.events.pairs[keep])
    assert part.info.start_s == 0.010 and part.info.duration_s == pytest.approx(0.010)


@pytest.mark.parametrize(
    ("change", "words", "message"),
    [
        ({}, some_words().byteswap(), "other order"),
        ({}, some_words(bins=1 << 30), "beyond the 3145728 bins"),
        ({}, some_words()[::-1], "backwards"),
        ({}, np.where(some_words() < 1 << 31, some_words() & np.uint32(0xBFFFFFFF), some_words()), "no prompt"),
        ({"%total listmode word counts": 10}, some_words(), "counts 10 words"),
        ({"%LM event and tag words format (bits)": 64}, some_words(), "64 bits"),
        ({"%axial compression": 11}, some_words(), "compression"),
        ({"%number of views": None}, some_words(), "number of views"),
        ({"%number of views": 48}, some_words(), "48 views"),
        ({"number of rings": 12}, some_words(), "small has 16"),
        ({"name of data file": "b.l"}, some_words(), "not there"),
    ],
)
def test_list_mode_that_cannot_be(tmp_path, change, words, message):
    with pytest.raises(BadInput, match=message) as error:
        read_pet(listmode(tmp_path / "x", words, **change))
    assert "\n" not in str(error.value)


def test_list_mode_ends_within_a_word(tmp_path):
    path = listmode(tmp_path / "x", some_words())
    with (tmp_path / "x" / "a.l").open("ab") as file:
        file.write(b"x")
    with pytest.raises(BadInput, match="words of 4"):
        read_pet(path)


# ---- folders -------------------------------------------------------------------------------------------------------


def measured(geometry=SPAN1, position="HFS"):
    rng = torch.Generator().manual_seed(1)
    grid = VolumeGrid((7, 8, 8), (4.0, 4.0, 4.0))
    return PETData(
        counts(geometry),
        geometry,
        factors=torch.rand(geometry.shape, generator=rng),
        additive=torch.rand(geometry.shape, generator=rng),
        delayed=counts(geometry, 2),
        mu=(0.0096 * (torch.rand(grid.shape, generator=rng) > 0.3), grid),
        info=PETInfo(duration_s=30.0, scale=2e-3, calibrated=True, position=position),
    )


def test_folder_round_trip(tmp_path):
    given = measured()
    write_pet_folder(tmp_path / "scan", given)
    found = read_measurement(tmp_path / "scan")
    assert isinstance(found, PETData) and found.source_format == "folder"
    for name in ("prompts", "factors", "delayed"):
        assert torch.equal(getattr(found, name), getattr(given, name))
    assert torch.allclose(found.additive, given.additive, rtol=3e-7, atol=0)
    assert found.info == given.info
    assert torch.allclose(found.mu[0], given.mu[0]) and np.allclose(found.mu[1].matrix(), given.mu[1].matrix())
    assert describe(tmp_path / "scan")["format"] == "PET folder"
    assert {p.name for p in tmp_path.iterdir()} == {"scan"}


def test_additive_term_is_before_the_factors(tmp_path):
    """SIRF's model is factors (A x + term): what lies in the file is the counts over the factors."""
    given = measured()
    write_pet_folder(tmp_path / "scan", given)
    term = np.fromfile(tmp_path / "scan" / "additive_term.s", "<f4").astype(np.float64)
    factors = np.fromfile(tmp_path / "scan" / "mult_factors.s", "<f4").astype(np.float64)
    assert (term * factors).sum() == pytest.approx(float(given.additive.sum(dtype=torch.float64)), rel=1e-6)


def test_folder_of_terms_without_time_of_flight(tmp_path):
    flat = pet_geometry("small", span=3, mashing=8, n_radial=32)
    write_pet_folder(tmp_path / "scan", PETData(counts(SPAN3), SPAN3))
    factors = torch.rand(flat.shape)
    write_interfile(tmp_path / "scan" / "mult_factors.hs", factors, flat)
    found = read_pet(tmp_path / "scan")
    assert torch.equal(found.factors, factors[:, :, None].expand(SPAN3.shape))


def test_folder_with_other_bins(tmp_path):
    write_pet_folder(tmp_path / "scan", PETData(counts(SPAN1), SPAN1))
    other = pet_geometry("small", max_ring_difference=3, mashing=4, n_radial=32)
    write_interfile(tmp_path / "scan" / "mult_factors.hs", counts(other), other)
    with pytest.raises(BadInput, match="both must describe the same bins"):
        read_pet(tmp_path / "scan")


def test_folder_is_whole_or_not_there(tmp_path):
    given = measured()
    broken = PETData(given.prompts, SPAN1, additive=torch.full(SPAN1.shape, math.inf))
    with pytest.raises(ValueError, match="finite"):
        write_pet_folder(tmp_path / "scan", broken)
    assert not list(tmp_path.iterdir())
    write_pet_folder(tmp_path / "scan", given)
    with pytest.raises(FileExistsError):
        write_pet_folder(tmp_path / "scan", given)


# ---- attenuation ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("factor", "label", "unit"),
    [
        (1.0, "1/mm", None),
        (10.0, "1/cm", None),
        (1.0, None, None),
        (10.0, None, None),
        (6.0, None, "x"),
        (3.0, "1/cm", None),
    ],
)
def test_mu_map_units(tmp_path, factor, label, unit):
    grid = VolumeGrid((2, 3, 4), (4.0, 2.0, 2.0))
    mu = torch.linspace(0, 0.0096, 24).reshape(grid.shape)
    write_nifti(tmp_path / "mu.nii.gz", mu * factor, grid, label=label)
    if unit == "x":
        with pytest.raises(BadInput, match="does not state its unit"):
            read_mu_map(tmp_path / "mu.nii.gz")
        return
    found, place, notes = read_mu_map(tmp_path / "mu.nii.gz")
    expected = mu * (factor / 10 if label == "1/cm" or (label is None and factor == 10) else factor)
    assert torch.allclose(found, expected) and place.shape == grid.shape
    assert bool(notes) == (label is None)


def test_mu_map_with_the_wrong_unit(tmp_path):
    grid = VolumeGrid((2, 3, 4), (4.0, 2.0, 2.0))
    write_nifti(tmp_path / "mu.nii", torch.linspace(0, 50, 24).reshape(grid.shape), grid)
    with pytest.raises(BadInput, match="check the unit"):
        read_mu_map(tmp_path / "mu.nii", "1/mm")
    write_nifti(tmp_path / "flat.nii", torch.zeros(grid.shape), grid)
    with pytest.raises(BadInput, match="everywhere"):
        read_mu_map(tmp_path / "flat.nii", "1/mm")


# ---- the rest ------------------------------------------------------------------------------------------------------


def test_kinds_are_not_mixed_up(sinogram, tmp_path):
    with pytest.raises(BadInput, match="PET counts"):
        read_projections(sinogram)
    with pytest.raises(BadInput, match="PET counts"):
        read_kspace(sinogram)
    np.savez(tmp_path / "ct.npz", sinogram=np.ones((4, 6)), angles_deg=np.arange(4) * 45.0, detector_spacing_mm=1.0)
    with pytest.raises(BadInput, match="projections, not PET"):
        read_pet(tmp_path / "ct.npz")
    with pytest.raises(TypeError, match="no option colour"):
        read_pet(sinogram, colour=1)
    with pytest.raises(BadInput, match=r"holds the data of p.hs; give that header"):
        read_pet(sinogram.with_suffix(".s"))


def test_decay_and_suv():
    info = PETInfo(
        duration_s=600.0, start_s=100.0, half_life_s=1200.0, injected_bq=2e8, injection_to_scan_s=2400.0, weight_kg=80.0
    )
    t = np.linspace(100, 700, 200_001)
    assert info.decay_factor == pytest.approx((0.5 ** (t / 1200)).mean(), rel=1e-6)
    assert info.suv_factor == pytest.approx(80_000 / 5e7)
    assert PETInfo().suv_factor is None


def test_options_and_info_refuse_nonsense():
    for wrong in ({"seconds": (3, 2)}, {"mu_unit": "1/m"}, {"span": 0}, {"mashing": 0}):
        with pytest.raises(ValueError, match="read_pet"):
            PETOptions(**wrong)
    for wrong in ({"duration_s": 0.0}, {"scale": math.nan}, {"position": "HFX"}, {"start_s": math.inf}):
        with pytest.raises(ValueError, match="PETInfo"):
            PETInfo(**wrong)


def test_list_mode_beyond_the_budget(tmp_path):
    from recon3d.io import Limits

    path = listmode(tmp_path / "x", some_words())
    with pytest.raises(BadInput, match="budget"):
        read_petlink(path, PETOptions(), Limits(1 << 20))
    few = read_petlink(path, PETOptions(max_ring_difference=0), Limits(1 << 24))
    assert few.prompts.shape == (96, 128, 16)

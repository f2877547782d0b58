"""Measurements: the layout in HDF5 and npz, Data Exchange counts, the rotation centre, sentences for what is wrong."""

import json
import math
import re
import warnings
from dataclasses import fields
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from recon3d.geometry import FanBeam, ParallelBeam, VolumeGrid, equiangular
from recon3d.io import (
    BadInput,
    Limits,
    Measurement,
    PETOptions,
    ReadOptions,
    describe,
    read_measurement,
    write_measurement,
)
from recon3d.io.centre import estimate_rotation_centre

GRID = VolumeGrid((3, 16, 16), (2.0, 1.0, 1.0), ((-1.0, 0, 0, 8), (0, -1.0, 0, 8), (0, 0, 2.0, -3), (0, 0, 0, 1)))


def discs(angles, n, centre, objects=((20.0, 12.0, 9.0, 1.0), (-30.0, 5.0, 6.0, 0.5), (3.0, -14.0, 16.0, 0.3))):
    """Exact line integrals of discs (X, Y, radius, value), the axis at detector cell `centre`; pitch 1."""
    s = np.arange(n) - centre
    out = np.zeros((len(angles), n))
    for x, y, radius, value in objects:
        t = s[None] - (x * np.cos(angles) + y * np.sin(angles))[:, None]
        out += value * 2 * np.sqrt(np.clip(radius**2 - t**2, 0, None))
    return out


def measurement(kind="parallel", grid=GRID, weights=True, photons=1e4, n=3):
    angles = equiangular(10)
    g = torch.Generator().manual_seed(0)
    sinogram = torch.rand(n, 10, 24, generator=g)
    sinogram[..., :4] = sinogram[..., -4:] = 0
    geometry = (
        ParallelBeam(angles, 24, 0.9, 0.3)
        if kind == "parallel"
        else FanBeam(angles, 24, 1.5, 0.3, source_to_axis_mm=60.0, source_to_detector_mm=100.0)
    )
    w = torch.rand(n, 10, 24, generator=g) if weights else None
    return Measurement(sinogram, geometry, grid, photons, "recon3d", w)


@pytest.mark.parametrize("kind", ["parallel", "fan"])
@pytest.mark.parametrize("name", ["a.h5", "a.npz"])
@pytest.mark.parametrize("full", [True, False])
def test_layout_round_trip(tmp_path, kind, name, full):
    m = measurement(kind) if full else measurement(kind, None, False, None)
    write_measurement(tmp_path / name, m)
    back = read_measurement(tmp_path / name)
    assert torch.equal(back.sinogram, m.sinogram)
    assert back.geometry == m.geometry
    assert back.grid == m.grid and back.photons == m.photons
    assert back.weights is None if m.weights is None else torch.equal(back.weights, m.weights)
    assert back.source_format == ("npz" if name.endswith("z") else "recon3d")
    assert [p.name for p in tmp_path.iterdir()] == [name]
    first = (tmp_path / name).read_bytes()
    write_measurement(tmp_path / name, back)
    assert (tmp_path / name).read_bytes() == first  # nothing of the moment inside
    json.dumps(describe(tmp_path / name), allow_nan=False)


def test_many_angles_go_into_a_dataset(tmp_path):
    m = Measurement(torch.zeros(1, 9000, 4), ParallelBeam(equiangular(9000), 4, 1.0), None, None, "recon3d")
    write_measurement(tmp_path / "a.h5", m)
    assert read_measurement(tmp_path / "a.h5").geometry == m.geometry


@pytest.mark.parametrize("name", ["a.h5", "a.npz"])
def test_rows_and_views(tmp_path, name):
    m = measurement()
    write_measurement(tmp_path / name, m)
    part = read_measurement(tmp_path / name, rows=(1, 3))
    assert torch.equal(part.sinogram, m.sinogram[1:3]) and torch.equal(part.weights, m.weights[1:3])
    assert part.grid == m.grid.slab(1, 3)
    few = m.views(slice(0, None, 3))
    assert few.geometry.n_views == 4 and torch.equal(few.sinogram, m.sinogram[:, ::3])
    assert torch.equal(m.views([7, 2]).sinogram, m.sinogram[:, [7, 2]])
    with pytest.raises(ValueError, match="views"):
        m.views([10])


def test_options_win_over_the_file(tmp_path):
    write_measurement(tmp_path / "a.h5", measurement("parallel", None))
    changed = read_measurement(
        tmp_path / "a.h5",
        type="fan",
        detector_spacing_mm=0.5,
        rotation_centre=10.0,
        source_to_axis_mm=50,
        source_to_detector_mm=80,
        angle_sign=-1,
        photons=7,
    )
    assert isinstance(changed.geometry, FanBeam) and changed.photons == 7
    assert changed.geometry.detector_offset_mm == pytest.approx((11.5 - 10) * 0.5)
    assert changed.geometry.angles_rad[1] == pytest.approx(-math.pi / 10)


def test_a_sinogram_with_angles_is_enough(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as f:
        f["sinogram"] = discs(np.linspace(0, math.pi, 30, endpoint=False), 101, 50.0)
        f["angles_deg"] = np.linspace(0, 180, 30, endpoint=False)
    with pytest.raises(BadInput, match="give detector_spacing_mm"):
        read_measurement(tmp_path / "a.h5")
    m = read_measurement(tmp_path / "a.h5", detector_spacing_mm=0.1)
    assert m.sinogram.shape == (1, 30, 101) and m.source_format == "sinogram"
    assert m.geometry.angles_rad[-1] == pytest.approx(math.radians(174))
    grid = m.default_grid()
    assert grid.shape == (1, 101, 101) and grid.spacing_mm == (0.1, 0.1, 0.1)


def test_transmission(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as f:
        f["sinogram"] = np.exp(-discs(np.linspace(0, math.pi, 30, endpoint=False), 101, 50.0) / 20)
        f["sinogram"].attrs["unit"] = "transmission"
        f["angles_deg"] = np.linspace(0, 180, 30, endpoint=False)
        f.attrs["detector_spacing_mm"] = 1.0
    want = discs(np.linspace(0, math.pi, 30, endpoint=False), 101, 50.0) / 20
    assert np.abs(read_measurement(tmp_path / "a.h5").sinogram[0].numpy() - want).max() < 1e-5


def data_exchange(path, n_views=60, n=101, centre=44.0, **change):
    """A Data Exchange file of two rows, exact but for its counts' rounding; returns the line integrals."""
    angles = np.arange(n_views) * 180.0 / n_views
    p = np.stack([discs(np.deg2rad(angles), n, centre) / 40] * 2, axis=1)  # theta, y, x
    dark = np.full((4, 2, n), 100.0)
    white = np.full((5, 2, n), 50000.0) + np.arange(n)
    data = dark[0] + (white[0] - dark[0]) * np.exp(-p)
    content = {"data": data, "data_white": white, "data_dark": dark, "theta": angles, **change}
    with h5py.File(path, "w") as f:
        for name, values in content.items():
            if values is not None:
                f[f"exchange/{name}"] = values
        if "theta" in f["exchange"]:
            f["exchange/theta"].attrs["units"] = "degrees"
    return p.transpose(1, 0, 2)


def test_counts_become_line_integrals(tmp_path):
    want = data_exchange(tmp_path / "a.h5")
    m = read_measurement(tmp_path / "a.h5", detector_spacing_mm=0.5, rotation_centre=44.0)
    assert m.source_format == "data exchange" and m.notes == ()
    assert np.abs(m.sinogram.numpy() - want).max() < 1e-5
    assert m.geometry.detector_offset_mm == pytest.approx(3.0)  # ((101 - 1) / 2 - 44) * 0.5
    one = read_measurement(tmp_path / "a.h5", detector_spacing_mm=0.5, rows=(1, 2))
    assert torch.equal(one.sinogram, m.sinogram[1:])


def test_dead_cells_and_starved_rays_are_told(tmp_path):
    clean = data_exchange(tmp_path / "clean.h5")
    with h5py.File(tmp_path / "clean.h5") as f:
        white, data = f["exchange/data_white"][()], f["exchange/data"][()]
    white[:, 0, 30] = 100.0  # a cell that sees no beam
    data[3, 1, 50] = 90.0  # a ray that counts less than dark
    data_exchange(tmp_path / "a.h5", data_white=white, data=data)
    m = read_measurement(tmp_path / "a.h5", detector_spacing_mm=1.0)
    assert any("1 dead detector cells" in note for note in m.notes)
    assert any("1 of 12120 rays count nothing" in note for note in m.notes)
    assert m.sinogram[1, 3, 50] == pytest.approx(-math.log(1e-4), abs=1e-5)
    # filled to what its neighbours allow
    assert np.abs(m.sinogram[0, :, 30].numpy() - clean[0, :, 30]).max() < 0.1


@pytest.mark.parametrize(
    "change,match",
    [
        ({"data_white": None}, "no white fields"),
        ({"data_white": np.full((5, 2, 101), 50.0)}, "exchanged"),
        ({"data_white": np.full((5, 2, 100), 5e4)}, "must agree"),
        ({"data": np.full((60, 2, 101), np.nan)}, "NaN"),
        ({"data": np.zeros((60, 2, 101))}, "exchanged"),
        ({"data": np.ones((60, 101))}, "axes|rows"),
        ({"theta": None}, "view angles"),
        ({"theta": np.zeros(59)}, "59 angles for a sinogram of 60 views"),
        ({"theta": np.arange(60) * math.pi / 60}, "radians"),
        ({"theta": np.full(60, np.nan)}, "NaN"),
    ],
)
def test_data_exchange_one_sentence(tmp_path, change, match):
    data_exchange(tmp_path / "a.h5", **change)
    with pytest.raises(BadInput, match=match) as caught:
        read_measurement(tmp_path / "a.h5", detector_spacing_mm=1.0)
    assert "\n" not in str(caught.value)


def test_no_darks_is_told(tmp_path):
    data_exchange(tmp_path / "a.h5", data_dark=None)
    m = read_measurement(tmp_path / "a.h5", detector_spacing_mm=1.0)
    assert "no dark fields" in m.notes[0]


@pytest.mark.parametrize("centre", [44.0, 50.0, 61.3])
@pytest.mark.parametrize("span", [1, 2])
def test_rotation_centre(centre, span):
    angles = np.arange(60 * span) * math.pi / 60
    rng = np.random.default_rng(0)
    sinogram = discs(angles, 121, centre)
    sinogram = sinogram + 0.01 * sinogram.max() * rng.normal(size=sinogram.shape)
    assert abs(estimate_rotation_centre(sinogram[None], angles) - centre) <= 0.3


@pytest.mark.parametrize(
    "angles,match",
    [
        (np.arange(10) * math.pi / 10, "16 evenly"),
        (np.arange(60) ** 2 * math.pi / 3600, "evenly"),
        (np.arange(60) * math.pi / 120, "half a turn"),
    ],
)
def test_rotation_centre_refuses(angles, match):
    with pytest.raises(ValueError, match=match):
        estimate_rotation_centre(discs(angles, 121, 60.0)[None], angles)


def test_truncation_is_noticed(tmp_path):
    angles = np.linspace(0, math.pi, 30, endpoint=False)
    for offset, cut in ((0.0, False), (45.0, True)):
        m = Measurement(
            torch.from_numpy(discs(angles, 141, 70.0 - offset)[None]).float(),
            ParallelBeam(tuple(angles), 141, 1.0),
            None,
            None,
            "recon3d",
        )
        write_measurement(tmp_path / "a.h5", m)
        assert any("truncation" in note for note in read_measurement(tmp_path / "a.h5").notes) is cut
    small = VolumeGrid((3, 64, 64), (1, 1, 1))
    write_measurement(tmp_path / "b.h5", measurement(grid=small))
    assert any("truncation" in note for note in read_measurement(tmp_path / "b.h5").notes)


def own(path, sinogram=None, geometry=None, grid=None, root=None):
    with h5py.File(path, "w") as f:
        f["sinogram"] = np.ones((2, 12, 8), np.float32) if sinogram is None else sinogram
        g = {"type": "parallel", "angles_rad": np.arange(12) * 0.2, "detector_spacing_mm": 1.0, **(geometry or {})}
        f.create_group("geometry").attrs.update({k: v for k, v in g.items() if v is not None})
        if grid:
            f.create_group("grid").attrs.update(grid)
        f.attrs.update(root or {})


@pytest.mark.parametrize(
    "change,match",
    [
        ({"geometry": {"angles_rad": np.arange(12) * 15.0}}, "degrees"),
        ({"geometry": {"angles_rad": np.arange(11) * 0.1}}, "11 angles for a sinogram of 12 views"),
        ({"geometry": {"angles_rad": None}}, "view angles"),
        ({"geometry": {"angles_rad": "many"}}, "angles of type"),
        ({"geometry": {"type": "cone"}}, "parallel or fan"),
        ({"geometry": {"type": "fan"}}, "source_to_axis_mm"),
        ({"geometry": {"type": "fan", "source_to_axis_mm": 100.0, "source_to_detector_mm": 50.0}}, "not be below"),
        ({"geometry": {"detector_spacing_mm": 0.0}}, "detector_spacing_mm is 0 mm"),
        ({"geometry": {"detector_spacing_mm": np.nan}}, "finite number"),
        ({"geometry": {"detector_spacing_mm": "wide"}}, "finite number"),
        ({"geometry": {"detector_spacing_mm": np.ones(3)}}, "finite number"),
        ({"sinogram": np.ones((2, 0, 8)), "geometry": {"angles_rad": np.ones(0)}}, "positive"),
        ({"sinogram": np.full((2, 12, 8), np.inf)}, "192 NaN or infinite values of 192, the first at"),
        ({"sinogram": np.ones((2, 12, 8), complex)}, "type"),
        ({"sinogram": np.ones(8)}, "is read"),
        ({"grid": {"shape": (3, 8, 8), "spacing_mm": (1.0, 1, 1)}}, "3 slices for 2"),
        ({"grid": {"shape": (2, 8, 8)}}, "half a grid"),
        ({"grid": {"shape": (2, 8, 8), "spacing_mm": (1.0, -1, 1)}}, "spacing"),
        ({"grid": {"shape": (2, 2**40, 8), "spacing_mm": (1.0, 1, 1)}}, "at most"),
        ({"root": {"version": 9, "format": "recon3d-sinogram"}}, "version 9"),
        ({"root": {"photons": -1.0}}, "positive count"),
    ],
)
def test_layout_one_sentence(tmp_path, change, match):
    own(tmp_path / "a.h5", **change)
    with warnings.catch_warnings(), pytest.raises(BadInput, match=match) as caught:
        warnings.simplefilter("error")
        read_measurement(tmp_path / "a.h5")
    assert str(caught.value).startswith(str(tmp_path)) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "options,kind,match",
    [
        ({"pixel": 1}, TypeError, "no option pixel; there are type"),
        ({"rotation_centre": 3.0, "detector_offset_mm": 0.0}, ValueError, "not both"),
        ({"angles_rad": (0.0,), "angles_deg": (0.0,)}, ValueError, "not both"),
        ({"rows": (3, 3)}, ValueError, "rows"),
        ({"rows": (5, 9)}, BadInput, "rows"),
        ({"rotation_centre": 99.0}, BadInput, "rotation centre at cell 99"),
        ({"angle_sign": 2}, ValueError, "angle_sign"),
        ({"limits": Limits(budget_bytes=100)}, BadInput, "budget"),
    ],
)
def test_options_one_sentence(tmp_path, options, kind, match):
    own(tmp_path / "a.h5")
    with pytest.raises(kind, match=match):
        read_measurement(tmp_path / "a.h5", **options)


def test_unknown_files(tmp_path):
    (tmp_path / "a.txt").write_text("hello")
    with pytest.raises(BadInput, match="no known format"):
        read_measurement(tmp_path / "a.txt")
    with h5py.File(tmp_path / "a.h5", "w") as f:
        f["other"] = 1
    with pytest.raises(BadInput, match="neither exchange/data nor sinogram"):
        read_measurement(tmp_path / "a.h5")
    assert describe(tmp_path / "a.h5")["format"] == "HDF5 of another kind"
    with pytest.raises(BadInput, match="does not exist"):
        describe(tmp_path / "b.h5")
    with pytest.raises(ValueError, match="must end in"):
        write_measurement(tmp_path / "a.mat", measurement())


def test_measured_tooth(data):
    m = read_measurement(data("raw_ct/tooth_parallel_aps.h5"), detector_spacing_mm=0.01, rotation_centre="estimate")
    assert m.sinogram.shape == (2, 181, 640)
    centre = 319.5 - m.geometry.detector_offset_mm / 0.01
    assert abs(centre - 296) < 0.5
    assert m.sinogram[..., :20].abs().mean() < 0.05 < 1.5 < m.sinogram.max() < 3  # air beside the tooth


def test_measured_htc(data):
    m = read_measurement(data("raw_ct/htc2022_ta_fan_full360.h5"))
    assert m.sinogram.shape == (1, 720, 560)
    assert m.geometry.source_to_axis_mm == 410.66 and m.geometry.source_to_detector_mm == 553.74
    assert m.geometry.detector_spacing_mm == 0.2
    assert m.geometry.angles_rad[1] == pytest.approx(-math.radians(0.5))
    assert len(m.notes) == 2


def test_documented_example(tmp_path, monkeypatch):
    """The blocks of docs/formats.md run as they stand, one after the other."""
    monkeypatch.chdir(tmp_path)
    text = (Path(__file__).resolve().parents[1] / "docs" / "formats.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.S)
    assert len(blocks) == 4
    names: dict = {}
    for block in blocks:
        exec(block, names)
    few = read_measurement("few.npz")
    assert few.sinogram.shape == (4, 30, 96) and few.geometry.detector_spacing_mm == 1.0


def test_documented_options_exist():
    text = (Path(__file__).resolve().parents[1] / "docs" / "formats.md").read_text()
    table = text.split("## What a file does not say")[1].split("## ")[0]
    named = set(re.findall(r"`(\w+)`", table.replace("`input:`", "")))
    assert {field.name for field in fields(ReadOptions)} <= named


def test_documented_pet_options_exist():
    text = (Path(__file__).resolve().parents[1] / "docs" / "formats.md").read_text()
    named = set(re.findall(r"`(\w+)`", text.split("## PET")[1].split("### Interfile")[0]))
    assert {field.name for field in fields(PETOptions)} <= named

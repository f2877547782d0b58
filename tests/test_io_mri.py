"""k-space readers: fastMRI; sampling that is found, oversampling that is cut, sentences for what is wrong."""

import hashlib
import json
import re
from dataclasses import fields
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from recon3d.geometry import Trajectory, VolumeGrid
from recon3d.io import (
    BadInput,
    KSpace,
    KSpaceOptions,
    demo_kspace_path,
    describe,
    read_kspace,
    read_measurement,
    read_projections,
    write_kspace_hdf5,
)
from recon3d.io.kspace import affine_from_directions, crop_axis, describe_sampling, partial_fourier_notes

HEADER = """<?xml version="1.0"?>
<ismrmrdHeader xmlns="http://www.ismrm.org/ISMRMRD"><encoding>
<encodedSpace><matrixSize><x>{x}</x><y>{y}</y><z>{z}</z></matrixSize>
<fieldOfView_mm><x>{fx}</x><y>{fy}</y><z>{fz}</z></fieldOfView_mm></encodedSpace>
<reconSpace><matrixSize><x>{rx}</x><y>{y}</y><z>{z}</z></matrixSize>
<fieldOfView_mm><x>{rfx}</x><y>{fy}</y><z>{fz}</z></fieldOfView_mm></reconSpace>
<encodingLimits><kspace_encoding_step_1><minimum>0</minimum><maximum>9</maximum><center>{c1}</center>
</kspace_encoding_step_1></encodingLimits>
<trajectory>{kind}</trajectory></encoding></ismrmrdHeader>"""


def header(x=24, y=20, z=1, fx=48.0, fy=30.0, fz=5.0, rx=12, rfx=24.0, c1=10, kind="cartesian"):
    return HEADER.format(x=x, y=y, z=z, fx=fx, fy=fy, fz=fz, rx=rx, rfx=rfx, c1=c1, kind=kind)


def noise(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.complex64, generator=torch.Generator().manual_seed(seed)).numpy()


def fft(x, axes):
    return np.fft.fftshift(np.fft.fftn(np.fft.ifftshift(x, axes), axes=axes, norm="ortho"), axes)


def object_in_the_middle(slices=3, coils=2, rows=24, cols=20):
    """k-space of an object that fills the middle half of its rows, and the object."""
    x = noise(slices, coils, rows, cols)
    x[:, :, : rows // 4] = x[:, :, rows - rows // 4 :] = 0
    return fft(x, (2, 3)).astype(np.complex64), x


def fastmri(path, kspace, mask=None, text=None):
    with h5py.File(path, "w") as f:
        f["kspace"] = kspace
        f["ismrmrd_header"] = text or header()
        if mask is not None:
            f["mask"] = mask


def test_fastmri_is_cut_to_the_field_of_view(tmp_path):
    kspace, x = object_in_the_middle()
    fastmri(tmp_path / "a.h5", kspace)
    k = read_kspace(tmp_path / "a.h5")
    assert isinstance(read_measurement(tmp_path / "a.h5"), KSpace)
    assert k.data.shape == (3, 2, 12, 20) and k.mask.shape == (12, 20) and k.mask.min() == 1
    assert np.abs(k.data.numpy() - fft(x[:, :, 6:18], (2, 3))).max() < 1e-5
    assert k.grid.shape == (3, 12, 20) and k.grid.spacing_mm == (5.0, 2.0, 1.5)
    assert any("cut to the 12 pixels" in note for note in k.notes)
    whole = read_kspace(tmp_path / "a.h5", crop_readout=False, slices=(1, 3))
    assert np.array_equal(whole.data.numpy(), kspace[1:]) and whole.grid.shape == (2, 24, 20)
    text = describe(tmp_path / "a.h5")
    assert text["format"] == "fastMRI HDF5" and text["coils"] == 2 and text["fov_yx_mm"] == [48.0, 30.0]
    json.dumps(text, allow_nan=False)
    with pytest.raises(BadInput, match="not projections"):
        read_projections(tmp_path / "a.h5")


@pytest.mark.parametrize("source", ["zeros", "mask"])
def test_fastmri_undersampled(tmp_path, source):
    kspace, _ = object_in_the_middle()
    mask = np.zeros(20, dtype=np.uint8)
    mask[[0, 3, 6, 9, 10, 11, 12, 15, 18]] = 1
    masked = kspace * mask
    masked[0, :, 4, 3] = 0  # a value that happens to be zero
    fastmri(tmp_path / "a.h5", masked, mask if source == "mask" else None)
    k = read_kspace(tmp_path / "a.h5")
    assert torch.equal(k.mask, torch.from_numpy(mask.astype(np.float32)).expand(12, 20))
    assert bool((k.data[..., mask == 0] == 0).all())
    sampling = k.describe()["sampling"]
    assert sampling["acceleration"] == round(20 / 9, 3) and sampling["calibration"] == "4 lines of 20"
    assert describe(tmp_path / "a.h5")["sampling"] == sampling


def test_padding_is_not_measured(tmp_path):
    kspace, _ = object_in_the_middle(cols=40)
    kspace[..., :12] = 0
    mask = np.tile([1, 0], 20)
    fastmri(tmp_path / "a.h5", kspace * mask, mask, header(y=40))
    k = read_kspace(tmp_path / "a.h5")
    assert k.mask[0].nonzero().flatten().tolist() == list(range(12, 40, 2))
    assert any("empty lines" in note for note in k.notes) and any("partial Fourier" in note for note in k.notes)


def test_nominal_field_of_view_and_options(tmp_path):
    kspace, _ = object_in_the_middle()
    fastmri(tmp_path / "a.h5", kspace, text=header(fx=24, fy=20, fz=1, rfx=24))
    k = read_kspace(tmp_path / "a.h5")
    assert k.grid.spacing_mm == (1.0, 1.0, 1.0) and any("nominal" in note for note in k.notes)
    k = read_kspace(tmp_path / "a.h5", pixel_mm=[0.9, 0.8], slice_spacing_mm=4)
    assert k.grid.spacing_mm == (4.0, 0.9, 0.8) and not any("nominal" in note for note in k.notes)
    with pytest.raises(TypeError, match="no option rows"):
        read_kspace(tmp_path / "a.h5", rows=(0, 1))
    with pytest.raises(ValueError, match="slices"):
        read_kspace(tmp_path / "a.h5", slices=(2, 2))
    with pytest.raises(BadInput, match="3 slices"):
        read_kspace(tmp_path / "a.h5", slices=(2, 4))


@pytest.mark.parametrize(
    "text, why",
    [
        ("<!DOCTYPE x [<!ENTITY a 'b'>]><ismrmrdHeader>&a;</ismrmrdHeader>", "document type"),
        ("<a>" * 5000, "levels"),
        ("<ismrmrdHeader>" + "<a/>" * 200_000 + "</ismrmrdHeader>", "elements"),
        ("<ismrmrdHeader/>", "without encoding"),
        ("<other/>", "begins with 'other'"),
        ("hello", "not usable XML"),
        (header(x=0), "encodedSpace/matrixSize/x"),
        (header(x=10**9), "encodedSpace/matrixSize/x"),
        (header(fx="nan"), "fieldOfView_mm/x"),
        (header(fy="1e99"), "fieldOfView_mm/y"),
        (header(fy="-3"), "fieldOfView_mm/y"),
        (header(fx=1e-6), "field of view"),
        (header(c1=-4), "centre of kspace_encoding_step_1"),
    ],
    ids=lambda value: value[:20],
)
def test_headers_are_not_believed(tmp_path, text, why):
    kspace, _ = object_in_the_middle()
    fastmri(tmp_path / "a.h5", kspace, text=text)
    with pytest.raises(BadInput, match=why) as error:
        read_kspace(tmp_path / "a.h5")
    assert "\n" not in str(error.value)


def test_what_kspace_refuses(tmp_path):
    kspace, _ = object_in_the_middle()
    kspace[1, 1, 3, 3] = np.nan
    fastmri(tmp_path / "a.h5", kspace)
    with pytest.raises(BadInput, match="1 NaN"):
        read_kspace(tmp_path / "a.h5")
    fastmri(tmp_path / "a.h5", np.zeros_like(kspace))
    with pytest.raises(BadInput, match="zero everywhere"):
        read_kspace(tmp_path / "a.h5")
    fastmri(tmp_path / "a.h5", np.ones((3, 2, 24, 20), np.float32))
    with pytest.raises(BadInput, match="float32"):
        read_kspace(tmp_path / "a.h5")
    kspace, _ = object_in_the_middle()
    for mask in (np.ones(21), np.full(20, 2.0), np.zeros(20)):
        fastmri(tmp_path / "a.h5", kspace, mask)
        with pytest.raises(BadInput, match="mask"):
            read_kspace(tmp_path / "a.h5", crop_readout=False)


def test_kspace_checks_itself():
    grid = VolumeGrid((2, 8, 6), (1, 1, 1))
    data, mask = torch.ones(2, 3, 8, 6, dtype=torch.complex64), torch.ones(8, 6)
    good = KSpace(data, mask, None, grid)
    assert good.n_coils == 3 and good.slab(1, 2).data.shape == (1, 3, 8, 6)
    for wrong in (
        dict(mask=None),
        dict(mask=torch.ones(6, 8)),
        dict(mask=torch.full((8, 6), 0.5)),
        dict(data=data * float("nan")),
        dict(data=data.real),
        dict(noise_covariance=torch.eye(2, dtype=torch.complex64)),
        dict(maps=torch.ones(2, 2, 8, 6, dtype=torch.complex64)),
        dict(grid=VolumeGrid((2, 6, 8), (1, 1, 1))),
    ):
        with pytest.raises(ValueError, match="KSpace"):
            KSpace(**{"data": data, "mask": mask, "trajectories": None, "grid": grid, **wrong})
    t = Trajectory(torch.rand(10, 2) - 0.5, (8, 6), "cycles")
    samples = torch.ones(2, 3, 10, dtype=torch.complex64)
    assert KSpace(samples, None, (t,), grid).n_coils == 3
    assert len(KSpace(samples, None, (t, t), grid).slab(0, 1).trajectories) == 1
    for wrong in (dict(trajectories=(t,) * 3), dict(data=samples[..., 1:]), dict(trajectories=())):
        with pytest.raises(ValueError, match="KSpace"):
            KSpace(**{"data": samples, "mask": None, "trajectories": (t,), "grid": grid, **wrong})
    with pytest.raises(ValueError, match="at least one frame"):
        KSpaceOptions(frames=())


@pytest.mark.parametrize("n, m", [(8, 4), (9, 4), (9, 5), (8, 5)])
def test_crop_keeps_the_centre_and_the_noise(n, m):
    x = noise(2, 3, n)
    got = crop_axis(fft(x, (2,)).astype(np.complex64), 2, m)
    assert np.abs(got - fft(x[..., n // 2 - m // 2 :][..., :m], (2,))).max() < 1e-5


def test_affine_of_directions():
    """The middle voxel lies where it was said to, in RAS, and a step along x goes along its direction."""
    steps = np.array(
        [[0.0, 2.0, 0.0], [0.0, 0.0, -1.5], [-5.0, 0.0, 0.0]]
    )  # x to the back, y to the feet, z to the right
    matrix = np.array(affine_from_directions("f", (7, 5, 4), steps, (10.0, 20.0, 30.0)))
    assert np.allclose(matrix @ [2, 2, 3, 1], [-10, -20, 30, 1])
    assert np.allclose(matrix @ [3, 2, 3, 1], [-10, -22, 30, 1])
    assert np.allclose(matrix @ [2, 3, 3, 1], [-10, -20, 28.5, 1])
    assert np.allclose(matrix @ [2, 2, 4, 1], [-5, -20, 30, 1])
    with pytest.raises(BadInput, match="one plane"):
        affine_from_directions("f", (7, 5, 4), steps[[0, 0, 2]], (0, 0, 0))


def test_partial_fourier_is_told():
    full = np.ones((16, 40))
    assert partial_fourier_notes(full) == []
    part = full.copy()
    part[:, :10] = 0
    (note,) = partial_fourier_notes(part)
    assert "kx reaches 10 lines below" in note
    assert "partial" not in "".join(partial_fourier_notes(full * (np.arange(40) % 4 == 3)))
    padded = full.copy()
    padded[:, :10] = padded[:, -10:] = 0
    assert "10 and 10 of 40" in partial_fourier_notes(padded)[0]


def test_sampling_in_words():
    lines = np.tile(np.arange(40) % 4 == 0, (16, 1))
    lines[:, 17:24] = True
    got = describe_sampling(lines)
    assert got["kind"].startswith("Cartesian, equispaced lines along kx") and got["calibration"] == "9 lines of 40"
    points = np.random.default_rng(0).random((16, 40)) < 0.3
    points[4:12, 16:24] = True
    got = describe_sampling(points)
    assert got["kind"] == "Cartesian, points in ky and kx" and got["calibration"] == "8 x 8"


def test_packaged_kspace():
    path = demo_kspace_path()
    assert hashlib.sha256(path.read_bytes()).hexdigest() in (path.parent / "ATTRIBUTION.md").read_text()
    k = read_kspace(path)
    assert k.data.shape == (2, 13, 224, 224) and k.mask.min() == 1 and k.source_format == "fastmri"
    with h5py.File(path) as f:
        rss = f["reconstruction_rss"][:]
    image = np.fft.fftshift(np.fft.ifft2(np.fft.ifftshift(k.data.numpy(), (2, 3)), norm="ortho"), (2, 3))
    got = np.sqrt((np.abs(image) ** 2).sum(1))
    assert np.abs(got - rss).max() < 2e-3 * rss.max()


# ---- recon3d's own layout ------------------------------------------------------------------------------------------

AFFINE = ((-1.0, 0, 0, 8), (0, -1.0, 0, 8), (0, 0, 2.0, -3), (0, 0, 0, 1))


def same(a, b):
    assert torch.equal(a.data, b.data) and a.grid == b.grid and a.trajectories == b.trajectories
    for name in ("mask", "maps", "noise_covariance"):
        one, two = getattr(a, name), getattr(b, name)
        assert (one is None) == (two is None) and (one is None or torch.equal(one, two)), name


@pytest.mark.parametrize("kind", ["cartesian", "shared", "one a slice", "volume"])
def test_layout_round_trip(tmp_path, kind):
    grid = VolumeGrid((3, 8, 6), (2.0, 1.0, 1.0), AFFINE)
    maps, covariance = torch.from_numpy(noise(3, 2, 8, 6)), torch.from_numpy(noise(2, 2))
    if kind == "cartesian":
        data = torch.from_numpy(noise(3, 2, 8, 6))
        mask = torch.ones(8, 6)
        mask[::3] = 0
        k = KSpace(data * mask, mask, None, grid, maps, covariance)
    elif kind == "volume":
        t = Trajectory(np.random.default_rng(0).random((4, 5, 3)) - 0.5, (3, 8, 6), "cycles")
        k = KSpace(torch.from_numpy(noise(2, 20)), None, (t,), grid, maps.transpose(0, 1), covariance)
    else:
        r = np.random.default_rng(0)
        ts = [Trajectory(r.random((4, 5, 2)) - 0.5, (8, 6), "cycles") for _ in range(3 if kind != "shared" else 1)]
        k = KSpace(torch.from_numpy(noise(3, 2, 20)), None, tuple(ts), grid, maps, covariance)
    write_kspace_hdf5(tmp_path / "a.h5", k)
    back = read_kspace(tmp_path / "a.h5")
    same(back, k)
    assert back.source_format == "recon3d" and not back.notes
    first = (tmp_path / "a.h5").read_bytes()
    write_kspace_hdf5(tmp_path / "a.h5", back)
    assert (tmp_path / "a.h5").read_bytes() == first and [p.name for p in tmp_path.iterdir()] == ["a.h5"]
    text = describe(tmp_path / "a.h5")
    json.dumps(text, allow_nan=False)
    assert text["format"] == "recon3d k-space HDF5" and text["coils"] == 2 and "S" in text["orientation"]
    if kind != "volume":
        same(read_kspace(tmp_path / "a.h5", slices=(1, 3)), k.slab(1, 3))
    with pytest.raises(ValueError, match="must end in"):
        write_kspace_hdf5(tmp_path / "a.npz", k)


def series(path, frames=3, **attributes):
    r = np.random.default_rng(0)
    points = (r.random((frames, 4, 5, 2)) - 0.5).astype(np.float32)
    with h5py.File(path, "w") as f:
        f["kspace"], f["trajectory"] = noise(frames, 2, 4, 5), points
        f.attrs.update(attributes)
    return noise(frames, 2, 4, 5), points


def test_frames(tmp_path):
    kspace, points = series(tmp_path / "a.h5", layout="cycles/pixel of a 8x6 image grid")
    k = read_kspace(tmp_path / "a.h5")
    assert k.data.shape == (3, 2, 20) and len(k.trajectories) == 3 and k.grid.shape == (3, 8, 6)
    assert k.trajectories[1].points[7].tolist() == pytest.approx((2 * np.pi * points[1, 1, 2, ::-1]).tolist())
    two = read_kspace(tmp_path / "a.h5", frames=[2, 0])
    assert torch.equal(two.data, k.data[[2, 0]]) and two.trajectories == (k.trajectories[2], k.trajectories[0])
    one = read_kspace(tmp_path / "a.h5", merge_frames=True, matrix=(16, 12), pixel_mm=(0.5, 0.5))
    assert one.data.shape == (1, 2, 60) and one.grid.shape == (1, 16, 12) and one.grid.pixel_mm == (0.5, 0.5)
    assert np.array_equal(one.data[0, 1].numpy(), kspace[:, 1].reshape(-1))
    assert torch.equal(one.trajectories[0].points[20:40], k.trajectories[1].points)
    turned = read_kspace(tmp_path / "a.h5", trajectory_order="yx")
    assert torch.equal(turned.trajectories[0].points, k.trajectories[0].points.flip(1))


@pytest.mark.parametrize(
    "options, why",
    [
        (dict(matrix=None), "size of its image"),
        (dict(frames=[3]), "has 3 frames"),
        (dict(frames=[0], slices=(0, 1)), "one of the two"),
        (dict(trajectory_unit="index"), "not usable"),
        (dict(matrix=(8, 1 << 20)), "1048576"),
    ],
    ids=str,
)
def test_what_a_series_refuses(tmp_path, options, why):
    series(tmp_path / "a.h5")
    with pytest.raises(BadInput, match=why):
        read_kspace(tmp_path / "a.h5", **{"matrix": (8, 6), **options})


def test_measured_series(data):
    path = data("raw_mr/brain_radial_vfa_5ch.h5")
    k = read_kspace(path, merge_frames=True)
    assert k.data.shape == (1, 5, 6 * 34 * 512) and k.grid.shape == (1, 256, 256)
    assert describe(path)["sampling"]["trajectories"] == 6


def test_documented_options_exist():
    text = (Path(__file__).resolve().parents[1] / "docs" / "formats.md").read_text()
    table = text.split("## k-space\n")[1].split("### recon3d's layout")[0]
    named = set(re.findall(r"`(\w+)`", table))
    assert {field.name for field in fields(KSpaceOptions)} <= named

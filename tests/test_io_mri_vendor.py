"""BART pairs and Siemens raw data: the same numbers, the right place, sentences for what is wrong."""

import json

import numpy as np
import pytest
import torch
from mri_files import Twix, write_cfl

from recon3d.io import BadInput, describe, read_kspace, read_measurement


def noise(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.complex64, generator=torch.Generator().manual_seed(seed)).numpy()


def ifft(x, *axes):
    return np.fft.fftshift(np.fft.ifftn(np.fft.ifftshift(x, axes), axes=axes, norm="ortho"), axes)


def rotation(seed=3):
    q, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(3, 3)))
    return q * np.sign(np.linalg.det(q))


# ---- BART ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.cfl", "a.hdr", "a"])
def test_cfl_by_any_name(tmp_path, name):
    kspace = noise(3, 2, 20, 24)
    kspace[:, :, ::3] = 0
    # [slice, ..., coil, phase 2, phase 1, read]
    write_cfl(tmp_path / "a", kspace, (24, 20, 1, 2, *[1] * 9, 3))
    k = read_measurement(tmp_path / name)
    assert k.source_format == "bart" and np.array_equal(k.data.numpy(), kspace)
    assert np.flatnonzero(k.mask[:, 0] == 0).tolist() == list(range(0, 20, 3))
    part = read_kspace(tmp_path / name, slices=(1, 2), pixel_mm=(1.5, 2.0), slice_spacing_mm=4.0)
    assert np.array_equal(part.data.numpy(), kspace[1:2]) and part.grid.spacing_mm == (4.0, 1.5, 2.0)
    text = describe(tmp_path / name)
    assert text["format"] == "BART cfl" and text["coils"] == 2 and text["slices"] == 3
    assert text["sampling"] == k.describe()["sampling"]
    json.dumps(text, allow_nan=False)


def test_cfl_averages_and_echoes(tmp_path):
    both = noise(2, 3, 2, 20, 24)  # [average, echo, coil, phase, read]
    write_cfl(tmp_path / "a", both, (24, 20, 1, 2, 1, 3, *[1] * 8, 2))
    k = read_kspace(tmp_path / "a.cfl", contrast=2)
    assert np.abs(k.data[0].numpy() - both[:, 2].mean(0)).max() < 1e-6
    assert np.array_equal(read_kspace(tmp_path / "a.cfl", average=1).data[0].numpy(), both[1, 0])
    with pytest.raises(BadInput, match="3 entries along echo time"):
        read_kspace(tmp_path / "a.cfl", contrast=3)
    write_cfl(tmp_path / "a", both, (24, 20, 1, 2, 3, 2))
    with pytest.raises(BadInput, match="3 entries along maps"):
        read_kspace(tmp_path / "a.cfl")


def test_cfl_volume(tmp_path):
    kspace = noise(2, 8, 20, 24)  # [coil, partition, phase, read]
    write_cfl(tmp_path / "a", kspace, (24, 20, 8, 2))
    k = read_kspace(tmp_path / "a.cfl")
    assert k.data.shape == (8, 2, 20, 24)
    assert np.abs(k.data.numpy() - ifft(kspace, 1).transpose(1, 0, 2, 3)).max() < 1e-5
    kspace[:, 1::2, ::2] = 0
    write_cfl(tmp_path / "a", kspace, (24, 20, 8, 2))
    k = read_kspace(tmp_path / "a.cfl")
    assert k.data.shape == (24, 2, 8, 20) and k.describe()["sampling"]["acceleration"] == round(4 / 3, 3)
    assert np.abs(k.data.numpy() - ifft(kspace, 3).transpose(3, 0, 1, 2)).max() < 1e-5


@pytest.mark.parametrize("volume", [False, True])
def test_cfl_trajectory(tmp_path, volume):
    r = np.random.default_rng(0)
    points = (r.random((5, 30, 3)) - 0.5) * 16  # [spoke, sample, xyz], cycles per field of view
    points[..., 2] *= volume
    points[0, 0] = (-8, 8, 8 * volume)
    write_cfl(tmp_path / "t", points.astype(np.complex64))
    kspace = noise(2, 5, 30)
    write_cfl(tmp_path / "a", kspace, (1, 30, 5, 2))
    with pytest.raises(BadInput, match="name its trajectory"):
        read_kspace(tmp_path / "a.cfl")
    k = read_kspace(tmp_path / "a.cfl", trajectory=tmp_path / "t.cfl")
    assert k.is_volume is volume and k.trajectories[0].shape == (16,) * (3 if volume else 2)
    want = points.reshape(-1, 3)[:, ::-1] if volume else points.reshape(-1, 3)[:, 1::-1]
    assert np.abs(k.trajectories[0].as_unit("index").numpy() - want).max() < 1e-5
    assert np.array_equal(k.data.numpy().reshape(2, 150), kspace.reshape(2, 150))
    write_cfl(tmp_path / "t", points[:4].astype(np.complex64))
    with pytest.raises(BadInput, match="3 coordinates for every sample"):
        read_kspace(tmp_path / "a.cfl", trajectory=tmp_path / "t.cfl")


@pytest.mark.parametrize(
    "text, why",
    [
        ("# Dimensions\n24 20\n", "claims 24 x 20"),
        ("# Dimensions\n24 20 -1\n", "has sizes"),
        ("# Dimensions\n24 20 1 1e3\n", "has sizes"),
        ("# Dimensions\n\n", "has sizes"),
        ("# Dimensions\n" + "1 " * 17 + "\n", "has sizes"),
        ("# Dimensions\n0 20\n", "positive"),
        ("# Dimensions\n999999999999 999999999999 999999999999\n", "claims"),
        ("# Dimensions\n" + "1" * 5000 + "\n", "has sizes"),
    ],
    ids=range(8),
)
def test_cfl_headers_are_not_believed(tmp_path, text, why):
    write_cfl(tmp_path / "a", noise(2, 5, 30))
    (tmp_path / "a.hdr").write_text(text)
    for name in ("a.hdr", "a.cfl"):
        with pytest.raises(BadInput, match=why) as error:
            read_kspace(tmp_path / name)
        assert "\n" not in str(error.value) and len(str(error.value)) < 500
    (tmp_path / "a.cfl").unlink()
    with pytest.raises(BadInput):
        read_kspace(tmp_path / "a.hdr")


# ---- Siemens -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("new", [True, False], ids=["VD", "VB"])
def test_twix(tmp_path, new):
    """Oblique slices in any order, with blocks that are no lines between; read against the encoding directions."""
    x = noise(3, 2, 20, 24)
    x[..., :6] = x[..., 18:] = 0
    kspace = np.fft.fftshift(np.fft.fft2(np.fft.ifftshift(x, (2, 3)), norm="ortho"), (2, 3)).astype(np.complex64)
    directions, t = rotation()[[1, 0, 2]], Twix(new)  # phase, read and slice are right-handed
    for k, place in ((0, 0.0), (1, 7.0), (2, -7.0)):
        for line in range(20):
            t.add(kspace[k, :, line], line=line, sli=k, position=place * directions[2] + 1, directions=directions)
        t.block(5, 1024)
    t.write(tmp_path / "a.dat")
    k = read_measurement(tmp_path / "a.dat")
    assert k.source_format == "twix" and k.grid.spacing_mm == pytest.approx((7.0, 1.5, 2.0))
    assert np.abs(ifft(k.data.numpy(), 2, 3) - x[[2, 0, 1], :, :, 6:18]).max() < 1e-5
    lps = 1 - (9 - 6) * 2.0 * directions[0] - (3 - 10) * 1.5 * directions[1] + (2 - 1) * 7.0 * directions[2]
    assert np.allclose((k.grid.matrix() @ [9, 3, 2, 1])[:3], lps * np.array([-1, -1, 1]), atol=1e-4)
    whole = read_kspace(tmp_path / "a.dat", crop_readout=False, slices=(1, 2))
    assert np.array_equal(whole.data.numpy(), kspace[:1])
    text = describe(tmp_path / "a.dat")
    assert text["slices"] == 3 and text["coils"] == 2 and text["fov_yx_mm"] == pytest.approx([30.0, 48.0])
    json.dumps(text, allow_nan=False)


def test_twix_noise_of_another_measurement(tmp_path):
    mix = noise(3, 3, seed=5)
    t = Twix()
    for k in range(20):
        t.add(mix @ noise(3, 512, seed=10 + k), flags=(3, 25))
    t.start()
    kspace = noise(1, 3, 20, 24)
    for line in range(20):
        t.add(kspace[0, :, line], line=line)
    t.write(tmp_path / "a.dat")
    k = read_kspace(tmp_path / "a.dat", crop_readout=False)
    assert np.array_equal(k.data.numpy(), kspace)
    want = mix @ mix.conj().T * 15.0 / (5.0 * 0.793)  # 76.8 ms / 512, in tenths of a microsecond
    assert np.abs(k.noise_covariance.numpy() - want).max() < 0.05 * np.abs(want).max()
    assert describe(tmp_path / "a.dat")["noise scans"] == "20 lines"


def test_twix_volume_and_partial_fourier(tmp_path):
    kspace = noise(8, 2, 20, 24)  # [partition, coil, phase, read]
    t = Twix(partitions=8, thickness=32.0)
    for z in range(8):
        for y in range(6, 20):
            t.add(kspace[z, :, y], line=y - 6, partition=z, centre=(4, 4))
    t.write(tmp_path / "a.dat")
    k = read_kspace(tmp_path / "a.dat", crop_readout=False)
    want = ifft(kspace.transpose(1, 0, 2, 3), 1).transpose(1, 0, 2, 3)
    assert k.data.shape == (8, 2, 20, 24) and k.grid.spacing_mm[0] == 4.0
    assert np.abs(k.data.numpy()[:, :, 6:] - want[:, :, 6:]).max() < 1e-5 and k.mask[:6].max() == 0
    assert any("partial Fourier" in note for note in k.notes)


def test_twix_refuses(tmp_path):
    path = tmp_path / "a.dat"
    Twix(trajectory=2).add(noise(2, 24)).write(path)
    with pytest.raises(BadInput, match="not Cartesian"):
        read_kspace(path)
    Twix().write(path)
    with pytest.raises(BadInput, match="no lines"):
        read_kspace(path)
    Twix().add(noise(2, 24), flags=(25,)).write(path)
    with pytest.raises(BadInput, match="no acquisitions of an image"):
        read_kspace(path)
    t = Twix().add(noise(2, 24)).add(noise(2, 24))
    data = t.write(path).read_bytes()
    path.write_bytes(data[:-500])
    with pytest.raises(BadInput, match="truncated"):
        read_kspace(path)
    t.header = t.header.replace("5.0", "nan")
    t.write(path)
    with pytest.raises(BadInput, match="dThickness"):
        read_kspace(path)


def test_measured_phantom_equals_its_copy(data):
    """The raw data of the scanner, and the first coil of them as BART wrote it, sample for sample."""
    twix = read_kspace(data("io/siemens_gre_phantom.dat"), crop_readout=False)
    bart = read_kspace(data("io/siemens_gre_phantom_bart.cfl"))
    assert twix.data.shape == (1, 2, 160, 320) and torch.equal(twix.data[:, :1], bart.data)
    assert twix.grid.spacing_mm == (4.0, 1.25, 1.25)
    middle = (twix.grid.matrix() @ [160, 80, 0, 1])[:3]
    assert np.allclose(middle, [2.5897, -53.9224, -53.9995], atol=1e-3)  # the slice's position, sagittal and so on
    assert read_kspace(data("io/siemens_gre_phantom.dat")).grid.shape == (1, 160, 160)


def test_measured_phantom_equals_another_reader(data):
    twixtools = pytest.importorskip("twixtools")
    theirs = twixtools.read_twix(str(data("io/siemens_gre_phantom.dat")), verbose=False)[-1]["mdb"]
    ours = read_kspace(data("io/siemens_gre_phantom.dat"), crop_readout=False)
    for line in theirs:
        assert np.array_equal(line.data, ours.data[0, :, line.cLin].numpy())

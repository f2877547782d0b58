"""NIfTI: 48 orientations in and out, nibabel as the oracle, scaling, atomic writing, sentences for bad files."""

import gzip
import hashlib
import itertools
import os
import struct

import nibabel as nib
import numpy as np
import pytest
import torch

from recon3d.geometry import VolumeGrid
from recon3d.io import BadInput, demo_volume_path, hu_to_mu, mu_to_hu, read_nifti, read_nifti_header, write_nifti

ORIENTATIONS = [
    "".join(code) for axes in itertools.permutations(("LR", "PA", "IS")) for code in itertools.product(*axes)
]
# dyadic numbers: exact in the float32 sform, so that what is tested is our arithmetic
SPACING = (0.75, 1.25, 2.5)
ORIGIN = (-37.5, 12.25, 104.0)


def oriented(code: str, oblique: bool = False):
    """A stored volume whose axes point to `code`, with values that name their place."""
    shape = (3, 5, 4)
    values = np.arange(60, dtype=np.int16).reshape(shape)
    affine = np.zeros((4, 4))
    for axis, letter in enumerate(code):
        row = "RAS".find(letter)
        sign = 1.0 if row >= 0 else -1.0
        row = row if row >= 0 else "LPI".find(letter)
        affine[row, axis] = sign * SPACING[axis]
    affine[:3, 3], affine[3, 3] = ORIGIN, 1
    if oblique:
        a, b = 0.3, -0.2
        turn = np.array([[np.cos(a), -np.sin(a), 0], [np.sin(a), np.cos(a), 0], [0, 0, 1]]) @ np.array(
            [[1, 0, 0], [0, np.cos(b), -np.sin(b)], [0, np.sin(b), np.cos(b)]]
        )
        affine[:3, :3] = (turn @ affine[:3, :3]).astype(np.float32)
    return values, affine


def world_to_value(values, affine):
    index = np.stack(np.meshgrid(*map(np.arange, values.shape), indexing="ij"), -1).reshape(-1, 3)
    world = index @ affine[:3, :3].T + affine[:3, 3]
    return world, values.reshape(-1)


@pytest.mark.parametrize("oblique", [False, True], ids=["straight", "oblique"])
@pytest.mark.parametrize("code", ORIENTATIONS)
def test_orientation(tmp_path, code, oblique):
    assert len(ORIENTATIONS) == 48
    values, affine = oriented(code, oblique)
    nib.save(nib.Nifti1Image(values, affine), tmp_path / "in.nii.gz")
    volume, grid = read_nifti(tmp_path / "in.nii.gz")
    # x to the left, y to the back, z to the head, spacing along
    assert nib.aff2axcodes(grid.matrix()) == ("L", "P", "S")
    assert np.allclose(np.linalg.norm(grid.matrix()[:3, :3], axis=0)[::-1], grid.spacing_mm)
    # every voxel keeps its place in the world
    want_world, want = world_to_value(values, affine)
    got_world, got = world_to_value(volume.numpy().T, grid.matrix())
    order = np.argsort(got)
    assert np.array_equal(got[order], want)
    assert np.abs(got_world[order] - want_world).max() < 1e-6
    # and written back in the order it came, the file is the same
    write_nifti(tmp_path / "out.nii.gz", volume, grid, orientation=code)
    back = nib.load(tmp_path / "out.nii.gz")
    assert np.abs(back.affine - affine).max() < 1e-6
    assert np.abs(back.get_qform() - affine).max() < 1e-5  # float32 quaternion
    assert np.array_equal(back.get_fdata(), values)
    # in our own order, the affine is ours
    write_nifti(tmp_path / "own.nii", volume, grid)
    own = nib.load(tmp_path / "own.nii")
    assert np.abs(own.affine - grid.matrix()).max() < (1e-5 if oblique else 1e-6)
    assert np.array_equal(own.get_fdata(), volume.numpy().T)


def test_wrong_orientation_is_noticed():
    # the helper above fails for a flipped copy
    values, affine = oriented("RAS")
    world, got = world_to_value(values[::-1], affine)
    want_world, _ = world_to_value(values, affine)
    order = np.argsort(got)
    assert np.abs(world[order] - want_world).max() > 0.5


@pytest.mark.parametrize("dtype", ["u1", "i1", "i2", "u2", "i4", "u4", "i8", "u8", "f4", "f8"])
@pytest.mark.parametrize("order", ["<", ">"])
def test_types_match_nibabel(tmp_path, dtype, order):
    values = np.arange(24).reshape(2, 3, 4).astype(dtype)
    header = nib.Nifti1Header(endianness=order)
    header.set_data_dtype(np.dtype(dtype))
    image = nib.Nifti1Image(values, np.diag([-1.0, -1.0, 1.0, 1.0]), header)
    image.header.set_slope_inter(0.5, -3)
    nib.save(image, tmp_path / "a.nii")
    volume, _ = read_nifti(tmp_path / "a.nii")
    assert np.allclose(volume.numpy().T, nib.load(tmp_path / "a.nii").get_fdata())


def test_nifti2_and_metres(tmp_path):
    image = nib.Nifti2Image(np.ones((2, 3, 4), np.float32), np.diag([0.001, 0.002, 0.003, 1]))
    image.header.set_xyzt_units("meter")
    nib.save(image, tmp_path / "a.nii.gz")
    _, grid = read_nifti(tmp_path / "a.nii.gz")
    assert np.allclose(grid.spacing_mm, (3, 2, 1))


def test_hounsfield_at_the_border(tmp_path):
    grid = VolumeGrid((2, 3, 4), (5, 1, 1))
    mu = torch.linspace(0, 0.06, 24).reshape(2, 3, 4)
    write_nifti(tmp_path / "a.nii.gz", mu, grid, unit="hu", dtype="int16")
    stored = nib.load(tmp_path / "a.nii.gz")
    assert stored.get_data_dtype() == np.int16
    assert stored.get_fdata().min() == -1000
    back, _ = read_nifti(tmp_path / "a.nii.gz", unit="hu")
    assert (mu_to_hu(back) - mu_to_hu(mu)).abs().max() <= 0.5 + 1e-3  # rounded to whole HU
    assert abs(hu_to_mu(0.0) - 0.0193) < 1e-12


@pytest.mark.parametrize("low,high", [(0.0, 0.06), (-3.0, 3.0), (5.0, 5.0), (-1e6, 1e6)])
def test_int16_states_its_slope(tmp_path, low, high):
    grid = VolumeGrid((2, 3, 4), (5, 1, 1))
    volume = torch.linspace(low, high, 24).reshape(2, 3, 4)
    write_nifti(tmp_path / "a.nii", volume, grid, dtype="int16")
    back, _ = read_nifti(tmp_path / "a.nii")
    assert (back - volume).abs().max() <= 0.51 * (high - low) / 65534 + 1e-6 * abs(high)


def test_same_volume_same_bytes(tmp_path):
    grid = VolumeGrid((2, 3, 4), (5, 1, 1))
    for name in "ab":
        write_nifti(tmp_path / f"{name}.nii.gz", torch.ones(2, 3, 4), grid)
    assert (tmp_path / "a.nii.gz").read_bytes() == (tmp_path / "b.nii.gz").read_bytes()


def test_failed_write_leaves_nothing(tmp_path, monkeypatch):
    grid = VolumeGrid((2, 3, 4), (5, 1, 1))
    write_nifti(tmp_path / "a.nii", torch.ones(2, 3, 4), grid)
    before = (tmp_path / "a.nii").read_bytes()

    def full(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_nifti(tmp_path / "a.nii", torch.zeros(2, 3, 4), grid)
    assert [p.name for p in tmp_path.iterdir()] == ["a.nii"]
    assert (tmp_path / "a.nii").read_bytes() == before


@pytest.mark.parametrize(
    "kwargs,match",
    [
        ({"volume": torch.ones(2, 3, 5)}, "shape"),
        ({"volume": torch.full((2, 3, 4), float("nan"))}, "NaN"),
        ({"path": "a.img"}, "must end in"),
        ({"orientation": "LLS"}, "three letters"),
        ({"unit": "mm"}, "unit must be one of"),
    ],
)
def test_writer_refuses(tmp_path, kwargs, match):
    path = tmp_path / kwargs.pop("path", "a.nii")
    with pytest.raises(ValueError, match=match):
        write_nifti(path, kwargs.pop("volume", torch.ones(2, 3, 4)), VolumeGrid((2, 3, 4), (1, 1, 1)), **kwargs)
    assert not list(tmp_path.iterdir())


def patched(offset: int, form: str, *values) -> bytes:
    image = nib.Nifti1Image(np.arange(24, dtype=np.int16).reshape(2, 3, 4), np.diag([-1.0, -1.0, 1.0, 1.0]))
    data = bytearray(image.to_bytes())
    struct.pack_into(form, data, offset, *values)
    return bytes(data)


@pytest.mark.parametrize(
    "data,match",
    [
        (b"hello", "not a NIfTI"),
        (patched(40, "<4h", 3, 0, 3, 4), "must be positive"),
        (patched(40, "<4h", 3, -5, 3, 4), "must be positive"),
        (patched(40, "<4h", 3, 32767, 32767, 32767), "truncated"),
        (patched(40, "<5h", 4, 2, 3, 2, 2), "split"),
        (patched(40, "<3h", 2, 6, 4), "3 dimensions"),
        (patched(70, "<h", 128), "NIfTI type 128"),
        (patched(80, "<f", float("nan")), "pixdim"),
        (patched(80, "<f", 1e6), "unit"),
        (patched(108, "<f", float("inf")), "start at byte"),
        (patched(112, "<f", float("nan")), "scaling"),
        (patched(112, "<f", 1e38), "scaling"),
        (patched(280, "<f", float("nan")), "affine"),
        (patched(280, "<4f", 0, 0, 0, 0), "voxel size"),
        (patched(280, "<12f", 1, 1, 0, 0, 1, 1, 0, 0, 0, 0, 1, 0), "one plane"),
        (patched(344, "4s", b"ni1\0"), "pair"),
        (patched(344, "4s", b"abc\0"), "magic"),
        (patched(0, "<i", 348)[:-3], "truncated"),
    ],
)
@pytest.mark.parametrize("packed", [False, True], ids=["nii", "gz"])
def test_one_sentence(tmp_path, data, match, packed):
    path = tmp_path / "a.nii"
    path.write_bytes(gzip.compress(data) if packed else data)
    with pytest.raises(BadInput, match=match) as caught:
        read_nifti(path)
    text = str(caught.value)
    assert text.startswith(str(path)) and "\n" not in text and len(text) < 400


def test_nan_voxel_is_located(tmp_path):
    values = np.zeros((4, 3, 2), np.float32)
    values[1, 2, 0] = np.nan
    nib.save(nib.Nifti1Image(values, np.diag([-1.0, -1.0, 1.0, 1.0])), tmp_path / "a.nii")
    with pytest.raises(BadInput, match=r"1 NaN .* first at \(0, 2, 1\)"):
        read_nifti(tmp_path / "a.nii")


def test_shipped_volume():
    path = demo_volume_path()
    volume, grid = read_nifti(path, unit="hu")
    assert volume.shape == grid.shape == (48, 256, 256)
    assert grid.spacing_mm == (5.0, 1.140625, 1.140625)
    assert read_nifti_header(path).orientation == "LPS"
    hu = mu_to_hu(volume)
    assert abs(hu.min() + 1024) < 0.01 and abs(hu.max() - 3072) < 0.01
    # shipped as it came, with its licence beside it
    attribution = (path.parent / "ATTRIBUTION.md").read_text()
    assert hashlib.sha256(path.read_bytes()).hexdigest() in attribution
    assert "BSD-3-Clause" in attribution

"""PET images: DICOM series read as pydicom reads them, activity and SUV that survive from file to file."""

from __future__ import annotations

import copy
import shutil

import nibabel as nib
import numpy as np
import pytest
import torch

from recon3d.geometry import VolumeGrid
from recon3d.io import (
    BadInput,
    PETInfo,
    describe,
    read_dicom,
    read_image,
    read_measurement,
    read_mu_map,
    write_activity,
    write_nifti,
)
from recon3d.io.nifti import read_nifti_header

pydicom = pytest.importorskip("pydicom")
pytestmark = pytest.mark.filterwarnings("ignore:Invalid value for VR")


@pytest.fixture
def series(data, tmp_path):
    """The three slices with slopes of their own, in files whose names and numbers are out of order."""
    folder = tmp_path / "series"
    folder.mkdir()
    for k, (name, slope) in enumerate(zip((172, 170, 171), (1.25, 2.0222414, 0.5), strict=True)):
        item = pydicom.dcmread(data(f"io/dicom_pet/pet_{name}.dcm"))
        item.RescaleSlope = slope
        item.InstanceNumber = k
        item.save_as(folder / f"{k}.dcm")
    return folder


def change(folder, name="1.dcm", **tags):
    item = pydicom.dcmread(folder / name)
    for key, value in tags.items():
        if value is None:
            delattr(item, key)
        else:
            setattr(item, key, value)
    item.save_as(folder / name)
    return item


def test_values_and_place_are_those_of_the_file(series):
    found = read_dicom(series)
    assert found.unit == "Bq/mL" and found.modality == "PT" and found.volume.shape == (3, 128, 128)
    for path in series.iterdir():
        item = pydicom.dcmread(path)
        place = np.array([*item.ImagePositionPatient, 1.0]) * [-1, -1, 1, 1]
        k = np.linalg.solve(found.grid.matrix(), place)
        assert np.allclose(k[:2], 0, atol=1e-6)
        expected = (item.pixel_array * float(item.RescaleSlope)).astype(np.float32)
        assert np.array_equal(found.volume[round(k[2])], expected)
    assert found.grid.spacing_mm == pytest.approx((3.375, 3.5378182, 3.5378182))


def test_suv_factor_is_that_computed_by_hand(data):
    found = read_dicom(data("io/dicom_pet"))
    # dose 381.47 MBq at 11:39:00, scan at 13:02:44.678, half-life 6586.2 s, 66.2 kg
    seconds = (13 * 3600 + 2 * 60 + 44.678) - (11 * 3600 + 39 * 60)
    expected = 66.2e3 / (381.47e6 * np.exp(-np.log(2) * seconds / 6586.2))
    assert found.suv_factor == pytest.approx(expected, rel=1e-9)
    assert found.notes == ()  # so the file's own decay factor agrees with the start taken


def test_suv_agrees_with_the_volume_converted_elsewhere(data):
    """The same patient lies in the data as SUV, rounded to 0.01 and cut; the brightest slice has the same maximum."""
    found = read_dicom(data("io/dicom_pet"))
    other = nib.load(data("pet/pet_wb_qinhn0024.nii.gz"))
    place = (np.linalg.inv(other.affine) @ found.grid.matrix() @ [0, 0, 1, 1])[2]
    assert place == pytest.approx(round(place), abs=0.02)
    mine = float(found.volume[1].max()) * found.suv_factor
    theirs = float(np.asarray(other.dataobj[:, :, round(place)]).max())
    assert mine == pytest.approx(theirs, rel=0.01, abs=0.02)


def test_one_file_finds_its_series(series, data):
    alone = read_dicom(series / "1.dcm")
    assert torch.equal(alone.volume, read_dicom(series).volume)
    shutil.copy(data("io/dicom_small/CT_small.dcm"), series / "ct.dcm")
    (series / "damaged.dcm").write_bytes((series / "1.dcm").read_bytes()[:300])
    found = read_dicom(series / "1.dcm")
    assert torch.equal(found.volume, alone.volume)
    with pytest.raises(BadInput):
        read_dicom(series)
    (series / "damaged.dcm").unlink()
    with pytest.raises(BadInput, match="2 series of"):
        read_dicom(series)


@pytest.mark.parametrize(
    ("tags", "message"),
    [
        ({"ImagePositionPatient": [-226.13246, -425.88375, -682.0]}, "mm apart"),
        ({"ImagePositionPatient": [-226.13246, -425.88375, -682.334]}, "one position"),
        ({"ImageOrientationPatient": [0.98, 0.199, 0, -0.199, 0.98, 0]}, "another orientation"),
        ({"PixelSpacing": [3.0, 3.0]}, "another pixel spacing"),
        ({"PixelSpacing": [0.0, 3.0]}, "another pixel spacing"),
        ({"Rows": 64}, "different Rows"),
        ({"FrameOfReferenceUID": "1.2.3"}, "different FrameOfReferenceUID"),
        ({"Units": "CNTS"}, "different Units"),
        ({"RescaleSlope": 0.0}, "RescaleSlope"),
        ({"RescaleSlope": "nan"}, "scaling"),
        ({"PixelData": b"\0" * 1000}, "bytes of pixels"),
        ({"SamplesPerPixel": 3}, "samples"),
        ({"NumberOfFrames": 4}, "4 frames"),
        ({"Modality": "US"}, "modality"),
        ({"ImagePositionPatient": None}, "ImagePositionPatient"),
    ],
)
def test_series_that_cannot_be(series, tags, message):
    change(series, **tags)
    with pytest.raises(BadInput, match=message) as error:
        read_dicom(series)
    assert "\n" not in str(error.value)


def test_tilted_and_deflated_series_are_refused(series, tmp_path):
    for k in range(3):
        item = pydicom.dcmread(series / f"{k}.dcm")
        x, y, z = item.ImagePositionPatient
        change(series, f"{k}.dcm", ImagePositionPatient=[x, y + 0.7 * (z + 685), z])
    with pytest.raises(BadInput, match="tilt"):
        read_dicom(series)
    item = pydicom.dcmread(series / "0.dcm")
    item.file_meta.TransferSyntaxUID = pydicom.uid.DeflatedExplicitVRLittleEndian
    item.save_as(tmp_path / "d.dcm")
    with pytest.raises(BadInput, match="deflated"):
        read_dicom(tmp_path / "d.dcm")


@pytest.mark.parametrize(
    ("tags", "note"),
    [
        ({"DecayCorrection": "NONE"}, "decay correction"),
        ({"PatientWeight": None}, "SUV is left out"),
        ({"PatientWeight": "66200"}, "written in g"),
        ({"SeriesTime": "150000"}, "lies after the acquisition"),
    ],
)
def test_doubts_about_suv_are_told(series, tags, note):
    for k in range(3):
        change(series, f"{k}.dcm", **tags)
    found = read_dicom(series)
    assert any(note in n for n in found.notes)
    if "SeriesTime" not in tags:
        assert found.suv_factor is None


def test_decay_to_the_injection(series):
    for k in range(3):
        change(series, f"{k}.dcm", DecayCorrection="ADMIN")
    assert read_dicom(series).suv_factor == pytest.approx(66.2e3 / 381.47e6)


def test_overlay_bits_and_other_modalities(data, tmp_path):
    ct = read_dicom(data("io/dicom_small/CT_small.dcm"))
    item = pydicom.dcmread(data("io/dicom_small/CT_small.dcm"))
    assert ct.unit == "HU" and np.array_equal(ct.volume[0], item.pixel_array * 1.0 - 1024)
    for name in ("MR_small", "MR_small_bigendian"):
        folder = tmp_path / name
        folder.mkdir()
        shutil.copy(data(f"io/dicom_small/{name}.dcm"), folder)
        mr = read_dicom(folder)
        item = pydicom.dcmread(folder / f"{name}.dcm")
        assert mr.unit == "au" and np.array_equal(
            np.sort(mr.volume.flatten()), np.sort(item.pixel_array.astype("f4").ravel())
        )
    # 12 of 16 bits are the pixel, an overlay lies above
    item = copy.deepcopy(pydicom.dcmread(data("io/dicom_pet/pet_170.dcm")))
    raw = np.clip(item.pixel_array, 0, 2047).astype("<u2")
    item.PixelData = (raw | 0x8000).tobytes()
    item.BitsStored, item.HighBit = 12, 11
    (tmp_path / "o").mkdir()
    item.save_as(tmp_path / "o" / "o.dcm")
    assert np.array_equal(read_dicom(tmp_path / "o").volume[0], (raw * float(item.RescaleSlope)).astype("f4"))


def test_describe_and_dispatch(series):
    assert describe(series)["files"] == 3 and describe(series / "0.dcm")["unit"] == "Bq/mL"
    with pytest.raises(BadInput, match="image volume"):
        read_measurement(series)


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz", "a.hv"])
@pytest.mark.parametrize("dtype", ["float32", "int16"])
def test_activity_survives_from_file_to_file(data, tmp_path, name, dtype):
    found = read_dicom(data("io/dicom_pet"))
    grid = found.grid if name != "a.hv" else VolumeGrid(found.grid.shape, found.grid.spacing_mm)
    write_activity(tmp_path / name, found.volume, grid, info=found.info, dtype=dtype)
    volume, place, unit = read_image(tmp_path / name)
    assert unit == "Bq/mL"
    assert np.allclose(place.matrix(), grid.matrix(), atol=1e-3)
    total = float(found.volume.sum(dtype=torch.float64))
    assert float(volume.sum(dtype=torch.float64)) == pytest.approx(total, rel=1e-3)
    assert float((volume - found.volume).abs().max()) <= 1e-3 * float(found.volume.max())
    if dtype == "float32":
        assert torch.equal(volume, found.volume)


def test_suv_in_nifti(data, tmp_path):
    found = read_dicom(data("io/dicom_pet"))
    write_activity(tmp_path / "s.nii.gz", found.volume, found.grid, unit="SUV", info=found.info)
    volume, _, unit = read_image(tmp_path / "s.nii.gz")
    header = read_nifti_header(tmp_path / "s.nii.gz")
    assert unit == "SUV" and header.intent == "SUV" and header.description == "recon3d, SUV"
    assert torch.allclose(volume, found.volume * found.suv_factor)
    with pytest.raises(ValueError, match="needs suv_factor"):
        write_activity(tmp_path / "s.nii.gz", found.volume, found.grid, unit="SUV", info=PETInfo())


def test_hu_become_attenuation(tmp_path):
    pytest.importorskip("recon3d.operators.attenuation")
    grid = VolumeGrid((1, 2, 3), (2.0, 2.0, 2.0))
    hu = torch.tensor([[[-1000.0, 0.0, 40.0], [1000.0, -500.0, 20.0]]])
    write_nifti(tmp_path / "ct.nii", hu, grid, label="HU")
    mu, _, notes = read_mu_map(tmp_path / "ct.nii")
    assert float(mu[0, 0, 0]) == 0 and float(mu[0, 0, 1]) == pytest.approx(0.0096, rel=0.01) and notes == ()


def test_ct_series_becomes_attenuation(data):
    pytest.importorskip("recon3d.operators.attenuation")
    path = data("io/dicom_small/CT_small.dcm")
    mu, grid, _ = read_mu_map(path)
    hu = read_dicom(path).volume
    assert mu.shape == grid.shape and float(mu.min()) >= 0
    near = (hu - 0).abs() < 3  # water
    assert float(mu[near].mean()) == pytest.approx(0.0096, rel=0.01)
    with pytest.raises(BadInput, match="series of PT"):
        read_mu_map(data("io/dicom_pet"))

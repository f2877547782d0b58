"""What training reads, and the sentences for folders that cannot be trained on."""

from __future__ import annotations

import h5py
import nibabel
import numpy as np
import pytest
import torch
from training_runs import config, discs, raw, save

from recon3d.io import BadInput
from recon3d.priors import load_prior
from recon3d.priors.training import train
from recon3d.priors.training.data import SliceData
from recon3d.priors.training.volumes import load_volume

LPS = np.diag([-1.0, -1.0, 3.0, 1.0])


def _with(tmp_path, **data):
    settings = raw(tmp_path)
    return settings | {"data": {**settings["data"], **data}}


# ---------------------------------------------------------------- arrays


@pytest.mark.parametrize("kind", ["npy", "npz", "h5"])
def test_arrays_are_read_as_they_lie(tmp_path, kind):
    hu = discs(5).T  # z, y, x
    file = tmp_path / f"a.{kind}"
    if kind == "npy":
        np.save(file, hu)
    elif kind == "npz":
        np.savez(file, volume=hu)
    else:
        with h5py.File(file, "w") as h5:
            h5["volume"] = hu
    settings = _with(tmp_path, sources=[{"path": f"*.{kind}", "spacing_mm": [3.0, 1.0, 1.5]}])
    data = SliceData(config(settings))
    assert [v.name for v in data.volumes] == ["a"]
    assert np.allclose(data.volumes[0].values.numpy(), hu / 1000)
    assert data.volumes[0].spacing_mm == (3.0, 1.0, 1.5)


def test_the_array_that_is_named_is_taken(tmp_path):
    np.savez(tmp_path / "a.npz", other=np.zeros((2, 2)), ct=discs(5).T)
    source = {"path": "a.npz", "spacing_mm": [3, 1, 1], "dataset": "ct"}
    assert SliceData(config(_with(tmp_path, sources=[source]))).volumes[0].values.shape == (6, 36, 40)
    with pytest.raises(BadInput, match="has no array volume"):
        SliceData(config(_with(tmp_path, sources=[source | {"dataset": None}])))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (np.zeros((4, 4), np.float32), "expected numbers"),
        (np.array([["a"]]), "expected numbers|not a readable"),
        (np.array([[[{}]]]), "not a readable npy array"),
        (b"\x93NUMPY cut", "not a readable npy array"),
    ],
)
def test_arrays_that_cannot_be_read(tmp_path, content, says):
    if isinstance(content, bytes):
        (tmp_path / "a.npy").write_bytes(content)
    else:
        np.save(tmp_path / "a.npy", content, allow_pickle=True)
    with pytest.raises(ValueError, match=says):
        SliceData(config(_with(tmp_path, sources=[{"path": "a.npy", "spacing_mm": [3, 1, 1]}])))


def test_an_array_needs_its_spacing(tmp_path):
    np.save(tmp_path / "a.npy", discs(5).T)
    with pytest.raises(ValueError, match=r"does not say its spacing; give spacing_mm"):
        SliceData(config(_with(tmp_path, sources=[{"path": "a.npy"}])))


# ---------------------------------------------------------------- DICOM


def test_a_folder_of_dicom_is_a_volume(tmp_path):
    pytest.importorskip("pydicom")
    hu = discs(5).T.round()
    folder = tmp_path / "series"
    folder.mkdir()
    for z, plane in enumerate(hu):
        _dicom(folder / f"{z}.dcm", plane.astype(np.int16), z)
    for pattern in ("series", "series/*.dcm"):
        data = SliceData(config(_with(tmp_path, sources=[{"path": pattern}])))
        assert [v.name for v in data.volumes] == ["series"]
        assert np.allclose(data.volumes[0].values.numpy(), hu / 1000, atol=1e-5)
        assert data.volumes[0].spacing_mm == pytest.approx((3.0, 1.0, 1.0))


def _dicom(path, plane, z):
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian

    meta = FileMetaDataset()
    meta.TransferSyntaxUID, meta.MediaStorageSOPClassUID = ExplicitVRLittleEndian, CTImageStorage
    meta.MediaStorageSOPInstanceUID = f"1.2.3.{z + 1}"
    ds = FileDataset(path, {}, file_meta=meta, preamble=b"\0" * 128)
    ds.SOPClassUID, ds.SOPInstanceUID, ds.SeriesInstanceUID = CTImageStorage, f"1.2.3.{z + 1}", "1.2.3"
    ds.Modality, ds.Rows, ds.Columns = "CT", *plane.shape
    ds.PixelSpacing, ds.SliceThickness = [1.0, 1.0], 3.0
    ds.ImagePositionPatient, ds.ImageOrientationPatient = [0.0, 0.0, 3.0 * z], [1, 0, 0, 0, 1, 0]
    ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 16, 15, 1
    ds.RescaleSlope, ds.RescaleIntercept = 1, 0
    ds.PixelData = plane.tobytes()
    ds.save_as(path)


# ---------------------------------------------------------------- channels and complex values

MAGNITUDES = {"clip": [0, 1e9], "file_scale": 1.0, "percentile": 99.0, "background": 0, "least_mean": 0.02}
PLAIN = {"native_share": 1.0, "gain_jitter": 0.0, "offset_jitter": 0.0, "flip_rows": 0.0}


def test_channels_stay_together(tmp_path):
    """The second channel is a function of the first; it is in every crop, and a prior of two channels comes out."""
    for k, name in enumerate(("train0", "train1", "held")):
        hu = discs(k)
        both = np.stack([hu, -0.5 * hu], axis=-1).astype(np.int16)
        nibabel.save(nibabel.Nifti1Image(both, LPS), tmp_path / f"{name}.nii.gz")
    (tmp_path / "other").mkdir()
    settings = raw(tmp_path / "other")
    data = {"root": str(tmp_path), "sources": [{"path": "*.nii.gz"}], "channels": 2, "offset_jitter": 0.0}
    settings |= {"data": {**settings["data"], **data, "background": 0.0}, "steps": 2}
    settings["network"] |= {"in_channels": 2, "out_channels": 2}
    clean, _, noise = SliceData(config(settings)).batch(0)
    assert clean.shape == noise.shape == (4, 2, 16, 16)
    settings["data"] |= PLAIN
    drawn = SliceData(config(settings))
    for step in range(3):
        clean = drawn.batch(step)[0]
        assert torch.allclose(clean[:, 1], -0.5 * clean[:, 0], atol=1e-3) and float(clean.std()) > 0
    assert load_prior(train(config(settings)).prior).card.channels == 2
    with pytest.raises(ValueError, match=r"expected a volume of 3 channels"):
        settings["network"] |= {"in_channels": 3, "out_channels": 3}
        SliceData(config(settings | {"data": {**settings["data"], "channels": 3}}))


def test_complex_values_keep_their_phase(tmp_path):
    """Crops of a complex volume are it, up to one phase for all pixels; its own scale is that of its magnitude."""
    settings = raw(tmp_path)
    magnitude = (discs(1).T + 1000).clip(0)
    x = np.linspace(0, 3, magnitude.shape[-1])
    values = (magnitude * np.exp(1j * x)).astype(np.complex64)
    for name in ("c", "h"):
        np.save(tmp_path / f"{name}.npy", values)
    settings["network"] |= {"in_channels": 2, "out_channels": 2}
    source = {"path": "c.npy", "spacing_mm": [3, 1, 1]}
    data = {"sources": [source], "complex": True, "validation": "h.npy"}
    settings |= {"data": {**settings["data"], **MAGNITUDES, **PLAIN, **data}}
    loaded = SliceData(config(settings))
    volume = loaded.volumes[0].values.unflatten(0, (-1, 2))
    own = torch.complex(volume[:, 0], volume[:, 1])
    assert float(np.percentile(own.abs().numpy(), 99)) == pytest.approx(1, abs=1e-4)
    windows = own.unfold(1, 16, 1).unfold(2, 16, 1).flatten(0, 2)
    for step in range(2):
        for crop in loaded.batch(step)[0]:
            z = torch.complex(crop[0], crop[1])
            best = 0.0
            for turned in (z, z.flip(1)):
                inner = (windows.conj() * turned).sum((1, 2)).abs()
                best = max(
                    best, float((inner / (windows.abs().square().sum((1, 2)).sqrt() * turned.norm() + 1e-9)).max())
                )
            assert best > 1 - 1e-4  # Cauchy and Schwarz: equal up to a factor
    with pytest.raises(ValueError, match="complex values need complex: true"):
        load_volume(tmp_path / "c.npy", config(raw(tmp_path)).data, source=config(settings).data.sources[0])


# ---------------------------------------------------------------- what cannot be trained on


def test_constant_images(tmp_path):
    save(tmp_path / "train1.nii.gz", np.full((40, 36, 6), 7.0))
    with pytest.raises(ValueError, match=r"train1\.nii\.gz: every voxel is 7; a constant image"):
        settings = raw(tmp_path)
        save(tmp_path / "train1.nii.gz", np.full((40, 36, 6), 7.0))
        SliceData(config(settings))


@pytest.mark.parametrize(("factor", "shift"), [(1e-5, 0.02), (1.0, 9000.0), (1000.0, 0.0)])
def test_values_of_another_unit(tmp_path, factor, shift):
    """1/mm, a shifted and a scaled image where HU are said."""
    settings = raw(tmp_path)
    values = discs(1) * factor + shift
    nibabel.save(nibabel.Nifti1Image(values.astype(np.float32), LPS), tmp_path / "train1.nii.gz")
    with pytest.raises(ValueError, match=r"train1\.nii\.gz: values from .* far from what the configuration says"):
        SliceData(config(settings))


def test_mixed_spacings(tmp_path):
    settings = raw(tmp_path)
    save(tmp_path / "train1.nii.gz", discs(1), (4.0, 4.0, 4.0))
    with pytest.raises(
        ValueError, match=r"'\*\.nii\.gz' mixes spacings: pixels of 1 mm \(train0\) and 4 mm \(train1\)"
    ):
        SliceData(config(settings))
    apart = [{"path": "train0.nii.gz"}, {"path": "train1.nii.gz"}]
    assert len(SliceData(config(settings | {"data": {**settings["data"], "sources": apart}})).volumes) == 2


def test_mixed_orientations(tmp_path):
    settings = raw(tmp_path)
    save(tmp_path / "train1.nii.gz", discs(1, (40, 36, 32)), (1.0, 2.5, 1.0))
    with pytest.raises(ValueError, match=r"mixes orientations: it has thick axial ones \(train0\) and coronal ones"):
        SliceData(config(settings))


def test_images_smaller_than_the_stride(tmp_path):
    settings = raw(tmp_path)
    settings["network"] |= {"channels": [8] * 7}
    settings["crops"] = [{"size": 64, "batch": 1}]
    with pytest.raises(ValueError, match=r"slices of 36 x 40 are smaller than the network's stride of 64"):
        SliceData(config(settings))

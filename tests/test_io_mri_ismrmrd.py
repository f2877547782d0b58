"""ISMRMRD: acquisitions sorted by their headers, placed in the patient, with noise, averages and trajectories."""

import json

import h5py
import numpy as np
import pytest
import torch
from mri_files import Acquisitions, ismrmrd_header

from recon3d.io import BadInput, describe, read_kspace, read_nifti, write_nifti


def noise(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.complex64, generator=torch.Generator().manual_seed(seed)).numpy()


def ifft(x, *axes):
    return np.fft.fftshift(np.fft.ifftn(np.fft.ifftshift(x, axes), axes=axes, norm="ortho"), axes)


def rotation(seed=3):
    q, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(3, 3)))
    return q * np.sign(np.linalg.det(q))


def stack(kspace, lines=None, directions=None, gap=6.0, centre=(3.0, -8.0, 12.0), order=None, **more):
    """Acquisitions of [slice, coil, phase, read]."""
    out = Acquisitions()
    n, _, ny, _ = kspace.shape
    for k in order or range(n):
        position = None
        if directions is not None:
            position = np.asarray(centre) + gap * (k - n // 2) * directions[2]
        for line in range(ny) if lines is None else lines:
            more_idx = {"slice": k, "kspace_encode_step_1": line, **more}
            out.add(kspace[k, :, line], position=position, directions=directions, **more_idx)
    return out


def test_lines_are_sorted_and_the_readout_is_cut(tmp_path):
    x = noise(3, 2, 20, 24)
    x[..., :6] = x[..., 18:] = 0
    kspace = np.fft.fftshift(np.fft.fft2(np.fft.ifftshift(x, (2, 3)), norm="ortho"), (2, 3))
    a = stack(kspace)
    order = np.random.default_rng(0).permutation(len(a.heads))
    a.heads, a.data, a.traj = ([part[k] for k in order] for part in (a.heads, a.data, a.traj))
    a.write(tmp_path / "a.h5", ismrmrd_header())
    k = read_kspace(tmp_path / "a.h5")
    assert k.source_format == "ismrmrd" and k.mask.min() == 1 and k.grid.spacing_mm == (5.0, 1.5, 2.0)
    assert np.abs(ifft(k.data.numpy(), 2, 3) - x[..., 6:18]).max() < 1e-5
    whole = read_kspace(tmp_path / "a.h5", crop_readout=False, slices=(1, 2))
    assert np.abs(whole.data.numpy() - kspace[1:2]).max() < 1e-6
    text = describe(tmp_path / "a.h5")
    assert text["coils"] == 2 and text["slices"] == 3 and text["sampling"]["kind"] == "fully sampled"
    json.dumps(text, allow_nan=False)


def test_undersampled_lines_and_shifted_centre(tmp_path):
    kspace = noise(1, 2, 20, 24)
    lines = [1, 4, 7, 8, 9, 10, 13]
    a = stack(kspace, lines)
    a.write(tmp_path / "a.h5", ismrmrd_header(centres=(8, 0)))
    k = read_kspace(tmp_path / "a.h5", crop_readout=False)
    assert np.flatnonzero(k.mask[:, 0]).tolist() == [line + 2 for line in lines]  # line 8 becomes the middle, 10
    assert np.array_equal(k.data[0, :, 6].numpy(), kspace[0, :, 4])
    sampling = describe(tmp_path / "a.h5")["sampling"]
    assert sampling["acceleration"] == round(20 / 7, 3) and sampling["calibration"] == "4 lines of 20"
    assert k.describe()["sampling"] == sampling
    a.write(tmp_path / "a.h5", ismrmrd_header(centres=(0, 0)))
    with pytest.raises(BadInput, match="lines 11 to 23 of phase on a matrix of 20"):
        read_kspace(tmp_path / "a.h5")


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_every_voxel_is_where_the_header_says(tmp_path, seed):
    """An oblique stack, written out of order: affine @ voxel is position plus steps along the directions, in RAS."""
    directions = rotation(seed)
    kspace = noise(4, 1, 20, 24)
    a = stack(kspace, directions=directions, order=[2, 0, 3, 1])
    a.write(tmp_path / "a.h5", ismrmrd_header())
    k = read_kspace(tmp_path / "a.h5")
    assert k.grid.shape == (4, 20, 12) and k.grid.spacing_mm == pytest.approx((6.0, 1.5, 2.0))
    matrix = k.grid.matrix()
    centre, ras = np.array([3.0, -8.0, 12.0]), np.array([-1, -1, 1])
    for x, y, z in ((6, 10, 2), (0, 0, 0), (11, 3, 3)):
        lps = centre + (x - 6) * 2.0 * directions[0] + (y - 10) * 1.5 * directions[1] + (z - 2) * 6.0 * directions[2]
        assert np.allclose((matrix @ [x, y, z, 1])[:3], lps * ras, atol=1e-4)
    part = read_kspace(tmp_path / "a.h5", slices=(1, 3))
    assert np.allclose((part.grid.matrix() @ [6, 10, 1, 1])[:3], centre * ras, atol=1e-4)
    # and a volume written there comes back there
    volume = torch.arange(4 * 20 * 12, dtype=torch.float32).reshape(4, 20, 12)
    write_nifti(tmp_path / "v.nii", volume, k.grid)
    back, grid = read_nifti(tmp_path / "v.nii")
    at = (volume == 500).nonzero()[0].tolist()[::-1]
    there = (back == 500).nonzero()[0].tolist()[::-1]
    assert np.allclose(matrix @ [*at, 1], grid.matrix() @ [*there, 1], atol=1e-3)


def test_siemens_encodes_with_the_other_sign(tmp_path):
    """Its image runs against readout and phase encoding, while slices lie where their positions are."""
    directions, kspace = rotation(5), noise(4, 1, 20, 24)
    a = stack(kspace, directions=directions)
    a.write(tmp_path / "a.h5", ismrmrd_header(system="<systemVendor>SIEMENS</systemVendor>"))
    k = read_kspace(tmp_path / "a.h5")
    centre = np.array([3.0, -8.0, 12.0])
    lps = centre - (9 - 6) * 2.0 * directions[0] - (3 - 10) * 1.5 * directions[1] + (3 - 2) * 6.0 * directions[2]
    assert np.allclose((k.grid.matrix() @ [9, 3, 3, 1])[:3], lps * np.array([-1, -1, 1]), atol=1e-4)
    assert any("Siemens" in note for note in k.notes)


def test_slices_are_put_in_spatial_order(tmp_path):
    """Interleaved: slice 0 lies in the middle."""
    kspace, directions = noise(3, 1, 20, 24), rotation()
    a = Acquisitions()
    for k, place in ((0, 0.0), (1, 7.0), (2, -7.0)):
        for line in range(20):
            a.add(
                kspace[k, :, line],
                position=place * directions[2],
                directions=directions,
                slice=k,
                kspace_encode_step_1=line,
            )
    a.write(tmp_path / "a.h5", ismrmrd_header())
    k = read_kspace(tmp_path / "a.h5", crop_readout=False)
    assert np.array_equal(k.data.numpy(), kspace[[2, 0, 1]]) and k.grid.spacing_mm[0] == pytest.approx(7.0)
    assert any("spatial order" in note for note in k.notes)


def test_flags_contrasts_and_averages(tmp_path):
    kspace = noise(1, 2, 20, 24)
    extra = noise(1, 2, 20, 24, seed=1)
    a = Acquisitions()
    for line in range(20):
        for average, sign in ((0, 1), (1, -1)):
            a.add(kspace[0, :, line] + sign * extra[0, :, line], kspace_encode_step_1=line, average=average)
        a.add(extra[0, :, line], kspace_encode_step_1=line, contrast=3)
    a.add(noise(2, 24), flags=[24], kspace_encode_step_1=5)
    a.add(noise(2, 24), flags=[23], kspace_encode_step_1=6)
    a.write(tmp_path / "a.h5", ismrmrd_header())
    k = read_kspace(tmp_path / "a.h5", crop_readout=False)
    assert np.abs(k.data.numpy() - kspace).max() < 1e-6
    for words in ("phase correction", "navigators", "contrast 0 of 2", "mean of 2 averages"):
        assert any(words in note for note in k.notes), words
    second = read_kspace(tmp_path / "a.h5", crop_readout=False, contrast=1)
    assert np.array_equal(second.data.numpy(), extra)
    one = read_kspace(tmp_path / "a.h5", crop_readout=False, average=1)
    assert np.abs(one.data.numpy() - (kspace - extra)).max() < 1e-6
    with pytest.raises(BadInput, match="has 2 contrasts"):
        read_kspace(tmp_path / "a.h5", contrast=2)


@pytest.mark.parametrize("mode", ["embedded", "separate"])
def test_calibration_lines(tmp_path, mode):
    kspace = noise(1, 2, 20, 24)
    a = stack(kspace, range(0, 20, 2))
    a.add(kspace[0, :, 9], flags=[20], kspace_encode_step_1=9)
    extra = f"<parallelImaging><calibrationMode>{mode}</calibrationMode></parallelImaging>"
    a.write(tmp_path / "a.h5", ismrmrd_header(extra=extra))
    k = read_kspace(tmp_path / "a.h5", crop_readout=False)
    assert bool(k.mask[9, 0]) is (mode == "embedded")


def test_reversed_lines(tmp_path):
    kspace = noise(1, 2, 20, 24)
    a = Acquisitions()
    for line in range(20):
        back = line % 2
        a.add(kspace[0, :, line, :: -1 if back else 1], flags=[22] if back else [], kspace_encode_step_1=line)
    a.write(tmp_path / "a.h5", ismrmrd_header(kind="epi"))
    k = read_kspace(tmp_path / "a.h5", crop_readout=False)
    assert np.array_equal(k.data.numpy(), kspace) and any("ghosts" in note for note in k.notes)


def test_noise_covariance(tmp_path):
    """Coils whose noise is mixed: the covariance is that of an image sample, whose dwell time is half as long."""
    mix = noise(3, 3, seed=5)
    a = stack(noise(1, 3, 20, 24))
    for k in range(8):
        a.add(mix @ noise(3, 2000, seed=10 + k), flags=[19], dwell=10.0)
    a.write(
        tmp_path / "a.h5",
        ismrmrd_header(system="<relativeReceiverNoiseBandwidth>0.8</relativeReceiverNoiseBandwidth>"),
    )
    k = read_kspace(tmp_path / "a.h5")
    want = mix @ mix.conj().T * 10 / (5 * 0.8)
    assert k.data.shape[1] == 3
    assert np.abs(k.noise_covariance.numpy() - want).max() < 0.05 * np.abs(want).max()
    assert describe(tmp_path / "a.h5")["noise scans"] == "8 acquisitions"


def test_partial_echo_is_placed_and_not_cut(tmp_path):
    kspace = noise(1, 2, 20, 24)
    a = Acquisitions()
    for line in range(20):
        a.add(kspace[0, :, line, 6:], kspace_encode_step_1=line, centre=6)
    a.write(tmp_path / "a.h5", ismrmrd_header())
    k = read_kspace(tmp_path / "a.h5")
    assert np.array_equal(k.data.numpy()[..., 6:], kspace[..., 6:]) and k.mask[:, :6].max() == 0
    assert any("not cut" in note for note in k.notes) and any("partial Fourier" in note for note in k.notes)
    with pytest.raises(BadInput, match="readout whole"):
        read_kspace(tmp_path / "a.h5", crop_readout=True)


@pytest.mark.parametrize("undersampled", [False, True])
def test_three_dimensional_encoding(tmp_path, undersampled):
    """k-space [partition, coil, phase, read] of an image; slices along partitions, or across the readout."""
    directions, nz = rotation(4), 8
    x = noise(nz, 2, 20, 24)
    x[..., :6] = x[..., 18:] = 0
    kspace = np.moveaxis(x, 1, 0)
    kspace = np.fft.fftshift(np.fft.fftn(np.fft.ifftshift(kspace, (1, 2, 3)), axes=(1, 2, 3), norm="ortho"), (1, 2, 3))
    a, centre = Acquisitions(), np.array([5.0, 6.0, 7.0])
    for z in range(nz):
        for y in range(20):
            if not undersampled or (y + z) % 3:
                steps = {"kspace_encode_step_1": y, "kspace_encode_step_2": z}
                a.add(kspace[:, z, y], position=centre, directions=directions, **steps)
    xml = ismrmrd_header((24, 20, nz), (48.0, 30.0, 32.0), (12, 20, nz), (24.0, 30.0, 32.0), centres=(10, nz // 2))
    a.write(tmp_path / "a.h5", xml)
    k = read_kspace(tmp_path / "a.h5")
    ras = np.array([-1, -1, 1])
    if undersampled:
        assert k.data.shape == (12, 2, nz, 20) and k.grid.spacing_mm == pytest.approx((2.0, 4.0, 1.5))
        full = kspace.transpose(1, 0, 2, 3)  # [z, coil, y, x]
        want = ifft(full, 3)[..., 6:18].transpose(3, 1, 0, 2)
        assert np.abs(k.data.numpy() - want * k.mask.numpy()).max() < 1e-5
        assert k.mask[0, 0] == 0 and k.mask[0, 1] == 1
        at = (3, 5, 9)  # phase, partition, read
        lps = centre + (3 - 10) * 1.5 * directions[1] + (5 - 4) * 4.0 * directions[2] + (9 - 6) * 2.0 * directions[0]
    else:
        assert k.data.shape == (nz, 2, 20, 12)
        assert np.abs(ifft(k.data.numpy(), 2, 3) - x[..., 6:18]).max() < 1e-5
        at = (9, 3, 5)
        lps = centre + (9 - 6) * 2.0 * directions[0] + (3 - 10) * 1.5 * directions[1] + (5 - 4) * 4.0 * directions[2]
    assert np.allclose((k.grid.matrix() @ [*at, 1])[:3], lps * ras, atol=1e-4)


def radial(tmp_path, slices=1, partitions=1, dims=2, seed=0, **header):
    r = np.random.default_rng(seed)
    a = Acquisitions()
    kept, traj = [], []
    for k in range(slices):
        for z in range(partitions):
            for spoke in range(5):
                angle = spoke * 1.1
                line = np.linspace(-0.5, 0.49, 32)
                points = np.stack([line * np.cos(angle), line * np.sin(angle), r.random(32) * 0.4][:dims], 1)
                samples = noise(2, 32, seed=1000 * k + 100 * z + spoke)
                a.add(samples, points, slice=k, kspace_encode_step_1=spoke, kspace_encode_step_2=z)
                kept.append(samples)
                traj.append(points)
    xml = ismrmrd_header(
        (32, 5, header.pop("nz", partitions)),
        (64.0, 64.0, 8.0),
        header.pop("recon", (16, 16, partitions)),
        (32.0, 32.0, 8.0),
        centres=(0, partitions // 2),
        kind="radial",
    )
    a.write(tmp_path / "a.h5", xml)
    return np.array(kept), np.array(traj)


def test_radial_slices(tmp_path):
    samples, traj = radial(tmp_path, slices=2)
    k = read_kspace(tmp_path / "a.h5")
    assert k.data.shape == (2, 2, 160) and len(k.trajectories) == 1 and k.grid.spacing_mm[1:] == (2.0, 2.0)
    assert np.array_equal(k.data[1, 0].numpy(), samples[5:, 0].reshape(-1))
    points = k.trajectories[0].as_unit("cycles").numpy()
    assert np.abs(points - traj[:5].reshape(-1, 2)[:, ::-1]).max() < 1e-6  # (y, x) here, (x, y) in the file
    assert any("cycles per pixel" in note for note in k.notes)
    assert read_kspace(tmp_path / "a.h5", matrix=(20, 24)).grid.shape == (2, 20, 24)


def test_radial_stack_and_volume(tmp_path):
    samples, _ = radial(tmp_path, partitions=4)
    k = read_kspace(tmp_path / "a.h5")
    want = ifft(samples.reshape(4, 5, 2, 32), 0).transpose(0, 2, 1, 3).reshape(4, 2, 160)
    assert k.data.shape == (4, 2, 160) and np.abs(k.data.numpy() - want).max() < 1e-5
    samples, _ = radial(tmp_path, dims=3, nz=8, recon=(16, 16, 8))
    k = read_kspace(tmp_path / "a.h5", trajectory_unit="cycles")
    assert k.is_volume and k.data.shape == (2, 160) and k.grid.shape == (8, 16, 16)
    assert np.array_equal(k.data[1].numpy(), samples[:, 1].reshape(-1))
    radial(tmp_path, dims=3)
    k = read_kspace(tmp_path / "a.h5")
    assert not k.is_volume and any("density weights" in note for note in k.notes)


def test_what_is_refused(tmp_path):
    kspace = noise(1, 2, 20, 24)
    path = tmp_path / "a.h5"
    a = stack(kspace)
    a.data[3] = a.data[3][:-2]
    a.write(path, ismrmrd_header())
    with pytest.raises(BadInput, match="row 3 holds 94 numbers, its header says 96"):
        read_kspace(path)
    a = stack(kspace)
    a.heads[2]["number_of_samples"] = 60000
    a.write(path, ismrmrd_header())
    with pytest.raises(BadInput, match="number_of_samples varies"):
        read_kspace(path)
    a = stack(kspace)
    for head in a.heads:
        head["number_of_samples"] = head["active_channels"] = 65535
    a.write(path, ismrmrd_header())
    with pytest.raises(BadInput, match="are stored"):
        read_kspace(path)
    a = stack(kspace, directions=rotation())
    a.heads[0]["read_dir"] = a.heads[0]["phase_dir"]
    a.write(path, ismrmrd_header())
    with pytest.raises(BadInput, match="not perpendicular"):
        read_kspace(path)
    a.heads[0]["read_dir"] = np.nan
    a.write(path, ismrmrd_header())
    with pytest.raises(BadInput, match="read_dir of the acquisitions holds"):
        read_kspace(path)
    a = stack(kspace)
    a.data[3][5] = np.inf
    a.write(path, ismrmrd_header())
    with pytest.raises(BadInput, match="NaN or infinite"):
        read_kspace(path)
    a = Acquisitions()
    a.add(noise(2, 24), flags=[19])
    a.write(path, ismrmrd_header())
    with pytest.raises(BadInput, match="no acquisitions of an image"):
        read_kspace(path)
    stack(kspace).write(path, ismrmrd_header(kind="spiral"))
    with pytest.raises(BadInput, match="spiral with 0 coordinates"):
        read_kspace(path)
    with h5py.File(path, "w") as f:
        f["dataset/xml"] = ismrmrd_header()
        f["dataset/data"] = np.zeros(4, [("head", [("flags", "u8")]), ("data", "f4")])
    with pytest.raises(BadInput, match="headers without"):
        read_kspace(path)


def test_measured_radial_equals_its_frame(data):
    a = read_kspace(data("raw_mr/brain_radial_fa15_5ch_ismrmrd.h5"))
    frame = read_kspace(data("raw_mr/brain_radial_vfa_5ch.h5"), frames=[3])
    assert torch.equal(a.data, frame.data) and a.grid.shape == frame.grid.shape == (1, 256, 256)
    assert (a.trajectories[0].points - frame.trajectories[0].points).abs().max() < 4e-6  # float32 in one of them
    with h5py.File(data("raw_mr/brain_radial_vfa_5ch.h5")) as f:
        assert f["flip_angles_deg"][3] == 15


def test_a_file_of_the_reference_package(tmp_path):
    """Written by the ismrmrd package itself."""
    ismrmrd = pytest.importorskip("ismrmrd")
    kspace, eye = noise(1, 2, 20, 24), np.eye(3)
    file = ismrmrd.Dataset(str(tmp_path / "a.h5"), "dataset", create_if_needed=True)
    file.write_xml_header(ismrmrd_header().encode())
    for line in range(20):
        a = ismrmrd.Acquisition.from_array(kspace[0, :, line])
        a.idx.kspace_encode_step_1, a.center_sample = line, 12
        for k in range(3):
            a.read_dir[k], a.phase_dir[k], a.slice_dir[k] = eye[0][k], eye[1][k], eye[2][k]
        a.position[2] = 7.0
        if line == 3:
            a.set_flag(ismrmrd.ACQ_IS_NAVIGATION_DATA)
        file.append_acquisition(a)
    file.close()
    k = read_kspace(tmp_path / "a.h5", crop_readout=False)
    want = kspace.copy()
    want[:, :, 3] = 0
    assert np.array_equal(k.data.numpy(), want) and k.mask[3].max() == 0
    assert (k.grid.matrix() @ [12, 10, 0, 1])[:3].tolist() == [0, 0, 7]

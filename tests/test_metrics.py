"""Metrics: scikit-image as the oracle, known values, and figures that notice what they are for."""

import json
import time

import numpy as np
import pytest
import torch
from skimage import metrics as oracle

from recon3d.geometry import VolumeGrid
from recon3d.io import demo_volume_path, read_nifti
from recon3d.metrics import PLANES, compare, data_fit, nmse, psnr, rmse, ssim, through_plane, vif

GRID = VolumeGrid((9, 20, 31), (5.0, 1.0, 1.0))


def pair(seed=0, shape=GRID.shape, noise=40.0):
    rng = np.random.default_rng(seed)
    smooth = np.cumsum(rng.normal(size=shape), axis=2) * 60
    return (smooth + noise * rng.normal(size=shape)).astype(np.float32), smooth.astype(np.float32)


@pytest.mark.parametrize("shape", [(3, 7, 7), (2, 61, 53), (4, 8, 200)], ids=str)
@pytest.mark.parametrize("offset", [0.0, -1000.0, 1e4])
def test_ssim_is_scikit_images(shape, offset):
    x, r = pair(1, shape)
    x, r = x + np.float32(offset), r + np.float32(offset)
    got = ssim(x, r, 2000.0)
    for k in range(shape[0]):
        want = oracle.structural_similarity(x[k].astype(float), r[k].astype(float), data_range=2000.0)
        assert abs(got[k] - want) < 1e-6


def test_psnr_and_nmse_are_scikit_images():
    x, r = (a.astype(np.float64) for a in pair(2))
    assert abs(psnr(x, r, 2000.0) - oracle.peak_signal_noise_ratio(r, x, data_range=2000.0)) < 1e-9
    assert abs(nmse(x, r) - oracle.normalized_root_mse(r, x) ** 2) < 1e-12


def test_known_values():
    r = np.zeros((2, 8, 8), np.float32)
    assert psnr(r + 20, r, 2000.0) == pytest.approx(40.0)
    assert psnr(r, r, 2000.0) == 100.0
    assert rmse(r + 3, r) == pytest.approx(3.0)
    assert ssim(r + 5, r + 5, 1.0).tolist() == [1.0, 1.0]


def test_compare_planes_against_slicing():
    x, r = pair(3)
    result = compare(x, r, GRID, unit="hu", window=(-1000, 1000))
    xc, rc = x.clip(-1000, 1000).astype(float), r.clip(-1000, 1000).astype(float)
    for plane, axis in PLANES.items():
        slices = [(np.take(xc, k, axis), np.take(rc, k, axis)) for k in range(x.shape[axis])]
        slices = [(a, b) for a, b in slices if b.std() > 20]
        want_psnr = np.mean([oracle.peak_signal_noise_ratio(b, a, data_range=2000) for a, b in slices])
        want_ssim = np.mean([oracle.structural_similarity(b, a, data_range=2000) for a, b in slices])
        assert result[plane]["slices"] == len(slices)
        assert result[plane]["psnr_db"] == pytest.approx(want_psnr, abs=1e-4)
        assert result[plane]["ssim"] == pytest.approx(want_ssim, abs=1e-4)
    assert result["planes_mean"]["ssim"] == pytest.approx(np.mean([result[p]["ssim"] for p in PLANES]))


def test_units_agree():
    x, r = pair(4)
    hu = compare(x, r, GRID, unit="hu")
    mu = compare(torch.from_numpy((x / 1000 + 1) * 0.0193), torch.from_numpy((r / 1000 + 1) * 0.0193), GRID)
    for key in ("psnr_db", "rmse", "nmse"):
        assert mu["volume"][key] == pytest.approx(hu["volume"][key], rel=1e-4)
    # NMSE does not depend on where HU has its zero
    assert hu["volume"]["nmse"] == pytest.approx(nmse(x.astype(float) + 1000, r.astype(float) + 1000))


def test_clipping_is_for_psnr_and_ssim_alone():
    _, r = pair(5)
    high = r.copy()
    high[0, 0, 0] = 9000
    result = compare(high, np.where(high == 9000, 5000, r), GRID, unit="hu")
    assert result["volume"]["psnr_db"] == 100.0
    assert result["volume"]["rmse"] > 50
    assert result["settings"]["data_range"] == 2000.0


def test_empty_slices_are_left_out():
    x, r = pair(6)
    r[:4] = -1000
    x[:4] = -1000 + 500  # would spoil the mean if it counted
    result = compare(x, r, GRID, unit="hu")
    assert result["axial"]["slices"] == 5 and result["axial"]["slices_left_out"] == 4
    assert result["axial"]["psnr_db"] == pytest.approx(
        compare(x[4:], r[4:], GRID.slab(4, 9), unit="hu")["axial"]["psnr_db"]
    )


def test_mask_counts_alone():
    x, r = pair(7)
    mask = np.zeros(GRID.shape, bool)
    mask[:, 5:15, 8:24] = True
    spoiled = np.where(mask, x, x + 700)
    for part, key in (("volume", "psnr_db"), ("volume", "rmse"), ("axial", "psnr_db"), ("through_plane", "error")):
        a, b = compare(x, r, GRID, mask=mask, unit="hu"), compare(spoiled, r, GRID, mask=mask, unit="hu")
        assert a[part][key] == b[part][key]
    assert (
        compare(spoiled, r, GRID, unit="hu")["volume"]["rmse"] > compare(x, r, GRID, unit="hu")["volume"]["rmse"] + 100
    )


def test_through_plane_notices_smoothing_and_jitter():
    _, r = pair(8)
    smooth = r.copy()
    smooth[1:-1] = (r[:-2] + r[1:-1] + r[2:]) / 3
    jitter = r + 50 * (np.arange(9) % 2)[:, None, None]
    assert through_plane(r, r, 5.0)["ratio"] == 1.0 and through_plane(r, r, 5.0)["error"] == 0.0
    assert through_plane(smooth, r, 5.0)["ratio"] < 0.7
    assert through_plane(jitter, r, 5.0)["error"] > 0.1
    steps = np.arange(9, dtype=float)[:, None, None] * np.ones((9, 4, 4))
    assert through_plane(steps, steps, 5.0)["gradient"] == pytest.approx(0.2)


def test_data_fit():
    rng = np.random.default_rng(9)
    y = rng.normal(size=(3, 40, 50)) + 3
    sigma = 0.1
    noisy = y + sigma * rng.normal(size=y.shape)
    fit = data_fit(torch.from_numpy(y), torch.from_numpy(noisy), torch.full(y.shape, sigma**-2))
    assert fit["chi2_per_ray"] == pytest.approx(1.0, abs=0.06)  # sqrt(2/6000) = 0.018 a sigma
    assert fit["relative_residual"] == pytest.approx(sigma / np.sqrt(10.0), rel=0.05)
    assert data_fit(y, noisy)["chi2_per_ray"] is None


def test_every_figure_is_defined_and_json_ready():
    x, r = pair(10)
    result = json.loads(json.dumps(compare(x, r, GRID, unit="hu"), allow_nan=False))
    named = result["definitions"]
    for part in ("volume", *PLANES):
        for key in result[part]:
            assert key in named or key.startswith("slices")
    assert "2000 HU" in named["psnr_db"] and "[-1000, 1000]" in named["psnr_db"]
    flat = np.zeros(GRID.shape)
    json.dumps(compare(flat, flat, GRID, unit="hu"), allow_nan=False)  # nothing to compare is not NaN
    one = VolumeGrid((1, 20, 31), (5, 1, 1))
    assert compare(x[:1], r[:1], one, unit="hu")["coronal"]["ssim"] is None  # thinner than the window


@pytest.mark.parametrize(
    "change,match",
    [
        ({"reference": np.zeros((9, 20, 30))}, "one shape"),
        ({"volume": np.full(GRID.shape, np.nan)}, "NaN"),
        ({"mask": np.zeros(GRID.shape, bool)}, "no voxel"),
        ({"unit": "au"}, "data_range is needed"),
        ({"data_range": -1.0}, "positive"),
        ({"window": (1.0, 1.0)}, "low < high"),
        ({"volume": np.zeros(GRID.shape, complex)}, "real numbers"),
    ],
)
def test_one_sentence(change, match):
    x, r = pair()
    with pytest.raises(ValueError, match=match):
        compare(**{"volume": x, "reference": r, "grid": GRID, "unit": "hu", **change})


def test_three_planes_of_a_chest_in_seconds():
    reference, grid = read_nifti(demo_volume_path(), unit="hu")
    noisy = reference + 0.0005 * torch.randn(reference.shape, generator=torch.Generator().manual_seed(0))
    start = time.process_time()
    result = compare(noisy, reference, grid)
    assert time.process_time() - start < 5
    assert 25 < result["volume"]["psnr_db"] < 45
    k = 20
    hu = [((v[k].numpy() / 0.0193 - 1) * 1000).clip(-1000, 1000) for v in (noisy, reference)]
    assert ssim(hu[0][None], hu[1][None], 2000.0)[0] == pytest.approx(
        oracle.structural_similarity(*hu, data_range=2000.0), abs=1e-4
    )


def _piq():
    """piq, which imports torchvision for what is not asked of it here."""
    import importlib.util
    import sys
    from unittest.mock import MagicMock, patch

    if importlib.util.find_spec("piq") is None:
        pytest.skip("piq is not installed")
    names = ["torchvision", "torchvision.models", "torchvision.models.inception", "torchvision.transforms"]
    missing = {} if importlib.util.find_spec("torchvision") else {name: MagicMock() for name in names}
    with patch.dict(sys.modules, missing):
        import piq
    return piq


@pytest.mark.parametrize("noise", [0.0, 1.0, 20.0])
@pytest.mark.parametrize("shape", [(2, 41, 41), (1, 83, 97)], ids=str)
def test_vif_is_piqs(shape, noise):
    x, r = pair(3, shape, noise)
    low = min(x.min(), r.min())  # piq takes no negative values
    x, r = ((a - low) / (max(x.max(), r.max()) - low) * 255 for a in (x, r))
    got = vif(x, r, 255.0)
    for k in range(shape[0]):
        one = [torch.tensor(a[k], dtype=torch.float64)[None, None].clamp(0, 255) for a in (x, r)]
        assert abs(got[k] - float(_piq().vif_p(*one, data_range=255.0))) < 1e-6


def test_vif_falls_with_blur_and_noise_and_knows_no_unit():
    volume, _ = read_nifti(demo_volume_path())
    r = volume[20:21, 60:160, 60:160].numpy().astype(np.float64)
    noisy = r + 60 * np.random.default_rng(0).normal(size=r.shape)
    noisier = r + 200 * np.random.default_rng(0).normal(size=r.shape)
    soft = np.stack([sum(np.roll(r[0], s, 1) for s in range(-2, 3)) / 5])
    assert vif(r, r, 2000.0)[0] == pytest.approx(1, abs=1e-6)
    assert 1 > vif(noisy, r, 2000.0)[0] > vif(noisier, r, 2000.0)[0] > 0 and vif(soft, r, 2000.0)[0] < 0.7
    assert vif(3 * noisy + 7, 3 * r + 7, 6000.0) == pytest.approx(vif(noisy, r, 2000.0), rel=1e-9)
    # contrast that was raised counts for more than what was there
    assert vif(1.3 * r, r, 2000.0)[0] > 1
    flat = np.zeros((1, 50, 50))
    assert vif(flat, flat, 1.0)[0] == pytest.approx(1)


@pytest.mark.parametrize(
    ("x", "r", "scale", "sentence"),
    [
        (np.zeros((1, 40, 60)), np.zeros((1, 40, 60)), 1.0, "at least 41 pixels"),
        (np.zeros((1, 50, 60)), np.zeros((1, 50, 61)), 1.0, "one shape"),
        (np.zeros((50, 60)), np.zeros((50, 60)), 1.0, "slice, row, col"),
        (np.zeros((1, 50, 60)), np.zeros((1, 50, 60)), 0.0, "data_range"),
    ],
)
def test_vif_refuses(x, r, scale, sentence):
    with pytest.raises(ValueError, match=sentence):
        vif(x, r, scale)

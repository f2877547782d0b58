"""The picture and the table: what is shown, in which proportions, and sentences for what cannot be."""

import numpy as np
import pytest
import torch
from matplotlib import image

from recon3d.geometry import VolumeGrid
from recon3d.io import demo_volume_path, hu_to_mu, read_nifti
from recon3d.metrics import compare
from recon3d.report import markdown, metrics_table, preview
from recon3d.report.preview import _slice, _window

GRID = VolumeGrid((12, 40, 60), (5.0, 1.0, 1.0))


def volumes(seed=0):
    g = torch.Generator().manual_seed(seed)
    reference = hu_to_mu(torch.zeros(GRID.shape) - 1000)
    reference[:, 10:30, 10:50] = hu_to_mu(40.0)
    noise = 0.002 * torch.randn(GRID.shape, generator=g)
    return reference, {"fbp": reference + 2 * noise, "ours": reference + noise}


def test_picture(tmp_path):
    reference, shown = volumes()
    metrics = {name: compare(volume, reference, GRID) for name, volume in shown.items()}
    preview(tmp_path / "a.png", shown, GRID, reference, metrics, title="chest")
    picture = image.imread(tmp_path / "a.png")
    assert picture.shape[0] > 400 and picture.shape[1] > 600
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]
    preview(tmp_path / "b.png", shown, GRID, reference, metrics, title="chest")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    preview(tmp_path / "c.png", {"ours": shown["ours"]}, GRID)
    assert image.imread(tmp_path / "c.png").shape[1] < picture.shape[1]


def test_thin_volume_shows_its_slice_alone(tmp_path):
    thin = VolumeGrid((2, 40, 60), (5.0, 1.0, 1.0))
    preview(tmp_path / "a.png", {"fbp": torch.rand(2, 40, 60)}, thin, unit="per_mm")
    tall = VolumeGrid((12, 40, 60), (5.0, 1.0, 1.0))
    preview(tmp_path / "b.png", {"fbp": torch.rand(12, 40, 60)}, tall, unit="per_mm")
    assert image.imread(tmp_path / "a.png").shape[0] < image.imread(tmp_path / "b.png").shape[0]


def test_head_is_up_and_front_is_up():
    volume = np.zeros((3, 4, 5), np.float32)
    volume[2, 0, 0] = 1  # head, front, right of the patient
    assert _slice(volume, 0, 2)[0, 0] == 1
    assert _slice(volume, 1, 0)[0, 0] == 1
    assert _slice(volume, 2, 0)[0, 0] == 1


def test_window_follows_the_content():
    chest, _ = read_nifti(demo_volume_path())
    assert _window(chest.numpy(), "hu") == (-1000.0, 400.0)
    body = np.full((4, 8, 8), 40.0, np.float32)
    body[:, :2] = -1000
    assert _window(body, "hu") == (-200.0, 300.0)
    low, high = _window(np.linspace(0, 0.1, 1000, dtype=np.float32), "per_mm")
    assert 0 < low < 0.001 and 0.099 < high < 0.1


@pytest.mark.parametrize(
    "change,match",
    [
        ({"volumes": {}}, "at least one"),
        ({"grid": VolumeGrid((12, 40, 61), (5, 1, 1))}, "shape"),
        ({"at": (12, 0, 0)}, "voxel"),
        ({"unit": "mm"}, "unit"),
    ],
)
def test_one_sentence(tmp_path, change, match):
    _, shown = volumes()
    with pytest.raises(ValueError, match=match):
        preview(**{"path": tmp_path / "a.png", "volumes": shown, "grid": GRID, **change})
    assert not list(tmp_path.iterdir())


def test_table():
    reference, shown = volumes()
    results = {name: compare(volume, reference, GRID) for name, volume in shown.items()}
    results["ours"] |= {"data": {"chi2_per_ray": 1.02}, "seconds": 12.34}
    headers, rows = metrics_table(results)
    assert headers[0] == "method" and "RMSE HU" in headers and headers[-2:] == ["chi2/ray", "seconds"]
    assert [row[0] for row in rows] == ["fbp", "ours"]
    assert rows[0][-2:] == ["-", "-"] and rows[1][-2:] == ["1.02", "12.3"]
    assert float(rows[1][1]) == pytest.approx(results["ours"]["axial"]["psnr_db"], abs=0.01)
    text = markdown(headers, rows).splitlines()
    assert len(text) == 4 and len({len(line) for line in text}) == 1

"""Phantoms of activity: amounts, places and contrasts are what was asked for."""

from __future__ import annotations

import math

import pytest
import torch

from recon3d.geometry import VolumeGrid
from recon3d.testing.pet_phantoms import (
    MU_BONE,
    MU_LUNG,
    MU_TISSUE,
    Sphere,
    body_phantom,
    brain_phantom,
    insert_spheres,
)

GRID = VolumeGrid((16, 64, 80), (4.0, 5.0, 4.5))


@pytest.fixture(scope="module")
def body():
    return body_phantom(GRID)


def test_the_trunk_has_the_volume_of_an_ellipse():
    p = body_phantom(GRID, spheres=[], lung=False, background=1000.0)
    area = float(p.activity[8].sum()) / 1000 * 5.0 * 4.5
    assert area == pytest.approx(math.pi * 110 * 147, rel=2e-3)
    assert torch.equal(p.activity[0], p.activity[15])
    assert float(p.mu_per_mm.max()) == pytest.approx(MU_TISSUE)
    assert float(p.activity[0, 32, 40]) == 1000.0 and float(p.activity[0, 0, 0]) == 0.0


@pytest.mark.parametrize("radius", [5.0, 11.0])
def test_a_sphere_holds_its_volume_times_its_contrast(radius):
    plain = body_phantom(GRID, spheres=[], lung=False, background=1000.0)
    p = insert_spheres(plain, [Sphere((3.0, -31.0, 40.0), radius, 4.0)])
    gained = float((p.activity - plain.activity).double().sum()) * 4.0 * 5.0 * 4.5
    assert gained == pytest.approx(3 * 1000 * 4 / 3 * math.pi * radius**3, rel=0.03)
    z, y, x = (float(v) for v in torch.nonzero(p.regions["hot 0"]).double().mean(0))
    assert (z - 7.5) * 4.0 == pytest.approx(3.0, abs=2.0)
    assert (y - 31.5) * 5.0 == pytest.approx(-31.0, abs=2.5)
    assert (x - 39.5) * 4.5 == pytest.approx(40.0, abs=2.3)


def test_regions(body):
    x = body.activity
    assert float(x[body.regions["hot 3"]].max()) == pytest.approx(4 * 5000, rel=1e-4)
    assert float(x[body.regions["cold 5"]].min()) == 0.0
    assert float((x[body.regions["background"]] - 5000).abs().max()) < 0.1
    assert float(x[body.regions["lung"]].max()) == 0.0
    assert float((body.mu_per_mm[body.regions["lung"]] - MU_LUNG).abs().max()) < 1e-8
    for name, region in body.regions.items():
        assert bool(region.any()), name
        if name.startswith(("hot", "cold", "lung")):
            assert not bool((region & body.regions["background"]).any())


def test_shrink_scales_every_length(body):
    half = VolumeGrid(GRID.shape, tuple(s / 2 for s in GRID.spacing_mm))
    small = body_phantom(half, shrink=0.5)
    assert torch.equal(small.activity, body.activity)


def test_blurred_edges_keep_the_total():
    plain = body_phantom(GRID, spheres=[], lung=False)
    sharp, soft = (insert_spheres(plain, [Sphere((0.0, 10.0, 20.0), 12.0, 5.0)], fwhm_mm=f) for f in (0.0, 8.0))
    assert float(soft.activity.sum()) == pytest.approx(float(sharp.activity.sum()), rel=1e-4)
    assert float(soft.activity.max()) < float(sharp.activity.max())


def test_a_sphere_in_air_is_refused(body):
    with pytest.raises(ValueError, match=r"sphere 0 at \(0\.0, -150\.0, 0\.0\) mm covers no voxel"):
        insert_spheres(body, [Sphere((0.0, -150.0, 0.0), 6.0, 2.0)])


def _head(shape=(10, 72, 64), spacing=(4.0, 3.0, 3.0)) -> tuple[torch.Tensor, tuple[float, float, float], dict]:
    """Scalp, dark skull, a rim of grey matter, white matter, ventricles of CSF; a slope of brightness over it all."""
    y = ((torch.arange(shape[1]) - (shape[1] - 1) / 2) * spacing[1])[:, None]
    x = ((torch.arange(shape[2]) - (shape[2] - 1) / 2) * spacing[2])[None]
    r = (y * y / 96**2 + x * x / 80**2).sqrt()
    t1 = torch.zeros(shape[1:])
    t1[r < 1] = 0.8
    t1[(r < 0.92) & (r > 0.82)] = 0.05
    grey, white = (r <= 0.82) & (r > 0.6), r <= 0.6
    csf = (y * y / 18**2 + x * x / 14**2) < 1
    white = white & ~csf
    t1[grey], t1[white], t1[csf] = 0.55, 0.8, 0.15
    t1 = t1 * (1 + 0.15 * x / 90)
    masks = {"grey": grey, "white": white, "csf": csf}
    t1 = t1.expand(shape).contiguous()
    return 300 * (t1 + 0.005 * torch.rand(shape, generator=torch.Generator().manual_seed(0))), spacing, masks


@pytest.fixture(scope="module")
def brain():
    t1, spacing, masks = _head()
    return brain_phantom(t1, spacing, white_bq_ml=1000.0, fwhm_mm=0.0), masks


def test_a_drawn_head_is_found_again(brain):
    p, masks = brain
    inside = (masks["white"] | masks["csf"]).expand(p.grid.shape)  # there is CSF around the brain too
    for name, share in (("grey", 0.7), ("white", 0.8), ("csf", 0.7)):
        want = masks[name].expand(p.grid.shape)
        found = p.regions[name] & inside if name == "csf" else p.regions[name]
        assert float((found & want).sum() / (found | want).sum()) > share, name


def test_uptake_is_four_to_one_to_nothing(brain):
    p, _ = brain
    assert float(p.activity[p.regions["grey"]].median()) == pytest.approx(4000)
    assert float(p.activity[p.regions["white"]].median()) == pytest.approx(1000)
    assert float(p.activity[p.regions["csf"]].median()) == 0.0
    assert float(p.activity[:, 36, 6].median()) == pytest.approx(300)  # scalp
    assert float(p.activity[:, 0, 0].max()) == 0.0
    assert float(p.mu_per_mm.max()) == pytest.approx(MU_BONE)
    assert float(p.mu_per_mm[p.regions["white"]].median()) == pytest.approx(MU_TISSUE)


def test_voxels_blur_and_variation():
    t1, spacing, _ = _head()
    p = brain_phantom(t1, spacing, voxel_mm=4.5, fwhm_mm=6.0, variation=0.1, seed=2)
    again = brain_phantom(t1, spacing, voxel_mm=4.5, fwhm_mm=6.0, variation=0.1, seed=2)
    assert p.grid.shape == (10, 48, 43) and p.grid.spacing_mm[0] == 4.0
    assert p.grid.spacing_mm[1:] == pytest.approx((4.5, 4.5), rel=0.02)
    assert torch.equal(p.activity, again.activity) and float(p.activity.min()) >= 0
    assert p.regions["grey"].shape == p.activity.shape


def test_what_is_no_head_is_refused():
    with pytest.raises(ValueError, match="finite volume"):
        brain_phantom(torch.zeros(8, 8), (1.0, 1.0, 1.0))
    with pytest.raises(ValueError, match="no brain found"):
        brain_phantom(torch.zeros(4, 32, 32), (3.0, 3.0, 3.0))

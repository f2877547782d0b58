"""PET on measured data: half a second of a Siemens mMR, and two points between the screens of a positron camera."""

from __future__ import annotations

import gzip

import numpy as np
import pytest
import torch

from recon3d import ops
from recon3d.baselines.osem import mlem, osem
from recon3d.geometry import Events, VolumeGrid, pet_geometry
from recon3d.io import read_measurement
from recon3d.operators import (
    PETListmode,
    PETOperator,
    efficiency_factors,
    fan_sum_efficiencies,
    fan_sums,
    randoms_from_delayed,
)


@pytest.fixture(scope="module")
def head():
    """Events of a head, and the bins of a small part of the ring differences."""
    from conftest import data_dir

    root = data_dir()
    path = None if root is None else root / "raw_pet" / "mmr_fdg_612ms.l.hdr"
    if path is None or not path.exists():
        pytest.skip("real data file raw_pet/mmr_fdg_612ms.l is not at hand (set RECON3D_DATA to its folder)")
    events = read_measurement(path, histogram=False).events
    geometry = pet_geometry("mmr", span=11, max_ring_difference=16)
    return events, geometry


def dip_of_gap_lines(image: torch.Tensor, n: int) -> float:
    """How far the image's own line integrals along lines into gaps fall below those two bins to either side."""
    geometry = pet_geometry("mmr", max_ring_difference=0)
    lines = PETOperator(geometry, geometry.default_grid(n=n))(image).sum(-1).numpy()
    pairs, real = geometry.crystal_pairs()[:, 0], geometry.scanner.real_crystals().any(0)
    seen = real[pairs].all(-1)
    chosen = ~seen & np.roll(seen, 2, 1) & np.roll(seen, -2, 1) & (np.abs(geometry.radial_mm()) < 80)
    beside = (np.roll(lines, 2, 1) + np.roll(lines, -2, 1)) / 2
    return float(1 - lines[chosen].sum() / beside[chosen].sum())


def test_events_of_the_gaps_do_not_exist(head):
    events, geometry = head
    assert int(events.prompt.sum()) == 218_881 and int((~events.prompt).sum()) == 35_320
    fans = fan_sums(events, geometry.scanner)
    real = torch.from_numpy(geometry.scanner.real_crystals())
    assert float(fans[~real].sum()) == 0 and float(fans[real].sum()) == 2 * len(events)
    assert float((fans[real] > 0).double().mean()) > 0.99


def test_prompts_and_delayed_agree_on_the_block(head):
    """Two sets of events that share nothing but the crystals give the same profile of a block."""
    events, geometry = head
    scan = geometry.scanner
    profiles = []
    for chosen in (events[events.prompt], events[~events.prompt]):
        value = fan_sum_efficiencies(fan_sums(chosen, scan), scan).numpy()
        block = value.reshape(scan.rings // 8, 8, scan.crystals // 9, 9).mean((0, 2))[:, 1:]
        profiles.append(block / block.mean())
    assert np.corrcoef(profiles[0].ravel(), profiles[1].ravel())[0, 1] > 0.9
    assert profiles[0].std() > 0.05, "efficiencies differ within a block"


def test_head_without_stripes(head):
    events, geometry = head
    scan = geometry.scanner
    prompts, delayed = events.histogram(geometry)
    randoms = randoms_from_delayed(events, geometry)
    assert float(randoms.sum()) == pytest.approx(float(delayed.sum()), rel=1e-4)
    factors = efficiency_factors(fan_sum_efficiencies(fan_sums(events[events.prompt], scan), scan), geometry)

    # filtered back projection at the bins' own resolution: gaps that are not told of cut lines through the image
    fine, n = geometry.default_grid(n=256), 256
    told = PETOperator(geometry, fine, factors=factors, additive=randoms).pinv(prompts)
    flat = torch.from_numpy(geometry.multiplicity()).float()
    untold = PETOperator(geometry, fine, factors=flat, additive=randoms).pinv(prompts)
    assert abs(dip_of_gap_lines(told, n)) < 0.03
    assert dip_of_gap_lines(untold, n) > 0.1

    # ordered subsets on 128 x 128 x 127
    grid = geometry.default_grid(n=128)
    assert grid.shape == (127, 128, 128)
    image = osem(prompts, PETOperator(geometry, grid, factors=factors, additive=randoms, psf_fwhm_mm=6.0), 1, 14)
    assert bool(image.isfinite().all()) and float(image.min()) >= 0
    assert abs(dip_of_gap_lines(image, 128)) < 0.01

    # a head: an ellipsoid some 15 x 19 cm across, cut by the end of the field of view below, with the crown above
    z, y, x = ((torch.arange(m) - (m - 1) / 2) * d for m, d in zip(grid.shape, grid.spacing_mm, strict=True))
    z, y, x = z[:, None, None], y[None, :, None], x[None, None, :]
    total = float(image.sum())
    centre = [float((image * axis).sum() / total) for axis in (z, y, x)]
    radius = ((y - centre[1]) / 110) ** 2 + ((x - centre[2]) / 90) ** 2
    inside, outside = (radius < 1).expand(grid.shape), ((radius > 1.5) & (radius < 4)).expand(grid.shape)
    middle = (z.abs() < 30).expand(grid.shape)
    assert float(image[inside & middle].mean()) > 10 * float(image[outside & middle].mean())
    spread = [
        float(((image * inside * (axis - c) ** 2).sum() / (image * inside).sum()) ** 0.5)
        for axis, c in zip((y, x), centre[1:], strict=True)
    ]
    assert 1.1 < spread[0] / spread[1] < 1.8, "longer from front to back than from side to side"
    assert 30 < spread[1] < 60
    crown = (z > 50).expand(grid.shape)
    assert float(image[crown & inside].mean()) < 0.2 * float(image[middle & inside].mean())


def test_oblique_planes_lean_the_right_way(head):
    """Exchanging the rings of both ends, which mirrors every oblique line, makes the events less likely."""
    events, _ = head
    prompts = events[events.prompt][::2]
    scan = pet_geometry("mmr").scanner
    geometry = pet_geometry("mmr", span=11, mashing=12)
    grid = VolumeGrid((64, 64, 64), (4.0625, 4.5, 4.5))
    coarse = VolumeGrid((127, 64, 64), (2.03125, 4.5, 4.5))
    factors = efficiency_factors(torch.from_numpy(scan.real_crystals()), geometry)
    seen = PETOperator(geometry, coarse, factors=factors).sensitivity()
    seen = torch.nn.functional.interpolate(seen[None, None], grid.shape, mode="trilinear")[0, 0]
    ring, crystal = prompts.pairs // scan.crystals, prompts.pairs % scan.crystals
    score = []
    for rings in (ring, ring.flip(1)):
        listed = Events(rings * scan.crystals + crystal, prompts.prompt)
        operator = PETListmode(listed, scan, grid, sensitivity=seen, psf_fwhm_mm=6.0)
        image = mlem(torch.ones(len(listed)), operator, 6)
        lines = operator(image).clamp_min(1e-9 * float(image.max()))
        score.append(float((lines / (image * seen).sum()).double().log().sum()))
    assert score[0] > score[1] + 1000, score


def test_two_points_of_a_positron_camera(data):
    """Lines between two flat screens, reconstructed event by event: two points, where plain geometry puts them."""
    with gzip.open(data("raw_pet/pept_2points_static.csv.gz"), "rt") as file:
        rows = np.array([[float(v) for v in line.split()] for line in file.readlines()[15:] if len(line.split()) == 5])
    assert len(rows) == 30_026
    ends = np.empty((2, len(rows), 3))
    ends[0, :, 0], ends[1, :, 0] = -356.0, 356.0  # screens 712 mm apart
    ends[0, :, 1:], ends[1, :, 1:] = rows[:, [2, 1]], rows[:, [4, 3]]
    ends[..., 1:] -= (ends[..., 1:].reshape(-1, 2).max(0) + ends[..., 1:].reshape(-1, 2).min(0)) / 2
    points = torch.from_numpy(ends.reshape(-1, 3))
    index = torch.arange(len(rows), dtype=torch.int32)
    pairs = torch.stack([index, index + len(rows)], 1)

    # maximum likelihood on 6 mm voxels; all voxels are seen about equally well near the middle
    shape, spacing = (60, 90, 90), (6.0, 6.0, 6.0)
    image = torch.ones(shape)
    for _ in range(25):
        lines = ops.joseph3d(image, points, pairs, spacing)
        ratio = torch.where(lines > 0, 1 / lines.clamp_min(1e-12), 0.0)
        image *= ops.joseph3d_adjoint(ratio, points, pairs, shape, spacing)
        image /= image.sum()
    places, rest = [], image.clone()
    for _ in range(2):
        k = np.unravel_index(int(rest.argmax()), shape)
        box = tuple(slice(max(0, i - 3), i + 4) for i in k)
        part = rest[box].double()
        axes = [
            (torch.arange(m, dtype=torch.float64)[s] - (m - 1) / 2) * d
            for m, s, d in zip(shape, box, spacing, strict=True)
        ]
        grids = torch.meshgrid(*axes, indexing="ij")
        places.append(np.array([float((part * g).sum() / part.sum()) for g in grids]))
        rest[box] = 0
    third = float(rest.max() / image.max())
    assert third < 0.05, f"a third point with {third:.2f} of the first"

    # the point nearest to all lines that pass close to it, by least squares, from the same start: no image involved
    direction = ends[1] - ends[0]
    direction /= np.linalg.norm(direction, axis=1, keepdims=True)
    exact = []
    for place in places:
        point = place.copy()
        for reach in (25.0, 15.0, 10.0, 10.0, 10.0):
            away = point - ends[0]
            away -= (away * direction).sum(1, keepdims=True) * direction
            near = np.linalg.norm(away, axis=1) < reach
            project = np.eye(3) - direction[near, :, None] * direction[near, None, :]
            point = np.linalg.solve(project.sum(0), (project @ ends[0][near, :, None]).sum(0)[:, 0])
        assert near.sum() > 2000
        exact.append(point)
    for place, point in zip(places, exact, strict=True):
        assert np.linalg.norm((place - point)[1:]) < 2.0 and abs(place[0] - point[0]) < 6.0
    apart, want = np.linalg.norm(places[0] - places[1]), np.linalg.norm(exact[0] - exact[1])
    assert apart == pytest.approx(want, rel=0.01)

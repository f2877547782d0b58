"""PET scanners and their sinograms: which crystals a bin holds, where its line runs, and what is refused."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch

from recon3d.geometry import TOF, Events, PETGeometry, PETScanner, pet_geometry, scanner, scanner_names


def tiny(**change) -> PETScanner:
    good = dict(
        name="tiny",
        rings=5,
        ring_spacing_mm=4.0,
        crystals=24,
        radius_mm=50.0,
        block_crystals=6,
        block_rings=5,
        n_radial=23,
    )
    return PETScanner(**{**good, **change})


GEOMETRIES = {
    "plain": pet_geometry(tiny()),
    "few": pet_geometry(tiny(), n_radial=12, max_ring_difference=2),
    "odd half": pet_geometry(tiny(crystals=30), n_radial=17),
    "tof": pet_geometry(tiny(), n_radial=10, max_ring_difference=1, tof=TOF(4, 20.0, 9.0)),
    "views": pet_geometry(tiny(), n_radial=11).subset([7, 0, 3]),
    "tilted": pet_geometry(tiny(tilt_rad=0.3), n_radial=9),
}


@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=list(GEOMETRIES))
def test_bins_and_pairs_are_inverse_over_all_bins(geometry):
    bins = np.arange(math.prod(geometry.shape))
    pairs, time = geometry.pairs_of(bins)
    assert np.array_equal(geometry.bin_of(pairs, time), bins)
    # the other way round the same bin, with the time bin mirrored
    mirrored = None if time is None else geometry.tof.bins - 1 - time
    assert np.array_equal(geometry.bin_of(pairs[:, ::-1], mirrored), bins)
    # no pair lies in two bins
    both = np.sort(pairs, axis=1)
    key = both[:, 0].astype(np.int64) * geometry.scanner.n_crystals + both[:, 1]
    if time is None:
        assert len(np.unique(key)) == len(bins)


def test_every_pair_of_a_full_sinogram_has_a_bin():
    geometry = GEOMETRIES["plain"]
    n, rings = 24, 5
    ids = np.arange(n * rings)
    a, b = (m.ravel() for m in np.meshgrid(ids, ids, indexing="ij"))
    bins = geometry.bin_of(np.stack([a, b], 1))
    # a crystal and those above and below it have no line through the plane
    assert np.array_equal(bins < 0, a % n == b % n)
    counts = np.bincount(bins[bins >= 0], minlength=math.prod(geometry.shape))
    assert (counts == 2).all()


@pytest.mark.parametrize("name", ["plain", "odd half", "views", "tilted"])
def test_lines_join_the_crystals_exactly(name):
    geometry = GEOMETRIES[name]
    lines = geometry.lines().reshape(*geometry.shape[:2], 4)
    where = geometry.scanner.crystal_positions()
    pairs, _ = geometry.pairs_of(np.arange(math.prod(geometry.shape)))
    ends = where[pairs].reshape(*geometry.shape, 2, 3)
    assert np.allclose(ends[:, :, 0, 0, 1:], lines[..., :2], atol=1e-10)
    assert np.allclose(ends[:, :, 0, 1, 1:], lines[..., 2:], atol=1e-10)
    # along z, every plane of every segment
    plane = 0
    for middle, delta, step, count in geometry.segments:
        for p in range(int(count)):
            z = ends[0, 0, plane, :, 0]
            assert z == pytest.approx([middle + p * step - delta / 2, middle + p * step + delta / 2], abs=1e-10)
            plane += 1
    assert plane == geometry.n_planes


def test_lines_follow_the_sign_rule_of_projections():
    geometry = pet_geometry("small")
    lines, phi, s = geometry.lines(), geometry.angles_rad().ravel(), np.tile(geometry.radial_mm(), geometry.shape[0])
    normal, along = np.stack([np.sin(phi), np.cos(phi)], 1), np.stack([np.cos(phi), -np.sin(phi)], 1)  # (y, x)
    assert np.allclose((lines[:, :2] * normal).sum(1), s) and np.allclose((lines[:, 2:] * normal).sum(1), s)
    assert ((lines[:, 2:] - lines[:, :2]) * along).sum(1).min() > 0


def test_odd_bins_lie_between_the_views():
    geometry = pet_geometry("small")
    phi = geometry.angles_rad()
    step = math.pi / geometry.n_views
    middle = geometry.n_radial // 2
    assert phi[1, middle] - phi[0, middle] == pytest.approx(step)
    assert phi[1, middle] - phi[1, middle + 1] == pytest.approx(step / 2)


def test_mashed_lines_are_the_mean_of_their_views():
    plain, mashed = pet_geometry("small"), pet_geometry("small", mashing=4)
    mean = plain.angles_rad().reshape(24, 4, -1).mean(1)
    assert np.allclose(mashed.angles_rad(), mean)
    pairs = mashed.crystal_pairs()
    assert pairs.shape == (24, 4, 128, 2)
    assert np.array_equal(pairs.reshape(96, 1, 128, 2), plain.crystal_pairs())


def test_michelogram_of_span_one_has_the_planes_of_the_list_mode():
    geometry = pet_geometry("mmr", max_ring_difference=60)
    assert geometry.shape == (252, 344, 4084)
    assert geometry.segment_numbers[:5] == (0, -1, 1, -2, 2)
    assert geometry.segment_planes[:5] == (64, 63, 63, 62, 62) and geometry.segment_planes[-1] == 4
    table = geometry.michelogram()
    assert np.array_equal(np.sort(table[table >= 0]), np.arange(4084))
    assert table[0, 0] == 0 and table[63, 63] == 63 and table[1, 0] == 64 and table[0, 1] == 127
    assert geometry.multiplicity().tolist() == [1.0] * 4084
    # 65.6 cm inner diameter, 7 mm into the crystal; 2.0882 mm bins as the template says
    assert geometry.bin_mm == pytest.approx(2.08815, abs=1e-4)


def test_span_eleven_has_the_segments_of_the_scanner():
    geometry = pet_geometry("mmr", span=11)
    assert geometry.segment_planes == (127, 115, 115, 93, 93, 71, 71, 49, 49, 27, 27)  # segment table of its header
    assert geometry.n_planes == 837 and geometry.ring_difference == 60
    plane, rings = geometry.ring_pairs()
    assert len(plane) == 4084 and geometry.multiplicity().sum() == 4084
    difference = rings[:, 1] - rings[:, 0]
    segment = np.repeat(geometry.segment_numbers, geometry.segment_planes)[plane]
    assert (np.abs(difference - 11 * segment) <= 5).all()
    # a plane's z is that of all its ring pairs
    z = np.concatenate([m + np.arange(int(n)) * step for m, _, step, n in geometry.segments])
    assert np.allclose(z[plane], (rings.sum(1) / 2 - 63 / 2) * 4.0625)


def test_compressed_bins_count_their_pairs():
    scan = tiny()
    plain = pet_geometry(scan, n_radial=12)
    packed = pet_geometry(scan, n_radial=12, span=3, mashing=2)
    assert packed.ring_difference == 4
    pairs, _ = plain.pairs_of(np.arange(math.prod(plain.shape)))
    counts = np.bincount(packed.bin_of(pairs), minlength=math.prod(packed.shape)).reshape(packed.shape)
    assert (counts == packed.multiplicity()).all()
    with pytest.raises(ValueError, match="several pairs"):
        packed.pairs_of(np.arange(3))


@pytest.mark.parametrize("name", scanner_names())
def test_presets(name):
    scan = scanner(name)
    geometry = pet_geometry(name)
    assert geometry.shape[0] * 2 == scan.crystals
    real = scan.real_crystals()
    assert real.shape == (scan.rings, scan.crystals)
    around = scan.block_crystals - len(scan.gap_crystals)
    assert real.any(0).sum() == scan.crystals // scan.block_crystals * around
    where = scan.crystal_positions()
    assert np.allclose(np.hypot(where[:, 1], where[:, 2]), scan.radius_mm)
    assert where[:, 0].mean() == pytest.approx(0, abs=1e-9)
    grid = geometry.default_grid(n=32)
    assert grid.shape == (2 * scan.rings - 1, 32, 32) and grid.spacing_mm[0] == scan.ring_spacing_mm / 2


def test_crystals_go_from_the_top_to_the_left():
    where = tiny().crystal_positions()
    assert where[0] == pytest.approx([-8.0, -50.0, 0.0])
    assert where[6] == pytest.approx([-8.0, 0.0, 50.0])


def test_subset_of_a_subset():
    geometry = pet_geometry("small").subset(range(0, 96, 3))
    part = geometry.subset([1, 2])
    assert part.views == (3, 6) and part.shape == (2, 128, 256)
    assert np.array_equal(part.lines(), geometry.lines([1, 2]))


def test_histogram_counts_prompts_and_delayed():
    geometry = GEOMETRIES["tof"]
    rng = np.random.default_rng(0)
    bins = rng.integers(0, math.prod(geometry.shape), 500)
    pairs, time = geometry.pairs_of(bins)
    prompt = rng.random(500) < 0.8
    events = Events(torch.from_numpy(pairs), torch.from_numpy(prompt), torch.from_numpy(time))
    prompts, delayed = events.histogram(geometry)
    want = np.bincount(bins[prompt], minlength=math.prod(geometry.shape)).reshape(geometry.shape)
    assert np.array_equal(prompts.numpy(), want) and float(delayed.sum()) == (~prompt).sum()
    # events outside the sinogram are left out
    narrow = dataclasses.replace(geometry, n_radial=4)
    assert 0 < float(events.histogram(narrow)[0].sum()) < prompt.sum()
    assert len(events[:100]) == 100 and len(events[events.prompt]) == prompt.sum()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(rings=0), "rings"),
        (dict(crystals=25), "even"),
        (dict(block_crystals=7), "virtual"),
        (dict(gap_crystals=(6,)), "gap_crystals"),
        (dict(radius_mm=-1.0), "radius_mm"),
        (dict(n_radial=24), "n_radial"),
    ],
)
def test_bad_scanners(change, message):
    with pytest.raises(ValueError, match=message):
        tiny(**change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(n_views=7), "n_views must divide"),
        (dict(n_radial=24), "n_radial"),
        (dict(span=2), "odd"),
        (dict(span=3, max_ring_difference=3), "does not fill"),
        (dict(max_ring_difference=5), "does not fill"),
        (dict(views=(0, 0)), "different"),
        (dict(views=()), "at least one"),
    ],
)
def test_bad_geometries(change, message):
    with pytest.raises(ValueError, match=message):
        PETGeometry(**{**dict(scanner=tiny(), n_views=12, n_radial=11), **change})


def test_other_refusals():
    geometry = GEOMETRIES["tof"]
    with pytest.raises(ValueError, match="tof_bins are needed"):
        geometry.bin_of([[0, 5]])
    with pytest.raises(ValueError, match="crystal ids"):
        geometry.bin_of([[0, 500]], [0])
    with pytest.raises(ValueError, match="not one of"):
        scanner("biograph")
    with pytest.raises(ValueError, match="no time of flight"):
        pet_geometry("mmr", tof=True)
    with pytest.raises(ValueError, match="sigma_mm"):
        TOF(3, 1.0, 0.0)
    with pytest.raises(ValueError, match="subset"):
        geometry.subset([])
    with pytest.raises(ValueError, match="one per pair"):
        Events(torch.zeros(3, 2, dtype=torch.int32), torch.ones(2, dtype=torch.bool))

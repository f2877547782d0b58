"""PET operator: laws, absolute sensitivity against counted decays, quantities in Bq/mL, attenuation, normalisation."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from laws import check_adjoint, check_linear, check_threads
from pet_toys import cylinder, em_step, ring_scanner

from recon3d.geometry import TOF, Events, VolumeGrid, pet_geometry
from recon3d.operators import (
    PETListmode,
    PETOperator,
    attenuation_factors,
    efficiency_factors,
    fan_sum_efficiencies,
    fan_sums,
    herman_meyer,
    mu_from_hu,
    quantitative_scale,
    randoms_from_delayed,
    resample_volume,
)

TIME = TOF(5, 40.0, 20.0)


def case(name: str) -> PETOperator:
    scan = ring_scanner()
    made = {
        "plain": dict(),
        "span": dict(span=3, max_ring_difference=4),
        "mashed": dict(mashing=4, n_radial=31),
        "tof": dict(max_ring_difference=2, n_radial=24, mashing=2, tof=TIME),
    }[name.split("+")[0]]
    geometry = pet_geometry(scan, **made)
    grid = geometry.default_grid(pixel_mm=11.0, n=13)
    given = {}
    if "+" in name:
        g = torch.Generator().manual_seed(1)
        shape = geometry.shape if geometry.tof is None else (*geometry.shape[:2], geometry.n_planes)
        given = dict(
            factors=torch.rand(shape, generator=g),
            additive=torch.rand(geometry.shape, generator=g),
            scale=3.0,
            psf_fwhm_mm=(5.0, 8.0, 9.0),
        )
    return PETOperator(geometry, grid, **given)


CASES = ["plain", "span", "mashed", "tof", "plain+", "span+", "tof+"]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_adjoint(name, dtype):
    operator = case(name)
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2, *operator.domain.shape, generator=g, dtype=dtype)
    y = torch.randn(2, *operator.range.shape, generator=g, dtype=dtype)
    kept = y.clone()
    check_adjoint(operator.forward, operator.adjoint, x, y, 1e-6 if dtype is torch.float32 else 1e-13)
    assert torch.equal(y, kept), "the adjoint changed its argument"
    check_linear(operator.forward, x, x.flip(1))


@pytest.mark.parametrize("name", ["plain+", "tof+"])
def test_gradient_is_the_adjoint(name):
    operator = case(name)
    x = torch.rand(operator.domain.shape, dtype=torch.float64, requires_grad=True)
    y = torch.rand(operator.range.shape, dtype=torch.float64)
    (operator.expected(x) * y).sum().backward()
    assert torch.allclose(x.grad, operator.adjoint(y), rtol=1e-10)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("n", [4, 5])
def test_subsets_put_together_are_the_whole(name, n):
    operator = case(name)
    n = min(n, operator.range.shape[0])
    x = torch.rand(operator.domain.shape, generator=torch.Generator().manual_seed(2))
    whole, together = operator.expected(x), torch.full(operator.range.shape, math.nan)
    sensitivity = torch.zeros(operator.domain.shape, dtype=torch.float64)
    parts = operator.subsets(n)
    for part, views in parts:
        together[views] = part.expected(x)
        sensitivity += part.sensitivity()
    assert torch.equal(whole, together)
    want = operator.sensitivity()
    assert torch.allclose(sensitivity.float(), want, rtol=2e-6, atol=1e-6 * float(want.max()))
    # made once, with the sensitivity that was computed
    assert operator.subsets(n) is parts and parts[0][0].sensitivity() is parts[0][0].sensitivity()
    assert operator.sensitivity() is want


def test_subsets_come_in_the_order_of_herman_and_meyer():
    # bit reversal for a power of two, and the mixed radix of the paper
    assert herman_meyer(8) == [0, 4, 2, 6, 1, 5, 3, 7]
    assert herman_meyer(12) == [0, 6, 3, 9, 1, 7, 4, 10, 2, 8, 5, 11]
    assert herman_meyer(30)[:8] == [0, 15, 5, 20, 10, 25, 1, 16]
    assert herman_meyer(1) == [0] and herman_meyer(7) == list(range(7))
    for n in range(1, 64):
        assert sorted(herman_meyer(n)) == list(range(n))
    operator = case("plain")
    first = [int(views[0]) for _, views in operator.subsets(8)]
    assert first == herman_meyer(8)
    with pytest.raises(ValueError, match="subsets possible"):
        operator.subsets(33)
    with pytest.raises(ValueError, match="at least one"):
        herman_meyer(0)


def test_subsets_share_the_factors():
    operator = case("plain+")
    part, views = operator.subsets(4)[1]
    assert torch.equal(part.factors, operator.factors[views])
    assert part.factors.untyped_storage().data_ptr() == operator.factors.untyped_storage().data_ptr()


def test_threads_do_not_matter():
    operator = case("tof+")
    x, y = torch.rand(operator.domain.shape), torch.rand(operator.range.shape)
    check_threads(lambda: operator.expected(x))
    check_threads(lambda: operator.adjoint(y))


def test_time_bins_add_up_to_the_sinogram_without_time():
    import dataclasses

    timed = case("tof").geometry
    wide = dataclasses.replace(timed, tof=TOF(9, 40.0, 20.0))  # reaches beyond the volume
    plain = dataclasses.replace(timed, tof=None)
    grid = timed.default_grid(pixel_mm=11.0, n=13)
    x = torch.rand(grid.shape, dtype=torch.float64)
    with_time, without = PETOperator(wide, grid)(x).sum(2), PETOperator(plain, grid)(x)
    assert torch.allclose(with_time, without, rtol=1e-9, atol=1e-9 * float(without.max()))


def test_chord_through_a_uniform_cylinder():
    geometry = pet_geometry("small", max_ring_difference=0, mashing=8)
    grid = geometry.default_grid(pixel_mm=1.0, n=180)
    y = PETOperator(geometry, grid)(cylinder(grid, 70.0, 2.0))
    s = torch.from_numpy(geometry.radial_mm())
    chord = 2 * 2.0 * (70.0**2 - s**2).clamp_min(0).sqrt()
    middle = y.shape[-1] // 2
    inside = s.abs() < 65
    assert torch.allclose(y[:, inside, middle].double(), chord[inside].expand(y.shape[0], -1), rtol=0.01)
    # the oblique line is longer
    oblique = pet_geometry("small", mashing=8)
    y = PETOperator(oblique, grid)(cylinder(grid, 70.0, 2.0))
    delta = oblique.segments[-1, 1]
    longer = math.sqrt(1 + (delta / (2 * 130.0)) ** 2)
    assert float(y[0, 64, -1] / y[0, 64, 8]) == pytest.approx(longer, rel=1e-3)


def test_sensitivity_is_the_share_of_decays_that_are_counted():
    """Decays sent out evenly in all directions and caught by crystals, counted, against A^T 1 with the solid angle of
    every pair as its factor: an absolute probability, without a free scale.

    A line of measure dA dOmega (area across, direction) meets cells of area a at angles t0, t1 to their normals a
    distance L apart: a pair has the measure a^2 cos t0 cos t1 / L^2, of 2 pi in all for the directions of a pair of
    photons, and A^T spreads it over the voxels by length: probability = A^T(a^2 cos t0 cos t1 / (2 pi L^2)) / volume.
    """
    scan = ring_scanner(rings=12, crystals=96, n_radial=70)
    geometry = pet_geometry(scan)
    grid = geometry.default_grid(pixel_mm=5.0, n=28)
    lines = geometry.lines().reshape(*geometry.shape[:2], 4)
    across = np.hypot(lines[..., 2] - lines[..., 0], lines[..., 3] - lines[..., 1])
    delta = np.concatenate([np.full(int(n), d) for _, d, _, n in geometry.segments])
    length = np.sqrt(across[..., None] ** 2 + delta**2)
    cosine = (across[..., None] / length) * (across[..., None] / (2 * scan.radius_mm))
    cell = scan.ring_spacing_mm * 2 * math.pi * scan.radius_mm / scan.crystals
    solid = torch.from_numpy(cell**2 * cosine**2 / (2 * math.pi * length**2)).float()
    operator = PETOperator(geometry, grid, factors=solid)
    modelled = operator.sensitivity().double() / math.prod(grid.spacing_mm)

    rng, n = np.random.default_rng(5), 2_000_000
    top = 60.0  # radius of the cylinder of decays, over the whole length of the grid
    half_z = 27.0  # the outermost rings' cells end at 36, which lines from their middles do not tell
    radius, angle = top * np.sqrt(rng.random(n)), 2 * math.pi * rng.random(n)
    x, y, z = radius * np.cos(angle), radius * np.sin(angle), (2 * rng.random(n) - 1) * half_z
    u, phi = 2 * rng.random(n) - 1, 2 * math.pi * rng.random(n)
    sin = np.sqrt(1 - u * u)
    dx, dy, dz = sin * np.cos(phi), sin * np.sin(phi), u
    # where the line leaves the cylinder of crystals, both ways
    b, a2 = x * dx + y * dy, sin * sin
    root = np.sqrt(b * b - a2 * (radius**2 - scan.radius_mm**2))
    ids, inside = [], np.ones(n, dtype=bool)
    for t in ((-b - root) / a2, (-b + root) / a2):
        ring = np.floor((z + t * dz) / scan.ring_spacing_mm + scan.rings / 2).astype(int)
        psi = np.arctan2(x + t * dx, -(y + t * dy))
        crystal = np.rint(psi * scan.crystals / (2 * math.pi)).astype(int) % scan.crystals
        inside &= (ring >= 0) & (ring < scan.rings)
        ids.append(np.clip(ring, 0, scan.rings - 1) * scan.crystals + crystal)
    hit = inside & (geometry.bin_of(np.stack(ids, 1)) >= 0)
    # eighteen regions: six along z, three around the axis
    edges = np.array([0.0, 20.0, 40.0, 60.0])
    where = (np.clip((z + half_z) / (2 * half_z) * 6, 0, 5).astype(int), np.searchsorted(edges, radius) - 1)
    sent = np.zeros((6, 3))
    counted = np.zeros((6, 3))
    np.add.at(sent, where, 1)
    np.add.at(counted, where, hit)
    share = counted / sent

    # the same regions in the image: every voxel split into 4 x 5 x 5 points
    nz, ny, nx = grid.shape
    split = zip((nz, ny, nx), (4, 5, 5), grid.spacing_mm, strict=True)
    points = [((np.arange(m * k) + 0.5) / k - m / 2) * d for m, k, d in split]
    r = np.hypot(points[1][:, None], points[2])
    ring_of = np.searchsorted(edges, r) - 1
    fine = modelled.numpy().repeat(5, 1).repeat(5, 2)
    want = np.zeros((6, 3))
    slab = np.clip((points[0] + half_z) / (2 * half_z) * 6, -1, 6).astype(int)
    slab[np.abs(points[0]) > half_z] = -1
    for i in range(6):
        weights = np.bincount(np.arange(nz * 4)[slab == i] // 4, minlength=nz) / (slab == i).sum()
        plane = np.tensordot(weights, fine, 1)
        for j in range(3):
            want[i, j] = plane[ring_of == j].mean()
    assert sent.sum() == n
    # every region to 1 % and three sigmas of its own count, the whole to 0.5 %
    assert (np.abs(share / want - 1) <= 0.01 + 3 / np.sqrt(counted)).all(), (share / want).round(4)
    assert abs(counted.sum() / (want * sent).sum() - 1) < 0.005


def loop(operator, y, subsets: int, passes: int):
    x = torch.ones(operator.domain.shape)
    parts = operator.subsets(subsets)
    for _ in range(passes):
        for part, views in parts:
            x = em_step(x, y[views], part, part.sensitivity())
    return x


@pytest.mark.parametrize("time", [None, TOF(7, 30.0, 15.0)], ids=["plain", "tof"])
def test_uniform_cylinder_is_recovered_in_bq_per_ml(time):
    scan = ring_scanner()
    geometry = pet_geometry(scan, max_ring_difference=2, tof=time)
    grid = geometry.default_grid(pixel_mm=8.0, n=16)
    truth = cylinder(grid, 50.0, 8000.0)
    mu = cylinder(grid, 50.0, 0.0096)
    factors = attenuation_factors(mu, grid, geometry)
    scale = quantitative_scale(300.0, 6586.2, branching=0.967, dead_time=1.1, calibration=1e-4)
    flat = torch.full(geometry.shape, 0.5)
    operator = PETOperator(geometry, grid, factors=factors, additive=flat, scale=scale)
    y = operator.expected(truth)
    x = loop(operator, y, 8, 8)
    inner = cylinder(grid, 38.0) == 1
    inner[:2], inner[-2:] = False, False
    assert abs(float(x[inner].mean()) / 8000.0 - 1) < 1e-3  # Bq/mL in, counts, Bq/mL out
    assert float((x[inner] / 8000.0 - 1).abs().max()) < 0.01
    # without the attenuation in the model the middle is far too low
    wrong = loop(PETOperator(geometry, grid, additive=flat, scale=scale), y, 8, 1)
    assert float(wrong[inner].mean()) < 0.7 * 8000.0


def test_expectation_maximisation_conserves_counts():
    operator = case("plain")
    y = torch.poisson(5 * torch.rand(operator.range.shape, generator=torch.Generator().manual_seed(0)))
    x = torch.ones(operator.domain.shape)
    for _ in range(3):
        x = em_step(x, y, operator, operator.sensitivity())
        seen = operator.forward(x)
        met = operator.forward(torch.ones_like(x)) > 0
        assert float(seen.sum()) == pytest.approx(float(y[met].sum()), rel=1e-5)


def test_pinv_gives_the_activity():
    scan = ring_scanner(gap_crystals=(7,), crystals=128, n_radial=90)
    for made in (dict(), dict(span=3), dict(mashing=2, tof=TOF(7, 30.0, 15.0), max_ring_difference=3)):
        geometry = pet_geometry(scan, **made)
        grid = geometry.default_grid(pixel_mm=4.0, n=36)
        truth = cylinder(grid, 50.0, 3.0)
        factors = efficiency_factors(torch.from_numpy(scan.real_crystals()), geometry)
        factors = factors * attenuation_factors(cylinder(grid, 50.0, 0.0096), grid, geometry)
        additive = torch.full(geometry.shape, 0.25)
        operator = PETOperator(geometry, grid, factors=factors, additive=additive, scale=2.0)
        image = operator.pinv(operator.expected(truth))
        inner = cylinder(grid, 40.0) == 1
        inner[:4], inner[-4:] = False, False
        assert float(image[inner].mean()) == pytest.approx(3.0, rel=0.03)
        assert float((image[inner] - 3.0).abs().max()) < 0.3
        outside = cylinder(grid, 60.0) == 0
        assert float(image[outside].abs().mean()) < 0.15
    with pytest.raises(NotImplementedError, match="all views"):
        operator.subsets(2)[0][0].pinv(torch.zeros(16, 90, 8))


# list mode ----------------------------------------------------------------------------------------------------------


def test_list_mode_is_the_sinogram_event_by_event():
    geometry = pet_geometry(ring_scanner(), n_radial=24, max_ring_difference=2, tof=TIME)
    grid = geometry.default_grid(pixel_mm=11.0, n=13)
    whole = PETOperator(geometry, grid, scale=2.0)
    bins = np.random.default_rng(3).integers(0, math.prod(geometry.shape), 300)
    pairs, time = geometry.pairs_of(bins)
    events = Events(torch.from_numpy(pairs), torch.ones(300, dtype=torch.bool), torch.from_numpy(time))
    operator = PETListmode(
        events, geometry.scanner, grid, tof=TIME, scale=2.0, sensitivity=whole.sensitivity(), additive=torch.ones(300)
    )
    x = torch.rand(grid.shape, dtype=torch.float64)
    want = whole(x).flatten()[torch.from_numpy(bins)]
    assert torch.allclose(operator(x), want, rtol=1e-6, atol=1e-6 * float(want.max()))
    assert torch.allclose(operator.expected(x), want + 1, rtol=1e-6)
    y = torch.rand(300, dtype=torch.float64)
    check_adjoint(operator.forward, operator.adjoint, x, y, 1e-13)
    spread = torch.zeros(geometry.shape, dtype=torch.float64)
    spread.view(-1).index_add_(0, torch.from_numpy(bins), y)
    assert torch.allclose(operator.adjoint(y), whole.adjoint(spread), rtol=1e-6, atol=1e-9)
    parts = operator.subsets(7)
    assert sorted(torch.cat([i for _, i in parts]).tolist()) == list(range(300))
    together = torch.zeros(300, dtype=torch.float64)
    for part, index in parts:
        together[index] = part.expected(x)
    assert torch.equal(together, operator.expected(x))
    assert torch.allclose(sum(p.sensitivity() for p, _ in parts), whole.sensitivity(), rtol=1e-5)


def test_list_mode_refuses():
    scan = ring_scanner()
    grid = pet_geometry(scan).default_grid(n=8)
    pairs = torch.tensor([[0, 40], [3, 50]], dtype=torch.int32)
    with pytest.raises(ValueError, match="delayed"):
        PETListmode(Events(pairs, torch.tensor([True, False])), scan, grid)
    events = Events(pairs, torch.ones(2, dtype=torch.bool))
    with pytest.raises(ValueError, match="no time bins"):
        PETListmode(events, scan, grid, tof=TIME)
    with pytest.raises(ValueError, match="sensitivity"):
        PETListmode(events, scan, grid).sensitivity()
    with pytest.raises(ValueError, match="factors"):
        PETListmode(events, scan, grid, factors=torch.ones(3))


# numbers that go in -------------------------------------------------------------------------------------------------


def test_quantitative_scale():
    assert quantitative_scale(100.0) == 100.0
    # one half-life: the mean is 1 / (2 ln 2) of the start
    assert quantitative_scale(60.0, 60.0) == pytest.approx(60.0 / (2 * math.log(2)))
    assert quantitative_scale(1e-3, 60.0, start_s=60.0) == pytest.approx(0.5e-3, rel=1e-4)
    # counts over time, added up
    t = (np.arange(100000) + 0.5) / 100000 * 900
    counted = 0.967 / 1.2 * (0.5 ** ((t + 100) / 6586.2)).mean() * 900
    scale = quantitative_scale(900.0, 6586.2, start_s=100.0, branching=0.967, dead_time=1.2)
    assert scale == pytest.approx(counted, rel=1e-9)
    for change in (dict(duration_s=0.0), dict(half_life_s=-1.0), dict(branching=1.2), dict(dead_time=0.9)):
        with pytest.raises(ValueError, match=next(iter(change))):
            quantitative_scale(**{"duration_s": 1.0, **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(factors=-torch.ones(1)), "not negative"),
        (dict(additive=torch.full((1,), math.nan)), "finite"),
        (dict(factors=torch.ones(3, 3, 3)), "broadcast"),
        (dict(scale=0.0), "scale"),
        (dict(psf_fwhm_mm=-1.0), "psf_fwhm_mm"),
    ],
)
def test_bad_terms(change, message):
    geometry = pet_geometry(ring_scanner())
    with pytest.raises(ValueError, match=message):
        PETOperator(geometry, geometry.default_grid(n=8), **change)


def test_shapes_are_told():
    operator = case("plain")
    with pytest.raises(ValueError, match="resample"):
        operator(torch.zeros(3, 3, 3))
    for one in (operator, case("plain+")):
        with pytest.raises(ValueError, match="measurement"):
            one.adjoint(torch.zeros(3, 3, 3))


# attenuation --------------------------------------------------------------------------------------------------------


def test_attenuation_of_a_water_cylinder():
    geometry = pet_geometry("small", max_ring_difference=0, mashing=8)
    grid = geometry.default_grid(pixel_mm=1.0, n=160)
    factors = attenuation_factors(cylinder(grid, 60.0, 0.0096), grid, geometry)
    assert factors.shape == geometry.shape
    s = torch.from_numpy(geometry.radial_mm())
    want = torch.exp(-0.0096 * 2 * (60.0**2 - s**2).clamp_min(0).sqrt())
    inside = (s.abs() < 55) | (s.abs() > 63)
    assert torch.allclose(factors[:, inside, 5].double(), want[inside].expand(factors.shape[0], -1), rtol=0.005)


def test_map_on_its_own_grid_is_resampled_or_refused():
    geometry = pet_geometry("small", max_ring_difference=0, mashing=8)
    grid = geometry.default_grid(pixel_mm=4.0, n=40)
    other = VolumeGrid((33, 90, 90), (2.5, 2.0, 2.0))
    mu = cylinder(other, 60.0, 0.0096)
    got = attenuation_factors(mu, other, geometry, onto=grid)
    want = attenuation_factors(cylinder(grid, 60.0, 0.0096), grid, geometry)
    assert float((got - want).abs().max()) < 0.03
    # ends inside the object, along z and along x
    short, narrow = VolumeGrid((10, 90, 90), (2.5, 2.0, 2.0)), VolumeGrid((33, 90, 50), (2.5, 2.0, 2.0))
    with pytest.raises(ValueError, match=r"along z although"):
        attenuation_factors(cylinder(short, 60.0, 0.0096), short, geometry, onto=grid)
    with pytest.raises(ValueError, match=r"along x although"):
        attenuation_factors(cylinder(narrow, 60.0, 0.0096), narrow, geometry, onto=grid)
    # smaller than the field of view but with air around: fine
    small = VolumeGrid((33, 66, 66), (2.5, 2.0, 2.0))
    got = attenuation_factors(cylinder(small, 60.0, 0.0096), small, geometry, onto=grid)
    assert float((got - want).abs().max()) < 0.03


def test_resampling_follows_the_affines():
    rng = np.random.default_rng(0)
    grid = VolumeGrid((4, 5, 6), (3.0, 2.0, 1.5))
    volume = torch.from_numpy(rng.random(grid.shape))
    assert torch.allclose(resample_volume(volume, grid, grid), volume, atol=1e-12)
    slab = grid.slab(1, 3)
    assert torch.allclose(resample_volume(volume, grid, slab), volume[1:3], atol=1e-12)
    flipped = grid.matrix()
    flipped[2, 2] *= -1
    flipped[2, 3] *= -1
    turned = VolumeGrid(grid.shape, grid.spacing_mm, tuple(map(tuple, flipped.tolist())))
    assert torch.allclose(resample_volume(volume, grid, turned), volume.flip(0), atol=1e-12)


def test_units_of_attenuation_are_checked():
    geometry = pet_geometry("small", max_ring_difference=0)
    grid = geometry.default_grid(n=8)
    for value, message in ((0.096, "divide by 10"), (-1.0, "mu_from_hu"), (1000.0, "mu_from_hu")):
        with pytest.raises(ValueError, match=message):
            attenuation_factors(torch.full(grid.shape, value), grid, geometry)


def test_mu_from_hu():
    assert mu_from_hu(torch.tensor([-1000.0, -2000.0, 0.0])).tolist() == pytest.approx([0.0, 0.0, 0.0096])
    for kvp in (80, 100, 110, 120, 130, 140):
        hu = torch.linspace(20, 80, 601)
        steps = mu_from_hu(hu, kvp).diff()
        assert float(steps.min()) > -2e-6 and float(steps.max()) < 3e-6, "the two lines meet"
        assert 0.012 < float(mu_from_hu(torch.tensor(1000.0), kvp)) < 0.017
    with pytest.raises(ValueError, match="kvp"):
        mu_from_hu(torch.zeros(1), 90)


# normalisation ------------------------------------------------------------------------------------------------------


def block_scanner():
    return ring_scanner(crystals=216, block_crystals=9, gap_crystals=(0,), rings=16, block_rings=8, n_radial=150)


def made_efficiencies(scan, seed: int = 0):
    rng = np.random.default_rng(seed)
    place = 0.7 + 0.6 * rng.random((scan.block_rings, scan.block_crystals))
    block = 0.8 + 0.4 * rng.random((scan.rings // scan.block_rings, scan.crystals // scan.block_crystals))
    value = (
        np.tile(place, block.shape)
        * np.kron(block, np.ones(place.shape))
        * rng.normal(1, 0.05, (scan.rings, scan.crystals))
    )
    value = np.where(scan.real_crystals(), value, 0.0)
    return torch.from_numpy(value / value[scan.real_crystals()].mean())


def test_efficiency_factors_add_up_the_pairs_of_a_bin():
    scan = block_scanner()
    values = made_efficiencies(scan)
    plain = pet_geometry(scan, n_radial=30)
    pairs, _ = plain.pairs_of(np.arange(math.prod(plain.shape)))
    flat = values.numpy().ravel()
    want = (flat[pairs[:, 0]] * flat[pairs[:, 1]]).reshape(plain.shape)
    assert np.allclose(efficiency_factors(values, plain).numpy(), want, rtol=1e-5)
    packed = pet_geometry(scan, n_radial=30, span=5, mashing=4)
    bins = packed.bin_of(pairs)
    kept = bins >= 0
    summed = np.bincount(bins[kept], want.ravel()[kept], minlength=math.prod(packed.shape)).reshape(packed.shape)
    assert np.allclose(efficiency_factors(values, packed).numpy(), summed, rtol=1e-5)
    ones = efficiency_factors(torch.ones(scan.rings, scan.crystals), packed)
    assert np.allclose(ones.numpy(), np.broadcast_to(packed.multiplicity(), ones.shape))


def test_fan_sums_of_events_and_of_their_sinogram_agree():
    scan = block_scanner()
    geometry = pet_geometry(scan)
    bins = np.flatnonzero(efficiency_factors(torch.from_numpy(scan.real_crystals()), geometry).numpy().ravel())
    pairs, _ = geometry.pairs_of(np.random.default_rng(0).choice(bins, 2000))
    events = Events(torch.from_numpy(pairs), torch.ones(2000, dtype=torch.bool))
    fans = fan_sums(events, scan)
    assert float(fans.sum()) == 4000
    assert torch.equal(fan_sums(events.histogram(geometry)[0], geometry), fans)
    packed = pet_geometry(scan, span=3, mashing=2)
    assert float(fan_sums(events.histogram(packed)[0], packed).sum()) == pytest.approx(
        2 * float(events.histogram(packed)[0].sum())
    )


def head_counts(scan, efficiencies, total: float, seed: int):
    """Events of an off-centre ellipse seen by crystals of these efficiencies."""
    geometry = pet_geometry(scan)
    grid = geometry.default_grid(n=32)
    y = (torch.arange(32) - 15.5)[:, None] * grid.spacing_mm[1] + 5
    x = (torch.arange(32) - 15.5) * grid.spacing_mm[2] - 3
    disc = ((y / 60) ** 2 + (x / 45) ** 2 < 1).float()
    operator = PETOperator(geometry, grid, factors=efficiency_factors(efficiencies, geometry))
    clean = operator(disc.expand(grid.shape).contiguous())
    clean *= total / float(clean.sum())
    rng = np.random.default_rng(seed)
    return geometry, grid, torch.from_numpy(rng.poisson(clean.numpy()).astype(np.float32))


def test_fan_sums_find_the_efficiencies():
    scan = block_scanner()
    truth = made_efficiencies(scan)
    real = torch.from_numpy(scan.real_crystals())
    for total, limit in ((5e6, 0.06), (1e5, 0.09)):
        geometry, _, counts = head_counts(scan, truth, total, 1)
        found = fan_sum_efficiencies(fan_sums(counts, geometry), scan)
        assert float(found[~real].abs().max()) == 0 and float(found[real].mean()) == pytest.approx(1.0)
        ratio = found[real] / truth[real]
        # what varies slowly is not asked for: compare within neighbourhoods of the ring
        assert float((ratio / ratio.mean() - 1).std()) < limit
        assert float((1 / truth[real] - 1).std()) > 0.24
    with pytest.raises(ValueError, match="single count"):
        fan_sum_efficiencies(torch.zeros(scan.rings, scan.crystals), scan)
    with pytest.raises(ValueError, match="one value per crystal"):
        fan_sum_efficiencies(torch.zeros(3, 3), scan)


def test_gaps_both_ways_round_a_block():
    """Virtual crystals at the end of a block and virtual rings, the last block of rings without its own."""
    scan = ring_scanner(
        rings=11, crystals=60, block_crystals=6, block_rings=4, gap_crystals=(5,), gap_rings=(3,), n_radial=40
    )
    real = torch.from_numpy(scan.real_crystals())
    assert real.shape == (11, 60) and int(real.sum()) == 9 * 50
    fans = torch.poisson(real.double() * 400, generator=torch.Generator().manual_seed(0))
    found = fan_sum_efficiencies(fans, scan)
    assert float(found[~real].abs().max()) == 0
    assert float((found[real] - 1).abs().max()) < 0.15
    geometry = pet_geometry(scan)
    factors = efficiency_factors(real, geometry)
    assert sorted(factors.unique().tolist()) == [0.0, 1.0]
    randoms = randoms_from_delayed(torch.poisson(factors * 3, generator=torch.Generator().manual_seed(1)), geometry)
    assert bool(randoms.isfinite().all()) and float(randoms[factors == 0].max()) == 0


@pytest.mark.parametrize("tof", [None, TIME], ids=["plain", "tof"])
def test_randoms_from_delayed(tof):
    scan = block_scanner()
    truth = made_efficiencies(scan, 3)
    geometry = pet_geometry(scan, n_radial=100, max_ring_difference=7, tof=tof)
    singles = truth * torch.linspace(0.8, 1.2, scan.rings, dtype=torch.float64)[:, None]
    rates = efficiency_factors(singles, geometry).double()
    rates = rates * (2e6 / float(rates.sum()))
    if tof is not None:
        rates = (rates / tof.bins).unsqueeze(2).expand(geometry.shape)
    delayed = torch.from_numpy(np.random.default_rng(0).poisson(rates.numpy()).astype(np.float32))
    found = randoms_from_delayed(delayed, geometry)
    assert found.shape == geometry.shape
    assert float(found.sum(dtype=torch.float64)) == pytest.approx(float(delayed.sum(dtype=torch.float64)), rel=1e-6)
    kept = rates > 0
    assert float(((found[kept] / rates[kept]) - 1).std()) < 0.05
    assert float(found[~kept].abs().max()) == 0
    # far less noise than the delayed counts themselves
    assert float((found - rates).square().sum()) < 0.02 * float((delayed - rates).square().sum())

"""MRI trajectories: units and what they refuse, identity by content, and the generators' geometry."""

import copy
import math
import pickle

import numpy as np
import pytest
import torch

from recon3d.geometry import GeometryWarning, Trajectory
from recon3d.geometry.mri import cartesian, kooshball, radial, random, spiral, stack

SHAPE = (48, 64)
RAD = np.random.default_rng(0).uniform(-math.pi, math.pi, (5, 7, 2))


@pytest.mark.parametrize("unit", ["rad", "cycles", "index"])
def test_units_agree(unit):
    want = Trajectory(RAD, SHAPE)
    given = want.as_unit(unit).reshape(5, 7, 2)
    for points in (given, given.numpy(), given.tolist()):
        got = Trajectory(points, SHAPE, unit)
        assert got.layout == (5, 7) and got.n_samples == len(got) == 35 and got.ndim == 2
        assert got.points.dtype == torch.float64
        assert torch.allclose(got.points, want.points, rtol=1e-15, atol=1e-15)


def test_identity_is_content():
    a, b = Trajectory(RAD, SHAPE), Trajectory(torch.from_numpy(RAD.reshape(-1, 2)), SHAPE)
    assert a == b and hash(a) == hash(b) and a.digest == b.digest
    assert a != Trajectory(RAD, (64, 48)) and a != Trajectory(RAD[:4], SHAPE) and a != 3
    assert Trajectory([[-0.0, 3.0]], SHAPE) == Trajectory([[0.0, 3.0]], SHAPE)
    for twin in (copy.deepcopy(a), pickle.loads(pickle.dumps(a))):
        assert twin == a and twin.layout == a.layout and twin.shape == a.shape
    assert "5 x 7 samples of 48 x 64" in repr(a)


def test_frozen_and_copied():
    mine = RAD.copy()
    a = Trajectory(mine, SHAPE)
    mine[:] = 0
    assert a == Trajectory(RAD, SHAPE)
    with pytest.raises(AttributeError, match="cannot be changed"):
        a.shape = (3, 3)


def test_subset():
    a = Trajectory(RAD, SHAPE)
    assert torch.equal(a.subset([3, 1]).points, a.points[[3, 1]])
    assert a.subset(slice(0, 7)) == Trajectory(RAD[0], SHAPE)
    assert a.subset(torch.arange(35)) == a and a.subset(5).n_samples == 1
    # a piece near the centre is no reason to doubt the unit
    assert radial(4, 64, SHAPE).subset([32, 33]).n_samples == 2
    for bad in ([], [35], [0.5]):
        with pytest.raises(ValueError, match="subset"):
            a.subset(bad)


@pytest.mark.parametrize(
    ("points", "shape", "unit", "message"),
    [
        (RAD[..., :1], SHAPE, "rad", r"points must be \[\.\.\., 2\]"),
        (RAD.reshape(-1, 2).T, SHAPE, "rad", "transpose"),
        ([1.0, 2.0], SHAPE, "rad", r"\[\.\.\., 2\]"),
        (np.zeros((0, 2)), SHAPE, "rad", "empty"),
        ([[math.nan, 3.0]], SHAPE, "rad", "NaN"),
        ([[math.inf, 3.0]], SHAPE, "rad", "NaN or infinite"),
        (RAD, SHAPE, "degrees", "unit must be"),
        (RAD, (48, 64, 8, 8), "rad", "one to three"),
        (RAD, (48, 0), "rad", "positive sizes"),
        # the wrong unit, both ways
        ([[20.0, 30.0]], SHAPE, "rad", "unit='index'"),
        (RAD, SHAPE, "cycles", "unit='rad'"),
        ([[20.0, 30.0]], SHAPE, "cycles", "unit='index'"),
        ([[0.5, 0.2], [-0.5, 0.1]], SHAPE, "rad", "unit='cycles'"),
        ([[0.5, 0.2], [-0.5, 0.1]], SHAPE, "index", "unit='cycles'"),
        ([[3.1, 0.2], [-3.1, 0.1]], SHAPE, "index", "unit='rad'"),
        # the right one, on the wrong grid
        ([[32.0, 20.0]], SHAPE, "index", "reversed"),
        ([[320.0, 20.0]], SHAPE, "index", "shape of the grid"),
    ],
)
def test_bad(points, shape, unit, message):
    with pytest.raises(ValueError, match=message):
        Trajectory(points, shape, unit)


def test_complex_points():
    with pytest.raises(TypeError, match="complex"):
        Trajectory(RAD[..., 0] + 1j * RAD[..., 1], SHAPE)


def test_low_resolution_warns():
    with pytest.warns(GeometryWarning, match="unit right"):
        Trajectory([[0.3, 0.1]], SHAPE)


def test_rim_in_float32():
    rim = torch.tensor([[math.pi, -math.pi]], dtype=torch.float32)
    assert Trajectory(rim, SHAPE).points.abs().max() <= math.pi


def test_radial():
    t = radial(5, 8, SHAPE)
    assert t.layout == (5, 8)
    points = t.points.reshape(5, 8, 2)
    assert points[:, 4].abs().max() == 0, "every spoke measures the centre"
    radius = points.norm(dim=-1)
    assert torch.allclose(radius, torch.tensor([4, 3, 2, 1, 0, 1, 2, 3]) * (math.pi / 4) + 0 * radius)
    assert torch.allclose(points[0, 5], torch.tensor([0.0, math.pi / 4], dtype=torch.float64))
    second = math.degrees(math.atan2(*points[1, 5].tolist()))
    assert second == pytest.approx(111.246, abs=1e-3)
    tiny = radial(2, 8, SHAPE, tiny=7).points.reshape(2, 8, 2)
    assert math.degrees(math.atan2(*tiny[1, 5].tolist())) == pytest.approx(23.628, abs=1e-3)
    even = radial(4, 8, SHAPE, golden=False).points.reshape(4, 8, 2)
    assert math.degrees(math.atan2(*even[1, 5].tolist())) == pytest.approx(45)


def test_spiral():
    t = spiral(4, 1200, (64, 64))
    points = t.points.reshape(4, 1200, 2)
    assert points[:, 0].abs().max() == 0
    assert points[:, -1].norm(dim=-1) == pytest.approx([math.pi] * 4)
    step = points.diff(dim=1).norm(dim=-1)  # chords, shorter than the arc where it turns fast
    assert step[:, 9:].max() <= 1.02 * step[:, 9:].min()
    # one Nyquist distance between neighbouring arms: along any ray they cross every 2 pi / 64
    assert t.undersampling() < 1.3 and spiral(2, 1200, (64, 64), turns=8).undersampling() > 1.7
    golden = spiral(2, 3, (64, 64), golden=True).points.reshape(2, 3, 2)
    turn = math.atan2(*golden[1, 2].tolist()) - math.atan2(*golden[0, 2].tolist())
    assert math.degrees(turn) % 360 == pytest.approx(137.508, abs=1e-3)


def test_kooshball():
    t = kooshball(400, 16, (16, 16, 16))
    rim = t.points.reshape(400, 16, 3)[:, 0] / math.pi
    assert rim.norm(dim=1) == pytest.approx([1.0] * 400)
    # directions spread evenly: second moments of the sphere
    assert torch.allclose(rim.T @ rim / 400, torch.eye(3, dtype=torch.float64) / 3, atol=0.02)


def test_stack():
    plane = radial(3, 8, (8, 8))
    t = stack(plane, 6, [1, 3])
    assert t.shape == (6, 8, 8) and t.layout == (2, 3, 8)
    assert t.as_unit("index")[:, 0].unique().tolist() == pytest.approx([-2, 0])
    assert torch.equal(t.points[24:, 1:], plane.points)
    assert stack(plane, 6).n_samples == 6 * 24


def test_random_and_cartesian():
    assert random(100, SHAPE, 1) == random(100, SHAPE, 1) != random(100, SHAPE, 2)
    grid = cartesian((4, 3)).as_unit("index").round().reshape(4, 3, 2)
    assert grid[:, 0, 0].tolist() == [-2, -1, 0, 1] and grid[0, :, 1].tolist() == [-1, 0, 1]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: radial(0, 8, SHAPE), "n_spokes"),
        (lambda: radial(2, 8, (8, 8, 8)), "two sizes"),
        (lambda: spiral(2, 8, SHAPE, turns=-1.0), "turns"),
        (lambda: kooshball(2, 8, SHAPE), "three sizes"),
        (lambda: stack(kooshball(2, 8, (8, 8, 8)), 4), "two-dimensional"),
        (lambda: stack(radial(2, 8, SHAPE), 4, [4]), "partitions"),
        (lambda: random(0, SHAPE), "n_samples"),
        (lambda: radial(2, 8, SHAPE).as_unit("mm"), "unit must be"),
    ],
)
def test_bad_generators(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_undersampling():
    assert cartesian((9, 8)).undersampling() == 1
    full, quarter = radial(110, 64, (64, 64)).undersampling(), radial(16, 64, (64, 64)).undersampling()
    assert full < 1.05 and 2.5 < quarter < 6
    assert kooshball(200, 32, (16, 16, 16)).undersampling() < 1.3 < kooshball(60, 32, (16, 16, 16)).undersampling()

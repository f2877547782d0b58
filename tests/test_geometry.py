"""Geometry values: units, ranges and what they refuse."""

import math

import numpy as np
import pytest

from recon3d.geometry import FanBeam, ParallelBeam, VolumeGrid, equiangular


def test_detector_cells_and_offset():
    beam = ParallelBeam(equiangular(4), 5, 2.0, detector_offset_mm=1.0)
    assert beam.detector_mm().tolist() == [-3.0, -1.0, 1.0, 3.0, 5.0]
    # rotation axis at cell 296 of 640
    tooth = ParallelBeam((0.0,), 640, 1.0, detector_offset_mm=(639 / 2 - 296))
    assert tooth.detector_mm()[296] == 0.0


def test_equiangular_leaves_out_the_end():
    assert np.allclose(np.diff(equiangular(6)), math.pi / 6)
    assert len(set(np.mod(equiangular(6), math.pi))) == 6


@pytest.mark.parametrize("angles", [np.arange(0, 180), np.arange(0, 360, 0.5), [1000.0]], ids=["180", "360", "far"])
def test_degrees_are_refused(angles):
    with pytest.raises(ValueError, match="degrees"):
        ParallelBeam(angles, 8, 1.0)


def test_radians_of_several_turns_are_fine():
    assert ParallelBeam(np.linspace(0, 30, 100), 8, 1.0).n_views == 100


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"angles_rad": ()}, "zero views"),
        ({"angles_rad": (math.nan,)}, "NaN"),
        ({"n_detector": 0}, "n_detector"),
        ({"detector_spacing_mm": -1.0}, "detector_spacing_mm"),
        ({"detector_offset_mm": math.inf}, "detector_offset_mm"),
        ({"source_to_axis_mm": 0.0}, "source_to_axis_mm"),
        ({"source_to_detector_mm": 50.0}, "must not be below"),
    ],
)
def test_bad_fan(change, message):
    good = dict(
        angles_rad=(0.0,),
        n_detector=4,
        detector_spacing_mm=1.0,
        source_to_axis_mm=100.0,
        source_to_detector_mm=150.0,
    )
    FanBeam(**good)
    with pytest.raises(ValueError, match=message):
        FanBeam(**{**good, **change})


def test_truncation_is_told_and_source_inside_refused():
    grid = VolumeGrid((1, 100, 100), (1.0, 1.0, 1.0))
    assert ParallelBeam((0.0,), 100, 1.0).check(grid) == []
    assert "truncation" in ParallelBeam((0.0,), 60, 1.0).check(grid)[0]
    # an offset uncovers one side
    assert "truncation" in ParallelBeam((0.0,), 100, 1.0, 20.0).check(grid)[0]
    fan = FanBeam((0.0,), 250, 1.0, source_to_axis_mm=200.0, source_to_detector_mm=400.0)
    assert fan.check(grid) == []
    with pytest.raises(ValueError, match="turns inside the image"):
        FanBeam((0.0,), 250, 1.0, source_to_axis_mm=60.0, source_to_detector_mm=400.0).check(grid)


def test_subset_keeps_the_class():
    fan = FanBeam(equiangular(10, 2 * math.pi), 4, 1.0, source_to_axis_mm=100.0, source_to_detector_mm=150.0)
    part = fan.subset([1, 3])
    assert isinstance(part, FanBeam) and part.angles_rad == (fan.angles_rad[1], fan.angles_rad[3])
    for empty_or_far in ([], [10]):
        with pytest.raises(ValueError):
            fan.subset(np.asarray(empty_or_far, dtype=int))


def test_grid():
    grid = VolumeGrid((4, 3, 2), (5.0, 1.0, 1.0))
    centre = grid.matrix() @ [0.5, 1.0, 1.5, 1.0]
    assert np.allclose(centre[:3], 0)
    slab = grid.slab(1, 3)
    assert slab.shape == (2, 3, 2)
    assert np.allclose(slab.matrix() @ [0, 0, 0, 1], grid.matrix() @ [0, 0, 1, 1])
    for bad in [dict(shape=(0, 1, 1)), dict(spacing_mm=(1, 1, 0)), dict(affine=np.zeros((4, 4)))]:
        with pytest.raises(ValueError, match="VolumeGrid"):
            VolumeGrid(**{**dict(shape=(1, 1, 1), spacing_mm=(1, 1, 1)), **bad})

"""Measured projections: few views against the reconstruction from all of them."""

import math
import warnings
from dataclasses import replace

import pytest

from recon3d import baselines, demo
from recon3d.api import reconstruct
from recon3d.geometry import FanBeam, GeometryWarning
from recon3d.operators import CTOperator
from recon3d.ops import fbp

# Root mean square errors inside the field of view, relative to FBP's on the same views. The reference is itself a noisy
# FBP, and its noise, which no method can know, is most of what is left of the best ones.
LIMITS = {
    "raw_ct/tooth_parallel_aps.h5": (30, 181, 0.4, 0.8),
    "raw_ct/htc2022_ta_fan_full360.h5": (60, 720, 0.5, 0.8),
}


@pytest.mark.parametrize("name", LIMITS, ids=["tooth", "htc"])
def test_few_measured_views_beat_fbp_and_sirt(data, name):
    views, total, of_fbp, of_sirt = LIMITS[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", GeometryWarning)
        job = demo.measured(data(name))
        job = replace(job, y=job.y[:1], reference=job.reference[:1], grid=job.grid.slab(0, 1))
        assert job.geometry.n_views == views and f"of {total} views" in job.title
        assert isinstance(job.geometry, FanBeam) == ("fan" in name)
        operator = CTOperator(job.geometry, job.grid)
        plain = fbp(job.y, job.geometry, job.grid.slice_shape, job.grid.pixel_mm, window="hann")
        sirt = baselines.sirt(job.y, operator, iterations=100, weights=job.noise.weights(job.y))
        result = reconstruct(job.y, job.geometry, job.grid, "ct", job.prior, noise=job.noise, accept_mismatch=True)
    inside = demo.field_of_view(job.geometry, job.grid)

    def error(volume):
        return math.sqrt(float((volume - job.reference)[inside].double().square().mean()))

    ours, theirs = error(result.volume), (error(plain), error(sirt))
    print(f"{job.name}: {ours:.5f} 1/mm, FBP {theirs[0]:.5f}, SIRT {theirs[1]:.5f}")
    assert ours < of_fbp * theirs[0]
    assert ours < of_sirt * theirs[1]

"""The batch of a GPU: as many slices as fit, in powers of two, without much padding."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from recon3d.engine.batch import gpu_batch

MIB = 1 << 20


@pytest.mark.parametrize(
    ("each", "fixed", "room", "views", "want"),
    [
        (100, 50, 10_000, 512, 32), (100, 50, 3000, 512, 16), (100, 50, 1000, 512, 8), (100, 50, 120, 512, 1),
        (1, 0, 10_000, 5, 2), (1, 0, 10_000, 7, 8), (1, 0, 10_000, 8, 8), (1, 0, 10_000, 24, 8),
        (1, 0, 10_000, 100, 16),
    ],
)  # fmt: skip
def test_the_largest_that_fits_and_wastes_little(each, fixed, room, views, want):
    assert gpu_batch(lambda n: (fixed + n * each) * MIB, room * MIB, views) == want


@given(st.integers(1, 500), st.integers(0, 2000), st.integers(0, 20_000), st.integers(1, 600))
def test_it_fits_and_the_double_would_not(each, fixed, room, views):
    batch = gpu_batch(lambda n: fixed + n * each, room, views)
    padded = lambda b: -(-views // b) * b <= 1.25 * views  # noqa: E731
    fits = lambda b: fixed + b * each <= 0.9 * room  # noqa: E731
    assert batch in (1, 2, 4, 8, 16, 32)
    assert batch == 1 or (fits(batch) and padded(batch))
    assert batch == 32 or not (fits(2 * batch) and padded(2 * batch))


def test_two_slices_that_take_no_more_than_one_are_no_trap():
    assert gpu_batch(lambda n: 10, 1000, 64) == 32


@pytest.mark.gpu
def test_the_plan_of_a_job_on_a_gpu_tells_the_batch_that_it_runs_with():
    from recon3d import demo
    from recon3d.config import ComputeConfig
    from recon3d.engine import plan
    from recon3d.engine.problem import Problem
    from recon3d.engine.scan_ct import CTScan
    from recon3d.priors import load_prior
    from recon3d.recipes import load_recipe

    job, gpu = demo.chest(slices=8), torch.device("cuda")
    scan = CTScan(y=job.y, geometry=job.geometry, grid=job.grid, noise=job.noise, device=gpu)
    problem = Problem(scan=scan, recipe=load_recipe("ct"), prior=load_prior("ct", gpu, compile="off"))
    found = plan.predict(problem, ComputeConfig(), probe=False)
    assert found.batch_size == 8 and found.short_of_memory is None
    assert plan.predict(problem, ComputeConfig(batch_size=2), probe=False).device_bytes < found.device_bytes

"""Interpolation and spreading alone: the compiled kernels against the definition, and the laws."""

import math

import pytest
import torch
from laws import check_adjoint, check_batch_independent, check_close_to_float64, check_linear, check_threads

from recon3d.geometry.mri import random
from recon3d.ops import _library, nufft_grid
from recon3d.ops.nufft import nufft_plan

SHAPES = [(20, 17), (3, 2), (1, 19), (31,), (7, 1, 9), (6, 9, 8)]


@pytest.fixture(scope="module", autouse=True)
def kernels():
    _library.ensure()


def both(shape, real=torch.float32, n=200):
    """Plan tensors, data in both spaces, and both ops."""
    plan = nufft_plan(random(n, shape, 1).points, shape)
    table = (plan.order, plan.first, plan.weights(real), plan.tiles, plan.grid, plan.tile)
    dtype = torch.complex64 if real == torch.float32 else torch.complex128
    generator = torch.Generator().manual_seed(0)
    cells = torch.randn(3, math.prod(plan.grid), dtype=dtype, generator=generator)
    y = torch.randn(3, n, dtype=dtype, generator=generator)

    def interpolate(x):
        return torch.ops.recon3d.nufft_interpolate(x, *table)

    def spread(x):
        return torch.ops.recon3d.nufft_spread(x, *table)

    return table, cells, y, interpolate, spread


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_close_to_float64(shape):
    table, cells, y, interpolate, spread = both(shape)
    wide, *_ = both(shape, torch.float64)
    for op, reference, data in (
        (interpolate, nufft_grid._interpolate, cells),
        (spread, nufft_grid._spread, y),
    ):
        truth = reference(data.to(torch.complex128), *wide)
        check_close_to_float64(*(torch.view_as_real(t) for t in (op(data), reference(data, *table), truth)))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_laws(shape):
    _, cells, y, interpolate, spread = both(shape)
    check_adjoint(interpolate, spread, cells, y)
    for op, data in ((interpolate, cells), (spread, y)):
        check_linear(op, data, data.flip(1))
        check_batch_independent(op, data)
        check_threads(lambda op=op, data=data: op(data))
        assert torch.equal(op(data.mT.contiguous().mT), op(data))
        assert op(data[:0]).shape == (0, op(data).shape[1])


def test_float64_adjoint():
    _, cells, y, interpolate, spread = both((20, 17), torch.float64)
    check_adjoint(interpolate, spread, cells, y, 1e-14)


def test_steps_beside_the_fft_are_adjoint():
    plan = nufft_plan(random(9, (5, 8), 1).points, (5, 8))
    scale = plan.scales(torch.float64)
    x = torch.randn(2, 5, 8, dtype=torch.complex128)
    cells = torch.randn(2, *plan.grid, dtype=torch.complex128)
    ops = torch.ops.recon3d
    check_adjoint(
        lambda v: ops.nufft_pad(v, scale, plan.grid), lambda v: ops.nufft_crop(v, scale, (5, 8)), x, cells, 1e-14
    )


def test_plans_that_leave_the_grid_are_refused():
    """A direct caller of torch.ops could break them."""
    if not _library.backends()["nufft_spread"]["cpu"]:
        pytest.skip("no compiled kernel")
    (order, first, weights, tiles, grid, tile), cells, y, *_ = both((20, 17))
    for bad in (
        (order + 1, first, weights),
        (order, first + grid[0], weights),
        (order, first - 1, weights),
        (order.long(), first, weights),
        (order, first, weights.double()),
    ):
        for op, data in ((torch.ops.recon3d.nufft_interpolate, cells), (torch.ops.recon3d.nufft_spread, y)):
            with pytest.raises(RuntimeError, match="nufft_"):
                op(data, *bad, tiles, grid, tile)


def test_fake():
    for op, args in (
        ("nufft_interpolate", lambda t, c, y: (c, *t)),
        ("nufft_spread", lambda t, c, y: (y, *t)),
    ):
        table, cells, y, *_ = both((20, 17))
        torch.library.opcheck(getattr(torch.ops.recon3d, op).default, args(table, cells, y),
                              test_utils=("test_schema", "test_faketensor"))  # fmt: skip

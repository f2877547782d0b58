"""The CUDA kernels of the NUFFT: run on the host thread by thread (the numbers of the torch definition, the same bits
for any number of images, no store outside), and on a device where there is one."""

import ctypes
import math

import numpy as np
import pytest
import torch
from laws import check_adjoint, check_close_to_float64, guarded
from test_cuda_on_host import build

from recon3d.geometry.mri import kooshball, radial, random
from recon3d.ops import _library, nufft_grid
from recon3d.ops.nufft import nufft, nufft_adjoint, nufft_normal, nufft_plan

PAD, INTERPOLATE, SPREAD, CROP = range(4)


def rim(shape, n=40):
    """Corners, edges and the centre of k-space: every tap wraps."""
    points = random(n, shape, 3).points.clone()
    points[::3] = math.pi
    points[1::3, 0] = -math.pi
    points[2] = 0
    return points


def crowd(shape, n):
    """Most samples near the centre, so that lists are cut into segments."""
    points = random(n, shape, 4).points.clone()
    points[: n * 9 // 10] *= 0.05
    return points


# image, points, eps
CASES = {
    "2d": ((24, 24), lambda s: radial(13, 30, s).points, 1e-3),
    "2d-odd": ((17, 23), lambda s: random(300, s, 1).points, 1e-4),
    "2d-rim": ((16, 20), rim, 1e-3),
    "2d-wide": ((20, 18), lambda s: random(100, s, 2).points, 1e-6),
    "2d-tiny": ((3, 2), lambda s: random(9, s, 2).points, 1e-3),
    "2d-line": ((1, 19), lambda s: random(60, s, 2).points, 1e-3),
    "2d-crowd": ((24, 24), lambda s: crowd(s, 5000), 1e-2),
    "1d": ((31,), lambda s: random(70, s, 2).points, 1e-3),
    "3d": ((8, 9, 10), lambda s: random(200, s, 1).points, 1e-2),
    "3d-rim": ((6, 7, 5), rim, 1e-3),
}


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    loaded = build("nufft", tmp_path_factory.mktemp("cuda_on_host"))
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    for name in ("run_float", "run_double"):
        getattr(loaded, name).restype = ctypes.c_char_p
        getattr(loaded, name).argtypes = [ctypes.c_int, pointer, pointer, number, *[pointer] * 6]
    loaded.workspace.restype = loaded.segment.restype = number
    loaded.workspace.argtypes = [ctypes.c_int, number, pointer, ctypes.c_int]
    loaded.segment.argtypes = [pointer]
    return loaded


def plan_of(name):
    shape, points, eps = CASES[name]
    return nufft_plan(points(shape), shape, eps=eps)


def sizes(plan):
    d, fill = plan.ndim, [1] * (3 - plan.ndim)
    return np.array([d, plan.n_points, plan.width, plan.tile, *plan.grid, *fill, *plan.shape, *fill], np.int64)


def tensors(plan, real):
    return plan.order, plan.first, plan.weights(real), plan.scales(real), plan.tiles


def data(batch, n, dtype=torch.complex64, seed=0):
    return torch.randn(batch, *n, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def run(library, step, plan, given):
    """One step on the host, with guard bands around the result and the workspace."""
    real = torch.float64 if given.dtype == torch.complex128 else torch.float32
    wide, batch = int(real == torch.float64), len(given)
    shape = {PAD: plan.grid, INTERPOLATE: (plan.n_points,), SPREAD: (math.prod(plan.grid),), CROP: plan.shape}[step]
    out, check = guarded(batch, *shape, 2, dtype=real)
    size = sizes(plan)
    order, first, weights, scale, tiles = tensors(plan, real)
    bytes_ = library.workspace(wide, batch, size.ctypes.data, int(step == SPREAD))
    work, check_work = guarded(bytes_ // 8, dtype=torch.float64)
    table = scale if step in (PAD, CROP) else weights
    given = torch.view_as_real(given.contiguous())
    function = library.run_double if wide else library.run_float
    error = function(step, given.data_ptr(), out.data_ptr(), batch, size.ctypes.data, order.data_ptr(),
                     first.data_ptr(), table.data_ptr(), tiles.data_ptr(), work.data_ptr())  # fmt: skip
    assert error is None, error
    check()
    work.nan_to_num_()  # parts of it may stay unused
    check_work()
    return torch.view_as_complex(out.contiguous())


def reference(step, plan, given):
    real = torch.float64 if given.dtype == torch.complex128 else torch.float32
    order, first, weights, scale, tiles = tensors(plan, real)
    if step == PAD:
        return nufft_grid._pad(given, scale, plan.grid)
    if step == CROP:
        return nufft_grid._crop(given, scale, plan.shape)
    function = nufft_grid._interpolate if step == INTERPOLATE else nufft_grid._spread
    return function(given, order, first, weights, tiles, plan.grid, plan.tile)


def check(got, want, exact):
    parts = [torch.view_as_real(t) for t in (got, want, exact)]
    check_close_to_float64(*parts)


@pytest.mark.parametrize("batch", [1, 7])
@pytest.mark.parametrize("name", CASES)
def test_steps_are_the_definition(library, name, batch):
    plan = plan_of(name)
    for step, n in (
        (PAD, plan.shape),
        (INTERPOLATE, (math.prod(plan.grid),)),
        (SPREAD, (plan.n_points,)),
        (CROP, plan.grid),
    ):
        given = data(batch, n)
        exact = reference(step, plan, given.to(torch.complex128))
        check(run(library, step, plan, given), reference(step, plan, given), exact)
        wide = run(library, step, plan, given.to(torch.complex128))
        assert (wide - exact).norm() <= 1e-13 * exact.norm()


@pytest.mark.parametrize("name", ["2d-odd", "2d-crowd", "3d-rim"])
def test_image_does_not_depend_on_stack(library, name):
    """2 to 32 lanes, one or two images each, and two rounds of the workspace: the same bits."""
    plan = plan_of(name)
    for step, n in ((INTERPOLATE, (math.prod(plan.grid),)), (SPREAD, (plan.n_points,))):
        given = data(66, n)
        alone = run(library, step, plan, given[64:])
        for batch in (3, 6, 12, 20, 40) if name != "2d-crowd" else (6, 40):
            stack = run(library, step, plan, given[66 - batch :])
            assert torch.equal(stack[-2:], alone), f"{batch} images"
        assert torch.equal(run(library, step, plan, given)[64:], alone)


def test_lists_are_cut(library):
    """The crowded case has segments to add, the others need none."""
    plan = plan_of("2d-crowd")
    fullest = plan.tiles.diff().max().item()
    assert fullest > 1.5 * library.segment(sizes(plan).ctypes.data)
    assert plan_of("2d").n_points < library.segment(sizes(plan_of("2d")).ctypes.data)


@pytest.mark.parametrize("name", CASES)
def test_the_whole_is_the_nufft(name):
    """What is registered for CUDA, put together from the definitions of the steps."""
    plan = plan_of(name)
    table = tensors(plan, torch.float64)
    x, y = data(3, plan.shape, torch.complex128), data(3, (plan.n_points,), torch.complex128, 1)
    limit = 1e-13
    forward = nufft_grid.forward(x, *table, plan.grid, plan.tile)
    assert (forward - nufft(x, plan)).norm() <= limit * forward.norm()
    adjoint = nufft_grid.adjoint(y, *table, plan.shape, plan.grid, plan.tile)
    assert (adjoint - nufft_adjoint(y, plan)).norm() <= limit * adjoint.norm()
    density = torch.rand(plan.n_points, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    normal = nufft_grid.normal(x, density, *table, plan.grid, plan.tile)
    assert (normal - nufft_normal(x, plan, density)).norm() <= limit * normal.norm()
    order, first, weights, scale, tiles = table
    rest = (plan.slopes(torch.float64), scale, tiles, plan.grid, plan.tile)
    got = nufft_grid.points_vjp(x, y, order, first, weights, *rest)
    want = torch.ops.recon3d.nufft_points_vjp(x, y, order, first, weights, *rest)
    assert (got - want).norm() <= limit * want.norm()


def test_parts_of_a_large_stack(monkeypatch):
    plan = plan_of("2d")
    table = tensors(plan, torch.float32)
    x = data(5, plan.shape)
    want = nufft_grid.normal(x, x.real.new_empty(0), *table, plan.grid, plan.tile)
    monkeypatch.setattr(nufft_grid, "_TOGETHER", 2)
    got = nufft_grid.normal(x, x.real.new_empty(0), *table, plan.grid, plan.tile)
    assert (got - want).norm() <= 1e-6 * want.norm()


# ---- on a device ----------------------------------------------------------------------------------------------------


@pytest.fixture
def device():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return "cuda"


GPU = {
    **CASES,
    "2d-large": ((320, 320), lambda s: radial(402, 640, s).points, 1e-3),
    "3d-large": ((64, 64, 64), lambda s: kooshball(1000, 128, s).points, 1e-3),
}


@pytest.mark.gpu
def test_kernels_are_there(device):
    found = _library.backends()
    names = ("nufft_pad", "nufft_interpolate", "nufft_spread", "nufft_crop", "nufft", "nufft_adjoint", "nufft_normal")
    assert all(found[op]["cuda"] for op in names), _library.build_error()


@pytest.mark.gpu
@pytest.mark.parametrize("batch", [1, 3, 20, 40, 130])
@pytest.mark.parametrize("name", GPU)
def test_device_agrees_with_host(device, name, batch):
    shape, points, eps = GPU[name]
    plan = nufft_plan(points(shape), shape, eps=eps)
    batch = batch if math.prod(shape) < 1e4 else min(batch, 3)
    x, y = data(batch, shape), data(batch, (plan.n_points,))
    there = plan.to(device)
    for op, given in ((nufft, x), (nufft_adjoint, y)):
        exact = op(given.to(torch.complex128), plan)
        check(op(given.to(device), there).cpu(), op(given, plan), exact)
        wide = op(given.to(device, torch.complex128), there).cpu()
        assert (wide - exact).norm() <= 1e-12 * exact.norm()
    check_adjoint(lambda v: nufft(v, there), lambda v: nufft_adjoint(v, there), x.to(device), y.to(device))
    exact = nufft_normal(x.to(torch.complex128), plan)
    check(nufft_normal(x.to(device), there).cpu(), nufft_normal(x, plan), exact)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["2d-odd", "2d-crowd", "2d-large"])
def test_device_bits(device, name):
    """Run to run, and alone or in a stack."""
    shape, points, eps = GPU[name]
    plan = nufft_plan(points(shape), shape, eps=eps).to(device)
    cells = data(66, (math.prod(plan.grid),)).to(device)
    y = data(66, (plan.n_points,)).to(device)
    rest = (plan.order, plan.first, plan.weights(torch.float32), plan.tiles, plan.grid, plan.tile)
    for op, given in ((torch.ops.recon3d.nufft_interpolate, cells), (torch.ops.recon3d.nufft_spread, y)):
        stack = op(given, *rest)
        assert torch.equal(stack, op(given, *rest))
        for batch in (2, 6, 20, 40):
            assert torch.equal(op(given[66 - batch :], *rest)[-2:], stack[-2:])


@pytest.mark.gpu
def test_device_gradients(device):
    shape = (12, 10)
    points = random(30, shape, 5).points.to(device).requires_grad_()
    x = data(2, shape, torch.complex128).to(device).requires_grad_()
    torch.autograd.gradcheck(lambda x, k: nufft(x, nufft_plan(k, shape, eps=1e-10).to(device)), (x, points), atol=1e-4)


@pytest.mark.gpu
def test_device_capture_and_replay(device):
    """No synchronisation, no host copy: the pair survives a CUDA graph."""
    plan = plan_of("2d").to(device)
    x = data(33, plan.shape).to(device)
    nufft_adjoint(nufft(x, plan), plan)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = nufft_adjoint(nufft(x, plan), plan)
    x.copy_(torch.randn_like(x))
    graph.replay()
    assert torch.equal(out, nufft_adjoint(nufft(x, plan), plan))

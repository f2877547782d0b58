"""The CUDA kernels of sense: on the host, thread by thread, and on a device where there is one."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
import torch
from laws import check_adjoint, check_batch_independent, check_linear, guarded
from test_cuda_on_host import build
from test_sense import CASES, KINDS, WIDE, Case, truth

from recon3d.ops import _library, pack_maps
from recon3d.ops.sense import _planes_reference, serves_cuda

# 210: every radix but 8; 64 and 128: eights with and without a rest; 400: four lanes in a column
HOST = [Case(kind, (2, 6, 10), 3) for kind in KINDS]
HOST += [Case("kx", (1, 2, 210), 9), Case("ky", (1, 128, 1), 2), Case("plane", (1, 1, 64), 2)]
HOST += [Case("plane", (1, 400, 1), 5), Case("plane", (3, 4, 9), 17), Case("kx", (1, 1, 1), 1)]


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    loaded = build("sense", tmp_path_factory.mktemp("cuda_on_host"))
    for name in ("run_float", "run_double"):
        getattr(loaded, name).restype = ctypes.c_char_p
        getattr(loaded, name).argtypes = [ctypes.c_int, *[ctypes.c_void_p] * 6]
    loaded.workspace.restype = ctypes.c_int64
    loaded.workspace.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_void_p]
    loaded.serves.argtypes = [ctypes.c_int64, ctypes.c_int]
    return loaded


def run(library, case: Case, x):
    """What the launchers make of x, between guard bands and with scratch memory full of NaN."""
    double, w, packed = x.dtype == WIDE, case.weights(), pack_maps(case.maps(x.dtype))
    _, ny, nx = case.shape
    lines, along_y, doubled = case.kind in ("kx", "ky", "stack-kx"), case.kind == "ky", "toeplitz" in case.kind
    w = w.reshape(-1, max(w.shape[-2:])) if lines else w.reshape(-1, *w.shape[-2:])
    if not doubled:
        w = torch.fft.ifftshift(w, (1,) if lines else (1, 2))
    w = w.to(x.real.dtype).contiguous()
    size = np.array([len(x), case.coils, ny, nx, len(w), along_y, doubled], np.int64)
    maps = packed.packed(along_y)[: len(x)].contiguous()
    work, check_work = guarded(library.workspace(lines, double, size.ctypes.data), dtype=w.dtype)
    out, check = guarded(*x.shape, dtype=x.dtype)
    function = library.run_double if double else library.run_float
    error = function(lines, *(t.data_ptr() for t in (x.contiguous(), maps, w, out)), size.ctypes.data, work.data_ptr())
    assert error is None, error
    check()
    work.nan_to_num_()  # parts of it may stay unused
    check_work()
    return out


@pytest.mark.parametrize("case", HOST, ids=str)
def test_on_host(library, case):
    double, exact, single_error = truth(case)
    error = (run(library, case, case.image()) - exact).norm()
    assert error <= 2 * single_error + 4 * torch.finfo(torch.float32).eps * exact.norm()
    assert (run(library, case, case.image(dtype=WIDE)) - double).norm() <= 1e-14 * double.norm()


@pytest.mark.parametrize("kind", ["kx", "plane", "toeplitz"])
def test_slice_does_not_depend_on_stack_on_host(library, kind):
    case = Case(kind, (2, 4, 6), 3)
    assert torch.equal(run(library, case, case.image())[:1], run(library, case, case.image()[:1]))


def test_serves(library):
    """Python and C++ agree about the lengths that have a kernel."""
    for n in [*range(1, 300), 1536, 1537, 1575, 3072, 3073, 3075, 4096]:
        for dtype in (torch.complex64, WIDE):
            assert bool(library.serves(n, int(dtype == WIDE))) == serves_cuda(n, dtype), (n, dtype)
    assert serves_cuda(320, torch.complex64) and not serves_cuda(11, torch.complex64)


@pytest.fixture
def device():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")


DEVICE = CASES + [Case(k, (2, 320, 320), 16) for k in KINDS]
DEVICE += [Case("plane", (70, 64, 96), 12), Case("toeplitz", (5, 640, 400), 9), Case("kx", (2, 33, 2000), 3)]


def on_device(case: Case, x):
    from recon3d.ops import sense_normal, sense_toeplitz

    which = sense_toeplitz if "toeplitz" in case.kind else sense_normal
    return which(x.cuda(), case.maps(x.dtype).cuda(), case.weights().cuda()).cpu()


@pytest.mark.gpu
@pytest.mark.parametrize("case", DEVICE, ids=str)
def test_on_device(device, case):
    double, exact, single_error = truth(case)
    error = (on_device(case, case.image()) - exact).norm()
    assert error <= 2 * single_error + 4 * torch.finfo(torch.float32).eps * exact.norm()
    assert (on_device(case, case.image(dtype=WIDE)) - double).norm() <= 1e-13 * double.norm()
    assert torch.equal(on_device(case, case.image()), on_device(case, case.image()))


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["kx", "ky", "plane", "toeplitz"])
def test_laws_on_device(device, kind):
    assert all(_library.backends()[op]["cuda"] for op in ("sense_lines", "sense_planes")), _library.build_error()
    case = Case(kind, (3, 60, 72), 10)
    check_adjoint(lambda x: on_device(case, x), lambda x: on_device(case, x), case.image(), case.image(1))
    check_linear(lambda x: on_device(case, x), case.image(3), case.image(4))


@pytest.mark.gpu
def test_batch_and_gradient_on_device(device):
    case = Case("plane", (1, 24, 30), 5)
    maps, w = pack_maps(case.maps().cuda()), torch.rand(1, 24, 30, device="cuda")
    x = case.image().cuda()

    def op(xs):
        return torch.ops.recon3d.sense_planes(xs, maps.packed().expand(len(xs), -1, -1, -1, -1).contiguous(), w, 5)

    check_batch_independent(op, x.expand(9, -1, -1))
    y = x.clone().requires_grad_()
    op(y).backward(x)
    assert torch.equal(y.grad, op(x))
    wide = maps.packed().to(WIDE).cpu()
    want = _planes_reference(x.cpu().to(WIDE), wide, w.cpu().double(), 5)
    assert (op(x).cpu() - want).norm() <= 1e-6 * want.norm()


@pytest.mark.gpu
def test_capture_and_replay(device):
    """No synchronisation, no host copy: the operators survive a CUDA graph."""
    from recon3d.ops import sense_normal, sense_toeplitz

    case = Case("plane", (3, 48, 64), 9)
    maps, x = pack_maps(case.maps().cuda()), case.image().cuda()
    line, kernel = torch.rand(64, device="cuda"), torch.rand(96, 128, device="cuda")

    weights = case.weights().cuda()

    def chain():
        return sense_toeplitz(sense_normal(sense_normal(x, maps, line), maps, weights), maps, kernel)

    chain()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = chain()
    x.copy_(torch.randn_like(x))
    graph.replay()
    assert torch.equal(out, chain())

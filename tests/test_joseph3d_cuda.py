"""The CUDA kernels of the PET projectors run on the host, thread by thread: the numbers of the torch definition, the
same bits for any number of volumes, no store outside, no barrier that only some threads meet."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from laws import adjoint_gap, check_close_to_float64, guarded
from test_cuda_on_host import build
from test_joseph3d_sinogram import CASES as SINOGRAMS
from torch import Tensor

from recon3d.geometry import TOF
from recon3d.ops.joseph3d import _reference, _reference_adjoint
from recon3d.ops.tof import tof_numbers

# emulated threads are slow, so some of the lines; with time of flight only where something else is special
TIMED = ("odd", "mixed-steps", "flat", "far-outside")
HOST = [replace(c, lines=c.lines[:: 9 if c.tof else 3].contiguous()) for c in SINOGRAMS]
HOST = [c for c in HOST if (c.tof is None and c.name != "partly-outside") or c.name in TIMED]


@dataclass(frozen=True)
class Lines:
    """Lines between random points of a box around a volume; `bins`: "none", "one" bin per line, or "all"."""

    name: str
    shape: tuple[int, int, int]
    spacing: tuple[float, float, float] = (1.0, 1.0, 1.0)
    count: int = 200
    box: float = 1.5  # of points, in halves of the volume
    tof: TOF | None = None
    bins: str = "none"

    def __str__(self) -> str:
        return f"{self.name}-{self.bins}"

    @property
    def points(self) -> Tensor:
        g = torch.Generator().manual_seed(3)
        half = torch.tensor([n * s / 2 for n, s in zip(self.shape, self.spacing, strict=True)], dtype=torch.float64)
        return (2 * torch.rand(60, 3, generator=g, dtype=torch.float64) - 1) * self.box * half

    @property
    def pairs(self) -> Tensor:
        pairs = torch.randint(60, (self.count, 2), generator=torch.Generator().manual_seed(4), dtype=torch.int32)
        pairs[: min(3, self.count), 1] = pairs[: min(3, self.count), 0]  # no length: nothing
        return pairs

    @property
    def line_bins(self) -> Tensor | None:
        if self.bins != "one":
            return None
        g = torch.Generator().manual_seed(5)
        return torch.randint(self.tof.bins, (self.count,), generator=g, dtype=torch.int32)

    @property
    def tail(self) -> tuple[int, ...]:
        return (self.count, self.tof.bins) if self.bins == "all" else (self.count,)

    @property
    def numbers(self) -> tuple[float, ...]:
        return (*self.spacing, *tof_numbers("test", self.tof))

    def reference(self, x):
        return _reference(x, self.points, self.pairs, self.line_bins, *self.numbers)

    def reference_adjoint(self, y):
        return _reference_adjoint(y, self.points, self.pairs, self.line_bins, *self.shape, *self.numbers)

    def domain(self, volumes: int = 1, dtype=torch.float32, seed: int = 0):
        return torch.randn(volumes, *self.shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)

    def range(self, volumes: int = 1, dtype=torch.float32, seed: int = 1):
        return torch.randn(volumes, *self.tail, generator=torch.Generator().manual_seed(seed), dtype=dtype)


PLAIN = [
    Lines("cube", (12, 13, 11)),
    Lines("odd", (7, 24, 18), (2.0, 0.9, 1.1), 300),
    Lines("inside", (9, 14, 20), box=0.8),
    Lines("flat", (1, 9, 8)),
    Lines("one-voxel", (1, 1, 1), box=3.0),
    Lines("one-line", (5, 6, 7), count=4),
]
TIME = TOF(5, 4.0, 2.0)
LINES = [
    *PLAIN,
    *(replace(c, tof=TIME, bins="one") for c in PLAIN[:4]),
    *(replace(c, tof=TIME, bins="all") for c in PLAIN),
]
LINES += [replace(PLAIN[1], tof=TOF(19, 0.8, 1.5, 2.5), bins=bins) for bins in ("one", "all")]


def load(name, folder):
    loaded = build(name, folder)
    for function in ("run_float", "run_double"):
        getattr(loaded, function).restype = ctypes.c_char_p
        pointers = {"joseph3d": 6, "joseph3d_sinogram": 5}[name]
        getattr(loaded, function).argtypes = [
            ctypes.c_int, *[ctypes.c_void_p] * 2, ctypes.c_int64, *[ctypes.c_void_p] * pointers
        ]  # fmt: skip
    loaded.workspace.restype = ctypes.c_int64
    return loaded


@pytest.fixture(scope="module")
def lines_library(tmp_path_factory):
    loaded = load("joseph3d", tmp_path_factory.mktemp("cuda_on_host"))
    loaded.workspace.argtypes = [ctypes.c_void_p] * 2
    return loaded


@pytest.fixture(scope="module")
def sinogram_library(tmp_path_factory):
    loaded = load("joseph3d_sinogram", tmp_path_factory.mktemp("cuda_on_host"))
    loaded.workspace.argtypes = [ctypes.c_int] * 2 + [ctypes.c_void_p] * 3
    return loaded


def call(library, adjoint, data, shape, tables, work_bytes):
    """What a launcher makes of data, between guard bands and with scratch memory full of NaN."""
    data = data.contiguous()
    work, check_work = guarded((work_bytes + 7) // 8, dtype=torch.float64)
    out, check = guarded(len(data), *shape, dtype=data.dtype)
    function = library.run_double if data.dtype == torch.float64 else library.run_float
    error = function(int(adjoint), data.data_ptr(), out.data_ptr(), len(data), *tables, work.data_ptr())
    assert error is None, error
    check()
    work.view(torch.int64).zero_()  # parts of it may stay unused, and integers may look like NaN
    check_work()
    return out


def run_sinogram(library, case, data, adjoint):
    numbers, table, lines = tof_numbers("test", case.tof), case.table.numpy(), case.lines.numpy()
    size = np.array([len(lines), len(table), *case.shape, numbers[0]], np.int64)
    length = np.array([*case.spacing, *numbers[1:]])
    bytes_ = library.workspace(
        int(adjoint), int(data.dtype == torch.float64), size.ctypes.data, length.ctypes.data, table.ctypes.data
    )
    tail = (len(lines), *([numbers[0]] if numbers[0] else []), case.planes)
    tables = [t.ctypes.data for t in (size, length, lines, table)]
    return call(library, adjoint, data, case.shape if adjoint else tail, tables, bytes_)


def run_lines(library, case, data, adjoint):
    points, pairs, bins = case.points.numpy(), case.pairs.numpy(), case.line_bins
    size = np.array([len(pairs), len(points), *case.shape, case.numbers[3]], np.int64)
    length = np.array([*case.spacing, *case.numbers[4:]])
    tables = [t.ctypes.data for t in (size, length, points, pairs)] + [bins.data_ptr() if bins is not None else None]
    bytes_ = library.workspace(size.ctypes.data, length.ctypes.data)
    return call(library, adjoint, data, case.shape if adjoint else case.tail, tables, bytes_)


def check(run, library, case):
    """Both directions in both precisions against the definition, and against each other."""
    x, y = case.domain(), case.range()
    forward, back = run(library, case, x, False), run(library, case, y, True)
    exact, exact_back = case.reference(x.double()), case.reference_adjoint(y.double())
    check_close_to_float64(forward, case.reference(x), exact, "forward")
    check_close_to_float64(back, case.reference_adjoint(y), exact_back, "adjoint")
    if exact.norm() and exact_back.norm():
        gap = adjoint_gap(lambda _: forward, lambda _: back, x, y)
        assert gap <= 1e-6, f"adjoint gap {gap:.2e}"
    assert (run(library, case, x.double(), False) - exact).norm() <= 1e-11 * (exact.norm() + 1)
    assert (run(library, case, y.double(), True) - exact_back).norm() <= 1e-11 * (exact_back.norm() + 1)


@pytest.mark.parametrize("case", HOST, ids=str)
def test_sinogram(sinogram_library, case):
    check(run_sinogram, sinogram_library, case)


@pytest.mark.parametrize("case", LINES, ids=str)
def test_lines(lines_library, case):
    check(run_lines, lines_library, case)


@pytest.mark.parametrize("case", [c for c in HOST if c.name == "step-3" or (c.name == "flat" and c.tof)], ids=str)
def test_sinogram_of_one_volume_or_line_alone(sinogram_library, case):
    """A volume's bits do not depend on its neighbours in the batch, a line's not on the other lines."""
    x, y = case.domain(3), case.range(3)
    forward = run_sinogram(sinogram_library, case, x, False)
    assert torch.equal(run_sinogram(sinogram_library, case, x[1:2], False), forward[1:2])
    back = run_sinogram(sinogram_library, case, y, True)
    assert torch.equal(run_sinogram(sinogram_library, case, y[1:2], True), back[1:2])
    some = replace(case, lines=case.lines[3:9].contiguous())
    assert torch.equal(run_sinogram(sinogram_library, some, x[:1], False), forward[:1, 3:9])


@pytest.mark.parametrize("case", [c for c in LINES if c.name == "odd"], ids=str)
def test_lines_of_one_volume_alone(lines_library, case):
    x, y = case.domain(3), case.range(3)
    assert torch.equal(run_lines(lines_library, case, x[1:2], False), run_lines(lines_library, case, x, False)[1:2])
    assert torch.equal(run_lines(lines_library, case, y[1:2], True), run_lines(lines_library, case, y, True)[1:2])


@pytest.mark.parametrize("size", [1e-30, 1e30, 0.0])
def test_integers_hold_any_size_of_data(lines_library, size):
    case = PLAIN[0]
    y = case.range() * size
    back, want = run_lines(lines_library, case, y, True), case.reference_adjoint(y.double())
    assert (back - want).norm() <= 3e-7 * want.norm()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_data_that_are_not_finite_do_not_hide(lines_library, bad):
    case = PLAIN[0]
    y = case.range()
    y[0, 7] = bad
    points, pairs = case.points.numpy(), case.pairs.numpy()
    size = np.array([len(pairs), len(points), *case.shape, 0], np.int64)
    length = np.array([*case.spacing, 1.0, 1.0, 3.0])
    work = torch.empty(lines_library.workspace(size.ctypes.data, length.ctypes.data), dtype=torch.uint8)
    out = torch.zeros(1, *case.shape)
    tables = [t.ctypes.data for t in (size, length, points, pairs)]
    assert lines_library.run_float(1, y.data_ptr(), out.data_ptr(), 1, *tables, None, work.data_ptr()) is None
    assert out.isnan().all()

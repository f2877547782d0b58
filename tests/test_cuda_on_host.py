"""The CUDA kernels of radon and fbp run on the host, thread by thread: the numbers of the torch definition, the same
bits for any number of slices, no store outside, no barrier that only some threads meet."""

import ctypes
import dataclasses
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from laws import adjoint_gap, check_close_to_float64, guarded
from test_radon import CASES

from recon3d.geometry import FanBeam, equiangular
from recon3d.ops.fbp import _reference

ROOT = Path(__file__).parent.parent
JOSEPH = [c for c in CASES if c.method == "joseph"]


# slices -> kernel: one thread per ray; 1, 2 and 4 slices per lane
FEW = [2, 17]
MANY = [40, 100]


def build(name, folder):
    compiler = os.environ.get("CXX") or shutil.which("g++")
    if not compiler:
        pytest.skip("no C++ compiler")
    here = ROOT / "tests" / "cuda_on_host"
    flags = ["-std=c++17", "-O2", "-ffp-contract=off", "-fPIC", "-shared", "-Wno-unknown-pragmas"]
    if " fma " in Path("/proc/cpuinfo").read_text():
        flags.append("-mfma")  # without it std::fma is a slow, equally exact function
    out = folder / f"{name}.so"
    command = [compiler, *flags, f"-I{here}", f"-I{ROOT / 'csrc'}", str(here / f"{name}.cpp"), "-o", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return ctypes.CDLL(str(out))


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    loaded = build("radon", tmp_path_factory.mktemp("cuda_on_host"))
    for name in ("run_float", "run_double"):
        getattr(loaded, name).restype = ctypes.c_char_p
        getattr(loaded, name).argtypes = [ctypes.c_int, *[ctypes.c_void_p] * 2, ctypes.c_int64, *[ctypes.c_void_p] * 5]
    loaded.workspace.restype = ctypes.c_int64
    loaded.workspace.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_void_p]
    return loaded


def run(library, case, data, adjoint):
    g, slices, double = case.geometry, data.shape[0], data.dtype == torch.float64
    size = np.array([g.n_views, g.n_detector, *case.shape], np.int64)
    source = (g.source_to_axis_mm, g.source_to_detector_mm) if isinstance(g, FanBeam) else (0.0, 0.0)
    length = np.array([g.detector_spacing_mm, g.detector_offset_mm, *source, *case.pixel])
    cosine, sine = np.cos(g.angles), np.sin(g.angles)
    data = data.contiguous()
    elements = library.workspace(int(adjoint), int(double), slices, size.ctypes.data)
    work, check_work = guarded(elements, dtype=data.dtype)
    out, check = guarded(slices, *(case.shape if adjoint else size[:2].tolist()), dtype=data.dtype)
    function = library.run_double if double else library.run_float
    tables = [t.ctypes.data for t in (size, length, cosine, sine)]
    error = function(int(adjoint), data.data_ptr(), out.data_ptr(), slices, *tables, work.data_ptr())
    assert error is None, error
    check()
    work.nan_to_num_()  # parts of it may stay unused
    check_work()
    return out


@pytest.mark.parametrize("slices", FEW)
@pytest.mark.parametrize("case", JOSEPH, ids=str)
def test_close_to_float64(library, case, slices):
    """Every kernel against the definition, and forward against transpose."""
    x, y = case.domain(slices), case.range(slices)
    forward, back = run(library, case, x, False), run(library, case, y, True)
    check_close_to_float64(forward, case.reference(x), case.reference(x.double()), "forward")
    check_close_to_float64(back, case.reference_adjoint(y), case.reference_adjoint(y.double()), "adjoint")
    gap = adjoint_gap(lambda _: forward, lambda _: back, x, y)
    assert gap <= 1e-6, f"adjoint gap {gap:.2e}"


@pytest.mark.parametrize("case", JOSEPH, ids=str)
def test_float64_is_the_reference(library, case):
    x, y = case.domain(3, torch.float64), case.range(18, torch.float64)
    for got, want in ((run(library, case, x, False), case.reference(x)),
                      (run(library, case, y, True), case.reference_adjoint(y))):  # fmt: skip
        assert (got - want).norm() <= 1e-12 * (want.norm() + 1)


@pytest.mark.parametrize("case", [c for c in JOSEPH if "odd" in c.name], ids=str)
def test_slice_does_not_depend_on_stack(library, case):
    """One thread per ray, and 1, 2 or 4 slices per lane: the same bits."""
    x, y = case.domain(130), case.range(130)
    for data, adjoint in ((x, False), (y, True)):
        alone = run(library, case, data[:2], adjoint)
        for slices in (16, *MANY):
            assert torch.equal(run(library, case, data[:slices], adjoint)[:2], alone), f"{slices} slices"
        # the last slice of a stack that takes two rounds of the workspace
        assert torch.equal(run(library, case, data, adjoint)[129:], run(library, case, data[129:], adjoint))


@pytest.mark.parametrize("case", [c for c in JOSEPH if "odd" in c.name], ids=str)
@pytest.mark.parametrize("slices", [1, 6])
def test_fbp(tmp_path, case, slices):
    """The pixel-driven back projection of FBP, against the one of the CPU; 97 views take two launches."""
    loaded = build("fbp", tmp_path)
    loaded.run_fbp.restype = ctypes.c_char_p
    loaded.run_fbp.argtypes = [*[ctypes.c_void_p] * 2, ctypes.c_int64, *[ctypes.c_void_p] * 4]
    g = dataclasses.replace(case.geometry, angles_rad=equiangular(97, 6.0))
    q = torch.randn(slices, 97, g.n_detector, generator=torch.Generator().manual_seed(0))
    source = (g.source_to_axis_mm, g.source_to_detector_mm) if isinstance(g, FanBeam) else (0.0, 0.0)
    lengths = (g.detector_spacing_mm, g.detector_offset_mm, *source, *case.pixel)
    angles = torch.from_numpy(g.angles)
    want = _reference(q, angles, *case.shape, *lengths)
    got, check = guarded(slices, *case.shape)
    size, length = np.array([97, g.n_detector, *case.shape], np.int64), np.array(lengths)
    cosine, sine = np.cos(g.angles), np.sin(g.angles)
    tables = [t.ctypes.data for t in (size, length, cosine, sine)]
    assert loaded.run_fbp(q.data_ptr(), got.data_ptr(), slices, *tables) is None
    check()
    check_close_to_float64(got, want, _reference(q.double(), angles, *case.shape, *lengths))

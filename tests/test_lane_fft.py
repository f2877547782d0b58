"""The FFT whose vector lanes are transforms: every length, both signs, every instruction set, against torch.fft."""

from __future__ import annotations

import pytest
import torch
from laws import check_batch_independent, check_close_to_float64, check_threads

from recon3d.ops import _library
from recon3d.ops.sense import _fft_reference

# every radix alone and in products, primes without a butterfly, and lengths of real scans
LENGTHS = [*range(1, 41), 49, 56, 60, 64, 77, 96, 121, 127, 144, 169, 202, 210, 224, 256, 311, 320, 384, 480, 512, 640]


@pytest.fixture(autouse=True)
def compiled():
    if not _library.ensure():
        pytest.skip(f"the compiled kernels are missing: {_library.build_error()}")


@pytest.fixture(params=["best", "avx2", "portable"])
def isa(request, monkeypatch):
    """Every instruction-set path; a path that the machine lacks falls to the next."""
    if request.param != "best":
        monkeypatch.setenv("RECON3D_ISA", request.param)
    return request.param


def lines(rows: int, n: int) -> torch.Tensor:
    return torch.randn(rows, n, dtype=torch.complex128, generator=torch.Generator().manual_seed(n))


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128], ids=str)
@pytest.mark.parametrize("sign", [-1, 1])
def test_close_to_float64(isa, sign, dtype):
    for n in LENGTHS:
        x = lines(11, n)  # a full register of rows and a part of one, whatever its width
        shift = n // 2
        narrow = x.to(dtype)
        got = torch.ops.recon3d.lane_fft(narrow, sign, shift)
        check_close_to_float64(
            torch.view_as_real(got),
            torch.view_as_real(_fft_reference(narrow, sign, shift)),
            torch.view_as_real(_fft_reference(narrow.to(torch.complex128), sign, shift)),
            f"n = {n}",
        )


def test_shift_is_cyclic(isa):
    for n in (1, 7, 12, 22):
        x = lines(3, n)
        plain = torch.ops.recon3d.lane_fft(x, -1, 0)
        for shift in range(n):
            assert torch.equal(torch.ops.recon3d.lane_fft(x, -1, shift), plain.roll(shift, 1))


def test_there_and_back(isa):
    for n in (30, 53, 224):
        x = lines(9, n)
        back = torch.ops.recon3d.lane_fft(torch.ops.recon3d.lane_fft(x, -1, 0), 1, 0) / n
        assert (back - x).norm() <= 1e-14 * x.norm()


def test_rows_and_threads(isa):
    x = lines(37, 60).to(torch.complex64)
    check_threads(lambda: torch.ops.recon3d.lane_fft(x, -1, 5))
    check_batch_independent(lambda rows: torch.ops.recon3d.lane_fft(rows, 1, 0), x)


def test_opcheck_and_no_rows():
    torch.library.opcheck(torch.ops.recon3d.lane_fft.default, (lines(3, 10), -1, 2))
    assert torch.ops.recon3d.lane_fft(lines(0, 6), 1, 0).shape == (0, 6)


def test_refuses():
    for bad in ((lines(2, 4), 2, 0), (lines(2, 4), 1, 4), (lines(2, 4), 1, -1), (lines(2, 4)[0], 1, 0)):
        with pytest.raises((RuntimeError, IndexError)):
            torch.ops.recon3d.lane_fft(*bad)

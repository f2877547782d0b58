"""recon3d.ops.philox: known answers, the same integers and normals on every backend, their statistics."""

import math
import subprocess

import pytest
import torch
from laws import check_close_to_float64, check_threads, guarded
from scipy import stats

from recon3d import _build
from recon3d.ops import philox, philox4x32, philox_bits, philox_normal

F = 0xFFFFFFFF
# Random123, kat_vectors: philox4x32-7 and -10
KNOWN = [
    (7, (0, 0, 0, 0), (0, 0), (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48)),
    (10, (0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    (10, (F, F, F, F), (F, F), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        10,
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize("rounds, counter, key, want", KNOWN)
def test_known_answers(rounds, counter, key, want):
    got = philox4x32(torch.tensor(counter), key[0] | key[1] << 32, rounds)
    assert tuple(got.tolist()) == want


def test_counter_layout():
    # the words of pixel p of a slice: counter (p // 4, slice, level, stream), word p % 4
    seed, level, stream = 0x0123456789ABCDEF, 11, 3
    got = philox_bits(seed, level, torch.tensor([5, F]), 10, stream)
    for row, index in enumerate((5, F)):
        blocks = [philox4x32(torch.tensor([b, index, level, stream]), seed) for b in range(3)]
        assert got[row].tolist() == torch.cat(blocks)[:10].tolist()


CASES = [
    (0, 0, 0, [0], 1),
    (2**64 - 1, F, F, [F, 0, 3], 7),
    (2**63, 1, 2, [9, 9], 61 * 53),
    (12345, 17, 0, [], 5),
    (12345, 17, 0, [1, 2], 0),
    (99, 3, 1, list(range(3)), 8199),
    (99, 3, 1, list(range(18)), 5),
]


@pytest.mark.parametrize("seed, level, stream, slices, pixels", CASES)
def test_integers_agree(seed, level, stream, slices, pixels):
    index = torch.tensor(slices, dtype=torch.int64)
    got = philox_bits(seed, level, index, pixels, stream)
    want = philox._bits_reference(index, pixels, seed, level, stream)
    assert got.dtype == torch.int64 and torch.equal(got, want)


@pytest.mark.parametrize("seed, level, stream, slices, pixels", CASES)
def test_normals_agree(seed, level, stream, slices, pixels):
    index = torch.tensor(slices, dtype=torch.int64)
    key = philox._signed(seed)
    truth = philox.normals(index, pixels, key, level, stream, torch.float64)
    for dtype in (torch.float32, torch.float64):
        got = philox_normal(seed, level, index, (pixels,), stream=stream, dtype=dtype)
        assert got.dtype == dtype and got.shape == truth.shape
        check_close_to_float64(got, philox.normals(index, pixels, key, level, stream, dtype), truth)
        if truth.numel():
            # absolute, as cos and sin cross zero; |z| < 6
            assert (got.double() - truth).abs().max() <= 8 * torch.finfo(dtype).eps


PROGRAM = r"""
#include <cstdio>
#include "cpu/philox_words.h"
using namespace recon3d;
int main() {
  static uint32_t want[4 * 48], got[4 * 48];
  const PhiloxKey keys[] = {{0, 0, 0, 0}, {0xFFFFFFFFu, 0x80000001u, 0xFFFFFFFFu, 7u}};
  const uint32_t starts[] = {0, 0xFFFFFFF0u, 0x7FFFFFFFu};
  int wrong = 0;
  for (const PhiloxKey& key : keys)
    for (uint32_t start : starts) {
      philox_words_plain(want, start, 48, 0x89ABCDEFu, key);
#ifdef __x86_64__
      if (__builtin_cpu_supports("avx2")) {
        philox_words_256(got, start, 48, 0x89ABCDEFu, key);
        for (int i = 0; i < 192; ++i) wrong += got[i] != want[i];
      }
      if (__builtin_cpu_supports("avx512f")) {
        philox_words_512(got, start, 48, 0x89ABCDEFu, key);
        for (int i = 0; i < 192; ++i) wrong += got[i] != want[i];
      }
#endif
      philox_words(got, start, 48, 0x89ABCDEFu, key);
      for (int i = 0; i < 192; ++i) wrong += got[i] != want[i];
    }
  std::printf("%d", wrong);
}
"""


def test_vector_paths_agree(tmp_path):
    # the machine's own path is tested above; this one runs every path that the machine can
    try:
        compiler = _build.compilers()[0]
    except _build.BuildError:
        pytest.skip("no C++ compiler")
    (tmp_path / "words.cpp").write_text(PROGRAM)
    command = [compiler, "-std=c++17", "-O2", f"-I{_build.sources_dir()}", "words.cpp", "-o", "words"]
    subprocess.run(command, cwd=tmp_path, check=True)
    done = subprocess.run([tmp_path / "words"], capture_output=True, text=True, check=True)
    assert done.stdout == "0"


@pytest.mark.parametrize("seed, level, stream, slices, pixels", CASES)
def test_triton_agrees(seed, level, stream, slices, pixels):
    pytest.importorskip("triton")
    from recon3d.kernels import philox as kernels

    device = "cuda" if torch.cuda.is_available() else "cpu"
    index, key = torch.tensor(slices, dtype=torch.int64), philox._signed(seed)
    got = kernels.philox_bits(index.to(device), pixels, key, level, stream, block=1024)
    assert torch.equal(got.cpu(), philox._bits_reference(index, pixels, seed, level, stream))
    anchors = torch.stack([index, index.roll(1)], 1)
    coefficients = torch.tensor([[0.6, 0.8], [1.0, 0.0], [0.0, -1.0]]).repeat(6, 1)[: len(index)].contiguous()
    arguments = (anchors, coefficients, pixels, key, level, stream)
    truth = philox._normal_reference(*arguments, True)
    for wide in (False, True):
        dtype = torch.float64 if wide else torch.float32
        out, check = guarded(len(index), pixels, dtype=dtype, device=device)
        kernels.philox_normal(*(t.to(device) for t in arguments[:2]), *arguments[2:], wide, block=1024, out=out)
        check()
        if truth.numel():
            assert (out.cpu().double() - truth).abs().max() <= 12 * torch.finfo(dtype).eps


def test_moments_and_distribution():
    z = philox_normal(2024, 5, 8, (512, 512), dtype=torch.float64).flatten()
    n = z.numel()
    # five standard errors of each moment
    assert z.mean().abs() < 5 / math.sqrt(n)
    assert ((z**2).mean() - 1).abs() < 5 * math.sqrt(2 / n)
    assert (z**3).mean().abs() < 5 * math.sqrt(15 / n)
    assert ((z**4).mean() - 3).abs() < 5 * math.sqrt(96 / n)
    assert stats.kstest(z.numpy()[:400_000], "norm").pvalue > 1e-3
    assert 4.7 < z.abs().max() < 5.78


def test_uniforms_stay_inside():
    # the smallest and largest word give a finite radius, and every angle quadrant has the right signs
    words = torch.tensor([0, F])
    a, b = philox._box_muller(words, words.flip(0), torch.float32)
    assert a.isfinite().all() and b.isfinite().all() and a.abs().max() < 5.78
    angle = torch.arange(0, 2**32, 2**27 + 12345)
    for dtype in (torch.float32, torch.float64):
        cos, sin = philox._box_muller(torch.full_like(angle, 2**31), angle, dtype)
        radius = math.sqrt(-2 * math.log((2**22 + 0.5) / 2**23))
        theta = ((angle >> 9).double() + 0.5) * 2.0**-23 * 2 * math.pi
        tiny = 16 * torch.finfo(dtype).eps
        assert (cos.double() - radius * theta.cos()).abs().max() < tiny
        assert (sin.double() - radius * theta.sin()).abs().max() < tiny


def test_independence():
    # pixels of one block, neighbouring slices, levels, streams and seeds
    base = philox_normal(3, 4, 6, (256, 256), dtype=torch.float64).flatten(1)
    others = [
        base.roll(1, 0),
        base.roll(1, 1),
        base.roll(2, 1),
        base.roll(3, 1),
        philox_normal(3, 5, 6, (256, 256), dtype=torch.float64).flatten(1),
        philox_normal(4, 4, 6, (256, 256), dtype=torch.float64).flatten(1),
        philox_normal(3 + 2**32, 4, 6, (256, 256), dtype=torch.float64).flatten(1),
        philox_normal(3, 4, 6, (256, 256), stream=1, dtype=torch.float64).flatten(1),
    ]
    for other in others:
        assert (base * other).mean().abs() < 5 / math.sqrt(base.numel())
        assert ((base**2 - 1) * (other**2 - 1)).mean().abs() < 5 * 2 / math.sqrt(base.numel())


def test_slab_order_and_threads():
    whole = philox_normal(1, 2, 9, (33, 21))
    assert torch.equal(philox_normal(1, 2, torch.arange(4, 7), (33, 21)), whole[4:7])
    assert torch.equal(philox_normal(1, 2, torch.tensor([8, 0]), (33, 21)), whole[[8, 0]])
    check_threads(lambda: philox_normal(1, 2, 9, (133, 121)))


def test_bad_input():
    with pytest.raises(ValueError, match="philox_normal: seed must be"):
        philox_normal(-1, 0, 1, (2,))
    with pytest.raises(ValueError, match="philox_normal: level must be"):
        philox_normal(0, 2**32, 1, (2,))
    with pytest.raises(TypeError, match="philox_bits: slices must be"):
        philox_bits(0, 0, torch.zeros(2), 3)
    with pytest.raises(ValueError, match="philox_bits: slice indices must be"):
        philox_bits(0, 0, torch.tensor([-1]), 3)
    with pytest.raises(TypeError, match="dtype must be float32 or float64"):
        philox_normal(0, 0, 1, (2,), dtype=torch.float16)
    with pytest.raises(ValueError, match="philox4x32: counter must be"):
        philox4x32(torch.zeros(3, dtype=torch.int64), 0)

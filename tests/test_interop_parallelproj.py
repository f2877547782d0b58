"""recon3d.interop.parallelproj: Joseph's method written out in numpy, parallelproj's own C library where it is at hand
(RECON3D_PARALLELPROJ names the file of version 1), transposes, kinds of arrays, one sentence for what does not fit."""

from __future__ import annotations

import ctypes
import math
import os

import numpy as np
import pytest
import torch

from recon3d.interop import parallelproj as pp

SHAPE = (17, 21, 13)
VOXSIZE = np.array([2.0, 1.5, 2.5])
ORIGIN = np.array([-18.0, -12.0, -17.5])  # the image is not centred
WIDTH, SIGMA, CUT, BINS = 9.0, 6.0, 3.0, 11


def rays(n=60, seed=0, dtype=np.float64):
    rng = np.random.default_rng(seed)
    ends = rng.normal(size=(2, n, 3))
    ends *= 45 / np.linalg.norm(ends, axis=-1, keepdims=True)
    return tuple(ends.astype(dtype))


def image(seed=1, dtype=np.float64):
    return np.random.default_rng(seed).random(SHAPE).astype(dtype)


def cumulative(u):
    reach = math.erf(CUT / math.sqrt(2))
    return np.clip(0.5 + 0.5 * np.vectorize(math.erf)(u / math.sqrt(2)) / reach, 0, 1)


def joseph(start, end, img, bin_centre=None, offset=0.0, sigma=SIGMA, width=WIDTH):
    """One line, plane by plane; with a bin's centre its share of every plane."""
    delta = end - start
    length = np.linalg.norm(delta)
    axis = max((1, 2, 0), key=lambda k: abs(delta[k]))
    others = [k for k in range(3) if k != axis]
    total = 0.0
    for j in range(SHAPE[axis]):
        t = (ORIGIN[axis] + j * VOXSIZE[axis] - start[axis]) / delta[axis]
        if not 0 <= t <= 1:
            continue
        at = (start + t * delta - ORIGIN) / VOXSIZE
        value = 0.0
        for corner in range(4):
            cell, weight = [0, 0, 0], 1.0
            cell[axis] = j
            for bit, k in enumerate(others):
                low = math.floor(at[k])
                up = (corner >> bit) & 1
                cell[k] = low + up
                weight *= at[k] - low if up else 1 - (at[k] - low)
            if all(0 <= c < n for c, n in zip(cell, SHAPE, strict=True)):
                value += weight * img[tuple(cell)]
        if bin_centre is not None:
            d = (t - 0.5) * length - offset
            value *= cumulative((bin_centre + width / 2 - d) / sigma) - cumulative((bin_centre - width / 2 - d) / sigma)
        total += value * VOXSIZE[axis] * length / abs(delta[axis])
    return total


def close(got, want, limit):
    error = np.linalg.norm(np.asarray(got) - np.asarray(want)) / np.linalg.norm(want)
    assert error <= limit, f"error {error:.2e} > {limit:.0e}"


def one(value):
    return np.array([value])


def sino_options(sigma=SIGMA, offset=0.0, bins=BINS):
    return WIDTH, np.atleast_1d(sigma), np.atleast_1d(offset), CUT, bins


@pytest.mark.parametrize(("dtype", "limit"), [(np.float64, 1e-12), (np.float32, 1e-5)])
def test_forward(dtype, limit):
    start, end = rays()
    img = image(dtype=dtype)
    got = pp.joseph3d_fwd(start, end, img, ORIGIN, VOXSIZE)
    assert isinstance(got, np.ndarray) and got.dtype == dtype and got.shape == (60,)
    close(got, [joseph(a, b, img) for a, b in zip(start, end, strict=True)], limit)


@pytest.mark.parametrize("varied", [False, True], ids=["one-number", "per-line"])
def test_tof_sinogram(varied):
    start, end = rays(24)
    sigma = np.where(np.arange(24) % 3 == 0, 4.0, SIGMA) if varied else np.full(1, SIGMA)
    offset = np.linspace(-6, 8, 24) if varied else np.full(1, 2.5)
    img = image()
    got = pp.joseph3d_fwd_tof_sino(start, end, img, ORIGIN, VOXSIZE, *sino_options(sigma, offset))
    want = [
        [
            joseph(a, b, img, (k - (BINS - 1) / 2) * WIDTH, np.resize(offset, 24)[i], np.resize(sigma, 24)[i])
            for k in range(BINS)
        ]
        for i, (a, b) in enumerate(zip(start, end, strict=True))
    ]
    assert got.shape == (24, BINS)
    close(got, want, 1e-12)


def test_tof_listmode_is_the_sinograms_bin():
    start, end = rays(80)
    bins = np.random.default_rng(3).integers(-4, 5, 80).astype(np.int16)
    options = (WIDTH, one(SIGMA), one(-3.0), CUT)
    events = pp.joseph3d_fwd_tof_lm(start, end, image(), ORIGIN, VOXSIZE, *options, bins)
    every = pp.joseph3d_fwd_tof_sino(start, end, image(), ORIGIN, VOXSIZE, *options, 9)
    close(events, every[np.arange(80), bins + 4], 1e-12)
    sigma = np.where(np.arange(80) % 2, 5.0, 7.0)
    options = (WIDTH, sigma, one(0.0), CUT)
    events = pp.joseph3d_fwd_tof_lm(start, end, image(), ORIGIN, VOXSIZE, *options, bins)
    every = pp.joseph3d_fwd_tof_sino(start, end, image(), ORIGIN, VOXSIZE, *options, 9)
    close(events, every[np.arange(80), bins + 4], 1e-12)


def test_bins_add_up():
    start, end = rays()
    plain = pp.joseph3d_fwd(start, end, image(), ORIGIN, VOXSIZE)
    every = pp.joseph3d_fwd_tof_sino(start, end, image(), ORIGIN, VOXSIZE, *sino_options(bins=15))
    close(every.sum(-1), plain, 1e-12)


@pytest.mark.parametrize("sigma", [np.full(1, SIGMA), np.where(np.arange(60) % 4, 5.0, 8.0)], ids=["one", "per-line"])
def test_transposes(sigma):
    start, end = (r.reshape(5, 12, 3) for r in rays())
    rng = np.random.default_rng(5)
    img, y, yt = image(), rng.random((5, 12)), rng.random((5, 12, BINS))
    bins = rng.integers(-3, 4, (5, 12))
    lines, grid = (start, end), (ORIGIN, VOXSIZE)
    options = (WIDTH, sigma, one(1.0), CUT)
    pairs = [
        (pp.joseph3d_fwd(*lines, img, *grid), y, pp.joseph3d_back(*lines, SHAPE, *grid, y)),
        (
            pp.joseph3d_fwd_tof_sino(*lines, img, *grid, *options, BINS),
            yt,
            pp.joseph3d_back_tof_sino(*lines, SHAPE, *grid, yt, *options, BINS),
        ),
        (
            pp.joseph3d_fwd_tof_lm(*lines, img, *grid, *options, bins),
            y,
            pp.joseph3d_back_tof_lm(*lines, SHAPE, *grid, y, *options, bins),
        ),
    ]
    for forward, values, back in pairs:
        assert forward.shape == values.shape and back.shape == SHAPE
        assert np.vdot(forward, values) == pytest.approx(np.vdot(img, back), rel=1e-12)


def test_many_lines_go_in_pieces(monkeypatch):
    start, end = rays()
    whole = pp.joseph3d_fwd(start, end, image(), ORIGIN, VOXSIZE)
    back = pp.joseph3d_back(start, end, SHAPE, ORIGIN, VOXSIZE, whole)
    monkeypatch.setattr(pp, "_LINES", 7)
    assert np.array_equal(pp.joseph3d_fwd(start, end, image(), ORIGIN, VOXSIZE), whole)
    close(pp.joseph3d_back(start, end, SHAPE, ORIGIN, VOXSIZE, whole), back, 1e-12)


def test_tensors_and_gradients():
    start, end = (torch.from_numpy(r) for r in rays(8))
    img = torch.from_numpy(image()).requires_grad_()
    got = pp.joseph3d_fwd(start, end, img, ORIGIN.tolist(), VOXSIZE.tolist(), threadsperblock=64, num_chunks=2)
    assert isinstance(got, torch.Tensor)
    y = torch.rand(8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    got.backward(y)
    assert torch.equal(img.grad, pp.joseph3d_back(start, end, SHAPE, ORIGIN, VOXSIZE, y))
    single = pp.joseph3d_fwd(start[0], end[0], img.detach(), ORIGIN, VOXSIZE)
    assert single.shape == () and single == got[0]
    counts = pp.joseph3d_fwd(*rays(8), np.ones(SHAPE, np.int64), ORIGIN, VOXSIZE)
    assert counts.dtype == np.float32


def test_no_lines():
    none = np.zeros((0, 3))
    assert pp.joseph3d_fwd(none, none, image(), ORIGIN, VOXSIZE).shape == (0,)
    assert pp.joseph3d_fwd_tof_sino(none, none, image(), ORIGIN, VOXSIZE, *sino_options()).shape == (0, BINS)
    assert not pp.joseph3d_back(none, none, SHAPE, ORIGIN, VOXSIZE, np.zeros(0)).any()
    assert not pp.joseph3d_back_tof_sino(none, none, SHAPE, ORIGIN, VOXSIZE, np.zeros((0, BINS)), *sino_options()).any()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"xend": np.zeros((59, 3))}, "one shape"),
        ({"xstart": np.zeros((60, 2)), "xend": np.zeros((60, 2))}, r"\[..., 3\]"),
        ({"xstart": np.full((60, 3), np.nan)}, "NaN"),
        ({"img": np.zeros((3, 4))}, "three axes"),
        ({"img": np.zeros((3, 0, 4))}, "no empty one"),
        ({"voxsize": [1.0, -1.0, 1.0]}, "three positive"),
        ({"img_origin": [0.0, 0.0]}, "three numbers"),
        ({"sigma_tof": np.ones(7)}, "one per line"),
        ({"n": 70}, "64 at most"),
        ({"sigma_tof": one(0.0)}, "must be positive"),
        ({"tofbin_width": -1.0}, "must be positive"),
        ({"ntofbins": 0}, "must be positive"),
        ({"tofcenter_offset": one(np.nan)}, "finite"),
        ({"xend": np.zeros((60, 3)), "tofcenter_offset": one(4.0)}, "ends inside"),
    ],
)
def test_errors(change, says):
    n = change.get("n", 60)
    change = {"sigma_tof": np.linspace(1, 2, n)} if "n" in change else change
    start, end = rays(n)
    given = {"xstart": start, "xend": end, "img": image(), "img_origin": ORIGIN, "voxsize": VOXSIZE}
    names = ("tofbin_width", "sigma_tof", "tofcenter_offset", "nsigmas", "ntofbins")
    given |= dict(zip(names, sino_options(), strict=True))
    with pytest.raises(ValueError, match=says) as caught:
        pp.joseph3d_fwd_tof_sino(**{**given, **change})
    assert "\n" not in str(caught.value)


def test_errors_of_values_and_bins():
    start, end = rays(4)
    with pytest.raises(ValueError, match="one value per line"):
        pp.joseph3d_back(start, end, SHAPE, ORIGIN, VOXSIZE, np.zeros(5))
    with pytest.raises(ValueError, match="one integer per line"):
        pp.joseph3d_fwd_tof_lm(start, end, image(), ORIGIN, VOXSIZE, WIDTH, one(SIGMA), one(0.0), CUT, np.zeros(4))


@pytest.fixture
def library():
    name = os.environ.get("RECON3D_PARALLELPROJ")
    if not name:
        pytest.skip("parallelproj's C library is not at hand (set RECON3D_PARALLELPROJ to libparallelproj_c.so)")
    return ctypes.CDLL(name)


def test_against_the_c_library(library):
    rng = np.random.default_rng(2)
    start, end = rays(500, 4, np.float32)
    img, bins = image(dtype=np.float32), rng.integers(-3, 4, 500).astype(np.int16)
    y, yt = rng.random(500, np.float32), rng.random((500, BINS), np.float32)
    origin, voxsize = ORIGIN.astype(np.float32), VOXSIZE.astype(np.float32)
    sigma, offset, shape = np.full(1, SIGMA, np.float32), np.zeros(1, np.float32), np.array(SHAPE, np.int32)

    def at(a):
        return a.ctypes.data_as(ctypes.c_void_p)

    def call(name, image_, values, *rest):
        getattr(library, name)(
            at(start),
            at(end),
            at(image_),
            at(origin),
            at(voxsize),
            at(values),
            ctypes.c_longlong(500),
            at(shape),
            *rest,
        )

    def flight(*which):
        f, flag = ctypes.c_float, ctypes.c_ubyte
        return f(WIDTH), at(sigma), at(offset), f(CUT), *which, flag(0), flag(0)

    lines, grid = (start, end), (origin, voxsize)
    options = (WIDTH, sigma, offset, CUT)
    # their planes near an end of the kernel are chosen by a wider one, which moves values by some 1e-3
    cases = [
        ("joseph3d", (), y, 1e-5, ()),
        ("tof_sino", flight(ctypes.c_short(BINS)), yt, 1e-2, (*options, BINS)),
        ("tof_lm", flight(at(bins)), y, 1e-2, (*options, bins)),
    ]
    for kind, rest, values, limit, ours in cases:
        tail = "" if kind == "joseph3d" else "_" + kind
        forward, back = np.zeros_like(values), np.zeros(SHAPE, np.float32)
        call("joseph3d_fwd" + tail, img, forward, *rest)
        call("joseph3d_back" + tail, back, values, *rest)
        close(getattr(pp, "joseph3d_fwd" + tail)(*lines, img, *grid, *ours), forward, limit)
        close(getattr(pp, "joseph3d_back" + tail)(*lines, SHAPE, *grid, values, *ours), back, limit)

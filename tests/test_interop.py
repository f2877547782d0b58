"""Calls of other libraries on recon3d's operators: the exact sums they promise, their own results where they are
installed, memory shared, and one sentence for what does not fit."""

import importlib
import math
import sys

import numpy as np
import pytest
import torch

from recon3d.interop import finufft as like_finufft
from recon3d.interop.arrays import as_given, to_torch
from recon3d.interop.torchkbnufft import KbNufft, KbNufftAdjoint

RNG = np.random.default_rng(0)


def noise(*shape, dtype=np.complex128):
    return (RNG.normal(size=shape) + 1j * RNG.normal(size=shape)).astype(dtype)


def matrix(axes, shape, isign):
    """[M, N1 * N2 ...] of exp(isign i (n_1 x + n_2 y + ...)), n from -N/2."""
    out = np.ones((len(axes[0]), 1), dtype=complex)
    for x, n in zip(axes, shape, strict=True):
        factor = np.exp(1j * isign * np.outer(x, np.arange(n) - n // 2))
        out = (out[:, :, None] * factor[:, None, :]).reshape(len(x), -1)
    return out


def close(got, want, limit=1e-6):
    error = np.linalg.norm(np.asarray(got) - np.asarray(want)) / np.linalg.norm(want)
    assert error <= limit, f"error {error:.2e} > {limit:.0e}"


# ---- arrays ---------------------------------------------------------------------------------------------------------


class Dlpack:
    """An array of some other library."""

    def __init__(self, values):
        self.values = values

    def __dlpack__(self, **options):
        return self.values.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.values.__dlpack_device__()


def test_memory_is_shared():
    ours = np.zeros(3)
    to_torch(ours)[0] = 1
    to_torch(Dlpack(ours))[1] = 2
    assert ours.tolist() == [1, 2, 0]
    tensor = torch.zeros(2)
    assert to_torch(tensor) is tensor and as_given(tensor, tensor) is tensor
    back = as_given(tensor, ours)
    back[0] = 5
    assert isinstance(back, np.ndarray) and tensor[0] == 5
    assert isinstance(as_given(tensor, Dlpack(ours)), torch.Tensor)


def test_arrays_torch_cannot_view_are_copied():
    reverse = np.arange(4.0)[::-1]
    frozen = np.arange(4.0)
    frozen.flags.writeable = False
    swapped = np.arange(4.0).astype(">f8")
    for array in (reverse, frozen, swapped, [3.0, 1.0]):
        assert to_torch(array).tolist() == list(array)
    for bad in (np.array(["a"]), [object()]):
        with pytest.raises(TypeError, match="array of numbers"):
            to_torch(bad)


@pytest.mark.gpu
def test_device_arrays_are_shared():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    tensor = torch.zeros(4, device="cuda")

    class Array:
        __cuda_array_interface__ = tensor.__cuda_array_interface__

    to_torch(Array())[0] = 1
    to_torch(Dlpack(tensor))[1] = 2
    assert tensor.tolist() == [1, 2, 0, 0]
    cupy = pytest.importorskip("cupy")
    given = cupy.ones((3, 4, 4), dtype=cupy.complex64)
    got = like_finufft.nufft2d2(cupy.zeros(2), cupy.zeros(2), given, eps=1e-3)
    assert isinstance(got, cupy.ndarray) and abs(got[0, 0].item() - 16) < 0.1


# ---- finufft --------------------------------------------------------------------------------------------------------

SHAPES = [(11,), (8, 9), (5, 4, 6)]


def call(module, shape, kind):
    return getattr(module, f"nufft{len(shape)}d{kind}")


@pytest.mark.parametrize("isign", [-1, 1])
@pytest.mark.parametrize("modeord", [0, 1])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_finufft_calls_are_the_sums(shape, modeord, isign):
    """Any period of the coordinates, alone and stacked, both mode orders."""
    axes = [RNG.uniform(-9, 9, 30) for _ in shape]
    a = matrix(axes, shape, isign)
    c, f = noise(3, 30), noise(3, *shape)
    dims = tuple(range(1, len(shape) + 1))
    options = dict(eps=1e-9, isign=isign, modeord=modeord)
    want1 = (c @ matrix(axes, shape, isign)).reshape(3, *shape)
    want2 = (np.fft.fftshift(f, dims) if modeord else f).reshape(3, -1) @ a.T
    got1 = call(like_finufft, shape, 1)(*axes, c, shape if len(shape) > 1 else shape[0], **options)
    got2 = call(like_finufft, shape, 2)(*axes, f, **options)
    close(np.fft.fftshift(got1, dims) if modeord else got1, want1, 1e-8)
    close(got2, want2, 1e-8)
    assert got1.dtype == np.complex128 and got2.shape == (3, 30)
    close(call(like_finufft, shape, 2)(*axes, f[0], **options), want2[0], 1e-8)
    close(call(like_finufft, shape, 1)(*axes, c[0], shape, **options), got1[0], 1e-12)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_beside_finufft(shape):
    theirs = pytest.importorskip("finufft")
    axes = [RNG.uniform(-math.pi, math.pi, 30).astype(np.float32) for _ in shape]
    c, f = noise(2, 30, dtype=np.complex64), noise(2, *shape, dtype=np.complex64)
    for options in (dict(), dict(isign=-1), dict(isign=1), dict(modeord=1)):
        got, want = (call(m, shape, 1)(*axes, c, shape, eps=1e-5, **options) for m in (like_finufft, theirs))
        assert got.dtype == want.dtype and got.shape == want.shape
        close(got, want, 1e-4)
        got, want = (call(m, shape, 2)(*axes, f, eps=1e-5, **options) for m in (like_finufft, theirs))
        assert got.dtype == want.dtype and got.shape == want.shape
        close(got, want, 1e-4)


def test_finufft_out_and_tensors():
    x, c = (torch.from_numpy(v).requires_grad_() for v in (RNG.uniform(-3, 3, 9), noise(9)))
    out = np.empty(6, dtype=complex)
    want = like_finufft.nufft1d1(x.detach().numpy(), c.detach().numpy(), 6, out)
    assert want is out
    got = like_finufft.nufft1d1(x, c, 6, eps=1e-9)
    close(got.detach(), want, 1e-5)
    torch.autograd.gradcheck(lambda x, c: like_finufft.nufft1d1(x, c, 6, eps=1e-12), (x, c), atol=1e-5)
    assert like_finufft.nufft1d1(x, c, 6, eps=0.5).shape == (6,)  # less was asked than the planner can miss


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([0.0], [1.0], 4), TypeError, "complex"),
        (([0.0, 1.0], [1j], 4), ValueError, "2 points and 1 strengths"),
        (([[0.0]], [1j], 4), ValueError, "one array"),
        (([0.0], [1j], (4, 4)), ValueError, "n_modes"),
        (([0.0], [[[1j]]], 4), ValueError, "stack"),
        (([math.nan], [1j], 4), ValueError, "NaN"),
    ],
)
def test_finufft_refuses(arguments, error, message):
    with pytest.raises(error, match=message):
        like_finufft.nufft1d1(*arguments)
    with pytest.raises(ValueError, match="modeord"):
        like_finufft.nufft1d1([0.0], [1j], 4, modeord=2)
    with pytest.raises(ValueError, match="one array"):
        like_finufft.nufft2d2([0.0], [0.0, 1.0], noise(4, 4))


# ---- torchkbnufft ---------------------------------------------------------------------------------------------------


def kb_case(shape, batch=2, coils=3, samples=40, dtype=torch.complex64):
    generator = torch.Generator().manual_seed(len(shape))
    image = torch.randn(batch, coils, *shape, dtype=dtype, generator=generator)
    maps = torch.randn(1, coils, *shape, dtype=dtype, generator=generator)
    data = torch.randn(batch, coils, samples, dtype=dtype, generator=generator)
    omega = (torch.rand(len(shape), samples, generator=generator, dtype=torch.float64) * 2 - 1) * math.pi
    return image, maps, data, omega


@pytest.mark.parametrize("shape", [(9, 12), (5, 6, 4)], ids=str)
def test_kbnufft_is_the_sum(shape):
    image, maps, data, omega = kb_case(shape, dtype=torch.complex128)
    a = matrix(omega.numpy(), shape, -1)
    forward, adjoint = KbNufft(shape, eps=1e-9), KbNufftAdjoint(shape, eps=1e-9)
    close(forward(image, omega), image.flatten(2).numpy() @ a.T, 1e-8)
    close(adjoint(data, omega), (data.numpy() @ a.conj()).reshape(image.shape), 1e-8)
    one = image[:, :1]
    close(forward(one, omega, smaps=maps), (one * maps).flatten(2).numpy() @ a.T, 1e-8)
    combined = adjoint(data, omega, smaps=maps)
    close(combined, (adjoint(data, omega) * maps.conj()).sum(1, keepdim=True), 1e-12)
    root = math.sqrt(math.prod(2 * n for n in shape))
    close(forward(image, omega, norm="ortho") * root, forward(image, omega), 1e-12)
    # a trajectory for every element
    both = torch.stack([omega, -omega.flip(1)])
    close(forward(image, both)[1], forward(image[1:], both[1])[0], 1e-12)
    close(adjoint(data, both)[1], adjoint(data[1:], both[1])[0], 1e-12)


@pytest.mark.parametrize("norm", [None, "ortho"])
def test_beside_torchkbnufft(norm):
    theirs = pytest.importorskip("torchkbnufft")
    shape = (10, 12)
    image, maps, data, omega = kb_case(shape)
    k = omega.float()
    want = theirs.KbNufft(shape)(image[:, :1], k, smaps=maps, norm=norm)
    close(KbNufft(shape)(image[:, :1], k, smaps=maps, norm=norm), want, 5e-3)
    want = theirs.KbNufftAdjoint(shape)(data, k, smaps=maps, norm=norm)
    close(KbNufftAdjoint(shape)(data, k, smaps=maps, norm=norm), want, 5e-3)


def test_kbnufft_gradients():
    image, _, _, omega = kb_case((3, 4), 1, 1, 4, torch.complex128)
    layer = KbNufft((3, 4), eps=1e-11)
    torch.autograd.gradcheck(layer, (image.requires_grad_(), omega.requires_grad_()), atol=1e-5)


def test_kbnufft_refuses():
    image, _, _, omega = kb_case((4, 5))
    layer = KbNufft((4, 5))
    for arguments, error, message in (
        ((image.real, omega), TypeError, "complex"),
        ((image[0], omega), ValueError, "batch, coil"),
        ((image, omega.mT), ValueError, "omega must be"),
        ((image, torch.stack([omega] * 3)), ValueError, "omega must be"),
        ((image, omega * 30), ValueError, "pi"),
        ((image, omega, None, "forward"), ValueError, "norm"),
    ):
        with pytest.raises(error, match=message):
            layer(*arguments)
    with pytest.raises(ValueError, match="grid_size"):
        KbNufftAdjoint((4, 5), (8,))


# ---- sigpy ----------------------------------------------------------------------------------------------------------


def test_sigpy_missing_is_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "sigpy", None)
    monkeypatch.setitem(sys.modules, "sigpy.linop", None)
    module = importlib.import_module("recon3d.interop.sigpy")
    with pytest.raises(ImportError, match="pip install sigpy"):
        module.nufft_linop((4, 4), np.zeros((1, 2)))


def test_sigpy_linops():
    sigpy = pytest.importorskip("sigpy")
    from recon3d.geometry import ParallelBeam, VolumeGrid, equiangular
    from recon3d.interop.sigpy import as_linop, nufft_linop
    from recon3d.operators import CTOperator

    shape, coord = (8, 10), RNG.uniform(-1, 1, (5, 7, 2)) * [4, 5]
    ours = nufft_linop((3, *shape), coord, eps=1e-4)
    theirs = sigpy.linop.NUFFT((3, *shape), coord, oversamp=2, width=6)
    assert ours.oshape == theirs.oshape == [3, 5, 7] and ours.ishape == [3, *shape]
    x, y = noise(3, *shape), noise(3, 5, 7)
    close(ours * x, theirs * x, 1e-3)
    close(ours.H * y, theirs.H * y, 1e-3)
    close((ours.H * ours)(x), ours.H * (ours * x), 1e-12)
    assert abs(np.vdot(y, ours * x) - np.vdot(ours.H * y, x)) < 1e-10 * np.linalg.norm(x) * np.linalg.norm(y)
    with pytest.raises(ValueError, match="unit 'index' ends"):
        nufft_linop(shape, coord * 2)

    ct = CTOperator(ParallelBeam(equiangular(6), 14, 1.0), VolumeGrid((2, 9, 9), (1.0, 1.0, 1.0)))
    linop = as_linop(ct)
    volume = RNG.normal(size=(2, 9, 9)).astype(np.float32)
    sinogram = linop * volume
    assert sinogram.dtype == np.float32
    close(sinogram, ct(torch.from_numpy(volume)), 1e-7)
    close(linop.H * sinogram, ct.adjoint(torch.from_numpy(sinogram)), 1e-7)
    # one of sigpy's solvers runs on it
    found = sigpy.app.LinearLeastSquares(linop, sinogram, max_iter=30, show_pbar=False).run()
    close(linop * found, sinogram, 2e-2)

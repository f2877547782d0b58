"""recon3d.ops.blur: against scipy, self-adjoint, sums kept, ends, batches, threads, bad input."""

import pytest
import torch
from laws import check_adjoint, check_batch_independent, check_close_to_float64, check_threads, guarded

from recon3d.ops import _library, gaussian_blur
from recon3d.ops.blur import _blur, blur_weights

SHAPES = [(1, 1, 1), (1, 5, 7), (3, 1, 4), (4, 6, 1), (9, 16, 33), (40, 3, 2), (0, 3, 3)]
DTYPES = [torch.float32, torch.float64]
SIGMAS = [(0.9, 1.1, 0.7), (0.0, 2.0, 0.3), (3.0, 0.0, 0.0), (0.0, 0.0, 0.0)]


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("sigmas", SIGMAS, ids=str)
def test_is_scipys(sigmas):
    ndimage = pytest.importorskip("scipy.ndimage")
    x = randn(12, 15, 17)
    want = torch.from_numpy(ndimage.gaussian_filter(x.numpy(), sigmas, mode="constant", truncate=4.0))
    torch.testing.assert_close(gaussian_blur(x, sigmas), want, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sigmas", SIGMAS, ids=str)
def test_close_to_float64(shape, dtype, sigmas):
    x = randn(2, *shape, dtype=dtype)
    _library.ensure()
    check_close_to_float64(torch.ops.recon3d.gaussian_blur(x, *sigmas), _blur(x, *sigmas), _blur(x.double(), *sigmas))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 1, 4), (4, 6, 1), (3, 5, 19)], ids=str)
@pytest.mark.parametrize("sigmas", SIGMAS, ids=str)
def test_triton_interpreted(shape, dtype, sigmas):
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("a GPU is here: the kernels run compiled")
    from recon3d.kernels import blur as kernels

    x, check = guarded(2, *shape, dtype=dtype)
    x.copy_(randn(2, *shape))
    kept = x.clone()
    out = kernels.blur(x, [blur_weights(s) for s in sigmas], block=64)
    check()
    assert torch.equal(x, kept) and out.data_ptr() != x.data_ptr()
    check_close_to_float64(out, _blur(x, *sigmas), _blur(x.double(), *sigmas))


def test_self_adjoint_and_its_own_gradient():
    x, y = randn(7, 9, 8), randn(7, 9, 8, seed=1)
    blur = lambda v: gaussian_blur(v, (0.9, 1.4, 0.5))  # noqa: E731
    check_adjoint(blur, blur, x, y, 1e-14)
    check_adjoint(blur, blur, x.float(), y.float())
    assert torch.autograd.gradcheck(blur, randn(3, 4, 5).requires_grad_())


def test_sums_are_kept_inside():
    x = torch.zeros(21, 21, 21, dtype=torch.float64)
    x[10, 10, 10] = 7
    out = gaussian_blur(x, (1.2, 0.8, 2.0))
    assert out.sum().item() == pytest.approx(7, rel=1e-12) and (out >= 0).all()
    at = torch.arange(21, dtype=torch.float64) - 10
    assert (out.sum((0, 1)) @ at**2 / 7).item() == pytest.approx(4.0, rel=0.01)  # cut at 4 sigma
    flat = gaussian_blur(torch.ones(30, 30, 30), (1.0, 1.0, 1.0))
    torch.testing.assert_close(flat[4:-4, 4:-4, 4:-4], torch.ones(22, 22, 22))
    assert flat[0, 15, 15] < 0.75


def test_batches_threads_and_strides():
    x = randn(5, 6, 7, 8).float()
    check_batch_independent(lambda v: gaussian_blur(v, (1.0, 0.6, 0.9)), x)
    check_threads(lambda: gaussian_blur(x, (1.0, 0.6, 0.9)))
    want = gaussian_blur(x.transpose(1, 3).contiguous(), (1.0, 0.6, 0.9))
    assert torch.equal(gaussian_blur(x.transpose(1, 3), (1.0, 0.6, 0.9)), want)
    assert torch.equal(gaussian_blur(x[0], (1.0, 0.6, 0.9)), gaussian_blur(x, (1.0, 0.6, 0.9))[0])
    assert gaussian_blur(x[None], (1.0, 1.0, 1.0)).shape == (1, 5, 6, 7, 8)


def test_opcheck():
    _library.ensure()
    torch.library.opcheck(torch.ops.recon3d.gaussian_blur.default, (randn(1, 3, 4, 5).requires_grad_(), 0.5, 1.0, 0.0))


def test_bad_input():
    x = torch.zeros(3, 4, 5)
    with pytest.raises(ValueError, match=r"gaussian_blur: a volume \[..., z, y, x\] is needed"):
        gaussian_blur(x[0], (1.0, 1.0, 1.0))
    for bad in ((1.0, 1.0), (-1.0, 0.0, 0.0), (float("nan"), 0.0, 0.0), (1e3, 0.0, 0.0)):
        with pytest.raises(ValueError, match="sigma_voxels must be three numbers"):
            gaussian_blur(x, bad)
    with pytest.raises(TypeError, match="float32 or float64"):
        gaussian_blur(x.half(), (1.0, 1.0, 1.0))

"""EM, the relative difference prior and the blur on a CUDA device: the kernels against the torch definition."""

import pytest
import torch
from laws import check_close_to_float64
from test_em import DTYPES, WEIGHTS, positive, volumes

from recon3d.ops import _library, em_update, gaussian_blur, poisson_ratio
from recon3d.ops.blur import _blur
from recon3d.ops.em import _ratio, _update
from recon3d.ops.rdp import _gradient

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def device():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")


def test_kernels_are_there():
    found = _library.backends()
    names = ("poisson_ratio", "em_update", "rdp_gradient", "gaussian_blur")
    assert all(found[op]["cuda"] for op in names), _library.build_error()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("surrogate", [True, False], ids=["surrogate", "gradient"])
@pytest.mark.parametrize("weights", WEIGHTS)
def test_update(dtype, surrogate, weights):
    for shape in [(1, 1, 1), (4, 6, 1), (37, 61, 83)]:
        x, back, s, a = volumes(shape, dtype)
        for anchor in (None, a):
            settings = (0.7, 0.3 * (weights != "none"), 2.0, 1e-2, *WEIGHTS[weights], surrogate, 1e-3)
            wide = [None if t is None else t.double() for t in (x, back, s, anchor)]
            moved = [None if t is None else t.cuda() for t in (x, back, s, anchor)]
            got = torch.ops.recon3d.em_update(*moved, *settings).cpu()
            check_close_to_float64(got, _update(x, back, s, anchor, *settings), _update(*wide, *settings), str(shape))
    assert torch.equal(em_update(moved[0], moved[1], moved[2]), em_update(moved[0], moved[1], moved[2]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ratio(dtype):
    y, p, b = (positive(40, 31, 7, 33, seed=k, dtype=dtype) for k in (0, 1, 3))
    f = positive(40, 31, 1, 33, seed=2, dtype=dtype)
    whole = f.expand(y.shape).contiguous()
    settings = (0.3, 1, y[0].numel(), False, False)
    own = _ratio(y, p, whole, b, *settings)
    truth = _ratio(*(t.double() for t in (y, p, whole, b)), *settings)
    check_close_to_float64(poisson_ratio(*(t.cuda() for t in (y, p, f, b)), 0.3).cpu(), own, truth)
    rows = poisson_ratio(*(t.cuda()[1::3] for t in (y, p, f, b)), 0.3).cpu()
    check_close_to_float64(rows, own[1::3], truth[1::3])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_prior_and_blur(dtype):
    x = positive(29, 43, 67, dtype=dtype)
    for weights in (WEIGHTS["3d"], WEIGHTS["z"]):
        got = torch.ops.recon3d.rdp_gradient(x.cuda(), 2.0, 1e-3, *weights).cpu()
        check_close_to_float64(got, _gradient(x, 2.0, 1e-3, *weights), _gradient(x.double(), 2.0, 1e-3, *weights))
    for sigmas in ((0.9, 1.3, 0.7), (0.0, 2.0, 0.0), (0.0, 0.0, 0.0)):
        got = gaussian_blur(x.cuda(), sigmas).cpu()
        check_close_to_float64(got, _blur(x[None], *sigmas)[0], _blur(x.double()[None], *sigmas)[0])

"""The MRI operators: laws, the Fourier convention, weights, residual, slabs."""

import math

import numpy as np
import pytest
import torch
from laws import check_adjoint, check_linear, check_threads

from recon3d import testing
from recon3d.consistency.solve import conjugate_gradients
from recon3d.operators import (
    CartesianMRI,
    centred_fft,
    centred_ifft,
    decouple_readout,
    decouple_stack,
)

SLICES, COILS, NY, NX = 3, 4, 15, 18


def _random(*shape, seed=0, dtype=torch.complex64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def _maps(coils=COILS, ny=NY, nx=NX, slices=SLICES, dtype=torch.complex64):
    maps = _random(slices, coils, ny, nx, seed=9, dtype=dtype)
    return maps / maps.abs().square().sum(1, keepdim=True).sqrt()


def _sampled(*shape, seed=5):
    return (torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.5).float()


MASKS = {
    "kx": _sampled(NX),
    "ky": _sampled(NY, 1),
    "plane": _sampled(NY, NX),
    "stack": _sampled(SLICES, NY, NX),
    "stack of kx": _sampled(SLICES, 1, NX),
}


@pytest.fixture(params=MASKS)
def operator(request):
    return CartesianMRI(MASKS[request.param], _maps())


def _gap(a, b):
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("n", [1, 6, 7])
def test_centred_fft_is_the_written_convention(n):
    i = np.arange(n) - n // 2
    matrix = torch.from_numpy(np.exp(-2j * np.pi * np.outer(i, i) / n) / math.sqrt(n))
    x = _random(2, n, dtype=torch.complex128)
    assert _gap(centred_fft(x, (1,)), x @ matrix.T) < 1e-14
    assert _gap(centred_ifft(centred_fft(x, (0, 1)), (0, 1)), x) < 1e-14


def test_cartesian_laws(operator):
    x, y = _random(*operator.domain.shape), _random(*operator.range.shape, seed=1)
    check_adjoint(operator, operator.adjoint, x, y)
    check_linear(operator, x, _random(*operator.domain.shape, seed=2))
    testing.check_adjoint(operator)
    testing.check_slices_independent(operator)
    assert tuple(operator(x).shape) == operator.range.shape
    assert _gap(operator.normal(x), operator.adjoint(operator(x))) < 1e-6
    check_threads(lambda: operator.normal(x))
    batch = torch.stack([x, 2 * x])
    assert _gap(operator(batch)[1], 2 * operator(x)) < 1e-6
    assert _gap(operator.adjoint(operator(batch))[1], 2 * operator.normal(x)) < 1e-6
    assert _gap(operator.normal(batch)[1], 2 * operator.normal(x)) < 1e-6


def test_cartesian_is_the_formula():
    maps, mask = _maps(), MASKS["stack"]
    x = _random(SLICES, NY, NX)
    want = mask[:, None] * centred_fft(maps * x[:, None])
    assert _gap(CartesianMRI(mask, maps)(x), want) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64])
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (SLICES, 1, NY, NX), (SLICES, COILS, NY, NX), (COILS, 1, 1)])
def test_weighted_normal(operator, shape, dtype):
    weights = (_random(*shape, seed=3, dtype=torch.float32).abs() + 0.1).to(dtype)
    x = _random(*operator.domain.shape)
    want = operator.adjoint(weights * operator(x))
    assert _gap(operator.normal(x, weights), want) < 1e-6
    y = _random(*operator.range.shape, seed=1)
    want = operator.adjoint(weights * (y - operator(x)))
    assert _gap(operator.residual(x, y, weights), want) < 1e-5


def test_residual_follows_the_measurement():
    operator = CartesianMRI(MASKS["kx"], _maps())
    x, y = _random(*operator.domain.shape), _random(*operator.range.shape, seed=1)
    first = operator.residual(x, y)
    assert torch.equal(first, operator.residual(x, y))
    y.mul_(2)  # in place: the kept term is made anew
    assert _gap(operator.residual(x, y), operator.adjoint(y - operator(x))) < 1e-6


def test_gradient_is_the_adjoint(operator):
    x = _random(*operator.domain.shape).requires_grad_()
    y = _random(*operator.range.shape, seed=1)
    (operator(x) * y.conj()).sum().real.backward()
    assert _gap(x.grad, operator.adjoint(y)) < 1e-6


def test_norm_is_the_largest_eigenvalue():
    operator = CartesianMRI(_sampled(6, 5), _maps(3, 6, 5, 1, torch.complex128))
    eye = torch.eye(30, dtype=torch.complex128).reshape(30, 1, 6, 5)
    matrix = operator(eye).reshape(30, -1).T
    top = float(torch.linalg.svdvals(matrix)[0]) ** 2
    assert 0.98 * top <= operator.norm(iterations=40) <= 1.0001 * top
    assert operator.norm(torch.full((1, 1, 1, 1), 3.0)) == pytest.approx(3 * operator.norm())


def test_full_sampling_is_inverted():
    x = _random(SLICES, NY, NX)
    operator = CartesianMRI(torch.ones(NX), 2.5 * _maps())
    assert _gap(operator.pinv(operator(x)), x) < 1e-6


def test_conjugate_gradients_solve_the_complex_normal_equations():
    operator = CartesianMRI(MASKS["stack"], _maps(dtype=torch.complex128))
    y = _random(*operator.range.shape, seed=1, dtype=torch.complex128)
    r = torch.view_as_real(operator.adjoint(y)).contiguous()  # Hermitian products are real ones of the parts
    got = conjugate_gradients(
        lambda p: torch.view_as_real(operator.normal(torch.view_as_complex(p))), torch.zeros_like(r), r, 400, True
    )
    eye = torch.eye(NY * NX, dtype=torch.complex128).reshape(-1, 1, NY, NX)
    part = operator.slab(1, 2)
    matrix = part(eye).reshape(NY * NX, -1).T
    want = torch.linalg.lstsq(matrix, y[1].reshape(-1, 1)).solution.reshape(NY, NX)
    assert _gap(torch.view_as_complex(got[1]), want) < 1e-8


def test_slabs():
    operator = CartesianMRI(MASKS["stack"], _maps())
    x = _random(*operator.domain.shape)
    assert torch.equal(operator.slab(1, 3)(x[1:]), operator(x)[1:])
    with pytest.raises(ValueError, match=r"0 <= start < stop <= 3"):
        operator.slab(2, 4)


def test_decoupled_stack_and_readout():
    volume = _random(5, 6, 7)
    maps = _random(2, 5, 6, 7, seed=1)
    kspace = centred_fft(maps * volume, (-3, -2, -1))  # [coil, kz, ky, kx]
    stack = decouple_stack(kspace.movedim(0, 1))
    assert _gap(stack, centred_fft((maps * volume).movedim(0, 1))) < 1e-6
    for axis, others in ((-1, (1, 2)), (1, (2, 3)), (2, (1, 3))):
        want = centred_fft(maps * volume, others).movedim(axis, 0)
        assert _gap(decouple_readout(kspace, axis), want) < 1e-6
    with pytest.raises(ValueError, match="axis must be"):
        decouple_readout(kspace, 0)
    with pytest.raises(ValueError, match=r"\[coil, kz, ky, kx\]"):
        decouple_readout(kspace[0])
    with pytest.raises(ValueError, match=r"\[kz, coil, sample\]"):
        decouple_stack(kspace[0, 0])


@pytest.mark.parametrize(
    ("mask", "maps", "error", "words"),
    [
        (torch.ones(NX + 1), _maps(), ValueError, "does not broadcast"),
        (torch.ones(2, NY, NX), _maps(), ValueError, "does not broadcast"),
        (torch.ones(1, 1, NY, NX), _maps(), ValueError, "does not broadcast"),
        (torch.ones(NX, dtype=torch.complex64), _maps(), TypeError, "must be real"),
        (torch.full((NX,), math.nan), _maps(), ValueError, "NaN"),
        (torch.ones(NX), _maps()[0], ValueError, r"\[slice, coil, y, x\]"),
        (torch.ones(NX), _maps().real, TypeError, "must be complex"),
        (torch.ones(NX), _maps() * math.nan, ValueError, "NaN"),
    ],
)
def test_bad_cartesian(mask, maps, error, words):
    with pytest.raises(error, match=words):
        CartesianMRI(mask, maps)


def test_bad_arguments(operator):
    with pytest.raises(ValueError, match="the volume must end in"):
        operator(torch.zeros(SLICES, NX, NY))
    with pytest.raises(ValueError, match="the volume must end in"):
        operator.normal(torch.zeros(1, NY, NX))
    with pytest.raises(ValueError, match="k-space must end in"):
        operator.adjoint(torch.zeros(SLICES, COILS + 1, NY, NX))

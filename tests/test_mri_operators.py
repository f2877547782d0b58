"""The MRI operators: laws, the Fourier convention, weights, residual, slabs."""

import math

import numpy as np
import pytest
import torch
from laws import check_adjoint, check_linear, check_threads

from recon3d import testing
from recon3d.consistency.solve import conjugate_gradients
from recon3d.geometry.mri import kooshball, radial, spiral
from recon3d.operators import (
    CartesianMRI,
    NonCartesianMRI,
    OffResonance,
    ThickSlices,
    centred_fft,
    centred_ifft,
    decouple_readout,
    decouple_stack,
    mri,
)
from recon3d.testing.phantoms import coil_maps, rasterise, shepp_logan

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


def _exact(points, shape):
    """Matrix [M, pixels] of the written convention."""
    axes = [torch.arange(n, dtype=torch.float64) - n // 2 for n in shape]
    grid = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).reshape(-1, len(shape))
    return torch.exp(-1j * (points @ grid.T)) / math.sqrt(math.prod(shape))


PLANE = (12, 13)
SPACE = (6, 8, 7)


def _non_cartesian(kind, **options):
    if kind == "space":
        return NonCartesianMRI(kooshball(20, 12, SPACE), _random(COILS, *SPACE, seed=9), **options)
    maps = _maps(ny=PLANE[0], nx=PLANE[1])
    if kind == "plane":
        return NonCartesianMRI(radial(9, 20, PLANE), maps, **options)
    spokes = [radial(9, 20, PLANE, start_rad=a) for a in (0.0, 0.4, 0.0)]
    return NonCartesianMRI(spokes, maps, **options)


@pytest.mark.parametrize("kind", ["plane", "per slice", "space"])
@pytest.mark.parametrize("normal", ["toeplitz", "nufft"])
def test_non_cartesian_laws(kind, normal):
    if kind == "space" and normal == "toeplitz":
        pytest.skip("of the plane only")
    operator = _non_cartesian(kind, normal=normal, eps=1e-5)
    x, y = _random(*operator.domain.shape), _random(*operator.range.shape, seed=1)
    check_adjoint(operator, operator.adjoint, x, y)
    check_linear(operator, x, _random(*operator.domain.shape, seed=2))
    testing.check_adjoint(operator)
    assert tuple(operator(x).shape) == operator.range.shape
    want = operator.adjoint(operator(x))
    assert _gap(operator.normal(x), want) < 2e-5
    assert _gap(operator.residual(x, y), operator.adjoint(y) - want) < 2e-5
    batch = torch.stack([x, 2 * x])
    assert _gap(operator(batch)[1], 2 * operator(x)) < 1e-6
    assert _gap(operator.adjoint(operator(batch))[1], 2 * want) < 1e-6
    assert _gap(operator.normal(batch)[1], 2 * operator.normal(x)) < 1e-6
    if kind == "space":
        assert operator.coupling == "volume"
        with pytest.raises(NotImplementedError, match="all slices at once"):
            operator.slab(0, 1)
    else:
        testing.check_slices_independent(operator)
        part = operator.slab(1, 3)
        assert _gap(part.pinv(y[1:]), operator.pinv(y)[1:]) < 1e-6


@pytest.mark.parametrize("kind", ["plane", "per slice", "space"])
def test_non_cartesian_is_the_formula(kind):
    operator = _non_cartesian(kind, eps=1e-6)
    x = _random(*operator.domain.shape)
    got = operator(x)
    if kind == "space":
        matrix = _exact(operator.trajectories[0].points, SPACE)
        want = (operator.maps * x).reshape(COILS, -1).to(torch.complex128) @ matrix.T
    else:
        given = operator.trajectories * (SLICES if kind == "plane" else 1)
        images = (operator.maps * x[:, None]).flatten(2).to(torch.complex128)
        want = torch.stack([i @ _exact(t.points, PLANE).T for i, t in zip(images, given, strict=True)])
    assert _gap(got, want) < 2e-6
    assert _gap(operator(x.to(torch.complex128)), want) < 2e-6


@pytest.mark.parametrize("normal", ["toeplitz", "nufft"])
def test_non_cartesian_weights(normal):
    operator = _non_cartesian("per slice", normal=normal, eps=1e-5)
    x = _random(*operator.domain.shape)
    samples = operator.range.shape[-1]
    for shape in ((1,), (1, 1, 1), (samples,), (1, 1, samples), (SLICES, 1, samples), (1, COILS, 1)):
        weights = _random(*shape, seed=3, dtype=torch.float32).abs() + 0.1
        for w in (weights, 2 * weights.to(torch.complex64)):
            want = operator.adjoint(w * operator(x))
            assert _gap(operator.normal(x, w), want) < 3e-5
    weights = torch.rand(samples, generator=torch.Generator().manual_seed(1))
    first = operator.normal(x, weights)
    assert torch.equal(first, operator.normal(x, weights))
    weights.mul_(2)  # in place: the kept kernel is made anew
    assert _gap(operator.normal(x, weights), 2 * first) < 1e-5


def test_the_number_of_samples_decides_between_toeplitz_and_nufft():
    maps = _maps(ny=PLANE[0], nx=PLANE[1])
    assert not NonCartesianMRI(radial(3, 12, PLANE), maps).toeplitz
    assert NonCartesianMRI(radial(9, 20, PLANE), maps).toeplitz
    assert NonCartesianMRI(radial(3, 12, PLANE), maps, eps=1e-6).toeplitz
    assert not NonCartesianMRI(radial(9, 20, PLANE), maps, normal="nufft").toeplitz


@pytest.mark.parametrize("make", [lambda s: radial(80, 64, s), lambda s: spiral(16, 400, s)])
def test_gridding_is_quantitative(make):
    shape = (32, 32)
    maps = coil_maps(4, (1, *shape))
    x = torch.from_numpy(rasterise(shepp_logan(14.0), shape, (1.0, 1.0), 3)).to(torch.complex64)[None]
    operator = NonCartesianMRI(make(shape), maps)
    y = operator(x)
    inside = x.abs() > 0.1
    found = operator.pinv(y)
    assert float((found[inside] / x[inside]).real.median()) == pytest.approx(1, abs=0.1)
    assert _gap(operator.rss(y)[inside], found.abs()[inside]) < 0.1
    flat = NonCartesianMRI(make(shape), maps, density=operator.density().reshape(-1))
    assert torch.equal(flat.pinv(y), found)


def test_gridding_in_space_uses_every_coil():
    operator = _non_cartesian("space")
    y = operator(_random(*SPACE))
    assert operator.coil_images(y).shape == (COILS, *SPACE)
    assert operator.rss(y).shape == SPACE and not operator.rss(y).is_complex()
    assert operator.pinv(y).shape == SPACE


def test_non_cartesian_memory_is_bounded_by_parts(monkeypatch):
    x = _random(SLICES, *PLANE)
    whole = {k: _non_cartesian(k) for k in ("plane", "per slice", "space")}
    want = {k: (o(_random(*o.domain.shape)), o.normal(_random(*o.domain.shape))) for k, o in whole.items()}
    monkeypatch.setitem(mri._TOGETHER, "cpu", 1)
    for k, o in whole.items():
        x = _random(*o.domain.shape)
        assert _gap(o(x), want[k][0]) < 1e-6 and _gap(o.normal(x), want[k][1]) < 1e-6
        assert _gap(o.adjoint(o(x)), want[k][1]) < 1e-2


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: NonCartesianMRI(radial(3, 8, (9, 9)), _maps()), ValueError, r"the trajectory is for \(9, 9\)"),
        (lambda: NonCartesianMRI(radial(3, 8, (NY, NX)), _maps()[0]), ValueError, r"\[slice, coil, y, x\]"),
        (lambda: NonCartesianMRI(kooshball(3, 8, SPACE), _maps()[0]), ValueError, r"\[coil, z, y, x\]"),
        (lambda: NonCartesianMRI([radial(3, 8, (NY, NX))] * 2, _maps()), ValueError, "2 trajectories for 3 slices"),
        (
            lambda: NonCartesianMRI([radial(3, 8, (NY, NX)), radial(3, 9, (NY, NX)), radial(3, 8, (NY, NX))], _maps()),
            ValueError,
            "trajectory 1 has 27 samples",
        ),
        (lambda: NonCartesianMRI([], _maps()), TypeError, "one Trajectory, or one per slice"),
        (lambda: NonCartesianMRI(radial(3, 8, (NY, NX)), _maps(), normal="fft"), ValueError, "'auto'"),
        (lambda: _non_cartesian("space", normal="toeplitz"), ValueError, "take normal='nufft'"),
        (lambda: _non_cartesian("plane", density=torch.ones(7)), ValueError, "density must be"),
        (lambda: _non_cartesian("plane", density=torch.full((180,), math.nan)), ValueError, "real and finite"),
    ],
)
def test_bad_non_cartesian(make, error, words):
    with pytest.raises(error, match=words):
        make()


@pytest.mark.parametrize("profile", ["box", "gaussian"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64])
def test_thick_slices(profile, dtype):
    operator = ThickSlices((12, 5, 7), 1.0, 3.0, spacing_mm=2.5, profile=profile, dtype=dtype)
    x, y = _random(*operator.domain.shape, dtype=dtype), _random(*operator.range.shape, seed=1, dtype=dtype)
    assert operator.range.shape == (5, 5, 7)
    check_adjoint(operator, operator.adjoint, x, y)
    testing.check_adjoint(operator)
    assert _gap(operator.normal(x), operator.adjoint(operator(x))) < 1e-6
    assert _gap(operator.residual(x, y), operator.adjoint(y - operator(x))) < 1e-6
    assert _gap(operator(torch.stack([x, 2 * x]))[1], 2 * operator(x)) < 1e-6
    level = torch.full((12, 5, 7), 2.0, dtype=dtype)
    assert _gap(operator(level), torch.full((5, 5, 7), 2.0, dtype=dtype)) < 1e-6
    assert _gap(operator.pinv(operator(level)), level) < 1e-6
    ramp = torch.arange(12.0)[:, None, None].expand(12, 5, 7).to(dtype)
    assert _gap(operator.pinv(operator(ramp))[2:-2], ramp[2:-2]) < (1e-5 if profile == "box" else 0.02)


def test_thick_slices_average_what_they_cover():
    x = _random(12, 2, 2, dtype=torch.float32)
    whole = ThickSlices((12, 2, 2), 1.0, 3.0)
    assert whole.range.shape[0] == 4
    assert _gap(whole(x), x.reshape(4, 3, 2, 2).mean(1)) < 1e-6
    half = ThickSlices((12, 2, 2), 1.0, 2.0, count=1, offset_mm=1.0)  # from 0 to 2 mm: half, whole, half
    assert _gap(half(x)[0], 0.25 * x[0] + 0.5 * x[1] + 0.25 * x[2]) < 1e-6
    wide = ThickSlices((101, 1, 1), 0.1, 2.0, count=1, offset_mm=5.0, profile="gaussian").weights[0]
    assert float((wide > 0.5 * wide.max()).sum()) == pytest.approx(20, abs=1)


def test_thick_slices_before_a_scanner():
    scanner = CartesianMRI(MASKS["kx"], _maps())
    operator = ThickSlices((9, NY, NX), 1.0, 3.0, scanner=scanner)
    assert operator.range == scanner.range and operator.domain.dtype == torch.complex64
    x, y = _random(*operator.domain.shape), _random(*operator.range.shape, seed=1)
    check_adjoint(operator, operator.adjoint, x, y)
    weights = torch.full((1, 1, 1, 1), 2.0)
    assert _gap(operator.normal(x, weights), operator.adjoint(weights * operator(x))) < 1e-6
    assert _gap(operator.residual(x, y, weights), operator.adjoint(weights * (y - operator(x)))) < 1e-5
    assert operator.pinv(y).shape == (9, NY, NX)
    assert operator.norm() <= scanner.norm() * 1.01


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"thick_mm": 0.0}, "thick_mm must be positive"),
        ({"spacing_mm": math.nan}, "spacing_mm must be positive"),
        ({"profile": "sinc"}, "'box' or 'gaussian'"),
        ({"count": 5}, "5 slices every 3 mm from 1 mm do not lie within"),
        ({"offset_mm": -2.0}, "do not lie within"),
        ({"scanner": CartesianMRI(MASKS["kx"], _maps())}, "the scanner is for"),
    ],
)
def test_bad_thick_slices(options, words):
    with pytest.raises(ValueError, match=words):
        ThickSlices((12, 4, 4), 1.0, **{"thick_mm": 3.0, **options})
    with pytest.raises(ValueError, match="the volume must end in"):
        ThickSlices((12, 4, 4), 1.0, 3.0)(torch.zeros(11, 4, 4))


def test_off_resonance_is_the_written_sum():
    tau = torch.linspace(0, 0.02, 180, dtype=torch.float64)
    field = 60 * torch.sin(torch.linspace(-2, 2, SLICES * math.prod(PLANE))).reshape(SLICES, *PLANE)
    scanner = _non_cartesian("plane", eps=1e-5)
    operator = OffResonance(scanner, field, tau)
    assert 3 <= operator.segments <= 12
    x, y = _random(*operator.domain.shape), _random(*operator.range.shape, seed=1)
    matrix = _exact(scanner.trajectories[0].points, PLANE)
    images = (scanner.maps * x[:, None]).flatten(2).to(torch.complex128)
    phase = torch.exp(-2j * math.pi * tau[:, None] * field.double().flatten(1)[:, None])  # [slice, sample, pixel]
    want = torch.einsum("scp,smp->scm", images, matrix * phase)
    assert _gap(operator(x), want) < 2e-3
    check_adjoint(operator, operator.adjoint, x, y)
    check_linear(operator, x, _random(*operator.domain.shape, seed=2))
    even = OffResonance(scanner, torch.zeros_like(field), tau)
    assert even.segments == 1 and _gap(even(x), scanner(x)) < 1e-6
    assert _gap(even.pinv(y), scanner.pinv(y)) < 1e-6
    assert OffResonance(scanner, field, tau, segments=2).segments == 2


@pytest.mark.parametrize(
    ("field", "times", "options", "words"),
    [
        (torch.zeros(1, *PLANE), torch.zeros(180), {}, "the field map is"),
        (torch.zeros(SLICES, *PLANE), torch.zeros(179), {}, "180 sample times"),
        (torch.full((SLICES, *PLANE), math.nan), torch.zeros(180), {}, "NaN"),
        (torch.zeros(SLICES, *PLANE), torch.zeros(180), {"segments": 0}, "segments are possible"),
        (torch.zeros(SLICES, *PLANE), torch.zeros(180), {"error": 0.0}, "error must be positive"),
        (1e5 * torch.rand(SLICES, *PLANE), torch.linspace(0, 1, 180), {}, "split the readout"),
    ],
)
def test_bad_off_resonance(field, times, options, words):
    with pytest.raises(ValueError, match=words):
        OffResonance(_non_cartesian("plane"), field, times, **options)

"""recon3d.ops.renoise: the formula, the laws, the noise level it leaves, and what it refuses."""

import itertools
import math

import pytest
import torch
from laws import check_batch_independent, check_close_to_float64, check_linear, check_threads, guarded

from recon3d import noise
from recon3d.ops import DataTerm, renoise
from recon3d.ops.renoise import _reference, weights

SIGMA, NEXT, A, B = 0.8, 0.5, 0.6, 0.8
# the CPU kernel works in tiles of 8192 pixels and stacks of 16 slices
SHAPES = [(1, 1, 1), (3, 2, 7), (2, 61, 53), (1, 97, 101), (18, 5, 8), (2, 3, 8, 6), (0, 4, 4), (2, 0, 5)]
KINDS = ["given", "identity", "mask", "block_mean"]


def make(kind, shape, dtype=torch.float32, sigma_y=0.0, seed=0, factor=None):
    """u, x0 and x0c (a tensor or a data term); for block_mean the shape is that of y."""
    g = torch.Generator().manual_seed(seed)
    draw = lambda *s: torch.randn(s, generator=g, dtype=torch.float64).to(dtype)  # noqa: E731
    rows, columns = shape[-2:]
    if kind == "block_mean":
        factor = factor or 2
        shape = (*shape[:-2], rows * factor, columns * factor)
    u, x0 = draw(*shape), draw(*shape)
    if kind == "given":
        return u, x0, draw(*shape)
    y = draw(*shape[:-2], rows, columns)
    mask = torch.rand(shape[-2:] if seed % 2 == 0 else shape, generator=g) < 0.4 if kind == "mask" else None
    return u, x0, DataTerm(kind, y, sigma_y, mask, factor or 1)


def plain(u, x0, x0c, sigma, sigma_next, a, b, key, eps_from="x0"):
    """The module's formula written out in float64 with explicit projections, sharing no code with the op."""
    u, x0 = u.double(), x0.double()
    z = key.draw(u.shape[1:], torch.float64)
    if not isinstance(x0c, DataTerm):
        x0c = x0c.double()
        eps = (u - (x0 if eps_from == "x0" else x0c)) / sigma
        return x0c + sigma_next * (a * eps + b * z)
    t, f = x0c, x0c.factor
    up = lambda v: v.repeat_interleave(f, -1).repeat_interleave(f, -2)  # noqa: E731
    if t.kind == "block_mean":
        means = lambda v: sum(v[..., i::f, j::f] for i in range(f) for j in range(f)) / f**2  # noqa: E731
        P, pinv, s = lambda v: up(means(v)), up, 1 / f
    elif t.kind == "mask":
        P, pinv, s = lambda v: v * t.mask, lambda v: v * t.mask, 1.0
    else:
        P, pinv, s = lambda v: v, lambda v: v, 1.0
    if t.sigma_y == 0 or sigma_next >= t.sigma_y / s:
        lam = 1.0
    else:
        lam = s * sigma_next * a / t.sigma_y
    x0c = x0 + lam * (pinv(t.y.double()) - P(x0))
    eps = (u - (x0 if eps_from == "x0" else x0c)) / sigma
    both = sigma_next * (a * eps + b * z)
    if t.sigma_y == 0:
        return x0c + both
    fresh = math.sqrt(max(0.0, sigma_next**2 - (lam * t.sigma_y / s) ** 2))
    return x0c + both - P(both) + fresh * P(z)


def arguments(u, x0, x0c, sigma, sigma_next, a, b, key, eps_from="x0", whole_mask=False):
    """What the public function passes to the op."""
    term = x0c if isinstance(x0c, DataTerm) else None
    mask = None if term is None or term.mask is None else term.mask
    if mask is not None:
        mask = mask.expand(u.shape if whole_mask or mask.shape == u.shape else u.shape[1:]).contiguous()
    return (
        u,
        x0,
        None if term else x0c,
        term.y if term else None,
        mask,
        term.factor if term else 1,
        key.anchors,
        key.coefficients,
        key.seed,
        key.level,
        key.stream,
        *weights(term, sigma, sigma_next, a, b),
        eps_from == "x0c",
    )


def reference(*case):
    return _reference(*arguments(*case))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("eps_from", ["x0", "x0c"])
def test_formula(kind, shape, dtype, eps_from):
    for sigma_y, key in itertools.product(
        (0.0, 0.1, 3.0) if kind != "given" else (0.0,),
        (noise.independent(shape[0], seed=3, level=1), noise.iscs_mm(shape[0], 1.0, 3.0, seed=3)),
    ):
        u, x0, x0c = make(kind, shape, dtype, sigma_y)
        truth = plain(u, x0, x0c, SIGMA, NEXT, A, B, key, eps_from)
        got = renoise(u, x0, x0c, SIGMA, NEXT, A, B, key, eps_from=eps_from)
        assert got.shape == u.shape and got.dtype == dtype
        check_close_to_float64(got, reference(u, x0, x0c, SIGMA, NEXT, A, B, key, eps_from), truth)
        within = u.clone()
        assert renoise(within, x0, x0c, SIGMA, NEXT, A, B, key, eps_from=eps_from, inplace=True) is within
        assert torch.equal(within, got)


@pytest.mark.parametrize("factor", [2, 3, 4, 5, 16])
def test_factors(factor):
    for sigma_y in (0.0, 0.05, 2.0):
        u, x0, term = make("block_mean", (2, 7, 9), sigma_y=sigma_y, factor=factor)
        key = noise.independent(2, seed=8)
        truth = plain(u, x0, term, SIGMA, NEXT, A, B, key)
        got = renoise(u, x0, term, SIGMA, NEXT, A, B, key)
        check_close_to_float64(got, reference(u, x0, term, SIGMA, NEXT, A, B, key), truth)


def test_mask_per_slice():
    u, x0, term = make("mask", (3, 11, 13), seed=1)
    assert term.mask.shape == (3, 11, 13)
    key = noise.independent(3)
    truth = plain(u, x0, term, SIGMA, NEXT, A, B, key)
    assert (renoise(u, x0, term, SIGMA, NEXT, A, B, key) - truth).abs().max() < 1e-5


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sigma_y", [0.0, 0.3])
def test_last_level_returns_the_estimate(kind, sigma_y):
    u, x0, x0c = make(kind, (2, 6, 10), sigma_y=sigma_y)
    key = noise.independent(2)
    got = renoise(u, x0, x0c, SIGMA, 0.0, A, B, key)
    if kind == "given":
        assert torch.equal(got, x0c)
    elif sigma_y:  # nothing is trusted more than sigma_next allows
        assert torch.equal(got, x0)
    elif kind == "identity":
        assert torch.equal(got, x0c.y)
    elif kind == "mask":
        assert torch.equal(got, torch.where(x0c.mask, x0c.y, x0))
    else:
        mean = torch.nn.functional.avg_pool2d(got, 2)
        assert (mean - x0c.y).abs().max() < 1e-6


@pytest.mark.parametrize("kind", KINDS[1:])
@pytest.mark.parametrize("sigma_y", [0.0, 0.05, 0.2, 0.3, 0.6, 5.0])
@pytest.mark.parametrize("b", [0.0, 0.6, 1.0])
def test_total_noise_in_closed_form(kind, sigma_y, b):
    # state x + sigma n, exact estimate x0 = x, data H x + sigma_y e: then u' - x = N_u n + N_y e + N_z z with
    # N_u N_u^T + N_y N_y^T + N_z N_z^T = sigma_next^2 I; every matrix is read off the op column by column
    rows = columns = 4
    f = 2 if kind == "block_mean" else 1
    a, n = math.sqrt(1 - b * b), rows * columns
    mask = torch.arange(n).reshape(rows, columns) % 3 == 0 if kind == "mask" else None
    key = noise.independent(n, seed=4)
    eye = torch.eye(n, dtype=torch.float64).reshape(n, rows, columns)
    zero = torch.zeros_like(eye)
    small = torch.zeros(n, rows // f, columns // f, dtype=torch.float64)
    m = small[0].numel()
    step = lambda u, y: renoise(u, zero, DataTerm(kind, y, sigma_y, mask, f), SIGMA, NEXT, a, b, key)  # noqa: E731
    offset = step(zero, small)  # slice k holds N_z z_k
    z = key.draw((rows, columns), torch.float64).reshape(n, n)
    n_z = torch.linalg.solve(z, offset.reshape(n, n)).T
    n_u = SIGMA * (step(eye, small) - offset).reshape(n, n).T
    y_eye = small.clone().reshape(n, m)
    y_eye[:m] = torch.eye(m, dtype=torch.float64)
    n_y = sigma_y * (step(zero, y_eye.reshape(small.shape)) - offset).reshape(n, n)[:m].T
    total = n_u @ n_u.T + n_y @ n_y.T + n_z @ n_z.T
    assert (total - NEXT**2 * torch.eye(n, dtype=torch.float64)).abs().max() < 1e-10


@pytest.mark.parametrize("kind", KINDS[1:])
@pytest.mark.parametrize("sigma_y", [0.05, 0.2, 0.45, 2.0])
def test_published_ddnm_plus(kind, sigma_y):
    # the published step in its own coordinates, x_t = sqrt(abar_t) u, by the singular vectors of a dense H
    rows, columns, eta, abar, abar_next = 4, 6, 0.85, 0.5, 0.7
    f = 2 if kind == "block_mean" else 1
    mask = torch.arange(rows * columns).reshape(rows, columns) % 3 == 0 if kind == "mask" else None
    eye = torch.eye(rows * columns, dtype=torch.float64)
    H = torch.nn.functional.avg_pool2d(eye.reshape(-1, 1, rows, columns), f).flatten(1).T
    H = H[mask.flatten()] if mask is not None else H
    g = torch.Generator().manual_seed(2)
    x_t, x0, full = (torch.randn(1, rows, columns, generator=g, dtype=torch.float64) for _ in range(3))
    y = H @ full.flatten()
    key = noise.independent(1, seed=7)
    z = key.draw((rows, columns), torch.float64).flatten()

    U, S, Vt = torch.linalg.svd(H)
    S = torch.cat([S, torch.zeros(rows * columns - len(S), dtype=torch.float64)])
    a, level = math.sqrt(abar_next), math.sqrt(1 - abar_next)
    seen = S > 0
    s = torch.where(seen, S, torch.ones_like(S))
    lam = torch.where(level >= a * sigma_y / s, 1.0, s * level * math.sqrt(1 - eta**2) / (a * sigma_y))
    data = torch.zeros_like(S)
    data[: len(y)] = U.T @ y
    x = Vt @ x0.flatten()
    corrected = torch.where(seen, x - lam / s * (S * x - data), x)
    eps = Vt @ (x_t - math.sqrt(abar) * x0).flatten() / math.sqrt(1 - abar)
    fresh = (level**2 - (a * sigma_y * lam / s) ** 2).clamp(min=0).sqrt()
    null = level * (math.sqrt(1 - eta**2) * eps + eta * (Vt @ z))
    want = Vt.T @ (a * corrected + torch.where(seen, fresh * (Vt @ z), null))

    stored = full if kind != "block_mean" else y.reshape(1, rows // f, columns // f)
    sigma, sigma_next = math.sqrt((1 - abar) / abar), math.sqrt((1 - abar_next) / abar_next)
    term = DataTerm(kind, stored, sigma_y, mask, f)
    got = renoise(x_t / math.sqrt(abar), x0, term, sigma, sigma_next, math.sqrt(1 - eta**2), eta, key)
    assert (a * got.flatten() - want).abs().max() < 1e-12


@pytest.mark.parametrize("kind", KINDS[1:])
@pytest.mark.parametrize("sigma_y", [0.0, 0.2, 0.9])
def test_total_noise_drawn(kind, sigma_y):
    f = 2 if kind == "block_mean" else 1
    shape = (8, 128, 128)
    g = torch.Generator().manual_seed(1)
    x = torch.randn(shape, generator=g)
    y = torch.nn.functional.avg_pool2d(x, f)
    y = y + sigma_y * torch.randn(y.shape, generator=g)
    mask = torch.rand(shape[1:], generator=g) < 0.5 if kind == "mask" else None
    u = x + SIGMA * torch.randn(shape, generator=g)
    got = renoise(u, x, DataTerm(kind, y, sigma_y, mask, f), SIGMA, NEXT, A, B, noise.independent(8, seed=9))
    excess = (got - x) / NEXT
    n = excess.numel()
    assert excess.mean().abs() < 5 / math.sqrt(n)
    assert (excess.var() - 1).abs() < 5 * math.sqrt(2 / n)
    for dim in (0, 1, 2):
        assert (excess * excess.roll(1, dim)).mean().abs() < 5 / math.sqrt(n)


@pytest.mark.parametrize("kind", KINDS)
def test_linear(kind):
    # for fixed noise: minus the noise, linear in (u, x0, x0c) jointly
    shape = (2, 8, 10)
    key = noise.independent(2, seed=1)
    u1, _, c1 = make(kind, shape, seed=2, sigma_y=0.7)

    def op(v):
        third = v[2] if kind == "given" else DataTerm(kind, v[2][..., : shape[1], : shape[2]], 0.7, c1.mask, c1.factor)
        zero = torch.zeros_like(v[0])
        third0 = zero if kind == "given" else DataTerm(kind, torch.zeros_like(third.y), 0.7, c1.mask, c1.factor)
        return renoise(v[0], v[1], third, SIGMA, NEXT, A, B, key) - renoise(zero, zero, third0, SIGMA, NEXT, A, B, key)

    g = torch.Generator().manual_seed(5)
    v1, v2 = torch.randn((3, *u1.shape), generator=g), torch.randn((3, *u1.shape), generator=g)
    check_linear(op, v1, v2)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("eps_from", ["x0", "x0c"])
@pytest.mark.parametrize("sigma_y", [0.0, 0.7])
def test_gradient(kind, eps_from, sigma_y):
    u, x0, x0c = make(kind, (2, 1, 3), torch.float64, sigma_y)
    key = noise.iscs(2, seed=1)
    last = x0c if kind == "given" else x0c.y
    inputs = [t.clone().requires_grad_() for t in (u, x0, last)]

    def op(u, x0, last):
        third = last if kind == "given" else DataTerm(kind, last, sigma_y, x0c.mask, x0c.factor)
        return renoise(u, x0, third, SIGMA, NEXT, A, B, key, eps_from=eps_from)

    assert torch.autograd.gradcheck(op, inputs)
    assert torch.autograd.gradgradcheck(op, inputs)


@pytest.mark.parametrize("kind", KINDS)
def test_registration(kind):
    u, x0, x0c = make(kind, (2, 6, 8), sigma_y=0.3)
    case = arguments(u.requires_grad_(), x0, x0c, SIGMA, NEXT, A, B, noise.independent(2))
    torch.library.opcheck(torch.ops.recon3d.renoise, case)
    case = arguments(u.detach(), x0, x0c, SIGMA, NEXT, A, B, noise.independent(2))
    torch.library.opcheck(torch.ops.recon3d.renoise_, case)


@pytest.mark.parametrize("kind", KINDS)
def test_batch_and_slab_independent(kind):
    u, x0, x0c = make(kind, (5, 31, 29))
    key = noise.iscs_mm(5, 1.0, 2.0, seed=6)

    def op(index):
        k0, k1 = int(index[0]), int(index[-1]) + 1
        third = x0c[k0:k1] if kind == "given" else DataTerm(kind, x0c.y[k0:k1], 0.0, x0c.mask, x0c.factor)
        return renoise(u[k0:k1], x0[k0:k1], third, SIGMA, NEXT, A, B, key.slab(k0, k1))

    check_batch_independent(op, torch.arange(5))


@pytest.mark.parametrize("kind", KINDS)
def test_threads(kind):
    u, x0, x0c = make(kind, (6, 120, 120))
    check_threads(lambda: renoise(u, x0, x0c, SIGMA, NEXT, A, B, noise.iscs(6)))


def test_non_contiguous():
    u, x0, x0c = make("given", (3, 20, 14))
    key = noise.independent(3)
    want = renoise(u, x0, x0c, SIGMA, NEXT, A, B, key)
    strided = [t.permute(2, 0, 1).contiguous().permute(1, 2, 0) for t in (u, x0, x0c)]
    assert not strided[0].is_contiguous()
    assert torch.equal(renoise(*strided, SIGMA, NEXT, A, B, key), want)
    with pytest.raises(ValueError, match="inplace needs a contiguous u"):
        renoise(*strided, SIGMA, NEXT, A, B, key, inplace=True)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 2, 7), (2, 61, 53), (17, 45, 47)], ids=str)
def test_writes_its_slices_only(kind, shape):
    # in place, so that the compiled kernel's output is ours to guard
    u, x0, x0c = make(kind, shape)
    view, check = guarded(*u.shape)
    view.copy_(u)
    key = noise.iscs(shape[0])
    got = renoise(view, x0, x0c, SIGMA, NEXT, A, B, key, inplace=True)
    check()
    assert torch.equal(got, renoise(u, x0, x0c, SIGMA, NEXT, A, B, key))


@pytest.mark.parametrize("which", range(3))
def test_nan_stays_in_its_pixel(which):
    tensors = list(make("given", (2, 9, 9)))
    tensors[which][1, 4, 5] = math.nan
    got = renoise(*tensors, SIGMA, NEXT, A, B, noise.independent(2))
    assert got[1, 4, 5].isnan() and got.isnan().sum() == 1


def test_unmeasured_data_is_ignored():
    u, x0, term = make("mask", (2, 9, 9))
    term.y[:, ~term.mask] = math.nan
    assert renoise(u, x0, term, SIGMA, NEXT, A, B, noise.independent(2)).isfinite().all()


def test_bad_input():
    u, x0, x0c = make("given", (2, 4, 6))
    key = noise.independent(2)
    args = (SIGMA, NEXT, A, B, key)
    with pytest.raises(ValueError, match=r"renoise: x0 must have shape \(2, 4, 6\)"):
        renoise(u, x0[:1], x0c, *args)
    with pytest.raises(TypeError, match=r"renoise: x0c must be torch.float32"):
        renoise(u, x0, x0c.double(), *args)
    with pytest.raises(TypeError, match="renoise: u must be float32 or float64"):
        renoise(u.half(), x0, x0c, *args)
    with pytest.raises(ValueError, match="renoise: u must be"):
        renoise(u[0], x0[0], x0c[0], *args)
    with pytest.raises(ValueError, match="renoise: sigma must be finite and positive"):
        renoise(u, x0, x0c, 0.0, NEXT, A, B, key)
    with pytest.raises(ValueError, match="renoise: sigma_next must be"):
        renoise(u, x0, x0c, SIGMA, -1.0, A, B, key)
    with pytest.raises(ValueError, match="renoise: a and b must be finite"):
        renoise(u, x0, x0c, SIGMA, NEXT, math.nan, B, key)
    with pytest.raises(ValueError, match="renoise: noise is missing"):
        renoise(u, x0, x0c, SIGMA, NEXT, A, B)
    with pytest.raises(ValueError, match="renoise: noise is for 3 slices"):
        renoise(u, x0, x0c, SIGMA, NEXT, A, B, noise.independent(3))
    with pytest.raises(ValueError, match="renoise: eps_from must be"):
        renoise(u, x0, x0c, *args, eps_from="u")
    with pytest.raises(ValueError, match="renoise: inplace gives no gradient"):
        renoise(u.clone().requires_grad_(), x0, x0c, *args, inplace=True)
    with pytest.raises(ValueError, match="renoise: inplace needs u to share no memory"):
        renoise(u, u, x0c, *args, inplace=True)
    with pytest.raises(ValueError, match="blocks of 4 pixels do not tile"):
        renoise(u, x0, DataTerm("block_mean", u, factor=4), *args)
    with pytest.raises(ValueError, match=r"a\^2 \+ b\^2 = 1"):
        renoise(u, x0, DataTerm("identity", u, sigma_y=0.1), SIGMA, NEXT, 1.0, 1.0, key)
    with pytest.raises(ValueError, match=r"renoise: DataTerm.mask must be"):
        renoise(u, x0, DataTerm("mask", u, mask=torch.zeros(3, 3, dtype=torch.bool)), *args)
    with pytest.raises(ValueError, match="DataTerm: kind must be"):
        DataTerm("blur", u)
    with pytest.raises(ValueError, match="DataTerm: sigma_y must be"):
        DataTerm("identity", u, sigma_y=-1.0)
    with pytest.raises(ValueError, match="needs mask"):
        DataTerm("mask", u)
    with pytest.raises(TypeError, match="mask must be bool"):
        DataTerm("mask", u, mask=u)
    with pytest.raises(ValueError, match="does not go with factor"):
        DataTerm("identity", u, factor=2)


def test_no_noise_needs_no_key():
    u, x0, x0c = make("given", (2, 4, 6))
    assert (renoise(u, x0, x0c, SIGMA, NEXT, 1.0, 0.0) - (x0c + NEXT / SIGMA * (u - x0))).abs().max() < 1e-6


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def triton_step(*case, whole_mask=False, **options):
    """The Triton kernel into a guarded output, interpreted where there is no GPU."""
    from recon3d.kernels import renoise as kernels

    inputs = [t.to(DEVICE) if isinstance(t, torch.Tensor) else t for t in arguments(*case, whole_mask=whole_mask)]
    out, check = guarded(*inputs[0].shape, dtype=inputs[0].dtype, device=DEVICE)
    kernels.renoise(*inputs, out=out, **options)
    check()
    return out.cpu()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 2, 7), (2, 61, 53), (2, 3, 8, 6)], ids=str)
def test_triton_formula(kind, dtype, shape):
    pytest.importorskip("triton")
    key = noise.iscs_mm(shape[0], 1.0, 3.0, seed=3, level=2)
    for sigma_y, eps_from, a, b in ((0.0, "x0", A, B), (0.3, "x0c", A, B), (3.0, "x0", A, B), (0.0, "x0c", 0.0, 1.0)):
        u, x0, x0c = make(kind, shape, dtype, sigma_y)
        case = (u, x0, x0c, SIGMA, NEXT, a, b, key, eps_from)
        got = triton_step(*case, block=1024)
        check_close_to_float64(got, reference(*case), plain(*case), "triton")


@pytest.mark.parametrize("factor", [2, 3, 5])
def test_triton_factors(factor):
    pytest.importorskip("triton")
    u, x0, term = make("block_mean", (2, 7, 9), sigma_y=0.05, factor=factor)
    case = (u, x0, term, SIGMA, NEXT, A, B, noise.independent(2, seed=8))
    check_close_to_float64(triton_step(*case, block=512), reference(*case), plain(*case), "triton")


def test_triton_mask_per_slice_and_last_level():
    pytest.importorskip("triton")
    u, x0, term = make("mask", (3, 11, 13))
    case = (u, x0, term, SIGMA, NEXT, A, B, noise.independent(3))
    assert torch.equal(triton_step(*case, whole_mask=True), triton_step(*case))
    u, x0, x0c = make("given", (2, 9, 9))
    assert torch.equal(triton_step(u, x0, x0c, SIGMA, 0.0, A, B, noise.independent(2)), x0c)


def test_triton_index_past_int32():
    # three slices of 2^30 pixels, of which one tile each is run: the third starts at element 2^31
    pytest.importorskip("triton")
    from recon3d.kernels import philox as kernels

    if DEVICE == "cuda":
        pytest.skip("interpreted only: the output is never touched but for a few pages")
    key = noise.independent(3, seed=5)
    z = torch.empty(2**31 + 64)
    kernels.philox_normal_kernel[(3,)](key.anchors, key.coefficients, z, 2**30, 1, 0, 0, 5, BLOCK=16)
    small = kernels.philox_normal(key.anchors, key.coefficients, 64, 5, 0, 0, False, block=16)
    assert torch.equal(z[2**31 :], small[2])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("kind", KINDS)
def test_cuda_op_and_graph(kind):
    u, x0, x0c = make(kind, (3, 61, 64), sigma_y=0.3 if kind != "given" else 0.0)
    key = noise.iscs_mm(3, 1.0, 3.0, seed=3)
    want = renoise(u, x0, x0c, SIGMA, NEXT, A, B, key)
    if kind == "given":
        third = x0c.cuda()
    else:
        mask = None if x0c.mask is None else x0c.mask.cuda()
        third = DataTerm(kind, x0c.y.cuda(), x0c.sigma_y, mask, x0c.factor)
    u, x0 = u.cuda(), x0.cuda()
    assert (renoise(u, x0, third, SIGMA, NEXT, A, B, key).cpu() - want).abs().max() < 1e-5
    kept = u.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        renoise(u, x0, third, SIGMA, NEXT, A, B, key, inplace=True)
    u.copy_(kept)
    graph.replay()
    assert (u.cpu() - want).abs().max() < 1e-5
    assert torch.equal(key.draw((5, 7), device="cuda").cpu().sign(), key.draw((5, 7)).sign())

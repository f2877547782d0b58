"""recon3d.ops.em: ratio and update by hand, against float64 and a scalar solver, limits of the weights, odd values."""

import math

import pytest
import torch
from laws import check_close_to_float64, check_threads, guarded

from recon3d.ops import _library, em_update, poisson_ratio
from recon3d.ops.em import _ratio, _update

SHAPES = [(1, 1, 1), (1, 5, 7), (3, 1, 4), (4, 6, 1), (5, 13, 33), (0, 3, 3), (2, 0, 3)]
DTYPES = [torch.float32, torch.float64]
WEIGHTS = {"none": (0.0, 0.0, 0.0), "z": (0.5, 0.0, 0.0), "3d": (0.5, 0.8, 1.0)}


def positive(*shape, seed=0, dtype=torch.float64, decades=1.0, zeros=0.1):
    g = torch.Generator().manual_seed(seed)
    x = 10 ** (decades * torch.randn(shape, generator=g, dtype=torch.float64))
    return x.where(torch.rand(shape, generator=g, dtype=torch.float64) > zeros, 0.0).to(dtype)


def volumes(shape, dtype=torch.float64):
    """x, back, sensitivity and anchor, with zeros in all of them and a negative part in x and in the anchor."""
    x, back, s, a = (positive(*shape, seed=k, dtype=dtype) for k in range(4))
    if x.numel() > 20:
        x.view(-1)[3], a.view(-1)[5] = -1.0, -2.0
    return x, back, s, a


# ---- the measurement ---------------------------------------------------------------------------------------------


def test_ratio_by_hand():
    y, p = torch.tensor([6.0, 0.0, 4.0, 0.0, 3.0]), torch.tensor([2.0, 5.0, 0.0, 0.0, 1.0])
    f, b = torch.tensor([2.0, 1.0, 3.0, 1.0, 0.0]), torch.tensor([2.0, 0.0, 0.0, 0.0, 5.0])
    assert poisson_ratio(y, p, f, b).tolist() == [2.0, 0.0, 0.0, 0.0, 0.0]
    assert poisson_ratio(y, p).tolist() == [3.0, 0.0, 0.0, 0.0, 3.0]
    assert poisson_ratio(y, p, f, b, scale=2.0)[0].item() == pytest.approx(4 * 6 / (4 * 2 + 2))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("short", ["", "f", "b", "fb"])
@pytest.mark.parametrize("given", ["", "f", "b", "fb"])
def test_ratio_close_to_float64(dtype, short, given):
    shape = (5, 7, 4, 9)
    y, p = (positive(*shape, seed=k, dtype=dtype) for k in (0, 1))
    f, b = (
        positive(5, 7, 1 if name in short else 4, 9, seed=k, dtype=dtype) if name in given else None
        for name, k in (("f", 2), ("b", 3))
    )

    def full(t, to):
        return None if t is None else t.expand(shape).to(to)

    settings = (0.3, 1, y.numel(), False, False)
    own = _ratio(y, p, full(f, dtype), full(b, dtype), *settings)
    truth = _ratio(y.double(), p.double(), full(f, torch.float64), full(b, torch.float64), *settings)
    got = poisson_ratio(y, p, f, b, 0.3)
    check_close_to_float64(got, own, truth)
    assert got.isfinite().all()


def test_ratio_broadcasts_like_torch():
    y, p = positive(3, 4, 5, 6, seed=0), positive(3, 4, 5, 6, seed=1)
    shapes = [((4, 5, 6), (1,)), ((3, 1, 1, 6), (3, 4, 1, 6)), ((3, 1, 5, 1), (6,)), ((3, 4, 1, 1), (1, 4, 5, 6))]
    for k, (sf, sb) in enumerate([*shapes, ((), (1, 1))]):
        f, b = positive(*sf, seed=2 + k, zeros=0), positive(*sb, seed=20 + k, zeros=0)
        torch.testing.assert_close(poisson_ratio(y, p, f, b), f * y / (f * p + b))
    torch.testing.assert_close(poisson_ratio(y[:, 1], p[:, 1], f, b), f * y[:, 1] / (f * p[:, 1] + b))


@pytest.mark.parametrize("rest", [(), (3,), (5, 20), (4, 3, 30)], ids=str)
@pytest.mark.parametrize("step", [2, 5])
def test_ratio_of_some_rows(rest, step):
    """A subset of views is a view of the measurement; the result is the same as of its copy."""
    y, f, b = (positive(23, *rest, seed=k).float() for k in (0, 2, 3))
    if len(rest) == 3:
        f = f[:, :, :1]
    y, f, b = y[1::step], f[1::step], b[1::step]
    p = positive(*y.shape, seed=1).float()
    want = poisson_ratio(y.contiguous(), p, f.contiguous(), b.contiguous())
    assert torch.equal(poisson_ratio(y, p, f, b), want)
    assert torch.equal(poisson_ratio(y, p, f.contiguous(), b), want)
    assert torch.equal(poisson_ratio(y, p, f.contiguous()), poisson_ratio(y.contiguous(), p, f))
    check_threads(lambda: poisson_ratio(y, p, f, b))


def test_ratio_gradient():
    y, p, f, b = (positive(4, 5, seed=k, zeros=0, decades=0.3).requires_grad_(k < 2) for k in range(4))
    assert torch.autograd.gradcheck(lambda y, p: poisson_ratio(y, p, f, b, 0.7), (y, p))
    zero = torch.zeros(4, 5, dtype=torch.float64, requires_grad=True)
    (g,) = torch.autograd.grad(poisson_ratio(y.detach(), zero).sum(), zero)
    assert not g.any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ratio_is_finite(dtype):
    odd = torch.tensor([0.0, 1e-38, 1e-25, 1e-3, 1.0, 1e9], dtype=dtype)
    y, p, b = (t.reshape(-1).contiguous() for t in torch.meshgrid(odd, odd, odd, indexing="ij"))
    out = poisson_ratio(y, p, None, b)
    assert out.isfinite().all() and (out >= 0).all()
    assert not out[p + b == 0].any()
    assert poisson_ratio(y, p - 1, None, None)[p < 1].abs().max() == 0
    assert poisson_ratio(y[:1], torch.full((1,), math.nan, dtype=dtype)).isnan().all()  # bad input is not hidden


def test_ratio_threads_and_memory():
    y, p, b = (positive(40000, seed=k).float() for k in (0, 1, 3))
    f = positive(40, 1, 100, seed=2).float()
    check_threads(lambda: poisson_ratio(y.reshape(40, 10, 100), p.reshape(40, 10, 100), f, b.reshape(40, 10, 100)))


# ---- the volume --------------------------------------------------------------------------------------------------


def test_em_by_hand():
    x, back, s = (
        torch.tensor([[[2.0, 3.0, 0.0, 4.0]]]),
        torch.tensor([[[3.0, 0.0, 5.0, 1.0]]]),
        torch.full((1, 1, 4), 4.0),
    )
    s[..., 3] = 0
    assert em_update(x, back, s).flatten().tolist() == [1.5, 0.0, 0.0, 4.0]
    assert em_update(x, back, s, form="gradient", floor=0.0).flatten().tolist() == [1.5, 0.0, 0.0, 4.0]
    # the floor lets a voxel leave zero: 0 + 0.5 / 4 (5 - 4)
    assert em_update(x, back, s, form="gradient", floor=0.5).flatten()[2].item() == 0.125
    a = torch.tensor([[[4.0, -1.0, 1.0, 9.0]]])
    # (4 - 1 * 4) v + v^2 - 6 = 0;  s + 1 > 0 so 0;  v = (1 - 4)+ = 0
    want = [math.sqrt(6), 0.0, 0.0, 4.0]
    assert em_update(x, back, s, anchor=a, anchor_weight=2.0, scale=0.5).flatten().tolist() == pytest.approx(want)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("surrogate", [True, False], ids=["surrogate", "gradient"])
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("anchored", [False, True])
def test_update_close_to_float64(dtype, surrogate, weights, anchored):
    for shape in SHAPES:
        x, back, s, a = volumes(shape, dtype)
        settings = (0.7, 0.3 * (weights != "none"), 2.0, 1e-2, *WEIGHTS[weights], surrogate, 1e-3)
        anchor = a if anchored else None
        own = _update(x, back, s, anchor, *settings)
        truth = _update(*(t.double() for t in (x, back, s)), None if anchor is None else a.double(), *settings)
        _library.ensure()
        got = torch.ops.recon3d.em_update(x, back, s, anchor, *settings)
        check_close_to_float64(got, own, truth, str(shape))
        assert torch.equal(got[s <= 0], x[s <= 0]) and (got[s > 0] >= 0).all() and got.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("surrogate", [True, False], ids=["surrogate", "gradient"])
@pytest.mark.parametrize("weights", WEIGHTS)
def test_triton_interpreted(dtype, surrogate, weights):
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("a GPU is here: the kernels run compiled")
    from recon3d.kernels import em as kernels

    for shape in [(1, 1, 1), (3, 1, 4), (4, 6, 1), (3, 5, 19)]:
        x, back, s, a = volumes(shape, dtype)
        for anchor in (None, a):
            numbers = (0.7, 0.3 * (weights != "none"), 2.0, 1e-2)
            out, check = guarded(*shape, dtype=dtype)
            kernels.update(x, back, s, anchor, out, *numbers, WEIGHTS[weights], surrogate, 1e-3, block=64)
            check()
            settings = (*numbers, *WEIGHTS[weights], surrogate, 1e-3)
            wide = [None if t is None else t.double() for t in (x, back, s, anchor)]
            check_close_to_float64(out, _update(x, back, s, anchor, *settings), _update(*wide, *settings), str(shape))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("short", ["", "f", "b", "fb"])
@pytest.mark.parametrize("given", ["", "f", "b", "fb"])
def test_triton_ratio_interpreted(dtype, short, given):
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("a GPU is here: the kernels run compiled")
    from recon3d.kernels import em as kernels

    y, p = (positive(5, 7, 9, seed=k, dtype=dtype) for k in (0, 1))
    f, b = (
        positive(5, 1 if name in short else 7, 9, seed=k, dtype=dtype) if name in given else None
        for name, k in (("f", 2), ("b", 3))
    )
    settings = (0.3, 7, 9, "f" in short and f is not None, "b" in short and b is not None)
    out, check = guarded(5, 7, 9, dtype=dtype)
    kernels.ratio(y, p, f, b, out, *settings, block=64)
    check()
    wide = [None if t is None else t.double() for t in (y, p, f, b)]
    check_close_to_float64(out, _ratio(y, p, f, b, *settings), _ratio(*wide, *settings))


def test_surrogate_solves_the_separable_problem():
    """The update is the minimum of s v - x back log v + w/2 (v - a)^2 over v >= 0, as bisection finds it."""
    x, back, s, a = volumes((3, 7, 9))
    s = s + 1e-3
    for w in (0.0, 1e-4, 1.0, 1e4):
        got = em_update(x, back, s, anchor=a, anchor_weight=w)
        c = x.clamp(min=0) * back
        low, high = torch.zeros_like(x), (a.abs() + c / s + 1).clamp(min=1.0) * 4
        for _ in range(200):
            v = (low + high) / 2
            up = s - c / v + w * (v - a) > 0
            low, high = torch.where(up, low, v), torch.where(up, v, high)
        torch.testing.assert_close(got, (low + high) / 2, rtol=1e-9, atol=1e-12)


def test_surrogate_with_the_prior_lowers_every_voxels_problem():
    from recon3d.ops.rdp import slope_and_curvature

    x, back, s, a = volumes((3, 7, 9))
    x, s = x.clamp(min=0), s + 1e-3
    got = em_update(x, back, s, anchor=a, anchor_weight=0.2, rdp=3.0, epsilon=1e-2, axes="zyx")
    g, k = (3.0 * t for t in slope_and_curvature(x, 2.0, 1e-2, (1.0, 1.0, 1.0)))

    def problem(v):
        return s * v - torch.xlogy(x * back, v) + 0.1 * (v - a) ** 2 + g * (v - x) + k / 2 * (v - x) ** 2

    best = problem(got)
    for factor in (0.5, 0.99, 1.01, 2.0):
        assert (best <= problem(factor * got) + 1e-12 * best.abs()).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_limits_of_the_anchors_weight(dtype):
    x, back, s, a = volumes((3, 5, 6), dtype)
    seen = s > 0
    plain = em_update(x, back, s)
    torch.testing.assert_close(em_update(x, back, s, anchor=a, anchor_weight=1e-30), plain)
    torch.testing.assert_close(plain[seen], (x.clamp(min=0) * back / s)[seen])
    for w in (1e12, 1e18, 1e25):
        far = em_update(x, back, s, anchor=a, anchor_weight=w)
        torch.testing.assert_close(far[seen], a.clamp(min=0)[seen], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("form", ["surrogate", "gradient"])
@pytest.mark.parametrize("unit", [1e-3, 1.0, 1e9])
def test_units_do_not_matter(form, unit):
    """Bq/mL or GBq/mL: float32 gives the same image in another unit."""
    x, back, s, a = (t.float() for t in volumes((3, 7, 9)))
    kwargs = {"gamma": 2.0, "axes": "zyx", "form": form}
    want = em_update(x, back, s, anchor=a, anchor_weight=0.5, rdp=0.2, epsilon=1e-2, floor=1e-3, **kwargs)
    got = em_update(
        x * unit, back / unit, s / unit, anchor=a * unit, anchor_weight=0.5 / unit**2, rdp=0.2 / unit,
        epsilon=1e-2 * unit, floor=1e-3 * unit, **kwargs,
    )  # fmt: skip
    assert got.isfinite().all()
    seen = s > 0
    torch.testing.assert_close(got[seen] / unit, want[seen], rtol=2e-4, atol=1e-5)


def test_zeros_everywhere():
    zero = torch.zeros(3, 4, 5)
    for form in ("surrogate", "gradient"):
        for s in (zero, zero + 1):
            out = em_update(zero, zero, s, anchor=zero, anchor_weight=1.0, rdp=1.0, axes="zyx", form=form)
            assert not out.any()


def test_update_threads_memory_and_spacing():
    x, back, s, a = (t.float() for t in volumes((7, 31, 30)))
    check_threads(lambda: em_update(x, back, s, anchor=a, anchor_weight=0.1, rdp=0.2, axes="zyx"))
    kept = [t.clone() for t in (x, back, s, a)]
    out = em_update(x, back, s, anchor=a, anchor_weight=0.1, rdp=0.2, spacing_mm=(4.0, 2.0, 2.0))
    assert all(torch.equal(p, q) for p, q in zip(kept, (x, back, s, a), strict=True))
    settings = (0.1, 0.2, 2.0, 1e-6, 0.5, 0.0, 0.0, True, 1e-4)
    assert torch.equal(out, torch.ops.recon3d.em_update(x, back, s, a, *settings))


def test_opcheck():
    _library.ensure()
    x, back, s, a = (t.float() for t in volumes((3, 4, 5)))
    settings = (0.1, 0.2, 2.0, 1e-6, 0.5, 0.4, 1.0, True, 1e-4)
    torch.library.opcheck(torch.ops.recon3d.em_update.default, (x, back, s, a, *settings))
    torch.library.opcheck(torch.ops.recon3d.em_update.default, (x, back, s, None, *settings))
    y, p, f = (positive(3, 4, seed=k, zeros=0).requires_grad_(k < 2) for k in range(3))
    torch.library.opcheck(torch.ops.recon3d.poisson_ratio.default, (y, p, f, None, 1.0, 1, 4, False, False))


def test_bad_input():
    x = torch.ones(2, 3, 4)
    with pytest.raises(ValueError, match=r"em_update: back needs shape \(2, 3, 4\), got \(3, 4\)"):
        em_update(x, x[0], x)
    with pytest.raises(TypeError, match=r"sensitivity needs torch.float32 on cpu, got torch.float64"):
        em_update(x, x, x.double())
    with pytest.raises(ValueError, match="anchor_weight must be finite and at least 0, got -1"):
        em_update(x, x, x, anchor=x, anchor_weight=-1.0)
    with pytest.raises(ValueError, match="there is no anchor"):
        em_update(x, x, x, anchor_weight=1.0)
    with pytest.raises(ValueError, match=r"needs gamma of at least 1, got 0.5; use form='gradient'"):
        em_update(x, x, x, rdp=1.0, gamma=0.5)
    em_update(x, x, x, rdp=1.0, gamma=0.5, form="gradient")
    with pytest.raises(ValueError, match="form must be 'surrogate' or 'gradient', got 'em'"):
        em_update(x, x, x, form="em")
    with pytest.raises(ValueError, match=r"em_update: a volume \[z, y, x\] is needed"):
        em_update(x[0], x[0], x[0])
    with pytest.raises(ValueError, match=r"factors \(2, 2\) cannot be broadcast over y \(3, 4\)"):
        poisson_ratio(x[0], x[0], torch.ones(2, 2))
    with pytest.raises(TypeError, match=r"additive needs torch.float32"):
        poisson_ratio(x, x, None, x.double())
    with pytest.raises(ValueError, match="scale must be finite and above 0, got 0"):
        poisson_ratio(x, x, scale=0.0)
    with pytest.raises(TypeError, match="float32 or float64"):
        poisson_ratio(x.long(), x.long())

"""Operators on images: exact adjoints, singular values against dense matrices, data terms in closed form."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from scipy.ndimage import convolve1d

from recon3d import noise
from recon3d.consistency import LowPass, Projection, ScaledProjection, ScaledRenoise
from recon3d.consistency.ilvr import low_pass
from recon3d.operators.image import BlockMean, Blur, Nothing, SameImage, box_weights, gaussian_weights
from recon3d.ops.renoise import DataTerm
from recon3d.ops.renoise import renoise as fused
from recon3d.renoise import DDIM, Renoise
from recon3d.testing import check_adjoint, check_slices_independent
from recon3d.trajectory import Level

SHAPE = (3, 8, 12)
OPERATORS = {
    "same": SameImage(SHAPE),
    "block": BlockMean(SHAPE, (1, 2, 4)),
    "thick": BlockMean((4, 8, 12), (2, 2, 2)),
    "gaussian": Blur(SHAPE, [(1.0,), gaussian_weights(1.6), gaussian_weights(2.0)]),
    "box": Blur(SHAPE, [(1.0,), box_weights(2.3), box_weights(3.0)]),
    "blur 3D": Blur((5, 6, 7), [gaussian_weights(1.2), gaussian_weights(1.6), box_weights(2.6)]),
}


@pytest.fixture(params=OPERATORS, name="op")
def _op(request):
    return OPERATORS[request.param]


def randn(shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def matrix(op):
    """Of the whole volume, [measurement, voxel] float64."""
    n = math.prod(op.domain.shape)
    unit = torch.eye(n, dtype=torch.float64).reshape(n, *op.domain.shape)
    return op(unit).reshape(n, -1).T


def test_adjoint_and_slices(op):
    check_adjoint(op)
    if op.coupling == "slice":
        check_slices_independent(op)
        assert torch.equal(op.slab(1, 3)(randn(SHAPE)[1:3]), op(randn(SHAPE))[1:3])
    else:
        with pytest.raises(NotImplementedError):
            op.slab(0, 1)


def test_the_pseudo_inverse_is_one(op):
    """All four conditions of Moore and Penrose; components below the floor count as lost, to the floor's precision."""
    a = matrix(op)
    p = op.pinv(torch.eye(a.shape[0], dtype=torch.float64).reshape(-1, *op.range.shape)).reshape(a.shape[0], -1).T
    limit = 1e-10 + 1.01 * getattr(op, "floor", 0.0)
    assert torch.linalg.matrix_norm(a @ p @ a - a, 2) <= limit * torch.linalg.matrix_norm(a, 2)
    assert torch.linalg.matrix_norm(p @ a @ p - p, 2) <= 1e-10 * torch.linalg.matrix_norm(p, 2)
    assert (a @ p - (a @ p).T).norm() < 1e-10 and (p @ a - (p @ a).T).norm() < 1e-10


def test_spectral_functions_are_those_of_the_svd(op):
    u, s, vt = torch.linalg.svd(matrix(op), full_matrices=True)
    s = torch.cat([s, s.new_zeros(vt.shape[0] - s.numel())])
    s[s < getattr(op, "floor", 1e-9) * s.max()] = 0
    x = randn(op.domain.shape)
    want = vt.T @ (torch.exp(-s) * (vt @ x.flatten()))
    got = op.spectral(x, lambda t: torch.exp(-t)).flatten()
    assert (got - want).norm() <= 1e-10 * want.norm()
    assert op.norm() == pytest.approx(float(s.max()) ** 2, rel=1e-9)
    assert op.norm(torch.tensor([4.0])) == pytest.approx(4 * float(s.max()) ** 2, rel=1e-9)
    assert u.shape[0] == math.prod(op.range.shape)


def test_a_blur_mirrors_at_its_faces():
    op, x = OPERATORS["blur 3D"], randn((5, 6, 7)).numpy()
    for axis, w in enumerate(op.weights):
        x = convolve1d(x, np.array([*w[:0:-1], *w]), axis=axis, mode="reflect")
    assert np.abs(op(randn((5, 6, 7))).numpy() - x).max() < 1e-12


def test_weights():
    for width in (1.0, 1.5, 2.0, 3.0, 7.7):
        w = box_weights(width)
        assert w[0] + 2 * sum(w[1:]) == pytest.approx(1) and min(w) > 0
        # a box of this width, sampled: its second moment up to that of a voxel
        assert 2 * sum(k * k * v for k, v in enumerate(w)) == pytest.approx((width**2) / 12, abs=0.2)
    assert gaussian_weights(0.0) == [1.0] and box_weights(0.3) == [1.0]


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: BlockMean((3, 8, 9), (1, 2, 2)), "do not tile a volume of 3 x 8 x 9"),
        (lambda: BlockMean((3, 8, 8), (1, 0, 2)), "at least 1"),
        (lambda: Blur(SHAPE, [(1.0,), (0.5, 0.2)]), "for z, y and x"),
        (lambda: Blur(SHAPE, [(1.0,), (0.5, 0.2), (1.0,)]), "add up to 1"),
        (lambda: Blur(SHAPE, [(1.0,), (math.nan,), (1.0,)]), "finite"),
        (lambda: BlockMean(SHAPE, (1, 2, 2))(torch.zeros(3, 8, 10)), r"must end in \(3, 8, 12\)"),
        (lambda: SameImage(SHAPE)(torch.zeros(8, 12)), "must end in"),
    ],
)
def test_what_does_not_fit_is_refused(make, sentence):
    with pytest.raises(ValueError, match=sentence):
        make()


def test_nothing_measured():
    op = Nothing(SHAPE)
    assert op(randn(SHAPE)).shape == (3, 0, 0) == tuple(op.range.shape)
    assert torch.equal(op.normal(randn(SHAPE)), torch.zeros(SHAPE, dtype=torch.float64)) and op.norm() == 0


LEVELS = [Level(3, 0.8, 0.5, False), Level(4, 0.3, 0.1, False), Level(5, 0.1, 0.02, False)]


def scaled(op, sigma_y, level, eta=0.6, seed=7):
    """One step of the package: u', and what it was made from."""
    u, x0, z_seed = randn(op.domain.shape, 1), randn(op.domain.shape, 2), seed
    y = op(randn(op.domain.shape, 3)) + sigma_y * randn(op.range.shape, 4)
    rule = DDIM(eta)
    part = ScaledProjection(sigma_y, rule)
    key = noise.independent(op.domain.shape[0], seed=z_seed).at(level.index, 0)
    x0c = part.step(x0, y, op, level, {})
    out = ScaledRenoise(rule, operator=op, sigma_y=sigma_y)(u.clone(), x0, x0c, level, key)
    return out, u, x0, y, key.draw(op.domain.shape[1:], torch.float64), rule


@pytest.mark.parametrize("level", LEVELS, ids=lambda v: f"{v.sigma_next}")
@pytest.mark.parametrize("sigma_y", [0.021, 0.23])
def test_a_noisy_step_is_the_published_one(op, sigma_y, level):
    """Component by component in the dense singular basis, in float64."""
    got, u, x0, y, z, rule = scaled(op, sigma_y, level)
    a, b = rule.weights(level.sigma, level.sigma_next)
    left, s, vt = torch.linalg.svd(matrix(op), full_matrices=True)
    n = vt.shape[0]
    floor = getattr(op, "floor", 1e-9) * float(s.max())
    xs, us, zs = (vt @ t.flatten() for t in (x0, u, z))
    ys = left.T @ y.flatten()
    want, following = torch.empty(n, dtype=torch.float64), level.sigma_next
    for i in range(n):
        eps = (us[i] - xs[i]) / level.sigma
        if i >= len(s) or s[i] < floor:
            want[i] = xs[i] + following * (a * eps + b * zs[i])
            continue
        inherited = sigma_y / float(s[i])
        lam = 1.0 if following >= inherited else a * following / inherited
        room = math.sqrt(max(following**2 - (lam * inherited) ** 2, 0.0))
        want[i] = xs[i] + lam * (ys[i] / s[i] - xs[i]) + room * zs[i]
    assert float((got.flatten() - vt.T @ want).norm() / want.norm()) <= 1e-9


@pytest.mark.parametrize("name", ["same", "block"])
@pytest.mark.parametrize("level", LEVELS, ids=lambda v: f"{v.sigma_next}")
def test_the_fused_kernel_agrees(name, level):
    op = SameImage(SHAPE) if name == "same" else BlockMean(SHAPE, (1, 2, 2))
    got, u, x0, y, _, rule = scaled(op, 0.2, level)
    kind = {"kind": "identity"} if name == "same" else {"kind": "block_mean", "factor": 2}
    key = noise.independent(SHAPE[0], seed=7).at(level.index, 0)
    term = DataTerm(y=y, sigma_y=0.2, **kind)
    want = fused(u, x0, term, level.sigma, level.sigma_next, *rule.weights(level.sigma, level.sigma_next), key)
    assert (got - want).norm() <= 1e-12 * want.norm()


def test_without_noise_it_is_the_projection(op):
    """sigma_y to 0: the same estimate, and a step that keeps measured components as they were measured."""
    level, y = LEVELS[0], op(randn(op.domain.shape, 3))
    x0 = randn(op.domain.shape, 2)
    sharp = ScaledProjection(1e-9, DDIM(0.5)).step(x0, y, op, level, {})
    plain = Projection().step(x0, y, op, level, {})
    # what a blur transfers less than its floor is left alone by both
    assert (sharp - plain).norm() <= 1e-9 * plain.norm()


def test_noise_adds_up():
    """On measured components the noise of y and the fresh noise together have the next level's variance."""
    op, sigma_y = BlockMean((400, 8, 8), (1, 2, 2)), 0.1
    for level in [*LEVELS, dataclasses.replace(LEVELS[0], dip=0.3)]:
        truth = torch.zeros(op.domain.shape, dtype=torch.float64)
        y = sigma_y * randn(op.range.shape, 5)
        rule = DDIM(1.0)  # no old noise: the components are exactly those of y and fresh ones
        part = ScaledProjection(sigma_y, rule)
        x0c = part.step(truth, y, op, level, {})
        key = noise.independent(400, seed=1).at(level.index, 0)
        out = ScaledRenoise(rule, operator=op, sigma_y=sigma_y)(truth.clone(), truth, x0c, level, key)
        a, _ = rule.weights(level.sigma, level.sigma_next)
        # with lam < 1 and old noise put aside, a share a^2 comes from y, the rest is fresh
        assert float(op(out).mul(2).std()) == pytest.approx(level.sigma_next, rel=0.03), a


def test_a_dataclass_keeps_the_common_settings():
    made = ScaledRenoise(DDIM(0.3), "corrected", 0.2, "slice", operator=SameImage(SHAPE), sigma_y=0.1)
    assert {f.name for f in dataclasses.fields(Renoise)} <= {f.name for f in dataclasses.fields(made)}


def test_low_pass_keeps_low_frequencies_and_is_linear():
    ramp = torch.linspace(0, 1, 64).expand(2, 8, 64).contiguous()
    # two kernels of four coarse pixels each reach 16 pixels far
    assert (low_pass(ramp, 4) - ramp)[:, :, 20:-20].abs().max() < 5e-3  # cubic weights sum to one, ramps bend a little
    checker = torch.ones(2, 32, 32)
    checker[:, ::2, 1::2] = checker[:, 1::2, ::2] = -1
    assert low_pass(checker, 4)[:, 4:-4, 4:-4].abs().max() < 0.02
    x, y = torch.randn(2, 30, 34), torch.randn(2, 30, 34)
    assert (low_pass(2 * x - y, 8) - 2 * low_pass(x, 8) + low_pass(y, 8)).abs().max() < 1e-5


def test_the_refinement_swaps_low_frequencies():
    op, level = SameImage((2, 32, 32)), dataclasses.replace(LEVELS[0], sigma_next=0.0, last=True)
    y, u = torch.randn(2, 32, 32), torch.randn(2, 32, 32)
    out = LowPass(noise.independent(2, seed=0), 4).step(u, y, op, level, {})
    assert torch.allclose(out - u, low_pass(y - u, 4), atol=1e-6)
    noisy = LowPass(noise.independent(2, seed=0), 4).step(u, y, op, LEVELS[0], {})
    # the reference was brought to the state's level
    assert float((noisy - out).std()) == pytest.approx(0.5 * float(low_pass(torch.randn(2, 32, 32), 4).std()), rel=0.3)

"""Density compensation: gridding exact k-space of ellipses gives their values back; areas add up; what is refused."""

import math

import numpy as np
import pytest
import torch

from recon3d.geometry import Trajectory
from recon3d.geometry.mri import cartesian, kooshball, radial, random, spiral, stack
from recon3d.ops.density import density_compensation, pipe_menon, ramp
from recon3d.ops.nufft import nufft_adjoint, nufft_plan
from recon3d.testing.phantoms import Ellipse, kspace, rasterise

HEAD = [Ellipse(1.0, 14, 17, 2, -1, 0.3), Ellipse(-0.5, 5, 3, -4, 5, 1.0)]
INSIDE = [Ellipse(1.0, 11, 13, 2, -1, 0.3)]
SHAPES = [(48, 48), (49, 49), (40, 56)]


def gridded(weight, trajectory):
    """Mean and relative rms error of gridding inside HEAD, and the relative rms error of a full Cartesian scan."""
    shape = trajectory.shape
    middle = (shape[0] // 2, shape[1] // 2)
    truth = rasterise(HEAD, shape, (1.0, 1.0), middle=middle)
    inside = rasterise(INSIDE, shape, (1.0, 1.0), middle=middle) > 0.5
    size = np.linalg.norm(truth[inside])

    def errors(weights, samples):
        y = torch.from_numpy(weights * kspace(HEAD, samples, (1.0, 1.0)))
        wrong = (nufft_adjoint(y, nufft_plan(samples.points, shape, eps=1e-6)).numpy() - truth)[inside]
        return wrong.real.mean(), np.linalg.norm(wrong) / size

    return *errors(weight.double().numpy(), trajectory), errors(np.ones(math.prod(shape)), cartesian(shape))[1]


def spokes(radius, angle, shape=(48, 48)):
    direction = np.stack([np.sin(angle), np.cos(angle)], -1)
    return Trajectory(np.asarray(radius)[:, None] * direction[:, None], shape)


STEPS = np.arange(96) * (2 * math.pi / 96)
RADIAL = {
    "golden": lambda: radial(120, 96, (48, 48)),
    "golden-odd": lambda: radial(120, 96, (49, 49)),
    "golden-oblong": lambda: radial(120, 96, (40, 56)),
    "uniform": lambda: radial(100, 97, (48, 48), golden=False),
    "half-a-step-off": lambda: spokes(STEPS - 47.5 * STEPS[1], np.arange(120) * 1.9416110387254666),
    "a-fifth-off": lambda: spokes(STEPS - 47.8 * STEPS[1], np.arange(120) * 1.9416110387254666),
    "half-spokes": lambda: spokes(STEPS[:48], np.arange(240) * 2.399963229728653),
    "float32": lambda: Trajectory(radial(120, 96, (48, 48)).points.float(), (48, 48)),
    "repeated": lambda: Trajectory(torch.cat([radial(120, 96, (48, 48)).points] * 2)[: 150 * 96], (48, 48)),
}


@pytest.mark.parametrize("name", RADIAL)
def test_ramp_is_quantitative(name):
    """As good as a full Cartesian scan, and no offset: without the term at the centre it would be 2 %."""
    trajectory = RADIAL[name]()
    weight = ramp(trajectory)
    assert weight.shape == (trajectory.n_samples,) and weight.dtype == torch.float32 and weight.min() > 0
    offset, error, cartesian_error = gridded(weight, trajectory)
    assert abs(offset) < 2.5e-3
    assert error < 1.5 * cartesian_error


def test_ramp_area_adds_up():
    """The disc, or ball, out to half a step beyond the last samples."""
    even = spokes(STEPS - 47.5 * STEPS[1], np.arange(90) * (math.pi / 90))
    assert ramp(even).sum().item() == pytest.approx(48**2 * math.pi / 4, rel=1e-3)
    # 3D: r^2 dr summed over shells
    ball = kooshball(900, 32, (16, 16, 16))
    shells = [2 if k < 16 else 1 for k in range(1, 17)]  # +-k, and the rim on one side
    assert len(shells) == 16
    want = sum(4 * math.pi * (k / 2) ** 2 * 0.5 for k in range(1, 17))
    assert ramp(ball).sum().item() == pytest.approx(want, rel=1e-5)
    assert ramp(ball).reshape(900, 32)[:, 16].abs().max() == 0


def test_ramp_of_samples_at_the_centre():
    assert ramp(Trajectory(torch.zeros(4, 2), (8, 8))).tolist() == [0.25] * 4


@pytest.mark.parametrize(
    "make",
    [
        lambda: random(500, (48, 48)),
        lambda: spiral(4, 300, (48, 48)),
        lambda: cartesian((48, 48)),
        lambda: stack(radial(30, 48, (48, 48)), 8),
        lambda: random(500, (16, 16, 16)),
        lambda: random(500, (16,)),
    ],
)
def test_ramp_refuses_what_is_not_radial(make):
    with pytest.raises(ValueError, match="ramp: "):
        ramp(make())


ANY = {
    "radial": lambda: radial(120, 96, (48, 48)),
    "spiral": lambda: spiral(16, 400, (48, 48)),
    "spiral-odd": lambda: spiral(20, 300, (47, 49), turns=2),
    "random": lambda: random(15000, (48, 48)),
}


@pytest.mark.parametrize("name", ANY)
def test_pipe_menon_is_quantitative(name):
    trajectory = ANY[name]()
    weight = pipe_menon(trajectory)
    assert weight.shape == (trajectory.n_samples,) and weight.dtype == torch.float32 and weight.min() > 0
    offset, error, cartesian_error = gridded(weight, trajectory)
    assert abs(offset) < 3e-3
    assert error < 1.4 * cartesian_error


@pytest.mark.parametrize("shape", [(12, 15), (16,), (6, 5, 7)])
def test_pipe_menon_of_a_full_grid_is_one(shape):
    assert (pipe_menon(cartesian(shape)) - 1).abs().max() < 0.01 * len(shape)


def test_pipe_menon_is_the_area():
    """Away from the rim it adds up to the areas of the ramp, which know nothing of kernels."""
    trajectory = radial(150, 64, (32, 32))
    weight, area = pipe_menon(trajectory), ramp(trajectory)
    index = trajectory.as_unit("index").norm(dim=1)
    middle = (index > 2) & (index < 9)  # the kernel feels the rim from two Nyquist cells
    assert weight[middle].sum().item() == pytest.approx(area[middle].sum().item(), rel=0.01)


def test_pipe_menon_of_a_plan():
    trajectory = radial(20, 32, (16, 16))
    plan = nufft_plan(trajectory.points, trajectory.shape)
    assert torch.allclose(pipe_menon(plan), pipe_menon(trajectory), rtol=2e-3)  # a tie at the rim
    assert torch.equal(density_compensation(plan, iterations=3), pipe_menon(plan, 3))
    assert torch.equal(density_compensation(trajectory), pipe_menon(trajectory))
    assert torch.allclose(density_compensation(plan, "ramp"), ramp(trajectory), rtol=1e-4)
    assert torch.equal(density_compensation(trajectory, "ramp"), ramp(trajectory))


def test_bad_calls():
    trajectory = cartesian((4, 4))
    for call, message in (
        (lambda: pipe_menon(trajectory, 0), "iteration"),
        (lambda: density_compensation(trajectory, "voronoi"), "method"),
    ):
        with pytest.raises(ValueError, match=message):
            call()

"""ramp_filter and fbp: quantitative in 1/mm on analytic ellipses, for any angles, offsets and pixels."""

import math

import pytest
import torch
from laws import check_batch_independent, check_close_to_float64, check_linear, check_threads

from recon3d.geometry import FanBeam, ParallelBeam, equiangular
from recon3d.ops import fbp, ramp_filter
from recon3d.ops.fbp import _reference
from recon3d.ops.ramp_filter import _angular_widths, _redundancy

WATER = 0.0193  # 1/mm
PIXELS, PIXEL_MM = 192, 1.0
SOD, SDD = 400.0, 700.0


def ellipse_integrals(geometry, a_mm, b_mm, centre=(0.0, 0.0), value=WATER):
    """Exact line integrals through an ellipse with axes along x and y, [view, u] float64."""
    angle = torch.tensor(geometry.angles_rad, dtype=torch.float64)[:, None]
    u = torch.from_numpy(geometry.detector_mm())[None]
    if isinstance(geometry, FanBeam):
        gamma = torch.atan(u / geometry.source_to_detector_mm)
        theta, s = angle + gamma, geometry.source_to_axis_mm * gamma.sin()
    else:
        theta, s = angle, u
    s = s - centre[0] * theta.cos() - centre[1] * theta.sin()
    r2 = (a_mm * theta.cos()) ** 2 + (b_mm * theta.sin()) ** 2
    return value * 2 * a_mm * b_mm * (r2 - s**2).clamp(min=0).sqrt() / r2


def grid(shape=(PIXELS, PIXELS), pixel_mm=(PIXEL_MM, PIXEL_MM)):
    rows = (torch.arange(shape[0]) - (shape[0] - 1) / 2) * pixel_mm[0]
    columns = (torch.arange(shape[1]) - (shape[1] - 1) / 2) * pixel_mm[1]
    return rows[:, None], columns[None]


def hounsfield(image):
    return 1000 * (image / WATER - 1)


FULL = dict(n_detector=256, detector_spacing_mm=1.0)
FAN = dict(n_detector=320, detector_spacing_mm=1.6, source_to_axis_mm=SOD, source_to_detector_mm=SDD)
HALF_FAN_RAD = math.atan(160 * 1.6 / SDD)
SHORT = math.pi + 2 * HALF_FAN_RAD
GOLDEN = tuple((k * math.pi * (math.sqrt(5) - 1) / 2) % math.pi for k in range(360))
SCANS = {
    "parallel": ParallelBeam(equiangular(360), **FULL),
    "parallel full turn": ParallelBeam(equiangular(500, 2 * math.pi), **FULL),
    "parallel both ends": ParallelBeam(tuple(torch.linspace(0, math.pi, 361).double().tolist()), **FULL),
    "parallel backwards": ParallelBeam(equiangular(360)[::-1], **FULL),
    "parallel golden": ParallelBeam(GOLDEN, **FULL),
    "parallel offset": ParallelBeam(equiangular(360), 256, 1.0, detector_offset_mm=7.3),
    "parallel fine cells": ParallelBeam(equiangular(360), 640, 0.4),
    "fan": FanBeam(equiangular(540, 2 * math.pi), **FAN),
    "fan both ends": FanBeam(tuple(torch.linspace(0, 2 * math.pi, 541).double().tolist()), **FAN),
    "fan offset": FanBeam(equiangular(540, 2 * math.pi, 1.0), **FAN, detector_offset_mm=0.4),
    "fan short": FanBeam(equiangular(360, SHORT, 0.7), **FAN),
    "fan short backwards": FanBeam(equiangular(360, -SHORT, 0.7), **FAN),
    "parallel displaced": ParallelBeam(equiangular(700, 2 * math.pi), 144, 1.0, detector_offset_mm=40.0),
    "fan displaced": FanBeam(
        equiangular(720, 2 * math.pi), 200, 1.6, -64.0, source_to_axis_mm=SOD, source_to_detector_mm=SDD
    ),
    "fan between": FanBeam(equiangular(460, 0.5 * (SHORT + 2 * math.pi)), **FAN),
}  # fmt: skip


@pytest.mark.parametrize("name", SCANS)
def test_water_is_zero_hounsfield(name):
    """A cylinder of water: 0 HU within 2 in the mean, and air outside."""
    rows, columns = grid()
    radius2 = rows**2 + columns**2
    image = fbp(ellipse_integrals(SCANS[name], 80, 80).float(), SCANS[name], (PIXELS, PIXELS), (PIXEL_MM, PIXEL_MM))
    inside = hounsfield(image[radius2 < 72**2])
    assert abs(inside.mean()) < 2, f"mean {inside.mean():.2f} HU"
    assert inside.std() < 12, f"ripple {inside.std():.2f} HU"
    centre = hounsfield(image[radius2 < 20**2])
    assert abs(centre.mean()) < 3, f"mean near the axis {centre.mean():.2f} HU"
    air = hounsfield(image[(radius2 > 85**2) & (radius2 < 95**2)])
    assert abs(air.mean() + 1000) < 10


@pytest.mark.parametrize("name", ["parallel", "parallel offset", "fan", "fan short", "fan short backwards"])
def test_ellipse_lies_where_it_is(name):
    """Off-centre, elongated, on pixels that are not square: axes, signs and units all show."""
    shape, pixel_mm = (120, 150), (1.5, 1.0)
    rows, columns = grid(shape, pixel_mm)
    image = fbp(ellipse_integrals(SCANS[name], 35, 20, (18, -30)).float(), SCANS[name], shape, pixel_mm)
    distance = ((columns - 18) / 35) ** 2 + ((rows + 30) / 20) ** 2
    assert abs(hounsfield(image[distance < 0.7]).mean()) < 3
    assert abs(image[distance > 1.4]).mean() < 0.01 * WATER
    weight = image * (distance < 1.4)
    assert (weight * columns).sum() / weight.sum() == pytest.approx(18, abs=0.1)
    assert (weight * rows).sum() / weight.sum() == pytest.approx(-30, abs=0.1)


def test_windows_go_from_sharp_to_smooth():
    """The gradient at the edge falls, and so does the noise, from Ram-Lak to Hann."""
    beam = SCANS["parallel"]
    y = ellipse_integrals(beam, 60, 60).float()
    noise = torch.randn(y.shape, generator=torch.Generator().manual_seed(0))
    windows = ("ram-lak", "shepp-logan", "cosine", "hann")

    def image(data, **choice):
        return fbp(data, beam, (PIXELS, PIXELS), (PIXEL_MM, PIXEL_MM), **choice)

    sharp = [image(y, window=w).diff(dim=1)[PIXELS // 2].abs().max().item() for w in windows]
    loud = [image(noise, window=w).std().item() for w in windows]
    assert sharp == sorted(sharp, reverse=True) and sharp[0] > 1.3 * sharp[-1]
    assert loud == sorted(loud, reverse=True) and loud[0] > 2 * loud[-1]
    assert image(noise, cutoff=0.5).std() < 0.5 * loud[0]
    middle = [hounsfield(image(y, window=w)[80:112, 80:112]).mean().abs().item() for w in windows]
    assert max(middle) < 2  # the window leaves the mean alone


def test_widths_sum_to_the_turn_and_share_repeats():
    angles = torch.tensor([0.0, 1.0, 2.0, 3.0, 1.0]).double().numpy()
    widths = _angular_widths(angles, math.pi)
    assert widths.sum() == pytest.approx(math.pi)
    assert widths[1] == widths[4] == pytest.approx(0.5)
    assert _angular_widths(angles[:1], math.pi).tolist() == [math.pi]
    assert _angular_widths(angles[[0, 0]], 2 * math.pi).tolist() == [math.pi, math.pi]
    # a quarter turn stands for a quarter turn, not for the rest
    quarter = (torch.arange(90) / 180 * math.pi / 2 * 2).double().numpy()
    assert _angular_widths(quarter, math.pi).sum() == pytest.approx(math.pi / 2)


@pytest.mark.parametrize("views", [440, 500, 620, 360, 430, 130])
def test_ray_and_reverse_count_once(views):
    """w(a, gamma) + w(a + pi + 2 gamma, -gamma) = 1 where both were measured, 1 alone where only one was.

    Half-degree views and fan angles in quarter degrees up to 20 put every reverse on a view exactly; 440 views are the
    least that Parker's weights need.
    """
    turn = 720
    cells = torch.arange(-80, 81)  # quarter degrees
    angles = 0.3 + torch.arange(views).double() * 2 * math.pi / turn
    weight = torch.from_numpy(_redundancy(angles.numpy(), (cells.double() * math.pi / 720).numpy()))
    assert (weight >= 0).all() and (weight <= 1 + 1e-12).all()
    reverse = (torch.arange(views)[:, None] + turn // 2 + cells[None]) % turn
    measured = reverse < views
    mirrored = weight.flip(1).gather(0, reverse.clamp(max=views - 1))
    total = weight + mirrored * measured
    assert measured.any() == (views > 280) and not measured.all()
    assert (total - 1).abs().max() < 1e-6


def test_limited_arc_stays_finite_and_bounded():
    """A quarter of a fan turn cannot show the disc, but gives no wild values either."""
    scan = FanBeam(equiangular(90, math.pi / 2), **FAN)
    image = fbp(ellipse_integrals(scan, 60, 60).float(), scan, (PIXELS, PIXELS), (PIXEL_MM, PIXEL_MM))
    assert image.isfinite().all() and image.abs().max() < 3 * WATER


@pytest.mark.parametrize("scan", [ParallelBeam((0.3,), 64, 1.0), FanBeam((0.3,), **FAN)], ids=["parallel", "fan"])
def test_one_view(scan):
    image = fbp(ellipse_integrals(scan, 20, 20).float(), scan, (32, 48), (1.0, 1.0))
    assert image.isfinite().all() and image.abs().max() > 0


def test_matches_the_defining_sum():
    """One view against Kak and Slaney's eq. 61 summed by hand, no Fourier transform."""
    n, cell = 37, 0.7
    y = torch.randn(1, n, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    k = torch.arange(n)[:, None] - torch.arange(n)[None]
    h = torch.where(k == 0, 0.25, torch.where(k % 2 == 0, 0.0, -1 / (math.pi * k.double()) ** 2)) / cell**2
    want = math.pi * cell * (h @ y[0])
    assert torch.allclose(ramp_filter(y, ParallelBeam((0.0,), n, cell))[0], want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["parallel golden", "fan short"])
def test_laws(name):
    scan = SCANS[name].subset(slice(0, None, 40))
    g = torch.Generator().manual_seed(0)
    x1, x2 = (torch.randn(5, scan.n_views, scan.n_detector, generator=g) for _ in range(2))
    shape, pixel_mm = (23, 31), (4.0, 3.0)
    for op in (lambda y: ramp_filter(y, scan, "hann", 0.8), lambda y: fbp(y, scan, shape, pixel_mm)):
        check_linear(op, x1, x2)
        check_batch_independent(op, x1)
        check_threads(lambda op=op: op(x1))
        assert op(x1[:0]).shape == (0, *op(x1).shape[1:])
        assert torch.equal(op(x1.view(1, 5, *x1.shape[1:]))[0], op(x1))
        wide = op(x1.double())
        assert (op(x1) - wide).norm() <= 1e-5 * wide.norm()
        assert torch.equal(op(x1.transpose(1, 2).contiguous().transpose(1, 2)), op(x1))


@pytest.mark.parametrize("name", ["parallel offset", "fan short"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_kernel_against_reference(name, dtype):
    """Compiled back projection against the torch definition, also where views miss the image and behind the source."""
    scan = SCANS[name].subset(slice(0, None, 40))
    source = (SOD, SDD) if isinstance(scan, FanBeam) else (0.0, 0.0)
    q = torch.randn(3, scan.n_views, scan.n_detector, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    lengths = (scan.detector_spacing_mm, scan.detector_offset_mm, *source)
    for ny, nx, dy, dx in [(1, 1, 1.0, 1.0), (37, 61, 2.0, 3.0), (8, 130, 400.0, 40.0)]:
        arguments = (torch.from_numpy(scan.angles), ny, nx, *lengths, dy, dx)
        got = torch.ops.recon3d.fbp_back_project(q.to(dtype), *arguments)
        truth = _reference(q, *arguments)
        if dtype == torch.float32:
            check_close_to_float64(got, _reference(q.to(dtype), *arguments), truth)
        else:  # the reference is the truth; coordinates round differently in the last bits
            assert (got - truth).norm() <= 1e-12 * truth.norm()


TINY = dict(angles_rad=(0.1, 0.9, 2.0, 3.3), n_detector=9, detector_spacing_mm=15.0)


@pytest.mark.parametrize(
    "scan",
    [ParallelBeam(**TINY), FanBeam(**TINY, source_to_axis_mm=SOD, source_to_detector_mm=SDD)],
    ids=["parallel", "fan"],
)
def test_gradient(scan):
    y = torch.randn(2, 4, 9, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda y: fbp(y, scan, (5, 4), (20.0, 30.0)), y)


def test_operator_contract():
    """Schema, fake and autograd as torch.compile needs them, of the back projection and its transpose."""
    lengths = (15.0, 0.5, SOD, SDD, 20.0, 30.0)
    angles = torch.tensor(TINY["angles_rad"], dtype=torch.float64)
    q = torch.randn(2, 4, 9, dtype=torch.float64, requires_grad=True)
    x = torch.randn(2, 5, 4, dtype=torch.float64, requires_grad=True)
    torch.library.opcheck(torch.ops.recon3d.fbp_back_project.default, (q, angles, 5, 4, *lengths))
    torch.library.opcheck(torch.ops.recon3d.fbp_transpose.default, (x, angles, 9, *lengths))


def test_bad_input():
    beam = ParallelBeam((0.0, 1.0), 8, 1.0)
    with pytest.raises(ValueError, match=r"ramp_filter: y must be \[\.\.\., 2, 8\].*got \(8, 2\)"):
        ramp_filter(torch.zeros(8, 2), beam)
    with pytest.raises(TypeError, match="ramp_filter: y must be float32 or float64"):
        ramp_filter(torch.zeros(2, 8, dtype=torch.int32), beam)
    with pytest.raises(ValueError, match="window must be one of ram-lak"):
        ramp_filter(torch.zeros(2, 8), beam, window="hamming")
    for cutoff in (0, 1.1, math.nan):
        with pytest.raises(ValueError, match="cutoff must be in"):
            ramp_filter(torch.zeros(2, 8), beam, cutoff=cutoff)
    with pytest.raises(ValueError, match="fbp: shape needs"):
        fbp(torch.zeros(2, 8), beam, (0, 4), (1.0, 1.0))
    with pytest.raises(ValueError, match="fbp: pixel_mm must be positive"):
        fbp(torch.zeros(2, 8), beam, (4, 4), (1.0, -1.0))

"""Planes: every level covers the volume once, what is gathered goes back by the transpose, and no result depends on
batches, workers or interruptions; with a Gaussian prior the several planes reach what the closed form says."""

from __future__ import annotations

import csv
import shutil

import numpy as np
import pytest
import survivors
import torch
from toys import MatrixOperator

from bench import planes as bench
from recon3d import noise
from recon3d.api import resolve
from recon3d.config import JobConfig
from recon3d.consistency import Identity
from recon3d.engine import loop, plan
from recon3d.engine.assemble import assemble
from recon3d.engine.assemble import planes as assembled
from recon3d.engine.events import Events
from recon3d.engine.executor import Executor
from recon3d.engine.loop import InProcess, Job, reconstruct
from recon3d.engine.problem import Problem, load_problem
from recon3d.engine.scan_ct import CTScan
from recon3d.io.layout import write_measurement
from recon3d.io.measurement import Measurement
from recon3d.planes import PLANES, Averaged, Axial, InTurn, Neighbours
from recon3d.priors import find_prior
from recon3d.priors.base import ModelCard, check_planes
from recon3d.priors.complex import RealImaginaryPrior, TwoChannelPrior, complex_prior
from recon3d.priors.gaussian import GaussianPrior, cosine_basis, power_law
from recon3d.priors.per_plane import PerPlane
from recon3d.recipes import load_recipe
from recon3d.recipes.model import PlanesSection, Recipe
from recon3d.renoise import DDIM, Renoise
from recon3d.trajectory import Level, descend, karras

SHAPE = (7, 4, 5)
ALL = [
    Axial(7), Axial(7, 2), InTurn(SHAPE), InTurn(SHAPE, (2,)), InTurn(SHAPE, (0, 1), 3), InTurn(SHAPE, (0, 1), 2.7),
    Averaged(SHAPE), Neighbours(Axial(7), SHAPE), Neighbours(Axial(7), SHAPE, 3, overlap=True),
    Neighbours(Averaged(SHAPE), SHAPE, 3, 1), Neighbours(InTurn(SHAPE), SHAPE, 5, 2),
    Neighbours(InTurn(SHAPE, (1,)), SHAPE, 9),
]  # fmt: skip


@pytest.fixture(autouse=True)
def one_thread():
    """Tiny products gain nothing from threads and wait for each other on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def _levels(n: int) -> list:
    return descend([1.0 / (k + 1) for k in range(n)])


class Mixing:
    """A linear prior that mixes the slices of a group and the pixels of a row, unlike itself transposed."""

    offset, scale = 0.0, 1.0

    def __init__(self, slices: int) -> None:
        self.card = ModelCard(name="mixing", channels=slices, slices=slices)
        self.matrix = torch.rand(slices, slices, generator=torch.Generator().manual_seed(3), dtype=torch.float64)

    def denoise(self, u, sigma, cond=None):
        assert u.shape[1] == self.card.slices
        return torch.einsum("ij,bjhw->bihw", self.matrix.to(u), u + 0.5 * u.roll(1, -1)) / (1 + sigma)


class Alike:
    """A prior that treats the slices of a group alike: each by its own value."""

    offset, scale = 0.0, 1.0

    def __init__(self, slices: int = 1) -> None:
        self.card = ModelCard(name="alike", channels=slices, slices=slices)

    def denoise(self, u, sigma, cond=None):
        return torch.tanh(u) / (1 + sigma)


def _slices(planes) -> int:
    return getattr(planes, "slices", 1)


# ---------------------------------------------------------------- covering


@pytest.mark.parametrize("planes", ALL)
def test_every_level_covers_the_volume_once(planes):
    u = torch.arange(140.0).reshape(SHAPE)
    for level in _levels(5):
        out, seen = torch.zeros(SHAPE), torch.zeros(SHAPE)
        for view in planes.views(level):
            rows = planes.gather(u, view)
            assert rows.ndim == 4 and rows.shape[1] == _slices(planes)
            planes.scatter(out, rows, view)
            once = torch.zeros(SHAPE)
            planes.scatter(once, torch.ones_like(rows), view)
            seen += once
        # three thirds of a number are the number but for its last bit
        assert torch.allclose(out, u, rtol=1e-6) and torch.allclose(seen, torch.ones(SHAPE), rtol=1e-6)


@pytest.mark.parametrize("planes", ALL)
def test_pulling_is_the_transpose(planes):
    """Summed over views, what `pulling` gathers and scatters is the transpose of the whole map, matrix and all."""
    rng = torch.Generator().manual_seed(0)
    u, v, w = (torch.rand(SHAPE, generator=rng, dtype=torch.float64) for _ in range(3))
    prior = Mixing(_slices(planes))
    for level in _levels(3):
        views = planes.views(level)
        forward = InProcess().denoise(prior, planes, w, views, 0.7)
        back = InProcess().pull(prior, planes.pulling(v), u, views, 0.7, v)
        assert float((forward * v).sum()) == pytest.approx(float((w * back).sum()), rel=1e-12)


def test_axes_take_turns():
    planes = InTurn((3, 4, 5))
    shapes = [tuple(planes.gather(torch.zeros(3, 4, 5), planes.views(n)[0]).shape[2:]) for n in _levels(5)]
    assert shapes == [(4, 5), (3, 5), (4, 5), (3, 4), (4, 5)]


def test_the_second_plane_comes_every_so_often():
    def axes(every, levels=2000, seed=0):
        return [InTurn(SHAPE, (0, 2), every, seed)._axis(k) for k in range(levels)]

    assert axes(3, 6) == [0, 0, 2, 0, 0, 2]
    drawn = axes(2.7)
    # 1/2.7 of 2000 draws: 741 with a spread of 22
    assert abs(drawn.count(2) - 741) < 4 * 22
    assert drawn == axes(2.7) and drawn != axes(2.7, seed=1)


def test_all_visits_of_a_step_see_the_same_slices():
    order = (0, 1, 2)
    heun = [Level(k, 1.0, 0.5, False, kind=kind) for k, kind in enumerate(("predict", "refine") * 4)]
    seen = [InTurn(SHAPE, order).views(level)[0].axis for level in heun]
    assert seen == [0, 0, 1, 1, 2, 2, 0, 0]
    groups = Neighbours(Axial(7), SHAPE, 3, 1)
    assert all(groups.views(a) == groups.views(b) for a, b in zip(heun[::2], heun[1::2], strict=True))
    stages = [Level(k, 1.0, 0.5, False, kind="stage") for k in range(7)]
    assert all(groups.views(level) == groups.views(stages[0]) for level in stages)


@pytest.mark.parametrize("order", [(), (0, 3)])
def test_axes_that_a_volume_does_not_have(order):
    with pytest.raises(ValueError, match="order must name axes 0, 1, 2"):
        InTurn(SHAPE, order)


def test_a_second_plane_needs_two():
    with pytest.raises(ValueError, match="second_every goes with an order of two axes"):
        InTurn(SHAPE, (0, 1, 2), 2.0)
    with pytest.raises(ValueError, match="slices must be at least 1"):
        Neighbours(Axial(3), (3, 4, 5), 0)


# ---------------------------------------------------------------- groups


def test_groups_begin_elsewhere_at_every_level_and_are_neighbours():
    depth = 11
    u = torch.arange(float(depth))[:, None, None].expand(depth, 2, 2)
    planes = Neighbours(Axial(depth), (depth, 2, 2), 3, seed=4)
    offsets = []
    for level in _levels(60):
        views = planes.views(level)
        assert planes.views(level) == views  # by level and seed alone
        offsets.append(views[0].before)
        for view in views:
            got = planes.gather(u, view)[0, :, 0, 0].tolist()
            start = view.index - view.before
            assert got == [float(abs(k) if k < depth else 2 * (depth - 1) - k) for k in range(start, start + 3)]
    assert {offsets.count(k) > 10 for k in range(3)} == {True}
    assert offsets != [Neighbours(Axial(11), (11, 2, 2), 3, seed=5).views(n)[0].before for n in _levels(60)]


def test_a_single_slice_is_its_own_neighbour():
    planes = Neighbours(Axial(1), (1, 2, 2), 3)
    for level in _levels(4):
        (view,) = planes.views(level)
        assert torch.equal(planes.gather(torch.full((1, 2, 2), 5.0), view), torch.full((1, 3, 2, 2), 5.0))


def test_overlapping_groups_are_all_there_are():
    """Every slice is answered for three times, once in every place of a group."""
    u = torch.arange(7.0)[:, None, None].expand(SHAPE)
    planes = Neighbours(Axial(7), SHAPE, 3, overlap=True)
    views = planes.views(_levels(1)[0])
    assert [view.index - view.before for view in views] == list(range(-2, 7))
    answers = torch.zeros(3, 7)
    for view in views:
        for place in range(view.before, view.before + view.count):
            assert planes.gather(u, view)[0, place, 0, 0] == view.index - view.before + place
            answers[place, view.index - view.before + place] += 1
    assert torch.equal(answers, torch.ones(3, 7))


# ---------------------------------------------------------------- what a prior is asked, and laws of whole runs

RUN = (7, 6, 8)
TRIPLETS = [{"kind": "axial"}, {"kind": "in_turn"}, {"kind": "averaged"}, {"kind": "axial", "overlap": True}]


def _job(planes: dict, prior, shape=RUN, seed=8, **changes) -> Job:
    rng = torch.Generator().manual_seed(1)
    operator = MatrixOperator(torch.rand(20, shape[1] * shape[2], generator=rng), shape)
    y = operator(torch.rand(shape, generator=rng))
    recipe = {
        "trajectory": {"grid": "karras", "levels": 6, "sigma_max": 1.0, "sigma_min": 0.05},
        "consistency": {"kind": "proximal_cg", "iterations": 3, "rho": 0.1},
        "planes": planes,
        "renoise": {"kind": "ddim", "eta": 0.85},
        **changes,
    }
    return assemble(Recipe.model_validate(recipe), operator, y, prior, seed=seed)


@pytest.mark.parametrize("planes", TRIPLETS)
def test_groups_of_a_prior_that_treats_slices_alike_are_slices(planes):
    """A network that looks at each channel alone cannot tell groups from slices, whatever the planes."""
    singles = {key: value for key, value in planes.items() if key != "overlap"}
    groups, slices = reconstruct(_job(planes, Alike(3))), reconstruct(_job(singles, Alike(1)))
    # the mean of three equal numbers is the number but for its last bit
    assert torch.allclose(groups, slices, rtol=1e-4, atol=1e-5) if "overlap" in planes else torch.equal(groups, slices)


@pytest.mark.parametrize("overlap", [False, True])
def test_constant_along_z_is_axial_alone(overlap):
    """Groups of equal slices, also those completed by reflection, give what one slice gives."""

    class OfMean(Alike):
        def denoise(self, u, sigma, cond=None):
            return (
                torch.tanh(u[:, 1:2]).expand_as(u) / (1 + sigma)
                if self.card.slices == 3
                else torch.tanh(u) / (1 + sigma)
            )

    u = torch.rand(1, 6, 8).expand(RUN).contiguous()
    groups = Neighbours(Axial(7), RUN, 3, 5, overlap)
    for level in _levels(4):
        want = InProcess().denoise(OfMean(1), Axial(7), u, Axial(7).views(level), 0.4)
        got = InProcess().denoise(OfMean(3), groups, u, groups.views(level), 0.4)
        assert torch.allclose(got, want, rtol=1e-6) if overlap else torch.equal(got, want)


@pytest.mark.parametrize("planes", TRIPLETS)
def test_batches_and_workers_change_no_bit(planes):
    prior = Mixing(3)
    want = reconstruct(_job(planes, prior))
    for batch, workers in ((1, 1), (3, 2), (8, 1)):
        job = _job(planes, prior)
        with Executor(batch, workers) as executor:
            job.executor = executor
            assert torch.equal(reconstruct(job), want)


GUIDED = {"kind": "gradient", "strength": 0.5}


@pytest.mark.parametrize("planes", [*TRIPLETS, {"kind": "in_turn", "order": ["axial", "coronal"], "second_every": 2.7}])
@pytest.mark.parametrize("changes", [{}, {"consistency": GUIDED}])
def test_resumes_to_the_same_bits_from_any_level(planes, changes):
    whole = reconstruct(_job(planes, Mixing(3), **changes))
    assert not torch.equal(whole, reconstruct(_job(planes, Mixing(3), seed=9, **changes)))
    job = _job(planes, Mixing(3), **changes)
    state = loop.begin(job)
    for level in loop.run(job, state):
        saved = loop.State(state.u.clone(), {k: v.clone() for k, v in state.duals.items()}, state.index, state.seed)
        for _ in loop.run(_job(planes, Mixing(3), **changes), saved):
            pass
        assert torch.equal(saved.u, whole), f"differs when resumed after level {level.index}"


# ---------------------------------------------------------------- closed forms

CUBE = (6, 6, 6)


@pytest.mark.parametrize(
    ("planes", "axes"),
    [
        (Axial(6), lambda k: (0,)),
        (InTurn(CUBE), lambda k: ((0, 1, 0, 2)[k % 4],)),
        (InTurn(CUBE, (0, 2), 3), lambda k: (2 if k % 3 == 2 else 0,)),
        (Averaged(CUBE), lambda k: (0, 1, 2)),
    ],
)
def test_a_gaussian_of_slices_in_every_plane(planes, axes):
    """Without data and fresh noise a run is linear and diagonal in the cosine basis of the volume: a level multiplies
    a coefficient by g + (sigma'/sigma)(1 - g), g the mean over the level's planes of what a slice's prior keeps."""
    prior = GaussianPrior(power_law((6, 6), 0.5))
    levels = descend(karras(9, 2.0, 0.05))
    basis = cosine_basis(6)
    start = torch.rand(CUBE, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    want = torch.einsum("ai,bj,ck,ijk->abc", basis, basis, basis, start)
    for level in levels:
        gain = prior.spectrum / (prior.spectrum + level.sigma**2)
        kept = torch.stack([gain.unsqueeze(axis).expand(CUBE) for axis in axes(level.index)]).mean(0)
        want = want * (kept + level.sigma_next / level.sigma * (1 - kept))
    want = torch.einsum("ai,bj,ck,abc->ijk", basis, basis, basis, want)
    job = Job(
        Still(CUBE), start, prior, levels, planes, Identity(), Renoise(DDIM()), noise.independent(6, seed=2),
        loop.Start(start),
    )  # fmt: skip
    state = loop.State(start.clone(), {}, 0, 2)
    for _ in loop.run(job, state):
        pass
    assert torch.allclose(state.u, want, rtol=1e-10, atol=1e-12)


class Still(MatrixOperator):
    """A scanner that nobody asks."""

    def __init__(self, shape) -> None:
        super().__init__(torch.zeros(1, shape[1] * shape[2], dtype=torch.float64), shape)


class GroupGaussian:
    """The exact denoiser of three slices whose values go together along z, pixel by pixel."""

    offset, scale = 0.0, 1.0

    def __init__(self, covariance: torch.Tensor) -> None:
        self.card = ModelCard(name="group", channels=3, slices=3)
        self.covariance = covariance

    def denoise(self, u, sigma, cond=None):
        gain = self.covariance @ torch.linalg.inv(self.covariance + sigma**2 * torch.eye(3, dtype=torch.float64))
        return torch.einsum("ij,bjhw->bihw", gain.to(u), u)


def test_groups_know_what_goes_on_along_z():
    """Slices that go together: groups remove more noise than slices alone can, by as much as the closed form says."""
    depth, sigma, rho = 1500, 1.0, 0.9
    k = torch.arange(depth, dtype=torch.float64)
    chain = rho ** (k[:3, None] - k[None, :3]).abs()
    rng = np.random.default_rng(0)
    x = np.empty((depth, 4, 4))
    x[0] = rng.standard_normal((4, 4))
    for z in range(1, depth):
        x[z] = rho * x[z - 1] + (1 - rho**2) ** 0.5 * rng.standard_normal((4, 4))
    x = torch.from_numpy(x)
    u = x + sigma * torch.from_numpy(rng.standard_normal(x.shape))
    gain = chain @ torch.linalg.inv(chain + sigma**2 * torch.eye(3))
    error = torch.diagonal(chain - gain @ chain)
    # all three places of the middle one of five slices
    mean = sum(torch.nn.functional.pad(gain[k], (2 - k, k)) for k in range(3)) / 3
    five = rho ** (torch.arange(5.0)[:, None] - torch.arange(5.0)).abs().double()
    rest = mean - torch.eye(5, dtype=torch.float64)[2]
    overlapping = float(rest @ five @ rest + sigma**2 * mean @ mean)
    level = _levels(1)[0]
    for overlap, want in ((False, float(error.mean())), (True, overlapping)):
        groups = Neighbours(Axial(depth), tuple(x.shape), 3, 1, overlap)
        got = InProcess().denoise(GroupGaussian(chain), groups, u, groups.views(level), sigma)
        # 24 000 squared errors that go together in threes or so: a spread of about one and a half per cent
        assert float((got - x).square().mean()) == pytest.approx(want, rel=0.06)
    # less than in the middle of a group, than side by side, and than a slice alone: 1 - 1 / (1 + sigma^2)
    assert overlapping < float(error[1]) < float(error.mean()) < 0.5


# ---------------------------------------------------------------- complex volumes


@pytest.mark.parametrize(("make", "parts"), [(TwoChannelPrior, 2), (RealImaginaryPrior, 1)])
def test_complex_groups_are_all_real_parts_then_all_imaginary_ones(make, parts):
    seen = []

    class Watch:
        offset, scale = 0.0, 1.0
        card = ModelCard(name="watch", channels=3 * parts, slices=3)

        def denoise(self, u, sigma, cond=None):
            seen.append(u.clone())
            return 2 * u

    prior = make(Watch(), 4.0)
    u = torch.randn(2, 3, 4, 5, dtype=torch.complex64)
    assert torch.allclose(prior.denoise(u, 0.5), 2 * u)
    want = torch.cat([u.real, u.imag], 1) / 4 if parts == 2 else torch.stack([u.real, u.imag], 1).flatten(0, 1) / 4
    assert torch.allclose(seen[0], want)
    assert isinstance(complex_prior(Watch(), 1.0), make)
    with pytest.raises(ValueError, match=r"complex \[batch, 3, row, col\]"):
        prior.denoise(u[:, :1], 0.5)


def test_a_complex_volume_goes_through_groups_of_every_plane():
    u = torch.randn(RUN, dtype=torch.complex64)
    for inner in (Axial(7), InTurn(RUN), Averaged(RUN)):
        groups = Neighbours(inner, RUN, 3, 2)
        prior = TwoChannelPrior(_sixfold(), 1.0)
        for level in _levels(3):
            got = InProcess().denoise(prior, groups, u, groups.views(level), 0.3)
            assert torch.allclose(got, torch.complex(u.real.tanh(), u.imag.tanh()), atol=1e-6)


def _sixfold():
    class Sixfold(Alike):
        def __init__(self) -> None:
            self.card = ModelCard(name="sixfold", channels=6, slices=3)

        def denoise(self, u, sigma, cond=None):
            return torch.tanh(u)

    return Sixfold()


# ---------------------------------------------------------------- what fits a prior, and what a recipe may ask


def test_each_plane_has_to_fit_the_card():
    card = ModelCard(name="ct", plane="axial", spacing_mm=(0.8, 2.2))
    three = ("axial", "coronal", "sagittal")
    assert check_planes(card, three, (1.5, 1.0, 1.0)) is None
    assert check_planes(card, ("axial",), (9.0, 1.0, 1.0)) is None
    assert "pixels of 0.8 to 2.2 mm, got 9 x 1 mm" in check_planes(card, three, (9.0, 1.0, 1.0))
    assert "was trained on axial slices, got coronal ones" in check_planes(card, ("coronal",), (1.0, 1.0, 1.0))
    some = ModelCard(name="any", plane="any")
    assert "coronal slices of this grid have pixels of 3 x 1 mm" in check_planes(some, three, (3.0, 1.0, 1.0))
    assert check_planes(some, ("axial",), (3.0, 1.0, 1.0)) is None
    # a prior of coronal slices has seen them as they are
    assert check_planes(ModelCard(name="c", plane="coronal"), ("coronal",), (3.0, 1.0, 1.0)) is None


@pytest.mark.parametrize(
    ("section", "kind", "seen"),
    [
        ({}, Axial, ("axial",)),
        ({"kind": "coronal"}, InTurn, ("coronal",)),
        ({"kind": "in_turn"}, InTurn, ("axial", "coronal", "sagittal")),
        ({"kind": "in_turn", "order": ["axial", "sagittal"], "second_every": 2.7}, InTurn, ("axial", "sagittal")),
        ({"kind": "averaged"}, Averaged, ("axial", "coronal", "sagittal")),
    ],
)
def test_planes_of_a_recipe(section, kind, seen):
    section = PlanesSection.model_validate(section)
    assert section.seen == seen
    assert isinstance(assembled(section, SHAPE, Alike(1), 0), kind)
    groups = assembled(section, SHAPE, Alike(3), 7)
    assert isinstance(groups, Neighbours) and isinstance(groups.planes, kind) and groups.seed == 7


@pytest.mark.parametrize(
    "section",
    [
        {"second_every": 2.0},
        {"kind": "in_turn", "second_every": 2.0},
        {"kind": "in_turn", "order": []},
        {"kind": "oblique"},
    ],
)
def test_planes_that_make_no_sense(section):
    with pytest.raises(ValueError, match=r"second_every|order|kind"):
        PlanesSection.model_validate(section)


# ---------------------------------------------------------------- one prior per plane


class Named(Alike):
    """A prior that keeps as much as its number says, and notes the slices it is shown."""

    def __init__(self, keeps: float, slices: int = 1) -> None:
        super().__init__(slices)
        self.card = ModelCard(name=f"keeps {keeps}", channels=slices, slices=slices)
        self.keeps, self.shown = keeps, set()

    def denoise(self, u, sigma, cond=None):
        self.shown.add(tuple(u.shape[2:]))
        return self.keeps * u


IN_TURN = {"kind": "in_turn", "order": ["axial", "coronal"]}


@pytest.mark.parametrize("slices", [1, 3])
@pytest.mark.parametrize("changes", [{}, {"consistency": GUIDED}])
def test_each_plane_has_its_own_prior(slices, changes):
    axial, coronal = Named(0.5, slices), Named(0.25, slices)
    whole = reconstruct(_job(IN_TURN, PerPlane({"axial": axial, "coronal": coronal}), **changes))
    assert axial.shown == {(6, 8)} and coronal.shown == {(7, 8)}
    assert torch.equal(
        reconstruct(_job(IN_TURN, PerPlane({"axial": axial, "coronal": axial}), **changes)),
        reconstruct(_job(IN_TURN, axial, **changes)),
    )
    assert not torch.equal(whole, reconstruct(_job(IN_TURN, axial, **changes)))


def _with(prior, **section) -> Problem:
    scan = CTScan(y=survivors.sinogram(), geometry=survivors.SCAN, grid=survivors.GRID)
    recipe = Recipe.model_validate({"trajectory": {"levels": 2}, "planes": section})
    return Problem(scan=scan, recipe=recipe, prior=prior)


def test_every_prior_counts_in_the_fingerprint_and_is_checked():
    def two(keeps):
        return PerPlane({"axial": Named(0.5), "coronal": Named(keeps)})

    assert _with(two(0.2), **IN_TURN).prior_digest() == _with(two(0.2), **IN_TURN).prior_digest()
    assert _with(two(0.2), **IN_TURN).prior_digest() != _with(two(0.3), **IN_TURN).prior_digest()
    assert _with(two(0.2), **IN_TURN).check() == []
    with pytest.raises(ValueError, match=r"one prior per plane goes with planes\.kind in_turn"):
        _with(two(0.2), kind="averaged").check()
    with pytest.raises(ValueError, match="no prior of sagittal slices is given, only of axial, coronal"):
        _with(two(0.2), kind="in_turn").check()
    other = Named(0.1)
    other.card = ModelCard(name="flat", plane="axial")
    with pytest.raises(ValueError, match="'flat' was trained on axial slices, got coronal ones"):
        _with(PerPlane({"axial": Named(0.5), "coronal": other}), **IN_TURN).check()


def test_shared_noise_is_for_axial_slices_alone():
    def told(prior, noise, **section):
        scan = CTScan(y=survivors.sinogram(), geometry=survivors.SCAN, grid=survivors.GRID)
        recipe = Recipe.model_validate({"planes": section, "noise": {"kind": noise}})
        return Problem(scan=scan, recipe=recipe, prior=prior).check()

    assert told(Alike(), "iscs") == told(Alike(3), "independent", kind="averaged") == []
    assert any(
        "in slices across others the prior expects white" in line for line in told(Alike(), "iscs", kind="averaged")
    )
    assert any("in groups of slices the prior expects white noise" in line for line in told(Alike(3), "iscs_mm"))


def test_priors_by_plane_are_of_one_kind():
    with pytest.raises(ValueError, match="name priors of axial, coronal or sagittal slices"):
        PerPlane({"oblique": Alike()})
    scaled = Alike()
    scaled.scale = 2.0
    with pytest.raises(ValueError, match="train them in one network unit"):
        PerPlane({"axial": Alike(), "coronal": scaled})
    with pytest.raises(ValueError, match="sees 3 together"):
        PerPlane({"axial": Alike(), "coronal": Alike(3)})
    with pytest.raises(TypeError, match="ask the prior of a plane"):
        PerPlane({"axial": Alike()}).denoise(torch.zeros(1, 1, 2, 2), 1.0)


def test_a_job_names_priors_by_plane(tmp_path, monkeypatch):
    """From files: the named planes get theirs, all others `prior`; both folders are in the fingerprint."""
    path = tmp_path / "scan.h5"
    write_measurement(path, Measurement(survivors.sinogram(), survivors.SCAN, survivors.GRID, 1e5, "recon3d"))
    monkeypatch.chdir(tmp_path)
    other = tmp_path / "other"
    shutil.copytree(find_prior("ct"), other)
    recipe = {"like": "ct", "planes": IN_TURN}
    config = JobConfig.model_validate(
        {"input": {"path": str(path)}, "prior": "ct", "priors": {"coronal": "other"}, "recipe": recipe}
    )
    problem = load_problem(resolve(config), Events())
    assert isinstance(problem.prior, PerPlane) and set(problem.prior.priors) == set(PLANES)
    assert any(str(other) in name for name in problem.files) and len(problem.files) == 4


# ---------------------------------------------------------------- time predicted


def test_calls_are_counted_by_plane():
    def calls(prior, **section):
        recipe = Recipe.model_validate({"trajectory": {"levels": 4}, "planes": section})
        scan = CTScan(y=survivors.sinogram(), geometry=survivors.SCAN, grid=survivors.GRID)
        problem = Problem(scan=scan, recipe=recipe, prior=prior)
        return dict(plan._calls(problem, plan._visits(problem)))

    nz, ny, nx = survivors.GRID.shape
    assert calls(Alike(1)) == {0: 4 * nz}
    assert calls(Alike(1), kind="in_turn") == {0: 2 * nz, 1: ny, 2: nx}
    assert calls(Alike(1), kind="averaged") == {0: 4 * nz, 1: 4 * ny, 2: 4 * nx}
    assert calls(Alike(3), overlap=True) == {0: 4 * (nz + 2)}
    groups = calls(Alike(3))[0]
    assert 4 * (nz // 3) <= groups <= 4 * (nz // 3 + 1)


def test_time_is_of_the_planes_that_are_seen(monkeypatch):
    """The seconds of a view of each plane times their number; every plane is probed with slices of its own shape."""
    shown = Named(0.5)
    problem = _with(shown, kind="averaged")
    probed = plan._probe_prior

    def known(*arguments):
        axis = arguments[-1]
        probed(*arguments)
        return 1000 * (axis + 1), 10.0**-axis

    monkeypatch.setattr(plan, "_probe_prior", known)
    nz, ny, nx = survivors.GRID.shape
    activations, seconds = plan._probe(problem, 1, 1, 1, True, 2)
    assert activations == 3000 and seconds["network"] == pytest.approx(2 * (nz + 0.1 * ny + 0.01 * nx))
    assert shown.shown == {(ny, nx), (nz, nx), (nz, ny)}


# ---------------------------------------------------------------- the comparison


def test_the_bench_compares_recipes_that_exist_and_keeps_its_figures(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("RECON3D_PRIORS", str(tmp_path))
    for modality, recipe in (("ct", "ct"), ("mr", "mri")):
        names = [method.name for method in bench.methods(modality)]
        assert len(set(names)) == len(names) and names[0] == "axial"
        for method in bench.methods(modality):
            load_recipe(recipe, method.changes)
    shown = {"psnr_db": 30.0, "ssim": 0.9}
    result = {
        "volume": {"rmse": 1.0},
        "through_plane": {"error": 0.5, "ratio": 1.1},
        **dict.fromkeys(bench.PLANES, shown),
    }

    class Done:
        volume = None

    case = bench.Case("toy", "ct", "ct", lambda x: result, lambda recipe, prior: Done())
    found = [bench.measured(case, method, True) for method in bench.methods("ct")]
    assert "triplets is left out, there is no prior ct_triplet" in capsys.readouterr().out
    kept = [row for row in found if row is not None]
    assert [row["method"] for row in kept][:2] == ["axial", "axial, TV"] and len(kept) == 9
    bench.record(case, kept, tmp_path)
    with (tmp_path / "planes.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 9 and rows[0]["axial_ssim"] == "0.9000" and rows[0]["along_z_ratio"] == "1.1000"
    assert "| axial | 30.00 / 0.9000 |" in bench.table(case, kept)

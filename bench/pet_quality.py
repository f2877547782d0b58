"""PET quality on subjects that no packaged prior was trained on, with hot and cold spots put in, at three count levels.

Truth is a real PET image (a thigh with a sarcoma, the chest of a whole body) or a phantom made from the T1 image of a
left-out head. Data: a cylindrical scanner with 16 rings around it, attenuation, 20 % scatter, 20 % randoms, Poisson
noise, projected with pixels split in four; no resolution loss beyond that of the image itself, so none is modelled.
OSEM takes its best number of passes, OSEM with the relative difference prior in 3D its best strength and number of
passes, both in PSNR against the truth. The same prior once more with the strength and passes that were best for a
subject of the diffusion prior's training set, alike in kind and at as many counts: chosen as the settings of the
diffusion recipes were, which run as packaged.

PSNR: whole volume, range = the largest value of the truth.
Recovery: mean over the spots of (reconstruction - truth without spot) / (truth - truth without spot), each averaged
over the spot; 1 is right, 0 is a spot that is not seen.
Bias: mean over the spots of (reconstruction - truth) / truth for hot ones, / truth without spot for cold ones; for the
body, (reconstruction - truth) / truth of its total outside the spots.
Figures go to bench/results/pet_quality.csv. `RECON3D_PET_PICTURE=FILE` draws a slice of each subject.
"""

from __future__ import annotations

import csv
import datetime
import math
import os
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bench._common import RESULTS, Row, commit, machine
from recon3d import reconstruct_pet
from recon3d.consistency.em import mean_sensitivity, ordered_subsets_em, uniform_start
from recon3d.geometry import PETScanner, VolumeGrid, pet_geometry
from recon3d.io import read_nifti
from recon3d.operators.simulate_pet import SimulatedPET, simulate_pet
from recon3d.testing.pet_phantoms import MU_TISSUE, PETPhantom, Sphere, brain_phantom, insert_spheres

RECIPES = ("pet", "pet_dds")
SLICES = 31  # of 16 rings
SUBSETS = 14
BETAS = (0.006, 0.0125, 0.025, 0.05, 0.1)
PASSES = (4, 8, 16)
# radius in mm, ratio to what was there
SPOTS = ((9.0, 4.0), (7.0, 3.0), (11.0, 2.5), (8.0, 6.0), (12.0, 0.0), (9.0, 0.2))
PICTURE = os.environ.get("RECON3D_PET_PICTURE")


@dataclass(frozen=True)
class Subject:
    """A truth with spots, the same without them, and how it is measured; `kind` is shared by two that are alike."""

    name: str
    kind: str
    phantom: PETPhantom
    plain: Tensor
    body: Tensor
    crystals: int
    counts: tuple[float, ...]


def subjects(held_out: bool = True) -> list[Subject]:
    """The left-out ones; else those for choosing settings: of volumes that the prior was trained on."""
    found = []
    if held_out:
        plan = (
            ("thigh with sarcoma (sts036)", "limb", "pet/pet_extremity_sts036.nii.gz", 20, 48, 192, (1e6, 4e6, 1.6e7)),
            ("chest (qinhn0024)", "trunk", "pet/pet_wb_qinhn0024.nii.gz", 160, 128, 224, (2e6, 8e6, 3.2e7)),
            ("brain phantom (oms20)", "brain", "mr/mr_brain_oms20_t1w.nii.gz", 8, 88, 280, (2e6, 8e6, 3.2e7)),
        )
    else:
        plan = (
            ("limb (sts013)", "limb", "pet/pet_extremity_sts013.nii.gz", 35, 64, 224, (1e6, 4e6, 1.6e7)),
            ("abdomen (qinhn0024)", "trunk", "pet/pet_wb_qinhn0024.nii.gz", 110, 112, 224, (2e6, 8e6, 3.2e7)),
            ("brain phantom (oms04)", "brain", "mr/mr_brain_oms04_t1w.nii.gz", 8, 88, 280, (2e6, 8e6, 3.2e7)),
        )
    for name, kind, file, first, size, crystals, counts in plan:
        if (path := _data(file)) is not None:
            found.append(_subject(name, kind, path, first, size, crystals, counts))
    return found


def run(quick: bool, device: str) -> list[Row]:
    """The thigh at one count level when quick; else all three subjects at three."""
    drawn = []
    twins = {subject.kind: subject for subject in subjects(held_out=False)}
    for subject in subjects()[: 1 if quick else None]:
        for level, counts in enumerate(subject.counts):
            if quick and level != 1:
                continue
            images, figures, seconds = judged(subject, counts, RECIPES, device, twin=twins.get(subject.kind))
            if not quick:
                _record(subject, counts, figures, seconds)
            if level == 1:
                drawn.append((subject, counts, images))
    if PICTURE and drawn:
        picture(Path(PICTURE), drawn)
    return []


def judged(
    subject: Subject,
    counts: float,
    recipes: tuple[str, ...],
    device: str = "cpu",
    seed: int = 5,
    twin: Subject | None = None,
) -> tuple[dict[str, Tensor], dict[str, dict[str, float]], dict[str, tuple[float, float]]]:
    """Images, figures and (wall, processor) seconds of all methods on one measurement."""
    scan = scanned(subject, counts, seed)
    case = f"{subject.name}, {counts:g} counts"
    images: dict[str, Tensor] = {}
    figures: dict[str, dict[str, float]] = {}
    seconds: dict[str, tuple[float, float]] = {}

    def keep(name: str, x: Tensor, wall: float, cpu: float) -> None:
        images[name], figures[name], seconds[name] = x, judge(x, subject), (wall, cpu)
        show = "  ".join(f"{k} {v:.3f}" for k, v in figures[name].items())
        print(f"{case}: {name}: {show}  {wall:.1f} s, {cpu:.1f} s CPU", flush=True)

    for betas in ((0.0,), BETAS):
        best = tuned(scan, subject.phantom.activity, betas)
        keep(best.name, best.image, best.wall, best.cpu)
    if twin is not None:
        # the levels of the two correspond
        other = scanned(twin, twin.counts[subject.counts.index(counts)], seed)
        best = tuned(other, twin.phantom.activity, BETAS)
        again = tuned(scan, subject.phantom.activity, (best.beta,), (best.passes,))
        keep(f"{again.name} (chosen on {twin.name})", again.image, again.wall, again.cpu)
    for recipe in recipes:
        wall, cpu = time.perf_counter(), time.process_time()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            x = reconstruct_pet(
                scan.prompts, scan.geometry, scan.factors, scan.additive, scan.grid, recipe, "pet",
                scale=scan.scale, device=device, seed=11, accept_mismatch=True,
            ).volume  # fmt: skip
        keep(f"recon3d {recipe}", x, time.perf_counter() - wall, time.process_time() - cpu)
    return images, figures, seconds


def scanned(subject: Subject, counts: float, seed: int = 5) -> SimulatedPET:
    """The measurement of a subject."""
    p = subject.phantom
    dz, _, dx = p.grid.spacing_mm
    scanner = PETScanner("quality", 16, 2 * dz, subject.crystals, 300.0, 8, 8)
    bin_mm = 300.0 * math.sin(math.pi / subject.crystals)
    radial = 2 * math.ceil(0.5 * dx * p.grid.shape[2] * 1.1 / bin_mm)
    geometry = pet_geometry(scanner, n_radial=radial, span=3, tof=None)
    return simulate_pet(p.activity, p.grid, geometry, mu_per_mm=p.mu_per_mm, counts=counts, psf_fwhm_mm=None, seed=seed)


@dataclass(frozen=True)
class Tuned:
    """The best of a search, and what that one run costs."""

    name: str
    image: Tensor
    wall: float
    cpu: float
    beta: float
    passes: int


def tuned(scan: SimulatedPET, truth: Tensor, betas: tuple[float, ...], passes: tuple[int, ...] | None = None) -> Tuned:
    """OSEM at the strength and number of passes with the best PSNR; strengths relative to the mean sensitivity."""
    operator, y = scan.operator(), scan.prompts
    best, lowest = None, math.inf
    mean = mean_sensitivity(operator, y, SUBSETS)
    start = uniform_start(operator, y, SUBSETS)
    passes = passes or ((1, 2, 3, 4, 6, 8) if betas == (0.0,) else PASSES)
    for beta in betas:
        x, done, wall, cpu = start, 0, 0.0, 0.0
        for n in passes:
            t, c = time.perf_counter(), time.process_time()
            x = ordered_subsets_em(
                x, y, operator, subsets=SUBSETS, iterations=SUBSETS * (n - done), start=SUBSETS * done,
                rdp=beta * mean, axes="zyx", epsilon=1e-3 * float(truth.mean()), spacing_mm=scan.grid.spacing_mm,
            )  # fmt: skip
            wall, cpu, done = wall + time.perf_counter() - t, cpu + time.process_time() - c, n
            error = float((x - truth).double().square().mean())
            if error < lowest:
                kind = f"OSEM+RDP, beta {beta:g}" if beta else "OSEM"
                lowest, best = error, Tuned(f"{kind}, {n} passes", x, wall, cpu, beta, n)
    assert best is not None
    return best


def judge(x: Tensor, subject: Subject) -> dict[str, float]:
    """PSNR, recovery and bias."""
    p, x = subject.phantom, x.double()
    truth, plain = p.activity.double(), subject.plain.double()
    out = {"psnr_db": 10 * math.log10(float(truth.max()) ** 2 / float((x - truth).square().mean()))}
    outside = subject.body.clone()
    for kind in ("hot", "cold"):
        recovery, bias = [], []
        for name, m in p.regions.items():
            if name.startswith(kind):
                seen, t, before = (float(v[m].mean()) for v in (x, truth, plain))
                recovery.append((seen - before) / (t - before))
                bias.append((seen - t) / (t if kind == "hot" else before))
                outside &= ~m
        out[f"{kind}_recovery"] = float(np.mean(recovery)) if recovery else math.nan
        out[f"{kind}_bias"] = float(np.mean(bias)) if bias else math.nan
    out["body_bias"] = float(x[outside].sum() / truth[outside].sum()) - 1
    return out


def _subject(
    name: str, kind: str, path: Path, first: int, size: int, crystals: int, counts: tuple[float, ...]
) -> Subject:
    image, grid = read_nifti(path)
    dz, dy, dx = grid.spacing_mm
    if path.parent.name == "mr":
        image = image[first : first + SLICES].float()
        made = brain_phantom(image, grid.spacing_mm, voxel_mm=2.5, fwhm_mm=4.0, variation=0.1, seed=3)
        activity, mu, first = made.activity, made.mu_per_mm, 0
        dz, dy, dx = made.grid.spacing_mm
        dy = dx = 2.5  # of a head scaled by less than one per cent
    else:
        activity = image.float() * 1000  # SUV of 1 in a patient of 70 kg with 70 MBq
        mu = None
    cut = _square(activity[first : first + SLICES], size)
    grid = VolumeGrid((SLICES, size, size), (dz, dy, dx))
    unit = float(cut[cut > 0.01 * cut.max()].mean())
    body = _smooth(cut, 3) > 0.1 * unit
    attenuation = MU_TISSUE * body.float() if mu is None else _square(mu[first : first + SLICES], size)
    p = spotted(PETPhantom(cut, attenuation, grid), unit)
    return Subject(name, kind, p, cut, body, crystals, counts)


def spotted(plain: PETPhantom, unit: float, seed: int = 3) -> PETPhantom:
    """Spots where the activity is above 0.4 of the mean and even, apart from each other and from the ends."""
    rng = np.random.default_rng(seed)
    x, grid = plain.activity, plain.grid
    inside = (_smooth(x, 5) > 0.4 * unit).nonzero()
    taken: list[tuple[tuple[float, float, float], float]] = []
    p = plain
    for k, (radius, ratio) in enumerate(SPOTS):
        for _ in range(300):
            at = inside[int(rng.integers(len(inside)))]
            centre = tuple((int(a) - (n - 1) / 2) * s for a, n, s in zip(at, grid.shape, grid.spacing_mm, strict=True))
            if any(math.dist(centre, c) < radius + r + 10 for c, r in taken):
                continue
            if abs(centre[0]) > ((SLICES - 1) / 2 - 3) * grid.spacing_mm[0] - radius:
                continue
            reach = [max(1, round(radius / s)) for s in grid.spacing_mm]
            box = x[tuple(slice(max(0, int(a) - r), int(a) + r + 1) for a, r in zip(at, reach, strict=True))]
            if float(box.std()) > 0.45 * float(box.mean()) or float(box.min()) < 0.15 * unit:
                continue
            made = insert_spheres(plain, [Sphere(centre, radius, ratio)], fwhm_mm=5.0)
            (region,) = (m for n, m in made.regions.items() if n.startswith(("hot", "cold")))
            regions = {**p.regions, f"{'hot' if ratio > 1 else 'cold'} {k}": region}
            p = PETPhantom((p.activity + made.activity - x).clamp(min=0), p.mu_per_mm, grid, regions)
            taken.append((centre, radius))
            break
    return p


def _square(x: Tensor, size: int) -> Tensor:
    """The middle of each slice, zeros around it where it is smaller."""
    for axis in (1, 2):
        n = x.shape[axis]
        if n > size:
            x = x.narrow(axis, (n - size) // 2, size)
        else:
            low = (size - n) // 2
            shape = list(x.shape)
            parts = []
            for extra in (low, size - n - low):
                shape[axis] = extra
                parts.append(torch.zeros(shape))
            x = torch.cat([parts[0], x, parts[1]], axis)
    return x.contiguous()


def _smooth(x: Tensor, n: int) -> Tensor:
    return torch.nn.functional.avg_pool3d(x[None, None], n, stride=1, padding=n // 2)[0, 0]


def picture(path: Path, drawn: list[tuple[Subject, float, dict[str, Tensor]]]) -> None:
    """One slice of each subject through its hot spots: the truth and every method."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns = 1 + max(len(images) for *_, images in drawn)
    figure, axes = plt.subplots(len(drawn), columns, figsize=(2.4 * columns, 2.6 * len(drawn)), squeeze=False)
    for row, (subject, counts, images) in zip(axes, drawn, strict=True):
        spots = torch.stack([m for n, m in subject.phantom.regions.items()]).any(0)
        k = int(spots.sum((1, 2)).argmax())
        truth = subject.phantom.activity
        top = float(torch.quantile(truth[k], 0.995))
        for ax, (name, x) in zip(row, {f"{subject.name}\n{counts:g} counts": truth, **images}.items(), strict=False):
            ax.imshow(x[k].numpy(), cmap="inferno", vmin=0, vmax=top)
            ax.set_title(name.replace(", ", "\n", 1), fontsize=7)
        for ax in row:
            ax.axis("off")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _record(
    subject: Subject, counts: float, figures: dict[str, dict[str, float]], seconds: dict[str, tuple[float, float]]
) -> None:
    path = RESULTS / "pet_quality.csv"
    new = not path.exists()
    with path.open("a", newline="") as file:
        out = csv.writer(file)
        names = list(next(iter(figures.values())))
        if new:
            out.writerow(["date", "commit", "machine", "case", "counts", "method", *names, "seconds", "cpu_seconds"])
        for method, values in figures.items():
            row = [datetime.date.today(), commit(), machine("cpu"), subject.name, f"{counts:g}", method]
            numbers = [f"{values[n]:.2f}" if n == "psnr_db" else f"{values[n]:.3f}" for n in names]
            out.writerow([*row, *numbers, *(f"{s:.1f}" for s in seconds[method])])


def _data(name: str) -> Path | None:
    root = os.environ.get("RECON3D_DATA") or Path(__file__).parents[2] / "shared" / "data"
    path = Path(root) / name
    if not path.exists():
        print(f"{name} is not at hand (set RECON3D_DATA to its folder): its cases are left out")
        return None
    return path

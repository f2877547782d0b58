"""A small multi-coil scan for tests of whole MRI jobs: eight coils' worth of trouble in 4 coils and 28 x 24 pixels."""

from __future__ import annotations

import torch

from recon3d.api import reconstruct_mri
from recon3d.geometry import VolumeGrid
from recon3d.operators.masks import equispaced
from recon3d.operators.mri import CartesianMRI
from recon3d.operators.noise import GaussianNoise
from recon3d.operators.simulate_mri import simulate_mri
from recon3d.priors.gaussian import ComplexGaussianPrior, GaussianPrior, power_law
from recon3d.recipes import Recipe
from recon3d.testing.phantoms import coil_maps, smooth_phase

GRID = VolumeGrid((3, 28, 24), (3.0, 1.0, 1.2))
COILS = 4
SIGMA = 0.02
# noise, conjugate gradients and total variation along z, with duals in the checkpoint
RECIPE = {
    "name": "survivor",
    "start": {"image": "cg", "iterations": 4},
    "trajectory": {"grid": "karras", "levels": 12, "sigma_max": 0.5, "sigma_min": 0.02},
    "consistency": {"kind": "proximal_cg", "iterations": 2, "rho_rule": "bayes", "rho": 1.0},
    "regulariser": {"kind": "tvz"},
    "renoise": {"kind": "ddim", "eta": 0.85},
    "noise": {"kind": "iscs_mm", "correlation_mm": 6.0},
}


def complex_gaussian(scale: float = 1.0) -> ComplexGaussianPrior:
    return ComplexGaussianPrior(power_law(GRID.slice_shape, 0.3 * scale), 0.0, scale)


def magnitude_prior() -> GaussianPrior:
    """A prior of one real channel, which the engine has to make complex."""
    return GaussianPrior(power_law(GRID.slice_shape, 0.3))


def scan(acceleration: float = 3.0, seed: int = 1):
    """(image, maps, mask [kx], k-space)."""
    maps = coil_maps(COILS, GRID.shape)
    mask = equispaced(GRID.shape[2], acceleration, 0.34, seed) if acceleration > 1 else torch.ones(GRID.shape[2])
    image = complex_gaussian().sample(1, seed)[0].expand(GRID.shape).to(torch.complex64)
    image = (image.abs() * smooth_phase(GRID.shape)).to(torch.complex64)
    return image, maps, mask, simulate_mri(image, CartesianMRI(mask, maps), noise=GaussianNoise(SIGMA), seed=seed)


def mri_reconstruction(folder, prior=None, recipe=None, **settings):
    _, maps, mask, y = scan()
    return reconstruct_mri(
        y, mask, maps, GRID, recipe or Recipe.model_validate(RECIPE), prior or magnitude_prior(),
        noise=GaussianNoise(SIGMA), seed=11, folder=folder, device="cpu", **settings,
    )  # fmt: skip

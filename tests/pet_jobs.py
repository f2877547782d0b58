"""A small PET scan for tests of whole jobs: four rings of 40 crystals around a body with a hot sphere."""

from __future__ import annotations

import functools

import torch

from recon3d.api import reconstruct_pet
from recon3d.geometry import VolumeGrid, pet_geometry
from recon3d.geometry.pet import PETScanner
from recon3d.operators.simulate_pet import simulate_pet
from recon3d.priors.gaussian import GaussianPrior, power_law
from recon3d.recipes import Recipe

SCANNER = PETScanner("tiny", 4, 6.0, 40, 80.0, 5, 4, n_radial=20)
GEOMETRY = pet_geometry(SCANNER, max_ring_difference=2)
GRID = VolumeGrid((7, 20, 22), (3.0, 5.0, 5.0))
ACTIVITY = 4000.0
SUBSETS = 4
# noise, EM with an anchor and the relative difference prior along z, a subset counter in the checkpoint
RECIPE = {
    "name": "survivor",
    "start": {"image": "osem", "iterations": 2, "subsets": SUBSETS},
    "trajectory": {"grid": "karras", "levels": 12, "sigma_max": 0.5, "sigma_min": 0.02},
    "consistency": {"kind": "em", "iterations": 3, "subsets": SUBSETS, "rho_rule": "bayes", "rho": 1.0},
    "regulariser": {"kind": "rdp", "strength": 0.02},
    "renoise": {"kind": "ddim", "eta": 0.85},
    "noise": {"kind": "iscs_mm", "correlation_mm": 6.0},
}


def body():
    """(activity in Bq/mL, attenuation in 1/mm)."""
    z, y, x = torch.meshgrid(
        *(torch.arange(n) * s - (n - 1) / 2 * s for n, s in zip(GRID.shape, GRID.spacing_mm, strict=True)),
        indexing="ij",
    )
    inside = ((y / 38) ** 2 + (x / 42) ** 2 < 1).float()
    hot = (y**2 + (x - 15) ** 2 + z**2 < 11**2).float()
    return ACTIVITY * inside * (1 + 3 * hot), 0.0096 * inside


@functools.cache
def scan(counts=2e5, geometry=GEOMETRY):
    """(activity, simulated measurement)."""
    activity, mu = body()
    return activity, simulate_pet(activity, GRID, geometry, mu_per_mm=mu, counts=counts, psf_fwhm_mm=None, seed=1)


class _AnySlice(GaussianPrior):
    """The same spread for coronal and sagittal slices."""

    def denoise(self, u, sigma, cond=None):
        shape = tuple(u.shape[-2:])
        if shape == tuple(self.spectrum.shape):
            return super().denoise(u, sigma, cond)
        return GaussianPrior(power_law(shape, 0.8 * self.scale), 0.0, 0.0, self.scale).denoise(u, sigma, cond)


def prior(scale=1.0):
    """Of relative activities; its own unit plays no role."""
    return _AnySlice(power_law(GRID.slice_shape, 0.8 * scale), 0.0, 0.0, scale)


def pet_reconstruction(folder, prior_=None, recipe=None, geometry=GEOMETRY, **settings):
    _, made = scan(geometry=geometry)
    return reconstruct_pet(
        made.prompts, made.geometry, made.factors, made.additive, GRID, recipe or Recipe.model_validate(RECIPE),
        prior_ or prior(), scale=made.scale, seed=11, folder=folder, device="cpu", **settings,
    )  # fmt: skip

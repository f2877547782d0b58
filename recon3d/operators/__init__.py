"""Scanner models: linear operators with exact adjoints, their noise, coils, sampling, and simulated measurements."""

from recon3d.operators.attenuation import attenuation_factors, mu_from_hu, resample_volume
from recon3d.operators.base import LinearOperator, Space
from recon3d.operators.coils import apply_coils, compress_coils, noise_covariance, outer_noise, prewhiten
from recon3d.operators.ct import CTOperator
from recon3d.operators.espirit import calibration_region, espirit, gridded_calibration
from recon3d.operators.fourier import centred_fft, centred_ifft, decouple_readout, decouple_stack
from recon3d.operators.mri import CartesianMRI, MRIOperator, NonCartesianMRI
from recon3d.operators.noise import GaussianNoise, NoiseModel, PoissonNoise, estimate_noise
from recon3d.operators.normalisation import (
    efficiency_factors,
    fan_sum_efficiencies,
    fan_sums,
    randoms_from_delayed,
)
from recon3d.operators.off_resonance import OffResonance
from recon3d.operators.pet import PETOperator, herman_meyer
from recon3d.operators.pet_listmode import PETListmode
from recon3d.operators.pet_scale import quantitative_scale
from recon3d.operators.simulate import simulate_ct
from recon3d.operators.simulate_mri import simulate_mri
from recon3d.operators.simulate_pet import SimulatedPET, simulate_pet
from recon3d.operators.thick_slices import ThickSlices

__all__ = [
    "CTOperator",
    "CartesianMRI",
    "GaussianNoise",
    "LinearOperator",
    "MRIOperator",
    "NoiseModel",
    "NonCartesianMRI",
    "OffResonance",
    "PETListmode",
    "PETOperator",
    "PoissonNoise",
    "SimulatedPET",
    "Space",
    "ThickSlices",
    "apply_coils",
    "attenuation_factors",
    "calibration_region",
    "centred_fft",
    "centred_ifft",
    "compress_coils",
    "decouple_readout",
    "decouple_stack",
    "efficiency_factors",
    "espirit",
    "estimate_noise",
    "fan_sum_efficiencies",
    "fan_sums",
    "gridded_calibration",
    "herman_meyer",
    "mu_from_hu",
    "noise_covariance",
    "outer_noise",
    "prewhiten",
    "quantitative_scale",
    "randoms_from_delayed",
    "resample_volume",
    "simulate_ct",
    "simulate_mri",
    "simulate_pet",
]

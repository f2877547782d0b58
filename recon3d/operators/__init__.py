"""Scanner models: linear operators with exact adjoints, their noise, coils, sampling, and simulated measurements."""

from recon3d.operators.base import LinearOperator, Space
from recon3d.operators.coils import apply_coils, compress_coils, noise_covariance, outer_noise, prewhiten
from recon3d.operators.ct import CTOperator
from recon3d.operators.espirit import calibration_region, espirit, gridded_calibration
from recon3d.operators.fourier import centred_fft, centred_ifft, decouple_readout, decouple_stack
from recon3d.operators.mri import CartesianMRI, MRIOperator, NonCartesianMRI
from recon3d.operators.noise import GaussianNoise, NoiseModel, PoissonNoise, estimate_noise
from recon3d.operators.off_resonance import OffResonance
from recon3d.operators.simulate import simulate_ct
from recon3d.operators.simulate_mri import simulate_mri
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
    "PoissonNoise",
    "Space",
    "ThickSlices",
    "apply_coils",
    "calibration_region",
    "centred_fft",
    "centred_ifft",
    "compress_coils",
    "decouple_readout",
    "decouple_stack",
    "espirit",
    "estimate_noise",
    "gridded_calibration",
    "noise_covariance",
    "outer_noise",
    "prewhiten",
    "simulate_ct",
    "simulate_mri",
]

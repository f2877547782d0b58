"""Scanner models: linear operators with exact adjoints, their noise, and simulated measurements."""

from recon3d.operators.base import LinearOperator, Space
from recon3d.operators.ct import CTOperator
from recon3d.operators.fourier import centred_fft, centred_ifft, decouple_readout, decouple_stack
from recon3d.operators.mri import CartesianMRI, MRIOperator
from recon3d.operators.noise import GaussianNoise, NoiseModel, PoissonNoise, estimate_noise
from recon3d.operators.simulate import simulate_ct

__all__ = [
    "CTOperator",
    "CartesianMRI",
    "GaussianNoise",
    "LinearOperator",
    "MRIOperator",
    "NoiseModel",
    "PoissonNoise",
    "Space",
    "centred_fft",
    "centred_ifft",
    "decouple_readout",
    "decouple_stack",
    "estimate_noise",
    "simulate_ct",
]

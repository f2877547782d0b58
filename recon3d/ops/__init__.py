"""Fast operators: each is a checked Python function over a torch op with a torch reference and compiled kernels."""

from recon3d.ops.blur import gaussian_blur
from recon3d.ops.cg import cg_step_
from recon3d.ops.density import density_compensation
from recon3d.ops.dot import dot
from recon3d.ops.em import em_update, poisson_ratio
from recon3d.ops.fbp import fbp
from recon3d.ops.joseph3d import joseph3d, joseph3d_adjoint
from recon3d.ops.joseph3d_sinogram import joseph3d_sinogram, joseph3d_sinogram_adjoint
from recon3d.ops.nufft import nufft, nufft_adjoint, nufft_normal, nufft_toeplitz_kernel
from recon3d.ops.nufft_plan import NufftPlan, nufft_plan
from recon3d.ops.philox import NoiseKey, philox4x32, philox_bits, philox_normal
from recon3d.ops.radon import radon, radon_adjoint
from recon3d.ops.ramp_filter import ramp_filter
from recon3d.ops.rdp import rdp, rdp_gradient
from recon3d.ops.renoise import DataTerm, renoise
from recon3d.ops.sense import SenseMaps, pack_maps, sense_normal, sense_toeplitz
from recon3d.ops.tof import tof_weights
from recon3d.ops.tv3d import tv3d_dual_, tv3d_primal_, tv3d_value
from recon3d.ops.tvz import tvz_adjoint, tvz_diff, tvz_normal, tvz_update, tvz_update_

__all__ = [
    "DataTerm",
    "NoiseKey",
    "NufftPlan",
    "SenseMaps",
    "cg_step_",
    "density_compensation",
    "dot",
    "em_update",
    "fbp",
    "gaussian_blur",
    "joseph3d",
    "joseph3d_adjoint",
    "joseph3d_sinogram",
    "joseph3d_sinogram_adjoint",
    "nufft",
    "nufft_adjoint",
    "nufft_normal",
    "nufft_plan",
    "nufft_toeplitz_kernel",
    "pack_maps",
    "philox4x32",
    "philox_bits",
    "philox_normal",
    "poisson_ratio",
    "radon",
    "radon_adjoint",
    "ramp_filter",
    "rdp",
    "rdp_gradient",
    "renoise",
    "sense_normal",
    "sense_toeplitz",
    "tof_weights",
    "tv3d_dual_",
    "tv3d_primal_",
    "tv3d_value",
    "tvz_adjoint",
    "tvz_diff",
    "tvz_normal",
    "tvz_update",
    "tvz_update_",
]

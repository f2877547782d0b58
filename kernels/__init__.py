"""Triton kernels, one file per op; imported as recon3d.kernels."""

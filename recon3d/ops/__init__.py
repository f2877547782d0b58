"""Fast operators: each is a checked Python function over a torch op with a torch reference and compiled kernels."""

from recon3d.ops.dot import dot

__all__ = ["dot"]

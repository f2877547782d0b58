"""Fast operators: each is a checked Python function over a torch op with a torch reference and compiled kernels."""

from recon3d.ops.cg import cg_step_
from recon3d.ops.dot import dot
from recon3d.ops.radon import radon, radon_adjoint
from recon3d.ops.tvz import tvz_adjoint, tvz_diff, tvz_normal, tvz_update, tvz_update_

__all__ = [
    "cg_step_",
    "dot",
    "radon",
    "radon_adjoint",
    "tvz_adjoint",
    "tvz_diff",
    "tvz_normal",
    "tvz_update",
    "tvz_update_",
]

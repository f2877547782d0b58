"""How the measurement enters: each part turns the prior's estimate x0 into one that the data agree with."""

from recon3d.consistency.base import Consistency, Guidance, Identity, Projection, Visit
from recon3d.consistency.conditional import Conditional
from recon3d.consistency.em import OrderedSubsets, log_likelihood, ordered_subsets_em, poisson_log_likelihood
from recon3d.consistency.gradient import Gradient
from recon3d.consistency.ilvr import LowPass
from recon3d.consistency.scaled import ScaledProjection, ScaledRenoise
from recon3d.consistency.solve import Rho, Solve, conjugate_gradients

__all__ = [
    "Conditional",
    "Consistency",
    "Gradient",
    "Guidance",
    "Identity",
    "LowPass",
    "OrderedSubsets",
    "Projection",
    "Rho",
    "ScaledProjection",
    "ScaledRenoise",
    "Solve",
    "Visit",
    "conjugate_gradients",
    "log_likelihood",
    "ordered_subsets_em",
    "poisson_log_likelihood",
]

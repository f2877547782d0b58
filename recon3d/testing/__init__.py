"""Public conformance suite: laws of operators and priors, analytic phantoms, and the closed-form posterior."""

from recon3d.testing.conformance import (
    Posterior,
    check_adjoint,
    check_posterior,
    check_prior,
    check_slices_independent,
    dense,
    gaussian_posterior,
)

__all__ = [
    "Posterior", "check_adjoint", "check_posterior", "check_prior", "check_slices_independent", "dense",
    "gaussian_posterior",
]  # fmt: skip

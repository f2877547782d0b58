"""MLEM and OSEM: maximum likelihood of Poisson counts, what every PET scanner shows.

    x <- x A_j^T (y_j / (A_j x + b_j)) / A_j^T 1      subset j after subset j of the measurement

(Shepp and Vardi, IEEE Trans. Med. Imaging 1 (1982) 113; Hudson and Larkin, IEEE Trans. Med. Imaging 13 (1994) 601).
With one subset each iteration raises the likelihood; noise grows with iterations, so few of them regularise.
"""

from __future__ import annotations

from torch import Tensor

from recon3d.baselines.progress import Callback
from recon3d.consistency.em import ordered_subsets_em, uniform_start
from recon3d.operators.base import LinearOperator

__all__ = ["mlem", "osem"]


def mlem(
    y: Tensor,
    operator: LinearOperator,
    iterations: int = 30,
    x0: Tensor | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """Reconstruct by MLEM.

    Args:
        y: counts in the operator's range, at least 0 (ones for the events of a list).
        operator: the scanner; weights that are not negative. Its `additive` counts and `sensitivity()` are used.
        iterations: one A and one A^T each.
        x0: start, above 0 where activity may be; None takes the constant volume that explains all counts.
        callback: called after every iteration with (iteration, volume); returning True stops.

    Returns:
        The activity, at least 0, in the unit of the operator's domain.

    Raises:
        ValueError: counts are negative, or iterations or y do not fit.
    """
    return osem(y, operator, iterations, 1, x0, callback)


def osem(
    y: Tensor,
    operator: LinearOperator,
    iterations: int = 3,
    subsets: int = 1,
    x0: Tensor | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """Reconstruct by OSEM.

    Args:
        y: as in mlem.
        operator: as in mlem, with subsets.
        iterations: passes over the measurement, `subsets` updates each.
        subsets: of the measurement; a divisor of the number of views balances them, 10 to 30 are usual.
        x0: as in mlem.
        callback: called after every pass with (pass, volume); returning True stops.

    Returns:
        As mlem.

    Raises:
        ValueError: counts are negative, or a number or y does not fit.
    """
    if iterations < 1:
        raise ValueError(f"osem: iterations must be at least 1, got {iterations}")
    x = uniform_start(operator, y, subsets) if x0 is None else x0
    for k in range(1, iterations + 1):
        x = ordered_subsets_em(x, y, operator, subsets=subsets, iterations=subsets)
        if callback is not None and callback(k, x):
            break
    return x

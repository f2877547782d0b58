"""Hounsfield units and attenuation: HU live in files, 1/mm everywhere else.

mu = mu_water (1 + HU / 1000). The default mu_water is that of about 70 keV, the effective energy of a 120 kVp scan.
"""

from __future__ import annotations

from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

MU_WATER_PER_MM = 0.0193

Values = TypeVar("Values", Tensor, NDArray[np.floating], float)


def hu_to_mu(hu: Values, mu_water_per_mm: float = MU_WATER_PER_MM) -> Values:
    """Attenuation in 1/mm of Hounsfield units.

    >>> hu_to_mu(0.0)
    0.0193
    """
    return (hu * 1e-3 + 1.0) * mu_water_per_mm


def mu_to_hu(mu: Values, mu_water_per_mm: float = MU_WATER_PER_MM) -> Values:
    """Hounsfield units of an attenuation in 1/mm.

    >>> mu_to_hu(0.0)
    -1000.0
    """
    return (mu * (1.0 / mu_water_per_mm) - 1.0) * 1000.0

"""From Bq/mL to counts: what time, decay and dead time make of a PET operator's scale."""

from __future__ import annotations

import math

__all__ = ["quantitative_scale"]


def quantitative_scale(
    duration_s: float,
    half_life_s: float = math.inf,
    *,
    start_s: float = 0.0,
    branching: float = 1.0,
    dead_time: float = 1.0,
    calibration: float = 1.0,
) -> float:
    """Counts that one Bq/mL over one mm of a line gives: the `scale` of a PET operator.

        scale = calibration * branching / dead_time * duration * 2^(-start / half_life) * (1 - e^-a) / a,
        a = ln 2 * duration / half_life

    The last two terms are the decay from the reference time to the start of the frame and its mean over the frame; the
    usual decay correction a / (1 - e^-a) is the inverse of the latter. The image is activity at the reference time.

    Args:
        duration_s: length of the frame.
        half_life_s: of the isotope; infinite = no decay.
        start_s: start of the frame after the time that the image's activity refers to.
        branching: positrons per decay (F-18: 0.967).
        dead_time: correction factor for lost coincidences, at least 1.
        calibration: coincidences per second, positron per second and mL, and mm, that a bin with factor 1 counts.

    Raises:
        ValueError: a number outside its range.

    >>> round(quantitative_scale(600.0, 6586.2, branching=0.967), 3)
    562.261
    """
    for name, value, least in (
        ("duration_s", duration_s, 0.0),
        ("half_life_s", half_life_s, 0.0),
        ("branching", branching, 0.0),
        ("calibration", calibration, 0.0),
    ):
        if math.isnan(value) or value <= least or (math.isinf(value) and name != "half_life_s"):
            raise ValueError(f"quantitative_scale: {name} must be positive, got {value}")
    if branching > 1:
        raise ValueError(f"quantitative_scale: branching is at most 1, got {branching}")
    if not (math.isfinite(dead_time) and dead_time >= 1):
        raise ValueError(
            f"quantitative_scale: dead_time is the factor that corrects counts, at least 1, got {dead_time}; give the "
            "inverse of a live-time fraction"
        )
    if not math.isfinite(start_s):
        raise ValueError(f"quantitative_scale: start_s must be a time in seconds, got {start_s}")
    rate = math.log(2) / half_life_s
    a = rate * duration_s
    mean = -math.expm1(-a) / a if a > 0 else 1.0
    return calibration * branching / dead_time * duration_s * math.exp(-rate * start_s) * mean
